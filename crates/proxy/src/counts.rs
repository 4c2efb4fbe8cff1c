//! What one worker counts. Only its worker writes, anybody may read: relaxed atomics, one set per worker, added up by the
//! admin page. No label is ever made from a request: the sets are closed, so a stranger cannot make a metric grow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use countersign_core::record::{Judged, Reason};

use crate::answer::ALL;

/// A counter, or a gauge of things that are open.
#[derive(Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn add(&self, n: u64) {
        // Only one thread writes, so a plain load and store is enough and costs no locked instruction.
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Fewer, of a gauge.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of the duration buckets, in microseconds; a last bucket holds the rest.
pub const DURATION_BOUNDS_US: [u64; 14] = [
    250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 5_000_000, 30_000_000,
];

/// Upper bounds of the judgement buckets, in nanoseconds; a last bucket holds the rest.
pub const JUDGE_BOUNDS_NS: [u64; 11] =
    [500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 500_000, 2_000_000, 10_000_000];

/// Exchanges of one direction.
#[derive(Default)]
pub struct Direction {
    /// Begun.
    pub started: Count,
    /// Open now.
    pub open: Count,
    /// Ended, by the first digit of their status (index 0: ended without one).
    pub ended_by_class: [Count; 6],
    /// Ended, by the bucket of their duration.
    pub duration_buckets: [Count; DURATION_BOUNDS_US.len() + 1],
    /// Sum of their durations, in microseconds.
    pub duration_sum_us: Count,
    /// Bytes of body from the caller.
    pub bytes_in: Count,
    /// Bytes of body to the caller.
    pub bytes_out: Count,
}

/// Everything one worker counts.
#[derive(Default)]
#[repr(align(128))] // no cache line is shared with another worker's
pub struct Counts {
    /// From the mesh to the workload.
    pub inbound: Direction,
    /// From the workload to the mesh.
    pub outbound: Direction,
    /// Connections open on any listener.
    pub connections_open: Count,
    /// Connections refused because too many were open.
    pub connections_refused: Count,
    /// TLS handshakes that did not prove a peer of this mesh.
    pub handshakes_failed: Count,
    /// First judgements, by reason in the order of [`Reason::ALL`].
    pub decisions_by_reason: [Count; Reason::ALL.len()],
    /// Open exchanges judged again.
    pub rejudged: Count,
    /// Open exchanges cut because the answer turned.
    pub cut: Count,
    /// Exchanges that the mesh answered itself, by reason in the order of `docs/answers.txt`.
    pub refusals: [Count; ALL.len()],
    /// Attempts beyond the first.
    pub retries: Count,
    /// Retries that were safe but had no budget.
    pub retries_without_budget: Count,
    /// Endpoints ejected.
    pub ejections: Count,
    /// Connections opened to other sidecars.
    pub mesh_connections: Count,
    /// Connections opened to the workload.
    pub app_connections: Count,
    /// Spans handed over to the agent.
    pub spans: Count,
    /// Spans lost for want of room.
    pub spans_shed: Count,
    /// Exchanges of this sidecar with itself, which are counted nowhere else.
    pub probes: Count,
    /// Nanoseconds spent judging.
    pub judge_ns: Count,
    /// Judgements, by the bucket of their duration.
    pub judge_buckets: [Count; JUDGE_BOUNDS_NS.len() + 1],
}

impl Counts {
    /// Counts one judgement: the first of an exchange by its reason, every one by its duration. Traffic only: a probe is none.
    pub fn judged(&self, which: Judged, reason: Reason, judge_ns: u64) {
        match which {
            Judged::AtStart => self.decisions_by_reason[reason.place()].add(1),
            Judged::WhileOpen => self.rejudged.add(1),
            Judged::AsProbe => return,
        }
        self.judge_ns.add(judge_ns);
        let bucket = JUDGE_BOUNDS_NS.iter().position(|bound| judge_ns <= *bound);
        self.judge_buckets[bucket.unwrap_or(JUDGE_BOUNDS_NS.len())].add(1);
    }
}

impl Direction {
    /// Counts the end of an exchange.
    pub fn end(&self, status: u16, duration_us: u64, bytes_in: u64, bytes_out: u64) {
        self.open.sub(1);
        self.ended_by_class[usize::from(status / 100).min(5)].add(1);
        let bucket = DURATION_BOUNDS_US.iter().position(|bound| duration_us <= *bound);
        self.duration_buckets[bucket.unwrap_or(DURATION_BOUNDS_US.len())].add(1);
        self.duration_sum_us.add(duration_us);
        self.bytes_in.add(bytes_in);
        self.bytes_out.add(bytes_out);
    }
}
