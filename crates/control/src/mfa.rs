//! How somebody becomes an operator, and shows to be one: enrolments of authenticator apps, their codes, recovery codes. Passkeys
//! and security keys are in [`key`].
//!
//! Secrets are sealed before they are kept, a code is counted before it is looked at and used up before anything is done with
//! it, and what was tried is remembered across restarts. What a factor is good for is not decided here: the gate does.

use aws_lc_rs::hmac;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use countersign_api::local::{
    Applied, Apply, Code, Confirm, Enrol, Enrolled, Enrolment, OperatorInvitation, Problem, Shown,
};
use countersign_core::{
    assurance::{
        FactorKind, Proof,
        totp::{self, Step},
    },
    canonical::Digest,
    change::{Bodies, Change, ChangeSet},
    gate::{Author, OWNER},
    identity::{FactorId, OperatorName},
    operator::{EnrolledFactor, Operator},
    signal::statement::Subject,
    state::MeshState,
};

use crate::{
    Plane,
    audit::{self, Event},
    ceremony,
    gate::Petitioner,
    local_api::{problem, store_problem},
    proposals,
    signals::{self, Noticed},
    store::{Document, StoreError, StoredCodes},
};

pub mod key;

/// Codes that can be tried for one operator within [`GUESSES_WITHIN_MS`]: of a million, three fit at any time.
pub const GUESSES_MAX: u32 = 5;
/// The span in which they are counted.
pub const GUESSES_WITHIN_MS: u64 = 15 * 60 * 1000;
/// How long an enrolment waits for its first code.
pub const ENROLMENT_LIFETIME_MS: u64 = 15 * 60 * 1000;
/// The kind of the documents of enrolments that wait for their first code.
const ENROLMENT_KIND: &str = "totp-enrolment";
/// Enrolments that may wait at the same time.
const ENROLMENTS_MAX: u32 = 16;
/// How long an invited operator has to enrol.
pub const INVITATION_LIFETIME_MS: u64 = 24 * 60 * 60 * 1000;
/// Recovery codes of one set.
pub const RECOVERY_CODES: usize = 10;
/// Random bytes of a recovery code: nobody finds one by trying, with its hash or without.
const RECOVERY_BYTES: usize = 10;
const INVITATION_PREFIX: &str = "cso1";
/// What the token of an enrolment link begins with.
const LINK_PREFIX: &str = "cse1";
/// The kind of the documents of enrolment links.
const LINK_KIND: &str = "enrolment-link";
/// Enrolment links that are good at the same time.
const LINKS_MAX: u32 = 16;
/// Longest token or code that is read, in bytes.
const CODE_BYTES_MAX: usize = 256;
/// How often an enrolment is asked for again because another change came first.
const ATTEMPTS_MAX: usize = 5;
/// The name of the key that recovery codes are hashed with, and what it is sealed for.
const RECOVERY_KEY: &str = "mfa/recovery-key";

/// An enrolment that waits for its first code.
#[derive(Serialize, Deserialize)]
struct Pending {
    operator: OperatorName,
    /// The secret of the app.
    sealed: Vec<u8>,
    way: Way,
    expires_at_ms: u64,
    tries: u32,
}

/// By what right somebody enrols.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    /// The mesh is unprotected: it is its first operator, who owns the data directory.
    First,
    /// The same, by the link that the control plane printed.
    Link(Digest),
    /// They were invited, and hold what they were handed.
    Invited(Digest),
    /// They are an operator already, and have shown a factor.
    More(ShownFactor),
    /// They are signed in: the new factor is a change that they sign with one that they have.
    Proposed,
}

/// From where somebody enrols.
#[derive(Debug, Clone, Copy)]
pub enum EnrolsFrom<'a> {
    /// From the mesh's own user's socket.
    Socket,
    /// From a browser, with who is signed in there.
    Site(Option<&'a OperatorName>),
}

/// One factor that was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownFactor {
    /// Its kind.
    pub kind: FactorKind,
    /// When, in seconds since 1970.
    pub at_seconds: i64,
    /// Whether an authenticator made sure who holds it.
    #[serde(default)]
    pub user_verified: bool,
    /// Whether its key never leaves the authenticator.
    #[serde(default)]
    pub device_bound: bool,
}

/// A factor that was verified and is to become one of an operator's.
#[derive(Debug, Clone)]
struct NewFactor {
    id: FactorId,
    factor: EnrolledFactor,
    /// What its first use proved.
    proof: Proof,
    /// The digest of the list of authenticators that it was held to.
    list: Option<Digest>,
}

