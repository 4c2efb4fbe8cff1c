//! What agents may and may not have of the control plane, over its real listener.

mod support;

use std::time::Duration;

use bytes::Bytes;
use countersign_api::{
    local::Waited,
    mesh::{self, follow_event::Event, follow_request::Message as Said},
    svid::{PeerSide, verify_peer},
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Revision},
    ledger::{Batch, Follower, Snapshot},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use support::{Plane, csr, declare, identity, permit, trust_domain};
use tonic::Code;

fn follower(snapshot: mesh::Snapshot) -> Follower {
    let mut bodies = Bodies::default();
    for text in snapshot.bodies {
        bodies.insert(text);
    }
    Follower::from_snapshot(&Snapshot {
        revision: Revision(snapshot.revision),
        state: snapshot.state_json.to_vec(),
        frontier: snapshot.frontier.iter().map(|part| part.to_vec()).collect(),
        last_entry: snapshot.last_entry.to_vec(),
        bodies,
    })
    .unwrap()
}

fn extend(follower: &mut Follower, entries: &mesh::Entries) {
    let mut bodies = Bodies::default();
    for text in &entries.bodies {
        bodies.insert(text.clone());
    }
    let root = Digest(entries.root[..].try_into().unwrap());
    let batch = Batch {
        first_index: entries.first_index,
        entries: &entries.entries,
        change_sets: &entries.change_sets,
        bodies: &bodies,
        size: entries.size,
        root,
    };
    follower.extend(&batch).unwrap();
}

#[tokio::test]
async fn an_agent_joins_gets_svids_follows_and_its_acknowledgement_ends_the_wait() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let (change, bodies) = permit("web-reads-catalog", "web", "catalog");
    plane.apply_with(1, vec![change], bodies).await.unwrap();

    let mut agent = plane.agent("h1").await;
    let svid = agent.issue("web/1").await.unwrap();
    let chain: Vec<_> = svid.chain_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let peer = verify_peer(&chain, &plane.bundle().await, UnixTime::now(), PeerSide::Client).unwrap();
    assert_eq!(peer.id().as_str(), "spiffe://shop.example/web");

    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    let welcome = stream.welcome().await;
    let mut held = follower(welcome.snapshot.unwrap());
    extend(&mut held, &welcome.entries.unwrap());
    assert_eq!(held.revision(), Revision(2));
    assert_eq!(held.root(), plane.status().await.root);
    assert!(welcome.bundle.is_some());
    assert!(welcome.discovery.unwrap().full);

    stream.up("web/1", "127.0.0.1:9001").await;
    let Event::Discovery(discovery) = stream.news().await else { panic!("discovery moved") };
    assert_eq!(discovery.up.len(), 1);
    stream.acknowledge("web/1", 2).await;

    plane.apply(2, vec![declare("payments")]).await.unwrap();
    let Event::Entries(entries) = stream.news().await else { panic!("the ledger grew") };
    extend(&mut held, &entries);
    assert_eq!(held.revision(), Revision(3));

    let waited: Waited = plane.get("/v1/changes/3/wait?timeout_ms=50").await;
    assert!(!waited.enforced && waited.missing[0].revision == Revision(2), "{waited:?}");
    let waiting = plane.get::<Waited>("/v1/changes/3/wait?timeout_ms=5000");
    let (waited, ()) = tokio::join!(waiting, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.acknowledge("web/1", 3).await;
    });
    assert!(waited.enforced && waited.connected == 1, "{waited:?}");

    let status = plane.status().await;
    assert_eq!(status.hosts.len(), 1);
    assert!(status.hosts[0].connected && !status.protected);
    let web = status.services.iter().find(|service| service.name.as_str() == "web").unwrap();
    assert_eq!(web.instances[0].revision, Revision(3));
    assert!(web.instances[0].svid_expires_at_ms > 0);
    let catalog = status.services.iter().find(|service| service.name.as_str() == "catalog").unwrap();
    assert_eq!(catalog.policies, ["web-reads-catalog"]);
}

#[tokio::test]
async fn a_join_token_that_is_used_foreign_malformed_or_for_another_host_is_refused() {
    let plane = Plane::start().await;
    let token = plane.invite(Some("h1")).await.token;
    let refused = |status: Result<support::Agent, tonic::Status>| status.err().expect("refused").code();
    assert_eq!(refused(plane.join(&token, "h2").await), Code::PermissionDenied, "another host");
    plane.join(&token, "h1").await.expect("an attempt for another host does not use it up");
    assert_eq!(refused(plane.join(&token, "h1").await), Code::Unauthenticated, "used");

    let good = plane.invite(None).await.token;
    let parts: Vec<&str> = good.split('.').collect();
    for (token, what) in [
        (String::new(), "empty"),
        ("csj1..".into(), "empty parts"),
        (format!("csj2.{}.{}", parts[1], parts[2]), "another format"),
        (format!("csj1.{}.{}", parts[2], parts[2]), "a secret nobody gave out"),
        (format!("csj1.{}.{}", parts[1], parts[1]), "another root"),
        (format!("csj1.{}.{}.x", parts[1], parts[2]), "a part too many"),
        ("a".repeat(10_000), "long"),
    ] {
        assert_eq!(refused(plane.join(&token, "h1").await), Code::Unauthenticated, "{what}");
    }
    assert_eq!(refused(plane.join(&good, "not a label").await), Code::InvalidArgument, "host");
    plane.join(&good, "h3").await.expect("what was refused did not use it up");
}

