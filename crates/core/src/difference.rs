//! What a change changes, for people: the text that it replaces and the text that it brings. The command line and the pages show
//! these, line by line, so that both say the same of the very change that is hashed.

use std::sync::Arc;

use serde::Serialize;

use crate::{
    assurance::authenticators::Authenticators,
    canonical::Digest,
    change::{Bodies, Change, Edge},
    contract::Contract,
    lifetimes::Lifetimes,
    operator::{EnrolledFactor, Operator},
    service::ServiceSpec,
    state::{Barred, MeshState},
};

/// One change with both texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What it is about: `policy web-reads-catalog`.
    pub subject: String,
    /// The file that a policy stands in.
    pub file: Option<Arc<str>>,
    /// What is in force; absent when it adds something, or when that is not known.
    pub before: Option<String>,
    /// What it would be; absent when it takes something away.
    pub after: Option<String>,
}

/// What `change` does to the mesh `before` it, if that is known; texts that it brings are in `brought`.
pub fn of(change: &Change, before: Option<(&MeshState, &Bodies)>, brought: &Bodies) -> Difference {
    let file = match change {
        Change::SetPolicy { file, .. } | Change::SetGatePolicy { file, .. } => Some(file.clone()),
        _ => None,
    };
    let text_before = before.and_then(|(state, bodies)| text_before(change, state, bodies));
    // A text that is in force already does not come again.
    let known = before.map(|(_, bodies)| bodies);
    Difference { subject: change.subject(), file, before: text_before, after: text_after(change, brought, known) }
}

fn text_before(change: &Change, state: &MeshState, bodies: &Bodies) -> Option<String> {
    match change {
        // An enrolment brings a factor and replaces nothing.
        Change::CreateMesh { .. } | Change::EnrollOperator { .. } => None,
        Change::DeclareService { name, .. } | Change::RemoveService { name } => {
            state.services.get(name).map(|service| declared(&service.spec, |digest| bodies.get(digest)))
        }
        Change::SetRole { name, .. } | Change::RemoveRole { name } => state.roles.get(name).map(lines),
        Change::SetPolicy { id, .. } | Change::RemovePolicy { id } => {
            state.policies.get(id).map(|policy| body(&policy.body, bodies))
        }
        Change::SetRoute { name, .. } | Change::RemoveRoute { name } => state.routes.get(name).map(toml),
        Change::InviteOperator { name, .. }
        | Change::RemoveOperator { name }
        | Change::SetOperatorRoles { name, .. } => state.operators.get(name).map(operator),
        Change::AddFactor { operator, id, .. } | Change::RemoveFactor { operator, id } => {
            state.operators.get(operator).and_then(|operator| operator.factors.get(id)).map(factor)
        }
        Change::SetGatePolicy { id, .. } | Change::RemoveGatePolicy { id } => {
            state.gate.get(id).map(|policy| body(&policy.body, bodies))
        }
        Change::SetAuthenticators { .. } | Change::RemoveAuthenticators {} => {
            state.authenticators.as_ref().map(authenticators)
        }
        Change::SetLifetimes { .. } | Change::RemoveLifetimes {} => Some(lifetimes(&state.lifetimes())),
        Change::SealSettings { .. } => state.seal.map(|seal| sealed(seal.quorum)),
        Change::Deploy { service, .. } => state.deployments.get(service).map(lines),
        Change::QuarantineService { name }
        | Change::ApproveService { name }
        | Change::SuspendService { name, .. }
        | Change::ResumeService { name } => state.services.contains_key(name).then(|| standing(state.barred.get(name))),
        Change::ApproveEdge { service, edge } | Change::RevokeEdge { service, edge } => {
            Some(approved(edge, state.edges.get(service).is_some_and(|edges| edges.contains(edge))))
        }
        Change::SetIssuer { name, .. } | Change::RemoveIssuer { name } => state.issuers.get(name).map(toml),
        Change::SetPipeline { name, .. } | Change::RemovePipeline { name } => state.pipelines.get(name).map(toml),
        Change::SetSignIn { name, .. } | Change::RemoveSignIn { name } => state.sign_ins.get(name).map(toml),
        Change::SetClient { name, .. } | Change::RemoveClient { name } => state.clients.get(name).map(toml),
        Change::RotateSealingKey { .. } => state.sealing_key.map(|fingerprint| format!("{fingerprint}\n")),
        Change::Recover { operator: name, .. } => state.operators.get(name).map(operator),
    }
}

