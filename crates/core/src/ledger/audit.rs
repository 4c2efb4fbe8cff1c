//! An export, and its audit: the ledger as files from which an outsider recomputes everything, with public keys alone.
//!
//! | path | holds |
//! |---|---|
//! | `checkpoint` | the signed checkpoint: what the log says its tree is |
//! | `tile/<level>/<index>` | the hashes of the tree, as tlog-tiles has them |
//! | `tile/entries/<index>` | the exact bytes of 256 entries, each behind its length |
//! | `body/<2 digits>/<64 digits>` | a change-set or a text, under the SHA-256 of its bytes in hexadecimal |
//!
//! [`audit`] believes nothing but the keys it is given: it recomputes the tree, every state, every digest and every
//! countersignature. It asks for one path after the other and opens no file itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::{
    Batch, CHANGE_SET_BYTES_MAX, CheckpointError, Damage, ENTRY_BYTES_MAX, Follower, LedgerError, NOTE_BYTES_MAX, Note,
    Resource, TILE_WIDTH, Tile, TileError, TileHashes, Trust, VerifiedCheckpoint, change_set_of, entry_at, hash_leaf,
    parse_bundle,
};
use crate::{
    assurance::webauthn::PublicKey,
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    countersignature::{CountersignatureRefused, Part},
    identity::OperatorName,
    keyring::{Judged, Keyring, KeyringError, Pins},
    operator::Seal,
};

/// Longest list of known keys, in bytes.
pub const KNOWN_BYTES_MAX: usize = 4 << 20;

/// One file of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Exported {
    /// What every log serves.
    Log(Resource),
    /// A change-set or a text, by the SHA-256 of its bytes.
    Body(Digest),
}

/// Whom an outsider knows beforehand: the mesh's anchor, and the public keys that its operators gave them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// SHA-256 of the entry with the first enrolment.
    pub anchor: Option<Digest>,
    /// Every key that may ever be enrolled, by operator.
    pub keys: BTreeMap<OperatorName, BTreeSet<PublicKey>>,
}

/// What an export that holds says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audited {
    /// The checkpoint, and who cosigned it.
    pub checkpoint: VerifiedCheckpoint,
    /// The digest of the state that all entries add up to.
    pub state: Digest,
    /// SHA-256 of the entry with the first enrolment; `None` while the mesh is unprotected.
    pub anchor: Option<Digest>,
    /// What a sealed mesh asks for.
    pub seal: Option<Seal>,
    /// Every key that was ever enrolled, by operator.
    pub keys: BTreeMap<OperatorName, BTreeSet<PublicKey>>,
    /// Entries from the anchor on.
    pub protected: u64,
    /// Entries that at least one operator signed.
    pub countersigned: u64,
}

/// Why an export does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditError<E> {
    /// A file is missing, or cannot be read.
    #[error("{}`{path}` could not be read", of(*entry))]
    Read {
        /// Which.
        path: Exported,
        /// The entry that needs it, when it is one entry's.
        entry: Option<u64>,
        /// Why.
        #[source]
        source: E,
    },
    /// The checkpoint is none, or not to be believed.
    #[error("the checkpoint is not to be believed")]
    Checkpoint(#[from] CheckpointError),
    /// A bundle of entries is none.
    #[error("`{path}` is not a bundle of the ledger")]
    Bundle {
        /// Which.
        path: Exported,
        /// Why.
        #[source]
        source: TileError,
    },
    /// An entry is another one than the tree says, or the tree is.
    #[error("entry {index} does not have the hash that stands in `{tile}`")]
    Leaf {
        /// Which.
        index: u64,
        /// Where its hash stands.
        tile: Exported,
    },
    /// A tile does not have the bytes that the entries below it make.
    #[error("`{0}` does not hold the hashes of the entries below it")]
    Tile(Exported),
    /// A file is not what its name says.
    #[error("entry {index}: `{path}` does not hash to its name")]
    Body {
        /// The entry that refers to it.
        index: u64,
        /// Which.
        path: Exported,
    },
    /// The entries do not follow from each other.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The operators did not sign what a sealed mesh asks them to, or it is another mesh.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// A countersignature counts for nothing.
    #[error("a countersignature of entry {index} counts for nothing")]
    Countersignature {
        /// Whose.
        index: u64,
        /// Why.
        #[source]
        source: CountersignatureRefused,
    },
    /// What was signed meant something else by the time it was appended.
    #[error("what the operators signed in entry {index} was voided by revision {by}, which wrote {part:?}")]
    Voided {
        /// Which.
        index: u64,
        /// By which entry.
        by: Revision,
        /// What it wrote.
        part: Part,
    },
    /// An operator whom the outsider does not know, or not by this key.
    #[error("entry {index} enrols a key of operator `{operator}` that is not among those given: {}", String::from(key.clone()))]
    UnknownKey {
        /// Which.
        index: u64,
        /// Whose.
        operator: OperatorName,
        /// The key.
        key: PublicKey,
    },
    /// Operators were expected, and there are none.
    #[error("no operator has enrolled in this ledger, although some are known")]
    NoAnchor,
    /// The entries are whole, and not those that were signed.
    #[error("the entries add up to the root {found}, the checkpoint of {size} entries says {claimed}")]
    Root {
        /// Entries.
        size: u64,
        /// As recomputed.
        found: Digest,
        /// As signed.
        claimed: Digest,
    },
}

