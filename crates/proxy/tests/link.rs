//! A sidecar as its agent sees it: a scripted agent on the other end of the socket pair.

use std::{collections::BTreeMap, net::TcpListener, os::unix::net::UnixStream, path::Path, thread, time::Duration};

use countersign_api::{
    mesh::{InstanceRevision, RecordsQuery},
    sidecar::{
        AgentFrames, Configure, Drain, Fresh, Listening, SidecarMessage, SidecarOrder, sidecar_message::Message,
        sidecar_order::Order,
    },
};
use countersign_core::{
    change::Revision,
    identity::{ServiceName, TrustDomain},
    service::{Protocol, ServiceSpec},
    view::{View, ViewPolicy},
};
use countersign_proxy::link::{self, Ended, LinkError};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_util::codec::Framed;

/// The agent's end, and the sidecar on a thread of its own.
struct Agent {
    frames: Framed<tokio::net::UnixStream, AgentFrames>,
    sidecar: thread::JoinHandle<Result<Ended, LinkError>>,
}

impl Agent {
    fn start() -> Self {
        let (agent, sidecar) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        let sidecar = thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(link::run(sidecar))
        });
        let frames = Framed::new(tokio::net::UnixStream::from_std(agent).unwrap(), AgentFrames::default());
        Self { frames, sidecar }
    }

    async fn configured(dir: &Path, app: &str) -> (Self, Listening) {
        let mut agent = Self::start();
        agent.order(Order::Configure(configure(dir, app))).await;
        match agent.next().await {
            Message::Listening(listening) => (agent, listening),
            other => panic!("instead of where it listens: {other:?}"),
        }
    }

    async fn order(&mut self, order: Order) {
        self.frames.send(SidecarOrder { order: Some(order) }).await.unwrap();
    }

    async fn offer(&mut self, view: &View) {
        self.order(Order::ViewJson(serde_json::to_vec(view).unwrap().into())).await;
    }

    async fn next(&mut self) -> Message {
        let next = timeout(Duration::from_secs(10), self.frames.next()).await.expect("the sidecar says nothing");
        let SidecarMessage { message } = next.expect("the sidecar is gone").unwrap();
        message.expect("a message of this version")
    }

    async fn applied(&mut self) -> InstanceRevision {
        match self.next().await {
            Message::Applied(applied) => applied,
            other => panic!("instead of what it enforces: {other:?}"),
        }
    }

    async fn ended(self) -> Result<Ended, LinkError> {
        drop(self.frames);
        tokio::task::spawn_blocking(|| self.sidecar.join().unwrap()).await.unwrap()
    }
}

fn configure(dir: &Path, app: &str) -> Configure {
    let any = "127.0.0.1:0".to_owned();
    Configure {
        instance: "catalog/1".into(),
        workers: 2,
        inbound_listen: any.clone(),
        app_address: app.into(),
        outbound_http_listen: any.clone(),
        upstreams: [("orders".to_owned(), any.clone())].into(),
        records_dir: dir.to_str().unwrap().into(),
        records_bytes_max: 0,
        admin_listen: any,
        ..Configure::default()
    }
}

fn view(revision: u64, policies: &[&str]) -> View {
    let policy = |text: &&str| ViewPolicy { id: "p".into(), file: "policies/p.cedar".into(), text: (*text).into() };
    View {
        revision: Revision(revision),
        trust_domain: TrustDomain::parse("shop.example").unwrap(),
        service: ServiceName::parse("catalog").unwrap(),
        spec: Some(ServiceSpec::new(Protocol::Http)),
        contract: None,
        policies: policies.iter().map(policy).collect(),
        roles: BTreeMap::new(),
        services: BTreeMap::new(),
        routes: BTreeMap::new(),
        barred: [].into(),
        edges: [].into(),
    }
}

const GOOD: &str = r#"@id("p") permit (principal, action, resource in Service::"catalog");"#;

#[tokio::test]
async fn a_view_is_acknowledged_when_it_holds_and_one_that_does_not_compile_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, _) = Agent::configured(dir.path(), "").await;
    agent.offer(&view(3, &[GOOD])).await;
    assert_eq!(agent.applied().await, InstanceRevision { revision: 3, ..InstanceRevision::default() });
    agent.order(Order::Revision(4)).await;
    assert_eq!(agent.applied().await, InstanceRevision { revision: 4, ..InstanceRevision::default() });
    agent.offer(&view(5, &["permit (princi"])).await;
    let refused = agent.applied().await;
    assert_eq!(refused.revision, 4);
    assert!(refused.error.starts_with("could not compile revision 5: "), "{}", refused.error);
    agent.order(Order::Revision(6)).await;
    let still_refused = agent.applied().await;
    assert_eq!((still_refused.revision, still_refused.error), (4, refused.error));
    agent.order(Order::ViewJson("{".into())).await;
    let unreadable = agent.applied().await;
    assert!(unreadable.error.starts_with("could not read the view: "), "{}", unreadable.error);
    agent.offer(&view(7, &[GOOD])).await;
    assert_eq!(agent.applied().await, InstanceRevision { revision: 7, ..InstanceRevision::default() });
    assert_eq!(agent.ended().await.unwrap(), Ended::AgentGone);
}

