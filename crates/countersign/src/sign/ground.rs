//! The mesh as this command verified it: every entry of the ledger folded here, by the operators' keys, from the entries that
//! were pinned. Nothing that the control plane says is believed beside it.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use countersign_api::local::{LedgerLine, Mesh};
use countersign_core::{
    canonical::Digest,
    change::Bodies,
    identity::TrustDomain,
    keyring::{Keyring, Pins},
    ledger::{Batch, Follower, Frontier, hash_leaf},
};

use crate::{client::Client, error::Failure};

/// What was verified.
pub struct Ground {
    /// The state, and the texts in force.
    pub mesh: Mesh,
    /// The operators' keys.
    pub keyring: Keyring,
}

/// What this user pinned of each mesh.
pub struct Pinned {
    dir: PathBuf,
}

impl Pinned {
    /// Below this user's configuration.
    pub fn here() -> Result<Self, Failure> {
        let config = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let config = config.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
        config.map(|dir| Self::below(&dir)).ok_or_else(|| {
            Failure::new("there is no place to keep the mesh's anchor").help("set HOME or XDG_CONFIG_HOME")
        })
    }

    /// Below `config`.
    pub fn below(config: &Path) -> Self {
        Self { dir: config.join("countersign/anchors") }
    }

    fn file(&self, mesh: &TrustDomain) -> PathBuf {
        self.dir.join(format!("{mesh}.json"))
    }

    /// What is pinned of `mesh`; nothing when it is seen for the first time.
    pub fn of(&self, mesh: &TrustDomain) -> Result<Pins, Failure> {
        let file = self.file(mesh);
        let unread = || Failure::new(format!("could not read `{}`", file.display()));
        match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| unread().because(&error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Pins::default()),
            Err(error) => Err(unread().because(&error)),
        }
    }

    /// Pins what was seen. Returns whether anything is new.
    pub fn pin(&self, mesh: &TrustDomain, seen: Pins) -> Result<bool, Failure> {
        let held = self.of(mesh)?;
        let new = Pins { anchor: held.anchor.or(seen.anchor), seal: held.seal.or(seen.seal), recovery: held.recovery };
        if new == held {
            return Ok(false);
        }
        let file = self.file(mesh);
        let written = fs::create_dir_all(&self.dir).and_then(|()| {
            let draft = file.with_extension("new");
            fs::write(&draft, serde_json::to_vec(&new)?)?;
            fs::rename(&draft, &file)
        });
        written.map(|()| true).map_err(|error| {
            Failure::new(format!("could not keep the mesh's anchor in `{}`", file.display())).because(&error)
        })
    }
}

impl Ground {
    /// Reads the whole ledger from the control plane and folds it here. `anchor` is what the operator was told of the mesh.
    pub async fn verify(control: &Client, pinned: &Pinned, anchor: Option<Digest>) -> Result<Self, Failure> {
        let (mut entries, mut change_sets) = (Vec::new(), Vec::new());
        let mut lines = control.lines("/v1/ledger").await?;
        while let Some(LedgerLine { entry, change_set, .. }) = lines.next().await? {
            entries.push(entry);
            change_sets.push(change_set);
        }
        let mut bodies = Bodies::default();
        let mut texts = control.lines("/v1/ledger/bodies").await?;
        while let Some(text) = texts.next::<String>().await? {
            bodies.insert(text);
        }
        Self::fold(&entries, &change_sets, &bodies, pinned, anchor)
    }

    fn fold(
        entries: &[String],
        change_sets: &[String],
        bodies: &Bodies,
        pinned: &Pinned,
        anchor: Option<Digest>,
    ) -> Result<Self, Failure> {
        let refused = || {
            Failure::refused("what the control plane says of the mesh does not hold, and nothing was signed")
                .help("tell the other operators; docs/threats.md says what a compromised control plane can do")
        };
        let mut tree = Frontier::default();
        entries.iter().for_each(|entry| tree.append(hash_leaf(entry.as_bytes())));
        let mut follower = Follower::default();
        let (size, root) = (entries.len() as u64, tree.root());
        let batch = Batch { first_index: 0, entries, change_sets, bodies, size, root };
        follower.extend(&batch).map_err(|error| refused().because(&error))?;
        let Some(mesh) = follower.state().trust_domain.clone() else {
            return Err(
                Failure::new("there is no mesh yet").help("apply a mesh directory first: `countersign apply DIR`")
            );
        };
        let known = pinned.of(&mesh)?;
        if let (Some(told), Some(known)) = (anchor, known.anchor)
            && told != known
        {
            let what = format!("`{}` says that the anchor of `{mesh}` is {known}", pinned.file(&mesh).display());
            return Err(Failure::new("the anchor given is another than the one pinned").cause(what));
        }
        let known = Pins { anchor: known.anchor.or(anchor), ..known };
        let mut keyring = Keyring::pinned(known);
        let other = || {
            let file = pinned.file(&mesh).display().to_string();
            refused().or_help(&format!("if the mesh was made anew on purpose, remove `{file}`"))
        };
        for (entry, change_set) in entries.iter().zip(change_sets) {
            keyring.take(entry.as_bytes(), change_set.as_bytes()).map_err(|error| other().because(&error))?;
        }
        if !keyring.meets_pins() {
            return Err(other().cause(
                "the ledger ends before the entry that protected or sealed the mesh: it was cut, or is another",
            ));
        }
        let mesh =
            Mesh { revision: follower.revision(), state: follower.state().clone(), bodies: follower.bodies().clone() };
        Ok(Self { mesh, keyring })
    }
}
