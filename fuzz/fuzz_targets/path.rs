//! Paths from requests: INVARIANT one-path, whatever the bytes.
#![no_main]

use countersign_core::path::NormalPath;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(path) = NormalPath::parse(text) else { return };
    let normal = path.path_and_query().into_owned();
    let again = NormalPath::parse(&normal).expect("a normal path parses");
    assert_eq!(again, path);
    assert!(again.is_as_it_came());
    assert!(path.as_str().starts_with('/') && path.as_str().is_ascii());
    assert!(!path.as_str().split('/').any(|segment| segment == "." || segment == ".."));
    assert!(!path.as_str().contains("//") && !path.as_str().contains(['\\', ';', ' ']));
});
