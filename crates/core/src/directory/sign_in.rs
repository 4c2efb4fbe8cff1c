//! `[sign_in.*]` of `mesh.toml`: the providers that people sign in with, and what their groups mean here.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Spanned, de::DeValue};

use super::{
    read::{At, Help, PLAIN_NAME, Table, as_string, as_table, is_plain_name, shortened, suggest},
    reference,
};
use crate::{
    change::RoleName,
    pipeline::{Issuer, IssuerName, Pipeline, PipelineName, Refusal},
    sign_in::{self, GROUPS_CLAIM, SignIn, SignInName},
};

pub(super) fn read(
    top: &Table<'_>,
    issuers: &BTreeMap<IssuerName, Issuer>,
    pipelines: &BTreeMap<PipelineName, Pipeline>,
) -> BTreeMap<SignInName, SignIn> {
    let mut sign_ins = BTreeMap::new();
    for (name, value) in top.members("sign_in").unwrap_or_default() {
        if !is_plain_name(name.value) {
            let what = format!("`{}` is not the name of a sign-in", shortened(name.value));
            top.mistake(name.at.clone(), what, PLAIN_NAME);
        }
        if let Some(Refusal { what, help, .. }) = sign_in::name_refusal(name.value) {
            top.mistake(name.at.clone(), what, help);
        }
        let Some(table) = as_table(top.source(), name.value, value) else { continue };
        let table = Table::new(top.source(), table, name.at.clone(), reference::SIGN_IN);
        if let Some(sign_in) = read_sign_in(&table, name.value, issuers) {
            if let Some(pipeline) = sign_in.is_confused_with(issuers, pipelines) {
                let at = table.get("client_id").map_or(table.at.clone(), Spanned::span);
                let what =
                    format!("a token for people would be one of pipeline `{pipeline}`: both are meant for the same");
                table.mistake(at, what, "give the issuer another `audience`, for pipelines alone");
            }
            sign_ins.insert(name.value.into(), sign_in);
        }
    }
    sign_ins
}

fn read_sign_in(table: &Table<'_>, name: &str, issuers: &BTreeMap<IssuerName, Issuer>) -> Option<SignIn> {
    for (key, help) in [
        ("issuer", "say who vouches for people: one of [issuers.*]"),
        ("client_id", "give what the provider calls this mesh: client_id = \"countersign\""),
    ] {
        if table.get(key).is_none() {
            table.mistake(table.at.clone(), format!("sign-in `{}` has no `{key}`", shortened(name)), help);
        }
    }
    let mut roles = BTreeMap::new();
    for (group, value) in table.members("roles").unwrap_or_default() {
        roles.insert(group.value.to_owned(), read_roles(table, &group, value)?);
    }
    let (issuer, client_id) = (table.string("issuer"), table.string("client_id"));
    let groups_claim = match table.get("groups_claim") {
        None => GROUPS_CLAIM.to_owned(),
        Some(_) => table.string("groups_claim")?.value.to_owned(),
    };
    let (issuer, client_id) = (issuer?, client_id?);
    if !issuers.contains_key(issuer.value) {
        let what = format!("there is no issuer `{}`", shortened(issuer.value));
        let help = suggest(issuer.value, issuers.keys().map(|name| &**name));
        let none = || Help(Some("declare it: [issuers.NAME] with `url` and `audience`".to_owned()));
        table.mistake(issuer.at.clone(), what, if issuers.is_empty() { none() } else { help });
    }
    let sign_in = SignIn { issuer: issuer.value.into(), client_id: client_id.value.to_owned(), groups_claim, roles };
    for Refusal { claim, what, help } in sign_in.refusals() {
        let at = claim.and_then(|key| table.get(&key)).map_or(table.at.clone(), Spanned::span);
        table.mistake(at, what, help);
    }
    Some(sign_in)
}

fn read_roles(table: &Table<'_>, group: &At<&str>, value: &Spanned<DeValue<'_>>) -> Option<BTreeSet<RoleName>> {
    let Some(array) = value.get_ref().as_array() else {
        let what = format!("`{}` must be an array of strings", shortened(group.value));
        table.mistake(value.span(), what, "give the roles of the group: [\"editor\"]");
        return None;
    };
    let each = format!("{}[…]", shortened(group.value));
    Some(
        array
            .iter()
            .filter_map(|value| as_string(table.source(), &each, value))
            .map(|role| role.value.into())
            .collect(),
    )
}
