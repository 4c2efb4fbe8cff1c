//! The record of one decision: which revision judged what, on which inputs, by which policies, with which outcome. A
//! record holds everything needed to judge again; it holds no header, token or body.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    change::{PolicyId, Revision},
    identity::{InstanceId, ServiceName, SpiffeId},
    path,
    risk::Condition,
    service::Protocol,
    token::ShownToken,
};

/// One decision and what became of the exchange.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecisionRecord {
    /// 32 hexadecimal digits; the first 12 are the time in milliseconds, so that ids sort by time.
    pub id: Arc<str>,
    /// When it was made, in milliseconds since 1970.
    pub at_ms: u64,
    /// The instance whose proxy decided.
    pub instance: InstanceId,
    /// The revision of the view that decided.
    pub revision: Revision,
    /// The sequence number of the last signal the proxy had taken in.
    pub signal_seq: u64,
    /// Permit, step-up or denial.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// The policies that decided; none for a default denial.
    pub policies: Arc<[PolicyId]>,
    /// What was asked.
    pub inputs: Inputs,
    /// Whether this is the first judgement of the exchange or a later one.
    pub judged: Judged,
    /// Set when the exchange ended before the record was written.
    pub ended: Option<Ended>,
    /// The W3C trace id, 32 hexadecimal digits.
    pub trace_id: Option<Arc<str>>,
    /// How long the judgement took, in nanoseconds.
    pub judge_ns: u64,
}

/// Everything the policies could read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// The verified peer.
    pub principal: SpiffeId,
    /// `http:GET`, `grpc:call`, `tcp:connect`.
    pub action: Arc<str>,
    /// The service asked for.
    pub service: ServiceName,
    /// The normalized path; `/` for tcp.
    pub path: Arc<str>,
    /// The `Host` or `:authority`, without port, lower case.
    pub host: Arc<str>,
    /// The HTTP method; `CONNECT` for tcp.
    pub method: Arc<str>,
    /// What the service speaks.
    pub protocol: Protocol,
    /// The declared length of the body, in bytes.
    pub size: Option<u64>,
    /// Where the peer's connection comes from.
    pub origin: IpAddr,
    /// The time policies saw, in seconds since 1970.
    pub now: i64,
    /// Whether this edge (caller, service, operation) had not been seen by this proxy before.
    pub first_contact: bool,
    /// The operation of the service's contract that it was; absent without a contract, and when the contract has none such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Arc<str>>,
    /// The access token that came with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<ShownToken>,
    /// What signals said of the caller; absent when they said nothing.
    #[serde(default, skip_serializing_if = "Condition::is_unknown")]
    pub condition: Condition,
}

/// The answer of the law.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The exchange may go on.
    Permit,
    /// It may once the caller authenticates again, stronger or more recently.
    StepUp,
    /// It may not.
    Deny,
}

/// Why the answer is what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A permit applies and no forbid does.
    Permitted,
    /// No permit applies.
    NoPolicyPermits,
    /// A forbid applies.
    Forbidden,
    /// Only annotated forbids stand in the way, and assurance lifts them.
    AssuranceNeeded,
    /// A policy could not be evaluated: that denies.
    PolicyFault,
    /// The service is not declared any more.
    NotDeclared,
    /// The peer is not a workload.
    NotAWorkload,
    /// The service has a contract, and this is no operation of it.
    NotInContract,
    /// The caller's service is quarantined or suspended.
    CallerBarred,
    /// The service demands an access token, and none came.
    TokenMissing,
    /// The access token that came is not believed.
    TokenRefused,
    /// The access token that came is for something else.
    TokenScope,
    /// The service holds edges that nobody has approved, and this is one.
    EdgeHeld,
    /// The caller or the service, its instance or its host is contained.
    Contained,
}

/// Which judgement of the exchange this was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judged {
    /// The first, before anything was forwarded.
    AtStart,
    /// A later one, because its inputs changed while it was open.
    WhileOpen,
    /// The only one, of an exchange that a sidecar makes with itself to show that its telemetry arrives.
    AsProbe,
}

/// How the exchange ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The HTTP status that the caller got; 0 when the connection ended without one.
    pub status: u16,
    /// From the request's head to the end, in microseconds.
    pub duration_us: u64,
    /// Bytes of body from the caller.
    pub bytes_in: u64,
    /// Bytes of body to the caller.
    pub bytes_out: u64,
    /// Whether it came to its own end.
    pub how: End,
}

/// What ended an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It was answered and its last byte was passed on.
    Completed,
    /// A later judgement, or the drain of its proxy, closed it.
    Cut,
    /// One side went away before the end.
    Abandoned,
}

/// Permits of one edge since the last report, as control receives them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeCount {
    /// Who called.
    pub principal: SpiffeId,
    /// Which service.
    pub service: ServiceName,
    /// How: `http:GET`.
    pub action: Arc<str>,
    /// Permits since the last report.
    pub permits: u64,
    /// The revision of the last one.
    pub revision: Revision,
}

