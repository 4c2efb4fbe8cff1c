//! A browser without a browser: requests to the router, cookies kept, an authenticator that does what it is told.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{Router, body::Body};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use futures_util::StreamExt as _;
use http::{Method, Request, StatusCode, header};
use serde_json::{Value, json};
use tower::ServiceExt;

use countersign_api::local::{Apply, ApplyAs, Shown};
use countersign_core::{
    change::{Bodies, Change, ChangeSet},
    directory::quarantined,
    identity::{OperatorName, ServiceName, TrustDomain},
    keyring::Keyring,
    ledger::{EntryProof, Trust},
    service::{Protocol, ServiceSpec},
};
use countersign_testkit::security_key::SecurityKey;

use super::{SiteConfig, serve::From, session};
use crate::{Control, ControlConfig, Plane, clock::Clock, gate::Petitioner, proposals, start_with_clock};

mod authenticators;
mod commands;
mod providers;
mod tokens;
mod trail;

struct Mesh {
    control: Control,
    now_ms: Arc<AtomicU64>,
    dir: tempfile::TempDir,
}

impl Mesh {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let now_ms = Arc::new(AtomicU64::new(1_790_000_000_000));
        let told = now_ms.clone();
        let config = ControlConfig {
            store: None,
            advertise: None,
            accept_rollback: false,
            data_dir: dir.path().into(),
            listen: "127.0.0.1:0".parse().unwrap(),
            metrics_listen: None,
            key: Default::default(),
            trust_domain: None,
            witnesses: Default::default(),
            pipelines: Default::default(),
            oauth: None,
            site: Some(SiteConfig {
                listen: "127.0.0.1:0".parse().unwrap(),
                origin: None,
                tls: None,
                sign_in_secrets: Some(dir.path().join("secrets")),
            }),
            audit: Some(dir.path().join(crate::AUDIT_FILE)),
        };
        let control = start_with_clock(config, Clock::from_fn(move || told.load(Ordering::Relaxed))).await.unwrap();
        let mesh = Self { control, now_ms, dir };
        let create = Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() };
        mesh.plane().enter(mesh.asked(vec![create]), Petitioner::default()).await.unwrap();
        mesh
    }

    fn plane(&self) -> &Arc<Plane> {
        &self.control.plane
    }

    fn origin(&self) -> String {
        self.control.dashboard().unwrap().to_owned()
    }

    fn asked(&self, changes: Vec<Change>) -> Apply {
        let head = self.plane().ledger.head();
        let (base, changes) = (head.follower.revision(), quarantined(changes, head.follower.state()));
        Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() }
    }

    async fn link(&self) -> String {
        let url = self.control.enrolment_link().await.unwrap().unwrap();
        url.split_once('#').unwrap().1.to_owned()
    }

    fn browser(&self) -> Browser {
        Browser {
            router: super::router(self.plane().clone()),
            origin: self.origin(),
            cookie: None,
            asked: None,
            location: String::new(),
            csrf: String::new(),
            key: SecurityKey::new(),
        }
    }

    /// The first owner, who holds a key, and is signed in.
    async fn owner(&self, name: &str) -> Browser {
        let mut browser = self.browser();
        let link = self.link().await;
        browser.enrols(name, Some(&link)).await.unwrap();
        browser.signs_in(json!({})).await.unwrap();
        browser
    }

    /// Asks for a service as `operator`; returns the pending change.
    async fn proposed(&self, operator: &str, service: &str) -> String {
        let name = ServiceName::parse(service).unwrap();
        let declare = Change::DeclareService { name, spec: ServiceSpec::new(Protocol::Http) };
        let shown = Shown { operator: Some(OperatorName::parse(operator).unwrap()), ..Shown::default() };
        let asked = ApplyAs { apply: self.asked(vec![declare]), shown };
        let refused = proposals::apply(self.plane(), asked).await.unwrap_err().refusal.unwrap();
        assert_eq!(refused.url.unwrap(), format!("{}/changes/{}", self.origin(), refused.change.as_ref().unwrap()));
        refused.change.unwrap()
    }

    fn pass(&self, ms: u64) {
        self.now_ms.fetch_add(ms, Ordering::Relaxed);
    }
}

struct Browser {
    router: Router,
    origin: String,
    cookie: Option<String>,
    /// The cookie by which it comes back from a provider.
    asked: Option<String>,
    /// Where it was sent last.
    location: String,
    csrf: String,
    key: SecurityKey,
}

type Refused = (u16, String);

