//! The ops on the CPU against results of PyTorch (`tests/golden/ops`).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::backend::cpu::Cpu;
use brightrun::config::model::{RopeConfig, RopeScaling};
use brightrun::model::attention::Attention;
use brightrun::model::gated_delta::GatedDelta;
use brightrun::model::mlp::Mlp;
use brightrun::model::moe::{Moe, SharedExpert};
use brightrun::model::rope::Rope;
use brightrun::model::{Pass, Rows};
use brightrun::ops::{
    AdamWStep, AttentionSpec, DeltaSpec, Experts, ExpertsLora, GradOut, Linear, LoraPair, Moments,
    NormSpec, Ops, QkWeights, Routing, StepState,
};
use brightrun::store::Weight;
use brightrun::tensor::arena::Arena;
use brightrun::tensor::{DType, Tensor};
use common::{Golden, assert_backward, assert_forward, output, sequences, tensor, zeros};

const BACKWARD: f64 = 2e-5;

fn linear(golden: &Golden, name: &str) -> Linear {
    let array = golden.array(name);
    let (out_features, in_features) = (array.shape[0], array.shape[1]);
    let weight = Weight::Dense(tensor(&array.shape, array.values));
    Linear {
        weight,
        bias: None,
        lora: None,
        out_features,
        in_features,
        f32_output: false,
    }
}

fn single(tokens: usize) -> StepState {
    sequences(&[tokens])
}

#[test]
fn rms_norms_match() {
    for (name, eps, zero_centered) in [
        ("rmsnorm_plain", 1e-5, false),
        ("rmsnorm_zero_centered", 1e-6, true),
        ("rmsnorm_tiny_input", 1e-6, true),
    ] {
        let golden = Golden::open(&format!("ops/{name}.safetensors"));
        let shape = golden.array("in.x").shape;
        let (x, weight) = (
            golden.tensor("in.x", &shape),
            golden.tensor("w.weight", &shape[1..]),
        );
        let spec = NormSpec { eps, zero_centered };
        let state = single(shape[0]);
        let (mut out, mut rstd) = (output(&shape), output(&[shape[0], 1]));
        Cpu::new()
            .rms_norm_forward(&mut out, &mut rstd, &x, &weight, spec, &state)
            .unwrap();
        assert_forward(out.f32().unwrap(), &golden.values("out.y"), name);
        let mut d_x = output(&shape);
        let d_out = golden.tensor("dout.y", &shape);
        let into = GradOut::Overwrite(&mut d_x);
        Cpu::new()
            .rms_norm_backward(into, &d_out, &x, &rstd, &weight, spec, &state)
            .unwrap();
        assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, name);
    }
}

#[test]
fn gated_rms_norm_matches() {
    let golden = Golden::open("ops/rmsnorm_gated.safetensors");
    let [tokens, dv] = golden.array("in.x").shape[..] else {
        panic!()
    };
    // One key head of width 1 and one value head: a row of qkvz is [q, k, v, z].
    let spec = DeltaSpec {
        num_key_heads: 1,
        num_value_heads: 1,
        key_head_dim: 1,
        value_head_dim: dv,
        conv_kernel_dim: 4,
        eps: 1e-6,
    };
    let gate = golden.values("in.gate");
    let qkvz: Vec<f32> = gate
        .chunks(dv)
        .flat_map(|z| [vec![7.0; 2 + dv], z.to_vec()].concat())
        .collect();
    let qkvz = tensor(&[tokens, spec.qkvz_dim()], qkvz);
    let (o, weight) = (
        golden.tensor("in.x", &[tokens, dv]),
        golden.tensor("w.weight", &[dv]),
    );
    let state = single(tokens);
    let (mut y, mut rstd) = (output(&[tokens, dv]), output(&[tokens, 1]));
    let cpu = Cpu::new();
    cpu.gated_rms_norm_forward(&mut y, &mut rstd, &o, &qkvz, &weight, spec, &state)
        .unwrap();
    assert_forward(y.f32().unwrap(), &golden.values("out.y"), "y");
    let (mut d_o, mut d_qkvz) = (output(&[tokens, dv]), zeros(&[tokens, spec.qkvz_dim()]));
    let d_y = golden.tensor("dout.y", &[tokens, dv]);
    cpu.gated_rms_norm_backward(
        &mut d_o,
        &mut d_qkvz,
        &d_y,
        &o,
        &rstd,
        &qkvz,
        &weight,
        spec,
        &state,
    )
    .unwrap();
    assert_backward(d_o.f32().unwrap(), &golden.values("din.x"), BACKWARD, "d_o");
    let d_z: Vec<f32> = d_qkvz
        .f32()
        .unwrap()
        .chunks(spec.qkvz_dim())
        .flat_map(|row| row[2 + dv..].to_vec())
        .collect();
    assert_backward(&d_z, &golden.values("din.gate"), BACKWARD, "d_z");
}

