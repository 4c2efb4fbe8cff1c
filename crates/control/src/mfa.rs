//! How somebody becomes an operator, and shows to be one: enrolments of authenticator apps, their codes, recovery codes.
//!
//! Secrets are sealed before they are kept, a code is counted before it is looked at and used up before anything is done with
//! it, and what was tried is remembered across restarts. What a factor is good for is not decided here: the gate does.

use std::collections::BTreeMap;

use aws_lc_rs::hmac;
use parking_lot::Mutex;
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
    gate::OWNER,
    identity::{FactorId, OperatorName},
    operator::{EnrolledFactor, Operator},
    state::MeshState,
};

use crate::{
    Plane,
    gate::Petitioner,
    local_api::{problem, store_problem},
    store::{StoreError, StoredCodes},
};

/// Codes that can be tried for one operator within [`GUESSES_WITHIN_MS`]: of a million, three fit at any time.
pub const GUESSES_MAX: u32 = 5;
/// The span in which they are counted.
pub const GUESSES_WITHIN_MS: u64 = 15 * 60 * 1000;
/// How long an enrolment waits for its first code.
pub const ENROLMENT_LIFETIME_MS: u64 = 15 * 60 * 1000;
/// Enrolments that may wait at the same time.
const ENROLMENTS_MAX: usize = 16;
/// How long an invited operator has to enrol.
pub const INVITATION_LIFETIME_MS: u64 = 24 * 60 * 60 * 1000;
/// Recovery codes of one set.
pub const RECOVERY_CODES: usize = 10;
/// Random bytes of a recovery code: nobody finds one by trying, with its hash or without.
const RECOVERY_BYTES: usize = 10;
const INVITATION_PREFIX: &str = "cso1";
/// Longest token or code that is read, in bytes.
const CODE_BYTES_MAX: usize = 256;
/// How often an enrolment is asked for again because another change came first.
const ATTEMPTS_MAX: usize = 5;
/// The name of the key that recovery codes are hashed with, and what it is sealed for.
const RECOVERY_KEY: &str = "mfa/recovery-key";

/// Enrolments that wait for their first code. They are not kept across a restart: nobody has seen the secret work yet.
#[derive(Default)]
pub struct Enrolments(Mutex<BTreeMap<String, Pending>>);

struct Pending {
    operator: OperatorName,
    secret: Zeroizing<Vec<u8>>,
    way: Way,
    expires_at_ms: u64,
    tries: u32,
}

