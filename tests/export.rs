//! What comes out of a run: adapters for both generations of PEFT, merged checkpoints, and how each reads back in.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use brightrun::store::checkpoint::{float_dtype, widen_bytes};
use common::cli::{GOLDEN_SETTINGS, Project};
use common::{FAMILIES, Raw, copy_model, golden, rewrite, rewrite_json};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
}

/// A project whose `out/adapter` is the golden adapter of `family`, as if a run had ended with it.
fn trained(family: &str, base: &Path) -> Project {
    let project = Project::golden(family, GOLDEN_SETTINGS);
    use_base(&project, family, base);
    let out = project.path("out/adapter");
    fs_err::create_dir_all(&out).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = golden(&format!("golden/{family}/adapter_step5_wd0/{name}"));
        fs_err::copy(from, out.join(name)).unwrap();
    }
    project
}

fn use_base(project: &Project, family: &str, base: &Path) {
    let path = project.path("train.yml");
    let config = fs_err::read_to_string(&path).unwrap();
    let old = golden(&format!("models/{family}")).display().to_string();
    fs_err::write(&path, config.replace(&old, &base.display().to_string())).unwrap();
}

/// Loss of the first step, before any update.
fn first_loss(project: &Project, settings: &[&str]) -> f64 {
    let output = format!("output_dir={}", project.path("probe").display());
    let mut arguments = vec!["--set", "max_steps=1", "--set", &output];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    project.succeed("train", &arguments);
    let text = fs_err::read_to_string(project.path("probe/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    fs_err::remove_dir_all(project.path("probe")).unwrap();
    line["loss"].as_f64().unwrap()
}

/// One tensor per layer for all experts, as transformers 5 writes it.
fn fuse_experts(model: &Path, layers: usize, experts: usize) {
    rewrite(&model.join("model.safetensors"), |tensors| {
        for layer in 0..layers {
            let prefix = format!("model.layers.{layer}.mlp.experts");
            let mut stack = |projections: &[&str]| {
                let (mut bytes, mut rows, mut columns, mut dtype) = (Vec::new(), 0, 0, Dtype::F32);
                for expert in 0..experts {
                    rows = 0;
                    for projection in projections {
                        let name = format!("{prefix}.{expert}.{projection}.weight");
                        let raw: Raw = tensors.remove(&name).unwrap();
                        dtype = raw.0;
                        rows += raw.1[0];
                        columns = raw.1[1];
                        bytes.extend(raw.2);
                    }
                }
                (dtype, vec![experts, rows, columns], bytes)
            };
            let (gate_up, down) = (stack(&["gate_proj", "up_proj"]), stack(&["down_proj"]));
            tensors.insert(format!("{prefix}.gate_up_proj"), gate_up);
            tensors.insert(format!("{prefix}.down_proj"), down);
        }
    });
}

/// `config.json` as transformers 5 writes it.
fn new_style(model: &Path) {
    rewrite_json(&model.join("config.json"), |config| {
        let config = config.as_object_mut().unwrap();
        let dtype = config.remove("torch_dtype").unwrap();
        config.insert("dtype".to_owned(), dtype);
        let mut rope = match config.remove("rope_scaling").unwrap_or_default() {
            Value::Object(rope) => rope,
            _ => serde_json::Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        rope.insert(
            "rope_theta".to_owned(),
            config.remove("rope_theta").unwrap(),
        );
        if let Some(factor) = config.remove("partial_rotary_factor") {
            rope.insert("partial_rotary_factor".to_owned(), factor);
        }
        config.insert("rope_parameters".to_owned(), Value::Object(rope));
    });
}

/// All weights as f32.
fn widen(model: &Path) {
    for entry in fs_err::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|kind| kind != "safetensors") {
            continue;
        }
        rewrite(&path, |tensors| {
            for (dtype, _, bytes) in tensors.values_mut() {
                let wide = widen_bytes(float_dtype(*dtype).unwrap(), bytes);
                *bytes = wide.iter().flat_map(|value| value.to_le_bytes()).collect();
                *dtype = Dtype::F32;
            }
        });
    }
}

#[test]
fn a_merged_checkpoint_gives_the_loss_of_base_and_adapter() {
    // On a base of f32 files, so that the merged weights lose nothing but the last bit of f32. (A bf16 base rounds each
    // merged weight to 8 bits: these losses move by 1e-4 to 4e-3 then.)
    for family in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        copy_model(family, &base);
        widen(&base);
        let project = trained(family, &base);
        let said = project.succeed("export", &["--format", "merged"]);
        assert!(said.contains("out/merged from "), "{said}");
        let adapter = format!("init_adapter={}", project.path("out/adapter").display());
        let expected = first_loss(&project, &[&adapter]);
        let untrained = first_loss(&project, &[]);
        let merged = format!("base_model={}", project.path("out/merged").display());
        let found = first_loss(&project, &[&merged]);
        assert!(
            (found - expected).abs() <= 2e-6,
            "{family}: {found} against {expected}"
        );
        assert!(
            (untrained - expected).abs() > 0.1,
            "{family}: the adapter does nothing"
        );
        let said = project.fail(78, "export", &["--format", "merged"]);
        assert!(
            said.contains("is not empty; name a new directory"),
            "{said}"
        );
    }
}

