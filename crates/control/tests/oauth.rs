//! The token service, as clients meet it: over TLS that any library verifies, with what they prove themselves by.

mod support;

use std::{fs, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use countersign_api::{
    dpop::ProofKey,
    local::{RevokeTokensAs, Shown, TokenView, TokensRevoked},
    svid::provider,
};
use countersign_control::{ControlConfig, oauth::OauthConfig, start};
use countersign_core::{
    change::{Bodies, Change},
    client::Client as CoreClient,
    jws::{Key, Presented, Typ},
    oauth,
    service::{Protocol, ServiceSpec},
    token::{Claims, Confirmation, Thumbprint},
};
use http::{HeaderMap, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde_json::{Value, json};
use support::{Agent, Plane, Svid, config, declare, name, trust_domain};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const POLICY: &str = r#"
    @id("web-reads") permit (principal == Workload::"web", action in Action::"read", resource in Service::"orders");
    @id("orders-reads") permit (principal == Workload::"orders", action == Action::"http:GET", resource in Service::"stock");
    @id("web-at-stock") permit (principal == Workload::"web", action in Action::"read", resource in Service::"stock");
"#;
const READS: &str = "http:GET http:HEAD http:OPTIONS http:PROPFIND http:QUERY http:REPORT http:SEARCH";
const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT_SVID: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";

/// `web` calls `orders`, which calls `stock`. `cron` calls nobody.
async fn mesh() -> (Plane, Agent) {
    let dir = tempfile::tempdir().unwrap();
    let oauth = Some(OauthConfig { listen: "127.0.0.1:0".parse().unwrap(), issuer: None });
    let plane = Plane { control: start(ControlConfig { oauth, ..config(dir.path().into()) }).await.unwrap(), dir };
    let mut bodies = Bodies::default();
    let declared = |service: &str, upstreams: &[&str]| Change::DeclareService {
        name: name(service),
        spec: ServiceSpec {
            upstreams: upstreams.iter().map(|one| name(one)).collect(),
            ..ServiceSpec::new(Protocol::Http)
        },
    };
    let mut changes = vec![
        Change::CreateMesh { trust_domain: trust_domain() },
        declare("stock"),
        declared("orders", &["stock"]),
        declared("web", &["orders"]),
        declare("cron"),
    ];
    for policy in POLICY.trim().lines() {
        let policy = policy.trim();
        let id = policy.split('"').nth(1).unwrap();
        let body = bodies.insert(policy);
        changes.push(Change::SetPolicy { id: id.into(), file: "policies/shop.cedar".into(), body });
    }
    plane.apply_with(0, changes, bodies).await.unwrap();
    let agent = plane.agent("h1").await;
    (plane, agent)
}

/// A client that knows the issuer and what verifies it, and may have an SVID to show.
struct Client {
    issuer: String,
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    key: ProofKey,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    said: Value,
}

impl Client {
    async fn new(plane: &Plane, shown: Option<&Svid>) -> Self {
        let issuer = plane.control.token.clone().unwrap();
        let ca = plane.dir.path().join("token-ca.pem");
        for _ in 0..200 {
            if ca.exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(&fs::read(ca).unwrap()) {
            roots.add(root.unwrap()).unwrap();
        }
        let tls = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
        let tls = tls.with_root_certificates(roots);
        let tls = match shown {
            None => tls.with_no_client_auth(),
            Some(Svid { identity, key }) => {
                let key = PrivateKeyDer::try_from(key.clone()).unwrap();
                tls.with_client_auth_cert(identity.svid().chain().to_vec(), key).unwrap()
            }
        };
        let address = issuer.strip_prefix("https://").unwrap().parse().unwrap();
        Self { issuer, address, tls: Arc::new(tls), key: ProofKey::generate() }
    }

    async fn connect(&self) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(self.address.ip().to_string()).unwrap();
        let stream = TcpStream::connect(self.address).await.unwrap();
        tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, stream).await
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let stream = self.connect().await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = http::Request::builder().method(method).uri(path).header("host", "elsewhere.example");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).unwrap();
        let (parts, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let said = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        Answer { status: parts.status.as_u16(), headers: parts.headers, said }
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], form: &[(&str, &str)]) -> Answer {
        let encode = |text: &str| percent(text);
        let body: Vec<String> =
            form.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
        let headers = [&[("content-type", "application/x-www-form-urlencoded")], headers].concat();
        self.send("POST", path, &headers, &body.join("&")).await
    }

    fn proof(&self, nonce: Option<&str>) -> String {
        self.key.prove_with_nonce("POST", &format!("{}/token", self.issuer), None, nonce, now())
    }

    async fn nonce(&self) -> String {
        let answer = self.post("/token", &[], &[]).await;
        answer.headers["dpop-nonce"].to_str().unwrap().to_owned()
    }

    /// Asks for a token with a proof that says the number it was given.
    async fn ask(&self, form: &[(&str, &str)]) -> Answer {
        let proof = self.proof(Some(&self.nonce().await));
        self.post("/token", &[("dpop", &proof)], form).await
    }
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    since.as_secs().cast_signed()
}

