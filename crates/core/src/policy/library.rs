//! One policy text, parsed and strictly validated once: its scope, its obligation, and what its conditions read.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use cedar_policy_core::ast::{
    self, ActionConstraint, AnyId, Effect, EntityReference, EntityUID, Expr, PrincipalOrResourceConstraint,
};

use super::{
    Factor, JudgedBy, Mistake, Obligation, Reads, file,
    reads::{self, Hierarchy},
    schema::ACTIONS,
};
use crate::{
    canonical::Digest, change::PolicyId, contract::Contract, identity::ServiceName, service::ServiceSpec,
    state::MeshState,
};

/// Parsed policy texts and contracts by digest, kept across revisions so that a change costs what changed.
#[derive(Default)]
pub struct Library {
    by_digest: HashMap<Digest, Arc<ParsedPolicy>>,
    contracts: HashMap<Digest, Contract>,
}

/// One policy text, parsed once. INVARIANT (validated-before-evaluated): only [`ParsedPolicy::parse`] makes one, and
/// it refuses what the strict validator refuses.
#[derive(Debug)]
pub struct ParsedPolicy {
    id: PolicyId,
    text: Arc<str>,
    pub(super) policy: ast::Policy,
    pub(super) principal: PrincipalScope,
    pub(super) actions: ActionSet,
    pub(super) resource: ResourceScope,
    pub(super) obligation: Option<Obligation>,
    pub(super) reads: Reads,
    pub(super) hierarchy: Hierarchy,
}

/// Which principals a scope lets through. Every principal of a query is a workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PrincipalScope {
    Any,
    Workload(Box<str>),
    Role(Box<str>),
    Never,
}

/// Which resources a scope lets through. Every resource of a query is an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ResourceScope {
    Any,
    Operation(Box<str>),
    Service(Box<str>),
    Namespace(Box<str>),
    Sensitivity(Box<str>),
    Never,
}

/// A set of actions, by their numbers in the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ActionSet(u32);

impl Library {
    /// Parses and strictly validates `text` unless its digest is known, and returns it. The error names every mistake.
    pub fn insert(&mut self, digest: Digest, text: &Arc<str>) -> Result<Arc<ParsedPolicy>, String> {
        if let Some(known) = self.by_digest.get(&digest) {
            return Ok(known.clone());
        }
        let parsed = ParsedPolicy::parse(text)
            .map_err(|mistakes| mistakes.iter().map(|mistake| mistake.what.as_str()).collect::<Vec<_>>().join("; "))?;
        let parsed = Arc::new(parsed);
        self.by_digest.insert(digest, parsed.clone());
        Ok(parsed)
    }

    /// The parsed policy of `digest`.
    pub fn get(&self, digest: &Digest) -> Option<&Arc<ParsedPolicy>> {
        self.by_digest.get(digest)
    }

    /// Reads the contract `text` unless its digest is known, and returns it.
    pub fn insert_contract(&mut self, digest: Digest, text: &str) -> Result<&Contract, String> {
        match self.contracts.entry(digest) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(Contract::of_body(text)?)),
        }
    }

    /// The contract of `digest`.
    pub fn contract(&self, digest: &Digest) -> Option<&Contract> {
        self.contracts.get(digest)
    }

    /// Takes up every policy of the request gate and every contract of `state` whose text `text_of` has. Those of the change
    /// gate are no policies of requests.
    pub fn take_up<'b>(
        &mut self,
        state: &MeshState,
        text_of: impl Fn(&Digest) -> Option<&'b Arc<str>>,
    ) -> Result<(), String> {
        for policy in state.policies.values() {
            if let Some(text) = text_of(&policy.body) {
                self.insert(policy.body, text)?;
            }
        }
        for (name, service) in &state.services {
            if let Some((digest, text)) = service.spec.contract.and_then(|digest| Some((digest, text_of(&digest)?))) {
                self.insert_contract(digest, text).map_err(|what| format!("service `{name}`: {what}"))?;
            }
        }
        Ok(())
    }

    /// Forgets all but those that `keep` says are in force.
    pub fn retain(&mut self, keep: impl Fn(&Digest) -> bool) {
        self.by_digest.retain(|digest, _| keep(digest));
        self.contracts.retain(|digest, _| keep(digest));
    }
}

impl ParsedPolicy {
    /// Parses a text that holds one policy, and validates it strictly against the schema. Whether the roles and
    /// services it names exist is another question: [`super::validate`] answers it.
    pub fn parse(text: &Arc<str>) -> Result<Self, Vec<Mistake>> {
        let (policy, id) = file::one_policy(JudgedBy::RequestGate, text)?;
        let obligation = obligation(&policy);
        let (reads, hierarchy) = policy.non_scope_constraints().map(reads::of).unwrap_or_default();
        Ok(Self {
            id,
            text: text.clone(),
            principal: principal_scope(policy.principal_constraint().as_inner()),
            actions: action_set(policy.action_constraint()),
            resource: resource_scope(policy.resource_constraint().as_inner()),
            obligation,
            reads,
            hierarchy,
            policy,
        })
    }

    /// Its `@id`.
    pub fn id(&self) -> &PolicyId {
        &self.id
    }

    /// The Cedar text.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// Whether it permits; otherwise it forbids.
    pub fn permits(&self) -> bool {
        self.policy.effect() == Effect::Permit
    }

    /// What its conditions read.
    pub fn reads(&self) -> Reads {
        self.reads
    }

    /// What lifts it, when it is an annotated forbid.
    pub fn obligation(&self) -> Option<Obligation> {
        self.obligation
    }

