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

use crate::data::{Batch, IGNORE_INDEX};
use crate::error::Result;
use crate::random;
use crate::store::Weight;
use crate::tensor::{DType, Tensor};

/// Everything that changes from one micro-batch to the next.
#[derive(Debug, Clone, Default)]
pub struct StepState {
    /// The packed sequences.
    pub batch: Batch,
    /// Factor of the loss gradient: one over the target tokens of the whole optimizer step.
    pub loss_scale: f32,
    /// Where dropout masks come from; `None`: no dropout (evaluation).
    pub dropout: Option<DropoutState>,
}

impl StepState {
    /// Rows that count.
    pub fn num_tokens(&self) -> usize {
        self.batch.input_ids.len()
    }

    /// `(start, end)` token rows of each sequence.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + '_ {
        self.batch
            .cu_seqlens
            .windows(2)
            .map(|pair| (pair[0] as usize, pair[1] as usize))
    }

    /// Rows with a target.
    pub fn target_rows(&self) -> Vec<usize> {
        let targets = self.batch.target_ids.iter().enumerate();
        targets
            .filter(|(_, id)| **id != IGNORE_INDEX)
            .map(|(row, _)| row)
            .collect()
    }
}

/// Coordinates of the dropout masks of one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutState {
    /// Run seed.
    pub seed: u64,
    /// Optimizer step, from 0.
    pub optimizer_step: u32,
    /// Position of the micro-batch's first token in the optimizer step, so that k micro-batches equal one big one.
    pub first_token: u32,
}

impl DropoutState {
    /// Mask words of columns `4 * quad .. 4 * quad + 4` of `module`'s input at token `row` of the micro-batch.
    #[inline]
    pub fn words(self, module: u32, row: u32, quad: u32) -> [u32; 4] {
        let [low, high] = random::key(self.seed);
        let counter = [quad, self.first_token + row, module, self.optimizer_step];
        random::philox4x32(
            counter,
            [low ^ (random::Stream::Dropout as u32) << 24, high],
        )
    }
}

/// Place of one low-rank pair in the adapter's flat arena: `y += scaling * dropout(x) A^T B^T`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPair {
    /// First element of `A [rank, in_features]`.
    pub a: usize,
    /// First element of `B [out_features, rank]`.
    pub b: usize,
    /// Rank.
    pub rank: usize,
    /// Columns of `A`.
    pub in_features: usize,
    /// Rows of `B`.
    pub out_features: usize,
    /// `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scaling: f32,
    /// Probability that an element of the input is dropped.
    pub dropout: f32,
    /// Number of the module, for its dropout mask.
    pub module: u32,
}

impl LoraPair {
    /// Elements of `A`.
    pub fn a_range(&self) -> std::ops::Range<usize> {
        self.a..self.a + self.rank * self.in_features
    }

    /// Elements of `B`.
    pub fn b_range(&self) -> std::ops::Range<usize> {
        self.b..self.b + self.rank * self.out_features
    }
}

/// `y = x W^T + bias`, with an optional adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out_features, in_features]`.
    pub weight: Weight,
    /// `[out_features]` f32.
    pub bias: Option<Tensor>,
    /// The adapter, where the module is a target.
    pub lora: Option<LoraPair>,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The output stays in f32 on every device (router logits).
    pub f32_output: bool,
}

impl Linear {
    /// Rank of the adapter, 0 without one.
    pub fn rank(&self) -> usize {
        self.lora.map_or(0, |pair| pair.rank)
    }
}

/// The routed experts of one layer.
#[derive(Debug, Clone)]
pub struct Experts {
    /// `[I, D]` each.
    pub gate: Vec<Weight>,
    /// `[I, D]` each.
    pub up: Vec<Weight>,
    /// `[D, I]` each.
    pub down: Vec<Weight>,
    /// Adapter of each projection, where it is a target.
    pub lora: ExpertsLora,
    /// `D`.
    pub hidden_size: usize,
    /// `I`.
    pub intermediate_size: usize,
}

