//! The real binary, from `init` to Ctrl-C: what a stranger does on the first day, and what a crash leaves behind.

mod support;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use serde_json::Value;

use support::{Mesh, binary, said};

#[test]
fn a_revoked_identity_is_replaced_by_another_and_the_mesh_goes_on() {
    let mut mesh = Mesh::started();
    let web = "spiffe://mesh.example/web";
    let before = mesh.json(&["identity", "list", "--id", web]);
    let serial = before[0]["serial"].as_str().expect("it has one").to_owned();
    let shown = said(&mesh.run(&["identity", "show", &serial]));
    assert!(shown.contains("instance web/1-") && !shown.contains("revoked"), "{shown}");

    let revoked = said(&mesh.run(&["identity", "revoke", "--serial", &serial, "--reason", "it was copied"]));
    assert!(revoked.contains("revoked: 1 identities, by signal 1"), "{revoked}");
    assert!(revoked.contains("enforced: all 2 proxies enforce it"), "{revoked}");
    mesh.until("it has another one, and calls with it", |mesh| {
        let now = mesh.json(&["identity", "list", "--id", web]);
        let good = now.as_array().unwrap().iter().filter(|one| one.get("revoked").is_none()).count();
        good == 1 && mesh.ask("/hello").0 == "200"
    });
    let shown = said(&mesh.run(&["identity", "show", &serial]));
    assert!(shown.contains("by local: it was copied"), "{shown}");

    for (arguments, expected) in [
        (&["--reason", "all of them"][..], "nothing says which identities are meant"),
        (&["--serial", &"0".repeat(32), "--reason", "none"], "no identity that has not expired is meant"),
        (&["--serial", "xyz", "--reason", "none"], "32 hexadecimal digits"),
        (&["--key", "xyz", "--reason", "none"], "64 hexadecimal digits"),
        (&["--serial", &serial], "--reason <TEXT>"),
    ] {
        let refused = mesh.run(&[&["identity", "revoke"], arguments].concat());
        assert!(!refused.status.success() && said(&refused).contains(expected), "{arguments:?}: {}", said(&refused));
    }
    mesh.signal("-INT");
    mesh.gone();
}

