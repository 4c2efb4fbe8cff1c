//! Who may ask for the identities of a workload that this agent launched: its own processes, by that launch. Neither the path nor the
//! hash of a program earns anything here: an interpreter runs everybody's code.

use std::{io, os::fd::OwnedFd, os::unix::net::UnixListener, path::PathBuf, sync::Arc};

use tonic::Status;

use super::Instance;
use crate::{
    host::Host,
    isolate::{Launcher, WORKLOAD_SOCKET},
    keep,
    workload_api::{self, Door, material::Material, peer::Peer, registered::SOCKET_PATH_BYTES_MAX},
};

/// One life of a launcher, and all that descends from it.
struct Launched {
    host: Arc<Host>,
    instance: Arc<Instance>,
    launcher: u32,
    /// The mount namespace of an isolated workload.
    mounts: Option<u64>,
    material: Arc<Material>,
}

impl Door for Launched {
    /// INVARIANT (attested-by-launch): only a process that lives in the mounts of this launch, or descends from its launcher, has the
    /// identity of the instance; and only while its service is declared and not suspended.
    fn admit(&self, peer: &Arc<Peer>) -> Result<Arc<Material>, Status> {
        let is_ours = match self.mounts {
            Some(mounts) => peer.lives_in_mounts(mounts),
            None => peer.descends_from(self.launcher),
        };
        if !is_ours {
            return Err(Status::permission_denied("this process is not of the workload that the agent launched here"));
        }
        self.host.held.look(|follower| workload_api::has_identity(follower, &self.instance.spec.service))?;
        Ok(self.material.clone())
    }
}

impl Instance {
    /// Where its workload finds the Workload API; none where a socket cannot be had.
    pub(super) fn workload_socket(&self, host: &Host) -> Option<PathBuf> {
        let path = match self.isolated {
            true => host.data_dir.canonicalize().ok()?.join(WORKLOAD_SOCKET),
            false => {
                let dir = std::path::absolute(&host.dir).ok()?;
                dir.join(format!("{}-{}.sock", self.spec.service, self.slot))
            }
        };
        (path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX).then_some(path)
    }

    /// Serves the processes of `launcher` until dropped.
    pub(super) async fn serve_identities(self: Arc<Self>, host: Arc<Host>, launcher: LaunchedBy) {
        let LaunchedBy { pid, mounts, listener } = launcher;
        let listener = match listener.map_or_else(|| self.listen(&host), Ok) {
            Ok(listener) => listener,
            Err(error) => {
                return tracing::warn!(instance = %self.id, %error, "a workload cannot ask for identities");
            }
        };
        let of = self.clone();
        let material = Arc::new(Material::new(host.clone(), self.id.clone(), move || of.artifact()));
        let door = Launched { host: host.clone(), instance: self, launcher: pid, mounts, material };
        workload_api::serve(listener, host, Arc::new(door)).await;
    }

    /// The socket of a workload that is not isolated, in the agent's own directory.
    fn listen(&self, host: &Host) -> io::Result<OwnedFd> {
        let path = self.workload_socket(host).ok_or_else(|| io::Error::other("the path of its socket is too long"))?;
        path.parent().map_or(Ok(()), keep::directory)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(UnixListener::bind(&path)?.into())
    }
}

/// What one launcher brought.
pub(super) struct LaunchedBy {
    pid: u32,
    mounts: Option<u64>,
    listener: Option<OwnedFd>,
}

impl LaunchedBy {
    /// Takes it from `launcher`; nothing where an isolated one has no socket.
    pub(super) fn take(launcher: &mut Launcher) -> Option<Self> {
        let listener = launcher.workload_api.take();
        let has_way = listener.is_some() || launcher.mounts.is_none();
        has_way.then_some(Self { pid: launcher.pid, mounts: launcher.mounts, listener })
    }
}
