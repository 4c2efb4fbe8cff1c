//! Sees a saved file of the mesh directory. Looks at the directory and the folders that hold its files, never into the
//! data directory, which changes all the time.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use crate::{error::Failure, mesh_directory::FOLDERS};

/// An editor writes, renames and sets modes: what happens within this span is one save.
const SETTLE: Duration = Duration::from_millis(120);

/// Watches one mesh directory.
pub struct Watch {
    dir: PathBuf,
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
    saved: mpsc::Receiver<()>,
}

impl Watch {
    /// Begins to watch `dir`.
    pub fn begin(dir: &Path) -> Result<Self, Failure> {
        let could_not = |e: &notify::Error| {
            Failure::new(format!("could not watch `{}` for saved files", dir.display()))
                .because(e)
                .help("raise `fs.inotify.max_user_watches` and `max_user_instances`, or start with `--no-watch` and use `countersign apply`")
        };
        // One place is enough: it says only that something was saved.
        let (said, saved) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                let _ = said.try_send(());
            }
        });
        let mut watch =
            Self { dir: dir.into(), watcher: watcher.map_err(|e| could_not(&e))?, watched: BTreeSet::new(), saved };
        watch.watcher.watch(dir, RecursiveMode::NonRecursive).map_err(|e| could_not(&e))?;
        watch.watch_folders();
        Ok(watch)
    }

    /// Returns after something was saved and the dust has settled.
    pub async fn saved(&mut self) {
        if self.saved.recv().await.is_none() {
            return std::future::pending().await;
        }
        while tokio::time::timeout(SETTLE, self.saved.recv()).await.is_ok_and(|more| more.is_some()) {}
        self.watch_folders();
    }

    /// A folder may come later than the mesh, or come again.
    fn watch_folders(&mut self) {
        for folder in FOLDERS {
            let path = self.dir.join(folder);
            match path.is_dir() {
                true if !self.watched.contains(&path) => {
                    if self.watcher.watch(&path, RecursiveMode::NonRecursive).is_ok() {
                        self.watched.insert(path);
                    }
                }
                true => {}
                false => {
                    self.watched.remove(&path);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_save_is_seen_once_and_also_in_a_folder_that_came_later() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(".countersign")).unwrap();
        let mut watch = Watch::begin(root.path()).unwrap();
        let soon = Duration::from_secs(5);
        fs::write(root.path().join("mesh.toml"), "a").unwrap();
        fs::write(root.path().join("mesh.toml"), "b").unwrap();
        tokio::time::timeout(soon, watch.saved()).await.expect("the save is seen");
        assert!(tokio::time::timeout(2 * SETTLE, watch.saved()).await.is_err(), "two writes are one save");
        fs::write(root.path().join(".countersign/run.json"), "{}").unwrap();
        assert!(
            tokio::time::timeout(2 * SETTLE, watch.saved()).await.is_err(),
            "the data directory is not looked into"
        );
        fs::create_dir(root.path().join("policies")).unwrap();
        tokio::time::timeout(soon, watch.saved()).await.expect("the new folder is seen");
        fs::write(root.path().join("policies/a.cedar"), "x").unwrap();
        tokio::time::timeout(soon, watch.saved()).await.expect("the save in the new folder is seen");
    }
}
