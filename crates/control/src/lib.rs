//! The control plane: one ledger, one authority, and the streams by which agents follow them.
//!
//! | room | does | never |
//! |---|---|---|
//! | [`gate`] | judges change-sets; the only maker of `Admitted` | writes |
//! | [`mfa`] | enrols operators, verifies their codes | decides what a factor is good for |
//! | [`recover`] | appoints an owner past the gate, for whoever has the files and the key | runs beside a control plane |
//! | [`sealing`] | seals everything with another key, once a change chose it | chooses one |
//! | [`proposals`] | change-sets that wait for a factor or for other operators | judges them |
//! | [`impact`] | says which decisions a change-set would have changed | decides one |
//! | [`ledger`] | folds and verifies at start, appends what was admitted | judges |
//! | [`store`] | keeps everything, on a thread of its own | decides |
//! | [`authority`] | signs; seals its keys | decides who may have what |
//! | [`pipelines`] | the HTTPS listener of pipelines, which propose | applies anything |
//! | [`oidc`] | verifies tokens of OpenID Connect providers | decides what they are good for |
//! | [`oauth`] | the token service: OAuth 2 for clients that no agent looks after | takes anybody's word for who they are |
//! | `proof` | verifies proofs of keys, each once | decides what a key is good for |
//! | [`checkpoint`] | the newest checkpoint, and the witnesses that cosign it | waits for a witness to let a change through |
//! | [`identities`] | the SVIDs that were issued, and taking them back | signs one |
//! | [`signals`] | what is said of workloads, hosts and operators | decides by it |
//! | [`onboarding`] | what has to be there before a service is let in | lets it in |
//! | [`telemetry`] | verifies that the telemetry of each sidecar arrives | keeps any |
//! | [`enrol`] | trades a join token for an agent's SVID | keeps a token |
//! | [`registry`] | hosts, instances, what they enforce | reads a clock or a socket |
//! | [`publish`] | tells agents, the same bytes to all | computes anything per agent |
//! | [`agents`] | the mutual TLS listener of agents | trusts what an SVID does not say |
//! | [`acts`] | what an operator may read or hand out, and for how long a factor opens it | reads it |
//! | [`advertise`] | says where other hosts find it | resolves a name |
//! | [`mark`] | notices a store that was restored from an older copy | repairs it |
//! | `replicas` | takes up what other control planes of one store wrote | writes to the ledger |
//! | [`decisions`] | takes decision records in, answers questions | slows an agent |
//! | [`denials`] | notices who is denied in many ways | denies anything |
//! | [`edges`] | who came to which service, in which way | decides about one |
//! | [`hosts`] | puts a host out | decides who may |
//! | [`witness`] | cosigns the checkpoints of other control planes | belongs to one |
//! | [`site`] | pages and JSON for browsers, the local API for commands on other machines | enforces a rule in a browser |
//! | [`local_api`] | JSON over `control.sock` | answers another uid |
//! | [`metrics`] | what Prometheus reads | |
//! | [`clock`] | the one reader of the time | |

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::{Mutex, RwLock};
use tokio::{
    net::TcpListener,
    sync::{Notify, broadcast, watch},
    task::JoinSet,
};

use countersign_api::{
    local::{Applied, Apply, Invitation, Invite, KeyPlace, Problem, TailEvent},
    run_file::CONTROL_SOCKET,
    svid::TlsIdentity,
};
use countersign_core::{
    change::Revision,
    gate::Answer,
    identity::{InstanceId, ServiceName, TrustDomain},
    ledger::Entry,
    signal::statement::{Said, Statement, Subject},
};

pub mod acts;
pub mod advertise;
pub mod agents;
mod audit;
pub mod authority;
pub mod ceremony;
pub mod checkpoint;
pub mod clock;
pub mod decisions;
pub mod denials;
mod edges;
pub mod enrol;
pub mod gate;
mod hosts;
pub mod identities;
pub mod impact;
pub mod ledger;
pub mod local_api;
pub mod mark;
pub mod metrics;
pub mod mfa;
pub mod oauth;
pub mod oidc;
pub mod onboarding;
pub mod pipelines;
mod proof;
pub mod proposals;
pub mod publish;
pub mod recover;
pub mod registry;
mod replicas;
mod rotation;
pub mod sealing;
pub mod signals;
pub mod site;
pub mod store;
pub mod telemetry;
pub mod tokens;
pub mod witness;

pub use audit::{AUDIT_FILE, AuditError};

use advertise::{Advertise, Advertised, Own};
use audit::{Audit, Event};
use authority::{
    Authority, AuthorityError, ReadLifetimes,
    log_key::LogKey,
    seal::{Sealer, SealingKey, SealingKeyError},
};
use checkpoint::{Checkpoints, Witnesses};
use clock::Clock;
use decisions::Decisions;
use gate::{Gate, Petitioner, Refused};
use ledger::{Ledger, OpenError};
use mark::{HighWater, MarkError, RolledBack};
use metrics::{LevelsNow, Metrics};
use oauth::{Oauth, OauthConfig, OauthError, nonce::Nonces, place::Place};
use publish::Publisher;
use registry::Registry;
use signals::Noticed;
use site::{Site, SiteConfig, SiteError, guard::Attempts, live::Listeners, standing::Standing};
use store::{
    Storage, Store, StoreError,
    postgres::{PostgresStore, PostgresUrl},
    sqlite::SqliteStore,
};
use telemetry::Telemetry;

