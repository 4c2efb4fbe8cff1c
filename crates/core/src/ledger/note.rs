//! C2SP signed-note: a text with the signatures of those who stand behind it. A checkpoint of the ledger is one.
//!
//! Standard: <https://c2sp.org/signed-note> and, for what a witness signs, <https://c2sp.org/tlog-cosignature>. Two kinds of
//! signature are known: Ed25519 over the text (type 1) and the timestamped cosignature (type 4). Lines of other keys are
//! carried along and never counted. No private key is here: whoever holds one passes a function that signs.

use std::{fmt, sync::Arc};

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::canonical::Digest;

/// Longest note, in bytes: sixteen post-quantum signatures of others fit in.
pub const NOTE_BYTES_MAX: usize = 256 << 10;
/// Most signatures of one note; the standard asks for at least 16.
pub const SIGNATURES_MAX: usize = 64;
/// Longest name of a key, in bytes: an origin names its log's key.
pub const KEY_NAME_BYTES_MAX: usize = 320;
/// Times above it do not exist (tlog-cosignature: "It MUST NOT exceed 2^63 - 1").
const TIME_MAX: u64 = (1 << 63) - 1;

const DASH: &str = "\u{2014} ";
const SIGNATURE_BYTES: usize = 64;

/// What a signature of a key covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SignatureKind {
    /// Type 1: the text. This is how a log signs.
    Ed25519,
    /// Type 4: a time and the text. This is how a witness signs.
    Cosignature,
}

/// A public key under a name, known beforehand. Its text form is a *vkey*: `<name>+<key id>+<base64 of type and key>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerifierKey {
    name: Arc<str>,
    kind: SignatureKind,
    public: [u8; 32],
}

/// One signature line. Only its shape is known.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Signature {
    name: Arc<str>,
    key_id: [u8; 4],
    bytes: Vec<u8>,
}

/// A note as it came: well-formed, and not to be believed before [`verify`](Self::verify).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    text: String,
    signatures: Vec<Signature>,
}

/// A note that at least one known key signed, and no known key signed wrongly. Only [`Note::verify`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedNote<'a> {
    text: &'a str,
    signed_by: Vec<SignedBy<'a>>,
}

/// A known key whose signature was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignedBy<'a> {
    /// The key.
    pub key: &'a VerifierKey,
    /// When, in seconds since 1970, by the signer's clock; only a cosignature says so.
    pub at_seconds: Option<u64>,
}

/// Why bytes are not a note, or not one to believe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Beyond its bound.
    #[error("a note has at most {NOTE_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// Not UTF-8, or with a control character other than the newline.
    #[error("a note is UTF-8 without control characters")]
    Characters,
    /// Nothing stands between text and signatures.
    #[error("an empty line must part the text of a note from its signatures")]
    Unparted,
    /// The text must end its last line.
    #[error("the text of a note must end with a newline")]
    Unended,
    /// A signature line is none.
    #[error("signature line {0} is not `\u{2014} <key name> <base64>`")]
    Line(usize),
    /// Nobody signed, or too many did.
    #[error("a note has 1 to {SIGNATURES_MAX} signatures, this one has {0}")]
    Count(usize),
    /// None of the keys that we know signed it.
    #[error("no known key signed the note")]
    Unsigned,
    /// A known key's signature does not fit the text.
    #[error("the signature of `{0}` does not verify")]
    Signature(Arc<str>),
}

/// Why text is not a verifier key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The name breaks a rule.
    #[error("a key name has 1 to {KEY_NAME_BYTES_MAX} bytes, no space, no `+` and no control character")]
    Name,
    /// Not three parts of the right shape.
    #[error("a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`")]
    Shape,
    /// A signature type that is not verified here.
    #[error("signature type {0} is unknown; types 1 (Ed25519) and 4 (cosignature) are verified")]
    Kind(u8),
    /// The key id in it is another key's.
    #[error("its key id is {found}, and its name and key have {expected}")]
    Id {
        /// What name, type and key hash to.
        expected: String,
        /// What was written.
        found: String,
    },
}

impl SignatureKind {
    fn byte(self) -> u8 {
        match self {
            Self::Ed25519 => 1,
            Self::Cosignature => 4,
        }
    }
}

