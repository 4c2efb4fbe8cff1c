//! Which hosts are there, which instances they run, where those are reached and what they enforce. Facts that come and
//! go without a change, so they are not in the ledger.
//!
//! No clock, no socket, no lock: each function takes what happened and returns what agents must be told.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::SocketAddr,
};

use countersign_api::{
    local::{HostView, InstanceView, ProxyRevision, TelemetryView, WaitingView},
    mesh,
};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::{InstanceId, ServiceName},
    signal::SignalSeq,
    state::MeshState,
};

use crate::{
    store::{StoredAcknowledgement, StoredHost, StoredInstance},
    telemetry::Reached,
};

/// How long the instances of a host stay when its stream ends: an agent that reconnects cuts no traffic.
pub const GRACE_MS: u64 = 5_000;
/// How long the instances of an earlier run stay until their agents have reported again.
pub const RESTART_GRACE_MS: u64 = 20_000;
/// Instances of one host at most.
pub const INSTANCES_PER_HOST_MAX: usize = 10_000;
/// Longest text that an agent may have kept here: a version, an address, a reason; in bytes.
const TEXT_BYTES_MAX: usize = 512;
/// Roots that an agent may say it verifies by.
const ROOTS_MAX: usize = 8;
/// Hosts whose refusal is remembered at most.
const REFUSED_MAX: usize = 1_000;

/// Why an instance waits whose agent did not find that out itself.
const NOT_ADMITTED: &str = "what its command names is no deployment of the service";

/// Which artifacts may be instances of a service; of a service that is not in here, any.
pub type Deployments = BTreeMap<ServiceName, BTreeSet<Digest>>;

/// Hosts and instances.
#[derive(Debug, Default)]
pub struct Registry {
    hosts: BTreeMap<ServiceName, Host>,
    instances: BTreeMap<InstanceId, Instance>,
    /// The services of each host that may run some only.
    entitlements: BTreeMap<ServiceName, BTreeSet<ServiceName>>,
    /// Why a host does not follow this ledger.
    refused: BTreeMap<ServiceName, String>,
    /// Services whose instances are told to nobody.
    hidden: BTreeSet<ServiceName>,
    /// Instances that run no more, whose identities and tokens are not yet revoked, and their hosts.
    ended: BTreeSet<(ServiceName, InstanceId)>,
    /// Hosts that are part of the mesh no longer, until they join again: what a stream that is about to end still says counts for nothing.
    evicted: BTreeSet<ServiceName>,
}

#[derive(Debug)]
struct Host {
    stored: StoredHost,
    connected: bool,
    /// SHA-256 of the root certificates that its agent verifies by, as it said on this stream.
    roots: Vec<Digest>,
}

#[derive(Debug)]
struct Instance {
    host: ServiceName,
    /// Where it is reached; `None` until its proxy listens.
    endpoint: Option<Endpoint>,
    /// What its command names, as its agent measured it.
    artifact: Option<Digest>,
    /// Why it is not let run, or not let into discovery.
    waits: Option<String>,
    revision: Revision,
    error: Option<String>,
    signals: SignalSeq,
    svid_expires_at_ms: u64,
    /// When it leaves unless its agent speaks of it again.
    leaves_at_ms: Option<u64>,
    /// Its agent follows another control plane, which answers for it.
    is_elsewhere: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    address: SocketAddr,
    ready: bool,
    admin: String,
    isolation: String,
}

/// What changed in discovery.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moved {
    /// Instances to be reached, new or different.
    pub up: Vec<mesh::Endpoint>,
    /// Instances that are gone.
    pub down: Vec<InstanceId>,
}

/// Why an agent's word is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not an instance id.
    #[error(transparent)]
    Name(#[from] countersign_core::identity::NameError),
    /// Not an artifact.
    #[error("an artifact is a SHA-256 of 32 bytes, not of {0}")]
    Artifact(usize),
    /// Not an address.
    #[error("`{0}` is not an address of the form ip:port")]
    Address(String),
    /// It runs elsewhere.
    #[error("instance `{0}` runs on another host")]
    OtherHost(InstanceId),
    /// It was not invited for that.
    #[error("host `{host}` was invited to run {}, not `{service}`; a new invitation for it can name that", list(.services))]
    NotEntitled {
        /// The host.
        host: ServiceName,
        /// What it asked for.
        service: ServiceName,
        /// What it may run.
        services: BTreeSet<ServiceName>,
    },
    /// It was evicted.
    #[error("host `{0}` was evicted: it has to be invited again")]
    Evicted(ServiceName),
    /// Too many.
    #[error("a host runs at most {INSTANCES_PER_HOST_MAX} instances")]
    TooMany,
}

