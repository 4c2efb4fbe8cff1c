//! The Merkle tree of RFC 6962, section 2.1 (unchanged in RFC 9162): hashes, the compact right edge of a growing tree,
//! and the two proofs. It knows hashes only; what a leaf says is not its business.

use aws_lc_rs::digest::{Context, SHA256};

use crate::canonical::Digest;

/// The hash of a leaf: `SHA-256(0x00 || entry)` (2.1). The first byte keeps a leaf from passing for a node.
pub fn hash_leaf(entry: &[u8]) -> Digest {
    sha256(&[&[0x00], entry])
}

/// The hash of a node: `SHA-256(0x01 || left || right)` (2.1).
pub fn hash_node(left: &Digest, right: &Digest) -> Digest {
    sha256(&[&[0x01], &left.0, &right.0])
}

fn sha256(parts: &[&[u8]]) -> Digest {
    let mut context = Context::new(&SHA256);
    parts.iter().for_each(|part| context.update(part));
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    Digest(out)
}

/// All that is needed of a tree to append to it and to know its root: the roots of its full subtrees, left to right. A
/// tree of `size` leaves has one for each set bit of `size`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frontier {
    size: u64,
    subtrees: Vec<Digest>, // largest, that is leftmost, first
}

/// Why parts are not a frontier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrontierError {
    /// A size has exactly one number of full subtrees.
    #[error("a tree of {size} leaves has {expected} full subtrees, not {found}")]
    Count {
        /// The size they were said to be of.
        size: u64,
        /// How many such a tree has.
        expected: u32,
        /// How many there were.
        found: usize,
    },
    /// A hash is 32 bytes.
    #[error("a subtree's root must have 32 bytes, not {0}")]
    Length(usize),
}

impl Frontier {
    /// The frontier of a whole tree.
    pub fn of(leaves: &[Digest]) -> Self {
        let mut frontier = Self::default();
        leaves.iter().for_each(|leaf| frontier.append(*leaf));
        frontier
    }

    /// Takes up a frontier that someone else wrote down. Only its shape is proven: compare [`root`](Self::root).
    pub fn from_parts<H: AsRef<[u8]>>(size: u64, subtrees: &[H]) -> Result<Self, FrontierError> {
        let expected = size.count_ones();
        if subtrees.len() != expected as usize {
            return Err(FrontierError::Count { size, expected, found: subtrees.len() });
        }
        let subtrees = subtrees
            .iter()
            .map(|hash| hash.as_ref().try_into().map(Digest).map_err(|_| FrontierError::Length(hash.as_ref().len())))
            .collect::<Result<_, _>>()?;
        Ok(Self { size, subtrees })
    }