impl Browser {
    async fn send(&mut self, method: Method, path: &str, headers: &[(&str, &str)], body: Body) -> (StatusCode, String) {
        let authority = self.origin.split_once("://").unwrap().1;
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header(header::HOST, authority);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let cookies: Vec<&str> = self.cookie.iter().chain(&self.asked).map(String::as_str).collect();
        if !cookies.is_empty() {
            request = request.header(header::COOKIE, cookies.join("; "));
        }
        let mut request = request.body(body).unwrap();
        request.extensions_mut().insert(From("192.0.2.7".parse().unwrap()));
        let response = self.router.clone().oneshot(request).await.unwrap();
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && policy.ends_with("frame-ancestors 'none'"), "{policy}");
        assert_eq!(response.headers()[header::X_FRAME_OPTIONS], "DENY", "no page stands in a frame");
        for set in response.headers().get_all(header::SET_COOKIE) {
            let set = set.to_str().unwrap();
            let (held, same_site) = match set.starts_with("countersign-asked=") {
                true => (&mut self.asked, "SameSite=Lax"),
                false => (&mut self.cookie, "SameSite=Strict"),
            };
            assert!(set.contains("HttpOnly") && set.contains(same_site), "{set}");
            *held = set.split(';').next().filter(|pair| !pair.ends_with('=')).map(str::to_owned);
        }
        let location = response.headers().get(header::LOCATION).and_then(|url| url.to_str().ok());
        self.location = location.unwrap_or_default().to_owned();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    async fn get(&mut self, path: &str) -> (StatusCode, String) {
        let (status, page) = self.send(Method::GET, path, &[], Body::empty()).await;
        if let Some((_, rest)) = page.split_once("countersign-csrf\" content=\"") {
            self.csrf = rest.split('"').next().unwrap().to_owned();
        }
        (status, page)
    }

    async fn post(&mut self, path: &str, body: Value) -> Result<Value, Refused> {
        let (origin, csrf) = (self.origin.clone(), self.csrf.clone());
        let headers = [("origin", &*origin), ("content-type", "application/json"), ("x-countersign-csrf", &*csrf)];
        let (status, text) = self.send(Method::POST, path, &headers, Body::from(body.to_string())).await;
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|_| json!({ "title": text }));
        match status.is_success() {
            true => Ok(answer),
            false => Err((status.as_u16(), answer["title"].as_str().unwrap_or_default().to_owned())),
        }
    }

    async fn begins(&mut self, operator: &str, invitation: Option<&str>) -> Result<Value, Refused> {
        let mut enrol = json!({ "operator": operator });
        if let Some(token) = invitation {
            enrol["invitation"] = token.into();
        }
        self.post("/enroll/key/begin", json!({ "enrol": enrol })).await
    }

    async fn enrols(&mut self, operator: &str, invitation: Option<&str>) -> Result<Value, Refused> {
        let begun = self.begins(operator, invitation).await?;
        self.finishes(&begun).await
    }

    async fn finishes(&mut self, begun: &Value) -> Result<Value, Refused> {
        let credential = self.key.register(&begun["options"], &self.origin);
        self.post("/enroll/key/finish", json!({ "id": begun["id"], "credential": credential })).await
    }

    fn signed(&mut self, challenge: &Value, origin: &str) -> Value {
        let (options, nonce) = (&challenge["options"], &challenge["nonce"]);
        assert_eq!(options["userVerification"], "required");
        let signed = self.key.sign(options["rpId"].as_str().unwrap(), origin, options["challenge"].as_str().unwrap());
        json!({
            "nonce": nonce,
            "credential": self.key.factor_id(),
            "authenticator_data": BASE64URL.encode(signed.authenticator_data),
            "client_data_json": BASE64URL.encode(signed.client_data_json),
            "signature": BASE64URL.encode(signed.signature),
        })
    }

    async fn signs_in(&mut self, named: Value) -> Result<(), Refused> {
        let challenge = self.post("/sign-in/key/begin", named).await?;
        let origin = self.origin.clone();
        let signed = self.signed(&challenge, &origin);
        self.post("/sign-in/key/finish", signed).await?;
        self.get("/").await;
        Ok(())
    }

    async fn signs_change(&mut self, id: &str, origin: &str) -> Result<Value, Refused> {
        let challenge = self.post(&format!("/changes/{id}/challenge"), json!({})).await?;
        let signed = self.signed(&challenge, origin);
        self.post(&format!("/changes/{id}/sign"), signed).await
    }
}

