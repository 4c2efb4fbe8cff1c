//! Change-sets on a protected mesh, from being asked for to being in the ledger: what the gate asks of their author, what waits
//! for a factor or for other operators, and what became of it.
//!
//! A proposal is bound to its base, the ledger's root there and its digest, and is good once: what it would apply was stored
//! when it was asked for, and an entry since then that wrote what it reads or writes voids it. No answer of the gate is given here, and no factor verified.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use countersign_api::local::{
    AnsweredProposal, Applied, Apply, ApplyAs, Ceremony, GateOutcome, Problem, Proposal, ProposalDetail, ProposalState,
    Shown,
};
use countersign_core::{
    assurance::{Proof, webauthn::LOCAL_ORIGIN},
    canonical::Digest,
    change::{Change, ChangeSet, Revision},
    countersignature::Countersignature,
    gate::{Answer, Author, Requires},
    identity::OperatorName,
    ledger::Entry,
    sign_in::Person,
};

use crate::{
    Plane, ceremony,
    gate::{Petitioner, Refused},
    ledger::Head,
    local_api::{self, gate_problem, problem, store_problem},
    mfa::{self, CodeRefused, ShownFactor},
    site::session::Who,
    store::StoredProposal,
};

/// How long a proposal waits for its author's factor.
pub const STEP_UP_LIFETIME_MS: u64 = 5 * 60 * 1000;
/// How long a proposal waits for other operators.
pub const COUNTERSIGN_LIFETIME_MS: u64 = 24 * 60 * 60 * 1000;
/// Proposals of one pipeline, or of one person who is no operator, that wait at the same time at most.
pub const OPEN_OF_ONE_MAX: usize = 16;
/// Changes of a proposal that its summary names at most.
const NAMED_MAX: usize = 1_000;

/// Tells those who wait that a proposal was decided.
pub struct Decided(watch::Sender<()>);

impl Default for Decided {
    fn default() -> Self {
        Self(watch::Sender::new(()))
    }
}

impl Decided {
    /// Told whenever a proposal begins to wait, or is answered.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }
}

/// All that is kept of a proposal.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Document {
    proposal: Proposal,
    apply: Apply,
    /// What its author has shown for it.
    proofs: Vec<ShownFactor>,
    /// What was signed for it.
    #[serde(default)]
    countersignatures: Vec<Countersignature>,
    /// Where it came in; at the socket when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<IpAddr>,
    /// Whether factors in it were verified by an enrolment.
    #[serde(default)]
    enrols: bool,
}

/// A change-set that the gate did not let through as it was asked for.
struct Held {
    answer: Answer,
    digest: Digest,
    petitioner: Petitioner,
}

/// Asks for a change-set: as `local` while the mesh is unprotected, and then as an operator who shows what the gate asks for.
pub async fn apply(plane: &Plane, asked: ApplyAs) -> Result<Applied, Problem> {
    let ApplyAs { apply, shown } = asked;
    let head = plane.ledger.head();
    if !head.follower.state().is_protected() {
        return plane.enter(apply, Petitioner::default()).await;
    }
    let operator = mfa::named(head.follower.state(), shown.operator.as_ref())?;
    ask(plane, apply, operator, &shown, false).await
}

/// Asks for factors that an enrolment verified, of an operator who is signed in; returns the pending change that they sign.
pub async fn enrol(plane: &Plane, apply: Apply, operator: OperatorName) -> Result<String, Problem> {
    match ask(plane, apply, operator, &Shown::default(), true).await {
        Ok(_) => unreachable!("INVARIANT (nobody-unproven): nothing was shown"),
        Err(refused) => refused.refusal.as_ref().and_then(|refusal| refusal.change.clone()).ok_or(refused),
    }
}

