//! Temporary device memory inside one op: last in, first out, with a high-water mark that planning learns.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::driver::{ALIGNMENT, Driver};
use crate::error::{Error, Result};
use crate::tensor::PLANNED_ADDRESS;
use crate::tensor::device::DeviceMemory;

/// Where the pieces come from.
#[derive(Debug, Clone, Default)]
enum Source {
    /// One allocation each: ops that are called without a plan (tests).
    #[default]
    Single,
    /// Nothing: only the high-water mark counts.
    Planned,
    /// A slab of the size that planning found.
    Slab(Arc<dyn DeviceMemory>),
}

/// The scratch of a device.
#[derive(Debug)]
pub(super) struct Scratch {
    driver: Arc<dyn Driver>,
    source: RefCell<Source>,
    top: Cell<usize>,
    high_water: Cell<usize>,
}

/// Pieces that are given back together.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    scratch: &'a Scratch,
    start: usize,
    singles: Vec<Arc<dyn DeviceMemory>>,
}

impl Scratch {
    pub(super) fn new(driver: Arc<dyn Driver>) -> Self {
        Self {
            driver,
            source: RefCell::default(),
            top: Cell::new(0),
            high_water: Cell::new(0),
        }
    }

    /// A frame; its pieces are given back when it is dropped.
    pub(super) fn frame(&self) -> Frame<'_> {
        Frame {
            scratch: self,
            start: self.top.get(),
            singles: Vec::new(),
        }
    }

    /// Runs `pass` with pieces that have no memory; returns how many bytes it held at once. From then on pieces are single
    /// allocations.
    pub(super) fn high_water(&self, pass: impl FnOnce() -> Result<()>) -> Result<usize> {
        self.source.replace(Source::Planned);
        self.high_water.set(0);
        let planned = pass();
        self.source.replace(Source::Single);
        planned?;
        Ok(self.high_water.get())
    }

    /// Runs `pass` with pieces that have no memory, then allocates a slab for as many as it held at once; returns its bytes.
    /// Where that fails, pieces are single allocations again.
    pub(super) fn plan(&self, pass: impl FnOnce() -> Result<()>) -> Result<usize> {
        let num_bytes = self.high_water(pass)?;
        // Also where nothing is needed: a piece that was not planned must not go unnoticed.
        let slab = self.driver.alloc("scratch", num_bytes.max(ALIGNMENT))?;
        self.source.replace(Source::Slab(slab));
        Ok(num_bytes)
    }

    /// Whether pieces come from a slab: only then do they stay where a recording found them.
    pub(super) fn is_reserved(&self) -> bool {
        matches!(*self.source.borrow(), Source::Slab(_))
    }

    /// Whether pieces have no memory.
    pub(super) fn is_planning(&self) -> bool {
        matches!(*self.source.borrow(), Source::Planned)
    }
}

impl Frame<'_> {
    /// Address of `num_bytes` of memory that holds whatever was there.
    pub(super) fn take(&mut self, name: &str, num_bytes: usize) -> Result<u64> {
        let scratch = self.scratch;
        let start = scratch.top.get();
        let end = start + num_bytes.next_multiple_of(ALIGNMENT);
        let source = scratch.source.borrow();
        let address = match &*source {
            Source::Single => {
                let memory = scratch.driver.alloc(name, num_bytes)?;
                let address = memory.address();
                self.singles.push(memory);
                address
            }
            Source::Planned => PLANNED_ADDRESS,
            Source::Slab(slab) if end <= slab.num_bytes() => slab.address() + start as u64,
            Source::Slab(slab) => {
                return Err(Error::OutOfMemory {
                    reason: format!(
                        "scratch `{name}` of {num_bytes} bytes was not planned ({} in all)",
                        slab.num_bytes()
                    ),
                });
            }
        };
        scratch.top.set(end);
        scratch.high_water.set(scratch.high_water.get().max(end));
        Ok(address)
    }
}

impl Drop for Frame<'_> {
    fn drop(&mut self) {
        self.scratch.top.set(self.start);
    }
}