#[tokio::test]
async fn a_link_makes_the_first_owner_once_and_their_key_signs_changes_that_anyone_can_verify() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.browser();
    let (status, page) = alice.get("/sign-in").await;
    assert!(status.is_success() && page.contains("has no operator yet"), "{page}");
    let refused = alice.enrols("alice", None).await.unwrap_err();
    assert_eq!(refused, (403, "the enrolment link is not good".into()));
    let (link, late) = (mesh.link().await, mesh.link().await);
    mesh.pass(15 * 60 * 1000 + 1);
    assert_eq!(alice.enrols("alice", Some(&late)).await.unwrap_err().0, 403, "too late");
    assert_eq!(alice.enrols("alice", Some(&link)).await.unwrap_err().0, 403, "too late");
    let link = mesh.link().await;
    let enrolled = alice.enrols("alice", Some(&link)).await.unwrap();
    assert_eq!((&enrolled["anchor"], enrolled["recovery_codes"].as_array().unwrap().len()), (&json!(true), 10));
    let mut mallory = mesh.browser();
    assert_eq!(mallory.enrols("mallory", Some(&link)).await.unwrap_err().0, 403, "used, and the mesh is protected");
    assert!(mesh.control.enrolment_link().await.unwrap().is_none());

    assert_eq!(alice.get("/").await.0, StatusCode::SEE_OTHER, "nobody is signed in yet");
    alice.signs_in(json!({ "operator": "alice" })).await.unwrap();
    let id = mesh.proposed("alice", "web").await;
    let (_, page) = alice.get(&format!("/changes/{id}")).await;
    assert!(page.contains("declare_service"), "{page}");
    let answer = alice.signs_change(&id, &mesh.origin()).await.unwrap();
    assert_eq!(answer["revision"], 3);
    let again = alice.signs_change(&id, &mesh.origin()).await.unwrap_err();
    assert_eq!(again.0, 410, "once");

    let mut keyring = Keyring::default();
    for stored in mesh.plane().ledger.stored(0, 10).await.unwrap() {
        let judged = keyring.take(&stored.entry, &stored.change_set).unwrap();
        let signers = if stored.index == 2 { vec!["alice"] } else { vec![] };
        assert_eq!(judged.signers.iter().map(|name| name.as_str()).collect::<Vec<_>>(), signers);
    }
}

#[tokio::test]
async fn what_no_honest_authenticator_says_opens_no_session_and_signs_no_change() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let origin = mesh.origin();
    for (case, expected) in [
        ("another origin", "what was signed is refused"),
        ("no PIN", "what was signed is refused"),
        ("a cloned count", "what was signed is refused"),
        ("an answer shown twice", "this ceremony was ended already, or its time is over"),
        ("the challenge of another change", "this ceremony was ended already, or its time is over"),
        ("a sign-in", "this ceremony was ended already, or its time is over"),
        ("too late", "this ceremony was ended already, or its time is over"),
    ] {
        let id = mesh.proposed("alice", "web").await;
        let path = format!("/changes/{id}");
        let challenge = alice.post(&format!("{path}/challenge"), json!({})).await.unwrap();
        let refused = match case {
            "another origin" => {
                let signed = alice.signed(&challenge, "http://localhost:1");
                alice.post(&format!("{path}/sign"), signed).await
            }
            "no PIN" => {
                alice.key.verifies_user = false;
                let signed = alice.signed(&challenge, &origin);
                alice.key.verifies_user = true;
                alice.post(&format!("{path}/sign"), signed).await
            }
            "a cloned count" => {
                let count = alice.key.count.replace(0);
                let signed = alice.signed(&challenge, &origin);
                alice.key.count = count;
                alice.post(&format!("{path}/sign"), signed).await
            }
            "an answer shown twice" => {
                let signed = alice.signed(&challenge, "http://localhost:1");
                alice.post(&format!("{path}/sign"), signed).await.unwrap_err();
                let signed = alice.signed(&challenge, &origin);
                alice.post(&format!("{path}/sign"), signed).await
            }
            "the challenge of another change" => {
                let other = mesh.proposed("alice", "other").await;
                let challenge = alice.post(&format!("/changes/{other}/challenge"), json!({})).await.unwrap();
                let signed = alice.signed(&challenge, &origin);
                alice.post(&format!("{path}/sign"), signed).await
            }
            "a sign-in" => {
                let challenge = alice.post("/sign-in/key/begin", json!({})).await.unwrap();
                let signed = alice.signed(&challenge, &origin);
                alice.post(&format!("{path}/sign"), signed).await
            }
            _ => {
                let signed = alice.signed(&challenge, &origin);
                mesh.pass(5 * 60 * 1000 + 1);
                alice.post(&format!("{path}/sign"), signed).await
            }
        };
        let (_, title) = refused.unwrap_err();
        match case {
            // The change itself waits no longer than that.
            "too late" => assert!(title.contains("its time is over"), "{case}: {title}"),
            _ => assert_eq!(title, expected, "{case}"),
        }
    }
    assert_eq!(mesh.plane().ledger.head().follower.revision().0, 2, "nothing was changed");
    let mut stranger = mesh.browser();
    for (case, named) in [("unknown key", json!({})), ("unknown name", json!({ "operator": "zoe" }))] {
        assert_eq!(stranger.signs_in(named).await.unwrap_err().0, 403, "{case}");
    }
    let decoy = stranger.post("/sign-in/key/begin", json!({ "operator": "zoe" })).await.unwrap();
    assert_eq!(decoy["options"]["allowCredentials"].as_array().unwrap().len(), 1, "as if there were one");
}

