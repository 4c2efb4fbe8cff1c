//! Verifies what a WebAuthn authenticator signed, now or years later, from the stored bytes alone.
//!
//! Standard: Web Authentication Level 3, section 7.2 (an assertion) and 6.1 (authenticator data); keys are COSE (RFC 9052, 9053,
//! 8230). Of what the standard leaves to us, the strictest holds: the user was verified, the page was not in a frame of
//! another, the origin is one of ours to the letter. Every refusal has a name. No challenge is made here and none is remembered.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents,
    UnparsedPublicKey,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::challenge::{Acting, Challenge, SignIn};
use crate::canonical::Digest;

/// Longest credential id, in bytes (section 5.8.3 and 7.1).
pub const CREDENTIAL_ID_BYTES_MAX: usize = 1023;
/// Longest authenticator data of an assertion, in bytes: extensions that nobody asked for may stand in it.
pub const AUTHENTICATOR_DATA_BYTES_MAX: usize = 1024;
/// Longest client data, in bytes.
pub const CLIENT_DATA_BYTES_MAX: usize = 4096;
/// Longest signature, in bytes: RSA of 4096 bits.
pub const SIGNATURE_BYTES_MAX: usize = 512;
/// Longest public key, in bytes.
const KEY_BYTES_MAX: usize = 1024;

/// The origin of the page on which a command has a change signed: `localhost` is its relying party, so factors that are enrolled for
/// `localhost` have to name it among their origins.
pub const LOCAL_ORIGIN: &str = "http://localhost:7449";

const USER_PRESENT: u8 = 1;
const USER_VERIFIED: u8 = 1 << 2;
const BACKUP_ELIGIBLE: u8 = 1 << 3;
const BACKED_UP: u8 = 1 << 4;
const ATTESTED_CREDENTIAL: u8 = 1 << 6;
const EXTENSIONS: u8 = 1 << 7;

/// The public key of a credential. Only [`parse`](Self::parse) makes one: it is on its curve, and strong enough.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey {
    cose: Vec<u8>,
    key: Key,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Key {
    /// ECDSA on P-256 with SHA-256: the uncompressed point.
    Es256([u8; 65]),
    /// Ed25519.
    EdDsa([u8; 32]),
    /// RSASSA-PKCS1-v1_5 with SHA-256: the modulus. The exponent is 65537.
    Rs256(Vec<u8>),
}

/// Where ceremonies are held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelyingParty {
    /// The host that credentials are bound to.
    pub id: String,
    /// The origins that its pages have, to the letter: `https://mesh.example:8443`.
    pub origins: Vec<String>,
}

/// What is known of a credential since it was enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential<'a> {
    /// Its id.
    pub id: &'a [u8],
    /// Its key.
    pub key: &'a PublicKey,
    /// Whether its key may be backed up. It was said at enrolment and never changes.
    pub backup_eligible: bool,
    /// The last count of signatures that it showed; `None` where nobody keeps count, as when a ledger is read years later.
    pub sign_count: Option<u32>,
}

/// An authenticator's answer, as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PresentedAssertion<'a> {
    /// The credential that it says it used.
    pub credential_id: &'a [u8],
    /// What the authenticator says.
    pub authenticator_data: &'a [u8],
    /// What the browser says: the exact bytes.
    pub client_data_json: &'a [u8],
    /// Over both.
    pub signature: &'a [u8],
}

/// An answer that its credential gave to this challenge, at one of our origins, by a person it knows. Only [`verify`] makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedAssertion {
    sign_count: u32,
    backup_eligible: bool,
    backed_up: bool,
}

/// Why bytes are not a key to trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyRefused {
    /// Not a COSE key in canonical CBOR.
    #[error("it is not a COSE key in its canonical encoding")]
    Malformed,
    /// An algorithm that is not offered at enrolment.
    #[error("its algorithm is not ES256, EdDSA or RS256")]
    Algorithm,
    /// Members that do not fit the algorithm, or others beside them.
    #[error("its members are not those of its algorithm")]
    Members,
    /// Not on its curve.
    #[error("it is not a point of its curve")]
    Point,
    /// RSA that is too weak or too large.
    #[error("an RSA key must have 2048 to 4096 bits and the exponent 65537")]
    Rsa,
}

