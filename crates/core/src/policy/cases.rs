//! `tests/*.toml`: decisions that must hold, whatever else a policy change does.
//!
//! ```toml
//! [[test]]
//! name = "web reads the catalog"
//! given = { principal = "web", action = "http:GET", service = "catalog", path = "/items/4" }
//! expect = "permit"                    # permit | deny | step_up
//! by = ["web-reads-catalog"]           # exactly these policies decide; leave it out where any may
//! operation = "getItem"                # the operation of the contract that it is; leave it out where any may be
//! ```
//!
//! Of `given`, `principal`, `action` and `service` are needed. The others say what else the request is like: `path`
//! (`/`), `host` (`<service>.mesh`), `method` (the action's), `size` in bytes (not declared), `origin` (`127.0.0.1`), `now`
//! (noon of Monday 2026-01-05 UTC, so that a test tells the same every day), `first_contact` (`false`), `token` (the scope
//! of the access token that comes with it: where the service demands tokens, the one that the principal would be issued), `risk` (`0`),
//! `compliant` and `managed` (nobody says), `contained` (`false`).

use std::{collections::BTreeMap, net::IpAddr, ops::Range};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Decision, Law, Library, Mistake, PolicyError, Query, file::nearest, is_action};
use crate::{
    change::{PolicyId, Revision},
    identity::{ServiceName, SpiffeId},
    path::NormalPath,
    record::{Inputs, Outcome},
    risk::{Condition, Posture},
    service::{FirstContact, Protocol},
    signal::statement::RISK_MAX,
    state::MeshState,
    token::{Scope, ShownToken},
    view::{Local, view},
};

/// When a test that names no time takes place: 2026-01-05T12:00:00Z, a Monday.
const NOW_DEFAULT: i64 = 1_767_614_400;

/// One decision that must hold.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What it says, in a sentence.
    pub name: String,
    /// What is asked.
    pub given: Inputs,
    /// What the answer must be.
    pub expect: Outcome,
    /// The policies that must have decided, sorted; `None` where any may.
    pub by: Option<Vec<PolicyId>>,
    /// The operation of the contract that it must be; `None` where it may be any, or none.
    pub operation: Option<String>,
    /// The bytes of the file that it takes.
    pub span: Range<usize>,
}

/// How one case went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseResult {
    /// The position of the case in its file.
    pub case: usize,
    /// What the law decides.
    pub decision: Decision,
    /// Why the case fails; `None` when it holds.
    pub failure: Option<String>,
}

/// Parses one file of tests. Services, principals, actions and policies must exist in `state`; every mistake of the
/// file is returned at once, in the order of the text.
pub fn parse_cases(text: &str, state: &MeshState) -> Result<Vec<Case>, Vec<Mistake>> {
    let mut reader = Reader { state, mistakes: Vec::new() };
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(0..text.len());
        reader.mistakes.push(Mistake { span, what: error.message().to_owned(), help: None });
    }
    let mut cases = Vec::new();
    for (key, value) in document.get_ref() {
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("test", DeValue::Array(tests)) => cases.extend(tests.iter().filter_map(|test| reader.case(test))),
            ("test", _) => {
                reader.refuse(value.span(), "`test` is not a list of tests", "begin each test with [[test]]")
            }
            (other, _) => {
                reader.refuse(
                    key.span(),
                    &format!("unknown key `{other}`"),
                    "a file of tests holds [[test]] and nothing else",
                );
            }
        }
    }
    let mut mistakes = reader.mistakes;
    if mistakes.is_empty() {
        return Ok(cases);
    }
    mistakes.sort_by_key(|mistake| mistake.span.start);
    Err(mistakes)
}

/// Judges every case by the law of `state`, whose policies `library` holds. The error names policies that cannot be
/// compiled.
pub fn run_cases(cases: &[Case], state: &MeshState, library: &Library) -> Result<Vec<CaseResult>, Vec<PolicyError>> {
    let mut laws: BTreeMap<&ServiceName, Law> = BTreeMap::new();
    let mut results = Vec::with_capacity(cases.len());
    for (at, case) in cases.iter().enumerate() {
        let service = &case.given.service;
        if !laws.contains_key(service) {
            laws.insert(service, law_of(service, state, library)?);
        }
        let law = &laws[service];
        let decision = law.decide(&Query::of(&law.with_token(&case.given)));
        let failure = failure(case, &decision);
        results.push(CaseResult { case: at, decision, failure });
    }
    Ok(results)
}

