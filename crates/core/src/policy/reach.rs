//! The most that a workload may be permitted at one service: what an access token of it is for. Conditions are taken to hold, so
//! nothing that some request may be permitted is left out; what no policy can permit is in no token.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Action, Law, Library,
    law::Place,
    schema::{ACTIONS, number},
};
use crate::{
    change::Revision,
    identity::{ServiceName, SpiffeId},
    record::Inputs,
    service::Protocol,
    state::MeshState,
    token::{SCOPE_BYTES_MAX, SCOPES_MAX, Scope, ShownToken, audiences, word_of_operation},
    view::{Local, View, view},
};

/// The laws of the services that demand tokens, compiled again only when what they are made of has changed.
#[derive(Default)]
pub struct Grants {
    by_service: BTreeMap<ServiceName, Known>,
}

struct Known {
    view: View,
    library: Library, // of its own: compiling keeps what that one view needs, and nothing else
    law: Law,
}

impl Grants {
    /// What the access tokens of `caller` are for, by the service that demands them. `library` holds the policies and contracts of
    /// `state`; a service that has no law, because one of them cannot be read, gets no token.
    pub fn of(&mut self, state: &MeshState, library: &Library, caller: &ServiceName) -> BTreeMap<ServiceName, Scope> {
        let Some(principal) = state.trust_domain.as_ref().map(|own| own.workload(caller)) else {
            return BTreeMap::new();
        };
        let audiences = audiences(state, caller).into_iter();
        audiences
            .filter_map(|service| Some((service.clone(), self.law(state, library, &service)?.reach(&principal))))
            .collect()
    }

    /// What an access token of `principal` for `service` is for; `None` where the service is no part of the mesh or has no law.
    pub fn at(
        &mut self,
        state: &MeshState,
        library: &Library,
        principal: &SpiffeId,
        service: &ServiceName,
    ) -> Option<Scope> {
        Some(self.law(state, library, service).filter(|_| state.is_active(service))?.reach(principal))
    }

    fn law(&mut self, state: &MeshState, library: &Library, service: &ServiceName) -> Option<&Law> {
        let new = view(state, Revision::default(), library, &Local { service: service.clone() }).ok()?;
        let is_known = self.by_service.get(service).is_some_and(|known| known.view.same_content(&new));
        if !is_known {
            let mut library = self.by_service.remove(service).map(|known| known.library).unwrap_or_default();
            let law = Law::compile_with(&new, &mut library).ok()?;
            self.by_service.insert(service.clone(), Known { view: new, library, law });
        }
        self.by_service.get(service).map(|known| &known.law)
    }

    /// Forgets the services that are declared no more.
    pub fn retain(&mut self, state: &MeshState) {
        self.by_service.retain(|service, _| state.services.contains_key(service));
    }
}

impl Law {
    /// What a token of `principal` for this service is for: the operations of its contract that a policy may permit; without a contract,
    /// or when they are too many for a header, the actions.
    pub fn reach(&self, principal: &SpiffeId) -> Scope {
        let operations = self.operations_in_reach(principal);
        match operations.filter(|words| words.len() <= SCOPES_MAX) {
            Some(words) if words.iter().map(|word| word.len() + 1).sum::<usize>() <= SCOPE_BYTES_MAX => {
                Scope::new(words)
            }
            _ => self.actions_in_reach(principal),
        }
    }

    /// `inputs` as they would be with the token that their principal would hold, where the service demands one and none is given.
    pub fn with_token(&self, inputs: &Inputs) -> Inputs {
        let mut inputs = inputs.clone();
        if inputs.token.is_none() && self.demands_tokens() {
            let scope = self.reach(&inputs.principal);
            inputs.token = Some(ShownToken { id: None, fault: None, scope, issued_at: inputs.now });
        }
        inputs
    }

    fn operations_in_reach(&self, principal: &SpiffeId) -> Option<Vec<Arc<str>>> {
        let operations = self.operations()?;
        let in_reach = operations.filter(|(method, _, path)| {
            let action = match self.protocol {
                Protocol::Http => Action::Http(method),
                Protocol::Grpc => Action::GrpcCall,
                Protocol::Tcp => Action::TcpConnect,
            };
            number(action).is_some_and(|action| self.may_permit(principal, action, &[**path]))
        });
        Some(in_reach.map(|(_, name, _)| word_of_operation(name).as_ref().into()).collect())
    }

    fn actions_in_reach(&self, principal: &SpiffeId) -> Scope {
        let paths = self.named_paths();
        let may = |at: usize| u8::try_from(at).is_ok_and(|action| self.may_permit(principal, action, &paths));
        let of_protocol = |name: &str| match self.protocol {
            Protocol::Http => name.starts_with("http:"),
            Protocol::Grpc => name == "grpc:call",
            Protocol::Tcp => name == "tcp:connect",
        };
        let actions = ACTIONS.iter().enumerate().filter(|(at, (name, _))| of_protocol(name) && may(*at));
        Scope::new(actions.map(|(_, (name, _))| (*name).into()))
    }

