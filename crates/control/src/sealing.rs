//! Another key-encryption key: everything that the store holds sealed is sealed anew, at once, after a change of the ledger chose
//! the key that does it from now on. What is sealed is never opened for it: only the data keys are.
//!
//! | a crash | leaves |
//! |---|---|
//! | before the change is in the ledger | the key as it was, and perhaps a new key file that seals nothing |
//! | after it, before the store has all of it anew | the key as it was; `status` says that another one was chosen, and asking again goes on |
//! | after that | the new key: a start with the old one says which is asked for |

use std::sync::Arc;

use countersign_api::local::{Apply, ApplyAs, KeyPlace, Problem, Reseal, SealedAnew};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet},
};

use crate::{
    Plane,
    authority::seal::{KeyName, Sealer, SealingKey},
    ledger, local_api,
    local_api::problem,
    mark_beside, mfa, proposals,
    store::{Resealed, SealedAt, Storage, StoreError},
};

/// Where the store notes how a start is told of the key in force; it helps, and decides nothing.
const PLACE: &str = "note/sealing-key/place";
/// How often the change is asked for again because another one came first.
const ATTEMPTS_MAX: usize = 5;

/// The key that was given is not the one that sealed what the store holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the mesh's keys are sealed with key {sealed_by}, and {given} holds key {found}")]
pub struct OtherKey {
    /// What sealed them.
    pub sealed_by: KeyName,
    /// Where that one came from when everything was sealed with it.
    pub place: Option<KeyPlace>,
    /// What was given.
    pub given: KeyPlace,
    /// The key there.
    pub found: KeyName,
}

impl OtherKey {
    /// What to do about it.
    pub fn help(&self) -> String {
        let start = match &self.place {
            Some(place) => format!("start with `{}`, which seals them since the last rotation", place.flag()),
            None => "start with the key that sealed them".to_owned(),
        };
        format!("{start}; another key is put in its place by `countersign authority reseal` while the mesh runs")
    }
}

/// Compares the key that was given with what the store says of the one that sealed.
pub(crate) async fn check(storage: &Storage, sealer: &Sealer) -> Result<Result<(), OtherKey>, StoreError> {
    let key = sealer.key();
    let read = |store: &mut dyn crate::store::Store| Ok((store.sealed()?, store.key(PLACE)?));
    let (sealed, place) = storage.run("sealed", read).await?;
    let other = sealed.iter().filter_map(|(_, sealed)| KeyName::in_sealed(sealed)).find(|name| *name != key.name());
    Ok(match other {
        None => Ok(()),
        Some(sealed_by) => Err(OtherKey {
            sealed_by,
            place: place.and_then(|place| serde_json::from_slice(&place).ok()),
            given: key.place().clone(),
            found: key.name(),
        }),
    })
}

/// That a change chose another key, which does not seal yet.
pub(crate) fn waiting(plane: &Plane) -> Option<String> {
    let chosen = plane.ledger.head().follower.state().sealing_key?;
    let key = plane.sealer.key();
    (chosen != key.fingerprint()).then(|| {
        format!(
            "sealing key {} was chosen, and key {} seals: run `countersign authority reseal` again with the one that was chosen",
            KeyName::of(&chosen),
            key.name()
        )
    })
}

