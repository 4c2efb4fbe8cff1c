//! SVIDs as TLS identities: parse them, verify a peer's, and hand rustls configurations whose certificate and roots can
//! be exchanged while connections are open.
//!
//! Standard: X509-SVID (SPIFFE), sections 2 to 5. TLS 1.3 only; no session is ever resumed, because resumption skips
//! the verification of the peer. Nothing here signs a certificate.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use base64::{Engine, engine::general_purpose::STANDARD};
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::{
    der_parser::Oid,
    prelude::{FromDer, GeneralName, X509Certificate},
};

use countersign_core::{
    canonical::Digest,
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    jws,
    signal::{Serial, Signals},
    token::Authorities,
};
use serde_json::{Value, json};

use crate::mesh;

/// What every verifier of ours leaves to the provider: the signatures of a handshake.
macro_rules! signatures_as_the_provider_verifies_them {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(message, cert, signed, &algorithms())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, cert, signed, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    };
}

mod newcomer;

pub use newcomer::newcomer_config;

/// Certificates that we read of a peer at most, leaf included: two ways from an intermediate up to an authority above, each of three, and the
/// roots that a control plane shows.
pub const CHAIN_LENGTH_MAX: usize = 12;

/// An identity with its private key, ready for TLS.
pub struct X509Svid {
    id: SpiffeId,
    not_before: i64, // seconds since 1970
    not_after: i64,  // seconds since 1970
    serial: Option<Serial>,
    host: Option<ServiceName>,
    leaf_sha256: Digest,
    certified: Arc<CertifiedKey>,
}

/// The keys that verify the SVIDs of one trust domain.
#[derive(Clone, PartialEq, Eq)]
pub struct Bundle {
    trust_domain: TrustDomain,
    sequence: u64,
    authorities: Vec<CertificateDer<'static>>,
    jwt_authorities: Vec<JwtAuthority>,
    tainted: Vec<Digest>, // of authorities
    tokens: TokenAuthorities,
}

/// Whose access tokens are believed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenAuthorities {
    /// The issuer that they name.
    pub issuer: String,
    /// What verifies them.
    pub keys: Vec<JwtAuthority>,
}

/// A key that verifies signed tokens: ECDSA P-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtAuthority {
    /// Its name, as the `kid` of a token says it.
    pub key_id: String,
    /// The uncompressed point.
    pub point: Vec<u8>,
}

/// The other end of a connection, verified. Made only from a chain that verified against a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedPeer {
    id: SpiffeId,
    not_after: i64, // seconds since 1970
    serial: Option<Serial>,
    instance: Option<InstanceId>,
    host: Option<ServiceName>,
    leaf_sha256: Digest,
}

/// `uid` of a subject (RFC 4519, 2.39): in our SVIDs the instance.
pub const UID_OID: &[u64] = &[0, 9, 2342, 19_200_300, 100, 1, 1];
/// `host` of a subject (RFC 4524, 2.9): in our SVIDs the host that it was issued to.
pub const HOST_OID: &[u64] = &[0, 9, 2342, 19_200_300, 100, 1, 9];

/// Why a chain is not the SVID of a peer we accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    /// No certificate was shown.
    #[error("no certificate was shown")]
    NoCertificate,
    /// More certificates than anyone needs.
    #[error("the chain is longer than {CHAIN_LENGTH_MAX} certificates")]
    ChainTooLong,
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// X509-SVID 2: exactly one URI SAN.
    #[error("an SVID has exactly one URI SAN, this one has {0}")]
    UriSans(usize),
    /// The URI SAN is not a SPIFFE ID of a workload.
    #[error("{0}")]
    NotASpiffeId(String),
    /// X509-SVID 4: cA is false, digitalSignature is set, keyCertSign and cRLSign are not.
    #[error("the certificate may not be used as a leaf: {0}")]
    NotALeaf(&'static str),
    /// X509-SVID 3.2: a signing certificate names the trust domain at most.
    #[error("a signing certificate of the chain names `{0}`")]
    SigningCertificateNames(String),
    /// It is of a trust domain whose bundle we do not hold.
    #[error("no bundle is held for trust domain `{0}`")]
    ForeignTrustDomain(String),
    /// The chain does not verify against the bundle.
    #[error("the chain does not verify: {0}")]
    Chain(String),
    /// It was taken back before its time.
    #[error("the certificate {0} is revoked")]
    Revoked(Serial),
    /// Whoever it is, it is not whom we wanted to reach.
    #[error("`{got}` answered where `{wanted}` was wanted")]
    SomeoneElse {
        /// Whom we wanted.
        wanted: SpiffeId,
        /// Who answered.
        got: SpiffeId,
    },
}