/// Asks for a change-set of `operator`. What the gate does not let through as it is waits.
async fn ask(
    plane: &Plane,
    apply: Apply,
    operator: OperatorName,
    shown: &Shown,
    enrols: bool,
) -> Result<Applied, Problem> {
    let head = plane.ledger.head();
    let (held, why) = match attempt(plane, &apply, operator.clone(), shown, enrols).await? {
        Ok(applied) => return Ok(applied),
        Err(held) => held,
    };
    let state = match &held.answer {
        Answer::StepUp(_) => ProposalState::StepUp,
        Answer::NeedsCountersign(_) => ProposalState::NeedsCountersign,
        Answer::Permit | Answer::Deny(_) => return Err(refusal(plane, &held.answer, held.digest, None, None)),
    };
    let id = propose(plane, &head, apply, Author::Operator(operator), state, &held).await?;
    Err(refusal(plane, &held.answer, held.digest, Some(id), why.as_ref()))
}

/// Somebody who is no operator asks for a change-set. They show no factor, and nothing that they ask for is applied before somebody
/// countersigned: the answer is the pending change, or why there is none.
pub async fn propose_as(plane: &Plane, apply: Apply, author: Author, from: IpAddr) -> Result<Proposal, Problem> {
    let head = plane.ledger.head();
    let author = match author {
        Author::Person(person) => Author::Person(person.as_mapped(head.follower.state())),
        author @ (Author::Operator(_) | Author::Pipeline(_)) => author,
    };
    if !head.follower.state().is_protected() {
        let help = "enrol an operator first, with `countersign operator enroll`";
        return Err(problem(409, "the mesh is unprotected: nobody could countersign", None, Some(help)));
    }
    let asked_at_seconds = mfa::seconds(plane.clock.now_ms());
    let petitioner =
        Petitioner { author: Some(author.clone()), from: Some(from), asked_at_seconds, ..Petitioner::default() };
    let (answer, digest) = match enter(plane, &apply, &petitioner).await? {
        Err(held) => held,
        Ok(_) => unreachable!("INVARIANT: nobody without a factor is let through whom nobody has countersigned"),
    };
    if !matches!(answer, Answer::NeedsCountersign(_)) {
        return Err(refusal(plane, &answer, digest, None, None));
    }
    let named = author.to_string();
    let waits = |document: &Document| {
        let Proposal { author, state, digest: waiting, .. } = &document.proposal;
        is_open(state) && *waiting != digest && author.to_string() == named
    };
    if documents(plane).await?.iter().filter(|(_, document)| waits(document)).count() >= OPEN_OF_ONE_MAX {
        let help = "an operator rejects some: `countersign change list --pending`";
        return Err(problem(429, format!("too many changes of `{named}` wait already"), None, Some(help)));
    }
    let held = Held { answer, digest, petitioner };
    let id = propose(plane, &head, apply, author, ProposalState::NeedsCountersign, &held).await?;
    let (_, Document { proposal, .. }) = document(plane, &id).await?;
    tracing::info!(proposal = id, author = %proposal.author, digest = %digest.short(), "a change was proposed");
    Ok(proposal)
}

/// One attempt to bring a change-set in: asked without a factor first, so that none is used up on what the gate denies anyway.
async fn attempt(
    plane: &Plane,
    apply: &Apply,
    operator: OperatorName,
    shown: &Shown,
    enrols: bool,
) -> Result<Result<Applied, (Held, Option<CodeRefused>)>, Problem> {
    let asked_at_seconds = mfa::seconds(plane.clock.now_ms());
    let mut petitioner = Petitioner { enrols, ..Petitioner::operator(operator.clone(), asked_at_seconds) };
    let held = match enter(plane, apply, &petitioner).await? {
        Ok(applied) => return Ok(Ok(applied)),
        Err((answer, digest)) => Held { answer, digest, petitioner: petitioner.clone() },
    };
    if !matches!(held.answer, Answer::StepUp(_)) {
        return Ok(Err((held, None)));
    }
    if let Some(given) = &shown.countersignature {
        let proof = ceremony::verify(plane, &operator, operator.as_str(), &apply.change_set, given).await?;
        petitioner.assurance.add(proof);
        petitioner.countersignatures.push((**given).clone());
        return Ok(match enter(plane, apply, &petitioner).await? {
            Ok(applied) => Ok(applied),
            Err((answer, digest)) => Err((Held { answer, digest, petitioner }, None)),
        });
    }
    match mfa::prove(plane, &operator, shown).await {
        Ok(None) => Ok(Err((held, None))),
        Err(CodeRefused::Store(error)) => Err(store_problem(&error)),
        Err(why) => Ok(Err((held, Some(why)))),
        Ok(Some(proof)) => {
            petitioner.assurance.add(proof);
            Ok(match enter(plane, apply, &petitioner).await? {
                Ok(applied) => Ok(applied),
                Err((answer, digest)) => Err((Held { answer, digest, petitioner }, None)),
            })
        }
    }
}

