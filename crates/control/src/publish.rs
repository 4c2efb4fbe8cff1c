//! What the control plane tells agents: the ledger as it grows, discovery, and that it is still there. Every event is
//! encoded once and the same bytes go to every agent; nothing is computed per agent or per proxy.
//!
//! Each agent has a bounded queue. One that does not keep up is cut off and starts again from what it holds, so that it
//! slows nobody down. No event is ever left out of a stream: a stream with a gap ends.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use countersign_api::{
    local::{HostView, InstanceView, ProxyRevision, WaitingView},
    mesh::{self, follow_event::Event},
    signals,
};
use countersign_core::{
    change::{Change, ChangeSet, PolicyId, Revision},
    identity::{InstanceId, ServiceName},
    policy::ParsedPolicy,
    signal::{Serial, Signal, SignalSeq, Signals},
};

use crate::{
    ledger::Head,
    registry::{Moved, Refused, Registry},
    store::{StoredAcknowledgement, StoredHost, StoredInstance, StoredSignal},
    telemetry::Reached,
};

/// Events that wait for one agent at most.
pub const QUEUE_EVENTS_MAX: usize = 1_024;
/// Answers that wait for one question at most.
const ANSWERS_MAX: usize = 256;
/// Changes of a change-set that is looked through for whom to tell first; a larger one is about nearly everyone.
const ABOUT_CHANGES_MAX: usize = 16;

/// Tells agents, and hears what they say.
pub struct Publisher {
    inner: Mutex<Inner>,
    /// Bumped whenever something that a waiting command looks at has moved.
    moved: watch::Sender<u64>,
    /// Told when there is an acknowledgement to write down.
    unwritten: Notify,
    ended: Notify,
}

struct Inner {
    registry: Registry,
    head: Arc<Head>,
    bundle: Option<mesh::Bundle>,
    discovery_sequence: u64,
    signals: Signals,
    streams: HashMap<ServiceName, Stream>,
    next_stream: u64,
    questions: BTreeMap<u64, Question>,
    next_question: u64,
    unsaved: bool,
    /// Instances whose proxies acknowledged something that other control planes cannot read yet.
    acknowledged: BTreeSet<InstanceId>,
    /// Whether other control planes read what is written down.
    is_shared: bool,
    dropped: u64,
}

struct Stream {
    number: u64,
    /// Of the SVID by which the agent proved its host.
    serial: Option<Serial>,
    queue: mpsc::Sender<Bytes>,
    /// Ends the other half, which hears the agent, when this half goes.
    _cut: DropGuard,
}

struct Question {
    answers: mpsc::Sender<Vec<Bytes>>,
    waiting: Vec<ServiceName>,
}

/// One agent's place in the broadcast: every event after `head` and `discovery` comes through `events`.
pub struct Joined {
    /// Names this stream; a host's later stream replaces it.
    pub number: u64,
    /// Encoded events.
    pub events: mpsc::Receiver<Bytes>,
    /// Cancelled when the stream is cut off or replaced.
    pub cut: CancellationToken,
    /// The ledger when it joined.
    pub head: Arc<Head>,
    /// Everything reachable when it joined.
    pub discovery: mesh::Discovery,
    /// The keys of the trust domain.
    pub bundle: Option<mesh::Bundle>,
    /// All signals that held when it joined.
    pub signals: Signals,
    /// What to write down of the host.
    pub host: StoredHost,
}

/// What is written down by all control planes of one store.
pub struct Elsewhere {
    /// The others that run.
    pub alive: BTreeSet<String>,
    /// All instances, in the order of their ids.
    pub instances: Vec<StoredInstance>,
    /// All hosts.
    pub hosts: Vec<StoredHost>,
    /// The hosts that may run some services only.
    pub entitlements: Vec<(ServiceName, BTreeSet<ServiceName>)>,
}

