//! Starts workloads through launchers, in namespaces of their own where the kernel allows it, and says in words where
//! it does not. What happens inside is [`crate::launch`]'s.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Seek, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use countersign_api::broker::{self, BROKER_FD};
use countersign_core::canonical::Digest;
use rustix::fs::MemfdFlags;
use tokio::{
    io::Interest,
    net::UnixDatagram,
    process::{Child, ChildStderr, ChildStdout, Command},
};

use crate::launch::{
    self, SUBCOMMAND, namespace,
    order::{AGENT_FD, AgentMessage, LaunchOrder, LauncherMessage},
};

pub use crate::launch::{
    namespace::{DNS_ADDRESS, NamespaceError, WORKLOAD_SOCKET},
    order::{Exit, Stop},
};

/// How long a launcher may take to make the namespaces, and to start the workload.
const START_WITHIN: Duration = Duration::from_secs(10);

/// Whether workloads can be separated from each other on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// Namespaces can be made.
    pub available: bool,
    /// Why not, and what would help; or what is missing. Empty when all is well.
    pub note: String,
}

/// Tries it: a process of `executable` makes every namespace and mount that a workload gets, and ends.
pub async fn probe(executable: &Path, data_dir: &Path) -> Isolation {
    let mut command = Command::new(executable);
    command.arg(SUBCOMMAND).arg(launch::PROBE).arg(data_dir).stdin(Stdio::null()).kill_on_drop(true);
    let unavailable = |note: String| Isolation { available: false, note };
    match tokio::time::timeout(START_WITHIN, command.output()).await {
        Ok(Ok(output)) if output.status.success() => {
            Isolation { available: true, note: String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ") }
        }
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            unavailable(format!("{said}{}", why_refused(Path::new("/proc/sys"))))
        }
        Ok(Err(e)) => unavailable(format!("could not start `{}`: {e}", executable.display())),
        Err(_) => unavailable("making a namespace took more than 10 s".to_owned()),
    }
}

