//! `status`: the mesh at a glance.

use std::fmt::Write as _;

use countersign_api::local::{HostView, ServiceView, Status};

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
    render::{self, Output, Paint, cell, verdict},
};

/// What an unprotected mesh means, wherever it is said.
pub const UNPROTECTED: &str =
    "unprotected: whoever owns the data directory can change everything; no owner is enrolled";
/// What a missing separation means, wherever it is said.
pub const NOT_SEPARATED: &str = "workloads of one uid are not separated from each other";

/// Shows it.
pub async fn status(place: &Place, output: Output) -> Done {
    let status: Status = Client::control(place).get("/v1/status").await?;
    render::answer(output, &status, |status, paint| text(status, render::now_ms(), paint))
}

fn text(status: &Status, now_ms: u64, paint: Paint) -> String {
    let name = status.trust_domain.as_ref().map_or("nothing applied yet", |name| name.as_str());
    let mut text = format!(
        "{} revision {} {}\n",
        paint.strong(name),
        status.revision,
        paint.dim(&format!(
            "root {}, version {}, started {}",
            status.root.short(),
            status.version,
            render::distance(status.started_at_ms, now_ms)
        )),
    );
    for warning in &warnings(status) {
        let _ = writeln!(text, "{} {}", paint.warn("warning:"), render::tame(warning));
    }
    let _ = write!(text, "\n{}", services(&status.services, status.revision.0, paint));
    let _ = write!(text, "\n{}", hosts(&status.hosts, now_ms, paint));
    text
}

/// What is not as it should be, unprotected first.
pub fn warnings(status: &Status) -> Vec<String> {
    let mut warnings: Vec<String> = Vec::new();
    if !status.protected && !status.warnings.iter().any(|warning| warning.contains("unprotected")) {
        warnings.push(UNPROTECTED.to_owned());
    }
    for host in status.hosts.iter().filter(|host| host.connected && host.isolation != "namespace") {
        warnings.push(format!("{NOT_SEPARATED} on host {}: {}", host.host, host.isolation_note));
    }
    for host in &status.hosts {
        let refused = host.refused.iter().map(|why| format!("host {} does not follow this ledger: {why}", host.host));
        warnings.extend(refused);
    }
    warnings.extend(status.warnings.iter().cloned());
    warnings
}

/// The table of `status` and `service list`.
pub fn services(services: &[ServiceView], revision: u64, paint: Paint) -> String {
    let rows = services.iter().map(|service| {
        let ready = service.instances.iter().filter(|instance| instance.ready).count();
        let enforced = service.instances.iter().map(|instance| instance.revision.0).min();
        let failed = service.instances.iter().any(|instance| instance.error.is_some());
        vec![
            cell(&service.name),
            match service.waiting.len() {
                0 => verdict(&service.state, service.state == "active"),
                waiting => verdict(format!("{waiting} waiting"), false),
            },
            cell(&service.protocol),
            verdict(format!("{ready}/{}", service.instances.len()), ready == service.instances.len() && ready > 0),
            match enforced {
                Some(enforced) => verdict(enforced, enforced == revision && !failed),
                None => cell("-"),
            },
            cell(service.policies.len()),
            cell(join(&service.upstreams)),
        ]
    });
    render::table(&["SERVICE", "STATE", "PROTOCOL", "READY", "ENFORCES", "POLICIES", "UPSTREAMS"], rows, paint)
}

/// The table of `status` and `host list`.
pub fn hosts(hosts: &[HostView], now_ms: u64, paint: Paint) -> String {
    let rows = hosts.iter().map(|host| {
        vec![
            cell(&host.host),
            match (&host.refused, host.connected) {
                (Some(_), _) => verdict("refused", false),
                (None, connected) => verdict(if connected { "connected" } else { "away" }, connected),
            },
            cell(&host.version),
            verdict(&host.isolation, host.isolation == "namespace"),
            cell(host.services.as_ref().map_or_else(|| "any".to_owned(), |may| join(&may.iter().collect::<Vec<_>>()))),
            cell(if host.heard_at_ms == 0 { "never".to_owned() } else { render::distance(host.heard_at_ms, now_ms) }),
        ]
    });
    render::table(&["HOST", "STATE", "VERSION", "ISOLATION", "MAY RUN", "HEARD"], rows, paint)
}

/// Names beside each other; `-` when there is none.
pub fn join<T: ToString>(names: &[T]) -> String {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use countersign_core::{canonical::Digest, change::Revision, identity::ServiceName};
    use expect_test::expect;

    use super::*;

    #[test]
    fn an_unprotected_and_unseparated_mesh_says_so() {
        let status = Status {
            trust_domain: Some("shop.example".parse().unwrap()),
            revision: Revision(4),
            root: Digest::default(),
            protected: false,
            version: "0.1.0".into(),
            started_at_ms: 0,
            hosts: vec![HostView {
                host: ServiceName::parse("h1").unwrap(),
                connected: true,
                version: "0.1.0".into(),
                isolation: "none".into(),
                isolation_note: "user namespaces are off".into(),
                heard_at_ms: 9_000,
                services: Some([ServiceName::parse("web").unwrap(), ServiceName::parse("job").unwrap()].into()),
                refused: Some("the agent holds revision 9, this ledger ends at 4".into()),
            }],
            services: vec![],
            warnings: vec!["the disk is nearly full".into()],
        };
        expect![[r"
            shop.example revision 4 root 000000000000, version 0.1.0, started 10s ago
            warning: unprotected: whoever owns the data directory can change everything; no owner is enrolled
            warning: workloads of one uid are not separated from each other on host h1: user namespaces are off
            warning: host h1 does not follow this ledger: the agent holds revision 9, this ledger ends at 4
            warning: the disk is nearly full

            SERVICE  STATE  PROTOCOL  READY  ENFORCES  POLICIES  UPSTREAMS

            HOST  STATE    VERSION  ISOLATION  MAY RUN   HEARD
            h1    refused  0.1.0    none       job, web  1s ago
        "]]
        .assert_eq(&text(&status, 10_000, Paint::plain()));
    }
}
