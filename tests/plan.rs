//! `brightrun plan`: what it says fits, and what a run then allocates.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use common::cli::Project;

/// A config on the true Qwen3-Next-80B, without weights and data.
fn large(dir: &Path, settings: &str) -> std::path::PathBuf {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/models/qwen3-next-80b");
    let path = dir.join("train.yml");
    let text = format!(
        "base_model: {:?}\ndatasets: [{{path: absent.jsonl}}]\noutput_dir: {:?}\nlora_r: 16\n{settings}",
        base.display().to_string(),
        dir.join("out").display().to_string(),
    );
    fs_err::write(&path, text).unwrap();
    path
}

fn plan(config: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_brightrun"))
        .arg("plan")
        .arg(config)
        .args(arguments)
        .output()
        .unwrap()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr))
    })
}

const FITS: &str =
    "sequence_len: 4096\nmicro_batch_size: 4\noptimizer: adamw_8bit\nlora_dtype: bf16\n";

#[test]
fn the_80b_with_expert_adapters_of_rank_16_fits_one_80_gb_card() {
    let dir = tempfile::tempdir().unwrap();
    let output = plan(&large(dir.path(), FITS), &["--gpu", "80GB", "--json"]);
    let plan = json(&output);
    assert_eq!(output.status.code(), Some(0), "{plan:#}");
    let groups = plan["groups"].as_object().unwrap();
    let sum = |of: fn(&str) -> bool| -> u64 {
        let chosen = groups.iter().filter(|(name, _)| of(name));
        chosen.map(|(_, bytes)| bytes.as_u64().unwrap()).sum()
    };
    // 42.11 GB by `4.127 bits x 78.996 B + 1.358 GB`, norms and tables in f32 beside it.
    let base = sum(|name| name.starts_with("base: "));
    assert!((40_000_000_000..46_000_000_000).contains(&base), "{base}");
    assert!(base.abs_diff(42_110_000_000) < 100_000_000, "{base}");
    assert_eq!(sum(|_| true), plan["num_bytes"].as_u64().unwrap());
    // 48 x 512 x 16 x 3 x (2048 + 512) of the experts, and those of attention and shared experts.
    let parameters = plan["num_parameters"].as_u64().unwrap();
    assert!(
        (3_019_898_880..3_080_000_000).contains(&parameters),
        "{parameters}"
    );
    assert_eq!(plan["fits"], true);
    assert_eq!(plan["capacity_tokens"], 16_384);
    assert!(plan["largest_capacity_tokens"].as_u64().unwrap() >= 16_384);
    // 2 x 3.56 B active weights forward, again for gradients and, less the head, again recomputed: 20.8 GFLOP a token; on top
    // the adapters, attention at 4,096 tokens and the delta rule.
    let flops = plan["step_flops"].as_f64().unwrap() / 16_384.0;
    assert!((22e9..26e9).contains(&flops), "{flops:e}");
}

