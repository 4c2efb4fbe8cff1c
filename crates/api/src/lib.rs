//! Every message that crosses a process boundary, and the typed clients. No rules: what a message means is decided by
//! the law (`countersign-core`) and by whoever receives it.
//!
//! | room | between |
//! |---|---|
//! | [`mesh`] | agents and the control plane: gRPC over mutual TLS |
//! | [`sidecar`] | an agent and a proxy that it started: frames on an inherited socket pair |
//! | [`broker`] | a proxy and the broker of its workload's network namespace: sockets over a packet pair |
//! | [`local`] | commands and the control plane on one machine: JSON over a unix socket |
//! | [`device`] | a command and the dashboard of a mesh on another machine: how an operator signs it in |
//! | [`dpop`] | the same, for every request: proof that the command still holds its key |
//! | [`https`] | somebody outside the mesh, one question at a time: HTTPS |
//! | [`run_file`] | `run.json`: where everything of a running mesh listens |
//! | [`workload`] | workloads and the agent of their host: the SPIFFE Workload API |
//! | [`sds`] | Envoys and the agent of their host: Envoy's Secret Discovery Service |
//! | [`signals`] | signals, among the messages of the above |
//! | [`svid`] | SVIDs as TLS identities: parse, verify a peer, hot-swap |

pub mod broker;
pub mod device;
pub mod dpop;
pub mod https;
pub mod local;
pub mod mesh;
pub mod run_file;
pub mod sds;
pub mod sidecar;
pub mod signals;
pub mod svid;
pub mod workload;
