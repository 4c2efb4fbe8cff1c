//! A command on another machine without a machine: it is signed in, and asks with its token and proofs of its key.

use countersign_api::dpop::{DPOP_HEADER, ProofKey};

use super::*;
use crate::site::{
    command::{RULES, Rule},
    device::{CODE_LIFETIME_MS, FRESH_MS, WAITING_FROM_ONE_MAX},
};

pub(super) struct Command<'m> {
    mesh: &'m Mesh,
    router: Router,
    key: ProofKey,
    token: String,
    from: &'static str,
}

pub(super) type Answered = (StatusCode, Value);

impl<'m> Command<'m> {
    fn new(mesh: &'m Mesh) -> Self {
        let router = crate::site::router(mesh.plane().clone());
        Self { mesh, router, key: ProofKey::generate(), token: String::new(), from: "192.0.2.9" }
    }

    fn seconds(&self) -> i64 {
        (self.mesh.now_ms.load(Ordering::Relaxed) / 1000) as i64
    }

    fn prove(&self, method: &str, path: &str, token: Option<&str>) -> String {
        self.key.prove(method, &format!("{}{path}", self.mesh.origin()), token, self.seconds())
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Body) -> Answered {
        let origin = self.mesh.origin();
        let mut request = Request::builder().method(method).uri(path);
        request = request.header(header::HOST, origin.split_once("://").unwrap().1);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(body).unwrap();
        request.extensions_mut().insert(From(self.from.parse().unwrap()));
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        if status == StatusCode::UNAUTHORIZED {
            let challenge = response.headers()[header::WWW_AUTHENTICATE].to_str().unwrap();
            assert!(challenge.starts_with("DPoP ") && challenge.ends_with("algs=\"ES256\""), "{challenge}");
        }
        // A stream that does not end by itself says no more here than that it began.
        if response.headers().get(header::CONTENT_TYPE).is_some_and(|media| media == "application/x-ndjson") {
            return (status, Value::Null);
        }
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn form(&self, path: &str, form: &str) -> Answered {
        let proof = self.prove("POST", path, None);
        let headers = [("content-type", "application/x-www-form-urlencoded"), (DPOP_HEADER, &*proof)];
        self.send(Method::POST, path, &headers, form.to_owned().into()).await
    }

    async fn authorize(&self) -> Answered {
        let key = self.key.thumbprint();
        self.form("/device/authorize", &format!("client_id=countersign&dpop_jkt={key}&device_name=a%40laptop")).await
    }

    async fn poll(&self, code: &str) -> Result<Value, String> {
        let grant = "urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Adevice_code";
        let form = format!("grant_type={grant}&client_id=countersign&device_code={code}");
        match self.form("/device/token", &form).await {
            (StatusCode::OK, granted) => Ok(granted),
            (_, refused) => Err(refused["error"].as_str().unwrap_or_default().to_owned()),
        }
    }

    /// Asks; returns the code that it shows and the one that it asks with.
    async fn asks(&self) -> (String, String) {
        let (status, begun) = self.authorize().await;
        assert_eq!(status, StatusCode::OK, "{begun}");
        (begun["user_code"].as_str().unwrap().to_owned(), begun["device_code"].as_str().unwrap().to_owned())
    }

    async fn signed_in_by(mesh: &'m Mesh, browser: &mut Browser) -> Self {
        browser.signs_in(json!({})).await.unwrap();
        Self::allowed_by(mesh, browser).await
    }

    /// Allowed by who has just signed in.
    pub(super) async fn allowed_by(mesh: &'m Mesh, browser: &mut Browser) -> Self {
        let mut command = Self::new(mesh);
        let (shown, code) = command.asks().await;
        browser.post("/device/answer", json!({ "code": shown, "allow": true })).await.unwrap();
        let granted = command.poll(&code).await.unwrap();
        assert_eq!(granted["token_type"], "DPoP");
        command.token = granted["access_token"].as_str().unwrap().to_owned();
        command
    }

    pub(super) async fn ask(&self, method: Method, path: &str, body: Value) -> Answered {
        let proof = self.prove(method.as_str(), path, Some(&self.token));
        self.ask_with(method, path, &proof, body).await
    }

    async fn ask_with(&self, method: Method, path: &str, proof: &str, body: Value) -> Answered {
        let authorization = format!("DPoP {}", self.token);
        let headers = [("authorization", &*authorization), (DPOP_HEADER, proof), ("content-type", "application/json")];
        self.send(method, path, &headers, body.to_string().into()).await
    }

    pub(super) async fn whoami(&self) -> Answered {
        self.ask(Method::GET, "/v1/session", Value::Null).await
    }
}

/// PROVES (device-answered-once)
#[tokio::test]
async fn a_command_is_signed_in_once_with_the_key_that_asked_by_who_just_showed_a_factor() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let command = Command::new(&mesh);
    let (shown, code) = command.asks().await;
    assert_eq!(command.poll(&code).await.unwrap_err(), "authorization_pending");
    assert_eq!(command.poll(&code).await.unwrap_err(), "slow_down", "too early");
    mesh.pass(9_999);
    assert_eq!(command.poll(&code).await.unwrap_err(), "slow_down", "the pause is longer now");
    mesh.pass(15_000);
    let (_, page) = alice.get(&format!("/device?code={}", shown.to_lowercase().replace('-', ""))).await;
    for text in [&shown, "a@laptop", &command.key.thumbprint(), "192.0.2.9", "Allow it"] {
        assert!(page.contains(text), "{text}: {page}");
    }
    let mut stranger = mesh.browser();
    assert_eq!(stranger.get(&format!("/device?code={shown}")).await.0, StatusCode::SEE_OTHER);
    let answer = |allow: bool| json!({ "code": shown, "allow": allow });
    assert_eq!(stranger.post("/device/answer", answer(true)).await.unwrap_err().0, 401);
    mesh.pass(FRESH_MS);
    let (_, page) = alice.get(&format!("/device?code={shown}")).await;
    assert!(page.contains("Sign in again") && !page.contains("Allow it"), "{page}");
    assert_eq!(alice.post("/device/answer", answer(true)).await.unwrap_err().0, 403, "too long ago");
    assert_eq!(command.poll(&code).await.unwrap_err(), "authorization_pending");
    alice.signs_in(json!({})).await.unwrap();
    alice.post("/device/answer", answer(true)).await.unwrap();
    assert_eq!(alice.post("/device/answer", answer(false)).await.unwrap_err().0, 404, "it is answered");
    mesh.pass(20_000);
    let thief = Command::new(&mesh);
    assert_eq!(thief.poll(&code).await.unwrap_err(), "invalid_grant", "another key");
    assert_eq!(command.poll(&code).await.unwrap()["who"], "alice");
    assert_eq!(command.poll(&code).await.unwrap_err(), "invalid_grant", "once");

