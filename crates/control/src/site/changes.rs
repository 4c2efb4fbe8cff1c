//! The queue of changes that wait, and the page of one: what it would do, rendered from the very change-set that is hashed.

use std::sync::Arc;

use askama::Template;
use axum::{
    extract::{Path, State},
    response::{IntoResponse, Redirect, Response},
};

use countersign_api::local::{Problem, Proposal, ProposalDetail, RecordFilter};
use countersign_core::{
    canonical,
    change::{Bodies, ChangeSet},
    gate::{Answer, act::Act},
};

use super::{
    pages::{Frame, page, problem_page},
    session::Session,
    words::{self, When},
};
use crate::{
    Plane, acts,
    impact::{self, Impact},
    ledger::Head,
    proposals,
};

/// Decisions that are put to both laws.
const RECORDS: u32 = 500;
/// Changes that no longer wait and are still listed.
const CLOSED_MAX: usize = 50;

/// One change that waits or waited.
pub struct Row {
    /// Its id.
    pub id: String,
    /// What it does.
    pub title: String,
    /// Who asked for it.
    pub author: String,
    /// When.
    pub asked: When,
    /// Until when it waits.
    pub ends: When,
    /// What is missing, or what became of it.
    pub missing: String,
}

impl Row {
    fn of(plane: &Plane, proposal: &Proposal) -> Self {
        let now_ms = plane.clock.now_ms();
        Self {
            id: proposal.id.clone(),
            title: words::title(&proposal.changes),
            author: proposal.author.to_string(),
            asked: When::of(proposal.asked_at_ms, now_ms),
            ends: When::of(proposal.expires_at_ms, now_ms),
            missing: words::missing(proposal),
        }
    }
}

/// Those that wait, and those that waited lately, newest first.
pub async fn rows(plane: &Plane) -> Result<(Vec<Row>, Vec<Row>), Problem> {
    let all = proposals::list(plane).await?;
    let (open, closed): (Vec<_>, Vec<_>) = all.iter().partition(|proposal| proposals::is_open(&proposal.state));
    let shown = |proposals: Vec<&Proposal>, max| -> Vec<Row> {
        proposals.into_iter().take(max).map(|proposal| Row::of(plane, proposal)).collect()
    };
    Ok((shown(open, usize::MAX), shown(closed, CLOSED_MAX)))
}

#[derive(Template)]
#[template(path = "changes.html")]
struct ChangesPage {
    frame: Frame,
    open: Vec<Row>,
    closed: Vec<Row>,
}

