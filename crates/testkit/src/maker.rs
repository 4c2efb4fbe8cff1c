//! A maker of authenticators, who vouches for them: a root, and a certificate for each model (Web Authentication Level 3, 8.2).

use countersign_core::assurance::authenticators::{Aaguid, AttestationRoot};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DistinguishedName, DnType, IsCa, KeyPair,
    KeyUsagePurpose, SigningKey as _,
};

/// `id-fido-gen-ce-aaguid` (8.2.1): the model that a certificate is for.
const MODEL: [u64; 10] = [1, 3, 6, 1, 4, 1, 45724, 1, 1, 4];

/// A root that nobody has signed.
pub struct Maker {
    root: CertifiedIssuer<'static, KeyPair>,
}

/// What the authenticators of one model have in common: a key that signs what they say of a new one, and its certificate.
pub struct Vouching {
    key: KeyPair,
    certificate: Vec<u8>,
}

impl Maker {
    /// A new one.
    pub fn new(name: &str) -> Self {
        let mut params = params(&format!("{name} Root"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self { root: CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a root") }
    }

    /// Its certificate, as operators are given it.
    pub fn root(&self) -> AttestationRoot {
        AttestationRoot::parse(self.root.der()).expect("a certificate")
    }

    /// Its certificate in PEM.
    pub fn pem(&self) -> String {
        self.root.pem()
    }

    /// What goes into each authenticator of `model`.
    pub fn vouches_for(&self, model: Aaguid) -> Vouching {
        let mut params = params("Batch 1");
        params.is_ca = IsCa::ExplicitNoCa;
        let octets = [&[0x04, 16][..], &model.bytes()].concat();
        params.custom_extensions = vec![CustomExtension::from_oid_content(&MODEL, octets)];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.root).expect("a certificate").der().to_vec();
        Vouching { key, certificate }
    }
}

impl Vouching {
    /// A statement of the format `packed` over `message`, in CBOR.
    pub fn statement(&self, message: &[u8]) -> Vec<u8> {
        let signature = self.key.sign(message).expect("a signature");
        packed(&signature, &[b"\x63x5c\x81\x59", &(self.certificate.len() as u16).to_be_bytes()[..], &self.certificate])
    }
}

/// The same without a certificate, or with `more` of it: whoever signed is not told.
pub(crate) fn packed(signature: &[u8], more: &[&[u8]]) -> Vec<u8> {
    let members = if more.is_empty() { 0xa2 } else { 0xa3 };
    let head = [&[members][..], b"\x63alg\x26\x63sig\x58", &[signature.len() as u8]].concat();
    [head, signature.to_vec(), more.concat()].concat()
}

/// The subject says what 8.2.1 demands.
fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in [
        (DnType::CountryName, "SE"),
        (DnType::OrganizationName, "Keys"),
        (DnType::OrganizationalUnitName, "Authenticator Attestation"),
        (DnType::CommonName, name),
    ] {
        params.distinguished_name.push(kind, value);
    }
    params
}
