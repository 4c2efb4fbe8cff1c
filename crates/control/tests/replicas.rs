//! Several control planes on one PostgreSQL database: what they agree on, whatever is killed or cut between them.

mod support;

use std::{path::PathBuf, time::Duration};

use countersign_api::{
    local::{
        Applied, Apply, ApplyAs, AuthorityStep, AuthorityView, CheckpointView, Code, Confirm, Enrol, Enrolled,
        Enrolment, IdentityFilter, IdentityView, Proposal, ProposalState, RevokeAs, Revoked, Shown, StepAs, Stepped,
        Waited,
    },
    mesh::{ReadHeadRequest, follow_event::Event},
};
use countersign_control::{
    ControlConfig, start,
    store::{
        migrate::migrate,
        postgres::{PostgresStore, PostgresUrl},
    },
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, ChangeSet, Revision},
    directory::quarantined,
    identity::OperatorName,
};
use countersign_testkit::{authenticator::App, partition::Partition, postgres::Server};
use support::{Plane, config, declare, name, trust_domain};

/// A control plane on the database at `url`, with the key that all have.
async fn replica(url: &str, key: &std::path::Path) -> Plane {
    let dir = tempfile::tempdir().unwrap();
    let key = Some(countersign_api::local::KeyPlace::File(PathBuf::from(key)));
    let store = Some(PostgresUrl::parse(url).unwrap());
    let control = start(ControlConfig { store, key, ..config(dir.path().into()) }).await.unwrap();
    Plane { control, dir }
}

struct Shared {
    server: Server,
    keys: tempfile::TempDir,
}

impl Shared {
    async fn start() -> Self {
        let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
        Self { server, keys: tempfile::tempdir().unwrap() }
    }

    async fn replica(&self) -> Plane {
        replica(&self.server.url(), &self.keys.path().join("kek")).await
    }
}