/// What became of an enrolment.
enum Entry {
    /// It is in the ledger.
    Made {
        applied: Applied,
        anchor: bool,
        /// Whether the set of recovery codes that was made for it came in with it.
        with_recovery: bool,
    },
    /// It waits as this pending change.
    Waits(String),
}

impl From<Proof> for ShownFactor {
    fn from(proof: Proof) -> Self {
        let Proof { kind, at_seconds, user_verified, device_bound } = proof;
        Self { kind, at_seconds, user_verified, device_bound }
    }
}

impl From<ShownFactor> for Proof {
    fn from(shown: ShownFactor) -> Self {
        let ShownFactor { kind, at_seconds, user_verified, device_bound } = shown;
        Self { kind, at_seconds, user_verified, device_bound }
    }
}

/// Why a code proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodeRefused {
    /// It is not one, or not of now, or not theirs; a stranger is not told which.
    #[error("the code is wrong, or of another time")]
    Wrong,
    /// It was good, once.
    #[error("the code was used already")]
    Used,
    /// Too many were tried.
    #[error("too many codes were tried for this operator; the next is looked at in {again_in_seconds} s")]
    Throttled {
        /// When.
        again_in_seconds: u64,
    },
    /// What verifies it cannot be read.
    #[error("the code could not be looked at")]
    Store(#[from] StoreError),
}

impl CodeRefused {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Wrong => "give the code that the app shows now; compare this machine's clock with the phone's".into(),
            Self::Used => "wait for the next code: each is good once".into(),
            Self::Throttled { .. } => "wait; nothing that is tried before then counts".into(),
            Self::Store(error) => error.help().into(),
        }
    }

    /// What it says to the operator where no change waits for the code.
    pub fn problem(&self) -> Problem {
        match self {
            Self::Wrong | Self::Used => problem(403, self.to_string(), None, Some(&self.help())),
            Self::Throttled { .. } => problem(429, self.to_string(), None, Some(&self.help())),
            Self::Store(error) => store_problem(error),
        }
    }
}

/// The operator that is meant: the one that is named, or the only one that has enrolled.
pub fn named(state: &MeshState, operator: Option<&OperatorName>) -> Result<OperatorName, Problem> {
    if let Some(name) = operator {
        return Ok(name.clone());
    }
    let mut enrolled = state.operators.iter().filter(|(_, operator)| !operator.factors.is_empty());
    match (enrolled.next(), enrolled.next()) {
        (Some((only, _)), None) => Ok(only.clone()),
        _ => {
            let help = "name the operator: `--operator NAME`, or COUNTERSIGN_OPERATOR";
            Err(problem(400, "several operators have enrolled, and none is named", None, Some(help)))
        }
    }
}

/// Verifies what `operator` shows, and uses it up. `None` when nothing is shown.
///
/// INVARIANT (code-once): a code is accepted at most once, also across restarts: it is used up in the store before anything is
/// done with it; and of the codes that are tried for an operator, at most five in fifteen minutes are looked at.
pub async fn prove(plane: &Plane, operator: &OperatorName, shown: &Shown) -> Result<Option<Proof>, CodeRefused> {
    let (code, kind) = match (&shown.otp, &shown.recovery_code) {
        (Some(code), _) => (code.clone(), FactorKind::Totp),
        (None, Some(code)) => (code.clone(), FactorKind::Recovery),
        (None, None) => return Ok(None),
    };
    let head = plane.ledger.head();
    // One who does not exist is answered like one whose code is wrong, and leaves nothing behind.
    let Some(enrolled) = head.follower.state().operators.get(operator) else { return Err(CodeRefused::Wrong) };
    let now_ms = plane.clock.now_ms();
    let who = operator.clone();
    let since_ms = now_ms.saturating_sub(GUESSES_WITHIN_MS);
    let count = plane.storage.run("count_guess", move |store| store.count_guess(&who, now_ms, since_ms, GUESSES_MAX));
    if let Some(oldest_ms) = count.await? {
        let again_in_seconds = (oldest_ms + GUESSES_WITHIN_MS).saturating_sub(now_ms).div_ceil(1000);
        tracing::warn!(%operator, again_in_seconds, "too many codes were tried");
        let why = CodeRefused::Throttled { again_in_seconds };
        plane.tell(Event::FactorRefused { operator: operator.clone(), factor: kind, why: why.to_string() });
        return Err(why);
    }
    let accepted = match kind {
        FactorKind::Totp => accept_totp(plane, operator, enrolled, &code, now_ms).await,
        _ => accept_recovery(plane, enrolled, &code).await,
    };
    if let Err(why) = accepted {
        tracing::info!(%operator, kind = kind.as_str(), %why, "a code was refused");
        plane.tell(Event::FactorRefused { operator: operator.clone(), factor: kind, why: audit::cut(why.to_string()) });
        signals::notice(plane, Subject::Operator(operator.clone()), Noticed::FactorRefused).await;
        return Err(why);
    }
    let who = operator.clone();
    plane.storage.run("forget_guesses", move |store| store.forget_guesses(&who)).await?;
    Ok(Some(Proof::of_code(kind, seconds(now_ms))))
}

