//! The only room that signs. Two levels of ECDSA P-256: a root for ten years, which signs nothing but intermediates, and
//! an intermediate for ninety days, which signs SVIDs. Their private keys lie sealed in the store; the root's is opened
//! only to sign an intermediate and erased again. Beside them an Ed25519 key that signs the checkpoints of the ledger.
//!
//! Who may have which SVID is decided by whoever calls; here a name becomes a certificate that keeps to X509-SVID: one
//! URI SAN, `cA` false, digitalSignature only, both usages (sections 2, 4.1, 4.3, 4.4); signing certificates name the
//! trust domain without a path (3.2) and carry no name constraints.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::RwLock;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use countersign_api::{
    local::{AuthorityView, CertificateView},
    mesh,
    svid::{Bundle, SvidError, TlsIdentity, X509Svid, pem},
};
use countersign_core::{
    canonical::Digest,
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    signal::Serial,
};

use crate::{
    clock::Clock,
    store::{IssuedSerial, Storage, Store, StoreError},
};

pub mod jwt_key;
pub mod log_key;
pub mod note_key;
pub mod seal;

use jwt_key::{JWT_KEYS, JwtKeys, SignedJwtSvid};
use log_key::{LOG_KEY, LOG_SIGNED, LogKey};
use seal::{Sealer, Unopened};

/// How long an SVID lives.
pub const SVID_LIFETIME: Duration = Duration::from_secs(60 * 60);
const ROOT_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
const ISSUING_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// The intermediate is replaced when it has less than this left: every SVID it signed ends long before it.
const ISSUING_OVERLAP: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How far the clocks of two hosts may differ before a fresh certificate looks not yet valid.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// Longest signing request we read, in bytes.
const CSR_BYTES_MAX: usize = 8 * 1024;

const ROOT_CERTIFICATE: &str = "authority/root/certificate";
const ROOT_KEY: &str = "authority/root/key";
const ISSUING_CERTIFICATE: &str = "authority/issuing/certificate";
const ISSUING_KEY: &str = "authority/issuing/key";

/// The authority of one trust domain.
pub struct Authority {
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    issuing: RwLock<Arc<Issuing>>,
    jwt: JwtKeys,
    log: LogKey,
    sealer: Arc<Sealer>,
    storage: Storage,
    clock: Clock,
}

/// The intermediate that signs now.
struct Issuing {
    certificate: CertificateDer<'static>,
    not_after_ms: u64,
    issuer: Issuer<'static, KeyPair>,
}

/// A public key whose holder proved that it has the private one.
pub struct SigningRequest(rcgen::PublicKey);

