//! Everything an operator can ask for. A change that is not here cannot be made.
//!
//! A [`ChangeSet`] is what one `apply` asks for: one base, one canonical encoding, one digest, admitted whole or not at
//! all. Bodies (policy texts) travel beside it in a content-addressed [`Bodies`] store.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    assurance::authenticators::Authenticators,
    canonical::Digest,
    client::Client,
    identity::{FactorId, NameError, OperatorName, ServiceName, SpiffeId, TrustDomain},
    lifetimes::Lifetimes,
    operator::EnrolledFactor,
    pipeline::{Issuer, IssuerName, Pipeline, PipelineName},
    route::Route,
    service::ServiceSpec,
    sign_in::{SignIn, SignInName},
};

/// The number of a state of the mesh: the ledger's size. It only rises; 0 is the empty mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// The `@id` of a policy.
pub type PolicyId = Arc<str>;
/// The name of a role in `roles.toml`.
pub type RoleName = Arc<str>;
/// The name of a traffic rule in `routes.toml`.
pub type RouteName = Arc<str>;

/// One thing asked for. The kinds are closed: folding, gating, rendering and the schema all match on them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// The first change of every ledger.
    CreateMesh {
        /// The namespace the mesh speaks for; it can never change.
        trust_domain: TrustDomain,
    },
    /// Adds a service, or replaces what it declares.
    DeclareService {
        /// Its name.
        name: ServiceName,
        /// What it declares.
        spec: ServiceSpec,
    },
    /// Takes a service out of the mesh.
    RemoveService {
        /// Its name.
        name: ServiceName,
    },
    /// Leaves a service that is declared out of the mesh until somebody approves it: nobody finds it, it reaches nobody.
    QuarantineService {
        /// Its name.
        name: ServiceName,
    },
    /// Lets a quarantined service in.
    ApproveService {
        /// Its name.
        name: ServiceName,
    },
    /// Takes a service out of the mesh for a while: it stays declared, and is as if it were not there.
    SuspendService {
        /// Its name.
        name: ServiceName,
        /// Why, in the words of whoever does it.
        reason: Arc<str>,
    },
    /// Lets a suspended service in again.
    ResumeService {
        /// Its name.
        name: ServiceName,
    },
    /// Opens an edge to a service that holds what is not approved (`first_contact = "hold"`); to another it does nothing yet.
    ApproveEdge {
        /// The service that is called.
        service: ServiceName,
        /// Who calls, in which way.
        #[serde(flatten)]
        edge: Edge,
    },
    /// Takes an approval back: the edge is held again.
    RevokeEdge {
        /// The service that is called.
        service: ServiceName,
        /// Who calls, in which way.
        #[serde(flatten)]
        edge: Edge,
    },
    /// Adds a role, or replaces its members.
    SetRole {
        /// Its name.
        name: RoleName,
        /// Who has it.
        members: BTreeSet<Member>,
    },
    /// Takes a role away from all who have it.
    RemoveRole {
        /// Its name.
        name: RoleName,
    },
    /// Adds a policy of the request gate, or replaces its text.
    SetPolicy {
        /// Its `@id`.
        id: PolicyId,
        /// The file it stands in, below the mesh directory.
        file: Arc<str>,
        /// The digest of its Cedar text, which is a body.
        body: Digest,
    },
    /// Removes a policy of the request gate.
    RemovePolicy {
        /// Its `@id`.
        id: PolicyId,
    },
    /// Adds a traffic rule, or replaces it.
    SetRoute {
        /// Its name.
        name: RouteName,
        /// The rule.
        route: Route,
    },
    /// Removes a traffic rule.
    RemoveRoute {
        /// Its name.
        name: RouteName,
    },
    /// Names an operator. They can do nothing before they enrol a factor.
    InviteOperator {
        /// Their name.
        name: OperatorName,
        /// What the gate will know them as.
        roles: BTreeSet<RoleName>,
    },
    /// The first factor of an invited operator. The first of all is the anchor: from it on the mesh is protected.
    EnrollOperator {
        /// Who.
        name: OperatorName,
        /// Their factor's id.
        id: FactorId,
        /// The factor.
        factor: EnrolledFactor,
    },
    /// One more factor.
    AddFactor {
        /// Whose.
        operator: OperatorName,
        /// Its id.
        id: FactorId,
        /// The factor.
        factor: EnrolledFactor,
    },
    /// Takes a factor away.
    RemoveFactor {
        /// Whose.
        operator: OperatorName,
        /// Its id.
        id: FactorId,
    },
    /// Takes an operator away, with all their factors.
    RemoveOperator {
        /// Who.
        name: OperatorName,
    },
    /// Replaces an operator's roles.
    SetOperatorRoles {
        /// Who.
        name: OperatorName,
        /// What the gate will know them as.
        roles: BTreeSet<RoleName>,
    },
    /// Says which authenticators may be enrolled from now on, or replaces what was said. Factors that are enrolled stay.
    SetAuthenticators {
        /// The only ones.
        authenticators: Authenticators,
    },
    /// Lets any authenticator be enrolled again.
    RemoveAuthenticators {},
    /// Says how long what the authority signs from now on is good.
    SetLifetimes {
        /// Of each level.
        lifetimes: Lifetimes,
    },
    /// Lets it be good for as long as where nothing is said.
    RemoveLifetimes {},
    /// Adds a policy of the change gate, or replaces its text.
    SetGatePolicy {
        /// Its `@id`.
        id: PolicyId,
        /// The file it stands in, below the mesh directory.
        file: Arc<str>,
        /// The digest of its Cedar text, which is a body.
        body: Digest,
    },
    /// Removes a policy of the change gate.
    RemoveGatePolicy {
        /// Its `@id`.
        id: PolicyId,
    },
    /// Seals the mesh, or changes what its seal asks for: agents refuse what too few operators signed.
    SealSettings {
        /// How many operators must sign every change, its author among them.
        quorum: u32,
    },
    /// Says which executables or images may be instances of a service; any other stays quarantined.
    Deploy {
        /// The service.
        service: ServiceName,
        /// The SHA-256 of each.
        artifacts: BTreeSet<Digest>,
    },
    /// Believes the tokens of an OpenID Connect provider, or replaces what is known of it.
    SetIssuer {
        /// Its name.
        name: IssuerName,
        /// What is known of it.
        issuer: Issuer,
    },
    /// Believes an issuer no more.
    RemoveIssuer {
        /// Its name.
        name: IssuerName,
    },
    /// Lets an automation propose changes, or replaces what it is matched by.
    SetPipeline {
        /// Its name.
        name: PipelineName,
        /// What it is matched by.
        pipeline: Pipeline,
    },
    /// Lets an automation propose no more.
    RemovePipeline {
        /// Its name.
        name: PipelineName,
    },
    /// Lets people whom a provider knows act by their groups there, or replaces which groups those are.
    SetSignIn {
        /// Its name.
        name: SignInName,
        /// Whom it lets in.
        sign_in: SignIn,
    },
    /// Lets nobody in by this provider any more.
    RemoveSignIn {
        /// Its name.
        name: SignInName,
    },
    /// Lets a client that is no workload ask for tokens, or replaces what is known of it.
    SetClient {
        /// Its name.
        name: ServiceName,
        /// What is known of it.
        client: Client,
    },
    /// Gives a client no more tokens.
    RemoveClient {
        /// Its name.
        name: ServiceName,
    },
    /// Seals the control plane's own keys with another key-encryption key from now on.
    RotateSealingKey {
        /// What tells the new one from others; never the key.
        fingerprint: Digest,
    },
    /// Whoever has the control plane's files and what opens them appoints an owner anew, past the gate.
    Recover {
        /// Who.
        operator: OperatorName,
        /// Their only factor from now on.
        id: FactorId,
        /// What it is.
        factor: EnrolledFactor,
        /// Why, in the words of whoever did it.
        reason: Arc<str>,
        /// When, in seconds since 1970.
        at_seconds: i64,
    },
}

