//! Whole models on the CPU against Hugging Face transformers, PEFT and bitsandbytes (`tests/golden`), all six families.
//! Tolerances are those of `tests/golden/manifest.json`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::backend::cpu::Cpu;
use brightrun::data::Batch;
use brightrun::ops::{Linear, Ops, StepState};
use brightrun::store::quantized::QuantizePolicy;
use brightrun::tensor::Tensor;
use common::model::{Case, case_on, floats};
use common::{FAMILIES, Golden, SEVEN, golden, max_abs_diff, output, relative_l2, zeros};
use serde_json::Value;

const DELTANET: [&str; 5] = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "o_proj"];

const LOGITS: f64 = 2e-4;
const TOKEN_LOSS: f64 = 1e-4;
const HIDDEN: f64 = 2e-5;
const MEAN_LOSS: f64 = 1e-5;
const TRAJECTORY: f64 = 2e-5;
const GRAD_NORM: f64 = 1e-4;
const GRAD: f64 = 2e-4;
const GRAD_ABS: f64 = 2e-5;
/// Relative; bf16 keeps 8 bits (4e-3 per rounding), of which a loss and a norm average many.
const BF16: f64 = 6e-3;
const STEP5_DELTA: f64 = 5e-3;

fn case(family: &'static str, targets: &[&str], policy: QuantizePolicy, weight_decay: f64) -> Case {
    case_on(Box::new(Cpu::new()), family, targets, policy, weight_decay)
}

impl Case {
    /// Forward alone, each sequence by itself, compared with a forward file: losses, logits, hidden states.
    fn check_forward(&mut self, file: &str, expected: &Value) {
        let golden = self.file(file);
        let (mut loss_sum, mut targets) = (0.0, 0);
        for (index, batch) in self.sequences().into_iter().enumerate() {
            let (sum, count) = self.trainer.evaluate(std::slice::from_ref(&batch)).unwrap();
            loss_sum += sum;
            targets += count;
            self.check_sequence(&golden, index, &batch);
        }
        if let Some(expected) = expected["loss"].as_f64() {
            let diff = (loss_sum / targets as f64 - expected).abs();
            assert!(
                diff <= MEAN_LOSS,
                "{} {file}: mean loss off by {diff:e}",
                self.family
            );
        }
    }

    fn check_sequence(&self, golden: &Golden, index: usize, batch: &Batch) {
        let tokens = batch.input_ids.len();
        let acts = self.trainer.activations();
        let config = &self.trainer.decoder().config;
        let rows = |tensor: &Tensor, width: usize| tensor.f32().unwrap()[..tokens * width].to_vec();
        let mut checked = 0;
        for name in golden.names() {
            let Some(field) = name.strip_prefix(&format!("s{index}.")) else {
                continue;
            };
            let expected = golden.values(&name);
            let what = format!("{} {name}", self.family);
            checked += 1;
            if field == "token_loss" {
                let diff = max_abs_diff(&rows(&acts.token_loss, 1), &expected);
                assert!(diff <= TOKEN_LOSS, "{what}: {diff:e}");
            } else if field == "logits" || field == "logits_last" {
                let logits = self.logits(batch);
                let logits = &logits[logits.len() - expected.len()..];
                let diff = max_abs_diff(logits, &expected);
                assert!(diff <= LOGITS, "{what}: {diff:e}");
            } else {
                let layer = field.strip_prefix("layer");
                let found = if field == "embed" {
                    rows(acts.layer_input(0), config.hidden_size)
                } else if field == "final_norm" {
                    rows(acts.final_norm(), config.hidden_size)
                } else if let Some(layer) = layer.and_then(|l| l.strip_suffix(".router_logits")) {
                    let experts = config.moe.as_ref().unwrap().num_experts;
                    rows(acts.router_logits(layer.parse().unwrap()).unwrap(), experts)
                } else if let Some(layer) = layer.and_then(|l| l.parse::<usize>().ok()) {
                    rows(acts.layer_input(layer + 1), config.hidden_size)
                } else if let Some(layer) = layer.and_then(|l| l.strip_suffix(".mixer")) {
                    // What the mixer added to the residual stream.
                    let layer = layer.parse().unwrap();
                    let after = rows(acts.layer_middle(layer).unwrap(), config.hidden_size);
                    let before = rows(acts.layer_input(layer), config.hidden_size);
                    after
                        .iter()
                        .zip(&before)
                        .map(|(after, before)| after - before)
                        .collect()
                } else {
                    panic!("{what}: not a field this test knows")
                };
                let diff = relative_l2(&found, &expected);
                assert!(diff <= HIDDEN, "{what}: {diff:e}");
            }
        }
        assert!(checked > 0);
    }