impl VerifierKey {
    /// A key of which the parts are known.
    pub fn new(name: &str, kind: SignatureKind, public: [u8; 32]) -> Result<Self, KeyError> {
        if is_key_name(name) { Ok(Self { name: name.into(), kind, public }) } else { Err(KeyError::Name) }
    }

    /// Reads a vkey.
    pub fn parse(vkey: &str) -> Result<Self, KeyError> {
        // The key itself may hold `+`: base64 does.
        let mut parts = vkey.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError::Shape);
        };
        if id.len() != 8 || !id.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()) {
            return Err(KeyError::Shape);
        }
        let key = STANDARD.decode(key).map_err(|_| KeyError::Shape)?;
        let (&kind, public) = key.split_first().ok_or(KeyError::Shape)?;
        let kind = match kind {
            1 => SignatureKind::Ed25519,
            4 => SignatureKind::Cosignature,
            other => return Err(KeyError::Kind(other)),
        };
        let key = Self::new(name, kind, public.try_into().map_err(|_| KeyError::Shape)?)?;
        let expected = hex::encode(key.id());
        if id == expected { Ok(key) } else { Err(KeyError::Id { expected, found: id.to_owned() }) }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its signatures cover.
    pub fn kind(&self) -> SignatureKind {
        self.kind
    }

    /// The 32 bytes of the Ed25519 public key.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// The key id: the first four bytes of `SHA-256(name || 0x0A || type || public key)`. It finds a key and proves nothing.
    pub fn id(&self) -> [u8; 4] {
        let hashed = [self.name.as_bytes(), &[b'\n', self.kind.byte()], &self.public].concat();
        let digest = Digest::of(&hashed).0;
        [digest[0], digest[1], digest[2], digest[3]]
    }

    /// Signs `text` in the name of this key: `sign` makes the Ed25519 signature of the bytes it is given. The time, in
    /// seconds since 1970, goes into a cosignature and nowhere else.
    pub fn sign<E>(
        &self,
        text: &str,
        at_seconds: u64,
        sign: impl FnOnce(&[u8]) -> Result<[u8; 64], E>,
    ) -> Result<Signature, E> {
        let bytes = match self.kind {
            SignatureKind::Ed25519 => sign(text.as_bytes())?.to_vec(),
            SignatureKind::Cosignature => {
                let at_seconds = at_seconds.min(TIME_MAX);
                let signature = sign(cosignature_message(at_seconds, text).as_bytes())?;
                [&at_seconds.to_be_bytes()[..], &signature].concat()
            }
        };
        Ok(Signature { name: self.name.clone(), key_id: self.id(), bytes })
    }

    /// Whether `signature` is this key's over `text`, and when it was made if it says so.
    fn verify(&self, text: &str, signature: &Signature) -> Option<Option<u64>> {
        let verified = |message: &[u8], signature: &[u8]| {
            signature.len() == SIGNATURE_BYTES
                && UnparsedPublicKey::new(&ED25519, &self.public).verify(message, signature).is_ok()
        };
        match self.kind {
            SignatureKind::Ed25519 => verified(text.as_bytes(), &signature.bytes).then_some(None),
            SignatureKind::Cosignature => {
                let (time, signature) = signature.bytes.split_first_chunk::<8>()?;
                let at_seconds = u64::from_be_bytes(*time);
                let fits =
                    at_seconds <= TIME_MAX && verified(cosignature_message(at_seconds, text).as_bytes(), signature);
                fits.then_some(Some(at_seconds))
            }
        }
    }
}

/// What a witness signs: a header, the time in seconds since 1970, and the text of the checkpoint (tlog-cosignature).
pub fn cosignature_message(at_seconds: u64, text: &str) -> String {
    format!("cosignature/v1\ntime {at_seconds}\n{text}")
}

impl Signature {
    /// The name of the key that it says it is of.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id of the key that it says it is of.
    pub fn key_id(&self) -> [u8; 4] {
        self.key_id
    }

