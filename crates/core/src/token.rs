//! An access token of the mesh: what one workload shows another beside its certificate. It is for one audience, for the few
//! operations that its holder may be permitted, for minutes, and good for nothing without the key of the certificate it is bound to.
//!
//! Standards: RFC 9068 (the profile), RFC 8705, 3 (the binding, `x5t#S256`), RFC 6749, 3.3 (scope). Which token was revoked is not
//! known here: [`crate::signal`] knows.

use std::{borrow::Cow, collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::{Deserialize, Serialize, de};
use serde_json::Value;

use crate::{
    canonical::Digest,
    identity::{InstanceId, ServiceName, SpiffeId},
    jws::{Key, Presented, Typ},
    policy::Action,
    service::Tokens,
    state::MeshState,
};

/// How far clocks may be apart, in seconds, for a token that was issued in the future.
pub const LEEWAY_SECONDS: i64 = 60;
/// Scopes of one token at most; one that would need more is for actions instead of operations.
pub const SCOPES_MAX: usize = 128;
/// Longest `scope`, in bytes: the token travels in a header of every request.
pub const SCOPE_BYTES_MAX: usize = 4 * 1024;

/// What tells a token from others: 48 bits of time in milliseconds, then 80 random bits; 32 hexadecimal digits when written, so that
/// ids sort by time and nobody guesses one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; 16]);

/// Text that is no id of a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no id of a token: 32 hexadecimal digits, as `countersign token list` shows them")]
pub struct TokenIdError(String);

/// What a token says (RFC 9068, 2.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who issued it.
    #[serde(rename = "iss")]
    pub issuer: String,
    /// Whom it is about.
    #[serde(rename = "sub")]
    pub subject: SpiffeId,
    /// The one service it is for.
    #[serde(rename = "aud")]
    pub audience: SpiffeId,
    /// Who asked for it: the subject itself, or who acts for it.
    pub client_id: SpiffeId,
    /// When it was issued, in seconds since 1970.
    #[serde(rename = "iat")]
    pub issued_at: i64,
    /// When it ends, in seconds since 1970.
    #[serde(rename = "exp")]
    pub expires_at: i64,
    /// Its id.
    #[serde(rename = "jti")]
    pub id: TokenId,
    /// What it is for.
    pub scope: Scope,
    /// What it is bound to.
    #[serde(rename = "cnf")]
    pub confirmation: Confirmation,
    /// The instance that holds it; absent where the token service gave it to a client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// The first token of those that each were renewed from the one before, or exchanged for it.
    pub family: TokenId,
    /// Who acts for the subject, when that is somebody else (RFC 8693, 4.1).
    #[serde(rename = "act", default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<Box<Actor>>,
}

/// What a token is bound to (RFC 7800, 3.1): one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confirmation {
    /// A certificate: SHA-256 of its DER (RFC 8705, 3.1).
    #[serde(rename = "x5t#S256")]
    Certificate(Thumbprint),
    /// A key that signs proofs: its thumbprint (RFC 9449, 6.1).
    #[serde(rename = "jkt")]
    Key(Thumbprint),
}

/// Who acts for the subject of a token, and for whom they do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Actor {
    /// Who.
    #[serde(rename = "sub")]
    pub subject: SpiffeId,
    /// Who acted before.
    #[serde(rename = "act", default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Box<Actor>>,
}

/// SHA-256 of a certificate's DER, or of a key as RFC 7638 writes it, base64url when written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Thumbprint(pub [u8; 32]);

/// Text that is no thumbprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a thumbprint is 32 bytes in base64url")]
pub struct ThumbprintError;

/// What a token is for: names of operations, or actions where a service has no contract. Sorted; one string when written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scope(Arc<[Arc<str>]>);

/// A token that the issuer signed for this audience, and that is in its time. Whether whoever shows it may is still to be asked.
#[derive(Debug, Clone)]
pub struct AccessToken(Claims);

/// Whose tokens are believed.
#[derive(Debug, Clone, Default)]
pub struct Authorities {
    /// The issuer that a token must name.
    pub issuer: Arc<str>,
    /// Its keys, each with a name.
    pub keys: Vec<Key>,
}

