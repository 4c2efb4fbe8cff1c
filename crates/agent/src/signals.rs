//! What control revoked: known to this process, to every proxy of this host, and to the next run of this agent, which may begin
//! while control is away.

use std::{
    io,
    path::{Path, PathBuf},
};

use countersign_api::{
    mesh,
    signals::{self, SignalsRefused},
};
use countersign_core::signal::Signals;
use prost::Message as _;
use tokio::sync::watch;

use crate::keep;

/// All signals that hold, and who wants to hear of them.
#[derive(Debug)]
pub(crate) struct Heard {
    held: watch::Sender<Signals>,
    file: PathBuf,
}

impl Heard {
    /// Takes up what an earlier run kept below `dir`. What cannot be read is said: control says all that hold again.
    pub(crate) fn load(dir: &Path) -> Self {
        let file = dir.join("signals");
        let mut held = Signals::default();
        let kept = keep::read(&file).map_err(|error| error.to_string()).and_then(|bytes| {
            let Some(bytes) = bytes else { return Ok(()) };
            let message = mesh::Signals::decode(&bytes[..]).map_err(|error| error.to_string())?;
            signals::take_in(&mut held, &message).map_err(|error| error.to_string())
        });
        if let Err(why) = kept {
            tracing::error!(file = %file.display(), why, "what was revoked before this start is not known until control says it");
        }
        Self { held: watch::Sender::new(held), file }
    }

    /// Takes in what control says.
    pub(crate) fn take_in(&self, message: &mesh::Signals, now_ms: u64) -> Result<Signals, SignalsRefused> {
        let mut next = self.now();
        next.forget_ended(now_ms);
        signals::take_in(&mut next, message)?;
        self.held.send_if_modified(|held| {
            let is_new = *held != next;
            held.clone_from(&next);
            is_new
        });
        Ok(next)
    }

    /// All that hold.
    pub(crate) fn now(&self) -> Signals {
        self.held.borrow().clone()
    }

    /// Hears of every change from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Signals> {
        self.held.subscribe()
    }

    /// Writes them down for the next run.
    pub(crate) fn write(&self) -> io::Result<()> {
        keep::write(&self.file, &signals::all(&self.now()).encode_to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoking(after: u64, sequence: u64, serial: u8) -> mesh::Signals {
        let revoked = vec![mesh::Revocation { serial: vec![serial; 16].into(), expires_at_ms: 100 }];
        mesh::Signals { after, sequence, revoked, ..mesh::Signals::default() }
    }

    #[test]
    fn what_was_revoked_outlives_the_agent_and_what_cannot_be_read_revokes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let heard = Heard::load(dir.path());
        let mut news = heard.subscribe();
        heard.take_in(&revoking(0, 1, 7), 0).unwrap();
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        heard.take_in(&revoking(0, 1, 7), 0).unwrap();
        assert!(!news.has_changed().unwrap(), "the same again is no news");
        assert!(heard.take_in(&revoking(5, 6, 8), 0).is_err());
        let short = mesh::Revocation { serial: vec![7; 3].into(), expires_at_ms: 100 };
        heard.take_in(&mesh::Signals { revoked: vec![short], ..revoking(1, 2, 0) }, 0).unwrap_err();
        let says = |kind: &str| {
            let json = format!(
                r#"{{"subject":"host:vm","kind":"{kind}","value":"80","source":"local","issued_at_ms":1,"expires_at_ms":100}}"#
            );
            mesh::Signals { stated: vec![mesh::Statement { json }], ..mesh::Signals::default() }
        };
        let unknown = heard.take_in(&mesh::Signals { after: 1, sequence: 2, ..says("mood") }, 0).unwrap_err();
        assert!(unknown.to_string().contains("`mood`"), "what is not understood is not passed over: {unknown}");
        heard.take_in(&mesh::Signals { after: 1, sequence: 2, ..says("risk") }, 0).unwrap();
        heard.write().unwrap();
        let again = Heard::load(dir.path()).now();
        assert_eq!((again.sequence().0, again.revoked().len()), (2, 1));
        assert_eq!(again.risk(&"host:vm".parse().unwrap(), 99), 80);
        std::fs::write(dir.path().join("signals"), b"\xff").unwrap();
        assert!(Heard::load(dir.path()).now().is_empty());
    }
}
