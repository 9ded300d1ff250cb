//! A device that holds nothing: it gives every address and does nothing with it, and keeps the ledger of what it was asked for.
//! So a plan is the very code of a run.

use std::sync::{Arc, Mutex, PoisonError};

use super::{ALIGNMENT, DeviceInfo, Driver, Grid, Kernel, Recording};
use crate::error::Result;
use crate::tensor::device::DeviceMemory;

/// A device of some kind and size.
#[derive(Debug)]
pub struct Planned {
    info: DeviceInfo,
    num_bytes: u64,
    live: Arc<Mutex<Live>>,
}

/// What is allocated.
#[derive(Debug, Default)]
struct Live {
    /// Name and bytes by number, in the order of allocation; gone where it was given back.
    entries: Vec<Option<(String, usize)>>,
    /// End of the last one.
    end: u64,
}

impl Planned {
    /// A device like `info` with `num_bytes` of memory.
    pub fn new(info: DeviceInfo, num_bytes: u64) -> Self {
        Self {
            info,
            num_bytes,
            live: Arc::default(),
        }
    }

    /// Name and bytes of all live memory, in the order of allocation.
    pub fn ledger(&self) -> Vec<(String, usize)> {
        lock(&self.live).entries.iter().flatten().cloned().collect()
    }
}

impl Driver for Planned {
    fn info(&self) -> DeviceInfo {
        self.info.clone()
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        let live = lock(&self.live);
        let taken = live
            .entries
            .iter()
            .flatten()
            .map(|(_, bytes)| *bytes as u64);
        Ok(Some(self.num_bytes.saturating_sub(taken.sum())))
    }

    /// Never refused: what does not fit is told in whole.
    fn alloc(&self, name: &str, num_bytes: usize) -> Result<Arc<dyn DeviceMemory>> {
        let mut live = lock(&self.live);
        let address = live.end.next_multiple_of(ALIGNMENT as u64) + ALIGNMENT as u64;
        live.end = address + num_bytes as u64;
        let number = live.entries.len();
        live.entries.push(Some((name.to_owned(), num_bytes)));
        Ok(Arc::new(PlannedMemory {
            address,
            num_bytes,
            number,
            live: Arc::clone(&self.live),
        }))
    }

    fn reserve(&self, _: &str, _: usize) -> Result<()> {
        Ok(())
    }

    fn check(&self, kernel: Kernel, grid: Grid) -> Result<()> {
        self.info.check(kernel, grid)
    }

    fn launch(&self, kernel: Kernel, grid: Grid, _: &[u8]) -> Result<()> {
        self.check(kernel, grid)
    }

    fn zero(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        body()?;
        Ok(Box::new(Nothing))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// A recording of launches that do nothing.
#[derive(Debug)]
struct Nothing;

impl Recording for Nothing {
    fn replay(&self) -> Result<()> {
        Ok(())
    }
}

/// An address and a size.
#[derive(Debug)]
struct PlannedMemory {
    address: u64,
    num_bytes: usize,
    number: usize,
    live: Arc<Mutex<Live>>,
}

impl DeviceMemory for PlannedMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn read(&self, _: usize, out: &mut [u8]) -> Result<()> {
        out.fill(0);
        Ok(())
    }

    fn write(&self, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
}

impl Drop for PlannedMemory {
    fn drop(&mut self) {
        lock(&self.live).entries[self.number] = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
