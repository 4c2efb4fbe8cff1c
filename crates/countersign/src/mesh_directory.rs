//! Reads the files of a mesh directory into memory, where the law parses them. Knows their names, not their meaning.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use countersign_core::{
    change::{Bodies, Revision},
    directory::{self, Directory, FILE_BYTES_MAX, Files, Mistake},
    state::MeshState,
};

use crate::{error::Failure, mistake};

/// The folders below a mesh directory that hold files of it.
pub const FOLDERS: [&str; 3] = ["policies", "gate", "tests"];
/// Files of one mesh directory at most.
const FILES_MAX: usize = 10_000;

/// Reads and parses the mesh directory `dir`. Every mistake in it is told at once.
pub fn load(dir: &Path) -> Result<Directory, Failure> {
    let (files, mut mistakes) = read(dir)?;
    match directory::parse(&files) {
        Ok(directory) if mistakes.is_empty() => Ok(directory),
        parsed => {
            mistakes.extend(parsed.err().into_iter().flat_map(directory::Mistakes::into_all));
            Err(Failure::new(format!("`{}` has {}", dir.display(), mistake::count(&mistakes))).mistakes(mistakes))
        }
    }
}

/// The text of every file that the mesh directory consists of, and what cannot be text.
pub fn read(dir: &Path) -> Result<(Files, Vec<Mistake>), Failure> {
    let could_not = |path: &Path, e: &io::Error| {
        Failure::new(format!("could not read `{}`", path.display()))
            .because(e)
            .help("every file of a mesh directory must be readable")
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for folder in std::iter::once("").chain(FOLDERS) {
        let folder = dir.join(folder);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound && folder != dir => continue,
            Err(e) => return Err(could_not(&folder, &e)),
        };
        for entry in entries {
            paths.push(entry.map_err(|e| could_not(&folder, &e))?.path());
        }
    }
    let (mut files, mut mistakes) = (Files::new(), Vec::new());
    for path in paths {
        let Some(name) = path.strip_prefix(dir).ok().and_then(Path::to_str).filter(|name| directory::is_read(name))
        else {
            continue;
        };
        if files.len() == FILES_MAX {
            return Err(Failure::new(format!("`{}` has more than {FILES_MAX} files", dir.display()))
                .help("a file can hold many policies"));
        }
        match text(&path).map_err(|e| could_not(&path, &e))? {
            Ok(text) => {
                files.insert(name.to_owned(), text);
            }
            Err((what, help)) => mistakes.push(Mistake {
                file: name.into(),
                text: "".into(),
                span: 0..0,
                what: format!("`{name}` {what}"),
                help: Some(help.to_owned()),
            }),
        }
    }
    Ok((files, mistakes))
}

type NoText = (&'static str, &'static str);

fn text(path: &Path) -> io::Result<Result<String, NoText>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > FILE_BYTES_MAX {
        return Ok(Err(("is too long to be read", "split it")));
    }
    Ok(String::from_utf8(bytes).map_err(|_| ("is not UTF-8 text", "save it as UTF-8")))
}

/// The mesh that the directory describes, as if it were applied to an empty one.
pub fn state(directory: &Directory) -> (MeshState, Bodies) {
    let empty = MeshState::default();
    let plan =
        directory::plan(directory, &empty, Revision::default()).expect("an empty mesh has no other trust domain");
    let state = empty.apply_all(&plan.change_set).expect("INVARIANT: a plan folds on the state it was made for");
    (state, plan.bodies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Output, Paint};

    fn written(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_line_and_a_caret() {
        let root = written(&[
            ("mesh.toml", b"trust_domain = \"shop.example\"\n[services.web]\nrunn = [\"x\"]\n"),
            ("policies/a.cedar", b"permit (principal, action resource);"),
            ("policies/latin1.cedar", b"// caf\xe9\n"),
        ]);
        let failure = load(root.path()).unwrap_err();
        let text = failure.render(Output::Text, Paint::plain());
        for part in ["mesh.toml:3:1", "runn", "policies/a.cedar:1:", "`policies/latin1.cedar` is not UTF-8 text", "───"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json: serde_json::Value = serde_json::from_str(&failure.render(Output::Json, Paint::plain())).unwrap();
        assert!(json["mistakes"].as_array().unwrap().len() >= 3, "{json}");
    }

    #[test]
    fn the_data_directory_and_other_files_are_passed_over() {
        let root = written(&[
            ("mesh.toml", b"trust_domain = \"shop.example\"\n"),
            (".countersign/policies/a.cedar", b"nonsense"),
            ("policies/a.cedar.swp", b"\xff\xfe"),
            ("policies/deep/b.cedar", b"nonsense"),
        ]);
        assert_eq!(load(root.path()).unwrap().policies.len(), 0);
    }
}
