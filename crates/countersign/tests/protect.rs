//! The real binary of a mesh that is protected: enrol, be refused, show a code, and what is remembered.

mod support;

use std::fs;

use support::{
    Mesh,
    codes::{enrol, json_of, next_code, now_seconds},
    said,
};

#[test]
fn a_protected_mesh_takes_a_change_with_a_code_once_and_nothing_without_one() {
    let mut mesh = Mesh::init();
    mesh.spawn(&["--no-watch"]);
    mesh.until("the mesh is up", |mesh| mesh.run_file().is_some());
    assert!(said(&mesh.run(&["status"])).contains("unprotected"));
    let nothing = mesh.run(&["operator", "enroll", "--totp", "--operator", "alice"]);
    assert_eq!(nothing.status.code(), Some(1), "no code came: {}", said(&nothing));
    assert!(said(&mesh.run(&["status"])).contains("unprotected"), "an enrolment without a code is none");

    let (app, enrolled) = enrol(&mesh, &["operator", "enroll", "--totp", "--operator", "alice"]);
    assert_eq!((&enrolled["operator"], &enrolled["anchor"]), (&"alice".into(), &true.into()));
    assert_eq!(enrolled["recovery_codes"].as_array().unwrap().len(), 10);
    let mut used = now_seconds() / 30;
    for command in [&["status"][..], &["operator", "list"], &["factor", "list"]] {
        assert!(!said(&mesh.run(command)).contains("unprotected"), "{command:?}");
    }
    assert_eq!(mesh.json(&["status"])["protected"], true);
    assert_eq!(mesh.json(&["operator", "list"])[0]["roles"][0], "owner");

    mesh.permit_all();
    let refused = mesh.run(&["-o", "json", "apply"]);
    assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
    let refusal = json_of(&refused);
    let members: Vec<&String> = refusal.as_object().unwrap().keys().collect();
    for member in ["outcome", "change", "digest", "requires", "url"] {
        assert!(members.iter().any(|found| *found == member), "{member}: {refusal}");
    }
    assert_eq!((&refusal["outcome"], &refusal["requires"]["factor"]), (&"step_up".into(), &"mfa".into()));
    let shown = said(&mesh.run(&["change", "show", refusal["change"].as_str().unwrap()]));
    assert!(shown.contains("waits for") && shown.contains("policy guests-are-greeted"), "{shown}");

    let code = next_code(&app, &mut used);
    let wrong = format!("{}{}", if code.starts_with('0') { '1' } else { '0' }, &code[1..]);
    let refused = mesh.run(&["-o", "json", "apply", "--otp", &wrong]);
    assert_eq!((refused.status.code(), &json_of(&refused)["outcome"]), (Some(3), &"step_up".into()));
    let applied = mesh.json(&["apply", "--otp", &code, "--wait", "30s"]);
    assert_eq!((&applied["outcome"], &applied["protected"]), (&"applied".into(), &true.into()), "{applied}");
    assert_eq!(applied["digest"], refusal["digest"], "what waited is what was applied");
    assert_eq!(mesh.json(&["change", "list"])[0]["actor"], "alice");
    mesh.until("what was applied is enforced", |mesh| mesh.ask("/secret").0 == "200");

    let policy = mesh.dir.join("policies/greeter.cedar");
    let open = fs::read_to_string(&policy).unwrap();
    fs::write(&policy, open.replace("guests-are-greeted", "guests-are-welcome")).unwrap();
    let again = mesh.run(&["apply", "--otp", &code]);
    assert_eq!(again.status.code(), Some(3), "{}", said(&again));
    assert!(said(&again).contains("the code was used already"), "{}", said(&again));

    mesh.signal("-KILL");
    mesh.gone();
    mesh.start();
    assert_eq!(mesh.json(&["status"])["protected"], true, "there is no way back");
    assert!(mesh.log().contains("the change needs"), "what differs waits, and the mesh runs on\n{}", mesh.log());
    let again = mesh.run(&["apply", "--otp", &code]);
    assert!(said(&again).contains("the code was used already"), "also after a kill: {}", said(&again));

    fs::write(&policy, open.replace("guests-are-greeted", "guests-are-expected")).unwrap();
    mesh.until("a save becomes a proposal", |mesh| {
        mesh.log().contains("guests-are-expected")
            || mesh.json(&["change", "list", "--pending"])[0]["changes"].to_string().contains("guests-are-expected")
    });
    let pending = mesh.json(&["change", "list", "--pending"]);
    let id = pending[0]["id"].as_str().unwrap().to_owned();
    let code = next_code(&app, &mut used);
    assert_eq!(mesh.json(&["apply", "--change", &id, "--otp", &code])["outcome"], "applied");
    assert_eq!(mesh.json(&["change", "wait", &id])["state"]["state"], "applied");
    assert_eq!(mesh.json(&["ledger", "verify"])["revision"], 4);

    let members = ["outcome", "change", "digest", "act", "requires", "url"];
    let export = mesh.dir.join("exported");
    for (command, act) in [
        (&["decision", "list"][..], "read_decisions"),
        (&["decision", "show", "0a"], "read_decisions"),
        (&["decision", "tail", "--limit", "1"], "read_decisions"),
        (&["ledger", "export", export.to_str().unwrap()], "export_ledger"),
        (&["host", "invite"], "invite_host"),
    ] {
        let refused = mesh.run(&[&["-o", "json"], command].concat());
        assert_eq!(refused.status.code(), Some(3), "{command:?}: {}", said(&refused));
        let refusal = json_of(&refused);
        assert!(members.iter().all(|member| refusal.get(member).is_some()), "{command:?}: {refusal}");
        assert_eq!((&refusal["outcome"], &refusal["act"]), (&"step_up".into(), &act.into()), "{command:?}");
    }
    let code = next_code(&app, &mut used);
    assert!(mesh.json(&["decision", "list", "--operator", "alice", "--otp", &code]).is_array());
    assert!(mesh.json(&["decision", "list"]).is_array(), "it is open for some minutes");
    assert_eq!(mesh.run(&["host", "invite", "--otp", &code]).status.code(), Some(3), "and the code was used");
    assert_eq!(mesh.json(&["ledger", "verify"])["revision"], 4, "verifying asks for nothing");

    // The code that was used already counts as one that was tried.
    for n in 1..6 {
        let wrong = format!("{:06}", n);
        let refused = mesh.run(&["operator", "invite", "bob", "--otp", &wrong]);
        assert_eq!(refused.status.code(), Some(3), "{}", said(&refused));
        assert_eq!(said(&refused).contains("too many codes were tried"), n == 5, "{n}: {}", said(&refused));
    }
    mesh.signal("-INT");
    mesh.gone();
}
