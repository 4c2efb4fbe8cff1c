//! What a change-set would have changed: decisions that were made are put to the law in force and to the law that is proposed, and
//! where the two differ the edge is named. Pure: it reads no store and no clock, and says on how much it rests.
//!
//! It shows what was asked before, not what can be asked: an edge that nobody used has no record. Nothing is decided by it.

use std::collections::{BTreeMap, HashMap};

use countersign_core::{
    change::{Bodies, Change, ChangeSet, PolicyId, Revision},
    identity::{ServiceName, SpiffeId},
    policy::{Decision, Law, Library, Query},
    record::{DecisionRecord, Inputs, Outcome, Reason},
    state::{FoldError, MeshState},
    view::{self, Local, ViewError},
};

/// Edges that are named at most.
const EDGES_MAX: usize = 100;

/// What would have been decided otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Impact {
    /// Decisions that were put to both laws.
    pub judged: usize,
    /// When the oldest of them was made, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// How many of them would come out otherwise.
    pub differ: usize,
    /// Where they differ, most frequent first, at most [`EDGES_MAX`].
    pub edges: Vec<Edge>,
    /// Edges beyond those.
    pub more_edges: usize,
}

/// An edge whose decision changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// Who called.
    pub principal: SpiffeId,
    /// Which service.
    pub service: ServiceName,
    /// How: `http:GET`.
    pub action: String,
    /// By the law in force.
    pub was: Outcome,
    /// By the one that is proposed.
    pub becomes: Outcome,
    /// The policies that decide then; none when none permits.
    pub by: Vec<PolicyId>,
    /// How many of the decisions were of this edge.
    pub count: usize,
    /// The path of one of them.
    pub example: String,
}

/// Why it cannot be said.
#[derive(Debug, thiserror::Error)]
pub enum ImpactError {
    /// The change-set does not follow from the state.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// A text is missing.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A policy or a contract is none.
    #[error("{0}")]
    Policy(String),
}

/// Whether the request gate reads anything that `change_set` writes.
pub fn concerns(change_set: &ChangeSet) -> bool {
    change_set.changes.iter().any(|change| {
        matches!(
            change,
            Change::DeclareService { .. }
                | Change::RemoveService { .. }
                | Change::QuarantineService { .. }
                | Change::ApproveService { .. }
                | Change::SuspendService { .. }
                | Change::ResumeService { .. }
                | Change::ApproveEdge { .. }
                | Change::RevokeEdge { .. }
                | Change::SetRole { .. }
                | Change::RemoveRole { .. }
                | Change::SetPolicy { .. }
                | Change::RemovePolicy { .. }
        )
    })
}

/// Puts each of `records` to the law of `before` and to that after `change_set`. `bodies` holds the texts of both.
pub fn of(
    before: &MeshState,
    change_set: &ChangeSet,
    bodies: &Bodies,
    records: &[DecisionRecord],
) -> Result<Impact, ImpactError> {
    let after = before.apply_all(change_set)?;
    let mut library = Library::default();
    for state in [before, &after] {
        library.take_up(state, |digest| bodies.get(digest)).map_err(ImpactError::Policy)?;
    }
    let mut laws: HashMap<&ServiceName, (Law, Law)> = HashMap::new();
    let mut edges: BTreeMap<(&SpiffeId, &ServiceName, &str, Outcome, Outcome), Edge> = BTreeMap::new();
    let mut impact = Impact::default();
    for record in records {
        let inputs = &record.inputs;
        let service = &inputs.service;
        if !laws.contains_key(service) {
            laws.insert(service, (law(before, service, &library)?, law(&after, service, &library)?));
        }
        let (law_before, law_after) = &laws[service];
        let was = law_before.decide(&Query::of(&as_issued(inputs, law_before, before)));
        let becomes = law_after.decide(&Query::of(&as_issued(inputs, law_after, &after)));
        impact.judged += 1;
        impact.since_ms = Some(impact.since_ms.map_or(record.at_ms, |since| since.min(record.at_ms)));
        if was.outcome == becomes.outcome {
            continue;
        }
        impact.differ += 1;
        edges
            .entry((&inputs.principal, service, &inputs.action, was.outcome, becomes.outcome))
            .or_insert_with(|| Edge {
                principal: inputs.principal.clone(),
                service: service.clone(),
                action: inputs.action.to_string(),
                was: was.outcome,
                becomes: becomes.outcome,
                by: decided_by(&becomes),
                count: 0,
                example: inputs.path.to_string(),
            })
            .count += 1;
    }
    impact.edges = edges.into_values().collect();
    impact.edges.sort_by_key(|edge| std::cmp::Reverse(edge.count));
    impact.more_edges = impact.edges.len().saturating_sub(EDGES_MAX);
    impact.edges.truncate(EDGES_MAX);
    Ok(impact)
}

