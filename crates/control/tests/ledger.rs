//! What survives, what is refused, and who wins: the ledger of a control plane through its doors.

mod support;

use std::{
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use countersign_api::local::{AuthorityView, ChangeDetail, ChangeSummary, CheckpointView, LedgerLine, Mesh};
use countersign_control::{StartError, clock::Clock, ledger::OpenError, start, start_with_clock};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, Member, Revision},
    identity::TrustDomain,
    service::{Protocol, ServiceSpec},
};
use rusqlite::Connection;
use support::{Plane, config, declare, name, permit, trust_domain};

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn database(dir: &Path) -> Connection {
    Connection::open(dir.join("control.db")).unwrap()
}

/// A stopped control plane's directory, with four entries and two texts.
async fn written() -> tempfile::TempDir {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    for (base, id) in [(1, "one"), (2, "two")] {
        let (change, bodies) = permit(id, "web", "catalog");
        plane.apply_with(base, vec![change], bodies).await.unwrap();
    }
    plane.apply(3, vec![Change::RemovePolicy { id: "one".into() }]).await.unwrap();
    plane.control.stop().await;
    plane.dir
}

/// PROVES (edited-ledger-refused)
#[tokio::test]
async fn an_edited_ledger_is_refused_with_what_is_wrong() {
    for (edit, expected) in [
        (
            "UPDATE entries SET entry = CAST(replace(CAST(entry AS TEXT), 'local', 'other') AS BLOB) WHERE idx = 1",
            "entry 1 is not what was hashed when it was written",
        ),
        ("DELETE FROM entries WHERE idx = 1", "entry 1 is missing"),
        ("DELETE FROM entries WHERE idx = 3", "4 entries were written, 3 are there"),
        ("DELETE FROM entries", "4 entries were written, 0 are there"),
        ("DELETE FROM head", "4 entries are there, but no head"),
        (
            "UPDATE entries SET idx = -idx - 10 WHERE idx IN (1, 2);
             UPDATE entries SET idx = 2 WHERE idx = -11;
             UPDATE entries SET idx = 1 WHERE idx = -12;",
            "entry 1 of the ledger is damaged: it says that its index is 2",
        ),
        ("UPDATE entries SET leaf = zeroblob(32) WHERE idx = 2", "entry 2 is not what was hashed when it was written"),
        ("UPDATE head SET root = zeroblob(32)", "its root was 000000000000, the entries add up to "),
        (
            "UPDATE bodies SET bytes = CAST(replace(CAST(bytes AS TEXT), 'Action::\"read\"', 'Action::\"write\"') AS BLOB)
             WHERE CAST(bytes AS TEXT) LIKE '@id(\"two\")%'",
            "does not hash to its name",
        ),
        (
            "UPDATE bodies SET bytes = CAST(bytes || ' ' AS BLOB) WHERE CAST(bytes AS TEXT) LIKE '@id(\"one\")%'",
            "does not hash to its name",
        ),
        ("DELETE FROM bodies WHERE CAST(bytes AS TEXT) LIKE '@id(\"one\")%'", "of entry 1 is missing"),
        (
            "UPDATE bodies SET bytes = CAST(replace(CAST(bytes AS TEXT), 'web', 'wob') AS BLOB)
             WHERE CAST(bytes AS TEXT) LIKE '%create_mesh%'",
            "entry 0 of the ledger is damaged: its change-set has digest ",
        ),
        ("DELETE FROM bodies WHERE CAST(bytes AS TEXT) LIKE '%create_mesh%'", "entry 0 of the ledger is damaged: "),
    ] {
        let dir = written().await;
        let edited = database(dir.path());
        edited.execute_batch("PRAGMA ignore_check_constraints = 1").unwrap();
        edited.execute_batch(edit).unwrap();
        assert!(edited.changes() > 0, "{edit}");
        drop(edited);
        match start(config(dir.path().into())).await {
            Err(error @ StartError::Ledger(OpenError::Damaged { .. })) => {
                assert!(error.to_string().contains(expected), "{edit}\n{error}");
                assert!(error.help().unwrap().contains("restore"), "{edit}");
            }
            other => panic!("{edit}: {:?}", other.err()),
        }
    }
}

