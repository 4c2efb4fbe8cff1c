//! One root follows another while everybody stays: those who are there, those who were away, and those who come by an older token.

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use countersign_api::{
    local::{
        AcceptAbove, AcceptedAbove, AskAbove, AskedAbove, AuthorityState, AuthorityStep, AuthorityView, IdentityView,
        Problem, StepAs, Stepped,
    },
    mesh::{self, follow_event::Event, mesh_client::MeshClient},
    svid::{Bundle, PeerSide, verify_peer},
};
use countersign_control::{StartError, clock::Clock, start, start_with_clock};
use countersign_core::{canonical::Digest, change::Change, lifetimes::Lifetimes};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, GeneralSubtree, IsCa, KeyPair,
    KeyUsagePurpose, NameConstraints, SanType,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use support::{Agent, Plane, config, trust_domain};
use tonic::Code;

async fn step_as(plane: &Plane, step: AuthorityStep, force: bool) -> Result<Stepped, Problem> {
    plane.post("/v1/authority/steps", &StepAs { step, force, shown: Default::default() }).await
}

async fn step(plane: &Plane, step: AuthorityStep) -> Stepped {
    step_as(plane, step, false).await.unwrap()
}

async fn states(plane: &Plane) -> BTreeMap<u32, AuthorityState> {
    let view: AuthorityView = plane.get("/v1/authority").await;
    view.roots.iter().map(|one| (one.number, one.state)).collect()
}

/// Says what the agent verifies by, as it does every second.
async fn asks(agent: &mut Agent) -> Result<(), tonic::Status> {
    let bundle = agent.identity.bundle();
    let x509_authorities_sha256 = bundle.authorities().iter().map(|root| Digest::of(root).0.to_vec().into()).collect();
    agent.client.read_head(mesh::ReadHeadRequest { x509_authorities_sha256 }).await.map(drop)
}

async fn connects(plane: &Plane, agent: &Agent) -> Result<MeshClient<tonic::transport::Channel>, String> {
    let config = agent.identity.client_config(trust_domain().control(), &[b"h2"]);
    let channel = plane.channel(config).await.map_err(|error| format!("{error:?}"))?;
    let mut client = MeshClient::new(channel);
    client.read_head(mesh::ReadHeadRequest::default()).await.map_err(|status| format!("{status:?}"))?;
    Ok(client)
}

fn verifies(chain: &[bytes::Bytes], bundle: &Bundle) -> bool {
    let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    verify_peer(&chain, bundle, UnixTime::now(), PeerSide::Client).is_ok()
}