type Entered = Result<Applied, (Answer, Digest)>;

/// Puts it to the gate, and appends it if it passes. What the gate says is an answer; everything else a problem.
async fn enter(plane: &Plane, apply: &Apply, petitioner: &Petitioner) -> Result<Entered, Problem> {
    match plane.try_enter(apply.clone(), petitioner.clone()).await? {
        Ok(applied) => Ok(Ok(applied)),
        Err(Refused::Gate { answer, digest }) => Ok(Err((answer, digest))),
        Err(refused) => Err(gate_problem(refused)),
    }
}

/// Keeps a change-set that waits. One that waits already, of the same author and digest, is not kept twice.
async fn propose(
    plane: &Plane,
    head: &Head,
    apply: Apply,
    author: Author,
    state: ProposalState,
    held: &Held,
) -> Result<String, Problem> {
    let now_ms = plane.clock.now_ms();
    let is_same = |document: &Document| {
        let known = &document.proposal;
        // A pipeline that runs again has other claims, such as the number of its run, and is the same pipeline.
        let author_is_same = known.author.to_string() == author.to_string();
        author_is_same && (known.digest, &known.state) == (held.digest, &state) && known.expires_at_ms > now_ms
    };
    if let Some((_, known)) = documents(plane).await?.into_iter().find(|(_, document)| is_same(document)) {
        return Ok(known.proposal.id);
    }
    let lifetime_ms = match state {
        ProposalState::StepUp => STEP_UP_LIFETIME_MS,
        _ => COUNTERSIGN_LIFETIME_MS,
    };
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).expect("INVARIANT: the system's random source does not fail");
    let named = |change: &Change| format!("{} {}", change.kind(), change.subject());
    let proposal = Proposal {
        id: format!("p{}", hex::encode(bytes)),
        author,
        digest: held.digest,
        base: apply.change_set.base,
        root: head.keyring.root_at(apply.change_set.base).unwrap_or_else(|| head.follower.root()),
        requires: requires(&held.answer),
        state,
        approvals: BTreeSet::new(),
        changes: apply.change_set.changes.iter().take(NAMED_MAX).map(named).collect(),
        asked_at_ms: now_ms,
        expires_at_ms: now_ms + lifetime_ms,
    };
    let id = proposal.id.clone();
    let (proofs, countersignatures) = (shown_factors(&held.petitioner), held.petitioner.countersignatures.clone());
    let (enrols, from) = (held.petitioner.enrols, held.petitioner.from);
    let stored = stored(&Document { proposal, apply, proofs, countersignatures, enrols, from }, 1);
    let kept = plane.storage.run("put_proposal", move |store| store.put_proposal(&stored, now_ms)).await;
    match kept.map_err(|error| store_problem(&error))? {
        true => {
            plane.decided.0.send_replace(());
            Ok(id)
        }
        false => {
            let help = "reject or withdraw some (`countersign change list --pending`), or wait until they expire";
            Err(problem(429, "too many changes wait already", None, Some(help)))
        }
    }
}

