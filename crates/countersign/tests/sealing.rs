//! The real control plane with its keys sealed by a file, by a credential of systemd and by a key in a security module (softhsm2),
//! each way in which one is missing, and the change from one to another.

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use support::{
    binary,
    codes::{enrol_with, json_of, next_code, now_seconds},
    said,
};

/// The key that is brought into the token.
const KEY: &[u8] = b"a key for tests of 32 bytes, yes";
const PATIENCE: Duration = Duration::from_secs(60);
/// Where Debian's softhsm2 has its module.
const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// A data directory, a token of softhsm2 and credentials; and a control plane while it runs.
struct Room {
    root: tempfile::TempDir,
    running: Option<Child>,
}

impl Room {
    fn new() -> Self {
        let room = Self { root: tempfile::tempdir().unwrap(), running: None };
        for dir in ["tokens", "credentials"] {
            fs::create_dir(room.path(dir)).unwrap();
        }
        let tokens = room.path("tokens").display().to_string();
        fs::write(room.path("softhsm2.conf"), format!("directories.tokendir = {tokens}\nlog.level = ERROR\n")).unwrap();
        fs::write(room.path("pin"), "1234\n").unwrap();
        fs::write(room.path("wrong-pin"), "4321\n").unwrap();
        room
    }

    /// A token `mesh` with the AES key `kek` in it.
    fn with_token(self) -> Self {
        fs::write(self.path("aes"), KEY).unwrap();
        let aes = self.path("aes").display().to_string();
        for arguments in [
            &["--init-token", "--free", "--label", "mesh", "--pin", "1234", "--so-pin", "5678"][..],
            &["--import", &aes, "--aes", "--token", "mesh", "--label", "kek", "--id", "01", "--pin", "1234"],
        ] {
            let done = self.in_room(&mut Command::new("softhsm2-util")).args(arguments).output();
            let done = done.expect("softhsm2 is installed by scripts/test-tools");
            assert!(done.status.success(), "{}", said(&done));
        }
        fs::remove_file(aes).unwrap();
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().canonicalize().unwrap().join(name)
    }

    fn in_room<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("SOFTHSM2_CONF", self.path("softhsm2.conf"))
            .env("CREDENTIALS_DIRECTORY", self.path("credentials"))
            .env("COUNTERSIGN_DATA_DIR", self.path("data"))
    }

    fn uri(&self, token: &str, object: &str, pin: &str) -> String {
        let pin = self.path(pin).display().to_string();
        format!("pkcs11:token={token};object={object}?module-path={MODULE}&pin-source=file:{pin}")
    }

    fn control(&self, arguments: &[&str]) -> Command {
        let mut command = binary();
        let common = ["control", "--listen", "127.0.0.1:0", "--trust-domain", "shop.example"];
        self.in_room(&mut command).args(common).args(arguments);
        command
    }

    /// A start that ends by itself, with what it said.
    fn fails(&self, arguments: &[&str]) -> Output {
        let log = fs::File::create(self.path("failed.log")).unwrap();
        let mut child = self.control(arguments).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("it started with {arguments:?}");
            }
            thread::sleep(Duration::from_millis(20));
        };
        Output { status, stdout: Vec::new(), stderr: fs::read(self.path("failed.log")).unwrap() }
    }

    fn start(&mut self, arguments: &[&str]) {
        let log = fs::File::create(self.path("control.log")).unwrap();
        self.running = Some(self.control(arguments).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !self.run(&["status"]).status.success() {
            let ended = self.running.as_mut().unwrap().try_wait().unwrap();
            let log = fs::read_to_string(self.path("control.log")).unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}\n{log}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn kill(&mut self) {
        let mut running = self.running.take().unwrap();
        running.kill().unwrap();
        running.wait().unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.in_room(&mut binary()).args(arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["-o", "json"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        json_of(&output)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = running.kill();
            let _ = running.wait();
        }
    }
}

/// Everything below `dir`, as bytes.
fn contents(dir: &Path) -> Vec<u8> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => all.extend(contents(&entry.path())),
            kind if kind.is_file() => all.extend(fs::read(entry.path()).unwrap()),
            _ => {}
        }
    }
    all
}

