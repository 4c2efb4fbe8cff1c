//! The state of the mesh: a pure fold of all admitted changes. Snapshots of it are caches; old folds never change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    assurance::authenticators::{Aaguid, Authenticators, MODELS_MAX, ROOTS_MAX},
    canonical::Digest,
    change::{Change, ChangeSet, Edge, Member, PolicyId, RoleName, RouteName},
    client::Client,
    directory::{PLAIN_NAME, is_plain_name},
    gate::OWNER,
    identity::{FactorId, OperatorName, ServiceName, TrustDomain},
    lifetimes::Lifetimes,
    operator::{EnrolledFactor, FACTORS_MAX, Operator, QUORUM_MAX, REASON_BYTES_MAX, Recovery, Seal},
    pipeline::{self, Issuer, IssuerName, PIPELINES_MAX, Pipeline, PipelineName},
    registration::REGISTRATIONS_MAX,
    route::Route,
    service::ServiceSpec,
    sign_in::{self, SIGN_INS_MAX, SignIn, SignInName},
};

/// Services of one mesh at the same time: each has a loopback address of its own in 127.81.0.0/16.
pub const SERVICES_MAX: usize = 60_000;

/// What all admitted changes add up to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MeshState {
    /// Set by the first change.
    pub trust_domain: Option<TrustDomain>,
    /// Every declared service.
    pub services: BTreeMap<ServiceName, Service>,
    /// Who has which role.
    pub roles: BTreeMap<RoleName, BTreeSet<Member>>,
    /// The request gate.
    pub policies: BTreeMap<PolicyId, PolicyRef>,
    /// The traffic rules.
    pub routes: BTreeMap<RouteName, Route>,
    /// The slot the next new service gets.
    pub next_slot: u16,
    /// Who may change the mesh. What is empty in a mesh without operators is not written, so the digests of older histories stay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub operators: BTreeMap<OperatorName, Operator>,
    /// The change gate.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gate: BTreeMap<PolicyId, PolicyRef>,
    /// What a sealed mesh asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
    /// The only authenticators that may be enrolled; any, when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authenticators: Option<Authenticators>,
    /// How long what the authority signs is good; [`MeshState::lifetimes`], when nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifetimes: Option<Lifetimes>,
    /// The executables and images that may be instances of a service, by their SHA-256; a service that is not here takes any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub deployments: BTreeMap<ServiceName, BTreeSet<Digest>>,
    /// The declared services that are no part of the mesh; any other is active.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub barred: BTreeMap<ServiceName, Barred>,
    /// The edges that are approved, by the service that is called.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub edges: BTreeMap<ServiceName, BTreeSet<Edge>>,
    /// Whose tokens are believed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub issuers: BTreeMap<IssuerName, Issuer>,
    /// The automations that may propose changes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pipelines: BTreeMap<PipelineName, Pipeline>,
    /// The providers that people sign in with.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sign_ins: BTreeMap<SignInName, SignIn>,
    /// The clients of the token service that are no workloads.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub clients: BTreeMap<ServiceName, Client>,
    /// What tells the key-encryption key of the control plane from others, since one was chosen by a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealing_key: Option<Digest>,
    /// The last recovery, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
}

/// Executables and images of one service at the same time: the old ones and the new ones of a rollout.
pub const ARTIFACTS_MAX: usize = 16;
/// Approved edges of one service.
pub const EDGES_MAX: usize = 4096;
/// Longest name of an operation of an edge, in bytes.
const EDGE_BYTES_MAX: usize = 1024;

/// A declared service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// What it declares.
    pub spec: ServiceSpec,
    /// Its number for life. A removed service's slot is the last to be given again, so that an address a caller
    /// resolved once never comes to mean another service while anyone remembers it.
    pub slot: u16,
}

/// Why a declared service is no part of the mesh: nobody finds it, and it reaches nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "standing", rename_all = "snake_case")]
pub enum Barred {
    /// Nobody has let it in yet.
    Quarantined,
    /// Somebody took it out for a while.
    Suspended {
        /// Why, in their words.
        reason: Arc<str>,
    },
}

/// A policy in force: where it stands and the digest of its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRef {
    /// The file below the mesh directory.
    pub file: Arc<str>,
    /// The digest of the Cedar text.
    pub body: Digest,
}

/// Why a change does not follow from the state before it. In a ledger this means that it is damaged or forged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// Every ledger begins with `create_mesh`.
    #[error("the first change must be `create_mesh`")]
    NotCreated,
    /// A trust domain is for life.
    #[error("the mesh exists already, as `{0}`")]
    CreatedTwice(TrustDomain),
    /// It removes what is not there.
    #[error("{0} does not exist")]
    Unknown(String),
    /// It adds what is there already.
    #[error("{0} exists already")]
    Known(String),
    /// A first factor is enrolled, every other one added.
    #[error("operator {0} has enrolled already; add a factor instead")]
    Enrolled(OperatorName),
    /// There would be no way to change the mesh any more, or a way around its gate.
    #[error("no operator would be left who has enrolled: from the first enrolment on there is always one")]
    NobodyLeft,
    /// The seal would ask for more than can sign.
    #[error(
        "a seal asks for 1 to {QUORUM_MAX} operators and at most as many as can sign; it would be {quorum} of {signers}"
    )]
    Quorum {
        /// How many it would ask for.
        quorum: u32,
        /// How many operators could sign.
        signers: usize,
    },
    /// A list that nothing can be held to.
    #[error("a list of authenticators names 1 to {MODELS_MAX} models and 1 to {ROOTS_MAX} roots")]
    Authenticators,
    /// Lives that are too short or too long.
    #[error(
        "an SVID lives for 5m to 24h, an intermediate for 7d to 365d, a root for 90d to 7300d and two intermediates"
    )]
    Lifetimes,
    /// A key of another authenticator.
    #[error("{}: the mesh names the models that may be enrolled", match .0 {
        Some(model) => format!("a key of model {model} is not enrolled"),
        None => "a key whose model was not proven is not enrolled".to_owned(),
    })]
    Model(Option<Aaguid>),
    /// Too many factors.
    #[error("an operator has at most {FACTORS_MAX} factors")]
    TooManyFactors,
    /// None, or too many, executables and images.
    #[error("a deployment names 1 to {ARTIFACTS_MAX} executables or images")]
    Artifacts,
    /// An edge that is none, or one too many.
    #[error("edge {edge}: {what}")]
    Edge {
        /// As it was given.
        edge: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Too many ways to be one service.
    #[error("a service has at most {REGISTRATIONS_MAX} registrations")]
    Registrations,
    /// A standing that it cannot come from.
    #[error("service {name} is {is}: {what}")]
    Standing {
        /// The service.
        name: ServiceName,
        /// What it is.
        is: &'static str,
        /// What would be needed.
        what: &'static str,
    },
    /// A suspension says why.
    #[error("a suspension gives its reason in 1 to {REASON_BYTES_MAX} bytes")]
    Suspension,
    /// An issuer or a pipeline that nobody should believe.
    #[error("{0}: {1}")]
    Pipeline(String, String),
    /// A mesh that nobody has enrolled in has nothing to recover.
    #[error("the mesh is unprotected: enrol an operator instead of recovering one")]
    NotProtected,
    /// A recovery says why it was done.
    #[error("a recovery gives its reason in 1 to {REASON_BYTES_MAX} bytes")]
    Reason,
    /// No loopback address is left.
    #[error("a mesh holds at most {SERVICES_MAX} services")]
    Full,
}

