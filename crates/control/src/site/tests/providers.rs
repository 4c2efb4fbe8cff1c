//! A provider on this machine that says what it is told to, and browsers that come back from it.

use std::collections::HashMap;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use axum::{
    body::Bytes,
    routing::{get, post},
};
use parking_lot::Mutex;

use countersign_core::{canonical::Digest, pipeline::Issuer, sign_in::SignIn};

use super::{commands::Command, *};
use crate::site::provider::{QUESTION_LIFETIME_MS, WAITING_FROM_ONE_MAX};

const CLIENT: &str = "mesh";

/// What its token endpoint was sent, and what it answers.
#[derive(Default)]
struct Told {
    forms: Vec<HashMap<String, String>>,
    authorization: Option<String>,
    answer: String,
}

struct Provider {
    url: String,
    key: EcdsaKeyPair,
    told: Arc<Mutex<Told>>,
}

impl Provider {
    async fn start() -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let point = key.public_key().as_ref();
        let (x, y) = (BASE64URL.encode(&point[1..33]), BASE64URL.encode(&point[33..]));
        let keys = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": "1", "x": x, "y": y }] }).to_string();
        let discovery = json!({
            "issuer": url, "jwks_uri": format!("{url}/jwks"), "authorization_endpoint": format!("{url}/authorize"),
            "token_endpoint": format!("{url}/token"), "authorization_response_iss_parameter_supported": true,
            "scopes_supported": ["openid", "groups"],
        })
        .to_string();
        let told = Arc::new(Mutex::new(Told::default()));
        let tells = told.clone();
        let token = async move |headers: http::HeaderMap, body: Bytes| {
            let mut told = tells.lock();
            told.forms.push(pairs(std::str::from_utf8(&body).unwrap()));
            told.authorization = headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
            match told.answer.is_empty() {
                true => (StatusCode::BAD_REQUEST, json!({ "error": "invalid_grant" }).to_string()),
                false => (StatusCode::OK, std::mem::take(&mut told.answer)),
            }
        };
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(async move || discovery))
            .route("/jwks", get(async move || keys))
            .route("/token", post(token));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, key, told }
    }

    fn sign(&self, header: Value, claims: &Value) -> String {
        let input = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
        let signature = self.key.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", BASE64URL.encode(signature))
    }

    fn token(&self, claims: &Value) -> String {
        self.sign(json!({ "alg": "ES256", "kid": "1" }), claims)
    }

    fn gives(&self, token: &str) {
        self.told.lock().answer = json!({ "id_token": token, "access_token": "a", "token_type": "Bearer" }).to_string();
    }
}

fn pairs(query: &str) -> HashMap<String, String> {
    let read = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8().unwrap().into_owned();
    query.split('&').filter_map(|pair| pair.split_once('=')).map(|(name, value)| (read(name), read(value))).collect()
}

/// A mesh whose owner is alice, where `staff` of the provider are editors and its `admins` owners.
struct World {
    mesh: Mesh,
    provider: Provider,
    alice: Browser,
}

impl World {
    async fn start() -> Self {
        let (mesh, provider) = (Mesh::start().await, Provider::start().await);
        let issuer = Issuer { url: provider.url.clone(), audience: "ci".into() };
        let changes = vec![
            Change::SetIssuer { name: "id".into(), issuer },
            Change::SetSignIn { name: "corp".into(), sign_in: sign_in(&[("staff", "editor"), ("admins", "owner")]) },
            Change::SetSignIn { name: "lab".into(), sign_in: sign_in(&[("staff", "editor")]) },
        ];
        mesh.plane().enter(mesh.asked(changes), Petitioner::default()).await.unwrap();
        let alice = mesh.owner("alice").await;
        Self { mesh, provider, alice }
    }

    fn claims(&self, nonce: &str, more: Value) -> Value {
        let now = self.mesh.now_ms.load(Ordering::Relaxed) / 1000;
        let mut claims = json!({
            "iss": self.provider.url, "aud": CLIENT, "sub": "1234", "iat": now, "exp": now + 300, "nonce": nonce,
            "groups": ["staff", "others"], "sid": "s1",
        });
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    }

