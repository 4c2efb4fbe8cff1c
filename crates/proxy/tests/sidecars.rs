//! Two sidecars with real identities, a workload behind one and a caller before the other: a request from end to end, what
//! was recorded of it, and a view that changes while a stream is open.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    thread,
    time::Duration,
};

use countersign_api::{
    mesh::{self, RecordsQuery},
    sidecar::{
        Configure, Endpoints, Fresh, Listening, ServiceEndpoints, sidecar_message::Message, sidecar_order::Order,
    },
    svid,
};
use countersign_core::{
    change::Revision,
    identity::{ServiceName, TrustDomain},
    record::{DecisionRecord, Judged, Outcome},
    service::{Protocol, ServiceSpec, Tokens},
    view::{View, ViewPolicy, VisibleService},
};
use countersign_proxy::link;
use countersign_testkit::{
    agent::ScriptedAgent,
    authority::{Authority, Defect},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const READS: &str =
    r#"@id("p") permit (principal == Workload::"web", action in Action::"read", resource in Service::"catalog");"#;
const WAIT: Duration = Duration::from_secs(10);

fn domain() -> TrustDomain {
    TrustDomain::parse("shop.example").unwrap()
}

fn service(name: &str) -> ServiceName {
    ServiceName::parse(name).unwrap()
}

fn view(of: &str, revision: u64, policies: &[&str]) -> View {
    let policy = |text: &&str| ViewPolicy { id: "p".into(), file: "policies/p.cedar".into(), text: (*text).into() };
    let visible = |last| VisibleService {
        protocol: Protocol::Http,
        address: [127, 81, 1, last].into(),
        port: 80,
        tokens: Tokens::Optional,
    };
    View {
        revision: Revision(revision),
        trust_domain: domain(),
        service: service(of),
        spec: Some(ServiceSpec::new(Protocol::Http)),
        contract: None,
        policies: policies.iter().map(policy).collect(),
        roles: BTreeMap::new(),
        services: [(service("web"), visible(1)), (service("catalog"), visible(2))].into(),
        routes: BTreeMap::new(),
        barred: [].into(),
        edges: [].into(),
    }
}

/// A workload that answers `/stream` with a byte every few milliseconds for ever, and anything else with who called.
fn workload() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || answer(connection));
        }
    });
    address
}

fn answer(mut connection: std::net::TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if connection.read(&mut byte)? == 0 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    if head.starts_with("GET /stream ") {
        connection.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
        loop {
            connection.write_all(b".")?;
            thread::sleep(Duration::from_millis(5));
        }
    }
    let caller = head.lines().find_map(|line| line.strip_prefix("countersign-caller: ")).unwrap_or("nobody");
    write!(connection, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{caller}", caller.len())
}

async fn sidecar(authority: &Authority, dir: &Path, of: &str, app: Option<SocketAddr>) -> (ScriptedAgent, Listening) {
    let (mut agent, end) = ScriptedAgent::pair();
    thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(link::run(end))
    });
    let any = "127.0.0.1:0".to_owned();
    let configure = Configure {
        instance: format!("{of}/1"),
        workers: 1,
        inbound_listen: any.clone(),
        app_address: app.map(|app| app.to_string()).unwrap_or_default(),
        outbound_http_listen: any.clone(),
        records_dir: dir.join(of).to_str().unwrap().into(),
        admin_listen: any,
        ..Configure::default()
    };
    let listening = agent.configure(configure).await;
    agent.order(Order::Identity(authority.identity(&domain().workload(&service(of))))).await;
    agent.order(Order::Bundle(authority.bundle())).await;
    agent.order(Order::Fresh(Fresh { age_ms: 0 })).await;
    (agent, listening)
}

/// The mesh of these tests: `web` calls, `catalog` answers.
struct Pair {
    _web: ScriptedAgent, // dropped, it would end its sidecar
    catalog: ScriptedAgent,
    forward_proxy: String,
    catalog_listening: Listening,
    _dir: tempfile::TempDir,
}

impl Pair {
    async fn start(authority: &Authority) -> Self {
        Self::start_in(authority, tempfile::tempdir().unwrap()).await
    }

