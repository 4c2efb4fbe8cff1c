//! A `.cedar` file split into its policies, with every mistake at once: what does not parse, what the strict validator
//! refuses, what has no `@id`, and what names a role, service or workload that does not exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use cedar_policy_core::{
    ast::{
        self, ActionConstraint, EntityReference, EntityUID, ExprKind, Literal, PolicyID, PrincipalOrResourceConstraint,
    },
    parser,
};
use miette::Diagnostic;

use super::{Factor, JudgedBy, Library, Mistake, ParsedPolicy, PolicyError, library::annotation};
use crate::{
    change::{Member, PolicyId, RoleName},
    contract::{Contract, Matcher},
    identity::{ServiceName, SpiffeId, TrustDomain},
    operator::QUORUM_MAX,
    path::NormalPath,
    state::{MeshState, Service},
};

/// Longest `@id`, in bytes.
pub const POLICY_ID_BYTES_MAX: usize = 128;
/// Longest text of one policy, in bytes.
pub const POLICY_BYTES_MAX: usize = 65_536;

/// One policy of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePolicy {
    /// Its `@id`.
    pub id: PolicyId,
    /// Its text, from the first annotation to the semicolon.
    pub text: Arc<str>,
    /// The bytes of the file that it takes.
    pub span: Range<usize>,
}

/// What the policies of a mesh can name. What is absent could not be read, and is not looked up.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The own trust domain.
    pub trust_domain: Option<&'a TrustDomain>,
    /// Every declared service.
    pub services: Option<&'a BTreeSet<ServiceName>>,
    /// Every role.
    pub roles: Option<&'a BTreeMap<RoleName, BTreeSet<Member>>>,
    /// The contracts, of services that have one.
    pub contracts: &'a BTreeMap<ServiceName, Contract>,
}

/// As [`read_file`]; the policies only when there is no mistake.
pub fn parse_file(file: &str, text: &str) -> Result<Vec<FilePolicy>, Vec<Mistake>> {
    let (policies, mistakes) = read_file(file, text);
    if mistakes.is_empty() { Ok(policies) } else { Err(mistakes) }
}

/// Splits `text`, the content of the file `file`, into its policies. Each that is returned has parsed, passed the strict
/// validator and carries an `@id` of its own; with them come all mistakes of the others, in the order of the text.
pub fn read_file(file: &str, text: &str) -> (Vec<FilePolicy>, Vec<Mistake>) {
    read_file_of(JudgedBy::RequestGate, file, text)
}

/// As [`read_file`], for either gate.
pub(crate) fn read_file_of(gate: JudgedBy, file: &str, text: &str) -> (Vec<FilePolicy>, Vec<Mistake>) {
    let mut policies: Vec<FilePolicy> = Vec::new();
    let mut mistakes = Vec::new();
    for span in statements(text) {
        let policy_text: Arc<str> = text[span.clone()].into();
        match one_policy(gate, &policy_text) {
            Err(found) => mistakes.extend(found.into_iter().map(|mistake| mistake.moved(span.start))),
            Ok((policy, id)) => {
                if let Some(first) = policies.iter().find(|policy| policy.id == id) {
                    let at = annotation_span(&policy, "id").unwrap_or(0..policy_text.len());
                    mistakes.push(Mistake {
                        span: at.start + span.start..at.end + span.start,
                        what: format!("the id `{id}` is taken"),
                        help: Some(format!(
                            "the policy at line {} of `{file}` has it",
                            line_of(text, first.span.start)
                        )),
                    });
                } else {
                    policies.push(FilePolicy { id, text: policy_text, span });
                }
            }
        }
    }
    (policies, mistakes)
}

/// Checks that a policy of [`parse_file`] names only what exists, and returns it parsed. Spans are those of the file.
pub fn validate(policy: &FilePolicy, known: &Known<'_>) -> Result<Arc<ParsedPolicy>, Vec<Mistake>> {
    let moved = |mistakes: Vec<Mistake>| -> Vec<Mistake> {
        mistakes.into_iter().map(|mistake| mistake.moved(policy.span.start)).collect()
    };
    let parsed = ParsedPolicy::parse(&policy.text).map_err(moved)?;
    let mistakes = unknown_names(&parsed, known);
    if mistakes.is_empty() { Ok(Arc::new(parsed)) } else { Err(moved(mistakes)) }
}

