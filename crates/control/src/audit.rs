//! The audit trail: what operators did and were refused, what was read about people, and which identities were issued, as lines of a
//! file that other tools read. What is an event is said here, how it is written in [`ocsf`], where it goes in [`file`].
//!
//! Whoever tells an event does not wait for the disk, with one exception: nothing sensitive is read before the line that says so is on
//! the disk. An event names people, acts, factors and revisions. No code, token, key or text of a policy is in one.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use countersign_api::local::{Problem, SessionKind};
use countersign_core::{
    assurance::FactorKind,
    canonical::Digest,
    change::{Change, RoleName},
    gate::act::Act,
    identity::{FactorId, OperatorName},
    state::MeshState,
};

use crate::{Plane, gate::Petitioner, local_api::problem};

mod file;
mod ocsf;

pub use file::AuditError;
use file::TrailFile;

/// Its name below the data directory unless told otherwise.
pub const AUDIT_FILE: &str = "audit.jsonl";
/// Events that wait for the disk at most; more are lost, and counted.
const WAITING_MAX: usize = 4_096;
/// Events that are written at once.
const BATCH_MAX: usize = 256;
/// Longest text of ours or of a stranger in an event, in characters.
const TEXT_CHARS_MAX: usize = 256;

/// Something that is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The control plane serves.
    Started,
    /// It ends.
    Stopped,
    /// Events found no room, or no disk.
    Lost {
        /// How many.
        count: u64,
    },
    /// A session was opened.
    SignedIn {
        /// An operator, or somebody whom a provider vouched for.
        who: String,
        /// The beginning of its id.
        session: String,
        /// The kind of a factor, or `provider`.
        with: &'static str,
        address: IpAddr,
        held_by: SessionKind,
    },
    /// None was.
    SignInRefused { who: Option<String>, address: IpAddr, why: String },
    /// A session was ended before its time.
    SignedOut { who: String, session: String, by: By },
    /// What somebody showed was not what an operator has.
    FactorRefused { operator: OperatorName, factor: FactorKind, why: String },
    /// A key showed a count that it had shown before.
    KeyCloned { operator: OperatorName },
    /// What is the operators' was changed, by an entry.
    OperatorChanged { operator: OperatorName, how: How, by: String, revision: u64 },
    /// The gate let an act pass.
    Passed { operator: OperatorName, act: Act, from: From },
    /// It did not.
    NotPassed { who: String, act: Act, from: From, why: String },
    /// A change-set became an entry.
    Changed { actor: String, revision: u64, digest: String, kinds: Vec<&'static str> },
    /// The gate denied one.
    ChangeDenied { actor: String, digest: String, why: String },
    /// The mesh was recovered past its gate.
    Recovered { operator: OperatorName, reason: String, revision: u64 },
    /// An identity was signed.
    Issued { what: Identity, name: String, host: String, expires_at_ms: u64 },
    /// Identities were made good for nothing.
    Revoked {
        by: String,
        reason: String,
        signal: u64,
        count: usize,
        /// Whose, the first of them.
        names: Vec<String>,
    },
    /// Nothing was verified for long of what the sidecar of an instance should tell.
    TelemetrySilent { instance: String, host: String, since_ms: u64 },
    /// A root of the trust domain was prepared, or moved on; by an operator or by the schedule.
    AuthorityStepped { by: String, step: &'static str, number: u32, sha256: Digest, cut: usize },
    /// Another key signs tokens of one kind.
    KeyReplaced { by: String, keys: &'static str, key_id: String, compromised: bool },
    /// Access tokens were made good for nothing.
    TokensRevoked { by: String, reason: String, signal: u64, meant: String },
    /// Something was said of a workload, a host or an operator, or taken back.
    Stated { by: String, reason: String, signal: u64, subject: String, kind: &'static str, value: String },
    /// An access token was shown by somebody whose it is not.
    TokenStolen { id: String, subject: String, shown_by: String, origin: String, fault: &'static str, decision: String },
    /// A join token was shown a second time; the host that joined by it was evicted.
    JoinTokenReused { host: String, evicted: Option<String> },
    /// A host is part of the mesh no longer.
    HostEvicted { by: String, reason: String, host: String, identities: usize },
}

/// What happened to an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    Invited(Vec<RoleName>),
    RolesSet(Vec<RoleName>),
    Removed,
    FactorAdded(FactorId, FactorKind),
    FactorRemoved(FactorId),
}

/// An identity of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    Workload,
    Jwt,
    Agent,
}

/// Who ended a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// Somebody who is signed in.
    SignedIn(String),
    /// The provider that had vouched for them.
    Provider(String),
    /// The mesh's own user, at the socket.
    Socket,
}

/// From where an act is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// The mesh's own user, at the socket.
    Socket,
    /// Somebody who is signed in.
    Session { address: IpAddr, session: String },
}