fn claims(token: &str) -> Claims {
    let claims = Presented::parse_as(token, Typ::Access).unwrap().into_signed().0;
    serde_json::from_value(claims.into()).unwrap()
}

fn id(service: &str) -> String {
    trust_domain().workload(&name(service)).to_string()
}

fn refusal(answer: &Answer) -> (u16, &str) {
    (answer.status, answer.said["error"].as_str().unwrap_or("none"))
}

/// PROVES (bound-or-nothing)
#[tokio::test]
async fn a_workload_that_shows_its_svid_gets_a_token_bound_to_it_and_nothing_without_a_key() {
    let (plane, mut agent) = mesh().await;
    let web = agent.svid_of("web/1").await;
    let client = Client::new(&plane, Some(&web)).await;
    let metadata = client.send("GET", "/.well-known/oauth-authorization-server", &[], "").await;
    assert_eq!(metadata.said["issuer"], client.issuer);
    assert_eq!(metadata.said["token_endpoint"], format!("{}/token", client.issuer));
    let web_id = id("web");
    let form = [("grant_type", "client_credentials"), ("client_id", &*web_id), ("audience", "orders")];
    let answer = client.post("/token", &[], &form).await;
    assert_eq!(answer.status, 200, "{}", answer.said);
    assert_eq!((&answer.said["token_type"], &answer.said["scope"]), (&json!("Bearer"), &json!(READS)));
    assert_eq!(answer.headers[header::CACHE_CONTROL], "no-store");
    let token = answer.said["access_token"].as_str().unwrap();
    let said = claims(token);
    let leaf = Thumbprint(web.identity.svid().leaf_sha256().0);
    assert_eq!(said.confirmation, Confirmation::Certificate(leaf));
    assert_eq!(
        (said.issuer.as_str(), said.subject.as_str(), said.audience.as_str()),
        (&*client.issuer, &*web_id, &*id("orders"))
    );
    assert!(said.expires_at <= web.identity.svid().not_after());
    let keys = client.send("GET", "/jwks", &[], "").await.said.to_string();
    let keys = Key::of_set(keys.as_bytes(), 10).unwrap();
    assert_eq!(oauth::verify(token, &client.issuer, &keys, now()), Some(said.clone()));
    assert_eq!(oauth::verify(token, "https://shop.example", &keys, now()), None);

    let listed: Vec<TokenView> = plane.get("/v1/tokens?subject=web").await;
    assert_eq!(
        (listed.len(), listed[0].id, listed[0].certificate, &listed[0].instance),
        (1, said.id, Some(leaf), &None)
    );
    let stranger = Client::new(&plane, None).await;
    assert_eq!(refusal(&stranger.post("/token", &[], &form).await), (401, "invalid_client"));

    let assertion = agent.issue_jwt("web/1", &[&client.issuer]).await.unwrap();
    let by_assertion = [
        ("grant_type", "client_credentials"),
        ("client_assertion_type", JWT_SVID),
        ("client_assertion", &*assertion),
        ("audience", "orders"),
    ];
    let unbound = stranger.post("/token", &[], &by_assertion).await;
    assert_eq!(refusal(&unbound), (400, "invalid_request"), "{}", unbound.said);
    let bound = stranger.ask(&by_assertion).await;
    assert_eq!(bound.status, 200, "{}", bound.said);
    assert_eq!(bound.said["token_type"], "DPoP");
    let said = claims(bound.said["access_token"].as_str().unwrap());
    assert_eq!(said.confirmation, Confirmation::Key(stranger.key.thumbprint().parse().unwrap()));
    assert_eq!(bound.headers.get_all("dpop-nonce").iter().count(), 1);
}

