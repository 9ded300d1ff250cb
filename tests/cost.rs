//! What ops cost, against figures counted by hand, and what a trace notes.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use brightrun::backend::cpu::Cpu;
use brightrun::data::Batch;
use brightrun::ops::cost::{self, Cost};
use brightrun::ops::trace::{Mode, by_op};
use brightrun::ops::{
    AttentionSpec, DeltaSpec, Experts, ExpertsLora, GradOut, Linear, LoraPair, NormSpec, Ops,
    Routing, StepState, Traced,
};
use brightrun::store::Weight;
use brightrun::store::nf4::{Absmax, Nf4Matrix};
use brightrun::tensor::{DType, Tensor};

fn planned(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::planned("t", shape, dtype)
}

fn bf16(shape: &[usize]) -> Tensor {
    planned(shape, DType::Bf16)
}

fn f32(shape: &[usize]) -> Tensor {
    planned(shape, DType::F32)
}

fn nf4(out_features: usize, in_features: usize) -> Weight {
    let blocks = out_features * in_features / 64;
    Weight::Nf4(Nf4Matrix {
        out_features,
        in_features,
        codes: planned(&[out_features * in_features / 2], DType::U8),
        absmax: Absmax::Nested {
            codes: planned(&[blocks], DType::U8),
            nested_absmax: f32(&[blocks.div_ceil(256)]),
            offset: 0.0,
        },
    })
}

fn pair(rank: usize, in_features: usize, out_features: usize) -> LoraPair {
    LoraPair {
        a: 0,
        b: rank * in_features,
        rank,
        in_features,
        out_features,
        scaling: 1.0,
        dropout: 0.0,
        module: 0,
    }
}

/// Sequences of these lengths, every position but a sequence's last with a target.
fn step(lengths: &[u32]) -> StepState {
    let mut batch = Batch {
        cu_seqlens: vec![0],
        ..Batch::default()
    };
    for length in lengths {
        let last = length - 1;
        batch.input_ids.extend((0..*length).map(|_| 0));
        batch.position_ids.extend(0..*length);
        let target = |position: u32| if position == last { -100 } else { 1 };
        batch.target_ids.extend((0..*length).map(target));
        batch
            .cu_seqlens
            .push(u32::try_from(batch.input_ids.len()).unwrap());
    }
    StepState {
        batch,
        loss_scale: 1.0,
        dropout: None,
    }
}

/// Qwen3-Next's experts at 16,384 tokens: 512, 10 a token, hidden 2048, width 512.
fn qwen3_next_experts(rank: usize) -> (Experts, Routing) {
    let (gate, down) = (nf4(512, 2048), nf4(2048, 512));
    let lora = |pair| (rank > 0).then_some(pair);
    let experts = Experts {
        gate: vec![gate.clone(); 512],
        up: vec![gate; 512],
        down: vec![down; 512],
        lora: ExpertsLora {
            gate: lora(pair(rank, 2048, 512)),
            up: lora(pair(rank, 2048, 512)),
            down: lora(pair(rank, 512, 2048)),
            stride: 0,
            module_stride: 0,
        },
        hidden_size: 2048,
        intermediate_size: 512,
    };
    let slots = planned(&[163_840], DType::U32);
    let routing = Routing {
        topk_ids: planned(&[16_384, 10], DType::U32),
        topk_weights: f32(&[16_384, 10]),
        expert_offsets: planned(&[513], DType::U32),
        slot_of_row: slots.clone(),
        row_of_slot: slots,
        num_experts: 512,
        num_experts_per_tok: 10,
        norm_topk_prob: true,
    };
    (experts, routing)
}

/// Forward of the routed experts, on planned tensors: the rows are the capacity.
fn experts_forward(rank: usize) -> Cost {
    let (experts, routing) = qwen3_next_experts(rank);
    let (x, h, lora) = (bf16(&[16_384, 2048]), bf16(&[163_840, 512]), f32(&[1]));
    let (xa2, xa) = (bf16(&[163_840, 2 * rank]), bf16(&[163_840, rank]));
    let state = StepState::default();
    cost::moe_gate_up_forward([&h, &h, &h, &xa2], &x, &routing, &experts, &lora, &state)
        + cost::moe_down_forward(&x, [&h, &xa], &routing, &experts, &lora, &state)
}

#[test]
fn an_expert_layer_of_qwen3_next_is_1_03_tflop_and_0_83_gb_of_weights() {
    // 163,840 rows x 3 matrices x 2 x 2048 x 512.
    let cost = experts_forward(0);
    assert_eq!(cost.flops, 1_030_792_151_040);
    // 1,536 matrices of 2^20: 524,288 codes, 16,384 scales, 64 x 4 + 4 nested.
    let weights = 1536 * (524_288 + 16_384 + 260);
    // x in, out; h, gate, up written, h read; 4 + 8 bytes a row.
    let activations = 2 * 16_384 * 2048 * 2 + 4 * 163_840 * 512 * 2 + 163_840 * 12;
    assert_eq!(cost.bytes, weights + activations);
}

