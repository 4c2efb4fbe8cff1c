//! C2SP tlog-tiles: the ledger as files that never change, from which anyone computes any proof.
//!
//! Standard: <https://c2sp.org/tlog-tiles>. A tile is 256 neighbouring hashes of one height of the tree; the rightmost ones may
//! be partial. What is read from tiles is a claim: verify it against a checkpoint. No file is read or written here.

use std::{collections::BTreeMap, fmt};

use super::{ENTRY_BYTES_MAX, hash_node};
use crate::canonical::Digest;

/// Hashes of a full tile, and entries of a full bundle.
pub const TILE_WIDTH: u16 = 256;
/// Levels of a tree of up to 2^64 entries.
const LEVELS: u8 = 8;

/// One thing that a log serves, by its path below the log's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// `checkpoint`: the newest one, the only thing that changes.
    Checkpoint,
    /// `tile/<level>/<index>`: hashes.
    Hashes(Tile),
    /// `tile/entries/<index>`: the entries under a tile of level 0.
    Entries(Tile),
}

/// A place in the tree: 256 hashes at most, each the root of 256^level entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    /// 0 for leaf hashes.
    pub level: u8,
    /// Counted within the level, from 0.
    pub index: u64,
    /// How many hashes it holds: 1 to 256. Below 256 it is partial.
    pub width: u16,
}

/// The hashes of all levels of one tree, as tiles hold them. It grows by a leaf at a time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TileHashes {
    levels: Vec<Vec<Digest>>,
}

/// Why a tile or a bundle that was read is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TileError {
    /// Not as many bytes as its width says.
    #[error("tile `{tile}` must have {expected} bytes, this one has {found}")]
    Length {
        /// Where it was read.
        tile: Resource,
        /// 32 for each hash.
        expected: usize,
        /// As it came.
        found: usize,
    },
    /// An entry's length points beyond the bundle.
    #[error("a bundle ends within its entry {0}")]
    Torn(usize),
    /// It holds more or fewer than its path says.
    #[error("a bundle must hold {expected} entries, this one holds {found}")]
    Count {
        /// As its path says.
        expected: usize,
        /// As it holds; when there are too many, one more than expected.
        found: usize,
    },
    /// An entry that a bundle cannot hold.
    #[error("an entry has at most {ENTRY_BYTES_MAX} bytes, this one has {0}")]
    EntryTooLong(usize),
}

/// Why a proof could not be computed from tiles.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError<E> {
    /// There is no such proof: an index or a size beyond the tree.
    #[error("a tree of {size} entries has nothing at {at}")]
    Beyond {
        /// Entries of the tree.
        size: u64,
        /// What was asked for.
        at: u64,
    },
    /// A tile is not one.
    #[error(transparent)]
    Tile(#[from] TileError),
    /// A tile could not be read.
    #[error("tile `{tile}` could not be read")]
    Read {
        /// Which.
        tile: Resource,
        /// Why.
        #[source]
        source: E,
    },
}

impl Tile {
    /// The tile at `level` and `index` of a tree of `size` entries; `None` when it would be empty.
    pub fn of(level: u8, index: u64, size: u64) -> Option<Self> {
        let hashes = hashes_at(level, size);
        let before = index.checked_mul(u64::from(TILE_WIDTH)).filter(|before| *before < hashes)?;
        Some(Self { level, index, width: (hashes - before).min(u64::from(TILE_WIDTH)) as u16 })
    }

    /// Every tile that a tree of `size` entries has and one of `from` entries has not, level by level from the leaves. From 0 it
    /// is all of them.
    pub fn grown(from: u64, size: u64) -> impl Iterator<Item = Self> {
        (0..LEVELS).flat_map(move |level| {
            let (before, after) = (hashes_at(level, from), hashes_at(level, size));
            let width = u64::from(TILE_WIDTH);
            let range = if after > before { before / width..after.div_ceil(width) } else { 0..0 };
            range.filter_map(move |index| Self::of(level, index, size))
        })
    }

