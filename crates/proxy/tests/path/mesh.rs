//! A small mesh in one process: an authority, sidecars with real listeners and threads, and workloads.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use countersign_api::{
    sidecar::Span,
    svid::{Bundle, HOST_OID, TlsIdentity, UID_OID, X509Svid},
};
use countersign_core::{
    change::{Edge, Revision},
    contract::Contract,
    identity::{InstanceId, ServiceName, TrustDomain},
    record::{Ended, Judged, Outcome, Reason},
    risk::Condition,
    route::Route,
    service::{FirstContact, Protocol, Recorded as WhenRecorded, ServiceSpec, Tokens},
    token::TokenFault,
    view::{View, ViewPolicy, ViewRoute, VisibleService},
};
use countersign_proxy::{
    App, Door, Endpoint, Setup, Shared, TokensByService, Tracing,
    decided::{Decided, DecisionId, Recorder, Shed},
    workers,
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, oneshot},
};

pub const EVERYONE: &str = r#"permit(principal, action, resource);"#;

pub fn name(given: &str) -> ServiceName {
    ServiceName::parse(given).unwrap()
}

pub fn trust_domain() -> TrustDomain {
    TrustDomain::parse("shop.example").unwrap()
}

/// Signs SVIDs.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new(common_name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn bundle(&self) -> Bundle {
        Bundle::new(trust_domain(), 1, vec![self.0.der().clone()]).unwrap()
    }

    pub fn svid(&self, service: &str) -> X509Svid {
        self.svid_until(service, OffsetDateTime::now_utc() + time::Duration::HOUR)
    }

    pub fn svid_until(&self, service: &str, until: OffsetDateTime) -> X509Svid {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (oid, said) in [(UID_OID, format!("{service}/1")), (HOST_OID, format!("{service}-host"))] {
            params.distinguished_name.push(DnType::CustomDnType(oid.to_vec()), said);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names =
            vec![SanType::URI(trust_domain().workload(&name(service)).as_str().try_into().unwrap())];
        params.serial_number = Some((u128::from(fastrand::u64(..)) | 0x40 << 120).to_be_bytes().to_vec().into());
        params.not_before = until - time::Duration::DAY;
        params.not_after = until;
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.0).unwrap();
        X509Svid::parse(vec![leaf.der().clone()], key.serialize_der()).unwrap()
    }

    /// The bundle of several authorities.
    pub fn bundle_of(authorities: &[&Self]) -> Bundle {
        Bundle::new(trust_domain(), 1, authorities.iter().map(|authority| authority.0.der().clone()).collect()).unwrap()
    }

    pub fn identity(&self, service: &str) -> Arc<TlsIdentity> {
        TlsIdentity::new(self.svid(service), self.bundle())
    }
}

/// What the recorder was told.
#[derive(Debug, Clone)]
#[allow(dead_code, reason = "each test looks at what it needs")]
pub struct Recorded {
    pub id: String,
    pub principal: String,
    pub outcome: Outcome,
    pub judged: Judged,
    pub path: String,
    pub ended: Option<Ended>,
    pub reason: Reason,
    pub operation: Option<String>,
    pub trace_id: String,
    pub first_contact: bool,
    pub fault: Option<TokenFault>,
    pub condition: Condition,
    pub policies: Vec<String>,
    pub signals: u64,
}

struct Keep {
    records: Arc<Mutex<Vec<Recorded>>>,
    full: Arc<AtomicBool>,
}

impl Recorder for Keep {
    fn record(&self, decided: &Decided<'_>) -> Result<(), Shed> {
        if self.full.load(Ordering::SeqCst) {
            return Err(Shed);
        }
        self.records.lock().unwrap().push(Recorded {
            id: decided.id.to_string(),
            principal: decided.query.principal.to_string(),
            outcome: decided.decision.outcome,
            judged: decided.judged,
            path: decided.query.path.to_owned(),
            ended: decided.ended.clone(),
            reason: decided.decision.reason,
            operation: decided.decision.operation.as_deref().map(str::to_owned),
            trace_id: decided.trace_id.map(|id| id.to_string()).unwrap_or_default(),
            first_contact: decided.query.context.first_contact,
            fault: decided.query.context.token.and_then(|token| token.fault),
            condition: decided.query.context.condition,
            policies: decided.decision.policies.iter().map(ToString::to_string).collect(),
            signals: decided.signals.0,
        });
        Ok(())
    }

    fn commit(&self, decided: &Decided<'_>) -> Result<oneshot::Receiver<()>, Shed> {
        let (waiting, written) = oneshot::channel();
        self.record(decided)?;
        let _ = waiting.send(());
        Ok(written)
    }