/// PROVES (session-of-somebody)
#[tokio::test]
async fn a_session_ends_with_its_time_and_with_its_operator() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    assert_eq!(alice.get("/").await.0, StatusCode::OK);
    mesh.pass(session::IDLE_MS - 1);
    assert_eq!(alice.get("/").await.0, StatusCode::OK, "in use");
    mesh.pass(session::IDLE_MS + 1);
    assert_eq!(alice.get("/").await.0, StatusCode::SEE_OTHER, "idle");
    alice.signs_in(json!({})).await.unwrap();
    for _ in 0..12 {
        mesh.pass(session::LIFETIME_MS / 12);
        alice.get("/").await;
    }
    mesh.pass(1);
    assert_eq!(alice.get("/").await.0, StatusCode::SEE_OTHER, "used all the time, and over");

    alice.signs_in(json!({})).await.unwrap();
    let mut bob = mesh.browser();
    let bobs = OperatorName::parse("bob").unwrap();
    let invite = Change::InviteOperator { name: bobs.clone(), roles: ["owner".into()].into() };
    let id = propose(&mesh, invite).await;
    let invitations = {
        let challenge = alice.post(&format!("/changes/{id}/challenge"), json!({})).await.unwrap();
        let signed = alice.signed(&challenge, &mesh.origin());
        alice.post(&format!("/changes/{id}/sign"), signed).await.unwrap()["invitations"].clone()
    };
    let token = invitations[0]["token"].as_str().unwrap();
    let mut thief = mesh.browser();
    assert_eq!(thief.enrols("carol", Some(token)).await.unwrap_err().0, 403, "it is bob's");
    bob.enrols("bob", Some(token)).await.unwrap();
    bob.signs_in(json!({})).await.unwrap();
    assert_eq!(bob.get("/").await.0, StatusCode::OK);
    let id = propose(&mesh, Change::RemoveOperator { name: bobs }).await;
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
    assert_eq!(bob.get("/").await.0, StatusCode::SEE_OTHER, "no operator any more");
    alice.post("/sign-out", json!({})).await.unwrap();
    assert_eq!(alice.get("/").await.0, StatusCode::SEE_OTHER);
}

async fn propose(mesh: &Mesh, change: Change) -> String {
    let shown = Shown { operator: Some(OperatorName::parse("alice").unwrap()), ..Shown::default() };
    let asked = ApplyAs { apply: mesh.asked(vec![change]), shown };
    proposals::apply(mesh.plane(), asked).await.unwrap_err().refusal.unwrap().change.unwrap()
}

#[tokio::test]
async fn one_more_key_is_a_change_that_a_key_that_is_there_signs() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let first = std::mem::replace(&mut alice.key, SecurityKey::new());
    let mut other = mesh.browser();
    assert_eq!(other.enrols("alice", None).await.unwrap_err().0, 403, "nobody is signed in there");
    let begun = alice.post("/enroll/key/begin", json!({ "enrol": { "operator": "alice" } })).await.unwrap();
    let excluded = &begun["options"]["excludeCredentials"][0]["id"];
    assert_eq!(excluded, first.factor_id().as_str(), "the same key is not enrolled twice");
    let enrolled = alice.enrols("alice", None).await.unwrap();
    let id = enrolled["change"].as_str().unwrap().to_owned();
    let second = std::mem::replace(&mut alice.key, first);
    assert_eq!(alice.signs_change(&id, &mesh.origin()).await.unwrap()["revision"], 3);
    alice.key = second;
    alice.signs_in(json!({ "operator": "alice" })).await.unwrap();
}

