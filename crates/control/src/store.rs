//! Where the control plane keeps everything: the ledger, the texts it refers to, sealed keys, and the high-churn tables
//! beside it. One trait, so that another database is another implementation and one test-suite.
//!
//! The runtime never waits for a disk: a [`Storage`] owns a [`Store`] on a thread of its own and runs one job after the
//! other. No rule is decided here, and no secret is ever stored unsealed.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use tokio::sync::{mpsc, oneshot};

use countersign_api::local::{Caller, IdentityFilter, RecordFilter, RevokedBy, TokenFilter};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::{FactorId, InstanceId, OperatorName, ServiceName, SpiffeId},
    record::{DecisionRecord, EdgeCount},
    signal::{Revocation, Serial, Signal, SignalSeq, TokenRevocation, TokensMeant, statement::Statement},
    token::Claims,
};

use crate::{authority::seal::NotSealed, metrics::StoreLatency};

#[cfg(test)]
mod faults;
pub mod migrate;
pub mod postgres;
pub mod sqlite;
#[cfg(test)]
mod suite;
#[cfg(test)]
pub(crate) mod testing;

/// Jobs that may wait for the storage thread; more, and those who ask wait with them.
const JOBS_MAX: usize = 256;
/// Denials and step-ups that are kept; the oldest make room.
pub const RECORDS_MAX: u32 = 50_000;
/// Edges (caller, service, action) that are counted; the longest unseen make room.
pub const EDGES_MAX: u32 = 50_000;
/// Proposals that may wait at the same time.
pub const PROPOSALS_OPEN_MAX: u32 = 256;
/// Proposals that are kept, those that wait for nothing any more among them.
pub const PROPOSALS_MAX: u32 = 1_024;
/// Bytes that all proposals that wait may have together.
pub const PROPOSALS_OPEN_BYTES_MAX: u64 = 256 << 20;

/// Join tokens that may be open at the same time.
const INVITATIONS_MAX: u32 = 1_000;
/// Records that one question reads at most before its filter is satisfied.
const RECORDS_READ_MAX: u32 = RECORDS_MAX;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// One ledger entry as it lies on the disk; unverified until the ledger has folded it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEntry {
    /// Its position.
    pub index: u64,
    /// The exact bytes, as hashed.
    pub entry: Vec<u8>,
    /// The leaf hash written with it.
    pub leaf: Digest,
    /// The canonical change-set it names.
    pub change_set: Vec<u8>,
}

/// What is written, whole or not at all, when a change was admitted.
#[derive(Debug, Clone)]
pub struct NewEntry {
    /// Its position: the ledger's size before.
    pub index: u64,
    /// The exact bytes, as hashed.
    pub entry: Vec<u8>,
    /// Its leaf hash.
    pub leaf: Digest,
    /// The ledger's root with it.
    pub root: Digest,
    /// The new size and root, sealed.
    pub seal: Vec<u8>,
    /// The digest of the change-set.
    pub digest: Digest,
    /// The canonical change-set.
    pub change_set: Vec<u8>,
    /// The texts it brings.
    pub bodies: Vec<(Digest, Arc<str>)>,
}

/// The ledger's size and root as last written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredHead {
    /// Entries.
    pub size: u64,
    /// The Merkle root over them.
    pub root: Digest,
    /// Both, sealed: a file can be edited consistently, but not sealed again.
    pub seal: Vec<u8>,
}

/// A host that enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredHost {
    /// Its name.
    pub host: ServiceName,
    /// When it enrolled, in milliseconds since 1970.
    pub joined_at_ms: u64,
    /// When it was last heard, in milliseconds since 1970.
    pub heard_at_ms: u64,
    /// The version of its agent.
    pub version: String,
    /// How it isolates workloads.
    pub isolation: String,
    /// Why.
    pub isolation_note: String,
}

/// An instance that was in discovery when it was last written down: what a restarted control plane goes on from until
/// the agents have reported again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredInstance {
    /// Its id.
    pub instance: InstanceId,
    /// Its host.
    pub host: ServiceName,
    /// Its proxy's listener; empty while it is not let run.
    pub address: String,
    /// Whether its workload accepts connections.
    pub ready: bool,
    /// Its proxy's admin pages.
    pub admin: String,
    /// `namespace` or `none`.
    pub isolation: String,
    /// The control plane that its agent follows; empty where there is only one.
    pub replica: String,
    /// The revision that its proxy enforced when that was written.
    pub revision: Revision,
    /// Why its proxy could not take up a later one, or why it is not let run.
    pub error: Option<String>,
    /// What its command names, as its agent measured it.
    pub artifact: Option<Digest>,
    /// The signals that its proxy enforced when that was written: the number of the last one.
    pub signals: SignalSeq,
}

