//! Opening what a page or a command is asked a factor for: in place of a page that reads sensitive records, and on a page of its own
//! for what a command asked in the name of whoever is signed in. What was shown opens that and approves no change.

use std::sync::Arc;

use askama::Template;
use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde_json::json;

use countersign_api::local::{KeyChallenge, Shown, SignedChallenge};
use countersign_core::gate::{Answer, act::Act};

use super::{
    ceremony::WithCode,
    pages::{Frame, page, problem_page},
    session::Session,
    sign_in::no_site,
};
use crate::{
    Plane,
    acts::{self, Asked, By},
    local_api::Refusal,
};

type Answered<T> = Result<Json<T>, Refusal>;

#[derive(Template)]
#[template(path = "open.html")]
struct OpenPage {
    frame: Frame,
    /// What is opened: an act of this session, or what a command asked for.
    id: String,
    /// What it is, in words.
    act: String,
    reads: bool,
    /// The command that asks, where it is one.
    command: Option<&'static str>,
    /// What is missing; nothing once it is open.
    requires: Option<String>,
    key: bool,
    code: bool,
}

/// Lets a page of `session` be shown, or returns what is shown in its place: why not, or where a factor is shown for it.
pub async fn passes(plane: &Plane, session: &Session, act: Act, here: &'static str) -> Result<(), Response> {
    match acts::pass(plane, act, By::Session(session), &Shown::default()).await {
        Ok(_) => Ok(()),
        Err(refused) if refused.refusal.as_ref().is_some_and(|refusal| refusal.requires.is_some()) => {
            let asked = match acts::asked(plane, act.as_str(), session).await {
                Ok(asked) => asked,
                Err(refused) => return Err(problem_page(plane, Some(session), &refused)),
            };
            Err(open_page(plane, session, act.as_str().to_owned(), &asked, here).await)
        }
        Err(refused) => Err(problem_page(plane, Some(session), &refused)),
    }
}

/// What a command asked for.
pub async fn open(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Response {
    match acts::asked(&plane, &id, &session).await {
        Ok(asked) => open_page(&plane, &session, id, &asked, "").await,
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}

async fn open_page(plane: &Plane, session: &Session, id: String, asked: &Asked, here: &'static str) -> Response {
    let answer = match acts::needed(plane, asked, session).await {
        Ok(answer) => answer,
        Err(problem) => return problem_page(plane, Some(session), &problem),
    };
    let requires = match &answer {
        Answer::StepUp(requires) => Some(*requires),
        Answer::Permit => None,
        _ => {
            let denied = acts::refusal(plane, asked, By::Session(session), &answer, None).await;
            return problem_page(plane, Some(session), &denied);
        }
    };
    let head = plane.ledger.head();
    let operator = head.follower.state().operators.get(&asked.operator);
    let opened = OpenPage {
        frame: Frame::of(plane, Some(session), here),
        id,
        act: asked.act.to_string(),
        reads: asked.act.only_reads(),
        command: match &asked.session {
            None => Some("A command on the control plane's machine"),
            Some(other) if *other != session.id => Some("A command that you signed in on another machine"),
            Some(_) => None,
        },
        requires: requires.map(|requires| requires.to_string()),
        key: operator.is_some_and(|operator| operator.can_sign()),
        code: requires.is_some_and(|requires| requires.accepts_code()),
    };
    let status = if requires.is_some() { StatusCode::FORBIDDEN } else { StatusCode::OK };
    (status, page(&opened)).into_response()
}

/// Hands out what a key is to sign.
pub async fn challenge(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
) -> Answered<KeyChallenge> {
    let site = plane.site.as_ref().ok_or_else(no_site)?;
    let asked = acts::asked(&plane, &id, &session).await?;
    Ok(Json(acts::challenge(&plane, site, &asked).await?))
}

/// Takes what it signed.
pub async fn sign(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
    Json(signed): Json<SignedChallenge>,
) -> Answered<serde_json::Value> {
    let asked = acts::asked(&plane, &id, &session).await?;
    acts::open_with_key(&plane, &asked, &session, &signed).await?;
    Ok(Json(json!({ "opened": true })))
}

/// Takes a code, where the gate takes one.
pub async fn code(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
    Json(WithCode { code }): Json<WithCode>,
) -> Answered<serde_json::Value> {
    let asked = acts::asked(&plane, &id, &session).await?;
    let shown = Shown { otp: Some(code), ..Shown::default() };
    acts::open_with_code(&plane, &asked, &session, &shown).await?;
    Ok(Json(json!({ "opened": true })))
}
