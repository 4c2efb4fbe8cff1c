//! Which instance of a service takes a request: of two picked by chance the one with less to do, leaving out those that
//! keep failing. Each worker sees its own load.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_core::identity::{InstanceId, ServiceName};
use http::uri::Authority;
use rustc_hash::FxHashMap;

use crate::{
    pool::Http2Pool,
    shared::{Endpoint, EndpointsByService},
};

/// Failures in a row after which an instance is left out.
const FAILURES_MAX: u32 = 5;
/// How long the first time; doubled each further time, up to [`EJECTED_MAX`].
const EJECTED_MIN: Duration = Duration::from_secs(5);
const EJECTED_MAX: Duration = Duration::from_secs(60);
/// Retries in hand when nothing was saved up, in hundredths of a retry.
const BUDGET_START: u32 = 1_000;
const BUDGET_MAX: u32 = 10_000;

/// An instance of a service, as one worker uses it.
pub(crate) struct Instance {
    pub(crate) id: InstanceId,
    pub(crate) service: ServiceName,
    pub(crate) address: SocketAddr,
    pub(crate) pool: Http2Pool,
    open: Rc<Cell<u32>>,
    failures: Cell<u32>,
    ejections: Cell<u32>,
    ejected_until: Cell<Option<Instant>>,
}

/// A request on its way to an instance; it weighs on it until dropped.
pub(crate) struct Load(Rc<Cell<u32>>);

/// A service, as one worker uses it.
pub(crate) struct Upstream {
    pub(crate) authority: Authority,
    instances: RefCell<Vec<Rc<Instance>>>,
    budget: Cell<u32>, // hundredths of a retry
}

/// All services this worker has reached.
#[derive(Default)]
pub(crate) struct Balance {
    seen: RefCell<Option<Arc<EndpointsByService>>>,
    upstreams: RefCell<FxHashMap<ServiceName, Rc<Upstream>>>,
}

impl Balance {
    /// The service, with the instances that `endpoints` gives it.
    pub(crate) fn upstream(&self, service: &ServiceName, endpoints: &Arc<EndpointsByService>) -> Rc<Upstream> {
        if !self.seen.borrow().as_ref().is_some_and(|seen| Arc::ptr_eq(seen, endpoints)) {
            for (service, upstream) in self.upstreams.borrow().iter() {
                upstream.update(service, endpoints.get(service).map_or(&[], |e| e));
            }
            *self.seen.borrow_mut() = Some(endpoints.clone());
        }
        if let Some(upstream) = self.upstreams.borrow().get(service) {
            return upstream.clone();
        }
        let upstream = Rc::new(Upstream::new(service));
        upstream.update(service, endpoints.get(service).map_or(&[], |e| e));
        self.upstreams.borrow_mut().insert(service.clone(), upstream.clone());
        upstream
    }

    /// New connections from now on, everywhere.
    pub(crate) fn rotate(&self) {
        for upstream in self.upstreams.borrow().values() {
            for instance in upstream.instances.borrow().iter() {
                instance.pool.rotate();
            }
        }
    }
}

impl Upstream {
    fn new(service: &ServiceName) -> Self {
        let authority = format!("{service}.mesh").parse().expect("INVARIANT: a service's name is a DNS label");
        Self { authority, instances: RefCell::default(), budget: Cell::new(BUDGET_START) }
    }

    fn update(&self, service: &ServiceName, endpoints: &[Endpoint]) {
        let mut instances = self.instances.borrow_mut();
        let next = endpoints.iter().filter(|endpoint| endpoint.ready).map(|endpoint| {
            let same = |known: &&Rc<Instance>| known.id == endpoint.instance && known.address == endpoint.address;
            instances.iter().find(same).cloned().unwrap_or_else(|| Rc::new(Instance::new(service, endpoint)))
        });
        *instances = next.collect();
    }

    /// Of two by chance the one with less to do, leaving out `tried` as long as there is another.
    pub(crate) fn pick(&self, tried: &[InstanceId], now: Instant) -> Option<Rc<Instance>> {
        let instances = self.instances.borrow();
        if let [only] = &instances[..] {
            return Some(only.clone());
        }
        let usable = |strict: bool| {
            let usable = move |i: &&Rc<Instance>| !strict || (!i.is_ejected(now) && !tried.contains(&i.id));
            instances.iter().filter(usable)
        };
        // When most of a service seems ill, the ill view may be ours: then use all of it.
        let strict = usable(true).count() * 2 >= instances.len() || (!tried.is_empty() && usable(true).count() > 0);
        let count = usable(strict).count();
        let one = usable(strict).nth(fastrand::usize(..count.max(1)))?;
        let other = usable(strict).nth(fastrand::usize(..count.max(1)))?;
        Some(if other.open.get() < one.open.get() { other } else { one }.clone())
    }