    fn logits(&self, batch: &Batch) -> Vec<f32> {
        let decoder = self.trainer.decoder();
        let (vocab, hidden) = (decoder.config.vocab_size, decoder.config.hidden_size);
        let head = Linear {
            weight: decoder.head().clone(),
            bias: None,
            lora: None,
            out_features: vocab,
            in_features: hidden,
            f32_output: true,
        };
        let tokens = batch.input_ids.len();
        let state = StepState {
            batch: batch.clone(),
            ..StepState::default()
        };
        let (mut logits, mut xa, lora) =
            (output(&[tokens, vocab]), zeros(&[tokens, 0]), zeros(&[0]));
        let x = self.trainer.activations().final_norm();
        Cpu::new()
            .linear_forward(&mut [&mut logits], &mut xa, x, &[&head], &lora, &state)
            .unwrap();
        logits.f32().unwrap().to_vec()
    }

    fn check_grads(&mut self, file: &str, per_tensor: f64) {
        let golden = self.file(file);
        let batches = self.packed();
        self.trainer
            .adapter_mut()
            .grads
            .f32_mut()
            .unwrap()
            .fill(0.0);
        self.trainer.accumulate(&batches, 0).unwrap();
        let grads = self.trainer.adapter().grads.f32().unwrap().to_vec();
        for (name, range) in self.trainer.decoder().adapter.tensors() {
            let expected = golden.values(&format!("base_model.model.{name}"));
            let (relative, abs) = (
                relative_l2(&grads[range.clone()], &expected),
                max_abs_diff(&grads[range], &expected),
            );
            let what = format!("{} {file} {name}", self.family);
            assert!(
                relative <= per_tensor || abs <= GRAD_ABS * per_tensor,
                "{what}: {relative:e}"
            );
            assert!(abs <= GRAD_ABS * (per_tensor / GRAD), "{what}: {abs:e}");
        }
        self.trainer
            .adapter_mut()
            .grads
            .f32_mut()
            .unwrap()
            .fill(0.0);
    }

    /// Five AdamW steps on the packed sequences.
    fn check_training(&mut self, expected: &Value) {
        let batches = self.packed();
        let losses = floats(&expected["losses"]);
        let norms = floats(&expected["grad_norms_preclip"]);
        let what = self.family;
        for (step, norm) in norms.iter().enumerate() {
            let report = self.trainer.step(&batches, step as u64, 1e-3).unwrap();
            let diff = (report.loss - losses[step]).abs();
            assert!(
                diff <= TRAJECTORY,
                "{what} step {step}: loss off by {diff:e}"
            );
            let diff = (report.grad_norm - norm).abs() / norm;
            assert!(
                diff <= GRAD_NORM,
                "{what} step {step}: norm off by {diff:e}"
            );
        }
        let (sum, count) = self.trainer.evaluate(&batches.micro_batches).unwrap();
        let diff = (sum / count as f64 - losses[norms.len()]).abs();
        assert!(
            diff <= TRAJECTORY,
            "{what} after the last step: loss off by {diff:e}"
        );
    }

