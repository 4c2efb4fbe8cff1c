//! How long an agent is without a control plane when the one it follows is killed, and another runs on the same database: from the
//! kill -9 to the moment at which the other one has its stream. Real binaries, ten kills. Prints one JSON object on its last line.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use countersign_testkit::postgres::Server;
use serde_json::{Value, json};

const KILLS: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the other one is asked: the figure is so exact.
const ASKED_EVERY: Duration = Duration::from_millis(10);

/// A process that is killed, without warning, when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Replica {
    data: PathBuf,
    port: u16,
    running: Option<Running>,
}

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn ask(dir: &Path, data: &Path, words: &[&str]) -> Output {
    let mut command = binary();
    command.arg("-C").arg(dir).arg("--data-dir").arg(data).args(["-o", "json"]).args(words);
    command.stdout(Stdio::piped()).output().expect("the binary starts")
}

fn answer(dir: &Path, data: &Path, words: &[&str]) -> Value {
    serde_json::from_slice(&ask(dir, data, words).stdout).unwrap_or_default()
}

fn until(what: &str, every: Duration, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(every);
    }
}

fn main() {
    let root = tempfile::tempdir().expect("a directory");
    let dir = root.path().join("mesh");
    assert!(binary().arg("init").arg(&dir).status().expect("the binary starts").success());
    let server = Server::start();
    let start = |replica: &mut Replica| {
        let mut control = binary();
        control.arg("control").arg("--data-dir").arg(&replica.data).arg("--store").arg(server.url());
        control
            .arg("--key-file")
            .arg(root.path().join("kek"))
            .arg("--listen")
            .arg(format!("127.0.0.1:{}", replica.port));
        replica.running = Some(Running(control.arg(&dir).spawn().expect("the binary starts")));
        until("a control plane", ASKED_EVERY, || ask(&dir, &replica.data, &["status"]).status.success());
    };
    let mut replicas = ["one", "two"].map(|name| {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|probe| probe.local_addr()).expect("a port").port();
        Replica { data: root.path().join(name), port, running: None }
    });
    replicas.iter_mut().for_each(&start);
    assert!(ask(&dir, &replicas[0].data, &["apply"]).status.success());
    let invitation = answer(&dir, &replicas[0].data, &["host", "invite", "--host", "h1"]);
    let addresses: Vec<String> = replicas.iter().map(|replica| format!("https://127.0.0.1:{}", replica.port)).collect();
    let mut agent = binary();
    agent.arg("agent").arg("--data-dir").arg(root.path().join("agent")).args(["--host", "h1", "--control"]);
    agent.arg(addresses.join(",")).arg("--join").arg(invitation["token"].as_str().expect("a token")).arg(&dir);
    let _agent = Running(agent.spawn().expect("the binary starts"));

    let follows = |replica: &Replica| answer(&dir, &replica.data, &["status"])["hosts"][0]["connected"] == true;
    let mut seconds = Vec::with_capacity(KILLS);
    for _ in 0..KILLS {
        until("the agent", ASKED_EVERY, || replicas.iter().any(follows));
        // Each knows by itself only of its own agents; one that was left a moment ago may not know it yet.
        thread::sleep(Duration::from_secs(1));
        let followed = usize::from(follows(&replicas[1]));
        replicas[followed].running = None;
        let killed = Instant::now();
        until("the agent has moved", ASKED_EVERY, || follows(&replicas[1 - followed]));
        seconds.push(killed.elapsed().as_secs_f64());
        start(&mut replicas[followed]);
    }
    seconds.sort_by(f64::total_cmp);
    let median = (seconds[KILLS / 2 - 1] + seconds[KILLS / 2]) / 2.0;
    println!(
        "{}",
        json!({ "without_control_seconds": { "median": median, "low": seconds[0], "high": seconds[KILLS - 1], "n": KILLS } })
    );
}
