//! Recovery, when nobody can show a factor any more: whoever has the data directory *and* what opens its keys appoints an owner,
//! past the gate, with the control plane stopped. The ledger says so for good, and every answer for a week.
//!
//! What it never does: run beside a control plane, touch an unprotected mesh, or pass the seal. Agents of a sealed mesh do not
//! follow an entry that too few operators signed, and this one is not signed.

use std::{path::PathBuf, sync::Arc};

use zeroize::Zeroizing;

use countersign_api::local::KeyPlace;
use countersign_core::{
    assurance::totp,
    canonical::Digest,
    change::{Change, ChangeSet, Revision},
    gate::ChangeGate,
    identity::{FactorId, OperatorName},
    ledger::DraftError,
    operator::{EnrolledFactor, REASON_BYTES_MAX},
};

use crate::{
    KEY_FILE, STORE_FILE, StartError,
    audit::{self, Audit, Event},
    authority::seal::{Sealer, SealingKey},
    clock::Clock,
    gate::Admitted,
    ledger::{AppendError, Ledger},
    lock, make_private_dir,
    mark::HighWater,
    mark_beside, mfa,
    replicas::ALIVE_MS,
    sealing,
    store::{
        Storage, Store, StoreError, StoredCodes,
        postgres::{PostgresStore, PostgresUrl},
        sqlite::SqliteStore,
    },
};

/// How long status and commands speak of a recovery.
pub const TOLD_SECONDS: i64 = 7 * 24 * 60 * 60;

/// Whom to appoint, and with what right.
#[derive(Debug, Clone)]
pub struct RecoverConfig {
    /// The data directory of the stopped control plane.
    pub data_dir: PathBuf,
    /// Where the ledger is; the file in the data directory unless given.
    pub store: Option<PostgresUrl>,
    /// What opens its keys; the file `keys/kek` in it unless given.
    pub key: Option<KeyPlace>,
    /// Who becomes owner, with a new factor and no other.
    pub operator: OperatorName,
    /// Why, for the ledger.
    pub reason: String,
    /// The file of the audit trail.
    pub audit: PathBuf,
}

/// Proof that the key opened what this data directory's control plane sealed last.
pub struct KeyHeld(());

/// A recovery that waits for the first code of the new authenticator app.
pub struct Begun {
    operator: OperatorName,
    reason: String,
    secret: Zeroizing<Vec<u8>>,
    otpauth: String,
    held: KeyHeld,
    ledger: Arc<Ledger>,
    storage: Storage,
    sealer: Arc<Sealer>,
    high_water: HighWater,
    audit: Audit,
    clock: Clock,
    _lock: std::fs::File,
}

/// What a recovery did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Recovered {
    /// Who is owner now.
    pub operator: OperatorName,
    /// Their only factor.
    pub factor: FactorId,
    /// The revision that says so.
    pub revision: Revision,
    /// The factors that they had before.
    pub removed: Vec<FactorId>,
    /// Whether the mesh was sealed: then agents do not follow it any more.
    pub sealed: bool,
    /// Whether the mesh's own change gate, if it has one, is still in force; one that would let nobody mend it is removed.
    pub own_gate_stays: bool,
}

/// Why nothing was recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The data directory cannot be opened, or its control plane runs.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A control plane runs on the database.
    #[error("a control plane runs on `{0}`, or did a moment ago")]
    OthersRun(String),
    /// There is nothing there.
    #[error("`{0}` holds no mesh")]
    NoMesh(String),
    /// Nobody has enrolled.
    #[error("the mesh is unprotected: there is nobody to recover")]
    Unprotected,
    /// The ledger keeps the reason.
    #[error("the reason has to have 1 to {REASON_BYTES_MAX} bytes")]
    Reason,
    /// The app does not show what its secret says.
    #[error("the code is wrong, or of another time")]
    Code,
    /// The entry was not written.
    #[error("the recovery was not written")]
    Append(#[from] AppendError),
}

