//! The newest access token of each family that was shown to this proxy. Its holder shows none that is older once it has a newer one:
//! whoever does, for longer than two may be on their way at the same time, has a copy of what the holder had before.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use countersign_core::token::{Claims, TokenId};
use parking_lot::Mutex;

/// How much older than the newest one a token may be: longer than a request is on its way, and than the clocks of control planes differ.
pub(crate) const GRACE_MS: u64 = 60_000;
/// Families that are remembered at most; those that were renewed last, when there are more.
const FAMILIES_MAX: usize = 16_384;

/// All families that are remembered.
#[derive(Default)]
pub(crate) struct Families(Mutex<HashMap<TokenId, Arc<Newest>>>);

/// When the newest token of one family was issued, in milliseconds since 1970.
#[derive(Debug, Default)]
pub(crate) struct Newest(AtomicU64);

impl Families {
    /// The family of a token that was verified.
    pub(crate) fn of(&self, claims: &Claims) -> Arc<Newest> {
        let mut families = self.0.lock();
        if families.len() >= FAMILIES_MAX && !families.contains_key(&claims.family) {
            let mut newest: Vec<u64> = families.values().map(|newest| newest.0.load(Ordering::Relaxed)).collect();
            let (_, median, _) = newest.select_nth_unstable(FAMILIES_MAX / 2);
            let median = *median;
            families.retain(|_, newest| newest.0.load(Ordering::Relaxed) > median);
        }
        let newest = families.entry(claims.family).or_default().clone();
        newest.0.fetch_max(claims.id.issued_at_ms(), Ordering::Relaxed);
        newest
    }
}

impl Newest {
    /// Whether one that its holder has long replaced is this token.
    pub(crate) fn has_superseded(&self, claims: &Claims) -> bool {
        claims.id.issued_at_ms().saturating_add(GRACE_MS) < self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(family_ms: u64, issued_ms: u64) -> Claims {
        let id = |ms| TokenId::new(ms, [7; 10]);
        let of = |path: &str| format!("spiffe://shop.example/{path}");
        serde_json::from_value(serde_json::json!({
            "iss": "x", "sub": of("web"), "aud": of("orders"), "client_id": of("web"), "iat": 0, "exp": 1,
            "jti": id(issued_ms), "scope": "", "cnf": { "x5t#S256": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA" },
            "instance": "web/1", "family": id(family_ms),
        }))
        .unwrap()
    }

    #[test]
    fn a_token_that_its_holder_replaced_long_ago_is_known_and_one_of_another_family_is_not_touched() {
        let families = Families::default();
        let (old, next, other) = (claims(1, 1), claims(1, 2 + GRACE_MS), claims(5, 5));
        let known = families.of(&old);
        assert!(!known.has_superseded(&old), "it is the newest");
        let late = claims(1, 1 + GRACE_MS);
        families.of(&late);
        assert!(!known.has_superseded(&old), "both may be on their way");
        families.of(&next);
        assert!(known.has_superseded(&old) && !known.has_superseded(&late) && !known.has_superseded(&next));
        assert!(!families.of(&other).has_superseded(&other));
    }

    #[test]
    fn of_too_many_families_those_that_were_renewed_last_are_remembered() {
        let families = Families::default();
        for n in 0..=FAMILIES_MAX as u64 {
            families.of(&claims(n, n + 1));
        }
        let held = families.0.lock();
        assert!(held.len() < FAMILIES_MAX);
        assert!(held.contains_key(&TokenId::new(FAMILIES_MAX as u64, [7; 10])));
        assert!(!held.contains_key(&TokenId::new(0, [7; 10])));
    }
}