fn text_after(change: &Change, brought: &Bodies, known: Option<&Bodies>) -> Option<String> {
    let body = |digest: &Digest| match known {
        Some(known) if brought.get(digest).is_none() => body(digest, known),
        _ => body(digest, brought),
    };
    match change {
        Change::CreateMesh { trust_domain } => Some(format!("trust_domain = \"{trust_domain}\"\n")),
        Change::DeclareService { spec, .. } => {
            Some(declared(spec, |digest| brought.get(digest).or_else(|| known?.get(digest))))
        }
        Change::SetRole { members, .. } => Some(lines(members)),
        Change::SetPolicy { body: digest, .. } => Some(body(digest)),
        Change::SetRoute { route, .. } => Some(toml(route)),
        Change::InviteOperator { roles, .. } | Change::SetOperatorRoles { roles, .. } => Some(lines(roles)),
        Change::EnrollOperator { factor: enrolled, .. } | Change::AddFactor { factor: enrolled, .. } => {
            Some(factor(enrolled))
        }
        Change::SetGatePolicy { body: digest, .. } => Some(body(digest)),
        Change::SetAuthenticators { authenticators: given } => Some(authenticators(given)),
        Change::SetLifetimes { lifetimes: given } => Some(lifetimes(given)),
        Change::RemoveLifetimes {} => Some(lifetimes(&Lifetimes::default())),
        Change::SealSettings { quorum } => Some(sealed(*quorum)),
        Change::Deploy { artifacts, .. } => Some(lines(artifacts)),
        Change::QuarantineService { .. } => Some(standing(Some(&Barred::Quarantined))),
        Change::SuspendService { reason, .. } => Some(standing(Some(&Barred::Suspended { reason: reason.clone() }))),
        Change::ApproveService { .. } | Change::ResumeService { .. } => Some(standing(None)),
        Change::ApproveEdge { edge, .. } => Some(approved(edge, true)),
        Change::RevokeEdge { edge, .. } => Some(approved(edge, false)),
        Change::SetIssuer { issuer, .. } => Some(toml(issuer)),
        Change::SetPipeline { pipeline, .. } => Some(toml(pipeline)),
        Change::SetSignIn { sign_in, .. } => Some(toml(sign_in)),
        Change::SetClient { client, .. } => Some(toml(client)),
        Change::RotateSealingKey { fingerprint } => Some(format!("{fingerprint}\n")),
        Change::Recover { factor: enrolled, reason, .. } => Some(format!("{}reason = {reason:?}\n", factor(enrolled))),
        Change::RemoveService { .. }
        | Change::RemoveRole { .. }
        | Change::RemovePolicy { .. }
        | Change::RemoveRoute { .. }
        | Change::RemoveFactor { .. }
        | Change::RemoveOperator { .. }
        | Change::RemoveAuthenticators {}
        | Change::RemoveGatePolicy { .. }
        | Change::RemoveIssuer { .. }
        | Change::RemovePipeline { .. }
        | Change::RemoveSignIn { .. }
        | Change::RemoveClient { .. } => None,
    }
}

/// Whether a service is part of the mesh, and what that means.
fn standing(barred: Option<&Barred>) -> String {
    match barred {
        None => "active: found by every workload, and calls what policies permit\n".to_owned(),
        Some(Barred::Quarantined) => "quarantined: found by nobody, and reaches nobody\n".to_owned(),
        Some(Barred::Suspended { reason }) => {
            format!("suspended: found by nobody, and reaches nobody\nreason = {reason:?}\n")
        }
    }
}

/// Whether an edge is open where new ones are held.
fn approved(edge: &Edge, is_approved: bool) -> String {
    let held = if is_approved { "approved" } else { "held, unless approved by another entry" };
    let operation = edge.operation.as_deref().map_or_else(|| "in every way".to_owned(), |name| format!("by {name:?}"));
    format!("{} {operation}: {held}\n", edge.caller)
}

/// What a service declares, with the operations of its contract: what is hashed is their list.
fn declared<'b>(spec: &ServiceSpec, text_of: impl Fn(&Digest) -> Option<&'b Arc<str>>) -> String {
    let mut text = toml(spec);
    let Some(digest) = spec.contract else { return text };
    match text_of(&digest).map(|body| Contract::of_body(body)) {
        Some(Ok(contract)) => {
            for operation in contract.operations() {
                text += &format!("operation {:?} = {} {}\n", operation.name, operation.method, operation.path);
            }
        }
        Some(Err(what)) => text += &format!("({what})\n"),
        None => text += &format!("(contract {digest} is not here)\n"),
    }
    text
}

fn toml<T: Serialize>(value: &T) -> String {
    toml::to_string(value).expect("INVARIANT: specs, routes, issuers, pipelines and sign-ins were read from TOML")
}

fn lines<'a, T: ToString + 'a>(members: impl IntoIterator<Item = &'a T>) -> String {
    members.into_iter().map(|member| member.to_string() + "\n").collect()
}

fn operator(operator: &Operator) -> String {
    lines(&operator.roles)
}

fn factor(factor: &EnrolledFactor) -> String {
    match factor.signing_key() {
        None => format!("{}\n", factor.kind().as_str()),
        Some(key) => format!(
            "{}, {} key {}{}\nfor {}\n",
            factor.kind().as_str(),
            key.key.algorithm(),
            Digest::of(key.key.cose()).short(),
            key.model.map(|model| format!(", model {model}")).unwrap_or_default(),
            key.relying_party.origins.join(", "),
        ),
    }
}

fn authenticators(list: &Authenticators) -> String {
    let models = list.models.iter().map(|model| format!("model {model}\n"));
    models.chain(list.roots.iter().map(|root| format!("vouched for by {root}\n"))).collect()
}

fn lifetimes(given: &Lifetimes) -> String {
    let Lifetimes { svid_seconds, intermediate_days, root_days } = given;
    format!(
        "an SVID lives for {svid_seconds} s\nan intermediate for {intermediate_days} days\na root for {root_days} days\n"
    )
}

fn sealed(quorum: u32) -> String {
    format!("every change is signed by {quorum} of the operators\n")
}

fn body(digest: &Digest, bodies: &Bodies) -> String {
    bodies.get(digest).map_or_else(|| format!("(text {digest} is not here)\n"), |text| format!("{}\n", text.trim_end()))
}
