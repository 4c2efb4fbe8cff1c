//! The only room that signs. Two levels of ECDSA P-256: a root, which signs nothing but intermediates, and an
//! intermediate, which signs SVIDs; how long each is good the ledger says. Their private keys lie sealed in the store; the root's is opened
//! only to sign an intermediate and erased again. A root is followed by the next one while the mesh runs ([`generations`]). Beside
//! them an Ed25519 key that signs the checkpoints of the ledger. Where the root's key is kept elsewhere, an authority above signs a key of ours
//! that stands in the root's place here ([`upstream`]).
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
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use countersign_api::{
    local::{AuthorityStep, AuthorityView, CertificateView, RootView, SigningKeys},
    mesh,
    svid::{Bundle, HOST_OID, SvidError, TlsIdentity, TokenAuthorities, UID_OID, X509Svid, pem},
};
use countersign_core::{
    canonical::Digest,
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    lifetimes::Lifetimes,
    signal::Serial,
    token::Claims,
};

use crate::{
    clock::Clock,
    store::{IssuedSerial, Storage, Store, StoreError},
};

mod generations;
pub mod jwt_key;
pub mod log_key;
pub mod note_key;
pub mod seal;
mod upstream;

pub use generations::StepRefused;
use generations::{Der, GENERATIONS, Generation, Generations, Made, Secret, root_key};
use jwt_key::{JWT_KEYS, JwtKeys, SignedJwtSvid, TOKEN_KEYS};
use log_key::{LOG_KEY, LOG_SIGNED, LogKey};
use seal::{Sealer, Unopened};
use upstream::REQUESTED_KEY;
pub use upstream::UpstreamRefused;

/// How far the clocks of two hosts may differ before a fresh certificate looks not yet valid.
const CLOCK_SKEW: Duration = Duration::from_secs(60);
/// Longest signing request we read, in bytes.
const CSR_BYTES_MAX: usize = 8 * 1024;

/// Before there were several roots.
const ROOT_CERTIFICATE: &str = "authority/root/certificate";
const ISSUING_CERTIFICATE: &str = "authority/issuing/certificate";
const ISSUING_KEY: &str = "authority/issuing/key";

/// The authority of one trust domain.
pub struct Authority {
    trust_domain: TrustDomain,
    held: RwLock<Arc<Held>>,
    /// The number of the last step that is known here.
    news: watch::Sender<u64>,
    jwt: JwtKeys,
    tokens: JwtKeys,
    log: LogKey,
    sealer: Arc<Sealer>,
    storage: Storage,
    clock: Clock,
    lifetimes: ReadLifetimes,
}

/// Tells how long what is signed now is good.
pub type ReadLifetimes = Arc<dyn Fn() -> Lifetimes + Send + Sync>;

/// The roots as they are known here, and what signs now.
struct Held {
    /// As the store has it.
    sealed: Vec<u8>,
    generations: Generations,
    issuing: Issuing,
}