/// Who can have a role: a service of the own trust domain by its name, or any workload by its full SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Member {
    /// A service of the own trust domain.
    Service(ServiceName),
    /// A workload, wherever it is.
    Workload(SpiffeId),
}

/// Who comes to a service, in which way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Edge {
    /// Who calls.
    pub caller: Member,
    /// An operation of the service's contract; without one its method and the class of its path, `GET /items/*`. Absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Arc<str>>,
}

/// What one `apply` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeSet {
    /// The revision it was planned on.
    pub base: Revision,
    /// In the order in which they fold.
    pub changes: Vec<Change>,
}

/// The content-addressed texts a change-set refers to. A body is inserted by its own digest, so it cannot lie.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bodies(BTreeMap<Digest, Arc<str>>);

impl Change {
    /// Every kind.
    pub const KINDS: [&str; 39] = [
        "create_mesh",
        "declare_service",
        "remove_service",
        "quarantine_service",
        "approve_service",
        "suspend_service",
        "resume_service",
        "approve_edge",
        "revoke_edge",
        "set_role",
        "remove_role",
        "set_policy",
        "remove_policy",
        "set_route",
        "remove_route",
        "invite_operator",
        "enroll_operator",
        "add_factor",
        "remove_factor",
        "remove_operator",
        "set_operator_roles",
        "set_authenticators",
        "remove_authenticators",
        "set_lifetimes",
        "remove_lifetimes",
        "set_gate_policy",
        "remove_gate_policy",
        "seal_settings",
        "deploy",
        "set_issuer",
        "remove_issuer",
        "set_pipeline",
        "remove_pipeline",
        "set_sign_in",
        "remove_sign_in",
        "set_client",
        "remove_client",
        "rotate_sealing_key",
        "recover",
    ];

