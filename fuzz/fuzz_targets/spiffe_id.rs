//! Names from certificates and files: a parsed name is its own normal form.
#![no_main]

use countersign_core::identity::{InstanceId, ServiceName, SpiffeId, TrustDomain};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(SpiffeId::parse(id.as_str()).as_ref(), Ok(&id));
        if let Some(service) = id.service() {
            assert_eq!(TrustDomain::parse(id.trust_domain()).unwrap().workload(&service), id);
        }
    }
    let _ = (TrustDomain::parse(text), ServiceName::parse(text));
    if let Ok(instance) = InstanceId::parse(text) {
        assert!(text.starts_with(instance.service().as_str()));
    }
});