/// The file below the data directory that holds everything but the key-encryption key.
pub const STORE_FILE: &str = "control.db";
/// The file below the data directory that a running control plane holds locked.
pub const LOCK_FILE: &str = "control.lock";
/// Where the key-encryption key lies below the data directory unless told otherwise.
pub const KEY_FILE: &str = "keys/kek";

/// Longest path of the local socket, in bytes: what `sockaddr_un` holds, less `.new`, the name it is first bound under.
const SOCKET_PATH_BYTES_MAX: usize = 107 - ".new".len();
/// Changes that a slow listener may fall behind before it misses some.
const CHANGES_KEPT: usize = 256;
/// Silent instances that a warning names.
const SILENT_NAMED_MAX: usize = 3;
/// Those who are contained that a warning names.
const CONTAINED_NAMED_MAX: usize = 8;
/// Instances whose risk one second raises because their telemetry has become silent: where more do, it is not about them.
const SILENT_NOTICED_MAX: usize = 64;
/// How long open connections have to end when the control plane stops.
const STOP_WITHIN: Duration = Duration::from_secs(1);

/// How a control plane is started.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// Where everything is kept; made with mode 0700 when it is missing.
    pub data_dir: PathBuf,
    /// The database that several control planes share; the file `control.db` in the data directory unless given.
    pub store: Option<PostgresUrl>,
    /// Where agents connect; port 0 picks one.
    pub listen: SocketAddr,
    /// Where other hosts find it, as invitations name it; the listener's address, or this machine's, unless given.
    pub advertise: Option<Advertise>,
    /// Where Prometheus reads `/metrics`; not served unless given.
    pub metrics_listen: Option<SocketAddr>,
    /// Where the key-encryption key comes from; the file `keys/kek` below the data directory unless given.
    pub key: Option<KeyPlace>,
    /// The trust domain of a mesh that is not created yet, so that agents can join before the first change. One that
    /// exists must be this one.
    pub trust_domain: Option<TrustDomain>,
    /// Starts on a ledger that is older than the one that was last written here. Agents that hold the later one have to join
    /// again, and its log signs with a new key.
    pub accept_rollback: bool,
    /// Who is asked to cosign the ledger's checkpoints.
    pub witnesses: Witnesses,
    /// How browsers are served; not at all unless given.
    pub site: Option<SiteConfig>,
    /// Where pipelines propose.
    pub pipelines: pipelines::Settings,
    /// How the token service is served; not at all unless given.
    pub oauth: Option<OauthConfig>,
    /// The file of the audit trail; nothing is written down unless given.
    pub audit: Option<PathBuf>,
}

/// A running control plane.
pub struct Control {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Where Prometheus reads.
    pub metrics: Option<SocketAddr>,
    /// Where pipelines propose: a URL.
    pub pipelines: Option<String>,
    /// What the token service issues as: a URL.
    pub token: Option<String>,
    plane: Arc<Plane>,
    tasks: Mutex<JoinSet<&'static str>>,
    stop: watch::Sender<bool>,
    socket: PathBuf,
    _lock: File,
}

/// A change-set that became a ledger entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The revision it made.
    pub revision: Revision,
    /// Its digest, in hexadecimal.
    pub digest: String,
    /// Who asked for it.
    pub actor: String,
    /// The changes in it.
    pub change_count: usize,
    /// When it was asked for, in milliseconds since 1970.
    pub asked_at_ms: u64,
    /// From then until it was in the ledger.
    pub took: Duration,
}

