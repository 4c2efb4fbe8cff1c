//! A whole mesh in one process: the control plane's gate, registry and publisher, and on each host what an agent and its
//! proxies hold. Its clock moves only when it is told to, and a seed decides what happens next: no thread, no socket, no
//! waiting. The network between control and hosts loses, doubles, reorders, alters and withholds; disks keep what was
//! written; processes end without warning.
//!
//! Beside it stands what really happened ([`Truth`]), and every step is held against it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use countersign_api::{
    local::Apply,
    mesh::{self, follow_event::Event, follow_request::Message as Said},
};
use countersign_control::{
    gate::{Gate, Refused},
    ledger::Head,
    publish::{Joined, Publisher},
    registry::{GRACE_MS, Registry},
    store::StoredHost,
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Member, Revision},
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    ledger::{Batch, Draft, Follower, Snapshot},
    policy::{Action, Context, Law, Library, Query},
    record::Outcome,
    risk::Condition,
    service::{Protocol, ServiceSpec},
    state::MeshState,
    view::{Local, View, view},
};
use prost::Message;
use tokio::sync::mpsc::{self, error::TryRecvError};

/// How long a host waits for a word of control until it gives the stream up.
const SILENCE_MAX_MS: u64 = 5_000;
/// How long control may take to see that a stream is dead.
const KEEPALIVE_MAX_MS: u64 = 10_000;
/// Longest step of the clock; control's heart beats and agents speak to proxies at each.
const TICK_MAX_MS: u64 = 1_000;
/// The services that run on each host.
const HOSTS: [&[&str]; 3] = [&["catalog", "web"], &["catalog"], &["cron"]];
/// Who asks `catalog`, permitted or not.
pub const CALLERS: [&str; 3] = ["web", "cron", "stranger"];
const READERS: [&str; 2] = [
    r#"@id("readers") permit (principal in Role::"reader", action == Action::"http:GET", resource in Service::"catalog");"#,
    r#"@id("readers") permit (principal in Role::"reader", action in Action::"read", resource in Service::"catalog");"#,
];
const STOPPED: &str = r#"@id("stopped") forbid (principal in Role::"stopped", action, resource);"#;

/// Everything.
pub struct Mesh {
    pub now_ms: u64,
    pub control: Control,
    pub hosts: Vec<Host>,
    pub truth: Truth,
    /// How often something happened, so that a test can tell that it did.
    pub happened: BTreeMap<&'static str, u64>,
    chance: fastrand::Rng,
    spare: Spare,
}

/// What costs much to make and has no say in what happens; one mesh leaves it to the next.
pub struct Spare {
    gate: Gate,
    runtime: tokio::runtime::Runtime,
    /// Of policies that were parsed before, by the digests of their texts.
    libraries: Vec<Library>,
}

/// The control plane. What it keeps on disk survives [`Mesh::restart_control`]; its streams do not.
pub struct Control {
    publisher: Publisher,
    head: Arc<Head>,
    stored: Vec<mesh::Entries>,
    stored_hosts: BTreeMap<ServiceName, StoredHost>,
    /// Streams whose end it has yet to see, and when it will.
    leaving: Vec<(ServiceName, u64, u64)>,
    run: u64,
}

/// An agent with its proxies.
pub struct Host {
    pub name: ServiceName,
    pub follower: Follower,
    pub proxies: Vec<Proxy>,
    pub is_cut_off: bool,
    library: Library,
    in_step_at_ms: Option<u64>,
    kept: Option<(Snapshot, Option<u64>)>,
    stream: Option<Stream>,
    discovery_sequence: u64,
    services: &'static [&'static str],
    proxies_started: u64,
    /// When anything of control last came through: kept by the test, not by the host.
    reached_at_ms: u64,
}

/// What is under way between a host and control.
struct Stream {
    number: u64,
    /// The run of control that it is of.
    run: u64,
    events: mpsc::Receiver<Bytes>,
    to_host: VecDeque<Bytes>,
    to_control: VecDeque<Said>,
    is_welcome: bool,
    heard_at_ms: u64,
    /// When the host asked control what it holds, and the answer.
    asked: (u64, mesh::Head),
}

/// A proxy with what its agent told it and it has not read yet.
pub struct Proxy {
    pub instance: InstanceId,
    pub revision: Revision,
    law: Option<(Arc<View>, Law)>,
    library: Library,
    fresh_at_ms: Option<u64>,
    began_at_ms: u64,
    orders: VecDeque<Order>,
    /// The view it was offered last, and the newest revision at which that holds.
    offered: Option<(Revision, Arc<View>)>,
    applied: VecDeque<Revision>,
    /// The revision it said it enforces, as far as its agent heard.
    known: Option<Revision>,
}

enum Order {
    View(Arc<View>),
    Revision(Revision),
}

