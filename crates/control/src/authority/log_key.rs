//! The ledger's own key, and what it signed last. It signs checkpoints and nothing else.

use std::sync::Arc;

use zeroize::Zeroizing;

use countersign_core::{
    canonical::Digest,
    identity::TrustDomain,
    ledger::{Checkpoint, Frontier, Note, SignatureKind, VerifierKey, origin_of},
};

use super::{
    AuthorityError,
    note_key::NoteKey,
    seal::{Sealer, Unopened},
};
use crate::store::{Storage, StoreError};

pub(super) const LOG_KEY: &str = "authority/log/key";
pub(super) const LOG_SIGNED: &str = "authority/log/signed";

/// The key that signs the checkpoints of one ledger.
pub struct LogKey {
    key: NoteKey,
    origin: String,
    sealer: Arc<Sealer>,
    storage: Storage,
    /// Held from reading what was signed last until the next is signed.
    signing: tokio::sync::Mutex<()>,
}

/// Why a checkpoint is not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// What was signed last cannot be read, or what is to be signed not be written down.
    #[error("what the log signed could not be read or written")]
    Store(#[from] StoreError),
    /// It was changed.
    #[error("what the log signed last cannot be read")]
    Sealed(#[from] Unopened),
    /// Signing would show two histories.
    #[error(
        "the log has signed a checkpoint of {signed} entries that this ledger of {held} does not continue: it signs no other"
    )]
    Disagrees {
        /// Size of the last checkpoint that was signed.
        signed: u64,
        /// Size of the ledger.
        held: u64,
    },
}

impl LogKey {
    /// The stored key; `None` in a store of an earlier version.
    pub(super) async fn open(
        trust_domain: &TrustDomain,
        storage: Storage,
        sealer: Arc<Sealer>,
    ) -> Result<Option<Self>, AuthorityError> {
        let mut read = storage.run("authority_keys", |store| store.keys(&[LOG_KEY, LOG_SIGNED])).await?;
        let sealed = match (read.remove(0), read.remove(0)) {
            (Some(key), Some(_)) => key,
            (None, None) => return Ok(None),
            // They are written together: whoever took one of the two away wants a second history signed.
            _ => return Err(AuthorityError::Damaged("the log's key, or what it signed last, is missing".into())),
        };
        let origin = origin_of(trust_domain);
        let seed = sealer.unseal(LOG_KEY, &sealed)?;
        let key = NoteKey::from_seed(&origin, SignatureKind::Ed25519, &seed);
        let key = key.map_err(|error| AuthorityError::Damaged(error.to_string()))?;
        Ok(Some(Self { key, origin, sealer, storage, signing: tokio::sync::Mutex::default() }))
    }

    /// Makes a key that has signed nothing, in place of the one that there was. The old one is gone for good: so a ledger that begins
    /// anew from an older copy is another log to everyone who knows the first by its key.
    pub async fn create(
        trust_domain: &TrustDomain,
        storage: Storage,
        sealer: Arc<Sealer>,
    ) -> Result<Self, AuthorityError> {
        let (made, secret) = Self::make(trust_domain, storage, sealer);
        let seals = made.sealer.clone();
        made.storage
            .run("authority_keys", move |store| {
                let [key, nothing] = secret.seal(&seals)?;
                store.put_keys(&[(LOG_KEY, &key), (LOG_SIGNED, &nothing)])
            })
            .await?;
        Ok(made)
    }

    /// Makes a key that is not kept yet.
    pub(super) fn make(trust_domain: &TrustDomain, storage: Storage, sealer: Arc<Sealer>) -> (Self, NewLogKey) {
        let origin = origin_of(trust_domain);
        let (key, seed) = NoteKey::generate(&origin, SignatureKind::Ed25519)
            .expect("INVARIANT: a trust domain makes the name of a key");
        let seed = Zeroizing::new(seed.to_vec());
        (Self { key, origin, sealer, storage, signing: tokio::sync::Mutex::default() }, NewLogKey(seed))
    }

    /// What verifies its signatures.
    pub fn verifier(&self) -> &VerifierKey {
        self.key.verifier()
    }

