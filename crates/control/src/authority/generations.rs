//! The roots of a trust domain as one record: each with what signs below it, and how far it is on its way. Pure: what a step does to the
//! record is said here, what it does to the mesh elsewhere.
//!
//! | state | is in the bundle | signs |
//! |---|---|---|
//! | prepared | yes: everybody learns to verify by it before anything rests on it | nothing |
//! | active | yes | all that is issued; there is one at any time |
//! | old | yes: what it signed is good until it expires | the way to its successor, for who does not hold that yet |
//! | tainted | yes, and marked: whoever has an SVID of it asks for another at once | the same |
//! | revoked | no, and its keys are gone from the record | nothing |
//!
//! At most one is prepared and one old or tainted beside the active one, so that a bundle has three roots at most.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, Zeroizing};

use countersign_api::local::AuthorityState;
use countersign_core::{canonical::Digest, identity::TrustDomain};

use super::{AuthorityError, seal::Sealer, upstream::UpstreamRefused};
use crate::store::StoreError;

/// Where the record lies sealed.
pub(super) const GENERATIONS: &str = "authority/generations";

/// All of them at one time. The root's own keys lie apart, so that they are not opened with it.
#[derive(Serialize, Deserialize, Clone)]
pub(super) struct Generations {
    /// Rises with each step.
    pub version: u64,
    pub trust_domain: TrustDomain,
    /// In the order in which they were prepared.
    all: Vec<Generation>,
    /// What the next one is called.
    next: u32,
    /// What an authority above was asked for and has not answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested: Option<Requested>,
}

/// A request that an authority above sign a key of ours. The key lies apart.
#[derive(Serialize, Deserialize, Clone)]
pub(super) struct Requested {
    /// PKCS #10, PEM.
    pub csr_pem: String,
    /// When it was made, in milliseconds since 1970.
    pub since_ms: u64,
}

/// A root and the intermediate that signs below it.
#[derive(Serialize, Deserialize, Clone)]
pub(super) struct Generation {
    /// Rises; never given again.
    pub number: u32,
    pub state: AuthorityState,
    /// When it came into this state, in milliseconds since 1970.
    pub since_ms: u64,
    pub root: Der,
    /// Where the root is not ours: the certificate of our key that signs intermediates, and what leads from it to the root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub above: Vec<Der>,
    pub issuing: Der,
    pub issuing_key: Secret,
    /// The key of `issuing`, certified by the root before: how those verify it who hold only that one.
    pub cross: Option<Der>,
}

/// What is prepared.
pub(super) struct Made {
    pub root: Der,
    pub above: Vec<Der>,
    pub issuing: Der,
    pub issuing_key: Secret,
}

/// A certificate as it lies in the record.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Der(pub CertificateDer<'static>);

/// A PKCS #8 key as it lies in the record; erased on drop.
#[derive(Clone)]
pub(super) struct Secret(pub Zeroizing<Vec<u8>>);

/// Why a step is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepRefused {
    /// There is no such root.
    #[error("there is no root {0}")]
    Unknown(u32),
    /// One is prepared.
    #[error("root {0} is prepared already")]
    Prepared(u32),
    /// None is.
    #[error("no root is prepared")]
    NothingPrepared,
    /// The state of a root is another one than the step begins at.
    #[error("root {number} is {state}, and only a root that is {wanted} can be {done}")]
    State {
        /// Which.
        number: u32,
        /// As it is.
        state: AuthorityState,
        /// As it would have to be.
        wanted: &'static str,
        /// What the step makes of it.
        done: &'static str,
    },
    /// The bundle would have a fourth root.
    #[error("root {0} is still in the bundle")]
    OldStays(u32),
}

impl StepRefused {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Unknown(_) => "`countersign authority show` lists the roots".into(),
            Self::Prepared(number) => format!(
                "let it sign with `countersign authority activate {number}`, or take it back with `countersign authority revoke {number}`"
            ),
            Self::NothingPrepared => "prepare one with `countersign authority prepare`".into(),
            Self::State { number, state: AuthorityState::Active, .. } => {
                format!(
                    "everything that is issued rests on root {number}: let another sign first, `countersign authority rotate`"
                )
            }
            Self::State { number, state: AuthorityState::Old, .. } => format!(
                "taint it first, so that whoever rests on it gets another identity: `countersign authority taint {number}`"
            ),
            Self::State { .. } => "`countersign authority show` says what each root is".into(),
            Self::OldStays(number) => format!(
                "take it out first: `countersign authority taint {number}`, then `countersign authority revoke {number}`"
            ),
        }
    }
}

impl Generations {
    /// Of a mesh that begins.
    pub fn first(trust_domain: TrustDomain, made: Made, now_ms: u64) -> Self {
        let first = Generation::of(1, made, AuthorityState::Active, now_ms);
        Self { version: 1, trust_domain, all: vec![first], next: 2, requested: None }
    }

