//! Head and cross-entropy over the rows that have a target, in chunks of rows whose logits fit a fixed budget.

use rayon::prelude::*;

use super::Cpu;
use super::linear::{times_weight, times_weight_transposed};
use crate::error::{Error, Result};
use crate::ops::{GradOut, StepState};
use crate::store::Weight;
use crate::tensor::Tensor;

/// Logits held at once: 256 MiB.
const LOGITS_ELEMENTS: usize = 1 << 26;

/// `-log softmax(logits)[target]`; `logits` becomes `scale (softmax - onehot)`.
fn loss_and_grad(logits: &mut [f32], target: usize, scale: f32) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at_target = logits[target] - max;
    let mut sum = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - max).exp();
        sum += *logit;
    }
    let factor = scale / sum;
    logits.iter_mut().for_each(|p| *p *= factor);
    logits[target] -= scale;
    sum.ln() - at_target
}

pub(super) fn forward_backward(
    cpu: &Cpu,
    token_loss: &mut Tensor,
    d_x: GradOut<'_>,
    x: &Tensor,
    head: &Weight,
    vocab_size: usize,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy";
    let (tokens, hidden) = (state.num_tokens(), x.row_len());
    let x = cpu.rows(OP, x, tokens, hidden)?;
    let token_loss = cpu.rows_mut(OP, token_loss, tokens, 1)?;
    let mut d_x = match d_x {
        GradOut::Skip => None,
        GradOut::Overwrite(tensor) | GradOut::Add(tensor) => {
            Some(cpu.rows_mut(OP, tensor, tokens, hidden)?)
        }
    };
    if let Some(d_x) = d_x.as_deref_mut() {
        d_x.fill(0.0);
    }
    let rows = state.target_rows();
    let per_chunk = (LOGITS_ELEMENTS / vocab_size).clamp(16, 4096);
    let mut logits = vec![0.0; per_chunk.min(rows.len()) * vocab_size];
    for rows in rows.chunks(per_chunk) {
        let targets = rows.iter().map(|row| target_of(state, *row, vocab_size));
        let targets = targets.collect::<Result<Vec<usize>>>()?;
        let gathered: Vec<f32> = rows
            .iter()
            .flat_map(|row| &x[row * hidden..(row + 1) * hidden])
            .copied()
            .collect();
        let logits = &mut logits[..rows.len() * vocab_size];
        times_weight_transposed(cpu, logits, &gathered, head, [vocab_size, hidden])?;
        cpu.round(logits);
        let losses: Vec<f32> = logits
            .par_chunks_mut(vocab_size)
            .zip(&targets)
            .map(|(logits, target)| {
                let loss = loss_and_grad(logits, *target, state.loss_scale);
                cpu.round(logits);
                loss
            })
            .collect();
        for (row, loss) in rows.iter().zip(losses) {
            token_loss[*row] += loss;
        }
        let Some(d_x) = d_x.as_deref_mut() else {
            continue;
        };
        let mut d_rows = gathered;
        times_weight(cpu, &mut d_rows, logits, head, [vocab_size, hidden], false)?;
        for (row, values) in rows.iter().zip(d_rows.chunks(hidden)) {
            d_x[row * hidden..(row + 1) * hidden].copy_from_slice(values);
        }
    }
    if let Some(d_x) = d_x {
        cpu.round(d_x);
    }
    Ok(())
}

fn target_of(state: &StepState, row: usize, vocab_size: usize) -> Result<usize> {
    let id = state.batch.target_ids[row];
    usize::try_from(id)
        .ok()
        .filter(|id| *id < vocab_size)
        .ok_or_else(|| Error::Shape {
            op: "linear_cross_entropy",
            tensor: format!("target id {id} of row {row}"),
            found: vec![row],
            expected: vec![vocab_size],
        })
}
