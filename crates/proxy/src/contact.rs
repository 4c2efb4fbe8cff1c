//! Which edges this sidecar knows: who came, in which way. The first exchange of one is marked in its record, reported in full, and
//! inspected where its service asks for that. What is known lies beside the records, so that a sidecar that begins anew takes nobody for
//! a stranger who was there before.
//!
//! A stranger chooses paths: the ways of one caller are bounded, and so are all edges. Beyond the bounds nothing is new: what was
//! told until then says enough of that caller.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    hash::BuildHasher,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use countersign_core::record::DecisionRecord;
use http::{HeaderMap, HeaderValue, header};
use parking_lot::Mutex;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use crate::live::Kind;

/// Edges that one sidecar tells apart.
pub(crate) const EDGES_MAX: usize = 65_536;
/// Ways of one caller that it tells apart.
const WAYS_MAX: u32 = 1_024;
/// Bytes of the file that keeps them.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Its name, in the directory of the records.
const FILE: &str = "edges";

/// Headers of an exchange that is inspected, and their names and values in bytes.
const HEADERS_MAX: usize = 64;
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Its body, in bytes.
const BODY_BYTES_MAX: u64 = 1024 * 1024;

/// An edge, as one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edge {
    caller: u64,
    edge: u64,
}

/// What is known.
#[derive(Default)]
pub(crate) struct Edges(Mutex<Known>);

#[derive(Default)]
struct Known {
    edges: FxHashSet<u64>,
    ways: FxHashMap<u64, u32>, // by caller
}

/// Keeps what is new for the next start. Lost, somebody is taken for a stranger once more.
pub(crate) struct Keeper {
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Edge {
    pub(crate) fn new(caller: &str, way: &str) -> Self {
        Self { caller: FxBuildHasher.hash_one(caller), edge: FxBuildHasher.hash_one((caller, way)) }
    }

    pub(crate) fn number(self) -> u64 {
        self.edge
    }
}

impl Edges {
    /// Whether `edge` was not seen before, by whichever worker, and can be told apart.
    pub(crate) fn is_new(&self, edge: Edge) -> bool {
        let known = self.0.lock();
        !known.edges.contains(&edge.edge) && known.has_room(edge)
    }

    /// Takes note of `edge`; whether it was new.
    pub(crate) fn note(&self, edge: Edge) -> bool {
        let mut known = self.0.lock();
        let is_new = known.has_room(edge) && known.edges.insert(edge.edge);
        if is_new {
            *known.ways.entry(edge.caller).or_default() += 1;
        }
        is_new
    }
}

impl Known {
    fn has_room(&self, edge: Edge) -> bool {
        self.edges.len() < EDGES_MAX && self.ways.get(&edge.caller).is_none_or(|ways| *ways < WAYS_MAX)
    }
}

impl Keeper {
    /// What is kept in `dir`.
    pub(crate) fn open(dir: &Path) -> Self {
        let path = dir.join(FILE);
        let bytes = std::fs::metadata(&path).map_or(0, |about| about.len());
        Self { path, file: None, bytes }
    }

    /// Takes what is kept in `dir` into `edges`. A line that was torn is nobody's.
    pub(crate) fn load(dir: &Path, edges: &Edges) -> io::Result<()> {
        let file = match File::open(dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        for line in BufReader::new(file.take(FILE_BYTES_MAX)).lines() {
            let line = line?;
            if let Some((caller, way)) =
                line.split_once('\t').and_then(|(caller, way)| Some((caller, way.strip_suffix('\t')?)))
            {
                edges.note(Edge::new(caller, way));
            }
        }
        Ok(())
    }

    /// Keeps the edge of a first contact.
    pub(crate) fn keep(&mut self, record: &DecisionRecord) -> io::Result<()> {
        let line = format!("{}\t{}\t\n", record.inputs.principal, record.way());
        if self.bytes + line.len() as u64 > FILE_BYTES_MAX {
            return Ok(());
        }
        if self.file.is_none() {
            if let Some(dir) = self.path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            }
            self.file = Some(OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?);
        }
        let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(line.as_bytes()));
        match &written {
            Ok(()) => self.bytes += line.len() as u64,
            Err(_) => self.file = None,
        }
        written
    }
}

