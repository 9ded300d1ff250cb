//! Which worker is at a job: a numbered file beside it that its holder renews. The highest number holds. A number is taken by making
//! its file, which the file system lets one alone do; who does not renew in time is followed by the next number.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::log::Log;
use super::net::time::unix_seconds;
use super::net::{Cancel, Canceller};
use super::state::JobDir;
use crate::durable::Durable;

/// Renewals in the time a lease lasts.
const RENEWALS: u32 = 4;

/// A hold as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Hold {
    /// Unique to a process.
    holder: String,
    /// Host, and the process on it: a process that is gone holds nothing.
    host: String,
    process: u32,
    /// Seconds since 1970 of the last renewal; 0 once it is let go.
    renewed: u64,
}

/// A held job. Dropping it lets go.
#[derive(Debug)]
pub struct Lease {
    job: JobDir,
    number: u64,
    holder: Holder,
    renewing: tokio::task::JoinHandle<()>,
    is_removed: bool,
    _own: Own,
}

/// A job that one task of this process is at.
#[derive(Debug)]
struct Own {
    job: PathBuf,
    held: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Own {
    fn take(holder: &Holder, job: &JobDir) -> Option<Self> {
        let (job, held) = (job.path(""), Arc::clone(&holder.held));
        let is_new = held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(job.clone());
        // Not made where it is not new: dropping it would let go of the one that is.
        is_new.then(|| Self { job, held })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.job);
    }
}

/// Who asks for leases.
#[derive(Debug, Clone)]
pub struct Holder {
    /// Unique to this process.
    id: String,
    host: String,
    lasts: Duration,
    /// Jobs that this process is at.
    held: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Holder {
    /// This process, whose leases last `lasts` without renewal.
    pub fn new(worker_id: &str, lasts: Duration) -> Self {
        let host = fs_err::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let name = rustix::system::uname();
        let host = format!("{}/{}", host.trim(), name.nodename().to_string_lossy());
        let id = format!("{worker_id}-{}-{}", std::process::id(), unix_seconds());
        let held = Arc::default();
        Self {
            id,
            host,
            lasts,
            held,
        }
    }

    /// Takes the lease of `job`; `None` while another holds it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn acquire(
        &self,
        job: &JobDir,
        log: &Log,
        lost: &Canceller,
    ) -> crate::error::Result<Option<Lease>> {
        let Some(number) = self.free(job) else {
            return Ok(None);
        };
        let Some(own) = Own::take(self, job) else {
            return Ok(None);
        };
        if !self.take(job, number)? {
            return Ok(None);
        }
        let (holder, of) = (self.clone(), job.clone());
        let (log, lost) = (log.clone(), lost.clone());
        let renewing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(holder.lasts / RENEWALS).await;
                if has_lost(&of, number) {
                    log.error("another worker has taken over this job; this one stops");
                    lost.cancel();
                    return;
                }
                if let Err(error) = holder.write(&of, number, unix_seconds()) {
                    log.warn(&format!("the lease could not be renewed: {error}"));
                }
            }
        });
        Ok(Some(Lease {
            job: job.clone(),
            number,
            holder: self.clone(),
            renewing,
            is_removed: false,
            _own: own,
        }))
    }

    /// Waits for the lease of `job`, up to `patience`; `until` ends the wait early.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn wait(
        &self,
        job: &JobDir,
        log: &Log,
        lost: &Canceller,
        cancel: &Cancel,
        until: impl Fn() -> bool,
    ) -> crate::error::Result<Option<Lease>> {
        let mut told = false;
        loop {
            if let Some(lease) = self.acquire(job, log, lost)? {
                return Ok(Some(lease));
            }
            if until() || cancel.is_cancelled() {
                return Ok(None);
            }
            if !told {
                log.info("another worker is at this job; waiting for its result");
                told = true;
            }
            let _ = cancel.or(tokio::time::sleep(self.lasts / RENEWALS)).await;
        }
    }

    fn is_alive(&self, hold: &Hold) -> bool {
        if hold.host == self.host {
            let process = i32::try_from(hold.process).ok();
            let process = process.and_then(rustix::process::Pid::from_raw);
            let is_there = |process| rustix::process::test_kill_process(process).is_ok();
            if !process.is_some_and(is_there) || hold.process == std::process::id() {
                return false;
            }
        }
        unix_seconds().saturating_sub(hold.renewed) <= self.lasts.as_secs().max(1)
    }

    /// The number that would hold `job` next; `None` while another holds it.
    fn free(&self, job: &JobDir) -> Option<u64> {
        let Some(newest) = numbers(job).max() else {
            return Some(1);
        };
        let is_held = if let Some(hold) = job.read::<Hold>(&file(newest)) {
            hold.holder != self.id && self.is_alive(&hold)
        } else {
            // Just made and not yet written, unless its maker ended there.
            let made = job.path(&file(newest)).metadata();
            let made = made.ok().and_then(|data| data.modified().ok());
            made.is_some_and(|at| at.elapsed().unwrap_or_default() <= self.lasts)
        };
        (!is_held).then_some(newest + 1)
    }

    /// Makes `number` this one's; false if another was faster.
    fn take(&self, job: &JobDir, number: u64) -> crate::error::Result<bool> {
        let path = job.path(&file(number));
        match fs_err::File::create_new(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        if has_lost(job, number) {
            // The number was held, let go and removed since it was found free.
            fs_err::remove_file(path)?;
            return Ok(false);
        }
        self.write(job, number, unix_seconds())?;
        for older in numbers(job).filter(|older| *older < number) {
            let _ = fs_err::remove_file(job.path(&file(older)));
        }
        Ok(true)
    }

    fn write(&self, job: &JobDir, number: u64, renewed: u64) -> crate::error::Result<()> {
        let hold = Hold {
            holder: self.id.clone(),
            host: self.host.clone(),
            process: std::process::id(),
            renewed,
        };
        job.write(&file(number), &hold)
    }
}