/// `[1, heads, T, D]` to `[T, heads, D]` and back.
fn swap(values: &[f32], outer: usize, inner: usize, width: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for i in 0..outer {
        for j in 0..inner {
            out[(j * outer + i) * width..][..width]
                .copy_from_slice(&values[(i * inner + j) * width..][..width]);
        }
    }
    out
}

#[test]
fn partial_rope_matches() {
    let golden = Golden::open("ops/rope_partial.safetensors");
    let [_, hq, tokens, hd] = golden.array("in.q").shape[..] else {
        panic!()
    };
    let hk = golden.array("in.k").shape[1];
    let positions = golden.integers("in.position_ids");
    let last = usize::try_from(*positions.iter().max().unwrap()).unwrap();
    let config = RopeConfig {
        theta: 1e7,
        rotary_dim: 8,
        scaling: RopeScaling::Default,
    };
    let rope = Rope::new(&config, last + 1).unwrap();
    let spec = AttentionSpec {
        num_attention_heads: hq,
        num_key_value_heads: hk,
        head_dim: hd,
        output_gate: false,
        sliding_window: None,
        qk_norm: None,
        rotary_dim: 8,
    };
    let mut state = single(tokens);
    state.batch.position_ids = positions
        .iter()
        .map(|p| u32::try_from(*p).unwrap())
        .collect();
    let weights = QkWeights {
        q_norm: None,
        k_norm: None,
        cos: &rope.cos,
        sin: &rope.sin,
    };
    let input = |name: &str, heads: usize| {
        tensor(
            &[tokens, heads * hd],
            swap(&golden.values(name), heads, tokens, hd),
        )
    };
    let (q_in, k_in) = (input("in.q", hq), input("in.k", hk));
    let (mut q, mut k) = (output(&[tokens, hq * hd]), output(&[tokens, hk * hd]));
    let (mut q_rstd, mut k_rstd) = (zeros(&[tokens, hq]), zeros(&[tokens, hk]));
    let cpu = Cpu::new();
    cpu.qk_norm_rope_forward(
        &mut q,
        &mut k,
        &mut q_rstd,
        &mut k_rstd,
        &q_in,
        &k_in,
        weights,
        spec,
        &state,
    )
    .unwrap();
    let back = |t: &Tensor, heads: usize| swap(t.f32().unwrap(), tokens, heads, hd);
    assert_forward(&back(&q, hq), &golden.values("out.q"), "q");
    assert_forward(&back(&k, hk), &golden.values("out.k"), "k");
    let (d_q, d_k) = (input("dout.q", hq), input("dout.k", hk));
    let (mut d_q_in, mut d_k_in) = (output(&[tokens, hq * hd]), output(&[tokens, hk * hd]));
    cpu.qk_norm_rope_backward(
        &mut d_q_in,
        &mut d_k_in,
        &d_q,
        &d_k,
        &q_in,
        &k_in,
        &q_rstd,
        &k_rstd,
        weights,
        spec,
        &state,
    )
    .unwrap();
    assert_backward(&back(&d_q_in, hq), &golden.values("din.q"), BACKWARD, "d_q");
    assert_backward(&back(&d_k_in, hk), &golden.values("din.k"), BACKWARD, "d_k");
}

