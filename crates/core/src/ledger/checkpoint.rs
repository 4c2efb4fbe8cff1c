//! C2SP checkpoints: what a log says its tree is, signed, and whether two of them can both be true.
//!
//! Standard: <https://c2sp.org/tlog-checkpoint>. [`Trust`] says whom to believe: the log's key, and how many of which witnesses
//! must have cosigned. Nothing here asks a witness or fetches a checkpoint.

use std::{collections::BTreeSet, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{Frontier, Note, NoteError, SignatureKind, VerifierKey, proves_consistency};
use crate::{canonical::Digest, identity::TrustDomain};

/// Longest origin, in bytes: the longest trust domain, with what makes it an origin.
pub const ORIGIN_BYTES_MAX: usize = 320;
/// Most extension lines. They are not recommended, and we write none.
pub const EXTENSIONS_MAX: usize = 16;

/// The origin of the ledger of a mesh, which is also the name of the key that it signs with.
pub fn origin_of(trust_domain: &TrustDomain) -> String {
    format!("countersign/{trust_domain}")
}

/// The size and the root of the tree of the log `origin`. Only its shape is known; a [`VerifiedCheckpoint`] is to be believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    origin: Arc<str>,
    size: u64,
    root: Digest,
    extensions: Vec<String>,
}

/// Whom to believe about a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// Its origin: the first line of each of its checkpoints.
    pub origin: Arc<str>,
    /// The keys that it signs with: more than one only while they change.
    pub log: Vec<VerifierKey>,
    /// Those who may cosign.
    pub witnesses: Vec<VerifierKey>,
    /// How many of them must have.
    pub quorum: usize,
}

/// A checkpoint that the log signed, and as many witnesses as were asked for.
///
/// INVARIANT (verified-checkpoint): only [`Trust::verify`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCheckpoint {
    checkpoint: Checkpoint,
    cosigned_by: Vec<(Arc<str>, u64)>,
}

/// Why text is not a checkpoint, or not one to believe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The note around it is not one, or not signed.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The text is not made of the lines it must have.
    #[error("a checkpoint has an origin, a size, a root, and at most {EXTENSIONS_MAX} more lines; none is empty")]
    Lines,
    /// The origin is beyond its bound or holds a control character.
    #[error("an origin has 1 to {ORIGIN_BYTES_MAX} bytes and no control character")]
    Origin,
    /// Not a number, or not in its one form.
    #[error("the size must be a decimal number without leading zeros")]
    Size,
    /// Not 32 bytes of base64, or not the hash of nothing although there is nothing.
    #[error("the root must be the base64 of 32 bytes, and that of an empty tree the hash of nothing")]
    Root,
    /// It is of another log.
    #[error("it is a checkpoint of `{found}`, not of `{expected}`")]
    OtherLog {
        /// The log that was asked for.
        expected: Arc<str>,
        /// The log that it is of.
        found: Arc<str>,
    },
    /// Witnesses signed, and the log did not.
    #[error("the log itself did not sign it")]
    NotByLog,
    /// Too few witnesses saw it.
    #[error("{found} witnesses cosigned it; {quorum} are asked for")]
    Quorum {
        /// How many did.
        found: usize,
        /// How many must.
        quorum: usize,
    },
}

/// Why a checkpoint does not follow from an earlier one. With both signed, it is proof that the log told two stories.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Inconsistent {
    /// They are of two logs.
    #[error("they are checkpoints of two logs, `{0}` and `{1}`")]
    Logs(Arc<str>, Arc<str>),
    /// A ledger never shrinks.
    #[error("the later one has {later} entries, the earlier one {earlier}")]
    Shrunk {
        /// Size of the earlier.
        earlier: u64,
        /// Size of the later.
        later: u64,
    },
    /// The same size with two roots.
    #[error("at {0} entries there are two roots: there are two histories")]
    Forked(u64),
    /// The proof does not lead from one to the other.
    #[error("the proof does not lead from {earlier} entries to {later}")]
    Proof {
        /// Size of the earlier.
        earlier: u64,
        /// Size of the later.
        later: u64,
    },
}

impl Checkpoint {
    /// The checkpoint of a tree.
    pub fn new(origin: &str, size: u64, root: Digest) -> Result<Self, CheckpointError> {
        if !(1..=ORIGIN_BYTES_MAX).contains(&origin.len()) || origin.chars().any(|c| c < ' ') {
            return Err(CheckpointError::Origin);
        }
        if size == 0 && root != Frontier::default().root() {
            return Err(CheckpointError::Root);
        }
        Ok(Self { origin: origin.into(), size, root, extensions: Vec::new() })
    }