/// The ledger at each revision, and who may do what by the plain words of its policies.
#[derive(Default)]
pub struct Truth {
    past: Vec<Follower>,
    library: Library,
}

/// Why a host lets go of its stream.
#[derive(Debug)]
struct Ended;

impl Mesh {
    /// Nothing but a control plane with an empty ledger and cold hosts.
    pub fn new(seed: u64, mut spare: Spare) -> Self {
        let control = Control {
            publisher: Publisher::new(Registry::default()),
            head: Arc::default(),
            stored: Vec::new(),
            stored_hosts: BTreeMap::new(),
            leaving: Vec::new(),
            run: 0,
        };
        let now_ms = 1_700_000_000_000;
        let hosts = HOSTS.iter().enumerate().map(|(n, services)| Host::new(n, services, now_ms, &mut spare)).collect();
        let chance = fastrand::Rng::with_seed(seed);
        let truth = Truth { past: vec![Follower::default()], library: spare.library() };
        let mut mesh = Self { now_ms, control, hosts, truth, happened: BTreeMap::new(), chance, spare };
        mesh.apply();
        mesh
    }

    /// What the next mesh can use.
    pub fn into_spare(self) -> Spare {
        let mut spare = self.spare;
        for host in self.hosts {
            spare.libraries.extend(host.proxies.into_iter().map(|proxy| proxy.library));
            spare.libraries.push(host.library);
        }
        spare.libraries.push(self.truth.library);
        spare
    }

    /// Whatever the seed says comes next.
    pub fn step(&mut self) {
        let at = self.chance.usize(..self.hosts.len());
        match self.chance.u8(..100) {
            0..=4 => self.apply(),
            5 => self.conflict(),
            6..=20 => self.connect(at),
            21..=47 => self.deliver(at),
            48..=62 => self.hear(at),
            63..=82 => self.serve(at),
            83..=89 => {
                let by_ms = self.chance.u64(1..=TICK_MAX_MS);
                self.pass(by_ms);
            }
            90 => self.hosts[at].is_cut_off = true,
            91 => self.hosts[at].is_cut_off = false,
            92 => self.lose(at),
            93..=94 => self.keep(at),
            95 => self.restart_host(at),
            96 => self.restart_proxy(at),
            97 => self.restart_control(),
            98 => self.fork(at),
            _ => self.long_silence(at),
        }
    }

    /// The network is whole again and everyone has had time to say and hear everything.
    pub fn heal(&mut self) {
        for at in 0..self.hosts.len() {
            self.hosts[at].is_cut_off = false;
            self.lose(at);
            self.connect(at);
        }
        for _ in 0..=KEEPALIVE_MAX_MS.max(GRACE_MS) / TICK_MAX_MS {
            self.settle();
            self.pass(TICK_MAX_MS);
        }
        self.settle();
    }

    /// Everything under way arrives, and nothing happens to it.
    pub fn settle(&mut self) {
        for at in 0..self.hosts.len() {
            while self.deliver_whole(at) {}
            while self.hosts[at].proxies.iter().any(Proxy::has_more) {
                self.serve(at);
            }
            while let Some(said) = self.hosts[at].stream.as_mut().and_then(|stream| stream.to_control.pop_front()) {
                self.hear_one(at, said);
            }
        }
    }

    /// An operator's change goes through; sometimes control dies between writing and publishing it.
    fn apply(&mut self) {
        let entries = self.append();
        if self.chance.u8(..20) == 0 {
            self.restart_control();
            return self.count("control died between writing and publishing");
        }
        self.control.publisher.entries(&self.control.head, entries);
    }

    /// An operator's change goes through.
    pub fn change(&mut self) {
        let entries = self.append();
        self.control.publisher.entries(&self.control.head, entries);
    }

    /// A change is judged and written down.
    fn append(&mut self) -> mesh::Entries {
        let head = self.control.head.clone();
        let asked = self.plan(&head);
        let admitted = self.spare.gate.admit(asked, &head, None).unwrap();
        let (change_set, bodies, actor, _) = admitted.into_parts();
        let draft = head.follower.draft(self.now_ms, &actor, &change_set, &bodies).unwrap();
        let entries = entries_of(&draft, &bodies);
        self.control.stored.push(entries.clone());
        let mut keyring = head.keyring.clone();
        keyring.take(&draft.bytes, &draft.change_set).unwrap();
        self.control.head = Arc::new(Head { follower: draft.next, keyring, newest_at_ms: draft.entry.at_ms });
        self.truth.append(self.control.head.follower.clone());
        entries
    }

    /// Two operators plan on one revision: the second is refused, at the gate and, if it passed there, at the ledger.
    fn conflict(&mut self) {
        let head = self.control.head.clone();
        let late = self.plan(&head);
        let passed = self.spare.gate.admit(late.clone(), &head, None).unwrap();
        self.apply();
        let head = self.control.head.clone();
        assert!(matches!(self.spare.gate.admit(late, &head, None), Err(Refused::Moved { .. })));
        let (change_set, bodies, actor, _) = passed.into_parts();
        assert!(head.follower.draft(self.now_ms, &actor, &change_set, &bodies).is_err());
    }

