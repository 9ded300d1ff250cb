//! Times one training step (forward, backward, AdamW) on the CPU at the shape of Qwen2.5-0.5B, random f32 weights.
//!
//! `cargo bench --bench step -- [--layers 24] [--tokens 512] [--steps 5]` prints one JSON line; threads as rayon has
//! them (`RAYON_NUM_THREADS`). The peer of `benches/peers/torch_step.py`.

use std::time::Instant;

use brightrun::backend::cpu::Cpu;
use brightrun::config::model::{
    LayerConfig, MixerKind, MlpKind, ModelConfig, RopeConfig, RopeScaling,
};
use brightrun::config::{LoraDType, MoeLora, Optimizer, Recompute};
use brightrun::data::{Batch, StepBatches};
use brightrun::model::adapter::AdapterSettings;
use brightrun::model::random_weights::RandomWeights;
use brightrun::model::weights;
use brightrun::random::{Draws, Stream};
use brightrun::train::trainer::{OptimizerSettings, Trainer};

fn qwen2_5_0_5b(layers: usize) -> ModelConfig {
    let layer = LayerConfig {
        mixer: MixerKind::Attention,
        mlp: MlpKind::Dense,
    };
    ModelConfig {
        model_type: "qwen2".to_owned(),
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        layers: vec![layer; layers],
        num_attention_heads: 14,
        num_key_value_heads: 2,
        head_dim: 64,
        qkv_bias: true,
        qk_norm: false,
        attn_output_gate: false,
        sliding_window: None,
        rope: RopeConfig {
            theta: 1e6,
            rotary_dim: 64,
            scaling: RopeScaling::Default,
        },
        rms_norm_eps: 1e-6,
        norm_zero_centered: false,
        tie_word_embeddings: true,
        moe: None,
        linear_attention: None,
        bos_token_id: None,
        max_position_embeddings: 32_768,
    }
}

fn adapter() -> AdapterSettings {
    let targets = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    AdapterSettings {
        rank: 16,
        expert_rank: 16,
        alpha: 32.0,
        dropout: 0.0,
        use_rslora: false,
        target_modules: targets.map(str::to_owned).to_vec(),
        moe_lora: MoeLora::All,
    }
}

/// One sequence of random ids, trained on all tokens.
fn batches(tokens: usize, vocab_size: usize) -> StepBatches {
    let mut draws = Draws::new(1, Stream::Synthetic, 0);
    let input_ids: Vec<u32> = (0..tokens)
        .map(|_| u32::try_from(draws.below(vocab_size)).unwrap_or(0))
        .collect();
    let mut target_ids: Vec<i32> = input_ids
        .iter()
        .skip(1)
        .map(|id| i32::try_from(*id).unwrap_or(0))
        .collect();
    target_ids.push(-100);
    let length = u32::try_from(tokens).unwrap_or(u32::MAX);
    let batch = Batch {
        input_ids,
        target_ids,
        cu_seqlens: vec![0, length],
        position_ids: (0..length).collect(),
    };
    StepBatches {
        micro_batches: vec![batch],
        num_target_tokens: tokens - 1,
    }
}

/// The value after `--name`, or `default`.
fn argument(name: &str, default: usize) -> usize {
    let arguments: Vec<String> = std::env::args().collect();
    let at = arguments.iter().position(|argument| argument == name);
    at.and_then(|at| arguments.get(at + 1)?.parse().ok())
        .unwrap_or(default)
}

fn peak_rss_mb() -> Option<f64> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

#[expect(
    clippy::print_stdout,
    reason = "the result of a benchmark is what it prints"
)]
fn main() -> anyhow::Result<()> {
    let (layers, tokens) = (argument("--layers", 24), argument("--tokens", 512));
    let steps = argument("--steps", 5);
    let config = qwen2_5_0_5b(layers);
    let decoder = weights::load(&config, &mut RandomWeights::new(1), adapter(), tokens)?;
    let optimizer = OptimizerSettings {
        kind: Optimizer::Adamw,
        lora_dtype: LoraDType::Fp32,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    };
    let ops = Box::new(Cpu::new());
    let mut trainer = Trainer::new(ops, decoder, optimizer, tokens, Recompute::None, 1)?;
    let batches = batches(tokens, config.vocab_size);
    let mut seconds = Vec::new();
    for step in 0..=steps as u64 {
        let start = Instant::now();
        trainer.step(&batches, step, 1e-4)?;
        // The first step warms up.
        if step > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let each = seconds.clone();
    seconds.sort_by(f64::total_cmp);
    let result = serde_json::json!({
        "what": "qwen2.5-0.5b lora r16 f32 train step",
        "layers": layers,
        "tokens": tokens,
        "threads": rayon::current_num_threads(),
        "median_s": seconds[seconds.len() / 2],
        "min_s": seconds[0],
        "each_s": each,
        "peak_rss_mb": peak_rss_mb(),
    });
    println!("{result}");
    Ok(())
}
