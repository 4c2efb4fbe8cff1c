//! From the embedded store to the shared one: every table, in one transaction, and nothing is kept of it unless the copied ledger
//! adds up to the root of the original. The original is only read.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, types::Value};
use tokio_postgres::types::ToSql;

use countersign_core::{
    canonical::Digest,
    ledger::{Frontier, hash_leaf},
};

use super::{
    StoreError,
    postgres::{Broken, PostgresStore, Session, Turn, get},
    sqlite,
};

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// Entries of the ledger.
    pub entries: u64,
    /// The root over them, computed from the copy.
    pub root: Digest,
    /// Rows of all tables.
    pub rows: u64,
}

/// What agents say anew by themselves.
const LEFT_OUT: [&str; 2] = ["instances", "replicas"];

/// Copies the file `from` into the empty database `to`. Must not be called by a task: it waits.
///
/// INVARIANT (migrated-whole): the database holds all of the file, and its ledger adds up to the same root, or nothing.
pub fn migrate(from: &Path, to: &mut PostgresStore) -> Result<Migrated, StoreError> {
    let shown = from.display().to_string();
    let wrong = |error| sqlite::sort(error, &shown);
    // Brings the file up to this version first: tables and columns are the same then.
    if !from.is_file() {
        return Err(StoreError::Failed(format!("there is no file `{shown}`")));
    }
    drop(sqlite::SqliteStore::open(from)?);
    let file = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(wrong)?;
    // One moment of the file for all tables.
    file.execute_batch("BEGIN").map_err(wrong)?;
    let head = file.query_row("SELECT size, root FROM head", [], |row| Ok((row.get(0)?, row.get(1)?)));
    let (size, root): (i64, [u8; 32]) = head.map_err(|error| match error {
        rusqlite::Error::QueryReturnedNoRows => StoreError::Failed(format!("`{shown}` holds no ledger")),
        other => wrong(other),
    })?;
    to.write(Turn::Schema, |s| {
        for table in ["head", "entries", "keys", "hosts", "proposals"] {
            if s.first(&format!("SELECT 1 FROM {table} LIMIT 1"), &[])?.is_some() {
                return Err(refused(format!("the database is not empty: table `{table}` has rows")));
            }
        }
        let mut rows = 0;
        for table in tables(s)? {
            rows += copy(&file, s, &table)?;
        }
        let copied = ledger_of(s)?;
        if copied != (size as u64, Digest(root)) {
            return Err(refused(format!(
                "the copied ledger adds up to {} at {}, the file says {} at {size}: nothing was kept",
                copied.1.short(),
                copied.0,
                Digest(root).short()
            )));
        }
        Ok(Migrated { entries: copied.0, root: copied.1, rows })
    })
}

fn refused(what: String) -> Broken {
    Broken::Refused(StoreError::Failed(what))
}

fn tables(s: &Session<'_>) -> Result<Vec<String>, Broken> {
    let sql = "SELECT table_name::TEXT FROM information_schema.tables
               WHERE table_schema = current_schema() AND table_name <> 'countersign_schema' ORDER BY 1";
    let names = s.rows(sql, &[])?.iter().map(|row| get(row, 0)).collect::<Result<Vec<String>, _>>()?;
    Ok(names.into_iter().filter(|name| !LEFT_OUT.contains(&name.as_str())).collect())
}

fn copy(file: &Connection, s: &Session<'_>, table: &str) -> Result<u64, Broken> {
    let sql = "SELECT column_name::TEXT, data_type::TEXT FROM information_schema.columns
               WHERE table_schema = current_schema() AND table_name = $1 ORDER BY ordinal_position";
    let columns = s.rows(sql, &[&table])?;
    let columns = columns
        .iter()
        .map(|row| Ok((get(row, 0)?, get(row, 1)?)))
        .collect::<Result<Vec<(String, String)>, Broken>>()?;
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let places: Vec<String> = (1..=names.len()).map(|n| format!("${n}")).collect();
    let insert = format!("INSERT INTO {table} ({}) VALUES ({})", names.join(", "), places.join(", "));
    let unread = |error| Broken::Refused(sqlite::sort(error, table));
    let mut read = file.prepare(&format!("SELECT {} FROM {table}", names.join(", "))).map_err(unread)?;
    let mut rows = read.query([]).map_err(unread)?;
    let mut count = 0;
    while let Some(row) = rows.next().map_err(unread)? {
        let values = columns.iter().enumerate().map(|(at, (name, kind))| {
            value(row.get(at)?, kind).ok_or_else(|| rusqlite::Error::InvalidColumnName(name.clone()))
        });
        let values = values.collect::<rusqlite::Result<Vec<_>>>().map_err(unread)?;
        let parameters: Vec<&(dyn ToSql + Sync)> = values.iter().map(|value| &**value).collect();
        s.execute(&insert, &parameters)?;
        count += 1;
    }
    if names.contains(&"seq") {
        let sql = format!(
            "SELECT setval(pg_get_serial_sequence('{table}', 'seq'), coalesce(max(seq), 0) + 1, false) FROM {table}"
        );
        s.rows(&sql, &[])?;
    }
    Ok(count)
}

/// As a column of type `kind` takes it.
fn value(value: Value, kind: &str) -> Option<Box<dyn ToSql + Sync>> {
    Some(match (kind, value) {
        ("bigint", Value::Integer(n)) => Box::new(n),
        ("boolean", Value::Integer(n)) => Box::new(n != 0),
        ("text", Value::Text(text)) => Box::new(text),
        ("bytea", Value::Blob(bytes)) => Box::new(bytes),
        ("bigint", Value::Null) => Box::new(None::<i64>),
        ("text", Value::Null) => Box::new(None::<String>),
        _ => return None,
    })
}

/// Size and root of what was copied, from the bytes of the entries.
fn ledger_of(s: &Session<'_>) -> Result<(u64, Digest), Broken> {
    let mut tree = Frontier::default();
    loop {
        let from = tree.size() as i64;
        let page = s.rows("SELECT idx, entry FROM entries WHERE idx >= $1 ORDER BY idx LIMIT 256", &[&from])?;
        if page.is_empty() {
            return Ok((tree.size(), tree.root()));
        }
        for row in &page {
            if get::<i64>(row, 0)? as u64 != tree.size() {
                return Err(refused(format!("entry {} is missing", tree.size())));
            }
            tree.append(hash_leaf(get(row, 1)?));
        }
    }
}