impl MeshState {
    /// Folds one change. On an error the state is unchanged.
    pub fn apply(&mut self, change: &Change) -> Result<(), FoldError> {
        match (change, &self.trust_domain) {
            (Change::CreateMesh { trust_domain }, None) => {
                self.trust_domain = Some(trust_domain.clone());
                return Ok(());
            }
            (Change::CreateMesh { .. }, Some(own)) => return Err(FoldError::CreatedTwice(own.clone())),
            (_, None) => return Err(FoldError::NotCreated),
            (_, Some(_)) => {}
        }
        let known = |removed: bool| if removed { Ok(()) } else { Err(FoldError::Unknown(change.subject())) };
        match change {
            Change::CreateMesh { .. } => unreachable!("matched above"),
            Change::DeclareService { spec, .. } if spec.attest.len() > REGISTRATIONS_MAX => {
                return Err(FoldError::Registrations);
            }
            Change::DeclareService { name, spec } => match self.services.get_mut(name) {
                Some(service) => service.spec = spec.clone(),
                None => {
                    let slot = self.free_slot().ok_or(FoldError::Full)?;
                    self.next_slot = slot + 1;
                    self.services.insert(name.clone(), Service { spec: spec.clone(), slot });
                }
            },
            Change::RemoveService { name } => {
                known(self.services.remove(name).is_some())?;
                self.deployments.remove(name);
                self.barred.remove(name);
                self.edges.remove(name);
                // Whoever is called so later is somebody else.
                self.edges.retain(|_, edges| {
                    edges.retain(|edge| edge.caller != Member::Service(name.clone()));
                    !edges.is_empty()
                });
            }
            Change::QuarantineService { name }
            | Change::ApproveService { name }
            | Change::SuspendService { name, .. }
            | Change::ResumeService { name } => {
                known(self.services.contains_key(name))?;
                match self.barred_after(change, name)? {
                    Some(barred) => drop(self.barred.insert(name.clone(), barred)),
                    None => drop(self.barred.remove(name)),
                }
            }
            Change::ApproveEdge { service, edge } => {
                self.may_be_approved(service, edge)?;
                self.edges.entry(service.clone()).or_default().insert(edge.clone());
            }
            Change::RevokeEdge { service, edge } => {
                let edges = self.edges.get_mut(service).ok_or_else(|| FoldError::Unknown(change.subject()))?;
                known(edges.remove(edge))?;
                if edges.is_empty() {
                    self.edges.remove(service);
                }
            }
            Change::SetRole { name, members } => {
                self.roles.insert(name.clone(), members.clone());
            }
            Change::RemoveRole { name } => known(self.roles.remove(name).is_some())?,
            Change::SetPolicy { id, file, body } => {
                self.policies.insert(id.clone(), PolicyRef { file: file.clone(), body: *body });
            }
            Change::RemovePolicy { id } => known(self.policies.remove(id).is_some())?,
            Change::SetRoute { name, route } => {
                self.routes.insert(name.clone(), route.clone());
            }
            Change::RemoveRoute { name } => known(self.routes.remove(name).is_some())?,
            Change::SetGatePolicy { id, file, body } => {
                self.gate.insert(id.clone(), PolicyRef { file: file.clone(), body: *body });
            }
            Change::RemoveGatePolicy { id } => known(self.gate.remove(id).is_some())?,
            Change::SetAuthenticators { authenticators } => {
                if !authenticators.is_whole() {
                    return Err(FoldError::Authenticators);
                }
                self.authenticators = Some(authenticators.clone());
            }
            Change::RemoveAuthenticators {} => known(self.authenticators.take().is_some())?,
            Change::SetLifetimes { lifetimes } => {
                if !lifetimes.are_bounded() {
                    return Err(FoldError::Lifetimes);
                }
                self.lifetimes = Some(*lifetimes);
            }
            Change::RemoveLifetimes {} => known(self.lifetimes.take().is_some())?,
            Change::SealSettings { quorum } => {
                self.seal = Some(self.seal_of(*quorum, &self.operators)?);
            }
            Change::Deploy { service, artifacts } => {
                known(self.services.contains_key(service))?;
                if artifacts.is_empty() || artifacts.len() > ARTIFACTS_MAX {
                    return Err(FoldError::Artifacts);
                }
                self.deployments.insert(service.clone(), artifacts.clone());
            }
            Change::SetIssuer { name, issuer } => {
                let refusals = issuer.refusals();
                if self.issuers.iter().any(|(other, held)| other != name && held.url == issuer.url) {
                    let what = "another one has its URL".to_owned();
                    return Err(FoldError::Pipeline(change.subject(), what));
                }
                taken(change, name, refusals, self.issuers.keys().filter(|held| *held != name).count())?;
                self.issuers.insert(name.clone(), issuer.clone());
            }
            Change::RemoveIssuer { name } => known(self.issuers.remove(name).is_some())?,
            Change::SetPipeline { name, pipeline } => {
                let issuer = self.issuers.get(&pipeline.issuer);
                let refusals = pipeline::refusals(issuer.map(|issuer| issuer.url.as_str()), &pipeline.claims);
                taken(change, name, refusals, self.pipelines.keys().filter(|held| *held != name).count())?;
                self.pipelines.insert(name.clone(), pipeline.clone());
            }
            Change::RemovePipeline { name } => known(self.pipelines.remove(name).is_some())?,
            Change::SetSignIn { name, sign_in } => {
                let others = self.sign_ins.keys().filter(|held| *held != name).count();
                if others >= SIGN_INS_MAX {
                    let what = format!("a mesh has at most {SIGN_INS_MAX} of them");
                    return Err(FoldError::Pipeline(change.subject(), what));
                }
                let refusals = sign_in::name_refusal(name).into_iter().chain(sign_in.refusals());
                taken(change, name, refusals.collect(), others)?;
                self.sign_ins.insert(name.clone(), sign_in.clone());
            }
            Change::RemoveSignIn { name } => known(self.sign_ins.remove(name).is_some())?,
            Change::SetClient { name, client } => {
                let others = self.clients.keys().filter(|held| *held != name).count();
                taken(change, name.as_str(), client.refusals(), others)?;
                self.clients.insert(name.clone(), client.clone());
            }
            Change::RemoveClient { name } => known(self.clients.remove(name).is_some())?,
            Change::RotateSealingKey { fingerprint } => self.sealing_key = Some(*fingerprint),
            Change::Recover { operator, id, factor, reason, at_seconds } => {
                let recovery = Recovery { operator: operator.clone(), reason: reason.clone(), at_seconds: *at_seconds };
                self.recover(recovery, id, factor)?;
            }
            Change::InviteOperator { .. }
            | Change::EnrollOperator { .. }
            | Change::AddFactor { .. }
            | Change::RemoveFactor { .. }
            | Change::RemoveOperator { .. }
            | Change::SetOperatorRoles { .. } => self.operators = self.operators_after(change)?,
        }
        Ok(())
    }

