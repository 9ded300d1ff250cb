//! Why a job ends before its end.

use std::sync::{Arc, Mutex, PoisonError};

use super::net::{Cancel, Canceller};

/// Who or what ends a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The platform: nothing is posted for the job any more.
    JobStop,
    /// The application, by the row.
    Row,
    /// The application, by its answer to a callback.
    Callback,
    /// Another worker has the job now.
    LostLease,
    /// This worker ends.
    Shutdown,
    /// The job's time is nearly over.
    Deadline,
}

/// A job's end, to be asked for once. Clones are the same.
#[derive(Debug, Clone)]
pub struct Ends {
    reason: Arc<Mutex<Option<Reason>>>,
    canceller: Canceller,
    cancel: Cancel,
}

impl Default for Ends {
    fn default() -> Self {
        let (canceller, cancel) = Canceller::new();
        let reason = Arc::default();
        Self {
            reason,
            canceller,
            cancel,
        }
    }
}

impl Ends {
    /// Ends the job, for the first reason given.
    pub fn end(&self, reason: Reason) {
        self.lock().get_or_insert(reason);
        self.canceller.cancel();
    }

    /// Why it ends.
    pub fn reason(&self) -> Option<Reason> {
        *self.lock()
    }

    /// The flag that goes up.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Reason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