async fn accept_totp(
    plane: &Plane,
    operator: &OperatorName,
    enrolled: &Operator,
    code: &Code,
    now_ms: u64,
) -> Result<(), CodeRefused> {
    let who = operator.clone();
    let kept = plane.storage.run("codes", move |store| store.codes(&who)).await?;
    let mut refused = CodeRefused::Wrong;
    // Only what the ledger says is a factor is one.
    for codes in kept.into_iter().filter(|codes| enrolled.factors.contains_key(&codes.factor)) {
        let Ok(secret) = plane.sealer.unseal(&purpose(&codes.factor), &codes.sealed) else { continue };
        match totp::verify(&secret, &code.0, now_ms / 1000, Some(Step(codes.last_step))) {
            Ok(Step(step)) => {
                let factor = codes.factor;
                let used = plane.storage.run("use_step", move |store| store.use_step(&factor, step)).await?;
                return if used { Ok(()) } else { Err(CodeRefused::Used) };
            }
            Err(totp::CodeRefused::Used) => refused = CodeRefused::Used,
            Err(_) => {}
        }
    }
    Err(refused)
}

async fn accept_recovery(plane: &Plane, enrolled: &Operator, code: &Code) -> Result<(), CodeRefused> {
    let hash = recovery_hash(&recovery_key(plane).await?, &code.0);
    for (factor, _) in enrolled.factors.iter().filter(|(_, factor)| factor.kind() == FactorKind::Recovery) {
        let factor = factor.clone();
        if plane.storage.run("spend_recovery", move |store| store.spend_recovery(&factor, &hash)).await? {
            return Ok(());
        }
    }
    Err(CodeRefused::Wrong)
}

/// A link by which the first operator enrols in a browser: good once, for a quarter of an hour. `None` once there is one.
pub async fn enrolment_link(plane: &Plane) -> Result<Option<String>, StoreError> {
    let Some(site) = plane.site.as_ref().filter(|_| !plane.ledger.head().follower.state().is_protected()) else {
        return Ok(None);
    };
    let token = format!("{LINK_PREFIX}.{}", random_hex::<20>());
    let now_ms = plane.clock.now_ms();
    let document = Document {
        kind: LINK_KIND,
        key: Digest::of(token.as_bytes()).to_string(),
        bytes: Vec::new(),
        expires_at_ms: now_ms + ENROLMENT_LIFETIME_MS,
    };
    let kept = plane.storage.run("put_link", move |store| store.put_document(&document, now_ms, LINKS_MAX)).await?;
    // In the fragment: browsers send it to nobody.
    Ok(kept.then(|| format!("{}/enroll#{token}", site.origin)))
}

