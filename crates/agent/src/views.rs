//! What each service's proxies need of the mesh: computed once per service and revision, shared by its instances, and
//! encoded only when its content changed. A view that cannot be built never replaces a good one.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use bytes::Bytes;
use countersign_core::{
    canonical::Digest,
    change::Revision,
    identity::ServiceName,
    ledger::Follower,
    policy::{Grants, Library},
    token::audiences,
    view::{Local, View, view},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::tokens::Wanted;

/// The view of one service as its proxies get it.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    /// The last good view; its content holds at `revision`.
    pub(crate) view: Arc<View>,
    /// Its encoding.
    pub(crate) json: Bytes,
    /// Rises when the content changes.
    pub(crate) content: u64,
    /// The newest revision that it is the view of.
    pub(crate) revision: Revision,
    /// Why it is not the view of a newer one.
    pub(crate) refused: Option<ViewRefused>,
}

/// A revision whose view could not be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ViewRefused {
    pub(crate) revision: Revision,
    pub(crate) why: String,
}

/// The views of the services that run on this host.
#[derive(Default)]
pub(crate) struct Views {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    library: Library,
    unreadable: BTreeMap<Digest, String>,
    by_service: BTreeMap<ServiceName, watch::Sender<Option<Published>>>,
    wanted_by_service: BTreeMap<ServiceName, watch::Sender<Wanted>>,
    grants: Grants,
    contents: u64,
}

impl Views {
    /// The view of `service`, now (when `follower` holds anything) and whenever it changes.
    pub(crate) fn subscribe(&self, service: &ServiceName, follower: &Follower) -> watch::Receiver<Option<Published>> {
        let mut inner = self.inner.lock();
        if let Some(sender) = inner.by_service.get(service) {
            return sender.subscribe();
        }
        let sender = watch::Sender::new(None);
        let receiver = sender.subscribe();
        inner.by_service.insert(service.clone(), sender);
        inner.take_up(follower, Some(service));
        receiver
    }

    /// The access tokens that proxies of `service` should hold, now and whenever that changes.
    pub(crate) fn wanted(&self, service: &ServiceName, follower: &Follower) -> watch::Receiver<Wanted> {
        let mut inner = self.inner.lock();
        if let Some(sender) = inner.wanted_by_service.get(service) {
            return sender.subscribe();
        }
        let sender = watch::Sender::new(Wanted::default());
        let receiver = sender.subscribe();
        inner.wanted_by_service.insert(service.clone(), sender);
        inner.take_up(follower, Some(service)); // and with it the contracts of those that it calls
        inner.take_up_wanted(follower);
        receiver
    }

    /// Whether there is a view of `service`.
    pub(crate) fn is_published(&self, service: &ServiceName) -> bool {
        self.inner.lock().by_service.get(service).is_some_and(|published| published.borrow().is_some())
    }

    /// Forgets a service that does not run here any more.
    pub(crate) fn forget(&self, service: &ServiceName) {
        let mut inner = self.inner.lock();
        inner.by_service.remove(service);
        inner.wanted_by_service.remove(service);
    }

    /// Computes every view at the revision that `follower` holds. Returns the services whose view could not be built.
    pub(crate) fn take_up(&self, follower: &Follower) -> Vec<(ServiceName, ViewRefused)> {
        let mut inner = self.inner.lock();
        let refused = inner.take_up(follower, None);
        inner.take_up_wanted(follower);
        refused
    }
}

impl Inner {
    fn take_up(&mut self, follower: &Follower, only: Option<&ServiceName>) -> Vec<(ServiceName, ViewRefused)> {
        if follower.state().trust_domain.is_none() {
            return Vec::new();
        }
        // The texts of the change gate are in force too, and are no policies of requests.
        let policies: HashSet<Digest> = follower.state().policies.values().map(|policy| policy.body).collect();
        for digest in &policies {
            if self.library.get(digest).is_none()
                && !self.unreadable.contains_key(digest)
                && let Some(text) = follower.bodies().get(digest)
                && let Err(why) = self.library.insert(*digest, text)
            {
                self.unreadable.insert(*digest, why);
            }
        }
        // A contract that cannot be read is the matter of its own service alone.
        let of_service = |name: &ServiceName| follower.state().services.get(name)?.spec.contract;
        let called: HashSet<ServiceName> =
            self.wanted_by_service.keys().flat_map(|caller| audiences(follower.state(), caller)).collect();
        let contracts: HashSet<Digest> = self.by_service.keys().chain(&called).filter_map(of_service).collect();
        let mut unreadable_contracts: BTreeMap<Digest, String> = BTreeMap::new();
        for digest in &contracts {
            if let Some(text) = follower.bodies().get(digest)
                && let Err(why) = self.library.insert_contract(*digest, text)
            {
                unreadable_contracts.insert(*digest, why);
            }
        }
        self.library.retain(|digest| policies.contains(digest) || contracts.contains(digest));
        self.unreadable.retain(|digest, _| policies.contains(digest));

        let mut refused = Vec::new();
        for (service, sender) in self.by_service.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
            let revision = follower.revision();
            let local = Local { service: service.clone() };
            let contract = of_service(service).and_then(|digest| unreadable_contracts.get(&digest));
            let built = match (self.unreadable.values().next(), contract) {
                (Some(why), _) => Err(format!("a policy cannot be read: {why}")),
                (None, Some(why)) => Err(format!("the contract of {service} cannot be read: {why}")),
                (None, None) => view(follower.state(), revision, &self.library, &local).map_err(|e| e.to_string()),
            };
            let built = built.and_then(|new| {
                // What cannot be encoded cannot be delivered either.
                let json = serde_json::to_vec(&new).map_err(|e| e.to_string())?;
                Ok((new, Bytes::from(json)))
            });
            match built {
                Ok((new, json)) => {
                    let contents = &mut self.contents;
                    sender.send_modify(|published| match published {
                        Some(held) if held.view.same_content(&new) => {
                            held.revision = revision;
                            held.refused = None;
                        }
                        _ => {
                            *contents += 1;
                            let (view, content) = (Arc::new(new), *contents);
                            *published = Some(Published { view, json, content, revision, refused: None });
                        }
                    });
                }
                Err(why) => {
                    let refusal = ViewRefused { revision, why };
                    sender.send_modify(|published| {
                        if let Some(held) = published {
                            held.refused = Some(refusal.clone());
                        }
                    });
                    refused.push((service.clone(), refusal));
                }
            }
        }
        refused
    }

    /// What each service's proxies should hold tokens for. Views come first: no proxy waits for this.
    fn take_up_wanted(&mut self, follower: &Follower) {
        let state = follower.state();
        for (service, sender) in &self.wanted_by_service {
            let scopes = self.grants.of(state, &self.library, service);
            sender.send_modify(|held| {
                held.revision = follower.revision();
                if *held.scopes != scopes {
                    held.scopes = Arc::new(scopes);
                }
            });
        }
        self.grants.retain(state);
    }
}
