//! The keys of issuers, and where they sign people in: what their discovery documents say, fetched, kept, and fetched again when a
//! token names a key that is not there.
//!
//! What strangers send makes this ask an issuer at most once in [`ASK_AGAIN_MS`], whatever they send. An issuer that is away
//! leaves the keys that it gave good for a day.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use countersign_api::https::{Bounds, Https, HttpsError, is_loopback};
use countersign_core::jws::{self, Key};

/// How long keys are used before they are asked for again.
pub const FRESH_MS: u64 = 15 * 60 * 1000;
/// How long keys are good when their issuer cannot be asked.
pub const KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// How long one question is apart from the next.
pub const ASK_AGAIN_MS: u64 = 30 * 1000;
/// Keys of one issuer at most.
const KEYS_MAX: usize = 100;
/// Longest URL of a discovery document that is followed, in bytes.
const URL_BYTES_MAX: usize = 2_048;
/// Members of a list of a discovery document that are looked at.
const LIST_MAX: usize = 200;
const BOUNDS: Bounds = Bounds { within: Duration::from_secs(10), body_bytes_max: 256 * 1024 };

/// The issuers that were asked for what they say of themselves.
pub struct Providers {
    https: Https,
    /// By URL; only those that the mesh names are ever asked for.
    known: parking_lot::Mutex<BTreeMap<String, Arc<Mutex<Provider>>>>,
}

#[derive(Default)]
struct Provider {
    keys: Arc<[Key]>,
    /// `None` of an issuer that signs no people in, such as that of a CI system.
    endpoints: Option<Endpoints>,
    /// When they were given; `None` while none were.
    given_at_ms: Option<u64>,
    /// When it was last asked.
    asked_at_ms: Option<u64>,
    /// Why it did not answer.
    why: String,
}

/// Why an issuer's keys are not to be had.
#[derive(Debug, thiserror::Error)]
#[error("the keys of `{issuer}` are not to be had: {why}")]
pub struct KeysUnavailable {
    issuer: String,
    why: String,
}

/// Where an issuer signs people in, and how it wants to be asked (OpenID Connect Discovery 1.0, 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints {
    /// Where a browser is sent.
    pub authorization: String,
    /// Where its answer is traded for a token.
    pub token: String,
    /// Whether its answers say whose they are (RFC 9207).
    pub names_itself: bool,
    /// Whether a client secret is sent in the body, because it is not taken in a header.
    pub secret_in_body: bool,
    /// The scopes that it says it knows.
    pub scopes: Vec<String>,
}

/// Why nobody can be sent to an issuer, or nothing asked of it.
#[derive(Debug, thiserror::Error)]
#[error("`{issuer}` cannot sign anybody in now: {why}")]
pub struct NoSignIn {
    issuer: String,
    why: String,
}

impl Providers {
    /// Asks over `https`.
    pub fn new(https: Https) -> Self {
        Self { https, known: parking_lot::Mutex::default() }
    }

    /// Forgets every issuer but those that `is_named`.
    pub fn retain(&self, is_named: impl Fn(&str) -> bool) {
        self.known.lock().retain(|url, _| is_named(url));
    }

    /// The keys of the issuer at `url` that can have signed what names `key_id`: that one, or any when none is named.
    pub async fn keys(&self, url: &str, key_id: Option<&str>, now_ms: u64) -> Result<Vec<Key>, KeysUnavailable> {
        let meant = |provider: &Provider| -> Vec<Key> {
            provider.keys.iter().filter(|key| key_id.is_none_or(|id| key.is_named(id))).cloned().collect()
        };
        let of = |provider: &Provider| Some(meant(provider)).filter(|keys| !keys.is_empty());
        match self.said(url, of, now_ms).await {
            Ok(keys) => Ok(keys.unwrap_or_default()),
            Err(why) => Err(KeysUnavailable { issuer: url.to_owned(), why }),
        }
    }