#[test]
fn packed_grouped_query_attention_matches() {
    let golden = Golden::open("ops/attention_gqa_core_packed.safetensors");
    let [tokens, hq, hd] = golden.array("in.q").shape[..] else {
        panic!()
    };
    let hk = golden.array("in.k").shape[1];
    let borders = golden.integers("in.cu_seqlens");
    let lengths: Vec<usize> = borders
        .windows(2)
        .map(|w| usize::try_from(w[1] - w[0]).unwrap())
        .collect();
    let state = sequences(&lengths);
    let spec = AttentionSpec {
        num_attention_heads: hq,
        num_key_value_heads: hk,
        head_dim: hd,
        output_gate: false,
        sliding_window: None,
        qk_norm: None,
        rotary_dim: hd,
    };
    let (wide, narrow) = ([tokens, hq * hd], [tokens, hk * hd]);
    let (q, k, v) = (
        golden.tensor("in.q", &wide),
        golden.tensor("in.k", &narrow),
        golden.tensor("in.v", &narrow),
    );
    let (mut o, mut lse) = (output(&wide), output(&[tokens, hq]));
    let cpu = Cpu::new();
    cpu.attention_forward(&mut o, &mut lse, &q, &k, &v, spec, &state)
        .unwrap();
    assert_forward(o.f32().unwrap(), &golden.values("out.o"), "o");
    let d_o = golden.tensor("dout.o", &wide);
    let (mut d_q, mut d_k, mut d_v) = (output(&wide), output(&narrow), output(&narrow));
    cpu.attention_backward(
        &mut d_q, &mut d_k, &mut d_v, &d_o, &o, &lse, &q, &k, &v, spec, &state,
    )
    .unwrap();
    for (found, name) in [(&d_q, "din.q"), (&d_k, "din.k"), (&d_v, "din.v")] {
        assert_backward(found.f32().unwrap(), &golden.values(name), BACKWARD, name);
    }
}

#[test]
fn gated_attention_module_matches() {
    let golden = Golden::open("ops/gated_attention_module.safetensors");
    let [_, tokens, hidden] = golden.array("in.x").shape[..] else {
        panic!()
    };
    let hd = golden.array("w.q_norm.weight").shape[0];
    let norm = NormSpec {
        eps: 1e-6,
        zero_centered: true,
    };
    let attention = Attention {
        q_proj: linear(&golden, "w.q_proj.weight"),
        k_proj: linear(&golden, "w.k_proj.weight"),
        v_proj: linear(&golden, "w.v_proj.weight"),
        o_proj: linear(&golden, "w.o_proj.weight"),
        q_norm: Some(golden.tensor("w.q_norm.weight", &[hd])),
        k_norm: Some(golden.tensor("w.k_norm.weight", &[hd])),
        spec: AttentionSpec {
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: hd,
            output_gate: true,
            sliding_window: None,
            qk_norm: Some(norm),
            rotary_dim: 8,
        },
    };
    let config = RopeConfig {
        theta: 1e7,
        rotary_dim: 8,
        scaling: RopeScaling::Default,
    };
    let rope = Rope::new(&config, tokens).unwrap();
    let (cpu, state, lora) = (Cpu::new(), single(tokens), zeros(&[0]));
    let pass = Pass {
        ops: &cpu,
        lora: &lora,
        state: &state,
    };
    let mut arena = Arena::host();
    let mut rows = Rows::new(&mut arena, tokens + 3, DType::F32);
    let mut acts = attention.alloc(&mut rows).unwrap();
    let mut tmp = attention.alloc_tmp(&mut rows).unwrap();
    let shape = [tokens, hidden];
    let (x, mut y) = (golden.tensor("in.x", &shape), output(&shape));
    attention
        .forward(pass, &mut y, &x, &rope, &mut acts)
        .unwrap();
    assert_forward(y.f32().unwrap(), &golden.values("out.y"), "y");
    let (d_y, mut d_x, mut d_lora) = (golden.tensor("dout.y", &shape), output(&shape), zeros(&[0]));
    let into = GradOut::Overwrite(&mut d_x);
    attention
        .backward(pass, into, &mut d_lora, &d_y, &x, &rope, &acts, &mut tmp)
        .unwrap();
    assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, "d_x");
}

