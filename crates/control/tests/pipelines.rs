//! Pipelines at the door of the control plane: whose token is believed, which pipeline it is of, and that what it proposes is applied
//! when an operator has countersigned exactly that.

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use axum::{Router, routing::get};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use countersign_api::local::{
    Applied, Apply, ApplyAs, Code, Confirm, Enrol, Enrolled, Enrolment, GateOutcome, Mesh, Problem, Proposal,
    ProposalState, Shown,
};
use countersign_control::{ControlConfig, clock::Clock, pipelines::Settings, start_with_clock};
use countersign_core::{
    change::{Bodies, Change, ChangeSet},
    directory::quarantined,
    gate::Author,
    identity::OperatorName,
    pipeline::{Issuer, MESH_ISSUER, Pipeline},
    sign_in::SignIn,
};
use countersign_testkit::authenticator::App;
use support::{Plane, config, declare, trust_domain};

const AUDIENCE: &str = "countersign:shop.example";

/// A provider of tokens on this machine.
struct Provider {
    url: String,
    key: EcdsaKeyPair,
}

impl Provider {
    async fn start() -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let point = key.public_key().as_ref();
        let (x, y) = (encode(&point[1..33]), encode(&point[33..]));
        let keys = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": "1", "x": x, "y": y }] }).to_string();
        let discovery = json!({ "issuer": url, "jwks_uri": format!("{url}/jwks") }).to_string();
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(async move || discovery))
            .route("/jwks", get(async move || keys));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, key }
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({ "alg": "ES256", "kid": "1", "typ": "JWT" }).to_string();
        let input = format!("{}.{}", encode(header), encode(claims.to_string()));
        let signature = self.key.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", encode(signature))
    }
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn operator(given: &str) -> OperatorName {
    OperatorName::parse(given).unwrap()
}

/// A protected mesh whose owner is alice, with a provider and two pipelines of it.
struct World {
    plane: Plane,
    provider: Provider,
    alice: App,
    now_ms: Arc<AtomicU64>,
    door: SocketAddr,
}

impl World {
    async fn start() -> Self {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        let now_ms = Arc::new(AtomicU64::new(now_ms));
        let dir = tempfile::tempdir().unwrap();
        let told = now_ms.clone();
        let clock = Clock::from_fn(move || told.load(Ordering::Relaxed));
        let pipelines = Settings { listen: Some("127.0.0.1:0".parse().unwrap()), ..Settings::default() };
        let config = ControlConfig { pipelines, ..config(dir.path().into()) };
        let control = start_with_clock(config, clock).await.unwrap();
        let door = control.pipelines.as_deref().unwrap().strip_prefix("http://").unwrap().parse().unwrap();
        let (plane, provider) = (Plane { control, dir }, Provider::start().await);
        let pipeline = |claims: &[(&str, &str)]| Pipeline {
            issuer: "ci".into(),
            claims: claims.iter().map(|(claim, value)| (claim.to_string(), value.to_string())).collect(),
            roles: Default::default(),
        };
        let set =
            |name: &str, claims: &[(&str, &str)]| Change::SetPipeline { name: name.into(), pipeline: pipeline(claims) };
        let issuer = Issuer { url: provider.url.clone(), audience: AUDIENCE.into() };
        let changes = vec![
            Change::CreateMesh { trust_domain: trust_domain() },
            declare("web"),
            Change::SetIssuer { name: "ci".into(), issuer },
            set("deploy", &[("repository_id", "7"), ("environment", "production")]),
            set("nightly", &[("repository_id", "7"), ("event_name", "schedule")]),
        ];
        plane.apply(0, changes).await.unwrap();
        let enrol = Enrol { operator: operator("alice"), invitation: None, shown: Shown::default() };
        let enrolment: Enrolment = plane.post("/v1/enrolments", &enrol).await.unwrap();
        let alice = App::read("alice", &enrolment.otpauth);
        let code = Code(alice.code(now_ms.load(Ordering::Relaxed) / 1000));
        let _: Enrolled = plane.post(&format!("/v1/enrolments/{}", enrolment.id), &Confirm { code }).await.unwrap();
        Self { plane, provider, alice, now_ms, door }
    }

    fn seconds(&self) -> i64 {
        (self.now_ms.load(Ordering::Relaxed) / 1000) as i64
    }

