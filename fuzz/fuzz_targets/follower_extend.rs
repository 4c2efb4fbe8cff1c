//! Entries from a control plane that lies: an error changes nothing, and what is taken up has the claimed root.
#![no_main]

use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    identity::TrustDomain,
    ledger::{Batch, Follower},
};
use libfuzzer_sys::fuzz_target;

// (first index, size, cut: which true bytes are replaced by what, root kept or not)
fuzz_target!(|given: (u8, u8, Vec<(Vec<u8>, Vec<u8>)>, bool, u8, u16, u8)| {
    let (first_index, size, mut pairs, true_root, flipped, at, bit) = given;
    let create = Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() };
    let set = ChangeSet { base: Revision(0), changes: vec![create] };
    let first = Follower::default().draft(1, "local", &set, &Bodies::default()).unwrap();
    let set = ChangeSet { base: Revision(1), changes: vec![] };
    let second = first.next.draft(2, "local", &set, &Bodies::default()).unwrap();
    if pairs.is_empty() {
        pairs =
            vec![(first.bytes.clone(), first.change_set.clone()), (second.bytes.clone(), second.change_set.clone())];
        if let Some(pair) = pairs.get_mut(usize::from(flipped)) {
            let bytes = if bit & 8 == 0 { &mut pair.0 } else { &mut pair.1 };
            let at = usize::from(at) % bytes.len();
            bytes[at] ^= 1 << (bit & 7);
        }
    }
    let (entries, change_sets): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let root = if true_root { second.next.root() } else { Digest::default() };
    let bodies = Bodies::default();
    let batch = Batch {
        first_index: first_index.into(),
        entries: &entries,
        change_sets: &change_sets,
        bodies: &bodies,
        size: size.into(),
        root,
    };
    for held in [Follower::default(), first.next] {
        let mut follower = held.clone();
        match follower.extend(&batch) {
            Err(_) => assert_eq!(follower, held),
            Ok(new) if new.is_empty() => assert_eq!(follower, held),
            Ok(_) => assert_eq!(follower, second.next),
        }
    }
});
