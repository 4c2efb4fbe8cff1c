//! The operators' public keys and the seal, folded from the ledger alone, and whether each entry was signed by enough of them.
//!
//! An agent and an offline verifier hold one beside their [`Follower`](crate::ledger::Follower): the follower says what the
//! entries add up to, the keyring whether the operators stand behind them. It begins at the anchor, the entry with the first
//! enrolment, and each later key came in by an entry that was judged under the keys before it. In a mesh without a seal the
//! signatures are told and nothing is refused.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    canonical::Digest,
    change::{Change, ChangeSet, Revision},
    countersignature::{CountersignatureRefused, Part, Signed, StillHolds, signers, writes},
    identity::{FactorId, OperatorName},
    ledger::{Damage, Entry, Follower, Frontier, change_set_of, entry_at, hash_leaf},
    operator::{EnrolledFactor, Seal},
    state::MeshState,
};

/// How many entries back a change-set may have been planned for its signatures to count.
pub const BASES_MAX: usize = 256;

/// The keys in force after the entries so far.
///
/// INVARIANT (sealed-history): from the entry after the one that sealed the mesh, no entry is taken that fewer operators signed
/// than the seal asks for, by keys that were in force before it; nor one that begins or seals another mesh than the pinned one.
/// An error changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Keyring {
    pinned: Pins,
    /// Whether it takes recoveries that too few signed.
    recovers: bool,
    seen: Pins,
    /// Operators and seal; nothing else of a state is kept in it.
    state: MeshState,
    frontier: Frontier,
    recent: VecDeque<Step>, // the last of them, oldest first, at most BASES_MAX
}

/// The two entries from which everything else follows: SHA-256 of the exact bytes of each. Whoever was told them out of band, or saw
/// them once, follows no ledger with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pins {
    /// The entry with the first enrolment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anchor: Option<Digest>,
    /// The entry that sealed the mesh. The state that it names holds every operator and key at that moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seal: Option<Digest>,
    /// The last recovery of the sealed mesh that its operators did not sign. Only a join token pins one: a host that sees it
    /// does not follow it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Digest>,
}

/// What a keyring knows beside the state that a follower holds: with it, whoever held both goes on without the whole ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remembered {
    seen: Pins,
    recent: Vec<Step>,
}

/// What an entry did, as far as signatures made before it are concerned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    root_before: Digest,
    written: BTreeSet<Part>,
}

/// Who stands behind an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Judged {
    /// The operators whose signatures count, each once.
    pub signers: BTreeSet<OperatorName>,
    /// Why other signatures count for nothing.
    pub refused: Vec<CountersignatureRefused>,
    /// The entry that voided all of them, and what it wrote: the change-set meant something else by then.
    pub voided: Option<(Revision, Part)>,
}

/// Why an entry is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    /// It is not the entry, or not with the change-set, that was admitted.
    #[error("entry {index} of the ledger is damaged")]
    Damaged {
        /// Which.
        index: u64,
        /// In what way.
        #[source]
        damage: Damage,
    },
    /// The mesh that was pinned begins with another enrolment.
    #[error("the mesh is anchored in {found}, and {pinned} was pinned: it is another mesh")]
    OtherAnchor {
        /// What was pinned.
        pinned: Digest,
        /// What the ledger says.
        found: Digest,
    },
    /// The mesh that was pinned was sealed by another entry.
    #[error("entry {index} seals the mesh, and its digest is {found}; {pinned} was pinned: it is another history")]
    OtherSeal {
        /// Which.
        index: u64,
        /// What was pinned.
        pinned: Digest,
        /// What the ledger says.
        found: Digest,
    },
    /// Too few operators signed it.
    #[error("entry {index} was signed by {} of {quorum} operators{}", judged.signers.len(), why(judged))]
    Unsigned {
        /// Which.
        index: u64,
        /// How many must sign.
        quorum: u32,
        /// Who did.
        judged: Judged,
    },
}

impl Keyring {
    /// The keyring of the mesh with these pins, and of no other.
    pub fn pinned(pinned: Pins) -> Self {
        Self { pinned, ..Self::default() }
    }

    /// The keyring of the control plane itself, against which no seal protects: it takes a recovery that nobody signed, of whoever
    /// opened its sealed ledger.
    pub fn of_control() -> Self {
        Self { recovers: true, ..Self::default() }
    }

