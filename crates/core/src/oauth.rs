//! What the token service may give a client, as far as it follows from the mesh alone; and its tokens, as whoever may read them verifies
//! them. They name another issuer than those of the mesh hop, so no sidecar takes one for the other.
//!
//! Standards: RFC 9068 (the profile), RFC 8705 and RFC 9449 (the binding), RFC 8693 (who acts for whom).

use serde_json::Value;

use crate::{
    identity::{ServiceName, SpiffeId},
    jws::{Key, Presented, Typ},
    state::MeshState,
    token::{Actor, Claims, LEEWAY_SECONDS, Scope},
};

/// Who may act for one another in one token.
pub const ACTORS_MAX: usize = 4;

/// The scope that was asked for is not within what may be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("nothing gives the scope `{0}`")]
pub struct ScopeRefused(String);

/// Whether `id` is a client now: a workload that is part of the mesh, or a client that the mesh declares.
pub fn is_client(state: &MeshState, id: &SpiffeId) -> bool {
    let is_ours = state.trust_domain.as_ref().is_some_and(|own| id.trust_domain() == own.as_str());
    let declared = |name: ServiceName| state.services.contains_key(&name) && state.is_active(&name);
    is_ours && (id.service().is_some_and(declared) || id.client().is_some_and(|name| state.clients.contains_key(&name)))
}

/// Whether `id` may ask for a token for `service`: as a workload, or as a client that is declared to, for a service that is part of the mesh.
pub fn may_ask(state: &MeshState, id: &SpiffeId, service: &ServiceName) -> bool {
    let declared = |name: &ServiceName| state.clients.get(name).is_some_and(|client| client.services.contains(service));
    let exists = state.services.contains_key(service) && state.is_active(service);
    let by_name = id.client().is_some_and(|name| exists && declared(&name));
    is_client(state, id) && (by_name || id.service().is_some_and(|caller| may_call(state, &caller, service)))
}

/// Whether a workload of `caller` may ask for a token for `service`: it declares it as an upstream, or a route may send there what is
/// for one; and both are part of the mesh.
fn may_call(state: &MeshState, caller: &ServiceName, service: &ServiceName) -> bool {
    let declared = state.services.get(caller).filter(|_| state.is_active(caller) && state.is_active(service));
    let Some(upstreams) = declared.map(|held| &held.spec.upstreams) else { return false };
    let routed = |route: &crate::route::Route| upstreams.contains(&route.service) && route.split.contains_key(service);
    state.services.contains_key(service) && (upstreams.contains(service) || state.routes.values().any(routed))
}

/// What is given of what `most` allows: all of it, or the words that were asked for.
///
/// INVARIANT (scope-only-narrows): no word is given that policies do not allow now.
pub fn narrowed(most: &Scope, asked: Option<&str>) -> Result<Scope, ScopeRefused> {
    let Some(asked) = asked else {
        return if most.is_empty() { Err(ScopeRefused(String::new())) } else { Ok(most.clone()) };
    };
    let asked = Scope::parse(asked);
    match asked.words().iter().find(|word| !most.words().contains(word)) {
        Some(word) => Err(ScopeRefused(word.chars().take(80).collect())),
        None if asked.is_empty() => Err(ScopeRefused(String::new())),
        None => Ok(asked),
    }
}

/// What both allow.
pub fn common(one: &Scope, other: &Scope) -> Scope {
    Scope::new(one.words().iter().filter(|word| other.words().contains(word)).cloned())
}

/// Who acts in a token that `client` gets for the one that says `claims`; `None` when too many act already.
pub fn acting(client: &SpiffeId, claims: &Claims) -> Option<Option<Box<Actor>>> {
    if *client == claims.client_id {
        return Some(claims.actor.clone());
    }
    let actor = Actor { subject: client.clone(), before: claims.actor.clone() };
    (actor.depth() <= ACTORS_MAX).then(|| Some(Box::new(actor)))
}

