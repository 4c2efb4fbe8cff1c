//! What agents may and may not have of the control plane, over its real listener.

mod support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use countersign_api::{
    local::{
        Caller, DecisionDetail, EdgeView, EvictAs, Evicted, IdentityView, Invitation, Invite, Problem, RecordFilter,
        TailEvent, Waited,
    },
    mesh::{self, follow_event::Event, follow_request::Message as Said},
    svid::{PeerSide, verify_peer},
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, Revision},
    jwt_svid,
    ledger::{Batch, Follower, Snapshot},
    record::DecisionRecord,
    service::{FirstContact, Protocol, ServiceSpec},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use support::{Plane, csr, declare, identity, name, permit, trust_domain};
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
        let request = mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der, artifact: Bytes::new() };
        assert_eq!(agent.client.issue_x509_svid(request).await.unwrap_err().code(), Code::InvalidArgument, "{what}");
    }
    agent.issue("web/1").await.unwrap();
    let mut other = plane.agent("h2").await;
    assert_eq!(other.issue("web/1").await.unwrap_err().code(), Code::PermissionDenied, "an instance of another host");
}

/// PROVES (agent-speaks-for-its-host)
#[tokio::test]
async fn a_jwt_svid_names_a_workload_of_the_agents_own_host_to_those_that_it_asked_for() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let (mut agent, mut other) = (plane.agent("h1").await, plane.agent("h2").await);
    let token = agent.issue_jwt("web/1", &["orders", "billing"]).await.unwrap();
    let bundle = agent.identity.bundle();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let verify = |token: &str, audience: &str, now| {
        jwt_svid::verify(token, bundle.trust_domain(), &bundle.jwt_keys(), audience, now)
    };
    let svid = verify(&token, "orders", now).unwrap();
    assert_eq!(svid.id().as_str(), "spiffe://shop.example/web");
    assert_eq!(svid.claims().keys().collect::<Vec<_>>(), ["sub", "aud", "iat", "exp"]);
    assert!((now + 290..=now + 310).contains(&svid.expires_at_seconds()));
    assert!(verify(&token, "billing", now).is_ok() && verify(&token, "web", now).is_err());
    assert!(verify(&token, "orders", now + 310).is_err());
    let long = "a".repeat(513);
    for (case, instance, audience, code) in [
        ("nobody", "web/1", &[][..], Code::InvalidArgument),
        ("an empty name", "web/1", &[""], Code::InvalidArgument),
        ("a long name", "web/1", &[&long], Code::InvalidArgument),
        ("too many", "web/1", &["a", "b", "c", "d", "e", "f", "g", "h", "i"], Code::InvalidArgument),
        ("an undeclared service", "billing/1", &["orders"], Code::PermissionDenied),
        ("no instance", "web", &["orders"], Code::InvalidArgument),
    ] {
        assert_eq!(agent.issue_jwt(instance, audience).await.unwrap_err().code(), code, "{case}");
    }
    assert_eq!(other.issue_jwt("web/1", &["orders"]).await.unwrap_err().code(), Code::PermissionDenied);
    let plane = plane.restart().await.unwrap();
    let later = plane.agent("h3").await.issue_jwt("web/9", &["orders"]).await.unwrap();
    assert!(verify(&later, "orders", now).is_ok(), "the same keys sign and verify after a restart");
}

/// PROVES (agent-speaks-for-its-host)
#[tokio::test]
async fn a_workload_a_stranger_and_a_foreign_mesh_reach_nothing_of_the_mesh_service() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut stranger = mesh::mesh_client::MeshClient::new(plane.stranger().await);
    let ask = || mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der: csr().1, artifact: Bytes::new() };
    assert_eq!(stranger.issue_x509_svid(ask()).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(
        stranger.renew_agent(mesh::RenewAgentRequest { csr_der: csr().1 }).await.unwrap_err().code(),
        Code::Unauthenticated
    );

    let mut agent = plane.agent("h1").await;
    let (key, csr_der) = csr();
    let asked = mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der, artifact: Bytes::new() };
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