    /// A request pays `percent` of a retry into the budget.
    pub(crate) fn deposit(&self, percent: u32) {
        self.budget.set((self.budget.get() + percent.min(100)).min(BUDGET_MAX));
    }

    /// Takes one retry out of the budget, if it is there.
    pub(crate) fn withdraw(&self) -> bool {
        let left = self.budget.get().checked_sub(100);
        left.inspect(|left| self.budget.set(*left)).is_some()
    }
}

impl Instance {
    fn new(service: &ServiceName, endpoint: &Endpoint) -> Self {
        Self {
            id: endpoint.instance.clone(),
            service: service.clone(),
            address: endpoint.address,
            pool: Http2Pool::default(),
            open: Rc::default(),
            failures: Cell::new(0),
            ejections: Cell::new(0),
            ejected_until: Cell::new(None),
        }
    }

    pub(crate) fn load(&self) -> Load {
        self.open.set(self.open.get() + 1);
        Load(self.open.clone())
    }

    pub(crate) fn succeeded(&self) {
        self.failures.set(0);
        self.ejections.set(0);
    }

    /// Notes a failure; whether it made the instance one to leave out.
    pub(crate) fn failed(&self, now: Instant) -> bool {
        self.failures.set(self.failures.get() + 1);
        if self.failures.get() < FAILURES_MAX || self.is_ejected(now) {
            return false;
        }
        let span = EJECTED_MIN * 2u32.pow(self.ejections.get().min(4));
        self.ejected_until.set(Some(now + span.min(EJECTED_MAX)));
        self.ejections.set(self.ejections.get() + 1);
        self.failures.set(0);
        true
    }

    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.get().is_some_and(|until| now < until)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(count: usize) -> Upstream {
        let service = ServiceName::parse("catalog").unwrap();
        let endpoints: Vec<Endpoint> = (0..count)
            .map(|n| Endpoint {
                instance: InstanceId::new(&service, &n.to_string()),
                address: ([127, 0, 0, 1], 1000 + n as u16).into(),
                ready: true,
            })
            .collect();
        let upstream = Upstream::new(&service);
        upstream.update(&service, &endpoints);
        upstream
    }

    #[test]
    fn an_instance_that_keeps_failing_is_left_out_and_comes_back() {
        let (upstream, now) = (upstream(3), Instant::now());
        let ill = upstream.instances.borrow()[0].clone();
        assert_eq!((0..5).map(|_| ill.failed(now)).collect::<Vec<_>>(), [false, false, false, false, true]);
        let picks_ill = |at| (0..200).any(|_| upstream.pick(&[], at).unwrap().id == ill.id);
        assert!(!picks_ill(now));
        assert!(picks_ill(now + EJECTED_MIN));
    }

    #[test]
    fn when_most_of_a_service_fails_all_of_it_is_used() {
        let (upstream, now) = (upstream(3), Instant::now());
        for n in [0, 1] {
            let ill = upstream.instances.borrow()[n].clone();
            (0..5).for_each(|_| _ = ill.failed(now));
        }
        let picked: std::collections::BTreeSet<_> =
            (0..200).map(|_| upstream.pick(&[], now).unwrap().address).collect();
        assert_eq!(picked.len(), 3);
    }

    #[test]
    fn the_busier_of_two_is_passed_over() {
        let upstream = upstream(2);
        let busy = upstream.instances.borrow()[0].clone();
        let _load: Vec<Load> = (0..10).map(|_| busy.load()).collect();
        let idle = (0..1000).filter(|_| upstream.pick(&[], Instant::now()).unwrap().id != busy.id).count();
        assert!(idle > 650, "{idle} of 1000"); // three quarters are expected
    }

    #[test]
    fn retries_stop_when_the_budget_is_spent() {
        let upstream = upstream(1);
        upstream.budget.set(0);
        (0..10).for_each(|_| upstream.deposit(20));
        assert_eq!((0..10).filter(|_| upstream.withdraw()).count(), 2);
    }
}
