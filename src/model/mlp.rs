//! SwiGLU: `out = (silu(x Wg^T) * x Wu^T) Wd^T`. A dense layer's MLP, and the shared expert.

use super::{Pass, Rows};
use crate::error::Result;
use crate::ops::{GradOut, Linear};
use crate::tensor::Tensor;

/// Weights.
#[derive(Debug)]
pub struct Mlp {
    /// `[I, D]`.
    pub gate_proj: Linear,
    /// `[I, D]`.
    pub up_proj: Linear,
    /// `[D, I]`.
    pub down_proj: Linear,
}

/// Saved by forward.
#[derive(Debug)]
pub struct MlpActs {
    gate: Tensor,
    up: Tensor,
    gate_up_xa: Tensor,
    h: Tensor,
    down_xa: Tensor,
}

/// Gradients inside backward.
#[derive(Debug)]
pub struct MlpTmp {
    d_h: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
}

impl Mlp {
    fn gate_up(&self) -> [&Linear; 2] {
        [&self.gate_proj, &self.up_proj]
    }

    /// Whether any projection has an adapter.
    pub fn has_adapter(&self) -> bool {
        self.gate_up()
            .iter()
            .chain([&&self.down_proj])
            .any(|linear| linear.lora.is_some())
    }

    /// Buffers of one layer.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>) -> Result<MlpActs> {
        let width = self.gate_proj.out_features;
        Ok(MlpActs {
            gate: rows.activation("gate", width)?,
            up: rows.activation("up", width)?,
            gate_up_xa: rows
                .activation("gate_up_xa", self.gate_proj.rank() + self.up_proj.rank())?,
            h: rows.activation("h", width)?,
            down_xa: rows.activation("down_xa", self.down_proj.rank())?,
        })
    }

    /// Temporaries, one set for all layers.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc_tmp(&self, rows: &mut Rows<'_>) -> Result<MlpTmp> {
        let width = self.gate_proj.out_features;
        Ok(MlpTmp {
            d_h: rows.activation("d_h", width)?,
            d_gate: rows.activation("d_gate", width)?,
            d_up: rows.activation("d_up", width)?,
        })
    }

    /// `out = (silu(x Wg^T) * x Wu^T) Wd^T`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        out: &mut Tensor,
        x: &Tensor,
        acts: &mut MlpActs,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let MlpActs {
            gate,
            up,
            gate_up_xa,
            h,
            down_xa,
        } = acts;
        ops.linear_swiglu_forward(h, gate, up, gate_up_xa, x, self.gate_up(), lora, state)?;
        ops.linear_forward(&mut [out], down_xa, h, &[&self.down_proj], lora, state)
    }

    /// Gradient of `x` and of the adapters from that of `out`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn backward(
        &self,
        pass: Pass<'_>,
        d_x: GradOut<'_>,
        d_lora: &mut Tensor,
        d_out: &Tensor,
        x: &Tensor,
        acts: &MlpActs,
        tmp: &mut MlpTmp,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let MlpActs {
            gate,
            up,
            gate_up_xa,
            h,
            down_xa,
        } = acts;
        let MlpTmp { d_h, d_gate, d_up } = tmp;
        let down = &[&self.down_proj];
        let d_h_out = GradOut::Overwrite(&mut *d_h);
        ops.linear_backward(d_h_out, d_lora, &[d_out], h, down_xa, down, lora, state)?;
        ops.swiglu_backward(d_gate, d_up, d_h, gate, up, state)?;
        let d_gate_up = &[&*d_gate, &*d_up];
        ops.linear_backward(
            d_x,
            d_lora,
            d_gate_up,
            x,
            gate_up_xa,
            &self.gate_up(),
            lora,
            state,
        )
    }
}