/// By what right somebody enrols a factor, or why by none.
async fn way(
    plane: &Plane,
    operator: &OperatorName,
    invitation: Option<&Code>,
    shown: &Shown,
    from: EnrolsFrom<'_>,
) -> Result<Way, Problem> {
    let head = plane.ledger.head();
    let state = head.follower.state();
    if state.trust_domain.is_none() {
        let help = "apply a mesh directory first: `countersign apply DIR`";
        return Err(problem(409, "there is no mesh yet to be an operator of", None, Some(help)));
    }
    if !state.is_protected() {
        return match from {
            EnrolsFrom::Socket => Ok(Way::First),
            EnrolsFrom::Site(_) => linked(plane, invitation).await.map(Way::Link),
        };
    }
    let enrolled = state.operators.get(operator).is_some_and(|operator| !operator.factors.is_empty());
    match (invitation, from) {
        (Some(token), _) if !enrolled => Ok(Way::Invited(invited(plane, operator, token).await?)),
        (None, EnrolsFrom::Site(Some(signed_in))) if signed_in == operator => Ok(Way::Proposed),
        (None, _) if enrolled => match prove(plane, operator, shown).await.map_err(|why| why.problem())? {
            Some(proof) => Ok(Way::More(proof.into())),
            None => {
                let help =
                    "give a code of a factor that is there, `--otp CODE`, or a recovery code, `--recovery-code CODE`";
                Err(problem(403, "one more factor needs one that is there", None, Some(help)))
            }
        },
        (Some(_), _) => {
            let help = "an operator who has a factor adds another: `countersign factor add --totp --otp CODE`";
            Err(problem(409, format!("operator `{operator}` has enrolled already"), None, Some(help)))
        }
        (None, _) => {
            let help =
                "an owner invites you with `countersign operator invite NAME`, and you enrol with what they hand you";
            Err(problem(403, "the mesh is protected: an operator is invited first", None, Some(help)))
        }
    }
}

async fn linked(plane: &Plane, token: Option<&Code>) -> Result<Digest, Problem> {
    let hash = token.map(|token| Digest::of(token.0.trim().as_bytes())).unwrap_or_default();
    let now_ms = plane.clock.now_ms();
    let found = plane.storage.run("link", move |store| store.document(LINK_KIND, &hash.to_string(), now_ms)).await;
    match found.map_err(|error| store_problem(&error))? {
        Some(_) => Ok(hash),
        None => Err(not_linked()),
    }
}

fn not_linked() -> Problem {
    let help = "links are good once, for 15 minutes: `countersign operator link` prints another";
    problem(403, "the enrolment link is not good", None, Some(help))
}

/// Uses up what gives the right to enrol.
async fn spend(plane: &Plane, operator: &OperatorName, way: &Way) -> Result<(), Problem> {
    let (who, now_ms) = (operator.clone(), plane.clock.now_ms());
    let stored = |error| store_problem(&error);
    match *way {
        Way::Invited(hash) => {
            let spent = plane
                .storage
                .run("operator_invitation", move |store| store.operator_invitation(&who, &hash, now_ms, true));
            if spent.await.map_err(stored)? { Ok(()) } else { Err(not_invited()) }
        }
        Way::Link(hash) => {
            let taken =
                plane.storage.run("take_link", move |store| store.take_document(LINK_KIND, &hash.to_string(), now_ms));
            taken.await.map_err(stored)?.map(drop).ok_or_else(not_linked)
        }
        Way::First | Way::More(_) | Way::Proposed => Ok(()),
    }
}

/// Begins the enrolment of an authenticator app: makes its secret.
pub async fn begin(plane: &Plane, asked: Enrol, from: EnrolsFrom<'_>) -> Result<Enrolment, Problem> {
    let Enrol { operator, invitation, shown } = asked;
    let way = way(plane, &operator, invitation.as_ref(), &shown, from).await?;
    let head = plane.ledger.head();
    let trust_domain = head.follower.state().trust_domain.as_ref().map_or("countersign", |name| name.as_str());
    let mut secret = Zeroizing::new(vec![0; totp::SECRET_BYTES]);
    random(&mut secret);
    let otpauth = totp::uri(&secret, trust_domain, operator.as_str());
    let id = random_hex::<16>();
    let sealed = plane.sealer.seal(&pending_purpose(&id), &secret).map_err(|error| store_problem(&error.into()))?;
    let expires_at_ms = plane.clock.now_ms() + ENROLMENT_LIFETIME_MS;
    let pending = Pending { operator: operator.clone(), sealed, way, expires_at_ms, tries: 0 };
    if !keep(plane, &id, &pending).await? {
        let help = "wait until some have expired, 15 minutes at most";
        return Err(problem(429, "too many enrolments wait for their first code", None, Some(help)));
    }
    Ok(Enrolment { id, operator, otpauth })
}

/// Keeps an enrolment until its code comes, at whichever control plane; false when too many wait.
async fn keep(plane: &Plane, id: &str, pending: &Pending) -> Result<bool, Problem> {
    let document = Document {
        kind: ENROLMENT_KIND,
        key: id.to_owned(),
        bytes: serde_json::to_vec(pending).expect("INVARIANT: an enrolment is JSON with string keys"),
        expires_at_ms: pending.expires_at_ms,
    };
    let now_ms = plane.clock.now_ms();
    let kept = plane.storage.run("put_enrolment", move |store| store.put_document(&document, now_ms, ENROLMENTS_MAX));
    kept.await.map_err(|error| store_problem(&error))
}

