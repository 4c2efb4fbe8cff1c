//! Who is denied in many ways: a workload that asks, within minutes, for many things that it may not is somebody who tries doors. One
//! that asks for the same again and again is misconfigured, and is not meant.
//!
//! What is remembered is bounded, and raises a risk; nothing is denied here.

use std::collections::{HashMap, HashSet};

use countersign_core::{
    identity::{ServiceName, TrustDomain},
    record::{DecisionRecord, Outcome},
};
use parking_lot::Mutex;

/// Ways in which one workload is denied within [`WITHIN_MS`] before it is noticed.
pub const WAYS_MAX: usize = 20;
/// The span in which they are counted.
pub const WITHIN_MS: u64 = 10 * 60_000;
/// Workloads that are watched at most; with more, those that were denied first are forgotten.
const WORKLOADS_MAX: usize = 10_000;

/// What every workload was denied lately.
#[derive(Default)]
pub struct Denials {
    by_workload: Mutex<HashMap<ServiceName, Denied>>,
}

/// In which ways one was denied since when.
struct Denied {
    since_ms: u64,
    ways: HashSet<(ServiceName, String)>,
}

impl Denials {
    /// Takes denials in, and names the workloads of `own` that were denied in too many ways, each once for that many.
    pub fn take(&self, records: &[DecisionRecord], own: &TrustDomain, now_ms: u64) -> Vec<ServiceName> {
        let mut by_workload = self.by_workload.lock();
        let mut noticed = Vec::new();
        for record in records.iter().filter(|record| record.outcome == Outcome::Deny) {
            let principal = &record.inputs.principal;
            let Some(workload) = principal.service().filter(|_| principal.trust_domain() == own.as_str()) else {
                continue;
            };
            if by_workload.len() >= WORKLOADS_MAX && !by_workload.contains_key(&workload) {
                make_room(&mut by_workload, now_ms);
            }
            let fresh = || Denied { since_ms: now_ms, ways: HashSet::new() };
            let denied = by_workload.entry(workload.clone()).or_insert_with(fresh);
            if now_ms.saturating_sub(denied.since_ms) > WITHIN_MS {
                *denied = fresh();
            }
            denied.ways.insert((record.inputs.service.clone(), record.way()));
            if denied.ways.len() >= WAYS_MAX {
                by_workload.remove(&workload);
                noticed.push(workload);
            }
        }
        noticed
    }
}

fn make_room(by_workload: &mut HashMap<ServiceName, Denied>, now_ms: u64) {
    by_workload.retain(|_, denied| now_ms.saturating_sub(denied.since_ms) <= WITHIN_MS);
    if by_workload.len() >= WORKLOADS_MAX
        && let Some(first) = by_workload.iter().min_by_key(|(_, denied)| denied.since_ms).map(|(name, _)| name.clone())
    {
        by_workload.remove(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(principal: &str, path: &str, outcome: &str) -> DecisionRecord {
        serde_json::from_value(serde_json::json!({
            "id": "0197", "at_ms": 1, "instance": "orders/1", "revision": 1, "signal_seq": 0, "outcome": outcome,
            "reason": "no_policy_permits", "policies": [], "judged": "at_start", "ended": null, "trace_id": null, "judge_ns": 1,
            "inputs": {
                "principal": principal, "action": "http:GET", "service": "orders", "path": path, "host": "orders.mesh",
                "method": "GET", "protocol": "http", "size": null, "origin": "10.0.0.9", "now": 1, "first_contact": false,
            },
        }))
        .unwrap()
    }

    #[test]
    fn who_tries_many_doors_in_minutes_is_noticed_and_who_tries_one_for_ever_is_not() {
        let own = TrustDomain::parse("shop.example").unwrap();
        let denials = Denials::default();
        let many = |principal: &str, from: usize, count: usize, outcome: &str| -> Vec<DecisionRecord> {
            (from..from + count).map(|door| denial(principal, &format!("/door-{}", letters(door)), outcome)).collect()
        };
        let web = "spiffe://shop.example/web";
        let take = |records: &[DecisionRecord], now_ms| {
            denials.take(records, &own, now_ms).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(take(&many(web, 0, 100, "permit"), 0), none, "what is permitted is no sign");
        assert_eq!(take(&many("spiffe://evil.example/web", 0, 100, "deny"), 0), none, "another's web is none of ours");
        for _ in 0..1_000 {
            assert_eq!(take(&many(web, 0, 1, "deny"), 0), none);
        }
        assert_eq!(take(&many(web, 0, WAYS_MAX - 1, "deny"), 1), none);
        assert_eq!(take(&many(web, 50, WAYS_MAX - 1, "deny"), WITHIN_MS + 2), none, "the first ones are long ago");
        assert_eq!(take(&many(web, 90, 1, "deny"), WITHIN_MS + 3), ["web"]);
        assert_eq!(take(&many(web, 90, WAYS_MAX - 1, "deny"), WITHIN_MS + 3), none, "it is counted anew");
    }

    /// Numbers are one class of paths.
    fn letters(number: usize) -> String {
        [number / 26, number % 26].map(|digit| char::from(b'a' + digit as u8)).iter().collect()
    }

    #[test]
    fn strangers_without_number_push_out_nobody_who_was_denied_just_now() {
        let own = TrustDomain::parse("shop.example").unwrap();
        let denials = Denials::default();
        for number in 0..WORKLOADS_MAX + 10 {
            let record = denial(&format!("spiffe://shop.example/w{number}"), "/", "deny");
            denials.take(&[record], &own, number as u64);
        }
        let held = denials.by_workload.lock();
        assert_eq!(held.len(), WORKLOADS_MAX);
        assert!(!held.keys().any(|name| name.as_str() == "w0"), "who was denied first made room");
    }
}