/// Answers of hosts to one question.
pub struct Asked {
    /// Encoded records, as they arrive; ends when every host has answered or left.
    pub answers: mpsc::Receiver<Vec<Bytes>>,
    /// The question, to be withdrawn.
    pub number: u64,
    /// How many hosts were asked.
    pub host_count: usize,
}

impl Publisher {
    /// Begins with what is known from before.
    pub fn new(registry: Registry) -> Self {
        let inner = Inner {
            registry,
            head: Arc::default(),
            bundle: None,
            discovery_sequence: 1,
            signals: Signals::default(),
            streams: HashMap::new(),
            next_stream: 0,
            questions: BTreeMap::new(),
            next_question: 0,
            unsaved: false,
            acknowledged: BTreeSet::new(),
            is_shared: false,
            dropped: 0,
        };
        Self { inner: Mutex::new(inner), moved: watch::Sender::new(0), unwritten: Notify::new(), ended: Notify::new() }
    }

    /// Takes in what other control planes of this store wrote, and writes down what this one knows whenever it is not there.
    pub fn elsewhere(&self, replica: &str, others: Elsewhere, now_ms: u64) {
        let Elsewhere { alive, instances, hosts, entitlements } = others;
        let mut inner = self.inner.lock();
        inner.is_shared = true;
        inner.registry.refresh(hosts, entitlements);
        let moved = inner.registry.elsewhere(&alive, &instances, now_ms);
        let was_unsaved = inner.unsaved;
        inner.discover(moved);
        let own = inner.registry.stored_instances();
        let written = instances.iter().filter(|instance| instance.replica == replica).count();
        let is_written = |own: &StoredInstance| {
            let found = instances.binary_search_by(|instance| instance.instance.cmp(&own.instance));
            found.is_ok_and(|at| {
                let written = &instances[at];
                let is_ours = written.replica == replica;
                let as_we_know = (written.revision, &written.error) == (own.revision, &own.error);
                is_ours && (as_we_know || inner.acknowledged.contains(&own.instance))
            })
        };
        let unsaved = was_unsaved || own.len() != written || !own.iter().all(is_written);
        inner.unsaved = unsaved;
        drop(inner);
        self.bump();
    }

    /// The ledger as opened at start.
    pub fn begin(&self, head: Arc<Head>) {
        let mut inner = self.inner.lock();
        inner.registry.show_only_active(head.follower.state());
        inner.head = head;
    }

    /// The keys that agents verify with; those from before others that are told already are not told any more.
    pub fn trust(&self, bundle: mesh::Bundle) {
        let mut inner = self.inner.lock();
        // Two who tell at the same time may come in another order than what they tell was made.
        if inner.bundle.as_ref().is_none_or(|told| told.sequence < bundle.sequence) {
            inner.bundle = Some(bundle.clone());
            inner.tell(Event::Bundle(bundle));
        }
    }

    /// Takes in signals that follow those that are known, and tells every agent. An agent whose own SVID is revoked is told
    /// nothing after that. Returns all that hold.
    pub fn signal(&self, new: &[StoredSignal], now_ms: u64) -> Signals {
        let mut inner = self.inner.lock();
        let after = inner.signals.sequence();
        let said: Vec<Signal> = new.iter().filter(|one| one.sequence > after).map(|one| one.signal.clone()).collect();
        inner.signals.forget_ended(now_ms);
        if let Some(last) = new.last().filter(|last| last.sequence > after) {
            let extended = inner.signals.extend(after, last.sequence, said.iter().cloned());
            extended.expect("INVARIANT: they follow what is held");
            inner.tell(Event::Signals(signals::new(after, last.sequence, said)));
            let known = inner.signals.clone();
            let lost = |stream: &Stream| stream.serial.is_some_and(|serial| known.is_revoked(&serial));
            let cut: Vec<ServiceName> =
                inner.streams.iter().filter(|(_, stream)| lost(stream)).map(|(host, _)| host.clone()).collect();
            cut.iter().for_each(|host| inner.cut(host, now_ms));
        }
        let signals = inner.signals.clone();
        drop(inner);
        self.bump();
        signals
    }

