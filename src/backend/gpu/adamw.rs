//! `AdamW` over the flat arena: launchers.

use std::sync::Arc;

use super::driver::{Driver, Grid, Kernel};
use super::params::{
    ADAMW_BLOCKSIZE, ADAMW_CELLS, ADAMW_ELEMENTS_PER_BLOCK, ADAMW_FIRST_CELL, ADAMW_THREADS,
    AdamW8UpdateParams, AdamWDecideParams, AdamWReportDevice, AdamWStepDevice, AdamWSumsParams,
    AdamWUpdateParams,
};
use super::{Gpu, check};
use crate::error::Result;
use crate::ops::dynamic_map::{FIRST_CELL, NUM_CELLS, SIGNED, UNSIGNED};
use crate::ops::{AdamWStep, MOMENTS_BLOCKSIZE, Moments, UpdateReport};
use crate::tensor::device::DeviceMemory;
use crate::tensor::{DType, Tensor};

const OP: &str = "adamw";
const SUMS: Kernel = kernel("adamw_sums");
const DECIDE: Kernel = kernel("adamw_decide");
const UPDATE: Kernel = kernel("adamw_update");
const UPDATE8: Kernel = kernel("adamw8_update");
const ELEMENTS_PER_BLOCK: usize = ADAMW_ELEMENTS_PER_BLOCK as usize;
/// Cells of a map on the device, padded.
const CELLS: usize = ADAMW_CELLS as usize;
const _: () = assert!(MOMENTS_BLOCKSIZE == ADAMW_BLOCKSIZE as usize);
const _: () = assert!(NUM_CELLS <= CELLS && FIRST_CELL == ADAMW_FIRST_CELL);

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        name,
        threads: ADAMW_THREADS,
    }
}

/// What an update is told and what it tells.
#[derive(Debug)]
pub(super) struct Buffers {
    step: Arc<dyn DeviceMemory>,
    report: Arc<dyn DeviceMemory>,
    /// Codes and borders, `[2, 2, 256]` f32: those of the signed map, then those of the unsigned one.
    maps: Arc<dyn DeviceMemory>,
    /// `[2, ADAMW_CELLS]` u8, in the same order.
    cells: Arc<dyn DeviceMemory>,
}

impl Buffers {
    pub(super) fn new(driver: &dyn Driver) -> Result<Self> {
        let (mut tables, mut cells) = (Vec::new(), Vec::new());
        for map in [&*SIGNED, &*UNSIGNED] {
            tables.extend(map.code.iter().chain(&map.border).copied());
            cells.extend(map.cell);
            cells.resize(cells.len().next_multiple_of(CELLS), 0);
        }
        let upload = |name: &str, bytes: &[u8]| {
            let memory = driver.alloc(name, bytes.len())?;
            memory.write(0, bytes).map(|()| memory)
        };
        Ok(Self {
            step: driver.alloc("adamw step", size_of::<AdamWStepDevice>())?,
            report: driver.alloc("adamw report", size_of::<AdamWReportDevice>())?,
            maps: upload("dynamic maps", bytemuck::cast_slice(&tables))?,
            cells: upload("cells of dynamic maps", &cells)?,
        })
    }
}

