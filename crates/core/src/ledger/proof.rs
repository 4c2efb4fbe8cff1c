//! C2SP tlog-proof: one file that shows, without asking anyone, that an entry stands in a ledger that others have seen.
//!
//! Standard: <https://c2sp.org/tlog-proof>. It holds the index of the entry, its inclusion proof and a signed checkpoint. The
//! entry itself is not in it: whoever verifies brings the bytes.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{
    CheckpointError, NOTE_BYTES_MAX, Note, NoteError, Trust, VerifiedCheckpoint,
    checkpoint::{decimal, hash_of_line},
    hash_leaf, proves_inclusion,
};
use crate::canonical::Digest;

/// Longest extra data, in bytes.
pub const EXTRA_BYTES_MAX: usize = 128 << 10;
/// Most hashes of an inclusion proof: the height of a tree of 2^64 entries.
pub const PROOF_HASHES_MAX: usize = 64;
/// Longest proof, in bytes.
pub const PROOF_BYTES_MAX: usize = NOTE_BYTES_MAX + 2 * EXTRA_BYTES_MAX + (PROOF_HASHES_MAX + 2) * 45;

const HEADER: &str = "c2sp.org/tlog-proof@v1";

/// A proof as it came: well-formed, and not to be believed before [`verify`](Self::verify).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryProof {
    /// Opaque data beside it. Nothing proves it; we write none.
    pub extra: Option<Vec<u8>>,
    /// The index of the entry.
    pub index: u64,
    /// The siblings of the leaf, from the leaf up.
    pub hashes: Vec<Digest>,
    /// The signed checkpoint.
    pub checkpoint: Note,
}

/// Why bytes are not a proof, or not one of this entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// Beyond its bound.
    #[error("a proof has at most {PROOF_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// Another kind of file.
    #[error("a proof begins with the line `{HEADER}`")]
    Header,
    /// The extra data is no base64, or beyond its bound.
    #[error("extra data is base64 of 1 to {EXTRA_BYTES_MAX} bytes")]
    Extra,
    /// No index, or not in its one form.
    #[error("a proof says `index`, and a decimal number without leading zeros")]
    Index,
    /// A line is no hash, or there are too many.
    #[error(
        "line {0} of the inclusion proof is not the base64 of 32 bytes, of which there are at most {PROOF_HASHES_MAX}"
    )]
    Hash(usize),
    /// The checkpoint is missing.
    #[error("an empty line and a signed checkpoint must follow the inclusion proof")]
    NoCheckpoint,
    /// The checkpoint is not one, or not to be believed.
    #[error("its checkpoint is not to be believed")]
    Checkpoint(#[from] CheckpointError),
    /// The hashes lead elsewhere.
    #[error("it does not lead from this entry, at {index}, to the root of {size} entries")]
    Elsewhere {
        /// Where the entry is said to stand.
        index: u64,
        /// Entries of the checkpoint.
        size: u64,
    },
}

