//! From `apply` to the last proxy enforcing, with 100 and with 1 000 agents on mutual TLS streams in this one process, at
//! rest and while instances come and go; and with 1 000 that follow two control planes on one PostgreSQL database, half of them each,
//! where the change is asked for at one of the two; and from a signal (a certificate or tokens revoked, a risk) to the last proxy having said that it enforces it.
//! Prints one JSON object on its last line.
//!
//! The agents of eight services do all the work of an agent and its proxy: verify, fold, compute the view, compile the law.
//! The others acknowledge what they receive, since their folding would happen on other machines and not on these cores.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_api::{
    local::{
        IdentityFilter, IdentityView, KeyPlace, RevokeAs, RevokeTokensAs, Revoked, SendSignalAs, Shown, SignalSent,
        SignalWaited, TokensRevoked, Waited,
    },
    mesh::{self, follow_event::Event, follow_request::Message as Said},
};
use countersign_control::{ControlConfig, start, store::postgres::PostgresUrl};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, Revision},
    identity::ServiceName,
    ledger::{Batch, Follower, Snapshot},
    policy::{Law, Library},
    signal::{
        SignalSeq, TokensMeant,
        statement::{Kind, Subject},
    },
    token::TokenId,
    view::{Local, View, view},
};
use countersign_testkit::postgres::Server;
use serde_json::json;
use support::{Plane, Stream, config, declare, name, permit, trust_domain};
use tokio::{sync::mpsc, task::JoinSet};

/// As the real binary has.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Services whose agents do all the work.
const WORKING_SERVICES: usize = 8;
const INSTANCES: usize = 2;
const CHANGES: u64 = 100;
const SIGNALS: usize = 100;
/// How many of those that come and go are there at a time.
const COME_AND_GO_AT_ONCE: usize = 20;

/// A proxy enforces a revision since.
struct Enforces {
    revision: u64,
    service: usize,
    at: Instant,
}

/// What an agent holds of the mesh, and what its proxy enforces.
struct Working {
    follower: Follower,
    library: Library,
    compiled: Library,
    local: Local,
    view: Option<View>,
}

impl Working {
    fn start(welcome: mesh::Welcome, service: &ServiceName) -> Self {
        let snapshot = welcome.snapshot.unwrap();
        let mut bodies = Bodies::default();
        for text in snapshot.bodies {
            bodies.insert(text);
        }
        let follower = Follower::from_snapshot(&Snapshot {
            revision: Revision(snapshot.revision),
            state: snapshot.state_json.to_vec(),
            frontier: snapshot.frontier.iter().map(|part| part.to_vec()).collect(),
            last_entry: snapshot.last_entry.to_vec(),
            bodies,
        });
        let mut library = Library::default();
        let follower = follower.unwrap();
        for (digest, text) in follower.bodies().iter() {
            library.insert(*digest, text).unwrap();
        }
        let local = Local { service: service.clone() };
        let mut working = Self { follower, library, compiled: Library::default(), local, view: None };
        working.take_up(&welcome.entries.unwrap());
        working
    }

    /// Verifies, folds, and compiles when the view of the own service is another one. Whether it was.
    fn take_up(&mut self, entries: &mesh::Entries) -> bool {
        let mut bodies = Bodies::default();
        for text in &entries.bodies {
            let digest = bodies.insert(text.clone());
            self.library.insert(digest, &Arc::from(text.as_str())).unwrap();
        }
        let batch = Batch {
            first_index: entries.first_index,
            entries: &entries.entries,
            change_sets: &entries.change_sets,
            bodies: &bodies,
            size: entries.size,
            root: Digest(entries.root[..].try_into().unwrap()),
        };
        self.follower.extend(&batch).unwrap();
        let next = view(self.follower.state(), self.follower.revision(), &self.library, &self.local).unwrap();
        let moved = self.view.as_ref().is_none_or(|held| !held.same_content(&next));
        if moved {
            Law::compile_with(&next, &mut self.compiled).unwrap();
            self.view = Some(next);
        }
        moved
    }
}

async fn follow(mut stream: Stream, service: usize, instance: String, tell: mpsc::UnboundedSender<Enforces>) {
    let welcome = stream.welcome().await;
    let mut enforces = mesh::InstanceRevision {
        instance: instance.clone(),
        revision: welcome.entries.as_ref().map_or(0, |entries| entries.size),
        ..Default::default()
    };
    let mut working = (service < WORKING_SERVICES).then(|| Working::start(welcome, &service_name(service)));
    stream.up(&instance, "127.0.0.1:1").await;
    loop {
        stream.say(Said::Acknowledgement(mesh::Acknowledgement { instances: vec![enforces.clone()] })).await;
        let told = loop {
            match stream.next().await {
                Ok(event @ (Event::Entries(_) | Event::Signals(_))) => break event,
                Ok(_) => {}
                Err(_) => return,
            }
        };
        match told {
            Event::Signals(signals) => enforces.signal_sequence = signals.sequence,
            Event::Entries(entries) => {
                if working.as_mut().is_some_and(|working| working.take_up(&entries)) {
                    let _ = tell.send(Enforces { revision: entries.size, service, at: Instant::now() });
                }
                enforces.revision = entries.size;
            }
            _ => unreachable!("passed over above"),
        }
    }
}

