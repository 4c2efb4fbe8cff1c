//! C2SP tlog-witness: whether a second pair of eyes signs a checkpoint.
//!
//! Standard: <https://c2sp.org/tlog-witness>, `add-checkpoint`. A witness remembers one size and root for each log and signs
//! only what follows from them, so a log that shows two histories needs the witness to lie with it. This room decides; it
//! stores nothing and answers nobody. Whoever acts on [`Accepted`] stores it **before** the cosignature leaves, by compare
//! and swap on what was held; otherwise an older request that was judged at the same time could roll the memory back.

use super::{
    Checkpoint, CheckpointError, Inconsistent, Note, NoteError, Signature, SignatureKind, VerifierKey,
    checkpoint::{decimal, hash_of_line},
};
use crate::canonical::Digest;

/// Most lines of a consistency proof that a request may hold.
pub const CONSISTENCY_LINES_MAX: usize = 63;
/// Longest request, in bytes.
pub const REQUEST_BYTES_MAX: usize = super::NOTE_BYTES_MAX + (CONSISTENCY_LINES_MAX + 2) * 45;

/// A request to cosign, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddCheckpoint {
    /// The size from which the proof leads.
    pub old_size: u64,
    /// The consistency proof.
    pub proof: Vec<Digest>,
    /// The signed checkpoint.
    pub checkpoint: Note,
}

/// What a witness knows of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessedLog {
    /// The keys that the log signs with.
    pub keys: Vec<VerifierKey>,
    /// The last checkpoint that was cosigned: that of the empty tree at first.
    pub held: Checkpoint,
}

/// A checkpoint that follows from what was held. Only [`AddCheckpoint::judge`] makes one.
///
/// INVARIANT (witnessed-history): its log signed it, and its tree continues the one that was held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    held: Checkpoint,
    checkpoint: Checkpoint,
    text: String,
}

/// Why a witness does not sign. [`status`](Self::status) and [`body`](Self::body) are the answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a request.
    #[error("it is not a request: {0}")]
    Malformed(String),
    /// A log that nobody told this witness of.
    #[error("the log `{0}` is unknown here")]
    UnknownLog(String),
    /// None of the log's keys signed it, or one did wrongly.
    #[error("the log did not sign it")]
    Unsigned(#[source] NoteError),
    /// The proof would lead backwards.
    #[error("the old size {old} is above the checkpoint's, {size}")]
    Backwards {
        /// Named by the request.
        old: u64,
        /// Of the checkpoint.
        size: u64,
    },
    /// The proof leads from another size than the one held. Ask again from that one.
    #[error("the last checkpoint that was cosigned has size {held}, not {old}")]
    Moved {
        /// Held.
        held: u64,
        /// Named by the request.
        old: u64,
    },
    /// It does not follow. Signed by its log, it is evidence against it: keep it.
    #[error("it does not follow from what was cosigned")]
    Inconsistent(#[from] Inconsistent),
}

impl AddCheckpoint {
    /// Reads the body of a request: `old <size>`, the lines of the proof, an empty line, the signed checkpoint.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let malformed = |why: &str| Refusal::Malformed(why.to_owned());
        if body.len() > REQUEST_BYTES_MAX {
            return Err(malformed("it is too long"));
        }
        let body = std::str::from_utf8(body).map_err(|_| malformed("it is not UTF-8"))?;
        let (head, checkpoint) =
            body.split_once("\n\n").ok_or_else(|| malformed("an empty line must precede the checkpoint"))?;
        let mut lines = head.split('\n');
        let old_size = lines.next().and_then(|line| decimal(line.strip_prefix("old ")?));
        let old_size = old_size.ok_or_else(|| malformed("it must begin with `old` and a size"))?;
        let proof: Option<Vec<Digest>> = lines.map(hash_of_line).collect();
        let proof = proof
            .filter(|proof| proof.len() <= CONSISTENCY_LINES_MAX)
            .ok_or_else(|| malformed("the proof must be at most 63 lines of base64 of 32 bytes"))?;
        let checkpoint = Note::parse(checkpoint.as_bytes()).map_err(|error| Refusal::Malformed(error.to_string()))?;
        Ok(Self { old_size, proof, checkpoint })
    }

    /// The request as a log sends it.
    pub fn encode(&self) -> String {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let mut body = format!("old {}\n", self.old_size);
        for hash in &self.proof {
            body += &format!("{}\n", STANDARD.encode(hash.0));
        }
        body.push('\n');
        body + &self.checkpoint.encode()
    }

    /// The log that it is about, as it says itself.
    pub fn origin(&self) -> Result<String, Refusal> {
        Ok(self.claimed()?.origin().to_string())
    }

    /// Decides, in the order of the standard. `log` is what the witness knows of [`origin`](Self::origin).
    pub fn judge(&self, log: Option<&WitnessedLog>) -> Result<Accepted, Refusal> {
        let checkpoint = self.claimed()?;
        let log = log
            .filter(|log| log.held.origin() == checkpoint.origin())
            .ok_or_else(|| Refusal::UnknownLog(checkpoint.origin().to_string()))?;
        self.checkpoint.verify(&log.keys).map_err(Refusal::Unsigned)?;
        if self.old_size > checkpoint.size() {
            return Err(Refusal::Backwards { old: self.old_size, size: checkpoint.size() });
        }
        if self.old_size != log.held.size() {
            return Err(Refusal::Moved { held: log.held.size(), old: self.old_size });
        }
        checkpoint.follows(&log.held, &self.proof)?;
        Ok(Accepted { held: log.held.clone(), checkpoint, text: self.checkpoint.text().to_owned() })
    }

    fn claimed(&self) -> Result<Checkpoint, Refusal> {
        Checkpoint::parse(self.checkpoint.text())
            .map_err(|error: CheckpointError| Refusal::Malformed(error.to_string()))
    }
}