/// Begins the ceremony in which an operator signs it: its author, unless another is named.
pub async fn begin_ceremony(plane: &Plane, id: &str, shown: &Shown) -> Result<Ceremony, Problem> {
    let (_, document) = pending(plane, id).await?;
    let operator = match (&shown.operator, &document.proposal.author) {
        (Some(named), _) | (None, Author::Operator(named)) => named.clone(),
        (None, Author::Pipeline(_) | Author::Person(_)) => mfa::named(plane.ledger.head().follower.state(), None)?,
    };
    ceremony::begin(plane, &document.proposal, operator).await
}

/// The author shows what the gate asks for: what was proposed, exactly that, becomes an entry, once.
pub async fn apply_pending(plane: &Plane, id: &str, shown: Shown) -> Result<Applied, Problem> {
    let (version, mut document) = pending(plane, id).await?;
    let help = "another operator countersigns it: `countersign change countersign ID --otp CODE`";
    let author = own(&document.proposal.author, shown.operator.as_ref(), "apply", help)?;
    match attempt(plane, &document.apply, author, &shown, document.enrols).await? {
        Ok(applied) => {
            document.proposal.state = ProposalState::Applied { revision: applied.revision };
            save(plane, version, &document).await?;
            Ok(applied)
        }
        Err((held, why)) => {
            if let Answer::NeedsCountersign(requires) = held.answer
                && document.proposal.state == ProposalState::StepUp
            {
                document.proofs = shown_factors(&held.petitioner);
                document.countersignatures = held.petitioner.countersignatures;
                document.proposal.requires = requires;
                document.proposal.state = ProposalState::NeedsCountersign;
                document.proposal.asked_at_ms = plane.clock.now_ms();
                document.proposal.expires_at_ms = document.proposal.asked_at_ms + COUNTERSIGN_LIFETIME_MS;
                save(plane, version, &document).await?;
            }
            Err(refusal(plane, &held.answer, held.digest, Some(id.to_owned()), why.as_ref()))
        }
    }
}

/// Another operator stands behind it, with a factor of their own. When nobody is missing any more it becomes an entry.
///
/// INVARIANT (not-ones-own): the author of a change countersigns it under no name of theirs, and nobody does whom the gate would
/// not let ask for the same.
pub async fn countersign(plane: &Plane, id: &str, shown: Shown) -> Result<AnsweredProposal, Problem> {
    let (version, mut document) = pending(plane, id).await?;
    if document.proposal.state != ProposalState::NeedsCountersign {
        let help = "first its author shows a factor: `countersign apply --change ID --otp CODE`";
        return Err(problem(409, "it does not wait for a countersignature yet", None, Some(help)));
    }
    let approver = approver(plane, &document, shown.operator.as_ref())?;
    agree(plane, &document, &approver, &shown).await?;
    document.proposal.approvals.insert(approver.clone());
    document.countersignatures.extend(shown.countersignature.as_deref().cloned());
    save(plane, version, &document).await?;
    tracing::info!(proposal = id, by = %approver, digest = %document.proposal.digest.short(), "a change was countersigned");
    let mut petitioner = Petitioner {
        author: Some(document.proposal.author.clone()),
        from: document.from,
        asked_at_seconds: mfa::seconds(document.proposal.asked_at_ms),
        approvals: document.proposal.approvals.clone(),
        countersignatures: document.countersignatures.clone(),
        enrols: document.enrols,
        ..Petitioner::default()
    };
    document.proofs.iter().for_each(|shown| petitioner.assurance.add((*shown).into()));
    let mut invitations = Vec::new();
    match enter(plane, &document.apply, &petitioner).await? {
        Ok(applied) => {
            document.proposal.state = ProposalState::Applied { revision: applied.revision };
            invitations = applied.invitations;
        }
        Err((Answer::NeedsCountersign(requires), _)) => document.proposal.requires = requires,
        Err((answer, digest)) => return Err(refusal(plane, &answer, digest, Some(id.to_owned()), None)),
    }
    save(plane, version + 1, &document).await?;
    Ok(AnsweredProposal { proposal: document.proposal, invitations })
}

