//! A store that fails on demand, twice over: what was written is lost, or kept and reported lost. Tests only.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use super::{sqlite::SqliteStore, *};

const NONE: u8 = 0;
const LOSE: u8 = 1;
const KEEP: u8 = 2;
const FULL: u8 = 3;
const FREE: u8 = 4;

/// What goes wrong next.
#[derive(Clone, Default)]
pub struct Faults {
    append: Arc<AtomicU8>,
    head: Arc<AtomicU8>,
    disk: Arc<AtomicU8>,
}

/// The store with its faults.
pub struct Faulty {
    inner: SqliteStore,
    faults: Faults,
}

impl Faults {
    /// `inner`, with these faults.
    pub fn around(&self, inner: SqliteStore) -> Faulty {
        Faulty { inner, faults: self.clone() }
    }
    /// The next entry is not written.
    pub fn lose_next_append(&self) {
        self.append.store(LOSE, Ordering::Relaxed);
    }
    /// The next entry is written, and the answer lost.
    pub fn keep_next_append_but_report_it_lost(&self) {
        self.append.store(KEEP, Ordering::Relaxed);
    }
    /// The next look at the head fails.
    pub fn fail_next_head(&self) {
        self.head.store(LOSE, Ordering::Relaxed);
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

impl Store for Faulty {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn head(&mut self) -> Result<Option<StoredHead>, StoreError> {
        match self.faults.head.swap(NONE, Ordering::Relaxed) {
            NONE => self.inner.head(),
            _ => Err(lost()),
        }
    }
    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        self.inner.entries(from, limit)
    }
    fn append(&mut self, entry: &NewEntry) -> Result<(), StoreError> {
        match self.faults.disk.swap(NONE, Ordering::Relaxed) {
            FULL => self.inner.limit_pages(true),
            FREE => self.inner.limit_pages(false),
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
    fn put_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<(), StoreError> {
        self.inner.put_keys(keys)
    }
    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError> {
        self.inner.put_invitation(hash, invitation, now_ms)
    }
    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError> {
        self.inner.spend_invitation(hash, host, now_ms)
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
    fn put_instances(&mut self, instances: &[StoredInstance]) -> Result<(), StoreError> {
        self.inner.put_instances(instances)
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
