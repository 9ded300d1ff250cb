//! Invariants of whole models with random weights: gradients against finite differences, packing, accumulation,
//! recompute, threads, dropout.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::backend::cpu::Cpu;
use brightrun::config::model::{
    LayerConfig, LinearAttentionConfig, MixerKind, MlpKind, ModelConfig, MoeConfig, RopeConfig,
    RopeScaling,
};
use brightrun::config::{LoraDType, MoeLora, Optimizer, Recompute};
use brightrun::data::{Batch, StepBatches};
use brightrun::model::adapter::AdapterSettings;
use brightrun::model::random_weights::RandomWeights;
use brightrun::model::weights;
use brightrun::random::{Draws, Stream};
use brightrun::train::trainer::{OptimizerSettings, Trainer};
use common::relative_l2;

const VOCAB: usize = 61;

fn dense(name: &str) -> ModelConfig {
    let layer = LayerConfig {
        mixer: MixerKind::Attention,
        mlp: MlpKind::Dense,
    };
    ModelConfig {
        model_type: name.to_owned(),
        vocab_size: VOCAB,
        hidden_size: 24,
        intermediate_size: 40,
        layers: vec![layer; 2],
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        qkv_bias: false,
        qk_norm: false,
        attn_output_gate: false,
        sliding_window: None,
        rope: RopeConfig {
            theta: 1e4,
            rotary_dim: 8,
            scaling: RopeScaling::Default,
        },
        rms_norm_eps: 1e-6,
        norm_zero_centered: false,
        tie_word_embeddings: false,
        moe: None,
        linear_attention: None,
        bos_token_id: None,
        max_position_embeddings: 512,
    }
}

fn moe(name: &str, norm_topk_prob: bool, shared: Option<usize>) -> ModelConfig {
    let mut config = dense(name);
    config.qk_norm = true;
    config.layers[1].mlp = MlpKind::Moe;
    config.moe = Some(MoeConfig {
        num_experts: 5,
        num_experts_per_tok: 2,
        norm_topk_prob,
        moe_intermediate_size: 16,
        shared_expert_intermediate_size: shared,
    });
    config
}

/// One of each kind of layer that any family has.
fn models() -> Vec<ModelConfig> {
    let mut mistral = dense("mistral");
    mistral.sliding_window = Some(6);
    let mut qwen2 = dense("qwen2");
    (qwen2.qkv_bias, qwen2.tie_word_embeddings) = (true, true);
    let mut next = moe("qwen3_next", true, Some(12));
    (next.attn_output_gate, next.norm_zero_centered) = (true, true);
    next.rope.rotary_dim = 4;
    next.layers[0] = LayerConfig {
        mixer: MixerKind::GatedDelta,
        mlp: MlpKind::Moe,
    };
    next.linear_attention = Some(LinearAttentionConfig {
        num_key_heads: 2,
        num_value_heads: 4,
        key_head_dim: 8,
        value_head_dim: 6,
        conv_kernel_dim: 4,
    });
    vec![mistral, qwen2, moe("qwen3_moe", false, None), next]
}