impl RecoverError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Start(StartError::Running(_)) => {
                "stop the control plane first: a recovery is not made beside it".into()
            }
            Self::Start(error) => error.help().unwrap_or_else(|| "see `countersign doctor`".into()),
            Self::OthersRun(_) => {
                format!("stop every one of them, and wait {} s after one that was killed", ALIVE_MS / 1000)
            }
            Self::NoMesh(_) => {
                "name the data directory of the control plane, `--data-dir`, or its database, `--store`".into()
            }
            Self::Unprotected => "start it and enrol: `countersign operator enroll --totp`".into(),
            Self::Reason => "say in a sentence what happened: everyone will read it".into(),
            Self::Code => "compare this machine's clock with the phone's, and begin again".into(),
            Self::Append(_) => "nothing was changed; see `countersign doctor`".into(),
        }
    }
}

impl From<StoreError> for RecoverError {
    fn from(error: StoreError) -> Self {
        Self::Start(error.into())
    }
}

/// Opens the stopped control plane's store with its key, and makes the secret of the new factor.
///
/// INVARIANT (recovery-needs-the-key): nothing is appointed before the key opened what sealed the ledger's head, while no control
/// plane runs on the directory.
pub async fn begin(config: RecoverConfig, clock: Clock) -> Result<Begun, RecoverError> {
    let RecoverConfig { data_dir, store, key, operator, reason, audit } = config;
    if reason.trim().is_empty() || reason.len() > REASON_BYTES_MAX {
        return Err(RecoverError::Reason);
    }
    let file = data_dir.join(STORE_FILE);
    if store.is_none() && !file.exists() {
        return Err(RecoverError::NoMesh(data_dir.display().to_string()));
    }
    if store.is_some() {
        make_private_dir(&data_dir)?;
    }
    let lock = lock(&data_dir)?;
    let audit = Audit::open(&audit).map_err(StartError::from)?;
    let in_dir = |source| StartError::Io { path: data_dir.clone(), source };
    // On a thread of its own: the database's client has a runtime for itself.
    let opening = tokio::task::spawn_blocking(move || -> Result<Box<dyn Store>, StoreError> {
        Ok(match store {
            Some(url) => Box::new(PostgresStore::open(url)?),
            None => Box::new(SqliteStore::open(&file)?),
        })
    });
    let store = opening.await.map_err(|_| StoreError::Closed)??;
    let storage = Storage::start(store, crate::metrics::Metrics::default().store.clone()).map_err(in_dir)?;
    if storage.is_shared() {
        let others = storage.run("replicas", |store| store.beat("recover", ALIVE_MS)).await?;
        if !others.is_empty() {
            return Err(RecoverError::OthersRun(storage.place().to_owned()));
        }
    }
    let place = key.unwrap_or_else(|| KeyPlace::File(data_dir.join(KEY_FILE)));
    let high_water = HighWater::beside(&mark_beside(&data_dir, &place));
    let opened = tokio::task::spawn_blocking(move || SealingKey::open(&place, false)).await;
    let key = opened.map_err(|_| StoreError::Closed)?.map_err(StartError::from)?;
    let sealer = Arc::new(Sealer::of(key));
    sealing::check(&storage, &sealer).await?.map_err(StartError::from)?;
    // It opens the sealed head: whoever has another key, or only the files, ends here.
    let ledger =
        Ledger::open(storage.clone(), clock.clone(), sealer.clone(), |_, _| {}).await.map_err(StartError::from)?;
    let ledger = Arc::new(ledger);
    if let Err(source) = high_water.compare(&ledger).map_err(StartError::from)? {
        return Err(StartError::RolledBack { data_dir, source }.into());
    }
    let head = ledger.head();
    let state = head.follower.state();
    let Some(trust_domain) = state.trust_domain.clone() else {
        return Err(RecoverError::NoMesh(storage.place().to_owned()));
    };
    if !state.is_protected() {
        return Err(RecoverError::Unprotected);
    }
    let mut secret = Zeroizing::new(vec![0; totp::SECRET_BYTES]);
    aws_lc_rs::rand::fill(&mut secret).expect("INVARIANT: the system's random source does not fail");
    let otpauth = totp::uri(&secret, trust_domain.as_str(), operator.as_str());
    let held = KeyHeld(());
    Ok(Begun {
        operator,
        reason,
        secret,
        otpauth,
        held,
        ledger,
        storage,
        sealer,
        high_water,
        audit,
        clock,
        _lock: lock,
    })
}

