//! From entries to a state, verified at each step. [`Follower`] holds what the entries so far add up to; nothing gets
//! into it that does not follow from them. An error leaves it as it was.

use std::collections::BTreeSet;

use super::{
    ACTOR_BYTES_MAX, BODY_BYTES_MAX, CHANGE_SET_BYTES_MAX, ENTRY_BYTES_MAX, ENTRY_FORMAT, ENTRY_FORMAT_COUNTERSIGNED,
    Entry, EntryError, Frontier, FrontierError, NUMBER_MAX, hash_leaf,
};
use crate::{
    canonical::{Digest, encode},
    change::{Bodies, ChangeSet, Revision},
    countersignature::{COUNTERSIGNATURES_MAX, Countersignature, StillHolds},
    state::{FoldError, MeshState},
};

/// A ledger followed up to a revision: the state, the right edge of its Merkle tree, and the texts in force.
///
/// INVARIANT (followed): `state` is the fold of the first `revision` entries of the one tree whose root is `root()`, and
/// `bodies` holds exactly the texts that it refers to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Follower {
    state: MeshState,
    frontier: Frontier,
    bodies: Bodies,
    last: Option<Last>,
}

/// The last entry, with the tree that it was appended to: together they show a newcomer that it is the last leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Last {
    before: Frontier,
    bytes: Vec<u8>,
}

/// Consecutive entries with everything that is needed to follow them.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a, B> {
    /// The index of the first.
    pub first_index: u64,
    /// The exact bytes of each, as hashed.
    pub entries: &'a [B],
    /// The canonical change-set of each, in the same order.
    pub change_sets: &'a [B],
    /// The texts that are in force after them and not before.
    pub bodies: &'a Bodies,
    /// The ledger's size after them, as the sender claims.
    pub size: u64,
    /// Its root at that size, as the sender claims.
    pub root: Digest,
}

/// A state at a revision, for one who does not follow from the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The number of entries it is the sum of; at least 1.
    pub revision: Revision,
    /// The canonical state.
    pub state: Vec<u8>,
    /// The roots of the full subtrees of the tree before the last entry, left to right.
    pub frontier: Vec<Vec<u8>>,
    /// The exact bytes of the entry that made this revision.
    pub last_entry: Vec<u8>,
    /// Every text in force.
    pub bodies: Bodies,
}

/// An entry that follows, made but not yet anyone's past: `next` becomes the follower once it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// The entry.
    pub entry: Entry,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// The canonical change-set.
    pub change_set: Vec<u8>,
    /// The follower after it.
    pub next: Follower,
}

/// Why entries or a snapshot are not taken up, by who can act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// Nothing is wrong with the ledger; something has not arrived. Ask again from the revision that is held.
    #[error("the entries cannot be followed yet")]
    Incomplete(#[from] Incomplete),
    /// What arrived is not what was admitted. The operator finds out who altered it: a disk, or someone.
    #[error("entry {index} of the ledger is damaged")]
    Damaged {
        /// Which.
        index: u64,
        /// In what way.
        #[source]
        damage: Damage,
    },
    /// Every entry follows, but to another root than the sender claims: there are two histories. The operator decides
    /// which one is theirs; nobody goes on from here alone.
    #[error("the ledger of {size} entries has root {held} here and {claimed} at its sender: there are two histories")]
    Forked {
        /// The size at which they differ.
        size: u64,
        /// The root that follows from the entries.
        held: Digest,
        /// The root that was claimed.
        claimed: Digest,
    },
}

/// What has not arrived.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Incomplete {
    /// Entries in between.
    #[error("entry {held} is the next one, and the first that arrived is {first_index}")]
    Gap {
        /// The revision that is held: the index of the next entry.
        held: u64,
        /// The first index that arrived.
        first_index: u64,
    },
    /// Entries, change-sets and the claimed size do not count up.
    #[error("{entries} entries with {change_sets} change-sets arrived for indexes {first_index} to {size}")]
    Count {
        /// Entries that arrived.
        entries: usize,
        /// Change-sets that arrived.
        change_sets: usize,
        /// The index of the first.
        first_index: u64,
        /// The claimed size after them.
        size: u64,
    },
    /// A text in force.
    #[error("text {0} is in force and did not arrive")]
    Body(Digest),
}

