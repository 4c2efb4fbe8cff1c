//! The ledger: what happened to the mesh, in order, so that nobody can cut or edit it unseen.
//!
//! An admitted change-set becomes one [`Entry`], hashed as one leaf of an RFC 6962 Merkle tree; the number of entries is
//! the [`Revision`]. An entry is small (a log tile allows 65 535 bytes) and holds digests; the change-set and the policy
//! texts lie beside it. [`Follower`] is the one way to come from entries to a state: the control plane, every agent
//! and `ledger verify` hold one. Nothing here stores, signs or sends anything.
//!
//! | furniture | holds |
//! |---|---|
//! | `follow` | from entries to a state, verified at each step |
//! | `merkle` | the tree of RFC 6962: hashes and proofs |
//! | `note` | C2SP signed-note: a text and who stands behind it |
//! | `checkpoint` | C2SP tlog-checkpoint: what the ledger says its tree is, and whom to believe |
//! | `tiles` | C2SP tlog-tiles: the ledger as files that never change |
//! | `proof` | C2SP tlog-proof: one entry proven in one file |
//! | `witness` | C2SP tlog-witness: whether to cosign a checkpoint |
//! | `audit` | an export recomputed by an outsider, with public keys alone |

mod audit;
mod checkpoint;
mod follow;
mod merkle;
mod note;
mod proof;
mod tiles;
mod witness;

pub use audit::{AuditError, Audited, Exported, KNOWN_BYTES_MAX, Known, KnownError, audit};
pub use checkpoint::{Checkpoint, CheckpointError, Inconsistent, Trust, VerifiedCheckpoint, origin_of};
pub use follow::{Batch, Damage, Draft, DraftError, Follower, Incomplete, LedgerError, Snapshot};
pub(crate) use follow::{change_set_of, entry_at};
pub use merkle::{
    Frontier, FrontierError, consistency_proof, hash_leaf, hash_node, inclusion_proof, proves_consistency,
    proves_inclusion,
};
pub use note::{
    KeyError, NOTE_BYTES_MAX, Note, NoteError, Signature, SignatureKind, SignedBy, VerifiedNote, VerifierKey,
    cosignature_message,
};
pub use proof::{EntryProof, PROOF_BYTES_MAX, ProofError};
pub use tiles::{
    ReadError, Resource, TILE_WIDTH, Tile, TileError, TileHashes, TileReader, encode_bundle, parse_bundle,
};
pub use witness::{Accepted, AddCheckpoint, REQUEST_BYTES_MAX, Refusal, WitnessedLog};

use serde::{Deserialize, Serialize};

use crate::{
    canonical::{Digest, encode},
    change::Revision,
    countersignature::{COUNTERSIGNATURES_MAX, Countersignature},
};

/// The format of an entry without countersignatures.
pub const ENTRY_FORMAT: u32 = 1;
/// The format of an entry with countersignatures.
pub const ENTRY_FORMAT_COUNTERSIGNED: u32 = 2;
/// Longest entry, in bytes: C2SP tlog-tiles prefixes each entry of a bundle with a 16-bit length.
pub const ENTRY_BYTES_MAX: usize = 65_535;
/// Longest name of an actor, in bytes.
pub const ACTOR_BYTES_MAX: usize = 2048;
/// Longest canonical change-set, in bytes.
pub const CHANGE_SET_BYTES_MAX: usize = 8 << 20;
/// Longest body (the text of one policy), in bytes.
pub const BODY_BYTES_MAX: usize = 256 << 10;
/// Numbers above it have no exact form in RFC 8785 JSON.
const NUMBER_MAX: u64 = (1 << 53) - 1;

/// One line of the ledger. Its canonical encoding is what is hashed, stored and sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// [`ENTRY_FORMAT`], or [`ENTRY_FORMAT_COUNTERSIGNED`] when there are countersignatures.
    pub format: u32,
    /// Its place in the ledger, from 0.
    pub index: u64,
    /// When it was admitted by the control plane's clock, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who asked for it: `local` while the mesh is unprotected.
    pub actor: String,
    /// SHA-256 of the canonical [`ChangeSet`](crate::change::ChangeSet).
    pub digest: Digest,
    /// SHA-256 of the canonical [`MeshState`](crate::state::MeshState) after it.
    pub state: Digest,
    /// Who stands behind it, by their own keys. [`Keyring`](crate::keyring::Keyring) says what they are worth.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub countersignatures: Vec<Countersignature>,
}

/// Why bytes are not an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Longer than a log tile allows.
    #[error("an entry has at most {ENTRY_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// Not JSON, or not the JSON of an entry.
    #[error("it is not an entry: {0}")]
    Malformed(String),
    /// Written by a newer version.
    #[error("its format is {0}; this version reads formats {ENTRY_FORMAT} and {ENTRY_FORMAT_COUNTERSIGNED}")]
    UnknownFormat(u64),
    /// The same entry has one other encoding that is the canonical one.
    #[error("it is not in canonical form (RFC 8785)")]
    NotCanonical,
    /// More than their bound, or not what its format says.
    #[error(
        "an entry of format {ENTRY_FORMAT_COUNTERSIGNED} has 1 to {COUNTERSIGNATURES_MAX} countersignatures, and one of format {ENTRY_FORMAT} has none"
    )]
    Countersignatures,
    /// Nobody, or a name beyond its bound.
    #[error("the actor must have 1 to {ACTOR_BYTES_MAX} bytes")]
    Actor,
}

