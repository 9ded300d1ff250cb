//! Embedding, SwiGLU, the shared expert's gate: launchers.

use super::check::VECTOR;
use super::driver::{Grid, Kernel};
use super::params::{
    EMBEDDING_THREADS, EmbeddingForwardParams, SHARED_EXPERT_THREADS, SWIGLU_THREADS,
    SharedExpertAddBackwardParams, SharedExpertAddForwardParams, SwigluBackwardParams,
};
use super::step::Limits;
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::StepState;
use crate::store::Weight;
use crate::tensor::{DType, Tensor};

const EMBEDDING_FORWARD: Kernel = Kernel {
    name: "embedding_forward",
    threads: EMBEDDING_THREADS,
};
const SWIGLU_BACKWARD: Kernel = Kernel {
    name: "swiglu_backward",
    threads: SWIGLU_THREADS,
};
const SHARED_ADD_FORWARD: Kernel = Kernel {
    name: "shared_expert_add_forward",
    threads: SHARED_EXPERT_THREADS,
};
const SHARED_ADD_BACKWARD: Kernel = Kernel {
    name: "shared_expert_add_backward",
    threads: SHARED_EXPERT_THREADS,
};

/// Address and rows of a dense bf16 matrix of `width` columns; embeddings and heads are not quantised.
pub(super) fn dense(op: &'static str, weight: &Weight, width: usize) -> Result<check::Rows> {
    match weight {
        Weight::Dense(tensor) => check::rows(op, tensor, DType::Bf16, width),
        Weight::Nf4(matrix) => Err(Error::Unsupported {
            what: format!("{op} with `{}` in NF4", matrix.codes.name()),
            why: "its kernel reads bf16; leave it out of `quantize_modules`".to_owned(),
        }),
    }
}

pub(super) fn embedding_forward(
    gpu: &Gpu,
    out: &mut Tensor,
    table: &Weight,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "embedding_forward";
    let hidden = out.row_len();
    check::multiple(OP, "hidden_size", hidden, VECTOR)?;
    let out = check::rows(OP, out, DType::Bf16, hidden)?;
    let table = dense(OP, table, hidden)?;
    let rows = Limits {
        input_ids: table.capacity,
        ..Limits::default()
    };
    gpu.limit(rows, state)?;
    let params = EmbeddingForwardParams {
        out: out.address,
        table: table.address,
        step: gpu.step()?,
        hidden_size: check::to_u32(OP, "hidden_size", hidden)?,
        vocab_size: check::to_u32(OP, "vocab_size", table.capacity)?,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", out.capacity)?);
    gpu.launch(EMBEDDING_FORWARD, grid, &params)
}

pub(super) fn swiglu_backward(
    gpu: &Gpu,
    d_gate: &mut Tensor,
    d_up: &mut Tensor,
    d_h: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "swiglu_backward";
    let width = gate.row_len();
    check::multiple(OP, "width", width, VECTOR)?;
    let gate = check::rows(OP, gate, DType::Bf16, width)?;
    let shape = [gate.capacity, width];
    let params = SwigluBackwardParams {
        d_gate: check::rows_of(OP, d_gate, DType::Bf16, shape)?,
        d_up: check::rows_of(OP, d_up, DType::Bf16, shape)?,
        d_h: check::rows_of(OP, d_h, DType::Bf16, shape)?,
        gate: gate.address,
        up: check::rows_of(OP, up, DType::Bf16, shape)?,
        step: gpu.step()?,
        width: check::to_u32(OP, "width", width)?,
        rows_per_token: 1,
    };
    let per_block = SWIGLU_THREADS as usize * VECTOR;
    let blocks = (gate.capacity * width).div_ceil(per_block);
    let grid = Grid::line(check::to_u32(OP, "blocks", blocks)?);
    gpu.launch(SWIGLU_BACKWARD, grid, &params)
}

pub(super) fn shared_add_forward(
    gpu: &Gpu,
    out: &mut Tensor,
    shared: &Tensor,
    logit: &Tensor,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "shared_expert_add_forward";
    let hidden = shared.row_len();
    check::multiple(OP, "hidden_size", hidden, VECTOR)?;
    let shared = check::rows(OP, shared, DType::Bf16, hidden)?;
    let shape = [shared.capacity, hidden];
    let params = SharedExpertAddForwardParams {
        out: check::rows_of(OP, out, DType::Bf16, shape)?,
        shared: shared.address,
        logit: check::rows_of(OP, logit, DType::F32, [shared.capacity, 1])?,
        step: gpu.step()?,
        hidden_size: check::to_u32(OP, "hidden_size", hidden)?,
        reserved: 0,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", shared.capacity)?);
    gpu.launch(SHARED_ADD_FORWARD, grid, &params)
}

pub(super) fn shared_add_backward(
    gpu: &Gpu,
    d_shared: &mut Tensor,
    d_logit: &mut Tensor,
    d_out: &Tensor,
    shared: &Tensor,
    logit: &Tensor,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "shared_expert_add_backward";
    let hidden = shared.row_len();
    check::multiple(OP, "hidden_size", hidden, VECTOR)?;
    let shared = check::rows(OP, shared, DType::Bf16, hidden)?;
    let (shape, column) = ([shared.capacity, hidden], [shared.capacity, 1]);
    let params = SharedExpertAddBackwardParams {
        d_shared: check::rows_of(OP, d_shared, DType::Bf16, shape)?,
        d_logit: check::rows_of(OP, d_logit, DType::F32, column)?,
        d_out: check::rows_of(OP, d_out, DType::Bf16, shape)?,
        shared: shared.address,
        logit: check::rows_of(OP, logit, DType::F32, column)?,
        step: gpu.step()?,
        hidden_size: check::to_u32(OP, "hidden_size", hidden)?,
        reserved: 0,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", shared.capacity)?);
    gpu.launch(SHARED_ADD_BACKWARD, grid, &params)
}