/// What `token` says, if one of `keys` signed it as an access token of `issuer`, and it is in its time. Whoever reads it looks whether it
/// is for them, and whether it was revoked.
pub fn verify(token: &str, issuer: &str, keys: &[Key], now_seconds: i64) -> Option<Claims> {
    let presented = Presented::parse_as(token, Typ::Access).ok()?;
    let named = presented.key_id()?;
    keys.iter().filter(|key| key.is_named(named)).find(|key| key.verifies(&presented))?;
    let claims: Claims = serde_json::from_value(Value::Object(presented.into_signed().0)).ok()?;
    let is_in_time = now_seconds < claims.expires_at && claims.issued_at <= now_seconds.saturating_add(LEEWAY_SECONDS);
    (claims.issuer == issuer && is_in_time).then_some(claims)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        change::Change,
        client::Client,
        identity::TrustDomain,
        service::{Protocol, ServiceSpec},
    };

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    /// PROVES (scope-only-narrows)
    #[test]
    fn a_scope_is_what_was_asked_for_of_what_may_be_given_and_never_more() {
        let most = Scope::parse("list refund");
        for (asked, expected) in [
            (None, Ok("list refund")),
            (Some("list"), Ok("list")),
            (Some("refund list list"), Ok("list refund")),
            (Some("list delete"), Err("delete")),
            (Some("List"), Err("List")),
            (Some("lis"), Err("lis")),
            (Some(" "), Err("")),
        ] {
            let found = narrowed(&most, asked).map(|scope| scope.to_string());
            assert_eq!(found, expected.map(str::to_owned).map_err(|word| ScopeRefused(word.to_owned())), "{asked:?}");
        }
        assert!(narrowed(&Scope::default(), None).is_err(), "nothing is no token");
        assert_eq!(common(&most, &Scope::parse("refund delete")).to_string(), "refund");
    }

    #[test]
    fn a_workload_asks_for_tokens_for_its_upstreams_while_both_are_part_of_the_mesh() {
        let mut state = MeshState::default();
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let declared = |service: &str, upstreams: &[&str]| Change::DeclareService {
            name: name(service),
            spec: ServiceSpec {
                upstreams: upstreams.iter().map(|one| name(one)).collect(),
                ..ServiceSpec::new(Protocol::Http)
            },
        };
        let changes = [
            Change::CreateMesh { trust_domain },
            declared("web", &["orders"]),
            declared("orders", &[]),
            declared("stock", &[]),
        ];
        for change in &changes {
            state.apply(change).unwrap();
        }
        let own = TrustDomain::parse("shop.example").unwrap();
        let may = |state: &MeshState, caller: &str, service: &str| {
            may_ask(state, &own.workload(&name(caller)), &name(service))
        };
        assert!(may(&state, "web", "orders"));
        for (caller, service) in
            [("web", "stock"), ("web", "web"), ("orders", "web"), ("web", "ghost"), ("ghost", "orders")]
        {
            assert!(!may(&state, caller, service), "{caller} {service}");
        }
        for out in ["orders", "web"] {
            let mut without = state.clone();
            without.apply(&Change::SuspendService { name: name(out), reason: "x".into() }).unwrap();
            assert!(!may(&without, "web", "orders"), "{out} is suspended");
        }
    }

    #[test]
    fn a_client_outside_asks_for_what_it_is_declared_for_while_it_is_declared() {
        let mut state = MeshState::default();
        let own = TrustDomain::parse("shop.example").unwrap();
        let key = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
        let client = Client { services: [name("orders"), name("ghost")].into(), keys: [key.to_owned()].into() };
        for change in [
            Change::CreateMesh { trust_domain: own.clone() },
            Change::DeclareService { name: name("orders"), spec: ServiceSpec::new(Protocol::Http) },
            Change::DeclareService { name: name("stock"), spec: ServiceSpec::new(Protocol::Http) },
            Change::SetClient { name: name("billing"), client },
        ] {
            state.apply(&change).unwrap();
        }
        let billing = own.client(&name("billing"));
        for (id, service, expected) in [
            (billing.clone(), "orders", true),
            (billing.clone(), "stock", false),
            (billing.clone(), "ghost", false),
            (own.client(&name("other")), "orders", false),
            (own.workload(&name("billing")), "orders", false),
            (TrustDomain::parse("other.example").unwrap().client(&name("billing")), "orders", false),
        ] {
            assert_eq!(may_ask(&state, &id, &name(service)), expected, "{id} {service}");
        }
        assert!(
            is_client(&state, &billing)
                && !is_client(&state, &own.control())
                && !is_client(&state, &own.agent(&name("billing")))
        );
        state.apply(&Change::RemoveClient { name: name("billing") }).unwrap();
        assert!(!is_client(&state, &billing) && !may_ask(&state, &billing, &name("orders")));
        assert!(state.apply(&Change::RemoveClient { name: name("billing") }).is_err());
    }

    #[test]
    fn who_acts_is_written_down_and_bounded() {
        let id = |path: &str| SpiffeId::parse(&format!("spiffe://shop.example/{path}")).unwrap();
        let of = |path: &str| format!("spiffe://shop.example/{path}");
        let claims = BTreeMap::from([
            ("iss", "x".into()),
            ("sub", of("web").into()),
            ("aud", of("a").into()),
            ("client_id", of("web").into()),
            ("iat", 0.into()),
            ("exp", 1.into()),
            ("jti", "00".repeat(16).into()),
            ("scope", "".into()),
            ("cnf", serde_json::json!({ "jkt": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE" })),
            ("family", "00".repeat(16).into()),
        ]);
        let mut claims: Claims = serde_json::from_value(serde_json::to_value(claims).unwrap()).unwrap();
        assert_eq!(acting(&id("web"), &claims), Some(None), "one who narrows their own acts for nobody");
        for depth in 1..=ACTORS_MAX {
            let actor = acting(&id(&format!("s{depth}")), &claims).unwrap().unwrap();
            assert_eq!((actor.depth(), actor.subject.clone()), (depth, id(&format!("s{depth}"))));
            (claims.client_id, claims.actor) = (actor.subject.clone(), Some(actor));
        }
        assert_eq!(acting(&id("last"), &claims), None);
        let said = serde_json::to_value(&claims).unwrap();
        assert_eq!(said["act"]["act"]["sub"], of("s3"));
    }
}
