//! The policies of one view, indexed by principal, action and resource, and the decision.
//!
//! A scope is decided by the index, exactly and once per place; Cedar's evaluator sees only the conditions of the
//! policies whose scope holds. A property test holds its answers to those of Cedar's authorizer over the whole set.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use cedar_policy_core::{
    ast::{Context as CedarContext, Entity, EntityUID, EntityUIDEntry, Literal, Request, SlotEnv, Value, ValueKind},
    entities::{Entities, NoEntitiesSchema, TCComputation},
    evaluator::{Evaluator, RestrictedEvaluator},
    extensions::Extensions,
};
use hashbrown::HashMap;
use rustc_hash::{FxBuildHasher, FxHashMap};
use smallvec::SmallVec;

use super::{
    Action, Decision, Library, Obligation, ParsedPolicy, PolicyError, Query, Reads,
    library::{PrincipalScope, ResourceScope, path_of},
    reads::Hierarchy,
    schema::{ACTION_UIDS, ACTIONS, TYPES, number, uid},
};
use crate::{
    canonical::Digest,
    change::Edge,
    contract::{Contract, Matcher},
    identity::{RESERVED_SEGMENT, ServiceName, SpiffeId, TrustDomain},
    record::{Outcome, Reason, push_way},
    service::{FirstContact, Protocol, Tokens},
    view::View,
};

/// The policies of one view, compiled for deciding. It never changes and can be shared by any number of threads; what
/// each of them remembers is its own [`super::Judge`].
pub struct Law {
    trust_domain: TrustDomain,
    service: ServiceName,
    declared: bool,
    pub(super) policies: Vec<Compiled>,
    by_scope: FxHashMap<(PrincipalKey, PathKey), Vec<u32>>,
    paths: HashMap<Box<str>, PathKey, FxBuildHasher>,
    classes_by_workload: HashMap<Box<str>, u32, FxBuildHasher>,
    classes: Vec<Class>,
    entities: EntitiesOfLaw,
    contract: Option<Enforced>,
    /// The services that are let in by no policy.
    barred: HashSet<Box<str>, FxBuildHasher>,
    pub(super) protocol: Protocol,
    tokens: Tokens,
    /// The edges that are open, where the service holds every other.
    open: Option<OpenEdges>,
}

/// The approved edges of a service, by caller as policies name it.
#[derive(Default)]
struct OpenEdges(HashMap<Box<str>, Ways, FxBuildHasher>);

/// In which ways one caller may come.
#[derive(Default)]
struct Ways {
    any: bool,
    named: HashSet<Arc<str>, FxBuildHasher>,
}

/// The contract of the service, made ready for deciding. All of it is found by the place of an operation.
struct Enforced {
    matcher: Matcher,
    names: Vec<Arc<str>>,
    methods: Vec<Arc<str>>,
    entities: Vec<Arc<EntityUID>>,
    /// The number of the operation, when some scope names it.
    keys: Vec<PathKey>,
}

/// A policy of the law. Their order is that of their ids.
pub(super) struct Compiled {
    pub(super) file: Arc<str>,
    pub(super) parsed: Arc<ParsedPolicy>,
    /// Whether its resource scope lets operations of this service through at all.
    pub(super) concerns: bool,
}

/// 0: any principal. Otherwise the number of a workload or a role that some scope names.
type PrincipalKey = u32;
/// 0: any path. Otherwise the number of a path, or of an operation of the contract, that some scope names.
type PathKey = u32;
const ANY: u32 = 0;
const STRANGER: u32 = 0;

/// Workloads that no scope and no role tells apart.
struct Class {
    keys: SmallVec<[PrincipalKey; 4]>,
    roles: Arc<HashSet<EntityUID>>,
}

impl OpenEdges {
    fn of(edges: &BTreeSet<Edge>) -> Self {
        let mut open = Self::default();
        for edge in edges {
            let ways = open.0.entry(edge.caller.to_string().into()).or_default();
            match &edge.operation {
                Some(operation) => drop(ways.named.insert(operation.clone())),
                None => ways.any = true,
            }
        }
        open
    }
}

/// Where a query stands in the index. Queries at one place have the same candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) class: u32,
    pub(super) path: PathKey,
    pub(super) action: u8,
}

/// What is known of a query before any policy is evaluated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    pub(super) place: Place,
    /// The place of the operation that it is, in the contract.
    operation: Option<usize>,
}

/// The policies whose scope holds at one place, and what their conditions read together.
pub(super) struct Candidates {
    policies: Box<[u32]>,
    pub(super) reads: Reads,
    hierarchy: Hierarchy,
}

/// What each candidate came to.
#[derive(Default)]
pub(super) struct Verdict {
    pub(super) permits: SmallVec<[u32; 4]>,
    pub(super) forbids: SmallVec<[u32; 4]>,
    pub(super) faults: SmallVec<[(u32, String); 0]>,
}

/// The entities that do not depend on the query.
struct EntitiesOfLaw {
    service: Entity,
    operation_ancestors: HashSet<EntityUID>,
    actions: Vec<Entity>,
    workloads: Vec<Entity>,
    whole: Entities,
}

impl Law {
    /// Compiles the policies of `view`, parsing each anew. [`Law::compile_with`] parses only what it does not know.
    pub fn compile(view: &View) -> Result<Self, Vec<PolicyError>> {
        Self::compile_with(view, &mut Library::default())
    }

    /// Compiles the policies of `view`: strict validation and an index by principal, action and resource. `library`
    /// keeps what was parsed for the next revision, and nothing that is no longer in force.
    pub fn compile_with(view: &View, library: &mut Library) -> Result<Self, Vec<PolicyError>> {
        let mut errors = Vec::new();
        let mut policies = Vec::with_capacity(view.policies.len());
        let mut in_force = HashSet::with_capacity(view.policies.len());
        for policy in &view.policies {
            let digest = Digest::of(policy.text.as_bytes());
            in_force.insert(digest);
            let mut refuse = |what| errors.push(PolicyError { id: policy.id.clone(), file: policy.file.clone(), what });
            match library.insert(digest, &policy.text) {
                Err(what) => refuse(what),
                Ok(parsed) if *parsed.id() != policy.id => refuse(format!("its text has the id `{}`", parsed.id())),
                Ok(parsed) => {
                    let concerns = view.spec.as_ref().is_some_and(|spec| parsed.concerns(&view.service, spec));
                    policies.push(Compiled { file: policy.file.clone(), parsed, concerns });
                }
            }
        }
        library.retain(|digest| in_force.contains(digest));
        if !errors.is_empty() {
            return Err(errors);
        }
        policies.sort_by(|a, b| a.parsed.id().cmp(b.parsed.id()));
        // A decision names its policies by their ids: each must mean one text.
        let twice: Vec<PolicyError> = policies
            .windows(2)
            .filter(|pair| pair[0].parsed.id() == pair[1].parsed.id())
            .map(|pair| {
                let (id, file) = (pair[1].parsed.id().clone(), pair[1].file.clone());
                PolicyError { id, file, what: format!("the id is taken by a policy of `{}`", pair[0].file) }
            })
            .collect();
        if !twice.is_empty() {
            return Err(twice);
        }
        // The ledger says which contract; a view that brings another one, or none, was not made from it.
        let declared = view.spec.as_ref().and_then(|spec| spec.contract);
        if declared != view.contract.as_ref().map(Contract::digest) {
            let what = "the view does not have the contract that the service declares".to_owned();
            return Err(vec![PolicyError { id: view.service.as_str().into(), file: "mesh.toml".into(), what }]);
        }
        Ok(Self::index(view, policies))
    }

    fn index(view: &View, policies: Vec<Compiled>) -> Self {
        let mut numbers: BTreeMap<&PrincipalScope, PrincipalKey> = BTreeMap::new();
        let mut paths: HashMap<Box<str>, PathKey, FxBuildHasher> = HashMap::default();
        let mut by_scope: FxHashMap<(PrincipalKey, PathKey), Vec<u32>> = FxHashMap::default();
        for (at, policy) in (0u32..).zip(&policies) {
            if !policy.concerns {
                continue;
            }
            let principal = match &policy.parsed.principal {
                PrincipalScope::Never => continue,
                PrincipalScope::Any => ANY,
                named => {
                    let next = numbers.len() as u32 + 1;
                    *numbers.entry(named).or_insert(next)
                }
            };
            let path = match &policy.parsed.resource {
                ResourceScope::Operation(operation) => {
                    let Some(path) = path_of(operation, view.service.as_str()) else { continue };
                    let next = paths.len() as u32 + 1;
                    *paths.entry(path.into()).or_insert(next)
                }
                _ => ANY,
            };
            by_scope.entry((principal, path)).or_default().push(at);
        }
        let (classes_by_workload, classes) = classes(view, &numbers);
        let entities = EntitiesOfLaw::of(view);
        let contract = view.contract.as_ref().map(|contract| Enforced::of(contract, &view.service, &paths));
        Self {
            contract,
            trust_domain: view.trust_domain.clone(),
            service: view.service.clone(),
            declared: view.spec.is_some(),
            barred: view.barred.iter().map(|name| name.as_str().into()).collect(),
            protocol: view.spec.as_ref().map_or(Protocol::default(), |spec| spec.protocol),
            tokens: view.spec.as_ref().map_or(Tokens::default(), |spec| spec.tokens),
            open: view
                .spec
                .as_ref()
                .filter(|spec| spec.first_contact == FirstContact::Hold)
                .map(|_| OpenEdges::of(&view.edges)),
            by_scope,
            paths,
            classes_by_workload,
            classes,
            entities,
            policies,
        }
    }

