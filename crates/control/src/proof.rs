//! Proofs of a key (DPoP, RFC 9449), of a command or of a client of the token service: who sent a request holds the key, and made
//! the proof for this very request, just now.
//!
//! INVARIANT (proof-once): a proof is good for one request: its method, its address, its token, within [`WINDOW_SECONDS`], once.

use http::{HeaderMap, HeaderName};
use serde_json::{Map, Value};
use webauthn_rs::prelude::Url;

use countersign_api::dpop::{DPOP_HEADER, token_hash};
use countersign_core::{
    canonical::Digest,
    jws::{Presented, Typ},
};

use crate::{
    Plane,
    site::guard::text,
    store::{Document, StoreError},
};

/// How far a proof's time may be from ours.
pub const WINDOW_SECONDS: i64 = 60;
/// Longest proof, in bytes.
const PROOF_BYTES_MAX: usize = 4 * 1024;
/// How long the name of a proof may be, in bytes; the least that makes it unguessable.
const JTI_BYTES: std::ops::RangeInclusive<usize> = 12..=256;
/// Proofs of one kind that are remembered at the same time.
pub const PROOFS_MAX: u32 = 100_000;
/// Longest nonce that is looked at, in bytes.
const NONCE_BYTES_MAX: usize = 256;

/// Whose proof it is. Those of one kind leave those of the other their room.
#[derive(Debug, Clone, Copy)]
pub enum Of {
    /// A command's.
    Command,
    /// That of a client of the token service.
    Client,
}

impl Of {
    /// The kind of the documents of proofs that were used.
    fn kind(self) -> &'static str {
        match self {
            Self::Command => "proof",
            Self::Client => "client-proof",
        }
    }
}

/// A proof whose signature, method, address, time and token were verified.
#[derive(Debug)]
pub struct Proof {
    /// The thumbprint of its key.
    pub key: String,
    /// The number that it says it was given.
    pub nonce: Option<String>,
    /// What tells it from every other proof of that key.
    id: Digest,
}

/// Why a proof proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofRefused {
    /// There is none, or there are several.
    #[error("a request carries one proof, in the header `DPoP`")]
    NotOne,
    /// It is none.
    #[error("the proof is none: {0}")]
    Malformed(String),
    /// Its own key has not signed it.
    #[error("the proof is not signed with ES256 by the key that it brings")]
    Signature,
    /// It was made for another request.
    #[error("the proof was made for another {0}")]
    Other(&'static str),
    /// It was made too long ago, or will be made.
    #[error("the proof was made at another time: compare the clocks of this machine and of the control plane")]
    Time,
}

impl Proof {
    /// Verifies the proof in `headers` for a request with `method` at `url`, which comes with `token`.
    pub fn verify(
        headers: &HeaderMap,
        method: &str,
        url: &str,
        token: Option<&str>,
        now_ms: u64,
    ) -> Result<Self, ProofRefused> {
        let given = text(headers, HeaderName::from_static(DPOP_HEADER)).filter(|given| given.len() <= PROOF_BYTES_MAX);
        let given = given.ok_or(ProofRefused::NotOne)?;
        let malformed = |what: &str| ProofRefused::Malformed(what.to_owned());
        let presented = Presented::parse_as(given, Typ::Proof).map_err(|error| malformed(&error.to_string()))?;
        let key = presented.proven_key().ok_or(ProofRefused::Signature)?;
        let (claims, _) = presented.into_signed();
        let said = |name: &str| claims.get(name).and_then(Value::as_str);
        if said("htm") != Some(method) {
            return Err(ProofRefused::Other("method"));
        }
        if !said("htu").is_some_and(|said| is_same(said, url)) {
            return Err(ProofRefused::Other("address"));
        }
        if said("ath").map(str::to_owned) != token.map(token_hash) {
            return Err(ProofRefused::Other("token"));
        }
        let jti = said("jti").filter(|jti| JTI_BYTES.contains(&jti.len()));
        let jti = jti.ok_or_else(|| malformed("it has no `jti` of 12 to 256 bytes"))?;
        let now_seconds = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
        let made_at = made_at(&claims).ok_or_else(|| malformed("its `iat` is no time"))?;
        if made_at.abs_diff(now_seconds) > WINDOW_SECONDS.unsigned_abs() {
            return Err(ProofRefused::Time);
        }
        let nonce = said("nonce").filter(|nonce| nonce.len() <= NONCE_BYTES_MAX).map(str::to_owned);
        Ok(Self { id: Digest::of(format!("{key}\n{jti}").as_bytes()), key, nonce })
    }

