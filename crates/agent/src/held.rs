//! The history this host holds: verified entry by entry, folded, and kept on disk so that a restarted agent can serve
//! its proxies while control is away. Only what follows from what is held is taken up; anything else leaves it as it
//! was, and the next look finds the last good state.
//!
//! Beside the state lies the keyring of the operators. The entries that protected and sealed the mesh are pinned, by the join token
//! or when they are first seen: from then on no other history is followed, and of a sealed mesh nothing is taken that too few
//! operators signed. A history that does not reach as far as what is pinned says nothing about the mesh, and is not used.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use countersign_api::mesh;
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Revision},
    identity::TrustDomain,
    keyring::{Keyring, KeyringError, Pins, Remembered},
    ledger::{Batch, Follower, LedgerError, Snapshot},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::watch;

use crate::keep;

/// The file below the agent's directory that holds the last verified snapshot.
const FILE: &str = "mesh.snapshot";
/// The file below the agent's directory that holds what is pinned.
const PINS_FILE: &str = "anchor.json";

/// The last verified state, in memory and on disk.
pub(crate) struct Held {
    trust_domain: TrustDomain,
    known: Mutex<Known>,
    /// A history that has not reached what is pinned yet; of the stream that is open, and used by nobody.
    ahead: Mutex<Option<Known>>,
    pins: Mutex<Pins>,
    revision: watch::Sender<Revision>,
    dir: PathBuf,
}

/// A ledger followed up to a revision, and the operators' keys at it.
#[derive(Debug, Clone, Default)]
struct Known {
    follower: Follower,
    keyring: Keyring,
}