/// In what way an entry, or what belongs to it, is not what was admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The bytes are no entry.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// It says that it stands elsewhere.
    #[error("it says that its index is {0}")]
    Index(u64),
    /// The change-set beside it is another one.
    #[error("its change-set has digest {found}, the entry says {expected}")]
    ChangeSetDigest {
        /// As the entry says.
        expected: Digest,
        /// Of the bytes that arrived.
        found: Digest,
    },
    /// The change-set is beyond its bound.
    #[error("its change-set has {0} bytes; at most {CHANGE_SET_BYTES_MAX} are allowed")]
    ChangeSetTooLong(usize),
    /// The change-set does not parse, or not from its canonical form.
    #[error("its change-set cannot be read: {0}")]
    ChangeSet(String),
    /// It was planned on a state that did not exist yet.
    #[error("its change-set was planned on revision {0}, which came later")]
    Base(Revision),
    /// Its changes do not follow from the state before.
    #[error("its changes do not follow")]
    Fold(#[from] FoldError),
    /// They follow, to another state.
    #[error("the state after it has digest {found}, the entry says {expected}")]
    State {
        /// As the entry says.
        expected: Digest,
        /// Of the fold.
        found: Digest,
    },
    /// A text does not hash to its own digest.
    #[error("text {0} was altered")]
    Body(Digest),
    /// A text is beyond its bound.
    #[error("text {0} is longer than {BODY_BYTES_MAX} bytes")]
    BodyTooLong(Digest),
    /// A snapshot's tree is none.
    #[error("the snapshot's tree is none")]
    Frontier(#[from] FrontierError),
    /// A snapshot's state does not parse, or not from its canonical form.
    #[error("the snapshot's state cannot be read: {0}")]
    Snapshot(String),
}

/// Why a change-set cannot become the next entry. Whoever asked for it can act.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DraftError {
    /// It was planned on another revision than the one that is held.
    #[error("it was planned on revision {base}, and the mesh is at {held} now")]
    Moved {
        /// Planned on.
        base: Revision,
        /// Held.
        held: Revision,
    },
    /// A change does not follow.
    #[error("a change does not follow from the state before it")]
    Fold(#[from] FoldError),
    /// A text it refers to is missing.
    #[error("text {0} is referred to and missing")]
    Body(Digest),
    /// A text does not hash to its own digest.
    #[error("text {0} does not have that digest")]
    Forged(Digest),
    /// Nobody asked, or someone with a name beyond its bound.
    #[error("the actor must have 1 to {ACTOR_BYTES_MAX} bytes")]
    Actor,
    /// RFC 8785 writes numbers as IEEE 754 doubles.
    #[error("it holds a number above {NUMBER_MAX}, which canonical JSON cannot hold")]
    Inexact,
    /// Too many countersignatures, or none where some were meant.
    #[error("a countersigned entry has 1 to {COUNTERSIGNATURES_MAX} countersignatures, not {0}")]
    Countersignatures(usize),
    /// The change-set or a text is beyond its bound.
    #[error("{what} has {found} bytes; at most {max} are allowed")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its length, in bytes.
        found: usize,
        /// Its bound, in bytes.
        max: usize,
    },
}

impl Follower {
    /// What all entries so far add up to.
    pub fn state(&self) -> &MeshState {
        &self.state
    }

    /// The number of entries so far.
    pub fn revision(&self) -> Revision {
        Revision(self.frontier.size())
    }

    /// The Merkle root of all entries so far.
    pub fn root(&self) -> Digest {
        self.frontier.root()
    }