    /// Signs the checkpoint of the first `size` entries. `root_at` tells the root of any number of entries that the ledger has.
    ///
    /// INVARIANT (one-history-signed): only a checkpoint that continues the last one that was signed is signed, and its size and
    /// root are durable before the signature leaves: not even a crash makes two that disagree.
    pub async fn sign(&self, size: u64, root_at: impl Fn(u64) -> Option<Digest>) -> Result<Note, SignError> {
        let _one_by_one = self.signing.lock().await;
        let root = loop {
            let sealed = self.storage.run("log_signed", |store| store.key(LOG_SIGNED)).await?.unwrap_or_default();
            let last = self.sealer.unseal(LOG_SIGNED, &sealed)?;
            let (signed, signed_root) = decode(&last).ok_or(Unopened::Changed)?;
            let Some(root) = root_at(size).filter(|_| root_at(signed) == Some(signed_root)) else {
                return Err(SignError::Disagrees { signed, held: size });
            };
            if size <= signed {
                break root;
            }
            let seals = self.sealer.clone();
            let swap = self.storage.run("log_signed", move |store| {
                let next = seals.seal(LOG_SIGNED, &encode(size, root))?;
                store.swap_key(LOG_SIGNED, &sealed, &[(LOG_SIGNED, &next)])
            });
            // Another control plane signed meanwhile: what it signed is compared first.
            if swap.await? {
                break root;
            }
        };
        let text =
            Checkpoint::new(&self.origin, size, root).expect("INVARIANT: an origin, and a root of a tree").encode();
        let signature = self.key.sign(&text);
        Ok(Note::new(text, vec![signature]).expect("INVARIANT: a checkpoint is the text of a note"))
    }
}

/// The seed of a key that is not kept yet.
pub(super) struct NewLogKey(Zeroizing<Vec<u8>>);

impl NewLogKey {
    /// Under [`LOG_KEY`] and [`LOG_SIGNED`]: the seed, and that nothing was signed.
    pub(super) fn seal(&self, sealer: &Sealer) -> Result<[Vec<u8>; 2], StoreError> {
        Ok([sealer.seal(LOG_KEY, &self.0)?, sealer.seal(LOG_SIGNED, &encode(0, Frontier::default().root()))?])
    }
}

/// Size (big-endian), then root.
fn encode(size: u64, root: Digest) -> Vec<u8> {
    [&size.to_be_bytes()[..], &root.0[..]].concat()
}

fn decode(bytes: &[u8]) -> Option<(u64, Digest)> {
    let (size, root) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*size), Digest(root.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use countersign_core::ledger::{Trust, hash_leaf};

    use super::*;
    use crate::{metrics::StoreLatency, store::sqlite::SqliteStore};

    fn root(history: &str, size: u64) -> Option<Digest> {
        let leaves: Vec<_> = (0..size)
            .map(|n| hash_leaf(if n < 2 { n.to_string() } else { format!("{history}{n}") }.as_bytes()))
            .collect();
        Some(Frontier::of(&leaves).root())
    }

    /// PROVES (one-history-signed)
    #[tokio::test]
    async fn what_does_not_continue_what_was_signed_is_not_signed_not_even_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let sealer = Arc::new(Sealer::open(&dir.path().join("kek"), true).unwrap());
        let storage = || {
            let store = SqliteStore::open(&dir.path().join("control.db")).unwrap();
            Storage::start(Box::new(store), StoreLatency::default()).unwrap()
        };
        let first = LogKey::create(&trust_domain, storage(), sealer.clone()).await.unwrap();
        let honest = |held: u64| move |size| root("honest", size).filter(|_| size <= held);
        for size in [0, 1, 4, 4] {
            let note = first.sign(size, honest(size)).await.unwrap();
            let verified = Trust::log(first.verifier().clone()).verify(&note).unwrap();
            assert_eq!(
                (verified.checkpoint().size(), Some(verified.checkpoint().root())),
                (size, root("honest", size))
            );
        }
        let next = LogKey::open(&trust_domain, storage(), sealer.clone()).await.unwrap().unwrap();
        assert_eq!(next.verifier(), first.verifier());
        for key in [&first, &next] {
            let shorter = key.sign(3, honest(3)).await;
            assert!(matches!(shorter, Err(SignError::Disagrees { signed: 4, held: 3 })), "{shorter:?}");
            for size in [4, 5] {
                let other = key.sign(size, |size| root("forged", size)).await;
                assert!(matches!(other, Err(SignError::Disagrees { signed: 4, .. })), "{other:?}");
            }
        }
        assert!(next.sign(5, honest(5)).await.is_ok());
        // An older one is not another one: a reader may still ask for it.
        assert!(next.sign(4, honest(5)).await.is_ok());
    }

    #[tokio::test]
    async fn a_log_whose_memory_was_taken_away_signs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let sealer = Arc::new(Sealer::open(&dir.path().join("kek"), true).unwrap());
        let path = dir.path().join("control.db");
        let storage = Storage::start(Box::new(SqliteStore::open(&path).unwrap()), StoreLatency::default()).unwrap();
        let key = LogKey::create(&trust_domain, storage.clone(), sealer.clone()).await.unwrap();
        let database = rusqlite::Connection::open(&path).unwrap();
        database.execute("UPDATE keys SET bytes = x'00' WHERE name = ?1", [LOG_SIGNED]).unwrap();
        assert!(matches!(key.sign(1, |size| root("honest", size)).await, Err(SignError::Sealed(_))));
        database.execute("DELETE FROM keys WHERE name = ?1", [LOG_SIGNED]).unwrap();
        let opened = LogKey::open(&trust_domain, storage, sealer).await;
        assert!(matches!(opened, Err(AuthorityError::Damaged(_))), "it was opened");
    }
}
