//! A mesh of the real binary in a directory of its own, for tests from end to end. Every process that a test starts ends
//! with the test.

#![allow(dead_code, reason = "each test crate uses a part of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

pub mod codes;

/// How long a whole mesh may take to be there, and to be gone, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A mesh in a directory of its own, and `up` while it runs.
pub struct Mesh {
    pub dir: PathBuf,
    pub up: Option<Child>,
    _root: tempfile::TempDir,
}

/// The command under test, without anything of the tester's own environment that would change it.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command
        .env_remove("COUNTERSIGN_DATA_DIR")
        .env_remove("COUNTERSIGN_DASHBOARD")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .stdin(Stdio::null());
    command
}

impl Mesh {
    /// A directory as `init` makes it; nothing runs.
    pub fn init() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().canonicalize().unwrap().join("mesh");
        let done = binary().arg("init").arg(&dir).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        Self { dir, up: None, _root: root }
    }

    /// Such a mesh, with `up` running and both services ready.
    pub fn started() -> Self {
        let mut mesh = Self::init();
        mesh.start();
        mesh
    }

    /// Runs `up` until both services are ready.
    pub fn start(&mut self) {
        self.spawn(&[]);
        let pid = self.up.as_ref().unwrap().id();
        self.until("the mesh is up", |mesh| mesh.run_file().is_some_and(|run| run["pid"] == pid));
        self.until("both services are ready", |mesh| {
            let status = mesh.json(&["status"]);
            let services = status["services"].as_array().unwrap();
            services.len() == 2
                && services
                    .iter()
                    .all(|service| service["instances"].as_array().unwrap().iter().any(|one| one["ready"] == true))
        });
    }

    /// Starts `up` and waits for nothing.
    pub fn spawn(&mut self, arguments: &[&str]) {
        let log = fs::File::create(self.dir.with_extension("log")).unwrap();
        let mut up = binary();
        up.arg("up").args(arguments).arg(&self.dir).stdout(log.try_clone().unwrap()).stderr(log);
        self.up = Some(up.spawn().unwrap());
    }

    /// Waits until something holds, while `up` runs.
    pub fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            let ended = self.up.as_mut().and_then(|up| up.try_wait().unwrap());
            assert!(ended.is_none(), "`up` ended with {ended:?} before {what}:\n{}", self.log());
            assert!(Instant::now() < deadline, "not after {PATIENCE:?}: {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What `up` tells tools.
    pub fn run_file(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.dir.join(".countersign/run.json")).ok()?).ok()
    }

    /// What `up` said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }

    /// Runs a command about this mesh.
    pub fn run(&self, arguments: &[&str]) -> Output {
        binary().arg("-C").arg(&self.dir).args(arguments).output().unwrap()
    }

    /// Runs a command in a directory.
    pub fn run_in(&self, dir: &Path, arguments: &[&str]) -> Output {
        binary().current_dir(dir).args(arguments).output().unwrap()
    }

    /// The answer of a command that must succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["-o", "json"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{arguments:?} is not JSON: {e}: {}", said(&output)))
    }

    /// The status that the workload `web` gets for a path of the greeter, and the body.
    pub fn ask(&self, path: &str) -> (String, String) {
        let url = format!("http://greeter.mesh{path}");
        let output = self.run(&["exec", "web", "--", "curl", "-s", "-m", "20", "-w", "\n%{http_code}", &url]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
        (status.to_owned(), body.to_owned())
    }

    /// Permits everything that the greeter has.
    pub fn permit_all(&self) {
        let policy = self.dir.join("policies/greeter.cedar");
        let text = fs::read_to_string(&policy).unwrap();
        fs::write(&policy, text.replace("== Operation::\"greeter/hello\"", "in Service::\"greeter\"")).unwrap();
    }

    /// Sends a signal to `up`.
    pub fn signal(&self, signal: &str) {
        let pid = self.up.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Waits until `up` and everything it started is gone.
    pub fn gone(&mut self) {
        let mut up = self.up.take().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while up.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "`up` does not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
        while !self.left_behind().is_empty() {
            assert!(Instant::now() < deadline, "left behind: {:?}", self.left_behind());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Processes that work in this mesh's directory.
    fn left_behind(&self) -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let here = |process: &fs::DirEntry| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&self.dir))
        };
        processes
            .filter(here)
            .map(|process| fs::read_to_string(process.path().join("cmdline")).unwrap_or_default().replace('\0', " "))
            .collect()
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Some(mut up) = self.up.take() {
            let _ = up.kill();
            let _ = up.wait();
        }
    }
}

/// Everything that a command said.
pub fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
