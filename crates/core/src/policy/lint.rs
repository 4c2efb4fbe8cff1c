//! Policies that are valid and still wrong. Only what is certain for this state of the mesh is reported: nothing here
//! guesses what a condition might come to.

use std::{collections::BTreeSet, sync::Arc};

use cedar_policy::{PolicySet, ValidationMode, ValidationWarning};
use cedar_policy_core::ast::{BinaryOp, Expr, ExprKind, Literal, PatternElem, UnaryOp, Var};
use serde::Serialize;

use super::{
    Library, ParsedPolicy, Reads,
    library::{ActionSet, PrincipalScope, ResourceScope, path_of},
    reads::context_member,
    schema::VALIDATOR,
};
use crate::{change::PolicyId, identity::ServiceName, path::NormalPath, service::Protocol, state::MeshState};

/// What is wrong with one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The policy.
    pub id: PolicyId,
    /// Where it stands.
    pub file: Arc<str>,
    /// The kind of flaw.
    pub flaw: Flaw,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// What to do about it.
    pub help: String,
}

/// The kinds of flaw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// No request can satisfy it.
    NeverApplies,
    /// It changes no answer, because another one covers it.
    Shadowed,
    /// It permits everyone, or everywhere.
    TooWide,
    /// It promises that assurance lifts it, and no permit stands behind it.
    NeverLifted,
}

/// Finds what is wrong with the policies of `state`, whose texts `library` holds; in the order of their ids.
pub fn lint(state: &MeshState, library: &Library) -> Vec<Finding> {
    let policies: Vec<Linted> = state
        .policies
        .iter()
        .filter_map(|(id, reference)| {
            let parsed = library.get(&reference.body)?.clone();
            Some(Linted { id: id.clone(), file: reference.file.clone(), reach: Reach::of(&parsed, state), parsed })
        })
        .collect();
    let mut findings = Vec::new();
    for (at, policy) in policies.iter().enumerate() {
        let mut report = |flaw, what: String, help: &str| {
            findings.push(Finding {
                id: policy.id.clone(),
                file: policy.file.clone(),
                flaw,
                what,
                help: help.to_owned(),
            });
        };
        if let Some((what, help)) = never_applies(policy, state) {
            report(Flaw::NeverApplies, what, help);
            continue;
        }
        if let Some(what) = shadowed(at, &policies) {
            report(Flaw::Shadowed, what, "remove it, or narrow the other one");
        }
        if let Some(what) = too_wide(&policy.parsed) {
            report(Flaw::TooWide, what, "name a role or workload, and a service, namespace or sensitivity");
        }
        if let Some(what) = never_lifted(policy, &policies) {
            report(
                Flaw::NeverLifted,
                what,
                "write the permit that holds once assurance is shown, or drop the annotation",
            );
        }
    }
    findings
}

struct Linted {
    id: PolicyId,
    file: Arc<str>,
    parsed: Arc<ParsedPolicy>,
    reach: Reach,
}

/// Everything that a scope lets through in one state of the mesh.
struct Reach {
    /// By the names that policies use; `None`: every workload.
    principals: Option<BTreeSet<String>>,
    actions: ActionSet,
    services: BTreeSet<ServiceName>,
    /// The only path.
    path: Option<String>,
}

impl Reach {
    fn of(parsed: &ParsedPolicy, state: &MeshState) -> Self {
        let principals = match &parsed.principal {
            PrincipalScope::Any => None,
            PrincipalScope::Never => Some(BTreeSet::new()),
            PrincipalScope::Workload(name) => Some(BTreeSet::from([name.to_string()])),
            PrincipalScope::Role(role) => {
                let members = state.roles.get(&**role).into_iter().flatten();
                Some(members.map(|member| member_name(member, state)).collect())
            }
        };
        let services: BTreeSet<ServiceName> = state
            .services
            .iter()
            .filter(|(name, service)| parsed.concerns(name, &service.spec))
            .map(|(name, _)| name.clone())
            .collect();
        let path = match (&parsed.resource, services.first()) {
            (ResourceScope::Operation(operation), Some(service)) => {
                path_of(operation, service.as_str()).map(str::to_owned)
            }
            _ => None,
        };
        Self { principals, actions: parsed.actions.and(actions_of(&services, state)), services, path }
    }

