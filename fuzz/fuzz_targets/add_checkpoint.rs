//! Requests to a witness: what parses has exactly these bytes, and judging it never panics.
#![no_main]

use countersign_core::ledger::{AddCheckpoint, Checkpoint, Frontier, VerifierKey, WitnessedLog};
use libfuzzer_sys::fuzz_target;

const KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";

fuzz_target!(|bytes: &[u8]| {
    let Ok(request) = AddCheckpoint::parse(bytes) else { return };
    assert_eq!(request.encode().as_bytes(), bytes);
    let Ok(origin) = request.origin() else { return };
    let held = Checkpoint::new(&origin, 0, Frontier::default().root()).expect("it came from a checkpoint");
    let keys = vec![VerifierKey::parse(KEY).expect("it is a key")];
    assert!(request.judge(Some(&WitnessedLog { keys, held })).is_err());
});