    /// What GitHub says of a job of the repository, with `more` in the place of what it would say.
    fn claims(&self, more: Value) -> Value {
        let now = self.seconds();
        let mut claims = json!({
            "iss": self.provider.url, "aud": AUDIENCE, "iat": now, "nbf": now, "exp": now + 300, "jti": encode(rand()),
            "sub": "repo:shop/mesh:environment:production", "repository": "shop/mesh", "repository_id": "7",
            "repository_owner_id": "70", "environment": "production", "ref": "refs/heads/main", "event_name": "push",
            "run_id": "1234",
        });
        for (name, value) in more.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims
    }

    fn token(&self, more: Value) -> String {
        self.provider.sign(&self.claims(more))
    }

    async fn ask(&self, method: &str, path: &str, token: &str, body: Vec<u8>) -> (u16, Bytes) {
        let stream = TcpStream::connect(self.door).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "control")
            .header("authorization", format!("Bearer {token}"))
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    async fn problem(&self, method: &str, path: &str, token: &str, body: Vec<u8>) -> Problem {
        let (status, answer) = self.ask(method, path, token, body).await;
        let problem: Problem = serde_json::from_slice(&answer).unwrap();
        assert_eq!(problem.status, status);
        problem
    }

    async fn apply_of(&self, service: &str) -> Apply {
        let mesh = self.plane.get::<Mesh>("/v1/mesh").await;
        let (base, changes) = (mesh.revision, quarantined(vec![declare(service)], &mesh.state));
        Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() }
    }

    /// The pending change that this is, or why it is none.
    async fn propose(&self, apply: &Apply, token: &str) -> Result<String, Problem> {
        let path = "/v1/pipeline/proposals";
        let problem = self.problem("POST", path, token, serde_json::to_vec(apply).unwrap()).await;
        match problem.refusal.as_deref() {
            Some(refusal) if refusal.outcome == GateOutcome::NeedsCountersign => {
                assert_eq!(refusal.digest, Some(apply.change_set.digest()));
                Ok(refusal.change.clone().unwrap())
            }
            _ => Err(problem),
        }
    }

    /// What alice shows for the next question.
    fn shown(&self) -> Shown {
        self.now_ms.fetch_add(60_000, Ordering::Relaxed);
        let otp = Some(Code(self.alice.code(self.seconds() as u64)));
        Shown { operator: Some(operator("alice")), otp, ..Shown::default() }
    }

    async fn own_change(&self, service: &str) -> Applied {
        let asked = ApplyAs { apply: self.apply_of(service).await, shown: self.shown() };
        self.plane.post("/v1/changes", &asked).await.unwrap()
    }

    async fn state(&self, id: &str, token: &str) -> ProposalState {
        let (status, answer) = self.ask("GET", &format!("/v1/pipeline/proposals/{id}"), token, Vec::new()).await;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
        serde_json::from_slice::<Proposal>(&answer).unwrap().state
    }
}

