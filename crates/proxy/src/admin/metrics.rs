//! Everything counted, as OpenMetrics text. The sets of labels are closed: no request can make a metric grow.

use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use countersign_core::record::Reason;
use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric, MetricEncoder,
        NoLabelSet, text::encode as encode_text,
    },
    metrics::{MetricType, exemplar::CounterWithExemplar},
    registry::Registry,
};

use crate::{
    answer::ALL,
    counts::{Count, Counts, DURATION_BOUNDS_US, Direction, JUDGE_BOUNDS_NS},
    decided::TraceId,
    record::SinkCounts,
    shared::Shared,
};

/// Writes every metric, counted over all workers.
pub(crate) fn encode(to: &mut String, shared: &Shared, records: &SinkCounts) -> fmt::Result {
    let mut registry = Registry::with_prefix("countersign");
    registry.register_collector(Box::new(Scrape::of(shared, *records)));
    encode_text(to, &registry)
}

/// One scrape: everything added up.
#[derive(Debug, Default)]
struct Scrape {
    directions: Vec<Exchanges>,
    decisions: Vec<(&'static str, &'static str, u64)>, // outcome, reason
    refusals: Vec<(&'static str, u64)>,                // reason
    judge_buckets: Vec<u64>,
    judge_ns: u64,
    totals: Vec<(&'static str, &'static str, u64)>, // name, help
    probes: u64,
    last_probe: Option<TraceId>,
    gauges: Vec<(&'static str, &'static str, f64)>,
}

#[derive(Debug)]
struct Exchanges {
    direction: &'static str,
    started: u64,
    open: u64,
    ended: Vec<(&'static str, u64)>, // status class
    bytes_in: u64,
    bytes_out: u64,
    duration_buckets: Vec<u64>,
    duration_sum_us: u64,
}

const STATUS_CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

impl Scrape {
    fn of(shared: &Shared, records: SinkCounts) -> Self {
        let sum = |count: fn(&Counts) -> &Count| shared.counts.iter().map(|counts| count(counts).get()).sum::<u64>();
        let mut totals = vec![
            ("connections_refused", "Connections refused because too many were open", sum(|c| &c.connections_refused)),
            (
                "handshakes_failed",
                "TLS handshakes that did not prove a peer of this mesh",
                sum(|c| &c.handshakes_failed),
            ),
            ("judgements_repeated", "Open exchanges judged again", sum(|c| &c.rejudged)),
            ("exchanges_cut", "Open exchanges cut because the answer turned", sum(|c| &c.cut)),
            ("retries", "Attempts beyond the first", sum(|c| &c.retries)),
            ("retries_without_budget", "Retries that were safe but had no budget", sum(|c| &c.retries_without_budget)),
            ("ejections", "Endpoints ejected", sum(|c| &c.ejections)),
            ("mesh_connections", "Connections opened to other sidecars", sum(|c| &c.mesh_connections)),
            ("app_connections", "Connections opened to the workload", sum(|c| &c.app_connections)),
            ("spans", "Spans handed to the agent", sum(|c| &c.spans)),
            ("spans_shed", "Spans lost for want of room", sum(|c| &c.spans_shed)),
        ];
        totals.extend([
            ("records_kept", "Decision records written to this host", records.kept),
            ("records_shed", "Decision records lost for want of room", records.shed),
            ("records_unreported", "Decision records kept but left out of the report", records.unreported),
            ("record_write_errors", "Failed writes of decision records", records.write_errors),
        ]);
        let mut gauges = vec![
            ("connections_open", "Connections open on any listener", sum(|c| &c.connections_open) as f64),
            ("app_ready", "Whether the workload accepts connections", f64::from(shared.app_is_ready())),
            ("draining", "Whether this sidecar takes nothing new", f64::from(shared.is_draining())),
            ("records_failing", "Whether decision records cannot be written", f64::from(records.failing)),
            ("workers", "Threads that carry traffic", shared.counts.len() as f64),
        ];
        // What is not known yet is left out: an age of 0 or a time of 1970 would mean something else.
        if let Some(revision) = shared.revision() {
            gauges.push(("view_revision", "The revision enforced", revision.0 as f64));
        }
        if let Some(age) = shared.age() {
            gauges.push((
                "freshness_age_seconds",
                "Since the agent was last in step with a control plane",
                age.as_secs_f64(),
            ));
        }
        if let Some(identity) = shared.identity() {
            let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
            let left = identity.svid().not_after() as f64 - now_s;
            gauges.push(("svid_remaining_seconds", "Until this sidecar's SVID expires", left));
        }
        let decisions = Reason::ALL.into_iter().map(|reason| {
            let count = shared.counts.iter().map(|counts| counts.decisions_by_reason[reason.place()].get()).sum();
            (reason.outcome().as_str(), reason.as_str(), count)
        });
        let refusals = sum_each(shared.counts.iter().map(|counts| &counts.refusals[..]));
        Self {
            directions: vec![
                Exchanges::of("inbound", shared, |counts| &counts.inbound),
                Exchanges::of("outbound", shared, |counts| &counts.outbound),
            ],
            decisions: decisions.collect(),
            refusals: ALL.map(|refusal| refusal.row().reason).into_iter().zip(refusals).collect(),
            judge_buckets: sum_each(shared.counts.iter().map(|counts| &counts.judge_buckets[..])),
            judge_ns: sum(|counts| &counts.judge_ns),
            totals,
            probes: sum(|counts| &counts.probes),
            last_probe: shared.last_probe(),
            gauges,
        }
    }
}

impl Exchanges {
    fn of(direction: &'static str, shared: &Shared, of: fn(&Counts) -> &Direction) -> Self {
        let each = || shared.counts.iter().map(|counts| of(counts));
        let sum = |count: fn(&Direction) -> &Count| each().map(|of| count(of).get()).sum();
        let ended = sum_each(each().map(|of| &of.ended_by_class[..]));
        Self {
            direction,
            started: sum(|of| &of.started),
            // Workers are read one after the other, so that for a moment more can have ended than begun.
            open: sum(|of| &of.open),
            ended: STATUS_CLASSES.into_iter().zip(ended).collect(),
            bytes_in: sum(|of| &of.bytes_in),
            bytes_out: sum(|of| &of.bytes_out),
            duration_buckets: sum_each(each().map(|of| &of.duration_buckets[..])),
            duration_sum_us: sum(|of| &of.duration_sum_us),
        }
    }
}

impl Collector for Scrape {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let each = &self.directions;
        let started = each.iter().map(|of| ([("direction", of.direction)], of.started));
        counters(&mut to, "exchanges_started", "Exchanges begun", started)?;
        let open = each.iter().map(|of| ([("direction", of.direction)], of.open));
        gauges(&mut to, "exchanges_open", "Exchanges open now", open)?;
        let ended = each.iter().flat_map(|of| {
            of.ended.iter().map(|(class, count)| ([("direction", of.direction), ("status", *class)], *count))
        });
        counters(&mut to, "exchanges_ended", "Exchanges ended, by the class of their status", ended)?;
        let bytes = each.iter().flat_map(|of| {
            [("from_caller", of.bytes_in), ("to_caller", of.bytes_out)]
                .map(|(way, bytes)| ([("direction", of.direction), ("way", way)], bytes))
        });
        counters(&mut to, "body_bytes", "Bytes of bodies", bytes)?;
        let mut durations =
            to.encode_descriptor("exchange_duration_seconds", "From head to end", None, MetricType::Histogram)?;
        for of in each {
            let bounds = DURATION_BOUNDS_US.map(|bound| bound as f64 / 1e6);
            let labels = [("direction", of.direction)];
            let seconds = of.duration_sum_us as f64 / 1e6;
            histogram(durations.encode_family(&labels)?, &bounds, &of.duration_buckets, seconds)?;
        }
        let decisions = self
            .decisions
            .iter()
            .map(|(outcome, reason, count)| ([("outcome", *outcome), ("reason", *reason)], *count));
        counters(&mut to, "decisions", "First judgements", decisions)?;
        let refusals = self.refusals.iter().map(|(reason, count)| ([("reason", *reason)], *count));
        counters(&mut to, "refusals", "Exchanges that the mesh answered itself", refusals)?;
        let judgements =
            to.encode_descriptor("judgement_seconds", "Time to judge once", None, MetricType::Histogram)?;
        let bounds = JUDGE_BOUNDS_NS.map(|bound| bound as f64 / 1e9);
        histogram(judgements, &bounds, &self.judge_buckets, self.judge_ns as f64 / 1e9)?;
        for (name, help, count) in &self.totals {
            to.encode_descriptor(name, help, None, MetricType::Counter)?
                .encode_counter::<NoLabelSet, _, u64>(count, None)?;
        }
        // The exemplar says which probe was counted last: what control looks for.
        let probes = CounterWithExemplar::<[(&str, String); 1]>::default();
        if let (Some(before), Some(last)) = (self.probes.checked_sub(1), self.last_probe) {
            probes.inc_by(before, None, None);
            probes.inc_by(1, Some([("trace_id", last.to_string())]), None);
        }
        let to_probes =
            to.encode_descriptor("probes", "Exchanges of this sidecar with itself", None, MetricType::Counter)?;
        probes.encode(to_probes)?;
        for (name, help, value) in &self.gauges {
            to.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(value)?;
        }
        Ok(())
    }
}

fn counters<L: EncodeLabelSet, V: EncodeCounterValue>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

fn gauges<L: EncodeLabelSet, V: EncodeGaugeValue>(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, V)>,
) -> fmt::Result {
    let mut metric = to.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        metric.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

/// `counts` has one more bucket than `bounds`.
fn histogram(mut to: MetricEncoder<'_>, bounds: &[f64], counts: &[u64], sum: f64) -> fmt::Result {
    let bounds = bounds.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
    to.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
}

fn sum_each<'a>(workers: impl Iterator<Item = &'a [Count]>) -> Vec<u64> {
    let mut sums = Vec::new();
    for counts in workers {
        sums.resize(counts.len(), 0);
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count.get();
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use countersign_core::{identity::InstanceId, record::Judged};
    use expect_test::expect_file;

    use super::*;
    use crate::shared::Setup;

    fn shared() -> Shared {
        let instance = InstanceId::parse("catalog/1").unwrap();
        Shared::new(Setup { instance, app: None, worker_count: 2, tracing: None })
    }

    fn scraped(shared: &Shared) -> String {
        let mut page = String::new();
        encode(&mut page, shared, &SinkCounts { shed: 3, ..SinkCounts::default() }).unwrap();
        page
    }

    #[test]
    fn what_the_workers_counted_is_added_up() {
        let shared = shared();
        for (worker, counts) in shared.counts.iter().enumerate() {
            counts.inbound.started.add(2);
            counts.inbound.open.add(2);
            counts.inbound.end(200, 700 + worker as u64, 10, 20);
            counts.judged(Judged::AtStart, Reason::Permitted, 900);
            counts.judged(Judged::AtStart, Reason::Forbidden, u64::from(u32::MAX));
            counts.judged(Judged::WhileOpen, Reason::Permitted, 900);
        }
        let page = scraped(&shared);
        for line in [
            r#"countersign_exchanges_started_total{direction="inbound"} 4"#,
            r#"countersign_exchanges_open{direction="inbound"} 2"#,
            r#"countersign_exchanges_ended_total{direction="inbound",status="2xx"} 2"#,
            r#"countersign_body_bytes_total{direction="inbound",way="to_caller"} 40"#,
            r#"countersign_exchange_duration_seconds_bucket{le="0.001",direction="inbound"} 2"#,
            r#"countersign_decisions_total{outcome="permit",reason="permitted"} 2"#,
            r#"countersign_decisions_total{outcome="deny",reason="forbidden"} 2"#,
            "countersign_judgement_seconds_count 6",
            r#"countersign_judgement_seconds_bucket{le="0.000001"} 4"#,
            r#"countersign_judgement_seconds_bucket{le="0.01"} 4"#,
            r#"countersign_judgement_seconds_bucket{le="+Inf"} 6"#,
            "countersign_judgements_repeated_total 2",
            "countersign_records_shed_total 3",
            "countersign_workers 2.0",
        ] {
            assert!(page.lines().any(|given| given == line), "{line} is not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }

    #[test]
    fn the_last_probe_is_the_exemplar_of_their_count() {
        let shared = shared();
        assert!(scraped(&shared).lines().any(|line| line == "countersign_probes_total 0"));
        shared.counts.iter().for_each(|counts| counts.probes.add(1));
        shared.probed(TraceId(0xabc));
        let expected = r#"countersign_probes_total 2 # {trace_id="00000000000000000000000000000abc"} 1.0"#;
        let page = scraped(&shared);
        assert!(page.lines().any(|line| line == expected), "{page}");
    }

    #[test]
    fn what_is_not_known_yet_is_left_out() {
        let page = scraped(&shared());
        for name in ["view_revision", "freshness_age_seconds", "svid_remaining_seconds"] {
            assert!(!page.contains(name), "{name}");
        }
    }

    #[test]
    fn every_metric_is_documented() {
        let shared = shared();
        shared.set_fresh(std::time::Duration::ZERO);
        let mut documented = String::from(
            "The metrics of a sidecar, at /metrics of its admin address: name, type, what is counted, labels.\n\
             Written by a test from the page itself. Also there once known: countersign_view_revision,\n\
             countersign_svid_remaining_seconds (gauges). A collector gets the same names and labels over OTLP.\n\n",
        );
        let page = scraped(&shared);
        let mut help = BTreeMap::new();
        let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for line in page.lines() {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["#", "HELP", name, ..] => {
                    help.insert(name, line.splitn(4, ' ').nth(3).unwrap());
                }
                ["#", ..] => {}
                _ => {
                    let (sample, with) = line.split_once('{').unwrap_or((line.split(' ').next().unwrap(), ""));
                    let name = help.keys().filter(|name| sample.starts_with(**name)).max_by_key(|name| name.len());
                    let keys = with.split(['{', ',']).filter_map(|label| Some(label.split_once('=')?.0));
                    labels.entry(name.unwrap()).or_default().extend(keys.filter(|key| *key != "le"));
                }
            }
        }
        for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            let total = if kind == "counter" { "_total" } else { "" };
            let labels = labels.remove(name).unwrap_or_default().into_iter().collect::<Vec<_>>().join(", ");
            let row = format!("{:<50} {kind:<10} {:<60} {labels}", format!("{name}{total}"), help[name]);
            documented.push_str(row.trim_end());
            documented.push('\n');
        }
        expect_file!["../../../../docs/metrics.txt"].assert_eq(&documented);
    }
}