fn settings(dropout: f64) -> AdapterSettings {
    let mut targets = vec![
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    targets.extend(["in_proj_qkvz", "in_proj_ba", "out_proj"]);
    AdapterSettings {
        rank: 3,
        expert_rank: 2,
        alpha: 6.0,
        dropout,
        use_rslora: false,
        target_modules: targets.into_iter().map(str::to_owned).collect(),
        moe_lora: MoeLora::All,
    }
}

const OPTIMIZER: OptimizerSettings = OptimizerSettings {
    kind: Optimizer::Adamw,
    lora_dtype: LoraDType::Fp32,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
    max_grad_norm: 1.0,
};

/// A trainer whose adapter is random in A and B, so that every gradient is alive.
fn trainer_with(config: &ModelConfig, dropout: f64, recompute: Recompute) -> Trainer {
    let mut settings = settings(dropout);
    if config.linear_attention.is_none() {
        settings.target_modules.truncate(7);
    }
    let decoder = weights::load(config, &mut RandomWeights::new(7), settings, 512).unwrap();
    let mut trainer =
        Trainer::new(Box::new(Cpu::new()), decoder, OPTIMIZER, 400, recompute, 11).unwrap();
    let ranges: Vec<_> = trainer
        .decoder()
        .adapter
        .tensors()
        .map(|(_, range)| range)
        .collect();
    let values = trainer.adapter_mut().values.f32_mut().unwrap();
    let mut draws = Draws::new(3, Stream::Synthetic, 0);
    for range in ranges {
        values[range].fill_with(|| 0.3 * draws.next_normal());
    }
    trainer
}

fn trainer(config: &ModelConfig) -> Trainer {
    trainer_with(config, 0.0, Recompute::None)
}

/// Sequences of random ids; every position but the first of each is a target, each third one left out.
fn batch(lengths: &[usize], seed: u64) -> Batch {
    let mut batch = Batch {
        cu_seqlens: vec![0],
        ..Batch::default()
    };
    for (index, length) in lengths.iter().enumerate() {
        let mut draws = Draws::new(seed, Stream::Synthetic, index as u64);
        let ids: Vec<u32> = (0..*length)
            .map(|_| u32::try_from(draws.below(VOCAB)).unwrap())
            .collect();
        for position in 0..*length {
            let target = ids.get(position + 1).filter(|_| position % 3 != 1);
            batch
                .target_ids
                .push(target.map_or(-100, |id| i32::try_from(*id).unwrap()));
            batch.position_ids.push(u32::try_from(position).unwrap());
        }
        batch.input_ids.extend(ids);
        batch
            .cu_seqlens
            .push(u32::try_from(batch.input_ids.len()).unwrap());
    }
    batch
}

fn step(micro_batches: Vec<Batch>) -> StepBatches {
    let targets = micro_batches.iter().flat_map(|batch| &batch.target_ids);
    let num_target_tokens = targets.filter(|id| **id >= 0).count();
    StepBatches {
        micro_batches,
        num_target_tokens,
    }
}

fn gradient(trainer: &mut Trainer, batches: &StepBatches) -> (f64, Vec<f32>) {
    trainer.adapter_mut().grads.f32_mut().unwrap().fill(0.0);
    let loss = trainer.accumulate(batches, 0).unwrap();
    (loss, trainer.adapter().grads.f32().unwrap().to_vec())
}

/// Smallest distance, over tokens and routers, between the last chosen expert's logit and the first one left out.
fn routing_margin(trainer: &mut Trainer, config: &ModelConfig, batches: &StepBatches) -> f32 {
    let Some(moe) = &config.moe else {
        return f32::INFINITY;
    };
    trainer.evaluate(&batches.micro_batches).unwrap();
    let tokens = batches.micro_batches[0].input_ids.len();
    let layers =
        (0..config.layers.len()).filter_map(|layer| trainer.activations().router_logits(layer));
    let margins = layers.flat_map(|logits| {
        logits.f32().unwrap()[..tokens * moe.num_experts]
            .chunks(moe.num_experts)
            .map(|logits| {
                let mut logits = logits.to_vec();
                logits.sort_by(|a, b| b.total_cmp(a));
                logits[moe.num_experts_per_tok - 1] - logits[moe.num_experts_per_tok]
            })
    });
    margins.fold(f32::INFINITY, f32::min)
}

/// A step small enough that no perturbation of the test flips a top-k choice: the loss is smooth around it.
fn smooth_step(trainer: &mut Trainer, config: &ModelConfig) -> StepBatches {
    if config.moe.is_none() {
        return step(vec![batch(&[9, 70, 1, 14], 5)]);
    }
    let steps = (0..300).map(|seed| step(vec![batch(&[4, 1, 7], seed)]));
    let margins = steps.map(|step| (routing_margin(trainer, config, &step), step));
    let (margin, step) = margins.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert!(margin > 0.05, "{margin}");
    step
}

#[test]
fn every_adapter_gradient_matches_finite_differences() {
    for config in models() {
        let mut trainer = trainer(&config);
        let batches = smooth_step(&mut trainer, &config);
        let (_, grads) = gradient(&mut trainer, &batches);
        let tensors: Vec<_> = trainer.decoder().adapter.tensors().collect();
        let mut draws = Draws::new(9, Stream::Synthetic, 1);
        for (name, range) in tensors {
            let direction: Vec<f32> = range.clone().map(|_| draws.next_normal()).collect();
            let exact: f64 = grads[range.clone()]
                .iter()
                .zip(&direction)
                .map(|(g, d)| f64::from(*g) * f64::from(*d))
                .sum();
            let original = trainer.adapter().values.f32().unwrap()[range.clone()].to_vec();
            let mut loss_at = |factor: f32| {
                let values = &mut trainer.adapter_mut().values.f32_mut().unwrap()[range.clone()];
                for ((value, original), d) in values.iter_mut().zip(&original).zip(&direction) {
                    *value = original + factor * d;
                }
                let (sum, count) = trainer.evaluate(&batches.micro_batches).unwrap();
                sum / count as f64
            };
            // Two step sizes, extrapolated: the error is of fourth order, so a coarse step is far above f32 noise.
            let mut slope = |h: f32| (loss_at(h) - loss_at(-h)) / f64::from(2.0 * h);
            let (coarse, fine) = (slope(2e-3), slope(1e-3));
            let numeric = (4.0 * fine - coarse) / 3.0;
            loss_at(0.0);
            // f32 losses carry about 1e-6; over a step of 1e-3 that is 1e-3 in the slope.
            let tolerance = 2e-3 + 0.005 * exact.abs();
            assert!(
                (numeric - exact).abs() <= tolerance,
                "{} {name}: {numeric} numeric, {exact} exact",
                config.model_type
            );
        }
    }
}

#[test]
fn packed_sequences_do_not_see_each_other() {
    for config in models() {
        let mut trainer = trainer(&config);
        let lengths = [9, 70, 1, 14];
        let packed = step(vec![batch(&lengths, 5)]);
        let (loss, grads) = gradient(&mut trainer, &packed);
        let whole = &packed.micro_batches[0];
        let singles: Vec<Batch> = whole
            .cu_seqlens
            .windows(2)
            .map(|w| (w[0] as usize, w[1] as usize))
            .map(|(start, end)| Batch {
                input_ids: whole.input_ids[start..end].to_vec(),
                target_ids: whole.target_ids[start..end].to_vec(),
                cu_seqlens: vec![0, u32::try_from(end - start).unwrap()],
                position_ids: whole.position_ids[start..end].to_vec(),
            })
            .collect();
        let (separate_loss, separate) = gradient(&mut trainer, &step(singles));
        assert!(
            (loss - separate_loss).abs() < 1e-4 * loss,
            "{loss} {separate_loss}"
        );
        let diff = relative_l2(&grads, &separate);
        assert!(diff < 1e-5, "{}: {diff:e}", config.model_type);
    }
}

#[test]
fn micro_batches_equal_one_batch_also_with_dropout() {
    for config in models() {
        let mut trainer = trainer_with(&config, 0.2, Recompute::None);
        let one = batch(&[20, 9], 6);
        let split = |start: usize, end: usize| Batch {
            input_ids: one.input_ids[start..end].to_vec(),
            target_ids: one.target_ids[start..end].to_vec(),
            cu_seqlens: vec![0, u32::try_from(end - start).unwrap()],
            position_ids: one.position_ids[start..end].to_vec(),
        };
        let (_, accumulated) = gradient(&mut trainer, &step(vec![split(0, 20), split(20, 29)]));
        let (_, together) = gradient(&mut trainer, &step(vec![one]));
        let diff = relative_l2(&accumulated, &together);
        assert!(diff < 1e-5, "{}: {diff:e}", config.model_type);
    }
}

/// Adapter values after three steps.
fn train_three_steps(mut trainer: Trainer) -> Vec<u32> {
    for completed in 0..3 {
        let batches = step(vec![
            batch(&[33, 8, 70], completed),
            batch(&[5, 20], completed + 100),
        ]);
        trainer.step(&batches, completed, 1e-2).unwrap();
    }
    trainer
        .adapter()
        .values
        .f32()
        .unwrap()
        .iter()
        .map(|value| value.to_bits())
        .collect()
}

#[test]
fn recompute_changes_no_bit() {
    for config in models() {
        let kept = train_three_steps(trainer_with(&config, 0.1, Recompute::None));
        let recomputed = train_three_steps(trainer_with(&config, 0.1, Recompute::Full));
        assert!(kept == recomputed, "{}", config.model_type);
    }
}

#[test]
fn recompute_keeps_less_memory() {
    let mut config = models().remove(0);
    let layer = config.layers[0];
    config.layers = vec![layer; 8];
    let bytes = |recompute| {
        let decoder = weights::load(
            &config,
            &mut RandomWeights::new(7),
            settings_of(&config),
            512,
        )
        .unwrap();
        let trainer = Trainer::new(Box::new(Cpu::new()), decoder, OPTIMIZER, 400, recompute, 11);
        trainer.unwrap().memory().num_bytes()
    };
    assert!(2 * bytes(Recompute::Full) < bytes(Recompute::None));
}

fn settings_of(config: &ModelConfig) -> AdapterSettings {
    let mut settings = settings(0.0);
    if config.linear_attention.is_none() {
        settings.target_modules.truncate(7);
    }
    settings
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for config in models() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| train_three_steps(trainer_with(&config, 0.1, Recompute::None)))
        };
        let reference = run(1);
        for threads in [2, 3, 7] {
            assert!(
                run(threads) == reference,
                "{} with {threads} threads",
                config.model_type
            );
        }
    }
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    for config in models() {
        let decoder = weights::load(
            &config,
            &mut RandomWeights::new(7),
            settings_of(&config),
            512,
        )
        .unwrap();
        let mut fresh = Trainer::new(
            Box::new(Cpu::new()),
            decoder,
            OPTIMIZER,
            400,
            Recompute::None,
            11,
        )
        .unwrap();
        let batches = [batch(&[30, 12], 1)];
        let (initial, _) = fresh.evaluate(&batches).unwrap();
        fresh.adapter_mut().values.f32_mut().unwrap().fill(0.0);
        let (without, _) = fresh.evaluate(&batches).unwrap();
        assert_eq!(
            initial.to_bits(),
            without.to_bits(),
            "{}",
            config.model_type
        );
    }
}