/// Adapters of a layer's experts: expert 0's pairs, and the step from one expert to the next.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ExpertsLora {
    /// Expert 0's `gate_proj`.
    pub gate: Option<LoraPair>,
    /// Expert 0's `up_proj`.
    pub up: Option<LoraPair>,
    /// Expert 0's `down_proj`.
    pub down: Option<LoraPair>,
    /// Arena elements from one expert's tensors to the next one's.
    pub stride: usize,
    /// Module numbers from one expert to the next.
    pub module_stride: u32,
}

impl ExpertsLora {
    /// The pair of expert `expert` that corresponds to expert 0's `pair`.
    pub fn of(&self, pair: Option<LoraPair>, expert: usize) -> Option<LoraPair> {
        pair.map(|pair| LoraPair {
            a: pair.a + expert * self.stride,
            b: pair.b + expert * self.stride,
            module: pair.module + u32::try_from(expert).unwrap_or(u32::MAX) * self.module_stride,
            ..pair
        })
    }

    /// Rank of the gate and up adapters together.
    pub fn gate_up_rank(&self) -> usize {
        self.gate.map_or(0, |pair| pair.rank) + self.up.map_or(0, |pair| pair.rank)
    }

    /// Rank of the down adapter.
    pub fn down_rank(&self) -> usize {
        self.down.map_or(0, |pair| pair.rank)
    }
}

/// Which expert sees which token. Row `r` of the routed tensors belongs to slot `slot_of_row[r] = t K + j`, rows are
/// sorted by expert, and within an expert by slot.
#[derive(Debug)]
pub struct Routing {
    /// `[T, K]` u32, by falling probability; ties go to the lower expert.
    pub topk_ids: Tensor,
    /// `[T, K]` f32.
    pub topk_weights: Tensor,
    /// `[E + 1]` u32: first row of each expert.
    pub expert_offsets: Tensor,
    /// `[R]` u32.
    pub slot_of_row: Tensor,
    /// `[R]` u32: inverse of `slot_of_row`.
    pub row_of_slot: Tensor,
    /// `E`.
    pub num_experts: usize,
    /// `K`.
    pub num_experts_per_tok: usize,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
}

/// An RMS norm's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f32,
    /// The factor is `1 + weight` instead of `weight`.
    pub zero_centered: bool,
}

/// Layout of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// `Hq`.
    pub num_attention_heads: usize,
    /// `Hk`.
    pub num_key_value_heads: usize,
    /// `hd`.
    pub head_dim: usize,
    /// `q_proj` yields `[Hq, 2, hd]`: query and gate of each head.
    pub output_gate: bool,
    /// Keys a query sees, itself included; `None`: all.
    pub sliding_window: Option<usize>,
    /// Norm of q and k per head, where there is one.
    pub qk_norm: Option<NormSpec>,
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
}

impl AttentionSpec {
    /// Elements from one head to the next in `q_proj`'s output.
    pub fn q_head_stride(&self) -> usize {
        if self.output_gate {
            2 * self.head_dim
        } else {
            self.head_dim
        }
    }

    /// `1 / sqrt(hd)`.
    pub fn softmax_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// What a layer's rotary embedding and q/k norms read.
#[derive(Debug, Clone, Copy)]
pub struct QkWeights<'a> {
    /// `[hd]` f32.
    pub q_norm: Option<&'a Tensor>,
    /// `[hd]` f32.
    pub k_norm: Option<&'a Tensor>,
    /// `[positions, rotary_dim / 2]` f32.
    pub cos: &'a Tensor,
    /// `[positions, rotary_dim / 2]` f32.
    pub sin: &'a Tensor,
}

/// Layout of a Gated DeltaNet layer: `num_key_heads` groups of `ratio` value heads.
///
/// `qkvz` rows hold, per group, `[q dk | k dk | v ratio*dv | z ratio*dv]`; `ba` rows `[b ratio | a ratio]`.
/// `u` rows hold `[q all | k all | v all]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaSpec {
    /// Heads of q and k.
    pub num_key_heads: usize,
    /// Heads of v, z, g and beta.
    pub num_value_heads: usize,
    /// `dk`.
    pub key_head_dim: usize,
    /// `dv`.
    pub value_head_dim: usize,
    /// Taps of the convolution.
    pub conv_kernel_dim: usize,
    /// Epsilon of the gated norm.
    pub eps: f32,
}

