//! Edges as they are used and held: who came to which service, in which way. Reports bring them, first contacts and what is held in full;
//! what is approved stands in the ledger. Nothing here decides about a request: that does the law at each sidecar.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use countersign_api::local::{EdgeStanding, EdgeView};
use countersign_core::{
    canonical::Digest,
    change::{Edge, Member},
    identity::{ServiceName, SpiffeId, TrustDomain},
    record::{DecisionRecord, Outcome, Reason},
    service::FirstContact,
};

use crate::{
    Plane,
    store::{Document, Storage, Store, StoreError},
};

/// The kind of the documents that keep them.
const EDGE_KIND: &str = "edge";
/// Edges that are kept; who comes when there is no room is in the records alone.
pub(crate) const EDGES_MAX: u32 = 16_384;
/// How long one is kept that is not heard of again.
const KEPT_MS: u64 = 400 * 24 * 60 * 60 * 1000;
/// How long what is heard again and again is not written again.
const WRITTEN_EVERY_MS: u64 = 10_000;

/// An edge as it lies in the store.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq)]
struct Kept {
    service: ServiceName,
    caller: SpiffeId,
    way: Arc<str>,
    first_ms: u64,
    last_ms: u64,
}

/// What was written lately.
#[derive(Default)]
pub(crate) struct Seen(HashMap<Digest, u64>);

impl Seen {
    /// Keeps the edges of which `records` tell: used for the first time at a sidecar, or held.
    pub(crate) async fn note(
        &mut self,
        storage: &Storage,
        records: &[DecisionRecord],
        now_ms: u64,
    ) -> Result<(), StoreError> {
        let mut new: BTreeMap<Digest, Kept> = BTreeMap::new();
        for record in records.iter().filter(|record| tells_of_edge(record)) {
            let (service, caller) = (record.inputs.service.clone(), record.inputs.principal.clone());
            let (way, at_ms): (Arc<str>, _) = (record.way().into(), record.at_ms.min(now_ms));
            let key = Digest::of_canonical(&(&service, &caller, &way));
            let kept = Kept { service, caller, way, first_ms: at_ms, last_ms: at_ms };
            if self.0.get(&key).is_none_or(|written_ms| now_ms.saturating_sub(*written_ms) >= WRITTEN_EVERY_MS) {
                new.entry(key).or_insert(kept);
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        if self.0.len() > EDGES_MAX as usize {
            self.0.clear();
        }
        self.0.extend(new.keys().map(|key| (*key, now_ms)));
        storage
            .run("edges", move |store| new.into_iter().try_for_each(|(key, kept)| keep(store, &key, kept, now_ms)))
            .await
    }
}

fn keep(store: &mut dyn Store, key: &Digest, mut kept: Kept, now_ms: u64) -> Result<(), StoreError> {
    let key = key.to_string();
    let seen = store.document(EDGE_KIND, &key, now_ms)?;
    if let Some(before) = seen.as_deref().and_then(|bytes| serde_json::from_slice::<Kept>(bytes).ok()) {
        kept.first_ms = before.first_ms;
    }
    let bytes = serde_json::to_vec(&kept).expect("INVARIANT: an edge is plain JSON");
    let document = Document { kind: EDGE_KIND, key, bytes, expires_at_ms: now_ms + KEPT_MS };
    // Somebody who was faster wrote the same a moment ago.
    match seen {
        Some(seen) => store.swap_document(EDGE_KIND, &document.key, &seen, &document).map(drop),
        None => store.put_document(&document, now_ms, EDGES_MAX).map(drop),
    }
}

fn tells_of_edge(record: &DecisionRecord) -> bool {
    record.reason == Reason::EdgeHeld || (record.outcome == Outcome::Permit && record.inputs.first_contact)
}

/// As approvals and policies name a caller: one of this mesh by its service.
fn named(caller: SpiffeId, own: Option<&TrustDomain>) -> Member {
    let is_own = own.is_some_and(|own| own.as_str() == caller.trust_domain());
    match caller.service().filter(|_| is_own) {
        Some(service) => Member::Service(service),
        None => Member::Workload(caller),
    }
}

/// All of them, by service and caller: those that were heard of, and those that are approved.
pub(crate) async fn list(plane: &Plane) -> Result<Vec<EdgeView>, StoreError> {
    let now_ms = plane.clock.now_ms();
    let kept = plane.storage.run("edges", move |store| store.documents(EDGE_KIND, now_ms)).await?;
    let head = plane.ledger.head();
    let state = head.follower.state();
    let mut edges: BTreeMap<(ServiceName, Edge), EdgeView> = BTreeMap::new();
    for (service, approved) in &state.edges {
        for edge in approved {
            let view = EdgeView {
                service: service.clone(),
                edge: edge.clone(),
                standing: EdgeStanding::Approved,
                first_ms: None,
                last_ms: None,
            };
            edges.insert((service.clone(), edge.clone()), view);
        }
    }
    for kept in kept.iter().filter_map(|(_, bytes)| serde_json::from_slice::<Kept>(bytes).ok()) {
        let Kept { service, caller, way, first_ms, last_ms } = kept;
        let edge = Edge { caller: named(caller, state.trust_domain.as_ref()), operation: Some(way.clone()) };
        let Some(declared) = state.services.get(&service) else { continue };
        let is_there = match &edge.caller {
            Member::Service(caller) => state.services.contains_key(caller),
            Member::Workload(_) => true,
        };
        if !is_there {
            continue;
        }
        let standing = match declared.spec.first_contact {
            _ if state.is_approved(&service, &edge.caller, &way) => EdgeStanding::Approved,
            FirstContact::Hold => EdgeStanding::Held,
            FirstContact::Mark | FirstContact::Inspect => EdgeStanding::Open,
        };
        let (first_ms, last_ms) = (Some(first_ms), Some(last_ms));
        let view = EdgeView { service: service.clone(), edge: edge.clone(), standing, first_ms, last_ms };
        edges.insert((service, edge), view);
    }
    Ok(edges.into_values().collect())
}