/// Why text is not a list of known keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {0} is neither `anchor <64 hexadecimal digits>` nor `<operator> <key in base64url>`")]
pub struct KnownError(usize);

/// Recomputes all of an export: the checkpoint's signatures, the tree, every state, every text, every countersignature.
///
/// INVARIANT (audited): what it returns follows from the keys in `trust` and `known` and from the bytes that `read` returned, every
/// one of which was verified; nothing is taken from the control plane's word.
pub fn audit<E>(
    trust: &Trust,
    known: Option<&Known>,
    mut read: impl FnMut(Exported) -> Result<Vec<u8>, E>,
) -> Result<Audited, AuditError<E>> {
    let mut get = |path, entry| read(path).map_err(|source| AuditError::Read { path, entry, source });
    let note = Note::parse(&get(Exported::Log(Resource::Checkpoint), None)?).map_err(CheckpointError::from)?;
    let checkpoint = trust.verify(&note)?;
    let (size, claimed) = (checkpoint.checkpoint().size(), checkpoint.checkpoint().root());
    let mut audit = Audit::new(known);
    for bundle in 0..size.div_ceil(u64::from(TILE_WIDTH)) {
        let tile = Tile::of(0, bundle, size).expect("INVARIANT: a bundle below the size has entries");
        let path = Exported::Log(Resource::Entries(tile));
        let bytes = get(path, None)?;
        let entries = parse_bundle(&bytes, tile.width).map_err(|source| AuditError::Bundle { path, source })?;
        audit.leaves::<E>(&entries, tile, &get(Exported::Log(Resource::Hashes(tile)), None)?)?;
        audit.follow(&entries, &mut get)?;
    }
    for tile in Tile::grown(0, size).filter(|tile| tile.level > 0) {
        let path = Exported::Log(Resource::Hashes(tile));
        if audit.tree.tile(tile).as_ref() != Some(&get(path, None)?) {
            return Err(AuditError::Tile(path));
        }
    }
    let found = audit.follower.root();
    if found != claimed {
        return Err(AuditError::Root { size, found, claimed });
    }
    if known.is_some() && audit.keyring.anchor().is_none() {
        return Err(AuditError::NoAnchor);
    }
    Ok(Audited {
        checkpoint,
        state: audit.follower.state().digest(),
        anchor: audit.keyring.anchor(),
        seal: audit.keyring.seal(),
        keys: audit.keys,
        protected: audit.protected,
        countersigned: audit.countersigned,
    })
}

/// What the entries so far add up to.
struct Audit<'a> {
    known: Option<&'a Known>,
    tree: TileHashes,
    follower: Follower,
    keyring: Keyring,
    keys: BTreeMap<OperatorName, BTreeSet<PublicKey>>,
    protected: u64,
    countersigned: u64,
}

impl<'a> Audit<'a> {
    fn new(known: Option<&'a Known>) -> Self {
        Self {
            known,
            tree: TileHashes::default(),
            follower: Follower::default(),
            keyring: Keyring::pinned(Pins { anchor: known.and_then(|known| known.anchor), ..Pins::default() }),
            keys: BTreeMap::new(),
            protected: 0,
            countersigned: 0,
        }
    }

