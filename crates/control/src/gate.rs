//! The change gate: the only room that makes an [`Admitted`]. What an operator's own tools found correct is examined
//! again from nothing: whoever can reach the socket may send anything.
//!
//! Until an owner is enrolled the mesh is unprotected: whoever owns the data directory acts as operator `local`, and
//! every change-set that is lawful passes. From the first enrolment on the change gate of `core` judges, and `local` may change
//! nothing. No factor is verified here, and nothing is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::Mutex;

use countersign_api::local::Apply;
use countersign_core::{
    assurance::{Assurance, FactorKind},
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Member, PolicyId, Revision},
    contract::Contract,
    countersignature::Countersignature,
    gate::{Answer, Asked, Author, ChangeGate, Origin, Requires, act::AskedTo},
    identity::{OperatorName, TrustDomain},
    pipeline::{self, MESH_ISSUER},
    policy::{self, Factor, Library, ParsedPolicy, PolicyError},
    signal::{Signals, statement::Subject},
    state::{MeshState, PolicyRef},
};

use crate::{ledger::Head, recover::KeyHeld};

/// Changes of one change-set at most.
pub const CHANGES_MAX: usize = 100_000;
/// Mistakes that one answer names at most.
const MISTAKES_MAX: usize = 50;
/// The operator of an unprotected mesh: whoever owns the data directory.
pub const LOCAL: &str = "local";

/// Judges change-sets. Remembers parsed policies, so that a change costs what changed.
#[derive(Default)]
pub struct Gate {
    library: Mutex<Library>,
    /// The change gate that was last in force.
    change_gate: Mutex<Option<InForce>>,
    /// What is said of operators, among others.
    signals: Mutex<Signals>,
}

/// A change gate, ready to judge, and the policies that it was made of.
struct InForce {
    policies: BTreeMap<PolicyId, PolicyRef>,
    gate: Arc<ChangeGate>,
}

/// A change-set that passed the gate, on the base it names.
///
/// INVARIANT (admitted-before-append): only [`Gate::admit_of`] makes one, and [`Admitted::of_recovery`] with a proof of the key; the
/// ledger takes nothing else.
#[derive(Debug)]
pub struct Admitted {
    change_set: ChangeSet,
    bodies: Bodies,
    actor: String,
    countersignatures: Vec<Countersignature>,
}

/// Why a change-set does not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// It was planned on another revision.
    Moved {
        /// The revision it was planned on.
        base: Revision,
        /// The revision now.
        held: Revision,
    },
    /// It would break the law; every mistake found, at most 50.
    Unlawful(Vec<String>),
    /// The mesh is protected, and its change gate does not let it through as it is.
    Gate {
        /// What the gate says; never a permit.
        answer: Answer,
        /// The digest of the change-set.
        digest: Digest,
    },
}

/// Who asks for a change-set, as far as it was proven.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Petitioner {
    /// Who is said to ask; nobody in an unprotected mesh.
    pub author: Option<Author>,
    /// Where it came in; at the socket when absent.
    pub from: Option<IpAddr>,
    /// What was proven: that it is they, how strongly, when.
    pub assurance: Assurance,
    /// When they asked, in seconds since 1970.
    pub asked_at_seconds: i64,
    /// Who countersigned, each proven.
    pub approvals: BTreeSet<OperatorName>,
    /// Whether factors in the change-set were verified by the control plane itself, in an enrolment.
    pub enrols: bool,
    /// What the author and those who countersigned have signed, each verified: it goes into the entry.
    pub countersignatures: Vec<Countersignature>,
}

impl Petitioner {
    /// An operator who asked at `at_seconds`, and has shown nothing yet.
    pub fn operator(name: OperatorName, at_seconds: i64) -> Self {
        Self { author: Some(Author::Operator(name)), asked_at_seconds: at_seconds, ..Self::default() }
    }
}

impl Admitted {
    /// Who asked for it.
    pub fn actor(&self) -> &str {
        &self.actor
    }

    /// The change-set, the texts it brings, who asked for it, and what was signed for it.
    pub fn into_parts(self) -> (ChangeSet, Bodies, String, Vec<Countersignature>) {
        (self.change_set, self.bodies, self.actor, self.countersignatures)
    }
}

