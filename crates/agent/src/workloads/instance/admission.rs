//! Whether an instance may run: what its command names is measured on this host, and compared with the deployments in the
//! ledger that this host has verified itself. A control plane in other hands can neither admit an executable nor make an
//! agent forget that it has to be admitted.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use countersign_api::mesh::InstanceWaits;
use countersign_core::canonical::Digest;
use tokio::sync::watch;

use super::{Instance, Phase, said};
use crate::{
    AgentEvent, TOLD,
    artifact::{self, MeasureError, Measured},
    host::Host,
};

/// How often the files of an instance that waits are looked at: somebody may put the right ones in their place.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// As it travels.
pub(super) fn bytes(artifact: Option<Digest>) -> Bytes {
    artifact.map_or_else(Bytes::new, |artifact| Bytes::copy_from_slice(&artifact.0))
}

impl Instance {
    /// What its command names, as it travels; empty when that could not be measured.
    pub(crate) fn artifact(&self) -> Bytes {
        bytes(self.status.borrow().artifact)
    }

    /// Waits until the instance may run. False: it is stopped.
    pub(super) async fn admitted(&self, host: &Host, stop: &mut watch::Receiver<Option<Duration>>) -> bool {
        let mut revisions = host.held.revisions();
        loop {
            let measured = self.measure().await;
            if stop.borrow().is_some() {
                return false;
            }
            if self.is_admitted(host) {
                self.status.send_modify(|status| {
                    if status.phase == Phase::Waiting {
                        (status.phase, status.last_exit, status.settled) = (Phase::Starting, None, false);
                    }
                });
                return true;
            }
            self.waits(host, &measured);
            let is_as_measured = || measured.as_ref().is_ok_and(|m| m.as_ref().is_none_or(|m| m.still_holds()));
            while !self.is_admitted(host) && is_as_measured() {
                tokio::select! {
                    biased;
                    () = said(stop, Option::is_some) => return false,
                    // It cannot fail: the sender lies in `host`.
                    _ = revisions.changed() => {}
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
            }
            if measured.is_err() {
                tokio::select! {
                    biased;
                    () = said(stop, Option::is_some) => return false,
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
            }
        }
    }

    /// Returns what to start, which is admitted now. Where it is not it never returns: the instance is about to be ended. A host
    /// that knows nothing of its mesh yet waits until it does.
    pub(super) async fn admitted_to_start(&self, host: &Host) -> Option<Digest> {
        // It cannot fail: the sender lies in `host`.
        let _ = host.held.revisions().wait_for(|revision| revision.0 > 0).await;
        // What is wrong with a program that cannot be measured is said better by the attempt to start it.
        let measured = self.measure().await.ok().flatten();
        if !self.is_admitted(host) {
            std::future::pending::<()>().await;
        }
        measured.map(|measured| measured.artifact)
    }

    /// Returns when what runs, or is about to, may not.
    ///
    /// INVARIANT (only-admitted-runs): of a service with deployments nothing is started that is not one of them, and what runs
    /// is ended when it ceases to be one.
    pub(super) async fn no_longer_admitted(&self, host: &Host) {
        let (mut revisions, mut status) = (host.held.revisions(), self.watch());
        while self.is_admitted(host) {
            // Neither can fail: the senders lie in `host` and in `self`.
            tokio::select! {
                _ = revisions.changed() => {}
                _ = status.changed() => {}
            }
        }
        tracing::warn!(instance = %self.id, "what runs is no deployment of its service any more; it is ended");
    }

    fn is_admitted(&self, host: &Host) -> bool {
        let artifact = self.status.borrow().artifact;
        host.held.look(|follower| match follower.state().deployments.get(&self.spec.service) {
            Some(admitted) => artifact.is_some_and(|artifact| admitted.contains(&artifact)),
            None => true,
        })
    }

    /// What its command names, read again only when a file of it has changed. `None`: the agent starts nothing here.
    async fn measure(&self) -> Result<Option<Arc<Measured>>, MeasureError> {
        let Some(command) = self.spec.run.clone() else { return Ok(None) };
        let known = self.measured.lock().clone();
        let (dir, path) = (self.spec.dir.clone(), self.spec.env.get("PATH").map(Into::into));
        let measuring = tokio::task::spawn_blocking(move || match known {
            Some(known) if known.still_holds() => Ok(known),
            _ => {
                let path = path.or_else(|| std::env::var_os("PATH"));
                artifact::measure(&command, &dir, path.as_deref()).map(Arc::new)
            }
        });
        let measured = measuring.await.unwrap_or_else(|e| Err(MeasureError::Program(e.to_string())));
        *self.measured.lock() = measured.as_ref().ok().cloned();
        let artifact = measured.as_ref().ok().map(|measured| measured.artifact);
        self.status.send_if_modified(|status| std::mem::replace(&mut status.artifact, artifact) != artifact);
        measured.map(Some)
    }

    fn waits(&self, host: &Host, measured: &Result<Option<Arc<Measured>>, MeasureError>) {
        let artifact = measured.as_ref().ok().and_then(|measured| Some(measured.as_ref()?.artifact));
        let why = match measured {
            Ok(Some(_)) => "what its command names is no deployment of the service".to_owned(),
            Ok(None) => "the service has deployments, and what the agent does not start cannot be measured".to_owned(),
            Err(error) => format!("what its command names cannot be measured: {error}"),
        };
        self.status.send_modify(|status| {
            (status.phase, status.settled) = (Phase::Waiting, true);
            (status.pid, status.namespace_pid) = (None, None);
            status.last_exit = Some(why.clone());
        });
        let waits = InstanceWaits { instance: self.id.to_string(), artifact: bytes(artifact), reason: why.clone() };
        host.acknowledgements.waits(&self.id, waits);
        tracing::warn!(target: TOLD, instance = %self.id, ?artifact, why, "an instance waits to be admitted");
        host.tell(AgentEvent::InstanceWaits { instance: self.id.clone(), artifact, why });
    }
}