    /// Sends a browser there; returns what it was sent with.
    async fn sends(&self, browser: &mut Browser) -> HashMap<String, String> {
        let (status, page) = browser.get("/sign-in/with/corp?next=%2Faccount").await;
        assert_eq!(status, StatusCode::SEE_OTHER, "{page}");
        let (at, query) = browser.location.split_once('?').unwrap();
        assert_eq!(at, format!("{}/authorize", self.provider.url));
        pairs(query)
    }

    async fn comes_back(&self, browser: &mut Browser, state: &str, more: &str) -> (StatusCode, String) {
        let iss = &self.provider.url;
        browser.get(&format!("/sign-in/with/corp/answer?state={state}&code=c1&iss={iss}{more}")).await
    }

    async fn signs_in(&self, browser: &mut Browser, more: Value) -> (StatusCode, String) {
        let sent = self.sends(browser).await;
        self.provider.gives(&self.provider.token(&self.claims(&sent["nonce"], more)));
        let came = self.comes_back(browser, &sent["state"], "").await;
        browser.get("/").await;
        came
    }

    async fn signed_in(&self, more: Value) -> Browser {
        let mut browser = self.mesh.browser();
        let (status, page) = self.signs_in(&mut browser, more).await;
        assert_eq!(status, StatusCode::OK, "{page}");
        browser
    }
}

fn sign_in(roles: &[(&str, &str)]) -> SignIn {
    SignIn {
        issuer: "id".into(),
        client_id: CLIENT.into(),
        groups_claim: "groups".into(),
        roles: roles.iter().map(|(group, role)| ((*group).to_owned(), [(*role).into()].into())).collect(),
    }
}

