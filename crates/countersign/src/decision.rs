//! `decision tail`, `decision list` and `decision show`: what the proxies decided, and why.

use std::{fmt::Write as _, time::Duration};

use serde::Serialize;

use countersign_api::local::{DecisionDetail, Status, TailEvent};
use countersign_core::{
    change::PolicyId,
    gate::act::Act,
    identity::{SpiffeId, TrustDomain},
    policy::{Decision, Query},
    record::{DecisionRecord, EdgeCount, Inputs, Judged, Outcome, Reason},
    risk::Condition,
};

use crate::{
    cli::Filter,
    client::{Client, query},
    error::{Done, Failure},
    mesh_finder::Place,
    operator::Asker,
    policy,
    render::{self, Output, Paint, cell, verdict},
};

/// Shows decisions as they happen.
pub async fn tail(place: &Place, filter: Filter, asker: &Asker, output: Output) -> Done {
    let control = asker.opens(Client::control(place), Act::ReadDecisions).await?;
    let own = control.get::<Status>("/v1/status").await?.trust_domain;
    let mut lines = control.lines(&format!("/v1/decisions/tail{}", filtered(&filter))).await?;
    let mut left = filter.limit.unwrap_or(u32::MAX);
    loop {
        let Some(event) = lines.next::<TailEvent>().await? else {
            return Err(Failure::new("the control plane ended the tail")
                .help("in a protected mesh it lasts as long as what a factor opened: show one again"));
        };
        match output {
            Output::Json => render::print(&render::json_line(&event)),
            Output::Text => render::print(&line(&event, own.as_ref(), Paint::stdout())),
        }
        left -= 1;
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// Lists kept records, newest first.
pub async fn list(place: &Place, filter: Filter, asker: &Asker, output: Output) -> Done {
    let control = asker.opens(Client::control(place), Act::ReadDecisions).await?;
    let own = control.get::<Status>("/v1/status").await?.trust_domain;
    let records: Vec<DecisionRecord> = control.get(&format!("/v1/decisions{}", filtered(&filter))).await?;
    render::answer(output, &records, |records, paint| {
        let rows = records.iter().map(|record| {
            let inputs = &record.inputs;
            vec![
                cell(render::moment(record.at_ms)),
                verdict(record.outcome.as_str(), record.outcome == Outcome::Permit),
                cell(short(&inputs.principal, own.as_ref())),
                cell(&inputs.action),
                cell(format!("{}{}", inputs.service, inputs.path)),
                cell(record.reason.as_str()),
                cell(record.policies.join(", ")),
                cell(record.revision),
                cell(&record.id),
            ]
        });
        let headings = ["AT", "OUTCOME", "PRINCIPAL", "ACTION", "OPERATION", "REASON", "POLICIES", "REVISION", "ID"];
        render::table(&headings, rows, paint)
    })
}

/// One record, and what judging it again says.
#[derive(Debug, Serialize)]
struct Shown {
    record: DecisionRecord,
    replay: Replay,
}

/// The same question put to the law at the record's revision.
#[derive(Debug, Serialize)]
struct Replay {
    /// Whether outcome, reason and policies are those of the record.
    agrees: bool,
    outcome: Outcome,
    reason: Reason,
    policies: Vec<PolicyId>,
}

/// Shows one record and judges it again.
pub async fn show(place: &Place, id: &str, asker: &Asker, output: Output) -> Done {
    let detail = detail(Client::control(place), id, asker).await?;
    let replay = replay(&detail)?;
    let shown = Shown { record: detail.record.clone(), replay };
    render::answer(output, &shown, |shown, paint| text(shown, &detail, paint))?;
    if shown.replay.agrees {
        return Ok(());
    }
    Err(Failure::new("judging this record again gives another answer")
        .cause(format!(
            "the proxy recorded {}, the law at revision {} says {}",
            shown.record.outcome.as_str(),
            shown.record.revision,
            shown.replay.outcome.as_str()
        ))
        .help("the proxy, the record or the ledger is not what it should be: run `countersign ledger verify`"))
}

/// One record and the mesh that it was judged in, opened for `asker`.
pub async fn detail(control: Client, id: &str, asker: &Asker) -> Result<DecisionDetail, Failure> {
    let path = format!("/v1/decisions/{}", id_segment(id)?);
    asker.opens(control, Act::ReadDecisions).await?.get(&path).await
}

/// An id is hexadecimal; anything else would be another path.
fn id_segment(id: &str) -> Result<&str, Failure> {
    if !id.is_empty() && id.len() <= 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(id);
    }
    Err(Failure::usage(format!("`{}` is not the id of a decision", render::tame(id)))
        .help("an id has up to 32 hexadecimal digits: see `countersign decision list`"))
}

fn replay(detail: &DecisionDetail) -> Result<Replay, Failure> {
    let record = &detail.record;
    // What a proxy refuses before the law is asked has no policies to ask again.
    if matches!(record.reason, Reason::NotDeclared | Reason::NotAWorkload) {
        return Ok(Replay {
            agrees: true,
            outcome: record.outcome,
            reason: record.reason,
            policies: record.policies.to_vec(),
        });
    }
    let decision = judge(detail, &record.inputs)?;
    Ok(Replay {
        agrees: (decision.outcome, decision.reason) == (record.outcome, record.reason)
            && same(&decision.policies, &record.policies),
        outcome: decision.outcome,
        reason: decision.reason,
        policies: decision.policies.to_vec(),
    })
}

fn same(a: &[PolicyId], b: &[PolicyId]) -> bool {
    let sorted = |ids: &[PolicyId]| {
        let mut ids = ids.to_vec();
        ids.sort();
        ids
    };
    sorted(a) == sorted(b)
}

fn judge(detail: &DecisionDetail, inputs: &Inputs) -> Result<Decision, Failure> {
    Ok(policy::law_of(&detail.mesh, &inputs.service)?.decide(&Query::of(inputs)))
}

fn text(shown: &Shown, detail: &DecisionDetail, paint: Paint) -> String {
    let Shown { record, replay } = shown;
    let inputs = &record.inputs;
    let mut text = format!(
        "{} {} {}\n",
        outcome(record.outcome, paint),
        paint.strong(&format!(
            "{} {} {}{}",
            short(&inputs.principal, detail.mesh.state.trust_domain.as_ref()),
            inputs.action,
            inputs.service,
            render::tame(&inputs.path)
        )),
        paint.dim(&record.id),
    );
    let mut say = |label: &str, value: String| {
        let _ = writeln!(text, "{} {}", paint.dim(&format!("{label:<13}")), render::tame(&value));
    };
    say("reason", record.reason.in_words().to_owned());
    say("at", render::moment_full(record.at_ms));
    say("revision", record.revision.to_string());
    if record.signal_seq > 0 {
        say("signal", record.signal_seq.to_string());
    }
    say("judged", format!("{} by the proxy of {}, in {} ns", judged(record), record.instance, record.judge_ns));
    say("principal", inputs.principal.to_string());
    if let Some(operation) = &inputs.operation {
        say("operation", operation.to_string());
    }
    say("host", inputs.host.to_string());
    say("method", format!("{} over {}", inputs.method, inputs.protocol));
    say("size", inputs.size.map_or_else(|| "not declared".to_owned(), |size| format!("{size} bytes")));
    say("origin", inputs.origin.to_string());
    say("first contact", if inputs.first_contact { "yes" } else { "no" }.to_owned());
    let Condition { risk, posture, contained } = inputs.condition;
    if contained {
        say("contained", "yes".to_owned());
    }
    if risk > 0 {
        say("risk", risk.to_string());
    }
    for (name, said) in [("compliant", posture.compliant), ("managed", posture.managed)] {
        if let Some(said) = said {
            say(name, if said { "yes" } else { "no" }.to_owned());
        }
    }
    if let Some(token) = &inputs.token {
        let id = token.id.map_or_else(|| "one whose id is not known".to_owned(), |id| id.to_string());
        say(
            "token",
            match token.fault {
                None => format!("{id} for {}", token.scope),
                Some(fault) => format!("{id}, not believed: {}", fault.in_words()),
            },
        );
    }
    if let Some(trace) = &record.trace_id {
        say("trace", trace.to_string());
    }
    if let Some(ended) = &record.ended {
        let span = Duration::from_micros(ended.duration_us);
        say(
            "ended",
            format!(
                "status {} after {span:?}, {} bytes in, {} bytes out",
                ended.status, ended.bytes_in, ended.bytes_out
            ),
        );
    }
    if record.reason == Reason::NotInContract {
        text.push_str("\nno policy was asked: what is no operation of the contract is denied\n");
    } else if matches!(record.reason, Reason::TokenMissing | Reason::TokenRefused | Reason::TokenScope) {
        text.push_str("\npolicies alone do not permit it: `countersign token list` shows which tokens there are\n");
    } else if record.reason == Reason::EdgeHeld {
        text.push_str("\npolicies permit it, and nobody has approved the edge: `countersign edge list --held`\n");
    } else if record.policies.is_empty() {
        text.push_str("\nno policy decided: what no policy permits is denied\n");
    }
    for id in record.policies.iter() {
        let policy = detail.mesh.state.policies.get(id);
        let file = policy.map_or("not in this revision", |policy| &policy.file);
        let _ = writeln!(text, "\n{} {}", paint.strong(&format!("policy {id}")), paint.dim(file));
        if let Some(body) = policy.and_then(|policy| detail.mesh.bodies.get(&policy.body)) {
            body.trim().lines().for_each(|line| {
                let _ = writeln!(text, "  {line}");
            });
        }
    }
    let _ = match replay.agrees {
        true => writeln!(
            text,
            "\n{} judged again at revision {}: the same answer",
            paint.good("replay agrees:"),
            detail.mesh.revision
        ),
        false => writeln!(
            text,
            "\n{} judged again at revision {}: {} ({}), by {}",
            paint.bad("replay differs:"),
            detail.mesh.revision,
            replay.outcome.as_str(),
            replay.reason.as_str(),
            crate::status::join(&replay.policies)
        ),
    };
    text
}

/// One line of a tail.
pub fn line(event: &TailEvent, own: Option<&TrustDomain>, paint: Paint) -> String {
    match event {
        TailEvent::Record(record) => {
            let inputs = &record.inputs;
            let why =
                if record.policies.is_empty() { String::new() } else { format!(" by {}", record.policies.join(", ")) };
            let open = if record.judged == Judged::WhileOpen { " while open" } else { "" };
            let first = if inputs.first_contact { ", first contact" } else { "" };
            format!(
                "{} {} {} {} {}{} {}\n",
                paint.dim(&render::moment(record.at_ms)),
                outcome(record.outcome, paint),
                short(&inputs.principal, own),
                inputs.action,
                inputs.service,
                render::tame(&inputs.path),
                paint.dim(&format!(
                    "{}{why}{open}{first}, revision {}, {}",
                    record.reason.as_str(),
                    record.revision,
                    record.id
                )),
            )
        }
        TailEvent::Edge(edge) => {
            let EdgeCount { principal, service, action, permits, revision } = edge;
            format!(
                "{} {} {} {action} {service} {}\n",
                paint.dim(&render::moment(render::now_ms())),
                outcome(Outcome::Permit, paint),
                short(principal, own),
                paint.dim(&format!("{}, revision {revision}", times(*permits))),
            )
        }
        TailEvent::Shed(count) => format!("{} {count} records found no room\n", paint.warn("shed")),
    }
}

fn times(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// The outcome, painted.
pub fn outcome(outcome: Outcome, paint: Paint) -> String {
    let text = format!("{:<7}", outcome.as_str());
    match outcome {
        Outcome::Permit => paint.good(&text),
        Outcome::StepUp => paint.warn(&text),
        Outcome::Deny => paint.bad(&text),
    }
}

fn judged(record: &DecisionRecord) -> &'static str {
    match record.judged {
        Judged::AtStart => "at its start",
        Judged::WhileOpen => "while it was open",
        Judged::AsProbe => "as a probe of the sidecar by itself",
    }
}

/// A workload of the own mesh by its service name, any other by its full id: a stranger must not look familiar.
pub fn short(id: &SpiffeId, own: Option<&TrustDomain>) -> String {
    let own = own.filter(|own| own.as_str() == id.trust_domain());
    own.and_then(|_| id.service()).map_or_else(|| id.to_string(), |service| service.to_string())
}

fn filtered(filter: &Filter) -> String {
    let since_ms =
        filter.since.map(|since| render::now_ms().saturating_sub(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)));
    query([
        ("service", filter.service.as_ref().map(ToString::to_string)),
        ("principal", filter.principal.clone()),
        ("outcome", filter.outcome.map(|outcome| outcome.as_str().to_owned())),
        ("since_ms", since_ms.map(|ms| ms.to_string())),
        ("probes", filter.probes.then(|| "true".to_owned())),
        ("first_contact", filter.first_contact.then(|| "true".to_owned())),
        ("limit", filter.limit.map(|limit| limit.to_string())),
    ])
}