async fn bundle_told(stream: &mut support::Stream) -> Bundle {
    loop {
        if let Event::Bundle(bundle) = stream.news().await {
            return Bundle::from_message(&bundle).unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_signed_lives_as_long_as_the_ledger_says_then() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let lives = async |agent: &mut Agent| {
        let chain = agent.issue("web/1").await.unwrap().chain_der;
        let of = |der: &[u8]| {
            let (_, read) = x509_parser::parse_x509_certificate(der).unwrap();
            let validity = read.validity();
            validity.not_after.timestamp() - validity.not_before.timestamp() - 60
        };
        (of(&chain[0]), of(&chain[1]))
    };
    const DAY: i64 = 24 * 60 * 60;
    assert_eq!(lives(&mut agent).await, (3600, 90 * DAY));
    let lifetimes = Lifetimes { svid_seconds: 900, intermediate_days: 30, root_days: 120 };
    plane.apply(1, vec![Change::SetLifetimes { lifetimes }]).await.unwrap();
    assert_eq!(lives(&mut agent).await, (900, 90 * DAY), "what signs keeps what it has");
    step(&plane, AuthorityStep::Prepare).await;
    step(&plane, AuthorityStep::Activate(2)).await;
    assert_eq!(lives(&mut agent).await, (900, 30 * DAY));
    let view: AuthorityView = plane.get("/v1/authority").await;
    let root = &view.roots[1].root;
    assert_eq!((root.not_after_ms - root.not_before_ms) / 1000, 120 * DAY as u64 + 60);
    assert_eq!(view.svid_lifetime_seconds, 900);
    plane.apply(2, vec![Change::RemoveLifetimes {}]).await.unwrap();
    assert_eq!(lives(&mut agent).await.0, 3600);
}

/// PROVES (nothing-rests-on-a-step)
#[tokio::test]
async fn a_root_follows_another_and_whoever_was_there_or_away_gets_through() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let before = plane.invite(None).await.token;
    let (mut here, away) = (plane.agent("h1").await, plane.agent("h2").await);
    let first = Bundle::clone(&here.identity.bundle());
    let by_first = here.issue("web/1").await.unwrap().chain_der;
    let mut stream = here.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;

    let prepared = step(&plane, AuthorityStep::Next).await;
    assert_eq!((prepared.step, prepared.number), (AuthorityStep::Prepare, 2));
    let both = bundle_told(&mut stream).await;
    assert_eq!((both.authorities().len(), both.sequence() > first.sequence()), (2, true));
    let still = here.issue("web/2").await.unwrap().chain_der;
    assert!(verifies(&still, &first) && still.len() == 2, "a prepared root signs nothing");

    let early = step_as(&plane, AuthorityStep::Next, false).await.unwrap_err();
    assert_eq!((early.status, &*early.title), (409, "1 hosts do not hold root 2 yet: h1"));
    here.identity.trust(both.clone());
    asks(&mut here).await.unwrap();
    let active = step(&plane, AuthorityStep::Next).await;
    assert_eq!((active.step, active.number), (AuthorityStep::Activate(2), 2));

    // The first root's bundle alone is enough, as is the second's: nobody has to be told in time.
    let second = Bundle::new(trust_domain(), 9, vec![both.authorities()[1].clone()]).unwrap();
    let by_second = here.issue("web/3").await.unwrap().chain_der;
    assert!(verifies(&by_second, &first) && verifies(&by_second, &second) && verifies(&by_first, &first));
    assert!(!verifies(&by_first, &second));
    let mut came_back = connects(&plane, &away).await.expect("it was away for both steps");
    let csr_der = support::csr().1;
    let renewed = came_back.renew_agent(mesh::RenewAgentRequest { csr_der }).await.unwrap().into_inner();
    assert_eq!(renewed.bundle.unwrap().x509_authorities_der.len(), 2);
    plane.join_seeing(&before, "h3", &first).await.expect("a token of before");
    let now = plane.invite(None).await.token;
    plane.join_seeing(&now, "h4", &second).await.expect("a token of now names the root that signs now");

    for (refused, expected) in [
        (AuthorityStep::Revoke(1), "root 1 is old, and only a root that is tainted"),
        (AuthorityStep::Taint(2), "root 2 is active"),
        (AuthorityStep::Revoke(2), "root 2 is active"),
    ] {
        let problem = step_as(&plane, refused, true).await.unwrap_err();
        assert!(problem.status == 409 && problem.title.starts_with(expected), "{problem:?}");
        assert!(problem.help.is_some());
    }
    step(&plane, AuthorityStep::Taint(1)).await;
    let tainted = loop {
        let told = bundle_told(&mut stream).await;
        if !told.tainted().is_empty() {
            break told;
        }
    };
    let chain = |der: &[bytes::Bytes]| der.iter().map(|der| CertificateDer::from(der.to_vec())).collect::<Vec<_>>();
    assert!(tainted.rests_on_tainted(&chain(&by_first), UnixTime::now()));
    assert!(!tainted.rests_on_tainted(&chain(&by_second), UnixTime::now()));
    assert!(!both.rests_on_tainted(&chain(&by_first), UnixTime::now()));
    asks(&mut here).await.expect("nothing is cut by tainting");

    let resting: Vec<IdentityView> = plane.get("/v1/identities?authority=1").await;
    let refused = step_as(&plane, AuthorityStep::Revoke(1), false).await.unwrap_err();
    let expected =
        format!("{} identities that rest on root 1 have not expired; the last one does in 60 minutes", resting.len());
    assert_eq!((refused.status, refused.title), (409, expected));
    let revoked = step_as(&plane, AuthorityStep::Revoke(1), true).await.unwrap();
    assert_eq!((revoked.cut, states(&plane).await), (resting.len(), BTreeMap::from([(2, AuthorityState::Active)])));
    assert_eq!(bundle_told(&mut stream).await.authorities(), second.authorities());
    assert!(stream.next().await.is_err(), "what rests on it is cut");
    assert_eq!(asks(&mut here).await.unwrap_err().code(), Code::Unauthenticated);
    assert!(connects(&plane, &here).await.is_err());
    plane.join_seeing(&plane.invite(None).await.token, "h1", &second).await.expect("it is invited again");
}

#[tokio::test]
async fn a_control_plane_that_dies_between_two_steps_goes_on_from_the_last_one() {
    let mut plane = Plane::start().await;
    plane.create(&["web"]).await;
    let root: AuthorityView = plane.get("/v1/authority").await;
    let mut reached = Vec::new();
    for next in [
        AuthorityStep::Prepare,
        AuthorityStep::Activate(2),
        AuthorityStep::Prepare,
        AuthorityStep::Taint(1),
        AuthorityStep::Revoke(1),
        AuthorityStep::Revoke(3),
        AuthorityStep::Next,
    ] {
        step_as(&plane, next, true).await.unwrap();
        let before = plane.get::<AuthorityView>("/v1/authority").await;
        plane = plane.restart().await.unwrap();
        let after = plane.get::<AuthorityView>("/v1/authority").await;
        assert_eq!(after, before, "{next:?}");
        reached
            .push(after.roots.iter().map(|one| format!("{} {}", one.number, one.state)).collect::<Vec<_>>().join(", "));
        let mut agent = plane.agent("h1").await;
        agent.issue("web/1").await.unwrap();
        plane = plane.restart().await.unwrap();
    }
    assert_eq!(
        reached,
        [
            "1 active, 2 prepared",
            "1 old, 2 active",
            "1 old, 2 active, 3 prepared",
            "1 tainted, 2 active, 3 prepared",
            "2 active, 3 prepared",
            "2 active",
            "2 active, 4 prepared",
        ]
    );
    assert_eq!(root.roots.len(), 1);
}

#[tokio::test]
async fn a_record_that_is_missing_damaged_or_without_its_root_key_is_said() {
    let damaged = async |what: &str| {
        let plane = Plane::start().await;
        plane.create(&["web"]).await;
        step(&plane, AuthorityStep::Prepare).await;
        let Plane { control, dir } = plane;
        control.stop().await;
        rusqlite::Connection::open(dir.path().join("control.db")).unwrap().execute(what, []).unwrap();
        (start(config(dir.path().into())).await, dir)
    };
    let (gone, _dir) = damaged("DELETE FROM keys WHERE name = 'authority/generations'").await;
    let gone = gone.err().unwrap();
    assert!(matches!(gone, StartError::Authority(_)) && gone.help().unwrap().contains("from a copy"));
    assert_eq!(gone.to_string(), "the authority's stored keys do not fit together: the record of the roots is missing");
    let edited = "UPDATE keys SET bytes = zeroblob(400) WHERE name = 'authority/generations'";
    assert!(matches!(damaged(edited).await.0.err().unwrap(), StartError::Authority(_)));
    let (keyless, dir) = damaged("DELETE FROM keys WHERE name = 'authority/root/key'").await;
    let plane = Plane { control: keyless.expect("its intermediate signs without it"), dir };
    plane.agent("h1").await.issue("web/1").await.unwrap();
    step(&plane, AuthorityStep::Activate(2)).await;
    let chain = plane.agent("h1").await.issue("web/1").await.unwrap().chain_der;
    assert_eq!(chain.len(), 2, "nothing certifies it for those who hold the first root alone");
}

#[tokio::test]
async fn the_schedule_takes_every_step_by_itself_and_writes_it_down() {
    const DAY_MS: u64 = 24 * 60 * 60 * 1000;
    let dir = tempfile::tempdir().unwrap();
    let told = Arc::new(AtomicU64::new(now_ms()));
    let clock = Clock::from_fn({
        let told = told.clone();
        move || told.load(Ordering::Relaxed)
    });
    let trail = dir.path().join("trail");
    let begin = async |dir: tempfile::TempDir| {
        let config = countersign_control::ControlConfig { audit: Some(trail.clone()), ..config(dir.path().into()) };
        Plane { control: start_with_clock(config, clock.clone()).await.unwrap(), dir }
    };
    let mut plane = begin(dir).await;
    plane.create(&["web"]).await;
    let years = 7 * 365 * DAY_MS;
    let written = || -> Vec<String> {
        let trail = std::fs::read_to_string(&trail).unwrap();
        trail.lines().filter(|line| line.contains("a root of the trust domain moved on")).map(str::to_owned).collect()
    };
    for (after_ms, expected, steps) in [
        (0, "1 active", 0),
        (years, "1 active, 2 prepared", 1),
        (DAY_MS - 1, "1 active, 2 prepared", 1),
        (1, "1 old, 2 active", 2),
        (DAY_MS, "1 tainted, 2 active", 3),
        (2 * 60 * 60 * 1000, "2 active", 4),
        (DAY_MS, "2 active", 4),
    ] {
        let Plane { control, dir } = plane;
        control.stop().await;
        told.fetch_add(after_ms, Ordering::Relaxed);
        plane = begin(dir).await;
        let shown = async || {
            let states = states(&plane).await;
            states.iter().map(|(number, state)| format!("{number} {state}")).collect::<Vec<_>>().join(", ")
        };
        let begun = std::time::Instant::now();
        // Told once it is taken: it waits for no disk.
        while shown().await != expected || written().len() < steps {
            assert!(begun.elapsed() < support::WITHIN, "{expected} after {after_ms}, not {}", shown().await);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    let steps: Vec<String> = written();
    assert!(steps.len() == 4 && steps.iter().all(|line| line.contains("schedule")), "{steps:?}");
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// An authority above, of somebody else.
struct Above {
    certificate: CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, KeyPair>,
}

impl Above {
    fn params(common: &str, days: i64) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "DE");
        params.distinguished_name.push(DnType::CommonName, common);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.use_authority_key_identifier_extension = true;
        let now = time::OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - time::Duration::days(3), now + time::Duration::days(days));
        params
    }

    fn root(common: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = Self::params(common, 3000);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: rcgen::Issuer::from_ca_cert_der(&certificate, key).unwrap(), certificate }
    }

    fn below(&self, common: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = Self::params(common, 2000);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { issuer: rcgen::Issuer::from_ca_cert_der(&certificate, key).unwrap(), certificate }
    }

    /// Signs what is asked for, as it is asked but for what `change` does.
    fn sign(&self, csr_pem: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let asked = Self::params("", 1000);
        (request.params.not_before, request.params.not_after) = (asked.not_before, asked.not_after);
        request.params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        change(&mut request.params);
        request.signed_by(&self.issuer).unwrap().der().clone()
    }
}

