//! The token service: an OAuth 2 authorization server for clients that no agent of this mesh looks after. JSON over TLS 1.3, on a
//! listener of its own; a client may show an SVID in the handshake.
//!
//! | room | does |
//! |---|---|
//! | [`client`] | who asks: mutual TLS, a JWT-SVID, or an assertion that its own key signed |
//! | [`form`] | takes a request apart, and refuses what says something twice |
//! | [`grant`] | which token whoever asks is given |
//! | [`look`] | introspection and revocation |
//! | [`nonce`] | the numbers that proofs have to say |
//! | [`place`] | the address, and the URL that is the issuer |
//! | [`serve`] | connections, and the certificate that they are shown |
//!
//! What it issues names that URL as its issuer, so no sidecar takes it for a token of the mesh hop, whose issuer is the trust domain.
//!
//! INVARIANT (bound-or-nothing): every token that it issues is bound to a key whose holder has just proven to have it.

use std::{num::NonZeroU32, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::{Extension, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use countersign_core::{identity::SpiffeId, oauth::is_client, token::Claims};

use crate::{Plane, authority::Authority, store::StoreError};

pub mod client;
pub mod form;
pub mod grant;
pub mod look;
pub mod nonce;
pub mod place;
pub mod serve;

pub use place::{OauthConfig, OauthError};

use form::Form;
use nonce::Nonces;
use serve::Connected;

/// Where tokens are asked for.
const TOKEN_PATH: &str = "/token";
const INTROSPECTION_PATH: &str = "/introspect";
const REVOCATION_PATH: &str = "/revoke";
const JWKS_PATH: &str = "/jwks";
/// "/.well-known/oauth-authorization-server" (RFC 8414, 3).
const METADATA_PATH: &str = "/.well-known/oauth-authorization-server";

/// Tokens of one client at once; later ones come back at [`TOKENS_PER_SECOND`].
const TOKENS_AT_ONCE: u32 = 500;
const TOKENS_PER_SECOND: u32 = 50;

/// The number that the next proof has to say.
pub const NONCE_HEADER: HeaderName = HeaderName::from_static("dpop-nonce");

/// The token service as it runs.
pub struct Oauth {
    /// The URL that it issues as, to the letter.
    pub issuer: String,
    nonces: Nonces,
    asked: DefaultKeyedRateLimiter<SpiffeId>,
}

/// Why a request is refused: a word of RFC 6749, 5.2 or of one that extends it, and what was wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    word: Word,
    why: String,
}

/// The words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The request is none.
    InvalidRequest,
    /// It is too long (RFC 9110, 15.5.14).
    TooLong,
    /// Nobody, or not who they say.
    InvalidClient,
    /// No grant of that name.
    UnsupportedGrantType,
    /// What is asked for is given by nothing.
    InvalidScope,
    /// There is no such service for whoever asks (RFC 8707, 2).
    InvalidTarget,
    /// The proof proves nothing (RFC 9449, 5).
    InvalidDpopProof,
    /// The proof has to say the number that comes with this answer (RFC 9449, 8).
    UseDpopNonce,
    /// Too much was asked for.
    SlowDown,
    /// The control plane cannot answer now.
    Unavailable,
}

impl Oauth {
    /// One that issues as `issuer`, and knows proofs by these numbers.
    pub fn new(issuer: String, nonces: Nonces) -> Self {
        let number = |n| NonZeroU32::new(n).expect("INVARIANT: it is a constant that is not 0");
        let quota = Quota::per_second(number(TOKENS_PER_SECOND)).allow_burst(number(TOKENS_AT_ONCE));
        Self { issuer, nonces, asked: RateLimiter::keyed(quota) }
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.issuer)
    }

    /// Counts one more token of a client; too many are refused.
    fn count(&self, client: &SpiffeId) -> Result<(), Refused> {
        // As many as there are clients, and those are declared.
        self.asked
            .check_key(client)
            .map_err(|_| refused(Word::SlowDown, "this client asked for too many tokens at once"))
    }
}

