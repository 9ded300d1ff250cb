//! The emulated device: the kernels, compiled for the CPU, run block by block (`kernels/rt/emu.h`).
//!
//! Memory starts as NaN and lies between guard bands that every launch checks. Blocks are spread over the cores.
#![expect(
    unsafe_code,
    reason = "calls compiled kernels, which read and write the addresses in their params"
)]

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::{ALIGNMENT, DeviceInfo, Driver, Grid, Kernel, Recording};
use crate::error::{Error, Result};
use crate::tensor::device::DeviceMemory;

const GUARD_BYTES: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// f32 and bf16 of these bits are NaN.
const NAN_BYTE: u8 = 0xff;
const ERROR_BYTES: usize = 512;
/// Blocks that one task runs at least.
const MIN_BLOCKS_PER_TASK: u64 = 4;

/// A launch, as `kernels/rt/emu.h` declares it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared_bytes: u32,
    order: u32,
    params: *const u8,
}

// SAFETY: the params are read, by all blocks, and outlive the launch.
unsafe impl Sync for Launch {}

type Entry = unsafe extern "C" fn(*const Launch, u64, u64, *mut u8, usize) -> i32;

include!(concat!(env!("OUT_DIR"), "/emu_kernels.rs"));

unsafe extern "C" {
    /// Marks bytes that kernels may not touch, where the build is sanitized.
    fn brightrun_emu_guard(at: *mut u8, num_bytes: usize, on: i32);
}

/// Order in which the threads of a block go on after they waited. Results must not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Thread 0 first.
    Forward,
    /// Thread 0 last.
    Reversed,
    /// Shuffled anew each time.
    Shuffled(u32),
}

/// The emulated device.
#[derive(Debug, Clone)]
pub struct Emu {
    order: Order,
    live: Arc<Mutex<Live>>,
    /// What is being recorded.
    recorded: Arc<Mutex<Option<Vec<Work>>>>,
}

/// Something the device is told to do.
#[derive(Debug, Clone)]
enum Work {
    Launch {
        kernel: Kernel,
        grid: Grid,
        params: Vec<u8>,
    },
    Zero {
        address: u64,
        num_bytes: usize,
    },
}

/// Work to be done again.
#[derive(Debug)]
struct EmuRecording {
    device: Emu,
    work: Vec<Work>,
}

impl Recording for EmuRecording {
    fn replay(&self) -> Result<()> {
        self.work.iter().try_for_each(|work| self.device.run(work))
    }
}

/// Address to name and length of all live memory.
type Live = BTreeMap<usize, (String, usize)>;

impl Emu {
    /// A device whose threads go on in `order`.
    pub fn new(order: Order) -> Self {
        Self {
            order,
            live: Arc::default(),
            recorded: Arc::default(),
        }
    }

    /// Name and bytes of all live memory, by name.
    pub fn ledger(&self) -> Vec<(String, usize)> {
        let mut ledger: Vec<_> = lock(&self.live).values().cloned().collect();
        ledger.sort();
        ledger
    }

