//! The change gate: who may change what, and what they have to show for it. Cedar policies of their own schema, judged
//! with the author, each change, what was proven for this very change-set and who else stands behind it.
//!
//! Default deny, forbid wins, a policy that faults denies. An annotated forbid (`@step_up`, `@max_age`, `@countersign`) is an
//! obligation: it stands until what was shown meets it. The answer names obligations only where every forbid that still
//! stands is one and a permit stands behind them, so that nobody hopeless is challenged. No factor is verified here and no
//! time is read: [`Asked`] carries what was proven, and when.
//!
//! | furniture | holds |
//! |---|---|
//! | [`act`] | what an operator does without changing anything: reading, exporting, inviting a host |
//! | `schema.cedarschema` | what policies of `gate/` can say |
//! | `shipped.cedar` | the gate of a mesh that brings none: docs/gate.md explains it rule by rule |

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::{Arc, LazyLock},
};

use cedar_policy::{
    Authorizer, Context, Decision, Effect, Entities, Entity, EntityId, EntityTypeName, EntityUid, Policy, PolicySet,
    Request, RestrictedExpression, Schema, Validator,
};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    assurance::{Assurance, FactorKind, Proof},
    canonical::Digest,
    change::{Change, ChangeSet, PolicyId},
    identity::{OperatorName, ServiceName},
    operator::Operator,
    pipeline::{ACTOR_PREFIX, PipelineName},
    policy::{self, Factor, FilePolicy, JudgedBy, Mistake, Obligation, PolicyError},
    service::ServiceSpec,
    sign_in::Person,
    state::MeshState,
};

pub mod act;

const SCHEMA: &str = include_str!("gate/schema.cedarschema");
const SHIPPED: &str = include_str!("gate/shipped.cedar");
/// The file that the policies of the shipped gate are said to stand in.
const SHIPPED_FILE: &str = "the shipped gate";
/// The role of who enrols first.
pub const OWNER: &str = "owner";
/// Changes that one denial names at most.
const DENIED_MAX: usize = 20;

/// Who asks for a change-set. In JSON an operator is a string, and everybody else an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Author {
    /// A person who has factors here.
    Operator(OperatorName),
    /// An automation, by what it proved of itself.
    Pipeline(Pipeline),
    /// A person whom a provider vouched for.
    Person(Person),
}

/// An automation that proposes changes, as its token said and was verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// What the mesh calls it; its roles are those that the mesh gives to this name.
    pub name: PipelineName,
    /// Who vouches for it: the URL.
    pub issuer: String,
    /// How the issuer names it, in a way that is never given again.
    pub subject: String,
    /// Everything else that was verified, as `name=value`.
    pub claims: BTreeSet<String>,
}

/// Where a change-set came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The socket of the mesh's own user, on the control plane's machine.
    Socket,
    /// Anywhere else.
    Network(IpAddr),
}

/// The question put to the change gate.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Who asks.
    pub author: &'a Author,
    /// For what.
    pub change_set: &'a ChangeSet,
    /// The mesh before it.
    pub state: &'a MeshState,
    /// What the author has shown for this change-set.
    pub assurance: &'a Assurance,
    /// When the author asked, in seconds since 1970: how old their factors were is counted up to then, however long others
    /// take to countersign.
    pub asked_at_seconds: i64,
    /// Who countersigned. The author counts for nothing here.
    pub approvals: &'a BTreeSet<OperatorName>,
    /// Where it came in.
    pub origin: Origin,
    /// The risk of the author, 0 to 100, as signals say; of an operator only.
    pub risk: u8,
    /// Now, in seconds since 1970.
    pub now_seconds: i64,
}

/// What stands between a change-set and the ledger: the strictest of all obligations that are not met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Requires {
    /// How strong a factor the author must show.
    pub factor: Option<Factor>,
    /// How long ago at most, in seconds.
    pub max_age_seconds: Option<u64>,
    /// How many operators must countersign, beside the author.
    pub countersign: u32,
}

/// What the gate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It may become an entry.
    Permit,
    /// The author has to show more. Others may have to countersign after that.
    StepUp(Requires),
    /// The author has shown enough, and others have to countersign.
    NeedsCountersign(Requires),
    /// No factor and nobody's countersignature would help; each denied change, at most 20, and why.
    Deny(Vec<String>),
}

