//! The file of the audit trail: whole lines at its end, each on the disk before anybody is told so, and older files beside it.
//!
//! A line that a crash cut short is taken off at the next start: nobody was told that it was there. Nothing else is ever
//! taken off but the oldest file, when there are too many.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// Longest file, in bytes; then another one is begun.
pub const FILE_BYTES_MAX: u64 = 32 * 1024 * 1024;
/// Older files that are kept: `audit.jsonl.1` is the newest of them.
pub const FILES_KEPT: u32 = 8;
/// How far back the end of the last whole line is looked for: no line is longer.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// A trail that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the audit trail `{path}` {what}")]
pub struct AuditError {
    /// Where.
    pub path: PathBuf,
    what: &'static str,
    #[source]
    source: Option<io::Error>,
}

impl AuditError {
    pub(super) fn new(path: &Path, what: &'static str, source: io::Error) -> Self {
        Self { path: path.to_owned(), what, source: Some(source) }
    }

    /// What to do about it.
    pub fn help(&self) -> String {
        "name another file with --audit-log: a file of this process alone, in a directory that it may write".to_owned()
    }
}

/// An open trail, locked against other processes.
pub(super) struct TrailFile {
    path: PathBuf,
    file: File,
    /// Where its last whole line ends.
    size: u64,
    bytes_max: u64,
}

impl TrailFile {
    pub(super) fn open(path: &Path) -> Result<Self, AuditError> {
        Self::open_with(path, FILE_BYTES_MAX)
    }

    fn open_with(path: &Path, bytes_max: u64) -> Result<Self, AuditError> {
        let failed = |source| AuditError::new(path, "could not be opened", source);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            // A name that leads elsewhere is not followed, and one without an end is not waited for.
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(AuditError { path: path.to_owned(), what: "is no ordinary file", source: None });
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(AuditError { path: path.to_owned(), what: "is written by another process", source: None });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        let size = end_of_lines(path, &file)?;
        file.set_len(size).map_err(failed)?;
        sync_dir(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, size, bytes_max })
    }

    /// Writes whole lines; returns when they are on the disk. On an error nothing of them stays.
    pub(super) fn append(&mut self, lines: &[u8]) -> Result<(), AuditError> {
        self.follow_name()?;
        if self.size > 0 && self.size + lines.len() as u64 > self.bytes_max {
            self.rotate()?;
        }
        let written = self.file.write_all_at(lines, self.size).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // What was written of it is overwritten by the next lines, or taken off here or at the next start.
            let _ = self.file.set_len(self.size);
            return Err(AuditError::new(&self.path, "could not be written", source));
        }
        self.size += lines.len() as u64;
        Ok(())
    }

    /// Somebody may have moved the file away, as log rotation does: what comes now belongs under its name.
    fn follow_name(&mut self) -> Result<(), AuditError> {
        let held = self.file.metadata().map(|held| (held.dev(), held.ino())).ok();
        let named = fs::symlink_metadata(&self.path).map(|named| (named.dev(), named.ino())).ok();
        if held.is_none() || held != named {
            *self = Self::open_with(&self.path, self.bytes_max)?;
        }
        Ok(())
    }

    /// Begins another file. A crash in between leaves the older ones, under a name more or less.
    fn rotate(&mut self) -> Result<(), AuditError> {
        for n in (1..FILES_KEPT).rev() {
            let (from, to) = (self.older(n), self.older(n + 1));
            self.rename(&from, &to)?;
        }
        let path = self.path.clone();
        self.rename(&path, &self.older(1))?;
        *self = Self::open_with(&self.path, self.bytes_max)?;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), AuditError> {
        match fs::rename(from, to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(AuditError::new(&self.path, "could not be moved to make room", error))
            }
            _ => Ok(()),
        }
    }

    fn older(&self, n: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{n}"));
        name.into()
    }
}