    /// All of them, in the order in which they were prepared.
    pub fn all(&self) -> &[Generation] {
        &self.all
    }

    /// The one that signs.
    pub fn active(&self) -> &Generation {
        self.one(AuthorityState::Active)
            .expect("INVARIANT: a record without one is not opened, and no step takes it away")
    }

    /// The one that is prepared.
    pub fn prepared(&self) -> Option<&Generation> {
        self.one(AuthorityState::Prepared)
    }

    /// The one that signed before, while it is in the bundle.
    pub fn old(&self) -> Option<&Generation> {
        self.one(AuthorityState::Old).or_else(|| self.one(AuthorityState::Tainted))
    }

    fn one(&self, state: AuthorityState) -> Option<&Generation> {
        self.all.iter().find(|one| one.state == state)
    }

    /// The one called `number`.
    pub fn get(&self, number: u32) -> Result<&Generation, StepRefused> {
        self.all.iter().find(|one| one.number == number).ok_or(StepRefused::Unknown(number))
    }

    /// What the next one that is prepared is called.
    pub fn next(&self) -> u32 {
        self.next
    }

    /// Whether another one can be prepared.
    pub fn may_prepare(&self) -> Result<(), StepRefused> {
        self.prepared().map_or(Ok(()), |one| Err(StepRefused::Prepared(one.number)))
    }

    /// Everybody learns of another root; it signs nothing.
    pub fn prepare(&self, made: Made, now_ms: u64) -> Result<Self, StepRefused> {
        self.may_prepare()?;
        let mut after = self.stepped();
        after.all.push(Generation::of(self.next, made, AuthorityState::Prepared, now_ms));
        after.next += 1;
        Ok(after)
    }

    /// Whether `number` can be the one that signs.
    pub fn may_activate(&self, number: u32) -> Result<&Generation, StepRefused> {
        let one = self.get(number)?.in_state(&[AuthorityState::Prepared], "prepared", "activated")?;
        self.old().map_or(Ok(one), |old| Err(StepRefused::OldStays(old.number)))
    }

    /// From now on `number` signs; with its intermediate's key as the root that signed so far certifies it.
    ///
    /// INVARIANT (one-root-signs): of all states that a record can have, each has one root that is active.
    pub fn activate(&self, number: u32, cross: Option<Der>, now_ms: u64) -> Result<Self, StepRefused> {
        self.may_activate(number)?;
        let before = self.active().number;
        let mut after = self.stepped();
        for one in &mut after.all {
            if one.number == before {
                one.step(AuthorityState::Old, now_ms);
                one.cross = None;
            } else if one.number == number {
                one.step(AuthorityState::Active, now_ms);
                one.cross.clone_from(&cross);
            }
        }
        Ok(after)
    }

    /// Nothing new rests on `number`.
    pub fn taint(&self, number: u32, now_ms: u64) -> Result<Self, StepRefused> {
        self.get(number)?.in_state(&[AuthorityState::Old], "old", "tainted")?;
        let mut after = self.stepped();
        after
            .all
            .iter_mut()
            .filter(|one| one.number == number)
            .for_each(|one| one.step(AuthorityState::Tainted, now_ms));
        Ok(after)
    }

    /// Nobody verifies by `number` any more.
    pub fn revoke(&self, number: u32) -> Result<Self, StepRefused> {
        let ends = [AuthorityState::Tainted, AuthorityState::Prepared];
        self.get(number)?.in_state(&ends, "tainted, or prepared and never used,", "revoked")?;
        let mut after = self.stepped();
        after.all.retain(|one| one.number != number);
        // Its certificate leads to a root that nobody holds now.
        if after.old().is_none() {
            after.all.iter_mut().for_each(|one| one.cross = None);
        }
        Ok(after)
    }

    /// The active one signs with another intermediate.
    pub fn renewed(&self, issuing: Der, issuing_key: Secret, cross: Option<Der>) -> Self {
        let mut after = self.stepped();
        for one in after.all.iter_mut().filter(|one| one.state == AuthorityState::Active) {
            one.issuing.clone_from(&issuing);
            one.issuing_key.clone_from(&issuing_key);
            one.cross.clone_from(&cross);
        }
        after
    }

    /// An authority above is asked to sign a key.
    pub fn request(&self, csr_pem: String, since_ms: u64) -> Self {
        Self { requested: Some(Requested { csr_pem, since_ms }), ..self.stepped() }
    }

