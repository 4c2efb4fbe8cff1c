//! What operators sign for a change with a passkey or a security key: the number that makes a ceremony good once, and the
//! verification of what came of it.
//!
//! Whatever waits for an answer waits in the store, under a number that nobody guesses, and is taken by the answer to it: good once, at
//! whichever control plane it comes in.
//!
//! The challenge itself is computed by whoever signs, from the change-set, the ledger and that number; here it is computed
//! again. What a signature is good for is not decided here: the gate does.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use countersign_api::local::{Ceremony, Problem, Proposal};
use countersign_core::{
    assurance::{
        Proof,
        challenge::{Nonce, Purpose},
        webauthn::AssertionRefused,
    },
    canonical::Digest,
    change::ChangeSet,
    countersignature::{self, Countersignature, CountersignatureRefused, Signed},
    identity::{FactorId, OperatorName},
    signal::statement::Subject,
};

use crate::{
    Plane,
    audit::Event,
    local_api::{problem, store_problem},
    mfa,
    signals::{self, Noticed},
    store::{Document, StoreError},
};

/// How long a ceremony may take.
pub const CEREMONY_LIFETIME_MS: u64 = 5 * 60 * 1000;
/// Ceremonies of one kind that may be under way at the same time.
const CEREMONIES_MAX: u32 = 4_096;
const CEREMONY_KIND: &str = "ceremony";
/// The last count of signatures that each key showed.
const COUNT_KIND: &str = "sign-count";
const COUNTS_MAX: u32 = 100_000;

/// What a number was handed out for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    operator: OperatorName,
    digest: Digest,
}

/// Begins a ceremony of `operator` for a change that waits: hands out its number.
pub async fn begin(plane: &Plane, proposal: &Proposal, operator: OperatorName) -> Result<Ceremony, Problem> {
    let head = plane.ledger.head();
    if !head.follower.state().operators.get(&operator).is_some_and(|operator| operator.can_sign()) {
        let help = "a code signs nothing: enrol a passkey or a security key first";
        return Err(problem(403, format!("operator `{operator}` has no factor that signs"), None, Some(help)));
    }
    let waiting = Waiting { operator: operator.clone(), digest: proposal.digest };
    let expires_at_ms = plane.clock.now_ms() + CEREMONY_LIFETIME_MS;
    let nonce = put(plane, CEREMONY_KIND, CEREMONY_LIFETIME_MS, &waiting).await?;
    let purpose = if operator == proposal.author { Purpose::StepUp } else { Purpose::Countersign };
    Ok(Ceremony { operator, purpose, nonce, expires_at_ms })
}

/// Verifies what `operator` signed for `change_set`, of `author`, and uses its number up.
///
/// INVARIANT (ceremony-once): a signature is taken once, within five minutes, of the operator and for the change-set that its
/// number was handed out for; and one whose count did not rise is not taken.
pub async fn verify(
    plane: &Plane,
    operator: &OperatorName,
    author: &str,
    change_set: &ChangeSet,
    given: &Countersignature,
) -> Result<Proof, Problem> {
    let head = plane.ledger.head();
    let (digest, base) = (change_set.digest(), change_set.base);
    let (Some(anchor), Some(root)) = (head.keyring.anchor(), head.keyring.root_at(base)) else {
        let help = "plan and apply again";
        return Err(problem(409, format!("revision {base} lies too far back to be signed on"), None, Some(help)));
    };
    if given.operator != *operator {
        return Err(problem(403, format!("`{}` signed, not `{operator}`", given.operator), None, Some("sign again")));
    }
    let now_ms = plane.clock.now_ms();
    let waiting: Option<Waiting> = take(plane, CEREMONY_KIND, &given.nonce.to_string()).await?;
    if waiting != Some(Waiting { operator: operator.clone(), digest }) {
        return Err(none_waits("ceremony"));
    }
    let signed = Signed { anchor, author, change_set: digest, base, root };
    let counted = countersignature::verify(given, &head.keyring, &signed).map_err(|why| {
        tracing::info!(%operator, digest = %digest.short(), %why, "a signature was refused");
        refused(&why)
    })?;
    count(plane, operator, &given.credential, counted.assertion().sign_count()).await?;
    Ok(Proof::of_assertion(counted.kind(), counted.assertion(), mfa::seconds(now_ms)))
}