    /// Whether it holds fewer than 256 hashes: it will be replaced by a wider one.
    pub fn is_partial(&self) -> bool {
        self.width < TILE_WIDTH
    }
}

impl Resource {
    /// Reads a path, without slash in front. Every resource has exactly one path.
    pub fn parse(path: &str) -> Option<Self> {
        if path == "checkpoint" {
            return Some(Self::Checkpoint);
        }
        let (level, rest) = path.strip_prefix("tile/")?.split_once('/')?;
        let (index, width) = match rest.split_once(".p/") {
            Some((index, width)) => (index, width.parse().ok().filter(|width| (1..TILE_WIDTH).contains(width))?),
            None => (rest, TILE_WIDTH),
        };
        let index = index.split('/').try_fold((0u64, false), |(index, ended), part| {
            let (part, last) = part.strip_prefix('x').map_or((part, true), |part| (part, false));
            let digits = part.len() == 3 && part.bytes().all(|b| b.is_ascii_digit()) && !ended;
            let part: u64 = part.parse().ok().filter(|_| digits)?;
            Some((index.checked_mul(1000)?.checked_add(part)?, last))
        });
        let (index, true) = index? else { return None };
        let resource = match level {
            "entries" => Self::Entries(Tile { level: 0, index, width }),
            level => Self::Hashes(Tile { level: level.parse().ok().filter(|level| *level < 64)?, index, width }),
        };
        // Leading zeros and signs have other ways to write the same.
        (resource.to_string() == path).then_some(resource)
    }

    /// The media type it is served with.
    pub fn content_type(&self) -> &'static str {
        match self {
            Self::Checkpoint => "text/plain; charset=utf-8",
            Self::Hashes(_) | Self::Entries(_) => "application/octet-stream",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tile = match self {
            Self::Checkpoint => return f.write_str("checkpoint"),
            Self::Hashes(tile) => {
                write!(f, "tile/{}/", tile.level)?;
                tile
            }
            Self::Entries(tile) => {
                f.write_str("tile/entries/")?;
                tile
            }
        };
        let mut parts = vec![format!("{:03}", tile.index % 1000)];
        let mut above = tile.index / 1000;
        while above > 0 {
            parts.push(format!("x{:03}", above % 1000));
            above /= 1000;
        }
        parts.reverse();
        f.write_str(&parts.join("/"))?;
        if tile.is_partial() { write!(f, ".p/{}", tile.width) } else { Ok(()) }
    }
}

impl TileHashes {
    /// Those of a whole tree.
    pub fn of(leaves: impl IntoIterator<Item = Digest>) -> Self {
        let mut hashes = Self::default();
        leaves.into_iter().for_each(|leaf| hashes.append(leaf));
        hashes
    }

    /// Adds the hash of a leaf on the right.
    pub fn append(&mut self, leaf: Digest) {
        let mut grown = leaf;
        for level in 0.. {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            let hashes = &mut self.levels[level];
            hashes.push(grown);
            // Only a full tile has a hash in the level above.
            if !hashes.len().is_multiple_of(usize::from(TILE_WIDTH)) {
                return;
            }
            grown = root_of(&hashes[hashes.len() - usize::from(TILE_WIDTH)..]);
        }
    }

    /// The number of leaves.
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len() as u64)
    }

    /// The bytes of a tile; `None` when the tree has none so wide there.
    pub fn tile(&self, tile: Tile) -> Option<Vec<u8>> {
        let hashes = self.levels.get(usize::from(tile.level))?;
        let from = usize::try_from(tile.index).ok()?.checked_mul(usize::from(TILE_WIDTH))?;
        let hashes = hashes.get(from..from.checked_add(usize::from(tile.width))?)?;
        Some(hashes.iter().flat_map(|hash| hash.0).collect())
    }
}