/// Why material cannot serve as an identity or a bundle.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// The leaf is not an SVID.
    #[error("the certificate is not an SVID")]
    Leaf(#[from] PeerRefused),
    /// The key is unreadable or not the leaf's.
    #[error("the private key cannot be used")]
    Key(#[source] rustls::Error),
    /// The bundle holds nothing to verify with.
    #[error("the bundle of `{0}` is empty")]
    EmptyBundle(String),
    /// The bundle's trust domain is none.
    #[error(transparent)]
    Name(#[from] countersign_core::identity::NameError),
}

impl X509Svid {
    /// Reads a chain (leaf first, DER) and its PKCS #8 key; the two must belong together.
    pub fn parse(chain: Vec<CertificateDer<'static>>, key_pkcs8_der: Vec<u8>) -> Result<Self, SvidError> {
        let leaf = Leaf::read(chain.first().ok_or(PeerRefused::NoCertificate)?)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key_pkcs8_der));
        let key = provider().key_provider.load_private_key(key).map_err(SvidError::Key)?;
        let certified = CertifiedKey::new(chain, key);
        certified.keys_match().map_err(SvidError::Key)?;
        Ok(Self {
            id: leaf.id,
            not_before: leaf.not_before,
            not_after: leaf.not_after,
            serial: leaf.serial,
            host: leaf.host,
            leaf_sha256: leaf.sha256,
            certified: Arc::new(certified),
        })
    }

    /// The id it proves.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// First second of validity, since 1970.
    pub fn not_before(&self) -> i64 {
        self.not_before
    }

    /// Last second of validity, since 1970.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The serial number of the leaf; `None` when it is of another authority than ours.
    pub fn serial(&self) -> Option<Serial> {
        self.serial
    }

    /// The host that it was issued to; `None` in older SVIDs.
    pub fn host(&self) -> Option<&ServiceName> {
        self.host.as_ref()
    }

    /// SHA-256 of the leaf.
    pub fn leaf_sha256(&self) -> Digest {
        self.leaf_sha256
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }
}

impl Bundle {
    /// A bundle of at least one authority.
    pub fn new(
        trust_domain: TrustDomain,
        sequence: u64,
        authorities: Vec<CertificateDer<'static>>,
    ) -> Result<Self, SvidError> {
        if authorities.is_empty() {
            return Err(SvidError::EmptyBundle(trust_domain.to_string()));
        }
        for authority in &authorities {
            webpki::anchor_from_trusted_cert(authority).map_err(|e| PeerRefused::Unreadable(e.to_string()))?;
        }
        let (jwt_authorities, tokens, tainted) = (Vec::new(), TokenAuthorities::default(), Vec::new());
        Ok(Self { trust_domain, sequence, authorities, jwt_authorities, tokens, tainted })
    }

    /// The same, with those among the authorities that nothing new is to rest on, by their SHA-256.
    pub fn with_tainted(mut self, tainted: Vec<Digest>) -> Self {
        let is_ours = |digest: &Digest| self.authorities.iter().any(|authority| Digest::of(authority) == *digest);
        self.tainted = tainted.into_iter().filter(is_ours).collect();
        self
    }

    /// The same, with keys that verify JWT-SVIDs. What is no point of P-256 verifies nothing and is left out.
    pub fn with_jwt_authorities(mut self, authorities: Vec<JwtAuthority>) -> Self {
        self.jwt_authorities = authorities.into_iter().filter(|authority| authority.key().is_some()).collect();
        self
    }

