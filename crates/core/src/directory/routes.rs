//! `routes.toml`: the traffic rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use toml::Spanned;

use super::{
    mesh::Mesh,
    read::{At, Help, PLAIN_NAME, Source, Table, as_string, as_table, as_whole, is_plain_name, shortened, suggest},
    reference,
};
use crate::{
    change::RouteName,
    identity::ServiceName,
    path::NormalPath,
    route::{Limit, Retry, Route, RouteMatch},
    service::Protocol,
};

const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"];
const BUDGET_PERCENT_DEFAULT: u32 = 20;
const WEIGHT_MAX: u64 = 10_000;
const RATE: std::ops::RangeInclusive<u64> = 1..=1_000_000;

pub(super) fn read(source: &Source, mesh: &Mesh) -> BTreeMap<RouteName, Route> {
    let mut routes: BTreeMap<RouteName, Route> = BTreeMap::new();
    let Some(document) = source.document() else { return routes };
    let top = Table::new(source, document.get_ref(), 0..0, reference::ROUTES);
    let mut ranks: BTreeMap<ServiceName, u32> = BTreeMap::new();
    let mut catches_all: BTreeMap<ServiceName, &str> = BTreeMap::new();
    let mut splits: Vec<(Range<usize>, ServiceName, BTreeSet<ServiceName>)> = Vec::new();
    for (name, value) in top.members("routes").unwrap_or_default() {
        if !is_plain_name(name.value) {
            source.mistake(
                name.at.clone(),
                format!("`{}` is not the name of a route", shortened(name.value)),
                PLAIN_NAME,
            );
        }
        let Some(table) = as_table(source, name.value, value) else { continue };
        let table = Table::new(source, table, name.at.clone(), reference::ROUTE);
        let Some(mut route) = read_route(&table, name.value, mesh) else { continue };
        if let Some(first) = catches_all.get(&route.service) {
            let what = format!("route `{}` is never reached", shortened(name.value));
            table.mistake(name.at.clone(), what, format!("`{first}` above it matches everything; put this one first"));
        } else if route.matches == RouteMatch::default() && !has_condition(&table) {
            catches_all.insert(route.service.clone(), name.value);
        }
        let rank = ranks.entry(route.service.clone()).or_default();
        route.rank = *rank;
        *rank += 1;
        let others = route.split.keys().filter(|to| **to != route.service).cloned().collect();
        splits.push((table.get("split").map_or(name.at, Spanned::span), route.service.clone(), others));
        routes.insert(name.value.into(), route);
    }
    refuse_cycles(source, &splits);
    routes
}

/// A condition that could not be read is one all the same.
fn has_condition(table: &Table<'_>) -> bool {
    ["path", "path_prefix", "methods", "headers"].iter().any(|key| table.get(key).is_some())
}

fn read_route(table: &Table<'_>, name: &str, mesh: &Mesh) -> Option<Route> {
    if table.get("service").is_none() {
        let what = format!("route `{}` has no `service`", shortened(name));
        table.mistake(table.at.clone(), what, "say which service it is for: service = \"catalog\"");
    }
    let service = table.string("service").and_then(|given| known_service(table, &given, mesh));
    let protocol = service.as_ref().and_then(|service| mesh.services.get(service)).map(|service| service.spec.protocol);
    if protocol == Some(Protocol::Tcp) {
        for key in ["path", "path_prefix", "methods", "headers", "retry"] {
            if table.get(key).is_some() {
                let what = format!("`{key}` does not fit a tcp service: it has connections, no requests");
                table.mistake(table.at_key(key), what, "leave it out");
            }
        }
    }
    if table.get("path").is_some() && table.get("path_prefix").is_some() {
        table.mistake(table.at_key("path_prefix"), "`path` says it all already", "leave one of the two out");
    }
    let matches = RouteMatch {
        path: read_path(table, "path"),
        path_prefix: read_path(table, "path_prefix"),
        methods: read_methods(table),
        headers: read_headers(table),
    };
    let split = read_split(table, protocol, mesh);
    let timeout_ms = table.duration_ms("timeout", 1..=3_600_000);
    let retry = table.table("retry", reference::RETRY).and_then(|table| read_retry(&table));
    let limit = table.table("limit", reference::LIMIT).map(|table| read_limit(&table));
    Some(Route { service: service?, rank: 0, matches, split, timeout_ms, retry, limit })
}

fn known_service(table: &Table<'_>, given: &At<&str>, mesh: &Mesh) -> Option<ServiceName> {
    let name = ServiceName::parse(given.value).ok();
    let known = |name: &ServiceName| mesh.services.contains_key(name) || !mesh.is_readable;
    let found = name.filter(known);
    if found.is_none() {
        let names = mesh.services.keys().map(ServiceName::as_str);
        let what = format!("there is no service `{}`", shortened(given.value));
        table.mistake(given.at.clone(), what, suggest(given.value, names));
    }
    found
}

fn read_path(table: &Table<'_>, key: &str) -> Option<String> {
    let given = table.string(key)?;
    match NormalPath::parse(given.value) {
        Err(refused) => table.mistake(given.at, format!("no request has this path: {refused}"), Help(None)),
        Ok(path) if path.query().is_some() => {
            table.mistake(given.at, "a path has no query", format!("write \"{}\"", path.as_str()));
        }
        Ok(path) if !path.is_as_it_came() => {
            table.mistake(given.at, "this is not the normal form of the path", format!("write \"{}\"", path.as_str()));
        }
        Ok(path) if key == "path_prefix" && path.as_str().len() > 1 && path.as_str().ends_with('/') => {
            let help = format!("write \"{}\": it matches whole segments", path.as_str().trim_end_matches('/'));
            table.mistake(given.at, "a prefix ends without a slash", help);
        }
        Ok(path) => return Some(path.as_str().to_owned()),
    }
    None
}