/// Where events are told. Without a file they are told to nobody.
#[derive(Default)]
pub struct Audit {
    writer: Option<Writer>,
}

struct Writer {
    queue: SyncSender<Job>,
    shared: Arc<Shared>,
}

/// What the writing thread and those who tell share.
#[derive(Default)]
struct Shared {
    /// Events that were not written and are not said to be lost yet.
    lost: AtomicU64,
    /// Why nothing can be written now.
    failing: Mutex<Option<String>>,
}

struct Job {
    at_ms: u64,
    event: Event,
    /// Is told once it is on the disk, or why it is not.
    kept: Option<oneshot::Sender<Result<(), String>>>,
}

impl Audit {
    /// Opens the trail at `path`, and writes it from a thread of its own.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let (file, shared) = (TrailFile::open(path)?, Arc::new(Shared::default()));
        let (queue, jobs) = sync_channel(WAITING_MAX);
        let of = shared.clone();
        let spawned = thread::Builder::new().name("audit".to_owned()).spawn(move || write(file, &jobs, &of));
        spawned.map_err(|source| AuditError::new(path, "could not be written: no thread could be started", source))?;
        Ok(Self { writer: Some(Writer { queue, shared }) })
    }

    /// Tells it, and waits for nothing.
    pub fn tell(&self, at_ms: u64, event: Event) {
        if let Some(writer) = &self.writer {
            writer.put(Job { at_ms, event, kept: None });
        }
    }

    /// Tells it, and returns once it is on the disk.
    ///
    /// INVARIANT (read-once-written): nothing sensitive is read before the line that says who reads it is on the disk.
    pub async fn keep(&self, at_ms: u64, event: Event) -> Result<(), Problem> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let (kept, told) = oneshot::channel();
        writer.put(Job { at_ms, event, kept: Some(kept) });
        let lost = || Err("too much waits to be written".to_owned());
        told.await.unwrap_or_else(|_| lost()).map_err(|why| {
            let help = "make room for the audit trail, or name another place with --audit-log; nothing was shown";
            problem(503, "the audit trail cannot be written, and nothing is read unwritten", Some(why), Some(help))
        })
    }

    /// Why nothing can be written now.
    pub fn failing(&self) -> Option<String> {
        self.writer.as_ref()?.shared.failing.lock().clone()
    }
}

impl Writer {
    fn put(&self, job: Job) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send(job) {
            self.shared.lost.fetch_add(1, Relaxed);
        }
    }
}

/// Writes what comes until nobody tells any more.
fn write(mut file: TrailFile, jobs: &Receiver<Job>, shared: &Shared) {
    let mut sequence = 0;
    while let Ok(first) = jobs.recv() {
        let batch: Vec<Job> = std::iter::once(first).chain(jobs.try_iter().take(BATCH_MAX - 1)).collect();
        let lost = shared.lost.swap(0, Relaxed);
        let said = (lost > 0).then(|| (batch[0].at_ms, Event::Lost { count: lost }));
        let events = said.iter().map(|(at_ms, event)| (*at_ms, event));
        let mut lines = Vec::new();
        for (at_ms, event) in events.chain(batch.iter().map(|job| (job.at_ms, &job.event))) {
            serde_json::to_writer(&mut lines, &ocsf::event(event, at_ms, sequence)).expect("INVARIANT: it is JSON");
            lines.push(b'\n');
            sequence += 1;
        }
        let written = file.append(&lines).map_err(|error| crate::error_chain(&error));
        let mut failing = shared.failing.lock();
        match &written {
            Ok(()) => {
                if failing.take().is_some() {
                    tracing::warn!("the audit trail is written again");
                }
            }
            Err(why) => {
                shared.lost.fetch_add(lost + batch.len() as u64, Relaxed);
                // Said once, and in every answer of `status` as long as it lasts.
                if failing.replace(why.clone()).is_none() {
                    tracing::error!(%why, "the audit trail cannot be written; what is sensitive is not read meanwhile");
                }
            }
        }
        drop(failing);
        for kept in batch.into_iter().filter_map(|job| job.kept) {
            // Who asked may have gone.
            let _ = kept.send(written.clone());
        }
    }
}

