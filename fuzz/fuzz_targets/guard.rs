//! HTTP/1.1 requests as a workload sends them: two parsers, one reading.
#![no_main]

use countersign_proxy::arbitrary_bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| arbitrary_bytes::guard(input.1, usize::from(input.0)));
