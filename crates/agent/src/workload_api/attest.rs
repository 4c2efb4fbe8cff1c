//! What can be told of a process that the agent did not start: its selectors. Read of `/proc` while its pidfd says that it lives, so that
//! nothing is told of another one with the same number; and looked at again at every request, since a process may become another.
//!
//! What it says of itself (its name, its command line, its environment) is never looked at.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::Path,
};

use countersign_core::{canonical::Digest, registration::Selector};

use crate::{
    artifact::{FILE_BYTES_MAX, Stamp, digest_of},
    workload_api::peer::{Peer, field_of_stat, mounts_of},
};

/// Longest file of `/proc` that is read, in bytes.
const PROC_BYTES_MAX: u64 = 64 * 1024;
/// proc(5): when a process began, in ticks since the machine did. It changes with no execve(2), and no two of one number share it.
const STARTED: usize = 22;

/// A process as it was observed.
#[derive(Debug)]
pub(crate) struct Observed {
    started: u64,
    owners: Owners,
    cgroup: Option<String>,
    program: Option<Program>,
    selectors: BTreeSet<Selector>,
}

/// Who a process runs as: only where all of its ids agree. One that can change between two users is neither.
#[derive(Debug, PartialEq, Eq)]
struct Owners {
    uid: Option<u32>,
    gid: Option<u32>,
}

/// The file that it executes.
#[derive(Debug)]
struct Program {
    stamp: Stamp,
    digest: Digest,
}

impl Observed {
    /// Observes it. Blocks: the file of its program is read.
    pub(crate) fn of(peer: &Peer) -> io::Result<Self> {
        let pid = peer.pid();
        let (started, owners, cgroup) = (started(pid)?, owners(pid)?, cgroup(pid));
        let exe = format!("/proc/{pid}/exe");
        // Of another user's process this is for root to read; what cannot be read selects nothing.
        let program = File::open(&exe).ok().and_then(|mut file| {
            let stamp = Stamp::of(&file.metadata().ok()?);
            let is_readable = stamp.size() <= FILE_BYTES_MAX;
            Some(Program { digest: is_readable.then(|| digest_of(&mut file).ok()).flatten()?, stamp })
        });
        let path = program.as_ref().and_then(|program| path_of(pid, &exe, &program.stamp));
        let mut selectors = BTreeSet::new();
        selectors.extend(owners.uid.map(Selector::Uid));
        selectors.extend(owners.gid.map(Selector::Gid));
        selectors.extend(program.as_ref().map(|program| Selector::Sha256(program.digest)));
        let texts = [
            path.map(|path| format!("unix:path:{path}")),
            cgroup.as_deref().and_then(unit).map(|unit| format!("systemd:id:{unit}")),
            cgroup.as_deref().and_then(container).map(|id| format!("container:{id}")),
            cgroup.as_ref().map(|path| format!("cgroup:{path}")),
        ];
        selectors.extend(texts.into_iter().flatten().filter_map(|text| text.parse().ok()));
        let observed = Self { started, owners, cgroup, program, selectors };
        match observed.still_holds(peer) {
            true => Ok(observed),
            false => Err(io::Error::other("it changed while it was looked at")),
        }
    }

    /// What it has.
    pub(crate) fn selectors(&self) -> &BTreeSet<Selector> {
        &self.selectors
    }

    /// When it began: with its number, a name that no other process of this machine has.
    pub(crate) fn started(&self) -> u64 {
        self.started
    }

    /// The content of its program.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.program.as_ref().map(|program| program.digest)
    }

    /// Whether the process is still what was observed: alive, of the same owner and group, executing the same file, untouched.
    pub(crate) fn still_holds(&self, peer: &Peer) -> bool {
        let pid = peer.pid();
        let stamp = fs::metadata(format!("/proc/{pid}/exe")).ok().map(|now| Stamp::of(&now));
        started(pid).is_ok_and(|now| now == self.started)
            && owners(pid).is_ok_and(|now| now == self.owners)
            && cgroup(pid) == self.cgroup
            && stamp.as_ref() == self.program.as_ref().map(|program| &program.stamp)
            && peer.is_alive()
    }
}

fn read(path: &str) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(File::open(path)?, PROC_BYTES_MAX), &mut text)?;
    Ok(text)
}

fn started(pid: u32) -> io::Result<u64> {
    field_of_stat(pid, STARTED).and_then(|field| field.parse().ok()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Of `/proc/<pid>/status`, which names the owners also of a process that hides behind root because it leaves no core dump.
fn owners(pid: u32) -> io::Result<Owners> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let ids = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let ids: BTreeSet<u32> = line.split_whitespace().map(|id| id.parse().ok()).collect::<Option<_>>()?;
        (ids.len() == 1).then(|| ids.first().copied()).flatten()
    };
    Ok(Owners { uid: ids("Uid:"), gid: ids("Gid:") })
}

/// The control group, as this process sees it: of the one hierarchy where there is one, or else of systemd's. None for one that lies
/// outside of what this process can see.
fn cgroup(pid: u32) -> Option<String> {
    cgroup_in(&read(&format!("/proc/{pid}/cgroup")).ok()?)
}

fn cgroup_in(text: &str) -> Option<String> {
    let of = |hierarchy: &str| text.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(hierarchy));
    let path = of("name=systemd:").filter(|path| *path != "/").or_else(|| of(":"))?;
    path.starts_with('/').then(|| path.to_owned())
}

