//! `ledger export`: the whole ledger as files that an outsider recomputes, in the form of C2SP tlog-tiles. The entries are written
//! before the checkpoint that names them.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

use countersign_api::local::{CheckpointView, LedgerLine};
use countersign_core::{
    canonical::Digest,
    gate::act::Act,
    ledger::{
        Checkpoint, Exported, Note, Resource, TILE_WIDTH, Tile, TileHashes, TileReader, encode_bundle, hash_leaf,
    },
};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output},
};

/// What was written.
#[derive(Debug, Serialize)]
struct Written {
    dir: PathBuf,
    origin: String,
    size: u64,
    root: Digest,
    log_key: String,
}

/// Writes the ledger below `dir`, which is empty, or holds an older export of the same ledger.
pub async fn export(place: &Place, dir: &Path, asker: &Asker, output: Output) -> Done {
    let control = asker.opens(Client::control(place), Act::ExportLedger).await?;
    let view: CheckpointView = control.get("/v1/ledger/checkpoint").await?;
    let checkpoint = checkpoint_of(view.note.as_bytes())
        .map_err(|why| Failure::new("the control plane gave a checkpoint that is none").cause(why))?;
    let mut tree = Tree::open(dir, &checkpoint)?;
    let (size, mut hashes, mut bundle) = (checkpoint.size(), TileHashes::default(), Vec::new());
    let mut lines = control.lines("/v1/ledger").await?;
    while hashes.size() < size {
        let line: LedgerLine = lines
            .next()
            .await?
            .ok_or_else(|| Failure::new("the control plane gave fewer entries than it has signed"))?;
        let entry = line.entry.into_bytes();
        hashes.append(hash_leaf(&entry));
        tree.body(line.change_set.as_bytes())?;
        bundle.push(entry);
        let whole = bundle.len() == usize::from(TILE_WIDTH) || hashes.size() == size;
        if whole && let Some(tile) = Tile::of(0, (hashes.size() - 1) / u64::from(TILE_WIDTH), size) {
            let bytes = encode_bundle(&bundle).map_err(|e| Failure::new("an entry is too long").because(&e))?;
            tree.write(Exported::Log(Resource::Entries(tile)), &bytes)?;
            bundle.clear();
        }
    }
    drop(lines);
    let mut bodies = control.lines("/v1/ledger/bodies").await?;
    while let Some(text) = bodies.next::<String>().await? {
        tree.body(text.as_bytes())?;
    }
    for tile in Tile::grown(0, size) {
        tree.write(Exported::Log(Resource::Hashes(tile)), &hashes.tile(tile).unwrap_or_default())?;
    }
    if TileReader::new(size, |tile| hashes.tile(tile).ok_or(io::ErrorKind::NotFound)).root() != Ok(checkpoint.root()) {
        return Err(Failure::new("the entries that the control plane gave are not those that it has signed")
            .help("`countersign ledger verify` says more; keep the data directory as it is"));
    }
    tree.write(Exported::Log(Resource::Checkpoint), view.note.as_bytes())?;
    let (origin, root) = (checkpoint.origin().to_string(), checkpoint.root());
    let written = Written { dir: dir.to_owned(), origin, size, root, log_key: view.log_key };
    render::answer(output, &written, |written, paint| {
        let dir = written.dir.display();
        format!(
            "{} {} entries of {} in `{dir}`\n{}\n  countersign ledger verify --offline {dir} --log-key '{}'\n",
            paint.good("exported:"),
            written.size,
            written.origin,
            paint.dim("whoever knows the log's key, from you and not from this export, checks it with"),
            written.log_key,
        )
    })
}

fn checkpoint_of(note: &[u8]) -> Result<Checkpoint, String> {
    let note = Note::parse(note).map_err(|e| e.to_string())?;
    Checkpoint::parse(note.text()).map_err(|e| e.to_string())
}

/// The directory that is written.
struct Tree {
    dir: PathBuf,
    made: BTreeSet<PathBuf>, // directories that are there
}

impl Tree {
    fn open(dir: &Path, checkpoint: &Checkpoint) -> Result<Self, Failure> {
        let other = |why: String| {
            Failure::new(format!("will not export into `{}`", dir.display()))
                .cause(why)
                .help("name a directory that is empty, or that holds an older export of this ledger")
        };
        match fs::read(dir.join("checkpoint")) {
            Ok(older) => {
                let older = checkpoint_of(&older).map_err(|why| other(format!("its checkpoint is none: {why}")))?;
                if older.origin() != checkpoint.origin() {
                    return Err(other(format!("it holds the ledger of `{}`", older.origin())));
                }
            }
            Err(_) if fs::read_dir(dir).is_ok_and(|mut files| files.next().is_some()) => {
                return Err(other("it is not empty".into()));
            }
            Err(_) => {}
        }
        Ok(Self { dir: dir.to_owned(), made: BTreeSet::new() })
    }

    fn body(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.write(Exported::Body(Digest::of(bytes)), bytes)
    }

    /// Whole or not at all: a reader, or an export that broke off, leaves no half file under its name.
    fn write(&mut self, what: Exported, bytes: &[u8]) -> Result<(), Failure> {
        let path = self.dir.join(what.to_string());
        let written = path.parent().map_or(Ok(()), |parent| self.make(parent)).and_then(|()| {
            let new = self.dir.join(".new");
            let mut file = fs::File::create(&new)?;
            file.write_all(bytes)?;
            if what == Exported::Log(Resource::Checkpoint) {
                file.sync_all()?;
            }
            fs::rename(&new, &path)
        });
        written.map_err(|e| Failure::new(format!("could not write `{}`", path.display())).because(&e))
    }

    fn make(&mut self, dir: &Path) -> io::Result<()> {
        if !self.made.contains(dir) {
            fs::create_dir_all(dir)?;
            self.made.insert(dir.to_owned());
        }
        Ok(())
    }
}
