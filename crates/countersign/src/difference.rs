//! What a change-set changes, for people: each change with the text it replaces and the text it brings.

use std::fmt::Write as _;

use serde::Serialize;

use countersign_api::local::Mesh;
use countersign_core::{
    canonical::Digest,
    change::{Bodies, Change},
    operator::{EnrolledFactor, Operator},
};

use crate::{diff, render, render::Paint};

/// Renders `changes`, which refer to texts in `bodies`, as unified differences against `before`.
pub fn difference(changes: &[Change], bodies: &Bodies, before: Option<&Mesh>, paint: Paint) -> String {
    let mut text = String::new();
    for change in changes {
        let (old, new) = (before.and_then(|mesh| text_before(change, mesh)), text_after(change, bodies));
        let sign = match (&old, &new) {
            (None, _) => paint.good("+"),
            (Some(_), None) => paint.bad("-"),
            (Some(_), Some(_)) => paint.warn("~"),
        };
        let file = match change {
            Change::SetPolicy { file, .. } | Change::SetGatePolicy { file, .. } => {
                paint.dim(&format!(" {}", render::tame(file)))
            }
            _ => String::new(),
        };
        let _ = writeln!(text, "{sign} {}{file}", paint.strong(&render::tame(&change.subject())));
        for line in diff::unified(&old.unwrap_or_default(), &new.unwrap_or_default(), paint).lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

fn text_before(change: &Change, mesh: &Mesh) -> Option<String> {
    let state = &mesh.state;
    match change {
        // An enrolment brings a factor and replaces nothing.
        Change::CreateMesh { .. } | Change::EnrollOperator { .. } => None,
        Change::DeclareService { name, .. } | Change::RemoveService { name } => {
            state.services.get(name).map(|service| toml(&service.spec))
        }
        Change::SetRole { name, .. } | Change::RemoveRole { name } => state.roles.get(name).map(lines),
        Change::SetPolicy { id, .. } | Change::RemovePolicy { id } => {
            state.policies.get(id).map(|policy| body(&policy.body, &mesh.bodies))
        }
        Change::SetRoute { name, .. } | Change::RemoveRoute { name } => state.routes.get(name).map(toml),
        Change::InviteOperator { name, .. }
        | Change::RemoveOperator { name }
        | Change::SetOperatorRoles { name, .. } => state.operators.get(name).map(operator),
        Change::AddFactor { operator, id, .. } | Change::RemoveFactor { operator, id } => {
            state.operators.get(operator).and_then(|operator| operator.factors.get(id)).map(factor)
        }
        Change::SetGatePolicy { id, .. } | Change::RemoveGatePolicy { id } => {
            state.gate.get(id).map(|policy| body(&policy.body, &mesh.bodies))
        }
        Change::SealSettings { .. } => state.seal.map(|seal| sealed(seal.quorum)),
        Change::Deploy { service, .. } => state.deployments.get(service).map(lines),
        Change::SetIssuer { name, .. } | Change::RemoveIssuer { name } => state.issuers.get(name).map(toml),
        Change::SetPipeline { name, .. } | Change::RemovePipeline { name } => state.pipelines.get(name).map(toml),
        Change::RotateSealingKey { .. } => state.sealing_key.map(|fingerprint| format!("{fingerprint}\n")),
        Change::Recover { operator: name, .. } => state.operators.get(name).map(operator),
    }
}

fn text_after(change: &Change, bodies: &Bodies) -> Option<String> {
    match change {
        Change::CreateMesh { trust_domain } => Some(format!("trust_domain = \"{trust_domain}\"\n")),
        Change::DeclareService { spec, .. } => Some(toml(spec)),
        Change::SetRole { members, .. } => Some(lines(members)),
        Change::SetPolicy { body: digest, .. } => Some(body(digest, bodies)),
        Change::SetRoute { route, .. } => Some(toml(route)),
        Change::InviteOperator { roles, .. } | Change::SetOperatorRoles { roles, .. } => Some(lines(roles)),
        Change::EnrollOperator { factor: enrolled, .. } | Change::AddFactor { factor: enrolled, .. } => {
            Some(factor(enrolled))
        }
        Change::SetGatePolicy { body: digest, .. } => Some(body(digest, bodies)),
        Change::SealSettings { quorum } => Some(sealed(*quorum)),
        Change::Deploy { artifacts, .. } => Some(lines(artifacts)),
        Change::SetIssuer { issuer, .. } => Some(toml(issuer)),
        Change::SetPipeline { pipeline, .. } => Some(toml(pipeline)),
        Change::RotateSealingKey { fingerprint } => Some(format!("{fingerprint}\n")),
        Change::Recover { factor: enrolled, reason, .. } => Some(format!("{}reason = {reason:?}\n", factor(enrolled))),
        Change::RemoveService { .. }
        | Change::RemoveRole { .. }
        | Change::RemovePolicy { .. }
        | Change::RemoveRoute { .. }
        | Change::RemoveFactor { .. }
        | Change::RemoveOperator { .. }
        | Change::RemoveGatePolicy { .. }
        | Change::RemoveIssuer { .. }
        | Change::RemovePipeline { .. } => None,
    }
}

fn toml<T: Serialize>(value: &T) -> String {
    toml::to_string(value).expect("INVARIANT: specs, routes, issuers and pipelines were read from TOML")
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
            "{}, {} key {}\nfor {}\n",
            factor.kind().as_str(),
            key.key.algorithm(),
            Digest::of(key.key.cose()).short(),
            key.relying_party.origins.join(", "),
        ),
    }
}