/// Why a token is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenFault {
    /// It is none of ours: its form, its `typ`, or a claim is missing.
    Malformed,
    /// No key of the issuer signed it.
    Signature,
    /// Another issuer says it is its own.
    Issuer,
    /// It is for another service.
    Audience,
    /// Its time is over.
    Expired,
    /// It was issued in the future.
    NotYetValid,
    /// Whoever shows it has another certificate than the one it is bound to.
    AnotherKey,
    /// It is about another workload than the one that shows it.
    AnotherSubject,
    /// It was revoked.
    Revoked,
    /// Its holder has long shown newer ones of its family.
    Superseded,
}

/// The token that came with a request, as its receiver found it: what policies and records see of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownToken {
    /// Its id, once its signature was verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<TokenId>,
    /// Why it is not believed; absent when it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<TokenFault>,
    /// What it is for.
    pub scope: Scope,
    /// When it was issued, in seconds since 1970.
    pub issued_at: i64,
}

impl TokenId {
    /// The id of a token issued at `issued_at_ms`.
    pub fn new(issued_at_ms: u64, random: [u8; 10]) -> Self {
        let mut id = [0; 16];
        id[..6].copy_from_slice(&issued_at_ms.to_be_bytes()[2..]);
        id[6..].copy_from_slice(&random);
        Self(id)
    }

    /// Takes its 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// When it was issued, in milliseconds since 1970.
    pub fn issued_at_ms(&self) -> u64 {
        self.0[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte))
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenId({self})")
    }
}

impl FromStr for TokenId {
    type Err = TokenIdError;
    fn from_str(given: &str) -> Result<Self, TokenIdError> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(given, &mut bytes).map_err(|_| TokenIdError(given.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl Serialize for TokenId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Confirmation {
    /// The certificate that it is bound to, if it is to one.
    pub fn certificate(&self) -> Option<&Thumbprint> {
        match self {
            Self::Certificate(thumbprint) => Some(thumbprint),
            Self::Key(_) => None,
        }
    }

    /// The key that it is bound to, if it is to one.
    pub fn key(&self) -> Option<&Thumbprint> {
        match self {
            Self::Key(thumbprint) => Some(thumbprint),
            Self::Certificate(_) => None,
        }
    }

    /// What tells it from others, whatever it is.
    pub fn thumbprint(&self) -> Thumbprint {
        match self {
            Self::Certificate(thumbprint) | Self::Key(thumbprint) => *thumbprint,
        }
    }
}

impl Actor {
    /// How many act, one for another.
    pub fn depth(&self) -> usize {
        1 + self.before.as_ref().map_or(0, |before| before.depth())
    }
}

impl Thumbprint {
    /// Of the certificate with this DER.
    pub fn of_certificate(der: &[u8]) -> Self {
        Self(Digest::of(der).0)
    }
}

impl fmt::Display for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl FromStr for Thumbprint {
    type Err = ThumbprintError;
    fn from_str(given: &str) -> Result<Self, ThumbprintError> {
        let bytes = URL_SAFE_NO_PAD.decode(given).map_err(|_| ThumbprintError)?;
        bytes.try_into().map(Self).map_err(|_| ThumbprintError)
    }
}

impl fmt::Debug for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Thumbprint({})", hex::encode(&self.0[..6]))
    }
}

impl Serialize for Thumbprint {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Thumbprint {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Cow::<'de, str>::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Scope {
    /// Of these words; each once.
    pub fn new(words: impl IntoIterator<Item = Arc<str>>) -> Self {
        let mut words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
        words.sort_unstable();
        words.dedup();
        Self(words.into())
    }

    /// Reads a `scope` (RFC 6749, 3.3).
    pub fn parse(given: &str) -> Self {
        Self::new(given.split(' ').map(Into::into))
    }

    /// Its words.
    pub fn words(&self) -> &[Arc<str>] {
        &self.0
    }

    /// Whether it is for nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is for what is asked: the operation by its name, or else the action.
    pub fn covers(&self, operation: Option<&str>, action: Action<'_>) -> bool {
        let names = |word: &Arc<str>| operation.is_some_and(|name| **word == *word_of_operation(name));
        let is_action = |word: &Arc<str>| match action {
            Action::Http(method) => word.strip_prefix("http:") == Some(method),
            Action::GrpcCall => &**word == "grpc:call",
            Action::TcpConnect => &**word == "tcp:connect",
        };
        self.0.iter().any(|word| is_action(word) || names(word))
    }
}

/// An operation's name as a word of a scope: what a word must not hold, and the `:` of actions, is percent-encoded.
pub fn word_of_operation(name: &str) -> Cow<'_, str> {
    const NOT_IN_WORDS: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'\\').add(b'%').add(b':');
    utf8_percent_encode(name, NOT_IN_WORDS).into()
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, word) in self.0.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            write!(f, "{space}{word}")?;
        }
        Ok(())
    }
}

