//! Identities that are revoked: nobody is let in by them from then on, everybody is told at once, and it is never forgotten too soon.

mod support;

use std::collections::BTreeSet;

use countersign_api::{
    local::{IdentityFilter, IdentityView, Problem, RevokeAs, Revoked, Shown, SignalWaited},
    mesh::{self, follow_event::Event, follow_request::Message as Said},
    svid::PeerSide,
};
use countersign_core::{
    canonical::Digest,
    signal::{Serial, SignalSeq},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use support::{Plane, name, trust_domain};
use tonic::Code;

async fn revoke(plane: &Plane, identities: IdentityFilter, reason: &str) -> Result<Revoked, Problem> {
    plane.post("/v1/identities/revoke", &RevokeAs { identities, reason: reason.into(), shown: Shown::default() }).await
}

fn of_service(service: &str) -> IdentityFilter {
    IdentityFilter { id: Some(trust_domain().workload(&name(service))), ..IdentityFilter::default() }
}

fn of_host(host: &str) -> IdentityFilter {
    IdentityFilter { host: Some(name(host)), ..IdentityFilter::default() }
}

fn serials(identities: &[IdentityView]) -> BTreeSet<Serial> {
    identities.iter().map(|one| one.serial).collect()
}

fn told(event: Event) -> (u64, BTreeSet<Serial>) {
    let Event::Signals(signals) = event else { panic!("{event:?}") };
    (signals.sequence, signals.revoked.iter().map(|one| Serial::from_der(&one.serial).unwrap()).collect())
}

#[tokio::test]
async fn a_revoked_identity_is_told_to_every_agent_and_waited_for_and_the_next_one_is_good() {
    let plane = Plane::start().await;
    plane.create(&["web", "db"]).await;
    let (mut one, mut two) = (plane.agent("h1").await, plane.agent("h2").await);
    for instance in ["web/1", "db/1"] {
        one.issue(instance).await.unwrap();
    }
    let revoked_chain = two.issue("web/2").await.unwrap().chain_der;
    let mut stream = one.follow(0, Digest::default()).await.unwrap();
    assert_eq!(stream.welcome().await.signals.unwrap().sequence, 0);
    stream.up("db/1", "127.0.0.1:9001").await;
    while !matches!(stream.news().await, Event::Discovery(_)) {}

    let before: Vec<IdentityView> = plane.get("/v1/identities").await;
    assert_eq!(before.len(), 6, "two agents, three workloads and the control plane");
    let web = revoke(&plane, of_service("web"), "a key was copied").await.unwrap();
    assert_eq!((web.signal, web.identities.len()), (SignalSeq(2), 2));
    assert!(web.identities.iter().all(|one| one.revoked.as_ref().is_some_and(|by| by.reason == "a key was copied")));
    assert_eq!(told(stream.news().await), (2, serials(&web.identities)));
    let again = revoke(&plane, of_service("web"), "once more").await.unwrap();
    assert_eq!(again.signal, SignalSeq(2), "what is revoked is revoked");
    assert_eq!(again.identities, web.identities, "by whoever did it first");

    let waited: SignalWaited = plane.get("/v1/signals/2/wait?timeout_ms=50").await;
    assert!(!waited.enforced && waited.missing.len() == 1, "{waited:?}");
    let waiting = plane.get::<SignalWaited>("/v1/signals/2/wait?timeout_ms=10000");
    let (waited, ()) = tokio::join!(waiting, async {
        let heeds = mesh::InstanceRevision { instance: "db/1".into(), signal_sequence: 2, ..Default::default() };
        stream.say(Said::Acknowledgement(mesh::Acknowledgement { instances: vec![heeds] })).await;
    });
    assert!(waited.enforced && waited.connected == 1, "{waited:?}");
    let far: SignalWaited = plane.get("/v1/signals/3/wait?timeout_ms=1").await;
    assert!(!far.enforced, "a signal that nobody gave");

    let next = two.issue("web/2").await.expect("a workload that is entitled gets another").chain_der;
    let chain = |der: &[bytes::Bytes]| der.iter().map(|der| CertificateDer::from(der.to_vec())).collect::<Vec<_>>();
    let mut heeds = countersign_core::signal::Signals::default();
    let welcome = two.follow(0, Digest::default()).await.unwrap().welcome().await;
    countersign_api::signals::take_in(&mut heeds, &welcome.signals.unwrap()).unwrap();
    two.identity.heed(heeds);
    let verify = |der: &[bytes::Bytes]| two.identity.verify(&chain(der), UnixTime::now(), PeerSide::Client);
    assert!(verify(&next).is_ok());
    assert!(verify(&revoked_chain).unwrap_err().to_string().contains("is revoked"));
}

/// PROVES (revoked-proves-nothing)
#[tokio::test]
async fn a_host_whose_identities_are_revoked_is_cut_off_and_gets_no_more_until_it_is_invited_again() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let (mut stolen, mut honest) = (plane.agent("h1").await, plane.agent("h2").await);
    let mut stream = stolen.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    stolen.issue("web/1").await.unwrap();
    let revoked = revoke(&plane, of_host("h1"), "stolen").await.unwrap();
    assert_eq!(revoked.identities.len(), 2, "the agent's and its workload's");
    let told_last = loop {
        match stream.next().await {
            Ok(Event::Signals(signals)) => assert_eq!(signals.sequence, 2, "it hears why"),
            Ok(_) => {}
            Err(status) => break status.code(),
        }
    };
    assert_eq!(told_last, Code::Aborted);
    assert_eq!(stolen.issue("web/1").await.unwrap_err().code(), Code::Unauthenticated, "on the connection that it has");
    let config = stolen.identity.client_config(trust_domain().control(), &[b"h2"]);
    let channel = plane.channel(config).await;
    let refused = match channel {
        Err(_) => true,
        Ok(channel) => {
            let mut client = mesh::mesh_client::MeshClient::new(channel);
            client.read_head(mesh::ReadHeadRequest::default()).await.is_err()
        }
    };
    assert!(refused, "on another one");
    assert!(honest.issue("web/2").await.is_ok());
    let mut invited = plane.agent("h1").await;
    assert!(invited.issue("web/1").await.is_ok());
}

