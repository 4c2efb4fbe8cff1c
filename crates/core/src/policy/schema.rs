//! What policies can say. The text is published; the actions in it and in [`ACTIONS`] are the same, in the same words.

use std::sync::{Arc, LazyLock};

use cedar_policy::{Schema, Validator};
use cedar_policy_core::ast::{Eid, EntityType, EntityUID, Name};

use super::Action;

const TEXT: &str = include_str!("schema.cedarschema");

/// Every action of the schema with the group it is in; the position is its number in the index.
pub(super) const ACTIONS: [(&str, Option<&str>); 19] = [
    ("http:GET", Some("read")),
    ("http:POST", Some("write")),
    ("http:HEAD", Some("read")),
    ("http:PUT", Some("write")),
    ("http:PATCH", Some("write")),
    ("http:DELETE", Some("write")),
    ("http:OPTIONS", Some("read")),
    ("http:QUERY", Some("read")),
    ("http:PROPFIND", Some("read")),
    ("http:REPORT", Some("read")),
    ("http:SEARCH", Some("read")),
    ("http:PROPPATCH", Some("write")),
    ("http:MKCOL", Some("write")),
    ("http:COPY", Some("write")),
    ("http:MOVE", Some("write")),
    ("http:LOCK", Some("write")),
    ("http:UNLOCK", Some("write")),
    ("grpc:call", None),
    ("tcp:connect", None),
];
const GRPC_CALL: u8 = 17;
const TCP_CONNECT: u8 = 18;

/// The schema of the request gate, as Cedar text.
pub fn schema_text() -> &'static str {
    TEXT
}

/// Whether the schema has an action of this name: `http:GET`.
pub fn is_action(name: &str) -> bool {
    ACTIONS.iter().any(|(known, _)| *known == name)
}

/// The strict validator of the schema.
pub(super) static VALIDATOR: LazyLock<Validator> = LazyLock::new(|| {
    let (schema, _warnings) =
        Schema::from_cedarschema_str(TEXT).expect("INVARIANT: the published schema is a valid schema");
    Validator::new(schema)
});

/// The entity types of the schema, made once.
pub(super) struct Types {
    pub(super) workload: EntityType,
    pub(super) role: EntityType,
    pub(super) service: EntityType,
    pub(super) namespace: EntityType,
    pub(super) sensitivity: EntityType,
    pub(super) operation: EntityType,
    pub(super) action: EntityType,
}

pub(super) static TYPES: LazyLock<Types> = LazyLock::new(|| {
    let named = |name: &str| {
        let name: Name = name.parse().expect("INVARIANT: a type of the schema is an identifier");
        EntityType::from(name)
    };
    Types {
        workload: named("Workload"),
        role: named("Role"),
        service: named("Service"),
        namespace: named("Namespace"),
        sensitivity: named("Sensitivity"),
        operation: named("Operation"),
        action: named("Action"),
    }
});

/// The entity of each action, in the order of [`ACTIONS`].
pub(super) static ACTION_UIDS: LazyLock<Vec<Arc<EntityUID>>> =
    LazyLock::new(|| ACTIONS.iter().map(|(name, _)| Arc::new(uid(&TYPES.action, name))).collect());

/// An entity of this type with this id.
pub(super) fn uid(kind: &EntityType, id: &str) -> EntityUID {
    EntityUID::from_components(kind.clone(), Eid::new(id), None)
}

/// The number of an action; `None` for a method that no policy can name.
pub(super) fn number(action: Action<'_>) -> Option<u8> {
    match action {
        Action::GrpcCall => Some(GRPC_CALL),
        Action::TcpConnect => Some(TCP_CONNECT),
        Action::Http(method) => ACTIONS
            .iter()
            .position(|(name, _)| name.strip_prefix("http:") == Some(method))
            .and_then(|at| u8::try_from(at).ok()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_actions_of_the_index_are_the_actions_of_the_schema() {
        let schema = VALIDATOR.schema();
        let of_schema: BTreeSet<String> = schema.actions().map(|uid| uid.id().unescaped().to_owned()).collect();
        let groups = ["read", "write"].map(String::from);
        let of_index: BTreeSet<String> = ACTIONS.iter().map(|(name, _)| (*name).to_owned()).chain(groups).collect();
        assert_eq!(of_schema, of_index);
        let entities = schema.action_entities().unwrap();
        for (name, group) in ACTIONS {
            let action = format!("Action::{name:?}").parse().unwrap();
            let parents: Vec<String> =
                entities.ancestors(&action).unwrap().map(|uid| uid.id().unescaped().to_owned()).collect();
            assert_eq!(parents, group.map(String::from).into_iter().collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn a_method_that_no_policy_can_name_has_no_number() {
        for (action, expected) in [
            (Action::Http("TRACE"), None),
            (Action::Http("CONNECT"), None),
            (Action::Http("get"), None),
            (Action::Http(""), None),
            (Action::Http("call"), None),
            (Action::Http("GET"), Some(0)),
            (Action::GrpcCall, Some(17)),
            (Action::TcpConnect, Some(18)),
        ] {
            assert_eq!(number(action), expected, "{action}");
        }
        assert_eq!(ACTIONS[usize::from(GRPC_CALL)].0, "grpc:call");
        assert_eq!(ACTIONS[usize::from(TCP_CONNECT)].0, "tcp:connect");
    }
}
