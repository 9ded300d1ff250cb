//! What a call of an op costs at least: its arithmetic and its traffic, from its arguments alone.
//!
//! - FLOPs are those of products of matrices, `2 m n k`, as the op is defined, on the rows that count; elementwise arithmetic
//!   (norms, `SwiGLU`, softmax, convolution) is left out: it is never what limits an op.
//! - Bytes are what must pass through memory: each input read once, each output written once, in the type it is stored in; what
//!   is added to is read and written. Scratch and what an implementation reads again are left out, and so are tables that stay in
//!   a cache (rotary angles, the step's state).
//! - Rows are the step's tokens; where the step is empty, as when a pass is planned, they are the capacity, as one sequence.
//!
//! So `max(flops / peak, bytes / bandwidth)` is the time no implementation beats.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use super::{
    AttentionSpec, DeltaSpec, Experts, GradOut, Linear, LoraPair, Moments, Routing, StepState,
};
use crate::store::Weight;
use crate::store::nf4::{Absmax, Nf4Matrix, num_bytes};
use crate::tensor::Tensor;

/// Arithmetic and traffic of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations of matrix products.
    pub flops: u64,
    /// Bytes through memory.
    pub bytes: u64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// Rows that count: the step's tokens, or the rows of `tensor` where the step is empty.
fn num_rows(state: &StepState, tensor: &Tensor) -> u64 {
    match state.num_tokens() {
        0 => tensor.shape().first().copied().unwrap_or(0) as u64,
        tokens => tokens as u64,
    }
}

/// Elements of a row.
fn width(tensor: &Tensor) -> u64 {
    let dims = tensor.shape().iter().skip(1);
    dims.product::<usize>() as u64
}

/// Bytes of `rows` rows of `columns` elements of `tensor`.
fn block(tensor: &Tensor, rows: u64, columns: u64) -> u64 {
    rows * columns * tensor.dtype().size() as u64
}

/// Bytes of the leading `rows` rows of each of `tensors`.
fn leading(tensors: &[&Tensor], rows: u64) -> u64 {
    let each = tensors.iter();
    each.map(|tensor| block(tensor, rows, width(tensor))).sum()
}

/// Bytes of a gradient's leading `rows` rows: none, written, or read and written.
fn grad(out: &GradOut<'_>, rows: u64) -> u64 {
    match out {
        GradOut::Skip => 0,
        GradOut::Overwrite(tensor) => leading(&[tensor], rows),
        GradOut::Add(tensor) => 2 * leading(&[tensor], rows),
    }
}

/// Bytes of a weight as it is held, scales included.
pub fn weight_bytes(weight: &Weight) -> u64 {
    match weight {
        Weight::Dense(tensor) => tensor.num_bytes() as u64,
        Weight::Nf4(matrix) => nf4_bytes(matrix),
    }
}

fn nf4_bytes(matrix: &Nf4Matrix) -> u64 {
    let is_nested = matches!(matrix.absmax, Absmax::Nested { .. });
    num_bytes(matrix.out_features * matrix.in_features, is_nested) as u64
}

/// Every row of `rows` and all of `whole`, once for each time they are named: norms, gates and other elementwise ops.
pub fn elementwise(rows: &[&Tensor], whole: &[&Tensor], state: &StepState) -> Cost {
    let count = rows.first().map_or(0, |tensor| num_rows(state, tensor));
    let whole: usize = whole.iter().map(|tensor| tensor.num_bytes()).sum();
    Cost {
        flops: 0,
        bytes: leading(rows, count) + whole as u64,
    }
}

/// One row of the table and one of `out` per token, and its id.
pub fn embedding(out: &Tensor, table: &Weight, state: &StepState) -> Cost {
    let rows = num_rows(state, out);
    let elements = match table {
        Weight::Dense(tensor) => tensor.len(),
        Weight::Nf4(matrix) => matrix.out_features * matrix.in_features,
    };
    let read = rows * width(out) * weight_bytes(table) / (elements as u64).max(1);
    Cost {
        flops: 0,
        bytes: leading(&[out], rows) + read + 4 * rows,
    }
}

