//! Accepted to Peer: the mutual TLS handshake. A [`Peer`] is made only from a connection whose certificate chain was
//! verified, so whoever holds one knows who is at the other end. What cannot prove itself gets nothing, not even a word.

use std::{
    net::IpAddr,
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use countersign_api::svid::VerifiedPeer;
use countersign_core::identity::SpiffeId;
use http::HeaderValue;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::accept::Accepted;

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// INVARIANT (verified-peer): made only by [`identify`].
pub(crate) struct Peer {
    verified: VerifiedPeer,
    origin: IpAddr,
    caller_header: HeaderValue,
}

/// Shakes hands. `None`: the other end did not prove who it is in time.
pub(crate) async fn identify(accepted: Accepted, acceptor: &TlsAcceptor) -> Option<(TlsStream<TcpStream>, Rc<Peer>)> {
    let (stream, from) = accepted.into_parts();
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::info!(%from, error = %error, "peer refused");
            return None;
        }
        Err(_) => {
            tracing::info!(%from, "peer refused: the handshake took too long");
            return None;
        }
    };
    let verified = VerifiedPeer::of_connection(stream.get_ref().1)?;
    let caller_header = HeaderValue::from_str(verified.id().as_str()).ok()?;
    Some((stream, Rc::new(Peer { verified, origin: from.ip(), caller_header })))
}

impl Peer {
    /// Its SPIFFE ID.
    pub(crate) fn id(&self) -> &SpiffeId {
        self.verified.id()
    }

    /// Where its connection comes from.
    pub(crate) fn origin(&self) -> IpAddr {
        self.origin
    }

    /// Its SPIFFE ID as a header.
    pub(crate) fn caller_header(&self) -> HeaderValue {
        self.caller_header.clone()
    }

    /// How long its SVID is still valid.
    pub(crate) fn valid_for(&self) -> Duration {
        let until = UNIX_EPOCH + Duration::from_secs(self.verified.not_after().max(0) as u64);
        until.duration_since(SystemTime::now()).unwrap_or_default()
    }
}