/// An operator who could countersign it says no. They show a code, or are signed in: a no gives nobody anything, and what a key
/// signed under a change always means yes.
pub async fn reject(plane: &Plane, id: &str, answering: Answering) -> Result<Proposal, Problem> {
    let (version, mut document) = pending(plane, id).await?;
    let by = approver(plane, &document, answering.operator())?;
    let asked_at_seconds = mfa::seconds(plane.clock.now_ms());
    let petitioner = Petitioner::operator(by.clone(), asked_at_seconds);
    let change_set = &document.apply.change_set;
    let answer = plane.gate.answer(change_set, &petitioner, &plane.ledger.head(), asked_at_seconds);
    if matches!(answer, Answer::Deny(_)) {
        return Err(refusal(plane, &answer, document.proposal.digest, Some(id.to_owned()), None));
    }
    answering.is(plane, &by).await?;
    document.proposal.state = ProposalState::Rejected { by };
    save(plane, version, &document).await?;
    Ok(document.proposal)
}

/// Its author takes it back.
pub async fn withdraw(plane: &Plane, id: &str, answering: Answering) -> Result<Proposal, Problem> {
    let (version, mut document) = pending(plane, id).await?;
    let help = "another operator rejects it: `countersign change reject ID --otp CODE`";
    let author = &document.proposal.author;
    match &answering {
        Answering::SignedInAs(person) if author.person().is_some_and(|author| author.is(person)) => {}
        _ => {
            let author = own(author, answering.operator(), "withdraw", help)?;
            answering.is(plane, &author).await?;
        }
    }
    document.proposal.state = ProposalState::Withdrawn;
    save(plane, version, &document).await?;
    Ok(document.proposal)
}

/// Somebody who is no operator asks for what only operators do.
pub fn no_operator(person: &Person) -> Problem {
    let help = "an owner can invite you as an operator: you enrol a passkey or a security key, and sign in with it";
    problem(403, format!("`{person}` is no operator, and has no factor to show here"), None, Some(help))
}

/// Who ends a proposal without any effect.
pub enum Answering {
    /// They show a code.
    Shows(Shown),
    /// They are signed in.
    SignedIn(OperatorName),
    /// They are signed in, and no operator: only what they asked for themselves is theirs to end.
    SignedInAs(Person),
}

impl Answering {
    /// Who is signed in.
    pub fn signed_in(who: Who) -> Self {
        match who {
            Who::Operator { operator, .. } => Self::SignedIn(operator),
            Who::Person { person, .. } => Self::SignedInAs(person),
        }
    }

    fn operator(&self) -> Option<&OperatorName> {
        match self {
            Self::Shows(shown) => shown.operator.as_ref(),
            Self::SignedIn(operator) => Some(operator),
            Self::SignedInAs(_) => None,
        }
    }

    /// Makes sure that it is `operator`.
    async fn is(&self, plane: &Plane, operator: &OperatorName) -> Result<(), Problem> {
        match self {
            Self::Shows(shown) => show_one(plane, operator, shown).await.map(drop),
            Self::SignedIn(_) => Ok(()),
            Self::SignedInAs(person) => Err(no_operator(person)),
        }
    }
}

/// All proposals, newest first.
pub async fn list(plane: &Plane) -> Result<Vec<Proposal>, Problem> {
    Ok(documents(plane).await?.into_iter().map(|(_, document)| document.proposal).collect())
}

/// One proposal with what it asks for.
pub async fn show(plane: &Plane, id: &str) -> Result<ProposalDetail, Problem> {
    let (_, Document { proposal, apply, .. }) = document(plane, id).await?;
    Ok(ProposalDetail { proposal, change_set: apply.change_set, bodies: apply.bodies })
}

