//! Frozen matrices (NF4 or as stored) with their adapters: `y = x W^T + b + s xa B^T`, `xa = dropout(x) A^T`.
//!
//! A weight is widened to f32 a panel of rows at a time, and each panel is used by every token, so the whole matrix is
//! never held in f32. Work is cut into row blocks whose size depends on the shape alone: bits do not depend on threads.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, par_matmul};
use super::lora::{Lora, LoraGrads, LoraRows};
use super::{Cpu, add_assign};
use crate::error::Result;
use crate::ops::{GradOut, Linear, StepState};
use crate::store::Weight;
use crate::tensor::Tensor;

/// Elements of a widened panel: 1 MiB, so that it stays in a shared cache while all tokens use it.
const PANEL_ELEMENTS: usize = 1 << 18;

/// Token rows per task: an eighth of them, so that few cores share evenly, within what a product needs to be efficient.
pub(super) fn row_block(num_rows: usize) -> usize {
    num_rows.div_ceil(8).next_multiple_of(16).clamp(16, 128)
}

/// Rows `rows` of a weight with `cols` columns, widened into `out`.
pub(super) fn widen_rows(
    cpu: &Cpu,
    weight: &Weight,
    rows: Range<usize>,
    cols: usize,
    out: &mut [f32],
) -> Result<()> {
    let range = rows.start * cols..rows.end * cols;
    match weight {
        Weight::Dense(tensor) => tensor.widen(range, out)?,
        Weight::Nf4(matrix) => matrix.view()?.dequantize(range.start, out),
    }
    cpu.round(out);
    Ok(())
}

