//! What the pages show. Each is a template below `templates/`, filled from what the other rooms say; escaping is askama's.

use std::sync::Arc;

use askama::Template;
use axum::{
    Router,
    extract::{Path, Query, State},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use http::StatusCode;
use serde::Deserialize;

use countersign_api::local::{Problem, Proposal, ProposalDetail, ProposalState};

use super::session::{Session, Visitor};
use crate::{
    Plane,
    local_api::{Refusal, problem},
    proposals,
};

/// Every page.
pub fn router() -> Router<Arc<Plane>> {
    Router::new()
        .route("/", get(home))
        .route("/sign-in", get(sign_in))
        .route("/enroll", get(enroll))
        .route("/changes/{id}", get(change))
}

/// What every page shows around itself.
struct Frame {
    /// The trust domain.
    mesh: String,
    protected: bool,
    /// What is not as it should be.
    warnings: Vec<String>,
    /// Who is signed in.
    operator: Option<String>,
    /// What the scripts of this page send back.
    csrf: String,
}

impl Frame {
    fn of(plane: &Plane, session: Option<&Session>) -> Self {
        let head = plane.ledger.head();
        let state = head.follower.state();
        Self {
            mesh: state.trust_domain.as_ref().map_or_else(|| "no mesh yet".to_owned(), ToString::to_string),
            protected: state.is_protected(),
            warnings: plane.warnings(),
            operator: session.map(|session| session.operator.to_string()),
            csrf: session.map(|session| session.csrf.clone()).unwrap_or_default(),
        }
    }
}

/// Fills a template.
fn page(template: &impl Template) -> Response {
    match template.render() {
        Ok(text) => Html(text).into_response(),
        Err(error) => {
            tracing::error!(%error, "a page could not be made");
            Refusal::from(problem(500, "the page could not be made", None, None)).into_response()
        }
    }
}

/// What went wrong, as a page.
fn problem_page(plane: &Plane, session: Option<&Session>, problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let frame = Frame::of(plane, session);
    (status, page(&ProblemPage { frame, problem })).into_response()
}

#[derive(Template)]
#[template(path = "problem.html")]
struct ProblemPage<'a> {
    frame: Frame,
    problem: &'a Problem,
}

/// There is no such page.
pub async fn not_found(State(plane): State<Arc<Plane>>, Visitor(session): Visitor) -> Response {
    problem_page(
        &plane,
        session.as_ref(),
        &problem(404, "there is no such page", None, Some("go back to the overview")),
    )
}

#[derive(Template)]
#[template(path = "home.html")]
struct Home {
    frame: Frame,
    pending: Vec<Proposal>,
}

async fn home(State(plane): State<Arc<Plane>>, session: Session) -> Response {
    match proposals::list(&plane).await {
        Ok(mut pending) => {
            pending.retain(|proposal| is_open(&proposal.state));
            page(&Home { frame: Frame::of(&plane, Some(&session)), pending })
        }
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}

fn is_open(state: &ProposalState) -> bool {
    matches!(state, ProposalState::StepUp | ProposalState::NeedsCountersign)
}

/// Where to go after signing in.
#[derive(Deserialize)]
struct Next {
    next: Option<String>,
}

#[derive(Template)]
#[template(path = "sign_in.html")]
struct SignInPage {
    frame: Frame,
    next: String,
}

async fn sign_in(State(plane): State<Arc<Plane>>, Query(Next { next }): Query<Next>) -> Response {
    // A path of this site, never the address of another.
    let own = |next: &String| next.starts_with('/') && !next.starts_with("//") && !next.contains('\\');
    let next = next.filter(own).unwrap_or_else(|| "/".to_owned());
    page(&SignInPage { frame: Frame::of(&plane, None), next })
}

#[derive(Template)]
#[template(path = "enroll.html")]
struct EnrollPage {
    frame: Frame,
}

async fn enroll(State(plane): State<Arc<Plane>>, Visitor(session): Visitor) -> Response {
    page(&EnrollPage { frame: Frame::of(&plane, session.as_ref()) })
}

#[derive(Template)]
#[template(path = "change.html")]
struct ChangePage {
    frame: Frame,
    proposal: Proposal,
    /// The exact bytes that are hashed, indented for people.
    change_set: String,
    open: bool,
    /// Whether who is signed in asked for it.
    own: bool,
    key: bool,
}

async fn change(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Response {
    match proposals::show(&plane, &id).await {
        Ok(ProposalDetail { proposal, change_set, .. }) => {
            let head = plane.ledger.head();
            let operators = &head.follower.state().operators;
            page(&ChangePage {
                frame: Frame::of(&plane, Some(&session)),
                change_set: serde_json::to_string_pretty(&change_set).unwrap_or_default(),
                open: is_open(&proposal.state),
                own: proposal.author == session.operator,
                key: operators.get(&session.operator).is_some_and(|operator| operator.can_sign()),
                proposal,
            })
        }
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}
