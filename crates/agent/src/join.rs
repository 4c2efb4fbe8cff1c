//! How a host becomes part of the mesh, and stays it: a single-use join token is traded once for the agent's own SVID,
//! which the agent then renews by itself at half life.
//!
//! The token is `csj1.<secret>.<SHA-256 of the root certificate>`, each part in base64url. Its third part pins the root:
//! the first connection, made without a certificate of our own, is accepted only from a control plane whose chain ends
//! in exactly that root, so the secret is shown to no one else. The private key is made here and never leaves.
//!
//! A token of a protected mesh has a fourth part, the digest of its anchor; one of a sealed mesh a fifth, that of the entry which
//! sealed it. They pin the operators: no ledger with another anchor or seal is ever followed.

use std::path::Path;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use countersign_api::{
    mesh::{IssueX509SvidResponse, JoinRequest, enrolment_client::EnrolmentClient},
    svid::{
        Bundle, JwtAuthority, PeerRefused, PeerSide, SvidError, TokenAuthorities, X509Svid, newcomer_config,
        verify_peer,
    },
};
use countersign_core::{
    canonical::Digest,
    identity::{ServiceName, SpiffeId, TrustDomain},
    keyring::Pins,
};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    keep,
    link::{ALPN, ControlAddress},
};

/// The file below the agent's directory that holds its identity.
const FILE: &str = "identity.json";

/// What an operator hands to a new host. `Debug` does not show the secret.
pub(crate) struct JoinToken {
    text: Zeroizing<String>,
    root_sha256: Digest,
    /// The entries that the mesh's ledger must have.
    pub(crate) pins: Pins,
}

/// The token given is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: {0}")]
pub struct JoinTokenError(pub &'static str);

/// Why a host could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The connection failed, or whoever answered is not the control plane that the token names.
    #[error("could not reach the control plane at `{control}`")]
    Unreachable {
        /// Where it should be.
        control: String,
        /// What happened.
        #[source]
        source: tonic::transport::Error,
    },
    /// Control refused the token.
    #[error("the control plane at `{control}` refused the join token: {why}")]
    Refused {
        /// Where.
        control: String,
        /// What it said.
        why: String,
    },
    /// Control did not answer as it must.
    #[error("the control plane at `{control}` failed to answer: {why}")]
    Failed {
        /// Where.
        control: String,
        /// What it said.
        why: String,
    },
    /// It answered with something that is not this host's identity.
    #[error("the control plane issued something that is not the identity of host `{host}`")]
    Issued {
        /// This host.
        host: ServiceName,
        /// What is wrong with it.
        #[source]
        source: IssuedError,
    },
    /// No key could be made.
    #[error("could not make a key")]
    Key(#[from] rcgen::Error),
}

/// Why what control issued cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IssuedError {
    /// Certificate, key or bundle are not what they must be.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// The chain does not verify against the bundle that came with it.
    #[error(transparent)]
    Chain(#[from] PeerRefused),
    /// The bundle is missing.
    #[error("no bundle came with it")]
    NoBundle,
    /// It names someone else.
    #[error("it names `{got}` and not `{wanted}`")]
    SomeoneElse {
        /// Whom it must name.
        wanted: SpiffeId,
        /// Whom it names.
        got: SpiffeId,
    },
    /// The bundle leaves out the root that the token pinned.
    #[error("its bundle does not hold the root that the join token names")]
    OtherRoot,
}

impl JoinToken {
    pub(crate) fn parse(given: &str) -> Result<Self, JoinTokenError> {
        let given = given.trim();
        let mut parts = given.split('.');
        let (Some("csj1"), Some(secret), Some(root)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(JoinTokenError("it must be `csj1.<secret>.<root>`"));
        };
        let digest = |part: &str| {
            let bytes = URL_SAFE_NO_PAD.decode(part).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
            bytes.map(Digest).ok_or(JoinTokenError("a part of it is not a SHA-256 in base64url"))
        };
        let mut pin = || parts.next().map(digest).transpose();
        let pins = Pins { anchor: pin()?, seal: pin()?, recovery: pin()? };
        if parts.next().is_some() {
            return Err(JoinTokenError("it has more than six parts"));
        }
        if secret.len() < 16 || secret.len() > 200 || URL_SAFE_NO_PAD.decode(secret).is_err() {
            return Err(JoinTokenError("its second part is not a secret in base64url"));
        }
        let root = URL_SAFE_NO_PAD.decode(root).ok().and_then(|root| <[u8; 32]>::try_from(root).ok());
        let root_sha256 = Digest(root.ok_or(JoinTokenError("its third part is not a SHA-256 in base64url"))?);
        Ok(Self { text: Zeroizing::new(given.to_owned()), root_sha256, pins })
    }
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinToken").field("secret", &"..").field("root_sha256", &self.root_sha256).finish()
    }
}

