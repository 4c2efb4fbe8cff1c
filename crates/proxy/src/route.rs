//! Which way a request takes: the first traffic rule that matches it, and the service that the rule's weights pick. The
//! service picked here is the one whose sidecar judges.
//!
//! Limits are held twice. The caller's own sidecar holds its instance to them, before anything is sent. The callee's sidecar
//! holds a caller to them, by the SPIFFE ID that it proved: all its instances together, whatever their sidecars let through.
//! The counters of both are shared by the workers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use countersign_core::{
    change::RouteName,
    identity::{ServiceName, SpiffeId},
    route::{Limit, Retry, Route},
    view::ViewRoute,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

/// Callers that one rule tells apart where they arrive.
const CALLERS_MAX: usize = 4096;
/// Requests that their sidecar let through one after the other may arrive at once: so much time may lie between the two.
const BUNCHED_NS: u64 = 100_000_000;

/// The rules of one service, by ascending rank.
pub(crate) struct Routes(Vec<Arc<Rule>>);

/// One rule, ready to match.
pub(crate) struct Rule {
    pub(crate) name: RouteName,
    path: Option<String>,
    path_prefix: Option<String>,
    methods: Vec<Method>,
    headers: Vec<(HeaderName, HeaderValue)>,
    split: Vec<(ServiceName, u32)>,
    split_sum: u32,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: Option<Retry>,
    pub(crate) limits: Option<Limits>,
}

/// What one caller may take of a rule.
pub(crate) struct Limits {
    of: Limit,
    counted: Arc<Counted>, // outlives a change of the rule
}

#[derive(Default)]
struct Counted {
    own: Arc<Meter>,                                   // of our workload, where it calls
    by_caller: Mutex<FxHashMap<SpiffeId, Arc<Meter>>>, // where it is called; held for a look-up
}

#[derive(Default)]
struct Meter {
    emptied_at_ns: AtomicU64, // the theoretical arrival time of the generic cell rate algorithm
    open: AtomicU32,
}

/// One place under a concurrency limit, given back on drop.
pub(crate) struct Place(Arc<Meter>);

/// Which limit said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limited {
    Rate,
    Concurrency,
}

impl Routes {
    pub(crate) fn new(routes: &[ViewRoute], before: Option<&Self>) -> Self {
        Self(
            routes
                .iter()
                .map(|route| {
                    let before = before.and_then(|b| b.0.iter().find(|rule| rule.name == route.name));
                    Arc::new(Rule::new(route.name.clone(), &route.route, before))
                })
                .collect(),
        )
    }

    /// The first rule that matches.
    pub(crate) fn find(&self, method: &Method, path: &str, headers: &HeaderMap) -> Option<&Arc<Rule>> {
        self.0.iter().find(|rule| rule.matches(method, path, headers))
    }
}

impl Rule {
    fn new(name: RouteName, route: &Route, before: Option<&Arc<Self>>) -> Self {
        let headers = route.matches.headers.iter().map(|(n, v)| Some((n.parse().ok()?, v.parse().ok()?)));
        Self {
            name,
            path: route.matches.path.clone(),
            path_prefix: route.matches.path_prefix.as_ref().map(|prefix| prefix.trim_end_matches('/').to_owned()),
            methods: route.matches.methods.iter().filter_map(|method| method.parse().ok()).collect(),
            headers: headers.flatten().collect(),
            split: route.split.iter().map(|(service, weight)| (service.clone(), *weight)).collect(),
            split_sum: route.split.values().sum(),
            timeout: route.timeout_ms.map(Duration::from_millis),
            retry: route.retry.clone(),
            limits: route.limit.as_ref().map(|limit| Limits::new(limit, before.and_then(|b| b.limits.as_ref()))),
        }
    }