/// `d_out`, `x`, `rstd` and the weight read; `d_x`.
pub fn rms_norm_backward(
    d_x: &GradOut<'_>,
    inputs: [&Tensor; 3],
    weight: &Tensor,
    state: &StepState,
) -> Cost {
    let mut cost = elementwise(&inputs, &[weight], state);
    cost.bytes += grad(d_x, num_rows(state, inputs[0]));
    cost
}

/// Of a low-rank pair on `rows` rows.
struct PairCost {
    /// `x A^T` and its product with `B^T`: `2 rows r (in + out)`.
    forward: u64,
    /// `d_s = d_y B`, `d_B` and `d_A`: `2 rows r (2 out + in)`.
    backward: u64,
    /// `d_s A`, the part of `d_x`: `2 rows r in`.
    backward_x: u64,
    /// Elements of A and B.
    elements: u64,
}

impl PairCost {
    fn new(pair: Option<LoraPair>, rows: u64) -> Self {
        let extents = pair.map_or([0; 3], |p| [p.rank, p.in_features, p.out_features]);
        let [rank, input, output] = extents.map(|extent| extent as u64);
        Self {
            forward: 2 * rows * rank * (input + output),
            backward: 2 * rows * rank * (2 * output + input),
            backward_x: 2 * rows * rank * input,
            elements: rank * (input + output),
        }
    }
}

/// `2 T in out` for each linear and its pair's `2 T r (in + out)`. Bytes: `x`, weights, biases and adapters read; the
/// outputs and `xa` written.
pub fn linear_forward(
    outs: &[&Tensor],
    xa: &Tensor,
    x: &Tensor,
    linears: &[&Linear],
    lora: &Tensor,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, x);
    let mut cost = Cost {
        flops: 0,
        bytes: leading(&[x, xa], rows) + leading(outs, rows),
    };
    for linear in linears {
        cost.flops += 2 * rows * (linear.in_features * linear.out_features) as u64;
        cost.bytes += weight_bytes(&linear.weight);
        cost.bytes += linear.bias.as_ref().map_or(0, Tensor::num_bytes) as u64;
        let pair = PairCost::new(linear.lora, rows);
        cost.flops += pair.forward;
        cost.bytes += pair.elements * lora.dtype().size() as u64;
    }
    cost
}

/// Where `d_x` is wanted `2 T in out` for each linear; of a pair `2 T r (2 out + in)`, and `2 T r in` for `d_x`. Bytes:
/// `d_outs`, weights (for `d_x`), `x`, `xa` and adapters (where there is a pair) read; `d_x`; adapters' gradients read and written.
pub fn linear_backward(
    d_x: &GradOut<'_>,
    d_lora: &Tensor,
    d_outs: &[&Tensor],
    [x, xa]: [&Tensor; 2],
    linears: &[&Linear],
    lora: &Tensor,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, x);
    let wants_x = !matches!(d_x, GradOut::Skip);
    let mut cost = Cost {
        flops: 0,
        bytes: leading(d_outs, rows) + grad(d_x, rows),
    };
    if linears.iter().any(|linear| linear.lora.is_some()) {
        cost.bytes += leading(&[x, xa], rows);
    }
    for linear in linears {
        if wants_x {
            cost.flops += 2 * rows * (linear.in_features * linear.out_features) as u64;
            cost.bytes += weight_bytes(&linear.weight);
        }
        let pair = PairCost::new(linear.lora, rows);
        cost.flops += pair.backward + if wants_x { pair.backward_x } else { 0 };
        cost.bytes += pair.elements * adapter_and_gradient(lora, d_lora);
    }
    cost
}

/// Bytes of an adapter's element read and its gradient read and written.
fn adapter_and_gradient(lora: &Tensor, d_lora: &Tensor) -> u64 {
    (lora.dtype().size() + 2 * d_lora.dtype().size()) as u64
}

/// `q`, `k` and what they are made of, or their gradients, once each; of `q_proj` the half that is no gate; saved `rstd`s where
/// there is a norm.
pub fn qk_norm_rope_forward(
    [q, k]: [&Tensor; 2],
    rstd: [&Tensor; 2],
    [q_proj, k_proj]: [&Tensor; 2],
    spec: AttentionSpec,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, q);
    let mut bytes = leading(&[q, k, k_proj], rows) + block(q_proj, rows, width(q));
    if spec.qk_norm.is_some() {
        bytes += leading(&rstd, rows);
    }
    Cost { flops: 0, bytes }
}

