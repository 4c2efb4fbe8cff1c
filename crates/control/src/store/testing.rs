//! A store that fails on demand, twice over: what was written is lost, or kept and reported lost. Tests only.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use countersign_testkit::postgres;

use super::{
    postgres::{PostgresStore, PostgresUrl},
    sqlite::SqliteStore,
    *,
};

/// Runs `test` on an empty store of each sort.
pub fn on_each(test: impl Fn(&mut dyn Store)) {
    let dir = tempfile::tempdir().unwrap();
    test(&mut SqliteStore::open(&dir.path().join("control.db")).unwrap());
    let server = postgres::Server::start();
    test(&mut open_postgres(&server));
}

/// A store on `server`.
pub fn open_postgres(server: &postgres::Server) -> PostgresStore {
    PostgresStore::open(PostgresUrl::parse(&server.url()).unwrap()).unwrap()
}

const NONE: u8 = 0;
const LOSE: u8 = 1;
const KEEP: u8 = 2;
const FULL: u8 = 3;
const FREE: u8 = 4;

/// What goes wrong next.
#[derive(Clone, Default)]
pub struct Faults {
    append: Arc<AtomicU8>,
    look: Arc<AtomicU8>,
    reseal: Arc<AtomicU8>,
    disk: Arc<AtomicU8>,
}

/// The store with its faults.
pub struct Faulty<S> {
    inner: S,
    faults: Faults,
    limit: fn(&S, bool),
}

impl Faults {
    /// `inner`, with these faults.
    pub fn around(&self, inner: SqliteStore) -> Faulty<SqliteStore> {
        Faulty { inner, faults: self.clone(), limit: SqliteStore::limit_pages }
    }
    /// The next entry is not written.
    pub fn lose_next_append(&self) {
        self.append.store(LOSE, Ordering::Relaxed);
    }
    /// The next entry is written, and the answer lost.
    pub fn keep_next_append_but_report_it_lost(&self) {
        self.append.store(KEEP, Ordering::Relaxed);
    }
    /// The next look at the head or at entries fails.
    pub fn fail_next_look(&self) {
        self.look.store(LOSE, Ordering::Relaxed);
    }
    /// Nothing is sealed anew the next time that it is asked for.
    pub fn lose_next_reseal(&self) {
        self.reseal.store(LOSE, Ordering::Relaxed);
    }
    /// Everything is sealed anew the next time, and the answer lost.
    pub fn keep_next_reseal_but_report_it_lost(&self) {
        self.reseal.store(KEEP, Ordering::Relaxed);
    }
    /// The file cannot grow any more.
    pub fn fill_the_disk(&self) {
        self.disk.store(FULL, Ordering::Relaxed);
    }
    /// It can again.
    pub fn free_the_disk(&self) {
        self.disk.store(FREE, Ordering::Relaxed);
    }
}

fn lost() -> StoreError {
    StoreError::Full("a test".into())
}