    /// Reads one line, without its newline.
    pub fn parse(line: &str) -> Option<Self> {
        let (name, encoded) = line.strip_prefix(DASH)?.split_once(' ')?;
        let decoded = STANDARD.decode(encoded).ok()?;
        let (key_id, bytes) = decoded.split_first_chunk::<4>()?;
        (is_key_name(name) && !bytes.is_empty()).then(|| Self {
            name: name.into(),
            key_id: *key_id,
            bytes: bytes.to_vec(),
        })
    }
}

impl Note {
    /// A note of `text` with `signatures`, of which there must be one.
    pub fn new(text: String, signatures: Vec<Signature>) -> Result<Self, NoteError> {
        if !text.ends_with('\n') {
            return Err(NoteError::Unended);
        }
        if !text.chars().all(is_note_character) {
            return Err(NoteError::Characters);
        }
        if signatures.is_empty() || signatures.len() > SIGNATURES_MAX {
            return Err(NoteError::Count(signatures.len()));
        }
        let note = Self { text, signatures };
        let bytes = note.encode().len();
        if bytes > NOTE_BYTES_MAX { Err(NoteError::TooLong(bytes)) } else { Ok(note) }
    }

    /// Reads a note. Text and signatures are parted by the last empty line.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoteError> {
        if bytes.len() > NOTE_BYTES_MAX {
            return Err(NoteError::TooLong(bytes.len()));
        }
        let note = std::str::from_utf8(bytes).map_err(|_| NoteError::Characters)?;
        if !note.chars().all(is_note_character) {
            return Err(NoteError::Characters);
        }
        let parted_at = note.rfind("\n\n").ok_or(NoteError::Unparted)?;
        let (text, lines) = (&note[..=parted_at], &note[parted_at + 2..]);
        let count = lines.matches('\n').count();
        if lines.is_empty() || count > SIGNATURES_MAX {
            return Err(NoteError::Count(count));
        }
        let lines = lines.strip_suffix('\n').ok_or(NoteError::Line(count + 1))?;
        let signatures = lines
            .split('\n')
            .enumerate()
            .map(|(at, line)| Signature::parse(line).ok_or(NoteError::Line(at + 1)))
            .collect::<Result<_, _>>()?;
        Ok(Self { text: text.to_owned(), signatures })
    }

    /// The text, which is not to be believed yet, with its last newline.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The signature lines in their order, of known and unknown keys.
    pub fn signatures(&self) -> &[Signature] {
        &self.signatures
    }

    /// The note with one more signature.
    pub fn with(mut self, signature: Signature) -> Result<Self, NoteError> {
        self.signatures.push(signature);
        Self::new(self.text, self.signatures)
    }

    /// Text, empty line, signature lines.
    pub fn encode(&self) -> String {
        let mut note = format!("{}\n", self.text);
        for signature in &self.signatures {
            note += &format!("{signature}\n");
        }
        note
    }

    /// Verifies every signature of the keys that are known, and ignores those of others. A key that signed twice counts once.
    ///
    /// INVARIANT (known-signature): "If the key name and ID match a known key, verifiers MUST verify the signature"; one that
    /// fails condemns the whole note, and without one that holds there is no `VerifiedNote`.
    pub fn verify<'a>(
        &'a self,
        keys: impl IntoIterator<Item = &'a VerifierKey>,
    ) -> Result<VerifiedNote<'a>, NoteError> {
        let mut signed_by: Vec<SignedBy<'a>> = Vec::new();
        for key in keys {
            let id = key.id();
            for signature in self.signatures.iter().filter(|line| line.key_id == id && line.name == key.name) {
                let at_seconds =
                    key.verify(&self.text, signature).ok_or_else(|| NoteError::Signature(key.name.clone()))?;
                if signed_by.iter().all(|earlier| earlier.key != key) {
                    signed_by.push(SignedBy { key, at_seconds });
                }
            }
        }
        if signed_by.is_empty() {
            return Err(NoteError::Unsigned);
        }
        Ok(VerifiedNote { text: &self.text, signed_by })
    }
}

impl<'a> VerifiedNote<'a> {
    /// The text that was signed.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// The known keys that signed it, each once.
    pub fn signed_by(&self) -> &[SignedBy<'a>] {
        &self.signed_by
    }
}