    let (shown, code) = command.asks().await;
    alice.post("/device/answer", json!({ "code": shown, "allow": false })).await.unwrap();
    assert_eq!(command.poll(&code).await.unwrap_err(), "access_denied");
    let (shown, code) = command.asks().await;
    mesh.pass(CODE_LIFETIME_MS);
    assert_eq!(command.poll(&code).await.unwrap_err(), "expired_token");
    alice.signs_in(json!({})).await.unwrap();
    assert_eq!(alice.post("/device/answer", json!({ "code": shown, "allow": true })).await.unwrap_err().0, 404);
    assert_eq!(command.poll("0").await.unwrap_err(), "invalid_grant");
    let sessions = session::list(mesh.plane()).await.unwrap();
    assert_eq!(sessions.iter().filter(|session| session.key.is_some()).count(), 1);
}

#[tokio::test]
async fn what_asks_to_be_signed_in_is_bounded_and_read_strictly() {
    let mesh = Mesh::start().await;
    let mut command = Command::new(&mesh);
    let key = command.key.thumbprint();
    for form in [
        format!("client_id=other&dpop_jkt={key}"),
        format!("dpop_jkt={key}"),
        "client_id=countersign".to_owned(),
        format!("client_id=countersign&dpop_jkt={}", "a".repeat(42)),
        format!("client_id=countersign&dpop_jkt={}", "%3C".repeat(43)),
        format!("client_id=countersign&dpop_jkt={key}&device_name={}", "a".repeat(5000)),
    ] {
        assert_eq!(command.form("/device/authorize", &form).await.0, StatusCode::BAD_REQUEST, "{form}");
    }
    let json = [("content-type", "application/json")];
    let (status, _) = command.send(Method::POST, "/device/authorize", &json, "{}".into()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    for _ in 0..WAITING_FROM_ONE_MAX {
        command.asks().await;
    }
    assert_eq!(command.authorize().await.0, StatusCode::TOO_MANY_REQUESTS, "from one address");
    command.from = "192.0.2.10";
    command.asks().await;
    command.from = "192.0.2.9";
    mesh.pass(CODE_LIFETIME_MS);
    command.asks().await;
}

/// PROVES (session-with-its-key)
/// PROVES (proof-once)
#[tokio::test]
async fn a_commands_token_is_good_with_a_new_proof_of_its_key_and_as_nothing_else() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let mut command = Command::signed_in_by(&mesh, &mut alice).await;
    let (status, own) = command.whoami().await;
    assert_eq!((status, &own["who"], &own["kind"]), (StatusCode::OK, &json!("alice"), &json!("command_line")));
    assert!(own["agent"].as_str().unwrap().starts_with("a@laptop"), "{own}");

    let proof = command.prove("GET", "/v1/status", Some(&command.token));
    assert_eq!(command.ask_with(Method::GET, "/v1/status", &proof, Value::Null).await.0, StatusCode::OK);
    let again = command.ask_with(Method::GET, "/v1/status", &proof, Value::Null).await;
    assert_eq!((again.0, &again.1["title"]), (StatusCode::UNAUTHORIZED, &json!("the proof was shown before")));
    let elsewhere = command.prove("GET", "/v1/mesh", Some(&command.token));
    assert_eq!(command.ask_with(Method::GET, "/v1/status", &elsewhere, Value::Null).await.0, StatusCode::UNAUTHORIZED);
    let of_another = Command::new(&mesh).prove("GET", "/v1/status", Some(&command.token));
    assert_eq!(command.ask_with(Method::GET, "/v1/status", &of_another, Value::Null).await.0, StatusCode::UNAUTHORIZED);
    for scheme in ["Bearer", "Basic"] {
        let proof = command.prove("GET", "/v1/status", Some(&command.token));
        let authorization = format!("{scheme} {}", command.token);
        let headers = [("authorization", &*authorization), (DPOP_HEADER, &*proof)];
        let (status, _) = command.send(Method::GET, "/v1/status", &headers, Body::empty()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{scheme}");
    }
    let mut thief = mesh.browser();
    thief.cookie = Some(format!("countersign={}", command.token));
    assert_eq!(thief.get("/").await.0, StatusCode::SEE_OTHER, "it is no cookie");
    let cookie = alice.cookie.clone().unwrap();
    let own = std::mem::replace(&mut command.token, cookie.split_once('=').unwrap().1.to_owned());
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "a browser's token is a cookie");
    command.token = own;

    mesh.pass(session::IDLE_MS - 1);
    assert_eq!(command.whoami().await.0, StatusCode::OK);
    mesh.pass(session::IDLE_MS + 1);
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "idle");
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    for _ in 0..13 {
        mesh.pass(session::LIFETIME_MS / 12 - 60_000);
        command.whoami().await;
    }
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "used all the time, and over");
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    assert_eq!(command.ask(Method::POST, "/v1/session/end", json!({})).await.0, StatusCode::OK);
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "it signed out");
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    let ids = session::list(mesh.plane()).await.unwrap();
    let id = ids.into_iter().find(|session| session.key.is_some()).unwrap().id;
    alice.post(&format!("/sessions/{id}/end"), json!({})).await.unwrap();
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "it was ended");
}

