//! The ledger of a running mesh, as an outsider gets and checks it: exported, proven, cosigned, tampered with.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Stdio},
};

use serde_json::Value;
use support::{Mesh, binary, said};

/// A witness that ends with the test.
struct Witness {
    process: Child,
    started: Value,
}

impl Witness {
    fn start(dir: &std::path::Path, log_key: &str) -> Self {
        let mut command = binary();
        command.args([
            "-o",
            "json",
            "ledger",
            "witness",
            "--listen",
            "127.0.0.1:0",
            "--name",
            "beta",
            "--log",
            log_key,
        ]);
        let mut process = command.arg(dir).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { started: serde_json::from_str(&line).unwrap(), process }
    }

    fn address(&self) -> String {
        format!("{}={}", self.started["url"].as_str().unwrap(), self.started["key"].as_str().unwrap())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn an_outsider_checks_an_export_with_keys_alone_and_a_witness_stands_by() {
    let mut mesh = Mesh::started();
    let log_key = mesh.json(&["authority", "show"])["log_key"].as_str().unwrap().to_owned();
    assert!(log_key.starts_with("countersign/mesh.example+"), "{log_key}");
    assert_eq!(mesh.run_file().unwrap()["ledger_origin"], "countersign/mesh.example");
    mesh.signal("-INT");
    mesh.gone();

    let root = tempfile::tempdir().unwrap();
    let witness = Witness::start(&root.path().join("witness"), &log_key);
    mesh.spawn(&["--witness", &witness.address()]);
    mesh.until("the witness cosigned", |mesh| {
        let view = mesh.run(&["-o", "json", "ledger", "checkpoint"]);
        serde_json::from_slice::<Value>(&view.stdout).is_ok_and(|view| view["witnesses"][0]["cosigned"] == true)
    });
    mesh.permit_all();
    // Whichever comes first: the one who watches the directory, or this command.
    mesh.run(&["apply"]);
    mesh.until("the change is in the ledger", |mesh| mesh.json(&["status"])["revision"] == 2);

    let export = root.path().join("export");
    let exported = mesh.run(&["ledger", "export", export.to_str().unwrap()]);
    assert!(exported.status.success(), "{}", said(&exported));
    let again = mesh.run(&["ledger", "export", export.to_str().unwrap()]);
    assert!(again.status.success(), "an export is brought up to date: {}", said(&again));
    let elsewhere = mesh.run(&["ledger", "export", mesh.dir.to_str().unwrap()]);
    assert!(said(&elsewhere).contains("it is not empty"), "{}", said(&elsewhere));
    for (of, expected) in [("0", "c2sp.org/tlog-proof@v1\nindex 0\n"), ("2", "the ledger has 2 entries, and none at 2")]
    {
        let proof = mesh.run(&["ledger", "prove", of]);
        assert!(said(&proof).contains(expected), "{}", said(&proof));
    }
    assert!(said(&mesh.run(&["ledger", "prove", "--from", "1"])).starts_with("old 1\n"));
    mesh.signal("-INT");
    mesh.gone();

    let witness_key = witness.started["key"].as_str().unwrap();
    let verify = |more: &[&str]| {
        let mut command = binary();
        command.current_dir("/").args(["ledger", "verify", "--log-key", &log_key, "--offline"]).arg(&export);
        said(&command.args(more).output().unwrap())
    };
    let text = verify(&["--witness", witness_key]);
    assert!(text.starts_with("verified: 2 entries of countersign/mesh.example"), "{text}");
    assert!(text.contains("anchor    none: no operator has enrolled") && text.contains("witness   beta at "), "{text}");
    let keys = root.path().join("keys");
    fs::write(&keys, "alice\n").unwrap();
    let text = verify(&["--operators", keys.to_str().unwrap()]);
    assert!(text.contains("line 1 is neither `anchor <64 hexadecimal digits>` nor `<operator> <key"), "{text}");
    fs::write(&keys, "").unwrap();
    let text = verify(&["--operators", keys.to_str().unwrap()]);
    assert!(text.contains("no operator has enrolled in this ledger, although some are known"), "{text}");
    let text = verify(&["--witness", witness_key, "--quorum", "2"]);
    assert!(text.contains("1 witnesses cosigned it; 2 are asked for"), "{text}");

    let bundle = export.join("tile/entries/000.p/2");
    let mut bytes = fs::read(&bundle).unwrap();
    bytes[40] ^= 1;
    fs::write(&bundle, bytes).unwrap();
    let text = verify(&[]);
    assert!(text.contains("entry 0 does not have the hash that stands in `tile/0/000.p/2`"), "{text}");
    assert!(text.contains("help: keep the export as it is"), "{text}");
}