/// Every policy of `state` that is missing from `library`, carries another `@id` than the state says, or names what
/// does not exist in that state: what control refuses, whoever asks.
pub fn mistakes_of_state(state: &MeshState, library: &Library) -> Vec<PolicyError> {
    let Some(trust_domain) = &state.trust_domain else { return Vec::new() };
    let services = state.services.keys().cloned().collect();
    let contract = |service: &Service| library.contract(&service.spec.contract?).cloned();
    let contracts =
        state.services.iter().filter_map(|(name, service)| Some((name.clone(), contract(service)?))).collect();
    let known = Known {
        trust_domain: Some(trust_domain),
        services: Some(&services),
        roles: Some(&state.roles),
        contracts: &contracts,
    };
    let mut errors = Vec::new();
    for (id, reference) in &state.policies {
        let mut refuse = |what: String| errors.push(PolicyError { id: id.clone(), file: reference.file.clone(), what });
        match library.get(&reference.body) {
            None => refuse(format!("its text {} is missing", reference.body.short())),
            Some(parsed) if parsed.id() != id => refuse(format!("its text has the id `{}`", parsed.id())),
            Some(parsed) => {
                for mistake in unknown_names(parsed, &known) {
                    refuse(mistake.what);
                }
            }
        }
    }
    errors
}

/// Parses a text that must hold exactly one policy; everything but the names in it is checked.
pub(crate) fn one_policy(gate: JudgedBy, text: &Arc<str>) -> Result<(ast::Policy, PolicyId), Vec<Mistake>> {
    let whole = 0..text.len();
    if text.len() > POLICY_BYTES_MAX {
        let what = format!("the policy has {} bytes; at most {POLICY_BYTES_MAX} are read", text.len());
        return Err(vec![Mistake { span: whole, what, help: None }]);
    }
    let unnamed = PolicyID::from_string("policy");
    let parsed = parser::parse_policy(Some(unnamed), text)
        .map_err(|errors| errors.iter().map(|error| of_diagnostic(error, &whole)).collect::<Vec<_>>())?;
    let policy = ast::Policy::from(parsed);
    let mut mistakes = annotation_mistakes(gate, &policy, &whole);
    let id = match annotation(&policy, "id") {
        Some(id) if is_policy_id(id) => Some(PolicyId::from(id)),
        Some(id) => {
            mistakes.push(Mistake {
                span: annotation_span(&policy, "id").unwrap_or(whole.clone()),
                what: format!("`{}` is not a policy id", shortened(id)),
                help: Some(format!(
                    "use 1 to {POLICY_ID_BYTES_MAX} letters, digits, `-`, `_`, `.` and `/`: @id(\"web-reads-catalog\")"
                )),
            });
            None
        }
        None => {
            mistakes.push(Mistake {
                span: head_of(text),
                what: "the policy has no @id".to_owned(),
                help: Some("write @id(\"…\") above it: decisions are recorded by that name".to_owned()),
            });
            None
        }
    };
    let mut set = cedar_policy::PolicySet::new();
    if set.add(cedar_policy::Policy::from(policy.clone())).is_ok() {
        let verdict = gate.validator().validate(&set, cedar_policy::ValidationMode::Strict);
        mistakes.extend(verdict.validation_errors().map(|error| of_diagnostic(error, &whole)));
        // The validator repeats itself for every action that a scope lets through, in no fixed order.
        mistakes.sort_by(|a, b| (a.span.start, &a.what).cmp(&(b.span.start, &b.what)));
        mistakes.dedup();
    }
    match id {
        Some(id) if mistakes.is_empty() => {
            let named = policy.new_id(PolicyID::from_string(&*id));
            Ok((named, id))
        }
        _ => Err(mistakes),
    }
}

