//! The store that several control planes share: one PostgreSQL database. Each replica has one connection for its jobs, which is made
//! again with back-off when it breaks. Writers take turns by advisory locks that end with their transaction, so that what one
//! statement found still holds at the next.
//!
//! | the connection breaks | the job |
//! |---|---|
//! | before anything was asked, or while it only reads | is done once more on a new connection |
//! | before COMMIT was sent | is done once more: the database rolled it back |
//! | after COMMIT was sent | is never done again; an entry is looked for, and what became of it is said |
//!
//! No rule is decided here. What is waited for has an end: a database that is silent is away.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    fs,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_postgres::{
    Client, Config, NoTls, Row,
    config::{Host, SslMode},
    error::SqlState,
    types::{FromSql, ToSql},
};
use tokio_postgres_rustls::MakeRustlsConnect;

use countersign_api::local::{Caller, IdentityFilter, RecordFilter, RevokedBy, TokenFilter};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::{FactorId, InstanceId, NameError, OperatorName, ServiceName, SpiffeId},
    record::{DecisionRecord, EdgeCount},
    signal::{Revocation, SignalSeq, TokensMeant, statement::Statement},
};

use super::{
    CERTIFICATE_SUFFIX, DAY_MS, Document, EDGES_MAX, INVITATIONS_MAX, IssuedSerial, NOTE_PREFIX, NewEntry,
    NewInvitation, PROPOSALS_MAX, PROPOSALS_OPEN_BYTES_MAX, PROPOSALS_OPEN_MAX, RECORDS_MAX, RECORDS_READ_MAX,
    Resealed, SealedAt, Spent, Store, StoreError, StoredAcknowledgement, StoredCodes, StoredEntry, StoredHead,
    StoredHost, StoredInstance, StoredProposal, StoredSignal, StoredToken, signal_of_text, statement_to_text,
    tokens_to_text,
};

/// Each step brings the schema from its index to the next version. Steps are never edited, only added. Tables and columns are those
/// of the embedded store; a test holds them in step.
const SCHEMA: &[&str] = &[
    "
    CREATE TABLE entries (
        idx    BIGINT PRIMARY KEY CHECK (idx >= 0),
        entry  BYTEA NOT NULL,
        leaf   BYTEA NOT NULL CHECK (length(leaf) = 32),
        digest BYTEA NOT NULL CHECK (length(digest) = 32)
    );
    CREATE TABLE head (
        one  BIGINT PRIMARY KEY CHECK (one = 1),
        size BIGINT NOT NULL,
        root BYTEA NOT NULL CHECK (length(root) = 32),
        seal BYTEA NOT NULL
    );
    -- Change-sets and texts, by the SHA-256 of their bytes.
    CREATE TABLE bodies (
        digest BYTEA PRIMARY KEY CHECK (length(digest) = 32),
        bytes  BYTEA NOT NULL
    );
    -- Certificates, and private keys sealed by the key-encryption key.
    CREATE TABLE keys (
        name  TEXT PRIMARY KEY,
        bytes BYTEA NOT NULL
    );
    CREATE TABLE invitations (
        hash          BYTEA PRIMARY KEY CHECK (length(hash) = 32),
        expires_at_ms BIGINT NOT NULL,
        host          TEXT,
        used_at_ms    BIGINT,
        services      TEXT
    );
    CREATE TABLE hosts (
        host           TEXT PRIMARY KEY,
        joined_at_ms   BIGINT NOT NULL,
        heard_at_ms    BIGINT NOT NULL,
        version        TEXT NOT NULL,
        isolation      TEXT NOT NULL,
        isolation_note TEXT NOT NULL
    );
    CREATE TABLE instances (
        instance  TEXT PRIMARY KEY,
        host      TEXT NOT NULL,
        address   TEXT NOT NULL,
        ready     BOOLEAN NOT NULL,
        admin     TEXT NOT NULL,
        isolation TEXT NOT NULL,
        replica   TEXT NOT NULL,
        revision  BIGINT NOT NULL,
        error     TEXT
    );
    CREATE TABLE replicas (
        replica    TEXT PRIMARY KEY,
        seen_at_ms BIGINT NOT NULL
    );
    CREATE TABLE serials (
        serial        TEXT PRIMARY KEY,
        id            TEXT NOT NULL,
        instance      TEXT,
        issued_at_ms  BIGINT NOT NULL,
        expires_at_ms BIGINT NOT NULL
    );
    CREATE INDEX serials_expiry ON serials (expires_at_ms);
    CREATE TABLE records (
        seq    BIGSERIAL PRIMARY KEY,
        id     TEXT NOT NULL UNIQUE,
        at_ms  BIGINT NOT NULL,
        record BYTEA NOT NULL
    );
    CREATE INDEX records_time ON records (at_ms);
    CREATE TABLE edges (
        principal  TEXT NOT NULL,
        service    TEXT NOT NULL,
        action     TEXT NOT NULL,
        permits    BIGINT NOT NULL,
        revision   BIGINT NOT NULL,
        seen_at_ms BIGINT NOT NULL,
        PRIMARY KEY (principal, service, action)
    );
    CREATE INDEX edges_seen ON edges (seen_at_ms);
    CREATE INDEX edges_service ON edges (service, permits);
    CREATE TABLE entitlements (
        host     TEXT PRIMARY KEY,
        services TEXT NOT NULL
    );
    CREATE TABLE codes (
        factor    TEXT PRIMARY KEY,
        operator  TEXT NOT NULL,
        sealed    BYTEA NOT NULL,
        last_step BIGINT NOT NULL
    );
    CREATE TABLE recovery (
        factor TEXT NOT NULL,
        hash   BYTEA NOT NULL CHECK (length(hash) = 32),
        PRIMARY KEY (factor, hash)
    );
    CREATE TABLE guesses (
        operator TEXT NOT NULL,
        at_ms    BIGINT NOT NULL
    );
    CREATE INDEX guesses_operator ON guesses (operator, at_ms);
    CREATE TABLE operator_invitations (
        operator      TEXT PRIMARY KEY,
        hash          BYTEA NOT NULL CHECK (length(hash) = 32),
        expires_at_ms BIGINT NOT NULL
    );
    CREATE TABLE proposals (
        seq           BIGSERIAL PRIMARY KEY,
        id            TEXT NOT NULL UNIQUE,
        version       BIGINT NOT NULL,
        expires_at_ms BIGINT NOT NULL,
        is_open       BOOLEAN NOT NULL,
        document      BYTEA NOT NULL
    );
    CREATE TABLE documents (
        kind          TEXT NOT NULL,
        key           TEXT NOT NULL,
        bytes         BYTEA NOT NULL,
        expires_at_ms BIGINT NOT NULL,
        PRIMARY KEY (kind, key)
    );
    CREATE INDEX documents_expiry ON documents (kind, expires_at_ms);
",
    "
    -- The SHA-256 of what an instance's command names, hexadecimal.
    ALTER TABLE instances ADD COLUMN artifact TEXT;
",
    "
    -- Where a certificate was issued to, and the SHA-256 of its key, hexadecimal.
    ALTER TABLE serials ADD COLUMN host TEXT;
    ALTER TABLE serials ADD COLUMN key TEXT;
    -- The signals that an instance's proxy enforces.
    ALTER TABLE instances ADD COLUMN signals BIGINT NOT NULL DEFAULT 0;
    -- Certificates that were revoked, in the order in which it is told.
    CREATE TABLE signals (
        seq           BIGINT PRIMARY KEY,
        serial        TEXT NOT NULL UNIQUE,
        expires_at_ms BIGINT NOT NULL,
        at_ms         BIGINT NOT NULL,
        actor         TEXT NOT NULL,
        reason        TEXT NOT NULL
    );
",
    "
    -- Which root of the trust domain a certificate rests on; of those from before there were several: the first.
    ALTER TABLE serials ADD COLUMN authority BIGINT NOT NULL DEFAULT 1;
",
    "
    -- A serial number, or `tokens:` and which.
    ALTER TABLE signals RENAME COLUMN serial TO what;
    -- Access tokens that were issued: what they say, and nothing that could be shown for one.
    CREATE TABLE tokens (
        id            TEXT PRIMARY KEY,
        subject       TEXT NOT NULL,
        audience      TEXT NOT NULL,
        instance      TEXT NOT NULL,
        host          TEXT NOT NULL,
        expires_at_ms BIGINT NOT NULL,
        claims        BYTEA NOT NULL
    );
    CREATE INDEX tokens_expiry ON tokens (expires_at_ms);
    CREATE INDEX tokens_instance ON tokens (instance, audience);
",
    "
    -- What is said, JSON, where `what` is `stated:` and of which kind, of whom and by whom.
    ALTER TABLE signals ADD COLUMN statement TEXT;
",
];

