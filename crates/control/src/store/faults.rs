//! The fault table: every write of a store, once lost and once kept but reported lost, and then asked for again as whoever got no
//! answer would. SQLite fails by a store in front of it; PostgreSQL by a connection that is cut before, or after, its COMMIT.
//!
//! What was lost has left nothing behind; what was kept is whole; asking again never does it twice.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use countersign_core::{
    change::Revision,
    identity::{FactorId, InstanceId},
    record::EdgeCount,
};
use countersign_testkit::{
    partition::{Cut, Partition},
    postgres::Server,
};

use super::{
    postgres::{PostgresStore, PostgresUrl},
    sqlite::SqliteStore,
    testing::{Fault, Faults, open_postgres},
    *,
};

/// Some time, in milliseconds since 1970.
const NOW: u64 = 1_700_000_000_000;
const LATER: u64 = NOW + 60_000;

/// One write. `n` keeps the runs of a case apart: 0 without a fault, then one for each fault.
struct Case {
    /// The method of [`Store`].
    write: &'static str,
    /// Makes what the write needs.
    before: fn(&mut dyn Store, u64),
    /// Does it; says what was answered.
    act: fn(&mut dyn Store, u64) -> Result<String, StoreError>,
    /// What of it can be seen.
    look: fn(&mut dyn Store, u64) -> String,
    /// What whoever asks again is answered when it had been kept.
    again: &'static str,
}

/// The methods of [`Store`] that write nothing.
const READS: [&str; 23] = [
    "place",
    "is_shared",
    "head",
    "entries",
    "bodies",
    "has_keys",
    "key",
    "keys",
    "sealed",
    "codes",
    "proposal",
    "proposals",
    "document",
    "documents",
    "entitlements",
    "hosts",
    "instances",
    "acknowledgements",
    "records",
    "callers",
    "serials",
    "signals",
    "tokens",
];

fn nothing(_: &mut dyn Store, _: u64) {}

fn stated(n: u64) -> Statement {
    let written = serde_json::json!({
        "subject": format!("workload:{}", named(n)), "kind": "risk", "value": "80", "source": "operator:alice",
        "issued_at_ms": NOW, "expires_at_ms": LATER,
    });
    serde_json::from_value(written).unwrap()
}

fn named(n: u64) -> ServiceName {
    ServiceName::parse(&format!("n{n}")).unwrap()
}

fn operator(n: u64) -> OperatorName {
    OperatorName::parse(&format!("o{n}")).unwrap()
}

fn factor(n: u64) -> FactorId {
    FactorId::parse(&format!("factor-{n}")).unwrap()
}

fn hash(n: u64) -> Digest {
    Digest::of(&n.to_be_bytes())
}

fn key(store: &mut dyn Store, name: &str) -> String {
    store.key(name).unwrap().map_or_else(|| "none".to_owned(), |bytes| String::from_utf8(bytes).unwrap())
}

fn invitation() -> NewInvitation {
    NewInvitation { expires_at_ms: LATER, host: None, services: Some(BTreeSet::from([named(9)])) }
}

fn proposal(n: u64, version: u64) -> StoredProposal {
    StoredProposal {
        id: format!("p{n}"),
        version,
        expires_at_ms: LATER,
        is_open: true,
        document: format!("version {version}").into_bytes(),
    }
}

fn document(n: u64, bytes: &str) -> Document {
    Document { kind: "test", key: format!("d{n}"), bytes: bytes.into(), expires_at_ms: LATER }
}

fn codes(n: u64) -> StoredCodes {
    StoredCodes { factor: factor(n), operator: operator(n), sealed: b"sealed".to_vec(), last_step: 0 }
}

fn instance(n: u64, suffix: &str) -> StoredInstance {
    StoredInstance {
        instance: InstanceId::new(&named(n), suffix),
        host: named(n),
        address: "127.0.0.1:1".into(),
        ready: true,
        admin: String::new(),
        isolation: "none".into(),
        replica: String::new(),
        revision: Revision(1),
        error: None,
        artifact: None,
        signals: SignalSeq(0),
    }
}

fn answered<T: std::fmt::Debug>(answer: Result<T, StoreError>) -> Result<String, StoreError> {
    answer.map(|answer| format!("{answer:?}"))
}