fn annotation_mistakes(gate: JudgedBy, policy: &ast::Policy, whole: &Range<usize>) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    for (name, value) in policy.annotations() {
        let mut refuse = |what: String, help: Option<String>| {
            let span = value.loc.as_ref().map_or(whole.clone(), |at| at.start()..at.end());
            mistakes.push(Mistake { span, what, help });
        };
        let name: &str = name.as_ref();
        match name {
            "step_up" | "max_age" | "countersign"
                if policy.effect() == ast::Effect::Permit
                    && (name != "countersign" || gate == JudgedBy::ChangeGate) =>
            {
                refuse(
                    format!("@{name} stands on a permit"),
                    Some("an obligation lifts a forbid: write a forbid for what needs assurance".to_owned()),
                )
            }
            "step_up" if Factor::parse(&value.val).is_none() => refuse(
                format!("`{}` is not a factor", shortened(&value.val)),
                Some(
                    "use \"mfa\", \"phr\" (phishing-resistant) or \"phrh\" (phishing-resistant, in hardware)"
                        .to_owned(),
                ),
            ),
            "max_age" if !value.val.parse::<u64>().is_ok_and(|seconds| seconds > 0) => refuse(
                format!("`{}` is not an age", shortened(&value.val)),
                Some("give whole seconds, at least 1: @max_age(\"300\")".to_owned()),
            ),
            "countersign" if gate == JudgedBy::ChangeGate => {
                if !value.val.parse::<u32>().is_ok_and(|count| (1..=QUORUM_MAX).contains(&count)) {
                    refuse(
                        format!("`{}` is not a number of operators", shortened(&value.val)),
                        Some(format!("give 1 to {QUORUM_MAX}, beside the author: @countersign(\"1\")")),
                    );
                }
            }
            "countersign" => refuse(
                "@countersign stands in the request gate".to_owned(),
                Some("changes are countersigned, requests are not: use @step_up, or move it to gate/".to_owned()),
            ),
            "id" | "step_up" | "max_age" => {}
            other => {
                if let Some(meant) = nearest(other, ["id", "step_up", "max_age", "countersign"].into_iter()) {
                    refuse(format!("unknown annotation @{other}"), Some(format!("did you mean @{meant}?")));
                }
            }
        }
    }
    mistakes
}

fn unknown_names(parsed: &ParsedPolicy, known: &Known<'_>) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    for uid in literals(&parsed.policy) {
        let eid: &str = uid.eid().as_ref();
        let found = match uid.entity_type().to_string().as_str() {
            "Role" => known.roles.filter(|roles| !roles.contains_key(eid)).map(|roles| {
                (
                    format!("the role `{eid}` does not exist"),
                    suggest(eid, roles.keys().map(|name| &**name), "Role", "[roles.*] of roles.toml"),
                )
            }),
            "Service" => unknown_service(eid, eid, known, "Service"),
            "Operation" => {
                let (service, path) = eid.find('/').map_or((eid, None), |at| (&eid[..at], Some(&eid[at..])));
                let contract = known.contracts.iter().find(|(name, _)| name.as_str() == service);
                match path {
                    Some(path) if let Some((_, contract)) = contract => {
                        unknown_operation(service, &path[1..], contract)
                    }
                    None => Some((
                        format!("`{eid}` is not an operation"),
                        format!("an operation is a service and a path: Operation::\"{eid}/\""),
                    )),
                    Some(path) if path.contains('*') => Some((
                        format!("`{eid}` means the path with the `*` in it"),
                        format!(
                            "for a prefix write resource in Service::\"{service}\" and when {{ context.request.path \
                             like \"{path}\" }}"
                        ),
                    )),
                    Some(path) => {
                        unknown_service(service, eid, known, "Operation").or_else(|| abnormal_path(service, path))
                    }
                }
            }
            "Workload" => unknown_workload(eid, known),
            _ => None,
        };
        if let Some((what, help)) = found {
            let span = uid.loc().map_or(0..parsed.text().len(), |at| at.start()..at.end());
            mistakes.push(Mistake { span, what, help: Some(help) });
        }
    }
    mistakes.sort_by_key(|mistake| mistake.span.start);
    mistakes
}

fn unknown_service(service: &str, eid: &str, known: &Known<'_>, kind: &str) -> Option<(String, String)> {
    let services = known.services.filter(|services| !services.iter().any(|name| name.as_str() == service))?;
    let help = match nearest(service, services.iter().map(ServiceName::as_str)) {
        Some(meant) => format!("did you mean {kind}::\"{meant}{}\"?", &eid[service.len()..]),
        None => "services are declared in mesh.toml".to_owned(),
    };
    Some((format!("the service `{service}` does not exist"), help))
}

