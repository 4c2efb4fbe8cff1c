//! Finds the program a workload's `run` names, and says where it looked when there is none.

use std::{
    ffi::OsStr,
    fmt, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Why a program cannot be started.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ProgramError {
    Empty,
    NotFound { program: String, looked_in: Vec<PathBuf> },
    NotExecutable { path: PathBuf },
    NoInterpreter { path: PathBuf },
    Refused { path: PathBuf, reason: String },
}

/// The file that `program` means: a path (from `dir`) when it has a slash, otherwise the first in `path`.
pub(crate) fn find(program: &str, dir: &Path, path: Option<&OsStr>) -> Result<PathBuf, ProgramError> {
    if program.is_empty() {
        return Err(ProgramError::Empty);
    }
    let candidates: Vec<PathBuf> = match program.contains('/') {
        true => vec![dir.join(program)],
        false => path
            .map(|path| std::env::split_paths(path).map(|entry| dir.join(entry).join(program)).collect())
            .unwrap_or_default(),
    };
    let is_file = |candidate: &&PathBuf| candidate.metadata().is_ok_and(|found| found.is_file());
    let executable =
        |candidate: &&PathBuf| candidate.metadata().is_ok_and(|found| found.permissions().mode() & 0o111 != 0);
    let found: Vec<&PathBuf> = candidates.iter().filter(is_file).collect();
    match (found.iter().copied().find(executable), found.first()) {
        (Some(path), _) => Ok(path.clone()),
        (None, Some(path)) => Err(ProgramError::NotExecutable { path: path.to_path_buf() }),
        (None, None) => {
            let looked_in =
                candidates.iter().filter_map(|candidate| candidate.parent().map(Path::to_path_buf)).collect();
            Err(ProgramError::NotFound { program: program.to_owned(), looked_in })
        }
    }
}

/// What the failure to execute a file that was found means.
pub(crate) fn refused(path: PathBuf, error: &io::Error) -> ProgramError {
    match error.kind() {
        io::ErrorKind::NotFound => ProgramError::NoInterpreter { path },
        _ => ProgramError::Refused { path, reason: error.to_string() },
    }
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("`run` names no program"),
            Self::NotFound { program, looked_in } => {
                let places: Vec<String> = looked_in.iter().map(|dir| format!("`{}`", dir.display())).collect();
                match places.is_empty() {
                    true => write!(f, "could not find the program `{program}`: PATH is empty"),
                    false => write!(f, "could not find the program `{program}`: looked in {}", places.join(", ")),
                }
            }
            Self::NotExecutable { path } => {
                write!(f, "could not start `{0}`: it is not executable; help: chmod +x {0}", path.display())
            }
            Self::NoInterpreter { path } => {
                write!(
                    f,
                    "could not start `{}`: its interpreter (the `#!` line or the loader) does not exist",
                    path.display()
                )
            }
            Self::Refused { path, reason } => write!(f, "could not start `{}`: {reason}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_exist_is_named_with_the_places_that_were_searched() {
        let said = find("no-such", Path::new("/srv"), Some(OsStr::new("/usr/bin:tools"))).unwrap_err().to_string();
        assert_eq!(said, "could not find the program `no-such`: looked in `/usr/bin`, `/srv/tools`");
        let said = find("./no-such", Path::new("/srv/web"), None).unwrap_err().to_string();
        assert_eq!(said, "could not find the program `./no-such`: looked in `/srv/web`");
    }

    #[test]
    fn a_path_is_taken_from_the_working_directory_and_a_name_from_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("serve");
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        assert_eq!(
            find("./serve", dir.path(), None),
            Err(ProgramError::NotExecutable { path: dir.path().join("./serve") })
        );
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(find("./serve", dir.path(), None), Ok(dir.path().join("./serve")));
        assert_eq!(find("serve", Path::new("/"), Some(dir.path().as_os_str())), Ok(file));
    }
}