#[test]
fn a_key_in_a_security_module_seals_and_each_way_in_which_it_is_missing_is_said() {
    let mut room = Room::new().with_token();
    let good = room.uri("mesh", "kek", "pin");
    let no_pin = format!("pkcs11:token=mesh;object=kek?module-path={MODULE}");
    let pin = room.path("pin").display().to_string();
    let no_module = format!("pkcs11:token=mesh;object=kek?module-path=/nowhere/module.so&pin-source=file:{pin}");
    for (uri, why, help) in [
        (room.uri("mesh", "kek", "wrong-pin"), "the token does not take the PIN", "correct the PIN"),
        (room.uri("mesh", "kek", "no-pin"), "the PIN cannot be read", "pin-source=file:"),
        (room.uri("vault", "kek", "pin"), "no tokens of the module match `vault`; it has `mesh`", "--list-token-slots"),
        (room.uri("mesh", "dek", "pin"), "no secret key that `dek` names", "--keygen"),
        (no_pin, "the token asks for a PIN", "pin-source=file:"),
        (no_module, "the module `/nowhere/module.so` cannot be loaded", "PKCS#11 library"),
    ] {
        let failed = room.fails(&["--key-pkcs11", &uri]);
        let text = said(&failed);
        assert_eq!(failed.status.code(), Some(1), "{text}");
        assert!(text.contains(why) && text.contains("help: ") && text.contains(help), "{uri}\n{text}");
        assert!(!text.contains("1234") && !text.contains("4321"), "{text}");
    }
    let on_the_line = format!("pkcs11:token=mesh;object=kek?module-path={MODULE}&pin-value=1234");
    let refused = room.fails(&["--key-pkcs11", &on_the_line]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("a PIN does not stand in the URI"), "{}", said(&refused));
    assert_eq!(room.fails(&["--key-pkcs11", &good, "--key-file", "kek"]).status.code(), Some(2), "one key, not two");

    room.start(&["--key-pkcs11", &good]);
    let shown = room.json(&["authority", "show"]);
    assert!(shown["sealed_by"].as_str().unwrap().starts_with("pkcs11:token=mesh"), "{shown}");
    let first = shown["roots"][0]["root"]["sha256"].clone();
    room.kill();
    let other = said(&room.fails(&[]));
    assert!(other.contains("key file") && other.contains("is missing"), "the data directory has no key: {other}");
    fs::write(room.path("other"), "00".repeat(32)).unwrap();
    fs::set_permissions(room.path("other"), fs::Permissions::from_mode(0o600)).unwrap();
    let other = said(&room.fails(&["--key-file", room.path("other").to_str().unwrap()]));
    assert!(
        other.contains("the mesh's keys are sealed with key ") && other.contains("help: start with the key"),
        "{other}"
    );
    room.start(&["--key-pkcs11", &good]);
    assert_eq!(room.json(&["authority", "show"])["roots"][0]["root"]["sha256"], first, "the same keys opened again");
    room.kill();

    let kept = contents(&room.path("data"));
    assert!(kept.len() > 1000 && !kept.windows(32).any(|window| window == KEY), "the key is in the data directory");
}

#[test]
fn a_credential_of_systemd_seals_and_one_that_is_missing_is_said() {
    let mut room = Room::new();
    let missing = room.fails(&["--key-credential", "mesh-kek"]);
    let text = said(&missing);
    assert!(
        text.contains("credential `mesh-kek` is not in ") && text.contains("LoadCredentialEncrypted=mesh-kek"),
        "{text}"
    );
    let unset = room.control(&["--key-credential", "mesh-kek"]).env_remove("CREDENTIALS_DIRECTORY").output().unwrap();
    assert!(said(&unset).contains("was given no $CREDENTIALS_DIRECTORY"), "{}", said(&unset));
    let elsewhere = said(&room.fails(&["--key-credential", "../pin"]));
    assert!(elsewhere.contains("credential `../pin` is not in "), "a name is no path: {elsewhere}");
    let credential = room.path("credentials/mesh-kek");
    fs::write(&credential, "no key").unwrap();
    let text = said(&room.fails(&["--key-credential", "mesh-kek"]));
    assert!(text.contains("does not hold 64 hexadecimal digits"), "{text}");
    fs::write(&credential, "ab".repeat(32)).unwrap();
    room.start(&["--key-credential", "mesh-kek"]);
    let shown = room.json(&["authority", "show"]);
    assert!(shown["sealed_by"].as_str().unwrap().starts_with("credential mesh-kek (key "), "{shown}");
    assert!(!room.path("data/keys/kek").exists());
}

