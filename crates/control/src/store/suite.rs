//! What every store must do, whatever keeps it: each test runs on SQLite and on a PostgreSQL server of its own. A machine without
//! PostgreSQL fails them and says what to install.

use std::collections::BTreeSet;

use countersign_core::{change::Revision, record::EdgeCount};
use countersign_testkit::postgres::Server;

use super::{
    testing::{on_each, open_postgres},
    *,
};

fn host(given: &str) -> ServiceName {
    ServiceName::parse(given).unwrap()
}

fn until(expires_at_ms: u64, only: Option<&str>, services: Option<&[&str]>) -> NewInvitation {
    let services = services.map(|names| names.iter().map(|name| host(name)).collect());
    NewInvitation { expires_at_ms, host: only.map(host), services }
}

#[test]
fn a_join_token_is_spent_once_in_time_and_by_whom_it_is_for() {
    on_each(|store| {
        let [bound, free] = [Digest::of(b"bound"), Digest::of(b"free")];
        assert!(store.put_invitation(&bound, &until(1_000, Some("h1"), Some(&["web"])), 0).unwrap());
        assert!(store.put_invitation(&free, &until(1_000, None, None), 0).unwrap());
        let web = || Some(BTreeSet::from([host("web")]));
        for (hash, by, at_ms, expected) in [
            (Digest::of(b"other"), "h1", 0, Spent::Unknown),
            (bound, "h2", 0, Spent::OtherHost),
            (bound, "h1", 1_001, Spent::Expired),
            (bound, "h1", 1_000, Spent::Admitted(web())),
            (bound, "h1", 1_000, Spent::Used),
            (bound, "h2", 2_000, Spent::Used),
            (free, "h9", 1, Spent::Admitted(None)),
            (free, "h9", 1, Spent::Used),
        ] {
            assert_eq!(store.spend_invitation(&hash, &host(by), at_ms).unwrap(), expected, "{by} at {at_ms}");
        }
        assert_eq!(store.entitlements().unwrap(), [(host("h1"), web().unwrap())]);
    });
}

#[test]
fn a_host_may_run_what_its_last_invitation_says() {
    on_each(|store| {
        for (services, expected) in [(Some(&["a", "b"][..]), 1), (None, 0), (Some(&["a"]), 1)] {
            let hash = Digest::of(&fastrand::u128(..).to_be_bytes());
            store.put_invitation(&hash, &until(1_000, None, services), 0).unwrap();
            store.spend_invitation(&hash, &host("h1"), 0).unwrap();
            assert_eq!(store.entitlements().unwrap().len(), expected, "{services:?}");
        }
        assert_eq!(store.entitlements().unwrap()[0].1, BTreeSet::from([host("a")]));
    });
}

#[test]
fn callers_of_a_service_are_told_most_permitted_first() {
    on_each(|store| {
        let edge = |from: &str, to: &str, permits| EdgeCount {
            principal: format!("spiffe://shop.example/{from}").parse().unwrap(),
            service: host(to),
            action: "http:GET".into(),
            permits,
            revision: Revision(3),
        };
        store
            .put_report(&[], &[edge("web", "catalog", 2), edge("job", "catalog", 5), edge("web", "other", 9)], 1)
            .unwrap();
        store.put_report(&[], &[edge("web", "catalog", 4)], 7).unwrap();
        let told: Vec<_> = store.callers(&host("catalog"), 10).unwrap();
        let told: Vec<_> = told.iter().map(|c| (c.principal.as_str(), c.permits, c.seen_at_ms)).collect();
        assert_eq!(told, [("spiffe://shop.example/web", 6, 7), ("spiffe://shop.example/job", 5, 1)]);
        assert_eq!(store.callers(&host("catalog"), 1).unwrap().len(), 1);
    });
}

#[test]
fn open_join_tokens_are_bounded_and_those_that_ended_make_room() {
    on_each(|store| {
        for n in 0..INVITATIONS_MAX {
            assert!(store.put_invitation(&Digest::of(&n.to_be_bytes()), &until(1_000, None, None), 0).unwrap());
        }
        assert!(!store.put_invitation(&Digest::of(b"one more"), &until(1_000, None, None), 0).unwrap());
        assert!(store.put_invitation(&Digest::of(b"later"), &until(5_000, None, None), 1_001).unwrap());
    });
}