/// Why an assertion proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssertionRefused {
    /// A part is beyond its bound.
    #[error("its {0} is too long")]
    TooLong(&'static str),
    /// Another credential answered.
    #[error("another credential answered")]
    OtherCredential,
    /// The client data is not the JSON that the standard describes.
    #[error("its client data cannot be read: {0}")]
    ClientData(String),
    /// Another ceremony: a registration, for one.
    #[error("it is of type `{0}`, not `webauthn.get`")]
    Type(String),
    /// An answer to another question: replayed, or for another change.
    #[error("it answers another challenge")]
    Challenge,
    /// A page elsewhere held the ceremony: phishing, most often.
    #[error("it was made at origin `{0}`")]
    Origin(String),
    /// Our page stood in another's frame: what the operator saw is unknown.
    #[error("it was made in a frame of another origin")]
    CrossOrigin,
    /// The authenticator data is not what the standard describes.
    #[error("its authenticator data cannot be read")]
    AuthenticatorData,
    /// The authenticator answered for another relying party.
    #[error("it was made for another relying party")]
    RelyingParty,
    /// Nobody touched it.
    #[error("nobody was present")]
    NotPresent,
    /// Nobody proved to the authenticator who they are.
    #[error("the user was not verified")]
    NotVerified,
    /// Backed up without being allowed to, or otherwise than at enrolment.
    #[error("its backup flags contradict its enrolment")]
    Backup,
    /// The signature does not fit.
    #[error("its signature does not verify")]
    Signature,
    /// The count did not rise: there may be two of it.
    #[error("its signature count is {found} after {held}: the authenticator may have been cloned")]
    Cloned {
        /// The last one seen.
        held: u32,
        /// This one.
        found: u32,
    },
}

#[derive(Deserialize)]
struct ClientData {
    r#type: String,
    challenge: String,
    origin: String,
    #[serde(rename = "crossOrigin", default)]
    cross_origin: bool,
    #[serde(rename = "topOrigin")]
    top_origin: Option<String>,
}

/// Verifies `assertion` of `credential` over `challenge`, in the order of section 7.2.
///
/// INVARIANT (verified-assertion): type, challenge, origin, frame, relying party, presence, verification of the user,
/// backup flags, signature and count all hold; there is no other maker.
pub fn verify(
    assertion: &PresentedAssertion<'_>,
    credential: &Credential<'_>,
    relying_party: &RelyingParty,
    challenge: &Challenge,
) -> Result<VerifiedAssertion, AssertionRefused> {
    verify_over(assertion, credential, relying_party, &challenge.encode())
}

/// Verifies `assertion` of `credential` over what is signed to sign in, as [`verify`] does over a change.
pub fn verify_sign_in(
    assertion: &PresentedAssertion<'_>,
    credential: &Credential<'_>,
    relying_party: &RelyingParty,
    sign_in: &SignIn,
) -> Result<VerifiedAssertion, AssertionRefused> {
    verify_over(assertion, credential, relying_party, &sign_in.encode())
}

/// Verifies `assertion` of `credential` over what is signed for an act, as [`verify`] does over a change.
pub fn verify_act(
    assertion: &PresentedAssertion<'_>,
    credential: &Credential<'_>,
    relying_party: &RelyingParty,
    acting: &Acting,
) -> Result<VerifiedAssertion, AssertionRefused> {
    verify_over(assertion, credential, relying_party, &acting.encode())
}

