//! `change`: what changed the mesh and who enforces it, and what waits for a factor or for other operators.

use std::{fmt::Write as _, str::FromStr, time::Duration};

use clap::Args;

use countersign_api::local::{
    AnsweredProposal, ChangeDetail, ChangeSummary, Mesh, Proposal, ProposalDetail, ProposalState, ProxyRevision,
    Status, Waited,
};
use countersign_core::{change::Revision, gate::Author};

use crate::{
    client::{Client, query},
    difference,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::{self, Who},
    render::{self, Output, Paint, cell, verdict},
    sign, status,
};

/// Which change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meant {
    /// One that is in the ledger.
    Made(Revision),
    /// One that waits, or did.
    Pending(String),
}

/// A pending change, and who answers for it.
#[derive(Debug, Args)]
pub struct Pending {
    /// Its id
    #[arg(value_parser = pending_id)]
    pub id: String,
    /// Who answers.
    #[command(flatten)]
    pub who: Who,
}

impl FromStr for Meant {
    type Err = String;
    fn from_str(given: &str) -> Result<Self, String> {
        match given.parse() {
            Ok(revision) => Ok(Self::Made(Revision(revision))),
            Err(_) => pending_id(given).map(Self::Pending),
        }
    }
}

/// The id of a pending change: `p` and hexadecimal digits.
pub fn pending_id(given: &str) -> Result<String, String> {
    let digits = given.strip_prefix('p').filter(|digits| (1..=64).contains(&digits.len()));
    match digits.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit())) {
        true => Ok(given.to_owned()),
        false => Err("a change is a revision, such as `4`, or the id of a pending one, such as `p1f3a`".to_owned()),
    }
}

/// Lists the newest changes.
pub async fn list(place: &Place, limit: u32, output: Output) -> Done {
    let path = format!("/v1/changes{}", query([("limit", Some(limit.to_string()))]));
    let changes: Vec<ChangeSummary> = Client::control(place).get(&path).await?;
    render::answer(output, &changes, |changes, paint| {
        let rows = changes.iter().map(|change| {
            vec![
                cell(change.revision),
                cell(render::moment(change.at_ms)),
                cell(&change.actor),
                verdict(
                    format!("{}/{}", change.acknowledged, change.connected),
                    change.acknowledged >= change.connected,
                ),
                cell(change.digest.short()),
                cell(brief(&change.changes)),
            ]
        });
        render::table(&["REVISION", "AT", "BY", "ENFORCED", "DIGEST", "CHANGES"], rows, paint)
    })
}

/// Lists the changes that wait, and what became of others.
pub async fn pending(place: &Place, output: Output) -> Done {
    let proposals: Vec<Proposal> = Client::control(place).get("/v1/proposals").await?;
    render::answer(output, &proposals, |proposals, paint| {
        let rows = proposals.iter().map(|proposal| {
            let is_open = matches!(proposal.state, ProposalState::StepUp | ProposalState::NeedsCountersign);
            vec![
                cell(&proposal.id),
                cell(render::moment(proposal.asked_at_ms)),
                cell(proposal.author.to_string()),
                verdict(state(proposal), !is_open),
                cell(proposal.digest.short()),
                cell(brief(&proposal.changes)),
            ]
        });
        render::table(&["ID", "AT", "BY", "STATE", "DIGEST", "CHANGES"], rows, paint)
    })
}

/// Countersigns, rejects or withdraws a pending change.
pub async fn answer(place: &Place, verb: &str, asked: &Pending, output: Output) -> Done {
    let control = Client::control(place);
    let answered: AnsweredProposal = if verb == "countersign" && sign::is_wanted(&control, &asked.who, output).await? {
        sign::countersign(&control, &asked.who, &asked.id).await?
    } else {
        control.post(&format!("/v1/proposals/{}/{verb}", asked.id), &asked.who.shown()).await?
    };
    render::answer(output, &answered, |answered, paint| {
        let handed = answered.invitations.iter().map(|invitation| operator::handed(invitation, paint));
        format!("{}{}", one(&answered.proposal, paint), handed.collect::<String>())
    })
}

fn one(proposal: &Proposal, _: Paint) -> String {
    format!("change {} by {}: {}\n", proposal.id, proposal.author, state(proposal))
}

/// What a pending change waits for, or what became of it.
pub fn state(proposal: &Proposal) -> String {
    match &proposal.state {
        ProposalState::StepUp => format!("waits for {}", proposal.requires),
        ProposalState::NeedsCountersign => {
            let by: Vec<_> = proposal.approvals.iter().collect();
            format!("waits for {}; countersigned by {}", proposal.requires, status::join(&by))
        }
        ProposalState::Applied { revision } => format!("applied as revision {revision}"),
        ProposalState::Rejected { by } => format!("rejected by {by}"),
        ProposalState::Withdrawn => "withdrawn".to_owned(),
        ProposalState::Expired => "expired".to_owned(),
        ProposalState::Void { revision } => format!("void: revision {revision} came first"),
    }
}

