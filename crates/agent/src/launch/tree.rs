//! Everything a workload started, wherever it hid: the launcher is the parent of its orphans, so it can find and end
//! them all.

use std::{
    fs, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{self, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

use super::order::Exit;

/// Longest time that what was killed may take to be gone before the next start. What is left then are processes that
/// have ended and that somebody outside did not wait for.
const CLEARED_WITHIN: Duration = Duration::from_secs(1);

/// Collects every child that has ended; the status of `workload` if it is among them.
pub(super) fn reap(workload: Option<Pid>) -> Option<Exit> {
    let mut exit = None;
    loop {
        let status = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return exit,
            Err(Errno::EINTR) => continue,
            Err(_) => return exit,
            Ok(status) => status,
        };
        match status {
            WaitStatus::Exited(pid, code) if Some(pid) == workload => exit = Some(Exit::Code(code)),
            WaitStatus::Signaled(pid, signal, _) if Some(pid) == workload => exit = Some(Exit::Signal(signal as i32)),
            _ => {}
        }
    }
}

/// Ends the workload at once; how it ended.
pub(super) fn kill(workload: Pid) -> Exit {
    let _ = signal::kill(workload, Signal::SIGKILL);
    loop {
        match waitpid(workload, None) {
            Ok(WaitStatus::Exited(_, code)) => return Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Exit::Signal(signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Exit::Signal(Signal::SIGKILL as i32),
        }
    }
}

/// INVARIANT (nothing-outlives): ends what a workload that ended has left, and waits until it is gone; the namespaces stay.
/// With a process namespace a child inside it does it: `kill(-1)` reaches every process there but itself and the first,
/// in one step that no fork slips through.
#[allow(unsafe_code, reason = "fork: the launcher has a single thread")]
pub(super) fn clear(has_process_namespace: bool) -> io::Result<()> {
    if !has_process_namespace {
        return kill_all(None);
    }
    // SAFETY: a process with one thread holds no lock that the child could find taken.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let deadline = Instant::now() + CLEARED_WITHIN;
            while signal::kill(Pid::from_raw(-1), Signal::SIGKILL) != Err(Errno::ESRCH) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            // SAFETY: ends the process without running the parent's exit routines.
            unsafe { nix::libc::_exit(0) }
        }
        ForkResult::Parent { child } => loop {
            match waitpid(None::<Pid>, None) {
                Ok(status) if status.pid() == Some(child) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        },
    }
}

/// INVARIANT (nothing-outlives): ends every descendant and waits until there is none. With a process namespace the kernel does it, when `init` ends.
/// Otherwise only direct children are signalled, whose numbers cannot be reused until they are waited for; their own
/// children then become ours.
pub(super) fn kill_all(init: Option<&OwnedFd>) -> io::Result<()> {
    if let Some(init) = init {
        let _ = rustix::process::pidfd_send_signal(init, rustix::process::Signal::KILL);
    }
    loop {
        if init.is_none() {
            for child in children()? {
                let _ = signal::kill(child, Signal::SIGKILL);
            }
        }
        match waitpid(None::<Pid>, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The children of this process, from the parents' column of `/proc/<pid>/stat`.
fn children() -> io::Result<Vec<Pid>> {
    let own = Pid::this();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The name in parentheses may itself hold spaces and parentheses.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
        if parent == Some(own.as_raw()) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}
