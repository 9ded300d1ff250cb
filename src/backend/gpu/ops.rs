//! The list that maps [`Ops`] onto the files of this backend.

use std::sync::Arc;

use super::driver::ALIGNMENT;
use super::step::{Limits, StepBuffers};
use super::{
    Gpu, adamw, attention, cross_entropy, delta_inputs, elementwise, gated_delta, gated_norm,
    linear, moe, nf4, norm, place, rope, route,
};
use crate::error::{Error, Result};
use crate::ops::{
    AdamWStep, AttentionSpec, DeltaSpec, Experts, GradOut, Linear, Moments, NormSpec, Ops,
    QkWeights, Routing, StepState, UpdateReport,
};
use crate::store::Weight;
use crate::tensor::arena::{Arena, Entry};
use crate::tensor::{DType, Tensor};

impl Ops for Gpu {
    fn activation_dtype(&self) -> DType {
        DType::Bf16
    }

    fn arena(&self, plan: &Arena) -> Result<Arena> {
        let aligned = |entry: &Entry| entry.num_bytes.next_multiple_of(ALIGNMENT);
        let num_bytes = plan.ledger().iter().map(aligned).sum();
        self.driver.reserve("buffers", num_bytes)?;
        let driver = Arc::clone(&self.driver);
        Ok(Arena::new(Box::new(move |name, shape, dtype| {
            place::alloc(&*driver, name, shape, dtype)
        })))
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        self.driver.free_memory()
    }

    fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
    }

    fn place(&self, tensor: Tensor) -> Result<Tensor> {
        place::tensor(&*self.driver, &tensor)
    }

    fn place_weight(&self, weight: Weight) -> Result<Weight> {
        place::weight(&*self.driver, &weight)
    }

    fn place_experts(&self, experts: [Vec<Weight>; 3]) -> Result<[Vec<Weight>; 3]> {
        let [gate, up, down] = experts;
        let place = |weights: Vec<Weight>| place::weights(&*self.driver, &weights);
        Ok([place(gate)?, place(up)?, place(down)?])
    }

    fn quantize(&self, weights: &Tensor, double_quant: bool) -> Result<Weight> {
        nf4::quantize(self, weights, double_quant).map(Weight::Nf4)
    }

    fn reserve(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize> {
        self.recordings.borrow_mut().clear();
        self.limits.set(Limits::default());
        let scratch = self.scratch.plan(|| pass(self))?;
        let step = StepBuffers::alloc(&*self.driver, capacity)?;
        let num_bytes = scratch + step.num_bytes();
        self.step.replace(Some(step));
        Ok(num_bytes)
    }

    fn scratch_bytes(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize> {
        let scratch = self.scratch.high_water(|| pass(self))?;
        Ok(scratch + StepBuffers::bytes_for(capacity))
    }

    fn load_batch(&self, state: &StepState) -> Result<()> {
        let mut step = self.step.borrow_mut();
        let fits = |step: &StepBuffers| step.capacity() >= state.num_tokens();
        // Activations, scratch and recordings are for the capacity that was reserved: a larger batch is refused.
        let step = match &mut *step {
            Some(step) if fits(step) || self.scratch.is_reserved() => step,
            step => step.insert(StepBuffers::alloc(&*self.driver, state.num_tokens())?),
        };
        self.limits.get().check(state)?;
        step.write(state)
    }

    fn recorded(&self, name: &'static str, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.is_planning() {
            return body();
        }
        if !self.scratch.is_reserved() {
            return Err(Error::Kernel {
                reason: format!("`{name}` was to be recorded before `reserve`"),
            });
        }
        if let Some(recording) = self.recordings.borrow().get(name) {
            return recording.replay();
        }
        let recording = self.driver.record(body)?;
        recording.replay()?;
        self.recordings.borrow_mut().insert(name, recording);
        Ok(())
    }

    fn embedding_forward(&self, out: &mut Tensor, table: &Weight, state: &StepState) -> Result<()> {
        elementwise::embedding_forward(self, out, table, state)
    }

    fn rms_norm_forward(
        &self,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        spec: NormSpec,
        state: &StepState,
    ) -> Result<()> {
        norm::forward(self, out, rstd, x, weight, spec, state)
    }

    fn add_rms_norm_forward(
        &self,
        sum: &mut Tensor,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        delta: &Tensor,
        weight: &Tensor,
        spec: NormSpec,
        state: &StepState,
    ) -> Result<()> {
        norm::add_forward(self, sum, out, rstd, x, delta, weight, spec, state)
    }

    fn rms_norm_backward(
        &self,
        d_x: GradOut<'_>,
        d_out: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
        spec: NormSpec,
        state: &StepState,
    ) -> Result<()> {
        norm::backward(self, d_x, d_out, x, rstd, weight, spec, state)
    }

    fn linear_forward(
        &self,
        outs: &mut [&mut Tensor],
        xa: &mut Tensor,
        x: &Tensor,
        linears: &[&Linear],
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        linear::forward(self, outs, xa, x, linears, lora, state)
    }

    fn linear_backward(
        &self,
        d_x: GradOut<'_>,
        d_lora: &mut Tensor,
        d_outs: &[&Tensor],
        x: &Tensor,
        xa: &Tensor,
        linears: &[&Linear],
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        linear::backward(self, d_x, d_lora, d_outs, x, xa, linears, lora, state)
    }

    fn linear_swiglu_forward(
        &self,
        h: &mut Tensor,
        gate: &mut Tensor,
        up: &mut Tensor,
        xa: &mut Tensor,
        x: &Tensor,
        linears: [&Linear; 2],
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        linear::swiglu_forward(self, h, gate, up, xa, x, linears, lora, state)
    }

    fn swiglu_backward(
        &self,
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
        d_h: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        elementwise::swiglu_backward(self, d_gate, d_up, d_h, gate, up, state)
    }

    fn qk_norm_rope_forward(
        &self,
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
        rope::forward(
            self, q, k, q_rstd, k_rstd, q_proj, k_proj, weights, spec, state,
        )
    }

    fn qk_norm_rope_backward(
        &self,
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
        rope::backward(
            self, d_q_proj, d_k_proj, d_q, d_k, q_proj, k_proj, q_rstd, k_rstd, weights, spec,
            state,
        )
    }

    fn attention_forward(
        &self,
        o: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()> {
        attention::forward(self, o, lse, q, k, v, spec, state)
    }

    fn attention_backward(
        &self,
        d_q: &mut Tensor,
        d_k: &mut Tensor,
        d_v: &mut Tensor,
        d_o: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()> {
        attention::backward(self, d_q, d_k, d_v, d_o, o, lse, q, k, v, spec, state)
    }

    fn attention_gate_forward(
        &self,
        y: &mut Tensor,
        o: &Tensor,
        q_proj: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()> {
        attention::gate_forward(self, y, o, q_proj, spec, state)
    }

    fn attention_gate_backward(
        &self,
        d_o: &mut Tensor,
        d_q_proj: &mut Tensor,
        d_y: &Tensor,
        o: &Tensor,
        q_proj: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()> {
        attention::gate_backward(self, d_o, d_q_proj, d_y, o, q_proj, spec, state)
    }

    fn causal_conv_forward(
        &self,
        u: &mut Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        delta_inputs::conv_forward(self, u, qkvz, weight, spec, state)
    }

    fn causal_conv_backward(
        &self,
        d_qkvz: &mut Tensor,
        d_u: &Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        delta_inputs::conv_backward(self, d_qkvz, d_u, qkvz, weight, spec, state)
    }

    fn delta_gates_forward(
        &self,
        g: &mut Tensor,
        beta: &mut Tensor,
        ba: &Tensor,
        a_log: &Tensor,
        dt_bias: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        delta_inputs::gates_forward(self, g, beta, ba, a_log, dt_bias, spec, state)
    }

    fn delta_gates_backward(
        &self,
        d_ba: &mut Tensor,
        d_g: &Tensor,
        d_beta: &Tensor,
        ba: &Tensor,
        a_log: &Tensor,
        dt_bias: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        delta_inputs::gates_backward(self, d_ba, d_g, d_beta, ba, a_log, dt_bias, spec, state)
    }

    fn gated_delta_forward(
        &self,
        o: &mut Tensor,
        u: &Tensor,
        g: &Tensor,
        beta: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        gated_delta::forward(self, o, u, g, beta, spec, state)
    }

    fn gated_delta_backward(
        &self,
        d_u: &mut Tensor,
        d_g: &mut Tensor,
        d_beta: &mut Tensor,
        d_o: &Tensor,
        u: &Tensor,
        g: &Tensor,
        beta: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        gated_delta::backward(self, d_u, d_g, d_beta, d_o, u, g, beta, spec, state)
    }

    fn gated_rms_norm_forward(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        o: &Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()> {
        gated_norm::forward(self, y, rstd, o, qkvz, weight, spec, state)
    }

    fn gated_rms_norm_backward(
        &self,
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
        gated_norm::backward(self, d_o, d_qkvz, d_y, o, rstd, qkvz, weight, spec, state)
    }

    fn moe_route_forward(
        &self,
        routing: &mut Routing,
        logits: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        route::forward(self, routing, logits, state)
    }

    fn moe_route_backward(
        &self,
        d_logits: &mut Tensor,
        d_topk_weights: &Tensor,
        logits: &Tensor,
        routing: &Routing,
        state: &StepState,
    ) -> Result<()> {
        route::backward(self, d_logits, d_topk_weights, logits, routing, state)
    }

    fn moe_gate_up_forward(
        &self,
        h: &mut Tensor,
        gate: &mut Tensor,
        up: &mut Tensor,
        xa: &mut Tensor,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        moe::gate_up_forward(self, h, gate, up, xa, x, routing, experts, lora, state)
    }

    fn moe_gate_up_backward(
        &self,
        d_x: GradOut<'_>,
        d_lora: &mut Tensor,
        d_routed: &mut Tensor,
        d_h: &Tensor,
        gate: &mut Tensor,
        up: &mut Tensor,
        xa: &Tensor,
        x: &Tensor,
        routing: &Routing,
        experts: &Experts,
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        moe::gate_up_backward(
            self, d_x, d_lora, d_routed, d_h, gate, up, xa, x, routing, experts, lora, state,
        )
    }

    fn moe_down_forward(
        &self,
        out: &mut Tensor,
        expert_out: &mut Tensor,
        xa: &mut Tensor,
        h: &Tensor,
        routing: &Routing,
        experts: &Experts,
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        moe::down_forward(self, out, expert_out, xa, h, routing, experts, lora, state)
    }

    fn moe_down_backward(
        &self,
        d_h: &mut Tensor,
        d_topk_weights: &mut Tensor,
        d_lora: &mut Tensor,
        d_out: &Tensor,
        h: &Tensor,
        xa: &Tensor,
        routing: &Routing,
        experts: &Experts,
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        moe::down_backward(
            self,
            d_h,
            d_topk_weights,
            d_lora,
            d_out,
            h,
            xa,
            routing,
            experts,
            lora,
            state,
        )
    }

    fn shared_expert_add_forward(
        &self,
        out: &mut Tensor,
        shared: &Tensor,
        logit: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        elementwise::shared_add_forward(self, out, shared, logit, state)
    }

    fn shared_expert_add_backward(
        &self,
        d_shared: &mut Tensor,
        d_logit: &mut Tensor,
        d_out: &Tensor,
        shared: &Tensor,
        logit: &Tensor,
        state: &StepState,
    ) -> Result<()> {
        elementwise::shared_add_backward(self, d_shared, d_logit, d_out, shared, logit, state)
    }

    fn linear_cross_entropy(
        &self,
        token_loss: &mut Tensor,
        d_x: GradOut<'_>,
        x: &Tensor,
        head: &Weight,
        vocab_size: usize,
        state: &StepState,
    ) -> Result<()> {
        cross_entropy::forward_backward(self, token_loss, d_x, x, head, vocab_size, state)
    }

    fn adamw(
        &self,
        params: &mut Tensor,
        moments: &mut Moments,
        grads: &mut Tensor,
        token_loss: &Tensor,
        step: AdamWStep,
    ) -> Result<UpdateReport> {
        adamw::step(self, params, moments, grads, token_loss, step)
    }
}