    /// Goes on from what was remembered beside `follower`; `None` when the two do not belong together, or not to what is pinned.
    /// Of a mesh that was never protected there is nothing to remember.
    pub fn resume(remembered: Remembered, pinned: Pins, follower: &Follower) -> Option<Self> {
        let Remembered { seen, recent } = remembered;
        let held = follower.state();
        let state = MeshState {
            trust_domain: held.trust_domain.clone(),
            operators: held.operators.clone(),
            seal: held.seal,
            ..MeshState::default()
        };
        let fits = seen.anchor.is_some() == held.is_protected()
            && (seen.seal.is_some() == held.seal.is_some() || seen.recovery.is_some())
            && recent.len() <= BASES_MAX
            && recent.len() as u64 <= follower.revision().0;
        let frontier = follower.frontier().clone();
        let keyring = Self { pinned, recovers: false, seen, state, frontier, recent: recent.into() };
        (fits && keyring.meets_pins()).then_some(keyring)
    }

    /// What [`Keyring::resume`] needs beside the follower.
    pub fn remember(&self) -> Remembered {
        Remembered { seen: self.seen, recent: self.recent.iter().cloned().collect() }
    }

    /// SHA-256 of the exact bytes of the entry with the first enrolment; `None` while the mesh is unprotected.
    pub fn anchor(&self) -> Option<Digest> {
        self.seen.anchor
    }

    /// What can be pinned of the ledger so far.
    pub fn pins(&self) -> Pins {
        self.seen
    }

    /// Whether everything that was pinned has come. Until then the ledger so far says nothing about the mesh: it may have been cut.
    pub fn meets_pins(&self) -> bool {
        let Pins { anchor, seal, recovery } = self.pinned;
        anchor.is_none_or(|pinned| self.seen.anchor == Some(pinned))
            && seal.is_none_or(|pinned| self.seen.seal == Some(pinned))
            && recovery.is_none_or(|pinned| self.seen.recovery == Some(pinned))
    }

    /// What a sealed mesh asks for.
    pub fn seal(&self) -> Option<Seal> {
        self.state.seal
    }

    /// The number of entries so far.
    pub fn revision(&self) -> Revision {
        Revision(self.frontier.size())
    }

    /// The Merkle root of all entries so far.
    pub fn root(&self) -> Digest {
        self.frontier.root()
    }

    /// The root at `revision`, when it is one on which a change-set may still have been planned.
    pub fn root_at(&self, revision: Revision) -> Option<Digest> {
        if revision == self.revision() {
            return Some(self.root());
        }
        self.step(revision).map(|at| self.recent[at].root_before)
    }

    /// A factor of an operator.
    pub fn factor(&self, operator: &OperatorName, id: &FactorId) -> Option<&EnrolledFactor> {
        self.state.operators.get(operator)?.factors.get(id)
    }

    /// The operators that can sign.
    pub fn signers(&self) -> impl Iterator<Item = &OperatorName> {
        self.state.operators.iter().filter(|(_, operator)| operator.can_sign()).map(|(name, _)| name)
    }

    /// Whether `change_set` means now what it meant on its base: the proof, or what came between.
    pub fn still_holds(&self, change_set: &ChangeSet) -> Result<StillHolds, (Revision, Part)> {
        let later = match self.step(change_set.base) {
            Some(at) => at..self.recent.len(),
            None if change_set.base == self.revision() => 0..0,
            // Too old to be known here, or not yet.
            None => return Err((self.revision(), Part::Mesh)),
        };
        StillHolds::over(change_set, self.recent.range(later).map(|step| &step.written))
    }

    /// Who stands behind an entry that would be the next one. It decides nothing.
    pub fn judge(&self, entry: &Entry, change_set: &ChangeSet) -> Judged {
        let (Some(anchor), Some(root)) = (self.seen.anchor, self.root_at(change_set.base)) else {
            return Judged::default();
        };
        let (author, change_set_digest, base) = (&*entry.actor, entry.digest, change_set.base);
        let signed = Signed { anchor, author, change_set: change_set_digest, base, root };
        let (signers, refused) = signers(&entry.countersignatures, self, &signed);
        match self.still_holds(change_set) {
            Ok(_) => Judged { signers, refused, voided: None },
            Err(voided) => Judged { signers: BTreeSet::new(), refused, voided: Some(voided) },
        }
    }