/// The policies of one change gate, ready to judge.
#[derive(Debug)]
pub struct ChangeGate {
    permits: PolicySet,
    forbids: PolicySet,
    obligations: BTreeMap<String, Requires>,
}

/// The schema of the change gate, as Cedar text.
pub fn schema_text() -> &'static str {
    SCHEMA
}

/// The gate of a mesh that brings none, as Cedar text.
pub fn shipped_text() -> &'static str {
    SHIPPED
}

/// Splits the text of a file of `gate/` into its policies. Each that is returned has parsed, passed the strict validator and
/// carries an `@id` of its own; with them come all mistakes of the others.
pub fn read_file(file: &str, text: &str) -> (Vec<FilePolicy>, Vec<Mistake>) {
    policy::read_file_of(JudgedBy::ChangeGate, file, text)
}

pub(crate) fn validator() -> &'static Validator {
    static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| Validator::new(schema().clone()));
    &VALIDATOR
}

fn schema() -> &'static Schema {
    static READ: LazyLock<Schema> = LazyLock::new(|| {
        let (schema, _warnings) =
            Schema::from_cedarschema_str(SCHEMA).expect("INVARIANT: the published schema is a valid schema");
        schema
    });
    &READ
}

impl ChangeGate {
    /// The gate of a mesh that brings none.
    pub fn shipped() -> Arc<Self> {
        static GATE: LazyLock<Arc<ChangeGate>> = LazyLock::new(|| {
            let (policies, mistakes) = read_file(SHIPPED_FILE, SHIPPED);
            assert!(mistakes.is_empty(), "INVARIANT: the shipped gate is valid: {mistakes:?}");
            let texts = policies.into_iter().map(|policy| (policy.id, SHIPPED_FILE.into(), policy.text));
            Arc::new(ChangeGate::compile(texts).expect("INVARIANT: the shipped gate is valid"))
        });
        GATE.clone()
    }

    /// The gate of `state`: its own policies, whose texts `text_of` knows, or the shipped ones when it has none.
    pub fn of(state: &MeshState, text_of: impl Fn(&Digest) -> Option<Arc<str>>) -> Result<Arc<Self>, Vec<PolicyError>> {
        if state.gate.is_empty() {
            return Ok(Self::shipped());
        }
        let (mut texts, mut errors) = (Vec::new(), Vec::new());
        for (id, policy) in &state.gate {
            match text_of(&policy.body) {
                Some(text) => texts.push((id.clone(), policy.file.clone(), text)),
                None => errors.push(PolicyError {
                    id: id.clone(),
                    file: policy.file.clone(),
                    what: format!("its text {} is missing", policy.body.short()),
                }),
            }
        }
        if errors.is_empty() { Self::compile(texts).map(Arc::new) } else { Err(errors) }
    }

    fn compile(texts: impl IntoIterator<Item = (PolicyId, Arc<str>, Arc<str>)>) -> Result<Self, Vec<PolicyError>> {
        let mut gate = Self { permits: PolicySet::new(), forbids: PolicySet::new(), obligations: BTreeMap::default() };
        let mut errors = Vec::new();
        for (id, file, text) in texts {
            let mut refuse = |what| errors.push(PolicyError { id: id.clone(), file: file.clone(), what });
            let (parsed, own_id) = match policy::one_policy(JudgedBy::ChangeGate, &text) {
                Ok(parsed) => parsed,
                Err(mistakes) => {
                    let all: Vec<_> = mistakes.into_iter().map(|mistake| mistake.what).collect();
                    refuse(all.join("; "));
                    continue;
                }
            };
            if own_id != id {
                refuse(format!("its text has the id `{own_id}`"));
                continue;
            }
            let lifted_by = policy::obligation(&parsed);
            let countersign = policy::annotation(&parsed, "countersign").and_then(|count| count.parse().ok());
            if lifted_by.is_some() || countersign.is_some() {
                let Obligation { factor, max_age_seconds } =
                    lifted_by.unwrap_or(Obligation { factor: None, max_age_seconds: None });
                let requires = Requires { factor, max_age_seconds, countersign: countersign.unwrap_or(0) };
                gate.obligations.insert(id.to_string(), requires);
            }
            let parsed = Policy::from(parsed);
            let set = if parsed.effect() == Effect::Permit { &mut gate.permits } else { &mut gate.forbids };
            if let Err(error) = set.add(parsed) {
                refuse(error.to_string());
            }
        }
        if errors.is_empty() { Ok(gate) } else { Err(errors) }
    }

