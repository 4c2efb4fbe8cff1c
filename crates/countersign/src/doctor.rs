//! `doctor`: what the mesh needs of this machine, one line each, and what to do where something is missing. Changes
//! nothing.

use std::{
    env, fs, io,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use countersign_agent::isolate;
use countersign_api::{
    local::Status,
    run_file::{AGENT_SOCKET, CONTROL_SOCKET},
};

use crate::{
    cli::{self, Global},
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    render::{self, Paint},
    status,
};

/// A clock that is this far from a file it just wrote, or from the control plane, is wrong.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(5);
/// The first moment at which this version can run: a clock before it is wrong.
const EARLIEST_MS: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z
/// Descriptors a busy sidecar needs.
const DESCRIPTORS_WANTED: u64 = 4096;
/// Free space below which a ledger is at risk, in bytes.
const SPACE_BYTES_WANTED: u64 = 256 * 1024 * 1024;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Serialize)]
struct Check {
    grade: Grade,
    what: &'static str,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    todo: Option<String>,
}

/// Checks everything; fails when a check does.
pub fn doctor(global: &Global) -> Done {
    let place = cli::here(global);
    // What is kept from workloads is the data directory; before there is one, any directory shows whether that works.
    let kept = place.as_ref().ok().map(|place| place.data_dir.clone()).filter(|dir| dir.is_dir());
    let namespaces = user_namespaces(&kept.unwrap_or_else(env::temp_dir))?;
    let mut checks = vec![kernel(), namespaces, clock(), loopback(), descriptors(), python()];
    match place {
        Ok(place) => {
            checks.push(mesh_directory(&place));
            checks.extend(data_directory(&place));
            checks.extend(sockets(&place));
            checks.extend(cli::ask(async { Ok(running(&place).await) })?);
        }
        Err(failure) => checks.push(Check {
            grade: Grade::Warn,
            what: "mesh",
            found: failure.to_string(),
            todo: Some("run this in a mesh directory, or with `-C DIR`, to have it checked too".to_owned()),
        }),
    }
    render::answer(global.output, &checks, |checks, paint| text(checks, paint))?;
    match checks.iter().filter(|check| check.grade == Grade::Fail).count() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} checks failed")).help("what to do stands below each of them")),
    }
}

fn text(checks: &[Check], paint: Paint) -> String {
    let mut text = String::new();
    for check in checks {
        let grade = match check.grade {
            Grade::Ok => paint.good("ok  "),
            Grade::Warn => paint.warn("warn"),
            Grade::Fail => paint.bad("fail"),
        };
        text.push_str(&format!("{grade} {:<16} {}\n", check.what, render::tame(&check.found)));
        if let Some(todo) = &check.todo {
            text.push_str(&format!("     {:<16} {} {todo}\n", "", paint.note("help:")));
        }
    }
    text
}

fn ok(what: &'static str, found: impl Into<String>) -> Check {
    Check { grade: Grade::Ok, what, found: found.into(), todo: None }
}

fn warn(what: &'static str, found: impl Into<String>, todo: &str) -> Check {
    Check { grade: Grade::Warn, what, found: found.into(), todo: Some(todo.to_owned()) }
}

