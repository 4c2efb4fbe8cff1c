//! A mesh directory, parsed: `mesh.toml`, `roles.toml`, `routes.toml`, `policies/*.cedar`, `gate/*.cedar`, `tests/*.toml`.
//!
//! The files come in as text and every mistake in any of them comes out at once, with its place and how to mend it. What
//! parses refers only to what exists. [`plan`] compares it with a mesh and gives the changes that lead from one to the
//! other. No file is opened here, and nothing is asked of a host: whether a program exists is for `up` to find out.

mod clients;
mod contracts;
mod mesh;
mod pipelines;
mod plan;
mod read;
mod reference;
mod roles;
mod routes;
mod sign_in;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::Arc,
};

use miette::{Diagnostic, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents};

pub use contracts::{contract_files, is_descriptor_set};
pub use plan::{Plan, TrustDomainMoved, plan, quarantined};
pub use reference::{Key, Section, reference};

use crate::{
    assurance::authenticators::Authenticators,
    change::{Member, PolicyId, RoleName, RouteName},
    client::Client,
    contract::Contract,
    gate,
    identity::{ServiceName, TrustDomain},
    ledger::BODY_BYTES_MAX,
    lifetimes::Lifetimes,
    operator::Seal,
    pipeline::{Issuer, IssuerName, Pipeline, PipelineName},
    policy::{self, FilePolicy},
    route::Route,
    service::{Recorded, ServiceSpec, Tokens},
    sign_in::{SignIn, SignInName},
};
use contracts::Contracts;
use read::Source;
pub(crate) use read::{PLAIN_NAME, is_plain_name};

/// The file that makes a directory a mesh directory.
pub const MESH_FILE: &str = "mesh.toml";
/// Roles, which a mesh may have.
pub const ROLES_FILE: &str = "roles.toml";
/// Traffic rules, which a mesh may have.
pub const ROUTES_FILE: &str = "routes.toml";
/// Longest file, in bytes.
pub const FILE_BYTES_MAX: usize = 16 << 20;
/// Most instances of one service on one host.
pub const INSTANCES_MAX: u32 = 256;
/// Most worker threads of one proxy.
pub const WORKERS_MAX: u32 = 256;

/// The files of a mesh directory: their text by path below the directory, with `/` between its parts. A file that is no
/// text, a [descriptor set](is_descriptor_set), comes as base64.
pub type Files = BTreeMap<String, String>;

/// A mesh directory without a mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// The namespace of the mesh.
    pub trust_domain: TrustDomain,
    /// What holds for services that say nothing else.
    pub defaults: Defaults,
    /// How many operators sign each change, once so many can; `None`: it says nothing.
    pub seal: Option<Seal>,
    /// The only authenticators that may be enrolled; any, when it says nothing.
    pub authenticators: Option<Authenticators>,
    /// How long what the authority signs is good; as ever, when it says nothing.
    pub lifetimes: Option<Lifetimes>,
    /// Every service.
    pub services: BTreeMap<ServiceName, LocalService>,
    /// Who has which role.
    pub roles: BTreeMap<RoleName, BTreeSet<Member>>,
    /// The request gate.
    pub policies: BTreeMap<PolicyId, PolicyText>,
    /// The change gate; empty when the mesh brings none.
    pub gate: BTreeMap<PolicyId, PolicyText>,
    /// The traffic rules.
    pub routes: BTreeMap<RouteName, Route>,
    /// Whose tokens are believed.
    pub issuers: BTreeMap<IssuerName, Issuer>,
    /// The automations that may propose changes.
    pub pipelines: BTreeMap<PipelineName, Pipeline>,
    /// The providers that people sign in with.
    pub sign_ins: BTreeMap<SignInName, SignIn>,
    /// The clients of the token service that are no workloads.
    pub clients: BTreeMap<ServiceName, Client>,
    /// The policy tests: text by file. [`crate::policy`] reads them.
    pub tests: BTreeMap<Arc<str>, Arc<str>>,
}

/// `[defaults]` of `mesh.toml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Whether workloads get a namespace of their own.
    pub isolate: Isolate,
    /// Worker threads of each proxy.
    pub workers: u32,
    /// For services that do not say.
    pub max_staleness_seconds: u32,
    /// For services that do not say.
    pub recorded: Recorded,
    /// For services that do not say.
    pub exchanges_max: u32,
    /// For services that do not say.
    pub tokens: Tokens,
}

/// Whether workloads are kept apart in user and network namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Isolate {
    /// Where the kernel allows it; `status` says where it does not.
    #[default]
    Auto,
    /// Or not started at all.
    Required,
    /// Never: the addresses of `run.json` are reachable from the host.
    Off,
}