/// The intermediate that signs now.
struct Issuing {
    not_before_ms: u64,
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
    /// Another key cannot sign yet.
    #[error(transparent)]
    TooSoon(#[from] jwt_key::TooSoon),
    /// The step would leave the mesh without what it rests on.
    #[error(transparent)]
    Step(#[from] StepRefused),
    /// What an authority above signed would leave somebody without a certificate that verifies.
    #[error(transparent)]
    Upstream(#[from] UpstreamRefused),
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

    /// SHA-256 of its key, as it is noted of what is issued for it.
    pub fn key_sha256(&self) -> Digest {
        Digest::of(&self.0.subject_public_key_info())
    }
}

impl Authority {
    /// Opens the stored authority, if there is one.
    pub async fn open(
        storage: Storage,
        sealer: Arc<Sealer>,
        clock: Clock,
        lifetimes: ReadLifetimes,
    ) -> Result<Option<Self>, AuthorityError> {
        let root_key = root_key(1);
        let names = [GENERATIONS, ROOT_CERTIFICATE, ISSUING_CERTIFICATE, ISSUING_KEY, LOG_KEY, &root_key];
        let names = names.map(str::to_owned);
        let read = move |store: &mut dyn Store| store.keys(&names.each_ref().map(String::as_str));
        let stored = storage.run("authority_keys", read).await?;
        let sealed = match <[_; 6]>::try_from(stored) {
            Ok([Some(sealed), ..]) => sealed,
            Ok([None, None, None, None, None, None]) => return Ok(None),
            Ok([None, Some(root), Some(issuing), Some(key), _, Some(_)]) => {
                begin_record(&storage, &sealer, [root, issuing, key], clock.now_ms()).await?
            }
            _ => return Err(AuthorityError::Damaged("the record of the roots is missing".into())),
        };
        let held = Held::open(&sealer, sealed)?;
        let trust_domain = held.generations.trust_domain.clone();
        let log = match LogKey::open(&trust_domain, storage.clone(), sealer.clone()).await? {
            Some(log) => log,
            None => LogKey::create(&trust_domain, storage.clone(), sealer.clone()).await?,
        };
        let open = |place| JwtKeys::open(place, storage.clone(), sealer.clone(), clock.clone());
        let keys = (open(JWT_KEYS).await?, open(TOKEN_KEYS).await?);
        let authority = Self::of(held, keys, log, sealer, storage, clock, lifetimes);
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
        lifetimes: ReadLifetimes,
    ) -> Result<Option<Self>, AuthorityError> {
        let now_ms = clock.now_ms();
        let (made, root_secret) = make_root(&trust_domain, now_ms, lifetimes())?;
        let generations = Generations::first(trust_domain.clone(), made, now_ms);
        let (log, log_secret) = LogKey::make(&trust_domain, storage.clone(), sealer.clone());
        let seals = sealer.clone();
        let made = storage
            .run("authority_keys", move |store| {
                let [log_key, nothing_signed] = log_secret.seal(&seals)?;
                let (sealed, root) = (generations.seal(&seals)?, root_key(1));
                let kept = store.create_keys(&[
                    (LOG_KEY, &log_key),
                    (LOG_SIGNED, &nothing_signed),
                    (&root, &seals.seal(&root, &root_secret.0)?),
                    (GENERATIONS, &sealed),
                    (JWT_KEYS, &jwt_key::first(JWT_KEYS, &seals, now_ms)?),
                    (TOKEN_KEYS, &jwt_key::first(TOKEN_KEYS, &seals, now_ms)?),
                ])?;
                Ok(kept.then_some(sealed))
            })
            .await?;
        let Some(sealed) = made else { return Ok(None) };
        let held = Held::open(&sealer, sealed)?;
        let open = |place| JwtKeys::open(place, storage.clone(), sealer.clone(), clock.clone());
        let keys = (open(JWT_KEYS).await?, open(TOKEN_KEYS).await?);
        Ok(Some(Self::of(held, keys, log, sealer, storage, clock, lifetimes)))
    }

    fn of(
        held: Held,
        (jwt, tokens): (JwtKeys, JwtKeys),
        log: LogKey,
        sealer: Arc<Sealer>,
        storage: Storage,
        clock: Clock,
        lifetimes: ReadLifetimes,
    ) -> Self {
        let news = watch::Sender::new(held.generations.version);
        let trust_domain = held.generations.trust_domain.clone();
        let held = RwLock::new(Arc::new(held));
        Self { trust_domain, held, news, jwt, tokens, log, sealer, storage, clock, lifetimes }
    }

    fn held(&self) -> Arc<Held> {
        self.held.read().clone()
    }

    /// Changes whenever another step becomes known here, whoever took it.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }

    /// The trust domain it speaks for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The key that signs the ledger's checkpoints.
    pub fn log(&self) -> &LogKey {
        &self.log
    }

    /// SHA-256 of the root that signs now: what a new join token lets an agent recognise us by.
    pub fn root_sha256(&self) -> Digest {
        self.held().generations.active().sha256()
    }

    /// SHA-256 of each root by which an agent may recognise us: those that sign or signed, while they are in the bundle.
    pub fn known_by(&self) -> Vec<Digest> {
        let held = self.held();
        let generations = &held.generations;
        [Some(generations.active()), generations.old()].into_iter().flatten().map(Generation::sha256).collect()
    }

    /// SHA-256 of the root that is prepared.
    pub fn prepared_sha256(&self) -> Option<Digest> {
        self.held().generations.prepared().map(Generation::sha256)
    }

    /// The keys that verify this trust domain's SVIDs.
    pub fn bundle(&self) -> Bundle {
        let held = self.held();
        let generations = &held.generations;
        // All of them only rise, and one of them does with each change.
        let sequence = self.jwt.sequence() + self.tokens.sequence() + generations.version;
        let tokens = TokenAuthorities { issuer: self.token_issuer(), keys: self.tokens.authorities() };
        Bundle::new(generations.trust_domain.clone(), sequence, generations.roots())
            .expect("INVARIANT: each root was read as a signing certificate when the record was opened")
            .with_jwt_authorities(self.jwt.authorities())
            .with_token_authorities(tokens)
            .with_tainted(generations.tainted())
    }

    /// Replaces what nears its end: the intermediate, and the keys that sign JWT-SVIDs and access tokens. What the old ones signed
    /// stays valid until it expires. Takes up what other control planes did. Whether anything was replaced.
    pub async fn rotate(&self) -> Result<bool, AuthorityError> {
        let (taken_up, issuing, jwt) = (self.catch_up().await?, self.rotate_issuing().await?, self.jwt.rotate().await?);
        let tokens = self.tokens.rotate().await?;
        Ok(taken_up || issuing || jwt || tokens)
    }

    async fn rotate_issuing(&self) -> Result<bool, AuthorityError> {
        let mut replaced = false;
        loop {
            let (held, now_ms) = (self.held(), self.clock.now_ms());
            if !held.issuing.ends_soon(now_ms) {
                return Ok(replaced);
            }
            let generations = &held.generations;
            let Some(root) = self.root_issuer(generations.active()).await? else { return Ok(replaced) };
            let root_ends_ms = upstream::ends_ms(&generations.active().way_up())?;
            // Another one would end with the same certificate above it.
            if root_ends_ms <= held.issuing.not_after_ms {
                return Ok(replaced);
            }
            let (issuing, key) =
                make_issuing(&generations.trust_domain, &root, now_ms, (self.lifetimes)(), root_ends_ms)?;
            let cross = match generations.old() {
                Some(old) => self.cross(generations, old, &key, &issuing).await?,
                None => None,
            };
            let after = generations.renewed(Der(issuing), Secret::of(&key), cross);
            replaced = true;
            if self.swap(&held, after, Vec::new()).await? {
                return Ok(replaced);
            }
        }
    }

    /// Takes up what another control plane did; false when none did anything.
    pub async fn catch_up(&self) -> Result<bool, AuthorityError> {
        let sealed = self.storage.run("authority_keys", |store| store.key(GENERATIONS)).await?;
        let sealed = sealed.ok_or_else(|| AuthorityError::Damaged("the record of the roots is missing".into()))?;
        if sealed == self.held().sealed {
            return Ok(false);
        }
        self.take_up(Held::open(&self.sealer, sealed)?);
        Ok(true)
    }

    /// What is known here never goes back: of two who read, the later may have read the earlier record.
    fn take_up(&self, next: Held) {
        let mut held = self.held.write();
        if next.generations.version >= held.generations.version {
            let version = next.generations.version;
            *held = Arc::new(next);
            drop(held);
            self.news.send_replace(version);
        }
    }

    /// Puts `after` in the place of the record that `held` is of, whole or not at all, and keeps secrets beside it. False when another
    /// control plane took a step first: then what it did is taken up, and whoever asked looks again.
    ///
    /// INVARIANT (one-step-at-a-time): a step begins at the record that it was judged by.
    async fn swap(
        &self,
        held: &Held,
        after: Generations,
        beside: Vec<(String, Secret)>,
    ) -> Result<bool, AuthorityError> {
        let (seals, seen) = (self.sealer.clone(), held.sealed.clone());
        let swap = move |store: &mut dyn Store| {
            let sealed = after.seal(&seals)?;
            let mut secrets = Vec::new();
            for (name, secret) in &beside {
                secrets.push((name.as_str(), seals.seal(name, &secret.0)?));
            }
            let mut keys = vec![(GENERATIONS, &sealed[..])];
            keys.extend(secrets.iter().map(|(name, sealed)| (*name, &sealed[..])));
            Ok(store.swap_key(GENERATIONS, &seen, &keys)?.then_some(sealed))
        };
        match self.storage.run("authority_keys", swap).await? {
            Some(sealed) => {
                self.take_up(Held::open(&self.sealer, sealed)?);
                Ok(true)
            }
            None => {
                self.catch_up().await?;
                Ok(false)
            }
        }
    }

    /// Makes another root, which verifies and signs nothing. Returns its number.
    pub async fn prepare(&self) -> Result<u32, AuthorityError> {
        loop {
            let (held, now_ms) = (self.held(), self.clock.now_ms());
            held.generations.may_prepare()?;
            let (made, root_secret) = make_root(&held.generations.trust_domain, now_ms, (self.lifetimes)())?;
            let number = held.generations.next();
            let after = held.generations.prepare(made, now_ms)?;
            if self.swap(&held, after, vec![(root_key(number), root_secret)]).await? {
                return Ok(number);
            }
        }
    }

    /// The prepared root `number` signs from now on.
    pub async fn activate(&self, number: u32) -> Result<(), AuthorityError> {
        loop {
            let held = self.held();
            let generations = &held.generations;
            let next = generations.may_activate(number)?;
            let key = read_key(&next.issuing_key.0)?;
            let cross = self.cross(generations, generations.active(), &key, &next.issuing.0).await?;
            let after = generations.activate(number, cross, self.clock.now_ms())?;
            if self.swap(&held, after, Vec::new()).await? {
                return Ok(());
            }
        }
    }

    /// Nothing new rests on the old root `number`.
    pub async fn taint(&self, number: u32) -> Result<(), AuthorityError> {
        loop {
            let held = self.held();
            let after = held.generations.taint(number, self.clock.now_ms())?;
            if self.swap(&held, after, Vec::new()).await? {
                return Ok(());
            }
        }
    }

    /// Nobody verifies by root `number` any more, and its key is gone.
    pub async fn revoke(&self, number: u32) -> Result<(), AuthorityError> {
        loop {
            let held = self.held();
            let after = held.generations.revoke(number)?;
            let gone = (root_key(number), Secret(Zeroizing::new(Vec::new())));
            if self.swap(&held, after, vec![gone]).await? {
                return Ok(());
            }
        }
    }

    /// Asks an authority above to sign a key of ours: the request, PEM. The same one again until it is answered, unless `fresh` asks for
    /// another key.
    pub async fn request(&self, fresh: bool) -> Result<String, AuthorityError> {
        loop {
            let held = self.held();
            if let Some(requested) = held.generations.requested.as_ref().filter(|_| !fresh) {
                return Ok(requested.csr_pem.clone());
            }
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            let csr_pem = upstream::request(&self.trust_domain, &key)?;
            let after = held.generations.request(csr_pem.clone(), self.clock.now_ms());
            if self.swap(&held, after, vec![(REQUESTED_KEY.to_owned(), Secret::of(&key))]).await? {
                return Ok(csr_pem);
            }
        }
    }

    /// The request that waits for an answer.
    pub fn requested(&self) -> Option<String> {
        self.held().generations.requested.as_ref().map(|requested| requested.csr_pem.clone())
    }

    /// Whether `chain_pem` can be taken up as the answer.
    pub async fn may_accept(&self, chain_pem: &str) -> Result<(), AuthorityError> {
        self.examine(&self.held(), chain_pem).await.map(drop)
    }

    /// Takes up what an authority above answered: prepares its root, or replaces what it signed before for the root that signs. Returns
    /// the number of the root, and whether it is the one that signs.
    pub async fn accept(&self, chain_pem: &str) -> Result<(u32, bool), AuthorityError> {
        loop {
            let held = self.held();
            let generations = &held.generations;
            let (made, secret) = self.examine(&held, chain_pem).await?;
            let renews = generations.answers(&made.root)?.is_some();
            let cross = match generations.old() {
                Some(old) if renews => {
                    self.cross(generations, old, &read_key(&made.issuing_key.0)?, &made.issuing.0).await?
                }
                _ => None,
            };
            let (number, after) = generations.accepted(made, cross, self.clock.now_ms())?;
            let used = (REQUESTED_KEY.to_owned(), Secret(Zeroizing::new(Vec::new())));
            if self.swap(&held, after, vec![(root_key(number), secret), used]).await? {
                return Ok((number, renews));
            }
        }
    }

    async fn examine(&self, held: &Held, chain_pem: &str) -> Result<(Made, Secret), AuthorityError> {
        let generations = &held.generations;
        generations.requested.as_ref().ok_or(UpstreamRefused::NothingRequested)?;
        let chain = upstream::parse(chain_pem)?;
        let sealed = self.storage.run("authority_keys", |store| store.key(REQUESTED_KEY)).await?;
        let sealed = sealed.ok_or_else(|| AuthorityError::Damaged("the key that was asked for is missing".into()))?;
        let secret = Secret(self.sealer.unseal(REQUESTED_KEY, &sealed)?);
        let (lifetimes, now_ms) = ((self.lifetimes)(), self.clock.now_ms());
        let made = upstream::examine(&chain, read_key(&secret.0)?, &self.trust_domain, lifetimes, now_ms)?;
        generations.answers(&made.root)?;
        Ok((made, secret))
    }

    /// Whether a step can be taken from where the record is now.
    pub fn may(&self, step: AuthorityStep) -> Result<(), StepRefused> {
        let held = self.held();
        let record = &held.generations;
        match step {
            AuthorityStep::Next => record.prepared().map_or(Ok(()), |one| record.may_activate(one.number).map(drop)),
            AuthorityStep::Prepare => record.may_prepare(),
            AuthorityStep::Activate(number) => record.may_activate(number).map(drop),
            AuthorityStep::Taint(number) => record.taint(number, 0).map(drop),
            AuthorityStep::Revoke(number) => record.revoke(number).map(drop),
        }
    }

    /// What signs as the root of `generation`; `None` when the store has its key no more.
    async fn root_issuer(&self, generation: &Generation) -> Result<Option<Issuer<'static, KeyPair>>, AuthorityError> {
        let name = generation.root_key();
        let of = name.clone();
        let sealed = self.storage.run("authority_keys", move |store| store.key(&of)).await?;
        let Some(sealed) = sealed else {
            tracing::error!(root = generation.number, "the key of a root is missing");
            return Ok(None);
        };
        let key = read_key(&self.sealer.unseal(&name, &sealed)?)?;
        Ok(Some(Issuer::from_ca_cert_der(generation.signer(), key)?))
    }

    /// That what signs ends soon and is not replaced by itself.
    pub fn ends_soon(&self) -> Option<String> {
        let held = self.held();
        let now_ms = self.clock.now_ms();
        let active = held.generations.active();
        let above =
            active.above.iter().filter_map(|der| certificate_view(&der.0).ok()).min_by_key(|one| one.not_after_ms);
        if let Some(above) = above {
            let life_ms = above.not_after_ms.saturating_sub(above.not_before_ms);
            let left_ms = above.not_after_ms.saturating_sub(now_ms);
            return (left_ms <= life_ms / 3).then(|| {
                let (root, days) = (active.number, left_ms / (24 * 60 * 60 * 1000));
                format!("what an authority above signed for root {root} ends in {days} days: `countersign authority request` another")
            });
        }
        let left_ms = held.issuing.not_after_ms.saturating_sub(now_ms);
        let (root, days) = (held.generations.active().number, left_ms / (24 * 60 * 60 * 1000));
        held.issuing.ends_soon(now_ms).then(|| {
            format!("the intermediate of root {root} ends in {days} days and cannot be replaced: `countersign authority prepare` another root")
        })
    }

    /// The intermediate `issuing` as the root of `before` certifies it: whoever holds only that one verifies by it what the intermediate
    /// signs. Its own key is certified and not the next root's, because a root allows one level below it.
    async fn cross(
        &self,
        generations: &Generations,
        before: &Generation,
        key: &KeyPair,
        issuing: &CertificateDer<'_>,
    ) -> Result<Option<Der>, AuthorityError> {
        let Some(root) = self.root_issuer(before).await? else { return Ok(None) };
        let until_ms = certificate_view(issuing)?.not_after_ms.min(upstream::ends_ms(&before.way_up())?);
        let now_ms = self.clock.now_ms();
        let lifetime = Duration::from_millis(until_ms.saturating_sub(now_ms));
        let trust_domain = &generations.trust_domain;
        let mut params = signing_params(trust_domain, "", BasicConstraints::Constrained(0), now_ms, lifetime);
        params.distinguished_name = subject_of(issuing)?;
        params.use_authority_key_identifier_extension = true;
        Ok(Some(Der(params.signed_by(key, &root)?.der().clone())))
    }

    /// Signs an agent's SVID.
    pub async fn issue_agent(&self, host: &ServiceName, request: &SigningRequest) -> Result<Issued, AuthorityError> {
        self.issue(&self.trust_domain().agent(host), (Some(host), None), &request.0).await
    }

    /// Signs the SVID of one instance of a service, which runs on `host`.
    pub async fn issue_workload(
        &self,
        host: &ServiceName,
        instance: &InstanceId,
        request: &SigningRequest,
    ) -> Result<Issued, AuthorityError> {
        self.issue(&self.trust_domain().workload(&instance.service()), (Some(host), Some(instance)), &request.0).await
    }

    /// Signs a JWT-SVID of one instance of a service.
    pub fn issue_jwt(&self, instance: &InstanceId, audience: &[String]) -> SignedJwtSvid {
        self.jwt.sign(&self.trust_domain().workload(&instance.service()), audience)
    }

    /// The issuer of access tokens.
    pub fn token_issuer(&self) -> String {
        format!("https://{}", self.trust_domain)
    }

    /// The keys that sign tokens of one kind.
    pub fn signing_keys(&self, keys: SigningKeys) -> &JwtKeys {
        match keys {
            SigningKeys::Tokens => &self.tokens,
            SigningKeys::JwtSvids => &self.jwt,
        }
    }

    /// Signs an access token (RFC 9068).
    pub fn sign_token(&self, claims: &Claims) -> String {
        let claims = serde_json::to_value(claims).expect("INVARIANT: claims are plain JSON");
        self.tokens.sign_as("at+jwt", &claims)
    }

    /// Makes a new key and SVID for the control plane itself.
    pub async fn issue_control(&self) -> Result<X509Svid, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut chain = self.issue(&self.trust_domain().control(), (None, None), &key).await?.chain;
        // A newcomer holds nothing but a root's hash, from its join token, and has to see the root to know us by it.
        let held = self.held();
        let known_by = [Some(held.generations.active()), held.generations.old()].into_iter().flatten();
        chain.extend(known_by.map(|one| one.root.0.clone()));
        Ok(X509Svid::parse(chain, key.serialize_der())?)
    }

    /// What the control plane shows on its TLS listener.
    pub async fn control_identity(&self) -> Result<Arc<TlsIdentity>, AuthorityError> {
        Ok(TlsIdentity::new(self.issue_control().await?, self.bundle()))
    }

    /// A key and a certificate by which clients who know no SPIFFE recognise a listener of the control plane: it names these hosts, and no
    /// workload, so it is no SVID and opens nothing inside the mesh.
    pub async fn issue_server(&self, names: Vec<SanType>) -> Result<(KeyPair, Issued), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let issued = self.issue_as(&self.trust_domain().control(), (None, None), &key, names, usages).await?;
        Ok((key, issued))
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
        let held = self.held();
        let view = |one: &Generation| -> Result<RootView, AuthorityError> {
            Ok(RootView {
                number: one.number,
                state: one.state,
                since_ms: one.since_ms,
                root: certificate_view(&one.root.0)?,
                above: one.above.iter().map(|der| certificate_view(&der.0)).collect::<Result<_, _>>()?,
                issuing: certificate_view(&one.issuing.0)?,
            })
        };
        Ok(AuthorityView {
            trust_domain: held.generations.trust_domain.clone(),
            bundle_sequence: self.bundle().sequence(),
            bundle_pem: held.generations.roots().iter().map(|root| pem("CERTIFICATE", root)).collect(),
            roots: held.generations.all().iter().map(view).collect::<Result<_, _>>()?,
            requested_at_ms: held.generations.requested.as_ref().map(|requested| requested.since_ms),
            svid_lifetime_seconds: (self.lifetimes)().svid_seconds.into(),
            sealed_by: format!("{} (key {})", self.sealer.place(), self.sealer.key().name()),
            log_key: self.log.verifier().to_string(),
        })
    }