impl Serialize for Scope {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self::parse(&Cow::<'de, str>::deserialize(from)?))
    }
}

impl TokenFault {
    /// Every fault. Kept records refer to places in this list: only append.
    pub const ALL: [Self; 10] = [
        Self::Malformed,
        Self::Signature,
        Self::Issuer,
        Self::Audience,
        Self::Expired,
        Self::NotYetValid,
        Self::AnotherKey,
        Self::AnotherSubject,
        Self::Revoked,
        Self::Superseded,
    ];

    /// The place of this fault in [`Self::ALL`].
    pub fn place(self) -> usize {
        self as usize
    }

    /// As records and metrics spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Signature => "signature",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::AnotherKey => "another_key",
            Self::AnotherSubject => "another_subject",
            Self::Revoked => "revoked",
            Self::Superseded => "superseded",
        }
    }

    /// What it means, for people.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Malformed => "it is no access token",
            Self::Signature => "no key of the mesh's issuer signed it",
            Self::Issuer => "it names another issuer",
            Self::Audience => "it is for another service",
            Self::Expired => "it has expired",
            Self::NotYetValid => "it was issued in the future",
            Self::AnotherKey => "it is bound to another certificate than the one of whoever showed it",
            Self::AnotherSubject => "it is about another workload than the one that showed it",
            Self::Revoked => "it was revoked",
            Self::Superseded => "its holder replaced it more than a minute ago, and shows newer ones",
        }
    }

    /// Whether it is a sign that somebody has a token that is not theirs: an honest sidecar never comes with such a one.
    pub fn is_theft(self) -> bool {
        matches!(self, Self::AnotherKey | Self::AnotherSubject | Self::Superseded)
    }
}

/// The services that a workload of `caller` needs access tokens for: its declared upstreams, and where routes may send what is for
/// them, as far as they are part of the mesh and demand one.
pub fn audiences(state: &MeshState, caller: &ServiceName) -> BTreeSet<ServiceName> {
    let Some(held) = state.services.get(caller).filter(|_| state.is_active(caller)) else { return BTreeSet::new() };
    let upstreams = &held.spec.upstreams;
    let routed = state.routes.values().filter(|route| upstreams.contains(&route.service));
    let targets = routed.flat_map(|route| route.split.keys());
    let demands = |name: &&ServiceName| {
        let spec = state.services.get(*name).map(|service| &service.spec);
        state.is_active(name) && spec.is_some_and(|spec| spec.tokens == Tokens::Required)
    };
    upstreams.iter().chain(targets).filter(demands).cloned().collect()
}

/// Verifies that `token` was signed by one of `authorities` for `audience`, and is in its time.
///
/// INVARIANT (verified-access-token): only this makes an [`AccessToken`]: of a token that a key of the mesh's own issuer signed as an
/// access token, for this one service.
pub fn verify(
    token: &str,
    authorities: &Authorities,
    audience: &SpiffeId,
    now_seconds: i64,
) -> Result<AccessToken, (TokenFault, Option<TokenId>)> {
    let no = |fault| (fault, None);
    let presented = Presented::parse_as(token, Typ::Access).map_err(|_| no(TokenFault::Malformed))?;
    let named = presented.key_id().ok_or(no(TokenFault::Malformed))?;
    let is_signed = authorities.keys.iter().filter(|key| key.is_named(named)).any(|key| key.verifies(&presented));
    if !is_signed {
        return Err(no(TokenFault::Signature));
    }
    let claims = serde_json::from_value::<Claims>(Value::Object(presented.into_signed().0));
    let claims = claims.map_err(|_| no(TokenFault::Malformed))?;
    let known = |fault| Err((fault, Some(claims.id)));
    // What clients of the token service hold is bound to other things than the certificate of a sidecar.
    if claims.instance.is_none() || claims.confirmation.certificate().is_none() || claims.actor.is_some() {
        return known(TokenFault::Malformed);
    }
    if *claims.issuer != *authorities.issuer {
        return known(TokenFault::Issuer);
    }
    if claims.audience != *audience {
        return known(TokenFault::Audience);
    }
    if now_seconds >= claims.expires_at {
        return known(TokenFault::Expired);
    }
    if claims.issued_at > now_seconds.saturating_add(LEEWAY_SECONDS) {
        return known(TokenFault::NotYetValid);
    }
    Ok(AccessToken(claims))
}