/// By what right somebody enrols.
#[derive(Clone)]
enum Way {
    /// The mesh is unprotected: it is its first operator.
    First,
    /// They were invited, and hold what they were handed.
    Invited(Digest),
    /// They are an operator already, and have shown it.
    More(Proof),
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
        return Err(CodeRefused::Throttled { again_in_seconds });
    }
    let accepted = match kind {
        FactorKind::Totp => accept_totp(plane, operator, enrolled, &code, now_ms).await,
        _ => accept_recovery(plane, enrolled, &code).await,
    };
    if let Err(why) = accepted {
        tracing::info!(%operator, kind = kind.as_str(), %why, "a code was refused");
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

/// Begins the enrolment of an authenticator app: makes its secret.
pub async fn begin(plane: &Plane, asked: Enrol) -> Result<Enrolment, Problem> {
    let Enrol { operator, invitation, shown } = asked;
    let head = plane.ledger.head();
    let state = head.follower.state();
    let Some(trust_domain) = &state.trust_domain else {
        let help = "apply a mesh directory first: `countersign apply DIR`";
        return Err(problem(409, "there is no mesh yet to be an operator of", None, Some(help)));
    };
    let enrolled = state.operators.get(&operator).is_some_and(|operator| !operator.factors.is_empty());
    let way = match invitation {
        _ if !state.is_protected() => Way::First,
        Some(token) if !enrolled => Way::Invited(invited(plane, &operator, &token).await?),
        None if enrolled => match prove(plane, &operator, &shown).await.map_err(|why| why.problem())? {
            Some(proof) => Way::More(proof),
            None => {
                let help =
                    "give a code of a factor that is there, `--otp CODE`, or a recovery code, `--recovery-code CODE`";
                return Err(problem(403, "one more factor needs one that is there", None, Some(help)));
            }
        },
        Some(_) => {
            let help = "an operator who has a factor adds another: `countersign factor add --totp --otp CODE`";
            return Err(problem(409, format!("operator `{operator}` has enrolled already"), None, Some(help)));
        }
        None => {
            let help =
                "an owner invites you with `countersign operator invite NAME`, and you enrol with what they hand you";
            return Err(problem(403, "the mesh is protected: an operator is invited first", None, Some(help)));
        }
    };
    let mut secret = Zeroizing::new(vec![0; totp::SECRET_BYTES]);
    random(&mut secret);
    let otpauth = totp::uri(&secret, trust_domain.as_str(), operator.as_str());
    let id = random_hex::<16>();
    let now_ms = plane.clock.now_ms();
    let mut waiting = plane.enrolments.0.lock();
    waiting.retain(|_, pending| pending.expires_at_ms >= now_ms);
    if waiting.len() >= ENROLMENTS_MAX {
        let help = "wait until some have expired, 15 minutes at most";
        return Err(problem(429, "too many enrolments wait for their first code", None, Some(help)));
    }
    let expires_at_ms = now_ms + ENROLMENT_LIFETIME_MS;
    waiting.insert(id.clone(), Pending { operator: operator.clone(), secret, way, expires_at_ms, tries: 0 });
    Ok(Enrolment { id, operator, otpauth })
}

/// Ends an enrolment: with the first code of the app, its factor becomes a ledger entry.
pub async fn confirm(plane: &Plane, id: &str, asked: Confirm) -> Result<Enrolled, Problem> {
    let now_ms = plane.clock.now_ms();
    let (pending, step) = confirmed(&plane.enrolments, id, &asked.code, now_ms)?;
    let Pending { operator, secret, way, .. } = pending;
    if let Way::Invited(hash) = &way {
        let (who, hash) = (operator.clone(), *hash);
        let spent =
            plane.storage.run("operator_invitation", move |store| store.operator_invitation(&who, &hash, now_ms, true));
        if !spent.await.map_err(|error| store_problem(&error))? {
            return Err(not_invited());
        }
    }
    let factor = factor_id("totp");
    let recovery = factor_id("recovery");
    let codes: Vec<String> = (0..RECOVERY_CODES).map(|_| recovery_code()).collect();
    let key = recovery_key(plane).await.map_err(|error| store_problem(&error))?;
    let hashes: Vec<Digest> = codes.iter().map(|code| recovery_hash(&key, code)).collect();
    let mut stored =
        StoredCodes { factor: factor.clone(), operator: operator.clone(), sealed: Vec::new(), last_step: step.0 };
    let kept_recovery = recovery.clone();
    // Kept before the entry says that there is such a factor; what a crash in between leaves behind verifies nothing.
    let sealer = plane.sealer.clone();
    let kept = plane.storage.run("put_codes", move |store| {
        stored.sealed = sealer.seal(&purpose(&stored.factor), &secret)?;
        store.put_codes(&stored)?;
        store.put_recovery(&kept_recovery, &hashes)
    });
    kept.await.map_err(|error| store_problem(&error))?;
    let result = enrol(plane, &operator, &factor, &recovery, &way, now_ms).await;
    match result {
        Ok((applied, anchor, with_recovery)) => {
            tracing::info!(%operator, factor = factor.as_str(), anchor, "an operator enrolled a factor");
            let recovery_codes = if with_recovery { codes } else { Vec::new() };
            if !with_recovery {
                let _ = plane.storage.run("forget_factors", move |store| store.forget_factors(&[recovery])).await;
            }
            Ok(Enrolled { operator, factor, revision: applied.revision, anchor, recovery_codes })
        }
        Err(refused) => {
            let _ = plane.storage.run("forget_factors", move |store| store.forget_factors(&[factor, recovery])).await;
            Err(refused)
        }
    }
}

/// Takes the enrolment that `code` confirms. One that was guessed at too often is over.
fn confirmed(enrolments: &Enrolments, id: &str, code: &Code, now_ms: u64) -> Result<(Pending, Step), Problem> {
    let mut waiting = enrolments.0.lock();
    let pending = waiting.remove(id).filter(|pending| pending.expires_at_ms >= now_ms);
    let mut pending = pending.ok_or_else(|| {
        problem(
            404,
            "there is no such enrolment, or its time is over",
            None,
            Some("begin again; each lasts 15 minutes"),
        )
    })?;
    match totp::verify(&pending.secret, &code.0, now_ms / 1000, None) {
        Ok(step) => Ok((pending, step)),
        Err(_) => {
            pending.tries += 1;
            if pending.tries < GUESSES_MAX {
                waiting.insert(id.to_owned(), pending);
            }
            Err(CodeRefused::Wrong.problem())
        }
    }
}

/// Asks for the change-set of an enrolment, again when another change came first. The last two of the answer: whether it is the
/// anchor, and whether recovery codes came with it.
async fn enrol(
    plane: &Plane,
    operator: &OperatorName,
    factor: &FactorId,
    recovery: &FactorId,
    way: &Way,
    now_ms: u64,
) -> Result<(Applied, bool, bool), Problem> {
    let mut attempts = 0;
    loop {
        let head = plane.ledger.head();
        let state = head.follower.state();
        let anchor = !state.is_protected();
        if matches!(way, Way::First) != anchor {
            let help = "somebody else enrolled in between: an owner has to invite you now";
            return Err(problem(409, "the mesh is protected since", None, Some(help)));
        }
        let known = state.operators.get(operator);
        let with_recovery =
            known.is_none_or(|operator| operator.factors.values().all(|factor| factor.kind() != FactorKind::Recovery));
        let mut changes = Vec::new();
        let (name, id) = (operator.clone(), factor.clone());
        match (way, known) {
            (Way::First, None) => {
                changes.push(Change::InviteOperator { name: name.clone(), roles: [OWNER.into()].into() });
            }
            (Way::First, Some(invited)) if !invited.roles.contains(OWNER) => {
                let roles = invited.roles.iter().cloned().chain([OWNER.into()]).collect();
                changes.push(Change::SetOperatorRoles { name: name.clone(), roles });
            }
            _ => {}
        }
        changes.push(match way {
            Way::More(_) => Change::AddFactor { operator: name, id, factor: EnrolledFactor::Totp },
            Way::First | Way::Invited(_) => Change::EnrollOperator { name, id, factor: EnrolledFactor::Totp },
        });
        if with_recovery {
            let (operator, id) = (operator.clone(), recovery.clone());
            changes.push(Change::AddFactor { operator, id, factor: EnrolledFactor::Recovery });
        }
        let mut petitioner = Petitioner { asked_at_seconds: seconds(now_ms), enrols: true, ..Petitioner::default() };
        match way {
            Way::First => {}
            // The first code of the new app is what an invited operator shows.
            Way::Invited(_) => {
                petitioner.operator = Some(operator.clone());
                petitioner.assurance.add(Proof::of_code(FactorKind::Totp, seconds(now_ms)));
            }
            Way::More(proof) => {
                petitioner.operator = Some(operator.clone());
                petitioner.assurance.add(*proof);
            }
        }
        let asked =
            Apply { change_set: ChangeSet { base: head.follower.revision(), changes }, bodies: Bodies::default() };
        match plane.enter(asked, petitioner).await {
            Ok(applied) => return Ok((applied, anchor, with_recovery)),
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
            Ok(()) => invitations.push(OperatorInvitation { operator: name.clone(), token, expires_at_ms }),
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
    let unreadable = || StoreError::Damaged {
        path: plane.storage.place().to_owned(),
        what: "the key of the recovery codes does not open".into(),
    };
    let mut fresh = Zeroizing::new([0; 32]);
    random(&mut *fresh);
    let sealer = plane.sealer.clone();
    let kept = plane.storage.run("recovery_key", move |store| match store.key(RECOVERY_KEY)? {
        Some(kept) => Ok(kept),
        None => {
            let sealed = sealer.seal(RECOVERY_KEY, &*fresh)?;
            store.put_keys(&[(RECOVERY_KEY, &sealed)]).map(|()| sealed)
        }
    });
    let secret = plane.sealer.unseal(RECOVERY_KEY, &kept.await?).map_err(|_| unreadable())?;
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

pub(crate) fn purpose(factor: &FactorId) -> String {
    format!("mfa/totp/{}", factor.as_str())
}

fn random_hex<const BYTES: usize>() -> String {
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