    /// Takes the next entry: its exact bytes, and its canonical change-set.
    pub fn take(&mut self, bytes: &[u8], change_set: &[u8]) -> Result<Judged, KeyringError> {
        let index = self.frontier.size();
        let damaged = |damage: Damage| KeyringError::Damaged { index, damage };
        let entry = entry_at(index, bytes).map_err(damaged)?;
        let change_set = change_set_of(&entry, change_set).map_err(damaged)?;
        let judged = self.judge(&entry, &change_set);
        let unsigned = self.state.seal.is_some_and(|seal| judged.signers.len() < seal.quorum as usize);
        let is_recovery = matches!(change_set.changes.first(), Some(Change::Recover { .. }));
        // Up to the one that is pinned: nothing of such a history is used before that one has come.
        let recovers = self.recovers || (self.pinned.recovery.is_some() && self.seen.recovery != self.pinned.recovery);
        if let Some(Seal { quorum }) = self.state.seal
            && unsigned
            && !(is_recovery && recovers)
        {
            return Err(KeyringError::Unsigned { index, quorum, judged });
        }
        let mut state = self.state.clone();
        for change in change_set.changes.iter().filter(|change| is_of_keyring(change)) {
            state.apply(change).map_err(|error| damaged(error.into()))?;
        }
        let this = |is_so: bool| is_so.then(|| Digest::of(bytes));
        let seen = Pins {
            anchor: self.seen.anchor.or_else(|| this(state.is_protected())),
            seal: self.seen.seal.or_else(|| this(state.seal.is_some())),
            recovery: this(is_recovery && unsigned).or(self.seen.recovery),
        };
        if let (Some(pinned), Some(found)) = (self.pinned.anchor, seen.anchor)
            && pinned != found
        {
            return Err(KeyringError::OtherAnchor { pinned, found });
        }
        if let (Some(pinned), Some(found)) = (self.pinned.seal, seen.seal)
            && pinned != found
        {
            return Err(KeyringError::OtherSeal { index, pinned, found });
        }
        if self.recent.len() == BASES_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(Step { root_before: self.frontier.root(), written: writes(&change_set) });
        self.frontier.append(hash_leaf(bytes));
        (self.state, self.seen) = (state, seen);
        Ok(judged)
    }

    /// Where the entry that followed on `revision` stands in what is remembered.
    fn step(&self, revision: Revision) -> Option<usize> {
        let first = self.frontier.size() - self.recent.len() as u64;
        let at = usize::try_from(revision.0.checked_sub(first)?).ok()?;
        (at < self.recent.len()).then_some(at)
    }
}

/// Whether a change is one of operators, factors or the seal; the first change of all makes them possible.
fn is_of_keyring(change: &Change) -> bool {
    matches!(
        change,
        Change::CreateMesh { .. }
            | Change::InviteOperator { .. }
            | Change::EnrollOperator { .. }
            | Change::AddFactor { .. }
            | Change::RemoveFactor { .. }
            | Change::RemoveOperator { .. }
            | Change::SetOperatorRoles { .. }
            | Change::SealSettings { .. }
            | Change::Recover { .. }
    )
}