    /// Asks the real `wait` whether all connected proxies enforce `revision`, without waiting.
    pub fn wait_says_enforced(&self, revision: Revision) -> bool {
        let wait = self.control.publisher.enforced(revision, tokio::time::Instant::now());
        self.spare.runtime.block_on(wait).0.is_empty()
    }

    /// The proxies that control counts, with what it believes of each.
    pub fn believed(&self) -> BTreeMap<InstanceId, Revision> {
        self.control.publisher.proxies().into_iter().map(|proxy| (proxy.instance, proxy.revision)).collect()
    }

    /// The newest revision.
    pub fn head(&self) -> Revision {
        self.control.head.follower.revision()
    }

    /// Every running proxy.
    pub fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        self.hosts.iter().flat_map(|host| &host.proxies)
    }

    /// A host opens its stream, if it reaches control.
    fn connect(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if host.is_cut_off || host.stream.is_some() {
            return;
        }
        let (revision, root) = (host.follower.revision(), host.follower.root());
        assert_eq!(root, self.truth.at(revision).root(), "control refuses who holds another history");
        let hello = mesh::FollowHello {
            host: host.name.to_string(),
            revision: revision.0,
            root: Bytes::copy_from_slice(&root.0),
            ..mesh::FollowHello::default()
        };
        let joined = self.control.publisher.join(&hello, &host.name, None, self.now_ms);
        self.control.stored_hosts.insert(host.name.clone(), joined.host.clone());
        let welcome = self.control.welcome(revision, &joined);
        host.stream = Some(Stream {
            number: joined.number,
            run: self.control.run,
            events: joined.events,
            to_host: [encoded(Event::Welcome(welcome))].into(),
            to_control: VecDeque::new(),
            is_welcome: false,
            heard_at_ms: self.now_ms,
            asked: (self.now_ms, self.control.publisher.head()),
        });
    }

    /// The next event reaches its host; or it is lost, doubled, overtaken or altered on the way.
    fn deliver(&mut self, at: usize) {
        let (host, chance) = (&mut self.hosts[at], &mut self.chance);
        let Some(stream) = host.stream.as_mut().filter(|_| !host.is_cut_off) else { return };
        while let Ok(event) = stream.events.try_recv() {
            stream.to_host.push_back(event);
        }
        let queue = &mut stream.to_host;
        let what = match chance.u8(..40) {
            0 => queue.pop_front().map(|_| "event lost"),
            1 => queue.front().cloned().map(|first| {
                queue.push_front(first);
                "event doubled"
            }),
            2 if queue.len() > 1 => {
                queue.swap(0, 1);
                Some("event overtaken")
            }
            3 | 4 => queue.front_mut().map(|first| {
                alter(first, chance);
                "event altered"
            }),
            _ => None,
        };
        if let Some(what) = what {
            self.count(what);
        }
        self.deliver_whole(at);
    }

    /// The next event reaches its host as it is; false when none is under way.
    fn deliver_whole(&mut self, at: usize) -> bool {
        let host = &mut self.hosts[at];
        let Some(stream) = host.stream.as_mut().filter(|_| !host.is_cut_off) else { return false };
        let event = match stream.to_host.pop_front().map_or_else(|| stream.events.try_recv(), Ok) {
            Ok(event) => event,
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => {
                self.lose(at);
                return false;
            }
        };
        let before = host.follower.revision();
        host.reached_at_ms = self.now_ms;
        let taken = host.take_in(&event, self.now_ms);
        let after = host.follower.revision();
        assert!(before <= after, "a host went back from {before} to {after}");
        assert!(host.follower == *self.truth.at(after), "revision {after} is not the fold of the ledger");
        if taken.is_err() {
            self.lose(at);
            self.count("stream refused");
        }
        true
    }

    /// Something a host said reaches control, or is lost, doubled or overtaken.
    fn hear(&mut self, at: usize) {
        let (host, chance) = (&mut self.hosts[at], &mut self.chance);
        let Some(stream) = host.stream.as_mut().filter(|_| !host.is_cut_off) else { return };
        let queue = &mut stream.to_control;
        let lost = chance.u8(..20);
        if lost == 1 && queue.len() > 1 {
            queue.swap(0, 1);
        }
        let Some(said) = queue.pop_front() else { return };
        if lost == 2 {
            queue.push_back(said.clone());
        }
        if lost != 0 {
            self.hear_one(at, said);
        }
    }

    fn hear_one(&mut self, at: usize, said: Said) {
        self.control.publisher.hear(&self.hosts[at].name, said, self.now_ms).unwrap();
        self.hold_control();
    }

    /// A proxy reads what its agent told it, and the agent what the proxy says.
    fn serve(&mut self, at: usize) {
        let now_ms = self.now_ms;
        let Host { proxies, stream, .. } = &mut self.hosts[at];
        let waiting: Vec<usize> = (0..proxies.len()).filter(|n| proxies[*n].has_more()).collect();
        let Some(which) = self.chance.choice(waiting) else { return };
        let proxy = &mut proxies[which];
        if self.chance.bool() || proxy.applied.is_empty() {
            proxy.take_up();
            self.truth.hold(proxy, now_ms);
        } else if let Some(revision) = proxy.applied.pop_front() {
            proxy.known = Some(revision);
            if let Some(stream) = stream.as_mut().filter(|stream| stream.is_welcome) {
                stream.to_control.extend(proxy.says(revision));
            }
        }
        self.hold_control();
    }

    /// Time passes: control's heart beats, whoever hears nothing gives up, proxies learn how fresh their agent is.
    pub fn pass(&mut self, by_ms: u64) {
        self.now_ms += by_ms;
        let now_ms = self.now_ms;
        self.control.publisher.heartbeat();
        let leaving = std::mem::take(&mut self.control.leaving);
        let (due, later): (Vec<_>, Vec<_>) = leaving.into_iter().partition(|(_, _, at_ms)| *at_ms <= now_ms);
        self.control.leaving = later;
        for (host, number, _) in due {
            self.control.publisher.leave(&host, number, now_ms);
        }
        self.control.publisher.sweep(now_ms);
        for at in 0..self.hosts.len() {
            if self.hosts[at].stream.as_ref().is_some_and(|stream| now_ms - stream.heard_at_ms > SILENCE_MAX_MS) {
                self.lose(at);
            }
            let (host, run) = (&mut self.hosts[at], self.control.run);
            if let Some(stream) = host.stream.as_mut().filter(|stream| stream.run == run && !host.is_cut_off)
                && Some(stream.asked.0) <= host.in_step_at_ms
            {
                stream.asked = (now_ms, self.control.publisher.head());
                host.reached_at_ms = now_ms;
                host.compare();
            }
            for proxy in &mut host.proxies {
                proxy.fresh_at_ms = proxy.fresh_at_ms.max(host.in_step_at_ms);
            }
        }
        self.hold_answers();
    }

    /// A host hears nothing for longer than any proxy may serve without.
    fn long_silence(&mut self, at: usize) {
        self.hosts[at].is_cut_off = true;
        for _ in 0..10 {
            self.pass(TICK_MAX_MS);
        }
        for proxy in &self.hosts[at].proxies {
            assert!(CALLERS.iter().all(|caller| proxy.answer(caller, self.now_ms) == 503));
        }
        self.hosts[at].is_cut_off = false;
        self.count("silence longer than max_staleness");
    }

    /// A stream breaks. Its host knows at once, control later.
    fn lose(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if let Some(stream) = host.stream.take().filter(|stream| stream.run == self.control.run) {
            let sees_at_ms = self.now_ms + self.chance.u64(..KEEPALIVE_MAX_MS);
            self.control.leaving.push((host.name.clone(), stream.number, sees_at_ms));
        }
    }

    /// A host writes down what it holds.
    pub fn keep(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        host.kept = host.follower.snapshot().map(|snapshot| (snapshot, host.in_step_at_ms));
    }

    /// An agent dies, its proxies with it, and begins again with what it had written down.
    pub fn restart_host(&mut self, at: usize) {
        self.lose(at);
        let host = &mut self.hosts[at];
        (host.follower, host.in_step_at_ms) = match &host.kept {
            Some((snapshot, in_step)) => (Follower::from_snapshot(snapshot).unwrap(), *in_step),
            None => (Follower::default(), None),
        };
        host.discovery_sequence = 0;
        self.spare.libraries.extend(host.proxies.drain(..).map(|proxy| proxy.library));
        for service in host.services {
            host.start(service, self.now_ms, &mut self.spare);
        }
        host.offer();
        self.count("agent restarted");
    }

    /// A proxy dies; another instance takes its place.
    fn restart_proxy(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let gone = host.proxies.remove(self.chance.usize(..host.proxies.len()));
        let down = mesh::InstanceDown { instance: gone.instance.to_string(), reason: "died".into(), ended: true };
        if let Some(stream) = host.stream.as_mut().filter(|stream| stream.is_welcome && gone.known.is_some()) {
            stream.to_control.push_back(Said::Down(down));
        }
        self.spare.libraries.push(gone.library);
        host.start(gone.instance.service().as_str(), self.now_ms, &mut self.spare);
        host.offer();
        self.count("proxy restarted");
    }

    /// Control dies and begins again with what it had written down.
    fn restart_control(&mut self) {
        let control = &mut self.control;
        let instances = control.publisher.registry(|registry| registry.stored_instances());
        let hosts = control.stored_hosts.values().cloned().collect();
        control.publisher = Publisher::new(Registry::restore(hosts, instances, self.now_ms));
        control.publisher.begin(control.head.clone());
        control.leaving.clear();
        control.run += 1;
        self.count("control restarted");
    }

    /// Somebody who holds the ledger up to some point shows a host another history from there on.
    fn fork(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let held = host.follower.revision();
        let Some(last) = held.0.checked_sub(1) else { return };
        let from = Revision(self.chance.u64(last.saturating_sub(3)..=last));
        let mut other = self.truth.at(from).clone();
        let (mut forged, mut texts) = (mesh::Entries { first_index: from.0, ..Default::default() }, Bodies::default());
        while other.revision() < Revision(held.0 + self.chance.u64(..2)) {
            let base = other.revision();
            let changes = match base.0 {
                0 => vec![Change::CreateMesh { trust_domain: trust_domain() }],
                n => vec![declare(&format!("fork{n}"), 300)],
            };
            texts.extend(other.bodies());
            let draft = other.draft(self.now_ms + 1, "local", &ChangeSet { base, changes }, &texts).unwrap();
            forged.entries.push(draft.bytes.into());
            forged.change_sets.push(draft.change_set.into());
            other = draft.next;
        }
        forged.bodies = texts.iter().map(|(_, text)| text.to_string()).collect();
        (forged.size, forged.root) = (other.revision().0, Bytes::copy_from_slice(&other.root().0));
        let before = host.follower.clone();
        for root in [other.root(), before.root(), self.control.head.follower.root()] {
            forged.root = Bytes::copy_from_slice(&root.0);
            // Entries that it has already are not looked at again: then all is well, and nothing is taken up.
            let taken = host.extend(&forged);
            assert!(taken.is_err() || forged.size <= held.0, "a fork from {from} on was taken up at {held}");
            assert!(host.follower == before, "a fork from {from} on changed what is held at {held}");
        }
        self.count("fork shown");
    }

    /// What control believes of a proxy that runs is true, and `wait` says no more than that.
    fn hold_control(&self) {
        let (believed, head) = (self.believed(), self.head());
        let enforced = self.wait_says_enforced(head);
        for proxy in self.proxies() {
            if let Some(acknowledged) = believed.get(&proxy.instance) {
                let (instance, enforces) = (&proxy.instance, proxy.revision);
                assert!(*acknowledged <= enforces, "{instance} enforces {enforces}, control believes {acknowledged}");
                assert!(!enforced || enforces >= head, "`wait` says {head}, {instance} enforces {enforces}");
            }
        }
    }

    fn hold_answers(&self) {
        for host in &self.hosts {
            for proxy in &host.proxies {
                let Some(spec) = proxy.law.as_ref().and_then(|(view, _)| view.spec.as_ref()) else { continue };
                let silent_ms = self.now_ms - host.reached_at_ms;
                let stale = silent_ms >= u64::from(spec.max_staleness_seconds) * 1000;
                let answer = proxy.answer("web", self.now_ms);
                assert!(!stale || answer == 503, "{} answers {answer} after {silent_ms} ms", proxy.instance);
            }
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.happened.entry(what).or_default() += 1;
    }

    /// A change that is lawful at `head`.
    fn plan(&mut self, head: &Head) -> Apply {
        let state = head.follower.state();
        let chance = &mut self.chance;
        let (kind, text, max_staleness_seconds) = (chance.u8(..40), READERS[chance.usize(..2)], chance.u32(3..8));
        let mut bodies = Bodies::default();
        let mut policy = |id: &str, text: &str| {
            let body = bodies.insert(text);
            Change::SetPolicy { id: id.into(), file: "policies/catalog.cedar".into(), body }
        };
        let mut role = |name: &str| {
            let members = ["web", "cron"].into_iter().filter(|_| chance.bool());
            Change::SetRole { name: name.into(), members: members.map(|name| Member::Service(service(name))).collect() }
        };
        let more = service("more");
        let changes = match kind {
            _ if state.trust_domain.is_none() => vec![
                Change::CreateMesh { trust_domain: trust_domain() },
                declare("catalog", 5),
                declare("web", 5),
                declare("cron", 5),
                role("reader"),
                role("stopped"),
                policy("readers", READERS[0]),
                policy("stopped", STOPPED),
            ],
            0..=14 => vec![role("reader")],
            15..=29 => vec![role("stopped")],
            30 => vec![policy("readers", text)],
            31 if state.policies.contains_key("stopped") => vec![Change::RemovePolicy { id: "stopped".into() }],
            31 => vec![policy("stopped", STOPPED)],
            32..=35 if state.services.contains_key(&more) => vec![Change::RemoveService { name: more }],
            32..=35 => vec![declare("more", 5)],
            _ => vec![declare("catalog", max_staleness_seconds)],
        };
        Apply { change_set: ChangeSet { base: head.follower.revision(), changes }, bodies }
    }
}

