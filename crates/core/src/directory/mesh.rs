//! `mesh.toml`: the trust domain, the defaults and the services.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use toml::{Spanned, de::DeValue};

use super::{
    Defaults, INSTANCES_MAX, Isolate, LocalService, WORKERS_MAX, clients,
    contracts::Contracts,
    pipelines,
    read::{At, Help, PLAIN_NAME, Source, Table, as_string, as_table, is_plain_name, shortened, suggest},
    reference, sign_in,
};
use crate::{
    assurance::authenticators::{Aaguid, AttestationRoot, Authenticators, MODELS_MAX, ROOTS_MAX},
    client::Client,
    contract::Contract,
    identity::{ServiceName, TrustDomain},
    lifetimes::{INTERMEDIATE_DAYS, Lifetimes, ROOT_DAYS, SVID_SECONDS},
    operator::{QUORUM_MAX, Seal},
    pipeline::{Issuer, IssuerName, Pipeline, PipelineName},
    registration::{REGISTRATIONS_MAX, Registration, Selector},
    service::{
        EXCHANGES_MAX_DEFAULT, FirstContact, MAX_STALENESS_SECONDS_DEFAULT, Protocol, Recorded, ServiceSpec, Tokens,
    },
    sign_in::{SignIn, SignInName},
    state::SERVICES_MAX,
};

/// What `mesh.toml` says, as far as it could be read.
pub(super) struct Mesh {
    pub(super) trust_domain: Option<TrustDomain>,
    pub(super) defaults: Defaults,
    pub(super) seal: Option<Seal>,
    pub(super) authenticators: Option<Authenticators>,
    pub(super) lifetimes: Option<Lifetimes>,
    pub(super) services: BTreeMap<ServiceName, LocalService>,
    pub(super) issuers: BTreeMap<IssuerName, Issuer>,
    pub(super) pipelines: BTreeMap<PipelineName, Pipeline>,
    pub(super) sign_ins: BTreeMap<SignInName, SignIn>,
    pub(super) clients: BTreeMap<ServiceName, Client>,
    /// Whether it is TOML at all: otherwise nobody can say that a service does not exist.
    pub(super) is_readable: bool,
}

const ISOLATE: [(&str, Isolate); 3] = [("auto", Isolate::Auto), ("required", Isolate::Required), ("off", Isolate::Off)];
const PROTOCOL: [(&str, Protocol); 3] = [("http", Protocol::Http), ("grpc", Protocol::Grpc), ("tcp", Protocol::Tcp)];
const RECORDED: [(&str, Recorded); 2] = [("best_effort", Recorded::BestEffort), ("always", Recorded::Always)];
const FIRST_CONTACT: [(&str, FirstContact); 3] =
    [("mark", FirstContact::Mark), ("inspect", FirstContact::Inspect), ("hold", FirstContact::Hold)];
const TOKENS: [(&str, Tokens); 2] = [("optional", Tokens::Optional), ("required", Tokens::Required)];
const STALENESS_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;
const EXCHANGES: std::ops::RangeInclusive<u64> = 1..=1_000_000;

/// What refers to another service, to be looked up when all are known.
struct Reference<'t> {
    service: At<&'t str>,
}

