//! `[clients.*]` of `mesh.toml`: who may ask the token service for tokens without being a workload.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    LocalService,
    read::{At, Help, Table, as_table, shortened, suggest},
    reference,
};
use crate::{
    client::{Client, key_refusal},
    identity::ServiceName,
};

pub(super) fn read(top: &Table<'_>, services: &BTreeMap<ServiceName, LocalService>) -> BTreeMap<ServiceName, Client> {
    let mut clients = BTreeMap::new();
    for (name, value) in top.members("clients").unwrap_or_default() {
        let Some(table) = as_table(top.source(), name.value, value) else { continue };
        let table = Table::new(top.source(), table, name.at.clone(), reference::CLIENT);
        let client = read_client(&table, name.value, services);
        match ServiceName::parse(name.value) {
            Ok(name) => drop(clients.insert(name, client)),
            Err(error) => {
                top.mistake(name.at, error.to_string().replace("service name", "name of a client"), Help(None));
            }
        }
    }
    clients
}

fn read_client(table: &Table<'_>, name: &str, services: &BTreeMap<ServiceName, LocalService>) -> Client {
    for (key, help) in [
        ("services", "say which services it may ask tokens for: services = [\"payments\"]"),
        ("keys", "give its public keys, each as a JWK: keys = ['{\"kty\":\"EC\", …}']"),
    ] {
        if table.get(key).is_none() {
            table.mistake(table.at.clone(), format!("client `{}` has no `{key}`", shortened(name)), help);
        }
    }
    let mut named = BTreeSet::new();
    for At { at, value } in table.strings("services").unwrap_or_default() {
        match services.keys().find(|service| service.as_str() == value) {
            Some(service) => drop(named.insert(service.clone())),
            None => {
                let what = format!("there is no service `{}`", shortened(value));
                table.mistake(at, what, suggest(value, services.keys().map(ServiceName::as_str)));
            }
        }
    }
    let mut keys = BTreeSet::new();
    let mut is_wrong = false;
    for At { at, value } in table.strings("keys").unwrap_or_default() {
        match key_refusal(value) {
            Some(refusal) => {
                is_wrong = true;
                table.mistake(at, refusal.what, refusal.help);
            }
            None => drop(keys.insert(value.to_owned())),
        }
    }
    let client = Client { services: named, keys };
    // What one of them says was said where it stands.
    for refusal in client.refusals() {
        let of_keys = refusal.what.contains("keys");
        let key = if of_keys { "keys" } else { "services" };
        if table.get(key).is_some()
            && !(of_keys && is_wrong)
            && (of_keys || table.strings("services").is_some_and(|all| all.is_empty()))
        {
            table.mistake(table.at_key(key), refusal.what, refusal.help);
        }
    }
    client
}