/// Why a control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory or file cannot be used.
    #[error("could not use `{path}`")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel takes no socket at a path of this length.
    #[error("the path of the socket `{0}` is too long")]
    SocketPath(PathBuf),
    /// Another process has it.
    #[error("another control plane runs on `{0}`")]
    Running(PathBuf),
    /// An address is taken or not ours.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store cannot be used.
    #[error("could not open the store")]
    Store(#[from] StoreError),
    /// The ledger is not what was written.
    #[error(transparent)]
    Ledger(#[from] OpenError),
    /// The key-encryption key cannot be used.
    #[error(transparent)]
    SealingKey(#[from] SealingKeyError),
    /// It is not the one that sealed what the store holds.
    #[error(transparent)]
    OtherSealingKey(#[from] sealing::OtherKey),
    /// The authority's keys cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The store is an older copy.
    #[error("the store in `{data_dir}` is not the one that this control plane last wrote")]
    RolledBack {
        /// The data directory.
        data_dir: PathBuf,
        /// In what.
        #[source]
        source: RolledBack,
    },
    /// Pipelines cannot be served.
    #[error(transparent)]
    Pipelines(#[from] pipelines::SettingsError),
    /// Whether it is cannot be found out.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// Browsers cannot be served.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The token service cannot be.
    #[error(transparent)]
    Oauth(#[from] OauthError),
    /// What is done cannot be written down.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The mesh in the ledger is another one.
    #[error("the ledger in `{data_dir}` is of mesh `{found}`, not of `{wanted}`")]
    OtherMesh {
        /// The data directory.
        data_dir: PathBuf,
        /// As the ledger says.
        found: TrustDomain,
        /// As asked for.
        wanted: TrustDomain,
    },
}

impl StartError {
    /// What to do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Io { path, source } if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                format!("{} is on a read-only file system: mount it for writing, or use another --data-dir", path.display())
            }
            Self::Io { path, .. } => format!("check that {} exists and belongs to this user", path.display()),
            Self::SocketPath(_) => {
                format!("use a --data-dir of at most {} bytes", SOCKET_PATH_BYTES_MAX - CONTROL_SOCKET.len() - 1)
            }
            Self::Running(_) => "stop it first, or use another --data-dir".into(),
            Self::Listen { address, .. } => {
                format!("see what uses port {} with `ss -ltnp`, or choose another", address.port())
            }
            Self::Store(error) => error.help().into(),
            Self::Ledger(OpenError::Store { source, .. }) => source.help().into(),
            Self::Ledger(OpenError::Damaged { .. }) => {
                "nothing was started; restore the data directory from a copy, or move it away and apply again \
                 (agents then have to join again)"
                    .into()
            }
            Self::Ledger(OpenError::Clock { .. }) => {
                "set this machine's clock (`timedatectl`); if it is right, the entry was made with a wrong one".into()
            }
            Self::SealingKey(error) => error.help(),
            Self::OtherSealingKey(error) => error.help(),
            Self::Authority(AuthorityError::Sealed(_)) => {
                "use the key file that the keys were sealed with (`keys/kek` in a copy of the data directory)".into()
            }
            Self::Authority(_) => "restore the data directory from a copy".into(),
            Self::RolledBack { .. } => {
                "restore a later copy; or, if what came after is lost, start once with `--accept-rollback`: agents that hold \
                 the later history refuse this one until they join again"
                    .into()
            }
            Self::Pipelines(error) => error.help().into(),
            Self::Mark(error) => format!("make {} readable, or remove it to start without it", error.path.display()),
            Self::Site(error) => error.help(),
            Self::Oauth(error) => error.help(),
            Self::Audit(error) => error.help(),
            Self::OtherMesh { .. } => {
                "a trust domain is for life: correct `trust_domain` in mesh.toml, or use another --data-dir".into()
            }
        })
    }
}

/// What the rooms share.
pub struct Plane {
    /// The one reader of the time.
    pub clock: Clock,
    /// The door to the store.
    pub storage: Storage,
    /// The ledger.
    pub ledger: Arc<Ledger>,
    /// Judges changes.
    pub gate: Arc<Gate>,
    /// What the access tokens of each service are for.
    pub granted: tokens::Granted,
    /// The thefts of access tokens that were told last.
    pub thefts: tokens::Thefts,
    /// Tells agents.
    pub publisher: Arc<Publisher>,
    /// Decision records.
    pub decisions: Decisions,
    /// Whether the telemetry of sidecars arrives.
    pub telemetry: Telemetry,
    /// Checkpoints of the ledger.
    pub checkpoints: Checkpoints,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// When it started, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// What is done is written down.
    pub(crate) audit: Audit,
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Where browsers are served.
    pub site: Option<Site>,
    /// What strangers tried.
    pub attempts: Attempts,
    /// Pages that listen for news.
    pub listeners: Listeners,
    /// Whose signatures count, entry by entry.
    pub standing: Standing,
    changes: broadcast::Sender<Changed>,
    decided: proposals::Decided,
    data_dir: PathBuf,
    providers: oidc::Providers,
    /// The name of this run among the control planes of one store; empty where there is only this one.
    replica: String,
    /// Where other hosts find it.
    pub advertised: Advertised,
    high_water: Arc<HighWater>,
    sealer: Arc<Sealer>,
    authority: RwLock<Option<Arc<Authority>>>,
    identity: watch::Sender<Option<Arc<TlsIdentity>>>,
    /// Counts what agents are verified by, as it changes.
    trusted: watch::Sender<u64>,
    /// Its own SVID is to be renewed before its time.
    renew_now: Notify,
    warnings: RwLock<std::collections::BTreeMap<&'static str, String>>,
}

/// Starts a control plane and returns when it serves.
pub async fn start(config: ControlConfig) -> Result<Control, StartError> {
    start_with_clock(config, Clock::system()).await
}

/// As [`start`], with the time told by `clock`.
pub async fn start_with_clock(config: ControlConfig, clock: Clock) -> Result<Control, StartError> {
    let ControlConfig {
        data_dir,
        store,
        listen,
        advertise,
        metrics_listen,
        key,
        trust_domain,
        accept_rollback,
        witnesses,
        site,
        pipelines,
        oauth,
        audit,
    } = config;
    let (providers, certificate) = (pipelines.providers()?, pipelines.tls()?);
    let socket = data_dir.join(CONTROL_SOCKET);
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(StartError::SocketPath(socket));
    }
    make_private_dir(&data_dir)?;
    let lock = lock(&data_dir)?;
    let audit = audit.as_deref().map(Audit::open).transpose()?.unwrap_or_default();
    let metrics = Arc::new(Metrics::default());
    let (path, shared) = (data_dir.join(STORE_FILE), store.clone());
    let opened = tokio::task::spawn_blocking(move || -> Result<Box<dyn Store>, StoreError> {
        Ok(match store {
            Some(url) => Box::new(PostgresStore::open(url)?),
            None => Box::new(SqliteStore::open(&path)?),
        })
    });
    let store = opened.await.map_err(|_| StoreError::Closed)??;
    let storage = Storage::start(store, metrics.store.clone()).map_err(|source| in_dir(&data_dir, source))?;

    let now_ms = clock.now_ms();
    let restored = storage.run("restore", |store| Ok((store.hosts()?, store.instances()?, store.entitlements()?)));
    let (hosts, instances, entitlements) = restored.await?;
    // Those of a shared store are of control planes that run, or ran: they are looked at with the clock of the store.
    let instances = if storage.is_shared() { Vec::new() } else { instances };
    let mut registry = Registry::restore(hosts, instances, now_ms);
    entitlements.into_iter().for_each(|(host, services)| registry.entitle(&host, Some(services)));
    let publisher = Arc::new(Publisher::new(registry));
    let sealed = storage.run("authority_keys", |store| Ok(store.has_keys()? || store.head()?.is_some())).await?;
    let place = key.unwrap_or_else(|| KeyPlace::File(data_dir.join(KEY_FILE)));
    let high_water = Arc::new(HighWater::beside(&mark_beside(&data_dir, &place)));
    // A security module may take its time.
    let opened = tokio::task::spawn_blocking(move || SealingKey::open(&place, !sealed)).await;
    let sealer = Arc::new(Sealer::of(opened.map_err(|_| StoreError::Closed)??));
    sealing::check(&storage, &sealer).await??;

    let publish = publisher.clone();
    let ledger = Ledger::open(storage.clone(), clock.clone(), sealer.clone(), move |head, entries| {
        publish.entries(head, entries)
    })
    .await?;
    let ledger = Arc::new(ledger);
    let rolled_back = match high_water.compare(&ledger)? {
        Ok(()) => None,
        Err(why) if accept_rollback => Some(why),
        Err(source) => return Err(StartError::RolledBack { data_dir, source }),
    };
    publisher.begin(ledger.head());
    let created = ledger.head().follower.state().trust_domain.clone();
    if let (Some(found), Some(wanted)) = (&created, &trust_domain)
        && found != wanted
    {
        return Err(StartError::OtherMesh { data_dir, found: found.clone(), wanted: wanted.clone() });
    }

    let listener = TcpListener::bind(listen).await.map_err(|source| StartError::Listen { address: listen, source })?;
    let listen = listener.local_addr().map_err(|source| StartError::Listen { address: listen, source })?;
    let metrics_listener = match metrics_listen {
        None => None,
        Some(address) => {
            Some(TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })?)
        }
    };
    let (mut served, mut bound) = (None, None);
    if let Some(config) = site {
        let certificate = config.tls.clone().map(site::serve::Certificate::read).transpose()?;
        let (site, listener) = Site::bind(&config, &data_dir, ledger.head().follower.state()).await?;
        (served, bound) = (Some(site), Some((listener, certificate)));
    }
    let pipelines_listener = match pipelines.listen {
        None => None,
        Some(address) => {
            Some(TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })?)
        }
    };
    let place = match &oauth {
        None => None,
        Some(config) => Some(Place::bind(config, &data_dir).await?),
    };
    let token = place.as_ref().map(|place| place.issuer.clone());
    let scheme = if certificate.is_some() { "https" } else { "http" };
    let pipelines_address = pipelines_listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let pipelines_url = pipelines_address.map(|address| format!("{scheme}://{address}"));
    let metrics_address = metrics_listener.as_ref().and_then(|listener| listener.local_addr().ok());

    let decisions = Decisions::start(storage.clone(), publisher.clone(), metrics.clone(), clock.clone());
    let plane = Arc::new(Plane {
        clock,
        storage,
        ledger,
        gate: Arc::default(),
        granted: tokens::Granted::default(),
        thefts: tokens::Thefts::default(),
        publisher,
        decisions,
        telemetry: Telemetry::default(),
        checkpoints: Checkpoints::new(witnesses),
        metrics,
        started_at_ms: now_ms,
        audit,
        listen,
        site: served,
        attempts: Attempts::default(),
        listeners: Listeners::default(),
        standing: Standing::default(),
        changes: broadcast::Sender::new(CHANGES_KEPT),
        decided: proposals::Decided::default(),
        data_dir: data_dir.clone(),
        providers,
        replica: if shared.is_some() { replicas::name() } else { String::new() },
        advertised: advertise::advertised(advertise.as_ref(), listen, Own::look),
        high_water,
        sealer,
        authority: RwLock::new(None),
        identity: watch::Sender::new(None),
        trusted: watch::Sender::new(0),
        renew_now: Notify::new(),
        warnings: RwLock::default(),
    });
    if let Some(why) = rolled_back {
        tracing::warn!(%why, "the ledger is older than the one that was written, and accepted as it is");
        // Before the mark that accepts it: the old key has signed, or may have, what this ledger does not continue.
        if let Some(trust_domain) = &created {
            LogKey::create(trust_domain, plane.storage.clone(), plane.sealer.clone()).await?;
        }
    }
    plane.mark().await;
    let restoring = plane.clone();
    plane.storage.run("telemetry", move |store| restoring.telemetry.restore(store, now_ms)).await?;
    identities::catch_up(&plane).await?;
    if let Some(wanted) = created.or(trust_domain) {
        plane.begin_authority(&wanted).await?;
    }

    if shared.is_some() {
        replicas::share(&plane).await?;
    }
    let local = local_api::bind(&socket).map_err(|source| StartError::Io { path: socket.clone(), source })?;
    let (stop, stopping) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut spawn = |part, task| tasks.spawn(until_stopped(part, task, stopping.clone()));
    spawn("the local API", local_api::serve(local, plane.clone()).boxed());
    spawn("the following of instances", identities::follow_instances(plane.clone()).boxed());
    spawn("the heartbeat", beat(plane.clone()).boxed());
    if let Some(url) = shared {
        spawn("the following of the shared store", replicas::follow(plane.clone(), url).boxed());
        spawn("the writing of acknowledgements", replicas::write_acknowledgements(plane.clone()).boxed());
    }
    spawn("the renewal of its own SVID", renew(plane.clone()).boxed());
    spawn("the signing of checkpoints", checkpoint::follow(plane.clone()).boxed());
    if let Some((listener, certificate)) = bound {
        spawn("the pages", site::serve::serve(listener, certificate, site::router(plane.clone())).boxed());
    }
    if let Some(listener) = metrics_listener {
        let of = plane.clone();
        spawn("the metrics listener", metrics::serve(listener, move || of.metrics.page(of.levels())).boxed());
    }
    if let Some(listener) = pipelines_listener {
        spawn("the listener of pipelines", pipelines::serve(plane.clone(), listener, certificate).boxed());
    }
    if let Some(place) = place {
        let nonces = Nonces::open(&plane.storage, plane.sealer.clone()).await?;
        let router = oauth::router(plane.clone(), Arc::new(Oauth::new(place.issuer.clone(), nonces)));
        spawn("the token service", oauth::serve::serve(plane.clone(), place, router).boxed());
    }
    // It ends by itself when told to stop: agents are told that their connection goes.
    tasks.spawn(serve_agents(plane.clone(), listener, stopping));
    plane.tell(Event::Started);
    tracing::info!(%listen, revision = plane.ledger.head().follower.revision().0, "control plane started");
    Ok(Control {
        listen,
        metrics: metrics_address,
        pipelines: pipelines_url,
        token,
        plane,
        tasks: Mutex::new(tasks),
        stop,
        socket,
        _lock: lock,
    })
}