    /// What bars a service from the mesh after a change of its standing; nothing, when that lets it in.
    fn barred_after(&self, change: &Change, name: &ServiceName) -> Result<Option<Barred>, FoldError> {
        let refused = |is, what| Err(FoldError::Standing { name: name.clone(), is, what });
        match (change, self.barred.get(name)) {
            (Change::QuarantineService { .. }, None) => Ok(Some(Barred::Quarantined)),
            (Change::ApproveService { .. }, Some(Barred::Quarantined)) => Ok(None),
            (Change::SuspendService { reason, .. }, None) => {
                if reason.is_empty() || reason.len() > REASON_BYTES_MAX {
                    return Err(FoldError::Suspension);
                }
                Ok(Some(Barred::Suspended { reason: reason.clone() }))
            }
            (Change::ResumeService { .. }, Some(Barred::Suspended { .. })) => Ok(None),
            (Change::ResumeService { .. }, Some(Barred::Quarantined)) => {
                refused("quarantined", "it is approved, not resumed")
            }
            (_, None) => refused("active", "there is nothing to lift"),
            (_, Some(Barred::Quarantined)) => refused("quarantined", "it is no part of the mesh already"),
            (_, Some(Barred::Suspended { .. })) => refused("suspended", "resume it first"),
        }
    }

    /// Whether `service` lets `caller` come in this way where it holds what nobody approved.
    pub fn is_approved(&self, service: &ServiceName, caller: &Member, operation: &str) -> bool {
        let is_it =
            |edge: &Edge| edge.caller == *caller && edge.operation.as_deref().is_none_or(|way| way == operation);
        self.edges.get(service).is_some_and(|edges| edges.iter().any(is_it))
    }

    fn may_be_approved(&self, service: &ServiceName, edge: &Edge) -> Result<(), FoldError> {
        let refused = |what| Err(FoldError::Edge { edge: format!("{edge} to {service}"), what });
        let approved = self.edges.get(service);
        let is_plain = |operation: &Arc<str>| {
            !operation.is_empty() && operation.len() <= EDGE_BYTES_MAX && !operation.chars().any(char::is_control)
        };
        match &edge.caller {
            _ if !self.services.contains_key(service) => refused("the service is not declared"),
            Member::Service(caller) if !self.services.contains_key(caller) => refused("the caller is not declared"),
            Member::Workload(id) if id.trust_domain() == self.trust_domain.as_ref().map_or("", |own| own.as_str()) => {
                refused("a service of this mesh is called by its name")
            }
            _ if !edge.operation.as_ref().is_none_or(is_plain) => refused("an operation has 1 to 1024 printable bytes"),
            _ if approved.is_some_and(|edges| edges.contains(edge)) => refused("it is approved already"),
            _ if approved.is_some_and(|edges| edges.len() >= EDGES_MAX) => refused("the service has 4096 already"),
            _ => Ok(()),
        }
    }

    /// Whether a declared service is part of the mesh.
    pub fn is_active(&self, name: &ServiceName) -> bool {
        self.services.contains_key(name) && !self.barred.contains_key(name)
    }

    /// Whether an operator has enrolled. From then on there is no way back.
    pub fn is_protected(&self) -> bool {
        self.operators.values().any(|operator| !operator.factors.is_empty())
    }

    /// The operators after a change of them.
    ///
    /// INVARIANT (no-way-back): once an operator has enrolled, no change leaves a mesh in which none has, or whose seal asks for more
    /// operators than can sign.
    fn operators_after(&self, change: &Change) -> Result<BTreeMap<OperatorName, Operator>, FoldError> {
        let mut operators = self.operators.clone();
        let unknown = || FoldError::Unknown(change.subject());
        match change {
            Change::InviteOperator { name, roles } => {
                let invited = Operator { roles: roles.clone(), factors: BTreeMap::new() };
                if operators.insert(name.clone(), invited).is_some() {
                    return Err(FoldError::Known(change.subject()));
                }
            }
            Change::EnrollOperator { name, id, factor } => {
                if !self.operators.get(name).ok_or_else(unknown)?.factors.is_empty() {
                    return Err(FoldError::Enrolled(name.clone()));
                }
                self.may_be_enrolled(factor)?;
                add_factor(&mut operators, name, id, factor)?;
            }
            Change::AddFactor { operator, id, factor } => {
                self.may_be_enrolled(factor)?;
                add_factor(&mut operators, operator, id, factor)?;
            }
            Change::RemoveFactor { operator, id } => {
                let factors = &mut operators.get_mut(operator).ok_or_else(unknown)?.factors;
                factors.remove(id).ok_or_else(unknown)?;
            }
            Change::RemoveOperator { name } => {
                operators.remove(name).ok_or_else(unknown)?;
            }
            Change::SetOperatorRoles { name, roles } => {
                operators.get_mut(name).ok_or_else(unknown)?.roles = roles.clone();
            }
            other => unreachable!("not a change of operators: {}", other.kind()),
        }
        if self.is_protected() && operators.values().all(|operator| operator.factors.is_empty()) {
            return Err(FoldError::NobodyLeft);
        }
        if let Some(seal) = self.seal {
            self.seal_of(seal.quorum, &operators)?;
        }
        Ok(operators)
    }

