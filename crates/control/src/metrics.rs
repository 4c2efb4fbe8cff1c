//! What the control plane counts, served to Prometheus at `/metrics` on `metrics_listen`. Levels are read when they are
//! asked for; only events are counted as they happen.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// How long jobs of the store took.
#[derive(Clone)]
pub struct StoreLatency(Family<Job, Histogram, fn() -> Histogram>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Job {
    job: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Given {
    client: String,
    grant: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// All metrics of the control plane.
pub struct Metrics {
    registry: Registry,
    /// How long jobs of the store took.
    pub store: StoreLatency,
    issued: Family<Kind, Counter>,
    refused: Family<Kind, Counter>,
    /// Denials and step-ups that hosts reported.
    pub denials: Counter,
    /// Records that found no room, here or on a host.
    pub shed: Counter,
    /// Change-sets that became entries.
    pub applied: Counter,
    /// SVIDs that were revoked.
    pub revoked: Counter,
    /// Access tokens that were issued.
    pub tokens_issued: Counter,
    /// Statements about workloads, hosts and operators.
    pub statements: Counter,
    tokens_given: Family<Given, Counter>,
    tokens_refused: Family<Kind, Counter>,
    /// Revocations of access tokens.
    pub token_revocations: Counter,
    /// Access tokens that were shown by somebody whose they are not.
    pub thefts: Counter,
    levels: Levels,
}

/// What is read when it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LevelsNow {
    /// Ledger entries.
    pub revision: u64,
    /// Agents whose stream is open.
    pub agents: u64,
    /// Streams that were cut off because the agent did not keep up.
    pub streams_cut: u64,
    /// Proxies connected.
    pub proxies: u64,
    /// Revisions by which the slowest connected proxy is behind.
    pub behind: u64,
    /// Instances whose telemetry is silent.
    pub silent: u64,
}

#[derive(Default)]
struct Levels {
    revision: Gauge,
    agents: Gauge,
    streams_cut: Gauge,
    proxies: Gauge,
    behind: Gauge,
    silent: Gauge,
}

impl Default for StoreLatency {
    fn default() -> Self {
        // Seconds; a commit takes about 0.2 ms on a disk that is at rest.
        Self(Family::new_with_constructor(|| {
            Histogram::new([0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0])
        }))
    }
}

impl StoreLatency {
    /// Notes one job.
    pub fn observe(&self, job: &'static str, took: Duration) {
        self.0.get_or_create(&Job { job }).observe(took.as_secs_f64());
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let store = StoreLatency::default();
        let (issued, refused) = (Family::default(), Family::default());
        let (denials, shed, applied) = (Counter::default(), Counter::default(), Counter::default());
        let revoked = Counter::default();
        let (tokens_issued, token_revocations, thefts) = (Counter::default(), Counter::default(), Counter::default());
        let statements = Counter::default();
        let (tokens_given, tokens_refused) = (Family::default(), Family::default());
        let levels = Levels::default();
        let mut registry = Registry::with_prefix("countersign_control");
        let r = &mut registry;
        r.register_with_unit("store_job", "How long a job of the store took", Unit::Seconds, store.0.clone());
        r.register("svids_issued", "SVIDs signed, by whom they name", Family::clone(&issued));
        r.register("requests_refused", "Requests of agents and strangers that were refused", Family::clone(&refused));
        r.register("denials_reported", "Denials and step-ups that hosts reported", denials.clone());
        r.register("records_shed", "Decision records that found no room", shed.clone());
        r.register("changes_applied", "Change-sets that became ledger entries", applied.clone());
        r.register("svids_revoked", "SVIDs taken back before their time", revoked.clone());
        r.register("ledger_entries", "Entries of the ledger: the revision", levels.revision.clone());
        r.register("agents_connected", "Agents whose stream is open", levels.agents.clone());
        r.register("agents_cut", "Streams cut off because the agent did not keep up", levels.streams_cut.clone());
        r.register("proxies_connected", "Proxies of connected agents", levels.proxies.clone());
        r.register(
            "acknowledgements_behind_revisions",
            "Revisions by which the slowest connected proxy is behind",
            levels.behind.clone(),
        );
        r.register("telemetry_silent", "Instances whose telemetry is silent", levels.silent.clone());
        r.register("tokens_issued", "Access tokens issued to workloads", tokens_issued.clone());
        r.register(
            "oauth_tokens_issued",
            "Access tokens issued to clients, by who asked",
            Family::clone(&tokens_given),
        );
        r.register(
            "oauth_tokens_refused",
            "Requests for access tokens refused, by error",
            Family::clone(&tokens_refused),
        );
        r.register("token_revocations", "Revocations of access tokens", token_revocations.clone());
        r.register("statements", "Statements about workloads, hosts and operators", statements.clone());
        r.register("tokens_stolen", "Access tokens shown by somebody whose they are not", thefts.clone());
        Self {
            registry,
            store,
            issued,
            refused,
            denials,
            shed,
            applied,
            revoked,
            tokens_issued,
            tokens_given,
            tokens_refused,
            token_revocations,
            statements,
            thefts,
            levels,
        }
    }
}

impl Metrics {
    /// An SVID was signed for an `agent`, a `workload` or `control`.
    pub fn issued(&self, kind: &'static str) {
        self.issued.get_or_create(&Kind { kind }).inc();
    }

    /// The token service gave `client` a token. Clients are declared, so there are not more than the mesh has.
    pub fn token_given(&self, client: &str, grant: &'static str) {
        self.tokens_given.get_or_create(&Given { client: client.to_owned(), grant }).inc();
    }

    /// It gave none, for the reason that this word says.
    pub fn token_refused(&self, kind: &'static str) {
        self.tokens_refused.get_or_create(&Kind { kind }).inc();
    }

    /// A request was refused.
    pub fn refused(&self, kind: &'static str) {
        self.refused.get_or_create(&Kind { kind }).inc();
    }

    /// The page, in OpenMetrics text.
    pub fn page(&self, now: LevelsNow) -> String {
        let gauge = |gauge: &Gauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge(&self.levels.revision, now.revision);
        gauge(&self.levels.agents, now.agents);
        gauge(&self.levels.streams_cut, now.streams_cut);
        gauge(&self.levels.proxies, now.proxies);
        gauge(&self.levels.behind, now.behind);
        gauge(&self.levels.silent, now.silent);
        let mut page = String::new();
        if encode(&mut page, &self.registry).is_err() {
            let _ = write!(page, "# the metrics could not be written");
        }
        page
    }
}

/// Serves `/metrics` until the task is dropped.
pub async fn serve(listener: tokio::net::TcpListener, page: impl Fn() -> String + Send + Sync + 'static) {
    let page = Arc::new(page);
    let answer = move || {
        let page = page.clone();
        async move {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(http::header::CONTENT_TYPE, kind)], page())
        }
    };
    let router = axum::Router::new().route("/metrics", axum::routing::get(answer));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the metrics listener ended");
    }
}