/// An operation that the contract of the service does not have: with a contract, its operations are the only ones.
fn unknown_operation(service: &str, name: &str, contract: &Contract) -> Option<(String, String)> {
    if contract.named(name).is_some() {
        return None;
    }
    let path = format!("/{name}");
    let matcher = Matcher::new(contract);
    let at_path =
        matcher.methods().filter_map(|method| matcher.find(method, &path)).map(|at| &contract.operations()[at]);
    let of_path: Vec<String> =
        at_path.take(3).map(|operation| format!("Operation::\"{service}/{}\"", operation.name)).collect();
    let help = if !of_path.is_empty() {
        format!("the path is of {}; a path alone is context.request.path == \"{path}\"", of_path.join(", "))
    } else {
        match nearest(name, contract.operations().iter().map(|operation| &*operation.name)) {
            Some(meant) => format!("did you mean Operation::\"{service}/{meant}\"?"),
            None => {
                let all = contract.operations();
                let few: Vec<&str> = all.iter().take(8).map(|operation| &*operation.name).collect();
                let more =
                    if all.len() > few.len() { format!(" and {} more", all.len() - few.len()) } else { String::new() };
                format!("it has `{}`{more}", few.join("`, `"))
            }
        }
    };
    Some((format!("the contract of `{service}` has no operation `{name}`"), help))
}

/// A path that no request has, because requests are judged by the normal form of theirs.
fn abnormal_path(service: &str, path: &str) -> Option<(String, String)> {
    match NormalPath::parse(path) {
        Err(refused) => {
            Some((format!("no request has the path `{path}`: {refused}"), "write the path as it is judged".to_owned()))
        }
        Ok(normal) if normal.as_str() != path => Some((
            format!("no request has the path `{path}`"),
            format!("write its normal form: Operation::\"{service}{}\"", normal.as_str()),
        )),
        Ok(_) => None,
    }
}

fn unknown_workload(eid: &str, known: &Known<'_>) -> Option<(String, String)> {
    if !eid.contains("://") {
        let unknown = known.services.filter(|services| !services.iter().any(|name| name.as_str() == eid));
        return unknown.map(|services| {
            let names = services.iter().map(ServiceName::as_str);
            (
                format!("the workload `{eid}` does not exist"),
                suggest(eid, names, "Workload", "services of mesh.toml; a foreign one is named by its full SPIFFE ID"),
            )
        });
    }
    match SpiffeId::parse(eid) {
        Err(error) => Some((error.to_string(), "write it as Workload::\"spiffe://<trust domain>/<path>\"".to_owned())),
        Ok(id) if id.as_str() != eid => {
            Some((format!("`{eid}` is never a caller's id"), format!("write Workload::\"{id}\"")))
        }
        Ok(id) if known.trust_domain.is_some_and(|own| id.trust_domain() == own.as_str()) => {
            id.service().map(|service| {
                (format!("`{eid}` is a service of the own trust domain"), format!("write Workload::\"{service}\""))
            })
        }
        Ok(_) => None,
    }
}

fn suggest<'a>(given: &str, names: impl Iterator<Item = &'a str>, kind: &str, place: &str) -> String {
    match nearest(given, names) {
        Some(meant) => format!("did you mean {kind}::\"{meant}\"?"),
        None => format!("known are the {place}"),
    }
}

/// The entities a policy names, in its scope and in its conditions; actions are the validator's matter.
pub(super) fn literals(policy: &ast::Policy) -> Vec<Arc<EntityUID>> {
    let of_scope = |constraint: &PrincipalOrResourceConstraint| match constraint {
        PrincipalOrResourceConstraint::Eq(EntityReference::EUID(uid))
        | PrincipalOrResourceConstraint::In(EntityReference::EUID(uid))
        | PrincipalOrResourceConstraint::IsIn(_, EntityReference::EUID(uid)) => Some(uid.clone()),
        _ => None,
    };
    let mut found: Vec<Arc<EntityUID>> = of_scope(policy.principal_constraint().as_inner())
        .into_iter()
        .chain(of_scope(policy.resource_constraint().as_inner()))
        .collect();
    if let ActionConstraint::Eq(uid) = policy.action_constraint() {
        found.push(uid.clone());
    }
    let conditions = policy.non_scope_constraints().into_iter().flat_map(|condition| condition.subexpressions());
    found.extend(conditions.filter_map(|expr| match expr.expr_kind() {
        ExprKind::Lit(Literal::EntityUID(uid)) => Some(uid.clone()),
        _ => None,
    }));
    found
}

