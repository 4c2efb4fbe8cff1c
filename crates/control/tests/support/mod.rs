//! A control plane on a directory of its own, and the two who talk to it: an operator over the socket, an agent over TLS.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpStream, UnixStream},
    sync::mpsc,
};
use tonic::transport::{Channel, Endpoint};

use countersign_api::{
    local::{Applied, Apply, Invitation, Problem, Status, TailEvent},
    mesh::{
        self, enrolment_client::EnrolmentClient, follow_event::Event, follow_request::Message as Said,
        mesh_client::MeshClient,
    },
    svid::{Bundle, TlsIdentity, X509Svid, newcomer_config, server_name},
};
use countersign_control::{Control, ControlConfig, StartError, start};
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    identity::{InstanceId, ServiceName, TrustDomain},
    service::{Protocol, ServiceSpec},
};

pub const WITHIN: Duration = Duration::from_secs(10);

pub fn name(given: &str) -> ServiceName {
    ServiceName::parse(given).unwrap()
}

pub fn trust_domain() -> TrustDomain {
    TrustDomain::parse("shop.example").unwrap()
}

pub fn config(data_dir: PathBuf) -> ControlConfig {
    ControlConfig {
        store: None,
        advertise: None,
        accept_rollback: false,
        data_dir,
        listen: "127.0.0.1:0".parse().unwrap(),
        metrics_listen: Some("127.0.0.1:0".parse().unwrap()),
        key: None,
        trust_domain: Some(trust_domain()),
        witnesses: Default::default(),
        site: None,
        pipelines: Default::default(),
        oauth: None,
        audit: None,
    }
}

/// A running control plane on a directory that goes with it.
pub struct Plane {
    pub control: Control,
    pub dir: tempfile::TempDir,
}