fn sealed(quorum: u32) -> String {
    format!("every change is signed by {quorum} of the operators\n")
}

fn body(digest: &Digest, bodies: &Bodies) -> String {
    bodies.get(digest).map_or_else(|| format!("(text {digest} is not here)\n"), |text| format!("{}\n", text.trim_end()))
}

#[cfg(test)]
mod tests {
    use countersign_core::{
        change::{ChangeSet, Revision},
        identity::{ServiceName, TrustDomain},
        service::{Protocol, ServiceSpec},
        state::MeshState,
    };
    use expect_test::expect;

    use super::*;

    #[test]
    fn each_kind_of_change_shows_what_went_and_what_came() {
        let web = ServiceName::parse("web").unwrap();
        let mut bodies = Bodies::default();
        let old = bodies.insert("permit (principal, action, resource);");
        let new = bodies.insert("forbid (principal, action, resource);");
        let spec = ServiceSpec::new(Protocol::Http);
        let state = MeshState::default()
            .apply_all(&ChangeSet {
                base: Revision(0),
                changes: vec![
                    Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
                    Change::DeclareService { name: web.clone(), spec: spec.clone() },
                    Change::SetPolicy { id: "all".into(), file: "policies/all.cedar".into(), body: old },
                    Change::SetRole { name: "staff".into(), members: ["web".to_owned().try_into().unwrap()].into() },
                ],
            })
            .unwrap();
        let before = Mesh { revision: Revision(1), state, bodies: bodies.clone() };
        let changes = [
            Change::DeclareService { name: web, spec: ServiceSpec { exchanges_max: 5, ..spec } },
            Change::SetPolicy { id: "all".into(), file: "policies/all.cedar".into(), body: new },
            Change::RemoveRole { name: "staff".into() },
            Change::SetRole {
                name: "desk".into(),
                members: ["spiffe://far.example/web".to_owned().try_into().unwrap()].into(),
            },
        ];
        expect![[r#"
            ~ service web
              @@ -2,4 +2,4 @@
               port = 80
               max_staleness_seconds = 300
               recorded = "best_effort"
              -exchanges_max = 10000
              +exchanges_max = 5
            ~ policy all policies/all.cedar
              @@ -1 +1 @@
              -permit (principal, action, resource);
              +forbid (principal, action, resource);
            - role staff
              @@ -1 +0,0 @@
              -web
            + role desk
              @@ -0,0 +1 @@
              +spiffe://far.example/web
        "#]]
        .assert_eq(&difference(&changes, &bodies, Some(&before), Paint::plain()));
    }
}