impl Begun {
    /// What the authenticator app is to be told.
    pub fn otpauth(&self) -> &str {
        &self.otpauth
    }

    /// With the app's first code the recovery becomes a ledger entry.
    pub async fn confirm(&self, code: &str) -> Result<Recovered, RecoverError> {
        let at_seconds = mfa::seconds(self.clock.now_ms());
        let step =
            totp::verify(&self.secret, code, self.clock.now_ms() / 1000, None).map_err(|_| RecoverError::Code)?;
        let mut random = [0; 8];
        aws_lc_rs::rand::fill(&mut random).expect("INVARIANT: the system's random source does not fail");
        let factor =
            FactorId::parse(&format!("totp-{}", hex::encode(random))).expect("INVARIANT: letters, digits and a dash");
        let (secret, sealer) = (self.secret.clone(), self.sealer.clone());
        let mut stored = StoredCodes {
            factor: factor.clone(),
            operator: self.operator.clone(),
            sealed: Vec::new(),
            last_step: step.0,
        };
        // Kept before the entry says that there is such a factor; what a crash in between leaves behind verifies nothing.
        let kept = self.storage.run("put_codes", move |store| {
            stored.sealed = sealer.seal(&mfa::purpose(&stored.factor), &secret)?;
            store.put_codes(&stored)
        });
        kept.await?;
        let head = self.ledger.head();
        let state = head.follower.state();
        let known = state.operators.get(&self.operator);
        let removed: Vec<FactorId> = known.map(|known| known.factors.keys().cloned().collect()).unwrap_or_default();
        let sealed = state.seal.is_some();
        let mut changes = vec![Change::Recover {
            operator: self.operator.clone(),
            id: factor.clone(),
            factor: EnrolledFactor::Totp,
            reason: self.reason.as_str().into(),
            at_seconds,
        }];
        let base = head.follower.revision();
        let next = state.apply_all(&ChangeSet { base, changes: changes.clone() });
        let next = next.map_err(|error| AppendError::Draft(DraftError::Fold(error)))?;
        let text_of = |digest: &Digest| head.follower.bodies().get(digest).cloned();
        let own_gate_stays = ChangeGate::of(&next, text_of).is_ok_and(|gate| gate.is_mendable(&next, at_seconds));
        if !own_gate_stays {
            // Whoever is appointed could do nothing: the shipped gate lets an owner with a code begin.
            changes.extend(state.gate.keys().map(|id| Change::RemoveGatePolicy { id: id.clone() }));
        }
        let change_set = ChangeSet { base, changes };
        let appended = self.ledger.append(Admitted::of_recovery(change_set, &self.held)).await?;
        let gone = removed.clone();
        if let Err(error) = self.storage.run("forget_factors", move |store| store.forget_factors(&gone)).await {
            // They verify nothing any more: the ledger does not have them.
            tracing::warn!(%error, "the secrets of removed factors could not be forgotten");
        }
        if let Err(error) = self.high_water.rise(&self.ledger) {
            tracing::warn!(%error, "the ledger's high-water mark could not be written");
        }
        let revision = appended.follower.revision();
        let (operator, reason) = (self.operator.clone(), audit::cut(self.reason.as_str()));
        let recovered = Event::Recovered { operator, reason, revision: revision.0 };
        // The ledger says it in any case.
        if let Err(unwritten) = self.audit.keep(self.clock.now_ms(), recovered).await {
            tracing::error!(why = unwritten.detail, "the recovery could not be written into the audit trail");
        }
        tracing::warn!(operator = %self.operator, revision = revision.0, "the mesh was recovered past its gate");
        Ok(Recovered { operator: self.operator.clone(), factor, revision, removed, sealed, own_gate_stays })
    }
}

/// What everyone is told of a recovery while it is recent.
pub(crate) fn told(state: &countersign_core::state::MeshState, now_seconds: i64) -> Option<String> {
    let recovery = state.recovery.as_ref()?;
    (now_seconds.saturating_sub(recovery.at_seconds) < TOLD_SECONDS).then(|| {
        format!(
            "the mesh was recovered past its gate: `{}` was made owner with a new factor and no other; the reason given: {:?}. \
             If that surprises you, stop the mesh: somebody has its files and its key",
            recovery.operator, &*recovery.reason
        )
    })
}
