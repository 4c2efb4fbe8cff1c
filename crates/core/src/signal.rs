//! Facts of the moment that decisions rest on and that the ledger does not hold: they hold at once, for a while, and end by
//! themselves. Every host keeps all of them that hold; they are counted, so that it is known who knows which.
//!
//! INVARIANT (revoked-stays-revoked): whatever is taken in, and from whomever, no certificate and no token ceases to be revoked before
//! it has expired.
//!
//! INVARIANT (newest-statement-counts): what is held of statements is the newest of each source, subject and kind, in whatever order and
//! however often they came, and whatever was forgotten elsewhere; only a newer one takes one back.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, Serialize, de};

use crate::{
    identity::{InstanceId, ServiceName},
    token::{Claims, Thumbprint, TokenId},
};

pub mod statement;

use statement::{Kind, Source, Statement, Subject};

/// How many signals a control plane has given out: the number of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SignalSeq(pub u64);

/// The serial number of a certificate of our own authority: 16 bytes (RFC 5280, 4.1.2.2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; 16]);

/// Text that is no serial number of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no serial number: 32 hexadecimal digits, as `countersign identity list` shows them")]
pub struct SerialError(String);

/// One certificate that is good for nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    /// Which.
    pub serial: Serial,
    /// When it expires by itself, in milliseconds since 1970: from then on nobody need know that it was revoked.
    pub expires_at_ms: u64,
}

/// Which access tokens are meant. Written `all`, or what it is, a colon and which: `family:0199…`, `subject:web`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TokensMeant {
    /// Every one.
    All,
    /// The one with this id.
    Id(TokenId),
    /// That one and all that were renewed from it.
    Family(TokenId),
    /// Those of an instance.
    Instance(InstanceId),
    /// Those about a service as the caller.
    Subject(ServiceName),
    /// Those for a service as the callee.
    Audience(ServiceName),
    /// Those that a client asked for, or that are about it.
    Client(ServiceName),
    /// Those bound to a certificate, or to a key that signs proofs.
    Key(Thumbprint),
}

/// Text that means no tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` means no tokens: write `all`, or `id:`, `family:`, `instance:`, `subject:`, `audience:`, `client:` or `key:` and which"
)]
pub struct TokensMeantError(String);

/// Access tokens that are good for nothing any more: those that are meant and were issued until a moment. What is issued after it is
/// good again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRevocation {
    /// Which.
    pub meant: TokensMeant,
    /// Those issued until then, in milliseconds since 1970.
    pub issued_until_ms: u64,
    /// When the last of them expires by itself, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// What is said once, and holds until its time is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signal {
    /// A certificate was revoked.
    Certificate(Revocation),
    /// Access tokens were.
    Tokens(TokenRevocation),
    /// Somebody says something of a subject.
    Stated(Statement),
}

/// All signals that hold. Clones share what they hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signals {
    sequence: SignalSeq,
    revoked: Arc<BTreeMap<Serial, u64>>,
    tokens: Arc<BTreeMap<TokensMeant, Until>>,
    stated: Arc<BTreeMap<Subject, About>>,
}

/// What is said of one subject: the newest of each kind and source.
type About = BTreeMap<(Kind, Source), Statement>;

/// Until when tokens were issued that are revoked, and when the last of them expires, both in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Until {
    issued_ms: u64,
    expires_ms: u64,
}

/// Signals that do not follow those that are held: some are missing in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("signals after {after} came where {held} are held: some are missing")]
pub struct Gap {
    /// What they follow.
    pub after: u64,
    /// What is held.
    pub held: u64,
}

