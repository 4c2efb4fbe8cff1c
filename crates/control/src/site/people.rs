//! Operators, their factors and sessions. A form here asks for a change, which waits to be signed on its page like any other; only
//! a session is ended at once, because that gives nobody anything.

use std::sync::Arc;

use askama::Template;
use axum::{
    Json,
    extract::{Path, State},
    response::Response,
};
use serde::{Deserialize, Serialize};

use countersign_api::local::{Apply, ApplyAs, Problem, Shown};
use countersign_core::{
    assurance::FactorKind,
    change::{Bodies, Change, ChangeSet, RoleName},
    gate::Author,
    identity::{FactorId, OperatorName},
    operator::{EnrolledFactor, Operator},
};

use super::{
    entries::short,
    pages::{Frame, page, problem_page},
    session::{self, Session, Who, is_owner},
    words::When,
};
use crate::{
    Plane,
    audit::By,
    local_api::{Refusal, problem, store_problem},
    proposals,
};

/// Roles of one operator at most.
const ROLES_MAX: usize = 32;
/// Longest role, in bytes.
const ROLE_BYTES_MAX: usize = 64;

struct OperatorRow {
    name: String,
    you: bool,
    roles: Vec<String>,
    factors: Vec<FactorRow>,
}

struct FactorRow {
    operator: String,
    id: String,
    short: String,
    kind: &'static str,
    note: String,
    may_remove: bool,
}

fn factor_row(operator: &OperatorName, id: &FactorId, factor: &EnrolledFactor, may_remove: bool) -> FactorRow {
    let kind = match factor.kind() {
        FactorKind::Platform => "Passkey",
        FactorKind::Roaming => "Security key",
        FactorKind::Totp => "Authenticator app",
        FactorKind::Recovery => "Recovery codes",
    };
    let note = match factor.signing_key() {
        None => String::new(),
        Some(key) => {
            let place = if key.backup_eligible { "may be backed up" } else { "stays in its device" };
            let model = key.model.map(|model| format!(", model {model}")).unwrap_or_default();
            format!("{place}, for {}{model}", key.relying_party.origins.join(", "))
        }
    };
    FactorRow {
        operator: operator.to_string(),
        id: id.as_str().to_owned(),
        short: short(id.as_str()),
        kind,
        note,
        may_remove,
    }
}

fn factor_rows(name: &OperatorName, operator: &Operator, may_remove: bool) -> Vec<FactorRow> {
    operator.factors.iter().map(|(id, factor)| factor_row(name, id, factor, may_remove)).collect()
}

struct SessionRow {
    id: String,
    who: String,
    held_by: &'static str,
    kind: &'static str,
    address: String,
    agent: String,
    used: When,
    this: bool,
}

async fn session_rows(plane: &Plane, own: &Session, everybody: bool) -> Result<Vec<SessionRow>, Problem> {
    let now_ms = plane.clock.now_ms();
    let mut sessions = session::list(plane).await.map_err(|error| store_problem(&error))?;
    sessions.sort_by_key(|session| std::cmp::Reverse(session.used_at_ms));
    let shown = sessions.into_iter().filter(|session| everybody || session.is_of_same(own));
    Ok(shown
        .map(|session| SessionRow {
            this: session.id == own.id,
            who: session.author().to_string(),
            held_by: session.held_by().as_str(),
            kind: session.who.with(),
            address: session.address.to_string(),
            agent: session.agent,
            used: When::of(session.used_at_ms, now_ms),
            id: session.id,
        })
        .collect())
}

#[derive(Template)]
#[template(path = "operators.html")]
struct OperatorsPage {
    frame: Frame,
    operators: Vec<OperatorRow>,
    owner: bool,
    sessions: Vec<SessionRow>,
}

/// Everybody.
pub async fn operators(State(plane): State<Arc<Plane>>, session: Session) -> Response {
    let head = plane.ledger.head();
    let state = head.follower.state();
    let owner = is_owner(state, &session);
    let sessions = match session_rows(&plane, &session, owner).await {
        Ok(sessions) => sessions,
        Err(problem) => return problem_page(&plane, Some(&session), &problem),
    };
    let row = |(name, operator): (&OperatorName, &Operator)| OperatorRow {
        name: name.to_string(),
        you: session.operator() == Some(name),
        roles: operator.roles.iter().map(ToString::to_string).collect(),
        factors: factor_rows(name, operator, owner || session.operator() == Some(name)),
    };
    let operators = state.operators.iter().map(row).collect();
    page(&OperatorsPage { frame: Frame::of(&plane, Some(&session), "/operators"), operators, owner, sessions })
}

#[derive(Template)]
#[template(path = "account.html")]
struct AccountPage {
    frame: Frame,
    name: String,
    roles: Vec<String>,
    /// Who vouches for them, when they are no operator.
    issuer: Option<String>,
    factors: Vec<FactorRow>,
    sessions: Vec<SessionRow>,
}

