//! `countersign launch`, the process between an agent and one workload: it makes the workload's namespaces, hands sockets
//! of its network namespace to the sidecar ([`broker`]), starts the workload when the agent says that its sidecar is
//! there, and again in the same namespaces when it ended. What a workload started ends with it; everything ends when the
//! agent says so, or dies.
//!
//! One thread, no runtime: the kernel lets only such a process into a new user namespace. It holds no key and decides
//! nothing; what to do arrives from the agent on standard input.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, ExitCode, Stdio},
};

use countersign_api::broker::{self, BROKER_FD};
use countersign_core::canonical::Digest;
use nix::{
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, killpg, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Pid, getppid, setsid},
};
use rustix::{
    event::{PollFd, PollFlags},
    process::PidfdFlags,
    thread::CapabilitySet,
};

use crate::{artifact, harden};

use self::{
    namespace::Namespace,
    order::{AGENT_FD, AgentMessage, LaunchOrder, LauncherMessage, Stop},
};

pub(crate) mod namespace;
pub(crate) mod order;
pub(crate) mod program;
mod serve;
mod tree;

/// The hidden subcommand's name.
pub const SUBCOMMAND: &str = "launch";
/// `countersign launch --probe`: makes the namespaces and runs nothing in them.
pub(crate) const PROBE: &str = "--probe";

