//! Accepted to Peer: the mutual TLS handshake. A [`Peer`] is made only from a connection whose certificate chain was
//! verified, so whoever holds one knows who is at the other end. What cannot prove itself gets nothing, not even a word.

use std::{
    cell::RefCell,
    net::IpAddr,
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use countersign_api::svid::{PeerSide, VerifiedPeer};
use countersign_core::{identity::SpiffeId, signal::statement::Subject, token::Thumbprint};
use http::HeaderValue;
use rustls::CommonState;
use rustls_pki_types::{CertificateDer, UnixTime};
use smallvec::SmallVec;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{accept::Accepted, authenticate::Known, shared::Shared, workers::Doubts};

/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what is open may go on after the SVID it rests on expired. Nothing new begins on it by then.
pub(crate) const EXPIRED_DRAIN: Duration = Duration::from_secs(5);

/// INVARIANT (verified-peer): made only by [`identify`].
pub(crate) struct Peer {
    proof: Proof,
    origin: IpAddr,
    caller_header: HeaderValue,
    subjects: SmallVec<[Subject; 3]>, // what signals say something of, if they do of it
    pub(crate) known_token: RefCell<Option<Known>>,
}

/// The certificates by which the other end of a connection proved who it is. What is open on the connection rests on
/// them, and ends with them.
pub(crate) struct Proof {
    verified: VerifiedPeer,
    chain: Vec<CertificateDer<'static>>,
    side: PeerSide,
}

/// Shakes hands, as `own`. `None`: the other end did not prove who it is in time.
pub(crate) async fn identify(
    accepted: Accepted,
    acceptor: &TlsAcceptor,
    own: &SpiffeId,
) -> Option<(TlsStream<TcpStream>, Rc<Peer>)> {
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
    let proof = Proof::of_connection(stream.get_ref().1, PeerSide::Client)?;
    let caller_header = HeaderValue::from_str(proof.verified.id().as_str()).ok()?;
    let (origin, subjects, known_token) = (from.ip(), proof.subjects(own), RefCell::default());
    Some((stream, Rc::new(Peer { proof, origin, caller_header, subjects, known_token })))
}

impl Peer {
    /// Its SPIFFE ID.
    pub(crate) fn id(&self) -> &SpiffeId {
        self.proof.verified.id()
    }

    /// Where its connection comes from.
    pub(crate) fn origin(&self) -> IpAddr {
        self.origin
    }

    /// What signals can be about, of all that it is: its service, its instance and its host.
    pub(crate) fn subjects(&self) -> &[Subject] {
        &self.subjects
    }

    /// Its SPIFFE ID as a header.
    pub(crate) fn caller_header(&self) -> HeaderValue {
        self.caller_header.clone()
    }

    /// By what it proved that.
    pub(crate) fn proof(&self) -> &Proof {
        &self.proof
    }
}

impl Proof {
    /// Of a connection whose handshake is done: the other end is `side` of it.
    pub(crate) fn of_connection(connection: &CommonState, side: PeerSide) -> Option<Self> {
        let verified = VerifiedPeer::of_connection(connection)?;
        Some(Self { verified, chain: connection.peer_certificates()?.to_vec(), side })
    }

    /// What the authority of our own trust domain says that it is; nothing of anybody else's word counts.
    fn subjects(&self, own: &SpiffeId) -> SmallVec<[Subject; 3]> {
        let verified = &self.verified;
        if verified.id().trust_domain() != own.trust_domain() {
            return SmallVec::new();
        }
        let workload = verified.id().service().map(Subject::Workload);
        let instance = verified.instance().cloned().map(Subject::Instance);
        let host = verified.host().cloned().map(Subject::Host);
        [workload, instance, host].into_iter().flatten().collect()
    }

    /// SHA-256 of the certificate: what tokens of this connection are bound to.
    pub(crate) fn certificate(&self) -> Thumbprint {
        Thumbprint(self.verified.leaf_sha256().0)
    }

    /// How long the SVID is still valid.
    pub(crate) fn valid_for(&self) -> Duration {
        let until = UNIX_EPOCH + Duration::from_secs(self.verified.not_after().max(0) as u64);
        until.duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// INVARIANT (nothing-outlives-its-proof): both ends of every connection between sidecars wait for this, and end it.
    ///
    /// Returns once the proof holds no more: the SVID expired [`EXPIRED_DRAIN`] ago, it was revoked, or a bundle does not verify it
    /// any more. `doubts` was made before the handshake, so that nothing is missed.
    pub(crate) async fn lost(&self, shared: &Shared, mut doubts: Doubts) {
        if self.is_revoked(shared) {
            return;
        }
        let expired = tokio::time::sleep(self.valid_for() + EXPIRED_DRAIN);
        let mut expired = std::pin::pin!(expired);
        loop {
            tokio::select! {
                () = &mut expired => return,
                changed = doubts.trust.changed() => if changed.is_err() || !self.holds(shared) {
                    return;
                },
                changed = doubts.signals.changed() => if changed.is_err() || self.is_revoked(shared) {
                    tracing::warn!(peer = %self.verified.id(), "a connection ends: its peer's SVID is revoked");
                    return;
                },
            }
        }
    }

    /// Whether the SVID was taken back before its time.
    pub(crate) fn is_revoked(&self, shared: &Shared) -> bool {
        self.verified.serial().is_some_and(|serial| shared.signals().is_revoked(&serial))
    }

    fn holds(&self, shared: &Shared) -> bool {
        let Some(identity) = shared.identity() else { return false };
        match identity.verify(&self.chain, UnixTime::now(), self.side) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(peer = %self.verified.id(), %error, "a connection ends: its peer is proven no longer");
                false
            }
        }
    }
}