#[test]
fn rank_16_on_experts_adds_what_its_products_are() {
    let (plain, adapted) = (experts_forward(0), experts_forward(16));
    // Each of three: 2 x 163,840 x 16 x (2048 + 512).
    assert_eq!(adapted.flops - plain.flops, 3 * 13_421_772_800);
    // f32 pairs of 16 x 2560 for 512 experts, xa of 48 columns in bf16.
    let pairs = 3 * 512 * 16 * 2560 * 4;
    assert_eq!(adapted.bytes - plain.bytes, pairs + 163_840 * 48 * 2);
}

#[test]
fn backward_of_the_experts_is_two_passes_less_what_is_frozen() {
    let (experts, routing) = qwen3_next_experts(16);
    let state = StepState::default();
    let (x, h, f) = (bf16(&[16_384, 2048]), bf16(&[163_840, 512]), f32(&[1]));
    let (xa2, xa) = (bf16(&[163_840, 32]), bf16(&[163_840, 16]));
    let mut d_x = bf16(&[16_384, 2048]);
    let mut backward = |out: bool| {
        let d_x = if out {
            GradOut::Overwrite(&mut d_x)
        } else {
            GradOut::Skip
        };
        let (acts, x) = ([&h, &h, &h], [&xa2, &x]);
        cost::moe_gate_up_backward(&d_x, acts, x, &routing, &experts, [&f, &f], &state)
    };
    let (with, without) = (backward(true), backward(false));
    // Of a pair: d_s and d_B 2 x 163,840 x 16 x 512 each, d_A and d_s A 2 x 163,840 x 16 x 2048 each.
    let (narrow, wide) = (2_684_354_560, 10_737_418_240);
    assert_eq!(without.flops, 2 * (2 * narrow + wide));
    assert_eq!(with.flops - without.flops, 687_194_767_360 + 2 * wide);
    let weights = 1024 * 540_932;
    assert_eq!(with.bytes - without.bytes, weights + 16_384 * 2048 * 2);
    let down = [&h, &h, &xa];
    let down = cost::moe_down_backward(down, &x, &routing, &experts, [&f, &f], &state);
    assert_eq!(down.flops, 343_597_383_680 + 2 * narrow + 2 * wide);
}

#[test]
fn a_linear_counts_its_weight_as_it_is_held() {
    let linear = |weight| Linear {
        weight,
        bias: None,
        lora: Some(pair(8, 4096, 1024)),
        out_features: 1024,
        in_features: 4096,
        f32_output: false,
    };
    let (x, out, xa, lora) = (
        bf16(&[128, 4096]),
        bf16(&[128, 1024]),
        bf16(&[128, 8]),
        f32(&[1]),
    );
    let of = |linear: &Linear, state: StepState| {
        cost::linear_forward(&[&out], &xa, &x, &[linear], &lora, &state)
    };
    let quantised = of(&linear(nf4(1024, 4096)), step(&[60, 40]));
    // 100 rows: 2 x 100 x 4096 x 1024, and 2 x 100 x 8 x 5120.
    assert_eq!(quantised.flops, 838_860_800 + 8_192_000);
    // Codes, scales, nested scales and offset; pair in f32; x, out, xa in bf16.
    let rest = 8 * 5120 * 4 + 100 * (4096 + 1024 + 8) * 2;
    assert_eq!(quantised.bytes, 2_097_152 + 65_536 + 256 * 4 + 4 + rest);
    let dense = of(&linear(Weight::Dense(bf16(&[1024, 4096]))), step(&[100]));
    assert_eq!(dense.bytes, 8_388_608 + rest);
    // Backward with d_x is forward's products and one more of rank 8: d_B or d_A.
    let mut d_x = bf16(&[128, 4096]);
    let linear = linear(nf4(1024, 4096));
    let (d_x, state) = (GradOut::Add(&mut d_x), step(&[100]));
    let grad = cost::linear_backward(&d_x, &lora, &[&out], [&x, &xa], &[&linear], &lora, &state);
    assert_eq!(grad.flops, 838_860_800 + 2 * 8_192_000);
    let pair = 8 * 5120 * (4 + 8);
    let rows = 100 * (1024 + 2 * 4096 + 4096 + 8) * 2;
    assert_eq!(grad.bytes, 2_097_152 + 65_536 + 1028 + pair + rows);
}