/// How long a connection may take to be made.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// How long the database may take for one statement, or to be told of it.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// What the database itself ends: a statement that takes longer, a wait for another's lock, a transaction whose owner is gone. Shorter
/// than [`ANSWER_WITHIN`], so that whoever waits for the lock of a lost transaction gets it.
const LIMITS: &str =
    "SET statement_timeout = '8s'; SET lock_timeout = '8s'; SET idle_in_transaction_session_timeout = '5s';
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
/// The channel of notices that proxies acknowledged; what they carry is the control plane that wrote it down.
const ACKNOWLEDGED: &str = "countersign_acknowledged";
/// The clock that all replicas share.
const NOW_MS: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::BIGINT";
/// How soon a database that is away is tried again, and how late at most.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(2);

/// Advisory locks of ours are the pairs of this number and one of [`Turn`].
const LOCKS: i32 = 0x0c57;

/// Who takes turns with whom.
#[derive(Debug, Clone, Copy)]
pub(super) enum Turn {
    Schema = 1,
    Ledger,
    Keys,
    Invitations,
    Operators,
    Proposals,
    Documents,
    Hosts,
    Records,
    Signals,
}

/// Where a database is, and how it is reached: `postgres://USER@HOST/DATABASE`.
#[derive(Clone)]
pub struct PostgresUrl {
    config: Config,
    tls: Option<MakeRustlsConnect>,
    shown: String,
}

/// Why text names no database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this names no PostgreSQL database: {0}")]
pub struct PostgresUrlError(String);

/// One PostgreSQL database.
pub struct PostgresStore {
    runtime: Runtime,
    url: PostgresUrl,
    client: Option<Client>,
    again_after: Duration,
    again_at: Option<Instant>,
}

/// What became of a job that failed.
pub(super) enum Broken {
    /// The database refused it, or holds what it must not. Nothing of it is kept.
    Refused(StoreError),
    /// The connection went before COMMIT was sent: nothing of it is kept.
    Before(String),
    /// The connection went after COMMIT was sent: nobody knows.
    Uncertain(String),
}

impl PostgresUrl {
    /// Parses a connection string, as a URL or as `key=value` pairs. With `sslrootcert=FILE` the connection is TLS, and the server
    /// must show a certificate for its name from that root. Without, only a socket, this machine, or `sslmode=disable` will do.
    pub fn parse(given: &str) -> Result<Self, PostgresUrlError> {
        let wrong = |why: String| PostgresUrlError(why);
        let (given, root) = take_parameter(given, "sslrootcert");
        let config: Config = given.parse().map_err(|error: tokio_postgres::Error| wrong(chain(&error)))?;
        let disabled = take_parameter(&given, "sslmode").1.is_some_and(|mode| mode == "disable");
        let is_here = |host: &Host| match host {
            Host::Unix(_) => true,
            Host::Tcp(name) => name == "localhost" || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback()),
        };
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(wrong("it names no host".into()));
        }
        let mut config = config;
        let tls = match root {
            Some(path) => {
                config.ssl_mode(SslMode::Require);
                Some(tls_of(&path).map_err(wrong)?)
            }
            None if disabled || config.get_hosts().iter().all(is_here) && config.get_hostaddrs().is_empty() => {
                config.ssl_mode(SslMode::Disable);
                None
            }
            None => {
                return Err(wrong("another machine is reached by TLS: add `sslrootcert=FILE` with its root".into()));
            }
        };
        config.connect_timeout(CONNECT_WITHIN);
        config.keepalives_idle(Duration::from_secs(5));
        config.tcp_user_timeout(ANSWER_WITHIN);
        if config.get_application_name().is_none() {
            config.application_name("countersign");
        }
        let host = config.get_hosts().first().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        });
        let port = config.get_ports().first().copied().unwrap_or(5432);
        let shown = format!(
            "postgres://{}:{port}/{}",
            host.unwrap_or_default(),
            config.get_dbname().or(config.get_user()).unwrap_or_default()
        );
        Ok(Self { config, tls, shown })
    }

    /// Connects, and runs the connection until it ends. What the database says by itself goes to `wakes`.
    pub(super) async fn connect(&self, wakes: Option<Wakes>) -> Result<Client, tokio_postgres::Error> {
        match &self.tls {
            None => {
                let (client, connection) = self.config.connect(NoTls).await?;
                tokio::spawn(drive(connection, wakes));
                Ok(client)
            }
            Some(tls) => {
                let (client, connection) = self.config.connect(tls.clone()).await?;
                tokio::spawn(drive(connection, wakes));
                Ok(client)
            }
        }
    }
}

impl std::fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

/// A password may stand in it.
impl std::fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PostgresUrl").field(&self.shown).finish()
    }
}

async fn drive<S, T>(mut connection: tokio_postgres::Connection<S, T>, wakes: Option<Wakes>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
        if let (tokio_postgres::AsyncMessage::Notification(notice), Some(wakes)) = (message, &wakes) {
            wakes.hear(notice.channel(), notice.payload());
        }
    }
}

/// Whom the notices of the database wake. Each sender has room for one wake-up: one that waits already is enough.
#[derive(Clone)]
pub struct Wakes {
    /// The control plane that is woken: it knows what it wrote itself of its proxies.
    pub replica: String,
    /// Something was written.
    pub written: mpsc::Sender<()>,
    /// Proxies that follow another control plane acknowledged a revision.
    pub acknowledged: mpsc::Sender<()>,
}

impl Wakes {
    fn hear(&self, channel: &str, by: &str) {
        let _ = match channel {
            ACKNOWLEDGED if by == self.replica => return,
            ACKNOWLEDGED => self.acknowledged.try_send(()),
            _ => self.written.try_send(()),
        };
    }
}

/// Wakes whoever holds the receivers when another replica wrote, for as long as they are held. A wake-up is a hint: what the
/// tables hold counts, and a lost one is made up for by looking every now and then.
pub async fn listen(url: PostgresUrl, wakes: Wakes) {
    let woken = wakes.written.clone();
    let mut again_after = AGAIN_AFTER;
    while !woken.is_closed() {
        if let Ok(client) = url.connect(Some(wakes.clone())).await
            && client.batch_execute(&format!("LISTEN countersign; LISTEN {ACKNOWLEDGED}")).await.is_ok()
        {
            again_after = AGAIN_AFTER;
            // What was said before we listened was not heard.
            let _ = woken.try_send(());
            let alive = async {
                // A connection that a partition cut says nothing: asked now and then, it must answer.
                while tokio::time::timeout(ANSWER_WITHIN, client.batch_execute("")).await.is_ok_and(|said| said.is_ok())
                {
                    tokio::time::sleep(ANSWER_WITHIN).await;
                }
            };
            tokio::select! {
                () = alive => {}
                () = woken.closed() => return,
            }
        }
        tokio::time::sleep(again_after).await;
        again_after = (again_after * 2).min(AGAIN_AFTER_MAX);
    }
}

/// One transaction, or a reader outside of one.
pub(super) struct Session<'a> {
    runtime: &'a Runtime,
    client: &'a Client,
    place: &'a str,
}

pub(super) type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Session<'_> {
    fn wait<T>(&self, asked: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Broken> {
        match self.runtime.block_on(async { tokio::time::timeout(ANSWER_WITHIN, asked).await }) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(sort(&error, self.place)),
            Err(_) => Err(Broken::Before(format!("it did not answer within {} s", ANSWER_WITHIN.as_secs()))),
        }
    }

    fn batch(&self, sql: &str) -> Result<(), Broken> {
        self.wait(self.client.batch_execute(sql))
    }

    pub(super) fn execute(&self, sql: &str, parameters: Parameters<'_>) -> Result<u64, Broken> {
        self.wait(self.client.execute(sql, parameters))
    }

    pub(super) fn rows(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, Broken> {
        self.wait(self.client.query(sql, parameters))
    }

    pub(super) fn first(&self, sql: &str, parameters: Parameters<'_>) -> Result<Option<Row>, Broken> {
        Ok(self.rows(sql, parameters)?.into_iter().next())
    }

    fn one<T: for<'b> FromSql<'b>>(&self, sql: &str, parameters: Parameters<'_>) -> Result<T, Broken> {
        let row = self.first(sql, parameters)?;
        let row = row.ok_or_else(|| Broken::Refused(StoreError::Failed("a count has no row".into())))?;
        get(&row, 0)
    }

    fn take_turn(&self, turn: Turn) -> Result<(), Broken> {
        self.execute("SELECT pg_advisory_xact_lock($1, $2)", &[&LOCKS, &(turn as i32)]).map(drop)
    }

    fn notify(&self) -> Result<(), Broken> {
        self.batch("NOTIFY countersign")
    }
}

