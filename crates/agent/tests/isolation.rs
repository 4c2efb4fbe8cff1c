//! Workloads in real namespaces, seen from inside and from outside. This program is its own launcher (`launch`) and its
//! own workload (`workload`), because a launcher must have a single thread. Every test of an isolated workload runs once
//! more as user 65534 when it is run by root. Where the kernel refuses namespaces those tests are ignored, and the
//! reason is printed.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use countersign_agent::{
    artifact::measure,
    isolate::{
        Exit, Isolation, LaunchError, LaunchSpec, Launcher, Process, Stop, WORKLOAD_SOCKET, enter, prepare, probe,
    },
    launch::{SUBCOMMAND, launch_main},
};
use countersign_api::broker::{self, Answer, Ask, Request};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::io::AsyncReadExt;

const WITHIN: Duration = Duration::from_secs(20);
const NOBODY: &str = "65534";

type Test = fn() -> Result<(), Failed>;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let first = std::env::args().nth(1).unwrap_or_default();
    match first.as_str() {
        SUBCOMMAND => launch_main(args.skip(1)),
        "workload" => workload(&std::env::args().skip(2).collect::<Vec<_>>()),
        "agent" => agent(&std::env::args().skip(2).collect::<Vec<_>>()),
        "enter" => inside(&std::env::args().skip(2).collect::<Vec<_>>()),
        _ => tests(&Arguments::from_iter(std::iter::once("isolation".into()).chain(args.by_ref()))),
    }
}

fn tests(arguments: &Arguments) -> ExitCode {
    let scratch = scratch();
    let Isolation { available, note } = wait(probe(&executable(), scratch.path()));
    if !note.is_empty() {
        eprintln!("isolation on this host: {note}");
    }
    let anywhere: &[(&str, Test)] = &[
        ("a_program_that_does_not_exist_is_named_with_where_it_was_sought", a_missing_program_is_named),
        ("a_workload_without_namespaces_ends_with_everything_it_started", a_plain_tree_ends),
        ("a_workload_without_namespaces_cannot_signal_its_agent", a_plain_workload_cannot_signal),
        ("the_end_of_a_workload_is_told_as_it_was", ends_are_told),
        ("nothing_runs_before_it_is_started_and_what_ended_starts_again", a_plain_workload_starts_again),
        ("nothing_is_executed_but_what_was_measured", only_what_was_measured),
        ("a_variable_and_a_directory_arrive_and_nothing_else_is_open", surroundings_arrive),
    ];
    let isolated: &[(&str, Test)] = &[
        ("only_loopback_exists_inside", only_loopback),
        ("a_listener_of_the_host_is_out_of_reach_inside", host_loopback_is_out_of_reach),
        ("the_sidecar_reaches_a_port_inside_through_the_broker", the_sidecar_reaches_in),
        ("the_sidecar_accepts_from_inside_on_a_mesh_address_and_port_80", the_sidecar_accepts),
        ("a_mesh_name_is_asked_of_the_sidecar", names_are_asked_of_the_sidecar),
        ("the_data_directory_is_a_socket_to_ask_for_identities_and_nothing_else_inside", the_data_directory_is_hidden),
        ("no_privilege_and_no_process_of_the_host_is_left_inside", nothing_is_left),
        ("what_was_forked_twice_ends_with_the_agent", a_hidden_tree_ends),
        ("a_workload_ends_when_its_launcher_is_killed", a_killed_launcher_takes_all),
        ("a_command_that_enters_sees_what_the_workload_sees", entering_sees_the_same),
        ("a_refused_socket_says_why", a_refusal_says_why),
        (
            "what_ended_starts_again_in_its_namespaces_and_nothing_of_its_first_life_is_left",
            an_isolated_one_starts_again,
        ),
    ];
    // What holds by other means where a container masks parts of /proc: then there is no process namespace.
    let masked = [
        "the_sidecar_reaches_a_port_inside_through_the_broker",
        "the_data_directory_is_a_socket_to_ask_for_identities_and_nothing_else_inside",
        "no_privilege_and_no_process_of_the_host_is_left_inside",
        "what_was_forked_twice_ends_with_the_agent",
        "a_command_that_enters_sees_what_the_workload_sees",
        "what_ended_starts_again_in_its_namespaces_and_nothing_of_its_first_life_is_left",
    ];
    let mut trials: Vec<Trial> = anywhere.iter().map(|(name, test)| Trial::test(*name, *test)).collect();
    for (name, test) in isolated {
        trials.push(Trial::test(*name, *test).with_ignored_flag(!available));
        if nix::unistd::getuid().is_root() {
            let unprivileged = move || as_nobody(name);
            trials.push(Trial::test(format!("{name}_unprivileged"), unprivileged).with_ignored_flag(!available));
        }
    }
    for name in masked {
        let trial = Trial::test(format!("{name}_where_proc_is_masked"), move || where_proc_is_masked(name));
        trials.push(trial.with_ignored_flag(!available));
    }
    libtest_mimic::run(arguments, trials).exit_code()
}

