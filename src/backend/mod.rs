//! Devices that run the ops.

pub mod cpu;
pub mod gpu;

use crate::config::Device;
use crate::error::{Error, Result};
use crate::ops::Ops;

/// Opens the device a run asked for.
///
/// # Errors
/// [`Error::Unsupported`] for a device this build has no kernels for.
pub fn open(device: Device) -> Result<Box<dyn Ops>> {
    match device {
        Device::Auto | Device::Cpu => Ok(Box::new(cpu::Cpu::new())),
        Device::Emu | Device::Cuda(_) => Err(Error::Unsupported {
            what: "device `cuda` (and `emu`)".to_owned(),
            why: "this build has no CUDA kernels; use `device: cpu` or `auto`".to_owned(),
        }),
    }
}