fn of_diagnostic(error: &(impl Diagnostic + ?Sized), whole: &Range<usize>) -> Mistake {
    let label = error.labels().and_then(|mut labels| labels.next());
    let span = label.as_ref().map_or(whole.clone(), |label| label.offset()..label.offset() + label.len());
    let expected = label.as_ref().and_then(|label| label.label()).filter(|label| label.starts_with("expected"));
    // Cedar names the policy and each action in its messages; ours stand beside the text, once.
    let plain = |text: String| {
        let text = text.replace("for policy `policy`, ", "");
        match text.split_once(" in context for Action::\"").map(|(before, rest)| (before, rest.split_once('"'))) {
            Some((before, Some((_, after)))) => format!("{before} in context{after}"),
            _ => text,
        }
    };
    Mistake {
        span,
        what: plain(error.to_string()),
        help: error.help().map(|help| plain(help.to_string())).or_else(|| expected.map(str::to_owned)),
    }
}

/// The bytes of each statement: from its first character that is neither white space nor comment, to its semicolon.
/// A semicolon inside a string or a comment ends nothing; text after the last one is a statement too, so that it is
/// reported.
fn statements(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut start = None;
    let mut end = 0; // after the last byte that is neither white space nor comment
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                at += bytes[at..].iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(bytes.len() - at);
                continue;
            }
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'"' => {
                start.get_or_insert(at);
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b';' => {
                let from = start.take().unwrap_or(at);
                found.push(from..at + 1);
            }
            _ => {
                start.get_or_insert(at);
            }
        }
        at = (at + 1).min(bytes.len());
        end = at;
    }
    if let Some(from) = start {
        found.push(from..end);
    }
    found
}

fn is_policy_id(given: &str) -> bool {
    (1..=POLICY_ID_BYTES_MAX).contains(&given.len())
        && given.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/'))
}

fn annotation_span(policy: &ast::Policy, name: &str) -> Option<Range<usize>> {
    let (_, annotation) = policy.annotations().find(|(key, _)| AsRef::<str>::as_ref(*key) == name)?;
    annotation.loc.as_ref().map(|at| at.start()..at.end())
}

/// The first word of a policy.
fn head_of(text: &str) -> Range<usize> {
    0..text.find(|c: char| !c.is_ascii_alphanumeric() && c != '@' && c != '_').unwrap_or(text.len())
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn shortened(given: &str) -> String {
    given.chars().take(60).collect()
}

impl Mistake {
    fn moved(mut self, by: usize) -> Self {
        self.span = self.span.start + by..self.span.end + by;
        self
    }
}

/// The name that was most likely meant by `given`: the nearest within a third of its length.
pub(crate) fn nearest<'a>(given: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let most = (given.chars().count() / 3).max(1);
    names
        .map(|name| (distance(given, name), name))
        .filter(|(distance, name)| *distance <= most && *name != given)
        .min()
        .map(|(_, name)| name)
}

