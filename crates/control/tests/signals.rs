//! What is said of workloads, hosts and operators: told to every agent at once, kept over restarts, bounded, and taken back by nobody but
//! who says so.

mod support;

use countersign_api::{
    local::{ClearSignalsAs, Problem, RiskView, SendSignalAs, Shown, SignalSent, SignalView, SignalWaited},
    mesh::{self, follow_event::Event, follow_request::Message as Said},
};
use countersign_core::{
    canonical::Digest,
    signal::{Signals, statement::Subject},
};
use support::Plane;

fn asked(subject: &str, kind: &str, value: &str) -> SendSignalAs {
    SendSignalAs {
        subject: subject.parse().unwrap(),
        kind: kind.parse().unwrap(),
        value: value.into(),
        half_life_ms: None,
        lifetime_ms: 3_600_000,
        reason: "a scanner found it".into(),
        shown: Shown::default(),
    }
}

async fn send(plane: &Plane, asked: &SendSignalAs) -> Result<SignalSent, Problem> {
    plane.post("/v1/signals", asked).await
}

async fn clear(plane: &Plane, subject: &str, source: Option<&str>) -> Result<SignalSent, Problem> {
    let asked = ClearSignalsAs {
        subject: subject.parse().unwrap(),
        kind: "risk".parse().unwrap(),
        source: source.map(|source| countersign_core::signal::statement::Source::parse(source).unwrap()),
        reason: "it was mended".into(),
        shown: Shown::default(),
    };
    plane.post("/v1/signals/clear", &asked).await
}

/// `workload:web risk 80 by local`, …
async fn listed(plane: &Plane, query: &str) -> Vec<String> {
    let found: Vec<SignalView> = plane.get(&format!("/v1/signals{query}")).await;
    let said = |one: SignalView| {
        let statement = one.statement;
        format!("{} {} {} by {}", statement.subject, statement.kind(), statement.said, statement.source)
    };
    found.into_iter().map(said).collect()
}

#[tokio::test]
async fn what_is_said_is_told_to_every_agent_waited_for_and_taken_back_and_who_comes_later_knows() {
    let plane = Plane::start().await;
    plane.create(&["web", "db"]).await;
    let mut one = plane.agent("h1").await;
    one.issue("db/1").await.unwrap();
    let mut stream = one.follow(0, Digest::default()).await.unwrap();
    assert!(stream.welcome().await.signals.unwrap().stated.is_empty());
    stream.up("db/1", "127.0.0.1:9001").await;
    while !matches!(stream.news().await, Event::Discovery(_)) {}

    let sent = send(&plane, &asked("workload:web", "risk", "80")).await.unwrap();
    assert_eq!((sent.signal.0, sent.statements), (1, 1));
    let Event::Signals(told) = stream.news().await else { panic!("no signals") };
    let mut held = Signals::default();
    countersign_api::signals::take_in(&mut held, &told).unwrap();
    let web: Subject = "workload:web".parse().unwrap();
    let said = held.about(&web).next().unwrap().clone();
    assert_eq!(held.risk(&web, said.issued_at_ms), 80);
    assert!(!told.stated[0].json.contains("scanner"), "why it was said stays here");
    assert!(!plane.get::<SignalWaited>("/v1/signals/1/wait?timeout_ms=50").await.enforced);
    let heeds = mesh::InstanceRevision { instance: "db/1".into(), signal_sequence: 1, ..Default::default() };
    stream.say(Said::Acknowledgement(mesh::Acknowledgement { instances: vec![heeds] })).await;
    assert!(plane.get::<SignalWaited>("/v1/signals/1/wait?timeout_ms=10000").await.enforced);

    send(&plane, &asked("host:h1", "posture", "not_compliant")).await.unwrap();
    send(&plane, &asked("workload:web", "risk", "30")).await.unwrap();
    let all = ["workload:web risk 30 by local", "host:h1 posture not_compliant by local"];
    assert_eq!(listed(&plane, "").await, all, "the newest of a source counts");
    assert_eq!(listed(&plane, "?kind=posture").await, all[1..]);
    assert_eq!(listed(&plane, "?subject=workload:web").await, all[..1]);
    let risks: Vec<RiskView> = plane.get("/v1/risks").await;
    assert_eq!(
        risks.iter().map(|one| (one.subject.to_string(), one.risk)).collect::<Vec<_>>(),
        [("workload:web".into(), 30)]
    );
    let of_host: Vec<RiskView> = plane.get("/v1/risks?subject=host:h1").await;
    assert!(of_host[0].why.contains("no signal that holds says anything"), "{of_host:?}");

    drop((stream, one));
    let plane = plane.restart().await.unwrap();
    assert_eq!(listed(&plane, "").await, all);
    assert_eq!(clear(&plane, "workload:web", Some("operator:bob")).await.unwrap_err().status, 404, "bob said nothing");
    let cleared = clear(&plane, "workload:web", None).await.unwrap();
    assert_eq!((cleared.signal.0, cleared.statements), (4, 1));
    assert_eq!(listed(&plane, "").await, all[1..]);
    assert_eq!(clear(&plane, "workload:web", None).await.unwrap_err().status, 404, "nobody says it any more");
    // Whoever held what was said before, and was away, hears that it was taken back.
    let mut two = plane.agent("h2").await;
    let welcome = two.follow(0, Digest::default()).await.unwrap().welcome().await.signals.unwrap();
    countersign_api::signals::take_in(&mut held, &welcome).unwrap();
    assert_eq!((held.risk(&web, said.issued_at_ms), held.sequence().0), (0, 4));
}