/// The hidden subcommand `launch`; `args` are those after its name. To be called before any thread is started.
///
/// The exit code says only whether the launcher did its duty; how the workload ended is told to the agent.
pub fn launch_main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let outcome = match args.as_slice() {
        [] => launch(),
        [probe, data_dir] if probe == PROBE => {
            namespace::create(data_dir.as_ref()).map(print_notes).map_err(|e| e.to_string())
        }
        _ => Err("`countersign launch` takes no arguments: an agent starts it".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn print_notes(namespace: Namespace) {
    for note in namespace.notes {
        println!("{note}");
    }
}

fn launch() -> Result<(), String> {
    let agent = inherited(AGENT_FD).ok_or("`countersign launch` is started by an agent, never by hand")?;
    let said = |e: io::Error| format!("could not tell the agent: {e}");
    let prepared = match prepare(&agent) {
        Ok(prepared) => prepared,
        // What was forked meanwhile ends with this process.
        Err(reason) => return broker::send(&agent, &LauncherMessage::Failed(reason), None).map_err(said),
    };
    let note = (!prepared.notes.is_empty()).then(|| prepared.notes.join("; "));
    let workload_api = prepared.workload_api.as_ref().map(AsFd::as_fd);
    let mounts = prepared.mounts;
    broker::send(&agent, &LauncherMessage::Prepared { note, mounts }, workload_api).map_err(said)?;
    let served = serve_agent(&agent, &prepared).map_err(|e| format!("could not serve the agent: {e}"));
    let init = prepared.init.as_ref().map(|(_, pidfd)| pidfd);
    tree::kill_all(init).map_err(|e| format!("could not end what the workload started: {e}"))?;
    served
}

/// The workload's namespaces, in which it can be started any number of times.
struct Prepared {
    order: LaunchOrder,
    init: Option<(Pid, OwnedFd)>,
    broker: Option<OwnedFd>,
    mounts: Option<u64>,
    workload_api: Option<OwnedFd>,
    signals: SignalFd,
    notes: Vec<String>,
}

fn prepare(agent: &OwnedFd) -> Result<Prepared, String> {
    let plain = |tried: &'static str| move |e: io::Error| format!("could not {tried}: {e}");
    let order: LaunchOrder =
        serde_json::from_reader(io::stdin().lock()).map_err(|e| format!("could not read the launch order: {e}"))?;
    let broker = match order.isolate {
        true => Some(inherited(BROKER_FD).ok_or("could not find the sidecar's end of the broker")?),
        false => None,
    };
    close_from(BROKER_FD + 1);
    for socket in [Some(agent), broker.as_ref()].into_iter().flatten() {
        // A full queue must not keep the launcher from seeing that its agent died.
        rustix::io::ioctl_fionbio(socket, true).map_err(|e| plain("prepare a socket")(e.into()))?;
    }
    prctl::set_child_subreaper(true).map_err(|e| plain("adopt orphans")(e.into()))?;
    let signals = block_signals().map_err(plain("block signals"))?;
    let namespace = match order.isolate {
        true => Some(namespace::create(&order.data_dir).map_err(|e| e.to_string())?),
        false => None,
    };
    // Not before: /proc/self/uid_map of such a process belongs to root.
    harden::non_dumpable().map_err(plain("shut the launcher to debuggers"))?;
    if namespace.is_some() {
        // The broker binds the ports that callers use, such as 80.
        harden::keep_capabilities(CapabilitySet::NET_BIND_SERVICE).map_err(plain("drop capabilities"))?;
    }
    let mounts = namespace.as_ref().map(|made| made.mounts);
    let (init, workload_api, notes) =
        namespace.map_or((None, None, Vec::new()), |made| (made.init, made.workload_api, made.notes));
    Ok(Prepared { order, init, broker, mounts, workload_api, signals, notes })
}

/// Starts the workload and says so, or why not; its process when it runs.
fn start(agent: &OwnedFd, prepared: &Prepared, artifact: Option<Digest>) -> io::Result<Option<Pid>> {
    let pid = match execute_only(&prepared.order, artifact) {
        Ok(pid) => pid,
        Err(refused) => {
            tree::clear(prepared.init.is_some())?;
            broker::send(agent, &refused, None)?;
            return Ok(None);
        }
    };
    let process = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(rustix::io::Errno::SRCH)?;
    let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    let namespace = prepared.order.isolate.then(|| prepared.init.as_ref().map_or(pid, |(init, _)| *init));
    let message = LauncherMessage::Started {
        pid: pid.as_raw().unsigned_abs(),
        namespace_pid: namespace.map(|pid| pid.as_raw().unsigned_abs()),
    };
    broker::send(agent, &message, Some(pidfd.as_fd()))?;
    Ok(Some(pid))
}

/// Variables that are for the agent: what a collector of telemetry knows it by. A workload that has a collector of its own is
/// given its credentials in the mesh directory.
const AGENTS_OWN: [&str; 3] =
    ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_METRICS_HEADERS"];

/// Starts the workload if it is `artifact`.
///
/// INVARIANT (only-what-was-measured): what the command names is read here, where it is executed, and looked at again once
/// the program runs; what was written or replaced in between is killed.
fn execute_only(order: &LaunchOrder, artifact: Option<Digest>) -> Result<Pid, LauncherMessage> {
    let Some(expected) = artifact else { return execute(order).map_err(LauncherMessage::Failed) };
    let measured = artifact::measure(&order.command, &order.dir, path(order).as_deref())
        .map_err(|e| LauncherMessage::Failed(e.to_string()))?;
    if measured.artifact != expected {
        return Err(LauncherMessage::Other);
    }
    let pid = execute(order).map_err(LauncherMessage::Failed)?;
    if measured.still_holds() {
        return Ok(pid);
    }
    tree::kill(pid);
    Err(LauncherMessage::Other)
}

/// Where programs are looked for.
fn path(order: &LaunchOrder) -> Option<OsString> {
    order.env.get("PATH").map(OsString::from).or_else(|| std::env::var_os("PATH"))
}

/// Starts the workload, which has this process for a parent and nothing else from it but its output.
#[allow(unsafe_code, reason = "pre_exec: the child drops what it must not keep between fork and exec")]
fn execute(order: &LaunchOrder) -> Result<Pid, String> {
    let (name, arguments) = order.command.split_first().ok_or(program::ProgramError::Empty.to_string())?;
    if !order.dir.is_dir() {
        return Err(format!(
            "could not start `{name}`: its working directory `{}` does not exist",
            order.dir.display()
        ));
    }
    let file = program::find(name, &order.dir, path(order).as_deref()).map_err(|e| e.to_string())?;
    let (isolated, launcher) = (order.isolate, Pid::this());
    let mut command = Command::new(&file);
    command.arg0(name).args(arguments).current_dir(&order.dir).stdin(Stdio::null());
    for variable in AGENTS_OWN {
        command.env_remove(variable);
    }
    command.envs(&order.env);
    let become_workload = move || {
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        // No terminal: it could read what is typed there. And a process group that can be signalled as one.
        setsid()?;
        confine(isolated)?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The launcher may have died before that. In a process namespace its first process then ends this one.
        if !isolated && getppid() != launcher {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: the launcher has a single thread, so the child may allocate and lock.
    unsafe { command.pre_exec(become_workload) };
    let child = command.spawn().map_err(|e| program::refused(file, &e).to_string())?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}

/// Gives up what a workload must not have. Everything this process executes stays so.
pub(crate) fn confine(isolated: bool) -> io::Result<()> {
    if isolated {
        harden::keep_capabilities(CapabilitySet::empty())?;
    }
    harden::no_new_privileges()?;
    harden::scope_to_descendants()
}

/// Serves the broker, and starts and ends the workload as the agent says, until the agent is gone.
fn serve_agent(agent: &OwnedFd, prepared: &Prepared) -> io::Result<()> {
    let mut broker = prepared.broker.as_ref();
    let mut workload: Option<Pid> = None;
    loop {
        let mut polled = vec![PollFd::new(agent, PollFlags::IN), PollFd::new(&prepared.signals, PollFlags::IN)];
        polled.extend(broker.map(|broker| PollFd::new(broker, PollFlags::IN)));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
        let woken: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        let mut ended = None;
        if woken[1] {
            while let Some(signal) = prepared.signals.read_signal()? {
                match workload {
                    Some(pid) if signal.ssi_signo == Signal::SIGTERM as u32 => drop(killpg(pid, Signal::SIGTERM)),
                    None if signal.ssi_signo == Signal::SIGTERM as u32 => return Ok(()),
                    _ => {}
                }
            }
            ended = tree::reap(workload);
        }
        if woken[0] && ended.is_none() {
            match (broker::receive::<AgentMessage>(agent)?, workload) {
                (None, _) | (Some((AgentMessage::Stop(_), _)), None) => return Ok(()),
                (Some((AgentMessage::Start { artifact }, _)), None) => workload = start(agent, prepared, artifact)?,
                (Some((AgentMessage::Start { .. }, _)), Some(_)) => {}
                (Some((AgentMessage::Stop(Stop::Term), _)), Some(pid)) => drop(killpg(pid, Signal::SIGTERM)),
                (Some((AgentMessage::Stop(Stop::Kill), _)), Some(pid)) => ended = Some(tree::kill(pid)),
            }
        }
        if let Some(exit) = ended {
            workload = None;
            tree::clear(prepared.init.is_some())?;
            broker::send(agent, &LauncherMessage::Exited(exit), None)?;
        }
        if let (Some(socket), Some(true)) = (broker, woken.get(2)) {
            // Without a sidecar there is nobody to serve; the workload's end is the agent's to decide.
            if !serve::answer(socket.as_fd())? {
                broker = None;
            }
        }
    }
}

/// SIGCHLD and SIGTERM arrive as packets; a terminal's signals are for the agent, which stops its workloads in order.
fn block_signals() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    let ended = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP] {
        mask.add(signal);
    }
    mask.thread_block()?;
    Ok(ended)
}

/// The descriptor `number` that this process was started with, if it was; it will not be passed on.
#[allow(unsafe_code, reason = "a descriptor that was inherited is known by its number only")]
fn inherited(number: i32) -> Option<OwnedFd> {
    // SAFETY: borrowed for a check that fails cleanly when it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::net::sockopt::socket_type(borrowed).ok()?;
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).ok()?;
    // SAFETY: nothing else in this process knows the number, and it is asked for once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor from `number` on: whatever an agent was holding is not for the workload.
#[allow(unsafe_code, reason = "close_range(2) has no safe wrapper")]
fn close_from(number: i32) {
    // SAFETY: nothing above the two sockets was opened by this process yet.
    unsafe { nix::libc::close_range(number.unsigned_abs(), u32::MAX, 0) };
}

/// Has `command` start with each of `descriptors` under its number.
#[allow(unsafe_code, reason = "pre_exec: descriptors are placed between fork and exec")]
pub(crate) fn inherit(command: &mut Command, descriptors: Vec<(OwnedFd, i32)>) -> io::Result<()> {
    let mut away = Vec::with_capacity(descriptors.len());
    for (descriptor, number) in descriptors {
        // Above every number asked for, so that placing one does not close another.
        away.push((rustix::io::fcntl_dupfd_cloexec(&descriptor, 64)?, number));
    }
    let place = move || {
        for (descriptor, number) in &away {
            // SAFETY: dup2 is safe between fork and exec; what was open under the number is not used by the child.
            if unsafe { nix::libc::dup2(descriptor.as_raw_fd(), *number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `place` neither allocates nor locks.
    unsafe { command.pre_exec(place) };
    Ok(())
}
