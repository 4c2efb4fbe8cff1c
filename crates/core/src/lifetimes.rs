//! How long what the authority of a mesh signs is good, and between which bounds that is a setting.
//!
//! | | at least | because | at most | because |
//! |---|---|---|---|---|
//! | SVID | 5 minutes | it is renewed at half its life, and control may be away for as long | 24 hours | what is revoked is held by every proxy until it expires, and a host that was away comes back by it |
//! | intermediate | 7 days | it is replaced when a third is left, which outlasts every SVID | 365 days | its key is in memory while control runs |
//! | root | 90 days, and two intermediates | each root is prepared, known and followed by people and hosts | 7300 days | the algorithms of today |

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

const DAY: u32 = 24 * 60 * 60;

/// Bounds of an SVID's life, in seconds.
pub const SVID_SECONDS: RangeInclusive<u32> = 5 * 60..=DAY;
/// Bounds of an intermediate's life, in days.
pub const INTERMEDIATE_DAYS: RangeInclusive<u32> = 7..=365;
/// Bounds of a root's life, in days.
pub const ROOT_DAYS: RangeInclusive<u32> = 90..=7300;

/// How long each level is good that is signed from now on. What was signed before keeps what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lifetimes {
    /// Of an SVID, in seconds.
    pub svid_seconds: u32,
    /// Of an intermediate, in days.
    pub intermediate_days: u32,
    /// Of a root, in days.
    pub root_days: u32,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Self { svid_seconds: 60 * 60, intermediate_days: 90, root_days: 3650 }
    }
}

impl Lifetimes {
    /// Whether each is within its bounds, and a root outlives two intermediates.
    pub fn are_bounded(&self) -> bool {
        SVID_SECONDS.contains(&self.svid_seconds)
            && INTERMEDIATE_DAYS.contains(&self.intermediate_days)
            && ROOT_DAYS.contains(&self.root_days)
            && self.root_days >= 2 * self.intermediate_days
    }
}