    async fn start_in(authority: &Authority, dir: tempfile::TempDir) -> Self {
        let _ = svid::provider().as_ref().clone().install_default(); // another test may have been first
        let (mut catalog, catalog_listening) = sidecar(authority, dir.path(), "catalog", Some(workload())).await;
        catalog.until(|message| matches!(message, Message::AppReady(true)).then_some(())).await;
        catalog.offer(&view("catalog", 1, &[READS])).await;
        assert_eq!(catalog.applied().await.error, "");
        let (mut web, listening) = sidecar(authority, dir.path(), "web", None).await;
        let endpoint =
            mesh::Endpoint { instance: "catalog/1".into(), address: catalog_listening.inbound.clone(), ready: true };
        let services = vec![ServiceEndpoints { service: "catalog".into(), endpoints: vec![endpoint] }];
        web.order(Order::Endpoints(Endpoints { services, full: true })).await;
        web.offer(&view("web", 1, &[])).await;
        assert_eq!(web.applied().await.error, "");
        Self { _web: web, catalog, forward_proxy: listening.outbound_http, catalog_listening, _dir: dir }
    }

    async fn open(&self, method: &str, path: &str) -> TcpStream {
        let mut connection = TcpStream::connect(&self.forward_proxy).await.unwrap();
        let head = format!(
            "{method} http://catalog.mesh{path} HTTP/1.1\r\nhost: catalog.mesh\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        connection
    }

    /// The status and body of one request.
    async fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut answer = String::new();
        let mut connection = self.open(method, path).await;
        timeout(WAIT, connection.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        // A short answer comes in one chunk: its length, itself, and an empty one.
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked { body.split("\r\n").nth(1).unwrap() } else { body };
        (status, body.to_owned())
    }

    async fn records(&mut self) -> Vec<DecisionRecord> {
        self.catalog.order(Order::RecordsQuery(RecordsQuery { query: 1, filter_json: "{}".into() })).await;
        let answer = self.catalog.until(|message| match message {
            Message::Records(answer) => Some(answer),
            _ => None,
        });
        let answer = answer.await;
        assert_eq!((answer.error.as_str(), answer.last), ("", true));
        answer.records_json.iter().map(|json| serde_json::from_slice(json).unwrap()).collect()
    }

    async fn page(&self, path: &str) -> String {
        let address = self.catalog_listening.admin.strip_prefix("http://").unwrap();
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection.write_all(format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(WAIT, connection.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

#[tokio::test]
async fn a_request_is_judged_answered_and_recorded() {
    let mut pair = Pair::start(&Authority::new("shop.example")).await;
    let (status, body) = pair.ask("POST", "/items").await;
    assert_eq!(status, 403);
    let denied: serde_json::Value = serde_json::from_str(&body).unwrap();
    let report = pair.catalog.until(|message| match message {
        Message::Report(report) if !report.records_json.is_empty() => Some(report),
        _ => None,
    });
    let reported: DecisionRecord = serde_json::from_slice(&report.await.records_json[0]).unwrap();
    assert_eq!(denied["decision"].as_str(), Some(&*reported.id));
    assert_eq!(pair.ask("GET", "/items?page=2").await, (200, "spiffe://shop.example/web".into()));

    let records = pair.records().await;
    let seen: Vec<_> = records.iter().map(|r| (r.outcome, &*r.inputs.action, &*r.inputs.path)).collect();
    assert_eq!(seen, [(Outcome::Permit, "http:GET", "/items"), (Outcome::Deny, "http:POST", "/items")]);
    assert_eq!(records[0].policies.iter().map(|id| &**id).collect::<Vec<_>>(), ["p"]);
    assert_eq!(records[0].ended.as_ref().map(|ended| ended.status), Some(200));
    assert_eq!(records[1].id, reported.id);
    let metrics = pair.page("/metrics").await;
    for line in [
        r#"countersign_decisions_total{outcome="permit",reason="permitted"} 1"#,
        r#"countersign_decisions_total{outcome="deny",reason="no_policy_permits"} 1"#,
        "countersign_records_kept_total 2",
    ] {
        assert!(metrics.lines().any(|given| given == line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn when_a_revision_is_acknowledged_no_open_stream_lives_by_an_older_one() {
    let mut pair = Pair::start(&Authority::new("shop.example")).await;
    let mut stream = pair.open("GET", "/stream").await;
    let mut some = [0; 512];
    assert!(timeout(WAIT, stream.read(&mut some)).await.unwrap().unwrap() > 0);
    assert!(pair.page("/live").await.contains("\"/stream\""));
    pair.catalog.offer(&view("catalog", 2, &["permit (princi"])).await;
    let refused = pair.catalog.applied().await;
    assert!(refused.error.contains("could not compile revision 2"), "{refused:?}");
    assert!(timeout(WAIT, stream.read(&mut some)).await.unwrap().unwrap() > 0, "a refused view cut a stream");
    pair.catalog.offer(&view("catalog", 3, &[])).await;
    assert_eq!(pair.catalog.applied().await.revision, 3);
    let rest = timeout(WAIT, async { while matches!(stream.read(&mut some).await, Ok(1..)) {} });
    rest.await.expect("the stream goes on although no policy permits it");
    assert_eq!(pair.ask("GET", "/items").await.0, 403);
    let records = pair.records().await;
    assert!(records.iter().any(|r| r.outcome == Outcome::Deny && &*r.inputs.path == "/stream" && r.revision.0 == 3));
}

#[tokio::test]
async fn a_caller_is_no_stranger_to_a_sidecar_that_begins_anew() {
    let authority = Authority::new("shop.example");
    let mut pair = Pair::start(&authority).await;
    assert_eq!(pair.ask("GET", "/items/4").await.0, 200);
    let report = pair.catalog.until(|message| match message {
        Message::Report(report) if !report.records_json.is_empty() => Some(report),
        _ => None,
    });
    let reported: DecisionRecord = serde_json::from_slice(&report.await.records_json[0]).unwrap();
    assert_eq!((reported.outcome, reported.inputs.first_contact), (Outcome::Permit, true), "in full, though permitted");
    let Pair { catalog, _web, _dir, .. } = pair;
    drop((catalog, _web)); // and with them their sidecars
    let mut pair = Pair::start_in(&authority, _dir).await;
    for path in ["/items/5", "/parts"] {
        assert_eq!(pair.ask("GET", path).await.0, 200);
    }
    let firsts: Vec<_> = pair.records().await.into_iter().map(|r| (r.inputs.path, r.inputs.first_contact)).collect();
    let expected = [("/parts", true), ("/items/5", false), ("/items/4", true)];
    assert_eq!(firsts, expected.map(|(path, first)| (path.into(), first)));
}

#[tokio::test]
async fn a_probe_that_is_ordered_leaves_a_record_a_span_and_a_count_of_its_nonce() {
    let mut pair = Pair::start(&Authority::new("shop.example")).await;
    let nonce = bytes::Bytes::from_static(&[7; 16]);
    pair.catalog.order(Order::Probe(nonce.clone())).await;
    let (mut record, mut span, mut end) = (None, None, None);
    while record.is_none() || span.is_none() || end.is_none() {
        pair.catalog
            .until(|message| {
                match message {
                    Message::Report(report) => record = report.records_json.first().cloned().or(record.take()),
                    Message::Spans(spans) => span = spans.spans.into_iter().next(),
                    Message::Probed(probed) => end = Some(probed),
                    _ => return None,
                }
                Some(())
            })
            .await;
    }
    let record: DecisionRecord = serde_json::from_slice(&record.unwrap()).unwrap();
    let trace_id = "07".repeat(16);
    assert_eq!((record.judged, record.trace_id.as_deref()), (Judged::AsProbe, Some(&*trace_id)));
    assert_eq!(span.unwrap().trace_id, nonce);
    assert_eq!(end.map(|end| (end.nonce, end.error)), Some((nonce, String::new())));
    let counted = format!(r#"countersign_probes_total 1 # {{trace_id="{trace_id}"}} 1.0"#);
    assert!(pair.page("/metrics").await.lines().any(|line| line == counted));
    assert_eq!(pair.records().await, [], "no traffic, unless it is asked for");
}

#[tokio::test]
async fn whoever_does_not_prove_to_be_a_workload_gets_nothing() {
    let authority = Authority::new("shop.example");
    let mut pair = Pair::start(&authority).await;
    let id = domain().workload(&service("web"));
    for defect in Defect::ALL {
        let client = tokio_rustls::TlsConnector::from(authority.issue_with(defect, &id).credulous_client(&[b"h2"]));
        let tcp = TcpStream::connect(&pair.catalog_listening.inbound).await.unwrap();
        // A TLS 1.3 client learns at its first read that it was refused.
        let heard = timeout(WAIT, async {
            let mut tls = client.connect(svid::server_name(), tcp).await?;
            let mut heard = Vec::new();
            tls.read_to_end(&mut heard).await.map(|_| heard)
        });
        let heard = heard.await.expect("the connection stays open");
        assert!(heard.as_ref().is_err(), "{defect:?}: {heard:?}");
    }
    let mut plain = TcpStream::connect(&pair.catalog_listening.inbound).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: catalog.mesh\r\n\r\n").await.unwrap();
    let mut heard = Vec::new();
    let _ = timeout(WAIT, plain.read_to_end(&mut heard)).await.expect("the connection stays open");
    assert!(!String::from_utf8_lossy(&heard).contains("HTTP"), "{heard:?}");
    assert!(pair.records().await.is_empty());
}