    /// The kind as the ledger and the change gate spell it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CreateMesh { .. } => "create_mesh",
            Self::DeclareService { .. } => "declare_service",
            Self::RemoveService { .. } => "remove_service",
            Self::QuarantineService { .. } => "quarantine_service",
            Self::ApproveService { .. } => "approve_service",
            Self::SuspendService { .. } => "suspend_service",
            Self::ResumeService { .. } => "resume_service",
            Self::ApproveEdge { .. } => "approve_edge",
            Self::RevokeEdge { .. } => "revoke_edge",
            Self::SetRole { .. } => "set_role",
            Self::RemoveRole { .. } => "remove_role",
            Self::SetPolicy { .. } => "set_policy",
            Self::RemovePolicy { .. } => "remove_policy",
            Self::SetRoute { .. } => "set_route",
            Self::RemoveRoute { .. } => "remove_route",
            Self::InviteOperator { .. } => "invite_operator",
            Self::EnrollOperator { .. } => "enroll_operator",
            Self::AddFactor { .. } => "add_factor",
            Self::RemoveFactor { .. } => "remove_factor",
            Self::RemoveOperator { .. } => "remove_operator",
            Self::SetOperatorRoles { .. } => "set_operator_roles",
            Self::SetAuthenticators { .. } => "set_authenticators",
            Self::RemoveAuthenticators {} => "remove_authenticators",
            Self::SetLifetimes { .. } => "set_lifetimes",
            Self::RemoveLifetimes {} => "remove_lifetimes",
            Self::SetGatePolicy { .. } => "set_gate_policy",
            Self::RemoveGatePolicy { .. } => "remove_gate_policy",
            Self::SealSettings { .. } => "seal_settings",
            Self::Deploy { .. } => "deploy",
            Self::SetIssuer { .. } => "set_issuer",
            Self::RemoveIssuer { .. } => "remove_issuer",
            Self::SetPipeline { .. } => "set_pipeline",
            Self::RemovePipeline { .. } => "remove_pipeline",
            Self::SetSignIn { .. } => "set_sign_in",
            Self::RemoveSignIn { .. } => "remove_sign_in",
            Self::SetClient { .. } => "set_client",
            Self::RemoveClient { .. } => "remove_client",
            Self::RotateSealingKey { .. } => "rotate_sealing_key",
            Self::Recover { .. } => "recover",
        }
    }

    /// What it is about, for people: `policy web-reads-catalog`.
    pub fn subject(&self) -> String {
        match self {
            Self::CreateMesh { trust_domain } => format!("mesh {trust_domain}"),
            Self::DeclareService { name, .. }
            | Self::RemoveService { name }
            | Self::QuarantineService { name }
            | Self::ApproveService { name }
            | Self::SuspendService { name, .. }
            | Self::ResumeService { name } => format!("service {name}"),
            Self::ApproveEdge { service, edge } | Self::RevokeEdge { service, edge } => {
                format!("edge {edge} to {service}")
            }
            Self::SetRole { name, .. } | Self::RemoveRole { name } => format!("role {name}"),
            Self::SetPolicy { id, .. } | Self::RemovePolicy { id } => format!("policy {id}"),
            Self::SetRoute { name, .. } | Self::RemoveRoute { name } => format!("route {name}"),
            Self::InviteOperator { name, .. }
            | Self::EnrollOperator { name, .. }
            | Self::RemoveOperator { name }
            | Self::SetOperatorRoles { name, .. }
            | Self::Recover { operator: name, .. } => format!("operator {name}"),
            Self::AddFactor { operator, id, .. } | Self::RemoveFactor { operator, id } => {
                let short: String = id.as_str().chars().take(12).collect();
                format!("factor {short} of operator {operator}")
            }
            Self::SetGatePolicy { id, .. } | Self::RemoveGatePolicy { id } => format!("gate policy {id}"),
            Self::SetAuthenticators { .. } | Self::RemoveAuthenticators {} => "authenticators".to_owned(),
            Self::SetLifetimes { .. } | Self::RemoveLifetimes {} => "lifetimes".to_owned(),
            Self::SealSettings { .. } => "seal".to_owned(),
            Self::Deploy { service, .. } => format!("deployment of service {service}"),
            Self::SetIssuer { name, .. } | Self::RemoveIssuer { name } => format!("issuer {name}"),
            Self::SetPipeline { name, .. } | Self::RemovePipeline { name } => format!("pipeline {name}"),
            Self::SetSignIn { name, .. } | Self::RemoveSignIn { name } => format!("sign-in {name}"),
            Self::SetClient { name, .. } | Self::RemoveClient { name } => format!("client {name}"),
            Self::RotateSealingKey { fingerprint } => format!("sealing key {}", fingerprint.short()),
        }
    }

    /// The body it refers to.
    pub fn body(&self) -> Option<Digest> {
        match self {
            Self::SetPolicy { body, .. } | Self::SetGatePolicy { body, .. } => Some(*body),
            Self::DeclareService { spec, .. } => spec.contract,
            _ => None,
        }
    }
}

