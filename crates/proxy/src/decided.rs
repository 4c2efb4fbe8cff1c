//! What the data path hands to the record: one decision with everything it read, borrowed from the exchange. Writing,
//! aggregating and shedding are the record's own affair.

use std::fmt;

use countersign_core::{
    change::Revision,
    policy::{Decision, Query},
    record::{Ended, Judged},
    signal::SignalSeq,
};
use tokio::sync::oneshot;

/// The id of one decision: 48 bits of time in milliseconds, then 80 random bits; 32 hexadecimal digits when written, so
/// that ids sort by time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DecisionId(pub u128);

/// A W3C trace id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(pub u128);

/// One decision, as the worker that made it knows it.
pub struct Decided<'a> {
    /// Its id.
    pub id: DecisionId,
    /// When it was made, in milliseconds since 1970.
    pub at_ms: u64,
    /// The revision of the view that decided.
    pub revision: Revision,
    /// The number of the last signal that was heeded.
    pub signals: SignalSeq,
    /// The answer and the policies it rests on.
    pub decision: &'a Decision,
    /// The first judgement of the exchange, or a later one.
    pub judged: Judged,
    /// The question.
    pub query: Query<'a>,
    /// The trace the exchange belongs to.
    pub trace_id: Option<TraceId>,
    /// How long the judgement took, in nanoseconds.
    pub judge_ns: u64,
    /// How the exchange ended; `None` while it is open.
    pub ended: Option<Ended>,
}

/// Where one worker puts its decisions. Each worker has its own, so nothing here needs a lock; it must not block.
pub trait Recorder {
    /// Takes one decision, or sheds it when there is no room (and counts that).
    fn record(&self, decided: &Decided<'_>) -> Result<(), Shed>;

    /// As [`Self::record`], for what must not go on unrecorded: the receiver hears once the decision is written. It hears
    /// an error when the decision is lost.
    fn commit(&self, decided: &Decided<'_>) -> Result<oneshot::Receiver<()>, Shed>;

    /// Adds what became of an exchange whose decision was taken while it was open (`ended: None`): one that lives long,
    /// or one that is never forwarded unrecorded. Counted when there is no room.
    fn amend(&self, id: DecisionId, ended: &Ended);
}

/// The record found no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shed;

impl DecisionId {
    /// A new id at `at_ms`, unpredictable enough not to collide.
    pub fn new(at_ms: u64) -> Self {
        Self(u128::from(at_ms & 0xffff_ffff_ffff) << 80 | (fastrand::u128(..) >> 48))
    }
}

impl fmt::Display for DecisionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for DecisionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DecisionId({self})")
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TraceId({self})")
    }
}