#[test]
fn what_does_not_fit_exits_12_and_the_advice_makes_it_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = large(dir.path(), "sequence_len: 4096\nmicro_batch_size: 4\n");
    let output = plan(&path, &["--gpu", "80GB", "--json"]);
    assert_eq!(output.status.code(), Some(12));
    let found = json(&output);
    let settings = found["advice"]["settings"].as_array().unwrap();
    assert!(!settings.is_empty(), "{found:#}");
    let mut arguments = vec!["--gpu", "80GB", "--json"];
    for setting in settings {
        arguments.extend(["--set", setting.as_str().unwrap()]);
    }
    let advised = plan(&path, &arguments);
    assert_eq!(advised.status.code(), Some(0), "{arguments:?}");
    assert_eq!(json(&advised)["num_bytes"], found["advice"]["num_bytes"]);
    let text = plan(&path, &["--gpu", "80GB"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for part in [
        "does not fit",
        "it fits with --set",
        "predicted, not measured",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn the_longest_pass_that_fits_is_the_longest() {
    let dir = tempfile::tempdir().unwrap();
    let path = large(dir.path(), FITS);
    let longest = json(&plan(&path, &["--gpu", "80GB", "--json"]))["largest_capacity_tokens"]
        .as_u64()
        .unwrap();
    for (tokens, code) in [(longest, 0), (longest + 256, 12)] {
        // One sequence of all: as long a pass.
        let sequence_len = format!("sequence_len={tokens}");
        let arguments = [
            "--gpu",
            "80GB",
            "--set",
            &sequence_len,
            "--set",
            "micro_batch_size=1",
        ];
        let output = plan(&path, &arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(code), "{tokens}: {text}");
    }
}

#[test]
fn activations_are_recomputed_only_where_they_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = large(dir.path(), FITS);
    let with = |recompute: &str, tokens: usize| {
        let recompute = format!("recompute={recompute}");
        let sequence_len = format!("sequence_len={tokens}");
        let sets = [&recompute, &sequence_len, "micro_batch_size=1"];
        let mut arguments = vec!["--gpu", "80GB", "--json"];
        for set in sets {
            arguments.extend(["--set", set]);
        }
        json(&plan(&path, &arguments))
    };
    let kept = with("none", 256)["largest_capacity_tokens"]
        .as_u64()
        .unwrap();
    let kept = usize::try_from(kept).unwrap();
    assert!(kept >= 1024, "{kept}");
    for (tokens, recomputes) in [(kept, false), (kept + 256, true), (4096, true)] {
        let auto = with("auto", tokens);
        assert_eq!(auto["fits"], true, "{tokens}: {auto:#}");
        assert_eq!(auto["recompute"], recomputes, "{tokens}");
    }
    let longest = |recompute| with(recompute, 256)["largest_capacity_tokens"].clone();
    assert_eq!(longest("auto"), longest("full"));
}

#[test]
fn the_adapters_file_is_as_large_as_the_plan_says() {
    let project = Project::golden(
        "qwen3_moe",
        "adapter: lora\nlora_r: 6\nlora_expert_r: 2\nmax_steps: 1\ndevice: cpu\n",
    );
    let planned = json(&plan(&project.path("train.yml"), &["--json"]));
    project.succeed("train", &[]);
    let file = project.adapter_bytes();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap());
    let tensors = file.len() as u64 - 8 - header;
    assert_eq!(planned["adapter_bytes"], tensors);
}

#[test]
fn what_is_advised_keeps_the_targets_of_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let settings = format!("{FITS}recompute: full\ngradient_accumulation_steps: 2\n");
    let path = large(dir.path(), &settings);
    let found = json(&plan(&path, &["--gpu", "72GB", "--json"]));
    let advised = &found["advice"]["settings"];
    let expected = ["micro_batch_size=1", "gradient_accumulation_steps=8"];
    assert_eq!(*advised, serde_json::json!(expected), "{found:#}");
}

#[test]
fn a_gpu_whose_kernels_refuse_the_model_gets_its_ledger_and_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = large(dir.path(), FITS);
    for gpu in ["4090", "96GB", "rtx pro 6000", "24GB"] {
        let output = plan(&path, &["--gpu", gpu, "--json"]);
        assert_eq!(output.status.code(), Some(12), "{gpu}");
        let found = json(&output);
        assert!(found["num_bytes"].as_u64().unwrap() > 40_000_000_000);
        let refused = found["refused"].as_str().unwrap();
        assert!(refused.contains("shared memory"), "{refused}");
        assert_eq!(found["advice"]["settings"], serde_json::json!([]));
        assert_eq!(found["advice"]["gpu"], "H100-80GB");
    }
    for (gpu, part) in [("RTX", "RTX-5090"), ("A100", "A100-40GB"), ("0GB", "known")] {
        let output = plan(&path, &["--gpu", gpu]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{gpu}: {said}");
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn what_is_not_known_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = large(dir.path(), "");
    let output = plan(&path, &["--gpu", "V100"]);
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("`V100`") && text.contains("H100-80GB"),
        "{text}"
    );
    let output = plan(&path, &["--set", "base_model=absent/model"]);
    assert_eq!(output.status.code(), Some(66));
    // The CPU holds activations and adapter in f32.
    let output = plan(&path, &["--device", "cpu", "--set", "lora_dtype=bf16"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78));
    assert!(said.contains("lora_dtype"), "{said}");
    // Whether it fits is up to the machine.
    let output = plan(&path, &["--device", "cpu", "--json"]);
    let found = json(&output);
    let code = if found["fits"] == true { 0 } else { 12 };
    assert_eq!(output.status.code(), Some(code));
}

