//! How times, states and changes are said on pages. Pure; what is said comes from exactly the bytes that are hashed.

use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use countersign_api::local::{Proposal, ProposalState};
use countersign_core::{
    change::{Bodies, Change, Edge},
    difference,
    record::Outcome,
    state::MeshState,
};

/// Unchanged lines around each changed one.
const CONTEXT_LINES: usize = 3;
/// Changes of one change-set that are rendered at most.
pub const CHANGES_MAX: usize = 500;
/// Lines of one change that are rendered at most.
const LINES_MAX: usize = 2_000;

/// A moment, for people and for machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct When {
    /// RFC 3339.
    pub iso: String,
    /// Date and time.
    pub text: String,
    /// How far away.
    pub ago: String,
}

impl When {
    /// Both in milliseconds since 1970.
    pub fn of(at_ms: u64, now_ms: u64) -> Self {
        let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
        Self {
            iso: at.format(&Rfc3339).unwrap_or_default(),
            text: at.format(form).unwrap_or_default(),
            ago: distance(at_ms, now_ms),
        }
    }
}

fn distance(at_ms: u64, now_ms: u64) -> String {
    let span = match at_ms.abs_diff(now_ms) / 1000 {
        0..5 => return "now".to_owned(),
        s @ 5..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    };
    if at_ms > now_ms { format!("in {span}") } else { format!("{span} ago") }
}

/// What a change-set does, in one line: its first change, and how many more.
pub fn title(changes: &[String]) -> String {
    let Some((kind, subject)) = changes.first().and_then(|first| first.split_once(' ')) else {
        return "nothing".to_owned();
    };
    let verb = match kind {
        _ if kind.starts_with("remove") => "Remove",
        "invite_operator" => "Invite",
        "enroll_operator" => "Enrol",
        "add_factor" => "Add",
        "recover" => "Recover",
        "create_mesh" => "Create",
        _ => "Set",
    };
    match changes.len() - 1 {
        0 => format!("{verb} {subject}"),
        1 => format!("{verb} {subject} and one more change"),
        more => format!("{verb} {subject} and {more} more changes"),
    }
}

/// What a proposal waits for, or what became of it.
pub fn missing(proposal: &Proposal) -> String {
    match &proposal.state {
        ProposalState::StepUp => format!("its author shows {}", proposal.requires),
        ProposalState::NeedsCountersign => format!("it waits for {}", proposal.requires),
        ProposalState::Applied { revision } => format!("applied, as revision {revision}"),
        ProposalState::Rejected { by } => format!("rejected by {by}"),
        ProposalState::Withdrawn => "withdrawn by its author".to_owned(),
        ProposalState::Expired => "its time was over".to_owned(),
        ProposalState::Void { revision } => format!("void: revision {revision} changed what it is about"),
    }
}

/// An outcome, and how it looks.
pub fn outcome(outcome: Outcome) -> (&'static str, &'static str) {
    match outcome {
        Outcome::Permit => ("permitted", "good"),
        Outcome::StepUp => ("step-up", "warn"),
        Outcome::Deny => ("denied", "bad"),
    }
}

/// One change, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// `added`, `changed` or `removed`.
    pub verb: &'static str,
    /// How that looks.
    pub tone: &'static str,
    /// What it is about.
    pub subject: String,
    /// Where it stands, when it is a policy.
    pub file: Option<String>,
    /// What it means, where a difference does not say it.
    pub words: Option<String>,
    /// What went and what came.
    pub lines: Vec<Line>,
}

/// One line of a difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its class in the stylesheet.
    pub class: &'static str,
    /// `+`, `-`, a space, or nothing.
    pub sign: &'static str,
    /// The line.
    pub text: String,
}

/// The difference that `changes` make to `before`, the first [`CHANGES_MAX`] of them. `bodies` holds the texts that they bring.
pub fn difference(changes: &[Change], before: Option<(&MeshState, &Bodies)>, bodies: &Bodies) -> Vec<Shown> {
    let state = before.map(|(state, _)| state);
    changes
        .iter()
        .take(CHANGES_MAX)
        .map(|change| {
            let of = difference::of(change, before, bodies);
            let (verb, tone) = match (&of.before, &of.after) {
                (None, _) => ("added", "good"),
                (Some(_), None) => ("removed", "bad"),
                (Some(_), Some(_)) => ("changed", "warn"),
            };
            Shown {
                verb,
                tone,
                subject: of.subject,
                file: of.file.map(|file| file.to_string()),
                words: words(change, state),
                lines: lines(&of.before.unwrap_or_default(), &of.after.unwrap_or_default()),
            }
        })
        .collect()
}

fn lines(old: &str, new: &str) -> Vec<Line> {
    let compared = similar::TextDiff::from_lines(old, new);
    let mut lines = Vec::new();
    for hunk in compared.unified_diff().context_radius(CONTEXT_LINES).iter_hunks() {
        lines.push(Line { class: "at", sign: "", text: hunk.header().to_string() });
        lines.extend(hunk.iter_changes().map(|change| {
            let (class, sign) = match change.tag() {
                similar::ChangeTag::Equal => ("", " "),
                similar::ChangeTag::Delete => ("went", "-"),
                similar::ChangeTag::Insert => ("came", "+"),
            };
            Line { class, sign, text: change.value().trim_end_matches('\n').to_owned() }
        }));
    }
    if lines.len() > LINES_MAX {
        let more = lines.len() - LINES_MAX;
        lines.truncate(LINES_MAX);
        lines.push(Line { class: "at", sign: "", text: format!("{more} more lines, in the canonical bytes below") });
    }
    lines
}

