//! The gated norm after the delta rule: launchers.

use super::Gpu;
use super::check::{self, Rows};
use super::driver::{Grid, Kernel};
use super::gated_delta::check_heads;
use super::params::{GATED_RMS_NORM_HEADS, GATED_RMS_NORM_THREADS, GatedRmsNormParams};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = Kernel {
    name: "gated_rms_norm_forward",
    threads: GATED_RMS_NORM_THREADS,
};
const BACKWARD: Kernel = Kernel {
    name: "gated_rms_norm_backward",
    threads: GATED_RMS_NORM_THREADS,
};

/// Checks what both directions take, and the blocks they need.
fn params(
    gpu: &Gpu,
    op: &'static str,
    [o, rstd, qkvz, weight]: [&Tensor; 4],
    spec: DeltaSpec,
) -> Result<(GatedRmsNormParams, Grid)> {
    check_heads(op, spec)?;
    let heads = spec.num_value_heads;
    let Rows { address, capacity } = check::rows(op, o, DType::Bf16, spec.value_dim())?;
    let num_rows = check::to_u32(op, "heads of all tokens", capacity * heads)?;
    let params = GatedRmsNormParams {
        o: address,
        rstd: check::exact(op, rstd, DType::F32, &[capacity, heads])?,
        qkvz: check::exact(op, qkvz, DType::Bf16, &[capacity, spec.qkvz_dim()])?,
        weight: check::exact(op, weight, DType::F32, &[spec.value_head_dim])?,
        step: gpu.step()?,
        num_key_heads: check::to_u32(op, "key heads", spec.num_key_heads)?,
        num_value_heads: check::to_u32(op, "value heads", heads)?,
        key_head_dim: check::to_u32(op, "key heads of", spec.key_head_dim)?,
        value_head_dim: check::to_u32(op, "value heads of", spec.value_head_dim)?,
        eps: spec.eps,
        ..GatedRmsNormParams::default()
    };
    Ok((params, Grid::line(num_rows.div_ceil(GATED_RMS_NORM_HEADS))))
}

pub(super) fn forward(
    gpu: &Gpu,
    y: &mut Tensor,
    rstd: &mut Tensor,
    o: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_rms_norm_forward";
    let (mut params, grid) = params(gpu, OP, [o, rstd, qkvz, weight], spec)?;
    params.y = check::exact(OP, y, DType::Bf16, o.shape())?;
    gpu.launch(FORWARD, grid, &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    gpu: &Gpu,
    d_o: &mut Tensor,
    d_qkvz: &mut Tensor,
    d_y: &Tensor,
    o: &Tensor,
    rstd: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_rms_norm_backward";
    let (mut params, grid) = params(gpu, OP, [o, rstd, qkvz, weight], spec)?;
    params.d_y = check::exact(OP, d_y, DType::Bf16, o.shape())?;
    params.d_o = check::exact(OP, d_o, DType::Bf16, o.shape())?;
    params.d_qkvz = check::exact(OP, d_qkvz, DType::Bf16, qkvz.shape())?;
    gpu.launch(BACKWARD, grid, &params)
}
