//! The sidecar's conversation with its agent: it is configured once, answers where it listens, and from then on takes
//! identities, views, endpoints and freshness into [`Shared`], and says what it enforces, what it recorded and whether its
//! workload accepts connections.
//!
//! An acknowledged revision is one that every worker enforces and by which every open exchange was judged again. Views
//! that arrive while one is being taken up replace each other: only the newest is taken up next.
//!
//! The agent's end closed means that the agent died: the sidecar ends at once, because nobody would tell it of a
//! revocation any more; the agent's successor starts a new one.

use std::{
    io,
    net::SocketAddr,
    os::unix::net::UnixStream,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use countersign_api::{
    mesh::{self, InstanceRevision, IssuedToken, RecordsAnswer, RecordsQuery, Report},
    sidecar::{
        Drain, Endpoints, Identity, Metrics, Probed, ProxyFrames, SidecarMessage, Tokens, sidecar_message,
        sidecar_order,
    },
    signals::{self, SignalsRefused},
    svid::{Bundle, SvidError, X509Svid},
};
use countersign_core::{
    identity::{InstanceId, NameError, ServiceName},
    signal::Signals,
    token::Thumbprint,
};
use futures_util::{SinkExt, StreamExt, stream::SplitSink};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc, oneshot, watch},
    task::spawn_blocking,
    time::timeout,
};
use tokio_util::codec::Framed;
use tracing::{debug, error, info, warn};

use crate::{
    admin::{self, Admin},
    decided::Recorder,
    probe::probe,
    record::{Reader, Sink, SinkConfig},
    shared::{AttachedToken, Endpoint, Setup, Shared, TokensByService},
    sidecar::chain,
    trace::{self, Tracing},
    workers,
};

mod app;
mod configure;
mod enforce;
mod names;

use configure::{Configuration, ConfigureError, Listeners};
use enforce::Offered;
use names::Names;

/// How long the agent may take to configure a sidecar that it started.
const CONFIGURE_WITHIN: Duration = Duration::from_secs(30);
/// How long open exchanges may go on when the process is asked to end by a signal.
const DRAIN_ON_SIGNAL: Duration = Duration::from_secs(10);
/// Messages that wait for the agent to read them. Views are acknowledged and reports made only as fast as it does.
const UNREAD_MAX: usize = 64;
/// Reports that wait; the record keeps what does not fit.
const REPORTS_MAX: usize = 4;
/// Queries of kept records answered at the same time.
const QUERIES_MAX: usize = 2;
/// Records in one message of an answer.
const RECORDS_PER_ANSWER: usize = 256;
/// How often the threads are looked after.
const LOOK_AFTER_EVERY: Duration = Duration::from_secs(1);

/// How the conversation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Everything open was finished or cut, and the agent knows.
    Drained,
    /// The agent died, or let go of this sidecar.
    AgentGone,
}

