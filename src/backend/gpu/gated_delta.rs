//! The gated delta rule: launchers. `docs/kernels/gated_delta.md` has the plan of its kernels.

use super::Gpu;
use super::check::{self, Rows};
use super::driver::{Grid, Kernel};
use super::params::{
    GATED_DELTA_CHUNK, GATED_DELTA_GRADIENT_SHARED_64, GATED_DELTA_GRADIENT_SHARED_128,
    GATED_DELTA_GRADIENT_THREADS, GATED_DELTA_OUTPUT_SHARED_64, GATED_DELTA_OUTPUT_SHARED_128,
    GATED_DELTA_PREPARE_SHARED_64, GATED_DELTA_PREPARE_SHARED_128, GATED_DELTA_SCAN_COLUMNS,
    GATED_DELTA_SCAN_LANES, GATED_DELTA_SCAN_THREADS, GATED_DELTA_STATES_BACKWARD_SHARED_64,
    GATED_DELTA_STATES_BACKWARD_SHARED_128, GATED_DELTA_STATES_SHARED_64,
    GATED_DELTA_STATES_SHARED_128, GATED_DELTA_THREADS, GatedDeltaParams,
};
use super::scratch::Frame;
use crate::error::{Error, Result};
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::{DType, Tensor};

/// Largest head the kernels are made for.
const MAX_HEAD_DIM: usize = 128;