fn refused(word: Word, why: impl Into<String>) -> Refused {
    Refused { word, why: why.into() }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the token service could not use the store");
        refused(Word::Unavailable, "the control plane cannot answer now")
    }
}

impl Word {
    fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest | Self::TooLong => "invalid_request",
            Self::InvalidClient => "invalid_client",
            Self::UnsupportedGrantType => "unsupported_grant_type",
            Self::InvalidScope => "invalid_scope",
            Self::InvalidTarget => "invalid_target",
            Self::InvalidDpopProof => "invalid_dpop_proof",
            Self::UseDpopNonce => "use_dpop_nonce",
            Self::SlowDown | Self::Unavailable => "temporarily_unavailable",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::InvalidClient => StatusCode::UNAUTHORIZED,
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowDown => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        // "Values for the "error_description" parameter MUST NOT include characters outside the set" (RFC 6749, 5.2).
        let tame = |c: char| if matches!(c, '\x20'..='\x21' | '\x23'..='\x5b' | '\x5d'..='\x7e') { c } else { '\'' };
        let why: String = self.why.chars().take(400).map(tame).collect();
        let body = Json(json!({ "error": self.word.as_str(), "error_description": why }));
        let mut response = (self.word.status(), body).into_response();
        if self.word == Word::SlowDown {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Which requests there are.
pub fn router(plane: Arc<Plane>, oauth: Arc<Oauth>) -> Router {
    let service = Service { plane, oauth };
    Router::new()
        .route(METADATA_PATH, get(metadata))
        .route(JWKS_PATH, get(jwks))
        .route(TOKEN_PATH, post(token))
        .route(INTROSPECTION_PATH, post(introspect))
        .route(REVOCATION_PATH, post(revoke))
        .fallback(async || (StatusCode::NOT_FOUND, Json(json!({ "error": "not_found" }))))
        .layer(middleware::map_response(never_kept))
        .layer(middleware::from_fn_with_state(service.clone(), counted))
        .with_state(service)
}

/// What the requests share.
#[derive(Clone)]
pub struct Service {
    plane: Arc<Plane>,
    oauth: Arc<Oauth>,
}

impl Service {
    /// There is one before the listener serves.
    fn authority(&self) -> Result<Arc<Authority>, Refused> {
        self.plane.authority().ok_or_else(|| refused(Word::Unavailable, "the mesh has no authority yet"))
    }

    /// What a token of this service says, if it is one, in its time and not revoked.
    fn read(&self, token: &str) -> Option<Claims> {
        let keys = self.authority().ok()?.bundle().token_authorities().ready().keys;
        let now_seconds = i64::try_from(self.plane.clock.now_ms() / 1000).unwrap_or(i64::MAX);
        let claims = countersign_core::oauth::verify(token, &self.oauth.issuer, &keys, now_seconds)?;
        let head = self.plane.ledger.head();
        // Whoever is no client any more holds no token, nor does anybody act for it.
        let are_clients = [&claims.client_id, &claims.subject].iter().all(|id| is_client(head.follower.state(), id));
        (are_clients && !self.plane.publisher.signals().is_token_revoked(&claims)).then_some(claims)
    }
}

/// "the response … MUST include the HTTP Cache-Control response header field with a value of no-store" (RFC 6749, 5.1).
async fn never_kept(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Strangers who try too much are slowed down.
async fn counted(
    State(service): State<Service>,
    Extension(connected): Extension<Connected>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    if response.status() == StatusCode::UNAUTHORIZED && !service.plane.attempts.count(connected.from) {
        service.plane.metrics.refused("too-many-attempts");
        return refused(Word::SlowDown, "too much was tried from this address").into_response();
    }
    response
}

async fn metadata(State(Service { oauth, .. }): State<Service>) -> Response {
    let methods = ["tls_client_auth", "private_key_jwt"];
    let algorithms = ["ES256", "EdDSA", "PS256", "RS256"];
    public(json!({
        "issuer": oauth.issuer,
        "token_endpoint": oauth.at(TOKEN_PATH),
        "introspection_endpoint": oauth.at(INTROSPECTION_PATH),
        "revocation_endpoint": oauth.at(REVOCATION_PATH),
        "jwks_uri": oauth.at(JWKS_PATH),
        "response_types_supported": [],
        "grant_types_supported": ["client_credentials", grant::EXCHANGE],
        "token_endpoint_auth_methods_supported": methods,
        "token_endpoint_auth_signing_alg_values_supported": algorithms,
        "introspection_endpoint_auth_methods_supported": methods,
        "introspection_endpoint_auth_signing_alg_values_supported": algorithms,
        "revocation_endpoint_auth_methods_supported": methods,
        "revocation_endpoint_auth_signing_alg_values_supported": algorithms,
        "dpop_signing_alg_values_supported": ["ES256"],
        "tls_client_certificate_bound_access_tokens": true,
    }))
}

async fn jwks(State(service): State<Service>) -> Result<Response, Refused> {
    Ok(public(service.authority()?.bundle().token_authorities().jwks()))
}

/// What may be kept for a while: the next key is published long before it signs.
fn public(document: Value) -> Response {
    ([(header::CACHE_CONTROL, "public, max-age=300")], Json(document)).into_response()
}

async fn token(
    State(service): State<Service>,
    Extension(connected): Extension<Connected>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let given = async {
        let form = Form::read(&parts.headers, body).await?;
        grant::token(&service, &connected, &parts.headers, &form).await
    };
    let answer = match given.await {
        Ok(given) => Json(given).into_response(),
        Err(why) => {
            service.plane.metrics.token_refused(why.word.as_str());
            tracing::info!(error = why.word.as_str(), why = why.why, from = %connected.from, "no access token was issued");
            why.into_response()
        }
    };
    with_nonce(&service, answer)
}

/// "at most one DPoP-Nonce" and always the newest (RFC 9449, 8.2).
fn with_nonce(service: &Service, mut response: Response) -> Response {
    let nonce = service.oauth.nonces.now(service.plane.clock.now_ms());
    let nonce = HeaderValue::from_str(&nonce).expect("INVARIANT: base64url is what headers hold");
    response.headers_mut().insert(NONCE_HEADER, nonce);
    response
}

async fn introspect(
    State(service): State<Service>,
    Extension(connected): Extension<Connected>,
    request: Request<Body>,
) -> Result<Json<Value>, Refused> {
    let (parts, body) = request.into_parts();
    let form = Form::read(&parts.headers, body).await?;
    let client = client::authenticate(&service, &connected, &parts.headers, &form).await?;
    look::introspect(&service, &client, &form).map(Json)
}

async fn revoke(
    State(service): State<Service>,
    Extension(connected): Extension<Connected>,
    request: Request<Body>,
) -> Result<StatusCode, Refused> {
    let (parts, body) = request.into_parts();
    let form = Form::read(&parts.headers, body).await?;
    let client = client::authenticate(&service, &connected, &parts.headers, &form).await?;
    look::revoke(&service, &client, &form).await?;
    Ok(StatusCode::OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_refusal_has_only_the_signs_that_the_standard_allows() {
        let response = refused(Word::InvalidRequest, "a \"b\" \\ é\n").into_response();
        assert_eq!(response.status(), 400);
        let read = futures_util::FutureExt::now_or_never(axum::body::to_bytes(response.into_body(), 1000));
        let body: Value = serde_json::from_slice(&read.unwrap().unwrap()).unwrap();
        assert_eq!(body["error_description"], "a 'b' ' ''");
    }

    #[test]
    fn a_client_that_asks_for_too_much_is_slowed_down_and_no_other() {
        let oauth = Oauth::new("https://mesh.example".to_owned(), Nonces::of(&[1; 32]));
        let id = |name: &str| SpiffeId::parse(&format!("spiffe://shop.example/{name}")).unwrap();
        for _ in 0..TOKENS_AT_ONCE {
            oauth.count(&id("web")).unwrap();
        }
        assert_eq!(oauth.count(&id("web")).unwrap_err().word, Word::SlowDown);
        assert!(oauth.count(&id("cron")).is_ok());
    }
}
