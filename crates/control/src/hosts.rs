//! A host that is part of the mesh no longer: what it proved itself by is good for nothing, what it ran is found by nobody, and it comes back
//! by a new invitation alone. An operator does that; and a join token does that is shown a second time, to the host that came by it first.

use serde::{Deserialize, Serialize};

use countersign_api::local::{EvictAs, Evicted, IdentityFilter, Problem, RevokedBy};
use countersign_core::{canonical::Digest, gate::act::Act, identity::ServiceName};

use crate::{
    Plane,
    acts::{self, By},
    audit::{self, Event},
    enrol::INVITATION_LIFETIME_MAX,
    identities,
    local_api::{problem, store_problem},
    store::{Document, StoreError},
};

/// The kind of the documents that say which host came by a join token.
const JOINED_KIND: &str = "joined";
/// Of how many tokens that is remembered.
const JOINED_MAX: u32 = 16_384;
/// Who does what nobody asked for.
const BY_ITSELF: &str = "the join token";

/// Who came by a join token.
#[derive(Serialize, Deserialize)]
pub(crate) struct Joined {
    pub host: ServiceName,
    /// SHA-256 of the public key that it proved to have.
    pub key: Digest,
}

/// Puts a host out, if the gate lets whoever asks.
pub async fn evict(plane: &Plane, asked: EvictAs, by: By<'_>) -> Result<Evicted, Problem> {
    let EvictAs { host, reason, shown } = asked;
    acts::is_a_reason(&reason)?;
    let is_known = plane.publisher.hosts().iter().any(|known| known.host == host);
    if !is_known && of_host(plane, &host).await.map_err(|error| store_problem(&error))? == 0 {
        let help = "`countersign host list` shows those that are there";
        return Err(problem(404, format!("no host `{host}` is known"), None, Some(help)));
    }
    let opened = acts::pass(plane, Act::EvictHost, by, &shown).await?;
    let by = opened.operator.map_or_else(|| "local".to_owned(), |operator| operator.to_string());
    evict_now(plane, &host, by, reason).await
}

async fn of_host(plane: &Plane, host: &ServiceName) -> Result<usize, StoreError> {
    let own = IdentityFilter { host: Some(host.clone()), ..IdentityFilter::default() };
    Ok(identities::list(plane, own).await?.len())
}

/// The order matters: nothing of it is told of any more, then nothing that it proves itself by is believed, which ends its stream.
async fn evict_now(plane: &Plane, host: &ServiceName, by: String, reason: String) -> Result<Evicted, Problem> {
    let why = format!("evicted by {by}: {reason}");
    let instances = plane.publisher.registry(|registry| registry.evict(host, &why));
    let now_ms = plane.clock.now_ms();
    plane.publisher.sweep(now_ms);
    let own = IdentityFilter { host: Some(host.clone()), ..IdentityFilter::default() };
    let has_any = of_host(plane, host).await.map_err(|error| store_problem(&error))? > 0;
    let (signal, identities) = match has_any {
        true => {
            let revoked =
                identities::revoke_now(plane, own, RevokedBy { at_ms: now_ms, by: by.clone(), reason: reason.clone() })
                    .await?;
            (Some(revoked.signal), revoked.identities.len())
        }
        false => (None, 0),
    };
    tracing::warn!(by, reason, %host, identities, instances = instances.len(), "a host was evicted");
    plane.tell(Event::HostEvicted { by, reason: audit::cut(reason), host: host.to_string(), identities });
    Ok(Evicted { host: host.clone(), signal, identities, instances })
}

/// Remembers who came by a token, for as long as it could be shown again.
pub(crate) async fn came_by(plane: &Plane, token: &Digest, joined: &Joined) -> Result<(), StoreError> {
    let now_ms = plane.clock.now_ms();
    let document = Document {
        kind: JOINED_KIND,
        key: token.to_string(),
        bytes: serde_json::to_vec(joined).expect("INVARIANT: it is plain JSON"),
        expires_at_ms: now_ms + INVITATION_LIFETIME_MAX.as_millis() as u64,
    };
    plane.storage.run("joined", move |store| store.put_document(&document, now_ms, JOINED_MAX).map(drop)).await
}

/// A join token was shown that was used before, by somebody who has another key: one of the two is not who was invited, and nobody knows which.
/// So the host that came by it is put out. Names it, if it is known.
///
/// INVARIANT (interception-is-evident): of what was issued for a join token that two parties showed, nothing stays good.
pub(crate) async fn shown_twice(plane: &Plane, token: &Digest, key: Digest) -> Result<Option<ServiceName>, Problem> {
    let (name, now_ms) = (token.to_string(), plane.clock.now_ms());
    let found = plane.storage.run("joined", move |store| store.document(JOINED_KIND, &name, now_ms)).await;
    let found = found.map_err(|error| store_problem(&error))?;
    let joined = found.and_then(|bytes| serde_json::from_slice::<Joined>(&bytes).ok());
    // Whoever has the same key asks again because it did not hear the answer.
    let Some(Joined { host, .. }) = joined.filter(|joined| joined.key != key) else { return Ok(None) };
    let reason = "its join token was shown a second time, by somebody else".to_owned();
    evict_now(plane, &host, BY_ITSELF.to_owned(), reason).await?;
    Ok(Some(host))
}