/// A new key and the request to sign it. The key leaves this value only inside an [`Issued`].
pub(crate) struct SigningRequest {
    pub(crate) csr_der: Bytes,
    key_pkcs8_der: Zeroizing<Vec<u8>>,
}

impl SigningRequest {
    /// Makes a P-256 key. The request carries nothing but the public key: who it is for, control knows.
    pub(crate) fn new() -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let csr = CertificateParams::default().serialize_request(&key)?;
        Ok(Self { csr_der: csr.der().to_vec().into(), key_pkcs8_der: Zeroizing::new(key.serialize_der()) })
    }

    /// Accepts what control issued for this key when it names `wanted` and verifies against the bundle beside it.
    pub(crate) fn accept(
        self,
        answer: &IssueX509SvidResponse,
        wanted: impl FnOnce(&TrustDomain) -> SpiffeId,
        now: UnixTime,
    ) -> Result<Issued, IssuedError> {
        let bundle = Bundle::from_message(answer.bundle.as_ref().ok_or(IssuedError::NoBundle)?)?;
        let chain: Vec<_> = answer.chain_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let peer = verify_peer(&chain, &bundle, now, PeerSide::Server)?;
        let wanted = wanted(bundle.trust_domain());
        if *peer.id() != wanted {
            return Err(IssuedError::SomeoneElse { wanted, got: peer.id().clone() });
        }
        let svid = X509Svid::parse(chain, self.key_pkcs8_der.to_vec())?;
        Ok(Issued { svid, key_pkcs8_der: self.key_pkcs8_der, bundle, pinned: None })
    }
}

/// An identity with its key, and the bundle that came with it. The key is erased on drop.
pub(crate) struct Issued {
    pub(crate) svid: X509Svid,
    pub(crate) key_pkcs8_der: Zeroizing<Vec<u8>>,
    pub(crate) bundle: Bundle,
    /// The root that the join token named by which this host came into its mesh: it may be revoked since.
    pub(crate) pinned: Option<Digest>,
}

/// Trades `token` for the identity of `host`.
pub(crate) async fn join(
    control: &ControlAddress,
    host: &ServiceName,
    token: &JoinToken,
    now: UnixTime,
) -> Result<Issued, JoinError> {
    let unreachable = |source| JoinError::Unreachable { control: control.to_string(), source };
    let channel = control.connect(newcomer_config(token.root_sha256, ALPN)).await.map_err(unreachable)?;
    let request = SigningRequest::new()?;
    let answer = EnrolmentClient::new(channel)
        .join(JoinRequest { token: token.text.to_string(), host: host.to_string(), csr_der: request.csr_der.clone() })
        .await
        .map_err(|status| {
            let (control, why) = (control.to_string(), status.message().to_owned());
            match status.code() {
                tonic::Code::Unauthenticated
                | tonic::Code::PermissionDenied
                | tonic::Code::InvalidArgument
                | tonic::Code::AlreadyExists
                | tonic::Code::FailedPrecondition => JoinError::Refused { control, why },
                code => JoinError::Failed { control, why: format!("{why} ({code})") },
            }
        })?
        .into_inner();
    let issued = |source| JoinError::Issued { host: host.clone(), source };
    let answer = answer.svid.unwrap_or_default();
    let identity = request.accept(&answer, |trust_domain| trust_domain.agent(host), now).map_err(issued)?;
    if !identity.bundle.authorities().iter().any(|root| Digest::of(root) == token.root_sha256) {
        return Err(issued(IssuedError::OtherRoot));
    }
    Ok(Issued { pinned: Some(token.root_sha256), ..identity })
}

/// The agent's identity as it lies in its directory, in a file only its own uid can open.
#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    chain: Vec<String>, // DER, base64url
    key: String,        // PKCS #8 DER, base64url; erased on drop
    trust_domain: TrustDomain,
    bundle_sequence: u64,
    bundle: Vec<String>, // DER, base64url
    #[serde(default)]
    jwt_authorities: Vec<KeptKey>,
    #[serde(default)]
    token_issuer: String,
    #[serde(default)]
    token_authorities: Vec<KeptKey>,
    #[serde(default)]
    tainted: Vec<Digest>,
    #[serde(default)]
    pinned: Option<Digest>,
}

