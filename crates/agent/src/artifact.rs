//! What a workload is: one digest over everything that its command names. A deployment admits such digests, and the launcher
//! executes only what was measured.
//!
//! Of a program alone it is the SHA-256 of its file, what `sha256sum` prints. Of more it is the SHA-256 of one line for each
//! part, in the order of the command: `file` and the SHA-256 of its content for the program, for the interpreter of its `#!`
//! line and for each argument that names a file; `text` and the SHA-256 of the argument for each other. The content of a file
//! counts and its name does not, so the same build has the same artifact on every host.
//!
//! What a program reads by itself afterwards (its libraries, the modules it imports, its environment) is not in it.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::digest::{Context, SHA256};
use countersign_core::canonical::Digest;

use crate::launch::program;

/// Largest file that is read, in bytes.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << 30;
/// Scripts whose interpreter is a script, one inside the other: as many as the kernel follows.
const INTERPRETERS_MAX: usize = 4;
/// Longest `#!` line that the kernel reads, in bytes.
const SHEBANG_BYTES_MAX: u64 = 256;
const READ_BYTES: usize = 64 * 1024;

/// What a command names, as it was read.
#[derive(Debug)]
pub struct Measured {
    /// The digest that deployments name.
    pub artifact: Digest,
    /// Each part, in order.
    pub parts: Vec<Part>,
}

/// One part of an artifact.
#[derive(Debug)]
pub struct Part {
    /// The file or the argument.
    pub name: OsString,
    /// Of its content.
    pub digest: Digest,
    /// As it was when it was read; none for an argument that is no file.
    read: Option<Stamp>,
}

/// Tells whether a file is still the one that was read, untouched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

/// Why a command has no artifact.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// There is no such program.
    #[error("{0}")]
    Program(String),
    /// A file cannot be read.
    #[error("could not read `{}`, which the command names", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is too large to be part of a program.
    #[error(
        "`{}` is larger than {} MiB, and what the command names is read at each start; name data in the environment instead",
        .0.display(),
        FILE_BYTES_MAX >> 20
    )]
    TooLarge(PathBuf),
    /// Scripts inside scripts.
    #[error("`{}` begins with `#!`, and so does its interpreter, more than {INTERPRETERS_MAX} times", .0.display())]
    Interpreters(PathBuf),
}

/// Reads what `command` names when it is run in `dir` with `path` as its `PATH`.
pub fn measure(command: &[String], dir: &Path, path: Option<&OsStr>) -> Result<Measured, MeasureError> {
    let (name, arguments) = command.split_first().map_or(("", [].as_slice()), |(name, rest)| (name, rest));
    let mut file = program::find(name, dir, path).map_err(|e| MeasureError::Program(e.to_string()))?;
    let mut parts = Vec::with_capacity(1 + arguments.len());
    for depth in 0.. {
        parts.push(Part::of_file(&file)?);
        let Some(shebang) = shebang(&file)? else { break };
        if depth == INTERPRETERS_MAX {
            return Err(MeasureError::Interpreters(file));
        }
        parts.extend(shebang.argument.map(Part::of_text));
        file = dir.join(shebang.interpreter);
    }
    for argument in arguments {
        let named = dir.join(argument);
        parts.push(if named.is_file() { Part::of_file(&named)? } else { Part::of_text(argument.into()) });
    }
    let artifact = match parts.as_slice() {
        [only] => only.digest,
        several => Digest::of(lines(several).as_bytes()),
    };
    Ok(Measured { artifact, parts })
}

fn lines(parts: &[Part]) -> String {
    parts.iter().fold(String::new(), |mut text, part| {
        let _ = writeln!(text, "{} {}", part.kind(), part.digest);
        text
    })
}

impl Measured {
    /// Whether every file is still the one that was read. To be asked after the program was executed: then what runs is
    /// what was read.
    pub fn still_holds(&self) -> bool {
        self.parts.iter().all(|part| match &part.read {
            Some(read) => fs::metadata(&part.name).is_ok_and(|now| Stamp::of(&now) == *read),
            None => true,
        })
    }
}

impl Part {
    /// `file` or `text`.
    pub fn kind(&self) -> &'static str {
        if self.read.is_some() { "file" } else { "text" }
    }

    fn of_text(text: OsString) -> Self {
        Self { digest: Digest::of(text.as_encoded_bytes()), name: text, read: None }
    }

    fn of_file(path: &Path) -> Result<Self, MeasureError> {
        let unreadable = |source| MeasureError::Unreadable { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(unreadable)?;
        let stamp = Stamp::of(&file.metadata().map_err(unreadable)?);
        if stamp.size > FILE_BYTES_MAX {
            return Err(MeasureError::TooLarge(path.to_owned()));
        }
        let digest = digest_of(&mut file).map_err(unreadable)?;
        Ok(Self { name: path.into(), digest, read: Some(stamp) })
    }
}