#[tokio::test]
async fn an_svid_is_signed_only_for_a_declared_service_and_a_sound_request() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    for (instance, code) in [
        ("payments/1", Code::PermissionDenied),
        ("countersign/1", Code::InvalidArgument),
        ("web", Code::InvalidArgument),
        ("web/../1", Code::InvalidArgument),
        ("", Code::InvalidArgument),
    ] {
        assert_eq!(agent.issue(instance).await.unwrap_err().code(), code, "{instance}");
    }
    let (_, good) = csr();
    let mut forged = good.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let p384 = {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        Bytes::copy_from_slice(rcgen::CertificateParams::default().serialize_request(&key).unwrap().der())
    };
    for (csr_der, what) in
        [(Bytes::new(), "empty"), (forged.into(), "forged"), (p384, "another curve"), (vec![0; 9000].into(), "long")]
    {
        let request = mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der };
        assert_eq!(agent.client.issue_x509_svid(request).await.unwrap_err().code(), Code::InvalidArgument, "{what}");
    }
    agent.issue("web/1").await.unwrap();
    let mut other = plane.agent("h2").await;
    assert_eq!(other.issue("web/1").await.unwrap_err().code(), Code::PermissionDenied, "an instance of another host");
}

/// PROVES (agent-speaks-for-its-host)
#[tokio::test]
async fn a_workload_a_stranger_and_a_foreign_mesh_reach_nothing_of_the_mesh_service() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut stranger = mesh::mesh_client::MeshClient::new(plane.stranger().await);
    let ask = || mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der: csr().1 };
    assert_eq!(stranger.issue_x509_svid(ask()).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(
        stranger.renew_agent(mesh::RenewAgentRequest { csr_der: csr().1 }).await.unwrap_err().code(),
        Code::Unauthenticated
    );

    let mut agent = plane.agent("h1").await;
    let (key, csr_der) = csr();
    let asked = mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der };
    let svid = agent.client.issue_x509_svid(asked).await.unwrap().into_inner();
    let workload = identity(svid, &key).client_config(trust_domain().control(), &[b"h2"]);
    let mut workload = mesh::mesh_client::MeshClient::new(plane.channel(workload).await.unwrap());
    assert_eq!(workload.issue_x509_svid(ask()).await.unwrap_err().code(), Code::PermissionDenied);

    // The same names, another root: the handshake itself fails.
    let other = Plane::start().await;
    other.create(&["web"]).await;
    let foreign = other.agent("h1").await;
    let foreign_svid = foreign.identity.svid();
    assert_eq!(foreign_svid.id().as_str(), "spiffe://shop.example/countersign/agent/h1");
    foreign.identity.trust(plane.bundle().await); // it trusts us; we do not trust it
    let config = foreign.identity.client_config(trust_domain().control(), &[b"h2"]);
    let answer = match plane.channel(config).await {
        Err(_) => return, // refused while connecting
        Ok(channel) => mesh::mesh_client::MeshClient::new(channel).issue_x509_svid(ask()).await,
    };
    assert_eq!(answer.unwrap_err().code(), Code::Unknown, "the connection was cut in its handshake");
}

/// PROVES (agent-speaks-for-its-host)
#[tokio::test]
async fn an_agent_speaks_for_its_own_host_and_says_hello_first() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let early = agent.follow_saying(Said::Down(mesh::InstanceDown::default())).await;
    assert_eq!(early.err().unwrap().code(), Code::InvalidArgument);
    agent.host = "h2".into();
    assert_eq!(agent.follow(0, Digest::default()).await.err().unwrap().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn an_agent_with_another_history_is_refused_and_one_that_is_behind_gets_what_it_lacks() {
    let plane = Plane::start().await;
    plane.create(&["a"]).await;
    let first = plane.status().await.root;
    for base in 1..20 {
        plane.apply(base, vec![declare(&format!("s{base}"))]).await.unwrap();
    }
    let mut agent = plane.agent("h1").await;
    assert_eq!(agent.follow(1, Digest([7; 32])).await.err().unwrap().code(), Code::FailedPrecondition, "forked");
    assert_eq!(agent.follow(21, first).await.err().unwrap().code(), Code::FailedPrecondition, "rolled back");
    let mut stream = agent.follow(1, first).await.unwrap();
    let welcome = stream.welcome().await;
    assert!(welcome.snapshot.is_none());
    let entries = welcome.entries.unwrap();
    assert_eq!((entries.first_index, entries.size, entries.entries.len()), (1, 20, 19));
}