impl PostgresStore {
    /// Connects, makes the schema when there is none, and brings it up to date. Must not be called by a task: it waits.
    pub fn open(url: PostgresUrl) -> Result<Self, StoreError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| StoreError::Failed(error.to_string()))?;
        let mut store = Self { runtime, url, client: None, again_after: AGAIN_AFTER, again_at: None };
        store.migrate()?;
        Ok(store)
    }

    /// Name and column of all its tables.
    #[cfg(test)]
    pub(super) fn columns(&mut self) -> Vec<(String, String)> {
        let sql = "SELECT table_name::TEXT, column_name::TEXT FROM information_schema.columns
                   WHERE table_schema = current_schema() AND table_name <> 'countersign_schema'";
        let read = self.read(|s| {
            s.rows(sql, &[])?.iter().map(|row| Ok((get(row, 0)?, get(row, 1)?))).collect::<Result<Vec<_>, Broken>>()
        });
        read.unwrap()
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let place = self.place();
        self.write(Turn::Schema, |s| {
            // Two replicas that start at the same time take turns: the second finds what the first made.
            s.batch("CREATE TABLE IF NOT EXISTS countersign_schema (one BIGINT PRIMARY KEY CHECK (one = 1), version BIGINT NOT NULL)")?;
            let row = s.first("SELECT version FROM countersign_schema", &[])?;
            let found = row.map(|row| get::<i64>(&row, 0)).transpose()?.map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
            let known = SCHEMA.len() as u32;
            if found > known {
                return Err(Broken::Refused(StoreError::Newer { path: place.clone(), found, known }));
            }
            for step in &SCHEMA[found as usize..] {
                s.batch(step)?;
            }
            let sql = "INSERT INTO countersign_schema VALUES (1, $1) ON CONFLICT (one) DO UPDATE SET version = $1";
            s.execute(sql, &[&i64::from(known)]).map(drop)
        })
    }

    /// The connection, made again when it broke. While the database is away, it is not tried at every job.
    fn connect(&mut self) -> Result<(), StoreError> {
        if self.client.as_ref().is_some_and(|client| !client.is_closed()) {
            return Ok(());
        }
        self.client = None;
        if self.again_at.is_some_and(|at| Instant::now() < at) {
            return Err(self.away("it was away a moment ago"));
        }
        let url = &self.url;
        let connected = self.runtime.block_on(async {
            let client = tokio::time::timeout(CONNECT_WITHIN, url.connect(None))
                .await
                .map_err(|_| format!("it did not answer within {} s", CONNECT_WITHIN.as_secs()))?;
            let client = client.map_err(|error| chain(&error))?;
            client.batch_execute(LIMITS).await.map_err(|error| chain(&error))?;
            Ok::<_, String>(client)
        });
        match connected {
            Ok(client) => {
                (self.again_after, self.again_at) = (AGAIN_AFTER, None);
                self.client = Some(client);
                Ok(())
            }
            Err(why) => {
                self.again_at = Some(Instant::now() + self.again_after);
                self.again_after = (self.again_after * 2).min(AGAIN_AFTER_MAX);
                Err(self.away(&why))
            }
        }
    }

    fn away(&self, why: &str) -> StoreError {
        StoreError::Away { place: self.url.shown.clone(), why: why.to_owned() }
    }

    /// Reads; once more on a new connection when the old one broke.
    fn read<T>(&mut self, act: impl Fn(&Session<'_>) -> Result<T, Broken>) -> Result<T, StoreError> {
        self.twice(|store| {
            store.connect().map_err(Broken::Refused)?;
            let client = store.client.as_ref().expect("INVARIANT: `connect` leaves one");
            act(&Session { runtime: &store.runtime, client, place: &store.url.shown })
        })
    }

    /// Writes, whole or not at all, while nobody else of the same turn does.
    pub(super) fn write<T>(
        &mut self,
        turn: Turn,
        act: impl Fn(&Session<'_>) -> Result<T, Broken>,
    ) -> Result<T, StoreError> {
        self.twice(|store| store.try_write(turn, &act))
    }

    fn try_write<T>(&mut self, turn: Turn, act: impl Fn(&Session<'_>) -> Result<T, Broken>) -> Result<T, Broken> {
        self.connect().map_err(Broken::Refused)?;
        let client = self.client.as_ref().expect("INVARIANT: `connect` leaves one");
        let session = Session { runtime: &self.runtime, client, place: &self.url.shown };
        session.batch("BEGIN")?;
        let acted = session.take_turn(turn).and_then(|()| act(&session));
        let value = match acted {
            Ok(value) => value,
            Err(error) => {
                // A connection that broke rolls back by itself; a silent one is not waited for again.
                if matches!(error, Broken::Before(_)) || session.batch("ROLLBACK").is_err() {
                    self.client = None;
                }
                return Err(error);
            }
        };
        match session.batch("COMMIT") {
            Ok(()) => Ok(value),
            Err(Broken::Before(why) | Broken::Uncertain(why)) => Err(Broken::Uncertain(why)),
            Err(refused) => Err(refused),
        }
    }

    fn twice<T>(&mut self, mut act: impl FnMut(&mut Self) -> Result<T, Broken>) -> Result<T, StoreError> {
        let mut again = true;
        loop {
            let why = match act(self) {
                Ok(value) => return Ok(value),
                Err(Broken::Refused(error)) => return Err(error),
                Err(Broken::Uncertain(why)) => {
                    self.client = None;
                    return Err(self.away(&format!("{why}; whether it kept what was written is not known")));
                }
                Err(Broken::Before(why)) => {
                    self.client = None;
                    why
                }
            };
            if !std::mem::take(&mut again) {
                return Err(self.away(&why));
            }
        }
    }
}

impl Store for PostgresStore {
    fn place(&self) -> String {
        self.url.shown.clone()
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn head(&mut self) -> Result<Option<StoredHead>, StoreError> {
        self.read(|s| {
            s.first("SELECT size, root, seal FROM head", &[])?
                .map(|row| Ok(StoredHead { size: unsigned(&row, 0)?, root: digest(&row, 1)?, seal: get(&row, 2)? }))
                .transpose()
        })
    }

    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        let sql = "SELECT e.idx, e.entry, e.leaf, b.bytes FROM entries e LEFT JOIN bodies b ON b.digest = e.digest
                   WHERE e.idx >= $1 ORDER BY e.idx LIMIT $2";
        self.read(|s| {
            s.rows(sql, &[&signed(from), &i64::from(limit)])?
                .iter()
                .map(|row| {
                    Ok(StoredEntry {
                        index: unsigned(row, 0)?,
                        entry: get(row, 1)?,
                        leaf: digest(row, 2)?,
                        change_set: get::<Option<Vec<u8>>>(row, 3)?.unwrap_or_default(),
                    })
                })
                .collect()
        })
    }

    fn append(&mut self, new: &NewEntry) -> Result<(), StoreError> {
        let appended = self.try_write(Turn::Ledger, |s| append(s, new)).or_else(|error| match error {
            Broken::Before(_) => {
                self.client = None;
                self.try_write(Turn::Ledger, |s| append(s, new))
            }
            other => Err(other),
        });
        let why = match appended {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(StoreError::Taken(new.index)),
            Err(Broken::Refused(error)) => return Err(error),
            Err(Broken::Before(why)) => {
                self.client = None;
                return Err(self.away(&why));
            }
            Err(Broken::Uncertain(why)) => why,
        };
        // INVARIANT (commit-found-out): whoever comes after the lost transaction by its lock sees it whole or never again.
        self.client = None;
        std::thread::sleep(AGAIN_AFTER);
        let kept = self.write(Turn::Ledger, |s| {
            let row = s.first("SELECT leaf FROM entries WHERE idx = $1", &[&signed(new.index)])?;
            row.map(|row| digest(&row, 0)).transpose()
        });
        match kept {
            Ok(Some(leaf)) if leaf == new.leaf => Ok(()),
            Ok(Some(_)) => Err(StoreError::Taken(new.index)),
            Ok(None) => Err(self.away(&format!("{why}; nothing was kept"))),
            Err(error) => Err(error),
        }
    }

    fn bodies(&mut self, digests: &[Digest]) -> Result<Vec<(Digest, Arc<str>)>, StoreError> {
        let wanted: Vec<&[u8]> = digests.iter().map(|digest| &digest.0[..]).collect();
        let place = self.place();
        let rows = self.read(|s| {
            let rows = s.rows("SELECT digest, bytes FROM bodies WHERE digest = ANY($1)", &[&wanted])?;
            rows.iter().map(|row| Ok((digest(row, 0)?, get::<Vec<u8>>(row, 1)?))).collect::<Result<Vec<_>, Broken>>()
        })?;
        let text = |(digest, bytes): (Digest, Vec<u8>)| match String::from_utf8(bytes) {
            Ok(text) => Ok((digest, text.into())),
            Err(_) => Err(StoreError::Damaged { path: place.clone(), what: format!("text {digest} is no UTF-8") }),
        };
        rows.into_iter().map(text).collect()
    }

    fn has_keys(&mut self) -> Result<bool, StoreError> {
        self.read(|s| Ok(s.first("SELECT 1 FROM keys LIMIT 1", &[])?.is_some()))
    }

    fn key(&mut self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|s| s.first("SELECT bytes FROM keys WHERE name = $1", &[&name])?.map(|row| get(&row, 0)).transpose())
    }

    fn keys(&mut self, names: &[&str]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.read(|s| {
            // One statement sees one moment.
            let rows = s.rows("SELECT name, bytes FROM keys WHERE name = ANY($1)", &[&names])?;
            let found = rows.iter().map(|row| Ok((get(row, 0)?, get(row, 1)?)));
            let mut found = found.collect::<Result<BTreeMap<String, Vec<u8>>, Broken>>()?;
            Ok(names.iter().map(|name| found.remove(*name)).collect())
        })
    }

    fn put_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<(), StoreError> {
        self.write(Turn::Keys, |s| put_keys(s, keys))
    }

    fn create_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        let names: Vec<&str> = keys.iter().map(|(name, _)| *name).collect();
        self.write(Turn::Keys, |s| {
            if s.first("SELECT 1 FROM keys WHERE name = ANY($1) LIMIT 1", &[&names])?.is_some() {
                return Ok(false);
            }
            put_keys(s, keys).map(|()| true)
        })
    }

    fn swap_key(&mut self, name: &str, seen: &[u8], keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write(Turn::Keys, |s| {
            if s.first("SELECT 1 FROM keys WHERE name = $1 AND bytes = $2", &[&name, &seen])?.is_none() {
                return Ok(false);
            }
            put_keys(s, keys).map(|()| true)
        })
    }

    fn sealed(&mut self) -> Result<Vec<(SealedAt, Vec<u8>)>, StoreError> {
        self.read(sealed_of)
    }

    fn reseal(&mut self, resealed: &[Resealed], notes: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        let seen = resealed.iter().map(|one| (one.at.clone(), one.seen.clone())).collect::<BTreeMap<_, _>>();
        self.write(Turn::Keys, |s| {
            s.take_turn(Turn::Ledger)?;
            s.take_turn(Turn::Operators)?;
            if sealed_of(s)?.into_iter().collect::<BTreeMap<_, _>>() != seen {
                return Ok(false);
            }
            for Resealed { at, next, .. } in resealed {
                match at {
                    SealedAt::Key(name) => s.execute("UPDATE keys SET bytes = $2 WHERE name = $1", &[name, next])?,
                    SealedAt::Codes(factor) => {
                        s.execute("UPDATE codes SET sealed = $2 WHERE factor = $1", &[&factor.as_str(), next])?
                    }
                    SealedAt::Head => s.execute("UPDATE head SET seal = $1", &[next])?,
                };
            }
            put_keys(s, notes).map(|()| true)
        })
    }

    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError> {
        let services = invitation.services.as_ref().map(super::names_to_text).transpose()?;
        self.write(Turn::Invitations, |s| {
            s.execute("DELETE FROM invitations WHERE expires_at_ms < $1", &[&signed(now_ms.saturating_sub(DAY_MS))])?;
            let sql = "SELECT count(*) FROM invitations WHERE used_at_ms IS NULL AND expires_at_ms >= $1";
            if s.one::<i64>(sql, &[&signed(now_ms)])? >= i64::from(INVITATIONS_MAX) {
                return Ok(false);
            }
            let host = invitation.host.as_ref().map(ServiceName::as_str);
            let sql = "INSERT INTO invitations (hash, expires_at_ms, host, services) VALUES ($1, $2, $3, $4)";
            s.execute(sql, &[&&hash.0[..], &signed(invitation.expires_at_ms), &host, &services])?;
            Ok(true)
        })
    }

    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError> {
        self.write(Turn::Invitations, |s| {
            let hash = &hash.0[..];
            let sql = "SELECT expires_at_ms, host, used_at_ms, services FROM invitations WHERE hash = $1";
            let Some(row) = s.first(sql, &[&hash])? else { return Ok(Spent::Unknown) };
            if get::<Option<i64>>(&row, 2)?.is_some() {
                return Ok(Spent::Used);
            }
            if now_ms > unsigned(&row, 0)? {
                return Ok(Spent::Expired);
            }
            if get::<Option<String>>(&row, 1)?.is_some_and(|only| only != host.as_str()) {
                return Ok(Spent::OtherHost);
            }
            let text: Option<String> = get(&row, 3)?;
            let services = text.as_deref().map(names_of_text).transpose()?;
            s.execute("UPDATE invitations SET used_at_ms = $2 WHERE hash = $1", &[&hash, &signed(now_ms)])?;
            s.execute("DELETE FROM entitlements WHERE host = $1", &[&host.as_str()])?;
            if let Some(text) = &text {
                s.execute("INSERT INTO entitlements VALUES ($1, $2)", &[&host.as_str(), text])?;
            }
            Ok(Spent::Admitted(services))
        })
    }

    fn put_codes(&mut self, codes: &StoredCodes) -> Result<(), StoreError> {
        self.write(Turn::Operators, |s| {
            let (factor, operator) = (codes.factor.as_str(), codes.operator.as_str());
            let sql = "INSERT INTO codes VALUES ($1, $2, $3, $4)";
            s.execute(sql, &[&factor, &operator, &codes.sealed, &signed(codes.last_step)]).map(drop)
        })
    }

    fn codes(&mut self, operator: &OperatorName) -> Result<Vec<StoredCodes>, StoreError> {
        let sql = "SELECT factor, operator, sealed, last_step FROM codes WHERE operator = $1 ORDER BY factor";
        self.read(|s| {
            s.rows(sql, &[&operator.as_str()])?
                .iter()
                .map(|row| {
                    Ok(StoredCodes {
                        factor: name(row, 0, FactorId::parse)?,
                        operator: name(row, 1, OperatorName::parse)?,
                        sealed: get(row, 2)?,
                        last_step: unsigned(row, 3)?,
                    })
                })
                .collect()
        })
    }

    fn use_step(&mut self, factor: &FactorId, step: u64) -> Result<bool, StoreError> {
        self.write(Turn::Operators, |s| {
            let sql = "UPDATE codes SET last_step = $2 WHERE factor = $1 AND last_step < $2";
            Ok(s.execute(sql, &[&factor.as_str(), &signed(step)])? == 1)
        })
    }

    fn put_recovery(&mut self, factor: &FactorId, hashes: &[Digest]) -> Result<(), StoreError> {
        self.write(Turn::Operators, |s| {
            for hash in hashes {
                s.execute("INSERT INTO recovery VALUES ($1, $2)", &[&factor.as_str(), &&hash.0[..]])?;
            }
            Ok(())
        })
    }

    fn spend_recovery(&mut self, factor: &FactorId, hash: &Digest) -> Result<bool, StoreError> {
        self.write(Turn::Operators, |s| {
            let sql = "DELETE FROM recovery WHERE factor = $1 AND hash = $2";
            Ok(s.execute(sql, &[&factor.as_str(), &&hash.0[..]])? == 1)
        })
    }

    fn forget_factors(&mut self, factors: &[FactorId]) -> Result<(), StoreError> {
        let factors: Vec<&str> = factors.iter().map(FactorId::as_str).collect();
        self.write(Turn::Operators, |s| {
            s.execute("DELETE FROM codes WHERE factor = ANY($1)", &[&factors])?;
            s.execute("DELETE FROM recovery WHERE factor = ANY($1)", &[&factors]).map(drop)
        })
    }

    fn count_guess(
        &mut self,
        operator: &OperatorName,
        now_ms: u64,
        since_ms: u64,
        guesses_max: u32,
    ) -> Result<Option<u64>, StoreError> {
        self.write(Turn::Operators, |s| {
            s.execute("DELETE FROM guesses WHERE at_ms < $1", &[&signed(since_ms)])?;
            let sql = "SELECT count(*), min(at_ms) FROM guesses WHERE operator = $1";
            let row = s.first(sql, &[&operator.as_str()])?;
            let (count, oldest) = match &row {
                Some(row) => (get::<i64>(row, 0)?, get::<Option<i64>>(row, 1)?),
                None => (0, None),
            };
            if count >= i64::from(guesses_max) {
                return Ok(oldest.map(|at_ms| u64::try_from(at_ms).unwrap_or(0)));
            }
            s.execute("INSERT INTO guesses VALUES ($1, $2)", &[&operator.as_str(), &signed(now_ms)])?;
            Ok(None)
        })
    }

    fn forget_guesses(&mut self, operator: &OperatorName) -> Result<(), StoreError> {
        self.write(Turn::Operators, |s| {
            s.execute("DELETE FROM guesses WHERE operator = $1", &[&operator.as_str()]).map(drop)
        })
    }

    fn put_operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        expires_at_ms: u64,
    ) -> Result<(), StoreError> {
        let sql = "INSERT INTO operator_invitations VALUES ($1, $2, $3)
                   ON CONFLICT (operator) DO UPDATE SET hash = $2, expires_at_ms = $3";
        self.write(Turn::Operators, |s| {
            s.execute(sql, &[&operator.as_str(), &&hash.0[..], &signed(expires_at_ms)]).map(drop)
        })
    }

    fn operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        now_ms: u64,
        spend: bool,
    ) -> Result<bool, StoreError> {
        let sql = "SELECT 1 FROM operator_invitations WHERE operator = $1 AND hash = $2 AND expires_at_ms >= $3";
        self.write(Turn::Operators, |s| {
            let found = s.first(sql, &[&operator.as_str(), &&hash.0[..], &signed(now_ms)])?.is_some();
            if found && spend {
                s.execute("DELETE FROM operator_invitations WHERE operator = $1", &[&operator.as_str()])?;
            }
            Ok(found)
        })
    }

    fn put_proposal(&mut self, proposal: &StoredProposal, now_ms: u64) -> Result<bool, StoreError> {
        self.write(Turn::Proposals, |s| {
            let now = signed(now_ms);
            let sql = "SELECT count(*), coalesce(sum(length(document)), 0)::BIGINT FROM proposals
                       WHERE is_open AND expires_at_ms >= $1";
            if let Some(row) = s.first(sql, &[&now])? {
                let (open, bytes) = (unsigned(&row, 0)?, unsigned(&row, 1)?);
                let bytes = bytes + proposal.document.len() as u64;
                if open >= u64::from(PROPOSALS_OPEN_MAX) || bytes > PROPOSALS_OPEN_BYTES_MAX {
                    return Ok(false);
                }
            }
            let all: i64 = s.one("SELECT coalesce(sum(length(document)), 0)::BIGINT FROM proposals", &[])?;
            if all > signed(2 * PROPOSALS_OPEN_BYTES_MAX) {
                s.execute("DELETE FROM proposals WHERE NOT (is_open AND expires_at_ms >= $1)", &[&now])?;
            }
            let sql =
                "INSERT INTO proposals (id, version, expires_at_ms, is_open, document) VALUES ($1, $2, $3, $4, $5)";
            s.execute(
                sql,
                &[
                    &proposal.id,
                    &signed(proposal.version),
                    &signed(proposal.expires_at_ms),
                    &proposal.is_open,
                    &proposal.document,
                ],
            )?;
            let sql = "DELETE FROM proposals WHERE seq IN (SELECT seq FROM proposals
                       WHERE NOT (is_open AND expires_at_ms >= $1)
                       ORDER BY seq LIMIT greatest(0, (SELECT count(*) FROM proposals) - $2))";
            s.execute(sql, &[&now, &i64::from(PROPOSALS_MAX)])?;
            s.notify()?;
            Ok(true)
        })
    }

    fn replace_proposal(&mut self, proposal: &StoredProposal) -> Result<bool, StoreError> {
        let sql = "UPDATE proposals SET version = $2::BIGINT, expires_at_ms = $3, is_open = $4, document = $5
                   WHERE id = $1 AND version = $2::BIGINT - 1";
        self.write(Turn::Proposals, |s| {
            let replaced = s.execute(
                sql,
                &[
                    &proposal.id,
                    &signed(proposal.version),
                    &signed(proposal.expires_at_ms),
                    &proposal.is_open,
                    &proposal.document,
                ],
            )?;
            s.notify()?;
            Ok(replaced == 1)
        })
    }

    fn proposal(&mut self, id: &str) -> Result<Option<StoredProposal>, StoreError> {
        let sql = "SELECT id, version, expires_at_ms, is_open, document FROM proposals WHERE id = $1";
        self.read(|s| s.first(sql, &[&id])?.map(|row| stored_proposal(&row)).transpose())
    }

    fn proposals(&mut self) -> Result<Vec<StoredProposal>, StoreError> {
        let sql = "SELECT id, version, expires_at_ms, is_open, document FROM proposals ORDER BY seq DESC";
        self.read(|s| s.rows(sql, &[])?.iter().map(stored_proposal).collect())
    }

    fn put_document(&mut self, document: &Document, now_ms: u64, max: u32) -> Result<bool, StoreError> {
        self.write(Turn::Documents, |s| {
            let kind = document.kind;
            s.execute("DELETE FROM documents WHERE kind = $1 AND expires_at_ms < $2", &[&kind, &signed(now_ms)])?;
            if s.one::<i64>("SELECT count(*) FROM documents WHERE kind = $1", &[&kind])? >= i64::from(max) {
                return Ok(false);
            }
            let sql = "INSERT INTO documents VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
            Ok(s.execute(sql, &[&kind, &document.key, &document.bytes, &signed(document.expires_at_ms)])? == 1)
        })
    }

    fn swap_document(&mut self, kind: &str, key: &str, seen: &[u8], new: &Document) -> Result<bool, StoreError> {
        let sql = "UPDATE documents SET bytes = $4, expires_at_ms = $5 WHERE kind = $1 AND key = $2 AND bytes = $3";
        self.write(Turn::Documents, |s| {
            Ok(s.execute(sql, &[&kind, &key, &seen, &new.bytes, &signed(new.expires_at_ms)])? == 1)
        })
    }

    fn document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let sql = "SELECT bytes FROM documents WHERE kind = $1 AND key = $2 AND expires_at_ms >= $3";
        self.read(|s| s.first(sql, &[&kind, &key, &signed(now_ms)])?.map(|row| get(&row, 0)).transpose())
    }

    fn take_document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let sql = "DELETE FROM documents WHERE kind = $1 AND key = $2 RETURNING bytes, expires_at_ms";
        self.write(Turn::Documents, |s| {
            let Some(row) = s.first(sql, &[&kind, &key])? else { return Ok(None) };
            Ok(if unsigned(&row, 1)? >= now_ms { Some(get(&row, 0)?) } else { None })
        })
    }

    fn documents(&mut self, kind: &str, now_ms: u64) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let sql = "SELECT key, bytes FROM documents WHERE kind = $1 AND expires_at_ms >= $2 ORDER BY key COLLATE \"C\"";
        self.read(|s| {
            let rows = s.rows(sql, &[&kind, &signed(now_ms)])?;
            rows.iter().map(|row| Ok((get(row, 0)?, get(row, 1)?))).collect()
        })
    }

    fn forget_documents(&mut self, kind: &str, keys: &[String]) -> Result<(), StoreError> {
        let sql = "DELETE FROM documents WHERE kind = $1 AND key = ANY($2)";
        self.write(Turn::Documents, |s| s.execute(sql, &[&kind, &keys]).map(drop))
    }

    fn entitlements(&mut self) -> Result<Vec<(ServiceName, BTreeSet<ServiceName>)>, StoreError> {
        let sql = "SELECT host, services FROM entitlements ORDER BY host COLLATE \"C\"";
        self.read(|s| {
            let of = |row| Ok((name(row, 0, ServiceName::parse)?, names_of_text(&get::<String>(row, 1)?)?));
            s.rows(sql, &[])?.iter().map(of).collect()
        })
    }

    fn hosts(&mut self) -> Result<Vec<StoredHost>, StoreError> {
        let sql = "SELECT host, joined_at_ms, heard_at_ms, version, isolation, isolation_note FROM hosts
                   ORDER BY host COLLATE \"C\"";
        self.read(|s| {
            s.rows(sql, &[])?
                .iter()
                .map(|row| {
                    Ok(StoredHost {
                        host: name(row, 0, ServiceName::parse)?,
                        joined_at_ms: unsigned(row, 1)?,
                        heard_at_ms: unsigned(row, 2)?,
                        version: get(row, 3)?,
                        isolation: get(row, 4)?,
                        isolation_note: get(row, 5)?,
                    })
                })
                .collect()
        })
    }

    fn put_host(&mut self, host: &StoredHost) -> Result<(), StoreError> {
        let sql = "INSERT INTO hosts VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (host) DO UPDATE SET
                   heard_at_ms = $3, version = $4, isolation = $5, isolation_note = $6";
        self.write(Turn::Hosts, |s| {
            let (joined, heard) = (signed(host.joined_at_ms), signed(host.heard_at_ms));
            s.execute(
                sql,
                &[&host.host.as_str(), &joined, &heard, &host.version, &host.isolation, &host.isolation_note],
            )
            .map(drop)
        })
    }

    fn instances(&mut self) -> Result<Vec<StoredInstance>, StoreError> {
        let sql = "SELECT instance, host, address, ready, admin, isolation, replica, revision, error, artifact,
                   signals FROM instances ORDER BY instance COLLATE \"C\"";
        self.read(|s| {
            s.rows(sql, &[])?
                .iter()
                .map(|row| {
                    Ok(StoredInstance {
                        instance: name(row, 0, InstanceId::parse)?,
                        host: name(row, 1, ServiceName::parse)?,
                        address: get(row, 2)?,
                        ready: get(row, 3)?,
                        admin: get(row, 4)?,
                        isolation: get(row, 5)?,
                        replica: get(row, 6)?,
                        revision: Revision(unsigned(row, 7)?),
                        error: get(row, 8)?,
                        artifact: get::<Option<String>>(row, 9)?.and_then(|artifact| artifact.parse().ok()),
                        signals: SignalSeq(unsigned(row, 10)?),
                    })
                })
                .collect()
        })
    }

    fn put_instances(&mut self, replica: &str, instances: &[StoredInstance]) -> Result<(), StoreError> {
        let text = |of: fn(&StoredInstance) -> &str| instances.iter().map(of).collect::<Vec<&str>>();
        let (ids, hosts) = (text(|i| i.instance.as_str()), text(|i| i.host.as_str()));
        let (addresses, admins, isolations) = (text(|i| &i.address), text(|i| &i.admin), text(|i| &i.isolation));
        let ready: Vec<bool> = instances.iter().map(|i| i.ready).collect();
        let revisions: Vec<i64> = instances.iter().map(|i| signed(i.revision.0)).collect();
        let errors: Vec<Option<&str>> = instances.iter().map(|i| i.error.as_deref()).collect();
        let artifacts: Vec<Option<String>> =
            instances.iter().map(|i| i.artifact.map(|artifact| artifact.to_string())).collect();
        let signals: Vec<i64> = instances.iter().map(|i| signed(i.signals.0)).collect();
        let sql = "INSERT INTO instances (instance, host, address, ready, admin, isolation, revision, error, artifact,
                   signals, replica)
                   SELECT *, $11 FROM unnest($1::TEXT[], $2::TEXT[], $3::TEXT[], $4::BOOLEAN[], $5::TEXT[], $6::TEXT[],
                   $7::BIGINT[], $8::TEXT[], $9::TEXT[], $10::BIGINT[])
                   ON CONFLICT (instance) DO UPDATE SET host = excluded.host, address = excluded.address,
                   ready = excluded.ready, admin = excluded.admin, isolation = excluded.isolation,
                   revision = excluded.revision, error = excluded.error, artifact = excluded.artifact,
                   signals = excluded.signals, replica = excluded.replica";
        self.write(Turn::Hosts, |s| {
            s.execute("DELETE FROM instances WHERE replica = $1 AND instance <> ALL($2)", &[&replica, &ids])?;
            let values: [&(dyn ToSql + Sync); 11] = [
                &ids,
                &hosts,
                &addresses,
                &ready,
                &admins,
                &isolations,
                &revisions,
                &errors,
                &artifacts,
                &signals,
                &replica,
            ];
            s.execute(sql, &values)?;
            s.notify()
        })
    }

    fn put_acknowledgements(&mut self, replica: &str, given: &[StoredAcknowledgement]) -> Result<(), StoreError> {
        let ids: Vec<&str> = given.iter().map(|one| one.instance.as_str()).collect();
        let revisions: Vec<i64> = given.iter().map(|one| signed(one.revision.0)).collect();
        let errors: Vec<Option<&str>> = given.iter().map(|one| one.error.as_deref()).collect();
        let signals: Vec<i64> = given.iter().map(|one| signed(one.signals.0)).collect();
        let sql = "UPDATE instances SET revision = given.revision, error = given.error, signals = given.signals
                   FROM unnest($1::TEXT[], $2::BIGINT[], $3::TEXT[], $4::BIGINT[])
                   AS given (instance, revision, error, signals)
                   WHERE instances.instance = given.instance AND replica = $5";
        self.write(Turn::Hosts, |s| {
            s.execute(sql, &[&ids, &revisions, &errors, &signals, &replica])?;
            s.execute("SELECT pg_notify($1, $2)", &[&ACKNOWLEDGED, &replica]).map(drop)
        })
    }

    fn acknowledgements(&mut self, replica: &str) -> Result<Vec<StoredAcknowledgement>, StoreError> {
        let sql = "SELECT instance, revision, error, signals FROM instances WHERE replica <> $1";
        self.read(|s| {
            s.rows(sql, &[&replica])?
                .iter()
                .map(|row| {
                    Ok(StoredAcknowledgement {
                        instance: name(row, 0, InstanceId::parse)?,
                        revision: Revision(unsigned(row, 1)?),
                        error: get(row, 2)?,
                        signals: SignalSeq(unsigned(row, 3)?),
                    })
                })
                .collect()
        })
    }

    fn beat(&mut self, replica: &str, alive_ms: u64) -> Result<Vec<String>, StoreError> {
        self.write(Turn::Hosts, |s| {
            let sql = format!(
                "INSERT INTO replicas VALUES ($1, {NOW_MS}) ON CONFLICT (replica) DO UPDATE SET seen_at_ms = {NOW_MS}"
            );
            s.execute(&sql, &[&replica])?;
            s.execute(&format!("DELETE FROM replicas WHERE seen_at_ms < {NOW_MS} - $1"), &[&signed(DAY_MS)])?;
            let sql =
                format!("SELECT replica FROM replicas WHERE replica <> $1 AND seen_at_ms >= {NOW_MS} - $2 ORDER BY 1");
            s.rows(&sql, &[&replica, &signed(alive_ms)])?.iter().map(|row| get(row, 0)).collect()
        })
    }

    fn put_serial(&mut self, serial: &IssuedSerial) -> Result<(), StoreError> {
        self.write(Turn::Hosts, |s| {
            let day_ago = signed(serial.issued_at_ms.saturating_sub(DAY_MS));
            s.execute("DELETE FROM serials WHERE expires_at_ms < $1", &[&day_ago])?;
            let instance = serial.instance.as_ref().map(InstanceId::as_str);
            let (issued, expires) = (signed(serial.issued_at_ms), signed(serial.expires_at_ms));
            let host = serial.host.as_ref().map(ServiceName::as_str);
            let (number, key) = (serial.serial.to_string(), serial.key.map(|key| key.to_string()));
            let sql = "INSERT INTO serials (serial, id, instance, issued_at_ms, expires_at_ms, host, key, authority)
                       VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
            let authority = i64::from(serial.authority);
            s.execute(sql, &[&number, &serial.id.as_str(), &instance, &issued, &expires, &host, &key, &authority])
                .map(drop)
        })
    }

    fn serials(&mut self, filter: &IdentityFilter, now_ms: u64, limit: u32) -> Result<Vec<IssuedSerial>, StoreError> {
        let sql = "SELECT serial, id, instance, host, key, issued_at_ms, expires_at_ms, authority FROM serials
                   WHERE expires_at_ms >= $1 AND ($2::TEXT IS NULL OR serial = $2) AND ($3::TEXT IS NULL OR id = $3)
                   AND ($4::TEXT IS NULL OR host = $4) AND ($5::TEXT IS NULL OR key = $5)
                   AND ($6::BIGINT IS NULL OR authority = $6) AND ($7::TEXT IS NULL OR instance = $7)
                   ORDER BY issued_at_ms DESC, serial LIMIT $8";
        let serial = filter.serial.map(|serial| serial.to_string());
        let id = filter.id.as_ref().map(SpiffeId::as_str);
        let host = filter.host.as_ref().map(ServiceName::as_str);
        let key = filter.key.map(|key| key.to_string());
        let authority = filter.authority.map(i64::from);
        let instance = filter.instance.as_ref().map(InstanceId::as_str);
        self.read(|s| {
            s.rows(sql, &[&signed(now_ms), &serial, &id, &host, &key, &authority, &instance, &i64::from(limit)])?
                .iter()
                .map(|row| {
                    Ok(IssuedSerial {
                        serial: parsed(row, 0)?,
                        id: parsed(row, 1)?,
                        instance: optional(row, 2, InstanceId::parse)?,
                        host: optional(row, 3, ServiceName::parse)?,
                        key: optional(row, 4, str::parse)?,
                        issued_at_ms: unsigned(row, 5)?,
                        expires_at_ms: unsigned(row, 6)?,
                        authority: unsigned(row, 7)? as u32,
                    })
                })
                .collect()
        })
    }

    fn put_revocations(
        &mut self,
        revoked: &[Revocation],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        let serials: Vec<String> = revoked.iter().map(|one| one.serial.to_string()).collect();
        let at_ms = signed(by.at_ms);
        self.write(Turn::Signals, |s| {
            let last: i64 = s.one("SELECT coalesce(max(seq), 0) FROM signals", &[])?;
            s.execute("DELETE FROM signals WHERE expires_at_ms < $1 AND seq < $2", &[&at_ms, &last])?;
            let held: i64 = s.one("SELECT count(*) FROM signals WHERE what NOT LIKE '%:%'", &[])?;
            let known = s.rows("SELECT what FROM signals WHERE what = ANY($1)", &[&serials])?;
            let known = known.iter().map(|row| get(row, 0)).collect::<Result<BTreeSet<String>, Broken>>()?;
            let new = serials.iter().zip(revoked).filter(|(serial, _)| !known.contains(*serial));
            let (serials, expiries): (Vec<&String>, Vec<i64>) =
                new.map(|(serial, one)| (serial, signed(one.expires_at_ms))).unzip();
            let added = signed(serials.len() as u64);
            if held + added > i64::from(max) {
                return Ok(None);
            }
            let sql = "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason)
                       SELECT $1 + number, serial, expires_at_ms, $2, $3, $4
                       FROM unnest($5::TEXT[], $6::BIGINT[]) WITH ORDINALITY AS new (serial, expires_at_ms, number)";
            s.execute(sql, &[&last, &at_ms, &by.by, &by.reason, &serials, &expiries])?;
            s.notify()?;
            Ok(Some(SignalSeq((last + added).unsigned_abs())))
        })
    }

    fn put_token_revocation(
        &mut self,
        meant: &TokensMeant,
        expires_at_ms: u64,
        by: &RevokedBy,
        max: u32,
    ) -> Result<(SignalSeq, TokensMeant), StoreError> {
        let at_ms = signed(by.at_ms);
        self.write(Turn::Signals, |s| {
            let last: i64 = s.one("SELECT coalesce(max(seq), 0) FROM signals", &[])?;
            s.execute("DELETE FROM signals WHERE expires_at_ms < $1 AND seq < $2", &[&at_ms, &last])?;
            let held: i64 = s.one("SELECT count(*) FROM signals WHERE what LIKE 'tokens:%'", &[])?;
            let meant = if held < i64::from(max) { meant.clone() } else { TokensMeant::All };
            let what = tokens_to_text(&meant);
            let sql = "DELETE FROM signals WHERE what = $1 OR $2 AND what LIKE 'tokens:%'";
            s.execute(sql, &[&what, &(meant == TokensMeant::All)])?;
            let sql = "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason)
                       VALUES ($1, $2, $3, $4, $5, $6)";
            s.execute(sql, &[&(last + 1), &what, &signed(expires_at_ms), &at_ms, &by.by, &by.reason])?;
            s.notify()?;
            Ok((SignalSeq((last + 1).unsigned_abs()), meant))
        })
    }

    fn put_statements(
        &mut self,
        statements: &[Statement],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        let at_ms = signed(by.at_ms);
        self.write(Turn::Signals, |s| {
            let last: i64 = s.one("SELECT coalesce(max(seq), 0) FROM signals", &[])?;
            s.execute("DELETE FROM signals WHERE expires_at_ms < $1 AND seq < $2", &[&at_ms, &last])?;
            let held = "SELECT count(*) FROM signals WHERE what LIKE 'stated:%' AND expires_at_ms >= $1";
            let held: i64 = s.one(held, &[&at_ms])?;
            let (mut numbered, mut added) = (Vec::with_capacity(statements.len()), 0);
            for (statement, number) in statements.iter().zip(1..) {
                let what = statement_to_text(statement);
                let rows = s.rows("SELECT at_ms FROM signals WHERE what = $1", &[&what])?;
                let before = rows.first().map(|row| unsigned(row, 0)).transpose()?;
                added += i64::from(before.is_none());
                let issued_at_ms = before.map_or(by.at_ms, |before| by.at_ms.max(before + 1));
                numbered.push((last + number, what, Statement { issued_at_ms, ..statement.clone() }));
            }
            if held + added > i64::from(max) {
                return Ok(None);
            }
            for (number, what, one) in &numbered {
                s.execute("DELETE FROM signals WHERE what = $1", &[what])?;
                let json = serde_json::to_string(one).map_err(|error| StoreError::Failed(error.to_string()));
                let (expires_at_ms, at_ms) = (signed(one.expires_at_ms), signed(one.issued_at_ms));
                let sql = "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason, statement)
                           VALUES ($1, $2, $3, $4, $5, $6, $7)";
                let json = json.map_err(Broken::Refused)?;
                s.execute(sql, &[number, what, &expires_at_ms, &at_ms, &by.by, &by.reason, &json])?;
            }
            s.notify()?;
            Ok(Some(SignalSeq(last.unsigned_abs() + numbered.len() as u64)))
        })
    }

    fn put_tokens(&mut self, tokens: &[StoredToken], now_ms: u64) -> Result<(), StoreError> {
        let encoded = tokens.iter().map(|one| serde_json::to_vec(&one.claims)).collect::<Result<Vec<_>, _>>();
        let encoded = encoded.map_err(|error| StoreError::Failed(error.to_string()))?;
        self.write(Turn::Hosts, |s| {
            s.execute("DELETE FROM tokens WHERE expires_at_ms < $1", &[&signed(now_ms)])?;
            let column = |of: fn(&StoredToken) -> String| tokens.iter().map(of).collect::<Vec<_>>();
            let expires: Vec<i64> = tokens.iter().map(|one| one.claims.expires_at * 1000).collect();
            let sql =
                "INSERT INTO tokens SELECT * FROM unnest($1::TEXT[], $2::TEXT[], $3::TEXT[], $4::TEXT[], $5::TEXT[],
                       $6::BIGINT[], $7::BYTEA[]) ON CONFLICT DO NOTHING";
            s.execute(
                sql,
                &[
                    &column(|one| one.claims.id.to_string()),
                    &column(|one| one.claims.subject.to_string()),
                    &column(|one| one.claims.audience.to_string()),
                    &column(|one| one.claims.instance.as_ref().map_or_else(String::new, InstanceId::to_string)),
                    &column(|one| one.host.as_ref().map_or_else(String::new, ServiceName::to_string)),
                    &expires,
                    &encoded,
                ],
            )
            .map(drop)
        })
    }

    fn tokens(&mut self, filter: &TokenFilter, now_ms: u64, limit: u32) -> Result<Vec<StoredToken>, StoreError> {
        let TokenFilter { id, subject, service, instance, host } = filter;
        let sql = "SELECT host, claims FROM tokens
                   WHERE expires_at_ms >= $1 AND ($2::TEXT IS NULL OR id = $2)
                   AND ($3::TEXT IS NULL OR subject LIKE $3) AND ($4::TEXT IS NULL OR audience LIKE $4)
                   AND ($5::TEXT IS NULL OR instance = $5) AND ($6::TEXT IS NULL OR host = $6)
                   ORDER BY id COLLATE \"C\" DESC LIMIT $7";
        // A name of a service has no sign that `LIKE` reads.
        let of_service = |service: &Option<ServiceName>| service.as_ref().map(|name| format!("spiffe://%/{name}"));
        let (subject, audience, id) = (of_service(subject), of_service(service), id.map(|id| id.to_string()));
        let (instance, host) = (instance.as_ref().map(InstanceId::as_str), host.as_ref().map(ServiceName::as_str));
        self.read(|s| {
            s.rows(sql, &[&signed(now_ms), &id, &subject, &audience, &instance, &host, &i64::from(limit)])?
                .iter()
                .map(|row| {
                    let unreadable = |what: String| Broken::Refused(StoreError::Failed(format!("a token: {what}")));
                    let (host, claims): (String, Vec<u8>) = (get(row, 0)?, get(row, 1)?);
                    Ok(StoredToken {
                        claims: serde_json::from_slice(&claims).map_err(|error| unreadable(error.to_string()))?,
                        host: (!host.is_empty())
                            .then(|| ServiceName::parse(&host))
                            .transpose()
                            .map_err(|error| unreadable(error.to_string()))?,
                    })
                })
                .collect()
        })
    }

    fn signals(&mut self, after: SignalSeq) -> Result<Vec<StoredSignal>, StoreError> {
        let sql =
            "SELECT seq, what, expires_at_ms, at_ms, actor, reason, statement FROM signals WHERE seq > $1 ORDER BY seq";
        self.read(|s| {
            s.rows(sql, &[&signed(after.0)])?
                .iter()
                .map(|row| {
                    let what: String = get(row, 1)?;
                    let (expires_at_ms, at_ms) = (unsigned(row, 2)?, unsigned(row, 3)?);
                    let statement: Option<String> = get(row, 6)?;
                    let unknown = || Broken::Refused(StoreError::Failed(format!("`{what}` is no signal")));
                    Ok(StoredSignal {
                        sequence: SignalSeq(unsigned(row, 0)?),
                        signal: signal_of_text(&what, statement.as_deref(), expires_at_ms, at_ms)
                            .ok_or_else(unknown)?,
                        by: RevokedBy { at_ms, by: get(row, 4)?, reason: get(row, 5)? },
                    })
                })
                .collect()
        })
    }

    fn put_report(&mut self, records: &[DecisionRecord], edges: &[EdgeCount], now_ms: u64) -> Result<(), StoreError> {
        let encoded = records.iter().map(serde_json::to_vec).collect::<Result<Vec<_>, _>>();
        let encoded = encoded.map_err(|error| StoreError::Failed(error.to_string()))?;
        self.write(Turn::Records, |s| {
            let ids: Vec<&str> = records.iter().map(|record| &*record.id).collect();
            let at: Vec<i64> = records.iter().map(|record| signed(record.at_ms)).collect();
            let sql =
                "INSERT INTO records (id, at_ms, record) SELECT * FROM unnest($1::TEXT[], $2::BIGINT[], $3::BYTEA[])
                       ON CONFLICT DO NOTHING";
            s.execute(sql, &[&ids, &at, &encoded])?;
            for edge in edges {
                let sql = "INSERT INTO edges VALUES ($1, $2, $3, $4, $5, $6)
                           ON CONFLICT (principal, service, action) DO UPDATE SET permits = edges.permits + $4,
                           revision = greatest(edges.revision, $5), seen_at_ms = $6";
                let (permits, revision) = (signed(edge.permits), signed(edge.revision.0));
                let (principal, service) = (edge.principal.as_str(), edge.service.as_str());
                s.execute(sql, &[&principal, &service, &&*edge.action, &permits, &revision, &signed(now_ms)])?;
            }
            let sql = "DELETE FROM records WHERE seq <= (SELECT max(seq) FROM records) - $1";
            s.execute(sql, &[&i64::from(RECORDS_MAX)])?;
            let sql =
                "DELETE FROM edges WHERE (principal, service, action) IN (SELECT principal, service, action FROM edges
                       ORDER BY seen_at_ms LIMIT greatest(0, (SELECT count(*) FROM edges) - $1))";
            s.execute(sql, &[&i64::from(EDGES_MAX)]).map(drop)
        })
    }

    fn records(&mut self, filter: &RecordFilter) -> Result<Vec<DecisionRecord>, StoreError> {
        let limit = crate::decisions::limit_of(filter);
        let since = signed(filter.since_ms.unwrap_or(0));
        // In pages: most questions are answered by the newest few.
        const PAGE: u32 = 1_000;
        let mut found: Vec<DecisionRecord> = Vec::new();
        let mut read = 0;
        while read < RECORDS_READ_MAX && found.len() < limit {
            let sql = "SELECT record FROM records WHERE at_ms >= $1 ORDER BY at_ms DESC, id COLLATE \"C\" DESC LIMIT $2 OFFSET $3";
            let page = self.read(|s| s.rows(sql, &[&since, &i64::from(PAGE), &i64::from(read)]))?;
            let records = page.iter().filter_map(|row| serde_json::from_slice(row.try_get(0).ok()?).ok());
            found.extend(records.filter(|record| crate::decisions::matches(filter, record)));
            if page.len() < PAGE as usize {
                break;
            }
            read += PAGE;
        }
        found.truncate(limit);
        Ok(found)
    }

    fn callers(&mut self, service: &ServiceName, limit: u32) -> Result<Vec<Caller>, StoreError> {
        let sql = "SELECT principal, action, permits, revision, seen_at_ms FROM edges WHERE service = $1
                   ORDER BY permits DESC, principal COLLATE \"C\", action COLLATE \"C\" LIMIT $2";
        self.read(|s| {
            s.rows(sql, &[&service.as_str(), &i64::from(limit)])?
                .iter()
                .map(|row| {
                    Ok(Caller {
                        principal: name(row, 0, SpiffeId::parse)?,
                        action: get(row, 1)?,
                        permits: unsigned(row, 2)?,
                        revision: Revision(unsigned(row, 3)?),
                        seen_at_ms: unsigned(row, 4)?,
                    })
                })
                .collect()
        })
    }
}

