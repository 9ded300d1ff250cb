//! Ops that note what they are asked for, on the way to the device that does it.

use std::ops::Deref;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::cost::{self, Cost};
use super::shape;
use super::trace::{Call, Mode, Trace};
use super::{
    AdamWStep, AttentionSpec, DeltaSpec, Experts, GradOut, Linear, Moments, NormSpec, Ops,
    QkWeights, Routing, StepState, UpdateReport,
};
use crate::error::Result;
use crate::store::Weight;
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// The ops of `inner` (a reference or a box), noted in a [`Trace`]. With the trace off it adds nothing but the call.
#[derive(Debug)]
pub struct Traced<P> {
    inner: P,
    trace: Rc<Trace>,
}

impl<P> Traced<P>
where
    P: Deref,
    P::Target: Ops,
{
    /// The ops of `inner`, and their trace, which is off.
    pub fn new(inner: P) -> (Self, Rc<Trace>) {
        let trace = Rc::new(Trace::default());
        let traced = Self {
            inner,
            trace: Rc::clone(&trace),
        };
        (traced, trace)
    }

    fn call<T>(
        &self,
        op: &'static str,
        (cost, shape): (Cost, String),
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut elapsed = Duration::ZERO;
        let value = match self.trace.mode() {
            Mode::Off | Mode::Costs => body()?,
            Mode::Times => {
                self.inner.synchronize()?;
                let begun = Instant::now();
                let value = body()?;
                self.inner.synchronize()?;
                elapsed = begun.elapsed();
                value
            }
        };
        self.trace.push(Call {
            op,
            shape,
            cost,
            elapsed,
        });
        Ok(value)
    }
}

/// A method per op: its arguments, and what a call costs.
macro_rules! ops {
    ($($op:ident($($name:ident: $type:ty),+) $(-> $result:ty)? = $cost:expr;)+) => {
        $(
            fn $op(&self, $($name: $type),+) -> ops!(@result $($result)?) {
                if self.trace.mode() == Mode::Off {
                    return self.inner.$op($($name),+);
                }
                let what = ($cost, shape::of(&[$(&$name),+]));
                self.call(stringify!($op), what, || self.inner.$op($($name),+))
            }
        )+
    };
    (@result) => { Result<()> };
    (@result $result:ty) => { Result<$result> };
}

