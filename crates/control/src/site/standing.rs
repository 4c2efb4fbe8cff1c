//! Whose signatures count under each entry: the operators' keys folded from the first entry on, as whoever verifies an export does.
//! Folded once and kept; a long ledger is folded a part at a time, so that no request waits for all of it.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::Mutex;

use countersign_core::{identity::OperatorName, keyring::Keyring};

use crate::{
    Plane,
    ledger::PAGE_ENTRIES,
    store::{StoreError, StoredEntry},
};

/// Entries that one request folds at most.
const FOLDED_MAX: u64 = 20_000;

/// What has been folded so far.
#[derive(Default)]
pub struct Standing(Mutex<Folded>);

#[derive(Default)]
struct Folded {
    keyring: Keyring,
    /// Entries under which somebody's signature counts, by index.
    signers: BTreeMap<u64, BTreeSet<OperatorName>>,
    /// The entry that the keys do not take, and why.
    stopped: Option<(u64, String)>,
}

/// Who stands behind an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stands {
    /// These operators.
    Behind(BTreeSet<OperatorName>),
    /// The entry, or one before it, is not taken.
    Refused(String),
    /// The fold has not come so far.
    Unjudged,
}

impl Standing {
    /// Who stands behind each of the entries `from..to`.
    pub async fn of(&self, plane: &Plane, from: u64, to: u64) -> Result<Vec<Stands>, StoreError> {
        let mut folded = self.0.lock().await;
        let until = to.min(folded.keyring.revision().0 + FOLDED_MAX);
        while folded.keyring.revision().0 < until && folded.stopped.is_none() {
            let page = plane.ledger.stored(folded.keyring.revision().0, PAGE_ENTRIES).await?;
            if page.is_empty() {
                break;
            }
            folded.take(&page);
        }
        Ok((from..to).map(|index| folded.stands(index)).collect())
    }
}

impl Folded {
    fn take(&mut self, page: &[StoredEntry]) {
        for stored in page {
            match self.keyring.take(&stored.entry, &stored.change_set) {
                Ok(judged) if judged.signers.is_empty() => {}
                Ok(judged) => drop(self.signers.insert(stored.index, judged.signers)),
                Err(error) => {
                    self.stopped = Some((stored.index, error.to_string()));
                    return;
                }
            }
        }
    }

    fn stands(&self, index: u64) -> Stands {
        match &self.stopped {
            Some((at, why)) if index >= *at => Stands::Refused(why.clone()),
            _ if index >= self.keyring.revision().0 => Stands::Unjudged,
            _ => Stands::Behind(self.signers.get(&index).cloned().unwrap_or_default()),
        }
    }
}