/// Who asks, as an event names them.
pub fn author_of(petitioner: &Petitioner) -> String {
    petitioner.author.as_ref().map_or_else(|| "local".to_owned(), ToString::to_string)
}

/// Tells of a change-set that became an entry, and of each operator whom it changed.
pub fn tell_change(plane: &Plane, changes: &[Change], before: &MeshState, actor: &str, revision: u64, digest: &Digest) {
    let kinds: BTreeSet<&'static str> = changes.iter().map(Change::kind).collect();
    let (kinds, digest) = (kinds.into_iter().collect(), digest.to_string());
    plane.tell(Event::Changed { actor: actor.to_owned(), revision, digest, kinds });
    for (operator, how) in changes.iter().filter_map(|change| of_change(change, before)) {
        plane.tell(Event::OperatorChanged { operator, how, by: actor.to_owned(), revision });
    }
}

/// What a change of operators is called; nothing for other changes.
fn of_change(change: &Change, before: &MeshState) -> Option<(OperatorName, How)> {
    let roles = |roles: &BTreeSet<RoleName>| roles.iter().cloned().collect();
    Some(match change {
        Change::InviteOperator { name, roles: given } => (name.clone(), How::Invited(roles(given))),
        Change::SetOperatorRoles { name, roles: given } => (name.clone(), How::RolesSet(roles(given))),
        Change::RemoveOperator { name } => (name.clone(), How::Removed),
        Change::EnrollOperator { name: operator, id, factor } | Change::AddFactor { operator, id, factor } => {
            (operator.clone(), How::FactorAdded(id.clone(), factor.kind()))
        }
        Change::RemoveFactor { operator, id } if before.operators.contains_key(operator) => {
            (operator.clone(), How::FactorRemoved(id.clone()))
        }
        _ => return None,
    })
}

/// What stands in an event of a longer text.
pub fn cut(text: impl Into<String>) -> String {
    let mut text = text.into();
    if let Some((end, _)) = text.char_indices().nth(TEXT_CHARS_MAX) {
        text.truncate(end);
    }
    text
}