fn law_of(service: &ServiceName, state: &MeshState, library: &Library) -> Result<Law, Vec<PolicyError>> {
    let mut view = view(state, Revision::default(), library, &Local { service: service.clone() }).map_err(|error| {
        vec![PolicyError { id: service.as_str().into(), file: "mesh.toml".into(), what: error.to_string() }]
    })?;
    // A test is about policies: which edges operators have approved is no part of the directory.
    if let Some(spec) = &mut view.spec {
        spec.first_contact = FirstContact::Mark;
    }
    Law::compile(&view)
}

fn failure(case: &Case, decision: &Decision) -> Option<String> {
    let got = format!("{} ({})", decision.outcome.as_str(), decision.reason.as_str());
    let by = || match &*decision.policies {
        [] => "no policy".to_owned(),
        policies => policies.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", "),
    };
    if decision.outcome != case.expect {
        return Some(format!("expected {}, got {got} by {}", case.expect.as_str(), by()));
    }
    if let Some(expected) = case.operation.as_deref().filter(|name| decision.operation.as_deref() != Some(name)) {
        let got = decision.operation.as_ref().map_or("none of the contract".to_owned(), |name| format!("`{name}`"));
        return Some(format!("expected the operation `{expected}`, it is {got}"));
    }
    let expected = case.by.as_ref()?;
    let mut decided = decision.policies.to_vec();
    decided.sort();
    (decided != *expected).then(|| {
        let expected = expected.iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ");
        format!("expected {} by {expected}, got it by {}", case.expect.as_str(), by())
    })
}

struct Reader<'a> {
    state: &'a MeshState,
    mistakes: Vec<Mistake>,
}

type Value<'i> = Spanned<DeValue<'i>>;