impl Registry {
    /// Goes on from what was last written down.
    pub fn restore(hosts: Vec<StoredHost>, instances: Vec<StoredInstance>, now_ms: u64) -> Self {
        let mut registry = Self::default();
        for stored in hosts {
            registry.hosts.insert(stored.host.clone(), Host { stored, connected: false, roots: Vec::new() });
        }
        for stored in instances {
            let Ok(address) = stored.address.parse() else { continue };
            let (ready, admin, isolation) = (stored.ready, stored.admin, stored.isolation);
            let instance = Instance {
                artifact: stored.artifact,
                endpoint: Some(Endpoint { address, ready, admin, isolation }),
                leaves_at_ms: Some(now_ms + RESTART_GRACE_MS),
                ..Instance::of(stored.host)
            };
            registry.instances.insert(stored.instance, instance);
        }
        registry
    }

    /// A host joined: it may run `services`, or every declared one.
    ///
    /// INVARIANT (entitled-services): what a host may run is what its last invitation says. Its instances of other services
    /// leave at the next sweep.
    pub fn entitle(&mut self, host: &ServiceName, services: Option<BTreeSet<ServiceName>>) {
        self.evicted.remove(host);
        match services {
            None => drop(self.entitlements.remove(host)),
            Some(services) => {
                for (_, instance) in self
                    .instances
                    .iter_mut()
                    .filter(|(id, instance)| instance.host == *host && !services.contains(&id.service()))
                {
                    instance.leaves_at_ms = Some(0);
                }
                self.entitlements.insert(host.clone(), services);
            }
        }
    }

    /// A host is part of the mesh no longer. Names its instances, which leave at the next sweep.
    ///
    /// INVARIANT (evicted-is-gone): from then on nobody is told of an instance of it, until a host of that name joins by a token of its own.
    pub fn evict(&mut self, host: &ServiceName, why: &str) -> Vec<InstanceId> {
        self.evicted.insert(host.clone());
        self.refuse(host, why);
        let own = self.instances.iter_mut().filter(|(_, instance)| instance.host == *host);
        own.map(|(id, instance)| {
            instance.leaves_at_ms = Some(0);
            id.clone()
        })
        .collect()
    }

    /// A host holds another history than this ledger's, and is not let follow.
    pub fn refuse(&mut self, host: &ServiceName, why: &str) {
        if self.refused.len() < REFUSED_MAX || self.refused.contains_key(host) {
            self.refused.insert(host.clone(), short(why));
        }
    }

    /// What an agent says of what it refused of us last, or that it follows again.
    pub fn hear_refusal(&mut self, hello: &mesh::FollowHello, host: &ServiceName) {
        if hello.refused.is_empty() {
            self.refused.remove(host);
        } else {
            self.refuse(host, &hello.refused);
        }
    }

    /// An agent's stream opened. It will speak of each of its instances; those it does not speak of leave.
    pub fn connect(&mut self, hello: &mesh::FollowHello, host: &ServiceName, now_ms: u64) -> StoredHost {
        let joined_at_ms = self.hosts.get(host).map_or(now_ms, |known| known.stored.joined_at_ms);
        let stored = StoredHost {
            host: host.clone(),
            joined_at_ms,
            heard_at_ms: now_ms,
            version: short(&hello.version),
            isolation: short(&hello.isolation),
            isolation_note: short(&hello.isolation_note),
        };
        self.hosts.insert(host.clone(), Host { stored: stored.clone(), connected: true, roots: Vec::new() });
        self.hear_refusal(hello, host);
        self.expect_again(host, now_ms);
        stored
    }

    /// Its stream ended.
    pub fn disconnect(&mut self, host: &ServiceName, now_ms: u64) {
        if let Some(known) = self.hosts.get_mut(host) {
            known.connected = false;
            known.stored.heard_at_ms = now_ms;
        }
        self.expect_again(host, now_ms);
    }

    /// It said which root certificates it verifies by.
    pub fn holds(&mut self, host: &ServiceName, roots: &[impl AsRef<[u8]>]) {
        if let Some(known) = self.hosts.get_mut(host) {
            let digests = roots.iter().take(ROOTS_MAX).filter_map(|root| root.as_ref().try_into().ok().map(Digest));
            known.roots = digests.collect();
        }
    }

    /// The connected hosts whose agents did not say that they verify by `root`.
    pub fn lacking(&self, root: &Digest) -> BTreeSet<ServiceName> {
        let lacks = |known: &Host| known.connected && !known.roots.contains(root);
        self.hosts.iter().filter(|(_, known)| lacks(known)).map(|(host, _)| host.clone()).collect()
    }

    /// It said something.
    pub fn heard(&mut self, host: &ServiceName, now_ms: u64) {
        if let Some(known) = self.hosts.get_mut(host) {
            known.stored.heard_at_ms = now_ms;
        }
    }

    /// An SVID is about to be signed for an instance.
    pub fn issuing(&mut self, host: &ServiceName, instance: &InstanceId) -> Result<(), Refused> {
        self.of_host(host, instance).map(drop)
    }

    /// It was signed.
    pub fn issued(&mut self, host: &ServiceName, instance: &InstanceId, expires_at_ms: u64) {
        if let Ok(known) = self.of_host(host, instance) {
            known.svid_expires_at_ms = expires_at_ms;
            if known.endpoint.is_none() {
                known.leaves_at_ms = Some(expires_at_ms);
            }
        }
    }