#[test]
fn attention_counts_the_pairs_that_are_seen() {
    let spec = |sliding_window| AttentionSpec {
        num_attention_heads: 16,
        num_key_value_heads: 2,
        head_dim: 256,
        output_gate: true,
        sliding_window,
        qk_norm: None,
        rotary_dim: 64,
    };
    let (q, k, lse) = (
        bf16(&[8192, 16, 256]),
        bf16(&[8192, 2, 256]),
        f32(&[8192, 16]),
    );
    let of = |window, lengths: &[u32]| {
        cost::attention_forward([&q, &lse], [&q, &k, &k], spec(window), &step(lengths))
    };
    // 8192 x 8193 / 2 pairs, 16 heads, 4 x 256.
    assert_eq!(of(None, &[8192]).flops, 33_558_528 * 16 * 1024);
    assert_eq!(of(None, &[4096, 4096]).flops, 2 * 8_390_656 * 16 * 1024);
    // Window of 1000: 1000 x 1001 / 2 and 7192 x 1000.
    assert_eq!(
        of(Some(1000), &[8192]).flops,
        (500_500 + 7_192_000) * 16 * 1024
    );
    let bytes = 8192 * (2 * 4096 + 2 * 512) * 2 + 8192 * 16 * 4;
    assert_eq!(of(None, &[8192]).bytes, bytes);
    let grads = [&q, &k, &k];
    let inputs = [&q, &q, &lse, &q, &k, &k];
    let planned = StepState::default();
    let backward = cost::attention_backward(grads, inputs, spec(None), &planned);
    assert_eq!(backward.flops, 33_558_528 * 16 * 2560);
    let bytes = 8192 * (4 * 4096 + 4 * 512) * 2 + 8192 * 16 * 4;
    assert_eq!(backward.bytes, bytes);
}

#[test]
fn gated_delta_is_the_recurrence() {
    let spec = DeltaSpec {
        num_key_heads: 16,
        num_value_heads: 32,
        key_head_dim: 128,
        value_head_dim: 128,
        conv_kernel_dim: 4,
        eps: 1e-6,
    };
    let (u, o, g) = (bf16(&[8192, 8192]), bf16(&[8192, 4096]), f32(&[8192, 32]));
    let state = StepState::default();
    let forward = cost::gated_delta_forward(&o, [&u, &g, &g], spec, &state);
    // 6 x 128 x 128 x 32 x 8192.
    assert_eq!(forward.flops, 25_769_803_776);
    assert_eq!(forward.bytes, 134_217_728 + 67_108_864 + 2 * 1_048_576);
    let backward = cost::gated_delta_backward([&u, &g, &g], [&o, &u, &g, &g], spec, &state);
    assert_eq!(backward.flops, 68_719_476_736);
    assert_eq!(backward.bytes, 2 * 134_217_728 + 67_108_864 + 4 * 1_048_576);
}

#[test]
fn linear_cross_entropy_is_two_products_over_the_targets() {
    let (x, loss) = (bf16(&[8192, 2048]), f32(&[8192]));
    let head = Weight::Dense(bf16(&[151_936, 2048]));
    let mut d_x = bf16(&[8192, 2048]);
    let d_x = GradOut::Overwrite(&mut d_x);
    let planned = StepState::default();
    let all = cost::linear_cross_entropy(&loss, &d_x, &x, &head, 151_936, &planned);
    // 4 x 8192 x 151,936 x 2048: 12.9 ms at 790 TFLOP/s.
    assert_eq!(all.flops, 10_196_252_360_704);
    let head_bytes = 622_329_856;
    assert_eq!(all.bytes, head_bytes + 2 * 33_554_432 + 2 * 32_768);
    let state = step(&[4096, 4096]);
    let packed = cost::linear_cross_entropy(&loss, &d_x, &x, &head, 151_936, &state);
    // Two rows have no target.
    assert_eq!(all.flops - packed.flops, 2 * 4 * 151_936 * 2048);
}

#[test]
fn a_trace_notes_each_call_once_and_only_while_it_is_on() {
    let cpu: Box<dyn Ops> = Box::new(Cpu::new());
    let (traced, trace) = Traced::new(cpu);
    let values = |shape: &[usize]| Tensor::zeros("t", shape, DType::F32);
    let (mut out, mut rstd) = (values(&[3, 8]), values(&[3]));
    let (x, weight, state) = (values(&[3, 8]), values(&[8]), step(&[2]));
    let spec = NormSpec {
        eps: 1e-6,
        zero_centered: false,
    };
    let mut norm = || traced.rms_norm_forward(&mut out, &mut rstd, &x, &weight, spec, &state);
    norm().unwrap();
    assert!(trace.stop().is_empty());
    trace.start(Mode::Times);
    norm().unwrap();
    norm().unwrap();
    let calls = trace.stop();
    norm().unwrap();
    assert!(trace.stop().is_empty());
    let total = by_op(&calls)[0];
    assert_eq!((total.op, total.count), ("rms_norm_forward", 2));
    // Two rows of x, out (32 B each) and rstd (4 B), the weight.
    assert_eq!(total.cost.bytes, 2 * (2 * 68 + 32));
    assert!(!total.elapsed.is_zero());
    // A failed call is not noted.
    trace.start(Mode::Costs);
    let mut short = values(&[1, 8]);
    let result = traced.rms_norm_forward(&mut short, &mut values(&[3]), &x, &weight, spec, &state);
    assert!(result.is_err());
    assert!(trace.stop().is_empty());
}
