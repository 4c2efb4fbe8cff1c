//! A store that fails on demand, twice over: what was written is lost, or kept and reported lost. Tests only.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use countersign_testkit::postgres;
use parking_lot::Mutex;

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

/// What becomes of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is written.
    Lost,
    /// It is written, and the answer lost.
    Kept,
}

/// What is done to the disk.
#[derive(Clone, Copy)]
enum Disk {
    Fill,
    Free,
}

/// What goes wrong next.
#[derive(Clone, Default)]
pub struct Faults {
    write: Arc<Mutex<Option<(&'static str, Fault)>>>,
    look: Arc<AtomicBool>,
    disk: Arc<Mutex<Option<Disk>>>,
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
    /// The next write of that name fails so.
    pub fn next(&self, write: &'static str, fault: Fault) {
        *self.write.lock() = Some((write, fault));
    }
    /// The next entry is not written.
    pub fn lose_next_append(&self) {
        self.next("append", Fault::Lost);
    }
    /// The next entry is written, and the answer lost.
    pub fn keep_next_append_but_report_it_lost(&self) {
        self.next("append", Fault::Kept);
    }
    /// The next look at the head or at entries fails.
    pub fn fail_next_look(&self) {
        self.look.store(true, Ordering::Relaxed);
    }
    /// Nothing is sealed anew the next time that it is asked for.
    pub fn lose_next_reseal(&self) {
        self.next("reseal", Fault::Lost);
    }
    /// Everything is sealed anew the next time, and the answer lost.
    pub fn keep_next_reseal_but_report_it_lost(&self) {
        self.next("reseal", Fault::Kept);
    }
    /// The file cannot grow any more.
    pub fn fill_the_disk(&self) {
        *self.disk.lock() = Some(Disk::Fill);
    }
    /// It can again.
    pub fn free_the_disk(&self) {
        *self.disk.lock() = Some(Disk::Free);
    }
}

fn lost() -> StoreError {
    StoreError::Full("a test".into())
}

impl<S: Store> Faulty<S> {
    fn write<T>(
        &mut self,
        name: &'static str,
        act: impl FnOnce(&mut S) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let fault = self.faults.write.lock().take_if(|(write, _)| *write == name);
        match fault {
            Some((_, Fault::Lost)) => Err(lost()),
            Some((_, Fault::Kept)) => act(&mut self.inner).and(Err(lost())),
            None => act(&mut self.inner),
        }
    }
}

impl<S: Store> Store for Faulty<S> {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn head(&mut self) -> Result<Option<StoredHead>, StoreError> {
        match self.faults.look.swap(false, Ordering::Relaxed) {
            false => self.inner.head(),
            true => Err(lost()),
        }
    }
    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        match self.faults.look.swap(false, Ordering::Relaxed) {
            false => self.inner.entries(from, limit),
            true => Err(lost()),
        }
    }
    fn append(&mut self, entry: &NewEntry) -> Result<(), StoreError> {
        match self.faults.disk.lock().take() {
            Some(Disk::Fill) => (self.limit)(&self.inner, true),
            Some(Disk::Free) => (self.limit)(&self.inner, false),
            None => {}
        }
        self.write("append", |inner| inner.append(entry))
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
        self.write("put_keys", |inner| inner.put_keys(keys))
    }
    fn sealed(&mut self) -> Result<Vec<(SealedAt, Vec<u8>)>, StoreError> {
        self.inner.sealed()
    }
    fn reseal(&mut self, resealed: &[Resealed], notes: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write("reseal", |inner| inner.reseal(resealed, notes))
    }
    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError> {
        self.write("put_invitation", |inner| inner.put_invitation(hash, invitation, now_ms))
    }
    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError> {
        self.write("spend_invitation", |inner| inner.spend_invitation(hash, host, now_ms))
    }
    fn put_codes(&mut self, codes: &StoredCodes) -> Result<(), StoreError> {
        self.write("put_codes", |inner| inner.put_codes(codes))
    }
    fn codes(&mut self, operator: &OperatorName) -> Result<Vec<StoredCodes>, StoreError> {
        self.inner.codes(operator)
    }
    fn use_step(&mut self, factor: &FactorId, step: u64) -> Result<bool, StoreError> {
        self.write("use_step", |inner| inner.use_step(factor, step))
    }
    fn put_recovery(&mut self, factor: &FactorId, hashes: &[Digest]) -> Result<(), StoreError> {
        self.write("put_recovery", |inner| inner.put_recovery(factor, hashes))
    }
    fn spend_recovery(&mut self, factor: &FactorId, hash: &Digest) -> Result<bool, StoreError> {
        self.write("spend_recovery", |inner| inner.spend_recovery(factor, hash))
    }
    fn forget_factors(&mut self, factors: &[FactorId]) -> Result<(), StoreError> {
        self.write("forget_factors", |inner| inner.forget_factors(factors))
    }
    fn count_guess(
        &mut self,
        operator: &OperatorName,
        now_ms: u64,
        since_ms: u64,
        guesses_max: u32,
    ) -> Result<Option<u64>, StoreError> {
        self.write("count_guess", |inner| inner.count_guess(operator, now_ms, since_ms, guesses_max))
    }
    fn forget_guesses(&mut self, operator: &OperatorName) -> Result<(), StoreError> {
        self.write("forget_guesses", |inner| inner.forget_guesses(operator))
    }
    fn put_operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        expires_at_ms: u64,
    ) -> Result<(), StoreError> {
        self.write("put_operator_invitation", |inner| inner.put_operator_invitation(operator, hash, expires_at_ms))
    }
    fn operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        now_ms: u64,
        spend: bool,
    ) -> Result<bool, StoreError> {
        self.write("operator_invitation", |inner| inner.operator_invitation(operator, hash, now_ms, spend))
    }
    fn put_proposal(&mut self, proposal: &StoredProposal, now_ms: u64) -> Result<bool, StoreError> {
        self.write("put_proposal", |inner| inner.put_proposal(proposal, now_ms))
    }
    fn replace_proposal(&mut self, proposal: &StoredProposal) -> Result<bool, StoreError> {
        self.write("replace_proposal", |inner| inner.replace_proposal(proposal))
    }
    fn proposal(&mut self, id: &str) -> Result<Option<StoredProposal>, StoreError> {
        self.inner.proposal(id)
    }
    fn proposals(&mut self) -> Result<Vec<StoredProposal>, StoreError> {
        self.inner.proposals()
    }
    fn put_document(&mut self, document: &Document, now_ms: u64, max: u32) -> Result<bool, StoreError> {
        self.write("put_document", |inner| inner.put_document(document, now_ms, max))
    }
    fn swap_document(&mut self, kind: &str, key: &str, seen: &[u8], new: &Document) -> Result<bool, StoreError> {
        self.write("swap_document", |inner| inner.swap_document(kind, key, seen, new))
    }
    fn document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.document(kind, key, now_ms)
    }
    fn take_document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.write("take_document", |inner| inner.take_document(kind, key, now_ms))
    }
    fn documents(&mut self, kind: &str, now_ms: u64) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.inner.documents(kind, now_ms)
    }
    fn forget_documents(&mut self, kind: &str, keys: &[String]) -> Result<(), StoreError> {
        self.write("forget_documents", |inner| inner.forget_documents(kind, keys))
    }
    fn entitlements(&mut self) -> Result<Vec<(ServiceName, BTreeSet<ServiceName>)>, StoreError> {
        self.inner.entitlements()
    }
    fn hosts(&mut self) -> Result<Vec<StoredHost>, StoreError> {
        self.inner.hosts()
    }
    fn put_host(&mut self, host: &StoredHost) -> Result<(), StoreError> {
        self.write("put_host", |inner| inner.put_host(host))
    }
    fn instances(&mut self) -> Result<Vec<StoredInstance>, StoreError> {
        self.inner.instances()
    }
    fn put_instances(&mut self, replica: &str, instances: &[StoredInstance]) -> Result<(), StoreError> {
        self.write("put_instances", |inner| inner.put_instances(replica, instances))
    }
    fn put_acknowledgements(&mut self, replica: &str, given: &[StoredAcknowledgement]) -> Result<(), StoreError> {
        self.write("put_acknowledgements", |inner| inner.put_acknowledgements(replica, given))
    }
    fn acknowledgements(&mut self, replica: &str) -> Result<Vec<StoredAcknowledgement>, StoreError> {
        self.inner.acknowledgements(replica)
    }
    fn beat(&mut self, replica: &str, alive_ms: u64) -> Result<Vec<String>, StoreError> {
        self.write("beat", |inner| inner.beat(replica, alive_ms))
    }
    fn is_shared(&self) -> bool {
        self.inner.is_shared()
    }
    fn create_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write("create_keys", |inner| inner.create_keys(keys))
    }
    fn swap_key(&mut self, name: &str, seen: &[u8], keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write("swap_key", |inner| inner.swap_key(name, seen, keys))
    }
    fn put_serial(&mut self, serial: &IssuedSerial) -> Result<(), StoreError> {
        self.write("put_serial", |inner| inner.put_serial(serial))
    }
    fn serials(&mut self, filter: &IdentityFilter, now_ms: u64, limit: u32) -> Result<Vec<IssuedSerial>, StoreError> {
        self.inner.serials(filter, now_ms, limit)
    }
    fn put_revocations(
        &mut self,
        revoked: &[Revocation],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        self.write("put_revocations", |inner| inner.put_revocations(revoked, by, max))
    }
    fn put_token_revocation(
        &mut self,
        meant: &TokensMeant,
        expires_at_ms: u64,
        by: &RevokedBy,
        max: u32,
    ) -> Result<(SignalSeq, TokensMeant), StoreError> {
        self.write("put_token_revocation", |inner| inner.put_token_revocation(meant, expires_at_ms, by, max))
    }
    fn put_statements(
        &mut self,
        statements: &[Statement],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        self.write("put_statements", |inner| inner.put_statements(statements, by, max))
    }
    fn put_tokens(&mut self, tokens: &[StoredToken], now_ms: u64) -> Result<(), StoreError> {
        self.write("put_tokens", |inner| inner.put_tokens(tokens, now_ms))
    }
    fn tokens(&mut self, filter: &TokenFilter, now_ms: u64, limit: u32) -> Result<Vec<StoredToken>, StoreError> {
        self.inner.tokens(filter, now_ms, limit)
    }
    fn signals(&mut self, after: SignalSeq) -> Result<Vec<StoredSignal>, StoreError> {
        self.inner.signals(after)
    }
    fn put_report(&mut self, records: &[DecisionRecord], edges: &[EdgeCount], now_ms: u64) -> Result<(), StoreError> {
        self.write("put_report", |inner| inner.put_report(records, edges, now_ms))
    }
    fn records(&mut self, filter: &RecordFilter) -> Result<Vec<DecisionRecord>, StoreError> {
        self.inner.records(filter)
    }
    fn callers(&mut self, service: &ServiceName, limit: u32) -> Result<Vec<Caller>, StoreError> {
        self.inner.callers(service, limit)
    }
}