    /// The service whose requests it judges.
    pub fn service(&self) -> &ServiceName {
        &self.service
    }

    /// Whether nothing is permitted without a token.
    pub fn demands_tokens(&self) -> bool {
        self.tokens == Tokens::Required
    }

    /// The same law with tokens demanded.
    #[cfg(test)]
    pub(super) fn demanding_tokens(self: Arc<Self>) -> Self {
        let mut law = Arc::into_inner(self).expect("nobody else holds it");
        law.tokens = Tokens::Required;
        law
    }

    /// The operations of the contract: method, name, and the path under which the index has it.
    pub(super) fn operations(&self) -> Option<impl Iterator<Item = (&str, &Arc<str>, &u32)>> {
        let contract = self.contract.as_ref()?;
        Some(contract.methods.iter().zip(&contract.names).zip(&contract.keys).map(|((m, n), k)| (&**m, n, k)))
    }

    /// Every path that some scope names, and any other.
    pub(super) fn named_paths(&self) -> Vec<PathKey> {
        (ANY..=self.paths.len() as PathKey).collect()
    }

    /// The class of a principal that is a workload.
    pub(super) fn class_of(&self, principal: &SpiffeId) -> Option<u32> {
        let workload = self.workload(principal)?;
        Some(self.classes_by_workload.get(workload).copied().unwrap_or(STRANGER))
    }

    /// The number of policies.
    pub fn policy_count(&self) -> usize {
        self.policies.len()
    }

    /// Judges one query, remembering nothing. Never fails: what cannot be evaluated is denied with
    /// [`Reason::PolicyFault`].
    pub fn decide(&self, query: &Query<'_>) -> Decision {
        match self.stand(query) {
            Err(refusal) => refusal,
            Ok(standing) => {
                let candidates = self.candidates(standing.place);
                let decision = self.judge(&self.evaluate(&candidates, standing, query), candidates.reads);
                self.of_request(standing, query, decision)
            }
        }
    }

    /// The operation of the contract that a request with this method and normal path is; `None` also without a contract.
    pub fn operation(&self, method: &str, path: &str) -> Option<&Arc<str>> {
        let contract = self.contract.as_ref()?;
        contract.names.get(contract.matcher.find(method, path)?)
    }

    /// Where `query` stands in the index; or the denial that needs no policy.
    ///
    /// INVARIANT (contract-first): where there is a contract, no policy is asked about what is no operation of it.
    ///
    /// INVARIANT (barred-reaches-nobody): no policy is asked about what a quarantined or suspended service asks for.
    ///
    /// INVARIANT (contained-is-denied): no policy is asked about what is asked by, or of, somebody who is contained.
    ///
    /// INVARIANT (bad-token-denies): what comes with a token that is not believed is denied, whether or not a token is demanded.
    pub(super) fn stand(&self, query: &Query<'_>) -> Result<Standing, Decision> {
        let refused = |reason| Err(Decision::denial(reason, Reads::NOTHING));
        if !self.declared || *query.service != self.service {
            return refused(Reason::NotDeclared);
        }
        if query.context.condition.contained {
            return refused(Reason::Contained);
        }
        let Some(workload) = self.workload(query.principal) else { return refused(Reason::NotAWorkload) };
        if self.barred.contains(workload) {
            return refused(Reason::CallerBarred);
        }
        if query.context.token.is_some_and(|token| token.fault.is_some()) {
            return refused(Reason::TokenRefused);
        }
        let operation = match &self.contract {
            None => None,
            Some(contract) => {
                let method = match query.action {
                    Action::Http(method) => method,
                    Action::GrpcCall | Action::TcpConnect => query.context.method,
                };
                let Some(found) = contract.matcher.find(method, query.path) else {
                    return refused(Reason::NotInContract);
                };
                Some(found)
            }
        };
        // A method that the schema does not have cannot be named by a policy, so none permits it.
        let Some(action) = number(query.action) else {
            let denial = Decision::denial(Reason::NoPolicyPermits, Reads::NOTHING);
            return Err(Decision { operation: self.name_of(operation), ..denial });
        };
        let path = match (&self.contract, operation) {
            (Some(contract), Some(operation)) => contract.keys[operation],
            _ if self.paths.is_empty() => ANY,
            _ => self.paths.get(query.path).copied().unwrap_or(ANY),
        };
        let class = self.classes_by_workload.get(workload).copied().unwrap_or(STRANGER);
        Ok(Standing { place: Place { class, path, action }, operation })
    }

    fn name_of(&self, operation: Option<usize>) -> Option<Arc<str>> {
        Some(self.contract.as_ref()?.names[operation?].clone())
    }

    /// `decision`, which whatever stands at its place shares, as one of this request: of its operation, and with its token.
    ///
    /// INVARIANT (token-demanded): where a service demands tokens, nothing is permitted without one that is for what is asked.
    ///
    /// INVARIANT (held-until-approved): where a service holds edges, nothing is permitted to a caller in a way that nobody has approved.
    pub(super) fn of_request(&self, standing: Standing, query: &Query<'_>, decision: Decision) -> Decision {
        let decision = Decision { operation: self.name_of(standing.operation), ..decision };
        if decision.outcome != Outcome::Permit {
            return decision;
        }
        let missing = match query.context.token {
            None if self.tokens == Tokens::Required => Reason::TokenMissing,
            Some(token) if !token.scope.covers(self.scope_name(standing, query), query.action) => Reason::TokenScope,
            _ if !self.is_open(decision.operation.as_deref(), query) => Reason::EdgeHeld,
            _ => return decision,
        };
        Decision { outcome: missing.outcome(), reason: missing, policies: Arc::default(), ..decision }
    }

    /// Whether the edge is approved, where that is asked for.
    fn is_open(&self, operation: Option<&str>, query: &Query<'_>) -> bool {
        let Some(open) = &self.open else { return true };
        let ways = self.workload(query.principal).and_then(|caller| open.0.get(caller));
        let Some(ways) = ways else { return false };
        let is_named = || match operation {
            Some(operation) => ways.named.contains(operation),
            None => {
                let mut way = String::new();
                push_way(&mut way, None, query.context.method, query.path);
                ways.named.contains(way.as_str())
            }
        };
        ways.any || is_named()
    }

    /// The operation as scopes name it: of the contract; of gRPC also without one.
    fn scope_name<'a>(&'a self, standing: Standing, query: &Query<'a>) -> Option<&'a str> {
        let is_named = standing.operation.is_some() || query.action == Action::GrpcCall;
        is_named.then(|| self.resource_name(standing, query).trim_start_matches('/'))
    }

    /// What policies read as the resource and as `context.request.operation`: the operation's name, or else the path.
    pub(super) fn resource_name<'a>(&'a self, standing: Standing, query: &Query<'a>) -> &'a str {
        match (&self.contract, standing.operation) {
            (Some(contract), Some(operation)) => &contract.names[operation],
            _ => query.path,
        }
    }

    /// Whether the operation entity of this id is the resource of `query`.
    pub(super) fn is_resource(&self, id: &str, query: &Query<'_>) -> bool {
        let named = path_of(id, query.service.as_str());
        match &self.contract {
            None => named == Some(query.path),
            Some(_) => self.stand(query).is_ok_and(|standing| {
                named.and_then(|named| named.strip_prefix('/')) == Some(self.resource_name(standing, query))
            }),
        }
    }