/// Edits (insertion, deletion, replacement, exchange of neighbours) that lead from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(100).collect(), b.chars().take(100).collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = match (i, j) {
                (0, _) => j,
                (_, 0) => i,
                _ => {
                    let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                    let exchanged = if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                        rows[i - 2][j - 2] + 1
                    } else {
                        usize::MAX
                    };
                    replaced.min(exchanged).min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1)
                }
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn told(text: &str, mistakes: &[Mistake]) -> String {
        let mut told = String::new();
        for mistake in mistakes {
            told += &format!(
                "{}: `{}`: {}\n",
                line_of(text, mistake.span.start),
                &text[mistake.span.clone()],
                mistake.what
            );
            if let Some(help) = &mistake.help {
                told += &format!("   help: {help}\n");
            }
        }
        told
    }

    fn refused(text: &str, expected: Expect) {
        expected.assert_eq(&told(text, &parse_file("policies/a.cedar", text).unwrap_err()));
    }

    #[test]
    fn every_mistake_of_a_file_is_found_at_once() {
        refused(
            r#"// first
@id("a") permit (principal, action, resource);
permit (principal == Workload::"web", action, resource);
@id("b") permit (principal = Workload::"web", action, resource);
@id("c") permit (principal, action == Action::"http:GTE", resource);
@id("d") permit (principal, action, resource) when { context.request.pth == "/" };
@id("e") permit (principal, action, resource) when { context.request.size > 3 };
@id("f") permit (principal, action, resource) when { context.request.path == 3 };
@id("a") forbid (principal, action, resource);
@id("g h") forbid (principal, action, resource);
@id("i") permit (principal in Rolle::"x", action, resource);
@id("j") permit (principal == ?principal, action, resource);
@id("k") permit (principal, action, resource) when { ip("x").isLoopback() };
@id("l") permit (principal, action, resource) when { "unfinished };
"#,
            expect![[r#"
                3: `permit`: the policy has no @id
                   help: write @id("…") above it: decisions are recorded by that name
                4: `principal = Workload::"web"`: '=' is not a valid operator in Cedar
                   help: try using '==' instead
                5: `Action::"http:GTE"`: unrecognized action `Action::"http:GTE"`
                   help: did you mean `Action::"http:GET"`?
                6: `context.request.pth`: attribute `request.pth` in context not found
                   help: did you mean `path`?
                7: `context.request.size`: unable to guarantee safety of access to optional attribute `request.size` in context
                   help: try testing for the attribute's presence with `context.request has size && ..`
                8: `context.request.path == 3`: the types Long and String are not compatible
                   help: both operands to a `==` expression must have compatible types. Types must be exactly equal to be compatible
                9: `@id("a")`: the id `a` is taken
                   help: the policy at line 2 of `policies/a.cedar` has it
                10: `@id("g h")`: `g h` is not a policy id
                   help: use 1 to 128 letters, digits, `-`, `_`, `.` and `/`: @id("web-reads-catalog")
                11: `Rolle`: unrecognized entity type `Rolle`
                   help: did you mean `Role`?
                12: `?principal`: expected a static policy, got a template containing the slot ?principal
                   help: try removing the template slot(s) from this policy
                13: `ip("x").isLoopback()`: error during extension function argument validation: failed to parse as IP address: `"x"`
                   help: valid IP strings are IPv4/IPv6 addresses or CIDR ranges like `127.0.0.1`, `127.0.0.1/24`, or `ffee::/64`
                14: ``: invalid token
                   help: try checking that all strings are closed properly
            "#]],
        );
    }

    #[test]
    fn an_obligation_that_could_not_be_met_is_a_mistake() {
        refused(
            r#"@id("a") @step_up("phr") permit (principal, action, resource);
@id("b") @step_up("strong") forbid (principal, action, resource);
@id("c") @max_age("5m") forbid (principal, action, resource);
@id("d") @max_age("0") forbid (principal, action, resource);
@id("e") @countersign("1") forbid (principal, action, resource);
@id("f") @stepup("phr") forbid (principal, action, resource);
@id("g") @owner("payments team") forbid (principal, action, resource);
"#,
            expect![[r#"
                1: `@step_up("phr")`: @step_up stands on a permit
                   help: an obligation lifts a forbid: write a forbid for what needs assurance
                2: `@step_up("strong")`: `strong` is not a factor
                   help: use "mfa", "phr" (phishing-resistant) or "phrh" (phishing-resistant, in hardware)
                3: `@max_age("5m")`: `5m` is not an age
                   help: give whole seconds, at least 1: @max_age("300")
                4: `@max_age("0")`: `0` is not an age
                   help: give whole seconds, at least 1: @max_age("300")
                5: `@countersign("1")`: @countersign stands in the request gate
                   help: changes are countersigned, requests are not: use @step_up, or move it to gate/
                6: `@stepup("phr")`: unknown annotation @stepup
                   help: did you mean @step_up?
            "#]],
        );
    }

    #[test]
    fn semicolons_in_strings_and_comments_end_nothing() {
        let text = "// a; b \"\n@id(\"a\") // ;\npermit (principal, action, resource) when { context.request.path == \"\\\";é\" };\r\n\n  @id(\"b\")forbid(principal,action,resource);// end";
        let found = parse_file("x", text).unwrap();
        let texts: Vec<&str> = found.iter().map(|policy| &*policy.text).collect();
        assert_eq!(
            texts,
            [
                "@id(\"a\") // ;\npermit (principal, action, resource) when { context.request.path == \"\\\";é\" };",
                "@id(\"b\")forbid(principal,action,resource);",
            ]
        );
        assert!(found.iter().all(|policy| text[policy.span.clone()] == *policy.text));
        assert_eq!(parse_file("x", " // nothing\n").unwrap(), []);
    }

    #[test]
    fn names_that_do_not_exist_are_mistakes_with_what_was_meant() {
        let text = r#"@id("a") permit (principal in Role::"raeder", action, resource in Service::"catalogue");
@id("b") permit (principal == Workload::"wbe", action, resource == Operation::"catlog/items");
@id("c") permit (principal == Workload::"spiffe://shop.example/web", action, resource == Operation::"catalog");
@id("d") permit (principal == Workload::"spiffe://Partner.example/x", action, resource == Operation::"catalog/items/*");
@id("e") permit (principal == Workload::"spiffe://partner.example//x", action, resource) when { principal in Role::"absent" };
@id("f") permit (principal == Workload::"nothing-like-it", action, resource in Service::"nothing-like-it");
@id("g") permit (principal == Workload::"spiffe://partner.example/x", action, resource in Namespace::"any");
@id("h") permit (principal == Workload::"spiffe://shop.example/ns/x", action, resource in Service::"catalog");
@id("i") permit (principal, action, resource == Operation::"catalog/a//b") when { resource == Operation::"catalog/%41?x" };
@id("j") permit (principal, action, resource == Operation::"catalog/%41");
"#;
        let trust_domain = TrustDomain::parse("shop.example").unwrap();
        let services = ["web", "catalog"].into_iter().map(|name| ServiceName::parse(name).unwrap()).collect();
        let roles = BTreeMap::from([("reader".into(), BTreeSet::new())]);
        let known = Known {
            trust_domain: Some(&trust_domain),
            services: Some(&services),
            roles: Some(&roles),
            contracts: &BTreeMap::new(),
        };
        let mut found = String::new();
        for policy in parse_file("policies/a.cedar", text).unwrap() {
            found += &told(text, &validate(&policy, &known).err().unwrap_or_default());
        }
        expect![[r#"
            1: `Role::"raeder"`: the role `raeder` does not exist
               help: did you mean Role::"reader"?
            1: `Service::"catalogue"`: the service `catalogue` does not exist
               help: did you mean Service::"catalog"?
            2: `Workload::"wbe"`: the workload `wbe` does not exist
               help: did you mean Workload::"web"?
            2: `Operation::"catlog/items"`: the service `catlog` does not exist
               help: did you mean Operation::"catalog/items"?
            3: `Workload::"spiffe://shop.example/web"`: `spiffe://shop.example/web` is a service of the own trust domain
               help: write Workload::"web"
            3: `Operation::"catalog"`: `catalog` is not an operation
               help: an operation is a service and a path: Operation::"catalog/"
            4: `Workload::"spiffe://Partner.example/x"`: `spiffe://Partner.example/x` is never a caller's id
               help: write Workload::"spiffe://partner.example/x"
            4: `Operation::"catalog/items/*"`: `catalog/items/*` means the path with the `*` in it
               help: for a prefix write resource in Service::"catalog" and when { context.request.path like "/items/*" }
            5: `Workload::"spiffe://partner.example//x"`: `spiffe://partner.example//x` is not a SPIFFE ID: a path segment is empty
               help: write it as Workload::"spiffe://<trust domain>/<path>"
            5: `Role::"absent"`: the role `absent` does not exist
               help: known are the [roles.*] of roles.toml
            6: `Workload::"nothing-like-it"`: the workload `nothing-like-it` does not exist
               help: known are the services of mesh.toml; a foreign one is named by its full SPIFFE ID
            6: `Service::"nothing-like-it"`: the service `nothing-like-it` does not exist
               help: services are declared in mesh.toml
            9: `Operation::"catalog/a//b"`: no request has the path `/a//b`: an empty path segment is ambiguous
               help: write the path as it is judged
            9: `Operation::"catalog/%41?x"`: no request has the path `/%41?x`
               help: write its normal form: Operation::"catalog/A"
            10: `Operation::"catalog/%41"`: no request has the path `/%41`
               help: write its normal form: Operation::"catalog/A"
        "#]].assert_eq(&found);
    }

    #[test]
    fn with_a_contract_only_its_operations_can_be_named() {
        let text = r#"@id("a") permit (principal, action, resource == Operation::"catalog/getItem");
@id("b") permit (principal, action, resource == Operation::"catalog/getIten");
@id("c") permit (principal, action, resource == Operation::"catalog/items/4");
@id("d") permit (principal, action, resource) when { resource in Operation::"catalog/zzzzzzzzzz" };
@id("e") permit (principal, action, resource == Operation::"web/items/4");
@id("f") permit (principal, action, resource == Operation::"catalog/PUT /items/{id}");
"#;
        let contracts = BTreeMap::from([(
            ServiceName::parse("catalog").unwrap(),
            super::super::fixture::contract(&[
                ("getItem", "GET", "/items/{id}"),
                ("PUT /items/{id}", "PUT", "/items/{id}"),
            ]),
        )]);
        let services = ["web", "catalog"].into_iter().map(|name| ServiceName::parse(name).unwrap()).collect();
        let known = Known { trust_domain: None, services: Some(&services), roles: None, contracts: &contracts };
        let mut found = String::new();
        for policy in parse_file("policies/a.cedar", text).unwrap() {
            found += &told(text, &validate(&policy, &known).err().unwrap_or_default());
        }
        expect![[r#"
            2: `Operation::"catalog/getIten"`: the contract of `catalog` has no operation `getIten`
               help: did you mean Operation::"catalog/getItem"?
            3: `Operation::"catalog/items/4"`: the contract of `catalog` has no operation `items/4`
               help: the path is of Operation::"catalog/PUT /items/{id}", Operation::"catalog/getItem"; a path alone is context.request.path == "/items/4"
            4: `Operation::"catalog/zzzzzzzzzz"`: the contract of `catalog` has no operation `zzzzzzzzzz`
               help: it has `PUT /items/{id}`, `getItem`
        "#]].assert_eq(&found);
    }

    #[test]
    fn a_state_that_names_what_it_does_not_have_is_refused() {
        let mut library = Library::default();
        let text: Arc<str> = r#"@id("a") permit (principal in Role::"reader", action, resource);"#.into();
        let body = crate::canonical::Digest::of(text.as_bytes());
        let mut state =
            MeshState { trust_domain: Some(TrustDomain::parse("shop.example").unwrap()), ..Default::default() };
        let reference = || crate::state::PolicyRef { file: "policies/a.cedar".into(), body };
        state.policies.insert("a".into(), reference());
        let told = |state: &MeshState, library: &Library| {
            mistakes_of_state(state, library).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        assert!(told(&state, &library).contains("is missing"));
        library.insert(body, &text).unwrap();
        assert_eq!(told(&state, &library), "policy `a` (policies/a.cedar): the role `reader` does not exist");
        state.roles.insert("reader".into(), BTreeSet::new());
        assert_eq!(told(&state, &library), "");
        state.policies.insert("b".into(), reference());
        assert_eq!(told(&state, &library), "policy `b` (policies/a.cedar): its text has the id `a`");
    }

    #[test]
    fn the_nearest_name_is_proposed_and_a_far_one_is_not() {
        for (given, expected) in
            [("web", None), ("wbe", Some("web")), ("catalogue", Some("catalog")), ("xyz", None), ("", None)]
        {
            assert_eq!(nearest(given, ["web", "catalog"].into_iter()), expected, "{given}");
        }
    }
}
