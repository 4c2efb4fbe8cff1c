//! `host invite`: a join token for one more host. `host list` and `host show`: those that are there, and what each may run and runs.
//! `host evict`: one that is part of the mesh no longer.

use countersign_api::local::{
    EvictAs, Evicted, HostView, IdentityView, InstanceView, Invitation, Invite, InviteAs, Status,
};
use countersign_core::identity::ServiceName;

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output, cell, verdict},
    sign::{self, Pinned},
    signal::{self, Because},
    status,
};

/// Asks for a token and prints the command that uses it. The token is a secret and is shown this once.
pub async fn invite(place: &Place, invite: Invite, asker: &Asker, output: Output) -> Done {
    let Invite { ttl_seconds: _, host, services } = invite.clone();
    let control = Client::control(place);
    let asked = InviteAs { invite, shown: asker.shown() };
    let invitation: Invitation = control.post("/v1/hosts/invitations", &asked).await?;
    let status: Status = control.get("/v1/status").await?;
    if let Some(name) = &status.trust_domain
        && let Ok(pinned) = Pinned::here()
        && !sign::pins_the_same(&invitation.token, pinned.of(name)?)
    {
        return Err(Failure::refused("the join token names other operators than those pinned here, and is not shown")
            .help("tell the other operators; if the mesh was made anew on purpose, remove what is pinned of it"));
    }
    render::answer(output, &invitation, |invitation, paint| {
        let host = host.map(|host| format!(" --host {host}")).unwrap_or_default();
        let services = services.map(|services| services.iter().map(ServiceName::as_str).collect::<Vec<_>>().join(","));
        let service = services.map(|services| format!(" --service {services}")).unwrap_or_default();
        let note = invitation.note.as_deref().map(|note| format!("{} {}\n", paint.warn("note:"), render::tame(note)));
        format!(
            "{} it is good for one host until {} and is not shown again\n{}\ncountersign agent --control {} --join {}{host}{service} DIR\n",
            paint.note("on the new host, run this:"),
            render::moment_full(invitation.expires_at_ms),
            note.unwrap_or_default(),
            invitation.control,
            invitation.token,
        )
    })
}

/// Lists every host that the control plane knows.
pub async fn list(place: &Place, output: Output) -> Done {
    let status: Status = Client::control(place).get("/v1/status").await?;
    let now_ms = render::now_ms();
    render::answer(output, &status.hosts, |hosts, paint| status::hosts(hosts, now_ms, paint))
}

/// One host, with what it runs and proves itself by.
#[derive(serde::Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    host: &'a HostView,
    instances: Vec<&'a InstanceView>,
    identities: Vec<IdentityView>,
}

/// Shows one host.
pub async fn show(place: &Place, name: &ServiceName, output: Output) -> Done {
    let control = Client::control(place);
    let status: Status = control.get("/v1/status").await?;
    let Some(host) = status.hosts.iter().find(|host| host.host == *name) else {
        return Err(Failure::new(format!("no host `{name}` is known"))
            .help("`countersign host list` shows those that are there"));
    };
    let identities: Vec<IdentityView> = control.get(&format!("/v1/identities?host={name}")).await?;
    let instances = status.services.iter().flat_map(|service| &service.instances);
    let instances = instances.filter(|instance| instance.host == *name).collect();
    let now_ms = render::now_ms();
    render::answer(output, &Shown { host, instances, identities }, |shown, paint| {
        let Shown { host, instances, identities } = shown;
        let why = host.refused.as_deref().map(|why| format!("{} {}\n", paint.bad("refused:"), render::tame(why)));
        let runs = instances.iter().map(|instance| {
            let ready = verdict(if instance.ready { "ready" } else { "not ready" }, instance.ready);
            vec![cell(&instance.instance), cell(&instance.address), ready]
        });
        let proves = identities.iter().map(|one| {
            let state = verdict(if one.revoked.is_some() { "revoked" } else { "good" }, one.revoked.is_none());
            vec![cell(one.serial), cell(&one.id), state, cell(render::distance(one.expires_at_ms, now_ms))]
        });
        format!(
            "{}{}\n{}\n{}",
            status::hosts(std::slice::from_ref(*host), now_ms, paint),
            why.unwrap_or_default(),
            render::table(&["RUNS", "ADDRESS", "STATE"], runs, paint),
            render::table(&["SERIAL", "SPIFFE ID", "STATE", "EXPIRES"], proves, paint),
        )
    })
}

/// Puts a host out.
pub async fn evict(place: &Place, host: ServiceName, because: Because, output: Output) -> Done {
    let Because { reason, timeout, asker } = because;
    let control = Client::control(place);
    let asked = EvictAs { host, reason, shown: asker.shown() };
    let evicted: Evicted = control.post("/v1/hosts/evict", &asked).await?;
    let waited = match evicted.signal {
        Some(signal) => Some(signal::wait(&control, signal, timeout).await?),
        None => None,
    };
    render::answer(output, &evicted, |evicted, paint| {
        let Evicted { host, signal: _, identities, instances } = evicted;
        let gone = status::join(instances);
        format!(
            "{} {host}: {identities} identities are good for nothing, out of discovery: {gone}\n{} it comes back by `countersign host invite` alone\n",
            paint.good("evicted:"),
            paint.note("note:"),
        )
    })?;
    waited.map_or(Ok(()), |waited| signal::say(&waited, output))
}
