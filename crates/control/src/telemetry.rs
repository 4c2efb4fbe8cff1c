//! Whether the telemetry of each sidecar arrives here. A sidecar makes an exchange with itself that carries a nonce of ours; its
//! decision record, the metric that counts it and its span come as all of their kind do, and only when all three belong to that nonce
//! and that instance is its telemetry verified. One that was not for long is silent, which is told once.
//!
//! No telemetry is kept here but when it was last verified.

use std::collections::BTreeMap;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tonic::Status;

use countersign_api::{
    local::TelemetryView,
    mesh::{Span, TelemetryProbed},
};
use countersign_core::{
    identity::{InstanceId, ServiceName, TrustDomain},
    record::{DecisionRecord, Judged},
};

use crate::{
    audit,
    store::{Document, Store, StoreError},
};

/// How long a sidecar may be without a verified probe: five of them fail by then.
pub const SILENT_AFTER_MS: u64 = 5 * 60_000;
/// How long a nonce is good.
const NONCE_MS: u64 = 30_000;
/// How long it is known when the telemetry of an instance was verified that is not there any more.
const KEPT_MS: u64 = 24 * 3_600_000;
/// Instances of which that is known at most.
const INSTANCES_MAX: usize = 100_000;
/// The kind of the documents that keep it.
const KIND: &str = "telemetry";
/// The sample of a sidecar's metrics page that counts its probes.
const SAMPLE: &str = "countersign_probes_total ";

/// What arrived of every sidecar.
#[derive(Default)]
pub struct Telemetry {
    known: Mutex<BTreeMap<InstanceId, Known>>,
}

#[derive(Default)]
struct Known {
    open: Option<Open>,
    arrived: Arrived,
    /// Since when it is expected to be verified here; `None` while it is not.
    expected_since_ms: Option<u64>,
    is_silent: bool,
    is_unwritten: bool,
}

/// A probe that was begun: what arrived of it.
struct Open {
    nonce: [u8; 16],
    host: ServiceName,
    expires_at_ms: u64,
    record: Option<String>, // the id of its decision
    metric: bool,
    span: Option<String>, // the decision that it names
}

/// When what last arrived, in milliseconds since 1970. Each on its own may be of another probe; `verified` is of all three of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Arrived {
    verified_at_ms: Option<u64>,
    record_at_ms: Option<u64>,
    metric_at_ms: Option<u64>,
    span_at_ms: Option<u64>,
}

/// An instance whose proxy can be reached.
pub struct Reached {
    /// Which.
    pub instance: InstanceId,
    /// Its host, when that one's agent is connected here.
    pub connected: Option<ServiceName>,
}

/// An instance that fell silent, or speaks again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turned {
    /// Which.
    pub instance: InstanceId,
    /// Its host.
    pub host: ServiceName,
    /// Since when it is silent; `None`: it speaks again.
    pub silent_since_ms: Option<u64>,
}

/// What arrived of the sidecars of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OfService {
    /// Sidecars whose record, metric and span were there within [`SILENT_AFTER_MS`].
    pub verified: usize,
    /// Of the others, whether any had a record, a metric, a span.
    pub record: bool,
    /// As above.
    pub metric: bool,
    /// As above.
    pub span: bool,
}

impl Telemetry {
    /// Begins a probe of `instance`, which runs on `host`; an earlier one of it is void. `nonce` is random.
    pub fn begin(
        &self,
        host: &ServiceName,
        instance: &InstanceId,
        nonce: [u8; 16],
        now_ms: u64,
    ) -> Result<Bytes, Status> {
        let mut known = self.known.lock();
        if known.len() >= INSTANCES_MAX && !known.contains_key(instance) {
            return Err(Status::resource_exhausted("too many instances are probed"));
        }
        let (host, expires_at_ms) = (host.clone(), now_ms + NONCE_MS);
        known.entry(instance.clone()).or_default().open =
            Some(Open { nonce, host, expires_at_ms, record: None, metric: false, span: None });
        Ok(Bytes::copy_from_slice(&nonce))
    }