impl Control {
    /// Makes a join token that is good once, for `ttl`, for `host` only when given.
    pub async fn invite(&self, ttl: Duration, host: Option<ServiceName>) -> Result<Invitation, Problem> {
        enrol::invite(&self.plane, Invite { ttl_seconds: ttl.as_secs(), host, services: None }).await
    }

    /// The origin under which browsers find it.
    pub fn dashboard(&self) -> Option<&str> {
        self.plane.site.as_ref().map(|site| site.origin.as_str())
    }

    /// A link by which the first operator enrols in a browser; `None` once there is one, or where browsers are not served.
    pub async fn enrolment_link(&self) -> Result<Option<String>, Problem> {
        mfa::enrolment_link(&self.plane).await.map_err(|error| local_api::store_problem(&error))
    }

    /// Change-sets that become ledger entries from now on. A slow listener misses some.
    pub fn changes(&self) -> broadcast::Receiver<Changed> {
        self.plane.changes.subscribe()
    }

    /// Decisions about requests as they come in, for the process that runs this control plane. A slow listener misses some.
    pub fn decided(&self) -> broadcast::Receiver<TailEvent> {
        self.plane.decisions.tail()
    }

    /// What is counted, as `/metrics` serves it, whenever it is called; `None` once the control plane is gone.
    pub fn counted(&self) -> impl Fn() -> Option<String> + Send + Sync + 'static {
        let plane = Arc::downgrade(&self.plane);
        move || plane.upgrade().map(|plane| plane.metrics.page(plane.levels()))
    }

    /// The origin of the ledger, once there is a mesh.
    pub fn ledger_origin(&self) -> Option<String> {
        self.plane.authority().map(|authority| authority.log().verifier().name().to_owned())
    }

    /// Returns, with what ended, when a part of the control plane has ended by itself: then it is of no use any more.
    pub async fn wait_failed(&self) -> String {
        let ended = std::future::poll_fn(|cx| self.tasks.lock().poll_join_next(cx)).await;
        match ended {
            Some(Ok(part)) => format!("{part} ended"),
            Some(Err(error)) => format!("a part of the control plane ended: {error}"),
            None => "the control plane has stopped".into(),
        }
    }

    /// Stops serving. Agents go on from what they hold.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        self.plane.publisher.end();
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_WITHIN, ended).await.is_err() {
            tasks.shutdown().await;
        }
        let _ = self.plane.write_instances().await;
        // It comes after everything that was told before, and nothing comes after it.
        let _ = self.plane.audit.keep(self.plane.clock.now_ms(), Event::Stopped).await;
        let _ = fs::remove_file(&self.socket);
        tracing::info!("control plane stopped");
    }
}

