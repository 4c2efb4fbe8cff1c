//! Agents and the control plane: gRPC over mutual TLS. Generated from `proto/countersign/v1/mesh.proto`.

#![allow(
    missing_docs,
    unused_qualifications,
    clippy::all,
    reason = "generated; the .proto files carry the documentation"
)]
tonic::include_proto!("countersign.v1");