    /// A record of a probe, as the agent of `host` reported it.
    pub fn hear_record(&self, trust_domain: &TrustDomain, host: &ServiceName, record: &DecisionRecord, now_ms: u64) {
        let service = record.instance.service();
        let is_own = record.judged == Judged::AsProbe
            && record.inputs.principal == trust_domain.workload(&service)
            && record.inputs.service == service;
        let Some(trace_id) = record.trace_id.as_deref().filter(|_| is_own) else { return };
        self.hear(host, &record.instance, now_ms, |open, arrived| {
            if trace_id == open.trace_id() {
                (open.record, arrived.record_at_ms) = (Some(record.id.to_string()), Some(now_ms));
            }
        });
    }

    /// What the sidecar counted and traced of a probe.
    pub fn hear_probed(&self, trust_domain: &TrustDomain, host: &ServiceName, probed: &TelemetryProbed, now_ms: u64) {
        let Ok(instance) = InstanceId::parse(&probed.instance) else { return };
        let service = instance.service();
        let own_id = trust_domain.workload(&service);
        self.hear(host, &instance, now_ms, |open, arrived| {
            if probed.nonce[..] != open.nonce {
                return;
            }
            if counts(&probed.metric, &open.trace_id()) {
                (open.metric, arrived.metric_at_ms) = (true, Some(now_ms));
            }
            let of_probe =
                |span: &&Span| span.trace_id[..] == open.nonce && span.inbound && span.service == service.as_str();
            let decision = probed.span.as_ref().filter(of_probe).and_then(|span| span.decision.as_ref());
            if let Some(decision) = decision.filter(|decision| decision.caller == own_id.as_str()) {
                (open.span, arrived.span_at_ms) = (Some(decision.id.clone()), Some(now_ms));
            }
        });
    }

    /// INVARIANT (telemetry-is-verified): only here is telemetry called verified: by a record, a metric and a span of the one nonce
    /// that was given for this instance, to the agent of its host, and was neither used nor void; the span names the decision of
    /// the record.
    fn hear(
        &self,
        host: &ServiceName,
        instance: &InstanceId,
        now_ms: u64,
        take_in: impl FnOnce(&mut Open, &mut Arrived),
    ) {
        let mut all = self.known.lock();
        let Some(known) = all.get_mut(instance) else { return };
        let Some(open) = known.open.as_mut().filter(|open| open.host == *host && now_ms < open.expires_at_ms) else {
            return;
        };
        let before = known.arrived;
        take_in(open, &mut known.arrived);
        if open.metric && open.record.is_some() && open.record == open.span {
            (known.open, known.arrived.verified_at_ms) = (None, Some(now_ms));
        }
        known.is_unwritten |= known.arrived != before;
    }

    /// Looks who fell silent and who speaks again, of those whose agents are connected here; forgets those that are gone. Their
    /// documents end by themselves.
    pub fn sweep(&self, reached: &[Reached], now_ms: u64) -> Vec<Turned> {
        let mut all = self.known.lock();
        let mut turned = Vec::new();
        let connected: BTreeMap<&InstanceId, Option<&ServiceName>> =
            reached.iter().map(|one| (&one.instance, one.connected.as_ref())).collect();
        all.retain(|instance, known| {
            let is_kept = known.is_unwritten || known.arrived.verified_at_ms.is_some_and(|at| now_ms < at + KEPT_MS);
            connected.contains_key(instance) || is_kept
        });
        for (instance, host) in connected {
            if all.len() >= INSTANCES_MAX && !all.contains_key(instance) {
                continue;
            }
            let known = all.entry(instance.clone()).or_default();
            let Some(host) = host else {
                (known.expected_since_ms, known.is_silent) = (None, false);
                continue;
            };
            let since_ms = *known.expected_since_ms.get_or_insert(now_ms);
            let since_ms = known.arrived.verified_at_ms.unwrap_or_default().max(since_ms);
            let is_silent = now_ms >= since_ms + SILENT_AFTER_MS;
            if std::mem::replace(&mut known.is_silent, is_silent) != is_silent {
                let silent_since_ms = is_silent.then_some(known.arrived.verified_at_ms.unwrap_or(since_ms));
                turned.push(Turned { instance: instance.clone(), host: host.clone(), silent_since_ms });
            }
        }
        turned
    }