#[tokio::test]
async fn whom_a_provider_vouches_for_reads_and_asks_and_an_operator_with_a_key_countersigns() {
    let mut world = World::start().await;
    let mut eve = world.mesh.browser();
    let (_, page) = eve.get("/sign-in?next=/changes").await;
    assert!(page.contains("Sign in with corp") && page.contains(&world.provider.url), "{page}");
    let sent = world.sends(&mut eve).await;
    let redirect_uri = format!("{}/sign-in/with/corp/answer", world.mesh.origin());
    for (name, expected) in [
        ("response_type", "code"),
        ("client_id", CLIENT),
        ("scope", "openid groups"),
        ("redirect_uri", &redirect_uri),
        ("code_challenge_method", "S256"),
    ] {
        assert_eq!(sent[name], expected, "{name}");
    }
    world
        .provider
        .gives(&world.provider.token(&world.claims(&sent["nonce"], json!({ "groups": ["admins", "book-club"] }))));
    let (status, page) = world.comes_back(&mut eve, &sent["state"], "").await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert!(
        page.contains("corp:1234") && page.contains("url=/account\"") && page.contains("href=\"/account\""),
        "{page}"
    );
    assert!(eve.asked.is_none(), "the way back is closed");
    let form = world.provider.told.lock().forms.pop().unwrap();
    assert_eq!(BASE64URL.encode(Digest::of(form["code_verifier"].as_bytes()).0), sent["code_challenge"]);
    assert_eq!((&*form["code"], &form["redirect_uri"], &*form["client_id"]), ("c1", &redirect_uri, CLIENT));

    for (path, status) in [
        ("/", StatusCode::OK),
        ("/changes", StatusCode::OK),
        ("/ledger", StatusCode::OK),
        ("/operators", StatusCode::OK),
        ("/decisions", StatusCode::FORBIDDEN),
    ] {
        assert_eq!(eve.get(path).await.0, status, "{path}");
    }
    let (_, page) = eve.get("/decisions").await;
    assert!(page.contains("an owner can invite you as an operator"), "{page}");
    let (_, page) = eve.get("/account").await;
    assert!(page.contains("You are no operator") && page.contains("owner") && !page.contains("Add a factor"), "{page}");

    let ask = json!({ "ask": "invite", "operator": "eve", "roles": "editor" });
    let id = eve.post("/operators/ask", ask).await.unwrap()["change"].as_str().unwrap().to_owned();
    let (_, page) = eve.get(&format!("/changes/{id}")).await;
    assert!(page.contains("Withdraw") && !page.contains("Reject") && !page.contains("Countersign</button>"), "{page}");
    for what in ["challenge", "code", "reject"] {
        let body = if what == "code" { json!({ "code": "123456" }) } else { json!({}) };
        let refused = eve.post(&format!("/changes/{id}/{what}"), body).await.unwrap_err();
        assert_eq!(refused, (403, "`corp:1234` is no operator, and has no factor to show here".into()), "{what}");
    }
    let (_, page) = world.alice.get(&format!("/changes/{id}")).await;
    assert!(page.contains("corp:1234") && page.contains("admins") && page.contains(&world.provider.url), "{page}");
    assert!(!page.contains("book-club"), "which other groups they are in is nobody's business: {page}");
    let signed = world.alice.signs_change(&id, &world.mesh.origin()).await.unwrap();
    let revision = signed["revision"].as_u64().unwrap();
    let entry = world.mesh.plane().ledger.stored(revision - 1, 1).await.unwrap().remove(0);
    let entry = countersign_core::ledger::Entry::parse(&entry.entry).unwrap();
    assert_eq!((&*entry.actor, entry.countersignatures.len()), ("corp:1234", 1));

    // Somebody else of the provider is somebody else, and takes back nothing but their own.
    let mut other = world.signed_in(json!({ "sub": "5678", "groups": ["admins"] })).await;
    let ask = json!({ "ask": "invite", "operator": "zoe", "roles": "editor" });
    let id = eve.post("/operators/ask", ask).await.unwrap()["change"].as_str().unwrap().to_owned();
    assert_eq!(other.post(&format!("/changes/{id}/withdraw"), json!({})).await.unwrap_err().0, 403);
    eve.post(&format!("/changes/{id}/withdraw"), json!({})).await.unwrap();
    // An editor does not ask for operators.
    let mut editor = world.signed_in(json!({ "sub": "9" })).await;
    let ask = json!({ "ask": "invite", "operator": "zoe", "roles": "editor" });
    assert_eq!(editor.post("/operators/ask", ask).await.unwrap_err().0, 403);
    let (_, page) = world.alice.get("/operators").await;
    assert!(page.contains("corp:9") && page.contains("corp:5678"), "{page}");
    let (_, page) = other.get("/operators").await;
    assert!(!page.contains("Sessions of everybody"), "an owner by a group ends nobody's session: {page}");
}

