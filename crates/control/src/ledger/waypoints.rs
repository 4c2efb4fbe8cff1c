//! Past states of the mesh that are kept, so that a revision is folded from the nearest one below it and not from the first entry.
//!
//! What is kept is bounded: the longer the ledger, the further apart they stand. They are derived from entries, which never change,
//! and nothing that is decided rests on them.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use countersign_core::{keyring::Keyring, ledger::Frontier};

use super::Head;

/// States that are kept at most.
const KEPT_MAX: u64 = 16;
/// Entries between two of them at least: folding so many takes less than a person waits.
const APART_MIN: u64 = 128;

/// The mesh after so many entries, and what the next one is appended to.
#[derive(Clone)]
pub struct Waypoint {
    /// The mesh.
    pub head: Head,
    /// The tree.
    pub tree: Frontier,
}

/// Those that are kept, by their revision.
#[derive(Default)]
pub struct Waypoints(Mutex<BTreeMap<u64, Waypoint>>);

impl Waypoints {
    /// The nearest at or below `revision`, or the empty mesh.
    pub fn below(&self, revision: u64) -> Waypoint {
        let kept = self.0.lock();
        kept.range(..=revision).next_back().map(|(_, waypoint)| waypoint.clone()).unwrap_or_else(|| Waypoint {
            head: Head { keyring: Keyring::of_control(), ..Head::default() },
            tree: Frontier::default(),
        })
    }

    /// Keeps `reached`, in a ledger of `size` entries, if one stands there.
    pub fn pass(&self, reached: &Waypoint, size: u64) {
        let (apart, at) = (apart(size), reached.tree.size());
        if at > 0 && at.is_multiple_of(apart) {
            let mut kept = self.0.lock();
            kept.retain(|revision, _| revision.is_multiple_of(apart));
            kept.entry(at).or_insert_with(|| reached.clone());
        }
    }
}

/// The first place after `revision` where one stands, in a ledger of `size` entries.
pub fn after(revision: u64, size: u64) -> u64 {
    let apart = apart(size);
    (revision / apart + 1) * apart
}

/// Doubled until few enough fit.
fn apart(size: u64) -> u64 {
    let mut apart = APART_MIN;
    while size / apart > KEPT_MAX {
        apart *= 2;
    }
    apart
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_long_a_ledger_is_few_states_are_kept_and_the_way_between_two_is_bounded() {
        for size in [0, 1, 127, 128, 2_048, 2_176, 2_177, 100_000, 10_000_000] {
            let places: Vec<u64> = std::iter::successors(Some(after(0, size)), |at| Some(after(*at, size)))
                .take_while(|at| *at <= size)
                .collect();
            assert!(places.len() as u64 <= KEPT_MAX, "{size}: {places:?}");
            let longest = places.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
            assert!(longest <= APART_MIN.max(size / KEPT_MAX * 2), "{size}: {longest}");
        }
    }
}