impl Plane {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { control: start(config(dir.path().into())).await.unwrap(), dir }
    }

    /// Stops it and starts it again on the same directory.
    pub async fn restart(self) -> Result<Self, StartError> {
        let Self { control, dir } = self;
        control.stop().await;
        Ok(Self { control: start(config(dir.path().into())).await?, dir })
    }

    pub async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> (u16, Bytes) {
        self.send_with(method, path, &[], body).await
    }

    /// The same, with headers.
    pub async fn send_with(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> (u16, Bytes) {
        let stream = UnixStream::connect(self.dir.path().join("control.sock")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "control")
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }

    /// Opens a stream of lines; returns when the answer has begun.
    pub async fn tail(&self, path: &str) -> Tail {
        let stream = UnixStream::connect(self.dir.path().join("control.sock")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get(path).header("host", "control").body(Full::new(Bytes::new())).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        Tail { body: response.into_body(), unread: Vec::new() }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> T {
        let (status, body) = self.send("GET", path, Vec::new()).await;
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).unwrap()
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Problem> {
        let (status, answer) = self.send("POST", path, serde_json::to_vec(body).unwrap()).await;
        if status == 200 {
            Ok(serde_json::from_slice(&answer).unwrap())
        } else {
            let problem: Problem = serde_json::from_slice(&answer).unwrap();
            assert_eq!(problem.status, status);
            Err(problem)
        }
    }

    pub async fn apply(&self, base: u64, changes: Vec<Change>) -> Result<Applied, Problem> {
        self.apply_with(base, changes, Bodies::default()).await
    }

    pub async fn apply_with(&self, base: u64, changes: Vec<Change>, bodies: Bodies) -> Result<Applied, Problem> {
        self.post("/v1/changes", &Apply { change_set: ChangeSet { base: Revision(base), changes }, bodies }).await
    }

    /// The first change of a mesh: it exists and has these services.
    pub async fn create(&self, services: &[&str]) -> Applied {
        let mut changes = vec![Change::CreateMesh { trust_domain: trust_domain() }];
        changes.extend(services.iter().map(|service| declare(service)));
        self.apply(0, changes).await.unwrap()
    }

    pub async fn status(&self) -> Status {
        self.get("/v1/status").await
    }

    pub async fn invite(&self, host: Option<&str>) -> Invitation {
        self.control.invite(Duration::from_secs(60), host.map(name)).await.unwrap()
    }

    pub async fn metrics(&self) -> String {
        let address = self.control.metrics.unwrap();
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        page
    }

    pub async fn bundle(&self) -> Bundle {
        let view: countersign_api::local::AuthorityView = self.get("/v1/authority").await;
        let (_, pem) = x509_parser::pem::parse_x509_pem(view.bundle_pem.as_bytes()).unwrap();
        Bundle::new(view.trust_domain, view.bundle_sequence, vec![pem.contents.into()]).unwrap()
    }

    /// A newcomer's channel: no certificate of its own.
    pub async fn stranger(&self) -> Channel {
        let root = Digest::of(&self.bundle().await.authorities()[0]);
        self.channel(newcomer_config(root, &[b"h2"])).await.unwrap()
    }

    pub async fn channel(&self, config: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
        let address = self.control.listen;
        let connect = tower::service_fn(move |_: http::Uri| {
            let config = config.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let stream = tokio_rustls::TlsConnector::from(config).connect(server_name(), stream).await?;
                std::io::Result::Ok(TokioIo::new(stream))
            }
        });
        Endpoint::from_static("http://control").connect_with_connector(connect).await
    }

    pub async fn join(&self, token: &str, host: &str) -> Result<Agent, tonic::Status> {
        let (key, csr_der) = csr();
        let request = mesh::JoinRequest { token: token.into(), host: host.into(), csr_der };
        let answer = EnrolmentClient::new(self.stranger().await).join(request).await?.into_inner();
        let identity = identity(answer.svid.unwrap(), &key);
        let channel = self.channel(identity.client_config(trust_domain().control(), &[b"h2"])).await.unwrap();
        Ok(Agent { host: host.into(), client: MeshClient::new(channel), identity, key: key.serialize_der() })
    }

    /// The same for a newcomer that knows the control plane by the first root of `seen` alone.
    pub async fn join_seeing(&self, token: &str, host: &str, seen: &Bundle) -> Result<Agent, tonic::Status> {
        let (key, csr_der) = csr();
        let config = newcomer_config(Digest::of(&seen.authorities()[0]), &[b"h2"]);
        let channel = self.channel(config).await.map_err(|error| tonic::Status::unavailable(format!("{error:?}")))?;
        let request = mesh::JoinRequest { token: token.into(), host: host.into(), csr_der };
        let answer = EnrolmentClient::new(channel).join(request).await?.into_inner();
        let identity = identity(answer.svid.unwrap(), &key);
        let channel = self.channel(identity.client_config(trust_domain().control(), &[b"h2"])).await;
        let channel = channel.map_err(|error| tonic::Status::unavailable(format!("{error:?}")))?;
        Ok(Agent { host: host.into(), client: MeshClient::new(channel), identity, key: key.serialize_der() })
    }

    /// An agent on `host`.
    pub async fn agent(&self, host: &str) -> Agent {
        let token = self.invite(None).await.token;
        self.join(&token, host).await.unwrap()
    }
}

pub fn declare(service: &str) -> Change {
    Change::DeclareService { name: name(service), spec: ServiceSpec::new(Protocol::Http) }
}

/// A policy of one permit, with its text.
pub fn permit(id: &str, from: &str, to: &str) -> (Change, Bodies) {
    let text = format!(
        "@id(\"{id}\")\npermit (principal == Workload::\"{from}\", action in Action::\"read\", resource in Service::\"{to}\");\n"
    );
    let mut bodies = Bodies::default();
    let body = bodies.insert(text);
    (Change::SetPolicy { id: id.into(), file: "policies/shop.cedar".into(), body }, bodies)
}

pub fn csr() -> (KeyPair, Bytes) {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    (key, Bytes::copy_from_slice(csr.der()))
}

pub fn identity(svid: mesh::IssueX509SvidResponse, key: &KeyPair) -> Arc<TlsIdentity> {
    let chain = svid.chain_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let svid_read = X509Svid::parse(chain, key.serialize_der()).unwrap();
    TlsIdentity::new(svid_read, Bundle::from_message(&svid.bundle.unwrap()).unwrap())
}

/// An agent that joined.
pub struct Agent {
    pub host: String,
    pub client: MeshClient<Channel>,
    pub identity: Arc<TlsIdentity>,
    pub key: Vec<u8>,
}

/// An SVID, and its key in PKCS #8.
pub struct Svid {
    pub identity: Arc<TlsIdentity>,
    pub key: Vec<u8>,
}

/// Newline-delimited JSON as it comes.
pub struct Tail {
    body: hyper::body::Incoming,
    unread: Vec<u8>,
}

impl Tail {
    pub async fn next(&mut self) -> TailEvent {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let frame = tokio::time::timeout(WITHIN, self.body.frame()).await.expect("a line comes in time");
            self.unread.extend_from_slice(&frame.expect("the tail goes on").unwrap().into_data().unwrap());
        }
    }
}

