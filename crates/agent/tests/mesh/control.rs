//! A control plane for tests: real TLS, real gRPC, a real ledger; it signs what it is asked to and can be told to lie.
//! Keeps nothing on disk: one that is stopped can be served again on the same address.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::AtomicBool, atomic::AtomicI64, atomic::AtomicU64, atomic::Ordering},
};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use countersign_api::{
    mesh::{
        self, FollowEvent, FollowRequest, IssueJwtSvidRequest, IssueJwtSvidResponse, IssueTokensRequest,
        IssueTokensResponse, IssueX509SvidRequest, IssueX509SvidResponse, JoinRequest, JoinResponse,
        ProbeTelemetryRequest, ProbeTelemetryResponse, RenewAgentRequest,
        enrolment_server::{Enrolment, EnrolmentServer},
        follow_event::Event,
        follow_request::Message,
        mesh_server::{Mesh, MeshServer},
    },
    svid::{Bundle, ClientCertificate, JwtAuthority, TlsIdentity, X509Svid},
};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet},
    countersignature::Countersignature,
    identity::{InstanceId, ServiceName, SpiffeId, TrustDomain},
    keyring::{Keyring, Pins},
    ledger::{Batch, Follower},
    service::{Protocol, ServiceSpec},
    token::{Thumbprint, TokenId},
};
use futures_util::{Stream, StreamExt};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// The name of the key that signs JWT-SVIDs.
const JWT_KEY_ID: &str = "jwt-1";

type Authority = CertifiedIssuer<'static, KeyPair>;
/// A root and what signs below it.
type Root = (Authority, Authority);
/// What one agent is told.
type Told = mpsc::Sender<Result<FollowEvent, Status>>;

/// The control plane.
pub struct Control {
    pub trust_domain: TrustDomain,
    root: Authority,
    issuing: Authority,
    /// The root that signs in its place, and what signs below it; and whether the first is tainted.
    next: Mutex<Option<(Arc<Root>, bool)>>,
    /// What it shows, and verifies agents by.
    tls: Mutex<Option<Arc<TlsIdentity>>>,
    jwt: EcdsaKeyPair,
    ledger: Mutex<Ledger>,
    /// What some hosts are shown in place of the ledger.
    shown_to: Mutex<BTreeMap<String, Ledger>>,
    streams: Mutex<Vec<(String, Told)>>,
    discovery: Mutex<(u64, BTreeMap<String, mesh::Endpoint>)>,
    /// The number of the last signal, and what is revoked.
    revoked: Mutex<(u64, Vec<mesh::Revocation>)>,
    /// Gives nonces for probes.
    pub probes_telemetry: AtomicBool,
    /// The nonces that were given, and for which instance.
    pub probes: Mutex<Vec<(String, [u8; 16])>>,
    /// Everything agents said, in order.
    pub said: Mutex<Vec<Message>>,
    /// How long access tokens live, in seconds; 0: none is issued.
    pub token_seconds: AtomicI64,
    /// The scope of each access token that is issued, by its audience.
    pub scopes: Mutex<BTreeMap<String, String>>,
    /// Which access tokens are revoked.
    tokens_revoked: Mutex<Vec<mesh::TokenRevocation>>,
    /// Join tokens that were shown.
    pub shown: Mutex<Vec<String>>,
    tokens: Mutex<Vec<String>>,
    /// How long the SVIDs of instances live, in seconds.
    pub svid_seconds: AtomicI64,
    /// Instances that were given an SVID, in order.
    pub issued: Mutex<Vec<String>>,
    /// Welcomes agents with another root than the ledger's.
    pub lies_about_root: AtomicBool,
    /// Welcomes cold agents with a state, whatever the state.
    pub sends_snapshots: AtomicBool,
    /// Asked for an SVID, it does not answer.
    pub withholds_svids: AtomicBool,
    /// So long is its answer to what it holds on its way, in milliseconds.
    pub head_takes_ms: AtomicU64,
    /// So long takes each event of a stream after the one before it, in milliseconds.
    pub event_takes_ms: AtomicU64,
}