/// Every request of a workload that asks without pause is answered while the root of the trust domain is replaced, and nothing rests on
/// the first one afterwards.
#[test]
fn a_mesh_whose_root_is_replaced_answers_every_request() {
    let mut mesh = Mesh::started();
    let first = mesh.json(&["authority", "show"])["roots"][0]["root"]["sha256"].clone();
    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let dir = mesh.dir.clone();
    let ask = || {
        while !stop.load(Ordering::Relaxed) {
            let url = "http://greeter.mesh/hello";
            let mut curl = binary();
            curl.arg("-C").arg(&dir).args(["exec", "web", "--", "curl", "-s", "-m", "20", "-o", "/dev/null"]);
            let answer = curl.args(["-w", "%{http_code}", url]).output().unwrap();
            assert_eq!(said(&answer), "200", "after {} answers", asked.load(Ordering::Relaxed));
            asked.fetch_add(1, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let asking = scope.spawn(ask);
        let some_more = |mesh: &mut Mesh| {
            let enough = asked.load(Ordering::Relaxed) + 5;
            mesh.until("some more are answered", |_| asking.is_finished() || asked.load(Ordering::Relaxed) >= enough);
        };
        for (step, expected) in [
            (&["rotate"][..], "prepared: root 2"),
            (&["rotate"], "active: root 2"),
            (&["taint", "1"], "tainted: root 1"),
        ] {
            mesh.until(expected, |mesh| said(&mesh.run(&[&["authority"], step].concat())).contains(expected));
            some_more(&mut mesh);
        }
        mesh.until("everybody has an identity of the second root", |mesh| {
            let good = mesh.json(&["identity", "list", "--authority", "2"]);
            let ids: BTreeSet<_> = good.as_array().unwrap().iter().map(|one| one["id"].to_string()).collect();
            ids.len() == 4
        });
        some_more(&mut mesh);
        let refused = said(&mesh.run(&["authority", "revoke", "1"]));
        assert!(refused.contains("that rest on root 1 have not expired") && refused.contains("--force"), "{refused}");
        let revoked = said(&mesh.run(&["authority", "revoke", "1", "--force"]));
        assert!(revoked.contains("revoked: root 1") && revoked.contains("cut:"), "{revoked}");
        some_more(&mut mesh);
        stop.store(true, Ordering::Relaxed);
        asking.join().unwrap();
    });
    let roots = mesh.json(&["authority", "show"])["roots"].clone();
    assert!(roots.as_array().unwrap().len() == 1 && roots[0]["root"]["sha256"] != first, "{roots}");
    mesh.signal("-INT");
    mesh.gone();
    mesh.start();
    assert_eq!(mesh.ask("/hello").0, "200");
}

#[test]
fn what_policy_allows_passes_and_the_rest_is_denied_recorded_and_explained() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.ask("/hello"), ("200".into(), "hello, spiffe://mesh.example/web\n".into()));
    let (status, body) = mesh.ask("/secret");
    assert_eq!(status, "403");
    let denied: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(denied["error"], "denied");
    let id = denied["decision"].as_str().unwrap().to_owned();
    assert_eq!(denied.as_object().unwrap().len(), 2, "a denial tells the caller nothing more");

    mesh.until("the denial is with the control plane", |mesh| {
        mesh.json(&["decision", "list"]).as_array().unwrap().iter().any(|record| record["id"] == *id)
    });
    let shown = mesh.json(&["decision", "show", &id]);
    assert_eq!(shown["replay"]["agrees"], true, "{shown}");
    assert_eq!(shown["record"]["inputs"]["path"], "/secret");
    let asked =
        ["policy", "explain", "--principal", "web", "--action", "http:GET", "--service", "greeter", "--path", "/hello"];
    let explained = mesh.json(&asked);
    assert_eq!((&explained["outcome"], &explained["by"][0]), (&"permit".into(), &"guests-are-greeted".into()));

    let told: Vec<Value> = mesh.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |message: &str| told.iter().filter(|event| event["message"] == message).count();
    assert_eq!((of("an instance starts"), of("svid issued"), of("a workload accepts connections")), (2, 2, 2));
    let twice = told.iter().find(|event| event["level"] == "INFO" && event["target"] == "countersign::sidecar");
    assert_eq!(twice, None, "what a sidecar does is told by its agent, once");

    let second = binary().arg("up").arg(&mesh.dir).output().unwrap();
    assert!(!second.status.success());
    let pid = mesh.up.as_ref().unwrap().id();
    assert!(said(&second).contains(&format!("this mesh runs already: process {pid}")), "{}", said(&second));

    for question in [
        &["status"][..],
        &["service", "list"],
        &["service", "show", "web"],
        &["change", "list"],
        &["change", "show", "1"],
        &["change", "wait", "1"],
        &["plan"],
        &["policy", "test"],
        &["policy", "lint"],
        &["authority", "show"],
        &["ledger", "verify"],
        &["doctor"],
        &["decision", "list", "--outcome", "deny"],
    ] {
        mesh.json(question);
    }

    mesh.signal("-INT");
    mesh.gone();
    assert_eq!(mesh.run_file(), None, "run.json is gone with the mesh");
}

#[test]
fn a_change_takes_hold_on_apply_and_on_save_and_survives_a_kill() {
    let mut mesh = Mesh::init();
    // Without watching, so that `apply` is what applies.
    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    mesh.until("the greeter answers", |mesh| mesh.ask("/hello").0 == "200");
    assert_eq!(mesh.ask("/secret").0, "403");

    mesh.permit_all();
    let refused = mesh.run(&["apply", "--tested"]);
    assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
    let applied = mesh.json(&["apply", "--wait", "30s"]);
    assert_eq!((&applied["outcome"], &applied["revision"]), (&"applied".into(), &2.into()), "{applied}");
    assert_eq!(applied["failing_tests"].as_array().unwrap().len(), 1, "{applied}");
    assert_eq!(mesh.ask("/secret").0, "200", "what was acknowledged is enforced");
    assert_eq!(mesh.json(&["apply", "--wait", "30s"])["outcome"], "unchanged");

    mesh.signal("-KILL");
    mesh.gone();
    mesh.start();
    assert_eq!(mesh.json(&["ledger", "verify"])["revision"], 2, "an acknowledged change survives");
    assert_eq!(mesh.ask("/secret").0, "200");

    fs::write(mesh.dir.join("policies/greeter.cedar"), "@id(\"oops\") permit (principal, action resource);").unwrap();
    mesh.until("the mistake is told", |mesh| mesh.log().contains("policies/greeter.cedar:1:"));
    assert_eq!(mesh.ask("/secret").0, "200", "a mistake changes nothing");
    fs::write(mesh.dir.join("policies/greeter.cedar"), "@id(\"closed\") forbid (principal, action, resource);\n")
        .unwrap();
    mesh.until("the save is enforced", |mesh| mesh.ask("/hello").0 == "403");
    mesh.signal("-TERM");
    mesh.gone();
}

