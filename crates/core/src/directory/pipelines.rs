//! `[issuers.*]` and `[pipelines.*]` of `mesh.toml`: whose tokens are believed, and which automations may propose changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use toml::Spanned;

use super::{
    read::{Help, PLAIN_NAME, Table, as_string, as_table, is_plain_name, shortened, suggest},
    reference,
};
use crate::{
    change::RoleName,
    identity::TrustDomain,
    pipeline::{self, Issuer, IssuerName, MESH_ISSUER, Pipeline, PipelineName, Refusal},
};

pub(super) fn read(
    top: &Table<'_>,
    trust_domain: Option<&TrustDomain>,
) -> (BTreeMap<IssuerName, Issuer>, BTreeMap<PipelineName, Pipeline>) {
    let mut issuers: BTreeMap<IssuerName, Issuer> = BTreeMap::new();
    for (name, value) in top.members("issuers").unwrap_or_default() {
        is_named(top, "issuer", name.at.clone(), name.value);
        if name.value == MESH_ISSUER {
            let what = format!("`{MESH_ISSUER}` is the mesh itself, which vouches for its workloads");
            top.mistake(name.at.clone(), what, "give this issuer another name");
        }
        let Some(table) = as_table(top.source(), name.value, value) else { continue };
        let table = Table::new(top.source(), table, name.at.clone(), reference::ISSUER);
        for (key, help) in [
            ("url", "give the issuer as its tokens say it: url = \"https://token.actions.githubusercontent.com\""),
            ("audience", "say whom its tokens are meant for: audience = \"countersign:shop.example\""),
        ] {
            if table.get(key).is_none() {
                table.mistake(name.at.clone(), format!("issuer `{}` has no `{key}`", shortened(name.value)), help);
            }
        }
        let (url, audience) = (table.string("url"), table.string("audience"));
        let (Some(url), Some(audience)) = (url, audience) else {
            // It is there, and what names it is not told to name nobody.
            issuers.insert(name.value.into(), Issuer { url: String::new(), audience: String::new() });
            continue;
        };
        let issuer = Issuer { url: url.value.to_owned(), audience: audience.value.to_owned() };
        for Refusal { what, help, .. } in issuer.refusals() {
            let at = if what.starts_with("an issuer") { url.at.clone() } else { audience.at.clone() };
            table.mistake(at, what, help);
        }
        if let Some((first, _)) = issuers.iter().find(|(_, held)| held.url == issuer.url) {
            table.mistake(url.at, "this issuer stands here twice", format!("`{first}` is it already"));
        }
        issuers.insert(name.value.into(), issuer);
    }
    let mut pipelines = BTreeMap::new();
    for (name, value) in top.members("pipelines").unwrap_or_default() {
        is_named(top, "pipeline", name.at.clone(), name.value);
        let Some(table) = as_table(top.source(), name.value, value) else { continue };
        let table = Table::new(top.source(), table, name.at.clone(), reference::PIPELINE);
        if let Some(pipeline) = read_pipeline(&table, name.value, &issuers, trust_domain) {
            pipelines.insert(name.value.into(), pipeline);
        }
    }
    (issuers, pipelines)
}

fn is_named(top: &Table<'_>, what: &str, at: Range<usize>, name: &str) {
    if !is_plain_name(name) {
        top.mistake(at, format!("`{}` is not the name of a {what}", shortened(name)), PLAIN_NAME);
    }
}

fn read_pipeline(
    table: &Table<'_>,
    name: &str,
    issuers: &BTreeMap<IssuerName, Issuer>,
    trust_domain: Option<&TrustDomain>,
) -> Option<Pipeline> {
    if table.get("issuer").is_none() {
        let what = format!("pipeline `{}` has no `issuer`", shortened(name));
        table.mistake(table.at.clone(), what, "say who vouches for it: one of [issuers.*]");
    }
    let mut claims = BTreeMap::new();
    let mut at = BTreeMap::new();
    for (claim, value) in table.members("claims").unwrap_or_default() {
        at.insert(claim.value, claim.at.clone());
        if let Some(text) = as_string(table.source(), claim.value, value) {
            claims.insert(claim.value.to_owned(), text.value.to_owned());
        }
    }
    let issuer = table.string("issuer");
    let url = issuer.as_ref().and_then(|issuer| issuers.get(issuer.value)).map(|issuer| issuer.url.as_str());
    let is_workload = issuer.as_ref().is_some_and(|issuer| issuer.value == MESH_ISSUER);
    let refusals = match (is_workload, trust_domain) {
        (true, Some(trust_domain)) => pipeline::workload_refusals(trust_domain, &claims),
        // What is wrong with the trust domain is said where it stands.
        (true, None) => Vec::new(),
        (false, _) => pipeline::refusals(url, &claims),
    };
    for Refusal { claim, what, help } in refusals {
        let whole = || table.get("claims").map_or(table.at.clone(), Spanned::span);
        let at = claim.and_then(|claim| at.get(claim.as_str()).cloned()).unwrap_or_else(whole);
        table.mistake(at, what, help);
    }
    let mut roles: BTreeSet<RoleName> = BTreeSet::new();
    for role in table.strings("roles").unwrap_or_default() {
        if !is_plain_name(role.value) {
            table.mistake(role.at, format!("`{}` is not the name of a role", shortened(role.value)), PLAIN_NAME);
        } else if !roles.insert(role.value.into()) {
            table.mistake(role.at, format!("`{}` stands here twice", shortened(role.value)), "once is enough");
        }
    }
    let issuer = issuer?;
    if !is_workload && !issuers.contains_key(issuer.value) {
        let what = format!("there is no issuer `{}`", shortened(issuer.value));
        let help = suggest(issuer.value, issuers.keys().map(|name| &**name));
        let none = || Help(Some("declare it: [issuers.NAME] with `url` and `audience`".to_owned()));
        table.mistake(issuer.at, what, if issuers.is_empty() { none() } else { help });
        return None;
    }
    Some(Pipeline { issuer: issuer.value.into(), claims, roles })
}