    /// Reads the text of a note.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let lines: Vec<&str> = text.strip_suffix('\n').ok_or(CheckpointError::Lines)?.split('\n').collect();
        let [origin, size, root, extensions @ ..] = &lines[..] else { return Err(CheckpointError::Lines) };
        if lines.iter().any(|line| line.is_empty()) || extensions.len() > EXTENSIONS_MAX {
            return Err(CheckpointError::Lines);
        }
        let size = decimal(size).ok_or(CheckpointError::Size)?;
        let root = hash_of_line(root).ok_or(CheckpointError::Root)?;
        let extensions = extensions.iter().map(|line| (*line).to_owned()).collect();
        Ok(Self { extensions, ..Self::new(origin, size, root)? })
    }

    /// The text that is signed, with its last newline.
    pub fn encode(&self) -> String {
        let mut text = format!("{}\n{}\n{}\n", self.origin, self.size, STANDARD.encode(self.root.0));
        for line in &self.extensions {
            text += line;
            text.push('\n');
        }
        text
    }

    /// The log that it is of.
    pub fn origin(&self) -> &Arc<str> {
        &self.origin
    }

    /// The number of entries.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The root of their tree.
    pub fn root(&self) -> Digest {
        self.root
    }

    /// What the log wrote below; no witness vouches for it.
    pub fn extensions(&self) -> &[String] {
        &self.extensions
    }

    /// Whether the tree of `earlier` is a prefix of this one's, as `proof` shows (RFC 6962, 2.1.2).
    pub fn follows(&self, earlier: &Checkpoint, proof: &[Digest]) -> Result<(), Inconsistent> {
        if self.origin != earlier.origin {
            return Err(Inconsistent::Logs(earlier.origin.clone(), self.origin.clone()));
        }
        let (earlier_size, later) = (earlier.size, self.size);
        if later < earlier_size {
            return Err(Inconsistent::Shrunk { earlier: earlier_size, later });
        }
        if later == earlier_size && self.root != earlier.root {
            return Err(Inconsistent::Forked(later));
        }
        if proves_consistency(proof, earlier_size, &earlier.root, later, &self.root) {
            Ok(())
        } else {
            Err(Inconsistent::Proof { earlier: earlier_size, later })
        }
    }
}

impl Trust {
    /// A log with one key under its own name, and no witness.
    pub fn log(key: VerifierKey) -> Self {
        Self { origin: key.name().into(), log: vec![key], witnesses: Vec::new(), quorum: 0 }
    }

    /// Verifies a signed checkpoint. Witnesses are counted by their key, not by their name: a cosignature does not cover the
    /// name, so one key could sign for many. The log's own key is no witness.
    pub fn verify(&self, note: &Note) -> Result<VerifiedCheckpoint, CheckpointError> {
        let verified = note.verify(self.log.iter().chain(&self.witnesses))?;
        let checkpoint = Checkpoint::parse(verified.text())?;
        if checkpoint.origin != self.origin {
            return Err(CheckpointError::OtherLog { expected: self.origin.clone(), found: checkpoint.origin });
        }
        if verified.signed_by().iter().all(|by| !self.log.contains(by.key)) {
            return Err(CheckpointError::NotByLog);
        }
        let mut seen: BTreeSet<&[u8; 32]> = self.log.iter().map(VerifierKey::public).collect();
        let cosigned_by: Vec<_> = verified
            .signed_by()
            .iter()
            .filter(|by| by.key.kind() == SignatureKind::Cosignature && seen.insert(by.key.public()))
            .map(|by| (by.key.name().into(), by.at_seconds.unwrap_or_default()))
            .collect();
        if cosigned_by.len() < self.quorum {
            return Err(CheckpointError::Quorum { found: cosigned_by.len(), quorum: self.quorum });
        }
        Ok(VerifiedCheckpoint { checkpoint, cosigned_by })
    }
}

impl VerifiedCheckpoint {
    /// What was signed.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The witnesses that cosigned it, each with its time in seconds since 1970.
    pub fn cosigned_by(&self) -> &[(Arc<str>, u64)] {
        &self.cosigned_by
    }
}