/// What the proxy of an instance enforces, as it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAcknowledgement {
    /// The instance.
    pub instance: InstanceId,
    /// The revision that its proxy enforces.
    pub revision: Revision,
    /// Why its proxy could not take up a later one.
    pub error: Option<String>,
    /// The signals that its proxy enforces: the number of the last one.
    pub signals: SignalSeq,
}

/// A certificate that was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedSerial {
    /// Its serial number.
    pub serial: Serial,
    /// Whom it names.
    pub id: SpiffeId,
    /// For which instance, if any.
    pub instance: Option<InstanceId>,
    /// The host that it was issued to, if any.
    pub host: Option<ServiceName>,
    /// SHA-256 of its key's SubjectPublicKeyInfo.
    pub key: Option<Digest>,
    /// When, in milliseconds since 1970.
    pub issued_at_ms: u64,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// The number of the root that it rests on.
    pub authority: u32,
}

/// A signal as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSignal {
    /// Its number.
    pub sequence: SignalSeq,
    /// What it says.
    pub signal: Signal,
    /// When, by whom and why.
    pub by: RevokedBy,
}

/// An access token that was issued: what it says, and nothing that could be shown for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredToken {
    /// What it says.
    pub claims: Claims,
    /// The host that it was issued to; none where a client asked for it.
    pub host: Option<ServiceName>,
}

/// Tokens that are revoked as a column holds them, beside serial numbers.
fn tokens_to_text(meant: &TokensMeant) -> String {
    format!("tokens:{meant}")
}

/// A statement as a column holds it: what no other of its kind, subject and source has.
fn statement_to_text(one: &Statement) -> String {
    format!("stated:{} {} {}", one.kind(), one.subject, one.source)
}

/// A signal as it was kept; `None` when this version does not know its kind.
fn signal_of_text(what: &str, statement: Option<&str>, expires_at_ms: u64, at_ms: u64) -> Option<Signal> {
    if what.starts_with("stated:") {
        return serde_json::from_str(statement?).ok().map(Signal::Stated);
    }
    Some(match what.strip_prefix("tokens:") {
        Some(meant) => {
            Signal::Tokens(TokenRevocation { meant: meant.parse().ok()?, issued_until_ms: at_ms, expires_at_ms })
        }
        None => Signal::Certificate(Revocation { serial: what.parse().ok()?, expires_at_ms }),
    })
}

/// An invitation as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInvitation {
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// The only host it is good for.
    pub host: Option<ServiceName>,
    /// The only services that the host may run.
    pub services: Option<BTreeSet<ServiceName>>,
}

/// What verifies the codes of an authenticator app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCodes {
    /// The factor's id.
    pub factor: FactorId,
    /// Whose it is.
    pub operator: OperatorName,
    /// The secret, sealed.
    pub sealed: Vec<u8>,
    /// The step of the last code that was accepted.
    pub last_step: u64,
}

/// A proposal as it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredProposal {
    /// Its id.
    pub id: String,
    /// How often it was written: whoever writes it names the count that they read.
    pub version: u64,
    /// When it is void, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// Whether it still waits for something.
    pub is_open: bool,
    /// All of it, JSON.
    pub document: Vec<u8>,
}

/// A small document beside the ledger, found by its kind and key: a session, a ceremony, a count of signatures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// What it is: `session`.
    pub kind: &'static str,
    /// Which: unique among those of its kind.
    pub key: String,
    /// All of it, JSON. Secrets are hashed or sealed in it.
    pub bytes: Vec<u8>,
    /// When it is void, in milliseconds since 1970; then it is read by nobody any more.
    pub expires_at_ms: u64,
}

/// Where something sealed lies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SealedAt {
    /// A key, by its name, which is also what it is sealed for.
    Key(String),
    /// What verifies the codes of a factor.
    Codes(FactorId),
    /// The ledger's size and root.
    Head,
}

/// One secret, sealed anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resealed {
    /// Where it lies.
    pub at: SealedAt,
    /// As it was.
    pub seen: Vec<u8>,
    /// As it is to be.
    pub next: Vec<u8>,
}

/// What a key is called that is no secret: a certificate.
pub const CERTIFICATE_SUFFIX: &str = "/certificate";
/// The beginning of what a key is called that is no secret: a note.
pub const NOTE_PREFIX: &str = "note/";