impl ChangeSet {
    /// SHA-256 of the canonical encoding.
    pub fn digest(&self) -> Digest {
        Digest::of_canonical(self)
    }
}

impl Member {
    /// The SPIFFE ID that has the role, in the mesh of `own`.
    pub fn id(&self, own: &TrustDomain) -> SpiffeId {
        match self {
            Self::Service(name) => own.workload(name),
            Self::Workload(id) => id.clone(),
        }
    }
}

impl Bodies {
    /// Keeps `text` and returns its digest.
    pub fn insert(&mut self, text: impl Into<Arc<str>>) -> Digest {
        let text = text.into();
        let digest = Digest::of(text.as_bytes());
        self.0.insert(digest, text);
        digest
    }

    /// The text of `digest`.
    pub fn get(&self, digest: &Digest) -> Option<&Arc<str>> {
        self.0.get(digest)
    }

    /// All texts with their digests.
    pub fn iter(&self) -> impl Iterator<Item = (&Digest, &Arc<str>)> {
        self.0.iter()
    }

    /// Takes up all texts of `other`.
    pub fn extend(&mut self, other: &Bodies) {
        self.0.extend(other.0.iter().map(|(digest, text)| (*digest, text.clone())));
    }

    /// Forgets all but those that `keep` says are needed.
    pub fn retain(&mut self, keep: impl Fn(&Digest) -> bool) {
        self.0.retain(|digest, _| keep(digest));
    }

    /// The number of texts.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The digests whose text does not hash to them: what a peer that lies, or a damaged store, would hand us.
    pub fn forged(&self) -> Vec<Digest> {
        self.0
            .iter()
            .filter(|(digest, text)| Digest::of(text.as_bytes()) != **digest)
            .map(|(digest, _)| *digest)
            .collect()
    }
}

impl TryFrom<String> for Member {
    type Error = NameError;
    fn try_from(given: String) -> Result<Self, NameError> {
        if given.contains("://") {
            SpiffeId::parse(&given).map(Self::Workload)
        } else {
            ServiceName::parse(&given).map(Self::Service)
        }
    }
}

impl From<Member> for String {
    fn from(member: Member) -> Self {
        member.to_string()
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => name.fmt(f),
            Self::Workload(id) => id.fmt(f),
        }
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.operation {
            Some(operation) => write!(f, "{} {operation}", self.caller),
            None => self.caller.fmt(f),
        }
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