    /// How long what the authority signs is good.
    pub fn lifetimes(&self) -> Lifetimes {
        self.lifetimes.unwrap_or_default()
    }

    /// INVARIANT (authenticators-held): while a mesh names the models that may be enrolled, no key comes in whose model is not one of
    /// them, and was not proven.
    fn may_be_enrolled(&self, factor: &EnrolledFactor) -> Result<(), FoldError> {
        let (Some(only), Some(key)) = (&self.authenticators, factor.signing_key()) else { return Ok(()) };
        match key.model.is_some_and(|model| only.models.contains(&model)) {
            true => Ok(()),
            false => Err(FoldError::Model(key.model)),
        }
    }

    /// An owner is appointed anew, with this one factor and no other. A seal asks for no more than can still sign, and ends
    /// where nobody can: whoever follows it does not follow this unsigned.
    fn recover(&mut self, recovery: Recovery, id: &FactorId, factor: &EnrolledFactor) -> Result<(), FoldError> {
        if !self.is_protected() {
            return Err(FoldError::NotProtected);
        }
        if recovery.reason.is_empty() || recovery.reason.len() > REASON_BYTES_MAX {
            return Err(FoldError::Reason);
        }
        let mut operators = self.operators.clone();
        let owner = operators.entry(recovery.operator.clone()).or_default();
        owner.roles.insert(OWNER.into());
        owner.factors.clear();
        add_factor(&mut operators, &recovery.operator, id, factor)?;
        let signers = operators.values().filter(|operator| operator.can_sign()).count();
        let quorum = self.seal.map_or(0, |seal| seal.quorum).min(u32::try_from(signers).unwrap_or(u32::MAX));
        self.seal = (quorum > 0).then_some(Seal { quorum });
        (self.operators, self.recovery) = (operators, Some(recovery));
        Ok(())
    }

    fn seal_of(&self, quorum: u32, operators: &BTreeMap<OperatorName, Operator>) -> Result<Seal, FoldError> {
        let signers = operators.values().filter(|operator| operator.can_sign()).count();
        if (1..=QUORUM_MAX).contains(&quorum) && quorum as usize <= signers {
            Ok(Seal { quorum })
        } else {
            Err(FoldError::Quorum { quorum, signers })
        }
    }

    /// Folds a whole change-set, or none of it.
    pub fn apply_all(&self, set: &ChangeSet) -> Result<Self, FoldError> {
        let mut next = self.clone();
        set.changes.iter().try_for_each(|change| next.apply(change))?;
        Ok(next)
    }

    /// SHA-256 of the canonical encoding.
    pub fn digest(&self) -> Digest {
        Digest::of_canonical(self)
    }

    /// The bodies that are in force.
    pub fn bodies(&self) -> impl Iterator<Item = Digest> + '_ {
        let contracts = self.services.values().filter_map(|service| service.spec.contract);
        self.policies.values().chain(self.gate.values()).map(|policy| policy.body).chain(contracts)
    }

    fn free_slot(&self) -> Option<u16> {
        if self.services.len() >= SERVICES_MAX {
            return None;
        }
        let taken: BTreeSet<u16> = self.services.values().map(|service| service.slot).collect();
        let from = usize::from(self.next_slot);
        (from..from + SERVICES_MAX).map(|n| (n % SERVICES_MAX) as u16).find(|slot| !taken.contains(slot))
    }
}

/// Whether an issuer or a pipeline is taken up beside `count` others.
fn taken(change: &Change, name: &str, refusals: Vec<pipeline::Refusal>, count: usize) -> Result<(), FoldError> {
    let refuse = |what: String| Err(FoldError::Pipeline(change.subject(), what));
    if !is_plain_name(name) {
        return refuse(format!("not a name: {PLAIN_NAME}"));
    }
    if count >= PIPELINES_MAX {
        return refuse(format!("a mesh has at most {PIPELINES_MAX} of them"));
    }
    match refusals.into_iter().next() {
        Some(refusal) => refuse(refusal.what),
        None => Ok(()),
    }
}

/// "The credentialId is not yet registered for any user" (Web Authentication, 7.1): nor is any other factor's id.
fn add_factor(
    operators: &mut BTreeMap<OperatorName, Operator>,
    name: &OperatorName,
    id: &FactorId,
    factor: &EnrolledFactor,
) -> Result<(), FoldError> {
    if operators.values().any(|operator| operator.factors.contains_key(id)) {
        return Err(FoldError::Known(format!("factor {id}")));
    }
    let factors = match operators.get_mut(name) {
        Some(operator) => &mut operator.factors,
        None => return Err(FoldError::Unknown(format!("operator {name}"))),
    };
    if factors.len() >= FACTORS_MAX {
        return Err(FoldError::TooManyFactors);
    }
    factors.insert(id.clone(), factor.clone());
    Ok(())
}