    /// Judges a whole change-set: every change must pass, and what they require is merged to the strictest.
    ///
    /// INVARIANT (nobody-unproven): no policy lets an operator through who has shown nothing, whatever it says; and a
    /// recovery code alone opens the way to a new factor of one's own and to nothing else.
    ///
    /// INVARIANT (bots-not-exempt): no policy lets a pipeline through whom no operator has countersigned.
    ///
    /// INVARIANT (no-word-for-a-factor): no policy lets a person through whom a provider vouched for and no operator has
    /// countersigned; and where it asks for countersignatures, one more stands in for the factor that nobody here has seen.
    pub fn decide(&self, asked: &Asked<'_>) -> Answer {
        let (mut requires, mut denied) = (Requires::default(), Vec::new());
        if let Author::Person(person) = asked.author
            && person.roles(asked.state).is_empty()
        {
            return Answer::Deny(vec![nobody(person)]);
        }
        let questions = match Questions::of(asked) {
            Ok(questions) => questions,
            Err(what) => return Answer::Deny(vec![what]),
        };
        for change in &asked.change_set.changes {
            match self.decide_one(asked, &questions, change) {
                Ok(more) => requires = requires.strictest(more),
                Err(why) if denied.len() < DENIED_MAX => denied.push(format!("{}: {why}", change.subject())),
                Err(_) => {}
            }
        }
        if !denied.is_empty() {
            return Answer::Deny(denied);
        }
        if let Author::Operator(author) = asked.author
            && !requires.asks_author()
            && !proves_enough(asked, author)
        {
            requires.factor = Some(Factor::Mfa);
        }
        if matches!(asked.author, Author::Pipeline(_) | Author::Person(_)) && asked.approvals.is_empty() {
            requires.countersign = requires.countersign.max(1);
        }
        if requires.asks_author() {
            Answer::StepUp(requires)
        } else if requires.countersign > 0 {
            Answer::NeedsCountersign(requires)
        } else {
            Answer::Permit
        }
    }

    /// Whether some operator, with the best of their factors and everyone else's countersignature, could still change the
    /// gate and the operators of `state`. A gate that nobody can mend is not to be put up.
    pub fn is_mendable(&self, state: &MeshState, now_seconds: i64) -> bool {
        let strong =
            |operator: &&Operator| operator.factors.values().any(|factor| factor.kind() != FactorKind::Recovery);
        state.operators.iter().filter(|(_, operator)| strong(operator)).any(|(name, operator)| {
            let mut assurance = Assurance::default();
            for factor in operator.factors.values() {
                let is_key = factor.kind().is_webauthn();
                let at_seconds = now_seconds;
                assurance.add(Proof { kind: factor.kind(), at_seconds, user_verified: is_key, device_bound: is_key });
            }
            let approvals = state.operators.iter().filter(|(_, other)| strong(other)).map(|(other, _)| other.clone());
            let change_set = ChangeSet {
                base: Default::default(),
                changes: vec![
                    Change::SetGatePolicy { id: "any".into(), file: "gate/any.cedar".into(), body: Digest::default() },
                    Change::SetOperatorRoles { name: name.clone(), roles: operator.roles.clone() },
                ],
            };
            let asked = Asked {
                author: &Author::Operator(name.clone()),
                change_set: &change_set,
                state,
                assurance: &assurance,
                asked_at_seconds: now_seconds,
                approvals: &approvals.collect(),
                origin: Origin::Socket,
                risk: 0,
                now_seconds,
            };
            self.decide(&asked) == Answer::Permit
        })
    }

    /// What one change requires; the error says why nothing helps.
    fn decide_one(&self, asked: &Asked<'_>, questions: &Questions, change: &Change) -> Result<Requires, String> {
        if matches!(change, Change::Recover { .. }) {
            return Err("a recovery is made with the control plane's files and what opens them".to_owned());
        }
        let resource = resource_of(change, asked.state);
        let mut requires = self.decide_on(asked, questions, change.kind(), &resource, &questions.after)?;
        if let Some(before) = &questions.before
            && is_of_service(change)
        {
            requires = requires.strictest(self.decide_on(asked, questions, change.kind(), &resource, before)?);
        }
        Ok(requires)
    }