impl Admitted {
    /// What goes past the gate: the appointment of an owner by whoever holds the control plane's files and what opens them.
    pub(crate) fn of_recovery(change_set: ChangeSet, _held: &KeyHeld) -> Self {
        Self { change_set, bodies: Bodies::default(), actor: LOCAL.into(), countersignatures: Vec::new() }
    }
}

impl Gate {
    /// Examines `asked`, of nobody in particular, against the mesh at `head`. `own` is the trust domain that the authority speaks
    /// for, once there is one.
    pub fn admit(&self, asked: Apply, head: &Head, own: Option<&TrustDomain>) -> Result<Admitted, Refused> {
        self.admit_of(asked, &Petitioner::default(), head, own, 0)
    }

    /// Examines `asked`, of `petitioner`, against the mesh at `head`, and puts it to the change gate when the mesh is protected.
    ///
    /// INVARIANT (gated): a protected mesh admits only what its own change gate, as it stands before the change, permits to an
    /// operator who has proven to be one, or to somebody without a factor here for whom an operator countersigned.
    pub fn admit_of(
        &self,
        asked: Apply,
        petitioner: &Petitioner,
        head: &Head,
        own: Option<&TrustDomain>,
        now_seconds: i64,
    ) -> Result<Admitted, Refused> {
        let Apply { change_set, bodies } = asked;
        let (base, held) = (change_set.base, head.follower.revision());
        let moved = Err(Refused::Moved { base, held });
        // What is signed outlives entries that do not concern it; nothing else does.
        if base != held && (!head.follower.state().is_protected() || head.keyring.still_holds(&change_set).is_err()) {
            return moved;
        }
        let mut mistakes = mistakes_of_texts(&change_set, &bodies, head);
        for change in &change_set.changes {
            if let (Change::CreateMesh { trust_domain }, Some(own)) = (change, own)
                && trust_domain != own
            {
                mistakes.push(format!("the mesh is `{trust_domain}`, but this control plane's keys speak for `{own}`"));
            }
            if matches!(change, Change::EnrollOperator { .. } | Change::AddFactor { .. }) && !petitioner.enrols {
                mistakes.push(format!("{}: a factor comes in by an enrolment, which verifies it", change.subject()));
            }
        }
        match head.follower.state().apply_all(&change_set) {
            Ok(next) if mistakes.is_empty() => {
                mistakes = mistakes_of_references(&next);
                mistakes.extend(mistakes_of_standing(&change_set, head.follower.state(), &next));
                mistakes.extend(self.mistakes_of_policies(&next, &bodies, head));
                mistakes.extend(mistakes_of_gate(&next, &bodies, head, now_seconds));
            }
            Ok(_) => {}
            Err(error) => mistakes.push(error.to_string()),
        }
        if !mistakes.is_empty() {
            let more = mistakes.len().saturating_sub(MISTAKES_MAX);
            mistakes.truncate(MISTAKES_MAX);
            if more > 0 {
                mistakes.push(format!("and {more} more"));
            }
            return Err(Refused::Unlawful(mistakes));
        }
        if !head.follower.state().is_protected() {
            return Ok(Admitted { change_set, bodies, actor: LOCAL.into(), countersignatures: Vec::new() });
        }
        let answer = self.answer(&change_set, petitioner, head, now_seconds);
        let answer = with_seal(answer, head, petitioner);
        match (answer, &petitioner.author) {
            (Answer::Permit, Some(_)) if base != held && petitioner.countersignatures.is_empty() => moved,
            (Answer::Permit, Some(author)) => {
                let (actor, countersignatures) = (author.to_string(), petitioner.countersignatures.clone());
                Ok(Admitted { change_set, bodies, actor, countersignatures })
            }
            (answer, _) => Err(Refused::Gate { answer, digest: change_set.digest() }),
        }
    }