/// What a change of people and guards means.
fn words(change: &Change, state: Option<&MeshState>) -> Option<String> {
    Some(match change {
        Change::InviteOperator { name, roles } if roles.is_empty() => {
            format!("{name} is invited, with no role: they enrol a factor before they can do anything.")
        }
        Change::InviteOperator { name, roles } => {
            format!(
                "{name} is invited, as {}: they enrol a factor before they can do anything.",
                roles.iter().map(|r| &**r).collect::<Vec<_>>().join(", ")
            )
        }
        Change::EnrollOperator { name, .. } => match state.is_some_and(MeshState::is_protected) {
            true => format!("{name} enrols with this factor and can act from here on."),
            false => format!("{name} becomes the first owner. From here on nobody changes the mesh without a factor."),
        },
        Change::AddFactor { operator, .. } => format!("{operator} can prove who they are with one more factor."),
        Change::RemoveFactor { operator, .. } => {
            format!("This factor of {operator} proves nothing any more; sessions that began with it end.")
        }
        Change::RemoveOperator { name } => {
            format!("{name} can do nothing any more; their factors go and their sessions end.")
        }
        Change::SetGatePolicy { .. } | Change::RemoveGatePolicy { .. } => {
            "This is the change gate: it decides who may change what, and what they have to show.".to_owned()
        }
        Change::SetAuthenticators { .. } => {
            "From here on only authenticators of these models are enrolled, and they have to prove it. Factors that are \
             enrolled stay."
                .to_owned()
        }
        Change::RemoveAuthenticators {} => "From here on any authenticator may be enrolled.".to_owned(),
        Change::SetLifetimes { lifetimes } => format!(
            "What the authority signs from here on is good for {} minutes; what is signed already keeps what it has.",
            lifetimes.svid_seconds / 60
        ),
        Change::RemoveLifetimes {} => "What the authority signs from here on is good for an hour, as where nothing is said.".to_owned(),
        Change::SealSettings { quorum } => {
            format!("From here on agents refuse every change that fewer than {quorum} operators signed.")
        }
        Change::Recover { operator, reason, .. } => {
            format!(
                "{operator} was made owner past the gate, with the control plane's files. The reason given: {reason}"
            )
        }
        Change::Deploy { service, .. } => {
            format!("Only these executables or images run as {service}; any other stays quarantined.")
        }
        Change::QuarantineService { name } => {
            format!("{name} is declared, and found by nobody, until an operator approves it.")
        }
        Change::ApproveService { name } => {
            format!("{name} becomes part of the mesh: every workload finds it, and policies say who may call whom.")
        }
        Change::SuspendService { name, .. } => {
            format!("{name} is as if it were not there: what it and its callers have open is cut at once.")
        }
        Change::ResumeService { name } => format!("{name} is part of the mesh again."),
        Change::ApproveEdge { service, edge: Edge { caller, operation } } => format!(
            "{caller} may come to {service} {}, as far as policies permit it.",
            operation.as_deref().map_or_else(|| "in every way".to_owned(), |operation| format!("by {operation}"))
        ),
        Change::RevokeEdge { service, edge } => {
            format!("{service} holds what {} asks for again; what is open of it is cut at once.", edge.caller)
        }
        Change::SetPipeline { name, .. } => format!("Pipeline {name} may propose changes; operators countersign them."),
        Change::SetSignIn { name, .. } => format!("Who is in these groups at {name} gets these roles of the mesh."),
        Change::SetClient { name, .. } => format!("Client {name}, which is no workload, gets tokens for these services."),
        Change::RemoveClient { name } => format!("Client {name} gets no more tokens, and nobody believes those that it has."),
        Change::RemoveSignIn { name } => format!("Groups at {name} mean nothing here any more."),
        Change::RotateSealingKey { .. } => {
            "The control plane seals its own keys with another key-encryption key.".to_owned()
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_names_the_first_change_and_counts_the_others() {
        for (changes, expected) in [
            (&[][..], "nothing"),
            (&["set_policy policy web-reads"], "Set policy web-reads"),
            (&["remove_role role staff", "set_role role desk"], "Remove role staff and one more change"),
            (&["invite_operator operator bob", "a b", "c d"], "Invite operator bob and 2 more changes"),
        ] {
            let changes: Vec<String> = changes.iter().map(|text| (*text).to_owned()).collect();
            assert_eq!(title(&changes), expected);
        }
    }

    #[test]
    fn times_are_said_from_where_one_stands() {
        for (at, now, expected) in [
            (10_000, 10_900, "now"),
            (10_000, 70_000, "60 s ago"),
            (400_000, 10_000, "in 6 min"),
            (0, 10_800_000, "3 h ago"),
        ] {
            assert_eq!(distance(at, now), expected);
        }
        assert_eq!(When::of(1_790_000_000_000, 0).text, "2026-09-21 14:13:20 UTC");
    }

    #[test]
    fn what_went_and_what_came_are_told_apart_and_bounded() {
        let shown = lines("a\nb\n", "a\nc\n");
        let told: Vec<_> = shown.iter().map(|line| format!("{}{}", line.sign, line.text)).collect();
        assert_eq!(told, ["@@ -1,2 +1,2 @@", " a", "-b", "+c"]);
        let long: String = (0..LINES_MAX + 10).map(|n| format!("{n}\n")).collect();
        assert_eq!(lines("", &long).len(), LINES_MAX + 1);
    }
}
