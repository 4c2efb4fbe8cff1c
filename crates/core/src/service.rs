//! What a service declares of itself to the mesh. How to start it stays in the mesh directory, on its host: the
//! ledger can never make a host run a command.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::{canonical::Digest, identity::ServiceName, registration::Registration};

/// What a service speaks behind its sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1, HTTP/2 and WebSocket.
    #[default]
    Http,
    /// gRPC over HTTP/2.
    Grpc,
    /// Opaque bytes.
    Tcp,
}

/// Whether an exchange may go on when its record cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Recorded {
    /// A record that finds no room is counted as shed; the exchange goes on.
    #[default]
    BestEffort,
    /// No record, no exchange: shed the request with 503 rather than forward it unrecorded.
    Always,
}

/// What the first exchange of an edge (a caller, in one way) has to be beyond permitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum FirstContact {
    /// Nothing: its record is marked and reported.
    #[default]
    Mark,
    /// Small and plain: few headers, a short body that says its length and its type.
    Inspect,
    /// Approved: what policies permit is held until an operator approves the edge, every time.
    Hold,
}

/// Whether a request must come with an access token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Tokens {
    /// It need not; one that comes is verified all the same.
    #[default]
    Optional,
    /// Without one that is good for what is asked, nothing is permitted.
    Required,
}

/// The declared part of a service, as the ledger holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// What it speaks.
    pub protocol: Protocol,
    /// The port its callers use when they reach it by name, `<service>.mesh:<port>`: 80 for http and grpc unless given.
    pub port: u16,
    /// The services it calls; each gets a loopback listener in its sidecar. Declares an intent and grants nothing.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub upstreams: BTreeSet<ServiceName>,
    /// How old the view or the signals of its proxies may be before they answer 503, in seconds.
    pub max_staleness_seconds: u32,
    /// What happens when a record finds no room.
    #[serde(default)]
    pub recorded: Recorded,
    /// Free grouping for policies: `Service::"x" in Namespace::"payments"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Class of the data it holds, for policies: `Service::"x" in Sensitivity::"pci"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<String>,
    /// Most concurrent exchanges its sidecar admits before it answers 503.
    pub exchanges_max: u32,
    /// The digest of its contract: with one, a request that is no operation of it is denied. What has none is not written, so
    /// the digests of older histories stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<Digest>,
    /// It has none on purpose (`contract = "none"`): a new service of a protected mesh is let in without one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_contract: bool,
    /// What the first exchange of an edge has to be.
    #[serde(default, skip_serializing_if = "is_default")]
    pub first_contact: FirstContact,
    /// Whether its callers need an access token. The default is not written.
    #[serde(default, skip_serializing_if = "Tokens::are_optional")]
    pub tokens: Tokens,
    /// The processes that are instances of it although no agent started them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub attest: BTreeSet<Registration>,
}

fn is_default(given: &FirstContact) -> bool {
    *given == FirstContact::default()
}

/// How old a view may be when nothing else is said, in seconds.
pub const MAX_STALENESS_SECONDS_DEFAULT: u32 = 300;
/// Concurrent exchanges of one sidecar when nothing else is said.
pub const EXCHANGES_MAX_DEFAULT: u32 = 10_000;

impl ServiceSpec {
    /// A service that speaks `protocol`, with every default.
    pub fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            port: 80,
            upstreams: BTreeSet::new(),
            max_staleness_seconds: MAX_STALENESS_SECONDS_DEFAULT,
            recorded: Recorded::default(),
            namespace: None,
            sensitivity: None,
            exchanges_max: EXCHANGES_MAX_DEFAULT,
            contract: None,
            without_contract: false,
            first_contact: FirstContact::default(),
            tokens: Tokens::default(),
            attest: BTreeSet::new(),
        }
    }
}

impl Protocol {
    /// Whether what speaks it has operations, and so can have a contract.
    pub fn has_operations(self) -> bool {
        self != Self::Tcp
    }
}

impl Tokens {
    /// Whether a request may come without.
    pub fn are_optional(&self) -> bool {
        *self == Self::Optional
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        })
    }
}