    /// What the change gate of the mesh at `head` says to `change_set`, of `petitioner`. It admits nothing.
    pub fn answer(&self, change_set: &ChangeSet, petitioner: &Petitioner, head: &Head, now_seconds: i64) -> Answer {
        let Some(author) = &petitioner.author else {
            return Answer::Deny(vec!["the mesh is protected: an operator has to ask".to_owned()]);
        };
        let gate = match self.change_gate(head) {
            Ok(gate) => gate,
            Err(errors) => return Answer::Deny(errors.iter().map(ToString::to_string).collect()),
        };
        gate.decide(&Asked {
            author,
            change_set,
            state: head.follower.state(),
            assurance: &petitioner.assurance,
            asked_at_seconds: petitioner.asked_at_seconds,
            approvals: &petitioner.approvals,
            origin: petitioner.from.map_or(Origin::Socket, Origin::Network),
            risk: self.risk_of(author, now_seconds),
            now_seconds,
        })
    }

    /// Goes by these signals from now on.
    pub fn heed(&self, signals: Signals) {
        *self.signals.lock() = signals;
    }

    /// The risk of whoever asks, as signals say.
    pub fn risk_of(&self, author: &Author, now_seconds: i64) -> u8 {
        let Some(operator) = author.operator() else { return 0 };
        let now_ms = u64::try_from(now_seconds).unwrap_or(0) * 1000;
        self.signals.lock().risk(&Subject::Operator(operator.clone()), now_ms)
    }

    /// What the change gate of the mesh at `head` says to an act that changes nothing.
    pub fn answer_act(&self, asked: &AskedTo<'_>, head: &Head) -> Answer {
        match self.change_gate(head) {
            Ok(gate) => gate.decide_act(asked),
            Err(errors) => Answer::Deny(errors.iter().map(ToString::to_string).collect()),
        }
    }

    fn change_gate(&self, head: &Head) -> Result<Arc<ChangeGate>, Vec<PolicyError>> {
        let (state, bodies) = (head.follower.state(), head.follower.bodies());
        let mut known = self.change_gate.lock();
        if let Some(in_force) = known.as_ref().filter(|in_force| in_force.policies == state.gate) {
            return Ok(in_force.gate.clone());
        }
        let gate = ChangeGate::of(state, |digest| bodies.get(digest).cloned())?;
        *known = Some(InForce { policies: state.gate.clone(), gate: gate.clone() });
        Ok(gate)
    }

    /// The policies in force at `head`, parsed.
    pub fn policies(&self, head: &Head) -> Vec<Arc<ParsedPolicy>> {
        let mut library = self.library.lock();
        let follower = &head.follower;
        let texts = follower.state().policies.values().filter_map(|p| Some((p.body, follower.bodies().get(&p.body)?)));
        texts.filter_map(|(digest, text)| library.insert(digest, text).ok()).collect()
    }

    /// The contract of `digest`, which is in force at `head`.
    pub fn contract(&self, digest: &Digest, head: &Head) -> Option<Contract> {
        let text = head.follower.bodies().get(digest)?;
        self.library.lock().insert_contract(*digest, text).ok().cloned()
    }

    /// Every policy that does not parse, does not validate strictly, or names what does not exist in `next`, and every contract
    /// that cannot be read.
    fn mistakes_of_policies(&self, next: &MeshState, brought: &Bodies, head: &Head) -> Vec<String> {
        let mut library = self.library.lock();
        let mut mistakes = Vec::new();
        for (id, policy) in &next.policies {
            let text = brought.get(&policy.body).or_else(|| head.follower.bodies().get(&policy.body));
            if let Some(Err(what)) = text.map(|text| library.insert(policy.body, text)) {
                mistakes.push(format!("policy `{id}` ({}): {what}", policy.file));
            }
        }
        for (name, service) in &next.services {
            let Some(digest) = service.spec.contract else { continue };
            let text = brought.get(&digest).or_else(|| head.follower.bodies().get(&digest));
            if let Some(Err(what)) = text.map(|text| library.insert_contract(digest, text)) {
                mistakes.push(format!("service `{name}`: {what}"));
            }
        }
        if mistakes.is_empty() {
            mistakes.extend(policy::mistakes_of_state(next, &library).iter().map(ToString::to_string));
        }
        // What was refused, and what is not in force any more, is not kept.
        let in_force: BTreeSet<_> = head.follower.state().bodies().chain(next.bodies()).collect();
        library.retain(|digest| in_force.contains(digest));
        mistakes
    }
}

