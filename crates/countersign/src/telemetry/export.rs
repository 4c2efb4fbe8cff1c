//! What waits for the collector, and the two tasks that send it. Whoever tells never waits: spans have one bounded queue,
//! of metrics only the newest numbers of each teller are kept, and what finds no room is counted. A collector that is not
//! there is a warning, and rarely one; the mesh does not notice.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use opentelemetry_proto::tonic::{
    collector::{metrics::v1::ExportMetricsServiceRequest, trace::v1::ExportTraceServiceRequest},
    metrics::v1::{ResourceMetrics, ScopeMetrics},
    trace::v1::{ResourceSpans, ScopeSpans, Span},
};
use parking_lot::Mutex;
use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use countersign_api::sidecar::Metrics;

use super::{
    metrics::of_page,
    resource::{Teller, scope},
    send::{Collector, Payload},
    settings::Settings,
};
use crate::error::Failure;

/// Spans that wait at most.
const SPANS_WAITING_MAX: usize = 16 * 1024;
/// Spans in one export, about.
const SPANS_PER_EXPORT: usize = 512;
/// Pages in one export: a collector takes 4 MiB at once unless told otherwise.
const PAGES_PER_EXPORT: usize = 32;
/// Tellers whose numbers are kept.
const PAGES_WAITING_MAX: usize = 16 * 1024;
/// Time in which the pages of one round come together.
const GATHER: Duration = Duration::from_millis(250);
/// Attempts to send the same spans, and the time before the second; it doubles.
const ATTEMPTS: u32 = 5;
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Between two warnings that nothing arrives.
const WARN_EVERY: Duration = Duration::from_secs(300);
/// How long the last export may take when the process ends.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// What waits to be sent.
pub struct Outbox {
    wants_spans: bool,
    wants_metrics: bool,
    spans: Mutex<Waiting>,
    pages: Mutex<BTreeMap<(Teller, &'static str), Metrics>>,
    news_of_spans: Notify,
    news_of_pages: Notify,
    counts: Counts,
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<(Teller, &'static str, Vec<Span>)>,
    span_count: usize,
}

/// What became of it.
#[derive(Default)]
struct Counts {
    spans_sent: AtomicU64,
    spans_shed: AtomicU64,
    exports_failed: AtomicU64,
}

/// The tasks.
pub struct Exporter {
    outbox: Arc<Outbox>,
    settings: Arc<Settings>,
    ending: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Exporter {
    /// Starts exporting to where `settings` say. Connects to nothing yet.
    pub fn start(settings: Settings) -> Result<Self, Failure> {
        let outbox = Arc::new(Outbox {
            wants_spans: settings.traces.is_some(),
            wants_metrics: settings.metrics.is_some(),
            spans: Mutex::default(),
            pages: Mutex::default(),
            news_of_spans: Notify::new(),
            news_of_pages: Notify::new(),
            counts: Counts::default(),
        });
        let settings = Arc::new(settings);
        let ending = CancellationToken::new();
        let run = |signal| {
            let collector = Collector::new(signal)?;
            let (outbox, settings, ending) = (outbox.clone(), settings.clone(), ending.clone());
            Ok::<_, Failure>(Run { collector, outbox, settings, ending, warned_at: None, failing: false })
        };
        let mut tasks = Vec::new();
        if let Some(signal) = settings.traces.clone() {
            tasks.push(tokio::spawn(run(signal)?.spans()));
        }
        if let Some(signal) = settings.metrics.clone() {
            tasks.push(tokio::spawn(run(signal)?.metrics()));
        }
        Ok(Self { outbox, settings, ending, tasks })
    }

    /// Where to put what is told.
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// What was asked for.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Tells what `page` says now and then, as often as metrics are exported. It ends with the exporter, or when there is
    /// nothing more to say.
    pub fn tell_regularly(
        &self,
        teller: Teller,
        scope: &'static str,
        page: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) {
        let (outbox, ending, began_ns) = (self.outbox.clone(), self.ending.clone(), now_ns());
        let every = self.settings.metrics_every;
        tokio::spawn(async move {
            while !ending.is_cancelled() {
                tokio::select! {
                    () = ending.cancelled() => {}
                    () = tokio::time::sleep(every) => {}
                }
                let Some(page) = page() else { return };
                outbox.put_page(teller.clone(), scope, Metrics { page, began_ns, at_ns: now_ns() });
            }
        });
    }

    /// Sends what is left, for a moment. A collector that does not answer does not keep the mesh from ending.
    pub async fn stop(self) {
        self.ending.cancel();
        let ended = async {
            for task in self.tasks {
                let _ = task.await;
            }
        };
        let _ = tokio::time::timeout(STOP_WITHIN, ended).await;
    }
}

impl Outbox {
    /// Puts spans where the exporter finds them, as many as there is room for.
    pub fn put_spans(&self, teller: Teller, scope: &'static str, mut spans: Vec<Span>) {
        if !self.wants_spans {
            return;
        }
        let mut waiting = self.spans.lock();
        let room = SPANS_WAITING_MAX - waiting.span_count;
        if spans.len() > room {
            self.counts.spans_shed.fetch_add((spans.len() - room) as u64, Relaxed);
            spans.truncate(room);
        }
        if spans.is_empty() {
            return;
        }
        waiting.span_count += spans.len();
        waiting.batches.push_back((teller, scope, spans));
        let enough = waiting.span_count >= SPANS_PER_EXPORT;
        drop(waiting);
        if enough {
            self.news_of_spans.notify_one();
        }
    }

    /// Puts the newest numbers of a teller where the exporter finds them.
    pub fn put_page(&self, teller: Teller, scope: &'static str, page: Metrics) {
        if !self.wants_metrics {
            return;
        }
        let mut pages = self.pages.lock();
        let key = (teller, scope);
        if pages.len() < PAGES_WAITING_MAX || pages.contains_key(&key) {
            pages.insert(key, page);
        }
        drop(pages);
        self.news_of_pages.notify_one();
    }

    fn take_spans(&self) -> Vec<(Teller, &'static str, Vec<Span>)> {
        let mut waiting = self.spans.lock();
        let mut taken = Vec::new();
        let mut count = 0;
        while count < SPANS_PER_EXPORT
            && let Some(batch) = waiting.batches.pop_front()
        {
            count += batch.2.len();
            taken.push(batch);
        }
        waiting.span_count -= count;
        taken
    }

    /// What the export counts of itself, as OpenMetrics text.
    pub fn page(&self) -> String {
        let counts = &self.counts;
        let mut page = String::new();
        for (name, help, count) in [
            ("spans", "Spans that a collector took", &counts.spans_sent),
            ("spans_shed", "Spans lost for want of room or of a collector", &counts.spans_shed),
            ("exports_failed", "Exports that did not arrive", &counts.exports_failed),
        ] {
            let name = format!("countersign_telemetry_{name}");
            let _ =
                write!(page, "# HELP {name} {help}.\n# TYPE {name} counter\n{name}_total {}\n", count.load(Relaxed));
        }
        page
    }
}

/// Nanoseconds since 1970.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// One task.
struct Run {
    collector: Collector,
    outbox: Arc<Outbox>,
    settings: Arc<Settings>,
    ending: CancellationToken,
    warned_at: Option<Instant>,
    failing: bool,
}

impl Run {
    async fn spans(mut self) {
        loop {
            tokio::select! {
                () = self.ending.cancelled() => {}
                () = self.outbox.news_of_spans.notified() => {}
                () = tokio::time::sleep(self.settings.spans_every) => {}
            }
            let ending = self.ending.is_cancelled();
            loop {
                let batches = self.outbox.take_spans();
                if batches.is_empty() {
                    break;
                }
                self.send_spans(batches).await;
            }
            if ending {
                return;
            }
        }
    }

    async fn send_spans(&mut self, batches: Vec<(Teller, &'static str, Vec<Span>)>) {
        let count: u64 = batches.iter().map(|(.., spans)| spans.len() as u64).sum();
        let mut by_teller: BTreeMap<(Teller, &'static str), Vec<Span>> = BTreeMap::new();
        for (teller, scope, spans) in batches {
            by_teller.entry((teller, scope)).or_default().extend(spans);
        }
        let more = &self.settings.resource;
        let resource_spans = by_teller.into_iter().map(|((teller, name), spans)| ResourceSpans {
            resource: Some(teller.resource(more)),
            scope_spans: vec![ScopeSpans { scope: Some(scope(name)), spans, ..ScopeSpans::default() }],
            ..ResourceSpans::default()
        });
        let request = ExportTraceServiceRequest { resource_spans: resource_spans.collect() };
        let mut again_after = AGAIN_AFTER;
        for attempt in 1..=ATTEMPTS {
            match self.send(Payload::Traces(request.clone())).await {
                Ok(refused) => {
                    let counts = &self.outbox.counts;
                    counts.spans_sent.fetch_add(count.saturating_sub(refused), Relaxed);
                    counts.spans_shed.fetch_add(refused, Relaxed);
                    return;
                }
                Err(later) if !later || attempt == ATTEMPTS || self.ending.is_cancelled() => break,
                Err(_) => {
                    tokio::select! {
                        () = self.ending.cancelled() => {}
                        () = tokio::time::sleep(again_after) => {}
                    }
                    again_after *= 2;
                }
            }
        }
        self.outbox.counts.spans_shed.fetch_add(count, Relaxed);
    }

    async fn metrics(mut self) {
        loop {
            tokio::select! {
                () = self.ending.cancelled() => {}
                () = self.outbox.news_of_pages.notified() => {}
            }
            tokio::time::sleep(GATHER).await;
            let ending = self.ending.is_cancelled();
            let pages: Vec<_> = std::mem::take(&mut *self.outbox.pages.lock()).into_iter().collect();
            let mut pages = pages.into_iter();
            loop {
                let more = &self.settings.resource;
                let resource_metrics = pages.by_ref().take(PAGES_PER_EXPORT).map(|((teller, name), page)| {
                    let metrics = of_page(&page);
                    ResourceMetrics {
                        resource: Some(teller.resource(more)),
                        scope_metrics: vec![ScopeMetrics {
                            scope: Some(scope(name)),
                            metrics,
                            ..ScopeMetrics::default()
                        }],
                        ..ResourceMetrics::default()
                    }
                });
                let request = ExportMetricsServiceRequest { resource_metrics: resource_metrics.collect() };
                if request.resource_metrics.is_empty() {
                    break;
                }
                // Not sent a second time: the next numbers contain these.
                let _ = self.send(Payload::Metrics(request)).await;
            }
            if ending {
                return;
            }
        }
    }

    /// Sends once. `Err` says whether it may arrive later.
    async fn send(&mut self, payload: Payload) -> Result<u64, bool> {
        match self.collector.send(payload).await {
            Ok(refused) => {
                if std::mem::take(&mut self.failing) {
                    self.warned_at = None;
                    tracing::info!(collector = %self.collector.url(), "telemetry arrives again");
                }
                Ok(refused)
            }
            Err(unsent) => {
                self.failing = true;
                self.outbox.counts.exports_failed.fetch_add(1, Relaxed);
                if self.warned_at.is_none_or(|at| at.elapsed() > WARN_EVERY) {
                    self.warned_at = Some(Instant::now());
                    let spans_shed = self.outbox.counts.spans_shed.load(Relaxed);
                    let collector = self.collector.url();
                    tracing::warn!(%collector, why = unsent.why, spans_shed, "telemetry does not arrive");
                }
                Err(unsent.later)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox() -> Outbox {
        Outbox {
            wants_spans: true,
            wants_metrics: true,
            spans: Mutex::default(),
            pages: Mutex::default(),
            news_of_spans: Notify::new(),
            news_of_pages: Notify::new(),
            counts: Counts::default(),
        }
    }

    fn teller(instance: &str) -> Teller {
        Teller { trust_domain: None, service: "catalog".into(), instance: instance.into(), host: "alpha".into() }
    }

    #[test]
    fn what_finds_no_room_is_shed_and_counted() {
        let outbox = outbox();
        for _ in 0..SPANS_WAITING_MAX / 256 {
            outbox.put_spans(teller("1"), "x", vec![Span::default(); 256]);
        }
        assert!(outbox.page().contains("countersign_telemetry_spans_shed_total 0\n"));
        outbox.put_spans(teller("1"), "x", vec![Span::default(); 7]);
        assert!(outbox.page().contains("countersign_telemetry_spans_shed_total 7\n"), "{}", outbox.page());
        let taken: usize = outbox.take_spans().iter().map(|(.., spans)| spans.len()).sum();
        assert_eq!(taken, SPANS_PER_EXPORT);
        outbox.put_spans(teller("1"), "x", vec![Span::default(); SPANS_PER_EXPORT + 1]);
        assert!(outbox.page().contains("countersign_telemetry_spans_shed_total 8\n"), "{}", outbox.page());
    }

    #[test]
    fn only_the_newest_numbers_of_a_teller_are_kept() {
        let outbox = outbox();
        for at_ns in 0..10 {
            outbox.put_page(teller("1"), "x", Metrics { at_ns, ..Metrics::default() });
        }
        outbox.put_page(teller("2"), "x", Metrics::default());
        let pages = outbox.pages.lock();
        assert_eq!((pages.len(), pages[&(teller("1"), "x")].at_ns), (2, 9));
    }

    #[test]
    fn nobody_puts_what_nobody_wants() {
        let outbox = Outbox { wants_spans: false, wants_metrics: false, ..outbox() };
        outbox.put_spans(teller("1"), "x", vec![Span::default()]);
        outbox.put_page(teller("1"), "x", Metrics::default());
        assert!(outbox.take_spans().is_empty() && outbox.pages.lock().is_empty());
    }
}