    async fn issue(
        &self,
        id: &SpiffeId,
        of: (Option<&ServiceName>, Option<&InstanceId>),
        key: &impl PublicKeyData,
    ) -> Result<Issued, AuthorityError> {
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue_as(id, of, key, vec![uri(id)], usages).await
    }

    /// INVARIANT (only-the-active-signs): an SVID is handed out only when the record in the store is still the one that says which root
    /// signs; so once a step is taken, no control plane issues anything by what was before it.
    async fn issue_as(
        &self,
        id: &SpiffeId,
        (host, instance): (Option<&ServiceName>, Option<&InstanceId>),
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
    ) -> Result<Issued, AuthorityError> {
        loop {
            let held = self.held();
            let now_ms = self.clock.now_ms();
            let lifetime_ms = u64::from((self.lifetimes)().svid_seconds) * 1000;
            let expires_at_ms = (now_ms + lifetime_ms).min(held.issuing.not_after_ms);
            let serial = new_serial();
            let mut params = leaf_params(id, &serial);
            params.not_before = at(now_ms.saturating_sub(CLOCK_SKEW.as_millis() as u64));
            params.not_after = at(expires_at_ms);
            // So that the other end of a connection knows what signals are about.
            let of = [(UID_OID, instance.map(InstanceId::as_str)), (HOST_OID, host.map(ServiceName::as_str))];
            for (oid, said) in of.into_iter().filter_map(|(oid, said)| Some((oid, said?))) {
                params.distinguished_name.push(DnType::CustomDnType(oid.to_vec()), said);
            }
            params.subject_alt_names = names.clone();
            params.extended_key_usages = usages.clone();
            let leaf = params.signed_by(key, &held.issuing.issuer)?.der().clone();
            let active = held.generations.active();
            let noted = IssuedSerial {
                serial,
                id: id.clone(),
                instance: instance.cloned(),
                host: host.cloned(),
                key: Some(Digest::of(&key.subject_public_key_info())),
                issued_at_ms: now_ms,
                expires_at_ms,
                authority: active.number,
            };
            let judged_by = held.sealed.clone();
            let put = move |store: &mut dyn Store| {
                let holds = store.key(GENERATIONS)?.as_deref() == Some(&judged_by[..]);
                if holds {
                    // Noted before it is handed out: no SVID exists that the store does not know.
                    store.put_serial(&noted)?;
                }
                Ok(holds)
            };
            if self.storage.run("put_serial", put).await? {
                let chain = std::iter::once(leaf).chain(held.generations.shown()).collect();
                return Ok(Issued { chain, expires_at_ms });
            }
            self.catch_up().await?;
        }
    }
}