impl EntryProof {
    /// Reads a proof.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProofError> {
        if bytes.len() > PROOF_BYTES_MAX {
            return Err(ProofError::TooLong(bytes.len()));
        }
        let not_note = |error: NoteError| ProofError::Checkpoint(error.into());
        let text = std::str::from_utf8(bytes).map_err(|_| not_note(NoteError::Characters))?;
        let rest = text.strip_prefix(HEADER).and_then(|rest| rest.strip_prefix('\n')).ok_or(ProofError::Header)?;
        let (head, checkpoint) = rest.split_once("\n\n").ok_or(ProofError::NoCheckpoint)?;
        let mut lines = head.split('\n').peekable();
        let extra = match lines.next_if(|line| line.starts_with("extra ")) {
            Some(line) => {
                let extra = STANDARD.decode(&line["extra ".len()..]).map_err(|_| ProofError::Extra)?;
                if extra.is_empty() || extra.len() > EXTRA_BYTES_MAX {
                    return Err(ProofError::Extra);
                }
                Some(extra)
            }
            None => None,
        };
        let index = lines.next().and_then(|line| decimal(line.strip_prefix("index ")?)).ok_or(ProofError::Index)?;
        let mut hashes = Vec::new();
        for (at, line) in lines.enumerate() {
            let hash = hash_of_line(line).filter(|_| at < PROOF_HASHES_MAX).ok_or(ProofError::Hash(at + 1))?;
            hashes.push(hash);
        }
        let checkpoint = Note::parse(checkpoint.as_bytes()).map_err(not_note)?;
        Ok(Self { extra, index, hashes, checkpoint })
    }

    /// The proof as a file, `.tlog-proof`.
    pub fn encode(&self) -> String {
        let mut text = format!("{HEADER}\n");
        if let Some(extra) = &self.extra {
            text += &format!("extra {}\n", STANDARD.encode(extra));
        }
        text += &format!("index {}\n", self.index);
        for hash in &self.hashes {
            text += &format!("{}\n", STANDARD.encode(hash.0));
        }
        text.push('\n');
        text + &self.checkpoint.encode()
    }

    /// Verifies that `entry`, byte for byte, stands at [`index`](Self::index) of the ledger that `trust` believes in, and
    /// returns the checkpoint that says so.
    ///
    /// INVARIANT (proven-entry): the checkpoint is verified first, and the proof leads to its root and its size, not to
    /// those that the proof would like.
    pub fn verify(&self, entry: &[u8], trust: &Trust) -> Result<VerifiedCheckpoint, ProofError> {
        let verified = trust.verify(&self.checkpoint)?;
        let (size, root) = (verified.checkpoint().size(), verified.checkpoint().root());
        if proves_inclusion(&self.hashes, &hash_leaf(entry), self.index, size, &root) {
            Ok(verified)
        } else {
            Err(ProofError::Elsewhere { index: self.index, size })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Checkpoint, Frontier, SignatureKind, checkpoint::tests::signature, inclusion_proof};

    const ORIGIN: &str = "ledger.shop.example";

    fn entries(count: u64) -> Vec<Vec<u8>> {
        (0..count).map(|n| format!("entry {n}").into_bytes()).collect()
    }

    /// The proof of one entry of a ledger of `count`, and whom to trust.
    fn proven(index: u64, count: u64) -> (EntryProof, Trust) {
        let leaves: Vec<_> = entries(count).iter().map(|entry| hash_leaf(entry)).collect();
        let text = Checkpoint::new(ORIGIN, count, Frontier::of(&leaves).root()).unwrap().encode();
        let (line, key) = signature(ORIGIN, SignatureKind::Ed25519, "log", &text, 0);
        let checkpoint = Note::new(text, vec![line]).unwrap();
        let hashes = inclusion_proof(&leaves, index).unwrap();
        (EntryProof { extra: None, index, hashes, checkpoint }, Trust::log(key))
    }

    /// PROVES (proven-entry)
    #[test]
    fn only_the_entry_that_stands_there_is_proven() {
        for count in [1, 2, 3, 7, 8, 9, 300] {
            for index in [0, count / 2, count - 1] {
                let (proof, trust) = proven(index, count);
                for (at, entry) in entries(count).iter().enumerate() {
                    let found = proof.verify(entry, &trust);
                    if at as u64 == index {
                        assert_eq!(found.unwrap().checkpoint().size(), count);
                    } else {
                        assert_eq!(found, Err(ProofError::Elsewhere { index, size: count }), "{at} of {count}");
                    }
                }
            }
        }
        let (proof, _) = proven(3, 8);
        let (_, stranger) = signature("x", SignatureKind::Ed25519, "stranger", "", 0);
        let unsigned = proof.verify(b"entry 3", &Trust::log(stranger));
        assert_eq!(unsigned, Err(ProofError::Checkpoint(NoteError::Unsigned.into())));
        // A larger tree's proof with a smaller tree's checkpoint.
        let (smaller, trust) = proven(3, 7);
        let mixed = EntryProof { checkpoint: smaller.checkpoint, ..proof };
        assert_eq!(mixed.verify(b"entry 3", &trust), Err(ProofError::Elsewhere { index: 3, size: 7 }));
    }

    #[test]
    fn a_proof_has_the_form_of_the_standard() {
        let (mut proof, trust) = proven(1, 3);
        expect_test::expect![[r#"
            c2sp.org/tlog-proof@v1
            index 1
            dziFphNIniTOLPdhmdakI/BC5LvxLX7s7pEu8nbGVwE=
            V8efTzGuApxdS9MLBzwnyU35NDiytGl+Hh7vW8A5SkE=

            ledger.shop.example
            3
            lPvQ3YNvUDAWkubQ6t5yjuGexSv/8WBu2AfIV11aqhk=
        "#]]
        .assert_eq(&proof.encode().split("\n\n\u{2014}").next().map(|t| t.to_owned() + "\n").unwrap());
        proof.extra = Some(b"note".to_vec());
        let text = proof.encode();
        assert!(text.starts_with("c2sp.org/tlog-proof@v1\nextra bm90ZQ==\nindex 1\n"));
        assert_eq!(EntryProof::parse(text.as_bytes()), Ok(proof.clone()));
        assert!(proof.verify(b"entry 1", &trust).is_ok());
    }

    #[test]
    fn bytes_that_are_no_proof_are_refused_with_the_reason() {
        let (proof, _) = proven(1, 3);
        let good = proof.encode();
        let with = |from: &str, to: &str| good.replacen(from, to, 1);
        let hash = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";
        for (given, expected) in [
            (String::new(), ProofError::Header),
            (with("v1\n", "v1\r\n"), ProofError::Header),
            (with("v1", "v2"), ProofError::Header),
            (with("v1\n", "v1"), ProofError::Header),
            (with("index 1\n", "index 01\n"), ProofError::Index),
            (with("index 1\n", "index -1\n"), ProofError::Index),
            (with("index 1\n", "index\n"), ProofError::Index),
            (with("index 1\n", ""), ProofError::Index),
            (with("index 1\n", "index 1\nindex 1\n"), ProofError::Hash(1)),
            (with("index 1\n", "extra !\nindex 1\n"), ProofError::Extra),
            (with("index 1\n", "extra \nindex 1\n"), ProofError::Extra),
            (with("index 1\n", "extra YQ\nindex 1\n"), ProofError::Extra),
            (with("index 1\n", "extra YQ==\nextra YQ==\nindex 1\n"), ProofError::Index),
            (with("index 1\n", "index 1\nextra YQ==\n"), ProofError::Hash(1)),
            (with("index 1\n", "index 1\nAAAA\n"), ProofError::Hash(1)),
            (with("index 1\n", &format!("index 1\n{}", hash.repeat(PROOF_HASHES_MAX))), ProofError::Hash(65)),
            (good.split("\n\n").next().unwrap().to_owned(), ProofError::NoCheckpoint),
            (with("\n\n", "\n\n\n"), ProofError::Checkpoint(NoteError::Unparted.into())),
        ] {
            let found = EntryProof::parse(given.as_bytes());
            match (&expected, &found) {
                // What is refused within the note is for the note to name.
                (ProofError::Checkpoint(_), Ok(proof)) => assert!(proof.checkpoint.text().starts_with('\n')),
                _ => assert_eq!(found, Err(expected), "{given}"),
            }
        }
        assert_eq!(EntryProof::parse(&vec![b'a'; PROOF_BYTES_MAX + 1]), Err(ProofError::TooLong(PROOF_BYTES_MAX + 1)));
        assert_eq!(EntryProof::parse(b"\xff"), Err(ProofError::Checkpoint(NoteError::Characters.into())));
    }

    proptest! {
        #[test]
        fn an_altered_proof_proves_nothing_and_one_that_parses_is_written_as_it_came(
            index in 0..20u64, at: prop::sample::Index, byte: u8, extra: Option<[u8; 3]>,
        ) {
            let (mut proof, trust) = proven(index, 20);
            proof.extra = extra.map(Vec::from);
            let good = proof.encode().into_bytes();
            let mut near = good.clone();
            let at = at.index(near.len());
            near[at] = byte;
            if let Ok(parsed) = EntryProof::parse(&near) {
                prop_assert_eq!(parsed.encode().into_bytes(), near.clone());
                // Extra data is not authenticated; nothing else may differ.
                let same = parsed == EntryProof { extra: parsed.extra.clone(), ..proof };
                prop_assert_eq!(parsed.verify(format!("entry {index}").as_bytes(), &trust).is_ok(), same);
            }
        }

        #[test]
        fn a_proof_of_any_bytes_is_parsed_or_refused(bytes: Vec<u8>, text in "c2sp.org/tlog-proof@v1\n[ -~\n]{0,80}") {
            let _ = (EntryProof::parse(&bytes), EntryProof::parse(text.as_bytes()));
        }
    }
}