impl DecisionRecord {
    /// In which way the caller came: what is told apart as an edge.
    pub fn way(&self) -> String {
        let mut way = String::new();
        push_way(&mut way, self.inputs.operation.as_deref(), &self.inputs.method, &self.inputs.path);
        way
    }
}

/// Appends the way of an exchange: its operation, or without a contract its method and the class of its path.
pub fn push_way(to: &mut String, operation: Option<&str>, method: &str, path: &str) {
    match operation {
        Some(operation) => to.push_str(operation),
        None => {
            to.push_str(method);
            to.push(' ');
            path::push_class(to, path);
        }
    }
}

impl Reason {
    /// What it means, for people.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Permitted => "a policy permits it and none forbids it",
            Self::NoPolicyPermits => "no policy permits it",
            Self::Forbidden => "a policy forbids it",
            Self::AssuranceNeeded => "only a stronger or more recent authentication is missing",
            Self::PolicyFault => "a policy could not be evaluated, which denies",
            Self::NotDeclared => "the service is not part of the mesh: not declared any more, quarantined or suspended",
            Self::NotAWorkload => "the peer is not a workload of a service",
            Self::NotInContract => "the contract of the service has no such operation",
            Self::CallerBarred => "the caller's service is quarantined or suspended",
            Self::TokenMissing => "the service demands an access token, and none came",
            Self::TokenRefused => "the access token that came is not believed",
            Self::TokenScope => "the access token that came is not for this operation",
            Self::EdgeHeld => "the service holds what nobody has approved yet, and this edge is new to it",
            Self::Contained => "the caller or the service is contained: its workload, its instance or its host",
        }
    }

    /// Every reason. Kept records refer to places in this list: only append.
    pub const ALL: [Self; 14] = [
        Self::Permitted,
        Self::NoPolicyPermits,
        Self::Forbidden,
        Self::AssuranceNeeded,
        Self::PolicyFault,
        Self::NotDeclared,
        Self::NotAWorkload,
        Self::NotInContract,
        Self::CallerBarred,
        Self::TokenMissing,
        Self::TokenRefused,
        Self::TokenScope,
        Self::EdgeHeld,
        Self::Contained,
    ];

    /// The place of this reason in [`Self::ALL`].
    pub fn place(self) -> usize {
        self as usize
    }

    /// The answer that this is a reason of.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Permitted => Outcome::Permit,
            Self::AssuranceNeeded => Outcome::StepUp,
            Self::NoPolicyPermits
            | Self::Forbidden
            | Self::PolicyFault
            | Self::NotDeclared
            | Self::NotAWorkload
            | Self::NotInContract
            | Self::CallerBarred
            | Self::TokenMissing
            | Self::TokenRefused
            | Self::TokenScope
            | Self::EdgeHeld
            | Self::Contained => Outcome::Deny,
        }
    }

    /// The reason as records and metrics spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permitted => "permitted",
            Self::NoPolicyPermits => "no_policy_permits",
            Self::Forbidden => "forbidden",
            Self::AssuranceNeeded => "assurance_needed",
            Self::PolicyFault => "policy_fault",
            Self::NotDeclared => "not_declared",
            Self::NotAWorkload => "not_a_workload",
            Self::NotInContract => "not_in_contract",
            Self::CallerBarred => "caller_barred",
            Self::TokenMissing => "token_missing",
            Self::TokenRefused => "token_refused",
            Self::TokenScope => "token_scope",
            Self::EdgeHeld => "edge_held",
            Self::Contained => "contained",
        }
    }
}

impl Outcome {
    /// The outcome as records and metrics spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permit => "permit",
            Self::StepUp => "step_up",
            Self::Deny => "deny",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_an_operation_or_a_method_with_the_class_of_its_path() {
        let long = format!("/files/{}", "x".repeat(33));
        for (operation, path, expected) in [
            (Some("createCharge"), "/charges/4", "createCharge"),
            (None, "/", "GET /"),
            (None, "/items/4/parts", "GET /items/*/parts"),
            (None, "/items/5/parts/", "GET /items/*/parts/"),
            (None, "/v1/items", "GET /v1/items"),
            (None, "/items/0197f0c2-8d5e-7a10-9c1b-1f2e3d4c5b6a", "GET /items/*"),
            (None, "/commits/deadbeef1", "GET /commits/*"),
            (None, "/facade", "GET /facade"),
            (None, &long, "GET /files/*"),
            (None, "/a/b/c/d/e/f/g/h/i/j", "GET /a/b/c/d/e/f/g/h/**"),
        ] {
            let mut way = String::new();
            push_way(&mut way, operation, "GET", path);
            assert_eq!(way, expected);
        }
    }

    #[test]
    fn every_reason_stands_at_its_place() {
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason.place(), place);
        }
        assert_eq!(Reason::Contained.place() + 1, Reason::ALL.len(), "the last reason is the last of the list");
    }
}
