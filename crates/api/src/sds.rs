//! Envoy's Secret Discovery Service: gRPC over a unix socket, without TLS. Generated from `proto/envoy/sds.proto`, which names messages and
//! fields as Envoy does.

#![allow(
    missing_docs,
    unused_qualifications,
    clippy::all,
    reason = "generated; the .proto file carries the documentation"
)]
tonic::include_proto!("envoy.service.secret.v3");

/// The type of a [`Secret`] in requests and answers.
pub const SECRET_TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// The type of a [`SpiffeCertValidatorConfig`] in a validation context.
pub const SPIFFE_VALIDATOR_TYPE: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";
/// The validator of Envoy that verifies a peer's certificate by the bundle of the trust domain that it names.
pub const SPIFFE_VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