    /// Change of the adapter since `before` against the golden one, all tensors together.
    fn check_delta(&self, before: &str, after: &Golden) {
        let initial = self.file(&format!("{before}/adapter_model.safetensors"));
        let values = self.trainer.adapter().values.f32().unwrap();
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (name, range) in self.trainer.decoder().adapter.tensors() {
            let name = format!("base_model.model.{name}");
            let start = initial.values(&name);
            found.extend(values[range].iter().zip(&start).map(|(v, s)| v - s));
            expected.extend(after.values(&name).iter().zip(&start).map(|(v, s)| v - s));
        }
        let diff = relative_l2(&found, &expected);
        assert!(
            diff <= STEP5_DELTA,
            "{}: weight change off by {diff:e}",
            self.family
        );
    }
}

fn plain(family: &'static str, weight_decay: f64) -> Case {
    case(family, &SEVEN, QuantizePolicy::none(), weight_decay)
}

fn nf4(family: &'static str, modules: &[&str], double_quant: bool, weight_decay: f64) -> Case {
    let modules = modules.iter().map(|&module| module.to_owned()).collect();
    case(
        family,
        &SEVEN,
        QuantizePolicy::modules(modules, double_quant),
        weight_decay,
    )
}

#[test]
fn base_models_match_in_every_layer() {
    for family in FAMILIES {
        let mut case = plain(family, 0.0);
        let expected = case.json["base_forward"].clone();
        case.check_forward("base_forward.safetensors", &expected);
    }
}

#[test]
fn adapters_match_in_forward_and_gradients() {
    for family in FAMILIES {
        let mut case = plain(family, 0.0);
        case.load_adapter("adapter_init");
        let expected = case.json["lora_forward"].clone();
        case.check_forward("lora_forward.safetensors", &expected);
        case.check_grads("lora_grads.safetensors", GRAD);
    }
}

#[test]
fn five_steps_of_adamw_match() {
    for family in FAMILIES {
        let mut case = plain(family, 0.0);
        case.load_adapter("adapter_init");
        let expected = case.json["lora_train_wd0"].clone();
        case.check_training(&expected);
        let after = case.file("adapter_step5_wd0/adapter_model.safetensors");
        case.check_delta("adapter_init", &after);
    }
}

#[test]
fn five_steps_with_weight_decay_match() {
    for family in FAMILIES {
        let mut case = plain(family, 0.01);
        case.load_adapter("adapter_init");
        let expected = case.json["lora_train_wd0.01"].clone();
        case.check_training(&expected);
        let values = case.trainer.adapter().values.f32().unwrap();
        let norms = case.json["lora_final_wd0.01_norms"].as_object().unwrap();
        for (name, range) in case.trainer.decoder().adapter.tensors() {
            let norm = values[range]
                .iter()
                .map(|v| f64::from(*v).powi(2))
                .sum::<f64>()
                .sqrt();
            let expected = norms[&format!("base_model.model.{name}")].as_f64().unwrap();
            // A weight moves by at most 2 lr per step where its gradient is noise; norms are of order 1.
            assert!(
                (norm - expected).abs() <= 1e-4 * expected.max(1.0),
                "{family} {name}"
            );
        }
    }
}

#[test]
fn nf4_models_match_in_forward_gradients_and_training() {
    for family in FAMILIES {
        for (name, double_quant) in [("nf4", false), ("nf4dq", true)] {
            // The reference decays weights in the double-quantised run only.
            let weight_decay = if double_quant { 0.01 } else { 0.0 };
            let mut case = nf4(family, &SEVEN, double_quant, weight_decay);
            let expected = case.json[&format!("{name}_forward")].clone();
            case.check_forward(&format!("{name}_forward.safetensors"), &expected);
            case.load_adapter("adapter_init");
            if double_quant {
                case.check_grads("nf4dq_lora_grads.safetensors", GRAD);
            }
            let expected = case.json[&format!("{name}_lora_train")].clone();
            case.check_training(&expected);
        }
    }
}