impl Accepted {
    /// What must still be held at the moment [`checkpoint`](Self::checkpoint) is stored in its place.
    pub fn held(&self) -> &Checkpoint {
        &self.held
    }

    /// What is to be stored.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Cosigns it, once it is stored: the line that goes into the answer. `key` must be of the kind that carries a time.
    ///
    /// # Panics
    /// With a key that signs as a log does: the witness was set up wrongly.
    pub fn cosign<E>(
        &self,
        key: &VerifierKey,
        now_seconds: u64,
        sign: impl FnOnce(&[u8]) -> Result<[u8; 64], E>,
    ) -> Result<Signature, E> {
        assert_eq!(key.kind(), SignatureKind::Cosignature, "a witness signs with a cosignature key");
        key.sign(&self.text, now_seconds, sign)
    }
}

impl Refusal {
    /// The HTTP status of the answer.
    ///
    /// | when | status |
    /// |---|---|
    /// | malformed; old size above the checkpoint's | 400 |
    /// | no signature of the log's | 403 |
    /// | unknown log | 404 |
    /// | the old size is not the held one | 409, with the held size |
    /// | the proof does not hold, or two roots at one size | 422 |
    pub fn status(&self) -> u16 {
        match self {
            Self::Malformed(_) | Self::Backwards { .. } => 400,
            Self::Unsigned(_) => 403,
            Self::UnknownLog(_) => 404,
            Self::Moved { .. } => 409,
            Self::Inconsistent(_) => 422,
        }
    }

    /// The media type and the body of the answer: a size that a log can read where the standard asks for it, otherwise a
    /// sentence.
    pub fn body(&self) -> (&'static str, String) {
        match self {
            Self::Moved { held, .. } => ("text/x.tlog.size", format!("{held}\n")),
            other => ("text/plain; charset=utf-8", format!("{other}\n")),
        }
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::Ed25519KeyPair;
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Frontier, Trust, checkpoint::tests::signature, consistency_proof, hash_leaf};

    const ORIGIN: &str = "ledger.shop.example";
    /// The request that the standard gives as an example. Its keys are not published.
    const EXAMPLE: &str = "old 20852014\n\
        PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=\n\
        jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=\n\
        5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=\n\
        /6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=\n\
        \n\
        example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n\
        \u{2014} example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n\
        \u{2014} example.com/behind-the-sofa opLqBQsREYCgu6xQkYQwJr9fo45a62DN9EdmHXnZdXNqlcVGlCum2Wks+49/V6267UEjw6QUXTS5Rovnzv++qbSzm9Q=\n";

    fn leaves(history: &str, count: usize) -> Vec<Digest> {
        (0..count)
            .map(|n| hash_leaf(if n < 3 { b"same".to_vec() } else { format!("{history} {n}").into_bytes() }.as_slice()))
            .collect()
    }