fn chain_pem(chain: &[&CertificateDer<'_>]) -> String {
    chain.iter().map(|der| countersign_api::svid::pem("CERTIFICATE", der)).collect()
}

async fn request(plane: &Plane, fresh: bool) -> AskedAbove {
    plane.post("/v1/authority/request", &AskAbove { fresh, shown: Default::default() }).await.unwrap()
}

async fn accept(plane: &Plane, chain_pem: String) -> Result<AcceptedAbove, Problem> {
    plane.post("/v1/authority/accept", &AcceptAbove { chain_pem, shown: Default::default() }).await
}

/// PROVES (nothing-above-cuts)
#[tokio::test]
async fn what_an_authority_above_signed_is_refused_unless_everybody_would_verify_it() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let before: AuthorityView = plane.get("/v1/authority").await;
    let (root, other) = (Above::root("root", |_| {}), Above::root("other", |_| {}));
    let between = root.below("between", |_| {});
    let nothing = accept(&plane, chain_pem(&[&root.certificate, &root.certificate])).await.unwrap_err();
    assert_eq!((nothing.status, &*nothing.title), (409, "no authority above was asked for anything"));

    let forgotten = root.sign(&request(&plane, false).await.csr_pem, |_| {});
    let asked = request(&plane, true).await;
    let again = request(&plane, false).await;
    assert_eq!((asked.is_new, again.is_new, &again.csr_pem), (true, false, &asked.csr_pem));
    let csr = &asked.csr_pem;
    let parsed = CertificateSigningRequestParams::from_pem(csr).unwrap().params;
    assert_eq!(parsed.subject_alt_names, [SanType::URI("spiffe://shop.example".try_into().unwrap())]);

    let ours = between.sign(csr, |_| {});
    let day = time::Duration::days(1);
    let now = time::OffsetDateTime::now_utc();
    let same_name = Above::root("root", |_| {});
    let short =
        |days: u8| Above::root("root", move |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(days)));
    let narrow = short(1);
    let wide = short(2);
    let deep = wide.below("between", |_| {});
    let constrained = |subtree: GeneralSubtree| {
        Above::root("root", |params| {
            params.name_constraints =
                Some(NameConstraints { permitted_subtrees: vec![subtree], excluded_subtrees: Vec::new() });
        })
    };
    let by_subject = constrained(GeneralSubtree::DirectoryName({
        let mut name = rcgen::DistinguishedName::new();
        name.push(DnType::OrganizationName, "Countersign");
        name
    }));
    let no_keys = Above::root("root", |params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
    let edits: [(&str, CertificateDer<'_>, &Above, &str); 13] = [
        (
            "another key",
            forgotten,
            &root,
            "no certificate of the chain is of the key that was asked for; the first is `",
        ),
        (
            "no CA",
            root.sign(csr, |p| p.is_ca = IsCa::ExplicitNoCa),
            &root,
            "is no signing certificate: it says no CA:TRUE",
        ),
        (
            "nothing said",
            root.sign(csr, |p| p.is_ca = IsCa::NoCa),
            &root,
            "is no signing certificate: it says no CA:TRUE",
        ),
        (
            "no keyCertSign",
            root.sign(csr, |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]),
            &root,
            "is no signing certificate: it says no keyCertSign",
        ),
        (
            "a root without",
            no_keys.sign(csr, |_| {}),
            &no_keys,
            "`C=DE, CN=root` is no signing certificate: it says no keyCertSign",
        ),
        (
            "no level below",
            root.sign(csr, |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))),
            &root,
            "allows 0 signing certificates below it, and 1 are there",
        ),
        (
            "too few levels below the root",
            narrow.sign(csr, |_| {}),
            &narrow,
            "`C=DE, CN=root` allows 1 signing certificates below it, and 2 are there",
        ),
        ("expired", root.sign(csr, |p| p.not_after = now - day), &root, "expired on "),
        ("ends tomorrow", root.sign(csr, |p| p.not_after = now + day), &root, "too soon"),
        ("not yet", root.sign(csr, |p| p.not_before = now + day), &root, "is not valid before "),
        (
            "another trust domain",
            root.sign(csr, |p| p.subject_alt_names = vec![SanType::URI("spiffe://bank.example".try_into().unwrap())]),
            &root,
            "names `spiffe://bank.example`, and a signing certificate of this mesh names `spiffe://shop.example` or nothing",
        ),
        ("held to subjects", by_subject.sign(csr, |_| {}), &by_subject, "`C=DE, CN=root` constrains names by subjects"),
        ("a key of that name", root.sign(csr, |_| {}), &same_name, "is not that of the certificate that follows it"),
    ];
    let mut cases: Vec<(&str, String, &str)> = edits
        .iter()
        .map(|(what, ours, above, expected)| (*what, chain_pem(&[ours, &above.certificate]), *expected))
        .collect();
    let (by_between, by_root) = (&between.certificate, &root.certificate);
    let direct = root.sign(csr, |_| {});
    cases.extend([
        ("no PEM", "certificates".to_owned(), "the chain has 0 certificates, and needs 2 to 4"),
        ("PEM of nothing", countersign_api::svid::pem("CERTIFICATE", b"0").repeat(2), "the chain cannot be read: "),
        (
            "broken off",
            chain_pem(&[&ours, by_between, by_root]).replace("-----END", "-----"),
            "the chain cannot be read: ",
        ),
        ("too long", chain_pem(&[&ours, by_between, by_root]).repeat(60), "it is longer than 64 KiB"),
        ("alone", chain_pem(&[&ours]), "the chain has 1 certificates"),
        (
            "without its root",
            chain_pem(&[&ours, by_between]),
            "the chain ends with `C=DE, CN=between`, which was signed by `C=DE, CN=root`",
        ),
        (
            "one left out",
            chain_pem(&[&ours, by_root]),
            "was signed by `C=DE, CN=between`, and is followed by `C=DE, CN=root`",
        ),
        (
            "the other way round",
            chain_pem(&[by_root, by_between, &ours]),
            "is number 3 of the chain, and has to be the first",
        ),
        (
            "two swapped",
            chain_pem(&[&ours, by_root, by_between]),
            "was signed by `C=DE, CN=between`, and is followed by `C=DE, CN=root`",
        ),
        (
            "of another root",
            chain_pem(&[&ours, by_between, &other.certificate]),
            "was signed by `C=DE, CN=root`, and is followed by `C=DE, CN=other`",
        ),
        (
            "of another key",
            chain_pem(&[&ours, by_between, &same_name.certificate]),
            "the signature of `C=DE, CN=between` is not that of",
        ),
        (
            "with a level too many",
            chain_pem(&[&deep.sign(csr, |_| {}), &deep.certificate, &wide.certificate]),
            "`C=DE, CN=root` allows 2 signing certificates below it, and 3 are there",
        ),
        ("deep", chain_pem(&[&ours, by_between, by_root, by_root, by_root]), "the chain has 5 certificates"),
    ]);
    for (what, chain, expected) in cases {
        let refused = accept(&plane, chain).await.expect_err(what);
        assert!(refused.status == 422 && refused.title.contains(expected), "{what}: {refused:?}");
        assert!(refused.help.is_some(), "{what}");
    }
    let mut unchanged: AuthorityView = plane.get("/v1/authority").await;
    assert!(unchanged.requested_at_ms.take().is_some());
    assert_eq!(
        AuthorityView { bundle_sequence: 0, ..unchanged },
        AuthorityView { bundle_sequence: 0, ..before },
        "nothing of it was kept"
    );
    let dns = constrained(GeneralSubtree::DnsName("shop.example".into()));
    let held_to_names_that_nobody_has = chain_pem(&[&dns.sign(csr, |_| {}), &dns.certificate]);
    accept(&plane, held_to_names_that_nobody_has).await.unwrap();
    assert_eq!(accept(&plane, chain_pem(&[&direct, by_root])).await.unwrap_err().status, 409, "it was answered");
}