impl std::str::FromStr for VerifierKey {
    type Err = KeyError;
    fn from_str(vkey: &str) -> Result<Self, KeyError> {
        Self::parse(vkey)
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = [&[self.kind.byte()][..], &self.public].concat();
        write!(f, "{}+{}+{}", self.name, hex::encode(self.id()), STANDARD.encode(key))
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DASH}{} {}", self.name, STANDARD.encode([&self.key_id[..], &self.bytes].concat()))
    }
}

fn is_key_name(name: &str) -> bool {
    (1..=KEY_NAME_BYTES_MAX).contains(&name.len())
        && name.chars().all(|c| !c.is_whitespace() && c != '+' && is_note_character(c))
}

fn is_note_character(c: char) -> bool {
    c >= ' ' || c == '\n'
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use proptest::prelude::*;

    use super::*;

    /// The key, the note and the malformed notes that golang.org/x/mod/sumdb/note is tested with.
    const GO_KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    const GO_NOTE: &str = "If you think cryptography is the answer to your problem,\n\
                           then you don't know what your problem is.\n\n\
                           \u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
    /// A checkpoint that sunlight's witness holds in that program's own test data, with the key that it publishes.
    const WITNESS_KEY: &str = "witness.example.org+b8a2cf20+BFLN3yikSfFkVAJtrnh/CiY3Zozkoy7clp+P7XB28qUN";
    const WITNESSED: &str = "rome2026h1.example.org\n300\nlCkHUpkmVBEms2r2T1K6Og69+wUuuN3MIEW1/ezu2v0=\n\n\
        \u{2014} rome2026h1.example.org kVB1JgAAAZtxtEwABAMARzBFAiEAi+mTa2xjL1IdWpH82OeciGsGvwRAP+f1WkfKaSZCfFECIHoNPZ/Q3y6UNzvKOO9cuLr6V16vPNfhwhle9f6r5H/Z\n\
        \u{2014} witness.example.org uKLPIAAAAABpVGeAhm2bOvKc3LaB9PFN1ruG19Y5yqslmcAAbhftnn1Zznmo0LXFZq4LGvqKqLX8jWlwLKasxEGTLIqAVusneCBmBw==\n";

    fn key(vkey: &str) -> VerifierKey {
        VerifierKey::parse(vkey).unwrap()
    }

    /// A key pair of its own for each name and kind.
    fn pair(name: &str, kind: SignatureKind) -> (Ed25519KeyPair, VerifierKey) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&Digest::of(name.as_bytes()).0).unwrap();
        let public = pair.public_key().as_ref().try_into().unwrap();
        (pair, VerifierKey::new(name, kind, public).unwrap())
    }

    fn signed(text: &str, name: &str, kind: SignatureKind, at_seconds: u64) -> (Signature, VerifierKey) {
        let (pair, key) = pair(name, kind);
        let sign = |message: &[u8]| Ok::<_, ()>(pair.sign(message).as_ref().try_into().unwrap());
        (key.sign(text, at_seconds, sign).unwrap(), key)
    }

    #[test]
    fn a_note_that_go_signed_verifies_and_is_written_as_go_writes_it() {
        let (note, key) = (Note::parse(GO_NOTE.as_bytes()).unwrap(), key(GO_KEY));
        let verified = note.verify([&key]).unwrap();
        assert_eq!(verified.text(), GO_NOTE.split("\n\n").next().unwrap().to_owned() + "\n");
        assert_eq!(verified.signed_by(), [SignedBy { key: &key, at_seconds: None }]);
        assert_eq!(note.encode(), GO_NOTE);
        assert_eq!(key.to_string(), GO_KEY);
        assert_eq!(key.id(), [0xc7, 0x4f, 0x20, 0xa3]);
    }

    #[test]
    fn a_cosignature_that_sunlight_made_verifies_with_its_time() {
        let (note, key) = (Note::parse(WITNESSED.as_bytes()).unwrap(), key(WITNESS_KEY));
        let verified = note.verify([&key]).unwrap();
        assert_eq!(verified.signed_by(), [SignedBy { key: &key, at_seconds: Some(1_767_139_200) }]);
        assert_eq!(note.encode(), WITNESSED);
        let other_time = WITNESSED.replace("AAAAABpVGeAh", "AAAAABpVGeBh");
        assert_ne!(other_time, WITNESSED);
        assert_eq!(
            Note::parse(other_time.as_bytes()).unwrap().verify([&key]).unwrap_err().to_string(),
            "the signature of `witness.example.org` does not verify"
        );
    }

    #[test]
    fn bytes_that_are_no_note_are_refused_with_the_reason() {
        let sixty_five = format!("text\n\n{}", "\u{2014} a AAAAAAA=\n".repeat(SIGNATURES_MAX + 1));
        for (given, expected) in [
            ("", "an empty line must part the text of a note from its signatures"),
            ("text\n", "an empty line must part the text of a note from its signatures"),
            ("text\n\n", "a note has 1 to 64 signatures, this one has 0"),
            ("text\n\n\u{2014} a AAAAAAA=", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n- a AAAAAAA=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a AAAAAAA=\nx\n", "signature line 2 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a  AAAAAAA=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a\u{a0}b AAAAAAA=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a+b AAAAAAA=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014}  AAAAAAA=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a AAAAAA==\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a AAAAAAA\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\n\n\u{2014} a AAAAAAB=\n", "signature line 1 is not `\u{2014} <key name> <base64>`"),
            ("text\r\n\n\u{2014} a AAAAAAA=\n", "a note is UTF-8 without control characters"),
            ("te\u{0}xt\n\n\u{2014} a AAAAAAA=\n", "a note is UTF-8 without control characters"),
            (&sixty_five, "a note has 1 to 64 signatures, this one has 65"),
        ] {
            assert_eq!(Note::parse(given.as_bytes()).unwrap_err().to_string(), expected, "{given:?}");
        }
        assert_eq!(Note::parse(b"\xff\n\n").unwrap_err(), NoteError::Characters);
        assert_eq!(Note::parse(&[b'a'; NOTE_BYTES_MAX + 1]).unwrap_err(), NoteError::TooLong(NOTE_BYTES_MAX + 1));
    }

    #[test]
    fn text_that_is_no_verifier_key_is_refused_with_the_reason() {
        for (given, expected) in [
            ("", "a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`"),
            (
                "PeterNeumann+c74f20a3",
                "a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`",
            ),
            (
                &GO_KEY.replace("c74f", "C74F"),
                "a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`",
            ),
            (
                &GO_KEY.replace("c74f", "c74"),
                "a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`",
            ),
            (&GO_KEY.replace("c74f", "c74e"), "its key id is c74e20a3, and its name and key have c74f20a3"),
            (&GO_KEY.replace("Peter", "Petra"), "its key id is c74f20a3, and its name and key have"),
            (
                &GO_KEY.replace("Peter", "Peter "),
                "a key name has 1 to 320 bytes, no space, no `+` and no control character",
            ),
            (
                &GO_KEY.replace("PeterNeumann", ""),
                "a key name has 1 to 320 bytes, no space, no `+` and no control character",
            ),
            // Both from Go's own tests: a key that is too long, and an unknown type, each with a key id that fits.
            (
                "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
                "a verifier key is `<name>+<8 hexadecimal digits>+<base64 of a type and 32 bytes>`",
            ),
            (
                "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
                "signature type 101 is unknown; types 1 (Ed25519) and 4 (cosignature) are verified",
            ),
        ] {
            let error = VerifierKey::parse(given).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{given}: {error}");
        }
        for from in 0..GO_KEY.len() {
            for to in from + 1..=GO_KEY.len() {
                let whole = (from, to) == (0, GO_KEY.len());
                assert_eq!(VerifierKey::parse(&GO_KEY[from..to]).is_ok(), whole, "{from}..{to}");
            }
        }
    }

    /// PROVES (known-signature)
    #[test]
    fn one_wrong_signature_of_a_known_key_condemns_the_note_and_those_of_strangers_count_for_nothing() {
        let text = "one\n\ntwo\n";
        let (good, log) = signed(text, "log.example/a", SignatureKind::Ed25519, 0);
        let (cosigned, witness) = signed(text, "witness.example/w", SignatureKind::Cosignature, 7);
        let (elsewhere, _) = signed("other\n", "log.example/a", SignatureKind::Ed25519, 0);
        let (_, stranger) = signed(text, "stranger.example", SignatureKind::Ed25519, 0);
        // The log's own key, under another kind: another key.
        let as_witness = VerifierKey::new(log.name(), SignatureKind::Cosignature, *log.public()).unwrap();
        let note = |signatures: &[&Signature]| {
            Note::new(text.into(), signatures.iter().map(|s| (*s).clone()).collect()).unwrap()
        };
        let refused = Err(NoteError::Signature("log.example/a".into()));
        for (case, note, keys, expected) in [
            ("nobody is known", note(&[&good]), &[][..], Err(NoteError::Unsigned)),
            ("only a stranger is known", note(&[&good]), &[&stranger], Err(NoteError::Unsigned)),
            ("the key of the other kind", note(&[&good]), &[&as_witness], Err(NoteError::Unsigned)),
            ("one of two wrong", note(&[&good, &elsewhere]), &[&log], refused.clone()),
            ("wrong beside a good one of another", note(&[&cosigned, &elsewhere]), &[&witness, &log], refused),
            ("wrong, of someone unknown", note(&[&cosigned, &elsewhere]), &[&witness], Ok(vec![Some(7)])),
            ("twice", note(&[&good, &good]), &[&log, &log], Ok(vec![None])),
            ("both", note(&[&good, &cosigned]), &[&log, &witness], Ok(vec![None, Some(7)])),
        ] {
            let found = note.verify(keys.iter().copied());
            let found = found.map(|verified| verified.signed_by().iter().map(|by| by.at_seconds).collect::<Vec<_>>());
            assert_eq!(found, expected, "{case}");
        }
    }

    #[test]
    fn what_a_note_cannot_hold_is_not_made_into_one() {
        let (signature, _) = signed("a\n", "k", SignatureKind::Ed25519, 0);
        for (text, signatures, expected) in [
            ("a", vec![signature.clone()], NoteError::Unended),
            ("a\tb\n", vec![signature.clone()], NoteError::Characters),
            ("a\n", vec![], NoteError::Count(0)),
            ("a\n", vec![signature.clone(); SIGNATURES_MAX + 1], NoteError::Count(SIGNATURES_MAX + 1)),
        ] {
            assert_eq!(Note::new(text.into(), signatures).unwrap_err(), expected);
        }
        let long = "a".repeat(NOTE_BYTES_MAX) + "\n";
        assert!(matches!(Note::new(long, vec![signature]).unwrap_err(), NoteError::TooLong(_)));
    }

    proptest! {
        #[test]
        fn what_was_signed_is_read_back_and_verifies(
            text in "([^\\x00-\\x1f]{0,20}\n){1,6}", name in "[a-z./]{1,20}", at_seconds in 0..=TIME_MAX, cosign: bool,
        ) {
            let kind = if cosign { SignatureKind::Cosignature } else { SignatureKind::Ed25519 };
            let (signature, key) = signed(&text, &name, kind, at_seconds);
            let note = Note::new(text, vec![signature]).unwrap();
            let read = Note::parse(note.encode().as_bytes()).unwrap();
            prop_assert_eq!(&read, &note);
            prop_assert_eq!(read.verify([&key]).unwrap().signed_by()[0].at_seconds, cosign.then_some(at_seconds));
            prop_assert_eq!(VerifierKey::parse(&key.to_string()), Ok(key));
        }

        #[test]
        fn whatever_parses_encodes_to_the_same_bytes(bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let _ = Note::parse(&bytes);
            let mut near = WITNESSED.as_bytes().to_vec();
            let at = at.index(near.len());
            near[at] = byte;
            if let Ok(note) = Note::parse(&near) {
                prop_assert_eq!(note.encode().into_bytes(), near.clone());
                let verified = note.verify([&key(WITNESS_KEY)]).is_ok();
                // Only the line of the log, which is unknown here, may differ.
                prop_assert!(!verified || near == WITNESSED.as_bytes() || (73..220).contains(&at), "{}", at);
            }
        }
    }
}