// ---- what runs inside

/// `workload VERB ARGUMENT`: one look around, printed.
fn workload(args: &[String]) -> ExitCode {
    let argument = args.get(1).map(String::as_str).unwrap_or_default();
    let answer = match args[0].as_str() {
        "interfaces" => fs::read_to_string("/proc/net/dev").map(|text| {
            let names =
                text.lines().skip(2).filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim().to_owned());
            names.collect::<Vec<_>>().join(" ")
        }),
        "connect" => TcpStream::connect(argument).and_then(|mut stream| {
            let mut heard = String::new();
            stream.read_to_string(&mut heard).map(|_| heard)
        }),
        "serve" => TcpListener::bind(argument).and_then(|listener| {
            println!("listening");
            listener.accept()?.0.write_all(b"from inside").map(|()| "served".to_owned())
        }),
        "resolve" => (argument, 80)
            .to_socket_addrs()
            .map(|found| found.map(|one| one.ip().to_string()).collect::<Vec<_>>().join(" ")),
        "list" => fs::read_dir(argument).map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        }),
        "read" => fs::read_to_string(argument),
        "write" => fs::write(argument, "x").map(|()| "written".to_owned()),
        "dial" => std::os::unix::net::UnixStream::connect(argument).map(|_| "connected".to_owned()),
        "signal" => nix::sys::signal::kill(nix::unistd::Pid::from_raw(argument.parse().unwrap()), None)
            .map(|()| "signalled".to_owned())
            .map_err(Into::into),
        "open" => fs::read_dir("/proc/self/fd").map(|entries| {
            let mut open: Vec<u32> = entries.filter_map(|one| one.ok()?.file_name().to_str()?.parse().ok()).collect();
            open.sort_unstable();
            format!(
                "{open:?} {} {}",
                std::env::var("GIVEN").unwrap_or_default(),
                std::env::current_dir().unwrap().display()
            )
        }),
        "status" => fs::read_to_string("/proc/self/status").map(|text| {
            let told = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];
            let lines = text.lines().filter(|line| told.iter().any(|name| line.starts_with(name)));
            lines.map(|line| line.split_whitespace().last().unwrap()).collect::<Vec<_>>().join(" ")
        }),
        verb => panic!("no such verb: {verb}"),
    };
    match answer {
        Ok(said) => println!("{said}"),
        Err(e) => println!("{:?}", e.kind()),
    }
    ExitCode::SUCCESS
}