    fn covers(&self, other: &Self) -> bool {
        let principals = match (&self.principals, &other.principals) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(mine), Some(theirs)) => theirs.is_subset(mine),
        };
        principals
            && self.actions.covers(other.actions)
            && other.services.is_subset(&self.services)
            && (self.path.is_none() || self.path == other.path)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let principals = match (&self.principals, &other.principals) {
            (None, None) => true,
            (None, Some(some)) | (Some(some), None) => !some.is_empty(),
            (Some(mine), Some(theirs)) => !mine.is_disjoint(theirs),
        };
        principals
            && self.actions.and(other.actions) != ActionSet::NONE
            && !self.services.is_disjoint(&other.services)
            && (self.path.is_none() || other.path.is_none() || self.path == other.path)
    }
}

/// How policies name a member of a role.
fn member_name(member: &crate::change::Member, state: &MeshState) -> String {
    match state.trust_domain.as_ref().map(|own| (own, member.id(own))) {
        Some((own, id)) if id.trust_domain() == own.as_str() => match id.service_str() {
            Some(service) => service.to_owned(),
            None => id.as_str().to_owned(),
        },
        Some((_, id)) => id.as_str().to_owned(),
        None => member.to_string(),
    }
}

/// The actions that a request to any of these services can have: a tcp service is only ever connected to, and the
/// others never are.
fn actions_of(services: &BTreeSet<ServiceName>, state: &MeshState) -> ActionSet {
    let speaks = |wanted: fn(Protocol) -> bool| {
        services.iter().filter_map(|name| state.services.get(name)).any(|service| wanted(service.spec.protocol))
    };
    let tcp = speaks(|protocol| protocol == Protocol::Tcp);
    let others = speaks(|protocol| protocol != Protocol::Tcp);
    ActionSet::of(|name, _| if name == "tcp:connect" { tcp } else { others })
}

fn never_applies(policy: &Linted, state: &MeshState) -> Option<(String, &'static str)> {
    let Linted { parsed, reach, .. } = policy;
    if reach.principals.as_ref().is_some_and(BTreeSet::is_empty) {
        return Some(match &parsed.principal {
            PrincipalScope::Role(role) => {
                (format!("it never applies: nobody has the role `{role}`"), "bind someone to the role in roles.toml")
            }
            _ => ("it never applies: no workload is in its principal scope".to_owned(), "principals are workloads"),
        });
    }
    if reach.services.is_empty() {
        let what = match &parsed.resource {
            ResourceScope::Namespace(name) => format!("it never applies: no service is in the namespace `{name}`"),
            ResourceScope::Sensitivity(name) => format!("it never applies: no service has the sensitivity `{name}`"),
            _ => "it never applies: no service is in its resource scope".to_owned(),
        };
        return Some((what, "services, their namespace and their sensitivity are declared in mesh.toml"));
    }
    if reach.actions == ActionSet::NONE {
        return Some((
            "it never applies: the services in its scope do not speak the protocol of its actions".to_owned(),
            "a tcp service is reached by Action::\"tcp:connect\" alone, and no other service is",
        ));
    }
    if is_impossible(parsed) {
        return Some((
            "it never applies: its conditions exclude each other".to_owned(),
            "read its conditions together",
        ));
    }
    let conjuncts = conjuncts(parsed.condition());
    contradiction(&conjuncts, reach, state)
        .map(|why| (format!("it never applies: {why}"), "no request satisfies both: change one of them"))
}

/// Whether Cedar's type checker finds that it is false for every action that its scope lets through.
fn is_impossible(parsed: &ParsedPolicy) -> bool {
    let mut set = PolicySet::new();
    if set.add(cedar_policy::Policy::from(parsed.policy.clone())).is_err() {
        return false;
    }
    let verdict = VALIDATOR.validate(&set, ValidationMode::Strict);
    verdict.validation_warnings().any(|warning| matches!(warning, ValidationWarning::ImpossiblePolicy(_)))
}

