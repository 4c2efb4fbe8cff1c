//! An authority above ours: a root whose key is offline, or that of another certificate authority, signs the key that signs our
//! intermediates. Here its answer is read and examined, whole, before anything is kept of it. What the operators hand in is theirs to choose;
//! what is refused is what would leave the mesh with certificates that somebody does not verify.

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use x509_parser::prelude::{GeneralName, X509Certificate};

use countersign_api::svid::{Bundle, PeerSide, pem, verify_peer};
use countersign_core::{
    identity::{SpiffeId, TrustDomain},
    lifetimes::Lifetimes,
};

use super::{
    AuthorityError, CLOCK_SKEW, Der, Made, Secret, at, certificate_view, make_issuing, name, new_serial, read, uri,
};

/// Longest chain that we read, in bytes of text.
pub const CHAIN_BYTES_MAX: usize = 64 * 1024;
/// Certificates at most, ours and the root's included.
const CERTIFICATES_MAX: usize = 4;
/// What each of them has to be good for at least: as long as an intermediate lives at least.
const LEFT_MIN: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Where the key lies sealed that an authority above is asked to sign.
pub(super) const REQUESTED_KEY: &str = "authority/requested/key";

/// Why what an authority above answered is not taken up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamRefused {
    /// Nothing was asked of one.
    #[error("no authority above was asked for anything")]
    NothingRequested,
    /// It is no chain.
    #[error("the chain cannot be read: {0}")]
    Unreadable(String),
    /// It begins with a root, or leaves it out.
    #[error("the chain has {0} certificates, and needs 2 to {CERTIFICATES_MAX}")]
    Length(usize),
    /// It certifies another key.
    #[error("no certificate of the chain is of the key that was asked for; the first is `{0}`")]
    OtherKey(String),
    /// It begins elsewhere.
    #[error("the certificate of the key that was asked for is number {0} of the chain, and has to be the first")]
    NotFirst(usize),
    /// Two that follow each other do not belong together.
    #[error("`{subject}` was signed by `{issuer}`, and is followed by `{next}`")]
    Order {
        /// Which.
        subject: String,
        /// Who signed it.
        issuer: String,
        /// What comes instead.
        next: String,
    },
    /// It ends before a root.
    #[error("the chain ends with `{subject}`, which was signed by `{issuer}`")]
    NoRoot {
        /// Its last.
        subject: String,
        /// Who signed that.
        issuer: String,
    },
    /// It carries the names of others only.
    #[error("the signature of `{0}` is not that of the certificate that follows it")]
    Signature(String),
    /// It may not sign certificates.
    #[error("`{0}` is no signing certificate: {1}")]
    NotSigning(String, &'static str),
    /// It allows fewer levels than there are.
    #[error("`{subject}` allows {allowed} signing certificates below it, and {needed} are there")]
    PathLength {
        /// Which.
        subject: String,
        /// `pathLenConstraint`.
        allowed: u32,
        /// Ours included.
        needed: usize,
    },
    /// It speaks for somebody else.
    #[error("`{subject}` names `{named}`, and a signing certificate of this mesh names `{own}` or nothing")]
    Names {
        /// Which.
        subject: String,
        /// Its URI SANs.
        named: String,
        /// What is allowed.
        own: SpiffeId,
    },
    /// It limits names of a kind that our certificates have.
    #[error("`{0}` constrains names by {1}")]
    Constrained(String, &'static str),
    /// It is not good now, or not for long enough.
    #[error("`{0}` {1}")]
    Time(String, String),
    /// What it would sign is refused by the mesh's own verifiers.
    #[error("what would be issued below `{subject}` does not verify: {why}")]
    Trial {
        /// Ours.
        subject: String,
        /// As the verifier says it.
        why: String,
    },
    /// The mesh has it already.
    #[error("the chain ends at root {0}, which is in the bundle already")]
    KnownRoot(u32),
}

impl UpstreamRefused {
    /// What to do about it.
    pub fn help(&self) -> &'static str {
        match self {
            Self::NothingRequested => "`countersign authority request` makes a key and the request to sign it",
            Self::Unreadable(_) => "give the certificates as PEM, each between its BEGIN and END lines",
            Self::Length(_) | Self::NotFirst(_) | Self::Order { .. } | Self::NoRoot { .. } => {
                "put the signed certificate first, then the one that signed it, and so on; the last is the root itself"
            }
            Self::OtherKey(_) => {
                "have the request that was made last signed: `countersign authority request` shows it again"
            }
            Self::Signature(_) => "have it signed again, and take the certificate of the key that did",
            Self::NotSigning(..) => "have it signed as one: CA:TRUE, with keyCertSign",
            Self::PathLength { .. } => {
                "have it signed with pathlen:1 or more: below it our intermediates follow each other by themselves"
            }
            Self::Names { .. } => "have it signed with the name of the request, or with none",
            Self::Constrained(..) => {
                "our verifiers, and many others, cannot hold SPIFFE IDs to it: use a root of this mesh's own instead"
            }
            Self::Time(..) => "have it signed for longer, and by what lives longer; 7 days have to be left of each",
            Self::Trial { .. } => "sign with ECDSA, or with RSA of 2048 bits and more, and SHA-2",
            Self::KnownRoot(_) => "`countersign authority show` says what it is; revoke it first",
        }
    }
}