#[test]
fn an_entry_takes_the_next_position_and_no_other() {
    on_each(|store| {
        let entry = |index: u64| NewEntry {
            index,
            entry: vec![index as u8],
            leaf: Digest::of(b"leaf"),
            root: Digest::of(&index.to_be_bytes()),
            seal: b"seal".to_vec(),
            digest: Digest::of(b"set"),
            change_set: b"set".to_vec(),
            bodies: vec![(Digest::of(b"text"), "text".into())],
        };
        assert_eq!(store.append(&entry(1)), Err(StoreError::Taken(1)));
        store.append(&entry(0)).unwrap();
        assert_eq!(store.append(&entry(0)), Err(StoreError::Taken(0)));
        assert_eq!(store.append(&entry(2)), Err(StoreError::Taken(2)));
        store.append(&entry(1)).unwrap();
        assert_eq!(
            store.head().unwrap(),
            Some(StoredHead { size: 2, root: Digest::of(&1u64.to_be_bytes()), seal: b"seal".to_vec() })
        );
        assert_eq!(store.entries(1, 10).unwrap()[0].change_set, b"set");
        assert_eq!(store.bodies(&[Digest::of(b"text"), Digest::of(b"none")]).unwrap().len(), 1);
    });
}

#[test]
fn a_document_is_found_by_kind_and_key_until_it_is_void_and_taken_by_one() {
    on_each(|store| {
        let document = |key: &str, bytes: &[u8], expires_at_ms| Document {
            kind: "session",
            key: key.into(),
            bytes: bytes.into(),
            expires_at_ms,
        };
        assert!(store.put_document(&document("a", b"1", 1_000), 0, 2).unwrap());
        assert!(!store.put_document(&document("a", b"2", 1_000), 0, 2).unwrap(), "it is there");
        assert!(store.put_document(&document("b", b"1", 500), 0, 2).unwrap());
        assert!(!store.put_document(&document("c", b"1", 1_000), 500, 2).unwrap(), "no room");
        assert!(store.put_document(&document("c", b"1", 1_000), 501, 2).unwrap(), "what is void makes room");
        assert_eq!(store.document("session", "a", 1_000).unwrap().as_deref(), Some(&b"1"[..]));
        assert_eq!(store.document("session", "a", 1_001).unwrap(), None);
        assert_eq!(store.document("ceremony", "a", 0).unwrap(), None);
        assert!(!store.swap_document("session", "a", b"0", &document("a", b"2", 2_000)).unwrap());
        assert!(store.swap_document("session", "a", b"1", &document("a", b"2", 2_000)).unwrap());
        let all = store.documents("session", 1_001).unwrap();
        assert_eq!(all, [("a".to_owned(), b"2".to_vec())]);
        assert_eq!(store.take_document("session", "c", 2_000).unwrap(), None, "too late, and gone");
        assert_eq!(store.take_document("session", "a", 2_000).unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(store.take_document("session", "a", 2_000).unwrap(), None);
        assert!(store.put_document(&document("d", b"1", 9_000), 2_000, 2).unwrap());
        store.forget_documents("session", &["d".into(), "e".into()]).unwrap();
        assert_eq!(store.documents("session", 0).unwrap(), []);
    });
}

fn entry(index: u64, body: &str) -> NewEntry {
    NewEntry {
        index,
        entry: body.as_bytes().to_vec(),
        leaf: Digest::of(body.as_bytes()),
        root: Digest::of(&index.to_be_bytes()),
        seal: b"seal".to_vec(),
        digest: Digest::of(b"set"),
        change_set: b"set".to_vec(),
        bodies: Vec::new(),
    }
}

#[test]
fn keys_that_are_made_at_once_are_those_of_one_and_swapped_by_who_saw_the_last() {
    on_each(|store| {
        assert!(store.create_keys(&[("a", b"1"), ("b", b"1")]).unwrap());
        assert!(!store.create_keys(&[("b", b"2"), ("c", b"2")]).unwrap());
        assert_eq!(store.key("c").unwrap(), None, "whole or not at all");
        assert!(!store.swap_key("a", b"0", &[("a", b"3")]).unwrap());
        assert!(store.swap_key("a", b"1", &[("a", b"3"), ("b", b"3")]).unwrap());
        assert_eq!((store.key("a").unwrap(), store.key("b").unwrap()), (Some(b"3".to_vec()), Some(b"3".to_vec())));
    });
}

#[test]
fn each_replica_replaces_its_own_instances_and_takes_over_those_that_moved_to_it() {
    on_each(|store| {
        let instance = |id: &str, on: &str| StoredInstance {
            instance: countersign_core::identity::InstanceId::parse(id).unwrap(),
            host: host(on),
            address: "127.0.0.1:1".into(),
            ready: true,
            admin: String::new(),
            isolation: "none".into(),
            replica: String::new(),
            revision: Revision(1),
            error: None,
            artifact: Some(Digest::of(id.as_bytes())),
            signals: SignalSeq(4),
        };
        store.put_instances("one", &[instance("web/1", "h1"), instance("web/2", "h2")]).unwrap();
        store.put_instances("two", &[instance("web/2", "h2"), instance("web/3", "h3")]).unwrap();
        store.put_instances("one", &[instance("web/4", "h1")]).unwrap();
        let held = store.instances().unwrap();
        assert!(held.iter().all(|i| i.artifact == Some(Digest::of(i.instance.as_str().as_bytes()))));
        let held: Vec<_> = held.into_iter().map(|i| (i.instance.to_string(), i.replica)).collect();
        let held: Vec<_> = held.iter().map(|(id, replica)| (id.as_str(), replica.as_str())).collect();
        assert_eq!(held, [("web/2", "two"), ("web/3", "two"), ("web/4", "one")]);
        let enforces = |id: &str, revision: u64, error: Option<&str>| StoredAcknowledgement {
            instance: countersign_core::identity::InstanceId::parse(id).unwrap(),
            revision: Revision(revision),
            error: error.map(str::to_owned),
            signals: SignalSeq(if revision == 1 { 4 } else { 6 }),
        };
        let given = [enforces("web/2", 9, None), enforces("web/4", 3, Some("a text is missing"))];
        store.put_acknowledgements("one", &given).unwrap();
        assert_eq!(store.acknowledgements("two").unwrap(), given[1..], "nobody speaks for the instances of another");
        let mut of_two = store.acknowledgements("one").unwrap();
        of_two.sort_by(|a, b| a.instance.cmp(&b.instance));
        assert_eq!(of_two, [enforces("web/2", 1, None), enforces("web/3", 1, None)]);
        assert_eq!(store.beat("one", 60_000).unwrap(), Vec::<String>::new());
        assert_eq!(store.beat("two", 60_000).unwrap(), ["one"]);
    });
}

#[test]
fn certificates_are_found_by_what_they_are_for_until_they_expire() {
    on_each(|store| {
        let issued = |n: u8, service: &str, on: Option<&str>, expires_at_ms| IssuedSerial {
            serial: format!("{n:032x}").parse().unwrap(),
            id: format!("spiffe://shop.example/{service}").parse().unwrap(),
            instance: Some(countersign_core::identity::InstanceId::parse(&format!("{service}/1")).unwrap()),
            host: on.map(host),
            key: on.map(|on| Digest::of(on.as_bytes())),
            issued_at_ms: u64::from(n),
            expires_at_ms,
            authority: u32::from(n),
        };
        let all = [issued(1, "web", Some("h1"), 50), issued(2, "web", Some("h2"), 100), issued(3, "db", None, 100)];
        all.iter().for_each(|one| store.put_serial(one).unwrap());
        let everything = IdentityFilter::default();
        let of =
            |serial: u8| IdentityFilter { serial: Some(all[usize::from(serial) - 1].serial), ..everything.clone() };
        let web = IdentityFilter { id: Some(all[0].id.clone()), ..everything.clone() };
        let db = IdentityFilter { instance: all[2].instance.clone(), ..everything.clone() };
        let h2 = IdentityFilter { host: Some(host("h2")), ..everything.clone() };
        let key = IdentityFilter { key: all[0].key, ..everything.clone() };
        let both = IdentityFilter { host: Some(host("h2")), ..key.clone() };
        let root = IdentityFilter { authority: Some(3), ..everything.clone() };
        for (filter, now_ms, limit, expected) in [
            (&everything, 50, 10, &[3, 2, 1][..]),
            (&everything, 51, 10, &[3, 2]),
            (&everything, 0, 2, &[3, 2]),
            (&of(2), 0, 10, &[2]),
            (&web, 0, 10, &[2, 1]),
            (&db, 0, 10, &[3]),
            (&h2, 0, 10, &[2]),
            (&key, 0, 10, &[1]),
            (&both, 0, 10, &[]),
            (&root, 0, 10, &[3]),
        ] {
            let found = store.serials(filter, now_ms, limit).unwrap();
            let expected: Vec<_> = expected.iter().map(|n| all[*n - 1].clone()).collect();
            assert_eq!(found, expected, "{filter:?} at {now_ms}");
        }
    });
}

fn token(number: u8, caller: &str, callee: &str, expires_at: i64) -> StoredToken {
    let id = |path: &str| format!("spiffe://shop.example/{path}");
    let claims = serde_json::json!({
        "iss": "https://shop.example", "sub": id(caller), "aud": id(callee), "client_id": id(caller), "iat": 1,
        "exp": expires_at, "jti": format!("{number:032x}"), "scope": "http:GET", "instance": format!("{caller}/1"),
        "cnf": { "x5t#S256": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE" }, "family": format!("{number:032x}"),
    });
    StoredToken { claims: serde_json::from_value(claims).unwrap(), host: Some(host("h1")) }
}

#[test]
fn tokens_are_found_by_all_that_they_say_until_they_have_expired() {
    on_each(|store| {
        let all = [token(1, "web", "orders", 10), token(2, "web", "stock", 20), token(3, "cron", "orders", 20)];
        store.put_tokens(&all, 0).unwrap();
        store.put_tokens(&all[..1], 0).unwrap();
        let any = TokenFilter::default();
        for (case, filter, now_ms, limit, expected) in [
            ("all, the newest first", any.clone(), 0, 10, vec![3, 2, 1]),
            ("some of them", any.clone(), 0, 2, vec![3, 2]),
            ("those that have not expired", any.clone(), 10_001, 10, vec![3, 2]),
            ("of a caller", TokenFilter { subject: Some(host("web")), ..any.clone() }, 0, 10, vec![2, 1]),
            ("of a part of a name", TokenFilter { subject: Some(host("eb")), ..any.clone() }, 0, 10, vec![]),
            ("for a callee", TokenFilter { service: Some(host("orders")), ..any.clone() }, 0, 10, vec![3, 1]),
            ("one", TokenFilter { id: Some(all[1].claims.id), ..any.clone() }, 0, 10, vec![2]),
            (
                "of an instance",
                TokenFilter { instance: Some(InstanceId::parse("cron/1").unwrap()), ..any.clone() },
                0,
                10,
                vec![3],
            ),
            ("of another host", TokenFilter { host: Some(host("h2")), ..any.clone() }, 0, 10, vec![]),
        ] {
            let found = store.tokens(&filter, now_ms, limit).unwrap();
            let numbers: Vec<_> = found.iter().map(|one| one.claims.id.as_bytes()[15]).collect();
            assert_eq!(numbers, expected, "{case}");
            assert!(found.iter().all(|one| all.contains(one)), "{case}");
        }
        store.put_tokens(&[], 20_001).unwrap();
        assert!(store.tokens(&any, 0, 10).unwrap().is_empty(), "what has expired is forgotten");
    });
}

#[test]
fn a_flood_of_revoked_tokens_revokes_more_and_never_less() {
    on_each(|store| {
        let by = |at_ms| RevokedBy { at_ms, by: "alice".into(), reason: "lost".into() };
        let meant = |text: &str| text.parse::<TokensMeant>().unwrap();
        let put = |store: &mut dyn Store, text: &str, at_ms| {
            let (sequence, meant) = store.put_token_revocation(&meant(text), 100, &by(at_ms), 2).unwrap();
            (sequence.0, meant.to_string())
        };
        let all = |store: &mut dyn Store| {
            let signals = store.signals(SignalSeq(0)).unwrap();
            let told = |one: StoredSignal| match one.signal {
                Signal::Tokens(one) => format!("{} until {}", one.meant, one.issued_until_ms),
                Signal::Certificate(_) | Signal::Stated(_) => "a certificate".to_owned(),
            };
            signals.into_iter().map(told).collect::<Vec<_>>().join(", ")
        };
        let certificate = Revocation { serial: format!("{:032x}", 9).parse().unwrap(), expires_at_ms: 100 };
        store.put_revocations(&[certificate], &by(1), 1).unwrap();
        assert_eq!(put(store, "subject:web", 1), (2, "subject:web".into()));
        assert_eq!(put(store, "subject:web", 5), (3, "subject:web".into()), "once more: what was issued since");
        assert_eq!(all(store), "a certificate, subject:web until 5");
        assert_eq!(put(store, "instance:web/1", 6), (4, "instance:web/1".into()));
        assert_eq!(put(store, "audience:orders", 7), (5, "all".into()), "there is no room for a third");
        assert_eq!(all(store), "a certificate, all until 7");
        assert_eq!(put(store, "audience:orders", 8), (6, "audience:orders".into()));
        assert_eq!(put(store, "all", 200), (7, "all".into()));
        assert_eq!(all(store), "all until 200", "those before have ended");
    });
}

#[test]
fn a_statement_takes_the_place_of_what_its_source_said_before_and_is_later_whatever_the_clock_says() {
    on_each(|store| {
        let by = |at_ms| RevokedBy { at_ms, by: "alice".into(), reason: "odd".into() };
        let said = |subject: &str, value: &str, expires_at_ms: u64| -> Statement {
            let written = serde_json::json!({
                "subject": subject, "kind": "risk", "value": value, "source": "operator:alice",
                "issued_at_ms": 0, "expires_at_ms": expires_at_ms,
            });
            serde_json::from_value(written).unwrap()
        };
        let all = |store: &mut dyn Store| {
            let signals = store.signals(SignalSeq(0)).unwrap();
            let told = |one: StoredSignal| match one.signal {
                Signal::Stated(said) => {
                    assert_eq!(said.issued_at_ms, one.by.at_ms);
                    format!("{}: {} {} at {}", one.sequence.0, said.subject, said.said, said.issued_at_ms)
                }
                Signal::Certificate(_) | Signal::Tokens(_) => format!("{}: revoked", one.sequence.0),
            };
            signals.into_iter().map(told).collect::<Vec<_>>().join(", ")
        };
        let certificate = Revocation { serial: format!("{:032x}", 9).parse().unwrap(), expires_at_ms: 300 };
        store.put_revocations(&[certificate], &by(1), 1).unwrap();
        let (web, cron) = (said("workload:web", "80", 100), said("workload:cron", "20", 300));
        assert_eq!(store.put_statements(&[web.clone(), cron.clone()], &by(10), 2).unwrap(), Some(SignalSeq(3)));
        assert_eq!(all(store), "1: revoked, 2: workload:web 80 at 10, 3: workload:cron 20 at 10");
        let vm = said("host:vm", "1", 300);
        assert_eq!(store.put_statements(&[cron.clone(), vm.clone()], &by(11), 2).unwrap(), None, "there is no room");
        assert_eq!(store.put_statements(&[web.clearing(5)], &by(5), 2).unwrap(), Some(SignalSeq(4)));
        assert_eq!(all(store), "1: revoked, 3: workload:cron 20 at 10, 4: workload:web cleared at 11");
        assert_eq!(
            store.put_revocations(&[certificate], &by(12), 1).unwrap(),
            Some(SignalSeq(4)),
            "counted by themselves"
        );
        assert_eq!(store.put_statements(&[vm], &by(200), 2).unwrap(), Some(SignalSeq(5)), "one has ended");
        assert_eq!(store.put_statements(&[], &by(200), 2).unwrap(), Some(SignalSeq(5)));
        assert_eq!(all(store), "1: revoked, 3: workload:cron 20 at 10, 5: host:vm 1 at 200");
    });
}

#[test]
fn a_revocation_has_one_number_for_ever_and_is_forgotten_when_its_certificate_has_expired() {
    on_each(|store| {
        let revoked = |n: u8, expires_at_ms| Revocation { serial: format!("{n:032x}").parse().unwrap(), expires_at_ms };
        let said = |number, one| (number, Signal::Certificate(one));
        let by = |at_ms| RevokedBy { at_ms, by: "alice".into(), reason: "lost".into() };
        let numbers = |store: &mut dyn Store, after| {
            let signals = store.signals(SignalSeq(after)).unwrap();
            signals.iter().map(|one| (one.sequence.0, one.signal.clone())).collect::<Vec<_>>()
        };
        let [one, two, three] = [revoked(1, 10), revoked(2, 100), revoked(3, 100)];
        assert_eq!(store.put_revocations(&[], &by(1), 3).unwrap(), Some(SignalSeq(0)));
        assert_eq!(store.put_revocations(&[one, two], &by(1), 3).unwrap(), Some(SignalSeq(2)));
        assert_eq!(store.put_revocations(&[two, three], &by(2), 3).unwrap(), Some(SignalSeq(3)));
        assert_eq!(numbers(store, 0), [said(1, one), said(2, two), said(3, three)]);
        assert_eq!(numbers(store, 2), [said(3, three)]);
        assert_eq!(store.signals(SignalSeq(0)).unwrap()[1].by, by(1), "the first to revoke it");
        assert_eq!(store.put_revocations(&[revoked(4, 100), revoked(5, 100)], &by(11), 3).unwrap(), None, "no room");
        assert_eq!(store.put_revocations(&[revoked(4, 100)], &by(11), 3).unwrap(), Some(SignalSeq(4)));
        assert_eq!(numbers(store, 0).iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(store.put_revocations(&[], &by(200), 3).unwrap(), Some(SignalSeq(4)), "no number comes twice");
        assert_eq!(numbers(store, 0).len(), 1);
    });
}

/// Name and columns of each table.
fn shape(sql: &[(String, String)]) -> std::collections::BTreeMap<&str, BTreeSet<&str>> {
    let mut tables = std::collections::BTreeMap::<&str, BTreeSet<&str>>::new();
    for (table, column) in sql {
        tables.entry(table).or_default().insert(column);
    }
    tables
}

#[test]
fn both_stores_have_the_same_tables_and_columns() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.db");
    drop(sqlite::SqliteStore::open(&path).unwrap());
    let file = rusqlite::Connection::open(&path).unwrap();
    let sql = "SELECT m.name, c.name FROM sqlite_schema m, pragma_table_info(m.name) c
               WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%'";
    let mut statement = file.prepare(sql).unwrap();
    let embedded = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let embedded: Vec<(String, String)> = embedded.collect::<Result<_, _>>().unwrap();

    let server = Server::start();
    let shared = open_postgres(&server).columns();
    assert_eq!(shape(&embedded), shape(&shared));
}

#[test]
fn replicas_that_start_at_the_same_time_make_one_schema_and_one_set_of_keys() {
    let server = Server::start();
    let made: Vec<bool> = std::thread::scope(|scope| {
        let start = |n: u8| {
            let server = &server;
            scope.spawn(move || open_postgres(server).create_keys(&[("root", &[n]), ("log", &[n])]).unwrap())
        };
        let started: Vec<_> = (0..6).map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 1, "{made:?}");
    let mut store = open_postgres(&server);
    assert_eq!(store.key("root").unwrap(), store.key("log").unwrap());
}

/// PROVES (revisions-never-fork)
#[test]
fn of_many_replicas_that_write_at_the_same_position_one_does() {
    let server = Server::start();
    open_postgres(&server);
    let written: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let replica = |n: u8| {
            let server = &server;
            scope.spawn(move || {
                let mut store = open_postgres(server);
                let write = |index| match store.append(&entry(index, &format!("{n} at {index}"))) {
                    Ok(()) => true,
                    Err(StoreError::Taken(taken)) => {
                        assert_eq!(taken, index);
                        false
                    }
                    Err(other) => panic!("{other}"),
                };
                (0..20)
                    .filter({
                        let mut write = write;
                        move |index| write(*index)
                    })
                    .collect()
            })
        };
        let replicas: Vec<_> = (0..4).map(replica).collect();
        replicas.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let entries = open_postgres(&server).entries(0, 100).unwrap();
    let total: usize = written.iter().map(Vec::len).sum();
    assert_eq!(total, entries.len(), "who was told that an entry is kept, kept it");
    for (n, indexes) in written.iter().enumerate() {
        for index in indexes {
            assert_eq!(entries[*index as usize].entry, format!("{n} at {index}").as_bytes());
        }
    }
}

#[test]
fn a_database_that_was_killed_is_away_and_then_there_again_with_all_that_was_acknowledged() {
    let mut server = Server::start();
    let mut store = open_postgres(&server);
    store.append(&entry(0, "a")).unwrap();
    server.kill();
    let away = store.append(&entry(1, "b"));
    assert!(matches!(away, Err(StoreError::Away { .. })), "{away:?}");
    server.start_again();
    let end = Instant::now() + std::time::Duration::from_secs(20);
    while store.append(&entry(1, "b")).is_err() {
        assert!(Instant::now() < end, "it does not come back");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let kept: Vec<_> = store.entries(0, 10).unwrap().into_iter().map(|entry| entry.entry).collect();
    assert_eq!(kept, [b"a", b"b"]);
}

/// PROVES (commit-found-out)
#[test]
fn an_answer_to_a_commit_that_is_lost_is_found_out_whether_it_was_kept_or_not() {
    use countersign_testkit::partition::{Cut, Partition};
    let server = Server::start();
    for (cut, kept) in [(Cut::BeforeCommit, false), (Cut::AfterCommit, true)] {
        let way = Partition::start(server.port());
        let url = postgres::PostgresUrl::parse(&server.url_by(way.port())).unwrap();
        let mut store = postgres::PostgresStore::open(url).unwrap();
        let index = store.head().unwrap().map_or(0, |head| head.size);
        way.cut_once(cut);
        let said = store.append(&entry(index, "x"));
        let is_there = open_postgres(&server).entries(index, 1).unwrap().len() == 1;
        assert_eq!((said.is_ok(), is_there), (kept, kept), "{cut:?}: {said:?}");
        assert_eq!(store.append(&entry(index, "y")).is_ok(), !kept, "{cut:?}: the position is told right");
    }
}

#[test]
fn a_database_is_believed_by_its_certificate_and_its_name() {
    let (server, root) = Server::start_with_tls();
    let at = |host: &str, root: &std::path::Path| {
        let url = format!("postgres://postgres@{host}:{}/postgres?sslrootcert={}", server.port(), root.display());
        postgres::PostgresStore::open(postgres::PostgresUrl::parse(&url).unwrap())
    };
    let mut store = at("localhost", &root).unwrap_or_else(|error| panic!("{error}"));
    store.append(&entry(0, "a")).unwrap();
    assert_eq!(store.entries(0, 10).unwrap().len(), 1);
    let refused =
        |opened: Result<postgres::PostgresStore, StoreError>| opened.err().expect("it is refused").to_string();
    let said = refused(at("127.0.0.1", &root));
    assert!(said.contains("certificate"), "another name: {said}");
    let (_other, foreign) = Server::start_with_tls();
    let said = refused(at("localhost", &foreign));
    assert!(said.contains("certificate"), "another root: {said}");
    let said = refused(postgres::PostgresStore::open(postgres::PostgresUrl::parse(&server.url()).unwrap()));
    assert!(said.contains("no encryption"), "this server takes nothing in the clear: {said}");
}

#[test]
fn a_database_on_another_machine_is_reached_by_tls_or_because_somebody_said_so() {
    let refused =
        ["postgres://u@db.example/m", "postgres://u@192.0.2.1/m", "postgres:///m", "host=db.example user=u", "x y"];
    for given in refused {
        assert!(postgres::PostgresUrl::parse(given).is_err(), "{given}");
    }
    for given in [
        "postgres://u:secret@127.0.0.1:5433/m",
        "postgres://u@localhost/m",
        "postgres://u@%2Fvar%2Frun%2Fpostgresql/m",
        "postgres://u@db.example/m?sslmode=disable",
        "host=db.example user=u sslmode=disable",
    ] {
        let url = postgres::PostgresUrl::parse(given).unwrap_or_else(|error| panic!("{given}: {error}"));
        assert!(!format!("{url} {url:?}").contains("secret"));
    }
}