    /// What it answered: another root, prepared; or, of the root that signs, another certificate of ours below it, in use at once.
    pub fn accepted(&self, made: Made, cross: Option<Der>, now_ms: u64) -> Result<(u32, Self), AuthorityError> {
        let (number, mut after) = match self.answers(&made.root)? {
            None => (self.next, self.prepare(made, now_ms)?),
            Some(active) => {
                let mut after = self.renewed(made.issuing, made.issuing_key, cross);
                for one in after.all.iter_mut().filter(|one| one.number == active) {
                    one.above.clone_from(&made.above);
                }
                (active, after)
            }
        };
        after.requested = None;
        Ok((number, after))
    }

    /// Which root an answer renews that ends at `root`; `None` when it prepares another.
    pub fn answers(&self, root: &Der) -> Result<Option<u32>, AuthorityError> {
        match self.all.iter().find(|one| one.root == *root) {
            Some(one) if one.state == AuthorityState::Active && !one.above.is_empty() => Ok(Some(one.number)),
            Some(one) => Err(UpstreamRefused::KnownRoot(one.number).into()),
            None => self.may_prepare().map(|()| None).map_err(Into::into),
        }
    }

    fn stepped(&self) -> Self {
        Self { version: self.version + 1, ..self.clone() }
    }

    /// The roots that verify, the one that signs first.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        let active = self.active();
        let others = self.all.iter().filter(|one| one.number != active.number);
        std::iter::once(active).chain(others).map(|one| one.root.0.clone()).collect()
    }

    /// What is shown between a leaf and a root: the way to the one that signs, and the way to the one that signed before.
    pub fn shown(&self) -> Vec<CertificateDer<'static>> {
        let active = self.active();
        let led = active.cross.as_ref().zip(self.old());
        let to_active = std::iter::once(&active.issuing).chain(&active.above);
        let to_old = led.into_iter().flat_map(|(cross, old)| std::iter::once(cross).chain(&old.above));
        to_active.chain(to_old).map(|der| der.0.clone()).collect()
    }

    /// Those that nothing new is to rest on.
    pub fn tainted(&self) -> Vec<Digest> {
        let tainted = self.all.iter().filter(|one| one.state == AuthorityState::Tainted);
        tainted.map(Generation::sha256).collect()
    }

    pub fn seal(&self, sealer: &Sealer) -> Result<Vec<u8>, StoreError> {
        let json = serde_json::to_vec(self).expect("INVARIANT: a record of roots is plain JSON");
        Ok(sealer.seal(GENERATIONS, &Zeroizing::new(json))?)
    }

    pub fn open(sealer: &Sealer, sealed: &[u8]) -> Result<Self, AuthorityError> {
        let json = sealer.unseal(GENERATIONS, sealed)?;
        let read: Self = serde_json::from_slice(&json)
            .map_err(|error| AuthorityError::Damaged(format!("the record of the roots: {error}")))?;
        match read.all.iter().filter(|one| one.state == AuthorityState::Active).count() {
            1 => Ok(read),
            count => Err(AuthorityError::Damaged(format!("the record of the roots has {count} that sign"))),
        }
    }
}

impl Generation {
    fn of(number: u32, made: Made, state: AuthorityState, since_ms: u64) -> Self {
        let Made { root, above, issuing, issuing_key } = made;
        Self { number, state, since_ms, root, above, issuing, issuing_key, cross: None }
    }

    fn step(&mut self, state: AuthorityState, now_ms: u64) {
        (self.state, self.since_ms) = (state, now_ms);
    }

    fn in_state(
        &self,
        states: &[AuthorityState],
        wanted: &'static str,
        done: &'static str,
    ) -> Result<&Self, StepRefused> {
        match states.contains(&self.state) {
            true => Ok(self),
            false => Err(StepRefused::State { number: self.number, state: self.state, wanted, done }),
        }
    }

    /// Of its root certificate.
    pub fn sha256(&self) -> Digest {
        Digest::of(&self.root.0)
    }

    /// Where the key lies sealed that signs its intermediates.
    pub fn root_key(&self) -> String {
        root_key(self.number)
    }

    /// The certificate of that key: the root's, or ours as an authority above signed it.
    pub fn signer(&self) -> &CertificateDer<'static> {
        &self.above.first().unwrap_or(&self.root).0
    }

    /// From the signer to the root.
    pub fn way_up(&self) -> Vec<CertificateDer<'static>> {
        self.above.iter().chain([&self.root]).map(|der| der.0.clone()).collect()
    }
}

/// Where the key of root `number` lies sealed. The first one's is called as it was before there were several.
pub(super) fn root_key(number: u32) -> String {
    match number {
        1 => "authority/root/key".into(),
        number => format!("authority/root/{number}/key"),
    }
}

impl Secret {
    pub fn of(key: &rcgen::KeyPair) -> Self {
        Self(Zeroizing::new(key.serialize_der()))
    }
}