/// Has SVIDs issued and takes each back; says how long it took until everybody had said that they enforce it, in milliseconds.
async fn revoke(plane: &Plane) -> Vec<f64> {
    let mut agent = plane.agent("taken").await;
    let of_host = IdentityFilter { host: Some(name("taken")), ..IdentityFilter::default() };
    let mut took_ms = Vec::with_capacity(SIGNALS);
    for number in 0..SIGNALS {
        agent.issue(&format!("s0/r{number}")).await.unwrap();
        let issued: Vec<IdentityView> = plane.get("/v1/identities?host=taken").await;
        let instance = format!("s0/r{number}");
        let is_newest = |one: &&IdentityView| one.instance.as_ref().is_some_and(|id| id.as_str() == instance);
        let serial = issued.iter().find(is_newest).map(|one| one.serial);
        let identities = IdentityFilter { serial, ..of_host.clone() };
        let asked = RevokeAs { identities, reason: "measured".into(), shown: Shown::default() };
        let began = Instant::now();
        let revoked: Revoked = plane.post("/v1/identities/revoke", &asked).await.unwrap();
        took_ms.push(heeded(plane, revoked.signal, began).await);
    }
    took_ms
}

/// The same of access tokens.
async fn revoke_tokens(plane: &Plane) -> Vec<f64> {
    let mut took_ms = Vec::with_capacity(SIGNALS);
    for number in 0..SIGNALS {
        let meant = TokensMeant::Id(TokenId::new(number as u64, [7; 10]));
        let asked = RevokeTokensAs { meant, reason: "measured".into(), shown: Shown::default() };
        let began = Instant::now();
        let revoked: TokensRevoked = plane.post("/v1/tokens/revoke", &asked).await.unwrap();
        took_ms.push(heeded(plane, revoked.signal, began).await);
    }
    took_ms
}

/// The same of what is said of a workload's risk.
async fn warn(plane: &Plane) -> Vec<f64> {
    let mut took_ms = Vec::with_capacity(SIGNALS);
    for number in 0..SIGNALS {
        let asked = SendSignalAs {
            subject: Subject::Workload(service_name(0)),
            kind: Kind::Risk,
            value: number.to_string(),
            half_life_ms: None,
            lifetime_ms: 60_000,
            reason: "measured".into(),
            shown: Shown::default(),
        };
        let began = Instant::now();
        let sent: SignalSent = plane.post("/v1/signals", &asked).await.unwrap();
        took_ms.push(heeded(plane, sent.signal, began).await);
    }
    took_ms
}

async fn heeded(plane: &Plane, signal: SignalSeq, since: Instant) -> f64 {
    let waited: SignalWaited = plane.get(&format!("/v1/signals/{}/wait?timeout_ms=10000", signal.0)).await;
    assert!(waited.enforced, "{waited:?}");
    since.elapsed().as_secs_f64() * 1e3
}

/// A host whose instances come and go, ten a second each way; they enforce what they are told as the others do.
async fn come_and_go(plane: Arc<Plane>, services: usize) {
    let mut agent = plane.agent("churn").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    let mut revision = stream.welcome().await.entries.map_or(0, |entries| entries.size);
    let mut there = VecDeque::<String>::new();
    let mut every = tokio::time::interval(Duration::from_millis(50));
    for number in 0.. {
        loop {
            tokio::select! {
                _ = every.tick() => break,
                event = stream.next() => {
                    if let Event::Entries(entries) = event.unwrap() {
                        revision = entries.size;
                        for instance in &there {
                            stream.acknowledge(instance, revision).await;
                        }
                    }
                }
            }
        }
        if number % 2 == 0 {
            let instance = format!("s{}/{}", number / 2 % services, INSTANCES + number / 2 / services);
            stream.up(&instance, "127.0.0.1:2").await;
            stream.acknowledge(&instance, revision).await;
            there.push_back(instance);
        } else if there.len() > COME_AND_GO_AT_ONCE {
            let instance = there.pop_front().unwrap();
            stream.say(Said::Down(mesh::InstanceDown { instance, reason: "it left".into(), ended: false })).await;
        }
    }
}

fn service_name(number: usize) -> ServiceName {
    name(&format!("s{number}"))
}

/// Processor time of this process so far.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0 // USER_HZ is 100 on Linux
}

fn quantiles(mut values: Vec<f64>) -> serde_json::Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    json!({ "p50": at(0.5), "p99": at(0.99) })
}

/// Where the agents are.
enum Planes {
    /// One control plane with a file.
    One,
    /// Two of them on one database.
    Two(Server),
}