/// PROVES (client-proven)
#[tokio::test]
async fn nobody_is_believed_but_whom_a_certificate_or_an_assertion_for_this_issuer_alone_proves() {
    let (plane, mut agent) = mesh().await;
    let web = agent.svid_of("web/1").await;
    let (client, stranger) = (Client::new(&plane, Some(&web)).await, Client::new(&plane, None).await);
    let own = [("grant_type", "client_credentials"), ("audience", "orders")];
    let (web_id, cron_id) = (id("web"), id("cron"));
    let assertion =
        async |agent: &mut Agent, instance: &str, audience: &[&str]| agent.issue_jwt(instance, audience).await.unwrap();
    let good = assertion(&mut agent, "web/1", &[&client.issuer]).await;
    let cron = assertion(&mut agent, "cron/1", &[&client.issuer]).await;
    let shared = assertion(&mut agent, "web/1", &[&client.issuer, "https://other.example"]).await;
    let foreign = assertion(&mut agent, "web/1", &["https://other.example"]).await;
    let slash = assertion(&mut agent, "web/1", &[&format!("{}/", client.issuer)]).await;
    let endpoint = assertion(&mut agent, "web/1", &[&format!("{}/token", client.issuer)]).await;
    let token_of_mesh = client.post("/token", &[], &[&own[..], &[("client_id", &*web_id)]].concat()).await;
    let access_token = token_of_mesh.said["access_token"].as_str().unwrap();
    let by = |assertion: &str| {
        vec![
            ("client_assertion_type".to_owned(), JWT_SVID.to_owned()),
            ("client_assertion".to_owned(), assertion.to_owned()),
        ]
    };
    let with = |mut form: Vec<(String, String)>, name: &str, value: &str| {
        form.push((name.to_owned(), value.to_owned()));
        form
    };
    let none = format!("{}.{}.", percent_b64(r#"{"alg":"none"}"#), good.split('.').nth(1).unwrap());
    let of_jwk = |claims: &str| {
        let input = format!("{}.{}", percent_b64(r#"{"alg":"ES256","typ":"JWT","jwk":{"kty":"EC"}}"#), claims);
        format!("{input}.{}", good.split('.').nth(2).unwrap())
    };
    let twice = format!(
        "{}.{}.{}",
        good.split('.').next().unwrap(),
        percent_b64(r#"{"sub":"a","sub":"b"}"#),
        good.split('.').nth(2).unwrap()
    );
    type Parameters = Vec<(String, String)>;
    let cases: Vec<(&str, &Client, Parameters, (u16, &str))> = vec![
        ("a JWT-SVID", &stranger, by(&good), (200, "none")),
        ("with its name", &stranger, with(by(&good), "client_id", &web_id), (200, "none")),
        ("with another name", &stranger, with(by(&good), "client_id", &cron_id), (401, "invalid_client")),
        ("for several audiences", &stranger, by(&shared), (401, "invalid_client")),
        ("for another", &stranger, by(&foreign), (401, "invalid_client")),
        ("for the issuer with a slash", &stranger, by(&slash), (401, "invalid_client")),
        ("for the endpoint", &stranger, by(&endpoint), (401, "invalid_client")),
        ("an access token", &stranger, by(access_token), (401, "invalid_client")),
        ("unsigned", &stranger, by(&none), (401, "invalid_client")),
        ("with a key of its own", &stranger, by(&of_jwk(good.split('.').nth(1).unwrap())), (401, "invalid_client")),
        ("that says something twice", &stranger, by(&twice), (401, "invalid_client")),
        ("that is huge", &stranger, by(&"a".repeat(20_000)), (401, "invalid_client")),
        ("that is none", &stranger, by("x"), (401, "invalid_client")),
        (
            "of another type",
            &stranger,
            vec![("client_assertion_type".into(), "x".into()), ("client_assertion".into(), good.clone())],
            (401, "invalid_client"),
        ),
        ("without type", &stranger, vec![("client_assertion".into(), good.clone())], (400, "invalid_request")),
        ("a secret", &stranger, with(by(&good), "client_secret", "x"), (401, "invalid_client")),
        ("of another than the certificate", &client, by(&cron), (401, "invalid_client")),
        ("a certificate without a name", &client, vec![], (400, "invalid_request")),
        (
            "a certificate with another name",
            &client,
            vec![("client_id".into(), cron_id.clone())],
            (401, "invalid_client"),
        ),
        ("nothing", &stranger, vec![("client_id".into(), web_id.clone())], (401, "invalid_client")),
    ];
    for (case, client, form, expected) in cases {
        let form: Vec<(&str, &str)> = form.iter().map(|(name, value)| (&**name, &**value)).chain(own).collect();
        let answer = client.ask(&form).await;
        assert_eq!(refusal(&answer), expected, "{case}: {}", answer.said);
    }
    let basic = client
        .post("/token", &[("authorization", "Basic YTpi")], &[&own[..], &[("client_id", &*web_id)]].concat())
        .await;
    assert_eq!(refusal(&basic), (401, "invalid_client"));

    // An agent is no client, nor is who is taken out.
    let host = Client::new(&plane, Some(&agent.svid())).await;
    let agents = trust_domain().agent(&name("h1")).to_string();
    let form = [&own[..], &[("client_id", &*agents)]].concat();
    assert_eq!(refusal(&host.post("/token", &[], &form).await), (401, "invalid_client"));
    plane.apply(1, vec![Change::SuspendService { name: name("web"), reason: "x".into() }]).await.unwrap();
    let form = [&own[..], &[("client_id", &*web_id)]].concat();
    assert_eq!(refusal(&client.post("/token", &[], &form).await), (401, "invalid_client"));
}

fn percent_b64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text)
}

#[tokio::test]
async fn a_revoked_certificate_is_no_client_not_even_on_a_connection_that_it_opened() {
    use countersign_api::local::{IdentityFilter, RevokeAs, Revoked};
    let (plane, mut agent) = mesh().await;
    let web = agent.svid_of("web/1").await;
    let client = Client::new(&plane, Some(&web)).await;
    let stream = client.connect().await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut asked = async || {
        let body = format!("grant_type=client_credentials&audience=orders&client_id={}", percent(&id("web")));
        let request = http::Request::post("/token")
            .header("host", "x")
            .header("content-type", "application/x-www-form-urlencoded")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        sender.send_request(request).await.unwrap().status().as_u16()
    };
    assert_eq!(asked().await, 200);
    let meant = IdentityFilter { id: Some(trust_domain().workload(&name("web"))), ..IdentityFilter::default() };
    let revoke = RevokeAs { identities: meant, reason: "lost".into(), shown: Shown::default() };
    plane.post::<Revoked>("/v1/identities/revoke", &revoke).await.unwrap();
    assert_eq!(asked().await, 401);
    let refused = match client.connect().await {
        Err(_) => true,
        // A client of TLS 1.3 learns of it at its first read.
        Ok(mut stream) => {
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.is_err() || stream.read(&mut [0; 1]).await.is_err()
        }
    };
    assert!(refused);
}

/// PROVES (proof-says-our-number)
#[tokio::test]
async fn a_proof_counts_for_this_request_with_our_number_once() {
    let (plane, mut agent) = mesh().await;
    let client = Client::new(&plane, None).await;
    let assertion = agent.issue_jwt("web/1", &[&client.issuer]).await.unwrap();
    let form = [
        ("grant_type", "client_credentials"),
        ("client_assertion_type", JWT_SVID),
        ("client_assertion", &*assertion),
        ("audience", "orders"),
    ];
    let nonce = client.nonce().await;
    let url = format!("{}/token", client.issuer);
    let prove = |method: &str, url: &str, nonce: Option<&str>, at: i64| {
        client.key.prove_with_nonce(method, url, None, nonce, at)
    };
    let once = prove("POST", &url, Some(&nonce), now());
    let other = Client::new(&plane, None).await;
    for (case, proof, expected) in [
        ("without a number", prove("POST", &url, None, now()), (400, "use_dpop_nonce")),
        ("with a made-up number", prove("POST", &url, Some("AAAA"), now()), (400, "use_dpop_nonce")),
        ("of another method", prove("GET", &url, Some(&nonce), now()), (400, "invalid_dpop_proof")),
        (
            "of another address",
            prove("POST", "https://elsewhere.example/token", Some(&nonce), now()),
            (400, "invalid_dpop_proof"),
        ),
        ("of another path", prove("POST", &client.issuer, Some(&nonce), now()), (400, "invalid_dpop_proof")),
        ("with a query", prove("POST", &format!("{url}?a=b"), Some(&nonce), now()), (200, "none")),
        ("too old", prove("POST", &url, Some(&nonce), now() - 70), (400, "invalid_dpop_proof")),
        ("from the future", prove("POST", &url, Some(&nonce), now() + 70), (400, "invalid_dpop_proof")),
        (
            "with a token",
            client.key.prove_with_nonce("POST", &url, Some("t"), Some(&nonce), now()),
            (400, "invalid_dpop_proof"),
        ),
        ("that is none", "x".to_owned(), (400, "invalid_dpop_proof")),
        ("good", once.clone(), (200, "none")),
        ("shown again", once, (400, "invalid_dpop_proof")),
        (
            "of another key with that number",
            other.key.prove_with_nonce("POST", &url, None, Some(&nonce), now()),
            (200, "none"),
        ),
    ] {
        let answer = client.post("/token", &[("dpop", &proof)], &form).await;
        assert_eq!(refusal(&answer), expected, "{case}: {}", answer.said);
        assert_eq!(answer.headers.get_all("dpop-nonce").iter().count(), 1, "{case}");
    }
    let two = [prove("POST", &url, Some(&nonce), now()), prove("POST", &url, Some(&nonce), now())];
    let answer = client.post("/token", &[("dpop", &two[0]), ("dpop", &two[1])], &form).await;
    assert_eq!(refusal(&answer), (400, "invalid_dpop_proof"), "two of them");
    let joined = format!("{}, {}", two[0], two[1]);
    assert_eq!(refusal(&client.post("/token", &[("dpop", &joined)], &form).await), (400, "invalid_dpop_proof"));
}

/// PROVES (scope-only-narrows)
#[tokio::test]
async fn a_token_is_for_one_service_that_may_be_asked_for_and_for_no_word_that_nothing_gives() {
    let (plane, mut agent) = mesh().await;
    let web = agent.svid_of("web/1").await;
    let client = Client::new(&plane, Some(&web)).await;
    let web_id = id("web");
    let (orders, stock, ghost) = (id("orders"), id("stock"), id("ghost"));
    let elsewhere = "spiffe://other.example/orders";
    for (case, form, expected) in [
        ("a part", vec![("audience", "orders"), ("scope", "http:GET")], Ok("http:GET")),
        ("by its id", vec![("resource", &*orders), ("scope", "http:GET http:HEAD")], Ok("http:GET http:HEAD")),
        ("by both", vec![("resource", &orders), ("audience", "orders"), ("scope", "http:GET")], Ok("http:GET")),
        ("two services", vec![("resource", &orders), ("audience", "stock")], Err("invalid_target")),
        ("more than is given", vec![("audience", "orders"), ("scope", "http:GET http:POST")], Err("invalid_scope")),
        ("a word of nobody", vec![("audience", "orders"), ("scope", "everything")], Err("invalid_scope")),
        ("no upstream", vec![("resource", &stock)], Err("invalid_target")),
        ("no service", vec![("resource", &ghost)], Err("invalid_target")),
        ("another mesh's", vec![("resource", elsewhere)], Err("invalid_target")),
        ("no address", vec![("resource", "orders")], Err("invalid_target")),
        ("with a fragment", vec![("resource", "spiffe://shop.example/orders#a")], Err("invalid_target")),
        ("nothing", vec![], Err("invalid_target")),
        ("another grant", vec![("audience", "orders"), ("grant_type", "password")], Err("unsupported_grant_type")),
    ] {
        let grant = ("grant_type", "client_credentials");
        let grant = form.iter().any(|(name, _)| *name == "grant_type").then(Vec::new).unwrap_or_else(|| vec![grant]);
        let answer = client.post("/token", &[], &[&form[..], &grant, &[("client_id", &web_id)]].concat()).await;
        match expected {
            Ok(scope) => assert_eq!(answer.said["scope"], scope, "{case}: {}", answer.said),
            Err(error) => assert_eq!(refusal(&answer), (400, error), "{case}: {}", answer.said),
        }
    }
    let own = client.post("/token", &[], &[("client_id", &*web_id), ("audience", "orders")]).await;
    assert_eq!(refusal(&own), (400, "invalid_request"), "no grant");
}

/// PROVES (exchange-only-narrows)
#[tokio::test]
async fn a_token_is_exchanged_by_whom_it_is_for_and_looked_at_and_taken_back_by_whom_it_concerns() {
    let (plane, mut agent) = mesh().await;
    let (web, orders, cron) =
        (agent.svid_of("web/1").await, agent.svid_of("orders/1").await, agent.svid_of("cron/1").await);
    let at = async |svid: &Svid| Client::new(&plane, Some(svid)).await;
    let (web, orders, cron) = (at(&web).await, at(&orders).await, at(&cron).await);
    let (web_id, orders_id, cron_id) = (id("web"), id("orders"), id("cron"));
    let form = [("grant_type", "client_credentials"), ("client_id", &*web_id), ("audience", "orders")];
    let first = web.post("/token", &[], &form).await.said["access_token"].as_str().unwrap().to_owned();
    let exchange = async |client: &Client, id: &str, token: &str, more: &[(&str, &str)]| {
        let form = [
            ("grant_type", EXCHANGE),
            ("client_id", id),
            ("subject_token", token),
            ("subject_token_type", ACCESS_TOKEN),
        ];
        client.post("/token", &[], &[&form[..], more].concat()).await
    };
    let stock = [("audience", "stock")];
    let answer = exchange(&orders, &orders_id, &first, &stock).await;
    assert_eq!(answer.status, 200, "{}", answer.said);
    assert_eq!((&answer.said["issued_token_type"], &answer.said["scope"]), (&json!(ACCESS_TOKEN), &json!("http:GET")));
    let second = answer.said["access_token"].as_str().unwrap();
    let (of_web, said) = (claims(&first), claims(second));
    assert_eq!((said.subject.as_str(), said.client_id.as_str(), said.family), (&*web_id, &*orders_id, of_web.family));
    assert_eq!(said.actor.as_ref().map(|actor| actor.subject.to_string()), Some(orders_id.clone()));
    assert!(said.expires_at <= of_web.expires_at);

    for (case, client, id, token, more, expected) in [
        ("not for it", &cron, &*cron_id, &*first, vec![("audience", "stock")], "invalid_request"),
        ("no upstream of it", &orders, &orders_id, &first, vec![("audience", "cron")], "invalid_target"),
        (
            "wider than both",
            &orders,
            &orders_id,
            &first,
            vec![("audience", "stock"), ("scope", "http:HEAD")],
            "invalid_scope",
        ),
        ("no token", &orders, &orders_id, "x.y.z", vec![("audience", "stock")], "invalid_request"),
        ("an actor", &orders, &orders_id, &first, vec![("audience", "stock"), ("actor_token", "x")], "invalid_request"),
        (
            "another kind",
            &orders,
            &orders_id,
            &first,
            vec![("audience", "stock"), ("requested_token_type", "x")],
            "invalid_request",
        ),
    ] {
        let answer = exchange(client, id, token, &more).await;
        assert_eq!(refusal(&answer), (400, expected), "{case}: {}", answer.said);
    }

    let look = async |client: &Client, id: &str, token: &str| {
        let answer = client.post("/introspect", &[], &[("client_id", id), ("token", token)]).await;
        assert_eq!(answer.status, 200, "{}", answer.said);
        answer.said
    };
    let seen = look(&orders, &orders_id, &first).await;
    assert_eq!((&seen["active"], &seen["sub"], &seen["aud"]), (&json!(true), &json!(web_id), &json!(orders_id)));
    assert_eq!(seen["cnf"], json!({ "x5t#S256": of_web.confirmation.thumbprint() }));
    assert_eq!(look(&cron, &cron_id, &first).await, json!({ "active": false }), "it is none of its business");
    assert_eq!(look(&orders, &orders_id, "nothing").await, json!({ "active": false }));
    let nobody = Client::new(&plane, None).await;
    assert_eq!(refusal(&nobody.post("/introspect", &[], &[("token", &first)]).await), (401, "invalid_client"));

    let back = async |client: &Client, id: &str, token: &str| {
        client.post("/revoke", &[], &[("client_id", id), ("token", token)]).await.status
    };
    assert_eq!(back(&cron, &cron_id, &first).await, 200);
    assert_eq!(look(&web, &web_id, &first).await["active"], true, "it is not its own");
    assert_eq!(back(&web, &web_id, "nothing").await, 200);
    assert_eq!(back(&orders, &orders_id, second).await, 200);
    assert_eq!(look(&orders, &orders_id, second).await, json!({ "active": false }));
    assert_eq!(look(&web, &web_id, &first).await["active"], true, "what it was given for is not its own");
    let third = exchange(&orders, &orders_id, &first, &stock).await.said["access_token"].as_str().unwrap().to_owned();
    assert_eq!(back(&web, &web_id, &first).await, 200);
    assert_eq!(look(&web, &web_id, &first).await, json!({ "active": false }));
    assert_eq!(
        look(&orders, &orders_id, &third).await,
        json!({ "active": false }),
        "with it goes what it was exchanged for"
    );
    assert_eq!(refusal(&exchange(&orders, &orders_id, &first, &stock).await), (400, "invalid_request"));

    let fresh = web.post("/token", &[], &form).await.said["access_token"].as_str().unwrap().to_owned();
    let asked =
        RevokeTokensAs { meant: "subject:web".parse().unwrap(), reason: "lost".into(), shown: Shown::default() };
    plane.post::<TokensRevoked>("/v1/tokens/revoke", &asked).await.unwrap();
    assert_eq!(look(&web, &web_id, &fresh).await, json!({ "active": false }), "an operator took it back");
}

/// A key of a client outside, and its public JWK.
struct OwnKey(aws_lc_rs::signature::Ed25519KeyPair);

impl OwnKey {
    fn new() -> Self {
        Self(aws_lc_rs::signature::Ed25519KeyPair::generate().unwrap())
    }

    fn jwk(&self) -> String {
        use aws_lc_rs::signature::KeyPair as _;
        let x = percent_b64_bytes(self.0.public_key().as_ref());
        json!({ "kty": "OKP", "crv": "Ed25519", "kid": "one", "x": x }).to_string()
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let input = format!("{}.{}", percent_b64(&header.to_string()), percent_b64(&claims.to_string()));
        format!("{input}.{}", percent_b64_bytes(self.0.sign(input.as_bytes()).as_ref()))
    }
}

fn percent_b64_bytes(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

/// PROVES (assertion-once)
#[tokio::test]
async fn a_client_outside_proves_itself_by_its_own_key_once_and_gets_what_policies_permit_it() {
    let (plane, _agent) = mesh().await;
    let (own, other) = (OwnKey::new(), OwnKey::new());
    let billing = trust_domain().client(&name("billing"));
    let outside = CoreClient { services: [name("orders")].into(), keys: [own.jwk()].into() };
    let mut bodies = Bodies::default();
    let policy = format!(
        "@id(\"billing\") permit (principal == Workload::\"{billing}\", action == Action::\"http:GET\", resource in Service::\"orders\");"
    );
    let body = bodies.insert(policy);
    let changes = vec![
        Change::SetClient { name: name("billing"), client: outside },
        Change::SetPolicy { id: "billing".into(), file: "policies/billing.cedar".into(), body },
    ];
    plane.apply_with(1, changes, bodies).await.unwrap();
    let client = Client::new(&plane, None).await;
    let header = json!({ "alg": "EdDSA", "kid": "one" });
    let numbered = std::cell::Cell::new(0);
    let good = || {
        numbered.set(numbered.get() + 1);
        json!({
            "iss": billing, "sub": billing, "aud": client.issuer, "jti": format!("assertion-{}", numbered.get()),
            "iat": now(), "exp": now() + 60,
        })
    };
    let with = |name: &str, value: Value| {
        let mut claims = good();
        claims[name] = value;
        claims
    };
    let ask = async |assertion: &str, more: &[(&str, &str)]| {
        let form = [
            ("grant_type", "client_credentials"),
            ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            ("client_assertion", assertion),
        ];
        client.ask(&[&form[..], more].concat()).await
    };
    let orders = [("audience", "orders")];
    let assertion = own.sign(&header, &good());
    let answer = ask(&assertion, &orders).await;
    assert_eq!(answer.status, 200, "{}", answer.said);
    assert_eq!(answer.said["scope"], "http:GET");
    let said = claims(answer.said["access_token"].as_str().unwrap());
    assert_eq!((&said.subject, &said.client_id), (&billing, &billing));
    assert_eq!(refusal(&ask(&assertion, &orders).await), (401, "invalid_client"), "it was used before");
    let again = ask(&own.sign(&header, &good()), &[("audience", "stock")]).await;
    assert_eq!(refusal(&again), (400, "invalid_target"), "it is not declared for it");
    let wide = ask(&own.sign(&header, &good()), &[("audience", "orders"), ("scope", "http:POST")]).await;
    assert_eq!(refusal(&wide), (400, "invalid_scope"));
    let slash = format!("{}/", client.issuer);
    for (case, assertion) in [
        ("of another key", other.sign(&header, &good())),
        ("of another key that it brings", other.sign(&json!({ "alg": "EdDSA", "jwk": other.jwk() }), &good())),
        ("of no key", own.sign(&json!({ "alg": "EdDSA", "kid": "two" }), &good())),
        ("of another algorithm", own.sign(&json!({ "alg": "ES256", "kid": "one" }), &good())),
        ("unsigned", own.sign(&json!({ "alg": "none" }), &good())),
        ("a MAC", own.sign(&json!({ "alg": "HS256", "kid": "one" }), &good())),
        ("for another issuer", own.sign(&header, &with("aud", json!("https://other.example")))),
        ("for it with a slash", own.sign(&header, &with("aud", json!(slash)))),
        ("for several", own.sign(&header, &with("aud", json!([client.issuer])))),
        ("of another issuer", own.sign(&header, &with("iss", json!("billing")))),
        ("about another", own.sign(&header, &with("sub", json!(id("web"))))),
        ("without end", own.sign(&header, &with("exp", Value::Null))),
        ("over", own.sign(&header, &with("exp", json!(now())))),
        ("for an hour", own.sign(&header, &with("exp", json!(now() + 3600)))),
        ("of the future", own.sign(&header, &with("iat", json!(now() + 120)))),
        ("without a number", own.sign(&header, &with("jti", Value::Null))),
        ("as an access token", own.sign(&json!({ "alg": "EdDSA", "kid": "one", "typ": "at+jwt" }), &good())),
    ] {
        let answer = ask(&assertion, &orders).await;
        assert_eq!(refusal(&answer), (401, "invalid_client"), "{case}: {}", answer.said);
    }
    let listed: Vec<TokenView> = plane.get("/v1/tokens?service=orders").await;
    assert_eq!((listed.len(), &listed[0].subject), (1, &billing));

    let revoke =
        RevokeTokensAs { meant: "client:billing".parse().unwrap(), reason: "lost".into(), shown: Shown::default() };
    plane.post::<TokensRevoked>("/v1/tokens/revoke", &revoke).await.unwrap();
    let listed: Vec<TokenView> = plane.get("/v1/tokens?service=orders").await;
    assert!(listed[0].revoked);
    assert_eq!(ask(&own.sign(&header, &good()), &orders).await.status, 200, "it asks for another");
    plane.apply(2, vec![Change::RemoveClient { name: name("billing") }]).await.unwrap();
    assert_eq!(refusal(&ask(&own.sign(&header, &good()), &orders).await), (401, "invalid_client"));
}

#[tokio::test]
async fn what_is_no_request_is_refused_with_a_word_and_holds_nothing_open() {
    let (plane, mut agent) = mesh().await;
    let web = agent.svid_of("web/1").await;
    let client = Client::new(&plane, Some(&web)).await;
    let form = "application/x-www-form-urlencoded";
    let huge = format!("a={}", "b".repeat(1024 * 1024));
    let many = (0..100).map(|n| format!("p{n}=1")).collect::<Vec<_>>().join("&");
    for (case, kind, body, expected) in [
        ("JSON", "application/json", "{}", (400, "invalid_request")),
        ("nothing", form, "", (400, "invalid_request")),
        ("twice", form, "grant_type=a&grant_type=a", (400, "invalid_request")),
        ("badly encoded", form, "grant_type=%zz", (400, "invalid_request")),
        ("too many parameters", form, &many, (400, "invalid_request")),
        ("a megabyte", form, &huge, (413, "invalid_request")),
    ] {
        let answer = client.send("POST", "/token", &[("content-type", kind)], body).await;
        assert_eq!(refusal(&answer), expected, "{case}: {}", answer.said);
    }
    assert_eq!(client.send("GET", "/token", &[], "").await.status, 405);
    assert_eq!(client.send("GET", "/elsewhere", &[], "").await.status, 404);
    let mut slow = client.connect().await.unwrap();
    slow.write_all(b"POST /token HTTP/1.1\r\nhost: x\r\n").await.unwrap();
    let mut read = [0; 64];
    let closed = tokio::time::timeout(Duration::from_secs(20), slow.read(&mut read));
    assert!(closed.await.is_ok(), "a head that never ends is not waited for");
}