/// The bundle of `entries`: each behind its length, 16 bits big-endian.
pub fn encode_bundle<B: AsRef<[u8]>>(entries: &[B]) -> Result<Vec<u8>, TileError> {
    let mut bundle = Vec::new();
    for entry in entries.iter().map(AsRef::as_ref) {
        let length = u16::try_from(entry.len()).map_err(|_| TileError::EntryTooLong(entry.len()))?;
        bundle.extend(length.to_be_bytes());
        bundle.extend(entry);
    }
    Ok(bundle)
}

/// The entries of a bundle that must hold `width` of them.
pub fn parse_bundle(bundle: &[u8], width: u16) -> Result<Vec<&[u8]>, TileError> {
    let (mut rest, mut entries) = (bundle, Vec::new());
    let expected = usize::from(width);
    while !rest.is_empty() {
        if entries.len() == expected {
            return Err(TileError::Count { expected, found: expected + 1 });
        }
        let torn = TileError::Torn(entries.len());
        let (length, after) = rest.split_first_chunk::<2>().ok_or(torn.clone())?;
        let (entry, after) = after.split_at_checked(usize::from(u16::from_be_bytes(*length))).ok_or(torn)?;
        entries.push(entry);
        rest = after;
    }
    if entries.len() == expected { Ok(entries) } else { Err(TileError::Count { expected, found: entries.len() }) }
}

/// Reads what the tiles of a tree of `size` entries say; each is asked for once, by `read`.
pub struct TileReader<F> {
    size: u64,
    read: F,
    held: BTreeMap<Tile, Vec<Digest>>,
}

impl<E, F: FnMut(Tile) -> Result<Vec<u8>, E>> TileReader<F> {
    /// A reader of the tree of `size` entries; `read` fetches the bytes of one tile.
    pub fn new(size: u64, read: F) -> Self {
        Self { size, read, held: BTreeMap::new() }
    }

    /// The root of the tree, to be compared with the checkpoint's.
    pub fn root(&mut self) -> Result<Digest, ReadError<E>> {
        if self.size == 0 { Ok(Digest::of(b"")) } else { self.range(0, self.size) }
    }

    /// The proof that leaf `index` stands in the tree (RFC 6962, 2.1.1).
    pub fn inclusion(&mut self, index: u64) -> Result<Vec<Digest>, ReadError<E>> {
        let (mut from, mut to, mut proof) = (0, self.size, Vec::new());
        if index >= to {
            return Err(ReadError::Beyond { size: to, at: index });
        }
        while to - from > 1 {
            let middle = from + split(to - from);
            if index < middle {
                proof.push(self.range(middle, to)?);
                to = middle;
            } else {
                proof.push(self.range(from, middle)?);
                from = middle;
            }
        }
        proof.reverse();
        Ok(proof)
    }

    /// The proof that the first `old` entries are a prefix of the tree (RFC 6962, 2.1.2); empty for none and for all.
    pub fn consistency(&mut self, old: u64) -> Result<Vec<Digest>, ReadError<E>> {
        let (mut from, mut to, mut proof, mut known) = (0, self.size, Vec::new(), true);
        if old > to {
            return Err(ReadError::Beyond { size: to, at: old });
        }
        if old == 0 || old == to {
            return Ok(proof);
        }
        // SUBPROOF(m, D[n], b); `known` is b.
        while old != to {
            let middle = from + split(to - from);
            if old <= middle {
                proof.push(self.range(middle, to)?);
                to = middle;
            } else {
                proof.push(self.range(from, middle)?);
                from = middle;
                known = false;
            }
        }
        if !known {
            proof.push(self.range(from, to)?);
        }
        proof.reverse();
        Ok(proof)
    }

