//! The identities of one instance, for the instance itself: an X.509-SVID with a key of its own, kept fresh once somebody asked for it,
//! and JWT-SVIDs, each asked for again when half its life is over. Its sidecar has an identity beside these, and shares no key with it.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use countersign_core::identity::{InstanceId, SpiffeId};
use parking_lot::Mutex;
use tokio::{sync::watch, task::AbortHandle};
use tonic::Status;

use crate::{
    host::Host,
    identity::{self, IssueError},
    join::Issued,
};

/// JWT-SVIDs that are remembered for one instance at the same time.
const JWTS_MAX: usize = 64;

/// What is known of an X.509-SVID.
#[derive(Clone)]
pub(crate) enum X509 {
    /// It was asked for.
    Sought,
    /// Control does not issue it.
    Refused(String),
    /// It may be used until it expires.
    Held(Arc<Issued>),
}

/// The identities of one instance.
pub(crate) struct Material {
    host: Arc<Host>,
    instance: InstanceId,
    artifact: Box<dyn Fn() -> Bytes + Send + Sync>,
    x509: watch::Sender<X509>,
    keeper: Mutex<Option<AbortHandle>>,
    jwts: Mutex<HashMap<Vec<String>, Jwt>>,
}

struct Jwt {
    token: String,
    renew_at_ms: u64,
}

impl Material {
    /// Nothing was asked for yet. `artifact` tells what the instance runs, as control wants to hear it.
    pub(crate) fn new(
        host: Arc<Host>,
        instance: InstanceId,
        artifact: impl Fn() -> Bytes + Send + Sync + 'static,
    ) -> Self {
        Self {
            host,
            instance,
            artifact: Box::new(artifact),
            x509: watch::Sender::new(X509::Sought),
            keeper: Mutex::default(),
            jwts: Mutex::default(),
        }
    }

    /// Who it is.
    pub(crate) fn id(&self) -> SpiffeId {
        self.host.trust_domain.workload(&self.instance.service())
    }

    /// Its X.509-SVID, now and whenever it changes. The first who asks sets off that it is issued and renewed.
    pub(crate) fn x509(self: &Arc<Self>) -> watch::Receiver<X509> {
        let mut keeper = self.keeper.lock();
        if keeper.is_none() {
            let weak = Arc::downgrade(self);
            let (host, instance) = (self.host.clone(), self.instance.clone());
            let artifact = {
                let weak = weak.clone();
                move || weak.upgrade().map(|material| (material.artifact)()).unwrap_or_default()
            };
            let told = move |issued: Result<Issued, &IssueError>| {
                let Some(material) = weak.upgrade() else { return };
                match issued {
                    Ok(issued) => _ = material.x509.send_replace(X509::Held(Arc::new(issued))),
                    Err(IssueError::Refused(why)) => _ = material.x509.send_replace(X509::Refused(why.clone())),
                    // What is held is good until it expires.
                    Err(_) => {}
                }
            };
            let task = tokio::spawn(identity::keep_fresh(host, instance, artifact, told));
            *keeper = Some(task.abort_handle());
        }
        self.x509.subscribe()
    }

    /// A JWT-SVID for `audience` with at least half its life before it.
    pub(crate) async fn jwt(&self, audience: Vec<String>) -> Result<String, Status> {
        let now_ms = identity::now().as_secs() * 1000;
        if let Some(jwt) = self.jwts.lock().get(&audience).filter(|jwt| now_ms < jwt.renew_at_ms) {
            return Ok(jwt.token.clone());
        }
        let issued = identity::issue_jwt(&self.host, &self.instance, audience.clone(), (self.artifact)()).await;
        let issued = issued.map_err(|error| match error {
            IssueError::Refused(why) => Status::permission_denied(why),
            other => Status::unavailable(other.to_string()),
        })?;
        let renew_at_ms = issued.issued_at_ms + issued.expires_at_ms.saturating_sub(issued.issued_at_ms) / 2;
        let mut jwts = self.jwts.lock();
        jwts.retain(|_, jwt| now_ms < jwt.renew_at_ms);
        if jwts.len() < JWTS_MAX {
            jwts.insert(audience, Jwt { token: issued.token.clone(), renew_at_ms });
        }
        Ok(issued.token)
    }
}

impl Drop for Material {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.lock().take() {
            keeper.abort();
        }
    }
}
