//! Whether the telemetry of a sidecar arrives at control: now and then control gives a nonce, the sidecar makes an exchange with
//! itself that carries it, and what it counted and traced of that is passed on. Its record goes the way of all records.
//!
//! Whether that is enough, control says. The workload takes no part and can bring none of it about.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use countersign_api::{
    mesh::{FollowRequest, ProbeTelemetryRequest, TelemetryProbed, follow_request::Message, mesh_client::MeshClient},
    sidecar::{MetricsQuery, Probed, Span, sidecar_order::Order},
};
use countersign_core::identity::InstanceId;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::{backoff::Backoff, host::Host, link::chain, workloads::instance::Instance};

/// How often a sidecar is probed.
const EVERY: Duration = Duration::from_secs(60);
/// The first and the longest time until a probe that came to nothing is tried again.
const RETRY_FIRST: Duration = Duration::from_millis(200);
/// How long control, and then the sidecar, may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// The sample of a metrics page that counts probes.
const SAMPLE: &str = "countersign_probes_total ";
/// Longest sample, in bytes.
const SAMPLE_BYTES_MAX: usize = 256;

/// The probes that are under way, of the sidecars of this host.
#[derive(Default)]
pub(crate) struct Probes {
    open: Mutex<BTreeMap<InstanceId, Open>>,
}

/// What came of a probe so far.
struct Open {
    nonce: Bytes,
    error: Option<String>, // of the sidecar; none until it says that the exchange is over
    metric: Option<String>,
    span: Option<Span>,
    moved: Arc<Notify>,
}

impl Probes {
    /// The exchange of a sidecar with itself is over.
    pub(crate) fn hear_end(&self, instance: &InstanceId, probed: Probed) {
        self.hear(instance, |open| {
            if open.nonce == probed.nonce {
                open.error = Some(probed.error);
            }
        });
    }

    /// Takes the span of a probe out of `spans`: it is no traffic, and of no interest to who exports them.
    pub(crate) fn hear_spans(&self, instance: &InstanceId, mut spans: Vec<Span>) -> Vec<Span> {
        self.hear(instance, |open| {
            let found = spans.extract_if(.., |span| span.trace_id == open.nonce).last();
            if found.is_some() {
                open.span = found;
            }
        });
        spans
    }

    /// Looks for the count of a probe.
    pub(crate) fn hear_metrics(&self, instance: &InstanceId, page: &str) {
        self.hear(instance, |open| {
            let sample = page.lines().find(|line| line.starts_with(SAMPLE) && line.len() <= SAMPLE_BYTES_MAX);
            open.metric = sample.filter(|sample| sample.contains(&hexadecimal(&open.nonce))).map(str::to_owned);
        });
    }

    fn hear(&self, instance: &InstanceId, take_in: impl FnOnce(&mut Open)) {
        if let Some(open) = self.open.lock().get_mut(instance) {
            take_in(open);
            open.moved.notify_one();
        }
    }

    fn begin(&self, instance: &InstanceId, nonce: Bytes) -> Begun<'_> {
        let moved = Arc::new(Notify::new());
        let open = Open { nonce, error: None, metric: None, span: None, moved: moved.clone() };
        self.open.lock().insert(instance.clone(), open);
        Begun { probes: self, instance: instance.clone(), moved }
    }
}

/// A probe that is under way; dropped, nothing that comes later counts.
struct Begun<'a> {
    probes: &'a Probes,
    instance: InstanceId,
    moved: Arc<Notify>,
}

impl Begun<'_> {
    /// Waits until `done`, or until it has taken too long. Whether it is done.
    async fn until(&self, done: impl Fn(&Open) -> bool) -> bool {
        let waits = async {
            while !self.probes.open.lock().get(&self.instance).is_none_or(&done) {
                self.moved.notified().await;
            }
        };
        tokio::time::timeout(ANSWER_WITHIN, waits).await.is_ok()
    }

    fn end(self) -> Option<Open> {
        self.probes.open.lock().remove(&self.instance)
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.probes.open.lock().remove(&self.instance);
    }
}