fn file(number: u64) -> String {
    format!("lease-{number}.json")
}

/// The numbers that were taken; of those that are over at least the highest.
fn numbers(job: &JobDir) -> impl Iterator<Item = u64> {
    let entries = fs_err::read_dir(job.path("")).into_iter().flatten();
    entries.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_prefix("lease-")?
            .strip_suffix(".json")?
            .parse()
            .ok()
    })
}

/// Whether another follows the holder of `number`; a directory that cannot be read just now says nothing.
fn has_lost(job: &JobDir, number: u64) -> bool {
    numbers(job).any(|newer| newer > number)
}

impl Lease {
    /// Whether another worker has taken the job over.
    pub fn is_lost(&self) -> bool {
        has_lost(&self.job, self.number)
    }

    /// Removes the directory, and lets go with it: who comes next makes it anew. That of another holder stays.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(mut self) -> crate::error::Result<()> {
        if self.is_lost() {
            return Ok(());
        }
        self.renewing.abort();
        self.is_removed = true;
        Durable::default().remove_dir(&self.job.path(""))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.renewing.abort();
        if !self.is_removed && !self.is_lost() {
            // Its file stays: numbers only grow.
            let _ = self.holder.write(&self.job, self.number, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::log::Level;
    use crate::worker::state::State;

    const LASTS: Duration = Duration::from_mins(1);

    /// A worker on a host of its own, so that it counts as alive though it is this process.
    fn holder(name: &str, lasts: Duration) -> Holder {
        let host = format!("host of {name}");
        Holder {
            host,
            ..Holder::new(name, lasts)
        }
    }

    fn job(dir: &tempfile::TempDir) -> JobDir {
        State::open(dir.path()).unwrap().job("j1").unwrap()
    }

    fn log() -> Log {
        Log::new(Arc::new(|_: &str| {}), Level::Error, false, &[])
    }

    #[test]
    fn of_two_that_find_it_free_one_gets_it_however_slow_the_other_is() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        let (a, b) = (holder("a", LASTS), holder("b", LASTS));
        // New, and after a holder that is gone.
        for _ in 0..2 {
            let (of_a, of_b) = (a.free(&job).unwrap(), b.free(&job).unwrap());
            assert!(b.take(&job, of_b).unwrap());
            assert!(!a.take(&job, of_a).unwrap());
            assert_eq!(a.free(&job), None);
            b.write(&job, of_b, 0).unwrap();
        }
    }

    #[test]
    fn a_number_that_others_had_meanwhile_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        let (a, b) = (holder("a", LASTS), holder("b", LASTS));
        let of_a = a.free(&job).unwrap();
        for number in 1..=2 {
            assert!(b.take(&job, number).unwrap());
        }
        assert_eq!(numbers(&job).collect::<Vec<_>>(), [2]);
        assert!(!a.take(&job, of_a).unwrap());
        assert_eq!(numbers(&job).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn at_once_eight_get_one_lease() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        for round in 0..50 {
            let begin = std::sync::Barrier::new(8);
            let number = std::thread::scope(|scope| {
                let one = |name: usize| {
                    let (begin, job) = (&begin, &job);
                    scope.spawn(move || {
                        let holder = holder(&format!("{round}-{name}"), LASTS);
                        begin.wait();
                        let number = holder.free(job)?;
                        holder
                            .take(job, number)
                            .unwrap()
                            .then_some((holder, number))
                    })
                };
                let all: Vec<_> = (0..8).map(one).collect();
                let mut got = all.into_iter().filter_map(|one| one.join().unwrap());
                let (holder, number) = got.next().unwrap();
                assert!(got.next().is_none(), "round {round}");
                holder.write(&job, number, 0).unwrap();
                number
            });
            assert_eq!(number, round + 1);
        }
    }

    #[tokio::test]
    async fn of_a_process_too_one_task_alone_is_at_a_job() {
        let dir = tempfile::tempdir().unwrap();
        let (job, holder) = (job(&dir), holder("one", LASTS));
        let log = Log::new(Arc::new(|_: &str| {}), Level::Error, false, &[]);
        let (lost, _) = Canceller::new();
        let lease = holder.acquire(&job, &log, &lost).unwrap();
        assert!(lease.is_some());
        for _ in 0..3 {
            assert!(holder.acquire(&job, &log, &lost).unwrap().is_none());
        }
        drop(lease);
        assert!(holder.acquire(&job, &log, &lost).unwrap().is_some());
    }

    #[tokio::test]
    async fn who_does_not_renew_is_followed_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        let (lost, was_lost) = Canceller::new();
        let slow = holder("slow", Duration::from_millis(200));
        let lease = slow.acquire(&job, &log(), &lost).unwrap().unwrap();
        let next = holder("next", LASTS);
        assert!(next.acquire(&job, &log(), &lost).unwrap().is_none());
        slow.write(&job, lease.number, unix_seconds() - 61).unwrap();
        let taken = next.acquire(&job, &log(), &lost).unwrap().unwrap();
        was_lost.cancelled().await;
        assert!(lease.is_lost() && !taken.is_lost());
        drop(lease);
        assert_eq!(next.free(&job), Some(taken.number + 1), "its own");
        let third = holder("third", LASTS);
        assert_eq!(third.free(&job), None);
        drop(taken);
        assert!(third.free(&job).is_some());
    }

    #[tokio::test]
    async fn a_directory_is_removed_by_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        let (lost, _) = Canceller::new();
        let (slow, next) = (holder("slow", LASTS), holder("next", LASTS));
        let lease = slow.acquire(&job, &log(), &lost).unwrap().unwrap();
        slow.write(&job, lease.number, unix_seconds() - 61).unwrap();
        let taken = next.acquire(&job, &log(), &lost).unwrap().unwrap();
        lease.remove().unwrap();
        assert!(!taken.is_lost() && job.path(&file(taken.number)).is_file());
        taken.remove().unwrap();
        assert!(!job.path("").exists());
        assert!(slow.acquire(&job, &log(), &lost).is_err(), "not made anew");
    }

    #[test]
    fn a_file_that_its_maker_left_empty_holds_for_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let job = job(&dir);
        fs_err::write(job.path(&file(7)), "").unwrap();
        assert_eq!(holder("a", LASTS).free(&job), None);
        assert_eq!(holder("a", Duration::ZERO).free(&job), Some(8));
    }
}
