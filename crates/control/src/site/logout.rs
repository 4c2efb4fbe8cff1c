//! What a provider says when somebody is over there: signed out, locked, out of the group, gone (OpenID Connect Back-Channel Logout 1.0).
//! Every session here that rests on its word for them ends, whichever control plane it began at.
//!
//! `POST /sign-in/with/{name}/logout` takes a form with a `logout_token`; 200 says that nothing of it is left, 400 why the token is none.
//! Whoever comes with tokens that are none is slowed down; a provider that ends a thousand sessions is not.
//!
//! INVARIANT (over-there-over-here): no session outlives the word that ended it at its provider, nor begins on what was said before.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use countersign_api::device::OAuthError;
use countersign_core::{canonical::Digest, jws::Typ, pipeline::Issuer, sign_in::is_subject};

use super::{
    device::form,
    provider::{NAMES_BYTES_MAX, QUESTION_LIFETIME_MS},
    serve::From,
    session::{self, Who},
};
use crate::{
    Plane,
    audit::By,
    local_api::{Refusal, problem, store_problem},
    oidc::{self, TokenRefused, VerifiedToken},
    store::{Document, StoreError},
};

/// "The member name http://schemas.openid.net/event/backchannel-logout" (2.4).
const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";
/// Longest form, in bytes: the longest token there is, with room for its name.
const FORM_BYTES_MAX: usize = 20 * 1024;
/// The kind of the documents that say which tokens were taken.
const TOKEN_KIND: &str = "logout-token";
const TOKENS_MAX: u32 = 100_000;
/// The kind of the documents that say who was over when.
const OVER_KIND: &str = "logout";
const OVER_MAX: u32 = 100_000;