/// Ends an enrolment: with the first code of the app, its factor becomes a ledger entry, or a change that waits to be signed.
pub async fn confirm(plane: &Plane, id: &str, asked: Confirm) -> Result<Enrolled, Problem> {
    let now_ms = plane.clock.now_ms();
    let Confirmed { operator, secret, way, step } = confirmed(plane, id, &asked.code, now_ms).await?;
    spend(plane, &operator, &way).await?;
    let factor = factor_id("totp");
    let mut stored =
        StoredCodes { factor: factor.clone(), operator: operator.clone(), sealed: Vec::new(), last_step: step.0 };
    // Kept before the entry says that there is such a factor; what a crash in between leaves behind verifies nothing.
    let sealer = plane.sealer.clone();
    let kept = plane.storage.run("put_codes", move |store| {
        stored.sealed = sealer.seal(&purpose(&stored.factor), &secret)?;
        store.put_codes(&stored)
    });
    kept.await.map_err(|error| store_problem(&error))?;
    let proof = Proof::of_code(FactorKind::Totp, seconds(now_ms));
    let new = NewFactor { id: factor.clone(), factor: EnrolledFactor::Totp, proof, list: None };
    let entered = bring_in(plane, operator, new, &way, now_ms).await;
    if entered.is_err() {
        let _ = plane.storage.run("forget_factors", move |store| store.forget_factors(&[factor])).await;
    }
    entered
}

/// Brings a verified factor in, with a set of recovery codes when its operator has none.
async fn bring_in(
    plane: &Plane,
    operator: OperatorName,
    new: NewFactor,
    way: &Way,
    now_ms: u64,
) -> Result<Enrolled, Problem> {
    let recovery = factor_id("recovery");
    let codes: Vec<String> = (0..RECOVERY_CODES).map(|_| recovery_code()).collect();
    let key = recovery_key(plane).await.map_err(|error| store_problem(&error))?;
    let hashes: Vec<Digest> = codes.iter().map(|code| recovery_hash(&key, code)).collect();
    let kept_recovery = recovery.clone();
    let kept = plane.storage.run("put_recovery", move |store| store.put_recovery(&kept_recovery, &hashes));
    kept.await.map_err(|error| store_problem(&error))?;
    let factor = new.id.clone();
    let entered = enrol(plane, &operator, new, &recovery, way, now_ms).await;
    if !matches!(entered, Ok(Entry::Made { with_recovery: true, .. })) {
        let _ = plane.storage.run("forget_factors", move |store| store.forget_factors(&[recovery])).await;
    }
    match entered? {
        Entry::Made { applied, anchor, with_recovery } => {
            tracing::info!(%operator, factor = factor.as_str(), anchor, "an operator enrolled a factor");
            let recovery_codes = if with_recovery { codes } else { Vec::new() };
            let revision = Some(applied.revision);
            Ok(Enrolled { operator, factor, revision, anchor, recovery_codes, change: None })
        }
        Entry::Waits(change) => {
            let change = Some(change);
            Ok(Enrolled { operator, factor, revision: None, anchor: false, recovery_codes: Vec::new(), change })
        }
    }
}

/// An enrolment whose app showed its first code.
struct Confirmed {
    operator: OperatorName,
    secret: Zeroizing<Vec<u8>>,
    way: Way,
    step: Step,
}

/// Takes the enrolment that `code` confirms: of several who try at the same moment, one has it. One that was guessed at too often is over.
async fn confirmed(plane: &Plane, id: &str, code: &Code, now_ms: u64) -> Result<Confirmed, Problem> {
    let gone = || {
        let help = "begin again; each lasts 15 minutes";
        problem(404, "there is no such enrolment, or its time is over", None, Some(help))
    };
    let mut pending: Pending = ceremony::take(plane, ENROLMENT_KIND, id).await?.ok_or_else(gone)?;
    // Sealed with a key that was rotated since: nobody has seen the secret work yet.
    let secret = plane.sealer.unseal(&pending_purpose(id), &pending.sealed).map_err(|_| gone())?;
    match totp::verify(&secret, &code.0, now_ms / 1000, None) {
        Ok(step) => Ok(Confirmed { operator: pending.operator, secret, way: pending.way, step }),
        Err(_) => {
            pending.tries += 1;
            if pending.tries < GUESSES_MAX {
                keep(plane, id, &pending).await?;
            }
            Err(CodeRefused::Wrong.problem())
        }
    }
}