    /// The root of the entries from `from` to before `to`: a subtree of the tree, so `from` is a multiple of every full subtree in it.
    fn range(&mut self, from: u64, to: u64) -> Result<Digest, ReadError<E>> {
        let (mut at, mut subtrees) = (from, Vec::new());
        while at < to {
            let height = (to - at).ilog2();
            subtrees.push(self.subtree(height, at >> height)?);
            at += 1 << height;
        }
        let root = subtrees.into_iter().rev().reduce(|right, left| hash_node(&left, &right));
        Ok(root.expect("INVARIANT: no range is empty"))
    }

    /// The root of full subtree `index` of 2^height entries: some neighbouring hashes of one tile.
    fn subtree(&mut self, height: u32, index: u64) -> Result<Digest, ReadError<E>> {
        let (level, within) = ((height / 8) as u8, height % 8);
        let first = index << within; // counted in hashes of the level
        let at = (first % u64::from(TILE_WIDTH)) as usize;
        let place = first / u64::from(TILE_WIDTH);
        let tile = Tile::of(level, place, self.size).expect("INVARIANT: a subtree of the tree lies in a tile of it");
        if !self.held.contains_key(&tile) {
            let bytes = (self.read)(tile).map_err(|source| ReadError::Read { tile: Resource::Hashes(tile), source })?;
            let (expected, found) = (usize::from(tile.width) * 32, bytes.len());
            if found != expected {
                return Err(TileError::Length { tile: Resource::Hashes(tile), expected, found }.into());
            }
            self.held.insert(tile, bytes.as_chunks::<32>().0.iter().copied().map(Digest).collect());
        }
        Ok(root_of(&self.held[&tile][at..at + (1 << within)]))
    }
}

/// The root of a full subtree over `hashes`, of which there are a power of two.
fn root_of(hashes: &[Digest]) -> Digest {
    let mut row = hashes.to_vec();
    while row.len() > 1 {
        row = row.as_chunks::<2>().0.iter().map(|[left, right]| hash_node(left, right)).collect();
    }
    row[0]
}

/// Hashes that a tree of `size` entries has at `level`: `floor(size / 256^level)`.
fn hashes_at(level: u8, size: u64) -> u64 {
    size.checked_shr(8 * u32::from(level)).unwrap_or(0)
}

