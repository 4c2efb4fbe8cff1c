//! What is open on a connection ends with the proof of who is at its other end: an SVID that expires, an authority that is
//! trusted no longer.

use std::time::Duration;

use bytes::Bytes;
use countersign_api::svid::X509Svid;
use countersign_core::{
    record::End,
    service::Protocol::{self, Http},
    signal::{Revocation, Signal, SignalSeq, Signals},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming};
use tokio::time::{Instant, timeout};

use crate::{
    mesh::{Authority, EVERYONE, Plan, Sidecar, open},
    workload::Workload,
};

const SERVICES: &[(&str, Protocol)] = &[("web", Http), ("batch", Http), ("catalog", Http)];

struct Mesh {
    old: Authority,
    new: Authority,
    web: Sidecar,
    batch: Sidecar,
    catalog: Sidecar,
}

/// `web` proves itself by the old authority, the others by the new one; both are trusted.
async fn mesh() -> Mesh {
    let app = Workload::http().await;
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let start = |service, app| Sidecar::start(service, "1", app);
    let (web, batch, catalog) = (start("web", None), start("batch", None), start("catalog", Some(app.address)));
    for (sidecar, authority) in [(&web, &old), (&batch, &new), (&catalog, &new)] {
        sidecar.ready(authority, &Plan::new(SERVICES, EVERYONE), &[&catalog]).await;
        sidecar.shared.set_bundle(Authority::bundle_of(&[&old, &new]));
    }
    Mesh { old, new, web, batch, catalog }
}

async fn events(of: &Sidecar) -> Incoming {
    let request = Request::get("http://catalog.mesh/events").body(Full::<Bytes>::default()).unwrap();
    let response = open(of.outbound, request).await;
    assert_eq!(response.status(), 200);
    response.into_body()
}

/// Reads for so long; whether the stream is still open then. One that ended must not look whole.
async fn goes_on(body: &mut Incoming, for_so_long: Duration) -> bool {
    let read = async {
        loop {
            match body.frame().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return,
                None => panic!("a cut stream looks whole"),
            }
        }
    };
    timeout(for_so_long, read).await.is_err()
}

/// PROVES (nothing-outlives-its-proof)
#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_the_callee_trusts_no_longer_takes_its_callers_with_it() {
    let Mesh { new, web, batch, catalog, .. } = mesh().await;
    let (mut cut, mut kept) = (events(&web).await, events(&batch).await);
    assert!(goes_on(&mut cut, Duration::from_millis(200)).await);
    catalog.shared.set_bundle(new.bundle());
    assert!(!goes_on(&mut cut, Duration::from_secs(2)).await);
    assert!(goes_on(&mut kept, Duration::from_millis(500)).await, "the other caller does not notice");
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("certificate-refused")), "nothing new either");
    let records = catalog.records.lock().unwrap().clone();
    let ends: Vec<_> = records.iter().filter_map(|record| record.ended.as_ref().map(|ended| ended.how)).collect();
    assert_eq!(ends, [End::Cut]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_the_caller_trusts_no_longer_takes_its_callees_with_it() {
    let Mesh { old, web, batch, .. } = mesh().await;
    let (mut cut, mut kept) = (events(&web).await, events(&batch).await);
    assert!(goes_on(&mut cut, Duration::from_millis(200)).await);
    web.shared.set_bundle(old.bundle());
    assert!(!goes_on(&mut cut, Duration::from_secs(2)).await);
    assert!(goes_on(&mut kept, Duration::from_millis(500)).await);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("unreachable")));
}

/// PROVES (nothing-outlives-its-proof)
#[tokio::test(flavor = "multi_thread")]
async fn an_expired_svid_ends_what_is_open() {
    let Mesh { old, web, catalog, .. } = mesh().await;
    let until = time::OffsetDateTime::now_utc() + time::Duration::seconds(2);
    web.shared.set_svid(old.svid_until("web", until), Default::default());
    tokio::time::sleep(Duration::from_millis(50)).await;
    let began = Instant::now();
    let mut body = events(&web).await;
    assert!(!goes_on(&mut body, Duration::from_secs(12)).await);
    assert!(began.elapsed() > Duration::from_secs(4), "it has its time to drain");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let records = catalog.records.lock().unwrap().clone();
    assert_eq!(records[0].ended.as_ref().unwrap().how, End::Cut);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("certificate-refused")), "nothing new either");
}

