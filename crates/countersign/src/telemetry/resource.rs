//! Who tells, in the words of OpenTelemetry: the service, its instance, the host and the trust domain.

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
};

/// Who tells.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Teller {
    /// `service.namespace`: the trust domain, where it is known.
    pub trust_domain: Option<String>,
    /// `service.name`.
    pub service: String,
    /// `service.instance.id`.
    pub instance: String,
    /// `host.name`: the host as the mesh calls it.
    pub host: String,
}

impl Teller {
    /// Its resource, with `more` from the environment; what the mesh knows itself comes first.
    pub fn resource(&self, more: &[(String, String)]) -> Resource {
        let mut attributes = vec![
            text("service.name", self.service.clone()),
            text("service.instance.id", self.instance.clone()),
            text("host.name", self.host.clone()),
            text("telemetry.distro.name", "countersign".into()),
            text("telemetry.distro.version", env!("CARGO_PKG_VERSION").into()),
        ];
        attributes.extend(self.trust_domain.clone().map(|name| text("service.namespace", name)));
        for (key, value) in more {
            if !attributes.iter().any(|known| known.key == *key) {
                attributes.push(text(key, value.clone()));
            }
        }
        Resource { attributes, ..Resource::default() }
    }
}

/// The part of us that tells.
pub fn scope(name: &str) -> InstrumentationScope {
    InstrumentationScope {
        name: name.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..InstrumentationScope::default()
    }
}

/// An attribute that is a text.
pub fn text(key: &str, value: String) -> KeyValue {
    attribute(key, Value::StringValue(value))
}

/// An attribute that is a number.
pub fn number(key: &str, value: impl TryInto<i64>) -> KeyValue {
    attribute(key, Value::IntValue(value.try_into().unwrap_or(i64::MAX)))
}

/// An attribute that is a list of texts.
pub fn texts(key: &str, values: Vec<String>) -> KeyValue {
    let values = values.into_iter().map(|value| AnyValue { value: Some(Value::StringValue(value)) }).collect();
    attribute(key, Value::ArrayValue(ArrayValue { values }))
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_adds_and_does_not_rename_a_service() {
        let (trust_domain, service) = (Some("shop.example".into()), "catalog".into());
        let teller = Teller { trust_domain, service, instance: "catalog/1".into(), host: "alpha".into() };
        let more =
            [("service.name".to_owned(), "other".to_owned()), ("deployment.environment.name".into(), "x".into())];
        let attributes = teller.resource(&more).attributes;
        assert!(attributes.contains(&text("service.name", "catalog".into())));
        assert!(attributes.contains(&text("service.namespace", "shop.example".into())));
        assert!(attributes.contains(&text("deployment.environment.name", "x".into())));
        assert_eq!(attributes.iter().filter(|known| known.key == "service.name").count(), 1);
    }
}