/// A service as `mesh.toml` describes it: what the mesh holds of it, and how this host runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalService {
    /// The program with its arguments; `None` when it runs elsewhere.
    pub run: Option<Vec<String>>,
    /// Where it listens on 127.0.0.1; `None` when it is told by `PORT`. One of `run` and `port` is there.
    pub port: Option<u16>,
    /// Added to its environment.
    pub env: BTreeMap<String, String>,
    /// Processes of it on this host, at least 1.
    pub instances: u32,
    /// What the ledger holds of it.
    pub spec: ServiceSpec,
    /// Its operations, when it has a contract; `spec` has their digest.
    pub contract: Option<Contract>,
}

/// A policy of either gate with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyText {
    /// The file, below the mesh directory.
    pub file: Arc<str>,
    /// The bytes of the file that it takes.
    pub span: Range<usize>,
    /// Its Cedar text.
    pub text: Arc<str>,
}

/// A mistake in a file: where it stands, what it is, how to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The file, below the mesh directory.
    pub file: Arc<str>,
    /// All of its text; empty when there is no such file.
    pub text: Arc<str>,
    /// The bytes of `text` that it is about.
    pub span: Range<usize>,
    /// What is wrong, lower case, no full stop.
    pub what: String,
    /// How to mend it.
    pub help: Option<String>,
}

/// Every mistake of a mesh directory, by file and place; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<Mistake>);

/// Whether `path`, below a mesh directory, is a file that [`parse`] reads whatever `mesh.toml` says. [`contract_files`] names
/// the others.
pub fn is_read(path: &str) -> bool {
    matches!(path, MESH_FILE | ROLES_FILE | ROUTES_FILE)
        || is_policy_file(path)
        || is_gate_file(path)
        || is_test_file(path)
}

fn is_policy_file(path: &str) -> bool {
    path.starts_with("policies/") && path.ends_with(".cedar")
}

fn is_gate_file(path: &str) -> bool {
    path.starts_with("gate/") && path.ends_with(".cedar")
}

fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/") && path.ends_with(".toml")
}

/// Parses the files of a mesh directory; files that are none of its own are passed over.
pub fn parse(files: &Files) -> Result<Directory, Mistakes> {
    let sources: BTreeMap<&str, Source> =
        files.iter().filter(|(path, _)| is_read(path)).map(|(path, text)| (&**path, Source::new(path, text))).collect();
    let absent = |path| Source::new(path, "");
    let (no_mesh, no_roles, no_routes) = (absent(MESH_FILE), absent(ROLES_FILE), absent(ROUTES_FILE));
    let mesh_source = sources.get(MESH_FILE).unwrap_or(&no_mesh);
    if !sources.contains_key(MESH_FILE) {
        let help = "`countersign init DIR` makes one; `-C DIR` names another directory";
        mesh_source.mistake(0..0, "there is no `mesh.toml` in this directory", help);
    }

    let contracts = Contracts::new(files);
    let mesh = mesh::read(mesh_source, &contracts);
    let roles = roles::read(sources.get(ROLES_FILE).unwrap_or(&no_roles), &mesh);
    let routes = routes::read(sources.get(ROUTES_FILE).unwrap_or(&no_routes), &mesh);
    let policies = read_policies(&sources, &mesh, roles.as_ref());
    let gate = read_gate(&sources);
    let tests = sources
        .values()
        .filter(|source| is_test_file(&source.file))
        .map(|source| (source.file.clone(), source.text.clone()))
        .collect();

    let all = sources.into_values().chain([no_mesh]).chain(contracts.into_sources());
    let mut mistakes: Vec<Mistake> = all.flat_map(Source::into_mistakes).collect();
    mistakes.sort_by(|a, b| (&a.file, a.span.start).cmp(&(&b.file, b.span.start)));
    match mesh.trust_domain {
        Some(trust_domain) if mistakes.is_empty() => Ok(Directory {
            trust_domain,
            defaults: mesh.defaults,
            seal: mesh.seal,
            authenticators: mesh.authenticators,
            lifetimes: mesh.lifetimes,
            services: mesh.services,
            roles: roles.unwrap_or_default(),
            policies,
            gate,
            routes,
            issuers: mesh.issuers,
            pipelines: mesh.pipelines,
            sign_ins: mesh.sign_ins,
            clients: mesh.clients,
            tests,
        }),
        _ => Err(Mistakes(mistakes)),
    }
}

fn read_policies(
    sources: &BTreeMap<&str, Source>,
    mesh: &mesh::Mesh,
    roles: Option<&BTreeMap<RoleName, BTreeSet<Member>>>,
) -> BTreeMap<PolicyId, PolicyText> {
    let mut policies: BTreeMap<PolicyId, PolicyText> = BTreeMap::new();
    let services: BTreeSet<ServiceName> = mesh.services.keys().cloned().collect();
    // What a file that is no TOML would have declared is not looked up; the rest is.
    let is_known = mesh.is_readable && sources.contains_key(MESH_FILE);
    let contract = |(name, service): (&ServiceName, &LocalService)| Some((name.clone(), service.contract.clone()?));
    let contracts = mesh.services.iter().filter_map(contract).collect();
    let known = policy::Known {
        trust_domain: mesh.trust_domain.as_ref(),
        services: is_known.then_some(&services),
        roles,
        contracts: &contracts,
    };
    for source in sources.values().filter(|source| is_policy_file(&source.file)) {
        let (parsed, mistakes) = policy::read_file(&source.file, &source.text);
        mistakes.into_iter().for_each(|mistake| source.take(mistake));
        for found in parsed {
            if let Err(mistakes) = policy::validate(&found, &known) {
                mistakes.into_iter().for_each(|mistake| source.take(mistake));
            }
            take_policy(source, found, &mut policies);
        }
    }
    policies
}

