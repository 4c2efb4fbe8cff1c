//! Countersignatures and public keys from the wire: nothing panics, and nobody's signature counts for nothing.
#![no_main]

use countersign_core::{
    assurance::webauthn::{Credential, PresentedAssertion, PublicKey, RelyingParty, verify},
    assurance::challenge::{Challenge, Purpose},
    canonical::Digest,
    change::Revision,
    countersignature::Countersignature,
};
use libfuzzer_sys::fuzz_target;

/// The public key of RFC 8032, 7.1, TEST 1; nobody here holds the private one.
const KEY: [u8; 42] = [
    0xa4, 0x01, 0x01, 0x03, 0x27, 0x20, 0x06, 0x21, 0x58, 0x20, 0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe,
    0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
];

fuzz_target!(|bytes: &[u8]| {
    if let Ok(key) = PublicKey::parse(bytes) {
        assert_eq!(key.cose(), bytes);
    }
    let zero = Digest::default();
    let (anchor, root, change_set, nonce) = (zero, zero, zero, zero);
    let challenge = Challenge { anchor, purpose: Purpose::StepUp, base: Revision(0), root, change_set, nonce };
    let key = PublicKey::parse(&KEY).expect("it is a key");
    let credential = Credential { id: b"id", key: &key, backup_eligible: false, sign_count: None };
    let relying_party = RelyingParty { id: "mesh.example".into(), origins: vec!["https://mesh.example".into()] };
    let refused = |data: &[u8], client_data_json: &[u8], signature: &[u8]| {
        let assertion = PresentedAssertion { credential_id: b"id", authenticator_data: data, client_data_json, signature };
        assert!(verify(&assertion, &credential, &relying_party, &challenge).is_err());
    };
    if let Ok(given) = serde_json::from_slice::<Countersignature>(bytes) {
        refused(&given.authenticator_data.0, &given.client_data_json.0, &given.signature.0);
    }
    let (data, rest) = bytes.split_at(bytes.len().min(37));
    let (client_data, signature) = rest.split_at(rest.len().saturating_sub(64));
    refused(data, client_data, signature);
});
