//! Signed notes and checkpoints from anyone: what parses has exactly these bytes, and a stranger's signature counts for nothing.
#![no_main]

use countersign_core::ledger::{Checkpoint, Note, Signature, VerifierKey};
use libfuzzer_sys::fuzz_target;

const KEY: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Some(signature) = Signature::parse(text) {
            assert_eq!(signature.to_string(), text);
        }
        if let Ok(key) = VerifierKey::parse(text) {
            assert_eq!(key.to_string(), text);
        }
        if let Ok(checkpoint) = Checkpoint::parse(text) {
            assert_eq!(checkpoint.encode(), text);
        }
    }
    let Ok(note) = Note::parse(bytes) else { return };
    assert_eq!(note.encode().as_bytes(), bytes);
    let key = VerifierKey::parse(KEY).expect("it is a key");
    let _ = (note.verify([&key]).is_ok(), Checkpoint::parse(note.text()).is_ok());
});