    fn decide_on(
        &self,
        asked: &Asked<'_>,
        questions: &Questions,
        action: &str,
        resource: &EntityUid,
        entities: &Entities,
    ) -> Result<Requires, String> {
        let (principal, resource) = (questions.principal.clone(), resource.clone());
        let request =
            Request::new(principal, uid("Action", action), resource, questions.context.clone(), Some(schema()))
                .map_err(|error| format!("the question is not one that the gate knows: {error}"))?;
        let authorizer = Authorizer::new();
        let permitted = authorizer.is_authorized(&request, &self.permits, entities);
        let forbidden = authorizer.is_authorized(&request, &self.forbids, entities);
        let faults: Vec<String> =
            permitted.diagnostics().errors().chain(forbidden.diagnostics().errors()).map(ToString::to_string).collect();
        if !faults.is_empty() {
            return Err(format!("a policy of the gate cannot be evaluated: {}", faults.join("; ")));
        }
        let (mut requires, mut hard) = (Requires::default(), Vec::new());
        for id in forbidden.diagnostics().reason().map(ToString::to_string) {
            match self.obligations.get(&id) {
                Some(obligation) => requires = requires.strictest(obligation.unmet(asked)),
                None => hard.push(id),
            }
        }
        if !hard.is_empty() {
            hard.sort();
            return Err(format!("forbidden by {}", hard.join(", ")));
        }
        if permitted.decision() != Decision::Allow {
            return Err(format!("no policy of the gate permits `{}` to {action}", asked.author));
        }
        Ok(requires)
    }
}

impl Requires {
    /// What satisfies both.
    pub fn strictest(self, other: Self) -> Self {
        let of = |requires: &Self| Obligation { factor: requires.factor, max_age_seconds: requires.max_age_seconds };
        let Obligation { factor, max_age_seconds } = of(&self).strictest(of(&other));
        Self { factor, max_age_seconds, countersign: self.countersign.max(other.countersign) }
    }

    /// Whether a code of an authenticator app is enough of the author.
    pub fn accepts_code(&self) -> bool {
        self.factor <= Some(Factor::Mfa)
    }

    /// Whether the author has to show something.
    pub fn asks_author(&self) -> bool {
        self.factor.is_some() || self.max_age_seconds.is_some()
    }

    /// What is left of it after what was shown.
    fn unmet(&self, asked: &Asked<'_>) -> Self {
        let mut left = match asked.author {
            Author::Operator(_) | Author::Pipeline(_) => *self,
            // They have nothing to show: one operator more does.
            Author::Person(_) => Self { countersign: self.countersign + 1, ..Self::default() },
        };
        let obligation = Obligation { factor: self.factor, max_age_seconds: self.max_age_seconds };
        if left.asks_author() && asked.assurance.meets(&obligation, asked.asked_at_seconds) {
            (left.factor, left.max_age_seconds) = (None, None);
        }
        if approvals(asked).count() >= left.countersign as usize {
            left.countersign = 0;
        }
        left
    }
}

/// Who countersigned: an author cannot countersign what they asked for.
fn approvals<'a>(asked: &Asked<'a>) -> impl Iterator<Item = &'a OperatorName> {
    let author = asked.author;
    asked.approvals.iter().filter(move |approver| !matches!(author, Author::Operator(name) if name == *approver))
}

fn proves_enough(asked: &Asked<'_>, author: &OperatorName) -> bool {
    let own_factor = |change: &Change| matches!(change, Change::AddFactor { operator, .. } if operator == author);
    let recovers = asked.assurance.proofs().iter().any(|proof| proof.kind == FactorKind::Recovery)
        && asked.change_set.changes.iter().all(own_factor);
    recovers || asked.assurance.strongest(asked.asked_at_seconds, None).is_some()
}

/// What does not differ between the changes of a change-set.
struct Questions {
    principal: EntityUid,
    context: Context,
    /// Services as they will be.
    after: Entities,
    /// Services as they are, when a change moves one.
    before: Option<Entities>,
}