async fn at_revision(plane: &Plane, revision: u64) {
    let reached = async {
        while plane.status().await.revision < Revision(revision) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(support::WITHIN, reached).await.expect("it takes up what the other wrote");
}

/// PROVES (one-authority)
/// PROVES (others-verified)
#[tokio::test(flavor = "multi_thread")]
async fn control_planes_that_start_at_once_on_one_database_are_one_mesh() {
    let shared = Shared::start().await;
    let first = shared.replica().await;
    let (second, third) = tokio::join!(shared.replica(), shared.replica());
    let planes = [first, second, third];
    let roots: Vec<_> = futures_util::future::join_all(planes.iter().map(Plane::bundle)).await;
    for bundle in &roots {
        assert_eq!(bundle.authorities(), roots[0].authorities(), "one root");
    }
    planes[0].create(&["web"]).await;
    at_revision(&planes[1], 1).await;
    planes[1].apply(1, vec![declare("catalog")]).await.unwrap();
    // Planned on what another one wrote a moment ago.
    planes[2].apply(2, vec![declare("payments")]).await.unwrap();
    for plane in &planes {
        at_revision(plane, 3).await;
    }
    let mut logs = std::collections::BTreeSet::new();
    for plane in &planes {
        let checkpoint: CheckpointView = plane.get("/v1/ledger/checkpoint").await;
        assert_eq!(checkpoint.size, 3);
        logs.insert((checkpoint.log_key, checkpoint.note.lines().nth(2).map(str::to_owned)));
    }
    assert_eq!(logs.len(), 1, "one log key, one root: {logs:?}");
}

/// PROVES (revisions-never-fork)
#[tokio::test(flavor = "multi_thread")]
async fn of_changes_at_two_control_planes_at_once_each_is_applied_once_or_refused() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web"]).await;
    at_revision(&planes[1], 1).await;
    let write = |who: usize| {
        let plane = &planes[who];
        async move {
            let mut applied = Vec::new();
            for n in 0..12 {
                let base = plane.status().await.revision.0;
                match plane.apply(base, vec![declare(&format!("s{who}-{n}"))]).await {
                    Ok(done) => applied.push((done.revision.0, format!("s{who}-{n}"))),
                    Err(refused) => assert_eq!(refused.status, 409, "{refused:?}"),
                }
            }
            applied
        }
    };
    let (a, b) = tokio::join!(write(0), write(1));
    let mut all: Vec<_> = a.into_iter().chain(b).collect();
    all.sort();
    let revisions: Vec<u64> = all.iter().map(|(revision, _)| *revision).collect();
    assert_eq!(revisions, (2..2 + all.len() as u64).collect::<Vec<_>>(), "none forks, none is applied twice");
    at_revision(&planes[0], 1 + all.len() as u64).await;
    at_revision(&planes[1], 1 + all.len() as u64).await;
    let one: CheckpointView = planes[0].get("/v1/ledger/checkpoint").await;
    let other: CheckpointView = planes[1].get("/v1/ledger/checkpoint").await;
    assert_eq!(one.note.lines().nth(2), other.note.lines().nth(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_finds_what_runs_behind_another_control_plane_and_moves_to_it() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web", "catalog"]).await;
    at_revision(&planes[1], 1).await;
    let token = planes[0].invite(None).await.token;
    // A token of one is good at the other, once.
    let mut there = planes[1].join(&token, "h1").await.unwrap();
    let shown_twice = planes[0].invite(None).await.token;
    let mut intercepted = planes[1].join(&shown_twice, "h9").await.unwrap();
    assert!(planes[0].join(&shown_twice, "h9").await.is_err(), "it is used up everywhere");
    let refused = async {
        while intercepted.issue("web/9").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(support::WITHIN, refused).await.expect("who came by it first is put out everywhere");
    let mut here = planes[0].agent("h2").await;
    let mut other = here.follow(0, Digest::default()).await.unwrap();
    other.welcome().await;
    let stream = there.follow(0, Digest::default()).await.unwrap();
    stream.up("web/1", "127.0.0.1:4001").await;
    let found = loop {
        if let Event::Discovery(discovery) = other.news().await {
            break discovery;
        }
    };
    assert_eq!(found.up[0].instance, "web/1");

    // It moves: what it runs stays where it is known to be.
    drop(stream);
    there.client = countersign_api::mesh::mesh_client::MeshClient::new(
        planes[0].channel(there.identity.client_config(trust_domain().control(), &[b"h2"])).await.unwrap(),
    );
    let mut moved = there.follow(0, Digest::default()).await.unwrap();
    let welcome = moved.welcome().await;
    assert_eq!(welcome.discovery.unwrap().up[0].instance, "web/1");
    moved.up("web/1", "127.0.0.1:4001").await;
    moved.acknowledge("web/1", 1).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    let mut again = planes[1].agent("h3").await;
    let welcome = again.follow(0, Digest::default()).await.unwrap().welcome().await;
    assert_eq!(welcome.discovery.unwrap().up[0].instance, "web/1", "the one it left knows it by the other");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_control_plane_revokes_the_others_agents_hear_and_none_lets_in() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web"]).await;
    at_revision(&planes[1], 1).await;
    let (mut stolen, mut honest) = (planes[1].agent("h1").await, planes[1].agent("h2").await);
    let mut stream = honest.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let identities = IdentityFilter { host: Some(name("h1")), ..IdentityFilter::default() };
    let asked = RevokeAs { identities, reason: "stolen".into(), shown: Shown::default() };
    let revoked: Revoked = planes[0].post("/v1/identities/revoke", &asked).await.unwrap();
    let told = loop {
        if let Event::Signals(signals) = stream.news().await {
            break signals;
        }
    };
    assert_eq!((told.sequence, &told.revoked[0].serial[..]), (1, &revoked.identities[0].serial.as_bytes()[..]));
    assert_eq!(stolen.issue("web/1").await.unwrap_err().code(), tonic::Code::Unauthenticated);
    // Both revoke at the same time: no number is given twice.
    honest.issue("web/1").await.unwrap();
    let of =
        |id| RevokeAs { identities: IdentityFilter { id: Some(id), ..IdentityFilter::default() }, ..asked.clone() };
    let (web, agent) = (of(trust_domain().workload(&name("web"))), of(trust_domain().agent(&name("h2"))));
    let both = futures_util::future::join(
        planes[0].post::<Revoked>("/v1/identities/revoke", &web),
        planes[1].post::<Revoked>("/v1/identities/revoke", &agent),
    );
    let (one, two) = both.await;
    let (one, two) = (one.unwrap().signal.0, two.unwrap().signal.0);
    assert_eq!((one.min(two), one.max(two)), (2, 3));
}

/// PROVES (one-step-at-a-time)
/// PROVES (only-the-active-signs)
#[tokio::test(flavor = "multi_thread")]
async fn control_planes_take_one_step_of_the_roots_together_and_none_signs_by_an_older_one() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web"]).await;
    at_revision(&planes[1], 1).await;
    let mut there = planes[1].agent("h1").await;
    let mut stream = there.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let step = async |plane: &Plane, step| {
        plane.post::<Stepped>("/v1/authority/steps", &StepAs { step, force: true, shown: Shown::default() }).await
    };
    let (one, two) = tokio::join!(step(&planes[0], AuthorityStep::Prepare), step(&planes[1], AuthorityStep::Prepare));
    let stepped: Vec<_> = [one, two].into_iter().filter_map(Result::ok).collect();
    assert_eq!(stepped.iter().map(|done| done.number).collect::<Vec<_>>(), [2], "one of them, once");
    let bundle = loop {
        if let Event::Bundle(bundle) = stream.news().await {
            break bundle;
        }
    };
    assert_eq!(bundle.x509_authorities_der.len(), 2, "agents of both are told");

    let early = step(&planes[0], AuthorityStep::Activate(2)).await.unwrap_err();
    assert_eq!(early.status, 409, "an agent that follows the other one lacks it: {early:?}");
    let x509_authorities_sha256 = bundle.x509_authorities_der.iter().map(|der| Digest::of(der).0.to_vec().into());
    let says = ReadHeadRequest { x509_authorities_sha256: x509_authorities_sha256.collect() };
    there.client.read_head(says).await.unwrap();
    let activated = async {
        while let Err(refused) = step(&planes[0], AuthorityStep::Activate(2)).await {
            assert!(refused.title.contains("do not hold root 2 yet"), "{refused:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), activated).await.expect("the other one says so within seconds");
    // Whatever the other one knows by now: what it signs rests on the root that signs.
    there.issue("web/1").await.unwrap();
    let web = IdentityFilter { id: Some(trust_domain().workload(&name("web"))), ..IdentityFilter::default() };
    let id = web.id.unwrap().to_string().replace(':', "%3A").replace('/', "%2F");
    let issued: Vec<IdentityView> = planes[0].get(&format!("/v1/identities?id={id}")).await;
    assert_eq!(issued.iter().map(|one| one.authority).collect::<Vec<_>>(), [2]);
    let views: [AuthorityView; 2] = [planes[0].get("/v1/authority").await, planes[1].get("/v1/authority").await];
    assert_eq!(views[0].roots, views[1].roots);
}

/// How often a control plane has looked at what the others wrote of their instances.
fn looks(plane: &Plane) -> String {
    let page = plane.control.counted()().unwrap();
    let count = "countersign_control_store_job_seconds_count{job=\"replicas\"}";
    page.lines().find(|line| line.starts_with(count)).expect("it looked once when it started").to_owned()
}

/// What is acknowledged between two looks at the tables can be known before the second only by a notice of its own.
#[tokio::test(flavor = "multi_thread")]
async fn what_proxies_of_another_control_plane_enforce_is_known_without_looking_at_all_that_is_written() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web"]).await;
    at_revision(&planes[1], 1).await;
    let mut agent = planes[1].agent("h1").await;
    let stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.up("web/1", "127.0.0.1:4001").await;
    let known_between_two_looks = async {
        for revision in 2.. {
            planes[0].apply(revision - 1, vec![declare(&format!("s{revision}"))]).await.unwrap();
            at_revision(&planes[1], revision).await;
            let waited: Waited = planes[0].get(&format!("/v1/changes/{revision}/wait?timeout_ms=10")).await;
            if waited.connected == 0 {
                continue;
            }
            assert!(!waited.enforced, "it was not acknowledged yet");
            let before = looks(&planes[0]);
            stream.acknowledge("web/1", revision).await;
            let waited: Waited = planes[0].get(&format!("/v1/changes/{revision}/wait?timeout_ms=10000")).await;
            assert!(waited.enforced, "{waited:?}");
            if looks(&planes[0]) == before {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), known_between_two_looks).await.expect("a notice tells it");
}

/// What waits at one control plane is answered at another, by codes that are good once everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_protected_mesh_has_one_gate_whichever_control_plane_is_asked() {
    let shared = Shared::start().await;
    let planes = [shared.replica().await, shared.replica().await];
    planes[0].create(&["web"]).await;
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let alice = OperatorName::parse("alice").unwrap();
    let asked = Enrol { operator: alice.clone(), invitation: None, shown: Shown::default() };
    let enrolment: Enrolment = planes[0].post("/v1/enrolments", &asked).await.unwrap();
    let app = App::read("alice", &enrolment.otpauth);
    // The step before the present one, so that the present one and the next stay good for what follows.
    let code = Code(app.code(now() - 30));
    let path = format!("/v1/enrolments/{}", enrolment.id);
    let enrolled: Enrolled = planes[0].post(&path, &Confirm { code }).await.unwrap();
    assert!(enrolled.anchor);
    at_revision(&planes[1], 2).await;

    let shown = |otp: Option<String>| Shown {
        operator: Some(alice.clone()),
        otp: otp.map(Code),
        recovery_code: None,
        countersignature: None,
    };
    let ask = |plane: usize, service: &str, otp: Option<String>| {
        let (plane, declared, shown) = (&planes[plane], declare(service), shown(otp));
        async move {
            let mesh: countersign_api::local::Mesh = plane.get("/v1/mesh").await;
            let (base, changes) = (mesh.revision, quarantined(vec![declared], &mesh.state));
            let apply = Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() };
            plane.post::<Applied>("/v1/changes", &ApplyAs { apply, shown }).await
        }
    };
    let refused = ask(0, "catalog", None).await.unwrap_err();
    let id = refused.refusal.unwrap().change.unwrap();
    let code = app.code(now());
    let applied: Applied =
        planes[1].post(&format!("/v1/proposals/{id}/apply"), &shown(Some(code.clone()))).await.unwrap();
    assert_eq!(applied.revision, Revision(3));
    at_revision(&planes[0], 3).await;
    let waiting: Proposal = planes[0].get(&format!("/v1/proposals/{id}/wait?timeout_ms=10000")).await;
    assert_eq!(waiting.state, ProposalState::Applied { revision: Revision(3) });
    let again = planes[0].post::<Applied>(&format!("/v1/proposals/{id}/apply"), &shown(None)).await;
    assert!(again.is_err(), "once");
    let replayed = ask(0, "payments", Some(code)).await.unwrap_err();
    assert!(replayed.title.contains("used already"), "{replayed:?}");
    assert_eq!(ask(1, "payments", Some(app.code(now() + 30))).await.unwrap().revision, Revision(4));
}

/// PROVES (acknowledged-is-durable)
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_killed_or_cut_off_loses_no_acknowledged_change_and_doubles_none() {
    let mut shared = Shared::start().await;
    let way = Partition::start(shared.server.port());
    let cut_off = replica(&shared.server.url_by(way.port()), &shared.keys.path().join("kek")).await;
    let other = shared.replica().await;
    cut_off.create(&["web"]).await;
    at_revision(&other, 1).await;

    way.close();
    let refused = cut_off.apply(1, vec![declare("lost")]).await.unwrap_err();
    assert_eq!(refused.status, 503, "{refused:?}");
    other.apply(1, vec![declare("a")]).await.unwrap();
    way.open();
    at_revision(&cut_off, 2).await;

    shared.server.kill();
    assert_eq!(other.apply(2, vec![declare("lost")]).await.unwrap_err().status, 503);
    assert_eq!(other.status().await.revision, Revision(2), "it still answers");
    tokio::task::block_in_place(|| shared.server.start_again());
    let applied = async {
        while other.apply(2, vec![declare("b")]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), applied).await.expect("the database is back");
    at_revision(&cut_off, 3).await;
    let (one, two): (CheckpointView, CheckpointView) =
        (other.get("/v1/ledger/checkpoint").await, cut_off.get("/v1/ledger/checkpoint").await);
    assert_eq!((one.size, one.note.lines().nth(2)), (3, two.note.lines().nth(2)));
}

/// PROVES (migrated-whole)
#[tokio::test(flavor = "multi_thread")]
async fn a_file_moves_into_an_empty_database_whole_and_is_the_same_mesh_there() {
    let shared = Shared::start().await;
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    plane.apply(1, vec![declare("catalog")]).await.unwrap();
    let before: CheckpointView = plane.get("/v1/ledger/checkpoint").await;
    plane.control.stop().await;
    let (file, url) = (plane.dir.path().join("control.db"), PostgresUrl::parse(&shared.server.url()).unwrap());
    let copy = move || {
        let mut to = PostgresStore::open(url.clone()).unwrap();
        (migrate(&file, &mut to), migrate(&file, &mut to))
    };
    let (moved, again) = tokio::task::spawn_blocking(copy).await.unwrap();
    assert_eq!(moved.unwrap().entries, 2);
    assert!(again.unwrap_err().to_string().contains("not empty"));
    let there = replica(&shared.server.url(), &plane.dir.path().join("keys/kek")).await;
    let after: CheckpointView = there.get("/v1/ledger/checkpoint").await;
    assert_eq!((after.note.lines().nth(2), after.log_key), (before.note.lines().nth(2), before.log_key));
    there.apply(2, vec![declare("payments")]).await.unwrap();
}