#[test]
fn causal_convolution_matches() {
    for tokens in [1, 3, 34] {
        let golden = Golden::open(&format!("ops/conv1d_silu_T{tokens}.safetensors"));
        let channels = golden.array("in.x").shape[2];
        // One key head, one value head: channels in order, then z.
        let spec = DeltaSpec {
            num_key_heads: 1,
            num_value_heads: 1,
            key_head_dim: channels / 4,
            value_head_dim: channels / 2,
            conv_kernel_dim: 4,
            eps: 1e-6,
        };
        let z = vec![9.0; channels / 2];
        let with_z = |values: Vec<f32>| {
            values
                .chunks(channels)
                .flat_map(|row| [row, &z[..]].concat())
                .collect::<Vec<f32>>()
        };
        let width = spec.qkvz_dim();
        let qkvz = tensor(&[tokens, width], with_z(golden.values("in.x")));
        let weight = golden.tensor("w.weight", &[channels, 4]);
        let (cpu, state) = (Cpu::new(), single(tokens));
        let mut u = output(&[tokens, channels]);
        cpu.causal_conv_forward(&mut u, &qkvz, &weight, spec, &state)
            .unwrap();
        assert_forward(u.f32().unwrap(), &golden.values("out.y"), "u");
        let (mut d_qkvz, d_u) = (
            zeros(&[tokens, width]),
            golden.tensor("dout.y", &[tokens, channels]),
        );
        cpu.causal_conv_backward(&mut d_qkvz, &d_u, &qkvz, &weight, spec, &state)
            .unwrap();
        let d_x: Vec<f32> = d_qkvz
            .f32()
            .unwrap()
            .chunks(width)
            .flat_map(|row| row[..channels].to_vec())
            .collect();
        assert_backward(&d_x, &golden.values("din.x"), BACKWARD, "d_x");
    }
}

#[test]
fn gated_delta_rule_matches_also_in_its_final_state() {
    for (name, limit) in [
        ("T1", BACKWARD),
        ("T63", BACKWARD),
        ("T64", BACKWARD),
        ("T65", BACKWARD),
        ("T130", BACKWARD),
        // Decays down to e^-20 amplify rounding: the goldens' own limit.
        ("T65_strong_decay", 5e-5),
    ] {
        let golden = Golden::open(&format!("ops/gated_delta_rule_{name}.safetensors"));
        let [_, tokens, hk, dk] = golden.array("in.q").shape[..] else {
            panic!()
        };
        let [_, _, hv, dv] = golden.array("in.v").shape[..] else {
            panic!()
        };
        let spec = DeltaSpec {
            num_key_heads: hk,
            num_value_heads: hv,
            key_head_dim: dk,
            value_head_dim: dv,
            conv_kernel_dim: 4,
            eps: 1e-6,
        };
        // dk more tokens that leave the state alone (g = beta = 0) and read it row by row (q = unit vector).
        let all = tokens + dk;
        let channels = spec.conv_dim();
        let read = 1.0 / ((1.0 + 1e-6f32).sqrt() * (dk as f32).sqrt());
        let mut u = vec![0.0; all * channels];
        let (q, k, v) = (
            golden.values("in.q"),
            golden.values("in.k"),
            golden.values("in.v"),
        );
        for t in 0..all {
            let row = &mut u[t * channels..(t + 1) * channels];
            if t < tokens {
                row[..hk * dk].copy_from_slice(&q[t * hk * dk..][..hk * dk]);
                row[hk * dk..2 * hk * dk].copy_from_slice(&k[t * hk * dk..][..hk * dk]);
                row[2 * hk * dk..].copy_from_slice(&v[t * hv * dv..][..hv * dv]);
            } else {
                for head in 0..hk {
                    row[head * dk + t - tokens] = 1.0;
                    row[(hk + head) * dk] = 1.0;
                }
            }
        }
        let pad = |name: &str| {
            let mut values = golden.values(name);
            values.resize(all * hv, 0.0);
            tensor(&[all, hv], values)
        };
        let (u, g, beta) = (tensor(&[all, channels], u), pad("in.g"), pad("in.beta"));
        let (cpu, state) = (Cpu::new(), single(all));
        let mut o = output(&[all, hv * dv]);
        cpu.gated_delta_forward(&mut o, &u, &g, &beta, spec, &state)
            .unwrap();
        let (o, tail) = o.f32().unwrap().split_at(tokens * hv * dv);
        assert_forward(o, &golden.values("out.o"), name);
        let final_state: Vec<f32> = (0..hv)
            .flat_map(|head| (0..dk).map(move |row| (row * hv + head) * dv))
            .flat_map(|first| tail[first..first + dv].iter().map(|value| value / read))
            .collect();
        assert_forward(&final_state, &golden.values("out.final_state"), name);

        let mut d_o = golden.values("dout.o");
        let d_state = golden.values("dout.final_state");
        for row in 0..dk {
            for head in 0..hv {
                d_o.extend(
                    d_state[(head * dk + row) * dv..][..dv]
                        .iter()
                        .map(|d| d / read),
                );
            }
        }
        let d_o = tensor(&[all, hv * dv], d_o);
        let (mut d_u, mut d_g, mut d_beta) = (
            output(&[all, channels]),
            output(&[all, hv]),
            output(&[all, hv]),
        );
        cpu.gated_delta_backward(
            &mut d_u,
            &mut d_g,
            &mut d_beta,
            &d_o,
            &u,
            &g,
            &beta,
            spec,
            &state,
        )
        .unwrap();
        let d_u = d_u.f32().unwrap();
        let part = |first: usize, width: usize| -> Vec<f32> {
            (0..tokens)
                .flat_map(|t| d_u[t * channels + first..][..width].to_vec())
                .collect()
        };
        assert_backward(&part(0, hk * dk), &golden.values("din.q"), limit, name);
        assert_backward(
            &part(hk * dk, hk * dk),
            &golden.values("din.k"),
            limit,
            name,
        );
        assert_backward(
            &part(2 * hk * dk, hv * dv),
            &golden.values("din.v"),
            limit,
            name,
        );
        assert_backward(
            &d_g.f32().unwrap()[..tokens * hv],
            &golden.values("din.g"),
            limit,
            name,
        );
        assert_backward(
            &d_beta.f32().unwrap()[..tokens * hv],
            &golden.values("din.beta"),
            limit,
            name,
        );
    }
}