    /// The roots of the full subtrees, left to right.
    pub fn parts(&self) -> Vec<[u8; 32]> {
        self.subtrees.iter().map(|subtree| subtree.0).collect()
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds the hash of a leaf on the right.
    pub fn append(&mut self, leaf: Digest) {
        let mut grown = leaf;
        // Each trailing one of the size is a subtree as large as what has just grown beside it.
        for _ in 0..self.size.trailing_ones() {
            let left = self.subtrees.pop().expect("INVARIANT: one subtree for each set bit of the size");
            grown = hash_node(&left, &grown);
        }
        self.subtrees.push(grown);
        self.size += 1;
    }

    /// The root of the tree; the hash of nothing for the empty one.
    pub fn root(&self) -> Digest {
        self.subtrees
            .iter()
            .rev()
            .copied()
            .reduce(|right, left| hash_node(&left, &right))
            .unwrap_or_else(|| sha256(&[]))
    }
}

/// The proof that leaf `index` stands in the tree of `leaves` (2.1.1): siblings from the leaf up. `None` when it does not.
pub fn inclusion_proof(leaves: &[Digest], index: u64) -> Option<Vec<Digest>> {
    let mut index = usize::try_from(index).ok().filter(|index| *index < leaves.len())?;
    let (mut within, mut proof) = (leaves, Vec::new());
    while within.len() > 1 {
        let (left, right) = within.split_at(split(within.len()));
        if index < left.len() {
            proof.push(Frontier::of(right).root());
            within = left;
        } else {
            proof.push(Frontier::of(left).root());
            index -= left.len();
            within = right;
        }
    }
    proof.reverse();
    Some(proof)
}

/// The proof that the tree of the first `from` of `leaves` is a prefix of the tree of them all (2.1.2). It is empty when
/// there is nothing to prove: `from` is 0 or all. `None` when there are fewer leaves than that.
pub fn consistency_proof(leaves: &[Digest], from: u64) -> Option<Vec<Digest>> {
    let mut from = usize::try_from(from).ok().filter(|from| *from <= leaves.len())?;
    let (mut within, mut proof) = (leaves, Vec::new());
    if from == 0 || from == leaves.len() {
        return Some(proof);
    }
    // SUBPROOF(m, D[n], b) of 2.1.2; `known` is b: the verifier holds the root of `within`'s prefix.
    let mut known = true;
    while from != within.len() {
        let (left, right) = within.split_at(split(within.len()));
        if from <= left.len() {
            proof.push(Frontier::of(right).root());
            within = left;
        } else {
            proof.push(Frontier::of(left).root());
            from -= left.len();
            within = right;
            known = false;
        }
    }
    if !known {
        proof.push(Frontier::of(within).root());
    }
    proof.reverse();
    Some(proof)
}

/// The largest power of two below `count` (2.1), which must be at least 2.
fn split(count: usize) -> usize {
    count.next_power_of_two() / 2
}

/// Whether `proof` shows that `leaf` stands at `index` of the tree of `size` leaves with `root` (RFC 9162, 2.1.3.2).
pub fn proves_inclusion(proof: &[Digest], leaf: &Digest, index: u64, size: u64, root: &Digest) -> bool {
    if index >= size {
        return false;
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            hash = hash_node(sibling, &hash);
            // A right edge without siblings: climb until it is a right child.
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = hash_node(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && hash == *root
}

/// Whether `proof` shows that the tree of `from` leaves with root `from_root` is a prefix of the tree of `size` leaves with
/// `root` (RFC 9162, 2.1.4.2). Everything has the empty tree as a prefix, with the empty proof.
pub fn proves_consistency(proof: &[Digest], from: u64, from_root: &Digest, size: u64, root: &Digest) -> bool {
    if from > size {
        return false;
    }
    if from == size {
        return proof.is_empty() && from_root == root;
    }
    if from == 0 {
        return proof.is_empty() && *from_root == Frontier::default().root();
    }
    // A tree of a power of two is itself the first node of the proof, which is then left out.
    let (first, rest) = match proof.split_first() {
        _ if from.is_power_of_two() => (from_root, proof),
        Some((first, rest)) => (first, rest),
        None => return false,
    };
    let shift = (from - 1).trailing_ones();
    let (mut node, mut last) = ((from - 1) >> shift, (size - 1) >> shift);
    let (mut old, mut new) = (*first, *first);
    for sibling in rest {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            old = hash_node(sibling, &old);
            new = hash_node(sibling, &new);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new = hash_node(&new, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && old == *from_root && new == *root
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The leaves of the reference tree that Certificate Transparency implementations share.
    const REFERENCE: [&str; 8] =
        ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];

    fn reference() -> Vec<Digest> {
        REFERENCE.iter().map(|leaf| hash_leaf(&hex::decode(leaf).unwrap())).collect()
    }

    fn leaves(count: usize) -> Vec<Digest> {
        (0..count).map(|n| hash_leaf(&n.to_be_bytes())).collect()
    }

    /// MTH(D[n]) as section 2.1 defines it, by recursion.
    fn root_by_definition(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => Digest::of(b""),
            [leaf] => *leaf,
            _ => {
                let (left, right) = leaves.split_at(split(leaves.len()));
                hash_node(&root_by_definition(left), &root_by_definition(right))
            }
        }
    }

    #[test]
    fn the_reference_tree_has_the_reference_roots() {
        for (size, expected) in [
            (0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (1, "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"),
            (2, "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"),
            (3, "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77"),
            (4, "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"),
            (5, "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4"),
            (6, "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef"),
            (7, "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"),
            (8, "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"),
        ] {
            assert_eq!(Frontier::of(&reference()[..size]).root().to_string(), expected, "{size} leaves");
        }
    }

    #[test]
    fn the_frontier_has_the_root_that_the_definition_gives_at_every_size() {
        let leaves = leaves(130);
        let mut frontier = Frontier::default();
        for size in 0..leaves.len() {
            assert_eq!(frontier.root(), root_by_definition(&leaves[..size]), "{size}");
            assert_eq!(Frontier::from_parts(frontier.size(), &frontier.parts()), Ok(frontier.clone()), "{size}");
            frontier.append(leaves[size]);
        }
    }

    #[test]
    fn parts_that_cannot_be_a_frontier_are_refused() {
        assert_eq!(
            Frontier::from_parts(3, &[[0; 32]]).unwrap_err().to_string(),
            "a tree of 3 leaves has 2 full subtrees, not 1"
        );
        assert_eq!(
            Frontier::from_parts(0, &[[0; 32]]).unwrap_err().to_string(),
            "a tree of 0 leaves has 0 full subtrees, not 1"
        );
        assert_eq!(
            Frontier::from_parts(1, &[&[0; 31][..]]).unwrap_err().to_string(),
            "a subtree's root must have 32 bytes, not 31"
        );
    }

    #[test]
    fn every_leaf_of_every_small_tree_is_proven_and_no_other_is() {
        let all = leaves(36);
        for size in 1..all.len() {
            let tree = &all[..size];
            let root = Frontier::of(tree).root();
            for index in 0..size {
                let proof = inclusion_proof(tree, index as u64).unwrap();
                for (at, leaf) in tree.iter().enumerate() {
                    let proven = proves_inclusion(&proof, leaf, index as u64, size as u64, &root);
                    assert_eq!(proven, at == index, "leaf {at} shown at {index} of {size}");
                }
                assert!(!proves_inclusion(&proof, &tree[index], index as u64, size as u64, &hash_leaf(b"other")));
            }
            assert_eq!(inclusion_proof(tree, size as u64), None);
            assert!(!proves_inclusion(&[], &tree[0], size as u64, size as u64, &root), "an index beyond the tree");
        }
    }

    #[test]
    fn every_prefix_of_every_small_tree_is_proven_and_no_other_history_is() {
        let (all, other) = (leaves(36), hash_leaf(b"other"));
        for size in 0..all.len() {
            let root = Frontier::of(&all[..size]).root();
            for from in 0..=size {
                let proof = consistency_proof(&all[..size], from as u64).unwrap();
                let from_root = Frontier::of(&all[..from]).root();
                let (from, size) = (from as u64, size as u64);
                assert!(proves_consistency(&proof, from, &from_root, size, &root), "{from} of {size}");
                assert!(!proves_consistency(&proof, from, &other, size, &root), "{from} of {size}, another past");
                if from > 0 {
                    assert!(
                        !proves_consistency(&proof, from, &from_root, size, &other),
                        "{from} of {size}, another now"
                    );
                }
                let longer = [&proof[..], &[other]].concat();
                assert!(!proves_consistency(&longer, from, &from_root, size, &root), "{from} of {size}, longer");
                if let [shorter @ .., _] = &proof[..] {
                    assert!(!proves_consistency(shorter, from, &from_root, size, &root), "{from} of {size}, shorter");
                }
            }
            assert_eq!(consistency_proof(&all[..size], size as u64 + 1), None);
        }
        assert!(!proves_consistency(&[], 2, &other, 1, &other), "a ledger never shrinks");
    }

    proptest! {
        #[test]
        fn an_altered_proof_proves_nothing(size in 2..400usize, at: prop::sample::Index, cut: prop::sample::Index, bit in 0..256usize) {
            let leaves = leaves(size);
            let (index, root) = (at.index(size), Frontier::of(&leaves).root());
            let (mut included, from) = (inclusion_proof(&leaves, index as u64).unwrap(), cut.index(size - 1) + 1);
            let mut consistent = consistency_proof(&leaves, from as u64).unwrap();
            let from_root = Frontier::of(&leaves[..from]).root();
            prop_assert!(proves_inclusion(&included, &leaves[index], index as u64, size as u64, &root));
            prop_assert!(proves_consistency(&consistent, from as u64, &from_root, size as u64, &root));
            for proof in [&mut included, &mut consistent] {
                let at = at.index(proof.len());
                proof[at].0[bit / 8] ^= 1 << (bit % 8);
            }
            prop_assert!(!proves_inclusion(&included, &leaves[index], index as u64, size as u64, &root));
            prop_assert!(!proves_consistency(&consistent, from as u64, &from_root, size as u64, &root));
        }

        #[test]
        fn proofs_from_strangers_end_in_false_and_never_in_a_panic(
            proof in prop::collection::vec(any::<[u8; 32]>(), 0..70), index: u64, size: u64, root: [u8; 32],
        ) {
            let proof: Vec<_> = proof.into_iter().map(Digest).collect();
            let root = Digest(root);
            prop_assert!(!proves_inclusion(&proof, &hash_leaf(b"x"), index, size, &root));
            prop_assert!(!proves_consistency(&proof, index, &hash_leaf(b"x"), size, &root));
        }
    }
}
