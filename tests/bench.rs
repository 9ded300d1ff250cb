//! `brightrun-bench` as a user runs it, at small extents.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_brightrun-bench"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Runs it and reads what it wrote.
fn results(arguments: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("results.json");
    let mut all = arguments.to_vec();
    all.extend(["--steps", "2", "--json", path.to_str().unwrap()]);
    let output = bench(&all);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("device: "));
    serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
}

fn positive(value: &Value, name: &str) -> f64 {
    let number = value[name].as_f64();
    let number = number.unwrap_or_else(|| panic!("{name}: {value:#}"));
    assert!(number.is_finite() && number > 0.0, "{name} is {number}");
    number
}

fn devices() -> Vec<&'static str> {
    let mut devices = vec!["cpu"];
    if cfg!(feature = "emu") {
        devices.push("emu");
    }
    devices
}

#[test]
fn every_op_of_a_step_is_timed_against_the_measured_roofline() {
    for device in devices() {
        let found = results(&["kernels", "--device", device]);
        assert_eq!(found["small"], true);
        positive(&found, "bandwidth_bytes_per_s");
        positive(&found, "flops_per_s");
        let rows = found["rows"].as_array().unwrap();
        for op in [
            "linear_forward",
            "moe_gate_up_forward",
            "moe_down_backward",
            "attention_forward",
            "gated_delta_backward",
            "linear_cross_entropy",
            "adamw",
        ] {
            let row = rows.iter().find(|row| row["op"] == op);
            let row = row.unwrap_or_else(|| panic!("{device}: no {op} in {found:#}"));
            positive(row, "calls");
            positive(row, "bytes");
            let seconds = positive(row, "median_ms") / 1e3;
            let gb_per_s = positive(row, "bytes") / seconds / 1e9;
            assert!((positive(row, "gb_per_s") / gb_per_s - 1.0).abs() < 1e-6);
            let limit = (row["flops"].as_f64().unwrap() / found["flops_per_s"].as_f64().unwrap())
                .max(
                    row["bytes"].as_f64().unwrap()
                        / found["bandwidth_bytes_per_s"].as_f64().unwrap(),
                );
            assert!((positive(row, "share_of_roofline") / (limit / seconds) - 1.0).abs() < 1e-6);
        }
        let shape = |model: &str, op: &str| {
            let mut of_op = rows.iter().filter(|row| row["op"] == op);
            let row = of_op.find(|row| row["model"] == model).unwrap();
            (
                row["shape"].as_str().unwrap().to_owned(),
                row["goal_share"].clone(),
            )
        };
        let (nf4, goal) = shape("mistral-7b", "linear_forward");
        assert_eq!(nf4, "[64 -> 128+64+64] nf4 r16");
        assert_eq!(goal, 0.62);
        let (experts, _) = shape("qwen3-next-80b", "moe_gate_up_forward");
        assert_eq!(experts, "8 x [64 -> 64] nf4 r16");
        assert_eq!(shape("mistral-7b", "rms_norm_forward").1, Value::Null);
        let only = results(&["kernels", "--device", device, "--op", "rms_norm"]);
        assert_eq!(only["op"], "rms_norm");
        let rows = only["rows"].as_array().unwrap();
        assert!(!rows.is_empty());
        assert!(
            rows.iter()
                .all(|row| row["op"].as_str().unwrap().starts_with("rms_norm"))
        );
    }
}

#[test]
fn a_step_tells_speed_memory_and_where_the_time_goes() {
    for device in devices() {
        let found = results(&[
            "step", "--device", device, "--layers", "4", "--tokens", "48",
        ]);
        for name in [
            "median_ms",
            "tokens_per_s",
            "loss",
            "step_flops",
            "buffer_bytes",
            "num_parameters",
        ] {
            positive(&found, name);
        }
        assert_eq!(found["device_bytes"], Value::Null);
        assert_eq!(found["models"][0]["layers"], 4);
        let rows = found["rows"].as_array().unwrap();
        let sum: f64 = rows.iter().map(|row| row["share"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        let speed = 48.0 / (positive(&found, "median_ms") / 1e3);
        assert!((positive(&found, "tokens_per_s") / speed - 1.0).abs() < 1e-6);
    }
}

#[test]
fn an_op_that_only_one_model_has_is_timed_there() {
    let found = results(&["kernels", "--device", "cpu", "--op", "gated_delta"]);
    let rows = found["rows"].as_array().unwrap();
    assert!(!rows.is_empty());
    assert!(rows.iter().all(|row| row["model"] == "qwen3-next-80b"));
}

#[test]
fn the_ledger_of_a_step_is_that_of_its_settings() {
    let bytes = |more: &[&str]| {
        let mut arguments = vec!["step", "--device", "cpu"];
        arguments.extend(more);
        positive(&results(&arguments), "buffer_bytes")
    };
    let whole = bytes(&["--recompute", "none"]);
    assert!(bytes(&["--recompute", "full"]) < whole);
    assert!(bytes(&["--recompute", "none", "--lora-r", "32"]) > whole);
    assert!(bytes(&["--recompute", "none", "--moe-lora", "shared_only"]) < whole);
}

#[test]
fn what_is_not_there_is_told() {
    for (arguments, code, part) in [
        (&["step", "--tokens", "0"][..], 2, "--tokens"),
        (&["kernels", "--device", "gpu"], 2, "expected auto, cpu"),
        (
            &["step", "--device", "cpu", "--model", "gpt-5"],
            66,
            "qwen3-next-80b",
        ),
        (
            &["step", "--device", "cpu", "--layers", "99"],
            78,
            "--layers",
        ),
        (
            &["kernels", "--device", "cpu", "--op", "softmax"],
            78,
            "softmax",
        ),
        (&["step", "--device", "cpu", "--lora-r", "0"], 78, "lora_r"),
        (
            &[
                "step",
                "--device",
                "cpu",
                "--model",
                "mistral-7b,qwen2.5-0.5b",
            ],
            78,
            "--model",
        ),
        (
            &["step", "--device", "cpu", "--json", "/nowhere/at/all.json"],
            74,
            "/nowhere/at",
        ),
    ] {
        let output = bench(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}