/// What the gate says and the seal asks for beside it: signatures, the author's first.
fn with_seal(answer: Answer, head: &Head, petitioner: &Petitioner) -> Answer {
    let Some(seal) = head.keyring.seal() else { return answer };
    let signers: BTreeSet<_> = petitioner.countersignatures.iter().map(|signed| &signed.operator).collect();
    let missing = seal.quorum.saturating_sub(signers.len() as u32);
    // Who is no operator signs nothing: as many others do.
    let author = petitioner.author.as_ref();
    let author_signed = author.is_some_and(|author| author.operator().is_none_or(|name| signers.contains(name)));
    let of_author = || Requires { factor: Some(Factor::Phr), max_age_seconds: None, countersign: missing - 1 };
    let of_others = Requires { countersign: missing, ..Requires::default() };
    match answer {
        _ if missing == 0 => answer,
        Answer::Deny(_) => answer,
        Answer::StepUp(requires) if author_signed => Answer::StepUp(requires.strictest(of_others)),
        Answer::StepUp(requires) => Answer::StepUp(requires.strictest(of_author())),
        Answer::NeedsCountersign(requires) => Answer::NeedsCountersign(requires.strictest(of_others)),
        Answer::Permit if author_signed => Answer::NeedsCountersign(of_others),
        Answer::Permit => Answer::StepUp(of_author()),
    }
}

/// The services that would be part of a protected mesh without anybody having let them in.
///
/// INVARIANT (let-in-by-somebody): in a protected mesh a service becomes part of it only by a change that lifts what barred it before.
fn mistakes_of_standing(change_set: &ChangeSet, before: &MeshState, next: &MeshState) -> Vec<String> {
    if !before.is_protected() {
        return Vec::new();
    }
    let is_among = |holds: &dyn Fn(&Change) -> bool| change_set.changes.iter().any(holds);
    let mut mistakes = Vec::new();
    for name in next.services.keys().filter(|name| next.is_active(name)) {
        let removed = is_among(&|change| matches!(change, Change::RemoveService { name: gone } if gone == name));
        let lifted = is_among(
            &|change| matches!(change, Change::ApproveService { name: lifted } | Change::ResumeService { name: lifted } if lifted == name),
        );
        let stays = before.is_active(name) && !removed;
        let let_in = before.barred.contains_key(name) && !removed && lifted;
        if !stays && !let_in {
            mistakes.push(format!(
                "service `{name}` is new: in a protected mesh it begins quarantined (`quarantine_service`), and is approved by itself; \
                 plan again with a command of this version"
            ));
        }
    }
    mistakes
}

/// What is wrong with the change gate and the operators that the changes lead to: policies that are not valid, an operator who
/// could show nothing any more, and a gate that nobody could change again.
fn mistakes_of_gate(next: &MeshState, brought: &Bodies, head: &Head, now_seconds: i64) -> Vec<String> {
    let before = head.follower.state();
    if next.gate == before.gate && next.operators == before.operators {
        return Vec::new();
    }
    let mut mistakes = Vec::new();
    for (name, operator) in &next.operators {
        let is_enrolled =
            !operator.factors.is_empty() || before.operators.get(name).is_some_and(|o| !o.factors.is_empty());
        if is_enrolled && operator.factors.values().all(|factor| factor.kind() == FactorKind::Recovery) {
            mistakes.push(format!("operator `{name}` would be left without a factor; remove the operator instead"));
        }
    }
    let text_of = |digest: &Digest| brought.get(digest).or_else(|| head.follower.bodies().get(digest)).cloned();
    match ChangeGate::of(next, text_of) {
        Err(errors) => mistakes.extend(errors.iter().map(|error| format!("gate {error}"))),
        Ok(gate) if next.is_protected() && !gate.is_mendable(next, now_seconds) => mistakes.push(
            "no operator would be left whom the gate lets change the gate and the operators: the last owner stays"
                .to_owned(),
        ),
        Ok(_) => {}
    }
    mistakes
}

