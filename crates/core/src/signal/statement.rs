//! What somebody says of a subject for a while: how much of a risk it is, whether a host is as it should be.
//!
//! Of each source and each kind the newest statement counts. Taking one back is a statement too, newer than what it takes back and
//! kept as long as that would have held: whoever comes later, or was away, learns of it, in whatever order it comes.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize, de};

use crate::{
    identity::{InstanceId, OperatorName, ServiceName},
    token::TokenId,
};

/// Longest name of a source, in bytes.
pub const SOURCE_BYTES_MAX: usize = 160;
/// The highest risk.
pub const RISK_MAX: u8 = 100;
/// The shortest time in which a risk may fall by half.
pub const HALF_LIFE_MS_MIN: u64 = 60_000;

/// Whom a statement is about. Written as its kind, a colon and which: `workload:web`, `instance:web/1-6a30a4de`, `host:vm`,
/// `operator:alice`, `family:0199…`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// All instances of a service.
    Workload(ServiceName),
    /// One of them.
    Instance(InstanceId),
    /// A host, and whatever runs on it.
    Host(ServiceName),
    /// An operator.
    Operator(OperatorName),
    /// An access token and all that were renewed from it: whoever shows one of them.
    Family(TokenId),
}

/// Text that names no subject.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no subject: write `workload:`, `instance:`, `host:`, `operator:` or `family:` and which")]
pub struct SubjectError(String);

/// What a statement is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// How much of a risk the subject is.
    Risk,
    /// Whether a host is as it should be: its patches, its disk's encryption, whatever the source looks at.
    Posture,
    /// Whether a host is looked after by whoever should.
    Management,
    /// Whether the subject is kept from everybody.
    Containment,
}

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Said {
    /// How much of a risk it is.
    Risk(Score),
    /// Whether it is as it should be.
    Compliant(bool),
    /// Whether it is managed.
    Managed(bool),
    /// It asks nobody, and nobody asks it.
    Contained,
    /// Nothing any more: what the source said before is taken back.
    Cleared(Kind),
}

/// A risk as it was when it was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Score {
    /// 0 to [`RISK_MAX`].
    pub value: u8,
    /// In which time it falls by half, in milliseconds; `None`: it stays until the statement ends.
    pub half_life_ms: Option<u64>,
}

/// Text that is no value of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaidError {
    /// It is none of this kind.
    #[error("`{given}` is no value of {kind}: {}", kind.values())]
    Value {
        /// What was given, shortened.
        given: String,
        /// The kind.
        kind: Kind,
    },
    /// It is no kind.
    #[error("`{0}` is no kind: write `risk`, `posture`, `management` or `containment`")]
    Kind(String),
    /// Only a risk falls.
    #[error("only a risk falls by half, {0} does not")]
    NoHalfLife(Kind),
    /// It would fall too fast.
    #[error("a risk falls by half in one minute or more")]
    HalfLife,
}

/// Who says it: the name of an operator, or what of the mesh itself noticed something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source(Arc<str>);

/// Text that names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no source: 1 to {SOURCE_BYTES_MAX} characters, only `a`-`z`, `0`-`9`, `@`, `.`, `_`, `+`, `:`, `/` and `-`"
)]
pub struct SourceError(String);

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Statement {
    /// About whom.
    pub subject: Subject,
    /// Who says it.
    pub source: Source,
    /// What.
    pub said: Said,
    /// Since when, in milliseconds since 1970. Of two of one source, subject and kind, the later counts.
    pub issued_at_ms: u64,
    /// From when on it holds no more, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// A statement as it is kept and travels.
#[derive(Clone, Serialize, Deserialize)]
struct Written {
    subject: Subject,
    kind: Kind,
    value: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    half_life_ms: Option<u64>,
    source: Source,
    issued_at_ms: u64,
    expires_at_ms: u64,
}

/// The value of a statement that takes one back.
const CLEARED: &str = "cleared";

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Risk, Self::Posture, Self::Management, Self::Containment];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Risk => "risk",
            Self::Posture => "posture",
            Self::Management => "management",
            Self::Containment => "containment",
        }
    }

    fn values(self) -> &'static str {
        match self {
            Self::Risk => "write a whole number from 0 to 100",
            Self::Posture => "write `compliant` or `not_compliant`",
            Self::Management => "write `managed` or `unmanaged`",
            Self::Containment => "write `contained`",
        }
    }

    /// Whether it can be said of `subject`.
    pub fn is_of(self, subject: &Subject) -> bool {
        match self {
            Self::Risk => true,
            Self::Posture | Self::Management => matches!(subject, Subject::Host(_)),
            Self::Containment => !matches!(subject, Subject::Operator(_) | Subject::Family(_)),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = SaidError;
    fn from_str(given: &str) -> Result<Self, SaidError> {
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == given);
        known.ok_or_else(|| SaidError::Kind(given.chars().take(40).collect()))
    }
}

impl Said {
    /// What `value` says, as a person writes it.
    pub fn parse(kind: Kind, value: &str, half_life_ms: Option<u64>) -> Result<Self, SaidError> {
        if half_life_ms.is_some() && kind != Kind::Risk {
            return Err(SaidError::NoHalfLife(kind));
        }
        if half_life_ms.is_some_and(|ms| ms < HALF_LIFE_MS_MIN) {
            return Err(SaidError::HalfLife);
        }
        let is_digits = value.bytes().all(|b| b.is_ascii_digit());
        let score = || value.parse().ok().filter(|score| is_digits && *score <= RISK_MAX);
        let said = match (kind, value) {
            (Kind::Risk, _) => score().map(|value| Self::Risk(Score { value, half_life_ms })),
            (Kind::Posture, "compliant") => Some(Self::Compliant(true)),
            (Kind::Posture, "not_compliant") => Some(Self::Compliant(false)),
            (Kind::Management, "managed") => Some(Self::Managed(true)),
            (Kind::Management, "unmanaged") => Some(Self::Managed(false)),
            (Kind::Containment, "contained") => Some(Self::Contained),
            (Kind::Posture | Kind::Management | Kind::Containment, _) => None,
        };
        said.ok_or_else(|| SaidError::Value { given: value.chars().take(40).collect(), kind })
    }