/// The largest power of two below `count`, which must be at least 2.
fn split(count: u64) -> u64 {
    1 << (count - 1).ilog2()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Frontier, consistency_proof, hash_leaf, inclusion_proof};

    fn leaves(count: u64) -> Vec<Digest> {
        (0..count).map(|n| hash_leaf(&n.to_be_bytes())).collect()
    }

    fn hashes(level: u8, index: u64, width: u16) -> Resource {
        Resource::Hashes(Tile { level, index, width })
    }

    #[test]
    fn every_resource_has_one_path() {
        for (path, resource) in [
            ("checkpoint", Resource::Checkpoint),
            ("tile/0/000", hashes(0, 0, 256)),
            ("tile/0/x001/x234/067", hashes(0, 1_234_067, 256)), // the example of the standard
            ("tile/3/x001/000.p/1", hashes(3, 1000, 1)),
            ("tile/63/999.p/255", hashes(63, 999, 255)),
            (
                "tile/entries/x018/x446/x744/x073/x709/x551/615",
                Resource::Entries(Tile { level: 0, index: u64::MAX, width: 256 }),
            ),
            ("tile/entries/001.p/44", Resource::Entries(Tile { level: 0, index: 1, width: 44 })),
        ] {
            assert_eq!(resource.to_string(), path);
            assert_eq!(Resource::parse(path), Some(resource), "{path}");
        }
        for path in [
            "",
            "/checkpoint",
            "checkpoint/",
            "tile",
            "tile/0",
            "tile/0/",
            "tile/0/0",
            "tile/0/0000",
            "tile/00/000",
            "tile/64/000",
            "tile/-1/000",
            "tile/+1/000",
            "tile/0/x000",
            "tile/0/x000/000",
            "tile/0/000/001",
            "tile/0/001/x000",
            "tile/0/x01/000",
            "tile/0/+01",
            "tile/0/000.p/0",
            "tile/0/000.p/256",
            "tile/0/000.p/01",
            "tile/0/000.p/+1",
            "tile/0/000.p/",
            "tile/0/000.p",
            "tile/0/000.p/1/1",
            "tile/entries/x018/x446/x744/x073/x709/x551/616",
            "tile/data/000",
            "tile/0/../000",
            "tile/0/000.p/1.p/1",
        ] {
            assert_eq!(Resource::parse(path), None, "{path}");
        }
    }

    #[test]
    fn the_tiles_of_the_standards_example_sizes_are_those_it_names() {
        let count = |size| {
            let mut counts = BTreeMap::new();
            for tile in Tile::grown(0, size) {
                *counts.entry((tile.level, tile.width)).or_insert(0) += 1;
            }
            counts.into_iter().map(|((level, width), count)| (level, width, count)).collect::<Vec<_>>()
        };
        // "A tree of size 70,000 will be represented by …"
        assert_eq!(count(70_000), [(0, 112, 1), (0, 256, 273), (1, 17, 1), (1, 256, 1), (2, 1, 1)]);
        assert_eq!(count(256), [(0, 256, 1), (1, 1, 1)]);
        assert_eq!(count(0), []);
        assert_eq!(Tile::of(7, 0, u64::MAX), Some(Tile { level: 7, index: 0, width: 255 }));
        assert_eq!(Tile::of(8, 0, u64::MAX), None);
        let grown: Vec<_> = Tile::grown(300, 520).map(|tile| Resource::Hashes(tile).to_string()).collect();
        assert_eq!(grown, ["tile/0/001", "tile/0/002.p/8", "tile/1/000.p/2"]);
        assert_eq!(Tile::grown(300, 300).count(), 0);
    }

    #[test]
    fn a_tile_holds_the_roots_of_what_lies_below_it() {
        let leaves = leaves(70_000);
        let tree = TileHashes::of(leaves.iter().copied());
        assert_eq!(tree.size(), 70_000);
        for tile in Tile::grown(0, 70_000) {
            let bytes = tree.tile(tile).unwrap();
            assert_eq!(bytes.len(), usize::from(tile.width) * 32);
            let below = 256usize.pow(tile.level.into());
            for at in [0, usize::from(tile.width) - 1] {
                let from = (tile.index as usize * 256 + at) * below;
                let root = Frontier::of(&leaves[from..from + below]).root();
                assert_eq!(bytes[at * 32..][..32], root.0, "{tile:?} {at}");
            }
        }
        assert_eq!(tree.tile(Tile { level: 0, index: 273, width: 113 }), None);
        assert_eq!(tree.tile(Tile { level: 3, index: 0, width: 1 }), None);
        assert_eq!(tree.tile(Tile { level: 0, index: u64::MAX, width: 1 }), None);
    }

    #[test]
    fn proofs_read_from_tiles_are_those_of_the_tree() {
        let all = leaves(1100);
        for size in (0..40).chain([255, 256, 257, 300, 511, 512, 513, 767, 1024, 1100]) {
            let leaves = &all[..size as usize];
            let tree = TileHashes::of(leaves.iter().copied());
            let mut reader = TileReader::new(size, |tile| tree.tile(tile).ok_or(()));
            assert_eq!(reader.root(), Ok(Frontier::of(leaves).root()));
            for at in (0..size).step_by(if size < 40 { 1 } else { 37 }) {
                assert_eq!(reader.inclusion(at).ok(), inclusion_proof(leaves, at), "{at} of {size}");
                assert_eq!(reader.consistency(at).ok(), consistency_proof(leaves, at), "{at} of {size}");
            }
            assert_eq!(reader.consistency(size), Ok(vec![]));
            assert_eq!(reader.inclusion(size), Err(ReadError::Beyond { size, at: size }));
            assert_eq!(reader.consistency(size + 1), Err(ReadError::Beyond { size, at: size + 1 }));
        }
    }

    #[test]
    fn a_proof_deep_in_a_large_tree_asks_for_few_tiles_and_each_once() {
        let size = 70_000;
        let leaves = leaves(size);
        let tree = TileHashes::of(leaves.iter().copied());
        let mut asked = Vec::new();
        let mut reader = TileReader::new(size, |tile| {
            asked.push(Resource::Hashes(tile).to_string());
            tree.tile(tile).ok_or(())
        });
        assert_eq!(reader.inclusion(66_000).ok(), inclusion_proof(&leaves, 66_000));
        assert_eq!(reader.inclusion(66_000).ok(), inclusion_proof(&leaves, 66_000));
        assert_eq!(reader.consistency(65_537).ok(), consistency_proof(&leaves, 65_537));
        asked.sort();
        assert_eq!(asked, ["tile/0/256", "tile/0/257", "tile/0/273.p/112", "tile/1/001.p/17", "tile/2/000.p/1"]);
    }

    #[test]
    fn tiles_and_bundles_that_are_none_are_refused_with_the_reason() {
        let mut short = TileReader::new(3, |_| Ok::<_, ()>(vec![0; 95]));
        assert_eq!(short.root().unwrap_err().to_string(), "tile `tile/0/000.p/3` must have 96 bytes, this one has 95");
        let mut absent = TileReader::new(300, |_| Err(std::fmt::Error));
        assert_eq!(absent.root().unwrap_err().to_string(), "tile `tile/1/000.p/1` could not be read");
        for (bundle, width, expected) in [
            (&b""[..], 1, "a bundle must hold 1 entries, this one holds 0"),
            (b"\0", 1, "a bundle ends within its entry 0"),
            (b"\0\x01", 1, "a bundle ends within its entry 0"),
            (b"\0\x01a\0\x02b", 2, "a bundle ends within its entry 1"),
            (b"\0\x01a\0\x01b", 1, "a bundle must hold 1 entries, this one holds 2"),
            (b"\0\x01a", 2, "a bundle must hold 2 entries, this one holds 1"),
        ] {
            assert_eq!(parse_bundle(bundle, width).unwrap_err().to_string(), expected);
        }
        assert_eq!(encode_bundle(&[vec![0; ENTRY_BYTES_MAX + 1]]), Err(TileError::EntryTooLong(ENTRY_BYTES_MAX + 1)));
        let longest = [vec![0; ENTRY_BYTES_MAX]];
        assert_eq!(parse_bundle(&encode_bundle(&longest).unwrap(), 1), Ok(vec![&longest[0][..]]));
    }

    proptest! {
        #[test]
        fn a_bundle_is_read_back(entries in prop::collection::vec(any::<Vec<u8>>(), 1..9)) {
            let bundle = encode_bundle(&entries).unwrap();
            prop_assert_eq!(parse_bundle(&bundle, entries.len() as u16).unwrap(), entries);
        }

        #[test]
        fn a_path_of_any_text_is_parsed_or_refused(text: String, near in "tile/(entries|[0-9]{1,2})/[x0-9/]{0,12}(\\.p/[0-9]{0,3})?") {
            for text in [text, near] {
                if let Some(resource) = Resource::parse(&text) {
                    prop_assert_eq!(resource.to_string(), text);
                }
            }
        }

        #[test]
        fn tiles_from_strangers_end_in_a_root_or_an_error(size in 1..=u64::MAX, at: u64, hash: [u8; 32]) {
            let mut reader = TileReader::new(size, |tile: Tile| Ok::<_, ()>(hash.repeat(tile.width.into())));
            let (index, old) = (at % size, (at % size).max(1));
            prop_assert!(reader.root().is_ok());
            prop_assert!(reader.inclusion(index).unwrap().len() <= 64);
            prop_assert!(reader.consistency(old).unwrap().len() <= 65);
        }
    }
}
