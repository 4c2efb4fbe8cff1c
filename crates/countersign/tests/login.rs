//! The real binary as on another machine: it knows the address of the dashboard and has nothing of the mesh but its directory.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use support::{
    Mesh, binary,
    codes::{enrol, json_of, next_code, now_seconds},
    said,
};

/// What a browser would send: the status, and the body.
fn browse(url: &str, jar: &Path, arguments: &[&str]) -> (String, String) {
    let output = Command::new("curl")
        .args(["-s", "-m", "20", "-w", "\n%{http_code}", "-b"])
        .arg(jar)
        .arg("-c")
        .arg(jar)
        .args(arguments)
        .arg(url)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

fn post(origin: &str, path: &str, jar: &Path, csrf: &str, body: &Value) -> (String, String) {
    let (from, csrf) = (format!("origin: {origin}"), format!("x-countersign-csrf: {csrf}"));
    let arguments = ["-H", &*from, "-H", &*csrf, "-H", "content-type: application/json", "-d", &*body.to_string()];
    browse(&format!("{origin}{path}"), jar, &arguments)
}

#[test]
fn an_operator_signs_a_command_in_from_elsewhere_and_changes_the_mesh_with_a_code() {
    let mut mesh = Mesh::init();
    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    let (app, _) = enrol(&mesh, &["operator", "enroll", "--totp", "--operator", "alice"]);
    let mut used = now_seconds() / 30;
    let origin = mesh.run_file().unwrap()["dashboard"].as_str().unwrap().to_owned();
    let away = tempfile::tempdir().unwrap();
    let (logins, jar) = (away.path().join("logins"), away.path().join("jar"));
    let afar = || {
        let mut command = binary();
        command.current_dir(away.path()).env("COUNTERSIGN_LOGIN_DIR", &logins).env("COUNTERSIGN_DASHBOARD", &origin);
        command
    };
    let run = |arguments: &[&str]| -> Output { afar().args(arguments).output().unwrap() };
    let nobody = run(&["status"]);
    assert!(
        said(&nobody).contains("nobody is signed in") && said(&nobody).contains("countersign login"),
        "{}",
        said(&nobody)
    );

    let mut login = afar().args(["-o", "json", "login", "--no-browser"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(login.stdout.take().unwrap()).lines();
    let told: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    let code = next_code(&app, &mut used);
    let signed_in = post(&origin, "/sign-in/code", &jar, "", &json!({ "operator": "alice", "code": code }));
    assert_eq!(signed_in.0, "200", "{}", signed_in.1);
    let (_, page) = browse(told["verification_uri_complete"].as_str().unwrap(), &jar, &[]);
    assert!(page.contains(told["key"].as_str().unwrap()), "{page}");
    let csrf = page.split_once("countersign-csrf\" content=\"").unwrap().1.split('"').next().unwrap().to_owned();
    let answered = post(&origin, "/device/answer", &jar, &csrf, &json!({ "code": told["user_code"], "allow": true }));
    assert_eq!(answered.0, "200", "{}", answered.1);
    let session: String = lines.map(Result::unwrap).collect::<Vec<_>>().join("\n");
    assert!(login.wait().unwrap().success());
    assert_eq!(serde_json::from_str::<Value>(&session).unwrap()["who"], "alice");

    assert!(said(&run(&["whoami"])).contains("alice"));
    assert_eq!(json_of(&run(&["-o", "json", "status"]))["protected"], true);
    for command in [
        &["change", "list"][..],
        &["operator", "list"],
        &["factor", "list"],
        &["session", "list"],
        &["ledger", "checkpoint"],
        &["ledger", "prove", "0"],
        &["service", "list"],
        &["authority", "show"],
    ] {
        let output = run(command);
        assert!(output.status.success(), "{command:?}: {}", said(&output));
    }
    assert!(said(&run(&["session", "list"])).contains("command line"));
    for (command, why) in [
        (&["host", "invite"][..], "cannot be asked for from another machine"),
        (&["operator", "link"], "cannot be asked for from another machine"),
        (&["--at", &*origin, "exec", "web", "--", "true"], "on the machine of the mesh"),
        (&["operator", "remove", "alice", "--operator", "bob"], "names another operator"),
        (&["ledger", "export", "export"], "needs a second factor"),
        (&["ledger", "verify"], "needs a second factor"),
        (&["decision", "list"], "needs a second factor"),
    ] {
        let output = run(command);
        assert!(!output.status.success() && said(&output).contains(why), "{command:?}: {}", said(&output));
    }

    mesh.permit_all();
    let dir = mesh.dir.to_str().unwrap().to_owned();
    let refused = run(&["-o", "json", "apply", &dir]);
    assert_eq!((refused.status.code(), &json_of(&refused)["outcome"]), (Some(3), &"step_up".into()));
    let code = next_code(&app, &mut used);
    let applied = run(&["-o", "json", "apply", &dir, "--otp", &code, "--wait", "30s"]);
    assert_eq!(json_of(&applied)["outcome"], "applied", "{}", said(&applied));
    assert_eq!(mesh.json(&["change", "list"])[0]["actor"], "alice");
    let code = next_code(&app, &mut used);
    let opened = run(&["decision", "list", "--otp", &code]);
    assert!(opened.status.success(), "{}", said(&opened));
    assert!(run(&["decision", "list"]).status.success(), "it stays open in this session");
    assert!(said(&mesh.run(&["decision", "list"])).contains("needs a second factor"), "and in no other");

    let code = next_code(&app, &mut used);
    for command in [&["ledger", "verify", "--otp", &code][..], &["ledger", "verify"]] {
        let verified = run(command);
        assert!(verified.status.success(), "{}", said(&verified));
    }

    let file = fs::read_dir(&logins).unwrap().next().unwrap().unwrap().path();
    let stolen = fs::read(&file).unwrap();
    assert!(run(&["logout"]).status.success());
    assert!(!file.exists());
    fs::write(&file, stolen).unwrap();
    assert!(said(&run(&["whoami"])).contains("others can read it"));
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert!(said(&run(&["whoami"])).contains("the session is over"), "a copy is of no use after that");
    mesh.signal("-INT");
    mesh.gone();
}
