//! The one thread that empties the queues, seals and writes what was in them, and makes the report. It sleeps while
//! there is nothing to write, and after it was woken waits a moment, so that one write takes many records; not when an
//! exchange waits for one of them.

use std::{
    io, mem,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use countersign_api::mesh::Report;
use countersign_core::{
    change::Revision,
    identity::InstanceId,
    record::{Judged, Outcome},
};
use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    Batch, QUEUE_BYTES_MAX, Shared,
    entry::{self, DecisionView, FRAME_BYTES, Payload},
    segment::Segments,
};
use crate::contact::Keeper;

/// Time in which records gather before they are written: the latest that a denial is on its way to control.
const BATCH: Duration = Duration::from_millis(20);
/// How often permits are reported.
const EDGES_EVERY: Duration = Duration::from_secs(1);
/// How often a directory that could not be written is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Denials and step-ups reported in full within [`EDGES_EVERY`]; more are kept, and counted as unreported.
const FULL_MAX: usize = 1000;
/// Edges counted within [`EDGES_EVERY`]; permits of more are kept, and counted as unreported.
const EDGES_MAX: usize = 10_000;
/// Room that a queue keeps while little is recorded.
const QUEUE_BYTES_IDLE: usize = 64 * 1024;

pub(super) struct Writer {
    shared: Arc<Shared>,
    segments: Segments,
    edges: Keeper,
    instance: InstanceId,
    reports: mpsc::Sender<Report>,
    spare: Batch,
    tally: Tally,
    retry_at: Option<Instant>, // set while the directory cannot be written
    shed_seen: u64,
}

/// What the next report will say.
struct Tally {
    full: Vec<Bytes>,
    full_count: usize, // since `edges_due` was last set
    edges: HashMap<Box<[u8]>, Permits, FxBuildHasher>,
    edges_due: Option<Instant>,
    shed: u64,
}

struct Permits {
    count: u64,
    revision: Revision,
}

impl Writer {
    pub fn new(
        shared: Arc<Shared>,
        segments: Segments,
        edges: Keeper,
        instance: InstanceId,
        reports: mpsc::Sender<Report>,
    ) -> Self {
        let tally = Tally { full: Vec::new(), full_count: 0, edges: HashMap::default(), edges_due: None, shed: 0 };
        Self {
            shared,
            segments,
            edges,
            instance,
            reports,
            spare: Batch::default(),
            tally,
            retry_at: None,
            shed_seen: 0,
        }
    }

    /// Goes round until the sink is dropped, and then once more.
    pub fn run(mut self) {
        loop {
            let stopping = self.shared.stopping.load(Ordering::Acquire);
            let rounds = self.round(stopping);
            if stopping {
                return;
            }
            if self.shared.wanted.load(Ordering::Acquire) > rounds {
                continue;
            }
            match self.due() {
                Some(due) => thread::park_timeout(due.saturating_duration_since(Instant::now())),
                None => thread::park(),
            }
            self.gather(rounds);
        }
    }

    /// Lets a batch gather, unless somebody waits for what is there.
    fn gather(&self, rounds: u64) {
        let shared = &self.shared;
        let until = Instant::now() + BATCH;
        loop {
            let hurry = shared.awaited.load(Ordering::Acquire)
                || shared.wanted.load(Ordering::Acquire) > rounds
                || shared.stopping.load(Ordering::Acquire);
            match until.checked_duration_since(Instant::now()) {
                Some(left) if !hurry && !left.is_zero() => thread::park_timeout(left),
                _ => return,
            }
        }
    }

    /// Finds out whether the directory can be written.
    pub fn prepare(&mut self) {
        let prepared = self.segments.prepare();
        self.note(prepared, Instant::now());
    }

    fn round(&mut self, stopping: bool) -> u64 {
        let now = Instant::now();
        if self.retry_at.is_some_and(|at| at <= now) {
            self.prepare();
        }
        self.shared.awaited.store(false, Ordering::Release); // before the queues: who comes later asks again
        for worker in 0..self.shared.queues.len() {
            let mut batch = mem::take(&mut self.spare);
            mem::swap(&mut *self.shared.queues[worker].batch.lock(), &mut batch);
            let written = self.take(&mut batch.entries, now);
            for waiting in batch.waiting.drain(..) {
                if written {
                    let _ = waiting.send(()); // it may have stopped waiting; dropped, it hears that it was lost
                }
            }
            let used = batch.entries.len();
            batch.entries.clear();
            if used < QUEUE_BYTES_IDLE {
                batch.entries.shrink_to(QUEUE_BYTES_IDLE);
            }
            self.spare = batch;
        }
        self.report(now, stopping);
        let mut rounds = self.shared.rounds.lock();
        *rounds += 1;
        self.shared.went_round.notify_all();
        *rounds
    }

