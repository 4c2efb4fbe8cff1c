//! Decision records as they reach the control plane: denials, step-ups and first contacts in full, permits counted by edge. What is kept
//! is bounded; for the rest the hosts are asked. Reporting never slows an agent: what finds no room is counted.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::{broadcast, mpsc};

use countersign_api::{
    local::{Problem, RecordFilter, TailEvent},
    mesh,
};
use countersign_core::{
    identity::{ServiceName, TrustDomain},
    record::{DecisionRecord, EdgeCount, Judged, Outcome},
};

use crate::{
    clock::Clock,
    denials::Denials,
    edges,
    local_api::{problem, store_problem},
    metrics::Metrics,
    publish::Publisher,
    store::{Storage, StoreError},
    tokens::{self, Theft},
};

/// Records of one answer when nothing else is said, and at most.
const LIMIT_DEFAULT: u32 = 100;
const LIMIT_MAX: u32 = 10_000;
/// Longest record we read, in bytes.
const RECORD_BYTES_MAX: usize = 64 * 1024;
/// Reports that wait for the store at most.
const REPORTS_MAX: usize = 256;
/// Events that a slow `decision tail` may lag behind.
const TAIL_EVENTS_MAX: usize = 4_096;
/// How long hosts have to answer a question.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// What a report tells that is not only kept.
pub struct Taken {
    /// The records of probes, which are no traffic and are kept on their hosts alone.
    pub probes: Vec<DecisionRecord>,
    /// The stolen tokens that were shown.
    pub thefts: Vec<Theft>,
    /// The workloads that are denied in many ways.
    pub trying: Vec<ServiceName>,
}

/// Takes reports in and answers questions about them.
pub struct Decisions {
    reports: mpsc::Sender<(Vec<DecisionRecord>, Vec<EdgeCount>)>,
    tail: broadcast::Sender<TailEvent>,
    storage: Storage,
    publisher: Arc<Publisher>,
    metrics: Arc<Metrics>,
    denials: Denials,
}

impl Decisions {
    /// Starts the task that writes reports down; it ends with the last handle.
    pub fn start(storage: Storage, publisher: Arc<Publisher>, metrics: Arc<Metrics>, clock: Clock) -> Self {
        let (reports, waiting) = mpsc::channel(REPORTS_MAX);
        tokio::spawn(write_down(waiting, storage.clone(), metrics.clone(), clock));
        let (tail, denials) = (broadcast::Sender::new(TAIL_EVENTS_MAX), Denials::default());
        Self { reports, tail, storage, publisher, metrics, denials }
    }

    /// Takes one report in, and returns what of it is not only kept. `own` is our trust domain, once there is one.
    pub fn take(&self, report: mesh::Report, own: Option<&TrustDomain>, now_ms: u64) -> Taken {
        let mut records: Vec<DecisionRecord> = report.records_json.iter().filter_map(parse).collect();
        let edges: Vec<EdgeCount> = report.edges_json.iter().filter_map(parse).collect();
        let thefts = records.iter().filter_map(tokens::theft_of).collect();
        let unread = report.records_json.len() - records.len();
        let probes = records.extract_if(.., |record| record.judged == Judged::AsProbe).collect();
        let trying = own.map_or_else(Vec::new, |own| self.denials.take(&records, own, now_ms));
        let denials = records.iter().filter(|record| record.outcome != Outcome::Permit).count();
        self.metrics.denials.inc_by(denials as u64);
        let mut shed = report.shed + unread as u64;
        // Nobody listening is no error.
        let tell = |event| drop(self.tail.send(event));
        records.iter().cloned().map(TailEvent::Record).for_each(tell);
        edges.iter().cloned().map(TailEvent::Edge).for_each(tell);
        let count = records.len() as u64;
        if !(records.is_empty() && edges.is_empty()) && self.reports.try_send((records, edges)).is_err() {
            shed += count;
        }
        if shed > 0 {
            self.metrics.shed.inc_by(shed);
            tell(TailEvent::Shed(shed));
        }
        Taken { probes, thefts, trying }
    }

    /// Records as they come in.
    pub fn tail(&self) -> broadcast::Receiver<TailEvent> {
        self.tail.subscribe()
    }