/// INVARIANT (revisions-never-fork): an entry is written only where the head that all replicas share ends, by one of them at a time.
fn append(s: &Session<'_>, new: &NewEntry) -> Result<bool, Broken> {
    let size = s.first("SELECT size FROM head", &[])?.map(|row| unsigned(&row, 0)).transpose()?;
    if size.unwrap_or(0) != new.index {
        return Ok(false);
    }
    let digests: Vec<&[u8]> =
        std::iter::once(&new.digest.0[..]).chain(new.bodies.iter().map(|(digest, _)| &digest.0[..])).collect();
    let texts: Vec<&[u8]> =
        std::iter::once(&new.change_set[..]).chain(new.bodies.iter().map(|(_, text)| text.as_bytes())).collect();
    let sql = "INSERT INTO bodies SELECT * FROM unnest($1::BYTEA[], $2::BYTEA[]) ON CONFLICT DO NOTHING";
    s.execute(sql, &[&digests, &texts])?;
    let (leaf, digest, root) = (&new.leaf.0[..], &new.digest.0[..], &new.root.0[..]);
    s.execute("INSERT INTO entries VALUES ($1, $2, $3, $4)", &[&signed(new.index), &new.entry, &leaf, &digest])?;
    let sql = "INSERT INTO head VALUES (1, $1, $2, $3) ON CONFLICT (one) DO UPDATE SET size = $1, root = $2, seal = $3";
    s.execute(sql, &[&signed(new.index + 1), &root, &new.seal])?;
    s.notify()?;
    Ok(true)
}

