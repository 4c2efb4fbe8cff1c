//! What the serving commands tell of themselves: events for people on a terminal and JSON lines otherwise; traces and
//! metrics over OTLP when `OTEL_EXPORTER_OTLP_ENDPOINT` is set. Commands that ask and end tell nothing.

use std::{env, io, io::IsTerminal};

use opentelemetry::{global, trace::TracerProvider as _};
use opentelemetry_otlp::{MetricExporter, SpanExporter};
use opentelemetry_sdk::{Resource, metrics::SdkMeterProvider, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::error::Failure;

/// The variable that switches the export on, as OpenTelemetry names it.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Chooses what is told: `warn,countersign_control=debug`.
const FILTER: &str = "COUNTERSIGN_LOG";

/// What has to be flushed at the end.
pub struct Telemetry {
    exporters: Option<(SdkTracerProvider, SdkMeterProvider)>,
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
        Err(_) => Ok(EnvFilter::new("info")),
    };
    let events = match io::stderr().is_terminal() {
        true => tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false).compact().boxed(),
        false => tracing_subscriber::fmt::layer().with_writer(io::stderr).json().flatten_event(true).boxed(),
    };
    let exporters = env::var_os(ENDPOINT).filter(|endpoint| !endpoint.is_empty()).map(|_| exporters()).transpose()?;
    let spans = exporters.as_ref().map(|(tracer, _)| {
        let layer = tracing_opentelemetry::layer().with_tracer(tracer.tracer("countersign"));
        layer.with_filter(EnvFilter::new("info"))
    });
    let registry = tracing_subscriber::registry().with(spans).with(events.with_filter(filter()?));
    registry.try_init().map_err(|e| Failure::new("could not start telling events").because(&e))?;
    Ok(Telemetry { exporters })
}

fn exporters() -> Result<(SdkTracerProvider, SdkMeterProvider), Failure> {
    let could_not = |e: &(dyn std::error::Error + 'static)| {
        Failure::new(format!("could not export telemetry to {ENDPOINT}")).because(e).help(
            "it must be the URL of an OTLP/gRPC collector, such as `http://localhost:4317`; unset it to export nothing",
        )
    };
    let spans = SpanExporter::builder().with_tonic().build().map_err(|e| could_not(&e))?;
    let metrics = MetricExporter::builder().with_tonic().build().map_err(|e| could_not(&e))?;
    let resource = Resource::builder().with_service_name("countersign").build();
    let tracer = SdkTracerProvider::builder().with_batch_exporter(spans).with_resource(resource.clone()).build();
    let meter = SdkMeterProvider::builder().with_periodic_exporter(metrics).with_resource(resource).build();
    global::set_tracer_provider(tracer.clone());
    global::set_meter_provider(meter.clone());
    Ok((tracer, meter))
}

impl Telemetry {
    /// Sends what is left. A collector that does not answer costs its own time limit, not the mesh's end.
    pub async fn stop(self) {
        let Some((tracer, meter)) = self.exporters else { return };
        let flush = tokio::task::spawn_blocking(move || {
            let _ = tracer.shutdown();
            let _ = meter.shutdown();
        });
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), flush).await;
    }
}