/// PROVES (revocation-is-durable)
#[tokio::test]
async fn what_was_revoked_is_known_after_a_restart_before_anybody_is_let_in() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let stolen = plane.agent("h1").await;
    revoke(&plane, of_host("h1"), "stolen").await.unwrap();
    let plane = plane.restart().await.unwrap();
    let config = stolen.identity.client_config(trust_domain().control(), &[b"h2"]);
    if let Ok(channel) = plane.channel(config).await {
        let mut client = mesh::mesh_client::MeshClient::new(channel);
        assert!(client.read_head(mesh::ReadHeadRequest::default()).await.is_err());
    }
    let mut next = plane.agent("h2").await;
    let welcome = next.follow(0, Digest::default()).await.unwrap().welcome().await;
    let signals = welcome.signals.unwrap();
    assert_eq!((signals.sequence, signals.revoked.len(), signals.full), (1, 1, true));
    assert_eq!(welcome.head.unwrap().signal_sequence, 1);
}

#[tokio::test]
async fn the_control_planes_own_identity_is_replaced_when_it_is_revoked() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let control = IdentityFilter { id: Some(trust_domain().control()), ..IdentityFilter::default() };
    let revoked = revoke(&plane, control, "the machine was restored from a backup").await.unwrap();
    let old = serials(&revoked.identities);
    let renewed = async {
        loop {
            let now: Vec<IdentityView> = plane.get("/v1/identities").await;
            if now.iter().any(|one| one.id == trust_domain().control() && !old.contains(&one.serial)) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), renewed).await.expect("it has another");
    let mut agent = plane.agent("h1").await;
    let welcome = agent.follow(0, Digest::default()).await.unwrap().welcome().await;
    let mut heeds = countersign_core::signal::Signals::default();
    countersign_api::signals::take_in(&mut heeds, &welcome.signals.unwrap()).unwrap();
    agent.identity.heed(heeds);
    let config = agent.identity.client_config(trust_domain().control(), &[b"h2"]);
    let mut client = mesh::mesh_client::MeshClient::new(plane.channel(config).await.expect("whoever knows trusts it"));
    client.read_head(mesh::ReadHeadRequest::default()).await.unwrap();
}

#[tokio::test]
async fn what_does_not_say_which_or_why_or_means_nothing_revokes_nothing() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    plane.agent("h1").await.issue("web/1").await.unwrap();
    for (identities, reason, status, expected) in [
        (IdentityFilter::default(), "all of them", 422, "nothing says which identities are meant"),
        (of_service("web"), "", 422, "the reason is no line of text"),
        (of_service("web"), "two\nlines", 422, "the reason is no line of text"),
        (of_service("web"), &"x".repeat(257), 422, "the reason is no line of text"),
        (of_service("db"), "nobody", 404, "no identity that has not expired is meant"),
        (IdentityFilter { host: Some(name("h2")), ..of_service("web") }, "elsewhere", 404, "no identity"),
    ] {
        let refused = revoke(&plane, identities, reason).await.unwrap_err();
        assert_eq!(refused.status, status, "{reason}");
        assert!(refused.title.starts_with(expected) && refused.help.is_some(), "{refused:?}");
    }
    let now: Vec<IdentityView> = plane.get("/v1/identities").await;
    assert!(now.iter().all(|one| one.revoked.is_none()));
    let (status, _) = plane.send("GET", "/v1/identities?serial=xyz", Vec::new()).await;
    assert_eq!(status, 400);
}
