//! The process at the other end of a unix socket, held by its pidfd: a number that is used again names another process, a pidfd never
//! does.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::net::UnixStream;

use crate::workload_api::attest::Observed;

/// Ancestors that are looked at: a process is not nested deeper than this without a purpose.
const ANCESTORS_MAX: usize = 256;

/// One process.
#[derive(Debug)]
pub(crate) struct Peer {
    pid: u32,
    pidfd: OwnedFd,
    /// The user that it was when it connected.
    uid: u32,
    /// What it is, where somebody looked: once, when it connected.
    pub(crate) observed: OnceLock<Observed>,
}

impl Peer {
    /// Who opened the connection: by SO_PEERPIDFD where the kernel has it (Linux 6.5), before that by a pidfd of the number that the
    /// process had when it connected, opened at once: only a number that is used again within that moment deceives it.
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
        let pid = pid.ok_or_else(|| io::Error::other("it is not of this process namespace"))?;
        let pidfd = match getsockopt(&stream.as_fd(), sockopt::PeerPidfd) {
            Ok(pidfd) => pidfd,
            Err(Errno::ENOPROTOOPT) => pidfd_of(pid)?,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { pid, pidfd, uid: credentials.uid(), observed: OnceLock::new() })
    }

    /// The process that has this number now.
    pub(crate) fn of_pid(pid: u32) -> io::Result<Self> {
        let uid = fs::metadata(format!("/proc/{pid}"))?.uid();
        Ok(Self { pid, pidfd: pidfd_of(pid)?, uid, observed: OnceLock::new() })
    }

    /// Its number, which is its own as long as it is alive.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The user that it was when it connected.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether what was just read of `/proc/<pid>` was read of this process: it is still there.
    pub(crate) fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec::default();
        matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(0))
    }

    /// Whether it is process `ancestor`, or descends from it.
    pub(crate) fn descends_from(&self, ancestor: u32) -> bool {
        self.has_ancestor(|pid| pid == ancestor)
    }

    /// Whether it is, or descends from, one that is meant.
    pub(crate) fn has_ancestor(&self, is_meant: impl Fn(u32) -> bool) -> bool {
        let mut pid = self.pid;
        for _ in 0..ANCESTORS_MAX {
            if is_meant(pid) {
                return self.is_alive();
            }
            match parent(pid) {
                Some(next) if next > 0 => pid = next,
                _ => return false,
            }
        }
        false
    }

    /// Whether it lives in this mount namespace, as [`mounts_of`] numbers them.
    pub(crate) fn lives_in_mounts(&self, mounts: u64) -> bool {
        mounts_of(&self.pid.to_string()).is_ok_and(|own| own == mounts) && self.is_alive()
    }
}

/// The number of the mount namespace of a process, `self` or a number; no other has it as long as somebody lives there.
pub(crate) fn mounts_of(process: &str) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{process}/ns/mnt"))?.ino())
}

fn pidfd_of(pid: u32) -> io::Result<OwnedFd> {
    let process = Pid::from_raw(pid.cast_signed()).ok_or(rustix::io::Errno::SRCH)?;
    Ok(pidfd_open(process, PidfdFlags::empty())?)
}

fn parent(pid: u32) -> Option<u32> {
    field_of_stat(pid, 4)?.parse().ok()
}

/// proc(5): a field of `/proc/<pid>/stat`, the third or a later one. The name before it, in parentheses, may hold spaces and parentheses.
pub(crate) fn field_of_stat(pid: u32, field: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(field.checked_sub(3)?).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_peer_is_the_process_that_connected_and_no_other_once_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.recv(1)\n";
        let mut child = Command::new("python3").arg("-c").arg(script).arg(&path).spawn().unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let peer = Peer::of(&stream).unwrap();
        assert_eq!(peer.pid, child.id());
        assert!(peer.is_alive() && peer.descends_from(std::process::id()) && peer.descends_from(child.id()));
        assert!(!peer.descends_from(std::process::id() + 1_000_000));
        let here = mounts_of("self").unwrap();
        assert!(peer.lives_in_mounts(here) && !peer.lives_in_mounts(here + 1));
        drop(stream);
        child.wait().unwrap();
        assert!(!peer.is_alive() && !peer.descends_from(std::process::id()));
        assert!(!peer.lives_in_mounts(here));
    }
}