impl Entry {
    /// Reads the canonical encoding, and only that: two different byte strings never mean the same entry.
    pub fn parse(bytes: &[u8]) -> Result<Self, EntryError> {
        if bytes.len() > ENTRY_BYTES_MAX {
            return Err(EntryError::TooLong(bytes.len()));
        }
        let malformed = |error: serde_json::Error| EntryError::Malformed(error.to_string());
        // The format is read first, so that a newer entry is called newer and not malformed.
        let format = serde_json::from_slice::<FormatOnly>(bytes).map_err(malformed)?.format;
        let counts = match u32::try_from(format) {
            Ok(ENTRY_FORMAT) => 0..=0,
            Ok(ENTRY_FORMAT_COUNTERSIGNED) => 1..=COUNTERSIGNATURES_MAX,
            _ => return Err(EntryError::UnknownFormat(format)),
        };
        let entry: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        if !counts.contains(&entry.countersignatures.len()) {
            return Err(EntryError::Countersignatures);
        }
        if entry.actor.is_empty() || entry.actor.len() > ACTOR_BYTES_MAX {
            return Err(EntryError::Actor);
        }
        if entry.index > NUMBER_MAX || entry.at_ms > NUMBER_MAX || entry.encode() != bytes {
            return Err(EntryError::NotCanonical);
        }
        Ok(entry)
    }

    /// The canonical encoding.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The revision that it made: its index plus one.
    pub fn revision(&self) -> Revision {
        Revision(self.index + 1)
    }
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> Entry {
        Entry {
            format: ENTRY_FORMAT,
            index: 7,
            at_ms: 1_700_000_000_000,
            actor: "local".into(),
            digest: Digest::of(b"change-set"),
            state: Digest::of(b"state"),
            countersignatures: Vec::new(),
        }
    }

    #[test]
    fn the_encoding_of_an_entry_never_changes() {
        expect_test::expect![[r#"{"actor":"local","at_ms":1700000000000,"digest":"62b1324906df6fc68152fed529395357c837b7e937c5e0ac163f607b8463f856","format":1,"index":7,"state":"4ba69735ca53765ed6a709edb56c6ea236b7193a3b29a6b390c346f0f4340e4e"}"#]]
            .assert_eq(&String::from_utf8(entry().encode()).unwrap());
        assert_eq!(Entry::parse(&entry().encode()), Ok(entry()));
        assert_eq!(entry().revision(), Revision(8));
    }

    #[test]
    fn bytes_that_are_not_the_canonical_entry_are_refused_with_the_reason() {
        let good = String::from_utf8(entry().encode()).unwrap();
        let with = |from: &str, to: &str| good.replace(from, to);
        let long_actor = "a".repeat(ACTOR_BYTES_MAX + 1);
        for (given, expected) in [
            (String::new(), "it is not an entry: EOF while parsing a value"),
            (
                with("\"format\":1", "\"format\":2"),
                "an entry of format 2 has 1 to 32 countersignatures, and one of format 1 has none",
            ),
            (with("\"digest\"", "\"countersignatures\":[],\"digest\""), "it is not in canonical form (RFC 8785)"),
            (with("\"format\":1", "\"format\":3"), "its format is 3; this version reads formats 1 and 2"),
            (
                with("\"format\":1", "\"format\":4294967297"),
                "its format is 4294967297; this version reads formats 1 and 2",
            ),
            (with("\"format\":1,", ""), "it is not an entry: missing field `format`"),
            (with(",\"index\"", ", \"index\""), "it is not in canonical form (RFC 8785)"),
            (
                with("\"index\":7", "\"index\":7.0"),
                "it is not an entry: invalid type: floating point `7.0`, expected u64",
            ),
            (with("\"index\":7", "\"index\":9007199254740993"), "it is not in canonical form (RFC 8785)"),
            (with("local", "\\u006cocal"), "it is not in canonical form (RFC 8785)"),
            (
                with("{\"actor\"", "{\"z\":1,\"actor\""),
                "it is not an entry: unknown field `z`, expected one of `format`, `index`, `at_ms`, `actor`, `digest`, `state`, `countersignatures`",
            ),
            (with("\"local\"", "\"\""), "the actor must have 1 to 2048 bytes"),
            (with("local", &long_actor), "the actor must have 1 to 2048 bytes"),
            (format!("{good}\n"), "it is not in canonical form (RFC 8785)"),
            (format!("{good}{}", " ".repeat(ENTRY_BYTES_MAX)), "an entry has at most 65535 bytes, this one has 65"),
        ] {
            let error = Entry::parse(given.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{given:.200}: {error}");
        }
    }

    proptest! {
        #[test]
        fn parsing_takes_back_what_encoding_wrote(
            index in 0..=NUMBER_MAX, at_ms in 0..=NUMBER_MAX, actor in ".{1,64}", digest: [u8; 32], state: [u8; 32],
        ) {
            let entry = Entry { format: 1, index, at_ms, actor, digest: Digest(digest), state: Digest(state), countersignatures: Vec::new() };
            prop_assert_eq!(Entry::parse(&entry.encode()), Ok(entry));
        }

        #[test]
        fn whatever_parses_encodes_to_the_same_bytes(bytes: Vec<u8>, at in 0..200usize, byte: u8) {
            let _ = Entry::parse(&bytes);
            let mut near = entry().encode();
            let at = at.min(near.len() - 1);
            near[at] = byte;
            if let Ok(parsed) = Entry::parse(&near) {
                prop_assert_eq!(parsed.encode(), near);
            }
        }
    }
}