#[test]
fn gated_deltanet_module_matches() {
    let golden = Golden::open("ops/gated_deltanet_module.safetensors");
    let [_, tokens, hidden] = golden.array("in.x").shape[..] else {
        panic!()
    };
    let spec = DeltaSpec {
        num_key_heads: 4,
        num_value_heads: 8,
        key_head_dim: 16,
        value_head_dim: 16,
        conv_kernel_dim: 4,
        eps: 1e-6,
    };
    let module = GatedDelta {
        in_proj_qkvz: linear(&golden, "w.in_proj_qkvz.weight"),
        in_proj_ba: linear(&golden, "w.in_proj_ba.weight"),
        conv: golden.tensor("w.conv1d.weight", &[spec.conv_dim(), 4]),
        a_log: golden.tensor("w.A_log", &[8]),
        dt_bias: golden.tensor("w.dt_bias", &[8]),
        norm: golden.tensor("w.norm.weight", &[16]),
        out_proj: linear(&golden, "w.out_proj.weight"),
        spec,
    };
    let (cpu, state, lora) = (Cpu::new(), single(tokens), zeros(&[0]));
    let pass = Pass {
        ops: &cpu,
        lora: &lora,
        state: &state,
    };
    let mut arena = Arena::host();
    let mut rows = Rows::new(&mut arena, tokens, DType::F32);
    let (mut acts, mut tmp) = (
        module.alloc(&mut rows).unwrap(),
        module.alloc_tmp(&mut rows).unwrap(),
    );
    let shape = [tokens, hidden];
    let (x, mut y) = (golden.tensor("in.x", &shape), output(&shape));
    module.forward(pass, &mut y, &x, &mut acts).unwrap();
    assert_forward(y.f32().unwrap(), &golden.values("out.y"), "y");
    let (d_y, mut d_x, mut d_lora) = (golden.tensor("dout.y", &shape), output(&shape), zeros(&[0]));
    let into = GradOut::Overwrite(&mut d_x);
    module
        .backward(pass, into, &mut d_lora, &d_y, &x, &acts, &mut tmp)
        .unwrap();
    assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, "d_x");
}

fn routing(tokens: usize, num_experts: usize, k: usize, norm_topk_prob: bool) -> Routing {
    Routing {
        topk_ids: Tensor::zeros("topk_ids", &[tokens, k], DType::U32),
        topk_weights: output(&[tokens, k]),
        expert_offsets: Tensor::zeros("expert_offsets", &[num_experts + 1], DType::U32),
        slot_of_row: Tensor::zeros("slot_of_row", &[tokens * k], DType::U32),
        row_of_slot: Tensor::zeros("row_of_slot", &[tokens * k], DType::U32),
        num_experts,
        num_experts_per_tok: k,
        norm_topk_prob,
    }
}