/// Keeps something until it is answered, under a number that nobody guesses.
pub async fn put(plane: &Plane, kind: &'static str, lifetime_ms: u64, what: &impl Serialize) -> Result<Nonce, Problem> {
    let mut nonce = Nonce::default();
    aws_lc_rs::rand::fill(&mut nonce.0).expect("INVARIANT: the system's random source does not fail");
    let now_ms = plane.clock.now_ms();
    let unusable =
        |error: serde_json::Error| problem(500, "a challenge could not be written", Some(error.to_string()), None);
    let document = Document {
        kind,
        key: nonce.to_string(),
        bytes: serde_json::to_vec(what).map_err(unusable)?,
        expires_at_ms: now_ms + lifetime_ms,
    };
    let kept = plane.storage.run("put_ceremony", move |store| store.put_document(&document, now_ms, CEREMONIES_MAX));
    match kept.await.map_err(|error| store_problem(&error))? {
        true => Ok(nonce),
        false => Err(problem(429, "too many ceremonies are under way", None, Some("wait five minutes"))),
    }
}

/// Takes it back: whoever comes second finds nothing.
pub async fn take<T: DeserializeOwned>(plane: &Plane, kind: &'static str, key: &str) -> Result<Option<T>, Problem> {
    let (key, now_ms) = (key.to_owned(), plane.clock.now_ms());
    let taken = plane.storage.run("take_ceremony", move |store| store.take_document(kind, &key, now_ms)).await;
    let taken = taken.map_err(|error| store_problem(&error))?;
    Ok(taken.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

/// What became of something that is not there to be answered.
pub fn none_waits(what: &str) -> Problem {
    let help = "begin again: each is good once, for five minutes, for who began it and what it was begun for";
    problem(410, format!("this {what} was ended already, or its time is over"), None, Some(help))
}

/// What a refused signature says to the operator.
pub fn refused(why: &CountersignatureRefused) -> Problem {
    let help = match why {
        CountersignatureRefused::CannotSign(_) => "a code signs nothing: use a passkey or a security key",
        CountersignatureRefused::UnknownFactor(_) => "`countersign operator list` shows whose factors there are",
        CountersignatureRefused::Role { .. } => "the author signs to apply, others to countersign",
        CountersignatureRefused::OtherHistory(_) => "plan and apply again",
        CountersignatureRefused::Assertion(AssertionRefused::NotVerified) => {
            "the authenticator must ask for a PIN or a fingerprint"
        }
        CountersignatureRefused::Assertion(_) => "sign again; nothing was changed",
    };
    problem(403, "what was signed is refused", Some(why.to_string()), Some(help))
}

/// Why a count of signatures was not kept.
#[derive(Debug, thiserror::Error)]
enum Uncounted {
    #[error(transparent)]
    Refused(AssertionRefused),
    #[error("the key was used at the same moment")]
    Busy,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Uncounted {
    fn problem(&self) -> Problem {
        match self {
            Self::Refused(why) => {
                let help = "remove this key, and enrol another: two devices may hold it";
                problem(403, "what was signed is refused", Some(why.to_string()), Some(help))
            }
            Self::Busy => problem(409, self.to_string(), None, Some("sign again")),
            Self::Store(error) => store_problem(error),
        }
    }
}

/// Keeps the count of signatures that a key of `operator` showed, if it rose: one that did not may have been cloned.
pub async fn count(plane: &Plane, operator: &OperatorName, factor: &FactorId, found: u32) -> Result<(), Problem> {
    let Err(why) = keep_count(plane, factor, found).await else { return Ok(()) };
    if matches!(why, Uncounted::Refused(_)) {
        tracing::error!(%operator, %why, "a key may have been cloned");
        plane.tell(Event::KeyCloned { operator: operator.clone() });
        signals::notice(plane, Subject::Operator(operator.clone()), Noticed::KeyCloned).await;
    }
    Err(why.problem())
}

async fn keep_count(plane: &Plane, factor: &FactorId, found: u32) -> Result<(), Uncounted> {
    let key = factor.as_str().to_owned();
    let seen = plane.storage.run("sign_count", move |store| store.document(COUNT_KIND, &key, 0)).await?;
    let held = seen.as_deref().and_then(|bytes| std::str::from_utf8(bytes).ok()?.parse().ok()).unwrap_or(0);
    if (held, found) != (0, 0) && found <= held {
        return Err(Uncounted::Refused(AssertionRefused::Cloned { held, found }));
    }
    let key = factor.as_str().to_owned();
    let new = Document { kind: COUNT_KIND, key, bytes: found.to_string().into_bytes(), expires_at_ms: u64::MAX };
    let kept = plane.storage.run("put_sign_count", move |store| match seen {
        Some(seen) => store.swap_document(COUNT_KIND, &new.key, &seen, &new),
        None => store.put_document(&new, 0, COUNTS_MAX),
    });
    if kept.await? { Ok(()) } else { Err(Uncounted::Busy) }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use countersign_api::local::{Applied, Apply, ApplyAs, GateOutcome, ProposalState, Shown};
    use countersign_core::{
        assurance::{challenge::Challenge, webauthn::RelyingParty},
        change::{Bodies, Change, Revision},
        directory::quarantined,
        gate::OWNER,
        identity::{ServiceName, TrustDomain},
        keyring::Keyring,
        ledger::Entry,
        service::{Protocol, ServiceSpec},
    };
    use countersign_testkit::security_key::SecurityKey;

    use super::*;
    use crate::{Control, ControlConfig, clock::Clock, gate::Petitioner, proposals, start_with_clock};

    fn name(given: &str) -> OperatorName {
        OperatorName::parse(given).unwrap()
    }

    fn declare(given: &str) -> Change {
        let spec = ServiceSpec::new(Protocol::Http);
        Change::DeclareService { name: ServiceName::parse(given).unwrap(), spec }
    }

    fn relying_party() -> RelyingParty {
        RelyingParty { id: "localhost".into(), origins: vec!["http://localhost:7449".into()] }
    }

    /// A control plane whose operators, alice and bob, hold a security key each.
    struct Mesh {
        control: Control,
        now_ms: Arc<AtomicU64>,
        _dir: tempfile::TempDir,
        alice: SecurityKey,
        bob: SecurityKey,
    }

    impl Mesh {
        async fn start(quorum: Option<u32>) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let now_ms = Arc::new(AtomicU64::new(1_790_000_000_000));
            let told = now_ms.clone();
            let config = ControlConfig {
                store: None,
                advertise: None,
                accept_rollback: false,
                data_dir: dir.path().into(),
                listen: "127.0.0.1:0".parse().unwrap(),
                metrics_listen: None,
                key: None,
                trust_domain: None,
                witnesses: Default::default(),
                site: None,
                pipelines: Default::default(),
                oauth: None,
                audit: None,
            };
            let clock = Clock::from_fn(move || told.load(Ordering::Relaxed));
            let control = start_with_clock(config, clock).await.unwrap();
            let mesh = Self { control, now_ms, _dir: dir, alice: SecurityKey::new(), bob: SecurityKey::new() };
            let mut changes = vec![Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }];
            for (operator, key) in [("alice", &mesh.alice), ("bob", &mesh.bob)] {
                let (operator, id, factor) = (name(operator), key.factor_id(), key.enrolled(&relying_party()));
                changes.push(Change::InviteOperator { name: operator.clone(), roles: [OWNER.into()].into() });
                changes.push(Change::EnrollOperator { name: operator, id, factor });
            }
            changes.extend(quorum.map(|quorum| Change::SealSettings { quorum }));
            let enrolling = Petitioner { enrols: true, ..Petitioner::default() };
            mesh.plane().enter(mesh.asked(changes), enrolling).await.unwrap();
            mesh
        }

        fn plane(&self) -> &Plane {
            &self.control.plane
        }

        fn asked(&self, changes: Vec<Change>) -> Apply {
            let head = self.plane().ledger.head();
            let (base, changes) = (head.follower.revision(), quarantined(changes, head.follower.state()));
            Apply { change_set: ChangeSet { base, changes }, bodies: Bodies::default() }
        }

        /// Asks for it as `operator`, with nothing; returns the pending change.
        async fn ask(&self, operator: &str, changes: Vec<Change>) -> Problem {
            let shown = Shown { operator: Some(name(operator)), ..Shown::default() };
            proposals::apply(self.plane(), ApplyAs { apply: self.asked(changes), shown }).await.unwrap_err()
        }

        async fn proposed(&self, operator: &str, changes: Vec<Change>) -> String {
            self.ask(operator, changes).await.refusal.unwrap().change.unwrap()
        }

        /// What `signer` shows for the pending change `id`, with `change` made to the challenge.
        async fn signs(&mut self, signer: &str, id: &str, change: impl Fn(&mut Challenge)) -> Shown {
            let shown = Shown { operator: Some(name(signer)), ..Shown::default() };
            let ceremony = proposals::begin_ceremony(self.plane(), id, &shown).await.unwrap();
            let proposal = proposals::show(self.plane(), id).await.unwrap().proposal;
            let mut challenge = Challenge {
                anchor: self.plane().ledger.head().keyring.anchor().unwrap(),
                purpose: ceremony.purpose,
                base: proposal.base,
                root: proposal.root,
                change_set: proposal.digest,
                nonce: ceremony.nonce,
            };
            change(&mut challenge);
            let key = if signer == "alice" { &mut self.alice } else { &mut self.bob };
            let signed = key.countersign(&name(signer), &relying_party(), &challenge);
            Shown { countersignature: Some(Box::new(signed)), ..shown }
        }

        async fn applies(&self, id: &str, shown: Shown) -> Result<Applied, Problem> {
            proposals::apply_pending(self.plane(), id, shown).await
        }

        /// The whole stored ledger as someone folds it who trusts nobody: its keys, and the last entry.
        async fn verified(&self) -> (Keyring, Entry) {
            let (mut keyring, mut last) = (Keyring::default(), None);
            for stored in self.plane().ledger.stored(0, 1_000).await.unwrap() {
                let judged = keyring.take(&stored.entry, &stored.change_set).unwrap();
                assert_eq!(judged.refused, []);
                last = Some(Entry::parse(&stored.entry).unwrap());
            }
            (keyring, last.unwrap())
        }
    }

    #[tokio::test]
    async fn a_change_whose_entry_was_made_before_the_proposal_could_say_so_is_known_to_be_applied() {
        let mesh = Mesh::start(None).await;
        let id = mesh.proposed("alice", vec![declare("web")]).await;
        let other = mesh.proposed("alice", vec![declare("catalog")]).await;
        let detail = proposals::show(mesh.plane(), &id).await.unwrap();
        let at_seconds = mfa::seconds(mesh.plane().clock.now_ms());
        let mut petitioner = Petitioner::operator(name("alice"), at_seconds);
        let kind = countersign_core::assurance::FactorKind::Roaming;
        petitioner.assurance.add(Proof { kind, at_seconds, user_verified: true, device_bound: true });
        // The entry is there, and whoever made it did not come to write it down.
        let asked = Apply { change_set: detail.change_set, bodies: detail.bodies };
        let revision = mesh.plane().enter(asked, petitioner).await.unwrap().revision;
        let state = proposals::show(mesh.plane(), &id).await.unwrap().proposal.state;
        assert_eq!(state, ProposalState::Applied { revision });
        let listed = proposals::list(mesh.plane()).await.unwrap();
        let state_of = |id: &str| listed.iter().find(|proposal| proposal.id == id).unwrap().state.clone();
        assert_eq!(state_of(&id), ProposalState::Applied { revision });
        assert_ne!(state_of(&other), ProposalState::Applied { revision });
    }

    /// PROVES (ceremony-once)
    #[tokio::test]
    async fn what_a_key_signed_is_taken_once_for_one_change_and_stands_in_its_entry() {
        let mut mesh = Mesh::start(None).await;
        let other = Digest::of(b"another");
        for (case, expected) in [
            ("another change", "it answers another challenge"),
            ("another mesh", "it answers another challenge"),
            ("another purpose", "it answers another challenge"),
            ("no PIN", "the user was not verified"),
            ("another number", "ended already"),
            ("too late", "ended already"),
        ] {
            let id = mesh.proposed("alice", vec![declare("web")]).await;
            mesh.alice.verifies_user = case != "no PIN";
            let mut shown = mesh
                .signs("alice", &id, |challenge| match case {
                    "another change" => challenge.change_set = other,
                    "another mesh" => challenge.anchor = other,
                    "another purpose" => challenge.purpose = Purpose::Countersign,
                    "another number" => challenge.nonce = other,
                    _ => {}
                })
                .await;
            if case == "another purpose" {
                shown.countersignature.as_mut().unwrap().purpose = Purpose::StepUp;
            }
            if case == "too late" {
                mesh.now_ms.fetch_add(CEREMONY_LIFETIME_MS + 1, Ordering::Relaxed);
            }
            let id = mesh.proposed("alice", vec![declare("web")]).await;
            let refused = mesh.applies(&id, shown.clone()).await.unwrap_err();
            let said = format!("{}: {}", refused.title, refused.detail.clone().unwrap_or_default());
            assert!(said.contains(expected), "{case}: {refused:?}");
            let again = mesh.applies(&id, shown).await.unwrap_err();
            assert_eq!(again.status, 410, "{case}: its number is used up");
        }
        mesh.alice.count = Some(0);
        let id = mesh.proposed("alice", vec![declare("web")]).await;
        let shown = mesh.signs("alice", &id, |_| {}).await;
        mesh.applies(&id, shown).await.unwrap();
        mesh.alice.count = Some(0);
        let id = mesh.proposed("alice", vec![declare("more")]).await;
        let shown = mesh.signs("alice", &id, |_| {}).await;
        let refused = mesh.applies(&id, shown).await.unwrap_err();
        assert!(refused.detail.as_ref().is_some_and(|what| what.contains("may have been cloned")), "{refused:?}");
        let id = mesh.proposed("alice", vec![declare("last")]).await;
        let shown = mesh.signs("alice", &id, |_| {}).await;
        let applied = mesh.applies(&id, shown.clone()).await.unwrap();
        let (keyring, entry) = mesh.verified().await;
        assert_eq!((entry.format, &*entry.actor, entry.digest), (2, "alice", applied.digest));
        assert_eq!(entry.countersignatures, [*shown.countersignature.clone().unwrap()]);
        assert_eq!(keyring.revision(), applied.revision);
        assert_eq!(mesh.applies(&id, shown).await.unwrap_err().status, 410, "and it is applied once");
    }

    /// PROVES (signed-or-not-appended)
    #[tokio::test]
    async fn a_sealed_mesh_waits_until_as_many_have_signed_as_its_seal_asks_for() {
        let mut mesh = Mesh::start(Some(2)).await;
        let refused = mesh.ask("alice", vec![declare("web")]).await.refusal.unwrap();
        let requires = refused.requires.unwrap();
        assert_eq!((requires.accepts_code(), requires.countersign), (false, 1), "{requires}");
        let id = refused.change.unwrap();
        let shown = mesh.signs("alice", &id, |_| {}).await;
        let waits = mesh.applies(&id, shown).await.unwrap_err();
        assert_eq!(waits.refusal.unwrap().outcome, GateOutcome::NeedsCountersign);
        let own = mesh.signs("alice", &id, |_| {}).await;
        assert_eq!(proposals::countersign(mesh.plane(), &id, own).await.unwrap_err().status, 403, "not one's own");
        let shown = mesh.signs("bob", &id, |_| {}).await;
        let proposal = proposals::countersign(mesh.plane(), &id, shown).await.unwrap().proposal;
        let revision = mesh.plane().ledger.head().follower.revision();
        assert_eq!(proposal.state, ProposalState::Applied { revision });
        let (keyring, entry) = mesh.verified().await;
        assert_eq!((keyring.revision(), entry.countersignatures.len()), (revision, 2));

        // Whatever the gate would admit: what agents would refuse does not become an entry.
        let asked = mesh.asked(vec![declare("catalog")]);
        let mut petitioner = Petitioner::operator(name("alice"), 0);
        petitioner.asked_at_seconds = mfa::seconds(mesh.plane().clock.now_ms());
        let key = countersign_core::assurance::FactorKind::Roaming;
        let at_seconds = petitioner.asked_at_seconds;
        petitioner.assurance.add(Proof { kind: key, at_seconds, user_verified: true, device_bound: true });
        let mut forged = entry.countersignatures[0].clone();
        forged.base = asked.change_set.base;
        let twice = vec![forged, entry.countersignatures[1].clone()];
        let with = Petitioner { countersignatures: twice, ..petitioner };
        let refused = mesh.plane().enter(asked, with).await.unwrap_err();
        assert!(refused.title.contains("agents would refuse"), "{refused:?}");
        assert_eq!(mesh.plane().ledger.head().follower.revision(), revision);
    }

    #[tokio::test]
    async fn what_was_signed_outlives_entries_that_do_not_concern_it_and_no_others() {
        let mut mesh = Mesh::start(Some(1)).await;
        let unlike = mesh.proposed("alice", vec![declare("web")]).await;
        let same = mesh.proposed("bob", vec![declare("catalog")]).await;
        let shown = mesh.signs("alice", &unlike, |_| {}).await;
        let between = mesh.proposed("bob", vec![declare("catalog")]).await;
        assert_eq!(between, same, "asked for twice, it waits once");
        let other = mesh.proposed("alice", vec![declare("catalog")]).await;
        let first = mesh.signs("bob", &between, |_| {}).await;
        mesh.applies(&between, first).await.unwrap();
        let applied = mesh.applies(&unlike, shown).await.unwrap();
        let (keyring, entry) = mesh.verified().await;
        assert_eq!((keyring.revision(), entry.revision()), (applied.revision, applied.revision));
        assert_eq!(entry.countersignatures[0].base.0 + 1, entry.index, "it was signed before the entry in between");
        let state = proposals::show(mesh.plane(), &other).await.unwrap().proposal.state;
        assert_eq!(state, ProposalState::Void { revision: Revision(entry.countersignatures[0].base.0 + 1) });
    }
}
