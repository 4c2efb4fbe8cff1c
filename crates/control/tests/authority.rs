//! One root follows another while everybody stays: those who are there, those who were away, and those who come by an older token.

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use countersign_api::{
    local::{AuthorityState, AuthorityStep, AuthorityView, IdentityView, Problem, StepAs, Stepped},
    mesh::{self, follow_event::Event, mesh_client::MeshClient},
    svid::{Bundle, PeerSide, verify_peer},
};
use countersign_control::{StartError, clock::Clock, start, start_with_clock};
use countersign_core::{canonical::Digest, change::Change, lifetimes::Lifetimes};
use rustls_pki_types::{CertificateDer, UnixTime};
use support::{Agent, Plane, config, trust_domain};
use tonic::Code;

async fn step_as(plane: &Plane, step: AuthorityStep, force: bool) -> Result<Stepped, Problem> {
    plane.post("/v1/authority/steps", &StepAs { step, force, shown: Default::default() }).await
}

async fn step(plane: &Plane, step: AuthorityStep) -> Stepped {
    step_as(plane, step, false).await.unwrap()
}

async fn states(plane: &Plane) -> BTreeMap<u32, AuthorityState> {
    let view: AuthorityView = plane.get("/v1/authority").await;
    view.roots.iter().map(|one| (one.number, one.state)).collect()
}

/// Says what the agent verifies by, as it does every second.
async fn asks(agent: &mut Agent) -> Result<(), tonic::Status> {
    let bundle = agent.identity.bundle();
    let x509_authorities_sha256 = bundle.authorities().iter().map(|root| Digest::of(root).0.to_vec().into()).collect();
    agent.client.read_head(mesh::ReadHeadRequest { x509_authorities_sha256 }).await.map(drop)
}

async fn connects(plane: &Plane, agent: &Agent) -> Result<MeshClient<tonic::transport::Channel>, String> {
    let config = agent.identity.client_config(trust_domain().control(), &[b"h2"]);
    let channel = plane.channel(config).await.map_err(|error| format!("{error:?}"))?;
    let mut client = MeshClient::new(channel);
    client.read_head(mesh::ReadHeadRequest::default()).await.map_err(|status| format!("{status:?}"))?;
    Ok(client)
}

fn verifies(chain: &[bytes::Bytes], bundle: &Bundle) -> bool {
    let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    verify_peer(&chain, bundle, UnixTime::now(), PeerSide::Client).is_ok()
}