fn rand() -> [u8; 16] {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// PROVES (verified-token)
/// PROVES (pipeline-proven)
#[tokio::test]
async fn a_token_that_is_not_of_a_pipeline_of_this_mesh_opens_nothing() {
    let world = World::start().await;
    let now = world.seconds();
    let stranger = Provider { key: Provider::start().await.key, url: world.provider.url.clone() };
    let good = world.token(json!({}));
    let (head, signature) = good.rsplit_once('.').unwrap();
    let claims = world.claims(json!({}));
    let by_hand = |header: Value, signature: &str| {
        format!("{}.{}.{signature}", encode(header.to_string()), encode(claims.to_string()))
    };
    let brings_a_key = {
        let point = stranger.key.public_key().as_ref();
        let jwk =
            json!({ "kty": "EC", "crv": "P-256", "kid": "1", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
        let header =
            json!({ "alg": "ES256", "kid": "1", "jwk": jwk, "jku": format!("{}/jwks", stranger.url) }).to_string();
        let input = format!("{}.{}", encode(header), encode(claims.to_string()));
        format!("{input}.{}", encode(stranger.key.sign(&SystemRandom::new(), input.as_bytes()).unwrap()))
    };
    for (case, token, status, detail) in [
        ("none", by_hand(json!({ "alg": "none" }), ""), 401, "`alg` is `none`"),
        ("a MAC", by_hand(json!({ "alg": "HS256", "kid": "1" }), &encode([1; 32])), 401, "`alg` is `HS256`"),
        ("a key that it brings", brings_a_key, 401, "none of its issuer's keys"),
        ("a key that is not there", by_hand(json!({ "alg": "ES256", "kid": "../1" }), signature), 401, "none of its"),
        ("another's signature", stranger.sign(&claims), 401, "none of its issuer's keys"),
        ("no signature", format!("{head}."), 401, "none of its issuer's keys"),
        ("too long", world.token(json!({ "more": "x".repeat(16 * 1024) })), 401, "at most 16384 bytes"),
        ("another issuer", world.token(json!({ "iss": "https://evil.example" })), 401, "believes no issuer"),
        (
            "the issuer with a slash",
            world.token(json!({ "iss": format!("{}/", world.provider.url) })),
            401,
            "believes no",
        ),
        (
            "another audience",
            world.token(json!({ "aud": "sts.amazonaws.com" })),
            401,
            "not for `countersign:shop.example`",
        ),
        ("several audiences", world.token(json!({ "aud": [AUDIENCE, "other"] })), 401, "it is meant for"),
        ("expired", world.token(json!({ "iat": now - 400, "nbf": now - 400, "exp": now - 61 })), 401, "it has expired"),
        ("of the future", world.token(json!({ "iat": now + 90 })), 401, "issued in the future"),
        ("without an end", world.token(json!({ "exp": null })), 401, "no time"),
        ("the same name, registered again", world.token(json!({ "repository_id": "8" })), 403, ""),
        ("an id with more to it", world.token(json!({ "repository_id": "7 " })), 403, ""),
        ("another environment", world.token(json!({ "environment": "Production" })), 403, ""),
        ("no environment", world.token(json!({ "environment": null })), 403, ""),
        ("no token", String::new(), 401, ""),
    ] {
        let problem = world.problem("GET", "/v1/pipeline/mesh", &token, Vec::new()).await;
        assert_eq!(problem.status, status, "{case}: {problem:?}");
        assert!(problem.detail.as_deref().unwrap_or_default().contains(detail), "{case}: {problem:?}");
        // Neither does it propose, whatever it sends.
        let proposed = world.propose(&world.apply_of("api").await, &token).await;
        assert_eq!(proposed.unwrap_err().status, status, "{case}");
    }
    let (status, answer) = world.ask("GET", "/v1/pipeline/mesh", &good, Vec::new()).await;
    assert_eq!(status, 200);
    let mesh: Mesh = serde_json::from_slice(&answer).unwrap();
    assert_eq!((mesh.state.services.len(), mesh.state.operators.len()), (1, 0), "what planning needs, and no more");
    // A number is its digits.
    assert_eq!(world.ask("GET", "/v1/pipeline/mesh", &world.token(json!({ "repository_id": 7 })), vec![]).await.0, 200);
    // One job that two pipelines fit says which it is.
    let both = world.token(json!({ "event_name": "schedule" }));
    let problem = world.problem("GET", "/v1/pipeline/mesh", &both, Vec::new()).await;
    assert_eq!(problem.detail.as_deref(), Some("it fits `deploy`, `nightly`"));
    assert_eq!(world.ask("GET", "/v1/pipeline/mesh?pipeline=nightly", &both, Vec::new()).await.0, 200);
    assert_eq!(world.problem("GET", "/v1/pipeline/mesh?pipeline=root", &both, Vec::new()).await.status, 403);
}

#[tokio::test]
async fn exactly_what_a_pipeline_proposed_is_applied_once_when_an_operator_countersigned() {
    let world = World::start().await;
    let apply = world.apply_of("api").await;
    let token = world.token(json!({}));
    let id = world.propose(&apply, &token).await.unwrap();
    assert_eq!(world.state(&id, &token).await, ProposalState::NeedsCountersign);
    let proposals: Vec<Proposal> = world.plane.get("/v1/proposals").await;
    let Author::Pipeline(author) = &proposals[0].author else { panic!("{proposals:?}") };
    assert_eq!((&*author.name, author.issuer.as_str()), ("deploy", world.provider.url.as_str()));
    assert!(author.claims.contains("repository=shop/mesh") && author.claims.contains("run_id=1234"), "{author:?}");
    assert!(!author.claims.iter().any(|claim| claim.starts_with("jti=")), "{author:?}");
    for verb in ["apply", "withdraw"] {
        let refused: Problem =
            world.plane.post::<Value>(&format!("/v1/proposals/{id}/{verb}"), &world.shown()).await.unwrap_err();
        assert_eq!(refused.status, 403, "an operator is not the pipeline");
    }
    let path = format!("/v1/proposals/{id}/countersign");
    let nothing = Shown { otp: None, ..world.shown() };
    assert_eq!(world.plane.post::<Proposal>(&path, &nothing).await.unwrap_err().status, 403);

    let wait = format!("/v1/pipeline/proposals/{id}/wait?timeout_ms=30000");
    let shown = world.shown();
    let fresh = world.token(json!({}));
    let (waited, countersigned) =
        tokio::join!(world.ask("GET", &wait, &fresh, Vec::new()), world.plane.post::<Proposal>(&path, &shown));
    let ProposalState::Applied { revision } = countersigned.unwrap().state else { panic!("not applied") };
    assert_eq!(serde_json::from_slice::<Proposal>(&waited.1).unwrap().state, ProposalState::Applied { revision });
    let made: countersign_api::local::ChangeDetail = world.plane.get(&format!("/v1/changes/{revision}")).await;
    assert_eq!((made.summary.actor.as_str(), made.summary.digest), ("pipeline:deploy", apply.change_set.digest()));
    assert_eq!(made.change_set, apply.change_set);
    // Once: nobody countersigns it again, and the token is good for nothing else.
    assert_eq!(world.plane.post::<Proposal>(&path, &world.shown()).await.unwrap_err().status, 410);
    let other = world.propose(&world.apply_of("more").await, &token).await.unwrap_err();
    assert_eq!((other.status, other.title.as_str()), (409, "the token was used already, for another change"));
    assert_eq!(world.plane.get::<Mesh>("/v1/mesh").await.revision, revision);
}

/// PROVES (token-once)
#[tokio::test]
async fn a_token_makes_one_proposal_and_another_only_when_the_first_is_void() {
    let world = World::start().await;
    let token = world.token(json!({ "exp": world.seconds() + 3600 }));
    let first = world.apply_of("api").await;
    let id = world.propose(&first, &token).await.unwrap();
    assert_eq!(world.propose(&first, &token).await.unwrap(), id, "the same, and no second one");
    let refused = world.propose(&world.apply_of("other").await, &token).await.unwrap_err();
    assert_eq!((refused.status, refused.title.as_str()), (409, "the token was used already, for another change"));
    // A code signs nothing, so what was proposed holds on its own base only.
    let overtaken = world.own_change("overtaking").await.revision;
    assert_eq!(world.state(&id, &token).await, ProposalState::Void { revision: overtaken });
    let path = format!("/v1/proposals/{id}/countersign");
    assert_eq!(world.plane.post::<Proposal>(&path, &world.shown()).await.unwrap_err().status, 410);
    let again = world.propose(&world.apply_of("api").await, &token).await.unwrap();
    assert_ne!(again, id);
    let proposal: Proposal =
        world.plane.post(&format!("/v1/proposals/{again}/countersign"), &world.shown()).await.unwrap();
    assert!(matches!(proposal.state, ProposalState::Applied { .. }), "{proposal:?}");
}

#[tokio::test]
async fn what_a_pipeline_may_not_ask_for_or_see_is_refused() {
    let world = World::start().await;
    let token = || world.token(json!({}));
    let base = world.plane.get::<Mesh>("/v1/mesh").await.revision;
    let pipeline = Pipeline {
        issuer: "ci".into(),
        claims: [("repository_owner_id".to_owned(), "70".to_owned())].into(),
        roles: ["owner".into()].into(),
    };
    let sign_in = SignIn {
        issuer: "ci".into(),
        client_id: "mesh".into(),
        groups_claim: "groups".into(),
        roles: [("staff".to_owned(), ["owner".into()].into())].into(),
    };
    let widening = [
        Change::SetSignIn { name: "ci".into(), sign_in },
        Change::SetPipeline { name: "deploy".into(), pipeline },
        Change::RemoveIssuer { name: "ci".into() },
        Change::SetOperatorRoles { name: operator("alice"), roles: Default::default() },
    ];
    for change in widening {
        let what = change.kind();
        let mesh = world.plane.get::<Mesh>("/v1/mesh").await;
        let changes = quarantined(vec![declare("api"), change], &mesh.state);
        let apply = Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() };
        let refused = world.propose(&apply, &token()).await.unwrap_err();
        assert!(matches!(refused.status, 403 | 422), "{what}: {refused:?}");
    }
    // The proposal of another pipeline is not there for it.
    let id = world.propose(&world.apply_of("api").await, &token()).await.unwrap();
    let nightly = world.token(json!({ "event_name": "schedule", "environment": "test" }));
    for path in [format!("/v1/pipeline/proposals/{id}"), format!("/v1/pipeline/proposals/{id}/wait?timeout_ms=1")] {
        assert_eq!(world.problem("GET", &path, &nightly, Vec::new()).await.status, 404);
    }
    // Nor is anything that an operator's socket answers.
    for path in ["/v1/mesh", "/v1/status", "/v1/proposals", "/v1/changes"] {
        assert_eq!(world.problem("GET", path, &token(), Vec::new()).await.status, 404, "{path}");
    }
    let rejected: Proposal = world.plane.post(&format!("/v1/proposals/{id}/reject"), &world.shown()).await.unwrap();
    assert_eq!(rejected.state, ProposalState::Rejected { by: operator("alice") });
    assert_eq!(world.plane.get::<Mesh>("/v1/mesh").await.revision, base);
}

#[tokio::test]
async fn a_pipeline_has_sixteen_changes_waiting_at_most() {
    let world = World::start().await;
    for n in 0..16 {
        world.propose(&world.apply_of(&format!("s{n}")).await, &world.token(json!({}))).await.unwrap();
    }
    let refused = world.propose(&world.apply_of("more").await, &world.token(json!({}))).await.unwrap_err();
    assert_eq!(refused.status, 429, "{refused:?}");
    let again = world.propose(&world.apply_of("s3").await, &world.token(json!({}))).await;
    assert!(again.is_ok(), "one that waits already is no more: {again:?}");
}

/// PROVES (verified-token)
#[tokio::test]
async fn a_workload_proposes_with_its_own_svid_and_an_operator_countersigns() {
    let world = World::start().await;
    let sub = |service: &str| format!("spiffe://shop.example/{service}");
    let workload = |service: &str| Pipeline {
        issuer: MESH_ISSUER.into(),
        claims: [("sub".to_owned(), sub(service))].into(),
        roles: Default::default(),
    };
    let mesh = world.plane.get::<Mesh>("/v1/mesh").await;
    let robot = Change::SetPipeline { name: "robot".into(), pipeline: workload("deployer") };
    let (base, changes) = (mesh.revision, quarantined(vec![declare("deployer"), robot], &mesh.state));
    let apply = Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() };
    let _: Applied = world.plane.post("/v1/changes", &ApplyAs { apply, shown: world.shown() }).await.unwrap();
    let mut agent = world.plane.agent("h1").await;
    let control = trust_domain().control();
    let apply = world.apply_of("billing").await;

    let ours = agent.issue_jwt("deployer/1", &[control.as_str(), "urn:x:1"]).await.unwrap();
    let other = agent.issue_jwt("web/1", &[control.as_str()]).await.unwrap();
    let elsewhere = agent.issue_jwt("deployer/1", &["orders"]).await.unwrap();
    let claims = json!({ "sub": sub("deployer"), "aud": [control], "exp": world.seconds() + 300 });
    let forged = world.provider.sign(&claims);
    let with_issuer = world.token(json!({ "sub": sub("deployer") }));
    for (case, token, status, detail) in [
        ("of another workload", &other, 403, "no pipeline"),
        ("for somebody else", &elsewhere, 401, "not meant for"),
        ("signed by a provider", &forged, 401, "no key of its trust domain"),
        ("of a provider, with its name", &with_issuer, 401, "no key of its trust domain"),
    ] {
        let problem = world.propose(&apply, token).await.unwrap_err();
        let said = format!("{} {}", problem.title, problem.detail.clone().unwrap_or_default());
        assert_eq!(problem.status, status, "{case}: {said}");
        assert!(said.contains(detail), "{case}: {said}");
    }

    let id = world.propose(&apply, &ours).await.unwrap();
    assert_eq!(world.state(&id, &ours).await, ProposalState::NeedsCountersign);
    let shown: Proposal = {
        let (_, answer) = world.ask("GET", &format!("/v1/pipeline/proposals/{id}"), &ours, Vec::new()).await;
        serde_json::from_slice(&answer).unwrap()
    };
    let Author::Pipeline(author) = &shown.author else { panic!("{:?}", shown.author) };
    assert_eq!(
        (&*author.name, &*author.issuer, author.subject.as_str()),
        ("robot", "spiffe://shop.example", &*sub("deployer"))
    );
    // Its token makes one proposal.
    let path = format!("/v1/proposals/{id}/countersign");
    let _: Proposal = world.plane.post(&path, &world.shown()).await.unwrap();
    assert!(matches!(world.state(&id, &ours).await, ProposalState::Applied { .. }));
    assert_eq!(world.propose(&world.apply_of("shipping").await, &ours).await.unwrap_err().status, 409);
}