    /// Seals, counts and writes the entries of one queue. Whether all of them are written.
    fn take(&mut self, entries: &mut [u8], now: Instant) -> bool {
        debug_assert!(entries.len() <= QUEUE_BYTES_MAX);
        let (mut at, mut count) = (0, 0);
        while let Some(bytes) = entries[at..].first_chunk().and_then(entry::payload_bytes) {
            let end = at + FRAME_BYTES + bytes;
            let entry = &mut entries[at..end];
            entry::seal(entry);
            if let Some(Payload::Decision(view)) = Payload::read(&entry[FRAME_BYTES..]) {
                self.tally.count(&view, &self.instance, now, &self.shared);
                if view.first_contact
                    && let Some(record) = view.record(&self.instance)
                    && let Err(error) = self.edges.keep(&record)
                {
                    warn!(%error, "could not keep an edge: its caller looks new after the next start");
                }
            }
            (at, count) = (end, count + 1);
        }
        if count == 0 {
            return true;
        }
        let written = match self.retry_at {
            Some(_) => false,
            None => {
                let written = self.segments.write(entries);
                let is_written = written.is_ok();
                if !is_written {
                    self.note(written, now);
                }
                is_written
            }
        };
        let counter = if written { &self.shared.kept } else { &self.shared.shed_by_writer };
        counter.fetch_add(count, Ordering::Relaxed);
        written
    }

    /// Takes note of whether the directory can be written, and says so when that changes.
    fn note(&mut self, result: io::Result<()>, now: Instant) {
        let was_failing = self.retry_at.is_some();
        match result {
            Ok(()) => {
                self.retry_at = None;
                if was_failing {
                    info!("decision records are kept again");
                }
            }
            Err(error) => {
                self.retry_at = Some(now + RETRY_EVERY);
                self.shared.write_errors.fetch_add(1, Ordering::Relaxed);
                if !was_failing {
                    warn!(%error, "could not write decision records: they are shed until this works again");
                }
            }
        }
        self.shared.failing.store(self.retry_at.is_some(), Ordering::Relaxed);
    }

    /// When to go round although nothing was queued.
    fn due(&self) -> Option<Instant> {
        let unsent = (!self.tally.full.is_empty()).then(Instant::now);
        [unsent, self.tally.edges_due, self.retry_at].into_iter().flatten().min()
    }

    /// Sends what there is to say: denials at once, edges when they are due. What the channel has no room for waits.
    fn report(&mut self, now: Instant, stopping: bool) {
        let shed = self.shared.queues.iter().map(|queue| queue.shed.load(Ordering::Relaxed)).sum::<u64>()
            + self.shared.shed_by_writer.load(Ordering::Relaxed);
        self.tally.shed += shed - mem::replace(&mut self.shed_seen, shed);
        if self.tally.shed > 0 {
            self.tally.edges_due.get_or_insert(now + EDGES_EVERY);
        }
        let edges_are_due = self.tally.edges_due.is_some_and(|due| stopping || due <= now);
        if self.tally.full.is_empty() && !edges_are_due {
            return;
        }
        let Ok(room) = self.reports.try_reserve() else { return };
        let mut report = Report { records_json: mem::take(&mut self.tally.full), ..Report::default() };
        if edges_are_due {
            report.edges_json = self
                .tally
                .edges
                .drain()
                .filter_map(|(edge, permits)| entry::edge_count(&edge, permits.count, permits.revision))
                .filter_map(|count| serde_json::to_vec(&count).ok().map(Bytes::from))
                .collect();
            report.shed = mem::take(&mut self.tally.shed);
            self.tally.edges_due = None;
            self.tally.full_count = 0;
        }
        room.send(report);
    }
}

impl Tally {
    fn count(&mut self, view: &DecisionView<'_>, instance: &InstanceId, now: Instant, shared: &Shared) {
        self.edges_due.get_or_insert(now + EDGES_EVERY);
        let counted = match (view.outcome, view.judged) {
            // No flood of denials keeps control from hearing of it: the sidecar makes one at a time.
            (_, Judged::AsProbe) => self.add_in_full(view, instance),
            (Outcome::Permit, Judged::AtStart) => {
                let counted = self.count_permit(view);
                counted && (!view.first_contact || self.count_in_full(view, instance))
            }
            (Outcome::Permit, Judged::WhileOpen) => true,
            (Outcome::Deny | Outcome::StepUp, _) => self.count_in_full(view, instance),
        };
        if !counted {
            shared.unreported.fetch_add(1, Ordering::Relaxed);
            self.shed += 1;
        }
    }

    fn count_permit(&mut self, view: &DecisionView<'_>) -> bool {
        if let Some(permits) = self.edges.get_mut(view.edge) {
            permits.count += 1;
            permits.revision = permits.revision.max(view.revision);
            return true;
        }
        if self.edges.len() == EDGES_MAX {
            return false;
        }
        self.edges.insert(view.edge.into(), Permits { count: 1, revision: view.revision });
        true
    }

    fn count_in_full(&mut self, view: &DecisionView<'_>, instance: &InstanceId) -> bool {
        if self.full_count == FULL_MAX {
            return false;
        }
        let added = self.add_in_full(view, instance);
        self.full_count += usize::from(added);
        added
    }

    fn add_in_full(&mut self, view: &DecisionView<'_>, instance: &InstanceId) -> bool {
        let json = view.record(instance).and_then(|record| serde_json::to_vec(&record).ok());
        let added = json.is_some();
        self.full.extend(json.map(Bytes::from));
        added
    }
}
