//! What is refused as a peer, and the one thing that is accepted; handshakes with rustls on both ends.

use std::{sync::Arc, time::Duration};

use countersign_api::svid::{
    Bundle, ClientCertificate, PeerSide, TlsIdentity, VerifiedPeer, X509Svid, server_name, verify_peer,
};
use countersign_core::identity::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

type Authority = CertifiedIssuer<'static, KeyPair>;

const NOW: u64 = 1_800_000_000; // seconds since 1970

fn at(offset: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(NOW as i64 + offset).unwrap()
}

fn uri(given: &str) -> SanType {
    SanType::URI(given.try_into().unwrap())
}

fn signing(name: &str, sans: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = sans;
    (params.not_before, params.not_after) = (at(-86_400), at(86_400));
    params
}

fn root() -> Authority {
    let params = signing("root", vec![uri("spiffe://shop.example")]);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn intermediate(root: &Authority, sans: Vec<SanType>) -> Authority {
    CertifiedIssuer::signed_by(signing("issuing", sans), KeyPair::generate().unwrap(), root).unwrap()
}

fn leaf_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri("spiffe://shop.example/web")];
    (params.not_before, params.not_after) = (at(-60), at(3600));
    params
}

fn sign(params: CertificateParams, issuer: &Authority) -> (CertificateDer<'static>, KeyPair) {
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap().der().clone(), key)
}

fn bundle(root: &Authority) -> Bundle {
    Bundle::new(TrustDomain::parse("shop.example").unwrap(), 1, vec![root.der().clone()]).unwrap()
}

#[test]
fn a_chain_that_is_not_the_svid_of_a_workload_is_refused() {
    let root = root();
    let issuing = intermediate(&root, vec![uri("spiffe://shop.example")]);
    let narrow = intermediate(&root, vec![uri("spiffe://shop.example/web")]);
    let foreign = CertifiedIssuer::self_signed(signing("root", vec![]), KeyPair::generate().unwrap()).unwrap();
    let with = |change: fn(&mut CertificateParams)| {
        let mut params = leaf_params();
        change(&mut params);
        vec![sign(params, &issuing).0, issuing.der().clone()]
    };
    let good = with(|_| {});
    let refusals: Vec<(&str, Vec<CertificateDer<'static>>, &str)> = vec![
        ("nothing", vec![], "no certificate"),
        ("noise", vec![CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])], "cannot be read"),
        ("two URI SANs", with(|p| p.subject_alt_names.push(uri("https://x.example/"))), "this one has 2"),
        ("no URI SAN", with(|p| p.subject_alt_names.clear()), "this one has 0"),
        ("another scheme", with(|p| p.subject_alt_names = vec![uri("https://shop.example/web")]), "must begin with"),
        (
            "the trust domain itself",
            with(|p| p.subject_alt_names = vec![uri("spiffe://shop.example")]),
            "not a workload",
        ),
        ("another trust domain", with(|p| p.subject_alt_names = vec![uri("spiffe://evil.example/web")]), "no bundle"),
        ("a CA as a leaf", with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "(cA)"),
        ("a leaf that may sign", with(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)), "keyCertSign"),
        ("no key usage", with(|p| p.key_usages.clear()), "no key usage"),
        ("expired", with(|p| p.not_after = at(-1)), "does not verify"),
        ("not valid yet", with(|p| p.not_before = at(60)), "does not verify"),
        ("server only", with(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), "does not verify"),
        ("another authority", vec![sign(leaf_params(), &foreign).0], "does not verify"),
        (
            "its own authority sent along",
            vec![sign(leaf_params(), &foreign).0, foreign.der().clone()],
            "does not verify",
        ),
        ("no intermediate", vec![good[0].clone()], "does not verify"),
        (
            "an intermediate that names a workload",
            vec![sign(leaf_params(), &narrow).0, narrow.der().clone()],
            "a signing certificate of the chain names `spiffe://shop.example/web`",
        ),
        ("too long", std::iter::repeat_n(good[0].clone(), 13).collect(), "longer than 12"),
    ];
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW));
    for (what, chain, expected) in refusals {
        let got = verify_peer(&chain, &bundle(&root), now, PeerSide::Client).map_err(|e| e.to_string());
        assert!(got.as_ref().is_err_and(|e| e.contains(expected)), "{what}: {got:?}");
    }
    let peer = verify_peer(&good, &bundle(&root), now, PeerSide::Client).unwrap();
    assert_eq!(peer.id().as_str(), "spiffe://shop.example/web");
}

