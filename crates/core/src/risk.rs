//! What the statements about a subject come to at one moment: its risk from 0 to 100, and the posture of its host.
//!
//! Each source that says something of a subject's risk counts with what it said, which falls by half in each half-life, if it has
//! one. Together they come to what is left when each takes its share of what the others leave:
//!
//! ```text
//! risk = 100 · (1 − Π (1 − rᵢ/100)),   rᵢ = sᵢ · 2^(−ageᵢ / half-lifeᵢ)
//! ```
//!
//! So one source that says 80 makes 80, two that say 50 make 75, and nothing makes more than 100. A half-life falls in 64 steps, of which
//! each has its moment: between two of them nothing changes by itself, and every host comes to the same number. Of a caller, the
//! highest of its service, its instance, its host and the token that it shows counts; of a posture, the worst that any source says.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::signal::{
    Signals,
    statement::{RISK_MAX, Said, Score, Source, Statement, Subject},
};

/// Steps in which a risk falls by half.
const STEPS: u64 = 64;
/// One, as a share of something.
const ONE: u64 = 1 << 32;
/// 2^(−1/64), as a share.
const STEP: u64 = 4_248_701_965;

/// In which condition a caller is, as signals say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Condition {
    /// 0 to 100; 0 also where nobody says anything.
    pub risk: u8,
    /// Of its host.
    #[serde(default, skip_serializing_if = "Posture::is_unknown")]
    pub posture: Posture,
    /// Whether it, or whom it asks, is contained: then nothing is permitted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contained: bool,
}

/// What is known of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Posture {
    /// Whether it is as it should be; `None`: nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compliant: Option<bool>,
    /// Whether it is managed; `None`: nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<bool>,
}

/// Why a subject's risk is what it is, in a sentence with numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// Of whom.
    pub subject: Subject,
    /// What it comes to.
    pub risk: u8,
    /// What each source counts for, the most first.
    pub parts: Vec<Part>,
}

/// What one source counts for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Who says it.
    pub source: Source,
    /// What it said.
    pub said: Score,
    /// How long ago, in milliseconds.
    pub age_ms: u64,
    /// What is left of it.
    pub counts: u8,
}

