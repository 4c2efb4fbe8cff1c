//! Peer to Caller: from whom this request is. Today the verified peer is the caller: no token travels with a request yet.

use std::rc::Rc;

use crate::identify::Peer;

/// Made only by [`authenticate`], from a verified peer.
pub(crate) struct Caller(Rc<Peer>);

/// Says from whom a request is.
pub(crate) fn authenticate(peer: &Rc<Peer>) -> Caller {
    Caller(peer.clone())
}

impl Caller {
    pub(crate) fn peer(&self) -> &Rc<Peer> {
        &self.0
    }
}
