//! A service with a contract: what is no operation of it does not reach the workload, whatever policies say.

use std::time::Duration;

use countersign_core::{
    contract::{Contract, Syntax, read_openapi},
    record::{Judged, Outcome, Reason},
    service::Protocol::{Grpc, Http},
};
use http_body_util::{BodyExt, Full};
use hyper::Request;

use crate::{
    mesh::{EVERYONE, Plan, Sidecar, open, pair},
    workload::Workload,
};

fn contract(paths: &str) -> Contract {
    read_openapi(&format!("openapi: 3.1.0\npaths:\n{paths}"), Syntax::Yaml).unwrap_or_else(|e| panic!("{e:?}"))
}

const PATHS: &str = "  /items: { get: { operationId: listItems } }
  /items/{id}: { get: { operationId: getItem }, put: { operationId: replaceItem } }
  /events: { get: { operationId: follow } }
  /socket: { get: { operationId: talk } }
";

fn plan(policy: &str) -> Plan {
    Plan { contract: Some(contract(PATHS)), ..Plan::new(&[("web", Http), ("catalog", Http)], policy) }
}

async fn ask(web: &Sidecar, method: &str, url: &str) -> (u16, Option<String>) {
    let request = Request::builder().method(method).uri(url).body(Full::default()).unwrap();
    let answer = web.send(request).await;
    (answer.status, answer.reason)
}

/// PROVES (contract-first).
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_operation_of_the_contract_does_not_reach_the_workload_and_is_recorded() {
    let app = Workload::http().await;
    let (web, catalog, _) = pair(&plan(EVERYONE), "catalog", app.address).await;
    let refused = (403, Some("not-in-contract".to_owned()));
    let malformed = (400, Some("malformed".to_owned()));
    for (method, path, expected) in [
        ("GET", "/", &refused),
        ("GET", "/admin", &refused),
        ("GET", "/items/", &refused),
        ("GET", "/items/4/5", &refused),
        ("POST", "/items", &refused),
        ("DELETE", "/items/4", &refused),
        ("HEAD", "/items", &refused),
        ("OPTIONS", "/items", &refused),
        ("PATCH", "/items/4", &refused),
        ("BREW", "/items", &refused),
        ("get", "/items", &refused),
        ("GET", "/ITEMS", &refused),
        ("GET", "/items%3Bx/4", &refused),
        ("GET", "/items/4%2Fadmin", &malformed),
        ("GET", "/items%2F4", &malformed),
        ("GET", "/items/%2e%2e/admin", &malformed),
        ("GET", "/items/../admin", &malformed),
        ("GET", "/items//admin", &malformed),
        ("GET", "/items;/admin", &malformed),
        ("GET", "/items/4%5cadmin", &malformed),
        ("GET", "/items/4%252fadmin", &malformed),
    ] {
        assert_eq!(ask(&web, method, &format!("http://catalog.mesh{path}")).await, *expected, "{method} {path}");
    }
    assert_eq!(app.seen(), 0);
    for (path, expected) in [("/items", "listItems"), ("/%69tems/a%20b?x=/../y", "getItem"), ("/items?a", "listItems")]
    {
        assert_eq!(ask(&web, "GET", &format!("http://catalog.mesh{path}")).await, (200, None), "{path}");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let last = catalog.records.lock().unwrap().last().cloned().unwrap();
        assert_eq!((last.operation.as_deref(), last.outcome), (Some(expected), Outcome::Permit), "{path}");
    }
    let records = catalog.records.lock().unwrap().clone();
    let denied: Vec<_> = records.iter().filter(|record| record.reason == Reason::NotInContract).collect();
    assert_eq!(denied.len(), 13, "{records:?}");
    assert!(denied.iter().all(|record| record.operation.is_none() && record.outcome == Outcome::Deny));
    let told = web.get("http://catalog.mesh/admin").await;
    assert!(told.text().starts_with(r#"{"error":"not-in-contract","decision":""#), "{}", told.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_a_resource_of_policies() {
    let app = Workload::http().await;
    let policy = r#"permit(principal, action, resource == Operation::"catalog/getItem");"#;
    let (web, _catalog, _) = pair(&plan(policy), "catalog", app.address).await;
    assert_eq!(ask(&web, "GET", "http://catalog.mesh/items/4").await, (200, None));
    assert_eq!(ask(&web, "GET", "http://catalog.mesh/items").await, (403, Some("denied".into())));
    assert_eq!(ask(&web, "PUT", "http://catalog.mesh/items/4").await, (403, Some("denied".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_operation_leaves_the_contract_is_cut() {
    let app = Workload::http().await;
    let before = plan(EVERYONE);
    let (web, catalog, _) = pair(&before, "catalog", app.address).await;
    let request = Request::get("http://catalog.mesh/events").body(Full::default()).unwrap();
    let mut body = open(web.outbound, request).await.into_body();
    assert!(body.frame().await.unwrap().is_ok());
    let after = Plan { contract: Some(contract("  /items: { get: {} }\n")), ..before };
    catalog.apply(&after, 2).await;
    let end = async { while let Some(Ok(_)) = body.frame().await {} };
    tokio::time::timeout(Duration::from_secs(2), end).await.expect("it ends");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let last = catalog.records.lock().unwrap().last().cloned().unwrap();
    assert_eq!((last.reason, last.judged), (Reason::NotInContract, Judged::WhileOpen));
    assert_eq!(ask(&web, "GET", "http://catalog.mesh/items").await, (200, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_of_a_grpc_service_is_its_methods() {
    let app = Workload::grpc().await;
    let method = |name: &str| countersign_core::contract::Operation {
        name: name.into(),
        method: "POST".into(),
        path: format!("/{name}").into(),
    };
    let contract = Contract::new(vec![method("shop.Orders/Place"), method("shop.Orders/Watch")]).unwrap();
    let plan = Plan { contract: Some(contract), ..Plan::new(&[("web", Http), ("orders", Grpc)], EVERYONE) };
    let (web, orders, _) = pair(&plan, "orders", app.address).await;
    for (path, expected) in
        [("shop.Orders/Place", None), ("shop.Orders/Cancel", Some("7")), ("shop.Orders/place", Some("7"))]
    {
        let head = Request::post(format!("http://orders.mesh/{path}")).header("content-type", "application/grpc");
        let answer = open(web.outbound, head.body(Full::default()).unwrap()).await;
        let status = answer.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned());
        assert_eq!(status.as_deref(), expected, "{path}");
        if expected.is_some() {
            assert_eq!(answer.headers()["countersign-reason"], "not-in-contract");
        }
    }
    // A GET of a method's path is no call of it.
    let head = Request::get("http://orders.mesh/shop.Orders/Place").body(Full::default()).unwrap();
    assert_eq!(open(web.outbound, head).await.headers()["countersign-reason"], "not-in-contract");
    tokio::time::sleep(Duration::from_millis(100)).await;
    let records = orders.records.lock().unwrap().clone();
    assert!(records.iter().any(|record| record.operation.as_deref() == Some("shop.Orders/Place")), "{records:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_contract_a_service_is_a_matter_of_policies_alone() {
    let app = Workload::http().await;
    let (web, catalog, _) =
        pair(&Plan::new(&[("web", Http), ("catalog", Http)], EVERYONE), "catalog", app.address).await;
    assert_eq!(ask(&web, "DELETE", "http://catalog.mesh/anything").await, (200, None));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(catalog.records.lock().unwrap()[0].operation, None);
}
