//! Questions of a workload to its namespace's DNS.
#![no_main]

use countersign_proxy::arbitrary_bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| arbitrary_bytes::dns(bytes));
