//! The history this host holds: verified entry by entry, folded, and kept on disk so that a restarted agent can serve
//! its proxies while control is away. Only what follows from what is held is taken up; anything else leaves it as it
//! was, and the next look finds the last good state.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use countersign_api::mesh;
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Revision},
    identity::TrustDomain,
    ledger::{Batch, Follower, LedgerError, Snapshot},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use crate::keep;

/// The file below the agent's directory that holds the last verified snapshot.
const FILE: &str = "mesh.snapshot";

/// The last verified state, in memory and on disk.
pub(crate) struct Held {
    trust_domain: TrustDomain,
    follower: Mutex<Follower>,
    revision: watch::Sender<Revision>,
    file: PathBuf,
}

/// Why what control sent is not taken up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// The entries do not follow.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Control has forgotten what it once sent.
    #[error("control holds {offered} entries, this host has verified {held}: the ledger was cut")]
    Cut { held: u64, offered: u64 },
    /// Control says that entries are missing here, though the stream is in order.
    #[error("control holds {offered} entries and sent {held}")]
    Behind { held: u64, offered: u64 },
    /// A root of the right size with other content.
    #[error("the ledger of {size} entries has root {held} here and {offered} at control: there are two histories")]
    OtherRoot { size: u64, held: Digest, offered: Digest },
    /// A root that is none.
    #[error("control sent a root of {0} bytes")]
    Root(usize),
    /// The ledger of another mesh.
    #[error("the ledger is that of `{0}`, this host belongs to `{1}`")]
    OtherMesh(TrustDomain, TrustDomain),
}

impl Refused {
    /// Whether asking again cannot heal it: an operator has to look.
    pub(crate) fn is_for_the_operator(&self) -> bool {
        !matches!(self, Self::Behind { .. } | Self::Ledger(LedgerError::Incomplete(_)))
    }
}

/// Why a kept snapshot is not used. The agent then begins cold.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error("could not read `{0}`")]
    Io(PathBuf, #[source] std::io::Error),
    #[error("`{0}` is damaged: {1}")]
    Damaged(PathBuf, String),
}

impl Held {
    /// Nothing but the name of the mesh.
    pub(crate) fn cold(dir: &Path, trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            follower: Mutex::new(Follower::default()),
            revision: watch::Sender::new(Revision(0)),
            file: dir.join(FILE),
        }
    }

    /// Takes up the snapshot an earlier run kept below `dir`; verified again, because a disk can lie too.
    pub(crate) fn load(&self) -> Result<(), KeptError> {
        let damaged = |why: &dyn std::error::Error| KeptError::Damaged(self.file.clone(), crate::link::chain(why));
        let Some(bytes) = keep::read(&self.file).map_err(|e| KeptError::Io(self.file.clone(), e))? else {
            return Ok(());
        };
        let message = mesh::Snapshot::decode(Bytes::from(bytes)).map_err(|e| damaged(&e))?;
        let follower = Follower::from_snapshot(&snapshot(&message)).map_err(|e| damaged(&e))?;
        self.put(follower).map_err(|e| damaged(&e))
    }

    /// Writes the snapshot for the next run. Whole or not at all.
    pub(crate) fn write(&self) -> std::io::Result<()> {
        let Some(snapshot) = self.follower.lock().snapshot() else { return Ok(()) };
        keep::write(&self.file, &to_message(snapshot).encode_to_vec())
    }

    /// The revision that is held, and every later one.
    pub(crate) fn revisions(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// The size and root that are held.
    pub(crate) fn head(&self) -> (u64, Digest) {
        let follower = self.follower.lock();
        (follower.revision().0, follower.root())
    }

    /// Looks at the last good state.
    pub(crate) fn look<R>(&self, at: impl FnOnce(&Follower) -> R) -> R {
        at(&self.follower.lock())
    }

    /// A stream begins. A snapshot is for a cold agent only: one that holds a history goes on from there or not at all.
    pub(crate) fn welcome(&self, welcome: &mesh::Welcome) -> Result<(), Refused> {
        let held = self.head().0;
        if let (0, Some(message)) = (held, &welcome.snapshot) {
            let mut follower = Follower::from_snapshot(&snapshot(message))?;
            if let Some(entries) = &welcome.entries {
                extend(&mut follower, entries)?;
            }
            return self.put(follower);
        }
        match &welcome.entries {
            Some(entries) if entries.size < held => Err(Refused::Cut { held, offered: entries.size }),
            Some(entries) => self.entries(entries),
            None if held == 0 => Ok(()),
            None => Err(Refused::Cut { held, offered: 0 }),
        }
    }

    /// Entries that follow what is held.
    pub(crate) fn entries(&self, entries: &mesh::Entries) -> Result<(), Refused> {
        let mut follower = self.follower.lock().clone();
        extend(&mut follower, entries)?;
        self.put(follower)
    }

    /// Whether control holds exactly what is held here.
    pub(crate) fn compare(&self, size: u64, root: &[u8]) -> Result<(), Refused> {
        let (held, held_root) = self.head();
        match size.cmp(&held) {
            std::cmp::Ordering::Less => Err(Refused::Cut { held, offered: size }),
            std::cmp::Ordering::Greater => Err(Refused::Behind { held, offered: size }),
            std::cmp::Ordering::Equal => match parse_root(root)? {
                offered if offered == held_root => Ok(()),
                offered => Err(Refused::OtherRoot { size, held: held_root, offered }),
            },
        }
    }

    fn put(&self, follower: Follower) -> Result<(), Refused> {
        if let Some(other) = follower.state().trust_domain.as_ref().filter(|other| **other != self.trust_domain) {
            return Err(Refused::OtherMesh(other.clone(), self.trust_domain.clone()));
        }
        let revision = follower.revision();
        *self.follower.lock() = follower;
        self.revision.send_replace(revision);
        Ok(())
    }
}

fn extend(follower: &mut Follower, entries: &mesh::Entries) -> Result<(), Refused> {
    let batch = Batch {
        first_index: entries.first_index,
        entries: &entries.entries,
        change_sets: &entries.change_sets,
        bodies: &bodies(&entries.bodies),
        size: entries.size,
        root: parse_root(&entries.root)?,
    };
    follower.extend(&batch)?;
    Ok(())
}

fn parse_root(root: &[u8]) -> Result<Digest, Refused> {
    root.try_into().map(Digest).map_err(|_| Refused::Root(root.len()))
}

fn bodies(texts: &[String]) -> Bodies {
    let mut bodies = Bodies::default();
    for text in texts {
        bodies.insert(text.as_str());
    }
    bodies
}

fn snapshot(message: &mesh::Snapshot) -> Snapshot {
    Snapshot {
        revision: Revision(message.revision),
        state: message.state_json.to_vec(),
        frontier: message.frontier.iter().map(|root| root.to_vec()).collect(),
        last_entry: message.last_entry.to_vec(),
        bodies: bodies(&message.bodies),
    }
}

fn to_message(snapshot: Snapshot) -> mesh::Snapshot {
    mesh::Snapshot {
        revision: snapshot.revision.0,
        state_json: snapshot.state.into(),
        bodies: snapshot.bodies.iter().map(|(_, text)| text.to_string()).collect(),
        frontier: snapshot.frontier.into_iter().map(Bytes::from).collect(),
        last_entry: snapshot.last_entry.into(),
    }
}