/// An identity valid now by the real clock, as rustls reads it.
fn identity(issuer: &Authority, root: &Authority, id: &str) -> Arc<TlsIdentity> {
    TlsIdentity::new(svid(issuer, id), bundle(root))
}

fn svid(issuer: &Authority, id: &str) -> X509Svid {
    let mut params = leaf_params();
    params.subject_alt_names = vec![uri(id)];
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::from_secs(60), now + Duration::from_secs(3600));
    let (leaf, key) = sign(params, issuer);
    X509Svid::parse(vec![leaf], key.serialize_der()).unwrap()
}

fn real_root() -> Authority {
    let mut params = signing("root", vec![uri("spiffe://shop.example")]);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::from_secs(60), now + Duration::from_secs(7200));
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

async fn handshake(
    client: &Arc<TlsIdentity>,
    wanted: &str,
    server: &Arc<TlsIdentity>,
) -> Result<(VerifiedPeer, VerifiedPeer), String> {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let connector = tokio_rustls::TlsConnector::from(client.client_config(SpiffeId::parse(wanted).unwrap(), &[b"h2"]));
    let acceptor = tokio_rustls::TlsAcceptor::from(server.server_config(ClientCertificate::Required, &[b"h2"]));
    let (near, far) = tokio::join!(connector.connect(server_name(), near), acceptor.accept(far));
    let (near, far) = match (near, far) {
        (Ok(near), Ok(far)) => (near, far),
        (near, far) => return Err(format!("client: {:?}, server: {:?}", near.err(), far.err())),
    };
    assert_eq!(near.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    Ok((VerifiedPeer::of_connection(far.get_ref().1).unwrap(), VerifiedPeer::of_connection(near.get_ref().1).unwrap()))
}

#[tokio::test]
async fn both_ends_know_each_other_and_nobody_else_gets_in() {
    let (root, foreign) = (real_root(), real_root());
    let web = identity(&root, &root, "spiffe://shop.example/web");
    let catalog = identity(&root, &root, "spiffe://shop.example/catalog");
    let stranger = identity(&foreign, &root, "spiffe://shop.example/web");
    let wanted = "spiffe://shop.example/catalog";

    let refused = handshake(&web, "spiffe://shop.example/payments", &catalog).await.unwrap_err();
    assert!(refused.contains("SomeoneElse"), "{refused}");
    assert!(handshake(&stranger, wanted, &catalog).await.unwrap_err().contains("Chain("));
    assert!(handshake(&web, "spiffe://shop.example/web", &stranger).await.is_err());

    let (client, server) = handshake(&web, wanted, &catalog).await.unwrap();
    assert_eq!(client.id().as_str(), "spiffe://shop.example/web");
    assert_eq!(server.id().as_str(), wanted);
}

#[tokio::test]
async fn a_renewed_identity_and_a_new_bundle_hold_from_the_next_handshake() {
    let (root, next) = (real_root(), real_root());
    let web = identity(&root, &root, "spiffe://shop.example/web");
    let catalog = identity(&root, &root, "spiffe://shop.example/catalog");
    let wanted = "spiffe://shop.example/catalog";
    let first = handshake(&web, wanted, &catalog).await.unwrap().1;

    catalog.renew(svid(&next, wanted));
    assert!(handshake(&web, wanted, &catalog).await.is_err(), "signed by a root that web does not trust yet");

    let both = vec![root.der().clone(), next.der().clone()];
    web.trust(Bundle::new(TrustDomain::parse("shop.example").unwrap(), 2, both).unwrap());
    let second = handshake(&web, wanted, &catalog).await.unwrap().1;
    assert_ne!(first.leaf_sha256(), second.leaf_sha256());
}

#[test]
fn a_key_that_is_not_the_leafs_is_no_identity() {
    let root = root();
    let (leaf, _) = sign(leaf_params(), &root);
    let other = KeyPair::generate().unwrap();
    assert!(X509Svid::parse(vec![leaf], other.serialize_der()).is_err());
}