    /// Those that are silent, as far as their agents are connected here.
    pub fn silent(&self) -> Vec<InstanceId> {
        self.known.lock().iter().filter(|(_, known)| known.is_silent).map(|(id, _)| id.clone()).collect()
    }

    /// As people see it. An instance whose agent is elsewhere, or away, is silent from when it was verified last.
    pub fn of(&self, instance: &InstanceId, now_ms: u64) -> TelemetryView {
        let all = self.known.lock();
        let Some(known) = all.get(instance) else { return TelemetryView::default() };
        let verified_at_ms = known.arrived.verified_at_ms;
        let since_ms = verified_at_ms.max(known.expected_since_ms.filter(|_| verified_at_ms.is_none()));
        let is_long = |since: &u64| now_ms >= since + SILENT_AFTER_MS;
        let is_expected_elsewhere = known.expected_since_ms.is_none();
        let silent_since_ms = since_ms.filter(|since| known.is_silent || is_expected_elsewhere && is_long(since));
        TelemetryView { verified_at_ms, silent_since_ms }
    }

    /// What arrived lately of `instances`.
    pub fn of_service<'a>(&self, instances: impl Iterator<Item = &'a InstanceId>, now_ms: u64) -> OfService {
        let all = self.known.lock();
        let lately = |at: Option<u64>| at.is_some_and(|at| now_ms < at + SILENT_AFTER_MS);
        let mut found = OfService::default();
        for Arrived { verified_at_ms, record_at_ms, metric_at_ms, span_at_ms } in
            instances.filter_map(|id| all.get(id)).map(|known| known.arrived)
        {
            found.verified += usize::from(lately(verified_at_ms));
            found.record |= lately(record_at_ms);
            found.metric |= lately(metric_at_ms);
            found.span |= lately(span_at_ms);
        }
        found
    }

    /// Writes down what arrived since the last call, and takes in what is written of instances whose agents are not connected
    /// here. Called where the store is.
    pub fn keep(&self, store: &mut dyn Store, is_shared: bool, now_ms: u64) -> Result<(), StoreError> {
        let unwritten: Vec<(InstanceId, Arrived)> = {
            let mut all = self.known.lock();
            let unwritten = all
                .iter_mut()
                .filter_map(|(id, known)| std::mem::take(&mut known.is_unwritten).then(|| (id.clone(), known.arrived)));
            unwritten.collect()
        };
        if !unwritten.is_empty() {
            let keys: Vec<String> = unwritten.iter().map(|(id, _)| id.to_string()).collect();
            store.forget_documents(KIND, &keys)?;
        }
        for (id, arrived) in unwritten {
            let bytes = serde_json::to_vec(&arrived).expect("INVARIANT: it is JSON");
            let document = Document { kind: KIND, key: id.to_string(), bytes, expires_at_ms: now_ms + KEPT_MS };
            // Two control planes may write of an instance that moves between them: either knows it well enough.
            store.put_document(&document, now_ms, INSTANCES_MAX as u32)?;
        }
        if is_shared { self.restore(store, now_ms) } else { Ok(()) }
    }

    /// Takes in what is written down, of instances of which nothing newer arrived here.
    pub fn restore(&self, store: &mut dyn Store, now_ms: u64) -> Result<(), StoreError> {
        let written = store.documents(KIND, now_ms)?;
        let mut all = self.known.lock();
        for (key, bytes) in written.iter().take(INSTANCES_MAX) {
            let (Ok(instance), Ok(arrived)) = (InstanceId::parse(key), serde_json::from_slice::<Arrived>(bytes)) else {
                continue;
            };
            let known = all.entry(instance).or_default();
            if known.expected_since_ms.is_none() && arrived.verified_at_ms >= known.arrived.verified_at_ms {
                known.arrived = arrived;
            }
        }
        Ok(())
    }
}

