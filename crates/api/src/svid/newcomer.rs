//! How a host that has no identity yet knows the control plane: by the root certificate that its join token names. It
//! shows no certificate of its own, and whatever it says is heard by a control plane of that root alone.

use std::sync::Arc;

use countersign_core::{
    canonical::Digest,
    identity::{NameError, SpiffeId, TrustDomain},
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{Bundle, Leaf, PeerRefused, PeerSide, algorithms, provider, refused, verify_peer, with_leaf};

/// A client that accepts the control plane of one root and shows no certificate. `root_sha256` is of the root's DER.
pub fn newcomer_config(root_sha256: Digest, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("INVARIANT: the provider has TLS 1.3")
        .dangerous() // rustls' word for any verifier of one's own
        .with_custom_certificate_verifier(Arc::new(PinnedRoot { root_sha256 }))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Arc::new(config)
}

/// Accepts a chain that contains the pinned root, verifies against it alone, and names its trust domain's control plane.
#[derive(Debug)]
struct PinnedRoot {
    root_sha256: Digest,
}

/// Why the other end is not the control plane that the token names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum NotPinned {
    #[error("whoever answers there does not show the root certificate that the join token names")]
    OtherRoot,
    #[error(transparent)]
    Refused(#[from] PeerRefused),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("`{0}` answered, which is not a control plane")]
    NotControl(SpiffeId),
}

impl PinnedRoot {
    fn verify(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), NotPinned> {
        let root = chain.iter().find(|der| Digest::of(der) == self.root_sha256).ok_or(NotPinned::OtherRoot)?;
        let leaf = chain.first().ok_or(NotPinned::OtherRoot)?;
        // What the leaf claims; `verify_peer` then holds it to that.
        let trust_domain = TrustDomain::parse(Leaf::read(leaf)?.id.trust_domain())?;
        let bundle = Bundle::new(trust_domain.clone(), 0, vec![root.clone().into_owned()])
            .map_err(|e| PeerRefused::Unreadable(e.to_string()))?;
        let peer = verify_peer(chain, &bundle, now, PeerSide::Server)?;
        if *peer.id() != trust_domain.control() {
            return Err(NotPinned::NotControl(peer.id().clone()));
        }
        Ok(())
    }
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(&with_leaf(leaf, rest), now).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures_as_the_provider_verifies_them!();
}