/// PROVES (answer-to-a-question)
#[tokio::test]
async fn an_answer_that_nobody_asked_for_or_that_proves_nothing_opens_no_session() {
    let world = World::start().await;
    let stranger = Provider::start().await;
    let now = world.mesh.now_ms.load(Ordering::Relaxed) / 1000;
    type Make = fn(&World, &Provider, Value) -> String;
    let good: Make = |world, _, claims| world.provider.token(&claims);
    let refused = "the provider's answer signs nobody in";
    for (case, claims, make, why) in [
        ("another number", json!({ "nonce": "x" }), good, "it does not say the number"),
        ("no number", json!({ "nonce": null }), good, "it does not say the number"),
        ("for somebody else", json!({ "aud": "other" }), good, "not for `mesh`"),
        ("for pipelines", json!({ "aud": "ci" }), good, "not for `mesh`"),
        ("for several", json!({ "aud": [CLIENT, "other"] }), good, "not for `mesh`"),
        ("asked for by another", json!({ "azp": "other" }), good, "another client"),
        ("of another issuer", json!({ "iss": "https://evil.example" }), good, "believes no issuer"),
        ("expired", json!({ "iat": now - 400, "exp": now - 61 }), good, "it has expired"),
        ("without an end", json!({ "exp": null }), good, "no time"),
        ("of the future", json!({ "iat": now + 90 }), good, "issued in the future"),
        (
            "none",
            json!({}),
            |world, _, claims| world.provider.sign(json!({ "alg": "none" }), &claims),
            "`alg` is `none`",
        ),
        (
            "a MAC with the public key",
            json!({}),
            |world, _, claims| world.provider.sign(json!({ "alg": "HS256", "kid": "1" }), &claims),
            "`alg` is `HS256`",
        ),
        ("another's signature", json!({}), |_, stranger, claims| stranger.token(&claims), "none of its issuer's keys"),
        (
            "a token of another kind",
            json!({}),
            |world, _, claims| world.provider.sign(json!({ "alg": "ES256", "kid": "1", "typ": "logout+jwt" }), &claims),
            "another kind of token",
        ),
        ("too long", json!({ "more": "x".repeat(16 * 1024) }), good, "at most 16384 bytes"),
        ("no name", json!({ "sub": null }), good, "its `sub` is no name"),
        ("a name with a line in it", json!({ "sub": "a\nb" }), good, "its `sub` is no name"),
        ("groups that are none", json!({ "groups": { "staff": true } }), good, "no list of texts"),
        ("groups that are numbers", json!({ "groups": ["staff", 7] }), good, "no list of texts"),
        (
            "groups elsewhere",
            json!({ "groups": null, "_claim_names": { "groups": "s1" } }),
            |world, _, mut claims| {
                claims.as_object_mut().unwrap().remove("groups");
                world.provider.token(&claims)
            },
            "too many groups",
        ),
    ] {
        let mut eve = world.mesh.browser();
        let sent = world.sends(&mut eve).await;
        world.provider.gives(&make(&world, &stranger, world.claims(&sent["nonce"], claims)));
        let (status, page) = world.comes_back(&mut eve, &sent["state"], "").await;
        let page = page.replace("&#39;", "'").replace("&#96;", "`");
        assert_eq!(status, StatusCode::FORBIDDEN, "{case}: {page}");
        assert!(page.contains(refused) && page.contains(why), "{case}: {page}");
        assert!(eve.cookie.is_none() && eve.asked.is_none(), "{case}");
    }
    for (case, groups) in
        [("no group that counts", json!(["Staff", "others"])), ("no group", json!([])), ("none", Value::Null)]
    {
        let mut eve = world.mesh.browser();
        let (status, page) = match groups {
            Value::Null => world.signs_in(&mut eve, json!({ "groups": null })).await,
            groups => world.signs_in(&mut eve, json!({ "groups": groups })).await,
        };
        assert_eq!(status, StatusCode::FORBIDDEN, "{case}: {page}");
        assert!(eve.cookie.is_none(), "{case}");
    }
    // One group may be a text.
    world.signed_in(json!({ "groups": "staff" })).await;

    // What comes back by another way, at another time, or in another browser.
    let unasked = "nothing of this browser waits for this answer";
    for (case, why) in [
        ("no cookie", unasked),
        ("another browser's cookie", unasked),
        ("another state", unasked),
        ("no state", unasked),
        ("too late", unasked),
        ("a second time", unasked),
        ("another provider's address", "another provider than was asked"),
        ("no issuer", "does not say that it comes from the provider"),
        ("another issuer", "does not say that it comes from the provider"),
        ("an error", "the provider did not sign you in"),
        ("no code", "the answer brings no code"),
        ("a code that the provider does not know", "gave no token for its code"),
    ] {
        let (mut eve, mut mallory) = (world.mesh.browser(), world.mesh.browser());
        let sent = world.sends(&mut eve).await;
        let others = world.sends(&mut mallory).await;
        world.provider.gives(&world.provider.token(&world.claims(&sent["nonce"], json!({}))));
        let (state, iss) = (&sent["state"], &world.provider.url);
        let at = |name: &str, query: &str| format!("/sign-in/with/{name}/answer?{query}");
        let good = format!("state={state}&code=c1&iss={iss}");
        let path = match case {
            "no cookie" => {
                eve.asked = None;
                at("corp", &good)
            }
            "another browser's cookie" => {
                eve.asked = mallory.asked.take();
                at("corp", &good)
            }
            "another state" => at("corp", &format!("state={}&code=c1&iss={iss}", others["state"])),
            "no state" => at("corp", &format!("code=c1&iss={iss}")),
            "too late" => {
                world.mesh.pass(QUESTION_LIFETIME_MS + 1);
                at("corp", &good)
            }
            "a second time" => {
                let cookie = eve.asked.clone();
                assert_eq!(eve.get(&at("corp", &good)).await.0, StatusCode::OK);
                (eve.asked, eve.cookie) = (cookie, None);
                world.provider.gives(&world.provider.token(&world.claims(&sent["nonce"], json!({}))));
                at("corp", &good)
            }
            "another provider's address" => at("lab", &good),
            "no issuer" => at("corp", &format!("state={state}&code=c1")),
            "another issuer" => at("corp", &format!("state={state}&code=c1&iss=https://evil.example")),
            "an error" => at("corp", &format!("state={state}&iss={iss}&error=access_denied")),
            "no code" => at("corp", &format!("state={state}&iss={iss}")),
            _ => {
                world.provider.told.lock().answer.clear();
                at("corp", &good)
            }
        };
        let (status, page) = eve.get(&path).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{case}: {page}");
        assert!(page.contains(why), "{case}: {page}");
        assert!(eve.cookie.is_none(), "{case}");
    }
    // A page of somebody else's sends nobody there, and there is no other provider.
    let mut eve = world.mesh.browser();
    let elsewhere = [("sec-fetch-site", "cross-site")];
    let (status, _) = eve.send(Method::GET, "/sign-in/with/corp", &elsewhere, Body::empty()).await;
    assert_eq!((status, &*eve.location), (StatusCode::SEE_OTHER, "/sign-in"));
    assert!(eve.asked.is_none());
    assert_eq!(eve.get("/sign-in/with/nobody").await.0, StatusCode::NOT_FOUND);
}

