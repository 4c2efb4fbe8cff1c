//! `run.json`: where everything of a running mesh listens. Written when the mesh is ready, removed when it ends.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

use countersign_core::identity::ServiceName;

/// The name of the file below the data directory.
pub const RUN_FILE: &str = "run.json";
/// The name of the control plane's local socket below the data directory (mode 0600).
pub const CONTROL_SOCKET: &str = "control.sock";
/// The name of the agent's local socket below the data directory (mode 0600).
pub const AGENT_SOCKET: &str = "agent.sock";

/// A member is absent until the part it names exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct RunFile {
    /// The process that runs the mesh.
    pub pid: u32,
    /// The version of its binary.
    pub version: String,
    /// The control plane's local API: `unix:///…/control.sock`.
    pub api: Option<String>,
    /// The control plane's address for agents: `https://ip:port`.
    pub control: Option<String>,
    /// The control plane's metrics: a URL.
    pub metrics: Option<String>,
    /// The dashboard: a URL.
    pub dashboard: Option<String>,
    /// Where pipelines propose: a URL.
    pub pipelines: Option<String>,
    /// The token service: the URL that it issues as.
    pub token: Option<String>,
    /// The origin of the ledger: the first line of its checkpoints and the name of the key that signs them.
    pub ledger_origin: Option<String>,
    /// Where processes that no agent started ask for SPIFFE identities: `unix:///…/workload.sock`.
    pub workload_api: Option<String>,
    /// Where Envoys that no agent started ask for their secrets: the same socket.
    pub sds: Option<String>,
    /// Every service of the mesh directory that runs on this machine.
    pub services: BTreeMap<ServiceName, RunService>,
}

/// Where one service listens; with several instances, the first one's addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunService {
    /// Its proxy's mutual TLS listener.
    pub inbound: SocketAddr,
    /// Its proxy's forward proxy for the workload (`HTTP_PROXY`); inside the workload's namespace when isolated.
    pub outbound_http: SocketAddr,
    /// Its proxy's admin pages.
    pub admin: String,
    /// The loopback listener of each upstream; inside the workload's namespace when isolated.
    pub upstreams: BTreeMap<ServiceName, SocketAddr>,
    /// Whether the workload has a network namespace of its own, so that the addresses above are reachable from there only.
    pub isolated: bool,
    /// The process id of each instance's launcher.
    pub pids: Vec<u32>,
}
