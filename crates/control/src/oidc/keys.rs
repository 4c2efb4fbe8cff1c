//! The keys of issuers: where they are said to be, fetched, kept, and fetched again when a token names one that is not there.
//!
//! What strangers send makes this ask an issuer at most once in [`ASK_AGAIN_MS`], whatever they send. An issuer that is away
//! leaves the keys that it gave good for a day.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use serde_json::Value;
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
const BOUNDS: Bounds = Bounds { within: Duration::from_secs(10), body_bytes_max: 256 * 1024 };

/// The issuers that were asked for their keys.
pub struct Providers {
    https: Https,
    /// By URL; only those that the mesh names are ever asked for.
    known: parking_lot::Mutex<BTreeMap<String, Arc<Mutex<Provider>>>>,
}

#[derive(Default)]
struct Provider {
    keys: Arc<[Key]>,
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
        let provider = self.known.lock().entry(url.to_owned()).or_default().clone();
        // One question at a time: whoever waits has its answer.
        let mut provider = provider.lock().await;
        let meant = |keys: &[Key]| -> Vec<Key> {
            keys.iter().filter(|key| key_id.is_none_or(|id| key.is_named(id))).cloned().collect()
        };
        let since = |at_ms: Option<u64>| at_ms.map_or(u64::MAX, |at_ms| now_ms.saturating_sub(at_ms));
        let is_known = !meant(&provider.keys).is_empty();
        if since(provider.asked_at_ms) >= ASK_AGAIN_MS && (!is_known || since(provider.given_at_ms) >= FRESH_MS) {
            provider.asked_at_ms = Some(now_ms);
            match self.fetch(url).await {
                Ok(keys) => (provider.keys, provider.given_at_ms) = (keys.into(), Some(now_ms)),
                Err(why) => {
                    tracing::warn!(issuer = url, %why, "an issuer's keys could not be fetched");
                    provider.why = why;
                }
            }
        }
        if since(provider.given_at_ms) >= KEPT_MS {
            return Err(KeysUnavailable { issuer: url.to_owned(), why: provider.why.clone() });
        }
        Ok(meant(&provider.keys))
    }

    async fn fetch(&self, issuer: &str) -> Result<Vec<Key>, String> {
        // OpenID Connect Discovery 1.0, 4.1: after removing any terminating slash.
        let document = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let said =
            jws::object("discovery document", &self.read(&document).await?).map_err(|error| error.to_string())?;
        // "The issuer value returned MUST be identical to the Issuer URL that was used as the prefix" (4.3).
        if said.get("issuer").and_then(Value::as_str) != Some(issuer) {
            return Err(format!("`{document}` is of another issuer"));
        }
        let keys = said.get("jwks_uri").and_then(Value::as_str).ok_or(format!("`{document}` has no `jwks_uri`"))?;
        // What is on the network does not lead to this machine.
        let uri: Uri = keys.parse().map_err(|_| format!("`{document}` has a `jwks_uri` that is no URL"))?;
        if uri.host().is_some_and(is_loopback)
            && !issuer.parse::<Uri>().is_ok_and(|uri| uri.host().is_some_and(is_loopback))
        {
            return Err(format!("`{document}` points to this machine"));
        }
        Key::of_set(&self.read(keys).await?, KEYS_MAX).map_err(|why| format!("`{keys}`: {why}"))
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
