//! Embedding, SwiGLU, and the shared expert's gate.

use rayon::prelude::*;

use super::linear::widen_rows;
use super::{Cpu, sigmoid, silu};
use crate::error::{Error, Result};
use crate::ops::StepState;
use crate::store::Weight;
use crate::tensor::Tensor;

pub(super) fn embedding_forward(
    cpu: &Cpu,
    out: &mut Tensor,
    table: &Weight,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "embedding_forward";
    let hidden = out.row_len();
    let vocab = match table {
        Weight::Dense(table) => table.len() / hidden,
        Weight::Nf4(matrix) => matrix.out_features,
    };
    let out = cpu.rows_mut(OP, out, state.num_tokens(), hidden)?;
    for (out, id) in out.chunks_mut(hidden).zip(&state.batch.input_ids) {
        let row = *id as usize;
        if row >= vocab {
            let (tensor, found) = ("input_ids".to_owned(), vec![row]);
            return Err(Error::Shape {
                op: OP,
                tensor,
                found,
                expected: vec![vocab],
            });
        }
        widen_rows(cpu, table, row..row + 1, hidden, out)?;
    }
    Ok(())
}

/// `h = silu(gate) up`.
pub(super) fn swiglu(h: &mut [f32], gate: &[f32], up: &[f32]) {
    for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
        *h = silu(*gate) * up;
    }
}

/// `(d_gate, d_up)` of one element.
#[inline]
pub(super) fn swiglu_grad(d_h: f32, gate: f32, up: f32) -> (f32, f32) {
    let s = sigmoid(gate);
    (d_h * up * s * (1.0 + gate * (1.0 - s)), d_h * gate * s)
}

pub(super) fn swiglu_forward(
    cpu: &Cpu,
    h: &mut Tensor,
    gate: &Tensor,
    up: &Tensor,
    width: usize,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "linear_swiglu_forward";
    let tokens = state.num_tokens();
    let h = cpu.rows_mut(OP, h, tokens, width)?;
    let gate = cpu.rows(OP, gate, tokens, width)?;
    let up = cpu.rows(OP, up, tokens, width)?;
    h.par_chunks_mut(width)
        .zip(gate.par_chunks(width).zip(up.par_chunks(width)))
        .for_each(|(h, (gate, up))| {
            swiglu(h, gate, up);
            cpu.round(h);
        });
    Ok(())
}

pub(super) fn swiglu_backward(
    cpu: &Cpu,
    d_gate: &mut Tensor,
    d_up: &mut Tensor,
    d_h: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "swiglu_backward";
    let (tokens, width) = (state.num_tokens(), gate.row_len());
    let d_gate = cpu.rows_mut(OP, d_gate, tokens, width)?;
    let d_up = cpu.rows_mut(OP, d_up, tokens, width)?;
    let d_h = cpu.rows(OP, d_h, tokens, width)?;
    let gate = cpu.rows(OP, gate, tokens, width)?;
    let up = cpu.rows(OP, up, tokens, width)?;
    d_gate
        .par_chunks_mut(width)
        .zip(d_up.par_chunks_mut(width))
        .zip(
            d_h.par_chunks(width)
                .zip(gate.par_chunks(width).zip(up.par_chunks(width))),
        )
        .for_each(|((d_gate, d_up), (d_h, (gate, up)))| {
            for i in 0..width {
                (d_gate[i], d_up[i]) = swiglu_grad(d_h[i], gate[i], up[i]);
            }
            cpu.round(d_gate);
            cpu.round(d_up);
        });
    Ok(())
}

pub(super) fn shared_add_forward(
    cpu: &Cpu,
    out: &mut Tensor,
    shared: &Tensor,
    logit: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "shared_expert_add_forward";
    let (tokens, hidden) = (state.num_tokens(), shared.row_len());
    let out = cpu.rows_mut(OP, out, tokens, hidden)?;
    let shared = cpu.rows(OP, shared, tokens, hidden)?;
    let logit = cpu.rows(OP, logit, tokens, 1)?;
    out.par_chunks_mut(hidden)
        .zip(shared.par_chunks(hidden))
        .zip(logit)
        .for_each(|((out, shared), logit)| {
            let gate = sigmoid(*logit);
            out.iter_mut()
                .zip(shared)
                .for_each(|(out, shared)| *out += gate * shared);
            cpu.round(out);
        });
    Ok(())
}

pub(super) fn shared_add_backward(
    cpu: &Cpu,
    d_shared: &mut Tensor,
    d_logit: &mut Tensor,
    d_out: &Tensor,
    shared: &Tensor,
    logit: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "shared_expert_add_backward";
    let (tokens, hidden) = (state.num_tokens(), shared.row_len());
    let d_shared = cpu.rows_mut(OP, d_shared, tokens, hidden)?;
    let d_logit = cpu.rows_mut(OP, d_logit, tokens, 1)?;
    let d_out = cpu.rows(OP, d_out, tokens, hidden)?;
    let shared = cpu.rows(OP, shared, tokens, hidden)?;
    let logit = cpu.rows(OP, logit, tokens, 1)?;
    d_shared
        .par_chunks_mut(hidden)
        .zip(d_logit)
        .zip(
            d_out
                .par_chunks(hidden)
                .zip(shared.par_chunks(hidden))
                .zip(logit),
        )
        .for_each(|((d_shared, d_logit), ((d_out, shared), logit))| {
            let gate = sigmoid(*logit);
            let dot: f32 = d_out.iter().zip(shared).map(|(d, s)| d * s).sum();
            *d_logit = dot * gate * (1.0 - gate);
            d_shared
                .iter_mut()
                .zip(d_out)
                .for_each(|(d_shared, d)| *d_shared = gate * d);
            cpu.round(d_shared);
        });
    Ok(())
}
