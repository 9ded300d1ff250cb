//! What feeds the delta rule: causal convolution, gates: launchers.

use super::Gpu;
use super::check::{self, Rows};
use super::driver::{Grid, Kernel};
use super::gated_delta::check_heads;
use super::params::{
    CAUSAL_CONV_THREADS, CAUSAL_CONV_TOKENS, CausalConvParams, DELTA_GATES_THREADS,
    DeltaGatesParams,
};
use crate::error::{Error, Result};
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::{DType, Tensor};

/// Channels of a thread.
const CHANNELS: u32 = 8;

/// A kernel for up to 4 taps and one for up to 8.
fn conv_kernel(names: [&'static str; 2], taps: usize) -> Kernel {
    Kernel {
        name: names[usize::from(taps > 4)],
        threads: CAUSAL_CONV_THREADS,
    }
}

/// Checks what both directions take, and the blocks they need.
fn conv_params(
    gpu: &Gpu,
    op: &'static str,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
) -> Result<(CausalConvParams, Grid)> {
    check_heads(op, spec)?;
    let (channels, taps) = (spec.conv_dim(), spec.conv_kernel_dim);
    if !(2..=8).contains(&taps) {
        return Err(Error::Unsupported {
            what: format!("{op} with {taps} taps"),
            why: "its kernel takes 2 to 8; use `device: cpu`".to_owned(),
        });
    }
    if weight.len() != channels * taps {
        weight.expect_shape(op, &[channels, taps])?;
    }
    let Rows { address, capacity } = check::rows(op, qkvz, DType::Bf16, spec.qkvz_dim())?;
    let tokens = check::to_u32(op, "tokens", capacity)?;
    let blocks = check::to_u32(op, "channels", channels)?.div_ceil(CAUSAL_CONV_THREADS * CHANNELS);
    let params = CausalConvParams {
        qkvz: address,
        weight: check::exact(op, weight, DType::F32, weight.shape())?,
        step: gpu.step()?,
        num_key_heads: check::to_u32(op, "key heads", spec.num_key_heads)?,
        num_value_heads: check::to_u32(op, "value heads", spec.num_value_heads)?,
        key_head_dim: check::to_u32(op, "key heads of", spec.key_head_dim)?,
        value_head_dim: check::to_u32(op, "value heads of", spec.value_head_dim)?,
        taps: check::to_u32(op, "taps", taps)?,
        ..CausalConvParams::default()
    };
    Ok((
        params,
        Grid::plane(blocks, tokens.div_ceil(CAUSAL_CONV_TOKENS)),
    ))
}

pub(super) fn conv_forward(
    gpu: &Gpu,
    u: &mut Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "causal_conv_forward";
    let (mut params, grid) = conv_params(gpu, OP, qkvz, weight, spec)?;
    params.u = check::exact(OP, u, DType::Bf16, &[qkvz.shape()[0], spec.conv_dim()])?;
    let names = ["causal_conv_forward_4", "causal_conv_forward_8"];
    gpu.launch(conv_kernel(names, spec.conv_kernel_dim), grid, &params)
}

pub(super) fn conv_backward(
    gpu: &Gpu,
    d_qkvz: &mut Tensor,
    d_u: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "causal_conv_backward";
    let (mut params, grid) = conv_params(gpu, OP, qkvz, weight, spec)?;
    params.d_qkvz = check::exact(OP, d_qkvz, DType::Bf16, qkvz.shape())?;
    params.d_u = check::exact(OP, d_u, DType::Bf16, &[qkvz.shape()[0], spec.conv_dim()])?;
    let names = ["causal_conv_backward_4", "causal_conv_backward_8"];
    gpu.launch(conv_kernel(names, spec.conv_kernel_dim), grid, &params)
}

/// Checks what both directions take, and the blocks they need.
fn gates_params(
    gpu: &Gpu,
    op: &'static str,
    [ba, a_log, dt_bias]: [&Tensor; 3],
    spec: DeltaSpec,
) -> Result<(DeltaGatesParams, Grid, [usize; 2])> {
    let heads = spec.num_value_heads;
    let Rows { address, capacity } = check::rows(op, ba, DType::Bf16, 2 * heads)?;
    let num_rows = check::to_u32(op, "heads of all tokens", capacity * heads)?;
    let params = DeltaGatesParams {
        ba: address,
        a_log: check::exact(op, a_log, DType::F32, &[heads])?,
        dt_bias: check::exact(op, dt_bias, DType::F32, &[heads])?,
        step: gpu.step()?,
        num_value_heads: check::to_u32(op, "value heads", heads)?,
        ratio: check::to_u32(op, "value heads per key head", spec.ratio())?,
        ..DeltaGatesParams::default()
    };
    let grid = Grid::line(num_rows.div_ceil(DELTA_GATES_THREADS));
    Ok((params, grid, [capacity, heads]))
}

pub(super) fn gates_forward(
    gpu: &Gpu,
    g: &mut Tensor,
    beta: &mut Tensor,
    ba: &Tensor,
    a_log: &Tensor,
    dt_bias: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "delta_gates_forward";
    const KERNEL: Kernel = Kernel {
        name: "delta_gates_forward",
        threads: DELTA_GATES_THREADS,
    };
    let (mut params, grid, gates) = gates_params(gpu, OP, [ba, a_log, dt_bias], spec)?;
    params.g = check::exact(OP, g, DType::F32, &gates)?;
    params.beta = check::exact(OP, beta, DType::F32, &gates)?;
    gpu.launch(KERNEL, grid, &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gates_backward(
    gpu: &Gpu,
    d_ba: &mut Tensor,
    d_g: &Tensor,
    d_beta: &Tensor,
    ba: &Tensor,
    a_log: &Tensor,
    dt_bias: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "delta_gates_backward";
    const KERNEL: Kernel = Kernel {
        name: "delta_gates_backward",
        threads: DELTA_GATES_THREADS,
    };
    let (mut params, grid, gates) = gates_params(gpu, OP, [ba, a_log, dt_bias], spec)?;
    params.d_ba = check::exact(OP, d_ba, DType::Bf16, ba.shape())?;
    params.d_g = check::exact(OP, d_g, DType::F32, &gates)?;
    params.d_beta = check::exact(OP, d_beta, DType::F32, &gates)?;
    gpu.launch(KERNEL, grid, &params)
}