/// Why there is no conversation (any more).
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The agent was silent for too long.
    #[error("the agent did not configure this sidecar within {CONFIGURE_WITHIN:?}")]
    NotConfigured,
    /// Its first order must be `configure`, and no other.
    #[error("the agent's order `{0}` came out of turn")]
    OutOfTurn(&'static str),
    /// Bytes that are no message.
    #[error("could not read from the agent")]
    Read(#[source] io::Error),
    /// The configuration makes no sense.
    #[error("could not take up the configuration")]
    Configure(#[from] ConfigureError),
    /// A thread could not be started.
    #[error("could not start `{what}`")]
    Start {
        /// The thread or socket.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A worker stopped while it should not.
    #[error("a worker stopped: the log says where it panicked")]
    WorkerDied,
}

/// An identity or endpoint that cannot be taken up. What was there before stays.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the SVID")]
    Svid(#[source] SvidError),
    #[error("the bundle")]
    Bundle(#[source] SvidError),
    #[error("the access tokens: their certificate is no SHA-256")]
    Certificate,
    #[error("the signals")]
    Signals(#[from] SignalsRefused),
    #[error("an endpoint")]
    Name(#[from] NameError),
    #[error("the address `{0}` of an endpoint")]
    Address(String),
}

type Agent = SplitSink<Framed<tokio::net::UnixStream, ProxyFrames>, SidecarMessage>;

/// Runs one sidecar on its agent's socket pair, until it has drained or the agent is gone.
pub async fn run(agent: UnixStream) -> Result<Ended, LinkError> {
    let start = |what| move |source| LinkError::Start { what, source };
    agent.set_nonblocking(true).map_err(start("the agent's socket"))?;
    let agent = tokio::net::UnixStream::from_std(agent).map_err(start("the agent's socket"))?;
    let (to_agent, mut orders) = Framed::new(agent, ProxyFrames::default()).split();
    let configuration = match timeout(CONFIGURE_WITHIN, orders.next()).await {
        Err(_) => return Err(LinkError::NotConfigured),
        Ok(None) => return Ok(Ended::AgentGone),
        Ok(Some(order)) => match order.map_err(LinkError::Read)?.order {
            Some(sidecar_order::Order::Configure(configure)) => Configuration::parse(configure)?,
            Some(other) => return Err(LinkError::OutOfTurn(name(&other))),
            None => return Err(LinkError::OutOfTurn("unknown")),
        },
    };
    let (sidecar, mut ended) = Sidecar::start(configuration, to_agent)?;
    // Ctrl-C in a terminal goes to the whole process group: the agent decides what it means for its sidecars.
    let mut interrupted = signal(SignalKind::interrupt()).map_err(start("signals"))?;
    let mut terminated = signal(SignalKind::terminate()).map_err(start("signals"))?;
    let mut look_after = tokio::time::interval(LOOK_AFTER_EVERY);
    loop {
        tokio::select! {
            order = orders.next() => match order {
                None => return Ok(Ended::AgentGone),
                Some(order) => sidecar.obey(order.map_err(LinkError::Read)?.order)?,
            },
            Some(result) = ended.recv() => return Ok(result),
            _ = interrupted.recv() => {}
            _ = terminated.recv() => sidecar.drain(DRAIN_ON_SIGNAL),
            _ = look_after.tick() => sidecar.look_after()?,
        }
    }
}

/// A configured sidecar.
struct Sidecar {
    shared: Arc<Shared>,
    inbound: SocketAddr,
    workers: Vec<JoinHandle<()>>,
    offered: Arc<Offered>,
    heard: watch::Sender<()>, // signals
    reader: Reader,
    counted: Counted,
    queries: Arc<Semaphore>,
    say: mpsc::Sender<SidecarMessage>,
    drain: mpsc::Sender<Duration>,
}

impl Sidecar {
    /// Binds, starts the threads, and answers `listening`. The receiver says when a drain is done.
    fn start(configuration: Configuration, to_agent: Agent) -> Result<(Self, mpsc::Receiver<Ended>), LinkError> {
        let start = |what| move |source| LinkError::Start { what, source };
        let sockets = configuration.sockets()?;
        let listeners = Listeners::bind(&configuration, &sockets)?;
        let (listening, inbound) = (listeners.listening(), listeners.inbound());
        let (tracing, spans) = Tracing::new(configuration.sampling);
        let is_told = configuration.sampling.is_some();
        let shared = Arc::new(Shared::new(Setup {
            instance: configuration.instance.clone(),
            app: configuration.app(&sockets),
            worker_count: configuration.worker_count,
            tracing: Some(tracing),
        }));
        if let Err(error) = shared.know_edges(&configuration.records_dir) {
            warn!(%error, "could not read which callers are known: they look new");
        }
        let (report, reports) = mpsc::channel(REPORTS_MAX);
        let config = SinkConfig {
            instance: configuration.instance,
            dir: configuration.records_dir,
            bytes_max: configuration.records_bytes_max,
            worker_count: configuration.worker_count,
        };
        let (sink, recorders) = Sink::start(config, report).map_err(start("the record"))?;
        let recorders = recorders.into_iter().map(|recorder| Box::new(recorder) as Box<dyn Recorder + Send>).collect();
        let workers = workers::start(&shared, recorders).map_err(start("the workers"))?;

        let (say, unread) = mpsc::channel(UNREAD_MAX);
        let reader = sink.reader();
        let offered = Arc::new(Offered::default());
        let (drain, drains) = mpsc::channel(1);
        let (end, ended) = mpsc::channel(1);
        // The channel is empty: there is room.
        let _ = say.try_send(message(sidecar_message::Message::Listening(listening)));
        let spoken = tokio::spawn(speak(unread, to_agent));
        let reported = tokio::spawn(pass_on_reports(reports, say.clone()));
        let (end_spans, ending) = oneshot::channel();
        let traced = tokio::spawn(trace::pass_on(spans, say.downgrade(), ending));
        let counted = Counted { shared: shared.clone(), reader: reader.clone(), began: SystemTime::now() };
        let names = if configuration.transparent {
            let upstreams = listeners.upstreams().map_err(start("the names of services"))?;
            Some(Names::start(sockets, shared.clone(), upstreams).map_err(start("the names of services"))?)
        } else {
            None
        };
        tokio::spawn(enforce::run(shared.clone(), offered.clone(), names, say.clone()));
        let (heard, hears) = watch::channel(());
        tokio::spawn(enforce::heed(shared.clone(), hears, say.clone()));
        if shared.setup.app.is_some() {
            tokio::spawn(app::watch(shared.clone(), say.clone()));
        }
        let admin = tokio::net::TcpListener::from_std(listeners.open(&shared)).map_err(start("the admin pages"))?;
        tokio::spawn(Admin::new(shared.clone(), reader.clone()).serve(admin));
        let closing = Closing {
            shared: shared.clone(),
            sink,
            say: say.downgrade(),
            spoken,
            reported,
            traced: (end_spans, traced),
            is_told,
            counted: counted.clone(),
            end,
        };
        tokio::spawn(closing.run(drains));
        info!(instance.id = %shared.setup.instance, workers = workers.len(), "sidecar listens");
        let queries = Arc::new(Semaphore::new(QUERIES_MAX));
        Ok((Self { shared, inbound, workers, offered, heard, reader, counted, queries, say, drain }, ended))
    }

    fn obey(&self, order: Option<sidecar_order::Order>) -> Result<(), LinkError> {
        use sidecar_order::Order;
        let taken = match order {
            Some(Order::Configure(_)) => return Err(LinkError::OutOfTurn("configure")),
            Some(Order::Identity(identity)) => self.take_identity(identity),
            Some(Order::Bundle(bundle)) => {
                Bundle::from_message(&bundle).map(|bundle| self.shared.set_bundle(bundle)).map_err(Refused::Bundle)
            }
            Some(Order::ViewJson(json)) => {
                self.offered.view(json);
                Ok(())
            }
            Some(Order::Revision(revision)) => {
                self.offered.revision(revision);
                Ok(())
            }
            Some(Order::Endpoints(endpoints)) => {
                self.take_endpoints(endpoints);
                Ok(())
            }
            Some(Order::Fresh(fresh)) => {
                self.shared.set_fresh(Duration::from_millis(fresh.age_ms));
                Ok(())
            }
            Some(Order::RecordsQuery(query)) => {
                tokio::spawn(answer(query, self.reader.clone(), self.queries.clone(), self.say.clone()));
                Ok(())
            }
            Some(Order::MetricsQuery(_)) => {
                // An agent that reads nothing asks again later.
                let _ = self.say.try_send(message(sidecar_message::Message::Metrics(self.counted.now())));
                Ok(())
            }
            Some(Order::Probe(nonce)) => {
                tokio::spawn(make_probe(self.shared.clone(), self.inbound, nonce, self.say.clone()));
                Ok(())
            }
            Some(Order::Signals(message)) => self.take_signals(&message),
            Some(Order::Tokens(tokens)) => self.take_tokens(tokens),
            Some(Order::Drain(Drain { within_ms })) => {
                self.drain(Duration::from_millis(within_ms));
                Ok(())
            }
            None => {
                debug!("the agent is newer and gave an order that this version does not know");
                Ok(())
            }
        };
        if let Err(refused) = taken {
            error!(error = chain(&refused), "could not take up what the agent sent; what was there stays");
        }
        Ok(())
    }

    fn take_identity(&self, identity: Identity) -> Result<(), Refused> {
        let chain = identity.chain_der.iter().map(|der| der.to_vec().into()).collect();
        let svid = X509Svid::parse(chain, identity.key_pkcs8_der.to_vec()).map_err(Refused::Svid)?;
        self.shared.set_svid(svid, tokens_of(identity.tokens));
        Ok(())
    }

    fn take_tokens(&self, tokens: Tokens) -> Result<(), Refused> {
        let certificate = tokens.certificate_sha256[..].try_into().map_err(|_| Refused::Certificate)?;
        self.shared.set_tokens(Thumbprint(certificate), tokens_of(tokens.tokens));
        Ok(())
    }

    fn take_signals(&self, message: &mesh::Signals) -> Result<(), Refused> {
        let mut signals = Signals::default();
        signals::take_in(&mut signals, message)?;
        self.shared.heed(signals);
        self.heard.send_replace(());
        Ok(())
    }

    /// An endpoint that cannot be read is left out and said; it takes no other with it.
    fn take_endpoints(&self, endpoints: Endpoints) {
        let mut services = Vec::with_capacity(endpoints.services.len());
        for service in endpoints.services {
            let name = match ServiceName::parse(&service.service) {
                Ok(name) => name,
                Err(error) => {
                    warn!(%error, "left out endpoints");
                    continue;
                }
            };
            let read = |endpoint: countersign_api::mesh::Endpoint| -> Result<Endpoint, Refused> {
                let address: Result<SocketAddr, _> = endpoint.address.parse();
                Ok(Endpoint {
                    instance: InstanceId::parse(&endpoint.instance)?,
                    address: address.map_err(|_| Refused::Address(endpoint.address))?,
                    ready: endpoint.ready,
                })
            };
            let (good, bad): (Vec<_>, Vec<_>) = service.endpoints.into_iter().map(read).partition(Result::is_ok);
            for error in bad.into_iter().filter_map(Result::err) {
                warn!(error = chain(&error), service = %name, "left out an endpoint");
            }
            services.push((name, good.into_iter().filter_map(Result::ok).collect()));
        }
        self.shared.set_endpoints(services, endpoints.full);
    }

    fn drain(&self, within: Duration) {
        let _ = self.drain.try_send(within); // a second order changes nothing: the first deadline holds
    }

    fn look_after(&self) -> Result<(), LinkError> {
        if !self.shared.is_draining() && self.workers.iter().any(JoinHandle::is_finished) {
            return Err(LinkError::WorkerDied);
        }
        Ok(())
    }
}

/// What is counted, for an agent that asks.
#[derive(Clone)]
struct Counted {
    shared: Arc<Shared>,
    reader: Reader,
    began: SystemTime,
}

impl Counted {
    fn now(&self) -> Metrics {
        let mut page = String::with_capacity(16 * 1024);
        // Writing to a string does not fail.
        let _ = admin::metrics::encode(&mut page, &self.shared, &self.reader.counts());
        Metrics { page, began_ns: trace::nanoseconds(self.began), at_ns: trace::nanoseconds(SystemTime::now()) }
    }
}

/// What must happen, in order, before a drained sidecar ends.
struct Closing {
    shared: Arc<Shared>,
    sink: Sink,
    say: mpsc::WeakSender<SidecarMessage>,
    spoken: tokio::task::JoinHandle<()>,
    reported: tokio::task::JoinHandle<()>,
    traced: (oneshot::Sender<()>, tokio::task::JoinHandle<()>),
    is_told: bool, // somebody exports what it counts
    counted: Counted,
    end: mpsc::Sender<Ended>,
}

impl Closing {
    async fn run(self, mut drains: mpsc::Receiver<Duration>) {
        let Some(within) = drains.recv().await else { return };
        self.shared.drain(within).await;
        let _ = spawn_blocking(move || drop(self.sink)).await; // the last records are written and reported
        let _ = self.reported.await;
        let (end_spans, traced) = self.traced;
        let _ = end_spans.send(());
        let _ = traced.await;
        if let Some(say) = self.say.upgrade() {
            if self.is_told {
                let _ = say.send(message(sidecar_message::Message::Metrics(self.counted.now()))).await;
            }
            let _ = say.send(message(sidecar_message::Message::Drained(String::new()))).await;
            // The writer closes after `drained`; the agent may be gone by then.
            drop(say);
            let _ = timeout(Duration::from_secs(1), self.spoken).await;
        }
        let _ = self.end.send(Ended::Drained).await;
    }
}

/// Writes to the agent until it is gone, or `drained` was said: nothing comes after that.
async fn speak(mut unread: mpsc::Receiver<SidecarMessage>, mut to_agent: Agent) {
    while let Some(message) = unread.recv().await {
        let is_last = matches!(message.message, Some(sidecar_message::Message::Drained(_)));
        if to_agent.send(message).await.is_err() || is_last {
            return;
        }
    }
}

async fn pass_on_reports(mut reports: mpsc::Receiver<Report>, say: mpsc::Sender<SidecarMessage>) {
    while let Some(report) = reports.recv().await {
        if say.send(message(sidecar_message::Message::Report(report))).await.is_err() {
            return;
        }
    }
}

/// Makes an exchange with itself and says that it is over.
async fn make_probe(shared: Arc<Shared>, inbound: SocketAddr, nonce: Bytes, say: mpsc::Sender<SidecarMessage>) {
    let made = probe(&shared, inbound, &nonce).await;
    let error = made.err().map(|error| error.to_string()).unwrap_or_default();
    // An agent that reads nothing asks again later.
    let _ = say.try_send(message(sidecar_message::Message::Probed(Probed { nonce, error })));
}

/// Answers one query of kept records, a few hundred at a time.
async fn answer(query: RecordsQuery, reader: Reader, queries: Arc<Semaphore>, say: mpsc::Sender<SidecarMessage>) {
    let number = query.query;
    let found = match queries.try_acquire_owned() {
        Err(_) => Err("this sidecar answers other queries already: ask again".to_owned()),
        Ok(turn) => {
            let read = spawn_blocking(move || {
                let _turn = turn;
                let filter = serde_json::from_str(&query.filter_json).map_err(|error| error.to_string())?;
                let records = reader.read(&filter).map_err(|error| format!("could not read the records: {error}"))?;
                let json = records.iter().map(serde_json::to_vec).collect::<Result<Vec<_>, _>>();
                json.map_err(|error| error.to_string())
            });
            read.await.unwrap_or_else(|error| Err(error.to_string()))
        }
    };
    let (records, error) = found.map_or_else(|error| (Vec::new(), error), |records| (records, String::new()));
    let mut rest = records.into_iter().map(Into::into).peekable();
    loop {
        let records_json = rest.by_ref().take(RECORDS_PER_ANSWER).collect();
        let last = rest.peek().is_none();
        let answer = RecordsAnswer { query: number, records_json, last, error: error.clone() };
        if say.send(message(sidecar_message::Message::Records(answer))).await.is_err() || last {
            return;
        }
    }
}

/// What cannot stand in a header or names no service is left out: the callee then says that none came.
fn tokens_of(issued: Vec<IssuedToken>) -> TokensByService {
    let one = |issued: IssuedToken| {
        let service = ServiceName::parse(&issued.service).ok()?;
        Some((service, AttachedToken::new(&issued.token, issued.expires_at_ms)?))
    };
    issued.into_iter().filter_map(one).collect()
}

fn message(message: sidecar_message::Message) -> SidecarMessage {
    SidecarMessage { message: Some(message) }
}

fn name(order: &sidecar_order::Order) -> &'static str {
    use sidecar_order::Order;
    match order {
        Order::Configure(_) => "configure",
        Order::Identity(_) => "identity",
        Order::Bundle(_) => "bundle",
        Order::ViewJson(_) => "view_json",
        Order::Revision(_) => "revision",
        Order::Endpoints(_) => "endpoints",
        Order::Fresh(_) => "fresh",
        Order::RecordsQuery(_) => "records_query",
        Order::Drain(_) => "drain",
        Order::MetricsQuery(_) => "metrics_query",
        Order::Signals(_) => "signals",
        Order::Probe(_) => "probe",
        Order::Tokens(_) => "tokens",
    }
}