    /// An instance's proxy listens, or its workload began or ceased to accept connections. What no deployment of its service
    /// admits stays out of discovery, whatever its agent made of that.
    pub fn up(
        &mut self,
        host: &ServiceName,
        up: &mesh::InstanceUp,
        deployments: &Deployments,
    ) -> Result<Moved, Refused> {
        let id = InstanceId::parse(&up.instance)?;
        let address = up.address.parse().map_err(|_| Refused::Address(short(&up.address)))?;
        let endpoint = Endpoint { address, ready: up.ready, admin: short(&up.admin), isolation: short(&up.isolation) };
        let artifact = artifact(&up.artifact)?;
        let instance = self.of_host(host, &id)?;
        (instance.leaves_at_ms, instance.artifact, instance.waits) = (None, artifact, None);
        if !is_admitted(deployments, &id, artifact) {
            return Ok(instance.wait(&id, NOT_ADMITTED));
        }
        let before = instance.endpoint.replace(endpoint.clone());
        let same = before.is_some_and(|before| (before.address, before.ready) == (address, up.ready));
        let silent = same || self.hidden.contains(&id.service());
        let up = if silent { Vec::new() } else { vec![endpoint.message(&id)] };
        Ok(Moved { up, down: Vec::new() })
    }

    /// An instance does not run, because its agent found that nothing admits it.
    pub fn waits(&mut self, host: &ServiceName, waits: &mesh::InstanceWaits) -> Result<Moved, Refused> {
        let id = InstanceId::parse(&waits.instance)?;
        let artifact = artifact(&waits.artifact)?;
        let instance = self.of_host(host, &id)?;
        (instance.leaves_at_ms, instance.artifact) = (None, artifact);
        let moved = instance.wait(&id, &waits.reason);
        self.end(host, &id);
        Ok(moved)
    }

    /// Takes out of discovery what is no deployment any more; its agent is about to end it.
    pub fn admit_only(&mut self, deployments: &Deployments) -> Moved {
        let mut moved = Moved::default();
        for (id, instance) in &mut self.instances {
            if instance.endpoint.is_some() && !is_admitted(deployments, id, instance.artifact) {
                moved.down.extend(instance.wait(id, NOT_ADMITTED).down);
            }
        }
        moved
    }

    /// Shows instances of services that are part of the mesh, and of no others.
    ///
    /// INVARIANT (barred-is-not-found): no agent is told where an instance of a quarantined or suspended service is.
    pub fn show_only_active(&mut self, state: &MeshState) -> Moved {
        let hidden: BTreeSet<ServiceName> = state.barred.keys().cloned().collect();
        let before = std::mem::replace(&mut self.hidden, hidden);
        let mut moved = Moved::default();
        for (id, instance) in &self.instances {
            let Some(endpoint) = &instance.endpoint else { continue };
            match (before.contains(&id.service()), self.hidden.contains(&id.service())) {
                (false, true) => moved.down.push(id.clone()),
                (true, false) => moved.up.push(endpoint.message(id)),
                _ => {}
            }
        }
        moved
    }

    /// An instance takes no more calls, or ended.
    pub fn down(&mut self, host: &ServiceName, down: &mesh::InstanceDown) -> Result<Moved, Refused> {
        let id = InstanceId::parse(&down.instance)?;
        if self.instances.get(&id).is_some_and(|instance| instance.host != *host) {
            return Err(Refused::OtherHost(id));
        }
        let gone = self.instances.remove(&id).is_some_and(|instance| instance.endpoint.is_some());
        if down.ended {
            self.end(host, &id);
        }
        Ok(Moved { up: Vec::new(), down: if gone { vec![id] } else { Vec::new() } })
    }

    /// Proxies of a host enforce, or failed to take up, a revision. Names those of which something else was known.
    pub fn acknowledge(
        &mut self,
        host: &ServiceName,
        given: &mesh::Acknowledgement,
    ) -> Result<Vec<InstanceId>, Refused> {
        let mut moved = Vec::new();
        for acknowledged in &given.instances {
            let id = InstanceId::parse(&acknowledged.instance)?;
            let instance = self.of_host(host, &id)?;
            let revision = instance.revision.max(Revision(acknowledged.revision));
            let error = (!acknowledged.error.is_empty()).then(|| short(&acknowledged.error));
            let signals = SignalSeq(acknowledged.signal_sequence);
            if (instance.revision, &instance.error, instance.signals) != (revision, &error, signals) {
                (instance.revision, instance.error, instance.signals) = (revision, error, signals);
                moved.push(id);
            }
        }
        Ok(moved)
    }