impl Questions {
    fn of(asked: &Asked<'_>) -> Result<Self, String> {
        let unfit = |error: &dyn fmt::Display| format!("the question cannot be put to the gate: {error}");
        let principal = match asked.author {
            Author::Operator(name) => uid("Operator", name.as_str()),
            Author::Pipeline(pipeline) => uid("Pipeline", &pipeline.name),
            Author::Person(person) => uid("Person", &person.to_string()),
        };
        let context = context(asked).map_err(|error| unfit(&error))?;
        let after = services(asked, |change, held| match change {
            Change::DeclareService { spec, .. } => Some(spec.clone()),
            _ => held,
        });
        let before = services(asked, |change, held| match (change, held) {
            (Change::DeclareService { spec, .. }, None) => Some(spec.clone()),
            (_, held) => held,
        });
        let before = if before == after { None } else { Some(before) };
        let entities = |services: BTreeMap<String, Option<ServiceSpec>>| {
            let all = people(asked)
                .into_iter()
                .chain(pipelines(asked))
                .chain(vouched_for(asked))
                .chain(services.iter().map(|(name, spec)| service(name, spec.as_ref())));
            Entities::from_entities(all, Some(schema())).map_err(|error| unfit(&error))
        };
        Ok(Self { principal, context, after: entities(after)?, before: before.map(entities).transpose()? })
    }
}

fn is_of_service(change: &Change) -> bool {
    service_of(change).is_some()
}

/// The service that a change is about, if it is about one.
fn service_of(change: &Change) -> Option<&ServiceName> {
    match change {
        Change::DeclareService { name, .. }
        | Change::RemoveService { name }
        | Change::Deploy { service: name, .. }
        | Change::QuarantineService { name }
        | Change::ApproveService { name }
        | Change::SuspendService { name, .. }
        | Change::ResumeService { name }
        | Change::ApproveEdge { service: name, .. }
        | Change::RevokeEdge { service: name, .. } => Some(name),
        _ => None,
    }
}

/// Every service that the change-set is about, with what it declares.
fn services(
    asked: &Asked<'_>,
    spec_of: impl Fn(&Change, Option<ServiceSpec>) -> Option<ServiceSpec>,
) -> BTreeMap<String, Option<ServiceSpec>> {
    let mut services = BTreeMap::new();
    for change in &asked.change_set.changes {
        let Some(name) = service_of(change) else { continue };
        let held = asked.state.services.get(name).map(|service| service.spec.clone());
        let held = services.remove(name.as_str()).unwrap_or(held);
        services.insert(name.to_string(), spec_of(change, held));
    }
    services
}

fn service(name: &str, spec: Option<&ServiceSpec>) -> Entity {
    let namespace = spec.and_then(|spec| spec.namespace.as_deref()).map(|name| uid("Namespace", name));
    let sensitivity = spec.and_then(|spec| spec.sensitivity.as_deref()).map(|name| uid("Sensitivity", name));
    Entity::new_no_attrs(uid("Service", name), namespace.into_iter().chain(sensitivity).collect())
}

/// The operators, those that the change-set brings among them.
fn people(asked: &Asked<'_>) -> Vec<Entity> {
    let brought = asked.change_set.changes.iter().filter_map(|change| match change {
        Change::InviteOperator { name, .. } if !asked.state.operators.contains_key(name) => Some(name),
        _ => None,
    });
    let brought: BTreeSet<&OperatorName> = brought.collect();
    let invited = Operator::default();
    let held = asked.state.operators.iter();
    held.chain(brought.into_iter().map(|name| (name, &invited)))
        .filter_map(|(name, operator)| {
            let attributes =
                HashMap::from([("has_key".to_owned(), RestrictedExpression::new_bool(operator.can_sign()))]);
            let roles: HashSet<EntityUid> = operator.roles.iter().map(|role| uid("Role", role)).collect();
            Entity::new(uid("Operator", name.as_str()), attributes, roles).ok()
        })
        .collect()
}

/// The pipelines, with what the mesh trusts them with.
fn pipelines(asked: &Asked<'_>) -> impl Iterator<Item = Entity> {
    asked.state.pipelines.iter().map(|(name, pipeline)| {
        let roles: HashSet<EntityUid> = pipeline.roles.iter().map(|role| uid("Role", role)).collect();
        Entity::new_no_attrs(uid("Pipeline", name), roles)
    })
}

