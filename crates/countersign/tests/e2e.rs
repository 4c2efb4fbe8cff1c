//! The real binary, from `init` to Ctrl-C: what a stranger does on the first day, and what a crash leaves behind. Every
//! process that a test starts ends with the test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// How long a whole mesh may take to be there, and to be gone, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A mesh in a directory of its own, and `up` while it runs.
struct Mesh {
    dir: PathBuf,
    up: Option<Child>,
    _root: tempfile::TempDir,
}

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_countersign"));
    command.env_remove("COUNTERSIGN_DATA_DIR").env_remove("OTEL_EXPORTER_OTLP_ENDPOINT").stdin(Stdio::null());
    command
}

impl Mesh {
    fn init() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().canonicalize().unwrap().join("mesh");
        let done = binary().arg("init").arg(&dir).output().unwrap();
        assert!(done.status.success(), "{}", said(&done));
        Self { dir, up: None, _root: root }
    }

    fn started() -> Self {
        let mut mesh = Self::init();
        mesh.start();
        mesh
    }

    fn start(&mut self) {
        let log = fs::File::create(self.dir.with_extension("log")).unwrap();
        let up = binary().arg("up").arg(&self.dir).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let pid = up.id();
        self.up = Some(up);
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

    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            let ended = self.up.as_mut().and_then(|up| up.try_wait().unwrap());
            assert!(ended.is_none(), "`up` ended with {ended:?} before {what}:\n{}", self.log());
            assert!(Instant::now() < deadline, "not after {PATIENCE:?}: {what}\n{}", self.log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn run_file(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.dir.join(".countersign/run.json")).ok()?).ok()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        binary().arg("-C").arg(&self.dir).args(arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["-o", "json"], arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{arguments:?} is not JSON: {e}: {}", said(&output)))
    }

    /// The status that the workload `web` gets for a path of the greeter, and the body.
    fn ask(&self, path: &str) -> (String, String) {
        let url = format!("http://greeter.mesh{path}");
        let output = self.run(&["exec", "web", "--", "curl", "-s", "-m", "20", "-w", "\n%{http_code}", &url]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
        (status.to_owned(), body.to_owned())
    }

    /// Permits everything that the greeter has.
    fn permit_all(&self) {
        let policy = self.dir.join("policies/greeter.cedar");
        let text = fs::read_to_string(&policy).unwrap();
        fs::write(&policy, text.replace("== Operation::\"greeter/hello\"", "in Service::\"greeter\"")).unwrap();
    }

    fn signal(&self, signal: &str) {
        let pid = self.up.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn gone(&mut self) {
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

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
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
    let log = fs::File::create(mesh.dir.with_extension("log")).unwrap();
    let up = binary()
        .args(["up", "--no-watch"])
        .arg(&mesh.dir)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    mesh.up = Some(up);
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
fn a_service_that_dies_at_once_is_shown_and_the_rest_goes_on() {
    let mut mesh = Mesh::init();
    fs::write(mesh.dir.join("services/web.py"), "import sys\nsys.exit('web has nothing to do today')\n").unwrap();
    let log = fs::File::create(mesh.dir.with_extension("log")).unwrap();
    mesh.up = Some(binary().arg("up").arg(&mesh.dir).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
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
