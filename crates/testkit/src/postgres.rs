//! A PostgreSQL server of a test's own: Debian's, in a directory below the temporary one, on a socket and on loopback. It lives as
//! long as the value, can be killed as a crash kills it, and started again on what it left.
//!
//! PostgreSQL refuses to run as root: started by root, it runs as user `postgres`.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};

/// How long a server may take to start, or to stop.
const WITHIN: Duration = Duration::from_secs(60);

/// A running server.
pub struct Server {
    dir: tempfile::TempDir,
    port: u16,
    postmaster: Option<Child>,
    is_tls: bool,
}

impl Server {
    /// Makes an empty server and starts it.
    ///
    /// # Panics
    /// When the machine has no PostgreSQL: a test that needs one must not pass without.
    pub fn start() -> Self {
        let mut server = Self::prepared();
        server.start_again();
        server
    }

    /// The same, and it takes connections by TLS only: as `localhost`, by a certificate of the root whose file is returned.
    pub fn start_with_tls() -> (Self, PathBuf) {
        let mut server = Self::prepared();
        let (data, root) = (server.dir.path().join("data"), server.dir.path().join("root.pem"));
        let key = |what: &str| KeyPair::generate().unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let authority = CertifiedIssuer::self_signed(params, key("a root")).expect("a root");
        let leaf_key = key("a server");
        let leaf = CertificateParams::new(["localhost".to_owned()]).expect("a name");
        let leaf = leaf.signed_by(&leaf_key, &authority).expect("a certificate");
        fs::write(&root, authority.pem()).expect("a file");
        for (name, text) in [("server.crt", leaf.pem()), ("server.key", leaf_key.serialize_pem())] {
            let file = data.join(name);
            fs::write(&file, text).expect("a file");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("its mode");
            if is_root() {
                let owned = Command::new("chown").arg("postgres:postgres").arg(&file).status().expect("chown runs");
                assert!(owned.success());
            }
        }
        fs::write(data.join("pg_hba.conf"), "hostssl all all 127.0.0.1/32 trust\n").expect("its rules");
        server.is_tls = true;
        server.start_again();
        (server, root)
    }

    fn prepared() -> Self {
        let dir = tempfile::Builder::new().prefix("countersign-pg").tempdir_in("/tmp").expect("a directory below /tmp");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).expect("its mode");
        let data = dir.path().join("data");
        fs::create_dir(&data).expect("a directory for its files");
        if is_root() {
            let owned = Command::new("chown").arg("postgres:postgres").arg(&data).status().expect("chown runs");
            assert!(owned.success(), "there is no user `postgres`: run scripts/test-tools");
        }
        let initdb = as_its_user(&program("initdb"))
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .expect("initdb runs");
        assert!(initdb.status.success(), "initdb failed: {}", String::from_utf8_lossy(&initdb.stderr));
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        Self { dir, port, postmaster: None, is_tls: false }
    }

    /// Where it is, for a connection as its superuser.
    pub fn url(&self) -> String {
        self.url_by(self.port)
    }

    /// The same, by way of another port of loopback: a proxy of a test.
    pub fn url_by(&self, port: u16) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/postgres")
    }

    /// The port of loopback that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills it as a crash does, with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut postmaster) = self.postmaster.take() {
            let _ = postmaster.kill();
            let _ = postmaster.wait();
            // Its processes see that it is gone and end; until then the next one would not start.
            let end = Instant::now() + WITHIN;
            while TcpStream::connect(("127.0.0.1", self.port)).is_ok() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Starts it on what is there, and waits until it answers.
    pub fn start_again(&mut self) {
        let end = Instant::now() + WITHIN;
        while Instant::now() < end {
            let mut postmaster = as_its_user(&program("postgres"))
                .arg("-D")
                .arg(self.dir.path().join("data"))
                .args([
                    "-c",
                    "listen_addresses=127.0.0.1",
                    "-c",
                    "unix_socket_directories=",
                    "-c",
                    "max_connections=50",
                ])
                .args(["-c", "shared_buffers=16MB", "-p", &self.port.to_string()])
                .args(["-c", if self.is_tls { "ssl=on" } else { "ssl=off" }])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(fs::File::create(self.log()).expect("its log"))
                .spawn()
                .expect("postgres runs");
            while Instant::now() < end {
                if postmaster.try_wait().expect("its state").is_some() {
                    // What a killed one left is still held by its last process.
                    break;
                }
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                if log.contains("database system is ready to accept connections") {
                    self.postmaster = Some(postmaster);
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = postmaster.kill();
            let _ = postmaster.wait();
            std::thread::sleep(Duration::from_millis(200));
        }
        panic!("PostgreSQL does not start: {}", fs::read_to_string(self.log()).unwrap_or_default());
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

fn as_its_user(program: &Path) -> Command {
    let mut command = match is_root() {
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL"]).arg(program);
            command
        }
        false => Command::new(program),
    };
    command.current_dir("/").env("LC_ALL", "C");
    command
}

/// The newest that Debian has installed.
fn program(name: &str) -> PathBuf {
    let installed = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = installed
        .filter_map(|version| {
            Some((version.file_name().to_str()?.parse().ok()?, version.path().join("bin").join(name)))
        })
        .filter(|(_, path)| path.exists())
        .collect();
    found.sort();
    let (_, path) = found.pop().unwrap_or_else(|| {
        panic!("no PostgreSQL is installed (`/usr/lib/postgresql/*/bin/{name}`): run scripts/test-tools")
    });
    path
}