#[test]
fn routers_match_and_pass_gradients_through_the_weights() {
    for (name, norm) in [("router_topk_norm", true), ("router_topk_nonorm", false)] {
        let golden = Golden::open(&format!("ops/{name}.safetensors"));
        let [tokens, hidden] = golden.array("in.x").shape[..] else {
            panic!()
        };
        let router = linear(&golden, "w.weight");
        let experts = router.out_features;
        let (cpu, state, lora) = (Cpu::new(), single(tokens), zeros(&[0]));
        let x = golden.tensor("in.x", &[tokens, hidden]);
        let (mut logits, mut xa) = (output(&[tokens, experts]), zeros(&[tokens, 0]));
        cpu.linear_forward(&mut [&mut logits], &mut xa, &x, &[&router], &lora, &state)
            .unwrap();
        let mut routing = routing(tokens, experts, 2, norm);
        cpu.moe_route_forward(&mut routing, &logits, &state)
            .unwrap();
        assert_forward(
            routing.topk_weights.f32().unwrap(),
            &golden.values("out.weights"),
            name,
        );
        let ids: Vec<i64> = routing
            .topk_ids
            .u32()
            .unwrap()
            .iter()
            .map(|id| i64::from(*id))
            .collect();
        assert_eq!(ids, golden.integers("out.indices"));
        let d_weights = golden.tensor("dout.weights", &[tokens, 2]);
        let mut d_logits = output(&[tokens, experts]);
        cpu.moe_route_backward(&mut d_logits, &d_weights, &logits, &routing, &state)
            .unwrap();
        let (mut d_x, mut d_lora) = (output(&[tokens, hidden]), zeros(&[0]));
        let into = GradOut::Overwrite(&mut d_x);
        cpu.linear_backward(
            into,
            &mut d_lora,
            &[&d_logits],
            &x,
            &xa,
            &[&router],
            &lora,
            &state,
        )
        .unwrap();
        assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, name);
    }
}

#[test]
fn moe_block_matches() {
    let golden = Golden::open("ops/moe_block.safetensors");
    let [_, tokens, hidden] = golden.array("in.x").shape[..] else {
        panic!()
    };
    let width = golden.array("w.experts.0.gate_proj.weight").shape[0];
    let expert = |projection: &str| -> Vec<Weight> {
        let name = |e: usize| format!("w.experts.{e}.{projection}.weight");
        (0..8).map(|e| linear(&golden, &name(e)).weight).collect()
    };
    let mut router = linear(&golden, "w.gate.weight");
    router.f32_output = true;
    let moe = Moe {
        router,
        experts: Experts {
            gate: expert("gate_proj"),
            up: expert("up_proj"),
            down: expert("down_proj"),
            lora: ExpertsLora::default(),
            hidden_size: hidden,
            intermediate_size: width,
        },
        shared: Some(SharedExpert {
            mlp: Mlp {
                gate_proj: linear(&golden, "w.shared_expert.gate_proj.weight"),
                up_proj: linear(&golden, "w.shared_expert.up_proj.weight"),
                down_proj: linear(&golden, "w.shared_expert.down_proj.weight"),
            },
            gate: linear(&golden, "w.shared_expert_gate.weight"),
        }),
        num_experts_per_tok: 2,
        norm_topk_prob: true,
    };
    let (cpu, state, lora) = (Cpu::new(), single(tokens), zeros(&[0]));
    let pass = Pass {
        ops: &cpu,
        lora: &lora,
        state: &state,
    };
    let mut arena = Arena::host();
    let mut rows = Rows::new(&mut arena, tokens + 5, DType::F32);
    let (mut acts, mut tmp) = (
        moe.alloc(&mut rows).unwrap(),
        moe.alloc_tmp(&mut rows).unwrap(),
    );
    let shape = [tokens, hidden];
    let (x, mut y) = (golden.tensor("in.x", &shape), output(&shape));
    moe.forward(pass, &mut y, &x, &mut acts, &mut tmp).unwrap();
    assert_forward(y.f32().unwrap(), &golden.values("out.y"), "y");
    let logits = &Moe::router_logits(&acts).f32().unwrap()[..tokens * 8];
    assert_forward(logits, &golden.values("out.router_logits"), "router logits");
    let (d_y, mut d_x, mut d_lora) = (golden.tensor("dout.y", &shape), output(&shape), zeros(&[0]));
    moe.backward(
        pass,
        Some(&mut d_x),
        &mut d_lora,
        &d_y,
        &x,
        &mut acts,
        &mut tmp,
    )
    .unwrap();
    assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, "d_x");
}