/// Oneself.
pub async fn account(State(plane): State<Arc<Plane>>, session: Session) -> Response {
    let sessions = match session_rows(&plane, &session, false).await {
        Ok(sessions) => sessions,
        Err(problem) => return problem_page(&plane, Some(&session), &problem),
    };
    let head = plane.ledger.head();
    let state = head.follower.state();
    let (roles, issuer, factors) = match &session.who {
        Who::Operator { operator, .. } => {
            let own = state.operators.get(operator).cloned().unwrap_or_default();
            let factors = factor_rows(operator, &own, true);
            (own.roles, None, factors)
        }
        Who::Person { person, .. } => (person.roles(state), Some(person.issuer.clone()), Vec::new()),
    };
    page(&AccountPage {
        frame: Frame::of(&plane, Some(&session), "/account"),
        name: session.author().to_string(),
        roles: roles.iter().map(ToString::to_string).collect(),
        issuer,
        factors,
        sessions,
    })
}

/// What a form asks for.
#[derive(Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// Another operator.
    Invite {
        /// Who.
        operator: String,
        /// Separated by spaces.
        roles: String,
    },
    /// One operator less.
    Remove {
        /// Who.
        operator: String,
    },
    /// Other roles.
    Roles {
        /// Whose.
        operator: String,
        /// Separated by spaces.
        roles: String,
    },
    /// One factor less.
    RemoveFactor {
        /// Whose.
        operator: String,
        /// Which.
        factor: FactorId,
    },
}

/// Where what was asked for waits.
#[derive(Serialize)]
pub struct AskedFor {
    /// The pending change; none when it was applied at once.
    change: Option<String>,
}

/// Asks for a change of operators, as who is signed in.
pub async fn ask(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Json(ask): Json<Ask>,
) -> Result<Json<AskedFor>, Refusal> {
    let changes = vec![change_of(ask)?];
    let base = plane.ledger.head().follower.revision();
    let apply = Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() };
    let operator = match session.who {
        Who::Operator { operator, .. } => operator,
        Who::Person { person, .. } => {
            let proposal = proposals::propose_as(&plane, apply, Author::Person(person), session.address).await?;
            return Ok(Json(AskedFor { change: Some(proposal.id) }));
        }
    };
    let shown = Shown { operator: Some(operator), ..Shown::default() };
    match proposals::apply(&plane, ApplyAs { apply, shown }).await {
        Ok(_) => Ok(Json(AskedFor { change: None })),
        Err(refused) => match refused.refusal.as_ref().and_then(|refusal| refusal.change.clone()) {
            Some(change) => Ok(Json(AskedFor { change: Some(change) })),
            None => Err(refused.into()),
        },
    }
}

fn change_of(ask: Ask) -> Result<Change, Problem> {
    Ok(match ask {
        Ask::Invite { operator, roles } => Change::InviteOperator { name: named(&operator)?, roles: roles_of(&roles)? },
        Ask::Remove { operator } => Change::RemoveOperator { name: named(&operator)? },
        Ask::Roles { operator, roles } => {
            Change::SetOperatorRoles { name: named(&operator)?, roles: roles_of(&roles)? }
        }
        Ask::RemoveFactor { operator, factor } => Change::RemoveFactor { operator: named(&operator)?, id: factor },
    })
}

fn named(given: &str) -> Result<OperatorName, Problem> {
    OperatorName::parse(given.trim()).map_err(|error| problem(400, error.to_string(), None, None))
}

fn roles_of(given: &str) -> Result<std::collections::BTreeSet<RoleName>, Problem> {
    let roles: std::collections::BTreeSet<RoleName> =
        given.split([' ', ',']).filter(|role| !role.is_empty()).map(RoleName::from).collect();
    let fits = |role: &RoleName| {
        role.len() <= ROLE_BYTES_MAX && role.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match roles.iter().find(|role| !fits(role)) {
        Some(role) => {
            Err(problem(400, format!("`{role}` is no role"), None, Some("use small letters, digits and `-`")))
        }
        None if roles.len() > ROLES_MAX => Err(problem(400, format!("at most {ROLES_MAX} roles"), None, None)),
        None => Ok(roles),
    }
}

/// Ends a session: one's own, or as an owner anybody's.
pub async fn end_session(
    State(plane): State<Arc<Plane>>,
    session: Session,
    Path(id): Path<String>,
) -> Result<Json<serde_json::Value>, Refusal> {
    let sessions = session::list(&plane).await.map_err(|error| store_problem(&error))?;
    let head = plane.ledger.head();
    let owner = is_owner(head.follower.state(), &session);
    // Whoever may not end it is not told that it is there.
    let found = sessions.iter().find(|other| other.id == id && (owner || other.is_of_same(&session)));
    let found =
        found.ok_or_else(|| problem(404, "there is no such session of yours", None, Some("load the page again")))?;
    tracing::info!(who = %found.author(), by = %session.author(), session = &found.id[..12], "a session was ended");
    let by = By::SignedIn(session.author().to_string());
    session::end(&plane, std::slice::from_ref(found), by).await.map_err(|error| store_problem(&error))?;
    Ok(Json(serde_json::json!({ "ended": true })))
}