impl Serialize for Der {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&URL_SAFE_NO_PAD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Der {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        URL_SAFE_NO_PAD.decode(text).map(|der| Self(der.into())).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&Zeroizing::new(URL_SAFE_NO_PAD.encode(&*self.0)))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut text = String::deserialize(from)?;
        let key = URL_SAFE_NO_PAD.decode(&text).map_err(|_| serde::de::Error::custom("a key is not base64url"));
        text.zeroize();
        key.map(|key| Self(Zeroizing::new(key)))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str) -> Made {
        let der = |part: &str| Der(CertificateDer::from(format!("{name} {part}").into_bytes()));
        let issuing_key = Secret(Zeroizing::new(Vec::new()));
        Made { root: der("root"), above: Vec::new(), issuing: der("issuing"), issuing_key }
    }

    fn shown(record: &Generations) -> String {
        let one = |one: &Generation| format!("{} {}", one.number, one.state);
        record.all().iter().map(one).collect::<Vec<_>>().join(", ")
    }

    type Step = fn(&Generations) -> Result<Generations, StepRefused>;

    const STEPS: &[(&str, Step)] = &[
        ("prepare", |record| record.prepare(made("next"), 5)),
        ("activate 1", |record| record.activate(1, None, 5)),
        ("activate 2", |record| record.activate(2, None, 5)),
        ("activate 3", |record| record.activate(3, None, 5)),
        ("taint 1", |record| record.taint(1, 5)),
        ("taint 2", |record| record.taint(2, 5)),
        ("revoke 1", |record| record.revoke(1)),
        ("revoke 2", |record| record.revoke(2)),
        ("revoke 3", |record| record.revoke(3)),
    ];

    /// PROVES (one-root-signs)
    #[test]
    fn whatever_steps_are_asked_for_one_root_signs_and_three_verify_at_most() {
        let first = Generations::first(TrustDomain::parse("shop.example").unwrap(), made("first"), 1);
        let mut reached = vec![first];
        let mut at = 0;
        while at < reached.len() {
            let record = reached[at].clone();
            at += 1;
            assert_eq!(record.all().iter().filter(|one| one.state == AuthorityState::Active).count(), 1);
            assert!(record.all().len() <= 3, "{}", shown(&record));
            for (name, step) in STEPS {
                let Ok(after) = step(&record) else { continue };
                assert_eq!(after.version, record.version + 1, "{name}");
                if after.next() <= 4 && !reached.iter().any(|one| shown(one) == shown(&after)) {
                    reached.push(after);
                }
            }
        }
        assert!(reached.len() >= 10, "{}", reached.len());
    }

    #[test]
    fn a_step_that_would_cut_the_mesh_is_refused_in_words() {
        let first = Generations::first(TrustDomain::parse("shop.example").unwrap(), made("first"), 1);
        let prepared = first.prepare(made("second"), 2).unwrap();
        let active = prepared.activate(2, Some(made("cross").issuing), 3).unwrap();
        let tainted = active.taint(1, 4).unwrap();
        let next = tainted.prepare(made("third"), 5).unwrap();
        for (record, step, expected) in [
            (&first, "activate 1", "root 1 is active, and only a root that is prepared can be activated"),
            (&first, "activate 2", "there is no root 2"),
            (&first, "taint 1", "root 1 is active, and only a root that is old can be tainted"),
            (
                &first,
                "revoke 1",
                "root 1 is active, and only a root that is tainted, or prepared and never used, can be revoked",
            ),
            (&prepared, "prepare", "root 2 is prepared already"),
            (&prepared, "taint 2", "root 2 is prepared, and only a root that is old can be tainted"),
            (&prepared, "revoke 2", "1 active"),
            (
                &active,
                "revoke 1",
                "root 1 is old, and only a root that is tainted, or prepared and never used, can be revoked",
            ),
            (
                &active,
                "revoke 2",
                "root 2 is active, and only a root that is tainted, or prepared and never used, can be revoked",
            ),
            (&active, "taint 1", "1 tainted, 2 active"),
            (&next, "activate 3", "root 1 is still in the bundle"),
            (&next, "revoke 1", "2 active, 3 prepared"),
        ] {
            let (_, act) = STEPS.iter().find(|(name, _)| *name == step).unwrap();
            let found = act(record).map_or_else(|refused| refused.to_string(), |after| shown(&after));
            assert_eq!(found, expected, "{step} of {}", shown(record));
        }
        assert!(tainted.active().cross.is_some() && tainted.revoke(1).unwrap().active().cross.is_none());
        assert_eq!((active.tainted().len(), tainted.tainted()), (0, vec![first.active().sha256()]));
        assert_eq!(active.roots()[0], prepared.prepared().unwrap().root.0, "the one that signs is first");
    }
}