fn fail(what: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Check {
    Check { grade: Grade::Fail, what, found: found.into(), todo: Some(todo.into()) }
}

fn kernel() -> Check {
    let about = rustix::system::uname();
    let release = about.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version {
        (major, minor) if (major, minor) >= (5, 13) => ok("kernel", release),
        _ => warn(
            "kernel",
            format!("{release}: it has no Landlock"),
            "workloads can read the data directory; a kernel from 5.13 on keeps them out",
        ),
    }
}

fn user_namespaces(data_dir: &Path) -> Result<Check, Failure> {
    const WHAT: &str = "user namespaces";
    let isolation = cli::ask(async { Ok(isolate::probe(Path::new("/proc/self/exe"), data_dir).await) })?;
    Ok(match (isolation.available, isolation.note) {
        (true, note) if note.is_empty() => ok(WHAT, "each workload gets its own user and network namespace"),
        (true, note) => ok(WHAT, format!("each workload gets its own user and network namespace; {note}")),
        (false, note) => warn(WHAT, note, "until then the workloads of one uid are not separated from each other"),
    })
}

fn clock() -> Check {
    const WHAT: &str = "clock";
    let todo = "set the clock (`timedatectl set-ntp true`): identities live for an hour and a wrong clock refuses them";
    let now_ms = render::now_ms();
    if now_ms < EARLIEST_MS {
        return fail(WHAT, format!("it says {}", render::moment_full(now_ms)), todo);
    }
    ok(WHAT, render::moment_full(now_ms))
}

fn loopback() -> Check {
    const WHAT: &str = "ports";
    let bound: io::Result<Vec<TcpListener>> = (0..8).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    match bound {
        Ok(_) => ok(WHAT, "127.0.0.1 gives free ports"),
        Err(e) => fail(
            WHAT,
            format!("could not listen on 127.0.0.1: {e}"),
            "free some ports, or widen `net.ipv4.ip_local_port_range`",
        ),
    }
}

fn descriptors() -> Check {
    const WHAT: &str = "descriptors";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(limit) if limit < DESCRIPTORS_WANTED => {
            warn(WHAT, format!("at most {limit} open files"), "raise it before `up`: `ulimit -n 65536`")
        }
        limit => ok(WHAT, limit.map_or_else(|| "no limit".to_owned(), |limit| format!("at most {limit} open files"))),
    }
}

fn python() -> Check {
    let python = env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .map(|dir| dir.join("python3"))
        .find(|path| path.is_file());
    match python {
        Some(path) => ok("python3", path.display().to_string()),
        None => warn("python3", "not in PATH", "only the examples need it: `apt-get install python3`"),
    }
}

fn mesh_directory(place: &Place) -> Check {
    match &place.dir {
        Some(dir) => ok("mesh directory", dir.display().to_string()),
        None => warn("mesh directory", "not named, only a data directory", "name it with `-C DIR` to plan and apply"),
    }
}

fn data_directory(place: &Place) -> Vec<Check> {
    const WHAT: &str = "data directory";
    let shown = place.data_dir.display();
    let about = match fs::metadata(&place.data_dir) {
        Ok(about) => about,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return vec![ok(WHAT, format!("{shown} will be created by `up`"))];
        }
        Err(e) => {
            return vec![fail(
                WHAT,
                format!("{shown}: {e}"),
                "give its owner access, or name another with `--data-dir`",
            )];
        }
    };
    let mut checks = Vec::new();
    let own = rustix::process::getuid().as_raw();
    checks.push(if about.uid() != own {
        fail(WHAT, format!("{shown} belongs to uid {}, you are uid {own}", about.uid()), "run this as its owner")
    } else if about.mode() & 0o077 != 0 {
        fail(
            WHAT,
            format!("{shown} is open to others: mode {:o}", about.mode() & 0o777),
            format!("`chmod 700 {shown}`"),
        )
    } else {
        ok(WHAT, format!("{shown}, for its owner only"))
    });
    checks.push(writable(&place.data_dir));
    checks.extend(keys(&place.data_dir));
    checks
}

fn writable(data_dir: &Path) -> Check {
    const WHAT: &str = "disk";
    let probe = data_dir.join(format!(".doctor-{}", std::process::id()));
    let written = fs::write(&probe, b"?").and_then(|()| fs::metadata(&probe)).and_then(|about| about.modified());
    let _ = fs::remove_file(&probe);
    let todo = "the ledger must be able to grow: make room, or mount it writable";
    match written {
        Err(e) => return fail(WHAT, format!("could not write to {}: {e}", data_dir.display()), todo),
        Ok(at) if SystemTime::now().duration_since(at).unwrap_or_default() > CLOCK_SKEW_MAX => {
            return warn(WHAT, "its clock differs from this machine's", "set both clocks");
        }
        Ok(_) => {}
    }
    match rustix::fs::statvfs(data_dir).map(|about| about.f_bavail.saturating_mul(about.f_frsize)) {
        Ok(free) if free < SPACE_BYTES_WANTED => warn(WHAT, format!("{} MB free", free / 1_000_000), todo),
        Ok(free) => ok(WHAT, format!("{} MB free", free / 1_000_000)),
        Err(e) => warn(WHAT, e.to_string(), todo),
    }
}