    /// The right edge of the tree of all entries so far.
    pub(crate) fn frontier(&self) -> &Frontier {
        &self.frontier
    }

    /// The texts in force.
    pub fn bodies(&self) -> &Bodies {
        &self.bodies
    }

    /// Takes up entries and returns those that were new. Entries that it has already are passed over: they are part
    /// of the root that is compared at the end.
    pub fn extend<B: AsRef<[u8]>>(&mut self, batch: &Batch<'_, B>) -> Result<Vec<Entry>, LedgerError> {
        let (held, first_index, size) = (self.frontier.size(), batch.first_index, batch.size);
        let count = batch.entries.len();
        if count != batch.change_sets.len() || first_index.checked_add(count as u64) != Some(size) {
            let change_sets = batch.change_sets.len();
            return Err(Incomplete::Count { entries: count, change_sets, first_index, size }.into());
        }
        if first_index > held {
            return Err(Incomplete::Gap { held, first_index }.into());
        }
        if size < held {
            return Ok(Vec::new());
        }
        let known = (held - first_index) as usize;
        let mut next = self.clone();
        let mut new = Vec::with_capacity(count - known);
        for (bytes, change_set) in batch.entries.iter().zip(batch.change_sets).skip(known) {
            new.push(next.follow(bytes.as_ref(), change_set.as_ref())?);
        }
        if next.root() != batch.root {
            return Err(LedgerError::Forked { size, held: next.root(), claimed: batch.root });
        }
        next.take_bodies(batch.bodies)?;
        *self = next;
        Ok(new)
    }

    /// Begins at a snapshot. It proves that the state is the one that the last entry names, and that this entry is the
    /// last leaf of the tree with [`root`](Self::root); that this tree is the mesh's own is for the caller to know.
    pub fn from_snapshot(snapshot: &Snapshot) -> Result<Self, LedgerError> {
        let Some(index) = snapshot.revision.0.checked_sub(1) else {
            let (first_index, size) = (0, 0);
            return Err(Incomplete::Count { entries: 0, change_sets: 0, first_index, size }.into());
        };
        let damaged = |damage: Damage| LedgerError::Damaged { index, damage };
        let before = Frontier::from_parts(index, &snapshot.frontier).map_err(|error| damaged(error.into()))?;
        let entry = entry_at(index, &snapshot.last_entry).map_err(damaged)?;
        let found = Digest::of(&snapshot.state);
        if found != entry.state {
            return Err(damaged(Damage::State { expected: entry.state, found }));
        }
        let state: MeshState =
            serde_json::from_slice(&snapshot.state).map_err(|error| damaged(Damage::Snapshot(error.to_string())))?;
        if encode(&state) != snapshot.state {
            return Err(damaged(Damage::Snapshot("it is not in canonical form (RFC 8785)".into())));
        }
        let mut frontier = before.clone();
        frontier.append(hash_leaf(&snapshot.last_entry));
        let last = Some(Last { before, bytes: snapshot.last_entry.clone() });
        let mut follower = Self { state, frontier, bodies: Bodies::default(), last };
        follower.take_bodies(&snapshot.bodies)?;
        Ok(follower)
    }