fn revoking(svids: &[&X509Svid]) -> Signals {
    let of = |svid: &&X509Svid| Revocation { serial: svid.serial().unwrap(), expires_at_ms: u64::MAX };
    let revoked = svids.iter().map(of).map(Signal::Certificate);
    let mut signals = Signals::default();
    signals.welcome(SignalSeq(1), revoked);
    signals
}

/// PROVES (revoked-proves-nothing)
/// PROVES (heeded-is-cut)
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_svid_is_revoked_is_cut_off_before_that_is_acknowledged_and_comes_back_with_another() {
    let Mesh { old, web, batch, catalog, .. } = mesh().await;
    let shown = web.shared.identity().unwrap().svid();
    let (mut cut, mut kept) = (events(&web).await, events(&batch).await);
    assert!(goes_on(&mut cut, Duration::from_millis(200)).await);
    catalog.shared.heed(revoking(&[&shown]));
    assert_eq!(catalog.shared.end_revoked().await, SignalSeq(1));
    let ends: Vec<_> = catalog.records.lock().unwrap().iter().filter_map(|record| record.ended.clone()).collect();
    assert!(ends.iter().all(|ended| ended.how == End::Cut), "{ends:?}");
    let answer = web.get("http://catalog.mesh/").await;
    assert!(matches!(answer.seen(), (503, Some("unproven" | "certificate-refused"))), "{:?}", answer.seen());
    assert!(!goes_on(&mut cut, Duration::from_secs(2)).await);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("certificate-refused")), "no new connection");
    assert!(goes_on(&mut kept, Duration::from_millis(500)).await, "the other caller does not notice");
    web.shared.set_svid(old.svid("web"), Default::default());
    let back = async {
        while web.get("http://catalog.mesh/").await.status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(5), back).await.expect("another SVID is good");
}

/// PROVES (revoked-proves-nothing)
#[tokio::test(flavor = "multi_thread")]
async fn a_callee_whose_svid_is_revoked_is_left() {
    let Mesh { web, batch, catalog, .. } = mesh().await;
    let shown = catalog.shared.identity().unwrap().svid();
    let (mut cut, mut kept) = (events(&web).await, events(&batch).await);
    assert!(goes_on(&mut cut, Duration::from_millis(200)).await);
    web.shared.heed(revoking(&[&shown]));
    web.shared.end_revoked().await;
    assert!(!goes_on(&mut cut, Duration::from_secs(2)).await);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("unreachable")));
    assert!(goes_on(&mut kept, Duration::from_millis(500)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_revoked_before_a_sidecar_had_an_identity_is_believed_by_it_never() {
    let app = Workload::http().await;
    let authority = Authority::new("shop.example");
    let start = |service, app| Sidecar::start(service, "1", app);
    let (web, catalog) = (start("web", None), start("catalog", Some(app.address)));
    web.ready(&authority, &Plan::new(SERVICES, EVERYONE), &[&catalog]).await;
    let shown = web.shared.identity().unwrap().svid();
    catalog.shared.heed(revoking(&[&shown]));
    catalog.ready(&authority, &Plan::new(SERVICES, EVERYONE), &[&catalog]).await;
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("certificate-refused")));
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_certificate_the_callee_refuses_is_told_so_and_sends_it_nothing() {
    let Mesh { old, new, web, catalog, .. } = mesh().await;
    catalog.shared.set_bundle(new.bundle());
    let body = || Full::new(Bytes::from_static(b"not twice"));
    let answers = futures_util::future::join_all(
        (0..4).map(|_| web.send(Request::post("http://catalog.mesh/").body(body()).unwrap())),
    );
    for answer in answers.await {
        assert_eq!(answer.seen(), (503, Some("certificate-refused")));
    }
    catalog.shared.set_bundle(Authority::bundle_of(&[&old, &new]));
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
}