impl Issuing {
    /// Whether it is to be replaced: less than a third of its life is left, which every SVID that it signs outlives by far.
    fn ends_soon(&self, now_ms: u64) -> bool {
        self.not_after_ms.saturating_sub(now_ms) <= self.not_after_ms.saturating_sub(self.not_before_ms) / 3
    }
}

impl Held {
    fn open(sealer: &Sealer, sealed: Vec<u8>) -> Result<Self, AuthorityError> {
        let generations = Generations::open(sealer, &sealed)?;
        Bundle::new(generations.trust_domain.clone(), 0, generations.roots())
            .map_err(|error| AuthorityError::Damaged(format!("a root is no signing certificate: {error}")))?;
        let active = generations.active();
        let key = read_key(&active.issuing_key.0)?;
        let CertificateView { not_before_ms, not_after_ms, .. } = certificate_view(&active.issuing.0)?;
        let issuing =
            Issuing { not_before_ms, not_after_ms, issuer: Issuer::from_ca_cert_der(&active.issuing.0, key)? };
        Ok(Self { sealed, generations, issuing })
    }
}

/// The record of a mesh that had one root so far. What it was made of is emptied, so that of two control planes one makes it.
async fn begin_record(
    storage: &Storage,
    sealer: &Arc<Sealer>,
    [root, issuing, key]: [Vec<u8>; 3],
    now_ms: u64,
) -> Result<Vec<u8>, AuthorityError> {
    let root = CertificateDer::from(root);
    let issuing_key = Secret(sealer.unseal(ISSUING_KEY, &key)?);
    let made = Made { root: Der(root.clone()), above: Vec::new(), issuing: Der(issuing.clone().into()), issuing_key };
    let generations = Generations::first(trust_domain_of(&root)?, made, now_ms);
    let seals = sealer.clone();
    let begin = move |store: &mut dyn Store| {
        let (sealed, nothing) = (generations.seal(&seals)?, seals.seal(ISSUING_KEY, &[])?);
        let keys = [(GENERATIONS, &sealed[..]), (ISSUING_CERTIFICATE, &[]), (ISSUING_KEY, &nothing)];
        store.swap_key(ISSUING_CERTIFICATE, &issuing, &keys)?;
        store.key(GENERATIONS)
    };
    let sealed = storage.run("authority_keys", begin).await?;
    sealed.ok_or_else(|| AuthorityError::Damaged("the record of the roots is missing".into()))
}