/// Shows one change in full.
pub async fn show(place: &Place, change: Meant, output: Output) -> Done {
    let revision = match change {
        Meant::Made(revision) => revision,
        Meant::Pending(id) => return show_pending(place, &id, output).await,
    };
    let change: ChangeDetail = Client::control(place).get(&format!("/v1/changes/{revision}")).await?;
    render::answer(output, &change, |change, paint| {
        let summary = &change.summary;
        let mut text = format!(
            "{} by {} at {}\n{} {}\n{} {}/{}\n\n",
            paint.strong(&format!("revision {}", summary.revision)),
            render::tame(&summary.actor),
            render::moment_full(summary.at_ms),
            paint.dim("change-set"),
            summary.digest,
            paint.dim("enforced  "),
            summary.acknowledged,
            summary.connected,
        );
        // What the changes replaced is not in this answer, so each is shown as it came.
        text.push_str(&difference::difference(&change.change_set.changes, &change.bodies, None, paint));
        let rows = change.proxies.iter().map(|proxy| {
            vec![
                cell(&proxy.instance),
                verdict(proxy.revision, proxy.revision >= revision),
                cell(proxy.error.as_deref().unwrap_or_default()),
            ]
        });
        let _ = write!(text, "\n{}", render::table(&["PROXY", "ENFORCES", "ERROR"], rows, paint));
        text
    })
}

async fn show_pending(place: &Place, id: &str, output: Output) -> Done {
    let control = Client::control(place);
    let detail: ProposalDetail = control.get(&format!("/v1/proposals/{id}")).await?;
    let mesh: Mesh = control.get("/v1/mesh").await?;
    render::answer(output, &detail, |detail, paint| {
        let proposal = &detail.proposal;
        // What it would replace is known only while the mesh is what it was planned on.
        let before = (mesh.revision == proposal.base).then_some(&mesh);
        format!(
            "{} by {} at {}: {}\n{}{} {}\n{} revision {}\n{} {}\n\n{}",
            paint.strong(&format!("change {}", proposal.id)),
            render::tame(&proposal.author.to_string()),
            render::moment_full(proposal.asked_at_ms),
            state(proposal),
            proven(&proposal.author, paint),
            paint.dim("change-set"),
            proposal.digest,
            paint.dim("planned on"),
            proposal.base,
            paint.dim("void after"),
            render::moment_full(proposal.expires_at_ms),
            difference::difference(&detail.change_set.changes, &detail.bodies, before, paint),
        )
    })
}

/// What was verified of who is no operator: whoever countersigns sees where the change comes from.
fn proven(author: &Author, paint: Paint) -> String {
    let (issuer, name, all) = match author {
        Author::Operator(_) => return String::new(),
        Author::Pipeline(pipeline) => (&pipeline.issuer, "claim     ", &pipeline.claims),
        Author::Person(person) => (&person.issuer, "group     ", &person.groups),
    };
    let mut text = format!("{} {}\n", paint.dim("issued by "), render::tame(issuer));
    for one in all {
        let _ = writeln!(text, "{} {}", paint.dim(name), render::tame(one));
    }
    text
}

/// Waits until every connected proxy enforces a revision, and fails with the names of those that do not; or until a pending change
/// is decided, and fails unless it was applied.
pub async fn wait(place: &Place, change: Meant, timeout: Duration, output: Output) -> Done {
    let control = Client::control(place);
    let id = match change {
        Meant::Made(revision) => {
            let waited = enforced(&control, revision, timeout).await?;
            return render::answer(output, &waited, all_enforce);
        }
        Meant::Pending(id) => id,
    };
    let path = format!("/v1/proposals/{id}/wait{}", query([("timeout_ms", Some(timeout.as_millis().to_string()))]));
    let proposal: Proposal = control.get(&path).await?;
    match &proposal.state {
        ProposalState::Applied { .. } => render::answer(output, &proposal, one),
        ProposalState::StepUp | ProposalState::NeedsCountersign => {
            let late = Failure::new(format!("change {id} is not decided after {timeout:?}")).cause(state(&proposal));
            Err(late.help(format!("wait on with `countersign change wait {id}`")))
        }
        _ => Err(Failure::refused(format!("change {id} was not applied: {}", state(&proposal)))),
    }
}

/// Says that every connected proxy enforces a revision.
pub fn all_enforce(waited: &Waited, paint: Paint) -> String {
    format!(
        "{} revision {} is enforced by all {} proxies\n",
        paint.good("enforced:"),
        waited.revision,
        waited.connected
    )
}

/// The end of waiting, as evidence: every connected proxy enforces the revision.
pub async fn enforced(control: &Client, revision: Revision, timeout: Duration) -> Result<Waited, Failure> {
    let path = format!("/v1/changes/{revision}/wait{}", query([("timeout_ms", Some(timeout.as_millis().to_string()))]));
    let waited: Waited = control.get(&path).await?;
    if waited.enforced {
        return Ok(waited);
    }
    let status: Status = control.get("/v1/status").await?;
    if status.revision < revision {
        return Err(Failure::new(format!(
            "there is no revision {revision}: the mesh is at revision {}",
            status.revision
        ))
        .help("`countersign change list` shows those that are there"));
    }
    let late = Failure::new(format!(
        "revision {revision} is not enforced everywhere after {timeout:?}: {} of {} proxies are missing",
        waited.missing.len(),
        waited.connected
    ));
    let late = waited.missing.iter().fold(late, |late, proxy| late.cause(missing(proxy)));
    Err(late.help(format!("the mesh holds the change; wait on with `countersign change wait {revision}`")))
}

fn missing(proxy: &ProxyRevision) -> String {
    let why = proxy.error.as_ref().map(|why| format!(": {}", render::tame(why))).unwrap_or_default();
    format!("{} enforces revision {}{why}", proxy.instance, proxy.revision)
}

fn brief(changes: &[String]) -> String {
    match changes {
        [] => "-".to_owned(),
        [first] => first.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}