#[tokio::test]
async fn certificates_keep_to_x509_svid() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let svid = agent.issue("web/1").await.unwrap();
    let bundle = plane.bundle().await;
    let all = [svid.chain_der[0].to_vec(), svid.chain_der[1].to_vec(), bundle.authorities()[0].to_vec()];
    assert_eq!(svid.chain_der.len(), 2, "leaf and intermediate; the root is known");
    let mut subjects = std::collections::BTreeSet::new();
    for (der, uri, path_length) in [
        (&all[0], "spiffe://shop.example/web", None),
        (&all[1], "spiffe://shop.example", Some(0)),
        (&all[2], "spiffe://shop.example", Some(1)),
    ] {
        let (_, read) = x509_parser::parse_x509_certificate(der).unwrap();
        let names = read.subject_alternative_name().unwrap().unwrap();
        let [x509_parser::extensions::GeneralName::URI(found)] = names.value.general_names[..] else {
            panic!("{uri} has other names: {:?}", names.value)
        };
        assert_eq!(found, uri);
        assert!(subjects.insert(read.subject().to_string()), "every subject is its own: {subjects:?}");
        assert!(read.name_constraints().unwrap().is_none());
        let usage = read.key_usage().unwrap().unwrap();
        assert!(usage.critical);
        let limits = read.basic_constraints().unwrap().unwrap();
        match path_length {
            None => {
                assert!(!limits.value.ca);
                assert!(usage.value.digital_signature() && !usage.value.key_cert_sign() && !usage.value.crl_sign());
                let extended = read.extended_key_usage().unwrap().unwrap().value;
                assert!(extended.server_auth && extended.client_auth && !extended.any);
                let seconds = read.validity().not_after.timestamp() - read.validity().not_before.timestamp();
                assert!((3_600..=3_662).contains(&seconds), "an hour, and a minute for clocks that differ: {seconds}");
            }
            Some(length) => {
                assert!(limits.value.ca && limits.value.path_len_constraint == Some(length));
                assert!(usage.value.key_cert_sign() && !usage.value.digital_signature());
            }
        }
    }
}

fn record(id: &str, outcome: &str) -> (Bytes, DecisionRecord) {
    let record = serde_json::json!({
        "id": id, "at_ms": 5, "instance": "catalog/1", "revision": 1, "signal_seq": 0,
        "outcome": outcome, "reason": "no_policy_permits", "policies": [], "judged": "at_start",
        "ended": null, "trace_id": null, "judge_ns": 900,
        "inputs": {
            "principal": "spiffe://shop.example/web", "action": "http:GET", "service": "catalog", "path": "/items",
            "host": "catalog.mesh", "method": "GET", "protocol": "http", "size": null, "origin": "127.0.0.1", "now": 5,
            "first_contact": true,
        },
    });
    (record.to_string().into(), serde_json::from_value(record).unwrap())
}

#[tokio::test]
async fn denials_are_kept_hosts_are_asked_for_the_rest_and_a_report_that_cannot_be_read_is_counted() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let ((denial_json, denial), (permit_json, permit)) = (record("0a", "deny"), record("0b", "permit"));
    let records_json = vec![denial_json, Bytes::from_static(b"{"), vec![b'9'; 70_000].into()];
    stream.say(Said::Report(mesh::Report { records_json, ..Default::default() })).await;
    let kept = "countersign_control_store_job_seconds_count{job=\"put_report\"} 1";
    while !plane.metrics().await.contains(kept) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let asked = plane.get::<Vec<DecisionRecord>>("/v1/decisions?service=catalog&principal=web");
    let (found, ()) = tokio::join!(asked, async {
        let Event::RecordsQuery(query) = stream.news().await else { panic!("hosts are asked") };
        let filter: RecordFilter = serde_json::from_str(&query.filter_json).unwrap();
        assert_eq!(filter.principal.as_deref(), Some("web"));
        let (_, foreign) = record("0c", "deny");
        let foreign = serde_json::to_string(&foreign).unwrap().replace("\"catalog\"", "\"other\"");
        let records_json = vec![permit_json, foreign.into()];
        let answer = mesh::RecordsAnswer { query: query.query, records_json, last: true, error: String::new() };
        stream.say(Said::Records(answer)).await;
    });
    assert_eq!(found, [permit, denial.clone()], "newest first, and only what was asked for");

    let asked = plane.get::<DecisionDetail>("/v1/decisions/0a");
    let (detail, ()) = tokio::join!(asked, async {
        let Event::RecordsQuery(query) = stream.news().await else { panic!("hosts are asked") };
        let answer = mesh::RecordsAnswer { query: query.query, last: true, ..Default::default() };
        stream.say(Said::Records(answer)).await;
    });
    assert_eq!((detail.record, detail.mesh.revision), (denial, Revision(1)));

    let page = plane.metrics().await;
    for expected in [
        "countersign_control_denials_reported_total 1",
        "countersign_control_records_shed_total 2",
        "countersign_control_agents_connected 1",
        "countersign_control_ledger_entries 1",
        "countersign_control_svids_issued_total{kind=\"agent\"} 1",
        "countersign_control_store_job_seconds_bucket",
    ] {
        assert!(page.contains(expected), "{expected} is not in\n{page}");
    }
}