    /// What a newcomer needs to begin here; `None` while there is no entry.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.last.as_ref().map(|last| Snapshot {
            revision: self.revision(),
            state: encode(&self.state),
            frontier: last.before.parts().into_iter().map(Vec::from).collect(),
            last_entry: last.bytes.clone(),
            bodies: self.bodies.clone(),
        })
    }

    /// Makes the entry that `change_set` would become. It appends nothing: a crash before the draft is stored leaves
    /// no trace, one after it leaves an entry that the next start follows.
    pub fn draft(&self, at_ms: u64, actor: &str, change_set: &ChangeSet, bodies: &Bodies) -> Result<Draft, DraftError> {
        let held = self.revision();
        if change_set.base != held {
            return Err(DraftError::Moved { base: change_set.base, held });
        }
        self.draft_with(at_ms, actor, change_set, bodies, Vec::new())
    }

    /// Makes the entry that `change_set` would become with those who stand behind it. Its base may lie behind: `holds` is the proof
    /// that nothing since then voids what was signed. What the signatures are worth is for the keyring to say.
    pub fn draft_countersigned(
        &self,
        at_ms: u64,
        actor: &str,
        change_set: &ChangeSet,
        bodies: &Bodies,
        countersignatures: Vec<Countersignature>,
        holds: StillHolds,
    ) -> Result<Draft, DraftError> {
        let (base, held) = (change_set.base, self.revision());
        if (holds.base(), holds.held()) != (base, held) {
            return Err(DraftError::Moved { base, held });
        }
        if !(1..=COUNTERSIGNATURES_MAX).contains(&countersignatures.len()) {
            return Err(DraftError::Countersignatures(countersignatures.len()));
        }
        self.draft_with(at_ms, actor, change_set, bodies, countersignatures)
    }

    fn draft_with(
        &self,
        at_ms: u64,
        actor: &str,
        change_set: &ChangeSet,
        bodies: &Bodies,
        countersignatures: Vec<Countersignature>,
    ) -> Result<Draft, DraftError> {
        let change_set_bytes = encode(change_set);
        if change_set_bytes.len() > CHANGE_SET_BYTES_MAX {
            let (what, found, max) = ("the change-set", change_set_bytes.len(), CHANGE_SET_BYTES_MAX);
            return Err(DraftError::TooLong { what, found, max });
        }
        if actor.is_empty() || actor.len() > ACTOR_BYTES_MAX {
            return Err(DraftError::Actor);
        }
        // What cannot be read back would be refused by every follower, for ever.
        let exact = serde_json::from_slice::<ChangeSet>(&change_set_bytes).is_ok_and(|read| read == *change_set);
        if !exact || at_ms > NUMBER_MAX {
            return Err(DraftError::Inexact);
        }
        let mut next = self.clone();
        next.state = self.state.apply_all(change_set)?;
        let entry = Entry {
            format: if countersignatures.is_empty() { ENTRY_FORMAT } else { ENTRY_FORMAT_COUNTERSIGNED },
            index: self.frontier.size(),
            at_ms,
            actor: actor.to_owned(),
            digest: Digest::of(&change_set_bytes),
            state: next.state.digest(),
            countersignatures,
        };
        let bytes = entry.encode();
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(DraftError::TooLong { what: "the entry", found: bytes.len(), max: ENTRY_BYTES_MAX });
        }
        next.append(&bytes);
        next.take_bodies(bodies).map_err(|error| match error {
            LedgerError::Incomplete(Incomplete::Body(digest)) => DraftError::Body(digest),
            LedgerError::Damaged { damage: Damage::BodyTooLong(digest), .. } => DraftError::TooLong {
                what: "a text",
                found: bodies.get(&digest).map_or(0, |text| text.len()),
                max: BODY_BYTES_MAX,
            },
            LedgerError::Damaged { damage: Damage::Body(digest), .. } => DraftError::Forged(digest),
            other => unreachable!("bodies are taken, not entries: {other}"),
        })?;
        Ok(Draft { entry, bytes, change_set: change_set_bytes, next })
    }

    /// One entry, in the order of trust: its own bytes, the change-set that it names, the state that it names.
    fn follow(&mut self, bytes: &[u8], change_set: &[u8]) -> Result<Entry, LedgerError> {
        let index = self.frontier.size();
        let damaged = |damage: Damage| LedgerError::Damaged { index, damage };
        let entry = entry_at(index, bytes).map_err(damaged)?;
        let change_set = change_set_of(&entry, change_set).map_err(damaged)?;
        for change in &change_set.changes {
            self.state.apply(change).map_err(|error| damaged(error.into()))?;
        }
        let found = self.state.digest();
        if found != entry.state {
            return Err(damaged(Damage::State { expected: entry.state, found }));
        }
        self.append(bytes);
        Ok(entry)
    }

    fn append(&mut self, bytes: &[u8]) {
        self.last = Some(Last { before: self.frontier.clone(), bytes: bytes.to_vec() });
        self.frontier.append(hash_leaf(bytes));
    }

    /// Keeps what the state refers to, from what it has and what arrived, and nothing else.
    fn take_bodies(&mut self, arrived: &Bodies) -> Result<(), LedgerError> {
        let damaged = |damage| LedgerError::Damaged { index: self.frontier.size() - 1, damage };
        if let Some(digest) = arrived.forged().first() {
            return Err(damaged(Damage::Body(*digest)));
        }
        let in_force: BTreeSet<Digest> = self.state.bodies().collect();
        for digest in &in_force {
            match arrived.get(digest).or_else(|| self.bodies.get(digest)) {
                None => return Err(Incomplete::Body(*digest).into()),
                Some(text) if text.len() > BODY_BYTES_MAX => return Err(damaged(Damage::BodyTooLong(*digest))),
                Some(_) => {}
            }
        }
        self.bodies.extend(arrived);
        self.bodies.retain(|digest| in_force.contains(digest));
        Ok(())
    }
}