/// `enter PID ARGUMENTS`: `workload ARGUMENTS` in the namespaces of that process.
fn inside(args: &[String]) -> ExitCode {
    let executable = executable();
    if let Err(e) = enter(args[0].parse().unwrap(), Path::new("/")) {
        println!("{e}");
        return ExitCode::FAILURE;
    }
    let status = Command::new(executable).arg("workload").args(&args[1..]).status().unwrap();
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// `agent isolated|plain SCRIPT DATA_DIR`: starts a workload and waits to be killed.
fn agent(args: &[String]) -> ExitCode {
    wait(async {
        let spec = spec(&["sh", "-c", &args[1]], Path::new(&args[2]), args[0] == "isolated");
        let mut workload = spawn(spec).await.unwrap();
        println!("{}", line(&mut workload).await);
        workload.exited().await;
    });
    ExitCode::SUCCESS
}

// ---- what starts it

fn executable() -> PathBuf {
    std::env::current_exe().unwrap()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(WITHIN, future).await };
    runtime.block_on(bounded).expect("the test took more than 20 s")
}

fn spec(command: &[&str], data_dir: &Path, isolate: bool) -> LaunchSpec {
    LaunchSpec {
        executable: executable(),
        command: command.iter().map(|part| (*part).to_owned()).collect(),
        dir: "/".into(),
        env: BTreeMap::from([("GIVEN".to_owned(), "variable".to_owned())]),
        isolate,
        data_dir: data_dir.to_owned(),
    }
}

/// A running workload with its launcher.
struct Workload {
    launcher: Launcher,
    process: Option<Process>,
}

impl Workload {
    fn process(&self) -> &Process {
        self.process.as_ref().expect("it was started")
    }
}

impl std::ops::Deref for Workload {
    type Target = Launcher;
    fn deref(&self) -> &Launcher {
        &self.launcher
    }
}

impl std::ops::DerefMut for Workload {
    fn deref_mut(&mut self) -> &mut Launcher {
        &mut self.launcher
    }
}

async fn spawn(spec: LaunchSpec) -> Result<Workload, LaunchError> {
    let launcher = prepare(spec).await?;
    let process = Some(launcher.start(None).await?);
    Ok(Workload { launcher, process })
}

/// Starts this program as a workload.
async fn looking(verb: &str, argument: &str, data_dir: &Path, isolate: bool) -> Workload {
    let executable = executable();
    spawn(spec(&[executable.to_str().unwrap(), "workload", verb, argument], data_dir, isolate)).await.unwrap()
}

/// What the workload printed until it ended.
async fn said(mut workload: Workload) -> String {
    let mut text = String::new();
    let (mut stdout, mut stderr) = (workload.stdout.take().unwrap(), workload.stderr.take().unwrap());
    workload.exited().await;
    drop(workload); // and with it the last process that could write
    stdout.read_to_string(&mut text).await.unwrap();
    stderr.read_to_string(&mut text).await.unwrap();
    text.trim().to_owned()
}

/// What an isolated workload sees of one thing.
fn look(verb: &str, argument: &str) -> String {
    let scratch = scratch();
    wait(async { said(looking(verb, argument, scratch.path(), true).await).await })
}

/// The next line of its output.
async fn line(workload: &mut Workload) -> String {
    let mut line = Vec::new();
    let stdout = workload.stdout.as_mut().unwrap();
    while line.last() != Some(&b'\n') {
        line.push(stdout.read_u8().await.unwrap());
    }
    String::from_utf8(line).unwrap().trim().to_owned()
}

fn ask(workload: &Workload, ask: Ask) -> std::io::Result<std::os::fd::OwnedFd> {
    let broker = workload.broker.as_ref().unwrap();
    broker::send(broker, &Request { id: 1, ask }, None)?;
    match broker::receive::<Answer>(broker)?.expect("the broker is there") {
        (Answer { refused: Some(refused), .. }, _) => Err(refused.into()),
        (Answer { refused: None, .. }, fd) => Ok(fd.expect("a granted answer carries a socket")),
    }
}

/// Runs the test of this name once more without privileges.
fn as_nobody(name: &str) -> Result<(), Failed> {
    let scratch = scratch();
    fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let copy = scratch.path().join("isolation");
    fs::copy(executable(), &copy)?;
    let mut setpriv = Command::new("setpriv");
    setpriv.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
    again(setpriv.arg(&copy).args(["--exact", name]).env("TMPDIR", scratch.path()).current_dir("/"))
}