    /// Kept records that `filter` asks for, here and on every connected host, newest first.
    pub async fn list(&self, filter: RecordFilter) -> Result<Vec<DecisionRecord>, StoreError> {
        let limit = limit_of(&filter);
        let local = filter.clone();
        let kept = self.storage.run("records", move |store| store.records(&local)).await?;
        let mut found: BTreeMap<(u64, Arc<str>), DecisionRecord> = BTreeMap::new();
        let mut add = |record: DecisionRecord| drop(found.insert((record.at_ms, record.id.clone()), record));
        kept.into_iter().for_each(&mut add);
        let asked = serde_json::to_string(&filter).map_err(|e| StoreError::Failed(e.to_string()))?;
        let mut asked = self.publisher.ask(asked);
        let deadline = tokio::time::Instant::now() + ANSWER_WITHIN;
        // A host that does not answer in time is left out: what it holds can be asked for again.
        while let Ok(Some(records)) = tokio::time::timeout_at(deadline, asked.answers.recv()).await {
            records
                .iter()
                .take(LIMIT_MAX as usize)
                .filter_map(parse)
                .filter(|r| matches(&filter, r))
                .for_each(&mut add);
        }
        self.publisher.withdraw(asked.number);
        Ok(found.into_values().rev().take(limit).collect())
    }
}

/// The one kept record whose id begins with `id`.
pub async fn one(decisions: &Decisions, id: &str) -> Result<DecisionRecord, Problem> {
    let filter = RecordFilter { id: Some(id.to_owned()), limit: Some(2), ..RecordFilter::default() };
    let mut found = decisions.list(filter).await.map_err(|error| store_problem(&error))?;
    if found.len() > 1 {
        let help = "give more of its digits";
        return Err(problem(409, format!("several decisions begin with `{id}`"), None, Some(help)));
    }
    let help =
        "records are kept until newer ones need their room; `countersign decision list` shows those that are there";
    found.pop().ok_or_else(|| problem(404, format!("no decision `{id}` is kept"), None, Some(help)))
}

/// How many records `filter` asks for.
pub fn limit_of(filter: &RecordFilter) -> usize {
    filter.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX) as usize
}

/// Whether every given member of `filter` holds of `record`.
pub fn matches(filter: &RecordFilter, record: &DecisionRecord) -> bool {
    let RecordFilter { id, service, principal, outcome, since_ms, probes, first_contact, limit: _ } = filter;
    let principal_is = |wanted: &str| {
        let given = &record.inputs.principal;
        given.as_str() == wanted || given.service().is_some_and(|service| service.as_str() == wanted)
    };
    (record.judged != Judged::AsProbe || *probes || id.is_some())
        && (record.inputs.first_contact || !first_contact)
        && id.as_deref().is_none_or(|id| record.id.starts_with(id))
        && service.as_ref().is_none_or(|service| record.inputs.service == *service)
        && principal.as_deref().is_none_or(principal_is)
        && outcome.is_none_or(|outcome| record.outcome == outcome)
        && since_ms.is_none_or(|since| record.at_ms >= since)
}

/// Whether `decision tail` shows `event` to one who asked for `filter`.
pub fn shows(filter: &RecordFilter, event: &TailEvent) -> bool {
    match event {
        TailEvent::Record(record) => matches(filter, record),
        TailEvent::Edge(edge) => {
            let permits = filter.outcome.is_none_or(|outcome| outcome == countersign_core::record::Outcome::Permit);
            let service = filter.service.as_ref().is_none_or(|service| edge.service == *service);
            let principal = filter.principal.as_deref().is_none_or(|wanted| {
                edge.principal.as_str() == wanted || edge.principal.service().is_some_and(|s| s.as_str() == wanted)
            });
            permits && service && principal && filter.id.is_none() && !filter.first_contact
        }
        TailEvent::Shed(_) => true,
    }
}

fn parse<T: serde::de::DeserializeOwned>(json: &Bytes) -> Option<T> {
    if json.len() > RECORD_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(json).ok()
}

async fn write_down(
    mut waiting: mpsc::Receiver<(Vec<DecisionRecord>, Vec<EdgeCount>)>,
    storage: Storage,
    metrics: Arc<Metrics>,
    clock: Clock,
) {
    let mut seen = edges::Seen::default();
    while let Some((mut records, mut edges)) = waiting.recv().await {
        // What queued up meanwhile is written in one commit.
        while let Ok((more_records, more_edges)) = waiting.try_recv() {
            records.extend(more_records);
            edges.extend(more_edges);
        }
        let (count, now_ms) = (records.len() as u64, clock.now_ms());
        if let Err(error) = seen.note(&storage, &records, now_ms).await {
            tracing::warn!(%error, "the edges that were used or held could not be kept");
        }
        let written = storage.run("put_report", move |store| store.put_report(&records, &edges, now_ms)).await;
        if let Err(error) = written {
            metrics.shed.inc_by(count);
            tracing::warn!(%error, shed = count, "decision records could not be kept");
        }
    }
}
