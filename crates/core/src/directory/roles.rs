//! `roles.toml`: roles and who has them.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    mesh::Mesh,
    read::{At, Help, PLAIN_NAME, Source, Table, as_table, is_plain_name, shortened, suggest},
    reference,
};
use crate::{
    change::{Member, RoleName},
    identity::ServiceName,
};

/// `None` when the file is no TOML: then nobody knows which roles there are.
pub(super) fn read(source: &Source, mesh: &Mesh) -> Option<BTreeMap<RoleName, BTreeSet<Member>>> {
    let mut roles = BTreeMap::new();
    let document = source.document()?;
    let top = Table::new(source, document.get_ref(), 0..0, reference::ROLES);
    for (name, value) in top.members("roles").unwrap_or_default() {
        if !is_plain_name(name.value) {
            source.mistake(
                name.at.clone(),
                format!("`{}` is not the name of a role", shortened(name.value)),
                PLAIN_NAME,
            );
        }
        let Some(table) = as_table(source, name.value, value) else { continue };
        let table = Table::new(source, table, name.at.clone(), reference::ROLE);
        if table.get("members").is_none() {
            let help = "say who has it: members = [\"web\"]; an empty array is nobody";
            table.mistake(name.at, format!("role `{}` has no `members`", shortened(name.value)), help);
        }
        let mut members = BTreeSet::new();
        for given in table.strings("members").unwrap_or_default() {
            let Some(member) = read_member(&table, &given, mesh) else { continue };
            if !members.insert(member) {
                table.mistake(given.at, format!("`{}` stands here twice", shortened(given.value)), "once is enough");
            }
        }
        roles.insert(name.value.into(), members);
    }
    Some(roles)
}

fn read_member(table: &Table<'_>, given: &At<&str>, mesh: &Mesh) -> Option<Member> {
    let member = match Member::try_from(given.value.to_owned()) {
        Ok(Member::Workload(id)) => match (&mesh.trust_domain, id.service()) {
            // One workload has one name here, or it could have a role twice.
            (Some(own), Some(service)) if own.workload(&service) == id => Member::Service(service),
            _ => Member::Workload(id),
        },
        Ok(member) => member,
        Err(error) => {
            table.mistake(given.at.clone(), error.to_string(), Help(None));
            return None;
        }
    };
    if let (Member::Service(service), true) = (&member, mesh.is_readable)
        && !mesh.services.contains_key(service)
    {
        let names = mesh.services.keys().map(ServiceName::as_str);
        table.mistake(given.at.clone(), format!("there is no service `{service}`"), suggest(service.as_str(), names));
    }
    Some(member)
}