#[test]
fn cross_entropy_matches() {
    for name in ["cross_entropy", "cross_entropy_large_logits"] {
        let golden = Golden::open(&format!("ops/{name}.safetensors"));
        let [tokens, vocab] = golden.array("in.logits").shape[..] else {
            panic!()
        };
        // With the identity as head, hidden states are logits.
        let mut eye = vec![0.0; vocab * vocab];
        (0..vocab).for_each(|i| eye[i * vocab + i] = 1.0);
        let head = Weight::Dense(tensor(&[vocab, vocab], eye));
        let labels = golden.integers("in.labels");
        let targets = labels.iter().filter(|label| **label != -100).count();
        let mut state = single(tokens);
        state.batch.target_ids = labels
            .iter()
            .map(|label| i32::try_from(*label).unwrap())
            .collect();
        state.loss_scale = 1.0 / targets as f32;
        let (mut token_loss, mut d_x) = (zeros(&[tokens, 1]), output(&[tokens, vocab]));
        let x = golden.tensor("in.logits", &[tokens, vocab]);
        let into = GradOut::Overwrite(&mut d_x);
        Cpu::new()
            .linear_cross_entropy(&mut token_loss, into, &x, &head, vocab, &state)
            .unwrap();
        let token_loss = token_loss.f32().unwrap();
        assert_forward(token_loss, &golden.values("out.token_loss"), name);
        let sum: f32 = token_loss.iter().sum();
        assert_forward(&[sum], &golden.values("out.loss_sum"), name);
        assert_forward(
            &[sum / targets as f32],
            &golden.values("out.loss_mean"),
            name,
        );
        assert_backward(
            d_x.f32().unwrap(),
            &golden.values("din.logits"),
            BACKWARD,
            name,
        );
    }
}

#[test]
fn lora_linear_matches() {
    let golden = Golden::open("ops/lora_linear.safetensors");
    let mut linear = linear(&golden, "w.weight");
    let (n, k, tokens) = (
        linear.out_features,
        linear.in_features,
        golden.array("in.x").shape[0],
    );
    linear.lora = Some(LoraPair {
        a: 0,
        b: 4 * k,
        rank: 4,
        in_features: k,
        out_features: n,
        scaling: 2.0,
        dropout: 0.0,
        module: 0,
    });
    let values = [golden.values("w.lora_A"), golden.values("w.lora_B")].concat();
    let (lora, mut d_lora) = (
        tensor(&[values.len()], values.clone()),
        zeros(&[values.len()]),
    );
    let (cpu, state, x) = (
        Cpu::new(),
        single(tokens),
        golden.tensor("in.x", &[tokens, k]),
    );
    let (mut y, mut xa) = (output(&[tokens, n]), output(&[tokens, 4]));
    cpu.linear_forward(&mut [&mut y], &mut xa, &x, &[&linear], &lora, &state)
        .unwrap();
    assert_forward(y.f32().unwrap(), &golden.values("out.y"), "y");
    let (d_y, mut d_x) = (golden.tensor("dout.y", &[tokens, n]), output(&[tokens, k]));
    let into = GradOut::Overwrite(&mut d_x);
    cpu.linear_backward(
        into,
        &mut d_lora,
        &[&d_y],
        &x,
        &xa,
        &[&linear],
        &lora,
        &state,
    )
    .unwrap();
    assert_backward(d_x.f32().unwrap(), &golden.values("din.x"), BACKWARD, "d_x");
    let (d_a, d_b) = d_lora.f32().unwrap().split_at(4 * k);
    assert_backward(d_a, &golden.values("dw.lora_A"), BACKWARD, "d_a");
    assert_backward(d_b, &golden.values("dw.lora_B"), BACKWARD, "d_b");
}

