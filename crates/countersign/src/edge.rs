//! `edge list`: who came to which service, in which way. `edge approve` and `edge revoke`: what a service lets through that holds
//! what nobody approved (`first_contact = "hold"`).

use clap::{Args, Subcommand};

use countersign_api::local::{EdgeStanding, EdgeView, Mesh};
use countersign_core::{
    change::{Change, Edge, Member},
    identity::ServiceName,
};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::{self, Who},
    render::{self, Output, Paint, cell, verdict},
};

/// What can be asked about edges.
#[derive(Debug, Subcommand)]
pub enum EdgeVerb {
    /// List the edges that were used or held, and those that are approved
    List {
        /// Those to this service only
        #[arg(long, value_name = "NAME")]
        service: Option<ServiceName>,
        /// Those only that wait to be approved
        #[arg(long)]
        held: bool,
    },
    /// Let a caller through that a service holds, at once and everywhere
    ///
    /// Policies still say what it may: an approval permits nothing that they do not.
    Approve {
        /// Which edge, or all that were used.
        #[command(flatten)]
        which: Which,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
    /// Take an approval back: what is open of it is cut at once
    Revoke {
        /// Which edge.
        #[command(flatten)]
        which: One,
        /// Who asks.
        #[command(flatten)]
        who: Who,
    },
}

/// One edge.
#[derive(Debug, Clone, Args)]
pub struct One {
    /// Who calls: a service of this mesh, or a SPIFFE ID of another
    #[arg(value_parser = member)]
    caller: Member,
    /// The service that is called
    service: ServiceName,
    /// By which operation, as `edge list` says it: of its contract, or `GET /items/*` [default: every one]
    operation: Option<String>,
}

/// One edge, or all that a service has been seen to have.
#[derive(Debug, Clone, Args)]
pub struct Which {
    /// Who calls: a service of this mesh, or a SPIFFE ID of another
    #[arg(value_parser = member, required_unless_present = "seen")]
    caller: Option<Member>,
    /// The service that is called
    #[arg(required_unless_present = "seen")]
    service: Option<ServiceName>,
    /// By which operation, as `edge list` says it: of its contract, or `GET /items/*` [default: every one]
    operation: Option<String>,
    /// Approve all edges to this service that were used or held so far, in one change
    #[arg(long, value_name = "SERVICE", conflicts_with_all = ["caller", "service", "operation"])]
    seen: Option<ServiceName>,
}

fn member(given: &str) -> Result<Member, String> {
    Member::try_from(given.to_owned()).map_err(|error| error.to_string())
}

/// Does what is asked for.
pub async fn edge(place: &Place, verb: EdgeVerb, output: Output) -> Done {
    let control = Client::control(place);
    match verb {
        EdgeVerb::List { service, held } => list(&control, service.as_ref(), held, output).await,
        EdgeVerb::Approve { which: Which { seen: Some(service), .. }, who } => {
            let edges: Vec<EdgeView> = control.get("/v1/edges").await?;
            let planned = |mesh: &Mesh| approve_seen(mesh, &service, &edges);
            operator::changes(&control, &who, output, planned).await
        }
        EdgeVerb::Approve { which: Which { caller, service, operation, seen: None }, who } => {
            let (Some(caller), Some(service)) = (caller, service) else {
                return Err(Failure::usage("an edge has a caller and a service"));
            };
            let change = Change::ApproveEdge { service, edge: Edge { caller, operation: operation.map(Into::into) } };
            operator::change(&control, &who, output, |_| Ok(change.clone())).await
        }
        EdgeVerb::Revoke { which, who } => {
            let One { caller, service, operation } = which;
            let change = Change::RevokeEdge { service, edge: Edge { caller, operation: operation.map(Into::into) } };
            operator::change(&control, &who, output, |_| Ok(change.clone())).await
        }
    }
}

/// One approval for each edge that was seen and is not approved.
fn approve_seen(mesh: &Mesh, service: &ServiceName, edges: &[EdgeView]) -> Result<Vec<Change>, Failure> {
    let is_new = |view: &&EdgeView| {
        let way = view.edge.operation.as_deref().unwrap_or_default();
        view.service == *service && !mesh.state.is_approved(service, &view.edge.caller, way)
    };
    let approve = |view: &EdgeView| Change::ApproveEdge { service: service.clone(), edge: view.edge.clone() };
    let changes: Vec<Change> = edges.iter().filter(is_new).map(approve).collect();
    match changes.is_empty() {
        true => Err(Failure::new(format!("no edge to `{service}` was seen that is not approved"))
            .help("`countersign edge list` shows those that are known")),
        false => Ok(changes),
    }
}

async fn list(control: &Client, service: Option<&ServiceName>, held: bool, output: Output) -> Done {
    let mut edges: Vec<EdgeView> = control.get("/v1/edges").await?;
    edges.retain(|view| service.is_none_or(|service| view.service == *service));
    edges.retain(|view| !held || view.standing == EdgeStanding::Held);
    let now_ms = render::now_ms();
    render::answer(output, &edges, |edges, paint| match edges.is_empty() {
        true if held => "no edge is held\n".to_owned(),
        true => "no edge was used yet\n".to_owned(),
        false => table(edges, now_ms, paint),
    })
}

fn table(edges: &[EdgeView], now_ms: u64, paint: Paint) -> String {
    let when = |at_ms: Option<u64>| at_ms.map_or_else(|| "-".to_owned(), |at_ms| render::distance(at_ms, now_ms));
    let rows = edges.iter().map(|view| {
        vec![
            cell(render::tame(&view.edge.caller.to_string())),
            cell(&view.service),
            cell(render::tame(view.edge.operation.as_deref().unwrap_or("every one"))),
            verdict(view.standing.to_string(), view.standing != EdgeStanding::Held),
            cell(when(view.first_ms)),
            cell(when(view.last_ms)),
        ]
    });
    let table = render::table(&["CALLER", "SERVICE", "OPERATION", "STATE", "FIRST", "LAST"], rows, paint);
    let held = edges.iter().find(|view| view.standing == EdgeStanding::Held);
    let help = held.map_or_else(String::new, |view| {
        let operation = view.edge.operation.as_deref().unwrap_or_default();
        let line = format!("countersign edge approve {} {} {operation:?}", view.edge.caller, view.service);
        format!("{} `{}` lets the first that is held through\n", paint.note("help:"), render::tame(&line))
    });
    format!("{table}{help}")
}
