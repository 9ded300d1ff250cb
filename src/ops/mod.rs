//! The one list of operations. Every device implements [`Ops`]; the model calls nothing else.
//!
//! Conventions, said once:
//! - Output first, then inputs, then scalars. `d_x` is the gradient of `x`.
//! - Activation gradients overwrite unless their type is [`GradOut`]; parameter gradients accumulate; the gradient of
//!   the residual stream accumulates.
//! - Tensors of token rows have the capacity of the run; the first [`StepState::num_tokens`] rows count.
//! - Letters: `T` tokens, `D` `hidden_size`, `V` `vocab_size`, `E` experts, `K` experts per token, `R = T K` routed rows,
//!   `I` an MLP's width, `Hq Hk` query and key/value heads, `hd` `head_dim`.
//! - Two calls with equal inputs give equal bits, on any number of threads.
//!
//! Errors of every op: [`Error::Shape`](crate::error::Error::Shape) where extents disagree,
//! [`Error::DType`](crate::error::Error::DType) where an element type does.

pub mod cost;
pub mod dynamic_map;
mod optimizer;
mod shape;
pub mod trace;
mod traced;
mod types;

pub use optimizer::{AdamWConstants, AdamWStep, MOMENTS_BLOCKSIZE, Moments, UpdateReport};
pub use traced::Traced;
pub use types::{
    AttentionSpec, DeltaSpec, DropoutState, Experts, ExpertsLora, GradOut, Linear, LoraPair,
    NormSpec, QkWeights, Routing, StepState,
};

use crate::error::Result;
use crate::store::Weight;
use crate::store::nf4::Nf4Matrix;
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// The operations. See the module for conventions.
///
/// # Errors
/// Every operation: [`Error::Shape`](crate::error::Error::Shape) or [`Error::DType`](crate::error::Error::DType) for a
/// tensor that does not fit it, naming both.
#[expect(clippy::missing_errors_doc, reason = "said once, for all of them")]
pub trait Ops: std::fmt::Debug {
    /// Element type of activations on this device.
    fn activation_dtype(&self) -> DType;

    /// Hands out this device's memory: that of the buffers in `plan`'s ledger from one allocation, of others as they come.
    fn arena(&self, plan: &Arena) -> Result<Arena>;

    /// Free bytes of this device's memory; `None` where it is the host's.
    fn free_memory(&self) -> Result<Option<u64>>;

    /// Waits for everything that was asked for.
    fn synchronize(&self) -> Result<()>;

    /// `tensor` in this device's memory, with the same elements.
    fn place(&self, tensor: Tensor) -> Result<Tensor>;

    /// `weight` as this device's products read it.
    fn place_weight(&self, weight: Weight) -> Result<Weight>;

    /// The gate, up and down matrices of a layer's experts as this device's products read them.
    fn place_experts(&self, experts: [Vec<Weight>; 3]) -> Result<[Vec<Weight>; 3]>;

    /// `weights`, an f32 or bf16 matrix in this device's memory, in NF4.
    fn quantize(&self, weights: &Tensor, double_quant: bool) -> Result<Weight> {
        let matrix = Nf4Matrix::from_tensor(weights, double_quant)?;
        self.place_weight(Weight::Nf4(matrix))
    }