pub(super) fn read(source: &Source, contracts: &Contracts<'_>) -> Mesh {
    let mut mesh = Mesh {
        trust_domain: None,
        defaults: Defaults::default(),
        seal: None,
        authenticators: None,
        lifetimes: None,
        services: BTreeMap::new(),
        issuers: BTreeMap::new(),
        pipelines: BTreeMap::new(),
        sign_ins: BTreeMap::new(),
        clients: BTreeMap::new(),
        is_readable: false,
    };
    let Some(document) = source.document() else { return mesh };
    mesh.is_readable = true;
    if source.text.is_empty() {
        return mesh;
    }
    let top = Table::new(source, document.get_ref(), 0..0, reference::MESH);
    mesh.trust_domain = trust_domain(&top);
    if let Some(defaults) = top.table("defaults", reference::DEFAULTS) {
        mesh.defaults = read_defaults(&defaults);
    }
    if let Some(seal) = top.table("seal", reference::SEAL) {
        mesh.seal = read_seal(&seal);
    }
    if let Some(factors) = top.table("factors", reference::FACTORS) {
        mesh.authenticators = read_factors(&factors);
    }
    if let Some(authority) = top.table("authority", reference::AUTHORITY) {
        mesh.lifetimes = read_lifetimes(&authority);
    }
    let mut upstreams = Vec::new();
    let mut ports: BTreeMap<u16, String> = BTreeMap::new();
    for (name, value) in top.members("services").unwrap_or_default() {
        let Some(table) = as_table(source, name.value, value) else { continue };
        let table = Table::new(source, table, name.at.clone(), reference::SERVICE);
        let service = read_service(&table, name.value, &mesh.defaults, contracts, &mut upstreams);
        if let Some(port) = service.port {
            if let Some(first) = ports.get(&port) {
                let at = table.get("port").map_or(name.at.clone(), Spanned::span);
                table.mistake(at, format!("port {port} is taken"), format!("service `{first}` listens there"));
            } else {
                ports.insert(port, name.value.to_owned());
            }
        }
        match ServiceName::parse(name.value) {
            Ok(name) => drop(mesh.services.insert(name, service)),
            Err(error) => source.mistake(name.at, error.to_string(), Help(None)),
        }
    }
    for Reference { service } in upstreams {
        if !mesh.services.keys().any(|name| name.as_str() == service.value) {
            let what = format!("there is no service `{}`", shortened(service.value));
            source.mistake(service.at, what, suggest(service.value, mesh.services.keys().map(ServiceName::as_str)));
        }
    }
    (mesh.issuers, mesh.pipelines) = pipelines::read(&top, mesh.trust_domain.as_ref());
    mesh.sign_ins = sign_in::read(&top, &mesh.issuers, &mesh.pipelines);
    mesh.clients = clients::read(&top, &mesh.services);
    if mesh.services.len() > SERVICES_MAX {
        let what = format!("a mesh has at most {SERVICES_MAX} services, this one {}", mesh.services.len());
        source.mistake(top.at_key("services"), what, "split it into several trust domains");
    }
    mesh
}

fn trust_domain(top: &Table<'_>) -> Option<TrustDomain> {
    let Some(_) = top.get("trust_domain") else {
        top.mistake(
            0..0,
            "`trust_domain` is missing",
            "name the mesh in the first line: trust_domain = \"shop.example\"",
        );
        return None;
    };
    let given = top.string("trust_domain")?;
    match TrustDomain::parse(given.value) {
        Ok(trust_domain) => Some(trust_domain),
        Err(error) => {
            let lower = given.value.to_ascii_lowercase();
            let lower = lower.strip_prefix("spiffe://").unwrap_or(&lower);
            let help = TrustDomain::parse(lower).ok().map(|meant| format!("write \"{meant}\""));
            top.mistake(given.at, error.to_string(), Help(help));
            None
        }
    }
}

fn read_defaults(table: &Table<'_>) -> Defaults {
    let otherwise = Defaults::default();
    let whole = |key, range| table.whole(key, range).map(|found| found as u32);
    Defaults {
        isolate: table.word("isolate", &ISOLATE).unwrap_or_default(),
        workers: whole("workers", 1..=u64::from(WORKERS_MAX)).unwrap_or(otherwise.workers),
        max_staleness_seconds: staleness(table).unwrap_or(otherwise.max_staleness_seconds),
        recorded: table.word("recorded", &RECORDED).unwrap_or_default(),
        exchanges_max: whole("exchanges_max", EXCHANGES).unwrap_or(otherwise.exchanges_max),
        tokens: table.word("tokens", &TOKENS).unwrap_or_default(),
    }
}

