//! On each host: joins the mesh, follows its ledger and verifies every entry, keeps identities fresh, and runs the
//! workloads and their sidecars.
//!
//! Signs nothing, judges no request, and never shows a workload the data directory. Without control it goes on from what
//! it holds.
//!
//! | room | holds |
//! |---|---|
//! | `join` | a join token traded for the agent's own identity, kept 0600 |
//! | `link` | the one way to control: gRPC over mutual TLS |
//! | `follow` | the stream from control, opened again with back-off |
//! | `held` | the verified history, in memory and on disk |
//! | `views` | the view of each service that runs here |
//! | `discovery` | where every service runs right now |
//! | `signals` | what control revoked |
//! | `identity` | keys and certificates, renewed at half life |
//! | `workload_api` | the SPIFFE Workload API and Envoy's SDS, on a socket for each instance and one for what the agent did not start |
//! | `workloads` | instances: a launcher, a workload and a sidecar each, supervised |
//! | `ack` | what control must know of this host's instances |
//! | `report` | decision records on their way to control |
//! | `probe` | whether the telemetry of the sidecars here arrives at control |
//! | [`Telemetry`] | what proxies count, and the spans of their exchanges, on their way to whoever exports them |
//! | `fresh` | how long ago this host was in step with control |
//! | `local_api` | `agent.sock` |
//! | [`isolate`], [`launch`], [`harden`] | namespaces of their own for workloads |

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use countersign_api::run_file::RunService;
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::{InstanceId, ServiceName, TrustDomain},
    ledger::Follower,
    service::ServiceSpec,
};
use tokio::{sync::broadcast, task::JoinHandle};

use crate::{
    host::{Contact, Host, Parts},
    isolate::Isolation,
    join::{Issued, JoinToken},
    link::ControlAddress,
    report::Reports,
    signals::Heard,
    workload_api::registered::{self, Registered},
    workloads::Workloads,
};

/// How long an agent that stops waits until what it has to say of its instances is said, and how long that is then on its way.
const HEARD_WITHIN: Duration = Duration::from_millis(500);
const ON_ITS_WAY: Duration = Duration::from_millis(100);

pub mod artifact;
pub mod harden;
pub mod isolate;
pub mod launch;

mod ack;
mod backoff;
mod discovery;
mod follow;
mod fresh;
mod held;
mod host;
mod identity;
mod join;
mod keep;
mod link;
mod local_api;
mod probe;
mod report;
mod signals;
mod telemetry;
mod tokens;
mod views;
mod workload_api;
mod workloads;

pub use join::{IssuedError, JoinError, JoinTokenError, KeptError};
pub use link::ControlAddressError;
pub use telemetry::{Source, Telemetry, Told};
pub use workload_api::registered::SOCKET_PATH_BYTES_MAX;

/// What an agent is told.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The mesh's data directory; the agent keeps what is its own in `agent/` below it.
    pub data_dir: PathBuf,
    /// The name of this host.
    pub host: ServiceName,
    /// Where the control plane listens: `https://host:port`; several of them with commas between.
    pub control: String,
    /// A join token. Not needed by a host that has joined before.
    pub join: Option<String>,
    /// Where other hosts reach the sidecars of this one; the address on the way to control unless given.
    pub address: Option<IpAddr>,
    /// What runs here.
    pub workloads: Vec<WorkloadSpec>,
    /// Whether workloads get namespaces of their own.
    pub isolate: Isolate,
    /// Threads of each sidecar, at least 1.
    pub workers: u32,
    /// The binary with the hidden `launch` and `sidecar` subcommands: `/proc/self/exe`.
    pub executable: PathBuf,
    /// A workload that ended is not started again, and [`Agent::exited`] says how it ended.
    pub exit_with_workload: bool,
    /// What is wanted of proxies beyond their records; `None`: nothing, and it costs nothing.
    pub telemetry: Option<Telemetry>,
    /// Where processes that the agent did not start ask for identities; `None`: nowhere. Its directory says which users reach it.
    pub workload_socket: Option<PathBuf>,
}