impl Default for Spare {
    fn default() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Self { gate: Gate::default(), runtime, libraries: Vec::new() }
    }
}

impl Spare {
    fn library(&mut self) -> Library {
        self.libraries.pop().unwrap_or_default()
    }
}

impl Control {
    /// What brings a host that holds `held` up to where its queue begins.
    fn welcome(&self, held: Revision, joined: &Joined) -> mesh::Welcome {
        let follower = &self.head.follower;
        let mut entries = mesh::Entries {
            first_index: if held.0 == 0 { follower.revision().0 } else { held.0 },
            size: follower.revision().0,
            root: Bytes::copy_from_slice(&follower.root().0),
            ..mesh::Entries::default()
        };
        for stored in self.stored.iter().skip(entries.first_index as usize) {
            entries.entries.extend(stored.entries.iter().cloned());
            entries.change_sets.extend(stored.change_sets.iter().cloned());
            entries.bodies.extend(stored.bodies.iter().cloned());
        }
        let snapshot = follower.snapshot().filter(|_| held.0 == 0).map(|snapshot| mesh::Snapshot {
            revision: snapshot.revision.0,
            state_json: snapshot.state.into(),
            bodies: snapshot.bodies.iter().map(|(_, text)| text.to_string()).collect(),
            frontier: snapshot.frontier.into_iter().map(Bytes::from).collect(),
            last_entry: snapshot.last_entry.into(),
            keyring_json: Bytes::new(),
        });
        let discovery = Some(joined.discovery.clone());
        mesh::Welcome { snapshot, entries: Some(entries), discovery, bundle: None, head: None, signals: None }
    }
}

