//! Which authenticators may become factors: their models, and the roots of those who vouch for what an authenticator says it is.
//!
//! Said in `mesh.toml`, kept in the ledger, held to where a key is enrolled. No attestation is verified here, and no factor that is
//! enrolled is looked at again.

use std::{collections::BTreeSet, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use x509_parser::{
    certificate::BasicExtension,
    extensions::KeyUsage,
    prelude::{FromDer as _, Pem, X509Certificate},
};

use crate::canonical::Digest;

/// Models that one mesh names at most.
pub const MODELS_MAX: usize = 256;
/// Roots that one mesh names at most.
pub const ROOTS_MAX: usize = 32;
/// Longest root certificate, in bytes.
const ROOT_BYTES_MAX: usize = 8 * 1024;

/// A model of an authenticator, as its maker numbers it (Web Authentication Level 2, section 6.1): all that are alike have it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Aaguid([u8; 16]);

/// The certificate of somebody who vouches for authenticators, in DER. Only [`parse`](Self::parse) makes one: it is a certificate.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttestationRoot(Vec<u8>);

/// The only authenticators that may be enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Authenticators {
    /// Their models.
    pub models: BTreeSet<Aaguid>,
    /// Who vouches that they are of these models.
    pub roots: BTreeSet<AttestationRoot>,
}

/// Why something names no authenticator, or nobody who vouches for one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticatorRefused {
    /// Not written as a model is.
    #[error("a model is written like `ee882879-721c-4913-9775-3dfcce97072a`")]
    Model,
    /// What authenticators say that do not tell.
    #[error("a model of zeros is what an authenticator says that does not tell its model")]
    NoModel,
    /// Not a certificate.
    #[error("it is not an X.509 certificate of at most {ROOT_BYTES_MAX} bytes")]
    Root,
    /// A certificate of somebody who vouches for nobody.
    #[error(
        "`{0}` may not sign certificates: give the root certificate of the maker, a CA whose key usage is to sign certificates"
    )]
    NoAuthority(String),
    /// A text without certificates.
    #[error("it holds no certificate: `-----BEGIN CERTIFICATE-----`")]
    Pem,
}

impl Authenticators {
    /// Whether it says something that can be held to.
    pub fn is_whole(&self) -> bool {
        (1..=MODELS_MAX).contains(&self.models.len()) && (1..=ROOTS_MAX).contains(&self.roots.len())
    }

    /// What tells one list from another.
    pub fn digest(&self) -> Digest {
        Digest::of_canonical(self)
    }
}

impl Aaguid {
    /// Parses the written form: hexadecimal in groups of 8, 4, 4, 4 and 12.
    pub fn parse(given: &str) -> Result<Self, AuthenticatorRefused> {
        let is_grouped = given.len() == 36 && [8, 13, 18, 23].iter().all(|at| given.as_bytes()[*at] == b'-');
        let digits = given.replace('-', "");
        let bytes: Option<[u8; 16]> = hex::decode(digits).ok().and_then(|bytes| bytes.try_into().ok());
        match bytes.filter(|_| is_grouped) {
            None => Err(AuthenticatorRefused::Model),
            Some([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]) => Err(AuthenticatorRefused::NoModel),
            Some(bytes) => Ok(Self(bytes)),
        }
    }

    /// What an authenticator calls itself, whatever it is.
    pub fn of_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    pub fn bytes(&self) -> [u8; 16] {
        self.0
    }
}

impl AttestationRoot {
    /// Reads a certificate in DER, with nothing behind it.
    pub fn parse(der: &[u8]) -> Result<Self, AuthenticatorRefused> {
        match X509Certificate::from_der(der) {
            Ok(([], read)) if der.len() <= ROOT_BYTES_MAX => match may_sign(&read) {
                true => Ok(Self(der.to_vec())),
                false => Err(AuthenticatorRefused::NoAuthority(read.subject().to_string())),
            },
            _ => Err(AuthenticatorRefused::Root),
        }
    }

    /// Reads the certificates of a text in PEM.
    pub fn parse_pem(text: &str) -> Result<BTreeSet<Self>, AuthenticatorRefused> {
        let mut roots = BTreeSet::new();
        for pem in Pem::iter_from_buffer(text.as_bytes()) {
            let pem = pem.ok().filter(|pem| pem.label == "CERTIFICATE").ok_or(AuthenticatorRefused::Root)?;
            roots.insert(Self::parse(&pem.contents)?);
        }
        if roots.is_empty() { Err(AuthenticatorRefused::Pem) } else { Ok(roots) }
    }

