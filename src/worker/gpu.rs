//! How busy the GPU is, through NVML; where that is not there, nobody knows.

use nvml_wrapper::Nvml;

/// The machine's first GPU.
#[derive(Debug, Default)]
pub struct Gpu {
    nvml: Option<Nvml>,
}

impl Gpu {
    /// Opens NVML, if it is there.
    pub fn open() -> Self {
        let nvml = Nvml::init().ok();
        Self { nvml }
    }

    /// Busy share over the last moments, in percent.
    pub fn utilization(&self) -> Option<f64> {
        let device = self.nvml.as_ref()?.device_by_index(0).ok()?;
        let rates = device.utilization_rates().ok()?;
        Some(f64::from(rates.gpu))
    }

    /// Name, all memory in bytes, and the driver's version, for a person.
    pub fn describe(&self) -> Option<String> {
        let nvml = self.nvml.as_ref()?;
        let device = nvml.device_by_index(0).ok()?;
        let memory = device.memory_info().ok()?.total as f64 / 1e9;
        let (name, driver) = (device.name().ok()?, nvml.sys_driver_version().ok()?);
        let is_part = device.mig_mode().is_ok_and(|mode| mode.current != 0);
        let part = if is_part {
            ", cut into parts (MIG)"
        } else {
            ""
        };
        Some(format!("{name} with {memory:.1} GB{part}, driver {driver}"))
    }
}