async fn bundle_told(stream: &mut support::Stream) -> Bundle {
    loop {
        if let Event::Bundle(bundle) = stream.news().await {
            return Bundle::from_message(&bundle).unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_signed_lives_as_long_as_the_ledger_says_then() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let lives = async |agent: &mut Agent| {
        let chain = agent.issue("web/1").await.unwrap().chain_der;
        let of = |der: &[u8]| {
            let (_, read) = x509_parser::parse_x509_certificate(der).unwrap();
            let validity = read.validity();
            validity.not_after.timestamp() - validity.not_before.timestamp() - 60
        };
        (of(&chain[0]), of(&chain[1]))
    };
    const DAY: i64 = 24 * 60 * 60;
    assert_eq!(lives(&mut agent).await, (3600, 90 * DAY));
    let lifetimes = Lifetimes { svid_seconds: 900, intermediate_days: 30, root_days: 120 };
    plane.apply(1, vec![Change::SetLifetimes { lifetimes }]).await.unwrap();
    assert_eq!(lives(&mut agent).await, (900, 90 * DAY), "what signs keeps what it has");
    step(&plane, AuthorityStep::Prepare).await;
    step(&plane, AuthorityStep::Activate(2)).await;
    assert_eq!(lives(&mut agent).await, (900, 30 * DAY));
    let view: AuthorityView = plane.get("/v1/authority").await;
    let root = &view.roots[1].root;
    assert_eq!((root.not_after_ms - root.not_before_ms) / 1000, 120 * DAY as u64 + 60);
    assert_eq!(view.svid_lifetime_seconds, 900);
    plane.apply(2, vec![Change::RemoveLifetimes {}]).await.unwrap();
    assert_eq!(lives(&mut agent).await.0, 3600);
}

/// PROVES (nothing-rests-on-a-step)
#[tokio::test]
async fn a_root_follows_another_and_whoever_was_there_or_away_gets_through() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let before = plane.invite(None).await.token;
    let (mut here, away) = (plane.agent("h1").await, plane.agent("h2").await);
    let first = Bundle::clone(&here.identity.bundle());
    let by_first = here.issue("web/1").await.unwrap().chain_der;
    let mut stream = here.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;

    let prepared = step(&plane, AuthorityStep::Next).await;
    assert_eq!((prepared.step, prepared.number), (AuthorityStep::Prepare, 2));
    let both = bundle_told(&mut stream).await;
    assert_eq!((both.authorities().len(), both.sequence() > first.sequence()), (2, true));
    let still = here.issue("web/2").await.unwrap().chain_der;
    assert!(verifies(&still, &first) && still.len() == 2, "a prepared root signs nothing");

    let early = step_as(&plane, AuthorityStep::Next, false).await.unwrap_err();
    assert_eq!((early.status, &*early.title), (409, "1 hosts do not hold root 2 yet: h1"));
    here.identity.trust(both.clone());
    asks(&mut here).await.unwrap();
    let active = step(&plane, AuthorityStep::Next).await;
    assert_eq!((active.step, active.number), (AuthorityStep::Activate(2), 2));

    // The first root's bundle alone is enough, as is the second's: nobody has to be told in time.
    let second = Bundle::new(trust_domain(), 9, vec![both.authorities()[1].clone()]).unwrap();
    let by_second = here.issue("web/3").await.unwrap().chain_der;
    assert!(verifies(&by_second, &first) && verifies(&by_second, &second) && verifies(&by_first, &first));
    assert!(!verifies(&by_first, &second));
    let mut came_back = connects(&plane, &away).await.expect("it was away for both steps");
    let csr_der = support::csr().1;
    let renewed = came_back.renew_agent(mesh::RenewAgentRequest { csr_der }).await.unwrap().into_inner();
    assert_eq!(renewed.bundle.unwrap().x509_authorities_der.len(), 2);
    plane.join_seeing(&before, "h3", &first).await.expect("a token of before");
    let now = plane.invite(None).await.token;
    plane.join_seeing(&now, "h4", &second).await.expect("a token of now names the root that signs now");

    for (refused, expected) in [
        (AuthorityStep::Revoke(1), "root 1 is old, and only a root that is tainted"),
        (AuthorityStep::Taint(2), "root 2 is active"),
        (AuthorityStep::Revoke(2), "root 2 is active"),
    ] {
        let problem = step_as(&plane, refused, true).await.unwrap_err();
        assert!(problem.status == 409 && problem.title.starts_with(expected), "{problem:?}");
        assert!(problem.help.is_some());
    }
    step(&plane, AuthorityStep::Taint(1)).await;
    let tainted = loop {
        let told = bundle_told(&mut stream).await;
        if !told.tainted().is_empty() {
            break told;
        }
    };
    let chain = |der: &[bytes::Bytes]| der.iter().map(|der| CertificateDer::from(der.to_vec())).collect::<Vec<_>>();
    assert!(tainted.rests_on_tainted(&chain(&by_first), UnixTime::now()));
    assert!(!tainted.rests_on_tainted(&chain(&by_second), UnixTime::now()));
    assert!(!both.rests_on_tainted(&chain(&by_first), UnixTime::now()));
    asks(&mut here).await.expect("nothing is cut by tainting");

    let resting: Vec<IdentityView> = plane.get("/v1/identities?authority=1").await;
    let refused = step_as(&plane, AuthorityStep::Revoke(1), false).await.unwrap_err();
    let expected =
        format!("{} identities that rest on root 1 have not expired; the last one does in 60 minutes", resting.len());
    assert_eq!((refused.status, refused.title), (409, expected));
    let revoked = step_as(&plane, AuthorityStep::Revoke(1), true).await.unwrap();
    assert_eq!((revoked.cut, states(&plane).await), (resting.len(), BTreeMap::from([(2, AuthorityState::Active)])));
    assert_eq!(bundle_told(&mut stream).await.authorities(), second.authorities());
    assert!(stream.next().await.is_err(), "what rests on it is cut");
    assert_eq!(asks(&mut here).await.unwrap_err().code(), Code::Unauthenticated);
    assert!(connects(&plane, &here).await.is_err());
    plane.join_seeing(&plane.invite(None).await.token, "h1", &second).await.expect("it is invited again");
}

#[tokio::test]
async fn a_control_plane_that_dies_between_two_steps_goes_on_from_the_last_one() {
    let mut plane = Plane::start().await;
    plane.create(&["web"]).await;
    let root: AuthorityView = plane.get("/v1/authority").await;
    let mut reached = Vec::new();
    for next in [
        AuthorityStep::Prepare,
        AuthorityStep::Activate(2),
        AuthorityStep::Prepare,
        AuthorityStep::Taint(1),
        AuthorityStep::Revoke(1),
        AuthorityStep::Revoke(3),
        AuthorityStep::Next,
    ] {
        step_as(&plane, next, true).await.unwrap();
        let before = plane.get::<AuthorityView>("/v1/authority").await;
        plane = plane.restart().await.unwrap();
        let after = plane.get::<AuthorityView>("/v1/authority").await;
        assert_eq!(after, before, "{next:?}");
        reached
            .push(after.roots.iter().map(|one| format!("{} {}", one.number, one.state)).collect::<Vec<_>>().join(", "));
        let mut agent = plane.agent("h1").await;
        agent.issue("web/1").await.unwrap();
        plane = plane.restart().await.unwrap();
    }
    assert_eq!(
        reached,
        [
            "1 active, 2 prepared",
            "1 old, 2 active",
            "1 old, 2 active, 3 prepared",
            "1 tainted, 2 active, 3 prepared",
            "2 active, 3 prepared",
            "2 active",
            "2 active, 4 prepared",
        ]
    );
    assert_eq!(root.roots.len(), 1);
}

#[tokio::test]
async fn a_record_that_is_missing_damaged_or_without_its_root_key_is_said() {
    let damaged = async |what: &str| {
        let plane = Plane::start().await;
        plane.create(&["web"]).await;
        step(&plane, AuthorityStep::Prepare).await;
        let Plane { control, dir } = plane;
        control.stop().await;
        rusqlite::Connection::open(dir.path().join("control.db")).unwrap().execute(what, []).unwrap();
        (start(config(dir.path().into())).await, dir)
    };
    let (gone, _dir) = damaged("DELETE FROM keys WHERE name = 'authority/generations'").await;
    let gone = gone.err().unwrap();
    assert!(matches!(gone, StartError::Authority(_)) && gone.help().unwrap().contains("from a copy"));
    assert_eq!(gone.to_string(), "the authority's stored keys do not fit together: the record of the roots is missing");
    let edited = "UPDATE keys SET bytes = zeroblob(400) WHERE name = 'authority/generations'";
    assert!(matches!(damaged(edited).await.0.err().unwrap(), StartError::Authority(_)));
    let (keyless, dir) = damaged("DELETE FROM keys WHERE name = 'authority/root/key'").await;
    let plane = Plane { control: keyless.expect("its intermediate signs without it"), dir };
    plane.agent("h1").await.issue("web/1").await.unwrap();
    step(&plane, AuthorityStep::Activate(2)).await;
    let chain = plane.agent("h1").await.issue("web/1").await.unwrap().chain_der;
    assert_eq!(chain.len(), 2, "nothing certifies it for those who hold the first root alone");
}

#[tokio::test]
async fn the_schedule_takes_every_step_by_itself_and_writes_it_down() {
    const DAY_MS: u64 = 24 * 60 * 60 * 1000;
    let dir = tempfile::tempdir().unwrap();
    let told = Arc::new(AtomicU64::new(now_ms()));
    let clock = Clock::from_fn({
        let told = told.clone();
        move || told.load(Ordering::Relaxed)
    });
    let trail = dir.path().join("trail");
    let begin = async |dir: tempfile::TempDir| {
        let config = countersign_control::ControlConfig { audit: Some(trail.clone()), ..config(dir.path().into()) };
        Plane { control: start_with_clock(config, clock.clone()).await.unwrap(), dir }
    };
    let mut plane = begin(dir).await;
    plane.create(&["web"]).await;
    let years = 7 * 365 * DAY_MS;
    let written = || -> Vec<String> {
        let trail = std::fs::read_to_string(&trail).unwrap();
        trail.lines().filter(|line| line.contains("a root of the trust domain moved on")).map(str::to_owned).collect()
    };
    for (after_ms, expected, steps) in [
        (0, "1 active", 0),
        (years, "1 active, 2 prepared", 1),
        (DAY_MS - 1, "1 active, 2 prepared", 1),
        (1, "1 old, 2 active", 2),
        (DAY_MS, "1 tainted, 2 active", 3),
        (2 * 60 * 60 * 1000, "2 active", 4),
        (DAY_MS, "2 active", 4),
    ] {
        let Plane { control, dir } = plane;
        control.stop().await;
        told.fetch_add(after_ms, Ordering::Relaxed);
        plane = begin(dir).await;
        let shown = async || {
            let states = states(&plane).await;
            states.iter().map(|(number, state)| format!("{number} {state}")).collect::<Vec<_>>().join(", ")
        };
        let begun = std::time::Instant::now();
        // Told once it is taken: it waits for no disk.
        while shown().await != expected || written().len() < steps {
            assert!(begun.elapsed() < support::WITHIN, "{expected} after {after_ms}, not {}", shown().await);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    let steps: Vec<String> = written();
    assert!(steps.len() == 4 && steps.iter().all(|line| line.contains("schedule")), "{steps:?}");
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}