/// A service on this host: how it is started, which stays here, and what it declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// The service.
    pub service: ServiceName,
    /// What it declares to the mesh.
    pub spec: ServiceSpec,
    /// The program and its arguments; absent when it runs elsewhere and only its sidecar is ours.
    pub run: Option<Vec<String>>,
    /// The working directory.
    pub dir: PathBuf,
    /// Variables on top of the agent's own and those that describe the mesh.
    pub env: BTreeMap<String, String>,
    /// How many, at least 1. One that runs elsewhere has one sidecar.
    pub instances: u32,
    /// Where it listens on 127.0.0.1; picked when absent and told as `PORT`.
    pub port: Option<u16>,
}

/// Whether workloads get namespaces of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolate {
    /// Where the kernel allows it.
    #[default]
    Auto,
    /// Or the agent does not start.
    Required,
    /// They do not.
    Off,
}

/// The target of log events that are an [`AgentEvent`] as well: whoever shows those can leave these out.
pub const TOLD: &str = "countersign_agent::told";

/// What happens on a host, for people who watch. A slow listener misses some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// The host became part of the mesh.
    Joined {
        /// Whose.
        trust_domain: TrustDomain,
    },
    /// The stream from control is open, and what is held is current.
    ControlFollowed {
        /// The revision that is held.
        revision: Revision,
    },
    /// The stream from control ended. Proxies go on from what they hold.
    ControlLost {
        /// Why.
        why: String,
    },
    /// What control sent does not follow from what is held, or it does not accept this host. The last good state stays.
    HistoryRefused {
        /// Why.
        why: String,
    },
    /// A proxy could not take up a revision and keeps its last good view.
    ViewRefused {
        /// The service.
        service: ServiceName,
        /// The revision.
        revision: Revision,
        /// Why.
        why: String,
    },
    /// A workload and its sidecar are being started.
    InstanceStarting {
        /// The instance.
        instance: InstanceId,
    },
    /// An identity was issued to it, for the first time or anew.
    IdentityIssued {
        /// The instance.
        instance: InstanceId,
    },
    /// Its proxy enforces a revision.
    Enforced {
        /// The instance.
        instance: InstanceId,
        /// The revision.
        revision: Revision,
    },
    /// Its workload accepts connections.
    InstanceReady {
        /// The instance.
        instance: InstanceId,
    },
    /// Its command names something that no deployment of its service admits, so nothing of it runs.
    InstanceWaits {
        /// The instance.
        instance: InstanceId,
        /// What its command names; none when that could not be read.
        artifact: Option<Digest>,
        /// Why it waits.
        why: String,
    },
    /// Its workload wrote a line.
    Output {
        /// The instance.
        instance: InstanceId,
        /// The line, cut at 4096 bytes.
        line: String,
    },
    /// Its workload ended, or could not be started.
    WorkloadEnded {
        /// The instance.
        instance: InstanceId,
        /// How, or why not.
        why: String,
        /// What it wrote last.
        last_lines: Vec<String>,
        /// When it is started again; absent when it is not.
        restart_in: Option<Duration>,
    },
    /// Its sidecar ended, or could not be started.
    ProxyEnded {
        /// The instance.
        instance: InstanceId,
        /// How, or why not.
        why: String,
        /// When it is started again.
        restart_in: Duration,
    },
    /// It was stopped.
    InstanceStopped {
        /// The instance.
        instance: InstanceId,
    },
}

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address of control is none.
    #[error(transparent)]
    Control(#[from] ControlAddressError),
    /// The join token is none.
    #[error(transparent)]
    Token(#[from] JoinTokenError),
    /// Its directory cannot be used.
    #[error("could not use `{dir}` as the agent's directory")]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Its local socket cannot be made.
    #[error("could not listen on `{socket}`")]
    Socket {
        /// The socket.
        socket: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Workloads must be isolated and cannot be.
    #[error("workloads cannot be isolated on this host, and `isolate = \"required\"` demands it: {0}")]
    Isolation(String),
    /// It has no identity and no token to get one.
    #[error("host `{0}` has not joined the mesh, and no join token was given")]
    NotJoined(ServiceName),
    /// It was away for longer than its identity lives.
    #[error("the identity of host `{0}` has expired while the agent was not running; join again with a new token")]
    Expired(ServiceName),
    /// It was taken back.
    #[error("the identity of host `{0}` was revoked; join again with a new token")]
    Revoked(ServiceName),
    /// The identity in its directory cannot be used.
    #[error("the agent's identity in `{dir}` cannot be used; remove it and join again")]
    Kept {
        /// The directory.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KeptError,
    },
    /// What it pinned cannot be read: it would follow whoever comes first.
    #[error("what this host pinned of the mesh cannot be used: {0}; remove the agent's directory and join again")]
    Anchor(String),
    /// Joining failed.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// There is no way to control from this host.
    #[error("could not find the way to the control plane at `{control}`")]
    NoWay {
        /// Where it should be.
        control: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

/// A running agent. Dropped, it ends at once, and everything it started with it; [`Agent::stop`] ends it in order.
pub struct Agent {
    host: Arc<Host>,
    workloads: Arc<Workloads>,
    tasks: Vec<JoinHandle<()>>,
    workload_socket: Option<PathBuf>,
}

/// Starts an agent: joins unless it has joined before, takes up the state it last verified, and starts the workloads.
/// Does not wait for control beyond joining, nor for any workload.
pub async fn start(config: AgentConfig) -> Result<Agent, StartError> {
    let control = ControlAddress::parse(&config.control)?;
    let token = config.join.as_deref().map(JoinToken::parse).transpose()?;
    let dir = config.data_dir.join("agent");
    let unusable = {
        let dir = dir.clone();
        move |source| StartError::Dir { dir: dir.clone(), source }
    };
    keep::directory(&dir).map_err(&unusable)?;
    let socket = config.data_dir.join(countersign_api::run_file::AGENT_SOCKET);
    let listener = local_api::bind(&config.data_dir, &dir).map_err(|source| StartError::Socket { socket, source })?;
    let workload_socket = config.workload_socket.clone();
    let asked = workload_socket
        .as_deref()
        .map(registered::bind)
        .transpose()
        .map_err(|source| StartError::Socket { socket: workload_socket.clone().unwrap_or_default(), source })?;
    let isolation = isolation(&config).await?;
    let address = match config.address {
        Some(given) => given,
        None => {
            let found = control.own_address().await;
            found.map_err(|source| StartError::NoWay { control: control.to_string(), source })?
        }
    };
    let (identity, joined) = own_identity(&config.host, &control, token.as_ref(), &dir).await?;

    let (reports, for_control) = Reports::new();
    let host = Arc::new(Host::new(Parts {
        name: config.host,
        data_dir: config.data_dir,
        dir,
        executable: config.executable,
        workers: config.workers,
        isolation,
        control,
        address,
        identity,
        reports,
        telemetry: config.telemetry,
    }));
    let pins = token.as_ref().map(|token| token.pins).unwrap_or_default();
    if joined {
        // What was held before belongs to an earlier life of this host, perhaps of another mesh.
        host.keep_identity();
        host.held.pin(pins).map_err(unusable)?;
        host.tell(AgentEvent::Joined { trust_domain: host.trust_domain.clone() });
    } else if let Err(error) = host.held.load_pins() {
        return Err(StartError::Anchor(link::chain(&error)));
    } else if let Err(error) = host.held.load() {
        tracing::error!(error = link::chain(&error), "what this host held is not used; it begins cold");
    }
    let workloads = Arc::new(Workloads::new(host.clone(), config.exit_with_workload));
    let registered = Arc::new(Registered::new(host.clone()));
    let mut tasks = vec![
        tokio::spawn(follow::follow(host.clone(), for_control)),
        tokio::spawn(follow::keep_held(host.clone())),
        tokio::spawn(follow::keep_signals(host.clone())),
        tokio::spawn(identity::keep_agent_fresh(host.clone())),
        tokio::spawn(local_api::serve(listener, workloads.clone(), registered.clone())),
    ];
    if let Some(listener) = asked {
        tasks.push(tokio::spawn(workload_api::serve(listener, host.clone(), registered.clone())));
        tasks.push(tokio::spawn(registered.sweep()));
    }
    workloads.set(config.workloads).await;
    Ok(Agent { host, workloads, tasks, workload_socket })
}

async fn isolation(config: &AgentConfig) -> Result<Isolation, StartError> {
    if config.isolate == Isolate::Off {
        return Ok(Isolation { available: false, note: "`isolate = \"off\"` in the mesh directory".into() });
    }
    let isolation = isolate::probe(&config.executable, &config.data_dir).await;
    if !isolation.available && config.isolate == Isolate::Required {
        return Err(StartError::Isolation(isolation.note));
    }
    Ok(isolation)
}

/// The identity of this host, and whether it is new. A token for another root than the kept identity's means another
/// mesh: then it is traded, and so it is when the kept identity has expired, or was revoked as far as this host has heard.
async fn own_identity(
    host: &ServiceName,
    control: &ControlAddress,
    token: Option<&JoinToken>,
    dir: &std::path::Path,
) -> Result<(Issued, bool), StartError> {
    let now = identity::now();
    let revoked = Heard::load(dir).now();
    let is_revoked = |kept: &Issued| kept.svid.serial().is_some_and(|serial| revoked.is_revoked(&serial));
    match (Issued::load(dir), token) {
        (Ok(Some(kept)), _) if kept.serves(host, token, now) && !is_revoked(&kept) => Ok((kept, false)),
        (_, Some(token)) => Ok((join::join(control, host, token, now).await?, true)),
        (Err(source), None) => Err(StartError::Kept { dir: dir.to_owned(), source }),
        (Ok(Some(kept)), None) if is_revoked(&kept) => Err(StartError::Revoked(host.clone())),
        (Ok(Some(_)), None) => Err(StartError::Expired(host.clone())),
        (Ok(None), None) => Err(StartError::NotJoined(host.clone())),
    }
}

impl Agent {
    /// Waits until every instance enforces a view and its workload accepts connections, or will not: it only calls
    /// others, or it ended. Returns those that ended, and why. Waits for control as long as it takes.
    pub async fn ready(&self) -> Vec<(InstanceId, String)> {
        self.workloads.ready().await
    }

    /// Where processes that it did not start ask for identities.
    pub fn workload_socket(&self) -> Option<&Path> {
        self.workload_socket.as_deref()
    }

    /// Events from now on.
    pub fn events(&self) -> broadcast::Receiver<AgentEvent> {
        self.host.events.subscribe()
    }

    /// Brings what runs in line with `workloads`; what did not change is not touched.
    pub async fn set_workloads(&self, workloads: Vec<WorkloadSpec>) {
        self.workloads.set(workloads).await;
    }

    /// Where the services of this host listen.
    pub fn run_services(&self) -> BTreeMap<ServiceName, RunService> {
        self.workloads.run_services()
    }

    /// The namespace of the mesh.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.host.trust_domain
    }

    /// Whether workloads have namespaces of their own, and why not.
    pub fn isolation(&self) -> &Isolation {
        &self.host.isolation
    }

    /// What the mesh declares, once this host holds it. Waits for control as long as it takes.
    pub async fn declared(&self) -> BTreeMap<ServiceName, ServiceSpec> {
        let mut revisions = self.host.held.revisions();
        let _ = revisions.wait_for(|revision| revision.0 > 0).await; // its sender lives as long as the host
        let declared = |follower: &Follower| {
            let services = follower.state().services.iter();
            services.map(|(name, service)| (name.clone(), service.spec.clone())).collect()
        };
        self.host.held.look(declared)
    }

    /// Waits until a workload ended for good: its exit code, or 128 and the number of the signal. Without
    /// [`AgentConfig::exit_with_workload`] the first crash counts.
    pub async fn exited(&self) -> u8 {
        self.workloads.exited().await
    }

    /// Ends in order: instances leave discovery, proxies finish what is open within `drain`, workloads are asked to end
    /// and then made to, what is held is written down.
    pub async fn stop(self, drain: Duration) {
        self.workloads.stop(drain).await;
        let host = self.host.clone();
        // What was issued to instances that ended is revoked when control hears of it.
        if *host.contact.borrow() == Contact::Followed {
            let heard = async {
                host.acknowledgements.said().await;
                tokio::time::sleep(ON_ITS_WAY).await;
            };
            let _ = tokio::time::timeout(HEARD_WITHIN, heard).await;
        }
        drop(self);
        let written = tokio::task::spawn_blocking(move || {
            host.held.write()?;
            host.fresh.write()?;
            match std::fs::remove_file(host.data_dir.join(countersign_api::run_file::AGENT_SOCKET)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(%error, "could not keep the mesh's state for the next start");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl WorkloadSpec {
    /// Whether `other` is started the same way, so that what runs can stay. What a service declares beyond its
    /// upstreams reaches its proxy in its view.
    fn starts_like(&self, other: &Self) -> bool {
        self.run == other.run
            && self.dir == other.dir
            && self.env == other.env
            && self.port == other.port
            && self.spec.upstreams == other.spec.upstreams
    }
}