    /// How policies name this principal; `None` when it is no workload: a trust domain's own id, or one of the mesh's
    /// own identities. Clients of the token service are named by their whole id, as workloads of other meshes are.
    pub(super) fn workload<'a>(&self, principal: &'a SpiffeId) -> Option<&'a str> {
        let first = principal.path().split('/').nth(1)?;
        if principal.trust_domain() != self.trust_domain.as_str() {
            return Some(principal.as_str());
        }
        if first == RESERVED_SEGMENT && principal.client().is_none() {
            return None;
        }
        Some(principal.service_str().unwrap_or(principal.as_str()))
    }

    /// Whether this principal has `role`.
    pub(super) fn has_role(&self, principal: &SpiffeId, role: &str) -> bool {
        let class = self.workload(principal).and_then(|name| self.classes_by_workload.get(name));
        class.is_some_and(|class| self.classes[*class as usize].roles.contains(&uid(&TYPES.role, role)))
    }

    /// The policies whose scope holds at `place`, in the order of their ids.
    pub(super) fn candidates(&self, place: Place) -> Candidates {
        let mut policies = Vec::new();
        let class = &self.classes[place.class as usize];
        let paths: &[PathKey] = if place.path == ANY { &[ANY] } else { &[ANY, place.path] };
        for principal in std::iter::once(&ANY).chain(&class.keys) {
            for path in paths {
                let Some(found) = self.by_scope.get(&(*principal, *path)) else { continue };
                policies.extend(
                    found
                        .iter()
                        .copied()
                        .filter(|at| self.policies[*at as usize].parsed.actions.contains(place.action)),
                );
            }
        }
        policies.sort_unstable();
        let mut reads = Reads::NOTHING;
        let mut hierarchy = Hierarchy::None;
        for at in &policies {
            let parsed = &self.policies[*at as usize].parsed;
            reads = reads.and(parsed.reads);
            hierarchy = hierarchy.max(parsed.hierarchy);
        }
        Candidates { policies: policies.into(), reads, hierarchy }
    }

    /// Evaluates every candidate: all satisfied ones are named in the record, and a fault anywhere denies.
    pub(super) fn evaluate(&self, candidates: &Candidates, standing: Standing, query: &Query<'_>) -> Verdict {
        let mut verdict = Verdict::default();
        let asks = candidates.policies.iter().any(|at| self.policies[*at as usize].parsed.condition().is_some());
        if !asks {
            for at in &candidates.policies {
                verdict.satisfied(*at, &self.policies[*at as usize].parsed);
            }
            return verdict;
        }
        let entities = self.entities(candidates.hierarchy, standing, query);
        let evaluator =
            Evaluator::new(self.request(candidates.reads, standing, query), &entities, Extensions::all_available());
        let slots = SlotEnv::new();
        for at in &candidates.policies {
            let parsed = &self.policies[*at as usize].parsed;
            let holds = match parsed.condition() {
                None => Ok(true),
                Some(condition) => match evaluator.interpret(condition, &slots) {
                    Ok(Value { value: ValueKind::Lit(Literal::Bool(holds)), .. }) => Ok(holds),
                    Ok(_) => Err("its condition is not a truth value".to_owned()),
                    Err(error) => Err(error.to_string()),
                },
            };
            match holds {
                Ok(true) => verdict.satisfied(*at, parsed),
                Ok(false) => {}
                Err(what) => verdict.faults.push((*at, what)),
            }
        }
        verdict
    }

    /// Turns a verdict into the answer. INVARIANT (fault-denies): a fault denies, before anything else. Then any forbid does, unless all are lifted by assurance and a
    /// permit stands behind them.
    pub(super) fn judge(&self, verdict: &Verdict, reads: Reads) -> Decision {
        let decided = |outcome, reason, by: &mut dyn Iterator<Item = u32>, obligation| Decision {
            outcome,
            reason,
            policies: by.map(|at| self.policies[at as usize].parsed.id().clone()).collect(),
            obligation,
            reads,
            remembered: false,
            operation: None,
        };
        let faults = &mut verdict.faults.iter().map(|(at, _)| *at);
        let forbids = &mut verdict.forbids.iter().copied();
        let permits = &mut verdict.permits.iter().copied();
        if !verdict.faults.is_empty() {
            return decided(Outcome::Deny, Reason::PolicyFault, faults, None);
        }
        if !verdict.forbids.is_empty() {
            // The evaluation without the annotated forbids: only permits are left in it, and one must be satisfied,
            // so that nobody hopeless is challenged.
            let lifted = self.obligation(&verdict.forbids).filter(|_| !verdict.permits.is_empty());
            return match lifted {
                Some(obligation) => decided(Outcome::StepUp, Reason::AssuranceNeeded, forbids, Some(obligation)),
                None => decided(Outcome::Deny, Reason::Forbidden, forbids, None),
            };
        }
        if verdict.permits.is_empty() {
            return Decision::denial(Reason::NoPolicyPermits, reads);
        }
        decided(Outcome::Permit, Reason::Permitted, permits, None)
    }

    /// What lifts all of `forbids`; `None` when one of them carries no obligation.
    fn obligation(&self, forbids: &[u32]) -> Option<Obligation> {
        forbids
            .iter()
            .map(|at| self.policies[*at as usize].parsed.obligation)
            .reduce(|a, b| Some(a?.strictest(b?)))
            .flatten()
    }

    fn request(&self, reads: Reads, standing: Standing, query: &Query<'_>) -> Request {
        let workload = self.workload(query.principal).unwrap_or(query.principal.as_str());
        let known = |uid: Arc<EntityUID>| EntityUIDEntry::Known { euid: uid, loc: None };
        Request::new_unchecked(
            known(Arc::new(uid(&TYPES.workload, workload))),
            known(ACTION_UIDS[usize::from(standing.place.action)].clone()),
            known(self.resource(standing, query)),
            Some(context(reads, self.operation_read(standing, query), query)),
        )
    }

    fn resource(&self, standing: Standing, query: &Query<'_>) -> Arc<EntityUID> {
        match (&self.contract, standing.operation) {
            (Some(contract), Some(operation)) => contract.entities[operation].clone(),
            _ => Arc::new(uid(&TYPES.operation, &[self.service.as_str(), query.path].concat())),
        }
    }

    /// `context.request.operation`: of a contract, or the full method name of a gRPC call.
    fn operation_read<'a>(&'a self, standing: Standing, query: &Query<'a>) -> Option<&'a str> {
        match (standing.operation, query.action) {
            (None, Action::Http(_) | Action::TcpConnect) => None,
            _ => Some(self.resource_name(standing, query).trim_start_matches('/')),
        }
    }

    fn entities(&self, hierarchy: Hierarchy, standing: Standing, query: &Query<'_>) -> Entities {
        if hierarchy == Hierarchy::None {
            return Entities::new();
        }
        let workload = self.workload(query.principal).unwrap_or(query.principal.as_str());
        let own = [
            entity(uid(&TYPES.workload, workload), &self.classes[standing.place.class as usize].roles),
            entity((*self.resource(standing, query)).clone(), &self.entities.operation_ancestors),
        ];
        let base = match hierarchy {
            Hierarchy::Whole => self.entities.whole.clone(),
            Hierarchy::Own | Hierarchy::None => Entities::new(),
        };
        let rest = match hierarchy {
            Hierarchy::Whole => None,
            Hierarchy::Own | Hierarchy::None => Some(self.entities.actions[usize::from(standing.place.action)].clone()),
        };
        base.upsert_entities(
            own.into_iter().chain(rest).map(Arc::new),
            None::<&NoEntitiesSchema>,
            TCComputation::AssumeAlreadyComputed,
            Extensions::all_available(),
        )
        .expect("INVARIANT: entities of the mesh have no attributes and carry all their ancestors")
    }

    /// Everything that Cedar's authorizer would need to judge `query` by itself.
    #[cfg(test)]
    pub(super) fn whole_question(&self, query: &Query<'_>) -> Option<(Request, Entities)> {
        let standing = self.stand(query).ok()?;
        Some((self.request(Reads::ALL, standing, query), self.entities(Hierarchy::Whole, standing, query)))
    }
}

impl Decision {
    pub(super) fn denial(reason: Reason, reads: Reads) -> Self {
        Self {
            outcome: Outcome::Deny,
            reason,
            policies: Arc::default(),
            obligation: None,
            reads,
            remembered: false,
            operation: None,
        }
    }
}

impl Verdict {
    fn satisfied(&mut self, at: u32, parsed: &ParsedPolicy) {
        if parsed.permits() { self.permits.push(at) } else { self.forbids.push(at) }
    }
}

impl Candidates {
    pub(super) fn policies(&self) -> impl Iterator<Item = u32> {
        self.policies.iter().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.policies.len()
    }
}

