//! What a user, a disk, a clock or a signal can do to a running mesh, with the real binary: it is told with what to do,
//! nothing that was acknowledged is lost, and no process is left behind.

mod support;

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use support::{Mesh, binary, said};

/// How long one process may take on a machine that is busy with other things.
const WITHIN: Duration = Duration::from_secs(60);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WITHIN;
    while !holds() {
        assert!(Instant::now() < deadline, "not after {WITHIN:?}: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().unwrap().stdout == b"0\n"
}

/// The output of a command that must fail, with `help:` in it.
fn refused(output: &Output) -> String {
    let said = said(output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("help:"), "{said}");
    said
}

/// Processes whose parent is `pid`, with their command lines.
fn children(pid: u32) -> Vec<(u32, String)> {
    let parent = |stat: &str| stat.rsplit_once(')')?.1.split(' ').nth(2)?.parse::<u32>().ok();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok())
        .filter(|child| fs::read_to_string(format!("/proc/{child}/stat")).is_ok_and(|stat| parent(&stat) == Some(pid)))
        .map(|child| {
            (child, fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default().replace('\0', " "))
        })
        .collect()
}

fn sidecars(of: u32) -> BTreeSet<u32> {
    children(of).into_iter().filter(|(_, line)| line.contains(" sidecar")).map(|(pid, _)| pid).collect()
}

/// Whether a process is there; one that only waits for its parent to notice its end is not.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

/// A control plane alone.
struct Control(Child);

impl Control {
    /// Runs `command`, which must become `countersign control --data-dir` of `data_dir`, until it answers.
    fn start(mut command: Command, status: impl Fn() -> Output) -> Self {
        let mut control = Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        until("the control plane answers", || {
            assert_eq!(control.0.try_wait().unwrap(), None, "it ended");
            status().status.success()
        });
        control
    }

