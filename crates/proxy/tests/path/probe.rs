//! The exchange that a sidecar makes with itself: judged and recorded as any, and of nobody else.

use countersign_core::{
    record::{Judged, Outcome, Reason},
    service::Protocol::{Grpc, Http, Tcp},
};
use countersign_proxy::probe::probe;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    mesh::{Authority, EVERYONE, Plan, Sidecar, name, pair, trust_domain},
    workload::Workload,
};

const NOBODY: &str = "forbid(principal, action, resource);";

fn hexadecimal(nonce: u128) -> String {
    format!("{nonce:032x}")
}

/// One request to `to`, by whoever `authority` says is `caller`.
async fn ask(to: &Sidecar, authority: &Authority, caller: &str, nonce: u128) -> u16 {
    let config = authority.identity(caller).client_config(trust_domain().workload(&name(to.service)), &[b"h2"]);
    let stream = TcpStream::connect(to.inbound).await.unwrap();
    let stream = TlsConnector::from(config).connect(countersign_api::svid::server_name(), stream).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(format!("https://{}.mesh/.countersign/probe", to.service));
    let request = request.header("countersign-probe", hexadecimal(nonce)).body(()).unwrap();
    sender.send_request(request, true).unwrap().0.await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_is_judged_recorded_counted_and_traced_and_reaches_no_workload_whatever_the_answer() {
    for (protocol, policy, reason) in [
        (Http, EVERYONE, Reason::Permitted),
        (Http, NOBODY, Reason::Forbidden),
        (Grpc, EVERYONE, Reason::Permitted),
        (Tcp, EVERYONE, Reason::Permitted),
    ] {
        let app = Workload::http().await;
        let (_web, catalog, _) =
            pair(&Plan::new(&[("web", Http), ("catalog", protocol)], policy), "catalog", app.address).await;
        let nonce: u128 = 7 << 100;
        probe(&catalog.shared, catalog.inbound, &nonce.to_be_bytes()).await.unwrap();
        let records = catalog.records.lock().unwrap().clone();
        let [record] = &records[..] else { panic!("{protocol}: {records:?}") };
        assert_eq!((record.judged, record.reason), (Judged::AsProbe, reason), "{protocol}");
        assert_eq!(record.principal, "spiffe://shop.example/catalog");
        assert_eq!(record.trace_id, hexadecimal(nonce));
        assert!(record.ended.is_some() && !record.first_contact);
        let span = catalog.spans.lock().unwrap().try_recv().unwrap();
        assert_eq!(span.trace_id[..], nonce.to_be_bytes());
        assert_eq!(span.decision.unwrap().id, record.id);
        let count = |of: fn(&countersign_proxy::counts::Counts) -> u64| {
            catalog.shared.counts.iter().map(|c| of(c)).sum::<u64>()
        };
        assert_eq!(count(|counts| counts.probes.get()), 1);
        assert_eq!(count(|counts| counts.inbound.started.get() + counts.inbound.open.get()), 0, "it is no traffic");
        assert_eq!(app.seen(), 0, "{protocol}");
    }
}

/// PROVES (probes-only-itself)
#[tokio::test(flavor = "multi_thread")]
async fn only_the_nonce_that_the_agent_gave_last_once_and_by_itself_makes_an_exchange_a_probe() {
    let app = Workload::http().await;
    let plan = Plan::new(&[("web", Http), ("catalog", Http)], EVERYONE);
    let (_web, catalog, authority) = pair(&plan, "catalog", app.address).await;
    let own = "catalog";
    // Nobody listens there: the nonce stays expected.
    let expect = async |nonce: u128| {
        let nowhere = "127.0.0.1:1".parse().unwrap();
        assert!(probe(&catalog.shared, nowhere, &nonce.to_be_bytes()).await.is_err());
    };
    let judged = || catalog.records.lock().unwrap().last().unwrap().judged;
    expect(1).await;
    for (case, caller, nonce, so) in [
        ("another workload that knows it", "web", 1, Judged::AtStart),
        ("a workload with the SVID that guesses", own, 2, Judged::AtStart),
        ("the sidecar itself", own, 1, Judged::AsProbe),
        ("again", own, 1, Judged::AtStart),
    ] {
        let status = ask(&catalog, &authority, caller, nonce).await;
        assert_eq!(judged(), so, "{case}");
        assert_eq!(status, if so == Judged::AsProbe { 204 } else { 200 }, "{case}");
    }
    expect(3).await;
    expect(4).await;
    ask(&catalog, &authority, own, 3).await;
    assert_eq!(judged(), Judged::AtStart, "an earlier one is void");
    assert_eq!(app.seen(), 4);
    let outcomes: Vec<_> = catalog.records.lock().unwrap().iter().map(|record| record.outcome).collect();
    assert_eq!(outcomes, [Outcome::Permit; 5]);
}
