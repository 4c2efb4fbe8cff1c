//! Workloads that lie about the length of what they send, or break off: the caller never takes a part for the whole.

use std::time::Duration;

use countersign_core::service::Protocol::{Grpc, Http};
use hyper::Request;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    mesh::{EVERYONE, Plan, pair},
    workload::Workload,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_never_taken_for_whole() {
    let plan = Plan::new(&[("web", Http), ("catalog", Http)], EVERYONE);
    for (what, app) in [
        ("shorter than it says", Workload::raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await),
        ("reset", Workload::raw_until_reset(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await),
        ("reset, of no length", Workload::raw_until_reset(b"HTTP/1.1 200 OK\r\n\r\nshort").await),
        ("within a chunk", Workload::raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10\r\nshort").await),
        ("no last chunk", Workload::raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n").await),
        ("no chunk", Workload::raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n").await),
    ] {
        let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
        let answer = web.get("http://catalog.mesh/").await;
        assert!(answer.body.is_err() || answer.status == 502, "{what}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_an_answer_is_not_the_answer_to_the_next_request() {
    let long = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nshortHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged";
    let app = Workload::raw(long).await;
    let plan = Plan::new(&[("web", Http), ("catalog", Http)], EVERYONE);
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    for _ in 0..30 {
        let answer = web.get("http://catalog.mesh/").await;
        assert!(answer.status == 502 || answer.text() == "short", "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_as_long_as_announced_is_an_error() {
    let app = Workload::lying_http2().await;
    let plan = Plan::new(&[("web", Http), ("ledger", Grpc)], EVERYONE);
    let (web, _ledger, _) = pair(&plan, "ledger", app.address).await;
    let stream = TcpStream::connect(web.upstream("ledger")).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for (path, whole) in [("8", true), ("5", false), ("11", false), ("8/reset", false), ("0/reset", false)] {
        let head = Request::post(format!("http://ledger.mesh/{path}")).header("content-type", "application/grpc");
        let (response, _) = sender.send_request(head.body(()).unwrap(), true).unwrap();
        let answered = async {
            let response = response.await?;
            let refused = response.headers().contains_key("countersign-reason"); // it broke before its head was passed on
            let mut body = response.into_body();
            while let Some(chunk) = body.data().await {
                chunk?;
            }
            Ok::<_, h2::Error>(!refused)
        };
        let answered = timeout(Duration::from_secs(5), answered).await.unwrap();
        assert_eq!(matches!(answered, Ok(true)), whole, "{path}: {answered:?}");
    }
}