/// PROVES (rotation-gated)
#[test]
fn another_key_seals_everything_after_a_change_that_the_gate_let_through_and_the_old_one_nothing() {
    let mut room = Room::new().with_token();
    let dir = room.path("mesh").display().to_string();
    assert!(binary().args(["init", "--trust-domain", "shop.example", &dir]).output().unwrap().status.success());
    room.start(&[]);
    assert_eq!(room.json(&["apply", &dir])["outcome"], "applied");
    let (app, _) = enrol_with(room.in_room(&mut binary()), &["operator", "enroll", "--totp", "--operator", "alice"]);
    let mut used = now_seconds() / 30;
    let before = room.json(&["status"])["revision"].as_u64().unwrap();

    let good = room.uri("mesh", "kek", "pin");
    let refused = room.run(&["-o", "json", "authority", "reseal", "--new-key-pkcs11", &good]);
    assert_eq!((refused.status.code(), &json_of(&refused)["outcome"]), (Some(3), &"step_up".into()));
    let missing = room.run(&["authority", "reseal", "--new-key-pkcs11", &room.uri("vault", "kek", "pin")]);
    assert!(said(&missing).contains("could not use the key"), "{}", said(&missing));
    let by = room.json(&["authority", "show"])["sealed_by"].clone();
    assert!(by.as_str().unwrap().starts_with("file "), "nothing was sealed anew: {by}");

    // Chosen by a change that waited, as it does where others have to countersign: it is done when it is asked for again.
    let waiting = room.json(&["change", "list", "--pending"])[0]["id"].as_str().unwrap().to_owned();
    let code = next_code(&app, &mut used);
    assert_eq!(room.json(&["apply", "--change", &waiting, "--otp", &code])["outcome"], "applied");
    let status = said(&room.run(&["status"]));
    assert!(status.contains("was chosen, and key") && status.contains("authority reseal"), "{status}");
    room.kill();
    room.start(&[]);
    assert!(said(&room.run(&["status"])).contains("was chosen, and key"), "a restart forgets nothing of it");
    let rotated = room.json(&["authority", "reseal", "--new-key-pkcs11", &good]);
    assert!(rotated["revision"].is_null() && rotated["resealed"].as_u64().unwrap() >= 6, "{rotated}");
    assert!(!said(&room.run(&["status"])).contains("was chosen"));
    let again = room.run(&["authority", "reseal", "--new-key-pkcs11", &good]);
    assert!(said(&again).contains("seals everything already"), "{}", said(&again));
    room.kill();

    let old = said(&room.fails(&[]));
    assert!(old.contains("the mesh's keys are sealed with key "), "{old}");
    assert!(old.contains(&format!("start with `--key-pkcs11 '{good}'`")), "{old}");
    room.start(&["--key-pkcs11", &good]);
    assert_eq!(room.json(&["ledger", "verify"])["revision"], before + 1);
    let entry = said(&room.run(&["change", "show", &(before + 1).to_string()]));
    assert!(entry.contains("+ sealing key ") && entry.contains(rotated["fingerprint"].as_str().unwrap()), "{entry}");
    // What verifies her codes was sealed anew like everything else.
    let file = room.path("next").display().to_string();
    let code = next_code(&app, &mut used);
    let rotated = room.json(&["authority", "reseal", "--new-key-file", &file, "--otp", &code]);
    assert_eq!(rotated["revision"], before + 2);
    assert!(room.json(&["ledger", "checkpoint"])["size"].as_u64().unwrap() > before);
    room.kill();
    room.start(&["--key-file", &file]);
    assert_eq!(room.json(&["status"])["protected"], true);
    let marks = fs::read_dir(room.path(""))
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(".mark"));
    assert_eq!(marks.count(), 1, "the high-water mark lies beside the key in force");
}

#[test]
fn a_process_that_holds_keys_leaves_no_core_and_is_shut_to_others() {
    let mut room = Room::new();
    room.start(&[]);
    let pid = room.running.as_ref().unwrap().id();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    let may_lock = u64::from_str_radix(effective, 16).unwrap() & (1 << 14) != 0;
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    let locked: u64 = locked.trim().trim_end_matches(" kB").parse().unwrap();
    let unlimited = limits.lines().any(|line| line.starts_with("Max locked memory         unlimited"));
    assert_eq!(locked > 0, may_lock || unlimited, "memory is locked exactly where the kernel lets it: {locked} kB");
}
