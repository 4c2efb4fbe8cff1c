//! A view made ready for the path: the law compiled, the routes in the order in which they are tried, the names of
//! services as a request writes them. Immutable but for the revision, which may rise while the content stays.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use countersign_core::{
    change::Revision,
    identity::ServiceName,
    policy::{Law, PolicyError},
    view::{View, VisibleService},
};
use rustc_hash::FxHashMap;

use crate::route::Routes;

/// One view, compiled.
pub struct Compiled {
    /// What it was compiled from.
    pub view: View,
    pub(crate) law: Law,
    pub(crate) routes: FxHashMap<ServiceName, Routes>,
    revision: AtomicU64,
}

impl Compiled {
    /// Compiles `view`. The limits of routes that `previous` has too go on counting where they were: a change elsewhere
    /// must not hand every caller a fresh burst.
    pub fn new(view: View, previous: Option<&Self>) -> Result<Self, Vec<PolicyError>> {
        let law = Law::compile(&view)?;
        let routes = view
            .routes
            .iter()
            .map(|(service, of_service)| {
                let before = previous.and_then(|previous| previous.routes.get(service));
                (service.clone(), Routes::new(of_service, before))
            })
            .collect();
        Ok(Self { law, routes, revision: AtomicU64::new(view.revision.0), view })
    }

    /// The latest revision at which this content holds.
    pub fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::Relaxed))
    }

    pub(crate) fn set_revision(&self, revision: Revision) {
        self.revision.fetch_max(revision.0, Ordering::Relaxed);
    }

    /// What the workload can see of `service`.
    pub fn visible(&self, service: &ServiceName) -> Option<&VisibleService> {
        self.view.services.get(service)
    }

    /// The service of a name as requests write it, `<service>.mesh`, when this workload can see it.
    pub fn service_of_host(&self, host: &str) -> Option<(&ServiceName, &VisibleService)> {
        let name = host.strip_suffix(".mesh")?;
        // ServiceName orders as its text does, but has no Borrow<str>: parsing is one pass over at most 63 bytes.
        self.view.services.get_key_value(&ServiceName::parse(name).ok()?)
    }

    pub(crate) fn is_same(self: &Arc<Self>, other: &Arc<Self>) -> bool {
        Arc::ptr_eq(self, other)
    }
}
