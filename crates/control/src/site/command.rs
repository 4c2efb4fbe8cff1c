//! What commands on other machines ask: the requests of `control.sock`, of an operator who has signed the command in. The token of
//! its session and a proof of its key come with every request, and the operator of the session is who asks, whatever a body says.
//!
//! What the local socket may do because it is the mesh's own user's is refused here, and so is every request that the table below
//! does not name.
//!
//! INVARIANT (own-name-only): a request from afar names its session's operator or nobody, and is looked at as that operator's.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderMap, HeaderValue, Method, header, request::Parts};
use serde_json::Value;

use countersign_api::local::{OPERATOR_HEADER, Problem, SessionView, SessionsEnded, Shown};
use countersign_core::gate::act::Act;

use super::{
    guard::text,
    session::{self, Session},
};
use crate::{
    Plane,
    acts::{self, By},
    audit,
    local_api::{self, BODY_BYTES_MAX, Refusal, problem, store_problem},
    proof::{Of, Proof},
};

/// How long the body of a request may take.
const BODY_WITHIN: Duration = Duration::from_secs(60);
/// What is said of a request that only the machine of the control plane may make.
const HERE: &str = "run the command on the machine of the control plane, as the user who runs it";

/// What a request may do from afar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// It reads, and names nobody.
    Reads,
    /// It reads the ledger, if the gate lets this operator do that.
    ReadsLedger,
    /// It takes the whole ledger along, or all of its texts: what the gate asks for that was shown in this session.
    TakesLedger,
    /// Its body names an operator, at this place: the session's.
    Names(&'static [&'static str]),
    /// The same; and who is no operator asks as well, for what answers it looks at the session.
    Asks(&'static [&'static str]),
    /// What answers it looks at the session.
    OfSession,
    /// Only the machine itself may; what to do instead.
    Refused(&'static str),
}

/// Every request of the local API, and those that only a session makes.
pub const RULES: &[(Method, &str, Rule)] = &[
    (Method::GET, "/v1/status", Rule::Reads),
    (Method::GET, "/v1/mesh", Rule::Reads),
    (Method::GET, "/v1/changes", Rule::ReadsLedger),
    (Method::POST, "/v1/changes", Rule::Asks(&["shown", "operator"])),
    (Method::GET, "/v1/changes/{revision}", Rule::ReadsLedger),
    (Method::GET, "/v1/changes/{revision}/wait", Rule::Reads),
    (Method::GET, "/v1/decisions", Rule::OfSession),
    (Method::GET, "/v1/decisions/tail", Rule::OfSession),
    (Method::GET, "/v1/decisions/{id}", Rule::OfSession),
    (Method::POST, "/v1/acts/{act}", Rule::Asks(&["operator"])),
    (Method::GET, "/v1/services/{service}/callers", Rule::Reads),
    (Method::GET, "/v1/services/{service}/checklist", Rule::Reads),
    (Method::GET, "/v1/edges", Rule::Reads),
    (Method::GET, "/v1/authority", Rule::Reads),
    (Method::POST, "/v1/authority/steps", Rule::Names(&["shown", "operator"])),
    (Method::POST, "/v1/authority/keys", Rule::Names(&["shown", "operator"])),
    (Method::POST, "/v1/authority/request", Rule::Names(&["shown", "operator"])),
    (Method::POST, "/v1/authority/accept", Rule::Names(&["shown", "operator"])),
    (Method::POST, "/v1/authority/reseal", Rule::Refused(HERE)),
    (Method::GET, "/v1/identities", Rule::Reads),
    (Method::POST, "/v1/identities/revoke", Rule::Names(&["shown", "operator"])),
    (Method::GET, "/v1/tokens", Rule::OfSession),
    (Method::POST, "/v1/tokens/inspect", Rule::OfSession),
    (Method::POST, "/v1/tokens/revoke", Rule::Names(&["shown", "operator"])),
    (Method::GET, "/v1/signals", Rule::OfSession),
    (Method::POST, "/v1/signals", Rule::Names(&["shown", "operator"])),
    (Method::POST, "/v1/signals/clear", Rule::Names(&["shown", "operator"])),
    (Method::GET, "/v1/signals/{number}/wait", Rule::Reads),
    (Method::GET, "/v1/risks", Rule::OfSession),
    (Method::GET, "/v1/ledger", Rule::TakesLedger),
    (Method::GET, "/v1/ledger/bodies", Rule::TakesLedger),
    (Method::GET, "/v1/ledger/checkpoint", Rule::ReadsLedger),
    (Method::GET, "/v1/ledger/proofs/{index}", Rule::ReadsLedger),
    (Method::GET, "/v1/ledger/consistency/{size}", Rule::ReadsLedger),
    (Method::GET, "/v1/proposals", Rule::Reads),
    (Method::GET, "/v1/proposals/{id}", Rule::Reads),
    (Method::GET, "/v1/proposals/{id}/wait", Rule::Reads),
    (Method::POST, "/v1/proposals/{id}/ceremony", Rule::Names(&["operator"])),
    (Method::POST, "/v1/proposals/{id}/apply", Rule::Names(&["operator"])),
    (Method::POST, "/v1/proposals/{id}/countersign", Rule::Names(&["operator"])),
    (Method::POST, "/v1/proposals/{id}/reject", Rule::Names(&["operator"])),
    (Method::POST, "/v1/proposals/{id}/withdraw", Rule::Asks(&["operator"])),
    (Method::POST, "/v1/enrolments", Rule::Refused("enrol on the dashboard, under Account")),
    (Method::POST, "/v1/enrolments/link", Rule::Refused(HERE)),
    (Method::POST, "/v1/enrolments/{id}", Rule::Refused("enrol on the dashboard, under Account")),
    (Method::GET, "/v1/sessions", Rule::OfSession),
    (Method::POST, "/v1/sessions/end", Rule::OfSession),
    (Method::POST, "/v1/hosts/invitations", Rule::Refused(HERE)),
    (Method::POST, "/v1/hosts/evict", Rule::Names(&["shown", "operator"])),
    (Method::GET, "/v1/session", Rule::OfSession),
    (Method::POST, "/v1/session/end", Rule::OfSession),
];