    /// The same, with what verifies access tokens.
    pub fn with_token_authorities(mut self, tokens: TokenAuthorities) -> Self {
        self.tokens = tokens;
        self
    }

    /// Reads the bundle of a message.
    pub fn from_message(message: &mesh::Bundle) -> Result<Self, SvidError> {
        let authorities = message.x509_authorities_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let read = |keys: &[mesh::JwtAuthority]| {
            keys.iter().map(|key| JwtAuthority { key_id: key.key_id.clone(), point: key.point.to_vec() }).collect()
        };
        let tokens = TokenAuthorities { issuer: message.token_issuer.clone(), keys: read(&message.token_authorities) };
        let tainted = message.tainted_sha256.iter().filter_map(|sha256| sha256[..].try_into().ok().map(Digest));
        let bundle = Self::new(TrustDomain::parse(&message.trust_domain)?, message.sequence, authorities)?;
        let bundle = bundle.with_jwt_authorities(read(&message.jwt_authorities)).with_token_authorities(tokens);
        Ok(bundle.with_tainted(tainted.collect()))
    }

    /// The message that carries it.
    pub fn to_message(&self) -> mesh::Bundle {
        let written = |keys: &[JwtAuthority]| {
            let one =
                |key: &JwtAuthority| mesh::JwtAuthority { key_id: key.key_id.clone(), point: key.point.clone().into() };
            keys.iter().map(one).collect()
        };
        mesh::Bundle {
            trust_domain: self.trust_domain.to_string(),
            sequence: self.sequence,
            x509_authorities_der: self.authorities.iter().map(|der| der.to_vec().into()).collect(),
            jwt_authorities: written(&self.jwt_authorities),
            token_issuer: self.tokens.issuer.clone(),
            token_authorities: written(&self.tokens.keys),
            tainted_sha256: self.tainted.iter().map(|digest| digest.0.to_vec().into()).collect(),
        }
    }

    /// The trust domain it speaks for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Rises when the content changes.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The root certificates.
    pub fn authorities(&self) -> &[CertificateDer<'static>] {
        &self.authorities
    }

    /// Those among them that nothing new is to rest on, by their SHA-256.
    pub fn tainted(&self) -> &[Digest] {
        &self.tainted
    }

    /// Whether `chain` (leaf first) verifies by tainted authorities alone: then it is to be replaced, and is good until it is.
    pub fn rests_on_tainted(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> bool {
        if self.tainted.is_empty() {
            return false;
        }
        let is_sound = |authority: &&CertificateDer<'static>| !self.tainted.contains(&Digest::of(authority));
        let sound = Self { authorities: self.authorities.iter().filter(is_sound).cloned().collect(), ..self.clone() };
        verify_peer(chain, self, now, PeerSide::Server).is_ok()
            && verify_peer(chain, &sound, now, PeerSide::Server).is_err()
    }

    /// The keys that verify JWT-SVIDs.
    pub fn jwt_authorities(&self) -> &[JwtAuthority] {
        &self.jwt_authorities
    }

    /// Whose access tokens are believed.
    pub fn token_authorities(&self) -> &TokenAuthorities {
        &self.tokens
    }

    /// The keys that verify JWT-SVIDs, ready to verify with.
    pub fn jwt_keys(&self) -> Vec<jws::Key> {
        self.jwt_authorities.iter().filter_map(JwtAuthority::key).collect()
    }

    /// The keys that verify JWT-SVIDs as a JWK set, and no others: what the Workload API hands out.
    pub fn jwt_jwks(&self) -> Value {
        json!({ "keys": self.jwt_authorities.iter().map(|key| key.jwk("jwt-svid")).collect::<Vec<_>>() })
    }
}

impl TokenAuthorities {
    /// As a JWK set (RFC 7517), for whoever verifies tokens.
    pub fn jwks(&self) -> Value {
        json!({ "keys": self.keys.iter().map(|key| key.jwk("sig")).collect::<Vec<_>>() })
    }

