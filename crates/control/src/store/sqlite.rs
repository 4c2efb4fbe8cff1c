//! The embedded store: one SQLite file in WAL mode with `synchronous=FULL`, so that a commit that returned has been
//! fsynced. The schema is versioned; a file of a later version is refused, an earlier one is brought up to date.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs::{OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, ToSql, TransactionBehavior, params, types::Type};

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

/// Each step brings the schema from its index to the next version. Steps are never edited, only added.
pub(super) const SCHEMA: &[&str] = &[
    "
    CREATE TABLE entries (
        idx    INTEGER PRIMARY KEY CHECK (idx >= 0),
        entry  BLOB NOT NULL,
        leaf   BLOB NOT NULL CHECK (length(leaf) = 32),
        digest BLOB NOT NULL CHECK (length(digest) = 32)
    ) STRICT;
    CREATE TABLE head (
        one  INTEGER PRIMARY KEY CHECK (one = 1),
        size INTEGER NOT NULL,
        root BLOB NOT NULL CHECK (length(root) = 32),
        seal BLOB NOT NULL
    ) STRICT;
    -- Change-sets and texts, by the SHA-256 of their bytes.
    CREATE TABLE bodies (
        digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
        bytes  BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- Certificates, and private keys sealed by the key-encryption key.
    CREATE TABLE keys (
        name  TEXT PRIMARY KEY,
        bytes BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE invitations (
        hash          BLOB PRIMARY KEY CHECK (length(hash) = 32),
        expires_at_ms INTEGER NOT NULL,
        host          TEXT,
        used_at_ms    INTEGER
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE hosts (
        host           TEXT PRIMARY KEY,
        joined_at_ms   INTEGER NOT NULL,
        heard_at_ms    INTEGER NOT NULL,
        version        TEXT NOT NULL,
        isolation      TEXT NOT NULL,
        isolation_note TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE instances (
        instance  TEXT PRIMARY KEY,
        host      TEXT NOT NULL,
        address   TEXT NOT NULL,
        ready     INTEGER NOT NULL,
        admin     TEXT NOT NULL,
        isolation TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE serials (
        serial        TEXT PRIMARY KEY,
        id            TEXT NOT NULL,
        instance      TEXT,
        issued_at_ms  INTEGER NOT NULL,
        expires_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX serials_expiry ON serials (expires_at_ms);
    CREATE TABLE records (
        seq    INTEGER PRIMARY KEY AUTOINCREMENT,
        id     TEXT NOT NULL UNIQUE,
        at_ms  INTEGER NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX records_time ON records (at_ms);
    CREATE TABLE edges (
        principal TEXT NOT NULL,
        service   TEXT NOT NULL,
        action    TEXT NOT NULL,
        permits   INTEGER NOT NULL,
        revision  INTEGER NOT NULL,
        seen_at_ms INTEGER NOT NULL,
        PRIMARY KEY (principal, service, action)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX edges_seen ON edges (seen_at_ms);
",
    "
    -- JSON arrays of names; NULL: every declared service.
    ALTER TABLE invitations ADD COLUMN services TEXT;
    -- Hosts that may run some services only.
    CREATE TABLE entitlements (
        host     TEXT PRIMARY KEY,
        services TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX edges_service ON edges (service, permits);
",
    "
    -- What verifies the codes of an authenticator app: its secret, sealed by the key-encryption key.
    CREATE TABLE codes (
        factor    TEXT PRIMARY KEY,
        operator  TEXT NOT NULL,
        sealed    BLOB NOT NULL,
        last_step INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- Keyed hashes of recovery codes that were not used yet.
    CREATE TABLE recovery (
        factor TEXT NOT NULL,
        hash   BLOB NOT NULL CHECK (length(hash) = 32),
        PRIMARY KEY (factor, hash)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE guesses (
        operator TEXT NOT NULL,
        at_ms    INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX guesses_operator ON guesses (operator, at_ms);
    CREATE TABLE operator_invitations (
        operator      TEXT PRIMARY KEY,
        hash          BLOB NOT NULL CHECK (length(hash) = 32),
        expires_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE proposals (
        seq           INTEGER PRIMARY KEY AUTOINCREMENT,
        id            TEXT NOT NULL UNIQUE,
        version       INTEGER NOT NULL,
        expires_at_ms INTEGER NOT NULL,
        is_open       INTEGER NOT NULL,
        document      BLOB NOT NULL
    ) STRICT;
",
    "
    -- Sessions, ceremonies and other small things beside the ledger.
    CREATE TABLE documents (
        kind          TEXT NOT NULL,
        key           TEXT NOT NULL,
        bytes         BLOB NOT NULL,
        expires_at_ms INTEGER NOT NULL,
        PRIMARY KEY (kind, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX documents_expiry ON documents (kind, expires_at_ms);
",
    "
    -- Which of several control planes an instance's agent follows, and what its proxy said last.
    ALTER TABLE instances ADD COLUMN replica TEXT NOT NULL DEFAULT '';
    ALTER TABLE instances ADD COLUMN revision INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE instances ADD COLUMN error TEXT;
    CREATE TABLE replicas (
        replica    TEXT PRIMARY KEY,
        seen_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
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
    ALTER TABLE instances ADD COLUMN signals INTEGER NOT NULL DEFAULT 0;
    -- Certificates that were revoked, in the order in which it is told.
    CREATE TABLE signals (
        seq           INTEGER PRIMARY KEY,
        serial        TEXT NOT NULL UNIQUE,
        expires_at_ms INTEGER NOT NULL,
        at_ms         INTEGER NOT NULL,
        actor         TEXT NOT NULL,
        reason        TEXT NOT NULL
    ) STRICT;
",
    "
    -- Which root of the trust domain a certificate rests on; of those from before there were several: the first.
    ALTER TABLE serials ADD COLUMN authority INTEGER NOT NULL DEFAULT 1;
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
        expires_at_ms INTEGER NOT NULL,
        claims        BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX tokens_expiry ON tokens (expires_at_ms);
    CREATE INDEX tokens_instance ON tokens (instance, audience);
",
    "
    -- What is said, JSON, where `what` is `stated:` and of which kind, of whom and by whom.
    ALTER TABLE signals ADD COLUMN statement TEXT;
",
];

/// One SQLite file.
pub struct SqliteStore {
    connection: Connection,
    path: String,
}

impl SqliteStore {
    /// Opens the file, creates it when it is missing, and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let shown = path.display().to_string();
        let wrong = |e| sort(e, &shown);
        make_private(path).map_err(|e| unusable(&e, &shown))?;
        let mut connection = Connection::open(path).map_err(wrong)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(wrong)?;
        connection.pragma_update(None, "journal_mode", "wal").map_err(wrong)?;
        connection.pragma_update(None, "synchronous", "full").map_err(wrong)?;
        connection.pragma_update(None, "trusted_schema", false).map_err(wrong)?;
        connection.pragma_update(None, "cell_size_check", true).map_err(wrong)?;
        migrate(&mut connection, &shown)?;
        Ok(Self { connection, path: shown })
    }

    /// Lets the file grow no more, as a full disk does, or again.
    #[cfg(test)]
    pub(super) fn limit_pages(&self, full: bool) {
        let pages: i64 = match full {
            true => self.connection.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap(),
            false => i64::from(u32::MAX - 1),
        };
        self.connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).unwrap();
    }

    fn write<T>(
        &mut self,
        act: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        // A commit that fails rolls back when the transaction drops: nothing of it is seen again.
        let done = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).and_then(|transaction| {
            let value = act(&transaction)?;
            transaction.commit()?;
            Ok(value)
        });
        done.map_err(|e| sort(e, &self.path))
    }

    fn rows<T>(
        &mut self,
        sql: &str,
        params: &[&dyn ToSql],
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let rows = self
            .connection
            .prepare_cached(sql)
            .and_then(|mut statement| statement.query_map(params, read)?.collect::<rusqlite::Result<Vec<T>>>());
        rows.map_err(|e| sort(e, &self.path))
    }
}

impl Store for SqliteStore {
    fn place(&self) -> String {
        self.path.clone()
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn head(&mut self) -> Result<Option<StoredHead>, StoreError> {
        let rows = self.rows("SELECT size, root, seal FROM head", &[], |row| {
            Ok(StoredHead { size: unsigned(row, 0)?, root: digest(row, 1)?, seal: row.get(2)? })
        })?;
        Ok(rows.into_iter().next())
    }

    fn entries(&mut self, from: u64, limit: u32) -> Result<Vec<StoredEntry>, StoreError> {
        let sql = "SELECT e.idx, e.entry, e.leaf, b.bytes FROM entries e LEFT JOIN bodies b ON b.digest = e.digest
                   WHERE e.idx >= ?1 ORDER BY e.idx LIMIT ?2";
        self.rows(sql, &[&signed(from), &limit], |row| {
            Ok(StoredEntry {
                index: unsigned(row, 0)?,
                entry: row.get(1)?,
                leaf: digest(row, 2)?,
                change_set: row.get::<_, Option<Vec<u8>>>(3)?.unwrap_or_default(),
            })
        })
    }

    fn append(&mut self, new: &NewEntry) -> Result<(), StoreError> {
        let appended = self.write(|t| {
            let size: Option<i64> = t.query_row("SELECT size FROM head", [], |row| row.get(0)).optional()?;
            if size.unwrap_or(0) != signed(new.index) {
                return Ok(false);
            }
            let mut body = t.prepare_cached("INSERT INTO bodies VALUES (?1, ?2) ON CONFLICT DO NOTHING")?;
            body.execute(params![new.digest.0, new.change_set])?;
            for (digest, text) in &new.bodies {
                body.execute(params![digest.0, text.as_bytes()])?;
            }
            t.execute(
                "INSERT INTO entries VALUES (?1, ?2, ?3, ?4)",
                params![signed(new.index), new.entry, new.leaf.0, new.digest.0],
            )?;
            t.execute(
                "INSERT INTO head VALUES (1, ?1, ?2, ?3) ON CONFLICT DO UPDATE SET size = ?1, root = ?2, seal = ?3",
                params![signed(new.index + 1), new.root.0, new.seal],
            )?;
            Ok(true)
        })?;
        if appended { Ok(()) } else { Err(StoreError::Taken(new.index)) }
    }

    fn bodies(&mut self, digests: &[Digest]) -> Result<Vec<(Digest, Arc<str>)>, StoreError> {
        let mut found = Vec::with_capacity(digests.len());
        for digest in digests {
            let bytes: Option<Vec<u8>> = self
                .connection
                .prepare_cached("SELECT bytes FROM bodies WHERE digest = ?1")
                .and_then(|mut s| s.query_row([digest.0], |row| row.get(0)).optional())
                .map_err(|e| sort(e, &self.path))?;
            let Some(bytes) = bytes else { continue };
            let text = String::from_utf8(bytes).map_err(|_| StoreError::Damaged {
                path: self.path.clone(),
                what: format!("text {digest} is no UTF-8"),
            })?;
            found.push((*digest, text.into()));
        }
        Ok(found)
    }

    fn has_keys(&mut self) -> Result<bool, StoreError> {
        Ok(!self.rows("SELECT 1 FROM keys LIMIT 1", &[], |_| Ok(()))?.is_empty())
    }

    fn key(&mut self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.rows("SELECT bytes FROM keys WHERE name = ?1", &[&name], |row| row.get(0))?.into_iter().next())
    }

    fn keys(&mut self, names: &[&str]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.write(|t| {
            let mut read = t.prepare_cached("SELECT bytes FROM keys WHERE name = ?1")?;
            names.iter().map(|name| read.query_row([name], |row| row.get(0)).optional()).collect()
        })
    }

    fn put_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<(), StoreError> {
        self.write(|t| {
            for (name, bytes) in keys {
                t.execute("INSERT OR REPLACE INTO keys VALUES (?1, ?2)", params![name, bytes])?;
            }
            Ok(())
        })
    }

    fn create_keys(&mut self, keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write(|t| {
            for (name, _) in keys {
                if t.query_row("SELECT 1 FROM keys WHERE name = ?1", [name], |_| Ok(())).optional()?.is_some() {
                    return Ok(false);
                }
            }
            for (name, bytes) in keys {
                t.execute("INSERT INTO keys VALUES (?1, ?2)", params![name, bytes])?;
            }
            Ok(true)
        })
    }

    fn swap_key(&mut self, name: &str, seen: &[u8], keys: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write(|t| {
            let sql = "SELECT 1 FROM keys WHERE name = ?1 AND bytes = ?2";
            if t.query_row(sql, params![name, seen], |_| Ok(())).optional()?.is_none() {
                return Ok(false);
            }
            for (name, bytes) in keys {
                t.execute("INSERT OR REPLACE INTO keys VALUES (?1, ?2)", params![name, bytes])?;
            }
            Ok(true)
        })
    }

    fn sealed(&mut self) -> Result<Vec<(SealedAt, Vec<u8>)>, StoreError> {
        let read = sealed_of(&self.connection);
        read.map_err(|e| sort(e, &self.path))
    }

    fn reseal(&mut self, resealed: &[Resealed], notes: &[(&str, &[u8])]) -> Result<bool, StoreError> {
        self.write(|t| {
            let seen = resealed.iter().map(|one| (one.at.clone(), one.seen.clone())).collect::<BTreeMap<_, _>>();
            if sealed_of(t)?.into_iter().collect::<BTreeMap<_, _>>() != seen {
                return Ok(false);
            }
            for Resealed { at, next, .. } in resealed {
                match at {
                    SealedAt::Key(name) => {
                        t.execute("UPDATE keys SET bytes = ?2 WHERE name = ?1", params![name, next])?
                    }
                    SealedAt::Codes(factor) => {
                        t.execute("UPDATE codes SET sealed = ?2 WHERE factor = ?1", params![factor.as_str(), next])?
                    }
                    SealedAt::Head => t.execute("UPDATE head SET seal = ?1", params![next])?,
                };
            }
            for (name, bytes) in notes {
                t.execute("INSERT OR REPLACE INTO keys VALUES (?1, ?2)", params![name, bytes])?;
            }
            Ok(true)
        })
    }

    fn put_invitation(&mut self, hash: &Digest, invitation: &NewInvitation, now_ms: u64) -> Result<bool, StoreError> {
        let services = invitation.services.as_ref().map(super::names_to_text).transpose()?;
        self.write(|t| {
            // Kept for a day after their end, so that a late holder learns why it is refused.
            t.execute("DELETE FROM invitations WHERE expires_at_ms < ?1", [signed(now_ms.saturating_sub(DAY_MS))])?;
            let open: u32 = t.query_row(
                "SELECT count(*) FROM invitations WHERE used_at_ms IS NULL AND expires_at_ms >= ?1",
                [signed(now_ms)],
                |row| row.get(0),
            )?;
            if open >= INVITATIONS_MAX {
                return Ok(false);
            }
            t.execute(
                "INSERT INTO invitations (hash, expires_at_ms, host, services) VALUES (?1, ?2, ?3, ?4)",
                params![
                    hash.0,
                    signed(invitation.expires_at_ms),
                    invitation.host.as_ref().map(ServiceName::as_str),
                    services
                ],
            )?;
            Ok(true)
        })
    }

    fn spend_invitation(&mut self, hash: &Digest, host: &ServiceName, now_ms: u64) -> Result<Spent, StoreError> {
        self.write(|t| {
            let found = t
                .query_row(
                    "SELECT expires_at_ms, host, used_at_ms, services FROM invitations WHERE hash = ?1",
                    [hash.0],
                    |row| {
                        let services = row.get::<_, Option<String>>(3)?;
                        let services = services.map(|text| names_of_text(3, &text).map(|names| (text, names)));
                        let (host, used) = (row.get::<_, Option<String>>(1)?, row.get::<_, Option<i64>>(2)?);
                        Ok((unsigned(row, 0)?, host, used, services.transpose()?))
                    },
                )
                .optional()?;
            let Some((expires_at_ms, only_host, used, services)) = found else { return Ok(Spent::Unknown) };
            if used.is_some() {
                return Ok(Spent::Used);
            }
            if now_ms > expires_at_ms {
                return Ok(Spent::Expired);
            }
            if only_host.is_some_and(|only| only != host.as_str()) {
                return Ok(Spent::OtherHost);
            }
            t.execute("UPDATE invitations SET used_at_ms = ?2 WHERE hash = ?1", params![hash.0, signed(now_ms)])?;
            t.execute("DELETE FROM entitlements WHERE host = ?1", [host.as_str()])?;
            if let Some((text, _)) = &services {
                t.execute("INSERT INTO entitlements VALUES (?1, ?2)", params![host.as_str(), text])?;
            }
            Ok(Spent::Admitted(services.map(|(_, names)| names)))
        })
    }

    fn put_codes(&mut self, codes: &StoredCodes) -> Result<(), StoreError> {
        self.write(|t| {
            t.execute(
                "INSERT INTO codes VALUES (?1, ?2, ?3, ?4)",
                params![codes.factor.as_str(), codes.operator.as_str(), codes.sealed, signed(codes.last_step)],
            )
            .map(drop)
        })
    }

    fn codes(&mut self, operator: &OperatorName) -> Result<Vec<StoredCodes>, StoreError> {
        let sql = "SELECT factor, operator, sealed, last_step FROM codes WHERE operator = ?1 ORDER BY factor";
        self.rows(sql, &[&operator.as_str()], |row| {
            Ok(StoredCodes {
                factor: name(row, 0, FactorId::parse)?,
                operator: name(row, 1, OperatorName::parse)?,
                sealed: row.get(2)?,
                last_step: unsigned(row, 3)?,
            })
        })
    }

    fn use_step(&mut self, factor: &FactorId, step: u64) -> Result<bool, StoreError> {
        self.write(|t| {
            let sql = "UPDATE codes SET last_step = ?2 WHERE factor = ?1 AND last_step < ?2";
            Ok(t.execute(sql, params![factor.as_str(), signed(step)])? == 1)
        })
    }

    fn put_recovery(&mut self, factor: &FactorId, hashes: &[Digest]) -> Result<(), StoreError> {
        self.write(|t| {
            for hash in hashes {
                t.execute("INSERT INTO recovery VALUES (?1, ?2)", params![factor.as_str(), hash.0])?;
            }
            Ok(())
        })
    }

    fn spend_recovery(&mut self, factor: &FactorId, hash: &Digest) -> Result<bool, StoreError> {
        self.write(|t| {
            let sql = "DELETE FROM recovery WHERE factor = ?1 AND hash = ?2";
            Ok(t.execute(sql, params![factor.as_str(), hash.0])? == 1)
        })
    }

    fn forget_factors(&mut self, factors: &[FactorId]) -> Result<(), StoreError> {
        self.write(|t| {
            for factor in factors {
                t.execute("DELETE FROM codes WHERE factor = ?1", [factor.as_str()])?;
                t.execute("DELETE FROM recovery WHERE factor = ?1", [factor.as_str()])?;
            }
            Ok(())
        })
    }

    fn count_guess(
        &mut self,
        operator: &OperatorName,
        now_ms: u64,
        since_ms: u64,
        guesses_max: u32,
    ) -> Result<Option<u64>, StoreError> {
        self.write(|t| {
            t.execute("DELETE FROM guesses WHERE at_ms < ?1", [signed(since_ms)])?;
            let sql = "SELECT count(*), min(at_ms) FROM guesses WHERE operator = ?1";
            let (count, oldest): (u32, Option<i64>) =
                t.query_row(sql, [operator.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?;
            if count >= guesses_max {
                return Ok(oldest.map(|at_ms| u64::try_from(at_ms).unwrap_or(0)));
            }
            t.execute("INSERT INTO guesses VALUES (?1, ?2)", params![operator.as_str(), signed(now_ms)])?;
            Ok(None)
        })
    }

    fn forget_guesses(&mut self, operator: &OperatorName) -> Result<(), StoreError> {
        self.write(|t| t.execute("DELETE FROM guesses WHERE operator = ?1", [operator.as_str()]).map(drop))
    }

    fn put_operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        expires_at_ms: u64,
    ) -> Result<(), StoreError> {
        self.write(|t| {
            t.execute(
                "INSERT OR REPLACE INTO operator_invitations VALUES (?1, ?2, ?3)",
                params![operator.as_str(), hash.0, signed(expires_at_ms)],
            )
            .map(drop)
        })
    }

    fn operator_invitation(
        &mut self,
        operator: &OperatorName,
        hash: &Digest,
        now_ms: u64,
        spend: bool,
    ) -> Result<bool, StoreError> {
        self.write(|t| {
            let found: u32 = t.query_row(
                "SELECT count(*) FROM operator_invitations WHERE operator = ?1 AND hash = ?2 AND expires_at_ms >= ?3",
                params![operator.as_str(), hash.0, signed(now_ms)],
                |row| row.get(0),
            )?;
            if found == 1 && spend {
                t.execute("DELETE FROM operator_invitations WHERE operator = ?1", [operator.as_str()])?;
            }
            Ok(found == 1)
        })
    }

    fn put_proposal(&mut self, proposal: &StoredProposal, now_ms: u64) -> Result<bool, StoreError> {
        self.write(|t| {
            let sql = "SELECT count(*), coalesce(sum(length(document)), 0) FROM proposals
                       WHERE is_open AND expires_at_ms >= ?1";
            let (open, bytes) =
                t.query_row(sql, [signed(now_ms)], |row| Ok((row.get::<_, u32>(0)?, unsigned(row, 1)?)))?;
            if open >= PROPOSALS_OPEN_MAX || bytes + proposal.document.len() as u64 > PROPOSALS_OPEN_BYTES_MAX {
                return Ok(false);
            }
            let sql = "SELECT coalesce(sum(length(document)), 0) FROM proposals";
            if t.query_row(sql, [], |row| unsigned(row, 0))? > 2 * PROPOSALS_OPEN_BYTES_MAX {
                t.execute("DELETE FROM proposals WHERE NOT (is_open AND expires_at_ms >= ?1)", [signed(now_ms)])?;
            }
            t.execute(
                "INSERT INTO proposals (id, version, expires_at_ms, is_open, document) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    proposal.id,
                    signed(proposal.version),
                    signed(proposal.expires_at_ms),
                    proposal.is_open,
                    proposal.document
                ],
            )?;
            t.execute(
                "DELETE FROM proposals WHERE seq IN (SELECT seq FROM proposals
                 WHERE NOT (is_open AND expires_at_ms >= ?1)
                 ORDER BY seq LIMIT max(0, (SELECT count(*) FROM proposals) - ?2))",
                params![signed(now_ms), PROPOSALS_MAX],
            )?;
            Ok(true)
        })
    }

    fn replace_proposal(&mut self, proposal: &StoredProposal) -> Result<bool, StoreError> {
        self.write(|t| {
            let replaced = t.execute(
                "UPDATE proposals SET version = ?2, expires_at_ms = ?3, is_open = ?4, document = ?5
                 WHERE id = ?1 AND version = ?2 - 1",
                params![
                    proposal.id,
                    signed(proposal.version),
                    signed(proposal.expires_at_ms),
                    proposal.is_open,
                    proposal.document
                ],
            )?;
            Ok(replaced == 1)
        })
    }

    fn proposal(&mut self, id: &str) -> Result<Option<StoredProposal>, StoreError> {
        let sql = "SELECT id, version, expires_at_ms, is_open, document FROM proposals WHERE id = ?1";
        Ok(self.rows(sql, &[&id], stored_proposal)?.into_iter().next())
    }

    fn proposals(&mut self) -> Result<Vec<StoredProposal>, StoreError> {
        let sql = "SELECT id, version, expires_at_ms, is_open, document FROM proposals ORDER BY seq DESC";
        self.rows(sql, &[], stored_proposal)
    }

    fn put_document(&mut self, document: &Document, now_ms: u64, max: u32) -> Result<bool, StoreError> {
        self.write(|t| {
            let (kind, now) = (document.kind, signed(now_ms));
            t.execute("DELETE FROM documents WHERE kind = ?1 AND expires_at_ms < ?2", params![kind, now])?;
            let count: u32 = t.query_row("SELECT count(*) FROM documents WHERE kind = ?1", [kind], |row| row.get(0))?;
            if count >= max {
                return Ok(false);
            }
            let sql = "INSERT INTO documents VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
            let expires = signed(document.expires_at_ms);
            Ok(t.execute(sql, params![kind, document.key, document.bytes, expires])? == 1)
        })
    }

    fn swap_document(&mut self, kind: &str, key: &str, seen: &[u8], new: &Document) -> Result<bool, StoreError> {
        self.write(|t| {
            let sql = "UPDATE documents SET bytes = ?4, expires_at_ms = ?5 WHERE kind = ?1 AND key = ?2 AND bytes = ?3";
            Ok(t.execute(sql, params![kind, key, seen, new.bytes, signed(new.expires_at_ms)])? == 1)
        })
    }

    fn document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let sql = "SELECT bytes FROM documents WHERE kind = ?1 AND key = ?2 AND expires_at_ms >= ?3";
        Ok(self.rows(sql, &[&kind, &key, &signed(now_ms)], |row| row.get(0))?.into_iter().next())
    }

    fn take_document(&mut self, kind: &str, key: &str, now_ms: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.write(|t| {
            let sql = "DELETE FROM documents WHERE kind = ?1 AND key = ?2 RETURNING bytes, expires_at_ms";
            let found =
                t.query_row(sql, [kind, key], |row| Ok((row.get::<_, Vec<u8>>(0)?, unsigned(row, 1)?))).optional()?;
            Ok(found.filter(|(_, expires_at_ms)| *expires_at_ms >= now_ms).map(|(bytes, _)| bytes))
        })
    }

    fn documents(&mut self, kind: &str, now_ms: u64) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let sql = "SELECT key, bytes FROM documents WHERE kind = ?1 AND expires_at_ms >= ?2 ORDER BY key";
        self.rows(sql, &[&kind, &signed(now_ms)], |row| Ok((row.get(0)?, row.get(1)?)))
    }

    fn forget_documents(&mut self, kind: &str, keys: &[String]) -> Result<(), StoreError> {
        self.write(|t| {
            for key in keys {
                t.execute("DELETE FROM documents WHERE kind = ?1 AND key = ?2", [kind, key])?;
            }
            Ok(())
        })
    }

    fn entitlements(&mut self) -> Result<Vec<(ServiceName, BTreeSet<ServiceName>)>, StoreError> {
        self.rows("SELECT host, services FROM entitlements ORDER BY host", &[], |row| {
            Ok((name(row, 0, ServiceName::parse)?, names_of_text(1, &row.get::<_, String>(1)?)?))
        })
    }

    fn hosts(&mut self) -> Result<Vec<StoredHost>, StoreError> {
        self.rows("SELECT * FROM hosts ORDER BY host", &[], |row| {
            Ok(StoredHost {
                host: name(row, 0, ServiceName::parse)?,
                joined_at_ms: unsigned(row, 1)?,
                heard_at_ms: unsigned(row, 2)?,
                version: row.get(3)?,
                isolation: row.get(4)?,
                isolation_note: row.get(5)?,
            })
        })
    }

    fn put_host(&mut self, host: &StoredHost) -> Result<(), StoreError> {
        self.write(|t| {
            t.execute(
                "INSERT INTO hosts VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE SET
                 heard_at_ms = ?3, version = ?4, isolation = ?5, isolation_note = ?6",
                params![
                    host.host.as_str(),
                    signed(host.joined_at_ms),
                    signed(host.heard_at_ms),
                    host.version,
                    host.isolation,
                    host.isolation_note
                ],
            )
            .map(drop)
        })
    }

    fn instances(&mut self) -> Result<Vec<StoredInstance>, StoreError> {
        self.rows("SELECT * FROM instances ORDER BY instance", &[], |row| {
            Ok(StoredInstance {
                instance: name(row, 0, InstanceId::parse)?,
                host: name(row, 1, ServiceName::parse)?,
                address: row.get(2)?,
                ready: row.get(3)?,
                admin: row.get(4)?,
                isolation: row.get(5)?,
                replica: row.get(6)?,
                revision: Revision(unsigned(row, 7)?),
                error: row.get(8)?,
                artifact: row.get::<_, Option<String>>(9)?.and_then(|artifact| artifact.parse().ok()),
                signals: SignalSeq(unsigned(row, 10)?),
            })
        })
    }

    fn put_instances(&mut self, replica: &str, instances: &[StoredInstance]) -> Result<(), StoreError> {
        self.write(|t| {
            t.execute("DELETE FROM instances WHERE replica = ?1", [replica])?;
            let sql = "INSERT OR REPLACE INTO instances VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
            let mut insert = t.prepare_cached(sql)?;
            for i in instances {
                insert.execute(params![
                    i.instance.as_str(),
                    i.host.as_str(),
                    i.address,
                    i.ready,
                    i.admin,
                    i.isolation,
                    replica,
                    signed(i.revision.0),
                    i.error,
                    i.artifact.map(|artifact| artifact.to_string()),
                    signed(i.signals.0)
                ])?;
            }
            Ok(())
        })
    }

    fn put_acknowledgements(&mut self, replica: &str, given: &[StoredAcknowledgement]) -> Result<(), StoreError> {
        self.write(|t| {
            let sql =
                "UPDATE instances SET revision = ?3, error = ?4, signals = ?5 WHERE instance = ?1 AND replica = ?2";
            let mut update = t.prepare_cached(sql)?;
            for one in given {
                let (revision, signals) = (signed(one.revision.0), signed(one.signals.0));
                update.execute(params![one.instance.as_str(), replica, revision, one.error, signals])?;
            }
            Ok(())
        })
    }

    fn acknowledgements(&mut self, replica: &str) -> Result<Vec<StoredAcknowledgement>, StoreError> {
        let sql = "SELECT instance, revision, error, signals FROM instances WHERE replica <> ?1";
        self.rows(sql, &[&replica], |row| {
            Ok(StoredAcknowledgement {
                instance: name(row, 0, InstanceId::parse)?,
                revision: Revision(unsigned(row, 1)?),
                error: row.get(2)?,
                signals: SignalSeq(unsigned(row, 3)?),
            })
        })
    }

    fn beat(&mut self, replica: &str, alive_ms: u64) -> Result<Vec<String>, StoreError> {
        self.write(|t| {
            let now: i64 = t.query_row("SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER)", [], |row| row.get(0))?;
            t.execute("INSERT OR REPLACE INTO replicas VALUES (?1, ?2)", params![replica, now])?;
            t.execute("DELETE FROM replicas WHERE seen_at_ms < ?1", [now - signed(DAY_MS)])?;
            let sql = "SELECT replica FROM replicas WHERE replica <> ?1 AND seen_at_ms >= ?2 ORDER BY 1";
            let mut others = t.prepare_cached(sql)?;
            let others = others.query_map(params![replica, now - signed(alive_ms)], |row| row.get(0))?;
            others.collect()
        })
    }

    fn put_serial(&mut self, serial: &IssuedSerial) -> Result<(), StoreError> {
        self.write(|t| {
            let day_ago = serial.issued_at_ms.saturating_sub(DAY_MS);
            t.execute("DELETE FROM serials WHERE expires_at_ms < ?1", [signed(day_ago)])?;
            t.execute(
                "INSERT INTO serials (serial, id, instance, issued_at_ms, expires_at_ms, host, key, authority)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    serial.serial.to_string(),
                    serial.id.as_str(),
                    serial.instance.as_ref().map(InstanceId::as_str),
                    signed(serial.issued_at_ms),
                    signed(serial.expires_at_ms),
                    serial.host.as_ref().map(ServiceName::as_str),
                    serial.key.map(|key| key.to_string()),
                    serial.authority
                ],
            )
            .map(drop)
        })
    }

    fn serials(&mut self, filter: &IdentityFilter, now_ms: u64, limit: u32) -> Result<Vec<IssuedSerial>, StoreError> {
        let sql = "SELECT serial, id, instance, host, key, issued_at_ms, expires_at_ms, authority FROM serials
                   WHERE expires_at_ms >= ?1 AND (?2 IS NULL OR serial = ?2) AND (?3 IS NULL OR id = ?3)
                   AND (?4 IS NULL OR host = ?4) AND (?5 IS NULL OR key = ?5) AND (?6 IS NULL OR authority = ?6)
                   AND (?7 IS NULL OR instance = ?7) ORDER BY issued_at_ms DESC, serial LIMIT ?8";
        let serial = filter.serial.map(|serial| serial.to_string());
        let id = filter.id.as_ref().map(SpiffeId::as_str);
        let host = filter.host.as_ref().map(ServiceName::as_str);
        let key = filter.key.map(|key| key.to_string());
        let instance = filter.instance.as_ref().map(InstanceId::as_str);
        self.rows(sql, &[&signed(now_ms), &serial, &id, &host, &key, &filter.authority, &instance, &limit], |row| {
            Ok(IssuedSerial {
                serial: parsed(row, 0)?,
                id: parsed(row, 1)?,
                instance: optional(row, 2, InstanceId::parse)?,
                host: optional(row, 3, ServiceName::parse)?,
                key: optional(row, 4, str::parse)?,
                issued_at_ms: unsigned(row, 5)?,
                expires_at_ms: unsigned(row, 6)?,
                authority: row.get(7)?,
            })
        })
    }

    fn put_revocations(
        &mut self,
        revoked: &[Revocation],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        self.write(|t| {
            let last = |t: &rusqlite::Transaction<'_>| {
                t.query_row("SELECT coalesce(max(seq), 0) FROM signals", [], |row| unsigned(row, 0))
            };
            let mut sequence = last(t)?;
            let ended = "DELETE FROM signals WHERE expires_at_ms < ?1 AND seq < ?2";
            t.execute(ended, params![signed(by.at_ms), signed(sequence)])?;
            let held: u64 =
                t.query_row("SELECT count(*) FROM signals WHERE what NOT LIKE '%:%'", [], |row| unsigned(row, 0))?;
            let known = "SELECT 1 FROM signals WHERE what = ?1";
            let insert = "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason)
                          VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            let (mut known, mut insert) = (t.prepare_cached(known)?, t.prepare_cached(insert)?);
            let mut new = Vec::new();
            for one in revoked {
                if !known.exists([one.serial.to_string()])? {
                    new.push(one);
                }
            }
            if held + new.len() as u64 > u64::from(max) {
                return Ok(None);
            }
            for Revocation { serial, expires_at_ms } in new {
                sequence += 1;
                let (serial, expires_at_ms, at_ms) = (serial.to_string(), signed(*expires_at_ms), signed(by.at_ms));
                insert.execute(params![signed(sequence), serial, expires_at_ms, at_ms, by.by, by.reason])?;
            }
            Ok(Some(SignalSeq(sequence)))
        })
    }

    fn put_token_revocation(
        &mut self,
        meant: &TokensMeant,
        expires_at_ms: u64,
        by: &RevokedBy,
        max: u32,
    ) -> Result<(SignalSeq, TokensMeant), StoreError> {
        self.write(|t| {
            let last: u64 = t.query_row("SELECT coalesce(max(seq), 0) FROM signals", [], |row| unsigned(row, 0))?;
            let ended = "DELETE FROM signals WHERE expires_at_ms < ?1 AND seq < ?2";
            t.execute(ended, params![signed(by.at_ms), signed(last)])?;
            let tokens = "SELECT count(*) FROM signals WHERE what LIKE 'tokens:%'";
            let held: u64 = t.query_row(tokens, [], |row| unsigned(row, 0))?;
            let meant = if held < u64::from(max) { meant.clone() } else { TokensMeant::All };
            let what = tokens_to_text(&meant);
            t.execute(
                "DELETE FROM signals WHERE what = ?1 OR ?2 AND what LIKE 'tokens:%'",
                params![what, meant == TokensMeant::All],
            )?;
            t.execute(
                "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![signed(last + 1), what, signed(expires_at_ms), signed(by.at_ms), by.by, by.reason],
            )?;
            Ok((SignalSeq(last + 1), meant))
        })
    }

    fn put_statements(
        &mut self,
        statements: &[Statement],
        by: &RevokedBy,
        max: u32,
    ) -> Result<Option<SignalSeq>, StoreError> {
        self.write(|t| {
            let last: u64 = t.query_row("SELECT coalesce(max(seq), 0) FROM signals", [], |row| unsigned(row, 0))?;
            let ended = "DELETE FROM signals WHERE expires_at_ms < ?1 AND seq < ?2";
            t.execute(ended, params![signed(by.at_ms), signed(last)])?;
            let held = "SELECT count(*) FROM signals WHERE what LIKE 'stated:%' AND expires_at_ms >= ?1";
            let held: u64 = t.query_row(held, [signed(by.at_ms)], |row| unsigned(row, 0))?;
            let (mut numbered, mut added) = (Vec::with_capacity(statements.len()), 0);
            for (statement, number) in statements.iter().zip(1..) {
                let what = statement_to_text(statement);
                let before = t.query_row("SELECT at_ms FROM signals WHERE what = ?1", [&what], |row| unsigned(row, 0));
                let before: Option<u64> = before.optional()?;
                added += u64::from(before.is_none());
                let issued_at_ms = before.map_or(by.at_ms, |before| by.at_ms.max(before + 1));
                numbered.push((last + number, what, Statement { issued_at_ms, ..statement.clone() }));
            }
            if held + added > u64::from(max) {
                return Ok(None);
            }
            let mut forget = t.prepare_cached("DELETE FROM signals WHERE what = ?1")?;
            let insert = "INSERT INTO signals (seq, what, expires_at_ms, at_ms, actor, reason, statement)
                          VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
            let mut insert = t.prepare_cached(insert)?;
            for (number, what, one) in &numbered {
                forget.execute([what])?;
                let json =
                    serde_json::to_string(one).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
                let (expires_at_ms, at_ms, json) = (signed(one.expires_at_ms), signed(one.issued_at_ms), json);
                insert.execute(params![signed(*number), what, expires_at_ms, at_ms, by.by, by.reason, json])?;
            }
            Ok(Some(SignalSeq(last + numbered.len() as u64)))
        })
    }

    fn put_tokens(&mut self, tokens: &[StoredToken], now_ms: u64) -> Result<(), StoreError> {
        let encoded = tokens.iter().map(|one| serde_json::to_vec(&one.claims)).collect::<Result<Vec<_>, _>>();
        let encoded = encoded.map_err(|error| StoreError::Failed(error.to_string()))?;
        self.write(|t| {
            t.execute("DELETE FROM tokens WHERE expires_at_ms < ?1", [signed(now_ms)])?;
            let mut insert =
                t.prepare_cached("INSERT INTO tokens VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT DO NOTHING")?;
            for (StoredToken { claims, host }, encoded) in tokens.iter().zip(&encoded) {
                insert.execute(params![
                    claims.id.to_string(),
                    claims.subject.as_str(),
                    claims.audience.as_str(),
                    claims.instance.as_ref().map_or("", InstanceId::as_str),
                    host.as_ref().map_or("", ServiceName::as_str),
                    claims.expires_at * 1000,
                    encoded
                ])?;
            }
            Ok(())
        })
    }

    fn tokens(&mut self, filter: &TokenFilter, now_ms: u64, limit: u32) -> Result<Vec<StoredToken>, StoreError> {
        let TokenFilter { id, subject, service, instance, host } = filter;
        let sql = "SELECT host, claims FROM tokens
                   WHERE expires_at_ms >= ?1 AND (?2 IS NULL OR id = ?2) AND (?3 IS NULL OR subject LIKE ?3)
                   AND (?4 IS NULL OR audience LIKE ?4) AND (?5 IS NULL OR instance = ?5) AND (?6 IS NULL OR host = ?6)
                   ORDER BY id DESC LIMIT ?7";
        // A name of a service has no sign that `LIKE` reads.
        let of_service = |service: &Option<ServiceName>| service.as_ref().map(|name| format!("spiffe://%/{name}"));
        let (subject, audience, id) = (of_service(subject), of_service(service), id.map(|id| id.to_string()));
        let (instance, host) = (instance.as_ref().map(InstanceId::as_str), host.as_ref().map(ServiceName::as_str));
        self.rows(sql, &[&signed(now_ms), &id, &subject, &audience, &instance, &host, &limit], |row| {
            let claims: Vec<u8> = row.get(1)?;
            let unreadable =
                |error: serde_json::Error| rusqlite::Error::FromSqlConversionFailure(1, Type::Blob, Box::new(error));
            let claims = serde_json::from_slice(&claims).map_err(unreadable)?;
            let host: String = row.get(0)?;
            let host = (!host.is_empty()).then(|| ServiceName::parse(&host)).transpose();
            let host = host.map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(error)));
            Ok(StoredToken { claims, host: host? })
        })
    }

    fn signals(&mut self, after: SignalSeq) -> Result<Vec<StoredSignal>, StoreError> {
        let sql =
            "SELECT seq, what, expires_at_ms, at_ms, actor, reason, statement FROM signals WHERE seq > ?1 ORDER BY seq";
        self.rows(sql, &[&signed(after.0)], |row| {
            let what: String = row.get(1)?;
            let (expires_at_ms, at_ms) = (unsigned(row, 2)?, unsigned(row, 3)?);
            let statement: Option<String> = row.get(6)?;
            let unknown = || rusqlite::Error::FromSqlConversionFailure(1, Type::Text, "it is no signal".into());
            Ok(StoredSignal {
                sequence: SignalSeq(unsigned(row, 0)?),
                signal: signal_of_text(&what, statement.as_deref(), expires_at_ms, at_ms).ok_or_else(unknown)?,
                by: RevokedBy { at_ms, by: row.get(4)?, reason: row.get(5)? },
            })
        })
    }

    fn put_report(&mut self, records: &[DecisionRecord], edges: &[EdgeCount], now_ms: u64) -> Result<(), StoreError> {
        let encoded: Vec<_> = records
            .iter()
            .map(|record| serde_json::to_vec(record).map(|bytes| (record, bytes)))
            .collect::<Result<_, _>>()
            .map_err(|e| StoreError::Failed(e.to_string()))?;
        self.write(|t| {
            let mut insert =
                t.prepare_cached("INSERT INTO records (id, at_ms, record) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING")?;
            for (record, bytes) in &encoded {
                insert.execute(params![&*record.id, signed(record.at_ms), bytes])?;
            }
            let mut add = t.prepare_cached(
                "INSERT INTO edges VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE SET
                 permits = permits + ?4, revision = max(revision, ?5), seen_at_ms = ?6",
            )?;
            for edge in edges {
                add.execute(params![
                    edge.principal.as_str(),
                    edge.service.as_str(),
                    &*edge.action,
                    signed(edge.permits),
                    signed(edge.revision.0),
                    signed(now_ms)
                ])?;
            }
            t.execute("DELETE FROM records WHERE seq <= (SELECT max(seq) FROM records) - ?1", [RECORDS_MAX])?;
            t.execute(
                "DELETE FROM edges WHERE (principal, service, action) IN (SELECT principal, service, action FROM edges
                 ORDER BY seen_at_ms LIMIT max(0, (SELECT count(*) FROM edges) - ?1))",
                [EDGES_MAX],
            )?;
            Ok(())
        })
    }

    fn records(&mut self, filter: &RecordFilter) -> Result<Vec<DecisionRecord>, StoreError> {
        let limit = crate::decisions::limit_of(filter);
        let since = signed(filter.since_ms.unwrap_or(0));
        let sql = "SELECT record FROM records WHERE at_ms >= ?1 ORDER BY at_ms DESC, id DESC LIMIT ?2";
        let read = (|| {
            let mut statement = self.connection.prepare_cached(sql)?;
            let mut rows = statement.query(params![since, RECORDS_READ_MAX])?;
            let mut found: Vec<DecisionRecord> = Vec::new();
            while let Some(row) = rows.next()? {
                let Ok(record) = serde_json::from_slice(row.get_ref(0)?.as_blob()?) else { continue };
                if crate::decisions::matches(filter, &record) {
                    found.push(record);
                    if found.len() >= limit {
                        break;
                    }
                }
            }
            Ok(found)
        })();
        read.map_err(|e| sort(e, &self.path))
    }

    fn callers(&mut self, service: &ServiceName, limit: u32) -> Result<Vec<Caller>, StoreError> {
        let sql = "SELECT principal, action, permits, revision, seen_at_ms FROM edges WHERE service = ?1
                   ORDER BY permits DESC, principal, action LIMIT ?2";
        self.rows(sql, &[&service.as_str(), &limit], |row| {
            Ok(Caller {
                principal: name(row, 0, countersign_core::identity::SpiffeId::parse)?,
                action: row.get(1)?,
                permits: unsigned(row, 2)?,
                revision: Revision(unsigned(row, 3)?),
                seen_at_ms: unsigned(row, 4)?,
            })
        })
    }
}

fn sealed_of(connection: &Connection) -> rusqlite::Result<Vec<(SealedAt, Vec<u8>)>> {
    let mut found = Vec::new();
    let mut keys = connection.prepare("SELECT name, bytes FROM keys")?;
    let is_secret = |name: &String| !name.ends_with(CERTIFICATE_SUFFIX) && !name.starts_with(NOTE_PREFIX);
    for key in keys.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get(1)?)))? {
        let (name, bytes) = key?;
        if is_secret(&name) {
            found.push((SealedAt::Key(name), bytes));
        }
    }
    let mut codes = connection.prepare("SELECT factor, sealed FROM codes")?;
    for code in codes.query_map([], |row| Ok((SealedAt::Codes(name(row, 0, FactorId::parse)?), row.get(1)?)))? {
        found.push(code?);
    }
    let mut head = connection.prepare("SELECT seal FROM head")?;
    for seal in head.query_map([], |row| row.get(0))? {
        found.push((SealedAt::Head, seal?));
    }
    Ok(found)
}

fn migrate(connection: &mut Connection, path: &str) -> Result<(), StoreError> {
    let wrong = |e| sort(e, path);
    let known = SCHEMA.len() as u32;
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(wrong)?;
    if found > known {
        return Err(StoreError::Newer { path: path.into(), found, known });
    }
    for (step, sql) in SCHEMA.iter().enumerate().skip(found as usize) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(wrong)?;
        transaction.execute_batch(sql).map_err(wrong)?;
        transaction.pragma_update(None, "user_version", step as u32 + 1).map_err(wrong)?;
        transaction.commit().map_err(wrong)?;
    }
    Ok(())
}

/// The file with mode 0600, whatever the umask; the files that SQLite makes beside it take its mode.
fn make_private(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(0o600))
}

