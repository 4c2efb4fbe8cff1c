//! Where every service runs right now, as control last said. Instances come and go without a change of the mesh, so
//! nothing here is in the ledger or in a view, and nothing here grants anything: whoever answers at an address must
//! still prove its identity.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use countersign_api::{
    mesh,
    sidecar::{Endpoints, ServiceEndpoints},
};
use countersign_core::identity::{InstanceId, ServiceName};
use tokio::sync::watch;

/// Endpoints of one service; `at` rises whenever they change.
#[derive(Debug, Clone)]
struct OfService {
    at: u64,
    endpoints: Arc<BTreeMap<InstanceId, mesh::Endpoint>>,
}

/// All endpoints at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    sequence: u64,
    at: u64,
    by_service: BTreeMap<ServiceName, OfService>,
}

/// The endpoints of the whole mesh and who wants to hear of them.
#[derive(Debug)]
pub(crate) struct Discovery {
    known: watch::Sender<Known>,
}

/// An event was missed: the stream must begin again with everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("discovery went from event {held} to {given}: events were lost on the way")]
pub(crate) struct Gap {
    held: u64,
    given: u64,
}

impl Discovery {
    pub(crate) fn new() -> Self {
        Self { known: watch::Sender::new(Known::default()) }
    }

    /// Takes in one event. Names that do not parse are left out: a newer control plane may know more kinds than we.
    pub(crate) fn take_in(&self, event: mesh::Discovery) -> Result<(), Gap> {
        let held = self.known.borrow().sequence;
        if !event.full && event.sequence != held + 1 {
            return Err(Gap { held, given: event.sequence });
        }
        self.known.send_modify(|known| known.apply(event));
        Ok(())
    }

    /// The number of the last event taken in.
    pub(crate) fn sequence(&self) -> u64 {
        self.known.borrow().sequence
    }

    /// Hears of every change from now on; the first look is everything.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }
}

impl Known {
    fn apply(&mut self, event: mesh::Discovery) {
        self.sequence = event.sequence;
        self.at += 1;
        let before = if event.full { std::mem::take(&mut self.by_service) } else { BTreeMap::new() };
        for endpoint in event.up {
            let Ok(instance) = InstanceId::parse(&endpoint.instance) else { continue };
            let of_service = self.of_service(instance.service());
            Arc::make_mut(&mut of_service.endpoints).insert(instance, endpoint);
        }
        for instance in event.down.iter().filter_map(|given| InstanceId::parse(given).ok()) {
            let of_service = self.of_service(instance.service());
            Arc::make_mut(&mut of_service.endpoints).remove(&instance);
        }
        // A full event repeats what most listeners hold: what is the same keeps its number and is not sent again.
        for (service, old) in before {
            let new =
                self.by_service.entry(service).or_insert_with(|| OfService { at: self.at, endpoints: Arc::default() });
            if new.endpoints == old.endpoints {
                new.at = old.at;
            }
        }
    }

    fn of_service(&mut self, service: ServiceName) -> &mut OfService {
        let entry =
            self.by_service.entry(service).or_insert_with(|| OfService { at: self.at, endpoints: Arc::default() });
        entry.at = self.at;
        entry
    }
}

/// What one proxy has been told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    at_by_service: BTreeMap<ServiceName, u64>,
    anything: bool,
}

impl Told {
    /// What a proxy that sees `visible` must be told now: everything at first, afterwards what changed. `None` when
    /// there is nothing new.
    pub(crate) fn news(&mut self, known: &Known, visible: &BTreeSet<ServiceName>) -> Option<Endpoints> {
        self.at_by_service.retain(|service, _| visible.contains(service));
        let mut services = Vec::new();
        for service in visible {
            let Some(of_service) = known.by_service.get(service) else { continue };
            if self.at_by_service.insert(service.clone(), of_service.at) == Some(of_service.at) {
                continue;
            }
            services.push(ServiceEndpoints {
                service: service.to_string(),
                endpoints: of_service.endpoints.values().cloned().collect(),
            });
        }
        let full = !std::mem::replace(&mut self.anything, true);
        (full || !services.is_empty()).then_some(Endpoints { services, full })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(instance: &str, address: &str) -> mesh::Endpoint {
        mesh::Endpoint { instance: instance.into(), address: address.into(), ready: true }
    }

    fn event(sequence: u64, full: bool, up: Vec<mesh::Endpoint>, down: &[&str]) -> mesh::Discovery {
        mesh::Discovery { sequence, full, up, down: down.iter().map(|d| d.to_string()).collect() }
    }

    fn names(given: &[&str]) -> BTreeSet<ServiceName> {
        given.iter().map(|name| ServiceName::parse(name).unwrap()).collect()
    }

    fn told(news: Option<Endpoints>) -> Option<(bool, Vec<(String, usize)>)> {
        news.map(|n| (n.full, n.services.into_iter().map(|s| (s.service, s.endpoints.len())).collect()))
    }

    #[test]
    fn a_lost_event_is_noticed_and_only_a_full_one_heals_it() {
        let discovery = Discovery::new();
        assert_eq!(discovery.take_in(event(7, false, vec![], &[])), Err(Gap { held: 0, given: 7 }));
        discovery.take_in(event(7, true, vec![up("a/1", "127.0.0.1:1")], &[])).unwrap();
        discovery.take_in(event(8, false, vec![], &["a/1"])).unwrap();
        assert_eq!(discovery.take_in(event(10, false, vec![], &[])), Err(Gap { held: 8, given: 10 }));
        assert_eq!(discovery.sequence(), 8);
    }

    #[test]
    fn a_proxy_is_told_everything_it_sees_once_and_then_only_what_changed() {
        let discovery = Discovery::new();
        let sees = names(&["a", "b"]);
        let mut proxy = Told::default();
        let mut news = |sees: &BTreeSet<_>| told(proxy.news(&discovery.subscribe().borrow(), sees));

        assert_eq!(news(&sees), Some((true, vec![])), "a proxy that was told nothing must know that there is nothing");
        discovery
            .take_in(event(
                1,
                true,
                vec![up("a/1", "127.0.0.1:1"), up("b/1", "127.0.0.1:2"), up("c/1", "127.0.0.1:3")],
                &[],
            ))
            .unwrap();
        assert_eq!(news(&sees), Some((false, vec![("a".into(), 1), ("b".into(), 1)])), "c is not visible to it");
        assert_eq!(news(&sees), None);
        discovery.take_in(event(2, false, vec![up("a/2", "127.0.0.1:4")], &["b/1"])).unwrap();
        assert_eq!(news(&sees), Some((false, vec![("a".into(), 2), ("b".into(), 0)])));
        discovery
            .take_in(event(
                9,
                true,
                vec![up("a/1", "127.0.0.1:1"), up("a/2", "127.0.0.1:4"), up("c/1", "127.0.0.1:3")],
                &[],
            ))
            .unwrap();
        assert_eq!(news(&sees), None, "the same endpoints again are no news");
        assert_eq!(news(&names(&["a", "b", "c"])), Some((false, vec![("c".into(), 1)])), "c became visible");
        discovery.take_in(event(10, true, vec![], &[])).unwrap();
        assert_eq!(news(&sees), Some((false, vec![("a".into(), 0)])), "what a full event leaves out is gone");
    }
}
