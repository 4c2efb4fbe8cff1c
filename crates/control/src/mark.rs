//! The high-water mark: how long this mesh's ledger was when it was last written, kept in a file beside the
//! key-encryption key and not in the store. A store that was restored from an older copy is whole and sealed, and is
//! still not what agents have seen: the mark notices it before they do.
//!
//! Catches a restored store. Does not catch a copy of everything, mark included; agents, who hold the longer ledger, do.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use countersign_core::{canonical::Digest, change::Revision};

use crate::ledger::Ledger;

/// The mark of the ledger whose store and key this control plane has.
pub struct HighWater {
    key_file: Mutex<PathBuf>,
    /// What is written already. Held while a newer one is written, so that a mark never goes back.
    written: Mutex<Option<Mark>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    size: u64,
    root: Digest,
}

/// The ledger is not the one that was last written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RolledBack {
    /// It is shorter.
    #[error("the ledger ends at revision {held}, and it was at {marked} before: the store is an older copy")]
    Shorter {
        /// What is there.
        held: u64,
        /// What was written.
        marked: u64,
    },
    /// It went on otherwise.
    #[error("the ledger holds another revision {marked} than the one that was written: the store is another copy")]
    OtherHistory {
        /// Where they differ.
        marked: u64,
    },
}

/// Why the mark cannot be had or kept.
#[derive(Debug, thiserror::Error)]
#[error("could not use the ledger's high-water mark `{path}`")]
pub struct MarkError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl HighWater {
    /// Beside `key_file`.
    pub fn beside(key_file: &Path) -> Self {
        Self { key_file: Mutex::new(key_file.to_owned()), written: Mutex::new(None) }
    }

    /// From now on beside `key_file`: another key is in force.
    pub fn move_beside(&self, key_file: &Path) {
        *self.key_file.lock() = key_file.to_owned();
        *self.written.lock() = None;
    }

    /// Compares `ledger` with what was written of it. A ledger without a mark is not compared.
    pub fn compare(&self, ledger: &Ledger) -> Result<Result<(), RolledBack>, MarkError> {
        let Some(path) = self.path(ledger) else { return Ok(Ok(())) };
        let failed = |source| MarkError { path: path.clone(), source };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Ok(())),
            Err(e) => return Err(failed(e)),
        };
        let mark: Mark = serde_json::from_slice(&text).map_err(|e| failed(io::Error::other(e)))?;
        let (held, marked) = (ledger.head().follower.revision().0, mark.size);
        if held < marked {
            return Ok(Err(RolledBack::Shorter { held, marked }));
        }
        if ledger.root_at(Revision(marked)) != Some(mark.root) {
            return Ok(Err(RolledBack::OtherHistory { marked }));
        }
        *self.written.lock() = Some(mark);
        Ok(Ok(()))
    }

    /// Writes down where `ledger` ends, whole or not at all. After the store and never before it: a crash between the two
    /// leaves a mark that is too low, which refuses nothing.
    pub fn rise(&self, ledger: &Ledger) -> Result<(), MarkError> {
        let Some(path) = self.path(ledger) else { return Ok(()) };
        let mut written = self.written.lock();
        let head = ledger.head();
        let mark = Mark { size: head.follower.revision().0, root: head.follower.root() };
        if *written == Some(mark) {
            return Ok(());
        }
        write(&path, &mark).map_err(|source| MarkError { path, source })?;
        *written = Some(mark);
        Ok(())
    }

    /// Named after the first revision, so that meshes with one key file do not meet. None while there is none.
    fn path(&self, ledger: &Ledger) -> Option<PathBuf> {
        if ledger.head().follower.revision() == Revision(0) {
            return None;
        }
        let origin = ledger.root_at(Revision(1))?;
        let key_file = self.key_file.lock();
        let mut name = key_file.file_name()?.to_owned();
        name.push(format!(".{}.mark", origin.short()));
        Some(key_file.with_file_name(name))
    }
}

fn write(path: &Path, mark: &Mark) -> io::Result<()> {
    // It is there where the key lies in it.
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // Replicas on one machine may have one key file.
    let new = path.with_extension(format!("new.{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(mark)?)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}