/// The queue.
pub async fn changes(State(plane): State<Arc<Plane>>, session: Session) -> Response {
    match rows(&plane).await {
        Ok((open, closed)) => page(&ChangesPage { frame: Frame::of(&plane, Some(&session), "/changes"), open, closed }),
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}

/// What the change would do to decisions about requests.
enum Effect {
    /// Nothing that they rest on is changed.
    Unconcerned,
    Unknown(String),
    Known {
        impact: Impact,
        since: When,
        edges: Vec<EdgeRow>,
        /// Whether decisions are open to who looks at it.
        examples: bool,
    },
}

struct EdgeRow {
    principal: String,
    action: String,
    service: String,
    /// A path that somebody asked for: only to whom decisions are open.
    example: Option<String>,
    was: &'static str,
    was_tone: &'static str,
    becomes: &'static str,
    becomes_tone: &'static str,
    by: String,
    count: usize,
}

impl EdgeRow {
    fn of(edge: &impact::Edge, with_example: bool) -> Self {
        let ((was, was_tone), (becomes, becomes_tone)) = (words::outcome(edge.was), words::outcome(edge.becomes));
        let by = if edge.by.is_empty() { "no policy permits".to_owned() } else { format!("by {}", edge.by.join(", ")) };
        Self {
            principal: edge.principal.to_string(),
            action: edge.action.clone(),
            service: edge.service.to_string(),
            example: with_example.then(|| edge.example.clone()),
            was,
            was_tone,
            becomes,
            becomes_tone,
            by,
            count: edge.count,
        }
    }
}

#[derive(Template)]
#[template(path = "change.html")]
struct ChangePage {
    frame: Frame,
    row: Row,
    proposal: Proposal,
    differences: Vec<words::Shown>,
    more_differences: usize,
    impact: Effect,
    /// The exact bytes that are hashed.
    canonical: String,
    open: bool,
    applied: Option<u64>,
    /// Whether who is signed in asked for it.
    own: bool,
    /// Whether they are an operator, who can answer it.
    operator: bool,
    key: bool,
}

/// One change.
pub async fn change(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Response {
    if id.bytes().all(|byte| byte.is_ascii_digit()) {
        return Redirect::to(&format!("/ledger/{id}")).into_response();
    }
    let ProposalDetail { proposal, change_set, bodies } = match proposals::show(&plane, &id).await {
        Ok(detail) => detail,
        Err(problem) => return problem_page(&plane, Some(&session), &problem),
    };
    let open = proposals::is_open(&proposal.state);
    // What was in force when it was planned is what it is compared with; while it waits that is in force still.
    let before = match open {
        true => Some(plane.ledger.head()),
        false => plane.ledger.at(proposal.base).await.ok().flatten(),
    };
    let head = plane.ledger.head();
    let operators = &head.follower.state().operators;
    let canonical = String::from_utf8_lossy(&canonical::encode(&change_set)).into_owned();
    let compared = before.as_ref().map(|head| (head.follower.state(), head.follower.bodies()));
    page(&ChangePage {
        frame: Frame::of(&plane, Some(&session), "/changes"),
        row: Row::of(&plane, &proposal),
        differences: words::difference(&change_set.changes, compared, &bodies),
        more_differences: change_set.changes.len().saturating_sub(words::CHANGES_MAX),
        canonical,
        open,
        applied: proposal.state.revision().map(|revision| revision.0),
        own: session.is_author(&proposal.author),
        operator: session.operator().is_some(),
        key: session.operator().and_then(|name| operators.get(name)).is_some_and(|operator| operator.can_sign()),
        impact: effect(&plane, &session, before.clone(), change_set, bodies).await,
        proposal,
    })
}

async fn effect(
    plane: &Plane,
    session: &Session,
    before: Option<Arc<Head>>,
    change_set: ChangeSet,
    bodies: Bodies,
) -> Effect {
    if !impact::concerns(&change_set) {
        return Effect::Unconcerned;
    }
    let Some(before) = before else { return Effect::Unknown("the state that it was planned on is not here".into()) };
    let filter = RecordFilter { limit: Some(RECORDS), ..RecordFilter::default() };
    let records = match plane.decisions.list(filter).await {
        Ok(records) => records,
        Err(error) => return Effect::Unknown(error.to_string()),
    };
    // Who does what, how often, is what a change is judged by; which path somebody asked for is a decision.
    let examples = matches!(acts::may(plane, Act::ReadDecisions, session).await, Ok(Answer::Permit));
    let now_ms = plane.clock.now_ms();
    // Ten thousand policies are parsed twice for it: not on a thread that serves others.
    let judged = tokio::task::spawn_blocking(move || {
        let mut texts = before.follower.bodies().clone();
        texts.extend(&bodies);
        impact::of(before.follower.state(), &change_set, &texts, &records)
    });
    match judged.await {
        Ok(Ok(impact)) => Effect::Known {
            since: When::of(impact.since_ms.unwrap_or(now_ms), now_ms),
            edges: impact.edges.iter().map(|edge| EdgeRow::of(edge, examples)).collect(),
            examples,
            impact,
        },
        Ok(Err(error)) => Effect::Unknown(error.to_string()),
        Err(_) => Effect::Unknown("the control plane is stopping".into()),
    }
}