/// What must all hold.
fn conjuncts(condition: Option<&Expr>) -> Vec<&Expr> {
    let mut open: Vec<&Expr> = condition.into_iter().collect();
    let mut found = Vec::new();
    while let Some(expr) = open.pop() {
        match expr.expr_kind() {
            ExprKind::And { left, right } => open.extend([&**right, &**left]),
            _ => found.push(expr),
        }
    }
    found
}

fn contradiction(conjuncts: &[&Expr], reach: &Reach, state: &MeshState) -> Option<String> {
    let mut path = reach.path.clone();
    for conjunct in conjuncts {
        match conjunct.expr_kind() {
            ExprKind::BinaryApp { op: BinaryOp::Eq, arg1, arg2 } => {
                let (member, literal) = match (arg1.expr_kind(), arg2.expr_kind()) {
                    (_, ExprKind::Lit(literal)) => (context_member(arg1), literal),
                    (ExprKind::Lit(literal), _) => (context_member(arg2), literal),
                    _ => continue,
                };
                let Some(member) = member else { continue };
                match (&member[..], literal) {
                    (["request", "method"], Literal::String(method)) => {
                        let possible = ActionSet::of(|name, _| method_of(name) == *method);
                        if possible.and(reach.actions) == ActionSet::NONE {
                            return Some(format!("none of its actions has the method `{method}`"));
                        }
                    }
                    (["request", "protocol"], Literal::String(protocol)) => {
                        let speaks = |name: &ServiceName| state.services[name].spec.protocol.to_string() == **protocol;
                        if !reach.services.iter().any(speaks) {
                            return Some(format!("no service in its scope speaks `{protocol}`"));
                        }
                    }
                    (["request", "path"], Literal::String(wanted)) => {
                        if NormalPath::parse(wanted).ok().is_none_or(|normal| normal.as_str() != wanted.as_str()) {
                            return Some(format!("no request has the path `{wanted}`"));
                        }
                        match &path {
                            Some(other) if *other != **wanted => {
                                return Some(format!("the path cannot be `{other}` and `{wanted}` at once"));
                            }
                            _ => path = Some(wanted.to_string()),
                        }
                    }
                    (["request", "host"], Literal::String(host)) if host.chars().any(char::is_uppercase) => {
                        return Some(format!("hosts are judged in lower case, `{host}` is not"));
                    }
                    (["time", "hour"], Literal::Long(hour)) if !(0..24).contains(hour) => {
                        return Some(format!("hours go from 0 to 23, {hour} is none"));
                    }
                    (["time", "weekday"], Literal::Long(day)) if !(1..=7).contains(day) => {
                        return Some(format!("weekdays go from 1 to 7, {day} is none"));
                    }
                    _ => {}
                }
            }
            ExprKind::Like { expr, pattern } if context_member(expr).as_deref() == Some(&["request", "path"]) => {
                match pattern.iter().next() {
                    Some(PatternElem::Wildcard | PatternElem::Char('/')) => {}
                    _ => return Some("paths begin with `/`, its pattern does not".to_owned()),
                }
            }
            _ => {}
        }
    }
    None
}

fn method_of(action: &str) -> &str {
    match action {
        "grpc:call" => "POST",
        "tcp:connect" => "CONNECT",
        http => http.strip_prefix("http:").unwrap_or(http),
    }
}

