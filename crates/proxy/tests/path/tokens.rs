//! Access tokens on the mesh hop: attached by the caller's sidecar, verified and taken away by the callee's, and seen by neither workload.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use countersign_api::svid::{Bundle, JwtAuthority, TokenAuthorities, X509Svid};
use countersign_core::{
    record::{End, Judged, Outcome, Reason},
    service::{
        Protocol::{self, Http, Tcp},
        Tokens,
    },
    signal::{Signal, SignalSeq, Signals, TokenRevocation},
    token::{Thumbprint, TokenFault, TokenId},
};
use countersign_proxy::{AttachedToken, TokensByService};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use serde_json::json;
use time::OffsetDateTime;

use crate::{
    mesh::{Authority, EVERYONE, Plan, Sidecar, name, open, trust_domain},
    workload::Workload,
};

const SERVICES: &[(&str, Protocol)] = &[("web", Http), ("cron", Http), ("catalog", Http), ("db", Tcp)];
const ISSUER: &str = "https://shop.example";
const RENEWALS: usize = 600;

/// A mesh whose catalog demands tokens, and whoever signs them.
struct Mesh {
    authority: Authority,
    key: EcdsaKeyPair,
    web: Sidecar,
    cron: Sidecar,
    catalog: Sidecar,
    plan: Plan,
    said: Mutex<(u64, Signals)>,
}

fn now_ms() -> u64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as u64
}

impl Mesh {
    async fn new(tokens: Tokens) -> Self {
        let app = Workload::http().await;
        let (authority, key) =
            (Authority::new("root"), EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap());
        let plan = Plan { tokens, ..Plan::new(SERVICES, EVERYONE) };
        let start = |service, app| Sidecar::start(service, "1", app);
        let (web, cron, catalog) = (start("web", None), start("cron", None), start("catalog", Some(app.address)));
        for sidecar in [&web, &cron, &catalog] {
            sidecar.ready(&authority, &plan, &[&catalog]).await;
        }
        let said = Mutex::default();
        let mesh = Self { authority, key, web, cron, catalog, plan, said };
        mesh.catalog.shared.set_bundle(mesh.bundle(2));
        mesh
    }

    fn bundle(&self, sequence: u64) -> Bundle {
        let key = JwtAuthority { key_id: "one".into(), point: self.key.public_key().as_ref().to_vec() };
        let roots = self.authority.bundle().authorities().to_vec();
        let tokens = TokenAuthorities { issuer: ISSUER.into(), keys: vec![key] };
        Bundle::new(trust_domain(), sequence, roots).unwrap().with_token_authorities(tokens)
    }

    /// A token of `caller` for the catalog that is bound to the certificate of `svid`, the first of its family.
    fn token(&self, caller: &str, svid: &X509Svid, scope: &str, lives_seconds: i64) -> (TokenId, String) {
        let id = Self::id(now_ms());
        (id, self.token_of(caller, svid, scope, lives_seconds, (id, id)))
    }

    fn id(at_ms: u64) -> TokenId {
        TokenId::new(at_ms, fastrand::u128(..).to_be_bytes()[..10].try_into().unwrap())
    }

    fn token_of(
        &self,
        caller: &str,
        svid: &X509Svid,
        scope: &str,
        lives_seconds: i64,
        (family, id): (TokenId, TokenId),
    ) -> String {
        let (at_ms, own) = (now_ms(), trust_domain());
        let (header, at) = (json!({ "alg": "ES256", "kid": "one", "typ": "at+jwt" }), (at_ms / 1000) as i64);
        let claims = json!({
            "iss": ISSUER, "sub": own.workload(&name(caller)), "client_id": own.workload(&name(caller)),
            "aud": own.workload(&name("catalog")), "iat": at, "exp": at + lives_seconds, "jti": id, "scope": scope,
            "cnf": { "x5t#S256": Thumbprint(svid.leaf_sha256().0) }, "instance": format!("{caller}/1"), "family": family,
        });
        let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(&header), part(&claims));
        let signature = self.key.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// Gives the sidecar of `caller` this token for the catalog, in place of what it had.
    fn attach(caller: &Sidecar, token: &str) {
        let svid = caller.shared.identity().unwrap().svid();
        caller.shared.set_tokens(Thumbprint(svid.leaf_sha256().0), Self::only(token));
    }

    fn only(token: &str) -> TokensByService {
        [(name("catalog"), AttachedToken::new(token, now_ms() + 300_000).unwrap())].into_iter().collect()
    }

    /// Gives the sidecar of web a good token; returns its id.
    fn let_web_call(&self) -> TokenId {
        let svid = self.web.shared.identity().unwrap().svid();
        let (id, token) = self.token("web", &svid, "http:GET", 300);
        Self::attach(&self.web, &token);
        id
    }

    async fn revoke(&self, meant: &str) {
        let signals = {
            let mut said = self.said.lock().unwrap();
            said.0 += 1;
            let (meant, issued_until_ms) = (meant.parse().unwrap(), now_ms());
            let one = TokenRevocation { meant, issued_until_ms, expires_at_ms: issued_until_ms + 600_000 };
            let sequence = SignalSeq(said.0);
            said.1.welcome(sequence, [Signal::Tokens(one)]);
            said.1.clone()
        };
        self.catalog.shared.heed(signals);
        self.catalog.shared.end_revoked().await;
    }

