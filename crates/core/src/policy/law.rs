//! The policies of one view, indexed by principal, action and resource, and the decision.
//!
//! A scope is decided by the index, exactly and once per place; Cedar's evaluator sees only the conditions of the
//! policies whose scope holds. PROVES in the tests: the same answer as Cedar's authorizer over the whole set.

use std::{
    collections::{BTreeMap, HashSet},
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
    identity::{RESERVED_SEGMENT, ServiceName, SpiffeId, TrustDomain},
    record::{Outcome, Reason},
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
/// 0: any path. Otherwise the number of a path that some scope names.
type PathKey = u32;
const ANY: u32 = 0;
const STRANGER: u32 = 0;

/// Workloads that no scope and no role tells apart.
struct Class {
    keys: SmallVec<[PrincipalKey; 4]>,
    roles: Arc<HashSet<EntityUID>>,
}

/// Where a query stands in the index. Queries at one place have the same candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    class: u32,
    path: PathKey,
    action: u8,
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
            let mut refuse =
                |what| errors.push(PolicyError { id: policy.id.clone(), file: policy.file.clone(), what });
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
        Self {
            trust_domain: view.trust_domain.clone(),
            service: view.service.clone(),
            declared: view.spec.is_some(),
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

    /// The number of policies.
    pub fn policy_count(&self) -> usize {
        self.policies.len()
    }

    /// Judges one query, remembering nothing. Never fails: what cannot be evaluated is denied with
    /// [`Reason::PolicyFault`].
    pub fn decide(&self, query: &Query<'_>) -> Decision {
        match self.place(query) {
            Err(refusal) => refusal,
            Ok(place) => {
                let candidates = self.candidates(place);
                self.judge(&self.evaluate(&candidates, place, query), candidates.reads)
            }
        }
    }

    /// Where `query` stands in the index; or the denial that needs no policy.
    pub(super) fn place(&self, query: &Query<'_>) -> Result<Place, Decision> {
        let refused = |reason| Err(Decision::denial(reason, Reads::NOTHING));
        if !self.declared || *query.service != self.service {
            return refused(Reason::NotDeclared);
        }
        let Some(workload) = self.workload(query.principal) else { return refused(Reason::NotAWorkload) };
        // A method that the schema does not have cannot be named by a policy, so none permits it.
        let Some(action) = number(query.action) else { return refused(Reason::NoPolicyPermits) };
        Ok(Place {
            class: self.classes_by_workload.get(workload).copied().unwrap_or(STRANGER),
            path: if self.paths.is_empty() { ANY } else { self.paths.get(query.path).copied().unwrap_or(ANY) },
            action,
        })
    }

    /// How policies name this principal; `None` when it is no workload: a trust domain's own id, or one of the mesh's
    /// own identities.
    pub(super) fn workload<'a>(&self, principal: &'a SpiffeId) -> Option<&'a str> {
        let first = principal.path().split('/').nth(1)?;
        if principal.trust_domain() != self.trust_domain.as_str() {
            return Some(principal.as_str());
        }
        if first == RESERVED_SEGMENT {
            return None;
        }
        Some(principal.service_str().unwrap_or(principal.as_str()))
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
                    found.iter().copied().filter(|at| self.policies[*at as usize].parsed.actions.contains(place.action)),
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
    pub(super) fn evaluate(&self, candidates: &Candidates, place: Place, query: &Query<'_>) -> Verdict {
        let mut verdict = Verdict::default();
        let asks = candidates.policies.iter().any(|at| self.policies[*at as usize].parsed.condition().is_some());
        if !asks {
            for at in &candidates.policies {
                verdict.satisfied(*at, &self.policies[*at as usize].parsed);
            }
            return verdict;
        }
        let entities = self.entities(candidates.hierarchy, place, query);
        let evaluator = Evaluator::new(
            self.request(candidates.reads, place, query),
            &entities,
            Extensions::all_available(),
        );
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

    /// Turns a verdict into the answer: a fault denies, then any forbid, unless all are lifted by assurance and a
    /// permit stands behind them.
    pub(super) fn judge(&self, verdict: &Verdict, reads: Reads) -> Decision {
        let decided = |outcome, reason, by: &mut dyn Iterator<Item = u32>, obligation| Decision {
            outcome,
            reason,
            policies: by.map(|at| self.policies[at as usize].parsed.id().clone()).collect(),
            obligation,
            reads,
            remembered: false,
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
                Some(obligation) => {
                    decided(Outcome::StepUp, Reason::AssuranceNeeded, forbids, Some(obligation))
                }
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

    fn request(&self, reads: Reads, place: Place, query: &Query<'_>) -> Request {
        let workload = self.workload(query.principal).unwrap_or(query.principal.as_str());
        let known = |uid: Arc<EntityUID>| EntityUIDEntry::Known { euid: uid, loc: None };
        Request::new_unchecked(
            known(Arc::new(uid(&TYPES.workload, workload))),
            known(ACTION_UIDS[usize::from(place.action)].clone()),
            known(Arc::new(self.operation(query))),
            Some(context(reads, query)),
        )
    }

    fn operation(&self, query: &Query<'_>) -> EntityUID {
        uid(&TYPES.operation, &[self.service.as_str(), query.path].concat())
    }

    fn entities(&self, hierarchy: Hierarchy, place: Place, query: &Query<'_>) -> Entities {
        if hierarchy == Hierarchy::None {
            return Entities::new();
        }
        let workload = self.workload(query.principal).unwrap_or(query.principal.as_str());
        let own = [
            entity(uid(&TYPES.workload, workload), &self.classes[place.class as usize].roles),
            entity(self.operation(query), &self.entities.operation_ancestors),
        ];
        let base = match hierarchy {
            Hierarchy::Whole => self.entities.whole.clone(),
            Hierarchy::Own | Hierarchy::None => Entities::new(),
        };
        let rest = match hierarchy {
            Hierarchy::Whole => None,
            Hierarchy::Own | Hierarchy::None => Some(self.entities.actions[usize::from(place.action)].clone()),
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
        let place = self.place(query).ok()?;
        Some((self.request(Reads::ALL, place, query), self.entities(Hierarchy::Whole, place, query)))
    }
}

impl Decision {
    pub(super) fn denial(reason: Reason, reads: Reads) -> Self {
        Self { outcome: Outcome::Deny, reason, policies: Arc::default(), obligation: None, reads, remembered: false }
    }
}

impl Verdict {
    fn satisfied(&mut self, at: u32, parsed: &ParsedPolicy) {
        if parsed.permits() { self.permits.push(at) } else { self.forbids.push(at) }
    }
}

impl Candidates {
    pub(super) fn len(&self) -> usize {
        self.policies.len()
    }

    pub(super) fn contains(&self, at: u32) -> bool {
        self.policies.binary_search(&at).is_ok()
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
fn context(reads: Reads, query: &Query<'_>) -> CedarContext {
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
        if reads.any_of(Reads::OPERATION) && query.action == Action::GrpcCall {
            request.push(("operation", query.path.trim_start_matches('/').into()));
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