    fn at(history: &str, size: usize) -> Checkpoint {
        Checkpoint::new(ORIGIN, size as u64, Frontier::of(&leaves(history, size)).root()).unwrap()
    }

    fn key() -> VerifierKey {
        signature(ORIGIN, SignatureKind::Ed25519, "log", "", 0).1
    }

    fn log(held: usize) -> WitnessedLog {
        WitnessedLog { keys: vec![key()], held: at("true", held) }
    }

    fn request(history: &str, from: usize, to: usize) -> AddCheckpoint {
        let checkpoint = at(history, to);
        let (line, _) = signature(ORIGIN, SignatureKind::Ed25519, "log", &checkpoint.encode(), 0);
        AddCheckpoint {
            old_size: from as u64,
            proof: consistency_proof(&leaves(history, to), from as u64).unwrap_or_default(),
            checkpoint: Note::new(checkpoint.encode(), vec![line]).unwrap(),
        }
    }

    #[test]
    fn the_example_of_the_standard_is_read_and_written() {
        let request = AddCheckpoint::parse(EXAMPLE.as_bytes()).unwrap();
        assert_eq!((request.old_size, request.proof.len()), (20_852_014, 4));
        assert_eq!(request.origin().unwrap(), "example.com/behind-the-sofa");
        assert_eq!(request.checkpoint.signatures().len(), 2);
        assert_eq!(request.encode(), EXAMPLE);
        assert_eq!(request.judge(None).unwrap_err().status(), 404);
    }

    /// PROVES (witnessed-history)
    #[test]
    fn a_witness_signs_what_follows_from_what_it_signed_and_answers_the_rest_as_the_standard_says() {
        let stranger = |mut request: AddCheckpoint| {
            let text = request.checkpoint.text().to_owned();
            request.checkpoint =
                Note::new(text.clone(), vec![signature("x", SignatureKind::Ed25519, "x", &text, 0).0]).unwrap();
            request
        };
        let forged = |mut request: AddCheckpoint| {
            let text = request.checkpoint.text().to_owned();
            request.checkpoint =
                Note::new(text, vec![signature(ORIGIN, SignatureKind::Ed25519, "log", "else", 0).0]).unwrap();
            request
        };
        let proven = |mut request: AddCheckpoint, proof: Vec<Digest>| {
            request.proof = proof;
            request
        };
        let old = |mut request: AddCheckpoint, old_size| {
            request.old_size = old_size;
            request
        };
        for (case, request, held, status, says) in [
            ("the first", request("true", 0, 5), 0, 200, ""),
            ("the next", request("true", 5, 9), 5, 200, ""),
            ("the same again", request("true", 9, 9), 9, 200, ""),
            ("an empty log", request("true", 0, 0), 0, 200, ""),
            ("of a stranger", stranger(request("true", 5, 9)), 5, 403, "the log did not sign it\n"),
            ("wrongly signed", forged(request("true", 5, 9)), 5, 403, "the log did not sign it\n"),
            ("backwards", old(request("true", 5, 9), 10), 5, 400, "the old size 10 is above the checkpoint's, 9\n"),
            ("from an older one", request("true", 4, 9), 5, 409, "5\n"),
            ("from a newer one", request("true", 6, 9), 5, 409, "5\n"),
            ("unwitnessed, as if witnessed", request("true", 6, 9), 0, 409, "0\n"),
            ("shrunk", request("true", 5, 5), 9, 409, "9\n"),
            (
                "without proof",
                proven(request("true", 5, 9), vec![]),
                5,
                422,
                "it does not follow from what was cosigned\n",
            ),
            (
                "with proof from nothing",
                proven(request("true", 0, 9), vec![hash_leaf(b"x")]),
                0,
                422,
                "it does not follow from what was cosigned\n",
            ),
            ("another history", request("false", 5, 9), 5, 422, "it does not follow from what was cosigned\n"),
            (
                "another root at the same size",
                request("false", 9, 9),
                9,
                422,
                "it does not follow from what was cosigned\n",
            ),
        ] {
            match request.judge(Some(&log(held))) {
                Ok(accepted) => {
                    assert_eq!(status, 200, "{case}");
                    assert_eq!(accepted.held(), &at("true", held), "{case}");
                    assert_eq!(accepted.checkpoint().encode(), request.checkpoint.text(), "{case}");
                }
                Err(refusal) => assert_eq!((refusal.status(), refusal.body().1.as_str()), (status, says), "{case}"),
            }
        }
        let other = WitnessedLog { held: Checkpoint::new("other", 0, Frontier::default().root()).unwrap(), ..log(0) };
        assert_eq!(request("true", 0, 5).judge(Some(&other)).unwrap_err().status(), 404);
        assert_eq!(request("true", 4, 9).judge(Some(&log(5))).unwrap_err().body().0, "text/x.tlog.size");
    }