    /// Where the issuer at `url` signs people in.
    pub async fn endpoints(&self, url: &str, now_ms: u64) -> Result<Endpoints, NoSignIn> {
        let unavailable = |why: String| NoSignIn { issuer: url.to_owned(), why };
        let said = self.said(url, |provider| provider.endpoints.clone(), now_ms).await.map_err(unavailable)?;
        let help = "its discovery document names no `authorization_endpoint` and `token_endpoint` that can be used";
        said.ok_or_else(|| unavailable(help.to_owned()))
    }

    /// Trades what a browser brought back for the answer of a token endpoint: its body, when it answered 200. `secret` is a client's,
    /// for a header.
    pub async fn trade(
        &self,
        endpoint: &str,
        secret: Option<HeaderValue>,
        form: String,
    ) -> Result<Map<String, Value>, String> {
        let mut request = Request::post(endpoint)
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(secret) = secret {
            request = request.header(header::AUTHORIZATION, secret);
        }
        let request = request.body(Bytes::from(form)).map_err(|_| format!("`{endpoint}` is no URL"))?;
        let why = |error: HttpsError| format!("`{endpoint}`: {}", crate::error_chain(&error));
        let (status, body) = self.https.ask(request, BOUNDS).await.map_err(why)?;
        let answer = jws::object("answer", &body);
        if status != StatusCode::OK {
            // "error … ASCII" (RFC 6749, 5.2). What it says beside that is not ours to repeat.
            let error = answer.ok().and_then(|answer| answer.get("error")?.as_str().map(shown)).unwrap_or_default();
            return Err(format!("`{endpoint}` answered {status} {error}"));
        }
        answer.map_err(|error| format!("`{endpoint}`: {error}"))
    }

    /// What the issuer at `url` is known to say, asked for again when `of` finds nothing in it, or it is old. The error says why
    /// nothing of it is good any more.
    async fn said<T>(&self, url: &str, of: impl Fn(&Provider) -> Option<T>, now_ms: u64) -> Result<Option<T>, String> {
        let provider = self.known.lock().entry(url.to_owned()).or_default().clone();
        // One question at a time: whoever waits has its answer.
        let mut provider = provider.lock().await;
        let since = |at_ms: Option<u64>| at_ms.map_or(u64::MAX, |at_ms| now_ms.saturating_sub(at_ms));
        let is_known = of(&provider).is_some();
        if since(provider.asked_at_ms) >= ASK_AGAIN_MS && (!is_known || since(provider.given_at_ms) >= FRESH_MS) {
            provider.asked_at_ms = Some(now_ms);
            match self.fetch(url).await {
                Ok((keys, endpoints)) => {
                    (provider.keys, provider.endpoints) = (keys.into(), endpoints);
                    provider.given_at_ms = Some(now_ms);
                }
                Err(why) => {
                    tracing::warn!(issuer = url, %why, "an issuer's keys could not be fetched");
                    provider.why = why;
                }
            }
        }
        match since(provider.given_at_ms) >= KEPT_MS {
            true => Err(provider.why.clone()),
            false => Ok(of(&provider)),
        }
    }

    async fn fetch(&self, issuer: &str) -> Result<(Vec<Key>, Option<Endpoints>), String> {
        // OpenID Connect Discovery 1.0, 4.1: after removing any terminating slash.
        let document = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let said =
            jws::object("discovery document", &self.read(&document).await?).map_err(|error| error.to_string())?;
        // "The issuer value returned MUST be identical to the Issuer URL that was used as the prefix" (4.3).
        if said.get("issuer").and_then(Value::as_str) != Some(issuer) {
            return Err(format!("`{document}` is of another issuer"));
        }
        let keys = said.get("jwks_uri").and_then(Value::as_str).ok_or(format!("`{document}` has no `jwks_uri`"))?;
        if !leads_on(issuer, keys) {
            return Err(format!("`{document}` has a `jwks_uri` that is no https URL, or points to this machine"));
        }
        let endpoints = Endpoints::of(issuer, &said);
        let keys = Key::of_set(&self.read(keys).await?, KEYS_MAX).map_err(|why| format!("`{keys}`: {why}"))?;
        Ok((keys, endpoints))
    }