#[test]
fn merging_changes_only_what_the_adapter_changes() {
    let project = trained("qwen3_next", &golden("models/qwen3_next"));
    project.succeed("export", &["--format", "merged"]);
    let read = |path: &Path| fs_err::read(path).unwrap();
    let old = read(&golden("models/qwen3_next/model.safetensors"));
    let new = read(&project.path("out/merged/model.safetensors"));
    let old = SafeTensors::deserialize(&old).unwrap();
    let new = SafeTensors::deserialize(&new).unwrap();
    assert_eq!(old.len(), new.len());
    let mut num_changed = 0;
    for (name, view) in old.tensors() {
        let merged = new.tensor(&name).unwrap();
        assert_eq!(
            (merged.shape(), merged.dtype()),
            (view.shape(), view.dtype()),
            "{name}"
        );
        let is_target = name.contains("_proj.weight")
            && !name.contains("linear_attn")
            && !name.starts_with("mtp");
        assert_eq!(merged.data() != view.data(), is_target, "{name}");
        num_changed += usize::from(is_target);
    }
    assert_eq!(num_changed, 112);
    for name in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert_eq!(
            read(&golden("models/qwen3_next").join(name)),
            read(&project.path("out/merged").join(name))
        );
    }
}

#[test]
fn a_file_beside_the_shards_is_not_merged() {
    // Hubs keep the original weights beside the converted ones (`consolidated.safetensors`).
    let project = trained("llama", &golden("models/llama"));
    let base = project.path("base");
    copy_model("llama", &base);
    fs_err::copy(
        base.join("model.safetensors"),
        base.join("consolidated.safetensors"),
    )
    .unwrap();
    use_base(&project, "llama", &base);
    project.succeed("export", &["--format", "merged"]);
    assert!(!project.path("out/merged/consolidated.safetensors").exists());
}

#[test]
fn a_shard_of_skipped_tensors_is_copied() {
    // The index, which is copied, names it: a merged checkpoint without it would not load.
    let family = "qwen3_next";
    let project = trained(family, &golden("models/qwen3_next"));
    let base = project.path("base");
    copy_model(family, &base);
    let (body, extra) = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    );
    fs_err::rename(base.join("model.safetensors"), base.join(body)).unwrap();
    fs_err::copy(base.join(body), base.join(extra)).unwrap();
    let is_extra = |name: &str| name.starts_with("mtp.");
    let mut weight_map = BTreeMap::new();
    for (file, keep_extra) in [(body, false), (extra, true)] {
        rewrite(&base.join(file), |tensors| {
            tensors.retain(|name, _| is_extra(name) == keep_extra);
            assert!(!tensors.is_empty());
            weight_map.extend(tensors.keys().map(|name| (name.clone(), file)));
        });
    }
    let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
    fs_err::write(base.join("model.safetensors.index.json"), index).unwrap();
    use_base(&project, family, &base);
    project.succeed("export", &["--format", "merged"]);
    let read = |path: &Path| fs_err::read(path.join(extra)).unwrap();
    let (old, new) = (read(&base), read(&project.path("out/merged")));
    let (old, new) = (
        SafeTensors::deserialize(&old).unwrap(),
        SafeTensors::deserialize(&new).unwrap(),
    );
    for (name, view) in old.tensors() {
        assert_eq!(new.tensor(&name).unwrap().data(), view.data(), "{name}");
    }
    // The merged checkpoint opens again.
    let merged = format!("base_model={}", project.path("out/merged").display());
    first_loss(&project, &[&merged]);
}