    /// The certificate.
    pub fn der(&self) -> &[u8] {
        &self.0
    }

    /// Whose it is: what the certificates that it signed name as their issuer.
    pub fn subject(&self) -> String {
        X509Certificate::from_der(&self.0).map(|(_, read)| read.subject().to_string()).unwrap_or_default()
    }
}

/// Whether a chain may end at it (RFC 5280, 4.2.1.3 and 4.2.1.9).
fn may_sign(certificate: &X509Certificate<'_>) -> bool {
    let signs = |usage: Option<BasicExtension<&KeyUsage>>| usage.is_some_and(|usage| usage.value.key_cert_sign());
    certificate.is_ca() && certificate.key_usage().is_ok_and(signs)
}

/// Whose it is, and what tells it from others of that name.
impl fmt::Display for AttestationRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, SHA-256 {}", self.subject(), Digest::of(&self.0))
    }
}

impl fmt::Debug for AttestationRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AttestationRoot({self})")
    }
}

impl fmt::Display for Aaguid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = hex::encode(self.0);
        let groups = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        f.write_str(&groups.join("-"))
    }
}

impl fmt::Debug for Aaguid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Aaguid({self})")
    }
}

impl TryFrom<String> for Aaguid {
    type Error = AuthenticatorRefused;
    fn try_from(given: String) -> Result<Self, AuthenticatorRefused> {
        Self::parse(&given)
    }
}

impl From<Aaguid> for String {
    fn from(model: Aaguid) -> Self {
        model.to_string()
    }
}

impl TryFrom<String> for AttestationRoot {
    type Error = AuthenticatorRefused;
    fn try_from(given: String) -> Result<Self, AuthenticatorRefused> {
        let der = STANDARD.decode(given).map_err(|_| AuthenticatorRefused::Root)?;
        Self::parse(&der)
    }
}

