//! A JWT-SVID: the short-lived signed name of a workload, for one audience, to be shown where no mutual TLS reaches.
//!
//! Standard: JWT-SVID (<https://github.com/spiffe/spiffe/blob/main/standards/JWT-SVID.md>), sections 2 to 4. It is believed by the keys
//! of its own trust domain alone, and it proves nothing about whoever carries it: a bearer can copy it, so it is short-lived.

use serde_json::{Map, Value};

use crate::{
    identity::{NameError, SpiffeId, TrustDomain},
    jws::{Key, Presented, TokenMalformed, Typ},
};

/// How far clocks may be apart, in seconds.
pub const LEEWAY_SECONDS: i64 = 60;
/// Audiences of one JWT-SVID at most.
const AUDIENCES_MAX: usize = 8;
/// Longest audience, in bytes.
const AUDIENCE_BYTES_MAX: usize = 512;

/// A JWT-SVID whose signature, trust domain, audience and time were verified.
#[derive(Debug, Clone)]
pub struct VerifiedJwtSvid {
    id: SpiffeId,
    claims: Map<String, Value>,
    expires_at_seconds: i64,
}

/// Why a JWT-SVID proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtSvidRefused {
    /// It is none.
    #[error(transparent)]
    Malformed(#[from] TokenMalformed),
    /// Its `sub` is no SPIFFE ID.
    #[error("its subject is no workload: {0}")]
    Subject(#[from] NameError),
    /// Its `sub` is missing, or names a trust domain.
    #[error("it names no workload")]
    NoSubject,
    /// It is of a trust domain whose keys are not at hand.
    #[error("it is of trust domain `{0}`, whose keys are not known here")]
    TrustDomain(String),
    /// None of the keys of its trust domain signed it.
    #[error("no key of its trust domain has signed it")]
    Signature,
    /// It is meant for somebody else.
    #[error("it is not meant for `{0}`")]
    Audience(String),
    /// Its time is over, or it says none.
    #[error("{0}")]
    Time(&'static str),
}

impl VerifiedJwtSvid {
    /// The workload it names.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Everything it says.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// When it ends, in seconds since 1970.
    pub fn expires_at_seconds(&self) -> i64 {
        self.expires_at_seconds
    }
}

/// Whether a JWT-SVID may be for these: 1 to 8 audiences of 1 to 512 bytes.
pub fn are_audiences(given: &[String]) -> bool {
    (1..=AUDIENCES_MAX).contains(&given.len())
        && given.iter().all(|audience| (1..=AUDIENCE_BYTES_MAX).contains(&audience.len()))
}

/// Whom an unverified JWT-SVID says it is of: which keys to verify it with, and nothing else.
pub fn trust_domain_of(token: &str) -> Result<TrustDomain, JwtSvidRefused> {
    let presented = Presented::parse_as(token, Typ::Svid)?;
    let id = SpiffeId::parse(presented.subject().ok_or(JwtSvidRefused::NoSubject)?)?;
    Ok(TrustDomain::parse(id.trust_domain())?)
}

/// Verifies `token` with the `keys` of `trust_domain`, for whoever is called `audience`.
///
/// INVARIANT (verified-jwt-svid): only this makes a [`VerifiedJwtSvid`], of a token that a key of its own trust domain signed, for
/// this audience, and that is in its time.
pub fn verify(
    token: &str,
    trust_domain: &TrustDomain,
    keys: &[Key],
    audience: &str,
    now_seconds: i64,
) -> Result<VerifiedJwtSvid, JwtSvidRefused> {
    let presented = Presented::parse_as(token, Typ::Svid)?;
    let id = SpiffeId::parse(presented.subject().ok_or(JwtSvidRefused::NoSubject)?)?;
    if id.trust_domain() != trust_domain.as_str() {
        return Err(JwtSvidRefused::TrustDomain(id.trust_domain().to_owned()));
    }
    if id.path().is_empty() {
        return Err(JwtSvidRefused::NoSubject);
    }
    let named = presented.key_id();
    let is_signed =
        keys.iter().filter(|key| named.is_none_or(|named| key.is_named(named))).any(|key| key.verifies(&presented));
    if !is_signed {
        return Err(JwtSvidRefused::Signature);
    }
    let (claims, _) = presented.into_signed();
    let is_meant = match claims.get("aud") {
        Some(Value::String(one)) => one == audience,
        Some(Value::Array(several)) => several.iter().any(|one| one == audience),
        _ => false,
    };
    if !is_meant {
        return Err(JwtSvidRefused::Audience(audience.to_owned()));
    }
    let at =
        |name: &str| claims.get(name).and_then(|at| at.as_i64().or_else(|| at.as_f64().map(|at| at.floor() as i64)));
    let expires_at_seconds = at("exp").ok_or(JwtSvidRefused::Time("it does not say when it expires"))?;
    if now_seconds >= expires_at_seconds {
        return Err(JwtSvidRefused::Time("it has expired"));
    }
    if at("nbf").is_some_and(|begins| begins > now_seconds.saturating_add(LEEWAY_SECONDS)) {
        return Err(JwtSvidRefused::Time("its time has not begun"));
    }
    Ok(VerifiedJwtSvid { id, claims, expires_at_seconds })
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use serde_json::json;

    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn signed(pair: &EcdsaKeyPair, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(header), part(claims));
        let signature = pair.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// PROVES (verified-jwt-svid)
    #[test]
    fn a_jwt_svid_is_believed_by_the_keys_of_its_own_trust_domain_for_one_audience_in_its_time() {
        let new = || EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let (ours, theirs) = (new(), new());
        let keys = [Key::p256("one", ours.public_key().as_ref()).unwrap()];
        let shop = TrustDomain::parse("shop.example").unwrap();
        let header = json!({ "alg": "ES256", "kid": "one", "typ": "JWT" });
        let claims = json!({ "sub": "spiffe://shop.example/web", "aud": ["orders"], "exp": NOW + 300, "iat": NOW });
        let with = |name: &str, value: Value| {
            let mut claims = claims.clone();
            claims[name] = value;
            claims
        };
        let without = |name: &str| {
            let mut claims = claims.clone();
            claims.as_object_mut().unwrap().remove(name);
            claims
        };
        let check = |token: &str| verify(token, &shop, &keys, "orders", NOW).map(|svid| svid.id().to_string());
        for (case, header, claims, refused) in [
            ("good", header.clone(), claims.clone(), None),
            ("one audience, as text", header.clone(), with("aud", json!("orders")), None),
            ("several", header.clone(), with("aud", json!(["x", "orders"])), None),
            ("no typ", json!({ "alg": "ES256", "kid": "one" }), claims.clone(), None),
            ("no kid", json!({ "alg": "ES256" }), claims.clone(), None),
            ("another audience", header.clone(), with("aud", json!(["x"])), Some("not meant for `orders`")),
            ("no audience", header.clone(), without("aud"), Some("not meant for `orders`")),
            ("an empty one", header.clone(), with("aud", json!([])), Some("not meant for `orders`")),
            ("expired", header.clone(), with("exp", json!(NOW)), Some("it has expired")),
            ("no end", header.clone(), without("exp"), Some("does not say when it expires")),
            ("an end that is no time", header.clone(), with("exp", json!("soon")), Some("does not say when")),
            ("not begun", header.clone(), with("nbf", json!(NOW + 61)), Some("not begun")),
            ("no subject", header.clone(), without("sub"), Some("names no workload")),
            ("a trust domain", header.clone(), with("sub", json!("spiffe://shop.example")), Some("names no workload")),
            ("a name", header.clone(), with("sub", json!("web")), Some("no workload")),
            ("of another", header.clone(), with("sub", json!("spiffe://x.example/web")), Some("`x.example`")),
            ("another kid", json!({ "alg": "ES256", "kid": "two" }), claims.clone(), Some("no key")),
            ("a key of its own", json!({ "alg": "ES256", "jwk": {} }), claims.clone(), Some("has no `jwk`")),
            ("another type", json!({ "alg": "ES256", "typ": "at+jwt" }), claims.clone(), Some("another kind")),
            ("no algorithm", json!({ "alg": "none" }), claims.clone(), Some("`alg` is `none`")),
            ("EdDSA", json!({ "alg": "EdDSA" }), claims.clone(), Some("no key")),
        ] {
            match (check(&signed(&ours, &header, &claims)), refused) {
                (Ok(id), None) => assert_eq!(id, "spiffe://shop.example/web", "{case}"),
                (Err(why), Some(expected)) => assert!(why.to_string().contains(expected), "{case}: {why}"),
                (found, _) => panic!("{case}: {found:?}"),
            }
        }
        assert_eq!(check(&signed(&theirs, &header, &claims)), Err(JwtSvidRefused::Signature));
        assert_eq!(trust_domain_of(&signed(&theirs, &header, &claims)), Ok(shop));
    }
}