#[test]
fn both_generations_of_checkpoint_files_train_alike() {
    for family in ["llama", "mistral", "qwen3_next"] {
        let project = Project::golden(family, GOLDEN_SETTINGS);
        project.succeed("train", &[]);
        let expected = (project.losses(), project.adapter_bytes());
        let model = project.path("model");
        copy_model(family, &model);
        new_style(&model);
        if family == "qwen3_next" {
            fuse_experts(&model, 4, 8);
        }
        use_base(&project, family, &model);
        project.succeed("train", &["--set", "resume_from_checkpoint=none"]);
        assert!(
            (project.losses(), project.adapter_bytes()) == expected,
            "{family}: another spelling of the same model trains differently"
        );
        if family == "qwen3_next" {
            let qlora = [
                "--set",
                "adapter=qlora",
                "--set",
                "resume_from_checkpoint=none",
            ];
            project.succeed("train", &qlora);
            let fused = project.adapter_bytes();
            use_base(&project, family, &golden("models/qwen3_next"));
            let plain = Project::golden(family, GOLDEN_SETTINGS);
            plain.succeed("train", &qlora);
            assert!(
                fused == plain.adapter_bytes(),
                "fused experts quantise differently"
            );
        }
    }
}

#[test]
fn a_fused_checkpoint_merges_too() {
    let family = "qwen3_next";
    let project = trained(family, &golden("models/qwen3_next"));
    let model = project.path("model");
    copy_model(family, &model);
    fuse_experts(&model, 4, 8);
    use_base(&project, family, &model);
    project.succeed("export", &["--format", "merged"]);
    let plain = trained(family, &golden("models/qwen3_next"));
    plain.succeed("export", &["--format", "merged"]);
    fuse_experts(&plain.path("out/merged"), 4, 8);
    let tensors = |path: &Path| -> BTreeMap<String, Vec<u8>> {
        let bytes = fs_err::read(path.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.tensors()
            .into_iter()
            .map(|(name, view)| (name, view.data().to_vec()))
            .collect()
    };
    assert!(tensors(&project.path("out/merged")) == tensors(&plain.path("out/merged")));
}

#[test]
fn the_config_for_transformers_5_is_the_one_that_loads_there() {
    let project = trained("qwen3_next", &golden("models/qwen3_next"));
    project.succeed("export", &["--format", "peft5"]);
    let dir = project.path("out/adapter-peft5");
    let (ours, expected) = (
        json_of(&dir.join("adapter_config.json")),
        json_of(&golden(
            "golden/qwen3_next/adapter_config_for_transformers5.json",
        )),
    );
    for key in ours
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| *key != "base_model_name_or_path")
    {
        assert_eq!(ours[key], expected[key], "{key}");
    }
    assert_eq!(ours["base_model_name_or_path"], "qwen3_next");
    let weights = |path: &Path| fs_err::read(path.join("adapter_model.safetensors")).unwrap();
    assert_eq!(
        SafeTensors::deserialize(&weights(&dir)).unwrap().len(),
        SafeTensors::deserialize(&weights(&project.path("out/adapter")))
            .unwrap()
            .len()
    );
}

fn names(project: &Project) -> Vec<String> {
    let bytes = project.adapter_bytes();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.names().into_iter().map(ToOwned::to_owned).collect()
}

#[test]
fn moe_lora_chooses_the_experts_that_get_an_adapter() {
    let has = |names: &[String], part: &str| names.iter().any(|name| name.contains(part));
    let cases = [
        ("all", true, true, Value::Null),
        ("shared_only", false, true, json!(".*\\.mlp\\.experts\\..*")),
        (
            "none",
            false,
            false,
            json!(".*\\.mlp\\.(experts|shared_expert)\\..*"),
        ),
    ];
    for (value, experts, shared, exclude) in cases {
        let project = Project::golden("qwen3_next", GOLDEN_SETTINGS);
        let set = format!("moe_lora={value}");
        project.succeed("train", &["--set", "max_steps=1", "--set", &set]);
        let names = names(&project);
        assert_eq!(has(&names, ".mlp.experts."), experts, "{value}");
        assert_eq!(has(&names, ".mlp.shared_expert."), shared, "{value}");
        assert!(has(&names, ".self_attn.q_proj."), "{value}");
        let config = json_of(&project.path("out/adapter/adapter_config.json"));
        assert_eq!(config["exclude_modules"], exclude, "{value}");
    }
}

