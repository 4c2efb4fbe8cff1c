//! What is said of a caller decides each of its requests, and ends what it has open: when it is said, when it is taken back, and when it
//! ends or falls by itself.

use std::{sync::Mutex, time::Duration};

use bytes::Bytes;
use countersign_core::{
    record::{End, Judged, Reason},
    risk::Condition,
    service::Protocol::{self, Http},
    signal::{Signal, SignalSeq, Signals, statement::Statement},
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Incoming};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;

use crate::{
    mesh::{Authority, EVERYONE, Plan, Sidecar, open},
    workload::Workload,
};

const SERVICES: &[(&str, Protocol)] = &[("web", Http), ("batch", Http), ("catalog", Http)];
const LOW_RISK: &str = "permit(principal, action, resource) when { context.risk.workload < 70 };";
const COMPLIANT: &str =
    "permit(principal, action, resource) when { context has posture.compliant && context.posture.compliant };";

struct Mesh {
    web: Sidecar,
    batch: Sidecar,
    catalog: Sidecar,
    plan: Plan,
    said: Mutex<(u64, Signals)>,
}

fn now_ms() -> u64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as u64
}

async fn mesh(policy: &str) -> Mesh {
    let app = Workload::http().await;
    let authority = Authority::new("root");
    let start = |service, app| Sidecar::start(service, "1", app);
    let (web, batch, catalog) = (start("web", None), start("batch", None), start("catalog", Some(app.address)));
    let plan = Plan::new(SERVICES, policy);
    for sidecar in [&web, &batch, &catalog] {
        sidecar.ready(&authority, &plan, &[&catalog]).await;
    }
    Mesh { web, batch, catalog, plan, said: Mutex::default() }
}

impl Mesh {
    /// Says something to the callee's sidecar, and waits until it goes by it.
    async fn say(&self, subject: &str, kind: &str, value: &str, half_life_ms: Option<u64>, lives_ms: u64) {
        let signals = {
            let (sequence, signals) = &mut *self.said.lock().unwrap();
            *sequence += 1;
            let at_ms = now_ms();
            let written = json!({
                "subject": subject, "kind": kind, "value": value, "half_life_ms": half_life_ms,
                "source": "operator:alice", "issued_at_ms": at_ms, "expires_at_ms": at_ms + lives_ms,
            });
            let statement: Statement = serde_json::from_value(written).unwrap();
            signals.welcome(SignalSeq(*sequence), [Signal::Stated(statement)]);
            signals.clone()
        };
        let expected = signals.sequence();
        self.catalog.shared.heed(signals);
        assert_eq!(self.catalog.shared.end_revoked().await, expected);
    }

    async fn status(&self, of: &Sidecar) -> u16 {
        of.get("http://catalog.mesh/").await.status
    }

    /// Why the one stream that was cut was.
    fn cut(&self) -> (Reason, Condition, u64) {
        let records = self.catalog.records.lock().unwrap();
        let cut = records.iter().find(|record| record.judged == Judged::WhileOpen).expect("the record says why");
        assert_eq!(cut.ended.as_ref().unwrap().how, End::Cut);
        let permitted = records.iter().find(|record| record.judged == Judged::AtStart && record.path == "/events");
        assert_eq!(permitted.unwrap().reason, Reason::Permitted, "both decisions are in the record");
        (cut.reason, cut.condition, cut.signals)
    }
}

async fn events(of: &Sidecar) -> Incoming {
    let request = Request::get("http://catalog.mesh/events").body(Full::<Bytes>::default()).unwrap();
    let response = open(of.outbound, request).await;
    assert_eq!(response.status(), 200);
    response.into_body()
}

async fn flows(stream: &mut Incoming) -> bool {
    matches!(timeout(Duration::from_secs(5), stream.frame()).await, Ok(Some(Ok(_))))
}