/// What was asked, with the access token that its caller would hold under this law: it is for as much as policies permit, and only
/// of declared upstreams.
fn as_issued(inputs: &Inputs, law: &Law, state: &MeshState) -> Inputs {
    let mut inputs = inputs.clone();
    let caller = inputs.principal.service().and_then(|caller| state.services.get(&caller));
    if caller.is_none_or(|caller| !caller.spec.upstreams.contains(&inputs.service)) {
        return inputs;
    }
    if law.demands_tokens() && inputs.token.as_ref().is_some_and(|token| token.fault.is_none()) {
        inputs.token = None;
    }
    law.with_token(&inputs)
}

fn decided_by(decision: &Decision) -> Vec<PolicyId> {
    match decision.reason {
        Reason::NoPolicyPermits => Vec::new(),
        _ => decision.policies.to_vec(),
    }
}

fn law(state: &MeshState, service: &ServiceName, library: &Library) -> Result<Law, ImpactError> {
    let view = view::view(state, Revision::default(), library, &Local { service: service.clone() })?;
    Law::compile(&view)
        .map_err(|errors| ImpactError::Policy(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))
}

#[cfg(test)]
mod tests {
    use countersign_core::{
        identity::{InstanceId, TrustDomain},
        record::Judged,
        risk::Condition,
        service::{Protocol, ServiceSpec},
    };

    use super::*;

    const READS: &str = r#"@id("web-reads")
permit (principal == Workload::"web", action == Action::"http:GET", resource in Service::"shop");"#;
    const WRITES: &str = r#"@id("web-reads")
permit (principal == Workload::"web", action in [Action::"http:GET", Action::"http:POST"], resource in Service::"shop");"#;

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    fn record(at_ms: u64, from: &str, method: &str, path: &str) -> DecisionRecord {
        DecisionRecord {
            id: format!("{at_ms:032x}").into(),
            at_ms,
            instance: serde_json::from_value::<InstanceId>(serde_json::json!("shop/1")).unwrap(),
            revision: Revision(1),
            signal_seq: 0,
            outcome: Outcome::Deny,
            reason: Reason::NoPolicyPermits,
            policies: [].into(),
            inputs: Inputs {
                principal: SpiffeId::parse(&format!("spiffe://shop.example/{from}")).unwrap(),
                action: format!("http:{method}").into(),
                service: name("shop"),
                path: path.into(),
                host: "shop".into(),
                method: method.into(),
                protocol: Protocol::Http,
                size: None,
                origin: "127.0.0.1".parse().unwrap(),
                now: 1_790_000_000,
                first_contact: false,
                operation: None,
                token: None,
                condition: Condition::default(),
            },
            judged: Judged::AtStart,
            ended: None,
            trace_id: None,
            judge_ns: 1,
        }
    }