/// Another policy that makes the one at `at` change no answer.
fn shadowed(at: usize, policies: &[Linted]) -> Option<String> {
    let policy = &policies[at];
    let condition = policy.parsed.condition();
    policies.iter().enumerate().filter(|(other, _)| *other != at).find_map(|(other_at, other)| {
        let same_effect = other.parsed.permits() == policy.parsed.permits();
        if policy.parsed.permits() || same_effect {
            let unconditional = other.parsed.condition().is_none();
            let same_condition = same_effect && other.parsed.condition() == condition;
            if !(unconditional || same_condition) || !other.reach.covers(&policy.reach) {
                return None;
            }
            if !same_effect {
                let forbids = other.parsed.obligation().is_none();
                return forbids.then(|| format!("it permits nothing: `{}` forbids all of it", other.id));
            }
            // A redundant policy that can fault still denies by its fault.
            if !same_condition && condition.is_some_and(can_fault) {
                return None;
            }
            let other_obligation = other.parsed.obligation();
            if other_obligation.is_some() && other_obligation != policy.parsed.obligation() {
                return None;
            }
            // Of two that cover each other, the later one is the redundant one.
            let mutual = policy.reach.covers(&other.reach)
                && (condition.is_none() || same_condition)
                && other_obligation == policy.parsed.obligation();
            if mutual && at < other_at {
                return None;
            }
            let verb = if policy.parsed.permits() { "permits" } else { "forbids" };
            return Some(format!("it adds nothing: `{}` {verb} all of it", other.id));
        }
        None
    })
}

/// Whether evaluating `condition` can fail although it is well typed: by an overflow, or in an extension.
fn can_fault(condition: &Expr) -> bool {
    condition.subexpressions().any(|expr| match expr.expr_kind() {
        ExprKind::BinaryApp { op: BinaryOp::Add | BinaryOp::Sub | BinaryOp::Mul, .. } => true,
        ExprKind::UnaryApp { op: UnaryOp::Neg, .. } => true,
        ExprKind::ExtensionFunctionApp { fn_name, .. } => !matches!(
            fn_name.to_string().as_str(),
            "ip" | "isIpv4" | "isIpv6" | "isLoopback" | "isMulticast" | "isInRange"
        ),
        _ => false,
    })
}

fn too_wide(parsed: &ParsedPolicy) -> Option<String> {
    if !parsed.permits() {
        return None;
    }
    let mentions = |var: Var| {
        parsed.condition().is_some_and(|condition| {
            condition.subexpressions().any(|expr| matches!(expr.expr_kind(), ExprKind::Var(found) if *found == var))
        })
    };
    let everyone =
        parsed.principal == PrincipalScope::Any && !mentions(Var::Principal) && !parsed.reads().any_of(Reads::ORIGIN);
    let everywhere = parsed.resource == ResourceScope::Any
        && !mentions(Var::Resource)
        && !parsed.reads().any_of(Reads::REQUEST_PATH.and(Reads::OPERATION).and(Reads::HOST));
    match (everyone, everywhere) {
        (true, true) => Some("it permits every workload, foreign ones too, to reach every service".to_owned()),
        (true, false) => Some("it permits every workload, foreign ones too".to_owned()),
        (false, true) => Some("it permits to reach every service, those to come too".to_owned()),
        (false, false) => None,
    }
}