/// `d_q` and `d_k` read, their gradients before the rotation written; where there is a norm its inputs and `rstd`s read.
pub fn qk_norm_rope_backward(
    d_proj: [&Tensor; 2],
    d_qk: [&Tensor; 2],
    proj: [&Tensor; 2],
    rstd: [&Tensor; 2],
    spec: AttentionSpec,
    state: &StepState,
) -> Cost {
    let ([d_q, d_k], rows) = (d_qk, num_rows(state, d_qk[0]));
    let halves = |[q_proj, k_proj]: [&Tensor; 2]| {
        block(q_proj, rows, width(d_q)) + block(k_proj, rows, width(d_k))
    };
    let mut bytes = leading(&d_qk, rows) + halves(d_proj);
    if spec.qk_norm.is_some() {
        bytes += halves(proj) + leading(&rstd, rows);
    }
    Cost { flops: 0, bytes }
}

/// Pairs of a query and a key it sees: `sum_i min(i, window)` over the positions `i` from 1 of each sequence of `rows` rows.
fn num_pairs(spec: AttentionSpec, rows: u64, state: &StepState) -> u64 {
    let window = spec.sliding_window.map_or(u64::MAX, |keys| keys as u64);
    let of_sequence = |length: u64| {
        let full = length.min(window);
        full * (full + 1) / 2 + (length - full) * full
    };
    if state.num_tokens() == 0 {
        return of_sequence(rows);
    }
    let lengths = state.sequences().map(|(start, end)| (end - start) as u64);
    lengths.map(of_sequence).sum()
}

/// `q k^T` and `p v`: `4 hd` per query head and pair of query and key. Bytes: `q`, `k`, `v` read; `o`, `lse` written.
pub fn attention_forward(
    outputs: [&Tensor; 2],
    inputs: [&Tensor; 3],
    spec: AttentionSpec,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, inputs[0]);
    let heads = (spec.num_attention_heads * spec.head_dim) as u64;
    Cost {
        flops: 4 * heads * num_pairs(spec, rows, state),
        bytes: leading(&outputs, rows) + leading(&inputs, rows),
    }
}

/// `q k^T` again, `d_p`, `d_v`, `d_q`, `d_k`: `10 hd` per query head and pair. Bytes: `d_o`, `o`, `lse`, `q`, `k`, `v` read; `d_q`,
/// `d_k`, `d_v` written.
pub fn attention_backward(
    grads: [&Tensor; 3],
    inputs: [&Tensor; 6],
    spec: AttentionSpec,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, inputs[0]);
    let heads = (spec.num_attention_heads * spec.head_dim) as u64;
    Cost {
        flops: 10 * heads * num_pairs(spec, rows, state),
        bytes: leading(&grads, rows) + leading(&inputs, rows),
    }
}

/// [`elementwise`], and of each pair's first tensor as many columns as its second has: gates, or the q, k and v of a
/// wider projection.
pub fn columns(
    rows: &[&Tensor],
    parts: &[(&Tensor, &Tensor)],
    whole: &[&Tensor],
    state: &StepState,
) -> Cost {
    let mut cost = elementwise(rows, whole, state);
    for (tensor, like) in parts {
        cost.bytes += block(tensor, num_rows(state, like), width(like));
    }
    cost
}

/// `S^T k`, the outer product that updates `S`, `S^T q`: `6 dk dv` per token and value head, as the recurrence is defined (in
/// chunks it is more). Bytes: `u`, `g`, `beta` read; `o` written.
pub fn gated_delta_forward(
    o: &Tensor,
    inputs: [&Tensor; 3],
    spec: DeltaSpec,
    state: &StepState,
) -> Cost {
    let mut cost = elementwise(&[o, inputs[0], inputs[1], inputs[2]], &[], state);
    cost.flops = 6 * state_elements(spec) * num_rows(state, o);
    cost
}