/// Who asks, when a provider vouched for them, with what their groups mean now.
fn vouched_for(asked: &Asked<'_>) -> Option<Entity> {
    let Author::Person(person) = asked.author else { return None };
    let roles: HashSet<EntityUid> = person.roles(asked.state).iter().map(|role| uid("Role", role)).collect();
    Some(Entity::new_no_attrs(uid("Person", &person.to_string()), roles))
}

fn nobody(person: &Person) -> String {
    format!("`{person}` is in no group that means anything here")
}

fn resource_of(change: &Change, state: &MeshState) -> EntityUid {
    match change {
        Change::CreateMesh { trust_domain } => uid("Mesh", trust_domain.as_str()),
        Change::SealSettings { .. }
        | Change::RotateSealingKey { .. }
        | Change::SetAuthenticators { .. }
        | Change::RemoveAuthenticators {}
        | Change::SetLifetimes { .. }
        | Change::RemoveLifetimes {} => uid("Mesh", state.trust_domain.as_ref().map_or("", |name| name.as_str())),
        Change::DeclareService { name, .. }
        | Change::RemoveService { name }
        | Change::Deploy { service: name, .. }
        | Change::QuarantineService { name }
        | Change::ApproveService { name }
        | Change::SuspendService { name, .. }
        | Change::ResumeService { name }
        | Change::ApproveEdge { service: name, .. }
        | Change::RevokeEdge { service: name, .. } => uid("Service", name.as_str()),
        Change::SetRole { name, .. } | Change::RemoveRole { name } => uid("Role", name),
        Change::SetPolicy { id, .. } | Change::RemovePolicy { id } => uid("Policy", id),
        Change::SetGatePolicy { id, .. } | Change::RemoveGatePolicy { id } => uid("GatePolicy", id),
        Change::SetRoute { name, .. } | Change::RemoveRoute { name } => uid("Route", name),
        Change::InviteOperator { name, .. }
        | Change::EnrollOperator { name, .. }
        | Change::RemoveOperator { name }
        | Change::SetOperatorRoles { name, .. }
        | Change::AddFactor { operator: name, .. }
        | Change::RemoveFactor { operator: name, .. }
        | Change::Recover { operator: name, .. } => uid("Operator", name.as_str()),
        Change::SetIssuer { name, .. } | Change::RemoveIssuer { name } => uid("Issuer", name),
        Change::SetPipeline { name, .. } | Change::RemovePipeline { name } => uid("Pipeline", name),
        Change::SetSignIn { name, .. } | Change::RemoveSignIn { name } => uid("SignIn", name),
        Change::SetClient { name, .. } | Change::RemoveClient { name } => uid("Client", name.as_str()),
    }
}