    fn matches(&self, method: &Method, path: &str, headers: &HeaderMap) -> bool {
        self.path.as_ref().is_none_or(|wanted| wanted == path)
            && self.path_prefix.as_ref().is_none_or(|prefix| {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
            && (self.methods.is_empty() || self.methods.contains(method))
            && self.headers.iter().all(|(name, value)| headers.get(name) == Some(value))
    }

    /// The service this request goes to, of which there are as many as the rule has weights; `None`: the one it named.
    pub(crate) fn pick(&self, chance: u32) -> Option<&ServiceName> {
        let mut at = chance.checked_rem(self.split_sum)?;
        self.split.iter().find_map(|(service, weight)| match at.checked_sub(*weight) {
            Some(rest) => {
                at = rest;
                None
            }
            None => Some(service),
        })
    }

    /// Takes a place under the limits for our own workload, or says which one is full. `now_ns` is on any steady clock.
    pub(crate) fn enter(&self, now_ns: u64) -> Result<Option<Place>, Limited> {
        let Some(limits) = &self.limits else { return Ok(None) };
        limits.enter(&limits.counted.own, 0, now_ns)
    }

    /// As [`Self::enter`], for a `caller` of our workload.
    pub(crate) fn enter_as(&self, caller: &SpiffeId, now_ns: u64) -> Result<Option<Place>, Limited> {
        let Some(limits) = &self.limits else { return Ok(None) };
        let meter = limits.counted.of_caller(caller, now_ns).ok_or(Limited::Rate)?;
        limits.enter(&meter, BUNCHED_NS, now_ns)
    }
}

impl Limits {
    fn new(of: &Limit, before: Option<&Self>) -> Self {
        Self { of: of.clone(), counted: before.map(|b| b.counted.clone()).unwrap_or_default() }
    }

    fn enter(&self, meter: &Arc<Meter>, slack_ns: u64, now_ns: u64) -> Result<Option<Place>, Limited> {
        let place = match self.of.concurrent_max {
            Some(most) => {
                let place = Place::new(meter);
                if meter.open.load(Relaxed) > most {
                    return Err(Limited::Concurrency);
                }
                Some(place)
            }
            None => None,
        };
        if self.take(meter, slack_ns, now_ns) { Ok(place) } else { Err(Limited::Rate) }
    }

    // The generic cell rate algorithm: one number says how far ahead of the sustained rate the caller is.
    fn take(&self, meter: &Meter, slack_ns: u64, now_ns: u64) -> bool {
        let Some(rate) = self.of.rate_per_second else { return true };
        let interval = 1_000_000_000 / u64::from(rate.max(1));
        let tolerance = interval * u64::from(self.of.burst.unwrap_or(0)) + slack_ns;
        meter
            .emptied_at_ns
            .fetch_update(Relaxed, Relaxed, |at| {
                let at = at.max(now_ns);
                (at - now_ns <= tolerance).then_some(at + interval)
            })
            .is_ok()
    }
}

impl Counted {
    /// `None`: more callers are counted than there can be, and all of them are busy.
    fn of_caller(&self, caller: &SpiffeId, now_ns: u64) -> Option<Arc<Meter>> {
        let mut by_caller = self.by_caller.lock();
        if let Some(meter) = by_caller.get(caller) {
            return Some(meter.clone());
        }
        if by_caller.len() >= CALLERS_MAX {
            by_caller.retain(|_, meter| !meter.is_at_rest(now_ns));
        }
        let room = by_caller.len() < CALLERS_MAX;
        room.then(|| by_caller.entry(caller.clone()).or_default().clone())
    }
}

impl Meter {
    /// Whether a new one would say the same.
    fn is_at_rest(&self, now_ns: u64) -> bool {
        self.open.load(Relaxed) == 0 && self.emptied_at_ns.load(Relaxed) <= now_ns
    }
}

impl Place {
    fn new(meter: &Arc<Meter>) -> Self {
        meter.open.fetch_add(1, Relaxed);
        Self(meter.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use countersign_core::route::RouteMatch;

    use super::*;

    fn rule(route: Route) -> Arc<Rule> {
        Arc::new(Rule::new("r".into(), &route, None))
    }

    fn route() -> Route {
        Route {
            service: ServiceName::parse("catalog").unwrap(),
            rank: 0,
            matches: RouteMatch::default(),
            split: BTreeMap::new(),
            timeout_ms: None,
            retry: None,
            limit: None,
        }
    }

    #[test]
    fn a_prefix_matches_at_a_segment_boundary_only() {
        let rule = rule(Route {
            matches: RouteMatch { path_prefix: Some("/items/".into()), ..RouteMatch::default() },
            ..route()
        });
        for (path, expected) in
            [("/items", true), ("/items/", true), ("/items/4", true), ("/itemsets", false), ("/", false)]
        {
            assert_eq!(rule.matches(&Method::GET, path, &HeaderMap::new()), expected, "{path}");
        }
    }

    #[test]
    fn every_given_member_of_a_match_must_hold() {
        let rule = rule(Route {
            matches: RouteMatch {
                methods: ["POST".to_owned()].into(),
                headers: [("x-canary".to_owned(), "yes".to_owned())].into(),
                ..RouteMatch::default()
            },
            ..route()
        });
        let canary: HeaderMap =
            [(HeaderName::from_static("x-canary"), HeaderValue::from_static("yes"))].into_iter().collect();
        for (method, headers, expected) in
            [(Method::POST, &canary, true), (Method::GET, &canary, false), (Method::POST, &HeaderMap::new(), false)]
        {
            assert_eq!(rule.matches(&method, "/", headers), expected, "{method}");
        }
    }

    #[test]
    fn weights_split_in_their_proportion() {
        let (stable, canary) = (ServiceName::parse("catalog").unwrap(), ServiceName::parse("catalog-v2").unwrap());
        let rule = rule(Route { split: [(stable, 90), (canary.clone(), 10)].into(), ..route() });
        let canaries = (0..1000).filter(|n| rule.pick(*n) == Some(&canary)).count();
        assert_eq!(canaries, 100);
        assert_eq!(super::tests::rule(route()).pick(7), None, "without weights the service named is the one reached");
    }

    #[test]
    fn a_rate_limit_lets_a_burst_through_and_then_the_rate() {
        let rule = rule(Route {
            limit: Some(Limit { rate_per_second: Some(10), burst: Some(4), concurrent_max: None }),
            ..route()
        });
        let passed = |now_ns| (0..100).filter(|_| rule.enter(now_ns).is_ok()).count();
        assert_eq!(passed(0), 5, "one of the rate and four of the burst");
        assert_eq!(passed(100_000_000), 1);
        assert_eq!(passed(10_000_000_000), 5, "rest does not add up beyond the burst");
    }

    #[test]
    fn a_caller_is_counted_by_its_identity_and_what_is_at_rest_makes_room() {
        let rule = rule(Route {
            limit: Some(Limit { rate_per_second: Some(1), burst: None, concurrent_max: None }),
            ..route()
        });
        let caller = |n: usize| SpiffeId::parse(&format!("spiffe://shop.example/s{n}")).unwrap();
        let passed = |n, now_ns| rule.enter_as(&caller(n), now_ns).is_ok();
        assert_eq!([passed(0, 1), passed(0, 1), passed(1, 1)], [true, false, true]);
        assert!((2..CALLERS_MAX).all(|n| passed(n, 1)));
        assert!(!passed(CALLERS_MAX, 1), "all that are counted are busy");
        assert!(passed(CALLERS_MAX, 2_000_000_000), "those at rest made room");
    }

    #[test]
    fn a_place_under_a_concurrency_limit_comes_back() {
        let rule = rule(Route {
            limit: Some(Limit { rate_per_second: None, burst: None, concurrent_max: Some(2) }),
            ..route()
        });
        let (first, second) = (rule.enter(0).unwrap(), rule.enter(0).unwrap());
        assert_eq!(rule.enter(0).err(), Some(Limited::Concurrency));
        drop(first);
        assert!(rule.enter(0).is_ok());
        drop(second);
    }
}
