//! The process of a sidecar: what it gives up before it holds a key, where its log goes, and how it ends. What it then
//! does is in [`link`](crate::link).

use std::{
    io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    panic,
    process::ExitCode,
    time::Duration,
};

use countersign_api::{sidecar::AGENT_FD, svid};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use rustix::net::sockopt;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use crate::link::{self, Ended, LinkError};

/// The variable that says what is logged, as of `tracing`'s filters: `info` unless given.
const FILTER: &str = "COUNTERSIGN_LOG";
/// Longest time that work in the background has to finish when the process ends.
const SHUTDOWN_WITHIN: Duration = Duration::from_millis(500);

/// Why there is no sidecar.
#[derive(Debug, thiserror::Error)]
enum SidecarError {
    #[error("could not shut the process to debuggers and core dumps")]
    Harden(#[source] io::Error),
    #[error("file descriptor {AGENT_FD} is no socket: only an agent starts a sidecar")]
    NoAgent(#[source] io::Error),
    #[error("could not start the runtime")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// `countersign sidecar`, as an agent starts it: its agent is on file descriptor 3. Returns when it has drained, or when
/// the agent is gone: an agent supervises its sidecars, and one without an agent would enforce an ageing view unseen.
pub fn sidecar_main() -> ExitCode {
    log();
    match run() {
        Ok(ended) => {
            info!(?ended, "sidecar ended");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(error = chain(&error), "sidecar failed");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Ended, SidecarError> {
    harden().map_err(SidecarError::Harden)?;
    // Whoever was first has installed the same provider: there is only one in this program.
    let _ = svid::provider().as_ref().clone().install_default();
    let agent = inherited_agent().map_err(SidecarError::NoAgent)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SidecarError::Runtime)?;
    let ended = runtime.block_on(link::run(agent));
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    Ok(ended?)
}

/// Other processes of the same user cannot read the keys this one will hold, and no core dump contains them; it may open as many
/// descriptors as its user is allowed.
fn harden() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Every exchange holds two connections: the soft limit of a login shell would be the first thing to run out.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}

#[allow(unsafe_code, reason = "an inherited descriptor is only a number until somebody owns it")]
fn inherited_agent() -> io::Result<UnixStream> {
    // SAFETY: the agent passes its end of the pair at this number and nothing in this process has opened or taken it:
    // this is called once, before the first file, thread or socket.
    let fd = unsafe { OwnedFd::from_raw_fd(AGENT_FD) };
    match sockopt::socket_type(&fd) {
        Ok(_) => {
            rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
            Ok(UnixStream::from(fd))
        }
        Err(error) => {
            std::mem::forget(fd); // not ours to close
            Err(error.into())
        }
    }
}

/// JSON lines on standard error, panics included.
fn log() {
    let filter = EnvFilter::try_from_env(FILTER).unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber =
        tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(filter).with_writer(io::stderr);
    let _ = subscriber.try_init(); // a second sidecar in one process (tests) logs where the first does
    panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        error!(thread, location, panic = panic.payload_as_str().unwrap_or_default(), "panicked: a bug of Countersign");
    }));
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