/// Two products for each of forward's three, and two of those again for the states: `16 dk dv` per token and value head. Bytes:
/// `d_o`, `u`, `g`, `beta` read; the gradients written.
pub fn gated_delta_backward(
    grads: [&Tensor; 3],
    inputs: [&Tensor; 4],
    spec: DeltaSpec,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, inputs[0]);
    Cost {
        flops: 16 * state_elements(spec) * rows,
        bytes: leading(&grads, rows) + leading(&inputs, rows),
    }
}

fn state_elements(spec: DeltaSpec) -> u64 {
    (spec.num_value_heads * spec.key_head_dim * spec.value_head_dim) as u64
}

/// Logits read; per slot an id, a weight, its row and (per row) its slot written, and `E + 1` offsets.
pub fn moe_route_forward(routing: &Routing, logits: &Tensor, state: &StepState) -> Cost {
    let [rows, tokens] = routed(routing, logits, state);
    Cost {
        flops: 0,
        bytes: leading(&[logits], tokens) + 16 * rows + 4 * (routing.num_experts as u64 + 1),
    }
}

/// One kind of matrix of a layer's experts, on `rows` routed rows, with its adapter.
struct ExpertsCost {
    /// `2 R in out`.
    flops: u64,
    /// Of the experts that can have a row.
    weights: u64,
    pair: PairCost,
}

impl ExpertsCost {
    fn new(weights: &[Weight], pair: Option<LoraPair>, experts: &Experts, rows: u64) -> Self {
        let used = (weights.len() as u64).min(rows);
        let matrix = weights.first().map_or(0, weight_bytes);
        let mut pair = PairCost::new(pair, rows);
        pair.elements *= used;
        Self {
            flops: 2 * rows * (experts.hidden_size * experts.intermediate_size) as u64,
            weights: used * matrix,
            pair,
        }
    }

    fn gate_and_up(experts: &Experts, rows: u64) -> [Self; 2] {
        let lora = &experts.lora;
        [
            Self::new(&experts.gate, lora.gate, experts, rows),
            Self::new(&experts.up, lora.up, experts, rows),
        ]
    }

    fn down(experts: &Experts, rows: u64) -> [Self; 1] {
        [Self::new(&experts.down, experts.lora.down, experts, rows)]
    }
}

fn experts_forward(parts: &[ExpertsCost], lora: &Tensor) -> Cost {
    let adapter = |part: &ExpertsCost| part.pair.elements * lora.dtype().size() as u64;
    let one = |part: &ExpertsCost| Cost {
        flops: part.flops + part.pair.forward,
        bytes: part.weights + adapter(part),
    };
    parts.iter().map(one).sum()
}

fn experts_backward(parts: &[ExpertsCost], lora: &Tensor, d_lora: &Tensor, wants_x: bool) -> Cost {
    let one = |part: &ExpertsCost| {
        let adapters = Cost {
            flops: part.pair.backward,
            bytes: part.pair.elements * adapter_and_gradient(lora, d_lora),
        };
        let to_x = Cost {
            flops: part.flops + part.pair.backward_x,
            bytes: part.weights,
        };
        if wants_x { adapters + to_x } else { adapters }
    };
    parts.iter().map(one).sum()
}

/// Routed rows of the step, and its tokens.
fn routed(routing: &Routing, x: &Tensor, state: &StepState) -> [u64; 2] {
    let tokens = num_rows(state, x);
    [tokens * routing.num_experts_per_tok as u64, tokens]
}

