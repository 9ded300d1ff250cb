//! Mixture of experts: router, routed experts, and the shared expert behind its sigmoid gate.

use super::mlp::{Mlp, MlpActs, MlpTmp};
use super::{Pass, Rows};
use crate::error::Result;
use crate::ops::{Experts, GradOut, Linear, Routing};
use crate::tensor::Tensor;

/// Weights.
#[derive(Debug)]
pub struct Moe {
    /// `[E, D]`.
    pub router: Linear,
    /// The routed experts.
    pub experts: Experts,
    /// The shared expert, where there is one.
    pub shared: Option<SharedExpert>,
    /// `K`.
    pub num_experts_per_tok: usize,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
}

/// The expert every token goes through.
#[derive(Debug)]
pub struct SharedExpert {
    /// Its SwiGLU.
    pub mlp: Mlp,
    /// `[1, D]`.
    pub gate: Linear,
}

/// Saved by forward.
#[derive(Debug)]
pub struct MoeActs {
    router_logits: Tensor,
    /// The router and the shared gate have no adapter.
    no_xa: Tensor,
    routing: Routing,
    gate: Tensor,
    up: Tensor,
    gate_up_xa: Tensor,
    h: Tensor,
    down_xa: Tensor,
    shared: Option<SharedActs>,
}

/// Saved by the shared expert's forward.
#[derive(Debug)]
struct SharedActs {
    mlp: MlpActs,
    out: Tensor,
    logit: Tensor,
}

/// Temporaries of forward and backward.
#[derive(Debug)]
pub struct MoeTmp {
    /// Forward: expert outputs; backward: gradients of the gathered inputs.
    routed: Tensor,
    d_h: Tensor,
    d_topk_weights: Tensor,
    d_logits: Tensor,
    shared: Option<SharedTmp>,
}

/// Temporaries of the shared expert.
#[derive(Debug)]
struct SharedTmp {
    mlp: MlpTmp,
    d_out: Tensor,
    d_logit: Tensor,
}

impl Moe {
    /// Whether any expert has an adapter.
    pub fn has_adapter(&self) -> bool {
        let lora = &self.experts.lora;
        [lora.gate, lora.up, lora.down].iter().any(Option::is_some)
            || self
                .shared
                .as_ref()
                .is_some_and(|shared| shared.mlp.has_adapter())
    }

    /// Router logits of the last forward, `[T, E]`.
    pub fn router_logits(acts: &MoeActs) -> &Tensor {
        &acts.router_logits
    }

