//! q/k norm per head and rotary embedding (`NeoX` halves: dimension `i` pairs with `i + rotary_dim / 2`).

use rayon::prelude::*;

use super::Cpu;
use super::norm::{normalize, normalize_backward};
use crate::error::Result;
use crate::ops::{AttentionSpec, NormSpec, QkWeights, StepState};
use crate::tensor::Tensor;

/// Rotates the leading `2 * cos.len()` elements by the angles; `sign = -1` is the inverse.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    let (first, rest) = head.split_at_mut(half);
    for (((a, b), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        let (x, y, sin) = (*a, *b, sign * sin);
        *a = x * cos - y * sin;
        *b = y * cos + x * sin;
    }
}

/// One of q and k.
struct Side<'a> {
    num_heads: usize,
    head_dim: usize,
    /// Elements from head to head on the projection's side.
    stride: usize,
    norm: Option<(NormSpec, &'a [f32])>,
}

impl Side<'_> {
    fn forward(
        &self,
        cpu: &Cpu,
        out: &mut [f32],
        rstd: &mut [f32],
        x: &[f32],
        cos: &[f32],
        sin: &[f32],
    ) {
        for head in 0..self.num_heads {
            let out = &mut out[head * self.head_dim..][..self.head_dim];
            let x = &x[head * self.stride..][..self.head_dim];
            match self.norm {
                Some((spec, weight)) => {
                    rstd[head] = normalize(out, x, weight, spec);
                    cpu.round(out);
                }
                None => out.copy_from_slice(x),
            }
            rotate(out, cos, sin, 1.0);
            cpu.round(out);
        }
    }

    fn backward(
        &self,
        cpu: &Cpu,
        d_x: &mut [f32],
        d_out: &[f32],
        x: &[f32],
        rstd: &[f32],
        cos: &[f32],
        sin: &[f32],
    ) {
        let mut d_head = vec![0.0; self.head_dim];
        for head in 0..self.num_heads {
            d_head.copy_from_slice(&d_out[head * self.head_dim..][..self.head_dim]);
            rotate(&mut d_head, cos, sin, -1.0);
            let x = &x[head * self.stride..][..self.head_dim];
            let d_x = &mut d_x[head * self.stride..][..self.head_dim];
            match self.norm {
                Some((spec, weight)) => {
                    normalize_backward(&d_head, x, weight, rstd[head], spec, |i, v| d_x[i] = v);
                }
                None => d_x.copy_from_slice(&d_head),
            }
            cpu.round(d_x);
        }
    }
}

/// q's and k's sides, and the tables.
struct Layout<'a> {
    q: Side<'a>,
    k: Side<'a>,
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
}

impl<'a> Layout<'a> {
    fn new(weights: QkWeights<'a>, spec: AttentionSpec) -> Result<Self> {
        let norm = |weight: Option<&'a Tensor>| -> Result<Option<(NormSpec, &'a [f32])>> {
            match (spec.qk_norm, weight) {
                (Some(norm), Some(weight)) => Ok(Some((norm, weight.f32()?))),
                _ => Ok(None),
            }
        };
        let head_dim = spec.head_dim;
        let (num_q, num_k) = (spec.num_attention_heads, spec.num_key_value_heads);
        let q = Side {
            num_heads: num_q,
            head_dim,
            stride: spec.q_head_stride(),
            norm: norm(weights.q_norm)?,
        };
        let k = Side {
            num_heads: num_k,
            head_dim,
            stride: head_dim,
            norm: norm(weights.k_norm)?,
        };
        Ok(Self {
            q,
            k,
            cos: weights.cos.f32()?,
            sin: weights.sin.f32()?,
            half: spec.rotary_dim / 2,
        })
    }

    fn angles(&self, position: u32) -> (&'a [f32], &'a [f32]) {
        let first = position as usize * self.half;
        (
            &self.cos[first..first + self.half],
            &self.sin[first..first + self.half],
        )
    }
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    cpu: &Cpu,
    q: &mut Tensor,
    k: &mut Tensor,
    q_rstd: &mut Tensor,
    k_rstd: &mut Tensor,
    q_proj: &Tensor,
    k_proj: &Tensor,
    weights: QkWeights<'_>,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "qk_norm_rope_forward";
    let layout = Layout::new(weights, spec)?;
    let tokens = state.num_tokens();
    for (side, out, rstd, x) in [
        (&layout.q, q, q_rstd, q_proj),
        (&layout.k, k, k_rstd, k_proj),
    ] {
        let (out_width, x_width) = (side.num_heads * side.head_dim, side.num_heads * side.stride);
        let out = cpu.rows_mut(OP, out, tokens, out_width)?;
        let rstd = cpu.rows_mut(OP, rstd, tokens, side.num_heads)?;
        let x = cpu.rows(OP, x, tokens, x_width)?;
        out.par_chunks_mut(out_width)
            .zip(rstd.par_chunks_mut(side.num_heads))
            .zip(x.par_chunks(x_width).zip(&state.batch.position_ids))
            .for_each(|((out, rstd), (x, position))| {
                let (cos, sin) = layout.angles(*position);
                side.forward(cpu, out, rstd, x, cos, sin);
            });
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    cpu: &Cpu,
    d_q_proj: &mut Tensor,
    d_k_proj: &mut Tensor,
    d_q: &Tensor,
    d_k: &Tensor,
    q_proj: &Tensor,
    k_proj: &Tensor,
    q_rstd: &Tensor,
    k_rstd: &Tensor,
    weights: QkWeights<'_>,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "qk_norm_rope_backward";
    let layout = Layout::new(weights, spec)?;
    let tokens = state.num_tokens();
    let sides = [
        (&layout.q, d_q_proj, d_q, q_proj, q_rstd),
        (&layout.k, d_k_proj, d_k, k_proj, k_rstd),
    ];
    for (side, d_x, d_out, x, rstd) in sides {
        let (out_width, x_width) = (side.num_heads * side.head_dim, side.num_heads * side.stride);
        let d_x = cpu.rows_mut(OP, d_x, tokens, x_width)?;
        let d_out = cpu.rows(OP, d_out, tokens, out_width)?;
        let x = cpu.rows(OP, x, tokens, x_width)?;
        let rstd = cpu.rows(OP, rstd, tokens, side.num_heads)?;
        d_x.par_chunks_mut(x_width)
            .zip(d_out.par_chunks(out_width).zip(x.par_chunks(x_width)))
            .zip(
                rstd.par_chunks(side.num_heads)
                    .zip(&state.batch.position_ids),
            )
            .for_each(|((d_x, (d_out, x)), (rstd, position))| {
                let (cos, sin) = layout.angles(*position);
                side.backward(cpu, d_x, d_out, x, rstd, cos, sin);
            });
    }
    Ok(())
}
