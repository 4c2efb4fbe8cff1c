//! Proofs of entries from files: what parses has exactly these bytes, and nothing is proven to one who trusts another log.
#![no_main]

use countersign_core::ledger::{EntryProof, Trust, VerifierKey};
use libfuzzer_sys::fuzz_target;

const KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";

fuzz_target!(|bytes: &[u8]| {
    let Ok(proof) = EntryProof::parse(bytes) else { return };
    assert_eq!(proof.encode().as_bytes(), bytes);
    let trust = Trust::log(VerifierKey::parse(KEY).expect("it is a key"));
    assert!(proof.verify(b"entry", &trust).is_err());
});