#[expect(clippy::needless_pass_by_ref_mut, reason = "kernels write them")]
pub(super) fn step(
    gpu: &Gpu,
    params: &mut Tensor,
    moments: &mut Moments,
    grads: &mut Tensor,
    token_loss: &Tensor,
    step: AdamWStep,
) -> Result<UpdateReport> {
    check::multiple(OP, "parameters", params.len(), MOMENTS_BLOCKSIZE)?;
    let grads = check::exact(OP, grads, DType::F32, params.shape())?;
    let losses = check::rows(OP, token_loss, DType::F32, 1)?;
    let buffers = &gpu.adamw;
    if !gpu.is_planning() {
        buffers
            .step
            .write(0, bytemuck::bytes_of(&device_step(step)))?;
    }
    let num_square_sums = params.len().div_ceil(ELEMENTS_PER_BLOCK);
    let num_loss_sums = losses.capacity.div_ceil(ELEMENTS_PER_BLOCK);
    let num_sums = num_square_sums + num_loss_sums;
    let mut frame = gpu.scratch.frame();
    let partial_sums = frame.take("partial sums", num_sums * size_of::<f64>())?;
    let sums = AdamWSumsParams {
        partial_sums,
        grads,
        token_loss: losses.address,
        num_elements: params.len() as u64,
        num_losses: losses.capacity as u64,
    };
    let grid = Grid::line(check::to_u32(OP, "partial sums", num_sums)?);
    gpu.launch(SUMS, grid, &sums)?;
    let decide = AdamWDecideParams {
        report: buffers.report.address(),
        partial_sums,
        step: buffers.step.address(),
        num_square_sums: num_square_sums as u64,
        num_loss_sums: num_loss_sums as u64,
    };
    gpu.launch(DECIDE, Grid::line(1), &decide)?;
    let grid = Grid::line(check::to_u32(OP, "blocks", num_square_sums)?);
    launch_update(gpu, grid, params, moments, grads)?;
    report(gpu)
}

fn launch_update(
    gpu: &Gpu,
    grid: Grid,
    params: &Tensor,
    moments: &Moments,
    grads: u64,
) -> Result<()> {
    let shape = params.shape();
    let (params_f32, params_bf16) = if params.dtype() == DType::Bf16 {
        (0, check::exact(OP, params, DType::Bf16, shape)?)
    } else {
        (check::exact(OP, params, DType::F32, shape)?, 0)
    };
    let (step, report) = (gpu.adamw.step.address(), gpu.adamw.report.address());
    let num_elements = params.len() as u64;
    match moments {
        Moments::F32 {
            exp_avg,
            exp_avg_sq,
        } => {
            let update = AdamWUpdateParams {
                params: params_f32,
                params_bf16,
                grads,
                exp_avg: check::exact(OP, exp_avg, DType::F32, shape)?,
                exp_avg_sq: check::exact(OP, exp_avg_sq, DType::F32, shape)?,
                step,
                report,
                num_elements,
            };
            gpu.launch(UPDATE, grid, &update)
        }
        Moments::Blockwise8 {
            exp_avg,
            exp_avg_absmax,
            exp_avg_sq,
            exp_avg_sq_absmax,
        } => {
            let scales = [params.len() / MOMENTS_BLOCKSIZE];
            let update = AdamW8UpdateParams {
                params: params_f32,
                params_bf16,
                grads,
                exp_avg: check::exact(OP, exp_avg, DType::U8, shape)?,
                exp_avg_absmax: check::exact(OP, exp_avg_absmax, DType::F32, &scales)?,
                exp_avg_sq: check::exact(OP, exp_avg_sq, DType::U8, shape)?,
                exp_avg_sq_absmax: check::exact(OP, exp_avg_sq_absmax, DType::F32, &scales)?,
                maps: gpu.adamw.maps.address(),
                cells: gpu.adamw.cells.address(),
                step,
                report,
                num_elements,
            };
            gpu.launch(UPDATE8, grid, &update)
        }
    }
}

fn device_step(step: AdamWStep) -> AdamWStepDevice {
    let constants = step.constants();
    let [rounding_key_low, rounding_key_high] = constants.rounding_key;
    AdamWStepDevice {
        max_grad_norm: step.max_grad_norm,
        decay: constants.decay,
        weight1: constants.weight1,
        beta2: constants.beta2,
        weight2: constants.weight2,
        step_size: constants.step_size,
        root_bias: constants.root_bias,
        epsilon: constants.epsilon,
        step: constants.step,
        rounding_key_low,
        rounding_key_high,
    }
}

/// Waits for the device.
fn report(gpu: &Gpu) -> Result<UpdateReport> {
    let mut found = AdamWReportDevice::default();
    if !gpu.is_planning() {
        gpu.adamw
            .report
            .read(0, bytemuck::bytes_of_mut(&mut found))?;
    }
    Ok(UpdateReport {
        loss_sum: found.loss_sum,
        grad_norm: found.grad_norm,
        applied: found.applied == 1,
    })
}