/// Both halves of its stream.
pub struct Stream {
    pub say: mpsc::Sender<mesh::FollowRequest>,
    pub events: tonic::Streaming<mesh::FollowEvent>,
}

impl Agent {
    pub async fn issue(&mut self, instance: &str) -> Result<mesh::IssueX509SvidResponse, tonic::Status> {
        self.issue_of(instance, &[]).await
    }

    /// Its own SVID.
    pub fn svid(&self) -> Svid {
        Svid { identity: self.identity.clone(), key: self.key.clone() }
    }

    /// An SVID of `instance`.
    pub async fn svid_of(&mut self, instance: &str) -> Svid {
        let (key, csr_der) = csr();
        let request = mesh::IssueX509SvidRequest { instance: instance.into(), csr_der, artifact: Bytes::new() };
        let issued = self.client.issue_x509_svid(request).await.unwrap().into_inner();
        Svid { identity: identity(issued, &key), key: key.serialize_der() }
    }

    pub async fn issue_of(
        &mut self,
        instance: &str,
        artifact: &[u8],
    ) -> Result<mesh::IssueX509SvidResponse, tonic::Status> {
        let artifact = Bytes::copy_from_slice(artifact);
        let request = mesh::IssueX509SvidRequest { instance: instance.into(), csr_der: csr().1, artifact };
        self.client.issue_x509_svid(request).await.map(tonic::Response::into_inner)
    }

    /// Begins a probe of an instance of this host.
    pub async fn begin_probe(&mut self, instance: &str) -> Result<Bytes, tonic::Status> {
        let request = mesh::ProbeTelemetryRequest { instance: instance.into() };
        Ok(self.client.probe_telemetry(request).await?.into_inner().nonce)
    }

    pub async fn issue_jwt(&mut self, instance: &str, audience: &[&str]) -> Result<String, tonic::Status> {
        let audience = audience.iter().map(|audience| audience.to_string()).collect();
        let request = mesh::IssueJwtSvidRequest { instance: instance.into(), audience, artifact: Bytes::new() };
        Ok(self.client.issue_jwt_svid(request).await?.into_inner().token)
    }

    pub async fn issue_tokens(&mut self, instance: &str, leaf: &[u8]) -> Result<Vec<mesh::IssuedToken>, tonic::Status> {
        let (instance, leaf_der) = (instance.to_owned(), Bytes::copy_from_slice(leaf));
        let asked = mesh::IssueTokensRequest { instance, artifact: Bytes::new(), leaf_der };
        Ok(self.client.issue_tokens(asked).await?.into_inner().tokens)
    }