    /// What proxies enforce whose agents follow another control plane, as it wrote that down. Which instances these are is not
    /// learnt here.
    pub fn acknowledged_elsewhere(&mut self, written: Vec<StoredAcknowledgement>) {
        for StoredAcknowledgement { instance, revision, error, signals } in written {
            let known = self.instances.get_mut(&instance);
            if let Some(known) = known.filter(|known| known.is_elsewhere && known.endpoint.is_some()) {
                (known.revision, known.error, known.signals) = (revision, error, signals);
            }
        }
    }

    /// What was issued to an instance is to be revoked.
    fn end(&mut self, host: &ServiceName, id: &InstanceId) {
        if self.ended.len() < INSTANCES_PER_HOST_MAX {
            self.ended.insert((host.clone(), id.clone()));
        }
    }

    /// The instances that ended since the last call, and the hosts they ran on.
    pub fn take_ended(&mut self) -> BTreeSet<(ServiceName, InstanceId)> {
        std::mem::take(&mut self.ended)
    }

    /// They are still to be revoked.
    pub fn keep_ended(&mut self, ended: BTreeSet<(ServiceName, InstanceId)>) {
        ended.iter().for_each(|(host, id)| self.end(host, id));
    }

    /// Takes out what its agent did not speak of in time. One whose agent is here and speaks of it no more has ended; what runs on a
    /// host that is away may go on.
    pub fn sweep(&mut self, now_ms: u64) -> Moved {
        let mut down = Vec::new();
        let connected = |host: &ServiceName| self.hosts.get(host).is_some_and(|host| host.connected);
        let is_over =
            |i: &Instance| i.endpoint.is_some() && i.leaves_at_ms.is_some_and(|at| now_ms >= at) && connected(&i.host);
        let over = self.instances.iter().filter(|(_, instance)| is_over(instance));
        let over: Vec<_> = over.map(|(id, instance)| (instance.host.clone(), id.clone())).collect();
        over.iter().for_each(|(host, id)| self.end(host, id));
        self.instances.retain(|id, instance| {
            let stays = instance.leaves_at_ms.is_none_or(|at| now_ms < at);
            if !stays && instance.endpoint.is_some() {
                down.push(id.clone());
            }
            stays
        });
        Moved { up: Vec::new(), down }
    }

    /// What other control planes of this store say: which are there, and all instances with whose they are. What an agent that is
    /// connected here says counts more. The instances of a control plane that is gone stay a while: their agents move.
    pub fn elsewhere(&mut self, alive: &BTreeSet<String>, stored: &[StoredInstance], now_ms: u64) -> Moved {
        let mut moved = Moved::default();
        let mut told = HashSet::new();
        for other in stored {
            let here = self.hosts.get(&other.host).is_some_and(|host| host.connected);
            if here || !alive.contains(&other.replica) {
                continue;
            }
            let known =
                self.instances.entry(other.instance.clone()).or_insert_with(|| Instance::of(other.host.clone()));
            known.host = other.host.clone();
            (known.is_elsewhere, known.leaves_at_ms) = (true, None);
            (known.artifact, known.waits) = (other.artifact, None);
            told.insert(other.instance.clone());
            let Ok(address) = other.address.parse() else {
                moved.down.extend(known.wait(&other.instance, other.error.as_deref().unwrap_or(NOT_ADMITTED)).down);
                continue;
            };
            let endpoint = Endpoint {
                address,
                ready: other.ready,
                admin: other.admin.clone(),
                isolation: other.isolation.clone(),
            };
            (known.revision, known.error, known.signals) = (other.revision, other.error.clone(), other.signals);
            let before = known.endpoint.replace(endpoint.clone());
            let is_news = before.is_none_or(|before| (before.address, before.ready) != (address, other.ready));
            if is_news && !self.hidden.contains(&other.instance.service()) {
                moved.up.push(endpoint.message(&other.instance));
            }
        }
        let named: HashSet<&InstanceId> = stored.iter().map(|other| &other.instance).collect();
        for (id, instance) in self.instances.iter_mut().filter(|(_, instance)| instance.is_elsewhere) {
            if !told.contains(id) && instance.leaves_at_ms.is_none() {
                // Still written down, by one that is gone: its agent may be on its way.
                let grace = if named.contains(id) { RESTART_GRACE_MS } else { GRACE_MS };
                instance.leaves_at_ms = Some(now_ms + grace);
            }
        }
        moved
    }

    /// Hosts and what they may run, as they are written down now.
    pub fn refresh(&mut self, hosts: Vec<StoredHost>, entitlements: Vec<(ServiceName, BTreeSet<ServiceName>)>) {
        for stored in hosts {
            match self.hosts.get_mut(&stored.host) {
                Some(known) if known.connected => {}
                Some(known) => known.stored = stored,
                None => {
                    drop(self.hosts.insert(stored.host.clone(), Host { stored, connected: false, roots: Vec::new() }))
                }
            }
        }
        let entitlements: BTreeMap<_, _> = entitlements.into_iter().collect();
        let ended: Vec<_> =
            self.entitlements.keys().filter(|host| !entitlements.contains_key(*host)).cloned().collect();
        ended.iter().for_each(|host| self.entitle(host, None));
        for (host, services) in entitlements {
            if self.entitlements.get(&host) != Some(&services) {
                self.entitle(&host, Some(services));
            }
        }
    }