/// Asks for the change-set of an enrolment, again when another change came first.
async fn enrol(
    plane: &Plane,
    operator: &OperatorName,
    new: NewFactor,
    recovery: &FactorId,
    way: &Way,
    now_ms: u64,
) -> Result<Entry, Problem> {
    let mut attempts = 0;
    loop {
        let head = plane.ledger.head();
        let state = head.follower.state();
        let anchor = !state.is_protected();
        if matches!(way, Way::First | Way::Link(_)) != anchor {
            let help = "somebody else enrolled in between: an owner has to invite you now";
            return Err(problem(409, "the mesh is protected since", None, Some(help)));
        }
        if new.factor.signing_key().is_some() {
            key::held_to(new.list, state)?;
        }
        let known = state.operators.get(operator);
        let with_recovery = *way != Way::Proposed
            && known
                .is_none_or(|operator| operator.factors.values().all(|factor| factor.kind() != FactorKind::Recovery));
        let mut changes = Vec::new();
        match (anchor, known) {
            (true, None) => {
                changes.push(Change::InviteOperator { name: operator.clone(), roles: [OWNER.into()].into() });
            }
            (true, Some(invited)) if !invited.roles.contains(OWNER) => {
                let roles = invited.roles.iter().cloned().chain([OWNER.into()]).collect();
                changes.push(Change::SetOperatorRoles { name: operator.clone(), roles });
            }
            _ => {}
        }
        let (name, id, factor) = (operator.clone(), new.id.clone(), new.factor.clone());
        changes.push(match way {
            Way::More(_) | Way::Proposed => Change::AddFactor { operator: name, id, factor },
            Way::First | Way::Link(_) | Way::Invited(_) => Change::EnrollOperator { name, id, factor },
        });
        if with_recovery {
            let (operator, id) = (operator.clone(), recovery.clone());
            changes.push(Change::AddFactor { operator, id, factor: EnrolledFactor::Recovery });
        }
        let asked =
            Apply { change_set: ChangeSet { base: head.follower.revision(), changes }, bodies: Bodies::default() };
        let mut petitioner = Petitioner { asked_at_seconds: seconds(now_ms), enrols: true, ..Petitioner::default() };
        match way {
            Way::First | Way::Link(_) => {}
            // The first use of the new factor is what an invited operator shows.
            Way::Invited(_) => {
                petitioner.author = Some(Author::Operator(operator.clone()));
                petitioner.assurance.add(new.proof);
            }
            Way::More(shown) => {
                petitioner.author = Some(Author::Operator(operator.clone()));
                petitioner.assurance.add((*shown).into());
            }
            Way::Proposed => return proposals::enrol(plane, asked, operator.clone()).await.map(Entry::Waits),
        }
        match plane.enter(asked, petitioner).await {
            Ok(applied) => return Ok(Entry::Made { applied, anchor, with_recovery }),
            Err(refused) if refused.status == 409 && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(refused) => return Err(refused),
        }
    }
}

/// After a change-set is in the ledger: forgets what verified factors that are gone, and makes what invited operators are handed.
pub async fn settle(plane: &Plane, changes: &[Change], before: &MeshState) -> Vec<OperatorInvitation> {
    let gone: Vec<FactorId> = changes
        .iter()
        .flat_map(|change| match change {
            Change::RemoveFactor { id, .. } => vec![id.clone()],
            Change::RemoveOperator { name } => {
                before.operators.get(name).into_iter().flat_map(|operator| operator.factors.keys().cloned()).collect()
            }
            _ => Vec::new(),
        })
        .collect();
    if !gone.is_empty()
        && let Err(error) = plane.storage.run("forget_factors", move |store| store.forget_factors(&gone)).await
    {
        // They verify nothing any more: the ledger does not have them.
        tracing::warn!(%error, "the secrets of removed factors could not be forgotten");
    }
    let enrolled = |name: &OperatorName| {
        changes.iter().any(|change| matches!(change, Change::EnrollOperator { name: enrolled, .. } if enrolled == name))
    };
    let mut invitations = Vec::new();
    for change in changes {
        let Change::InviteOperator { name, .. } = change else { continue };
        if enrolled(name) {
            continue;
        }
        let token = format!("{INVITATION_PREFIX}.{}", random_hex::<20>());
        let (operator, hash) = (name.clone(), Digest::of(token.as_bytes()));
        let expires_at_ms = plane.clock.now_ms() + INVITATION_LIFETIME_MS;
        let kept = plane.storage.run("put_operator_invitation", move |store| {
            store.put_operator_invitation(&operator, &hash, expires_at_ms)
        });
        match kept.await {
            Ok(()) => {
                let url = plane.site.as_ref().map(|site| format!("{}/enroll#{token}", site.origin));
                invitations.push(OperatorInvitation { operator: name.clone(), token, url, expires_at_ms });
            }
            Err(error) => tracing::warn!(%error, operator = %name, "an invitation could not be kept; invite again"),
        }
    }
    invitations
}