/// Every request of the local API stands in the table of those that come from afar, and is what it says there.
///
/// PROVES (own-name-only)
#[tokio::test]
async fn every_request_from_afar_is_its_sessions_operators_or_refused() {
    let source = include_str!("../../local_api.rs");
    let mut routes = Vec::new();
    for line in source.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let (path, handlers) = line.split_once('"').unwrap();
        for (word, method) in [("get(", Method::GET), ("post(", Method::POST), ("put(", Method::PUT)] {
            if handlers.contains(word) {
                routes.push((method, path));
            }
        }
    }
    assert!(routes.len() > 25, "{routes:?}");
    let own = ["/v1/session", "/v1/session/end"];
    let ruled: Vec<_> = RULES.iter().map(|(method, path, _)| (method.clone(), *path)).collect();
    for route in &routes {
        assert_eq!(ruled.iter().filter(|ruled| *ruled == route).count(), 1, "{route:?} needs one rule");
    }
    assert_eq!(ruled.len(), routes.len() + own.len(), "a rule for nothing");

    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    let revision = mesh.plane().ledger.head().follower.revision();
    for (method, pattern, rule) in RULES {
        let path = pattern.replace("{revision}", "1").replace("{index}", "0").replace("{size}", "1");
        let path = path.replace("{service}", "web").replace("{id}", "p0").replace("{act}", "read_decisions");
        let stranger = [("content-type", "application/json")];
        let (status, _) = command.send(method.clone(), &path, &stranger, "{}".into()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path} of a stranger");
        let named = |name: &str| match rule {
            Rule::Names(["operator"]) | Rule::Asks(["operator"]) => json!({ "operator": name }),
            Rule::Names(_) | Rule::Asks(_) => {
                json!({ "change_set": { "base": 2, "changes": [] }, "bodies": {}, "shown": { "operator": name } })
            }
            _ => json!({}),
        };
        let (status, answer) = command.ask(method.clone(), &path, named("mallory")).await;
        match rule {
            Rule::Refused(_) => {
                assert_eq!(
                    (status, &answer["title"]),
                    (StatusCode::FORBIDDEN, &json!("this cannot be asked for from another machine")),
                    "{path}"
                );
            }
            Rule::Names(_) | Rule::Asks(_) => {
                assert_eq!(
                    (status, &answer["title"]),
                    (StatusCode::FORBIDDEN, &json!("the request names another operator")),
                    "{path}"
                );
                let (_, answer) = command.ask(method.clone(), &path, named("alice")).await;
                assert_ne!(answer["title"], "the request names another operator", "{path}");
            }
            // The stream of decisions does not end, and a session that ended asks nothing any more.
            Rule::TakesLedger => assert_eq!(answer["refusal"]["act"], "export_ledger", "{path}: {answer}"),
            Rule::Reads | Rule::ReadsLedger | Rule::OfSession => {
                assert_ne!(status, StatusCode::UNAUTHORIZED, "{path}: {answer}")
            }
        }
        if *pattern == "/v1/sessions/end" {
            break;
        }
    }
    assert_eq!(mesh.plane().ledger.head().follower.revision(), revision, "nothing was changed");
}

