//! Norm of q and k per head, rotary embedding: launchers.

use super::check::VECTOR;
use super::driver::{Grid, Kernel};
use super::params::{QK_NORM_ROPE_THREADS, QkNormRopeBackwardParams, QkNormRopeForwardParams};
use super::step::Limits;
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, QkWeights, StepState};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = Kernel {
    name: "qk_norm_rope_forward",
    threads: QK_NORM_ROPE_THREADS,
};
const BACKWARD: Kernel = Kernel {
    name: "qk_norm_rope_backward",
    threads: QK_NORM_ROPE_THREADS,
};
/// A head's lanes are in one warp.
const MAX_HEAD_DIM: usize = 256;

/// What both directions take by value, and the tables.
struct Layout {
    num_attention_heads: u32,
    num_key_value_heads: u32,
    head_dim: u32,
    q_head_stride: u32,
    rotary_dim: u32,
    lanes_per_head: u32,
    weight_offset: f32,
    q_weight: u64,
    k_weight: u64,
    cos: u64,
    sin: u64,
}

impl Layout {
    fn new(
        gpu: &Gpu,
        op: &'static str,
        weights: QkWeights<'_>,
        spec: &AttentionSpec,
        state: &StepState,
    ) -> Result<Self> {
        let head_dim = spec.head_dim;
        check::multiple(op, "head_dim", head_dim, VECTOR)?;
        check::multiple(op, "rotary_dim", spec.rotary_dim, 2)?;
        if head_dim > MAX_HEAD_DIM || spec.rotary_dim > head_dim {
            return Err(Error::Unsupported {
                what: format!(
                    "{op} with head_dim {head_dim}, rotary_dim {}",
                    spec.rotary_dim
                ),
                why: format!("its kernel takes rotary_dim <= head_dim <= {MAX_HEAD_DIM}"),
            });
        }
        let half = spec.rotary_dim / 2;
        let cos = check::rows(op, weights.cos, DType::F32, half)?;
        let table = Limits {
            positions: cos.capacity,
            ..Limits::default()
        };
        gpu.limit(table, state)?;
        // Null: no norm.
        let weight = |weight: Option<&Tensor>| match (spec.qk_norm, weight) {
            (Some(_), Some(weight)) => check::exact(op, weight, DType::F32, &[head_dim]),
            _ => Ok(0),
        };
        let lanes = head_dim.div_ceil(VECTOR).next_power_of_two();
        let is_zero_centered = spec.qk_norm.is_some_and(|norm| norm.zero_centered);
        Ok(Self {
            num_attention_heads: check::to_u32(op, "query heads", spec.num_attention_heads)?,
            num_key_value_heads: check::to_u32(op, "key heads", spec.num_key_value_heads)?,
            head_dim: check::to_u32(op, "head_dim", head_dim)?,
            q_head_stride: check::to_u32(op, "q_head_stride", spec.q_head_stride())?,
            rotary_dim: check::to_u32(op, "rotary_dim", spec.rotary_dim)?,
            lanes_per_head: check::to_u32(op, "head_dim", lanes)?,
            weight_offset: if is_zero_centered { 1.0 } else { 0.0 },
            q_weight: weight(weights.q_norm)?,
            k_weight: weight(weights.k_norm)?,
            cos: cos.address,
            sin: check::rows_of(op, weights.sin, DType::F32, [cos.capacity, half])?,
        })
    }
}

/// Shapes of a call's tensors.
struct Shapes {
    q_proj: [usize; 2],
    q: [usize; 2],
    q_rstd: [usize; 2],
    k: [usize; 2],
    k_rstd: [usize; 2],
}

impl Shapes {
    fn new(spec: &AttentionSpec, capacity: usize) -> Self {
        let (heads, kv_heads) = (spec.num_attention_heads, spec.num_key_value_heads);
        Self {
            q_proj: [capacity, heads * spec.q_head_stride()],
            q: [capacity, heads * spec.head_dim],
            q_rstd: [capacity, heads],
            k: [capacity, kv_heads * spec.head_dim],
            k_rstd: [capacity, kv_heads],
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    gpu: &Gpu,
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
    let layout = Layout::new(gpu, OP, weights, &spec, state)?;
    let capacity = q.shape().first().copied().unwrap_or(0);
    let shapes = Shapes::new(&spec, capacity);
    let params = QkNormRopeForwardParams {
        q: check::rows_of(OP, q, DType::Bf16, shapes.q)?,
        k: check::rows_of(OP, k, DType::Bf16, shapes.k)?,
        q_rstd: check::rows_of(OP, q_rstd, DType::F32, shapes.q_rstd)?,
        k_rstd: check::rows_of(OP, k_rstd, DType::F32, shapes.k_rstd)?,
        q_proj: check::rows_of(OP, q_proj, DType::Bf16, shapes.q_proj)?,
        k_proj: check::rows_of(OP, k_proj, DType::Bf16, shapes.k)?,
        q_weight: layout.q_weight,
        k_weight: layout.k_weight,
        cos: layout.cos,
        sin: layout.sin,
        step: gpu.step()?,
        num_attention_heads: layout.num_attention_heads,
        num_key_value_heads: layout.num_key_value_heads,
        head_dim: layout.head_dim,
        q_head_stride: layout.q_head_stride,
        rotary_dim: layout.rotary_dim,
        lanes_per_head: layout.lanes_per_head,
        eps: spec.qk_norm.map_or(0.0, |norm| norm.eps),
        weight_offset: layout.weight_offset,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", capacity)?);
    gpu.launch(FORWARD, grid, &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    gpu: &Gpu,
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
    let layout = Layout::new(gpu, OP, weights, &spec, state)?;
    let capacity = q_proj.shape().first().copied().unwrap_or(0);
    let shapes = Shapes::new(&spec, capacity);
    let params = QkNormRopeBackwardParams {
        d_q_proj: check::rows_of(OP, d_q_proj, DType::Bf16, shapes.q_proj)?,
        d_k_proj: check::rows_of(OP, d_k_proj, DType::Bf16, shapes.k)?,
        d_q: check::rows_of(OP, d_q, DType::Bf16, shapes.q)?,
        d_k: check::rows_of(OP, d_k, DType::Bf16, shapes.k)?,
        q_proj: check::rows_of(OP, q_proj, DType::Bf16, shapes.q_proj)?,
        k_proj: check::rows_of(OP, k_proj, DType::Bf16, shapes.k)?,
        q_rstd: check::rows_of(OP, q_rstd, DType::F32, shapes.q_rstd)?,
        k_rstd: check::rows_of(OP, k_rstd, DType::F32, shapes.k_rstd)?,
        q_weight: layout.q_weight,
        k_weight: layout.k_weight,
        cos: layout.cos,
        sin: layout.sin,
        step: gpu.step()?,
        num_attention_heads: layout.num_attention_heads,
        num_key_value_heads: layout.num_key_value_heads,
        head_dim: layout.head_dim,
        q_head_stride: layout.q_head_stride,
        rotary_dim: layout.rotary_dim,
        lanes_per_head: layout.lanes_per_head,
        weight_offset: layout.weight_offset,
        reserved: 0,
    };
    let grid = Grid::line(check::to_u32(OP, "capacity", capacity)?);
    gpu.launch(BACKWARD, grid, &params)
}
