//! A workload's own namespaces: user, network, mounts, IPC, and processes where `/proc` can be mounted. In them only the
//! loopback interface exists, names are asked of the sidecar, and the mesh's data directory is a read-only one that
//! holds a socket to ask for identities and nothing else.
//!
//! Entered by a process with a single thread, once. Nothing here starts the workload.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{SigHandler, Signal, kill, signal},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, getgid, getuid},
};
use rustix::{
    net,
    process::{PidfdFlags, pidfd_open},
    thread::CapabilitySet,
};

use crate::{harden, workload_api::peer::mounts_of};

/// Where a sidecar answers names inside the namespace, port 53.
pub const DNS_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 81, 0, 53);

/// The socket in the place of the data directory on which a workload asks for its identities.
pub const WORKLOAD_SOCKET: &str = "workload.sock";

/// One try, one second: the sidecar answers at once or is being replaced.
const RESOLV_CONF: &str = "nameserver 127.81.0.53\noptions timeout:1 attempts:3\n";

/// Why there is no namespace.
#[derive(Debug, thiserror::Error)]
#[error("could not {tried}: {source}")]
pub struct NamespaceError {
    /// What was being done.
    pub tried: &'static str,
    /// How it failed.
    pub source: io::Error,
}

/// What was made.
pub(crate) struct Namespace {
    /// The first process of the process namespace and its pidfd: when it ends, the kernel ends all others.
    pub init: Option<(Pid, OwnedFd)>,
    /// The number of its mount namespace.
    pub mounts: u64,
    /// Listens as [`WORKLOAD_SOCKET`] where the workload finds the data directory.
    pub workload_api: Option<OwnedFd>,
    /// What could not be had, in words.
    pub notes: Vec<String>,
}

fn step<T, E: Into<io::Error>>(tried: &'static str, result: Result<T, E>) -> Result<T, NamespaceError> {
    result.map_err(|e| NamespaceError { tried, source: e.into() })
}

/// Moves this process into namespaces of its own and prepares them.
///
/// INVARIANT (no-way-around): of interfaces only `lo` is ever raised here, and none is moved in.
pub(crate) fn create(data_dir: &Path) -> Result<Namespace, NamespaceError> {
    let processes = rehearse_processes();
    separate(processes.is_ok())?;
    // Before another /proc is mounted, in which this process is not.
    let mounts = step("read the mount namespace", mounts_of("self"))?;
    let mut notes = Vec::new();
    step("bring up the loopback interface", raise_loopback())?;
    // Ports below 1024 of a private loopback protect nothing. Where /proc/sys is read-only the workload just keeps
    // the usual limit; the broker has the capability.
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    let workload_api = arrange_mounts(data_dir, &mut notes)?;
    let init = match processes {
        Ok(()) => Some(start_init()?),
        Err(reason) => {
            notes.push(format!("the workload sees the processes of the host: {reason}"));
            None
        }
    };
    Ok(Namespace { init, mounts, workload_api, notes })
}

/// `unshare`, and this user mapped to itself: no other user exists inside.
fn separate(processes: bool) -> Result<(), NamespaceError> {
    let (uid, gid) = (getuid(), getgid());
    let mut flags =
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
    flags.set(CloneFlags::CLONE_NEWPID, processes);
    step("make a user, a network and a mount namespace", unshare(flags))?;
    // user_namespaces(7): without this an unprivileged process may not write gid_map.
    step("forbid setgroups", fs::write("/proc/self/setgroups", "deny"))?;
    step("map the user", fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))?;
    step("map the group", fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")))
}

/// Whether a process namespace with its own `/proc` can be had, tried in a child: after `unshare` there is no way back.
/// Containers that mask parts of `/proc` forbid to mount another.
fn rehearse_processes() -> Result<(), String> {
    let status = in_child(|| {
        separate(true)?;
        let mounted = in_child(|| step("mount /proc", mount_proc()));
        step("start a process in a process namespace", mounted)
    });
    status.map_err(|e| format!("a process namespace is refused ({e})"))
}

fn mount_proc() -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
}

/// Runs `body` in a forked child and waits for it; the error carries the number of the system's error.
#[allow(unsafe_code, reason = "fork: the launcher has a single thread")]
fn in_child(body: impl FnOnce() -> Result<(), NamespaceError>) -> io::Result<()> {
    // SAFETY: a process with one thread holds no lock that the child could find taken.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let code = match body() {
                Ok(()) => 0,
                Err(e) => e.source.raw_os_error().unwrap_or(nix::libc::EIO),
            };
            // SAFETY: ends the process without running the parent's exit routines.
            unsafe { nix::libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
            nix::sys::wait::WaitStatus::Exited(_, code) => Err(io::Error::from_raw_os_error(code)),
            _ => Err(io::ErrorKind::Interrupted.into()),
        },
    }
}

