//! One instance: a workload and its sidecar, kept running until it is stopped. The workload is started when its sidecar
//! serves it, never before. Each may crash alone: the sidecar lives on while its workload is started again in the
//! namespaces it had, and answers 503 meanwhile. Only the end of the launcher, which takes the namespaces and the sidecar's
//! sockets with it, lets both begin anew, on the same addresses. Stopping drains the sidecar first and the workload
//! after, because what is still open needs it.
//!
//! Of a service that is held to its deployments neither runs unless what the command names is one of them ([`admission`]).

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_api::{
    local::WorkloadView,
    mesh::InstanceUp,
    sidecar::{Configure, Listening},
    workload::ENDPOINT_VARIABLE,
};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::{InstanceId, ServiceName},
};
use parking_lot::Mutex;
use tokio::{sync::watch, task::AbortHandle};

use self::door::LaunchedBy;
use super::{
    event::Event,
    output::Output,
    sidecar::{self, Ended, Talk},
};
use crate::{
    AgentEvent, TOLD, WorkloadSpec,
    artifact::Measured,
    backoff::Backoff,
    host::{Contact, Host},
    identity::keep_instance_fresh,
    isolate::{self, Exit, LaunchError, LaunchSpec, Launcher, Stop},
    keep,
    link::chain,
    tokens::{Identified, keep_tokens_fresh},
};

mod admission;
mod door;

/// How long open exchanges may take to end when what runs is no longer admitted.
const CUT_WITHIN: Duration = Duration::ZERO;
/// The delays before a crashed process is started again.
const RESTART_FIRST: Duration = Duration::from_millis(100);
const RESTART_LONGEST: Duration = Duration::from_secs(30);
/// A process that lived so long is well: its next crash begins at the first delay again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// Between a workload's SIGTERM and its SIGKILL.
const TERM_WITHIN: Duration = Duration::from_secs(5);
/// And after that, until the kernel has cleared away what is left.
const KILL_WITHIN: Duration = Duration::from_secs(2);
/// A workload that runs so long without listening is not going to: it only calls others.
const LISTENS_WITHIN: Duration = Duration::from_secs(5);
/// Room for the decision records of one instance, in bytes.
const RECORDS_BYTES_MAX: u64 = 64 << 20;
/// Inside a namespace of its own every port is free.
const ISOLATED_PORTS: u16 = 15001;
const ISOLATED_APP_PORT: u16 = 8080;

/// Where a sidecar listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) inbound: SocketAddr,
    pub(crate) outbound_http: SocketAddr,
    pub(crate) upstreams: BTreeMap<ServiceName, SocketAddr>,
    pub(crate) admin: String,
}

/// What an instance is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No deployment admits it, and nothing of it runs.
    Waiting,
    Starting,
    Running,
    Restarting,
    Stopped,
}

/// An instance as it is now.
#[derive(Debug, Clone)]
pub(crate) struct Status {
    pub(crate) phase: Phase,
    /// What its command names, as it was read before its workload was started last.
    pub(crate) artifact: Option<Digest>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) namespace_pid: Option<u32>,
    pub(crate) pid: Option<u32>,
    pub(crate) restarts: u32,
    pub(crate) last_exit: Option<String>,
    pub(crate) exit: Option<Exit>,
    /// Where its proxy listens, or listened: the next one does there too.
    pub(crate) addresses: Option<Addresses>,
    /// Its proxy listens now.
    pub(crate) listening: bool,
    /// What its proxy enforces.
    pub(crate) revision: Option<Revision>,
    /// Its proxy refused the view it was given last.
    pub(crate) view_refused: bool,
    pub(crate) has_identity: bool,
    /// Control did not issue an identity when it was asked last.
    pub(crate) identity_refused: bool,
    pub(crate) app_ready: bool,
    /// It accepted connections once, or will not, or failed: there is no more to wait for.
    pub(crate) settled: bool,
}

/// One instance of a workload.
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) spec: WorkloadSpec,
    pub(crate) isolated: bool,
    slot: u32, // from 1
    port: Option<u16>,
    status: watch::Sender<Status>,
    /// What its command names, as long as no file of it has changed.
    measured: Mutex<Option<Arc<Measured>>>,
}

/// The sidecar's end of the broker of the workload's current namespace.
type Broker = Option<Arc<OwnedFd>>;