    pub async fn follow(&mut self, revision: u64, root: Digest) -> Result<Stream, tonic::Status> {
        let hello = mesh::FollowHello {
            host: self.host.clone(),
            version: "0".into(),
            revision,
            root: Bytes::copy_from_slice(&root.0),
            isolation: "none".into(),
            isolation_note: "a test".into(),
            refused: String::new(),
        };
        self.follow_saying(Said::Hello(hello)).await
    }

    pub async fn follow_saying(&mut self, first: Said) -> Result<Stream, tonic::Status> {
        let (say, said) = mpsc::channel(64);
        say.send(mesh::FollowRequest { message: Some(first) }).await.unwrap();
        let said = tokio_stream::wrappers::ReceiverStream::new(said);
        Ok(Stream { say, events: self.client.follow(said).await?.into_inner() })
    }
}

impl Stream {
    pub async fn say(&self, said: Said) {
        self.say.send(mesh::FollowRequest { message: Some(said) }).await.unwrap();
    }

    pub async fn up(&self, instance: &str, address: &str) {
        let up =
            mesh::InstanceUp { instance: instance.into(), address: address.into(), ready: true, ..Default::default() };
        self.say(Said::Up(up)).await;
    }

    /// What a sidecar tells of the exchange with itself whose nonce is `nonce`: its record, and what its agent passes on.
    pub fn probed(instance: &str, nonce: &[u8]) -> (Said, Said) {
        let id = InstanceId::parse(instance).unwrap();
        let (service, trace_id) = (id.service(), hex::encode(nonce));
        let caller = trust_domain().workload(&service);
        let record = serde_json::json!({
            "id": "0197", "at_ms": 1, "instance": instance, "revision": 1, "signal_seq": 0, "outcome": "deny",
            "reason": "not_declared", "policies": [], "judged": "as_probe", "trace_id": trace_id, "judge_ns": 1,
            "ended": { "status": 403, "duration_us": 1, "bytes_in": 0, "bytes_out": 0, "how": "completed" },
            "inputs": {
                "principal": caller, "action": "http:GET", "service": service, "path": "/.countersign/probe",
                "host": format!("{service}.mesh"), "method": "GET", "protocol": "http", "size": null,
                "origin": "127.0.0.1", "now": 1, "first_contact": false,
            },
        });
        let report = mesh::Report { records_json: vec![record.to_string().into()], ..Default::default() };
        let decision = mesh::SpanDecision { id: "0197".into(), caller: caller.to_string(), ..Default::default() };
        let span = mesh::Span {
            trace_id: Bytes::copy_from_slice(nonce),
            inbound: true,
            service: service.to_string(),
            decision: Some(decision),
            ..Default::default()
        };
        let probed = mesh::TelemetryProbed {
            instance: instance.into(),
            nonce: Bytes::copy_from_slice(nonce),
            metric: format!("countersign_probes_total 1 # {{trace_id=\"{trace_id}\"}} 1"),
            span: Some(span),
        };
        (Said::Report(report), Said::Probed(probed))
    }

    pub async fn acknowledge(&self, instance: &str, revision: u64) {
        let instances = vec![mesh::InstanceRevision { instance: instance.into(), revision, ..Default::default() }];
        self.say(Said::Acknowledgement(mesh::Acknowledgement { instances })).await;
    }

    pub async fn next(&mut self) -> Result<Event, tonic::Status> {
        let next = tokio::time::timeout(WITHIN, self.events.message()).await.expect("an event comes in time")?;
        Ok(next.expect("the stream goes on").event.unwrap())
    }

    /// The next event that is no heartbeat.
    pub async fn news(&mut self) -> Event {
        loop {
            match self.next().await.unwrap() {
                Event::Heartbeat(_) => {}
                event => return event,
            }
        }
    }

    pub async fn welcome(&mut self) -> mesh::Welcome {
        match self.next().await.unwrap() {
            Event::Welcome(welcome) => welcome,
            other => panic!("the first event is {other:?}"),
        }
    }
}
