//! The GPU: every op as a launch of hand-written kernels. Launchers check what a kernel assumes, fill its params struct and
//! compute its grid; they are the same for CUDA and for the emulated device, which runs the very same kernels on the CPU.
//!
//! One file per op family, as in `backend/cpu`; `ops.rs` maps `Ops` onto them.
#![expect(
    clippy::needless_pass_by_ref_mut,
    reason = "outputs are `&mut`: they are written, on the device, through their address"
)]

pub mod driver;
pub mod params;

mod adamw;
mod attention;
mod check;
mod cross_entropy;
mod delta_inputs;
mod elementwise;
mod gated_delta;
mod gated_norm;
mod linear;
mod lora;
mod moe;
pub mod nf4;
mod norm;
mod ops;
mod place;
mod rope;
mod route;
mod scratch;
mod step;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;

use bytemuck::Pod;

use self::driver::{Driver, Grid, Kernel, Recording};
use self::scratch::Scratch;
use self::step::{Limits, StepBuffers};
use crate::error::{Error, Result};
use crate::ops::StepState;
use crate::store::nf4::dynamic;
use crate::tensor::device::DeviceMemory;

/// A GPU, or the emulated device.
#[derive(Debug)]
pub struct Gpu {
    driver: Arc<dyn Driver>,
    /// `[256]` f32: values of the codes of nested scales.
    dynamic_code: Arc<dyn DeviceMemory>,
    step: RefCell<Option<StepBuffers>>,
    limits: Cell<Limits>,
    adamw: adamw::Buffers,
    scratch: Scratch,
    recordings: RefCell<BTreeMap<&'static str, Box<dyn Recording>>>,
}

impl Gpu {
    /// The ops on `driver`.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self> {
        let dynamic_code = driver.alloc("dynamic code", size_of_val(&dynamic::CODE))?;
        dynamic_code.write(0, bytemuck::cast_slice(&dynamic::CODE))?;
        Ok(Self {
            dynamic_code,
            step: RefCell::new(None),
            limits: Cell::default(),
            adamw: adamw::Buffers::new(&*driver)?,
            scratch: Scratch::new(Arc::clone(&driver)),
            recordings: RefCell::default(),
            driver,
        })
    }

    /// The device.
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// Address of the values of nested scales' codes, `[256]` f32.
    fn dynamic_code(&self) -> u64 {
        self.dynamic_code.address()
    }

    /// Address of the `StepStateDevice` of the loaded batch.
    fn step(&self) -> Result<u64> {
        match &*self.step.borrow() {
            _ if self.is_planning() => Ok(0),
            Some(step) => Ok(step.address()),
            None => Err(Error::Kernel {
                reason: "an op was called before `load_batch`".to_owned(),
            }),
        }
    }

    /// Refuses `state` where its numbers reach past `table`. What is planned is recorded later, and then made without its
    /// launchers: there `load_batch` refuses.
    fn limit(&self, table: Limits, state: &StepState) -> Result<()> {
        if self.is_planning() {
            self.limits.set(self.limits.get().and(table));
        }
        table.check(state)
    }

    /// Whether ops only tell what scratch they need.
    fn is_planning(&self) -> bool {
        self.scratch.is_planning()
    }

    /// Launches `kernel`; nothing for an empty grid.
    fn launch<P: Pod>(&self, kernel: Kernel, grid: Grid, params: &P) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        if self.is_planning() {
            return self.driver.check(kernel, grid);
        }
        self.driver.launch(kernel, grid, bytemuck::bytes_of(params))
    }

    /// Zeroes `num_bytes` from `address` on.
    fn zero(&self, address: u64, num_bytes: usize) -> Result<()> {
        if self.is_planning() || num_bytes == 0 {
            return Ok(());
        }
        self.driver.zero(address, num_bytes)
    }
}
