//! The pages, and what they have in common. Each is a template below `templates/`, filled from what the other rooms say; escaping is askama's.

use std::sync::Arc;

use askama::Template;
use axum::{
    Router,
    extract::{Query, State},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use http::StatusCode;
use serde::Deserialize;

use countersign_api::local::Problem;
use countersign_core::sign_in::{SignIn, SignInName};

use super::{
    acts, changes, decisions, entries, live, overview, people,
    session::{Session, Visitor},
    tokens,
};
use crate::{
    Plane,
    local_api::{Refusal, problem},
};

/// Every page.
pub fn router() -> Router<Arc<Plane>> {
    Router::new()
        .route("/", get(overview::overview))
        .route("/changes", get(changes::changes))
        .route("/ledger", get(entries::ledger))
        .route("/ledger/{revision}", get(entries::entry))
        .route("/ledger/{revision}/proof", get(entries::proof))
        .route("/decisions", get(decisions::decisions))
        .route("/decisions/{id}", get(decisions::decision))
        .route("/tokens", get(tokens::tokens))
        .route("/acts/{id}", get(acts::open))
        .route("/operators", get(people::operators))
        .route("/account", get(people::account))
        .route("/events", get(live::events))
        .route("/sign-in", get(sign_in))
        .route("/enroll", get(enroll))
        .route("/changes/{id}", get(changes::change))
}

/// What every page shows around itself.
pub struct Frame {
    /// The trust domain.
    pub(super) mesh: String,
    pub(super) protected: bool,
    /// What is not as it should be.
    pub(super) warnings: Vec<String>,
    /// Who is signed in.
    pub(super) who: Option<String>,
    /// What the scripts of this page send back.
    pub(super) csrf: String,
    /// The page of the navigation that it belongs to.
    pub(super) here: &'static str,
}

/// Path and name of each page of the navigation.
const PAGES: [(&str, &str); 7] = [
    ("/", "Overview"),
    ("/changes", "Changes"),
    ("/decisions", "Decisions"),
    ("/tokens", "Tokens"),
    ("/ledger", "Ledger"),
    ("/operators", "Operators"),
    ("/account", "Account"),
];

impl Frame {
    /// Around the page `here`.
    pub fn of(plane: &Plane, session: Option<&Session>, here: &'static str) -> Self {
        let head = plane.ledger.head();
        let state = head.follower.state();
        Self {
            mesh: state.trust_domain.as_ref().map_or_else(|| "no mesh yet".to_owned(), ToString::to_string),
            protected: state.is_protected(),
            warnings: plane.warnings(),
            who: session.map(|session| session.author().to_string()),
            csrf: session.map(|session| session.csrf.clone()).unwrap_or_default(),
            here,
        }
    }

    /// The navigation.
    pub(super) fn pages(&self) -> &'static [(&'static str, &'static str)] {
        &PAGES
    }
}

/// Fills a template.
pub fn page(template: &impl Template) -> Response {
    match template.render() {
        Ok(text) => Html(text).into_response(),
        Err(error) => {
            tracing::error!(%error, "a page could not be made");
            Refusal::from(problem(500, "the page could not be made", None, None)).into_response()
        }
    }
}

/// What went wrong, as a page.
pub fn problem_page(plane: &Plane, session: Option<&Session>, problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let frame = Frame::of(plane, session, "");
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

/// Where to go after signing in.
#[derive(Deserialize)]
pub struct Next {
    next: Option<String>,
}

impl Next {
    /// A path of this site, never the address of another.
    pub fn own(self) -> String {
        let is_own = |next: &String| {
            next.starts_with('/') && !next.starts_with("//") && !next.contains('\\') && !next.contains(char::is_control)
        };
        self.next.filter(is_own).unwrap_or_else(|| "/".to_owned())
    }
}

#[derive(Template)]
#[template(path = "sign_in.html")]
struct SignInPage {
    frame: Frame,
    next: String,
    providers: Vec<ProviderRow>,
}

/// A provider that people sign in with.
struct ProviderRow {
    name: String,
    issuer: String,
    path: String,
}

async fn sign_in(State(plane): State<Arc<Plane>>, Query(next): Query<Next>) -> Response {
    let next = next.own();
    let head = plane.ledger.head();
    let state = head.follower.state();
    let escaped: String = next.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let row = |(name, sign_in): (&SignInName, &SignIn)| {
        let issuer = state.issuers.get(&sign_in.issuer)?.url.clone();
        Some(ProviderRow { name: name.to_string(), issuer, path: format!("/sign-in/with/{name}?next={escaped}") })
    };
    let providers = state.sign_ins.iter().filter_map(row).collect();
    page(&SignInPage { frame: Frame::of(&plane, None, ""), next, providers })
}

#[derive(Template)]
#[template(path = "enroll.html")]
struct EnrollPage {
    frame: Frame,
    /// Who gets one more factor.
    operator: Option<String>,
}

async fn enroll(State(plane): State<Arc<Plane>>, Visitor(session): Visitor) -> Response {
    let operator = session.as_ref().and_then(Session::operator).map(ToString::to_string);
    page(&EnrollPage { frame: Frame::of(&plane, session.as_ref(), "/account"), operator })
}
