//! Several control planes on one store: each takes up what the others wrote and says which agents follow it, and what their
//! proxies enforce as soon as they say so. A notice of the database only wakes; what its tables hold counts, and they are looked
//! at every second without one.
//!
//! Writes nothing to the ledger, and decides nothing about an agent that is connected here.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::Instant};

use crate::{
    Plane, error_chain, identities,
    ledger::AppendError,
    publish::Elsewhere,
    rotation,
    store::{
        Store, StoreError,
        postgres::{PostgresUrl, Wakes, listen},
    },
};

/// How often the store is looked at when nothing wakes.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Notices come in bunches: what came within this time is looked at once.
const GATHER: Duration = Duration::from_millis(5);
/// A control plane that has not said for so long that it runs does not.
pub(crate) const ALIVE_MS: u64 = 5_000;
const SYNC_APART: Duration = Duration::from_millis(250);

/// A name for this run of this control plane.
pub(crate) fn name() -> String {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).expect("INVARIANT: the system's random source does not fail");
    hex::encode(bytes)
}

/// Follows the store for as long as the control plane lives.
pub(crate) async fn follow(plane: Arc<Plane>, url: PostgresUrl) {
    let ((written, mut writes), (acknowledged, mut acknowledgements)) = (mpsc::channel(1), mpsc::channel(1));
    tokio::spawn(listen(url, Wakes { replica: plane.replica.clone(), written, acknowledged }));
    let mut shared_at = Instant::now();
    let mut look_at = Instant::now() + LOOK_EVERY;
    loop {
        tokio::select! {
            Some(()) = acknowledgements.recv() => {
                // In this task, so that what was read earlier is taken in earlier.
                if let Err(error) = read_acknowledgements(&plane).await {
                    tracing::warn!(%error, "what proxies of other control planes acknowledged could not be read");
                }
                continue;
            }
            _ = tokio::time::timeout_at(look_at, writes.recv()) => {}
        }
        look_at = Instant::now() + LOOK_EVERY;
        tokio::time::sleep(GATHER).await;
        let before = plane.ledger.head().follower.revision();
        let caught_up = plane.ledger.catch_up().await;
        if plane.ledger.head().follower.revision() > before {
            plane.mark().await;
        }
        match caught_up {
            Ok(()) => plane.note("store", None),
            Err(error) => {
                match error {
                    AppendError::Forked(_) => tracing::error!(%error, "the store is not followed any more"),
                    _ => tracing::warn!(error = %error_chain(&error), "the store could not be read"),
                }
                plane.note("store", Some(error_chain(&error)));
                continue;
            }
        }
        if let Err(error) = identities::catch_up(&plane).await {
            tracing::warn!(%error, "what other control planes revoked could not be read");
        }
        let created = plane.ledger.head().follower.state().trust_domain.clone();
        if let (None, Some(trust_domain)) = (plane.authority(), created)
            && let Err(error) = plane.begin_authority(&trust_domain).await
        {
            plane.note("authority", Some(format!("the authority could not be opened: {}", error_chain(&error))));
        }
        if let Some(authority) = plane.authority()
            && let Err(error) = authority.catch_up().await
        {
            tracing::warn!(error = %error_chain(&error), "the roots of the trust domain could not be read");
        }
        if Instant::now() >= shared_at {
            shared_at = Instant::now() + SYNC_APART;
            if let Err(error) = share(&plane).await {
                tracing::warn!(%error, "what other control planes know could not be read");
            }
        } else {
            look_at = shared_at;
        }
    }
}

/// Writes down what proxies acknowledge as soon as they do. One write is under way at a time; what comes meanwhile goes together
/// with the next, so that a thousand agents that acknowledge at once make few. One that is lost is found when the tables are
/// looked at.
pub(crate) async fn write_acknowledgements(plane: Arc<Plane>) {
    loop {
        plane.publisher.acknowledged().await;
        let (publisher, replica) = (plane.publisher.clone(), plane.replica.clone());
        let put = move |store: &mut dyn Store| match &publisher.unwritten_acknowledgements()[..] {
            [] => Ok(()),
            given => store.put_acknowledgements(&replica, given),
        };
        if let Err(error) = plane.storage.run("put_acknowledgements", put).await {
            tracing::warn!(%error, "what proxies acknowledged could not be written down");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn read_acknowledgements(plane: &Plane) -> Result<(), StoreError> {
    let replica = plane.replica.clone();
    let read = plane.storage.run("acknowledgements", move |store| store.acknowledgements(&replica));
    plane.publisher.acknowledged_elsewhere(read.await?);
    Ok(())
}

/// Says that this one runs, and takes in what the others say of their agents.
pub(crate) async fn share(plane: &Plane) -> Result<(), StoreError> {
    let replica = plane.replica.clone();
    let others = plane.storage.run("replicas", move |store| {
        let alive = store.beat(&replica, ALIVE_MS)?.into_iter().collect();
        let (instances, hosts, entitlements) = (store.instances()?, store.hosts()?, store.entitlements()?);
        Ok(Elsewhere { alive, instances, hosts, entitlements })
    });
    let others = others.await?;
    plane.publisher.elsewhere(&plane.replica, others, plane.clock.now_ms());
    rotation::say_who_lacks(plane).await?;
    plane.write_instances().await
}