    /// Entries against the tile above them: whoever changed one of the two is noticed at the entry.
    fn leaves<E>(&mut self, entries: &[&[u8]], tile: Tile, hashes: &[u8]) -> Result<(), AuditError<E>> {
        let path = Exported::Log(Resource::Hashes(tile));
        for ((entry, index), hash) in entries.iter().zip(self.tree.size()..).zip(hashes.chunks(32)) {
            let leaf = hash_leaf(entry);
            if leaf.0 != hash {
                return Err(AuditError::Leaf { index, tile: path });
            }
            self.tree.append(leaf);
        }
        if hashes.len() == entries.len() * 32 { Ok(()) } else { Err(AuditError::Tile(path)) }
    }

    /// One bundle, with the change-sets and the texts that it refers to.
    fn follow<E>(
        &mut self,
        entries: &[&[u8]],
        get: &mut impl FnMut(Exported, Option<u64>) -> Result<Vec<u8>, AuditError<E>>,
    ) -> Result<(), AuditError<E>> {
        let first_index = self.follower.revision().0;
        let (mut change_sets, mut bodies) = (Vec::with_capacity(entries.len()), Bodies::default());
        let mut parsed = Vec::with_capacity(entries.len());
        for (bytes, index) in entries.iter().zip(first_index..) {
            let damaged = |damage: Damage| LedgerError::Damaged { index, damage };
            let entry = entry_at(index, bytes).map_err(damaged)?;
            let change_set = get(Exported::Body(entry.digest), Some(index))?;
            let set = change_set_of(&entry, &change_set).map_err(damaged)?;
            for digest in set.changes.iter().filter_map(Change::body) {
                if bodies.get(&digest).is_none() {
                    let path = Exported::Body(digest);
                    let text = String::from_utf8(get(path, Some(index))?).ok();
                    if text.map(|text| bodies.insert(text)) != Some(digest) {
                        return Err(AuditError::Body { index, path });
                    }
                }
            }
            change_sets.push(change_set);
            parsed.push(set);
        }
        let size = first_index + entries.len() as u64;
        let slices: Vec<&[u8]> = change_sets.iter().map(Vec::as_slice).collect();
        let mut root = self.keyring.root();
        for (((bytes, change_set), set), index) in entries.iter().zip(&slices).zip(&parsed).zip(first_index..) {
            let judged = self.keyring.take(bytes, change_set)?;
            self.judged::<E>(index, judged)?;
            self.enrolled::<E>(index, set)?;
            root = self.keyring.root();
        }
        let batch = Batch { first_index, entries, change_sets: &slices, bodies: &bodies, size, root };
        self.follower.extend(&batch)?;
        Ok(())
    }

    /// Every signature that stands in the ledger must count: one that does not was moved there, or made up.
    fn judged<E>(&mut self, index: u64, judged: Judged) -> Result<(), AuditError<E>> {
        if let Some((by, part)) = judged.voided {
            return Err(AuditError::Voided { index, by, part });
        }
        if let Some(source) = judged.refused.into_iter().next() {
            return Err(AuditError::Countersignature { index, source });
        }
        self.countersigned += u64::from(!judged.signers.is_empty());
        self.protected += u64::from(self.keyring.anchor().is_some());
        Ok(())
    }

    fn enrolled<E>(&mut self, index: u64, set: &ChangeSet) -> Result<(), AuditError<E>> {
        for change in &set.changes {
            let (Change::EnrollOperator { name: operator, factor, .. } | Change::AddFactor { operator, factor, .. }) =
                change
            else {
                continue;
            };
            let Some(signing) = factor.signing_key() else { continue };
            let key = signing.key.clone();
            if self.known.is_some_and(|known| !known.keys.get(operator).is_some_and(|keys| keys.contains(&key))) {
                return Err(AuditError::UnknownKey { index, operator: operator.clone(), key });
            }
            self.keys.entry(operator.clone()).or_default().insert(key);
        }
        Ok(())
    }
}

impl Exported {
    /// Longest such file, in bytes.
    pub fn bytes_max(&self) -> usize {
        match self {
            Self::Log(Resource::Checkpoint) => NOTE_BYTES_MAX,
            Self::Log(Resource::Hashes(tile)) => usize::from(tile.width) * 32,
            Self::Log(Resource::Entries(tile)) => usize::from(tile.width) * (2 + ENTRY_BYTES_MAX),
            Self::Body(_) => CHANGE_SET_BYTES_MAX,
        }
    }
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log(resource) => resource.fmt(f),
            Self::Body(digest) => write!(f, "body/{:02x}/{digest}", digest.0[0]),
        }
    }
}