/// All of it.
pub fn router(plane: &Arc<Plane>) -> Router<Arc<Plane>> {
    local_api::routes()
        .route("/v1/session", get(whoami))
        .route("/v1/session/end", post(end))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::map_response_with_state(plane.clone(), local_api::told_of_recovery))
        .route_layer(middleware::from_fn_with_state(plane.clone(), admit))
}

/// Lets a request pass that a session makes, as its operator's.
async fn admit(State(plane): State<Arc<Plane>>, path: MatchedPath, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let session = match signed_in(&plane, &parts).await {
        Ok(session) => session,
        Err(refused) => return unauthorized(refused),
    };
    match forced(&plane, &path, Request::from_parts(parts, body), session).await {
        Ok(request) => next.run(request).await,
        Err(refused) => {
            plane.metrics.refused("not-from-afar");
            Refusal::from(refused).into_response()
        }
    }
}

/// Why nobody is signed in: the word of RFC 6750 and RFC 9449 for it, and the answer.
struct Unauthorized {
    error: Option<&'static str>,
    problem: Problem,
}

/// Whose session makes the request. The proof is verified before the store is asked for anything, and used up once the session is
/// known: what strangers send is not remembered.
async fn signed_in(plane: &Plane, request: &Parts) -> Result<Session, Unauthorized> {
    let refused = |error: Option<&'static str>, why: String| {
        let help = "sign in with `countersign login`";
        Unauthorized { error, problem: problem(401, why, None, Some(help)) }
    };
    let failed = |error| Unauthorized { error: None, problem: store_problem(&error) };
    let headers = &request.headers;
    if !headers.contains_key(header::AUTHORIZATION) {
        return Err(refused(None, "nobody is signed in".to_owned()));
    }
    // "a DPoP-bound access token … MUST NOT be accepted as a bearer token" (RFC 9449, 7.2).
    let token = token_of(headers);
    let token = token.ok_or_else(|| refused(Some("invalid_token"), "the request carries no token".to_owned()))?;
    let site = plane.site.as_ref();
    let url = format!("{}{}", site.map_or("", |site| site.origin.as_str()), request.uri.path());
    let proof = Proof::verify(headers, request.method.as_str(), &url, Some(token), plane.clock.now_ms())
        .map_err(|why| refused(Some("invalid_dpop_proof"), why.to_string()))?;
    let session = session::find_bound(plane, token, &proof.key).await.map_err(failed)?;
    let over = || refused(Some("invalid_token"), "the session is over, or was never".to_owned());
    let session = session.ok_or_else(over)?;
    match proof.spend(plane, Of::Command).await.map_err(failed)? {
        true => Ok(session),
        false => {
            plane.metrics.refused("proof-shown-again");
            Err(refused(Some("invalid_dpop_proof"), "the proof was shown before".to_owned()))
        }
    }
}