    #[test]
    fn the_cosignature_of_a_witness_counts_for_those_who_trust_it() {
        let request = request("true", 5, 9);
        let accepted = request.judge(Some(&log(5))).unwrap();
        let (_, witness) = signature("w.example", SignatureKind::Cosignature, "w", "", 0);
        let pair = Ed25519KeyPair::from_seed_unchecked(&Digest::of(b"w").0).unwrap();
        let sign = |message: &[u8]| Ok::<_, ()>(pair.sign(message).as_ref().try_into().unwrap());
        let line = accepted.cosign(&witness, 1_700_000_000, sign).unwrap();
        let trust = Trust { witnesses: vec![witness], quorum: 1, ..Trust::log(key()) };
        assert!(trust.verify(&request.checkpoint).is_err());
        let verified = trust.verify(&request.checkpoint.with(line).unwrap()).unwrap();
        assert_eq!(verified.cosigned_by(), [("w.example".into(), 1_700_000_000)]);
    }

    #[test]
    fn a_body_that_is_no_request_is_answered_400_with_the_reason() {
        let with = |from: &str, to: &str| EXAMPLE.replacen(from, to, 1);
        let hash = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";
        for (given, expected) in [
            (String::new(), "an empty line must precede the checkpoint"),
            (with("old 20852014", "new 20852014"), "it must begin with `old` and a size"),
            (with("old 20852014", "old 020852014"), "it must begin with `old` and a size"),
            (with("old 20852014", "old -1"), "it must begin with `old` and a size"),
            (with("PlRN", "PlR"), "the proof must be at most 63 lines of base64 of 32 bytes"),
            (
                with("old 20852014\n", &format!("old 20852014\n{}", hash.repeat(60))),
                "the proof must be at most 63 lines",
            ),
            (with("\n\n\u{2014}", "\n\u{2014}"), "an empty line must part the text of a note from its signatures"),
            (with("\u{2014}", "-"), "signature line 1 is not"),
            ("a".repeat(REQUEST_BYTES_MAX + 1), "it is too long"),
        ] {
            let refusal = AddCheckpoint::parse(given.as_bytes()).unwrap_err();
            assert_eq!(refusal.status(), 400);
            assert!(refusal.to_string().starts_with(&format!("it is not a request: {expected}")), "{refusal}");
        }
        let no_checkpoint = AddCheckpoint::parse(with("20852163", "many").as_bytes()).unwrap();
        assert_eq!(no_checkpoint.judge(Some(&log(0))).unwrap_err().status(), 400);
    }

    proptest! {
        /// PROVES (witnessed-history)
        #[test]
        fn whatever_is_asked_in_whatever_order_no_two_signed_checkpoints_contradict_each_other(
            asked in prop::collection::vec((any::<bool>(), 0..12usize, 0..12usize), 1..30),
        ) {
            let (mut log, mut signed) = (log(0), Vec::new());
            for (lie, from, to) in asked {
                let history = if lie { "false" } else { "true" };
                if let Ok(accepted) = request(history, from.min(to), to).judge(Some(&log)) {
                    prop_assert_eq!(accepted.held(), &log.held);
                    log.held = accepted.checkpoint().clone();
                    signed.push((history, to));
                }
            }
            for pair in signed.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].1);
                prop_assert!(pair[0].0 == pair[1].0 || pair[0].1 <= 3, "{:?}", signed);
            }
        }

        #[test]
        fn a_request_of_any_bytes_is_parsed_or_refused(bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let _ = AddCheckpoint::parse(&bytes);
            let mut near = EXAMPLE.as_bytes().to_vec();
            let at = at.index(near.len());
            near[at] = byte;
            if let Ok(request) = AddCheckpoint::parse(&near) {
                prop_assert_eq!(request.encode().into_bytes(), near);
                let _ = request.judge(Some(&log(0)));
            }
        }
    }
}