    fn last(&self) -> (Outcome, Reason, Option<TokenFault>) {
        let records = self.catalog.records.lock().unwrap();
        let last = records.last().unwrap();
        (last.outcome, last.reason, last.fault)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_a_token_is_told_so_by_its_own_sidecar_and_one_with_it_is_served_without_the_app_seeing_it() {
    let mesh = Mesh::new(Tokens::Required).await;
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.seen(), (503, Some("no-token")));
    // Who does not declare it hears what the callee says.
    assert_eq!(mesh.cron.get("http://catalog.mesh/").await.seen(), (401, Some("token-missing")));
    assert_eq!(mesh.last(), (Outcome::Deny, Reason::TokenMissing, None));
    mesh.let_web_call();
    let request = Request::get("http://catalog.mesh/headers").header("countersign-token", "mine");
    let answer = mesh.web.send(request.body(Full::default()).unwrap()).await;
    assert_eq!(answer.status, 200);
    assert!(!answer.text().contains("countersign-token"), "the application sees it: {}", answer.text());
    assert!(answer.headers.keys().all(|name| name != "countersign-token"));
    assert_eq!(mesh.last(), (Outcome::Permit, Reason::Permitted, None));
    for sidecar in [mesh.web, mesh.cron, mesh.catalog] {
        sidecar.stop().await;
    }
}

/// PROVES (token-of-this-connection)
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_of_this_connection_is_refused_whoever_shows_it() {
    let mesh = Mesh::new(Tokens::Required).await;
    let (web, cron) = (mesh.web.shared.identity().unwrap().svid(), mesh.cron.shared.identity().unwrap().svid());
    let other = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let forged = Mesh { key: other, ..Mesh::new(Tokens::Required).await };
    let stolen = mesh.token("web", &web, "http:GET", 300).1;
    for (case, caller, token, status, reason, fault) in [
        ("its own", &mesh.web, stolen.clone(), (200, None), Reason::Permitted, None),
        (
            "stolen",
            &mesh.cron,
            stolen,
            (401, Some("token-refused")),
            Reason::TokenRefused,
            Some(TokenFault::AnotherKey),
        ),
        (
            "of another workload, bound to the thief",
            &mesh.cron,
            mesh.token("web", &cron, "http:GET", 300).1,
            (401, Some("token-refused")),
            Reason::TokenRefused,
            Some(TokenFault::AnotherSubject),
        ),
        (
            "over",
            &mesh.web,
            mesh.token("web", &web, "http:GET", -1).1,
            (401, Some("token-refused")),
            Reason::TokenRefused,
            Some(TokenFault::Expired),
        ),
        (
            "signed by somebody else",
            &mesh.web,
            forged.token("web", &web, "http:GET", 300).1,
            (401, Some("token-refused")),
            Reason::TokenRefused,
            Some(TokenFault::Signature),
        ),
        (
            "none at all",
            &mesh.web,
            "x".into(),
            (401, Some("token-refused")),
            Reason::TokenRefused,
            Some(TokenFault::Malformed),
        ),
        (
            "for something else",
            &mesh.web,
            mesh.token("web", &web, "http:POST", 300).1,
            (403, Some("token-scope")),
            Reason::TokenScope,
            None,
        ),
    ] {
        Mesh::attach(caller, &token);
        assert_eq!(caller.get("http://catalog.mesh/").await.seen(), status, "{case}");
        assert_eq!((mesh.last().1, mesh.last().2), (reason, fault), "{case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_its_holder_has_long_replaced_is_refused_even_from_who_has_its_key() {
    let mesh = Mesh::new(Tokens::Required).await;
    let svid = mesh.web.shared.identity().unwrap().svid();
    let (old, new) = (Mesh::id(now_ms() - 100_000), Mesh::id(now_ms()));
    let token = |id| mesh.token_of("web", &svid, "http:GET", 300, (old, id));
    let (copied, renewed) = (token(old), token(new));
    for (case, token, status, fault) in [
        ("the first of its family", &copied, (200, None), None),
        ("the next", &renewed, (200, None), None),
        ("the copy", &copied, (401, Some("token-refused")), Some(TokenFault::Superseded)),
        ("its holder's", &renewed, (200, None), None),
    ] {
        Mesh::attach(&mesh.web, token);
        assert_eq!(mesh.web.get("http://catalog.mesh/").await.seen(), status, "{case}");
        assert_eq!(mesh.last().2, fault, "{case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_token_is_refused_where_none_is_demanded_too() {
    let mesh = Mesh::new(Tokens::Optional).await;
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.status, 200);
    Mesh::attach(&mesh.web, "a.b.c");
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.seen(), (401, Some("token-refused")));
    mesh.let_web_call();
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_the_token_that_it_was_permitted_with_is_revoked_and_the_next_token_is_good() {
    let mesh = Mesh::new(Tokens::Required).await;
    let id = mesh.let_web_call();
    let request = Request::get("http://catalog.mesh/events").body(Full::default()).unwrap();
    let mut stream = open(mesh.web.outbound, request).await.into_body();
    assert!(stream.frame().await.unwrap().is_ok());
    mesh.revoke("instance:web/2").await;
    assert!(stream.frame().await.unwrap().is_ok(), "another's is no concern of it");
    mesh.revoke(&format!("id:{id}")).await;
    let ended = tokio::time::timeout(Duration::from_secs(5), async { while let Some(Ok(_)) = stream.frame().await {} });
    ended.await.expect("the stream goes on without its token");
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.seen(), (401, Some("token-refused")));
    assert_eq!(mesh.last().2, Some(TokenFault::Revoked));
    mesh.let_web_call();
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.status, 200);
    let records = mesh.catalog.records.lock().unwrap();
    let cut = records.iter().find(|record| record.judged == Judged::WhileOpen).expect("the record says why it was cut");
    assert_eq!((cut.reason, cut.fault), (Reason::TokenRefused, Some(TokenFault::Revoked)));
    assert_eq!(cut.ended.as_ref().unwrap().how, End::Cut);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_a_family_of_tokens_is_said_of_who_shows_one_and_of_nobody_else() {
    let mesh = Mesh::new(Tokens::Optional).await;
    let low_risk = "permit(principal, action, resource) when { context.risk.workload < 70 };";
    mesh.catalog.apply(&mesh.plan.with_policy(low_risk), 2).await;
    let id = mesh.let_web_call();
    let request = Request::get("http://catalog.mesh/events").body(Full::default()).unwrap();
    let mut stream = open(mesh.web.outbound, request).await.into_body();
    assert!(stream.frame().await.unwrap().is_ok());
    let signals = {
        let mut said = mesh.said.lock().unwrap();
        said.0 += 1;
        let written = json!({
            "subject": format!("family:{id}"), "kind": "risk", "value": "70", "source": "operator:alice",
            "issued_at_ms": now_ms(), "expires_at_ms": now_ms() + 60_000,
        });
        let sequence = SignalSeq(said.0);
        said.1.welcome(sequence, [Signal::Stated(serde_json::from_value(written).unwrap())]);
        said.1.clone()
    };
    mesh.catalog.shared.heed(signals);
    mesh.catalog.shared.end_revoked().await;
    let ended = tokio::time::timeout(Duration::from_secs(5), async { while let Some(Ok(_)) = stream.frame().await {} });
    ended.await.expect("the stream goes on");
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.status, 403);
    assert_eq!(mesh.cron.get("http://catalog.mesh/").await.status, 200, "it shows none of them");
    mesh.let_web_call();
    assert_eq!(mesh.web.get("http://catalog.mesh/").await.status, 200, "nothing is said of the next family");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_service_begins_to_demand_tokens() {
    let mesh = Mesh::new(Tokens::Optional).await;
    let request = Request::get("http://catalog.mesh/events").body(Full::default()).unwrap();
    let mut stream = open(mesh.web.outbound, request).await.into_body();
    assert!(stream.frame().await.unwrap().is_ok());
    mesh.catalog.apply(&Plan { tokens: Tokens::Required, ..mesh.plan.clone() }, 2).await;
    let ended = tokio::time::timeout(Duration::from_secs(5), async { while let Some(Ok(_)) = stream.frame().await {} });
    ended.await.expect("the stream goes on without a token");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_and_none_carries_the_token_of_another_certificate_while_identities_are_renewed() {
    let mesh = Mesh::new(Tokens::Required).await;
    mesh.let_web_call();
    let (ended, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let calls = async || {
        while !ended.load(Ordering::Relaxed) {
            let answer = mesh.web.get("http://catalog.mesh/").await;
            assert_eq!(answer.seen(), (200, None), "{answer:?}");
            asked.fetch_add(1, Ordering::Relaxed);
        }
    };
    let identity = |_| {
        let svid = mesh.authority.svid("web");
        let token = mesh.token("web", &svid, "http:GET", 300).1;
        (svid, Mesh::only(&token))
    };
    let mut identities = (0..RENEWALS).map(identity).collect::<Vec<_>>().into_iter();
    let renewals = async {
        while !identities.as_slice().is_empty() {
            // More than once before a connection of the first one is given up.
            for (svid, tokens) in identities.by_ref().take(3) {
                mesh.web.shared.set_svid(svid, tokens);
            }
            tokio::time::sleep(Duration::from_millis(8)).await;
        }
        ended.store(true, Ordering::Relaxed);
    };
    tokio::join!(calls(), calls(), calls(), calls(), renewals);
    assert!(asked.load(Ordering::Relaxed) >= 100, "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_the_first_token_for_its_service() {
    let mesh = Mesh::new(Tokens::Required).await;
    let later = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        mesh.let_web_call();
    };
    let (answer, ()) = tokio::join!(mesh.web.get("http://catalog.mesh/"), later);
    assert_eq!(answer.seen(), (200, None));
}