/// SHA-256 of the rest of a file.
pub(crate) fn digest_of(file: &mut File) -> io::Result<Digest> {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => context.update(&buffer[..read]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    Ok(Digest(digest))
}

impl Stamp {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

struct Shebang {
    interpreter: PathBuf,
    argument: Option<OsString>,
}

/// The first line of a script, as execve(2) reads it: the interpreter, and all the rest as one argument.
fn shebang(path: &Path) -> Result<Option<Shebang>, MeasureError> {
    let unreadable = |source| MeasureError::Unreadable { path: path.to_owned(), source };
    let mut line = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    BufReader::new(file.take(SHEBANG_BYTES_MAX)).read_until(b'\n', &mut line).map_err(unreadable)?;
    let Some(rest) = line.strip_prefix(b"#!") else { return Ok(None) };
    let rest = rest.trim_ascii();
    let end = rest.iter().position(|byte| matches!(byte, b' ' | b'\t')).unwrap_or(rest.len());
    let (interpreter, argument) = rest.split_at(end);
    let argument = argument.trim_ascii();
    Ok(Some(Shebang {
        interpreter: OsString::from_vec(interpreter.to_vec()).into(),
        argument: (!argument.is_empty()).then(|| OsString::from_vec(argument.to_vec())),
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn with(files: &[(&str, &str)]) -> Self {
            let dir = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(name, text)| dir.write(name, text));
            dir
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }

        fn measure(&self, command: &[&str]) -> Result<Measured, MeasureError> {
            let command: Vec<String> = command.iter().map(|part| (*part).to_owned()).collect();
            measure(&command, self.0.path(), Some(self.0.path().as_os_str()))
        }

        fn artifact(&self, command: &[&str]) -> Digest {
            self.measure(command).unwrap().artifact
        }
    }

    #[test]
    fn a_program_alone_is_what_sha256sum_prints() {
        let dir = Dir::with(&[("serve", "abc")]);
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(dir.artifact(&["./serve"]).to_string(), known);
        assert_eq!(dir.artifact(&["serve"]).to_string(), known, "by whatever name it was found");
    }

    #[test]
    fn an_interpreter_what_it_is_given_and_each_argument_count() {
        let dir = Dir::with(&[("python", "elf"), ("app.py", "1"), ("run", "#! python -u x\n1")]);
        let lines = |parts: &[(&str, &str)]| {
            let lines: String =
                parts.iter().map(|(kind, of)| format!("{kind} {}\n", Digest::of(of.as_bytes()))).collect();
            Digest::of(lines.as_bytes())
        };
        assert_eq!(dir.artifact(&["python", "app.py"]), lines(&[("file", "elf"), ("file", "1")]));
        assert_eq!(dir.artifact(&["python", "-c", "1"]), lines(&[("file", "elf"), ("text", "-c"), ("text", "1")]));
        let script = [("file", "#! python -u x\n1"), ("text", "-u x"), ("file", "elf"), ("text", "--port=1")];
        assert_eq!(dir.artifact(&["./run", "--port=1"]), lines(&script));
    }

    #[test]
    fn a_changed_byte_anywhere_is_another_artifact_and_a_moved_file_is_not() {
        let dir = Dir::with(&[("python", "elf"), ("app.py", "1"), ("moved.py", "1")]);
        let before = dir.artifact(&["python", "app.py"]);
        assert_eq!(dir.artifact(&["python", "moved.py"]), before);
        dir.write("app.py", "2");
        assert_ne!(dir.artifact(&["python", "app.py"]), before);
        dir.write("app.py", "1");
        dir.write("python", "fle");
        assert_ne!(dir.artifact(&["python", "app.py"]), before);
    }

    #[test]
    fn a_file_that_was_replaced_or_written_after_it_was_read_is_noticed() {
        let dir = Dir::with(&[("serve", "1"), ("next", "1")]);
        let measured = dir.measure(&["./serve"]).unwrap();
        assert!(measured.still_holds());
        fs::rename(dir.0.path().join("next"), dir.0.path().join("serve")).unwrap();
        assert!(!measured.still_holds(), "the same content, and another file");
        let measured = dir.measure(&["./serve"]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        dir.write("serve", "2");
        assert!(!measured.still_holds());
    }

    #[test]
    fn what_cannot_be_measured_says_why() {
        let dir = Dir::with(&[("a", "#!b\n"), ("b", "#!a\n")]);
        File::create(dir.0.path().join("large")).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        for (command, expected) in [
            (vec!["./missing"], "could not find the program `./missing`"),
            (vec!["./a"], "more than 4 times"),
            (vec!["sh", "large"], "could not find the program `sh`"),
            (vec!["./a/b"], "could not find the program"),
        ] {
            let said = dir.measure(&command).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
        dir.write("serve", "elf");
        let said = dir.measure(&["serve", "large"]).unwrap_err().to_string();
        assert!(said.contains("is larger than 1024 MiB"), "{said}");
    }
}
