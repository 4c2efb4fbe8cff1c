//! Tokens of OpenID Connect providers: whose they are, for whom, until when, and what they say.
//!
//! A token is believed when an issuer of the mesh's own configuration signed it, for this mesh, and it is in its time. Which key
//! verifies it is the issuer's to say, and by which algorithm the key's: nothing in the token's header is. What is verified is
//! decided here; what it is good for is not.
//!
//! | furniture | does |
//! |---|---|
//! | [`keys`] | the issuers' keys and endpoints: discovery, key sets, how long they are good and how often they are asked for |
//! | [`code`] | the authorization code flow: where a browser is sent, and what its answer is traded for |

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use countersign_api::svid::Bundle;
use countersign_core::{
    canonical::Digest,
    identity::TrustDomain,
    jws::{Presented, TokenMalformed, Typ},
    jwt_svid::{self, JwtSvidRefused},
    pipeline::Issuer,
};

pub mod code;
pub mod keys;

pub use keys::{KeysUnavailable, Providers};

/// How far clocks may be apart.
pub const LEEWAY_SECONDS: i64 = 60;
/// Texts of a list in a token at most: a token of 16 KiB holds more only if they are of a few letters.
const LIST_MAX: usize = 1_000;
/// Longest life of a token, from its issue to its end: a job of a pipeline lasts no longer.
pub const LIFETIME_SECONDS_MAX: i64 = 24 * 60 * 60;

/// A token whose signature, issuer, audience and times were verified.
///
/// INVARIANT (verified-token): only [`verify`] and [`verify_svid`] make one, of a token that a key of the configured issuer, or of the
/// mesh itself, signed, with the algorithm of that key, for the configured audience, and that is in its time.
#[derive(Debug, Clone)]
pub struct VerifiedToken {
    claims: Map<String, Value>,
    issuer: String,
    id: Digest,
    expires_at_seconds: i64,
}

/// Why a token proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefused {
    /// It is not one.
    #[error(transparent)]
    Malformed(#[from] TokenMalformed),
    /// Its issuer's keys are not to be had.
    #[error(transparent)]
    Keys(#[from] KeysUnavailable),
    /// Nobody that this mesh believes has issued it.
    #[error("this mesh believes no issuer `{0}`")]
    Issuer(String),
    /// None of the issuer's keys signed it.
    #[error("none of its issuer's keys has signed it")]
    Signature,
    /// It is meant for somebody else.
    #[error("it is meant for {found}, not for `{wanted}`")]
    Audience {
        /// Whom it names.
        found: String,
        /// Whom it has to name.
        wanted: String,
    },
    /// Its time is over, or has not come, or it says none.
    #[error("{0}")]
    Time(&'static str),
    /// It is no JWT-SVID that counts.
    #[error(transparent)]
    Svid(#[from] JwtSvidRefused),
}

impl TokenRefused {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "give the token as the CI system issued it",
            Self::Keys(_) => "the control plane must reach the issuer over https; it goes on with keys that it has",
            Self::Issuer(_) => "mesh.toml names the issuers that are believed, each exactly as its tokens say it",
            Self::Signature => "the token was changed, or somebody else made it",
            Self::Audience { .. } => "ask the CI system for a token with the `audience` that mesh.toml says",
            Self::Svid(_) => "have the workload ask its agent for a JWT-SVID: `countersign propose --svid` does",
            Self::Time(_) => "use a token right after it was issued, and compare the clocks",
        }
    }
}

impl VerifiedToken {
    /// A claim, as text: strings as they are, whole numbers and truth values as JSON writes them.
    pub fn claim(&self, name: &str) -> Option<String> {
        self.claims.get(name).and_then(text)
    }

    /// A claim that says several things, or one: each a text.
    pub fn list(&self, name: &str) -> Result<BTreeSet<String>, String> {
        let texts: Option<Vec<&str>> = match self.claims.get(name) {
            None => Some(Vec::new()),
            Some(Value::String(one)) => Some(vec![one]),
            Some(Value::Array(several)) => several.iter().map(Value::as_str).collect(),
            Some(_) => None,
        };
        match texts {
            Some(texts) if texts.len() <= LIST_MAX => Ok(texts.into_iter().map(str::to_owned).collect()),
            Some(texts) => Err(format!("its `{name}` says {} things; at most {LIST_MAX} are taken", texts.len())),
            None => Err(format!("its `{name}` is no list of texts")),
        }
    }

    /// Whether the issuer keeps a claim elsewhere, because it is too long for a token (OpenID Connect Core 1.0, 5.6.2).
    pub fn is_elsewhere(&self, name: &str) -> bool {
        self.claims.get("_claim_names").is_some_and(|names| names.get(name).is_some())
    }

    /// When it was issued, in seconds since 1970.
    pub fn issued_at_seconds(&self) -> Option<i64> {
        self.claims.get("iat").and_then(seconds)
    }

    /// A claim, as it is.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.claims.get(name)
    }

    /// All claims that have a text.
    pub fn claims(&self) -> impl Iterator<Item = (&str, String)> {
        self.claims.iter().filter_map(|(name, value)| Some((name.as_str(), text(value)?)))
    }

    /// The issuer's URL.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// What tells it from every other token: SHA-256 of its signing input, which holds its `jti` where it has one.
    pub fn id(&self) -> Digest {
        self.id
    }

    /// When nobody believes it any more, in seconds since 1970.
    pub fn void_at_seconds(&self) -> i64 {
        self.expires_at_seconds + LEEWAY_SECONDS
    }
}