    /// The same, ready to verify with.
    pub fn ready(&self) -> Authorities {
        let keys = self.keys.iter().filter_map(JwtAuthority::key).collect();
        Authorities { issuer: self.issuer.as_str().into(), keys }
    }
}

impl JwtAuthority {
    fn key(&self) -> Option<jws::Key> {
        jws::Key::p256(&self.key_id, &self.point)
    }

    /// SPIFFE Trust Domain and Bundle, 4.2: `use` is `jwt-svid`, and there is a `kid`.
    fn jwk(&self, used: &str) -> Value {
        let (x, y) = jws::coordinates(&self.point);
        json!({ "use": used, "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": self.key_id, "x": x, "y": y })
    }
}

impl VerifiedPeer {
    /// The peer of a connection whose handshake one of our verifiers accepted; `None` when it showed no certificate,
    /// which only [`ClientCertificate::Optional`] lets through.
    pub fn of_connection(connection: &CommonState) -> Option<Self> {
        if connection.is_handshaking() {
            return None;
        }
        let leaf = Leaf::read(connection.peer_certificates()?.first()?).ok()?;
        Some(leaf.into_peer())
    }

    /// Its id.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// Last second of its SVID's validity, since 1970.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// The serial number of its SVID; `None` when it is of another authority than ours.
    pub fn serial(&self) -> Option<Serial> {
        self.serial
    }

    /// The instance that its SVID was issued for, as the authority says; `None` for whoever is none, and in older SVIDs.
    pub fn instance(&self) -> Option<&InstanceId> {
        self.instance.as_ref()
    }

    /// The host that its SVID was issued to, as the authority says.
    pub fn host(&self) -> Option<&ServiceName> {
        self.host.as_ref()
    }

    /// SHA-256 of its leaf certificate: what a token is bound to (RFC 8705, `x5t#S256`).
    pub fn leaf_sha256(&self) -> Digest {
        self.leaf_sha256
    }
}

/// Verifies a chain (leaf first) as the SVID of a peer, against the bundle of its own trust domain.
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    bundle: &Bundle,
    now: UnixTime,
    side: PeerSide,
) -> Result<VerifiedPeer, PeerRefused> {
    let (end_entity, intermediates) = chain.split_first().ok_or(PeerRefused::NoCertificate)?;
    if chain.len() > CHAIN_LENGTH_MAX {
        return Err(PeerRefused::ChainTooLong);
    }
    let leaf = Leaf::read(end_entity)?;
    // SPIFFE federation 7.3: only the bundle of the SVID's own trust domain may verify it.
    if leaf.id.trust_domain() != bundle.trust_domain.as_str() {
        return Err(PeerRefused::ForeignTrustDomain(leaf.id.trust_domain().to_owned()));
    }
    for intermediate in intermediates {
        signing_certificate(intermediate, &bundle.trust_domain)?;
    }
    let anchors: Vec<_> =
        bundle.authorities.iter().filter_map(|authority| webpki::anchor_from_trusted_cert(authority).ok()).collect();
    let usage = match side {
        PeerSide::Client => KeyUsage::client_auth(),
        PeerSide::Server => KeyUsage::server_auth(),
    };
    EndEntityCert::try_from(end_entity)
        .and_then(|cert| {
            cert.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, intermediates, now, usage, None, None)
                .map(drop)
        })
        .map_err(|e| PeerRefused::Chain(e.to_string()))?;
    Ok(leaf.into_peer())
}

/// Which end of the connection the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerSide {
    /// It opened the connection.
    Client,
    /// It accepted the connection.
    Server,
}

/// What one process is and whom it trusts, exchangeable while connections are open. New handshakes use the new
/// material; what is established stays until its owner drains it.
pub struct TlsIdentity {
    svid: ArcSwap<X509Svid>,
    bundle: ArcSwap<Bundle>,
    signals: ArcSwap<Signals>,
}

/// Whether a server insists on a client certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificate {
    /// No certificate, no connection.
    Required,
    /// A client may come without one (to enrol); one that is shown must verify.
    Optional,
}

