//! An authority whose SVIDs are good unless the test asks for a defect. Certificates are valid by the real clock: rustls
//! reads it.

use std::{sync::Arc, time::Duration};

use countersign_api::{mesh, sidecar, svid};
use countersign_core::identity::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use time::OffsetDateTime;

/// A root and the intermediate that signs.
pub struct Authority {
    trust_domain: TrustDomain,
    root: CertifiedIssuer<'static, KeyPair>,
    issuing: CertifiedIssuer<'static, KeyPair>,
}

/// What is wrong with an SVID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// Its last second has passed.
    Expired,
    /// Its first second is to come.
    NotYetValid,
    /// It names two.
    TwoUriSans,
    /// It names nobody.
    NoUriSan,
    /// It may sign others.
    CaAsLeaf,
    /// It names a workload of another trust domain.
    ForeignTrustDomain,
    /// It says nothing of what its key is for.
    NoKeyUsage,
    /// It is for servers only.
    ServerOnly,
    /// Its authority is not of the bundle.
    ForeignAuthority,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Expired,
        Self::NotYetValid,
        Self::TwoUriSans,
        Self::NoUriSan,
        Self::CaAsLeaf,
        Self::ForeignTrustDomain,
        Self::NoKeyUsage,
        Self::ServerOnly,
        Self::ForeignAuthority,
    ];
}

/// A chain, leaf first, and the key of the leaf.
pub struct Issued {
    /// DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS #8, DER.
    pub key: Vec<u8>,
}

impl Authority {
    /// A new authority for `trust_domain`.
    pub fn new(trust_domain: &str) -> Self {
        let trust_domain = TrustDomain::parse(trust_domain).unwrap();
        let root = CertifiedIssuer::self_signed(signing("root", &trust_domain), KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let issuing = CertifiedIssuer::signed_by(signing("issuing", &trust_domain), key, &root).unwrap();
        Self { trust_domain, root, issuing }
    }

    /// What verifies its SVIDs.
    pub fn bundle(&self) -> mesh::Bundle {
        svid::Bundle::new(self.trust_domain.clone(), 1, vec![self.root.der().clone()]).unwrap().to_message()
    }

    /// A good SVID for `id`.
    pub fn issue(&self, id: &SpiffeId) -> Issued {
        self.sign(leaf(id), &self.issuing)
    }

    /// The same as the agent sends it to a sidecar.
    pub fn identity(&self, id: &SpiffeId) -> sidecar::Identity {
        let issued = self.issue(id);
        sidecar::Identity {
            chain_der: issued.chain.iter().map(|der| der.to_vec().into()).collect(),
            key_pkcs8_der: issued.key.into(),
            tokens: Vec::new(),
        }
    }

    /// An SVID for `id` with one defect.
    pub fn issue_with(&self, defect: Defect, id: &SpiffeId) -> Issued {
        let mut params = leaf(id);
        match defect {
            Defect::Expired => params.not_after = from_now(-1),
            Defect::NotYetValid => params.not_before = from_now(600),
            Defect::TwoUriSans => params.subject_alt_names.push(uri("spiffe://shop.example/second")),
            Defect::NoUriSan => params.subject_alt_names.clear(),
            Defect::CaAsLeaf => params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
            Defect::ForeignTrustDomain => params.subject_alt_names = vec![uri("spiffe://other.example/web")],
            Defect::NoKeyUsage => params.key_usages.clear(),
            Defect::ServerOnly => params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth],
            Defect::ForeignAuthority => return Self::new(self.trust_domain.as_str()).issue(id),
        }
        self.sign(params, &self.issuing)
    }

    fn sign(&self, params: CertificateParams, issuer: &CertifiedIssuer<'static, KeyPair>) -> Issued {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, issuer).unwrap();
        Issued { chain: vec![leaf.der().clone(), issuer.der().clone()], key: key.serialize_der() }
    }
}

impl Issued {
    /// A TLS client that shows this and believes any server: for tests of what the server refuses.
    pub fn credulous_client(&self, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let key = PrivateKeyDer::try_from(self.key.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(svid::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_client_auth_cert(self.chain.clone(), key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }
}

#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        svid::provider().signature_verification_algorithms.supported_schemes()
    }
}

fn signing(name: &str, trust_domain: &TrustDomain) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![uri(trust_domain.id().as_str())];
    (params.not_before, params.not_after) = (from_now(-3600), from_now(86_400));
    params
}

fn leaf(id: &SpiffeId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(id.as_str())];
    (params.not_before, params.not_after) = (from_now(-600), from_now(3600));
    params
}

fn uri(given: &str) -> SanType {
    SanType::URI(given.try_into().unwrap())
}

fn from_now(seconds: i64) -> OffsetDateTime {
    let span = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { OffsetDateTime::now_utc() - span } else { OffsetDateTime::now_utc() + span }
}
