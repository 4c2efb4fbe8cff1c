//! `plan` and `apply`: the difference between the mesh directory and the mesh in force, shown or made so. One change-set,
//! admitted whole or not at all.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use serde::Serialize;

use countersign_api::local::{Applied, Apply, ApplyAs, Mesh, Waited};
use countersign_core::{
    canonical::Digest,
    change::{Change, Revision},
    directory::{self, Directory},
};

use crate::{
    change, cli,
    cli::Global,
    client::Client,
    difference::difference,
    error::{Done, Failure, Kind},
    mesh_directory,
    mesh_finder::{self, Place},
    operator::Who,
    policy,
    render::{self, Paint},
    sign, status,
};

/// How often a change-set is planned anew because someone else's came first.
const ATTEMPTS_MAX: usize = 5;

/// Which directory.
#[derive(Debug, Args)]
pub struct PlanArguments {
    /// The mesh directory [default: the one found from here]
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Plan on the mesh that another mesh directory describes, and ask none: what a pull request changes
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
}

/// Which directory, and when it is done.
#[derive(Debug, Args)]
pub struct ApplyArguments {
    /// The mesh directory [default: the one found from here]
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Refuse to apply when a test of the directory fails
    #[arg(long)]
    pub tested: bool,
    /// Return when every connected proxy enforces it; fail after this long
    #[arg(long, value_name = "SPAN", value_parser = cli::span)]
    pub wait: Option<Duration>,
    /// Apply a pending change, exactly that, instead of the directory
    #[arg(long, value_name = "ID", value_parser = change::pending_id, conflicts_with_all = ["mesh", "tested"])]
    pub change: Option<String>,
    /// Who asks.
    #[command(flatten)]
    pub who: Who,
}

/// A plan on a mesh.
struct Planned {
    on: Mesh,
    plan: directory::Plan,
}

/// What applying came to.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The mesh was what the directory says already.
    Unchanged {
        /// The revision that holds it.
        revision: Revision,
    },
    /// It was changed.
    Applied {
        /// The revision that the changes made.
        revision: Revision,
        /// The digest of the change-set.
        digest: Digest,
        /// One line for each change.
        changes: Vec<String>,
        /// Whether an owner is enrolled.
        protected: bool,
    },
}

impl Outcome {
    /// The revision that holds what the directory says.
    pub fn revision(&self) -> Revision {
        match self {
            Self::Unchanged { revision } | Self::Applied { revision, .. } => *revision,
        }
    }
}

fn found(mesh: Option<PathBuf>, global: &Global) -> Result<Place, Failure> {
    match mesh {
        Some(dir) => {
            let here = mesh_finder::at(&dir, global.data_dir.as_deref())?;
            Ok(Place { dashboard: cli::dashboard(global)?, ..here })
        }
        None => cli::place(global),
    }
}

/// Shows what `apply` would change.
pub async fn plan(arguments: PlanArguments, global: &Global) -> Done {
    let place = found(arguments.mesh, global)?;
    let directory = mesh_directory::load(place.dir()?)?;
    let Planned { on, plan } = match &arguments.from {
        Some(from) => {
            let (state, bodies) = mesh_directory::state(&mesh_directory::load(from)?);
            let on = Mesh { revision: Revision::default(), state, bodies };
            Planned { plan: planned_on(&directory, &on)?, on }
        }
        None => planned(&Client::control(&place), &directory).await?,
    };
    let answer = serde_json::json!({
        "base": plan.change_set.base,
        "digest": plan.change_set.digest(),
        "changes": plan.change_set.changes,
    });
    render::answer(global.output, &answer, |_, paint| match plan.is_empty() {
        true if arguments.from.is_some() => format!("{} both describe one mesh\n", paint.good("nothing to change:")),
        true => unchanged(on.revision, paint),
        false if arguments.from.is_some() => format!(
            "{}\n{} {} of what the other directory describes\n",
            difference(&plan.change_set.changes, &plan.bodies, Some(&on), paint),
            paint.note("planned:"),
            counted(plan.change_set.changes.len()),
        ),
        false => format!(
            "{}\n{} {} on revision {}; `countersign apply` makes them\n",
            difference(&plan.change_set.changes, &plan.bodies, Some(&on), paint),
            paint.note("planned:"),
            counted(plan.change_set.changes.len()),
            on.revision,
        ),
    })
}

