//! What a change-set changes, for people at a terminal: each change with the text it replaces and the text it brings.

use std::fmt::Write as _;

use countersign_api::local::Mesh;
use countersign_core::{
    change::{Bodies, Change},
    difference,
};

use crate::{diff, render, render::Paint};

/// Renders `changes`, which refer to texts in `bodies`, as unified differences against `before`.
pub fn difference(changes: &[Change], bodies: &Bodies, before: Option<&Mesh>, paint: Paint) -> String {
    let mut text = String::new();
    for change in changes {
        let difference = difference::of(change, before.map(|mesh| (&mesh.state, &mesh.bodies)), bodies);
        let sign = match (&difference.before, &difference.after) {
            (None, _) => paint.good("+"),
            (Some(_), None) => paint.bad("-"),
            (Some(_), Some(_)) => paint.warn("~"),
        };
        let file = difference.file.map(|file| paint.dim(&format!(" {}", render::tame(&file)))).unwrap_or_default();
        let _ = writeln!(text, "{sign} {}{file}", paint.strong(&render::tame(&difference.subject)));
        let (old, new) = (difference.before.unwrap_or_default(), difference.after.unwrap_or_default());
        for line in diff::unified(&old, &new, paint).lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use countersign_core::{
        change::{ChangeSet, Revision},
        contract::{Contract, Operation},
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
        let contract = |operations: &[(&str, &str)]| {
            let operation = |(name, path): &(&str, &str)| Operation {
                name: (*name).into(),
                method: "POST".into(),
                path: (*path).into(),
            };
            Contract::new(operations.iter().map(operation).collect()).unwrap().to_body()
        };
        let before = bodies.insert(contract(&[("buy", "/orders"), ("login", "/login")]));
        let after = bodies.insert(contract(&[("login", "/login"), ("pay", "/orders/{id}/payment")]));
        let spec = ServiceSpec { contract: Some(before), ..ServiceSpec::new(Protocol::Http) };
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
            Change::DeclareService { name: web, spec: ServiceSpec { exchanges_max: 5, contract: Some(after), ..spec } },
            Change::SetPolicy { id: "all".into(), file: "policies/all.cedar".into(), body: new },
            Change::RemoveRole { name: "staff".into() },
            Change::SetRole {
                name: "desk".into(),
                members: ["spiffe://far.example/web".to_owned().try_into().unwrap()].into(),
            },
        ];
        expect![[r#"
            ~ service web
              @@ -2,7 +2,7 @@
               port = 80
               max_staleness_seconds = 300
               recorded = "best_effort"
              -exchanges_max = 10000
              -contract = "83a3f81351c9ac440a0727a5da1c28b23d05c3618b082515ad6d6c19b6f2a708"
              -operation "buy" = POST /orders
              +exchanges_max = 5
              +contract = "0fd651de2eee3b3c3f2490528a00112af5ef6bf8412d2d698bc3480671a74e0f"
               operation "login" = POST /login
              +operation "pay" = POST /orders/{id}/payment
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
