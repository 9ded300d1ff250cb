//! RMS norms: plain, with the residual add, and gated per head (Gated DeltaNet).

use rayon::prelude::*;

use super::{Cpu, sigmoid, silu};
use crate::error::Result;
use crate::ops::{DeltaSpec, GradOut, NormSpec, StepState};
use crate::tensor::Tensor;

/// `1 / sqrt(mean(x^2) + eps)`.
pub(super) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let sum: f32 = x.iter().map(|value| value * value).sum();
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// The factor a norm's stored weight stands for.
#[inline]
pub(super) fn factor(weight: f32, spec: NormSpec) -> f32 {
    if spec.zero_centered {
        1.0 + weight
    } else {
        weight
    }
}

/// `out = x rstd w`; returns `rstd`.
pub(super) fn normalize(out: &mut [f32], x: &[f32], weight: &[f32], spec: NormSpec) -> f32 {
    let rstd = inverse_rms(x, spec.eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * rstd * factor(*weight, spec);
    }
    rstd
}

/// `d_x[i] = rstd (d_out w - xh mean(d_out w xh))`, handed to `put(i, value)`.
pub(super) fn normalize_backward(
    d_out: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: f32,
    spec: NormSpec,
    mut put: impl FnMut(usize, f32),
) {
    let terms = || d_out.iter().zip(x).zip(weight);
    let dot: f32 = terms()
        .map(|((d, x), w)| d * factor(*w, spec) * x * rstd)
        .sum();
    let mean = dot / x.len() as f32;
    for (index, ((d, x), w)) in terms().enumerate() {
        put(index, rstd * (d * factor(*w, spec) - x * rstd * mean));
    }
}

