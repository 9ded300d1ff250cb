//! Softmax attention: q/k/v projections, q/k norm, rotary embedding, optional output gate, output projection.

use super::rope::Rope;
use super::{Pass, Rows};
use crate::error::Result;
use crate::ops::{AttentionSpec, GradOut, Linear, QkWeights};
use crate::tensor::Tensor;

/// Weights.
#[derive(Debug)]
pub struct Attention {
    /// `[Hq * q_head_stride, D]`.
    pub q_proj: Linear,
    /// `[Hk * hd, D]`.
    pub k_proj: Linear,
    /// `[Hk * hd, D]`.
    pub v_proj: Linear,
    /// `[D, Hq * hd]`.
    pub o_proj: Linear,
    /// `[hd]`.
    pub q_norm: Option<Tensor>,
    /// `[hd]`.
    pub k_norm: Option<Tensor>,
    /// Layout.
    pub spec: AttentionSpec,
}

/// Saved by forward.
#[derive(Debug)]
pub struct AttentionActs {
    q_proj: Tensor,
    k_proj: Tensor,
    v: Tensor,
    qkv_xa: Tensor,
    q: Tensor,
    k: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    o: Tensor,
    lse: Tensor,
    /// `o` after the gate, where there is one.
    gated: Option<Tensor>,
    o_xa: Tensor,
}

/// Gradients inside backward.
#[derive(Debug)]
pub struct AttentionTmp {
    d_gated: Option<Tensor>,
    d_o: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_q_proj: Tensor,
    d_k_proj: Tensor,
}

impl Attention {
    fn qkv(&self) -> [&Linear; 3] {
        [&self.q_proj, &self.k_proj, &self.v_proj]
    }

    fn qk_weights<'a>(&'a self, rope: &'a Rope) -> QkWeights<'a> {
        let (q_norm, k_norm) = (self.q_norm.as_ref(), self.k_norm.as_ref());
        QkWeights {
            q_norm,
            k_norm,
            cos: &rope.cos,
            sin: &rope.sin,
        }
    }

    /// Whether any projection has an adapter.
    pub fn has_adapter(&self) -> bool {
        self.qkv()
            .iter()
            .chain([&&self.o_proj])
            .any(|linear| linear.lora.is_some())
    }

    /// Buffers of one layer.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>) -> Result<AttentionActs> {
        let spec = &self.spec;
        let (q_dim, k_dim) = (
            spec.num_attention_heads * spec.head_dim,
            spec.num_key_value_heads * spec.head_dim,
        );
        let gated = if spec.output_gate {
            Some(rows.activation("gated", q_dim)?)
        } else {
            None
        };
        Ok(AttentionActs {
            q_proj: rows.activation("q_proj", self.q_proj.out_features)?,
            k_proj: rows.activation("k_proj", k_dim)?,
            v: rows.activation("v", k_dim)?,
            qkv_xa: rows.activation("qkv_xa", self.qkv().iter().map(|l| l.rank()).sum())?,
            q: rows.activation("q", q_dim)?,
            k: rows.activation("k", k_dim)?,
            q_rstd: rows.f32("q_rstd", spec.num_attention_heads)?,
            k_rstd: rows.f32("k_rstd", spec.num_key_value_heads)?,
            o: rows.activation("o", q_dim)?,
            lse: rows.f32("lse", spec.num_attention_heads)?,
            gated,
            o_xa: rows.activation("o_xa", self.o_proj.rank())?,
        })
    }

    /// Temporaries, one set for all layers.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc_tmp(&self, rows: &mut Rows<'_>) -> Result<AttentionTmp> {
        let spec = &self.spec;
        let (q_dim, k_dim) = (
            spec.num_attention_heads * spec.head_dim,
            spec.num_key_value_heads * spec.head_dim,
        );
        let d_gated = if spec.output_gate {
            Some(rows.activation("d_gated", q_dim)?)
        } else {
            None
        };
        Ok(AttentionTmp {
            d_gated,
            d_o: rows.activation("d_o", q_dim)?,
            d_q: rows.activation("d_q", q_dim)?,
            d_k: rows.activation("d_k", k_dim)?,
            d_v: rows.activation("d_v", k_dim)?,
            d_q_proj: rows.activation("d_q_proj", self.q_proj.out_features)?,
            d_k_proj: rows.activation("d_k_proj", k_dim)?,
        })
    }

    /// `out = gate(attention(rope(norm(q)), rope(norm(k)), v)) Wo^T`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        out: &mut Tensor,
        x: &Tensor,
        rope: &Rope,
        acts: &mut AttentionActs,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let (spec, weights) = (self.spec, self.qk_weights(rope));
        let AttentionActs {
            q_proj,
            k_proj,
            v,
            qkv_xa,
            q,
            k,
            q_rstd,
            k_rstd,
            o,
            lse,
            gated,
            o_xa,
        } = acts;
        let qkv = &mut [&mut *q_proj, &mut *k_proj, &mut *v];
        ops.linear_forward(qkv, qkv_xa, x, &self.qkv(), lora, state)?;
        ops.qk_norm_rope_forward(q, k, q_rstd, k_rstd, q_proj, k_proj, weights, spec, state)?;
        ops.attention_forward(o, lse, q, k, v, spec, state)?;
        let mixed = match gated {
            Some(gated) => {
                ops.attention_gate_forward(gated, o, q_proj, spec, state)?;
                gated
            }
            None => o,
        };
        ops.linear_forward(&mut [out], o_xa, mixed, &[&self.o_proj], lora, state)
    }

    /// Gradient of `x` and of the adapters from that of `out`.
    ///
    /// # Errors
    /// Those of the ops.
    #[expect(
        clippy::too_many_arguments,
        reason = "gradients, inputs, saved, temporaries"
    )]
    pub fn backward(
        &self,
        pass: Pass<'_>,
        d_x: GradOut<'_>,
        d_lora: &mut Tensor,
        d_out: &Tensor,
        x: &Tensor,
        rope: &Rope,
        acts: &AttentionActs,
        tmp: &mut AttentionTmp,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let (spec, weights) = (self.spec, self.qk_weights(rope));
        let AttentionTmp {
            d_gated,
            d_o,
            d_q,
            d_k,
            d_v,
            d_q_proj,
            d_k_proj,
        } = tmp;
        let mixed = acts.gated.as_ref().unwrap_or(&acts.o);
        let d_mixed = GradOut::Overwrite(d_gated.as_mut().unwrap_or(&mut *d_o));
        ops.linear_backward(
            d_mixed,
            d_lora,
            &[d_out],
            mixed,
            &acts.o_xa,
            &[&self.o_proj],
            lora,
            state,
        )?;
        if let Some(d_gated) = d_gated {
            let (o, q_proj) = (&acts.o, &acts.q_proj);
            ops.attention_gate_backward(d_o, d_q_proj, d_gated, o, q_proj, spec, state)?;
        }
        let AttentionActs {
            q_proj,
            k_proj,
            v,
            qkv_xa,
            q,
            k,
            q_rstd,
            k_rstd,
            o,
            lse,
            ..
        } = acts;
        ops.attention_backward(d_q, d_k, d_v, d_o, o, lse, q, k, v, spec, state)?;
        ops.qk_norm_rope_backward(
            d_q_proj, d_k_proj, d_q, d_k, q_proj, k_proj, q_rstd, k_rstd, weights, spec, state,
        )?;
        let d_qkv = &[&*d_q_proj, &*d_k_proj, &*d_v];
        ops.linear_backward(d_x, d_lora, d_qkv, x, qkv_xa, &self.qkv(), lora, state)
    }
}
