//! `host invite`: a join token for one more host. `host list`: those that are there, and what each may run.

use countersign_api::local::{Invitation, Invite, InviteAs, Status};
use countersign_core::identity::ServiceName;

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    render::{self, Output},
    sign::{self, Pinned},
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
