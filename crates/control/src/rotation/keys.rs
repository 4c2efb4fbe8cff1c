//! Another key that signs tokens, before its time. The next one is published long before, so nothing fails by it; a key that somebody
//! else may have is verified by nobody from then on, and what it signed is replaced.

use countersign_api::local::{KeyReplaced, Problem, ReplaceKeyAs, SigningKeys};
use countersign_core::{gate::act::Act, signal::TokensMeant};

use super::failed;
use crate::{
    Plane,
    acts::{self, By},
    audit::Event,
    local_api::{problem, store_problem},
    tokens,
};

/// Lets the next key sign, if the gate lets whoever asks.
pub async fn replace(plane: &Plane, asked: ReplaceKeyAs, by: By<'_>) -> Result<KeyReplaced, Problem> {
    let ReplaceKeyAs { keys, compromised, shown } = asked;
    let help = "apply a mesh directory first: `countersign apply DIR`";
    let authority = plane.authority().ok_or_else(|| problem(409, "there is no mesh yet", None, Some(help)))?;
    let ring = authority.signing_keys(keys);
    // What is wrong is said before a factor is used up for it.
    ring.may_replace().map_err(|refused| failed(refused.into()))?;
    let opened = acts::pass(plane, Act::RotateAuthority, by, &shown).await?;
    let by = opened.operator.map_or_else(|| "local".to_owned(), |operator| operator.to_string());
    let (key_id, replaced) = ring.replace(compromised).await.map_err(failed)?;
    tracing::warn!(by, keys = keys.as_str(), key_id, replaced, compromised, "another key signs tokens");
    plane.publisher.trust(authority.bundle().to_message());
    if let Some(identity) = &*plane.identity.borrow() {
        identity.trust(authority.bundle());
    }
    let signal = if compromised && keys == SigningKeys::Tokens {
        let reason = "the key that signed them was replaced".to_owned();
        let revoked = tokens::put_revocation(plane, TokensMeant::All, by.clone(), reason).await;
        Some(revoked.map_err(|error| store_problem(&error))?.signal)
    } else {
        None
    };
    plane.tell(Event::KeyReplaced { by, keys: keys.as_str(), key_id: key_id.clone(), compromised });
    Ok(KeyReplaced { keys, key_id, replaced, compromised, signal })
}