#[derive(Serialize, Deserialize)]
struct KeptKey {
    key_id: String,
    point: String, // base64url
}

impl KeptKey {
    fn of(key: &JwtAuthority) -> Self {
        Self { key_id: key.key_id.clone(), point: URL_SAFE_NO_PAD.encode(&key.point) }
    }

    fn read(&self) -> Result<JwtAuthority, KeptError> {
        let point = URL_SAFE_NO_PAD.decode(&self.point).map_err(|error| KeptError::Damaged(error.to_string()))?;
        Ok(JwtAuthority { key_id: self.key_id.clone(), point })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// Why a kept identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file cannot be read.
    #[error("could not read it")]
    Io(#[from] std::io::Error),
    /// It is not what we wrote.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// Writes an agent's identity below `dir`, whole or not at all.
pub(crate) fn keep_identity(
    dir: &Path,
    svid: &X509Svid,
    key_pkcs8_der: &[u8],
    bundle: &Bundle,
    pinned: Option<Digest>,
) -> std::io::Result<()> {
    let text = |der: &CertificateDer<'_>| URL_SAFE_NO_PAD.encode(der);
    let kept = Kept {
        format: 1,
        chain: svid.chain().iter().map(text).collect(),
        key: URL_SAFE_NO_PAD.encode(key_pkcs8_der),
        trust_domain: bundle.trust_domain().clone(),
        bundle_sequence: bundle.sequence(),
        bundle: bundle.authorities().iter().map(text).collect(),
        jwt_authorities: bundle.jwt_authorities().iter().map(KeptKey::of).collect(),
        token_issuer: bundle.token_authorities().issuer.clone(),
        token_authorities: bundle.token_authorities().keys.iter().map(KeptKey::of).collect(),
        tainted: bundle.tainted().to_vec(),
        pinned,
    };
    keep::write(&dir.join(FILE), &Zeroizing::new(serde_json::to_vec(&kept)?))
}

impl Issued {
    /// The identity an earlier run kept below `dir`, if there is one.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, KeptError> {
        let Some(bytes) = keep::read(&dir.join(FILE))? else { return Ok(None) };
        let damaged = |why: &dyn std::error::Error| KeptError::Damaged(why.to_string());
        let kept: Kept = serde_json::from_slice(&Zeroizing::new(bytes)).map_err(|e| damaged(&e))?;
        if kept.format != 1 {
            return Err(KeptError::Damaged(format!("its format is {}, this version reads 1", kept.format)));
        }
        let der = |text: &String| {
            URL_SAFE_NO_PAD.decode(text).map(CertificateDer::from).map_err(|e| KeptError::Damaged(e.to_string()))
        };
        let chain = kept.chain.iter().map(der).collect::<Result<_, _>>()?;
        let roots = kept.bundle.iter().map(der).collect::<Result<_, _>>()?;
        let key_pkcs8_der = Zeroizing::new(URL_SAFE_NO_PAD.decode(&kept.key).map_err(|e| damaged(&e))?);
        let svid = X509Svid::parse(chain, key_pkcs8_der.to_vec()).map_err(|e| damaged(&e))?;
        let bundle = Bundle::new(kept.trust_domain.clone(), kept.bundle_sequence, roots).map_err(|e| damaged(&e))?;
        let read = |keys: &[KeptKey]| keys.iter().map(KeptKey::read).collect::<Result<Vec<_>, _>>();
        let tokens = TokenAuthorities { issuer: kept.token_issuer.clone(), keys: read(&kept.token_authorities)? };
        let bundle = bundle.with_jwt_authorities(read(&kept.jwt_authorities)?).with_token_authorities(tokens);
        let bundle = bundle.with_tainted(kept.tainted.clone());
        Ok(Some(Self { svid, key_pkcs8_der, bundle, pinned: kept.pinned }))
    }

    /// Whether it can still be used as `host`, by the mesh of which `token` names a root, at `now`: one by which it verifies, or the one
    /// by which it joined.
    pub(crate) fn serves(&self, host: &ServiceName, token: Option<&JoinToken>, now: UnixTime) -> bool {
        let pinned = |token: &JoinToken| {
            let is_held = self.bundle.authorities().iter().any(|root| Digest::of(root) == token.root_sha256);
            is_held || self.pinned == Some(token.root_sha256)
        };
        *self.svid.id() == self.bundle.trust_domain().agent(host)
            && token.is_none_or(pinned)
            && verify_peer(self.svid.chain(), &self.bundle, now, PeerSide::Client).is_ok()
    }
}
