//! Asking a run to stop, or to save: flags that signals set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use crate::error::Result;

/// Set once, read between steps.
#[derive(Debug, Clone, Default)]
pub struct StopFlag {
    signal: Arc<AtomicUsize>,
    save: Arc<AtomicBool>,
}

impl StopFlag {
    /// A flag that SIGINT and SIGTERM set. A second signal ends the process at once. SIGUSR1 asks for a checkpoint.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn install() -> Result<Self> {
        let flag = Self::default();
        for signal in [SIGINT, SIGTERM] {
            let seen = Arc::new(AtomicBool::new(false));
            let number = usize::try_from(signal).unwrap_or_default();
            // Order matters: the shutdown looks at `seen` before this signal sets it.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                128 + signal,
                Arc::clone(&seen),
            )?;
            signal_hook::flag::register(signal, seen)?;
            signal_hook::flag::register_usize(signal, Arc::clone(&flag.signal), number)?;
        }
        signal_hook::flag::register(SIGUSR1, Arc::clone(&flag.save))?;
        Ok(flag)
    }

    /// Asks to stop, as `signal` would.
    pub fn set(&self, signal: usize) {
        self.signal.store(signal, Ordering::Relaxed);
    }

    /// Whether a checkpoint was asked for since the last call.
    pub fn take_save(&self) -> bool {
        self.save.swap(false, Ordering::Relaxed)
    }

    /// The signal that asked to stop.
    pub fn signal(&self) -> Option<usize> {
        let signal = self.signal.load(Ordering::Relaxed);
        (signal != 0).then_some(signal)
    }
}