    /// Names of all kernels.
    pub fn kernels() -> impl Iterator<Item = &'static str> {
        KERNELS.iter().map(|(name, _)| *name)
    }

    /// Does it, or keeps it where a recording is being made.
    fn submit(&self, work: Work) -> Result<()> {
        if let Some(recorded) = &mut *lock(&self.recorded) {
            recorded.push(work);
            return Ok(());
        }
        self.run(&work)
    }

    fn run(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch {
                kernel,
                grid,
                params,
            } => self.run_kernel(*kernel, *grid, params),
            Work::Zero { address, num_bytes } => self.run_zero(*address, *num_bytes),
        }
    }

    fn run_zero(&self, address: u64, num_bytes: usize) -> Result<()> {
        let start = usize::try_from(address).unwrap_or(usize::MAX);
        let live = lock(&self.live);
        let around = live.range(..=start).next_back();
        let fits = around
            .is_some_and(|(base, (_, length))| start.saturating_add(num_bytes) <= base + length);
        if !fits {
            return Err(kernel_error("zero", "leaves live memory"));
        }
        let at: *mut u8 = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: the range lies in live memory, whose address was exposed in `alloc`.
        unsafe { std::ptr::write_bytes(at, 0, num_bytes) };
        Ok(())
    }

    fn run_kernel(&self, kernel: Kernel, grid: Grid, params: &[u8]) -> Result<()> {
        let entry = KERNELS.iter().find(|(name, _)| *name == kernel.name);
        let (_, entry) =
            *entry.ok_or_else(|| kernel_error(kernel.name, "there is no such kernel"))?;
        // Params structs hold addresses: eight bytes is their alignment.
        let aligned: Vec<u64> = params
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_ne_bytes(word)
            })
            .collect();
        let launch = Launch {
            grid: grid.blocks,
            block: [kernel.threads, 1, 1],
            dynamic_shared_bytes: grid.dynamic_shared_bytes,
            order: match self.order {
                Order::Forward => 0,
                Order::Reversed => 1,
                Order::Shuffled(seed) => seed.max(2),
            },
            params: aligned.as_ptr().cast(),
        };
        let num_blocks: u64 = grid
            .blocks
            .iter()
            .map(|blocks| u64::from(*blocks))
            .product();
        let share = num_blocks.div_ceil(4 * rayon::current_num_threads() as u64);
        let share = share.max(MIN_BLOCKS_PER_TASK);
        (0..num_blocks.div_ceil(share))
            .into_par_iter()
            .try_for_each(|task| {
                let first = task * share;
                let count = share.min(num_blocks - first);
                let mut error = [0u8; ERROR_BYTES];
                // SAFETY: the entry is a kernel compiled with this signature; `launch` and its params live until it returns;
                // that the addresses in the params are live and large enough is the launcher's duty (see `Driver::launch`).
                let failed = unsafe {
                    entry(
                        &raw const launch,
                        first,
                        count,
                        error.as_mut_ptr(),
                        ERROR_BYTES,
                    )
                };
                if failed == 0 {
                    return Ok(());
                }
                let end = error
                    .iter()
                    .position(|byte| *byte == 0)
                    .unwrap_or(ERROR_BYTES);
                Err(Error::Kernel {
                    reason: String::from_utf8_lossy(&error[..end]).into_owned(),
                })
            })?;
        self.check_guards(kernel.name)
    }

    /// Checks the guard bands of all live memory.
    fn check_guards(&self, kernel: &str) -> Result<()> {
        let live = lock(&self.live);
        for (address, (name, num_bytes)) in live.iter() {
            for start in [address - GUARD_BYTES, address + num_bytes] {
                // SAFETY: the bands lie in the allocation, which is live as long as it is in the table, and were written.
                let band = unsafe { std::slice::from_raw_parts(start as *const u8, GUARD_BYTES) };
                if band.iter().any(|byte| *byte != GUARD_BYTE) {
                    let end = if start < *address { "before" } else { "beyond" };
                    return Err(kernel_error(
                        kernel,
                        &format!("wrote {end} `{name}` of {num_bytes} bytes"),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Memory of the emulated device: `[guard | bytes | guard]`.
#[derive(Debug)]
pub struct EmuMemory {
    base: *mut u8,
    layout: Layout,
    num_bytes: usize,
    live: Arc<Mutex<Live>>,
    recorded: Arc<Mutex<Option<Vec<Work>>>>,
}

// SAFETY: it owns its allocation, which nothing else frees; kernels and copies reach it only through the driver.
unsafe impl Send for EmuMemory {}
// SAFETY: through a shared reference it is only read, and copied from.
unsafe impl Sync for EmuMemory {}

impl EmuMemory {
    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(GUARD_BYTES)
    }

    fn check_copy(&self, offset: usize, num_bytes: usize) -> Result<()> {
        if lock(&self.recorded).is_some() {
            return Err(Error::Kernel {
                reason: "a copy inside a recording".to_owned(),
            });
        }
        let end = offset.checked_add(num_bytes);
        if end.is_some_and(|end| end <= self.num_bytes) {
            return Ok(());
        }
        Err(Error::Kernel {
            reason: format!(
                "copy of {num_bytes} bytes at {offset}, the memory has {}",
                self.num_bytes
            ),
        })
    }

    fn guard(&self, on: bool) {
        let after = self.start().wrapping_add(self.num_bytes);
        for band in [self.base, after] {
            // SAFETY: both bands lie in the allocation; they hold nothing that this program reads through a reference
            // while kernels run.
            unsafe { brightrun_emu_guard(band, GUARD_BYTES, i32::from(on)) };
        }
    }
}

impl DeviceMemory for EmuMemory {
    fn address(&self) -> u64 {
        self.start().addr() as u64
    }

    fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.check_copy(offset, out.len())?;
        let from = self.start().wrapping_add(offset);
        // SAFETY: checked to lie in the memory; all its bytes were written in `alloc`.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check_copy(offset, bytes.len())?;
        let to = self.start().wrapping_add(offset);
        // SAFETY: checked to lie in the memory, which is this device's own, so it does not overlap `bytes`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    fn zero(&self, offset: usize, num_bytes: usize) -> Result<()> {
        self.check_copy(offset, num_bytes)?;
        let at = self.start().wrapping_add(offset);
        // SAFETY: checked to lie in the memory.
        unsafe { std::ptr::write_bytes(at, 0, num_bytes) };
        Ok(())
    }
}

impl Drop for EmuMemory {
    fn drop(&mut self) {
        let mut live = lock(&self.live);
        live.remove(&self.start().addr());
        self.guard(false);
        // SAFETY: allocated with this layout in `alloc`, freed once.
        unsafe { dealloc(self.base, self.layout) };
    }
}

impl Driver for Emu {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "the emulated device".to_owned(),
            // As many as an H100 has: what a launcher chooses by their number is what runs there.
            num_multiprocessors: 132,
            // The smallest GPU that the large tiles are made for: an A100.
            capability: (8, 0),
        }
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Each buffer keeps its own guard bands.
    fn reserve(&self, _: &str, _: usize) -> Result<()> {
        Ok(())
    }

    fn check(&self, kernel: Kernel, grid: Grid) -> Result<()> {
        self.info().check(kernel, grid)
    }

    fn alloc(&self, name: &str, num_bytes: usize) -> Result<Arc<dyn DeviceMemory>> {
        if lock(&self.recorded).is_some() {
            return Err(Error::Kernel {
                reason: format!("`{name}` allocated inside a recording"),
            });
        }
        let refuse = || Error::OutOfMemory {
            reason: format!("`{name}` of {num_bytes} bytes does not fit into memory"),
        };
        let total = num_bytes.checked_add(2 * GUARD_BYTES).ok_or_else(refuse)?;
        let layout = Layout::from_size_align(total, ALIGNMENT).map_err(|_| refuse())?;
        // SAFETY: the size is at least that of the guard bands, not zero.
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            return Err(refuse());
        }
        // SAFETY: `base` was just allocated with `total` bytes.
        let whole = unsafe { std::slice::from_raw_parts_mut(base.cast(), total) };
        for (at, byte) in whole.iter_mut().enumerate() {
            let is_guard = at < GUARD_BYTES || at >= GUARD_BYTES + num_bytes;
            *byte = std::mem::MaybeUninit::new(if is_guard { GUARD_BYTE } else { NAN_BYTE });
        }
        let memory = EmuMemory {
            base,
            layout,
            num_bytes,
            live: Arc::clone(&self.live),
            recorded: Arc::clone(&self.recorded),
        };
        memory.guard(true);
        let mut live = lock(&self.live);
        live.insert(
            memory.start().expose_provenance(),
            (name.to_owned(), num_bytes),
        );
        drop(live);
        Ok(Arc::new(memory))
    }

    fn launch(&self, kernel: Kernel, grid: Grid, params: &[u8]) -> Result<()> {
        self.check(kernel, grid)?;
        self.submit(Work::Launch {
            kernel,
            grid,
            params: params.to_vec(),
        })
    }

    fn zero(&self, address: u64, num_bytes: usize) -> Result<()> {
        self.submit(Work::Zero { address, num_bytes })
    }

    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        *lock(&self.recorded) = Some(Vec::new());
        let result = body();
        let work = lock(&self.recorded).take().unwrap_or_default();
        result?;
        Ok(Box::new(EmuRecording {
            device: self.clone(),
            work,
        }))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

fn kernel_error(kernel: &str, what: &str) -> Error {
    Error::Kernel {
        reason: format!("kernel {kernel}: {what}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