/// Why what control sent is not taken up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// The entries do not follow.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The operators do not stand behind them.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// A state without the entries that lead to it, of a mesh whose operators are known by their entries.
    #[error("control sent a state without its entries; a protected mesh is followed from its first entry")]
    Unfounded,
    /// The history ends before what is pinned.
    #[error(
        "control's ledger of {0} entries ends before the entry that protected or sealed the mesh: it was cut, or is another"
    )]
    Unpinned(u64),
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
            known: Mutex::default(),
            ahead: Mutex::default(),
            pins: Mutex::default(),
            revision: watch::Sender::new(Revision(0)),
            dir: dir.to_owned(),
        }
    }

    /// Pins what a join token named, in place of whatever an earlier life of this host saw.
    pub(crate) fn pin(&self, pins: Pins) -> std::io::Result<()> {
        *self.pins.lock() = pins;
        *self.known.lock() = Known { follower: Follower::default(), keyring: Keyring::pinned(pins) };
        self.write_pins(pins)
    }

    fn write_pins(&self, pins: Pins) -> std::io::Result<()> {
        keep::write(&self.dir.join(PINS_FILE), &serde_json::to_vec(&pins)?)
    }

    /// Takes up what an earlier run pinned below `dir`.
    pub(crate) fn load_pins(&self) -> Result<(), KeptError> {
        let file = self.dir.join(PINS_FILE);
        let Some(bytes) = keep::read(&file).map_err(|e| KeptError::Io(file.clone(), e))? else { return Ok(()) };
        let pins: Pins = serde_json::from_slice(&bytes).map_err(|e| KeptError::Damaged(file, e.to_string()))?;
        *self.pins.lock() = pins;
        self.known.lock().keyring = Keyring::pinned(pins);
        Ok(())
    }

    /// Takes up the snapshot an earlier run kept below `dir`; verified again, because a disk can lie too.
    pub(crate) fn load(&self) -> Result<(), KeptError> {
        let file = self.dir.join(FILE);
        let damaged = |why: &dyn std::error::Error| KeptError::Damaged(file.clone(), crate::link::chain(why));
        let Some(bytes) = keep::read(&file).map_err(|e| KeptError::Io(file.clone(), e))? else {
            return Ok(());
        };
        let message = mesh::Snapshot::decode(Bytes::from(bytes)).map_err(|e| damaged(&e))?;
        let follower = Follower::from_snapshot(&snapshot(&message)).map_err(|e| damaged(&e))?;
        let remembered: Remembered = match &message.keyring_json[..] {
            [] => Remembered::default(),
            json => serde_json::from_slice(json).map_err(|e| damaged(&e))?,
        };
        let pins = *self.pins.lock();
        let Some(keyring) = Keyring::resume(remembered, pins, &follower) else {
            let what = "it does not say who protected the mesh, or not what this host pinned";
            return Err(KeptError::Damaged(file.clone(), what.into()));
        };
        self.put(Known { follower, keyring }).map_err(|e| damaged(&e))
    }

    /// Writes the snapshot for the next run. Whole or not at all.
    pub(crate) fn write(&self) -> std::io::Result<()> {
        let known = self.known.lock().clone();
        let Some(snapshot) = known.follower.snapshot() else { return Ok(()) };
        let keyring_json = serde_json::to_vec(&known.keyring.remember())?.into();
        let message = mesh::Snapshot { keyring_json, ..to_message(snapshot) };
        keep::write(&self.dir.join(FILE), &message.encode_to_vec())
    }

    /// The revision that is held, and every later one.
    pub(crate) fn revisions(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// The size and root that are held.
    pub(crate) fn head(&self) -> (u64, Digest) {
        let known = self.known.lock();
        (known.follower.revision().0, known.follower.root())
    }

    /// Looks at the last good state.
    pub(crate) fn look<R>(&self, at: impl FnOnce(&Follower) -> R) -> R {
        at(&self.known.lock().follower)
    }

    /// A stream begins. A snapshot is for a cold agent of an unprotected mesh only: one that holds a history goes on from there or
    /// not at all, and one that pinned something follows the entries that lead there.
    ///
    /// INVARIANT (pinned-history): what a host uses is the fold of a ledger with the entries that it pinned.
    pub(crate) fn welcome(&self, welcome: &mesh::Welcome) -> Result<(), Refused> {
        self.ahead.lock().take();
        let held = self.head().0;
        if let (0, Some(message)) = (held, &welcome.snapshot) {
            let follower = Follower::from_snapshot(&snapshot(message))?;
            let keyring = Keyring::resume(Remembered::default(), *self.pins.lock(), &follower);
            let mut known = Known { keyring: keyring.ok_or(Refused::Unfounded)?, follower };
            if let Some(entries) = &welcome.entries {
                known.extend(entries)?;
            }
            return self.put(known);
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
        let ahead = self.ahead.lock().take();
        let mut known = ahead.unwrap_or_else(|| self.known.lock().clone());
        known.extend(entries)?;
        self.put(known)
    }

    /// Whether control holds exactly what is held here.
    pub(crate) fn compare(&self, size: u64, root: &[u8]) -> Result<(), Refused> {
        if self.ahead.lock().is_some() {
            return Err(Refused::Unpinned(size));
        }
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

    fn put(&self, known: Known) -> Result<(), Refused> {
        let state = known.follower.state();
        if let Some(other) = state.trust_domain.as_ref().filter(|other| **other != self.trust_domain) {
            return Err(Refused::OtherMesh(other.clone(), self.trust_domain.clone()));
        }
        if !known.keyring.meets_pins() {
            *self.ahead.lock() = (known.follower.revision().0 > 0).then_some(known);
            return Ok(());
        }
        self.pin_seen(known.keyring.pins());
        let revision = known.follower.revision();
        *self.known.lock() = known;
        self.revision.send_replace(revision);
        Ok(())
    }

    /// What is seen for the first time is pinned from now on.
    fn pin_seen(&self, seen: Pins) {
        let mut pins = self.pins.lock();
        let new = Pins { anchor: pins.anchor.or(seen.anchor), seal: pins.seal.or(seen.seal), recovery: pins.recovery };
        if new == *pins {
            return;
        }
        for (what, before, now) in [("protected", pins.anchor, new.anchor), ("sealed", pins.seal, new.seal)] {
            if let (None, Some(digest)) = (before, now) {
                tracing::warn!(target: crate::TOLD, entry = %digest, "the mesh is {what}; this host pinned the entry that did it, and follows no other history from now on");
            }
        }
        *pins = new;
        if let Err(error) = self.write_pins(new) {
            tracing::error!(%error, dir = %self.dir.display(), "what was pinned could not be kept for the next start");
        }
    }
}

impl Known {
    /// Takes up entries that follow, and that the operators stand behind where they must; all of them or none.
    fn extend(&mut self, entries: &mesh::Entries) -> Result<(), Refused> {
        let held = self.follower.revision().0;
        let batch = Batch {
            first_index: entries.first_index,
            entries: &entries.entries,
            change_sets: &entries.change_sets,
            bodies: &bodies(&entries.bodies),
            size: entries.size,
            root: parse_root(&entries.root)?,
        };
        let mut next = self.clone();
        let new = next.follower.extend(&batch)?;
        let known = held.saturating_sub(entries.first_index) as usize;
        for (bytes, change_set) in entries.entries.iter().zip(&entries.change_sets).skip(known).take(new.len()) {
            next.keyring.take(bytes, change_set)?;
        }
        *self = next;
        Ok(())
    }
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
        keyring_json: Bytes::new(),
    }
}