    /// Uses it up; false when it was used before, or when too many are remembered to tell.
    pub async fn spend(&self, plane: &Plane, of: Of) -> Result<bool, StoreError> {
        let now_ms = plane.clock.now_ms();
        // As long as it could be shown again: made in our future, it is good until twice the window is over.
        let expires_at_ms = now_ms + 2 * WINDOW_SECONDS.unsigned_abs() * 1000 + 1000;
        let document = Document { kind: of.kind(), key: self.id.to_string(), bytes: Vec::new(), expires_at_ms };
        plane.storage.run("use_proof", move |store| store.put_document(&document, now_ms, PROOFS_MAX)).await
    }
}

fn made_at(claims: &Map<String, Value>) -> Option<i64> {
    let value = claims.get("iat")?;
    value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64))
}

/// "The htu claim matches the HTTP URI value for the HTTP request in which the JWT was received, ignoring any query and fragment
/// parts", after the normalizations of RFC 3986 that both are given (RFC 9449, 4.3).
fn is_same(said: &str, url: &str) -> bool {
    let normal = |given: &str| {
        let mut url = Url::parse(given).ok()?;
        url.set_query(None);
        url.set_fragment(None);
        Some(url)
    };
    normal(said).is_some_and(|said| normal(url).is_some_and(|url| said == url))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use http::HeaderValue;
    use serde_json::json;

    use countersign_api::dpop::ProofKey;

    use super::*;

    const URL: &str = "https://mesh.example/v1/status";
    const NOW: i64 = 1_790_000_000;

    fn with(proofs: &[String]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for proof in proofs {
            headers.append(DPOP_HEADER, HeaderValue::from_str(proof).unwrap());
        }
        headers
    }

    fn verified(proof: String, method: &str, url: &str, token: Option<&str>) -> Result<Proof, ProofRefused> {
        Proof::verify(&with(&[proof]), method, url, token, NOW as u64 * 1000)
    }

    /// Any header and any claims, signed by the key that the header brings.
    fn forged(change: impl Fn(&mut Value, &mut Value)) -> String {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let point = pair.public_key().as_ref();
        let jwk = json!({ "kty": "EC", "crv": "P-256", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
        let mut header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": jwk });
        let mut claims = json!({ "jti": "a".repeat(22), "htm": "GET", "htu": URL, "iat": NOW, "ath": token_hash("t") });
        change(&mut header, &mut claims);
        let input = format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
        let signature = pair.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", encode(signature.as_ref()))
    }

    #[test]
    fn a_proof_is_for_its_method_its_address_its_token_and_its_time() {
        let key = ProofKey::generate();
        let made = |seconds: i64| key.prove("GET", URL, Some("t"), NOW + seconds);
        for (case, proof, method, url, token, expected) in [
            ("its own request", made(0), "GET", URL, Some("t"), Ok(())),
            ("with a query", made(0), "GET", "https://mesh.example/v1/status?a=b#c", Some("t"), Ok(())),
            ("the default port", made(0), "GET", "https://MESH.example:443/v1/./status", Some("t"), Ok(())),
            ("a minute ago", made(-60), "GET", URL, Some("t"), Ok(())),
            ("in a minute", made(60), "GET", URL, Some("t"), Ok(())),
            ("longer ago", made(-61), "GET", URL, Some("t"), Err(ProofRefused::Time)),
            ("later", made(61), "GET", URL, Some("t"), Err(ProofRefused::Time)),
            ("another method", made(0), "POST", URL, Some("t"), Err(ProofRefused::Other("method"))),
            ("its case", made(0), "get", URL, Some("t"), Err(ProofRefused::Other("method"))),
            (
                "another path",
                made(0),
                "GET",
                "https://mesh.example/v1/mesh",
                Some("t"),
                Err(ProofRefused::Other("address")),
            ),
            (
                "another scheme",
                made(0),
                "GET",
                "http://mesh.example/v1/status",
                Some("t"),
                Err(ProofRefused::Other("address")),
            ),
            (
                "another port",
                made(0),
                "GET",
                "https://mesh.example:444/v1/status",
                Some("t"),
                Err(ProofRefused::Other("address")),
            ),
            ("another token", made(0), "GET", URL, Some("u"), Err(ProofRefused::Other("token"))),
            ("no token", made(0), "GET", URL, None, Err(ProofRefused::Other("token"))),
        ] {
            let found = verified(proof, method, url, token);
            assert_eq!(found.map(|proof| assert_eq!(proof.key, key.thumbprint())), expected, "{case}");
        }
        let without = key.prove("POST", URL, None, NOW);
        assert_eq!(verified(without.clone(), "POST", URL, Some("t")).err(), Some(ProofRefused::Other("token")));
        assert!(verified(without, "POST", URL, None).is_ok());
    }

    #[test]
    fn what_is_no_proof_or_not_one_proves_nothing() {
        let now_ms = NOW as u64 * 1000;
        let good = || forged(|_, _| {});
        let of = |headers: &HeaderMap| Proof::verify(headers, "GET", URL, Some("t"), now_ms);
        assert!(of(&with(&[good()])).is_ok());
        assert_eq!(of(&with(&[])).err(), Some(ProofRefused::NotOne));
        assert_eq!(of(&with(&[good(), good()])).err(), Some(ProofRefused::NotOne));
        assert!(of(&with(&[format!("{}, {}", good(), good())])).is_err(), "joined by a proxy");
        assert_eq!(of(&with(&["a".repeat(PROOF_BYTES_MAX + 1)])).err(), Some(ProofRefused::NotOne));
        type Change = fn(&mut Value, &mut Value);
        let other = ProofKey::generate().thumbprint();
        let cases: [(&str, Change, &str); 16] = [
            ("no typ", |header, _| drop(header.as_object_mut().unwrap().remove("typ")), "another kind"),
            ("a token", |header, _| header["typ"] = "JWT".into(), "another kind"),
            ("none", |header, _| header["alg"] = "none".into(), "`alg`"),
            ("a MAC", |header, _| header["alg"] = "HS256".into(), "`alg`"),
            ("an algorithm not of the key", |header, _| header["alg"] = "EdDSA".into(), "not signed"),
            ("no key", |header, _| drop(header.as_object_mut().unwrap().remove("jwk")), "not signed"),
            ("a private key", |header, _| header["jwk"]["d"] = "AA".into(), "not signed"),
            ("a key for something else", |header, _| header["jwk"]["use"] = "enc".into(), "not signed"),
            ("another curve", |header, _| header["jwk"]["crv"] = "P-384".into(), "not signed"),
            (
                "a key by address",
                |header, _| {
                    header["jku"] = "https://evil.example/jwks".into();
                    drop(header.as_object_mut().unwrap().remove("jwk"));
                },
                "not signed",
            ),
            ("no name", |_, claims| drop(claims.as_object_mut().unwrap().remove("jti")), "`jti`"),
            ("a short name", |_, claims| claims["jti"] = "a".into(), "`jti`"),
            ("a long name", |_, claims| claims["jti"] = "a".repeat(257).into(), "`jti`"),
            ("no time", |_, claims| drop(claims.as_object_mut().unwrap().remove("iat")), "`iat`"),
            ("no method", |_, claims| drop(claims.as_object_mut().unwrap().remove("htm")), "method"),
            ("no token", |_, claims| drop(claims.as_object_mut().unwrap().remove("ath")), "token"),
        ];
        for (case, change, expected) in cases {
            let refused = of(&with(&[forged(change)])).unwrap_err().to_string();
            assert!(refused.contains(expected), "{case}: {refused}");
        }
        // Another key than the one that signed.
        let strange = |header: &mut Value, _: &mut Value| {
            let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
            header["jwk"]["x"] = URL_SAFE_NO_PAD.encode(&pair.public_key().as_ref()[1..33]).into();
            header["jwk"]["y"] = URL_SAFE_NO_PAD.encode(&pair.public_key().as_ref()[33..]).into();
        };
        assert_eq!(of(&with(&[forged(strange)])).err(), Some(ProofRefused::Signature));
        assert_ne!(of(&with(&[good()])).unwrap().key, other);
    }
}