impl Open {
    fn trace_id(&self) -> String {
        self.nonce.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Turned {
    /// Which instance, and whether its telemetry is silent now.
    pub fn about(&self) -> (InstanceId, bool) {
        (self.instance.clone(), self.silent_since_ms.is_some())
    }

    /// Says so, once.
    pub fn tell(self) -> Option<audit::Event> {
        let Self { instance, host, silent_since_ms } = self;
        match silent_since_ms {
            Some(since_ms) => {
                tracing::warn!(%instance, %host, since_ms, "the telemetry of a sidecar is silent; the agent's log on its host says why it cannot be probed");
                Some(audit::Event::TelemetrySilent { instance: instance.to_string(), host: host.to_string(), since_ms })
            }
            None => {
                tracing::info!(%instance, %host, "the telemetry of a sidecar arrives again");
                None
            }
        }
    }
}

/// Whether `sample` counts probes, the last of them the one whose trace is `trace_id`.
fn counts(sample: &str, trace_id: &str) -> bool {
    let Some((value, exemplar)) = sample.strip_prefix(SAMPLE).and_then(|rest| rest.split_once(" # ")) else {
        return false;
    };
    value.parse::<u64>().is_ok_and(|count| count > 0) && exemplar.starts_with(&format!("{{trace_id=\"{trace_id}\"}} "))
}

#[cfg(test)]
mod tests {
    use countersign_api::mesh::SpanDecision;
    use serde_json::json;

    use super::*;
    use crate::store::sqlite::SqliteStore;

    const NONCE: [u8; 16] = [7; 16];
    const OTHER: [u8; 16] = [8; 16];

    fn mesh() -> TrustDomain {
        TrustDomain::parse("shop.example").unwrap()
    }

    fn host(name: &str) -> ServiceName {
        ServiceName::parse(name).unwrap()
    }

    fn id(name: &str) -> InstanceId {
        InstanceId::parse(name).unwrap()
    }

    fn trace_id(nonce: [u8; 16]) -> String {
        hex::encode(nonce)
    }

    fn record(nonce: [u8; 16], caller: &str, judged: &str) -> DecisionRecord {
        let record = json!({
            "id": "0197", "at_ms": 1, "instance": "web/1", "revision": 1, "signal_seq": 0, "outcome": "deny",
            "reason": "not_declared", "policies": [], "judged": judged, "trace_id": trace_id(nonce), "judge_ns": 1,
            "ended": null,
            "inputs": {
                "principal": mesh().workload(&host(caller)), "action": "http:GET", "service": "web", "path": "/",
                "host": "web.mesh", "method": "GET", "protocol": "http", "size": null, "origin": "127.0.0.1", "now": 1,
                "first_contact": false,
            },
        });
        serde_json::from_value(record).unwrap()
    }

    fn probed(nonce: [u8; 16]) -> TelemetryProbed {
        let caller = mesh().workload(&host("web")).to_string();
        let decision = SpanDecision { id: "0197".into(), caller, ..SpanDecision::default() };
        let span = Span {
            trace_id: Bytes::copy_from_slice(&nonce),
            inbound: true,
            service: "web".into(),
            decision: Some(decision),
            ..Span::default()
        };
        TelemetryProbed {
            instance: "web/1".into(),
            nonce: Bytes::copy_from_slice(&nonce),
            metric: format!("{SAMPLE}3 # {{trace_id=\"{}\"}} 1", trace_id(nonce)),
            span: Some(span),
        }
    }

    /// What was found of `web/1` after a probe was begun at 0 and `record` and `probed` came at `at_ms`, from `from`.
    fn found(from: &str, record: Option<DecisionRecord>, probed: Option<TelemetryProbed>, at_ms: u64) -> String {
        let telemetry = Telemetry::default();
        telemetry.begin(&host("h1"), &id("web/1"), NONCE, 0).unwrap();
        record.iter().for_each(|record| telemetry.hear_record(&mesh(), &host(from), record, at_ms));
        probed.iter().for_each(|probed| telemetry.hear_probed(&mesh(), &host(from), probed, at_ms));
        let OfService { verified, record, metric, span } = telemetry.of_service([id("web/1")].iter(), at_ms);
        format!("{verified}: {} {} {}", u8::from(record), u8::from(metric), u8::from(span))
    }

    fn of_another_decision(probed: &mut TelemetryProbed) {
        let decision = probed.span.as_mut().and_then(|span| span.decision.as_mut());
        decision.unwrap().id = "0198".into();
    }

    /// PROVES (telemetry-is-verified)
    #[test]
    fn telemetry_is_verified_by_a_record_a_metric_and_a_span_of_the_nonce_of_that_instance_and_by_nothing_else() {
        let (own, told) = (|| Some(record(NONCE, "web", "as_probe")), || Some(probed(NONCE)));
        let with = |change: fn(&mut TelemetryProbed)| {
            let mut changed = probed(NONCE);
            change(&mut changed);
            Some(changed)
        };
        for (case, from, record, probed, at_ms, expected) in [
            ("all three", "h1", own(), told(), 1, "1: 1 1 1"),
            ("another host's word", "h2", own(), told(), 1, "0: 0 0 0"),
            ("too late", "h1", own(), told(), NONCE_MS, "0: 0 0 0"),
            ("no record", "h1", None, told(), 1, "0: 0 1 1"),
            ("nothing but a record", "h1", own(), None, 1, "0: 1 0 0"),
            ("a record of traffic", "h1", Some(record(NONCE, "web", "at_start")), told(), 1, "0: 0 1 1"),
            ("a record of another caller", "h1", Some(record(NONCE, "shop", "as_probe")), told(), 1, "0: 0 1 1"),
            ("a record of another nonce", "h1", Some(record(OTHER, "web", "as_probe")), told(), 1, "0: 0 1 1"),
            ("another nonce", "h1", own(), Some(super::tests::probed(OTHER)), 1, "0: 1 0 0"),
            ("no metric", "h1", own(), with(|p| p.metric.clear()), 1, "0: 1 0 1"),
            (
                "a count of another probe",
                "h1",
                own(),
                with(|p| p.metric = super::tests::probed(OTHER).metric),
                1,
                "0: 1 0 1",
            ),
            (
                "a count that did not rise",
                "h1",
                own(),
                with(|p| p.metric = p.metric.replace(" 3 ", " 0 ")),
                1,
                "0: 1 0 1",
            ),
            ("no span", "h1", own(), with(|p| p.span = None), 1, "0: 1 1 0"),
            (
                "a span of another trace",
                "h1",
                own(),
                with(|p| p.span = super::tests::probed(OTHER).span),
                1,
                "0: 1 1 0",
            ),
            ("a span of a call", "h1", own(), with(|p| p.span.as_mut().unwrap().inbound = false), 1, "0: 1 1 0"),
            (
                "a span of another service",
                "h1",
                own(),
                with(|p| p.span.as_mut().unwrap().service = "shop".into()),
                1,
                "0: 1 1 0",
            ),
            (
                "a span that was not judged",
                "h1",
                own(),
                with(|p| p.span.as_mut().unwrap().decision = None),
                1,
                "0: 1 1 0",
            ),
            ("a span of another decision", "h1", own(), with(of_another_decision), 1, "0: 1 1 1"),
            ("of another instance", "h1", own(), with(|p| p.instance = "web/2".into()), 1, "0: 1 0 0"),
        ] {
            assert_eq!(found(from, record, probed, at_ms), expected, "{case}");
        }
    }

    #[test]
    fn a_nonce_is_good_once_and_only_until_the_next() {
        let telemetry = Telemetry::default();
        let (h1, web) = (host("h1"), id("web/1"));
        let verified = |at_ms| telemetry.of_service([id("web/1")].iter(), at_ms).verified;
        let all_come = |nonce, at_ms| {
            telemetry.hear_record(&mesh(), &h1, &record(nonce, "web", "as_probe"), at_ms);
            telemetry.hear_probed(&mesh(), &h1, &probed(nonce), at_ms);
        };
        telemetry.begin(&h1, &web, NONCE, 0).unwrap();
        telemetry.begin(&h1, &web, OTHER, 1).unwrap();
        all_come(NONCE, 2);
        assert_eq!(verified(2), 0, "another was given since");
        all_come(OTHER, 3);
        assert_eq!((verified(3), telemetry.of(&web, 3).verified_at_ms), (1, Some(3)));
        all_come(OTHER, 4);
        assert_eq!(telemetry.of(&web, 4).verified_at_ms, Some(3), "used up");
        assert_eq!(verified(3 + SILENT_AFTER_MS), 0, "it is not remembered for ever");
    }

    #[test]
    fn silence_is_told_once_and_so_is_its_end_and_who_is_not_expected_is_not_silent() {
        let telemetry = Telemetry::default();
        let (h1, web) = (host("h1"), id("web/1"));
        let reached = |connected: bool| [Reached { instance: id("web/1"), connected: connected.then(|| host("h1")) }];
        let turned = |connected, at_ms| {
            let turned = telemetry.sweep(&reached(connected), at_ms);
            turned.into_iter().map(|one| one.silent_since_ms).collect::<Vec<_>>()
        };
        let verify = |at_ms| {
            telemetry.begin(&h1, &web, NONCE, at_ms).unwrap();
            telemetry.hear_record(&mesh(), &h1, &record(NONCE, "web", "as_probe"), at_ms);
            telemetry.hear_probed(&mesh(), &h1, &probed(NONCE), at_ms);
        };
        let long = SILENT_AFTER_MS;
        assert_eq!(turned(true, 10), [], "just there");
        assert_eq!(turned(true, 9 + long), []);
        assert_eq!(turned(true, 10 + long), [Some(10)], "it never showed any");
        assert_eq!(turned(true, 11 + long), [], "told once");
        assert_eq!(telemetry.of(&web, 11 + long).silent_since_ms, Some(10));
        assert_eq!(telemetry.silent(), std::slice::from_ref(&web));
        verify(12 + long);
        assert_eq!(turned(true, 13 + long), [None]);
        assert_eq!(
            telemetry.of(&web, 13 + long),
            TelemetryView { verified_at_ms: Some(12 + long), silent_since_ms: None }
        );
        assert_eq!(turned(false, 20 * long), [], "its agent is not here: nothing is expected of it");
        assert_eq!(telemetry.silent(), []);
        assert_eq!(telemetry.of(&web, 20 * long).silent_since_ms, Some(12 + long), "but it is seen");
        assert_eq!(turned(true, 21 * long), [], "it has just come back");
        assert_eq!(turned(true, 22 * long), [Some(12 + long)]);
    }

    #[test]
    fn when_it_was_verified_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = SqliteStore::open(&dir.path().join("control.db")).unwrap();
        let telemetry = Telemetry::default();
        telemetry.begin(&host("h1"), &id("web/1"), NONCE, 0).unwrap();
        telemetry.hear_record(&mesh(), &host("h1"), &record(NONCE, "web", "as_probe"), 5);
        telemetry.hear_probed(&mesh(), &host("h1"), &probed(NONCE), 5);
        telemetry.keep(&mut store, false, 6).unwrap();
        telemetry.keep(&mut store, false, 7).unwrap();
        let next = Telemetry::default();
        next.restore(&mut store, 8).unwrap();
        assert_eq!(next.of(&id("web/1"), 8).verified_at_ms, Some(5));
    }
}
