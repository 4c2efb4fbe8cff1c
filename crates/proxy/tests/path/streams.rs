//! What stays open: streams, tunnels, large bodies; and how they end when the answer of the law turns.

use std::time::Duration;

use bytes::Bytes;
use countersign_core::{
    record::{End, Judged, Outcome},
    service::Protocol::{self, Grpc, Http, Tcp},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    mesh::{EVERYONE, Plan, open, pair},
    workload::Workload,
};

const SERVICES: &[(&str, Protocol)] = &[("web", Http), ("catalog", Http), ("ledger", Grpc), ("db", Tcp)];
const NOBODY: &str = r#"permit(principal == Workload::"nobody", action, resource);"#;
const SOON: Duration = Duration::from_secs(5);

async fn next(body: &mut Incoming) -> Option<Result<Bytes, hyper::Error>> {
    let frame = timeout(SOON, body.frame()).await.expect("the stream says nothing")?;
    Some(frame.map(|frame| frame.into_data().unwrap_or_default()))
}

/// PROVES (register-before-judge)
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_cut_when_the_answer_turns_and_its_neighbour_does_not_notice() {
    let app = Workload::http().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    let events = |path: &str| Request::get(format!("http://catalog.mesh/events/{path}")).body(Full::default()).unwrap();
    let mut cut = open(web.outbound, events("cut")).await.into_body();
    let mut kept = open(web.outbound, events("kept")).await.into_body();
    assert!(next(&mut cut).await.unwrap().is_ok() && next(&mut kept).await.unwrap().is_ok());
    let narrower = r#"permit(principal, action, resource == Operation::"catalog/events/kept");"#;
    catalog.apply(&plan.with_policy(narrower), 2).await;
    let ended = loop {
        match next(&mut cut).await {
            Some(Ok(_)) => {}
            other => break other,
        }
    };
    assert!(ended.is_some_and(|end| end.is_err()), "a cut stream must not look whole");
    for _ in 0..20 {
        next(&mut kept).await.unwrap().unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let records = catalog.records.lock().unwrap().clone();
    let of_cut: Vec<_> = records.iter().filter(|record| record.path == "/events/cut").collect();
    assert_eq!(
        of_cut.iter().map(|record| (record.outcome, record.judged)).collect::<Vec<_>>(),
        [(Outcome::Permit, Judged::AtStart), (Outcome::Deny, Judged::WhileOpen)]
    );
    assert_eq!(of_cut[1].ended.as_ref().unwrap().how, End::Cut);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_its_answer_is_denied_when_the_answer_turns() {
    let app = Workload::http().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    let turn = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        catalog.apply(&plan.with_policy(NOBODY), 2).await;
    };
    let (answer, ()) = tokio::join!(web.get("http://catalog.mesh/stall"), turn);
    assert_eq!(answer.seen(), (403, Some("denied")));
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_flows_both_ways_with_trailers_and_learns_of_a_denial() {
    let app = Workload::grpc().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, ledger, _) = pair(&plan, "ledger", app.address).await;
    let stream = TcpStream::connect(web.upstream("ledger")).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let call = || {
        let head = Request::post("http://ledger.mesh/ledger.Ledger/Follow").header("content-type", "application/grpc");
        head.header("te", "trailers").body(()).unwrap()
    };
    let (response, mut send) = sender.send_request(call(), false).unwrap();
    send.send_data(Bytes::from("one"), false).unwrap();
    let mut body = timeout(SOON, response).await.unwrap().unwrap().into_body();
    assert_eq!(timeout(SOON, body.data()).await.unwrap().unwrap().unwrap(), "one");
    send.send_data(Bytes::from("two"), true).unwrap();
    assert_eq!(timeout(SOON, body.data()).await.unwrap().unwrap().unwrap(), "two");
    assert!(timeout(SOON, body.data()).await.unwrap().is_none());
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");

    let (response, mut send) = sender.send_request(call(), false).unwrap();
    send.send_data(Bytes::from("one"), false).unwrap();
    let mut body = timeout(SOON, response).await.unwrap().unwrap().into_body();
    assert_eq!(timeout(SOON, body.data()).await.unwrap().unwrap().unwrap(), "one");
    ledger.apply(&plan.with_policy(NOBODY), 2).await;
    assert!(timeout(SOON, body.data()).await.unwrap().is_none());
    let trailers = timeout(SOON, body.trailers()).await.unwrap().unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "7");
    assert!(trailers["grpc-message"].to_str().unwrap().starts_with("denied; decision "));

    let (response, _) = sender.send_request(call(), true).unwrap();
    let denied = timeout(SOON, response).await.unwrap().unwrap();
    assert_eq!((denied.status().as_u16(), &denied.headers()["grpc-status"]), (200, &"7".parse().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_is_closed_with_1008_between_two_frames() {
    let app = Workload::http().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    let request = Request::get("http://catalog.mesh/ws")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    let response = open(web.outbound, request.body(Full::default()).unwrap()).await;
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let mut socket = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    let hello = [0x81, 0x85, 0, 0, 0, 0, b'h', b'e', b'l', b'l', b'o'];
    socket.write_all(&hello).await.unwrap();
    let mut got = [0; 11];
    timeout(SOON, socket.read_exact(&mut got)).await.unwrap().unwrap();
    assert_eq!(got, hello, "the workload echoes bytes");
    catalog.apply(&plan.with_policy(NOBODY), 2).await;
    let mut close = Vec::new();
    timeout(SOON, socket.read_to_end(&mut close)).await.unwrap().unwrap();
    assert_eq!(close[..4], [0x88, close.len() as u8 - 2, 0x03, 0xf0], "{close:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_flows_half_closes_and_is_cut() {
    let app = Workload::tcp().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, db, _) = pair(&plan, "db", app.address).await;
    let door = web.upstream("db");
    let mut socket = TcpStream::connect(door).await.unwrap();
    socket.write_all(b"select 1").await.unwrap();
    socket.shutdown().await.unwrap();
    let mut got = String::new();
    timeout(SOON, socket.read_to_string(&mut got)).await.unwrap().unwrap();
    assert_eq!(got, "select 1goodbye", "the other direction goes on after one is finished");
    let mut socket = TcpStream::connect(door).await.unwrap();
    socket.write_all(b"x").await.unwrap();
    assert_eq!(timeout(SOON, socket.read_u8()).await.unwrap().unwrap(), b'x');
    db.apply(&plan.with_policy(NOBODY), 2).await;
    assert!(timeout(SOON, socket.read_u8()).await.unwrap().is_err(), "the connection ends");
    let denied = async { TcpStream::connect(door).await?.read_u8().await }; // the reset may come before connect looks
    assert!(timeout(SOON, denied).await.unwrap().is_err(), "a denied connection carries nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_whole_in_both_directions() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    const BYTES: usize = 64 * 1024 * 1024;
    let get = Request::get(format!("http://catalog.mesh/bytes/{BYTES}")).body(Full::default()).unwrap();
    let mut body = open(web.outbound, get).await.into_body();
    let mut count = 0;
    while let Some(bytes) = next(&mut body).await {
        count += bytes.unwrap().len();
    }
    assert_eq!(count, BYTES);
    let post = Request::post("http://catalog.mesh/count").body(Full::new(Bytes::from(vec![7; BYTES]))).unwrap();
    assert_eq!(web.send(post).await.text(), BYTES.to_string());
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_does_not_read_holds_back_the_sender() {
    let app = Workload::http().await;
    let (web, catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    let before = resident_bytes();
    let get = Request::get("http://catalog.mesh/bytes/1073741824").body(Full::default()).unwrap();
    let _unread = open(web.outbound, get).await;
    tokio::time::sleep(Duration::from_millis(800)).await;
    let sent: u64 = catalog.records.lock().unwrap().len() as u64;
    assert_eq!(sent, 0, "it is still open");
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 48 * 1024 * 1024, "{grown} bytes for one stream that nobody reads");
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200, "others pass it by");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_announced_with_expect_is_asked_for() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    let mut socket = TcpStream::connect(web.outbound).await.unwrap();
    let head = "POST http://catalog.mesh/count HTTP/1.1\r\nhost: catalog.mesh\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut buffer = [0; 1024];
    let count = timeout(SOON, socket.read(&mut buffer)).await.unwrap().unwrap();
    assert!(buffer[..count].starts_with(b"HTTP/1.1 100 Continue\r\n"));
    socket.write_all(b"abc").await.unwrap();
    let count = timeout(SOON, socket.read(&mut buffer)).await.unwrap().unwrap();
    assert!(buffer[..count].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&buffer[..count]));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_flat_while_half_a_gigabyte_passes() {
    const BYTES: usize = 256 << 20; // in each direction; more takes long and shows the same
    const GROWTH_MAX: usize = 64 << 20;
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
    let before = resident_bytes();
    let check = |what: &str| {
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < GROWTH_MAX, "{what}: {grown} bytes more than before");
    };
    let get = Request::get(format!("http://catalog.mesh/bytes/{BYTES}")).body(Full::default()).unwrap();
    let mut body = open(web.outbound, get).await.into_body();
    let (mut count, mut checked) = (0, 0);
    while let Some(bytes) = next(&mut body).await {
        count += bytes.unwrap().len();
        if count - checked > BYTES / 64 {
            checked = count;
            check("to the caller");
        }
    }
    assert_eq!(count, BYTES);
    let mut socket = TcpStream::connect(web.outbound).await.unwrap();
    let head =
        format!("POST http://catalog.mesh/count HTTP/1.1\r\nhost: catalog.mesh\r\ncontent-length: {BYTES}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let part = vec![7; BYTES / 1024];
    for number in 0..1024 {
        timeout(SOON, socket.write_all(&part)).await.unwrap().unwrap();
        if number % 16 == 0 {
            check("from the caller");
        }
    }
    let mut answer = vec![0; 4096];
    let read = timeout(SOON, socket.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(&BYTES.to_string()), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_may_speak_http2_by_prior_knowledge_and_open_websockets_with_it() {
    let app = Workload::http().await;
    let plan = Plan::new(SERVICES, r#"permit(principal, action == Action::"http:GET", resource);"#);
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    let stream = TcpStream::connect(web.outbound).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for (path, expected) in [("/", 200), ("/a/../b", 400)] {
        let request = Request::get(format!("http://catalog.mesh{path}")).body(()).unwrap();
        let (response, _) = sender.send_request(request, true).unwrap();
        assert_eq!(timeout(SOON, response).await.unwrap().unwrap().status(), expected, "{path}");
    }
    assert!(sender.is_extended_connect_protocol_enabled());
    let mut request =
        Request::connect("http://catalog.mesh/ws").header("sec-websocket-version", "13").body(()).unwrap();
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (response, mut send) = sender.send_request(request, false).unwrap();
    let response = timeout(SOON, response).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let hello = Bytes::from_static(b"\x81\x85\0\0\0\0hello"); // a masked text frame; the workload echoes bytes
    send.send_data(hello.clone(), false).unwrap();
    assert_eq!(timeout(SOON, body.data()).await.unwrap().unwrap().unwrap(), hello);
    catalog.apply(&plan.with_policy(NOBODY), 2).await;
    let close = timeout(SOON, body.data()).await.unwrap().unwrap().unwrap();
    assert_eq!((close[0], &close[2..4]), (0x88, &1008u16.to_be_bytes()[..]));
}