/// A request (PKCS #10, PEM) for a certificate of `key` that may sign one level of signing certificates.
pub(super) fn request(trust_domain: &TrustDomain, key: &KeyPair) -> Result<String, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(&format!("authority {}", &new_serial().to_string()[..16]));
    params.subject_alt_names = vec![uri(&trust_domain.id())];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(pem("CERTIFICATE REQUEST", params.serialize_request(key)?.der()))
}

/// What an authority above answered, read and not examined.
pub(super) fn parse(chain: &str) -> Result<Vec<CertificateDer<'static>>, UpstreamRefused> {
    if chain.len() > CHAIN_BYTES_MAX {
        return Err(UpstreamRefused::Unreadable("it is longer than 64 KiB".into()));
    }
    let unreadable = |error: rustls_pki_types::pem::Error| UpstreamRefused::Unreadable(error.to_string());
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>().map_err(unreadable)?;
    if !(2..=CERTIFICATES_MAX).contains(&chain.len()) {
        return Err(UpstreamRefused::Length(chain.len()));
    }
    Ok(chain)
}

/// Examines it as the answer to a request for `key`, and makes the intermediate below it.
///
/// INVARIANT (nothing-above-cuts): what an authority above signed is taken up only when an SVID that rests on it verifies as every
/// peer of the mesh verifies it, by its root alone, from now on and for a week at least.
pub(super) fn examine(
    chain: &[CertificateDer<'static>],
    key: KeyPair,
    trust_domain: &TrustDomain,
    lifetimes: Lifetimes,
    now_ms: u64,
) -> Result<Made, AuthorityError> {
    let unreadable = |error: AuthorityError| UpstreamRefused::Unreadable(error.to_string());
    let certificates: Vec<X509Certificate<'_>> =
        chain.iter().map(|der| read(der).map_err(unreadable)).collect::<Result<_, _>>()?;
    follow_each_other(&certificates, &key)?;
    for (below, certificate) in certificates.iter().enumerate() {
        may_sign(certificate, below + 1, trust_domain)?;
        in_time(certificate, now_ms)?;
    }
    let (root, above) = chain.split_last().ok_or(UpstreamRefused::Length(0))?;
    let [ours, ..] = above else { return Err(UpstreamRefused::Length(1).into()) };
    let subject = certificates[0].subject().to_string();
    let trial = |why: String| UpstreamRefused::Trial { subject: subject.clone(), why };
    let signer = Issuer::from_ca_cert_der(ours, key)
        .map_err(|_| trial("its subject has more than one attribute of a kind, or one that is no text".into()))?;
    let until_ms = ends_ms(chain)?;
    let (issuing, issuing_key) = make_issuing(trust_domain, &signer, now_ms, lifetimes, until_ms)?;
    let made = Made {
        root: Der(root.clone()),
        above: above.iter().cloned().map(Der).collect(),
        issuing: Der(issuing),
        issuing_key: Secret::of(&issuing_key),
    };
    verifies(&made, trust_domain, issuing_key, now_ms).map_err(trial)?;
    Ok(made)
}

/// When the first of these ends.
pub(super) fn ends_ms(chain: &[CertificateDer<'_>]) -> Result<u64, AuthorityError> {
    let ends = chain.iter().map(|der| certificate_view(der).map(|view| view.not_after_ms));
    Ok(ends.collect::<Result<Vec<_>, _>>()?.into_iter().min().unwrap_or_default())
}

/// Ours first, then each that signed the one before it, and the root, which signed itself.
fn follow_each_other(chain: &[X509Certificate<'_>], key: &KeyPair) -> Result<(), UpstreamRefused> {
    use rcgen::PublicKeyData as _;
    let asked_for = key.subject_public_key_info();
    match chain.iter().position(|one| one.public_key().raw == asked_for) {
        Some(0) => {}
        Some(at) => return Err(UpstreamRefused::NotFirst(at + 1)),
        None => return Err(UpstreamRefused::OtherKey(chain[0].subject().to_string())),
    }
    let is_by =
        |one: &X509Certificate<'_>, next: &X509Certificate<'_>| one.issuer().as_raw() == next.subject().as_raw();
    for (at, one) in chain.iter().enumerate() {
        let (subject, issuer) = (one.subject().to_string(), one.issuer().to_string());
        let next = match chain.get(at + 1) {
            Some(next) if is_by(one, next) => next,
            Some(next) => return Err(UpstreamRefused::Order { subject, issuer, next: next.subject().to_string() }),
            None if is_by(one, one) => one,
            None => return Err(UpstreamRefused::NoRoot { subject, issuer }),
        };
        one.verify_signature(Some(next.public_key())).map_err(|_| UpstreamRefused::Signature(subject))?;
    }
    Ok(())
}

/// RFC 5280, 4.2.1.9 and 4.2.1.3; X509-SVID, 3.2 and 4. `below` signing certificates are below it, the intermediate included.
fn may_sign(
    certificate: &X509Certificate<'_>,
    below: usize,
    trust_domain: &TrustDomain,
) -> Result<(), UpstreamRefused> {
    let subject = || certificate.subject().to_string();
    let not_signing = |why| UpstreamRefused::NotSigning(subject(), why);
    let unreadable = |error: x509_parser::error::X509Error| UpstreamRefused::Unreadable(error.to_string());
    let constraints = certificate.basic_constraints().map_err(unreadable)?.map(|extension| extension.value);
    let constraints = constraints.filter(|one| one.ca).ok_or_else(|| not_signing("it says no CA:TRUE"))?;
    if let Some(allowed) = constraints.path_len_constraint.filter(|allowed| (*allowed as usize) < below) {
        return Err(UpstreamRefused::PathLength { subject: subject(), allowed, needed: below });
    }
    if !certificate.key_usage().map_err(unreadable)?.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(not_signing("it says no keyCertSign"));
    }
    let names = certificate.subject_alternative_name().map_err(unreadable)?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let own = trust_domain.id();
    if !matches!(uris[..], []) && uris[..] != [own.as_str()] {
        return Err(UpstreamRefused::Names { subject: subject(), named: uris.join("`, `"), own });
    }
    let constrained = certificate.name_constraints().map_err(unreadable)?;
    let subtrees = constrained.iter().flat_map(|extension| {
        [&extension.value.permitted_subtrees, &extension.value.excluded_subtrees].into_iter().flatten().flatten()
    });
    for subtree in subtrees {
        match subtree.base {
            GeneralName::URI(_) => return Err(UpstreamRefused::Constrained(subject(), "URIs")),
            GeneralName::DirectoryName(_) => return Err(UpstreamRefused::Constrained(subject(), "subjects")),
            // Of other kinds an SVID has no name, so nothing is held to it (RFC 5280, 4.2.1.10).
            _ => {}
        }
    }
    Ok(())
}

fn in_time(certificate: &X509Certificate<'_>, now_ms: u64) -> Result<(), UpstreamRefused> {
    let (validity, now) = (certificate.validity(), (now_ms / 1000) as i64);
    let refused = |why: String| Err(UpstreamRefused::Time(certificate.subject().to_string(), why));
    let left = validity.not_after.timestamp() - now;
    match () {
        () if validity.not_before.timestamp() > now => refused(format!("is not valid before {}", validity.not_before)),
        () if left <= 0 => refused(format!("expired on {}", validity.not_after)),
        () if left < LEFT_MIN.as_secs() as i64 => refused(format!("ends on {}, too soon", validity.not_after)),
        () => Ok(()),
    }
}

/// Signs an SVID that nobody gets, and verifies it as either end of a connection would.
fn verifies(made: &Made, trust_domain: &TrustDomain, issuing_key: KeyPair, now_ms: u64) -> Result<(), String> {
    let said = |error: &dyn std::error::Error| error.to_string();
    let issuer = Issuer::from_ca_cert_der(&made.issuing.0, issuing_key).map_err(|error| said(&error))?;
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|error| said(&error))?;
    let mut params = super::leaf_params(&trust_domain.control(), &new_serial());
    params.not_before = at(now_ms.saturating_sub(CLOCK_SKEW.as_millis() as u64));
    params.not_after = at(now_ms + CLOCK_SKEW.as_millis() as u64);
    let leaf = params.signed_by(&key, &issuer).map_err(|error| said(&error))?.der().clone();
    let between = made.above.iter().map(|der| der.0.clone());
    let chain: Vec<_> = [leaf, made.issuing.0.clone()].into_iter().chain(between).collect();
    let bundle = Bundle::new(trust_domain.clone(), 0, vec![made.root.0.clone()]).map_err(|error| said(&error))?;
    let now = UnixTime::since_unix_epoch(Duration::from_millis(now_ms));
    for side in [PeerSide::Client, PeerSide::Server] {
        verify_peer(&chain, &bundle, now, side).map_err(|error| said(&error))?;
    }
    Ok(())
}
