//! What Gated DeltaNet does before the recurrence: the causal convolution with `SiLU`, and the gates g and beta.

use rayon::prelude::*;

use super::{Cpu, sigmoid, silu};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

/// For each token its distance from its sequence's start, and the tokens left after it.
fn margins(state: &StepState) -> Vec<(usize, usize)> {
    state
        .sequences()
        .flat_map(|(start, end)| (start..end).map(move |t| (t - start, end - 1 - t)))
        .collect()
}

/// Convolution output before `SiLU` of channel `channel` (column `column` of `qkvz`) at token `t`.
fn convolve(
    qkvz: &[f32],
    taps: &[f32],
    t: usize,
    before: usize,
    column: usize,
    width: usize,
) -> f32 {
    let last = taps.len() - 1;
    let reach = before.min(last);
    (0..=reach)
        .rev()
        .map(|back| taps[last - back] * qkvz[(t - back) * width + column])
        .sum()
}

pub(super) fn conv_forward(
    cpu: &Cpu,
    u: &mut Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "causal_conv_forward";
    let (tokens, channels, width) = (state.num_tokens(), spec.conv_dim(), spec.qkvz_dim());
    let qkvz = cpu.rows(OP, qkvz, tokens, width)?;
    let u = cpu.rows_mut(OP, u, tokens, channels)?;
    let weight = weight.f32()?;
    let columns: Vec<usize> = (0..channels)
        .map(|channel| spec.qkvz_column(channel))
        .collect();
    let margins = margins(state);
    u.par_chunks_mut(channels)
        .zip(&margins)
        .enumerate()
        .for_each(|(t, (u, (before, _)))| {
            let taps = weight.chunks(spec.conv_kernel_dim);
            for ((u, taps), column) in u.iter_mut().zip(taps).zip(&columns) {
                *u = silu(convolve(qkvz, taps, t, *before, *column, width));
            }
            cpu.round(u);
        });
    Ok(())
}

pub(super) fn conv_backward(
    cpu: &Cpu,
    d_qkvz: &mut Tensor,
    d_u: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "causal_conv_backward";
    let (tokens, channels, width) = (state.num_tokens(), spec.conv_dim(), spec.qkvz_dim());
    let qkvz = cpu.rows(OP, qkvz, tokens, width)?;
    let d_u = cpu.rows(OP, d_u, tokens, channels)?;
    let d_qkvz = cpu.rows_mut(OP, d_qkvz, tokens, width)?;
    let (weight, taps) = (weight.f32()?, spec.conv_kernel_dim);
    let columns: Vec<usize> = (0..channels)
        .map(|channel| spec.qkvz_column(channel))
        .collect();
    let margins = margins(state);
    // Gradient before SiLU, once per element; each is read by up to `taps` earlier tokens.
    let mut d_c = vec![0.0; tokens * channels];
    d_c.par_chunks_mut(channels)
        .zip(d_u.par_chunks(channels))
        .zip(&margins)
        .enumerate()
        .for_each(|(t, ((d_c, d_u), (before, _)))| {
            let taps = weight.chunks(taps);
            for (((d_c, d_u), taps), column) in d_c.iter_mut().zip(d_u).zip(taps).zip(&columns) {
                let c = convolve(qkvz, taps, t, *before, *column, width);
                let gate = sigmoid(c);
                *d_c = d_u * gate * (1.0 + c * (1.0 - gate));
            }
        });
    d_qkvz
        .par_chunks_mut(width)
        .zip(&margins)
        .enumerate()
        .for_each(|(t, (d_qkvz, (_, after)))| {
            let reach = (*after).min(taps - 1);
            for (channel, column) in columns.iter().enumerate() {
                let weight = &weight[channel * taps..][..taps];
                let terms = (0..=reach)
                    .map(|ahead| weight[taps - 1 - ahead] * d_c[(t + ahead) * channels + channel]);
                d_qkvz[*column] = cpu.rounded_value(terms.sum());
            }
        });
    Ok(())
}

fn softplus(x: f32) -> f32 {
    // ln(1 + e^x) without overflow.
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

pub(super) fn gates_forward(
    cpu: &Cpu,
    g: &mut Tensor,
    beta: &mut Tensor,
    ba: &Tensor,
    a_log: &Tensor,
    dt_bias: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "delta_gates_forward";
    let (tokens, heads) = (state.num_tokens(), spec.num_value_heads);
    let ba = cpu.rows(OP, ba, tokens, 2 * heads)?;
    let g = cpu.rows_mut(OP, g, tokens, heads)?;
    let beta = cpu.rows_mut(OP, beta, tokens, heads)?;
    let (a_log, dt_bias) = (a_log.f32()?, dt_bias.f32()?);
    let rows = ba
        .chunks(2 * heads)
        .zip(g.chunks_mut(heads))
        .zip(beta.chunks_mut(heads));
    for ((ba, g), beta) in rows {
        for head in 0..heads {
            let (b, a) = spec.ba_columns(head);
            beta[head] = sigmoid(ba[b]);
            g[head] = -a_log[head].exp() * softplus(ba[a] + dt_bias[head]);
        }
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gates_backward(
    cpu: &Cpu,
    d_ba: &mut Tensor,
    d_g: &Tensor,
    d_beta: &Tensor,
    ba: &Tensor,
    a_log: &Tensor,
    dt_bias: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "delta_gates_backward";
    let (tokens, heads) = (state.num_tokens(), spec.num_value_heads);
    let ba = cpu.rows(OP, ba, tokens, 2 * heads)?;
    let d_g = cpu.rows(OP, d_g, tokens, heads)?;
    let d_beta = cpu.rows(OP, d_beta, tokens, heads)?;
    let d_ba = cpu.rows_mut(OP, d_ba, tokens, 2 * heads)?;
    let (a_log, dt_bias) = (a_log.f32()?, dt_bias.f32()?);
    let grads = d_g.chunks(heads).zip(d_beta.chunks(heads));
    for ((d_ba, ba), (d_g, d_beta)) in d_ba
        .chunks_mut(2 * heads)
        .zip(ba.chunks(2 * heads))
        .zip(grads)
    {
        for head in 0..heads {
            let (b, a) = spec.ba_columns(head);
            let beta = sigmoid(ba[b]);
            d_ba[b] = d_beta[head] * beta * (1.0 - beta);
            d_ba[a] = d_g[head] * -a_log[head].exp() * sigmoid(ba[a] + dt_bias[head]);
        }
        cpu.round(d_ba);
    }
    Ok(())
}
