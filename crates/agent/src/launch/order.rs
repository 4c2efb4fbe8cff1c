//! What an agent and a launcher say to each other: the order on the launcher's standard input, then one message per
//! packet on an inherited pair. Secrets of a workload's environment stay out of every argument list this way.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use countersign_core::canonical::Digest;
use serde::{Deserialize, Serialize};

/// The file descriptor on which a launcher finds its agent. When it closes, the agent is gone and so is the workload.
pub(crate) const AGENT_FD: i32 = 3;

/// What to start when the agent says so, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LaunchOrder {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Its working directory.
    pub dir: PathBuf,
    /// Variables on top of the agent's own.
    pub env: BTreeMap<String, String>,
    /// Give it namespaces of its own; [`crate::launch`] then serves the broker on descriptor 4.
    pub isolate: bool,
    /// What it must not see.
    pub data_dir: PathBuf,
}

/// Agent to launcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AgentMessage {
    /// Run the workload: its sidecar is there. Said again when it ended and is to run again, in the same namespaces.
    Start {
        /// What it must be; anything, when nothing was measured.
        artifact: Option<Digest>,
    },
    /// End it.
    Stop(Stop),
}

/// How a workload is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    /// SIGTERM to the workload's process group.
    Term,
    /// SIGKILL to everything that was started.
    Kill,
}

/// Launcher to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LauncherMessage {
    /// Its namespaces are there, the broker answers, and nothing runs in them. Beside this packet is a socket that listens in its mount
    /// namespace for those who ask for identities, where there could be one.
    Prepared {
        /// What could not be had, in words.
        note: Option<String>,
        /// The number of its mount namespace, where it has one of its own.
        mounts: Option<u64>,
    },
    /// The workload runs; its pidfd is beside this packet.
    Started {
        /// The workload, as this host numbers it.
        pid: u32,
        /// The process whose namespaces `exec` enters.
        namespace_pid: Option<u32>,
    },
    /// The namespaces could not be made, or the workload was not started.
    Failed(String),
    /// The workload was not started, or killed as soon as it ran: it is not what was measured.
    Other,
    /// The workload ended, and with it everything it had started.
    Exited(Exit),
}

/// How a workload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It returned this.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// Its launcher ended without a word; the kernel ended the workload with it.
    Lost,
}

impl Exit {
    /// Whether it ended by itself and says all is well.
    pub fn is_success(self) -> bool {
        self == Self::Code(0)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with {code}"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "ended by {signal}"),
                Err(_) => write!(f, "ended by signal {number}"),
            },
            Self::Lost => f.write_str("its launcher was killed"),
        }
    }
}