/// Process 1 of the namespace. It mounts `/proc`, inherits and discards what is orphaned, and lives until the launcher
/// ends; it holds no descriptor and no capability.
#[allow(unsafe_code, reason = "fork: the launcher has a single thread")]
fn start_init() -> Result<(Pid, OwnedFd), NamespaceError> {
    let (told, tell) = step("make a pipe", nix::unistd::pipe())?;
    // SAFETY: see `in_child`.
    match step("start the first process of the namespace", unsafe { fork() })? {
        ForkResult::Child => {
            drop(told);
            let code = match prepare_init() {
                Ok(()) => 0,
                Err(e) => e.raw_os_error().unwrap_or(nix::libc::EIO) as u8,
            };
            // Nobody reads: the launcher died before its death could be this process's.
            let alive = nix::unistd::write(&tell, &[code]).is_ok() && code == 0;
            // SAFETY: descriptors of this process only; nothing in it uses one any more.
            unsafe { nix::libc::close_range(0, u32::MAX, 0) };
            if alive {
                loop {
                    rustix::event::pause();
                }
            }
            // SAFETY: see `in_child`.
            unsafe { nix::libc::_exit(1) }
        }
        ForkResult::Parent { child } => {
            drop(tell);
            let mut code = [nix::libc::EIO as u8];
            let read = nix::unistd::read(&told, &mut code);
            if read == Ok(1) && code == [0] {
                let process = rustix::process::Pid::from_raw(child.as_raw()).ok_or(rustix::io::Errno::SRCH);
                let pidfd = process.and_then(|process| pidfd_open(process, PidfdFlags::empty()));
                return Ok((child, step("watch the first process of the namespace", pidfd)?));
            }
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, None);
            Err(NamespaceError { tried: "mount /proc", source: io::Error::from_raw_os_error(code[0].into()) })
        }
    }
}

#[allow(unsafe_code, reason = "signal(2): an ignored SIGCHLD needs no code to run")]
fn prepare_init() -> io::Result<()> {
    mount_proc()?;
    // SAFETY: no function of ours is installed. An ignored SIGCHLD makes the kernel discard ended children.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    harden::keep_capabilities(CapabilitySet::empty())?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    Ok(())
}

/// RTM_NEWLINK over rtnetlink: interface 1, which is `lo` in every network namespace, gets IFF_UP. 127.0.0.0/8 comes
/// with it.
fn raise_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes()); // nlmsghdr: length,
    message.extend(RTM_NEWLINK.to_ne_bytes()); // type,
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes()); // flags,
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // ifinfomsg: family, padding, type,
    message.extend(1i32.to_ne_bytes()); // index,
    message.extend(IFF_UP.to_ne_bytes()); // flags,
    message.extend(IFF_UP.to_ne_bytes()); // which of them change
    let flags = net::SocketFlags::CLOEXEC;
    let socket: OwnedFd = net::socket_with(net::AddressFamily::NETLINK, net::SocketType::RAW, flags, None)?;
    net::send(&socket, &message, net::SendFlags::empty())?;
    let mut answer = [0u8; 256];
    let (length, _) = net::recv(&socket, &mut answer, net::RecvFlags::empty())?;
    // NLMSG_ERROR: the error's number, negated, follows the header; 0 acknowledges.
    let code = answer.get(16..20).filter(|_| length >= 20).and_then(|code| code.try_into().ok());
    match code.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// A private copy of the host's mounts, in which a small file system lies over the data directory. The files that lie
/// over `/etc/resolv.conf` and `/etc/nsswitch.conf` are made in it and unlinked; what stays is a socket to ask for identities.
fn arrange_mounts(data_dir: &Path, notes: &mut Vec<String>) -> Result<Option<OwnedFd>, NamespaceError> {
    step(
        "make the mounts private",
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>),
    )?;
    let data_dir = step("find the data directory", data_dir.canonicalize())?;
    // A directory that was entered before a mount lies over it stays what it was; our own is one that every child,
    // and so /proc/1/cwd, begins with.
    step("leave the working directory", std::env::set_current_dir("/"))?;
    for alias in aliases(&data_dir) {
        hide(&alias, true)?;
    }
    hide(&data_dir, false)?;
    let overlays = [("/etc/resolv.conf", Some(RESOLV_CONF.to_owned())), ("/etc/nsswitch.conf", names_by_dns())];
    for (path, text) in overlays {
        let Some(text) = text else { continue };
        if let Err(e) = overlay(&data_dir, Path::new(path), &text) {
            notes.push(format!("`*.mesh` may not resolve by name: could not replace `{path}`: {e}"));
        }
    }
    let workload_api = match UnixListener::bind(data_dir.join(WORKLOAD_SOCKET)) {
        Ok(listener) => Some(listener.into()),
        Err(e) => {
            notes.push(format!("the workload cannot ask for identities: no socket in `{}`: {e}", data_dir.display()));
            None
        }
    };
    seal(&data_dir)?;
    // A name-service cache of the host would answer before our DNS is asked.
    if let Ok(cache) = PathBuf::from("/var/run/nscd").canonicalize() {
        hide(&cache, true)?;
    }
    Ok(workload_api)
}