impl Plane {
    /// Writes an event down.
    pub(crate) fn tell(&self, event: Event) {
        self.audit.tell(self.clock.now_ms(), event);
    }

    /// The authority, once there is a mesh.
    pub fn authority(&self) -> Option<Arc<Authority>> {
        self.authority.read().clone()
    }

    /// What is not as it should be.
    pub fn warnings(&self) -> Vec<String> {
        let unprotected = "the mesh is unprotected: whoever owns the data directory can change everything";
        let is_protected = self.ledger.head().follower.state().is_protected();
        let unprotected = (!is_protected).then(|| unprotected.to_owned());
        let waiting = sealing::waiting(self);
        let recovered = recover::told(self.ledger.head().follower.state(), mfa::seconds(self.clock.now_ms()));
        let silent = self.telemetry.silent();
        let first: Vec<String> = silent.iter().take(SILENT_NAMED_MAX).map(ToString::to_string).collect();
        let silent = (!silent.is_empty())
            .then(|| format!("the telemetry of {} instances is silent: {}", silent.len(), first.join(", ")));
        let (signals, now_ms) = (self.publisher.signals(), self.clock.now_ms());
        let is_contained = |one: &&Statement| one.said == Said::Contained && one.holds(now_ms);
        let contained: Vec<String> =
            signals.statements().filter(is_contained).map(|one| one.subject.to_string()).collect();
        let contained = (!contained.is_empty()).then(|| {
            let first = contained.iter().take(CONTAINED_NAMED_MAX).cloned().collect::<Vec<_>>().join(", ");
            format!("{} contained, whom nobody asks and who ask nobody: {first}", contained.len())
        });
        let unwritten = self.audit.failing().map(|why| format!("the audit trail cannot be written: {why}"));
        unprotected
            .into_iter()
            .chain(contained)
            .chain(unwritten)
            .chain(silent)
            .chain(recovered)
            .chain(waiting)
            .chain(self.warnings.read().values().cloned())
            .collect()
    }

