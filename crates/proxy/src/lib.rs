//! The enforcement point: one sidecar in front of one workload. Every request is judged before it is forwarded and again,
//! while it lives, whenever the view changes.
//!
//! Holds no key that issues anything, keeps no state that outlives the process but the record, and never forwards what
//! it could not judge.
//!
//! Threads: each worker is one single-threaded runtime with its own listeners (duplicated descriptors), pools, live table
//! and counters; an exchange never leaves its worker, so the path takes no lock.
//!
//! | room | holds |
//! |---|---|
//! | `sidecar` | the process: what it gives up, where its log goes |
//! | [`link`] | the conversation with the agent |
//! | [`shared`] | what the agent told this proxy; orders to the workers |
//! | [`view`] | a view made ready for the path |
//! | [`workers`] | the threads
//! | `route` | which way a request takes, and the limits of the way |
//! | [`record`] | decision records: queued, kept, reported, read back |
//! | [`decided`] | one decision as the data path hands it to the record |
//! | [`admin`] | metrics and pages for operators |
//! | [`counts`] | what a worker counts |
//! | [`listen`] | sockets, of this host's network or of the workload's namespace |
//! | [`dns`] | `*.mesh` inside that namespace |

pub mod admin;
pub mod counts;
pub mod decided;
pub mod dns;
pub mod listen;
pub mod record;
pub mod link;
mod route;
pub mod shared;
mod sidecar;
pub mod view;
pub mod workers;

pub use sidecar::sidecar_main;
pub use shared::{App, Door, Endpoint, Setup, Shared};