/// Where else `dir`, or a part of it, is mounted.
fn aliases(dir: &Path) -> Vec<PathBuf> {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return Vec::new() };
    aliases_in(&mounts, dir).into_iter().filter(|alias| alias.is_dir()).collect()
}

/// proc(5): `id parent major:minor root mountpoint options...`. Of one file system, `root` is the part that is seen at
/// `mountpoint`.
fn aliases_in(mounts: &str, dir: &Path) -> Vec<PathBuf> {
    let mounts: Vec<(&str, PathBuf, PathBuf)> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            Some((fields.next()?, unescaped(fields.next()?), unescaped(fields.next()?)))
        })
        .collect();
    // Of mounts on one place the last lies on top.
    let over = mounts.iter().filter(|(_, _, at)| dir.starts_with(at)).max_by_key(|(_, _, at)| at.components().count());
    let Some((device, root, at)) = over else { return Vec::new() };
    let Ok(below) = dir.strip_prefix(at) else { return Vec::new() };
    let inside = root.join(below);
    mounts
        .iter()
        .filter(|(other, _, _)| other == device)
        .filter_map(|(_, root, at)| match (inside.strip_prefix(root), root.starts_with(&inside)) {
            (Ok(rest), _) => Some(at.join(rest)),
            (Err(_), true) => Some(at.clone()),
            (Err(_), false) => None,
        })
        .filter(|alias| alias != dir && !alias.starts_with(dir))
        .collect()
}

/// Octal escapes stand for space, tab, newline and backslash.
fn unescaped(field: &str) -> PathBuf {
    let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    plain.iter().fold(field.to_owned(), |text, (escape, byte)| text.replace(escape, byte)).into()
}

/// Mounts an empty directory over `dir`.
fn hide(dir: &Path, sealed: bool) -> Result<(), NamespaceError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let size = Some("size=64k,nr_inodes=16,mode=0700");
    step("hide a directory", mount(Some("hidden"), dir, Some("tmpfs"), flags, size))?;
    if sealed { seal(dir) } else { Ok(()) }
}

fn seal(path: &Path) -> Result<(), NamespaceError> {
    step("make a mount read-only", read_only(path))
}

fn read_only(path: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

/// Lays a file with `text` over `path`, wherever links lead.
fn overlay(made_in: &Path, path: &Path, text: &str) -> io::Result<()> {
    let target = path.canonicalize()?;
    let file = made_in.join("file");
    fs::write(&file, text)?;
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
    mount(Some(&file), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    read_only(&target)?;
    fs::remove_file(&file)
}

/// The host's `nsswitch.conf` with `hosts: files dns`: a resolver daemon of the host knows nothing of the mesh, and
/// its socket would take the question out of the namespace. `None`: nothing to change.
fn names_by_dns() -> Option<String> {
    let text = fs::read_to_string("/etc/nsswitch.conf").ok()?;
    let line = |line: &str| match line.trim_start().starts_with("hosts:") {
        true => "hosts: files dns\n".to_owned(),
        false => format!("{line}\n"),
    };
    Some(text.lines().map(line).collect())
}

/// Moves this process, which must have a single thread, into the namespaces of `pid`.
pub(crate) fn join(pid: rustix::process::Pid) -> Result<(), NamespaceError> {
    let process = step("find the process", pidfd_open(pid, PidfdFlags::empty()))?;
    let mut flags =
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC;
    // Asking for the process namespace one is already in is refused.
    let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/pid"));
    let theirs = step("read the namespaces of the process", of(&pid.as_raw_nonzero().to_string()))?;
    let ours = step("read the namespaces of this process", of("self"))?;
    flags.set(CloneFlags::CLONE_NEWPID, theirs != ours);
    step("enter the namespaces", nix::sched::setns(process.as_fd(), flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_found_wherever_it_is_mounted_again() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/a rw\n\
                      22 21 8:2 / /home rw - ext4 /dev/b rw\n\
                      23 21 8:2 /ada /srv/my\\040home rw - ext4 /dev/b rw\n\
                      24 21 8:2 /ada/mesh/data/keys /keys rw - ext4 /dev/b rw\n\
                      25 21 8:2 /bob /srv/bob rw - ext4 /dev/b rw\n\
                      26 21 8:1 /home /old rw - ext4 /dev/a rw\n";
        let found = aliases_in(mounts, Path::new("/home/ada/mesh/data"));
        assert_eq!(found, [PathBuf::from("/srv/my home/mesh/data"), PathBuf::from("/keys")]);
        assert_eq!(aliases_in(mounts, Path::new("/var/data")), Vec::<PathBuf>::new());
    }
}