    /// The flow of a change: gate, ledger, and what follows from it.
    pub async fn enter(&self, asked: Apply, petitioner: Petitioner) -> Result<Applied, Problem> {
        self.try_enter(asked, petitioner).await?.map_err(local_api::gate_problem)
    }

    /// As [`Plane::enter`], with what the gate refuses told apart from what failed.
    pub async fn try_enter(&self, asked: Apply, petitioner: Petitioner) -> Result<Result<Applied, Refused>, Problem> {
        let (asked_at_ms, began) = (self.clock.now_ms(), Instant::now());
        // What another control plane wrote may be what it was planned on.
        if asked.change_set.base > self.ledger.head().follower.revision()
            && let Err(error) = self.ledger.catch_up().await
        {
            return Err(local_api::append_problem(error));
        }
        onboarding::examine(self, &asked.change_set).await?;
        let changes = asked.change_set.changes.clone();
        let change_count = changes.len();
        let authority = self.authority();
        let own = authority.as_ref().map(|authority| authority.trust_domain().clone());
        let (gate, head) = (self.gate.clone(), self.ledger.head());
        let (before, now_seconds) = (head.clone(), mfa::seconds(asked_at_ms));
        // Parsing ten thousand policies takes a second: not on a thread that serves others.
        let author = audit::author_of(&petitioner);
        let judged =
            tokio::task::spawn_blocking(move || gate.admit_of(asked, &petitioner, &head, own.as_ref(), now_seconds));
        let admitted = match judged.await.map_err(|_| local_api::append_problem(ledger::AppendError::Stopping))? {
            Ok(admitted) => admitted,
            Err(refused) => {
                if let Refused::Gate { answer: Answer::Deny(denied), digest } = &refused {
                    let why = audit::cut(denied.join(", "));
                    self.tell(Event::ChangeDenied { actor: author, digest: digest.to_string(), why });
                }
                return Ok(Err(refused));
            }
        };
        let actor = admitted.actor().to_owned();
        let appended = match self.ledger.append(admitted).await {
            Ok(head) => head,
            Err(error) => {
                tracing::warn!(%error, "a change was not written");
                self.note("store", matches!(error, ledger::AppendError::Store(_)).then(|| error_chain(&error)));
                return Err(local_api::append_problem(error));
            }
        };
        self.note("store", None);
        self.mark().await;
        self.metrics.applied.inc();
        let (revision, state) = (appended.follower.revision(), appended.follower.state());
        if let (None, Some(trust_domain)) = (authority, &state.trust_domain)
            && let Err(error) = self.begin_authority(trust_domain).await
        {
            // The mesh exists; its keys do not. The next start makes them.
            tracing::error!(error = %error_chain(&error), "the authority could not be made");
            self.note("authority", Some(format!("the authority could not be made: {}", error_chain(&error))));
        }
        let last = appended.follower.snapshot().and_then(|snapshot| Entry::parse(&snapshot.last_entry).ok());
        let digest = last.map(|entry| entry.digest).unwrap_or_default();
        tracing::info!(revision = revision.0, digest = %digest.short(), %actor, "change applied");
        audit::tell_change(self, &changes, before.follower.state(), &actor, revision.0, &digest);
        // Nobody need listen.
        let _ = self.changes.send(Changed {
            revision,
            digest: digest.to_string(),
            actor,
            change_count,
            asked_at_ms,
            took: began.elapsed(),
        });
        let invitations = mfa::settle(self, &changes, before.follower.state()).await;
        Ok(Ok(Applied { revision, digest, protected: state.is_protected(), invitations }))
    }