/// What the risk of `subject` is, and why.
async fn risk(plane: &Plane, subject: &str) -> RiskView {
    plane.get::<Vec<RiskView>>(&format!("/v1/risks?subject={subject}")).await.remove(0)
}

#[tokio::test]
async fn a_workload_that_tries_many_doors_becomes_a_risk_by_itself() {
    let plane = Plane::start().await;
    plane.create(&["web", "orders"]).await;
    let mut agent = plane.agent("h1").await;
    let mut stream = agent.follow(0, Digest::default()).await.unwrap();
    stream.welcome().await;
    let denial = |door: u8| {
        let path = format!("/door-{}", char::from(b'a' + door));
        let record = serde_json::json!({
            "id": format!("{:032x}", fastrand::u128(..)), "at_ms": 1, "instance": "orders/1", "revision": 1, "signal_seq": 0,
            "outcome": "deny", "reason": "no_policy_permits", "policies": [], "judged": "at_start", "ended": null,
            "trace_id": null, "judge_ns": 1,
            "inputs": {
                "principal": "spiffe://shop.example/web", "action": "http:GET", "service": "orders", "path": path,
                "host": "orders.mesh", "method": "GET", "protocol": "http", "size": null, "origin": "10.0.0.9", "now": 1,
                "first_contact": false,
            },
        });
        record.to_string().into()
    };
    let report = |records_json| Said::Report(mesh::Report { records_json, ..mesh::Report::default() });
    stream.say(report((0..19).map(denial).collect())).await;
    stream.say(report(vec![denial(0); 50])).await;
    stream.say(report(vec![denial(19)])).await;
    let Event::Signals(told) = stream.news().await else { panic!("no signals") };
    assert_eq!((told.sequence, told.stated.len()), (1, 1));
    let found = risk(&plane, "workload:web").await;
    assert_eq!(found.risk, 30, "{found:?}");
    assert!(found.why.contains("countersign/many-denials said 30"), "{found:?}");
    assert_eq!(risk(&plane, "workload:orders").await.risk, 0);
}

#[tokio::test]
async fn who_is_contained_stands_in_the_status_until_they_are_released() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let mut agent = plane.agent("h1").await;
    let _stream = agent.follow(0, Digest::default()).await.unwrap();
    let warned = async || plane.status().await.warnings.into_iter().find(|warning| warning.contains("contained"));
    assert_eq!(warned().await, None);
    for subject in ["workload:web", "instance:web/1", "host:h1"] {
        send(&plane, &asked(subject, "containment", "contained")).await.unwrap();
    }
    let warning = warned().await.unwrap();
    assert!(warning.starts_with("3 contained") && warning.contains("host:h1"), "{warning}");
    for subject in ["workload:web", "instance:web/1", "host:h1"] {
        let released = ClearSignalsAs {
            subject: subject.parse().unwrap(),
            kind: "containment".parse().unwrap(),
            source: None,
            reason: "it was nothing".into(),
            shown: Shown::default(),
        };
        plane.post::<SignalSent>("/v1/signals/clear", &released).await.unwrap();
    }
    assert_eq!(warned().await, None);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_before_anything_is_said() {
    let plane = Plane::start().await;
    plane.create(&["web"]).await;
    let good = asked("workload:web", "risk", "80");
    for (case, wrong, status, says) in [
        ("a value", SendSignalAs { value: "101".into(), ..good.clone() }, 422, "0 to 100"),
        ("words", SendSignalAs { value: "high".into(), ..good.clone() }, 422, "0 to 100"),
        ("another's value", SendSignalAs { value: "compliant".into(), ..good.clone() }, 422, "0 to 100"),
        ("what is said of hosts only", asked("workload:web", "posture", "compliant"), 422, "not said of"),
        ("an operator in a cell", asked("operator:eve", "containment", "contained"), 422, "not said of"),
        ("nobody", asked("workload:wbe", "risk", "80"), 404, "there is no workload:wbe"),
        ("an instance of nobody", asked("instance:wbe/1", "risk", "80"), 404, "there is no instance:wbe/1"),
        ("a host that never came", asked("host:h9", "risk", "80"), 404, "there is no host:h9"),
        ("an operator that is none", asked("operator:eve", "risk", "80"), 404, "there is no operator:eve"),
        ("too long", SendSignalAs { lifetime_ms: 31 * 86_400_000, ..good.clone() }, 422, "too short or too long"),
        ("no time at all", SendSignalAs { lifetime_ms: 0, ..good.clone() }, 422, "too short or too long"),
        ("a fast fall", SendSignalAs { half_life_ms: Some(1), ..good.clone() }, 422, "one minute"),
        ("no reason", SendSignalAs { reason: String::new(), ..good.clone() }, 422, "no line of text"),
        ("two lines", SendSignalAs { reason: "a\nb".into(), ..good.clone() }, 422, "no line of text"),
    ] {
        let refused = send(&plane, &wrong).await.unwrap_err();
        assert_eq!(refused.status, status, "{case}: {refused:?}");
        assert!(refused.title.contains(says), "{case}: {refused:?}");
    }
    assert!(listed(&plane, "").await.is_empty());
    for unreadable in
        ["/v1/signals?subject=web", "/v1/signals?kind=mood", "/v1/risks?subject=device:x", "/v1/risks?who=x"]
    {
        assert_eq!(plane.send("GET", unreadable, Vec::new()).await.0, 400, "{unreadable}");
    }
    send(&plane, &good).await.unwrap();
    assert_eq!(listed(&plane, "").await.len(), 1);
}
