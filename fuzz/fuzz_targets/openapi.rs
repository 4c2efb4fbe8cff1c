//! OpenAPI documents of contracts: a contract that is read has one form, and finds only operations of its own; a mistake lies
//! within the document.
#![no_main]

use countersign_core::contract::{Contract, Matcher, Syntax, read_openapi};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for syntax in [Syntax::Yaml, Syntax::Json] {
        match read_openapi(text, syntax) {
            Ok(contract) => {
                assert_eq!(Contract::of_body(&contract.to_body()).as_ref(), Ok(&contract));
                let matcher = Matcher::new(&contract);
                for operation in contract.operations().iter().filter(|operation| !operation.path.contains('{')) {
                    assert!(matcher.find(&operation.method, &operation.path).is_some(), "{operation:?}");
                }
                let _ = matcher.find("GET", text);
            }
            Err(mistakes) => {
                assert!(!mistakes.is_empty());
                for mistake in mistakes {
                    assert!(text.get(mistake.span.clone()).is_some(), "{mistake:?}");
                }
            }
        }
    }
});