    async fn read(&self, url: &str) -> Result<Bytes, String> {
        let request = Request::get(url).header(header::ACCEPT, "application/json").body(Bytes::new());
        let request = request.map_err(|_| format!("`{url}` is no URL"))?;
        let why = |error: HttpsError| format!("`{url}`: {}", crate::error_chain(&error));
        match self.https.ask(request, BOUNDS).await.map_err(why)? {
            (StatusCode::OK, body) => Ok(body),
            (status, _) => Err(format!("`{url}` answered {status}")),
        }
    }
}

impl Endpoints {
    /// Those of a discovery document, if it has any that can be used.
    fn of(issuer: &str, said: &Map<String, Value>) -> Option<Self> {
        let url =
            |name: &str| said.get(name).and_then(Value::as_str).filter(|url| leads_on(issuer, url)).map(str::to_owned);
        let list = |name: &str| -> Option<Vec<String>> {
            let list = said.get(name)?.as_array()?.iter().take(LIST_MAX);
            Some(list.filter_map(Value::as_str).map(str::to_owned).collect())
        };
        // "If omitted, the default is client_secret_basic" (OpenID Connect Discovery 1.0, 3).
        let methods = list("token_endpoint_auth_methods_supported");
        let has = |method: &str| methods.as_ref().is_some_and(|methods| methods.iter().any(|known| known == method));
        Some(Self {
            authorization: url("authorization_endpoint")?,
            token: url("token_endpoint")?,
            names_itself: said.get("authorization_response_iss_parameter_supported") == Some(&Value::Bool(true)),
            secret_in_body: has("client_secret_post") && !has("client_secret_basic"),
            scopes: list("scopes_supported").unwrap_or_default(),
        })
    }
}

/// Whether what an issuer says may be followed: https, and only an issuer on this machine leads to this machine, or is asked in the
/// clear.
fn leads_on(issuer: &str, url: &str) -> bool {
    let is_here = |uri: &Uri| uri.host().is_some_and(is_loopback);
    let Ok(uri) = url.parse::<Uri>() else { return false };
    let issuer_is_here = issuer.parse::<Uri>().is_ok_and(|uri| is_here(&uri));
    let is_plain = url.len() <= URL_BYTES_MAX && url.bytes().all(|b| b.is_ascii_graphic()) && !url.contains('#');
    match uri.scheme_str() {
        Some("https") => is_plain && (issuer_is_here || !is_here(&uri)),
        Some("http") => is_plain && issuer_is_here && is_here(&uri),
        _ => false,
    }
}

