//! What the agent told this proxy, as its workers see it. The link writes, workers read; every write that workers must act
//! on is an [`Order`] to each of them, and the write is done only when each has obeyed: an acknowledged view is a view
//! that every worker enforces and by which every open exchange has been judged again.
//!
//! Judges nothing, forwards nothing.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption};
use countersign_api::svid::{Bundle, TlsIdentity, X509Svid};
use countersign_core::{
    change::Revision,
    identity::{InstanceId, ServiceName},
    policy::{Library, PolicyError},
    signal::{SignalSeq, Signals, statement::Subject},
    token::{Authorities, Thumbprint},
    view::View,
};
use http::HeaderValue;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    contact::{Edges, Keeper},
    counts::Counts,
    decided::TraceId,
    families::Families,
    live::LiveExchange,
    trace::Tracing,
    view::Compiled,
};

/// What is fixed for the life of one sidecar.
pub struct Setup {
    /// The instance it stands in front of.
    pub instance: InstanceId,
    /// Where the workload listens; `None` when it does not.
    pub app: Option<App>,
    /// Threads.
    pub worker_count: usize,
    /// Which exchanges are told as spans, and to whom; `None` when nobody asked for any.
    pub tracing: Option<Tracing>,
}

/// How to reach the workload.
pub struct App {
    /// Its address, inside its own namespace when it is isolated.
    pub address: SocketAddr,
    /// Makes a TCP socket, not yet connected, in the workload's namespace.
    pub socket: Box<dyn Fn() -> io::Result<socket2::Socket> + Send + Sync>,
}

/// How long a request may wait for the first access token for its service.
const FIRST_TOKEN_WITHIN: Duration = Duration::from_secs(1);

/// What a listener is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Door {
    /// Mutual TLS from other sidecars.
    Inbound,
    /// The workload's HTTP forward proxy.
    ForwardProxy,
    /// A loopback address that means one upstream service: everything that arrives is for it.
    Upstream(ServiceName),
}

/// What every worker must do before the giver goes on.
pub(crate) enum Order {
    /// Enforce this view, and judge what is open by it.
    Apply(Arc<Compiled>, oneshot::Sender<()>),
    /// Use the new identity for new connections and let the old ones drain.
    Rotate,
    /// As [`Order::Rotate`], and end what rests on an authority that is trusted no longer.
    Trust,
    /// End what rests on what is revoked, and judge again what rests on what is said of its caller.
    Heed(oneshot::Sender<()>),
    /// Accept on this listener as well.
    Open(Door, Arc<TcpListener>),
    /// Accept there no more.
    Close(Door),
    /// Say what is open, at most so many.
    Show(usize, oneshot::Sender<Vec<LiveExchange>>),
    /// Accept nothing new, finish what is open, then stop; cut what is still open at the deadline.
    Drain(Instant, oneshot::Sender<()>),
}

/// What the link writes and the workers read.
pub struct Shared {
    /// Fixed at the start.
    pub setup: Setup,
    /// One per worker.
    pub counts: Vec<Arc<Counts>>,
    pub(crate) view: ArcSwapOption<Compiled>,
    pub(crate) endpoints: ArcSwap<EndpointsByService>,
    identity: Mutex<Identity>,
    signals: ArcSwap<Signals>,
    own: ArcSwap<Vec<Subject>>, // what signals can be about, of what this sidecar is
    authorities: ArcSwap<Authorities>,
    tokens: ArcSwap<Attached>,
    token_news: watch::Sender<()>,
    library: Mutex<Library>, // one view is compiled at a time
    fresh_at_ms: AtomicU64,  // on `began`'s clock, plus one; 0: never
    began: Instant,
    draining: AtomicBool,
    pub(crate) edges: Edges,
    pub(crate) families: Families,
    probe: Probe,
    app_ready: AtomicBool,
    app_doubt: Notify,
    workers: Mutex<Vec<mpsc::UnboundedSender<Order>>>,
}

/// The exchange that this sidecar makes with itself: one at a time.
#[derive(Default)]
struct Probe {
    is_expected: AtomicBool, // for exchanges that are none, which are all but one a minute
    expected: Mutex<Option<TraceId>>,
    last: Mutex<Option<TraceId>>,
}

/// One instance of a service, as discovery tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Which instance.
    pub instance: InstanceId,
    /// Its sidecar's inbound listener.
    pub address: SocketAddr,
    /// Whether its workload accepts connections.
    pub ready: bool,
}

/// Who this sidecar is. Both halves must be there before anything is accepted or reached.
#[derive(Default)]
enum Identity {
    #[default]
    Unknown,
    Svid(X509Svid),
    Bundle(Bundle),
    Known(Arc<TlsIdentity>),
}

/// The access tokens of the two certificates that connections may have been opened with.
#[derive(Default)]
struct Attached {
    now: Arc<OfCertificate>,
    before: Arc<OfCertificate>,
}