impl Instance {
    /// Instance number `slot` (from 1) of the workload of `spec`.
    pub(crate) fn new(host: &Host, spec: WorkloadSpec, slot: u32) -> Self {
        let suffix = format!("{slot}-{:08x}", fastrand::u32(..));
        let isolated = host.isolation.available && spec.run.is_some();
        Self {
            id: InstanceId::new(&spec.service, &suffix),
            port: app_port(&spec, isolated, slot),
            isolated,
            spec,
            slot,
            measured: Mutex::default(),
            status: watch::Sender::new(Status {
                phase: Phase::Starting,
                artifact: None,
                env: BTreeMap::new(),
                namespace_pid: None,
                pid: None,
                restarts: 0,
                last_exit: None,
                exit: None,
                addresses: None,
                listening: false,
                revision: None,
                view_refused: false,
                has_identity: false,
                identity_refused: false,
                app_ready: false,
                settled: false,
            }),
        }
    }

    /// How it is now, and whenever that changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Keeps it running until `stop` says how long open exchanges may take to end.
    pub(crate) async fn run(self: Arc<Self>, host: Arc<Host>, mut stop: watch::Receiver<Option<Duration>>, once: bool) {
        while self.admitted(&host, &mut stop).await {
            tracing::info!(instance = %self.id, isolated = self.isolated, "an instance starts");
            host.tell(AgentEvent::InstanceStarting { instance: self.id.clone() });
            let leave = watch::Sender::new(None);
            let mut stay = std::pin::pin!(self.clone().stay(&host, leave.subscribe(), once));
            let drain = tokio::select! {
                biased;
                () = said(&mut stop, Option::is_some) => *stop.borrow(),
                () = self.no_longer_admitted(&host) => Some(CUT_WITHIN),
                () = &mut stay => break,
            };
            leave.send_replace(drain);
            stay.await;
            if stop.borrow().is_none() {
                host.acknowledgements.ended(&self.id, "nothing admits it any more");
            }
        }
        self.status.send_modify(|status| (status.phase, status.settled) = (Phase::Stopped, true));
        host.acknowledgements.ended(&self.id, "it was stopped");
        tracing::info!(instance = %self.id, "an instance stopped");
        host.tell(AgentEvent::InstanceStopped { instance: self.id.clone() });
    }

    /// Keeps both its processes running until `stop`.
    async fn stay(self: Arc<Self>, host: &Arc<Host>, stop: watch::Receiver<Option<Duration>>, once: bool) {
        let (issued, identified) = (watch::Sender::new(None), watch::Sender::new(None));
        let (fresh, tokens) = (identified.subscribe(), issued.subscribe());
        let tokens = keep_tokens_fresh(host.clone(), self.clone(), tokens, identified);
        let renewal = [
            Aborted(tokio::spawn(keep_instance_fresh(host.clone(), self.clone(), issued)).abort_handle()),
            Aborted(tokio::spawn(tokens).abort_handle()),
        ];
        let broker = watch::Sender::new(None);
        let drained = watch::Sender::new(false);
        let sidecar = async {
            self.keep_sidecar(host, fresh, broker.subscribe(), stop).await;
            drained.send_replace(true);
        };
        let workload = self.keep_workload(host, &broker, drained.subscribe(), once);
        tokio::join!(sidecar, workload);
        drop(renewal);
    }

    /// Keeps a sidecar running, in the namespace of the current broker, until drained.
    async fn keep_sidecar(
        &self,
        host: &Arc<Host>,
        identity: watch::Receiver<Option<Arc<Identified>>>,
        mut broker: watch::Receiver<Broker>,
        mut stop: watch::Receiver<Option<Duration>>,
    ) {
        let views = host.held.look(|follower| host.views.subscribe(&self.spec.service, follower));
        let mut backoff = Backoff::new(RESTART_FIRST, RESTART_LONGEST);
        loop {
            let namespace = tokio::select! {
                biased;
                () = said(&mut stop, Option::is_some) => return,
                namespace = self.namespace(&mut broker) => namespace,
            };
            let started = Instant::now();
            let talk =
                Talk { host, instance: self, views: views.clone(), identity: identity.clone(), drain: stop.clone() };
            let ended = tokio::select! {
                biased;
                ended = self.one_sidecar(talk, namespace) => ended,
                // Its sockets went with the namespace; the next one listens where it did.
                () = self.replaced(&mut broker) => {
                    self.departs(host, "its workload is started again");
                    continue;
                }
            };
            self.departs(host, "its proxy ended");
            let Ended::Died(why) = ended else { return };
            if started.elapsed() > HEALTHY_AFTER {
                backoff.reset();
            }
            let restart_in = backoff.next_delay();
            tracing::error!(target: TOLD, instance = %self.id, why, ?restart_in, "a proxy ended");
            host.tell(AgentEvent::ProxyEnded { instance: self.id.clone(), why, restart_in });
            tokio::select! {
                () = said(&mut stop, Option::is_some) => return,
                () = tokio::time::sleep(restart_in) => {}
            }
        }
    }

