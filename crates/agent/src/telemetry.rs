//! What proxies tell beyond their records: what they count, and the spans of exchanges whose trace is kept. The agent asks
//! for the first and hears the second, and passes both on; it has no opinion of them and knows no collector.
//!
//! One exporter for the host instead of one in each proxy: a proxy keeps its size, holds no credentials of a collector,
//! and needs no way to one.

use std::{fmt, sync::Arc, time::Duration};

use countersign_api::sidecar::{Metrics, Sampling, Span};
use countersign_core::identity::{InstanceId, ServiceName, TrustDomain};

/// What is wanted of proxies, and who wants it.
#[derive(Clone)]
pub struct Telemetry {
    /// Which exchanges are told as spans; `None`: none.
    pub sampling: Option<Sampling>,
    /// How often proxies are asked what they counted; `None`: never.
    pub metrics_every: Option<Duration>,
    /// Takes what a proxy told. Called where proxies are heard: it must not wait.
    pub hear: Arc<dyn Fn(Source<'_>, Told) + Send + Sync>,
}

/// Whose proxy told it.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The mesh.
    pub trust_domain: &'a TrustDomain,
    /// This host.
    pub host: &'a ServiceName,
    /// The instance.
    pub instance: &'a InstanceId,
}

/// What a proxy told.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    /// What it counted until now.
    Metrics(Metrics),
    /// Exchanges that ended.
    Spans(Vec<Span>),
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sampling, every) = (&self.sampling, &self.metrics_every);
        f.debug_struct("Telemetry").field("sampling", sampling).field("metrics_every", every).finish_non_exhaustive()
    }
}
