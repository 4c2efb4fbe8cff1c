//! The decision records of one sidecar: taken from the workers without ever making one wait, kept in size-bounded segments
//! on this host, reported to the control plane, and read back.
//!
//! ```text
//! worker ── bounded queue ──┐
//! worker ── bounded queue ──┴─► writer thread ──► segments (everything)
//!                                            └──► report (denials and step-ups in full, permits counted by edge)
//! ```
//!
//! A worker encodes its record into its own queue and goes on; nobody else but the writer takes that lock, fifty times a
//! second, to swap the queue for an empty one. What finds no room is counted as shed. An exchange that must not go on
//! unrecorded (`recorded = "always"`) commits instead: it hears when its batch is written, or that it was lost. The writer
//! does not let such a batch gather, but everything that comes while one is written is in the next.
//!
//! Nothing here judges, and no header, token or body comes in.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

use countersign_api::{local::RecordFilter, mesh::Report};
use countersign_core::{
    identity::InstanceId,
    record::{DecisionRecord, Ended, Outcome},
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, oneshot};

use crate::{
    contact::Keeper,
    decided::{Decided, DecisionId, Recorder, Shed},
};

mod entry;
mod segment;
mod writer;

/// Bytes one worker can have waiting for the writer: a tenth of a second at 30 000 records a second.
pub const QUEUE_BYTES_MAX: usize = 1024 * 1024;
/// Records returned by one query, whatever limit it asks for.
pub const QUERY_RECORDS_MAX: u32 = 10_000;
/// Records returned by a query that asks for no limit.
pub const QUERY_RECORDS_DEFAULT: u32 = 100;
/// Longest wait of a query for records that are still in the queues.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Where the records of one sidecar go.
#[derive(Debug, Clone)]
pub struct SinkConfig {
    /// The instance whose proxy decides.
    pub instance: InstanceId,
    /// The instance's own directory; made when it does not exist.
    pub dir: PathBuf,
    /// Bytes of all segments together; at least 1 MiB is used.
    pub bytes_max: u64,
    /// Threads that decide.
    pub worker_count: usize,
}

/// The queues and their writer. Dropping it writes what is queued.
pub struct Sink {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    reader: Reader,
}

/// One worker's end of the sink.
pub struct WorkerRecorder {
    shared: Arc<Shared>,
    worker: usize,
}

/// Reads kept records. It works on files alone and blocks: call it where that is harmless.
#[derive(Clone)]
pub struct Reader {
    shared: Arc<Shared>,
    dir: PathBuf,
    instance: InstanceId,
}

/// What became of the records so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SinkCounts {
    /// Written to a segment.
    pub kept: u64,
    /// Lost: no room in a queue, or the segment could not be written.
    pub shed: u64,
    /// Kept, but left out of the report because it had too many.
    pub unreported: u64,
    /// Failed writes.
    pub write_errors: u64,
    /// Whether the last write failed.
    pub failing: bool,
}

struct Shared {
    queues: Box<[Queue]>,
    writer: OnceLock<Thread>,
    stopping: AtomicBool,
    failing: AtomicBool,
    kept: AtomicU64,
    shed_by_writer: AtomicU64,
    unreported: AtomicU64,
    write_errors: AtomicU64,
    awaited: AtomicBool, // an exchange waits for what is queued
    wanted: AtomicU64,   // the writer goes round without waiting until it has gone round so often
    rounds: Mutex<u64>,
    went_round: Condvar,
}

#[derive(Default)]
#[repr(align(128))] // no cache line is shared with another worker's
struct Queue {
    batch: Mutex<Batch>,
    shed: AtomicU64, // written under the lock of `batch`
}

/// What is written at once.
#[derive(Default)]
struct Batch {
    entries: Vec<u8>,                  // whole ones, unsealed; at most QUEUE_BYTES_MAX
    waiting: Vec<oneshot::Sender<()>>, // no more than entries
}