    /// Tells how long what is signed is good, as the ledger says then.
    fn lifetimes(&self) -> ReadLifetimes {
        let ledger = self.ledger.clone();
        Arc::new(move || ledger.head().follower.state().lifetimes())
    }

    /// Opens the authority, or makes it, and lets agents in.
    async fn begin_authority(&self, wanted: &TrustDomain) -> Result<(), AuthorityError> {
        let stored =
            Authority::open(self.storage.clone(), self.sealer.clone(), self.clock.clone(), self.lifetimes()).await?;
        let authority = match stored {
            Some(stored) if stored.trust_domain() != wanted => {
                let stored = stored.trust_domain().clone();
                return Err(AuthorityError::OtherTrustDomain { stored, wanted: wanted.clone() });
            }
            Some(stored) => stored,
            None => {
                let (storage, sealer, clock) = (self.storage.clone(), self.sealer.clone(), self.clock.clone());
                match Authority::create(wanted.clone(), storage, sealer, clock, self.lifetimes()).await? {
                    Some(made) => made,
                    None => {
                        let (storage, sealer, clock) = (self.storage.clone(), self.sealer.clone(), self.clock.clone());
                        let stored = Authority::open(storage, sealer, clock, self.lifetimes()).await?;
                        let stored =
                            stored.ok_or_else(|| AuthorityError::Damaged("those of another one are gone".into()))?;
                        if stored.trust_domain() != wanted {
                            let stored = stored.trust_domain().clone();
                            return Err(AuthorityError::OtherTrustDomain { stored, wanted: wanted.clone() });
                        }
                        stored
                    }
                }
            }
        };
        let identity = authority.control_identity().await?;
        identity.heed(self.publisher.signals());
        self.metrics.issued("control");
        self.publisher.trust(authority.bundle().to_message());
        *self.authority.write() = Some(Arc::new(authority));
        self.identity.send_replace(Some(identity));
        Ok(())
    }

    /// Tells agents what they verify by now, and shows them an SVID of the root that signs now.
    async fn show_authority(&self, authority: &Authority) -> Result<(), AuthorityError> {
        self.publisher.trust(authority.bundle().to_message());
        let svid = authority.issue_control().await?;
        if let Some(identity) = &*self.identity.borrow() {
            identity.trust(authority.bundle());
            identity.renew(svid);
        }
        self.trusted.send_modify(|count| *count += 1);
        self.metrics.issued("control");
        Ok(())
    }

    /// What the control plane shows to agents, as soon as there is an authority.
    async fn identity(&self) -> Arc<TlsIdentity> {
        let mut shown = self.identity.subscribe();
        loop {
            if let Some(identity) = shown.borrow_and_update().clone() {
                return identity;
            }
            shown.changed().await.expect("INVARIANT: the sender lives in `self`");
        }
    }

    /// Writes down the instances, if they changed. What is written is what is known when the store comes to it, so that of two
    /// writes the later one knows more.
    async fn write_instances(&self) -> Result<(), StoreError> {
        if !self.publisher.is_unsaved() {
            return Ok(());
        }
        let (publisher, replica) = (self.publisher.clone(), self.replica.clone());
        let put = move |store: &mut dyn Store| {
            let Some(instances) = publisher.unsaved_instances() else { return Ok(()) };
            store.put_instances(&replica, &instances).inspect_err(|_| publisher.keep_unsaved())
        };
        self.storage.run("put_instances", put).await
    }

    /// Writes down where the ledger ends. One that cannot be written is said, and the change stands: the store has it.
    async fn mark(&self) {
        let (high_water, ledger) = (self.high_water.clone(), self.ledger.clone());
        let risen = tokio::task::spawn_blocking(move || high_water.rise(&ledger)).await;
        let warning = match risen {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!(
                "{}: a store that is restored from an older copy will not be noticed here",
                error_chain(&error)
            )),
            Err(error) => Some(format!("the ledger's high-water mark could not be written: {error}")),
        };
        self.note("mark", warning);
    }

    fn note(&self, what: &'static str, warning: Option<String>) {
        let mut warnings = self.warnings.write();
        match warning {
            Some(text) => drop(warnings.insert(what, text)),
            None => drop(warnings.remove(what)),
        }
    }

    fn levels(&self) -> LevelsNow {
        let revision = self.ledger.head().follower.revision().0;
        let proxies = self.publisher.proxies();
        let (agents, streams_cut) = self.publisher.stream_counts();
        let slowest = proxies.iter().map(|proxy| proxy.revision.0).min().unwrap_or(revision);
        LevelsNow {
            revision,
            agents: agents as u64,
            streams_cut,
            proxies: proxies.len() as u64,
            behind: revision.saturating_sub(slowest),
            silent: self.telemetry.silent().len() as u64,
        }
    }
}