fn context(asked: &Asked<'_>) -> Result<Context, String> {
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let record = |members: Vec<(&str, RestrictedExpression)>| {
        RestrictedExpression::new_record(members.into_iter().map(|(name, value)| (name.to_owned(), value)))
            .map_err(|error| error.to_string())
    };
    let mut ages: BTreeMap<&str, i64> = BTreeMap::new();
    for proof in asked.assurance.proofs() {
        let age = asked.asked_at_seconds.saturating_sub(proof.at_seconds);
        let known = ages.entry(proof.kind.as_str()).or_insert(age);
        *known = age.min(*known);
    }
    let ages = ages.into_iter().map(|(kind, age)| (kind, RestrictedExpression::new_long(age))).collect();
    let any = |holds: fn(&Proof) -> bool| RestrictedExpression::new_bool(asked.assurance.proofs().iter().any(holds));
    let assurance = record(vec![
        ("ages", record(ages)?),
        ("phishing_resistant", any(|proof| proof.strength() >= Some(Factor::Phr))),
        ("user_verified", any(|proof| proof.user_verified)),
    ])?;
    let origin = match asked.origin {
        Origin::Socket => record(vec![("kind", text("socket"))])?,
        Origin::Network(ip) => {
            record(vec![("kind", text("network")), ("ip", RestrictedExpression::new_ip(ip.to_string()))])?
        }
    };
    let now = OffsetDateTime::from_unix_timestamp(asked.now_seconds).map_err(|error| error.to_string())?;
    let time = record(vec![
        ("now", RestrictedExpression::new_datetime(now.format(&Rfc3339).map_err(|error| error.to_string())?)),
        ("hour", RestrictedExpression::new_long(now.hour().into())),
        ("weekday", RestrictedExpression::new_long(now.weekday().number_from_monday().into())),
    ])?;
    let approvals = approvals(asked).map(|name| RestrictedExpression::new_entity_uid(uid("Operator", name.as_str())));
    let keys_enrolled = asked.state.operators.values().any(Operator::can_sign);
    let mut members = vec![
        ("assurance", assurance),
        ("approvals", RestrictedExpression::new_set(approvals)),
        ("origin", origin),
        ("time", time),
        ("keys_enrolled", RestrictedExpression::new_bool(keys_enrolled)),
    ];
    if let Author::Operator(_) = asked.author {
        members.push(("risk", record(vec![("operator", RestrictedExpression::new_long(asked.risk.into()))])?));
    }
    if let Author::Pipeline(pipeline) = asked.author {
        let claims = RestrictedExpression::new_set(pipeline.claims.iter().map(|claim| text(claim)));
        let claims =
            record(vec![("issuer", text(&pipeline.issuer)), ("subject", text(&pipeline.subject)), ("claims", claims)])?;
        members.push(("pipeline", claims));
    }
    if let Author::Person(person) = asked.author {
        let groups = RestrictedExpression::new_set(person.groups.iter().map(|group| text(group)));
        let (issuer, subject) = (text(&person.issuer), text(&person.subject));
        let person = record(vec![("issuer", issuer), ("subject", subject), ("groups", groups)])?;
        members.push(("person", person));
    }
    Context::from_pairs(members.into_iter().map(|(name, value)| (name.to_owned(), value)))
        .map_err(|error| error.to_string())
}

fn uid(kind: &str, id: &str) -> EntityUid {
    let kind = EntityTypeName::from_str(kind).expect("INVARIANT: a type of the schema is an identifier");
    EntityUid::from_type_name_and_id(kind, EntityId::new(id))
}

impl Author {
    /// The operator, if it is one.
    pub fn operator(&self) -> Option<&OperatorName> {
        match self {
            Self::Operator(name) => Some(name),
            Self::Pipeline(_) | Self::Person(_) => None,
        }
    }

    /// The pipeline, if it is one.
    pub fn pipeline(&self) -> Option<&Pipeline> {
        match self {
            Self::Pipeline(pipeline) => Some(pipeline),
            Self::Operator(_) | Self::Person(_) => None,
        }
    }

    /// The person whom a provider vouched for, if it is one.
    pub fn person(&self) -> Option<&Person> {
        match self {
            Self::Person(person) => Some(person),
            Self::Operator(_) | Self::Pipeline(_) => None,
        }
    }
}

/// As the ledger names them: no operator's name holds a `:`, and no sign-in is called like a pipeline's prefix.
impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator(name) => name.fmt(f),
            Self::Pipeline(pipeline) => write!(f, "{ACTOR_PREFIX}{}", pipeline.name),
            Self::Person(person) => person.fmt(f),
        }
    }
}

impl PartialEq<OperatorName> for Author {
    fn eq(&self, operator: &OperatorName) -> bool {
        self.operator() == Some(operator)
    }
}

impl PartialEq<Author> for OperatorName {
    fn eq(&self, author: &Author) -> bool {
        author == self
    }
}

impl fmt::Display for Requires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.asks_author() {
            let factor = match self.factor {
                None => "a factor",
                Some(Factor::Mfa) => "a second factor: a code, a passkey or a security key",
                Some(Factor::Phr) => "a passkey or a security key",
                Some(Factor::Phrh) => "a security key whose private key never leaves it",
            };
            let age = self.max_age_seconds.map(|age| format!(", shown at most {age} s ago")).unwrap_or_default();
            parts.push(format!("{factor}{age}"));
        }
        match self.countersign {
            0 => {}
            1 => parts.push("the countersignature of one other operator".to_owned()),
            count => parts.push(format!("the countersignatures of {count} other operators")),
        }
        f.write_str(&parts.join(", and "))
    }
}