/// PROVES (session-of-somebody)
#[tokio::test]
async fn a_persons_session_lasts_an_hour_and_as_long_as_their_groups_mean_something() {
    let mut world = World::start().await;
    let mut eve = world.signed_in(json!({})).await;
    for _ in 0..6 {
        assert_eq!(eve.get("/").await.0, StatusCode::OK);
        world.mesh.pass(session::VOUCHED_LIFETIME_MS / 6);
    }
    world.mesh.pass(1);
    assert_eq!(eve.get("/").await.0, StatusCode::SEE_OTHER, "used all the time, and over");
    world.alice.signs_in(json!({})).await.unwrap();
    let (mut eve, mut admin) = (world.signed_in(json!({})).await, world.signed_in(json!({ "groups": "admins" })).await);
    // What the groups mean changes for who is signed in, and ends it for whom nothing is left.
    let change = Change::SetSignIn { name: "corp".into(), sign_in: sign_in(&[("admins", "editor")]) };
    let id = propose(&world.mesh, change).await;
    world.alice.signs_change(&id, &world.mesh.origin()).await.unwrap();
    assert_eq!(eve.get("/").await.0, StatusCode::SEE_OTHER, "in no group that counts any more");
    let (_, page) = admin.get("/account").await;
    assert!(page.contains("<span class=\"tag\">editor</span>") && !page.contains(">owner</span>"), "{page}");
    let id = propose(&world.mesh, Change::RemoveSignIn { name: "corp".into() }).await;
    world.alice.signs_change(&id, &world.mesh.origin()).await.unwrap();
    assert_eq!(admin.get("/").await.0, StatusCode::SEE_OTHER, "the sign-in is gone");
    assert_eq!(session::list(world.mesh.plane()).await.unwrap().len(), 1, "alice's");
}