/// Returns when it waits for nothing any more, or at the `deadline`.
pub async fn wait(plane: &Plane, id: &str, deadline: tokio::time::Instant) -> Result<Proposal, Problem> {
    let mut decided = plane.decided.0.subscribe();
    loop {
        decided.borrow_and_update();
        let (_, Document { proposal, .. }) = document(plane, id).await?;
        if !is_open(&proposal.state) || tokio::time::Instant::now() >= deadline {
            return Ok(proposal);
        }
        // Its end of time, and an entry that voids it, tell nobody.
        let look_again = deadline.min(tokio::time::Instant::now() + Duration::from_secs(1));
        let _ = tokio::time::timeout_at(look_again, decided.changed()).await;
    }
}

/// The operator who asked for it, and is not said to be another.
fn own(author: &Author, named: Option<&OperatorName>, verb: &str, help: &str) -> Result<OperatorName, Problem> {
    match author {
        Author::Operator(name) if named.is_none_or(|operator| operator == name) => Ok(name.clone()),
        _ => Err(problem(403, format!("`{author}` asked for it, and only they {verb} it"), None, Some(help))),
    }
}

/// The operator who answers for somebody else's proposal.
fn approver(plane: &Plane, document: &Document, named: Option<&OperatorName>) -> Result<OperatorName, Problem> {
    let head = plane.ledger.head();
    let author = &document.proposal.author;
    let mut others =
        head.follower.state().operators.iter().filter(|(name, o)| **name != *author && !o.factors.is_empty());
    let approver = match (named, others.next(), others.next()) {
        (Some(named), ..) => named.clone(),
        (None, Some((only, _)), None) => only.clone(),
        (None, None, _) => return Err(not_own(author)),
        (None, Some(_), Some(_)) => mfa::named(head.follower.state(), None)?,
    };
    if approver == *author {
        return Err(not_own(author));
    }
    Ok(approver)
}

fn not_own(author: &Author) -> Problem {
    let help = "another operator has to; `countersign operator list` shows who there is";
    problem(403, format!("`{author}` asked for it and cannot answer for it"), None, Some(help))
}

/// `approver` shows a factor, and the gate would let them ask for the same.
async fn agree(plane: &Plane, document: &Document, approver: &OperatorName, shown: &Shown) -> Result<(), Problem> {
    let asked_at_seconds = mfa::seconds(plane.clock.now_ms());
    let mut petitioner = Petitioner::operator(approver.clone(), asked_at_seconds);
    let change_set = &document.apply.change_set;
    let digest = document.proposal.digest;
    let head = plane.ledger.head();
    let refused = |answer: &Answer| refusal(plane, answer, digest, Some(document.proposal.id.clone()), None);
    // First without a factor: none is used up on what would be denied.
    let answer = plane.gate.answer(change_set, &petitioner, &head, asked_at_seconds);
    if matches!(answer, Answer::Deny(_)) {
        return Err(refused(&answer));
    }
    petitioner.assurance.add(match &shown.countersignature {
        Some(given) => {
            ceremony::verify(plane, approver, &document.proposal.author.to_string(), change_set, given).await?
        }
        None => show_one(plane, approver, shown).await?,
    });
    match plane.gate.answer(change_set, &petitioner, &head, asked_at_seconds) {
        Answer::Permit | Answer::NeedsCountersign(_) => Ok(()),
        answer => Err(refused(&answer)),
    }
}

async fn show_one(plane: &Plane, operator: &OperatorName, shown: &Shown) -> Result<Proof, Problem> {
    // A recovery code opens the way to a new factor only, and is not used up here.
    let shown = Shown { otp: shown.otp.clone(), ..Shown::default() };
    match mfa::prove(plane, operator, &shown).await {
        Ok(Some(proof)) => Ok(proof),
        Ok(None) => {
            let help = "give the code of your authenticator app: `--otp CODE`";
            Err(problem(403, format!("operator `{operator}` has to show a factor"), None, Some(help)))
        }
        Err(why) => Err(why.problem()),
    }
}

