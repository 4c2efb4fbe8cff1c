//! The control plane's end of the ledger: folded and verified whole at start, appended to one admitted change-set at a
//! time. What is published has been written and fsynced before; what was answered survives a crash.
//!
//! No change is judged here: an [`Admitted`] comes from the gate, and appending takes it by value.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use countersign_api::mesh;
use countersign_core::{
    canonical::Digest,
    change::{Bodies, ChangeSet, Revision},
    countersignature::CountersignatureRefused,
    keyring::{Keyring, KeyringError},
    ledger::{Batch, Draft, DraftError, Entry, Follower, Frontier, LedgerError, TileHashes, TileReader, hash_leaf},
};

use crate::{
    authority::seal::Sealer,
    clock::Clock,
    gate::Admitted,
    store::{NewEntry, Storage, StoreError, StoredEntry},
};

mod waypoints;

use waypoints::Waypoints;

/// What the seal of a head is for: no other sealed bytes pass for one.
pub(crate) const HEAD_PURPOSE: &str = "ledger/head";
/// Entries read from the store at once.
pub const PAGE_ENTRIES: u32 = 256;
/// How far the clock may lie before the newest entry until it is called wrong.
pub const CLOCK_BEHIND_MAX_MS: u64 = 5 * 60 * 1000;

/// The ledger as folded so far.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// State, tree and texts in force.
    pub follower: Follower,
    /// The operators' keys and the seal: what signatures are made over, and judged by.
    pub keyring: Keyring,
    /// When the newest entry was admitted, in milliseconds since 1970.
    pub newest_at_ms: u64,
}

/// The hashes of every entry so far.
#[derive(Default)]
struct Past {
    /// What the next entry is appended to.
    frontier: Frontier,
    /// The root after each entry: what an agent that holds `n` entries must hold too.
    roots: Vec<Digest>,
    /// The tree over all of them: what proofs are made of.
    tree: TileHashes,
}

impl Past {
    fn append(&mut self, leaf: Digest, root: Digest) {
        self.tree.append(leaf);
        self.frontier.append(leaf);
        self.roots.push(root);
    }
}

/// An entry that follows, and the keys after it.
#[derive(Clone)]
struct Followed {
    draft: Draft,
    keyring: Keyring,
}

/// Told of each new entry.
type Publish = Box<dyn Fn(&Arc<Head>, mesh::Entries) + Send + Sync>;

/// The one ledger of this control plane.
pub struct Ledger {
    storage: Storage,
    clock: Clock,
    sealer: Arc<Sealer>,
    head: watch::Sender<Arc<Head>>,
    past: RwLock<Past>,
    /// Held while appending: positions are given out one by one.
    appending: tokio::sync::Mutex<()>,
    /// An entry of which the store did not say whether it kept it.
    uncertain: Mutex<Option<Followed>>,
    publish: Publish,
    waypoints: Waypoints,
}

/// Why the ledger is not opened. The control plane does not start on it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store cannot be read.
    #[error("the ledger in `{place}` could not be read")]
    Store {
        /// The store.
        place: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// What is stored is not what was admitted.
    #[error("the ledger in `{place}` is damaged or was edited: {what}")]
    Damaged {
        /// The store.
        place: String,
        /// What does not add up.
        what: String,
    },
    /// The newest entry lies in the future.
    #[error(
        "the clock is wrong: the newest ledger entry was made {ahead_seconds} s after what this machine says is now"
    )]
    Clock {
        /// How far ahead the newest entry is.
        ahead_seconds: u64,
    },
}

