//! Ledger entries from the wire or the disk: what parses has exactly these bytes.
#![no_main]

use countersign_core::ledger::Entry;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(entry) = Entry::parse(bytes) {
        assert_eq!(entry.encode(), bytes);
    }
});
