//! Who asks. A client proves who it is in one of three ways, and it is what is known of it now that counts: a workload has to be part of
//! the mesh and its certificate good.
//!
//! INVARIANT (client-proven): nobody is given or told anything but whom a certificate of the mesh, a JWT-SVID for this issuer alone, or a
//! key that the mesh declares for them proved in the same request.

use http::{HeaderMap, header};

use serde_json::{Map, Value};

use countersign_core::{
    canonical::Digest,
    identity::SpiffeId,
    jws::{Presented, Typ},
    jwt_svid,
    oauth::is_client,
    token::Thumbprint,
};

use super::{Refused, Service, Word, form::Form, refused, serve::Connected};
use crate::{agents::Proven, store::Document};

/// The assertion that is a JWT-SVID (draft-ietf-oauth-spiffe-client-auth).
const JWT_SVID: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";

/// The assertion that a client signs with a key of its own (RFC 7523, 2.2).
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// How long such an assertion may still be good, in seconds.
const ASSERTION_SECONDS_MAX: i64 = 5 * 60;
/// How far clocks may be apart, in seconds.
const LEEWAY_SECONDS: i64 = 60;
/// How long the name of an assertion may be, in bytes.
const JTI_BYTES: std::ops::RangeInclusive<usize> = 8..=256;
/// The kind of the documents of assertions that were used, and how many are remembered at the same time.
const USED_KIND: &str = "client-assertion";
const USED_MAX: u32 = 100_000;

/// A client that has shown who it is.
#[derive(Debug, Clone)]
pub struct Client {
    /// Who.
    pub id: SpiffeId,
    /// The certificate of the connection, if it showed one.
    pub certificate: Option<Certificate>,
}

/// A certificate of the mesh that is good now.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// SHA-256 of its DER.
    pub thumbprint: Thumbprint,
    /// When it ends, in seconds since 1970.
    pub not_after: i64,
}