impl Known {
    /// Reads a list: one `anchor` at most, and a line for each key. Empty lines and those that begin with `#` say nothing.
    pub fn parse(text: &str) -> Result<Self, KnownError> {
        let mut known = Self::default();
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = || KnownError(number);
            let (name, value) = line.split_once(' ').ok_or_else(wrong)?;
            // An operator may be called `anchor`; no key is 64 hexadecimal digits.
            match value.parse::<Digest>() {
                Ok(digest) if name == "anchor" && known.anchor.is_none() => known.anchor = Some(digest),
                _ => {
                    let operator = OperatorName::parse(name).map_err(|_| wrong())?;
                    let key = PublicKey::try_from(value.trim().to_owned()).map_err(|_| wrong())?;
                    known.keys.entry(operator).or_default().insert(key);
                }
            }
        }
        Ok(known)
    }

    /// The list as it is read.
    pub fn encode(&self) -> String {
        let anchor = self.anchor.map(|anchor| format!("anchor {anchor}\n"));
        let keys = self.keys.iter().flat_map(|(operator, keys)| keys.iter().map(move |key| (operator, key)));
        anchor
            .into_iter()
            .chain(keys.map(|(operator, key)| format!("{operator} {}\n", String::from(key.clone()))))
            .collect()
    }
}

