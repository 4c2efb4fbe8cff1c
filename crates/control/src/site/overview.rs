//! The first page: what the mesh is, what runs and enforces what, what waits, what changed last.

use std::sync::Arc;

use askama::Template;
use axum::{extract::State, response::Response};

use countersign_api::local::{CheckpointView, HostView, InstanceView, WitnessView};
use countersign_core::{change::Revision, operator::Recovery};

use super::{
    changes::{self, Row},
    entries::{self, EntryRow},
    pages::{Frame, page, problem_page},
    session::Session,
};
use crate::Plane;

/// Changes that are shown as recent.
const RECENT: u32 = 6;

#[derive(Template)]
#[template(path = "overview.html")]
struct OverviewPage {
    frame: Frame,
    revision: Revision,
    seal: Option<u32>,
    recovery: Option<Recovery>,
    checkpoint: Result<Option<Checkpoint>, String>,
    services: Vec<ServiceRow>,
    hosts: Vec<HostView>,
    pending: Vec<Row>,
    recent: Vec<EntryRow>,
}

struct ServiceRow {
    name: String,
    protocol: String,
    instances: usize,
    ready: usize,
    /// The oldest revision that one of them enforces.
    slowest: Option<u64>,
    errors: Vec<String>,
}

impl ServiceRow {
    fn of(name: String, protocol: String, instances: &[InstanceView]) -> Self {
        Self {
            name,
            protocol,
            instances: instances.len(),
            ready: instances.iter().filter(|instance| instance.ready).count(),
            slowest: instances.iter().map(|instance| instance.revision.0).min(),
            errors: instances
                .iter()
                .filter_map(|instance| Some(format!("{}: {}", instance.instance, instance.error.as_ref()?)))
                .collect(),
        }
    }
}

/// The newest checkpoint.
pub struct Checkpoint {
    /// Entries under it.
    pub size: u64,
    /// The key that signed it.
    pub log_key: String,
    /// The signed note.
    pub note: String,
    /// Witnesses that are asked for.
    pub quorum: usize,
    /// Each of them.
    pub witnesses: Vec<WitnessView>,
}

impl Checkpoint {
    /// The newest, or why there is none.
    pub async fn newest(plane: &Plane) -> Result<Option<Self>, String> {
        let newest = plane.checkpoints.newest(plane).await.map_err(|error| error.to_string())?;
        Ok(newest.map(|CheckpointView { note, size, log_key, quorum, witnesses }| Self {
            size,
            log_key,
            note,
            quorum,
            witnesses,
        }))
    }

    /// Witnesses that cosigned it.
    pub fn cosigned(&self) -> usize {
        self.witnesses.iter().filter(|witness| witness.cosigned).count()
    }
}

/// The page.
pub async fn overview(State(plane): State<Arc<Plane>>, session: Session) -> Response {
    let head = plane.ledger.head();
    let (state, revision) = (head.follower.state(), head.follower.revision());
    let (pending, recent) = match (changes::rows(&plane).await, entries::newest(&plane, &session, RECENT).await) {
        (Ok((pending, _)), Ok(recent)) => (pending, recent),
        (Err(problem), _) | (_, Err(problem)) => return problem_page(&plane, Some(&session), &problem),
    };
    let services = state.services.iter().map(|(name, service)| {
        ServiceRow::of(name.to_string(), service.spec.protocol.to_string(), &plane.publisher.instances_of(name))
    });
    page(&OverviewPage {
        frame: Frame::of(&plane, Some(&session), "/"),
        revision,
        seal: state.seal.map(|seal| seal.quorum),
        recovery: state.recovery.clone(),
        checkpoint: Checkpoint::newest(&plane).await,
        services: services.collect(),
        hosts: plane.publisher.hosts(),
        pending,
        recent,
    })
}