fn read_gate(sources: &BTreeMap<&str, Source>) -> BTreeMap<PolicyId, PolicyText> {
    let mut policies = BTreeMap::new();
    for source in sources.values().filter(|source| is_gate_file(&source.file)) {
        let (parsed, mistakes) = gate::read_file(&source.file, &source.text);
        mistakes.into_iter().for_each(|mistake| source.take(mistake));
        parsed.into_iter().for_each(|found| take_policy(source, found, &mut policies));
    }
    policies
}

/// Takes up a policy of `source` unless another of the same gate has its id.
fn take_policy(source: &Source, found: FilePolicy, policies: &mut BTreeMap<PolicyId, PolicyText>) {
    if found.text.len() > BODY_BYTES_MAX {
        source.mistake(found.span.clone(), format!("a policy has at most {BODY_BYTES_MAX} bytes"), "split it");
    }
    if let Some(first) = policies.get(&found.id) {
        let what = format!("policy id `{}` is taken", found.id);
        source.mistake(found.span, what, format!("`{}` has it; give each policy an @id of its own", first.file));
        return;
    }
    let text = PolicyText { file: source.file.clone(), span: found.span, text: found.text };
    policies.insert(found.id, text);
}

impl Mistakes {
    /// All of them, by file and place.
    pub fn all(&self) -> &[Mistake] {
        &self.0
    }

    /// All of them, by file and place.
    pub fn into_all(self) -> Vec<Mistake> {
        self.0
    }
}

impl Mistake {
    /// The line and the column of its first byte, both from 1.
    pub fn position(&self) -> (usize, usize) {
        let before = self.text.get(..self.span.start).unwrap_or(&self.text);
        let line_at = before.rfind('\n').map_or(0, |at| at + 1);
        (before.matches('\n').count() + 1, before[line_at..].chars().count() + 1)
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Mistake {}

impl Diagnostic for Mistake {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(self)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        (!self.text.is_empty()).then(|| {
            Box::new(std::iter::once(LabeledSpan::underline(self.span.clone()))) as Box<dyn Iterator<Item = _>>
        })
    }
}

/// Gives the lines around the place the name of their file.
impl SourceCode for Mistake {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let found = self.text.read_span(span, lines_before, lines_after)?;
        Ok(Box::new(MietteSpanContents::new_named(
            self.file.to_string(),
            found.data(),
            *found.span(),
            found.line(),
            found.column(),
            found.line_count(),
        )))
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => f.write_str("there is a mistake in the mesh directory"),
            count => write!(f, "there are {count} mistakes in the mesh directory"),
        }
    }
}

impl std::error::Error for Mistakes {}

impl Diagnostic for Mistakes {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.0.iter().map(|mistake| mistake as &dyn Diagnostic)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{change::Revision, state::MeshState};

    fn files(files: &[(&str, &str)]) -> Files {
        files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect()
    }

