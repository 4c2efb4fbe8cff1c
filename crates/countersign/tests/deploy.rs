//! The real binary of a mesh whose services are held to their deployments: what was replaced does not run.

mod support;

use std::fs;

use serde_json::Value;

use support::{Mesh, said};

/// The greeter, as `service show` has it.
fn greeter(mesh: &Mesh) -> Value {
    mesh.json(&["service", "show", "greeter"])
}

#[test]
fn a_replaced_program_does_not_run_until_it_is_deployed() {
    let mut mesh = Mesh::started();
    let runs = greeter(&mesh)["instances"][0]["artifact"].as_str().expect("it was measured").to_owned();
    let here = mesh.run_in(&mesh.dir, &["-o", "json", "service", "artifact", "--", "python3", "services/greeter.py"]);
    let measured: Value = serde_json::from_slice(&here.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&here)));
    assert_eq!(measured["artifact"], runs, "what a pipeline measures is what an agent measures: {measured}");

    assert_eq!(mesh.json(&["service", "deploy", "greeter", "--seen"])["revision"], 2);
    assert_eq!(mesh.json(&["service", "deploy", "greeter", "--artifact", &runs])["outcome"], "unchanged");
    assert!(said(&mesh.run(&["change", "show", "2"])).contains(&runs));
    assert_eq!(mesh.ask("/hello").0, "200", "what runs is admitted, so nothing is cut");

    mesh.signal("-INT");
    mesh.gone();
    let script = mesh.dir.join("services/greeter.py");
    let built = fs::read_to_string(&script).unwrap();
    fs::write(&script, built.replace("hello, ", "pwned, ")).unwrap();
    mesh.spawn(&[]);
    mesh.until("the greeter waits", |mesh| {
        mesh.run_file().is_some() && greeter(mesh)["waiting"].as_array().is_some_and(|waiting| waiting.len() == 1)
    });
    mesh.until("it is said why", |mesh| mesh.log().contains("greeter/") && mesh.log().contains("does not run"));
    let shown = said(&mesh.run(&["service", "show", "greeter"]));
    assert!(shown.contains("countersign service deploy greeter --seen"), "{shown}");
    assert!(said(&mesh.run(&["status"])).contains("1 waiting"));
    assert_ne!(mesh.ask("/hello").0, "200");
    assert!(greeter(&mesh)["instances"].as_array().unwrap().is_empty());

    fs::write(&script, &built).unwrap();
    mesh.until("the right one, in its place again, runs", |mesh| mesh.ask("/hello").0 == "200");
    assert!(greeter(&mesh)["waiting"].as_array().unwrap().is_empty());

    let next = "0".repeat(64);
    for (arguments, expected) in [
        (vec!["service", "deploy", "greeter"], "nothing says what may be an instance"),
        (vec!["service", "deploy", "greeter", "--artifact", "1"], "64 hexadecimal digits"),
        (vec!["service", "deploy", "greeter", "--file", "no-such-file"], "could not find the program"),
        (vec!["service", "deploy", "nobody", "--seen"], "this mesh has no service `nobody`"),
    ] {
        let refused = mesh.run(&arguments);
        assert!(!refused.status.success() && said(&refused).contains(expected), "{arguments:?}: {}", said(&refused));
    }
    mesh.json(&["service", "deploy", "greeter", "--artifact", &next, "--only"]);
    mesh.until("what was taken back is ended", |mesh| mesh.ask("/hello").0 != "200");
    mesh.json(&["service", "deploy", "greeter", "--artifact", &runs]);
    mesh.until("and what was admitted again runs", |mesh| mesh.ask("/hello").0 == "200");
    mesh.json(&["ledger", "verify"]);
    mesh.signal("-INT");
    mesh.gone();
}