/// A signed SVID, as it travels.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// Why the authority cannot work.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The store failed.
    #[error("the authority's keys could not be read or written")]
    Store(#[from] StoreError),
    /// A sealed key does not open.
    #[error(transparent)]
    Sealed(#[from] Unopened),
    /// What is stored is incomplete or unreadable.
    #[error("the authority's stored keys do not fit together: {0}")]
    Damaged(String),
    /// The stored authority speaks for another trust domain.
    #[error("the authority in the store speaks for `{stored}`, not for `{wanted}`")]
    OtherTrustDomain {
        /// Whose keys are stored.
        stored: TrustDomain,
        /// Whose were asked for.
        wanted: TrustDomain,
    },
    /// The signing request is none.
    #[error("the signing request is refused: {0}")]
    Request(&'static str),
    /// A certificate could not be made.
    #[error("a certificate could not be made")]
    Sign(#[from] rcgen::Error),
    /// What was made is no SVID: a bug of this room.
    #[error("the signed certificate is no SVID")]
    Svid(#[from] SvidError),
}

impl SigningRequest {
    /// Reads a PKCS #10 request and verifies its signature. Only its key is used: what it asks to be called is not read.
    pub fn parse(der: &[u8]) -> Result<Self, AuthorityError> {
        if der.len() > CSR_BYTES_MAX {
            return Err(AuthorityError::Request("it is longer than 8 KiB"));
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
            .map_err(|_| AuthorityError::Request("it is no PKCS #10 request, or its signature does not verify"))?;
        let key = request.public_key;
        // An uncompressed point of P-256 has 65 bytes; the signature algorithm alone does not tell the curve.
        if key.algorithm() != &PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != 65 {
            return Err(AuthorityError::Request("its key is not ECDSA P-256 with SHA-256"));
        }
        Ok(Self(key))
    }
}

impl Authority {
    /// Opens the stored authority, if there is one.
    pub async fn open(storage: Storage, sealer: Arc<Sealer>, clock: Clock) -> Result<Option<Self>, AuthorityError> {
        let read = |store: &mut dyn Store| store.keys(&[ROOT_CERTIFICATE, ISSUING_CERTIFICATE, ISSUING_KEY]);
        let stored = storage.run("authority_keys", read).await?;
        let [root, issuing, key] = match <[_; 3]>::try_from(stored) {
            Ok([None, None, None]) => return Ok(None),
            Ok([Some(root), Some(issuing), Some(key)]) => [root, issuing, key],
            _ => return Err(AuthorityError::Damaged("one of them is missing".into())),
        };
        let root = CertificateDer::from(root);
        let trust_domain = trust_domain_of(&root)?;
        let issuing = Arc::new(Issuing::open(&sealer, CertificateDer::from(issuing), &key)?);
        let log = match LogKey::open(&trust_domain, storage.clone(), sealer.clone()).await? {
            Some(log) => log,
            None => LogKey::create(&trust_domain, storage.clone(), sealer.clone()).await?,
        };
        let jwt = JwtKeys::open(storage.clone(), sealer.clone(), clock.clone()).await?;
        let authority = Self { trust_domain, root, issuing: RwLock::new(issuing), jwt, log, sealer, storage, clock };
        authority.rotate().await?;
        Ok(Some(authority))
    }

    /// Makes the authority of a new mesh: both levels and the log's key, stored at once. `None` when another control plane made
    /// one first.
    ///
    /// INVARIANT (one-authority): of several control planes that make it at the same time, one does, and whole.
    pub async fn create(
        trust_domain: TrustDomain,
        storage: Storage,
        sealer: Arc<Sealer>,
        clock: Clock,
    ) -> Result<Option<Self>, AuthorityError> {
        let now_ms = clock.now_ms();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let params = signing_params(&trust_domain, "root", BasicConstraints::Constrained(1), now_ms, ROOT_LIFETIME);
        let root = params.self_signed(&key)?.der().clone();
        let root_key = serialized(&key);
        let root_issuer = Issuer::from_ca_cert_der(&root, key)?;
        let (issuing, issuing_key) = Issuing::create(&trust_domain, &root_issuer, now_ms)?;
        let seals = sealer.clone();
        let (root_der, issuing_der) = (root.to_vec(), issuing.certificate.to_vec());
        let (log, log_secret) = LogKey::make(&trust_domain, storage.clone(), sealer.clone());
        let made = storage
            .run("authority_keys", move |store| {
                let [log_key, nothing_signed] = log_secret.seal(&seals)?;
                store.create_keys(&[
                    (LOG_KEY, &log_key),
                    (LOG_SIGNED, &nothing_signed),
                    (ROOT_CERTIFICATE, &root_der),
                    (ROOT_KEY, &seals.seal(ROOT_KEY, &root_key)?),
                    (ISSUING_CERTIFICATE, &issuing_der),
                    (ISSUING_KEY, &seals.seal(ISSUING_KEY, &issuing_key)?),
                    (JWT_KEYS, &jwt_key::first(&seals, now_ms)?),
                ])
            })
            .await?;
        if !made {
            return Ok(None);
        }
        let issuing = RwLock::new(Arc::new(issuing));
        let jwt = JwtKeys::open(storage.clone(), sealer.clone(), clock.clone()).await?;
        Ok(Some(Self { trust_domain, root, issuing, jwt, log, sealer, storage, clock }))
    }

    /// The trust domain it speaks for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The key that signs the ledger's checkpoints.
    pub fn log(&self) -> &LogKey {
        &self.log
    }

    /// SHA-256 of the root certificate: what a join token lets an agent recognise us by.
    pub fn root_sha256(&self) -> Digest {
        Digest::of(&self.root)
    }

    /// The keys that verify this trust domain's SVIDs.
    pub fn bundle(&self) -> Bundle {
        Bundle::new(self.trust_domain.clone(), self.jwt.sequence(), vec![self.root.clone()])
            .expect("INVARIANT: the root was read as a signing certificate when the authority opened")
            .with_jwt_authorities(self.jwt.authorities())
    }

    /// Replaces what nears its end: the intermediate, and the key that signs JWT-SVIDs. What the old ones signed stays valid until it
    /// expires. Whether anything was replaced.
    pub async fn rotate(&self) -> Result<bool, AuthorityError> {
        let (issuing, jwt) = (self.rotate_issuing().await?, self.jwt.rotate().await?);
        Ok(issuing || jwt)
    }

    async fn rotate_issuing(&self) -> Result<bool, AuthorityError> {
        let now_ms = self.clock.now_ms();
        if self.issuing.read().not_after_ms > now_ms + ISSUING_OVERLAP.as_millis() as u64 {
            return Ok(false);
        }
        let seen = self.issuing.read().certificate.to_vec();
        if self.reload(&seen).await? {
            return Ok(true);
        }
        let sealed = self.storage.run("authority_keys", |store| store.key(ROOT_KEY)).await?;
        let sealed = sealed.ok_or_else(|| AuthorityError::Damaged("the root's key is missing".into()))?;
        let root_issuer = Issuer::from_ca_cert_der(&self.root, open_key(&self.sealer, ROOT_KEY, &sealed)?)?;
        let (issuing, issuing_key) = Issuing::create(&self.trust_domain, &root_issuer, now_ms)?;
        let (certificate, seals, before) = (issuing.certificate.to_vec(), self.sealer.clone(), seen.clone());
        let swapped = self
            .storage
            .run("authority_keys", move |store| {
                let sealed = seals.seal(ISSUING_KEY, &issuing_key)?;
                let keys = [(ISSUING_CERTIFICATE, &certificate[..]), (ISSUING_KEY, &sealed)];
                store.swap_key(ISSUING_CERTIFICATE, &before, &keys)
            })
            .await?;
        if swapped {
            *self.issuing.write() = Arc::new(issuing);
            return Ok(true);
        }
        self.reload(&seen).await
    }

    /// Takes the intermediate that another control plane put in the place of `seen`; false when none did.
    async fn reload(&self, seen: &[u8]) -> Result<bool, AuthorityError> {
        let read = |store: &mut dyn Store| store.keys(&[ISSUING_CERTIFICATE, ISSUING_KEY]);
        let stored = self.storage.run("authority_keys", read).await?;
        let Ok([Some(certificate), Some(key)]) = <[_; 2]>::try_from(stored) else {
            return Err(AuthorityError::Damaged("the intermediate is missing".into()));
        };
        if certificate == seen {
            return Ok(false);
        }
        *self.issuing.write() = Arc::new(Issuing::open(&self.sealer, CertificateDer::from(certificate), &key)?);
        Ok(true)
    }

    /// Signs an agent's SVID.
    pub async fn issue_agent(&self, host: &ServiceName, request: &SigningRequest) -> Result<Issued, AuthorityError> {
        self.issue(&self.trust_domain.agent(host), (Some(host), None), &request.0).await
    }

    /// Signs the SVID of one instance of a service, which runs on `host`.
    pub async fn issue_workload(
        &self,
        host: &ServiceName,
        instance: &InstanceId,
        request: &SigningRequest,
    ) -> Result<Issued, AuthorityError> {
        self.issue(&self.trust_domain.workload(&instance.service()), (Some(host), Some(instance)), &request.0).await
    }

    /// Signs a JWT-SVID of one instance of a service.
    pub fn issue_jwt(&self, instance: &InstanceId, audience: &[String]) -> SignedJwtSvid {
        self.jwt.sign(&self.trust_domain.workload(&instance.service()), audience)
    }

    /// Makes a new key and SVID for the control plane itself.
    pub async fn issue_control(&self) -> Result<X509Svid, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut chain = self.issue(&self.trust_domain.control(), (None, None), &key).await?.chain;
        // A newcomer holds nothing but the root's hash, from its join token, and has to see the root to know us by it.
        chain.push(self.root.clone());
        Ok(X509Svid::parse(chain, key.serialize_der())?)
    }

    /// What the control plane shows on its TLS listener.
    pub async fn control_identity(&self) -> Result<Arc<TlsIdentity>, AuthorityError> {
        Ok(TlsIdentity::new(self.issue_control().await?, self.bundle()))
    }

    /// The answer that carries an SVID.
    pub fn to_message(&self, issued: Issued) -> mesh::IssueX509SvidResponse {
        mesh::IssueX509SvidResponse {
            chain_der: issued.chain.into_iter().map(|der| Bytes::from(der.to_vec())).collect(),
            bundle: Some(self.bundle().to_message()),
        }
    }

    /// The authority, for people.
    pub fn view(&self) -> Result<AuthorityView, AuthorityError> {
        Ok(AuthorityView {
            trust_domain: self.trust_domain.clone(),
            bundle_sequence: self.bundle().sequence(),
            bundle_pem: pem("CERTIFICATE", &self.root),
            issuing: certificate_view(&self.issuing.read().certificate)?,
            roots: vec![certificate_view(&self.root)?],
            svid_lifetime_seconds: SVID_LIFETIME.as_secs(),
            sealed_by: format!("{} (key {})", self.sealer.place(), self.sealer.key().name()),
            log_key: self.log.verifier().to_string(),
        })
    }

    async fn issue(
        &self,
        id: &SpiffeId,
        (host, instance): (Option<&ServiceName>, Option<&InstanceId>),
        key: &impl PublicKeyData,
    ) -> Result<Issued, AuthorityError> {
        let issuing = self.issuing.read().clone();
        let now_ms = self.clock.now_ms();
        let expires_at_ms = (now_ms + SVID_LIFETIME.as_millis() as u64).min(issuing.not_after_ms);
        let serial = new_serial();
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.not_before = at(now_ms.saturating_sub(CLOCK_SKEW.as_millis() as u64));
        params.not_after = at(expires_at_ms);
        params.distinguished_name = name(&serial.to_string());
        params.subject_alt_names = vec![uri(id)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &issuing.issuer)?.der().clone();
        let noted = IssuedSerial {
            serial,
            id: id.clone(),
            instance: instance.cloned(),
            host: host.cloned(),
            key: Some(Digest::of(&key.subject_public_key_info())),
            issued_at_ms: now_ms,
            expires_at_ms,
        };
        // Noted before it is handed out: no SVID exists that the store does not know.
        self.storage.run("put_serial", move |store| store.put_serial(&noted)).await?;
        Ok(Issued { chain: vec![leaf, issuing.certificate.clone()], expires_at_ms })
    }
}

impl Issuing {
    fn create(
        trust_domain: &TrustDomain,
        root: &Issuer<'_, KeyPair>,
        now_ms: u64,
    ) -> Result<(Self, Zeroizing<Vec<u8>>), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let limits = BasicConstraints::Constrained(0);
        let mut params = signing_params(trust_domain, "intermediate", limits, now_ms, ISSUING_LIFETIME);
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, root)?.der().clone();
        let secret = serialized(&key);
        Ok((Self::new(certificate, key)?, secret))
    }

    fn open(sealer: &Sealer, certificate: CertificateDer<'static>, sealed: &[u8]) -> Result<Self, AuthorityError> {
        Self::new(certificate, open_key(sealer, ISSUING_KEY, sealed)?)
    }

    fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, AuthorityError> {
        let not_after_ms = certificate_view(&certificate)?.not_after_ms;
        Ok(Self { not_after_ms, issuer: Issuer::from_ca_cert_der(&certificate, key)?, certificate })
    }
}

fn signing_params(
    trust_domain: &TrustDomain,
    level: &str,
    limits: BasicConstraints,
    now_ms: u64,
    lifetime: Duration,
) -> CertificateParams {
    let serial = new_serial();
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.not_before = at(now_ms.saturating_sub(CLOCK_SKEW.as_millis() as u64));
    params.not_after = at(now_ms + lifetime.as_millis() as u64);
    // The serial makes each signing certificate's name its own: verifiers find issuers by name.
    params.distinguished_name = name(&format!("{level} {}", &serial.to_string()[..16]));
    params.subject_alt_names = vec![uri(&trust_domain.id())];
    params.is_ca = IsCa::Ca(limits);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "Countersign");
    name.push(DnType::CommonName, common);
    name
}

fn uri(id: &SpiffeId) -> SanType {
    SanType::URI(id.as_str().try_into().expect("INVARIANT: a SPIFFE ID is ASCII"))
}

fn at(ms: u64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::from_millis(ms)
}

/// 16 random bytes, positive and not zero (RFC 5280, 4.1.2.2).
fn new_serial() -> Serial {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("INVARIANT: the system's random source does not fail");
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Serial::from_der(&bytes).expect("INVARIANT: a serial number has 16 bytes")
}

fn serialized(key: &KeyPair) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(key.serialize_der())
}