/// A proposal that waits for something, with its version.
async fn pending(plane: &Plane, id: &str) -> Result<(u64, Document), Problem> {
    let (version, document) = document(plane, id).await?;
    let what = match &document.proposal.state {
        ProposalState::StepUp | ProposalState::NeedsCountersign => return Ok((version, document)),
        ProposalState::Applied { revision } => format!("it was applied, as revision {revision}"),
        ProposalState::Rejected { by } => format!("`{by}` rejected it"),
        ProposalState::Withdrawn => "its author withdrew it".to_owned(),
        ProposalState::Expired => "its time is over".to_owned(),
        ProposalState::Void { revision } => format!("the mesh has changed since, to revision {revision}"),
    };
    Err(problem(410, format!("change {id} waits for nothing any more: {what}"), None, Some("plan and apply again")))
}

async fn document(plane: &Plane, id: &str) -> Result<(u64, Document), Problem> {
    let wanted = id.to_owned();
    let found = plane.storage.run("proposal", move |store| store.proposal(&wanted)).await;
    let found = found.map_err(|error| store_problem(&error))?.and_then(|stored| read(plane, &stored));
    let help = "`countersign change list --pending` shows those that are there";
    let (version, mut document) =
        found.ok_or_else(|| problem(404, format!("there is no pending change `{id}`"), None, Some(help)))?;
    recognize(plane, &mut document.proposal).await?;
    Ok((version, document))
}

async fn documents(plane: &Plane) -> Result<Vec<(u64, Document)>, Problem> {
    let stored =
        plane.storage.run("proposals", |store| store.proposals()).await.map_err(|error| store_problem(&error))?;
    let mut documents: Vec<_> = stored.iter().filter_map(|stored| read(plane, stored)).collect();
    for (_, document) in &mut documents {
        recognize(plane, &mut document.proposal).await?;
    }
    Ok(documents)
}

/// The entry that voids a proposal may be its own: it is in the ledger before the proposal says so, and a crash lies in between.
async fn recognize(plane: &Plane, proposal: &mut Proposal) -> Result<(), Problem> {
    let ProposalState::Void { revision } = proposal.state else { return Ok(()) };
    let entries = plane.ledger.stored(revision.0.saturating_sub(1), 1).await.map_err(|error| store_problem(&error))?;
    let entry = entries.first().and_then(|stored| Entry::parse(&stored.entry).ok());
    let own = |entry: &Entry| (entry.digest, &*entry.actor) == (proposal.digest, &*proposal.author.to_string());
    if entry.as_ref().is_some_and(own) {
        proposal.state = ProposalState::Applied { revision };
    }
    Ok(())
}

/// What is kept, as it stands now: time and the ledger go on without telling it.
fn read(plane: &Plane, stored: &StoredProposal) -> Option<(u64, Document)> {
    let mut document: Document = serde_json::from_slice(&stored.document).ok()?;
    let proposal = &mut document.proposal;
    if is_open(&proposal.state) {
        if let Some(revision) = voided(&plane.ledger.head(), proposal, &document.apply.change_set) {
            proposal.state = ProposalState::Void { revision };
        } else if plane.clock.now_ms() > proposal.expires_at_ms {
            proposal.state = ProposalState::Expired;
        }
    }
    Some((stored.version, document))
}

/// The revision that made of the change-set something else than what was asked for; `None` while it means the same.
fn voided(head: &Head, proposal: &Proposal, change_set: &ChangeSet) -> Option<Revision> {
    let root = head.keyring.root_at(proposal.base);
    // What nobody can sign is good on its own base only.
    let may_lag = proposal.base == head.follower.revision() || head.keyring.signers().next().is_some();
    match (root, head.keyring.still_holds(change_set)) {
        (Some(root), Ok(_)) if root == proposal.root && may_lag => None,
        (Some(_), Err((revision, _))) => Some(revision),
        _ => Some(Revision(proposal.base.0 + 1).min(head.follower.revision())),
    }
}