/// A number in its one decimal form.
pub(super) fn decimal(given: &str) -> Option<u64> {
    let canonical = given == "0" || (!given.starts_with('0') && given.bytes().all(|b| b.is_ascii_digit()));
    given.parse().ok().filter(|_| canonical)
}

/// A hash in its one base64 form.
pub(super) fn hash_of_line(line: &str) -> Option<Digest> {
    STANDARD.decode(line).ok()?.try_into().ok().map(Digest)
}

#[cfg(test)]
pub(super) mod tests {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Signature, consistency_proof, hash_leaf};

    /// The example of the standard, and the example with a cosignature of tlog-cosignature. Their keys are not published.
    const EXAMPLE: &str = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n";

    pub fn signature(
        name: &str,
        kind: SignatureKind,
        seed: &str,
        text: &str,
        at_seconds: u64,
    ) -> (Signature, VerifierKey) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&Digest::of(seed.as_bytes()).0).unwrap();
        let key = VerifierKey::new(name, kind, pair.public_key().as_ref().try_into().unwrap()).unwrap();
        let sign = |message: &[u8]| Ok::<_, ()>(pair.sign(message).as_ref().try_into().unwrap());
        (key.sign(text, at_seconds, sign).unwrap(), key)
    }

    #[test]
    fn the_example_of_the_standard_is_read_and_written() {
        let checkpoint = Checkpoint::parse(EXAMPLE).unwrap();
        assert_eq!((&**checkpoint.origin(), checkpoint.size()), ("example.com/behind-the-sofa", 20_852_163));
        assert_eq!(checkpoint.root().to_string(), "0ac5186a91863e8e1d90c808014aa89bf5da8e3ee1d9f07630f0378f68f1ab62");
        assert_eq!(checkpoint.encode(), EXAMPLE);
        let extended = format!("{EXAMPLE}one\ntwo words\n");
        assert_eq!(Checkpoint::parse(&extended).unwrap().extensions(), ["one", "two words"]);
        assert_eq!(Checkpoint::parse(&extended).unwrap().encode(), extended);
    }

    #[test]
    fn text_that_is_no_checkpoint_is_refused_with_the_reason() {
        let with = |from: &str, to: &str| EXAMPLE.replace(from, to);
        for (given, expected) in [
            (String::new(), CheckpointError::Lines),
            ("a\n1\n".into(), CheckpointError::Lines),
            (EXAMPLE.trim_end().to_owned(), CheckpointError::Lines),
            (format!("{EXAMPLE}\n"), CheckpointError::Lines),
            (format!("{EXAMPLE}\nmore\n"), CheckpointError::Lines),
            (format!("{EXAMPLE}{}", "more\n".repeat(EXTENSIONS_MAX + 1)), CheckpointError::Lines),
            (with("example.com/behind-the-sofa", &"a".repeat(ORIGIN_BYTES_MAX + 1)), CheckpointError::Origin),
            (with("the-", "the\r"), CheckpointError::Origin),
            (with("20852163", "020852163"), CheckpointError::Size),
            (with("20852163", "+20852163"), CheckpointError::Size),
            (with("20852163", "-1"), CheckpointError::Size),
            (with("20852163", "18446744073709551616"), CheckpointError::Size),
            (with("CsUY", "sUY"), CheckpointError::Root),
            (with("CsUY", "CsUYCsUY"), CheckpointError::Root),
            (with("q2I=", "q2J="), CheckpointError::Root),
            (with("q2I=", "q2I"), CheckpointError::Root),
            (with("20852163", "0"), CheckpointError::Root),
        ] {
            assert_eq!(Checkpoint::parse(&given), Err(expected), "{given:?}");
        }
        assert!(Checkpoint::parse("a\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n").is_ok());
    }

    /// PROVES (verified-checkpoint)
    #[test]
    fn a_checkpoint_is_believed_when_the_log_signed_it_and_enough_witnesses_saw_it() {
        let text = EXAMPLE;
        let made = |name, kind, seed: &str| signature(name, kind, seed, text, 9);
        let (log_line, log) = made("example.com/behind-the-sofa", SignatureKind::Ed25519, "log");
        let (one_line, one) = made("w.example/1", SignatureKind::Cosignature, "one");
        let (two_line, two) = made("w.example/2", SignatureKind::Cosignature, "two");
        let (again_line, again) = made("w.example/3", SignatureKind::Cosignature, "one");
        let (own_line, own) = made("w.example/4", SignatureKind::Cosignature, "log");
        let trust = |quorum| Trust {
            witnesses: vec![one.clone(), two.clone(), again.clone(), own.clone()],
            quorum,
            ..Trust::log(log.clone())
        };
        let note =
            |lines: &[&Signature]| Note::new(text.into(), lines.iter().map(|line| (*line).clone()).collect()).unwrap();
        let quorum = |found, quorum| Err(CheckpointError::Quorum { found, quorum });
        for (case, note, trust, expected) in [
            ("nobody", note(&[&made("x", SignatureKind::Ed25519, "x").0]), trust(0), Err(NoteError::Unsigned.into())),
            ("witnesses alone", note(&[&one_line, &two_line]), trust(0), Err(CheckpointError::NotByLog)),
            ("the log alone", note(&[&log_line]), trust(1), quorum(0, 1)),
            ("one witness under two names", note(&[&log_line, &one_line, &again_line]), trust(2), quorum(1, 2)),
            ("the log as its own witness", note(&[&log_line, &own_line]), trust(1), quorum(0, 1)),
            ("no witness asked for", note(&[&log_line]), trust(0), Ok(0)),
            ("two", note(&[&log_line, &one_line, &two_line]), trust(2), Ok(2)),
            (
                "another log",
                note(&[&log_line]),
                Trust { origin: "example.com/other".into(), ..trust(0) },
                Err(CheckpointError::OtherLog {
                    expected: "example.com/other".into(),
                    found: "example.com/behind-the-sofa".into(),
                }),
            ),
        ] {
            let found = trust.verify(&note);
            assert_eq!(found.map(|verified| verified.cosigned_by().len()), expected, "{case}");
        }
        let not_one = signature("example.com/behind-the-sofa", SignatureKind::Ed25519, "log", "hello\n", 0).0;
        let not_one = Note::new("hello\n".into(), vec![not_one]).unwrap();
        assert_eq!(trust(0).verify(&not_one), Err(CheckpointError::Lines), "a note of the log that is no checkpoint");
    }

    #[test]
    fn of_two_checkpoints_that_cannot_both_be_true_the_reason_is_told() {
        let leaves: Vec<_> = (0..9u8).map(|n| hash_leaf(&[n])).collect();
        let at = |size: usize| Checkpoint::new("log", size as u64, Frontier::of(&leaves[..size]).root()).unwrap();
        let proof = consistency_proof(&leaves[..9], 5).unwrap();
        assert_eq!(at(9).follows(&at(5), &proof), Ok(()));
        assert_eq!(at(9).follows(&at(9), &[]), Ok(()));
        assert_eq!(at(9).follows(&at(0), &[]), Ok(()));
        let other = Checkpoint::new("log", 9, hash_leaf(b"other")).unwrap();
        let elsewhere = Checkpoint { origin: "elsewhere".into(), ..at(9) };
        for (earlier, later, proof, expected) in [
            (at(5), at(9), &[][..], "the proof does not lead from 5 entries to 9"),
            (at(5), other.clone(), &proof, "the proof does not lead from 5 entries to 9"),
            (at(9), at(9), &proof, "the proof does not lead from 9 entries to 9"),
            (at(9), at(5), &proof, "the later one has 5 entries, the earlier one 9"),
            (at(9), other, &[], "at 9 entries there are two roots: there are two histories"),
            (at(5), elsewhere, &proof, "they are checkpoints of two logs, `log` and `elsewhere`"),
        ] {
            assert_eq!(later.follows(&earlier, proof).unwrap_err().to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn a_checkpoint_is_read_back(origin in "[^\\x00-\\x1f]{1,40}", size: u64, root: [u8; 32]) {
            let root = if size == 0 { Frontier::default().root() } else { Digest(root) };
            let checkpoint = Checkpoint::new(&origin, size, root).unwrap();
            prop_assert_eq!(Checkpoint::parse(&checkpoint.encode()), Ok(checkpoint));
        }

        #[test]
        fn whatever_parses_encodes_to_the_same_text(text: String, lines in "[ -~\n]{0,80}") {
            for text in [text, lines.clone(), format!("{EXAMPLE}{lines}")] {
                if let Ok(checkpoint) = Checkpoint::parse(&text) {
                    prop_assert_eq!(checkpoint.encode(), text);
                }
            }
        }
    }
}