#[derive(Clone, Default)]
pub struct Ledger {
    pub follower: Follower,
    /// What the operators see who verify it: only what they stand behind.
    pub keyring: Keyring,
    entries: Vec<Bytes>,
    change_sets: Vec<Bytes>,
    bodies: Bodies,
}

/// A control plane that is being served. Dropped, it is gone.
pub struct Served {
    pub address: SocketAddr,
    task: JoinHandle<()>,
    control: Arc<Control>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
        self.control.streams.lock().clear();
    }
}

fn at(offset: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::seconds(offset)
}

fn uri(id: &SpiffeId) -> SanType {
    SanType::URI(id.as_str().try_into().unwrap())
}

fn signing(name: &str, own: &TrustDomain) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, format!("{name} {}", fastrand::u64(..)));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![uri(&own.id())];
    (params.not_before, params.not_after) = (at(-86_400), at(86_400));
    params
}

fn leaf(id: &SpiffeId, seconds: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    // As the real authority says it: the crate `spiffe` reads no leaf without.
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(id)];
    params.serial_number = Some((u128::from(fastrand::u64(..)) | 0x40 << 120).to_be_bytes().to_vec().into());
    (params.not_before, params.not_after) = (at(-60), at(seconds));
    params
}

pub fn name(given: &str) -> ServiceName {
    ServiceName::parse(given).unwrap()
}

pub fn declare(service: &str) -> Change {
    Change::DeclareService { name: name(service), spec: ServiceSpec::new(Protocol::Http) }
}

impl Control {
    /// A mesh with one entry.
    pub fn new() -> Arc<Self> {
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let root = CertifiedIssuer::self_signed(signing("root", &trust_domain), KeyPair::generate().unwrap()).unwrap();
        let issuing =
            CertifiedIssuer::signed_by(signing("issuing", &trust_domain), KeyPair::generate().unwrap(), &root).unwrap();
        let control = Arc::new(Self {
            trust_domain: trust_domain.clone(),
            root,
            issuing,
            next: Mutex::default(),
            tls: Mutex::default(),
            jwt: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            ledger: Mutex::default(),
            shown_to: Mutex::default(),
            streams: Mutex::default(),
            discovery: Mutex::new((1, BTreeMap::new())),
            revoked: Mutex::default(),
            probes_telemetry: AtomicBool::new(false),
            probes: Mutex::default(),
            said: Mutex::default(),
            shown: Mutex::default(),
            tokens: Mutex::default(),
            svid_seconds: AtomicI64::new(3600),
            token_seconds: AtomicI64::new(300),
            scopes: Mutex::default(),
            tokens_revoked: Mutex::default(),
            issued: Mutex::default(),
            lies_about_root: AtomicBool::new(false),
            sends_snapshots: AtomicBool::new(false),
            withholds_svids: AtomicBool::new(false),
            head_takes_ms: AtomicU64::new(0),
            event_takes_ms: AtomicU64::new(0),
        });
        control.append(vec![Change::CreateMesh { trust_domain }], &[]);
        control
    }

    /// A token that can be used once.
    pub fn token(&self) -> String {
        let secret = URL_SAFE_NO_PAD.encode(fastrand::u128(..).to_be_bytes());
        let mut token = format!("csj1.{secret}.{}", URL_SAFE_NO_PAD.encode(Digest::of(self.root.der()).0));
        let Pins { anchor, seal, recovery } = self.ledger.lock().keyring.pins();
        for pin in [anchor, seal, recovery].into_iter().flatten() {
            token = format!("{token}.{}", URL_SAFE_NO_PAD.encode(pin.0));
        }
        self.tokens.lock().push(token.clone());
        token
    }

    fn bundle(&self) -> Bundle {
        let jwt = JwtAuthority { key_id: JWT_KEY_ID.into(), point: self.jwt.public_key().as_ref().to_vec() };
        let (mut roots, mut tainted, mut sequence) = (vec![self.root.der().clone()], Vec::new(), 1);
        if let Some((next, is_tainted)) = &*self.next.lock() {
            roots.push(next.0.der().clone());
            tainted.extend(is_tainted.then(|| Digest::of(&roots[0])));
            sequence += 1 + u64::from(*is_tainted);
        }
        let bundle = Bundle::new(self.trust_domain.clone(), sequence, roots).unwrap();
        bundle.with_jwt_authorities(vec![jwt]).with_tainted(tainted)
    }

