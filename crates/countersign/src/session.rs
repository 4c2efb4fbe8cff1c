//! `session`: who is signed in, in browsers and on command lines, and taking that back.

use clap::Subcommand;

use countersign_api::local::{EndSessions, SessionView, SessionsEnded};

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
    render::{self, Output, cell},
};

/// What can be done with sessions.
#[derive(Debug, Subcommand)]
pub enum SessionVerb {
    /// List those that are open
    List,
    /// End one, all of one operator or person, or all
    Revoke {
        /// Its id, or the beginning of it
        #[arg(required_unless_present_any = ["operator", "all"], conflicts_with_all = ["operator", "all"])]
        id: Option<String>,
        /// All of this operator, or of this person whom a provider vouched for: as `session list` names them
        #[arg(long, value_name = "NAME", conflicts_with = "all")]
        operator: Option<String>,
        /// All of everybody
        #[arg(long)]
        all: bool,
    },
}

/// Does what `session …` says.
pub async fn session(verb: SessionVerb, place: &Place, output: Output) -> Done {
    let control = Client::control(place);
    match verb {
        SessionVerb::List => {
            let sessions: Vec<SessionView> = control.get("/v1/sessions").await?;
            render::answer(output, &sessions, |sessions, paint| {
                let rows = sessions.iter().map(|session| {
                    vec![
                        cell(session.id.get(..12).unwrap_or(&session.id)),
                        cell(render::tame(&session.who)),
                        cell(session.kind.as_str()),
                        cell(&session.factor),
                        cell(&session.address),
                        cell(render::moment(session.began_at_ms)),
                        cell(render::moment(session.used_at_ms)),
                        cell(render::tame(&session.agent)),
                    ]
                });
                render::table(&["ID", "WHO", "IN", "FACTOR", "FROM", "BEGAN", "USED", "AGENT"], rows, paint)
            })
        }
        SessionVerb::Revoke { id, operator: who, all: _ } => {
            let ended: SessionsEnded = control.post("/v1/sessions/end", &EndSessions { id, who }).await?;
            render::answer(output, &ended, |ended, paint| {
                format!("{} {} sessions\n", paint.good("ended:"), ended.ended)
            })
        }
    }
}