fn put_keys(s: &Session<'_>, keys: &[(&str, &[u8])]) -> Result<(), Broken> {
    for (name, bytes) in keys {
        let sql = "INSERT INTO keys VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET bytes = $2";
        s.execute(sql, &[name, bytes])?;
    }
    Ok(())
}

/// One statement, so that it reads one moment.
fn sealed_of(s: &Session<'_>) -> Result<Vec<(SealedAt, Vec<u8>)>, Broken> {
    let sql = "SELECT 'key', name, bytes FROM keys UNION ALL SELECT 'codes', factor, sealed FROM codes
               UNION ALL SELECT 'head', '', seal FROM head";
    let mut found = Vec::new();
    for row in &s.rows(sql, &[])? {
        let named: String = get(row, 1)?;
        let at = match get::<&str>(row, 0)? {
            "key" if named.ends_with(CERTIFICATE_SUFFIX) || named.starts_with(NOTE_PREFIX) => continue,
            "key" => SealedAt::Key(named),
            "codes" => SealedAt::Codes(name(row, 1, FactorId::parse)?),
            _ => SealedAt::Head,
        };
        found.push((at, get(row, 2)?));
    }
    Ok(found)
}

/// PostgreSQL integers are signed; no count or time of ours comes near the sign.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn get<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, Broken> {
    row.try_get(column).map_err(|error| damaged(chain(&error)))
}