    /// Whether a certificate is revoked.
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.inner.lock().signals.is_revoked(serial)
    }

    /// All signals that hold.
    pub fn signals(&self) -> Signals {
        self.inner.lock().signals.clone()
    }

    /// Waits until every connected proxy enforces the signals up to `sequence`, or the deadline; returns those that do not, and how
    /// many are connected.
    pub async fn heeded(&self, sequence: SignalSeq, deadline: tokio::time::Instant) -> (Vec<InstanceId>, usize) {
        let mut moved = self.moved.subscribe();
        let mut late = false;
        loop {
            moved.mark_unchanged();
            {
                let inner = self.inner.lock();
                let (unaware, connected) = inner.registry.unaware_of(sequence);
                if late || inner.signals.sequence() >= sequence && unaware.is_empty() {
                    return (unaware, connected);
                }
            }
            late = tokio::time::timeout_at(deadline, moved.changed()).await.is_err();
        }
    }

    /// The ledger grew. Everyone is told the same; hosts of the services it is about hear it first.
    pub fn entries(&self, head: &Arc<Head>, entries: mesh::Entries) {
        let mut inner = self.inner.lock();
        let about: BTreeSet<ServiceName> =
            entries.change_sets.iter().flat_map(|change_set| about(change_set, &inner.head, head)).collect();
        let first = inner.registry.hosts_of(&about);
        inner.head = head.clone();
        inner.tell_first(&first, Event::Entries(entries));
        let moved = inner.registry.admit_only(&head.follower.state().deployments);
        inner.discover(moved);
        let moved = inner.registry.show_only_active(head.follower.state());
        inner.discover(moved);
        drop(inner);
        self.bump();
    }

    /// Nothing changed; we are there.
    pub fn heartbeat(&self) {
        let mut inner = self.inner.lock();
        let follower = &inner.head.follower;
        let heartbeat = mesh::Heartbeat {
            size: follower.revision().0,
            root: Bytes::copy_from_slice(&follower.root().0),
            discovery_sequence: inner.discovery_sequence,
            signal_sequence: inner.signals.sequence().0,
        };
        inner.tell(Event::Heartbeat(heartbeat));
    }

    /// What agents that are in step hold.
    pub fn head(&self) -> mesh::Head {
        self.inner.lock().head()
    }

    /// An agent's stream opened. Its place is taken before its first word is written, so that no event falls between
    /// what it is welcomed with and what it then hears.
    pub fn join(&self, hello: &mesh::FollowHello, host: &ServiceName, serial: Option<Serial>, now_ms: u64) -> Joined {
        let mut inner = self.inner.lock();
        let (queue, events) = mpsc::channel(QUEUE_EVENTS_MAX);
        inner.next_stream += 1;
        let number = inner.next_stream;
        let cut = CancellationToken::new();
        inner.streams.insert(host.clone(), Stream { number, serial, queue, _cut: cut.clone().drop_guard() });
        let stored = inner.registry.connect(hello, host, now_ms);
        let discovery = mesh::Discovery {
            sequence: inner.discovery_sequence,
            full: true,
            up: inner.registry.reachable(),
            down: Vec::new(),
        };
        let (head, bundle, signals) = (inner.head.clone(), inner.bundle.clone(), inner.signals.clone());
        let joined = Joined { number, events, cut, head, discovery, bundle, signals, host: stored };
        drop(inner);
        self.bump();
        joined
    }

    /// An agent's stream ended. Says nothing of a later stream of the same host.
    pub fn leave(&self, host: &ServiceName, number: u64, now_ms: u64) {
        let mut inner = self.inner.lock();
        if inner.streams.get(host).is_none_or(|stream| stream.number == number) {
            inner.cut(host, now_ms);
        }
        drop(inner);
        self.bump();
    }

    /// Ends every stream: the control plane stops.
    pub fn end(&self) {
        self.inner.lock().streams.clear();
    }

    /// Hears one message of an agent's stream.
    pub fn hear(&self, host: &ServiceName, said: mesh::follow_request::Message, now_ms: u64) -> Result<(), Refused> {
        use mesh::follow_request::Message as Said;
        let mut inner = self.inner.lock();
        inner.registry.heard(host, now_ms);
        match said {
            Said::Acknowledgement(given) => {
                let moved = inner.registry.acknowledge(host, &given)?;
                if inner.is_shared && !moved.is_empty() {
                    inner.acknowledged.extend(moved);
                    self.unwritten.notify_one();
                }
            }
            Said::Up(up) => {
                let head = inner.head.clone();
                let moved = inner.registry.up(host, &up, &head.follower.state().deployments)?;
                inner.discover(moved);
            }
            Said::Waits(waits) => {
                let moved = inner.registry.waits(host, &waits)?;
                inner.unsaved = true;
                inner.discover(moved);
                self.ended.notify_one();
            }
            Said::Down(down) => {
                let moved = inner.registry.down(host, &down)?;
                inner.discover(moved);
                self.ended.notify_one();
            }
            Said::Records(answer) => inner.answered(host, answer),
            Said::Hello(hello) => inner.registry.hear_refusal(&hello, host),
            // Reports go to the decisions room.
            Said::Report(_) => {}
            // What comes of probes goes to the telemetry room.
            Said::Probed(_) => {}
        }
        drop(inner);
        self.bump();
        Ok(())
    }

    /// Takes out what its agent did not speak of in time.
    pub fn sweep(&self, now_ms: u64) {
        let mut inner = self.inner.lock();
        let moved = inner.registry.sweep(now_ms);
        self.ended.notify_one();
        if moved.down.is_empty() {
            return;
        }
        inner.discover(moved);
        drop(inner);
        self.bump();
    }

    /// Returns when an instance may have ended.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Asks every connected host for records.
    pub fn ask(&self, filter_json: String) -> Asked {
        let mut inner = self.inner.lock();
        let (answers, receiver) = mpsc::channel(ANSWERS_MAX);
        inner.next_question += 1;
        let number = inner.next_question;
        let waiting: Vec<ServiceName> = inner.streams.keys().cloned().collect();
        let host_count = waiting.len();
        if host_count > 0 {
            inner.questions.insert(number, Question { answers, waiting });
            inner.tell(Event::RecordsQuery(mesh::RecordsQuery { query: number, filter_json }));
        }
        Asked { answers: receiver, number, host_count }
    }

    /// Withdraws a question: later answers are dropped.
    pub fn withdraw(&self, question: u64) {
        self.inner.lock().questions.remove(&question);
    }

    /// Looks at, or notes something in, the registry.
    pub fn registry<T>(&self, act: impl FnOnce(&mut Registry) -> T) -> T {
        act(&mut self.inner.lock().registry)
    }

    /// What each connected proxy enforces.
    pub fn proxies(&self) -> Vec<ProxyRevision> {
        self.inner.lock().registry.proxies().collect()
    }

    /// Every host, for people.
    pub fn hosts(&self) -> Vec<HostView> {
        self.inner.lock().registry.hosts()
    }

    /// Instances of a service for people.
    pub fn instances_of(&self, service: &ServiceName) -> Vec<InstanceView> {
        self.inner.lock().registry.instances_of(service)
    }

    /// Every instance whose proxy can be reached.
    pub fn reached(&self) -> Vec<Reached> {
        self.inner.lock().registry.reached().collect()
    }

    /// Instances of a service that are not let run, for people.
    pub fn waiting_of(&self, service: &ServiceName) -> Vec<WaitingView> {
        self.inner.lock().registry.waiting_of(service)
    }

    /// Agents whose stream is open, and streams that were cut off because they did not keep up.
    pub fn stream_counts(&self) -> (usize, u64) {
        let inner = self.inner.lock();
        (inner.streams.len(), inner.dropped)
    }

    /// The instances to write down, if they changed since the last call.
    pub fn unsaved_instances(&self) -> Option<Vec<StoredInstance>> {
        let mut inner = self.inner.lock();
        std::mem::take(&mut inner.unsaved).then(|| inner.registry.stored_instances())
    }

    /// They could not be written down.
    pub fn keep_unsaved(&self) {
        self.inner.lock().unsaved = true;
    }

    /// Whether there are any to write down.
    pub fn is_unsaved(&self) -> bool {
        self.inner.lock().unsaved
    }

    /// Returns when a proxy has acknowledged something that is to be written down.
    pub async fn acknowledged(&self) {
        self.unwritten.notified().await;
    }

    /// What was acknowledged since the last call: all of it at once, however many proxies said it.
    pub fn unwritten_acknowledgements(&self) -> Vec<StoredAcknowledgement> {
        let mut inner = self.inner.lock();
        let acknowledged = std::mem::take(&mut inner.acknowledged);
        inner.registry.stored_acknowledgements(acknowledged)
    }

    /// Takes in what proxies enforce that follow another control plane.
    pub fn acknowledged_elsewhere(&self, written: Vec<StoredAcknowledgement>) {
        self.inner.lock().registry.acknowledged_elsewhere(written);
        self.bump();
    }

    /// Waits until every connected proxy enforces `revision`, or the deadline; returns those that do not, and how many
    /// are connected.
    pub async fn enforced(&self, revision: Revision, deadline: tokio::time::Instant) -> (Vec<ProxyRevision>, usize) {
        let mut moved = self.moved.subscribe();
        let mut late = false;
        loop {
            moved.mark_unchanged();
            {
                let inner = self.inner.lock();
                let there = inner.head.follower.revision() >= revision && inner.registry.all_enforce(revision);
                if there || late {
                    let connected = inner.registry.proxies().count();
                    return (inner.registry.proxies().filter(|proxy| proxy.revision < revision).collect(), connected);
                }
            }
            late = tokio::time::timeout_at(deadline, moved.changed()).await.is_err();
        }
    }

    fn bump(&self) {
        self.moved.send_modify(|count| *count += 1);
    }
}

