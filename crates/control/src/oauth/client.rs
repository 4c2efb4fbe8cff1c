//! Who asks. A client proves who it is in one of three ways, and it is what is known of it now that counts: a workload has to be part of
//! the mesh and its certificate good.
//!
//! INVARIANT (client-proven): nobody is given or told anything but whom a certificate of the mesh, a JWT-SVID for this issuer alone, or a
//! key that the mesh declares for them proved in the same request.

use http::{HeaderMap, header};

use countersign_core::{identity::SpiffeId, jwt_svid, token::Thumbprint};
use serde_json::Value;

use super::{Refused, Service, Word, form::Form, refused, serve::Connected};
use crate::agents::Proven;

/// The assertion that is a JWT-SVID (draft-ietf-oauth-spiffe-client-auth).
const JWT_SVID: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe";

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
    let head = service.plane.ledger.head();
    let is_known = id.service().is_some_and(|name| head.follower.state().is_active(&name));
    if !is_known {
        return Err(nobody("this is no workload of the mesh, or none that is part of it now"));
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