fn read_methods(table: &Table<'_>) -> BTreeSet<String> {
    let Some(given) = table.strings("methods") else { return BTreeSet::new() };
    if given.is_empty() {
        table.mistake(table.at_key("methods"), "`methods` names none", "leave it out to match all");
    }
    let known = |method: &At<&str>| {
        let is_known = METHODS.contains(&method.value);
        if !is_known {
            let what = format!("`{}` is not a method", shortened(method.value));
            let meant = suggest(&method.value.to_ascii_uppercase(), METHODS.into_iter());
            let upper = METHODS.iter().find(|known| known.eq_ignore_ascii_case(method.value));
            let help = upper.map_or(meant, |upper| Help(Some(format!("methods are upper case: \"{upper}\""))));
            table.mistake(method.at.clone(), what, help);
        }
        is_known
    };
    given.into_iter().filter(known).map(|method| method.value.to_owned()).collect()
}

fn read_headers(table: &Table<'_>) -> BTreeMap<String, String> {
    let mut headers = BTreeMap::new();
    let Some(members) = table.members("headers") else { return headers };
    if members.is_empty() {
        table.mistake(table.at_key("headers"), "`headers` names none", "leave it out to match all");
    }
    for (name, value) in members {
        let Some(text) = as_string(table.source(), name.value, value) else { continue };
        // RFC 9110, 5.1: a field name is a token; 5.5: a value is visible ASCII with spaces and tabs inside.
        let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if name.value.is_empty() || !name.value.bytes().all(token) {
            table.mistake(name.at, format!("`{}` is not the name of a header", shortened(name.value)), Help(None));
        } else if name.value.bytes().any(|b| b.is_ascii_uppercase()) {
            let help = format!("write {}", name.value.to_ascii_lowercase());
            table.mistake(name.at, "names of headers are lower case here", help);
        } else if !text.value.bytes().all(|b| matches!(b, b' '..=b'~' | b'\t')) || text.value.trim() != text.value {
            table.mistake(text.at, "no header has this value", "use visible ASCII, without spaces at the ends");
        } else {
            headers.insert(name.value.to_owned(), text.value.to_owned());
        }
    }
    headers
}

fn read_split(table: &Table<'_>, protocol: Option<Protocol>, mesh: &Mesh) -> BTreeMap<ServiceName, u32> {
    let mut split = BTreeMap::new();
    let Some(members) = table.members("split") else { return split };
    if members.is_empty() {
        table.mistake(table.at_key("split"), "`split` names no service", "leave it out to send all to `service`");
    }
    for (name, value) in members {
        if value.get_ref().as_integer().is_some_and(|number| number.as_str() == "0") {
            let what = format!("the weight of `{}` is zero", shortened(name.value));
            table.mistake(value.span(), what, "leave it out, or give it a share");
            continue;
        }
        let weight = as_whole(table.source(), name.value, value, 1..=WEIGHT_MAX);
        let Some(service) = known_service(table, &name, mesh) else { continue };
        let found = mesh.services.get(&service).map(|service| service.spec.protocol);
        if let (Some(asked), Some(found)) = (protocol, found)
            && asked != found
        {
            let what = format!("`{service}` speaks {found}, and callers of this rule speak {asked}");
            table.mistake(name.at, what, "split between services of one protocol");
        }
        split.extend(weight.map(|weight| (service, weight as u32)));
    }
    split
}

fn read_retry(table: &Table<'_>) -> Option<Retry> {
    if table.get("attempts").is_none() {
        table.mistake(table.at.clone(), "`retry` has no `attempts`", "say how often: retry = { attempts = 2 }");
    }
    let budget = table.whole("budget_percent", 1..=100).map_or(BUDGET_PERCENT_DEFAULT, |found| found as u32);
    let attempts = table.whole("attempts", 1..=10)? as u32;
    Some(Retry { attempts, budget_percent: budget })
}

fn read_limit(table: &Table<'_>) -> Limit {
    let whole = |key| table.whole(key, RATE).map(|found| found as u32);
    if table.get("rate_per_second").is_none() {
        if table.get("burst").is_some() {
            table.mistake(table.at_key("burst"), "`burst` without a rate means nothing", "give `rate_per_second`");
        } else if table.get("concurrent_max").is_none() {
            table.mistake(table.at.clone(), "`limit` limits nothing", "give `rate_per_second` or `concurrent_max`");
        }
    }
    Limit { rate_per_second: whole("rate_per_second"), burst: whole("burst"), concurrent_max: whole("concurrent_max") }
}

/// Rules are not chained: two services that hand their callers to each other are a misunderstanding.
fn refuse_cycles(source: &Source, splits: &[(Range<usize>, ServiceName, BTreeSet<ServiceName>)]) {
    let mut onward: BTreeMap<&ServiceName, BTreeSet<&ServiceName>> = BTreeMap::new();
    for (_, service, others) in splits {
        onward.entry(service).or_default().extend(others);
    }
    for (at, service, others) in splits {
        let (mut reached, mut open): (BTreeSet<&ServiceName>, Vec<&ServiceName>) =
            (others.iter().collect(), others.iter().collect());
        while let Some(next) = open.pop() {
            open.extend(onward.get(next).into_iter().flatten().filter(|further| reached.insert(further)));
        }
        if reached.contains(service) {
            let what = format!("the callers of `{service}` are sent round in a circle");
            source.mistake(at.clone(), what, "a split is final: the rules of the service it picks are not asked again");
        }
    }
}