    /// Everything that can be reached.
    pub fn reachable(&self) -> Vec<mesh::Endpoint> {
        let shown = self.instances.iter().filter(|(id, _)| !self.hidden.contains(&id.service()));
        shown.filter_map(|(id, instance)| Some(instance.endpoint.as_ref()?.message(id))).collect()
    }

    /// Whether the agent of `host` announced `instance` here.
    pub fn runs(&self, host: &ServiceName, instance: &InstanceId) -> bool {
        let known = self.instances.get(instance);
        known.is_some_and(|known| known.host == *host && known.endpoint.is_some() && !known.is_elsewhere)
    }

    /// Every instance whose proxy can be reached.
    pub fn reached(&self) -> impl Iterator<Item = Reached> + '_ {
        let connected = |instance: &Instance| self.hosts.get(&instance.host).is_some_and(|host| host.connected);
        self.instances.iter().filter(|(_, instance)| instance.endpoint.is_some()).map(move |(id, instance)| Reached {
            instance: id.clone(),
            connected: (!instance.is_elsewhere && connected(instance)).then(|| instance.host.clone()),
        })
    }

    /// What each proxy of a connected host enforces.
    pub fn proxies(&self) -> impl Iterator<Item = ProxyRevision> + '_ {
        let connected = |instance: &&Instance| self.hosts.get(&instance.host).is_some_and(|host| host.connected);
        self.instances.iter().filter(move |(_, i)| i.endpoint.is_some() && (follows_another(i) || connected(i))).map(
            |(id, instance)| ProxyRevision {
                instance: id.clone(),
                revision: instance.revision,
                signals: instance.signals,
                error: instance.error.clone(),
            },
        )
    }

    /// Whether each of these proxies enforces `revision` or a later one.
    pub fn all_enforce(&self, revision: Revision) -> bool {
        let connected = |instance: &Instance| self.hosts.get(&instance.host).is_some_and(|host| host.connected);
        let is_waited_for = |i: &Instance| i.endpoint.is_some() && (follows_another(i) || connected(i));
        self.instances.values().all(|i| i.revision >= revision || !is_waited_for(i))
    }

    /// Proxies that do not enforce the signals up to `sequence`, of the connected ones, and how many are connected.
    pub fn unaware_of(&self, sequence: SignalSeq) -> (Vec<InstanceId>, usize) {
        let (mut unaware, mut connected) = (Vec::new(), 0);
        for proxy in self.proxies() {
            connected += 1;
            if proxy.signals < sequence {
                unaware.push(proxy.instance);
            }
        }
        (unaware, connected)
    }

    /// Where instances of any of `services` run.
    pub fn hosts_of(&self, services: &BTreeSet<ServiceName>) -> HashSet<ServiceName> {
        if services.is_empty() {
            return HashSet::new();
        }
        let runs = |id: &InstanceId| services.contains(&id.service());
        self.instances.iter().filter(|(id, _)| runs(id)).map(|(_, instance)| instance.host.clone()).collect()
    }

    /// Every host, for people.
    pub fn hosts(&self) -> Vec<HostView> {
        let view = |host: &Host| HostView {
            host: host.stored.host.clone(),
            connected: host.connected,
            version: host.stored.version.clone(),
            isolation: host.stored.isolation.clone(),
            isolation_note: host.stored.isolation_note.clone(),
            heard_at_ms: host.stored.heard_at_ms,
            services: self.entitlements.get(&host.stored.host).cloned(),
            refused: self.refused.get(&host.stored.host).cloned(),
        };
        let unheard = |(host, why): (&ServiceName, &String)| HostView {
            host: host.clone(),
            connected: false,
            version: String::new(),
            isolation: String::new(),
            isolation_note: String::new(),
            heard_at_ms: 0,
            services: self.entitlements.get(host).cloned(),
            refused: Some(why.clone()),
        };
        // A ledger that was rolled back may have forgotten the very host that remembers.
        let unknown = self.refused.iter().filter(|(host, _)| !self.hosts.contains_key(*host));
        self.hosts.values().map(view).chain(unknown.map(unheard)).collect()
    }

    /// The instances of `service`, for people.
    pub fn instances_of(&self, service: &ServiceName) -> Vec<InstanceView> {
        let of_service = self.instances.iter().filter(|(id, _)| id.service() == *service);
        of_service
            .filter_map(|(id, instance)| {
                let endpoint = instance.endpoint.as_ref()?;
                Some(InstanceView {
                    instance: id.clone(),
                    host: instance.host.clone(),
                    address: endpoint.address.to_string(),
                    ready: endpoint.ready,
                    revision: instance.revision,
                    error: instance.error.clone(),
                    svid_expires_at_ms: instance.svid_expires_at_ms,
                    isolation: endpoint.isolation.clone(),
                    admin: endpoint.admin.clone(),
                    artifact: instance.artifact,
                    telemetry: TelemetryView::default(),
                })
            })
            .collect()
    }

    /// The instances of `service` that are not let run, for people.
    pub fn waiting_of(&self, service: &ServiceName) -> Vec<WaitingView> {
        let of_service = self.instances.iter().filter(|(id, _)| id.service() == *service);
        let waiting = |(id, instance): (&InstanceId, &Instance)| {
            Some(WaitingView {
                instance: id.clone(),
                host: instance.host.clone(),
                artifact: instance.artifact,
                reason: instance.waits.clone()?,
            })
        };
        of_service.filter_map(waiting).collect()
    }

    /// The instances as they are written down.
    pub fn stored_instances(&self) -> Vec<StoredInstance> {
        let stored = |(id, instance): (&InstanceId, &Instance)| {
            let endpoint = instance.endpoint.as_ref();
            let error = match (&endpoint, &instance.waits) {
                (None, None) => return None,
                (None, Some(why)) => Some(why.clone()),
                (Some(_), _) => instance.error.clone(),
            };
            Some(StoredInstance {
                instance: id.clone(),
                host: instance.host.clone(),
                address: endpoint.map(|endpoint| endpoint.address.to_string()).unwrap_or_default(),
                ready: endpoint.is_some_and(|endpoint| endpoint.ready),
                admin: endpoint.map(|endpoint| endpoint.admin.clone()).unwrap_or_default(),
                isolation: endpoint.map(|endpoint| endpoint.isolation.clone()).unwrap_or_default(),
                replica: String::new(),
                revision: instance.revision,
                error,
                artifact: instance.artifact,
                signals: instance.signals,
            })
        };
        self.instances.iter().filter(|(_, instance)| !instance.is_elsewhere).filter_map(stored).collect()
    }

    /// What the proxies of these enforce, as it is written down; nothing of those that cannot be reached, or not by us.
    pub fn stored_acknowledgements(&self, of: impl IntoIterator<Item = InstanceId>) -> Vec<StoredAcknowledgement> {
        let stored = |id: InstanceId| {
            let known = self.instances.get(&id).filter(|known| !known.is_elsewhere && known.endpoint.is_some())?;
            let (revision, error, signals) = (known.revision, known.error.clone(), known.signals);
            Some(StoredAcknowledgement { instance: id, revision, error, signals })
        };
        of.into_iter().filter_map(stored).collect()
    }

    fn expect_again(&mut self, host: &ServiceName, now_ms: u64) {
        for instance in self.instances.values_mut().filter(|instance| instance.host == *host) {
            instance.is_elsewhere = false;
            instance.leaves_at_ms = Some(now_ms + GRACE_MS);
        }
    }

    fn of_host(&mut self, host: &ServiceName, id: &InstanceId) -> Result<&mut Instance, Refused> {
        let service = id.service();
        if self.evicted.contains(host) {
            return Err(Refused::Evicted(host.clone()));
        }
        if let Some(services) = self.entitlements.get(host).filter(|services| !services.contains(&service)) {
            return Err(Refused::NotEntitled { host: host.clone(), service, services: services.clone() });
        }
        match self.instances.get(id) {
            Some(instance) if instance.host != *host => return Err(Refused::OtherHost(id.clone())),
            Some(_) => {}
            None if self.instances.values().filter(|i| i.host == *host).count() >= INSTANCES_PER_HOST_MAX => {
                return Err(Refused::TooMany);
            }
            None => {}
        }
        let instance = self.instances.entry(id.clone()).or_insert_with(|| Instance::of(host.clone()));
        // Its agent speaks to us now.
        instance.is_elsewhere = false;
        Ok(instance)
    }
}