/// PROVES (own-pages-only)
#[tokio::test]
async fn every_request_that_changes_something_is_refused_from_another_page_without_a_session_and_under_another_name() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let origin = mesh.origin();
    let csrf = alice.csrf.clone();
    let own = [("origin", &*origin), ("x-countersign-csrf", &*csrf), ("content-type", "application/json")];
    let for_operators = [
        "/sign-out",
        "/acts/read_decisions/challenge",
        "/acts/read_decisions/sign",
        "/acts/read_decisions/code",
        "/changes/p1/challenge",
        "/changes/p1/sign",
        "/changes/p1/code",
        "/changes/p1/reject",
        "/changes/p1/withdraw",
        "/operators/ask",
        "/device/answer",
        "/sessions/s1/end",
    ];
    let for_strangers = [
        "/sign-in/key/begin",
        "/sign-in/key/finish",
        "/sign-in/code",
        "/enroll/key/begin",
        "/enroll/key/finish",
        "/enroll/code/begin",
        "/enroll/code/finish",
    ];
    for path in for_operators.iter().chain(&for_strangers) {
        let with = |name: &'static str, value: &'static str| {
            let mut headers: Vec<(&str, &str)> = own.iter().copied().filter(|(own, _)| *own != name).collect();
            headers.push((name, value));
            headers
        };
        let (status, _) = alice.send(Method::POST, path, &with("origin", "https://evil.example"), "{}".into()).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path} from another page");
        let (status, _) = alice.send(Method::POST, path, &with("host", "evil.example"), "{}".into()).await;
        assert_eq!(status, StatusCode::MISDIRECTED_REQUEST, "{path} under another name");
        if for_operators.contains(path) {
            let wrong = with("x-countersign-csrf", "0000");
            let (status, text) = alice.send(Method::POST, path, &wrong, "{}".into()).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{path}: {text}");
            let mut stranger = mesh.browser();
            let (status, _) = stranger.send(Method::POST, path, &own, "{}".into()).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path} of a stranger");
        }
        let takes_nothing = [
            "/sign-out",
            "/acts/read_decisions/challenge",
            "/changes/p1/challenge",
            "/changes/p1/reject",
            "/changes/p1/withdraw",
            "/sessions/s1/end",
        ];
        if !takes_nothing.contains(path) {
            let long = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
            let (status, _) = alice.send(Method::POST, path, &own, long.into()).await;
            assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{path} with a long body");
        }
    }
    assert_eq!(alice.get("/sign-in?next=//evil.example").await.1.matches("evil").count(), 0);
    let (status, _) = alice.send(Method::GET, "/", &[("host", "evil.example")], Body::empty()).await;
    assert_eq!(status, StatusCode::MISDIRECTED_REQUEST);
}

#[tokio::test]
async fn strangers_who_try_too_much_are_slowed_down() {
    let mesh = Mesh::start().await;
    let mut stranger = mesh.browser();
    let mut last = 0;
    for _ in 0..200 {
        last = stranger.post("/sign-in/code", json!({ "operator": "alice", "code": "000000" })).await.unwrap_err().0;
        if last == 429 {
            break;
        }
    }
    assert_eq!(last, 429);
}

/// What a hostile author writes into names and texts stands on pages as text.
#[tokio::test]
async fn what_a_change_says_is_shown_as_text_and_runs_nowhere() {
    const HOSTILE: &str = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>";
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let text = format!("// {HOSTILE}\n@id(\"all\")\npermit (principal, action, resource);");
    let mut bodies = Bodies::default();
    let body = bodies.insert(text.as_str());
    let changes = vec![
        Change::SetPolicy { id: "all".into(), file: "policies/all.cedar".into(), body },
        Change::DeclareService { name: ServiceName::parse("web").unwrap(), spec: ServiceSpec::new(Protocol::Http) },
    ];
    let apply = Apply { bodies, ..mesh.asked(changes) };
    let shown = Shown { operator: Some(OperatorName::parse("alice").unwrap()), ..Shown::default() };
    let refused = proposals::apply(mesh.plane(), ApplyAs { apply, shown }).await.unwrap_err();
    let id = refused.refusal.as_ref().and_then(|refusal| refusal.change.clone());
    let id = id.unwrap_or_else(|| panic!("{refused:?}"));
    let (_, page) = alice.get(&format!("/changes/{id}")).await;
    assert!(page.contains("Set policy all and 2 more changes"), "{page}");
    assert!(page.contains("alert(1)") && !page.contains("<script>alert") && !page.contains("<img src=x"), "{page}");
    let digest = proposals::show(mesh.plane(), &id).await.unwrap().change_set.digest();
    assert!(page.contains(&digest.to_string()), "what is hashed is what is shown");
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
    let (status, page) = alice.get("/ledger/3").await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert!(page.contains("alert(1)") && !page.contains("<script>alert") && !page.contains("<img src=x"), "{page}");
    let hostile = alice.get(&format!("/changes/{}", "%3Cscript%3Ealert(3)%3C%2Fscript%3E")).await.1;
    assert!(!hostile.contains("<script>alert"), "{hostile}");
}

