//! The socket for processes that the agent did not start: each is attested by its selectors, and is the service whose registration in the
//! ledger they meet. Every user who reaches the socket may ask on it, so nothing that one of them can do keeps the others from it for long.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use countersign_api::local::ProcessView;
use countersign_core::{
    change::Revision,
    identity::{InstanceId, ServiceName},
    registration::{Selector, service_of},
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tonic::Status;

use crate::{
    host::Host,
    workload_api::{ATTEST_EVERY, Door, attest::Observed, has_identity, material::Material, peer::Peer},
};

/// Longest path of a unix socket, in bytes (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Connections of one user at the same time at most.
const CONNECTIONS_PER_USER_MAX: usize = 64;
/// Processes with an identity at the same time at most.
const PROCESSES_MAX: usize = 1024;
/// Programs that are read at the same time, of one user one, and how long that may take.
const OBSERVING_MAX: usize = 4;
const OBSERVED_WITHIN: Duration = Duration::from_secs(10);
/// Refused processes that are told, each once in so long: as many as an operator reads.
const REFUSED_MAX: usize = 64;
const REFUSED_FOR: Duration = Duration::from_secs(600);

/// Who may come through the socket of the whole host.
pub(crate) struct Registered {
    host: Arc<Host>,
    observing: Arc<Semaphore>,
    /// One for each user whose processes are looked at, or wait for it.
    turns: Mutex<BTreeMap<u32, Arc<Semaphore>>>,
    /// By number and beginning.
    earned: Mutex<BTreeMap<(u32, u64), Earned>>,
    refused: Mutex<BTreeMap<BTreeSet<Selector>, Refused>>,
}

/// A process that is a service.
struct Earned {
    peer: Arc<Peer>,
    instance: InstanceId,
    material: Arc<Material>,
}

/// A process that is none.
struct Refused {
    pid: u32,
    at: Instant,
}

/// Makes the socket at `path`, for every user: who reaches it, its directory says. It appears under its name only when it is ready.
pub(crate) fn bind(path: &Path) -> io::Result<OwnedFd> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mode = std::fs::metadata(dir)?.mode();
    // Where everybody may rename files, everybody may put a socket of their own in its place; not so in a directory with the sticky bit.
    if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        let what = format!("others may write to `{}`, and would put another socket in its place", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent answers there"));
    }
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o666))?;
    std::fs::rename(&new, path)?;
    Ok(listener.into())
}

impl Registered {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        let observing = Arc::new(Semaphore::new(OBSERVING_MAX));
        Self { host, observing, turns: Mutex::default(), earned: Mutex::default(), refused: Mutex::default() }
    }

    /// Who brings large programs keeps their own user waiting.
    fn turn_of(&self, uid: u32) -> Arc<Semaphore> {
        let mut turns = self.turns.lock();
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(uid).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
    }

    /// Takes identities from processes that ended, or are not what they were, until dropped.
    pub(crate) async fn sweep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(ATTEST_EVERY).await;
            let had: Vec<_> = {
                let earned = self.earned.lock();
                earned.iter().map(|(key, one)| (*key, one.peer.clone(), one.instance.clone())).collect()
            };
            for (key, peer, instance) in had.into_iter().filter(|(_, peer, instance)| !self.is_still(peer, instance)) {
                let mut earned = self.earned.lock();
                // It may have earned another meanwhile.
                if earned.get(&key).is_some_and(|one| one.instance == instance) {
                    earned.remove(&key);
                    tracing::info!(%instance, pid = peer.pid(), "a process has no identity any more");
                    self.host.acknowledgements.ended(&instance, "it ended, or is registered no more");
                }
            }
        }
    }

    fn is_still(&self, peer: &Peer, instance: &InstanceId) -> bool {
        let observed = peer.observed.get().filter(|observed| observed.still_holds(peer));
        observed.is_some_and(|observed| self.service(observed).is_ok_and(|is| is == Some(instance.service())))
    }

    /// The service that a process is now. Denied, when that has no identity.
    fn service(&self, observed: &Observed) -> Result<Option<ServiceName>, Status> {
        self.host.held.look(|follower| match service_of(follower.state(), observed.selectors(), &self.host.name) {
            Some(service) => has_identity(follower, service).map(|()| Some(service.clone())),
            None if follower.revision() == Revision(0) => {
                Err(Status::unavailable("this host does not know its mesh yet; ask again"))
            }
            None => Ok(None),
        })
    }

    /// The identities of a process that is `service`. Every process has a key of its own, and another when it executes another program.
    fn earn(&self, peer: &Arc<Peer>, observed: &Observed, service: &ServiceName) -> Result<Arc<Material>, Status> {
        let mut earned = self.earned.lock();
        let key = (peer.pid(), observed.started());
        let is_same = |known: &Peer| known.observed.get().is_some_and(|before| before.still_holds(known));
        if let Some(known) = earned.get(&key)
            && known.instance.service() == *service
            && (Arc::ptr_eq(&known.peer, peer) || is_same(&known.peer))
        {
            return Ok(known.material.clone());
        }
        if earned.len() >= PROCESSES_MAX && !earned.contains_key(&key) {
            return Err(Status::unavailable(format!("{PROCESSES_MAX} processes of this host have identities already")));
        }
        let instance = InstanceId::new(service, &format!("p{}-{:08x}", peer.pid(), fastrand::u32(..)));
        let program = observed.digest().map_or_else(Bytes::new, |digest| Bytes::copy_from_slice(&digest.0));
        let material = Arc::new(Material::new(self.host.clone(), instance.clone(), move || program.clone()));
        tracing::info!(%instance, pid = peer.pid(), selectors = told(observed.selectors()), "a process earned an identity");
        let one = Earned { peer: peer.clone(), instance, material: material.clone() };
        if let Some(before) = earned.insert(key, one) {
            self.host.acknowledgements.ended(&before.instance, "it is another program now");
        }
        Ok(material)
    }

    /// Says once what would have to be registered.
    fn refuse(&self, peer: &Peer, observed: &Observed) {
        let mut refused = self.refused.lock();
        refused.retain(|_, refused| refused.at.elapsed() < REFUSED_FOR);
        if refused.len() < REFUSED_MAX && !refused.contains_key(observed.selectors()) {
            let (pid, selectors) = (peer.pid(), told(observed.selectors()));
            tracing::info!(pid, selectors, "a process that no service registers asked for an identity");
            refused.insert(observed.selectors().clone(), Refused { pid, at: Instant::now() });
        }
    }

    /// The processes that have an identity, and those that were refused one lately, as `GET /v1/processes` shows them.
    pub(crate) fn views(&self) -> Vec<ProcessView> {
        let earned = self.earned.lock();
        let have = earned.values().filter_map(|one| {
            let selectors = one.peer.observed.get()?.selectors().clone();
            Some(ProcessView { pid: one.peer.pid(), instance: Some(one.instance.clone()), selectors })
        });
        let refused = self.refused.lock();
        let have_not = refused
            .iter()
            .filter(|(_, one)| one.at.elapsed() < REFUSED_FOR)
            .map(|(selectors, one)| ProcessView { pid: one.pid, instance: None, selectors: selectors.clone() });
        have.chain(have_not).collect()
    }
}