fn unsigned(row: &Row, column: usize) -> Result<u64, Broken> {
    let n: i64 = get(row, column)?;
    u64::try_from(n).map_err(|_| damaged(format!("column {column} holds {n}")))
}

fn digest(row: &Row, column: usize) -> Result<Digest, Broken> {
    let bytes: &[u8] = get(row, column)?;
    bytes.try_into().map(Digest).map_err(|_| damaged(format!("column {column} holds no SHA-256")))
}

fn name<T>(row: &Row, column: usize, parse: fn(&str) -> Result<T, NameError>) -> Result<T, Broken> {
    parse(get(row, column)?).map_err(|error| damaged(error.to_string()))
}

fn parsed<T: FromStr<Err: Display>>(row: &Row, column: usize) -> Result<T, Broken> {
    get::<&str>(row, column)?.parse().map_err(|error: T::Err| damaged(error.to_string()))
}

fn optional<T, E: Display>(row: &Row, column: usize, parse: fn(&str) -> Result<T, E>) -> Result<Option<T>, Broken> {
    get::<Option<&str>>(row, column)?.map(parse).transpose().map_err(|error| damaged(error.to_string()))
}

fn names_of_text(text: &str) -> Result<BTreeSet<ServiceName>, Broken> {
    serde_json::from_str(text).map_err(|error| damaged(error.to_string()))
}

