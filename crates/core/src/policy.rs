//! The request gate: Cedar policies, compiled per service, and the decision.
//!
//! Default deny, forbid wins, and a policy that cannot be evaluated denies: Cedar skips it, [`Law::decide`] does not.
//! No policy text is evaluated that was not strictly validated against the published schema.
//!
//! | furniture | holds |
//! |---|---|
//! | `schema` | what policies can say: entities, actions, context |
//! | `file` | a `.cedar` file split into policies, with every mistake at once |
//! | `library` | one policy text, parsed once: its scope and what its conditions read |
//! | `law` | the policies of one view, indexed; the decision |
//! | `memory` | decisions that would be the same again |
//! | `reach` | the most that a workload may be permitted: what its token is for |
//! | `explain` | why a decision is what it is |
//! | `lint` | policies that are valid and still wrong |
//! | `cases` | `tests/*.toml`: decisions that must hold |

mod cases;
mod explain;
mod file;
#[cfg(test)]
mod fixture;
mod law;
mod library;
mod lint;
mod memory;
mod reach;
mod reads;
mod schema;

use std::{net::IpAddr, ops::Range, sync::Arc};

pub use cases::{Case, CaseResult, parse_cases, run_cases};
pub use explain::{CameTo, Considered, Explanation};
pub use file::{FilePolicy, Known, mistakes_of_state, parse_file, read_file, validate};
pub(crate) use file::{nearest, one_policy, read_file_of};
pub use law::Law;
pub use library::{Library, ParsedPolicy};
pub(crate) use library::{annotation, obligation};
pub use lint::{Finding, Flaw, lint};
pub use memory::{Judge, MEMORY_ENTRIES_MAX};
pub use reach::Grants;
pub use reads::Reads;
pub use schema::{is_action, schema_text};
use serde::{Deserialize, Serialize};

use crate::{
    change::PolicyId,
    identity::{ServiceName, SpiffeId},
    record::{Inputs, Outcome, Reason},
    risk::Condition,
    service::Protocol,
    token::ShownToken,
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
    /// `Operation::"<service><path>" in Service::"<service>"`, or, when the service has a contract,
    /// `Operation::"<service>/<operation>"`: the law finds which one it is.
    pub path: &'a str,
    /// Everything else policies can read.
    pub context: Context<'a>,
}

/// Which gate a policy is for: each has its schema and its annotations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JudgedBy {
    /// Requests, at each proxy.
    RequestGate,
    /// Changes, at the control plane: [`crate::gate`].
    ChangeGate,
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
    /// The access token that came with it.
    pub token: Option<&'a ShownToken>,
    /// What signals say of the caller.
    pub condition: Condition,
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
    /// What would lift the forbids, when the outcome is [`Outcome::StepUp`].
    pub obligation: Option<Obligation>,
    /// What the policies that could match read: with the same values of these, the same law answers the same.
    pub reads: Reads,
    /// Whether it came from memory.
    pub remembered: bool,
    /// The operation of the service's contract that was asked for.
    pub operation: Option<Arc<str>>,
}

/// What a caller must show to pass annotated forbids: the strictest of all that stand in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Obligation {
    /// `@step_up("…")`: how strong the authentication must be.
    pub factor: Option<Factor>,
    /// `@max_age("…")`: how long ago it may be, in seconds.
    pub max_age_seconds: Option<u64>,
}

/// How strong an authentication is, weakest first. The names are those of the OpenID ACR registry and go into the
/// `acr_values` of an RFC 9470 challenge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Factor {
    /// More than one factor.
    Mfa,
    /// Phishing-resistant.
    Phr,
    /// Phishing-resistant, in hardware.
    Phrh,
}

/// A mistake in a text: where, what, and how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Bytes of the text that it is about.
    pub span: Range<usize>,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// How to mend it.
    pub help: Option<String>,
}

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

impl<'a> Query<'a> {
    /// The question that a decision record answers, to put it again.
    pub fn of(inputs: &'a Inputs) -> Self {
        let action = match &*inputs.action {
            "grpc:call" => Action::GrpcCall,
            "tcp:connect" => Action::TcpConnect,
            http => Action::Http(http.strip_prefix("http:").unwrap_or(http)),
        };
        Self {
            principal: &inputs.principal,
            action,
            service: &inputs.service,
            path: &inputs.path,
            context: Context {
                method: &inputs.method,
                host: &inputs.host,
                protocol: inputs.protocol,
                size: inputs.size,
                origin: inputs.origin,
                now: inputs.now,
                first_contact: inputs.first_contact,
                token: inputs.token.as_ref(),
                condition: inputs.condition,
            },
        }
    }

    /// The inputs of a decision record for this question.
    pub fn inputs(&self) -> Inputs {
        Inputs {
            principal: self.principal.clone(),
            action: self.action.to_string().into(),
            service: self.service.clone(),
            path: self.path.into(),
            host: self.context.host.into(),
            method: self.context.method.into(),
            protocol: self.context.protocol,
            size: self.context.size,
            origin: self.context.origin,
            now: self.context.now,
            first_contact: self.context.first_contact,
            operation: None,
            token: self.context.token.cloned(),
            condition: self.context.condition,
        }
    }
}

impl std::fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Http(method) => write!(f, "http:{method}"),
            Self::GrpcCall => f.write_str("grpc:call"),
            Self::TcpConnect => f.write_str("tcp:connect"),
        }
    }
}

impl JudgedBy {
    fn validator(self) -> &'static cedar_policy::Validator {
        match self {
            Self::RequestGate => &schema::VALIDATOR,
            Self::ChangeGate => crate::gate::validator(),
        }
    }
}

impl Obligation {
    /// What satisfies both.
    pub fn strictest(self, other: Self) -> Self {
        let max_age_seconds = match (self.max_age_seconds, other.max_age_seconds) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Self { factor: self.factor.max(other.factor), max_age_seconds }
    }
}

impl Factor {
    /// The factor as `@step_up` and `acr_values` spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mfa => "mfa",
            Self::Phr => "phr",
            Self::Phrh => "phrh",
        }
    }

    /// Parses the value of `@step_up`.
    pub fn parse(given: &str) -> Option<Self> {
        [Self::Mfa, Self::Phr, Self::Phrh].into_iter().find(|factor| factor.as_str() == given)
    }
}
