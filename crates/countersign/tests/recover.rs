//! The real binary when every factor is lost: who can recover the mesh, and who hears of it.

mod support;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
};

use support::{
    Mesh, binary,
    codes::{enrol, enrol_with, json_of, next_code, now_seconds},
    said,
};

/// A page of the mesh's dashboard, as a browser gets it.
fn page(mesh: &Mesh, path: &str) -> String {
    let port: u16 = fs::read_to_string(mesh.dir.join(".countersign/dashboard.port")).unwrap().trim().parse().unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

/// PROVES (recovery-needs-the-key)
#[test]
fn whoever_has_the_files_and_the_key_appoints_an_owner_and_everyone_hears_of_it() {
    let mut mesh = Mesh::init();
    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    let ask = ["recover", "--operator", "alice", "--reason", "her phone was stolen"];
    mesh.signal("-INT");
    mesh.gone();
    let unprotected = mesh.run(&ask);
    assert!(
        said(&unprotected).contains("the mesh is unprotected: there is nobody to recover"),
        "{}",
        said(&unprotected)
    );

    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    let (old, _) = enrol(&mesh, &["operator", "enroll", "--totp", "--operator", "alice"]);
    let mut used_of_old = now_seconds() / 30;
    let running = mesh.run(&ask);
    assert!(said(&running).contains("stop the control plane first"), "{}", said(&running));
    mesh.signal("-INT");
    mesh.gone();

    let (kek, away) = (mesh.dir.join(".countersign/keys/kek"), mesh.dir.join("away"));
    fs::rename(&kek, &away).unwrap();
    let without = mesh.run(&ask);
    assert!(said(&without).contains("is missing, and the store holds keys"), "{}", said(&without));
    let other = mesh.dir.join("other");
    fs::write(&other, "00".repeat(32)).unwrap();
    assert!(std::process::Command::new("chmod").arg("600").arg(&other).status().unwrap().success());
    let with_other = mesh.run(&[&ask[..], &["--key-file", other.to_str().unwrap()]].concat());
    assert!(said(&with_other).contains("are sealed with key"), "{}", said(&with_other));
    fs::rename(&away, &kek).unwrap();
    let silent = mesh.run(&["recover", "--operator", "alice", "--reason", " "]);
    assert!(said(&silent).contains("the reason has to have"), "{}", said(&silent));
    let codeless = mesh.run(&ask);
    assert!(!codeless.status.success() && said(&codeless).contains("no code came"), "{}", said(&codeless));

    let (new, recovered) = enrol_with(binary().arg("-C").arg(&mesh.dir), &ask);
    let mut used = now_seconds() / 30;
    assert_eq!(recovered["removed"].as_array().unwrap().len(), 2, "her app and her recovery codes: {recovered}");
    assert_eq!((&recovered["sealed"], &recovered["own_gate_stays"]), (&false.into(), &true.into()));

    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    let status = said(&mesh.run(&["status"]));
    assert!(status.contains("was recovered past its gate") && status.contains("her phone was stolen"), "{status}");
    for command in [&["operator", "list"][..], &["service", "list"], &["change", "list"], &["host", "list"]] {
        assert!(said(&mesh.run(command)).contains("`alice` was made owner"), "{command:?}");
    }
    let page = page(&mesh, "/sign-in");
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("was recovered past its gate"), "{page}");
    let list = mesh.json(&["change", "list"]);
    assert!(list[0]["changes"][0] == "recover operator alice" && list[0]["actor"] == "local", "{list}");
    mesh.permit_all();
    let refused = mesh.run(&["-o", "json", "apply", "--otp", &next_code(&old, &mut used_of_old)]);
    assert_eq!(
        (refused.status.code(), &json_of(&refused)["outcome"]),
        (Some(3), &"step_up".into()),
        "what was lost is worth nothing"
    );
    let code = next_code(&new, &mut used);
    assert_eq!(mesh.json(&["apply", "--otp", &code])["outcome"], "applied");
    mesh.json(&["ledger", "verify"]);
}