fn token_of(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = text(headers, header::AUTHORIZATION)?.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("DPoP") && token.len() == session::TOKEN_CHARS).then_some(token)
}

fn unauthorized(Unauthorized { error, problem }: Unauthorized) -> Response {
    let is_unauthorized = problem.status == 401;
    let mut response = Refusal::from(problem).into_response();
    if is_unauthorized {
        let error = error.map(|error| format!("error=\"{error}\", ")).unwrap_or_default();
        let challenge = format!("DPoP {error}algs=\"ES256\"");
        let value = HeaderValue::from_str(&challenge).expect("INVARIANT: it is made of words of a standard");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
    }
    response
}

/// The request as the session's operator's: what it names is that operator, or the request is refused.
async fn forced(plane: &Plane, path: &MatchedPath, request: Request, session: Session) -> Result<Request, Problem> {
    let own = session.operator().map(|name| name.as_str());
    if request.headers().get_all(OPERATOR_HEADER).iter().any(|named| own.is_none_or(|own| named != own)) {
        return Err(another(&session));
    }
    // HEAD is answered where GET is.
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    let rule = RULES.iter().find(|(of, at, _)| of == method && *at == path.as_str()).map(|(.., rule)| *rule);
    let mut request = match rule {
        Some(Rule::Reads | Rule::OfSession) => request,
        Some(Rule::ReadsLedger) => {
            acts::pass(plane, Act::ReadLedger, By::Session(&session), &Shown::default()).await?;
            request
        }
        Some(Rule::TakesLedger) => {
            acts::pass(plane, Act::ExportLedger, By::Session(&session), &Shown::default()).await?;
            request
        }
        Some(Rule::Names(place)) => {
            session.as_operator()?;
            named(place, request, &session).await?
        }
        Some(Rule::Asks(place)) => named(place, request, &session).await?,
        Some(Rule::Refused(help)) => {
            return Err(problem(403, "this cannot be asked for from another machine", None, Some(help)));
        }
        None => return Err(problem(403, "this cannot be asked for from another machine", None, Some(HERE))),
    };
    request.extensions_mut().insert(session);
    Ok(request)
}

async fn named(place: &[&str], request: Request, session: &Session) -> Result<Request, Problem> {
    let (mut parts, body) = request.into_parts();
    let broken = || problem(413, "the request broke off, or is too long", None, None);
    let read = tokio::time::timeout(BODY_WITHIN, axum::body::to_bytes(body, BODY_BYTES_MAX)).await;
    let bytes = read.map_err(|_| broken())?.map_err(|_| broken())?;
    let unread = |why: String| {
        let help = "is the command of the same version as the control plane?";
        problem(400, "the request cannot be read", Some(why), Some(help))
    };
    let mut document: Value = serde_json::from_slice(&bytes).map_err(|error| unread(error.to_string()))?;
    let mut at = &mut document;
    for name in place {
        let object = at.as_object_mut().ok_or_else(|| unread(format!("what should hold `{name}` is no object")))?;
        let empty = if *name == "operator" { Value::Null } else { Value::Object(serde_json::Map::new()) };
        at = object.entry(*name).or_insert(empty);
    }
    let own = session.operator().map(|name| name.as_str());
    if !at.is_null() && (own.is_none() || at.as_str() != own) {
        return Err(another(session));
    }
    *at = own.into();
    let bytes = serde_json::to_vec(&document).map_err(|error| unread(error.to_string()))?;
    parts.headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    Ok(Request::from_parts(parts, Body::from(bytes)))
}

fn another(session: &Session) -> Problem {
    let help =
        format!("you are signed in as `{}`; leave out --operator, or sign in as whom you mean", session.author());
    problem(403, "the request names another operator", None, Some(&help))
}

/// Who is signed in.
async fn whoami(Extension(session): Extension<Session>) -> Json<SessionView> {
    Json(session.view())
}

/// Ends the session.
async fn end(
    State(plane): State<Arc<Plane>>,
    Extension(session): Extension<Session>,
) -> Result<Json<SessionsEnded>, Refusal> {
    tracing::info!(who = %session.author(), session = &session.id[..12], "a command signed out");
    let by = audit::By::SignedIn(session.author().to_string());
    session::end(&plane, &[session], by).await.map_err(|error| store_problem(&error))?;
    Ok(Json(SessionsEnded { ended: 1 }))
}