impl Serial {
    /// The contents of a certificate's INTEGER; `None` when it is none of ours.
    pub fn from_der(integer: &[u8]) -> Option<Self> {
        integer.try_into().ok().map(Self)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

impl FromStr for Serial {
    type Err = SerialError;
    fn from_str(given: &str) -> Result<Self, SerialError> {
        let mut bytes = [0; 16];
        // Other tools write serial numbers in capitals, and with colons.
        let digits: String = given.chars().filter(|c| *c != ':').collect();
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| SerialError(given.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Serial {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Signals {
    /// The number of the last one that is held.
    pub fn sequence(&self) -> SignalSeq {
        self.sequence
    }

    /// Whether a certificate is revoked.
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.revoked.contains_key(serial)
    }

    /// Whether nothing is revoked, and nothing said.
    pub fn is_empty(&self) -> bool {
        self.revoked.is_empty() && self.tokens.is_empty() && self.stated.is_empty()
    }

    /// Whether anything is said of anybody.
    pub fn has_statements(&self) -> bool {
        !self.stated.is_empty()
    }

    /// What is said of a subject, and what was taken back of it.
    pub fn about(&self, subject: &Subject) -> impl Iterator<Item = &Statement> {
        self.stated.get(subject).into_iter().flat_map(BTreeMap::values)
    }

    /// What is said of anybody, and what was taken back of it.
    pub fn statements(&self) -> impl Iterator<Item = &Statement> {
        self.stated.values().flat_map(BTreeMap::values)
    }

    /// Whether an access token is revoked.
    pub fn is_token_revoked(&self, claims: &Claims) -> bool {
        self.token_revoked_at_ms(claims).is_some()
    }

    /// When an access token was first revoked, in milliseconds since 1970; `None`: it is not.
    pub fn token_revoked_at_ms(&self, claims: &Claims) -> Option<u64> {
        if self.tokens.is_empty() {
            return None;
        }
        let issued_at_ms = claims.id.issued_at_ms();
        let service = |id: &crate::identity::SpiffeId| id.service();
        let named = [
            service(&claims.subject).map(TokensMeant::Subject),
            service(&claims.audience).map(TokensMeant::Audience),
            claims.instance.clone().map(TokensMeant::Instance),
            claims.client_id.client().map(TokensMeant::Client),
            claims.subject.client().map(TokensMeant::Client),
        ];
        [
            TokensMeant::All,
            TokensMeant::Id(claims.id),
            TokensMeant::Family(claims.family),
            TokensMeant::Key(claims.confirmation.thumbprint()),
        ]
        .iter()
        .chain(named.iter().flatten())
        .filter_map(|meant| self.tokens.get(meant))
        .filter(|until| issued_at_ms <= until.issued_ms)
        .map(|until| until.issued_ms)
        .min()
    }

    /// The access tokens that are revoked.
    pub fn tokens_revoked(&self) -> impl ExactSizeIterator<Item = TokenRevocation> {
        self.tokens.iter().map(|(meant, until)| TokenRevocation {
            meant: meant.clone(),
            issued_until_ms: until.issued_ms,
            expires_at_ms: until.expires_ms,
        })
    }

    /// Everything that holds.
    pub fn all(&self) -> impl Iterator<Item = Signal> {
        let revoked = self.revoked().map(Signal::Certificate).chain(self.tokens_revoked().map(Signal::Tokens));
        revoked.chain(self.statements().cloned().map(Signal::Stated))
    }

    /// The certificates that are revoked.
    pub fn revoked(&self) -> impl ExactSizeIterator<Item = Revocation> {
        self.revoked.iter().map(|(serial, expires_at_ms)| Revocation { serial: *serial, expires_at_ms: *expires_at_ms })
    }

    /// Takes in all that a control plane holds. What is held here beyond it stays: a control plane can be behind another, or have
    /// been restored from an older copy.
    pub fn welcome(&mut self, sequence: SignalSeq, all: impl IntoIterator<Item = Signal>) {
        self.add(all);
        self.sequence = sequence;
    }

    /// Takes in what follows `after`, up to `sequence`.
    pub fn extend(
        &mut self,
        after: SignalSeq,
        sequence: SignalSeq,
        new: impl IntoIterator<Item = Signal>,
    ) -> Result<(), Gap> {
        if after > self.sequence {
            return Err(Gap { after: after.0, held: self.sequence.0 });
        }
        self.add(new);
        self.sequence = self.sequence.max(sequence);
        Ok(())
    }

    /// Forgets what has ended by itself at `now_ms`.
    pub fn forget_ended(&mut self, now_ms: u64) {
        if self.revoked.values().any(|expires_at_ms| *expires_at_ms < now_ms) {
            Arc::make_mut(&mut self.revoked).retain(|_, expires_at_ms| *expires_at_ms >= now_ms);
        }
        if self.tokens.values().any(|until| until.expires_ms < now_ms) {
            Arc::make_mut(&mut self.tokens).retain(|_, until| until.expires_ms >= now_ms);
        }
        if self.statements().any(|statement| statement.expires_at_ms < now_ms) {
            Arc::make_mut(&mut self.stated).retain(|_, about| {
                about.retain(|_, statement| statement.expires_at_ms >= now_ms);
                !about.is_empty()
            });
        }
    }

    fn add(&mut self, signals: impl IntoIterator<Item = Signal>) {
        for signal in signals {
            match signal {
                Signal::Certificate(one) => _ = Arc::make_mut(&mut self.revoked).insert(one.serial, one.expires_at_ms),
                Signal::Tokens(TokenRevocation { meant, issued_until_ms, expires_at_ms }) => {
                    let new = Until { issued_ms: issued_until_ms, expires_ms: expires_at_ms };
                    match Arc::make_mut(&mut self.tokens).entry(meant) {
                        Entry::Vacant(place) => _ = place.insert(new),
                        Entry::Occupied(mut held) => {
                            let held = held.get_mut();
                            held.issued_ms = held.issued_ms.max(new.issued_ms);
                            held.expires_ms = held.expires_ms.max(new.expires_ms);
                        }
                    }
                }
                Signal::Stated(statement) => {
                    let about = Arc::make_mut(&mut self.stated).entry(statement.subject.clone()).or_default();
                    match about.entry((statement.kind(), statement.source.clone())) {
                        Entry::Vacant(place) => _ = place.insert(statement),
                        Entry::Occupied(mut held) if statement.supersedes(held.get()) => _ = held.insert(statement),
                        Entry::Occupied(_) => {}
                    }
                }
            }
        }
    }
}

impl fmt::Display for TokensMeant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Id(id) => write!(f, "id:{id}"),
            Self::Family(id) => write!(f, "family:{id}"),
            Self::Instance(instance) => write!(f, "instance:{instance}"),
            Self::Subject(service) => write!(f, "subject:{service}"),
            Self::Audience(service) => write!(f, "audience:{service}"),
            Self::Client(name) => write!(f, "client:{name}"),
            Self::Key(certificate) => write!(f, "key:{certificate}"),
        }
    }
}

impl FromStr for TokensMeant {
    type Err = TokensMeantError;
    fn from_str(given: &str) -> Result<Self, TokensMeantError> {
        let parsed = match given.split_once(':') {
            None => (given == "all").then_some(Self::All),
            Some(("id", id)) => id.parse().ok().map(Self::Id),
            Some(("family", id)) => id.parse().ok().map(Self::Family),
            Some(("instance", id)) => InstanceId::parse(id).ok().map(Self::Instance),
            Some(("subject", name)) => ServiceName::parse(name).ok().map(Self::Subject),
            Some(("audience", name)) => ServiceName::parse(name).ok().map(Self::Audience),
            Some(("client", name)) => ServiceName::parse(name).ok().map(Self::Client),
            Some(("key", thumbprint)) => thumbprint.parse().ok().map(Self::Key),
            Some(_) => None,
        };
        parsed.ok_or_else(|| TokensMeantError(given.chars().take(80).collect()))
    }
}

impl Serialize for TokensMeant {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokensMeant {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        statement::{Said, Score},
        *,
    };

    fn serial(number: u8) -> Serial {
        Serial([number; 16])
    }

    fn revoked(number: u8, expires_at_ms: u64) -> Signal {
        Signal::Certificate(Revocation { serial: serial(number), expires_at_ms })
    }

    #[test]
    fn a_serial_number_reads_as_other_tools_write_it() {
        let serial = Serial([0x4a; 16]);
        assert_eq!(serial.to_string().parse(), Ok(serial));
        assert_eq!(vec!["4A"; 16].join(":").parse(), Ok(serial));
        for wrong in ["", "4a", &"4a".repeat(17), &"zz".repeat(16), "é"] {
            assert!(wrong.parse::<Serial>().is_err(), "{wrong}");
        }
        assert_eq!(Serial::from_der(&[1; 20]), None, "of another authority");
    }

    /// PROVES (revoked-stays-revoked)
    #[test]
    fn whatever_a_control_plane_says_nothing_comes_back_before_it_expired() {
        let mut signals = Signals::default();
        signals.welcome(SignalSeq(7), [revoked(1, 100), revoked(2, 50)]);
        assert_eq!(signals.extend(SignalSeq(7), SignalSeq(8), [revoked(3, 100)]), Ok(()));
        let gap = signals.extend(SignalSeq(9), SignalSeq(10), [revoked(4, 100)]);
        assert_eq!(gap, Err(Gap { after: 9, held: 8 }));
        assert!(!signals.is_revoked(&serial(4)));
        signals.extend(SignalSeq(6), SignalSeq(7), []).unwrap();
        assert_eq!(signals.sequence(), SignalSeq(8), "what was said before is no news");
        signals.welcome(SignalSeq(2), []);
        assert_eq!((signals.sequence(), signals.revoked().len()), (SignalSeq(2), 3), "a restored one has forgotten it");
        signals.forget_ended(51);
        assert!(!signals.is_revoked(&serial(2)));
        assert!(signals.is_revoked(&serial(1)) && signals.is_revoked(&serial(3)));
        signals.forget_ended(100);
        assert_eq!(signals.revoked().len(), 2, "in its last millisecond it is still a certificate");
    }

    #[test]
    fn a_token_is_revoked_by_whatever_means_it_and_one_that_was_issued_later_is_good() {
        let id = |ms: u64| TokenId::new(ms, [7; 10]);
        let claims = |ms: u64| -> Claims {
            let of = |path: &str| format!("spiffe://shop.example/{path}");
            serde_json::from_value(serde_json::json!({
                "iss": "x", "sub": of("web"), "aud": of("orders"), "client_id": of("web"), "iat": 0, "exp": 1, "jti": id(ms),
                "scope": "", "cnf": { "x5t#S256": Thumbprint([1; 32]) }, "instance": "web/1", "family": id(5),
            }))
            .unwrap()
        };
        let key = Thumbprint([1; 32]);
        for (meant, is_meant) in [
            ("all".to_owned(), true),
            (format!("id:{}", id(10)), true),
            (format!("id:{}", id(11)), false),
            (format!("family:{}", id(5)), true),
            ("instance:web/1".to_owned(), true),
            ("instance:web/2".to_owned(), false),
            ("subject:web".to_owned(), true),
            ("subject:orders".to_owned(), false),
            ("audience:orders".to_owned(), true),
            (format!("key:{key}"), true),
        ] {
            let mut signals = Signals::default();
            let until = |issued_until_ms| {
                let meant = meant.parse().unwrap();
                Signal::Tokens(TokenRevocation { meant, issued_until_ms, expires_at_ms: 100 })
            };
            assert_eq!(meant.parse::<TokensMeant>().unwrap().to_string(), meant);
            signals.welcome(SignalSeq(1), [until(10)]);
            assert_eq!(signals.token_revoked_at_ms(&claims(10)), is_meant.then_some(10), "{meant}");
            assert!(!signals.is_token_revoked(&claims(11)), "{meant}: issued after it");
            signals.welcome(SignalSeq(2), [until(9)]);
            assert_eq!(signals.is_token_revoked(&claims(10)), is_meant, "{meant}: nothing comes back");
            signals.forget_ended(101);
            assert!(signals.is_empty());
        }
        for wrong in ["", "everything", "subject:", "subject:Web", "id:1", "key:AA", "device:x"] {
            assert!(wrong.parse::<TokensMeant>().is_err(), "{wrong}");
        }
    }

    fn statement() -> impl Strategy<Value = Statement> {
        let said = prop_oneof![
            (0u8..=3, prop::option::of(60_000u64..60_002))
                .prop_map(|(value, half_life_ms)| Said::Risk(Score { value, half_life_ms })),
            any::<bool>().prop_map(Said::Compliant),
            prop::sample::select(&Kind::ALL[..]).prop_map(Said::Cleared),
        ];
        let of = |all: &'static [&'static str]| prop::sample::select(all);
        (of(&["host:vm", "workload:web"]), of(&["a", "b"]), said, 0u64..4, 0u64..8).prop_map(
            |(subject, source, said, issued_at_ms, lives_ms)| Statement {
                subject: subject.parse().unwrap(),
                source: Source::parse(source).unwrap(),
                said,
                issued_at_ms,
                expires_at_ms: issued_at_ms + lives_ms,
            },
        )
    }

    proptest! {
        /// PROVES (newest-statement-counts)
        #[test]
        fn in_whatever_order_statements_come_the_newest_of_each_source_is_held(
            (said, shuffled) in prop::collection::vec(statement(), 0..12)
                .prop_flat_map(|said| (Just(said.clone()), Just(said).prop_shuffle())),
            cut in 0usize..12,
        ) {
            let mut one = Signals::default();
            one.welcome(SignalSeq(1), said.iter().cloned().map(Signal::Stated));
            let mut other = Signals::default();
            let (first, rest) = shuffled.split_at(cut.min(shuffled.len()));
            other.extend(SignalSeq(0), SignalSeq(1), rest.iter().chain(first).cloned().map(Signal::Stated)).unwrap();
            // A control plane that has forgotten some of it, or says some of it again, takes nothing back.
            other.welcome(SignalSeq(1), first.iter().cloned().map(Signal::Stated));
            prop_assert_eq!(&one, &other);
            for statement in &said {
                let held = one.about(&statement.subject).find(|held| {
                    (held.kind(), &held.source) == (statement.kind(), &statement.source)
                });
                prop_assert!(held.is_some_and(|held| held == statement || held.supersedes(statement)));
            }
        }
    }

    #[test]
    fn what_is_taken_back_is_taken_back_wherever_it_is_heard_of_late() {
        let said: Statement = serde_json::from_value(serde_json::json!({
            "subject": "workload:web", "kind": "risk", "value": "80", "source": "operator:alice",
            "issued_at_ms": 10, "expires_at_ms": 100,
        }))
        .unwrap();
        let (stated, cleared) = (Signal::Stated(said.clone()), Signal::Stated(said.clearing(5)));
        let web = said.subject.clone();
        let mut late = Signals::default();
        late.welcome(SignalSeq(2), [cleared.clone()]);
        late.extend(SignalSeq(0), SignalSeq(1), [stated.clone()]).unwrap();
        assert_eq!(late.risk(&web, 20), 0, "the clock of whoever took it back was behind");
        late.forget_ended(100);
        assert!(late.has_statements(), "it is known for as long as the other one holds anywhere");
        let mut away = Signals::default();
        away.welcome(SignalSeq(1), [stated]);
        assert_eq!(away.risk(&web, 20), 80);
        away.welcome(SignalSeq(1), []);
        assert_eq!(away.risk(&web, 20), 80, "a control plane that was restored takes nothing back");
        away.welcome(SignalSeq(2), [cleared]);
        assert_eq!(away.risk(&web, 20), 0);
        away.forget_ended(101);
        assert!(away.is_empty());
    }

    #[test]
    fn what_is_no_statement_is_refused() {
        let good = serde_json::json!({
            "subject": "host:vm", "kind": "risk", "value": "80", "half_life_ms": 60_000, "source": "operator:alice",
            "issued_at_ms": 10, "expires_at_ms": 100,
        });
        let read = |given: &serde_json::Value| serde_json::from_value::<Statement>(given.clone());
        assert_eq!(serde_json::to_value(read(&good).unwrap()).unwrap(), good);
        for (member, wrong) in [
            ("subject", "vm".into()),
            ("subject", "device:x".into()),
            ("subject", "host:".into()),
            ("kind", "mood".into()),
            ("kind", "posture".into()),
            ("value", "101".into()),
            ("value", "+8".into()),
            ("value", "".into()),
            ("value", "-1".into()),
            ("value", "compliant".into()),
            ("half_life_ms", serde_json::json!(59_999)),
            ("source", "".into()),
            ("source", "Alice".into()),
            ("source", "x".repeat(161).into()),
        ] {
            let mut given = good.clone();
            given[member] = wrong;
            assert!(read(&given).is_err(), "{given}");
        }
    }
}