/// The setting that most likely forbids user namespaces, in words.
fn why_refused(sysctl: &Path) -> String {
    let setting = |name: &str| fs::read_to_string(sysctl.join(name)).ok().map(|value| value.trim().to_owned());
    let refusing = [
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
        ("user/max_net_namespaces", "0", "15000"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    for (name, refuses, allows) in refusing {
        if setting(name).as_deref() == Some(refuses) {
            let name = name.replace('/', ".");
            return format!("; help: {name} is {refuses} on this host: `sysctl {name}={allows}` allows it");
        }
    }
    "; help: the profile of a container or a service manager (seccomp, AppArmor) may forbid unshare(2) or mount(2)"
        .to_owned()
}

/// What to start.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// The `countersign` binary: `/proc/self/exe`.
    pub executable: PathBuf,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The working directory.
    pub dir: PathBuf,
    /// Variables on top of this process's own.
    pub env: BTreeMap<String, String>,
    /// Namespaces of its own; the result then has a broker.
    pub isolate: bool,
    /// The mesh's data directory, which an isolated workload does not see.
    pub data_dir: PathBuf,
}

/// Why a workload was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher did not come up.
    #[error("could not start a launcher")]
    Launcher(#[from] io::Error),
    /// The launcher says why.
    #[error("{0}")]
    Refused(String),
    /// The workload is not what was measured.
    #[error("a file that its command names was replaced while it was being started")]
    Other,
    /// The launcher said nothing.
    #[error("the launcher did not answer within 10 s")]
    TooSlow,
}

/// The namespaces of one workload, with a launcher in them that starts it as often as it is told to. Dropped, everything
/// in them is killed.
#[derive(Debug)]
pub struct Launcher {
    /// Its process, as this host numbers it. Every process of the workload descends from it.
    pub pid: u32,
    /// The number of the mount namespace that its workload lives in; absent when it is not isolated.
    pub mounts: Option<u64>,
    /// What could not be had, in words.
    pub note: Option<String>,
    /// What the workload writes, whenever it runs.
    pub stdout: Option<ChildStdout>,
    /// What it complains.
    pub stderr: Option<ChildStderr>,
    /// The sidecar's end of the broker, to be passed as descriptor 4; a sidecar that replaces another gets a duplicate.
    pub broker: Option<OwnedFd>,
    /// Listens where the workload asks for identities; absent when it is not isolated.
    pub workload_api: Option<OwnedFd>,
    control: UnixDatagram,
    _process: Child,
}

/// A running workload.
#[derive(Debug)]
pub struct Process {
    /// Its process, as this host numbers it.
    pub pid: u32,
    /// The same, for as long as this is held.
    pub pidfd: OwnedFd,
    /// The process whose namespaces [`enter`] enters; absent when it is not isolated.
    pub namespace_pid: Option<u32>,
}

/// Makes the namespaces of a workload; nothing runs in them yet. Needs a tokio runtime with I/O.
pub async fn prepare(spec: LaunchSpec) -> Result<Launcher, LaunchError> {
    let (control, launchers_end) = broker::pair()?;
    let mut descriptors = vec![(launchers_end, AGENT_FD)];
    let mut sidecars_end = None;
    if spec.isolate {
        let (brokers_end, other) = broker::pair()?;
        descriptors.push((brokers_end, BROKER_FD));
        sidecars_end = Some(other);
    }
    let order = LaunchOrder {
        command: spec.command,
        dir: std::path::absolute(spec.dir)?,
        env: spec.env,
        isolate: spec.isolate,
        data_dir: spec.data_dir,
    };
    let mut command = std::process::Command::new(&spec.executable);
    command.arg(SUBCOMMAND).stdin(written(&order)?).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    launch::inherit(&mut command, descriptors)?;
    let mut command = Command::from(command);
    let mut process = command.spawn()?;
    drop(command); // and with it our copies of the launcher's descriptors: its death must be seen as a closed socket
    let control = nonblocking(control)?;
    match soon(&control).await? {
        Some((LauncherMessage::Prepared { note, mounts }, workload_api)) => {
            let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
            let pid = process.id().ok_or_else(|| io::Error::other("the launcher has ended"))?;
            Ok(Launcher {
                pid,
                mounts,
                note,
                stdout,
                stderr,
                broker: sidecars_end,
                workload_api,
                control,
                _process: process,
            })
        }
        Some((LauncherMessage::Failed(reason), _)) => Err(LaunchError::Refused(reason)),
        Some(_) => Err(LaunchError::Refused("the launcher spoke out of turn".to_owned())),
        None => {
            let output = process.wait_with_output().await?;
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(LaunchError::Refused(format!("the launcher ended with {}: {said}", output.status)))
        }
    }
}

/// The order as a file without a name, to be read from its start.
fn written(order: &LaunchOrder) -> io::Result<Stdio> {
    let mut file = fs::File::from(rustix::fs::memfd_create("order", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(order)?)?;
    file.rewind()?;
    Ok(file.into())
}

/// The runtime's type for datagrams does for packets: only its readiness is used.
fn nonblocking(socket: OwnedFd) -> io::Result<UnixDatagram> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    UnixDatagram::from_std(socket.into())
}

async fn receive(control: &UnixDatagram) -> io::Result<Option<(LauncherMessage, Option<OwnedFd>)>> {
    control.async_io(Interest::READABLE, || broker::receive(control)).await
}

async fn soon(control: &UnixDatagram) -> Result<Option<(LauncherMessage, Option<OwnedFd>)>, LaunchError> {
    Ok(tokio::time::timeout(START_WITHIN, receive(control)).await.map_err(|_| LaunchError::TooSlow)??)
}

impl Launcher {
    /// Starts the workload and waits until it runs; only if it is `artifact`, where that is given.
    pub async fn start(&self, artifact: Option<Digest>) -> Result<Process, LaunchError> {
        broker::send(&self.control, &AgentMessage::Start { artifact }, None)?;
        match soon(&self.control).await? {
            Some((LauncherMessage::Started { pid, namespace_pid }, Some(pidfd))) => {
                Ok(Process { pid, pidfd, namespace_pid })
            }
            Some((LauncherMessage::Failed(reason), _)) => Err(LaunchError::Refused(reason)),
            Some((LauncherMessage::Other, _)) => Err(LaunchError::Other),
            Some(_) => Err(LaunchError::Refused("the launcher spoke out of turn".to_owned())),
            None => Err(LaunchError::Refused("the launcher was killed".to_owned())),
        }
    }

    /// Waits until the workload ended, and everything it started with it. Cancel-safe. [`Exit::Lost`]: the launcher and its
    /// namespaces are gone as well.
    pub async fn exited(&self) -> Exit {
        loop {
            match receive(&self.control).await {
                Ok(Some((LauncherMessage::Exited(exit), _))) => return exit,
                // The answer to a start that nobody waited for to its end.
                Ok(Some(_)) => {}
                _ => return Exit::Lost,
            }
        }
    }

    /// Asks the workload to end, or ends it. One that is gone already is no error.
    pub fn stop(&self, how: Stop) -> io::Result<()> {
        match broker::send(&self.control, &AgentMessage::Stop(how), None) {
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            sent => sent,
        }
    }
}

/// Moves this process into the namespaces of a workload (`namespace_pid` as its agent tells it) and confines it as the
/// workload is, in the directory `dir`. To be called before any thread is started.
///
/// A program run afterwards must be a child (`Command::status`), not an `exec` of this process: only children enter
/// the process namespace.
pub fn enter(namespace_pid: u32, dir: &Path) -> Result<(), EnterError> {
    let pid =
        rustix::process::Pid::from_raw(namespace_pid.cast_signed()).ok_or(EnterError::NoProcess(namespace_pid))?;
    namespace::join(pid)?;
    launch::confine(true).map_err(EnterError::Confine)?;
    std::env::set_current_dir(dir).map_err(|source| EnterError::Dir { dir: dir.to_owned(), source })
}

/// Why the namespaces of a workload cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// Not a process number.
    #[error("{0} is no process")]
    NoProcess(u32),
    /// The kernel refused.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// What a workload must not have could not be given up.
    #[error("could not drop privileges")]
    Confine(#[source] io::Error),
    /// The working directory is not there.
    #[error("could not change to `{}`", dir.display())]
    Dir {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_that_forbids_namespaces_is_named_with_the_one_that_allows_them() {
        let sysctl = tempfile::tempdir().unwrap();
        for dir in ["kernel", "user"] {
            fs::create_dir(sysctl.path().join(dir)).unwrap();
        }
        let check = |name: &str, value: &str, expected: &str| {
            let file = sysctl.path().join(name);
            fs::write(&file, format!("{value}\n")).unwrap();
            let said = why_refused(sysctl.path());
            assert!(said.contains(expected), "{said}");
            fs::remove_file(file).unwrap();
        };
        check("kernel/unprivileged_userns_clone", "0", "`sysctl kernel.unprivileged_userns_clone=1` allows it");
        check("user/max_user_namespaces", "0", "`sysctl user.max_user_namespaces=15000` allows it");
        check("kernel/apparmor_restrict_unprivileged_userns", "1", "is 1 on this host");
        check("user/max_user_namespaces", "9000", "seccomp");
    }
}