/// Runs the test of this name once more where the launcher may not mount `/proc`, as in a container.
fn where_proc_is_masked(name: &str) -> Result<(), Failed> {
    let script = r#"mount -t tmpfs none /proc/fs && exec "$0" --exact "$1""#;
    again(Command::new("unshare").args(["-rm", "sh", "-c", script]).arg(executable()).arg(name))
}

fn again(test: &mut Command) -> Result<(), Failed> {
    let output = test.output()?;
    match output.status.success() {
        true if String::from_utf8_lossy(&output.stdout).contains("1 passed") => Ok(()),
        true => {
            eprintln!("not proven, the kernel refuses: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        }
        false => {
            let said = [output.stdout, output.stderr].concat();
            Err(String::from_utf8_lossy(&said).into_owned().into())
        }
    }
}

fn is(found: impl AsRef<str>, expected: &str) -> Result<(), Failed> {
    let found = found.as_ref();
    if found == expected { Ok(()) } else { Err(format!("expected `{expected}`, found `{found}`").into()) }
}

/// Whether the process ends soon. A zombie of somebody else's has ended.
fn ends(pid: i32) -> Result<(), Failed> {
    let deadline = Instant::now() + WITHIN;
    while Instant::now() < deadline {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Err(_) => return Ok(()),
            Ok(stat) if stat.contains(") Z ") => return Ok(()),
            Ok(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    Err(format!("process {pid} is still there").into())
}

/// The processes on the host whose command line holds `mark`.
fn marked(mark: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|one| one.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains(mark)))
        .collect()
}

// ---- anywhere

fn a_missing_program_is_named() -> Result<(), Failed> {
    let scratch = scratch();
    let mut missing = spec(&["no-such-program"], scratch.path(), false);
    missing.env.insert("PATH".into(), "/usr/bin:/srv/tools".into());
    let Err(LaunchError::Refused(reason)) = wait(spawn(missing)) else { return Err("it started".into()) };
    is(reason, "could not find the program `no-such-program`: looked in `/usr/bin`, `/srv/tools`")
}

fn surroundings_arrive() -> Result<(), Failed> {
    let scratch = scratch();
    let held = fs::File::open("/dev/null")?;
    rustix::io::fcntl_setfd(&held, rustix::io::FdFlags::empty())?;
    // 3 is the directory that the workload itself reads.
    is(wait(async { said(looking("open", "", scratch.path(), false).await).await }), "[0, 1, 2, 3] variable /")
}

fn ends_are_told() -> Result<(), Failed> {
    let scratch = scratch();
    for (script, expected) in [("exit 0", Exit::Code(0)), ("exit 7", Exit::Code(7)), ("kill -KILL $$", Exit::Signal(9))]
    {
        let exit =
            wait(async { spawn(spec(&["sh", "-c", script], scratch.path(), false)).await.unwrap().exited().await });
        is(exit.to_string(), &expected.to_string())?;
    }
    let exit = wait(async {
        let workload = spawn(spec(&["sleep", "1000"], scratch.path(), false)).await.unwrap();
        workload.stop(Stop::Term).unwrap();
        workload.exited().await
    });
    is(exit.to_string(), "ended by SIGTERM")
}

fn a_plain_tree_ends() -> Result<(), Failed> {
    tree_ends(false, "1000317")
}

fn a_plain_workload_cannot_signal() -> Result<(), Failed> {
    let scratch = scratch();
    let own = std::process::id().to_string();
    let heard = wait(async { said(looking("signal", &own, scratch.path(), false).await).await });
    if heard == "signalled" {
        eprintln!("not proven: this kernel has no Landlock scopes (6.12 has)");
        return Ok(());
    }
    is(heard, "PermissionDenied")
}

// ---- isolated

/// PROVES (no-way-around)
fn only_loopback() -> Result<(), Failed> {
    is(look("interfaces", ""), "lo")
}

fn host_loopback_is_out_of_reach() -> Result<(), Failed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    is(look("connect", &listener.local_addr()?.to_string()), "ConnectionRefused")?;
    is(look("connect", "192.0.2.1:80"), "NetworkUnreachable")
}

fn the_sidecar_reaches_in() -> Result<(), Failed> {
    let scratch = scratch();
    let heard = wait(async {
        let mut workload = looking("serve", "127.0.0.1:8080", scratch.path(), true).await;
        assert_eq!(line(&mut workload).await, "listening");
        let socket = std::net::TcpStream::from(ask(&workload, Ask::SocketTcp).unwrap());
        socket.set_nonblocking(true).unwrap();
        let socket = tokio::net::TcpSocket::from_std_stream(socket);
        let mut stream = socket.connect(SocketAddr::from(([127, 0, 0, 1], 8080))).await.unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        assert!(workload.exited().await.is_success());
        heard
    });
    is(heard, "from inside")
}

fn the_sidecar_accepts() -> Result<(), Failed> {
    let scratch = scratch();
    wait(async {
        let script = format!("read _ < ready; exec {} workload connect 127.81.1.1:80", executable().display());
        let mut waiting = spec(&["sh", "-c", &script], scratch.path(), true);
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("ready"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        waiting.dir = dir.path().to_owned();
        let workload = spawn(waiting).await.unwrap();
        let listener = ask(&workload, Ask::ListenTcp(SocketAddr::from(([127, 81, 1, 1], 80)))).unwrap();
        let listener = TcpListener::from(listener);
        let accepted = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"from the sidecar"));
        fs::write(dir.path().join("ready"), "\n").unwrap();
        let heard = said(workload).await;
        accepted.join().unwrap().unwrap();
        is(heard, "from the sidecar")
    })
}