fn unusable(error: &io::Error, path: &str) -> StoreError {
    match error.kind() {
        io::ErrorKind::StorageFull => StoreError::Full(path.into()),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly(path.into()),
        _ => StoreError::Failed(format!("could not open `{path}`: {error}")),
    }
}

pub(super) fn sort(error: rusqlite::Error, path: &str) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full(path.into()),
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            StoreError::ReadOnly(path.into())
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Damaged { path: path.into(), what: error.to_string() }
        }
        Some(_) => StoreError::Failed(error.to_string()),
        // A column that does not hold what the schema says was not written by us.
        None => StoreError::Damaged { path: path.into(), what: error.to_string() },
    }
}

/// SQLite integers are signed; no count or time of ours comes near the sign.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let n: i64 = row.get(column)?;
    u64::try_from(n).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, n))
}

fn stored_proposal(row: &Row<'_>) -> rusqlite::Result<StoredProposal> {
    Ok(StoredProposal {
        id: row.get(0)?,
        version: unsigned(row, 1)?,
        expires_at_ms: unsigned(row, 2)?,
        is_open: row.get(3)?,
        document: row.get(4)?,
    })
}

fn names_of_text(column: usize, text: &str) -> rusqlite::Result<BTreeSet<ServiceName>> {
    serde_json::from_str(text).map_err(|error| misread(column, error))
}