pub(crate) fn entry_at(index: u64, bytes: &[u8]) -> Result<Entry, Damage> {
    let entry = Entry::parse(bytes)?;
    if entry.index == index { Ok(entry) } else { Err(Damage::Index(entry.index)) }
}

pub(crate) fn change_set_of(entry: &Entry, bytes: &[u8]) -> Result<ChangeSet, Damage> {
    if bytes.len() > CHANGE_SET_BYTES_MAX {
        return Err(Damage::ChangeSetTooLong(bytes.len()));
    }
    let found = Digest::of(bytes);
    if found != entry.digest {
        return Err(Damage::ChangeSetDigest { expected: entry.digest, found });
    }
    let change_set: ChangeSet = serde_json::from_slice(bytes).map_err(|error| Damage::ChangeSet(error.to_string()))?;
    if encode(&change_set) != bytes {
        return Err(Damage::ChangeSet("it is not in canonical form (RFC 8785)".into()));
    }
    if change_set.base.0 > entry.index {
        return Err(Damage::Base(change_set.base));
    }
    Ok(change_set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::{Change, Member},
        identity::{ServiceName, TrustDomain},
        service::{Protocol, ServiceSpec},
    };

    /// A ledger of five entries, as a control plane would hold it.
    struct Ledger {
        entries: Vec<Vec<u8>>,
        change_sets: Vec<Vec<u8>>,
        bodies: Bodies,
        roots: Vec<Digest>, // by size
    }

    fn ledger() -> (Ledger, Follower) {
        let mut bodies = Bodies::default();
        let (first, second) = (bodies.insert("permit(principal, action, resource);"), bodies.insert("// nothing"));
        let name = |name| ServiceName::parse(name).unwrap();
        let policy = |body| Change::SetPolicy { id: "open".into(), file: "policies/open.cedar".into(), body };
        let steps = [
            vec![Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }],
            vec![Change::DeclareService { name: name("web"), spec: ServiceSpec::new(Protocol::Http) }, policy(first)],
            vec![Change::SetRole { name: "front".into(), members: [Member::Service(name("web"))].into() }],
            vec![policy(second)],
            vec![Change::RemoveService { name: name("web") }],
        ];
        let mut follower = Follower::default();
        let mut ledger = Ledger { entries: vec![], change_sets: vec![], bodies, roots: vec![follower.root()] };
        for (at_ms, changes) in steps.into_iter().enumerate() {
            let change_set = ChangeSet { base: follower.revision(), changes };
            let draft = follower.draft(at_ms as u64, "local", &change_set, &ledger.bodies).unwrap();
            ledger.entries.push(draft.bytes);
            ledger.change_sets.push(draft.change_set);
            follower = draft.next;
            ledger.roots.push(follower.root());
        }
        (ledger, follower)
    }

    impl Ledger {
        fn batch(&self, from: usize, to: usize) -> Batch<'_, Vec<u8>> {
            Batch {
                first_index: from as u64,
                entries: &self.entries[from..to],
                change_sets: &self.change_sets[from..to],
                bodies: &self.bodies,
                size: to as u64,
                root: self.roots[to],
            }
        }

        fn follower(&self, size: usize) -> Follower {
            let mut follower = Follower::default();
            follower.extend(&self.batch(0, size)).unwrap();
            follower
        }
    }

    #[test]
    fn however_the_entries_arrive_they_add_up_to_the_same() {
        let (ledger, end) = ledger();
        for cuts in [&[0, 5][..], &[0, 1, 2, 3, 4, 5], &[0, 2, 5], &[0, 3, 4, 5]] {
            let mut follower = Follower::default();
            for cut in cuts.windows(2) {
                let new = follower.extend(&ledger.batch(cut[0], cut[1])).unwrap();
                assert_eq!(new.len(), cut[1] - cut[0]);
            }
            assert_eq!(follower, end, "{cuts:?}");
        }
        assert_eq!(end.revision(), Revision(5));
        assert_eq!(end.bodies().len(), 1, "a replaced text is let go");
    }

    #[test]
    fn what_is_delivered_twice_or_late_counts_once() {
        let (ledger, end) = ledger();
        let mut follower = ledger.follower(3);
        for (from, to, new, revision) in
            [(0, 2, 0, 3), (1, 3, 0, 3), (3, 3, 0, 3), (0, 4, 1, 4), (2, 5, 1, 5), (0, 5, 0, 5)]
        {
            assert_eq!(follower.extend(&ledger.batch(from, to)).unwrap().len(), new, "{from}..{to}");
            assert_eq!(follower.revision(), Revision(revision), "{from}..{to}");
        }
        assert_eq!(follower, end);
    }

    // PROVES (followed)
    #[test]
    fn nothing_is_taken_up_that_does_not_follow_and_the_error_says_who_can_act() {
        let (ledger, _) = ledger();
        let held = ledger.follower(2);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let none = Bodies::default();
        let forged: Bodies =
            serde_json::from_value(serde_json::json!({ Digest::of(b"// nothing").to_string(): "// something" }))
                .unwrap();
        // A whole other entry 3, that follows by itself.
        let other = {
            let set = ChangeSet { base: Revision(3), changes: vec![Change::RemoveRole { name: "front".into() }] };
            ledger.follower(3).draft(9, "local", &set, &none).unwrap()
        };
        let later = {
            let set = ChangeSet { base: Revision(7), changes: vec![] };
            let (bytes, state) = (encode(&set), ledger.follower(3).state().digest());
            let entry = Entry { digest: Digest::of(&bytes), state, ..other.entry.clone() };
            (entry.encode(), bytes)
        };
        let edited = text(&ledger.entries[3]).replace("\"at_ms\":3", "\"at_ms\":4").into_bytes();
        let alien = text(&ledger.change_sets[3]).replace("open", "none").into_bytes();
        let elsewhere = text(&ledger.entries[3]).replace("\"index\":3", "\"index\":4").into_bytes();
        let lying = Entry { state: Digest::of(b"x"), ..Entry::parse(&ledger.entries[3]).unwrap() }.encode();
        let unfit = {
            let bytes =
                encode(&ChangeSet { base: Revision(3), changes: vec![Change::RemoveRole { name: "back".into() }] });
            (Entry { digest: Digest::of(&bytes), ..other.entry.clone() }.encode(), bytes)
        };
        let spaced = {
            let bytes = text(&ledger.change_sets[3]).replace(':', ": ").into_bytes();
            (Entry { digest: Digest::of(&bytes), ..Entry::parse(&ledger.entries[3]).unwrap() }.encode(), bytes)
        };
        let (good, good_set) = (&ledger.entries[3], &ledger.change_sets[3]);
        let root = ledger.roots[4];
        for (case, entry, set, bodies, claimed, expected) in [
            (
                "cut short",
                &good[..good.len() - 1],
                &good_set[..],
                &ledger.bodies,
                root,
                "entry 3 of the ledger is damaged: it is not an entry: EOF while parsing an object at line 1 column 198",
            ),
            ("edited", &edited, good_set, &ledger.bodies, root, "there are two histories"),
            (
                "of another index",
                &elsewhere,
                good_set,
                &ledger.bodies,
                root,
                "entry 3 of the ledger is damaged: it says that its index is 4",
            ),
            ("with another change-set", good, &alien, &ledger.bodies, root, "its change-set has digest"),
            (
                "with a change-set of another form",
                &spaced.0,
                &spaced.1,
                &ledger.bodies,
                root,
                "entry 3 of the ledger is damaged: its change-set cannot be read: it is not in canonical form (RFC 8785)",
            ),
            (
                "planned on the future",
                &later.0,
                &later.1,
                &ledger.bodies,
                root,
                "entry 3 of the ledger is damaged: its change-set was planned on revision 7, which came later",
            ),
            (
                "that does not fold",
                &unfit.0,
                &unfit.1,
                &ledger.bodies,
                root,
                "entry 3 of the ledger is damaged: its changes do not follow: role back does not exist",
            ),
            ("with another state", &lying, good_set, &ledger.bodies, root, "the state after it has digest"),
            ("of another history", &other.bytes, &other.change_set, &ledger.bodies, root, "there are two histories"),
            ("with another root", good, good_set, &ledger.bodies, ledger.roots[3], "there are two histories"),
            ("without its text", good, good_set, &none, root, "the entries cannot be followed yet: text"),
            ("with an altered text", good, good_set, &forged, root, "was altered"),
        ] {
            let mut follower = held.clone();
            let entries = [ledger.entries[2].clone(), entry.to_vec()];
            let change_sets = [ledger.change_sets[2].clone(), set.to_vec()];
            let batch =
                Batch { first_index: 2, entries: &entries, change_sets: &change_sets, bodies, size: 4, root: claimed };
            let error = follower.extend(&batch).unwrap_err();
            let chain = match std::error::Error::source(&error) {
                Some(cause) => match std::error::Error::source(cause) {
                    Some(root) => format!("{error}: {cause}: {root}"),
                    None => format!("{error}: {cause}"),
                },
                None => error.to_string(),
            };
            assert!(chain.contains(expected), "an entry {case}: {chain}");
            assert_eq!(follower, held, "an entry {case} changed something");
        }
    }

    #[test]
    fn a_gap_is_asked_for_again_and_a_miscount_is_not_guessed_at() {
        let (ledger, _) = ledger();
        let mut follower = ledger.follower(2);
        assert_eq!(
            follower.extend(&ledger.batch(3, 5)),
            Err(LedgerError::Incomplete(Incomplete::Gap { held: 2, first_index: 3 }))
        );
        for batch in [
            Batch { size: 5, ..ledger.batch(2, 4) },
            Batch { change_sets: &ledger.change_sets[2..3], ..ledger.batch(2, 4) },
            Batch { first_index: u64::MAX, size: 1, ..ledger.batch(2, 4) },
        ] {
            let error = follower.extend(&batch).unwrap_err();
            assert!(matches!(error, LedgerError::Incomplete(Incomplete::Count { .. })), "{error:?}");
        }
        assert_eq!(follower, ledger.follower(2));
    }

    #[test]
    fn a_newcomer_begins_at_a_snapshot_of_any_size_and_goes_on_like_the_others() {
        let (ledger, end) = ledger();
        assert_eq!(Follower::default().snapshot(), None);
        for size in 1..=5 {
            let mut follower = Follower::from_snapshot(&ledger.follower(size).snapshot().unwrap()).unwrap();
            assert_eq!(follower, ledger.follower(size), "{size}");
            follower.extend(&ledger.batch(size, 5)).unwrap();
            assert_eq!(follower, end, "{size}");
        }
    }

    #[test]
    fn a_snapshot_that_its_last_entry_does_not_vouch_for_is_refused() {
        let (ledger, _) = ledger();
        let good = ledger.follower(4).snapshot().unwrap();
        let state = String::from_utf8(good.state.clone()).unwrap();
        let mut short = good.clone();
        short.frontier.pop();
        for (case, snapshot) in [
            ("of nothing", Snapshot { revision: Revision(0), ..good.clone() }),
            ("of another revision", Snapshot { revision: Revision(3), ..good.clone() }),
            ("with another state", Snapshot { state: state.replace("web", "bew").into_bytes(), ..good.clone() }),
            ("with a state of another form", Snapshot { state: format!("{state} ").into_bytes(), ..good.clone() }),
            ("with an older last entry", Snapshot { last_entry: ledger.entries[2].clone(), ..good.clone() }),
            ("without its texts", Snapshot { bodies: Bodies::default(), ..good.clone() }),
            ("with half a tree", short),
        ] {
            assert!(Follower::from_snapshot(&snapshot).is_err(), "a snapshot {case}");
        }
        let mut other = good.clone();
        other.frontier[0][0] ^= 1;
        let mut follower = Follower::from_snapshot(&other).unwrap();
        assert_ne!(follower.root(), ledger.roots[4], "another past has another root");
        assert!(matches!(follower.extend(&ledger.batch(4, 5)), Err(LedgerError::Forked { size: 5, .. })));
    }

    #[test]
    fn a_draft_that_cannot_be_an_entry_is_refused_before_it_is_one() {
        let (ledger, _) = ledger();
        let held = ledger.follower(2);
        let set = |base, changes| ChangeSet { base: Revision(base), changes };
        let missing = Digest::of(b"missing");
        let policy = Change::SetPolicy { id: "p".into(), file: "p.cedar".into(), body: missing };
        let (none, actor) = (Bodies::default(), "a".repeat(ACTOR_BYTES_MAX + 1));
        let mut long = Bodies::default();
        let body = long.insert("x".repeat(BODY_BYTES_MAX + 1));
        let vast = Change::SetRoute {
            name: "r".into(),
            route: serde_json::from_value(
                serde_json::json!({ "service": "web", "rank": 0, "timeout_ms": (1_u64 << 53) + 1 }),
            )
            .unwrap(),
        };
        let long_policy = Change::SetPolicy { id: "p".into(), file: "p.cedar".into(), body };
        for (actor, set, bodies, expected) in [
            ("local", set(1, vec![]), &none, "it was planned on revision 1, and the mesh is at 2 now".to_owned()),
            (
                "local",
                set(2, vec![Change::RemoveRole { name: "x".into() }]),
                &none,
                "a change does not follow from the state before it".to_owned(),
            ),
            ("local", set(2, vec![policy]), &none, format!("text {missing} is referred to and missing")),
            (
                "local",
                set(2, vec![long_policy]),
                &long,
                "a text has 262145 bytes; at most 262144 are allowed".to_owned(),
            ),
            (&actor, set(2, vec![]), &none, "the actor must have 1 to 2048 bytes".to_owned()),
            (
                "local",
                set(2, vec![vast]),
                &none,
                "it holds a number above 9007199254740991, which canonical JSON cannot hold".to_owned(),
            ),
            ("", set(2, vec![]), &none, "the actor must have 1 to 2048 bytes".to_owned()),
        ] {
            assert_eq!(held.draft(0, actor, &set, bodies).unwrap_err().to_string(), expected);
        }
    }
}