#[test]
fn dropout_is_off_in_evaluation_and_on_in_training() {
    for config in models() {
        let batches = step(vec![batch(&[30], 1)]);
        let mut with = trainer_with(&config, 0.5, Recompute::None);
        let mut without = trainer_with(&config, 0.0, Recompute::None);
        let evaluated = |trainer: &mut Trainer| trainer.evaluate(&batches.micro_batches).unwrap().0;
        assert_eq!(
            evaluated(&mut with).to_bits(),
            evaluated(&mut without).to_bits()
        );
        let (dropped, plain) = (
            gradient(&mut with, &batches),
            gradient(&mut without, &batches),
        );
        assert!((dropped.0 - plain.0).abs() > 1e-3, "{}", config.model_type);
    }
}

#[test]
fn a_loss_that_is_not_finite_names_the_step_and_the_layer() {
    let config = models().remove(0);
    let mut trainer = trainer(&config);
    let before = trainer.adapter().values.f32().unwrap().to_vec();
    let range = trainer
        .decoder()
        .adapter
        .modules()
        .iter()
        .find(|module| module.name == "model.layers.1.self_attn.o_proj");
    let at = range.unwrap().pair.b;
    trainer.adapter_mut().values.f32_mut().unwrap()[at] = f32::NAN;
    let error = trainer
        .step(&step(vec![batch(&[12], 1)]), 6, 1e-3)
        .unwrap_err();
    assert_eq!(error.exit_code(), 17);
    let message = error.to_string();
    assert!(
        message.starts_with("step 7: the loss, first at the output of layer 1 is not finite;"),
        "{message}"
    );
    let after = trainer.adapter().values.f32().unwrap();
    assert!(
        before
            .iter()
            .zip(after)
            .enumerate()
            .all(|(i, (b, a))| i == at || b.to_bits() == a.to_bits())
    );
}

#[test]
fn a_gradient_that_is_not_finite_names_the_module_and_leaves_the_adapter_alone() {
    let config = models().remove(0);
    let mut trainer = trainer(&config);
    let before = trainer.adapter().values.f32().unwrap().to_vec();
    let modules = trainer.decoder().adapter.modules();
    let name = "model.layers.0.mlp.up_proj";
    let at = modules
        .iter()
        .find(|module| module.name == name)
        .unwrap()
        .pair
        .a;
    trainer.adapter_mut().grads.f32_mut().unwrap()[at] = f32::INFINITY;
    let error = trainer
        .step(&step(vec![batch(&[12], 1)]), 2, 1e-3)
        .unwrap_err();
    let message = error.to_string();
    let expected = format!("step 3: the gradient of {name}.lora_A.weight is not finite;");
    assert!(message.starts_with(&expected), "{message}");
    assert_eq!(before, trainer.adapter().values.f32().unwrap());
}