#[tokio::test]
async fn views_that_arrive_at_once_end_in_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, _) = Agent::configured(dir.path(), "").await;
    for revision in 1..=50 {
        agent.offer(&view(revision, &[GOOD])).await;
    }
    agent.order(Order::Revision(51)).await;
    let mut last = 0;
    while last < 51 {
        let applied = agent.applied().await;
        assert!(applied.revision > last && applied.error.is_empty(), "{applied:?} after {last}");
        last = applied.revision;
    }
}

#[tokio::test]
async fn the_workload_is_ready_when_it_accepts_connections() {
    let dir = tempfile::tempdir().unwrap();
    let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let (mut agent, _) = Agent::configured(dir.path(), &address.to_string()).await;
    assert!(timeout(Duration::from_millis(200), agent.next()).await.is_err(), "ready before anything listens");
    let _app = TcpListener::bind(address).unwrap();
    assert_eq!(agent.next().await, Message::AppReady(true));
}

#[tokio::test]
async fn queries_are_answered_and_wrong_ones_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, _) = Agent::configured(dir.path(), "").await;
    for (query, filter_json, error) in
        [(1, "{}", ""), (2, r#"{"colour":"red"}"#, "unknown field `colour`"), (3, "", "EOF while parsing")]
    {
        agent.order(Order::RecordsQuery(RecordsQuery { query, filter_json: filter_json.into() })).await;
        let Message::Records(answer) = agent.next().await else { panic!("no answer to {filter_json}") };
        assert_eq!((answer.query, answer.last, answer.records_json.len()), (query, true, 0));
        assert!(answer.error.starts_with(error), "{}", answer.error);
    }
}

/// The status and body of an admin page.
async fn page(admin: &str, path: &str) -> (u16, String) {
    let address = admin.strip_prefix("http://").unwrap();
    let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), connection.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn the_admin_pages_show_what_is_in_force_and_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, listening) = Agent::configured(dir.path(), "").await;
    let admin = listening.admin;
    assert_eq!(page(&admin, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(page(&admin, "/").await.0, 404);
    let (status, reasons) = page(&admin, "/readyz").await;
    assert_eq!(status, 503);
    assert!(reasons.contains("no view yet") && reasons.contains("no valid SVID"), "{reasons}");
    agent.offer(&view(3, &[GOOD])).await;
    agent.applied().await;
    let (_, reasons) = page(&admin, "/readyz").await;
    assert!(!reasons.contains("no view yet") && reasons.contains("no control plane was heard"), "{reasons}");
    agent.order(Order::Fresh(Fresh { age_ms: 1 })).await;
    agent.order(Order::Revision(4)).await;
    agent.applied().await;
    let (_, reasons) = page(&admin, "/readyz").await;
    assert!(!reasons.contains("no control plane was heard"), "{reasons}");
    let (status, metrics) = page(&admin, "/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("\ncountersign_view_revision 4.0\n"), "{metrics}");
    let view: serde_json::Value = serde_json::from_str(&page(&admin, "/view").await.1).unwrap();
    assert_eq!((view["revision"].as_u64(), view["policies"][0]["id"].as_str()), (Some(4), Some("p")));
}

#[tokio::test]
async fn a_drain_ends_the_sidecar_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (mut agent, listening) = Agent::configured(dir.path(), "").await;
    assert!(listening.upstreams.contains_key("orders"));
    agent.order(Order::Fresh(Fresh { age_ms: 1 })).await;
    agent.order(Order::Drain(Drain { within_ms: 100 })).await;
    assert_eq!(agent.next().await, Message::Drained(String::new()));
    let Agent { frames: _open, sidecar } = agent;
    assert_eq!(tokio::task::spawn_blocking(|| sidecar.join().unwrap()).await.unwrap().unwrap(), Ended::Drained);
}

#[tokio::test]
async fn a_configuration_that_makes_no_sense_ends_the_sidecar_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let good = || configure(dir.path(), "");
    for (order, expected) in [
        (Order::Fresh(Fresh::default()), "the agent's order `fresh` came out of turn"),
        (Order::Configure(Configure { workers: 0, ..good() }), "`workers` must be 1 to 256, not 0"),
        (Order::Configure(Configure { instance: "Catalog".into(), ..good() }), "`instance` is wrong"),
        (
            Order::Configure(Configure { inbound_listen: "here".into(), ..good() }),
            "`inbound_listen` must be `ip:port`, not `here`",
        ),
        (
            Order::Configure(Configure { admin_listen: taken.local_addr().unwrap().to_string(), ..good() }),
            "could not listen on",
        ),
    ] {
        let mut agent = Agent::start();
        agent.order(order.clone()).await;
        let error = agent.ended().await.unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(format!("{error}: {cause}").contains(expected), "{error}: {cause}");
    }
    assert_eq!(Agent::start().ended().await.unwrap(), Ended::AgentGone);
}
