//! Memory of a device, as tensors see it.

use std::fmt::Debug;

use crate::error::Result;

/// A piece of a device's memory, given back when dropped. Copies keep the order of the device's launches.
pub trait DeviceMemory: Debug + Send + Sync {
    /// Where it begins, on the device.
    fn address(&self) -> u64;

    /// Its length in bytes.
    fn num_bytes(&self) -> usize;

    /// Copies `out.len()` bytes from `offset` on to `out`, after everything launched before.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::error::Error::Kernel) if they leave the memory, or an earlier launch failed.
    fn read(&self, offset: usize, out: &mut [u8]) -> Result<()>;

    /// Copies `bytes` to `offset`; they may be changed once this returns.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<()>;

    /// Zeroes `num_bytes` from `offset` on.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn zero(&self, offset: usize, num_bytes: usize) -> Result<()>;
}