    /// Buffers of one layer.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(&self, rows: &mut Rows<'_>) -> Result<MoeActs> {
        let (k, num_experts) = (self.num_experts_per_tok, self.router.out_features);
        let (width, hidden) = (self.experts.intermediate_size, self.experts.hidden_size);
        let capacity = rows.capacity();
        let routing = Routing {
            topk_ids: rows.u32("topk_ids", &[capacity, k])?,
            topk_weights: rows.f32("topk_weights", k)?,
            expert_offsets: rows.u32("expert_offsets", &[num_experts + 1])?,
            slot_of_row: rows.u32("slot_of_row", &[capacity * k])?,
            row_of_slot: rows.u32("row_of_slot", &[capacity * k])?,
            num_experts,
            num_experts_per_tok: k,
            norm_topk_prob: self.norm_topk_prob,
        };
        let shared = match &self.shared {
            None => None,
            Some(shared) => Some(rows.scope("shared_expert", |rows| {
                Ok(SharedActs {
                    mlp: shared.mlp.alloc(rows)?,
                    out: rows.activation("out", hidden)?,
                    logit: rows.f32("logit", 1)?,
                })
            })?),
        };
        Ok(MoeActs {
            router_logits: rows.f32("router_logits", num_experts)?,
            no_xa: rows.activation("no_xa", 0)?,
            routing,
            gate: rows.routed("gate", k, width)?,
            up: rows.routed("up", k, width)?,
            gate_up_xa: rows.routed("gate_up_xa", k, self.experts.lora.gate_up_rank())?,
            h: rows.routed("h", k, width)?,
            down_xa: rows.routed("down_xa", k, self.experts.lora.down_rank())?,
            shared,
        })
    }

    /// Temporaries, one set for all layers.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc_tmp(&self, rows: &mut Rows<'_>) -> Result<MoeTmp> {
        let (k, hidden) = (self.num_experts_per_tok, self.experts.hidden_size);
        let shared = match &self.shared {
            None => None,
            Some(shared) => Some(rows.scope("shared_expert", |rows| {
                Ok(SharedTmp {
                    mlp: shared.mlp.alloc_tmp(rows)?,
                    d_out: rows.activation("d_out", hidden)?,
                    d_logit: rows.f32("d_logit", 1)?,
                })
            })?),
        };
        Ok(MoeTmp {
            routed: rows.routed("routed", k, hidden)?,
            d_h: rows.routed("d_h", k, self.experts.intermediate_size)?,
            d_topk_weights: rows.f32("d_topk_weights", k)?,
            d_logits: rows.f32("d_logits", self.router.out_features)?,
            shared,
        })
    }

    /// `out = sum_e w_e expert_e(x) + sigmoid(x w_sg^T) shared(x)`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn forward(
        &self,
        pass: Pass<'_>,
        out: &mut Tensor,
        x: &Tensor,
        acts: &mut MoeActs,
        tmp: &mut MoeTmp,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let experts = &self.experts;
        let MoeActs {
            router_logits,
            no_xa,
            routing,
            gate,
            up,
            gate_up_xa,
            h,
            down_xa,
            shared,
        } = acts;
        ops.linear_forward(
            &mut [&mut *router_logits],
            no_xa,
            x,
            &[&self.router],
            lora,
            state,
        )?;
        ops.moe_route_forward(routing, router_logits, state)?;
        ops.moe_gate_up_forward(h, gate, up, gate_up_xa, x, routing, experts, lora, state)?;
        let expert_out = &mut tmp.routed;
        ops.moe_down_forward(out, expert_out, down_xa, h, routing, experts, lora, state)?;
        if let (
            Some(weights),
            Some(SharedActs {
                mlp,
                out: shared_out,
                logit,
            }),
        ) = (&self.shared, shared)
        {
            weights.mlp.forward(pass, shared_out, x, mlp)?;
            ops.linear_forward(&mut [&mut *logit], no_xa, x, &[&weights.gate], lora, state)?;
            ops.shared_expert_add_forward(out, shared_out, logit, state)?;
        }
        Ok(())
    }

    /// Gradient of `x` (overwritten, if wanted) and of the adapters from that of `out`.
    ///
    /// # Errors
    /// Those of the ops.
    pub fn backward(
        &self,
        pass: Pass<'_>,
        mut d_x: Option<&mut Tensor>,
        d_lora: &mut Tensor,
        d_out: &Tensor,
        x: &Tensor,
        acts: &mut MoeActs,
        tmp: &mut MoeTmp,
    ) -> Result<()> {
        let Pass { ops, lora, state } = pass;
        let experts = &self.experts;
        let MoeActs {
            router_logits,
            no_xa,
            routing,
            gate,
            up,
            gate_up_xa,
            h,
            down_xa,
            shared,
        } = acts;
        let MoeTmp {
            routed,
            d_h,
            d_topk_weights,
            d_logits,
            shared: shared_tmp,
        } = tmp;
        ops.moe_down_backward(
            d_h,
            d_topk_weights,
            d_lora,
            d_out,
            h,
            down_xa,
            routing,
            experts,
            lora,
            state,
        )?;
        let first = d_x.as_deref_mut().map_or(GradOut::Skip, GradOut::Overwrite);
        ops.moe_gate_up_backward(
            first, d_lora, routed, d_h, gate, up, gate_up_xa, x, routing, experts, lora, state,
        )?;
        if let Some(d_x) = d_x.as_deref_mut() {
            ops.moe_route_backward(d_logits, d_topk_weights, router_logits, routing, state)?;
            let (add, router) = (GradOut::Add(d_x), &[&self.router]);
            ops.linear_backward(add, d_lora, &[&*d_logits], x, no_xa, router, lora, state)?;
        }
        if let (Some(weights), Some(acts), Some(tmp)) = (&self.shared, shared, shared_tmp) {
            let SharedTmp {
                mlp,
                d_out: d_shared,
                d_logit,
            } = tmp;
            let SharedActs {
                mlp: mlp_acts,
                out,
                logit,
            } = acts;
            ops.shared_expert_add_backward(d_shared, d_logit, d_out, out, logit, state)?;
            let d_x_mlp = d_x.as_deref_mut().map_or(GradOut::Skip, GradOut::Add);
            weights
                .mlp
                .backward(pass, d_x_mlp, d_lora, d_shared, x, mlp_acts, mlp)?;
            if let Some(d_x) = d_x {
                let (add, gate) = (GradOut::Add(d_x), &[&weights.gate]);
                ops.linear_backward(add, d_lora, &[&*d_logit], x, no_xa, gate, lora, state)?;
            }
        }
        Ok(())
    }
}
