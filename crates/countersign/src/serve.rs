//! What the serving commands share: one of a kind for each data directory, where it listens, and how it is told to stop.

use std::{
    fs,
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use countersign_agent::harden;
use countersign_api::run_file::{RUN_FILE, RunFile};
use countersign_core::identity::ServiceName;

use crate::{error::Failure, mesh_finder::Place, render};

/// What only one process at a time may be for a data directory. The kernel gives it up when the process ends, however it ends.
pub struct Held {
    _lock: File,
}

/// A process that will hold keys: no debugger, no core dump, no other process of this user may read them, and where the kernel
/// lets it nothing of it is swapped out.
pub fn shut_to_debuggers() -> Result<(), Failure> {
    harden::non_dumpable().map_err(|e| Failure::new("could not shut this process to debuggers").because(&e))?;
    harden::no_core_dumps().map_err(|e| Failure::new("could not forbid core dumps of this process").because(&e))?;
    match harden::lock_memory() {
        Ok(true) => {}
        Ok(false) => tracing::info!("memory is not locked: keys could reach the swap; LimitMEMLOCK=infinity locks it"),
        Err(error) => tracing::warn!(%error, "memory is not locked: keys could reach the swap"),
    }
    Ok(())
}

/// Becomes the one process that runs the mesh at `place`.
pub fn hold(place: &Place) -> Result<Held, Failure> {
    shut_to_debuggers()?;
    let path = place.data_dir.join("run.lock");
    let could_not = |e: &io::Error| {
        Failure::new(format!("could not lock `{}`", path.display()))
            .because(e)
            .help("the data directory must be yours and writable")
    };
    // Not truncated: until the lock is held, what stands in it is the other one's.
    let opened = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    let mut lock = opened.map_err(|e| could_not(&e))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            let pid = pid.trim();
            return Err(Failure::new(format!(
                "this mesh runs already: process {pid}, with the data directory `{}`",
                place.data_dir.display()
            ))
            .help(format!(
                "look at it with `countersign status`; stop it with Ctrl-C where it runs, or `kill {pid}`"
            )));
        }
        Err(e) => return Err(could_not(&e.into())),
    }
    // What a mesh that was killed has left says nothing any more.
    let _ = fs::remove_file(place.data_dir.join(RUN_FILE));
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(|e| could_not(&e))?;
    Ok(Held { _lock: lock })
}

/// `run.json` while it is there: whoever drops this takes it away.
pub struct Running {
    path: PathBuf,
}

/// Tells tools where everything listens. They see all of it or nothing.
pub fn tell(place: &Place, run: &RunFile) -> Result<Running, Failure> {
    let running = Running { path: place.data_dir.join(RUN_FILE) };
    running.tell(run)?;
    Ok(running)
}

impl Running {
    /// Tells it anew.
    pub fn tell(&self, run: &RunFile) -> Result<(), Failure> {
        let content = serde_json::to_vec_pretty(run).expect("every run file is JSON with string keys");
        write_whole(&self.path, &content).map_err(|e| {
            Failure::new(format!("could not write `{}`", self.path.display()))
                .because(&e)
                .help("the data directory needs room and must be writable")
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    let mut file = File::create(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// A token that is cancelled by the first Ctrl-C (or `kill`); the second ends the process at once. Whatever it started
/// dies with it: the kernel tells each launcher.
pub fn until_told() -> Result<CancellationToken, Failure> {
    let could_not = |e: io::Error| Failure::new("could not listen for signals").because(&e);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(could_not)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(could_not)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(could_not)?;
    let token = CancellationToken::new();
    let told = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if told.is_cancelled() {
                std::process::exit(130);
            }
            render::print_error("\nstopping; Ctrl-C again stops at once\n");
            told.cancel();
        }
    });
    Ok(token)
}

/// The name of this host, as one DNS label.
pub fn host_name() -> ServiceName {
    let about = rustix::system::uname();
    let name: String = about
        .nodename()
        .to_string_lossy()
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    ServiceName::parse(name.trim_matches('-'))
        .unwrap_or_else(|_| ServiceName::parse("host").expect("`host` is a DNS label"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_says_which_process_is_the_first() {
        let root = tempfile::tempdir().unwrap();
        let place = Place { dir: None, data_dir: root.path().into(), dashboard: None };
        let first = hold(&place).unwrap();
        let second = hold(&place).err().unwrap();
        assert!(second.to_string().contains(&format!("process {},", std::process::id())), "{second}");
        drop(first);
        hold(&place).unwrap();
    }

    #[test]
    fn the_run_file_is_gone_with_the_mesh() {
        let root = tempfile::tempdir().unwrap();
        let place = Place { dir: None, data_dir: root.path().into(), dashboard: None };
        let running = tell(&place, &RunFile { pid: 7, ..RunFile::default() }).unwrap();
        assert_eq!(place.run_file().unwrap().pid, 7);
        drop(running);
        assert_eq!(place.run_file(), None);
    }
}