impl DeltaSpec {
    /// Value heads per key head.
    pub fn ratio(&self) -> usize {
        self.num_value_heads / self.num_key_heads
    }

    /// Width of all q (or k) heads.
    pub fn key_dim(&self) -> usize {
        self.num_key_heads * self.key_head_dim
    }

    /// Width of all v (or z) heads.
    pub fn value_dim(&self) -> usize {
        self.num_value_heads * self.value_head_dim
    }

    /// Channels of the convolution.
    pub fn conv_dim(&self) -> usize {
        2 * self.key_dim() + self.value_dim()
    }

    /// Width of `qkvz`.
    pub fn qkvz_dim(&self) -> usize {
        self.conv_dim() + self.value_dim()
    }

    /// Width of one group of `qkvz`.
    pub fn group_dim(&self) -> usize {
        self.qkvz_dim() / self.num_key_heads
    }

    /// Column of `qkvz` that convolution channel `channel` reads.
    pub fn qkvz_column(&self, channel: usize) -> usize {
        let (dk, key_dim) = (self.key_head_dim, self.key_dim());
        if channel < key_dim {
            (channel / dk) * self.group_dim() + channel % dk
        } else if channel < 2 * key_dim {
            let k = channel - key_dim;
            (k / dk) * self.group_dim() + dk + k % dk
        } else {
            let v = channel - 2 * key_dim;
            let per_group = self.ratio() * self.value_head_dim;
            (v / per_group) * self.group_dim() + 2 * dk + v % per_group
        }
    }

    /// Column of `qkvz` where the gate `z` of value head `head` begins.
    pub fn z_column(&self, head: usize) -> usize {
        let ratio = self.ratio();
        let within = 2 * self.key_head_dim + (ratio + head % ratio) * self.value_head_dim;
        (head / ratio) * self.group_dim() + within
    }

    /// Columns of `ba` that hold `b` and `a` of value head `head`.
    pub fn ba_columns(&self, head: usize) -> (usize, usize) {
        let ratio = self.ratio();
        let b = (head / ratio) * 2 * ratio + head % ratio;
        (b, b + ratio)
    }
}

/// `AdamW`'s constants for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Clip the global norm to this; 0: do not clip.
    pub max_grad_norm: f64,
    /// Number of this update, from 1.
    pub step: u64,
}

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateReport {
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The update was made; it is not where the norm is not finite.
    pub applied: bool,
}

/// Where a gradient goes.
#[derive(Debug)]
pub enum GradOut<'a> {
    /// Not wanted.
    Skip,
    /// Replaces what is there.
    Overwrite(&'a mut Tensor),
    /// Adds to what is there.
    Add(&'a mut Tensor),
}

/// The operations. See the module for conventions.
///
/// # Errors
/// Every operation: [`Error::Shape`](crate::error::Error::Shape) or [`Error::DType`](crate::error::Error::DType) for a
/// tensor that does not fit it, naming both.
#[expect(clippy::missing_errors_doc, reason = "said once, for all of them")]
pub trait Ops: std::fmt::Debug {
    /// Element type of activations on this device.
    fn activation_dtype(&self) -> DType;

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

    /// Head and cross-entropy in chunks that never hold all logits: `token_loss[t] = -log softmax(x[t] W^T)[target]`,
    /// 0 where there is no target; `d_x = loss_scale (softmax - onehot) W`, zero rows where there is no target.
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

    /// Global norm, clipping and `AdamW` over the flat arena, all `[n]` f32; the gradient is zeroed. An update whose norm
    /// is not finite is not made, and the gradient stays for inspection.
    fn adamw(
        &self,
        params: &mut Tensor,
        exp_avg: &mut Tensor,
        exp_avg_sq: &mut Tensor,
        grads: &mut Tensor,
        step: AdamWStep,
    ) -> Result<UpdateReport>;
}