    fn amend(&self, id: DecisionId, ended: &Ended) {
        let mut records = self.records.lock().unwrap();
        if let Some(record) = records.iter_mut().find(|record| record.id == id.to_string()) {
            record.ended = Some(ended.clone());
        }
    }
}

/// The services of a mesh and what their sidecars need to know.
#[derive(Clone)]
pub struct Plan {
    pub services: Vec<(&'static str, Protocol)>,
    pub policy: String,
    pub routes: Vec<Route>,
    pub max_staleness_seconds: u32,
    pub exchanges_max: u32,
    pub recorded: WhenRecorded,
    /// Of every service but `web`.
    pub contract: Option<Contract>,
    pub first_contact: FirstContact,
    /// Of every service but `web`.
    pub tokens: Tokens,
    /// To every service.
    pub edges: BTreeSet<Edge>,
}

impl Plan {
    pub fn new(services: &[(&'static str, Protocol)], policy: &str) -> Self {
        Self {
            services: services.to_vec(),
            policy: policy.into(),
            routes: vec![],
            max_staleness_seconds: 300,
            exchanges_max: 10_000,
            recorded: WhenRecorded::default(),
            contract: None,
            first_contact: FirstContact::default(),
            tokens: Tokens::default(),
            edges: [].into(),
        }
    }

    pub fn with_policy(&self, policy: &str) -> Self {
        Self { policy: policy.into(), ..self.clone() }
    }

    fn tokens_of(&self, service: &str) -> Tokens {
        if service == "web" { Tokens::Optional } else { self.tokens }
    }

    pub fn view(&self, service: &str, revision: u64) -> View {
        let contract = self.contract.clone().filter(|_| service != "web");
        let spec = self.services.iter().find(|(n, _)| *n == service).map(|(_, protocol)| ServiceSpec {
            max_staleness_seconds: self.max_staleness_seconds,
            exchanges_max: self.exchanges_max,
            recorded: self.recorded,
            first_contact: self.first_contact,
            contract: contract.as_ref().map(Contract::digest),
            tokens: self.tokens_of(service),
            upstreams: if service == "web" { [name("catalog")].into() } else { BTreeSet::new() },
            ..ServiceSpec::new(*protocol)
        });
        let mut routes: BTreeMap<ServiceName, Vec<ViewRoute>> = BTreeMap::new();
        for (number, route) in self.routes.iter().enumerate() {
            let named = ViewRoute { name: format!("r{number}").into(), route: route.clone() };
            routes.entry(route.service.clone()).or_default().push(named);
        }
        let text: Arc<str> = format!(r#"@id("only") {}"#, self.policy).into();
        View {
            revision: Revision(revision),
            trust_domain: trust_domain(),
            service: name(service),
            spec,
            contract,
            policies: vec![ViewPolicy { id: "only".into(), file: "policies/only.cedar".into(), text }],
            roles: BTreeMap::new(),
            services: self
                .services
                .iter()
                .enumerate()
                .map(|(slot, (service, protocol))| {
                    let address = countersign_core::state::loopback(slot as u16);
                    let tokens = self.tokens_of(service);
                    (name(service), VisibleService { protocol: *protocol, address, port: 80, tokens })
                })
                .collect(),
            routes,
            barred: [].into(),
            edges: self.edges.clone(),
        }
    }
}

/// One sidecar, running.
pub struct Sidecar {
    pub shared: Arc<Shared>,
    pub service: &'static str,
    pub instance: InstanceId,
    pub inbound: SocketAddr,
    pub outbound: SocketAddr,
    pub records: Arc<Mutex<Vec<Recorded>>>,
    /// Its record has no room while this is set.
    pub full: Arc<AtomicBool>,
    pub spans: Mutex<mpsc::Receiver<Span>>,
    threads: Vec<JoinHandle<()>>,
}

impl Sidecar {
    /// A sidecar that listens and knows nothing yet.
    pub fn start(service: &'static str, instance: &str, app: Option<SocketAddr>) -> Self {
        let (records, full) = (Arc::default(), Arc::default());
        let recorder = || Box::new(Keep { records: Arc::clone(&records), full: Arc::clone(&full) });
        let recorders = vec![recorder() as Box<dyn Recorder + Send>, recorder()];
        Self { records: records.clone(), full: full.clone(), ..Self::start_with(service, instance, app, recorders) }
    }

    /// A sidecar that keeps its record with `recorders`, one per worker.
    pub fn start_with(
        service: &'static str,
        instance: &str,
        app: Option<SocketAddr>,
        recorders: Vec<Box<dyn Recorder + Send>>,
    ) -> Self {
        let instance = InstanceId::new(&name(service), instance);
        let app = app.map(|address| App {
            address,
            socket: Box::new(|| socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)),
        });
        let worker_count = recorders.len();
        let (tracing, spans) = Tracing::new(None);
        let setup = Setup { instance: instance.clone(), app, worker_count, tracing: Some(tracing) };
        let shared = Arc::new(Shared::new(setup));
        let threads = workers::start(&shared, recorders).unwrap();
        let open = |door| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            shared.open(door, listener);
            address
        };
        let (inbound, outbound) = (open(Door::Inbound), open(Door::ForwardProxy));
        let (records, full) = (Arc::default(), Arc::default());
        Self { shared, service, instance, inbound, outbound, records, full, spans: Mutex::new(spans), threads }
    }

    /// A loopback listener for `upstream`.
    pub fn upstream(&self, upstream: &str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        self.shared.open(Door::Upstream(name(upstream)), listener);
        address
    }

    pub async fn apply(&self, plan: &Plan, revision: u64) {
        self.shared.set_fresh(Duration::ZERO);
        self.shared.apply(plan.view(self.service, revision)).await.unwrap();
    }

    /// Knows who it is and what holds, and reaches `others`.
    pub async fn ready(&self, authority: &Authority, plan: &Plan, others: &[&Sidecar]) {
        self.shared.set_svid(authority.svid(self.service), TokensByService::default());
        self.shared.set_bundle(authority.bundle());
        self.apply(plan, 1).await;
        self.reaches(others);
    }

    pub fn reaches(&self, others: &[&Sidecar]) {
        let mut services: BTreeMap<ServiceName, Vec<Endpoint>> = BTreeMap::new();
        for other in others {
            services.entry(name(other.service)).or_default().push(other.endpoint());
        }
        self.shared.set_endpoints(services, true);
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint { instance: self.instance.clone(), address: self.inbound, ready: true }
    }

    pub async fn stop(self) {
        self.shared.drain(Duration::from_millis(200)).await;
        for thread in self.threads {
            thread.join().unwrap();
        }
    }

    /// One HTTP/1.1 request through the forward proxy.
    pub async fn get(&self, url: &str) -> Answer {
        self.send(Request::get(url).body(Full::default()).unwrap()).await
    }

    pub async fn send(&self, request: Request<Full<bytes::Bytes>>) -> Answer {
        let response = open(self.outbound, request).await;
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map(|body| body.to_bytes().to_vec()).map_err(|e| e.to_string());
        let header = |name: &str| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        Answer {
            status: parts.status.as_u16(),
            reason: header("countersign-reason"),
            headers: parts.headers,
            body: body.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        }
    }
}

/// Sends `request` on a connection of its own and returns when the head of the answer is there.
pub async fn open(to: SocketAddr, mut request: Request<Full<bytes::Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(to).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let host = request.uri().authority().map(|authority| authority.to_string());
    if let Some(host) = host
        && !request.headers().contains_key("host")
    {
        request.headers_mut().insert("host", host.parse().unwrap());
    }
    sender.send_request(request).await.unwrap()
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub reason: Option<String>,
    pub headers: http::HeaderMap,
    pub body: Result<String, String>,
}

impl Answer {
    pub fn text(&self) -> &str {
        self.body.as_deref().unwrap()
    }

    pub fn seen(&self) -> (u16, Option<&str>) {
        (self.status, self.reason.as_deref())
    }
}

/// Everything on: `web` calls `callee`, in front of `app`.
pub async fn pair(plan: &Plan, callee: &'static str, app: SocketAddr) -> (Sidecar, Sidecar, Authority) {
    let authority = Authority::new("root");
    let (web, callee) = (Sidecar::start("web", "1", None), Sidecar::start(callee, "1", Some(app)));
    for sidecar in [&web, &callee] {
        sidecar.shared.set_svid(authority.svid(sidecar.service), TokensByService::default());
        sidecar.shared.set_bundle(authority.bundle());
        sidecar.apply(plan, 1).await;
    }
    web.shared.set_endpoints([(name(callee.service), vec![callee.endpoint()])], true);
    (web, callee, authority)
}

/// Writes `bytes` and reads until the other end closes or says nothing more for a while.
pub async fn raw(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(Ok(count)) = tokio::time::timeout(Duration::from_millis(400), stream.read(&mut buffer)).await {
        if count == 0 {
            break;
        }
        got.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&got).into_owned()
}
