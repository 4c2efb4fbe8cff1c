//! Appending to the ledger on SQLite and on a PostgreSQL server of its own, and beside each what the same database takes for one row of
//! the same bytes in a transaction of its own: what is durable costs that much at least. Prints one JSON object on its last line.
//!
//! | case | is |
//! |---|---|
//! | `row` | one INSERT of an entry's bytes, committed; the peer |
//! | `entry` | an entry with its leaf, change-set, text and sealed head, by compare and swap: what the ledger asks of its store |
//! | `apply` | a change through the socket: gate, fold, entry, checkpoint, told to nobody |
//!
//! All of them one after the other, as a ledger is written, and interleaved in rounds.

#[path = "../tests/support/mod.rs"]
mod support;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Instant};

use countersign_api::local::KeyPlace;
use countersign_control::{
    ControlConfig, start,
    store::{
        NewEntry, Store,
        postgres::{PostgresStore, PostgresUrl},
        sqlite::SqliteStore,
    },
};
use countersign_core::canonical::Digest;
use countersign_testkit::postgres::Server;
use serde_json::json;
use support::{Plane, config, permit};
use tokio::runtime::Runtime;

const ROUNDS: u64 = 20;
const IN_A_ROUND: u64 = 25;
/// As long as an entry, its change-set and its policy are in a small mesh.
const ROW_BYTES: usize = 700;

/// One way to write, by a running number.
type Write<'a> = Box<dyn FnMut(u64) + 'a>;

fn entry(index: u64) -> NewEntry {
    let text = format!("@id(\"p\") permit (principal == Workload::\"w{index}\", action, resource);");
    NewEntry {
        index,
        entry: vec![b'e'; 220],
        leaf: Digest::of(&index.to_be_bytes()),
        root: Digest::of(&index.to_le_bytes()),
        seal: vec![b's'; 120],
        digest: Digest::of(format!("set {index}").as_bytes()),
        change_set: vec![b'c'; 260],
        bodies: vec![(Digest::of(text.as_bytes()), Arc::from(text))],
    }
}

fn rows_of_sqlite(path: PathBuf) -> Write<'static> {
    let file = rusqlite::Connection::open(path).unwrap();
    file.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE rows (n INTEGER PRIMARY KEY, b BLOB)",
    )
    .unwrap();
    Box::new(move |n| {
        file.execute("INSERT INTO rows VALUES (?1, ?2)", rusqlite::params![n as i64, vec![b'r'; ROW_BYTES]]).unwrap();
    })
}

fn rows_of_postgres(server: &Server, runtime: &Arc<Runtime>) -> Write<'static> {
    let runtime = runtime.clone();
    let client = runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("CREATE TABLE rows (n BIGINT PRIMARY KEY, b BYTEA)").await.unwrap();
        client
    });
    Box::new(move |n| {
        let row = vec![b'r'; ROW_BYTES];
        runtime.block_on(client.execute("INSERT INTO rows VALUES ($1, $2)", &[&(n as i64), &row])).unwrap();
    })
}

fn entries_of(mut store: impl Store + 'static) -> Write<'static> {
    Box::new(move |n| store.append(&entry(n)).unwrap())
}

fn applies(plane: Plane, runtime: &Arc<Runtime>) -> Write<'static> {
    let runtime = runtime.clone();
    let mut revision = runtime.block_on(plane.create(&["web", "catalog"])).revision.0;
    Box::new(move |n| {
        let from = if n.is_multiple_of(2) { "web" } else { "catalog" };
        let (change, bodies) = permit("p", from, "catalog");
        revision = runtime.block_on(plane.apply_with(revision, vec![change], bodies)).unwrap().revision.0;
    })
}

fn at(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn main() {
    let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap());
    let dir = tempfile::tempdir().unwrap();
    // Two servers: what the ledger's store and the whole control plane write must not be in one database.
    let (server, whole) = (Server::start(), Server::start());
    let url = |server: &Server| PostgresUrl::parse(&server.url()).unwrap();
    let shared = runtime.block_on(async {
        let data = tempfile::tempdir().unwrap();
        let key = Some(KeyPlace::File(data.path().join("kek")));
        let store = Some(url(&whole));
        let control = start(ControlConfig { store, key, ..config(data.path().into()) }).await.unwrap();
        Plane { control, dir: data }
    });
    let embedded = runtime.block_on(Plane::start());
    let mut writes: Vec<(&str, &str, Write<'_>)> = vec![
        ("sqlite", "row", rows_of_sqlite(dir.path().join("rows.db"))),
        ("sqlite", "entry", entries_of(SqliteStore::open(&dir.path().join("control.db")).unwrap())),
        ("sqlite", "apply", applies(embedded, &runtime)),
        ("postgresql", "row", rows_of_postgres(&server, &runtime)),
        ("postgresql", "entry", entries_of(PostgresStore::open(url(&server)).unwrap())),
        ("postgresql", "apply", applies(shared, &runtime)),
    ];
    let mut took: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..ROUNDS {
        for (store, case, write) in &mut writes {
            for n in round * IN_A_ROUND..(round + 1) * IN_A_ROUND {
                let began = Instant::now();
                write(n);
                took.entry((store, case)).or_default().push(began.elapsed().as_secs_f64());
            }
        }
    }
    let mut result = serde_json::Map::new();
    for ((store, case), mut seconds) in took {
        let per_second = seconds.len() as f64 / seconds.iter().sum::<f64>();
        seconds.sort_by(f64::total_cmp);
        let (p50, p99) = (at(&seconds, 0.5) * 1e3, at(&seconds, 0.99) * 1e3);
        eprintln!("{store:>12} {case:>6}: {per_second:>8.0} a second, p50 {p50:.2} ms, p99 {p99:.2} ms");
        let measured = json!({ "per_second": per_second, "p50_ms": p50, "p99_ms": p99 });
        result.insert(format!("{store}_{case}"), measured);
    }
    println!("{}", serde_json::Value::Object(result));
}
