//! `service list` and `service show`; `service approve`, `suspend` and `resume`: whether a service is part of the mesh.

use std::fmt::Write as _;

use comfy_table::Cell;
use countersign_api::local::{Caller, Checked, ServiceView, Status, TelemetryView};
use countersign_core::{change::Change, identity::ServiceName};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::{self, Who},
    render::{self, Output, cell, verdict},
    status,
};

/// Lists the declared services, or those only that wait to be approved.
pub async fn list(place: &Place, pending: bool, output: Output) -> Done {
    let mut status: Status = Client::control(place).get("/v1/status").await?;
    status.services.retain(|service| !pending || service.state == QUARANTINED);
    let revision = status.revision.0;
    render::answer(output, &status.services, |services, paint| match services.is_empty() && pending {
        true => "no service waits to be approved\n".to_owned(),
        false => status::services(services, revision, paint),
    })
}

/// Changes whether a service is part of the mesh.
pub async fn change(place: &Place, change: Change, who: &Who, output: Output) -> Done {
    operator::change(&Client::control(place), who, output, |_| Ok(change.clone())).await
}

/// The state of a service that waits to be approved.
const QUARANTINED: &str = "quarantined";

/// One service, with who calls it, and what has to be there before it is let in.
#[derive(serde::Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    service: &'a ServiceView,
    callers: Vec<Caller>,
    checklist: Vec<Checked>,
}

/// Shows one service with its instances and its callers.
pub async fn show(place: &Place, name: &ServiceName, output: Output) -> Done {
    let status: Status = Client::control(place).get("/v1/status").await?;
    let service = find(&status.services, name)?;
    let callers: Vec<Caller> = Client::control(place).get(&format!("/v1/services/{name}/callers")).await?;
    let checklist: Vec<Checked> = Client::control(place).get(&format!("/v1/services/{name}/checklist")).await?;
    let now_ms = render::now_ms();
    let shown = Shown { service, callers, checklist };
    render::answer(output, &shown, |Shown { service, callers, checklist }, paint| {
        let mut text = format!("{} {}\n", paint.strong(service.name.as_str()), paint.dim(service.id.as_str()));
        for (label, value) in [
            ("state", service.state.clone()),
            ("protocol", service.protocol.clone()),
            ("upstreams", status::join(&service.upstreams)),
            ("policies", status::join(&service.policies)),
            ("may run", may_run(service)),
            ("contract", contract(service)),
        ] {
            let _ = writeln!(text, "{} {}", paint.dim(&format!("{label:<10}")), render::tame(&value));
        }
        let rows = service.instances.iter().map(|instance| {
            let enforces = instance
                .error
                .as_ref()
                .map_or_else(|| instance.revision.to_string(), |e| format!("{}: {e}", instance.revision));
            vec![
                cell(&instance.instance),
                cell(&instance.host),
                cell(&instance.address),
                verdict(if instance.ready { "ready" } else { "not ready" }, instance.ready),
                verdict(enforces, instance.error.is_none() && instance.revision == status.revision),
                telemetry(instance.telemetry, now_ms),
                cell(render::distance(instance.svid_expires_at_ms, now_ms)),
                verdict(&instance.isolation, instance.isolation == "namespace"),
                cell(instance.artifact.map_or_else(|| "-".to_owned(), |artifact| artifact.short())),
                cell(&instance.admin),
            ]
        });
        let headings = [
            "INSTANCE",
            "HOST",
            "ADDRESS",
            "STATE",
            "ENFORCES",
            "TELEMETRY",
            "SVID EXPIRES",
            "ISOLATION",
            "SHA-256",
            "ADMIN",
        ];
        let _ = write!(text, "\n{}", render::table(&headings, rows, paint));
        if service.state == QUARANTINED {
            text.push_str(&table_of_checklist(service, checklist, paint));
        }
        text.push_str(&table_of_waiting(service, paint));
        let _ = write!(text, "\n{}", table_of_callers(callers, now_ms, paint));
        text
    })
}

/// When the telemetry of a sidecar was verified last, or since when it is silent.
fn telemetry(arrived: TelemetryView, now_ms: u64) -> Cell {
    match (arrived.silent_since_ms, arrived.verified_at_ms) {
        (Some(since), _) => verdict(format!("silent since {}", render::distance(since, now_ms)), false),
        (None, Some(at)) => verdict(format!("verified {}", render::distance(at, now_ms)), true),
        (None, None) => cell("not yet"),
    }
}

fn may_run(service: &ServiceView) -> String {
    if service.deployments.is_empty() {
        return "any executable; `countersign service deploy` names those that may".to_owned();
    }
    status::join(&service.deployments.iter().collect::<Vec<_>>())
}

fn contract(service: &ServiceView) -> String {
    match &service.contract {
        Some(contract) => format!("{} operations, {}", contract.operations, contract.digest.short()),
        None => "none: every operation is a matter of policies alone".to_owned(),
    }
}

/// What has to be there before it is let in, and the next thing to do.
fn table_of_checklist(service: &ServiceView, checklist: &[Checked], paint: render::Paint) -> String {
    let rows = checklist.iter().map(|one| {
        let holds = one.help.is_none();
        vec![cell(&one.what), verdict(if holds { "there" } else { "missing" }, holds), cell(&one.found)]
    });
    let next = checklist.iter().find_map(|one| one.help.clone());
    let next = next.unwrap_or_else(|| format!("`countersign service approve {}` lets it in", service.name));
    let table = render::table(&["BEFORE IT IS LET IN", "", "FOUND"], rows, paint);
    format!("\n{table}{} {}\n", paint.note("help:"), render::tame(&next))
}

/// What waits to be admitted; nothing where nothing does.
fn table_of_waiting(service: &ServiceView, paint: render::Paint) -> String {
    if service.waiting.is_empty() {
        return String::new();
    }
    let rows = service.waiting.iter().map(|waiting| {
        let artifact = waiting.artifact.map_or_else(|| "-".to_owned(), |artifact| artifact.to_string());
        vec![cell(&waiting.instance), cell(&waiting.host), cell(artifact), cell(render::tame(&waiting.reason))]
    });
    format!(
        "\n{}{} `countersign service deploy {} --seen` admits what waits\n",
        render::table(&["WAITS", "HOST", "SHA-256", "WHY"], rows, paint),
        paint.note("help:"),
        service.name
    )
}

fn table_of_callers(callers: &[Caller], now_ms: u64, paint: render::Paint) -> String {
    let rows = callers.iter().map(|caller| {
        let by = caller.principal.service().map_or_else(|| caller.principal.to_string(), |service| service.to_string());
        vec![cell(by), cell(&caller.action), cell(caller.permits), cell(render::distance(caller.seen_at_ms, now_ms))]
    });
    render::table(&["CALLED BY", "ACTION", "PERMITTED", "LAST SEEN"], rows, paint)
}

/// The service of that name.
pub fn find<'a>(services: &'a [ServiceView], name: &ServiceName) -> Result<&'a ServiceView, Failure> {
    services.iter().find(|service| service.name == *name).ok_or_else(|| {
        let names: Vec<_> = services.iter().map(|service| service.name.clone()).collect();
        Failure::new(format!("this mesh has no service `{name}`"))
            .help(format!("its services are: {}", status::join(&names)))
    })
}