impl Sink {
    /// Starts the writer. Reports go to `reports` when it has room and wait (bounded) when not. A directory that cannot
    /// be written does not stop the start: it is counted and retried.
    pub fn start(config: SinkConfig, reports: mpsc::Sender<Report>) -> io::Result<(Self, Vec<WorkerRecorder>)> {
        let shared = Arc::new(Shared {
            queues: (0..config.worker_count).map(|_| Queue::default()).collect(),
            writer: OnceLock::new(),
            stopping: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            kept: AtomicU64::new(0),
            shed_by_writer: AtomicU64::new(0),
            unreported: AtomicU64::new(0),
            write_errors: AtomicU64::new(0),
            awaited: AtomicBool::new(false),
            wanted: AtomicU64::new(0),
            rounds: Mutex::new(0),
            went_round: Condvar::new(),
        });
        let segments = segment::Segments::new(config.dir.clone(), config.bytes_max, &config.instance);
        let edges = Keeper::open(&config.dir);
        let mut writer = writer::Writer::new(shared.clone(), segments, edges, config.instance.clone(), reports);
        writer.prepare(); // whoever must not go on unrecorded knows from the first exchange
        let writer = thread::Builder::new().name("record".into()).spawn(move || writer.run())?;
        let _ = shared.writer.set(writer.thread().clone());
        let recorders =
            (0..config.worker_count).map(|worker| WorkerRecorder { shared: shared.clone(), worker }).collect();
        let reader = Reader { shared: shared.clone(), dir: config.dir, instance: config.instance };
        Ok((Self { shared, writer: Some(writer), reader }, recorders))
    }

    /// Reads what this sink keeps.
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }
}

impl Reader {
    /// The newest kept records that match, newest first, those still queued included. A torn or damaged tail of a
    /// segment is skipped.
    pub fn read(&self, filter: &RecordFilter) -> io::Result<Vec<DecisionRecord>> {
        self.shared.flush();
        segment::read(&self.dir, &self.instance, filter)
    }

    /// What became of the records so far.
    pub fn counts(&self) -> SinkCounts {
        let shared = &self.shared;
        let shed: u64 = shared.queues.iter().map(|queue| queue.shed.load(Ordering::Relaxed)).sum();
        SinkCounts {
            kept: shared.kept.load(Ordering::Relaxed),
            shed: shed + shared.shed_by_writer.load(Ordering::Relaxed),
            unreported: shared.unreported.load(Ordering::Relaxed),
            write_errors: shared.write_errors.load(Ordering::Relaxed),
            failing: shared.failing.load(Ordering::Relaxed),
        }
    }
}

impl Recorder for WorkerRecorder {
    fn record(&self, decided: &Decided<'_>) -> Result<(), Shed> {
        self.decision(decided, None)
    }

    fn commit(&self, decided: &Decided<'_>) -> Result<oneshot::Receiver<()>, Shed> {
        let (waiting, written) = oneshot::channel();
        self.decision(decided, Some(waiting))?;
        self.shared.hurry();
        Ok(written)
    }

    fn amend(&self, id: DecisionId, ended: &Ended) {
        let _ = self.push(None, |to| entry::encode_end(to, id, ended)); // shed is counted; the decision itself is kept
    }
}

impl WorkerRecorder {
    fn decision(&self, decided: &Decided<'_>, waiting: Option<oneshot::Sender<()>>) -> Result<(), Shed> {
        let failing = self.shared.failing.load(Ordering::Relaxed);
        if failing && decided.decision.outcome == Outcome::Permit {
            return self.shared.queues[self.worker].shed();
        }
        // A denial is still worth reporting when it cannot be kept.
        self.push(waiting, |to| entry::encode_decision(to, decided))?;
        if failing { Err(Shed) } else { Ok(()) }
    }

