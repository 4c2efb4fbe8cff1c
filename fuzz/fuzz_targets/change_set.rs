//! Change-sets from the wire: folding whatever parses never panics, and a draft of it can be followed.
#![no_main]

use countersign_core::{
    change::{Bodies, ChangeSet},
    ledger::{Batch, Follower},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(set) = serde_json::from_slice::<ChangeSet>(bytes) else { return };
    let none = Bodies::default();
    let Ok(draft) = Follower::default().draft(1, "local", &set, &none) else { return };
    let (entries, change_sets) = ([draft.bytes], [draft.change_set]);
    let root = draft.next.root();
    let batch = Batch { first_index: 0, entries: &entries, change_sets: &change_sets, bodies: &none, size: 1, root };
    let mut follower = Follower::default();
    follower.extend(&batch).expect("what could be drafted can be followed");
    assert_eq!(follower, draft.next);
});