/// Where the last whole line ends. What is no trail is left as it is.
fn end_of_lines(path: &Path, mut file: &File) -> Result<u64, AuditError> {
    let failed = |source| AuditError::new(path, "could not be read", source);
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let from = size.saturating_sub(LINE_BYTES_MAX);
    let (mut first, mut tail) = ([0], Vec::new());
    let other = || AuditError { path: path.to_owned(), what: "is another file, and no audit trail", source: None };
    if size > 0 {
        file.read_exact_at(&mut first, 0).map_err(failed)?;
        if first != *b"{" {
            return Err(other());
        }
    }
    file.seek(SeekFrom::Start(from)).map_err(failed)?;
    file.take(LINE_BYTES_MAX).read_to_end(&mut tail).map_err(failed)?;
    match tail.iter().rposition(|byte| *byte == b'\n') {
        Some(at) => Ok(from + at as u64 + 1),
        None if from == 0 => Ok(0),
        None => Err(other()),
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FileType, Mode};

    use super::*;

    fn line(n: u32) -> String {
        format!("{{\"n\":{n},\"text\":\"{}\"}}\n", "x".repeat(80))
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_that_a_crash_cut_short_is_taken_off_and_those_before_it_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let mut trail = TrailFile::open(&path).unwrap();
        trail.append(line(1).as_bytes()).unwrap();
        drop(trail);
        for torn in ["{", &line(2)[..50], ""] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            std::io::Write::write_all(&mut file, torn.as_bytes()).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            let mut trail = TrailFile::open(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            trail.append(line(3).as_bytes()).unwrap();
        }
        assert_eq!(lines(&path).iter().map(|line| &line["n"]).collect::<Vec<_>>(), [1, 3, 3, 3]);
        fs::write(&path, &line(1)[..50]).unwrap();
        drop(TrailFile::open(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"", "of its first line too");
    }

    #[test]
    fn what_is_no_trail_of_this_process_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("other"), "key = 1").unwrap();
        fs::write(at("binary"), vec![b'{'; 100_000]).unwrap();
        fs::write(at("real"), line(1)).unwrap();
        std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
        fs::create_dir(at("dir")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let _held = TrailFile::open(&at("held")).unwrap();
        for (name, expected) in [
            ("other", "is another file, and no audit trail"),
            ("binary", "is another file, and no audit trail"),
            ("link", "could not be opened"),
            ("dir", "could not be opened"),
            ("pipe", "is no ordinary file"),
            ("held", "is written by another process"),
            ("nowhere/audit.jsonl", "could not be opened"),
        ] {
            let refused = TrailFile::open(&at(name)).err().unwrap();
            assert_eq!(refused.what, expected, "{name}");
            assert!(refused.to_string().contains(name), "{refused}");
        }
        assert_eq!(fs::read(at("other")).unwrap(), b"key = 1");
        assert_eq!(fs::read(at("binary")).unwrap().len(), 100_000);
        assert_eq!(fs::read_to_string(at("real")).unwrap(), line(1));
    }

    #[test]
    fn so_many_files_of_such_a_size_are_kept_and_no_line_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let of_three = 3 * line(10).len() as u64;
        let mut trail = TrailFile::open_with(&path, of_three).unwrap();
        for n in 10..70 {
            trail.append(line(n).as_bytes()).unwrap();
        }
        let mut files: Vec<PathBuf> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), 1 + FILES_KEPT as usize);
        for file in &files {
            assert!(fs::metadata(file).unwrap().len() <= of_three);
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let kept: usize = files.iter().map(|file| lines(file).len()).sum();
        assert_eq!(kept, 27, "the newest of them");
        assert_eq!(lines(&path).last().unwrap()["n"], 69);
        assert_eq!(lines(&trail.older(FILES_KEPT))[0]["n"], 43);
        // Lines that are longer than a file have one of their own.
        trail.append((70..80).map(line).collect::<String>().as_bytes()).unwrap();
        assert_eq!(lines(&path).len(), 10);
    }

    #[test]
    fn what_comes_after_somebody_moved_the_file_away_is_under_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (path, moved) = (dir.path().join("audit.jsonl"), dir.path().join("moved"));
        let mut trail = TrailFile::open(&path).unwrap();
        trail.append(line(1).as_bytes()).unwrap();
        fs::rename(&path, &moved).unwrap();
        trail.append(line(2).as_bytes()).unwrap();
        assert_eq!((lines(&moved).len(), lines(&path).len()), (1, 1));
        fs::remove_file(&path).unwrap();
        trail.append(line(3).as_bytes()).unwrap();
        assert_eq!(lines(&path)[0]["n"], 3);
    }
}