impl Planes {
    async fn start(&self) -> Vec<Arc<Plane>> {
        let Self::Two(server) = self else { return vec![Arc::new(Plane::start().await)] };
        let keys = tempfile::tempdir().unwrap();
        let key = KeyPlace::File(keys.path().join("kek"));
        let mut planes = Vec::new();
        for _ in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let store = Some(PostgresUrl::parse(&server.url()).unwrap());
            let config = ControlConfig { store, key: Some(key.clone()), ..config(dir.path().into()) };
            planes.push(Arc::new(Plane { control: start(config).await.unwrap(), dir }));
        }
        planes
    }
}

async fn measure(agents: usize, churning: bool, at_planes: &Planes) -> serde_json::Value {
    let planes = at_planes.start().await;
    let plane = planes[0].clone();
    let services = agents / INSTANCES;
    let mut changes = vec![Change::CreateMesh { trust_domain: trust_domain() }, declare("caller")];
    let mut bodies = Bodies::default();
    for number in 0..services {
        changes.push(declare(service_name(number).as_str()));
        let (change, text) = permit(&format!("p{number}"), "caller", service_name(number).as_str());
        for (_, text) in text.iter() {
            bodies.insert(text.clone());
        }
        changes.push(change);
    }
    let mut revision = plane.apply_with(0, changes, bodies).await.unwrap().revision.0;

    let (tell, mut told) = mpsc::unbounded_channel();
    let mut simulated = JoinSet::new();
    for other in &planes[1..] {
        while other.status().await.revision.0 < revision {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    for number in 0..agents {
        let mut agent = planes[number % planes.len()].agent(&format!("h{number}")).await;
        let stream = agent.follow(0, Digest::default()).await.unwrap();
        let instance = format!("s{}/{}", number % services, number / services);
        simulated.spawn({
            let tell = tell.clone();
            async move {
                let _agent = agent;
                follow(stream, number % services, instance, tell).await;
            }
        });
    }
    while plane.status().await.services.iter().map(|service| service.instances.len()).sum::<usize>() < agents {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let revoked = quantiles(revoke(&plane).await);
    let tokens_revoked = quantiles(revoke_tokens(&plane).await);
    let warned = quantiles(warn(&plane).await);
    if churning {
        simulated.spawn(come_and_go(plane.clone(), services));
    }

    let (mut last_affected_ms, mut everyone_ms) = (Vec::new(), Vec::new());
    let cpu_before = cpu();
    let began = Instant::now();
    for change in 0..CHANGES {
        let service = change as usize % WORKING_SERVICES.min(services);
        let from = if (change / WORKING_SERVICES as u64).is_multiple_of(2) { "s0" } else { "caller" };
        let (set, text) = permit(&format!("p{service}"), from, service_name(service).as_str());
        let asked = Instant::now();
        revision = plane.apply_with(revision, vec![set], text).await.unwrap().revision.0;
        let mut affected = 0;
        while affected < INSTANCES {
            let enforces = tokio::time::timeout(support::WITHIN, told.recv()).await.expect("in time").unwrap();
            if enforces.revision == revision && enforces.service == service {
                affected += 1;
                if affected == INSTANCES {
                    last_affected_ms.push((enforces.at - asked).as_secs_f64() * 1e3);
                }
            }
        }
        let waited: Waited = plane.get(&format!("/v1/changes/{revision}/wait?timeout_ms=10000")).await;
        assert!(waited.enforced, "{waited:?}");
        everyone_ms.push(asked.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let busy = (cpu() - cpu_before) / began.elapsed().as_secs_f64();
    simulated.shutdown().await;
    drop(plane);
    for plane in planes {
        Arc::into_inner(plane).expect("nobody simulated is left").control.stop().await;
    }
    json!({
        "last_affected_enforces_ms": quantiles(last_affected_ms),
        "everyone_acknowledged_ms": quantiles(everyone_ms),
        "revocation_heeded_by_everyone_ms": revoked,
        "token_revocation_heeded_by_everyone_ms": tokens_revoked,
        "risk_heeded_by_everyone_ms": warned,
        "simulator_and_control_cores_busy": busy,
    })
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut result = serde_json::Map::new();
    let runs = [
        ("agents_100_at_rest", 100, false, Planes::One),
        ("agents_100_while_instances_come_and_go", 100, true, Planes::One),
        ("agents_1000_at_rest", 1000, false, Planes::One),
        ("agents_1000_while_instances_come_and_go", 1000, true, Planes::One),
        ("agents_1000_of_two_control_planes", 1000, false, Planes::Two(Server::start())),
    ];
    for (run, agents, churning, planes) in &runs {
        let measured = runtime.block_on(measure(*agents, *churning, planes));
        eprintln!("{run}: {measured}");
        result.insert((*run).to_owned(), measured);
    }
    println!("{}", serde_json::Value::Object(result));
}