/// PROVES (edited-ledger-refused)
#[tokio::test]
async fn an_edit_that_recomputes_the_hashes_of_its_entry_still_meets_the_root() {
    let dir = written().await;
    let edited = database(dir.path());
    let entry: Vec<u8> = edited.query_row("SELECT entry FROM entries WHERE idx = 1", [], |row| row.get(0)).unwrap();
    let entry = String::from_utf8(entry).unwrap().replace("local", "other").into_bytes();
    let leaf = countersign_core::ledger::hash_leaf(&entry);
    edited.execute("UPDATE entries SET entry = ?1, leaf = ?2 WHERE idx = 1", rusqlite::params![entry, leaf.0]).unwrap();
    drop(edited);
    let error = start(config(dir.path().into())).await.err().unwrap();
    assert!(error.to_string().contains("the entries add up to"), "{error}");

    // Whoever recomputes the root as well has no key to seal it with.
    let edited = database(dir.path());
    let mut tree = countersign_core::ledger::Frontier::default();
    for index in 0..4 {
        let leaf = edited.query_row("SELECT leaf FROM entries WHERE idx = ?1", [index], |row| row.get(0)).unwrap();
        tree.append(Digest(leaf));
    }
    edited.execute("UPDATE head SET root = ?1", [tree.root().0]).unwrap();
    drop(edited);
    let error = start(config(dir.path().into())).await.err().unwrap();
    assert!(error.to_string().contains("was not sealed with"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_no_store_or_of_a_later_version_is_refused() {
    let dir = written().await;
    database(dir.path()).execute_batch("PRAGMA user_version = 999").unwrap();
    let error = start(config(dir.path().into())).await.err().unwrap();
    assert!(error.help().unwrap().contains("version"), "{error:?}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("control.db"), "this is not a database, it only lies where one should be").unwrap();
    let error = start(config(dir.path().into())).await.err().unwrap();
    assert!(error.help().unwrap().contains("copy"), "{error:?}");
}

#[tokio::test]
async fn an_untouched_ledger_opens_again_with_its_history() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let (change, bodies) = permit("one", "web", "catalog");
    plane.apply_with(1, vec![change.clone()], bodies.clone()).await.unwrap();
    let before = plane.status().await;
    let plane = plane.restart().await.unwrap();
    let after = plane.status().await;
    assert_eq!((after.revision, after.root, after.services), (before.revision, before.root, before.services));

    let changes: Vec<ChangeSummary> = plane.get("/v1/changes").await;
    assert_eq!(changes.iter().map(|change| change.revision.0).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(changes[0].changes, ["set_policy policy one"]);
    assert_eq!(changes[0].actor, "local");
    let detail: ChangeDetail = plane.get("/v1/changes/2").await;
    assert_eq!((detail.change_set.changes, detail.bodies.clone()), (vec![change], bodies));
    let mesh: Mesh = plane.get("/v1/mesh").await;
    assert_eq!(mesh.bodies, detail.bodies);

    let (_, lines) = plane.send("GET", "/v1/ledger", Vec::new()).await;
    let lines: Vec<LedgerLine> = lines
        .split(|byte| *byte == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    assert_eq!(lines.iter().map(|line| line.root).collect::<Vec<_>>(), [None, Some(after.root)]);
    assert_eq!(lines[1].entry, detail.entry);
}

/// PROVES (acknowledged-is-durable)
#[tokio::test]
async fn every_change_that_was_acknowledged_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "applies_until_it_is_killed", "--ignored", "--nocapture"])
        .env("COUNTERSIGN_TEST_DATA_DIR", dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let acknowledged = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| line.rsplit_once("acknowledged ")?.1.parse::<u64>().ok())
        .find(|revision| *revision >= 25)
        .expect("the child applies changes");
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    let control = start(config(dir.path().into())).await.unwrap();
    let plane = Plane { control, dir };
    let revision = plane.status().await.revision.0;
    assert!(revision >= acknowledged, "{revision} of {acknowledged}");
    plane.apply(revision, vec![declare("after")]).await.unwrap();
}

#[tokio::test]
#[ignore = "the child of `every_change_that_was_acknowledged_survives_a_kill`"]
async fn applies_until_it_is_killed() {
    let Some(data_dir) = std::env::var_os("COUNTERSIGN_TEST_DATA_DIR") else { return };
    let control = start(config(data_dir.into())).await.unwrap();
    // The directory belongs to the parent; this guard is never dropped with content worth keeping.
    let link = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(
        Path::new(&std::env::var_os("COUNTERSIGN_TEST_DATA_DIR").unwrap()).join("control.sock"),
        link.path().join("control.sock"),
    )
    .unwrap();
    let plane = Plane { control, dir: link };
    plane.create(&[]).await;
    for base in 1..10_000 {
        let applied = plane.apply(base, vec![declare(&format!("s{base}"))]).await.unwrap();
        println!("acknowledged {}", applied.revision);
    }
}

#[tokio::test]
async fn of_fifty_who_apply_on_one_base_exactly_one_wins() {
    let plane = Arc::new(Plane::start().await);
    plane.create(&[]).await;
    for base in 1..4 {
        let racers = (0..50).map(|racer| {
            let plane = plane.clone();
            tokio::spawn(async move { plane.apply(base, vec![declare(&format!("r{base}-{racer}"))]).await })
        });
        let mut won = 0;
        for racer in racers.collect::<Vec<_>>() {
            match racer.await.unwrap() {
                Ok(applied) => {
                    assert_eq!(applied.revision, Revision(base + 1));
                    won += 1;
                }
                Err(problem) => assert_eq!(problem.status, 409, "{problem:?}"),
            }
        }
        assert_eq!(won, 1, "base {base}");
    }
    assert_eq!(plane.status().await.revision, Revision(4));
}

/// PROVES (admitted-before-append)
#[tokio::test]
async fn what_the_law_does_not_allow_is_refused_with_every_mistake_and_changes_nothing() {
    let plane = Plane::start().await;
    let created = |td: &str| Change::CreateMesh { trust_domain: TrustDomain::parse(td).unwrap() };
    let refused = |answer: Result<_, countersign_api::local::Problem>| {
        let problem = answer.map(|_: countersign_api::local::Applied| ()).unwrap_err();
        assert_eq!(problem.status, 422, "{problem:?}");
        assert!(problem.help.is_some());
        problem.detail.unwrap()
    };
    assert!(refused(plane.apply(0, vec![declare("a")]).await).contains("create_mesh"));
    assert!(refused(plane.apply(0, vec![created("other.example")]).await).contains("keys speak for `shop.example`"));
    assert!(refused(plane.apply(0, Vec::new()).await).contains("no change"));
    plane.create(&["web", "catalog"]).await;
    let root = plane.status().await.root;

    let mut spec = ServiceSpec::new(Protocol::Http);
    spec.upstreams.insert(name("nowhere"));
    let bad_upstream = Change::DeclareService { name: name("x"), spec };
    let bad_role = Change::SetRole { name: "r".into(), members: [Member::Service(name("nobody"))].into() };
    let both = refused(plane.apply(1, vec![bad_upstream, bad_role]).await);
    assert!(both.contains("upstream `nowhere`") && both.contains("member `nobody`"), "{both}");

    let policy = |id: &str, text: &str| {
        let mut bodies = Bodies::default();
        let body = bodies.insert(text.to_owned());
        (vec![Change::SetPolicy { id: id.into(), file: "policies/p.cedar".into(), body }], bodies)
    };
    for (id, text, expected) in [
        ("p", "@id(\"p\") permit (principal = x);", "p.cedar"),
        ("p", "@id(\"p\") permit (principal, action, resource) when { context.nothing == 1 };", "p.cedar"),
        ("p", "@id(\"p\") permit (principal, action == Action::\"http:FLY\", resource);", "p.cedar"),
        ("p", "@id(\"q\") permit (principal, action, resource);", "the id `q`"),
        ("p", "@id(\"p\") permit (principal == Workload::\"ghost\", action, resource);", "ghost"),
    ] {
        let (changes, bodies) = policy(id, text);
        let detail = refused(plane.apply_with(1, changes, bodies).await);
        assert!(detail.contains(expected), "{text}\n{detail}");
    }
    let (changes, _) = policy("p", "@id(\"p\") permit (principal, action, resource);");
    assert!(refused(plane.apply(1, changes).await).contains("did not come with it"));
    let (_, bodies) = policy("p", "@id(\"p\") permit (principal, action, resource);");
    assert!(refused(plane.apply_with(1, vec![declare("y")], bodies).await).contains("belongs to no change"));
    let forged = serde_json::json!({
        "change_set": {"base": 1, "changes": [{"kind": "set_policy", "id": "p", "file": "f", "body": Digest::of(b"x")}]},
        "bodies": {Digest::of(b"x").to_string(): "y"},
    });
    let (status, body) = plane.send("POST", "/v1/changes", forged.to_string().into_bytes()).await;
    assert_eq!(status, 422, "{}", String::from_utf8_lossy(&body));
    for garbage in
        ["", "{}", "[]", "null", "{\"change_set\":{\"base\":1,\"changes\":[{\"kind\":\"fly\"}]},\"bodies\":{}}"]
    {
        assert_eq!(plane.send("POST", "/v1/changes", garbage.into()).await.0, 400, "{garbage}");
    }
    assert_eq!(plane.status().await.root, root);
    let used = permit("p", "web", "catalog");
    plane.apply_with(1, vec![used.0], used.1).await.unwrap();
    let removed = refused(plane.apply(2, vec![Change::RemoveService { name: name("web") }]).await);
    assert!(removed.contains("web"), "a policy still names it: {removed}");
    assert_eq!(plane.status().await.revision, Revision(2));
}

#[tokio::test]
async fn a_contract_is_in_its_one_form_or_refused_and_policies_name_only_its_operations() {
    let plane = Plane::start().await;
    plane.create(&["web", "catalog"]).await;
    let declared = |text: &str| {
        let mut bodies = Bodies::default();
        let contract = Some(bodies.insert(text.to_owned()));
        let spec = ServiceSpec { contract, ..ServiceSpec::new(Protocol::Http) };
        (vec![Change::DeclareService { name: name("catalog"), spec }], bodies)
    };
    let operations = |names: &[&str]| {
        let operation = |name: &&str| format!(r#"{{"method":"GET","name":"{name}","path":"/{name}"}}"#);
        format!(r#"{{"operations":[{}]}}"#, names.iter().map(operation).collect::<Vec<_>>().join(","))
    };
    let good = operations(&["listItems", "search"]);
    for (text, expected) in [
        ("openapi: 3.1.0", "service `catalog`: not a contract"),
        (&*operations(&["b", "a"]), "service `catalog`: the contract is not in its canonical form"),
        (&*good.replace("\"/search\"", "\"/listItems\""), "two operations have the method and path"),
    ] {
        let (changes, bodies) = declared(text);
        let problem = plane.apply_with(1, changes, bodies).await.unwrap_err();
        assert_eq!(problem.status, 422, "{problem:?}");
        assert!(problem.detail.as_ref().is_some_and(|detail| detail.contains(expected)), "{problem:?}");
    }
    let (changes, _) = declared(&good);
    assert_eq!(plane.apply(1, changes).await.unwrap_err().status, 422, "its text did not come with it");

    let (changes, bodies) = declared(&good);
    plane.apply_with(1, changes, bodies).await.unwrap();
    let services = plane.status().await.services;
    let contract = services.iter().find(|service| service.name == name("catalog")).unwrap().contract.clone().unwrap();
    assert_eq!((contract.operations, contract.digest), (2, Digest::of(good.as_bytes())));

    let policy = |operation: &str| {
        let mut bodies = Bodies::default();
        let scope = format!("principal, action, resource == Operation::\"catalog/{operation}\"");
        let body = bodies.insert(format!("@id(\"p\") permit ({scope});"));
        (vec![Change::SetPolicy { id: "p".into(), file: "policies/p.cedar".into(), body }], bodies)
    };
    let (changes, bodies) = policy("listItem");
    let problem = plane.apply_with(2, changes, bodies).await.unwrap_err();
    assert!(
        problem.detail.as_ref().is_some_and(|detail| detail.contains("has no operation `listItem`")),
        "{problem:?}"
    );
    let (changes, bodies) = policy("listItems");
    plane.apply_with(2, changes, bodies).await.unwrap();
    let (changes, bodies) = declared(&operations(&["search"]));
    let problem = plane.apply_with(3, changes, bodies).await.unwrap_err();
    assert_eq!(problem.status, 422, "a policy still names what would go: {problem:?}");
    assert_eq!(plane.status().await.revision, Revision(3));
}

#[tokio::test]
async fn two_control_planes_on_one_directory_another_mesh_or_a_lost_key_do_not_start() {
    let plane = Plane::start().await;
    plane.create(&[]).await;
    let second = start(config(plane.dir.path().into())).await.err().unwrap();
    assert!(matches!(second, StartError::Running(_)), "{second}");
    assert!(plane.status().await.revision == Revision(1), "the first goes on");

    let dir = {
        let Plane { control, dir } = plane;
        control.stop().await;
        dir
    };
    let other = TrustDomain::parse("other.example").unwrap();
    let mut wanted = config(dir.path().into());
    wanted.trust_domain = Some(other);
    let refused = start(wanted).await.err().unwrap();
    assert!(matches!(refused, StartError::OtherMesh { .. }), "{refused}");

    let key = dir.path().join("keys/kek");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = start(config(dir.path().into())).await.err().unwrap();
    assert!(refused.help().unwrap().starts_with("chmod 600"), "{refused}");
    std::fs::write(&key, "00".repeat(32)).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let refused = start(config(dir.path().into())).await.err().unwrap();
    assert!(refused.to_string().contains("the mesh's keys are sealed with key"), "{refused}");
    std::fs::remove_file(&key).unwrap();
    let refused = start(config(dir.path().into())).await.err().unwrap();
    assert!(matches!(refused, StartError::SealingKey(_)), "a new key is never made beside sealed ones: {refused}");
}

#[tokio::test]
async fn a_directory_or_an_address_that_cannot_be_used_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = start(config(file.join("data"))).await.err().unwrap();
    assert!(error.to_string().contains("file/data") && error.help().is_some(), "{error}");
    let error = start(config(dir.path().join("d".repeat(100)))).await.err().unwrap();
    assert!(error.help().unwrap().contains("--data-dir of at most"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut wanted = config(dir.path().join("data"));
    wanted.listen = taken.local_addr().unwrap();
    let error = start(wanted).await.err().unwrap();
    assert!(error.help().unwrap().contains(&taken.local_addr().unwrap().port().to_string()), "{error}");
}

#[tokio::test]
async fn a_clock_before_the_newest_entry_is_refused_at_start_and_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let told = Arc::new(AtomicU64::new(now_ms()));
    let clock = Clock::from_fn({
        let told = told.clone();
        move || told.load(Ordering::Relaxed)
    });
    let control = start_with_clock(config(dir.path().into()), clock.clone()).await.unwrap();
    let plane = Plane { control, dir };
    plane.create(&[]).await;
    told.fetch_sub(60_000, Ordering::Relaxed);
    plane.apply(1, vec![declare("a")]).await.expect("a minute is within what clocks do");
    let changes: Vec<ChangeSummary> = plane.get("/v1/changes").await;
    assert_eq!(changes[0].at_ms, changes[1].at_ms, "time does not run backwards in the ledger");
    told.fetch_sub(60 * 60_000, Ordering::Relaxed);
    let problem = plane.apply(2, vec![declare("b")]).await.unwrap_err();
    assert!(problem.title.contains("clock") && problem.help.unwrap().contains("clock"));
    let Plane { control, dir } = plane;
    control.stop().await;
    let error = start_with_clock(config(dir.path().into()), clock).await.err().unwrap();
    assert!(matches!(error, StartError::Ledger(OpenError::Clock { .. })), "{error}");
    assert!(error.help().unwrap().contains("timedatectl"));
}

#[tokio::test]
async fn without_a_trust_domain_agents_wait_until_the_mesh_is_created() {
    let dir = tempfile::tempdir().unwrap();
    let mut wanted = config(dir.path().into());
    wanted.trust_domain = None;
    let plane = Plane { control: start(wanted).await.unwrap(), dir };
    let problem = plane.control.invite(support::WITHIN, None).await.unwrap_err();
    assert_eq!(problem.status, 409);
    assert_eq!(plane.send("GET", "/v1/authority", Vec::new()).await.0, 404);
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    agent.issue("web/1").await.unwrap();
    assert_eq!(plane.bundle().await.trust_domain(), &trust_domain());
}

#[tokio::test]
async fn a_store_restored_from_an_older_copy_is_noticed_and_accepted_only_when_told_to() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let dir = tempfile::tempdir().unwrap();
    let copy = rusqlite::Connection::open(plane.dir.path().join("control.db")).unwrap();
    copy.execute("VACUUM INTO ?1", [dir.path().join("control.db").to_str().unwrap()]).unwrap();
    drop(copy);
    plane.apply(1, vec![declare("catalog")]).await.unwrap();
    let mut agent = plane.agent("h1").await;
    let root = plane.status().await.root;
    let log_key = plane.get::<AuthorityView>("/v1/authority").await.log_key;
    let keys = plane.dir.path().join("keys");
    plane.control.stop().await;
    // Only the store is the old one.
    std::fs::rename(keys, dir.path().join("keys")).unwrap();

    let refused = start(config(dir.path().into())).await.err().unwrap();
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert_eq!(why, "the ledger ends at revision 1, and it was at 2 before: the store is an older copy");
    assert!(refused.help().unwrap().contains("--accept-rollback"), "{refused}");

    let mut accepting = config(dir.path().into());
    accepting.accept_rollback = true;
    let plane = Plane { control: start(accepting).await.unwrap(), dir };
    // Who holds the later history does not follow, and `status` shows who and why, though the store has forgotten the host.
    let channel =
        plane.channel(agent.identity.client_config(support::trust_domain().control(), &[b"h2"])).await.unwrap();
    agent.client = countersign_api::mesh::mesh_client::MeshClient::new(channel);
    assert!(agent.follow(2, root).await.is_err());
    let hosts = plane.status().await.hosts;
    assert_eq!(hosts.len(), 1);
    assert!(
        hosts[0].refused.as_ref().unwrap().contains("the agent holds revision 2, this ledger ends at 1"),
        "{hosts:?}"
    );

    // What was accepted once is the mark from then on.
    let plane = plane.restart().await.unwrap();
    plane.apply(1, vec![declare("other")]).await.unwrap();
    // The old key may have signed what is lost; the log that goes on otherwise has another one.
    let other_key = plane.get::<AuthorityView>("/v1/authority").await.log_key;
    assert_ne!(other_key, log_key);
    assert_eq!(plane.get::<CheckpointView>("/v1/ledger/checkpoint").await.log_key, other_key);
    let Plane { control, dir } = plane;
    control.stop().await;
    let mark = std::fs::read_dir(dir.path().join("keys")).unwrap().flatten();
    let mark = mark.map(|file| file.path()).find(|path| path.extension().is_some_and(|kind| kind == "mark")).unwrap();
    let text = std::fs::read_to_string(&mark).unwrap();
    let at = text.find("\"root\":\"").unwrap() + 8;
    let other = if &text[at..=at] == "0" { "1" } else { "0" };
    std::fs::write(&mark, format!("{}{other}{}", &text[..at], &text[at + 1..])).unwrap();
    let refused = start(config(dir.path().into())).await.err().unwrap();
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert!(why.starts_with("the ledger holds another revision 2"), "{why}");
}

/// The mode of the sockets keeps others away already; here it does not.
#[tokio::test]
async fn another_user_is_not_served_even_where_the_mode_of_the_socket_would_let_it_in() {
    use std::{io::Read as _, os::unix::fs::PermissionsExt as _};
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: only root can be another user; run the tests as root to see this one");
        return;
    }
    let plane = Plane::start().await;
    let socket = plane.dir.path().join("control.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(plane.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let asked = tokio::task::spawn_blocking(move || {
        let asks = std::thread::spawn(move || {
            // This thread alone becomes `nobody`, for good.
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
            let _ = std::io::Write::write_all(
                &mut stream,
                b"GET /v1/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            );
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer
        });
        asks.join().unwrap()
    });
    assert_eq!(asked.await.unwrap(), "");
    plane.status().await;
}

/// Runs itself again where the data directory is mounted read-only: to root, the mode of a directory means nothing.
#[tokio::test]
async fn a_data_directory_that_cannot_be_written_is_named_with_what_to_do() {
    const NAME: &str = "a_data_directory_that_cannot_be_written_is_named_with_what_to_do";
    if let Some(dir) = std::env::var_os("COUNTERSIGN_TEST_READ_ONLY_DIR") {
        let error = start(config(dir.clone().into())).await.err().expect("nothing can be written there");
        let said = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(said.contains(dir.to_str().unwrap()) && said.contains("Read-only file system"), "{said}");
        assert!(error.help().unwrap().contains("read-only"), "{:?}", error.help());
        return;
    }
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let Plane { control, dir } = plane;
    control.stop().await;
    let script = r#"mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$0" --exact "$2" --nocapture"#;
    let again = std::process::Command::new("unshare")
        .args(["-rm", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg(dir.path())
        .arg(NAME)
        .env("COUNTERSIGN_TEST_READ_ONLY_DIR", dir.path())
        .output();
    match again {
        Ok(output) if output.status.success() => {
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it was run");
        }
        Ok(output) if String::from_utf8_lossy(&output.stderr).starts_with("unshare:") => {
            eprintln!("NOT TESTED: the kernel refuses a mount namespace: {}", String::from_utf8_lossy(&output.stderr));
        }
        other => panic!("{other:?}"),
    }
    start(config(dir.path().into())).await.unwrap().stop().await;
}
