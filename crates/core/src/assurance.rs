//! What an operator has proven of themselves: with which factors, how strongly, how long ago.
//!
//! The change gate reads it, and an [`Obligation`] is met or not met by it. No ceremony is held here;
//! [`authenticators`] says which may be enrolled, [`webauthn`] verifies what an authenticator signed, [`challenge`] says what it is to sign, [`totp`] checks a code.

pub mod authenticators;
pub mod challenge;
pub mod totp;
pub mod webauthn;

use serde::{Deserialize, Serialize};

use crate::policy::{Factor, Obligation};

/// What a factor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FactorKind {
    /// A WebAuthn authenticator that is part of the device: a passkey.
    Platform,
    /// A WebAuthn authenticator that moves between devices: a security key.
    Roaming,
    /// Codes that follow the clock (RFC 6238).
    Totp,
    /// A code that works once, for the day the others are lost.
    Recovery,
}

/// One factor that was shown and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Which kind.
    pub kind: FactorKind,
    /// When, in seconds since 1970.
    pub at_seconds: i64,
    /// Whether the authenticator made sure who holds it: by a PIN or a fingerprint.
    pub user_verified: bool,
    /// Whether its key can never leave the authenticator.
    pub device_bound: bool,
}

/// Everything that an operator has proven in one session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Assurance {
    proofs: Vec<Proof>,
}

impl FactorKind {
    /// The kind as the ledger, the gate and the command line spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Roaming => "roaming",
            Self::Totp => "totp",
            Self::Recovery => "recovery",
        }
    }

    /// Parses a kind.
    pub fn parse(given: &str) -> Option<Self> {
        [Self::Platform, Self::Roaming, Self::Totp, Self::Recovery].into_iter().find(|kind| kind.as_str() == given)
    }

    /// Whether it is a WebAuthn authenticator: it signs, and only for the origin it was enrolled at. Nothing else resists
    /// phishing, and nothing else can countersign.
    pub fn is_webauthn(self) -> bool {
        matches!(self, Self::Platform | Self::Roaming)
    }
}

impl Proof {
    /// What a verified assertion proves.
    pub fn of_assertion(kind: FactorKind, assertion: &webauthn::VerifiedAssertion, at_seconds: i64) -> Self {
        Self { kind, at_seconds, user_verified: true, device_bound: !assertion.backup_eligible() }
    }

    /// What a verified TOTP or recovery code proves.
    pub fn of_code(kind: FactorKind, at_seconds: i64) -> Self {
        Self { kind, at_seconds, user_verified: false, device_bound: false }
    }

    /// How strong it is. A TOTP code is taken only within a session, which is a factor already: with it there are two. A recovery
    /// code opens the way to a new factor and to nothing else.
    pub fn strength(&self) -> Option<Factor> {
        match self.kind {
            FactorKind::Recovery => None,
            FactorKind::Totp => Some(Factor::Mfa),
            FactorKind::Platform | FactorKind::Roaming if !self.user_verified => None,
            FactorKind::Platform | FactorKind::Roaming if self.device_bound => Some(Factor::Phrh),
            FactorKind::Platform | FactorKind::Roaming => Some(Factor::Phr),
        }
    }
}

impl Assurance {
    /// Adds what was proven.
    pub fn add(&mut self, proof: Proof) {
        self.proofs.push(proof);
    }

    /// Everything proven, in its order.
    pub fn proofs(&self) -> &[Proof] {
        &self.proofs
    }

    /// The strongest proof that is at most `max_age_seconds` old.
    pub fn strongest(&self, now_seconds: i64, max_age_seconds: Option<u64>) -> Option<Factor> {
        self.fresh(now_seconds, max_age_seconds).filter_map(Proof::strength).max()
    }

    /// Whether it is strong and fresh enough, by one and the same proof. A proof from the future is none: a clock is wrong.
    pub fn meets(&self, obligation: &Obligation, now_seconds: i64) -> bool {
        let strongest = self.strongest(now_seconds, obligation.max_age_seconds);
        strongest.is_some_and(|held| obligation.factor.is_none_or(|asked| held >= asked))
    }

    fn fresh(&self, now_seconds: i64, max_age_seconds: Option<u64>) -> impl Iterator<Item = &Proof> {
        self.proofs.iter().filter(move |proof| {
            let age = now_seconds.checked_sub(proof.at_seconds).and_then(|age| u64::try_from(age).ok());
            age.is_some_and(|age| max_age_seconds.is_none_or(|max| age <= max))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_obligation_is_met_by_one_proof_that_is_both_strong_and_fresh() {
        let key = |at_seconds, device_bound| Proof {
            kind: FactorKind::Roaming,
            at_seconds,
            user_verified: true,
            device_bound,
        };
        let touched = Proof { user_verified: false, ..key(100, true) };
        let asked = |factor, max_age_seconds| Obligation { factor, max_age_seconds };
        let code = Proof::of_code(FactorKind::Totp, 100);
        for (case, proofs, asked, now, expected) in [
            ("nothing", &[][..], asked(None, None), 100, false),
            ("anything", &[code], asked(None, None), 100, true),
            ("a code where two factors are asked", &[code], asked(Some(Factor::Mfa), None), 100, true),
            ("a code where phishing must fail", &[code], asked(Some(Factor::Phr), None), 100, false),
            ("a recovery code", &[Proof::of_code(FactorKind::Recovery, 100)], asked(None, None), 100, false),
            ("a touch without a PIN", &[touched], asked(Some(Factor::Mfa), None), 100, false),
            ("a synced passkey", &[key(100, false)], asked(Some(Factor::Phr), None), 100, true),
            (
                "a synced passkey where hardware is asked",
                &[key(100, false)],
                asked(Some(Factor::Phrh), None),
                100,
                false,
            ),
            ("a security key", &[key(100, true)], asked(Some(Factor::Phrh), None), 100, true),
            ("just fresh enough", &[key(100, true)], asked(Some(Factor::Phr), Some(300)), 400, true),
            ("a second too old", &[key(100, true)], asked(Some(Factor::Phr), Some(300)), 401, false),
            ("strong but old, fresh but weak", &[key(0, true), code], asked(Some(Factor::Phr), Some(300)), 400, false),
            ("from the future", &[key(101, true)], asked(None, Some(300)), 100, false),
            ("before all time", &[key(i64::MIN, true)], asked(None, Some(300)), i64::MAX, false),
        ] {
            let mut assurance = Assurance::default();
            proofs.iter().for_each(|proof| assurance.add(*proof));
            assert_eq!(assurance.meets(&asked, now), expected, "{case}");
        }
    }

    #[test]
    fn a_kind_has_one_spelling() {
        for kind in [FactorKind::Platform, FactorKind::Roaming, FactorKind::Totp, FactorKind::Recovery] {
            assert_eq!(FactorKind::parse(kind.as_str()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert_eq!(FactorKind::parse("sms"), None);
    }
}