#[tokio::test]
async fn an_entry_shows_who_signed_it_and_its_proof_is_verified_and_can_be_taken_along() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let id = mesh.proposed("alice", "web").await;
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
    let (_, page) = alice.get("/ledger").await;
    assert!(page.contains("Set service web"), "{page}");
    let (_, page) = alice.get("/ledger/3").await;
    assert!(page.contains(">verified</span>") && page.contains(">counts</span>"), "{page}");
    let (status, proof) = alice.get("/ledger/3/proof").await;
    assert_eq!(status, StatusCode::OK);
    let stored = mesh.plane().ledger.stored(2, 1).await.unwrap().pop().unwrap();
    let key = mesh.plane().authority().unwrap().log().verifier().clone();
    let proof = EntryProof::parse(proof.as_bytes()).unwrap();
    assert_eq!(proof.verify(&stored.entry, &Trust::log(key)).unwrap().checkpoint().size(), 3);
    assert_eq!(alice.get("/ledger/4").await.0, StatusCode::NOT_FOUND);
    assert_eq!(alice.get("/ledger/0").await.0, StatusCode::NOT_FOUND);
    assert_eq!(alice.get("/changes/3").await.0, StatusCode::SEE_OTHER, "a revision is in the ledger");
    for path in ["/", "/changes", "/operators", "/account", "/enroll"] {
        assert_eq!(alice.get(path).await.0, StatusCode::OK, "{path}");
    }
}

/// An owner invites somebody, who countersigns nothing yet but has sessions that the owner can end and they cannot end the owner's.
#[tokio::test]
async fn operators_are_asked_for_on_a_page_and_sessions_are_ended_by_their_operator_or_an_owner() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    for (roles, name) in [("Owner!", "bob"), ("owner", "Bob Builder!")] {
        let refused = alice.post("/operators/ask", json!({ "ask": "invite", "operator": name, "roles": roles })).await;
        assert_eq!(refused.unwrap_err().0, 400, "{roles} {name}");
    }
    let asked = alice.post("/operators/ask", json!({ "ask": "invite", "operator": "bob", "roles": "editor" })).await;
    let id = asked.unwrap()["change"].as_str().unwrap().to_owned();
    let (_, page) = alice.get(&format!("/changes/{id}")).await;
    assert!(page.contains("bob is invited, as editor"), "{page}");
    let answer = alice.signs_change(&id, &mesh.origin()).await.unwrap();
    let token = answer["invitations"][0]["token"].as_str().unwrap().to_owned();
    let mut bob = mesh.browser();
    bob.enrols("bob", Some(&token)).await.unwrap();
    bob.signs_in(json!({ "operator": "bob" })).await.unwrap();
    let denied = bob.post("/operators/ask", json!({ "ask": "invite", "operator": "carol", "roles": "owner" })).await;
    assert_eq!(denied.unwrap_err().0, 403, "an editor does not invite operators");

    let sessions = session::list(mesh.plane()).await.unwrap();
    let of = |name: &str| sessions.iter().find(|session| session.author().to_string() == name).unwrap().id.clone();
    let (_, page) = bob.get("/operators").await;
    assert!(!page.contains(&of("alice")) && !page.contains("Sessions of everybody"), "{page}");
    assert_eq!(bob.post(&format!("/sessions/{}/end", of("alice")), json!({})).await.unwrap_err().0, 404);
    let csrf = std::mem::take(&mut alice.csrf);
    assert_eq!(
        alice.post(&format!("/sessions/{}/end", of("bob")), json!({})).await.unwrap_err().0,
        403,
        "without the page"
    );
    alice.csrf = csrf;
    let (_, page) = alice.get("/operators").await;
    assert!(page.contains(&of("bob")), "{page}");
    alice.post(&format!("/sessions/{}/end", of("bob")), json!({})).await.unwrap();
    assert_eq!(bob.get("/").await.0, StatusCode::SEE_OTHER);
    assert_eq!(alice.get("/").await.0, StatusCode::OK);
    alice.post(&format!("/sessions/{}/end", of("alice")), json!({})).await.unwrap();
    let (status, _) = alice.send(Method::GET, "/", &[("hx-request", "true")], Body::empty()).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "a part of a page is not replaced by the sign-in");
}

