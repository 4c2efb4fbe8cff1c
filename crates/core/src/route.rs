//! Traffic rules as data: which request takes which way, how long it may take and how much of it is let through.
//!
//! The outbound proxy of the caller matches; the service a rule picks is the service that is judged and reached.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::identity::ServiceName;

/// One traffic rule. Rules of a service are tried by ascending `rank`; the first that matches holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The service as the caller named it.
    pub service: ServiceName,
    /// Position among the rules of its service in `routes.toml`, from 0.
    pub rank: u32,
    /// What a request must look like. Empty matches all.
    #[serde(default)]
    pub matches: RouteMatch,
    /// Where it goes: weight by service. Empty: to `service` itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub split: BTreeMap<ServiceName, u32>,
    /// Longest time from the request's head to the response's head, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// When a failed attempt may be tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// Limits for each caller of this rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
}

/// All given members must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub struct RouteMatch {
    /// The normalized path, exactly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A prefix of the normalized path, at a segment boundary: `/items` matches `/items` and `/items/4`, not `/itemsets`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_prefix: Option<String>,
    /// One of these methods.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub methods: BTreeSet<String>,
    /// Each of these headers with exactly this value; names in lower case.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

/// Retries happen only where they are safe: the connection failed, the server said that it did not process the request,
/// or the method is idempotent and no byte of a response came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// Attempts beyond the first.
    pub attempts: u32,
    /// Retries allowed as a share of requests, in percent: a failing upstream is not flooded.
    pub budget_percent: u32,
}

/// Limits that hold for each caller on its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Requests per second, sustained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_per_second: Option<u32>,
    /// Requests that may come at once above the rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Exchanges open at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrent_max: Option<u32>,
}
