//! Signing in: with a passkey or a security key, or with a code for an operator who has no key. It opens a session, which lets
//! one look and ask; what the gate asks for is shown for each change.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, header};
use serde::Deserialize;
use serde_json::json;

use countersign_api::local::{Code, KeyChallenge, Problem, Shown, SignedChallenge};
use countersign_core::{assurance::FactorKind, identity::OperatorName};

use super::{
    guard::text,
    serve::From,
    session::{self, Beginning, Session, Who},
};
use crate::{
    Plane,
    audit::{self, Event},
    local_api::{Refusal, problem, store_problem},
    mfa::{
        self, CodeRefused,
        key::{self, SignedIn},
    },
};

type Answered<T> = Result<Json<T>, Refusal>;

/// Who wants to sign in.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Absent where a passkey says by itself whose it is.
    #[serde(default)]
    operator: Option<String>,
}

/// Hands out what a key is to sign.
pub async fn begin_key(State(plane): State<Arc<Plane>>, Json(named): Json<Named>) -> Answered<KeyChallenge> {
    let operator = match named.operator.as_deref().map(str::trim).filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => Some(OperatorName::parse(name).map_err(|error| problem(400, error.to_string(), None, None))?),
    };
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    Ok(Json(key::sign_in_challenge(&plane, site, operator).await?))
}

/// Takes what it signed, and opens a session.
pub async fn finish_key(
    State(plane): State<Arc<Plane>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
    Json(answer): Json<SignedChallenge>,
) -> Result<Response, Refusal> {
    let signed_in = key::sign_in(&plane, &answer).await.map_err(|refused| unopened(&plane, None, from, refused))?;
    opened(&plane, signed_in, from, &headers).await
}

/// A code, and whose it is said to be.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WithCode {
    operator: String,
    code: Code,
}

/// Takes a code of an authenticator app. Who has a key uses it: a code can be read over a shoulder.
pub async fn code(
    State(plane): State<Arc<Plane>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
    Json(WithCode { operator, code }): Json<WithCode>,
) -> Result<Response, Refusal> {
    let wrong = || Refusal::from(CodeRefused::Wrong.problem());
    let operator = OperatorName::parse(operator.trim()).map_err(|_| wrong())?;
    let shown = Shown { otp: Some(code), ..Shown::default() };
    let refused = |why: Problem| unopened(&plane, Some(&operator), from, why);
    mfa::prove(&plane, &operator, &shown).await.map_err(|why| refused(why.problem()))?;
    let head = plane.ledger.head();
    let factors = head.follower.state().operators.get(&operator).map(|operator| &operator.factors).ok_or_else(wrong)?;
    if factors.values().any(|factor| factor.signing_key().is_some()) {
        let help = "sign in with your passkey or security key";
        return Err(refused(problem(403, "an operator who has a key signs in with it", None, Some(help))).into());
    }
    let factor = factors.iter().find(|(_, factor)| factor.kind() == FactorKind::Totp).map(|(id, _)| id.clone());
    let signed_in = SignedIn { operator, factor: factor.ok_or_else(wrong)?, kind: FactorKind::Totp };
    opened(&plane, signed_in, from, &headers).await
}

/// Writes down that no session was opened.
fn unopened(plane: &Plane, operator: Option<&OperatorName>, From(address): From, refused: Problem) -> Problem {
    let (who, why) = (operator.map(ToString::to_string), audit::cut(&*refused.title));
    plane.tell(Event::SignInRefused { who, address, why });
    refused
}

async fn opened(
    plane: &Plane,
    SignedIn { operator, factor, kind }: SignedIn,
    From(address): From,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let agent = text(headers, header::USER_AGENT).unwrap_or("unknown").to_owned();
    let token =
        session::begin(plane, Beginning { who: Who::Operator { operator, factor, kind }, address, agent, key: None })
            .await?;
    let cookie = session::set_cookie(plane, Some(&token));
    Ok(([(header::SET_COOKIE, cookie)], Json(json!({ "signed_in": true }))).into_response())
}

/// Ends the session.
pub async fn sign_out(State(plane): State<Arc<Plane>>, session: Session) -> Result<Response, Refusal> {
    let by = audit::By::SignedIn(session.author().to_string());
    session::end(&plane, &[session], by).await.map_err(|error| store_problem(&error))?;
    let cookie = session::set_cookie(&plane, None);
    Ok(([(header::SET_COOKIE, cookie)], Json(json!({ "signed_in": false }))).into_response())
}

/// What is said where there is no site to hold a ceremony at.
pub fn no_site() -> Problem {
    problem(404, "this control plane serves no pages", None, Some("start it with --dashboard IP:PORT"))
}