#[tokio::test]
async fn a_session_asks_for_changes_in_its_operators_name_and_admits_none() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    let declare =
        Change::DeclareService { name: ServiceName::parse("web").unwrap(), spec: ServiceSpec::new(Protocol::Http) };
    let asked = serde_json::to_value(mesh.asked(vec![declare])).unwrap();
    let (status, refused) = command.ask(Method::POST, "/v1/changes", asked).await;
    assert_eq!((status, &refused["refusal"]["outcome"]), (StatusCode::FORBIDDEN, &json!("step_up")), "{refused}");
    let id = refused["refusal"]["change"].as_str().unwrap().to_owned();
    assert_eq!(refused["refusal"]["url"], format!("{}/changes/{id}", mesh.origin()));
    let (status, detail) = command.ask(Method::GET, &format!("/v1/proposals/{id}"), Value::Null).await;
    assert_eq!((status, &detail["proposal"]["author"]), (StatusCode::OK, &json!("alice")), "{detail}");
    let (status, withdrawn) = command.ask(Method::POST, &format!("/v1/proposals/{id}/withdraw"), json!({})).await;
    assert_eq!((status, &withdrawn["state"]["state"]), (StatusCode::OK, &json!("withdrawn")), "{withdrawn}");

    // Who is no owner sees their own sessions, and ends no others.
    let bobs = OperatorName::parse("bob").unwrap();
    let id = propose(&mesh, Change::InviteOperator { name: bobs.clone(), roles: ["editor".into()].into() }).await;
    let invited = alice.signs_change(&id, &mesh.origin()).await.unwrap();
    let mut bob = mesh.browser();
    bob.enrols("bob", invited["invitations"][0]["token"].as_str()).await.unwrap();
    let of_bob = Command::signed_in_by(&mesh, &mut bob).await;
    let (_, sessions) = of_bob.ask(Method::GET, "/v1/sessions", Value::Null).await;
    assert!(sessions.as_array().unwrap().iter().all(|session| session["who"] == "bob"), "{sessions}");
    let (status, _) = of_bob.ask(Method::POST, "/v1/sessions/end", json!({ "who": "alice" })).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, ended) = command.ask(Method::POST, "/v1/sessions/end", json!({ "who": "bob" })).await;
    assert_eq!((status, &ended["ended"]), (StatusCode::OK, &json!(2)), "{ended}");
    assert_eq!(of_bob.whoami().await.0, StatusCode::UNAUTHORIZED);
    // A session ends with its operator.
    let of_bob = Command::signed_in_by(&mesh, &mut bob).await;
    let id = propose(&mesh, Change::RemoveOperator { name: bobs }).await;
    alice.signs_change(&id, &mesh.origin()).await.unwrap();
    assert_eq!(of_bob.whoami().await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn from_afar_the_whole_ledger_is_given_to_who_shows_a_factor_for_it() {
    let mesh = Mesh::start().await;
    let mut alice = mesh.owner("alice").await;
    let command = Command::signed_in_by(&mesh, &mut alice).await;
    let whole = ["/v1/ledger", "/v1/ledger/bodies"];
    for path in ["/v1/changes", "/v1/changes/1", "/v1/ledger/checkpoint", "/v1/ledger/proofs/0"] {
        assert_eq!(command.ask(Method::GET, path, Value::Null).await.0, StatusCode::OK, "{path}");
    }
    for path in whole {
        for method in [Method::GET, Method::HEAD] {
            assert_eq!(command.ask(method, path, Value::Null).await.0, StatusCode::FORBIDDEN, "{path}");
        }
    }
    // What she opens in her browser is open there.
    alice.opens("export_ledger").await.unwrap();
    let (status, refused) = command.ask(Method::GET, whole[0], Value::Null).await;
    assert_eq!((status, &refused["refusal"]["act"]), (StatusCode::FORBIDDEN, &json!("export_ledger")), "{refused}");
    let url = refused["refusal"]["url"].as_str().unwrap();
    let id = url.strip_prefix(&format!("{}/acts/", mesh.origin())).unwrap().to_owned();
    let (_, page) = alice.get(&format!("/acts/{id}")).await;
    assert!(page.contains("A command that you signed in on another machine asks for this"), "{page}");
    alice.opens(&id).await.unwrap();
    for path in whole {
        assert_eq!(command.ask(Method::GET, path, Value::Null).await.0, StatusCode::OK, "{path}");
    }
    let another = Command::signed_in_by(&mesh, &mut alice).await;
    assert_eq!(another.ask(Method::GET, whole[0], Value::Null).await.0, StatusCode::FORBIDDEN, "another of hers");
    mesh.pass(15 * 60 * 1000 + 1);
    assert_eq!(command.ask(Method::GET, whole[0], Value::Null).await.0, StatusCode::FORBIDDEN, "too late");
}