fn names_are_asked_of_the_sidecar() -> Result<(), Failed> {
    let scratch = scratch();
    wait(async {
        let script = format!("read _ < ready; exec {} workload resolve ledger.mesh", executable().display());
        let mut waiting = spec(&["sh", "-c", &script], scratch.path(), true);
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("ready"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        waiting.dir = dir.path().to_owned();
        let workload = spawn(waiting).await.unwrap();
        if let Some(note) = &workload.note {
            return Err(format!("names cannot be proven here: {note}").into());
        }
        let address = SocketAddr::from((countersign_agent::isolate::DNS_ADDRESS, 53));
        let socket = UdpSocket::from(ask(&workload, Ask::BindUdp(address)).unwrap());
        std::thread::spawn(move || answer_names(&socket, Ipv4Addr::new(127, 81, 1, 7)));
        fs::write(dir.path().join("ready"), "\n").unwrap();
        is(said(workload).await, "127.81.1.7")
    })
}

/// The shortest DNS server: every A question has one answer, every other none. Ends with the test's process.
fn answer_names(socket: &UdpSocket, address: Ipv4Addr) {
    let mut packet = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut packet) {
        let name_end = 12 + packet[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
        let is_a = packet[name_end..name_end + 2] == [0, 1];
        let mut answer = packet[..length.min(name_end + 4)].to_vec();
        answer[2..4].copy_from_slice(&[0x81, 0x80]);
        answer[6..12].copy_from_slice(&[0, u8::from(is_a), 0, 0, 0, 0]);
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
            answer.extend(address.octets());
        }
        let _ = socket.send_to(&answer, from);
    }
}

fn the_data_directory_is_hidden() -> Result<(), Failed> {
    let scratch = scratch();
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("key"), "secret")?;
    let _listener = UnixListener::bind(path("control.sock"))?;
    let see =
        |verb: &str, argument: String| wait(async { said(looking(verb, &argument, scratch.path(), true).await).await });
    is(see("list", path("")), WORKLOAD_SOCKET)?;
    is(see("read", path("key")), "NotFound")?;
    is(see("dial", path("control.sock")), "NotFound")?;
    is(see("write", path("new")), "ReadOnlyFilesystem")?;
    // The host's own view is as it was.
    is(fs::read_to_string(path("key"))?, "secret")
}

