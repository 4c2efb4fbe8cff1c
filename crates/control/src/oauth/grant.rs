//! Which token whoever asks is given: for one service, for what policies may permit there now, bound to a key that was proven with the
//! request. What it says is kept, as of every token; the token itself is not, and is in no log.

use http::HeaderMap;
use serde_json::{Value, json};

use countersign_api::dpop::DPOP_HEADER;
use countersign_core::{
    identity::{ServiceName, SpiffeId},
    oauth::{acting, common, may_ask, narrowed},
    token::{Actor, Claims, Confirmation, Scope, TokenId},
};

use super::{
    Refused, Service, TOKEN_PATH, Word,
    client::{self, Client},
    form::Form,
    refused,
    serve::Connected,
};
use crate::{
    ledger::Head,
    proof::{Of, Proof},
    store::StoredToken,
    tokens::{TOKEN_LIFETIME, new_id},
};

/// The grant by which a token is exchanged for another (RFC 8693, 2.1).
pub const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const CLIENT_CREDENTIALS: &str = "client_credentials";
/// What is exchanged, and what for.
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

/// Answers a request for a token.
pub async fn token(
    service: &Service,
    connected: &Connected,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Value, Refused> {
    let grant = form.demand("grant_type")?;
    let client = client::authenticate(service, connected, headers, form).await?;
    let bound = binding(service, headers, &client).await?;
    service.oauth.count(&client.id)?;
    match grant {
        CLIENT_CREDENTIALS => {
            let (head, audience) = target(service, form)?;
            let scope = within(service, &head, &client.id, &audience)?;
            let wanted = Wanted {
                subject: client.id.clone(),
                scope: narrowed(&scope, form.get("scope"))
                    .map_err(|why| refused(Word::InvalidScope, why.to_string()))?,
                audience,
                family: None,
                actor: None,
                not_after: i64::MAX,
            };
            issue(service, &client, bound, wanted, CLIENT_CREDENTIALS).await
        }
        EXCHANGE => {
            let wanted = exchanged(service, &client, form)?;
            let mut answer = issue(service, &client, bound, wanted, "token_exchange").await?;
            answer["issued_token_type"] = ACCESS_TOKEN.into();
            Ok(answer)
        }
        _ => Err(refused(Word::UnsupportedGrantType, format!("grants are `{CLIENT_CREDENTIALS}` and `{EXCHANGE}`"))),
    }
}

/// A token that is to be issued.
struct Wanted {
    subject: SpiffeId,
    audience: ServiceName,
    scope: Scope,
    family: Option<TokenId>,
    actor: Option<Box<Actor>>,
    /// It lives no longer than that.
    not_after: i64,
}

/// What a token is bound to, and when that ends.
struct Bound {
    to: Confirmation,
    not_after: i64,
}

/// What the token will be bound to: the key of a proof, or else the certificate of the connection.
///
/// INVARIANT (proof-says-our-number): a proof counts only when it says a number that was given here lately, for this request, once.
async fn binding(service: &Service, headers: &HeaderMap, client: &Client) -> Result<Bound, Refused> {
    if !headers.contains_key(DPOP_HEADER) {
        let certificate = client.certificate.as_ref().ok_or_else(|| {
            let why = "a token is bound to a key: send a DPoP proof, or show the SVID in the handshake";
            refused(Word::InvalidRequest, why)
        })?;
        return Ok(Bound { to: Confirmation::Certificate(certificate.thumbprint), not_after: certificate.not_after });
    }
    let (plane, now_ms) = (&service.plane, service.plane.clock.now_ms());
    let wrong = |why: String| refused(Word::InvalidDpopProof, why);
    // The address is the one that clients know us by, whatever the request says of its host.
    let url = service.oauth.at(TOKEN_PATH);
    let proof = Proof::verify(headers, "POST", &url, None, now_ms).map_err(|why| wrong(why.to_string()))?;
    // "the authorization server … MUST NOT accept any DPoP proofs that do not include the nonce" (RFC 9449, 11.3).
    if !proof.nonce.as_deref().is_some_and(|nonce| service.oauth.nonces.is_good(nonce, now_ms)) {
        return Err(refused(Word::UseDpopNonce, "the proof has to say the number of the header DPoP-Nonce"));
    }
    if !proof.spend(plane, Of::Client).await? {
        plane.metrics.refused("proof-shown-again");
        return Err(wrong("the proof was shown before".to_owned()));
    }
    let key = proof.key.parse().map_err(|_| wrong("its key has no thumbprint".to_owned()))?;
    Ok(Bound { to: Confirmation::Key(key), not_after: i64::MAX })
}

/// The one service that is meant: by its SPIFFE ID as `resource` (RFC 8707), or by that or its name as `audience` (RFC 8693).
fn target(service: &Service, form: &Form) -> Result<(std::sync::Arc<Head>, ServiceName), Refused> {
    let own = service.authority()?.trust_domain().clone();
    let unknown = |given: &str| {
        let given: String = given.chars().take(100).collect();
        refused(Word::InvalidTarget, format!("`{given}` is no service of this mesh that this client may ask for"))
    };
    let by_id = |given: &str| {
        let id = SpiffeId::parse(given).ok().filter(|id| id.trust_domain() == own.as_str() && id.as_str() == given);
        id.and_then(|id| id.service()).ok_or_else(|| unknown(given))
    };
    let resource = form.get("resource").map(by_id).transpose()?;
    let named = |given: &str| ServiceName::parse(given).or_else(|_| by_id(given));
    let audience = form.get("audience").map(named).transpose()?;
    let meant = match (resource, audience) {
        (Some(one), Some(other)) if one != other => {
            return Err(refused(Word::InvalidTarget, "a token is for one service"));
        }
        (Some(one), _) | (None, Some(one)) => one,
        (None, None) => {
            let why = "say which service it is for: `resource=spiffe://…/NAME` or `audience=NAME`";
            return Err(refused(Word::InvalidTarget, why));
        }
    };
    Ok((service.plane.ledger.head(), meant))
}

/// What policies may permit `id` at `audience`, if it may ask for it at all.
fn within(service: &Service, head: &Head, id: &SpiffeId, audience: &ServiceName) -> Result<Scope, Refused> {
    let may = may_ask(head.follower.state(), id, audience);
    let reach = may.then(|| service.plane.granted.at(head, id, audience)).flatten();
    reach.ok_or_else(|| {
        let why = format!("`{audience}` is no service of this mesh that this client may ask for");
        refused(Word::InvalidTarget, why)
    })
}

/// The token that a token is exchanged for. Who received one may ask another service on its subject's behalf, and who holds one may
/// narrow it: for what both may, and no longer than it lives.
///
/// INVARIANT (exchange-only-narrows): what is given for a token is for nothing that its subject, or whoever acts, could not be given,
/// ends no later, says who acts, and is revoked with it.
fn exchanged(service: &Service, client: &Client, form: &Form) -> Result<Wanted, Refused> {
    let wrong = |why: &str| refused(Word::InvalidRequest, why);
    let token = form.demand("subject_token")?;
    if !matches!(form.demand("subject_token_type")?, ACCESS_TOKEN | JWT) {
        return Err(wrong("only access tokens of this issuer are exchanged"));
    }
    if form.get("requested_token_type").is_some_and(|wanted| !matches!(wanted, ACCESS_TOKEN | JWT)) {
        return Err(wrong("only access tokens are given"));
    }
    // Who acts is who asks: it proved that.
    if form.get("actor_token").is_some() || form.get("actor_token_type").is_some() {
        return Err(wrong("the actor is the client itself: send no `actor_token`"));
    }
    let claims =
        service.read(token).ok_or_else(|| wrong("the subject token is none of this issuer that is good now"))?;
    if claims.audience != client.id && claims.client_id != client.id {
        return Err(wrong("the subject token is neither for this client nor its own"));
    }
    let (head, audience) = target(service, form)?;
    let acts = within(service, &head, &client.id, &audience)?;
    let actor = acting(&client.id, &claims).ok_or_else(|| wrong("too many act for each other in the subject token"))?;
    let subjects = service.plane.granted.at(&head, &claims.subject, &audience).unwrap_or_default();
    let mut most = common(&acts, &subjects);
    if claims.audience.service().as_ref() == Some(&audience) {
        most = common(&most, &claims.scope);
    }
    let scope = narrowed(&most, form.get("scope")).map_err(|why| refused(Word::InvalidScope, why.to_string()))?;
    Ok(Wanted {
        subject: claims.subject,
        audience,
        scope,
        family: Some(claims.family),
        actor,
        not_after: claims.expires_at,
    })
}

async fn issue(
    service: &Service,
    client: &Client,
    bound: Bound,
    wanted: Wanted,
    grant: &'static str,
) -> Result<Value, Refused> {
    let (plane, authority) = (&service.plane, service.authority()?);
    let now_ms = plane.clock.now_ms();
    let issued_at = (now_ms / 1000).cast_signed();
    let lifetime = TOKEN_LIFETIME.as_secs().cast_signed();
    let id = new_id(now_ms);
    let claims = Claims {
        issuer: service.oauth.issuer.clone(),
        subject: wanted.subject,
        audience: authority.trust_domain().workload(&wanted.audience),
        client_id: client.id.clone(),
        issued_at,
        expires_at: (issued_at + lifetime).min(bound.not_after).min(wanted.not_after),
        id,
        scope: wanted.scope,
        confirmation: bound.to,
        instance: None,
        family: wanted.family.unwrap_or(id),
        actor: wanted.actor,
    };
    // Noted before it is handed out: there is no token that cannot be found and taken back.
    let stored = [StoredToken { claims: claims.clone(), host: None }];
    plane.storage.run("put_tokens", move |store| store.put_tokens(&stored, now_ms)).await?;
    plane.metrics.token_given(client.id.path().trim_start_matches("/countersign/").trim_start_matches('/'), grant);
    tracing::info!(
        token.id = %id, client = %client.id, subject = %claims.subject, audience = %claims.audience, scope = %claims.scope, grant,
        "an access token was issued"
    );
    Ok(json!({
        "access_token": authority.sign_token(&claims),
        "token_type": token_type(&claims.confirmation),
        "expires_in": claims.expires_at - issued_at,
        "scope": claims.scope,
    }))
}

/// How a token is shown (RFC 9449, 5; RFC 8705, 3).
pub(super) fn token_type(confirmation: &Confirmation) -> &'static str {
    match confirmation {
        Confirmation::Key(_) => "DPoP",
        Confirmation::Certificate(_) => "Bearer",
    }
}
