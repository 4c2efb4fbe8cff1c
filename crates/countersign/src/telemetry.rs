//! What the serving commands tell of themselves and of their proxies: events for people on a terminal and JSON lines
//! otherwise; and, when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, spans and metrics over OTLP. Commands that ask and end tell
//! nothing.
//!
//! ```text
//! sidecar ── spans that ended, what it counts ──► agent ──┐
//! sidecar ── (the socket pair it was started with) ──►    ├─► outbox ──► collector
//! control ── changes, what it counts ─────────────────────┘   bounded
//! ```
//!
//! Sidecars export nothing themselves: an exporter in each would cost each of them its memory and threads, a way to the
//! collector and the collector's credentials.

mod export;
mod metrics;
mod resource;
mod send;
mod settings;
mod spans;

use std::{
    env, io,
    io::IsTerminal,
    sync::{Arc, Once},
};

use tokio::sync::broadcast::error::RecvError;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use countersign_agent::{Source, Told};
use countersign_control::Control;
use countersign_core::identity::TrustDomain;

use self::{export::Exporter, resource::Teller, settings::Settings};
use crate::{error::Failure, serve};

/// Chooses what is told: `warn,countersign_control=debug`.
const FILTER: &str = "COUNTERSIGN_LOG";
/// What a process of ours calls itself unless `OTEL_SERVICE_NAME` says otherwise.
const SERVICE_NAME: &str = "countersign";

/// What has to be flushed at the end.
pub struct Telemetry {
    exporter: Option<Exporter>,
    own_told: Once, // what the export counts of itself is told, by whoever is first to know the mesh
}

/// Starts it; needs a runtime.
pub fn start() -> Result<Telemetry, Failure> {
    let filter = || match env::var(FILTER) {
        Ok(given) => EnvFilter::try_new(&given).map_err(|e| {
            Failure::usage(format!("did not understand {FILTER}=`{given}`"))
                .because(&e)
                .help("such as `info,countersign_proxy=debug`")
        }),
        // On a terminal the display tells the story; the log is for what went wrong beside it.
        Err(_) if io::stderr().is_terminal() => Ok(EnvFilter::new(format!("warn,{}=off", countersign_agent::TOLD))),
        // An agent tells what its sidecars do; what they tell themselves is for when something is wrong.
        Err(_) => Ok(EnvFilter::new("info,countersign::sidecar=warn")),
    };
    let events = match io::stderr().is_terminal() {
        true => tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false).compact().boxed(),
        false => tracing_subscriber::fmt::layer().with_writer(io::stderr).json().flatten_event(true).boxed(),
    };
    let registry = tracing_subscriber::registry().with(events.with_filter(filter()?));
    registry.try_init().map_err(|e| Failure::new("could not start telling events").because(&e))?;
    let settings = Settings::read(|name| env::var(name).ok())?;
    let exporter = settings.map(Exporter::start).transpose()?;
    Ok(Telemetry { exporter, own_told: Once::new() })
}

impl Telemetry {
    /// What an agent of this process is to get from its proxies; `None`: nothing.
    pub fn of_agent(&self, trust_domain: Option<&TrustDomain>) -> Option<countersign_agent::Telemetry> {
        let exporter = self.exporter.as_ref()?;
        self.own(exporter, trust_domain);
        let outbox = exporter.outbox().clone();
        let hear = move |source: Source<'_>, told: Told| {
            let teller = Teller {
                trust_domain: Some(source.trust_domain.to_string()),
                service: source.instance.service().to_string(),
                instance: source.instance.to_string(),
                host: source.host.to_string(),
            };
            match told {
                Told::Metrics(page) => outbox.put_page(teller, "countersign-proxy", page),
                Told::Spans(told) => {
                    let spans = told.into_iter().map(spans::of_exchange).collect();
                    outbox.put_spans(teller, "countersign-proxy", spans);
                }
            }
        };
        let settings = exporter.settings();
        Some(countersign_agent::Telemetry {
            sampling: settings.traces.is_some().then_some(settings.sampling),
            metrics_every: settings.metrics.is_some().then_some(settings.metrics_every),
            hear: Arc::new(hear),
        })
    }

    /// Tells of the control plane from now on: what it counts, and each change as a span. Changes are few and each
    /// matters, so that only a sampler that begins no trace at all keeps them back.
    pub fn follow(&self, control: &Control, trust_domain: Option<&TrustDomain>) {
        let Some(exporter) = &self.exporter else { return };
        let teller = self.own(exporter, trust_domain);
        exporter.tell_regularly(teller.clone(), "countersign-control", control.counted());
        if exporter.settings().sampling.ratio == 0.0 {
            return;
        }
        let (outbox, mut changes) = (exporter.outbox().clone(), control.changes());
        tokio::spawn(async move {
            loop {
                match changes.recv().await {
                    Ok(changed) => {
                        let span = spans::of_change(changed, fastrand::u128(1..), fastrand::u64(1..));
                        outbox.put_spans(teller.clone(), "countersign-control", vec![span]);
                    }
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return,
                }
            }
        });
    }

    /// This process, which tells what its export does.
    fn own(&self, exporter: &Exporter, trust_domain: Option<&TrustDomain>) -> Teller {
        let host = serve::host_name().to_string();
        let teller = Teller {
            trust_domain: trust_domain.map(ToString::to_string),
            service: exporter.settings().service_name.clone().unwrap_or_else(|| SERVICE_NAME.into()),
            instance: host.clone(),
            host,
        };
        self.own_told.call_once(|| {
            let outbox = exporter.outbox().clone();
            exporter.tell_regularly(teller.clone(), "countersign", move || Some(outbox.page()));
        });
        teller
    }

    /// Sends what is left. A collector that does not answer costs its own time limit, not the mesh's end.
    pub async fn stop(self) {
        if let Some(exporter) = self.exporter {
            exporter.stop().await;
        }
    }
}