/// A kernel for heads of up to 64 and one for heads of up to 128, with their shared memory.
struct Stage {
    small: (&'static str, u32),
    large: (&'static str, u32),
    threads: u32,
    blocks: Blocks,
}

/// What the blocks of a stage are laid out over.
enum Blocks {
    /// 64 rows, value heads.
    RowsByValueHead,
    /// 64 rows, key heads.
    RowsByKeyHead,
    /// Columns of a value head, value heads, sequences at a time.
    Scan,
}

const PREPARE: Stage = Stage {
    small: ("gated_delta_prepare_64", GATED_DELTA_PREPARE_SHARED_64),
    large: ("gated_delta_prepare_128", GATED_DELTA_PREPARE_SHARED_128),
    threads: GATED_DELTA_THREADS,
    blocks: Blocks::RowsByValueHead,
};
const OUTPUT: Stage = Stage {
    small: ("gated_delta_output_64", GATED_DELTA_OUTPUT_SHARED_64),
    large: ("gated_delta_output_128", GATED_DELTA_OUTPUT_SHARED_128),
    threads: GATED_DELTA_SCAN_THREADS,
    blocks: Blocks::Scan,
};
const STATES: Stage = Stage {
    small: ("gated_delta_states_64", GATED_DELTA_STATES_SHARED_64),
    large: ("gated_delta_states_128", GATED_DELTA_STATES_SHARED_128),
    threads: GATED_DELTA_SCAN_THREADS,
    blocks: Blocks::Scan,
};
const STATES_BACKWARD: Stage = Stage {
    small: (
        "gated_delta_states_backward_64",
        GATED_DELTA_STATES_BACKWARD_SHARED_64,
    ),
    large: (
        "gated_delta_states_backward_128",
        GATED_DELTA_STATES_BACKWARD_SHARED_128,
    ),
    threads: GATED_DELTA_SCAN_THREADS,
    blocks: Blocks::Scan,
};
const GRADIENTS: Stage = Stage {
    small: ("gated_delta_gradients_64", GATED_DELTA_GRADIENT_SHARED_64),
    large: ("gated_delta_gradients_128", GATED_DELTA_GRADIENT_SHARED_128),
    threads: GATED_DELTA_GRADIENT_THREADS,
    blocks: Blocks::RowsByKeyHead,
};

/// Refuses heads that the kernels are not made for.
pub(super) fn check_heads(op: &'static str, spec: DeltaSpec) -> Result<()> {
    for (what, dim) in [
        ("key heads of", spec.key_head_dim),
        ("value heads of", spec.value_head_dim),
    ] {
        check::multiple(op, what, dim, 16)?;
        if dim > MAX_HEAD_DIM {
            return Err(Error::Unsupported {
                what: format!("{op} with {what} {dim}"),
                why: format!("its kernel takes up to {MAX_HEAD_DIM}; use `device: cpu`"),
            });
        }
    }
    let (heads, key_heads) = (spec.num_value_heads, spec.num_key_heads);
    if key_heads == 0 || !heads.is_multiple_of(key_heads) {
        return Err(Error::Unsupported {
            what: format!("{op} with {heads} value heads and {key_heads} key heads"),
            why: "each key head serves as many value heads as the others".to_owned(),
        });
    }
    Ok(())
}

/// Checks what both directions read, and takes the scratch that both need.
fn params(
    gpu: &Gpu,
    op: &'static str,
    frame: &mut Frame<'_>,
    [u, g, beta]: [&Tensor; 3],
    spec: DeltaSpec,
) -> Result<GatedDeltaParams> {
    check_heads(op, spec)?;
    let Rows { address, capacity } = check::rows(op, u, DType::Bf16, spec.conv_dim())?;
    let gates = [capacity, spec.num_value_heads];
    let (heads, dk, dv) = (spec.num_value_heads, spec.key_head_dim, spec.value_head_dim);
    let key_rows = spec.num_key_heads * capacity * size_of::<f32>();
    Ok(GatedDeltaParams {
        u: address,
        g: check::exact(op, g, DType::F32, &gates)?,
        beta: check::exact(op, beta, DType::F32, &gates)?,
        gamma: frame.take("gated delta gamma", heads * capacity * size_of::<f32>())?,
        q_rstd: frame.take("gated delta q_rstd", key_rows)?,
        k_rstd: frame.take("gated delta k_rstd", key_rows)?,
        scores: frame.take("gated delta scores", square_bytes(spec, capacity))?,
        w: frame.take("gated delta w", bf16_bytes(heads * capacity * dk))?,
        values: frame.take("gated delta values", bf16_bytes(heads * capacity * dv))?,
        step: gpu.step()?,
        capacity: check::to_u32(op, "tokens", capacity)?,
        num_key_heads: check::to_u32(op, "key heads", spec.num_key_heads)?,
        num_value_heads: check::to_u32(op, "value heads", heads)?,
        key_head_dim: check::to_u32(op, "key heads of", dk)?,
        value_head_dim: check::to_u32(op, "value heads of", dv)?,
        ..GatedDeltaParams::default()
    })
}

fn bf16_bytes(len: usize) -> usize {
    len * DType::Bf16.size()
}

/// A row of 64 per head and token.
fn square_bytes(spec: DeltaSpec, capacity: usize) -> usize {
    bf16_bytes(spec.num_value_heads * capacity * GATED_DELTA_CHUNK as usize)
}

/// A state per head and 64 rows.
fn state_bytes(spec: DeltaSpec, capacity: usize) -> usize {
    let slots = capacity.div_ceil(GATED_DELTA_CHUNK as usize) * spec.num_value_heads;
    bf16_bytes(slots * spec.key_head_dim * spec.value_head_dim)
}

fn launch(gpu: &Gpu, stage: &Stage, params: &GatedDeltaParams) -> Result<()> {
    let is_small = params.key_head_dim.max(params.value_head_dim) <= 64;
    let (name, shared_bytes) = if is_small { stage.small } else { stage.large };
    let windows = params.capacity.div_ceil(GATED_DELTA_CHUNK);
    let grid = match stage.blocks {
        Blocks::RowsByValueHead => Grid::plane(windows, params.num_value_heads),
        Blocks::RowsByKeyHead => Grid::plane(windows, params.num_key_heads),
        Blocks::Scan => Grid::volume(
            params.value_head_dim.div_ceil(GATED_DELTA_SCAN_COLUMNS),
            params.num_value_heads,
            GATED_DELTA_SCAN_LANES,
        ),
    };
    let kernel = Kernel {
        name,
        threads: stage.threads,
    };
    gpu.launch(kernel, grid.with_shared(shared_bytes), params)
}

pub(super) fn forward(
    gpu: &Gpu,
    o: &mut Tensor,
    u: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_delta_forward";
    let mut frame = gpu.scratch.frame();
    let mut params = params(gpu, OP, &mut frame, [u, g, beta], spec)?;
    let capacity = u.shape()[0];
    params.o = check::exact(OP, o, DType::Bf16, &[capacity, spec.value_dim()])?;
    launch(gpu, &PREPARE, &params)?;
    launch(gpu, &OUTPUT, &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    gpu: &Gpu,
    d_u: &mut Tensor,
    d_g: &mut Tensor,
    d_beta: &mut Tensor,
    d_o: &Tensor,
    u: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_delta_backward";
    let mut frame = gpu.scratch.frame();
    let mut params = params(gpu, OP, &mut frame, [u, g, beta], spec)?;
    let (capacity, heads) = (u.shape()[0], spec.num_value_heads);
    let gates = [capacity, heads];
    params.d_o = check::exact(OP, d_o, DType::Bf16, &[capacity, spec.value_dim()])?;
    params.d_u = check::exact(OP, d_u, DType::Bf16, &[capacity, spec.conv_dim()])?;
    params.d_g = check::exact(OP, d_g, DType::F32, &gates)?;
    params.d_beta = check::exact(OP, d_beta, DType::F32, &gates)?;
    let value_bytes = bf16_bytes(heads * capacity * spec.value_head_dim);
    let state_bytes = state_bytes(spec, capacity);
    params.inverse = frame.take("gated delta inverse", square_bytes(spec, capacity))?;
    params.states = frame.take("gated delta states", state_bytes)?;
    params.d_values = frame.take("gated delta d_values", value_bytes)?;
    params.d_states = frame.take("gated delta d_states", state_bytes)?;
    for stage in [PREPARE, STATES, STATES_BACKWARD, GRADIENTS] {
        launch(gpu, &stage, &params)?;
    }
    Ok(())
}