async fn ends(stream: &mut Incoming, within: Duration) -> bool {
    timeout(within, async { while let Some(Ok(_)) = stream.frame().await {} }).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_risk_of_a_caller_its_instance_or_its_host_cuts_its_stream_and_denies_it_until_it_is_taken_back() {
    for subject in ["workload:web", "instance:web/1", "host:web-host"] {
        let mesh = mesh(LOW_RISK).await;
        let (mut of_web, mut of_batch) = (events(&mesh.web).await, events(&mesh.batch).await);
        mesh.say(subject, "risk", "69", None, 60_000).await;
        assert!(flows(&mut of_web).await, "less than the policy minds");
        mesh.say(subject, "risk", "70", None, 60_000).await;
        assert!(ends(&mut of_web, Duration::from_secs(5)).await, "the stream goes on: {subject}");
        assert!(flows(&mut of_batch).await, "another's is no concern of it");
        let condition = Condition { risk: 70, ..Condition::default() };
        assert_eq!(mesh.cut(), (Reason::NoPolicyPermits, condition, 2));
        assert_eq!(mesh.status(&mesh.web).await, 403, "{subject}");
        assert_eq!(mesh.status(&mesh.batch).await, 200);
        mesh.say(subject, "risk", "cleared", None, 60_000).await;
        assert_eq!(mesh.status(&mesh.web).await, 200, "{subject}");
        let records = mesh.catalog.records.lock().unwrap();
        assert_eq!((records.last().unwrap().signals, records.last().unwrap().condition), (3, Condition::default()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_the_posture_that_it_was_permitted_by_ends_by_itself_or_turns() {
    let mesh = mesh(COMPLIANT).await;
    assert_eq!(mesh.status(&mesh.web).await, 403, "nobody says anything of its host");
    mesh.say("host:web-host", "posture", "compliant", None, 60_000).await;
    let mut turning = events(&mesh.web).await;
    mesh.say("host:web-host", "posture", "not_compliant", None, 60_000).await;
    assert!(ends(&mut turning, Duration::from_secs(5)).await);
    let (reason, condition, _) = mesh.cut();
    assert_eq!((reason, condition.posture.compliant), (Reason::NoPolicyPermits, Some(false)));
    mesh.say("host:web-host", "posture", "compliant", None, 700).await;
    let mut ending = events(&mesh.web).await;
    assert!(flows(&mut ending).await);
    assert!(ends(&mut ending, Duration::from_millis(2_000)).await, "it goes on when nobody says it any more");
    assert_eq!(mesh.status(&mesh.web).await, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_contained_has_nothing_open_and_asks_nobody_and_is_asked_by_nobody_whatever_policies_read() {
    for (subject, of_web, of_batch) in [
        ("workload:web", 403, 200),
        ("instance:web/1", 403, 200),
        ("host:web-host", 403, 200),
        ("workload:catalog", 403, 403),
        ("instance:catalog/1", 403, 403),
        ("host:catalog-host", 403, 403),
        ("instance:web/2", 200, 200),
    ] {
        let mesh = mesh(EVERYONE).await;
        let (mut web, mut batch) = (events(&mesh.web).await, events(&mesh.batch).await);
        mesh.say(subject, "containment", "contained", None, 60_000).await;
        assert_eq!((mesh.status(&mesh.web).await, mesh.status(&mesh.batch).await), (of_web, of_batch), "{subject}");
        for (stream, status) in [(&mut web, of_web), (&mut batch, of_batch)] {
            match status {
                200 => assert!(flows(stream).await, "{subject}"),
                _ => assert!(ends(stream, Duration::from_secs(5)).await, "{subject}"),
            }
        }
        if of_web == 403 {
            let (reason, condition, _) = mesh.cut();
            assert_eq!((reason, condition.contained), (Reason::Contained, true));
        }
        mesh.say(subject, "containment", "cleared", None, 60_000).await;
        assert_eq!((mesh.status(&mesh.web).await, mesh.status(&mesh.batch).await), (200, 200), "{subject}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_of_the_moment_ends_what_is_open_when_the_moment_is_over() {
    let until = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap() + Duration::from_secs(3);
    let until_text = until.format(&Rfc3339).unwrap();
    let policy =
        format!("permit(principal, action, resource) when {{ context.time.now < datetime(\"{until_text}\") }};");
    let mesh = mesh(&policy).await;
    let mut stream = events(&mesh.web).await;
    assert!(flows(&mut stream).await);
    assert!(ends(&mut stream, Duration::from_secs(5)).await, "the stream outlives its time window");
    assert!(OffsetDateTime::now_utc() >= until);
    assert_eq!(mesh.status(&mesh.web).await, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_policy_reads_decides_what_is_open_from_then_on() {
    let mesh = mesh(EVERYONE).await;
    let mut stream = events(&mesh.web).await;
    mesh.say("workload:web", "risk", "50", None, 60_000).await;
    assert!(flows(&mut stream).await, "no policy reads it");
    mesh.catalog.apply(&mesh.plan.with_policy(LOW_RISK), 2).await;
    assert!(flows(&mut stream).await, "it is less than the policy minds");
    mesh.say("workload:web", "risk", "90", None, 60_000).await;
    assert!(ends(&mut stream, Duration::from_secs(5)).await, "the policy came after the stream, and counts");
}