/// Why an admitted change-set did not become an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// Another change-set came first.
    #[error("planned on revision {base}, but the mesh is at revision {held}")]
    Moved {
        /// The revision it was planned on.
        base: Revision,
        /// The revision now.
        held: Revision,
    },
    /// It does not fold, or is too large.
    #[error("the change-set cannot become an entry: {0}")]
    Draft(DraftError),
    /// The mesh is sealed, and an agent would refuse it.
    #[error(transparent)]
    Unsigned(#[from] KeyringError),
    /// A countersignature that counts for nothing.
    #[error("a countersignature counts for nothing: {0}")]
    Countersignature(CountersignatureRefused),
    /// It could not be written. Nothing changed.
    #[error("the change could not be written")]
    Store(#[from] StoreError),
    /// What another control plane wrote does not follow from what this one holds.
    #[error("the store holds another history than this control plane: {0}")]
    Forked(String),
    /// The machine's clock jumped back.
    #[error("the clock is {behind_seconds} s before the newest ledger entry")]
    Clock {
        /// How far it is behind.
        behind_seconds: u64,
    },
    /// The control plane is stopping.
    #[error("the control plane is stopping")]
    Stopping,
}

impl Ledger {
    /// Folds the whole stored ledger and compares every hash on the way. `publish` is called for each new entry, in
    /// order, after it was written.
    ///
    /// INVARIANT (edited-ledger-refused): a store whose entries, change-sets or texts are not those that were admitted,
    /// in their order and number, opens no ledger.
    pub async fn open(
        storage: Storage,
        clock: Clock,
        sealer: Arc<Sealer>,
        publish: impl Fn(&Arc<Head>, mesh::Entries) + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let place = storage.place().to_owned();
        let unread = |source| OpenError::Store { place: place.clone(), source };
        let damaged = |what: String| OpenError::Damaged { place: place.clone(), what };
        let stored = storage.run("head", |store| store.head()).await.map_err(unread)?;
        let mut head = Head { keyring: Keyring::of_control(), ..Head::default() };
        let mut tree = Frontier::default();
        let mut past = Past::default();
        // What another control plane appends meanwhile is taken up afterwards.
        let ends_at = if storage.is_shared() { stored.as_ref().map_or(0, |stored| stored.size) } else { u64::MAX };
        while tree.size() < ends_at {
            let from = tree.size();
            let limit = u64::from(PAGE_ENTRIES).min(ends_at - from) as u32;
            let page = storage.run("entries", move |store| store.entries(from, limit)).await.map_err(unread)?;
            if page.is_empty() {
                break;
            }
            let bodies = texts_of(&storage, &page).await.map_err(unread)?;
            let grown = fold_page(&mut head, &mut tree, &page, &bodies).map_err(damaged)?;
            grown.into_iter().for_each(|(leaf, root)| past.append(leaf, root));
        }
        let (size, root) = (tree.size(), tree.root());
        match stored {
            None if size == 0 => {}
            None => return Err(damaged(format!("{size} entries are there, but no head"))),
            Some(stored) if stored.size != size => {
                return Err(damaged(format!("{} entries were written, {size} are there", stored.size)));
            }
            Some(stored) if stored.root != root => {
                let (was, is) = (stored.root.short(), root.short());
                return Err(damaged(format!("its root was {was}, the entries add up to {is}")));
            }
            Some(stored) => {
                let sealed = sealer.unseal(HEAD_PURPOSE, &stored.seal);
                if !sealed.is_ok_and(|sealed| *sealed == head_bytes(size, root)) {
                    return Err(damaged(
                        "its root was not sealed with this control plane's key, or the key file is another one".into(),
                    ));
                }
            }
        }
        let ahead_ms = head.newest_at_ms.saturating_sub(clock.now_ms());
        if ahead_ms > CLOCK_BEHIND_MAX_MS {
            return Err(OpenError::Clock { ahead_seconds: ahead_ms / 1000 });
        }
        Ok(Self {
            storage,
            clock,
            sealer,
            head: watch::Sender::new(Arc::new(head)),
            past: RwLock::new(past),
            appending: tokio::sync::Mutex::new(()),
            uncertain: Mutex::new(None),
            publish: Box::new(publish),
            waypoints: Waypoints::default(),
        })
    }

    /// The ledger as folded so far.
    pub fn head(&self) -> Arc<Head> {
        self.head.borrow().clone()
    }

    /// The root of the first `size` entries.
    pub fn root_at(&self, size: Revision) -> Option<Digest> {
        match size.0.checked_sub(1) {
            None => Some(Frontier::default().root()),
            Some(last) => self.past.read().roots.get(usize::try_from(last).ok()?).copied(),
        }
    }

    /// Told whenever the ledger has grown.
    pub fn growth(&self) -> watch::Receiver<Arc<Head>> {
        self.head.subscribe()
    }

    /// The proof that entry `index` stands in the first `size` entries; `None` when it does not.
    pub fn inclusion(&self, index: u64, size: u64) -> Option<Vec<Digest>> {
        let past = self.past.read();
        TileReader::new(size, |tile| past.tree.tile(tile).ok_or(())).inclusion(index).ok()
    }

    /// The proof that the first `size` entries begin with the first `old`; `None` when there are not so many.
    pub fn consistency(&self, old: u64, size: u64) -> Option<Vec<Digest>> {
        let past = self.past.read();
        TileReader::new(size, |tile| past.tree.tile(tile).ok_or(())).consistency(old).ok()
    }

    /// Appends one admitted change-set on exactly the base it was planned on; a countersigned one also later, while it means what
    /// it meant to those who signed it.
    ///
    /// INVARIANT (signed-or-not-appended): what agents of a sealed mesh would refuse, and a countersignature that counts for
    /// nothing, is not appended.
    /// INVARIANT (acknowledged-is-durable): it returns, and publishes, only after the store has fsynced the entry.
    pub async fn append(self: &Arc<Self>, admitted: Admitted) -> Result<Arc<Head>, AppendError> {
        let ledger = self.clone();
        // A task of its own: whoever asked may hang up between the commit and the publication.
        tokio::spawn(async move { ledger.append_whole(admitted).await }).await.map_err(|_| AppendError::Stopping)?
    }

    async fn append_whole(&self, admitted: Admitted) -> Result<Arc<Head>, AppendError> {
        let _one_by_one = self.appending.lock().await;
        self.settle().await?;
        self.take_up_others().await?;
        let head = self.head();
        let now_ms = self.clock.now_ms();
        if now_ms + CLOCK_BEHIND_MAX_MS < head.newest_at_ms {
            return Err(AppendError::Clock { behind_seconds: (head.newest_at_ms - now_ms) / 1000 });
        }
        let (change_set, bodies, actor, countersignatures) = admitted.into_parts();
        // Small steps back of the clock do not make time run backwards in the ledger.
        let at_ms = now_ms.max(head.newest_at_ms);
        let draft = if countersignatures.is_empty() {
            head.follower.draft(at_ms, &actor, &change_set, &bodies)
        } else {
            let (base, held) = (change_set.base, head.follower.revision());
            let holds = head.keyring.still_holds(&change_set).map_err(|_| AppendError::Moved { base, held })?;
            head.follower.draft_countersigned(at_ms, &actor, &change_set, &bodies, countersignatures, holds)
        };
        let draft = draft.map_err(|error| match error {
            DraftError::Moved { base, held } => AppendError::Moved { base, held },
            other => AppendError::Draft(other),
        })?;
        let mut keyring = head.keyring.clone();
        let judged = keyring.take(&draft.bytes, &draft.change_set)?;
        if let Some(refused) = judged.refused.into_iter().next() {
            return Err(AppendError::Countersignature(refused));
        }
        let draft = Followed { draft, keyring };
        let mut entry = NewEntry {
            index: draft.draft.entry.index,
            entry: draft.draft.bytes.clone(),
            leaf: hash_leaf(&draft.draft.bytes),
            root: draft.keyring.root(),
            seal: Vec::new(),
            digest: draft.draft.entry.digest,
            change_set: draft.draft.change_set.clone(),
            bodies: bodies.iter().map(|(digest, text)| (*digest, text.clone())).collect(),
        };
        let sealer = self.sealer.clone();
        let append = self.storage.run("append", move |store| {
            entry.seal = sealer.seal(HEAD_PURPOSE, &head_bytes(entry.index + 1, entry.root))?;
            store.append(&entry)
        });
        match append.await {
            Ok(()) => Ok(self.take_up(draft, &bodies)),
            Err(StoreError::Taken(index)) if self.storage.is_shared() => {
                self.take_up_others().await?;
                Err(AppendError::Moved { base: Revision(index), held: self.head().follower.revision() })
            }
            Err(error) => {
                *self.uncertain.lock() = Some(draft);
                // "Failed" may also mean that the answer was lost: what the store holds decides.
                if self.settle().await? { Ok(self.head()) } else { Err(error.into()) }
            }
        }
    }

    /// Finds out whether the uncertain entry was kept, and takes it up if so.
    async fn settle(&self) -> Result<bool, AppendError> {
        let Some(draft) = self.uncertain.lock().clone() else { return Ok(false) };
        let index = draft.draft.entry.index;
        // The entry and not the head: another control plane may have gone on from it.
        let stored = self.storage.run("entries", move |store| store.entries(index, 1)).await?;
        self.uncertain.lock().take();
        let leaf = hash_leaf(&draft.draft.bytes);
        let kept = stored.first().is_some_and(|stored| stored.index == index && stored.leaf == leaf);
        if kept {
            let bodies = draft.draft.next.bodies().clone();
            self.take_up(draft, &bodies);
        }
        Ok(kept)
    }

    /// Takes up what other control planes wrote.
    pub async fn catch_up(self: &Arc<Self>) -> Result<(), AppendError> {
        if !self.storage.is_shared() {
            return Ok(());
        }
        let ledger = self.clone();
        // A task of its own, as appending is.
        let caught_up = tokio::spawn(async move {
            let _one_by_one = ledger.appending.lock().await;
            ledger.settle().await?;
            ledger.take_up_others().await
        });
        caught_up.await.map_err(|_| AppendError::Stopping)?
    }

    /// INVARIANT (others-verified): what another control plane wrote is folded, compared and its seal opened, as at start, before it
    /// is published. What does not follow from what is held is not published, and nothing is appended to it.
    async fn take_up_others(&self) -> Result<(), AppendError> {
        if !self.storage.is_shared() {
            return Ok(());
        }
        let forked = |what: String| AppendError::Forked(what);
        let stored = self.storage.run("head", |store| store.head()).await?;
        let (mut head, mut tree) = (Head::clone(&self.head()), self.past.read().frontier.clone());
        let (size, root) = stored.as_ref().map_or((0, Frontier::default().root()), |stored| (stored.size, stored.root));
        if size < tree.size() {
            return Err(forked(format!("it ends at {size}, and {} entries were read from it", tree.size())));
        }
        if let Some(stored) = &stored {
            let sealed = self.sealer.unseal(HEAD_PURPOSE, &stored.seal);
            if !sealed.is_ok_and(|sealed| *sealed == head_bytes(size, root)) {
                return Err(forked("its root was sealed with another key than this control plane's".into()));
            }
        }
        let mut pages = Vec::new();
        while tree.size() < size {
            let (from, limit) = (tree.size(), (size - tree.size()).min(u64::from(PAGE_ENTRIES)) as u32);
            let page = self.stored(from, limit).await?;
            if page.is_empty() {
                return Err(forked(format!("entry {from} is missing")));
            }
            let texts = texts_of(&self.storage, &page).await?;
            let grown = fold_page(&mut head, &mut tree, &page, &texts).map_err(forked)?;
            pages.push((page, texts, grown, Arc::new(head.clone())));
        }
        if tree.root() != root {
            return Err(forked(format!("its root is {}, its entries add up to {}", root.short(), tree.root().short())));
        }
        for (page, texts, grown, head) in pages {
            let entries = mesh::Entries {
                first_index: page[0].index,
                size: page[0].index + page.len() as u64,
                root: Bytes::copy_from_slice(&head.follower.root().0),
                bodies: texts.values().map(ToString::to_string).collect(),
                change_sets: page.iter().map(|entry| Bytes::from(entry.change_set.clone())).collect(),
                entries: page.into_iter().map(|entry| entry.entry.into()).collect(),
            };
            let mut past = self.past.write();
            grown.into_iter().for_each(|(leaf, root)| past.append(leaf, root));
            drop(past);
            self.head.send_replace(head.clone());
            (self.publish)(&head, entries);
        }
        Ok(())
    }

    fn take_up(&self, followed: Followed, bodies: &Bodies) -> Arc<Head> {
        let Followed { draft, keyring } = followed;
        let leaf = hash_leaf(&draft.bytes);
        let entries = mesh::Entries {
            first_index: draft.entry.index,
            entries: vec![draft.bytes.into()],
            change_sets: vec![draft.change_set.into()],
            bodies: bodies.iter().map(|(_, text)| text.to_string()).collect(),
            size: draft.next.revision().0,
            root: Bytes::copy_from_slice(&draft.next.root().0),
        };
        self.past.write().append(leaf, draft.next.root());
        let head = Arc::new(Head { follower: draft.next, keyring, newest_at_ms: draft.entry.at_ms });
        self.head.send_replace(head.clone());
        (self.publish)(&head, entries);
        head
    }

    /// Entries from `from` up to `to` (exclusive) as agents take them, at most a page. Texts that are not in force
    /// any more travel too: an agent keeps what its state refers to.
    pub async fn entries(&self, from: u64, to: u64) -> Result<mesh::Entries, StoreError> {
        let limit = u32::try_from(to.saturating_sub(from)).unwrap_or(u32::MAX).min(PAGE_ENTRIES);
        let page = self.storage.run("entries", move |store| store.entries(from, limit)).await?;
        let bodies = texts_of(&self.storage, &page).await?;
        let size = from + page.len() as u64;
        let root = self.root_at(Revision(size)).unwrap_or_default();
        let (entries, change_sets) = page.into_iter().map(|e| (e.entry.into(), e.change_set.into())).unzip();
        Ok(mesh::Entries {
            first_index: from,
            entries,
            change_sets,
            bodies: bodies.values().map(ToString::to_string).collect(),
            size,
            root: Bytes::copy_from_slice(&root.0),
        })
    }

    /// Stored entries as they are, from `from`, at most `limit`.
    pub async fn stored(&self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        self.storage.run("entries", move |store| store.entries(from, limit)).await
    }

    /// Every text that the change-sets of `page` refer to.
    pub async fn texts(&self, page: &[StoredEntry]) -> Result<BTreeMap<Digest, Arc<str>>, StoreError> {
        texts_of(&self.storage, page).await
    }

    /// The mesh as it was at `revision`, folded from the nearest state that is kept; `None` when there is no such revision.
    pub async fn at(&self, revision: Revision) -> Result<Option<Arc<Head>>, StoreError> {
        let head = self.head();
        if revision == head.follower.revision() {
            return Ok(Some(head));
        }
        if revision > head.follower.revision() {
            return Ok(None);
        }
        let damaged = |what| StoreError::Damaged { path: self.storage.place().to_owned(), what };
        let size = head.follower.revision().0;
        let mut reached = self.waypoints.below(revision.0);
        while reached.tree.size() < revision.0 {
            let at = reached.tree.size();
            let stop = revision.0.min(waypoints::after(at, size));
            let page = self.stored(at, (stop - at).min(u64::from(PAGE_ENTRIES)) as u32).await?;
            let bodies = texts_of(&self.storage, &page).await?;
            fold_page(&mut reached.head, &mut reached.tree, &page, &bodies).map_err(damaged)?;
            self.waypoints.pass(&reached, size);
        }
        Ok(Some(Arc::new(reached.head)))
    }
}

/// What is sealed with each entry: size (big-endian), then root.
fn head_bytes(size: u64, root: Digest) -> Vec<u8> {
    [&size.to_be_bytes()[..], &root.0[..]].concat()
}

/// Texts that the change-sets of `page` refer to. A change-set that does not parse is reported by the fold.
async fn texts_of(storage: &Storage, page: &[StoredEntry]) -> Result<BTreeMap<Digest, Arc<str>>, StoreError> {
    let digests: Vec<Digest> = page
        .iter()
        .filter_map(|entry| serde_json::from_slice::<ChangeSet>(&entry.change_set).ok())
        .flat_map(|set| set.changes.iter().filter_map(|change| change.body()).collect::<Vec<_>>())
        .collect();
    Ok(storage.run("bodies", move |store| store.bodies(&digests)).await?.into_iter().collect())
}

/// Folds stored entries one after the other, and returns the leaf hash and the root of each; says which one is not as it was written.
fn fold_page(
    head: &mut Head,
    tree: &mut Frontier,
    page: &[StoredEntry],
    texts: &BTreeMap<Digest, Arc<str>>,
) -> Result<Vec<(Digest, Digest)>, String> {
    let mut grown = Vec::with_capacity(page.len());
    let first_index = tree.size();
    for (entry, index) in page.iter().zip(first_index..) {
        if entry.index != index {
            return Err(format!("entry {index} is missing"));
        }
        if hash_leaf(&entry.entry) != entry.leaf {
            return Err(format!("entry {index} is not what was hashed when it was written"));
        }
        tree.append(entry.leaf);
        grown.push((entry.leaf, tree.root()));
    }
    let mut bodies = Bodies::default();
    for (digest, text) in texts {
        if bodies.insert(text.clone()) != *digest {
            return Err(format!("text {} does not hash to its name", digest.short()));
        }
    }
    let change_sets: Vec<&[u8]> = page.iter().map(|entry| &*entry.change_set).collect();
    let missing = change_sets
        .iter()
        .zip(first_index..)
        .filter_map(|(bytes, index)| serde_json::from_slice::<ChangeSet>(bytes).ok().map(|set| (set, index)))
        .flat_map(|(set, index)| set.changes.into_iter().filter_map(move |change| Some((change.body()?, index))))
        .find(|(digest, _)| bodies.get(digest).is_none());
    if let Some((digest, index)) = missing {
        return Err(format!("text {} of entry {index} is missing", digest.short()));
    }
    let entries: Vec<&[u8]> = page.iter().map(|entry| &*entry.entry).collect();
    let batch = Batch {
        first_index,
        entries: &entries,
        change_sets: &change_sets,
        bodies: &bodies,
        size: tree.size(),
        root: tree.root(),
    };
    let followed = head.follower.extend(&batch).map_err(|error| chain(&error))?;
    for entry in page {
        head.keyring.take(&entry.entry, &entry.change_set).map_err(|error| error.to_string())?;
    }
    head.newest_at_ms = followed.last().map_or(head.newest_at_ms, |entry: &Entry| entry.at_ms);
    Ok(grown)
}

fn chain(error: &LedgerError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use countersign_api::local::Apply;
    use countersign_core::{
        change::Change,
        identity::{ServiceName, TrustDomain},
        service::{Protocol, ServiceSpec},
    };

    use super::*;
    use crate::{
        gate::Gate,
        metrics::StoreLatency,
        store::{sqlite::SqliteStore, testing::Faults},
    };

    struct Opened {
        ledger: Arc<Ledger>,
        faults: Faults,
        published: Arc<AtomicU64>,
        dir: tempfile::TempDir,
    }

    async fn open() -> Opened {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let store = faults.around(SqliteStore::open(&dir.path().join("control.db")).unwrap());
        let storage = Storage::start(Box::new(store), StoreLatency::default()).unwrap();
        let published = Arc::new(AtomicU64::new(0));
        let count = published.clone();
        let sealer = Arc::new(Sealer::open(&dir.path().join("kek"), true).unwrap());
        let publish = move |_: &Arc<Head>, _| {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let ledger = Arc::new(Ledger::open(storage, Clock::system(), sealer, publish).await.unwrap());
        Opened { ledger, faults, published, dir }
    }

    async fn append(ledger: &Arc<Ledger>, service: &str) -> Result<u64, AppendError> {
        let head = ledger.head();
        let base = head.follower.revision();
        let change = match base.0 {
            0 => Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
            _ => Change::DeclareService {
                name: ServiceName::parse(service).unwrap(),
                spec: ServiceSpec::new(Protocol::Http),
            },
        };
        let asked = Apply { change_set: ChangeSet { base, changes: vec![change] }, bodies: Bodies::default() };
        let admitted = Gate::default().admit(asked, &head, None).unwrap();
        ledger.append(admitted).await.map(|head| head.follower.revision().0)
    }

    async fn opens_again(opened: Opened) -> u64 {
        let store = SqliteStore::open(&opened.dir.path().join("control.db")).unwrap();
        let storage = Storage::start(Box::new(store), StoreLatency::default()).unwrap();
        let sealer = opened.ledger.sealer.clone();
        let again = Ledger::open(storage, Clock::system(), sealer, |_, _| {}).await.unwrap();
        assert_eq!(again.head().follower.root(), opened.ledger.head().follower.root());
        again.head().follower.revision().0
    }

    #[tokio::test]
    async fn a_past_revision_is_the_same_whether_it_is_folded_from_the_first_entry_or_from_a_state_that_is_kept() {
        let opened = open().await;
        for n in 0..270 {
            append(&opened.ledger, &format!("s{n}")).await.unwrap();
        }
        for _ in 0..2 {
            for revision in [269, 256, 255, 257, 1, 270] {
                let past = opened.ledger.at(Revision(revision)).await.unwrap().unwrap();
                assert_eq!(past.follower.revision().0, revision);
                assert_eq!(Some(past.follower.root()), past.keyring.root_at(Revision(revision)), "{revision}");
                assert_eq!(past.follower.state().services.len() as u64, revision - 1);
                assert_eq!(past.keyring.revision().0, revision);
            }
        }
        assert!(opened.ledger.at(Revision(271)).await.unwrap().is_none());
    }

    /// PROVES (acknowledged-is-durable)
    #[tokio::test]
    async fn an_entry_that_was_lost_is_not_published_and_the_next_one_takes_its_place() {
        let opened = open().await;
        append(&opened.ledger, "").await.unwrap();
        opened.faults.lose_next_append();
        let full = StoreError::Full("a test".into());
        assert_eq!(append(&opened.ledger, "a").await, Err(AppendError::Store(full)));
        assert_eq!(opened.published.load(Ordering::Relaxed), 1);
        assert_eq!(append(&opened.ledger, "b").await, Ok(2));
        assert_eq!(opens_again(opened).await, 2);
    }

    /// PROVES (acknowledged-is-durable)
    #[tokio::test]
    async fn an_entry_that_was_kept_but_reported_lost_is_taken_up() {
        let opened = open().await;
        append(&opened.ledger, "").await.unwrap();
        opened.faults.keep_next_append_but_report_it_lost();
        assert_eq!(append(&opened.ledger, "a").await, Ok(2));
        assert_eq!(opened.published.load(Ordering::Relaxed), 2);
        opened.faults.keep_next_append_but_report_it_lost();
        opened.faults.fail_next_look();
        append(&opened.ledger, "b").await.expect_err("nobody knows yet");
        let stale = append(&opened.ledger, "c").await;
        assert!(matches!(stale, Err(AppendError::Moved { held: Revision(3), .. })), "it was kept: {stale:?}");
        assert_eq!(append(&opened.ledger, "d").await, Ok(4));
        assert_eq!(opens_again(opened).await, 4);
    }

    #[tokio::test]
    async fn a_full_disk_loses_nothing_and_reads_go_on() {
        let opened = open().await;
        append(&opened.ledger, "").await.unwrap();
        opened.faults.fill_the_disk();
        let mut services = 0;
        let error = loop {
            match append(&opened.ledger, &format!("s{services}")).await {
                Ok(_) => services += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, AppendError::Store(StoreError::Full(_))), "{error:?}");
        let revision = opened.ledger.head().follower.revision();
        assert_eq!(revision, Revision(services + 1));
        assert_eq!(opened.ledger.stored(0, 1_000).await.unwrap().len() as u64, revision.0);
        opened.faults.free_the_disk();
        assert_eq!(append(&opened.ledger, "after").await, Ok(revision.0 + 1));
        assert_eq!(opens_again(opened).await, revision.0 + 1);
    }
}