/// Probes the sidecar of `instance` as long as it is talked to. `orders` go to it.
pub(crate) async fn run(host: &Host, instance: &Instance, orders: mpsc::Sender<Order>) -> std::convert::Infallible {
    let mut backoff = Backoff::new(RETRY_FIRST, EVERY);
    loop {
        let mut status = instance.watch();
        // It cannot fail: the sender lies in `instance`.
        let _ = status.wait_for(|status| status.revision.is_some() && status.has_identity).await;
        let again_in = match once(host, &instance.id, &orders).await {
            Ok(()) => {
                backoff.reset();
                EVERY
            }
            Err(why) => {
                let again_in = backoff.next_delay();
                tracing::info!(instance = %instance.id, why, ?again_in, "the telemetry of a sidecar could not be probed");
                again_in
            }
        };
        tokio::time::sleep(again_in).await;
    }
}

/// One probe. What there is of it is passed on, also when it is not all: control says what is missing.
async fn once(host: &Host, instance: &InstanceId, orders: &mpsc::Sender<Order>) -> Result<(), String> {
    let mut channel = host.channel.subscribe();
    let channel = channel.wait_for(Option::is_some).await.map_err(|_| "this agent ends")?.clone();
    let mut control = MeshClient::new(channel.ok_or("control is away")?);
    let asked = control.probe_telemetry(ProbeTelemetryRequest { instance: instance.to_string() });
    let nonce = match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(answer)) => answer.into_inner().nonce,
        Ok(Err(status)) => return Err(format!("control does not begin one: {}", chain(&status))),
        Err(_) => return Err("control did not answer".into()),
    };
    let begun = host.probes.begin(instance, nonce.clone());
    let gone = |_| "the sidecar is gone".to_owned();
    orders.send(Order::Probe(nonce.clone())).await.map_err(gone)?;
    if begun.until(|open| open.error.is_some()).await {
        orders.send(Order::MetricsQuery(MetricsQuery {})).await.map_err(gone)?;
        let failed = |open: &Open| open.error.as_ref().is_some_and(|error| !error.is_empty());
        begun.until(|open| failed(open) || open.metric.is_some() && open.span.is_some()).await;
    }
    let Some(open) = begun.end() else { return Err("the sidecar is gone".into()) };
    let why = match (&open.error, &open.metric, &open.span) {
        (None, ..) => Some("the sidecar did not answer".to_owned()),
        (Some(error), ..) if !error.is_empty() => Some(error.clone()),
        (_, None, _) => Some("its metrics do not count the probe".to_owned()),
        (_, _, None) => Some("its span did not come".to_owned()),
        _ => None,
    };
    let probed = TelemetryProbed {
        instance: instance.to_string(),
        nonce,
        metric: open.metric.unwrap_or_default(),
        span: open.span,
    };
    host.reports.send_probed(FollowRequest { message: Some(Message::Probed(probed)) });
    why.map_or(Ok(()), Err)
}

fn hexadecimal(nonce: &[u8]) -> String {
    nonce.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_carries_the_nonce_of_the_open_probe_is_taken_for_it() {
        let (probes, id) = (Probes::default(), InstanceId::parse("web/1").unwrap());
        let (nonce, other) = (Bytes::from_static(&[7; 16]), Bytes::from_static(&[8; 16]));
        let span = |of: &Bytes| Span { trace_id: of.clone(), ..Span::default() };
        let page = |of: &Bytes| format!("# EOF\n{SAMPLE}3 # {{trace_id=\"{}\"}} 1\n", hexadecimal(of));
        assert_eq!(probes.hear_spans(&id, vec![span(&nonce)]).len(), 1, "none is open");

        let begun = probes.begin(&id, nonce.clone());
        assert_eq!(probes.hear_spans(&id, vec![span(&other), span(&nonce), span(&other)]).len(), 2);
        probes.hear_metrics(&id, &page(&other));
        probes.hear_end(&id, Probed { nonce: other.clone(), error: "no".into() });
        probes.hear_end(&InstanceId::parse("web/2").unwrap(), Probed { nonce: nonce.clone(), error: "no".into() });
        assert!(!begun.until(|open| open.metric.is_some() || open.error.is_some()).await);
        probes.hear_metrics(&id, &format!("{}{SAMPLE}", " ".repeat(SAMPLE_BYTES_MAX)));
        probes.hear_metrics(&id, &page(&nonce));
        probes.hear_end(&id, Probed { nonce, error: String::new() });
        assert!(begun.until(|open| open.metric.is_some() && open.error.is_some() && open.span.is_some()).await);
        drop(begun);
        assert!(probes.open.lock().is_empty());
    }
}