impl AccessToken {
    /// What it says.
    pub fn claims(&self) -> &Claims {
        &self.0
    }

    /// Why `peer`, who proved to have `certificate`, may not show it at `now_seconds`; `None`: it may.
    pub fn fault_of(&self, peer: &SpiffeId, certificate: &Thumbprint, now_seconds: i64) -> Option<TokenFault> {
        if self.0.confirmation != Confirmation::Certificate(*certificate) {
            return Some(TokenFault::AnotherKey);
        }
        if self.0.subject != *peer {
            return Some(TokenFault::AnotherSubject);
        }
        (now_seconds >= self.0.expires_at).then_some(TokenFault::Expired)
    }

    /// As policies and records see it.
    pub fn shown(&self, fault: Option<TokenFault>) -> ShownToken {
        ShownToken { id: Some(self.0.id), fault, scope: self.0.scope.clone(), issued_at: self.0.issued_at }
    }
}

impl ShownToken {
    /// One that is not believed.
    pub fn refused(fault: TokenFault, id: Option<TokenId>) -> Self {
        Self { id, fault: Some(fault), scope: Scope::default(), issued_at: 0 }
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use serde_json::json;

    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn signed(pair: &EcdsaKeyPair, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(header), part(claims));
        let signature = pair.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    fn id(path: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://shop.example/{path}")).unwrap()
    }

    fn claims() -> Claims {
        let first = TokenId::new(NOW as u64 * 1000, [7; 10]);
        Claims {
            issuer: "https://shop.example".to_owned(),
            subject: id("web"),
            audience: id("orders"),
            client_id: id("web"),
            issued_at: NOW,
            expires_at: NOW + 300,
            id: first,
            scope: Scope::parse("list http:GET"),
            confirmation: Confirmation::Certificate(Thumbprint([1; 32])),
            instance: Some(InstanceId::parse("web/1").unwrap()),
            family: first,
            actor: None,
        }
    }

    /// PROVES (verified-access-token)
    #[test]
    fn an_access_token_is_believed_of_its_issuer_alone_for_one_service_in_its_time() {
        let new = || EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let (ours, theirs) = (new(), new());
        let keys = vec![Key::p256("one", ours.public_key().as_ref()).unwrap()];
        let authorities = Authorities { issuer: "https://shop.example".into(), keys };
        let header = json!({ "alg": "ES256", "kid": "one", "typ": "at+jwt" });
        let good = serde_json::to_value(claims()).unwrap();
        let with = |name: &str, value: Value| {
            let mut claims = good.clone();
            claims[name] = value;
            claims
        };
        let without = |name: &str| {
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().remove(name);
            claims
        };
        let headed = |name: &str, value: Value| {
            let mut header = header.clone();
            header[name] = value;
            header
        };
        let check = |token: &str| verify(token, &authorities, &id("orders"), NOW).map_err(|(fault, _)| fault.as_str());
        for (case, header, claims, refused) in [
            ("good", header.clone(), good.clone(), None),
            ("the long typ", headed("typ", json!("application/at+jwt")), good.clone(), None),
            ("an ID token", headed("typ", json!("JWT")), good.clone(), Some("malformed")),
            ("no typ", json!({ "alg": "ES256", "kid": "one" }), good.clone(), Some("malformed")),
            ("no algorithm", headed("alg", json!("none")), good.clone(), Some("malformed")),
            ("a MAC of the public key", headed("alg", json!("HS256")), good.clone(), Some("malformed")),
            ("no kid", json!({ "alg": "ES256", "typ": "at+jwt" }), good.clone(), Some("malformed")),
            ("another kid", headed("kid", json!("../one")), good.clone(), Some("signature")),
            ("another issuer", header.clone(), with("iss", json!("https://shop.example/")), Some("issuer")),
            ("for another service", header.clone(), with("aud", json!(id("web"))), Some("audience")),
            ("for several", header.clone(), with("aud", json!([id("orders"), id("web")])), Some("malformed")),
            ("over", header.clone(), with("exp", json!(NOW)), Some("expired")),
            ("without end", header.clone(), without("exp"), Some("malformed")),
            ("from the future", header.clone(), with("iat", json!(NOW + 61)), Some("not_yet_valid")),
            ("of a clock a little ahead", header.clone(), with("iat", json!(NOW + 60)), None),
            ("without subject", header.clone(), without("sub"), Some("malformed")),
            ("without client", header.clone(), without("client_id"), Some("malformed")),
            ("without id", header.clone(), without("jti"), Some("malformed")),
            ("bound to nothing", header.clone(), without("cnf"), Some("malformed")),
            (
                "bound to two keys",
                header.clone(),
                with("cnf", json!({ "x5t#S256": Thumbprint([1; 32]), "jkt": "x" })),
                Some("malformed"),
            ),
            ("bound to a key", header.clone(), with("cnf", json!({ "jkt": Thumbprint([1; 32]) })), Some("malformed")),
            ("of no instance", header.clone(), without("instance"), Some("malformed")),
            ("of an actor", header.clone(), with("act", json!({ "sub": id("cron") })), Some("malformed")),
        ] {
            let found = check(&signed(&ours, &header, &claims)).err();
            assert_eq!(found, refused, "{case}");
        }
        assert_eq!(check(&signed(&theirs, &header, &good)).err(), Some("signature"));
        let embedded = headed("jwk", json!({ "kty": "EC" }));
        assert_eq!(check(&signed(&theirs, &embedded, &good)).err(), Some("signature"), "a key of its own");
        let twice = r#"{"exp":1,"exp":1790000300}"#;
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(twice));
        let signature = ours.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        let twice = format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()));
        assert_eq!(check(&twice).err(), Some("malformed"), "a claim that stands there twice");
        assert_eq!(check("").err(), Some("malformed"));
        let huge = "a".repeat(crate::jws::TOKEN_BYTES_MAX + 1);
        assert_eq!(check(&huge).err(), Some("malformed"));
    }

    #[test]
    fn a_token_is_shown_by_the_workload_and_the_key_that_it_is_bound_to_alone() {
        let token = AccessToken(claims());
        for (peer, certificate, now, fault) in [
            (id("web"), 1, NOW, None),
            (id("web"), 2, NOW, Some(TokenFault::AnotherKey)),
            (id("cron"), 1, NOW, Some(TokenFault::AnotherSubject)),
            (id("web"), 1, NOW + 300, Some(TokenFault::Expired)),
        ] {
            assert_eq!(token.fault_of(&peer, &Thumbprint([certificate; 32]), now), fault);
        }
    }

    #[test]
    fn a_scope_is_for_operations_by_their_names_and_for_actions_and_never_mixes_them_up() {
        let scope = Scope::new(["GET /charges/{id}", "http:POST"].map(|name| word_of_operation(name).as_ref().into()));
        assert_eq!(scope.to_string(), "GET%20/charges/{id} http%3APOST");
        assert_eq!(Scope::parse(&scope.to_string()), scope);
        assert!(scope.covers(Some("GET /charges/{id}"), Action::Http("GET")));
        assert!(!scope.covers(Some("GET /charges"), Action::Http("GET")));
        assert!(!scope.covers(None, Action::Http("POST")), "an operation that is called as an action is");
        let actions = Scope::parse("http:GET  grpc:call http:GET");
        assert_eq!(actions.words().len(), 2);
        assert!(actions.covers(None, Action::Http("GET")) && actions.covers(Some("any"), Action::Http("GET")));
        assert!(!actions.covers(None, Action::Http("POST")) && actions.covers(None, Action::GrpcCall));
        assert!(!Scope::default().covers(Some(""), Action::TcpConnect));
    }

    #[test]
    fn an_id_says_when_its_token_was_issued() {
        let id = TokenId::new(1_790_000_000_123, [0xff; 10]);
        assert_eq!((id.issued_at_ms(), id.to_string().parse()), (1_790_000_000_123, Ok(id)));
        assert!("xyz".parse::<TokenId>().is_err());
        for (place, fault) in TokenFault::ALL.into_iter().enumerate() {
            assert_eq!(fault.place(), place);
        }
    }
}
