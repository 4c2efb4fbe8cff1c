//! How a service comes into the mesh: what has to be there before anybody can let it in, and what is missing of it. Whether it is let
//! in is a change, which the gate judges.
//!
//! INVARIANT (nothing-joins-blind): a quarantined service is approved only when all of its checklist is there.

use countersign_api::local::{Checked, IdentityFilter, Problem};
use countersign_core::{
    change::{Change, ChangeSet, Member},
    identity::ServiceName,
    service::Protocol,
    state::{Barred, MeshState},
};

use crate::{
    Plane, identities,
    local_api::{problem, store_problem},
    telemetry::OfService,
};

/// The checklist of a declared service.
pub async fn checklist(plane: &Plane, service: &ServiceName) -> Result<Vec<Checked>, Problem> {
    let head = plane.ledger.head();
    let state = head.follower.state();
    let Some(trust_domain) = &state.trust_domain else { return Ok(Vec::new()) };
    let of_service = IdentityFilter { id: Some(trust_domain.workload(service)), ..IdentityFilter::default() };
    let identities = identities::list(plane, of_service).await.map_err(|error| store_problem(&error))?;
    let good = identities.iter().filter(|identity| identity.revoked.is_none()).count();
    let instances = plane.publisher.instances_of(service);
    let telemetry = plane.telemetry.of_service(instances.iter().map(|one| &one.instance), plane.clock.now_ms());
    let enforcing =
        instances.iter().filter(|one| one.error.is_none() && one.revision == head.follower.revision()).count();
    let policies = plane.gate.policies(&head);
    let spec = state.services.get(service).map(|held| &held.spec);
    let guarding = spec.map_or(0, |spec| policies.iter().filter(|policy| policy.concerns(service, spec)).count());
    let calling = policies.iter().filter(|policy| policy.names_caller(service)).count() + roles_of(state, service);
    let start = || format!("start it: `countersign run --service {service} -- COMMAND`, or `instances` in mesh.toml");
    let check = |what: &str, found: String, holds: bool, help: String| Checked {
        what: what.to_owned(),
        found,
        help: (!holds).then_some(help),
    };
    let contract = spec.filter(|spec| spec.protocol.has_operations()).map(|spec| {
        let found = match (&spec.contract, spec.without_contract) {
            (Some(digest), _) => {
                let operations = plane.gate.contract(digest, &head).map_or(0, |contract| contract.operations().len());
                format!("{operations} operations")
            }
            (None, true) => "none, as mesh.toml says: contract = \"none\"".to_owned(),
            (None, false) => "none".to_owned(),
        };
        let help = format!(
            "name its operations in mesh.toml, `contract = \"contracts/{service}.{}\"`, or say that it has none on purpose: `contract = \"none\"`; then apply",
            if spec.protocol == Protocol::Grpc { "binpb" } else { "yaml" },
        );
        check("contract", found, spec.contract.is_some() || spec.without_contract, help)
    });
    let checked = vec![
        check("identity", format!("{good} certificates"), good > 0, start()),
        check("mutual TLS", format!("{} sidecars listen", instances.len()), !instances.is_empty(), start()),
        check(
            "enforcement",
            format!("{enforcing} sidecars enforce revision {}", head.follower.revision()),
            enforcing > 0,
            "wait for them: `countersign status` shows which revision each enforces".to_owned(),
        ),
        check(
            "telemetry",
            match telemetry.verified {
                0 => {
                    let arrived = |what, so| format!("{what} {}", if so { "received" } else { "missing" });
                    let OfService { record, metric, span, .. } = telemetry;
                    [arrived("record", record), arrived("metric", metric), arrived("span", span)].join(", ")
                }
                count => format!("record, metric and span received of {count} sidecars"),
            },
            telemetry.verified > 0,
            "wait for it: each sidecar shows it by itself once a minute; the agent's log on its host says why it cannot"
                .to_owned(),
        ),
        check(
            "policy",
            format!("{guarding} guard it, {calling} let it call"),
            guarding + calling > 0,
            format!(
                "write one that names it, in policies/: `resource in Service::\"{service}\"` or `principal == Workload::\"{service}\"`"
            ),
        ),
    ];
    Ok(checked.into_iter().chain(contract).collect())
}

/// Says what is missing of the services that a change-set would let in.
pub async fn examine(plane: &Plane, change_set: &ChangeSet) -> Result<(), Problem> {
    for change in &change_set.changes {
        let Change::ApproveService { name } = change else { continue };
        // What is not quarantined cannot be approved: the fold says so.
        if plane.ledger.head().follower.state().barred.get(name) != Some(&Barred::Quarantined) {
            continue;
        }
        let missing: Vec<String> = checklist(plane, name)
            .await?
            .into_iter()
            .filter_map(|one| Some(format!("{}: {}; {}", one.what, one.found, one.help?)))
            .collect();
        if !missing.is_empty() {
            let help = format!("`countersign service show {name}` shows the whole list; nothing was changed");
            let title = format!("service `{name}` cannot be approved yet");
            return Err(problem(422, title, Some(missing.join("\n")), Some(&help)));
        }
    }
    Ok(())
}

/// How many roles the service has: policies permit by them.
fn roles_of(state: &MeshState, service: &ServiceName) -> usize {
    let member = Member::Service(service.clone());
    state.roles.values().filter(|members| members.contains(&member)).count()
}
