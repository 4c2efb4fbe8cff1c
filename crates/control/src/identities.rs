//! The X.509-SVIDs that were issued and have not expired: which there are, and taking them back before their time. A revocation is a
//! signal: durable, numbered, told to every agent at once, and known to every control plane of the store.
//!
//! INVARIANT (revocation-is-durable): a revocation is told to agents, and answered, only when the store has it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use countersign_api::local::{IdentityFilter, IdentityView, Problem, RevokeAs, Revoked, RevokedBy};
use countersign_core::{
    gate::act::Act,
    identity::{InstanceId, ServiceName},
    signal::{Revocation, Signal, SignalSeq},
};

use crate::{
    Plane,
    acts::{self, By},
    audit::{self, Event},
    local_api::{problem, store_problem},
    registry::Registry,
    store::{IssuedSerial, Store, StoreError, StoredSignal},
    tokens,
};

/// Certificates that may be revoked at the same time. Every proxy holds all of them; more are revoked by their authority.
pub const REVOKED_MAX: u32 = 65_536;
/// Identities that one question is answered with at most.
pub const IDENTITIES_MAX: u32 = 10_000;
/// How long instances that ended gather before what they were issued is revoked together.
const GATHER: Duration = Duration::from_millis(5);
/// When it is tried again after the store failed.
const RETRY: Duration = Duration::from_secs(1);
/// Identities that the audit trail names of those that were revoked together.
const NAMES_TOLD: usize = 16;

/// Takes in the signals that are in the store and not known yet.
pub async fn catch_up(plane: &Plane) -> Result<(), StoreError> {
    let held = plane.publisher.signals().sequence();
    let new = plane.storage.run("signals", move |store| store.signals(held)).await?;
    take_in(plane, &new);
    Ok(())
}

/// Tells everybody, this process first: from now on nobody is let in by what is revoked.
fn take_in(plane: &Plane, new: &[StoredSignal]) {
    let signals = plane.publisher.signal(new, plane.clock.now_ms());
    plane.gate.heed(signals.clone());
    if let Some(identity) = &*plane.identity.borrow() {
        let is_our_own = identity.svid().serial().is_some_and(|serial| signals.is_revoked(&serial));
        identity.heed(signals);
        if is_our_own {
            plane.renew_now.notify_one();
        }
    }
}

/// Those that `filter` means, the newest first.
pub async fn list(plane: &Plane, filter: IdentityFilter) -> Result<Vec<IdentityView>, StoreError> {
    let now_ms = plane.clock.now_ms();
    plane.storage.run("serials", move |store| views(store, &filter, now_ms, IDENTITIES_MAX)).await
}

/// Makes those that are meant good for nothing, if the gate lets whoever asks.
pub async fn revoke(plane: &Plane, asked: RevokeAs, by: By<'_>) -> Result<Revoked, Problem> {
    let RevokeAs { identities, reason, shown } = asked;
    if identities.is_everything() {
        let help =
            "say which: `--serial`, `--id`, `--instance`, `--host` or `--key`; `countersign identity list` shows them";
        return Err(problem(422, "nothing says which identities are meant", None, Some(help)));
    }
    acts::is_a_reason(&reason)?;
    let stored = |error: StoreError| store_problem(&error);
    // Looked at before a factor is used up for nothing.
    if list(plane, identities.clone()).await.map_err(stored)?.is_empty() {
        let help = "`countersign identity list` shows those that have not expired";
        return Err(problem(404, "no identity that has not expired is meant", None, Some(help)));
    }
    let opened = acts::pass(plane, Act::RevokeIdentity, by, &shown).await?;
    let actor = opened.operator.map_or_else(|| "local".to_owned(), |operator| operator.to_string());
    revoke_now(plane, identities, RevokedBy { at_ms: plane.clock.now_ms(), by: actor, reason }).await
}