/// The loopback address that stands for the service of `slot` inside every workload's namespace: 127.81.1.1 upwards,
/// never `.0` or `.255` in the last place.
pub fn loopback(slot: u16) -> Ipv4Addr {
    Ipv4Addr::new(127, 81, (slot / 254) as u8 + 1, (slot % 254) as u8 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Protocol;

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn declare(given: &str) -> Change {
        Change::DeclareService { name: name(given), spec: ServiceSpec::new(Protocol::Http) }
    }

    fn created() -> MeshState {
        let mut state = MeshState::default();
        state.apply(&Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }).unwrap();
        state
    }

    #[test]
    fn nothing_precedes_the_creation_of_the_mesh_and_it_happens_once() {
        assert_eq!(MeshState::default().apply(&declare("web")), Err(FoldError::NotCreated));
        let again = Change::CreateMesh { trust_domain: TrustDomain::parse("other.example").unwrap() };
        assert!(matches!(created().apply(&again), Err(FoldError::CreatedTwice(_))));
    }

    #[test]
    fn a_service_is_let_in_and_taken_out_by_what_fits_its_standing_and_an_active_one_is_written_as_ever() {
        let mut state = created();
        state.apply(&declare("web")).unwrap();
        let written = serde_json::to_string(&state).unwrap();
        assert!(!written.contains("barred"), "the digests of older histories stay: {written}");
        let name = || name("web");
        let suspend = |reason: &str| Change::SuspendService { name: name(), reason: reason.into() };
        let (quarantine, approve) =
            (Change::QuarantineService { name: name() }, Change::ApproveService { name: name() });
        let resume = Change::ResumeService { name: name() };
        let refused = |state: &mut MeshState, change: &Change| {
            let before = state.clone();
            let why = state.apply(change).unwrap_err().to_string();
            assert_eq!(*state, before);
            why
        };
        assert_eq!(refused(&mut state, &approve), "service web is active: there is nothing to lift");
        assert_eq!(refused(&mut state, &resume), "service web is active: there is nothing to lift");
        state.apply(&quarantine).unwrap();
        assert!(!state.is_active(&name()));
        assert_eq!(refused(&mut state, &quarantine), "service web is quarantined: it is no part of the mesh already");
        assert_eq!(refused(&mut state, &suspend("x")), "service web is quarantined: it is no part of the mesh already");
        assert_eq!(refused(&mut state, &resume), "service web is quarantined: it is approved, not resumed");
        state.apply(&approve).unwrap();
        assert_eq!(serde_json::to_string(&state).unwrap(), written);
        assert!(refused(&mut state, &suspend("")).contains("gives its reason"));
        assert!(refused(&mut state, &suspend(&"x".repeat(REASON_BYTES_MAX + 1))).contains("gives its reason"));
        state.apply(&suspend("a leak")).unwrap();
        assert_eq!(refused(&mut state, &approve), "service web is suspended: resume it first");
        assert_eq!(refused(&mut state, &quarantine), "service web is suspended: resume it first");
        state.apply(&resume).unwrap();
        assert!(state.is_active(&name()));
        state.apply(&quarantine).unwrap();
        state.apply(&Change::RemoveService { name: name() }).unwrap();
        assert!(state.barred.is_empty() && !state.is_active(&name()));
        for change in [quarantine, approve, suspend("x"), resume] {
            assert!(matches!(state.apply(&change), Err(FoldError::Unknown(_))), "{}", change.kind());
        }
    }

    #[test]
    fn an_edge_is_approved_once_between_those_that_are_there_and_goes_with_them() {
        let mut state = created();
        for service in ["web", "catalog", "cron"] {
            state.apply(&declare(service)).unwrap();
        }
        let written = serde_json::to_string(&state).unwrap();
        assert!(!written.contains("edges"), "the digests of older histories stay: {written}");
        let edge = |caller: &str, operation: Option<&str>| Edge {
            caller: Member::try_from(caller.to_owned()).unwrap(),
            operation: operation.map(Into::into),
        };
        let approve = |edge: &Edge, service: &str| Change::ApproveEdge { service: name(service), edge: edge.clone() };
        let revoke = |edge: &Edge, service: &str| Change::RevokeEdge { service: name(service), edge: edge.clone() };
        let (one, all, foreign) =
            (edge("web", Some("getItem")), edge("cron", None), edge("spiffe://other.example/web", None));
        for change in [approve(&one, "catalog"), approve(&all, "catalog"), approve(&foreign, "web")] {
            let json = serde_json::to_string(&change).unwrap();
            assert_eq!(serde_json::from_str::<Change>(&json).unwrap(), change, "{json}");
            state.apply(&change).unwrap();
        }
        let is_approved = |state: &MeshState, caller: &str, way: &str| {
            state.is_approved(&name("catalog"), &Member::try_from(caller.to_owned()).unwrap(), way)
        };
        assert!(is_approved(&state, "web", "getItem") && !is_approved(&state, "web", "listItems"));
        assert!(is_approved(&state, "cron", "listItems") && !is_approved(&state, "catalog", "getItem"));
        for (change, expected) in [
            (approve(&one, "catalog"), "edge web getItem to catalog: it is approved already"),
            (approve(&one, "gone"), "edge web getItem to gone: the service is not declared"),
            (approve(&edge("gone", None), "web"), "edge gone to web: the caller is not declared"),
            (
                approve(&edge("spiffe://shop.example/web", None), "web"),
                "edge spiffe://shop.example/web to web: a service of this mesh is called by its name",
            ),
            (approve(&edge("web", Some("")), "web"), "edge web  to web: an operation has 1 to 1024 printable bytes"),
            (
                approve(&edge("web", Some("a\nb")), "web"),
                "edge web a\nb to web: an operation has 1 to 1024 printable bytes",
            ),
            (revoke(&edge("web", None), "catalog"), "edge web to catalog does not exist"),
            (revoke(&one, "cron"), "edge web getItem to cron does not exist"),
        ] {
            let before = state.clone();
            assert_eq!(state.apply(&change).unwrap_err().to_string(), expected);
            assert_eq!(state, before);
        }
        let many = (0..EDGES_MAX).map(|n| edge("web", Some(&n.to_string())));
        state.edges.insert(name("cron"), many.collect());
        assert!(state.apply(&approve(&one, "cron")).unwrap_err().to_string().contains("4096 already"));
        state.apply(&Change::RemoveService { name: name("cron") }).unwrap();
        assert_eq!(state.edges[&name("catalog")], [one.clone()].into(), "whoever is called so later is somebody else");
        state.apply(&revoke(&one, "catalog")).unwrap();
        state.apply(&Change::RemoveService { name: name("web") }).unwrap();
        assert!(state.edges.is_empty());
    }

    #[test]
    fn a_removed_services_address_is_not_given_to_the_next_one() {
        let mut state = created();
        state.apply(&declare("a")).unwrap();
        state.apply(&declare("b")).unwrap();
        state.apply(&Change::RemoveService { name: name("a") }).unwrap();
        state.apply(&declare("c")).unwrap();
        assert_eq!(state.services[&name("b")].slot, 1);
        assert_eq!(state.services[&name("c")].slot, 2);
        state.next_slot = SERVICES_MAX as u16;
        state.apply(&declare("d")).unwrap();
        assert_eq!(state.services[&name("d")].slot, 0, "after the last slot the first free one comes round again");
    }

    #[test]
    fn a_list_of_authenticators_names_models_and_who_vouches_for_them_and_a_mesh_without_one_is_written_as_ever() {
        use crate::assurance::authenticators::{Aaguid, AttestationRoot, tests::ROOT};
        let models = [Aaguid::parse("ee882879-721c-4913-9775-3dfcce97072a").unwrap()].into();
        let roots = AttestationRoot::parse_pem(ROOT).unwrap();
        let list = Authenticators { models, roots };
        let set = |authenticators: Authenticators| Change::SetAuthenticators { authenticators };
        let mut state = created();
        let before = (state.digest(), serde_json::to_string(&state).unwrap());
        assert!(!before.1.contains("authenticators"));
        for (given, expected) in [
            (set(Authenticators { models: [].into(), ..list.clone() }), Err(FoldError::Authenticators)),
            (set(Authenticators { roots: [].into(), ..list.clone() }), Err(FoldError::Authenticators)),
            (Change::RemoveAuthenticators {}, Err(FoldError::Unknown("authenticators".into()))),
            (set(list.clone()), Ok(())),
        ] {
            assert_eq!(state.apply(&given), expected);
        }
        assert_eq!(state.authenticators, Some(list.clone()));
        let written = serde_json::to_string(&set(list.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&written).unwrap(), set(list));
        state.apply(&Change::RemoveAuthenticators {}).unwrap();
        assert_eq!((state.digest(), serde_json::to_string(&state).unwrap()), before);
    }

    #[test]
    fn a_key_comes_in_only_with_a_model_of_the_list_and_codes_and_keys_from_before_it_do_as_ever() {
        use crate::assurance::authenticators::{Aaguid, AttestationRoot, tests::ROOT};
        let model = |last: u8| Aaguid::parse(&format!("ee882879-721c-4913-9775-3dfcce9707{last:02x}")).unwrap();
        let roots = AttestationRoot::parse_pem(ROOT).unwrap();
        let list = Change::SetAuthenticators { authenticators: Authenticators { models: [model(1)].into(), roots } };
        let of = |model: Option<Aaguid>| {
            let (id, factor) = factor("Ag");
            let EnrolledFactor::Roaming(key) = factor else { unreachable!() };
            (id, EnrolledFactor::Roaming(crate::operator::SigningKey { model, ..key }))
        };
        let start = [invite("alice"), enroll("alice", "AQ"), list];
        for (given, expected) in [
            (of(None), Err(FoldError::Model(None))),
            (of(Some(model(2))), Err(FoldError::Model(Some(model(2))))),
            (of(Some(model(1))), Ok(())),
            ((FactorId::parse("totp-1").unwrap(), EnrolledFactor::Totp), Ok(())),
        ] {
            let (id, factor) = given;
            let (more, name) = (Change::AddFactor { operator: operator("alice"), id, factor }, operator("bob"));
            let first = match more.clone() {
                Change::AddFactor { id, factor, .. } => Change::EnrollOperator { name, id, factor },
                _ => unreachable!(),
            };
            for change in [vec![more], vec![invite("bob"), first]] {
                assert_eq!(folded(&[&start[..], &change].concat()).map(drop), expected, "{change:?}");
            }
        }
    }

    #[test]
    fn lifetimes_are_bounded_and_a_mesh_that_says_nothing_is_written_as_ever() {
        let mut state = created();
        let before = (state.digest(), serde_json::to_string(&state).unwrap());
        let set = |svid_seconds, intermediate_days, root_days| Change::SetLifetimes {
            lifetimes: Lifetimes { svid_seconds, intermediate_days, root_days },
        };
        for (given, expected) in [
            (set(299, 90, 3650), Err(FoldError::Lifetimes)),
            (set(86_401, 90, 3650), Err(FoldError::Lifetimes)),
            (set(3600, 6, 3650), Err(FoldError::Lifetimes)),
            (set(3600, 366, 3650), Err(FoldError::Lifetimes)),
            (set(3600, 7, 89), Err(FoldError::Lifetimes)),
            (set(3600, 90, 7301), Err(FoldError::Lifetimes)),
            (set(3600, 90, 179), Err(FoldError::Lifetimes)),
            (Change::RemoveLifetimes {}, Err(FoldError::Unknown("lifetimes".into()))),
            (set(300, 45, 90), Ok(())),
            (set(86_400, 365, 7300), Ok(())),
        ] {
            assert_eq!(state.apply(&given), expected, "{given:?}");
        }
        assert_eq!(state.lifetimes().svid_seconds, 86_400);
        state.apply(&Change::RemoveLifetimes {}).unwrap();
        assert_eq!((state.digest(), serde_json::to_string(&state).unwrap()), before);
        assert!(Lifetimes::default().are_bounded() && state.lifetimes() == Lifetimes::default());
    }

    #[test]
    fn redeclaring_keeps_the_address() {
        let mut state = created();
        state.apply(&declare("a")).unwrap();
        let spec = ServiceSpec::new(Protocol::Tcp);
        state.apply(&Change::DeclareService { name: name("a"), spec: spec.clone() }).unwrap();
        assert_eq!(state.services[&name("a")], Service { spec, slot: 0 });
    }

    #[test]
    fn a_change_set_folds_whole_or_not_at_all() {
        let state = created();
        let set = ChangeSet {
            base: Default::default(),
            changes: vec![declare("a"), Change::RemovePolicy { id: "nothing".into() }],
        };
        assert_eq!(state.apply_all(&set), Err(FoldError::Unknown("policy nothing".into())));
        assert_eq!(state, created());
    }

    #[test]
    fn every_slot_has_its_own_address_in_the_loopback_range() {
        let all: BTreeSet<_> = (0..SERVICES_MAX as u16).map(loopback).collect();
        assert_eq!(all.len(), SERVICES_MAX);
        assert!(all.iter().all(|a| a.octets()[..2] == [127, 81] && !matches!(a.octets()[3], 0 | 255)));
    }

    fn operator(given: &str) -> OperatorName {
        OperatorName::parse(given).unwrap()
    }

    fn invite(given: &str) -> Change {
        Change::InviteOperator { name: operator(given), roles: ["owner".into()].into() }
    }

    fn factor(id: &str) -> (FactorId, EnrolledFactor) {
        let cose = "a4010103272006215820d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        let key = crate::assurance::webauthn::PublicKey::parse(&hex::decode(cose).unwrap()).unwrap();
        let relying_party = crate::assurance::webauthn::RelyingParty {
            id: "mesh.example".into(),
            origins: vec!["https://mesh.example".into()],
        };
        let key = crate::operator::SigningKey { key, backup_eligible: false, relying_party, model: None };
        (FactorId::parse(id).unwrap(), EnrolledFactor::Roaming(key))
    }

    fn enroll(given: &str, id: &str) -> Change {
        let (id, factor) = factor(id);
        Change::EnrollOperator { name: operator(given), id, factor }
    }

    fn add(given: &str, id: &str) -> Change {
        let (id, factor) = factor(id);
        Change::AddFactor { operator: operator(given), id, factor }
    }

    fn remove(given: &str, id: &str) -> Change {
        Change::RemoveFactor { operator: operator(given), id: FactorId::parse(id).unwrap() }
    }

    fn folded(changes: &[Change]) -> Result<MeshState, FoldError> {
        created().apply_all(&ChangeSet { base: Default::default(), changes: changes.to_vec() })
    }

    #[test]
    fn the_encoding_of_a_state_without_operators_is_what_it_was_before_there_were_any() {
        let mut state = created();
        state.apply(&declare("a")).unwrap();
        expect_test::expect![[r#"{"next_slot":1,"policies":{},"roles":{},"routes":{},"services":{"a":{"slot":0,"spec":{"exchanges_max":10000,"max_staleness_seconds":300,"port":80,"protocol":"http","recorded":"best_effort"}}},"trust_domain":"shop.example"}"#]]
            .assert_eq(&String::from_utf8(crate::canonical::encode(&state)).unwrap());
    }

    #[test]
    fn the_encoding_of_an_operator_never_changes() {
        let state = folded(&[invite("alice"), enroll("alice", "AQ"), Change::SealSettings { quorum: 1 }]).unwrap();
        assert!(state.is_protected());
        let encoded = crate::canonical::encode(&(&state.operators, &state.seal));
        expect_test::expect![[r#"[{"alice":{"factors":{"AQ":{"backup_eligible":false,"key":"pAEBAycgBiFYINdamAGCsQq31Uv-08lkBzoO4XLz2qYjJa8CGmj3B1Ea","kind":"roaming","relying_party":{"id":"mesh.example","origins":["https://mesh.example"]}}},"roles":["owner"]}},{"quorum":1}]"#]]
            .assert_eq(&String::from_utf8(encoded).unwrap());
    }

    /// PROVES (no-way-back)
    #[test]
    fn changes_of_operators_that_do_not_follow_are_refused_and_nobody_is_locked_out_or_let_in() {
        let totp = Change::AddFactor {
            operator: operator("alice"),
            id: FactorId::parse("totp").unwrap(),
            factor: EnrolledFactor::Totp,
        };
        let alice = [invite("alice"), enroll("alice", "AQ")];
        let gone = |given| Change::RemoveOperator { name: operator(given) };
        let seal = |quorum| Change::SealSettings { quorum };
        let unknown = |what: &str| Err(FoldError::Unknown(what.into()));
        let full: Vec<_> = (0..FACTORS_MAX).map(|n| add("alice", &format!("f{n}"))).collect();
        for (case, then, expected) in [
            ("twice", &[invite("alice")][..], Err(FoldError::Known("operator alice".into()))),
            ("enrolled twice", &[enroll("alice", "Ag")], Err(FoldError::Enrolled(operator("alice")))),
            ("a stranger", &[enroll("bob", "Ag")], unknown("operator bob")),
            ("a factor of a stranger", &[add("bob", "Ag")], unknown("operator bob")),
            ("a factor twice", &[add("alice", "AQ")], Err(FoldError::Known("factor AQ".into()))),
            ("the factor of another", &[invite("bob"), enroll("bob", "AQ")], Err(FoldError::Known("factor AQ".into()))),
            ("too many factors", &full, Err(FoldError::TooManyFactors)),
            ("a factor that is not there", &[remove("alice", "Ag")], unknown("factor Ag of operator alice")),
            ("the last factor", &[remove("alice", "AQ")], Err(FoldError::NobodyLeft)),
            ("the last operator", &[gone("alice")], Err(FoldError::NobodyLeft)),
            ("the last, beside one who never enrolled", &[invite("bob"), gone("alice")], Err(FoldError::NobodyLeft)),
            ("the last factor, after another", &[add("alice", "Ag"), remove("alice", "AQ")], Ok(())),
            ("one of two", &[invite("bob"), enroll("bob", "Ag"), gone("alice")], Ok(())),
            ("a seal of nobody", &[seal(0)], Err(FoldError::Quorum { quorum: 0, signers: 1 })),
            ("a seal of more than there are", &[seal(2)], Err(FoldError::Quorum { quorum: 2, signers: 1 })),
            (
                "a seal, and the key gone",
                &[seal(1), totp.clone(), remove("alice", "AQ")],
                Err(FoldError::Quorum { quorum: 1, signers: 0 }),
            ),
            ("no seal, and the key gone", &[totp, remove("alice", "AQ")], Ok(())),
            (
                "roles",
                &[Change::SetOperatorRoles { name: operator("alice"), roles: ["auditor".into()].into() }],
                Ok(()),
            ),
        ] {
            assert_eq!(folded(&[&alice[..], then].concat()).map(|_| ()), expected, "{case}");
        }
        assert!(!folded(&[invite("alice")]).unwrap().is_protected(), "invited is not enrolled");
    }

    #[test]
    fn only_pipelines_that_are_matched_by_ids_fold_and_old_histories_keep_their_digests() {
        let issuer = |url: &str| Change::SetIssuer {
            name: "ci".into(),
            issuer: Issuer { url: url.into(), audience: "mesh".into() },
        };
        let pipeline = |named: &str, claim: &str| Change::SetPipeline {
            name: named.into(),
            pipeline: Pipeline {
                issuer: "ci".into(),
                claims: [(claim.to_owned(), "7".to_owned())].into(),
                roles: BTreeSet::new(),
            },
        };
        let trusted = issuer("https://ci.example");
        for (case, changes, refused) in [
            ("an id", vec![trusted.clone(), pipeline("deploy", "project_id")], None),
            ("again", vec![trusted.clone(), pipeline("deploy", "project_id"), pipeline("deploy", "sub")], None),
            (
                "a name",
                vec![trusted.clone(), pipeline("deploy", "project_path")],
                Some("pipeline deploy: a project is"),
            ),
            ("no name for it", vec![trusted, pipeline("a b", "project_id")], Some("pipeline a b: not a name")),
            ("in the clear", vec![issuer("http://ci.example")], Some("issuer ci: an issuer is an https URL")),
            ("gone", vec![Change::RemovePipeline { name: "deploy".into() }], Some("pipeline deploy does not exist")),
        ] {
            let told = folded(&changes).map(|_| ()).map_err(|error| error.to_string());
            match refused {
                None => assert_eq!(told, Ok(()), "{case}"),
                Some(what) => assert!(told.clone().unwrap_err().starts_with(what), "{case}: {told:?}"),
            }
        }
        let gone = [issuer("https://ci.example"), Change::RemoveIssuer { name: "ci".into() }];
        assert_eq!(folded(&gone).unwrap().digest(), created().digest());
    }

    #[test]
    fn a_sign_in_folds_with_its_groups_and_a_history_without_one_keeps_its_digest() {
        let set = |named: &str, client_id: &str| Change::SetSignIn {
            name: named.into(),
            sign_in: SignIn {
                issuer: "corp".into(),
                client_id: client_id.into(),
                groups_claim: "groups".into(),
                roles: [("mesh-editors".to_owned(), ["editor".into()].into())].into(),
            },
        };
        let gone = Change::RemoveSignIn { name: "corp".into() };
        assert!(folded(&[set("corp", "")]).unwrap_err().to_string().starts_with("sign-in corp: a client id"));
        assert!(folded(&[set("corp:x", "mesh")]).unwrap_err().to_string().contains("not a name"));
        assert!(folded(&[set("pipeline", "mesh")]).unwrap_err().to_string().contains("taken for somebody else"));
        assert_eq!(folded(std::slice::from_ref(&gone)).unwrap_err(), FoldError::Unknown("sign-in corp".into()));
        let many: Vec<Change> = (0..=SIGN_INS_MAX).map(|n| set(&format!("corp{n}"), "mesh")).collect();
        assert!(folded(&many).unwrap_err().to_string().contains("at most 16"));
        assert_eq!(folded(&many[1..]).unwrap().sign_ins.len(), SIGN_INS_MAX);
        assert_eq!(folded(&[set("corp", "mesh"), gone]).unwrap().digest(), created().digest());
    }

    #[test]
    fn a_recovery_leaves_one_factor_of_one_owner_and_a_seal_that_somebody_can_meet() {
        let enrol = |whose: &str, id: &str, factor: EnrolledFactor| {
            let (name, id) = (operator(whose), FactorId::parse(id).unwrap());
            [
                Change::InviteOperator { name: name.clone(), roles: ["editor".into()].into() },
                Change::EnrollOperator { name, id, factor },
            ]
        };
        let recover = |whose: &str, reason: &str| Change::Recover {
            operator: operator(whose),
            id: FactorId::parse("new").unwrap(),
            factor: EnrolledFactor::Totp,
            reason: reason.into(),
            at_seconds: 7,
        };
        assert_eq!(folded(&[recover("alice", "lost")]).unwrap_err(), FoldError::NotProtected);
        let alice = enrol("alice", "a", EnrolledFactor::Totp);
        assert_eq!(folded(&[&alice[..], &[recover("alice", "")]].concat()).unwrap_err(), FoldError::Reason);
        let long = "x".repeat(REASON_BYTES_MAX + 1);
        assert_eq!(folded(&[&alice[..], &[recover("alice", &long)]].concat()).unwrap_err(), FoldError::Reason);
        let state = folded(&[&alice[..], &[recover("alice", "lost")]].concat()).unwrap();
        let recovered = &state.operators[&operator("alice")];
        assert_eq!(recovered.factors.keys().map(FactorId::as_str).collect::<Vec<_>>(), ["new"]);
        assert_eq!(recovered.roles, [OWNER.into(), "editor".into()].into());
        assert_eq!(state.recovery.as_ref().map(|told| (&*told.reason, told.at_seconds)), Some(("lost", 7)));
        let state = folded(&[&alice[..], &[recover("carol", "new here")]].concat()).unwrap();
        assert_eq!(state.operators.len(), 2, "somebody new can be appointed, and the others keep what they have");
    }

    #[test]
    fn a_deployment_is_of_a_service_and_ends_with_it() {
        let deploy = |artifacts: &[&[u8]]| Change::Deploy {
            service: name("a"),
            artifacts: artifacts.iter().map(|bytes| Digest::of(bytes)).collect(),
        };
        assert_eq!(folded(&[deploy(&[b"1"])]).unwrap_err(), FoldError::Unknown("deployment of service a".into()));
        assert_eq!(folded(&[declare("a"), deploy(&[])]).unwrap_err(), FoldError::Artifacts);
        let state = folded(&[declare("a"), deploy(&[b"1"]), deploy(&[b"1", b"2"])]).unwrap();
        assert_eq!(state.deployments[&name("a")].len(), 2);
        let state = folded(&[declare("a"), deploy(&[b"1"]), Change::RemoveService { name: name("a") }]).unwrap();
        assert!(state.deployments.is_empty());
    }

    #[test]
    fn the_texts_of_the_change_gate_are_in_force_like_those_of_the_request_gate() {
        let body = Digest::of(b"text");
        let set = Change::SetGatePolicy { id: "owners".into(), file: "gate/owners.cedar".into(), body };
        let state = folded(std::slice::from_ref(&set)).unwrap();
        assert_eq!(state.bodies().collect::<Vec<_>>(), [body]);
        let gone = Change::RemoveGatePolicy { id: "owners".into() };
        assert_eq!(folded(&[set, gone.clone()]).unwrap(), created());
        assert_eq!(folded(&[gone]).unwrap_err(), FoldError::Unknown("gate policy owners".into()));
    }
}