/// The directory already keeps others out; a key that is open all the same was copied or restored carelessly.
fn keys(data_dir: &Path) -> Vec<Check> {
    let files = fs::read_dir(data_dir.join("keys")).into_iter().flatten().flatten();
    let open = files.filter(|file| file.metadata().is_ok_and(|about| about.is_file() && about.mode() & 0o077 != 0));
    open.map(|file| {
        let path = file.path();
        fail("permissions", format!("{} is open to others", path.display()), format!("`chmod 600 {}`", path.display()))
    })
    .collect()
}

fn sockets(place: &Place) -> Vec<Check> {
    let running = place.run_file().is_some_and(|run| Path::new(&format!("/proc/{}", run.pid)).exists());
    let left = [CONTROL_SOCKET, AGENT_SOCKET].into_iter().filter(|name| place.data_dir.join(name).exists());
    let left: Vec<_> =
        left.filter(|name| std::os::unix::net::UnixStream::connect(place.data_dir.join(name)).is_err()).collect();
    let mut checks: Vec<_> = left
        .iter()
        .map(|name| {
            warn(
                "sockets",
                format!("nothing listens at {name}"),
                "it was left behind by a mesh that was killed; the next `up` replaces it",
            )
        })
        .collect();
    if !running && place.run_file().is_some() {
        checks.push(warn("run.json", "it names a mesh that is gone", "the next `up` replaces it"));
    }
    // A path longer than this cannot be a socket's address (sun_path).
    let longest = place.data_dir.join(CONTROL_SOCKET).as_os_str().len();
    if longest > 107 {
        checks.push(fail(
            "sockets",
            format!("the data directory's path is {longest} bytes long"),
            "name a shorter one with `--data-dir`: sockets allow 107",
        ));
    }
    checks
}

async fn running(place: &Place) -> Vec<Check> {
    let status: Status = match Client::control(place).get("/v1/status").await {
        Ok(status) => status,
        Err(failure) => {
            return vec![warn("control plane", failure.to_string(), "start the mesh with `countersign up`")];
        }
    };
    let own = env!("CARGO_PKG_VERSION");
    let mut checks = vec![if status.version == own {
        ok("control plane", format!("version {own}, revision {}", status.revision))
    } else {
        warn(
            "control plane",
            format!("version {}, this command is {own}", status.version),
            "restart the mesh, or use its version",
        )
    }];
    for host in &status.hosts {
        let found =
            format!("{} {}, version {}", host.host, if host.connected { "connected" } else { "away" }, host.version);
        checks.push(match (host.connected, host.version == own) {
            (false, _) => warn("host", found, "start its agent, or see why it cannot reach the control plane"),
            (true, false) => warn("host", found, "its agent has another version: restart it with this one"),
            (true, true) if host.isolation != "namespace" => {
                warn("host", format!("{found}: {}", status::NOT_SEPARATED), &host.isolation_note)
            }
            (true, true) => ok("host", found),
        });
    }
    checks.extend(status.warnings.iter().map(|warning| warn("control plane", warning, "see `countersign status`")));
    checks
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_data_directory_open_to_others_fails_with_the_command_that_closes_it() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let place = Place { dir: None, data_dir: root.path().to_path_buf(), dashboard: None };
        let checks = data_directory(&place);
        assert_eq!(checks[0].grade, Grade::Fail);
        assert!(checks[0].todo.as_ref().unwrap().starts_with("`chmod 700 "));
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(data_directory(&place).iter().all(|check| check.grade == Grade::Ok));
    }

    #[test]
    fn a_key_that_others_can_read_fails() {
        let root = tempfile::tempdir().unwrap();
        let key = root.path().join("keys/kek");
        fs::create_dir(root.path().join("keys")).unwrap();
        fs::write(&key, "").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(keys(root.path())[0].grade, Grade::Fail);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(keys(root.path()).is_empty());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_found_before_it_hurts() {
        let place = Place { dir: None, data_dir: Path::new("/tmp").join("x".repeat(120)), dashboard: None };
        assert!(sockets(&place).iter().any(|check| check.grade == Grade::Fail));
    }
}