fn why(judged: &Judged) -> String {
    match (&judged.voided, judged.refused.first()) {
        (Some((revision, _)), _) => format!(": what they signed was voided by revision {revision}"),
        (None, Some(refused)) => format!(": {refused}"),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        assurance::{
            challenge::{Challenge, Purpose},
            webauthn::{RelyingParty, tests::Soft},
        },
        canonical::encode,
        change::{Bodies, Member},
        countersignature::{Bytes, COUNTERSIGNATURES_MAX, Countersignature},
        identity::{ServiceName, TrustDomain},
        ledger::{DraftError, ENTRY_BYTES_MAX, Follower},
        operator::SigningKey,
        route::Route,
        service::{Protocol, ServiceSpec},
    };

    fn name(given: &str) -> OperatorName {
        OperatorName::parse(given).unwrap()
    }

    fn service(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn declare(given: &str) -> Change {
        Change::DeclareService { name: service(given), spec: ServiceSpec::new(Protocol::Http) }
    }

    fn role(given: &str) -> Change {
        Change::SetRole { name: given.into(), members: [Member::Service(service("web"))].into() }
    }

    fn route_to(given: &str) -> Route {
        serde_json::from_value(serde_json::json!({ "service": given, "rank": 0 })).unwrap()
    }

    #[test]
    fn a_recovery_that_nobody_signed_is_followed_only_by_who_pinned_it_or_holds_the_ledgers_key() {
        let mesh = Mesh::new(Some(2));
        let recover = Change::Recover {
            operator: name("alice"),
            id: FactorId::parse("totp-1").unwrap(),
            factor: EnrolledFactor::Totp,
            reason: "lost".into(),
            at_seconds: 7,
        };
        let (bytes, set) = mesh.entry("local", vec![recover], &[]);
        let refused = mesh.keyring.clone().take(&bytes, &set).unwrap_err();
        assert!(matches!(refused, KeyringError::Unsigned { .. }), "{refused}");
        let pins = Pins { recovery: Some(Digest::of(&bytes)), ..mesh.keyring.pins() };
        let mut control = Keyring { recovers: true, ..mesh.keyring.clone() };
        control.take(&bytes, &set).unwrap();
        assert_eq!((control.pins(), control.seal()), (pins, Some(Seal { quorum: 1 })), "only bob can still sign");

        let mut joined = Keyring { pinned: pins, ..mesh.keyring.clone() };
        assert!(!joined.meets_pins(), "nothing is used before the recovery has come");
        joined.take(&bytes, &set).unwrap();
        assert!(joined.meets_pins());
        let mut followed = Mesh { keyring: Keyring { pinned: pins, ..mesh.keyring.clone() }, ..mesh };
        followed.take(&bytes, &set).unwrap();
        let again = Change::Recover {
            operator: name("mallory"),
            id: FactorId::parse("totp-2").unwrap(),
            factor: EnrolledFactor::Totp,
            reason: "another".into(),
            at_seconds: 8,
        };
        let (bytes, set) = followed.entry("local", vec![again], &[]);
        let refused = followed.take(&bytes, &set).unwrap_err();
        assert!(
            matches!(refused, KeyringError::Unsigned { quorum: 1, .. }),
            "one recovery is pinned, not any: {refused}"
        );
    }

    fn relying_party() -> RelyingParty {
        RelyingParty { id: "mesh.example".into(), origins: vec!["https://mesh.example".into()] }
    }

    fn factor_id(operator: &str) -> FactorId {
        FactorId::of_credential(operator.as_bytes()).unwrap()
    }

    /// A mesh of alice and bob, who are asked for two signatures, as someone who holds every key sees it.
    struct Mesh {
        follower: Follower,
        keyring: Keyring,
        alice: Soft,
        bob: Soft,
    }

    impl Mesh {
        fn new(quorum: Option<u32>) -> Self {
            let (alice, bob) = (Soft::new(), Soft::new());
            let enrol = |operator: &str, soft: &Soft| {
                let relying_party = relying_party();
                let key = SigningKey { key: soft.key.clone(), backup_eligible: false, relying_party, model: None };
                vec![
                    Change::InviteOperator { name: name(operator), roles: ["owner".into()].into() },
                    Change::EnrollOperator {
                        name: name(operator),
                        id: factor_id(operator),
                        factor: EnrolledFactor::Roaming(key),
                    },
                ]
            };
            let first = vec![
                Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
                declare("web"),
                declare("catalog"),
            ];
            let steps = [first, enrol("alice", &alice), enrol("bob", &bob)];
            let mut mesh = Self { follower: Follower::default(), keyring: Keyring::default(), alice, bob };
            for changes in steps.into_iter().chain(quorum.map(|quorum| vec![Change::SealSettings { quorum }])) {
                let (bytes, set) = mesh.entry("alice", changes, &[]);
                mesh.take(&bytes, &set).unwrap();
            }
            mesh
        }

        fn sign(&self, operator: &str, purpose: Purpose, set: &ChangeSet) -> Countersignature {
            let (anchor, root) = (self.keyring.anchor().unwrap(), self.keyring.root_at(set.base).unwrap());
            self.sign_over(
                operator,
                Challenge {
                    anchor,
                    purpose,
                    base: set.base,
                    root,
                    change_set: set.digest(),
                    nonce: Digest::of(b"nonce"),
                },
            )
        }

        fn sign_over(&self, operator: &str, challenge: Challenge) -> Countersignature {
            let soft = if operator == "alice" { &self.alice } else { &self.bob };
            let (data, client, signature) = soft.assertion(&relying_party(), &challenge);
            let Challenge { purpose, base, root, nonce, .. } = challenge;
            Countersignature {
                operator: name(operator),
                credential: factor_id(operator),
                purpose,
                base,
                root,
                nonce,
                authenticator_data: Bytes(data),
                client_data_json: Bytes(client),
                signature: Bytes(signature),
            }
        }

        fn set(&self, changes: Vec<Change>) -> ChangeSet {
            ChangeSet { base: self.keyring.revision(), changes }
        }

        fn entry(
            &self,
            actor: &str,
            changes: Vec<Change>,
            countersignatures: &[Countersignature],
        ) -> (Vec<u8>, Vec<u8>) {
            self.entry_of(actor, &self.set(changes), countersignatures)
        }

        /// An entry with any base at all, as a control plane that obeys nobody would make it.
        fn entry_of(&self, actor: &str, set: &ChangeSet, countersignatures: &[Countersignature]) -> (Vec<u8>, Vec<u8>) {
            let moved = ChangeSet { base: self.follower.revision(), ..set.clone() };
            let draft = self.follower.draft(1, actor, &moved, &Bodies::default()).unwrap();
            let mut entry = draft.entry;
            entry.digest = set.digest();
            if !countersignatures.is_empty() {
                entry.format = 2;
                entry.countersignatures = countersignatures.to_vec();
            }
            (entry.encode(), encode(set))
        }

        fn take(&mut self, bytes: &[u8], set: &[u8]) -> Result<Judged, KeyringError> {
            let judged = self.keyring.take(bytes, set)?;
            let (first_index, size, root) =
                (self.follower.revision().0, self.keyring.revision().0, self.keyring.root());
            let (entries, change_sets) = ([bytes], [set]);
            let bodies = &Bodies::default();
            let batch =
                crate::ledger::Batch { first_index, entries: &entries, change_sets: &change_sets, bodies, size, root };
            self.follower.extend(&batch).unwrap();
            Ok(judged)
        }
    }

    /// PROVES (sealed-history)
    /// PROVES (countersigned)
    #[test]
    fn a_sealed_mesh_takes_only_what_enough_of_its_operators_signed() {
        let mesh = Mesh::new(Some(2));
        let set = mesh.set(vec![role("front")]);
        let (step_up, countersign) = (Purpose::StepUp, Purpose::Countersign);
        let (alice, bob) = (mesh.sign("alice", step_up, &set), mesh.sign("bob", countersign, &set));
        let with = |change: &dyn Fn(&mut Countersignature)| {
            let mut changed = bob.clone();
            change(&mut changed);
            changed
        };
        let anchor = mesh.keyring.anchor().unwrap();
        let challenge = Challenge {
            anchor,
            purpose: countersign,
            base: set.base,
            root: bob.root,
            change_set: set.digest(),
            nonce: bob.nonce,
        };
        let over = |challenge: Challenge| mesh.sign_over("bob", challenge);
        let foreign = Challenge { anchor: Digest::of(b"staging"), ..challenge };
        let another_set = Challenge { change_set: Digest::of(b"another"), ..challenge };
        let another_root = Challenge { root: Digest::of(b"fork"), ..challenge };
        for (case, actor, given, expected) in [
            ("nobody", "alice", vec![], Some("")),
            ("the author alone", "alice", vec![alice.clone()], Some("")),
            ("one of them twice", "alice", vec![bob.clone(), bob.clone()], Some("")),
            ("both", "alice", vec![alice.clone(), bob.clone()], None),
            (
                "the author, countersigning",
                "alice",
                vec![mesh.sign("alice", countersign, &set), bob.clone()],
                Some(": `alice` cannot countersign what `alice` asked for"),
            ),
            (
                "another, stepping up for the author",
                "alice",
                vec![alice.clone(), mesh.sign("bob", step_up, &set)],
                Some(": `bob` cannot step_up what `alice` asked for"),
            ),
            (
                "both, of what a pipeline asked for",
                "pipeline/build",
                vec![mesh.sign("alice", countersign, &set), bob.clone()],
                None,
            ),
            ("of another mesh", "alice", vec![alice.clone(), over(foreign)], Some(": it answers another challenge")),
            (
                "of another change-set",
                "alice",
                vec![alice.clone(), over(another_set)],
                Some(": it answers another challenge"),
            ),
            (
                "of another history",
                "alice",
                vec![alice.clone(), over(another_root)],
                Some(": it was made on revision 4 of another history"),
            ),
            (
                "of another history, under this one's name",
                "alice",
                vec![alice.clone(), Countersignature { root: bob.root, ..over(another_root) }],
                Some(": it answers another challenge"),
            ),
            (
                "another nonce",
                "alice",
                vec![alice.clone(), with(&|c| c.nonce = Digest::of(b"other"))],
                Some(": it answers another challenge"),
            ),
            (
                "under another's name",
                "alice",
                vec![alice.clone(), with(&|c| c.operator = name("alice"))],
                Some(": operator `alice` has no such factor"),
            ),
            (
                "of nobody",
                "alice",
                vec![alice.clone(), with(&|c| c.operator = name("mallory"))],
                Some(": operator `mallory` has no such factor"),
            ),
            (
                "with another's factor",
                "alice",
                vec![alice.clone(), with(&|c| c.credential = factor_id("alice"))],
                Some(": operator `bob` has no such factor"),
            ),
            (
                "a flipped bit",
                "alice",
                vec![alice.clone(), with(&|c| c.authenticator_data.0[36] ^= 1)],
                Some(": its signature does not verify"),
            ),
        ] {
            let (bytes, set) = mesh.entry(actor, vec![role("front")], &given);
            let mut keyring = mesh.keyring.clone();
            match (keyring.take(&bytes, &set), expected) {
                (Ok(judged), None) => assert_eq!(judged.signers, [name("alice"), name("bob")].into(), "{case}"),
                (Err(error), Some(why)) => {
                    let error = error.to_string();
                    assert!(error.starts_with("entry 4 was signed by ") && error.contains(why), "{case}: {error}");
                    assert_eq!(keyring, mesh.keyring, "{case}");
                }
                (found, _) => panic!("{case}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_control_plane_that_adds_a_key_of_its_own_is_refused_and_so_is_what_it_signs() {
        let mut mesh = Mesh::new(Some(1));
        let mallory = Soft::new();
        let key = SigningKey {
            key: mallory.key.clone(),
            backup_eligible: false,
            relying_party: relying_party(),
            model: None,
        };
        let add = Change::AddFactor {
            operator: name("alice"),
            id: factor_id("mallory"),
            factor: EnrolledFactor::Roaming(key),
        };
        let (bytes, set) = mesh.entry("alice", vec![add.clone()], &[]);
        assert!(matches!(mesh.take(&bytes, &set), Err(KeyringError::Unsigned { index: 4, quorum: 1, .. })));
        // Nor does it take the seal off, and a key counts only from the entry after its own.
        let (bytes, set) = mesh.entry("alice", vec![Change::SealSettings { quorum: 1 }], &[]);
        assert!(mesh.take(&bytes, &set).is_err());
        mesh.alice = mallory;
        let adding = mesh.set(vec![add]);
        let own = Countersignature { credential: factor_id("mallory"), ..mesh.sign("alice", Purpose::StepUp, &adding) };
        let (bytes, set) = mesh.entry_of("alice", &adding, &[own]);
        assert!(mesh.take(&bytes, &set).is_err());
    }

    #[test]
    fn without_a_seal_the_signatures_are_told_and_nothing_is_refused() {
        let mut mesh = Mesh::new(None);
        let set = mesh.set(vec![role("front")]);
        let bob = mesh.sign("bob", Purpose::Countersign, &set);
        let (bytes, set) = mesh.entry_of("alice", &set, &[bob]);
        assert_eq!(mesh.take(&bytes, &set).unwrap().signers, [name("bob")].into());
        let (bytes, set) = mesh.entry("alice", vec![role("back")], &[]);
        assert_eq!(mesh.take(&bytes, &set), Ok(Judged::default()));
    }

    #[test]
    fn the_anchor_is_the_entry_of_the_first_enrolment_and_a_pinned_one_is_the_only_one() {
        let (mesh, other) = (Mesh::new(None), Mesh::new(None));
        let anchor = mesh.keyring.anchor().unwrap();
        assert_ne!(Some(anchor), other.keyring.anchor());
        let mut pinned = Keyring::pinned(Pins { anchor: Some(anchor), ..Pins::default() });
        assert_eq!(pinned.anchor(), None);
        let created =
            Mesh { follower: Follower::default(), keyring: Keyring::default(), alice: Soft::new(), bob: Soft::new() };
        let (bytes, set) =
            created.entry("local", vec![Change::CreateMesh { trust_domain: TrustDomain::parse("x").unwrap() }], &[]);
        pinned.take(&bytes, &set).unwrap();
        let mallory = Mesh::new(None);
        let key = SigningKey {
            key: mallory.alice.key.clone(),
            backup_eligible: false,
            relying_party: relying_party(),
            model: None,
        };
        let enrol = ChangeSet {
            base: Revision(1),
            changes: vec![
                Change::InviteOperator { name: name("alice"), roles: Default::default() },
                Change::EnrollOperator {
                    name: name("alice"),
                    id: factor_id("alice"),
                    factor: EnrolledFactor::Platform(key),
                },
            ],
        };
        let entry = Entry {
            format: 1,
            index: 1,
            at_ms: 1,
            actor: "local".into(),
            digest: enrol.digest(),
            state: Digest::default(),
            countersignatures: vec![],
        };
        let found = Digest::of(&entry.encode());
        let refused = pinned.take(&entry.encode(), &encode(&enrol));
        assert_eq!(refused, Err(KeyringError::OtherAnchor { pinned: anchor, found }));
        assert!(!pinned.meets_pins());
    }

    /// PROVES (sealed-history)
    #[test]
    fn a_history_that_leaves_the_pinned_one_before_the_seal_is_refused_at_its_own_seal_or_never_complete() {
        let mut mesh = Mesh::new(None);
        let sealing = vec![Change::SealSettings { quorum: 1 }];
        let fork = |mesh: &Mesh| Mesh {
            follower: mesh.follower.clone(),
            keyring: mesh.keyring.clone(),
            alice: Soft::new(),
            bob: Soft::new(),
        };
        let mut forged = fork(&mesh);
        let (bytes, set) = mesh.entry("alice", sealing.clone(), &[]);
        mesh.take(&bytes, &set).unwrap();
        let pins = mesh.keyring.pins();
        assert_eq!(pins, Pins { anchor: mesh.keyring.anchor(), seal: Some(Digest::of(&bytes)), recovery: None });
        // Before the seal nothing is signed: a control plane can add an operator of its own there, and seal for them.
        let mallory = Soft::new();
        let key = SigningKey {
            key: mallory.key.clone(),
            backup_eligible: false,
            relying_party: relying_party(),
            model: None,
        };
        let (id, factor) = (factor_id("mallory"), EnrolledFactor::Roaming(key));
        let (bytes, set) = forged.entry("alice", vec![Change::AddFactor { operator: name("alice"), id, factor }], &[]);
        let mut told = Keyring { pinned: pins, ..forged.keyring.clone() };
        told.take(&bytes, &set).unwrap();
        assert!(!told.meets_pins(), "what came so far says nothing about the mesh");
        forged.take(&bytes, &set).unwrap();
        let (bytes, set) = forged.entry("alice", sealing, &[]);
        let refused = told.take(&bytes, &set).unwrap_err();
        assert!(matches!(refused, KeyringError::OtherSeal { index: 4, .. }), "{refused}");
    }

    #[test]
    fn what_is_remembered_beside_a_state_goes_on_as_if_nothing_had_been_forgotten() {
        let mut mesh = Mesh::new(Some(1));
        let signed = mesh.set(vec![Change::SetRoute { name: "web".into(), route: route_to("web") }]);
        let alice = mesh.sign("alice", Purpose::StepUp, &signed);
        let between = mesh.set(vec![declare("new")]);
        let bob = mesh.sign("bob", Purpose::StepUp, &between);
        let (bytes, set) = mesh.entry_of("bob", &between, &[bob]);
        mesh.take(&bytes, &set).unwrap();
        let kept = serde_json::to_vec(&mesh.keyring.remember()).unwrap();
        let kept = || serde_json::from_slice::<Remembered>(&kept).unwrap();
        let pins = mesh.keyring.pins();
        let mut resumed = Keyring::resume(kept(), pins, &mesh.follower).unwrap();
        assert_eq!((resumed.root(), resumed.seal()), (mesh.keyring.root(), mesh.keyring.seal()));
        let (bytes, set) = mesh.entry_of("alice", &signed, &[alice]);
        assert_eq!(resumed.take(&bytes, &set).unwrap().signers, [name("alice")].into());
        let other = Pins { seal: Some(Digest::of(b"another")), ..pins };
        assert_eq!(Keyring::resume(kept(), other, &mesh.follower), None);
        assert_eq!(Keyring::resume(Remembered::default(), pins, &mesh.follower), None, "the anchor is unknown");
        assert_eq!(Keyring::resume(Remembered::default(), Pins::default(), &mesh.follower), None);
        assert_eq!(Keyring::resume(kept(), Pins::default(), &Mesh::new(None).follower), None, "of another state");
        let young = Follower::default();
        assert!(Keyring::resume(Remembered::default(), Pins::default(), &young).is_some());
    }

    /// PROVES (signed-base-holds)
    #[test]
    fn a_signature_outlives_what_does_not_concern_it_and_nothing_else() {
        let route = |service_name: &str| Change::SetRoute { name: service_name.into(), route: route_to(service_name) };
        let policy = |id: &str| Change::SetPolicy { id: id.into(), file: "f".into(), body: Digest::of(b"") };
        let deploy = |of: &str| Change::Deploy { service: service(of), artifacts: [Digest::of(b"1")].into() };
        let upstream = {
            let mut spec = ServiceSpec::new(Protocol::Http);
            spec.upstreams = [service("catalog")].into();
            Change::DeclareService { name: service("web"), spec }
        };
        let invite = Change::InviteOperator { name: name("carol"), roles: Default::default() };
        for (case, signed, later, holds) in [
            ("nothing came", vec![route("web")], vec![], true),
            ("another route", vec![route("web")], vec![route("catalog")], true),
            ("the same route", vec![route("web")], vec![route("web")], false),
            ("another service", vec![route("web")], vec![declare("new")], true),
            ("the route's service", vec![route("web")], vec![declare("web")], false),
            ("a role", vec![route("web")], vec![role("front")], false),
            ("an operator", vec![route("web")], vec![invite], false),
            ("the gate", vec![route("web")], vec![Change::RemoveGatePolicy { id: "x".into() }], false),
            ("the seal", vec![route("web")], vec![Change::SealSettings { quorum: 1 }], false),
            ("another policy", vec![policy("a")], vec![policy("b")], true),
            ("the same policy", vec![policy("a")], vec![Change::RemovePolicy { id: "a".into() }], false),
            ("a service, under a policy", vec![policy("a")], vec![declare("new")], false),
            ("an upstream", vec![upstream.clone()], vec![declare("catalog")], false),
            ("a deployment of another", vec![deploy("web")], vec![deploy("catalog")], true),
            ("a deployment of the same", vec![deploy("web")], vec![deploy("web")], false),
            ("the deployed service", vec![deploy("web")], vec![Change::RemoveService { name: service("web") }], false),
            ("a route, of a role change", vec![role("front")], vec![route("web")], true),
            ("a member, of a role change", vec![role("front")], vec![declare("web")], false),
            ("the second of two", vec![route("web"), policy("a")], vec![declare("catalog")], false),
        ] {
            let signed = ChangeSet { base: Revision(7), changes: signed };
            let later: Vec<_> = later
                .into_iter()
                .map(|change| writes(&ChangeSet { base: Revision(0), changes: vec![change] }))
                .collect();
            let found = StillHolds::over(&signed, &later);
            assert_eq!(found.is_ok(), holds, "{case}: {found:?}");
            match found {
                Ok(proof) => assert_eq!((proof.base(), proof.held()), (Revision(7), Revision(7 + later.len() as u64))),
                Err((revision, _)) => assert_eq!(revision, Revision(8), "{case}"),
            }
        }
    }

    /// PROVES (signed-base-holds)
    #[test]
    fn the_verifier_recomputes_whether_a_signature_outlived_what_came_between() {
        for (between, expected) in
            [(role("back"), false), (Change::SetRoute { name: "r".into(), route: route_to("catalog") }, true)]
        {
            let mut mesh = Mesh::new(Some(1));
            let route = Change::SetRoute { name: "web".into(), route: route_to("web") };
            let signed = mesh.set(vec![route]);
            let alice = mesh.sign("alice", Purpose::StepUp, &signed);
            let between = mesh.set(vec![between]);
            let bob = mesh.sign("bob", Purpose::StepUp, &between);
            let (bytes, set) = mesh.entry_of("bob", &between, &[bob]);
            mesh.take(&bytes, &set).unwrap();
            let (bytes, set) = mesh.entry_of("alice", &signed, &[alice]);
            let found = mesh.take(&bytes, &set);
            assert_eq!(found.is_ok(), expected, "{found:?}");
            if let Err(error) = found {
                let says = "entry 5 was signed by 0 of 1 operators: what they signed was voided by revision 5";
                assert_eq!(error.to_string(), says);
            }
        }
    }

    #[test]
    fn a_countersigned_draft_is_an_entry_that_every_verifier_takes() {
        let mut mesh = Mesh::new(Some(2));
        let signed = mesh.set(vec![Change::SetRoute { name: "web".into(), route: route_to("web") }]);
        let both = vec![mesh.sign("alice", Purpose::StepUp, &signed), mesh.sign("bob", Purpose::Countersign, &signed)];
        let between = mesh.set(vec![declare("new")]);
        let seen =
            vec![mesh.sign("bob", Purpose::StepUp, &between), mesh.sign("alice", Purpose::Countersign, &between)];
        let draft = |mesh: &Mesh, actor: &str, set: &ChangeSet, countersignatures: Vec<Countersignature>, holds| {
            mesh.follower.draft_countersigned(1, actor, set, &Bodies::default(), countersignatures, holds)
        };
        let too_early = mesh.keyring.still_holds(&signed).unwrap();
        let next = draft(&mesh, "bob", &between, seen, mesh.keyring.still_holds(&between).unwrap()).unwrap();
        assert_eq!(mesh.take(&next.bytes, &next.change_set).unwrap().signers.len(), 2);
        assert_eq!(mesh.follower, next.next);
        let moved = Err(DraftError::Moved { base: Revision(4), held: Revision(5) });
        assert_eq!(draft(&mesh, "alice", &signed, both.clone(), too_early), moved, "a proof of another moment");
        let holds = mesh.keyring.still_holds(&signed).unwrap();
        assert_eq!(draft(&mesh, "alice", &signed, vec![], holds), Err(DraftError::Countersignatures(0)));
        let many = vec![both[0].clone(); COUNTERSIGNATURES_MAX + 1];
        assert_eq!(draft(&mesh, "alice", &signed, many, holds), Err(DraftError::Countersignatures(33)));
        let long = Countersignature { signature: Bytes(vec![0; ENTRY_BYTES_MAX]), ..both[0].clone() };
        let long = draft(&mesh, "alice", &signed, vec![long], holds);
        assert!(matches!(long, Err(DraftError::TooLong { what: "the entry", .. })));
        let next = draft(&mesh, "alice", &signed, both, holds).unwrap();
        assert_eq!((next.entry.format, Entry::parse(&next.bytes)), (2, Ok(next.entry.clone())));
        assert_eq!(mesh.take(&next.bytes, &next.change_set).unwrap().signers.len(), 2);
        assert_eq!(mesh.follower, next.next);
    }

    #[test]
    fn a_base_beyond_what_is_remembered_voids_what_was_signed() {
        let mut mesh = Mesh::new(None);
        let old = mesh.set(vec![declare("new")]);
        for n in 0..BASES_MAX {
            assert!(mesh.keyring.still_holds(&old).is_ok(), "{n}");
            let (bytes, set) =
                mesh.entry("alice", vec![Change::SetRoute { name: "r".into(), route: route_to("catalog") }], &[]);
            mesh.take(&bytes, &set).unwrap();
        }
        assert!(mesh.keyring.still_holds(&old).is_ok());
        let (bytes, set) = mesh.entry("alice", vec![Change::RemoveRoute { name: "r".into() }], &[]);
        mesh.take(&bytes, &set).unwrap();
        assert!(mesh.keyring.still_holds(&old).is_err());
        assert_eq!(mesh.keyring.root_at(old.base), None);
    }
}
