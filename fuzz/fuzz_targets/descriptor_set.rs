//! Descriptor sets of contracts: a contract that is read has one form, and finds each of its operations.
#![no_main]

use countersign_core::contract::{Contract, Matcher, read_descriptor_set};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match read_descriptor_set(bytes) {
        Ok(contract) => {
            assert_eq!(Contract::of_body(&contract.to_body()).as_ref(), Ok(&contract));
            let matcher = Matcher::new(&contract);
            for (at, operation) in contract.operations().iter().enumerate() {
                assert_eq!(matcher.find(&operation.method, &operation.path), Some(at));
            }
        }
        Err(mistakes) => assert!(!mistakes.is_empty()),
    }
});
