//! A small mesh for the tests of this room.

use std::{collections::BTreeMap, sync::Arc};

use super::{Action, Context, Law, Query, parse_file};
use crate::{
    change::{Member, Revision},
    contract::{Contract, Operation},
    identity::{ServiceName, SpiffeId, TrustDomain},
    risk::Condition,
    service::{Protocol, ServiceSpec},
    token::ShownToken,
    view::{View, ViewPolicy},
};

/// 2026-11-22T16:30:00Z, a Sunday.
pub(super) const NOW: i64 = 1_795_365_000;

pub(super) fn service(name: &str) -> ServiceName {
    ServiceName::parse(name).unwrap()
}

/// The view of `catalog` in shop.example, in namespace `shop`, of sensitivity `internal`. `web` and a partner's
/// `billing` are readers; `web` and `cron` are writers.
pub(super) fn view(policies: &str) -> View {
    let mut spec = ServiceSpec::new(Protocol::Http);
    spec.namespace = Some("shop".into());
    spec.sensitivity = Some("internal".into());
    let members = |names: &[&str]| names.iter().map(|name| Member::try_from((*name).to_owned()).unwrap()).collect();
    let policies = parse_file("policies/test.cedar", policies).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"));
    View {
        revision: Revision(7),
        trust_domain: TrustDomain::parse("shop.example").unwrap(),
        service: service("catalog"),
        spec: Some(spec),
        contract: None,
        policies: policies
            .into_iter()
            .map(|policy| ViewPolicy { id: policy.id, file: "policies/test.cedar".into(), text: policy.text })
            .collect(),
        roles: BTreeMap::from([
            ("reader".into(), members(&["web", "spiffe://partner.example/billing"])),
            ("writer".into(), members(&["web", "cron"])),
            ("nobody".into(), members(&[])),
        ]),
        services: BTreeMap::new(),
        routes: BTreeMap::new(),
        barred: [].into(),
        edges: [].into(),
    }
}

pub(super) fn law(policies: &str) -> Arc<Law> {
    law_of(&view(policies))
}

/// The law of a catalog that has these operations: name, method, path.
pub(super) fn law_with(operations: &[(&str, &str, &str)], policies: &str) -> Arc<Law> {
    let mut view = view(policies);
    let contract = contract(operations);
    view.spec.as_mut().unwrap().contract = Some(contract.digest());
    view.contract = Some(contract);
    law_of(&view)
}

pub(super) fn contract(operations: &[(&str, &str, &str)]) -> Contract {
    let operation = |(name, method, path): &(&str, &str, &str)| Operation {
        name: (*name).into(),
        method: (*method).into(),
        path: (*path).into(),
    };
    Contract::new(operations.iter().map(operation).collect()).unwrap()
}

fn law_of(view: &View) -> Arc<Law> {
    Arc::new(Law::compile(view).unwrap_or_else(|errors| panic!("{errors:#?}")))
}

/// What a query is made from.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) principal: SpiffeId,
    pub(super) action: String,
    pub(super) service: ServiceName,
    pub(super) path: String,
    pub(super) host: String,
    pub(super) size: Option<u64>,
    pub(super) origin: std::net::IpAddr,
    pub(super) now: i64,
    pub(super) first_contact: bool,
    pub(super) token: Option<ShownToken>,
    pub(super) condition: Condition,
}

impl Asked {
    /// `asked("web", "http:GET", "/items")`: from 10.0.0.7 at [`NOW`], of catalog.
    pub(super) fn new(principal: &str, action: &str, path: &str) -> Self {
        let principal =
            if principal.contains("://") { principal.to_owned() } else { format!("spiffe://shop.example/{principal}") };
        Self {
            principal: SpiffeId::parse(&principal).unwrap(),
            action: action.into(),
            service: service("catalog"),
            path: path.into(),
            host: "catalog.mesh".into(),
            size: None,
            origin: [10, 0, 0, 7].into(),
            now: NOW,
            first_contact: false,
            token: None,
            condition: Condition::default(),
        }
    }

    pub(super) fn query(&self) -> Query<'_> {
        let (action, method, protocol) = match self.action.as_str() {
            "grpc:call" => (Action::GrpcCall, "POST", Protocol::Grpc),
            "tcp:connect" => (Action::TcpConnect, "CONNECT", Protocol::Tcp),
            http => {
                let method = http.strip_prefix("http:").unwrap();
                (Action::Http(method), method, Protocol::Http)
            }
        };
        Query {
            principal: &self.principal,
            action,
            service: &self.service,
            path: &self.path,
            context: Context {
                method,
                host: &self.host,
                protocol,
                size: self.size,
                origin: self.origin,
                now: self.now,
                first_contact: self.first_contact,
                token: self.token.as_ref(),
                condition: self.condition,
            },
        }
    }
}