/// Makes the mesh what its directory says.
pub async fn apply(arguments: ApplyArguments, global: &Global) -> Done {
    let place = found(arguments.mesh, global)?;
    if let Some(id) = &arguments.change {
        return apply_pending(&place, id, &arguments.who, arguments.wait, global).await;
    }
    let directory = mesh_directory::load(place.dir()?)?;
    let failing = failing(&directory)?;
    if arguments.tested && !failing.is_empty() {
        return Err(refused(&failing));
    }
    let control = Client::control(&place);
    let (outcome, difference) = match sign::is_wanted(&control, &arguments.who, global.output).await? {
        true => sign_directory(&control, &directory, &arguments.who, Paint::stdout()).await?,
        false => apply_directory(&control, &directory, &arguments.who, Paint::stdout()).await?,
    };
    let waited = waited(&control, outcome.revision(), arguments.wait).await?;
    #[derive(Serialize)]
    struct Answer {
        #[serde(flatten)]
        outcome: Outcome,
        failing_tests: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        waited: Option<Waited>,
    }
    render::answer(global.output, &Answer { outcome, failing_tests: failing, waited }, |answer, paint| {
        let mut text = match &answer.outcome {
            Outcome::Unchanged { revision } => unchanged(*revision, paint),
            Outcome::Applied { revision, changes, protected, .. } => {
                let warning = match protected {
                    true => String::new(),
                    false => format!("{} {}\n", paint.warn("warning:"), status::UNPROTECTED),
                };
                format!(
                    "{difference}\n{} revision {revision}, {}\n{warning}",
                    paint.good("applied:"),
                    counted(changes.len())
                )
            }
        };
        for failed in &answer.failing_tests {
            text.push_str(&format!("{} {}\n", paint.warn("warning:"), failing_test(failed)));
        }
        if let Some(waited) = &answer.waited {
            text.push_str(&change::all_enforce(waited, paint));
        }
        text
    })
}

async fn waited(control: &Client, revision: Revision, wait: Option<Duration>) -> Result<Option<Waited>, Failure> {
    match wait {
        Some(timeout) => change::enforced(control, revision, timeout).await.map(Some),
        None => Ok(None),
    }
}

/// Shows what the gate asks for over a change that was asked for before: exactly that is applied, once.
async fn apply_pending(place: &Place, id: &str, who: &Who, wait: Option<Duration>, global: &Global) -> Done {
    let control = Client::control(place);
    let Applied { revision, digest, protected, .. } = match sign::is_wanted(&control, who, global.output).await? {
        true => sign::apply_pending(&control, who, id).await?,
        false => control.post(&format!("/v1/proposals/{id}/apply"), &who.shown()).await?,
    };
    let waited = waited(&control, revision, wait).await?;
    #[derive(Serialize)]
    struct Answer {
        outcome: &'static str,
        revision: Revision,
        digest: Digest,
        protected: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        waited: Option<Waited>,
    }
    let answer = Answer { outcome: "applied", revision, digest, protected, waited };
    render::answer(global.output, &answer, |answer, paint| {
        let enforced = answer.waited.as_ref().map(|waited| change::all_enforce(waited, paint)).unwrap_or_default();
        format!("{} revision {revision}, change {id}\n{enforced}", paint.good("applied:"))
    })
}

fn unchanged(revision: Revision, paint: Paint) -> String {
    format!("{} revision {revision} holds what the directory says\n", paint.good("nothing to change:"))
}

fn counted(changes: usize) -> String {
    if changes == 1 { "1 change".to_owned() } else { format!("{changes} changes") }
}