impl From<AttestationRoot> for String {
    fn from(root: AttestationRoot) -> Self {
        STANDARD.encode(root.0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A certificate in PEM that signed itself, of `O=Keys, CN=Keys Root`.
    pub(crate) const ROOT: &str = "-----BEGIN CERTIFICATE-----
MIIBrTCCAVOgAwIBAgIUHQOSncS6M81MJ5xcbbwGzMYU3l0wCgYIKoZIzj0EAwIw
IzENMAsGA1UECgwES2V5czESMBAGA1UEAwwJS2V5cyBSb290MCAXDTI2MTEyNzAy
NDkwNFoYDzIxMjYxMTAzMDI0OTA0WjAjMQ0wCwYDVQQKDARLZXlzMRIwEAYDVQQD
DAlLZXlzIFJvb3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAT4S9t+owBQ4vPI
pydbTSHYqKdS6dEX+MS4PBahiOFMJZMT+sY99ozhsbOO/6afwdrkJsbYvCSNocBr
bOLfjwuzo2MwYTAdBgNVHQ4EFgQUuWboTqb1FlpncnAoDyCJ+xu/qPQwHwYDVR0j
BBgwFoAUuWboTqb1FlpncnAoDyCJ+xu/qPQwDwYDVR0TAQH/BAUwAwEB/zAOBgNV
HQ8BAf8EBAMCAQYwCgYIKoZIzj0EAwIDSAAwRQIhAI/327FES8qfseeGjMRQd9EG
4sxNhcZnZnuIbJjDnS3NAiBZM+EnTViFxIJi8jE8ZkYDuPUnhAByys1lr371W4UR
FA==
-----END CERTIFICATE-----
";

    /// Another one of that name.
    pub(crate) const NAMESAKE: &str = "-----BEGIN CERTIFICATE-----
MIIBrTCCAVOgAwIBAgIUL/L08/58HG/MRqNIm70gEgx8PDYwCgYIKoZIzj0EAwIw
IzENMAsGA1UECgwES2V5czESMBAGA1UEAwwJS2V5cyBSb290MCAXDTI2MTEyNzAy
NTUwM1oYDzIxMjYxMTAzMDI1NTAzWjAjMQ0wCwYDVQQKDARLZXlzMRIwEAYDVQQD
DAlLZXlzIFJvb3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQe6SnefxnGHDEw
qoG/6vdkcQDimMXixW+v0/FJd3CGWNCv7ZQzo2aJ7JRrGSADsVm9bv1tGYv28Jim
kBjR7dsJo2MwYTAdBgNVHQ4EFgQUaSP0p78XNaDwy8FTZAIBsJnCUTEwHwYDVR0j
BBgwFoAUaSP0p78XNaDwy8FTZAIBsJnCUTEwDwYDVR0TAQH/BAUwAwEB/zAOBgNV
HQ8BAf8EBAMCAQYwCgYIKoZIzj0EAwIDSAAwRQIhAJ+66oJ6BSnTOH7yPC4C42GG
QRBXWo7tQwxsF2LZk7NKAiBJr/5DVMiT534LoFc5L1pwIm0cjacNMbuNEpsOkVqd
ig==
-----END CERTIFICATE-----
";

    /// A certificate that may sign no other.
    pub(crate) const LEAF: &str = "-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUfXJTajQZsrH+siKUxU6Pb0Qmzu8wCgYIKoZIzj0EAwIw
HjENMAsGA1UECgwES2V5czENMAsGA1UEAwwETGVhZjAgFw0yNjExMjcwMjQ5MDRa
GA8yMTI2MTEwMzAyNDkwNFowHjENMAsGA1UECgwES2V5czENMAsGA1UEAwwETGVh
ZjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABG/gz3fPOg2EaITYVCmHlapT7W9i
AZlkGH1PKEO/7+2YSu8zlQL2SDhx6g5uI5magU8XHStFlU8MQE89b0CcaXOjUDBO
MB0GA1UdDgQWBBS72SOLdx53ylQO/uozRn3LJCaqojAfBgNVHSMEGDAWgBS72SOL
dx53ylQO/uozRn3LJCaqojAMBgNVHRMBAf8EAjAAMAoGCCqGSM49BAMCA0gAMEUC
IDv8Y3cE5cYsScu59AEOFHJHN8iT34fGQUmhotSE4Ne0AiEA/c6TFkUw57Sq5Goh
6Myp4ybo/W9IGQUeXOinx8kI0m8=
-----END CERTIFICATE-----
";

    #[test]
    fn a_model_has_one_spelling_and_zeros_are_none() {
        let written = "ee882879-721c-4913-9775-3dfcce97072a";
        assert_eq!(Aaguid::parse(written).unwrap().to_string(), written);
        assert_eq!(Aaguid::parse(&written.to_uppercase()).unwrap().to_string(), written);
        for (given, expected) in [
            ("", AuthenticatorRefused::Model),
            ("ee882879721c491397753dfcce97072a", AuthenticatorRefused::Model),
            ("ee88287-9721c-4913-9775-3dfcce97072a", AuthenticatorRefused::Model),
            ("ee882879-721c-4913-9775-3dfcce97072g", AuthenticatorRefused::Model),
            ("ee882879-721c-4913-9775-3dfcce97-72a", AuthenticatorRefused::Model),
            ("00000000-0000-0000-0000-000000000000", AuthenticatorRefused::NoModel),
        ] {
            assert_eq!(Aaguid::parse(given), Err(expected), "{given}");
        }
    }

    #[test]
    fn a_root_is_a_certificate_and_nothing_beside_it() {
        let roots = AttestationRoot::parse_pem(&format!("{ROOT}{ROOT}")).unwrap();
        assert_eq!(roots.len(), 1, "the same one twice is one");
        let root = roots.first().unwrap();
        assert!(root.to_string().starts_with("O=Keys, CN=Keys Root, SHA-256 "), "{root}");
        let kept = serde_json::to_string(root).unwrap();
        assert_eq!(serde_json::from_str::<AttestationRoot>(&kept).unwrap(), *root);
        let longer = [root.der(), b"\0"].concat();
        assert_eq!(AttestationRoot::parse(&longer), Err(AuthenticatorRefused::Root));
        let leaf = AuthenticatorRefused::NoAuthority("O=Keys, CN=Leaf".to_owned());
        assert_eq!(AttestationRoot::parse_pem(&format!("{ROOT}{LEAF}")), Err(leaf));
        assert_eq!(AttestationRoot::parse_pem("a text"), Err(AuthenticatorRefused::Pem));
        let other = ROOT.replace("CERTIFICATE", "PRIVATE KEY");
        assert_eq!(AttestationRoot::parse_pem(&other), Err(AuthenticatorRefused::Root));
    }
}