fn stored_proposal(row: &Row) -> Result<StoredProposal, Broken> {
    Ok(StoredProposal {
        id: get(row, 0)?,
        version: unsigned(row, 1)?,
        expires_at_ms: unsigned(row, 2)?,
        is_open: get(row, 3)?,
        document: get(row, 4)?,
    })
}

/// What does not hold what the schema says was not written by us.
fn damaged(what: String) -> Broken {
    Broken::Refused(StoreError::Damaged { path: "the database".into(), what })
}

fn sort(error: &tokio_postgres::Error, place: &str) -> Broken {
    let said = chain(error);
    let Some(code) = error.code() else { return Broken::Before(said) };
    let away = || StoreError::Away { place: place.to_owned(), why: said.clone() };
    Broken::Refused(match *code {
        SqlState::DISK_FULL => StoreError::Full(place.to_owned()),
        SqlState::READ_ONLY_SQL_TRANSACTION | SqlState::INSUFFICIENT_PRIVILEGE => {
            StoreError::ReadOnly(place.to_owned())
        }
        SqlState::LOCK_NOT_AVAILABLE | SqlState::QUERY_CANCELED | SqlState::TOO_MANY_CONNECTIONS => away(),
        SqlState::DATA_CORRUPTED | SqlState::INDEX_CORRUPTED => {
            StoreError::Damaged { path: place.to_owned(), what: said }
        }
        SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED => return Broken::Before(said),
        // It stops, starts, or ended our session.
        _ if matches!(&code.code()[..2], "57" | "08" | "25") => return Broken::Before(said),
        _ => StoreError::Failed(said),
    })
}