async fn invited(plane: &Plane, operator: &OperatorName, token: &Code) -> Result<Digest, Problem> {
    if token.0.len() > CODE_BYTES_MAX {
        return Err(not_invited());
    }
    let (who, hash, now_ms) = (operator.clone(), Digest::of(token.0.trim().as_bytes()), plane.clock.now_ms());
    let found =
        plane.storage.run("operator_invitation", move |store| store.operator_invitation(&who, &hash, now_ms, false));
    match found.await.map_err(|error| store_problem(&error))? {
        true => Ok(hash),
        false => Err(not_invited()),
    }
}

fn not_invited() -> Problem {
    let help = "an invitation is good once, for a day, for the operator that it names; ask an owner for another";
    problem(403, "the invitation is not good", None, Some(help))
}

/// The key that recovery codes are hashed with; made with the first of them.
async fn recovery_key(plane: &Plane) -> Result<hmac::Key, StoreError> {
    kept_key(plane, RECOVERY_KEY).await
}

/// A key for hashing that is made when it is first needed.
async fn kept_key(plane: &Plane, name: &'static str) -> Result<hmac::Key, StoreError> {
    let unreadable = || StoreError::Damaged {
        path: plane.storage.place().to_owned(),
        what: format!("the key `{name}` does not open"),
    };
    let mut fresh = Zeroizing::new([0; 32]);
    random(&mut *fresh);
    let sealer = plane.sealer.clone();
    let kept = plane.storage.run("kept_key", move |store| match store.key(name)? {
        Some(kept) => Ok(kept),
        None => {
            let sealed = sealer.seal(name, &*fresh)?;
            if store.create_keys(&[(name, &sealed)])? {
                return Ok(sealed);
            }
            // Another control plane made it meanwhile.
            store.key(name)?.ok_or_else(|| StoreError::Failed(format!("the key `{name}` is gone")))
        }
    });
    let secret = plane.sealer.unseal(name, &kept.await?).map_err(|_| unreadable())?;
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &secret))
}

/// However it was typed: case, spaces and dashes do not count.
fn recovery_hash(key: &hmac::Key, code: &str) -> Digest {
    let plain: String =
        code.chars().take(CODE_BYTES_MAX).filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    let tag = hmac::sign(key, plain.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(tag.as_ref());
    Digest(hash)
}

/// `1a2b-3c4d-5e6f-7a8b-9c0d`.
fn recovery_code() -> String {
    let digits = random_hex::<RECOVERY_BYTES>();
    digits.as_bytes().chunks(4).filter_map(|four| std::str::from_utf8(four).ok()).collect::<Vec<_>>().join("-")
}

fn factor_id(kind: &str) -> FactorId {
    FactorId::parse(&format!("{kind}-{}", random_hex::<8>())).expect("INVARIANT: letters, digits and a dash")
}

fn pending_purpose(id: &str) -> String {
    format!("mfa/enrolment/{id}")
}

pub(crate) fn purpose(factor: &FactorId) -> String {
    format!("mfa/totp/{}", factor.as_str())
}

pub(crate) fn random_hex<const BYTES: usize>() -> String {
    let mut bytes = [0; BYTES];
    random(&mut bytes);
    hex::encode(bytes)
}

fn random(bytes: &mut [u8]) {
    aws_lc_rs::rand::fill(bytes).expect("INVARIANT: the system's random source does not fail");
}

/// Milliseconds since 1970 as the gate counts.
pub fn seconds(ms: u64) -> i64 {
    i64::try_from(ms / 1000).unwrap_or(i64::MAX)
}