const CASES: [Case; 32] = [
    Case {
        write: "append",
        before: nothing,
        act: |store, n| {
            let entry = NewEntry {
                index: n,
                entry: b"entry".to_vec(),
                leaf: hash(n),
                root: hash(n),
                seal: b"seal".to_vec(),
                digest: hash(100 + n),
                change_set: b"set".to_vec(),
                bodies: vec![(hash(200 + n), "text".into())],
            };
            match store.append(&entry) {
                Err(StoreError::Taken(_)) => Ok("taken".to_owned()),
                answer => answered(answer),
            }
        },
        look: |store, n| {
            let entries = store.entries(n, 10).unwrap().len();
            format!(
                "{entries} {} {}",
                store.bodies(&[hash(200 + n)]).unwrap().len(),
                store.head().unwrap().map_or(0, |head| head.size).saturating_sub(n)
            )
        },
        again: "taken",
    },
    Case {
        write: "put_keys",
        before: nothing,
        act: |store, n| answered(store.put_keys(&[(&format!("put-{n}"), b"1"), (&format!("put-too-{n}"), b"2")])),
        look: |store, n| format!("{} {}", key(store, &format!("put-{n}")), key(store, &format!("put-too-{n}"))),
        again: "()",
    },
    Case {
        write: "create_keys",
        before: nothing,
        act: |store, n| answered(store.create_keys(&[(&format!("new-{n}"), b"1"), (&format!("new-too-{n}"), b"2")])),
        look: |store, n| format!("{} {}", key(store, &format!("new-{n}")), key(store, &format!("new-too-{n}"))),
        again: "false",
    },
    Case {
        write: "swap_key",
        before: |store, n| store.put_keys(&[(&format!("swap-{n}"), b"1")]).unwrap(),
        act: |store, n| answered(store.swap_key(&format!("swap-{n}"), b"1", &[(&format!("swap-{n}"), b"2")])),
        look: |store, n| key(store, &format!("swap-{n}")),
        again: "false",
    },
    Case {
        write: "reseal",
        before: |store, _| {
            // It replaces everything sealed, so nothing else of the kind may be there.
            let names: Vec<_> = store.sealed().unwrap().into_iter().collect();
            let next = |(at, seen): (SealedAt, Vec<u8>)| Resealed { at, seen, next: b"first".to_vec() };
            let resealed: Vec<_> = names.into_iter().map(next).collect();
            assert!(store.reseal(&resealed, &[]).unwrap());
        },
        act: |store, n| {
            let sealed = store.sealed()?;
            let next = |(at, _)| Resealed { at, seen: b"first".to_vec(), next: b"second".to_vec() };
            let resealed: Vec<_> = sealed.into_iter().map(next).collect();
            answered(store.reseal(&resealed, &[(&format!("note/{n}"), b"1")]))
        },
        look: |store, n| {
            let sealed: BTreeSet<_> = store.sealed().unwrap().into_iter().map(|(_, bytes)| bytes).collect();
            let sealed: Vec<_> = sealed.iter().map(|bytes| String::from_utf8_lossy(bytes)).collect();
            format!("{sealed:?} {}", key(store, &format!("note/{n}")))
        },
        again: "false",
    },
    Case {
        write: "put_invitation",
        before: nothing,
        // Whoever got no answer makes another token.
        act: |store, n| {
            answered(store.put_invitation(&Digest::of(&fastrand::u128(..).to_be_bytes()), &invitation(), n))
        },
        look: |_, _| String::new(),
        again: "true",
    },
    Case {
        write: "spend_invitation",
        before: |store, n| assert!(store.put_invitation(&hash(n), &invitation(), NOW).unwrap()),
        act: |store, n| answered(store.spend_invitation(&hash(n), &named(n), NOW)),
        look: |store, n| format!("{:?}", store.entitlements().unwrap().iter().any(|(host, _)| *host == named(n))),
        again: "Used",
    },
    Case {
        write: "put_codes",
        before: nothing,
        // Each attempt makes a factor of its own; one that no entry names verifies nothing.
        act: |store, _| answered(store.put_codes(&codes(fastrand::u64(1_000..)))),
        look: |_, _| String::new(),
        again: "()",
    },
    Case {
        write: "use_step",
        before: |store, n| store.put_codes(&codes(10 + n)).unwrap(),
        act: |store, n| answered(store.use_step(&factor(10 + n), 7)),
        look: |store, n| store.codes(&operator(10 + n)).unwrap()[0].last_step.to_string(),
        again: "false",
    },
    Case {
        write: "put_recovery",
        before: nothing,
        act: |store, _| answered(store.put_recovery(&factor(fastrand::u64(1_000..)), &[hash(1), hash(2)])),
        look: |_, _| String::new(),
        again: "()",
    },
    Case {
        write: "spend_recovery",
        before: |store, n| store.put_recovery(&factor(30 + n), &[hash(1), hash(2)]).unwrap(),
        act: |store, n| answered(store.spend_recovery(&factor(30 + n), &hash(1))),
        look: |_, _| String::new(),
        again: "false",
    },
    Case {
        write: "forget_factors",
        before: |store, n| store.put_codes(&codes(40 + n)).unwrap(),
        act: |store, n| answered(store.forget_factors(&[factor(40 + n)])),
        look: |store, n| store.codes(&operator(40 + n)).unwrap().len().to_string(),
        again: "()",
    },
    Case {
        write: "count_guess",
        before: nothing,
        // One too many is counted, never one too few.
        act: |store, n| answered(store.count_guess(&operator(n), NOW, 0, 3)),
        look: |_, _| String::new(),
        again: "None",
    },
    Case {
        write: "forget_guesses",
        before: |store, n| assert_eq!(store.count_guess(&operator(50 + n), NOW, 0, 1).unwrap(), None),
        act: |store, n| answered(store.forget_guesses(&operator(50 + n))),
        look: |_, _| String::new(),
        again: "()",
    },
    Case {
        write: "put_operator_invitation",
        before: nothing,
        act: |store, n| answered(store.put_operator_invitation(&operator(n), &hash(n), LATER)),
        look: |store, n| store.operator_invitation(&operator(n), &hash(n), NOW, false).unwrap().to_string(),
        again: "()",
    },
    Case {
        write: "operator_invitation",
        before: |store, n| store.put_operator_invitation(&operator(10 + n), &hash(n), LATER).unwrap(),
        act: |store, n| answered(store.operator_invitation(&operator(10 + n), &hash(n), NOW, true)),
        look: |store, n| store.operator_invitation(&operator(10 + n), &hash(n), NOW, false).unwrap().to_string(),
        again: "false",
    },
    Case {
        write: "put_proposal",
        before: nothing,
        act: |store, n| match store.put_proposal(&proposal(n, 1), NOW) {
            // Another one has this id; whoever got no answer takes another.
            Err(StoreError::Failed(_)) => Ok("taken".to_owned()),
            answer => answered(answer),
        },
        look: |store, n| format!("{:?}", store.proposal(&format!("p{n}")).unwrap().map(|held| held.version)),
        again: "taken",
    },
    Case {
        write: "replace_proposal",
        before: |store, n| assert!(store.put_proposal(&proposal(10 + n, 1), NOW).unwrap()),
        act: |store, n| answered(store.replace_proposal(&proposal(10 + n, 2))),
        look: |store, n| format!("{:?}", store.proposal(&format!("p{}", 10 + n)).unwrap().map(|held| held.version)),
        again: "false",
    },
    Case {
        write: "put_document",
        before: nothing,
        act: |store, n| answered(store.put_document(&document(n, "1"), NOW, 100)),
        look: |store, n| format!("{:?}", store.document("test", &format!("d{n}"), NOW).unwrap()),
        again: "false",
    },
    Case {
        write: "swap_document",
        before: |store, n| assert!(store.put_document(&document(10 + n, "1"), NOW, 100).unwrap()),
        act: |store, n| answered(store.swap_document("test", &format!("d{}", 10 + n), b"1", &document(10 + n, "2"))),
        look: |store, n| format!("{:?}", store.document("test", &format!("d{}", 10 + n), NOW).unwrap()),
        again: "false",
    },
    Case {
        write: "take_document",
        before: |store, n| assert!(store.put_document(&document(20 + n, "1"), NOW, 100).unwrap()),
        act: |store, n| answered(store.take_document("test", &format!("d{}", 20 + n), NOW)),
        look: |store, n| format!("{:?}", store.document("test", &format!("d{}", 20 + n), NOW).unwrap()),
        again: "None",
    },
    Case {
        write: "forget_documents",
        before: |store, n| assert!(store.put_document(&document(30 + n, "1"), NOW, 100).unwrap()),
        act: |store, n| answered(store.forget_documents("test", &[format!("d{}", 30 + n)])),
        look: |store, n| format!("{:?}", store.document("test", &format!("d{}", 30 + n), NOW).unwrap()),
        again: "()",
    },
    Case {
        write: "put_host",
        before: nothing,
        act: |store, n| {
            let (version, isolation, isolation_note) = ("1".to_owned(), "none".to_owned(), String::new());
            let host = named(n);
            answered(store.put_host(&StoredHost {
                host,
                joined_at_ms: 1,
                heard_at_ms: 2,
                version,
                isolation,
                isolation_note,
            }))
        },
        look: |store, n| store.hosts().unwrap().iter().filter(|host| host.host == named(n)).count().to_string(),
        again: "()",
    },
    Case {
        write: "put_instances",
        before: nothing,
        act: |store, n| answered(store.put_instances(&format!("r{n}"), &[instance(n, "1"), instance(n, "2")])),
        look: |store, n| store.instances().unwrap().iter().filter(|one| one.host == named(n)).count().to_string(),
        again: "()",
    },
    Case {
        write: "put_acknowledgements",
        before: |store, n| store.put_instances(&format!("r{n}"), &[instance(n, "1")]).unwrap(),
        act: |store, n| {
            let (instance, revision) = (InstanceId::new(&named(n), "1"), Revision(7));
            let given = StoredAcknowledgement { instance, revision, error: None, signals: SignalSeq(3) };
            answered(store.put_acknowledgements(&format!("r{n}"), &[given]))
        },
        look: |store, n| {
            let of = |one: &&StoredAcknowledgement| one.instance == InstanceId::new(&named(n), "1");
            format!("{:?}", store.acknowledgements("another").unwrap().iter().find(of).map(|one| one.revision))
        },
        again: "()",
    },
    Case {
        write: "beat",
        before: nothing,
        act: |store, n| answered(store.beat(&format!("r{n}"), 0).map(drop)),
        look: |_, _| String::new(),
        again: "()",
    },
    Case {
        write: "put_serial",
        before: nothing,
        // Nothing was handed out, and the next certificate has another number.
        act: |store, _| {
            answered(store.put_serial(&IssuedSerial {
                serial: format!("{:032x}", fastrand::u128(..)).parse().unwrap(),
                id: "spiffe://shop.example/web".parse().unwrap(),
                instance: None,
                host: None,
                key: None,
                issued_at_ms: NOW,
                expires_at_ms: LATER,
                authority: 1,
            }))
        },
        look: |_, _| String::new(),
        again: "()",
    },
    Case {
        write: "put_revocations",
        before: nothing,
        act: |store, n| {
            let revoked = Revocation { serial: format!("{n:032x}").parse().unwrap(), expires_at_ms: LATER };
            let by = RevokedBy { at_ms: NOW, by: "alice".into(), reason: "lost".into() };
            answered(store.put_revocations(&[revoked], &by, 10).map(|sequence| sequence.is_some()))
        },
        look: |store, n| {
            let signals = store.signals(SignalSeq(0)).unwrap();
            let serial = format!("{n:032x}").parse().unwrap();
            let is_it = |one: &&StoredSignal| matches!(&one.signal, Signal::Certificate(one) if one.serial == serial);
            format!("{}", signals.iter().filter(is_it).count())
        },
        again: "true",
    },
    Case {
        write: "put_token_revocation",
        before: nothing,
        act: |store, n| {
            let by = RevokedBy { at_ms: NOW, by: "alice".into(), reason: "lost".into() };
            answered(store.put_token_revocation(&TokensMeant::Subject(named(n)), LATER, &by, 1_000).map(drop))
        },
        look: |store, n| {
            let signals = store.signals(SignalSeq(0)).unwrap();
            let meant = TokensMeant::Subject(named(n));
            let is_it = |one: &&StoredSignal| matches!(&one.signal, Signal::Tokens(one) if one.meant == meant);
            format!("{}", signals.iter().filter(is_it).count())
        },
        again: "()",
    },
    Case {
        write: "put_statements",
        before: nothing,
        act: |store, n| {
            let by = RevokedBy { at_ms: NOW, by: "alice".into(), reason: "odd".into() };
            answered(store.put_statements(&[stated(n)], &by, 1_000).map(|sequence| sequence.is_some()))
        },
        look: |store, n| {
            let signals = store.signals(SignalSeq(0)).unwrap();
            let said = stated(n);
            let is_it = |one: &&StoredSignal| matches!(&one.signal, Signal::Stated(one) if one.subject == said.subject);
            format!("{}", signals.iter().filter(is_it).count())
        },
        again: "true",
    },
    Case {
        write: "put_tokens",
        before: nothing,
        act: |store, n| {
            let claims = serde_json::json!({
                "iss": "x", "sub": "spiffe://shop.example/web", "aud": "spiffe://shop.example/orders",
                "client_id": "spiffe://shop.example/web", "iat": 1, "exp": LATER / 1000, "jti": format!("{n:032x}"),
                "scope": "", "cnf": { "x5t#S256": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE" }, "instance": "web/1",
                "family": format!("{n:032x}"),
            });
            let claims = serde_json::from_value(claims).unwrap();
            answered(store.put_tokens(&[StoredToken { claims, host: Some(named(1)) }], NOW))
        },
        look: |store, n| {
            let id = format!("{n:032x}").parse().unwrap();
            let filter = TokenFilter { id: Some(id), ..TokenFilter::default() };
            format!("{}", store.tokens(&filter, NOW, 10).unwrap().len())
        },
        again: "()",
    },
    Case {
        write: "put_report",
        before: nothing,
        act: |store, n| {
            let edge = EdgeCount {
                principal: "spiffe://shop.example/web".parse().unwrap(),
                service: named(n),
                action: "http:GET".into(),
                permits: 1,
                revision: Revision(1),
            };
            // A report without an answer is not sent again: it would be counted twice.
            match store.callers(&named(n), 1)?.first() {
                None => answered(store.put_report(&[], &[edge], NOW)),
                Some(_) => Ok("there".to_owned()),
            }
        },
        look: |store, n| format!("{:?}", store.callers(&named(n), 1).unwrap().first().map(|edge| edge.permits)),
        again: "there",
    },
];

/// Runs every case: `way` has the faults, `plain` looks beside it. `fail` makes the next write of `way` fail.
fn table(way: &mut dyn Store, plain: &mut dyn Store, fail: impl Fn(&'static str, Fault)) {
    for Case { write, before, act, look, again } in &CASES {
        before(plain, 0);
        let answer = act(way, 0).unwrap_or_else(|error| panic!("{write}: {error}"));
        let done = look(plain, 0);
        for (n, fault) in [(1, Fault::Lost), (2, Fault::Kept)] {
            before(plain, n);
            let seen = look(plain, n);
            fail(write, fault);
            let first = act(way, n);
            let is_told = *write == "append" && fault == Fault::Kept && first.is_ok();
            assert!(first.is_err() || is_told, "{write} {fault:?}: {first:?}");
            let expected = if fault == Fault::Lost { &seen } else { &done };
            // The database may still be at it when the connection is gone.
            let end = Instant::now() + Duration::from_secs(5);
            while look(plain, n) != *expected && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(look(plain, n), *expected, "{write} {fault:?}: whole or not at all");
            let repeated = act(way, n).unwrap_or_else(|error| panic!("{write} {fault:?}, again: {error}"));
            assert_eq!(
                repeated,
                if fault == Fault::Lost { answer.as_str() } else { again },
                "{write} {fault:?}, again"
            );
            assert_eq!(look(plain, n), done, "{write} {fault:?}: done once");
        }
    }
}

#[test]
fn the_table_has_every_write() {
    let source = include_str!("../store.rs");
    let store = source.split("pub trait Store: Send {").nth(1).unwrap().split("\n}\n").next().unwrap();
    let methods: BTreeSet<&str> = store
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("fn ")?.split('(').next())
        .filter(|method| !READS.contains(method))
        .collect();
    assert_eq!(CASES.iter().map(|case| case.write).collect::<BTreeSet<_>>(), methods);
}

#[test]
fn every_write_to_sqlite_that_is_lost_or_kept_without_an_answer_happens_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.db");
    let faults = Faults::default();
    let mut way = faults.around(SqliteStore::open(&path).unwrap());
    let mut plain = SqliteStore::open(&path).unwrap();
    table(&mut way, &mut plain, |write, fault| faults.next(write, fault));
}

/// PROVES (commit-found-out)
#[test]
fn every_write_to_postgresql_that_is_lost_or_kept_without_an_answer_happens_once() {
    let server = Server::start();
    let partition = Partition::start(server.port());
    let url = PostgresUrl::parse(&server.url_by(partition.port())).unwrap();
    let (mut way, mut plain) = (PostgresStore::open(url).unwrap(), open_postgres(&server));
    table(&mut way, &mut plain, |_, fault| {
        partition.cut_once(match fault {
            Fault::Lost => Cut::BeforeCommit,
            Fault::Kept => Cut::AfterCommit,
        });
    });
}