#[test]
fn a_suspended_service_is_as_if_it_were_not_there_until_it_is_resumed() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.ask("/hello").0, "200");
    assert_eq!(mesh.json(&["service", "suspend", "greeter", "--reason", "it leaks"])["revision"], 2);
    mesh.until("nobody finds it", |mesh| mesh.ask("/hello").0 == "404");
    assert!(said(&mesh.run(&["service", "show", "greeter"])).contains("suspended: it leaks"));
    mesh.json(&["service", "resume", "greeter"]);
    mesh.until("it is found again", |mesh| mesh.ask("/hello").0 == "200");
    mesh.json(&["service", "suspend", "web", "--reason", "it is not what it was"]);
    mesh.until("whoever is suspended finds nobody", |mesh| mesh.ask("/hello").0 == "404");
    for (arguments, expected) in [
        (&["suspend", "web", "--reason", "again"][..], "service web is suspended: resume it first"),
        (&["approve", "greeter"], "service greeter is active: there is nothing to lift"),
        (&["approve", "nobody"], "service nobody does not exist"),
        (&["suspend", "greeter"], "--reason <TEXT>"),
    ] {
        let refused = mesh.run(&[&["service"], arguments].concat());
        assert!(!refused.status.success() && said(&refused).contains(expected), "{arguments:?}: {}", said(&refused));
    }
    assert!(said(&mesh.run(&["service", "list", "--pending"])).contains("no service waits to be approved"));
    mesh.json(&["ledger", "verify"]);
    mesh.signal("-INT");
    mesh.gone();
}

#[test]
fn a_service_that_dies_at_once_is_shown_and_the_rest_goes_on() {
    let mut mesh = Mesh::init();
    fs::write(mesh.dir.join("services/web.py"), "import sys\nsys.exit('web has nothing to do today')\n").unwrap();
    mesh.spawn(&[]);
    mesh.until("the mesh is up all the same", |mesh| mesh.run_file().is_some());
    mesh.until("its last lines are shown", |mesh| mesh.log().contains("web has nothing to do today"));
    mesh.signal("-INT");
    mesh.gone();
}

#[test]
fn a_command_without_a_mesh_says_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let at = |arguments: &[&str], dir: &Path| binary().args(arguments).current_dir(dir).output().unwrap();
    for (arguments, code, part) in [
        (&["status"][..], 1, "found no mesh"),
        (&["-C", "nowhere", "status"], 1, "could not open the directory"),
        (&["up", "."], 1, "is not a mesh directory"),
        (&["nonsense"], 2, "unrecognized subcommand"),
        (&["decision", "show", "../../etc"], 1, "found no mesh"),
    ] {
        let output = at(arguments, root.path());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(part), "{arguments:?}: {}", said(&output));
    }
    fs::write(root.path().join("mesh.toml"), "trust_domain = \"a.example\"\n[services.web]\nrunn = [\"x\"]\n").unwrap();
    let output = at(&["status"], root.path());
    assert!(said(&output).contains("is not running"), "{}", said(&output));
    assert!(said(&output).contains("help: start the mesh with `countersign up"), "{}", said(&output));
    let output = at(&["up", "."], root.path());
    assert!(said(&output).contains("mesh.toml:3:1"), "{}", said(&output));
    let output = at(&["-o", "json", "up", "."], root.path());
    let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(failure["mistakes"][1]["line"], 3, "{failure}");
}
