//! From a directory and a mesh to the changes that make the mesh what the directory says.

use std::collections::BTreeMap;

use super::Directory;
use crate::{
    canonical::Digest,
    change::{Bodies, Change, ChangeSet, Revision},
    identity::TrustDomain,
    state::{MeshState, PolicyRef},
};

/// What has to change, planned on a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The changes, in an order in which they fold: what is referred to comes before what refers to it.
    pub change_set: ChangeSet,
    /// The policy texts that they bring.
    pub bodies: Bodies,
}

/// The directory is about another mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the mesh is `{held}`, and `mesh.toml` says `{given}`: a trust domain is for life")]
pub struct TrustDomainMoved {
    /// What the mesh is.
    pub held: TrustDomain,
    /// What the directory says.
    pub given: TrustDomain,
}

/// Plans the changes that lead from `state`, at `revision`, to what `directory` says.
pub fn plan(directory: &Directory, state: &MeshState, revision: Revision) -> Result<Plan, TrustDomainMoved> {
    let mut changes = Vec::new();
    match &state.trust_domain {
        None => changes.push(Change::CreateMesh { trust_domain: directory.trust_domain.clone() }),
        Some(held) if *held == directory.trust_domain => {}
        Some(held) => {
            return Err(TrustDomainMoved { held: held.clone(), given: directory.trust_domain.clone() });
        }
    }
    for (name, service) in &directory.services {
        if state.services.get(name).is_none_or(|held| held.spec != service.spec) {
            changes.push(Change::DeclareService { name: name.clone(), spec: service.spec.clone() });
        }
    }
    for (name, members) in &directory.roles {
        if state.roles.get(name) != Some(members) {
            changes.push(Change::SetRole { name: name.clone(), members: members.clone() });
        }
    }
    let mut bodies = Bodies::default();
    for (id, policy) in &directory.policies {
        let body = Digest::of(policy.text.as_bytes());
        if state.policies.get(id) != Some(&PolicyRef { file: policy.file.clone(), body }) {
            bodies.insert(policy.text.clone());
            changes.push(Change::SetPolicy { id: id.clone(), file: policy.file.clone(), body });
        }
    }
    for (name, route) in &directory.routes {
        if state.routes.get(name) != Some(route) {
            changes.push(Change::SetRoute { name: name.clone(), route: route.clone() });
        }
    }
    changes.extend(gone(&state.routes, &directory.routes).map(|name| Change::RemoveRoute { name }));
    changes.extend(gone(&state.policies, &directory.policies).map(|id| Change::RemovePolicy { id }));
    changes.extend(gone(&state.roles, &directory.roles).map(|name| Change::RemoveRole { name }));
    changes.extend(gone(&state.services, &directory.services).map(|name| Change::RemoveService { name }));
    Ok(Plan { change_set: ChangeSet { base: revision, changes }, bodies })
}

fn gone<K: Ord + Clone, A, B>(held: &BTreeMap<K, A>, wanted: &BTreeMap<K, B>) -> impl Iterator<Item = K> {
    held.keys().filter(|key| !wanted.contains_key(*key)).cloned()
}

impl Plan {
    /// Whether the mesh is what the directory says already.
    pub fn is_empty(&self) -> bool {
        self.change_set.changes.is_empty()
    }
}