#[test]
fn experts_of_smaller_rank_are_padded_and_read_back_the_same() {
    for rslora in ["false", "true"] {
        let project = Project::golden("qwen3_moe", GOLDEN_SETTINGS);
        let rslora = format!("use_rslora={rslora}");
        let settings = [
            "--set",
            "lora_r=8",
            "--set",
            "lora_expert_r=2",
            "--set",
            &rslora,
        ];
        let steps = |number: &'static str| [settings.as_slice(), &["--set", number]].concat();
        project.succeed("train", &steps("max_steps=3"));
        let third = project.losses()[2].1;
        fs_err::remove_dir_all(project.path("out")).unwrap();
        project.succeed("train", &steps("max_steps=2"));
        let bytes = project.adapter_bytes();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            let rank = view.shape()[usize::from(name.contains("lora_B"))];
            assert_eq!(rank, 8, "{name}: PEFT has one rank for all");
        }
        let config = json_of(&project.path("out/adapter/adapter_config.json"));
        assert_eq!(config["r"], 8);
        fs_err::rename(project.path("out/adapter"), project.path("start")).unwrap();
        let start = format!("init_adapter={}", project.path("start").display());
        let mut all = settings
            .iter()
            .skip(1)
            .step_by(2)
            .copied()
            .collect::<Vec<_>>();
        all.push(&start);
        let found = first_loss(&project, &all);
        assert!(
            (found - third).abs() <= 1e-6,
            "{rslora}: {found} against {third}"
        );
    }
}

#[test]
fn an_adapter_names_its_base_by_id_and_never_by_path() {
    let name_of = |project: &Project| {
        json_of(&project.path("out/adapter/adapter_config.json"))["base_model_name_or_path"].clone()
    };
    let train = |project: &Project, more: &[&str]| {
        let arguments = [
            &[
                "--set",
                "max_steps=1",
                "--set",
                "resume_from_checkpoint=none",
            ],
            more,
        ]
        .concat();
        project.succeed("train", &arguments);
        name_of(project)
    };
    let project = Project::golden("llama", GOLDEN_SETTINGS);
    assert_eq!(train(&project, &[]), "llama");
    assert_eq!(
        train(&project, &["--set", "base_model_id=meta/llama"]),
        "meta/llama"
    );
    // A snapshot of the hub cache, by its path and by its id.
    let snapshot = project.path("hub/models--org--tiny-llama/snapshots/0123");
    copy_model("llama", &snapshot);
    fs_err::create_dir_all(project.path("hub/models--org--tiny-llama/refs")).unwrap();
    fs_err::write(
        project.path("hub/models--org--tiny-llama/refs/main"),
        "0123",
    )
    .unwrap();
    let path = format!("base_model={}", snapshot.display());
    assert_eq!(train(&project, &["--set", &path]), "org/tiny-llama");
    let mut by_id = project.command(
        "train",
        &["--set", "max_steps=1", "--set", "base_model=org/tiny-llama"],
    );
    by_id.args(["--set", "resume_from_checkpoint=none"]);
    by_id.env("HF_HUB_CACHE", project.path("hub"));
    assert!(by_id.output().unwrap().status.success());
    assert_eq!(name_of(&project), "org/tiny-llama");
}

#[test]
fn exports_the_checkpoint_that_is_named() {
    let project = Project::golden("llama", GOLDEN_SETTINGS);
    let keep = ["--set", "save_steps=1", "--set", "save_total_limit=5"];
    project.succeed("train", &keep);
    let bytes = |dir: &Path| fs_err::read(dir.join("adapter_model.safetensors")).unwrap();
    let first = project.path("out/checkpoints/step-1").display().to_string();
    let out = project.path("first").display().to_string();
    let said = project.succeed("export", &["--checkpoint", &first, "--output", &out]);
    assert!(said.contains("step-1"), "{said}");
    assert!(bytes(&project.path("first")) != bytes(&project.path("out/adapter")));
    project.succeed("export", &["--output", &out]);
    assert!(bytes(&project.path("first")) == bytes(&project.path("out/adapter")));
    let said = project.fail(66, "export", &["--set", "output_dir=/no/such/run"]);
    assert!(
        said.contains("trained adapter (run `brightrun train` first) not found"),
        "{said}"
    );
}