/// The unit of the host's own systemd: the first part that is no slice. What a user's systemd runs belongs to the unit `user@UID.service`, so
/// that nobody gets the unit of the host by naming one of their own like it.
fn unit(cgroup: &str) -> Option<&str> {
    let part = cgroup.split('/').skip(1).find(|part| !part.ends_with(".slice"))?;
    let is_unit = [".service", ".scope", ".socket", ".mount", ".swap"].iter().any(|kind| part.ends_with(kind));
    (is_unit && cgroup.split('/').nth(1).is_some_and(|first| first.ends_with(".slice"))).then_some(part)
}

/// The id of a container, as its runtime named the group: `docker-ID.scope`, `cri-containerd-ID.scope`, `…/ID`.
fn container(cgroup: &str) -> Option<&str> {
    let last = cgroup.rsplit('/').next()?;
    let last = last.strip_suffix(".scope").unwrap_or(last);
    let id = last.rsplit_once('-').map_or(last, |(_, id)| id);
    (id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))).then_some(id)
}

/// Where the program lies, for one that lives in the mounts of the agent: in mounts of their own everybody puts what they like at any path.
/// And only if that is what lies there now.
fn path_of(pid: u32, exe: &str, stamp: &Stamp) -> Option<String> {
    if mounts_of(&pid.to_string()).ok()? != mounts_of("self").ok()? {
        return None;
    }
    let path = fs::read_link(exe).ok()?;
    let lies_there = fs::metadata(&path).is_ok_and(|found| Stamp::of(&found) == *stamp);
    Path::to_str(&path).filter(|_| lies_there).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Child, Command, Stdio},
    };

    use super::*;

    /// A shell that becomes `sleep` when it is told to.
    fn shell() -> (Child, Peer) {
        let mut command = Command::new("sh");
        let child = command.args(["-c", "read line; exec sleep 1000"]).stdin(Stdio::piped()).spawn().unwrap();
        let peer = Peer::of_pid(child.id()).unwrap();
        (child, peer)
    }

    fn until(so: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !so() {
            assert!(begun.elapsed().as_secs() < 20, "in vain");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn is_shell(child: &Child) -> bool {
        fs::read_link(format!("/proc/{}/exe", child.id())).is_ok_and(|at| at == fs::canonicalize("/bin/sh").unwrap())
    }

    #[test]
    fn a_process_has_the_selectors_of_its_owner_and_its_program() {
        let (mut child, peer) = shell();
        until(|| is_shell(&child));
        let observed = Observed::of(&peer).unwrap();
        let shell = fs::canonicalize("/bin/sh").unwrap();
        let digest = Digest::of(&fs::read(&shell).unwrap());
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        for expected in [
            format!("unix:uid:{uid}"),
            format!("unix:gid:{gid}"),
            format!("unix:path:{}", shell.display()),
            format!("unix:sha256:{digest}"),
        ] {
            assert!(observed.selectors().contains(&expected.parse().unwrap()), "{expected}: {observed:?}");
        }
        assert_eq!(observed.digest(), Some(digest));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!observed.still_holds(&peer));
        assert!(Observed::of(&peer).is_err());
    }

    #[test]
    fn a_process_that_executes_another_program_is_not_what_it_was() {
        let (mut child, peer) = shell();
        until(|| is_shell(&child));
        let observed = Observed::of(&peer).unwrap();
        assert!(observed.still_holds(&peer));
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        until(|| !is_shell(&child));
        assert!(!observed.still_holds(&peer));
        let became = Observed::of(&peer).unwrap();
        assert_eq!(became.started(), observed.started());
        assert_ne!(became.selectors(), observed.selectors());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_unit_is_the_hosts_and_a_container_its_runtimes() {
        let id = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let docker = format!("/system.slice/docker-{id}.scope");
        let pod = format!("/kubepods.slice/kubepods-pod7.slice/cri-containerd-{id}.scope");
        for (path, expected_unit, expected_container) in [
            ("/system.slice/envoy.service", Some("envoy.service"), None),
            ("/system.slice/system-envoy.slice/envoy@1.service/worker", Some("envoy@1.service"), None),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/envoy.service", Some("user@1000.service"), None),
            ("/user.slice/user-1000.slice/session-2.scope", Some("session-2.scope"), None),
            ("/envoy.service", None, None),
            ("/mine/system.slice/envoy.service", None, None),
            ("/", None, None),
            (docker.as_str(), Some(&docker[14..]), Some(id)),
            (pod.as_str(), Some(&pod[36..]), Some(id)),
            (&format!("/docker/{id}"), None, Some(id)),
        ] {
            assert_eq!((unit(path), container(path)), (expected_unit, expected_container), "{path}");
        }
    }

    #[test]
    fn the_group_is_that_of_the_one_hierarchy_or_of_systemds() {
        for (text, expected) in [
            ("0::/system.slice/a.service\n", Some("/system.slice/a.service")),
            ("9:name=systemd:/system.slice/a.service\n4:memory:/x\n0::/y\n", Some("/system.slice/a.service")),
            ("9:name=systemd:/\n4:memory:/x\n0::/y\n", Some("/y")),
            ("0::/\n", Some("/")),
            ("4:memory:/x\n", None),
            ("", None),
        ] {
            assert_eq!(cgroup_in(text).as_deref(), expected, "{text}");
        }
    }
}