#[tokio::test]
async fn a_command_that_a_person_allowed_asks_as_they_do_and_ends_with_their_browser() {
    let world = World::start().await;
    let mut eve = world.signed_in(json!({})).await;
    let command = Command::allowed_by(&world.mesh, &mut eve).await;
    let (status, session) = command.whoami().await;
    assert_eq!(
        (status, &session["who"], &session["factor"]),
        (StatusCode::OK, &json!("corp:1234"), &json!("provider"))
    );
    for (method, path, body, status) in [
        (Method::GET, "/v1/status", json!(null), StatusCode::OK),
        (Method::GET, "/v1/changes", json!(null), StatusCode::OK),
        (Method::GET, "/v1/decisions", json!(null), StatusCode::FORBIDDEN),
        (Method::POST, "/v1/acts/export_ledger", json!({}), StatusCode::FORBIDDEN),
        (Method::POST, "/v1/acts/read_ledger", json!({}), StatusCode::OK),
        (Method::POST, "/v1/acts/read_ledger", json!({ "operator": "alice" }), StatusCode::FORBIDDEN),
    ] {
        let (found, answer) = command.ask(method, path, body).await;
        assert_eq!(found, status, "{path}: {answer}");
    }
    let declare =
        Change::DeclareService { name: ServiceName::parse("web").unwrap(), spec: ServiceSpec::new(Protocol::Http) };
    let mut asked = serde_json::to_value(world.mesh.asked(vec![declare])).unwrap();
    let (status, refused) = command.ask(Method::POST, "/v1/changes", asked.clone()).await;
    assert_eq!(
        (status, &refused["refusal"]["outcome"]),
        (StatusCode::FORBIDDEN, &json!("needs_countersign")),
        "{refused}"
    );
    let id = refused["refusal"]["change"].as_str().unwrap().to_owned();
    // In nobody else's name, and with nobody's factor.
    asked["shown"] = json!({ "operator": "alice", "otp": "123456" });
    let (_, refused) = command.ask(Method::POST, "/v1/changes", asked).await;
    assert_eq!(refused["title"], "the request names another operator");
    for what in ["apply", "countersign", "reject", "ceremony"] {
        let (status, answer) = command.ask(Method::POST, &format!("/v1/proposals/{id}/{what}"), json!({})).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{what}: {answer}");
        assert!(answer["title"].as_str().unwrap().contains("is no operator"), "{what}: {answer}");
    }
    let (status, withdrawn) = command.ask(Method::POST, &format!("/v1/proposals/{id}/withdraw"), json!({})).await;
    assert_eq!((status, &withdrawn["state"]["state"]), (StatusCode::OK, &json!("withdrawn")), "{withdrawn}");
    let (_, sessions) = command.ask(Method::GET, "/v1/sessions", json!(null)).await;
    assert_eq!(sessions.as_array().unwrap().len(), 2, "{sessions}");
    eve.post("/sign-out", json!({})).await.unwrap();
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED);
}

impl World {
    fn logout(&self, more: Value) -> Value {
        let now = self.mesh.now_ms.load(Ordering::Relaxed) / 1000;
        let mut claims = json!({
            "iss": self.provider.url, "aud": CLIENT, "iat": now, "exp": now + 120, "jti": session::random(), "sub": "1234",
            "events": { "http://schemas.openid.net/event/backchannel-logout": {} },
        });
        let claims_of = claims.as_object_mut().unwrap();
        claims_of.extend(more.as_object().unwrap().clone());
        claims_of.retain(|_, value| !value.is_null());
        claims
    }