#[tokio::test]
async fn a_page_that_listens_is_told_and_does_not_keep_its_session_alive() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let authority = alice.origin.split_once("://").unwrap().1.to_owned();
    let request = Request::builder()
        .uri("/events")
        .header(header::HOST, authority)
        .header(header::ACCEPT, "text/event-stream")
        .header(header::COOKIE, alice.cookie.clone().unwrap());
    let mut request = request.body(Body::empty()).unwrap();
    request.extensions_mut().insert(From("192.0.2.7".parse().unwrap()));
    let response = alice.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let mut events = response.into_body().into_data_stream();
    mesh.proposed("alice", "web").await;
    let event =
        tokio::time::timeout(std::time::Duration::from_secs(20), events.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(&event[..], b"event: changed\ndata: look\n\n");

    mesh.pass(session::IDLE_MS - 1);
    let (status, _) = alice.send(Method::GET, "/", &[("hx-request", "true")], Body::empty()).await;
    assert_eq!(status, StatusCode::OK);
    mesh.pass(2);
    assert_eq!(alice.get("/").await.0, StatusCode::SEE_OTHER, "what a page asks by itself is no use of a session");
    mesh.proposed("alice", "other").await;
    let end = tokio::time::timeout(std::time::Duration::from_secs(20), events.next()).await.unwrap();
    assert!(end.is_none(), "it ends with its session");
}

/// Keeps a denial of `path`, as an agent reports it.
async fn denied(mesh: &Mesh, id: &str, path: &str) {
    let record = json!({
        "id": id,
        "at_ms": mesh.plane().clock.now_ms(),
        "instance": "catalog/1",
        "revision": 2,
        "signal_seq": 0,
        "outcome": "deny",
        "reason": "no_policy_permits",
        "policies": [],
        "inputs": {
            "principal": "spiffe://shop.example/web",
            "action": "http:GET",
            "service": "catalog",
            "path": path,
            "host": "catalog.mesh",
            "method": "GET",
            "protocol": "http",
            "size": null,
            "origin": "192.0.2.9",
            "now": 1_790_000_000,
            "first_contact": true,
        },
        "judged": "at_start",
        "ended": null,
        "trace_id": null,
        "judge_ns": 1000,
    });
    let record = serde_json::from_value(record).unwrap();
    let now_ms = mesh.plane().clock.now_ms();
    let kept = mesh.plane().storage.run("put_report", move |store| store.put_report(&[record], &[], now_ms)).await;
    kept.unwrap();
}

impl Browser {
    /// Shows its key for what `id` names.
    async fn opens(&mut self, id: &str) -> Result<Value, Refused> {
        let challenge = self.post(&format!("/acts/{id}/challenge"), json!({})).await?;
        let origin = self.origin.clone();
        let signed = self.signed(&challenge, &origin);
        self.post(&format!("/acts/{id}/sign"), signed).await
    }
}

