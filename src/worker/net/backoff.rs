//! Waiting times between attempts.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Doubles from `base` to `max`, each spread by up to a quarter.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// First wait `base`, never more than `max` (before the spread).
    pub fn new(base: Duration, max: Duration) -> Self {
        Self {
            base,
            max,
            failures: 0,
        }
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets the failures.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Counts a failure and tells how long to wait. `asked` is the other side's own wish (`Retry-After`): the wait is
    /// no shorter, up to twice the longest wait.
    pub fn next(&mut self, asked: Option<Duration>) -> Duration {
        let doubled = self
            .base
            .saturating_mul(1_u32.checked_shl(self.failures.min(20)).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        let wait = doubled.min(self.max);
        let asked = asked.unwrap_or_default().min(self.max.saturating_mul(2));
        spread(wait).max(asked)
    }
}

/// `wait` and up to a quarter more, so that not all come back at once.
pub fn spread(wait: Duration) -> Duration {
    wait + wait.mul_f64(f64::from(random_percent()) / 400.0)
}

/// Uniform in `0..100`; the standard library's hash keys are the source.
fn random_percent() -> u8 {
    let random = RandomState::new().build_hasher().finish() % 100;
    u8::try_from(random).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_longest_and_honour_the_other_side() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, 30 * second);
        for expected in [1, 2, 4, 8, 16, 30, 30, 30] {
            let wait = backoff.next(None);
            let expected = expected * second;
            assert!(
                wait >= expected && wait <= expected.mul_f64(1.25),
                "{wait:?}"
            );
        }
        backoff.reset();
        assert_eq!(backoff.next(Some(20 * second)), 20 * second);
        assert_eq!(backoff.next(Some(9999 * second)), 60 * second);
    }
}
