//! Peer to Caller: from whom this request is. Today the verified peer is the caller: no token travels with a request yet.

use std::rc::Rc;

use crate::{answer::Refusal, identify::Peer, shared::Shared};

/// Made only by [`authenticate`], from a verified peer.
pub(crate) struct Caller(Rc<Peer>);

/// Says from whom a request is. A peer whose SVID was revoked since its handshake is nobody.
pub(crate) fn authenticate(shared: &Shared, peer: &Rc<Peer>) -> Result<Caller, Refusal> {
    if peer.proof().is_revoked(shared) {
        return Err(Refusal::Unproven);
    }
    Ok(Caller(peer.clone()))
}

impl Caller {
    pub(crate) fn peer(&self) -> &Rc<Peer> {
        &self.0
    }
}