#[test]
fn deltanet_adapters_match() {
    let mut case = case("qwen3_next", &DELTANET, QuantizePolicy::none(), 0.01);
    case.load_adapter("adapter_deltanet_init");
    case.check_grads("lora_deltanet_grads.safetensors", GRAD);
    let expected = case.json["lora_deltanet_train_wd0.01"].clone();
    case.check_training(&expected);
    let after = case.file("lora_deltanet_final_wd0.01.safetensors");
    case.check_delta("adapter_deltanet_init", &after);
}

#[test]
fn the_default_nf4_list_matches() {
    let policy = QuantizePolicy::defaults(true);
    let mut case = case("qwen3_next", &SEVEN, policy, 0.01);
    let path = golden("golden/qwen3_next/nf4dq_default.json");
    let json: Value = serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
    for (index, batch) in case.sequences().into_iter().enumerate() {
        case.trainer.evaluate(std::slice::from_ref(&batch)).unwrap();
        let expected = &json["forward"]["token_loss"][index];
        #[expect(clippy::cast_possible_truncation, reason = "the file holds f32 values")]
        let expected: Vec<f32> = floats(expected).iter().map(|value| *value as f32).collect();
        let found = &case.trainer.activations().token_loss.f32().unwrap()[..expected.len()];
        let diff = max_abs_diff(found, &expected);
        assert!(diff <= TOKEN_LOSS, "sequence {index}: {diff:e}");
    }
    case.load_adapter("adapter_init");
    // These gradients have an f32-against-f64 floor of 1e-4, so the goldens' own note sets 1e-3.
    case.check_grads("nf4dq_default_lora_grads.safetensors", 1e-3);
    case.check_training(&json["lora_train"]);
}

fn rounding() -> Box<dyn Ops> {
    Box::new(Cpu::with_bf16_rounding())
}

/// The mode that rounds to bf16 where a GPU stores bf16: everything stored is bf16, and what is trained stays close to f32.
#[test]
fn bf16_rounding_stays_within_the_noise_of_bf16() {
    for family in FAMILIES {
        let policy = || QuantizePolicy::modules(SEVEN.map(str::to_owned).to_vec(), true);
        let mut exact = nf4(family, &SEVEN, true, 0.0);
        let mut rounded = case_on(rounding(), family, &SEVEN, policy(), 0.0);
        let mut again = case_on(rounding(), family, &SEVEN, policy(), 0.0);
        for case in [&mut exact, &mut rounded, &mut again] {
            case.load_adapter("adapter_init");
        }
        let batches = exact.packed();
        let mut worst = 0.0_f64;
        for step in 0..5 {
            let expected = exact.trainer.step(&batches, step, 1e-3).unwrap();
            let found = rounded.trainer.step(&batches, step, 1e-3).unwrap();
            assert!(found == again.trainer.step(&batches, step, 1e-3).unwrap());
            worst = worst.max((found.loss - expected.loss).abs() / expected.loss);
            // Where experts are chosen, a rounded hidden state may choose another one: a jump in the gradient, not in the loss.
            if exact.trainer.decoder().config.moe.is_none() {
                worst =
                    worst.max((found.grad_norm - expected.grad_norm).abs() / expected.grad_norm);
            }
        }
        assert!(worst > 0.0, "{family}: nothing was rounded");
        assert!(worst <= BF16, "{family}: off by {worst:e}");
        let (acts, hidden) = (
            rounded.trainer.activations(),
            rounded.trainer.decoder().config.hidden_size,
        );
        let tokens = batches.micro_batches[0].input_ids.len();
        for layer in 0..=rounded.trainer.decoder().blocks.len() {
            let stored = &acts.layer_input(layer).f32().unwrap()[..tokens * hidden];
            let is_bf16 =
                |value: &f32| half::bf16::from_f32(*value).to_f32().to_bits() == value.to_bits();
            assert!(
                stored.iter().all(is_bf16),
                "{family}: input of layer {layer}"
            );
        }
    }
}