    /// Another root signs from now on; the first one is tainted, or not yet.
    pub fn rotate(&self, taint: bool) {
        let made = || {
            let own = &self.trust_domain;
            let root = CertifiedIssuer::self_signed(signing("root", own), KeyPair::generate().unwrap()).unwrap();
            let key = KeyPair::generate().unwrap();
            let issuing = CertifiedIssuer::signed_by(signing("issuing", own), key, &root).unwrap();
            Arc::new((root, issuing))
        };
        let mut next = self.next.lock();
        let signs = next.take().map_or_else(made, |(signs, _)| signs);
        *next = Some((signs.clone(), taint));
        drop(next);
        if let Some(tls) = &*self.tls.lock() {
            tls.trust(self.bundle());
            tls.renew(self.own_svid(&signs.0, &signs.1));
        }
        self.tell(Event::Bundle(self.bundle().to_message()));
    }

    fn own_svid(&self, root: &Authority, issuing: &Authority) -> X509Svid {
        let key = KeyPair::generate().unwrap();
        let own = leaf(&self.trust_domain.control(), 3600).signed_by(&key, issuing).unwrap();
        let chain = vec![own.der().clone(), issuing.der().clone(), root.der().clone()];
        X509Svid::parse(chain, key.serialize_der()).unwrap()
    }