/// Puts another key-encryption key in force: the gate first, then all of the store at once.
///
/// INVARIANT (rotation-gated): the store is sealed with another key only after a change that names its fingerprint stands in the
/// ledger.
pub async fn reseal(plane: &Arc<Plane>, asked: Reseal) -> Result<SealedAnew, Problem> {
    let Reseal { next: place, shown } = asked;
    let replica = plane.replica.clone();
    let beat = move |store: &mut dyn crate::store::Store| store.beat(&replica, crate::replicas::ALIVE_MS);
    let others = plane.storage.run("replicas", beat).await.map_err(|error| local_api::store_problem(&error))?;
    if !others.is_empty() {
        let help = "stop them, reseal, and start them with the new key";
        let title =
            format!("{} other control planes run on this store, and would go on with the old key", others.len());
        return Err(problem(409, title, None, Some(help)));
    }
    let opened = tokio::task::spawn_blocking(move || SealingKey::open(&place, true)).await;
    let opened = opened.map_err(|_| local_api::append_problem(ledger::AppendError::Stopping))?;
    let next = opened.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        problem(422, error.to_string(), cause, Some(&error.help()))
    })?;
    let fingerprint = next.fingerprint();
    if plane.sealer.key().fingerprint() == fingerprint && chosen(plane).is_none_or(|chosen| chosen == fingerprint) {
        let help = "name another key; this one is in force";
        return Err(problem(409, format!("key {} seals everything already", next.name()), None, Some(help)));
    }
    let revision =
        if chosen(plane) == Some(fingerprint) { None } else { Some(choose(plane, fingerprint, shown).await?) };
    let place = next.place().clone();
    let resealed = seal_anew(&plane.storage, plane.sealer.clone(), next)
        .await
        .map_err(|error| local_api::store_problem(&error))?;
    plane.high_water.move_beside(&mark_beside(&plane.data_dir, &place));
    plane.mark().await;
    tracing::warn!(key = %KeyName::of(&fingerprint), %place, resealed, "everything is sealed with another key");
    Ok(SealedAnew { fingerprint, place, revision, resealed })
}

fn chosen(plane: &Plane) -> Option<Digest> {
    plane.ledger.head().follower.state().sealing_key
}

/// The change that chooses it, asked for again when another one came first.
async fn choose(
    plane: &Plane,
    fingerprint: Digest,
    shown: countersign_api::local::Shown,
) -> Result<countersign_core::change::Revision, Problem> {
    let mut attempts = 0;
    loop {
        let base = plane.ledger.head().follower.revision();
        let change_set = ChangeSet { base, changes: vec![Change::RotateSealingKey { fingerprint }] };
        let asked = ApplyAs { apply: Apply { change_set, bodies: Bodies::default() }, shown: shown.clone() };
        match proposals::apply(plane, asked).await {
            Ok(applied) => return Ok(applied.revision),
            Err(refused) if refused.status == 409 && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(refused) => return Err(refused),
        }
    }
}

/// On the thread of the store, in one transaction: what is written before it is sealed by the old key, and after it by the new.
async fn seal_anew(storage: &Storage, sealer: Arc<Sealer>, next: SealingKey) -> Result<usize, StoreError> {
    let reseal = storage.run("reseal", move |store| {
        let key = sealer.key();
        let place = serde_json::to_vec(next.place()).expect("INVARIANT: a place is JSON");
        // A second time where the store may have done it and the answer was lost: then nothing of the old key is left.
        let sealed: Vec<_> = store.sealed()?;
        if !sealed.is_empty() && sealed.iter().all(|(_, sealed)| KeyName::in_sealed(sealed) == Some(next.name())) {
            sealer.replace(next);
            return Ok(sealed.len());
        }
        let again = sealed.into_iter().map(|(at, seen)| match key.rewrap(&next, &purpose(&at), &seen) {
            Ok(next) => Ok(Resealed { at, seen, next }),
            Err(error) => Err(StoreError::Failed(format!("{at:?} was not sealed anew: {error}"))),
        });
        let again = again.collect::<Result<Vec<_>, StoreError>>()?;
        match store.reseal(&again, &[(PLACE, &place)]) {
            Ok(true) => {}
            Ok(false) => return Err(StoreError::Failed("another control plane wrote meanwhile; ask again".into())),
            Err(error) => {
                // Lost, or kept and the answer lost: what the store holds says which.
                let is_next = |(_, sealed): &(_, Vec<u8>)| KeyName::in_sealed(sealed) == Some(next.name());
                if !store.sealed()?.iter().all(is_next) {
                    return Err(error);
                }
            }
        }
        sealer.replace(next);
        Ok(again.len())
    });
    reseal.await
}