pub(super) fn forward(
    cpu: &Cpu,
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "rms_norm_forward";
    let (tokens, hidden) = (state.num_tokens(), weight.len());
    let x = cpu.rows(OP, x, tokens, hidden)?;
    let out = cpu.rows_mut(OP, out, tokens, hidden)?;
    let rstd = cpu.rows_mut(OP, rstd, tokens, 1)?;
    let weight = weight.f32()?;
    out.par_chunks_mut(hidden)
        .zip(x.par_chunks(hidden))
        .zip(rstd)
        .for_each(|((out, x), rstd)| {
            *rstd = normalize(out, x, weight, spec);
            cpu.round(out);
        });
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn add_forward(
    cpu: &Cpu,
    sum: &mut Tensor,
    out: &mut Tensor,
    rstd: &mut Tensor,
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "add_rms_norm_forward";
    let (tokens, hidden) = (state.num_tokens(), weight.len());
    let x = cpu.rows(OP, x, tokens, hidden)?;
    let delta = cpu.rows(OP, delta, tokens, hidden)?;
    let total = cpu.rows_mut(OP, sum, tokens, hidden)?;
    total
        .par_chunks_mut(hidden)
        .zip(x.par_chunks(hidden).zip(delta.par_chunks(hidden)))
        .for_each(|(sum, (x, delta))| {
            for ((sum, x), delta) in sum.iter_mut().zip(x).zip(delta) {
                *sum = x + delta;
            }
            cpu.round(sum);
        });
    forward(cpu, out, rstd, sum, weight, spec, state)
}

pub(super) fn backward(
    cpu: &Cpu,
    d_x: GradOut<'_>,
    d_out: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
    spec: NormSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "rms_norm_backward";
    let (tokens, hidden) = (state.num_tokens(), weight.len());
    let x = cpu.rows(OP, x, tokens, hidden)?;
    let d_out = cpu.rows(OP, d_out, tokens, hidden)?;
    let rstd = cpu.rows(OP, rstd, tokens, 1)?;
    let (d_x, accumulate) = match d_x {
        GradOut::Skip => return Ok(()),
        GradOut::Overwrite(tensor) => (cpu.rows_mut(OP, tensor, tokens, hidden)?, false),
        GradOut::Add(tensor) => (cpu.rows_mut(OP, tensor, tokens, hidden)?, true),
    };
    let weight = weight.f32()?;
    d_x.par_chunks_mut(hidden)
        .zip(d_out.par_chunks(hidden).zip(x.par_chunks(hidden)).zip(rstd))
        .for_each(|(d_x, ((d_out, x), rstd))| {
            if !accumulate {
                d_x.fill(0.0);
            }
            normalize_backward(d_out, x, weight, *rstd, spec, |i, value| d_x[i] += value);
            cpu.round(d_x);
        });
    Ok(())
}

pub(super) fn gated_forward(
    cpu: &Cpu,
    y: &mut Tensor,
    rstd: &mut Tensor,
    o: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_rms_norm_forward";
    let (tokens, width, dv) = (state.num_tokens(), spec.value_dim(), spec.value_head_dim);
    let o = cpu.rows(OP, o, tokens, width)?;
    let qkvz = cpu.rows(OP, qkvz, tokens, spec.qkvz_dim())?;
    let y = cpu.rows_mut(OP, y, tokens, width)?;
    let rstd = cpu.rows_mut(OP, rstd, tokens, spec.num_value_heads)?;
    let weight = weight.f32()?;
    y.par_chunks_mut(width)
        .zip(rstd.par_chunks_mut(spec.num_value_heads))
        .zip(o.par_chunks(width).zip(qkvz.par_chunks(spec.qkvz_dim())))
        .for_each(|((y, rstd), (o, qkvz))| {
            for (head, (y, o)) in y.chunks_mut(dv).zip(o.chunks(dv)).enumerate() {
                let z = &qkvz[spec.z_column(head)..][..dv];
                rstd[head] = inverse_rms(o, spec.eps);
                for (i, y) in y.iter_mut().enumerate() {
                    *y = weight[i] * (o[i] * rstd[head]) * silu(z[i]);
                }
            }
            cpu.round(y);
        });
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gated_backward(
    cpu: &Cpu,
    d_o: &mut Tensor,
    d_qkvz: &mut Tensor,
    d_y: &Tensor,
    o: &Tensor,
    rstd: &Tensor,
    qkvz: &Tensor,
    weight: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_rms_norm_backward";
    let (tokens, width, dv) = (state.num_tokens(), spec.value_dim(), spec.value_head_dim);
    let qkvz_dim = spec.qkvz_dim();
    let d_y = cpu.rows(OP, d_y, tokens, width)?;
    let o = cpu.rows(OP, o, tokens, width)?;
    let rstd = cpu.rows(OP, rstd, tokens, spec.num_value_heads)?;
    let qkvz = cpu.rows(OP, qkvz, tokens, qkvz_dim)?;
    let d_o = cpu.rows_mut(OP, d_o, tokens, width)?;
    let d_qkvz = cpu.rows_mut(OP, d_qkvz, tokens, qkvz_dim)?;
    let weight = weight.f32()?;
    let plain = NormSpec {
        eps: spec.eps,
        zero_centered: false,
    };
    let saved = d_y.par_chunks(width).zip(o.par_chunks(width));
    d_o.par_chunks_mut(width)
        .zip(d_qkvz.par_chunks_mut(qkvz_dim))
        .zip(
            saved
                .zip(rstd.par_chunks(spec.num_value_heads))
                .zip(qkvz.par_chunks(qkvz_dim)),
        )
        .for_each(|((d_o, d_qkvz), (((d_y, o), rstd), qkvz))| {
            let mut gated = vec![0.0; dv];
            for head in 0..spec.num_value_heads {
                let (column, rstd) = (spec.z_column(head), rstd[head]);
                let heads = head * dv..(head + 1) * dv;
                let (d_y, o, z) = (
                    &d_y[heads.clone()],
                    &o[heads.clone()],
                    &qkvz[column..][..dv],
                );
                for i in 0..dv {
                    let gate = sigmoid(z[i]);
                    let d_silu = gate * (1.0 + z[i] * (1.0 - gate));
                    d_qkvz[column + i] = d_y[i] * weight[i] * o[i] * rstd * d_silu;
                    gated[i] = d_y[i] * z[i] * gate;
                }
                let d_o = &mut d_o[heads];
                normalize_backward(&gated, o, weight, rstd, plain, |i, value| d_o[i] = value);
                cpu.round(&mut d_qkvz[column..column + dv]);
            }
            cpu.round(d_o);
        });
    Ok(())
}