fn read_seal(table: &Table<'_>) -> Option<Seal> {
    if table.get("quorum").is_none() {
        table.mistake(table.at.clone(), "`quorum` is missing", "say how many operators sign each change: quorum = 1");
    }
    table.whole("quorum", 1..=u64::from(QUORUM_MAX)).map(|quorum| Seal { quorum: quorum as u32 })
}

fn read_factors(table: &Table<'_>) -> Option<Authenticators> {
    for (key, help) in [
        ("authenticators", "name the models that may be enrolled, or leave `[factors]` out: then any may be"),
        ("attestation_roots", "give the certificates of their makers, in PEM between \"\"\" and \"\"\""),
    ] {
        if table.get(key).is_none() {
            table.mistake(table.at.clone(), format!("`{key}` is missing"), help);
        }
    }
    let given = table.strings("authenticators");
    if given.as_ref().is_some_and(Vec::is_empty) {
        let help = "leave `[factors]` out, and any authenticator may be enrolled";
        table.mistake(table.at_key("authenticators"), "`authenticators` is empty", help);
    }
    let mut models = BTreeSet::new();
    for model in given.unwrap_or_default() {
        match Aaguid::parse(model.value) {
            Ok(parsed) if models.insert(parsed) => {}
            Ok(parsed) => table.mistake(model.at, format!("`{parsed}` stands here twice"), "once is enough"),
            Err(error) => {
                let what = format!("`{}` is not a model of an authenticator", shortened(model.value));
                table.mistake(model.at, what, error.to_string());
            }
        }
    }
    let pem = table.string("attestation_roots")?;
    let roots = match AttestationRoot::parse_pem(pem.value) {
        Ok(roots) => roots,
        Err(error) => {
            table.mistake(pem.at, "`attestation_roots` cannot be read", error.to_string());
            return None;
        }
    };
    let mut names = BTreeSet::new();
    for root in roots.iter().map(AttestationRoot::subject) {
        if !names.insert(root.clone()) {
            let help = "a chain is followed by name: leave one of them out";
            table.mistake(table.at_key("attestation_roots"), format!("two roots are called `{root}`"), help);
        }
    }
    if models.len() > MODELS_MAX || roots.len() > ROOTS_MAX {
        let what = format!("a mesh names at most {MODELS_MAX} models and {ROOTS_MAX} roots");
        table.mistake(table.at.clone(), what, "leave out what nobody has");
    }
    Some(Authenticators { models, roots })
}

fn read_lifetimes(table: &Table<'_>) -> Option<Lifetimes> {
    let usual = Lifetimes::default();
    let bounds = u64::from(*SVID_SECONDS.start()) * 1_000..=u64::from(*SVID_SECONDS.end()) * 1_000;
    let svid_ms = table.duration_ms("svid_lifetime", bounds);
    let lifetimes = Lifetimes {
        svid_seconds: svid_ms.map_or(usual.svid_seconds, |ms| (ms / 1_000) as u32),
        intermediate_days: table.days("intermediate_lifetime", INTERMEDIATE_DAYS).unwrap_or(usual.intermediate_days),
        root_days: table.days("root_lifetime", ROOT_DAYS).unwrap_or(usual.root_days),
    };
    if !lifetimes.are_bounded() {
        let help =
            "a root is followed while it still outlives what it signs: give it twice the life of an intermediate";
        table.mistake(table.at.clone(), "the root would not outlive two intermediates", help);
    }
    Some(lifetimes)
}

fn staleness(table: &Table<'_>) -> Option<u32> {
    let ms = table.duration_ms("max_staleness", STALENESS_MS)?;
    if ms % 1_000 != 0 {
        let at = table.get("max_staleness").map_or(table.at.clone(), Spanned::span);
        table.mistake(at, "`max_staleness` must be whole seconds", "agents are heard once a second");
    }
    Some((ms / 1_000) as u32)
}