#[tokio::test]
async fn an_edge_that_is_held_is_listed_until_it_is_approved_and_one_of_another_mesh_under_its_own_name() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let mut spec = ServiceSpec::new(Protocol::Http);
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let reported = |at_ms: u64, principal: &str, path: &str, reason: &str, first: bool| -> Bytes {
        let (_, record) = record("0a", if reason == "permitted" { "permit" } else { "deny" });
        let mut json = serde_json::to_value(&record).unwrap();
        (json["at_ms"], json["reason"]) = (at_ms.into(), reason.into());
        (json["inputs"]["principal"], json["inputs"]["path"]) = (principal.into(), path.into());
        json["inputs"]["first_contact"] = first.into();
        json.to_string().into()
    };
    let web = "spiffe://shop.example/web";
    let records_json = vec![
        reported(5, web, "/items/4", "permitted", true),
        reported(6, web, "/items/5", "edge_held", true),
        reported(6, web, "/known", "permitted", false),
        reported(7, web, "/denied", "no_policy_permits", true),
        reported(8, "spiffe://other.example/web", "/items", "edge_held", false),
        reported(9, "spiffe://shop.example/gone", "/items", "edge_held", false),
    ];
    stream.say(Said::Report(mesh::Report { records_json, ..Default::default() })).await;
    let listed = async || -> Vec<String> {
        let edges: Vec<EdgeView> = plane.get("/v1/edges").await;
        let first = |view: &EdgeView| view.first_ms.map_or("-".to_owned(), |first_ms| first_ms.to_string());
        edges
            .iter()
            .map(|view| format!("{} to {}: {} {}", view.edge, view.service, view.standing, first(view)))
            .collect()
    };
    let begun = std::time::Instant::now();
    while listed().await.len() < 2 {
        assert!(begun.elapsed() < support::WITHIN, "{:?}", listed().await);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let foreign = "spiffe://other.example/web GET /items to catalog";
    assert_eq!(listed().await, ["web GET /items/* to catalog: open 5".to_owned(), format!("{foreign}: open 8")]);
    spec.first_contact = FirstContact::Hold;
    plane.apply(1, vec![Change::DeclareService { name: support::name("catalog"), spec }]).await.unwrap();
    assert_eq!(listed().await, ["web GET /items/* to catalog: held 5".to_owned(), format!("{foreign}: held 8")]);
    let edges: Vec<EdgeView> = plane.get("/v1/edges").await;
    let approve = |view: &EdgeView| Change::ApproveEdge { service: view.service.clone(), edge: view.edge.clone() };
    plane.apply(2, vec![approve(&edges[0])]).await.unwrap();
    assert_eq!(listed().await, ["web GET /items/* to catalog: approved 5".to_owned(), format!("{foreign}: held 8")]);
    let again = plane.apply(3, vec![approve(&edges[0])]).await.unwrap_err();
    assert!(again.detail.unwrap_or(again.title).contains("it is approved already"));
    let plane = plane.restart().await.unwrap();
    assert_eq!(plane.get::<Vec<EdgeView>>("/v1/edges").await.len(), 2, "they are kept");
}