impl TlsIdentity {
    /// An identity and the bundle it trusts.
    pub fn new(svid: X509Svid, bundle: Bundle) -> Arc<Self> {
        let (svid, bundle) = (ArcSwap::from_pointee(svid), ArcSwap::from_pointee(bundle));
        Arc::new(Self { svid, bundle, signals: ArcSwap::default() })
    }

    /// The identity in use.
    pub fn svid(&self) -> Arc<X509Svid> {
        self.svid.load_full()
    }

    /// The bundle in use.
    pub fn bundle(&self) -> Arc<Bundle> {
        self.bundle.load_full()
    }

    /// Takes a new identity into use.
    pub fn renew(&self, svid: X509Svid) {
        self.svid.store(Arc::new(svid));
    }

    /// Takes a new bundle into use.
    pub fn trust(&self, bundle: Bundle) {
        self.bundle.store(Arc::new(bundle));
    }

    /// Believes from now on no certificate that these signals say is revoked.
    pub fn heed(&self, signals: Signals) {
        self.signals.store(Arc::new(signals));
    }

    /// Verifies a chain (leaf first) as the SVID of a peer, by the bundle in use and what is revoked now.
    ///
    /// INVARIANT (revoked-proves-nothing): every handshake of every process of the mesh passes here, and what is open is asked
    /// again whenever either changes.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
        side: PeerSide,
    ) -> Result<VerifiedPeer, PeerRefused> {
        let peer = verify_peer(chain, &self.bundle.load(), now, side)?;
        match peer.serial {
            Some(serial) if self.signals.load().is_revoked(&serial) => Err(PeerRefused::Revoked(serial)),
            _ => Ok(peer),
        }
    }

    /// A server configuration that always shows the current identity and verifies with the current bundle.
    pub fn server_config(self: &Arc<Self>, clients: ClientCertificate, alpn: &[&[u8]]) -> Arc<ServerConfig> {
        self.server_config_that_shows(Arc::new(Shown(self.clone())), clients, alpn)
    }

    /// A server configuration that shows what `shown` says: a certificate that clients know it by who know no SPIFFE.
    pub fn server_config_that_shows(
        self: &Arc<Self>,
        shown: Arc<dyn ResolvesServerCert>,
        clients: ClientCertificate,
        alpn: &[&[u8]],
    ) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("INVARIANT: the provider has TLS 1.3")
            .with_client_cert_verifier(Arc::new(VerifyClient { identity: self.clone(), clients }))
            .with_cert_resolver(shown);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        Arc::new(config)
    }

    /// A client configuration that reaches `wanted` and no one else.
    pub fn client_config(self: &Arc<Self>, wanted: SpiffeId, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("INVARIANT: the provider has TLS 1.3")
            .dangerous() // rustls' word for any verifier of one's own
            .with_custom_certificate_verifier(Arc::new(VerifyServer { identity: self.clone(), wanted }))
            .with_client_cert_resolver(Arc::new(Shown(self.clone())));
        config.resumption = Resumption::disabled();
        config.enable_sni = false; // a service's name is nobody's business on the wire
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        Arc::new(config)
    }
}

/// `der` as text (RFC 7468), between the lines that say that it is a `label`.
pub fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The server name to hand rustls: our verifiers look at the SPIFFE ID and never at this.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("countersign.invalid").expect("INVARIANT: a valid DNS name")
}

/// The one TLS provider of the mesh.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::OnceLock<Arc<CryptoProvider>> = std::sync::OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

/// What a leaf says of itself; worth nothing until its chain verified.
struct Leaf {
    id: SpiffeId,
    not_before: i64,
    not_after: i64,
    serial: Option<Serial>,
    instance: Option<InstanceId>,
    host: Option<ServiceName>,
    sha256: Digest,
}

