//! `ledger verify --offline` of a large ledger by the real binary: time and memory. Prints one JSON object on its last line.
//!
//! The ledger is that of a mesh with some services, whose traffic rules change ever again. `COUNTERSIGN_BENCH_ENTRIES` says how many
//! entries it has, 1 000 000 unless given; each change-set is a file of its own, so that many take some gigabytes below `TMPDIR`.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use countersign_control::authority::note_key::NoteKey;
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Member},
    identity::{ServiceName, TrustDomain},
    ledger::{
        Checkpoint, Exported, Follower, Note, Resource, SignatureKind, TILE_WIDTH, Tile, TileHashes, encode_bundle,
        hash_leaf, origin_of,
    },
    service::{Protocol, ServiceSpec},
};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;

const SERVICES: u64 = 20;
const ROLES: u64 = 20;

fn main() {
    let given = std::env::var("COUNTERSIGN_BENCH_ENTRIES").ok();
    let entries: u64 = given.map_or(1_000_000, |given| given.parse().expect("a number of entries"));
    let scratch = tempfile::tempdir().expect("a directory below TMPDIR");
    let began = Instant::now();
    let key = write(scratch.path(), entries);
    let written_seconds = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let mut verify = Command::new(env!("CARGO_BIN_EXE_countersign"));
    verify.args(["ledger", "verify", "--log-key", &key, "--offline"]).arg(scratch.path()).stdout(Stdio::null());
    assert!(verify.status().expect("the binary starts").success(), "the ledger does not hold");
    let seconds = began.elapsed().as_secs_f64();
    // The only child there was. The kernel counts in KiB.
    let resident = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the kernel counts").max_rss();
    println!(
        "{}",
        json!({
            "entries": entries,
            "services": SERVICES,
            "verify_seconds": seconds,
            "entries_per_second": entries as f64 / seconds,
            "resident_mb": resident as f64 / 1024.0,
            "export_written_seconds": written_seconds,
        })
    );
}

/// Writes an export and returns the key that verifies it.
fn write(dir: &Path, entries: u64) -> String {
    let trust_domain = TrustDomain::parse("bench.example").unwrap();
    let mut files = Files { dir, made: BTreeSet::new() };
    let (mut follower, mut tree, mut bundle) = (Follower::default(), TileHashes::default(), Vec::new());
    for index in 0..entries {
        let changes = if index == 0 { first(&trust_domain) } else { vec![role(index)] };
        let set = ChangeSet { base: follower.revision(), changes };
        let draft = follower.draft(index, "local", &set, &Bodies::default()).expect("it folds");
        files.write(Exported::Body(draft.entry.digest), &draft.change_set);
        tree.append(hash_leaf(&draft.bytes));
        bundle.push(draft.bytes);
        follower = draft.next;
        if (bundle.len() == usize::from(TILE_WIDTH) || index + 1 == entries)
            && let Some(tile) = Tile::of(0, index / u64::from(TILE_WIDTH), entries)
        {
            files.write(Exported::Log(Resource::Entries(tile)), &encode_bundle(&bundle).expect("entries are short"));
            bundle.clear();
        }
    }
    for tile in Tile::grown(0, entries) {
        files.write(Exported::Log(Resource::Hashes(tile)), &tree.tile(tile).expect("a tile of the tree"));
    }
    let origin = origin_of(&trust_domain);
    let (key, _) = NoteKey::generate(&origin, SignatureKind::Ed25519).expect("a name of a key");
    let text = Checkpoint::new(&origin, entries, follower.root()).expect("a checkpoint").encode();
    let note = Note::new(text.clone(), vec![key.sign(&text)]).expect("a note");
    files.write(Exported::Log(Resource::Checkpoint), note.encode().as_bytes());
    key.verifier().to_string()
}

fn service(n: u64) -> ServiceName {
    ServiceName::parse(&format!("service-{}", n % SERVICES)).unwrap()
}

fn first(trust_domain: &TrustDomain) -> Vec<Change> {
    let create = Change::CreateMesh { trust_domain: trust_domain.clone() };
    let declare = |n| Change::DeclareService { name: service(n), spec: ServiceSpec::new(Protocol::Http) };
    std::iter::once(create).chain((0..SERVICES).map(declare)).collect()
}

fn role(n: u64) -> Change {
    let member = Digest::of(&n.to_be_bytes()).0[0];
    Change::SetRole {
        name: format!("role-{}", n % ROLES).into(),
        members: [Member::Service(service(member.into()))].into(),
    }
}

struct Files<'a> {
    dir: &'a Path,
    made: BTreeSet<PathBuf>, // directories that are there
}

impl Files<'_> {
    fn write(&mut self, what: Exported, bytes: &[u8]) {
        let path = self.dir.join(what.to_string());
        let parent = path.parent().expect("every path of an export has a directory");
        if !self.made.contains(parent) {
            fs::create_dir_all(parent).expect("a directory below TMPDIR");
            self.made.insert(parent.to_owned());
        }
        fs::write(&path, bytes).expect("room below TMPDIR");
    }
}