/// Why a logout token ends nothing.
#[derive(Debug, thiserror::Error)]
enum NoLogout {
    #[error("this mesh has no such sign-in")]
    Unknown,
    #[error(transparent)]
    Token(#[from] TokenRefused),
    #[error("{0}")]
    Content(&'static str),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Whom a provider says to be over: one session, or all of one person.
struct Over {
    issuer: String,
    client_id: String,
    subject: Option<String>,
    sid: Option<String>,
}

impl Over {
    /// Whether what a session rests on is over.
    fn is(&self, who: &Who) -> bool {
        let Who::Person { person, sid, .. } = who else { return false };
        if (&self.issuer, &self.client_id) != (&person.issuer, &person.client_id) {
            return false;
        }
        let is_theirs = self.subject.as_ref().is_none_or(|subject| *subject == person.subject);
        match (&self.sid, sid) {
            (Some(over), Some(own)) => is_theirs && over == own,
            // The provider did not say which of its sessions it is: it may be this one.
            (Some(_), None) => self.subject.is_some() && is_theirs,
            (None, _) => is_theirs,
        }
    }

    /// What it is kept under, to be found by whoever was in it.
    fn key(&self) -> String {
        key_of(
            &self.issuer,
            &self.client_id,
            self.sid.as_deref().map_or(("sub", self.subject.as_deref()), |sid| ("sid", Some(sid))),
        )
    }
}

fn key_of(issuer: &str, client_id: &str, (kind, name): (&str, Option<&str>)) -> String {
    Digest::of(format!("{issuer}\n{client_id}\n{kind}\n{}", name.unwrap_or_default()).as_bytes()).to_string()
}

#[derive(Deserialize)]
struct Logout {
    logout_token: String,
}

/// Takes a provider's word that somebody is over.
pub async fn logout(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let Logout { logout_token } = match form(&headers, &body, FORM_BYTES_MAX) {
        Ok(form) => form,
        Err(refused) => return refused.into_response(),
    };
    let why = match ended(&plane, &name, &logout_token).await {
        Ok(()) => return StatusCode::OK.into_response(),
        Err(NoLogout::Store(error)) => return Refusal::from(store_problem(&error)).into_response(),
        Err(why) => why,
    };
    let sign_in: String = name.chars().take(64).collect();
    tracing::info!(%sign_in, %address, %why, "a provider's logout was refused");
    if !plane.attempts.count(address) {
        plane.metrics.refused("too-many-attempts");
        let refused = problem(429, "too much was tried from this address", None, Some("wait a minute"));
        return Refusal::from(refused).into_response();
    }
    let status = match why {
        NoLogout::Token(TokenRefused::Keys(_)) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    };
    let said = OAuthError { error: "invalid_request".to_owned(), error_description: Some(why.to_string()) };
    (status, Json(said)).into_response()
}

async fn ended(plane: &Plane, name: &str, token: &str) -> Result<(), NoLogout> {
    let head = plane.ledger.head();
    let state = head.follower.state();
    let sign_in = state.sign_ins.get(name).ok_or(NoLogout::Unknown)?;
    let url = &state.issuers.get(&sign_in.issuer).ok_or(NoLogout::Unknown)?.url;
    let meant = Issuer { url: url.clone(), audience: sign_in.client_id.clone() };
    let now_ms = plane.clock.now_ms();
    let token = oidc::verify_as(Typ::Logout, &plane.providers, [&meant], token, now_ms).await?;
    let (over, taken) = (said(&token, meant)?, taken(&token)?);
    let key = taken.key.clone();
    let was_taken = plane.storage.run("logout_token", move |store| store.document(TOKEN_KIND, &key, now_ms)).await?;
    if was_taken.is_some() {
        return Err(NoLogout::Content("its `jti` was taken before"));
    }
    // First what nobody begins on any more, then what has begun: a session that begins meanwhile is found by one of the two.
    let at_seconds = token.issued_at_seconds().unwrap_or_default();
    let document = Document {
        kind: OVER_KIND,
        key: over.key(),
        bytes: at_seconds.to_string().into_bytes(),
        expires_at_ms: now_ms + QUESTION_LIFETIME_MS,
    };
    plane
        .storage
        .run("put_logout", move |store| {
            store.forget_documents(OVER_KIND, std::slice::from_ref(&document.key))?;
            store.put_document(&document, now_ms, OVER_MAX)
        })
        .await?;
    let mut sessions = session::list(plane).await?;
    sessions.retain(|session| over.is(&session.who));
    let ended = sessions.len();
    session::end(plane, &sessions, By::Provider(over.issuer.clone())).await?;
    plane.storage.run("put_logout_token", move |store| store.put_document(&taken, now_ms, TOKENS_MAX)).await?;
    let subject = over.subject.as_deref().unwrap_or("whose session it was");
    tracing::info!(sign_in = name, subject, ended, "a provider ended sessions");
    Ok(())
}

/// Whom a verified logout token is about (2.4 and 2.6).
fn said(token: &VerifiedToken, meant: Issuer) -> Result<Over, NoLogout> {
    let event = token.value("events").and_then(Value::as_object).and_then(|events| events.get(EVENT));
    if event.and_then(Value::as_object).is_none() {
        return Err(NoLogout::Content("its `events` say nothing of a logout"));
    }
    // "a Logout Token MUST NOT contain a nonce Claim", so that it is not taken for an ID Token, nor one of those for it.
    if token.value("nonce").is_some() {
        return Err(NoLogout::Content("it has a `nonce`, as a token that signs somebody in"));
    }
    let subject = match token.value("sub") {
        None => None,
        Some(Value::String(subject)) if is_subject(subject) => Some(subject.clone()),
        Some(_) => return Err(NoLogout::Content("its `sub` is no name")),
    };
    let sid = match token.value("sid") {
        None => None,
        Some(Value::String(sid)) if (1..=NAMES_BYTES_MAX).contains(&sid.len()) => Some(sid.clone()),
        Some(_) => return Err(NoLogout::Content("its `sid` is no name")),
    };
    if subject.is_none() && sid.is_none() {
        return Err(NoLogout::Content("it names nobody: neither `sub` nor `sid`"));
    }
    Ok(Over { issuer: meant.url, client_id: meant.audience, subject, sid })
}

/// What says that a token was taken, for as long as it would be good.
fn taken(token: &VerifiedToken) -> Result<Document, NoLogout> {
    let jti = token.claim("jti").filter(|jti| (1..=NAMES_BYTES_MAX).contains(&jti.len()));
    let jti = jti.ok_or(NoLogout::Content("it has no `jti`"))?;
    let key = Digest::of(format!("{}\n{jti}", token.issuer()).as_bytes()).to_string();
    let expires_at_ms = u64::try_from(token.void_at_seconds()).unwrap_or(0).saturating_mul(1000);
    Ok(Document { kind: TOKEN_KIND, key, bytes: Vec::new(), expires_at_ms })
}

/// Whether what a provider said of somebody was over already when they began to use it.
pub async fn is_over(plane: &Plane, who: &Who) -> Result<bool, StoreError> {
    let Who::Person { person, sid, vouched_at_seconds, .. } = who else { return Ok(false) };
    let key = |name| key_of(&person.issuer, &person.client_id, name);
    let keys = [Some(key(("sub", Some(&*person.subject)))), sid.as_deref().map(|sid| key(("sid", Some(sid))))];
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("logout", move |store| {
        keys.into_iter().flatten().map(|key| store.document(OVER_KIND, &key, now_ms)).collect::<Result<Vec<_>, _>>()
    });
    let at = |bytes: &Vec<u8>| std::str::from_utf8(bytes).ok()?.parse::<i64>().ok();
    Ok(found.await?.iter().flatten().filter_map(at).any(|over_seconds| *vouched_at_seconds <= over_seconds))
}