fn of(entry: Option<u64>) -> String {
    entry.map(|index| format!("entry {index}: ")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        assurance::{
            challenge::{Challenge, Purpose},
            webauthn::{RelyingParty, tests::Soft},
        },
        change::Member,
        countersignature::{Bytes, Countersignature},
        identity::{FactorId, ServiceName, TrustDomain},
        ledger::{Checkpoint, Entry, SignatureKind, VerifierKey, encode_bundle},
        operator::{EnrolledFactor, SigningKey},
        service::{Protocol, ServiceSpec},
    };

    const ORIGIN: &str = "countersign/shop.example";

    type Files = BTreeMap<Exported, Vec<u8>>;

    /// One entry to be: who asks, for what, and who signs.
    struct Step {
        actor: &'static str,
        changes: Vec<Change>,
        bodies: Bodies,
        signers: &'static [(&'static str, Purpose)],
        /// Takes the signatures of this entry instead.
        steals: Option<usize>,
    }

    /// Whoever makes ledgers: the keys of two operators, of the log and of a witness.
    struct Maker {
        softs: BTreeMap<&'static str, Soft>,
    }

    fn key_of(name: &str, kind: SignatureKind, seed: &str) -> (VerifierKey, Ed25519KeyPair) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&Digest::of(seed.as_bytes()).0).unwrap();
        (VerifierKey::new(name, kind, pair.public_key().as_ref().try_into().unwrap()).unwrap(), pair)
    }

    fn note(origin: &str, name: &str, seed: &str, size: u64, root: Digest) -> Vec<u8> {
        let text = Checkpoint::new(origin, size, root).unwrap().encode();
        let sign = |seed: &str, name, kind| {
            let (key, pair) = key_of(name, kind, seed);
            let signed = key.sign(&text, 7, |message| Ok::<_, ()>(pair.sign(message).as_ref().try_into().unwrap()));
            signed.unwrap()
        };
        let lines =
            vec![sign(seed, name, SignatureKind::Ed25519), sign("witness", "witness", SignatureKind::Cosignature)];
        Note::new(text, lines).unwrap().encode().into_bytes()
    }

    fn trust() -> Trust {
        let witnesses = vec![key_of("witness", SignatureKind::Cosignature, "witness").0];
        Trust { witnesses, quorum: 1, ..Trust::log(key_of(ORIGIN, SignatureKind::Ed25519, "log").0) }
    }

    fn operator(given: &str) -> OperatorName {
        OperatorName::parse(given).unwrap()
    }

    fn factor_id(operator: &str) -> FactorId {
        FactorId::of_credential(operator.as_bytes()).unwrap()
    }

    fn relying_party() -> RelyingParty {
        RelyingParty { id: "mesh.example".into(), origins: vec!["https://mesh.example".into()] }
    }

    impl Maker {
        fn new() -> Self {
            Self { softs: ["alice", "bob", "mallory"].map(|name| (name, Soft::new())).into() }
        }

        fn known(&self) -> Known {
            let keys = ["alice", "bob"].map(|name| (operator(name), [self.softs[name].key.clone()].into()));
            Known { anchor: None, keys: keys.into() }
        }

        fn enrol(&self, name: &str, with_key_of: &str) -> Vec<Change> {
            let key = self.softs[with_key_of].key.clone();
            let factor = EnrolledFactor::Roaming(SigningKey {
                key,
                backup_eligible: false,
                relying_party: relying_party(),
                model: None,
            });
            vec![
                Change::InviteOperator { name: operator(name), roles: ["owner".into()].into() },
                Change::EnrollOperator { name: operator(name), id: factor_id(name), factor },
            ]
        }

        /// A mesh, its two operators, a policy that both signed, and then what traffic rules come to in a year.
        fn steps(&self) -> Vec<Step> {
            let web = ServiceName::parse("web").unwrap();
            let plain = |actor, changes| Step { actor, changes, bodies: Bodies::default(), signers: &[], steals: None };
            let policy = |text: &str| {
                let mut bodies = Bodies::default();
                let body = bodies.insert(text);
                (vec![Change::SetPolicy { id: "p".into(), file: "policies/p.cedar".into(), body }], bodies)
            };
            let (first, first_bodies) = policy("permit(principal, action, resource);");
            let (second, second_bodies) = policy("forbid(principal, action, resource);");
            let create = Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() };
            let declare = Change::DeclareService { name: web.clone(), spec: ServiceSpec::new(Protocol::Http) };
            let mut steps = vec![
                plain("local", vec![create, declare]),
                Step { bodies: first_bodies, ..plain("local", first) },
                plain("local", self.enrol("alice", "alice")),
                Step { signers: &[("alice", Purpose::StepUp)], ..plain("alice", self.enrol("bob", "bob")) },
                Step {
                    bodies: second_bodies,
                    signers: &[("alice", Purpose::StepUp), ("bob", Purpose::Countersign)],
                    ..plain("alice", second)
                },
            ];
            for n in steps.len()..300 {
                let members = [Member::Service(web.clone())].into();
                steps.push(plain("alice", vec![Change::SetRole { name: format!("role{}", n % 7).into(), members }]));
            }
            steps
        }

        /// Makes a ledger of what is asked, however wrong, and exports it with the log's signature.
        fn export(&self, steps: Vec<Step>) -> Files {
            let (mut follower, mut keyring) = (Follower::default(), Keyring::default());
            let (mut files, mut tree, mut entries) = (Files::new(), TileHashes::default(), Vec::new());
            let mut signed: Vec<Vec<Countersignature>> = Vec::new();
            for step in steps {
                let set = ChangeSet { base: follower.revision(), changes: step.changes };
                let mut signatures: Vec<_> =
                    step.signers.iter().map(|(by, purpose)| self.sign(by, *purpose, &keyring, &set)).collect();
                if let Some(from) = step.steals {
                    signatures = signed[from].clone();
                }
                let draft = if signatures.is_empty() {
                    follower.draft(1, step.actor, &set, &step.bodies).unwrap()
                } else {
                    let holds = keyring.still_holds(&set).unwrap();
                    let of = signatures.clone();
                    follower.draft_countersigned(1, step.actor, &set, &step.bodies, of, holds).unwrap()
                };
                // What a sealed mesh would refuse is written all the same.
                let _ = keyring.take(&draft.bytes, &draft.change_set);
                signed.push(signatures);
                tree.append(hash_leaf(&draft.bytes));
                entries.push(draft.bytes);
                files.insert(Exported::Body(draft.entry.digest), draft.change_set);
                for (digest, text) in step.bodies.iter() {
                    files.insert(Exported::Body(*digest), text.as_bytes().to_vec());
                }
                follower = draft.next;
            }
            let size = tree.size();
            for tile in Tile::grown(0, size) {
                files.insert(Exported::Log(Resource::Hashes(tile)), tree.tile(tile).unwrap());
                if tile.level == 0 {
                    let from = tile.index as usize * 256;
                    let bundle = encode_bundle(&entries[from..from + usize::from(tile.width)]).unwrap();
                    files.insert(Exported::Log(Resource::Entries(tile)), bundle);
                }
            }
            files.insert(CHECKPOINT, note(ORIGIN, ORIGIN, "log", size, follower.root()));
            files
        }

        fn sign(&self, by: &str, purpose: Purpose, keyring: &Keyring, set: &ChangeSet) -> Countersignature {
            let (base, root, nonce) = (set.base, keyring.root(), Digest::of(b"nonce"));
            let anchor = keyring.anchor().unwrap();
            let challenge = Challenge { anchor, purpose, base, root, change_set: set.digest(), nonce };
            let (data, client, signature) = self.softs[by].assertion(&relying_party(), &challenge);
            Countersignature {
                operator: operator(by),
                credential: factor_id(by),
                purpose,
                base,
                root,
                nonce,
                authenticator_data: Bytes(data),
                client_data_json: Bytes(client),
                signature: Bytes(signature),
            }
        }
    }

    const CHECKPOINT: Exported = Exported::Log(Resource::Checkpoint);
    const FIRST: Tile = Tile { level: 0, index: 0, width: 256 };
    const LAST: Tile = Tile { level: 0, index: 1, width: 44 };
    const UPPER: Exported = Exported::Log(Resource::Hashes(Tile { level: 1, index: 0, width: 1 }));

    fn entries_of(files: &Files, tile: Tile) -> Vec<Vec<u8>> {
        let bundle = &files[&Exported::Log(Resource::Entries(tile))];
        parse_bundle(bundle, tile.width).unwrap().into_iter().map(<[u8]>::to_vec).collect()
    }

    fn put_entries(files: &mut Files, tile: Tile, entries: &[Vec<u8>]) {
        files.insert(Exported::Log(Resource::Entries(tile)), encode_bundle(entries).unwrap());
    }

    fn audited(files: &Files, trust: &Trust, known: &Known) -> Result<Audited, String> {
        let read = |path| files.get(&path).cloned().ok_or(std::fmt::Error);
        audit(trust, Some(known), read).map_err(|error| {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(next) = cause {
                text = format!("{text}: {next}");
                cause = next.source();
            }
            text
        })
    }

    #[test]
    fn an_honest_export_holds_and_says_who_stands_behind_it() {
        let maker = Maker::new();
        let files = maker.export(maker.steps());
        let said = audited(&files, &trust(), &maker.known()).unwrap();
        assert_eq!((said.checkpoint.checkpoint().size(), said.protected, said.countersigned), (300, 298, 2));
        assert_eq!(said.checkpoint.cosigned_by().len(), 1);
        assert_eq!(said.keys, maker.known().keys);
        let anchor = Digest::of(&entries_of(&files, FIRST)[2]);
        assert_eq!(said.anchor, Some(anchor));
        let pinned = Known { anchor: Some(anchor), ..maker.known() };
        assert_eq!(audited(&files, &trust(), &pinned).unwrap(), said);
        assert_eq!(Known::parse(&pinned.encode()), Ok(pinned));
    }

    /// PROVES (audited)
    #[test]
    fn a_tampered_export_is_refused_at_the_entry_with_what_is_wrong() {
        let maker = Maker::new();
        let honest = maker.export(maker.steps());
        let entries = Exported::Log(Resource::Entries(FIRST));
        let digest_of = |index: usize| Entry::parse(&entries_of(&honest, FIRST)[index]).unwrap().digest;
        let (policy_set, text) = (digest_of(4), Digest::of(b"forbid(principal, action, resource);"));
        let root = Checkpoint::parse(Note::parse(&honest[&CHECKPOINT]).unwrap().text()).unwrap().root();
        let flip = |files: &mut Files, path: Exported, at: usize| files.get_mut(&path).unwrap()[at] ^= 1;
        let edit = |files: &mut Files, index: usize, from: &str, to: &str| {
            let mut all = entries_of(files, FIRST);
            all[index] = String::from_utf8(all[index].clone()).unwrap().replacen(from, to, 1).into_bytes();
            put_entries(files, FIRST, &all);
        };
        let about = |digest, what: &str| format!("entry 4: `{}` {what}", Exported::Body(digest));
        let unread = about(policy_set, "could not be read");
        let (unread_text, altered_text) = (about(text, "could not be read"), about(text, "does not hash to its name"));
        type Tamper<'a> = Box<dyn Fn(&mut Files) + 'a>;
        let cases: Vec<(&str, Tamper, &str)> = vec![
            ("a flipped byte in an entry", Box::new(|f| flip(f, entries, 40)), "entry 0 does not have the hash"),
            ("an edited entry", Box::new(|f| edit(f, 7, "alice", "carol")), "entry 7 does not have the hash"),
            (
                "two entries swapped",
                Box::new(|f| {
                    let mut all = entries_of(f, FIRST);
                    all.swap(9, 10);
                    put_entries(f, FIRST, &all);
                }),
                "entry 9 does not have the hash that stands in `tile/0/000`",
            ),
            (
                "a missing entry",
                Box::new(|f| {
                    let mut all = entries_of(f, FIRST);
                    all.remove(12);
                    put_entries(f, FIRST, &all);
                }),
                "`tile/entries/000` is not a bundle of the ledger: a bundle must hold 256 entries, this one holds 255",
            ),
            (
                "an entry too many",
                Box::new(|f| f.get_mut(&entries).unwrap().extend([0, 1, b'x'])),
                "`tile/entries/000` is not a bundle of the ledger: a bundle must hold 256 entries, this one holds 257",
            ),
            (
                "a missing bundle",
                Box::new(|f| drop(f.remove(&Exported::Log(Resource::Entries(LAST))))),
                "`tile/entries/001.p/44` could not be read",
            ),
            ("an edited text", Box::new(|f| flip(f, Exported::Body(text), 3)), &altered_text),
            ("a missing text", Box::new(|f| drop(f.remove(&Exported::Body(text)))), &unread_text),
            (
                "an edited change-set",
                Box::new(|f| flip(f, Exported::Body(policy_set), 3)),
                "entry 4 of the ledger is damaged: its change-set has digest",
            ),
            ("a missing change-set", Box::new(|f| drop(f.remove(&Exported::Body(policy_set)))), &unread),
            (
                "a truncated tile",
                Box::new(|f| f.get_mut(&Exported::Log(Resource::Hashes(LAST))).unwrap().truncate(44 * 32 - 1)),
                "entry 299 does not have the hash that stands in `tile/0/001.p/44`",
            ),
            (
                "a tile cut at a hash",
                Box::new(|f| f.get_mut(&Exported::Log(Resource::Hashes(LAST))).unwrap().truncate(43 * 32)),
                "`tile/0/001.p/44` does not hold the hashes of the entries below it",
            ),
            (
                "an altered tile above",
                Box::new(|f| flip(f, UPPER, 3)),
                "`tile/1/000.p/1` does not hold the hashes of the entries below it",
            ),
            (
                "an entry edited together with its tile",
                Box::new(|f| {
                    edit(f, 7, "\"at_ms\":1", "\"at_ms\":2");
                    let leaf = hash_leaf(&entries_of(f, FIRST)[7]);
                    let tile = f.get_mut(&Exported::Log(Resource::Hashes(FIRST))).unwrap();
                    tile[7 * 32..8 * 32].copy_from_slice(&leaf.0);
                }),
                "`tile/1/000.p/1` does not hold the hashes of the entries below it",
            ),
            (
                "a forged root",
                Box::new(|f| {
                    let forged = note(ORIGIN, ORIGIN, "log", 300, Digest::of(b"forged"));
                    f.insert(CHECKPOINT, forged);
                }),
                "the entries add up to the root",
            ),
            (
                "an edited root",
                Box::new(|f| flip(f, CHECKPOINT, ORIGIN.len() + 6)),
                "the checkpoint is not to be believed: the signature of",
            ),
            (
                "a foreign log key",
                Box::new(|f| drop(f.insert(CHECKPOINT, note(ORIGIN, ORIGIN, "stranger", 300, root)))),
                "the checkpoint is not to be believed: the log itself did not sign it",
            ),
            (
                "a checkpoint of another origin",
                Box::new(|f| drop(f.insert(CHECKPOINT, note("countersign/other.example", ORIGIN, "log", 300, root)))),
                "the checkpoint is not to be believed: it is a checkpoint of `countersign/other.example`, not of",
            ),
            (
                "an older checkpoint that claims a larger size",
                Box::new(|f| {
                    let older = String::from_utf8(note(ORIGIN, ORIGIN, "log", 200, root)).unwrap();
                    f.insert(CHECKPOINT, older.replacen("\n200\n", "\n300\n", 1).into_bytes());
                }),
                "the checkpoint is not to be believed: the signature of",
            ),
            (
                "a size beyond the entries",
                Box::new(|f| drop(f.insert(CHECKPOINT, note(ORIGIN, ORIGIN, "log", 301, root)))),
                "`tile/entries/001.p/45` could not be read",
            ),
            ("no checkpoint", Box::new(|f| drop(f.remove(&CHECKPOINT))), "`checkpoint` could not be read"),
        ];
        for (case, tamper, expected) in cases {
            let mut files = honest.clone();
            tamper(&mut files);
            assert_ne!(files, honest, "{case}");
            let said = audited(&files, &trust(), &maker.known()).expect_err(case);
            assert!(said.starts_with(expected), "{case}: {said}");
        }
    }

    /// Whoever has the control plane has the log's key, and signs whatever history they like.
    ///
    /// PROVES (audited)
    #[test]
    fn a_whole_history_made_anew_with_the_logs_own_key_is_refused_where_the_operators_did_not_sign_it() {
        let maker = Maker::new();
        type Forge<'a> = Box<dyn Fn(&mut Vec<Step>) + 'a>;
        let cases: Vec<(&str, Forge, &str)> = vec![
            (
                "a countersignature moved to another entry",
                Box::new(|steps| steps[6].steals = Some(4)),
                "a countersignature of entry 6 counts for nothing: it was made on revision 4 of another history",
            ),
            (
                "the countersignatures of the entry before",
                Box::new(|steps| steps[4].steals = Some(3)),
                "a countersignature of entry 4 counts for nothing",
            ),
            (
                "an operator's key replaced",
                Box::new(|steps| steps[2].changes = maker.enrol("alice", "mallory")),
                "entry 2 enrols a key of operator `alice` that is not among those given",
            ),
            (
                "an operator nobody knows",
                Box::new(|steps| steps[8].changes = maker.enrol("mallory", "mallory")),
                "entry 8 enrols a key of operator `mallory` that is not among those given",
            ),
            ("no operators at all", Box::new(|steps| steps.truncate(2)), "no operator has enrolled in this ledger"),
        ];
        for (case, forge, expected) in cases {
            let mut steps = maker.steps();
            forge(&mut steps);
            if case.contains("replaced") {
                steps.iter_mut().for_each(|step| step.signers = &[]);
            }
            let files = maker.export(steps);
            let said = audited(&files, &trust(), &maker.known()).expect_err(case);
            assert!(said.starts_with(expected), "{case}: {said}");
        }
        let files = maker.export(maker.steps());
        let pinned = Known { anchor: Some(Digest::of(b"another mesh")), ..maker.known() };
        let said = audited(&files, &trust(), &pinned).unwrap_err();
        assert!(said.contains("was pinned: it is another mesh"), "{said}");
        let said = audited(&files, &Trust { quorum: 2, ..trust() }, &maker.known()).unwrap_err();
        assert!(said.ends_with("1 witnesses cosigned it; 2 are asked for"), "{said}");
    }

    /// PROVES (audited)
    #[test]
    fn a_sealed_mesh_is_refused_from_the_first_entry_that_too_few_signed() {
        let maker = Maker::new();
        let mut steps = maker.steps();
        steps[5] = Step {
            changes: vec![Change::SealSettings { quorum: 1 }],
            signers: &[("alice", Purpose::StepUp)],
            ..steps.pop().unwrap()
        };
        let unsigned = steps.swap_remove(6);
        steps.truncate(6);
        let sealed = maker.export(steps);
        assert_eq!(audited(&sealed, &trust(), &maker.known()).unwrap().seal, Some(Seal { quorum: 1 }));
        let mut steps = maker.steps();
        steps[5].changes = vec![Change::SealSettings { quorum: 1 }];
        steps.truncate(6);
        steps.push(unsigned);
        let said = audited(&maker.export(steps), &trust(), &maker.known()).unwrap_err();
        assert_eq!(said, "entry 6 was signed by 0 of 1 operators");
    }

    #[test]
    fn a_list_of_keys_is_read_whole_or_not_at_all() {
        let maker = Maker::new();
        let good = maker.known().encode();
        assert_eq!(Known::parse(&format!("# ours\n\n{good}")), Ok(maker.known()));
        let anchor = "a".repeat(64);
        for (given, line) in [
            ("alice", 1),
            ("\nalice !", 2),
            ("Alice AAAA", 1),
            ("anchor abc", 1),
            (&*format!("anchor {anchor}\nanchor {anchor}"), 2),
        ] {
            assert_eq!(Known::parse(given), Err(KnownError(line)), "{given}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_error(bytes: Vec<u8>, text in "[ -~\n]{0,80}") {
            let _ = Known::parse(&text);
            let read = |path| Ok::<_, ()>(if path == CHECKPOINT { note(ORIGIN, ORIGIN, "log", 3, Digest::of(b"x")) } else { bytes.clone() });
            prop_assert!(audit(&trust(), None, read).is_err());
            prop_assert!(audit(&trust(), None, |_| Ok::<_, ()>(bytes.clone())).is_err());
        }
    }
}