#[tokio::test]
async fn decisions_are_shown_to_who_shows_a_key_for_them_in_that_session_and_for_minutes() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    denied(&mesh, &"0a".repeat(16), "/secret/<script>alert(1)").await;
    for path in ["/decisions", "/decisions/0a0a"] {
        let (status, page) = alice.get(path).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{path}");
        assert!(page.contains("Show a factor for reading decisions") && !page.contains("/secret"), "{page}");
    }
    assert_eq!(alice.get("/ledger").await.0, StatusCode::OK, "the ledger needs no more than a session");
    let coded = alice.post("/acts/read_decisions/code", json!({ "code": "000000" })).await.unwrap_err();
    assert_eq!(coded.0, 403, "a code does not do for who has a key");

    let foreign = alice.post("/acts/read_decisions/challenge", json!({})).await.unwrap();
    let origin = mesh.origin();
    let signed = alice.signed(&foreign, &origin);
    let other = alice.post("/acts/export_ledger/sign", signed.clone()).await.unwrap_err();
    assert_eq!(other.0, 410, "what was signed for one act opens no other");
    assert_eq!(alice.post("/acts/read_decisions/sign", signed).await.unwrap_err().0, 410, "and is used up");
    let sign_in = alice.post("/sign-in/key/begin", json!({})).await.unwrap();
    let signed = alice.signed(&sign_in, &origin);
    assert_eq!(alice.post("/acts/read_decisions/sign", signed).await.unwrap_err().0, 410, "a sign-in opens nothing");

    alice.opens("read_decisions").await.unwrap();
    let (status, page) = alice.get("/decisions?service=catalog&principal=web&outcome=deny&minutes=5").await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert!(page.contains("/secret/") && !page.contains("<script>alert"), "{page}");
    let (_, page) = alice.get("/decisions?outcome=permit").await;
    assert!(page.contains("No decision is kept that fits"), "{page}");
    for wrong in ["minutes=soon", "outcome=maybe", "service=%20Not%20One"] {
        let (status, page) = alice.get(&format!("/decisions?{wrong}")).await;
        assert!(status.is_success() && page.contains("role=\"alert\""), "{wrong}: {page}");
    }
    let (_, page) = alice.get(&format!("/decisions/{}", "0a".repeat(16))).await;
    assert!(page.contains("192.0.2.9") && page.contains("what no policy permits is denied"), "{page}");
    assert_eq!(alice.get("/decisions/ff").await.0, StatusCode::NOT_FOUND);

    let mut elsewhere = mesh.browser();
    std::mem::swap(&mut elsewhere.key, &mut alice.key);
    elsewhere.signs_in(json!({})).await.unwrap();
    assert_eq!(elsewhere.get("/decisions").await.0, StatusCode::FORBIDDEN, "another session of the same operator");
    assert_eq!(alice.get("/decisions").await.0, StatusCode::OK);
    mesh.pass(crate::acts::GRANT_LIFETIME_MS + 1000);
    assert_eq!(alice.get("/decisions").await.0, StatusCode::FORBIDDEN, "its time is over");
}

#[tokio::test]
async fn what_a_command_asks_in_an_operators_name_is_opened_by_their_key_for_that_command() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let name = OperatorName::parse("alice").unwrap();
    let invites = async || {
        let by = crate::acts::By::Socket(Some(&name));
        let act = countersign_core::gate::act::Act::InviteHost;
        crate::acts::pass(mesh.plane(), act, by, &Shown::default()).await
    };
    let refusal = invites().await.unwrap_err().refusal.unwrap();
    assert_eq!(refusal.requires.unwrap().factor.unwrap().as_str(), "phr");
    let url = refusal.url.unwrap();
    let id = url.strip_prefix(&format!("{}/acts/", mesh.origin())).unwrap().to_owned();
    let (status, page) = alice.get(&format!("/acts/{id}")).await;
    assert!(status == StatusCode::FORBIDDEN && page.contains("only if it was you"), "{page}");
    alice.opens(&id).await.unwrap();
    let (status, page) = alice.get(&format!("/acts/{id}")).await;
    assert!(status == StatusCode::OK && page.contains("Run the command again"), "{page}");
    invites().await.unwrap();
    assert_eq!(invites().await.unwrap_err().status, 403, "good for one time");

    let asked = alice.post("/operators/ask", json!({ "ask": "invite", "operator": "bob", "roles": "owner" })).await;
    let change = asked.unwrap()["change"].as_str().unwrap().to_owned();
    let answer = alice.signs_change(&change, &mesh.origin()).await.unwrap();
    let token = answer["invitations"][0]["token"].as_str().unwrap().to_owned();
    let mut bob = mesh.browser();
    bob.enrols("bob", Some(&token)).await.unwrap();
    bob.signs_in(json!({ "operator": "bob" })).await.unwrap();
    let url = invites().await.unwrap_err().refusal.unwrap().url.unwrap();
    let id = url.rsplit('/').next().unwrap();
    assert_eq!(bob.get(&format!("/acts/{id}")).await.0, StatusCode::NOT_FOUND, "it is not for him");
    assert_eq!(bob.opens(id).await.unwrap_err().0, 404);
    mesh.pass(5 * 60 * 1000 + 1);
    assert_eq!(alice.get(&format!("/acts/{id}")).await.0, StatusCode::NOT_FOUND, "too late");
}