    /// The broker of the workload's namespace; none when it has no namespace of its own.
    async fn namespace(&self, broker: &mut watch::Receiver<Broker>) -> Broker {
        if !self.isolated {
            return None;
        }
        said(broker, Option::is_some).await;
        broker.borrow_and_update().clone()
    }

    /// Waits until the workload has another namespace.
    async fn replaced(&self, broker: &mut watch::Receiver<Broker>) {
        if !self.isolated || broker.changed().await.is_err() {
            std::future::pending().await
        }
    }

    async fn one_sidecar(&self, talk: Talk<'_>, broker: Broker) -> Ended {
        let host = talk.host;
        let could_not = |tried: &str, error: std::io::Error| Ended::Died(format!("could not {tried}: {error}"));
        let configure = match self.configure(host) {
            Ok(configure) => configure,
            Err(error) => return could_not("make the directory for its records", error),
        };
        let broker = match broker.map(|broker| broker.try_clone()).transpose() {
            Ok(broker) => broker,
            Err(error) => return could_not("share the broker", error),
        };
        let id = self.id.clone();
        let output = Output::new(move |line| Event::parse(&line).tell(&id));
        match sidecar::spawn(&host.executable, broker, &output) {
            Ok(sidecar) => match talk.run(sidecar, configure).await {
                Ended::Died(why) => Ended::Died(with_last_trouble(why, &output)),
                Ended::Drained => Ended::Drained,
            },
            Err(error) => could_not(&format!("start `{}`", host.executable.display()), error),
        }
    }

    /// What a sidecar of this instance is told first. The first one picks its ports; those after it get the same, since
    /// its workload and its callers know them by then.
    fn configure(&self, host: &Host) -> std::io::Result<Configure> {
        let records_dir = host.dir.join("records").join(format!("{}-{}", self.spec.service, self.slot));
        keep::directory(&records_dir)?;
        let held = self.status.borrow().addresses.clone();
        let any = |ip: IpAddr| SocketAddr::new(ip, 0).to_string();
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let ways = match &held {
            Some(held) => Some((held.outbound_http, held.upstreams.clone())),
            None => self.isolated.then(|| self.isolated_ways()),
        };
        let (outbound_http_listen, upstreams) = match ways {
            Some((outbound, upstreams)) => (
                outbound.to_string(),
                upstreams.iter().map(|(service, at)| (service.to_string(), at.to_string())).collect(),
            ),
            None => {
                let upstreams = &self.spec.spec.upstreams;
                (any(loopback), upstreams.iter().map(|service| (service.to_string(), any(loopback))).collect())
            }
        };
        let admin = held.as_ref().and_then(|held| held.admin.parse::<http::Uri>().ok());
        let admin = admin.and_then(|uri| uri.authority().map(|authority| authority.to_string()));
        Ok(Configure {
            instance: self.id.to_string(),
            workers: host.workers.max(1),
            inbound_listen: held.map_or_else(|| any(host.address), |held| held.inbound.to_string()),
            app_address: self.port.map(|port| SocketAddr::new(loopback, port).to_string()).unwrap_or_default(),
            outbound_http_listen,
            upstreams,
            isolated: self.isolated,
            transparent: self.isolated,
            records_dir: records_dir.display().to_string(),
            records_bytes_max: RECORDS_BYTES_MAX,
            admin_listen: admin.unwrap_or_else(|| any(loopback)),
            sampling: host.telemetry.as_ref().and_then(|telemetry| telemetry.sampling),
        })
    }

