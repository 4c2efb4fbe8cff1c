//! Finds the mesh that a command is about, like git finds a repository: from `-C DIR` or the current directory upwards,
//! the first directory with a `mesh.toml`. Reads no file of the mesh.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use countersign_api::run_file::{RUN_FILE, RunFile};

use crate::{error::Failure, login::Dashboard};

/// The file that makes a directory a mesh directory.
pub const MESH_FILE: &str = "mesh.toml";
/// The data directory below a mesh directory, unless `--data-dir` says otherwise. When it is a file, its one line names
/// the data directory, as git's `.git` does.
pub const DATA_DIR: &str = ".countersign";

/// A mesh on this machine, or one on another machine whose directory may be here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory with `mesh.toml`; absent when only a data directory was named.
    pub dir: Option<PathBuf>,
    /// Where the mesh keeps its state and its sockets.
    pub data_dir: PathBuf,
    /// The dashboard at which it is asked in place of its sockets, when it runs on another machine.
    pub dashboard: Option<Dashboard>,
}

/// Finds the mesh from `start` upwards. A given data directory needs no mesh directory.
pub fn find(start: Option<&Path>, data_dir: Option<&Path>) -> Result<Place, Failure> {
    let start = absolute(start.unwrap_or(Path::new(".")))?;
    let dir = start.ancestors().find(|dir| dir.join(MESH_FILE).is_file()).map(Path::to_path_buf);
    match (dir, data_dir) {
        (dir, Some(data_dir)) => {
            let data_dir = std::path::absolute(data_dir).unwrap_or(data_dir.into());
            Ok(Place { dir, data_dir, dashboard: None })
        }
        (Some(dir), None) => Ok(Place { data_dir: data_dir_below(&dir)?, dir: Some(dir), dashboard: None }),
        (None, None) => Err(Failure::new(format!(
            "found no mesh: neither `{}` nor a directory above it has a `{MESH_FILE}`",
            start.display()
        ))
        .help("go to a mesh directory, name one with `-C DIR`, or make one with `countersign init DIR`")),
    }
}

/// The mesh whose dashboard this is, with the mesh directory from `start` upwards if there is one.
pub fn afar(start: Option<&Path>, dashboard: Dashboard) -> Result<Place, Failure> {
    let start = absolute(start.unwrap_or(Path::new(".")))?;
    let dir = start.ancestors().find(|dir| dir.join(MESH_FILE).is_file()).map(Path::to_path_buf);
    let data_dir = dir.as_deref().unwrap_or(&start).join(DATA_DIR);
    Ok(Place { dir, data_dir, dashboard: Some(dashboard) })
}

/// The mesh of exactly this directory, for commands that name it.
pub fn at(dir: &Path, data_dir: Option<&Path>) -> Result<Place, Failure> {
    let dir = absolute(dir)?;
    if !dir.join(MESH_FILE).is_file() {
        return Err(Failure::new(format!("`{}` is not a mesh directory: it has no `{MESH_FILE}`", dir.display()))
            .help(format!("make one with `countersign init {}`", dir.display())));
    }
    let data_dir = match data_dir {
        Some(given) => std::path::absolute(given).unwrap_or(given.into()),
        None => data_dir_below(&dir)?,
    };
    Ok(Place { dir: Some(dir), data_dir, dashboard: None })
}

fn absolute(given: &Path) -> Result<PathBuf, Failure> {
    let failure = |e: &io::Error| {
        Failure::new(format!("could not open the directory `{}`", given.display()))
            .because(e)
            .help("check the spelling, or make it a mesh directory with `countersign init`")
    };
    let found = given.canonicalize().map_err(|e| failure(&e))?;
    if !found.is_dir() {
        return Err(failure(&io::Error::new(io::ErrorKind::NotADirectory, "it is not a directory")));
    }
    Ok(found)
}

fn data_dir_below(dir: &Path) -> Result<PathBuf, Failure> {
    let usual = dir.join(DATA_DIR);
    if !usual.is_file() {
        return Ok(usual);
    }
    let bad = || Failure::new(format!("`{}` does not name a data directory", usual.display()));
    let text = fs::read_to_string(&usual).map_err(|e| bad().because(&e))?;
    match text.strip_prefix("data-dir: ").map(str::trim_end).filter(|rest| !rest.is_empty() && !rest.contains('\n')) {
        Some(named) => Ok(dir.join(named)),
        None => Err(bad().cause("its only line must be `data-dir: PATH`").help("remove it, or give `--data-dir`")),
    }
}

