//! The CUDA kernels: params, launchers, and the devices that run them.
//!
//! A kernel is written once (`kernels/*.cu`) and runs on two drivers: CUDA, and the emulated device, which runs the very same
//! source on the CPU so that kernels and launchers are tested without a GPU.

pub mod driver;
pub mod params;
