//! Devices that run the ops.

pub mod cpu;
pub mod gpu;

use self::gpu::driver::DeviceInfo;
use crate::config::{Device, Env};
use crate::error::{Error, Result};
use crate::ops::Ops;

/// A device that was opened.
#[derive(Debug)]
pub struct Opened {
    /// Its ops.
    pub ops: Box<dyn Ops>,
    /// Which it is, and why, for a person.
    pub note: String,
    /// What it is, where it runs the CUDA kernels.
    pub info: Option<DeviceInfo>,
}

/// Opens the device a run asked for.
///
/// # Errors
/// [`Error::Unsupported`] for a device that is not there, or that this build has no kernels for.
pub fn open(device: Device, env: &Env) -> Result<Opened> {
    match device {
        Device::Cpu => Ok(open_cpu("")),
        Device::Emu => open_emu(),
        Device::Cuda(ordinal) => open_cuda(ordinal, env).map_err(with_advice),
        Device::Auto => match open_cuda(0, env) {
            Err(Error::Unsupported { why, .. }) => Ok(open_cpu(&format!(", as {why}"))),
            opened => opened,
        },
    }
}

/// Where CUDA was asked for and is not there, how to do without.
fn with_advice(error: Error) -> Error {
    if let Error::Unsupported { what, why } = error {
        let why = format!("{why}; `device: cpu` does without");
        return Error::Unsupported { what, why };
    }
    error
}

fn open_cpu(why: &str) -> Opened {
    Opened {
        ops: Box::new(cpu::Cpu::new()),
        note: format!("device: cpu{why}"),
        info: None,
    }
}

#[cfg(kernels_emu)]
fn open_emu() -> Result<Opened> {
    use self::gpu::driver::Driver as _;
    use self::gpu::driver::emu::{Emu, Order};
    let driver = std::sync::Arc::new(Emu::new(Order::Forward));
    let info = Some(driver.info());
    Ok(Opened {
        ops: Box::new(gpu::Gpu::new(driver)?),
        note: "device: emu, the CUDA kernels on the CPU (slow, for tests)".to_owned(),
        info,
    })
}

#[cfg(not(kernels_emu))]
fn open_emu() -> Result<Opened> {
    Err(no_emu())
}

/// This build has no emulated device.
#[cfg(not(kernels_emu))]
pub(crate) fn no_emu() -> Error {
    Error::Unsupported {
        what: "device `emu`".to_owned(),
        why: "this build is without the feature `emu`; build with it, or use `device: cpu`"
            .to_owned(),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize, env: &Env) -> Result<Opened> {
    use self::gpu::driver::Driver as _;
    let driver = gpu::driver::cuda::Cuda::open(ordinal, env.synchronous)?;
    let info = driver.info();
    let free = driver.free_memory()?.unwrap_or(0);
    let (major, minor) = info.capability;
    let note = format!(
        "device: cuda:{ordinal}, {} (capability {major}.{minor}, {} multiprocessors, {:.1} GB free)",
        info.name,
        info.num_multiprocessors,
        free as f64 / 1e9
    );
    Ok(Opened {
        ops: Box::new(gpu::Gpu::new(std::sync::Arc::new(driver))?),
        note,
        info: Some(info),
    })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize, _: &Env) -> Result<Opened> {
    Err(Error::Unsupported {
        what: "device `cuda`".to_owned(),
        why: "this build is without the feature `cuda`".to_owned(),
    })
}