/// Verifies a token about somebody, of one of `issuers`.
pub async fn verify<'a>(
    providers: &Providers,
    issuers: impl IntoIterator<Item = &'a Issuer>,
    token: &str,
    now_ms: u64,
) -> Result<VerifiedToken, TokenRefused> {
    verify_as(Typ::Token, providers, issuers, token, now_ms).await
}

/// Verifies a token of one kind, of one of `issuers`.
pub async fn verify_as<'a>(
    typ: Typ,
    providers: &Providers,
    issuers: impl IntoIterator<Item = &'a Issuer>,
    token: &str,
    now_ms: u64,
) -> Result<VerifiedToken, TokenRefused> {
    let presented = Presented::parse_as(token, typ)?;
    let named = presented.issuer()?;
    // Which issuer's keys to ask is all that is taken of an unverified token, and only one of ours is asked.
    let issuer = issuers.into_iter().find(|issuer| issuer.url == named);
    let issuer = issuer.ok_or_else(|| TokenRefused::Issuer(named.chars().take(200).collect()))?;
    let keys = providers.keys(&issuer.url, presented.key_id(), now_ms).await?;
    if !keys.iter().any(|key| key.verifies(&presented)) {
        return Err(TokenRefused::Signature);
    }
    let now_seconds = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
    let (claims, id) = presented.into_signed();
    is_meant_for(&claims, &issuer.audience)?;
    let expires_at_seconds = is_in_time(&claims, now_seconds)?;
    Ok(VerifiedToken { claims, issuer: issuer.url.clone(), id, expires_at_seconds })
}

/// Whether the token says that it is the SVID of a workload of `trust_domain`; nothing is verified.
pub fn is_svid_of(trust_domain: &TrustDomain, token: &str) -> bool {
    jwt_svid::trust_domain_of(token).is_ok_and(|said| said == *trust_domain)
}

/// Verifies the JWT-SVID of a workload of this mesh, for its control plane. The issuer is the trust domain.
pub fn verify_svid(bundle: &Bundle, token: &str, now_ms: u64) -> Result<VerifiedToken, TokenRefused> {
    let now_seconds = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
    let trust_domain = bundle.trust_domain();
    let audience = trust_domain.control();
    let svid = jwt_svid::verify(token, trust_domain, &bundle.jwt_keys(), audience.as_str(), now_seconds)?;
    Ok(VerifiedToken {
        claims: svid.claims().clone(),
        issuer: trust_domain.id().to_string(),
        id: Digest::of(token.rsplit_once('.').map_or(token, |(signed, _)| signed).as_bytes()),
        expires_at_seconds: svid.expires_at_seconds(),
    })
}

/// "The Client MUST validate that the aud Claim contains its client_id … If the ID Token contains multiple audiences, the Client
/// SHOULD verify that an azp Claim is present" (OpenID Connect Core 1.0, 3.1.3.7), and is us.
fn is_meant_for(claims: &Map<String, Value>, wanted: &str) -> Result<(), TokenRefused> {
    let refused = |found: String| Err(TokenRefused::Audience { found, wanted: wanted.to_owned() });
    let shown = |given: &str| format!("`{}`", given.chars().take(200).collect::<String>());
    let azp = match claims.get("azp") {
        None => None,
        Some(Value::String(azp)) => Some(azp.as_str()),
        Some(_) => return refused("an `azp` that is no text".to_owned()),
    };
    match claims.get("aud") {
        Some(Value::String(one)) if one == wanted => Ok(()),
        Some(Value::String(one)) => refused(shown(one)),
        Some(Value::Array(several)) => {
            let all: Option<Vec<&str>> = several.iter().map(Value::as_str).collect();
            match all.as_deref() {
                Some([one]) if *one == wanted => Ok(()),
                Some(all) if all.len() > 1 && all.contains(&wanted) && azp == Some(wanted) => Ok(()),
                Some(all) => refused(all.iter().take(5).map(|one| shown(one)).collect::<Vec<_>>().join(", ")),
                None => refused("what is no text".to_owned()),
            }
        }
        _ => refused("nobody".to_owned()),
    }
}

