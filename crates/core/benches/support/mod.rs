//! How the benchmarks of this crate take time.

use std::time::Instant;

const ROUNDS: usize = 31;
const ROUND_NS: u128 = 5_000_000;

/// What `act` takes, in nanoseconds: the median over rounds of the mean of one round.
pub fn measure(mut act: impl FnMut()) -> f64 {
    let mut run = |count: usize| {
        let begun = Instant::now();
        (0..count).for_each(|_| act());
        begun.elapsed().as_nanos()
    };
    let mut count = 1;
    while run(count) < ROUND_NS {
        count *= 2;
    }
    let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| run(count) as f64 / count as f64).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}