struct OfCertificate {
    certificate: Thumbprint,
    tokens: TokensByService,
}

/// An access token as a header, ready to be sent.
#[derive(Debug, Clone)]
pub struct AttachedToken {
    /// Compact JWS. Not marked as sensitive: HPACK would then send it in full with each request, where an index does, and nobody
    /// guesses a signature piece by piece (RFC 7541, 7.1.3).
    value: HeaderValue,
    expires_at_ms: u64,
}

/// The access token for each service that demands one.
pub type TokensByService = FxHashMap<ServiceName, AttachedToken>;

impl AttachedToken {
    /// Of a token; `None` when it cannot stand in a header.
    pub fn new(token: &str, expires_at_ms: u64) -> Option<Self> {
        Some(Self { value: HeaderValue::from_str(token).ok()?, expires_at_ms })
    }
}

impl Default for OfCertificate {
    fn default() -> Self {
        Self { certificate: Thumbprint([0; 32]), tokens: TokensByService::default() }
    }
}

fn subjects(instance: &InstanceId, host: Option<&ServiceName>) -> Vec<Subject> {
    let (workload, instance) = (Subject::Workload(instance.service()), Subject::Instance(instance.clone()));
    [workload, instance].into_iter().chain(host.cloned().map(Subject::Host)).collect()
}

/// Where each service runs.
pub type EndpointsByService = BTreeMap<ServiceName, Arc<[Endpoint]>>;

impl Shared {
    /// Nothing is known yet: no view, no identity, no endpoints.
    pub fn new(setup: Setup) -> Self {
        let own = ArcSwap::from_pointee(subjects(&setup.instance, None));
        let counts = (0..setup.worker_count).map(|_| Arc::default()).collect();
        Self {
            setup,
            counts,
            view: ArcSwapOption::empty(),
            endpoints: ArcSwap::default(),
            identity: Mutex::default(),
            signals: ArcSwap::default(),
            own,
            authorities: ArcSwap::default(),
            tokens: ArcSwap::default(),
            token_news: watch::Sender::new(()),
            library: Mutex::default(),
            fresh_at_ms: AtomicU64::new(0),
            began: Instant::now(),
            draining: AtomicBool::new(false),
            edges: Edges::default(),
            families: Families::default(),
            probe: Probe::default(),
            app_ready: AtomicBool::new(false),
            app_doubt: Notify::new(),
            workers: Mutex::default(),
        }
    }

    /// Compiles `view` and returns once every worker enforces it on everything new and everything open. A view that does
    /// not compile changes nothing: the last good one stays in force.
    pub async fn apply(&self, view: View) -> Result<Revision, Vec<PolicyError>> {
        let compiled = Arc::new(Compiled::new(view, self.view.load().as_deref(), &mut self.library.lock())?);
        let revision = compiled.revision();
        self.view.store(Some(compiled.clone()));
        self.every_worker(|done| Order::Apply(compiled.clone(), done)).await;
        Ok(revision)
    }

    /// The content of the view in force also holds at `revision`.
    pub fn set_revision(&self, revision: Revision) {
        if let Some(view) = &*self.view.load() {
            view.set_revision(revision);
        }
    }

    /// The revision that is enforced.
    pub fn revision(&self) -> Option<Revision> {
        self.view.load().as_ref().map(|view| view.revision())
    }

    /// The view in force.
    pub fn view(&self) -> Option<Arc<Compiled>> {
        self.view.load_full()
    }

    /// Takes a new SVID into use: new connections show it, old ones finish what they carry and close. `tokens` are bound to it.
    pub fn set_svid(&self, svid: X509Svid, tokens: TokensByService) {
        let mut identity = self.identity.lock();
        self.own.store(Arc::new(subjects(&self.setup.instance, svid.host())));
        // First: no connection is opened with it whose requests would lack them.
        self.set_tokens(Thumbprint(svid.leaf_sha256().0), tokens);
        *identity = match std::mem::take(&mut *identity) {
            Identity::Unknown | Identity::Svid(_) => Identity::Svid(svid),
            Identity::Bundle(bundle) => self.known(svid, bundle),
            Identity::Known(known) => {
                known.renew(svid);
                Identity::Known(known)
            }
        };
        drop(identity);
        self.order(|| Order::Rotate);
    }

    /// Takes a new bundle into use: new connections are verified with it, and open ones that it does not verify are cut.
    pub fn set_bundle(&self, bundle: Bundle) {
        let mut identity = self.identity.lock();
        self.authorities.store(Arc::new(bundle.token_authorities().ready()));
        *identity = match std::mem::take(&mut *identity) {
            Identity::Unknown | Identity::Bundle(_) => Identity::Bundle(bundle),
            Identity::Svid(svid) => self.known(svid, bundle),
            Identity::Known(known) => {
                known.trust(bundle);
                Identity::Known(known)
            }
        };
        drop(identity);
        self.order(|| Order::Trust);
    }

