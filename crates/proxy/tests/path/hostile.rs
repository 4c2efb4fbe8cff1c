//! Bad input. The refusal is counted by what the workload saw: nothing.

use std::{sync::Arc, time::Duration};

use countersign_core::service::Protocol::Http;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    mesh::{Authority, EVERYONE, Plan, name, pair, raw, trust_domain},
    workload::Workload,
};

fn plan() -> Plan {
    Plan::new(&[("web", Http), ("catalog", Http)], EVERYONE)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_can_be_framed_in_two_ways_is_refused() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&plan(), "catalog", app.address).await;
    let line = "POST http://catalog.mesh/a HTTP/1.1\r\n";
    let host = "Host: catalog.mesh\r\n";
    for (what, request) in [
        ("CL.TE", format!("{line}{host}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG")),
        ("TE.CL", format!("{line}{host}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n\r\n0\r\n\r\n")),
        ("two lengths", format!("{line}{host}Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd")),
        ("the same length twice", format!("{line}{host}Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc")),
        ("a list of lengths", format!("{line}{host}Content-Length: 3, 3\r\n\r\nabc")),
        ("a signed length", format!("{line}{host}Content-Length: +3\r\n\r\nabc")),
        ("TE of something else", format!("{line}{host}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n")),
        ("TE of two", format!("{line}{host}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")),
        ("TE twice", format!("{line}{host}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n")),
        ("TE with a tab", format!("{line}{host}Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n")),
        ("space before the colon", format!("{line}{host}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n")),
        ("obs-fold", format!("{line}{host}X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("bare CR", format!("{line}{host}X-A: b\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("bare LF", format!("{line}{host}X-A: b\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        ("NUL", format!("{line}{host}X-A: b\0c\r\n\r\n")),
        ("two hosts", format!("{line}{host}Host: web.mesh\r\n\r\n")),
        ("no host", format!("{line}\r\n")),
        ("another host than the target", format!("{line}Host: web.mesh\r\n\r\n")),
        ("user information", "GET http://me@catalog.mesh/ HTTP/1.1\r\nHost: me@catalog.mesh\r\n\r\n".into()),
        (
            "HTTP/1.0 with TE",
            format!("POST http://catalog.mesh/ HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ),
        ("HTTP/0.9", "GET /\r\n\r\n".into()),
        ("HTTP/1.2", format!("GET http://catalog.mesh/ HTTP/1.2\r\n{host}\r\n")),
        ("a length with CONNECT", format!("CONNECT catalog.mesh:80 HTTP/1.1\r\n{host}Content-Length: 3\r\n\r\nabc")),
        (
            "a body with an upgrade",
            format!("{line}{host}Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 3\r\n\r\nabc"),
        ),
    ] {
        let answer = raw(web.outbound, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{what}: {answer}");
        assert!(answer.contains("countersign-reason: malformed\r\n"), "{what}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{what}: {answer}");
    }
    assert_eq!(app.seen(), 0);
    let two = format!(
        "{line}{host}Transfer-Encoding: chunked\r\n\r\n1;x=y\r\nA\r\n0\r\n\r\nGET http://catalog.mesh/b HTTP/1.1\r\n{host}\r\n"
    );
    let answer = raw(web.outbound, two.as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "well-framed requests in a row pass: {answer}");
    for (what, chunks) in
        [("bare LF", "1\nA\r\n0\r\n\r\n"), ("too long", "2\r\nABC\r\n0\r\n\r\n"), ("signed", "+1\r\nA\r\n0\r\n\r\n")]
    {
        let answer =
            raw(web.outbound, format!("{line}{host}Transfer-Encoding: chunked\r\n\r\n{chunks}").as_bytes()).await;
        assert!(!answer.contains(" 200 "), "{what}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_can_be_read_in_two_ways_is_refused() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&plan(), "catalog", app.address).await;
    for path in [
        "/a/../b",
        "/a/%2e%2e/b",
        "/a/%2E./b",
        "/a/.",
        "//a",
        "/a//b",
        "/a;x=1/b",
        "/a%00",
        "/a%2fb",
        "/a%2Fb",
        "/a\\b",
        "/a%5cb",
        "/a%252e",
        "/a%zz",
        "/a%",
        "/%ff",
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: catalog.mesh\r\n\r\n");
        let answer = raw(web.outbound, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{path}: {answer}");
    }
    assert_eq!(app.seen(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_bounded_in_size_count_and_time() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&plan(), "catalog", app.address).await;
    let start = "GET http://catalog.mesh/ HTTP/1.1\r\nHost: catalog.mesh\r\n";
    for (what, rest) in [
        ("one long header", format!("X-A: {}\r\n\r\n", "a".repeat(100_000))),
        ("many headers", format!("{}\r\n", (0..1000).map(|n| format!("X-{n}: 1\r\n")).collect::<String>())),
        ("a head without end", "X-A: b\r\n".repeat(20_000)),
    ] {
        let answer = raw(web.outbound, format!("{start}{rest}").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{what}: {answer}");
    }
    let mut slow = TcpStream::connect(web.outbound).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
    let began = tokio::time::Instant::now();
    let mut rest = Vec::new();
    let read = timeout(Duration::from_secs(15), slow.read_to_end(&mut rest)).await;
    assert!(read.is_ok() && began.elapsed() > Duration::from_secs(8), "a head takes ten seconds at most");
    assert_eq!(app.seen(), 0);
}

/// PROVES (verified-peer)
#[tokio::test(flavor = "multi_thread")]
async fn whoever_cannot_prove_a_workload_of_this_mesh_gets_nothing() {
    let app = Workload::http().await;
    let (_web, catalog, authority) = pair(&plan(), "catalog", app.address).await;
    assert_eq!(raw(catalog.inbound, b"GET / HTTP/1.1\r\nHost: catalog.mesh\r\n\r\n").await.matches("HTTP").count(), 0);
    assert_eq!(raw(catalog.inbound, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.matches("HTTP").count(), 0);
    let expired = authority.svid_until("web", time::OffsetDateTime::now_utc() - time::Duration::MINUTE);
    let foreign = Authority::new("another root").svid("web");
    for (what, svid, expected) in
        [("expired", expired, false), ("foreign", foreign, false), ("good", authority.svid("web"), true)]
    {
        let identity = countersign_api::svid::TlsIdentity::new(svid, authority.bundle());
        let config = identity.client_config(trust_domain().workload(&name("catalog")), &[b"h2"]);
        assert_eq!(reaches(config, catalog.inbound).await, expected, "{what}");
    }
    assert_eq!(app.seen(), 1);
}

async fn reaches(config: Arc<rustls::ClientConfig>, inbound: std::net::SocketAddr) -> bool {
    let stream = TcpStream::connect(inbound).await.unwrap();
    let Ok(stream) = TlsConnector::from(config).connect(countersign_api::svid::server_name(), stream).await else {
        return false;
    };
    let Ok((mut sender, connection)) = h2::client::handshake(stream).await else { return false };
    tokio::spawn(connection);
    let request = http::Request::get("https://catalog.mesh/").body(()).unwrap();
    let Ok((response, _)) = sender.send_request(request, true) else { return false };
    response.await.is_ok_and(|response| response.status() == 200)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callees_sidecar_answers_for_its_own_service_only() {
    let app = Workload::http().await;
    let (_web, catalog, authority) = pair(&plan(), "catalog", app.address).await;
    let config = authority.identity("web").client_config(trust_domain().workload(&name("catalog")), &[b"h2"]);
    let stream = TcpStream::connect(catalog.inbound).await.unwrap();
    let stream = TlsConnector::from(config).connect(countersign_api::svid::server_name(), stream).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for (request, expected) in [
        (http::Request::get("https://web.mesh/").body(()), 421),
        (http::Request::get("https://catalog.mesh/").header("host", "web.mesh").body(()), 400),
        (http::Request::get("https://catalog.mesh/a/../b").body(()), 400),
        (http::Request::connect("catalog.mesh:80").body(()), 400),
        (http::Request::get("https://catalog.mesh:8080/").body(()), 200),
    ] {
        let (response, _) = sender.send_request(request.unwrap(), true).unwrap();
        assert_eq!(response.await.unwrap().status(), expected);
    }
    assert_eq!(app.seen(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_their_connection_and_nothing_else() {
    let app = Workload::http().await;
    let (web, catalog, authority) = pair(&plan(), "catalog", app.address).await;
    let config = authority.identity("web").client_config(trust_domain().workload(&name("catalog")), &[b"h2"]);
    let stream = TcpStream::connect(catalog.inbound).await.unwrap();
    let stream = TlsConnector::from(config).connect(countersign_api::svid::server_name(), stream).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let attack = async {
        for _ in 0..100_000 {
            let request = http::Request::get("https://catalog.mesh/stall").body(()).unwrap();
            let Ok((_response, mut stream)) = sender.send_request(request, false) else { return };
            tokio::time::sleep(Duration::from_micros(100)).await; // long enough to be accepted
            stream.send_reset(h2::Reason::CANCEL);
        }
        panic!("100 000 streams were taken");
    };
    assert!(timeout(Duration::from_secs(20), attack).await.is_ok(), "the connection outlives the attack");
    assert!(app.seen() < 2_000, "{} requests reached the workload", app.seen());
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
    let open: u64 = catalog.shared.counts.iter().map(|counts| counts.inbound.open.get()).sum();
    assert!(open <= 256, "{open} exchanges are open");
    connection.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_never_ends_ends_its_connection() {
    let app = Workload::http().await;
    let (web, catalog, authority) = pair(&plan(), "catalog", app.address).await;
    let frame = |kind: u8, payload: &[u8]| {
        let length = &(payload.len() as u32).to_be_bytes()[1..];
        [length, &[kind, 0, 0, 0, 0, if kind == 4 { 0 } else { 1 }], payload].concat()
    };
    let field = [&[0x10, 1, b'a', 0x7f, 0x81, 0x7d][..], &[b'b'; 16_000]].concat(); // a: bbb…, never indexed
    for (what, continuation) in [("empty", frame(9, b"")), ("small", frame(9, &[0x82])), ("large", frame(9, &field))] {
        let config = authority.identity("web").client_config(trust_domain().workload(&name("catalog")), &[b"h2"]);
        let stream = TcpStream::connect(catalog.inbound).await.unwrap();
        let server = countersign_api::svid::server_name();
        let mut stream = TlsConnector::from(config).connect(server, stream).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&[frame(4, b""), frame(1, &[0x82])].concat()).await.unwrap();
        let flood = async {
            for sent in 0usize.. {
                if stream.write_all(&continuation).await.is_err() || stream.flush().await.is_err() {
                    return sent;
                }
            }
            0
        };
        let sent = timeout(Duration::from_secs(10), flood).await;
        assert!(sent.is_ok(), "{what}: the flood goes on");
    }
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
    assert_eq!(app.seen(), 1);
}