fn never_lifted(policy: &Linted, policies: &[Linted]) -> Option<String> {
    policy.parsed.obligation()?;
    let hopeless = "no assurance lifts it:";
    let forbidden = policies.iter().find(|other| {
        !other.parsed.permits()
            && other.parsed.obligation().is_none()
            && other.parsed.condition().is_none()
            && other.reach.covers(&policy.reach)
    });
    if let Some(other) = forbidden {
        return Some(format!("{hopeless} `{}` forbids all of it without condition", other.id));
    }
    let behind = policies.iter().any(|other| other.parsed.permits() && other.reach.overlaps(&policy.reach));
    (!behind).then(|| format!("{hopeless} no permit stands behind it"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use expect_test::expect;

    use super::*;
    use crate::{
        canonical::Digest,
        change::Member,
        identity::TrustDomain,
        policy::{parse_file, schema::ACTIONS},
        service::ServiceSpec,
        state::{PolicyRef, Service},
    };

    fn told(policies: &str) -> String {
        let mut library = Library::default();
        let declared = |protocol, namespace: Option<&str>| {
            let mut spec = ServiceSpec::new(protocol);
            spec.namespace = namespace.map(str::to_owned);
            Service { spec, slot: 0 }
        };
        let name = |name: &str| ServiceName::parse(name).unwrap();
        let members = |names: &[&str]| names.iter().map(|member| Member::Service(name(member))).collect();
        let mut state = MeshState {
            trust_domain: Some(TrustDomain::parse("shop.example").unwrap()),
            services: BTreeMap::from([
                (name("catalog"), declared(Protocol::Http, Some("shop"))),
                (name("orders"), declared(Protocol::Grpc, Some("shop"))),
                (name("db"), declared(Protocol::Tcp, None)),
                (name("web"), declared(Protocol::Http, None)),
            ]),
            roles: BTreeMap::from([
                ("reader".into(), members(&["web", "orders"])),
                ("staff".into(), members(&["web"])),
                ("empty".into(), members(&[])),
            ]),
            ..MeshState::default()
        };
        for policy in parse_file("a.cedar", policies).unwrap_or_else(|mistakes| panic!("{mistakes:#?}")) {
            let body = Digest::of(policy.text.as_bytes());
            library.insert(body, &policy.text).unwrap();
            state.policies.insert(policy.id, PolicyRef { file: "a.cedar".into(), body });
        }
        lint(&state, &library).iter().map(|found| format!("{} {:?}: {}\n", found.id, found.flaw, found.what)).collect()
    }

    #[test]
    fn what_can_never_apply_is_found() {
        expect![[r#"
            a NeverApplies: it never applies: nobody has the role `empty`
            b NeverApplies: it never applies: no service is in the namespace `none`
            c NeverApplies: it never applies: no service has the sensitivity `pci`
            d NeverApplies: it never applies: the services in its scope do not speak the protocol of its actions
            e NeverApplies: it never applies: the services in its scope do not speak the protocol of its actions
            f NeverApplies: it never applies: none of its actions has the method `POST`
            g NeverApplies: it never applies: the path cannot be `/a` and `/b` at once
            h NeverApplies: it never applies: paths begin with `/`, its pattern does not
            i NeverApplies: it never applies: hours go from 0 to 23, 24 is none
            j NeverApplies: it never applies: weekdays go from 1 to 7, 0 is none
            k NeverApplies: it never applies: its conditions exclude each other
            l NeverApplies: it never applies: the path cannot be `/a` and `/b` at once
            m NeverApplies: it never applies: no service in its scope speaks `tcp`
            n NeverApplies: it never applies: no request has the path `/a//b`
            o NeverApplies: it never applies: hosts are judged in lower case, `Shop.example` is not
        "#]].assert_eq(&told(r#"
            @id("a") permit (principal in Role::"empty", action, resource in Service::"catalog");
            @id("b") permit (principal in Role::"staff", action, resource in Namespace::"none");
            @id("c") permit (principal in Role::"staff", action, resource in Sensitivity::"pci");
            @id("d") permit (principal in Role::"staff", action == Action::"http:GET", resource in Service::"db");
            @id("e") permit (principal in Role::"staff", action == Action::"tcp:connect", resource in Namespace::"shop");
            @id("f") permit (principal in Role::"staff", action == Action::"http:GET", resource in Service::"catalog") when { context.request.method == "POST" };
            @id("g") permit (principal in Role::"staff", action, resource == Operation::"catalog/a") when { context.request.path == "/b" };
            @id("h") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.request.path like "items/*" };
            @id("i") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.time.hour == 24 };
            @id("j") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.time.weekday == 0 && true };
            @id("k") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context has device };
            @id("l") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.request.path == "/a" } when { "/b" == context.request.path };
            @id("m") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.request.protocol == "tcp" };
            @id("n") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.request.path == "/a//b" };
            @id("o") permit (principal in Role::"staff", action, resource in Service::"catalog") when { context.request.host == "Shop.example" };
        "#));
    }

    #[test]
    fn what_changes_no_answer_is_found_and_what_might_is_left_alone() {
        expect![[r#"
            b-narrow Shadowed: it adds nothing: `a-wide` permits all of it
            f-forbidden Shadowed: it permits nothing: `e-forbid` forbids all of it
            g-forbid-again Shadowed: it adds nothing: `e-forbid` forbids all of it
            i-twin Shadowed: it adds nothing: `h-twin` permits all of it
        "#]].assert_eq(&told(r#"
            @id("a-wide") permit (principal in Role::"reader", action in Action::"read", resource in Namespace::"shop");
            @id("b-narrow") permit (principal == Workload::"web", action == Action::"http:GET", resource == Operation::"catalog/x") when { context.first_contact };
            @id("c-other-action") permit (principal == Workload::"web", action == Action::"http:POST", resource in Service::"catalog");
            @id("d-can-fault") permit (principal == Workload::"web", action == Action::"http:GET", resource in Service::"catalog") when { context.request has size && context.request.size + 1 > 2 };
            @id("e-forbid") forbid (principal, action in Action::"write", resource in Service::"orders");
            @id("f-forbidden") permit (principal in Role::"staff", action == Action::"http:PUT", resource in Service::"orders");
            @id("g-forbid-again") forbid (principal in Role::"staff", action == Action::"http:PUT", resource in Service::"orders");
            @id("h-twin") permit (principal in Role::"staff", action == Action::"grpc:call", resource in Service::"orders") when { context.time.hour < 9 };
            @id("i-twin") permit (principal == Workload::"web", action == Action::"grpc:call", resource in Service::"orders") when { context.time.hour < 9 };
            @id("j-conditional-forbid") forbid (principal, action in Action::"read", resource in Namespace::"shop") when { context.first_contact };
        "#));
    }

    #[test]
    fn permits_for_everyone_or_everywhere_are_found() {
        expect![[r#"
            a TooWide: it permits every workload, foreign ones too, to reach every service
            b TooWide: it permits every workload, foreign ones too
            c TooWide: it permits to reach every service, those to come too
        "#]].assert_eq(&told(r#"
            @id("a") permit (principal, action == Action::"http:HEAD", resource);
            @id("b") permit (principal is Workload, action == Action::"http:GET", resource in Service::"catalog");
            @id("c") permit (principal in Role::"staff", action == Action::"http:GET", resource);
            @id("d") permit (principal, action == Action::"http:PUT", resource in Service::"catalog") when { context.origin.trust_domain == "shop.example" };
            @id("e") permit (principal, action == Action::"http:PATCH", resource) when { principal in Role::"staff" && resource in Service::"catalog" };
            @id("f") forbid (principal, action == Action::"http:COPY", resource);
        "#));
    }

    #[test]
    fn an_annotated_forbid_with_no_permit_behind_it_is_found() {
        expect![[r#"
            a NeverLifted: no assurance lifts it: no permit stands behind it
            d Shadowed: it adds nothing: `e` forbids all of it
            d NeverLifted: no assurance lifts it: `e` forbids all of it without condition
        "#]].assert_eq(&told(r#"
            @id("a") @step_up("phr") forbid (principal, action == Action::"http:DELETE", resource in Service::"catalog");
            @id("b") @max_age("60") forbid (principal, action == Action::"http:PUT", resource in Service::"catalog");
            @id("c") permit (principal in Role::"staff", action == Action::"http:PUT", resource in Service::"catalog");
            @id("d") @step_up("mfa") forbid (principal in Role::"staff", action == Action::"http:POST", resource in Service::"catalog");
            @id("e") forbid (principal, action == Action::"http:POST", resource in Namespace::"shop");
            @id("f") permit (principal in Role::"staff", action == Action::"http:DELETE", resource == Operation::"orders/x");
        "#));
    }

    #[test]
    fn every_action_has_one_method() {
        let methods: Vec<&str> = ACTIONS.iter().map(|(name, _)| method_of(name)).collect();
        assert_eq!(methods.iter().filter(|method| **method == "POST").count(), 2);
        assert!(methods.contains(&"CONNECT"));
    }
}