/// PROVES (no-way-around)
fn nothing_is_left() -> Result<(), Failed> {
    let none = "0000000000000000";
    is(look("status", ""), &format!("{none} {none} {none} {none} {none} 1"))?;
    let refused = look("signal", &std::process::id().to_string());
    if !["Uncategorized", "PermissionDenied"].contains(&refused.as_str()) {
        return Err(format!("it can signal its agent: {refused}").into());
    }
    // The launcher, which holds the broker, is no process of its namespace; outside it is shut to debuggers.
    no_sight_of_the_host(&look("read", &format!("/proc/{}/environ", std::process::id())))
}

/// Where `/proc` could not be mounted again, a process of the host is seen but not looked into.
fn no_sight_of_the_host(found: &str) -> Result<(), Failed> {
    match found {
        "NotFound" | "PermissionDenied" => Ok(()),
        other => Err(format!("it looked into a process of the host: `{other}`").into()),
    }
}

fn a_hidden_tree_ends() -> Result<(), Failed> {
    tree_ends(true, "1000318")
}

/// PROVES (nothing-outlives): a workload that forks twice and leaves its session ends with its agent, which is killed without warning.
fn tree_ends(isolate: bool, mark: &str) -> Result<(), Failed> {
    let scratch = scratch();
    let mark = format!("{mark}{}", std::process::id());
    let script = format!("(setsid sh -c 'sleep {mark} & exec sleep {mark}' &) ; echo ready; exec sleep {mark}");
    let mut agent = Command::new(executable())
        .args(["agent", if isolate { "isolated" } else { "plain" }, &script])
        .arg(scratch.path())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut ready = [0; 5];
    agent.stdout.as_mut().unwrap().read_exact(&mut ready)?;
    let sleepers = || marked(&format!("sleep\0{mark}"));
    let deadline = Instant::now() + WITHIN;
    while sleepers().len() < 3 {
        assert!(Instant::now() < deadline, "the grandchildren did not start: {:?}", sleepers());
        std::thread::sleep(Duration::from_millis(10));
    }
    let doomed = sleepers();
    agent.kill()?;
    agent.wait()?;
    doomed.into_iter().try_for_each(ends)
}

