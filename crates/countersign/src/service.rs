//! `service list` and `service show`.

use std::fmt::Write as _;

use countersign_api::local::{ServiceView, Status};
use countersign_core::identity::ServiceName;

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    render::{self, Output, cell, verdict},
    status,
};

/// Lists the declared services.
pub async fn list(place: &Place, output: Output) -> Done {
    let status: Status = Client::control(place).get("/v1/status").await?;
    let revision = status.revision.0;
    render::answer(output, &status.services, |services, paint| status::services(services, revision, paint))
}

/// Shows one service with its instances.
pub async fn show(place: &Place, name: &ServiceName, output: Output) -> Done {
    let status: Status = Client::control(place).get("/v1/status").await?;
    let service = find(&status.services, name)?;
    let now_ms = render::now_ms();
    render::answer(output, service, |service, paint| {
        let mut text = format!("{} {}\n", paint.strong(service.name.as_str()), paint.dim(service.id.as_str()));
        for (label, value) in [
            ("state", service.state.clone()),
            ("protocol", service.protocol.clone()),
            ("upstreams", status::join(&service.upstreams)),
            ("policies", status::join(&service.policies)),
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
                cell(render::distance(instance.svid_expires_at_ms, now_ms)),
                verdict(&instance.isolation, instance.isolation == "namespace"),
                cell(&instance.admin),
            ]
        });
        let headings = ["INSTANCE", "HOST", "ADDRESS", "STATE", "ENFORCES", "SVID EXPIRES", "ISOLATION", "ADMIN"];
        let _ = write!(text, "\n{}", render::table(&headings, rows, paint));
        text
    })
}

fn find<'a>(services: &'a [ServiceView], name: &ServiceName) -> Result<&'a ServiceView, Failure> {
    services.iter().find(|service| service.name == *name).ok_or_else(|| {
        let names: Vec<_> = services.iter().map(|service| service.name.clone()).collect();
        Failure::new(format!("this mesh has no service `{name}`"))
            .help(format!("its services are: {}", status::join(&names)))
    })
}