    /// Takes access tokens into use for requests on connections that were opened with `certificate`. Those of the certificate before it
    /// go on for as long as its connections do.
    pub fn set_tokens(&self, certificate: Thumbprint, tokens: TokensByService) {
        self.tokens.rcu(|attached| {
            let before = match attached.now.certificate == certificate {
                true => attached.before.clone(),
                false => attached.now.clone(),
            };
            Attached { now: Arc::new(OfCertificate { certificate, tokens: tokens.clone() }), before }
        });
        self.token_news.send_replace(());
    }

    /// The access token for a request to `service` on a connection that was opened with `certificate`.
    pub(crate) fn token(&self, certificate: &Thumbprint, service: &ServiceName) -> Option<HeaderValue> {
        let attached = self.tokens.load();
        let of = [&attached.now, &attached.before].into_iter().find(|of| of.certificate == *certificate)?;
        of.tokens.get(service).map(|token| token.value.clone())
    }

    /// Waits for the first access token for `service`: of a mesh that has just started, or an upstream that was just declared, it is on
    /// its way. One that expired is not waited for: it should have been renewed long before. Whether there is one.
    pub(crate) async fn first_token(&self, service: &ServiceName, now_ms: u64) -> bool {
        let mut news = self.token_news.subscribe();
        let comes = async {
            while !self.tokens.load().now.tokens.contains_key(service) {
                // It cannot fail: the sender lies in `self`.
                let _ = news.changed().await;
            }
        };
        let _ = tokio::time::timeout(FIRST_TOKEN_WITHIN, comes).await;
        self.holds_token(service, now_ms)
    }

    /// Whether there is an access token for `service` that has not expired.
    pub(crate) fn holds_token(&self, service: &ServiceName, now_ms: u64) -> bool {
        self.tokens.load().now.tokens.get(service).is_some_and(|token| token.expires_at_ms > now_ms)
    }

    /// Whose access tokens are believed.
    pub(crate) fn token_authorities(&self) -> Arc<Authorities> {
        self.authorities.load_full()
    }

    /// Believes no certificate any more that `signals` say is revoked: no handshake and no new request rests on one from here on, and each
    /// is judged by what they say of its caller.
    pub fn heed(&self, signals: Signals) {
        // With the lock, so that an identity that becomes known meanwhile is told as well.
        let identity = self.identity.lock();
        self.signals.store(Arc::new(signals.clone()));
        if let Identity::Known(known) = &*identity {
            known.heed(signals);
        }
    }

    /// Returns once every worker has ended what rests on an SVID that is revoked, and judged again what rests on what is said of its caller;
    /// with the number of the last signal that is heeded so.
    ///
    /// INVARIANT (heeded-is-cut): a signal is acknowledged only when no handshake, no new request and nothing open rests any more
    /// on what it revoked, or on what was said before it.
    pub async fn end_revoked(&self) -> SignalSeq {
        let sequence = self.signals.load().sequence();
        self.every_worker(Order::Heed).await;
        sequence
    }

    /// Whether signals say that this sidecar's own workload, instance or host is contained.
    pub(crate) fn is_contained(&self, now_ms: u64) -> bool {
        self.signals.load().is_contained(self.own.load().iter(), now_ms)
    }

    /// All signals that hold.
    pub(crate) fn signals(&self) -> arc_swap::Guard<Arc<Signals>> {
        self.signals.load()
    }

    fn known(&self, svid: X509Svid, bundle: Bundle) -> Identity {
        let known = TlsIdentity::new(svid, bundle);
        known.heed(Signals::clone(&self.signals.load()));
        Identity::Known(known)
    }

    /// Who this sidecar is, once it knows.
    pub fn identity(&self) -> Option<Arc<TlsIdentity>> {
        match &*self.identity.lock() {
            Identity::Known(known) => Some(known.clone()),
            _ => None,
        }
    }

    /// Takes in where services run. `full`: those not named run nowhere.
    pub fn set_endpoints(&self, services: impl IntoIterator<Item = (ServiceName, Vec<Endpoint>)>, full: bool) {
        let mut next = if full { BTreeMap::new() } else { EndpointsByService::clone(&self.endpoints.load()) };
        next.extend(services.into_iter().map(|(service, endpoints)| (service, endpoints.into())));
        self.endpoints.store(Arc::new(next));
    }

    /// The agent was in step with a control plane `age` ago.
    pub fn set_fresh(&self, age: Duration) {
        let at = self.began.elapsed().saturating_sub(age);
        self.fresh_at_ms.fetch_max(at.as_millis() as u64 + 1, Ordering::Relaxed);
    }