    /// The files of `examples/shop`.
    fn shop() -> Files {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/shop");
        let mut found = Files::new();
        for folder in ["", "policies", "tests"] {
            for entry in std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()) {
                let path = entry.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                if is_read(&path) {
                    found.insert(path, std::fs::read_to_string(entry).unwrap());
                }
            }
        }
        found
    }

    /// Every mistake as `file:line:column what (help)`.
    fn told(given: &Files) -> String {
        let Err(mistakes) = parse(given) else { return "no mistake\n".into() };
        let line = |mistake: &Mistake| {
            let (line, column) = mistake.position();
            let help = mistake.help.as_ref().map(|help| format!(" ({help})")).unwrap_or_default();
            format!("{}:{line}:{column} {}{help}\n", mistake.file, mistake.what)
        };
        mistakes.all().iter().map(line).collect()
    }

    #[test]
    fn the_shop_has_no_mistake_and_a_plan_that_leads_to_it() {
        let directory = parse(&shop()).unwrap_or_else(|_| panic!("{}", told(&shop())));
        let plan = plan(&directory, &MeshState::default(), Revision(0)).unwrap();
        let state = MeshState::default().apply_all(&plan.change_set).unwrap();
        assert_eq!(state.services.len(), directory.services.len());
        assert!(super::plan(&directory, &state, Revision(1)).unwrap().is_empty());
    }

    #[test]
    fn the_smallest_mesh_is_a_trust_domain() {
        let directory = parse(&files(&[("mesh.toml", "trust_domain = \"a.example\"\n")])).unwrap();
        assert_eq!((directory.services.len(), directory.defaults), (0, Defaults::default()));
    }

    #[test]
    fn every_mistake_in_mesh_toml_is_told_at_once() {
        let text = "\
trust_domian = \"shop.example\"
[default]
[defaults]
isolate = \"of\"
workers = 0
max_staleness = \"1d\"
exchanges_max = \"10\"
[services.web]
run = []
upstreams = [\"catalgo\", \"catalog\", \"catalog\", 7]
prot = 80
[services.catalog]
port = 8081
instances = 2
protocol = \"https\"
[services.orders]
run = \"python3 orders.py\"
port = 8081
max_staleness = \"1500ms\"
env = { PORT = \"1\", 1A = \"x\", LOG = 1 }
[services.Pay]
run = [\"\"]
port = 65536
namespace = \"a b\"
[services.db]
run = [\"db\"]
protocol = \"tcp\"
[services.none]
recorded = \"never\"
[services.many]
run = [\"many\"]
port = 9000
instances = 3
";
        expect_test::expect![[r#"
            mesh.toml:1:1 unknown key `trust_domian` (did you mean `trust_domain`?)
            mesh.toml:1:1 `trust_domain` is missing (name the mesh in the first line: trust_domain = "shop.example")
            mesh.toml:2:2 unknown key `default` (did you mean `defaults`?)
            mesh.toml:4:11 `isolate` cannot be `of` (did you mean `off`?)
            mesh.toml:5:11 `workers` is out of bounds (give 1 to 256)
            mesh.toml:6:17 `1d` is not a duration (write a number with `ms`, `s`, `m` or `h`; give 1s to 24h, like "30s")
            mesh.toml:7:17 `exchanges_max` must be a whole number, not a string (give 1 to 1000000)
            mesh.toml:9:7 `run` is empty (give the program first: run = ["python3", "web.py"])
            mesh.toml:10:14 there is no service `catalgo` (did you mean `catalog`?)
            mesh.toml:10:36 `catalog` stands here twice (once is enough)
            mesh.toml:10:47 `upstreams[…]` must be a string, not a number (put it in quotes: "7")
            mesh.toml:11:1 unknown key `prot` (did you mean `port`?)
            mesh.toml:14:1 `instances` without `run` means nothing (it is for what the mesh starts)
            mesh.toml:15:12 `protocol` cannot be `https` (did you mean `http`?)
            mesh.toml:17:7 `run` must be an array of strings (write ["python3", "orders.py"])
            mesh.toml:18:8 port 8081 is taken (service `catalog` listens there)
            mesh.toml:19:17 `max_staleness` must be whole seconds (agents are heard once a second)
            mesh.toml:20:9 `PORT` is set by the mesh (say `port = …` instead)
            mesh.toml:20:21 `1A` is not the name of a variable (use letters, digits and `_`, and no digit first)
            mesh.toml:20:37 `LOG` must be a string, not a number (put it in quotes: "1")
            mesh.toml:21:11 `Pay` is not a service name: only `a`-`z`, `0`-`9` and `-` are allowed
            mesh.toml:22:8 the program of `run` is empty (give the program first: run = ["python3", "web.py"])
            mesh.toml:23:8 `port` is out of bounds (give 1 to 65535)
            mesh.toml:24:13 `a b` is not a namespace (use 1 to 64 letters, digits, `-`, `_` and `.`)
            mesh.toml:27:1 a tcp service has no usual port (give the `mesh_port` that its callers use, like 5432)
            mesh.toml:28:11 service `none` has neither `run` nor `port` (give `run = ["program", "argument"]`, or the `port` where it listens on 127.0.0.1)
            mesh.toml:29:12 `recorded` cannot be `never` (there are `best_effort`, `always`)
            mesh.toml:32:1 3 instances cannot listen on one port (leave `port` out: the variable PORT tells each instance its own)
        "#]].assert_eq(&told(&files(&[("mesh.toml", text)])));
    }

    const OPENAPI: &str = "openapi: 3.1.0\npaths:\n  /charges:\n    post: { operationId: createCharge }\n";

    #[test]
    fn a_sign_in_by_which_somebody_would_be_taken_for_somebody_else_is_a_mistake() {
        let of = |more: &str| {
            let issuers = "[issuers.id]\nurl = \"https://id.example\"\naudience = \"mesh\"\n";
            let text = format!("trust_domain = \"a.example\"\n{issuers}{more}");
            told(&files(&[("mesh.toml", &text)]))
        };
        let good = "issuer = \"id\"\nclient_id = \"web\"\nroles = { staff = [\"editor\"] }\n";
        assert_eq!(of(&format!("[sign_in.corp]\n{good}")), "no mistake\n");
        let pipeline = "[pipelines.deploy]\nissuer = \"id\"\nclaims = { sub = \"robot\" }\n";
        for (case, more, what) in [
            ("a prefix of ours", format!("[sign_in.Pipeline]\n{good}"), "would be taken for somebody else"),
            ("no name", format!("[sign_in.\"a:b\"]\n{good}"), "is not the name of a sign-in"),
            (
                "a token for a pipeline",
                format!("{pipeline}[sign_in.corp]\n{}", good.replace("web", "mesh")),
                "a token for people would be one of pipeline `deploy`",
            ),
        ] {
            let found = of(&more);
            assert!(found.contains(what), "{case}: {found}");
        }
    }

    #[test]
    fn a_contract_is_read_from_the_file_that_a_service_names() {
        let toml = "\
trust_domain = \"shop.example\"
[services]
payments = { port = 1, contract = \"contracts/payments.yaml\" }
refunds = { port = 2, contract = \"contracts/payments.yaml\" }
orders = { port = 3, protocol = \"grpc\", contract = \"orders.binpb\" }
web = { port = 4 }
page = { port = 5, contract = \"none\" }
";
        assert_eq!(contract_files(toml).into_iter().collect::<Vec<_>>(), ["contracts/payments.yaml", "orders.binpb"]);
        // file { package: "shop" service { name: "Orders" method { name: "Place" } } }
        let orders = "ChkSBHNob3AyEQoGT3JkZXJzEgcKBVBsYWNl";
        let given = files(&[("mesh.toml", toml), ("contracts/payments.yaml", OPENAPI), ("orders.binpb", orders)]);
        let directory = parse(&given).unwrap_or_else(|_| panic!("{}", told(&given)));
        let of = |name| &directory.services[&ServiceName::parse(name).unwrap()];
        assert_eq!(&*of("payments").contract.as_ref().unwrap().operations()[0].name, "createCharge");
        assert_eq!(of("payments").spec.contract, of("refunds").spec.contract);
        assert_eq!(&*of("orders").contract.as_ref().unwrap().operations()[0].name, "shop.Orders/Place");
        assert_eq!((of("web").spec.contract, &of("web").contract), (None, &None));
        assert_eq!((of("page").spec.contract, &of("page").contract), (None, &None));
        assert_eq!(["web", "page", "orders"].map(|name| of(name).spec.without_contract), [false, true, false]);

        let plan = plan(&directory, &MeshState::default(), Revision(0)).unwrap();
        let state = MeshState::default().apply_all(&plan.change_set).unwrap();
        let bodies: Vec<_> = state.bodies().collect();
        assert_eq!(bodies.len(), 3);
        assert!(bodies.iter().all(|digest| plan.bodies.get(digest).is_some()), "the ledger gets what is enforced");
    }

    #[test]
    fn every_mistake_about_a_contract_is_told_where_it_stands() {
        let toml = "\
trust_domain = \"shop.example\"
[services]
a = { port = 1, contract = \"none.yaml\" }
b = { port = 2, contract = \"../secret.yaml\" }
c = { port = 3, contract = \"/etc/a.yaml\" }
d = { port = 4, contract = \".countersign/a.yaml\" }
e = { port = 5, contract = \"a.txt\" }
f = { port = 6, contract = \"a.binpb\" }
g = { port = 7, protocol = \"grpc\", contract = \"bad.yaml\" }
h = { port = 8, protocol = \"tcp\", contract = \"bad.yaml\" }
i = { port = 9, contract = \"bad.yaml\" }
j = { port = 10, contract = \"bad.yaml\" }
k = { port = 11, protocol = \"grpc\", contract = \"bad.desc\" }
l = { port = 12, contract = 7 }
";
        let bad = "openapi: 3.1.0\npaths:\n  /a:\n    GET: {}\n  b:\n    get: {}\n";
        expect_test::expect![[r#"
            bad.desc:1:1 this is no descriptor set: a message ends before it should, or is none (write it with `protoc --descriptor_set_out=FILE`, or `buf build -o FILE.binpb`)
            bad.yaml:4:5 unknown key `GET` in `/a` (did you mean `get`?)
            mesh.toml:3:28 there is no file `none.yaml` (its path is below the directory of mesh.toml)
            mesh.toml:4:28 `../secret.yaml` is not a file of the mesh directory (give its path below the directory of mesh.toml: "contracts/payments.yaml")
            mesh.toml:5:28 `/etc/a.yaml` is not a file of the mesh directory (give its path below the directory of mesh.toml: "contracts/payments.yaml")
            mesh.toml:6:28 `.countersign/a.yaml` is not a file of the mesh directory (give its path below the directory of mesh.toml: "contracts/payments.yaml")
            mesh.toml:7:28 `a.txt` cannot be the contract of a service that speaks http (the contract of an http service is an OpenAPI document: .yaml, .yml or .json)
            mesh.toml:8:28 `a.binpb` cannot be the contract of a service that speaks http (the contract of an http service is an OpenAPI document: .yaml, .yml or .json)
            mesh.toml:9:47 `bad.yaml` cannot be the contract of a service that speaks grpc (the contract of a grpc service is a descriptor set: .binpb, .pb or .desc)
            mesh.toml:10:46 a tcp service has no operations (leave `contract` out)
            mesh.toml:14:29 `contract` must be a string, not a number (put it in quotes: "7")
        "#]].assert_eq(&told(&files(&[
            ("mesh.toml", toml),
            ("bad.yaml", bad),
            ("bad.desc", "AAAA"),
            ("../secret.yaml", OPENAPI),
        ])));
        assert!(contract_files("[services").is_empty());
        assert!(contract_files(toml).iter().all(|path| !path.contains("secret") && !path.starts_with(['/', '.'])));
    }

    #[test]
    fn registrations_are_read_as_one_table_or_several_and_every_mistake_of_them_is_told() {
        let read = |text: &str| format!("trust_domain = \"shop.example\"\n{text}");
        let one = read("[services.edge.attest]\nselectors = [\"unix:uid:7\", \"unix:path:/usr/bin/envoy\"]\n");
        let several = read(
            "[[services.edge.attest]]\nselectors = [\"unix:uid:7\"]\nhost = \"h1\"\n[[services.edge.attest]]\nselectors = [\"systemd:id:e.service\"]\n",
        );
        for (text, expected) in [(one, 1), (several, 2)] {
            let given = files(&[("mesh.toml", &text)]);
            let directory = parse(&given).unwrap_or_else(|_| panic!("{}", told(&given)));
            let edge = &directory.services[&ServiceName::parse("edge").unwrap()];
            assert_eq!((edge.spec.attest.len(), &edge.run, edge.port), (expected, &None, None));
            let plan = plan(&directory, &MeshState::default(), Revision(0)).unwrap();
            let text = String::from_utf8(crate::canonical::encode(&plan.change_set)).unwrap();
            assert_eq!(serde_json::from_str::<crate::change::ChangeSet>(&text).unwrap(), plan.change_set);
        }
        let wrong = "\
trust_domain = \"shop.example\"
[services.a]
attest = [{ selectors = [\"unix:path:/usr/bin/python3\"] }, { selectors = [\"uid:7\", \"unix:uid:7\"] }, { selector = [] }]
[services.b]
attest = { selectors = [\"unix:uid:7\", \"unix:uid:8\"] }
[services.c]
attest = { selectors = [], host = \"H 1\" }
[services.d]
attest = { selectors = [] }
[services.e]
attest = []
[services.f]
attest = \"unix:uid:7\"
";
        expect_test::expect![[r#"
            mesh.toml:3:13 a program alone is nobody: whoever may run it would be this service (say who runs it as well: `unix:uid:`, `unix:gid:`, `systemd:id:`, `cgroup:` or `container:`)
            mesh.toml:3:74 `uid:7` is not a selector (write `unix:uid:1000`, `unix:gid:1000`, `systemd:id:envoy.service`, `cgroup:/…`, `container:…`, `unix:path:/usr/bin/envoy` or `unix:sha256:…`; `countersign workload list` shows those of who asked)
            mesh.toml:3:100 `selectors` is missing (say what is known of such a process: selectors = ["unix:uid:1000", "unix:path:/usr/bin/envoy"])
            mesh.toml:3:102 unknown key `selector` (did you mean `selectors`?)
            mesh.toml:5:12 no process has both `unix:uid:7` and `unix:uid:8` (write a registration for each)
            mesh.toml:7:35 `H 1` is not a service name: only `a`-`z`, `0`-`9` and `-` are allowed
            mesh.toml:9:12 a registration has 1 to 16 selectors (say what is known of such a process: `unix:uid:1000` and `unix:path:/usr/bin/envoy`)
            mesh.toml:11:10 a service has 1 to 16 registrations (leave `attest` out where there is none)
            mesh.toml:13:10 `attest` must be a table, not a string
        "#]].assert_eq(&told(&files(&[("mesh.toml", wrong)])));
    }

    const SMALL: &str = "\
trust_domain = \"shop.example\"
[services]
web = { port = 1 }
catalog = { port = 2 }
catalog-next = { port = 3 }
db = { port = 4, protocol = \"tcp\" }
";

    #[test]
    fn every_mistake_in_roles_toml_is_told_at_once() {
        let roles = "\
[roles.\"a b\"]
members = [\"wbe\", \"web\", \"spiffe://shop.example/web\", \"spiffe://other/x\", \"Web\", 3]
[roles.empty]
members = []
[roles.none]
[roles.word]
members = \"web\"
member = []
[role.x]
";
        expect_test::expect![[r#"
            roles.toml:1:8 `a b` is not the name of a role (use 1 to 64 letters, digits, `-`, `_` and `.`)
            roles.toml:2:12 there is no service `wbe` (did you mean `web`?)
            roles.toml:2:26 `spiffe://shop.example/web` stands here twice (once is enough)
            roles.toml:2:75 `Web` is not a service name: only `a`-`z`, `0`-`9` and `-` are allowed
            roles.toml:2:82 `members[…]` must be a string, not a number (put it in quotes: "3")
            roles.toml:5:8 role `none` has no `members` (say who has it: members = ["web"]; an empty array is nobody)
            roles.toml:7:11 `members` must be an array of strings (write ["web"])
            roles.toml:8:1 unknown key `member` (did you mean `members`?)
            roles.toml:9:2 unknown key `role` (did you mean `roles`?)
        "#]]
        .assert_eq(&told(&files(&[("mesh.toml", SMALL), ("roles.toml", roles)])));
    }

    #[test]
    fn every_mistake_in_routes_toml_is_told_at_once() {
        let routes = "\
[routes.path]
service = \"catalog\"
path = \"/a/../b\"
methods = [\"get\", \"GTE\", \"POST\"]
[routes.normal]
service = \"catalog\"
path = \"/%41\"
path_prefix = \"/items/\"
headers = { Accept = \"x\", \"a b\" = \"x\", y = \" x\", z = \"é\" }
timeout = \"0s\"
[routes.nothing]
service = \"catalog\"
path = \"/a?b\"
methods = []
headers = {}
split = {}
retry = { budget_percent = 0 }
limit = {}
[routes.weights]
service = \"catalog\"
path = \"/w\"
split = { catalog = 0, catalog-nxet = 5, catalog-next = -1, db = 3 }
limit = { burst = 3 }
[routes.all]
service = \"catalog\"
[routes.late]
service = \"catalog\"
path = \"/late\"
[routes.tcp]
service = \"db\"
path = \"/\"
retry = { attempts = 1 }
[routes.there]
service = \"web\"
split = { catalog-next = 1 }
[routes.back]
service = \"catalog-next\"
split = { web = 1, catalog-next = 1 }
[routes.nowhere]
service = \"catalgo\"
[routes.nobody]
timeout = 5
";
        expect_test::expect![[r#"
            routes.toml:3:8 no request has this path: dot segments are ambiguous
            routes.toml:4:12 `get` is not a method (methods are upper case: "GET")
            routes.toml:4:19 `GTE` is not a method (did you mean `GET`?)
            routes.toml:7:8 this is not the normal form of the path (write "/A")
            routes.toml:8:1 `path` says it all already (leave one of the two out)
            routes.toml:8:15 a prefix ends without a slash (write "/items": it matches whole segments)
            routes.toml:9:13 names of headers are lower case here (write accept)
            routes.toml:9:27 `a b` is not the name of a header
            routes.toml:9:44 no header has this value (use visible ASCII, without spaces at the ends)
            routes.toml:9:54 no header has this value (use visible ASCII, without spaces at the ends)
            routes.toml:10:11 `timeout` is out of bounds (give 1ms to 1h, like "30s")
            routes.toml:13:8 a path has no query (write "/a")
            routes.toml:14:1 `methods` names none (leave it out to match all)
            routes.toml:15:1 `headers` names none (leave it out to match all)
            routes.toml:16:1 `split` names no service (leave it out to send all to `service`)
            routes.toml:17:1 `retry` has no `attempts` (say how often: retry = { attempts = 2 })
            routes.toml:17:28 `budget_percent` is out of bounds (give 1 to 100)
            routes.toml:18:1 `limit` limits nothing (give `rate_per_second` or `concurrent_max`)
            routes.toml:22:21 the weight of `catalog` is zero (leave it out, or give it a share)
            routes.toml:22:24 there is no service `catalog-nxet` (did you mean `catalog-next`?)
            routes.toml:22:57 `catalog-next` is out of bounds (give 1 to 10000)
            routes.toml:22:61 `db` speaks tcp, and callers of this rule speak http (split between services of one protocol)
            routes.toml:23:11 `burst` without a rate means nothing (give `rate_per_second`)
            routes.toml:26:9 route `late` is never reached (`all` above it matches everything; put this one first)
            routes.toml:31:1 `path` does not fit a tcp service: it has connections, no requests (leave it out)
            routes.toml:32:1 `retry` does not fit a tcp service: it has connections, no requests (leave it out)
            routes.toml:35:9 the callers of `web` are sent round in a circle (a split is final: the rules of the service it picks are not asked again)
            routes.toml:38:9 the callers of `catalog-next` are sent round in a circle (a split is final: the rules of the service it picks are not asked again)
            routes.toml:40:11 there is no service `catalgo` (did you mean `catalog`?)
            routes.toml:41:9 route `nobody` has no `service` (say which service it is for: service = "catalog")
            routes.toml:42:11 `timeout` must be a string, not a number (put it in quotes: "5")
        "#]].assert_eq(&told(&files(&[("mesh.toml", SMALL), ("routes.toml", routes)])));
    }

    #[test]
    fn a_rank_is_the_place_among_the_rules_of_one_service_in_the_order_of_the_file() {
        let routes = "\
[routes.z]
service = \"catalog\"
path = \"/z\"
[routes.w]
service = \"web\"
[routes.a]
service = \"catalog\"
";
        let directory = parse(&files(&[("mesh.toml", SMALL), ("routes.toml", routes)])).unwrap();
        let ranks: Vec<_> = directory.routes.iter().map(|(name, route)| (&**name, route.rank)).collect();
        assert_eq!(ranks, [("a", 1), ("w", 0), ("z", 0)]);
    }

    #[test]
    fn mistakes_of_all_files_come_together_and_a_broken_file_does_not_hide_the_others() {
        let broken = "trust_domain = \"shop.example\"\n[services.web\nrun = [\"x\"]\n[services.]\n";
        let given = files(&[
            ("mesh.toml", broken),
            ("roles.toml", "[roles.front]\nmember = [\"web\"]\n"),
            ("policies/a.cedar", "permit (principal, action, resource"),
            ("policies/b.cedar", "@id(\"b\") permit (principal in Role::\"nobody\", action, resource);"),
            ("policies/c.txt", "not read"),
            ("gate/d.cedar", "not a policy"),
        ]);
        expect_test::expect![[r#"
            gate/d.cedar:1:5 unexpected token `a` (expected `(`)
            mesh.toml:2:14 unclosed table, expected `]`
            mesh.toml:4:11 unquoted keys cannot be empty, expected letters, numbers, `-`, `_`
            policies/a.cedar:1:36 unexpected end of input (expected `!=`, `)`, `,`, `:`, `<`, `<=`, `==`, `>`, `>=`, `in`, or `is`)
            policies/b.cedar:1:31 the role `nobody` does not exist (known are the [roles.*] of roles.toml)
            roles.toml:1:8 role `front` has no `members` (say who has it: members = ["web"]; an empty array is nobody)
            roles.toml:2:1 unknown key `member` (did you mean `members`?)
        "#]]
        .assert_eq(&told(&given));
        assert_eq!(
            told(&Files::new()),
            "mesh.toml:1:1 there is no `mesh.toml` in this directory (`countersign init DIR` makes one; `-C DIR` names another directory)\n"
        );
    }

    #[test]
    fn a_policy_with_a_mistake_hides_no_unknown_name_of_another_in_its_file() {
        let policies = "\
@id(\"broken\") permit (principal, action resource);
@id(\"names\") permit (principal in Role::\"frnt\", action, resource in Service::\"catalgo\");
permit (principal == Workload::\"wbe\", action == Action::\"http:GTE\", resource);
@id(\"path\") permit (principal, action, resource == Operation::\"catalog\");
";
        let roles = "[roles.front]\nmembers = []\n";
        for (mesh, services_are_known) in [(SMALL, true), ("trust_domain = \n", false)] {
            let given = files(&[("mesh.toml", mesh), ("roles.toml", roles), ("policies/a.cedar", policies)]);
            let told = told(&given);
            for (what, is_told) in [
                ("policies/a.cedar:1:", true),
                ("the role `frnt` does not exist (did you mean Role::\"front\"?)", true),
                ("the service `catalgo` does not exist", services_are_known),
                ("http:GTE", true),
                ("`catalog` is not an operation", true),
            ] {
                assert_eq!(told.contains(what), is_told, "{what} in\n{told}");
            }
        }
        // A roles.toml that is no TOML makes no role unknown.
        let given = files(&[("mesh.toml", SMALL), ("roles.toml", "[roles"), ("policies/a.cedar", policies)]);
        assert!(!told(&given).contains("the role"), "{}", told(&given));
    }

    #[test]
    fn a_policy_names_what_exists_and_its_id_is_its_own() {
        let given = files(&[
            ("mesh.toml", SMALL),
            (
                "policies/a.cedar",
                "@id(\"reads\") permit (principal == Workload::\"web\", action, resource in Service::\"catalgo\");",
            ),
            ("policies/b.cedar", "\n@id(\"reads\") permit (principal in Role::\"front\", action, resource);"),
        ]);
        expect_test::expect![[r#"
            policies/a.cedar:1:72 the service `catalgo` does not exist (did you mean Service::"catalog"?)
            policies/b.cedar:2:1 policy id `reads` is taken (`policies/a.cedar` has it; give each policy an @id of its own)
            policies/b.cedar:2:35 the role `front` does not exist (known are the [roles.*] of roles.toml)
        "#]].assert_eq(&told(&given));
    }

    #[test]
    fn a_mistake_shows_its_file_its_line_and_a_caret() {
        let mistakes = parse(&files(&[("mesh.toml", "trust_domain = \"shop.example\"\n[servces]\n")])).unwrap_err();
        let mut shown = String::new();
        let theme = miette::GraphicalTheme::unicode_nocolor();
        let handler = miette::GraphicalReportHandler::new_themed(theme).with_links(false);
        handler.render_report(&mut shown, &mistakes.all()[0]).unwrap();
        expect_test::expect![[r#"
            × unknown key `servces`
               ╭─[mesh.toml:2:2]
             1 │ trust_domain = "shop.example"
             2 │ [servces]
               ·  ───────
               ╰────
              help: did you mean `services`?
        "#]]
        .assert_eq(shown.trim_start());
    }
}
