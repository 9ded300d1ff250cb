//! Whole models on the emulated device: the golden families trained by the very kernels and launchers that run on a GPU.
//!
//! Activations are bf16 there, so results are held against the goldens with what bf16 costs, and against a CPU run whose
//! activations are rounded to bf16 at the same points.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use std::sync::Arc;

use brightrun::backend::cpu::Cpu;
use brightrun::backend::gpu::Gpu;
use brightrun::backend::gpu::driver::emu::{Emu, Order};
use brightrun::data::Batch;
use brightrun::ops::Ops;
use brightrun::store::quantized::QuantizePolicy;
use common::model::{Case, case_on, floats};
use common::{FAMILIES, SEVEN, golden, relative_l2};
use serde_json::Value;

/// Relative, of the mean loss of a step.
const LOSS: f64 = 0.01;
/// Relative L2 of all LoRA gradients together, for models without a router.
const GRADS: f64 = 3e-2;

fn emu() -> Box<dyn Ops> {
    Box::new(Gpu::new(Arc::new(Emu::new(Order::Forward))).unwrap())
}

fn rounding_cpu() -> Box<dyn Ops> {
    Box::new(Cpu::with_bf16_rounding())
}

fn nf4(ops: Box<dyn Ops>, family: &'static str) -> Case {
    let policy = QuantizePolicy::modules(SEVEN.map(str::to_owned).to_vec(), true);
    case_on(ops, family, &SEVEN, policy, 0.0)
}

fn plain(ops: Box<dyn Ops>, family: &'static str) -> Case {
    case_on(ops, family, &SEVEN, QuantizePolicy::none(), 0.0)
}

/// Five steps of `AdamW` from the golden adapter stay within 1 % of the golden losses.
fn check_losses(mut case: Case, expected: &Value) {
    case.load_adapter("adapter_init");
    let batches = case.packed();
    let expected = floats(&expected["losses"]);
    for (step, expected) in expected.iter().take(5).enumerate() {
        let report = case.trainer.step(&batches, step as u64, 1e-3).unwrap();
        let off = (report.loss - expected).abs() / expected;
        assert!(off <= LOSS, "{} step {step}: off by {off:e}", case.family);
    }
}

/// All LoRA gradients together, against the golden ones: their relative L2 error.
fn gradient_error(mut case: Case, file: &str) -> f64 {
    case.load_adapter("adapter_init");
    let batches = case.packed();
    case.trainer.accumulate(&batches, 0).unwrap();
    let grads = case.trainer.adapter().grads.to_f32_vec().unwrap();
    let golden = case.file(file);
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for (name, range) in case.trainer.decoder().adapter.tensors() {
        found.extend_from_slice(&grads[range]);
        expected.extend(golden.values(&format!("base_model.model.{name}")));
    }
    relative_l2(&found, &expected)
}

/// Models without a router keep a fixed limit; where bf16 can flip a choice of experts, twice the error that rounding
/// activations to bf16 makes on the CPU.
fn check_gradients(family: &'static str, make: fn(Box<dyn Ops>, &'static str) -> Case, file: &str) {
    let case = make(emu(), family);
    let has_router = case.trainer.decoder().config.moe.is_some();
    let error = gradient_error(case, file);
    let limit = if has_router {
        2.0 * gradient_error(make(rounding_cpu(), family), file)
    } else {
        GRADS
    };
    assert!(
        error <= limit,
        "{family} {file}: {error:e}, limit {limit:e}"
    );
}

#[test]
fn five_steps_stay_within_one_percent_of_the_golden_losses() {
    for family in FAMILIES {
        let case = plain(emu(), family);
        let expected = case.json["lora_train_wd0"].clone();
        check_losses(case, &expected);
    }
}

#[test]
fn five_steps_in_four_bits_stay_within_one_percent_of_the_golden_losses() {
    for family in FAMILIES {
        let case = nf4(emu(), family);
        let expected = case.json["nf4dq_lora_train"].clone();
        check_losses(case, &expected);
    }
}

fn default_nf4(ops: Box<dyn Ops>, family: &'static str) -> Case {
    case_on(ops, family, &SEVEN, QuantizePolicy::defaults(true), 0.01)
}

#[test]
fn the_default_four_bit_list_trains_and_its_gradients_match() {
    let path = golden("golden/qwen3_next/nf4dq_default.json");
    let json: Value = serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
    check_losses(default_nf4(emu(), "qwen3_next"), &json["lora_train"]);
    check_gradients(
        "qwen3_next",
        default_nf4,
        "nf4dq_default_lora_grads.safetensors",
    );
}

#[test]
fn adapter_gradients_are_within_the_noise_of_bf16() {
    for family in FAMILIES {
        check_gradients(family, plain, "lora_grads.safetensors");
        check_gradients(family, nf4, "nf4dq_lora_grads.safetensors");
    }
}

#[test]
fn reruns_and_every_thread_order_give_the_same_bits() {
    let run = |order: Order| {
        let ops = Box::new(Gpu::new(Arc::new(Emu::new(order))).unwrap());
        let mut case = nf4(ops, "qwen3_next");
        case.load_adapter("adapter_init");
        let batches = case.packed();
        let reports: Vec<_> = (0..2)
            .map(|step| case.trainer.step(&batches, step, 1e-3).unwrap())
            .collect();
        (reports, case.trainer.adapter().values.to_f32_vec().unwrap())
    };
    let first = run(Order::Forward);
    assert!(first == run(Order::Forward));
    assert!(first == run(Order::Reversed));
    assert!(first == run(Order::Shuffled(3)));
}

/// A replayed recording runs no launcher: the batch itself is refused.
#[test]
fn a_batch_beyond_the_tables_is_refused_also_where_the_step_is_replayed() {
    let mut case = plain(emu(), "qwen3");
    let good = case.packed();
    case.trainer.step(&good, 0, 1e-3).unwrap();
    let vocab_size = u32::try_from(case.trainer.decoder().config.vocab_size).unwrap();
    let change = |change: fn(&mut Batch, u32)| {
        let mut bad = good.clone();
        change(&mut bad.micro_batches[0], vocab_size);
        bad
    };
    for (bad, tensor) in [
        (
            change(|batch, vocab| batch.input_ids[3] = vocab),
            "input_ids",
        ),
        (
            change(|batch, vocab| batch.target_ids[3] = vocab.cast_signed()),
            "target_ids",
        ),
        (
            change(|batch, _| batch.position_ids[3] = 1 << 20),
            "position_ids",
        ),
    ] {
        let error = case.trainer.step(&bad, 1, 1e-3).unwrap_err().to_string();
        assert!(
            error.contains("load_batch") && error.contains(tensor),
            "{error}"
        );
    }
    case.trainer.step(&good, 1, 1e-3).unwrap();
}