fn open_key(sealer: &Sealer, purpose: &str, sealed: &[u8]) -> Result<KeyPair, AuthorityError> {
    let der = sealer.unseal(purpose, sealed)?;
    Ok(KeyPair::try_from(der.as_slice())?)
}

fn read<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, AuthorityError> {
    X509Certificate::from_der(der).map(|(_, read)| read).map_err(|e| AuthorityError::Damaged(e.to_string()))
}

fn trust_domain_of(root: &CertificateDer<'_>) -> Result<TrustDomain, AuthorityError> {
    let damaged = || AuthorityError::Damaged("the root names no trust domain".into());
    let certificate = read(root)?;
    let names = certificate.subject_alternative_name().ok().flatten().ok_or_else(damaged)?;
    let uri = names.value.general_names.iter().find_map(|name| match name {
        x509_parser::extensions::GeneralName::URI(uri) => uri.strip_prefix("spiffe://"),
        _ => None,
    });
    TrustDomain::parse(uri.ok_or_else(damaged)?).map_err(|_| damaged())
}

fn certificate_view(der: &CertificateDer<'_>) -> Result<CertificateView, AuthorityError> {
    let certificate = read(der)?;
    let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0) * 1000;
    Ok(CertificateView {
        subject: certificate.subject().to_string(),
        serial: hex::encode(certificate.raw_serial()),
        not_before_ms: ms(certificate.validity().not_before.timestamp()),
        not_after_ms: ms(certificate.validity().not_after.timestamp()),
        sha256: Digest::of(der),
    })
}
