//! The SPIFFE Workload API: gRPC over a unix socket, without TLS. Generated from `proto/spiffe/workload.proto`, which names messages and
//! fields as the standard does.

#![allow(
    missing_docs,
    unused_qualifications,
    clippy::all,
    reason = "generated; the .proto file carries the documentation"
)]
tonic::include_proto!("_");

/// The metadata that every request must carry, with the value `true` (SPIFFE Workload Endpoint, 3).
pub const SECURITY_HEADER: &str = "workload.spiffe.io";
/// The environment variable in which software looks for the address of the Workload API (SPIFFE Workload Endpoint, 4).
pub const ENDPOINT_VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";