impl<P> Ops for Traced<P>
where
    P: Deref + std::fmt::Debug,
    P::Target: Ops,
{
    fn activation_dtype(&self) -> DType {
        self.inner.activation_dtype()
    }

    fn arena(&self, plan: &Arena) -> Result<Arena> {
        self.inner.arena(plan)
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        self.inner.free_memory()
    }

    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }

    fn place(&self, tensor: Tensor) -> Result<Tensor> {
        self.inner.place(tensor)
    }

    fn place_weight(&self, weight: Weight) -> Result<Weight> {
        self.inner.place_weight(weight)
    }

    fn place_experts(&self, experts: [Vec<Weight>; 3]) -> Result<[Vec<Weight>; 3]> {
        self.inner.place_experts(experts)
    }

    fn reserve(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize> {
        self.inner.reserve(capacity, &mut |_| pass(self))
    }

    /// What is only measured is not noted.
    fn scratch_bytes(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize> {
        self.inner.scratch_bytes(capacity, pass)
    }

    fn load_batch(&self, state: &StepState) -> Result<()> {
        self.inner.load_batch(state)
    }

    fn recorded(&self, name: &'static str, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // Of what is replayed no call is seen.
        match self.trace.mode() {
            Mode::Off => self.inner.recorded(name, body),
            Mode::Costs | Mode::Times => body(),
        }
    }

    ops! {
        quantize(weights: &Tensor, double_quant: bool) -> Weight = cost::quantize(weights, double_quant);

        embedding_forward(out: &mut Tensor, table: &Weight, state: &StepState) = cost::embedding(out, table, state);

        rms_norm_forward(
            out: &mut Tensor, rstd: &mut Tensor, x: &Tensor, weight: &Tensor, spec: NormSpec, state: &StepState
        ) = cost::elementwise(&[out, rstd, x], &[weight], state);

        add_rms_norm_forward(
            sum: &mut Tensor, out: &mut Tensor, rstd: &mut Tensor, x: &Tensor, delta: &Tensor, weight: &Tensor,
            spec: NormSpec, state: &StepState
        ) = cost::elementwise(&[sum, out, rstd, x, delta], &[weight], state);

        rms_norm_backward(
            d_x: GradOut<'_>, d_out: &Tensor, x: &Tensor, rstd: &Tensor, weight: &Tensor, spec: NormSpec, state: &StepState
        ) = cost::rms_norm_backward(&d_x, [d_out, x, rstd], weight, state);

        linear_forward(
            outs: &mut [&mut Tensor], xa: &mut Tensor, x: &Tensor, linears: &[&Linear], lora: &Tensor, state: &StepState
        ) = cost::linear_forward(&outs.iter().map(|out| &**out).collect::<Vec<_>>(), xa, x, linears, lora, state);

        linear_backward(
            d_x: GradOut<'_>, d_lora: &mut Tensor, d_outs: &[&Tensor], x: &Tensor, xa: &Tensor, linears: &[&Linear],
            lora: &Tensor, state: &StepState
        ) = cost::linear_backward(&d_x, d_lora, d_outs, [x, xa], linears, lora, state);

        linear_swiglu_forward(
            h: &mut Tensor, gate: &mut Tensor, up: &mut Tensor, xa: &mut Tensor, x: &Tensor, linears: [&Linear; 2],
            lora: &Tensor, state: &StepState
        ) = cost::linear_forward(&[h, gate, up], xa, x, &linears, lora, state);

        swiglu_backward(
            d_gate: &mut Tensor, d_up: &mut Tensor, d_h: &Tensor, gate: &Tensor, up: &Tensor, state: &StepState
        ) = cost::elementwise(&[d_gate, d_up, d_h, gate, up], &[], state);

        qk_norm_rope_forward(
            q: &mut Tensor, k: &mut Tensor, q_rstd: &mut Tensor, k_rstd: &mut Tensor, q_proj: &Tensor, k_proj: &Tensor,
            weights: QkWeights<'_>, spec: AttentionSpec, state: &StepState
        ) = cost::qk_norm_rope_forward([q, k], [q_rstd, k_rstd], [q_proj, k_proj], spec, state);

        qk_norm_rope_backward(
            d_q_proj: &mut Tensor, d_k_proj: &mut Tensor, d_q: &Tensor, d_k: &Tensor, q_proj: &Tensor, k_proj: &Tensor,
            q_rstd: &Tensor, k_rstd: &Tensor, weights: QkWeights<'_>, spec: AttentionSpec, state: &StepState
        ) = cost::qk_norm_rope_backward(
            [d_q_proj, d_k_proj], [d_q, d_k], [q_proj, k_proj], [q_rstd, k_rstd], spec, state
        );

        attention_forward(
            o: &mut Tensor, lse: &mut Tensor, q: &Tensor, k: &Tensor, v: &Tensor, spec: AttentionSpec, state: &StepState
        ) = cost::attention_forward([o, lse], [q, k, v], spec, state);

        attention_backward(
            d_q: &mut Tensor, d_k: &mut Tensor, d_v: &mut Tensor, d_o: &Tensor, o: &Tensor, lse: &Tensor, q: &Tensor,
            k: &Tensor, v: &Tensor, spec: AttentionSpec, state: &StepState
        ) = cost::attention_backward([d_q, d_k, d_v], [d_o, o, lse, q, k, v], spec, state);

        attention_gate_forward(
            y: &mut Tensor, o: &Tensor, q_proj: &Tensor, spec: AttentionSpec, state: &StepState
        ) = cost::columns(&[y, o], &[(q_proj, y)], &[], state);

        attention_gate_backward(
            d_o: &mut Tensor, d_q_proj: &mut Tensor, d_y: &Tensor, o: &Tensor, q_proj: &Tensor, spec: AttentionSpec,
            state: &StepState
        ) = cost::columns(&[d_o, d_y, o], &[(d_q_proj, o), (q_proj, o)], &[], state);

        causal_conv_forward(
            u: &mut Tensor, qkvz: &Tensor, weight: &Tensor, spec: DeltaSpec, state: &StepState
        ) = cost::columns(&[u], &[(qkvz, u)], &[weight], state);

        causal_conv_backward(
            d_qkvz: &mut Tensor, d_u: &Tensor, qkvz: &Tensor, weight: &Tensor, spec: DeltaSpec, state: &StepState
        ) = cost::columns(&[d_u], &[(d_qkvz, d_u), (qkvz, d_u)], &[weight], state);

        delta_gates_forward(
            g: &mut Tensor, beta: &mut Tensor, ba: &Tensor, a_log: &Tensor, dt_bias: &Tensor, spec: DeltaSpec,
            state: &StepState
        ) = cost::elementwise(&[g, beta, ba], &[a_log, dt_bias], state);

        delta_gates_backward(
            d_ba: &mut Tensor, d_g: &Tensor, d_beta: &Tensor, ba: &Tensor, a_log: &Tensor, dt_bias: &Tensor,
            spec: DeltaSpec, state: &StepState
        ) = cost::elementwise(&[d_ba, d_g, d_beta, ba], &[a_log, dt_bias], state);

        gated_delta_forward(
            o: &mut Tensor, u: &Tensor, g: &Tensor, beta: &Tensor, spec: DeltaSpec, state: &StepState
        ) = cost::gated_delta_forward(o, [u, g, beta], spec, state);

        gated_delta_backward(
            d_u: &mut Tensor, d_g: &mut Tensor, d_beta: &mut Tensor, d_o: &Tensor, u: &Tensor, g: &Tensor, beta: &Tensor,
            spec: DeltaSpec, state: &StepState
        ) = cost::gated_delta_backward([d_u, d_g, d_beta], [d_o, u, g, beta], spec, state);

        gated_rms_norm_forward(
            y: &mut Tensor, rstd: &mut Tensor, o: &Tensor, qkvz: &Tensor, weight: &Tensor, spec: DeltaSpec,
            state: &StepState
        ) = cost::columns(&[y, rstd, o], &[(qkvz, y)], &[weight], state);

        gated_rms_norm_backward(
            d_o: &mut Tensor, d_qkvz: &mut Tensor, d_y: &Tensor, o: &Tensor, rstd: &Tensor, qkvz: &Tensor,
            weight: &Tensor, spec: DeltaSpec, state: &StepState
        ) = cost::columns(&[d_o, d_y, o, rstd], &[(d_qkvz, o), (qkvz, o)], &[weight], state);

        moe_route_forward(
            routing: &mut Routing, logits: &Tensor, state: &StepState
        ) = cost::moe_route_forward(routing, logits, state);

        moe_route_backward(
            d_logits: &mut Tensor, d_topk_weights: &Tensor, logits: &Tensor, routing: &Routing, state: &StepState
        ) = cost::elementwise(
            &[d_logits, d_topk_weights, logits, &routing.topk_ids, &routing.topk_weights], &[], state
        );

        moe_gate_up_forward(
            h: &mut Tensor, gate: &mut Tensor, up: &mut Tensor, xa: &mut Tensor, x: &Tensor, routing: &Routing,
            experts: &Experts, lora: &Tensor, state: &StepState
        ) = cost::moe_gate_up_forward([h, gate, up, xa], x, routing, experts, lora, state);

        moe_gate_up_backward(
            d_x: GradOut<'_>, d_lora: &mut Tensor, d_routed: &mut Tensor, d_h: &Tensor, gate: &mut Tensor,
            up: &mut Tensor, xa: &Tensor, x: &Tensor, routing: &Routing, experts: &Experts, lora: &Tensor,
            state: &StepState
        ) = cost::moe_gate_up_backward(&d_x, [d_h, gate, up], [xa, x], routing, experts, [lora, d_lora], state);

        moe_down_forward(
            out: &mut Tensor, expert_out: &mut Tensor, xa: &mut Tensor, h: &Tensor, routing: &Routing,
            experts: &Experts, lora: &Tensor, state: &StepState
        ) = cost::moe_down_forward(out, [h, xa], routing, experts, lora, state);

        moe_down_backward(
            d_h: &mut Tensor, d_topk_weights: &mut Tensor, d_lora: &mut Tensor, d_out: &Tensor, h: &Tensor, xa: &Tensor,
            routing: &Routing, experts: &Experts, lora: &Tensor, state: &StepState
        ) = cost::moe_down_backward([d_h, h, xa], d_out, routing, experts, [lora, d_lora], state);

        shared_expert_add_forward(
            out: &mut Tensor, shared: &Tensor, logit: &Tensor, state: &StepState
        ) = cost::elementwise(&[out, out, shared, logit], &[], state);

        shared_expert_add_backward(
            d_shared: &mut Tensor, d_logit: &mut Tensor, d_out: &Tensor, shared: &Tensor, logit: &Tensor,
            state: &StepState
        ) = cost::elementwise(&[d_shared, d_logit, d_out, shared, logit], &[], state);

        linear_cross_entropy(
            token_loss: &mut Tensor, d_x: GradOut<'_>, x: &Tensor, head: &Weight, vocab_size: usize, state: &StepState
        ) = cost::linear_cross_entropy(token_loss, &d_x, x, head, vocab_size, state);

        adamw(
            params: &mut Tensor, moments: &mut Moments, grads: &mut Tensor, token_loss: &Tensor, step: AdamWStep
        ) -> UpdateReport = cost::adamw(params, moments, grads, token_loss);
    }
}
