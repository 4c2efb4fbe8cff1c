//! `change list`, `change show` and `change wait`: what changed the mesh, and who enforces it.

use std::{fmt::Write as _, time::Duration};

use countersign_api::local::{ChangeDetail, ChangeSummary, ProxyRevision, Status, Waited};
use countersign_core::change::Revision;

use crate::{
    client::{Client, query},
    difference,
    error::{Done, Failure},
    mesh_finder::Place,
    render::{self, Output, Paint, cell, verdict},
};

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

/// Shows one change in full.
pub async fn show(place: &Place, revision: Revision, output: Output) -> Done {
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

/// Waits until every connected proxy enforces `revision`; fails with the names of those that do not.
pub async fn wait(place: &Place, revision: Revision, timeout: Duration, output: Output) -> Done {
    let waited = enforced(&Client::control(place), revision, timeout).await?;
    render::answer(output, &waited, all_enforce)
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