/// What each was sealed for.
fn purpose(at: &SealedAt) -> String {
    match at {
        SealedAt::Key(name) => name.clone(),
        SealedAt::Codes(factor) => mfa::purpose(factor),
        SealedAt::Head => ledger::HEAD_PURPOSE.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{
        metrics::StoreLatency,
        store::{Store as _, StoredCodes, sqlite::SqliteStore, testing::Faults},
    };
    use countersign_core::identity::{FactorId, OperatorName};

    struct Room {
        dir: tempfile::TempDir,
        faults: Faults,
        storage: Storage,
        sealer: Arc<Sealer>,
    }

    impl Room {
        /// A key, a certificate and what verifies a code, sealed with the file `old`.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let sealer = Arc::new(Sealer::open(&dir.path().join("old"), true).unwrap());
            let mut store = SqliteStore::open(&dir.path().join("control.db")).unwrap();
            let sealed = sealer.seal("authority/root/key", b"root").unwrap();
            store.put_keys(&[("authority/root/key", &sealed), ("authority/root/certificate", b"0der")]).unwrap();
            let factor = FactorId::parse("totp-1").unwrap();
            let operator = OperatorName::parse("alice").unwrap();
            let sealed = sealer.seal(&mfa::purpose(&factor), b"seed").unwrap();
            store.put_codes(&StoredCodes { factor, operator, sealed, last_step: 7 }).unwrap();
            let faults = Faults::default();
            let storage = Storage::start(Box::new(faults.around(store)), StoreLatency::default()).unwrap();
            Self { dir, faults, storage, sealer }
        }

        fn place(&self, name: &str) -> KeyPlace {
            KeyPlace::File(PathBuf::from(self.dir.path()).join(name))
        }

        fn key(&self, name: &str) -> SealingKey {
            SealingKey::open(&self.place(name), true).unwrap()
        }

        /// Whether all that is kept opens with the key of `name`, as a start with it would find.
        async fn opens_with(&self, name: &str) -> Result<(), OtherKey> {
            let sealer = Sealer::of(self.key(name));
            check(&self.storage, &sealer).await.unwrap()?;
            let sealed = self.storage.run("sealed", |store| store.sealed()).await.unwrap();
            assert_eq!(sealed.len(), 2);
            for (at, sealed) in sealed {
                let secret: &[u8] = if matches!(at, SealedAt::Key(_)) { b"root" } else { b"seed" };
                assert_eq!(sealer.unseal(&purpose(&at), &sealed).unwrap().as_slice(), secret, "{at:?}");
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn everything_opens_with_the_one_key_or_with_the_other_whatever_a_crash_leaves() {
        let room = Room::new();
        room.faults.lose_next_reseal();
        let lost = seal_anew(&room.storage, room.sealer.clone(), room.key("new")).await;
        assert!(lost.is_err(), "{lost:?}");
        assert_eq!(room.opens_with("old").await, Ok(()));
        assert_eq!(room.sealer.key().name(), room.key("old").name(), "what seals is what the store holds");
        assert!(room.opens_with("new").await.is_err());

        room.faults.keep_next_reseal_but_report_it_lost();
        assert_eq!(seal_anew(&room.storage, room.sealer.clone(), room.key("new")).await, Ok(2));
        assert_eq!(room.sealer.key().name(), room.key("new").name());
        assert_eq!(room.opens_with("new").await, Ok(()));
        let old = room.opens_with("old").await.unwrap_err();
        assert_eq!((old.sealed_by, old.found), (room.key("new").name(), room.key("old").name()));
        assert_eq!(old.place, Some(room.place("new")), "a start with the old key is told of the new one");
        assert!(old.help().contains("--key-file"), "{}", old.help());

        // Asked again, after an answer that never came: there is nothing left to do.
        assert_eq!(seal_anew(&room.storage, room.sealer.clone(), room.key("new")).await, Ok(2));
        assert_eq!(room.opens_with("new").await, Ok(()));
    }

    #[tokio::test]
    async fn what_another_control_plane_wrote_meanwhile_is_not_overwritten() {
        let room = Room::new();
        let (sealer, next) = (room.sealer.clone(), room.key("new"));
        let seen = room.storage.run("sealed", |store| store.sealed()).await.unwrap();
        let resealed: Vec<_> = seen
            .into_iter()
            .map(|(at, seen)| Resealed { next: sealer.key().rewrap(&next, &purpose(&at), &seen).unwrap(), at, seen })
            .collect();
        let written = sealer.seal("mfa/recovery-key", b"later").unwrap();
        room.storage.run("put_keys", move |store| store.put_keys(&[("mfa/recovery-key", &written)])).await.unwrap();
        assert_eq!(room.storage.run("reseal", move |store| store.reseal(&resealed, &[])).await, Ok(false));
        assert_eq!(check(&room.storage, &sealer).await.unwrap(), Ok(()), "nothing was touched");
    }
}
