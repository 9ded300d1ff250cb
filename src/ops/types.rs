//! What ops are told: the step, weights with their adapters, layouts of layers.

use crate::data::{Batch, IGNORE_INDEX};
use crate::random;
use crate::store::Weight;
use crate::tensor::Tensor;

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
        let counter = [quad, self.first_token + row, module, self.optimizer_step];
        random::philox4x32(counter, self.key())
    }

    /// The key of the masks' draws.
    pub fn key(self) -> [u32; 2] {
        let [low, high] = random::key(self.seed);
        [low ^ (random::Stream::Dropout as u32) << 24, high]
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