    fn sign_token(&self, typ: &str, claims: &serde_json::Value) -> String {
        let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = serde_json::json!({ "alg": "ES256", "kid": JWT_KEY_ID, "typ": typ });
        let input = format!("{}.{}", part(&header), part(claims));
        let signature = self.jwt.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// Appends an entry and tells every agent. Returns the revision.
    pub fn append(&self, changes: Vec<Change>, texts: &[&str]) -> u64 {
        let mut ledger = self.ledger.lock();
        for text in texts {
            ledger.bodies.insert(*text);
        }
        let set = ChangeSet { base: ledger.follower.revision(), changes };
        ledger.append("local", &set, &[]);
        let size = ledger.follower.revision().0;
        let entries = ledger.after(size - 1);
        drop(ledger);
        self.tell(Event::Entries(entries));
        size
    }

    /// Forgets the last `count` entries, as a control plane restored from an old copy would.
    pub fn forget(&self, count: usize) {
        let mut ledger = self.ledger.lock();
        let kept = ledger.entries.len() - count;
        let old = std::mem::take(&mut *ledger);
        let mut follower = Follower::default();
        let (entries, change_sets) = (old.entries[..kept].to_vec(), old.change_sets[..kept].to_vec());
        for (entry, set) in entries.iter().zip(&change_sets) {
            let at_ms = countersign_core::ledger::Entry::parse(entry).unwrap().at_ms;
            let set: ChangeSet = serde_json::from_slice(set).unwrap();
            follower = follower.draft(at_ms, "local", &set, &old.bodies).unwrap().next;
        }
        *ledger = Ledger { follower, entries, change_sets, bodies: old.bodies, keyring: old.keyring };
    }

    /// The ledger as it is.
    pub fn ledger(&self) -> Ledger {
        self.ledger.lock().clone()
    }

    /// Has another ledger from now on, and tells every agent what it has beyond the one before.
    pub fn show(&self, ledger: Ledger) {
        let before = std::mem::replace(&mut *self.ledger.lock(), ledger.clone());
        let size = before.follower.revision().0.min(ledger.follower.revision().0);
        self.tell(Event::Entries(ledger.after(size)));
    }

    /// Shows one host another ledger than the others.
    pub fn show_to(&self, host: &str, ledger: Ledger) {
        let before = self.shown_to.lock().insert(host.to_owned(), ledger.clone());
        let before = before.unwrap_or_else(|| self.ledger());
        let size = before.follower.revision().0.min(ledger.follower.revision().0);
        let event = FollowEvent { event: Some(Event::Entries(ledger.after(size))) };
        self.streams.lock().retain(|(to, stream)| to != host || stream.try_send(Ok(event.clone())).is_ok());
    }

    fn ledger_for(&self, host: &str) -> Ledger {
        self.shown_to.lock().get(host).cloned().unwrap_or_else(|| self.ledger())
    }

    /// Sends the next entry with a change-set that is not the one that it names.
    pub fn send_forged(&self, changes: Vec<Change>) {
        let ledger = self.ledger.lock();
        let base = ledger.follower.revision();
        let honest = ChangeSet { base, changes: vec![declare("honest")] };
        let draft = ledger.follower.draft(1, "local", &honest, &ledger.bodies).unwrap();
        let forged = countersign_core::canonical::encode(&ChangeSet { base, changes });
        let entries = mesh::Entries {
            first_index: base.0,
            entries: vec![draft.bytes.into()],
            change_sets: vec![forged.into()],
            bodies: Vec::new(),
            size: base.0 + 1,
            root: draft.next.root().0.to_vec().into(),
        };
        drop(ledger);
        self.tell(Event::Entries(entries));
    }

    /// An event to every agent.
    pub fn tell(&self, event: Event) {
        let event = FollowEvent { event: Some(event) };
        let apart = self.shown_to.lock();
        let passes_by = |host: &String| matches!(event.event, Some(Event::Entries(_))) && apart.contains_key(host);
        self.streams.lock().retain(|(host, stream)| passes_by(host) || stream.try_send(Ok(event.clone())).is_ok());
    }

    /// An instance elsewhere comes up.
    pub fn discover(&self, instance: &str, address: &str) {
        let endpoint = mesh::Endpoint { instance: instance.into(), address: address.into(), ready: true };
        let sequence = {
            let mut discovery = self.discovery.lock();
            discovery.0 += 1;
            discovery.1.insert(instance.into(), endpoint.clone());
            discovery.0
        };
        self.tell(Event::Discovery(mesh::Discovery { sequence, full: false, up: vec![endpoint], down: vec![] }));
    }

    /// Revokes a certificate.
    pub fn revoke(&self, certificate: &[u8]) {
        let (_, read) = x509_parser::parse_x509_certificate(certificate).unwrap();
        let expires_at_ms = read.validity().not_after.timestamp() as u64 * 1000;
        let one = mesh::Revocation { serial: read.raw_serial().to_vec().into(), expires_at_ms };
        let mut revoked = self.revoked.lock();
        revoked.0 += 1;
        revoked.1.push(one.clone());
        let (after, sequence) = (revoked.0 - 1, revoked.0);
        let signals = mesh::Signals { after, sequence, revoked: vec![one], ..mesh::Signals::default() };
        self.tell(Event::Signals(signals));
    }

    /// Revokes the access tokens that are meant and were issued until now.
    pub fn revoke_tokens(&self, meant: &str) {
        let issued_until_ms = (at(0).unix_timestamp_nanos() / 1_000_000) as u64;
        let one =
            mesh::TokenRevocation { meant: meant.into(), issued_until_ms, expires_at_ms: issued_until_ms + 600_000 };
        let mut revoked = self.revoked.lock();
        revoked.0 += 1;
        self.tokens_revoked.lock().push(one.clone());
        let (after, sequence) = (revoked.0 - 1, revoked.0);
        let signals = mesh::Signals { after, sequence, tokens_revoked: vec![one], ..mesh::Signals::default() };
        self.tell(Event::Signals(signals));
    }

    /// Ends every stream.
    pub fn hang_up(&self) {
        self.streams.lock().clear();
    }

    /// Agents connected.
    pub fn stream_count(&self) -> usize {
        self.streams.lock().len()
    }

    /// Serves on `address`.
    pub async fn serve(self: &Arc<Self>, address: SocketAddr) -> Served {
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        };
        let address = listener.local_addr().unwrap();
        let identity = TlsIdentity::new(self.own_svid(&self.root, &self.issuing), self.bundle());
        *self.tls.lock() = Some(identity.clone());
        let tls = tokio_rustls::TlsAcceptor::from(identity.server_config(ClientCertificate::Optional, &[b"h2"]));
        let routes = tonic::service::Routes::new(EnrolmentServer::new(Service(self.clone())))
            .add_service(MeshServer::new(Service(self.clone())));
        let beating = self.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            let mut beat = tokio::time::interval(std::time::Duration::from_millis(300));
            loop {
                tokio::select! {
                    _ = beat.tick() => beating.heartbeat(),
                    Ok((tcp, _)) = listener.accept() => {
                        let (tls, routes) = (tls.clone(), routes.clone());
                        connections.spawn(async move {
                            let Ok(stream) = tls.accept(tcp).await else { return };
                            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
                                .await;
                        });
                    }
                }
            }
        });
        Served { address, task, control: self.clone() }
    }

    fn heartbeat(&self) {
        let (discovery_sequence, signal_sequence) = (self.discovery.lock().0, self.revoked.lock().0);
        self.streams.lock().retain(|(host, stream)| {
            let follower = self.ledger_for(host).follower;
            let (size, root) = (follower.revision().0, follower.root().0.to_vec().into());
            let heartbeat = Event::Heartbeat(mesh::Heartbeat { size, root, discovery_sequence, signal_sequence });
            stream.try_send(Ok(FollowEvent { event: Some(heartbeat) })).is_ok()
        });
    }

    fn sign(&self, csr_der: &Bytes, id: &SpiffeId, seconds: i64) -> IssueX509SvidResponse {
        let mut request = CertificateSigningRequestParams::from_der(&csr_der.to_vec().into()).unwrap();
        request.params = leaf(id, seconds);
        let next = self.next.lock().as_ref().map(|(signs, _)| signs.clone());
        let issuing = next.as_ref().map_or(&self.issuing, |signs| &signs.1);
        let signed = request.signed_by(issuing).unwrap();
        let chain: [&CertificateDer<'_>; 2] = [signed.der(), issuing.der()];
        IssueX509SvidResponse {
            chain_der: chain.iter().map(|der| Bytes::copy_from_slice(der)).collect(),
            bundle: Some(self.bundle().to_message()),
        }
    }

    fn welcome(&self, host: &str, held: u64) -> mesh::Welcome {
        let ledger = self.ledger_for(host);
        let whole = ledger.follower.state().is_protected() && !self.sends_snapshots.load(Ordering::Relaxed);
        let snapshot =
            (held == 0 && !whole).then(|| ledger.follower.snapshot()).flatten().map(|snapshot| mesh::Snapshot {
                revision: snapshot.revision.0,
                state_json: snapshot.state.into(),
                bodies: snapshot.bodies.iter().map(|(_, text)| text.to_string()).collect(),
                frontier: snapshot.frontier.into_iter().map(Bytes::from).collect(),
                last_entry: snapshot.last_entry.into(),
                keyring_json: Bytes::new(),
            });
        let size = ledger.follower.revision().0;
        let mut entries = ledger.after(if held == 0 && !whole { size } else { held.min(size) });
        if self.lies_about_root.load(Ordering::Relaxed) {
            entries.root = vec![7; 32].into();
        }
        let (discovery, revoked) = (self.discovery.lock(), self.revoked.lock());
        mesh::Welcome {
            head: Some(mesh::Head { size, discovery_sequence: discovery.0, signal_sequence: revoked.0 }),
            signals: Some(mesh::Signals {
                after: 0,
                sequence: revoked.0,
                full: true,
                revoked: revoked.1.clone(),
                tokens_revoked: self.tokens_revoked.lock().clone(),
                stated: Vec::new(),
            }),
            snapshot,
            entries: Some(entries),
            discovery: Some(mesh::Discovery {
                sequence: discovery.0,
                full: true,
                up: discovery.1.values().cloned().collect(),
                down: vec![],
            }),
            bundle: Some(self.bundle().to_message()),
        }
    }
}

