//! Takes up views, one at a time, away from the threads that carry traffic, and signals, at once; acknowledges each when it holds.

use std::sync::Arc;

use bytes::Bytes;
use countersign_api::sidecar::{SidecarMessage, sidecar_message};
use countersign_core::{change::Revision, view::View};
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, watch},
    task::spawn_blocking,
};
use tracing::{info, warn};

use super::{InstanceRevision, message, names::Names};
use crate::shared::Shared;

/// What the agent offered and nobody has taken up yet: the newest view, and the latest revision at which it holds.
#[derive(Default)]
pub(super) struct Offered {
    next: Mutex<Next>,
    news: Notify,
}

#[derive(Default)]
struct Next {
    view_json: Option<Bytes>,
    revision: Option<u64>,
}

impl Offered {
    /// A newer view replaces one that was not taken up, and the revisions that were said of it.
    pub fn view(&self, view_json: Bytes) {
        *self.next.lock() = Next { view_json: Some(view_json), revision: None };
        self.news.notify_one();
    }

    /// The view offered last, taken up or not, also holds at `revision`.
    pub fn revision(&self, revision: u64) {
        let mut next = self.next.lock();
        next.revision = next.revision.max(Some(revision));
        drop(next);
        self.news.notify_one();
    }

    async fn next(&self) -> Next {
        self.news.notified().await;
        std::mem::take(&mut self.next.lock())
    }
}

/// Takes up what is offered until the agent is gone.
pub(super) async fn run(
    shared: Arc<Shared>,
    offered: Arc<Offered>,
    names: Option<Names>,
    say: mpsc::Sender<SidecarMessage>,
) {
    let names = Arc::new(Mutex::new(names));
    let mut refused: Option<String> = None; // why the view offered last is not in force
    loop {
        let next = offered.next().await;
        if let Some(json) = next.view_json {
            let (shared, names) = (shared.clone(), names.clone());
            let taken = spawn_blocking(move || take_up(&shared, &mut names.lock(), &json)).await;
            refused = taken.unwrap_or_else(|panic| Err(panic.to_string())).err();
            if let Some(error) = &refused {
                warn!(error, "could not take up a view; the last good one stays in force");
            }
        }
        if let (Some(revision), None) = (next.revision, &refused) {
            shared.set_revision(Revision(revision));
        }
        let revision = shared.revision().unwrap_or_default();
        let instance = String::new(); // the agent knows
        let applied = InstanceRevision {
            instance,
            revision: revision.0,
            error: refused.clone().unwrap_or_default(),
            ..InstanceRevision::default()
        };
        if refused.is_none() {
            info!(revision = revision.0, "view enforced");
        }
        if say.send(message(sidecar_message::Message::Applied(applied))).await.is_err() {
            return;
        }
    }
}

/// Ends what signals revoked, and says so, until the agent is gone: not in turn with views, whose compiling takes its time.
pub(super) async fn heed(shared: Arc<Shared>, mut heard: watch::Receiver<()>, say: mpsc::Sender<SidecarMessage>) {
    while heard.changed().await.is_ok() {
        let sequence = shared.end_revoked().await;
        info!(signal = sequence.0, "signals heeded");
        if say.send(message(sidecar_message::Message::Heeded(sequence.0))).await.is_err() {
            return;
        }
    }
}

/// Parses, compiles and puts in force; returns when every worker enforces it on everything open.
fn take_up(shared: &Shared, names: &mut Option<Names>, json: &[u8]) -> Result<(), String> {
    let view: View = serde_json::from_slice(json).map_err(|error| format!("could not read the view: {error}"))?;
    let revision = view.revision;
    Handle::current().block_on(shared.apply(view)).map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        format!("could not compile revision {revision}: {}", errors.join("; "))
    })?;
    if let (Some(names), Some(compiled)) = (names, shared.view()) {
        names.follow(&compiled.view);
    }
    Ok(())
}