/// A root for as long as roots live, the intermediate below it, and the root's key.
fn make_root(trust_domain: &TrustDomain, now_ms: u64, lifetimes: Lifetimes) -> Result<(Made, Secret), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let params =
        signing_params(trust_domain, "root", BasicConstraints::Constrained(1), now_ms, days(lifetimes.root_days));
    let root = params.self_signed(&key)?.der().clone();
    let secret = Secret::of(&key);
    let root_ends_ms = certificate_view(&root)?.not_after_ms;
    let issuer = Issuer::from_ca_cert_der(&root, key)?;
    let (issuing, issuing_key) = make_issuing(trust_domain, &issuer, now_ms, lifetimes, root_ends_ms)?;
    let made =
        Made { root: Der(root), above: Vec::new(), issuing: Der(issuing), issuing_key: Secret::of(&issuing_key) };
    Ok((made, secret))
}

fn make_issuing(
    trust_domain: &TrustDomain,
    root: &Issuer<'_, KeyPair>,
    now_ms: u64,
    lifetimes: Lifetimes,
    root_ends_ms: u64,
) -> Result<(CertificateDer<'static>, KeyPair), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let limits = BasicConstraints::Constrained(0);
    let left = Duration::from_millis(root_ends_ms.saturating_sub(now_ms));
    let lifetime = days(lifetimes.intermediate_days).min(left);
    let mut params = signing_params(trust_domain, "intermediate", limits, now_ms, lifetime);
    params.use_authority_key_identifier_extension = true;
    Ok((params.signed_by(&key, root)?.der().clone(), key))
}