/// `2 R D I` for gate and for up, and their pairs. Bytes: `x`, a slot per row, weights and adapters of the experts that can have a
/// row read; `outputs` (`h`, `gate`, `up`, `xa`) written.
pub fn moe_gate_up_forward(
    outputs: [&Tensor; 4],
    x: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Cost {
    let [rows, tokens] = routed(routing, x, state);
    let mut cost = experts_forward(&ExpertsCost::gate_and_up(experts, rows), lora);
    cost.bytes += leading(&outputs, rows) + leading(&[x], tokens) + 4 * rows;
    cost
}

/// `2 R D I` for gate and for up, and the gradients of their pairs. Bytes: `d_h`, `gate`, `up`, a slot per row, weights and (with
/// a pair) `x`, `xa`, adapters read; `gate`, `up` and `d_x` written; adapters' gradients read and written.
pub fn moe_gate_up_backward(
    d_x: &GradOut<'_>,
    [d_h, gate, up]: [&Tensor; 3],
    [xa, x]: [&Tensor; 2],
    routing: &Routing,
    experts: &Experts,
    [lora, d_lora]: [&Tensor; 2],
    state: &StepState,
) -> Cost {
    let [rows, tokens] = routed(routing, x, state);
    let parts = ExpertsCost::gate_and_up(experts, rows);
    let wants_x = !matches!(d_x, GradOut::Skip);
    let mut cost = experts_backward(&parts, lora, d_lora, wants_x);
    cost.bytes += leading(&[d_h, gate, gate, up, up], rows) + grad(d_x, tokens) + 4 * rows;
    if experts.lora.gate_up_rank() > 0 {
        cost.bytes += leading(&[xa], rows) + leading(&[x], tokens);
    }
    cost
}

/// `2 R D I` and the pair. Bytes: `h`, a weight and a row per slot, weights and adapters read; `xa` and `out` written.
pub fn moe_down_forward(
    out: &Tensor,
    [h, xa]: [&Tensor; 2],
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Cost {
    let [rows, tokens] = routed(routing, out, state);
    let mut cost = experts_forward(&ExpertsCost::down(experts, rows), lora);
    cost.bytes += leading(&[h, xa], rows) + leading(&[out], tokens) + 8 * rows;
    cost
}

/// `2 R D I` and the gradients of the pair. Bytes: `d_out`, `h`, `xa` (with a pair), a weight and a row per slot, weights and adapters
/// read; `d_h` and a weight's gradient per slot written; adapters' gradients read and written.
pub fn moe_down_backward(
    [d_h, h, xa]: [&Tensor; 3],
    d_out: &Tensor,
    routing: &Routing,
    experts: &Experts,
    [lora, d_lora]: [&Tensor; 2],
    state: &StepState,
) -> Cost {
    let [rows, tokens] = routed(routing, d_out, state);
    let mut cost = experts_backward(&ExpertsCost::down(experts, rows), lora, d_lora, true);
    cost.bytes += leading(&[d_h, h], rows) + leading(&[d_out], tokens) + 12 * rows;
    if experts.lora.down_rank() > 0 {
        cost.bytes += leading(&[xa], rows);
    }
    cost
}

/// Logits of the rows with a target, and from their gradient `d_x`: `2 N V D` each, `d_x` where it is wanted. Bytes: those rows of
/// `x` and the head read, `token_loss` read and written, all rows of `d_x`.
pub fn linear_cross_entropy(
    token_loss: &Tensor,
    d_x: &GradOut<'_>,
    x: &Tensor,
    head: &Weight,
    vocab_size: usize,
    state: &StepState,
) -> Cost {
    let rows = num_rows(state, x);
    let targets = match state.num_tokens() {
        0 => rows,
        _ => state.target_rows().len() as u64,
    };
    let products = if matches!(d_x, GradOut::Skip) { 1 } else { 2 };
    Cost {
        flops: products * 2 * targets * vocab_size as u64 * width(x),
        bytes: leading(&[x, token_loss, token_loss], targets)
            + weight_bytes(head)
            + grad(d_x, rows),
    }
}

/// Parameters and moments read and written; gradients read twice, as their norm must be known before the first update, and
/// zeroed.
pub fn adamw(params: &Tensor, moments: &Moments, grads: &Tensor, token_loss: &Tensor) -> Cost {
    let moments: usize = moments.tensors().iter().map(|(_, t)| t.num_bytes()).sum();
    let bytes = 2 * (params.num_bytes() + moments) + 3 * grads.num_bytes() + token_loss.num_bytes();
    Cost {
        flops: 0,
        bytes: bytes as u64,
    }
}

/// The matrix read, codes and scales written.
pub fn quantize(weights: &Tensor, double_quant: bool) -> Cost {
    Cost {
        flops: 0,
        bytes: (weights.num_bytes() + num_bytes(weights.len(), double_quant)) as u64,
    }
}