impl Host {
    fn new(number: usize, services: &'static [&'static str], now_ms: u64, spare: &mut Spare) -> Self {
        let mut host = Self {
            name: service(&format!("h{number}")),
            follower: Follower::default(),
            proxies: Vec::new(),
            is_cut_off: false,
            library: spare.library(),
            in_step_at_ms: None,
            kept: None,
            stream: None,
            discovery_sequence: 0,
            services,
            proxies_started: 0,
            reached_at_ms: now_ms,
        };
        for service in services {
            host.start(service, now_ms, spare);
        }
        host
    }

    /// Starts a proxy for `of`.
    fn start(&mut self, of: &str, now_ms: u64, spare: &mut Spare) {
        self.proxies_started += 1;
        let suffix = format!("{}-{}", self.name, self.proxies_started);
        self.proxies.push(Proxy {
            instance: InstanceId::new(&service(of), &suffix),
            revision: Revision(0),
            law: None,
            library: spare.library(),
            fresh_at_ms: self.in_step_at_ms,
            began_at_ms: now_ms,
            orders: VecDeque::new(),
            offered: None,
            applied: VecDeque::new(),
            known: None,
        });
    }

    /// Takes in what control sent, or what somebody made of it.
    fn take_in(&mut self, event: &Bytes, now_ms: u64) -> Result<(), Ended> {
        let Some(stream) = &mut self.stream else { return Err(Ended) };
        stream.heard_at_ms = now_ms;
        let event = mesh::FollowEvent::decode(event.clone()).unwrap().event.unwrap();
        match (event, stream.is_welcome) {
            (Event::Welcome(welcome), false) => {
                self.welcome(&welcome)?;
                self.discovery_sequence = welcome.discovery.ok_or(Ended)?.sequence;
                let repeated = self.proxies.iter().filter_map(|proxy| proxy.known.map(|known| proxy.says(known)));
                if let Some(stream) = &mut self.stream {
                    stream.is_welcome = true;
                    stream.to_control.extend(repeated.flatten());
                }
            }
            (Event::Entries(entries), true) => self.extend(&entries)?,
            (Event::Discovery(discovery), true) => {
                if discovery.sequence != self.discovery_sequence + 1 {
                    return Err(Ended);
                }
                self.discovery_sequence += 1;
                self.compare();
                return Ok(());
            }
            (Event::Heartbeat(heartbeat), true) => {
                let is_held =
                    heartbeat.size == self.follower.revision().0 && heartbeat.root[..] == self.follower.root().0;
                if !is_held || heartbeat.discovery_sequence != self.discovery_sequence {
                    return Err(Ended);
                }
            }
            _ => return Err(Ended),
        }
        self.compare();
        self.offer();
        Ok(())
    }

    /// All that control held when it was asked is held here: then this host was in step at that moment.
    fn compare(&mut self) {
        let Some(Stream { asked: (at_ms, head), is_welcome: true, .. }) = &self.stream else { return };
        if self.follower.revision().0 >= head.size && self.discovery_sequence >= head.discovery_sequence {
            self.in_step_at_ms = self.in_step_at_ms.max(Some(*at_ms));
        }
    }

    fn welcome(&mut self, welcome: &mesh::Welcome) -> Result<(), Ended> {
        let entries = welcome.entries.as_ref().ok_or(Ended)?;
        let held = self.follower.revision().0;
        let Some(snapshot) = welcome.snapshot.as_ref().filter(|_| held == 0) else {
            return if entries.size < held { Err(Ended) } else { self.extend(entries) };
        };
        let snapshot = Snapshot {
            revision: Revision(snapshot.revision),
            state: snapshot.state_json.to_vec(),
            frontier: snapshot.frontier.iter().map(|root| root.to_vec()).collect(),
            last_entry: snapshot.last_entry.to_vec(),
            bodies: bodies_of(&snapshot.bodies),
        };
        let mut follower = Follower::from_snapshot(&snapshot).map_err(|_| Ended)?;
        extend(&mut follower, entries)?;
        self.follower = follower;
        Ok(())
    }

    fn extend(&mut self, entries: &mesh::Entries) -> Result<(), Ended> {
        extend(&mut self.follower, entries)
    }

    /// Gives each proxy the view of what is held, or only its revision where the content is the same.
    fn offer(&mut self) {
        if self.follower.state().trust_domain.is_none() {
            return;
        }
        for (digest, text) in self.follower.bodies().iter() {
            self.library.insert(*digest, text).unwrap();
        }
        self.library.retain(|digest| self.follower.bodies().get(digest).is_some());
        let revision = self.follower.revision();
        for proxy in &mut self.proxies {
            if proxy.offered.as_ref().is_some_and(|(at, _)| *at == revision) {
                continue;
            }
            let local = Local { service: proxy.instance.service() };
            let new = Arc::new(view(self.follower.state(), revision, &self.library, &local).unwrap());
            match &mut proxy.offered {
                Some((at, held)) if held.same_content(&new) => {
                    *at = revision;
                    proxy.orders.push_back(Order::Revision(revision));
                }
                offered => {
                    *offered = Some((revision, new.clone()));
                    proxy.orders.push_back(Order::View(new));
                }
            }
        }
    }
}