/// PROVES (evicted-is-gone)
#[tokio::test]
async fn an_evicted_host_is_found_by_nobody_at_once_and_comes_back_by_a_new_invitation_alone() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let (mut bad, mut good) = (plane.agent("h1").await, plane.agent("h2").await);
    let mut watching = good.follow(0, Digest::default()).await.unwrap();
    watching.welcome().await;
    let mut stream = bad.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    bad.issue("web/1").await.unwrap();
    stream.up("web/1", "127.0.0.1:9").await;
    let discovered = async |watching: &mut support::Stream| loop {
        if let Event::Discovery(news) = watching.news().await {
            return (news.up.into_iter().map(|up| up.instance).collect::<Vec<_>>(), news.down);
        }
    };
    assert_eq!(discovered(&mut watching).await, (vec!["web/1".to_owned()], vec![]));
    let evict = async |host: &str, reason: &str| -> Result<Evicted, Problem> {
        let asked = EvictAs { host: name(host), reason: reason.into(), shown: Default::default() };
        plane.post("/v1/hosts/evict", &asked).await
    };
    assert_eq!(evict("h9", "x").await.unwrap_err().status, 404);
    assert_eq!(evict("h1", "").await.unwrap_err().status, 422);
    let evicted = evict("h1", "laptop stolen").await.unwrap();
    assert_eq!((evicted.identities, evicted.instances.len()), (2, 1));
    assert_eq!(
        discovered(&mut watching).await,
        (vec![], vec!["web/1".to_owned()]),
        "at once, without the grace of one that is away"
    );
    let end = async { while stream.next().await.is_ok() {} };
    tokio::time::timeout(support::WITHIN, end).await.expect("its stream ends");
    assert_eq!(bad.issue("web/1").await.unwrap_err().code(), Code::Unauthenticated);
    let renew = mesh::RenewAgentRequest { csr_der: csr().1 };
    assert_eq!(bad.client.renew_agent(renew).await.unwrap_err().code(), Code::Unauthenticated);
    let shown = plane.status().await.hosts.into_iter().find(|host| host.host == name("h1")).unwrap();
    assert_eq!(shown.refused.as_deref(), Some("evicted by local: laptop stolen"));
    good.issue("catalog/1").await.expect("the others go on");
    let mut back = plane.agent("h1").await;
    back.issue("web/1").await.unwrap();
    let mut stream = back.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    stream.up("web/1", "127.0.0.1:9").await;
    assert_eq!(discovered(&mut watching).await.0, ["web/1"]);
}

/// PROVES (interception-is-evident)
#[tokio::test]
async fn of_a_join_token_that_two_parties_show_nothing_stays_good_and_one_who_asks_again_with_its_key_keeps_what_it_has()
 {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let token = plane.invite(None).await.token;
    // Whoever intercepted it comes first, under a name of its own choice.
    let mut thief = plane.join(&token, "h9").await.unwrap();
    thief.issue("web/1").await.unwrap();
    let other = plane.agent("h2").await;
    let invited = plane.join(&token, "h1").await.err().unwrap();
    assert_eq!(invited.code(), Code::Unauthenticated);
    assert!(invited.message().contains("somebody else may have it"), "{invited:?}");
    assert_eq!(
        thief.issue("web/1").await.unwrap_err().code(),
        Code::Unauthenticated,
        "what was issued for it is revoked"
    );
    let identities: Vec<IdentityView> = plane.get("/v1/identities?host=h9").await;
    assert!(identities.len() == 2 && identities.iter().all(|one| one.revoked.is_some()), "{identities:?}");
    let by = identities[0].revoked.clone().unwrap();
    assert_eq!((&*by.by, &*by.reason), ("the join token", "its join token was shown a second time, by somebody else"));
    let mut other = other;
    other.issue("web/2").await.expect("nobody else is meant");
    assert_eq!(plane.join(&token, "h1").await.err().unwrap().code(), Code::Unauthenticated, "and it stays used");

    let token = plane.invite(None).await.token;
    let (key, csr_der) = csr();
    let join = async || {
        let asked = mesh::JoinRequest { token: token.clone(), host: "h3".into(), csr_der: csr_der.clone() };
        mesh::enrolment_client::EnrolmentClient::new(plane.stranger().await).join(asked).await
    };
    let svid = join().await.unwrap().into_inner().svid.unwrap();
    assert_eq!(join().await.err().unwrap().code(), Code::Unauthenticated);
    let channel = identity(svid, &key).client_config(trust_domain().control(), &[b"h2"]);
    let mut client = mesh::mesh_client::MeshClient::new(plane.channel(channel).await.unwrap());
    let asked = mesh::IssueX509SvidRequest { instance: "web/3".into(), csr_der: csr().1, artifact: Bytes::new() };
    client.issue_x509_svid(asked).await.expect("it did not hear the answer, and is the same");
}