/// Its agent is connected to another control plane that runs.
fn follows_another(instance: &Instance) -> bool {
    instance.is_elsewhere && instance.leaves_at_ms.is_none()
}

impl Instance {
    fn of(host: ServiceName) -> Self {
        Self {
            host,
            endpoint: None,
            artifact: None,
            waits: None,
            revision: Revision(0),
            error: None,
            signals: SignalSeq(0),
            svid_expires_at_ms: 0,
            leaves_at_ms: None,
            is_elsewhere: false,
        }
    }

    /// Out of discovery, if it was in it.
    fn wait(&mut self, id: &InstanceId, why: &str) -> Moved {
        self.waits = Some(short(why));
        let down = self.endpoint.take().map(|_| id.clone()).into_iter().collect();
        Moved { up: Vec::new(), down }
    }
}

/// INVARIANT (only-admitted-is-served): an instance of a service with deployments gets an SVID, and a place in discovery,
/// only for an artifact that is one of them.
pub fn is_admitted(deployments: &Deployments, id: &InstanceId, artifact: Option<Digest>) -> bool {
    deployments.get(&id.service()).is_none_or(|admitted| artifact.is_some_and(|artifact| admitted.contains(&artifact)))
}

/// What an agent says it measured; nothing where it could not.
pub fn artifact(said: &[u8]) -> Result<Option<Digest>, Refused> {
    match said.len() {
        0 => Ok(None),
        length => said.try_into().map(|bytes| Some(Digest(bytes))).map_err(|_| Refused::Artifact(length)),
    }
}

