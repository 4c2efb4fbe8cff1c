//! The request gate: Cedar policies, compiled per service, and the decision.
//!
//! Default deny, forbid wins, and a policy that cannot be evaluated denies. No policy is skipped.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use crate::{
    canonical::Digest,
    change::PolicyId,
    identity::{ServiceName, SpiffeId},
    record::{Outcome, Reason},
    service::{Protocol, ServiceSpec},
    view::View,
};

/// The question put to the law.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// The verified peer.
    pub principal: &'a SpiffeId,
    /// What it wants to do.
    pub action: Action<'a>,
    /// The service it asks for.
    pub service: &'a ServiceName,
    /// The normalized path (without query), with its leading slash; `/` for tcp. The resource is
    /// `Operation::"<service><path>" in Service::"<service>"`.
    pub path: &'a str,
    /// Everything else policies can read.
    pub context: Context<'a>,
}

/// `http:<METHOD>`, `grpc:call` or `tcp:connect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action<'a> {
    /// An HTTP request with this method.
    Http(&'a str),
    /// A gRPC call.
    GrpcCall,
    /// A TCP connection.
    TcpConnect,
}

/// `context` of a query.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The HTTP method; `CONNECT` for tcp.
    pub method: &'a str,
    /// `Host` or `:authority` without port, lower case.
    pub host: &'a str,
    /// What the service speaks.
    pub protocol: Protocol,
    /// Declared body length.
    pub size: Option<u64>,
    /// Where the peer's connection comes from.
    pub origin: IpAddr,
    /// Seconds since 1970.
    pub now: i64,
    /// Whether this edge is new to this proxy.
    pub first_contact: bool,
}

/// The answer, with what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Permit, step-up or deny.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// The policies that decided.
    pub policies: Arc<[PolicyId]>,
    /// Whether it came from memory.
    pub remembered: bool,
}

/// Parsed policy texts by digest, kept across revisions so that a change costs what changed.
#[derive(Default)]
pub struct Library {
    by_digest: HashMap<Digest, Arc<ParsedPolicy>>,
}

/// One policy text, parsed once.
pub struct ParsedPolicy {
    text: Arc<str>,
}

/// The policies of one view, compiled for deciding.
pub struct Law {}

/// Why a policy set cannot be compiled; names the policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy `{id}` ({file}): {what}")]
pub struct PolicyError {
    /// The policy.
    pub id: PolicyId,
    /// Where it stands.
    pub file: Arc<str>,
    /// What is wrong with it.
    pub what: String,
}

impl Library {
    /// Parses `text` unless its digest is known, and returns it.
    pub fn insert(&mut self, digest: Digest, text: &Arc<str>) -> Result<Arc<ParsedPolicy>, String> {
        let _ = (digest, text);
        todo!()
    }

    /// The parsed policy of `digest`.
    pub fn get(&self, digest: &Digest) -> Option<&Arc<ParsedPolicy>> {
        self.by_digest.get(digest)
    }

    /// Forgets all but those that `keep` says are in force.
    pub fn retain(&mut self, keep: impl Fn(&Digest) -> bool) {
        self.by_digest.retain(|digest, _| keep(digest));
    }
}

impl ParsedPolicy {
    /// The Cedar text.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether its resource scope can match an operation of `service`.
    pub fn concerns(&self, service: &ServiceName, spec: &ServiceSpec) -> bool {
        let _ = (service, spec);
        todo!()
    }
}

impl Law {
    /// Compiles the policies of `view`: strict validation, an index by action, principal and resource, an empty memory.
    pub fn compile(view: &View) -> Result<Self, Vec<PolicyError>> {
        let _ = view;
        todo!()
    }

    /// Judges one query. Never fails: what cannot be evaluated is denied with [`Reason::PolicyFault`].
    pub fn decide(&self, query: &Query<'_>) -> Decision {
        let _ = query;
        todo!()
    }
}