async fn save(plane: &Plane, version: u64, document: &Document) -> Result<(), Problem> {
    let stored = stored(document, version + 1);
    let saved = plane.storage.run("replace_proposal", move |store| store.replace_proposal(&stored)).await;
    let saved = saved.map_err(|error| store_problem(&error))?;
    plane.decided.0.send_replace(());
    // Applied is applied, whoever wrote in between.
    if saved || matches!(document.proposal.state, ProposalState::Applied { .. }) {
        return Ok(());
    }
    Err(problem(409, "somebody else answered at the same moment", None, Some("look at it, and answer again")))
}

fn stored(document: &Document, version: u64) -> StoredProposal {
    StoredProposal {
        id: document.proposal.id.clone(),
        version,
        expires_at_ms: document.proposal.expires_at_ms,
        is_open: is_open(&document.proposal.state),
        document: serde_json::to_vec(document).expect("INVARIANT: a proposal is JSON with string keys"),
    }
}

/// Whether it waits for somebody.
pub fn is_open(state: &ProposalState) -> bool {
    matches!(state, ProposalState::StepUp | ProposalState::NeedsCountersign)
}

fn shown_factors(petitioner: &Petitioner) -> Vec<ShownFactor> {
    petitioner.assurance.proofs().iter().copied().map(ShownFactor::from).collect()
}

/// What the gate's answer says to the operator, with the page where what is missing can be signed.
pub(crate) fn refusal(
    plane: &Plane,
    answer: &Answer,
    digest: Digest,
    change: Option<String>,
    why: Option<&CodeRefused>,
) -> Problem {
    let url = plane.site.as_ref().zip(change.as_ref()).map(|(site, id)| format!("{}/changes/{id}", site.origin));
    let mut problem = local_api::refusal(answer, digest, change, why);
    let head = plane.ledger.head();
    let Some(refusal) = problem.refusal.as_mut() else { return problem };
    let by_key = refusal.requires.is_some_and(|requires| !requires.accepts_code());
    problem.help = match (refusal.outcome, &refusal.change, &url) {
        // What was wrong with a code is said already.
        _ if why.is_some() => problem.help,
        (GateOutcome::StepUp, Some(_), Some(url)) if by_key && signs_here(&head) => {
            Some(format!("sign it with your passkey or security key at {url}, or run this again with `--sign`"))
        }
        (GateOutcome::StepUp, Some(_), Some(url)) if by_key => {
            Some(format!("sign it with your passkey or security key at {url}"))
        }
        (GateOutcome::StepUp, Some(_), None) if by_key && signs_here(&head) => {
            Some("run this again with `--sign`: your passkey or security key signs it".to_owned())
        }
        // In a sealed mesh others sign as well, and a code signs nothing.
        (GateOutcome::NeedsCountersign, Some(id), _) if head.keyring.seal().is_some() => {
            Some(format!("another operator runs `countersign change countersign {id} --sign`"))
        }
        _ => problem.help,
    };
    refusal.url = url;
    problem
}

/// Whether some key of an operator also signs on the page that a command serves on its own machine.
fn signs_here(head: &Head) -> bool {
    let factors = head.follower.state().operators.values().flat_map(|operator| operator.factors.values());
    let origins = factors.filter_map(|factor| factor.signing_key()).flat_map(|key| &key.relying_party.origins);
    origins.into_iter().any(|origin| origin == LOCAL_ORIGIN)
}

fn requires(answer: &Answer) -> Requires {
    match answer {
        Answer::StepUp(requires) | Answer::NeedsCountersign(requires) => *requires,
        Answer::Permit | Answer::Deny(_) => Requires::default(),
    }
}