impl Proxy {
    /// What it answers to `GET /` from `caller`.
    pub fn answer(&self, caller: &str, now_ms: u64) -> u16 {
        let Some((view, law)) = &self.law else { return 503 };
        let stale_ms = now_ms - self.fresh_at_ms.unwrap_or(self.began_at_ms);
        if view.spec.as_ref().is_some_and(|spec| stale_ms >= u64::from(spec.max_staleness_seconds) * 1000) {
            return 503;
        }
        let principal = SpiffeId::parse(&format!("spiffe://shop.example/{caller}")).unwrap();
        let context = Context {
            method: "GET",
            host: "catalog.mesh",
            protocol: Protocol::Http,
            size: None,
            origin: [10, 0, 0, 7].into(),
            now: (now_ms / 1000) as i64,
            first_contact: false,
            token: None,
            condition: Condition::default(),
        };
        let service = &view.service;
        let query = Query { principal: &principal, action: Action::Http("GET"), service, path: "/", context };
        if law.decide(&query).outcome == Outcome::Permit { 200 } else { 403 }
    }

    fn has_more(&self) -> bool {
        !self.orders.is_empty() || !self.applied.is_empty()
    }

    /// Reads one order and does it.
    fn take_up(&mut self) {
        let before = self.revision;
        match self.orders.pop_front() {
            None => return,
            Some(Order::Revision(revision)) => self.revision = self.revision.max(revision),
            Some(Order::View(view)) => {
                let law = Law::compile_with(&view, &mut self.library).unwrap_or_else(|errors| panic!("{errors:?}"));
                self.revision = view.revision;
                self.law = Some((view, law));
            }
        }
        assert!(before <= self.revision, "{} went back from {before} to {}", self.instance, self.revision);
        self.applied.push_back(self.revision);
    }