#[tokio::test]
async fn a_restart_ends_the_streams_and_forgets_no_instance_while_agents_come_back() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let root = plane.status().await.root;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    stream.up("web/1", "127.0.0.1:9001").await;
    assert!(matches!(stream.news().await, Event::Discovery(_)));
    let plane = plane.restart().await.unwrap();
    loop {
        match stream.next().await {
            Ok(_) => {}
            Err(status) => break assert!(matches!(status.code(), Code::Aborted | Code::Unavailable | Code::Unknown)),
        }
    }
    // The SVID outlives the restart: nobody has to join again.
    let channel = plane.channel(agent.identity.client_config(trust_domain().control(), &[b"h2"])).await.unwrap();
    agent.client = mesh::mesh_client::MeshClient::new(channel);
    let mut stream = agent.follow(1, root).await.unwrap();
    let discovery = stream.welcome().await.discovery.unwrap();
    assert_eq!(discovery.up.iter().map(|up| up.instance.as_str()).collect::<Vec<_>>(), ["web/1"]);
}

/// PROVES (entitled-services)
#[tokio::test]
async fn a_host_gets_svids_of_the_services_it_was_invited_for_and_of_no_other() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let invite = |services: &[&str]| Invite {
        ttl_seconds: 60,
        host: Some(name("h1")),
        services: Some(services.iter().map(|service| name(service)).collect()),
    };
    let refused = plane.post::<Invitation>("/v1/hosts/invitations", &invite(&[])).await.unwrap_err();
    assert_eq!(refused.status, 422, "{refused:?}");
    let invitation: Invitation = plane.post("/v1/hosts/invitations", &invite(&["web"])).await.unwrap();
    let mut agent = plane.join(&invitation.token, "h1").await.unwrap();
    agent.issue("web/1").await.unwrap();
    let refused = agent.issue("catalog/1").await.unwrap_err();
    let why = "host `h1` was invited to run `web`, not `catalog`; a new invitation for it can name that";
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, why));

    // It can announce no instance of it either, and a restart of the control plane forgets nothing of this.
    let plane = plane.restart().await.unwrap();
    let channel = plane.channel(agent.identity.client_config(trust_domain().control(), &[b"h2"])).await.unwrap();
    agent.client = mesh::mesh_client::MeshClient::new(channel);
    assert_eq!(agent.issue("catalog/1").await.unwrap_err().message(), why);
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    stream.up("catalog/1", "127.0.0.1:9001").await;
    stream.up("web/1", "127.0.0.1:9002").await;
    let Event::Discovery(discovery) = stream.news().await else { panic!("discovery moved") };
    assert_eq!(discovery.up.iter().map(|up| up.instance.as_str()).collect::<Vec<_>>(), ["web/1"]);
    assert_eq!(plane.status().await.hosts[0].services, Some([name("web")].into()));

    let invitation: Invitation = plane.post("/v1/hosts/invitations", &invite(&["catalog", "web"])).await.unwrap();
    plane.join(&invitation.token, "h1").await.unwrap().issue("catalog/2").await.unwrap();
}

