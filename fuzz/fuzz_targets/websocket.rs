//! WebSocket frames: their ends do not hang on packets.
#![no_main]

use countersign_proxy::arbitrary_bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| arbitrary_bytes::frames(input.1, usize::from(input.0)));