/// The part of a session's id by which it is told apart.
pub fn short(session: &str) -> String {
    session.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn passed() -> Event {
        let operator = OperatorName::parse("alice").unwrap();
        Event::Passed { operator, act: Act::ReadDecisions, from: From::Socket }
    }

    /// PROVES (read-once-written)
    #[tokio::test]
    async fn without_a_disk_nothing_sensitive_is_read_and_what_was_lost_is_said_when_it_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        audit.keep(1, Event::Started).await.unwrap();
        // A directory stands in its place: no line can be written.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        audit.tell(2, Event::Stopped);
        let refused = audit.keep(3, passed()).await.unwrap_err();
        assert_eq!(refused.status, 503);
        assert!(refused.detail.unwrap().contains("audit.jsonl"));
        assert!(refused.help.unwrap().contains("--audit-log"));
        assert!(audit.failing().unwrap().contains("could not be opened"));
        fs::remove_dir(&path).unwrap();
        audit.keep(4, passed()).await.unwrap();
        assert_eq!(audit.failing(), None);
        let lines = lines(&path);
        assert_eq!(lines[0]["unmapped"]["events_lost"], 2, "{lines:?}");
        assert_eq!(lines[1]["message"], "an act passed the gate");
        assert_eq!((&lines[1]["time"], &lines[1]["api"]["operation"]), (&4.into(), &"read_decisions".into()));
    }

    #[tokio::test]
    async fn every_event_is_one_line_with_what_its_class_demands_whatever_strangers_wrote() {
        const HOSTILE: &str = "x\n{\"class_uid\":1}\r\u{1b}[2J\u{2028}";
        let (operator, address) = (|| OperatorName::parse("alice").unwrap(), "192.0.2.7".parse().unwrap());
        let (factor, session) = (FactorKind::Totp, "0123456789ab".to_owned());
        let from = From::Session { address, session: session.clone() };
        let id = FactorId::parse("totp-1").unwrap();
        let changed = |how| Event::OperatorChanged { operator: operator(), how, by: "bob".into(), revision: 7 };
        let issued = |what| Event::Issued { what, name: "web/1".into(), host: "h".into(), expires_at_ms: 9 };
        let events = vec![
            Event::Started,
            Event::Stopped,
            Event::Lost { count: 3 },
            Event::SignedIn {
                who: "alice".into(),
                session: session.clone(),
                with: factor.as_str(),
                address,
                held_by: SessionKind::Browser,
            },
            Event::SignInRefused { who: None, address, why: cut(HOSTILE) },
            Event::SignInRefused { who: Some("alice".into()), address, why: cut(HOSTILE.repeat(100)) },
            Event::SignedOut { who: "alice".into(), session: session.clone(), by: By::SignedIn("bob".into()) },
            Event::SignedOut { who: "corp:1".into(), session: session.clone(), by: By::Provider(HOSTILE.into()) },
            Event::SignedOut { who: "alice".into(), session, by: By::Socket },
            Event::FactorRefused { operator: operator(), factor, why: "wrong".into() },
            Event::KeyCloned { operator: operator() },
            changed(How::Invited(vec!["owner".into()])),
            changed(How::RolesSet(vec!["owner".into(), "editor".into()])),
            changed(How::Removed),
            changed(How::FactorAdded(id.clone(), factor)),
            changed(How::FactorRemoved(id)),
            Event::Passed { operator: operator(), act: Act::InviteHost, from: from.clone() },
            Event::NotPassed { who: "alice".into(), act: Act::ExportLedger, from, why: "no".into() },
            Event::Changed { actor: "alice".into(), revision: 7, digest: "d".into(), kinds: vec!["set_policy"] },
            Event::ChangeDenied { actor: "alice".into(), digest: "d".into(), why: "no".into() },
            Event::Recovered { operator: operator(), reason: HOSTILE.into(), revision: 8 },
            issued(Identity::Workload),
            issued(Identity::Jwt),
            issued(Identity::Agent),
            Event::Revoked {
                by: "alice".into(),
                reason: "laptop stolen".into(),
                signal: 1,
                count: 2,
                names: vec!["web/1".into()],
            },
            Event::TelemetrySilent { instance: "web/1".into(), host: "h".into(), since_ms: 9 },
            Event::AuthorityStepped {
                by: "schedule".into(),
                step: "prepare",
                number: 2,
                sha256: Digest::of(b"root"),
                cut: 0,
            },
            Event::KeyReplaced { by: "alice".into(), keys: "tokens", key_id: "k".into(), compromised: true },
            Event::TokensRevoked { by: "alice".into(), reason: HOSTILE.into(), signal: 2, meant: "all".into() },
            Event::Stated {
                by: "operator:alice".into(),
                reason: HOSTILE.into(),
                signal: 3,
                subject: "workload:web".into(),
                kind: "risk",
                value: "80".into(),
            },
            Event::TokenStolen {
                id: "01".into(),
                subject: "spiffe://shop.example/web".into(),
                shown_by: "spiffe://shop.example/cron".into(),
                origin: "10.0.0.9".into(),
                fault: "another_key",
                decision: "02".into(),
            },
            Event::JoinTokenReused { host: "h".into(), evicted: Some("h".into()) },
            Event::HostEvicted { by: "alice".into(), reason: HOSTILE.into(), host: "h".into(), identities: 2 },
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        let count = events.len();
        for event in events {
            audit.keep(1_790_000_000_000, event).await.unwrap();
        }
        let lines = lines(&path);
        assert_eq!(lines.len(), count);
        for (n, line) in lines.iter().enumerate() {
            assert_eq!(line["metadata"]["sequence"], n);
            assert_eq!(
                line["type_uid"],
                line["class_uid"].as_u64().unwrap() * 100 + line["activity_id"].as_u64().unwrap()
            );
            // What the schema asks of each class, beside what it asks of all.
            let demanded: &[&str] = match line["class_uid"].as_u64().unwrap() {
                3001 | 3005 => &["user"],
                3002 => &["user", "service"],
                3004 => &["entity"],
                6002 => &["app"],
                6003 => &["actor", "api", "src_endpoint"],
                other => panic!("{other}"),
            };
            for member in demanded.iter().chain(&["time", "category_uid", "severity_id", "metadata"]) {
                assert!(!line[member].is_null(), "{member} of {line}");
            }
            assert!(line.to_string().len() < 4_096, "{line}");
        }
    }
}
