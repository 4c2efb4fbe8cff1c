//! Two control planes of the real binary on one PostgreSQL database, and an agent that follows both: each is killed while it takes
//! changes, then the database. What was acknowledged is there once, and requests go on.

mod support;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use countersign_testkit::postgres::Server;
use serde_json::Value;

use support::{binary, codes::enrol_with, said};

const PATIENCE: Duration = Duration::from_secs(60);

/// A process of ours that is killed, without warning, when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One control plane with a data directory of its own.
struct Replica {
    data: PathBuf,
    port: u16,
    running: Option<Running>,
}

/// Both, the database, and the mesh directory.
struct Ground {
    dir: PathBuf,
    server: Server,
    replicas: [Replica; 2],
    root: tempfile::TempDir,
}

/// A port that stays free until it is listened on, and while whoever listened is killed: below those that the kernel gives to
/// whoever asks for any.
fn free_port() -> u16 {
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(|| fastrand::u16(20_000..32_000)).find(is_free).unwrap()
}

fn until(what: &str, log: &Path, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}\n{}", fs::read_to_string(log).unwrap_or_default());
        thread::sleep(Duration::from_millis(30));
    }
}

impl Ground {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().canonicalize().unwrap().join("mesh");
        assert!(binary().arg("init").arg(&dir).output().unwrap().status.success());
        let replica = |name: &str| Replica { data: root.path().join(name), port: free_port(), running: None };
        let replicas = [replica("one"), replica("two")];
        let mut ground = Self { dir, server: Server::start(), replicas, root };
        ground.start(0);
        ground.start(1);
        ground
    }

    fn log(&self, name: &str) -> PathBuf {
        self.root.path().join(name).with_extension("log")
    }

    fn spawn(&self, name: &str, command: &mut Command) -> Running {
        let log = fs::File::options().create(true).append(true).open(self.log(name)).unwrap();
        Running(command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }

    fn start(&mut self, which: usize) {
        let Replica { data, port, .. } = &self.replicas[which];
        let mut control = binary();
        control.arg("control").arg("--data-dir").arg(data).arg("--listen").arg(format!("127.0.0.1:{port}"));
        control
            .arg("--store")
            .arg(self.server.url())
            .arg("--key-file")
            .arg(self.root.path().join("kek"))
            .arg(&self.dir);
        let running = self.spawn(&format!("control-{which}"), &mut control);
        self.replicas[which].running = Some(running);
        until("the control plane answers", &self.log(&format!("control-{which}")), || {
            self.ask(which, &["status"]).status.success()
        });
    }

    /// Runs a command against one of the two.
    fn ask(&self, which: usize, arguments: &[&str]) -> Output {
        self.command(&self.replicas[which].data, &[&["-o", "json"], arguments].concat()).output().unwrap()
    }

    fn command(&self, data: &Path, arguments: &[&str]) -> Command {
        let mut command = binary();
        command.arg("-C").arg(&self.dir).arg("--data-dir").arg(data).args(arguments);
        command
    }

    fn json(&self, which: usize, arguments: &[&str]) -> Value {
        let output = self.ask(which, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", said(&output)))
    }

    /// Names the policy anew, which is a change of its own.
    fn edit(&self, n: usize) {
        let file = self.dir.join("policies/greeter.cedar");
        let text = fs::read_to_string(&file).unwrap();
        let (before, rest) = text.split_once("@id(\"").unwrap();
        let (_, after) = rest.split_once('"').unwrap();
        fs::write(&file, format!("{before}@id(\"guests-{n}\"{after}")).unwrap();
    }

    /// Whether a request of `web` is permitted; what it got otherwise stands in the agent's log.
    fn passes(&self, agent: &Path) -> bool {
        let words = [
            "exec",
            "web",
            "--",
            "curl",
            "-s",
            "-m",
            "20",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "http://greeter.mesh/hello",
        ];
        let mut command = binary();
        command.arg("-C").arg(&self.dir).arg("--data-dir").arg(agent).args(words);
        let output = command.output().unwrap();
        let passes = output.stdout.ends_with(b"200");
        if !passes {
            let mut log = fs::File::options().append(true).create(true).open(self.log("agent")).unwrap();
            writeln!(log, "a request got {}", said(&output)).unwrap();
        }
        passes
    }
}

/// PROVES (acknowledged-is-durable)
/// PROVES (revisions-never-fork)
#[test]
fn killed_control_planes_lose_and_double_nothing_and_an_agent_moves_between_them() {
    let mut ground = Ground::new();
    assert_eq!(ground.json(0, &["apply"])["outcome"], "applied");
    let invitation = ground.json(1, &["host", "invite", "--host", "h1"]);
    let agent_data = ground.root.path().join("agent");
    let addresses: Vec<String> =
        ground.replicas.iter().map(|replica| format!("https://127.0.0.1:{}", replica.port)).collect();
    let mut agent = binary();
    agent.arg("agent").arg("--data-dir").arg(&agent_data).args(["--control", &addresses.join(","), "--host", "h1"]);
    agent.arg("--join").arg(invitation["token"].as_str().unwrap()).arg(&ground.dir).stdin(Stdio::null());
    let _agent = ground.spawn("agent", &mut agent);
    until("requests pass", &ground.log("agent"), || ground.passes(&agent_data));

    let mut acknowledged: BTreeMap<u64, String> = BTreeMap::new();
    let mut n = 0;
    for round in 0..4 {
        let (victim, other) = (round % 2, 1 - round % 2);
        // Changes until one of them meets the kill, at another moment each time.
        for last in [false, false, true] {
            n += 1;
            ground.edit(n);
            let data = ground.replicas[victim].data.clone();
            let applying = ground
                .command(&data, &["-o", "json", "apply"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            if last {
                thread::sleep(Duration::from_millis(15 + 25 * round as u64));
                ground.replicas[victim].running = None;
            }
            let done = applying.wait_with_output().unwrap();
            if done.status.success() {
                let applied: Value = serde_json::from_slice(&done.stdout).unwrap();
                let revision = applied["revision"].as_u64().unwrap();
                assert_eq!(acknowledged.insert(revision, format!("guests-{n}")), None, "two changes, one revision");
            } else {
                assert!(last, "{}", said(&done));
            }
        }
        // The other goes on at once, from whatever was kept.
        let applied = ground.json(other, &["apply"]);
        if applied["outcome"] == "applied" {
            acknowledged.insert(applied["revision"].as_u64().unwrap(), format!("guests-{n}"));
        }
        until("requests go on while control planes die", &ground.log("agent"), || ground.passes(&agent_data));
        let revision = ground.json(other, &["status"])["revision"].as_u64().unwrap();
        until("the agent follows the one that lives", &ground.log("agent"), || {
            let status = ground.json(other, &["status"]);
            status["hosts"][0]["connected"] == true
                && status["services"].as_array().unwrap().iter().all(|service| {
                    let instances = service["instances"].as_array().unwrap();
                    !instances.is_empty() && instances.iter().all(|one| one["revision"] == revision)
                })
        });
        ground.start(victim);
    }
    for which in [0, 1] {
        let changes = ground.json(which, &["change", "list", "--limit", "100"]);
        let changes = changes.as_array().unwrap();
        for (revision, policy) in &acknowledged {
            let of: Vec<&Value> =
                changes.iter().filter(|change| change["changes"].to_string().contains(policy)).collect();
            // Named anew by the next change, which removes it, as well.
            assert!(of.iter().any(|change| change["revision"] == *revision), "revision {revision} was acknowledged");
            let sets = of
                .iter()
                .filter(|change| change["changes"].to_string().contains(&format!("set_policy policy {policy}\"")));
            assert_eq!(sets.count(), 1, "{policy} was applied once");
        }
        ground.json(which, &["ledger", "verify"]);
    }

    ground.server.kill();
    n += 1;
    ground.edit(n);
    let refused = ground.ask(0, &["apply"]);
    assert!(!refused.status.success() && said(&refused).contains("is away"), "{}", said(&refused));
    until("requests go on without the database", &ground.log("agent"), || ground.passes(&agent_data));
    ground.server.start_again();
    until("the database is back", &ground.log("control-0"), || ground.ask(0, &["apply"]).status.success());
    until("both hold the same", &ground.log("control-1"), || {
        ground.json(1, &["ledger", "verify"])["revision"] == ground.json(0, &["status"])["revision"]
    });
}

/// PROVES (recovery-needs-the-key)
#[test]
fn a_mesh_on_a_database_is_recovered_when_no_control_plane_runs_on_it() {
    let mut ground = Ground::new();
    ground.json(0, &["apply"]);
    let data = ground.replicas[0].data.clone();
    enrol_with(&mut ground.command(&data, &[]), &["operator", "enroll", "--totp", "--operator", "alice"]);
    let elsewhere = ground.root.path().join("recovery");
    let (url, kek) = (ground.server.url(), ground.root.path().join("kek"));
    let words = ["recover", "--operator", "alice", "--reason", "her phone was stolen", "--store", &url];
    let running = ground.command(&elsewhere, &words).arg("--key-file").arg(&kek).output().unwrap();
    assert!(said(&running).contains("a control plane runs on"), "{}", said(&running));
    for replica in &mut ground.replicas {
        replica.running = None;
    }
    let recover = |key: &Path| {
        let mut command = ground.command(&elsewhere, &words);
        command.arg("--key-file").arg(key).output().unwrap()
    };
    until("those that were killed are gone", &ground.log("control-0"), || {
        !said(&recover(&kek)).contains("a control plane runs on")
    });
    let other = ground.root.path().join("other");
    fs::write(&other, "00".repeat(32)).unwrap();
    fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let refused = recover(&other);
    assert!(!refused.status.success() && said(&refused).contains("sealed with key"), "{}", said(&refused));

    let with_key = [&words[..], &["--key-file", kek.to_str().unwrap()]].concat();
    let (_, recovered) = enrol_with(&mut ground.command(&elsewhere, &[]), &with_key);
    assert_eq!(recovered["operator"], "alice");
    ground.start(0);
    ground.start(1);
    for which in [0, 1] {
        let status = said(&ground.ask(which, &["status"]));
        assert!(status.contains("was recovered past its gate"), "{status}");
    }
    ground.json(1, &["ledger", "verify"]);
}
