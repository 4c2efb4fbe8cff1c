//! Access tokens in a browser: those that are good now, and those that were taken back, by whom and why. They say who may call whom, so
//! the gate is asked each time before they are shown.

use std::sync::Arc;

use askama::Template;
use axum::{
    extract::{Query, State},
    response::Response,
};
use serde::Deserialize;

use countersign_api::local::{RevokedBy, TokenFilter, TokenView};
use countersign_core::{gate::act::Act, identity::ServiceName, signal::TokenRevocation};

use super::{
    acts,
    pages::{Frame, page, problem_page},
    session::Session,
    words::When,
};
use crate::{Plane, local_api::store_problem, tokens};

/// Tokens, and revocations, of one page.
const PAGE: usize = 200;

/// Which ones, as the form says it: what is empty does not count.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct Wanted {
    service: String,
    subject: String,
}

impl Wanted {
    fn filter(&self) -> Result<TokenFilter, String> {
        let name = |given: &str| {
            let given = Some(given.trim()).filter(|given| !given.is_empty());
            given.map(|given| ServiceName::parse(given).map_err(|error| error.to_string())).transpose()
        };
        Ok(TokenFilter { service: name(&self.service)?, subject: name(&self.subject)?, ..TokenFilter::default() })
    }
}

/// The tokens that are good for one service.
struct Held {
    service: String,
    count: usize,
}

struct Row {
    id: String,
    holder: String,
    service: String,
    scope: String,
    expires: When,
}

struct Revoked {
    meant: String,
    at: When,
    by: String,
    reason: String,
}

#[derive(Template)]
#[template(path = "tokens.html")]
struct TokensPage {
    frame: Frame,
    wanted: Wanted,
    services: Vec<String>,
    /// Why nothing can be looked for.
    mistake: Option<String>,
    held: Vec<Held>,
    rows: Vec<Row>,
    full: bool,
    revoked: Vec<Revoked>,
}

/// Those that are good, and the revocations that hold.
pub async fn tokens(State(plane): State<Arc<Plane>>, session: Session, Query(wanted): Query<Wanted>) -> Response {
    if let Err(instead) = acts::passes(&plane, &session, Act::ReadTokens, "/tokens").await {
        return instead;
    }
    let (mistake, filter) = match wanted.filter() {
        Ok(filter) => (None, filter),
        Err(what) => (Some(what), TokenFilter::default()),
    };
    let found = match tokens::list(&plane, filter).await {
        Ok(found) => found,
        Err(error) => return problem_page(&plane, Some(&session), &store_problem(&error)),
    };
    let revoked = match tokens::revocations(&plane).await {
        Ok(revoked) => revoked,
        Err(error) => return problem_page(&plane, Some(&session), &store_problem(&error)),
    };
    let (now_ms, head) = (plane.clock.now_ms(), plane.ledger.head());
    let good: Vec<&TokenView> = found.iter().filter(|one| !one.revoked).collect();
    let mut held: Vec<Held> = Vec::new();
    for one in &good {
        match held.iter_mut().find(|held| held.service == one.service.as_str()) {
            Some(held) => held.count += 1,
            None => held.push(Held { service: one.service.to_string(), count: 1 }),
        }
    }
    held.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.service.cmp(&b.service)));
    page(&TokensPage {
        frame: Frame::of(&plane, Some(&session), "/tokens"),
        wanted,
        services: head.follower.state().services.keys().map(ToString::to_string).collect(),
        mistake,
        held,
        full: good.len() > PAGE,
        rows: good.iter().take(PAGE).map(|one| Row::of(one, now_ms)).collect(),
        revoked: revoked.into_iter().take(PAGE).map(|(meant, by)| Revoked::of(&meant, by, now_ms)).collect(),
    })
}

impl Row {
    fn of(one: &TokenView, now_ms: u64) -> Self {
        Self {
            id: one.id.to_string(),
            holder: one.instance.as_ref().map_or_else(|| one.subject.to_string(), ToString::to_string),
            service: one.service.to_string(),
            scope: one.scope.to_string(),
            expires: When::of(one.expires_at_ms, now_ms),
        }
    }
}

impl Revoked {
    fn of(revoked: &TokenRevocation, by: RevokedBy, now_ms: u64) -> Self {
        Self { meant: revoked.meant.to_string(), at: When::of(by.at_ms, now_ms), by: by.by, reason: by.reason }
    }
}