/// What became of the attempt to use a join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spent {
    /// It was good and is used up now. The host may run these services; every declared one when absent.
    Admitted(Option<BTreeSet<ServiceName>>),
    /// No such token was ever given out (or it was long ago).
    Unknown,
    /// It was used before.
    Used,
    /// Its time is over.
    Expired,
    /// It is good for another host only, and still is.
    OtherHost,
}

/// Why the store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No room is left on the device.
    #[error("no space is left for `{0}`")]
    Full(String),
    /// The files cannot be written.
    #[error("`{0}` is read-only")]
    ReadOnly(String),
    /// The file is not what was written.
    #[error("`{path}` is damaged: {what}")]
    Damaged {
        /// The file.
        path: String,
        /// What does not add up.
        what: String,
    },
    /// It was written by a later version.
    #[error("`{path}` has schema version {found}, this version knows {known}")]
    Newer {
        /// The file.
        path: String,
        /// The version found.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// Another entry stands at this position.
    #[error("entry {0} exists already")]
    Taken(u64),
    /// The key-encryption key did not seal what was to be written.
    #[error("nothing was written: {0}")]
    NotSealed(#[from] NotSealed),
    /// The database cannot be reached, or does not answer.
    #[error("the database `{place}` is away: {why}")]
    Away {
        /// Which.
        place: String,
        /// What happened.
        why: String,
    },
    /// Anything else the database says.
    #[error("the store failed: {0}")]
    Failed(String),
    /// The storage thread ended.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Full(_) => "free some space; nothing that was acknowledged is lost and nothing has to be restarted",
            Self::ReadOnly(_) => "make the data directory writable for this user; reads go on meanwhile",
            Self::Damaged { .. } => "restore the data directory from a copy, or start with a new one and apply again",
            Self::Newer { .. } => "run the version of countersign that wrote it, or a later one",
            Self::Taken(_) => "plan again on the current revision",
            Self::Away { .. } => {
                "start the database, or mend the way to it; proxies go on meanwhile, and what was acknowledged is kept"
            }
            Self::NotSealed(_) => "is the token there, and its service running? its module's own log says more",
            Self::Failed(_) | Self::Closed => "see the control plane's log; `countersign doctor` checks the files",
        }
    }
}

/// A database of the control plane. Every call is whole or not at all, and durable when it returns.
pub trait Store: Send {
    /// Where it is, for people.
    fn place(&self) -> String;
    /// Whether other control planes may write to it too.
    fn is_shared(&self) -> bool;

    /// The size and root written with the last entry; `None` while there is none.
    fn head(&mut self) -> Result<Option<StoredHead>, StoreError>;
    /// Entries with their change-sets, in order, at most `limit` from index `from`.
    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError>;
    /// Writes one entry, its texts and the new head. [`StoreError::Taken`] when the position is not free.
    fn append(&mut self, entry: &NewEntry) -> Result<(), StoreError>;
    /// The texts of `digests`; those that are missing are left out. Not verified.
    fn bodies(&mut self, digests: &[Digest]) -> Result<Vec<(Digest, Arc<str>)>, StoreError>;

    /// Whether any key is kept: then the key-encryption key must be the one that sealed it.
    fn has_keys(&mut self) -> Result<bool, StoreError>;
    /// A sealed secret or a public certificate of the authority.
    fn key(&mut self, name: &str) -> Result<Option<Vec<u8>>, StoreError>;
    /// Several of them as they are at one moment.
    fn keys(&mut self, names: &[&str]) -> Result<Vec<Option<Vec<u8>>>, StoreError>;
    /// Keeps several of them at once.
    fn put_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<(), StoreError>;

    /// Keeps several at once if none of them is there; false, and nothing is kept, when one is: then somebody else was first.
    fn create_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<bool, StoreError>;
    /// Keeps `keys` if what is kept as `name` is still what was `seen`; false when somebody else was faster.
    fn swap_key(&mut self, name: &str, seen: &[u8], keys: &[(&str, &[u8])]) -> Result<bool, StoreError>;

    /// Everything sealed that it keeps: keys under their names other than certificates and notes, what verifies codes, the head.
    fn sealed(&mut self) -> Result<Vec<(SealedAt, Vec<u8>)>, StoreError>;
    /// Puts `next` in the place of `seen`, all of them at once and with `notes` among the keys; false, and nothing is done, when
    /// what is kept sealed is not exactly what was seen.
    fn reseal(&mut self, resealed: &[Resealed], notes: &[(&str, &[u8])]) -> Result<bool, StoreError>;

