//! One request, one answer.

use std::time::Duration;

use bytes::Bytes;
use countersign_core::{
    change::{Edge, Member},
    record::{Judged, Outcome, Reason},
    route::{Limit, Retry, Route, RouteMatch},
    service::{FirstContact, Protocol::Http},
};
use http_body_util::{BodyExt, Full};
use hyper::Request;

use crate::{
    mesh::{EVERYONE, Plan, Sidecar, name, pair},
    workload::Workload,
};

const SERVICES: &[(&str, countersign_core::service::Protocol)] = &[("web", Http), ("catalog", Http)];
const ITEMS: &str =
    r#"permit(principal == Workload::"web", action == Action::"http:GET", resource == Operation::"catalog/items");"#;

fn route() -> Route {
    Route {
        service: name("catalog"),
        rank: 0,
        matches: RouteMatch::default(),
        split: Default::default(),
        timeout_ms: None,
        retry: None,
        limit: None,
    }
}

/// PROVES (permit-before-forward)
#[tokio::test(flavor = "multi_thread")]
async fn only_what_policy_permits_reaches_the_workload() {
    let app = Workload::http().await;
    let (web, catalog, _) = pair(&Plan::new(SERVICES, ITEMS), "catalog", app.address).await;
    let denied = web.get("http://catalog.mesh/secrets").await;
    assert_eq!(denied.seen(), (403, Some("denied")));
    assert_eq!(denied.headers["content-length"], denied.text().len().to_string(), "{denied:?}");
    assert!(!denied.headers.contains_key("transfer-encoding"), "{denied:?}");
    let id = denied.text().strip_prefix(r#"{"error":"denied","decision":""#).unwrap().strip_suffix(r#""}"#).unwrap();
    assert_eq!(id.len(), 32, "{id}");
    for (url, expected) in [
        ("http://catalog.mesh/items/../secrets", (400, Some("malformed"))),
        ("http://nobody.mesh/", (404, Some("unknown-service"))),
        ("http://example.com/", (404, Some("unknown-service"))),
        ("http://web.mesh/", (503, Some("no-instance"))),
    ] {
        assert_eq!(web.get(url).await.seen(), expected, "{url}");
    }
    assert_eq!(app.seen(), 0);
    let allowed = web.get("http://catalog.mesh/items").await;
    assert_eq!(allowed.seen(), (200, None), "{allowed:?}");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let records = catalog.records.lock().unwrap().clone();
    assert_eq!(records.len(), 2, "{records:?}");
    assert_eq!((records[0].id.as_str(), records[0].outcome, records[0].judged), (id, Outcome::Deny, Judged::AtStart));
    assert_eq!(records[0].ended.as_ref().unwrap().status, 403);
    assert_eq!((records[1].outcome, records[1].path.as_str()), (Outcome::Permit, "/items"));
    assert_eq!(records[1].principal, "spiffe://shop.example/web");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workload_learns_the_verified_caller_and_nothing_that_was_claimed() {
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    let request = Request::get("http://catalog.mesh/a%41?q=%2e%2e")
        .header("countersign-caller", "spiffe://shop.example/admin")
        .header("x-forwarded-client-cert", "URI=spiffe://shop.example/admin")
        .header("connection", "x-private")
        .header("x-private", "1")
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .header("x-kept", "1");
    let answer = web.send(request.body(Full::default()).unwrap()).await;
    let text = answer.text();
    assert!(text.starts_with("GET /aA?q=%2e%2e\n"), "{text}");
    assert_eq!(text.matches("countersign-caller: spiffe://shop.example/web\n").count(), 1, "{text}");
    assert!(text.contains("host: catalog.mesh\n") && text.contains("x-kept: 1\n"), "{text}");
    assert!(!text.contains("admin") && !text.contains("x-private"), "{text}");
    // Sidecars that tell of no span do not stand between the caller's and the workload's.
    assert!(text.contains("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n"), "{text}");
    let forged = web.get("http://catalog.mesh/forge").await;
    assert_eq!((forged.seen(), forged.text()), ((200, None), "forged"));
    assert!(!forged.headers.contains_key("countersign-caller") && !forged.headers.contains_key("x-private"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_misbehaves_is_told_apart_from_one_that_is_gone() {
    let plan = Plan { routes: vec![Route { timeout_ms: Some(200), ..route() }], ..Plan::new(SERVICES, EVERYONE) };
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (what, app, expected) in [
        ("resets", Workload::raw(b"").await.address, (502, Some("app-broke"))),
        ("garbles", Workload::raw(b"HTTP/1.1 abc\r\n\r\n").await.address, (502, Some("app-broke"))),
        ("is gone", gone, (503, Some("app-unreachable"))),
    ] {
        let (web, _catalog, _) = pair(&plan, "catalog", app).await;
        assert_eq!(web.get("http://catalog.mesh/").await.seen(), expected, "{what}");
    }
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    assert_eq!(web.get("http://catalog.mesh/stall").await.seen(), (504, Some("timed-out")));
    let app = Workload::raw(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await;
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    let answer = web.get("http://catalog.mesh/").await;
    assert!(answer.status == 200 && answer.body.is_err(), "a body cut short must not look whole: {answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_been_processed_is_not_tried_again() {
    let broken = Workload::raw(b"").await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", broken.address).await;
    let post = Request::post("http://catalog.mesh/").body(Full::new(Bytes::from("pay"))).unwrap();
    assert_eq!(web.send(post).await.seen(), (502, Some("app-broke")));
    assert_eq!(broken.seen(), 1);
    let retry = Route { retry: Some(Retry { attempts: 2, budget_percent: 100 }), ..route() };
    web.apply(&Plan { routes: vec![retry], ..Plan::new(SERVICES, EVERYONE) }, 2).await;
    let post = Request::post("http://catalog.mesh/").body(Full::new(Bytes::from("pay"))).unwrap();
    assert_eq!(web.send(post).await.seen(), (502, Some("app-broke")));
    assert_eq!(broken.seen(), 2, "not even where a rule allows retries");
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (502, Some("app-broke")));
    assert_eq!(broken.seen(), 5, "an idempotent request is tried again where a rule says so");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_processed_goes_to_another_instance() {
    let plan = Plan {
        routes: vec![Route { retry: Some(Retry { attempts: 1, budget_percent: 100 }), ..route() }],
        ..Plan::new(SERVICES, EVERYONE)
    };
    let app = Workload::http().await;
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (web, good, authority) = pair(&plan, "catalog", app.address).await;
    let bad = Sidecar::start("catalog", "2", Some(gone));
    bad.shared.set_svid(authority.svid("catalog"), Default::default());
    bad.shared.set_bundle(authority.bundle());
    bad.apply(&plan, 1).await;
    let unreachable = countersign_proxy::Endpoint {
        instance: countersign_core::identity::InstanceId::parse("catalog/3").unwrap(),
        address: gone,
        ready: true,
    };
    for other in [bad.endpoint(), unreachable] {
        web.shared.set_endpoints([(name("catalog"), vec![good.endpoint(), other])], true);
        for _ in 0..20 {
            assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_forwarded_without_a_fresh_view() {
    let app = Workload::http().await;
    let plan = Plan { max_staleness_seconds: 1, ..Plan::new(SERVICES, EVERYONE) };
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("stale")));
    web.shared.set_fresh(Duration::ZERO);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("stale")), "the callee is stale too");
    let lost = Sidecar::start("web", "1", None);
    assert_eq!(lost.get("http://catalog.mesh/").await.seen(), (503, Some("no-view")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds_for_its_rule_and_a_split_picks_the_service_that_is_judged() {
    let app = Workload::http().await;
    let services = &[("web", Http), ("catalog", Http), ("old", Http)];
    let limited = Route {
        matches: RouteMatch { path: Some("/limited".into()), ..RouteMatch::default() },
        limit: Some(Limit { rate_per_second: Some(1), burst: Some(1), concurrent_max: None }),
        ..route()
    };
    let moved = Route { service: name("old"), split: [(name("catalog"), 1)].into(), ..route() };
    let plan = Plan { routes: vec![limited, moved], ..Plan::new(services, EVERYONE) };
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(web.get("http://catalog.mesh/limited").await.seen().0);
    }
    assert_eq!(statuses, [200, 200, 429, 429]);
    let moved = web.get("http://old.mesh/").await;
    assert!(moved.text().contains("host: catalog.mesh\n"), "{moved:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_is_renewed_without_a_failed_request() {
    let app = Workload::http().await;
    let (web, catalog, authority) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    let until = tokio::time::Instant::now() + Duration::from_millis(1500);
    let load = async {
        let mut count = 0;
        while tokio::time::Instant::now() < until {
            let answers = futures_util::future::join_all((0..8).map(|_| web.get("http://catalog.mesh/"))).await;
            for answer in answers {
                assert_eq!(answer.status, 200, "{answer:?}");
                count += 1;
            }
        }
        count
    };
    let rotate = async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            catalog.shared.set_svid(authority.svid("catalog"), Default::default());
            web.shared.set_svid(authority.svid("web"), Default::default());
        }
    };
    let (count, ()) = tokio::join!(load, rotate);
    assert!(count > 50, "{count}");
    let opened: u64 = web.shared.counts.iter().map(|counts| counts.mesh_connections.get()).sum();
    assert!(opened >= 5, "new identities, new connections: {opened}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_is_new_once() {
    let app = Workload::http().await;
    let policy = r#"permit(principal, action, resource) when { !context.first_contact };"#;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, policy), "catalog", app.address).await;
    for (path, expected) in
        [("items/1", 403), ("items/2", 200), ("items/3", 200), ("items", 403), ("items", 200), ("items/4", 200)]
    {
        assert_eq!(web.get(&format!("http://catalog.mesh/{path}")).await.status, expected, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_exchange_of_an_edge_is_marked_and_where_it_is_inspected_has_to_be_small_and_plain() {
    let app = Workload::http().await;
    let mut plan = Plan::new(SERVICES, EVERYONE);
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    let post = async |path: &str, body: &'static str, kind: Option<&str>| {
        let request = Request::post(format!("http://catalog.mesh{path}"));
        let request = kind.into_iter().fold(request, |request, kind| request.header("content-type", kind));
        web.send(request.body(Full::from(body)).unwrap()).await
    };
    assert_eq!(post("/a", "x", None).await.status, 200, "marked and no more");
    plan.first_contact = FirstContact::Inspect;
    catalog.apply(&plan, 2).await;
    assert_eq!(post("/a", "x", None).await.status, 200, "known");
    let refused = post("/b", "x", None).await;
    assert_eq!(refused.seen(), (400, Some("first-contact")));
    assert!(refused.text().contains("content-type"), "{refused:?}");
    assert_eq!(post("/b", "x", None).await.status, 400, "it is still the first");
    assert_eq!(post("/b", "x", Some("text/plain")).await.status, 200);
    assert_eq!(post("/b", "x", None).await.status, 200, "and no more");
    let marks: Vec<_> =
        catalog.records.lock().unwrap().iter().map(|record| (record.path.clone(), record.first_contact)).collect();
    let expected = [("/a", true), ("/a", false), ("/b", true), ("/b", false)];
    assert_eq!(marks, expected.map(|(path, first)| (path.to_owned(), first)));
    assert_eq!(app.seen(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_is_held_until_it_is_approved_and_cut_when_the_approval_is_taken_back() {
    let app = Workload::http().await;
    let open = Plan { first_contact: FirstContact::Hold, ..Plan::new(SERVICES, EVERYONE) };
    let (web, catalog, _) = pair(&open, "catalog", app.address).await;
    let ask = async |path: &str| web.get(&format!("http://catalog.mesh{path}")).await;
    for path in ["/items/4", "/items/5", "/items/4"] {
        let held = ask(path).await;
        assert_eq!(held.seen(), (403, Some("edge-held")), "{path}");
        assert!(held.text().starts_with(r#"{"error":"edge-held","decision":""#), "{}", held.text());
    }
    assert_eq!(app.seen(), 0);
    let edge = |operation: &str| Edge { caller: Member::Service(name("web")), operation: Some(operation.into()) };
    let approved = Plan { edges: [edge("GET /items/*"), edge("GET /events")].into(), ..open.clone() };
    catalog.apply(&approved, 2).await;
    assert_eq!(ask("/items/4").await.status, 200, "the very next one");
    assert_eq!(ask("/items").await.seen(), (403, Some("edge-held")), "no other way of the same caller");
    let request = Request::get("http://catalog.mesh/events").body(Full::default()).unwrap();
    let mut body = crate::mesh::open(web.outbound, request).await.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    catalog.apply(&open, 3).await;
    let end = async { while let Some(Ok(_)) = body.frame().await {} };
    tokio::time::timeout(Duration::from_secs(2), end).await.expect("what is open is cut");
    assert_eq!(ask("/items/4").await.seen(), (403, Some("edge-held")));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let records = catalog.records.lock().unwrap().clone();
    let held: Vec<_> = records.iter().filter(|record| record.reason == Reason::EdgeHeld).collect();
    assert_eq!(held.len(), 6, "{records:?}");
    assert!(held.iter().any(|record| record.judged == Judged::WhileOpen && record.path == "/events"), "{records:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_to_an_http_service_is_a_connection_to_its_upstream() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let app = Workload::http().await;
    let (web, _catalog, _) = pair(&Plan::new(SERVICES, ITEMS), "catalog", app.address).await;
    let mut socket = tokio::net::TcpStream::connect(web.outbound).await.unwrap();
    let mut buffer = [0; 2048];
    for (request, expected) in [
        ("CONNECT catalog.mesh:80 HTTP/1.1\r\nhost: catalog.mesh:80\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
        ("GET /items HTTP/1.1\r\nhost: anything\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
        ("GET /secrets HTTP/1.1\r\nhost: anything\r\n\r\n", "HTTP/1.1 403 Forbidden\r\n"),
    ] {
        socket.write_all(request.as_bytes()).await.unwrap();
        let count = tokio::time::timeout(Duration::from_secs(5), socket.read(&mut buffer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&buffer[..count]);
        assert!(answer.starts_with(expected), "{request}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_what_is_open_finish() {
    let app = Workload::http().await;
    let (web, catalog, _) = pair(&Plan::new(SERVICES, EVERYONE), "catalog", app.address).await;
    let upload = Request::get("http://catalog.mesh/bytes/33554432").body(Full::default()).unwrap();
    let response = crate::mesh::open(web.outbound, upload).await;
    let shared = catalog.shared.clone();
    let drain = tokio::spawn(async move { shared.drain(Duration::from_secs(10)).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
    assert_eq!(body.len(), 33_554_432);
    tokio::time::timeout(Duration::from_secs(5), drain).await.unwrap().unwrap();
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("unreachable")));
    catalog.stop().await;
}
