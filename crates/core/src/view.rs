//! What one proxy needs of the mesh at one revision. [`view`] is pure; the proxy applies the result and acknowledges it
//! by its revision. Instances (where a service runs right now) are not in here: they come and go without a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    canonical::Digest,
    change::{Edge, Member, PolicyId, Revision, RoleName, RouteName},
    contract::Contract,
    identity::{ServiceName, TrustDomain},
    policy::Library,
    route::Route,
    service::{Protocol, ServiceSpec, Tokens},
    state::{MeshState, loopback},
};

/// What one proxy needs of the mesh at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The revision it was computed at.
    pub revision: Revision,
    /// The namespace of the mesh.
    pub trust_domain: TrustDomain,
    /// The service this proxy stands in front of.
    pub service: ServiceName,
    /// What that service declares; `None` when it is not (or no longer) part of the mesh: the proxy then admits nothing.
    pub spec: Option<ServiceSpec>,
    /// The operations of that service, when it has a contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<Contract>,
    /// The policies that can concern a request to this service.
    pub policies: Vec<ViewPolicy>,
    /// Who has which role.
    pub roles: BTreeMap<RoleName, BTreeSet<Member>>,
    /// Every active service: what this workload can see.
    pub services: BTreeMap<ServiceName, VisibleService>,
    /// Every traffic rule, by the service it is for, in the order in which they are tried.
    pub routes: BTreeMap<ServiceName, Vec<ViewRoute>>,
    /// The declared services that are no part of the mesh: none of them is let in as a caller, whatever policies say.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub barred: BTreeSet<ServiceName>,
    /// The approved edges to this service.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub edges: BTreeSet<Edge>,
}

/// A policy of the request gate, by value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewPolicy {
    /// Its `@id`.
    pub id: PolicyId,
    /// The file it stands in.
    pub file: Arc<str>,
    /// Its Cedar text.
    pub text: Arc<str>,
}

/// What a caller needs to know of another service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VisibleService {
    /// What it speaks.
    pub protocol: Protocol,
    /// The loopback address that means it inside a workload's namespace.
    pub address: Ipv4Addr,
    /// The port its callers use there.
    pub port: u16,
    /// Whether it permits nothing without an access token.
    #[serde(default, skip_serializing_if = "Tokens::are_optional")]
    pub tokens: Tokens,
}

/// A traffic rule with its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewRoute {
    /// Its name in `routes.toml`.
    pub name: RouteName,
    /// The rule.
    pub route: Route,
}

/// What makes one proxy's view different from another's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Local {
    /// The service it stands in front of.
    pub service: ServiceName,
}

/// Why a view cannot be built. The proxy keeps the last good one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// There is no mesh yet.
    #[error("the ledger is empty")]
    NotCreated,
    /// A policy's text was not delivered.
    #[error("the text {body} of policy `{id}` is missing")]
    BodyMissing {
        /// The policy.
        id: PolicyId,
        /// The digest of its text.
        body: Digest,
    },
    /// A contract was not delivered.
    #[error("the contract {body} of service `{service}` is missing")]
    ContractMissing {
        /// The service.
        service: ServiceName,
        /// The digest of its contract.
        body: Digest,
    },
}

/// Computes the view of one proxy.
pub fn view(state: &MeshState, revision: Revision, library: &Library, local: &Local) -> Result<View, ViewError> {
    let trust_domain = state.trust_domain.clone().ok_or(ViewError::NotCreated)?;
    // One that is barred has the view of one that does not exist: it is found by nobody, and finds nobody.
    let is_barred = state.barred.contains_key(&local.service);
    let spec = state.services.get(&local.service).filter(|_| !is_barred).map(|service| service.spec.clone());
    let contract = match spec.as_ref().and_then(|spec| spec.contract) {
        Some(body) => {
            let missing = || ViewError::ContractMissing { service: local.service.clone(), body };
            Some(library.contract(&body).ok_or_else(missing)?.clone())
        }
        None => None,
    };
    let mut policies = Vec::new();
    for (id, policy) in &state.policies {
        let parsed =
            library.get(&policy.body).ok_or_else(|| ViewError::BodyMissing { id: id.clone(), body: policy.body })?;
        if spec.as_ref().is_some_and(|spec| parsed.concerns(&local.service, spec)) {
            policies.push(ViewPolicy { id: id.clone(), file: policy.file.clone(), text: parsed.text().clone() });
        }
    }
    let services = state
        .services
        .iter()
        .filter(|(name, _)| !is_barred && state.is_active(name))
        .map(|(name, service)| {
            (
                name.clone(),
                VisibleService {
                    protocol: service.spec.protocol,
                    address: loopback(service.slot),
                    port: service.spec.port,
                    tokens: service.spec.tokens,
                },
            )
        })
        .collect();
    let mut routes: BTreeMap<ServiceName, Vec<ViewRoute>> = BTreeMap::new();
    for (name, route) in state.routes.iter().filter(|_| !is_barred) {
        routes.entry(route.service.clone()).or_default().push(ViewRoute { name: name.clone(), route: route.clone() });
    }
    for of_service in routes.values_mut() {
        of_service.sort_by(|a, b| (a.route.rank, &a.name).cmp(&(b.route.rank, &b.name)));
    }
    Ok(View {
        revision,
        trust_domain,
        service: local.service.clone(),
        spec,
        contract,
        policies,
        roles: state.roles.clone(),
        services,
        routes,
        barred: state.barred.keys().cloned().collect(),
        edges: state.edges.get(&local.service).filter(|_| !is_barred).cloned().unwrap_or_default(),
    })
}

impl View {
    /// Whether `other` says the same, whatever its revision: then a proxy only takes note of the number.
    pub fn same_content(&self, other: &View) -> bool {
        self.service == other.service
            && self.trust_domain == other.trust_domain
            && self.spec == other.spec
            && self.contract == other.contract
            && self.policies == other.policies
            && self.roles == other.roles
            && self.services == other.services
            && self.routes == other.routes
            && self.barred == other.barred
            && self.edges == other.edges
    }
}