impl Inner {
    fn head(&self) -> mesh::Head {
        mesh::Head {
            size: self.head.follower.revision().0,
            discovery_sequence: self.discovery_sequence,
            signal_sequence: self.signals.sequence().0,
        }
    }

    /// INVARIANT (same-bytes-to-all): an event is encoded here, once, and every open stream gets those bytes or ends.
    fn tell_first(&mut self, first: &HashSet<ServiceName>, event: Event) {
        let bytes = Bytes::from(mesh::FollowEvent { event: Some(event) }.encode_to_vec());
        let (before, after): (Vec<_>, Vec<_>) = self.streams.iter().partition(|(host, _)| first.contains(*host));
        let behind: Vec<ServiceName> = before
            .into_iter()
            .chain(after)
            .filter(|(_, stream)| stream.queue.try_send(bytes.clone()).is_err())
            .map(|(host, _)| host.clone())
            .collect();
        for host in behind {
            tracing::warn!(host = %host, "agent does not keep up and is cut off; it starts again from what it holds");
            self.dropped += 1;
            self.streams.remove(&host);
        }
    }

    fn tell(&mut self, event: Event) {
        self.tell_first(&HashSet::new(), event);
    }

    fn discover(&mut self, moved: Moved) {
        if moved == Moved::default() {
            return;
        }
        self.unsaved = true;
        self.discovery_sequence += 1;
        let down = moved.down.iter().map(InstanceId::to_string).collect();
        self.tell(Event::Discovery(mesh::Discovery {
            sequence: self.discovery_sequence,
            full: false,
            up: moved.up,
            down,
        }));
    }