impl Signals {
    /// The condition of a caller that is all of `subjects`.
    pub fn condition<'a>(&self, subjects: impl IntoIterator<Item = &'a Subject>, now_ms: u64) -> Condition {
        let mut condition = Condition::default();
        if !self.has_statements() {
            return condition;
        }
        for subject in subjects {
            condition.risk = condition.risk.max(self.risk(subject, now_ms));
            for statement in self.about(subject).filter(|statement| statement.holds(now_ms)) {
                let worst = |held: &mut Option<bool>, said| *held = Some(held.unwrap_or(true) && said);
                match statement.said {
                    Said::Compliant(said) => worst(&mut condition.posture.compliant, said),
                    Said::Managed(said) => worst(&mut condition.posture.managed, said),
                    Said::Contained => condition.contained = true,
                    Said::Risk(_) | Said::Cleared(_) => {}
                }
            }
        }
        condition
    }

    /// When that condition may next change by itself, in milliseconds since 1970.
    ///
    /// INVARIANT (condition-holds-until): until then it does not, unless a signal comes.
    pub fn next_change<'a>(&self, subjects: impl IntoIterator<Item = &'a Subject>, now_ms: u64) -> Option<u64> {
        let statements = subjects.into_iter().flat_map(|subject| self.about(subject));
        let next = |statement: &Statement| {
            let falls_at_ms = match statement.said {
                Said::Risk(score) => score.falls_at_ms(statement.issued_at_ms, now_ms),
                Said::Compliant(_) | Said::Managed(_) | Said::Contained | Said::Cleared(_) => None,
            };
            falls_at_ms.map_or(statement.expires_at_ms, |falls| falls.min(statement.expires_at_ms))
        };
        statements.filter(|statement| statement.holds(now_ms)).map(next).min()
    }

    /// The risk of one subject.
    pub fn risk(&self, subject: &Subject, now_ms: u64) -> u8 {
        let rest = self.scores(subject, now_ms).fold(ONE, |rest, (_, share)| times(rest, ONE - share));
        percent(ONE - rest)
    }

    /// Why the risk of a subject is what it is.
    pub fn explain_risk(&self, subject: &Subject, now_ms: u64) -> Explained {
        let part = |(statement, share): (&Statement, u64)| {
            let Said::Risk(said) = statement.said else { return None };
            let age_ms = now_ms.saturating_sub(statement.issued_at_ms);
            Some(Part { source: statement.source.clone(), said, age_ms, counts: percent(share) })
        };
        let mut parts: Vec<Part> = self.scores(subject, now_ms).filter_map(part).collect();
        parts.sort_by_key(|part| std::cmp::Reverse(part.counts));
        Explained { subject: subject.clone(), risk: self.risk(subject, now_ms), parts }
    }

    /// What each source says of a subject's risk, with the share that is left of it.
    fn scores(&self, subject: &Subject, now_ms: u64) -> impl Iterator<Item = (&Statement, u64)> {
        let held = self.about(subject).filter(move |statement| statement.holds(now_ms));
        held.filter_map(move |statement| match statement.said {
            Said::Risk(score) => Some((statement, score.share(now_ms.saturating_sub(statement.issued_at_ms)))),
            Said::Compliant(_) | Said::Managed(_) | Said::Contained | Said::Cleared(_) => None,
        })
    }

    /// Whether any of `subjects` is contained.
    pub fn is_contained<'a>(&self, subjects: impl IntoIterator<Item = &'a Subject>, now_ms: u64) -> bool {
        let mut said = subjects.into_iter().flat_map(|subject| self.about(subject));
        said.any(|statement| statement.said == Said::Contained && statement.holds(now_ms))
    }
}

/// `held` and `more` together, as two sources that say so.
pub fn together(held: u8, more: u8) -> u8 {
    let share = |score: u8| u64::from(score.min(RISK_MAX)) * ONE / 100;
    percent(ONE - times(ONE - share(held), ONE - share(more)))
}

impl Score {
    /// What is left of it after `age_ms`, as a share of [`ONE`].
    fn share(self, age_ms: u64) -> u64 {
        let whole = u64::from(self.value.min(RISK_MAX)) * ONE / 100;
        let Some(half_life_ms) = self.half_life_ms else { return whole };
        let steps = steps(age_ms, half_life_ms);
        let (halves, of_half) = (steps / STEPS, steps % STEPS);
        let fallen = (0..of_half).fold(whole, |share, _| times(share, STEP));
        u32::try_from(halves).ok().and_then(|halves| fallen.checked_shr(halves)).unwrap_or(0)
    }

    /// When it next falls by a step.
    fn falls_at_ms(self, issued_at_ms: u64, now_ms: u64) -> Option<u64> {
        let half_life_ms = self.half_life_ms?;
        let next = steps(now_ms.saturating_sub(issued_at_ms), half_life_ms) + 1;
        let after_ms = (u128::from(next) * u128::from(half_life_ms)).div_ceil(u128::from(STEPS));
        Some(issued_at_ms.saturating_add(u64::try_from(after_ms).unwrap_or(u64::MAX)))
    }
}

fn steps(age_ms: u64, half_life_ms: u64) -> u64 {
    let steps = u128::from(age_ms) * u128::from(STEPS) / u128::from(half_life_ms.max(1));
    u64::try_from(steps).unwrap_or(u64::MAX - 1)
}

/// A share of a share.
fn times(one: u64, other: u64) -> u64 {
    ((u128::from(one) * u128::from(other)) >> 32) as u64
}

/// A share in whole hundredths, rounded to the nearest.
fn percent(share: u64) -> u8 {
    u8::try_from((share * 100 + ONE / 2) >> 32).unwrap_or(RISK_MAX).min(RISK_MAX)
}

