//! A witness: a second machine that remembers how far it has seen a ledger and cosigns only what continues that (C2SP tlog-witness).
//!
//! It shares nothing with a control plane but this code: its own directory, its own key, its own process. What it cosigned is fsynced
//! before the cosignature leaves, so that no restart makes it forget; a ledger that shows it another history gets no cosignature.
//!
//! | request | answer |
//! |---|---|
//! | `POST /add-checkpoint` | the cosignature; a refusal as [`Refusal::status`] has it |
//! | `GET /{SHA-256 of the origin, hexadecimal}/checkpoint` | the last checkpoint that was cosigned, with the cosignature |
//!
//! | file below its directory | holds |
//! |---|---|
//! | `witness.json` | for each log the last checkpoint that was cosigned |
//! | `witness.key` | the seed of its key, sealed, mode 0600 |
//! | `kek` | what opens it, mode 0600 |
//! | `witness.lock` | held by the process that runs |

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::{Path as UrlPath, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::Mutex, task::JoinHandle, time::timeout};

use countersign_core::{
    canonical::Digest,
    ledger::{
        AddCheckpoint, Checkpoint, CheckpointError, Frontier, KeyError, Note, REQUEST_BYTES_MAX, Refusal, Signature,
        SignatureKind, VerifierKey, WitnessedLog,
    },
};

use crate::{
    authority::{
        note_key::NoteKey,
        seal::{NotSealed, Sealer, SealingKeyError, Unopened},
    },
    clock::Clock,
};

/// Logs that one witness watches at most.
pub const LOGS_MAX: usize = 1_000;
/// How long a request may take to arrive.
const ARRIVES_WITHIN: Duration = Duration::from_secs(10);
/// Requests that are looked at at the same time; more are told to come again.
const REQUESTS_MAX: usize = 64;

const STATE_FILE: &str = "witness.json";
const KEY_FILE: &str = "witness.key";
const KEK_FILE: &str = "kek";
const LOCK_FILE: &str = "witness.lock";
const KEY_PURPOSE: &str = "witness/key";

/// How a witness is started.
#[derive(Debug, Clone)]
pub struct WitnessConfig {
    /// Where it keeps everything; made with mode 0700 when it is missing.
    pub dir: PathBuf,
    /// Where logs find it; port 0 picks one.
    pub listen: SocketAddr,
    /// The name of its key, when it has none yet.
    pub name: String,
    /// The keys of the logs that it watches. The name of each is the origin of its log.
    pub logs: Vec<VerifierKey>,
}

/// A running witness. It ends when this is dropped.
pub struct Witness {
    /// Where logs find it.
    pub listen: SocketAddr,
    /// What verifies its cosignatures.
    pub key: VerifierKey,
    serving: JoinHandle<()>,
    _lock: File,
}

/// Why a witness does not start.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// A directory or file cannot be used.
    #[error("could not use `{path}`")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("another witness runs on `{0}`")]
    Running(PathBuf),
    /// What opens its key cannot be used.
    #[error(transparent)]
    KeyFile(#[from] SealingKeyError),
    /// Its key does not open.
    #[error(transparent)]
    Sealed(#[from] Unopened),
    /// Its key is not sealed.
    #[error("the witness's key was not sealed")]
    NotSealed(#[from] NotSealed),
    /// Its key, or the name that it shall have, is none.
    #[error("it cannot have this key")]
    Key(#[from] KeyError),
    /// There is a key, and no memory of what it cosigned.
    #[error("`{0}` is missing: a witness that forgot what it cosigned would cosign another history")]
    Forgot(PathBuf),
    /// What it remembers cannot be read.
    #[error("`{path}` does not say what was cosigned: {why}")]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// None, too many, or one that is no log's.
    #[error("a witness watches 1 to {LOGS_MAX} logs, each by a key that logs sign with")]
    Logs,
}

impl WitnessError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Io { path, .. } => format!("check that {} is there for this user, or free", path.display()),
            Self::Running(_) => "stop it first, or use another directory; two of them must not share one memory".into(),
            Self::KeyFile(error) => error.help(),
            Self::Sealed(_) => "put back the `kek` that its key was sealed with".into(),
            Self::NotSealed(_) => "see the log of the security module".into(),
            Self::Key(_) => "choose another `--name`".into(),
            Self::Forgot(_) | Self::State { .. } => {
                "begin anew in another directory, with a new key that verifiers are told of; never put back an older copy".into()
            }
            Self::Logs => "give each log's key as `countersign authority show` prints it".into(),
        }
    }
}

/// What it remembers, as it is written.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Memory {
    /// The name of its key.
    name: String,
    /// By origin: the last note that was cosigned, with the cosignature.
    logs: BTreeMap<String, String>,
}