/// The same, past the gate: of those who were let through, and of what is taken back by itself.
pub(crate) async fn revoke_now(plane: &Plane, identities: IdentityFilter, by: RevokedBy) -> Result<Revoked, Problem> {
    let stored = |error: StoreError| store_problem(&error);
    let mut known = 0;
    let revoked = loop {
        let (meant_by, by) = (identities.clone(), by.clone());
        let put = move |store: &mut dyn Store| {
            // One more than there is room for shows that there is none.
            let meant = store.serials(&meant_by, by.at_ms, REVOKED_MAX + 1)?;
            let revocation = |one: &IssuedSerial| Revocation { serial: one.serial, expires_at_ms: one.expires_at_ms };
            let revocations: Vec<_> = meant.iter().map(revocation).collect();
            let Some(signal) = store.put_revocations(&revocations, &by, REVOKED_MAX)? else { return Ok(None) };
            Ok(Some(Revoked { signal, identities: views(store, &meant_by, by.at_ms, REVOKED_MAX)? }))
        };
        let Some(revoked) = plane.storage.run("put_revocations", put).await.map_err(stored)? else {
            let what = format!("more than {REVOKED_MAX} identities would be revoked at the same time");
            let help = "revoke fewer, or wait until some of the revoked ones have expired";
            return Err(problem(422, what, None, Some(help)));
        };
        catch_up(plane).await.map_err(stored)?;
        // What was being signed meanwhile, for an agent that is cut by now, is meant as well.
        if revoked.identities.len() == known || identities.host.is_none() {
            break revoked;
        }
        known = revoked.identities.len();
    };
    plane.metrics.revoked.inc_by(revoked.identities.len() as u64);
    let (signal, count) = (revoked.signal.0, revoked.identities.len());
    tracing::warn!(by = by.by, reason = by.reason, signal, count, meant = ?identities, "identities were revoked");
    let names = revoked.identities.iter().take(NAMES_TOLD).map(|one| one.id.to_string()).collect();
    let (by, reason) = (by.by.clone(), audit::cut(by.reason.as_str()));
    plane.tell(Event::Revoked { by, reason, signal, count, names });
    Ok(revoked)
}

/// Revokes what was issued to instances that run no more, for as long as the control plane runs.
///
/// INVARIANT (issued-to-what-runs): an instance that ended, that nothing admits any more or that its agent speaks of no more has no
/// identity and no token.
pub async fn follow_instances(plane: Arc<Plane>) {
    loop {
        plane.publisher.ended().await;
        tokio::time::sleep(GATHER).await;
        let ended = plane.publisher.registry(Registry::take_ended);
        if let Err(error) = retire(&plane, &ended).await {
            tracing::warn!(%error, "what was issued to instances that ended could not be revoked; it is tried again");
            tokio::time::sleep(RETRY).await;
            plane.publisher.registry(|registry| registry.keep_ended(ended));
        }
    }
}

async fn retire(plane: &Plane, ended: &BTreeSet<(ServiceName, InstanceId)>) -> Result<(), StoreError> {
    let by = RevokedBy {
        at_ms: plane.clock.now_ms(),
        by: "countersign".to_owned(),
        reason: "its instance ended".to_owned(),
    };
    for (host, instance) in ended {
        tokens::retire(plane, host, instance).await?;
    }
    let (meant, written) = (ended.clone(), by.clone());
    let put = move |store: &mut dyn Store| {
        let mut issued = Vec::new();
        for (host, instance) in meant {
            let of = IdentityFilter { host: Some(host), instance: Some(instance), ..IdentityFilter::default() };
            issued.extend(store.serials(&of, written.at_ms, REVOKED_MAX)?);
        }
        if issued.is_empty() {
            return Ok(None);
        }
        let revocation = |one: &IssuedSerial| Revocation { serial: one.serial, expires_at_ms: one.expires_at_ms };
        let revocations: Vec<_> = issued.iter().map(revocation).collect();
        Ok(Some((store.put_revocations(&revocations, &written, REVOKED_MAX)?, issued)))
    };
    let Some((signal, issued)) = plane.storage.run("put_revocations", put).await? else { return Ok(()) };
    let count = issued.len();
    let Some(signal) = signal else {
        tracing::warn!(
            count,
            "more than {REVOKED_MAX} identities would be revoked; those of instances that ended stay until they expire"
        );
        return Ok(());
    };
    catch_up(plane).await?;
    plane.metrics.revoked.inc_by(count as u64);
    tracing::info!(signal = signal.0, count, "identities of instances that ended were revoked");
    let names = issued.iter().take(NAMES_TOLD).map(|one| one.id.to_string()).collect();
    plane.tell(Event::Revoked { by: by.by, reason: by.reason, signal: signal.0, count, names });
    Ok(())
}

fn views(
    store: &mut dyn Store,
    filter: &IdentityFilter,
    now_ms: u64,
    limit: u32,
) -> Result<Vec<IdentityView>, StoreError> {
    let issued = store.serials(filter, now_ms, limit)?;
    let signals = store.signals(SignalSeq(0))?;
    let of_certificate = |one: StoredSignal| match one.signal {
        Signal::Certificate(revoked) => Some((revoked.serial, one.by)),
        Signal::Tokens(_) | Signal::Stated(_) => None,
    };
    let revoked: HashMap<_, _> = signals.into_iter().filter_map(of_certificate).collect();
    let view = |one: IssuedSerial| IdentityView {
        serial: one.serial,
        id: one.id,
        instance: one.instance,
        host: one.host,
        key: one.key,
        issued_at_ms: one.issued_at_ms,
        expires_at_ms: one.expires_at_ms,
        authority: one.authority,
        revoked: revoked.get(&one.serial).cloned(),
    };
    Ok(issued.into_iter().map(view).collect())
}