    /// Whether its resource scope can match an operation of `service`.
    pub fn concerns(&self, service: &ServiceName, spec: &ServiceSpec) -> bool {
        match &self.resource {
            ResourceScope::Any => true,
            ResourceScope::Operation(operation) => path_of(operation, service.as_str()).is_some(),
            ResourceScope::Service(name) => **name == *service.as_str(),
            ResourceScope::Namespace(name) => spec.namespace.as_deref() == Some(name),
            ResourceScope::Sensitivity(name) => spec.sensitivity.as_deref() == Some(name),
            ResourceScope::Never => false,
        }
    }

    /// Whether its principal scope is this service.
    pub fn names_caller(&self, service: &ServiceName) -> bool {
        matches!(&self.principal, PrincipalScope::Workload(name) if **name == *service.as_str())
    }

    /// The conditions as one expression; `None` when scope is all it asks for.
    pub(super) fn condition(&self) -> Option<&Expr> {
        self.policy.non_scope_constraints()
    }
}

impl ActionSet {
    pub(super) const ALL: Self = Self((1 << ACTIONS.len()) - 1);
    pub(super) const NONE: Self = Self(0);

    pub(super) fn contains(self, number: u8) -> bool {
        self.0 >> number & 1 == 1
    }

    pub(super) fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(super) fn of(matches: impl Fn(&str, Option<&str>) -> bool) -> Self {
        let bits = ACTIONS.iter().enumerate().filter(|(_, (name, group))| matches(name, *group));
        Self(bits.fold(0, |set, (at, _)| set | 1 << at))
    }
}

/// The path of an operation's id, when it is one of `service`.
pub(super) fn path_of<'a>(operation: &'a str, service: &str) -> Option<&'a str> {
    operation.strip_prefix(service).filter(|path| path.starts_with('/'))
}

fn principal_scope(constraint: &PrincipalOrResourceConstraint) -> PrincipalScope {
    let kind_of = |uid: &EntityUID| uid.entity_type().to_string();
    match constraint {
        PrincipalOrResourceConstraint::Any => PrincipalScope::Any,
        PrincipalOrResourceConstraint::Is(kind) if kind.to_string() == "Workload" => PrincipalScope::Any,
        PrincipalOrResourceConstraint::Eq(EntityReference::EUID(uid)) if kind_of(uid) == "Workload" => {
            PrincipalScope::Workload(eid(uid))
        }
        PrincipalOrResourceConstraint::In(EntityReference::EUID(uid)) => match kind_of(uid).as_str() {
            // An entity is in itself.
            "Workload" => PrincipalScope::Workload(eid(uid)),
            "Role" => PrincipalScope::Role(eid(uid)),
            _ => PrincipalScope::Never,
        },
        PrincipalOrResourceConstraint::IsIn(kind, within) if kind.to_string() == "Workload" => {
            principal_scope(&PrincipalOrResourceConstraint::In(within.clone()))
        }
        _ => PrincipalScope::Never,
    }
}

fn resource_scope(constraint: &PrincipalOrResourceConstraint) -> ResourceScope {
    let kind_of = |uid: &EntityUID| uid.entity_type().to_string();
    match constraint {
        PrincipalOrResourceConstraint::Any => ResourceScope::Any,
        PrincipalOrResourceConstraint::Is(kind) if kind.to_string() == "Operation" => ResourceScope::Any,
        PrincipalOrResourceConstraint::Eq(EntityReference::EUID(uid)) if kind_of(uid) == "Operation" => {
            ResourceScope::Operation(eid(uid))
        }
        PrincipalOrResourceConstraint::In(EntityReference::EUID(uid)) => match kind_of(uid).as_str() {
            "Operation" => ResourceScope::Operation(eid(uid)),
            "Service" => ResourceScope::Service(eid(uid)),
            "Namespace" => ResourceScope::Namespace(eid(uid)),
            "Sensitivity" => ResourceScope::Sensitivity(eid(uid)),
            _ => ResourceScope::Never,
        },
        PrincipalOrResourceConstraint::IsIn(kind, within) if kind.to_string() == "Operation" => {
            resource_scope(&PrincipalOrResourceConstraint::In(within.clone()))
        }
        _ => ResourceScope::Never,
    }
}

fn action_set(constraint: &ActionConstraint) -> ActionSet {
    match constraint {
        ActionConstraint::Any => ActionSet::ALL,
        ActionConstraint::Eq(uid) => ActionSet::of(|name, _| uid.eid().as_ref() == name),
        ActionConstraint::In(uids) => ActionSet::of(|name, group| {
            uids.iter().any(|uid| uid.eid().as_ref() == name || Some(uid.eid().as_ref()) == group)
        }),
    }
}

fn eid(uid: &EntityUID) -> Box<str> {
    let eid: &str = uid.eid().as_ref();
    eid.into()
}

/// The value of an annotation.
pub(crate) fn annotation<'a>(policy: &'a ast::Policy, name: &str) -> Option<&'a str> {
    let name: AnyId = name.parse().ok()?;
    policy.annotation(&name).map(|annotation| annotation.val.as_str())
}

/// `file::one_policy` refused what does not parse here.
pub(crate) fn obligation(policy: &ast::Policy) -> Option<Obligation> {
    let factor = annotation(policy, "step_up").and_then(Factor::parse);
    let max_age_seconds = annotation(policy, "max_age").and_then(|seconds| seconds.parse().ok());
    (factor.is_some() || max_age_seconds.is_some()).then_some(Obligation { factor, max_age_seconds })
}