    /// Keeps an invitation by the hash of its secret; false when too many are open.
    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError>;
    /// Uses an invitation up, if it is good for `host` now, and notes in the same step what the host may run.
    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError>;

    /// Keeps what verifies an authenticator app's codes.
    fn put_codes(&mut self, codes: &StoredCodes) -> Result<(), StoreError>;
    /// What verifies the codes of `operator`.
    fn codes(&mut self, operator: &OperatorName) -> Result<Vec<StoredCodes>, StoreError>;
    /// Notes that a code of `step` is used; false when it, or a later one, was used before.
    fn use_step(&mut self, factor: &FactorId, step: u64) -> Result<bool, StoreError>;
    /// Keeps the hashes of recovery codes.
    fn put_recovery(&mut self, factor: &FactorId, hashes: &[Digest]) -> Result<(), StoreError>;
    /// Uses a recovery code up; false when there is no such code (any more).
    fn spend_recovery(&mut self, factor: &FactorId, hash: &Digest) -> Result<bool, StoreError>;
    /// Forgets what verifies these factors.
    fn forget_factors(&mut self, factors: &[FactorId]) -> Result<(), StoreError>;
    /// Counts one more code that is tried for `operator`; when too many were tried since `since_ms`, counts nothing and says
    /// when the oldest of them was.
    fn count_guess(
        &mut self,
        operator: &OperatorName,
        now_ms: u64,
        since_ms: u64,
        guesses_max: u32,
    ) -> Result<Option<u64>, StoreError>;
    /// Forgets what was tried: the right code came.
    fn forget_guesses(&mut self, operator: &OperatorName) -> Result<(), StoreError>;
    /// Keeps the hash of what an invited operator was handed, in place of an earlier one.
    fn put_operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        expires_at_ms: u64,
    ) -> Result<(), StoreError>;
    /// Whether `hash` is of what `operator` was handed, and not too late; used up when `spend`.
    fn operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        now_ms: u64,
        spend: bool,
    ) -> Result<bool, StoreError>;

    /// Adds a proposal, and forgets the oldest of those that wait for nothing; false when too many wait.
    fn put_proposal(&mut self, proposal: &StoredProposal, now_ms: u64) -> Result<bool, StoreError>;
    /// Replaces the proposal that has this id and the version before; false when somebody else did.
    fn replace_proposal(&mut self, proposal: &StoredProposal) -> Result<bool, StoreError>;
    /// A proposal.
    fn proposal(&mut self, id: &str) -> Result<Option<StoredProposal>, StoreError>;
    /// All proposals, newest first.
    fn proposals(&mut self) -> Result<Vec<StoredProposal>, StoreError>;

    /// Adds a document; false when one of its kind and key is there, or `max` of its kind are. Those that are void make room.
    fn put_document(&mut self, document: &Document, now_ms: u64, max: u32) -> Result<bool, StoreError>;
    /// Puts `bytes` in the place of `seen`, if that is what it still holds; false when somebody else was faster.
    fn swap_document(&mut self, kind: &str, key: &str, seen: &[u8], new: &Document) -> Result<bool, StoreError>;
    /// What a document holds, unless it is void.
    fn document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError>;
    /// The same, and forgets it: of several who ask, one gets it.
    fn take_document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError>;
    /// All of a kind that are not void, by key.
    fn documents(&mut self, kind: &str, now_ms: u64) -> Result<Vec<(String, Vec<u8>)>, StoreError>;
    /// Forgets some of a kind.
    fn forget_documents(&mut self, kind: &str, keys: &[String]) -> Result<(), StoreError>;

    /// The hosts that may run some services only, with those.
    fn entitlements(&mut self) -> Result<Vec<(ServiceName, BTreeSet<ServiceName>)>, StoreError>;

    /// Every host that enrolled.
    fn hosts(&mut self) -> Result<Vec<StoredHost>, StoreError>;
    /// Adds or replaces a host.
    fn put_host(&mut self, host: &StoredHost) -> Result<(), StoreError>;

    /// The instances last written down.
    fn instances(&mut self) -> Result<Vec<StoredInstance>, StoreError>;
    /// Replaces those of one control plane, and takes over those of others that it names.
    fn put_instances(&mut self, replica: &str, instances: &[StoredInstance]) -> Result<(), StoreError>;
    /// Notes what proxies enforce whose instances are written down as this control plane's; of others it says nothing.
    fn put_acknowledgements(&mut self, replica: &str, given: &[StoredAcknowledgement]) -> Result<(), StoreError>;
    /// What the proxies of all instances enforce that are not this control plane's.
    fn acknowledgements(&mut self, replica: &str) -> Result<Vec<StoredAcknowledgement>, StoreError>;
    /// Notes that this control plane runs, and names the others that did within `alive_ms`, by the clock of the store.
    fn beat(&mut self, replica: &str, alive_ms: u64) -> Result<Vec<String>, StoreError>;

    /// Notes a certificate before it is handed out, and forgets those that expired a day ago.
    fn put_serial(&mut self, serial: &IssuedSerial) -> Result<(), StoreError>;
    /// Certificates that `filter` asks for and that have not expired at `now_ms`, the newest first, at most `limit`.
    fn serials(&mut self, filter: &IdentityFilter, now_ms: u64, limit: u32) -> Result<Vec<IssuedSerial>, StoreError>;

    /// Gives each certificate that is not revoked yet the next number, and forgets those that have expired; returns the number of
    /// the last signal. `None`, and nothing is done, when more than `max` would be revoked.
    fn put_revocations(
        &mut self,
        revoked: &[Revocation],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError>;
    /// Revokes the access tokens that are meant and were issued until `by` says; `expires_at_ms` is when the last of them expires. Returns
    /// the number of the signal, and what it means: every token, in place of all that is revoked, when that would be more than `max`.
    fn put_token_revocation(
        &mut self,
        meant: &TokensMeant,
        expires_at_ms: u64,
        by: &RevokedBy,
        max: u32,
    ) -> Result<(SignalSeq, TokensMeant), StoreError>;
    /// Gives each statement the next number, in place of what its source said of the same before and later than that, and forgets those
    /// that have ended; returns the number of the last signal. `None`, and nothing is done, when more than `max` would be kept.
    fn put_statements(
        &mut self,
        statements: &[Statement],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError>;
    /// Notes access tokens before they are handed out, and forgets those that have expired.
    fn put_tokens(&mut self, tokens: &[StoredToken], now_ms: u64) -> Result<(), StoreError>;
    /// Access tokens that `filter` asks for and that have not expired at `now_ms`, the newest first, at most `limit`.
    fn tokens(&mut self, filter: &TokenFilter, now_ms: u64, limit: u32) -> Result<Vec<StoredToken>, StoreError>;
    /// Signals after a number, in their order. The last one is kept even when it has ended.
    fn signals(&mut self, after: SignalSeq) -> Result<Vec<StoredSignal>, StoreError>;

    /// Keeps denials and step-ups, and adds to the edges.
    fn put_report(&mut self, records: &[DecisionRecord], edges: &[EdgeCount], now_ms: u64) -> Result<(), StoreError>;
    /// Kept records that `filter` asks for, newest first.
    fn records(&mut self, filter: &RecordFilter) -> Result<Vec<DecisionRecord>, StoreError>;
    /// Who called `service`, most permitted first, at most `limit`.
    fn callers(&mut self, service: &ServiceName, limit: u32) -> Result<Vec<Caller>, StoreError>;
}

/// As a column holds them: a JSON array.
fn names_to_text(names: &BTreeSet<ServiceName>) -> Result<String, StoreError> {
    serde_json::to_string(names).map_err(|e| StoreError::Failed(e.to_string()))
}

type Job = Box<dyn FnOnce(&mut dyn Store) + Send>;

/// The door to the store for tasks: jobs run one after the other on one thread.
#[derive(Clone)]
pub struct Storage {
    jobs: mpsc::Sender<Job>,
    latency: StoreLatency,
    place: Arc<str>,
    is_shared: bool,
}

impl Storage {
    /// Starts the storage thread.
    pub fn start(mut store: Box<dyn Store>, latency: StoreLatency) -> std::io::Result<Self> {
        let (jobs, mut waiting) = mpsc::channel::<Job>(JOBS_MAX);
        let (place, is_shared) = (store.place().into(), store.is_shared());
        std::thread::Builder::new().name("countersign-store".into()).spawn(move || {
            while let Some(job) = waiting.blocking_recv() {
                job(&mut *store);
            }
        })?;
        Ok(Self { jobs, latency, place, is_shared })
    }

    /// Where the store is, for people.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether other control planes may write to it too.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Runs `job` on the storage thread. The job runs to its end even when the caller stops waiting.
    pub async fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        job: impl FnOnce(&mut dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (done, answer) = oneshot::channel();
        let latency = self.latency.clone();
        let job: Job = Box::new(move |store| {
            let began = Instant::now();
            let result = job(store);
            latency.observe(name, began.elapsed());
            // The caller may be gone; what was written stays written.
            let _ = done.send(result);
        });
        self.jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}
