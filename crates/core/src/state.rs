//! The state of the mesh: a pure fold of all admitted changes. Snapshots of it are caches; old folds never change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    canonical::Digest,
    change::{Change, ChangeSet, Member, PolicyId, RoleName, RouteName},
    identity::{ServiceName, TrustDomain},
    route::Route,
    service::ServiceSpec,
};

/// Services of one mesh at the same time: each has a loopback address of its own in 127.81.0.0/16.
pub const SERVICES_MAX: usize = 60_000;

/// What all admitted changes add up to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MeshState {
    /// Set by the first change.
    pub trust_domain: Option<TrustDomain>,
    /// Every declared service.
    pub services: BTreeMap<ServiceName, Service>,
    /// Who has which role.
    pub roles: BTreeMap<RoleName, BTreeSet<Member>>,
    /// The request gate.
    pub policies: BTreeMap<PolicyId, PolicyRef>,
    /// The traffic rules.
    pub routes: BTreeMap<RouteName, Route>,
    /// The slot the next new service gets.
    pub next_slot: u16,
}

/// A declared service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// What it declares.
    pub spec: ServiceSpec,
    /// Its number for life. A removed service's slot is the last to be given again, so that an address a caller
    /// resolved once never comes to mean another service while anyone remembers it.
    pub slot: u16,
}

/// A policy in force: where it stands and the digest of its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRef {
    /// The file below the mesh directory.
    pub file: Arc<str>,
    /// The digest of the Cedar text.
    pub body: Digest,
}

/// Why a change does not follow from the state before it. In a ledger this means that it is damaged or forged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// Every ledger begins with `create_mesh`.
    #[error("the first change must be `create_mesh`")]
    NotCreated,
    /// A trust domain is for life.
    #[error("the mesh exists already, as `{0}`")]
    CreatedTwice(TrustDomain),
    /// It removes what is not there.
    #[error("{0} does not exist")]
    Unknown(String),
    /// No loopback address is left.
    #[error("a mesh holds at most {SERVICES_MAX} services")]
    Full,
}

impl MeshState {
    /// Folds one change. On an error the state is unchanged.
    pub fn apply(&mut self, change: &Change) -> Result<(), FoldError> {
        match (change, &self.trust_domain) {
            (Change::CreateMesh { trust_domain }, None) => {
                self.trust_domain = Some(trust_domain.clone());
                return Ok(());
            }
            (Change::CreateMesh { .. }, Some(own)) => return Err(FoldError::CreatedTwice(own.clone())),
            (_, None) => return Err(FoldError::NotCreated),
            (_, Some(_)) => {}
        }
        let known = |removed: bool| if removed { Ok(()) } else { Err(FoldError::Unknown(change.subject())) };
        match change {
            Change::CreateMesh { .. } => unreachable!("matched above"),
            Change::DeclareService { name, spec } => match self.services.get_mut(name) {
                Some(service) => service.spec = spec.clone(),
                None => {
                    let slot = self.free_slot().ok_or(FoldError::Full)?;
                    self.next_slot = slot + 1;
                    self.services.insert(name.clone(), Service { spec: spec.clone(), slot });
                }
            },
            Change::RemoveService { name } => known(self.services.remove(name).is_some())?,
            Change::SetRole { name, members } => {
                self.roles.insert(name.clone(), members.clone());
            }
            Change::RemoveRole { name } => known(self.roles.remove(name).is_some())?,
            Change::SetPolicy { id, file, body } => {
                self.policies.insert(id.clone(), PolicyRef { file: file.clone(), body: *body });
            }
            Change::RemovePolicy { id } => known(self.policies.remove(id).is_some())?,
            Change::SetRoute { name, route } => {
                self.routes.insert(name.clone(), route.clone());
            }
            Change::RemoveRoute { name } => known(self.routes.remove(name).is_some())?,
        }
        Ok(())
    }

    /// Folds a whole change-set, or none of it.
    pub fn apply_all(&self, set: &ChangeSet) -> Result<Self, FoldError> {
        let mut next = self.clone();
        set.changes.iter().try_for_each(|change| next.apply(change))?;
        Ok(next)
    }

    /// SHA-256 of the canonical encoding.
    pub fn digest(&self) -> Digest {
        Digest::of_canonical(self)
    }

    /// The bodies that are in force.
    pub fn bodies(&self) -> impl Iterator<Item = Digest> + '_ {
        self.policies.values().map(|policy| policy.body)
    }

    fn free_slot(&self) -> Option<u16> {
        if self.services.len() >= SERVICES_MAX {
            return None;
        }
        let taken: BTreeSet<u16> = self.services.values().map(|service| service.slot).collect();
        let from = usize::from(self.next_slot);
        (from..from + SERVICES_MAX).map(|n| (n % SERVICES_MAX) as u16).find(|slot| !taken.contains(slot))
    }
}

/// The loopback address that stands for the service of `slot` inside every workload's namespace: 127.81.1.1 upwards,
/// never `.0` or `.255` in the last place.
pub fn loopback(slot: u16) -> Ipv4Addr {
    Ipv4Addr::new(127, 81, (slot / 254) as u8 + 1, (slot % 254) as u8 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Protocol;

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn declare(given: &str) -> Change {
        Change::DeclareService { name: name(given), spec: ServiceSpec::new(Protocol::Http) }
    }

    fn created() -> MeshState {
        let mut state = MeshState::default();
        state.apply(&Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }).unwrap();
        state
    }

    #[test]
    fn nothing_precedes_the_creation_of_the_mesh_and_it_happens_once() {
        assert_eq!(MeshState::default().apply(&declare("web")), Err(FoldError::NotCreated));
        let again = Change::CreateMesh { trust_domain: TrustDomain::parse("other.example").unwrap() };
        assert!(matches!(created().apply(&again), Err(FoldError::CreatedTwice(_))));
    }

    #[test]
    fn a_removed_services_address_is_not_given_to_the_next_one() {
        let mut state = created();
        state.apply(&declare("a")).unwrap();
        state.apply(&declare("b")).unwrap();
        state.apply(&Change::RemoveService { name: name("a") }).unwrap();
        state.apply(&declare("c")).unwrap();
        assert_eq!(state.services[&name("b")].slot, 1);
        assert_eq!(state.services[&name("c")].slot, 2);
        state.next_slot = SERVICES_MAX as u16;
        state.apply(&declare("d")).unwrap();
        assert_eq!(state.services[&name("d")].slot, 0, "after the last slot the first free one comes round again");
    }

    #[test]
    fn redeclaring_keeps_the_address() {
        let mut state = created();
        state.apply(&declare("a")).unwrap();
        let spec = ServiceSpec::new(Protocol::Tcp);
        state.apply(&Change::DeclareService { name: name("a"), spec: spec.clone() }).unwrap();
        assert_eq!(state.services[&name("a")], Service { spec, slot: 0 });
    }

    #[test]
    fn a_change_set_folds_whole_or_not_at_all() {
        let state = created();
        let set = ChangeSet {
            base: Default::default(),
            changes: vec![declare("a"), Change::RemovePolicy { id: "nothing".into() }],
        };
        assert_eq!(state.apply_all(&set), Err(FoldError::Unknown("policy nothing".into())));
        assert_eq!(state, created());
    }

    #[test]
    fn every_slot_has_its_own_address_in_the_loopback_range() {
        let all: BTreeSet<_> = (0..SERVICES_MAX as u16).map(loopback).collect();
        assert_eq!(all.len(), SERVICES_MAX);
        assert!(all.iter().all(|a| a.octets()[..2] == [127, 81] && !matches!(a.octets()[3], 0 | 255)));
    }
}