impl Condition {
    /// Whether it is that of a caller of whom nobody says anything.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

impl Posture {
    /// Whether nobody says anything.
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the risk of {} is {}", self.subject, self.risk)?;
        for (at, part) in self.parts.iter().enumerate() {
            let before = if at == 0 { ": " } else { "; " };
            write!(f, "{before}{} said {} {} ago", part.source, part.said.value, span(part.age_ms))?;
            if let Some(half_life_ms) = part.said.half_life_ms {
                write!(f, ", which falls by half every {} and counts for {} now", span(half_life_ms), part.counts)?;
            }
        }
        match self.parts.len() {
            0 => write!(f, ": no signal that holds says anything of it"),
            1 => Ok(()),
            _ => {
                let factors: Vec<String> = self.parts.iter().map(|p| format!("(1 − {}/100)", p.counts)).collect();
                write!(f, "; together 100 · (1 − {}) = {}", factors.join(" · "), self.risk)
            }
        }
    }
}

/// A time in its two largest units.
fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let from = parts.iter().position(|(count, _)| *count > 0).unwrap_or(3);
    let shown = parts[from..].iter().take(2).filter(|(count, _)| *count > 0);
    let text: String = shown.map(|(count, unit)| format!("{count}{unit}")).collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;
    use crate::signal::{Signal, SignalSeq};

    const MINUTE: u64 = 60_000;

    fn risk(subject: &str, source: &str, value: u8, half_life_ms: Option<u64>, at: u64, until: u64) -> Statement {
        Statement {
            subject: subject.parse().unwrap(),
            source: Source::parse(source).unwrap(),
            said: Said::Risk(Score { value, half_life_ms }),
            issued_at_ms: at,
            expires_at_ms: until,
        }
    }

    fn held(statements: impl IntoIterator<Item = Statement>) -> Signals {
        let mut signals = Signals::default();
        signals.welcome(SignalSeq(1), statements.into_iter().map(Signal::Stated));
        signals
    }

    fn subject(given: &str) -> Subject {
        given.parse().unwrap()
    }

    #[test]
    fn what_sources_say_adds_up_to_less_than_all_of_it_and_falls_by_half() {
        let hour = 60 * MINUTE;
        for (case, said, now, expected) in [
            ("nobody says anything", &[][..], 0, 0),
            ("one", &[(80, None)], 0, 80),
            ("one that falls, at once", &[(80, Some(hour))], 0, 80),
            ("after one half-life", &[(80, Some(hour))], hour, 40),
            ("after a half of one", &[(80, Some(hour))], hour / 2, 57),
            ("after three", &[(80, Some(hour))], 3 * hour, 10),
            ("long after", &[(100, Some(hour))], 9 * hour, 0),
            ("two", &[(50, None), (50, None)], 0, 75),
            ("certainty", &[(100, None), (3, None)], 0, 100),
            ("nothing adds nothing", &[(0, None), (30, None)], 0, 30),
            ("many", &[(20, None); 8], 0, 83),
            ("at its end", &[(80, None)], 10 * hour, 0),
        ] {
            let of = |(at, (value, half_life)): (usize, &(u8, Option<u64>))| {
                risk("workload:web", &format!("s{at}"), *value, *half_life, 0, 10 * hour)
            };
            let signals = held(said.iter().enumerate().map(of));
            assert_eq!(signals.risk(&subject("workload:web"), now), expected, "{case}");
            assert_eq!(signals.risk(&subject("workload:cron"), now), 0, "{case}: of another");
        }
        for (held, more, expected) in [(0, 20, 20), (20, 20, 36), (90, 20, 92), (100, 20, 100), (255, 0, 100)] {
            assert_eq!(together(held, more), expected);
        }
    }

    #[test]
    fn of_a_caller_the_worst_of_what_it_is_counts() {
        let posture = |source: &str, said| Statement { said, ..risk("host:vm", source, 0, None, 0, 100) };
        let signals = held([
            risk("workload:web", "a", 10, None, 0, 100),
            risk("instance:web/1", "a", 30, None, 0, 100),
            risk("host:vm", "a", 20, None, 0, 50),
            posture("a", Said::Compliant(true)),
            posture("b", Said::Compliant(false)),
            posture("a", Said::Managed(true)),
        ]);
        let all = ["workload:web", "instance:web/1", "host:vm"].map(subject);
        let now = |of: &[Subject], now_ms| {
            let Condition { risk, posture, .. } = signals.condition(of, now_ms);
            (risk, posture.compliant, posture.managed)
        };
        assert_eq!(now(&all, 0), (30, Some(false), Some(true)));
        assert_eq!(now(&all[..1], 0), (10, None, None), "of another host");
        assert_eq!(now(&all[2..], 49), (20, Some(false), Some(true)));
        assert_eq!(now(&all[2..], 50), (0, Some(false), Some(true)), "one has ended");
        assert_eq!(signals.next_change(&all, 0), Some(50));
        assert_eq!(signals.next_change(&all, 50), Some(100));
        assert_eq!(signals.next_change(&all, 100), None);
        assert!(signals.condition(&all, 100) == Condition::default());
    }

    #[test]
    fn a_risk_explains_itself_with_numbers() {
        let hour = 60 * MINUTE;
        let signals = held([
            risk("workload:web", "countersign/theft", 80, Some(hour), 0, 10 * hour),
            risk("workload:web", "operator:alice", 20, None, hour, 10 * hour),
        ]);
        let now = hour + 90_000;
        expect![[r#"the risk of workload:web is 52: countersign/theft said 80 1h1m ago, which falls by half every 1h and counts for 40 now; operator:alice said 20 1m30s ago; together 100 · (1 − (1 − 40/100) · (1 − 20/100)) = 52"#]]
            .assert_eq(&signals.explain_risk(&subject("workload:web"), now).to_string());
        expect![[r#"the risk of host:vm is 0: no signal that holds says anything of it"#]]
            .assert_eq(&signals.explain_risk(&subject("host:vm"), now).to_string());
    }

    proptest! {
        /// PROVES (condition-holds-until)
        #[test]
        fn a_condition_does_not_change_before_it_is_said_to_and_a_risk_only_falls(
            said in prop::collection::vec((0u8..=100, prop::option::of(1u64..40), 0u64..60, 1u64..120), 1..5),
            from in 0u64..200,
            at in 0u64..=100,
        ) {
            let of = |(at, (value, half_life, begun, lives)): (usize, &(u8, Option<u64>, u64, u64))| {
                let begun = begun * MINUTE;
                risk("host:vm", &format!("s{at}"), *value, half_life.map(|m| m * MINUTE), begun, begun + lives * MINUTE)
            };
            let signals = held(said.iter().enumerate().map(of));
            let vm = [subject("host:vm")];
            let now = from * MINUTE;
            let next = signals.next_change(&vm, now).unwrap_or(now + 500 * MINUTE);
            prop_assert!(next > now);
            let between = now + (next - 1 - now) * at / 100;
            prop_assert_eq!(signals.condition(&vm, between), signals.condition(&vm, now));
            prop_assert!(signals.condition(&vm, next).risk <= signals.condition(&vm, now).risk);
        }

        #[test]
        fn a_share_is_what_the_formula_says(value in 0u8..=100, half_life in 60_000u64..100_000_000, age in 0u64..500_000_000) {
            let score = Score { value, half_life_ms: Some(half_life) };
            let steps = (age as u128 * 64 / half_life as u128) as f64;
            let exact = f64::from(value) / 100.0 * 2f64.powf(-steps / 64.0);
            let got = score.share(age) as f64 / ONE as f64;
            prop_assert!((got - exact).abs() < 1e-6, "{got} {exact}");
        }
    }
}