    /// What its agent says of it.
    fn says(&self, enforces: Revision) -> [Said; 2] {
        let instance = self.instance.to_string();
        let revision =
            mesh::InstanceRevision { instance: instance.clone(), revision: enforces.0, ..Default::default() };
        let address = "127.0.0.1:1".to_owned();
        [
            Said::Up(mesh::InstanceUp { instance, address, ready: true, ..mesh::InstanceUp::default() }),
            Said::Acknowledgement(mesh::Acknowledgement { instances: vec![revision] }),
        ]
    }
}

impl Truth {
    /// The ledger when it had `revision` entries.
    pub fn at(&self, revision: Revision) -> &Follower {
        self.past.get(revision.0 as usize).expect("a revision that never was")
    }

    fn append(&mut self, follower: Follower) {
        for (digest, text) in follower.bodies().iter() {
            self.library.insert(*digest, text).unwrap();
        }
        self.past.push(follower);
    }

    /// What `proxy` enforces is the ledger at the revision it names, and it answers as the policies of then say.
    pub fn hold(&self, proxy: &Proxy, now_ms: u64) {
        let Some((held, _)) = &proxy.law else { return };
        let (revision, instance) = (proxy.revision, &proxy.instance);
        let state = self.at(revision).state();
        let local = Local { service: instance.service() };
        let expected = view(state, revision, &self.library, &local).unwrap();
        assert!(held.same_content(&expected), "{instance} enforces something else than revision {revision}");
        for caller in CALLERS {
            let expected = if permits(state, &local.service, caller) { 200 } else { 403 };
            let answer = proxy.answer(caller, now_ms);
            assert!(
                answer == expected || answer == 503,
                "{instance} answers {answer} to {caller} at revision {revision}, which says {expected}"
            );
        }
    }
}