#[cfg(feature = "emu")]
mod emulated {
    use std::sync::Arc;

    use brightrun::backend::gpu::Gpu;
    use brightrun::backend::gpu::driver::Driver;
    use brightrun::backend::gpu::driver::emu::{Emu, Order};
    use brightrun::config::TrainConfig;
    use brightrun::config::model::ModelConfig;
    use brightrun::model::adapter::AdapterSettings;
    use brightrun::model::weights::{self, Placed};
    use brightrun::store::checkpoint::Checkpoint;
    use brightrun::store::quantized::{QuantizePolicy, QuantizedStore};
    use brightrun::train::memory::{Planner, Target};
    use brightrun::train::trainer::{OptimizerSettings, Trainer};

    use super::Project;
    use super::common::{FAMILIES, golden};

    const CAPACITY: usize = 100;
    const POSITIONS: usize = 40;

    /// The plan's ledger and that of the emulated device once it holds the run.
    fn check(family: &str, settings: &str) {
        let project = Project::golden(family, settings);
        let config = TrainConfig::load(&project.path("train.yml"), &[]).unwrap();
        let dir = golden(&format!("models/{family}"));
        let model = ModelConfig::from_file(dir.join("config.json")).unwrap();
        let emu = Emu::new(Order::Forward);
        let target = Target {
            info: emu.info(),
            num_bytes: 80_000_000_000,
        };
        let planner = Planner::new(&config, &model, POSITIONS).unwrap();
        let plan = planner.memory(&target, CAPACITY, POSITIONS).unwrap();

        let ops = Gpu::new(Arc::new(emu.clone())).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let mut store = QuantizedStore::new(checkpoint, QuantizePolicy::new(&config));
        let mut source = Placed {
            source: &mut store,
            ops: &ops,
        };
        let adapter = AdapterSettings::new(&config);
        let decoder = weights::load(&model, &mut source, adapter, POSITIONS).unwrap();
        let optimizer = OptimizerSettings::new(&config);
        let trainer = Trainer::new(
            Box::new(ops),
            decoder,
            optimizer,
            CAPACITY,
            config.recompute,
            config.seed,
        );
        let trainer = trainer.unwrap();
        let mut planned = plan.allocations.clone();
        planned.sort();
        assert_eq!(planned, emu.ledger(), "{family} {settings}");
        assert_eq!(plan.recompute, trainer.recomputes());
        let bytes: usize = emu.ledger().iter().map(|(_, bytes)| bytes).sum();
        let bytes = bytes as u64;
        assert_eq!(plan.num_bytes(), bytes);
        let fits = |free| planner.check(emu.info(), free, CAPACITY, POSITIONS);
        // With `recompute: auto` also where activations can just not be kept.
        fits(bytes).unwrap();
        let error = fits(bytes / 4).unwrap_err();
        assert_eq!(error.exit_code(), 12);
        assert!(error.to_string().contains("brightrun plan"), "{error}");
    }

    #[test]
    fn the_emulated_device_allocates_to_the_byte_what_the_plan_said() {
        for family in FAMILIES {
            check(family, "adapter: lora\nlora_r: 4\n");
            check(family, "adapter: qlora\nlora_r: 4\nrecompute: full\n");
            check(
                family,
                "adapter: qlora\nlora_r: 3\noptimizer: adamw_8bit\nlora_dtype: bf16\nbnb_4bit_use_double_quant: false\n",
            );
        }
    }
}