    /// Whether some policy may permit this action on one of these paths: one whose scope holds, where none forbids it in any case.
    fn may_permit(&self, principal: &SpiffeId, action: u8, paths: &[u32]) -> bool {
        let Some(class) = self.class_of(principal) else { return false };
        paths.iter().any(|path| {
            let candidates = self.candidates(Place { class, path: *path, action });
            let policies = || candidates.policies().map(|at| &self.policies[at as usize].parsed);
            let in_any_case = |parsed: &super::ParsedPolicy| parsed.condition().is_none();
            policies().any(|parsed| parsed.permits())
                && !policies().any(|parsed| !parsed.permits() && in_any_case(parsed) && parsed.obligation.is_none())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Query,
            fixture::{Asked, law, law_with},
        },
        *,
    };
    use crate::{
        identity::TrustDomain,
        record::{Outcome, Reason},
        token::{TokenFault, TokenId},
    };

    fn words(scope: &Scope) -> String {
        scope.to_string()
    }

    fn of(law: &Law, caller: &str) -> String {
        words(&law.reach(&Asked::new(caller, "http:GET", "/").principal))
    }

    #[test]
    fn a_token_is_for_what_a_policy_may_permit_and_for_nothing_that_none_can() {
        let read = r#"@id("a") permit (principal == Workload::"web", action in Action::"read", resource in Service::"catalog");"#;
        let one = r#"@id("b") permit (principal == Workload::"cron", action == Action::"http:POST", resource == Operation::"catalog/refresh") when { context.time.hour < 6 };"#;
        let never = r#"@id("c") forbid (principal, action == Action::"http:HEAD", resource);"#;
        let sometimes =
            r#"@id("d") forbid (principal, action == Action::"http:GET", resource) when { context.first_contact };"#;
        let all = [read, one, never, sometimes].join("\n");
        let law = law(&all);
        assert_eq!(
            of(&law, "web"),
            "http:GET http:OPTIONS http:PROPFIND http:QUERY http:REPORT http:SEARCH",
            "a condition may not hold"
        );
        assert_eq!(of(&law, "cron"), "http:POST");
        assert_eq!(of(&law, "mallory"), "");
        assert_eq!(of(&law, "countersign/control"), "", "no workload");
        let operations = [("list", "GET", "/items"), ("refresh", "POST", "/refresh"), ("peek", "HEAD", "/items")];
        let with = law_with(&operations, &all);
        assert_eq!(of(&with, "web"), "list");
        assert_eq!(of(&with, "cron"), "refresh");
        let many: Vec<(String, String)> = (0..=SCOPES_MAX).map(|n| (format!("o{n}"), format!("/o{n}"))).collect();
        let many: Vec<(&str, &str, &str)> = many.iter().map(|(name, path)| (&**name, "GET", &**path)).collect();
        assert!(of(&law_with(&many, read), "web").starts_with("http:GET "), "they do not fit into a header");
    }

    /// PROVES (token-demanded)
    /// PROVES (bad-token-denies)
    #[test]
    fn where_tokens_are_demanded_nothing_is_permitted_without_one_that_is_for_it() {
        let read = r#"@id("a") permit (principal == Workload::"web", action in Action::"read", resource in Service::"catalog");"#;
        let law = law(read).demanding_tokens();
        let id = TokenId::new(1, [0; 10]);
        let shown = |scope: &str, fault| ShownToken { id: Some(id), fault, scope: Scope::parse(scope), issued_at: 0 };
        for (caller, action, token, reason) in [
            ("web", "http:GET", None, Reason::TokenMissing),
            ("web", "http:GET", Some(shown("http:GET", None)), Reason::Permitted),
            ("web", "http:GET", Some(shown("", None)), Reason::TokenScope),
            ("web", "http:HEAD", Some(shown("http:GET", None)), Reason::TokenScope),
            ("web", "http:GET", Some(shown("http:GET", Some(TokenFault::Revoked))), Reason::TokenRefused),
            ("web", "http:POST", Some(shown("http:GET http:POST", None)), Reason::NoPolicyPermits),
            ("cron", "http:GET", None, Reason::NoPolicyPermits),
            ("cron", "http:GET", Some(shown("http:GET", None)), Reason::NoPolicyPermits),
        ] {
            let asked = Asked { token: token.clone(), ..Asked::new(caller, action, "/items") };
            let decision = law.decide(&asked.query());
            assert_eq!(decision.reason, reason, "{caller} {action} {token:?}");
            assert_eq!(decision.policies.is_empty(), decision.outcome != Outcome::Permit);
        }
        let inputs = Asked::new("web", "http:GET", "/items").query().inputs();
        assert_eq!(law.decide(&Query::of(&law.with_token(&inputs))).reason, Reason::Permitted);
    }

    #[test]
    fn a_client_gets_what_policies_that_name_it_may_permit_and_is_in_the_roles_that_it_has() {
        let billing = r#"Workload::"spiffe://shop.example/countersign/client/billing""#;
        let law = law(&format!(
            r#"@id("a") permit (principal == {billing}, action == Action::"http:POST", resource in Service::"catalog");
            @id("b") permit (principal == Workload::"billing", action == Action::"http:PUT", resource);"#
        ));
        let own = TrustDomain::parse("shop.example").unwrap();
        let of = |name: &str| words(&law.reach(&own.client(&ServiceName::parse(name).unwrap())));
        assert_eq!(of("billing"), "http:POST", "and nothing of the service that is called like it");
        assert_eq!(of("other"), "");
    }

    #[test]
    fn policies_read_the_token_where_none_is_demanded_too_and_a_bad_one_is_denied_there_as_well() {
        let law = law(
            r#"@id("a") permit (principal, action, resource) when { context has token && context.token.scopes.contains("http:GET") };"#,
        );
        let check = |token: Option<ShownToken>| {
            law.decide(&Asked { token, ..Asked::new("web", "http:GET", "/items") }.query()).reason
        };
        let shown = |scope: &str| ShownToken { id: None, fault: None, scope: Scope::parse(scope), issued_at: 0 };
        assert_eq!(check(None), Reason::NoPolicyPermits);
        assert_eq!(check(Some(shown("http:GET"))), Reason::Permitted);
        assert_eq!(check(Some(shown("http:HEAD"))), Reason::NoPolicyPermits);
        assert_eq!(check(Some(ShownToken::refused(TokenFault::Signature, None))), Reason::TokenRefused);
    }
}