/// PROVES (only-what-was-measured)
fn only_what_was_measured() -> Result<(), Failed> {
    let scratch = scratch();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serve");
    let write = |text: &str| {
        fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    write("exit 3");
    let command = [file.display().to_string()];
    let measured = measure(&command, Path::new("/"), None).unwrap().artifact;
    wait(async {
        let launcher = prepare(spec(&[&command[0]], scratch.path(), false)).await.unwrap();
        launcher.start(Some(measured)).await.unwrap();
        is(launcher.exited().await.to_string(), "exited with 3")?;
        write(&format!("touch {}", dir.path().join("ran").display()));
        let refused = launcher.start(Some(measured)).await.unwrap_err();
        is(refused.to_string(), "a file that its command names was replaced while it was being started")?;
        is(dir.path().join("ran").exists().to_string(), "false")?;
        let replaced = measure(&command, Path::new("/"), None).unwrap().artifact;
        launcher.start(Some(replaced)).await.unwrap();
        is(launcher.exited().await.to_string(), "exited with 0")?;
        is(dir.path().join("ran").exists().to_string(), "true")
    })
}

fn a_plain_workload_starts_again() -> Result<(), Failed> {
    starts_again(false, "1000320")
}

fn an_isolated_one_starts_again() -> Result<(), Failed> {
    starts_again(true, "1000321")
}

/// PROVES (nothing-outlives): each life leaves a process behind in a session of its own, which ends before its end is told.
fn starts_again(isolate: bool, mark: &str) -> Result<(), Failed> {
    let scratch = scratch();
    let mark = format!("{mark}{}", std::process::id());
    let left = || marked(&format!("sleep\0{mark}"));
    wait(async {
        let dir = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&dir.path().join("go"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script = format!("(setsid sleep {mark} &); readlink /proc/self/ns/net; read _ < go; exit 3");
        let mut leaving = spec(&["sh", "-c", &script], scratch.path(), isolate);
        leaving.dir = dir.path().to_owned();
        let mut workload = Workload { launcher: prepare(leaving).await.unwrap(), process: None };
        // Its sidecar has its sockets before it runs, and keeps them when it ended.
        let address = SocketAddr::from(([127, 0, 0, 1], 9000));
        let listener = isolate.then(|| TcpListener::from(ask(&workload, Ask::ListenTcp(address)).unwrap()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        is(format!("{:?}", left()), "[]")?;
        let mut namespaces = Vec::new();
        for _ in 0..3 {
            workload.process = Some(workload.start(None).await.unwrap());
            namespaces.push(line(&mut workload).await);
            let deadline = Instant::now() + WITHIN;
            while left().is_empty() {
                assert!(Instant::now() < deadline, "it left nothing behind");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            fs::write(dir.path().join("go"), "\n").unwrap();
            is(workload.exited().await.to_string(), "exited with 3")?;
            is(format!("{:?}", left()), "[]")?;
        }
        assert!(namespaces.iter().all(|one| *one == namespaces[0]), "{namespaces:?}");
        is(
            format!("{:?}", listener.map(|listener| listener.local_addr().is_ok())),
            if isolate { "Some(true)" } else { "None" },
        )
    })
}

fn a_killed_launcher_takes_all() -> Result<(), Failed> {
    let scratch = scratch();
    let mark = format!("1000319{}", std::process::id());
    let script = format!("(setsid sleep {mark} &) ; echo ready; exec sleep {mark}");
    let exit = wait(async {
        let mut workload = spawn(spec(&["sh", "-c", &script], scratch.path(), true)).await.unwrap();
        assert_eq!(line(&mut workload).await, "ready");
        let stat = fs::read_to_string(format!("/proc/{}/stat", workload.process().pid)).unwrap();
        let launcher: i32 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(launcher), nix::sys::signal::Signal::SIGKILL).unwrap();
        workload.exited().await
    });
    is(exit.to_string(), "its launcher was killed")?;
    marked(&mark).into_iter().try_for_each(ends)
}

fn entering_sees_the_same() -> Result<(), Failed> {
    let scratch = scratch();
    fs::write(scratch.path().join("key"), "secret")?;
    let none = "0000000000000000";
    wait(async {
        let workload = spawn(spec(&["sleep", "1000"], scratch.path(), true)).await.unwrap();
        let pid = workload.process().namespace_pid.unwrap().to_string();
        let enter = |verb: &str, argument: &str| {
            let output = Command::new(executable()).args(["enter", &pid, verb, argument]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        is(enter("interfaces", ""), "lo")?;
        is(enter("list", scratch.path().to_str().unwrap()), WORKLOAD_SOCKET)?;
        is(enter("status", ""), &format!("{none} {none} {none} {none} {none} 1"))?;
        no_sight_of_the_host(&enter("read", &format!("/proc/{}/environ", std::process::id())))
    })
}

fn a_refusal_says_why() -> Result<(), Failed> {
    let scratch = scratch();
    wait(async {
        let workload = spawn(spec(&["sleep", "1000"], scratch.path(), true)).await.unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 9000));
        let _held = ask(&workload, Ask::ListenTcp(address)).unwrap();
        let refused = ask(&workload, Ask::ListenTcp(address)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
        is(
            refused.to_string(),
            "could not listen on 127.0.0.1:9000 for the workload: Address already in use (os error 98)",
        )
    })
}
