//! Gated DeltaNet: projections, causal convolution, gates, the delta rule, gated norm, output projection.

use super::{Pass, Rows};
use crate::error::Result;
use crate::ops::{DeltaSpec, GradOut, Linear};
use crate::tensor::Tensor;

/// Weights.
#[derive(Debug)]
pub struct GatedDelta {
    /// `[qkvz_dim, D]`, rows grouped by key head.
    pub in_proj_qkvz: Linear,
    /// `[2 Hv, D]`, rows grouped by key head.
    pub in_proj_ba: Linear,
    /// `[conv_dim, taps]` f32.
    pub conv: Tensor,
    /// `[Hv]` f32.
    pub a_log: Tensor,
    /// `[Hv]` f32.
    pub dt_bias: Tensor,
    /// `[dv]` f32.
    pub norm: Tensor,
    /// `[D, value_dim]`.
    pub out_proj: Linear,
    /// Layout.
    pub spec: DeltaSpec,
}

/// Saved by forward.
#[derive(Debug)]
pub struct GatedDeltaActs {
    qkvz: Tensor,
    ba: Tensor,
    in_xa: Tensor,
    u: Tensor,
    g: Tensor,
    beta: Tensor,
    o: Tensor,
    rstd: Tensor,
    y: Tensor,
    out_xa: Tensor,
}

/// Gradients inside backward.
#[derive(Debug)]
pub struct GatedDeltaTmp {
    d_y: Tensor,
    d_o: Tensor,
    d_u: Tensor,
    d_g: Tensor,
    d_beta: Tensor,
    d_qkvz: Tensor,
    d_ba: Tensor,
}

impl GatedDelta {
    fn inputs(&self) -> [&Linear; 2] {
        [&self.in_proj_qkvz, &self.in_proj_ba]
    }

    /// Whether any projection has an adapter.
    pub fn has_adapter(&self) -> bool {
        self.inputs()
            .iter()
            .chain([&&self.out_proj])
            .any(|linear| linear.lora.is_some())
    }

    /// Buffers of one layer.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>) -> Result<GatedDeltaActs> {
        let spec = &self.spec;
        let in_rank = self.inputs().iter().map(|linear| linear.rank()).sum();
        Ok(GatedDeltaActs {
            qkvz: rows.activation("qkvz", spec.qkvz_dim())?,
            ba: rows.activation("ba", 2 * spec.num_value_heads)?,
            in_xa: rows.activation("in_xa", in_rank)?,
            u: rows.activation("u", spec.conv_dim())?,
            g: rows.f32("g", spec.num_value_heads)?,
            beta: rows.f32("beta", spec.num_value_heads)?,
            o: rows.activation("o", spec.value_dim())?,
            rstd: rows.f32("rstd", spec.num_value_heads)?,
            y: rows.activation("y", spec.value_dim())?,
            out_xa: rows.activation("out_xa", self.out_proj.rank())?,
        })
    }

    /// Temporaries, one set for all layers.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc_tmp(&self, rows: &mut Rows<'_>) -> Result<GatedDeltaTmp> {
        let spec = &self.spec;
        Ok(GatedDeltaTmp {
            d_y: rows.activation("d_y", spec.value_dim())?,
            d_o: rows.activation("d_o", spec.value_dim())?,
            d_u: rows.activation("d_u", spec.conv_dim())?,
            d_g: rows.f32("d_g", spec.num_value_heads)?,
            d_beta: rows.f32("d_beta", spec.num_value_heads)?,
            d_qkvz: rows.activation("d_qkvz", spec.qkvz_dim())?,
            d_ba: rows.activation("d_ba", 2 * spec.num_value_heads)?,
        })
    }

    /// `out = gated_norm(delta_rule(conv(x Wqkvz^T), gates(x Wba^T))) Wout^T`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        out: &mut Tensor,
        x: &Tensor,
        acts: &mut GatedDeltaActs,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let spec = self.spec;
        let GatedDeltaActs {
            qkvz,
            ba,
            in_xa,
            u,
            g,
            beta,
            o,
            rstd,
            y,
            out_xa,
        } = acts;
        ops.linear_forward(
            &mut [&mut *qkvz, &mut *ba],
            in_xa,
            x,
            &self.inputs(),
            lora,
            state,
        )?;
        ops.causal_conv_forward(u, qkvz, &self.conv, spec, state)?;
        ops.delta_gates_forward(g, beta, ba, &self.a_log, &self.dt_bias, spec, state)?;
        ops.gated_delta_forward(o, u, g, beta, spec, state)?;
        ops.gated_rms_norm_forward(y, rstd, o, qkvz, &self.norm, spec, state)?;
        ops.linear_forward(&mut [out], out_xa, y, &[&self.out_proj], lora, state)
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
        acts: &GatedDeltaActs,
        tmp: &mut GatedDeltaTmp,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let spec = self.spec;
        let GatedDeltaActs {
            qkvz,
            ba,
            in_xa,
            u,
            g,
            beta,
            o,
            rstd,
            y,
            out_xa,
        } = acts;
        let GatedDeltaTmp {
            d_y,
            d_o,
            d_u,
            d_g,
            d_beta,
            d_qkvz,
            d_ba,
        } = tmp;
        let out_proj = &[&self.out_proj];
        let d_y_out = GradOut::Overwrite(&mut *d_y);
        ops.linear_backward(d_y_out, d_lora, &[d_out], y, out_xa, out_proj, lora, state)?;
        ops.gated_rms_norm_backward(d_o, d_qkvz, d_y, o, rstd, qkvz, &self.norm, spec, state)?;
        ops.gated_delta_backward(d_u, d_g, d_beta, d_o, u, g, beta, spec, state)?;
        ops.delta_gates_backward(
            d_ba,
            d_g,
            d_beta,
            ba,
            &self.a_log,
            &self.dt_bias,
            spec,
            state,
        )?;
        ops.causal_conv_backward(d_qkvz, d_u, qkvz, &self.conv, spec, state)?;
        let d_inputs = &[&*d_qkvz, &*d_ba];
        ops.linear_backward(d_x, d_lora, d_inputs, x, in_xa, &self.inputs(), lora, state)
    }
}