#[test]
fn swiglu_matches() {
    let golden = Golden::open("ops/swiglu.safetensors");
    let shape = golden.array("in.gate").shape;
    let (gate, up) = (
        golden.tensor("in.gate", &shape),
        golden.tensor("in.up", &shape),
    );
    let (mut d_gate, mut d_up) = (output(&shape), output(&shape));
    let d_h = golden.tensor("dout.y", &shape);
    let state = single(shape[0]);
    Cpu::new()
        .swiglu_backward(&mut d_gate, &mut d_up, &d_h, &gate, &up, &state)
        .unwrap();
    assert_backward(
        d_gate.f32().unwrap(),
        &golden.values("din.gate"),
        BACKWARD,
        "d_gate",
    );
    assert_backward(
        d_up.f32().unwrap(),
        &golden.values("din.up"),
        BACKWARD,
        "d_up",
    );
    // Forward runs fused with its projections: with the identity as weight it is the bare SwiGLU.
    let width = shape[1];
    let mut eye = vec![0.0; width * 2 * width * 2];
    (0..2 * width).for_each(|i| eye[i * 2 * width + i] = 1.0);
    let half = |first: usize| Linear {
        weight: Weight::Dense(tensor(
            &[width, 2 * width],
            eye[first * 2 * width..(first + width) * 2 * width].to_vec(),
        )),
        bias: None,
        lora: None,
        out_features: width,
        in_features: 2 * width,
        f32_output: false,
    };
    let (gates, ups) = (golden.values("in.gate"), golden.values("in.up"));
    let rows = gates.chunks(width).zip(ups.chunks(width));
    let x: Vec<f32> = rows.flat_map(|(gate, up)| [gate, up].concat()).collect();
    let x = tensor(&[shape[0], 2 * width], x);
    let (mut h, mut g, mut u) = (output(&shape), output(&shape), output(&shape));
    let mut xa = zeros(&[shape[0], 0]);
    let (gate_half, up_half) = (half(0), half(width));
    let linears = [&gate_half, &up_half];
    Cpu::new()
        .linear_swiglu_forward(
            &mut h,
            &mut g,
            &mut u,
            &mut xa,
            &x,
            linears,
            &zeros(&[0]),
            &state,
        )
        .unwrap();
    assert_forward(h.f32().unwrap(), &golden.values("out.y"), "h");
}

fn f32_moments(len: usize) -> Moments {
    Moments::alloc(&mut Arena::host(), len, false).unwrap()
}

#[test]
fn adamw_matches_over_five_clipped_steps() {
    for weight_decay in [0.0, 0.01] {
        let golden = Golden::open(&format!("ops/adamw_wd{weight_decay:?}.safetensors"));
        let mut params = golden.tensor("in.param", &[35]);
        let mut moments = f32_moments(35);
        for step in 0..5u64 {
            let mut grads = golden.tensor(&format!("in.grad{step}"), &[35]);
            let settings = AdamWStep {
                learning_rate: 1e-3,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay,
                max_grad_norm: 1.0,
                step: step + 1,
                seed: 0,
            };
            let report = Cpu::new()
                .adamw(
                    &mut params,
                    &mut moments,
                    &mut grads,
                    &zeros(&[1]),
                    settings,
                )
                .unwrap();
            let norm = f64::from(golden.values(&format!("out.norm{step}"))[0]);
            assert!((report.grad_norm - norm).abs() <= 1e-6 * norm.max(1.0));
            assert!(report.applied);
            assert_eq!(grads.f32().unwrap(), [0.0; 35]);
            let expected = golden.values(&format!("out.param{step}"));
            assert_forward(params.f32().unwrap(), &expected, "params");
        }
        for (name, tensor) in moments.tensors() {
            let expected = golden.values(&format!("out.{name}"));
            assert_forward(tensor.f32().unwrap(), &expected, name);
        }
    }
}

#[test]
fn an_update_with_a_gradient_that_is_not_finite_is_not_made() {
    let (mut params, mut moments) = (tensor(&[3], vec![1.0, 2.0, 3.0]), f32_moments(3));
    let mut grads = tensor(&[3], vec![0.1, f32::INFINITY, 0.2]);
    let step = AdamWStep {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
        step: 1,
        seed: 0,
    };
    let report = Cpu::new()
        .adamw(&mut params, &mut moments, &mut grads, &zeros(&[1]), step)
        .unwrap();
    assert!(!report.applied && !report.grad_norm.is_finite());
    assert_eq!(params.f32().unwrap(), [1.0, 2.0, 3.0]);
    for (_, tensor) in moments.tensors() {
        assert_eq!(tensor.f32().unwrap(), [0.0; 3]);
    }
}
