//! What is tested: a device, and how often it runs each case.

use super::{Case, Stage, cases};
use crate::error::Result;
use crate::ops::Ops;

/// Runs of each case: equal inputs must give equal bits.
const NUM_RUNS: usize = 2;

/// A device under test.
#[derive(Debug)]
pub struct Subject {
    /// Each with what a message calls it; runs take turns on them.
    devices: Vec<(String, Box<dyn Ops>)>,
    lays_guards: bool,
}

impl Subject {
    /// A device that runs each case twice, its tensors between guard bands.
    pub fn new(ops: Box<dyn Ops>) -> Self {
        Self {
            devices: vec![("a run".to_owned(), ops)],
            lays_guards: true,
        }
    }

    /// The emulated device, once in each order of its threads. It watches over its memory itself, byte by byte where the
    /// build is sanitized.
    ///
    /// # Errors
    /// Those of the device.
    #[cfg(kernels_emu)]
    pub fn emu() -> Result<Self> {
        use crate::backend::gpu::Gpu;
        use crate::backend::gpu::driver::emu::{Emu, Order};
        const ORDERS: [Order; 3] = [Order::Forward, Order::Reversed, Order::Shuffled(7)];
        // Sanitizers look at accesses, which are the same in every order.
        let count = if cfg!(kernels_sanitized) {
            1
        } else {
            ORDERS.len()
        };
        let open = |order: &Order| -> Result<(String, Box<dyn Ops>)> {
            let gpu = Gpu::new(std::sync::Arc::new(Emu::new(*order)))?;
            Ok((format!("thread order {order:?}"), Box::new(gpu)))
        };
        Ok(Self {
            devices: ORDERS[..count].iter().map(open).collect::<Result<_>>()?,
            lays_guards: false,
        })
    }

    /// This build has no emulated device.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::error::Error::Unsupported).
    #[cfg(not(kernels_emu))]
    pub fn emu() -> Result<Self> {
        Err(crate::backend::no_emu())
    }

    /// The device of each run, and what a message calls it.
    pub(super) fn runs(&self) -> impl Iterator<Item = (&str, &dyn Ops)> {
        let count = if cfg!(kernels_sanitized) { 1 } else { NUM_RUNS };
        let devices = self.devices.iter().cycle();
        devices
            .take(self.devices.len().max(count))
            .map(|(label, ops)| (label.as_str(), &**ops))
    }

    /// Where a case runs.
    pub(super) fn stage<'a>(&self, ops: &'a dyn Ops) -> Stage<'a> {
        if self.lays_guards {
            Stage::guarded(ops)
        } else {
            Stage::new(ops)
        }
    }
}

/// Names of the ops that have cases, in order.
pub fn op_names() -> Vec<&'static str> {
    let mut names: Vec<_> = cases().iter().map(|case| case.op).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The cases of op `name`, or of all ops whose names begin with it; empty if there is none.
pub fn cases_of(name: &str) -> Vec<Case> {
    let mut found = cases();
    found.retain(|case| case.op.starts_with(name));
    found
}