    /// The kind of it.
    pub fn kind(self) -> Kind {
        match self {
            Self::Risk(_) => Kind::Risk,
            Self::Compliant(_) => Kind::Posture,
            Self::Managed(_) => Kind::Management,
            Self::Contained => Kind::Containment,
            Self::Cleared(kind) => kind,
        }
    }

    /// In which time it falls by half, if it does.
    pub fn half_life_ms(self) -> Option<u64> {
        match self {
            Self::Risk(score) => score.half_life_ms,
            Self::Compliant(_) | Self::Managed(_) | Self::Contained | Self::Cleared(_) => None,
        }
    }

    /// Of two that are as new as each other, the one that trusts less counts.
    fn caution(self) -> u8 {
        match self {
            Self::Cleared(_) => 0,
            Self::Compliant(true) | Self::Managed(true) => 1,
            Self::Compliant(false) | Self::Managed(false) | Self::Contained => 2,
            Self::Risk(score) => 1 + score.value,
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Risk(score) => write!(f, "{}", score.value),
            Self::Compliant(true) => f.write_str("compliant"),
            Self::Compliant(false) => f.write_str("not_compliant"),
            Self::Managed(true) => f.write_str("managed"),
            Self::Managed(false) => f.write_str("unmanaged"),
            Self::Contained => f.write_str("contained"),
            Self::Cleared(_) => f.write_str(CLEARED),
        }
    }
}

impl Source {
    /// Parses a name.
    pub fn parse(given: &str) -> Result<Self, SourceError> {
        let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'@' | b'.' | b'_' | b'+' | b':' | b'/' | b'-');
        let is_one = (1..=SOURCE_BYTES_MAX).contains(&given.len()) && given.bytes().all(allowed);
        if is_one { Ok(Self(given.into())) } else { Err(SourceError(given.chars().take(40).collect())) }
    }

    /// An operator.
    pub fn operator(name: &OperatorName) -> Self {
        Self(format!("operator:{name}").into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Statement {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.said.kind()
    }

    /// Whether it holds at `now_ms`, and says something.
    pub fn holds(&self, now_ms: u64) -> bool {
        now_ms < self.expires_at_ms && !matches!(self.said, Said::Cleared(_))
    }

    /// Whether policies of requests read it: what is said of operators concerns no host.
    pub fn concerns_proxies(&self) -> bool {
        !matches!(self.subject, Subject::Operator(_))
    }

    /// Whether it counts in place of `held`, which is of the same source, subject and kind. Of any two that differ one does: so
    /// whoever hears of the same statements holds the same ones.
    pub fn supersedes(&self, held: &Self) -> bool {
        let rank = |one: &Self| {
            (one.issued_at_ms, one.said.caution(), one.expires_at_ms, one.said.half_life_ms().unwrap_or(u64::MAX))
        };
        rank(self) > rank(held)
    }

    /// The statement that takes it back at `now_ms`.
    pub fn clearing(&self, now_ms: u64) -> Self {
        Self {
            said: Said::Cleared(self.kind()),
            issued_at_ms: now_ms.max(self.issued_at_ms + 1),
            // As long as somebody may hold what it takes back.
            expires_at_ms: self.expires_at_ms.max(now_ms),
            ..self.clone()
        }
    }
}

impl TryFrom<Written> for Statement {
    type Error = SaidError;
    fn try_from(written: Written) -> Result<Self, SaidError> {
        let Written { subject, kind, value, half_life_ms, source, issued_at_ms, expires_at_ms } = written;
        let said = match value.as_str() {
            CLEARED => Said::Cleared(kind),
            value => Said::parse(kind, value, half_life_ms)?,
        };
        Ok(Self { subject, source, said, issued_at_ms, expires_at_ms })
    }
}

impl From<Statement> for Written {
    fn from(statement: Statement) -> Self {
        let Statement { subject, source, said, issued_at_ms, expires_at_ms } = statement;
        let (kind, value, half_life_ms) = (said.kind(), said.to_string(), said.half_life_ms());
        Self { subject, kind, value, half_life_ms, source, issued_at_ms, expires_at_ms }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(service) => write!(f, "workload:{service}"),
            Self::Instance(instance) => write!(f, "instance:{instance}"),
            Self::Host(host) => write!(f, "host:{host}"),
            Self::Operator(operator) => write!(f, "operator:{operator}"),
            Self::Family(first) => write!(f, "family:{first}"),
        }
    }
}

impl FromStr for Subject {
    type Err = SubjectError;
    fn from_str(given: &str) -> Result<Self, SubjectError> {
        let parsed = match given.split_once(':') {
            Some(("workload", name)) => ServiceName::parse(name).ok().map(Self::Workload),
            Some(("instance", id)) => InstanceId::parse(id).ok().map(Self::Instance),
            Some(("host", name)) => ServiceName::parse(name).ok().map(Self::Host),
            Some(("operator", name)) => OperatorName::parse(name).ok().map(Self::Operator),
            Some(("family", first)) => first.parse().ok().map(Self::Family),
            _ => None,
        };
        parsed.ok_or_else(|| SubjectError(given.chars().take(80).collect()))
    }
}

impl Serialize for Subject {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subject {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Source {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}