    fn answered(&mut self, host: &ServiceName, answer: mesh::RecordsAnswer) {
        let Some(question) = self.questions.get_mut(&answer.query) else { return };
        if question.waiting.contains(host) {
            // A question that is flooded loses answers, never the control plane its memory.
            let _ = question.answers.try_send(answer.records_json);
        }
        if answer.last {
            question.waiting.retain(|waiting| waiting != host);
            if question.waiting.is_empty() {
                self.questions.remove(&answer.query);
            }
        }
    }

    fn cut(&mut self, host: &ServiceName, now_ms: u64) {
        self.streams.remove(host);
        self.registry.disconnect(host, now_ms);
        self.questions.retain(|_, question| {
            question.waiting.retain(|waiting| waiting != host);
            !question.waiting.is_empty()
        });
    }
}

/// The services that the changes of a small change-set name, through policies too. What it leaves out is told no less,
/// only not first.
fn about(change_set: &[u8], before: &Head, after: &Head) -> Vec<ServiceName> {
    let Ok(ChangeSet { changes, .. }) = serde_json::from_slice(change_set) else { return Vec::new() };
    if changes.len() > ABOUT_CHANGES_MAX {
        return Vec::new();
    }
    let judged_by = |head: &Head, id: &PolicyId| {
        let state = head.follower.state();
        let text = state.policies.get(id).and_then(|policy| head.follower.bodies().get(&policy.body));
        let policy = text.and_then(|text| ParsedPolicy::parse(text).ok());
        let services = state.services.iter();
        services
            .filter(|(name, service)| policy.as_ref().is_some_and(|policy| policy.concerns(name, &service.spec)))
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    };
    changes
        .iter()
        .flat_map(|change| match change {
            Change::SetPolicy { id, .. } | Change::RemovePolicy { id } => {
                [judged_by(before, id), judged_by(after, id)].concat()
            }
            Change::DeclareService { name, .. }
            | Change::RemoveService { name }
            | Change::QuarantineService { name }
            | Change::ApproveService { name }
            | Change::SuspendService { name, .. }
            | Change::ResumeService { name }
            | Change::ApproveEdge { service: name, .. }
            | Change::RevokeEdge { service: name, .. } => vec![name.clone()],
            _ => Vec::new(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use countersign_core::{
        change::Bodies,
        identity::TrustDomain,
        service::{Protocol, ServiceSpec},
    };

    use super::*;

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn join(publisher: &Publisher, host: &str) -> Joined {
        publisher.join(&mesh::FollowHello::default(), &name(host), None, 0)
    }

    fn up(instance: &str, port: u16) -> mesh::follow_request::Message {
        let address = format!("127.0.0.1:{port}");
        mesh::follow_request::Message::Up(mesh::InstanceUp { instance: instance.into(), address, ..Default::default() })
    }

    fn event(bytes: &Bytes) -> Event {
        mesh::FollowEvent::decode(bytes.clone()).unwrap().event.unwrap()
    }

    /// PROVES (same-bytes-to-all)
    #[test]
    fn every_agent_gets_the_same_bytes_in_the_same_order() {
        let publisher = Publisher::new(Registry::default());
        let mut agents: Vec<Joined> = ["a", "b", "c"].map(|host| join(&publisher, host)).into();
        publisher.hear(&name("a"), up("web/1", 1), 0).unwrap();
        publisher.heartbeat();
        publisher.hear(&name("b"), up("web/2", 2), 0).unwrap();
        let heard: Vec<Vec<Bytes>> =
            agents.iter_mut().map(|agent| (0..3).map(|_| agent.events.try_recv().unwrap()).collect()).collect();
        for bytes in &heard {
            for (one, first) in bytes.iter().zip(&heard[0]) {
                assert_eq!(one.as_ptr(), first.as_ptr(), "encoded once, shared by all");
            }
        }
    }

    #[test]
    fn an_agent_that_does_not_keep_up_is_cut_off_and_the_others_are_not() {
        let publisher = Publisher::new(Registry::default());
        let (mut slow, mut quick) = (join(&publisher, "slow"), join(&publisher, "quick"));
        for sequence in 1..=QUEUE_EVENTS_MAX as u64 + 1 {
            publisher.trust(mesh::Bundle { sequence, ..mesh::Bundle::default() });
            assert!(matches!(event(&quick.events.try_recv().unwrap()), Event::Bundle(b) if b.sequence == sequence));
        }
        assert!(slow.cut.is_cancelled() && !quick.cut.is_cancelled());
        for sequence in 1..=QUEUE_EVENTS_MAX as u64 {
            let heard = event(&slow.events.try_recv().unwrap());
            assert!(
                matches!(heard, Event::Bundle(b) if b.sequence == sequence),
                "what came before the gap stays in order"
            );
        }
        assert!(matches!(slow.events.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)), "and then it ends");
        assert_eq!(publisher.stream_counts(), (1, 1));
    }

    #[test]
    fn a_later_stream_of_a_host_replaces_the_earlier_whose_end_says_nothing_then() {
        let publisher = Publisher::new(Registry::default());
        let first = join(&publisher, "h");
        publisher.hear(&name("h"), up("web/1", 1), 0).unwrap();
        let second = join(&publisher, "h");
        assert!(first.cut.is_cancelled() && !second.cut.is_cancelled());
        assert_eq!(second.discovery.up.len(), 1, "what it ran is not forgotten");
        publisher.leave(&name("h"), first.number, 0);
        assert!(publisher.hosts()[0].connected);
        publisher.leave(&name("h"), second.number, 0);
        assert!(!publisher.hosts()[0].connected);
    }

    #[test]
    fn what_an_agent_is_welcomed_with_and_what_it_then_hears_leave_nothing_out() {
        let publisher = Publisher::new(Registry::default());
        let mut first = join(&publisher, "a");
        publisher.hear(&name("a"), up("web/1", 1), 0).unwrap();
        let mut second = join(&publisher, "b");
        publisher.hear(&name("a"), up("web/2", 2), 0).unwrap();
        assert_eq!(second.discovery.up.len(), 1);
        let Event::Discovery(next) = event(&second.events.try_recv().unwrap()) else { panic!() };
        assert_eq!((next.sequence, next.full), (second.discovery.sequence + 1, false));
        assert_eq!(first.events.len(), 2);
        first.events.close();
    }

    #[test]
    fn a_small_change_is_about_the_services_its_policies_judged_and_now_judge() {
        let services = ["web", "catalog", "payments"];
        let policy = |to: &str| {
            let text = format!("@id(\"p\")\npermit (principal, action, resource in Service::\"{to}\");\n");
            let mut bodies = Bodies::default();
            let body = bodies.insert(text);
            (Change::SetPolicy { id: "p".into(), file: "policies/p.cedar".into(), body }, bodies)
        };
        let mut changes = vec![Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }];
        let declare = |service: &str| {
            let spec = ServiceSpec::new(Protocol::Http);
            Change::DeclareService { name: name(service), spec }
        };
        changes.extend(services.map(declare));
        let (set, bodies) = policy("catalog");
        changes.push(set);
        let grown = |head: &Head, changes: Vec<Change>, bodies: &Bodies| {
            let change_set = ChangeSet { base: head.follower.revision(), changes };
            let draft = head.follower.draft(0, "local", &change_set, bodies).unwrap();
            (Head { follower: draft.next, ..Head::default() }, draft.change_set)
        };
        let (before, _) = grown(&Head::default(), changes, &bodies);

        let (moved, bodies) = policy("payments");
        for (what, change, expected) in [
            ("a policy that moves to another service", moved, vec!["catalog", "payments"]),
            ("a policy that goes", Change::RemovePolicy { id: "p".into() }, vec!["catalog"]),
            ("a service", declare("web"), vec!["web"]),
            ("roles, which may be anyone's", Change::SetRole { name: "r".into(), members: [].into() }, vec![]),
        ] {
            let (after, change_set) = grown(&before, vec![change], &bodies);
            let expected: Vec<_> = expected.into_iter().map(name).collect();
            assert_eq!(about(&change_set, &before, &after), expected, "{what}");
        }
    }

    fn acknowledgement(instance: &str, revision: u64) -> mesh::follow_request::Message {
        let instance = mesh::InstanceRevision { instance: instance.into(), revision, ..Default::default() };
        mesh::follow_request::Message::Acknowledgement(mesh::Acknowledgement { instances: vec![instance] })
    }

    #[tokio::test]
    async fn what_a_thousand_proxies_acknowledge_at_once_is_one_write_and_what_they_repeat_is_none() {
        let publisher = Publisher::new(Registry::default());
        let nobody_else =
            || Elsewhere { alive: [].into(), instances: Vec::new(), hosts: Vec::new(), entitlements: Vec::new() };
        publisher.elsewhere("one", nobody_else(), 0);
        let _agent = join(&publisher, "a");
        let all: Vec<String> = (0..1_000).map(|n| format!("web/{n}")).collect();
        for instance in &all {
            publisher.hear(&name("a"), up(instance, 1), 0).unwrap();
        }
        for revision in [1, 2] {
            for instance in &all {
                publisher.hear(&name("a"), acknowledgement(instance, revision), 0).unwrap();
            }
            publisher.acknowledged().await;
            let written = publisher.unwritten_acknowledgements();
            assert_eq!(written.len(), all.len());
            assert!(written.iter().all(|one| one.revision == Revision(revision)));
        }
        for instance in &all {
            publisher.hear(&name("a"), acknowledgement(instance, 2), 0).unwrap();
        }
        assert!(publisher.unwritten_acknowledgements().is_empty());
        let again = std::pin::pin!(publisher.acknowledged());
        assert!(futures_util::poll!(again).is_pending(), "an idle mesh writes nothing");
        // One that was lost on its way is found when the tables are looked at.
        let mut instances = publisher.inner.lock().registry.stored_instances();
        instances.iter_mut().for_each(|instance| instance.replica = "one".into());
        publisher.unsaved_instances();
        publisher.elsewhere("one", Elsewhere { instances: instances.clone(), ..nobody_else() }, 0);
        assert!(!publisher.is_unsaved(), "all of it is there");
        instances[7].revision = Revision(1);
        publisher.elsewhere("one", Elsewhere { instances, ..nobody_else() }, 0);
        assert!(publisher.is_unsaved());
    }

    #[tokio::test]
    async fn a_question_ends_when_every_host_has_answered_or_left() {
        let publisher = Publisher::new(Registry::default());
        assert!(publisher.ask("{}".into()).answers.recv().await.is_none(), "nobody to ask");
        let (_a, b) = (join(&publisher, "a"), join(&publisher, "b"));
        let mut asked = publisher.ask("{}".into());
        assert_eq!(asked.host_count, 2);
        let answer = |last| {
            let records_json = vec![Bytes::from_static(b"{}")];
            let answer = mesh::RecordsAnswer { query: asked.number, records_json, last, ..Default::default() };
            mesh::follow_request::Message::Records(answer)
        };
        publisher.hear(&name("a"), answer(false), 0).unwrap();
        publisher.hear(&name("a"), answer(true), 0).unwrap();
        publisher.hear(&name("a"), answer(true), 0).unwrap();
        publisher.leave(&name("b"), b.number, 0);
        let mut count = 0;
        while asked.answers.recv().await.is_some() {
            count += 1;
        }
        assert_eq!(count, 2, "an answer after the last is not taken");
    }
}
