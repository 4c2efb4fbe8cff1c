//! What is refused or cut because a limit is reached: of exchanges, of a rule, of the record, of the view's age.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use countersign_api::local::RecordFilter;
use countersign_core::{
    route::{Limit, Route, RouteMatch},
    service::{
        Protocol::{self, Http},
        Recorded,
    },
};
use countersign_proxy::{
    decided::Recorder,
    record::{Sink, SinkConfig},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming};
use tokio::time::{Instant, timeout};

use crate::{
    mesh::{Authority, EVERYONE, Plan, Sidecar, name, open, pair},
    workload::Workload,
};

const SERVICES: &[(&str, Protocol)] = &[("web", Http), ("batch", Http), ("catalog", Http)];
const SOON: Duration = Duration::from_secs(5);

/// An exchange that stays open until it is dropped.
async fn events(of: &Sidecar) -> Response<Incoming> {
    let request = Request::get("http://catalog.mesh/events").body(Full::<Bytes>::default()).unwrap();
    open(of.outbound, request).await
}

/// Asks until the answer is `wanted`.
async fn becomes(of: &Sidecar, wanted: (u16, Option<&str>)) {
    let until = Instant::now() + SOON;
    loop {
        let answer = of.get("http://catalog.mesh/").await;
        if answer.seen() == wanted {
            return;
        }
        assert!(Instant::now() < until, "{wanted:?} is wanted and not {answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_be_recorded_is_not_forwarded_when_the_record_is_full() {
    let app = Workload::http().await;
    let plan = Plan { recorded: Recorded::Always, ..Plan::new(SERVICES, EVERYONE) };
    let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
    catalog.full.store(true, Ordering::SeqCst);
    assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("unrecorded")));
    assert_eq!(app.seen(), 0);
    catalog.full.store(false, Ordering::SeqCst);
    assert_eq!(web.get("http://catalog.mesh/").await.status, 200);
    assert_eq!(catalog.records.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_be_recorded_waits_for_a_directory_that_can_be_written() {
    let app = Workload::http().await;
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::write(&records, "in the way").unwrap();
    let (reports, _kept) = tokio::sync::mpsc::channel(4);
    let instance = countersign_core::identity::InstanceId::new(&name("catalog"), "1");
    let config = SinkConfig { instance, dir: records.clone(), bytes_max: 64 << 20, worker_count: 2 };
    let (sink, recorders) = Sink::start(config, reports).unwrap();
    let recorders = recorders.into_iter().map(|recorder| Box::new(recorder) as Box<dyn Recorder + Send>).collect();
    let plan = Plan { recorded: Recorded::Always, ..Plan::new(SERVICES, EVERYONE) };
    let authority = Authority::new("root");
    let catalog = Sidecar::start_with("catalog", "1", Some(app.address), recorders);
    let web = Sidecar::start("web", "1", None);
    catalog.ready(&authority, &plan, &[]).await;
    web.ready(&authority, &plan, &[&catalog]).await;
    for _ in 0..3 {
        assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("unrecorded")));
    }
    assert_eq!(app.seen(), 0, "not even the first goes on unrecorded");
    std::fs::remove_file(&records).unwrap();
    becomes(&web, (200, None)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(sink.reader().counts().kept >= app.seen() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_queued_for_a_write_that_fails_is_not_forwarded() {
    let app = Workload::http().await;
    let dir = tempfile::tempdir().unwrap();
    let (records, moved) = (dir.path().join("records"), dir.path().join("moved"));
    let (reports, _kept) = tokio::sync::mpsc::channel(4);
    let instance = countersign_core::identity::InstanceId::new(&name("catalog"), "1");
    let config = SinkConfig { instance, dir: records.clone(), bytes_max: 0, worker_count: 2 };
    let (sink, recorders) = Sink::start(config, reports).unwrap();
    let recorders = recorders.into_iter().map(|recorder| Box::new(recorder) as Box<dyn Recorder + Send>).collect();
    let plan = Plan { recorded: Recorded::Always, ..Plan::new(SERVICES, EVERYONE) };
    let authority = Authority::new("root");
    let catalog = Sidecar::start_with("catalog", "1", Some(app.address), recorders);
    let web = Sidecar::start("web", "1", None);
    catalog.ready(&authority, &plan, &[]).await;
    web.ready(&authority, &plan, &[&catalog]).await;
    let long = "x".repeat(4000);
    assert_eq!(web.get(&format!("http://catalog.mesh/first/{long}")).await.status, 200);
    // The open segment takes what still fits; the next one cannot be made.
    std::fs::rename(&records, &moved).unwrap();
    std::fs::write(&records, "in the way").unwrap();
    let mut forwarded = 1;
    loop {
        let some: Vec<_> = (0..8).map(|n| format!("http://catalog.mesh/{n}/{long}")).collect();
        let answers = futures_util::future::join_all(some.iter().map(|url| web.get(url))).await;
        forwarded += answers.iter().filter(|answer| answer.status == 200).count();
        if answers.iter().any(|answer| answer.seen() == (503, Some("unrecorded"))) {
            break;
        }
        assert!(forwarded < 1000, "the segment is never full");
    }
    assert_eq!(app.seen(), forwarded);
    std::fs::remove_file(&records).unwrap();
    std::fs::rename(&moved, &records).unwrap();
    let all = RecordFilter { limit: Some(10_000), ..RecordFilter::default() };
    let kept = sink.reader().read(&all).unwrap().len();
    assert!(kept >= forwarded, "{forwarded} were forwarded and {kept} recorded");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_exchanges_than_the_service_allows_are_refused_at_either_end() {
    let app = Workload::http().await;
    let plan = Plan::new(SERVICES, EVERYONE);
    let few = Plan { exchanges_max: 2, ..plan.clone() };
    for (at_callee, at_caller) in [(&few, &plan), (&plan, &few)] {
        let (web, catalog, _) = pair(&plan, "catalog", app.address).await;
        catalog.apply(at_callee, 2).await;
        web.apply(at_caller, 2).await;
        let (one, two) = (events(&web).await, events(&web).await);
        assert_eq!((one.status(), two.status()), (200.try_into().unwrap(), 200.try_into().unwrap()));
        assert_eq!(web.get("http://catalog.mesh/").await.seen(), (503, Some("overloaded")));
        drop(one);
        becomes(&web, (200, None)).await;
        drop(two);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_rule_hold_for_each_caller_by_itself() {
    let app = Workload::http().await;
    let limited = |path: &str, limit| Route {
        service: name("catalog"),
        rank: 0,
        matches: RouteMatch { path: Some(path.into()), ..RouteMatch::default() },
        split: Default::default(),
        timeout_ms: None,
        retry: None,
        limit: Some(limit),
    };
    let routes = vec![
        limited("/events", Limit { rate_per_second: None, burst: None, concurrent_max: Some(1) }),
        limited("/rated", Limit { rate_per_second: Some(1), burst: None, concurrent_max: None }),
    ];
    let plan = Plan { routes, ..Plan::new(SERVICES, EVERYONE) };
    let (web, catalog, authority) = pair(&plan, "catalog", app.address).await;
    let batch = Sidecar::start("batch", "1", None);
    batch.ready(&authority, &plan, &[&catalog]).await;
    for caller in [&web, &batch] {
        assert_eq!(caller.get("http://catalog.mesh/rated").await.seen(), (200, None));
        assert_eq!(caller.get("http://catalog.mesh/rated").await.seen(), (429, Some("rate-limited")));
        let first = events(caller).await;
        assert_eq!(caller.get("http://catalog.mesh/events").await.seen(), (429, Some("concurrency-limited")));
        drop(first);
        let until = Instant::now() + SOON;
        while events(caller).await.status() != 200 {
            assert!(Instant::now() < until, "the place does not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callee_holds_all_instances_of_a_caller_to_one_limit() {
    let app = Workload::http().await;
    let limited = |path: &str, limit| Route {
        service: name("catalog"),
        rank: 0,
        matches: RouteMatch { path: Some(path.into()), ..RouteMatch::default() },
        split: Default::default(),
        timeout_ms: None,
        retry: None,
        limit: Some(limit),
    };
    let routes = vec![
        limited("/events", Limit { rate_per_second: None, burst: None, concurrent_max: Some(1) }),
        limited("/rated", Limit { rate_per_second: Some(1), burst: Some(1), concurrent_max: None }),
    ];
    let plan = Plan { routes, ..Plan::new(SERVICES, EVERYONE) };
    let (one, catalog, authority) = pair(&plan, "catalog", app.address).await;
    let (two, batch) = (Sidecar::start("web", "2", None), Sidecar::start("batch", "1", None));
    two.ready(&authority, &plan, &[&catalog]).await;
    batch.ready(&authority, &plan, &[&catalog]).await;
    let held = events(&one).await;
    assert_eq!(two.get("http://catalog.mesh/events").await.seen(), (429, Some("concurrency-limited")));
    assert_eq!(events(&batch).await.status(), 200, "another caller has a limit of its own");
    drop(held);
    let until = Instant::now() + SOON;
    while events(&two).await.status() != 200 {
        assert!(Instant::now() < until, "the place does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut seen = Vec::new();
    for of in [&one, &two, &one, &two, &batch] {
        seen.push(of.get("http://catalog.mesh/rated").await.status);
    }
    assert_eq!(seen, [200, 200, 429, 429, 200], "the burst is the caller's, not an instance's");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_keeps_failing_is_left_out() {
    let (app, broken) = (Workload::http().await, Workload::raw(b"").await);
    let plan = Plan::new(SERVICES, EVERYONE);
    let (web, good, authority) = pair(&plan, "catalog", app.address).await;
    let ill = Sidecar::start("catalog", "2", Some(broken.address));
    ill.ready(&authority, &plan, &[]).await;
    web.reaches(&[&good, &ill]);
    let (mut in_a_row, mut failed) = (0, 0);
    while in_a_row < 40 {
        match web.get("http://catalog.mesh/").await.seen() {
            (200, None) => in_a_row += 1,
            other => {
                assert_eq!(other, (502, Some("app-broke")));
                (in_a_row, failed) = (0, failed + 1);
            }
        }
        assert!(failed <= 10, "five failures in a row, in each of two workers");
    }
    let ejections: u64 = web.shared.counts.iter().map(|counts| counts.ejections.get()).sum();
    assert!(ejections >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_ends_when_the_view_is_too_old_to_judge_it_again() {
    let app = Workload::http().await;
    let plan = Plan { max_staleness_seconds: 1, ..Plan::new(SERVICES, EVERYONE) };
    let (web, _catalog, _) = pair(&plan, "catalog", app.address).await;
    let mut body = events(&web).await.into_body();
    let ended = timeout(SOON, async {
        loop {
            match body.frame().await {
                Some(Ok(_)) => {}
                other => return other,
            }
        }
    });
    assert!(ended.await.unwrap().is_some_and(|end| end.is_err()), "a cut stream must not look whole");
}