/// The tests of the directory that its policies do not hold to, or that cannot be read, and why. They are what its author said must hold, so
/// every apply says so; only `--tested` makes it a refusal, because a policy is often changed before its tests.
pub fn failing(directory: &Directory) -> Result<Vec<String>, Failure> {
    let (tested, mistakes) = policy::run_tests(directory)?;
    let mistaken = mistakes.into_iter().map(|mistake| {
        let (line, column) = mistake.position();
        format!("{}:{line}:{column}: {mistake}", mistake.file)
    });
    Ok(tested.into_iter().filter_map(policy::Tested::failed).chain(mistaken).collect())
}

/// What a failing test is called, wherever it is told.
pub fn failing_test(failed: &str) -> String {
    format!("a test of the directory fails: {failed}")
}

fn refused(failing: &[String]) -> Failure {
    let failure =
        Failure::refused(format!("{} of the directory's policy tests fail, so nothing was changed", failing.len()));
    let failure = failing.iter().fold(failure, |failure, failed| failure.cause(failed));
    failure.help("correct the policies or the tests; `countersign policy test` runs them alone")
}

/// Applies `directory`, and shows the difference that it made. Someone else's change in between means planning again.
pub async fn apply_directory(
    control: &Client,
    directory: &Directory,
    who: &Who,
    paint: Paint,
) -> Result<(Outcome, String), Failure> {
    let mut attempts = 0;
    loop {
        let Planned { on, plan } = planned(control, directory).await?;
        if plan.is_empty() {
            return Ok((Outcome::Unchanged { revision: on.revision }, String::new()));
        }
        let shown = difference(&plan.change_set.changes, &plan.bodies, Some(&on), paint);
        let changes = plan.change_set.changes.iter().map(named).collect();
        let apply = Apply { change_set: plan.change_set, bodies: plan.bodies };
        let asked = ApplyAs { apply, shown: who.shown() };
        match control.post::<Applied>("/v1/changes", &asked).await {
            Ok(Applied { revision, digest, protected, .. }) => {
                return Ok((Outcome::Applied { revision, digest, changes, protected }, shown));
            }
            Err(failure) if failure.kind() == Kind::Moved && attempts < ATTEMPTS_MAX => attempts += 1,
            Err(failure) => return Err(failure),
        }
    }
}

/// Applies `directory` to the mesh as this command verified it, signed here.
async fn sign_directory(
    control: &Client,
    directory: &Directory,
    who: &Who,
    paint: Paint,
) -> Result<(Outcome, String), Failure> {
    let ground = sign::verified(control, who).await?;
    let plan = planned_on(directory, &ground.mesh)?;
    if plan.is_empty() {
        return Ok((Outcome::Unchanged { revision: ground.mesh.revision }, String::new()));
    }
    let shown = difference(&plan.change_set.changes, &plan.bodies, Some(&ground.mesh), paint);
    let changes = plan.change_set.changes.iter().map(named).collect();
    let apply = Apply { change_set: plan.change_set, bodies: plan.bodies };
    let Applied { revision, digest, protected, .. } = sign::ask(control, &ground, who, apply).await?;
    Ok((Outcome::Applied { revision, digest, changes, protected }, shown))
}

fn named(change: &Change) -> String {
    format!("{} {}", change.kind(), change.subject())
}

async fn planned(control: &Client, directory: &Directory) -> Result<Planned, Failure> {
    let on: Mesh = control.get("/v1/mesh").await?;
    let plan = planned_on(directory, &on)?;
    Ok(Planned { on, plan })
}

fn planned_on(directory: &Directory, on: &Mesh) -> Result<directory::Plan, Failure> {
    let plan = directory::plan(directory, &on.state, on.revision).map_err(|e| {
        Failure::new("this directory is about another mesh")
            .because(&e)
            .help("correct `trust_domain` in mesh.toml, or use another `--data-dir`")
    })?;
    if let (Some(signers), Some(seal)) = (plan.too_few_signers, directory.seal) {
        render::print_error(&format!(
            "{} not sealed as `[seal]` says yet: {} operators have to sign each change, {signers} have a key that can\n",
            Paint::stderr().warn("warning:"),
            seal.quorum,
        ));
    }
    Ok(plan)
}