fn chain(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

fn tls_of(root: &str) -> Result<MakeRustlsConnect, String> {
    let pem = fs::read(root).map_err(|error| format!("`{root}` could not be read: {error}"))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| format!("`{root}` holds no PEM certificate: {error}"))?;
        roots.add(certificate).map_err(|error| format!("`{root}`: {error}"))?;
    }
    if roots.is_empty() {
        return Err(format!("`{root}` holds no PEM certificate"));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// Takes a parameter out of a URL's query, or of `key=value` pairs.
fn take_parameter(given: &str, name: &str) -> (String, Option<String>) {
    let is_url = given.contains("://");
    let (head, parameters, separator) = match given.split_once('?') {
        Some((head, query)) if is_url => (format!("{head}?"), query, '&'),
        _ if is_url => return (given.to_owned(), None),
        _ => (String::new(), given, ' '),
    };
    let (taken, kept): (Vec<&str>, Vec<&str>) =
        parameters.split(separator).partition(|pair| pair.split_once('=').is_some_and(|(key, _)| key == name));
    let value = taken.first().and_then(|pair| pair.split_once('=')).map(|(_, value)| value.to_owned());
    let kept = kept.join(&separator.to_string());
    (format!("{head}{kept}").trim_end_matches('?').to_owned(), value)
}
