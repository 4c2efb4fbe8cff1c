//! Decisions about requests in a browser: those that are kept, and one with the policies that made it. They say who asked for what
//! and from where, so the gate is asked each time before one is shown.

use std::sync::Arc;

use askama::Template;
use axum::{
    extract::{Path, Query, State},
    response::Response,
};
use serde::Deserialize;

use countersign_api::local::{Problem, RecordFilter};
use countersign_core::{
    change::PolicyId,
    gate::act::Act,
    identity::ServiceName,
    record::{DecisionRecord, Judged, Outcome},
};

use super::{
    acts,
    pages::{Frame, page, problem_page},
    session::Session,
    words::{self, When},
};
use crate::{Plane, decisions, local_api::store_problem};

/// Decisions of one page.
const PAGE: u32 = 100;
/// Longest text that is looked for, in bytes.
const WANTED_BYTES_MAX: usize = 256;

/// Which ones, as the form says it: what is empty does not count.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Wanted {
    service: String,
    principal: String,
    outcome: String,
    /// Not older than so many minutes.
    minutes: String,
}

impl Wanted {
    fn filter(&self, now_ms: u64) -> Result<RecordFilter, String> {
        let given = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
        if [&self.service, &self.principal].into_iter().any(|text| text.len() > WANTED_BYTES_MAX) {
            return Err("what is looked for is too long".to_owned());
        }
        let service = given(&self.service).map(|name| ServiceName::parse(&name).map_err(|error| error.to_string()));
        let outcome = given(&self.outcome).map(|outcome| match &*outcome {
            "permit" => Ok(Outcome::Permit),
            "step_up" => Ok(Outcome::StepUp),
            "deny" => Ok(Outcome::Deny),
            other => Err(format!("`{other}` is no outcome")),
        });
        let minutes = given(&self.minutes)
            .map(|minutes| minutes.parse::<u32>().map_err(|_| format!("`{minutes}` is not a number of minutes")));
        let since_ms = minutes.transpose()?.map(|minutes| now_ms.saturating_sub(u64::from(minutes) * 60_000));
        Ok(RecordFilter {
            id: None,
            service: service.transpose()?,
            principal: given(&self.principal),
            outcome: outcome.transpose()?,
            since_ms,
            probes: false,
            first_contact: false,
            limit: Some(PAGE),
        })
    }
}

struct Row {
    id: String,
    at: When,
    outcome: &'static str,
    tone: &'static str,
    principal: String,
    action: String,
    operation: String,
    reason: &'static str,
    policies: String,
}

impl Row {
    fn of(plane: &Plane, record: &DecisionRecord) -> Self {
        let (outcome, tone) = words::outcome(record.outcome);
        let inputs = &record.inputs;
        let head = plane.ledger.head();
        let own = head.follower.state().trust_domain.as_ref();
        // A workload of the own mesh by its service, any other by its full id: a stranger must not look familiar.
        let own = own.filter(|own| own.as_str() == inputs.principal.trust_domain());
        let service = own.and_then(|_| inputs.principal.service());
        Self {
            id: record.id.to_string(),
            at: When::of(record.at_ms, plane.clock.now_ms()),
            outcome,
            tone,
            principal: service.map_or_else(|| inputs.principal.to_string(), |service| service.to_string()),
            action: inputs.action.to_string(),
            operation: format!("{}{}", inputs.service, inputs.path),
            reason: record.reason.in_words(),
            policies: record.policies.join(", "),
        }
    }
}

#[derive(Template)]
#[template(path = "decisions.html")]
struct DecisionsPage {
    frame: Frame,
    wanted: Wanted,
    services: Vec<String>,
    /// Why nothing can be looked for.
    mistake: Option<String>,
    rows: Vec<Row>,
    full: bool,
}

/// The newest ones.
pub async fn decisions(State(plane): State<Arc<Plane>>, session: Session, Query(wanted): Query<Wanted>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadDecisions, "/decisions").await {
        return instead;
    }
    let (mut mistake, mut records) = (None, Vec::new());
    match wanted.filter(plane.clock.now_ms()) {
        Err(what) => mistake = Some(what),
        Ok(filter) => match plane.decisions.list(filter).await {
            Ok(found) => records = found,
            Err(error) => return problem_page(&plane, Some(&session), &store_problem(&error)),
        },
    }
    let head = plane.ledger.head();
    page(&DecisionsPage {
        frame: Frame::of(&plane, Some(&session), "/decisions"),
        wanted,
        services: head.follower.state().services.keys().map(ToString::to_string).collect(),
        mistake,
        full: records.len() as u32 >= PAGE,
        rows: records.iter().map(|record| Row::of(&plane, record)).collect(),
    })
}

struct PolicyText {
    id: String,
    file: String,
    text: String,
}

#[derive(Template)]
#[template(path = "decision.html")]
struct DecisionPage {
    frame: Frame,
    row: Row,
    record: DecisionRecord,
    while_open: bool,
    /// Those that decided, as they were in the record's revision.
    policies: Vec<PolicyText>,
}

/// One of them.
pub async fn decision(State(plane): State<Arc<Plane>>, session: Session, Path(id): Path<String>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadDecisions, "/decisions").await {
        return instead;
    }
    match shown(&plane, &session, &id).await {
        Ok(shown) => page(&shown),
        Err(problem) => problem_page(&plane, Some(&session), &problem),
    }
}

async fn shown(plane: &Plane, session: &Session, id: &str) -> Result<DecisionPage, Problem> {
    let record = decisions::one(&plane.decisions, id).await?;
    let head = plane.ledger.at(record.revision).await.map_err(|error| store_problem(&error))?;
    let text_of = |id: &PolicyId| {
        let head = head.as_ref()?;
        let policy = head.follower.state().policies.get(id)?;
        let text = head.follower.bodies().get(&policy.body)?;
        Some(PolicyText { id: id.to_string(), file: policy.file.to_string(), text: text.to_string() })
    };
    Ok(DecisionPage {
        frame: Frame::of(plane, Some(session), "/decisions"),
        row: Row::of(plane, &record),
        while_open: record.judged == Judged::WhileOpen,
        policies: record.policies.iter().filter_map(text_of).collect(),
        record,
    })
}
