//! What a sidecar tells, told again as an event of this process: once, at its own level, with its instance. A sidecar
//! writes one JSON object per line; a line that is none is what something below it had to say on its way down.

use countersign_core::identity::InstanceId;
use serde_json::{Map, Value};
use tracing::Level;

/// Keys of a line that the event carries anyway.
const CARRIED: [&str; 5] = ["timestamp", "level", "message", "target", "instance.id"];

/// One event of a sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    level: Level,
    /// The message, then each field as `name=value`.
    pub(super) text: String,
}

impl Event {
    /// The event of a line.
    pub(super) fn parse(line: &str) -> Self {
        let Ok(fields) = serde_json::from_str::<Map<String, Value>>(line) else {
            return Self { level: Level::WARN, text: line.to_owned() };
        };
        let level = fields.get("level").and_then(Value::as_str).and_then(|level| level.parse().ok());
        let mut text = fields.get("message").and_then(Value::as_str).unwrap_or_default().to_owned();
        for (name, value) in fields.iter().filter(|(name, _)| !CARRIED.contains(&name.as_str())) {
            match value.as_str() {
                Some(value) => text.push_str(&format!(" {name}={value}")),
                None => text.push_str(&format!(" {name}={value}")),
            }
        }
        Self { level: level.unwrap_or(Level::INFO), text: text.trim_start().to_owned() }
    }

    /// Whether something is not as it should be.
    pub(super) fn is_trouble(&self) -> bool {
        self.level <= Level::WARN
    }

    /// Tells it. Each level is a place in the program of its own, as `tracing` wants it.
    pub(super) fn tell(&self, instance: &InstanceId) {
        macro_rules! at {
            ($level:ident) => {
                tracing::$level!(target: "countersign::sidecar", %instance, "{}", self.text)
            };
        }
        match self.level {
            Level::ERROR => at!(error),
            Level::WARN => at!(warn),
            Level::INFO => at!(info),
            Level::DEBUG => at!(debug),
            Level::TRACE => at!(trace),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_told_at_its_own_level_with_its_fields_behind_its_message() {
        for (line, level, text) in [
            (
                r#"{"timestamp":"2026-11-22T17:00:00Z","level":"WARN","message":"slow","ms":3,"to":"a","target":"x"}"#,
                Level::WARN,
                "slow ms=3 to=a",
            ),
            (r#"{"level":"ERROR","error":"no"}"#, Level::ERROR, "error=no"),
            (r#"{"message":"hello"}"#, Level::INFO, "hello"),
            ("memory allocation of 8 bytes failed", Level::WARN, "memory allocation of 8 bytes failed"),
            ("", Level::WARN, ""),
        ] {
            assert_eq!(Event::parse(line), Event { level, text: text.into() }, "{line}");
        }
    }
}