/// Why a first exchange is not plain enough; nothing when it is. `has_body`: more than a head comes.
pub(crate) fn defect(kind: Kind, headers: &HeaderMap, size: Option<u64>, has_body: bool) -> Option<&'static str> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if headers.len() > HEADERS_MAX || bytes > HEADER_BYTES_MAX {
        return Some("headers");
    }
    match kind {
        Kind::Tcp => None, // bytes that the mesh does not read
        Kind::Grpc => (!headers.get(header::CONTENT_TYPE).is_some_and(is_grpc)).then_some("content-type"),
        Kind::Http if !has_body || size == Some(0) => None,
        Kind::Http if !headers.get(header::CONTENT_TYPE).is_some_and(is_media_type) => Some("content-type"),
        Kind::Http => size.is_none_or(|size| size > BODY_BYTES_MAX).then_some("content-length"),
    }
}

fn is_grpc(value: &HeaderValue) -> bool {
    value.as_bytes().starts_with(b"application/grpc")
}

// RFC 9110, section 8.3.1: type "/" subtype, both tokens, then parameters.
fn is_media_type(value: &HeaderValue) -> bool {
    let Ok(value) = value.to_str() else { return false };
    let is_token = |token: &str| {
        !token.is_empty() && token.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    let kind = value.split(';').next().unwrap_or_default().trim();
    kind.split_once('/').is_some_and(|(kind, sub)| is_token(kind) && is_token(sub))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_is_new_once_and_the_ways_of_one_caller_and_all_edges_are_bounded() {
        let edges = Edges::default();
        assert!(edges.is_new(Edge::new("web", "GET /")) && edges.note(Edge::new("web", "GET /")));
        assert!(!edges.is_new(Edge::new("web", "GET /")) && !edges.note(Edge::new("web", "GET /")));
        let new_of =
            |caller: &str, ways: usize| (0..ways).filter(|n| edges.note(Edge::new(caller, &n.to_string()))).count();
        assert_eq!(new_of("web", 5_000), WAYS_MAX as usize - 1);
        assert_eq!(new_of("batch", 10), 10, "another caller is told apart all the same");
        let all: usize = (0..100).map(|n| new_of(&format!("c{n}"), 2_000)).sum();
        assert_eq!(all, EDGES_MAX - WAYS_MAX as usize - 10);
    }

    #[test]
    fn a_first_exchange_is_small_and_plain() {
        let headers = |given: &[(&'static str, String)]| -> HeaderMap {
            given.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
        };
        let kind = |value: &str| headers(&[("content-type", value.to_owned())]);
        let many: HeaderMap =
            (0..65).map(|n| (format!("x-{n}").parse().unwrap(), HeaderValue::from_static("1"))).collect();
        let long = headers(&[("x-long", "x".repeat(HEADER_BYTES_MAX))]);
        for (kind, headers, size, has_body, expected) in [
            (Kind::Http, HeaderMap::new(), None, false, None),
            (Kind::Http, HeaderMap::new(), Some(0), true, None),
            (Kind::Http, kind("application/json; charset=utf-8"), Some(7), true, None),
            (Kind::Http, many.clone(), None, false, Some("headers")),
            (Kind::Http, long, None, false, Some("headers")),
            (Kind::Http, HeaderMap::new(), Some(7), true, Some("content-type")),
            (Kind::Http, kind("json"), Some(7), true, Some("content-type")),
            (Kind::Http, kind("application/json"), Some(BODY_BYTES_MAX + 1), true, Some("content-length")),
            (Kind::Http, kind("application/json"), None, true, Some("content-length")),
            (Kind::Grpc, kind("application/grpc+proto"), None, true, None),
            (Kind::Grpc, kind("application/json"), None, true, Some("content-type")),
            (Kind::Tcp, HeaderMap::new(), None, true, None),
            (Kind::Tcp, many, None, true, Some("headers")),
        ] {
            assert_eq!(defect(kind, &headers, size, has_body), expected, "{kind:?} {size:?} {has_body}");
        }
    }
}