    fn mesh() -> (MeshState, Bodies) {
        let mut bodies = Bodies::default();
        bodies.insert(
            "@id(\"owners\")\npermit (principal in Role::\"owner\", action == Action::\"seal_settings\", resource);",
        );
        let body = bodies.insert(READS);
        let set = ChangeSet {
            base: Revision(0),
            changes: vec![
                Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
                Change::DeclareService { name: name("shop"), spec: ServiceSpec::new(Protocol::Http) },
                Change::SetPolicy { id: "web-reads".into(), file: "policies/shop.cedar".into(), body },
            ],
        };
        (MeshState::default().apply_all(&set).unwrap(), bodies)
    }

    fn changed(changes: Vec<Change>) -> ChangeSet {
        ChangeSet { base: Revision(1), changes }
    }

    #[test]
    fn decisions_that_come_out_otherwise_are_counted_by_edge_and_the_others_are_not_named() {
        let (state, mut bodies) = mesh();
        let body = bodies.insert(WRITES);
        let wider =
            changed(vec![Change::SetPolicy { id: "web-reads".into(), file: "policies/shop.cedar".into(), body }]);
        let records = [
            record(30, "web", "POST", "/cart"),
            record(20, "web", "POST", "/cart/1"),
            record(10, "web", "GET", "/"),
            record(40, "cron", "POST", "/cart"),
        ];
        let impact = of(&state, &wider, &bodies, &records).unwrap();
        assert_eq!((impact.judged, impact.differ, impact.since_ms), (4, 2, Some(10)));
        let [edge] = &impact.edges[..] else { panic!("{impact:?}") };
        assert_eq!((edge.was, edge.becomes, edge.count, &*edge.example), (Outcome::Deny, Outcome::Permit, 2, "/cart"));
        assert_eq!((edge.principal.as_str(), &*edge.action), ("spiffe://shop.example/web", "http:POST"));
        assert_eq!(edge.by, ["web-reads".into()]);

        let gone = changed(vec![Change::RemovePolicy { id: "web-reads".into() }]);
        let impact = of(&state, &gone, &bodies, &records).unwrap();
        let [edge] = &impact.edges[..] else { panic!("{impact:?}") };
        assert_eq!((edge.was, edge.becomes, edge.count), (Outcome::Permit, Outcome::Deny, 1));
        assert!(edge.by.is_empty(), "no policy permits");
    }

    #[test]
    fn a_service_that_goes_takes_its_permits_with_it_and_nothing_judged_is_said_to_be_nothing() {
        let (state, bodies) = mesh();
        let gone = changed(vec![
            Change::RemoveService { name: name("shop") },
            Change::RemovePolicy { id: "web-reads".into() },
        ]);
        assert_eq!(of(&state, &gone, &bodies, &[record(1, "web", "GET", "/")]).unwrap().differ, 1);
        assert_eq!(of(&state, &gone, &bodies, &[]).unwrap(), Impact::default());
        let unfit = changed(vec![Change::RemoveRole { name: "nobody".into() }]);
        assert!(matches!(of(&state, &unfit, &bodies, &[]), Err(ImpactError::Fold(_))));
        assert!(concerns(&unfit) && !concerns(&changed(vec![Change::SealSettings { quorum: 1 }])));
    }

    #[test]
    fn what_is_named_is_bounded() {
        let (state, bodies) = mesh();
        let gone = changed(vec![Change::RemovePolicy { id: "web-reads".into() }]);
        let all: Bodies = bodies.clone();
        let everyone = r#"@id("web-reads")
permit (principal, action, resource);"#;
        let mut texts = all;
        let body = texts.insert(everyone);
        let open = state
            .apply_all(&changed(vec![Change::SetPolicy { id: "web-reads".into(), file: "a.cedar".into(), body }]))
            .unwrap();
        let records: Vec<_> =
            (0..EDGES_MAX as u64 + 5).map(|n| record(n, &format!("caller-{n}"), "GET", "/")).collect();
        let impact = of(&open, &gone, &texts, &records).unwrap();
        assert_eq!((impact.differ, impact.edges.len(), impact.more_edges), (EDGES_MAX + 5, EDGES_MAX, 5));
    }
}