fn digest(row: &Row<'_>, column: usize) -> rusqlite::Result<Digest> {
    row.get(column).map(Digest)
}

fn name<T>(row: &Row<'_>, column: usize, parse: fn(&str) -> Result<T, NameError>) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    parse(&text).map_err(|error| misread(column, error))
}

fn parsed<T: FromStr<Err: Error + Send + Sync + 'static>>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    text.parse().map_err(|error| misread(column, error))
}

fn optional<T, E: Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: usize,
    parse: fn(&str) -> Result<T, E>,
) -> rusqlite::Result<Option<T>> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| parse(&text)).transpose().map_err(|error| misread(column, error))
}

fn misread(column: usize, error: impl Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (SqliteStore, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        (SqliteStore::open(&dir.path().join("control.db")).unwrap(), dir)
    }

    fn host(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    #[test]
    fn a_file_of_an_earlier_version_is_brought_up_to_date_with_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(SCHEMA[0]).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        let hash = Digest::of(b"given out before");
        old.execute("INSERT INTO invitations VALUES (?1, 1000, NULL, NULL)", [hash.0]).unwrap();
        drop(old);
        let mut store = SqliteStore::open(&path).unwrap();
        assert_eq!(store.spend_invitation(&hash, &host("h1"), 0).unwrap(), Spent::Admitted(None));
    }

    #[test]
    fn what_was_written_is_there_for_the_next_one_who_opens_the_file() {
        let (mut store, dir) = open();
        store.put_keys(&[("a", b"1"), ("b", b"2")]).unwrap();
        let pragma = |store: &SqliteStore, name| -> String {
            store
                .connection
                .pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0))
                .map(|v| format!("{v:?}"))
                .unwrap()
        };
        assert_eq!(pragma(&store, "journal_mode"), "Text(\"wal\")");
        assert_eq!(pragma(&store, "synchronous"), "Integer(2)", "FULL: a commit is fsynced");
        std::mem::forget(store); // not closed: as a crash leaves it
        let mut again = SqliteStore::open(&dir.path().join("control.db")).unwrap();
        assert_eq!(again.key("b").unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(again.key("c").unwrap(), None);
    }
}
