//! A WebAuthn authenticator and the browser before it, in one: it registers and signs as it is told, also what an honest one
//! never would. Written from the standard (Web Authentication Level 3, 5 and 6) and not from the code that it tests.

use aws_lc_rs::{
    digest,
    rand::{self, SystemRandom},
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use countersign_core::{
    assurance::{
        authenticators::Aaguid,
        challenge::Challenge,
        webauthn::{PublicKey, RelyingParty},
    },
    countersignature::{Bytes, Countersignature},
    identity::{FactorId, OperatorName},
    operator::{EnrolledFactor, SigningKey},
};
use serde_json::{Value, json};

use crate::maker::{Vouching, packed};

const USER_PRESENT: u8 = 1;
const USER_VERIFIED: u8 = 1 << 2;
const BACKUP_ELIGIBLE: u8 = 1 << 3;
const BACKED_UP: u8 = 1 << 4;
const ATTESTED_CREDENTIAL: u8 = 1 << 6;

/// One credential, on an authenticator that holds no other.
pub struct SecurityKey {
    /// The id of the credential.
    pub id: Vec<u8>,
    /// Its count of signatures: every signature shows one more. `None`: it keeps none, and shows 0.
    pub count: Option<u32>,
    /// Whether it says that it made sure who holds it.
    pub verifies_user: bool,
    /// Whether its key may be backed up, and is.
    pub backed_up: bool,
    /// The model that it says it is; `None`: it does not tell.
    pub model: Option<Aaguid>,
    /// What it shows for what it says of a new key.
    pub attestation: Attestation,
    pair: EcdsaKeyPair,
}

/// What an authenticator shows for what it says of a new key (6.5).
pub enum Attestation {
    /// Nothing.
    None,
    /// What the new key itself signed.
    Own,
    /// What a key of its maker signed.
    Maker(Vouching),
}

/// What it answers to a challenge.
#[derive(Debug, Clone)]
pub struct Assertion {
    /// What the authenticator says.
    pub authenticator_data: Vec<u8>,
    /// What the browser says.
    pub client_data_json: Vec<u8>,
    /// Over both.
    pub signature: Vec<u8>,
}

impl Default for SecurityKey {
    fn default() -> Self {
        Self::new()
    }
}

impl SecurityKey {
    /// A new one, with a key of its own (ES256), which counts.
    pub fn new() -> Self {
        let mut id = vec![0; 32];
        rand::fill(&mut id).expect("random bytes");
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
        Self {
            id,
            count: Some(0),
            verifies_user: true,
            backed_up: false,
            model: None,
            attestation: Attestation::None,
            pair,
        }
    }

    /// A new one that says it is of `model`, and shows this for it.
    pub fn of(model: Aaguid, attestation: Attestation) -> Self {
        let mut key = Self::new();
        (key.model, key.attestation) = (Some(model), attestation);
        key
    }

    /// Its public key, in COSE.
    pub fn cose(&self) -> Vec<u8> {
        let point = self.pair.public_key().as_ref();
        let head = [0xa5, 0x01, 0x02, 0x03, 0x26, 0x20, 0x01, 0x21, 0x58, 0x20];
        [&head, &point[1..33], &[0x22, 0x58, 0x20], &point[33..]].concat()
    }

    /// The id of the factor that it is.
    pub fn factor_id(&self) -> FactorId {
        FactorId::of_credential(&self.id).expect("a short id")
    }

    /// The factor that it is once it is enrolled at `relying_party`.
    pub fn enrolled(&self, relying_party: &RelyingParty) -> EnrolledFactor {
        let key = PublicKey::parse(&self.cose()).expect("a COSE key");
        let relying_party = relying_party.clone();
        EnrolledFactor::Roaming(SigningKey { key, backup_eligible: self.backed_up, relying_party, model: None })
    }

    /// Answers `navigator.credentials.create` on a page at `origin`: the JSON form of a registration.
    /// `options` is the JSON form of the creation options, with or without `publicKey` around it.
    pub fn register(&mut self, options: &Value, origin: &str) -> Value {
        let options = options.get("publicKey").unwrap_or(options);
        let challenge = options["challenge"].as_str().expect("a challenge");
        let rp_id = options["rp"]["id"].as_str().expect("a relying party");
        let client_data = client_data("webauthn.create", challenge, origin);
        let length = (self.id.len() as u16).to_be_bytes();
        let model = self.model.map_or([0; 16], |model| model.bytes());
        let credential = [&model[..], &length, &self.id, &self.cose()].concat();
        let data = self.data(rp_id, ATTESTED_CREDENTIAL, &credential);
        let message = [&data, digest::digest(&digest::SHA256, &client_data).as_ref()].concat();
        let (format, statement) = match &self.attestation {
            Attestation::None => (&b"\x64none"[..], vec![0xa0]),
            Attestation::Own => {
                let signature = self.pair.sign(&SystemRandom::new(), &message).expect("a signature");
                (&b"\x66packed"[..], packed(signature.as_ref(), &[]))
            }
            Attestation::Maker(vouching) => (&b"\x66packed"[..], vouching.statement(&message)),
        };
        let length = (data.len() as u16).to_be_bytes();
        let attestation =
            [b"\xa3\x63fmt", format, b"\x67attStmt", &statement, b"\x68authData\x59", &length, &data].concat();
        let id = BASE64URL.encode(&self.id);
        json!({
            "id": id,
            "rawId": id,
            "type": "public-key",
            "response": {
                "clientDataJSON": BASE64URL.encode(client_data),
                "attestationObject": BASE64URL.encode(attestation),
                "transports": ["usb"],
            },
            "clientExtensionResults": {},
        })
    }

    /// Answers `navigator.credentials.get` on a page at `origin`. `challenge` is base64url, as the browser writes it.
    pub fn sign(&mut self, rp_id: &str, origin: &str, challenge: &str) -> Assertion {
        self.count = self.count.map(|count| count + 1);
        let authenticator_data = self.data(rp_id, 0, b"");
        let client_data_json = client_data("webauthn.get", challenge, origin);
        let message = [&authenticator_data, digest::digest(&digest::SHA256, &client_data_json).as_ref()].concat();
        let signature = self.pair.sign(&SystemRandom::new(), &message).expect("a signature").as_ref().to_vec();
        Assertion { authenticator_data, client_data_json, signature }
    }

    /// The same, for the JSON form of the request options: the JSON form of the answer, with `user_handle` in it.
    pub fn answer(&mut self, options: &Value, origin: &str, user_handle: Option<&[u8]>) -> Value {
        let options = options.get("publicKey").unwrap_or(options);
        let challenge = options["challenge"].as_str().expect("a challenge");
        let rp_id = options["rpId"].as_str().expect("a relying party");
        let Assertion { authenticator_data, client_data_json, signature } = self.sign(rp_id, origin, challenge);
        let id = BASE64URL.encode(&self.id);
        json!({
            "id": id,
            "rawId": id,
            "type": "public-key",
            "response": {
                "authenticatorData": BASE64URL.encode(authenticator_data),
                "clientDataJSON": BASE64URL.encode(client_data_json),
                "signature": BASE64URL.encode(signature),
                "userHandle": user_handle.map(|handle| BASE64URL.encode(handle)),
            },
            "clientExtensionResults": {},
        })
    }

    /// Signs a change for `operator`, on a page at the first origin of `relying_party`.
    pub fn countersign(
        &mut self,
        operator: &OperatorName,
        relying_party: &RelyingParty,
        challenge: &Challenge,
    ) -> Countersignature {
        let Assertion { authenticator_data, client_data_json, signature } =
            self.sign(&relying_party.id, &relying_party.origins[0], &challenge.encode());
        let Challenge { purpose, base, root, nonce, .. } = *challenge;
        Countersignature {
            operator: operator.clone(),
            credential: self.factor_id(),
            purpose,
            base,
            root,
            nonce,
            authenticator_data: Bytes(authenticator_data),
            client_data_json: Bytes(client_data_json),
            signature: Bytes(signature),
        }
    }

    fn data(&self, rp_id: &str, more: u8, rest: &[u8]) -> Vec<u8> {
        let mut flags = USER_PRESENT | more;
        if self.verifies_user {
            flags |= USER_VERIFIED;
        }
        if self.backed_up {
            flags |= BACKUP_ELIGIBLE | BACKED_UP;
        }
        let count = self.count.unwrap_or(0).to_be_bytes();
        [digest::digest(&digest::SHA256, rp_id.as_bytes()).as_ref(), &[flags], &count, rest].concat()
    }
}

fn client_data(kind: &str, challenge: &str, origin: &str) -> Vec<u8> {
    format!(r#"{{"type":"{kind}","challenge":"{challenge}","origin":"{origin}","crossOrigin":false}}"#).into_bytes()
}