    fn push(&self, waiting: Option<oneshot::Sender<()>>, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), Shed> {
        let queue = &self.shared.queues[self.worker];
        let mut batch = queue.batch.lock();
        let before = batch.entries.len();
        encode(&mut batch.entries);
        let after = batch.entries.len();
        if after > QUEUE_BYTES_MAX || after - before > entry::ENTRY_BYTES_MAX {
            batch.entries.truncate(before);
            return queue.shed();
        }
        batch.waiting.extend(waiting);
        drop(batch);
        if before == 0 {
            self.shared.wake();
        }
        Ok(())
    }
}

impl Queue {
    fn shed(&self) -> Result<(), Shed> {
        self.shed.fetch_add(1, Ordering::Relaxed);
        Err(Shed)
    }
}

impl Shared {
    fn wake(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    /// Has what is queued written without letting more gather.
    fn hurry(&self) {
        // Whoever set it woke the writer, which takes it back before it looks into the queues.
        if !self.awaited.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Waits until everything queued before this call has been written, or could not be.
    fn flush(&self) {
        let mut rounds = self.rounds.lock();
        let target = *rounds + 2; // the round that is under way may have passed our queue already
        self.wanted.fetch_max(target, Ordering::AcqRel);
        self.wake();
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        while *rounds < target && !self.went_round.wait_until(&mut rounds, deadline).timed_out() {}
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join(); // it has logged its own panic
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path};

    use countersign_core::{
        change::Revision,
        identity::{ServiceName, SpiffeId},
        policy::{Action, Context, Decision, Query, Reads},
        record::{EdgeCount, End, Judged, Reason},
        risk::{Condition, Posture},
        service::Protocol,
        signal::SignalSeq,
    };

    use super::*;
    use crate::{
        contact::{Edge, Edges},
        decided::TraceId,
    };

    /// What a query borrows.
    pub(super) struct Asked {
        principal: SpiffeId,
        service: ServiceName,
        path: String,
        first_contact: bool,
    }

    impl Asked {
        pub fn new(path: &str) -> Self {
            Self::of("web", path)
        }

        pub fn of(caller: &str, path: &str) -> Self {
            Self {
                principal: SpiffeId::parse(&format!("spiffe://shop.example/{caller}")).unwrap(),
                service: ServiceName::parse("catalog").unwrap(),
                path: path.into(),
                first_contact: false,
            }
        }

        pub fn decided<'a>(&'a self, decision: &'a Decision, at_ms: u64) -> Decided<'a> {
            let context = Context {
                method: "GET",
                host: "catalog.mesh",
                protocol: Protocol::Http,
                size: Some(at_ms % 1000),
                origin: "192.0.2.7".parse().unwrap(),
                now: (at_ms / 1000) as i64,
                first_contact: self.first_contact,
                token: None,
                condition: Condition {
                    risk: 40,
                    posture: Posture { compliant: Some(false), managed: None },
                    contained: true,
                },
            };
            let (principal, service) = (&self.principal, &self.service);
            Decided {
                id: DecisionId::new(at_ms),
                at_ms,
                revision: Revision(7),
                signals: SignalSeq(9),
                decision,
                judged: Judged::AtStart,
                query: Query { principal, action: Action::Http("GET"), service, path: &self.path, context },
                trace_id: Some(TraceId(1)),
                judge_ns: 1500,
                ended: None,
            }
        }
    }

    pub(super) fn instance() -> InstanceId {
        InstanceId::parse("catalog/1").unwrap()
    }

    pub(super) fn permitted(policies: &[&str]) -> Decision {
        answer(Outcome::Permit, Reason::Permitted, policies)
    }

    fn denied() -> Decision {
        answer(Outcome::Deny, Reason::NoPolicyPermits, &[])
    }

    fn answer(outcome: Outcome, reason: Reason, policies: &[&str]) -> Decision {
        let policies = policies.iter().map(|id| (*id).into()).collect();
        Decision {
            outcome,
            reason,
            policies,
            obligation: None,
            reads: Reads::NOTHING,
            remembered: false,
            operation: None,
        }
    }

    fn ended(how: End) -> Ended {
        Ended { status: 200, duration_us: 900, bytes_in: 1, bytes_out: 1024, how }
    }

    struct Running {
        sink: Sink,
        worker: WorkerRecorder,
        reports: mpsc::Receiver<Report>,
    }

    fn start(dir: &Path, bytes_max: u64) -> Running {
        let (sender, reports) = mpsc::channel(64);
        let config = SinkConfig { instance: instance(), dir: dir.into(), bytes_max, worker_count: 1 };
        let (sink, mut workers) = Sink::start(config, sender).unwrap();
        Running { sink, worker: workers.remove(0), reports }
    }

    impl Running {
        fn read(&self, filter: RecordFilter) -> Vec<DecisionRecord> {
            self.sink.reader().read(&filter).unwrap()
        }

        fn paths(&self, filter: RecordFilter) -> Vec<String> {
            self.read(filter).iter().map(|record| record.inputs.path.to_string()).collect()
        }

        /// All reports until `until` is content.
        fn reported(&mut self, mut until: impl FnMut(&Report) -> bool) -> Report {
            let mut all = Report::default();
            let deadline = Instant::now() + Duration::from_secs(5);
            while !until(&all) {
                assert!(Instant::now() < deadline, "no such report: {all:?}");
                thread::sleep(Duration::from_millis(5));
                while let Ok(report) = self.reports.try_recv() {
                    all.records_json.extend(report.records_json);
                    all.edges_json.extend(report.edges_json);
                    all.shed += report.shed;
                }
            }
            all
        }
    }

    fn all() -> RecordFilter {
        RecordFilter { limit: Some(QUERY_RECORDS_MAX), ..RecordFilter::default() }
    }

    #[test]
    fn what_was_recorded_is_read_back_newest_first_by_a_later_process_too() {
        let dir = tempfile::tempdir().unwrap();
        let first = start(dir.path(), 0);
        for at_ms in 1..=3 {
            first.worker.record(&Asked::new(&format!("/{at_ms}")).decided(&permitted(&["p"]), at_ms)).unwrap();
        }
        assert_eq!(first.paths(all()), ["/3", "/2", "/1"]);
        drop(first);
        let second = start(dir.path(), 0);
        second.worker.record(&Asked::new("/4").decided(&denied(), 4)).unwrap();
        assert_eq!(second.paths(all()), ["/4", "/3", "/2", "/1"]);
        assert_eq!(second.paths(RecordFilter { limit: Some(2), ..all() }), ["/4", "/3"]);
        assert_eq!(second.sink.reader().counts().kept, 1);
    }

    #[test]
    fn all_given_members_of_a_filter_must_hold() {
        let dir = tempfile::tempdir().unwrap();
        let running = start(dir.path(), 0);
        let id = DecisionId::new(10);
        for (caller, path, decision, at_ms) in
            [("web", "/a", permitted(&[]), 10), ("web", "/b", denied(), 20), ("xweb", "/c", denied(), 30)]
        {
            let asked = Asked::of(caller, path);
            let decided = asked.decided(&decision, at_ms);
            running.worker.record(&Decided { id: if path == "/a" { id } else { decided.id }, ..decided }).unwrap();
        }
        let service = |name| Some(ServiceName::parse(name).unwrap());
        for (filter, expected) in [
            (RecordFilter { outcome: Some(Outcome::StepUp), ..all() }, &[][..]),
            (RecordFilter { outcome: Some(Outcome::Deny), ..all() }, &["/c", "/b"]),
            (RecordFilter { outcome: Some(Outcome::Deny), principal: Some("web".into()), ..all() }, &["/b"]),
            (RecordFilter { principal: Some("spiffe://shop.example/xweb".into()), ..all() }, &["/c"]),
            (RecordFilter { principal: Some("shop.example/web".into()), ..all() }, &[]),
            (RecordFilter { principal: Some("".into()), ..all() }, &[]),
            (RecordFilter { service: service("catalog"), since_ms: Some(20), ..all() }, &["/c", "/b"]),
            (RecordFilter { service: service("web"), ..all() }, &[]),
            (RecordFilter { id: Some(id.to_string()), ..all() }, &["/a"]),
            (RecordFilter { id: Some(id.to_string()[..12].into()), ..all() }, &["/a"]),
            (RecordFilter { limit: Some(0), ..all() }, &[]),
        ] {
            assert_eq!(running.paths(filter.clone()), expected, "{filter:?}");
        }
    }

    #[test]
    fn the_end_of_a_long_exchange_is_joined_to_its_decision() {
        let dir = tempfile::tempdir().unwrap();
        let running = start(dir.path(), 0);
        let (asked, decision) = (Asked::new("/stream"), permitted(&[]));
        let decided = asked.decided(&decision, 1);
        running.worker.record(&decided).unwrap();
        assert_eq!(running.read(all())[0].ended, None);
        running.worker.record(&Asked::new("/later").decided(&decision, 2)).unwrap();
        running.worker.amend(decided.id, &ended(End::Abandoned));
        let read = running.read(all());
        assert_eq!((&*read[1].inputs.path, read[1].ended.clone()), ("/stream", Some(ended(End::Abandoned))));
        assert_eq!((&*read[0].inputs.path, read[0].ended.clone()), ("/later", None));
    }

    #[test]
    fn a_torn_or_damaged_tail_is_skipped_and_never_appended_to() {
        let whole = {
            let dir = tempfile::tempdir().unwrap();
            let running = start(dir.path(), 0);
            for at_ms in 1..=2 {
                running.worker.record(&Asked::new(&format!("/{at_ms}")).decided(&denied(), at_ms)).unwrap();
                running.sink.reader().shared.flush();
            }
            drop(running);
            fs::read(dir.path().join("000000000001.records")).unwrap()
        };
        for cut in 0..whole.len() {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("000000000001.records"), &whole[..cut]).unwrap();
            let paths: Vec<_> =
                segment::read(dir.path(), &instance(), &all()).unwrap().iter().map(|r| r.inputs.path.clone()).collect();
            assert!(["/2", "/1"].ends_with(&paths.iter().map(|p| &**p).collect::<Vec<_>>()), "cut at {cut}: {paths:?}");
            assert!(paths.len() < 2, "cut at {cut}");
        }
        let dir = tempfile::tempdir().unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(dir.path().join("000000000001.records"), &flipped).unwrap();
        let running = start(dir.path(), 0);
        running.worker.record(&Asked::new("/3").decided(&denied(), 3)).unwrap();
        assert_eq!(running.paths(all()), ["/3", "/1"]);
        assert_eq!(fs::read(dir.path().join("000000000001.records")).unwrap(), flipped);
    }

    #[test]
    fn records_take_no_more_room_than_they_were_given_and_the_oldest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let running = start(dir.path(), 0);
        let (path, decision) = (format!("/{}", "x".repeat(8000)), permitted(&[]));
        for at_ms in 1..=400 {
            running.worker.record(&Asked::new(&path).decided(&decision, at_ms)).unwrap();
            if at_ms % 50 == 0 {
                running.sink.reader().shared.flush();
            }
        }
        let bytes: u64 = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= segment::BYTES_MIN, "{bytes}");
        let kept: Vec<_> = running.read(all()).iter().map(|record| record.at_ms).collect();
        assert!(kept.len() > 90, "{}", kept.len());
        assert_eq!(kept, (401 - kept.len() as u64..=400).rev().collect::<Vec<_>>());
    }

    #[test]
    fn what_finds_no_room_is_counted_and_said_and_never_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = start(dir.path(), 0);
        let (path, decision) = (format!("/{}", "x".repeat(60_000)), permitted(&[]));
        let asked = Asked::new(&path);
        let results: Vec<_> = (0..200).map(|_| running.worker.record(&asked.decided(&decision, 1))).collect();
        let shed = results.iter().filter(|result| result.is_err()).count() as u64;
        assert!(shed > 0, "200 records of 60 KB fit into a queue of 1 MB");
        running.sink.reader().shared.flush();
        let counts = running.sink.reader().counts();
        assert_eq!((counts.shed, counts.kept), (shed, 200 - shed));
        assert_eq!(running.reported(|report| report.shed > 0).shed, shed);
        let endless = Asked::new(&"x".repeat(entry::ENTRY_BYTES_MAX));
        assert_eq!(running.worker.record(&endless.decided(&decision, 1)), Err(Shed));
    }

    #[test]
    fn permits_are_reported_by_edge_and_denials_in_full_and_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = start(dir.path(), 0);
        let (permit, deny) = (permitted(&[]), denied());
        for number in 0..1000 {
            let caller = if number % 4 == 0 { "orders" } else { "web" };
            running.worker.record(&Asked::of(caller, &format!("/{number}")).decided(&permit, number)).unwrap();
        }
        let asked = Asked::new("/secret");
        let decided = asked.decided(&deny, 5);
        running.worker.record(&decided).unwrap();
        let permit_later = Asked::new("/0");
        running.worker.record(&Decided { judged: Judged::WhileOpen, ..permit_later.decided(&permit, 6) }).unwrap();
        let begun = Instant::now();
        let at_once = running.reported(|report| !report.records_json.is_empty());
        assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        let records: Vec<DecisionRecord> =
            at_once.records_json.iter().map(|json| serde_json::from_slice(json).unwrap()).collect();
        assert_eq!(records.len(), 1);
        assert_eq!(&*records[0].id, decided.id.to_string());
        assert_eq!(records[0].instance, instance());
        let edges = running.reported(|report| !report.edges_json.is_empty()).edges_json;
        let mut edges: Vec<EdgeCount> = edges.iter().map(|json| serde_json::from_slice(json).unwrap()).collect();
        edges.sort_by(|a, b| a.principal.cmp(&b.principal));
        let counted: Vec<_> = edges.iter().map(|edge| (edge.principal.path(), &*edge.action, edge.permits)).collect();
        assert_eq!(counted, [("/orders", "http:GET", 250), ("/web", "http:GET", 750)]);
    }

    #[test]
    fn a_first_contact_is_reported_in_full_though_permitted_listed_and_known_after_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = start(dir.path(), 0);
        let permit = permitted(&[]);
        let first = Asked { first_contact: true, ..Asked::new("/items/4") };
        running.worker.record(&first.decided(&permit, 1)).unwrap();
        running.worker.record(&Asked::new("/items/5").decided(&permit, 2)).unwrap();
        let report = running.reported(|report| !report.edges_json.is_empty());
        let told: DecisionRecord = serde_json::from_slice(&report.records_json[0]).unwrap();
        assert_eq!((report.records_json.len(), &*told.inputs.path, told.inputs.first_contact), (1, "/items/4", true));
        let count: EdgeCount = serde_json::from_slice(&report.edges_json[0]).unwrap();
        assert_eq!(count.permits, 2, "and counted with the others");
        assert_eq!(running.paths(RecordFilter { first_contact: true, ..all() }), ["/items/4"]);
        drop(running);
        let known = Edges::default();
        Keeper::load(dir.path(), &known).unwrap();
        for (caller, way, is_new) in
            [("web", "GET /items/*", false), ("web", "POST /items/*", true), ("x", "GET /items/*", true)]
        {
            let caller = format!("spiffe://shop.example/{caller}");
            assert_eq!(known.is_new(Edge::new(&caller, way)), is_new, "{caller} {way}");
        }
    }

    #[test]
    fn a_flood_of_denials_is_kept_in_full_and_reported_in_part() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = start(dir.path(), 0);
        let deny = denied();
        for at_ms in 0..1500 {
            running.worker.record(&Asked::new("/").decided(&deny, at_ms)).unwrap();
        }
        let report = running.reported(|report| report.shed > 0);
        assert_eq!((report.records_json.len(), report.shed), (1000, 500));
        assert_eq!(running.read(all()).len(), 1500);
        assert_eq!(running.sink.reader().counts().unreported, 500);
    }

    #[test]
    fn reports_wait_for_room_and_say_everything_once() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, mut reports) = mpsc::channel(1);
        let config = SinkConfig { instance: instance(), dir: dir.path().into(), bytes_max: 0, worker_count: 2 };
        let (sink, workers) = Sink::start(config, sender).unwrap();
        let deny = denied();
        for at_ms in 0..30 {
            workers[at_ms as usize % 2].record(&Asked::new("/").decided(&deny, at_ms)).unwrap();
            sink.reader().shared.flush();
        }
        drop(sink);
        let mut count = 0;
        while let Ok(report) = reports.try_recv() {
            count += report.records_json.len();
        }
        assert_eq!(count, 1, "one report had room; the rest was not sent, and nothing blocked");
    }

    #[test]
    fn a_committed_record_is_written_when_its_exchange_goes_on_and_waits_for_no_batch() {
        let dir = tempfile::tempdir().unwrap();
        let running = start(dir.path(), 0);
        let (asked, decision) = (Asked::new("/"), permitted(&[]));
        let begun = Instant::now();
        for at_ms in 1..=50 {
            running.worker.commit(&asked.decided(&decision, at_ms)).unwrap().blocking_recv().unwrap();
            let kept = segment::read(dir.path(), &instance(), &all()).unwrap();
            assert_eq!(kept.len() as u64, at_ms);
        }
        assert!(begun.elapsed() < Duration::from_millis(500), "{:?} for 50 commits", begun.elapsed());
    }

    #[test]
    fn a_record_whose_write_fails_is_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let (records, moved) = (dir.path().join("records"), dir.path().join("moved"));
        let running = start(&records, 0);
        let (asked, decision) = (Asked::new(&format!("/{}", "x".repeat(50_000))), permitted(&[]));
        let commit = |at_ms| running.worker.commit(&asked.decided(&decision, at_ms));
        commit(1).unwrap().blocking_recv().unwrap();
        fs::rename(&records, &moved).unwrap();
        fs::write(&records, "a file stands where the directory was").unwrap();
        let waiting: Vec<_> = (2..=4).map(commit).collect(); // the segment takes one more of them
        let committed = waiting.into_iter().filter_map(|wait| wait.ok()?.blocking_recv().ok()).count() as u64;
        assert_eq!(commit(5).map(|_| ()), Err(Shed), "the sink knows that it fails");
        assert!(committed <= 1, "{committed} were committed");
        let kept = segment::read(&moved, &instance(), &all()).unwrap().len() as u64;
        assert!((1 + committed..=2).contains(&kept), "{committed} were committed and {kept} kept");
    }

    #[test]
    fn a_directory_that_cannot_be_written_sheds_permits_reports_denials_and_heals() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("records");
        fs::write(&blocked, "a file stands where the directory should").unwrap();
        let mut running = start(&blocked, 0);
        let (permit, deny) = (permitted(&[]), denied());
        assert_eq!(
            running.worker.record(&Asked::new("/").decided(&permit, 1)),
            Err(Shed),
            "not even the first is taken"
        );
        assert!(running.sink.reader().counts().failing);
        assert_eq!(running.worker.record(&Asked::new("/").decided(&permit, 2)), Err(Shed));
        assert_eq!(running.worker.record(&Asked::new("/").decided(&deny, 3)), Err(Shed));
        let report = running.reported(|report| report.shed == 3);
        assert_eq!(report.records_json.len(), 1);
        fs::remove_file(&blocked).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while running.sink.reader().counts().failing && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        running.worker.record(&Asked::new("/").decided(&permit, 4)).unwrap();
        assert_eq!(running.read(all()).iter().map(|record| record.at_ms).collect::<Vec<_>>(), [4]);
        assert_eq!(fs::metadata(&blocked).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