/// [`verify`] over the challenge as the client data must spell it.
fn verify_over(
    assertion: &PresentedAssertion<'_>,
    credential: &Credential<'_>,
    relying_party: &RelyingParty,
    challenge: &str,
) -> Result<VerifiedAssertion, AssertionRefused> {
    for (what, bytes, max) in [
        ("credential id", assertion.credential_id, CREDENTIAL_ID_BYTES_MAX),
        ("authenticator data", assertion.authenticator_data, AUTHENTICATOR_DATA_BYTES_MAX),
        ("client data", assertion.client_data_json, CLIENT_DATA_BYTES_MAX),
        ("signature", assertion.signature, SIGNATURE_BYTES_MAX),
    ] {
        if bytes.len() > max {
            return Err(AssertionRefused::TooLong(what));
        }
    }
    if assertion.credential_id != credential.id {
        return Err(AssertionRefused::OtherCredential);
    }
    let client_data: ClientData = serde_json::from_slice(assertion.client_data_json)
        .map_err(|error| AssertionRefused::ClientData(error.to_string()))?;
    if client_data.r#type != "webauthn.get" {
        return Err(AssertionRefused::Type(shortened(&client_data.r#type)));
    }
    if client_data.challenge != challenge {
        return Err(AssertionRefused::Challenge);
    }
    if !relying_party.origins.contains(&client_data.origin) {
        return Err(AssertionRefused::Origin(shortened(&client_data.origin)));
    }
    if client_data.cross_origin || client_data.top_origin.is_some() {
        return Err(AssertionRefused::CrossOrigin);
    }
    let data = AuthenticatorData::parse(assertion.authenticator_data).ok_or(AssertionRefused::AuthenticatorData)?;
    if data.relying_party != Digest::of(relying_party.id.as_bytes()).0 {
        return Err(AssertionRefused::RelyingParty);
    }
    if !data.has(USER_PRESENT) {
        return Err(AssertionRefused::NotPresent);
    }
    if !data.has(USER_VERIFIED) {
        return Err(AssertionRefused::NotVerified);
    }
    let (backup_eligible, backed_up) = (data.has(BACKUP_ELIGIBLE), data.has(BACKED_UP));
    if backup_eligible != credential.backup_eligible || (backed_up && !backup_eligible) {
        return Err(AssertionRefused::Backup);
    }
    if !signature_fits(assertion, credential.key) {
        return Err(AssertionRefused::Signature);
    }
    // "If authData.signCount is nonzero or credentialRecord.signCount is nonzero", it must be greater.
    if let Some(held) = credential.sign_count
        && (held, data.sign_count) != (0, 0)
        && data.sign_count <= held
    {
        return Err(AssertionRefused::Cloned { held, found: data.sign_count });
    }
    Ok(VerifiedAssertion { sign_count: data.sign_count, backup_eligible, backed_up })
}

impl VerifiedAssertion {
    /// The count of signatures to be held from now on.
    pub fn sign_count(&self) -> u32 {
        self.sign_count
    }

    /// Whether its key may leave the authenticator, as that of a synced passkey.
    pub fn backup_eligible(&self) -> bool {
        self.backup_eligible
    }

    /// Whether it has.
    pub fn backed_up(&self) -> bool {
        self.backed_up
    }
}

/// Section 6.1, as an assertion has it.
struct AuthenticatorData {
    relying_party: [u8; 32], // SHA-256 of its id
    flags: u8,
    sign_count: u32,
}

impl AuthenticatorData {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (relying_party, rest) = bytes.split_first_chunk::<32>()?;
        let ([flags, count @ ..], extensions) = rest.split_first_chunk::<5>()?;
        let data = Self { relying_party: *relying_party, flags: *flags, sign_count: u32::from_be_bytes(*count) };
        // Only a registration carries a credential. Extensions are a CBOR map, in which we asked for nothing and read nothing.
        let extended = extensions.first().is_some_and(|first| first >> 5 == 5);
        let fits = if data.has(EXTENSIONS) { extended } else { extensions.is_empty() };
        (fits && !data.has(ATTESTED_CREDENTIAL)).then_some(data)
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

fn signature_fits(assertion: &PresentedAssertion<'_>, key: &PublicKey) -> bool {
    let client_data = Digest::of(assertion.client_data_json);
    let message = [assertion.authenticator_data, &client_data.0].concat();
    let signature = assertion.signature;
    match &key.key {
        Key::Es256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point).verify(&message, signature).is_ok(),
        Key::EdDsa(public) => UnparsedPublicKey::new(&ED25519, public).verify(&message, signature).is_ok(),
        Key::Rs256(modulus) => RsaPublicKeyComponents { n: &modulus[..], e: &[1, 0, 1][..] }
            .verify(&RSA_PKCS1_2048_8192_SHA256, &message, signature)
            .is_ok(),
    }
}

fn shortened(given: &str) -> String {
    given.chars().take(100).collect()
}

impl PublicKey {
    /// Reads a COSE key: the members of its algorithm and no others, in the canonical encoding of CTAP2.
    pub fn parse(cose: &[u8]) -> Result<Self, KeyRefused> {
        let members = cose_members(cose).ok_or(KeyRefused::Malformed)?;
        let Some((_, Cose::Number(algorithm))) = members.iter().find(|(label, _)| *label == 3) else {
            return Err(if members.is_empty() { KeyRefused::Malformed } else { KeyRefused::Algorithm });
        };
        let key = match (algorithm, &members[..]) {
            (-7, [(1, Cose::Number(2)), (3, _), (-1, Cose::Number(1)), (-2, Cose::Bytes(x)), (-3, Cose::Bytes(y))])
                if x.len() == 32 && y.len() == 32 =>
            {
                let mut point = [4; 65];
                point[1..33].copy_from_slice(x);
                point[33..].copy_from_slice(y);
                ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point).map_err(|_| KeyRefused::Point)?;
                Key::Es256(point)
            }
            (-8, [(1, Cose::Number(1)), (3, _), (-1, Cose::Number(6)), (-2, Cose::Bytes(x))]) => {
                let public = <[u8; 32]>::try_from(*x).map_err(|_| KeyRefused::Members)?;
                ParsedPublicKey::new(&ED25519, public).map_err(|_| KeyRefused::Point)?;
                Key::EdDsa(public)
            }
            (-257, [(1, Cose::Number(3)), (3, _), (-1, Cose::Bytes(modulus)), (-2, Cose::Bytes(exponent))]) => {
                let strong =
                    (256..=512).contains(&modulus.len()) && modulus[0] >= 0x80 && modulus[modulus.len() - 1] & 1 == 1;
                if !strong || *exponent != [1, 0, 1] {
                    return Err(KeyRefused::Rsa);
                }
                Key::Rs256(modulus.to_vec())
            }
            (-7 | -8 | -257, _) => return Err(KeyRefused::Members),
            _ => return Err(KeyRefused::Algorithm),
        };
        Ok(Self { cose: cose.to_vec(), key })
    }

    /// The COSE key, byte for byte.
    pub fn cose(&self) -> &[u8] {
        &self.cose
    }

    /// The name of its algorithm: `ES256`, `EdDSA` or `RS256`.
    pub fn algorithm(&self) -> &'static str {
        match self.key {
            Key::Es256(_) => "ES256",
            Key::EdDsa(_) => "EdDSA",
            Key::Rs256(_) => "RS256",
        }
    }
}