    /// Where the sidecar listens for its workload inside a namespace of its own: known before either runs.
    fn isolated_ways(&self) -> (SocketAddr, BTreeMap<ServiceName, SocketAddr>) {
        let mut ports = (ISOLATED_PORTS..).filter(|port| Some(*port) != self.port);
        let mut next = || SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ports.next().unwrap_or_default());
        let outbound = next();
        (outbound, self.spec.spec.upstreams.iter().map(|service| (service.clone(), next())).collect())
    }

    /// Keeps the workload running until its sidecar is drained.
    async fn keep_workload(
        self: &Arc<Self>,
        host: &Arc<Host>,
        broker: &watch::Sender<Broker>,
        mut drained: watch::Receiver<bool>,
        once: bool,
    ) {
        let Some(command) = &self.spec.run else {
            self.status.send_modify(|status| (status.phase, status.settled) = (Phase::Running, true));
            said(&mut drained, |drained| *drained).await;
            return;
        };
        let ways = if self.isolated { Some(self.isolated_ways()) } else { self.ways(&mut drained).await };
        let Some(ways) = ways else { return };
        let env = self.env(host, &ways);
        self.status.send_modify(|status| status.env = env.clone());
        let (id, listener) = (self.id.clone(), host.clone());
        let output = Output::new(move |line| {
            tracing::info!(target: "countersign::workload", instance = %id, "{line}");
            listener.tell(AgentEvent::Output { instance: id.clone(), line });
        });
        let spec = LaunchSpec {
            executable: host.executable.clone(),
            command: command.clone(),
            dir: self.spec.dir.clone(),
            env,
            isolate: self.isolated,
            data_dir: host.data_dir.clone(),
        };
        let mut backoff = Backoff::new(RESTART_FIRST, RESTART_LONGEST);
        let (mut launcher, mut identities) = (None, None);
        loop {
            output.forget();
            let life = tokio::select! {
                biased;
                () = said(&mut drained, |drained| *drained) => break,
                life = self.one_life(host, &spec, (&mut launcher, &mut identities), broker, &output) => life,
            };
            let (exit, why, lived) = match life {
                Ok((exit, lived)) => (exit, exit.to_string(), lived),
                Err(error) => (Exit::Code(127), chain(&error), Duration::ZERO),
            };
            self.status.send_modify(|status| status.exit = Some(exit));
            if exit == Exit::Lost {
                (launcher, identities) = (None, None);
            }
            if lived > HEALTHY_AFTER {
                backoff.reset();
            }
            let restart_in = (!once).then(|| backoff.next_delay());
            self.crashed(host, why, &output, restart_in).await;
            let wait = async {
                match restart_in {
                    Some(restart_in) => tokio::time::sleep(restart_in).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = said(&mut drained, |drained| *drained) => break,
                () = wait => self.status.send_modify(|status| status.restarts += 1),
            }
        }
        if let Some(launcher) = launcher {
            self.end(&launcher).await;
        }
    }

    /// One life of the workload: begun when its sidecar serves it, ended by itself. How it ended and how long it was.
    async fn one_life(
        self: &Arc<Self>,
        host: &Arc<Host>,
        spec: &LaunchSpec,
        (launcher, identities): (&mut Option<Launcher>, &mut Option<Aborted>),
        broker: &watch::Sender<Broker>,
        output: &Output,
    ) -> Result<(Exit, Duration), LaunchError> {
        let launcher = match launcher {
            Some(launcher) => launcher,
            None => {
                let mut prepared = isolate::prepare(spec.clone()).await?;
                host.launches(prepared.pid);
                prepared.stdout.take().into_iter().for_each(|stdout| output.read(stdout));
                prepared.stderr.take().into_iter().for_each(|stderr| output.read(stderr));
                if let Some(note) = &prepared.note {
                    tracing::warn!(instance = %self.id, note, "a workload is not separated in every way");
                }
                if let Some(socket) = prepared.broker.take() {
                    broker.send_replace(Some(Arc::new(socket)));
                }
                *identities = LaunchedBy::take(&mut prepared).map(|launched| {
                    Aborted(tokio::spawn(self.clone().serve_identities(host.clone(), launched)).abort_handle())
                });
                launcher.insert(prepared)
            }
        };
        self.served(host).await;
        let artifact = self.admitted_to_start(host).await;
        let process = launcher.start(artifact).await.inspect_err(|error| {
            if matches!(error, LaunchError::Other) {
                self.measured.lock().take();
            }
        })?;
        let began = Instant::now();
        self.status.send_modify(|status| {
            status.phase = Phase::Running;
            (status.pid, status.namespace_pid) = (Some(process.pid), process.namespace_pid);
        });
        self.announce(host);
        let settles = async {
            tokio::time::sleep(LISTENS_WITHIN).await;
            self.status.send_modify(|status| status.settled = true);
            std::future::pending().await
        };
        tokio::select! {
            exit = launcher.exited() => Ok((exit, began.elapsed())),
            never = settles => match never {},
        }
    }

    /// INVARIANT (sidecar-first): returns when the sidecar listens and has answered to its view; or when neither control nor
    /// what the agent holds can give one, and it answers 503. Nothing of a workload runs before.
    async fn served(&self, host: &Host) {
        let (mut status, mut contact) = (self.watch(), host.contact.subscribe());
        loop {
            let so = {
                let (status, contact) = (status.borrow_and_update(), *contact.borrow_and_update());
                let answered = status.revision.is_some() || status.view_refused;
                let none_to_come = contact != Contact::Sought && !host.views.is_published(&self.spec.service);
                status.listening && (answered || none_to_come)
            };
            if so {
                return;
            }
            // Neither can fail: the senders lie in `self` and in `host`.
            tokio::select! {
                _ = status.changed() => {}
                _ = contact.changed() => {}
            }
        }
    }

    /// Where the sidecar listens for the workload, once it does. `None`: it never will.
    async fn ways(
        &self,
        drained: &mut watch::Receiver<bool>,
    ) -> Option<(SocketAddr, BTreeMap<ServiceName, SocketAddr>)> {
        let mut status = self.watch();
        tokio::select! {
            () = said(drained, |drained| *drained) => None,
            () = said(&mut status, |status| status.addresses.is_some()) => {
                let addresses = status.borrow().addresses.clone()?;
                Some((addresses.outbound_http, addresses.upstreams))
            }
        }
    }

    /// What the workload finds in its environment: what its owner wrote, and how to reach the mesh.
    fn env(
        &self,
        host: &Host,
        (outbound, upstreams): &(SocketAddr, BTreeMap<ServiceName, SocketAddr>),
    ) -> BTreeMap<String, String> {
        let proxy = format!("http://{outbound}");
        // Addresses of this machine are not for the proxy: upstream listeners and the workload's own port are there.
        let direct = "localhost,127.0.0.1,::1";
        let mut env = self.spec.env.clone();
        for (name, value) in [
            ("HTTP_PROXY", proxy.as_str()),
            ("http_proxy", &proxy),
            ("NO_PROXY", direct),
            ("no_proxy", direct),
            ("COUNTERSIGN_SERVICE", self.spec.service.as_str()),
            ("COUNTERSIGN_INSTANCE", self.id.as_str()),
        ] {
            env.insert(name.into(), value.into());
        }
        if let Some(socket) = self.workload_socket(host) {
            // Its owner may have another one for it.
            env.entry(ENDPOINT_VARIABLE.into()).or_insert_with(|| format!("unix://{}", socket.display()));
        }
        env.extend(self.port.map(|port| ("PORT".to_owned(), port.to_string())));
        env.extend(upstreams.iter().map(|(service, at)| (service.upstream_variable(), at.to_string())));
        env
    }

    /// Asks the workload to end, then makes it.
    async fn end(&self, launcher: &Launcher) {
        for (how, within) in [(Stop::Term, TERM_WITHIN), (Stop::Kill, KILL_WITHIN)] {
            if let Err(error) = launcher.stop(how) {
                tracing::warn!(instance = %self.id, %error, "could not ask a workload to end");
            }
            if tokio::time::timeout(within, launcher.exited()).await.is_ok() {
                break;
            }
        }
    }

    async fn crashed(&self, host: &Host, why: String, output: &Output, restart_in: Option<Duration>) {
        // Its last words may still be on their way.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let last_lines = output.last_lines();
        tracing::error!(target: TOLD, instance = %self.id, why, ?restart_in, last_lines = last_lines.join(" | "), "a workload ended");
        self.status.send_modify(|status| {
            status.phase = if restart_in.is_some() { Phase::Restarting } else { Phase::Stopped };
            (status.pid, status.namespace_pid) = (None, None);
            status.last_exit = Some(why.clone());
            status.settled = true;
        });
        self.announce(host);
        host.tell(AgentEvent::WorkloadEnded { instance: self.id.clone(), why, last_lines, restart_in });
    }

    /// Its proxy says where it listens.
    pub(super) fn listens(&self, host: &Host, addresses: Addresses) {
        self.status.send_modify(|status| (status.addresses, status.listening) = (Some(addresses), true));
        self.announce(host);
    }

    /// Its proxy has an identity to show.
    pub(super) fn has_identity(&self, host: &Host) {
        self.status.send_if_modified(|status| !std::mem::replace(&mut status.has_identity, true));
        self.announce(host);
    }

    /// Control did not issue an identity for it. It is asked again.
    pub(crate) fn is_not_identified(&self) {
        self.status.send_modify(|status| status.identity_refused = true);
    }

    /// Its proxy refused the view it was given, and keeps its last good one if there is any.
    pub(super) fn refuses(&self) {
        self.status.send_modify(|status| status.view_refused = true);
    }

    /// Its proxy enforces `revision`.
    pub(super) fn enforces(&self, host: &Host, revision: Revision) {
        self.status.send_modify(|status| (status.revision, status.view_refused) = (Some(revision), false));
        self.announce(host);
        host.tell(AgentEvent::Enforced { instance: self.id.clone(), revision });
    }

    /// The workload began, or ceased, to accept connections.
    pub(super) fn app_ready(&self, host: &Host, ready: bool) {
        self.status.send_modify(|status| {
            status.app_ready = ready;
            status.settled |= ready;
        });
        self.announce(host);
        let said = if ready { "a workload accepts connections" } else { "a workload accepts no connections any more" };
        tracing::info!(instance = %self.id, "{said}");
        if ready {
            host.tell(AgentEvent::InstanceReady { instance: self.id.clone() });
        }
    }

    /// Others may call it: its proxy listens, can prove who it is, and has something to judge by.
    fn announce(&self, host: &Host) {
        let up = {
            let status = self.status.borrow();
            let Some(addresses) =
                status.addresses.as_ref().filter(|_| status.revision.is_some() && status.has_identity)
            else {
                return;
            };
            InstanceUp {
                instance: self.id.to_string(),
                address: addresses.inbound.to_string(),
                ready: status.app_ready,
                pid: status.pid.unwrap_or_default().into(),
                admin: addresses.admin.clone(),
                isolation: if self.isolated { "namespace" } else { "none" }.into(),
                artifact: admission::bytes(status.artifact),
            }
        };
        host.acknowledgements.up(&self.id, up);
    }

    /// Others should not call it any more.
    pub(super) fn departs(&self, host: &Host, reason: &str) {
        host.acknowledgements.down(&self.id, reason);
        self.status.send_modify(|status| {
            (status.listening, status.revision, status.view_refused) = (false, None, false);
            (status.has_identity, status.app_ready) = (false, false);
        });
    }

    /// As `GET /v1/workloads` shows it.
    pub(crate) fn view(&self) -> WorkloadView {
        let status = self.status.borrow();
        let state = match status.phase {
            Phase::Waiting => "waiting",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Restarting => "restarting",
            Phase::Stopped => "stopped",
        };
        WorkloadView {
            instance: self.id.clone(),
            state: state.into(),
            namespace_pid: status.namespace_pid,
            env: status.env.clone(),
            dir: self.spec.dir.display().to_string(),
            restarts: status.restarts,
            last_exit: status.last_exit.clone(),
        }
    }
}