#[tokio::test]
async fn an_authority_above_takes_over_renews_and_is_left_again_and_nobody_is_cut() {
    let mut plane = Plane::start().await;
    plane.create(&["web"]).await;
    let token = plane.invite(None).await.token;
    let (mut here, away) = (plane.agent("h1").await, plane.agent("h2").await);
    let own = Bundle::clone(&here.identity.bundle());
    let root = Above::root("root", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(3)));
    let between = root.below("between", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(2)));
    let chain = |csr: &str| {
        // Many authorities leave out what they are asked to call it.
        let ours = between.sign(csr, |params| params.subject_alt_names.clear());
        chain_pem(&[&ours, &between.certificate, &root.certificate])
    };
    let answer = chain(&request(&plane, false).await.csr_pem);
    plane = plane.restart().await.unwrap();
    here = plane.agent("h1").await;
    let mut stream = here.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let accepted = accept(&plane, answer).await.unwrap();
    assert_eq!((accepted.number, accepted.renewed), (2, false));
    assert_eq!(states(&plane).await[&2], AuthorityState::Prepared);
    let waits = step_as(&plane, AuthorityStep::Prepare, false).await.unwrap_err();
    assert_eq!(waits.title, "root 2 is prepared already");

    let both = bundle_told(&mut stream).await;
    let lacks = step_as(&plane, AuthorityStep::Activate(2), false).await.unwrap_err();
    assert_eq!(lacks.title, "1 hosts do not hold root 2 yet: h1");
    here.identity.trust(both.clone());
    asks(&mut here).await.unwrap();
    step(&plane, AuthorityStep::Next).await;
    let above = Bundle::new(trust_domain(), 9, vec![root.certificate.clone()]).unwrap();
    let svid = here.issue("web/1").await.unwrap().chain_der;
    assert!(verifies(&svid, &above) && verifies(&svid, &own), "whoever holds one of the roots verifies it");
    connects(&plane, &away).await.expect("it was away for both steps");
    plane.join_seeing(&token, "h3", &own).await.expect("a token of before");
    plane.join_seeing(&plane.invite(None).await.token, "h4", &above).await.expect("a token of now");
    let next = step_as(&plane, AuthorityStep::Next, false).await.unwrap_err();
    assert!(next.title.contains("of an authority above") && next.help.is_some());

    // The same root again: what it signed before is replaced at once, and both verify.
    let answer = chain(&request(&plane, false).await.csr_pem);
    let renewed = accept(&plane, answer).await.unwrap();
    assert_eq!((renewed.number, renewed.renewed), (2, true));
    let after = here.issue("web/2").await.unwrap().chain_der;
    assert!(after[1..] != svid[1..] && verifies(&after, &above) && verifies(&svid, &above) && verifies(&after, &own));
    plane = plane.restart().await.unwrap();
    let view: AuthorityView = plane.get("/v1/authority").await;
    assert_eq!((view.roots[1].above.len(), view.requested_at_ms), (2, None));

    // Another authority above, in its place: both ways up fit into one chain.
    step(&plane, AuthorityStep::Taint(1)).await;
    step_as(&plane, AuthorityStep::Revoke(1), true).await.unwrap();
    let asked = request(&plane, false).await.csr_pem;
    let known = accept(&plane, chain_pem(&[&root.sign(&asked, |_| {}), &root.certificate])).await.unwrap();
    assert!(known.renewed, "it may sign directly as well");
    let asked = request(&plane, false).await.csr_pem;
    let second = Above::root("second", |_| {});
    let b = second.below("b", |_| {});
    let c = b.below("c", |_| {});
    let answer = chain_pem(&[&c.sign(&asked, |_| {}), &c.certificate, &b.certificate, &second.certificate]);
    let accepted = accept(&plane, answer).await.unwrap();
    assert_eq!((accepted.number, accepted.renewed), (3, false));
    let mut here = plane.agent("h1").await;
    step(&plane, AuthorityStep::Activate(3)).await;
    let newest = Bundle::new(trust_domain(), 9, vec![second.certificate.clone()]).unwrap();
    let svid = here.issue("web/3").await.unwrap().chain_der;
    assert!(verifies(&svid, &newest) && verifies(&svid, &above), "{}", svid.len());
    plane.join_seeing(&plane.invite(None).await.token, "h5", &above).await.expect("control shows both");

    // Back to a root of the mesh's own, which the authority above leads to.
    step(&plane, AuthorityStep::Taint(2)).await;
    step_as(&plane, AuthorityStep::Revoke(2), true).await.unwrap();
    step(&plane, AuthorityStep::Prepare).await;
    step(&plane, AuthorityStep::Activate(4)).await;
    let mut here = plane.agent("h1").await;
    let svid = here.issue("web/4").await.unwrap().chain_der;
    assert!(verifies(&svid, &newest) && verifies(&svid, &plane.bundle().await));
}
