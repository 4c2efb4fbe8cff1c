//! How long to wait before the next attempt: doubling from a first delay to a longest one, each delay drawn from its
//! upper half, so that a thousand agents that lost the same control plane do not return at the same instant. Draws
//! from the thread's generator; nothing here is a secret.

use std::time::Duration;

/// Doubling delays with jitter.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, next: first }
    }

    /// The delay before the next attempt: between half and all of the current step.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.longest);
        step.mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    /// An attempt went well: the next failure begins at the first delay again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// Half of `lifetime`, give or take a tenth of it: when to renew what lives that long.
pub(crate) fn half_life(lifetime: Duration) -> Duration {
    lifetime.mul_f64(0.45 + 0.1 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_begin_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
        for step_ms in [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000] {
            let delay = backoff.next_delay();
            let step = Duration::from_millis(step_ms);
            assert!(delay <= step && delay >= step / 2, "{delay:?} is not in the upper half of {step:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= Duration::from_millis(100));
    }

    #[test]
    fn renewal_falls_within_a_tenth_of_half_life() {
        for _ in 0..1000 {
            let at = half_life(Duration::from_secs(3600));
            assert!(at >= Duration::from_secs(1619) && at <= Duration::from_secs(1981), "{at:?}");
        }
    }
}