impl Ledger {
    /// Appends an entry that any control plane can make, whoever stands behind it and however old its change-set is.
    pub fn append(&mut self, actor: &str, set: &ChangeSet, countersignatures: &[Countersignature]) {
        let moved = ChangeSet { base: self.follower.revision(), ..set.clone() };
        let mut entry = self.follower.draft(1, actor, &moved, &self.bodies).unwrap().entry;
        entry.digest = set.digest();
        if !countersignatures.is_empty() {
            entry.format = 2;
            entry.countersignatures = countersignatures.to_vec();
        }
        let (bytes, set) = (entry.encode(), countersign_core::canonical::encode(set));
        let size = self.follower.revision().0 + 1;
        let mut tree = countersign_core::ledger::Frontier::default();
        self.entries.iter().for_each(|entry| tree.append(countersign_core::ledger::hash_leaf(entry)));
        tree.append(countersign_core::ledger::hash_leaf(&bytes));
        let (entries, change_sets) = ([&bytes[..]], [&set[..]]);
        let (bodies, root) = (&self.bodies, tree.root());
        let batch = Batch { first_index: size - 1, entries: &entries, change_sets: &change_sets, bodies, size, root };
        self.follower.extend(&batch).unwrap();
        let _ = self.keyring.take(&bytes, &set);
        self.entries.push(bytes.into());
        self.change_sets.push(set.into());
    }