impl Enforced {
    fn of(contract: &Contract, service: &ServiceName, paths: &HashMap<Box<str>, PathKey, FxBuildHasher>) -> Self {
        let ids = || contract.operations().iter().map(|operation| format!("/{}", operation.name));
        Self {
            matcher: Matcher::new(contract),
            names: contract.operations().iter().map(|operation| operation.name.clone()).collect(),
            methods: contract.operations().iter().map(|operation| operation.method.clone()).collect(),
            entities: ids().map(|id| Arc::new(uid(&TYPES.operation, &[service.as_str(), &id].concat()))).collect(),
            keys: ids().map(|id| paths.get(&*id).copied().unwrap_or(ANY)).collect(),
        }
    }
}

impl EntitiesOfLaw {
    fn of(view: &View) -> Self {
        let spec = view.spec.as_ref();
        let groups: HashSet<EntityUID> = spec
            .and_then(|spec| spec.namespace.as_deref())
            .map(|name| uid(&TYPES.namespace, name))
            .into_iter()
            .chain(spec.and_then(|spec| spec.sensitivity.as_deref()).map(|name| uid(&TYPES.sensitivity, name)))
            .collect();
        let service_uid = uid(&TYPES.service, view.service.as_str());
        let operation_ancestors = groups.iter().cloned().chain([service_uid.clone()]).collect();
        let service = entity(service_uid, &groups);
        let actions = ACTIONS
            .iter()
            .map(|(name, group)| {
                entity(uid(&TYPES.action, name), &group.iter().map(|group| uid(&TYPES.action, group)).collect())
            })
            .collect();
        let mut roles_by_workload: BTreeMap<String, HashSet<EntityUID>> = BTreeMap::new();
        for (role, members) in &view.roles {
            for member in members {
                let name = policy_name(&member.id(&view.trust_domain), &view.trust_domain);
                roles_by_workload.entry(name).or_default().insert(uid(&TYPES.role, role));
            }
        }
        let workloads =
            roles_by_workload.iter().map(|(name, roles)| entity(uid(&TYPES.workload, name), roles)).collect();
        let mut of_law = Self { service, operation_ancestors, actions, workloads, whole: Entities::new() };
        of_law.whole = of_law.gather();
        of_law
    }

    fn gather(&self) -> Entities {
        Entities::from_entities(
            self.actions.iter().chain(&self.workloads).chain([&self.service]).cloned(),
            None::<&NoEntitiesSchema>,
            TCComputation::AssumeAlreadyComputed,
            Extensions::all_available(),
        )
        .expect("INVARIANT: entities of the mesh have no attributes, no duplicates and carry all their ancestors")
    }
}

/// How policies name the workload of this id.
fn policy_name(id: &SpiffeId, own: &TrustDomain) -> String {
    match id.service_str() {
        Some(service) if id.trust_domain() == own.as_str() => service.to_owned(),
        _ => id.as_str().to_owned(),
    }
}

/// Sorts every workload that a scope or a role names into a class: those of a class have the same candidates and roles.
fn classes(
    view: &View,
    numbers: &BTreeMap<&PrincipalScope, PrincipalKey>,
) -> (HashMap<Box<str>, u32, FxBuildHasher>, Vec<Class>) {
    let mut named: BTreeMap<String, (SmallVec<[PrincipalKey; 4]>, Vec<u32>)> = BTreeMap::new();
    for (scope, number) in numbers {
        if let PrincipalScope::Workload(name) = scope {
            named.entry(name.to_string()).or_default().0.push(*number);
        }
    }
    for (at, (role, members)) in (0u32..).zip(&view.roles) {
        let number = numbers.get(&PrincipalScope::Role((**role).into()));
        for member in members {
            let class = named.entry(policy_name(&member.id(&view.trust_domain), &view.trust_domain)).or_default();
            class.0.extend(number.copied());
            class.1.push(at);
        }
    }
    let role_uids: Vec<EntityUID> = view.roles.keys().map(|role| uid(&TYPES.role, role)).collect();
    let mut classes = vec![Class { keys: SmallVec::new(), roles: Arc::default() }];
    let mut by_content: BTreeMap<(SmallVec<[PrincipalKey; 4]>, Vec<u32>), u32> = BTreeMap::new();
    let mut by_workload = HashMap::default();
    for (name, content) in named {
        let class = *by_content.entry(content).or_insert_with_key(|(keys, roles)| {
            let roles = roles.iter().map(|at| role_uids[*at as usize].clone()).collect();
            classes.push(Class { keys: keys.clone(), roles: Arc::new(roles) });
            classes.len() as u32 - 1
        });
        by_workload.insert(name.into(), class);
    }
    (by_workload, classes)
}

fn entity(uid: EntityUID, ancestors: &HashSet<EntityUID>) -> Entity {
    Entity::new(uid, [], HashSet::new(), ancestors.clone(), [], Extensions::all_available())
        .expect("INVARIANT: an entity without attributes has none that could fail")
}

/// The context, as far as it is read. A member that no candidate reads is left out: they were validated against a
/// schema in which it exists, and nobody looks.
fn context(reads: Reads, operation: Option<&str>, query: &Query<'_>) -> CedarContext {
    let asked = &query.context;
    let mut members: Vec<(&str, Value)> = Vec::with_capacity(4);
    if reads.any_of(Reads::REQUEST) {
        let mut request: Vec<(&str, Value)> = Vec::with_capacity(6);
        if reads.any_of(Reads::METHOD) {
            request.push(("method", asked.method.into()));
        }
        if reads.any_of(Reads::REQUEST_PATH) {
            request.push(("path", query.path.into()));
        }
        if let Some(operation) = operation.filter(|_| reads.any_of(Reads::OPERATION)) {
            request.push(("operation", operation.into()));
        }
        if reads.any_of(Reads::PROTOCOL) {
            request.push(("protocol", asked.protocol.to_string().as_str().into()));
        }
        if reads.any_of(Reads::HOST) {
            request.push(("host", asked.host.into()));
        }
        if let Some(size) = asked.size.filter(|_| reads.any_of(Reads::SIZE)) {
            request.push(("size", i64::try_from(size).unwrap_or(i64::MAX).into()));
        }
        members.push(("request", record(request)));
    }
    if reads.any_of(Reads::ORIGIN) {
        let mut origin = Vec::with_capacity(2);
        if reads.any_of(Reads::IP) {
            origin.push(("ip", extension(cedar_policy::RestrictedExpression::new_ip(asked.origin.to_string()))));
        }
        if reads.any_of(Reads::TRUST_DOMAIN) {
            origin.push(("trust_domain", query.principal.trust_domain().into()));
        }
        members.push(("origin", record(origin)));
    }
    if reads.any_of(Reads::TIME) {
        let mut time = Vec::with_capacity(3);
        if reads.any_of(Reads::NOW) {
            time.push(("now", extension(cedar_policy::RestrictedExpression::new_datetime(datetime(asked.now)))));
        }
        if reads.any_of(Reads::CLOCK) {
            time.push(("hour", asked.now.rem_euclid(86_400).div_euclid(3_600).into()));
            // 1970-01-01 was a Thursday.
            time.push(("weekday", ((asked.now.div_euclid(86_400) + 3).rem_euclid(7) + 1).into()));
        }
        members.push(("time", record(time)));
    }
    if reads.any_of(Reads::FIRST_CONTACT) {
        members.push(("first_contact", asked.first_contact.into()));
    }
    if reads.any_of(Reads::RISK) {
        members.push(("risk", record(vec![("workload", i64::from(asked.condition.risk).into())])));
    }
    let posture = asked.condition.posture;
    if reads.any_of(Reads::POSTURE) && !posture.is_unknown() {
        let known = [("compliant", posture.compliant), ("managed", posture.managed)].into_iter();
        members.push(("posture", record(known.filter_map(|(name, said)| Some((name, said?.into()))).collect())));
    }
    if let Some(token) = asked.token.filter(|_| reads.any_of(Reads::TOKEN)) {
        let scopes = Value::set(token.scope.words().iter().map(|word| (&**word).into()), None);
        let issued_at = extension(cedar_policy::RestrictedExpression::new_datetime(datetime(token.issued_at)));
        members.push(("token", record(vec![("scopes", scopes), ("issued_at", issued_at)])));
    }
    CedarContext::Value(Arc::new(members.into_iter().map(|(name, value)| (name.into(), value)).collect()))
}

fn record(members: Vec<(&str, Value)>) -> Value {
    Value::record_arc(Arc::new(members.into_iter().map(|(name, value)| (name.into(), value)).collect()), None)
}