struct Serving {
    dir: PathBuf,
    key: NoteKey,
    keys_by_origin: BTreeMap<String, Vec<VerifierKey>>,
    clock: Clock,
    /// Held from judging a checkpoint until it is written, so that none is judged against what is no longer held.
    memory: Mutex<Memory>,
    room: tokio::sync::Semaphore,
}

/// Starts a witness and returns when it serves.
pub async fn start(config: WitnessConfig, clock: Clock) -> Result<Witness, WitnessError> {
    let WitnessConfig { dir, listen, name, logs } = config;
    let of_log = |key: &VerifierKey| key.kind() == SignatureKind::Ed25519;
    if !(1..=LOGS_MAX).contains(&logs.len()) || !logs.iter().all(of_log) {
        return Err(WitnessError::Logs);
    }
    let io_at = |path: &Path| {
        let path = path.to_owned();
        move |source| WitnessError::Io { path, source }
    };
    DirBuilder::new().mode(0o700).recursive(true).create(&dir).map_err(io_at(&dir))?;
    let lock = hold(&dir)?;
    let (memory, key) = open(&dir, &name)?;
    let mut keys_by_origin: BTreeMap<String, Vec<VerifierKey>> = BTreeMap::new();
    for log in logs {
        keys_by_origin.entry(log.name().to_owned()).or_default().push(log);
    }
    let listener = TcpListener::bind(listen).await.map_err(io_at(Path::new(&listen.to_string())))?;
    let listen = listener.local_addr().map_err(io_at(Path::new(&listen.to_string())))?;
    let verifier = key.verifier().clone();
    let room = tokio::sync::Semaphore::new(REQUESTS_MAX);
    let serving = Arc::new(Serving { dir, key, keys_by_origin, clock, memory: Mutex::new(memory), room });
    let router = Router::new()
        .route("/add-checkpoint", post(add_checkpoint))
        .route("/{origin}/checkpoint", get(checkpoint))
        .with_state(serving);
    let serving = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the witness ended");
        }
    });
    Ok(Witness { listen, key: verifier, serving, _lock: lock })
}

impl Witness {
    /// Returns when it has ended by itself.
    pub async fn wait_failed(&mut self) {
        // Whatever it ended with has been told.
        let _ = (&mut self.serving).await;
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn add_checkpoint(State(witness): State<Arc<Serving>>, request: Request) -> Response {
    let Ok(_room) = witness.room.try_acquire() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n").into_response();
    };
    let arriving = axum::body::to_bytes(request.into_body(), REQUEST_BYTES_MAX);
    let Ok(Ok(body)) = timeout(ARRIVES_WITHIN, arriving).await else {
        return (StatusCode::BAD_REQUEST, "the request is too long, or came too slowly\n").into_response();
    };
    match witness.add(&body).await {
        Ok(line) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], line).into_response(),
        Err(Unsigned::Refused(refusal)) => {
            let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::BAD_REQUEST);
            let (kind, said) = refusal.body();
            if matches!(refusal, Refusal::Inconsistent(_)) {
                tracing::error!(%refusal, request = %String::from_utf8_lossy(&body), "a log shows two histories");
            }
            (status, [(header::CONTENT_TYPE, kind)], said).into_response()
        }
        Err(Unsigned::Unwritten(error)) => {
            tracing::error!(%error, "what is to be cosigned could not be written down; it was not cosigned");
            (StatusCode::INTERNAL_SERVER_ERROR, "it could not be written down\n").into_response()
        }
    }
}

async fn checkpoint(State(witness): State<Arc<Serving>>, UrlPath(origin): UrlPath<String>) -> Response {
    let memory = witness.memory.lock().await;
    let found = memory.logs.iter().find(|(name, _)| Digest::of(name.as_bytes()).to_string() == origin);
    match found {
        Some((_, note)) => ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], note.clone()).into_response(),
        None => (StatusCode::NOT_FOUND, "nothing of that log was cosigned here\n").into_response(),
    }
}

/// Why nothing was cosigned.
enum Unsigned {
    Refused(Refusal),
    Unwritten(io::Error),
}

impl From<Refusal> for Unsigned {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Serving {
    /// INVARIANT (cosigned-is-remembered): a cosignature leaves only after the checkpoint under it was fsynced, in place of the one that
    /// it was judged against.
    async fn add(self: &Arc<Self>, body: &[u8]) -> Result<String, Unsigned> {
        let request = AddCheckpoint::parse(body)?;
        let origin = request.origin()?;
        // A task of its own: whoever asked may hang up between the file and the memory.
        let witness = self.clone();
        let added = tokio::spawn(async move { witness.add_whole(request, origin).await });
        added.await.map_err(|error| Unsigned::Unwritten(io::Error::other(error)))?
    }

