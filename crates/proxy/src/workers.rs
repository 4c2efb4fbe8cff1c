//! The threads. Each runs one single-threaded runtime and obeys the same orders in the same order; what it holds is its own.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use countersign_api::svid::ClientCertificate;
use countersign_core::{
    identity::{ServiceName, SpiffeId},
    path::Authority,
    policy::{Decision, Judge, Query},
    record::push_way,
    service::Protocol,
};
use http::Request;
use rustc_hash::{FxHashMap, FxHashSet};
use rustls::{ClientConfig, ServerConfig};
use tokio::{
    runtime::LocalRuntime,
    sync::{Notify, mpsc, oneshot, watch},
    task::AbortHandle,
};

use crate::{
    accept::accept,
    answer::Said,
    balance::Balance,
    contact::{EDGES_MAX, Edge},
    counts::Counts,
    decided::Recorder,
    live::{Cut, Live},
    pool::AppPool,
    shared::{Door, Order, Shared},
    view::Compiled,
};

/// Time for a cut to reach both ends.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(200);
/// The longest time until the moment is looked at again: the wall clock may be set meanwhile.
const DUE_AFTER_MAX: Duration = Duration::from_secs(60);
/// The only protocol of the mesh hop.
pub(crate) const ALPN: &[&[u8]] = &[b"h2"];

/// What one thread holds. Everything in it stays on its thread.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) recorder: Box<dyn Recorder>,
    pub(crate) live: Live,
    pub(crate) balance: Balance,
    pub(crate) app: AppPool,
    pub(crate) drain: Drain,
    due: Due,
    pub(crate) rotation: watch::Sender<()>,
    trust: watch::Sender<()>,
    signals: watch::Sender<()>,
    pub(crate) said: Said,
    in_force: RefCell<Option<InForce>>,
    server_config: RefCell<Option<Arc<ServerConfig>>>,
    client_configs: RefCell<FxHashMap<ServiceName, Arc<ClientConfig>>>,
    host_names: RefCell<FxHashMap<ServiceName, Arc<str>>>,
    edges: RefCell<FxHashSet<u64>>, // those this worker knows to be known
    way: RefCell<String>,           // of the exchange that is looked at
    doors: RefCell<Vec<(Door, AbortHandle)>>,
}

/// The view in force and what this worker remembers of deciding by it.
struct InForce {
    view: Arc<Compiled>,
    judge: Judge,
}

/// One connection's ear for what makes it look again at who is at its other end.
pub(crate) struct Doubts {
    /// Other authorities are trusted.
    pub(crate) trust: watch::Receiver<()>,
    /// Something was revoked.
    pub(crate) signals: watch::Receiver<()>,
}

/// The next moment at which something that is open may be judged otherwise although nothing came.
#[derive(Default)]
struct Due {
    at: Cell<Option<tokio::time::Instant>>,
    sooner: Notify,
}

/// Tells every connection when to finish.
pub(crate) struct Drain(watch::Sender<bool>);

/// One connection's ear for it.
pub(crate) struct Draining(watch::Receiver<bool>);

/// Starts the workers, one per recorder; they stop when [`Shared::drain`] is done. Nothing is accepted until
/// [`Shared::open`] gives them a listener.
pub fn start(
    shared: &Arc<Shared>,
    recorders: Vec<Box<dyn Recorder + Send>>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let numbered = recorders.into_iter().enumerate();
    numbered
        .map(|(number, recorder)| {
            let (shared, orders) = (shared.clone(), shared.join());
            let runtime = LocalRuntime::new; // made on its thread: it cannot move
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || match runtime() {
                Ok(runtime) => runtime.block_on(run(shared, number, recorder, orders)),
                Err(error) => tracing::error!(%error, "could not start a worker"),
            })
        })
        .collect()
}