    /// The provider sends this, from a machine of its own.
    async fn hears(&self, name: &str, token: &str) -> (StatusCode, Value) {
        let mut sender = self.mesh.browser();
        let form = [("content-type", "application/x-www-form-urlencoded")];
        let body = Body::from(format!("logout_token={token}"));
        let (status, text) = sender.send(Method::POST, &format!("/sign-in/with/{name}/logout"), &form, body).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    fn logout_token(&self, more: Value) -> String {
        self.provider.sign(json!({ "alg": "ES256", "kid": "1", "typ": "logout+jwt" }), &self.logout(more))
    }
}

/// PROVES (over-there-over-here)
#[tokio::test]
async fn a_providers_word_ends_one_session_or_all_of_somebody_at_once() {
    let world = World::start().await;
    let (mut first, mut second) = (world.signed_in(json!({})).await, world.signed_in(json!({ "sid": "s2" })).await);
    let mut other = world.signed_in(json!({ "sub": "5678", "sid": "s3" })).await;
    let command = Command::allowed_by(&world.mesh, &mut first).await;
    let is_in = async |browser: &mut Browser| browser.get("/").await.0 == StatusCode::OK;
    world.mesh.pass(1_000);
    let (status, answer) = world.hears("corp", &world.logout_token(json!({ "sid": "s1" }))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert!(!is_in(&mut first).await && is_in(&mut second).await && is_in(&mut other).await, "the one session");
    assert_eq!(command.whoami().await.0, StatusCode::UNAUTHORIZED, "and what it had allowed");
    // Of whom it names by the session alone.
    assert_eq!(world.hears("corp", &world.logout_token(json!({ "sub": null, "sid": "s3" }))).await.0, StatusCode::OK);
    assert!(!is_in(&mut other).await && is_in(&mut second).await);
    let mut third = world.signed_in(json!({ "sid": null })).await;
    world.mesh.pass(1_000);
    assert_eq!(world.hears("corp", &world.logout_token(json!({}))).await.0, StatusCode::OK);
    assert!(!is_in(&mut second).await && !is_in(&mut third).await, "all of theirs");

    // What was said before the logout begins nothing after it; what is said later does.
    let now = world.mesh.now_ms.load(Ordering::Relaxed) / 1000;
    let (status, page) = world.signs_in(&mut first, json!({ "iat": now - 1 })).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{page}");
    assert!(!is_in(&mut first).await);
    world.mesh.pass(1_000);
    world.signed_in(json!({})).await;
    // A session of which nothing is known is over as well.
    assert_eq!(world.hears("corp", &world.logout_token(json!({ "sub": "nobody" }))).await.0, StatusCode::OK);
    // All of it is written down, and no token is.
    let World { mesh: Mesh { control, dir, .. }, provider, .. } = world;
    control.stop().await;
    let text = std::fs::read_to_string(dir.path().join(crate::AUDIT_FILE)).unwrap();
    for said in [
        "somebody signed in with a provider",
        "a sign-in was refused",
        "a session was ended",
        "corp:1234",
        &provider.url,
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    assert!(!text.contains("eyJ"), "{text}");
}

#[tokio::test]
async fn what_is_no_logout_token_of_the_provider_ends_nothing() {
    let world = World::start().await;
    let stranger = Provider::start().await;
    let mut eve = world.signed_in(json!({})).await;
    world.mesh.pass(1_000);
    let now = world.mesh.now_ms.load(Ordering::Relaxed) / 1000;
    let event = "http://schemas.openid.net/event/backchannel-logout";
    for (case, more, why) in [
        ("a nonce", json!({ "nonce": "n" }), "it has a `nonce`"),
        ("no events", json!({ "events": null }), "say nothing of a logout"),
        ("another event", json!({ "events": { "urn:other": {} } }), "say nothing of a logout"),
        ("an event that is no object", json!({ "events": { event: true } }), "say nothing of a logout"),
        ("nobody", json!({ "sub": null }), "names nobody"),
        ("a name that is none", json!({ "sub": 7 }), "its `sub` is no name"),
        ("no jti", json!({ "jti": null }), "it has no `jti`"),
        ("another client's", json!({ "aud": "other" }), "not for `mesh`"),
        ("another issuer's", json!({ "iss": stranger.url }), "believes no issuer"),
        ("expired", json!({ "iat": now - 400, "exp": now - 61 }), "it has expired"),
        ("without an end", json!({ "exp": null }), "when it expires"),
        ("of no time", json!({ "iat": null }), "when it was issued"),
    ] {
        let (status, answer) = world.hears("corp", &world.logout_token(more)).await;
        assert_eq!(
            (status, &answer["error"]),
            (StatusCode::BAD_REQUEST, &json!("invalid_request")),
            "{case}: {answer}"
        );
        assert!(answer["error_description"].as_str().unwrap().contains(why), "{case}: {answer}");
    }
    let claims = world.logout(json!({}));
    let header = json!({ "alg": "ES256", "kid": "1", "typ": "logout+jwt" });
    for (case, token) in [
        ("a stranger's signature", stranger.sign(header.clone(), &claims)),
        ("none", world.provider.sign(json!({ "alg": "none" }), &claims)),
        ("a MAC", world.provider.sign(json!({ "alg": "HS256", "kid": "1" }), &claims)),
        ("a token that signs somebody in", world.provider.token(&world.claims("n", json!({ "jti": "1" })))),
        ("another kind of token", world.provider.sign(json!({ "alg": "ES256", "kid": "1", "typ": "at+jwt" }), &claims)),
        ("no token", "a.b".to_owned()),
    ] {
        assert_eq!(world.hears("corp", &token).await.0, StatusCode::BAD_REQUEST, "{case}");
    }
    assert_eq!(world.hears("nobody", &world.provider.sign(header.clone(), &claims)).await.0, StatusCode::BAD_REQUEST);
    assert_eq!(eve.get("/").await.0, StatusCode::OK, "nothing has ended");
    // Good once: what came before does not end what begins after it.
    let good = world.provider.sign(header, &claims);
    assert_eq!(world.hears("corp", &good).await.0, StatusCode::OK);
    assert_eq!(eve.get("/").await.0, StatusCode::SEE_OTHER);
    world.mesh.pass(1_000);
    let mut eve = world.signed_in(json!({})).await;
    let (status, answer) = world.hears("corp", &good).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    assert!(answer["error_description"].as_str().unwrap().contains("taken before"), "{answer}");
    assert_eq!(eve.get("/").await.0, StatusCode::OK);
    // Whoever goes on with what is none is slowed down, and a provider is heard all the same.
    let mut last = StatusCode::OK;
    for _ in 0..200 {
        last = world.hears("corp", "a.b").await.0;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(world.hears("corp", &world.logout_token(json!({}))).await.0, StatusCode::OK);
    assert_eq!(eve.get("/").await.0, StatusCode::SEE_OTHER);
}

#[tokio::test]
async fn a_client_secret_is_read_from_its_file_each_time_and_shown_to_its_provider_alone() {
    let world = World::start().await;
    world.signed_in(json!({})).await;
    assert_eq!(world.provider.told.lock().authorization, None, "there is none");
    let file = world.mesh.dir.path().join("secrets/corp");
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "s:cret\n").unwrap();
    world.signed_in(json!({})).await;
    let told = std::mem::take(&mut *world.provider.told.lock());
    assert_eq!(told.authorization.as_deref(), Some("Basic bWVzaDpzJTNBY3JldA=="));
    assert!(told.forms.iter().all(|form| !form.contains_key("client_secret")), "not a second time, in the body");
    for unusable in [String::new(), "x".repeat(8 * 1024)] {
        std::fs::write(&file, &unusable).unwrap();
        let (status, page) = world.signs_in(&mut world.mesh.browser(), json!({})).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{page}");
        assert!(page.contains("the client secret of this mesh cannot be read"), "{page}");
    }
}

#[tokio::test]
async fn what_strangers_and_one_person_can_fill_is_bounded_and_leaves_room_for_operators() {
    let mut world = World::start().await;
    let mut strangers = world.mesh.browser();
    for _ in 0..WAITING_FROM_ONE_MAX {
        assert_eq!(strangers.get("/sign-in/with/corp").await.0, StatusCode::SEE_OTHER);
    }
    let (status, page) = strangers.get("/sign-in/with/corp").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{page}");
    assert!(page.contains("too many sign-ins wait for their provider"), "{page}");
    world.mesh.pass(QUESTION_LIFETIME_MS + 1);
    for _ in 0..16 {
        world.signed_in(json!({})).await;
    }
    let (status, page) = world.signs_in(&mut strangers, json!({})).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{page}");
    assert!(page.contains("too many sessions of yours are open"), "{page}");
    world.signed_in(json!({ "sub": "5678" })).await;
    world.alice.signs_in(json!({})).await.unwrap();
}
