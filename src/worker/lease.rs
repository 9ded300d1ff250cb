//! Which worker is at a job: a file beside it that its holder renews. Who does not renew it in time has lost it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::log::Log;
use super::net::time::unix_seconds;
use super::net::{Cancel, Canceller};
use super::state::JobDir;
use crate::durable::Durable;

const FILE: &str = "lease.json";
/// Renewals in the time a lease lasts.
const RENEWALS: u32 = 4;
/// Time for the writers of a contested lease to see each other's.
const SETTLE: Duration = Duration::from_millis(200);

/// A hold as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Hold {
    /// Unique to a process.
    holder: String,
    /// Host, and the process on it: a process that is gone holds nothing.
    host: String,
    process: u32,
    /// Seconds since 1970 of the last renewal.
    renewed: u64,
}

/// A held job. Dropping it lets go.
#[derive(Debug)]
pub struct Lease {
    job: JobDir,
    holder: Holder,
    renewing: tokio::task::JoinHandle<()>,
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
        is_new.then_some(Self { job, held })
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
    pub async fn acquire(
        &self,
        job: &JobDir,
        log: &Log,
        lost: &Canceller,
    ) -> crate::error::Result<Option<Lease>> {
        let hold = job.read::<Hold>(FILE);
        if hold.is_some_and(|hold| hold.holder != self.id && self.is_alive(&hold)) {
            return Ok(None);
        }
        let Some(own) = Own::take(self, job) else {
            return Ok(None);
        };
        self.write(job)?;
        // Of several that found it free the last writer has it.
        tokio::time::sleep(SETTLE).await;
        if !self.holds(job) {
            return Ok(None);
        }
        let (holder, of) = (self.clone(), job.clone());
        let (log, lost) = (log.clone(), lost.clone());
        let renewing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(holder.lasts / RENEWALS).await;
                if holder.has_lost(&of) {
                    log.error("another worker has taken over this job; this one stops");
                    lost.cancel();
                    return;
                }
                if let Err(error) = holder.write(&of) {
                    log.warn(&format!("the lease could not be renewed: {error}"));
                }
            }
        });
        Ok(Some(Lease {
            job: job.clone(),
            holder: self.clone(),
            renewing,
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
            if let Some(lease) = self.acquire(job, log, lost).await? {
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

    fn holds(&self, job: &JobDir) -> bool {
        job.read::<Hold>(FILE)
            .is_some_and(|hold| hold.holder == self.id)
    }

    /// Whether another holds it; a file that cannot be read just now says nothing.
    fn has_lost(&self, job: &JobDir) -> bool {
        job.read::<Hold>(FILE)
            .is_some_and(|hold| hold.holder != self.id)
    }

    fn write(&self, job: &JobDir) -> crate::error::Result<()> {
        let hold = Hold {
            holder: self.id.clone(),
            host: self.host.clone(),
            process: std::process::id(),
            renewed: unix_seconds(),
        };
        job.write(FILE, &hold)
    }
}

impl Lease {
    /// Whether another worker has taken the job over.
    pub fn is_lost(&self) -> bool {
        self.holder.has_lost(&self.job)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.renewing.abort();
        if !self.is_lost() {
            let _ = fs_err::remove_file(self.job.path(FILE));
            let _ = Durable::default().sync_dir(&self.job.path(""));
        }
    }
}
