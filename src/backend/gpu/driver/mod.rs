//! What a device must do: memory, copies, launches.

#[cfg(kernels_emu)]
pub mod emu;

use std::fmt::Debug;

use bytemuck::Pod;

use crate::error::Result;

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
        Self {
            blocks: [x, y, 1],
            dynamic_shared_bytes: 0,
        }
    }
}

/// A piece of a device's memory, given back when dropped.
pub trait Memory: Debug + Send + Sync {
    /// Where it begins, on the device.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn num_bytes(&self) -> usize;
}

/// A device.
pub trait Driver: Debug + Send + Sync {
    /// Memory of the device.
    type Memory: Memory;

    /// `num_bytes` of memory, not initialised; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::error::Error::OutOfMemory).
    fn alloc(&self, name: &str, num_bytes: usize) -> Result<Self::Memory>;

    /// Copies `bytes` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::error::Error::Kernel) if they do not fit, or an earlier launch failed.
    fn upload(&self, to: &mut Self::Memory, bytes: &[u8]) -> Result<()>;

    /// Copies the start of `from` to `out`, after everything launched before.
    ///
    /// # Errors
    /// As [`Self::upload`].
    fn download(&self, from: &Self::Memory, out: &mut [u8]) -> Result<()>;

    /// Launches `kernel`. The addresses in `params` must be of live memory of this device that is large enough for what the
    /// kernel's header says; launchers check that.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::error::Error::Kernel).
    fn launch<P: Pod>(&self, kernel: Kernel, grid: Grid, params: &P) -> Result<()>;

    /// Waits for everything launched.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::error::Error::Kernel) naming the launch that failed.
    fn synchronize(&self) -> Result<()>;
}
