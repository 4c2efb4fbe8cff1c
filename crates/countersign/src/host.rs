//! `host invite`: a join token for one more host.

use std::time::Duration;

use countersign_api::local::{Invitation, Invite};
use countersign_core::identity::ServiceName;

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
    render::{self, Output},
};

/// Asks for a token and prints the command that uses it. The token is a secret and is shown this once.
pub async fn invite(place: &Place, ttl: Duration, host: Option<ServiceName>, output: Output) -> Done {
    let invite = Invite { ttl_seconds: ttl.as_secs().max(1), host };
    let invitation: Invitation = Client::control(place).post("/v1/hosts/invitations", &invite).await?;
    render::answer(output, &invitation, |invitation, paint| {
        format!(
            "{} it is good for one host until {} and is not shown again\n\ncountersign agent --control {} --join {} DIR\n",
            paint.note("on the new host, run this:"),
            render::moment_full(invitation.expires_at_ms),
            invitation.control,
            invitation.token,
        )
    })
}
