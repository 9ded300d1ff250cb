//! RMS norms: launchers.

use super::driver::{Grid, Kernel};
use super::params::{
    RMS_NORM_NARROW_COLUMNS, RMS_NORM_NARROW_THREADS, RMS_NORM_THREADS, RmsNormBackwardParams,
    RmsNormForwardParams,
};
use super::{Gpu, check};
use crate::error::Result;
use crate::ops::{GradOut, NormSpec, StepState};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = Kernel {
    name: "rms_norm_forward",
    threads: RMS_NORM_THREADS,
};
const BACKWARD: Kernel = Kernel {
    name: "rms_norm_backward",
    threads: RMS_NORM_THREADS,
};
const FORWARD_NARROW: Kernel = Kernel {
    name: "rms_norm_forward_narrow",
    threads: RMS_NORM_NARROW_THREADS,
};
const BACKWARD_NARROW: Kernel = Kernel {
    name: "rms_norm_backward_narrow",
    threads: RMS_NORM_NARROW_THREADS,
};

/// The one of two kernels that rows of `width` columns take.
fn by_width(width: usize, wide: Kernel, narrow: Kernel) -> Kernel {
    if width > RMS_NORM_NARROW_COLUMNS as usize {
        wide
    } else {
        narrow
    }
}

/// What is added to a stored weight.
fn weight_offset(spec: NormSpec) -> f32 {
    if spec.zero_centered { 1.0 } else { 0.0 }
}

pub(super) fn forward(
    gpu: &Gpu,
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    launch_forward(gpu, "rms_norm_forward", out, rstd, x, None, weight, spec)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn add_forward(
    gpu: &Gpu,
    sum: &mut Tensor,
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    let add = Some((sum, delta));
    launch_forward(gpu, "add_rms_norm_forward", out, rstd, x, add, weight, spec)
}

/// `add`: where `x + delta` goes, and `delta`.
fn launch_forward(
    gpu: &Gpu,
    op: &'static str,
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    add: Option<(&mut Tensor, &Tensor)>,
    weight: &Tensor,
    spec: NormSpec,
) -> Result<()> {
    let hidden = weight.len();
    check::multiple(op, "hidden_size", hidden, 8)?;
    let out = check::rows(op, out, DType::Bf16, hidden)?;
    let shape = [out.capacity, hidden];
    let (sum, delta) = match add {
        None => (0, 0),
        Some((sum, delta)) => (
            check::rows_of(op, sum, DType::Bf16, shape)?,
            check::rows_of(op, delta, DType::Bf16, shape)?,
        ),
    };
    let params = RmsNormForwardParams {
        out: out.address,
        rstd: check::rows_of(op, rstd, DType::F32, [out.capacity, 1])?,
        sum,
        x: check::rows_of(op, x, DType::Bf16, shape)?,
        delta,
        weight: check::exact(op, weight, DType::F32, &[hidden])?,
        step: gpu.step()?,
        hidden_size: check::to_u32(op, "hidden_size", hidden)?,
        eps: spec.eps,
        weight_offset: weight_offset(spec),
        reserved: 0,
    };
    let grid = Grid::line(check::to_u32(op, "capacity", out.capacity)?);
    let kernel = by_width(hidden, FORWARD, FORWARD_NARROW);
    gpu.launch(kernel, grid, &params)
}

pub(super) fn backward(
    gpu: &Gpu,
    d_x: GradOut<'_>,
    d_out: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "rms_norm_backward";
    let (d_x, accumulate) = match d_x {
        GradOut::Skip => return Ok(()),
        GradOut::Overwrite(tensor) => (tensor, false),
        GradOut::Add(tensor) => (tensor, true),
    };
    let hidden = weight.len();
    check::multiple(OP, "hidden_size", hidden, 8)?;
    let d_x = check::rows(OP, d_x, DType::Bf16, hidden)?;
    let shape = [d_x.capacity, hidden];
    let params = RmsNormBackwardParams {
        d_x: d_x.address,
        d_out: check::rows_of(OP, d_out, DType::Bf16, shape)?,
        x: check::rows_of(OP, x, DType::Bf16, shape)?,
        rstd: check::rows_of(OP, rstd, DType::F32, [d_x.capacity, 1])?,
        weight: check::exact(OP, weight, DType::F32, &[hidden])?,
        step: gpu.step()?,
        hidden_size: check::to_u32(OP, "hidden_size", hidden)?,
        weight_offset: weight_offset(spec),
        accumulate: u32::from(accumulate),
        reserved: 0,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", d_x.capacity)?);
    let kernel = by_width(hidden, BACKWARD, BACKWARD_NARROW);
    gpu.launch(kernel, grid, &params)
}