/// Calls `f(rows, panel)` for consecutive row panels of the weight; an f32 weight is one panel, in place.
pub(super) fn for_each_panel(
    cpu: &Cpu,
    weight: &Weight,
    num_rows: usize,
    cols: usize,
    mut f: impl FnMut(Range<usize>, Mat<'_>),
) -> Result<()> {
    if let (Weight::Dense(tensor), false) = (weight, cpu.rounds_to_bf16())
        && let Ok(values) = tensor.f32()
    {
        f(0..num_rows, Mat::dense(values, num_rows, cols));
        return Ok(());
    }
    let panel_rows = (PANEL_ELEMENTS / cols).clamp(1, num_rows);
    let mut panel = vec![0.0; panel_rows * cols];
    for start in (0..num_rows).step_by(panel_rows) {
        let rows = start..num_rows.min(start + panel_rows);
        let share = rows.len().div_ceil(16);
        let panel = &mut panel[..rows.len() * cols];
        panel
            .par_chunks_mut(share * cols)
            .enumerate()
            .try_for_each(|(chunk, out)| {
                let first = rows.start + chunk * share;
                widen_rows(cpu, weight, first..first + out.len() / cols, cols, out)
            })?;
        f(rows.clone(), Mat::dense(panel, rows.len(), cols));
    }
    Ok(())
}

/// `out = x W^T`, in parallel.
pub(super) fn times_weight_transposed(
    cpu: &Cpu,
    out: &mut [f32],
    x: &[f32],
    weight: &Weight,
    [n, k]: [usize; 2],
) -> Result<()> {
    let m = x.len() / k;
    for_each_panel(cpu, weight, n, k, |rows, panel| {
        let out = MatMut::new(&mut out[rows.start..], m, rows.len(), n);
        par_matmul(out, Mat::dense(x, m, k), panel.t(), 1.0, 0.0);
    })
}

/// `out (+)= d_out W`, in parallel.
pub(super) fn times_weight(
    cpu: &Cpu,
    out: &mut [f32],
    d_out: &[f32],
    weight: &Weight,
    [n, k]: [usize; 2],
    accumulate: bool,
) -> Result<()> {
    let m = out.len() / k;
    for_each_panel(cpu, weight, n, k, |rows, panel| {
        let beta = if accumulate || rows.start > 0 {
            1.0
        } else {
            0.0
        };
        let d_out = Mat::new(&d_out[rows.start..], m, rows.len(), n);
        par_matmul(MatMut::dense(out, m, k), d_out, panel, 1.0, beta);
    })
}

/// Row index of the step's token, as dropout masks count it.
fn token_at(first: usize) -> impl Fn(usize) -> u32 {
    move |row| u32::try_from(first + row).unwrap_or(u32::MAX)
}

pub(super) fn forward(
    cpu: &Cpu,
    outs: &mut [&mut Tensor],
    xa: &mut Tensor,
    x: &Tensor,
    linears: &[&Linear],
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "linear_forward";
    let num_tokens = state.num_tokens();
    let k = linears[0].in_features;
    let x = cpu.rows(OP, x, num_tokens, k)?;
    let total_rank: usize = linears.iter().map(|linear| linear.rank()).sum();
    let xa = cpu.rows_mut(OP, xa, num_tokens, total_rank)?;
    let lora = lora.f32()?;
    let block = row_block(num_tokens);
    let mut rank_start = 0;
    for (out, linear) in outs.iter_mut().zip(linears) {
        let n = linear.out_features;
        let out = cpu.rows_mut(OP, out, num_tokens, n)?;
        times_weight_transposed(cpu, out, x, &linear.weight, [n, k])?;
        if let Some(pair) = linear.lora {
            let pair = Lora::new(cpu, pair, lora, state.dropout);
            let rank = pair.pair.rank;
            xa.par_chunks_mut(block * total_rank)
                .zip(x.par_chunks(block * k))
                .zip(out.par_chunks_mut(block * n))
                .enumerate()
                .for_each(|(index, ((xa, x), out))| {
                    let m = x.len() / k;
                    let dropped = pair.dropped(x, token_at(index * block));
                    let xa = &mut xa[rank_start..];
                    pair.project(MatMut::new(xa, m, rank, total_rank), &dropped);
                    cpu.round_columns(xa, m, rank, total_rank);
                    pair.add(MatMut::dense(out, m, n), Mat::new(xa, m, rank, total_rank));
                });
            rank_start += rank;
        }
        let bias = linear.bias.as_ref().map(Tensor::f32).transpose()?;
        out.par_chunks_mut(block * n).for_each(|out| {
            if let Some(bias) = bias {
                out.chunks_mut(n).for_each(|row| add_assign(row, bias));
            }
            if !linear.f32_output {
                cpu.round(out);
            }
        });
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    cpu: &Cpu,
    d_x: GradOut<'_>,
    d_lora: &mut Tensor,
    d_outs: &[&Tensor],
    x: &Tensor,
    xa: &Tensor,
    linears: &[&Linear],
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "linear_backward";
    let num_tokens = state.num_tokens();
    let k = linears[0].in_features;
    let x = cpu.rows(OP, x, num_tokens, k)?;
    let total_rank: usize = linears.iter().map(|linear| linear.rank()).sum();
    let xa = cpu.rows(OP, xa, num_tokens, total_rank)?;
    let (lora, d_lora) = (lora.f32()?, d_lora.f32_mut()?);
    let (mut d_x, mut accumulate) = match d_x {
        GradOut::Skip => (None, false),
        GradOut::Overwrite(tensor) => (Some(cpu.rows_mut(OP, tensor, num_tokens, k)?), false),
        GradOut::Add(tensor) => (Some(cpu.rows_mut(OP, tensor, num_tokens, k)?), true),
    };
    let mut rank_start = 0;
    for (d_out, linear) in d_outs.iter().zip(linears) {
        let d_out = cpu.rows(OP, d_out, num_tokens, linear.out_features)?;
        if let Some(d_x) = d_x.as_deref_mut() {
            times_weight(
                cpu,
                d_x,
                d_out,
                &linear.weight,
                [linear.out_features, k],
                accumulate,
            )?;
            accumulate = true;
        }
        if let Some(pair) = linear.lora {
            let pair = Lora::new(cpu, pair, lora, state.dropout);
            let xa = Mat::new(
                xa.get(rank_start..).unwrap_or(&[]),
                num_tokens,
                pair.pair.rank,
                total_rank,
            );
            lora_backward(cpu, d_x.as_deref_mut(), d_lora, d_out, x, xa, &pair);
            rank_start += pair.pair.rank;
        }
    }
    if let Some(d_x) = d_x {
        cpu.round(d_x);
    }
    Ok(())
}

fn lora_backward(
    cpu: &Cpu,
    d_x: Option<&mut [f32]>,
    d_lora: &mut [f32],
    d_out: &[f32],
    x: &[f32],
    xa: Mat<'_>,
    pair: &Lora<'_>,
) {
    let (k, n, rank) = (
        pair.pair.in_features,
        pair.pair.out_features,
        pair.pair.rank,
    );
    let num_rows = x.len() / k;
    let block = row_block(num_rows);
    let mut d_xa = vec![0.0; num_rows * rank];
    d_xa.par_chunks_mut(block * rank)
        .zip(d_out.par_chunks(block * n))
        .for_each(|(d_xa, d_out)| {
            let m = d_out.len() / n;
            pair.d_xa(MatMut::dense(d_xa, m, rank), Mat::dense(d_out, m, n));
            cpu.round(d_xa);
        });
    if let Some(d_x) = d_x {
        d_x.par_chunks_mut(block * k)
            .zip(d_xa.par_chunks(block * rank))
            .enumerate()
            .for_each(|(index, (d_x, d_xa))| {
                let d_xa = Mat::dense(d_xa, d_xa.len() / rank, rank);
                pair.add_d_x(d_x, d_xa, token_at(index * block));
            });
    }
    let dropped = pair.dropped(x, token_at(0));
    let d_xa = Mat::dense(&d_xa, num_rows, rank);
    pair.grads(
        LoraGrads::new(d_lora, &pair.pair, 0),
        LoraRows {
            num_rows,
            dropped: &dropped,
            d_out,
            xa,
            d_xa,
        },
    );
}