/// When it ends, if it is in its time.
fn is_in_time(claims: &Map<String, Value>, now_seconds: i64) -> Result<i64, TokenRefused> {
    let at = |name: &str, otherwise: &'static str| match claims.get(name) {
        None => Ok(None),
        Some(value) => match seconds(value) {
            Some(at) if (0..=i64::MAX / 2).contains(&at) => Ok(Some(at)),
            _ => Err(TokenRefused::Time(otherwise)),
        },
    };
    let expires = at("exp", "its `exp` is no time")?.ok_or(TokenRefused::Time("it does not say when it expires"))?;
    let issued = at("iat", "its `iat` is no time")?.ok_or(TokenRefused::Time("it does not say when it was issued"))?;
    if now_seconds >= expires + LEEWAY_SECONDS {
        return Err(TokenRefused::Time("it has expired"));
    }
    if issued > now_seconds + LEEWAY_SECONDS {
        return Err(TokenRefused::Time("it was issued in the future"));
    }
    if at("nbf", "its `nbf` is no time")?.is_some_and(|begins| begins > now_seconds + LEEWAY_SECONDS) {
        return Err(TokenRefused::Time("its time has not begun"));
    }
    if expires - issued > LIFETIME_SECONDS_MAX {
        return Err(TokenRefused::Time("it lives for more than a day"));
    }
    Ok(expires)
}

/// "NumericDate … values may be non-integer" (RFC 7519, 2): what is beyond the second changes nothing here.
fn seconds(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64))
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) => Some(value.to_string()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_token_is_for_one_mesh_and_of_several_audiences_the_one_that_asked_for_it() {
        for (given, is_ours) in [
            (json!({ "aud": "mesh" }), true),
            (json!({ "aud": ["mesh"] }), true),
            (json!({ "aud": ["mesh", "other"], "azp": "mesh" }), true),
            (json!({ "aud": ["mesh", "other"], "azp": "other" }), false),
            (json!({ "aud": ["mesh", "other"] }), false),
            (json!({ "aud": "mesh ", "azp": "mesh" }), false),
            (json!({ "aud": "MESH" }), false),
            (json!({ "aud": "other", "azp": "mesh" }), false),
            (json!({ "aud": ["other"] }), false),
            (json!({ "aud": [] }), false),
            (json!({ "aud": ["mesh", 7], "azp": "mesh" }), false),
            (json!({ "aud": "mesh", "azp": 7 }), false),
            (json!({ "aud": { "mesh": 1 } }), false),
            (json!({}), false),
        ] {
            assert_eq!(is_meant_for(&claims(given.clone()), "mesh").is_ok(), is_ours, "{given}");
        }
    }

    #[test]
    fn a_token_is_good_in_its_time_and_says_what_that_is() {
        const NOW: i64 = 1_790_000_000;
        let of = |exp: i64, iat: i64| json!({ "exp": NOW + exp, "iat": NOW + iat });
        for (given, refused) in [
            (of(300, 0), None),
            (of(-59, -300), None),
            (of(300, 60), None),
            (of(-60, -300), Some("it has expired")),
            (of(300, 61), Some("it was issued in the future")),
            (of(86_400, -1), Some("it lives for more than a day")),
            (json!({ "exp": NOW + 5, "iat": NOW, "nbf": NOW + 61 }), Some("its time has not begun")),
            (json!({ "exp": NOW + 5, "iat": NOW, "nbf": NOW + 60 }), None),
            (json!({ "exp": NOW as f64 + 5.5, "iat": NOW }), None),
            (json!({ "iat": NOW }), Some("it does not say when it expires")),
            (json!({ "exp": NOW + 5 }), Some("it does not say when it was issued")),
            (json!({ "exp": "soon", "iat": NOW }), Some("its `exp` is no time")),
            (json!({ "exp": 1e300, "iat": NOW }), Some("its `exp` is no time")),
            (json!({ "exp": -1, "iat": NOW }), Some("its `exp` is no time")),
            (json!({ "exp": NOW + 5, "iat": NOW, "nbf": null }), Some("its `nbf` is no time")),
        ] {
            let found = is_in_time(&claims(given.clone()), NOW).err().map(|refused| refused.to_string());
            assert_eq!(found.as_deref(), refused, "{given}");
        }
    }
}
