//! A view made ready for the path: the law compiled, the routes in the order in which they are tried, the names of
//! services as a request writes them. Immutable but for the revision, which may rise while the content stays.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use countersign_core::{
    change::Revision,
    identity::ServiceName,
    policy::{Law, Library, PolicyError},
    view::{View, VisibleService},
};
use rustc_hash::FxHashMap;

use crate::route::Routes;

/// One view, compiled.
pub struct Compiled {
    /// What it was compiled from.
    pub view: View,
    pub(crate) law: Arc<Law>,
    pub(crate) routes: FxHashMap<ServiceName, Routes>,
    revision: AtomicU64,
}

impl Compiled {
    /// Compiles `view`. The limits of routes that `previous` has too go on counting where they were: a change elsewhere
    /// must not hand every caller a fresh burst. `library` keeps the parsed policies for the next one.
    pub fn new(view: View, previous: Option<&Self>, library: &mut Library) -> Result<Self, Vec<PolicyError>> {
        let law = Arc::new(Law::compile_with(&view, library)?);
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

    pub(crate) fn is_same(self: &Arc<Self>, other: &Arc<Self>) -> bool {
        Arc::ptr_eq(self, other)
    }
}
