//! What a device must do: memory, launches, recordings.

#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(kernels_emu)]
pub mod emu;
pub mod planned;

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::device::DeviceMemory;

/// Alignment of memory, in bytes: what CUDA gives.
pub const ALIGNMENT: usize = 256;

/// A kernel: its name in `kernels/*.cu` and the threads of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Name.
    pub name: &'static str,
    /// Threads of a block; the kernel is made for this number.
    pub threads: u32,
}

/// Blocks of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along each axis.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub dynamic_shared_bytes: u32,
}

impl Grid {
    /// `x` blocks in a row.
    pub fn line(x: u32) -> Self {
        Self::plane(x, 1)
    }

    /// `x` by `y` blocks.
    pub fn plane(x: u32, y: u32) -> Self {
        Self::volume(x, y, 1)
    }

    /// `x` by `y` by `z` blocks.
    pub fn volume(x: u32, y: u32, z: u32) -> Self {
        Self {
            blocks: [x, y, z],
            dynamic_shared_bytes: 0,
        }
    }

    /// The same blocks with `num_bytes` of dynamic shared memory each.
    #[must_use]
    pub fn with_shared(self, num_bytes: u32) -> Self {
        Self {
            dynamic_shared_bytes: num_bytes,
            ..self
        }
    }
}

/// Blocks a grid may have along its second and third axis, on every CUDA device.
const MAX_BLOCKS_ACROSS: u32 = 65_535;

impl Grid {
    /// Refuses what no device launches.
    fn check(self, kernel: Kernel) -> Result<()> {
        let [_, y, z] = self.blocks;
        if y.max(z) <= MAX_BLOCKS_ACROSS {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!(
                "kernel {} with a grid of {:?} blocks",
                kernel.name, self.blocks
            ),
            why: format!(
                "a grid has at most {MAX_BLOCKS_ACROSS} along its second and third axis; use fewer tokens per micro-batch"
            ),
        })
    }
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Streaming multiprocessors.
    pub num_multiprocessors: u32,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
}

impl DeviceInfo {
    /// Shared memory that a block may have, in bytes.
    pub fn max_shared_bytes(&self) -> u32 {
        const KIB: u32 = 1024;
        match self.capability {
            _ if self.is_desktop() => 99 * KIB,
            (8, _) => 163 * KIB,
            _ => 227 * KIB,
        }
    }

    /// Refuses a launch that such a device does not take.
    fn check(&self, kernel: Kernel, grid: Grid) -> Result<()> {
        grid.check(kernel)?;
        let limit = self.max_shared_bytes();
        if grid.dynamic_shared_bytes <= limit {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!(
                "kernel {} with {} bytes of shared memory",
                kernel.name, grid.dynamic_shared_bytes
            ),
            why: format!("a block has at most {limit} on {}", self.name),
        })
    }

    /// Whether it is a GPU for desktops, whose blocks have at most 99 KB of shared memory.
    pub fn is_desktop(&self) -> bool {
        matches!(self.capability, (8, 6 | 9) | (12, _))
    }
}

/// Launches that were recorded, to be made again.
pub trait Recording: Debug + Send + Sync {
    /// Makes all of them, in order.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    fn replay(&self) -> Result<()>;
}

/// A device. Everything it is told to do happens in order; only reads of memory, [`Self::synchronize`] and the first error
/// wait for it.
pub trait Driver: Debug + Send + Sync {
    /// What it is.
    fn info(&self) -> DeviceInfo;

    /// Free bytes of its memory; `None` where it is the host's.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    fn free_memory(&self) -> Result<Option<u64>>;

    /// `num_bytes` of memory, not initialised; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn alloc(&self, name: &str, num_bytes: usize) -> Result<Arc<dyn DeviceMemory>>;

    /// All of the next allocations, `num_bytes` in all with each one's length rounded up to [`ALIGNMENT`], come from one; a device
    /// that looks after each of them for itself does nothing here.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn reserve(&self, name: &str, num_bytes: usize) -> Result<()>;

    /// Whether it could launch `kernel` like this.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the limit.
    fn check(&self, kernel: Kernel, grid: Grid) -> Result<()>;

    /// Launches `kernel` with the bytes of its params struct. The addresses in `params` must be of live memory of this
    /// device that is large enough for what the kernel's header says; launchers check that.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    fn launch(&self, kernel: Kernel, grid: Grid, params: &[u8]) -> Result<()>;

    /// Zeroes `num_bytes` from `address` on, which must lie in live memory of this device.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    fn zero(&self, address: u64, num_bytes: usize) -> Result<()>;

    /// Records the launches and zeroings that `body` asks for, without making them. `body` copies nothing.
    ///
    /// # Errors
    /// Those of `body`; [`Error::Kernel`].
    fn record(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>>;

    /// Waits for everything launched.
    ///
    /// # Errors
    /// [`Error::Kernel`] naming the launch that failed.
    fn synchronize(&self) -> Result<()>;
}