/// A word of somebody else's, as far as it is repeated.
fn shown(word: &str) -> String {
    word.chars().filter(|c| c.is_ascii_graphic()).take(60).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use axum::{Router, routing::get};
    use serde_json::json;

    use super::*;

    /// An issuer on this machine: how often it was asked for its keys, and what it says.
    struct Issuer {
        url: String,
        asked: Arc<AtomicUsize>,
        serving: tokio::task::JoinHandle<()>,
    }

    async fn issuer(discovery: impl Fn(&str) -> String, key: &'static str) -> Issuer {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, document) = (Arc::new(AtomicUsize::new(0)), discovery(&url));
        let count = asked.clone();
        let keys = move || {
            count.fetch_add(1, Ordering::Relaxed);
            let x = "A".repeat(43);
            async move { json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "kid": key, "x": x }] }).to_string() }
        };
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(async move || document))
            .route("/keys", get(keys));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Issuer { url, asked, serving }
    }

    fn honest(url: &str) -> String {
        json!({ "issuer": url, "jwks_uri": format!("{url}/keys") }).to_string()
    }

    fn providers() -> Providers {
        Providers::new(Https::new(None).unwrap())
    }

    #[tokio::test]
    async fn keys_are_asked_for_at_a_bounded_rate_and_outlive_their_issuer_for_a_day() {
        let (providers, issuer) = (providers(), issuer(honest, "one").await);
        let now = 1_790_000_000_000;
        let count = async |id: Option<&str>, at_ms: u64| {
            let keys = providers.keys(&issuer.url, id, at_ms).await.unwrap();
            (keys.len(), issuer.asked.load(Ordering::Relaxed))
        };
        assert_eq!(count(Some("one"), now).await, (1, 1));
        assert_eq!(count(None, now).await, (1, 1), "any key, when none is named");
        for n in 0..100 {
            assert_eq!(count(Some("strange"), now + n).await, (0, 1), "what strangers send asks nobody");
        }
        assert_eq!(count(Some("strange"), now + ASK_AGAIN_MS).await, (0, 2));
        assert_eq!(count(Some("one"), now + ASK_AGAIN_MS + FRESH_MS - 1).await, (1, 2));
        assert_eq!(count(Some("one"), now + ASK_AGAIN_MS + FRESH_MS).await, (1, 3));
        issuer.serving.abort();
        let _ = (&mut { issuer.serving }).await;
        let given = now + ASK_AGAIN_MS + FRESH_MS;
        let (url, asked) = (issuer.url, issuer.asked);
        assert_eq!(providers.keys(&url, Some("one"), given + KEPT_MS - 1).await.unwrap().len(), 1);
        assert!(providers.keys(&url, Some("one"), given + KEPT_MS).await.is_err());
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        providers.retain(|_| false);
        assert!(providers.keys(&url, Some("one"), given).await.is_err(), "what is not named any more is forgotten");
    }

    #[test]
    fn an_issuer_leads_to_https_and_to_this_machine_only_from_here() {
        let (far, here) = ("https://id.example", "http://127.0.0.1:9000");
        for (issuer, url, expected) in [
            (far, "https://id.example/authorize", true),
            (far, "https://other.example/authorize?tenant=1", true),
            (far, "http://id.example/authorize", false),
            (far, "https://localhost/authorize", false),
            (far, "http://127.0.0.1:1/authorize", false),
            (far, "javascript:alert(1)", false),
            (far, "/authorize", false),
            (far, "https://id.example/a#b", false),
            (here, "http://127.0.0.1:9000/authorize", true),
            (here, "http://id.example/authorize", false),
        ] {
            assert_eq!(leads_on(issuer, url), expected, "{issuer} {url}");
        }
        let said = |more: Value| {
            let mut said =
                json!({ "authorization_endpoint": format!("{far}/a"), "token_endpoint": format!("{far}/t") });
            said.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            Endpoints::of(far, said.as_object().unwrap())
        };
        let basic = said(json!({})).unwrap();
        assert!(!basic.secret_in_body && !basic.names_itself);
        let methods = "token_endpoint_auth_methods_supported";
        assert!(said(json!({ methods: ["client_secret_post"] })).unwrap().secret_in_body);
        assert!(!said(json!({ methods: ["client_secret_post", "client_secret_basic"] })).unwrap().secret_in_body);
        assert!(said(json!({ "authorization_response_iss_parameter_supported": true })).unwrap().names_itself);
        assert_eq!(said(json!({ "token_endpoint": "http://id.example/t" })), None);
        assert_eq!(said(json!({ "authorization_endpoint": null })), None);
    }

    #[tokio::test]
    async fn a_discovery_document_of_another_issuer_or_without_keys_gives_none() {
        type Document = fn(&str) -> String;
        let documents: [(&str, Document); 4] = [
            ("another issuer", |url| {
                json!({ "issuer": format!("{url}/"), "jwks_uri": format!("{url}/keys") }).to_string()
            }),
            ("no keys", |url| json!({ "issuer": url }).to_string()),
            ("two issuers", |url| format!(r#"{{"issuer":"x","issuer":"{url}","jwks_uri":"{url}/keys"}}"#)),
            ("keys in the clear", |url| json!({ "issuer": url, "jwks_uri": "http://ci.example/keys" }).to_string()),
        ];
        for (case, document) in documents {
            let (providers, issuer) = (providers(), issuer(document, "one").await);
            assert!(providers.keys(&issuer.url, None, 1_790_000_000_000).await.is_err(), "{case}");
            assert_eq!(issuer.asked.load(Ordering::Relaxed), 0, "{case}");
        }
    }
}
