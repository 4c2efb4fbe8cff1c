//! Access tokens: which a workload is issued, how they are taken back, and what happens when somebody shows one that is not theirs.

mod support;

use countersign_api::{
    local::{
        IdentityFilter, InspectToken, KeyReplaced, Problem, ReplaceKeyAs, RevokeAs, RevokeTokensAs, Revoked, Shown,
        SignalWaited, SigningKeys, TokenInspected, TokenView, TokensRevoked,
    },
    mesh::{self, IssuedToken, follow_event::Event, follow_request::Message as Said},
    svid::Bundle,
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change},
    identity::InstanceId,
    jws::{Presented, Typ},
    record::DecisionRecord,
    service::{Protocol, ServiceSpec, Tokens},
    signal::SignalSeq,
    token::{self, Claims, Thumbprint, TokenFault},
};
use support::{Agent, Plane, declare, name, trust_domain};
use tonic::Code;

const POLICIES: [(&str, &str); 2] = [
    ("web-reads", r#"permit (principal == Workload::"web", action in Action::"read", resource in Service::"orders");"#),
    ("no-heads", r#"forbid (principal, action == Action::"http:HEAD", resource in Service::"orders");"#),
];

fn declared(service: &str, upstreams: &[&str], tokens: Tokens) -> Change {
    let upstreams = upstreams.iter().map(|upstream| name(upstream)).collect();
    Change::DeclareService {
        name: name(service),
        spec: ServiceSpec { upstreams, tokens, ..ServiceSpec::new(Protocol::Http) },
    }
}

/// `web` calls `orders`, which demands tokens, and `free`, which does not. `cron` calls nobody.
async fn mesh() -> Plane {
    let plane = Plane::start().await;
    let mut bodies = Bodies::default();
    let mut changes = vec![
        Change::CreateMesh { trust_domain: trust_domain() },
        declared("orders", &[], Tokens::Required),
        declared("free", &[], Tokens::Optional),
        declared("web", &["orders", "free"], Tokens::Optional),
        declare("cron"),
    ];
    for (id, text) in POLICIES {
        let body = bodies.insert(format!("@id(\"{id}\")\n{text}"));
        changes.push(Change::SetPolicy { id: id.into(), file: "policies/shop.cedar".into(), body });
    }
    plane.apply_with(0, changes, bodies).await.unwrap();
    plane
}

async fn leaf(agent: &mut Agent, instance: &str) -> Vec<u8> {
    agent.issue(instance).await.unwrap().chain_der[0].to_vec()
}

fn claims(issued: &IssuedToken) -> Claims {
    let claims = Presented::parse_as(&issued.token, Typ::Access).unwrap().into_signed().0;
    serde_json::from_value(claims.into()).unwrap()
}

async fn revoke(plane: &Plane, meant: &str) -> Result<TokensRevoked, Problem> {
    let meant = meant.parse().unwrap();
    plane.post("/v1/tokens/revoke", &RevokeTokensAs { meant, reason: "lost".into(), shown: Shown::default() }).await
}

/// PROVES (token-follows-policy)
#[tokio::test]
async fn a_workload_gets_tokens_for_what_policies_permit_it_at_the_upstreams_that_demand_them_and_for_nothing_else() {
    let plane = mesh().await;
    let (mut one, mut two) = (plane.agent("h1").await, plane.agent("h2").await);
    let issued = one.issue("web/1").await.unwrap();
    let (web, bundle) = (issued.chain_der[0].to_vec(), Bundle::from_message(&issued.bundle.unwrap()).unwrap());
    let tokens = one.issue_tokens("web/1", &web).await.unwrap();
    assert_eq!(tokens.iter().map(|token| &*token.service).collect::<Vec<_>>(), ["orders"]);
    let said = claims(&tokens[0]);
    assert_eq!(said.scope.to_string(), "http:GET http:OPTIONS http:PROPFIND http:QUERY http:REPORT http:SEARCH");
    assert_eq!(
        (&said.client_id, said.instance.as_ref().map(InstanceId::as_str), said.family),
        (&said.subject, Some("web/1"), said.id)
    );
    assert_eq!(said.expires_at - said.issued_at, 300);
    let authorities = bundle.token_authorities().ready();
    let (own, now) = (trust_domain(), said.issued_at);
    let verified = token::verify(&tokens[0].token, &authorities, &own.workload(&name("orders")), now).unwrap();
    assert_eq!(verified.fault_of(&own.workload(&name("web")), &Thumbprint::of_certificate(&web), now), None);
    let svids = countersign_core::jwt_svid::verify(&tokens[0].token, &own, &bundle.jwt_keys(), "x", now);
    assert!(svids.is_err(), "it is no JWT-SVID");

    let again = claims(&one.issue_tokens("web/1", &web).await.unwrap()[0]);
    assert_eq!((again.family, again.id != said.id), (said.id, true), "the next is of the same family");
    let renewed = leaf(&mut one, "web/1").await;
    let next = claims(&one.issue_tokens("web/1", &renewed).await.unwrap()[0]);
    assert_eq!(next.family, next.id, "another certificate begins another");

    let (cron, elsewhere) = (leaf(&mut one, "cron/1").await, leaf(&mut two, "web/2").await);
    assert!(one.issue_tokens("cron/1", &cron).await.unwrap().is_empty(), "it declares no upstreams");
    for (case, instance, leaf) in [
        ("of another instance", "web/1", &cron),
        ("of another host", "web/2", &elsewhere),
        ("that is none", "web/1", &vec![7; 100]),
        ("that is empty", "web/1", &Vec::new()),
    ] {
        let refused = one.issue_tokens(instance, leaf).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "a certificate {case}: {refused}");
    }
    let meant = IdentityFilter { id: Some(own.workload(&name("web"))), ..IdentityFilter::default() };
    let asked = RevokeAs { identities: meant, reason: "lost".into(), shown: Shown::default() };
    plane.post::<Revoked>("/v1/identities/revoke", &asked).await.unwrap();
    let refused = one.issue_tokens("web/1", &web).await.unwrap_err();
    assert!(refused.message().contains("revoked"), "{refused}");

    // What is not permitted any more is in no token from then on.
    plane.apply(1, vec![Change::RemovePolicy { id: "web-reads".into() }]).await.unwrap();
    let renewed = leaf(&mut one, "web/1").await;
    assert!(claims(&one.issue_tokens("web/1", &renewed).await.unwrap()[0]).scope.is_empty());
}

#[tokio::test]
async fn revoked_tokens_are_told_to_every_agent_and_stay_revoked_and_what_is_issued_later_is_good() {
    let plane = mesh().await;
    let mut agent = plane.agent("h1").await;
    let web = leaf(&mut agent, "web/1").await;
    let first = claims(&agent.issue_tokens("web/1", &web).await.unwrap()[0]);
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    assert!(stream.welcome().await.signals.unwrap().tokens_revoked.is_empty());
    stream.up("web/1", "127.0.0.1:9001").await;
    while !matches!(stream.news().await, Event::Discovery(_)) {}

    let revoked = revoke(&plane, "subject:web").await.unwrap();
    let Event::Signals(told) = stream.news().await else { panic!("no signals") };
    assert_eq!((told.sequence, &*told.tokens_revoked[0].meant), (revoked.signal.0, "subject:web"));
    assert!(told.tokens_revoked[0].issued_until_ms >= first.id.issued_at_ms());
    let waited: SignalWaited = plane.get(&format!("/v1/signals/{}/wait?timeout_ms=50", revoked.signal.0)).await;
    assert!(!waited.enforced);
    let enforces = mesh::InstanceRevision {
        instance: "web/1".into(),
        revision: 1,
        signal_sequence: revoked.signal.0,
        ..Default::default()
    };
    stream.say(Said::Acknowledgement(mesh::Acknowledgement { instances: vec![enforces] })).await;
    let waited: SignalWaited = plane.get(&format!("/v1/signals/{}/wait", revoked.signal.0)).await;
    assert!(waited.enforced);

    tokio::time::sleep(std::time::Duration::from_millis(2)).await; // issued in another millisecond
    let second = claims(&agent.issue_tokens("web/1", &web).await.unwrap()[0]);
    let listed: Vec<TokenView> = plane.get("/v1/tokens?subject=web").await;
    let states: Vec<_> = listed.iter().map(|one| (one.id, one.revoked)).collect();
    assert_eq!(states, [(second.id, false), (first.id, true)]);
    assert_eq!(plane.get::<Vec<TokenView>>("/v1/tokens?service=free").await, []);
    drop((stream, agent));

    let plane = plane.restart().await.unwrap();
    let listed: Vec<TokenView> = plane.get("/v1/tokens").await;
    assert_eq!(listed.iter().map(|one| one.revoked).collect::<Vec<_>>(), [false, true]);
    let mut reason = RevokeTokensAs { meant: "all".parse().unwrap(), reason: String::new(), shown: Shown::default() };
    assert_eq!(plane.post::<TokensRevoked>("/v1/tokens/revoke", &reason).await.unwrap_err().status, 422);
    reason.reason = "everything".into();
    assert_eq!(plane.post::<TokensRevoked>("/v1/tokens/revoke", &reason).await.unwrap().signal, SignalSeq(2));
    assert!(plane.get::<Vec<TokenView>>("/v1/tokens").await.iter().all(|one| one.revoked));
}

#[tokio::test]
async fn a_token_that_somebody_else_shows_takes_its_family_with_it() {
    let plane = mesh().await;
    let mut agent = plane.agent("h1").await;
    let web = leaf(&mut agent, "web/1").await;
    let stolen = claims(&agent.issue_tokens("web/1", &web).await.unwrap()[0]);
    let next = claims(&agent.issue_tokens("web/1", &web).await.unwrap()[0]);
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let report_at = |at_ms: u64, fault: TokenFault, id: &str| {
        let record = serde_json::json!({
            "id": format!("{:032x}", fastrand::u128(..)), "at_ms": at_ms, "instance": "orders/1", "revision": 1, "signal_seq": 0,
            "outcome": "deny", "reason": "token_refused", "policies": [], "judged": "at_start", "ended": null,
            "trace_id": null, "judge_ns": 1,
            "inputs": {
                "principal": "spiffe://shop.example/cron", "action": "http:GET", "service": "orders", "path": "/",
                "host": "orders.mesh", "method": "GET", "protocol": "http", "size": null, "origin": "10.0.0.9", "now": 1,
                "first_contact": false, "token": { "id": id, "fault": fault, "scope": "", "issued_at": 1 },
            },
        });
        let _: DecisionRecord = serde_json::from_value(record.clone()).unwrap();
        let records_json = vec![record.to_string().into()];
        Said::Report(mesh::Report { records_json, ..mesh::Report::default() })
    };
    let report = |fault, id: &str| report_at(1, fault, id);
    // What an honest sidecar may come with is no theft, and what nobody was issued is none of ours.
    stream.say(report(TokenFault::Expired, &stolen.id.to_string())).await;
    stream.say(report(TokenFault::AnotherKey, &"7".repeat(32))).await;
    stream.say(report(TokenFault::AnotherKey, &stolen.id.to_string())).await;
    let Event::Signals(told) = stream.news().await else { panic!("no signals") };
    assert_eq!((told.sequence, &*told.tokens_revoked[0].meant), (1, &*format!("family:{}", stolen.family)));
    let listed: Vec<TokenView> = plane.get("/v1/tokens").await;
    assert!(listed.iter().all(|one| one.revoked) && listed.iter().any(|one| one.id == next.id));

    // Whom the revocation did not reach shows what its holder has no more; at the moment of it, the holder may have.
    let (now_ms, id) = (told.tokens_revoked[0].issued_until_ms, next.id.to_string());
    stream.say(report_at(now_ms + 30_000, TokenFault::Revoked, &id)).await;
    stream.say(report_at(now_ms + 30_001, TokenFault::Revoked, &id)).await;
    stream.say(report_at(now_ms + 30_002, TokenFault::AnotherKey, &id)).await;
    let stolen = "countersign_control_tokens_stolen_total 2";
    while !plane.metrics().await.contains(stolen) {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    stream.say(report_at(now_ms + 30_003, TokenFault::Revoked, &id)).await;
    revoke(&plane, "all").await.unwrap();
    while !matches!(stream.news().await, Event::Signals(_)) {}
    assert!(plane.metrics().await.contains(stolen), "each is told once");
}

#[tokio::test]
async fn a_token_is_explained_with_why_nobody_believes_it() {
    let plane = mesh().await;
    let mut agent = plane.agent("h1").await;
    let web = leaf(&mut agent, "web/1").await;
    let good = agent.issue_tokens("web/1", &web).await.unwrap().remove(0).token;
    let svid = agent.issue_jwt("web/1", &["orders"]).await.unwrap();
    let inspect = async |token: &str| {
        let asked = InspectToken { token: token.into() };
        plane.post::<TokenInspected>("/v1/tokens/inspect", &asked).await.unwrap()
    };
    let found = inspect(&good).await;
    assert_eq!((found.fault, found.issued.unwrap().instance.unwrap().as_str()), (None, "web/1"));
    assert_eq!((&found.header["alg"], &found.claims["aud"]), (&"ES256".into(), &"spiffe://shop.example/orders".into()));
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let other = signature.replacen(&signature[..1], if signature.starts_with('A') { "B" } else { "A" }, 1);
    let forged = inspect(&format!("{signed}.{other}")).await;
    assert_eq!((forged.fault, forged.issued), (Some(TokenFault::Signature), None));
    let of_another_kind = inspect(&svid).await;
    assert_eq!((of_another_kind.fault, &of_another_kind.header["typ"]), (Some(TokenFault::Malformed), &"JWT".into()));
    for nonsense in ["", "x", "a.b.c", &"9".repeat(40_000)] {
        let found = inspect(nonsense).await;
        assert_eq!((found.fault, found.header.is_null()), (Some(TokenFault::Malformed), true));
    }
    revoke(&plane, "subject:web").await.unwrap();
    let revoked = inspect(&good).await;
    assert_eq!((revoked.fault, revoked.issued.unwrap().revoked), (Some(TokenFault::Revoked), true));
}

#[tokio::test]
async fn another_key_signs_without_a_failed_request_and_a_compromised_one_verifies_nothing_from_then_on() {
    let plane = mesh().await;
    let mut agent = plane.agent("h1").await;
    let web = leaf(&mut agent, "web/1").await;
    let replace = async |compromised| {
        let asked = ReplaceKeyAs { keys: SigningKeys::Tokens, compromised, shown: Shown::default() };
        plane.post::<KeyReplaced>("/v1/authority/keys", &asked).await
    };
    let bundle =
        async |agent: &mut Agent| Bundle::from_message(&agent.issue("web/1").await.unwrap().bundle.unwrap()).unwrap();
    let verifies = |bundle: &Bundle, token: &str| {
        let (authorities, now) = (bundle.token_authorities().ready(), time::OffsetDateTime::now_utc().unix_timestamp());
        token::verify(token, &authorities, &trust_domain().workload(&name("orders")), now).is_ok()
    };
    let known = bundle(&mut agent).await;
    let first = agent.issue_tokens("web/1", &web).await.unwrap().remove(0).token;
    let replaced = replace(false).await.unwrap();
    assert_eq!(replaced.signal, None);
    let second = agent.issue_tokens("web/1", &web).await.unwrap().remove(0).token;
    let kid = |token: &str| Presented::parse_as(token, Typ::Access).unwrap().key_id().unwrap().to_owned();
    assert_eq!((kid(&first), kid(&second)), (replaced.replaced.clone(), replaced.key_id.clone()));
    assert!(verifies(&known, &second), "whoever has not heard of it yet knows the key");
    assert!(verifies(&bundle(&mut agent).await, &first), "what was signed before is good");
    let refused = replace(false).await.unwrap_err();
    assert_eq!(refused.status, 409, "{refused:?}");
    assert!(refused.help.unwrap().starts_with("ask again in "));

    let plane = mesh().await;
    let mut agent = plane.agent("h1").await;
    let web = leaf(&mut agent, "web/1").await;
    let stolen = agent.issue_tokens("web/1", &web).await.unwrap().remove(0).token;
    let asked = ReplaceKeyAs { keys: SigningKeys::Tokens, compromised: true, shown: Shown::default() };
    let replaced: KeyReplaced = plane.post("/v1/authority/keys", &asked).await.unwrap();
    assert_eq!(replaced.signal, Some(SignalSeq(1)), "agents ask for others at once");
    let known = bundle(&mut agent).await;
    assert!(!verifies(&known, &stolen));
    let next = agent.issue_tokens("web/1", &web).await.unwrap().remove(0).token;
    assert!(verifies(&known, &next));
}

/// PROVES (issued-to-what-runs)
#[tokio::test]
async fn what_was_issued_to_an_instance_is_revoked_when_it_ends_by_the_word_of_its_own_host_alone() {
    let plane = mesh().await;
    let (mut one, mut two) = (plane.agent("h1").await, plane.agent("h2").await);
    let (first, second) = (leaf(&mut one, "web/1").await, leaf(&mut one, "web/2").await);
    let tokens = [
        claims(&one.issue_tokens("web/1", &first).await.unwrap()[0]),
        claims(&one.issue_tokens("web/2", &second).await.unwrap()[0]),
    ];
    let mut stream = one.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let mut liar = two.follow(0, Digest::default()).await.unwrap();
    liar.welcome().await;
    let down = |instance: &str, ended| {
        let (instance, reason) = (instance.into(), "stopped".into());
        Said::Down(mesh::InstanceDown { instance, reason, ended })
    };
    let mut held = countersign_core::signal::Signals::default();
    liar.say(down("web/2", true)).await;
    stream.say(down("web/1", false)).await;
    stream.say(down("web/1", true)).await;
    let serial = |leaf: &[u8]| countersign_control::tokens::Leaf::read(leaf).unwrap().0;
    while !held.is_revoked(&serial(&first)) || !held.is_token_revoked(&tokens[0]) {
        if let Event::Signals(signals) = stream.news().await {
            countersign_api::signals::take_in(&mut held, &signals).unwrap();
        }
    }
    assert!(!held.is_revoked(&serial(&second)) && !held.is_token_revoked(&tokens[1]), "a host speaks for its own");
    let listed: Vec<TokenView> = plane.get("/v1/tokens?subject=web").await;
    let good: Vec<_> =
        listed.iter().filter(|one| !one.revoked).map(|one| one.instance.clone().unwrap().to_string()).collect();
    assert_eq!(good, ["web/2"], "there are tokens of what runs alone");
    let next = leaf(&mut one, "web/1").await;
    let next = claims(&one.issue_tokens("web/1", &next).await.unwrap()[0]);
    assert!(!held.is_token_revoked(&next), "it may come back");
}