impl Place {
    /// The mesh directory, for commands that cannot do without.
    pub fn dir(&self) -> Result<&Path, Failure> {
        self.dir.as_deref().ok_or_else(|| {
            Failure::new(format!("found no mesh directory for the data directory `{}`", self.data_dir.display()))
                .help("name it with `-C DIR`")
        })
    }

    /// Creates the data directory, for its owner only, and keeps it out of version control.
    pub fn create_data_dir(&self) -> Result<(), Failure> {
        use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
        let shown = self.data_dir.display();
        let help = "it needs a directory that you own and can write; name another one with `--data-dir`";
        let could_not = |e: &io::Error| {
            Failure::new(format!("could not create the data directory `{shown}`")).because(e).help(help)
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.data_dir).map_err(|e| could_not(&e))?;
        let about = fs::metadata(&self.data_dir).map_err(|e| could_not(&e))?;
        if about.uid() != rustix::process::getuid().as_raw() {
            return Err(Failure::new(format!("the data directory `{shown}` belongs to uid {}", about.uid())).help(help));
        }
        if about.mode() & 0o077 != 0 {
            fs::set_permissions(&self.data_dir, fs::Permissions::from_mode(0o700)).map_err(|e| could_not(&e))?;
        }
        let ignore = self.data_dir.join(".gitignore");
        if !ignore.exists() {
            fs::write(&ignore, "*\n").map_err(|e| {
                Failure::new(format!("could not write to the data directory `{shown}`")).because(&e).help(help)
            })?;
        }
        Ok(())
    }

    /// Where everything of the running mesh listens.
    pub fn run_file(&self) -> Option<RunFile> {
        serde_json::from_slice(&fs::read(self.data_dir.join(RUN_FILE)).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(failure: Failure) -> String {
        failure.render(crate::render::Output::Text, crate::render::Paint::plain())
    }

    #[test]
    fn a_mesh_is_found_from_below_and_not_from_beside() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("mesh/policies/deep")).unwrap();
        fs::create_dir_all(root.join("beside")).unwrap();
        fs::write(root.join("mesh/mesh.toml"), "").unwrap();
        let place = Place { dir: Some(root.join("mesh")), data_dir: root.join("mesh/.countersign"), dashboard: None };
        for from in ["mesh", "mesh/policies", "mesh/policies/deep"] {
            assert_eq!(find(Some(&root.join(from)), None).unwrap(), place, "{from}");
        }
        let error = text(find(Some(&root.join("beside")), None).unwrap_err());
        assert!(error.contains("found no mesh: neither"), "{error}");
        assert!(error.contains("help: "), "{error}");
        assert!(text(at(&root.join("beside"), None).unwrap_err()).contains("is not a mesh directory"));
        assert!(text(find(Some(&root.join("nowhere")), None).unwrap_err()).contains("could not open the directory"));
        assert!(text(find(Some(&root.join("mesh/mesh.toml")), None).unwrap_err()).contains("not a directory"));
    }

    #[test]
    fn a_given_data_directory_needs_no_mesh_directory() {
        let root = tempfile::tempdir().unwrap();
        let place = find(Some(root.path()), Some(Path::new("/var/lib/mesh"))).unwrap();
        assert_eq!(place, Place { dir: None, data_dir: "/var/lib/mesh".into(), dashboard: None });
        assert!(text(place.dir().unwrap_err()).contains("help: name it with `-C DIR`"));
    }

    #[test]
    fn a_file_in_place_of_the_data_directory_names_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        fs::write(root.join(MESH_FILE), "").unwrap();
        fs::write(root.join(DATA_DIR), "data-dir: /var/lib/mesh\n").unwrap();
        assert_eq!(find(Some(&root), None).unwrap().data_dir, Path::new("/var/lib/mesh"));
        fs::write(root.join(DATA_DIR), "nonsense").unwrap();
        assert!(text(find(Some(&root), None).unwrap_err()).contains("does not name a data directory"));
    }

    #[test]
    fn the_data_directory_is_for_its_owner_and_not_for_git() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let place = Place { dir: None, data_dir: root.path().join("a/b"), dashboard: None };
        place.create_data_dir().unwrap();
        fs::set_permissions(&place.data_dir, fs::Permissions::from_mode(0o755)).unwrap();
        place.create_data_dir().unwrap();
        assert_eq!(fs::metadata(&place.data_dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_to_string(place.data_dir.join(".gitignore")).unwrap(), "*\n");
    }
}