#[tonic::async_trait]
impl Door for Registered {
    fn connections_per_user_max(&self) -> usize {
        CONNECTIONS_PER_USER_MAX
    }

    async fn meet(&self, peer: &Arc<Peer>) {
        let (peer, own, all) = (peer.clone(), self.turn_of(peer.uid()), self.observing.clone());
        let observe = async {
            let turns = (own.acquire_owned().await.ok()?, all.acquire_owned().await.ok()?);
            let observe = move || {
                let _turns = turns;
                match Observed::of(&peer) {
                    Ok(observed) => drop(peer.observed.set(observed)),
                    Err(error) => tracing::info!(pid = peer.pid(), %error, "what a process is cannot be told"),
                }
            };
            tokio::task::spawn_blocking(observe).await.ok()
        };
        // Who takes longer has no identity.
        let _ = tokio::time::timeout(OBSERVED_WITHIN, observe).await;
    }

    /// INVARIANT (attested-by-selectors): of processes that the agent did not start only one whose selectors, read of the kernel when it
    /// connected and unchanged since, meet a registration in the verified ledger has the identity of that service.
    fn admit(&self, peer: &Arc<Peer>) -> Result<Arc<Material>, Status> {
        let denied = |what: &str| Err(Status::permission_denied(what));
        let Some(observed) = peer.observed.get() else {
            return denied("what this process is could not be told; connect again");
        };
        if !observed.still_holds(peer) {
            return denied("this process is not what it was when it connected; connect again");
        }
        if self.host.launched(peer) {
            return denied(
                "the agent started this process: the socket that it may ask on is in SPIFFE_ENDPOINT_SOCKET",
            );
        }
        match self.service(observed)? {
            Some(service) => self.earn(peer, observed, &service),
            None => {
                self.refuse(peer, observed);
                denied("no service of this mesh registers this process; the agent's log says what it is known by")
            }
        }
    }
}

fn told(selectors: &BTreeSet<Selector>) -> String {
    selectors.iter().map(|selector| format!("\"{selector}\"")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_for_everybody_who_reaches_it_and_lies_where_nobody_else_can_put_another() {
        let outer = tempfile::tempdir().unwrap();
        for (mode, expected) in [(0o700, true), (0o755, true), (0o1777, true), (0o777, false), (0o775, false)] {
            let dir = outer.path().join(format!("{mode:o}"));
            std::fs::create_dir(&dir).unwrap();
            std::fs::set_permissions(&dir, PermissionsExt::from_mode(mode)).unwrap();
            let path = dir.join("workload.sock");
            let bound = bind(&path);
            assert_eq!(bound.is_ok(), expected, "{mode:o}: {bound:?}");
            if bound.is_ok() {
                assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
                assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse, "another one is there");
                drop(bound);
                bind(&path).expect("what one that ended has left is replaced");
            }
        }
    }
}