/// Agents are let in as soon as there is an authority.
async fn serve_agents(plane: Arc<Plane>, listener: TcpListener, mut stop: watch::Receiver<bool>) -> &'static str {
    let identity = tokio::select! {
        identity = plane.identity() => identity,
        _ = stop.wait_for(|stop| *stop) => return "the listener for agents",
    };
    agents::serve(plane, listener, identity, stop).await;
    "the listener for agents"
}

/// Once a second: says that we are there, takes out who is not, writes down who is.
async fn beat(plane: Arc<Plane>) {
    let mut every_second = tokio::time::interval(Duration::from_secs(1));
    every_second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every_second.tick().await;
        let now_ms = plane.clock.now_ms();
        plane.publisher.sweep(now_ms);
        plane.publisher.heartbeat();
        if let Err(error) = plane.write_instances().await {
            tracing::warn!(%error, "instances could not be written down");
        }
        let turned = plane.telemetry.sweep(&plane.publisher.reached(), now_ms);
        let noticed: Vec<_> = turned.iter().take(SILENT_NOTICED_MAX).map(telemetry::Turned::about).collect();
        turned.into_iter().filter_map(telemetry::Turned::tell).for_each(|event| plane.tell(event));
        if !noticed.is_empty() {
            tokio::spawn(notice_silence(plane.clone(), noticed));
        }
        let (keeping, is_shared) = (plane.clone(), plane.storage.is_shared());
        let kept = plane.storage.run("telemetry", move |store| keeping.telemetry.keep(store, is_shared, now_ms)).await;
        if let Err(error) = kept {
            tracing::warn!(%error, "what arrived of telemetry could not be written down");
        }
    }
}

/// Raises the risk of instances whose telemetry is silent, and takes it back of those whose telemetry arrives again.
async fn notice_silence(plane: Arc<Plane>, noticed: Vec<(InstanceId, bool)>) {
    for (instance, is_silent) in noticed {
        let subject = Subject::Instance(instance);
        match is_silent {
            true => signals::notice(&plane, subject, Noticed::Silence).await,
            false => signals::notice_end(&plane, &subject, Noticed::Silence).await,
        }
    }
}

/// Renews the control plane's own SVID at half its life, and the intermediate in time; takes the steps of the roots that are due, and
/// shows what became of them, whoever took them.
async fn renew(plane: Arc<Plane>) {
    let identity = plane.identity().await;
    let Some(authority) = plane.authority() else { return };
    let mut news = authority.news();
    loop {
        let tended = rotation::tend(&plane, &authority).await;
        plane.note("roots", tended.err().map(|error| format!("a root could not be followed: {}", error_chain(&error))));
        plane.note("intermediate", authority.ends_soon());
        let is_urgent = tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(10)) => false,
            () = plane.renew_now.notified() => true,
            changed = news.changed() => changed.is_ok(),
        };
        let svid = identity.svid();
        let (begins, expires) = (svid.not_before(), svid.not_after());
        let half_life = begins + (expires - begins) / 2;
        // Looked at often rather than slept towards: a machine that was asleep renews at once.
        if !is_urgent && mfa::seconds(plane.clock.now_ms()) < half_life {
            continue;
        }
        let renewed = match authority.rotate().await {
            Ok(_) => plane.show_authority(&authority).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &renewed {
            tracing::error!(error = %error_chain(error), "the control plane's own SVID could not be renewed");
        }
        plane.note(
            "svid",
            renewed.err().map(|error| format!("its own SVID could not be renewed: {}", error_chain(&error))),
        );
    }
}

async fn until_stopped(
    part: &'static str,
    task: BoxFuture<'static, ()>,
    mut stop: watch::Receiver<bool>,
) -> &'static str {
    tokio::select! {
        () = task => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
    part
}

/// The file beside which the ledger's high-water mark lies: that of the key, or what it would be.
fn mark_beside(data_dir: &Path, key: &KeyPlace) -> PathBuf {
    match key {
        KeyPlace::File(path) => path.clone(),
        KeyPlace::Credential(_) | KeyPlace::Pkcs11(_) => data_dir.join(KEY_FILE),
    }
}

fn in_dir(dir: &Path, source: io::Error) -> StartError {
    StartError::Io { path: dir.into(), source }
}

fn make_private_dir(dir: &Path) -> Result<(), StartError> {
    match DirBuilder::new().mode(0o700).recursive(true).create(dir) {
        Ok(()) => Ok(()),
        Err(source) => Err(in_dir(dir, source)),
    }
}

/// One control plane for each data directory; the kernel forgets the lock with the process.
pub fn lock(data_dir: &Path) -> Result<File, StartError> {
    let path = data_dir.join(LOCK_FILE);
    let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = opened.map_err(|source| StartError::Io { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::Running(data_dir.into())),
        Err(TryLockError::Error(source)) => Err(StartError::Io { path, source }),
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
