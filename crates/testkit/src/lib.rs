//! What the tests of several crates share. Nothing outside of tests depends on it, and it knows neither proxy nor agent nor
//! control: they are what is tested.
//!
//! | room | holds |
//! |---|---|
//! | [`authority`] | a root, an intermediate, and SVIDs with any defect |
//! | [`authenticator`] | an authenticator app, as on the phone of an operator |
//! | [`security_key`] | a WebAuthn authenticator that does what it is told |
//! | [`maker`] | who vouches for security keys of one model |
//! | [`postgres`] | a PostgreSQL server of its own, to be killed and started again |
//! | [`partition`] | a way to it that can be cut |
//! | [`agent`] | an agent that does what the test says, for a sidecar on the other end |
//!
//! A whole mesh in one process, on a clock of its own, stands in `tests/simulation`: it is made of what is tested.

pub mod agent;
pub mod authenticator;
pub mod authority;
pub mod maker;
pub mod partition;
pub mod postgres;
pub mod security_key;
