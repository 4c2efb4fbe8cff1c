//! On each host: attests, folds the ledger, keeps identities fresh, starts and isolates workloads and their proxies.

pub mod harden;
pub mod isolate;
pub mod launch;