impl Endpoint {
    fn message(&self, id: &InstanceId) -> mesh::Endpoint {
        mesh::Endpoint { instance: id.to_string(), address: self.address.to_string(), ready: self.ready }
    }
}

fn list(services: &BTreeSet<ServiceName>) -> String {
    services.iter().map(|service| format!("`{service}`")).collect::<Vec<_>>().join(", ")
}

/// What an agent says, as it is kept: bounded, and without what a database refuses, which would keep out the others with it.
fn short(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].replace('\0', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn up(instance: &str, address: &str, ready: bool) -> mesh::InstanceUp {
        mesh::InstanceUp { instance: instance.into(), address: address.into(), ready, ..Default::default() }
    }

    /// No service has deployments.
    fn any() -> Deployments {
        Deployments::new()
    }

    fn with_host() -> Registry {
        let mut registry = Registry::default();
        registry.connect(&mesh::FollowHello::default(), &name("h1"), 0);
        registry
    }

    fn acknowledgement(instance: &str, revision: u64, error: &str) -> mesh::Acknowledgement {
        let instance =
            mesh::InstanceRevision { instance: instance.into(), revision, error: error.into(), signal_sequence: 0 };
        mesh::Acknowledgement { instances: vec![instance] }
    }

    #[test]
    fn agents_are_told_only_of_what_differs() {
        let mut registry = with_host();
        for (given, told) in [
            (up("web/1", "127.0.0.1:1", false), 1),
            (up("web/1", "127.0.0.1:1", false), 0),
            (up("web/1", "127.0.0.1:1", true), 1),
            (up("web/1", "127.0.0.1:2", true), 1),
            (up("web/1", "127.0.0.1:2", true), 0),
        ] {
            assert_eq!(registry.up(&name("h1"), &given, &any()).unwrap().up.len(), told, "{given:?}");
        }
        let mut gone = mesh::InstanceDown { instance: "web/1".into(), ..Default::default() };
        assert_eq!(registry.down(&name("h1"), &gone).unwrap().down.len(), 1);
        assert_eq!(registry.down(&name("h1"), &gone).unwrap().down.len(), 0);
        assert!(registry.take_ended().is_empty(), "it drains");
        gone.ended = true;
        registry.down(&name("h1"), &gone).unwrap();
        assert_eq!(registry.take_ended(), [(name("h1"), InstanceId::parse("web/1").unwrap())].into());
    }

    #[test]
    fn what_is_no_instance_no_address_or_runs_elsewhere_is_refused() {
        let mut registry = with_host();
        registry.connect(&mesh::FollowHello::default(), &name("h2"), 0);
        registry.up(&name("h2"), &up("web/2", "127.0.0.1:1", true), &any()).unwrap();
        let h1 = name("h1");
        for (given, expected) in [
            (up("web", "127.0.0.1:1", true), "`web` is not a instance id"),
            (up("web/1", "localhost:1", true), "`localhost:1` is not an address"),
            (up("web/1", "", true), "`` is not an address"),
            (up("web/2", "127.0.0.1:1", true), "instance `web/2` runs on another host"),
        ] {
            let refused = registry.up(&h1, &given, &any()).unwrap_err().to_string();
            assert!(refused.starts_with(expected), "{refused}");
        }
        let gone = mesh::InstanceDown { instance: "web/2".into(), ..Default::default() };
        assert!(registry.down(&h1, &gone).is_err());
        assert!(registry.acknowledge(&h1, &acknowledgement("web/2", 1, "")).is_err());
        assert_eq!(registry.reachable().len(), 1);
    }

    #[test]
    fn a_host_that_comes_back_in_time_keeps_what_it_speaks_of_again_and_no_more() {
        let mut registry = with_host();
        let h1 = name("h1");
        for instance in ["web/1", "web/2"] {
            registry.up(&h1, &up(instance, "127.0.0.1:1", true), &any()).unwrap();
        }
        registry.disconnect(&h1, 1_000);
        assert_eq!(registry.sweep(1_000 + GRACE_MS - 1), Moved::default(), "a reconnect must not cut traffic");
        assert_eq!(registry.proxies().count(), 0, "nobody waits for a host that is away");
        registry.connect(&mesh::FollowHello::default(), &h1, 2_000);
        assert_eq!(registry.up(&h1, &up("web/1", "127.0.0.1:1", true), &any()).unwrap(), Moved::default());
        let swept = registry.sweep(2_000 + GRACE_MS);
        assert_eq!(swept.down, [InstanceId::parse("web/2").unwrap()]);
        assert_eq!(registry.take_ended().len(), 1, "its agent is here and does not speak of it");
        registry.disconnect(&h1, 20_000);
        assert_eq!(registry.sweep(20_000 + GRACE_MS).down.len(), 1);
        assert!(registry.take_ended().is_empty(), "nobody knows whether it runs");
        assert!(registry.reachable().is_empty());
        assert_eq!(registry.hosts().len(), 1, "the host stays known");
    }

    #[test]
    fn a_restarted_control_plane_goes_on_from_what_was_written_down() {
        let mut registry = with_host();
        registry.up(&name("h1"), &up("web/1", "127.0.0.1:1", true), &any()).unwrap();
        let mut restored = Registry::restore(Vec::new(), registry.stored_instances(), 0);
        assert_eq!(restored.reachable(), registry.reachable());
        assert_eq!(restored.sweep(RESTART_GRACE_MS - 1), Moved::default());
        assert_eq!(restored.sweep(RESTART_GRACE_MS).down.len(), 1);
    }

    #[test]
    fn an_acknowledgement_never_goes_back_and_may_come_before_the_instance_listens() {
        let mut registry = with_host();
        let h1 = name("h1");
        registry.acknowledge(&h1, &acknowledgement("web/1", 4, "")).unwrap();
        assert_eq!(registry.proxies().count(), 0, "it cannot be reached yet");
        registry.up(&h1, &up("web/1", "127.0.0.1:1", true), &any()).unwrap();
        registry.acknowledge(&h1, &acknowledgement("web/1", 3, "a text is missing")).unwrap();
        let proxy = registry.proxies().next().unwrap();
        assert_eq!((proxy.revision, proxy.error.as_deref()), (Revision(4), Some("a text is missing")));
        registry.acknowledge(&h1, &acknowledgement("web/1", 5, "")).unwrap();
        assert_eq!(registry.proxies().next().unwrap().error, None);
    }

    /// PROVES (entitled-services)
    #[test]
    fn a_host_is_held_to_the_services_it_was_invited_for() {
        let mut registry = with_host();
        let (h1, catalog) = (name("h1"), InstanceId::parse("catalog/1").unwrap());
        for instance in ["web/1", "catalog/1"] {
            registry.up(&h1, &up(instance, "127.0.0.1:1", true), &any()).unwrap();
        }
        registry.entitle(&h1, Some([name("web"), name("job")].into()));
        assert_eq!(registry.sweep(1).down, std::slice::from_ref(&catalog), "what it may run no more leaves discovery");
        let refused = "host `h1` was invited to run `job`, `web`, not `catalog`; a new invitation for it can name that";
        assert_eq!(registry.issuing(&h1, &catalog).unwrap_err().to_string(), refused);
        assert_eq!(registry.up(&h1, &up("catalog/1", "127.0.0.1:1", true), &any()).unwrap_err().to_string(), refused);
        assert!(registry.acknowledge(&h1, &acknowledgement("catalog/1", 1, "")).is_err());
        assert!(registry.issuing(&h1, &InstanceId::parse("web/2").unwrap()).is_ok());
        assert!(registry.issuing(&name("h2"), &catalog).is_ok(), "and nobody else is");
        assert_eq!(registry.hosts()[0].services, Some([name("web"), name("job")].into()));
        registry.entitle(&h1, None);
        assert!(registry.issuing(&h1, &InstanceId::parse("catalog/2").unwrap()).is_ok());
    }

    #[test]
    fn a_host_that_holds_another_history_is_shown_until_it_follows_again() {
        let mut registry = with_host();
        registry.refuse(&name("h1"), "it holds revision 9");
        registry.refuse(&name("forgotten"), "it holds revision 8");
        let shown = |registry: &Registry| -> Vec<(String, Option<String>)> {
            registry.hosts().into_iter().map(|host| (host.host.to_string(), host.refused)).collect()
        };
        let expected = [("h1", "it holds revision 9"), ("forgotten", "it holds revision 8")];
        assert_eq!(shown(&registry), expected.map(|(host, why)| (host.to_owned(), Some(why.to_owned()))));
        registry.connect(&mesh::FollowHello::default(), &name("h1"), 0);
        assert_eq!(shown(&registry)[0], ("h1".to_owned(), None));
        for n in 0..2 * REFUSED_MAX {
            registry.refuse(&name(&format!("h-{n}")), "no");
        }
        assert!(registry.refused.len() <= REFUSED_MAX);
    }

    #[test]
    fn what_an_agent_can_have_kept_is_bounded() {
        let mut registry = with_host();
        let h1 = name("h1");
        for n in 0..INSTANCES_PER_HOST_MAX {
            let id = InstanceId::new(&name("web"), &n.to_string());
            registry.instances.insert(id, Instance::of(h1.clone()));
        }
        assert_eq!(registry.up(&h1, &up("web/x", "127.0.0.1:1", true), &any()), Err(Refused::TooMany));
        assert_eq!(short(&"é".repeat(1_000)).len(), TEXT_BYTES_MAX);
        assert_eq!(short("a\0b"), "ab");
    }
}