    fn stop(mut self) {
        assert!(Command::new("kill").arg(self.0.id().to_string()).status().unwrap().success());
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_mistake_of_a_directory_is_told_at_once_with_file_line_and_caret() {
    let mesh = Mesh::init();
    let write = |file: &str, text: &str| fs::write(mesh.dir.join(file), text).unwrap();
    write(
        "mesh.toml",
        "trust_domain = \"mesh.example\"\n[services.web]\nrunn = [\"x\"]\nport = 8081\n\
         [services.greeter]\nport = 8081\nupstreams = [\"greter\"]\n",
    );
    write("roles.toml", "[roles.guests]\nmembers = [\"webb\"]\n");
    write("routes.toml", "[routes.hello]\nservice = \"greeterr\"\n");
    write("policies/syntax.cedar", "@id(\"a\")\npermit (principal, action resource);\n");
    write(
        "policies/names.cedar",
        "@id(\"b\")\npermit (principal in Role::\"guest\", action, resource);\n\
         @id(\"d\")\npermit (principal, action, resource in Service::\"gretr\");\n",
    );
    write("policies/action.cedar", "@id(\"c\")\npermit (principal, action == Action::\"http:GRAB\", resource);\n");
    let expected = [
        ("mesh.toml", 3, "`runn`"),
        ("mesh.toml", 6, "port 8081 is taken"),
        ("mesh.toml", 7, "`greter`"),
        ("roles.toml", 2, "`webb`"),
        ("routes.toml", 2, "`greeterr`"),
        ("policies/syntax.cedar", 2, "resource"),
        ("policies/names.cedar", 2, "guest"),
        ("policies/action.cedar", 2, "http:GRAB"),
        ("policies/names.cedar", 4, "gretr"),
    ];
    for command in ["up", "plan"] {
        let output = binary().args(["-o", "json", command]).arg(&mesh.dir).output().unwrap();
        assert!(!output.status.success());
        let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
        let mistakes = failure["mistakes"].as_array().unwrap();
        for (file, line, part) in expected {
            let told = mistakes.iter().any(|mistake| {
                (&mistake["file"], &mistake["line"]) == (&file.into(), &line.into())
                    && mistake["what"].as_str().unwrap().contains(part)
            });
            assert!(told, "`{command}` does not tell {file}:{line} {part}: {failure:#}");
        }
        let text = said(&binary().arg(command).arg(&mesh.dir).output().unwrap());
        for part in ["─[mesh.toml:3:1]", "runn = [\"x\"]", "────", "help: ", "─[policies/names.cedar:2:"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    for (file, text, at) in [
        ("mesh.toml", "trust_domain = \"mesh.example\"\n[services.web\n", "mesh.toml:2:"),
        ("roles.toml", "[roles]\nguests = {\n", "roles.toml:2:"),
        ("policies/syntax.cedar", "permit (", "policies/syntax.cedar:1:"),
    ] {
        let mesh = Mesh::init();
        fs::write(mesh.dir.join(file), text).unwrap();
        let told = said(&binary().arg("up").arg(&mesh.dir).output().unwrap());
        assert!(told.contains(at), "{at}: {told}");
    }
}

#[test]
fn a_program_that_does_not_exist_is_named_and_the_rest_goes_on() {
    let mut mesh = Mesh::init();
    let text = fs::read_to_string(mesh.dir.join("mesh.toml")).unwrap();
    let text = text.replace("run = [\"python3\", \"services/web.py\"]", "run = [\"no-such-program\"]");
    fs::write(mesh.dir.join("mesh.toml"), text).unwrap();
    mesh.spawn(&[]);
    mesh.until("the mesh is up all the same", |mesh| mesh.run_file().is_some());
    mesh.until("the program is named", |mesh| mesh.log().contains("no-such-program"));
    mesh.until("the other service is ready", |mesh| {
        let greeter = mesh.json(&["service", "show", "greeter"]);
        greeter["instances"].as_array().unwrap().iter().any(|one| one["ready"] == true)
    });
    mesh.signal("-INT");
    mesh.gone();
}

#[test]
fn a_port_that_is_taken_is_named_with_how_to_find_who_has_it() {
    let mesh = Mesh::init();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for flag in ["--listen", "--metrics"] {
        let told = refused(&binary().args(["up", flag, &address]).arg(&mesh.dir).output().unwrap());
        assert!(told.contains(&format!("could not listen on {address}")), "{told}");
        assert!(told.contains("ss -ltnp"), "{told}");
    }
    assert_eq!(mesh.run_file(), None);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let mesh = Mesh::init();
    let root = mesh.dir.parent().unwrap();
    let data = root.join("data");
    fs::create_dir(&data).unwrap();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    mode(root, 0o755);
    mode(&data, 0o555);
    let mut command = if is_root() {
        // Root writes everywhere; what it starts without privileges does not. The binary may lie where only root looks.
        let copy = root.join("countersign");
        fs::copy(env!("CARGO_BIN_EXE_countersign"), &copy).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(copy).env("HOME", "/");
        command
    } else {
        binary()
    };
    let output = command.arg("up").arg("--data-dir").arg(&data).arg(&mesh.dir).current_dir("/").output().unwrap();
    let told = refused(&output);
    assert!(told.contains(data.to_str().unwrap()), "{told}");
    assert_eq!(fs::read_dir(&data).unwrap().count(), 0);
    mode(&data, 0o755);
}

#[test]
fn a_full_data_directory_refuses_changes_loses_nothing_and_takes_them_again_when_there_is_room() {
    if !is_root() {
        eprintln!("not proven: only root can make a small file system");
        return;
    }
    let mesh = Mesh::init();
    let data = mesh.dir.parent().unwrap().join("data");
    fs::create_dir(&data).unwrap();
    // A file system that only the control plane and who asks it from within its mount namespace can see.
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs -o size=6m none \"$1\" && exec \"$0\" control --data-dir \"$1\" --trust-domain mesh.example --listen 127.0.0.1:0"]);
    command.arg(env!("CARGO_BIN_EXE_countersign")).arg(&data);
    let pid = std::cell::Cell::new(None);
    let inside = |program: &str, arguments: &[&str]| {
        let mut command = Command::new("nsenter");
        let pid: u32 = pid.get().unwrap();
        command.args(["-m", "-t", &pid.to_string(), "--", program]).args(arguments).output().unwrap()
    };
    let mut child = Control(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    pid.set(Some(child.0.id()));
    let (data_arg, dir) = (data.to_str().unwrap(), mesh.dir.to_str().unwrap());
    let ask = |arguments: &[&str]| {
        inside(env!("CARGO_BIN_EXE_countersign"), &[&["--data-dir", data_arg], arguments].concat())
    };
    until("the control plane answers", || {
        assert_eq!(child.0.try_wait().unwrap(), None, "it ended");
        ask(&["status"]).status.success()
    });
    assert!(ask(&["apply", dir]).status.success());

    let filler = format!("{data_arg}/filler");
    assert!(!inside("dd", &["if=/dev/zero", &format!("of={filler}"), "bs=4k"]).status.success(), "it fills up");
    let policy = mesh.dir.join("policies/more.cedar");
    let one = |n| {
        format!(
            "@id(\"more-{n}\")\nforbid (principal, action, resource) when {{ \"{}\" == \"\" }};\n",
            "x".repeat(50_000)
        )
    };
    let text: String = (0..20).map(one).collect();
    fs::write(&policy, text).unwrap();
    let output = ask(&["apply", dir]);
    let told = refused(&output);
    assert!(told.contains("no space is left"), "{told}");
    let verified = ask(&["-o", "json", "ledger", "verify"]);
    assert!(verified.status.success(), "reads go on: {}", said(&verified));
    let verified: Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(verified["revision"], 1);

    assert!(inside("rm", &[&filler]).status.success());
    let output = ask(&["apply", dir]);
    assert!(output.status.success(), "{}", said(&output));
    let verified: Value = serde_json::from_slice(&ask(&["-o", "json", "ledger", "verify"]).stdout).unwrap();
    assert_eq!(verified["revision"], 2);
    child.stop();
}

#[test]
fn an_edited_ledger_is_refused_with_what_to_do() {
    let mesh = Mesh::init();
    let data = mesh.dir.join(".countersign");
    let control = Control::start(control(&data, None), || mesh.run(&["status"]));
    assert!(mesh.run(&["apply"]).status.success());
    control.stop();
    let edit = "import sqlite3, sys
store = sqlite3.connect(sys.argv[1])
edited = store.execute(\"UPDATE entries SET entry = CAST(replace(CAST(entry AS TEXT), 'local', 'mayor') AS BLOB)\")
assert edited.rowcount == 1
store.commit()";
    let edited = Command::new("python3").args(["-c", edit]).arg(data.join("control.db")).output().unwrap();
    assert!(edited.status.success(), "{}", said(&edited));
    let told = refused(&binary().arg("up").arg(&mesh.dir).output().unwrap());
    assert!(told.contains("entry 0 is not what was hashed when it was written"), "{told}");
    assert!(told.contains("restore the data directory from a copy"), "{told}");
}

/// `control` on the mesh's own data directory; `clock_ahead` is a library that puts its clock an hour ahead.
fn control(data: &Path, clock_ahead: Option<&Path>) -> Command {
    let mut command = binary();
    command.args(["control", "--trust-domain", "mesh.example", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data);
    if let Some(library) = clock_ahead {
        command.env("LD_PRELOAD", library);
    }
    command
}

#[test]
fn a_clock_that_is_an_hour_behind_the_ledger_is_refused() {
    let mesh = Mesh::init();
    let source = mesh.dir.with_extension("c");
    let library: PathBuf = mesh.dir.with_extension("so");
    let ahead = "#include <time.h>\n#include <unistd.h>\n#include <sys/syscall.h>\n\
        int clock_gettime(clockid_t id, struct timespec *at) {\n\
          int result = syscall(SYS_clock_gettime, id, at);\n\
          if (id == CLOCK_REALTIME) at->tv_sec += 3600;\n\
          return result;\n}\n";
    fs::write(&source, ahead).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output().unwrap();
    assert!(built.status.success(), "{}", said(&built));

    let data = mesh.dir.join(".countersign");
    let control_ahead = Control::start(control(&data, Some(&library)), || mesh.run(&["status"]));
    assert!(mesh.run(&["apply"]).status.success());
    control_ahead.stop();
    let told = refused(&binary().arg("up").arg(&mesh.dir).output().unwrap());
    assert!(told.contains("the clock is wrong: the newest ledger entry was made 3"), "{told}");
    assert!(told.contains("timedatectl"), "{told}");
}

#[test]
fn what_is_killed_is_replaced_and_what_killed_up_leaves_nothing_behind() {
    let mut mesh = Mesh::started();
    assert_eq!(mesh.ask("/hello").0, "200");
    let up = mesh.up.as_ref().unwrap().id();

    let first = sidecars(up);
    assert_eq!(first.len(), 2, "{:?}", children(up));
    first.iter().for_each(|pid| kill(*pid));
    mesh.until("new sidecars run", |_| {
        let now = sidecars(up);
        now.len() == 2 && now.is_disjoint(&first)
    });
    mesh.until("traffic resumes", |mesh| mesh.ask("/hello").0 == "200");

    let app = |mesh: &Mesh| mesh.json(&["service", "show", "greeter"])["instances"][0].clone();
    let pids = |mesh: &Mesh| mesh.run_file().unwrap()["services"]["greeter"]["pids"].as_array().unwrap().clone();
    assert_eq!(app(&mesh)["ready"], true);
    let killed = u32::try_from(pids(&mesh)[0].as_u64().unwrap()).unwrap();
    kill(killed);
    mesh.until("its end is told", |mesh| mesh.log().contains("greeter/1"));
    mesh.until("the workload runs again", |mesh| !lives(killed) && mesh.ask("/hello").0 == "200");

    let started: Vec<u32> = children(up).into_iter().map(|(pid, _)| pid).collect();
    assert!(started.len() >= 4, "a launcher and a sidecar for each service: {started:?}");
    mesh.signal("-KILL");
    mesh.gone();
    until("launchers and sidecars are gone", || !started.iter().any(|pid| lives(*pid)));
    mesh.start();
    assert_eq!(mesh.ask("/hello").0, "200");
    mesh.signal("-INT");
    mesh.gone();
}