async fn run(
    shared: Arc<Shared>,
    number: usize,
    recorder: Box<dyn Recorder>,
    mut orders: mpsc::UnboundedReceiver<Order>,
) {
    let worker = Rc::new(Worker::new(shared, number, recorder));
    worker.enforce(worker.shared.view());
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let order = tokio::select! {
            order = orders.recv() => order,
            now = tick.tick() => {
                worker.tick(now.into());
                continue;
            }
            () = worker.due.come() => {
                worker.live.rejudge_by_time().await;
                continue;
            }
        };
        match order {
            Some(Order::Apply(view, done)) => {
                worker.enforce(Some(view.clone()));
                worker.live.rejudge(&view).await;
                let _ = done.send(()); // whoever asked may be gone
            }
            Some(Order::Rotate) => worker.rotate(),
            Some(Order::Trust) => {
                worker.rotate();
                worker.trust.send_replace(());
            }
            Some(Order::Heed(done)) => {
                worker.live.heed();
                worker.signals.send_replace(());
                let _ = done.send(()); // whoever asked may be gone
            }
            Some(Order::Open(door, listener)) => {
                let accepting = tokio::task::spawn_local(accept(worker.clone(), door.clone(), listener));
                worker.doors.borrow_mut().push((door, accepting.abort_handle()));
            }
            Some(Order::Close(door)) => worker.close(&door),
            Some(Order::Show(max, answer)) => _ = answer.send(worker.live.show(max)), // whoever asked may be gone
            Some(Order::Drain(deadline, done)) => return worker.drained(deadline, done).await,
            None => return, // the proxy is gone
        }
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, number: usize, recorder: Box<dyn Recorder>) -> Self {
        Self {
            counts: shared.counts[number].clone(),
            shared,
            recorder,
            live: Live::default(),
            balance: Balance::default(),
            app: AppPool::default(),
            drain: Drain(watch::Sender::new(false)),
            due: Due::default(),
            rotation: watch::Sender::new(()),
            trust: watch::Sender::new(()),
            signals: watch::Sender::new(()),
            said: Said::default(),
            in_force: RefCell::default(),
            server_config: RefCell::default(),
            client_configs: RefCell::default(),
            host_names: RefCell::default(),
            edges: RefCell::default(),
            way: RefCell::default(),
            doors: RefCell::default(),
        }
    }

    fn enforce(&self, view: Option<Arc<Compiled>>) {
        let in_force = view.map(|view| InForce { judge: Judge::new(view.law.clone()), view });
        *self.in_force.borrow_mut() = in_force;
    }

    /// Hears from now on what makes a connection look again at who is at its other end.
    pub(crate) fn doubts(&self) -> Doubts {
        Doubts { trust: self.trust.subscribe(), signals: self.signals.subscribe() }
    }

    /// The view in force.
    pub(crate) fn view(&self) -> Option<Arc<Compiled>> {
        self.in_force.borrow().as_ref().map(|in_force| in_force.view.clone())
    }

    /// Asks the law of `view`, remembering what can be remembered when it is the one in force.
    pub(crate) fn decide(&self, view: &Arc<Compiled>, query: &Query<'_>) -> Decision {
        match &mut *self.in_force.borrow_mut() {
            Some(in_force) if in_force.view.is_same(view) => in_force.judge.decide(query),
            _ => view.law.decide(query),
        }
    }

    /// What is open is judged again at this moment, in milliseconds since 1970, if it rests on what may have changed by then.
    pub(crate) fn judge_again_at(&self, at_ms: Option<u64>) {
        if let Some(at_ms) = at_ms {
            let after = Duration::from_millis(at_ms.saturating_sub(self.now_ms()));
            self.due.earliest(tokio::time::Instant::now() + after.min(DUE_AFTER_MAX));
        }
    }

    /// Milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
    }

    /// Nanoseconds on a steady clock, the same for every worker.
    pub(crate) fn steady_ns(&self) -> u64 {
        self.shared.uptime().as_nanos() as u64
    }

    /// The edge of an exchange of `peer`, unless this worker knows that it is known.
    pub(crate) fn unknown_edge(
        &self,
        peer: &SpiffeId,
        operation: Option<&str>,
        method: &str,
        path: &str,
    ) -> Option<Edge> {
        let way = &mut *self.way.borrow_mut();
        way.clear();
        push_way(way, operation, method, path);
        let edge = Edge::new(peer.as_str(), way);
        (!self.edges.borrow().contains(&edge.number())).then_some(edge)
    }

    /// Takes note of an edge; whether no worker had seen it before.
    pub(crate) fn note_edge(&self, edge: Edge) -> bool {
        let mut edges = self.edges.borrow_mut();
        if edges.len() < EDGES_MAX {
            edges.insert(edge.number());
        }
        self.shared.edges.note(edge)
    }

    /// `<service>.mesh`, made once.
    pub(crate) fn host_name(&self, service: &ServiceName) -> Arc<str> {
        if let Some(name) = self.host_names.borrow().get(service) {
            return name.clone();
        }
        let name: Arc<str> = format!("{service}.mesh").into();
        self.host_names.borrow_mut().insert(service.clone(), name.clone());
        name
    }

    pub(crate) fn server_config(&self) -> Option<Arc<ServerConfig>> {
        let mut config = self.server_config.borrow_mut();
        if config.is_none() {
            *config = self.shared.identity().map(|id| id.server_config(ClientCertificate::Required, ALPN));
        }
        config.clone()
    }

    pub(crate) fn client_config(&self, service: &ServiceName) -> Option<Arc<ClientConfig>> {
        if let Some(config) = self.client_configs.borrow().get(service) {
            return Some(config.clone());
        }
        let wanted = self.view()?.view.trust_domain.workload(service);
        let config = self.shared.identity()?.client_config(wanted, ALPN);
        self.client_configs.borrow_mut().insert(service.clone(), config.clone());
        Some(config)
    }

    /// The service that a CONNECT request names, when it speaks HTTP.
    pub(crate) fn http_service_of<B>(&self, request: &Request<B>, door: &Door) -> Option<ServiceName> {
        let service = match door {
            Door::Upstream(service) => service.clone(),
            Door::ForwardProxy | Door::Inbound => {
                Authority::parse(request.uri().authority()?.as_str()).ok()?.service()?
            }
        };
        let protocol = self.view()?.visible(&service)?.protocol;
        (protocol != Protocol::Tcp).then_some(service)
    }

    fn tick(&self, now: Instant) {
        self.live.record_open(now);
        let most = self.view().and_then(|view| view.view.spec.as_ref().map(|spec| spec.max_staleness_seconds));
        // What can no longer be judged again does not go on.
        if most.is_some_and(|most| self.shared.staleness().as_secs() >= u64::from(most)) {
            self.live.cut_all(Cut::Stale);
        }
    }

    fn rotate(&self) {
        self.balance.rotate();
        self.client_configs.borrow_mut().clear();
        self.server_config.borrow_mut().take();
        self.rotation.send_replace(());
    }

    fn close(&self, door: &Door) {
        self.doors.borrow_mut().retain(|(open, accepting)| {
            let closes = open == door;
            if closes {
                accepting.abort();
            }
            !closes
        });
    }

    /// Accepts nothing new, lets what is open end by itself until `deadline`, then cuts it.
    async fn drained(&self, deadline: Instant, done: oneshot::Sender<()>) {
        for (_, accepting) in self.doors.take() {
            accepting.abort();
        }
        self.drain.0.send_replace(true);
        while self.is_busy() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if self.is_busy() {
            self.live.cut_all(Cut::Closing);
            tokio::time::sleep(LAST_WORDS).await;
        }
        let _ = done.send(());
    }

    fn is_busy(&self) -> bool {
        self.counts.inbound.open.get() + self.counts.outbound.open.get() + self.counts.connections_open.get() > 0
    }
}

impl Due {
    fn earliest(&self, at: tokio::time::Instant) {
        if self.at.get().is_none_or(|known| at < known) {
            self.at.set(Some(at));
            self.sooner.notify_one();
        }
    }

    /// Returns when the moment has come, which is none any more then.
    async fn come(&self) {
        loop {
            match self.at.get() {
                None => self.sooner.notified().await,
                Some(at) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {
                        self.at.set(None);
                        return;
                    }
                    () = self.sooner.notified() => {}
                },
            }
        }
    }
}

impl Drain {
    pub(crate) fn subscribe(&self) -> Draining {
        Draining(self.0.subscribe())
    }
}

impl Draining {
    /// Returns when draining begins.
    pub(crate) async fn begun(&mut self) {
        if self.0.wait_for(|draining| *draining).await.is_err() {
            std::future::pending::<()>().await; // the worker is gone and takes every connection with it
        }
    }
}