impl<S: Store> Store for Faulty<S> {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn head(&mut self) -> Result<Option<StoredHead>, StoreError> {
        match self.faults.look.swap(NONE, Ordering::Relaxed) {
            NONE => self.inner.head(),
            _ => Err(lost()),
        }
    }
    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        match self.faults.look.swap(NONE, Ordering::Relaxed) {
            NONE => self.inner.entries(from, limit),
            _ => Err(lost()),
        }
    }
    fn append(&mut self, entry: &NewEntry) -> Result<(), StoreError> {
        match self.faults.disk.swap(NONE, Ordering::Relaxed) {
            FULL => (self.limit)(&self.inner, true),
            FREE => (self.limit)(&self.inner, false),
            _ => {}
        }
        match self.faults.append.swap(NONE, Ordering::Relaxed) {
            LOSE => Err(lost()),
            KEEP => self.inner.append(entry).and(Err(lost())),
            _ => self.inner.append(entry),
        }
    }
    fn bodies(&mut self, digests: &[Digest]) -> Result<Vec<(Digest, Arc<str>)>, StoreError> {
        self.inner.bodies(digests)
    }
    fn has_keys(&mut self) -> Result<bool, StoreError> {
        self.inner.has_keys()
    }
    fn key(&mut self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.key(name)
    }
    fn keys(&mut self, names: &[&str]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.inner.keys(names)
    }
    fn put_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<(), StoreError> {
        self.inner.put_keys(keys)
    }
    fn sealed(&mut self) -> Result<Vec<(SealedAt, Vec<u8>)>, StoreError> {
        self.inner.sealed()
    }
    fn reseal(&mut self, resealed: &[Resealed], notes: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        match self.faults.reseal.swap(NONE, Ordering::Relaxed) {
            LOSE => Err(lost()),
            KEEP => self.inner.reseal(resealed, notes).and(Err(lost())),
            _ => self.inner.reseal(resealed, notes),
        }
    }
    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError> {
        self.inner.put_invitation(hash, invitation, now_ms)
    }
    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError> {
        self.inner.spend_invitation(hash, host, now_ms)
    }
    fn put_codes(&mut self, codes: &StoredCodes) -> Result<(), StoreError> {
        self.inner.put_codes(codes)
    }
    fn codes(&mut self, operator: &OperatorName) -> Result<Vec<StoredCodes>, StoreError> {
        self.inner.codes(operator)
    }
    fn use_step(&mut self, factor: &FactorId, step: u64) -> Result<bool, StoreError> {
        self.inner.use_step(factor, step)
    }
    fn put_recovery(&mut self, factor: &FactorId, hashes: &[Digest]) -> Result<(), StoreError> {
        self.inner.put_recovery(factor, hashes)
    }
    fn spend_recovery(&mut self, factor: &FactorId, hash: &Digest) -> Result<bool, StoreError> {
        self.inner.spend_recovery(factor, hash)
    }
    fn forget_factors(&mut self, factors: &[FactorId]) -> Result<(), StoreError> {
        self.inner.forget_factors(factors)
    }
    fn count_guess(
        &mut self,
        operator: &OperatorName,
        now_ms: u64,
        since_ms: u64,
        guesses_max: u32,
    ) -> Result<Option<u64>, StoreError> {
        self.inner.count_guess(operator, now_ms, since_ms, guesses_max)
    }
    fn forget_guesses(&mut self, operator: &OperatorName) -> Result<(), StoreError> {
        self.inner.forget_guesses(operator)
    }
    fn put_operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        expires_at_ms: u64,
    ) -> Result<(), StoreError> {
        self.inner.put_operator_invitation(operator, hash, expires_at_ms)
    }
    fn operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        now_ms: u64,
        spend: bool,
    ) -> Result<bool, StoreError> {
        self.inner.operator_invitation(operator, hash, now_ms, spend)
    }
    fn put_proposal(&mut self, proposal: &StoredProposal, now_ms: u64) -> Result<bool, StoreError> {
        self.inner.put_proposal(proposal, now_ms)
    }
    fn replace_proposal(&mut self, proposal: &StoredProposal) -> Result<bool, StoreError> {
        self.inner.replace_proposal(proposal)
    }
    fn proposal(&mut self, id: &str) -> Result<Option<StoredProposal>, StoreError> {
        self.inner.proposal(id)
    }
    fn proposals(&mut self) -> Result<Vec<StoredProposal>, StoreError> {
        self.inner.proposals()
    }
    fn put_document(&mut self, document: &Document, now_ms: u64, max: u32) -> Result<bool, StoreError> {
        self.inner.put_document(document, now_ms, max)
    }
    fn swap_document(&mut self, kind: &str, key: &str, seen: &[u8], new: &Document) -> Result<bool, StoreError> {
        self.inner.swap_document(kind, key, seen, new)
    }
    fn document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.document(kind, key, now_ms)
    }
    fn take_document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.take_document(kind, key, now_ms)
    }
    fn documents(&mut self, kind: &str, now_ms: u64) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.inner.documents(kind, now_ms)
    }
    fn forget_documents(&mut self, kind: &str, keys: &[String]) -> Result<(), StoreError> {
        self.inner.forget_documents(kind, keys)
    }
    fn entitlements(&mut self) -> Result<Vec<(ServiceName, BTreeSet<ServiceName>)>, StoreError> {
        self.inner.entitlements()
    }
    fn hosts(&mut self) -> Result<Vec<StoredHost>, StoreError> {
        self.inner.hosts()
    }
    fn put_host(&mut self, host: &StoredHost) -> Result<(), StoreError> {
        self.inner.put_host(host)
    }
    fn instances(&mut self) -> Result<Vec<StoredInstance>, StoreError> {
        self.inner.instances()
    }
    fn put_instances(&mut self, replica: &str, instances: &[StoredInstance]) -> Result<(), StoreError> {
        self.inner.put_instances(replica, instances)
    }
    fn beat(&mut self, replica: &str, alive_ms: u64) -> Result<Vec<String>, StoreError> {
        self.inner.beat(replica, alive_ms)
    }
    fn is_shared(&self) -> bool {
        self.inner.is_shared()
    }
    fn create_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.inner.create_keys(keys)
    }
    fn swap_key(&mut self, name: &str, seen: &[u8], keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.inner.swap_key(name, seen, keys)
    }
    fn put_serial(&mut self, serial: &IssuedSerial) -> Result<(), StoreError> {
        self.inner.put_serial(serial)
    }
    fn put_report(&mut self, records: &[DecisionRecord], edges: &[EdgeCount], now_ms: u64) -> Result<(), StoreError> {
        self.inner.put_report(records, edges, now_ms)
    }
    fn records(&mut self, filter: &RecordFilter) -> Result<Vec<DecisionRecord>, StoreError> {
        self.inner.records(filter)
    }
    fn callers(&mut self, service: &ServiceName, limit: u32) -> Result<Vec<Caller>, StoreError> {
        self.inner.callers(service, limit)
    }
}