fn read_service<'t>(
    table: &Table<'t>,
    name: &str,
    defaults: &Defaults,
    contracts: &Contracts<'_>,
    upstreams: &mut Vec<Reference<'t>>,
) -> LocalService {
    let protocol = table.word("protocol", &PROTOCOL).unwrap_or_default();
    let port = table.whole("port", 1..=65_535).map(|port| port as u16);
    let mesh_port = table.whole("mesh_port", 1..=65_535).map(|port| port as u16);
    let run = read_run(table);
    let instances = table.whole("instances", 1..=u64::from(INSTANCES_MAX)).unwrap_or(1) as u32;
    if table.get("run").is_none() {
        if table.get("port").is_none() && table.get("attest").is_none() {
            let help = "give `run = [\"program\", \"argument\"]`, or the `port` where it listens on 127.0.0.1";
            table.mistake(
                table.at.clone(),
                format!("service `{}` has neither `run` nor `port`", shortened(name)),
                help,
            );
        }
        for key in ["instances", "env"].into_iter().filter(|key| table.get(key).is_some()) {
            table.mistake(
                table.at_key(key),
                format!("`{key}` without `run` means nothing"),
                "it is for what the mesh starts",
            );
        }
    } else if port.is_some() && instances > 1 {
        let what = format!("{instances} instances cannot listen on one port");
        table.mistake(table.at_key("port"), what, "leave `port` out: the variable PORT tells each instance its own");
    }
    if protocol == Protocol::Tcp && table.get("mesh_port").is_none() && table.get("port").is_none() {
        let help = "give the `mesh_port` that its callers use, like 5432";
        table.mistake(table.at_key("protocol"), "a tcp service has no usual port", help);
    }
    let env = read_env(table);
    let mut distinct = BTreeSet::new();
    for upstream in table.strings("upstreams").unwrap_or_default() {
        match ServiceName::parse(upstream.value) {
            Ok(service) if distinct.contains(&service) => {
                table.mistake(upstream.at, format!("`{service}` stands here twice"), "once is enough");
            }
            Ok(service) => {
                distinct.insert(service);
                upstreams.push(Reference { service: upstream });
            }
            Err(_) => upstreams.push(Reference { service: upstream }),
        }
    }
    let contract = contracts.of(table, protocol);
    let usual_port = if protocol == Protocol::Tcp { port.unwrap_or(80) } else { 80 };
    let spec = ServiceSpec {
        protocol,
        port: mesh_port.unwrap_or(usual_port),
        upstreams: distinct,
        max_staleness_seconds: staleness(table).unwrap_or(defaults.max_staleness_seconds),
        recorded: table.word("recorded", &RECORDED).unwrap_or(defaults.recorded),
        namespace: group(table, "namespace"),
        sensitivity: group(table, "sensitivity"),
        exchanges_max: table.whole("exchanges_max", EXCHANGES).map_or(defaults.exchanges_max, |found| found as u32),
        contract: contract.as_ref().map(Contract::digest),
        first_contact: table.word("first_contact", &FIRST_CONTACT).unwrap_or_default(),
        without_contract: protocol.has_operations() && Contracts::is_waived(table),
        tokens: table.word("tokens", &TOKENS).unwrap_or(defaults.tokens),
        attest: read_attest(table),
    };
    LocalService { run, port, env, instances, spec, contract }
}

/// One table, or several.
fn read_attest(table: &Table<'_>) -> BTreeSet<Registration> {
    let Some(value) = table.get("attest") else { return BTreeSet::new() };
    let given = value.get_ref().as_array().map_or_else(|| vec![value], |several| several.iter().collect());
    if given.is_empty() || given.len() > REGISTRATIONS_MAX {
        let what = format!("a service has 1 to {REGISTRATIONS_MAX} registrations");
        table.mistake(value.span(), what, "leave `attest` out where there is none");
    }
    given.into_iter().filter_map(|one| read_registration(table, one)).collect()
}