    /// The ledger that ended after `size` entries.
    pub fn cut(&self, size: u64) -> Self {
        let mut cut = Self { bodies: self.bodies.clone(), ..Self::default() };
        for (bytes, set) in self.entries.iter().zip(&self.change_sets).take(size as usize) {
            let entry = countersign_core::ledger::Entry::parse(bytes).unwrap();
            let set = serde_json::from_slice(set).unwrap();
            cut.append(&entry.actor, &set, &entry.countersignatures);
        }
        cut
    }

    fn after(&self, held: u64) -> mesh::Entries {
        mesh::Entries {
            first_index: held,
            entries: self.entries[held as usize..].to_vec(),
            change_sets: self.change_sets[held as usize..].to_vec(),
            bodies: self.bodies.iter().map(|(_, text)| text.to_string()).collect(),
            size: self.follower.revision().0,
            root: self.follower.root().0.to_vec().into(),
        }
    }
}

struct Service(Arc<Control>);

#[tonic::async_trait]
impl Enrolment for Service {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        self.0.shown.lock().push(request.token.clone());
        let mut tokens = self.0.tokens.lock();
        let Some(at) = tokens.iter().position(|token| *token == request.token) else {
            return Err(Status::unauthenticated("the join token was used before; a token is good for one join"));
        };
        tokens.remove(at);
        let id = self.0.trust_domain.agent(&name(&request.host));
        Ok(Response::new(JoinResponse { svid: Some(self.0.sign(&request.csr_der, &id, 3600)) }))
    }
}

#[tonic::async_trait]
impl Mesh for Service {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<FollowEvent, Status>> + Send>>;