fn extension(expression: cedar_policy::RestrictedExpression) -> Value {
    let expression: &cedar_policy_core::ast::RestrictedExpr = expression.as_ref();
    RestrictedEvaluator::new(Extensions::all_available())
        .interpret(expression.as_borrowed())
        .expect("INVARIANT: an address and a bounded time are always values of their extension")
}

/// Seconds since 1970 as Cedar's `datetime` reads them, `YYYY-MM-DDThh:mm:ssZ`; its years end with 9999.
fn datetime(now: i64) -> String {
    let bounded = now.clamp(0, 253_402_300_799);
    let at = time::OffsetDateTime::from_unix_timestamp(bounded).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, second) = at.to_hms();
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use cedar_policy::{Authorizer, Decision as CedarDecision, Effect, PolicySet};
    use proptest::prelude::*;

    use super::{
        super::{
            CameTo, Factor, Judge,
            fixture::{Asked, NOW, contract, law, law_with, service, view},
        },
        *,
    };
    use crate::risk::{Condition, Posture};

    /// `permit permitted by a b`.
    fn told(decision: &Decision) -> String {
        let mut told = format!("{} {}", decision.outcome.as_str(), decision.reason.as_str());
        for (at, id) in decision.policies.iter().enumerate() {
            told += if at == 0 { " by " } else { " " };
            told += id;
        }
        told
    }

    fn check(policies: &str, rows: &[(Asked, &str)]) {
        check_by(&law(policies), policies, rows);
    }

    fn check_by(law: &Arc<Law>, policies: &str, rows: &[(Asked, &str)]) {
        let mut judge = Judge::new(law.clone());
        for (asked, expected) in rows {
            assert_eq!(told(&law.decide(&asked.query())), *expected, "{asked:?}\n{policies}");
            assert_eq!(told(&judge.decide(&asked.query())), *expected, "judged at first: {asked:?}\n{policies}");
            assert_eq!(told(&judge.decide(&asked.query())), *expected, "judged again: {asked:?}\n{policies}");
        }
    }

    fn asked(principal: &str, action: &str, path: &str) -> Asked {
        Asked::new(principal, action, path)
    }

    #[test]
    fn what_no_policy_permits_is_denied() {
        check("", &[(asked("web", "http:GET", "/"), "deny no_policy_permits")]);
        check(
            r#"@id("other") permit (principal == Workload::"cron", action == Action::"http:PUT", resource in Service::"payments");"#,
            &[(asked("cron", "http:PUT", "/"), "deny no_policy_permits")],
        );
    }

    /// PROVES (barred-reaches-nobody)
    #[test]
    fn a_barred_service_is_let_in_by_no_policy_and_a_workload_elsewhere_of_its_name_is_another() {
        let policies = r#"@id("all") permit (principal, action, resource);"#;
        let barred = View { barred: ["web"].map(|name| ServiceName::parse(name).unwrap()).into(), ..view(policies) };
        let law = Arc::new(Law::compile(&barred).unwrap());
        check_by(
            &law,
            policies,
            &[
                (asked("web", "http:GET", "/"), "deny caller_barred"),
                (asked("cron", "http:GET", "/"), "permit permitted by all"),
                (asked("spiffe://other.example/web", "http:GET", "/"), "permit permitted by all"),
            ],
        );
    }

    /// PROVES (held-until-approved)
    #[test]
    fn where_edges_are_held_policies_permit_nothing_to_whom_nobody_approved_for_that_operation() {
        let all = r#"
            @id("all") permit (principal, action, resource);
            @id("no") forbid (principal == Workload::"cron", action == Action::"http:DELETE", resource);
        "#;
        let edge = |caller: &str, operation: Option<&str>| Edge {
            caller: crate::change::Member::try_from(caller.to_owned()).unwrap(),
            operation: operation.map(Into::into),
        };
        let edges = [
            edge("cron", None),
            edge("web", Some("getItem")),
            edge("web", Some("GET /items/*")),
            edge("spiffe://other.example/web", Some("GET /")),
        ];
        let with = |first_contact, operations: &[(&str, &str, &str)]| {
            let mut view = view(all);
            view.edges = edges.clone().into();
            let spec = view.spec.as_mut().unwrap();
            spec.first_contact = first_contact;
            if !operations.is_empty() {
                let contract = super::super::fixture::contract(operations);
                spec.contract = Some(contract.digest());
                view.contract = Some(contract);
            }
            Arc::new(Law::compile(&view).unwrap())
        };
        let held = "deny edge_held";
        let plain = [
            (asked("web", "http:GET", "/items/4"), "permit permitted by all"),
            (asked("web", "http:GET", "/items/5"), "permit permitted by all"),
            (asked("web", "http:PUT", "/items/4"), held),
            (asked("web", "http:GET", "/items"), held),
            (asked("web", "http:GET", "/getItem"), held),
            (asked("web", "http:GET", "/"), held),
            (asked("spiffe://other.example/web", "http:GET", "/"), "permit permitted by all"),
            (asked("spiffe://other.example/web", "http:GET", "/items/4"), held),
            (asked("spiffe://third.example/web", "http:GET", "/"), held),
            (asked("cron", "http:PUT", "/anything"), "permit permitted by all"),
            (asked("cron", "http:DELETE", "/anything"), "deny forbidden by no"),
            (asked("batch", "http:GET", "/items/4"), held),
        ];
        check_by(&with(FirstContact::Hold, &[]), all, &plain);
        let by_contract = [
            (asked("web", "http:GET", "/items/4"), "permit permitted by all"),
            (asked("web", "http:GET", "/items"), held),
            (asked("web", "http:PATCH", "/items"), "deny not_in_contract"),
            (asked("cron", "http:GET", "/items"), "permit permitted by all"),
        ];
        check_by(&with(FirstContact::Hold, OPERATIONS), all, &by_contract);
        let open =
            plain.map(|(asked, expected)| (asked, if expected == held { "permit permitted by all" } else { expected }));
        check_by(&with(FirstContact::Inspect, &[]), all, &open);
    }

    const OPERATIONS: &[(&str, &str, &str)] = &[
        ("listItems", "GET", "/items"),
        ("getItem", "GET", "/items/{id}"),
        ("search", "GET", "/items/search"),
        ("replaceItem", "PUT", "/items/{id}"),
        ("items", "POST", "/search"),
        ("trace", "TRACE", "/items"),
        ("shop.Orders/Place", "POST", "/shop.Orders/Place"),
    ];

    /// PROVES (contract-first).
    #[test]
    fn what_is_no_operation_of_the_contract_is_denied_whatever_policies_say() {
        let all = r#"@id("all") permit (principal, action, resource);"#;
        let faulty = r#"@id("fault") permit (principal, action, resource) when { 9223372036854775807 + 1 > 0 };"#;
        for policies in [all, faulty] {
            let permitted = if policies == all { "permit permitted by all" } else { "deny policy_fault by fault" };
            check_by(
                &law_with(OPERATIONS, policies),
                policies,
                &[
                    (asked("web", "http:GET", "/"), "deny not_in_contract"),
                    (asked("web", "http:GET", "/items/"), "deny not_in_contract"),
                    (asked("web", "http:GET", "/items/4/5"), "deny not_in_contract"),
                    (asked("web", "http:DELETE", "/items/4"), "deny not_in_contract"),
                    (asked("web", "http:HEAD", "/items"), "deny not_in_contract"),
                    (asked("web", "http:OPTIONS", "/items"), "deny not_in_contract"),
                    (asked("web", "http:get", "/items"), "deny not_in_contract"),
                    (asked("web", "http:POST", "/items/search"), "deny not_in_contract"),
                    (asked("web", "http:GET", "/listItems"), "deny not_in_contract"),
                    (asked("web", "grpc:call", "/shop.Orders/Cancel"), "deny not_in_contract"),
                    (asked("countersign/control", "http:GET", "/nothing"), "deny not_a_workload"),
                    (asked("web", "http:TRACE", "/items"), "deny no_policy_permits"),
                    (asked("web", "http:GET", "/items"), permitted),
                    (asked("web", "http:GET", "/items/4"), permitted),
                    (asked("web", "grpc:call", "/shop.Orders/Place"), permitted),
                ],
            );
        }
        let of = |action, path| law_with(OPERATIONS, all).decide(&asked("web", action, path).query()).operation;
        assert_eq!(of("http:GET", "/items/search").as_deref(), Some("search"));
        assert_eq!(of("http:GET", "/items/4").as_deref(), Some("getItem"));
        assert_eq!(of("http:TRACE", "/items").as_deref(), Some("trace"));
        assert_eq!(of("http:GET", "/other"), None);
        assert_eq!(law(all).decide(&asked("web", "http:GET", "/items").query()).operation, None);
    }

    /// PROVES (contained-is-denied)
    #[test]
    fn nobody_who_is_contained_is_permitted_anything_whatever_policies_say() {
        let everything = law("@id(\"all\") permit (principal, action, resource);");
        let contained = Condition { contained: true, ..Condition::default() };
        for principal in ["web", "newcomer", "spiffe://partner.example/billing"] {
            for action in ["http:GET", "http:TRACE", "grpc:call", "tcp:connect"] {
                let asked = Asked { condition: contained, ..Asked::new(principal, action, "/items") };
                for decision in
                    [everything.decide(&asked.query()), Judge::new(everything.clone()).decide(&asked.query())]
                {
                    assert_eq!(told(&decision), "deny contained", "{asked:?}");
                }
            }
        }
    }

    #[test]
    fn with_a_contract_the_resource_is_the_operation_in_scopes_and_in_conditions() {
        let get = || asked("web", "http:GET", "/items/4");
        let other = || asked("web", "http:GET", "/items");
        let denied = "deny no_policy_permits";
        for (scope, condition) in [
            (r#"resource == Operation::"catalog/getItem""#, ""),
            (r#"resource in Operation::"catalog/getItem""#, ""),
            ("resource", r#"when { resource == Operation::"catalog/getItem" }"#),
            ("resource", r#"when { resource in Operation::"catalog/getItem" }"#),
            ("resource", r#"when { [Operation::"catalog/getItem"].contains(resource) }"#),
            ("resource", r#"when { context.request has operation && context.request.operation == "getItem" }"#),
            (r#"resource in Service::"catalog""#, r#"unless { resource == Operation::"catalog/listItems" }"#),
        ] {
            let policies = format!("@id(\"a\") permit (principal, action, {scope}) {condition};");
            check_by(
                &law_with(OPERATIONS, &policies),
                &policies,
                &[
                    (other(), denied),
                    (get(), "permit permitted by a"),
                    (asked("web", "http:GET", "/items/5"), "permit permitted by a"),
                    (other(), denied),
                ],
            );
        }
        // A path is not the operation that is called like it, nor an entity of its own.
        for name in ["items", "items/4", "search"] {
            let policies = format!("@id(\"a\") permit (principal, action, resource == Operation::\"catalog/{name}\");");
            let is_search = |expected| if name == "search" { "permit permitted by a" } else { expected };
            let is_items = |expected| if name == "items" { "permit permitted by a" } else { expected };
            check_by(
                &law_with(OPERATIONS, &policies),
                &policies,
                &[
                    (get(), denied),
                    (other(), denied),
                    (asked("web", "http:GET", "/items/search"), is_search(denied)),
                    (asked("web", "http:POST", "/search"), is_items(denied)),
                ],
            );
        }
        let policies = r#"@id("a") permit (principal, action, resource == Operation::"catalog/shop.Orders/Place")
            when { context.request has operation && context.request.operation == "shop.Orders/Place" && context.request.path == "/shop.Orders/Place" };"#;
        check_by(
            &law_with(OPERATIONS, policies),
            policies,
            &[
                (asked("web", "grpc:call", "/shop.Orders/Place"), "permit permitted by a"),
                (asked("web", "http:GET", "/items"), denied),
            ],
        );
    }

    #[test]
    fn a_view_without_the_contract_that_the_service_declares_does_not_compile() {
        let mut view = view(r#"@id("a") permit (principal, action, resource);"#);
        let (contract, other) = (contract(OPERATIONS), contract(&OPERATIONS[1..]));
        view.spec.as_mut().unwrap().contract = Some(contract.digest());
        for given in [None, Some(other)] {
            view.contract = given;
            assert!(
                Law::compile(&view).err().unwrap()[0].to_string().contains("the contract that the service declares")
            );
        }
        view.contract = Some(contract);
        assert!(Law::compile(&view).is_ok());
        view.spec.as_mut().unwrap().contract = None;
        assert!(Law::compile(&view).is_err());
    }

    #[test]
    fn a_peer_that_is_no_workload_is_denied_whatever_policies_say() {
        check(
            r#"@id("all") permit (principal, action, resource);"#,
            &[
                (asked("countersign/agent/h1", "http:GET", "/"), "deny not_a_workload"),
                (asked("countersign/control", "http:GET", "/"), "deny not_a_workload"),
                (asked("countersign", "http:GET", "/"), "deny not_a_workload"),
                (asked("spiffe://shop.example", "http:GET", "/"), "deny not_a_workload"),
                (asked("spiffe://partner.example", "http:GET", "/"), "deny not_a_workload"),
                (asked("spiffe://partner.example/countersign/x", "http:GET", "/"), "permit permitted by all"),
                (asked("newcomer", "http:GET", "/"), "permit permitted by all"),
            ],
        );
    }

    #[test]
    fn a_method_that_no_policy_can_name_is_denied() {
        check(
            r#"@id("all") permit (principal, action, resource);"#,
            &[
                (asked("web", "http:TRACE", "/"), "deny no_policy_permits"),
                (asked("web", "http:BREW", "/"), "deny no_policy_permits"),
                (asked("web", "http:get", "/"), "deny no_policy_permits"),
                (asked("web", "http:DELETE", "/"), "permit permitted by all"),
            ],
        );
    }

    #[test]
    fn a_service_that_is_not_declared_any_more_admits_nothing() {
        let mut gone = view(r#"@id("all") permit (principal, action, resource);"#);
        gone.spec = None;
        let law = Law::compile(&gone).unwrap();
        assert_eq!(told(&law.decide(&asked("web", "http:GET", "/").query())), "deny not_declared");
        let mut of_other = asked("web", "http:GET", "/");
        of_other.service = service("payments");
        let law = self::law(r#"@id("all") permit (principal, action, resource);"#);
        assert_eq!(told(&law.decide(&of_other.query())), "deny not_declared");
    }

    #[test]
    fn scopes_hold_for_whom_and_what_they_name_and_nobody_else() {
        let policies = r#"
            @id("a-web-gets") permit (principal == Workload::"web", action == Action::"http:GET", resource in Service::"catalog");
            @id("b-readers-read-one") permit (principal in Role::"reader", action in Action::"read", resource == Operation::"catalog/one");
            @id("c-writers") permit (principal is Workload in Role::"writer", action in [Action::"http:PUT", Action::"http:PATCH"], resource is Operation in Namespace::"shop");
            @id("d-internal") permit (principal == Workload::"audit", action, resource in Sensitivity::"internal");
            @id("e-other-namespace") permit (principal, action, resource in Namespace::"payments");
            @id("f-partner") permit (principal == Workload::"spiffe://partner.example/billing", action == Action::"http:POST", resource in Operation::"catalog/bills");
            @id("g-nobody") permit (principal in Role::"nobody", action, resource);
        "#;
        check(
            policies,
            &[
                (asked("web", "http:GET", "/x"), "permit permitted by a-web-gets"),
                (asked("web", "http:GET", "/one"), "permit permitted by a-web-gets b-readers-read-one"),
                (asked("web", "http:HEAD", "/one"), "permit permitted by b-readers-read-one"),
                (asked("web", "http:HEAD", "/one/more"), "deny no_policy_permits"),
                (asked("web", "http:PUT", "/x"), "permit permitted by c-writers"),
                (asked("cron", "http:PATCH", "/x"), "permit permitted by c-writers"),
                (asked("cron", "http:POST", "/x"), "deny no_policy_permits"),
                (asked("cron", "http:GET", "/one"), "deny no_policy_permits"),
                (asked("audit", "tcp:connect", "/"), "permit permitted by d-internal"),
                (asked("stranger", "http:GET", "/one"), "deny no_policy_permits"),
                (asked("spiffe://partner.example/billing", "http:POST", "/bills"), "permit permitted by f-partner"),
                (asked("spiffe://partner.example/billing", "http:POST", "/bills/1"), "deny no_policy_permits"),
                (
                    asked("spiffe://partner.example/billing", "http:GET", "/one"),
                    "permit permitted by b-readers-read-one",
                ),
                (asked("spiffe://partner.example/web", "http:GET", "/x"), "deny no_policy_permits"),
                (asked("billing", "http:POST", "/bills"), "deny no_policy_permits"),
            ],
        );
    }

    /// PROVES (fault-denies).
    #[test]
    fn a_forbid_wins_and_a_fault_denies_before_it() {
        let policies = r#"
            @id("a-all") permit (principal, action, resource);
            @id("b-no-delete") forbid (principal, action == Action::"http:DELETE", resource);
            @id("c-faults") forbid (principal, action == Action::"http:PUT", resource) when { context.request has size && context.request.size * 9223372036854775807 > 0 };
            @id("d-faults-to-permit") permit (principal, action == Action::"http:PATCH", resource) when { context.request has size && context.request.size + 9223372036854775807 > 0 };
        "#;
        let sized = |action: &str, size| Asked { size, ..asked("web", action, "/") };
        check(
            policies,
            &[
                (asked("web", "http:DELETE", "/"), "deny forbidden by b-no-delete"),
                (sized("http:PUT", Some(2)), "deny policy_fault by c-faults"),
                (sized("http:PATCH", Some(2)), "deny policy_fault by d-faults-to-permit"),
                (sized("http:PUT", Some(0)), "permit permitted by a-all"),
                (sized("http:PUT", None), "permit permitted by a-all"),
            ],
        );
    }

    #[test]
    fn only_annotated_forbids_with_a_permit_behind_them_ask_for_assurance() {
        let policies = r#"
            @id("a-readers") permit (principal in Role::"reader", action, resource);
            @id("b-fresh") @max_age("300") forbid (principal, action in Action::"write", resource);
            @id("c-strong") @step_up("phr") @max_age("900") forbid (principal, action == Action::"http:DELETE", resource);
            @id("d-never") forbid (principal, action == Action::"http:PATCH", resource);
            @id("e-faults") @step_up("mfa") forbid (principal, action == Action::"http:GET", resource) when { context.request has size && context.request.size * 9223372036854775807 > 0 };
        "#;
        check(
            policies,
            &[
                (asked("cron", "http:POST", "/"), "deny forbidden by b-fresh"),
                (asked("web", "http:PATCH", "/"), "deny forbidden by b-fresh d-never"),
                (Asked { size: Some(2), ..asked("web", "http:GET", "/") }, "deny policy_fault by e-faults"),
                (asked("web", "http:POST", "/"), "step_up assurance_needed by b-fresh"),
                (asked("web", "http:DELETE", "/"), "step_up assurance_needed by b-fresh c-strong"),
                (asked("web", "http:GET", "/"), "permit permitted by a-readers"),
            ],
        );
        let of = |method| law(policies).decide(&asked("web", method, "/").query()).obligation;
        assert_eq!(of("http:GET"), None);
        assert_eq!(of("http:POST"), Some(Obligation { factor: None, max_age_seconds: Some(300) }));
        assert_eq!(of("http:DELETE"), Some(Obligation { factor: Some(Factor::Phr), max_age_seconds: Some(300) }));
    }

    #[test]
    fn conditions_see_the_request_the_origin_and_the_time() {
        let on = |condition: &str| format!("@id(\"a\") permit (principal, action, resource) when {{ {condition} }};");
        let get = || asked("web", "http:GET", "/items/4");
        let rpc = || asked("web", "grpc:call", "/shop.Orders/Place");
        let sized = |size| Asked { size: Some(size), ..get() };
        for (condition, denied, permitted) in [
            (r#"context.request.method == "POST""#, get(), rpc()),
            (r#"context.request.path like "/items/*""#, asked("web", "http:GET", "/other"), get()),
            (r#"context.request has operation && context.request.operation == "shop.Orders/Place""#, get(), rpc()),
            (r#"context.request.protocol == "tcp""#, get(), asked("web", "tcp:connect", "/")),
            (r#"context.request.host == "shop.test""#, get(), Asked { host: "shop.test".into(), ..get() }),
            ("context.request has size && context.request.size <= 1000", sized(1001), sized(1000)),
            ("context.request has size && context.request.size > 1000", sized(0), sized(u64::MAX)),
            (
                r#"context.origin.ip.isInRange(ip("10.0.0.0/8"))"#,
                Asked { origin: [192, 168, 0, 1].into(), ..get() },
                get(),
            ),
            (
                r#"context.origin.trust_domain == "partner.example""#,
                get(),
                asked("spiffe://partner.example/x", "http:GET", "/items/4"),
            ),
            (r#"context.time.now < datetime("2026-11-22T16:30:01Z")"#, Asked { now: NOW + 1, ..get() }, get()),
            ("context.time.hour == 16", Asked { now: NOW + 1800, ..get() }, Asked { now: NOW + 1799, ..get() }),
            ("context.time.weekday == 7", Asked { now: NOW + 86_400, ..get() }, get()),
            ("context.time.weekday == 4 && context.time.hour == 0", get(), Asked { now: 0, ..get() }),
            ("!context.first_contact", Asked { first_contact: true, ..get() }, get()),
            (r#"principal in Role::"writer""#, asked("billing", "http:GET", "/"), get()),
            (r#"resource in Namespace::"shop" && principal == Workload::"web""#, asked("cron", "http:GET", "/"), get()),
            (r#"action in Action::"write""#, get(), asked("web", "http:PUT", "/")),
            (r#"resource == Operation::"catalog/items/4""#, asked("web", "http:GET", "/items/5"), get()),
            (
                r#"Workload::"cron" in Role::"writer" && principal == Workload::"web""#,
                asked("cron", "http:GET", "/"),
                get(),
            ),
        ] {
            check(&on(condition), &[(denied, "deny no_policy_permits"), (permitted, "permit permitted by a")]);
        }
    }

    #[test]
    fn a_decision_says_what_it_depends_on() {
        let reads = |condition: &str| {
            law(&format!("@id(\"a\") permit (principal, action, resource) when {{ {condition} }};"))
                .decide(&asked("web", "http:GET", "/").query())
                .reads
        };
        for (condition, expected) in [
            ("true", Reads::NOTHING),
            (r#"principal in Role::"reader" && action in Action::"read""#, Reads::NOTHING),
            (r#"resource in [Service::"catalog", Service::"other"] || resource in Namespace::"shop""#, Reads::NOTHING),
            ("principal is Workload", Reads::NOTHING),
            ("context has device", Reads::NOTHING),
            ("context has token", Reads::TOKEN),
            ("context.risk.workload > 7", Reads::RISK),
            ("context has posture", Reads::POSTURE),
            ("context has posture.managed && context.posture.managed", Reads::POSTURE),
            (r#"principal in Workload::"web""#, Reads::PRINCIPAL),
            (r#"resource in Operation::"catalog/x""#, Reads::PATH),
            ("context.time.hour > 7", Reads::CLOCK),
            (r#"context.time.now > datetime("2026-01-01")"#, Reads::NOW),
            ("context.request has size", Reads::SIZE),
            ("context has request.size", Reads::SIZE),
            ("context.origin.ip.isLoopback()", Reads::IP),
            (
                r#"context.origin.trust_domain like "*.example" || context.first_contact"#,
                Reads::TRUST_DOMAIN.and(Reads::FIRST_CONTACT),
            ),
            (
                "if context.first_contact then context.request.host == \"x\" else false",
                Reads::FIRST_CONTACT.and(Reads::HOST),
            ),
            ("context has request", Reads::REQUEST),
            ("[context.time].contains(context.time)", Reads::TIME),
        ] {
            assert_eq!(reads(condition), expected, "{condition}");
        }
        assert_eq!(format!("{}", Reads::NOW.and(Reads::PATH)), "resource, time.now");
    }

    /// PROVES (validated-before-evaluated).
    #[test]
    fn a_view_whose_text_is_another_policys_does_not_compile() {
        let mut view = view(r#"@id("a") permit (principal, action, resource);"#);
        view.policies[0].id = "b".into();
        assert_eq!(
            Law::compile(&view).err().unwrap()[0].to_string(),
            "policy `b` (policies/test.cedar): its text has the id `a`"
        );
        view.policies[0].text = "@id(\"b\") permit (principal, action, resource) when { context.token };".into();
        assert!(Law::compile(&view).is_err());
    }

    #[test]
    fn a_view_with_two_policies_of_one_id_does_not_compile() {
        let of = |text: &str| view(text).policies.remove(0);
        let mut view = view(r#"@id("a") permit (principal, action, resource);"#);
        view.policies.push(of(r#"@id("b") permit (principal, action, resource);"#));
        assert!(Law::compile(&view).is_ok());
        for text in ["forbid (principal, action, resource)", "permit (principal, action, resource)"] {
            let mut again = of(&format!("@id(\"a\") {text};"));
            again.file = "policies/again.cedar".into();
            view.policies.push(again);
        }
        let errors = Law::compile(&view).err().unwrap();
        assert_eq!(
            errors.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [
                "policy `a` (policies/again.cedar): the id is taken by a policy of `policies/test.cedar`",
                "policy `a` (policies/again.cedar): the id is taken by a policy of `policies/again.cedar`",
            ]
        );
    }

    #[test]
    fn a_time_before_1970_or_after_9999_is_still_judged() {
        let law =
            law(r#"@id("a") permit (principal, action, resource) when { context.time.now > datetime("2026-01-01") };"#);
        for (now, expected) in [(i64::MIN, "deny no_policy_permits"), (i64::MAX, "permit permitted by a")] {
            assert_eq!(told(&law.decide(&Asked { now, ..asked("web", "http:GET", "/") }.query())), expected);
        }
    }

    /// The law of the request gate as the design states it, over the whole policy set and with Cedar's authorizer.
    fn naive(law: &Law, set: &PolicySet, query: &Query<'_>) -> (Outcome, Reason, BTreeSet<String>) {
        let Some((request, entities)) = law.whole_question(query) else {
            let refusal = law.decide(query);
            return (refusal.outcome, refusal.reason, BTreeSet::new());
        };
        let (request, entities) = (request.into(), entities.into());
        let response = Authorizer::new().is_authorized(&request, set, &entities);
        let by: BTreeSet<String> = response.diagnostics().reason().map(ToString::to_string).collect();
        let faults: BTreeSet<String> = response
            .diagnostics()
            .errors()
            .map(|cedar_policy::AuthorizationError::PolicyEvaluationError(error)| error.policy_id().to_string())
            .collect();
        if !faults.is_empty() {
            return (Outcome::Deny, Reason::PolicyFault, faults);
        }
        if response.decision() == CedarDecision::Allow {
            return (Outcome::Permit, Reason::Permitted, by);
        }
        if by.is_empty() {
            return (Outcome::Deny, Reason::NoPolicyPermits, by);
        }
        let annotated =
            |policy: &cedar_policy::Policy| policy.annotation("step_up").or(policy.annotation("max_age")).is_some();
        let all_annotated = by.iter().all(|id| annotated(set.policy(&id.parse().unwrap()).unwrap()));
        let without = PolicySet::from_policies(
            set.policies().filter(|policy| policy.effect() == Effect::Permit || !annotated(policy)).cloned(),
        )
        .unwrap();
        let second = Authorizer::new().is_authorized(&request, &without, &entities);
        if all_annotated && second.decision() == CedarDecision::Allow {
            (Outcome::StepUp, Reason::AssuranceNeeded, by)
        } else {
            (Outcome::Deny, Reason::Forbidden, by)
        }
    }

    const PRINCIPALS: [&str; 8] = [
        "principal",
        "principal is Workload",
        r#"principal == Workload::"web""#,
        r#"principal == Workload::"spiffe://partner.example/billing""#,
        r#"principal in Workload::"cron""#,
        r#"principal in Role::"reader""#,
        r#"principal is Workload in Role::"writer""#,
        r#"principal in Role::"nobody""#,
    ];
    const ACTION_SCOPES: [&str; 6] = [
        "action",
        r#"action == Action::"http:GET""#,
        r#"action in Action::"read""#,
        r#"action in [Action::"write", Action::"grpc:call"]"#,
        r#"action == Action::"tcp:connect""#,
        r#"action in [Action::"http:GET", Action::"http:PUT"]"#,
    ];
    const RESOURCES: [&str; 9] = [
        "resource",
        "resource is Operation",
        r#"resource == Operation::"catalog/one""#,
        r#"resource in Operation::"catalog/two""#,
        r#"resource in Service::"catalog""#,
        r#"resource in Service::"payments""#,
        r#"resource is Operation in Namespace::"shop""#,
        r#"resource in Sensitivity::"internal""#,
        r#"resource == Operation::"catalogue/one""#,
    ];
    const CONDITIONS: [&str; 20] = [
        "",
        "",
        "",
        r#"when { context.request.path like "/o*" }"#,
        r#"when { principal in Role::"reader" }"#,
        r#"unless { principal == Workload::"web" }"#,
        r#"when { resource in Service::"catalog" && action in Action::"read" }"#,
        r#"when { resource == Operation::"catalog/two" }"#,
        "when { context.request has size && context.request.size * 4611686018427387904 > 0 }",
        "when { context.time.hour < 12 }",
        r#"when { context.time.now > datetime("2026-11-22T16:30:00Z") }"#,
        r#"unless { context.origin.ip.isInRange(ip("10.0.0.0/8")) }"#,
        r#"when { context.origin.trust_domain == "shop.example" }"#,
        "when { context.first_contact }",
        r#"when { Workload::"cron" in Role::"writer" && principal in [Role::"reader", Role::"writer"] }"#,
        r#"when { context.request has operation || context.request.host == "catalog.mesh" }"#,
        r#"when { context.request.method == "GET" && context.request.protocol == "http" }"#,
        "when { context.risk.workload >= 50 }",
        "unless { context has posture.compliant && context.posture.compliant }",
        "when { context has posture && !(context.posture has managed && context.posture.managed) }",
    ];
    const ANNOTATIONS: [&str; 5] = ["", "", "", r#"@step_up("phr")"#, r#"@max_age("60")"#];

    fn policy_text() -> impl Strategy<Value = String> {
        let of = |all: &'static [&'static str]| prop::sample::select(all);
        (any::<bool>(), of(&PRINCIPALS), of(&ACTION_SCOPES), of(&RESOURCES), of(&CONDITIONS), of(&ANNOTATIONS))
            .prop_map(|(permit, principal, action, resource, condition, annotation)| {
                let (effect, annotation) = if permit { ("permit", "") } else { ("forbid", annotation) };
                format!("{annotation} {effect} ({principal}, {action}, {resource}) {condition};")
            })
    }

    fn any_asked() -> impl Strategy<Value = Asked> {
        const CALLERS: [&str; 6] = [
            "web",
            "cron",
            "newcomer",
            "spiffe://partner.example/billing",
            "spiffe://partner.example/web",
            "countersign/control",
        ];
        const ACTIONS: [&str; 6] = ["http:GET", "http:PUT", "http:HEAD", "http:TRACE", "grpc:call", "tcp:connect"];
        (
            prop::sample::select(&CALLERS[..]),
            prop::sample::select(&ACTIONS[..]),
            prop::sample::select(&["/", "/one", "/two", "/other"][..]),
            prop::sample::select(&[None, Some(0), Some(1), Some(2)][..]),
            prop::sample::select(&[[10, 0, 0, 7], [192, 168, 1, 1]][..]),
            prop::sample::select(&[NOW, NOW + 1, NOW - 6 * 3_600][..]),
            any::<bool>(),
            (prop::sample::select(&[0u8, 49, 50, 100][..]), any::<Option<bool>>(), any::<Option<bool>>()),
        )
            .prop_map(
                |(principal, action, path, size, origin, now, first_contact, (risk, compliant, managed))| Asked {
                    size,
                    origin: origin.into(),
                    now,
                    first_contact,
                    condition: Condition { risk, posture: Posture { compliant, managed }, contained: false },
                    ..Asked::new(principal, action, path)
                },
            )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// PROVES (remembered-equals-evaluated) and that the index loses nothing.
        #[test]
        fn the_index_and_the_memory_answer_as_cedar_does_over_the_whole_set(
            texts in prop::collection::vec(policy_text(), 0..24),
            all_asked in prop::collection::vec(any_asked(), 1..24),
            has_contract in any::<bool>(),
        ) {
            let text: String =
                texts.iter().enumerate().map(|(at, text)| format!("@id(\"p{at:02}\") {text}\n")).collect();
            // Operations that are called like paths of others.
            let operations = [("one", "GET", "/two"), ("two", "GET", "/{x}"), ("three", "PUT", "/one"), ("rpc", "POST", "/{x}")];
            let law = if has_contract { law_with(&operations, &text) } else { law(&text) };
            let set = PolicySet::from_policies(law.policies.iter().map(|policy| policy.parsed.policy.clone().into())).unwrap();
            let mut judge = Judge::new(law.clone());
            for asked in &all_asked {
                let query = asked.query();
                let (outcome, reason, by) = naive(&law, &set, &query);
                let explained = law.explain(&query);
                prop_assert_eq!(explained.outcome, outcome);
                for policy in &explained.policies {
                    let named = by.contains(&*policy.id);
                    let applied = matches!(policy.came_to, CameTo::Applied | CameTo::Fault { .. });
                    prop_assert!(applied || !named, "{:?} {} {}", asked, policy.id, text);
                }
                for decision in [law.decide(&query), judge.decide(&query), judge.decide(&query)] {
                    prop_assert_eq!((decision.outcome, decision.reason), (outcome, reason), "{:?} {}", asked, text);
                    let named: BTreeSet<String> = decision.policies.iter().map(ToString::to_string).collect();
                    prop_assert_eq!(&named, &by, "{:?} {}", asked, text);
                }
            }
        }
    }
}
