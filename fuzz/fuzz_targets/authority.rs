//! Hosts from requests: a parsed host is its own normal form.
#![no_main]

use countersign_core::path::Authority;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(authority) = Authority::parse(text) else { return };
    let normal = authority.to_string();
    assert_eq!(Authority::parse(&normal), Ok(authority));
    assert!(!normal.bytes().any(|b| b.is_ascii_uppercase() || b == b'@' || b.is_ascii_whitespace()));
});