/// What every SVID says but who it is issued to and for how long.
fn leaf_params(id: &SpiffeId, serial: &Serial) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.distinguished_name = name(&serial.to_string());
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params
}

fn days(count: u32) -> Duration {
    Duration::from_secs(u64::from(count) * 24 * 60 * 60)
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

fn read_key(pkcs8: &[u8]) -> Result<KeyPair, AuthorityError> {
    Ok(KeyPair::try_from(pkcs8)?)
}

/// The subject of one of our signing certificates.
fn subject_of(der: &CertificateDer<'_>) -> Result<DistinguishedName, AuthorityError> {
    let certificate = read(der)?;
    let common = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    Ok(name(common.ok_or_else(|| AuthorityError::Damaged("an intermediate has no name".into()))?))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{metrics::StoreLatency, store::sqlite::SqliteStore};

    #[tokio::test]
    async fn a_mesh_of_before_there_were_several_roots_goes_on_with_the_one_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Arc::new(Sealer::open(&dir.path().join("kek"), true).unwrap());
        let store = SqliteStore::open(&dir.path().join("control.db")).unwrap();
        let storage = Storage::start(Box::new(store), StoreLatency::default()).unwrap();
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let (made, root_secret) = make_root(&trust_domain, Clock::system().now_ms(), Lifetimes::default()).unwrap();
        let root = Digest::of(&made.root.0);
        let seals = sealer.clone();
        let as_before = storage.run("authority_keys", move |store| {
            store.put_keys(&[
                (ROOT_CERTIFICATE, &made.root.0),
                ("authority/root/key", &seals.seal("authority/root/key", &root_secret.0)?),
                (ISSUING_CERTIFICATE, &made.issuing.0),
                (ISSUING_KEY, &seals.seal(ISSUING_KEY, &made.issuing_key.0)?),
            ])
        });
        as_before.await.unwrap();
        let open = async || {
            let usual = Arc::new(Lifetimes::default);
            Authority::open(storage.clone(), sealer.clone(), Clock::system(), usual).await.unwrap().unwrap()
        };
        let authority = open().await;
        assert_eq!((authority.root_sha256(), authority.trust_domain()), (root, &trust_domain));
        assert_eq!(authority.prepare().await.unwrap(), 2);
        authority.activate(2).await.expect("the key of the first root certifies the second's intermediate");
        let again = open().await;
        assert_eq!(again.known_by(), [authority.root_sha256(), root]);
        assert_eq!(again.bundle(), authority.bundle());
    }
}