#[tokio::test]
async fn an_agent_renews_its_own_identity_and_nobody_elses() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let (key, csr_der) = csr();
    let renewed = agent.client.renew_agent(mesh::RenewAgentRequest { csr_der }).await.unwrap().into_inner();
    let renewed = identity(renewed, &key);
    assert_eq!(renewed.svid().id().as_str(), "spiffe://shop.example/countersign/agent/h1");
    assert_ne!(renewed.svid().chain()[0], agent.identity.svid().chain()[0]);
    // The new one opens what the old one did.
    let channel = plane.channel(renewed.client_config(trust_domain().control(), &[b"h2"])).await.unwrap();
    let mut again = mesh::mesh_client::MeshClient::new(channel);
    again.renew_agent(mesh::RenewAgentRequest { csr_der: csr().1 }).await.unwrap();
    let refused = again.renew_agent(mesh::RenewAgentRequest { csr_der: Bytes::from_static(b"no request") }).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
    // A stranger and a workload have none to renew.
    let mut stranger = mesh::mesh_client::MeshClient::new(plane.stranger().await);
    let refused = stranger.renew_agent(mesh::RenewAgentRequest { csr_der: csr().1 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let (key, csr_der) = csr();
    let request = mesh::IssueX509SvidRequest { instance: "web/1".into(), csr_der, artifact: Bytes::new() };
    let workload = identity(agent.client.issue_x509_svid(request).await.unwrap().into_inner(), &key);
    let channel = plane.channel(workload.client_config(trust_domain().control(), &[b"h2"])).await.unwrap();
    let mut workload = mesh::mesh_client::MeshClient::new(channel);
    let refused = workload.renew_agent(mesh::RenewAgentRequest { csr_der: csr().1 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

/// PROVES (fresh-by-asking)
#[tokio::test]
async fn what_control_holds_is_told_to_agents_that_ask() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    let welcomed = stream.welcome().await.head.unwrap();
    let mut ask = agent.client.clone();
    let mut head = async || ask.read_head(mesh::ReadHeadRequest::default()).await.unwrap().into_inner();
    assert_eq!(head().await, welcomed);
    plane.apply(1, vec![declare("catalog")]).await.unwrap();
    stream.up("web/1", "127.0.0.1:9001").await;
    while !matches!(stream.news().await, Event::Discovery(_)) {}
    let discovery_sequence = welcomed.discovery_sequence + 1;
    assert_eq!(head().await, mesh::Head { size: 2, discovery_sequence, signal_sequence: 0 });
    let mut stranger = mesh::mesh_client::MeshClient::new(plane.stranger().await);
    let refused = stranger.read_head(mesh::ReadHeadRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn permits_are_counted_by_caller_and_told_with_their_service() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let edge = |permits: u64| -> Bytes {
        let principal = "spiffe://shop.example/web";
        let edge = serde_json::json!({ "principal": principal, "service": "catalog", "action": "http:GET",
            "permits": permits, "revision": 1 });
        edge.to_string().into()
    };
    for permits in [2, 40] {
        stream.say(Said::Report(mesh::Report { edges_json: vec![edge(permits)], ..Default::default() })).await;
    }
    let deadline = tokio::time::Instant::now() + support::WITHIN;
    loop {
        let callers: Vec<Caller> = plane.get("/v1/services/catalog/callers").await;
        if let [caller] = &callers[..]
            && caller.permits == 42
        {
            assert_eq!((caller.principal.as_str(), caller.action.as_str()), ("spiffe://shop.example/web", "http:GET"));
            assert!(caller.seen_at_ms > 0);
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{callers:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(plane.get::<Vec<Caller>>("/v1/services/web/callers").await, []);
    assert_eq!(plane.send("GET", "/v1/services/NO/callers", Vec::new()).await.0, 400);
}

#[tokio::test]
async fn a_tail_tells_what_is_reported_while_it_is_open_and_what_was_asked_for_only() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let report =
        |id: &str| Said::Report(mesh::Report { records_json: vec![record(id, "deny").0], ..Default::default() });
    stream.say(report("0a")).await;
    let mut all = plane.tail("/v1/decisions/tail").await;
    let mut other = plane.tail("/v1/decisions/tail?service=other").await;
    stream.say(report("0b")).await;
    stream.say(report("0c")).await;
    let mut told = Vec::new();
    while told.last().map(String::as_str) != Some("0c") {
        match all.next().await {
            TailEvent::Record(record) => told.push(record.id.to_string()),
            event => panic!("{event:?}"),
        }
    }
    // The first may still have been on its way when the tail was opened.
    assert!(told.ends_with(&["0b".into(), "0c".into()]) && told.len() <= 3, "{told:?}");
    assert!(tokio::time::timeout(Duration::from_millis(200), other.next()).await.is_err(), "of another service");
}

/// PROVES (only-admitted-is-served)
#[tokio::test]
async fn what_no_deployment_admits_gets_no_svid_and_no_place_in_discovery() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let (mut agent, mut other) = (plane.agent("h1").await, plane.agent("h2").await);
    let (mut stream, mut listening) =
        (agent.follow(0, Digest::default()).await.unwrap(), other.follow(0, Digest::default()).await.unwrap());
    stream.welcome().await;
    listening.welcome().await;
    let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
    let up = |artifact: Option<Digest>, port: u16| {
        let artifact = artifact.map_or_else(Bytes::new, |artifact| Bytes::copy_from_slice(&artifact.0));
        let (instance, address) = ("web/1".to_owned(), format!("127.0.0.1:{port}"));
        Said::Up(mesh::InstanceUp { instance, address, ready: true, artifact, ..Default::default() })
    };
    agent.issue("web/1").await.unwrap();
    stream.say(up(Some(first), 9001)).await;
    let Event::Discovery(discovery) = listening.news().await else { panic!("discovery moved") };
    assert_eq!(discovery.up.len(), 1, "no deployment, so any executable");

    let deploy = |artifact: Digest| Change::Deploy { service: name("web"), artifacts: [artifact].into() };
    plane.apply(1, vec![deploy(second)]).await.unwrap();
    let Event::Entries(_) = listening.news().await else { panic!("the ledger grew") };
    let Event::Discovery(discovery) = listening.news().await else { panic!("discovery moved") };
    assert_eq!(discovery.down, ["web/1"], "what runs is no deployment: it leaves, whatever its agent does");
    let refused = agent.issue("web/1").await.unwrap_err();
    let why = "service `web` has deployments, and the agent did not say what it runs";
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, why));
    let refused = agent.issue_of("web/1", &first.0).await.unwrap_err();
    assert_eq!(refused.message(), format!("artifact {first} is no deployment of service `web`"));
    assert_eq!(agent.issue_of("web/1", &[1; 31]).await.unwrap_err().code(), Code::InvalidArgument);
    agent.issue("catalog/1").await.expect("another service is not concerned");

    stream.say(up(Some(first), 9002)).await;
    stream.say(up(None, 9002)).await;
    let waits = mesh::InstanceWaits {
        instance: "web/2".into(),
        artifact: Bytes::copy_from_slice(&first.0),
        reason: "it waits".into(),
    };
    stream.say(Said::Waits(waits)).await;
    stream.say(up(Some(second), 9003)).await;
    agent.issue_of("web/1", &second.0).await.unwrap();
    let Event::Discovery(discovery) = listening.news().await else { panic!("discovery moved") };
    assert_eq!(discovery.up[0].address, "127.0.0.1:9003", "nobody was sent to the others in between");
    let status = plane.status().await;
    let web = status.services.iter().find(|service| service.name == name("web")).unwrap();
    assert_eq!(web.instances.iter().map(|instance| instance.artifact).collect::<Vec<_>>(), [Some(second)]);
    let waiting: Vec<_> = web.waiting.iter().map(|w| (w.instance.as_str(), w.artifact, w.reason.as_str())).collect();
    assert_eq!(waiting, [("web/2", Some(first), "it waits")]);
    assert_eq!(web.deployments, [second].into());
}