/// The policies of this mesh in plain words.
fn permits(state: &MeshState, to: &ServiceName, caller: &str) -> bool {
    let has =
        |role: &str| state.roles.get(role).is_some_and(|members| members.contains(&Member::Service(service(caller))));
    let is_stopped = state.policies.contains_key("stopped") && has("stopped");
    to.as_str() == "catalog" && has("reader") && !is_stopped
}

fn entries_of(draft: &Draft, bodies: &Bodies) -> mesh::Entries {
    mesh::Entries {
        first_index: draft.entry.index,
        entries: vec![draft.bytes.clone().into()],
        change_sets: vec![draft.change_set.clone().into()],
        bodies: bodies.iter().map(|(_, text)| text.to_string()).collect(),
        size: draft.next.revision().0,
        root: Bytes::copy_from_slice(&draft.next.root().0),
    }
}

fn extend(follower: &mut Follower, entries: &mesh::Entries) -> Result<(), Ended> {
    let batch = Batch {
        first_index: entries.first_index,
        entries: &entries.entries,
        change_sets: &entries.change_sets,
        bodies: &bodies_of(&entries.bodies),
        size: entries.size,
        root: Digest(entries.root[..].try_into().map_err(|_| Ended)?),
    };
    follower.extend(&batch).map(drop).map_err(|_| Ended)
}

fn bodies_of(texts: &[String]) -> Bodies {
    let mut bodies = Bodies::default();
    for text in texts {
        bodies.insert(text.as_str());
    }
    bodies
}

fn encoded(event: Event) -> Bytes {
    mesh::FollowEvent { event: Some(event) }.encode_to_vec().into()
}

/// Changes one thing in an event.
fn alter(event: &mut Bytes, chance: &mut fastrand::Rng) {
    let mut altered = mesh::FollowEvent::decode(event.clone()).unwrap().event.unwrap();
    match &mut altered {
        Event::Welcome(mesh::Welcome { snapshot: Some(snapshot), .. }) if chance.bool() => match chance.u8(..5) {
            0 => snapshot.revision += 1,
            1 => alter_byte(&mut snapshot.state_json, chance),
            2 => alter_byte(&mut snapshot.last_entry, chance),
            3 => snapshot.bodies.iter_mut().for_each(|text| text.push(' ')),
            _ => snapshot.frontier.iter_mut().for_each(|root| alter_byte(root, chance)),
        },
        Event::Welcome(mesh::Welcome { entries: Some(entries), .. }) | Event::Entries(entries) => {
            match chance.u8(..7) {
                0 => entries.first_index += 1,
                1 => entries.size -= 1,
                2 => alter_byte(&mut entries.root, chance),
                3 => entries.bodies.iter_mut().for_each(|text| text.push(' ')),
                4 => drop(entries.entries.pop()),
                5 => entries.entries.iter_mut().for_each(|bytes| alter_byte(bytes, chance)),
                _ => entries.change_sets.iter_mut().for_each(|bytes| alter_byte(bytes, chance)),
            }
        }
        Event::Heartbeat(heartbeat) if chance.bool() => heartbeat.size += 1,
        Event::Heartbeat(heartbeat) => alter_byte(&mut heartbeat.root, chance),
        Event::Discovery(discovery) => discovery.sequence += 1,
        _ => {}
    }
    *event = encoded(altered);
}

fn alter_byte(bytes: &mut Bytes, chance: &mut fastrand::Rng) {
    let mut altered = bytes.to_vec();
    if let Some(at) = chance.choice(0..altered.len()) {
        altered[at] ^= chance.u8(1..);
    }
    *bytes = altered.into();
}

fn declare(name: &str, max_staleness_seconds: u32) -> Change {
    Change::DeclareService {
        name: service(name),
        spec: ServiceSpec { max_staleness_seconds, ..ServiceSpec::new(Protocol::Http) },
    }
}

fn service(name: &str) -> ServiceName {
    ServiceName::parse(name).unwrap()
}

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("shop.example").unwrap()
}
