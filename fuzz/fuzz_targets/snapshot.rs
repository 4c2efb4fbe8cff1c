//! Snapshots from a control plane that lies: what is taken up can be given on as it came.
#![no_main]

use countersign_core::{
    change::{Bodies, Revision},
    ledger::{Follower, Snapshot},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|given: (u64, Vec<u8>, Vec<Vec<u8>>, Vec<u8>, Vec<String>)| {
    let (revision, state, frontier, last_entry, texts) = given;
    let mut bodies = Bodies::default();
    for text in texts {
        bodies.insert(text);
    }
    let snapshot = Snapshot { revision: Revision(revision), state, frontier, last_entry, bodies };
    if let Ok(follower) = Follower::from_snapshot(&snapshot) {
        let again = follower.snapshot().unwrap();
        assert_eq!(
            (again.state, again.frontier, again.last_entry),
            (snapshot.state, snapshot.frontier, snapshot.last_entry)
        );
    }
});