fn mistakes_of_texts(change_set: &ChangeSet, bodies: &Bodies, head: &Head) -> Vec<String> {
    let mut mistakes = Vec::new();
    if change_set.changes.is_empty() {
        mistakes.push("it holds no change".into());
    }
    if change_set.changes.len() > CHANGES_MAX {
        mistakes.push(format!("it holds {} changes; at most {CHANGES_MAX} are taken", change_set.changes.len()));
    }
    for digest in bodies.forged() {
        mistakes.push(format!("a text that came as {} does not hash to it", digest.short()));
    }
    let named: BTreeSet<_> = change_set.changes.iter().filter_map(Change::body).collect();
    for (digest, _) in bodies.iter().filter(|(digest, _)| !named.contains(digest)) {
        mistakes.push(format!("text {} belongs to no change", digest.short()));
    }
    for change in &change_set.changes {
        let Some(digest) = change.body() else { continue };
        if bodies.get(&digest).is_none() && head.follower.bodies().get(&digest).is_none() {
            mistakes.push(format!("{}: its text {} did not come with it", change.subject(), digest.short()));
        }
    }
    mistakes
}

/// Every name in the state that the changes lead to which stands for nothing there.
fn mistakes_of_references(next: &MeshState) -> Vec<String> {
    let mut mistakes = Vec::new();
    let declared = |service| next.services.contains_key(service);
    for (name, service) in &next.services {
        for upstream in service.spec.upstreams.iter().filter(|upstream| !declared(upstream)) {
            mistakes.push(format!("service `{name}` names upstream `{upstream}`, which is not declared"));
        }
    }
    for (role, members) in &next.roles {
        for member in members {
            if let Member::Service(service) = member
                && !declared(service)
            {
                mistakes.push(format!("role `{role}` has member `{service}`, which is not declared"));
            }
        }
    }
    for (name, pipeline) in &next.pipelines {
        let issuer = next.issuers.get(&pipeline.issuer);
        let refusals = match (&next.trust_domain, issuer) {
            (Some(trust_domain), None) if *pipeline.issuer == *MESH_ISSUER => {
                pipeline::workload_refusals(trust_domain, &pipeline.claims)
            }
            (_, issuer) => {
                if issuer.is_none() {
                    let issuer = &pipeline.issuer;
                    mistakes.push(format!("pipeline `{name}` names issuer `{issuer}`, which is not declared"));
                }
                pipeline::refusals(issuer.map(|issuer| issuer.url.as_str()), &pipeline.claims)
            }
        };
        mistakes.extend(refusals.into_iter().map(|refusal| format!("pipeline `{name}`: {}", refusal.what)));
    }
    for (name, sign_in) in &next.sign_ins {
        if !next.issuers.contains_key(&sign_in.issuer) {
            mistakes.push(format!("sign-in `{name}` names issuer `{}`, which is not declared", sign_in.issuer));
        }
        if let Some(pipeline) = sign_in.is_confused_with(&next.issuers, &next.pipelines) {
            mistakes.push(format!("sign-in `{name}`: its tokens would be taken for those of pipeline `{pipeline}`"));
        }
    }
    for (name, route) in &next.routes {
        for service in std::iter::once(&route.service).chain(route.split.keys()).filter(|service| !declared(service)) {
            mistakes.push(format!("route `{name}` names service `{service}`, which is not declared"));
        }
    }
    mistakes
}

#[cfg(test)]
mod tests {
    use countersign_core::{pipeline::Issuer, sign_in::SignIn};

    use super::*;

    #[test]
    fn an_issuer_that_a_sign_in_names_does_not_go_before_it() {
        let sign_in = SignIn {
            issuer: "corp".into(),
            client_id: "mesh".into(),
            groups_claim: "groups".into(),
            roles: [("staff".to_owned(), ["editor".into()].into())].into(),
        };
        let mut state = MeshState::default();
        state.sign_ins.insert("corp".into(), sign_in);
        assert_eq!(mistakes_of_references(&state), ["sign-in `corp` names issuer `corp`, which is not declared"]);
        let issuer = Issuer { url: "https://id.example".into(), audience: "mesh".into() };
        state.issuers.insert("corp".into(), issuer);
        assert_eq!(mistakes_of_references(&state), [""; 0]);
    }
}