/// Finds out who asks.
pub async fn authenticate(
    service: &Service,
    connected: &Connected,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Client, Refused> {
    let nobody = |why: &str| refused(Word::InvalidClient, why);
    if headers.contains_key(header::AUTHORIZATION) || form.get("client_secret").is_some() {
        return Err(nobody("clients have no secrets here: show an SVID, or send an assertion"));
    }
    let shown = connected.peer.as_ref().map(|peer| good(service, peer)).transpose()?;
    let id = match (form.get("client_assertion_type"), form.get("client_assertion")) {
        (None, None) => {
            let (id, _) = shown.as_ref().ok_or_else(|| nobody("show an SVID, or send an assertion"))?;
            // "the "client_id" parameter … MUST be used" (RFC 8705, 2).
            if form.demand("client_id")? != id.as_str() {
                return Err(nobody("the certificate is of another client"));
            }
            id.clone()
        }
        (Some(JWT_SVID), Some(assertion)) => by_jwt_svid(service, assertion)?,
        (Some(JWT_BEARER), Some(assertion)) => by_own_key(service, assertion).await?,
        (Some(_), Some(_)) => return Err(nobody("assertions of this type are not taken")),
        _ => return Err(refused(Word::InvalidRequest, "an assertion comes with its type")),
    };
    if form.get("client_id").is_some_and(|said| said != id.as_str()) {
        return Err(nobody("the assertion is of another client"));
    }
    // A token would be bound to it: then it is the client's own.
    if shown.as_ref().is_some_and(|(of, _)| *of != id) {
        return Err(nobody("the certificate is of another client than the assertion"));
    }
    if !is_client(service.plane.ledger.head().follower.state(), &id) {
        return Err(nobody("this is no client: a workload that is part of the mesh now, or one of [clients.*]"));
    }
    Ok(Client { id, certificate: shown.map(|(_, certificate)| certificate) })
}

/// Whose a certificate is, if it is good now: the connection may be older than what became of it.
fn good(service: &Service, peer: &Proven) -> Result<(SpiffeId, Certificate), Refused> {
    let plane = &service.plane;
    let why = peer.refused(plane);
    if let Some(why) = why {
        return Err(refused(Word::InvalidClient, why));
    }
    let verified = peer.verified();
    let certificate = Certificate { thumbprint: Thumbprint(verified.leaf_sha256().0), not_after: verified.not_after() };
    Ok((verified.id().clone(), certificate))
}

fn by_jwt_svid(service: &Service, assertion: &str) -> Result<SpiffeId, Refused> {
    let authority = service.authority()?;
    let (bundle, issuer) = (authority.bundle(), &*service.oauth.issuer);
    let now_seconds = i64::try_from(service.plane.clock.now_ms() / 1000).unwrap_or(i64::MAX);
    let verified = jwt_svid::verify(assertion, authority.trust_domain(), &bundle.jwt_keys(), issuer, now_seconds);
    let verified = verified.map_err(|why| refused(Word::InvalidClient, format!("the JWT-SVID is refused: {why}")))?;
    // One for several audiences can be shown here by any of them.
    let is_sole = match verified.claims().get("aud") {
        Some(Value::Array(several)) => several.len() == 1,
        _ => true,
    };
    match is_sole {
        true => Ok(verified.id().clone()),
        false => Err(refused(Word::InvalidClient, "the JWT-SVID has to be for this issuer alone")),
    }
}

/// "private_key_jwt": the client signs for this issuer alone, once, with a key that the mesh declares for it. What the assertion brings
/// along of keys is not looked at.
///
/// INVARIANT (assertion-once): an assertion authenticates one request.
async fn by_own_key(service: &Service, assertion: &str) -> Result<SpiffeId, Refused> {
    let refuse = |why: &str| refused(Word::InvalidClient, format!("the assertion is refused: {why}"));
    let presented = Presented::parse_as(assertion, Typ::Token).map_err(|why| refuse(&why.to_string()))?;
    let id = presented.subject().and_then(|subject| SpiffeId::parse(subject).ok().filter(|id| id.as_str() == subject));
    let head = service.plane.ledger.head();
    let state = head.follower.state();
    let id = id.filter(|id| is_client(state, id));
    let known = id.as_ref().and_then(SpiffeId::client).and_then(|name| state.clients.get(&name));
    let (Some(id), Some(known)) = (id, known) else { return Err(refuse("its `sub` is none of [clients.*]")) };
    let named = presented.key_id();
    let keys = known.keys();
    let mut keys = keys.iter().filter(|key| named.is_none_or(|named| key.is_named(named)));
    if !keys.any(|key| key.verifies(&presented)) {
        return Err(refuse("no key of this client signed it"));
    }
    if presented.issuer().ok() != Some(id.as_str()) {
        return Err(refuse("its `iss` and its `sub` have to be the client"));
    }
    let (claims, _) = presented.into_signed();
    // "the value of the authorization server's issuer identifier … as the sole value, as a string" (RFC 7523bis, 3).
    if claims.get("aud").and_then(Value::as_str) != Some(&service.oauth.issuer) {
        return Err(refuse("its `aud` has to be this issuer, and nothing else"));
    }
    let now_ms = service.plane.clock.now_ms();
    let expires_at = in_time(&claims, i64::try_from(now_ms / 1000).unwrap_or(i64::MAX)).map_err(refuse)?;
    let jti = claims.get("jti").and_then(Value::as_str).filter(|jti| JTI_BYTES.contains(&jti.len()));
    let jti = jti.ok_or_else(|| refuse("it has no `jti` of 8 to 256 bytes"))?;
    // Whoever signs cannot fill what is remembered of others.
    service.oauth.count(&id)?;
    let used = Document {
        kind: USED_KIND,
        key: Digest::of(format!("{id}\n{jti}").as_bytes()).to_string(),
        bytes: Vec::new(),
        expires_at_ms: expires_at.unsigned_abs() * 1000 + 1000,
    };
    let is_new =
        service.plane.storage.run("use_assertion", move |store| store.put_document(&used, now_ms, USED_MAX)).await?;
    match is_new {
        true => Ok(id),
        false => Err(refuse("it was used before")),
    }
}

/// When an assertion expires, if it is in its time and does not live long.
fn in_time(claims: &Map<String, Value>, now: i64) -> Result<i64, &'static str> {
    let at =
        |name: &str| claims.get(name).and_then(|at| at.as_i64().or_else(|| at.as_f64().map(|at| at.floor() as i64)));
    let expires_at = at("exp").ok_or("it does not say when it expires")?;
    if now >= expires_at {
        return Err("it has expired");
    }
    if expires_at > now.saturating_add(ASSERTION_SECONDS_MAX + LEEWAY_SECONDS) {
        return Err("it lives too long: five minutes at most");
    }
    if ["iat", "nbf"].iter().filter_map(|name| at(name)).any(|at| at > now.saturating_add(LEEWAY_SECONDS)) {
        return Err("it was made in the future");
    }
    Ok(expires_at)
}