    async fn add_whole(self: Arc<Self>, request: AddCheckpoint, origin: String) -> Result<String, Unsigned> {
        let mut memory = self.memory.lock().await;
        let held = match memory.logs.get(&origin) {
            Some(note) => checkpoint_of(note).map_err(|error| Unsigned::Unwritten(io::Error::other(error)))?,
            None => nothing_of(&origin)?,
        };
        let keys = self.keys_by_origin.get(&origin);
        let log = keys.map(|keys| WitnessedLog { keys: keys.clone(), held });
        let accepted = request.judge(log.as_ref())?;
        let cosignature = self.key.cosign(&accepted, self.clock.now_ms() / 1000);
        // Signatures of strangers are not ours to pass on.
        let mut next = memory.clone();
        let note = signed_by_log(keys.map_or(&[], Vec::as_slice), &request.checkpoint);
        let note = note.with(cosignature.clone()).map_err(|error| Unsigned::Unwritten(io::Error::other(error)))?;
        next.logs.insert(origin.clone(), note.encode());
        let (dir, written) = (self.dir.clone(), next.clone());
        let writing = tokio::task::spawn_blocking(move || write(&dir, &written)).await;
        writing.map_err(io::Error::other).and_then(|written| written).map_err(Unsigned::Unwritten)?;
        *memory = next;
        tracing::info!(log = %origin, size = accepted.checkpoint().size(), "checkpoint cosigned");
        Ok(format!("{cosignature}\n"))
    }
}

/// The note with the signatures of its log alone.
fn signed_by_log(keys: &[VerifierKey], note: &Note) -> Note {
    let of_log = |line: &Signature| keys.iter().any(|key| key.name() == line.name() && key.id() == line.key_id());
    let lines = note.signatures().iter().filter(|line| of_log(line)).cloned().collect();
    Note::new(note.text().to_owned(), lines).expect("INVARIANT: the log signed what was accepted")
}

fn nothing_of(origin: &str) -> Result<Checkpoint, Refusal> {
    let nothing = Checkpoint::new(origin, 0, Frontier::default().root());
    nothing.map_err(|error: CheckpointError| Refusal::Malformed(error.to_string()))
}

fn checkpoint_of(note: &str) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::parse(Note::parse(note.as_bytes())?.text())
}

fn hold(dir: &Path) -> Result<File, WitnessError> {
    let path = dir.join(LOCK_FILE);
    let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = opened.map_err(|source| WitnessError::Io { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(WitnessError::Running(dir.into())),
        Err(TryLockError::Error(source)) => Err(WitnessError::Io { path, source }),
    }
}

/// What it remembers and signs with; both are made at the first start, the memory first.
fn open(dir: &Path, name: &str) -> Result<(Memory, NoteKey), WitnessError> {
    let (state, key_file) = (dir.join(STATE_FILE), dir.join(KEY_FILE));
    let unused = |path: &Path, source| WitnessError::Io { path: path.into(), source };
    let read = |path: &Path| match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unused(path, error)),
    };
    let (remembered, sealed) = (read(&state)?, read(&key_file)?);
    let sealer = Sealer::open(&dir.join(KEK_FILE), sealed.is_none())?;
    let Some(sealed) = sealed else {
        let (key, seed) = NoteKey::generate(name, SignatureKind::Cosignature)?;
        let memory = Memory { name: name.to_owned(), logs: BTreeMap::new() };
        write(dir, &memory).map_err(|error| unused(&state, error))?;
        write_file(&key_file, &sealer.seal(KEY_PURPOSE, &*seed)?).map_err(|error| unused(&key_file, error))?;
        return Ok((memory, key));
    };
    let remembered = remembered.ok_or_else(|| WitnessError::Forgot(state.clone()))?;
    let wrong = |why: String| WitnessError::State { path: state.clone(), why };
    let memory: Memory = serde_json::from_slice(&remembered).map_err(|error| wrong(error.to_string()))?;
    for (origin, note) in &memory.logs {
        let held = checkpoint_of(note).map_err(|error| wrong(error.to_string()))?;
        if **held.origin() != **origin {
            return Err(wrong(format!("`{origin}` has a checkpoint of `{}`", held.origin())));
        }
    }
    let seed = sealer.unseal(KEY_PURPOSE, &sealed)?;
    let key = NoteKey::from_seed(&memory.name, SignatureKind::Cosignature, &seed)?;
    Ok((memory, key))
}

fn write(dir: &Path, memory: &Memory) -> io::Result<()> {
    write_file(&dir.join(STATE_FILE), &serde_json::to_vec_pretty(memory)?)
}

/// Whole or not at all, and durable when it returns.
fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}