/// A value of a COSE key.
enum Cose<'a> {
    Number(i64),
    Bytes(&'a [u8]),
}

/// The members of a CBOR map of numbers to numbers and byte strings, in canonical order, with nothing behind it.
fn cose_members(cose: &[u8]) -> Option<Vec<(i64, Cose<'_>)>> {
    let (5, count, mut rest) = cbor_head(cose)? else { return None };
    if cose.len() > KEY_BYTES_MAX || count > 8 {
        return None;
    }
    let mut members: Vec<(i64, Cose<'_>)> = Vec::new();
    for _ in 0..count {
        let label;
        (label, rest) = cbor_number(rest)?;
        // CTAP2: by length of the encoded label, then bytewise; every label here is one byte.
        let rank = |label: i64| if label >= 0 { label } else { 0x1f - label };
        if members.last().is_some_and(|(last, _)| rank(*last) >= rank(label)) || !(-24..24).contains(&label) {
            return None;
        }
        let value = match cbor_head(rest)? {
            (0 | 1, _, _) => {
                let (number, after) = cbor_number(rest)?;
                rest = after;
                Cose::Number(number)
            }
            (2, length, after) => {
                let (bytes, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
                rest = after;
                Cose::Bytes(bytes)
            }
            _ => return None,
        };
        members.push((label, value));
    }
    rest.is_empty().then_some(members)
}

fn cbor_number(bytes: &[u8]) -> Option<(i64, &[u8])> {
    let (major, value, rest) = cbor_head(bytes)?;
    let value = i64::try_from(value).ok()?;
    match major {
        0 => Some((value, rest)),
        1 => Some((-1 - value, rest)),
        _ => None,
    }
}

/// Major type and argument of a CBOR item (RFC 8949, 3), in the shortest form only, and what follows.
fn cbor_head(bytes: &[u8]) -> Option<(u8, u64, &[u8])> {
    let (&first, rest) = bytes.split_first()?;
    let (value, rest) = match first & 0x1f {
        small @ 0..24 => (u64::from(small), rest),
        24 => {
            let ([byte], rest) = rest.split_first_chunk::<1>()?;
            (u64::from(*byte), rest)
        }
        25 => {
            let (bytes, rest) = rest.split_first_chunk::<2>()?;
            (u64::from(u16::from_be_bytes(*bytes)), rest)
        }
        _ => return None,
    };
    let shortest = match first & 0x1f {
        24 => value >= 24,
        25 => value > 0xff,
        _ => true,
    };
    shortest.then_some((first >> 5, value, rest))
}

impl TryFrom<String> for PublicKey {
    type Error = KeyRefused;
    fn try_from(given: String) -> Result<Self, KeyRefused> {
        Self::parse(&URL_SAFE_NO_PAD.decode(given).map_err(|_| KeyRefused::Malformed)?)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        URL_SAFE_NO_PAD.encode(key.cose)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}, {})", self.algorithm(), Digest::of(&self.cose).short())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use aws_lc_rs::{
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use proptest::prelude::*;

    use super::*;
    use crate::{assurance::challenge::Purpose, change::Revision};

    #[derive(Deserialize)]
    struct Fixtures {
        rp_id: String,
        origin: String,
        cases: Vec<Fixture>,
    }

    #[derive(Deserialize)]
    struct Fixture {
        name: String,
        purpose: Purpose,
        base: u64,
        anchor: Digest,
        root: Digest,
        change_set: Digest,
        nonce: Digest,
        challenge: Digest,
        public_key: String,
        authenticator_data: String,
        client_data_json: String,
        signature: String,
        sign_count: u32,
        backup_eligible: bool,
        backed_up: bool,
    }

    fn example(id: &str) -> RelyingParty {
        RelyingParty { id: id.into(), origins: vec![format!("https://{id}")] }
    }

    #[test]
    fn assertions_and_challenges_that_foreign_implementations_made_verify() {
        let fixtures: Fixtures = serde_json::from_str(include_str!("../../tests/fixtures/assertions.json")).unwrap();
        let relying_party = RelyingParty { id: fixtures.rp_id, origins: vec![fixtures.origin] };
        for case in fixtures.cases {
            let challenge = Challenge {
                anchor: case.anchor,
                purpose: case.purpose,
                base: Revision(case.base),
                root: case.root,
                change_set: case.change_set,
                nonce: case.nonce,
            };
            assert_eq!(challenge.digest(), case.challenge, "{}", case.name);
            let key = PublicKey::parse(&hex::decode(&case.public_key).unwrap()).unwrap();
            let assertion = [case.authenticator_data, case.signature].map(|hex| hex::decode(hex).unwrap());
            let client_data = base64::engine::general_purpose::STANDARD.decode(case.client_data_json).unwrap();
            let assertion = PresentedAssertion {
                credential_id: b"id",
                authenticator_data: &assertion[0],
                client_data_json: &client_data,
                signature: &assertion[1],
            };
            let credential =
                |sign_count| Credential { id: b"id", key: &key, backup_eligible: case.backup_eligible, sign_count };
            let expected = VerifiedAssertion {
                sign_count: case.sign_count,
                backup_eligible: case.backup_eligible,
                backed_up: case.backed_up,
            };
            assert_eq!(
                verify(&assertion, &credential(Some(0)), &relying_party, &challenge),
                Ok(expected),
                "{}",
                case.name
            );
            assert_eq!(
                verify(&assertion, &credential(None), &relying_party, &challenge),
                Ok(expected),
                "{}",
                case.name
            );
            let replayed = verify(&assertion, &credential(Some(case.sign_count)), &relying_party, &challenge);
            assert_eq!(replayed.is_err(), case.sign_count > 0, "{}: the same answer again", case.name);
            let staging = Challenge { anchor: Digest::of(b"staging"), ..challenge };
            let elsewhere = verify(&assertion, &credential(None), &relying_party, &staging);
            assert_eq!(elsewhere, Err(AssertionRefused::Challenge), "{}: a staging mesh's", case.name);
            let again: PublicKey = serde_json::from_value(serde_json::to_value(&key).unwrap()).unwrap();
            assert_eq!(again, key);
        }
    }

    /// The authentication examples of sections 16.2, 16.4 and 16.5 of Web Authentication Level 3.
    #[test]
    fn the_test_vectors_of_the_standard_verify_as_far_as_we_are_as_lenient_as_it() {
        let none_es256 = (
            "a5010203262001215820afefa16f97ca9b2d23eb86ccb64098d20db90856062eb249c33a9b672f26df61225820930a56b87a2fca66334b03458abf879717c12cc68ed73290af2e2664796b9220",
            "39c0e7521417ba54d43e8dc95174f423dee9bf3cd804ff6d65c857c9abf4d408",
            "bfabc37432958b063360d3ad6461c9c4735ae7f8edd46592a5e0f01452b2e4b51900000000",
            "7b2274797065223a22776562617574686e2e676574222c226368616c6c656e6765223a224f63446e55685158756c5455506f334a5558543049393770767a7a59425039745a63685879617630314167222c226f726967696e223a2268747470733a2f2f6578616d706c652e6f7267222c2263726f73734f726967696e223a66616c73657d",
            "3046022100f50a4e2e4409249c4a853ba361282f09841df4dd4547a13a87780218deffcd380221008480ac0f0b93538174f575bf11a1dd5d78c6e486013f937295ea13653e331e87",
        );
        let cross_origin = (
            "a501020326200121582022200a473f90b11078851550d03b4e44a2279f8c4eca27b3153dedfe03e4e97d225820cbd0be95e746ad6f5a8191be11756e4c0420e72f65b466d39bc56b8b123a9c6e",
            "876aa517ba83fdee65fcffdbca4c84eeae5d54f8041a1fc85c991e5bbb273137",
            "bfabc37432958b063360d3ad6461c9c4735ae7f8edd46592a5e0f01452b2e4b50500000000",
            "7b2274797065223a22776562617574686e2e676574222c226368616c6c656e6765223a226832716c463771445f65356c5f505f62796b7945377135645650674547685f49584a6b655737736e4d5463222c226f726967696e223a2268747470733a2f2f6578616d706c652e6f7267222c2263726f73734f726967696e223a747275652c22657874726144617461223a22636c69656e74446174614a534f4e206d617920626520657874656e6465642077697468206164646974696f6e616c206669656c647320696e20746865206675747572652c207375636820617320746869733a2039327063545644304162792d713464746d6a36656667227d",
            "3046022100eb12fcf23b12764c0f122e22371fab92e283879fd798f38ee1841c951b6e40e7022100c76237ff9db77b3c56f30837cda6a09acfa2e915544e609c0733b1184036d1cf",
        );
        let top_origin = (
            "a5010203262001215820a1c47c1d82da4ebe82cd72207102b380670701993bc35398ae2e5726427fe01d22582086c1080d82987028c7f54ecb1b01185de243b359294a0ed210cd47480f0adc88",
            "d54a5c8ca4b62a8e3bb321e3b2bc73856f85a10150db2939ac195739eb1ea066",
            "bfabc37432958b063360d3ad6461c9c4735ae7f8edd46592a5e0f01452b2e4b50500000000",
            "7b2274797065223a22776562617574686e2e676574222c226368616c6c656e6765223a22315570636a4b53324b6f34377379486a7372787a68572d466f51465132796b3572426c584f6573656f4759222c226f726967696e223a2268747470733a2f2f6578616d706c652e6f7267222c2263726f73734f726967696e223a747275652c22746f704f726967696e223a2268747470733a2f2f6578616d706c652e636f6d222c22657874726144617461223a22636c69656e74446174614a534f4e206d617920626520657874656e6465642077697468206164646974696f6e616c206669656c647320696e20746865206675747572652c207375636820617320746869733a205569466f4a4d56525148444146574669347678557051227d",
            "3045022100b5a70c81780d5fcc9a4f2ae9caae99058f8accaf58b91fb59329646c28ac6ffc022012e101c165db3c8e9957f0c54dd6ca9b56bc3bd2f280bd2faa6c1d02c6e5c171",
        );
        for (name, vector, backup_eligible, expected) in [
            ("16.2, made without verifying the user", none_es256, true, AssertionRefused::NotVerified),
            ("16.4, made in a frame", cross_origin, false, AssertionRefused::CrossOrigin),
            ("16.5, made in a frame", top_origin, false, AssertionRefused::CrossOrigin),
        ] {
            let (key, challenge, data, client_data, signature) = vector;
            let bytes = [key, challenge, data, client_data, signature].map(|hex| hex::decode(hex).unwrap());
            let [key, challenge, authenticator_data, client_data_json, signature] = &bytes;
            let key = PublicKey::parse(key).unwrap();
            let assertion =
                PresentedAssertion { credential_id: b"id", authenticator_data, client_data_json, signature };
            assert!(signature_fits(&assertion, &key), "{name}");
            let credential = Credential { id: b"id", key: &key, backup_eligible, sign_count: Some(0) };
            let challenge = URL_SAFE_NO_PAD.encode(challenge);
            assert_eq!(
                verify_over(&assertion, &credential, &example("example.org"), &challenge),
                Err(expected),
                "{name}"
            );
            let altered = [&authenticator_data[..36], &[1]].concat();
            assert!(!signature_fits(&PresentedAssertion { authenticator_data: &altered, ..assertion }, &key), "{name}");
        }
    }

    /// An authenticator that does what it is told.
    pub struct Soft {
        pair: EcdsaKeyPair,
        pub key: PublicKey,
    }

    impl Soft {
        pub fn new() -> Self {
            let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
            let point = pair.public_key().as_ref();
            let head = hex::decode("a5010203262001215820").unwrap();
            let cose = [&head, &point[1..33], &[0x22, 0x58, 0x20], &point[33..]].concat();
            Self { pair, key: PublicKey::parse(&cose).unwrap() }
        }

        /// Authenticator data, client data and signature of an answer as it should be.
        pub fn assertion(&self, relying_party: &RelyingParty, challenge: &Challenge) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
            let (data, origin) =
                (data(&relying_party.id, USER_PRESENT | USER_VERIFIED, 0, b""), &relying_party.origins[0]);
            let challenge = challenge.encode();
            let client = format!(
                r#"{{"type":"webauthn.get","challenge":"{challenge}","origin":"{origin}","crossOrigin":false}}"#
            );
            let signature = self.answer(&data, &client);
            (data, client.into_bytes(), signature)
        }

        fn answer(&self, data: &[u8], client_data: &str) -> Vec<u8> {
            let message = [data, &Digest::of(client_data.as_bytes()).0].concat();
            self.pair.sign(&SystemRandom::new(), &message).unwrap().as_ref().to_vec()
        }
    }

    fn data(id: &str, flags: u8, count: u32, rest: &[u8]) -> Vec<u8> {
        [&Digest::of(id.as_bytes()).0[..], &[flags], &count.to_be_bytes(), rest].concat()
    }

    /// PROVES (verified-assertion)
    #[test]
    fn an_answer_that_departs_in_anything_from_what_was_asked_proves_nothing() {
        let soft = Soft::new();
        let challenge = "Y2hhbGxlbmdl";
        let good = format!(
            r#"{{"type":"webauthn.get","challenge":"{challenge}","origin":"https://mesh.example","crossOrigin":false}}"#
        );
        let client = |from: &str, to: &str| {
            let changed = good.replacen(from, to, 1);
            assert_ne!(changed, good, "{from}");
            changed
        };
        let (upuv, id) = (USER_PRESENT | USER_VERIFIED, "mesh.example");
        let plain = data(id, upuv, 8, b"");
        let refused = |data: Vec<u8>, client: String, why| (data, client, Err(why));
        let told = |data: Vec<u8>, client: String| (data, client, Ok(()));
        for (case, (data, client, expected)) in [
            ("as asked", told(plain.clone(), good.clone())),
            ("an extension nobody asked for", told(data(id, upuv | EXTENSIONS, 8, b"\xa1\x61a\xf5"), good.clone())),
            ("a member nobody knows", told(plain.clone(), client("false", "false,\"more\":{}"))),
            ("no word of frames", told(plain.clone(), client(",\"crossOrigin\":false", ""))),
            (
                "a registration",
                refused(
                    plain.clone(),
                    client("webauthn.get", "webauthn.create"),
                    AssertionRefused::Type("webauthn.create".into()),
                ),
            ),
            (
                "a payment",
                refused(
                    plain.clone(),
                    client("webauthn.get", "payment.get"),
                    AssertionRefused::Type("payment.get".into()),
                ),
            ),
            ("another challenge", refused(plain.clone(), client("Y2hh", "Z2hh"), AssertionRefused::Challenge)),
            ("a padded challenge", refused(plain.clone(), client("bmdl", "bmdl="), AssertionRefused::Challenge)),
            (
                "another origin",
                refused(
                    plain.clone(),
                    client("mesh.example", "mesh.example.evil"),
                    AssertionRefused::Origin("https://mesh.example.evil".into()),
                ),
            ),
            (
                "another port",
                refused(
                    plain.clone(),
                    client("mesh.example", "mesh.example:444"),
                    AssertionRefused::Origin("https://mesh.example:444".into()),
                ),
            ),
            (
                "without TLS",
                refused(plain.clone(), client("https", "http"), AssertionRefused::Origin("http://mesh.example".into())),
            ),
            (
                "a slash",
                refused(
                    plain.clone(),
                    client("mesh.example", "mesh.example/"),
                    AssertionRefused::Origin("https://mesh.example/".into()),
                ),
            ),
            ("in a frame", refused(plain.clone(), client("false", "true"), AssertionRefused::CrossOrigin)),
            (
                "below another page",
                refused(
                    plain.clone(),
                    client("false", "false,\"topOrigin\":\"https://x\""),
                    AssertionRefused::CrossOrigin,
                ),
            ),
            (
                "for another relying party",
                refused(data("evil.example", upuv, 8, b""), good.clone(), AssertionRefused::RelyingParty),
            ),
            ("untouched", refused(data(id, USER_VERIFIED, 8, b""), good.clone(), AssertionRefused::NotPresent)),
            ("touched by anyone", refused(data(id, USER_PRESENT, 8, b""), good.clone(), AssertionRefused::NotVerified)),
            (
                "backed up all of a sudden",
                refused(data(id, upuv | BACKUP_ELIGIBLE, 8, b""), good.clone(), AssertionRefused::Backup),
            ),
            (
                "backed up without being able to",
                refused(data(id, upuv | BACKED_UP, 8, b""), good.clone(), AssertionRefused::Backup),
            ),
            (
                "the same count",
                refused(data(id, upuv, 7, b""), good.clone(), AssertionRefused::Cloned { held: 7, found: 7 }),
            ),
            (
                "a lower count",
                refused(data(id, upuv, 6, b""), good.clone(), AssertionRefused::Cloned { held: 7, found: 6 }),
            ),
            (
                "no count any more",
                refused(data(id, upuv, 0, b""), good.clone(), AssertionRefused::Cloned { held: 7, found: 0 }),
            ),
            ("too short", refused(plain[..36].to_vec(), good.clone(), AssertionRefused::AuthenticatorData)),
            (
                "something behind",
                refused(data(id, upuv, 8, b"\xa0"), good.clone(), AssertionRefused::AuthenticatorData),
            ),
            (
                "extensions announced and absent",
                refused(data(id, upuv | EXTENSIONS, 8, b""), good.clone(), AssertionRefused::AuthenticatorData),
            ),
            (
                "a credential within",
                refused(
                    data(id, upuv | ATTESTED_CREDENTIAL, 8, b""),
                    good.clone(),
                    AssertionRefused::AuthenticatorData,
                ),
            ),
            (
                "too long",
                refused(
                    data(id, upuv | EXTENSIONS, 8, &[0xa0; 1024]),
                    good.clone(),
                    AssertionRefused::TooLong("authenticator data"),
                ),
            ),
            (
                "client data too long",
                refused(
                    plain.clone(),
                    good.clone() + &" ".repeat(CLIENT_DATA_BYTES_MAX),
                    AssertionRefused::TooLong("client data"),
                ),
            ),
        ] {
            let signature = soft.answer(&data, &client);
            let assertion = PresentedAssertion {
                credential_id: b"id",
                authenticator_data: &data,
                client_data_json: client.as_bytes(),
                signature: &signature,
            };
            let credential = Credential { id: b"id", key: &soft.key, backup_eligible: false, sign_count: Some(7) };
            let found = verify_over(&assertion, &credential, &example(id), challenge);
            assert_eq!(found.map(|_| ()), expected, "{case}");
            let stranger = PresentedAssertion { credential_id: b"other", ..assertion };
            assert!(verify_over(&stranger, &credential, &example(id), challenge).is_err(), "{case}");
            let key = Soft::new().key;
            assert!(
                verify_over(&assertion, &Credential { key: &key, ..credential }, &example(id), challenge).is_err(),
                "{case}"
            );
        }
        for (client, why) in [
            ("", "EOF while parsing a value at line 1 column 0"),
            ("\u{feff}{}", "expected value at line 1 column 1"),
            (r#"{"type":"webauthn.get","type":"webauthn.get"}"#, "duplicate field `type` at line 1 column 29"),
            (r#"{"type":"webauthn.get","challenge":"a"}"#, "missing field `origin` at line 1 column 39"),
        ] {
            let signature = soft.answer(&plain, client);
            let assertion = PresentedAssertion {
                credential_id: b"id",
                authenticator_data: &plain,
                client_data_json: client.as_bytes(),
                signature: &signature,
            };
            let credential = Credential { id: b"id", key: &soft.key, backup_eligible: false, sign_count: None };
            let found = verify_over(&assertion, &credential, &example(id), challenge);
            assert_eq!(found, Err(AssertionRefused::ClientData(why.into())), "{client}");
        }
    }

    #[test]
    fn a_key_that_is_not_strong_sound_and_canonical_is_refused() {
        let es256 = "a5010203262001215820afefa16f97ca9b2d23eb86ccb64098d20db90856062eb249c33a9b672f26df61225820930a56b87a2fca66334b03458abf879717c12cc68ed73290af2e2664796b9220";
        let with = |from: &str, to: &str| es256.replacen(from, to, 1);
        let ed25519 = |x: &str| format!("a4010103272006215820{x}");
        let x = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"; // RFC 8032, 7.1, TEST 1
        let rsa = |modulus: &str, exponent: &str| format!("a401030339010020{modulus}21{exponent}");
        let modulus =
            |first: &str, bytes: usize, last: &str| format!("59{bytes:04x}{first}{}{last}", "5a".repeat(bytes - 2));
        let e = "43010001";
        assert_eq!(PublicKey::parse(&hex::decode(es256).unwrap()).unwrap().algorithm(), "ES256");
        assert_eq!(PublicKey::parse(&hex::decode(ed25519(x)).unwrap()).unwrap().algorithm(), "EdDSA");
        assert_eq!(
            PublicKey::parse(&hex::decode(rsa(&modulus("80", 256, "01"), e)).unwrap()).unwrap().algorithm(),
            "RS256"
        );
        for (case, given, expected) in [
            ("nothing", String::new(), KeyRefused::Malformed),
            ("an empty map", "a0".into(), KeyRefused::Malformed),
            ("cut off", es256[..es256.len() - 2].into(), KeyRefused::Malformed),
            ("something behind", format!("{es256}00"), KeyRefused::Malformed),
            ("members in another order", with("a5010203262001", "a5032601022001"), KeyRefused::Malformed),
            ("a member twice", "a2010201020000".into(), KeyRefused::Malformed),
            ("a longer form of a number", with("a50102", "a5011802"), KeyRefused::Malformed),
            ("an indefinite map", with("a5", "bf"), KeyRefused::Malformed),
            ("a text", "a1016161".into(), KeyRefused::Malformed),
            ("no algorithm", "a10102".into(), KeyRefused::Algorithm),
            ("ES384", with("0326", "033822"), KeyRefused::Algorithm),
            ("ES256 on another curve", with("2001", "2002"), KeyRefused::Members),
            ("ES256 of another key type", with("a50102", "a50101"), KeyRefused::Members),
            ("EdDSA with a point of P-256", with("0326", "0327"), KeyRefused::Members),
            ("not on the curve", with("9220", "9221"), KeyRefused::Point),
            ("not on the curve at all", with("afef", "0000"), KeyRefused::Point),
            ("a member more", ed25519(x).replacen("a4", "a5", 1) + "2300", KeyRefused::Members),
            ("Ed25519 too short", "a401010327200621581f".to_owned() + &x[2..], KeyRefused::Members),
            ("1024 bits", rsa(&modulus("80", 128, "01").replacen("590080", "5880", 1), e), KeyRefused::Rsa),
            ("2047 bits", rsa(&modulus("7f", 256, "01"), e), KeyRefused::Rsa),
            ("an even modulus", rsa(&modulus("80", 256, "02"), e), KeyRefused::Rsa),
            ("8192 bits", rsa(&modulus("80", 1000, "01"), e), KeyRefused::Rsa),
            ("exponent 3", rsa(&modulus("80", 256, "01"), "4103"), KeyRefused::Rsa),
        ] {
            let given = hex::decode(given).unwrap();
            assert_eq!(PublicKey::parse(&given), Err(expected), "{case}");
        }
    }

    proptest! {
        #[test]
        fn whatever_bytes_come_nothing_panics_and_nothing_is_proven(
            parts in prop::collection::vec(any::<Vec<u8>>(), 3), text in "\\{\"type\":\"webauthn.get\",[ -~]{0,60}\\}", flags: u8, rest: Vec<u8>,
        ) {
            let soft = Soft::new();
            let near = data("mesh.example", flags, 0, &rest);
            for (authenticator_data, client) in [(&parts[0], &parts[1][..]), (&near, text.as_bytes())] {
                let assertion = PresentedAssertion { credential_id: b"id", authenticator_data, client_data_json: client, signature: &parts[2] };
                let credential = Credential { id: b"id", key: &soft.key, backup_eligible: false, sign_count: None };
                prop_assert!(verify_over(&assertion, &credential, &example("mesh.example"), "").is_err());
            }
        }

        #[test]
        fn a_key_of_any_bytes_is_parsed_or_refused(bytes: Vec<u8>, at in 0..77usize, byte: u8) {
            let _ = PublicKey::parse(&bytes);
            let mut near = Soft::new().key.cose().to_vec();
            near[at] = byte;
            if let Ok(key) = PublicKey::parse(&near) {
                prop_assert_eq!(key.cose(), &near);
            }
        }
    }
}