impl Reader<'_> {
    fn refuse(&mut self, span: Range<usize>, what: &str, help: &str) {
        self.mistakes.push(Mistake { span, what: what.to_owned(), help: Some(help.to_owned()) });
    }

    /// The members of a table, each key known.
    fn members<'t, 'i>(&mut self, value: &'t Value<'i>, known: &[&str]) -> Option<BTreeMap<&'t str, &'t Value<'i>>> {
        let DeValue::Table(table) = value.get_ref() else {
            self.refuse(
                value.span(),
                &format!("a table was expected, not {}", value.get_ref().type_str()),
                "write { key = value, … }",
            );
            return None;
        };
        let mut members = BTreeMap::new();
        for (key, value) in table {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                members.insert(name, value);
                continue;
            }
            let help = match nearest(name, known.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => {
                    format!("known are {}", known.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", "))
                }
            };
            self.refuse(key.span(), &format!("unknown key `{name}`"), &help);
        }
        Some(members)
    }

    fn text<'t>(&mut self, value: &'t Value<'_>) -> Option<&'t str> {
        let found = value.get_ref().as_str();
        if found.is_none() {
            self.refuse(
                value.span(),
                &format!("text was expected, not {}", value.get_ref().type_str()),
                "put it in quotes",
            );
        }
        found
    }

    fn needed<'t, 'i>(
        &mut self,
        members: &BTreeMap<&str, &'t Value<'i>>,
        key: &str,
        within: Range<usize>,
    ) -> Option<&'t Value<'i>> {
        let found = members.get(key).copied();
        if found.is_none() {
            self.refuse(
                within,
                &format!("`{key}` is missing"),
                "a test needs name, given and expect; given needs principal, action and service",
            );
        }
        found
    }

    fn case(&mut self, test: &Value<'_>) -> Option<Case> {
        let members = self.members(test, &["name", "given", "expect", "by", "operation"])?;
        let mistakes_before = self.mistakes.len();
        let name = self.needed(&members, "name", test.span()).and_then(|value| self.text(value).map(str::to_owned));
        let given = self.needed(&members, "given", test.span()).and_then(|value| self.given(value));
        let expect = self.needed(&members, "expect", test.span()).and_then(|value| self.outcome(value));
        let by = members.get("by").and_then(|value| self.by(value));
        let operation = members.get("operation").and_then(|value| self.text(value)).map(str::to_owned);
        let (name, given, expect) = (name?, given?, expect?);
        let span = test.span();
        (self.mistakes.len() == mistakes_before).then_some(Case { name, given, expect, by, operation, span })
    }

    fn outcome(&mut self, value: &Value<'_>) -> Option<Outcome> {
        let given = self.text(value)?;
        let found =
            [Outcome::Permit, Outcome::Deny, Outcome::StepUp].into_iter().find(|outcome| outcome.as_str() == given);
        if found.is_none() {
            self.refuse(
                value.span(),
                &format!("`{given}` is not an outcome"),
                "expect \"permit\", \"deny\" or \"step_up\"",
            );
        }
        found
    }

    fn by(&mut self, value: &Value<'_>) -> Option<Vec<PolicyId>> {
        let DeValue::Array(items) = value.get_ref() else {
            self.refuse(value.span(), "`by` is not a list", "write by = [\"policy-id\"]");
            return None;
        };
        let mut ids: Vec<PolicyId> = Vec::new();
        for item in items.iter() {
            let Some(id) = self.text(item) else { continue };
            if self.state.policies.contains_key(id) {
                ids.push(id.into());
                continue;
            }
            let help = match nearest(id, self.state.policies.keys().map(|id| &**id)) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => "policies are named by their @id".to_owned(),
            };
            self.refuse(item.span(), &format!("the policy `{id}` does not exist"), &help);
        }
        ids.sort();
        Some(ids)
    }

    fn given(&mut self, value: &Value<'_>) -> Option<Inputs> {
        let members = self.members(
            value,
            &[
                "principal",
                "action",
                "service",
                "path",
                "host",
                "method",
                "size",
                "origin",
                "now",
                "first_contact",
                "token",
                "risk",
                "compliant",
                "managed",
                "contained",
            ],
        )?;
        let principal = self.needed(&members, "principal", value.span()).and_then(|value| self.principal(value));
        let action = self.needed(&members, "action", value.span()).and_then(|value| self.action(value));
        let service = self.needed(&members, "service", value.span()).and_then(|value| self.service(value));
        let path = match members.get("path") {
            Some(value) => self.path(value),
            None => Some("/".to_owned()),
        };
        let text =
            |reader: &mut Self, key: &str| members.get(key).and_then(|value| reader.text(value).map(str::to_owned));
        let (host, method) = (text(self, "host"), text(self, "method"));
        let size = members.get("size").and_then(|value| self.size(value));
        let origin = members.get("origin").and_then(|value| self.origin(value));
        let now = members.get("now").and_then(|value| self.now(value));
        let first_contact = members.get("first_contact").and_then(|value| self.truth(value));
        let token = members.get("token").and_then(|value| self.text(value)).map(Scope::parse);
        let risk = members.get("risk").and_then(|value| self.risk(value)).unwrap_or(0);
        let contained = members.get("contained").and_then(|value| self.said(value)).unwrap_or(false);
        let mut said = |key: &str| members.get(key).and_then(|value| self.said(value));
        let posture = Posture { compliant: said("compliant"), managed: said("managed") };
        let (principal, action, service, path) = (principal?, action?, service?, path?);
        let (of_action, protocol) = match action.as_str() {
            "grpc:call" => ("POST", Protocol::Grpc),
            "tcp:connect" => ("CONNECT", Protocol::Tcp),
            http => (http.strip_prefix("http:").unwrap_or(http), Protocol::Http),
        };
        let now = now.unwrap_or(NOW_DEFAULT);
        Some(Inputs {
            principal,
            host: host.unwrap_or_else(|| format!("{service}.mesh")).into(),
            method: method.as_deref().unwrap_or(of_action).into(),
            protocol: self.state.services.get(&service).map_or(protocol, |declared| declared.spec.protocol),
            service,
            path: path.into(),
            size,
            origin: origin.unwrap_or(IpAddr::from([127, 0, 0, 1])),
            now,
            first_contact: first_contact.unwrap_or(false),
            operation: None,
            token: token.map(|scope| ShownToken { id: None, fault: None, scope, issued_at: now }),
            condition: Condition { risk, posture, contained },
            action: action.into(),
        })
    }

    fn principal(&mut self, value: &Value<'_>) -> Option<SpiffeId> {
        let given = self.text(value)?;
        if given.contains("://") {
            return match SpiffeId::parse(given) {
                Ok(id) => Some(id),
                Err(error) => {
                    self.refuse(value.span(), &error.to_string(), "write \"spiffe://<trust domain>/<path>\"");
                    None
                }
            };
        }
        let service = self.service(value)?;
        self.state.trust_domain.as_ref().map(|own| own.workload(&service))
    }

    fn service(&mut self, value: &Value<'_>) -> Option<ServiceName> {
        let given = self.text(value)?;
        let found = self.state.services.keys().find(|name| name.as_str() == given).cloned();
        if found.is_none() {
            let help = match nearest(given, self.state.services.keys().map(ServiceName::as_str)) {
                Some(meant) => format!("did you mean \"{meant}\"?"),
                None => "services are declared in mesh.toml".to_owned(),
            };
            self.refuse(value.span(), &format!("the service `{given}` does not exist"), &help);
        }
        found
    }

    fn action(&mut self, value: &Value<'_>) -> Option<String> {
        let given = self.text(value)?;
        // A method that no policy can name is a fair question: it must be denied.
        let method = given.strip_prefix("http:").is_some_and(|method| !method.is_empty());
        if is_action(given) || method {
            return Some(given.to_owned());
        }
        self.refuse(
            value.span(),
            &format!("`{given}` is not an action"),
            "write \"http:GET\", \"grpc:call\" or \"tcp:connect\"",
        );
        None
    }

    fn path(&mut self, value: &Value<'_>) -> Option<String> {
        let given = self.text(value)?;
        match NormalPath::parse(given) {
            Ok(path) if path.query().is_none() => Some(path.as_str().to_owned()),
            Ok(_) => {
                self.refuse(value.span(), "policies do not see the query", "leave out what follows the `?`");
                None
            }
            Err(refused) => {
                self.refuse(
                    value.span(),
                    &format!("such a request is refused with 400: {refused}"),
                    "give a path that is judged",
                );
                None
            }
        }
    }

    fn size(&mut self, value: &Value<'_>) -> Option<u64> {
        let found = value
            .get_ref()
            .as_integer()
            .and_then(|size| u64::from_str_radix(&size.as_str().replace('_', ""), size.radix()).ok());
        if found.is_none() {
            self.refuse(value.span(), "this is not a size", "give whole bytes: size = 1024");
        }
        found
    }

    fn origin(&mut self, value: &Value<'_>) -> Option<IpAddr> {
        let given = self.text(value)?;
        let found = given.parse().ok();
        if found.is_none() {
            self.refuse(value.span(), &format!("`{given}` is not an address"), "write origin = \"10.0.0.7\"");
        }
        found
    }

    fn risk(&mut self, value: &Value<'_>) -> Option<u8> {
        let found = value.get_ref().as_integer().and_then(|risk| u8::from_str_radix(risk.as_str(), risk.radix()).ok());
        let found = found.filter(|risk| *risk <= RISK_MAX);
        if found.is_none() {
            self.refuse(value.span(), "this is not a risk", "give a whole number from 0 to 100: risk = 80");
        }
        found
    }

    /// What somebody says of a host.
    fn said(&mut self, value: &Value<'_>) -> Option<bool> {
        let found = value.get_ref().as_bool();
        if found.is_none() {
            let help = "write compliant = true, or leave it out where nobody says anything";
            self.refuse(value.span(), "this is neither true nor false", help);
        }
        found
    }

    fn truth(&mut self, value: &Value<'_>) -> Option<bool> {
        let found = value.get_ref().as_bool();
        if found.is_none() {
            self.refuse(value.span(), "this is neither true nor false", "write first_contact = true");
        }
        found
    }

    /// A TOML date-time with an offset.
    fn now(&mut self, value: &Value<'_>) -> Option<i64> {
        let text = value.get_ref().as_datetime().map(ToString::to_string);
        let found = text
            .and_then(|text| time::OffsetDateTime::parse(&text, &time::format_description::well_known::Rfc3339).ok());
        if found.is_none() {
            self.refuse(value.span(), "this is not a time", "write now = 2026-01-05T12:00:00Z");
        }
        found.map(time::OffsetDateTime::unix_timestamp)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use expect_test::expect;

    use super::*;
    use crate::{
        canonical::Digest,
        change::{Change, ChangeSet},
        identity::TrustDomain,
        policy::parse_file,
        service::ServiceSpec,
    };

    fn mesh() -> (MeshState, Library) {
        let mut library = Library::default();
        let declare = |name: &str, protocol| Change::DeclareService {
            name: ServiceName::parse(name).unwrap(),
            spec: ServiceSpec::new(protocol),
        };
        let mut changes = vec![
            Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() },
            declare("web", Protocol::Http),
            declare("catalog", Protocol::Http),
            declare("orders", Protocol::Grpc),
            Change::SetRole {
                name: "reader".into(),
                members: BTreeSet::from([String::from("web").try_into().unwrap()]),
            },
        ];
        let text = r#"
            @id("read") permit (principal in Role::"reader", action in Action::"read", resource in Service::"catalog");
            @id("place") permit (principal == Workload::"web", action == Action::"grpc:call", resource == Operation::"orders/shop.Orders/Place") when { context.request.protocol == "grpc" };
            @id("monday") forbid (principal, action, resource in Service::"catalog") when { context.time.weekday != 1 };
            @id("fresh") @max_age("60") forbid (principal, action == Action::"http:HEAD", resource);
        "#;
        for policy in parse_file("a.cedar", text).unwrap() {
            let body = Digest::of(policy.text.as_bytes());
            library.insert(body, &policy.text).unwrap();
            changes.push(Change::SetPolicy { id: policy.id, file: "a.cedar".into(), body });
        }
        (MeshState::default().apply_all(&ChangeSet { base: Revision(0), changes }).unwrap(), library)
    }

    #[test]
    fn every_mistake_of_a_file_is_found_at_once() {
        let text = r#"
tests = 1
[[test]]
name = "a"
given = { principal = "wbe", action = "http:GET", service = "catalogue", pth = "/" }
expect = "allow"
by = ["raed", 3]
[[test]]
given = { principal = "spiffe://x/", action = "GET", service = "catalog", path = "/a//b", now = "noon", origin = "here", size = -1, first_contact = 1 }
expect = 1
[[test]]
name = 5
given = []
[[test]]
name = "b"
given = { principal = "web", action = "http:GET", service = "catalog", path = "/a?b" }
expect = "deny"
by = "read"
unknown = 1
"#;
        let (state, _) = mesh();
        let told: String = parse_cases(text, &state)
            .unwrap_err()
            .iter()
            .map(|mistake| {
                format!(
                    "{}: `{}`: {}\n",
                    text[..mistake.span.start].lines().count(),
                    text[mistake.span.clone()].lines().next().unwrap_or_default(),
                    mistake.what
                )
            })
            .collect();
        expect![[r#"
            1: `tests`: unknown key `tests`
            5: `"wbe"`: the service `wbe` does not exist
            5: `"catalogue"`: the service `catalogue` does not exist
            5: `pth`: unknown key `pth`
            6: `"allow"`: `allow` is not an outcome
            7: `"raed"`: the policy `raed` does not exist
            7: `3`: text was expected, not integer
            7: `[[test]]`: `name` is missing
            9: `"spiffe://x/"`: `spiffe://x/` is not a SPIFFE ID: a path segment is empty
            9: `"GET"`: `GET` is not an action
            9: `"/a//b"`: such a request is refused with 400: an empty path segment is ambiguous
            9: `"noon"`: this is not a time
            9: `"here"`: `here` is not an address
            9: `-1`: this is not a size
            9: `1`: this is neither true nor false
            10: `1`: text was expected, not integer
            10: `[[test]]`: `expect` is missing
            12: `5`: text was expected, not integer
            13: `[]`: a table was expected, not array
            16: `"/a?b"`: policies do not see the query
            18: `"read"`: `by` is not a list
            18: `unknown`: unknown key `unknown`
        "#]]
        .assert_eq(&told);
        assert!(parse_cases("[[test]\nname =", &state).is_err());
    }

    #[test]
    fn a_test_can_say_which_operation_of_the_contract_it_is_about() {
        let (mut state, mut library) = mesh();
        let contract =
            super::super::fixture::contract(&[("getItem", "GET", "/items/{id}"), ("search", "GET", "/items/search")]);
        let catalog = ServiceName::parse("catalog").unwrap();
        state.services.get_mut(&catalog).unwrap().spec.contract = Some(contract.digest());
        library.insert_contract(contract.digest(), &contract.to_body()).unwrap();
        let case = |path: &str, expect: &str, operation: &str| {
            format!(
                "[[test]]\nname = \"{path}\"\nexpect = \"{expect}\"\noperation = \"{operation}\"\n\
                 given = {{ principal = \"web\", action = \"http:GET\", service = \"catalog\", path = \"{path}\" }}\n"
            )
        };
        let text = [
            case("/items/4", "permit", "getItem"),
            case("/items/search", "permit", "getItem"),
            case("/other", "deny", "getItem"),
            case("/other/4", "permit", "getItem"),
        ];
        let cases = parse_cases(&text.concat(), &state).unwrap();
        let results = run_cases(&cases, &state, &library).unwrap();
        let failures: Vec<_> = results.iter().map(|result| result.failure.as_deref().unwrap_or("holds")).collect();
        assert_eq!(
            failures,
            [
                "holds",
                "expected the operation `getItem`, it is `search`",
                "expected the operation `getItem`, it is none of the contract",
                "expected permit, got deny (not_in_contract) by no policy",
            ]
        );
    }

    #[test]
    fn a_test_that_does_not_hold_says_what_it_got() {
        let text = r#"
[[test]]
name = "holds"
given = { principal = "web", action = "http:GET", service = "catalog", path = "/x" }
expect = "permit"
by = ["read"]
[[test]]
name = "not on sundays"
given = { principal = "web", action = "http:GET", service = "catalog", now = 2026-11-22T12:00:00+02:00 }
expect = "deny"
by = ["monday"]
[[test]]
name = "a call"
given = { principal = "web", action = "grpc:call", service = "orders", path = "/shop.Orders/Place" }
expect = "permit"
[[test]]
name = "step up"
given = { principal = "web", action = "http:HEAD", service = "catalog" }
expect = "step_up"
[[test]]
name = "a method nobody can name"
given = { principal = "web", action = "http:BREW", service = "catalog" }
expect = "deny"
[[test]]
name = "fails"
given = { principal = "orders", action = "http:GET", service = "catalog" }
expect = "permit"
[[test]]
name = "fails by another"
given = { principal = "web", action = "http:GET", service = "catalog" }
expect = "permit"
by = ["place"]
"#;
        let (state, library) = mesh();
        let cases = parse_cases(text, &state).unwrap();
        let results = run_cases(&cases, &state, &library).unwrap();
        let told: String = results
            .iter()
            .map(|result| format!("{}: {}\n", cases[result.case].name, result.failure.as_deref().unwrap_or("holds")))
            .collect();
        expect![[r#"
            holds: holds
            not on sundays: holds
            a call: holds
            step up: holds
            a method nobody can name: holds
            fails: expected permit, got deny (no_policy_permits) by no policy
            fails by another: expected permit by `place`, got it by `read`
        "#]]
        .assert_eq(&told);
    }

    #[test]
    fn the_time_of_a_test_without_one_is_a_monday_at_noon() {
        assert_eq!(NOW_DEFAULT % 86_400, 43_200);
        assert_eq!((NOW_DEFAULT / 86_400 + 3) % 7, 0);
    }
}
