//! When what is left of each job is tried again: later each time, so that nothing that stays away holds up the rest.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Longest time between two tries.
const LONGEST: Duration = Duration::from_hours(1);

/// Tries to come, by job. A new worker begins anew: the operator may have mended what was in the way.
#[derive(Debug, Default)]
pub struct Later {
    jobs: Mutex<BTreeMap<String, Retry>>,
    changed: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    tries: usize,
    due: Instant,
}

impl Later {
    /// Counts a try of job `id` that failed: the next one is after the wait of `waits` at its place, then each hour; not before
    /// `asked` is over, within an hour.
    pub fn put_off(&self, id: &str, waits: &[Duration], asked: Option<Duration>) {
        let mut jobs = self.jobs();
        let tries = jobs.get(id).map_or(0, |retry| retry.tries) + 1;
        let due = Instant::now() + pause(tries, waits, asked);
        jobs.insert(id.to_owned(), Retry { tries, due });
        self.changed.notify_one();
    }

    /// Whether job `id` may be tried now.
    pub fn is_due(&self, id: &str) -> bool {
        let due = self.jobs().get(id).map(|retry| retry.due);
        due.is_none_or(|due| due <= Instant::now())
    }

    /// Nothing is left of job `id`.
    pub fn forget(&self, id: &str) {
        self.jobs().remove(id);
    }

    /// Returns when a job is due, at the latest after `longest`.
    pub async fn wait(&self, longest: Duration) {
        let latest = Instant::now() + longest;
        loop {
            let due = self.jobs().values().map(|retry| retry.due).min();
            let until = due.map_or(latest, |due| due.min(latest));
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                () = self.changed.notified() => {}
            }
        }
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<String, Retry>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time after the `tries`th try.
fn pause(tries: usize, waits: &[Duration], asked: Option<Duration>) -> Duration {
    let wait = waits.get(tries).copied().unwrap_or(LONGEST);
    wait.max(asked.unwrap_or_default()).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_come_later_each_time_up_to_an_hour() {
        let waits = [0, 5, 30].map(Duration::from_secs);
        let pauses = [1, 2, 3, 4].map(|tries| pause(tries, &waits, None).as_secs());
        assert_eq!(pauses, [5, 30, 3600, 3600]);
        let asked = |seconds| pause(1, &waits, Some(Duration::from_secs(seconds))).as_secs();
        assert_eq!([asked(1), asked(60), asked(99_999)], [5, 60, 3600]);
    }

    #[tokio::test]
    async fn a_wait_ends_when_a_job_is_due() {
        let later = Later::default();
        let waits = [Duration::ZERO, Duration::from_millis(20)];
        assert!(later.is_due("a"));
        let put_off = async { later.put_off("a", &waits, None) };
        tokio::join!(later.wait(LONGEST), put_off);
        assert!(later.is_due("a"));
        later.put_off("a", &waits, None);
        assert!(
            later.is_due("b") && !later.is_due("a"),
            "an hour after the second try"
        );
        later.forget("a");
        assert!(later.is_due("a"));
    }
}
