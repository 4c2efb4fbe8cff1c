//! Paths, bundles and tiles of a ledger that someone else serves.
#![no_main]

use countersign_core::ledger::{Resource, TileReader, encode_bundle, parse_bundle};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(resource) = std::str::from_utf8(bytes).ok().and_then(Resource::parse) {
        assert_eq!(resource.to_string().as_bytes(), bytes);
    }
    let Some((head, bundle)) = bytes.split_first_chunk::<8>() else { return };
    if let Ok(entries) = parse_bundle(bundle, u16::from(head[0])) {
        assert_eq!(encode_bundle(&entries).expect("they came from one"), bundle);
    }
    let size = u64::from_be_bytes(*head);
    let mut reader = TileReader::new(size, |_| Ok::<_, ()>(bundle.to_vec()));
    let _ = (reader.root().is_ok(), reader.inclusion(size / 2).is_ok(), reader.consistency(size / 3).is_ok());
});