    /// Makes everything ready for batches of up to `capacity` tokens. `pass` makes the calls of a step, on planned tensors;
    /// they compute nothing, but tell how much temporary memory the device must hold. Returns its bytes.
    fn reserve(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize>;

    /// Bytes that [`Self::reserve`] would take for `pass`; nothing is made ready.
    fn scratch_bytes(
        &self,
        capacity: usize,
        pass: &mut dyn FnMut(&dyn Ops) -> Result<()>,
    ) -> Result<usize>;

    /// Takes over the micro-batch that the following calls work on.
    fn load_batch(&self, state: &StepState) -> Result<()>;

    /// Runs `body`, whose calls are the same each time; a device may record them under `name` and replay the record.
    fn recorded(&self, name: &'static str, body: &mut dyn FnMut() -> Result<()>) -> Result<()>;

    /// `out[t] = table[input_ids[t]]`; `table [V, D]`, `out [T, D]`.
    fn embedding_forward(&self, out: &mut Tensor, table: &Weight, state: &StepState) -> Result<()>;

    /// `out = x rstd w` with `rstd = 1 / sqrt(mean(x^2) + eps)`; `x, out [T, D]`, `rstd [T]` f32, `weight [D]` f32.
    fn rms_norm_forward(
        &self,
        out: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        spec: NormSpec,
        state: &StepState,
    ) -> Result<()>;

    /// `sum = x + delta`, then [`Self::rms_norm_forward`] of `sum`; all `[T, D]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "residual add and norm are one pass over memory"
    )]
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
    ) -> Result<()>;

    /// `d_x (+)= rstd (d_out w - xh mean(d_out w xh))` with `xh = x rstd`.
    fn rms_norm_backward(
        &self,
        d_x: GradOut<'_>,
        d_out: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
        spec: NormSpec,
        state: &StepState,
    ) -> Result<()>;

    /// `outs[i] = x W_i^T + bias_i + scaling_i xa_i B_i^T` with `xa_i = dropout_i(x) A_i^T`.
    ///
    /// `x [T, in_features]`, `outs[i] [T, out_features_i]`, `xa [T, sum of ranks]` saved for backward, `lora` the
    /// adapter's arena.
    fn linear_forward(
        &self,
        outs: &mut [&mut Tensor],
        xa: &mut Tensor,
        x: &Tensor,
        linears: &[&Linear],
        lora: &Tensor,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::linear_forward`]: `d_x (+)= sum_i d_outs_i W_i + mask_i(scaling_i d_outs_i B_i A_i)`;
    /// `d_lora` gets `dB_i += scaling_i d_outs_i^T xa_i` and `dA_i += (scaling_i d_outs_i B_i)^T dropout_i(x)`.
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward saved is passed by name"
    )]
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
    ) -> Result<()>;

    /// `h = silu(gate) * up`, where `[gate, up] = linear_forward(x)`; `gate, up, h [T, I]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "one pass over x: gate, up and SwiGLU"
    )]
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
    ) -> Result<()>;

    /// `d_gate = d_h up silu'(gate)`, `d_up = d_h silu(gate)`.
    fn swiglu_backward(
        &self,
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
        d_h: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        state: &StepState,
    ) -> Result<()>;

    /// Per-head norm (where there is one) and rotary embedding: `q_proj [T, Hq, q_head_stride]` to `q [T, Hq, hd]`,
    /// `k_proj [T, Hk, hd]` to `k`; `q_rstd [T, Hq]`, `k_rstd [T, Hk]` f32 saved.
    #[expect(clippy::too_many_arguments, reason = "q and k go through one kernel")]
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
    ) -> Result<()>;

    /// Backward of [`Self::qk_norm_rope_forward`]; the gate half of `d_q_proj` is left alone.
    #[expect(clippy::too_many_arguments, reason = "q and k go through one kernel")]
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
    ) -> Result<()>;

    /// `o = softmax(scale q k^T + mask) v` per head: causal, within each sequence, within the window.
    ///
    /// `q, o [T, Hq, hd]`, `k, v [T, Hk, hd]`, `lse [T, Hq]` f32: log of the softmax's denominator.
    fn attention_forward(
        &self,
        o: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::attention_forward`], from `o` and `lse`.
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward saved is passed by name"
    )]
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
    ) -> Result<()>;

    /// `y = o sigmoid(gate)`, the gate being the second half of each head of `q_proj`.
    fn attention_gate_forward(
        &self,
        y: &mut Tensor,
        o: &Tensor,
        q_proj: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::attention_gate_forward`]; writes only the gate half of `d_q_proj`.
    fn attention_gate_backward(
        &self,
        d_o: &mut Tensor,
        d_q_proj: &mut Tensor,
        d_y: &Tensor,
        o: &Tensor,
        q_proj: &Tensor,
        spec: AttentionSpec,
        state: &StepState,
    ) -> Result<()>;

    /// `u[t, c] = silu(sum_j weight[c, j] qkvz[t - taps + 1 + j, column(c)])`, zero before the sequence's start.
    ///
    /// `u [T, conv_dim]`, `qkvz [T, qkvz_dim]`, `weight [conv_dim, taps]` f32.
    fn causal_conv_forward(
        &self,
        u: &mut Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::causal_conv_forward`]; writes the q, k and v columns of `d_qkvz`.
    fn causal_conv_backward(
        &self,
        d_qkvz: &mut Tensor,
        d_u: &Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()>;

    /// `beta = sigmoid(b)`, `g = -exp(a_log) softplus(a + dt_bias)`; `g, beta [T, Hv]` f32.
    fn delta_gates_forward(
        &self,
        g: &mut Tensor,
        beta: &mut Tensor,
        ba: &Tensor,
        a_log: &Tensor,
        dt_bias: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::delta_gates_forward`].
    #[expect(
        clippy::too_many_arguments,
        reason = "both gates come from one row of ba"
    )]
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
    ) -> Result<()>;

    /// Gated delta rule per value head, state `S [dk, dv]` zero at each sequence's start:
    /// `S <- e^g S; S <- S + k (beta (v - S^T k))^T; o = S^T q / sqrt(dk)`, with q and k of unit length.
    ///
    /// `o [T, value_dim]`, `u [T, conv_dim]`, `g, beta [T, Hv]` f32.
    fn gated_delta_forward(
        &self,
        o: &mut Tensor,
        u: &Tensor,
        g: &Tensor,
        beta: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::gated_delta_forward`].
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward read is passed by name"
    )]
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
    ) -> Result<()>;

    /// `y = weight o rstd silu(z)` per value head; `o, y [T, value_dim]`, `rstd [T, Hv]` f32, `weight [dv]` f32.
    fn gated_rms_norm_forward(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        o: &Tensor,
        qkvz: &Tensor,
        weight: &Tensor,
        spec: DeltaSpec,
        state: &StepState,
    ) -> Result<()>;

    /// Backward of [`Self::gated_rms_norm_forward`]; writes the z columns of `d_qkvz`.
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward saved is passed by name"
    )]
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
    ) -> Result<()>;

    /// `p = softmax(logits)`; the top K of it with their weights, and the permutation that sorts them by expert.
    /// `logits [T, E]` f32.
    fn moe_route_forward(
        &self,
        routing: &mut Routing,
        logits: &Tensor,
        state: &StepState,
    ) -> Result<()>;

    /// `d_logits [T, E]` from `d_topk_weights [T, K]`; the chosen ids are constants.
    fn moe_route_backward(
        &self,
        d_logits: &mut Tensor,
        d_topk_weights: &Tensor,
        logits: &Tensor,
        routing: &Routing,
        state: &StepState,
    ) -> Result<()>;

    /// `h[r] = silu(gate[r]) up[r]`, `gate[r] = Wg_e x[token(r)]` with its adapter, `up` likewise.
    ///
    /// `h, gate, up [R, I]`, `xa [R, rank_gate + rank_up]`, `x [T, D]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "gather, multiply, LoRA and SwiGLU are one op"
    )]
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
    ) -> Result<()>;

    /// Backward of [`Self::moe_gate_up_forward`]. `gate` and `up` are overwritten with their gradients;
    /// `d_routed [R, D]` is scratch; `d_x [T, D]` gets the sum over each token's K rows, in slot order.
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward saved is passed by name"
    )]
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
    ) -> Result<()>;

    /// `out[t] = sum_j topk_weights[t, j] expert_out[row(t, j)]`, `expert_out[r] = Wd_e h[r]` with its adapter.
    ///
    /// `out [T, D]`, `expert_out [R, D]` scratch, `xa [R, rank_down]`, `h [R, I]`.
    #[expect(
        clippy::too_many_arguments,
        reason = "multiply, LoRA and combine are one op"
    )]
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
    ) -> Result<()>;

    /// Backward of [`Self::moe_down_forward`]: with `delta = Wd_eff^T d_out[token]`, `d_topk_weights = <h, delta>` and
    /// `d_h = weight * delta`. Expert outputs are not needed.
    #[expect(
        clippy::too_many_arguments,
        reason = "what forward saved is passed by name"
    )]
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
    ) -> Result<()>;

    /// `out[t] += sigmoid(logit[t]) shared[t]`; `out, shared [T, D]`, `logit [T, 1]` f32.
    fn shared_expert_add_forward(
        &self,
        out: &mut Tensor,
        shared: &Tensor,
        logit: &Tensor,
        state: &StepState,
    ) -> Result<()>;

    /// `d_shared = sigmoid(logit) d_out`, `d_logit = <d_out, shared> sigmoid'(logit)`.
    fn shared_expert_add_backward(
        &self,
        d_shared: &mut Tensor,
        d_logit: &mut Tensor,
        d_out: &Tensor,
        shared: &Tensor,
        logit: &Tensor,
        state: &StepState,
    ) -> Result<()>;

    /// Head and cross-entropy in chunks that never hold all logits: `token_loss[t] += -log softmax(x[t] W^T)[target]` where
    /// there is a target, so that it adds up over the micro-batches of a step;
    /// `d_x = loss_scale (softmax - onehot) W`, zero rows where there is no target.
    ///
    /// `token_loss [T]` f32, `x, d_x [T, D]`, `head [V, D]`.
    fn linear_cross_entropy(
        &self,
        token_loss: &mut Tensor,
        d_x: GradOut<'_>,
        x: &Tensor,
        head: &Weight,
        vocab_size: usize,
        state: &StepState,
    ) -> Result<()>;

    /// Global norm, clipping and `AdamW` over the flat arena; the gradient is zeroed. An update of a step whose loss (the sum of
    /// `token_loss`) or norm is not finite is not made, and the gradient stays for inspection.
    ///
    /// `params [n]` f32, or bf16, which is rounded stochastically; `grads [n]` f32; `token_loss [T]` f32.
    fn adamw(
        &self,
        params: &mut Tensor,
        moments: &mut Moments,
        grads: &mut Tensor,
        token_loss: &Tensor,
        step: AdamWStep,
    ) -> Result<UpdateReport>;
}