impl Leaf {
    fn read(der: &CertificateDer<'_>) -> Result<Self, PeerRefused> {
        let certificate = read(der)?;
        let uris = uri_sans(&certificate)?;
        let [uri] = uris[..] else { return Err(PeerRefused::UriSans(uris.len())) };
        let id = SpiffeId::parse(uri).map_err(|e| PeerRefused::NotASpiffeId(e.to_string()))?;
        if id.path().is_empty() {
            return Err(PeerRefused::NotASpiffeId(format!("`{id}` names a trust domain, not a workload")));
        }
        if certificate.is_ca() {
            return Err(PeerRefused::NotALeaf("it is a signing certificate (cA)"));
        }
        let usage = certificate.key_usage().map_err(|e| PeerRefused::Unreadable(e.to_string()))?;
        let usage = usage.ok_or(PeerRefused::NotALeaf("it has no key usage"))?.value;
        if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
            return Err(PeerRefused::NotALeaf("its key usage must be digitalSignature and not keyCertSign or cRLSign"));
        }
        let validity = certificate.validity();
        Ok(Self {
            id,
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            serial: Serial::from_der(certificate.raw_serial()),
            instance: named(&certificate, UID_OID).and_then(|name| InstanceId::parse(name).ok()),
            host: named(&certificate, HOST_OID).and_then(|name| ServiceName::parse(name).ok()),
            sha256: Digest::of(der),
        })
    }

    fn into_peer(self) -> VerifiedPeer {
        VerifiedPeer {
            id: self.id,
            not_after: self.not_after,
            serial: self.serial,
            instance: self.instance,
            host: self.host,
            leaf_sha256: self.sha256,
        }
    }
}

fn read<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerRefused> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(PeerRefused::Unreadable("bytes follow the certificate".into())),
        Err(e) => Err(PeerRefused::Unreadable(e.to_string())),
    }
}

/// The one attribute of the subject that has this type.
fn named<'a>(certificate: &'a X509Certificate<'_>, oid: &[u64]) -> Option<&'a str> {
    let oid = Oid::from(oid).ok()?;
    let mut found = certificate.subject().iter_by_oid(&oid);
    let one = found.next()?;
    if found.next().is_some() { None } else { one.as_str().ok() }
}

fn uri_sans<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, PeerRefused> {
    let names = certificate.subject_alternative_name().map_err(|e| PeerRefused::Unreadable(e.to_string()))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    Ok(names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect())
}

fn signing_certificate(der: &CertificateDer<'_>, own: &TrustDomain) -> Result<(), PeerRefused> {
    let certificate = read(der)?;
    match uri_sans(&certificate)?.as_slice() {
        [] => Ok(()),
        [uri] if SpiffeId::parse(uri).is_ok_and(|id| id == own.id()) => Ok(()),
        uris => Err(PeerRefused::SigningCertificateNames(uris.join("`, `"))),
    }
}

struct Shown(Arc<TlsIdentity>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.svid.load().certified.clone())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.svid.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

struct VerifyClient {
    identity: Arc<TlsIdentity>,
    clients: ClientCertificate,
}

struct VerifyServer {
    identity: Arc<TlsIdentity>,
    wanted: SpiffeId,
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

fn refused(why: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    CertificateError::Other(rustls::OtherError(Arc::new(why))).into()
}

fn with_leaf<'a>(leaf: &CertificateDer<'a>, rest: &[CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    [leaf].into_iter().chain(rest).cloned().collect()
}

impl ClientCertVerifier for VerifyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // a stranger learns nothing of our authority
    }

    fn client_auth_mandatory(&self) -> bool {
        self.clients == ClientCertificate::Required
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.identity.verify(&with_leaf(leaf, rest), now, PeerSide::Client).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures_as_the_provider_verifies_them!();
}

impl ServerCertVerifier for VerifyServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let peer = self.identity.verify(&with_leaf(leaf, rest), now, PeerSide::Server).map_err(refused)?;
        if peer.id != self.wanted {
            return Err(refused(PeerRefused::SomeoneElse { wanted: self.wanted.clone(), got: peer.id }));
        }
        Ok(ServerCertVerified::assertion())
    }

    signatures_as_the_provider_verifies_them!();
}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid").field("id", &self.id).field("key", &"..").finish_non_exhaustive()
    }
}

macro_rules! plain_debug {
    ($($name:ident)*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}
plain_debug!(Bundle TlsIdentity Shown VerifyClient VerifyServer);