impl Addresses {
    pub(super) fn parse(listening: &Listening) -> Result<Self, String> {
        let address = |given: &str| given.parse::<SocketAddr>().map_err(|error| format!("`{given}`: {error}"));
        let upstreams = listening.upstreams.iter().map(|(service, at)| {
            Ok::<_, String>((ServiceName::parse(service).map_err(|error| error.to_string())?, address(at)?))
        });
        Ok(Self {
            inbound: address(&listening.inbound)?,
            outbound_http: address(&listening.outbound_http)?,
            upstreams: upstreams.collect::<Result<_, _>>()?,
            admin: listening.admin.clone(),
        })
    }
}

/// Where the workload is to listen. Its owner's choice holds for the first instance; without namespaces the others
/// would be in its way.
fn app_port(spec: &WorkloadSpec, isolated: bool, slot: u32) -> Option<u16> {
    match (spec.run.is_some(), isolated) {
        (false, _) => spec.port,
        (true, true) => Some(spec.port.unwrap_or(ISOLATED_APP_PORT)),
        (true, false) => spec.port.filter(|_| slot == 1).or_else(free_port),
    }
}

/// A port that nobody listens on right now.
fn free_port() -> Option<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    Some(listener.local_addr().ok()?.port())
}

/// Waits until `watched` says so, or can say nothing any more.
pub(super) async fn said<T>(watched: &mut watch::Receiver<T>, so: impl FnMut(&T) -> bool) {
    let _ = watched.wait_for(so).await;
}

fn with_last_trouble(why: String, output: &Output) -> String {
    match output.last_lines().iter().map(|line| Event::parse(line)).rfind(Event::is_trouble) {
        Some(event) => format!("{why}: {}", event.text),
        None => why,
    }
}

/// A task that ends with what it works for.
struct Aborted(AbortHandle);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}