    async fn follow(&self, request: Request<Streaming<FollowRequest>>) -> Result<Response<Self::FollowStream>, Status> {
        let mut said = request.into_inner();
        let hello = match said.message().await?.and_then(|first| first.message) {
            Some(Message::Hello(hello)) => hello,
            _ => return Err(Status::invalid_argument("no hello")),
        };
        let (tell, events) = mpsc::channel(1024);
        let welcome = Event::Welcome(self.0.welcome(&hello.host, hello.revision));
        tell.try_send(Ok(FollowEvent { event: Some(welcome) })).unwrap();
        self.0.streams.lock().push((hello.host.clone(), tell));
        self.0.said.lock().push(Message::Hello(hello));
        let control = self.0.clone();
        tokio::spawn(async move {
            while let Ok(Some(FollowRequest { message: Some(message) })) = said.message().await {
                control.said.lock().push(message);
            }
        });
        let control = self.0.clone();
        let events = ReceiverStream::new(events).then(move |event| {
            let takes = std::time::Duration::from_millis(control.event_takes_ms.load(Ordering::Relaxed));
            async move {
                tokio::time::sleep(takes).await;
                event
            }
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn read_head(&self, _: Request<mesh::ReadHeadRequest>) -> Result<Response<mesh::Head>, Status> {
        let size = self.0.ledger.lock().follower.revision().0;
        let (discovery_sequence, signal_sequence) = (self.0.discovery.lock().0, self.0.revoked.lock().0);
        let head = mesh::Head { size, discovery_sequence, signal_sequence };
        let takes = std::time::Duration::from_millis(self.0.head_takes_ms.load(Ordering::Relaxed));
        tokio::time::sleep(takes).await;
        Ok(Response::new(head))
    }

    async fn issue_x509_svid(
        &self,
        request: Request<IssueX509SvidRequest>,
    ) -> Result<Response<IssueX509SvidResponse>, Status> {
        let request = request.into_inner();
        let instance = InstanceId::parse(&request.instance).unwrap();
        while self.0.withholds_svids.load(Ordering::Relaxed) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        self.0.issued.lock().push(request.instance);
        let id = self.0.trust_domain.workload(&instance.service());
        Ok(Response::new(self.0.sign(&request.csr_der, &id, self.0.svid_seconds.load(Ordering::Relaxed))))
    }

    async fn issue_jwt_svid(
        &self,
        request: Request<IssueJwtSvidRequest>,
    ) -> Result<Response<IssueJwtSvidResponse>, Status> {
        let IssueJwtSvidRequest { instance, audience, .. } = request.into_inner();
        let id = self.0.trust_domain.workload(&InstanceId::parse(&instance).unwrap().service());
        let now = at(0).unix_timestamp();
        let claims = serde_json::json!({ "sub": id, "aud": audience, "iat": now, "exp": now + 300 });
        let token = self.0.sign_token("JWT", &claims);
        let ms = |seconds: i64| seconds.unsigned_abs() * 1000;
        self.0.issued.lock().push(format!("{instance} for {}", audience.join(" ")));
        Ok(Response::new(IssueJwtSvidResponse { token, issued_at_ms: ms(now), expires_at_ms: ms(now + 300) }))
    }

    async fn probe_telemetry(
        &self,
        asked: Request<ProbeTelemetryRequest>,
    ) -> Result<Response<ProbeTelemetryResponse>, Status> {
        if !self.0.probes_telemetry.load(Ordering::Relaxed) {
            return Err(Status::unavailable("not in this test"));
        }
        let nonce: [u8; 16] = fastrand::u128(1..).to_be_bytes();
        self.0.probes.lock().push((asked.into_inner().instance, nonce));
        Ok(Response::new(ProbeTelemetryResponse { nonce: Bytes::copy_from_slice(&nonce) }))
    }

    async fn issue_tokens(
        &self,
        request: Request<IssueTokensRequest>,
    ) -> Result<Response<IssueTokensResponse>, Status> {
        let IssueTokensRequest { instance, leaf_der, .. } = request.into_inner();
        let lives = self.0.token_seconds.load(Ordering::Relaxed);
        if lives == 0 {
            return Err(Status::unavailable("not now"));
        }
        let (now_ms, own) = ((at(0).unix_timestamp_nanos() / 1_000_000) as u64, &self.0.trust_domain);
        let (now, caller) = ((now_ms / 1000) as i64, InstanceId::parse(&instance).unwrap());
        let issue = |(service, scope): (&String, &String)| {
            let id = TokenId::new(now_ms, fastrand::u128(..).to_be_bytes()[..10].try_into().unwrap());
            let claims = serde_json::json!({
                "iss": "x", "sub": own.workload(&caller.service()), "client_id": own.workload(&caller.service()),
                "aud": own.workload(&ServiceName::parse(service).unwrap()), "iat": now, "exp": now + lives, "jti": id,
                "scope": scope, "cnf": { "x5t#S256": Thumbprint::of_certificate(&leaf_der) }, "instance": caller,
                "family": id,
            });
            let (token, expires_at_ms) = (self.0.sign_token("at+jwt", &claims), (now + lives) as u64 * 1000);
            mesh::IssuedToken { service: service.clone(), token, expires_at_ms }
        };
        let tokens = self.0.scopes.lock().iter().map(issue).collect();
        Ok(Response::new(IssueTokensResponse { tokens }))
    }

    async fn renew_agent(
        &self,
        request: Request<RenewAgentRequest>,
    ) -> Result<Response<IssueX509SvidResponse>, Status> {
        self.0.issued.lock().push("agent".into());
        let id = self.0.trust_domain.agent(&name("h1"));
        Ok(Response::new(self.0.sign(&request.into_inner().csr_der, &id, 3600)))
    }
}