    /// How long ago the agent was last in step with a control plane; `None`: never since this proxy began.
    pub fn age(&self) -> Option<Duration> {
        let at = self.fresh_at_ms.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.began.elapsed().saturating_sub(Duration::from_millis(at)))
    }

    /// What the age of the view is held against: until the first word of freshness, the time since this proxy began.
    pub(crate) fn staleness(&self) -> Duration {
        self.age().unwrap_or_else(|| self.began.elapsed())
    }

    /// How long this proxy runs.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    /// Knows the edges again that a sidecar before this one kept in `dir`.
    pub fn know_edges(&self, dir: &Path) -> io::Result<()> {
        Keeper::load(dir, &self.edges)
    }

    /// From now on an exchange of this sidecar with itself that names `nonce` is a probe, once. An earlier nonce is void.
    pub(crate) fn expect_probe(&self, nonce: TraceId) {
        *self.probe.expected.lock() = Some(nonce);
        self.probe.is_expected.store(true, Ordering::Release);
    }

    /// Whether any probe is expected.
    pub(crate) fn expects_probe(&self) -> bool {
        self.probe.is_expected.load(Ordering::Acquire)
    }

    /// Whether `nonce` is the one expected: it is used up.
    pub(crate) fn spend_probe(&self, nonce: TraceId) -> bool {
        let spent = self.probe.expected.lock().take_if(|expected| *expected == nonce).is_some();
        if spent {
            self.probe.is_expected.store(false, Ordering::Release);
        }
        spent
    }

    /// The exchange of `nonce` is over, and counted.
    pub(crate) fn probed(&self, nonce: TraceId) {
        *self.probe.last.lock() = Some(nonce);
    }

    /// Of the last probe that was counted.
    pub(crate) fn last_probe(&self) -> Option<TraceId> {
        *self.probe.last.lock()
    }

    /// Takes note of whether the workload accepts connections.
    pub(crate) fn set_app_ready(&self, ready: bool) {
        self.app_ready.store(ready, Ordering::Relaxed);
    }

    /// Whether the workload accepted connections when it was last asked.
    pub fn app_is_ready(&self) -> bool {
        self.app_ready.load(Ordering::Relaxed)
    }

    /// The workload could not be reached: whoever watches it should look.
    pub(crate) fn doubt_app(&self) {
        self.app_doubt.notify_one();
    }

    /// Waits until the workload could not be reached.
    pub(crate) async fn app_doubted(&self) {
        self.app_doubt.notified().await;
    }

    /// Accepts on `listener` as well, in every worker.
    pub fn open(&self, door: Door, listener: TcpListener) {
        let listener = Arc::new(listener);
        self.order(|| Order::Open(door.clone(), listener.clone()));
    }

    /// Accepts at `door` no more; what came in by it goes on.
    pub fn close(&self, door: &Door) {
        self.order(|| Order::Close(door.clone()));
    }

    /// Finishes what is open within `within`, then returns; what is still open then is cut.
    pub async fn drain(&self, within: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + within;
        self.every_worker(|done| Order::Drain(deadline, done)).await;
    }

    /// Whether [`Self::drain`] has begun.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// At most `max` of the exchanges that are open, the oldest first. A worker that does not answer in time is left out.
    pub(crate) async fn live(&self, max: usize) -> Vec<LiveExchange> {
        const ANSWER_WITHIN: Duration = Duration::from_secs(1);
        let mut awaited = Vec::new();
        self.workers.lock().retain(|worker| {
            let (answer, answered) = oneshot::channel();
            awaited.push(answered);
            worker.send(Order::Show(max, answer)).is_ok()
        });
        let deadline = tokio::time::Instant::now() + ANSWER_WITHIN;
        let mut live = Vec::new();
        for answered in awaited {
            if let Ok(Ok(shown)) = tokio::time::timeout_at(deadline, answered).await {
                live.extend(shown);
            }
        }
        live.sort_by_key(|exchange| std::cmp::Reverse(exchange.open_ms));
        live.truncate(max);
        live
    }

    pub(crate) fn join(&self) -> mpsc::UnboundedReceiver<Order> {
        let (sender, receiver) = mpsc::unbounded_channel(); // only the link writes, one order per message of the agent
        self.workers.lock().push(sender);
        receiver
    }

    pub(crate) fn order(&self, order: impl Fn() -> Order) {
        self.workers.lock().retain(|worker| worker.send(order()).is_ok());
    }

    async fn every_worker(&self, order: impl Fn(oneshot::Sender<()>) -> Order) {
        let mut awaited = Vec::new();
        self.workers.lock().retain(|worker| {
            let (done, obeyed) = oneshot::channel();
            awaited.push(obeyed);
            worker.send(order(done)).is_ok()
        });
        for obeyed in awaited {
            let _ = obeyed.await; // a worker that is gone enforces nothing any more
        }
    }
}