fn read_registration<'t>(service: &Table<'t>, given: &'t Spanned<DeValue<'t>>) -> Option<Registration> {
    let table = as_table(service.source(), "attest", given)?;
    let table = Table::new(service.source(), table, given.span(), reference::ATTEST);
    if table.get("selectors").is_none() {
        let help = "say what is known of such a process: selectors = [\"unix:uid:1000\", \"unix:path:/usr/bin/envoy\"]";
        table.mistake(table.at.clone(), "`selectors` is missing", help);
        return None;
    }
    let mut selectors = BTreeSet::new();
    let mut is_whole = true;
    for selector in table.strings("selectors")? {
        match selector.value.parse::<Selector>() {
            Ok(parsed) => drop(selectors.insert(parsed)),
            Err(error) => {
                is_whole = false;
                let what = format!("`{}` is not a selector", shortened(selector.value));
                table.mistake(selector.at, what, error.help());
            }
        }
    }
    let host = match table.string("host") {
        None => None,
        Some(given) => match ServiceName::parse(given.value) {
            Ok(host) => Some(host),
            Err(error) => {
                table.mistake(given.at, error.to_string(), Help(None));
                return None;
            }
        },
    };
    match Registration::new(selectors, host) {
        Ok(registration) => Some(registration),
        Err(error) if is_whole => {
            table.mistake(table.at_key("selectors"), error.to_string(), error.help());
            None
        }
        // What is left of them says nothing.
        Err(_) => None,
    }
}

fn read_run(table: &Table<'_>) -> Option<Vec<String>> {
    let value = table.get("run")?;
    let words = table.strings("run")?;
    let no = |at: Range<usize>, what: &str| {
        table.mistake(at, what, "give the program first: run = [\"python3\", \"web.py\"]")
    };
    match words.first() {
        None if value.get_ref().as_array().is_some_and(|array| array.is_empty()) => no(value.span(), "`run` is empty"),
        Some(program) if program.value.is_empty() => no(program.at.clone(), "the program of `run` is empty"),
        _ => {}
    }
    for word in words.iter().filter(|word| word.value.contains('\0')) {
        table.mistake(word.at.clone(), "no program takes an argument with a NUL", Help(None));
    }
    Some(words.into_iter().map(|word| word.value.to_owned()).collect())
}

fn read_env(table: &Table<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for (name, value) in table.members("env").unwrap_or_default() {
        let Some(text) = env_value(table, &name, value) else { continue };
        let first = name.value.as_bytes().first().is_some_and(|b| !b.is_ascii_digit());
        if !first || !name.value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            let what = format!("`{}` is not the name of a variable", shortened(name.value));
            table.mistake(name.at, what, "use letters, digits and `_`, and no digit first");
        } else if name.value == "PORT" || name.value.starts_with("COUNTERSIGN_") {
            let help = if name.value == "PORT" { "say `port = …` instead" } else { "choose another name" };
            table.mistake(name.at, format!("`{}` is set by the mesh", name.value), help);
        } else {
            env.insert(name.value.to_owned(), text.to_owned());
        }
    }
    env
}

fn env_value<'t>(table: &Table<'t>, name: &At<&str>, value: &'t Spanned<DeValue<'t>>) -> Option<&'t str> {
    let text = as_string(table.source(), name.value, value)?;
    if text.value.contains('\0') {
        table.mistake(text.at, "no variable can hold a NUL", Help(None));
        return None;
    }
    Some(text.value)
}

fn group(table: &Table<'_>, key: &str) -> Option<String> {
    let given = table.string(key)?;
    if !is_plain_name(given.value) {
        table.mistake(given.at.clone(), format!("`{}` is not a {key}", shortened(given.value)), PLAIN_NAME);
    }
    Some(given.value.to_owned())
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            isolate: Isolate::default(),
            workers: 1,
            max_staleness_seconds: MAX_STALENESS_SECONDS_DEFAULT,
            recorded: Recorded::default(),
            exchanges_max: EXCHANGES_MAX_DEFAULT,
            tokens: Tokens::default(),
        }
    }
}
