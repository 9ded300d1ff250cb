//! Golden runs through the command line: config in, `metrics.jsonl` and adapter out, against Hugging Face's.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use common::cli::{GOLDEN_SETTINGS, Project};
use common::{FAMILIES, Golden, golden, relative_l2};
use safetensors::SafeTensors;
use serde_json::Value;

const SEVEN: &str = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]";
/// The issue's own limit on losses; the adapter's is the manifest's.
const LOSS: f64 = 5e-5;
const STEP5_DELTA: f64 = 5e-3;

fn golden_json(family: &str) -> Value {
    let text = fs_err::read_to_string(golden(&format!("golden/{family}/golden.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn init_adapter(family: &str) -> String {
    format!(
        "init_adapter: {:?}\n",
        golden(&format!("golden/{family}/adapter_init"))
            .display()
            .to_string()
    )
}

fn check_losses(project: &Project, expected: &Value, what: &str) {
    let losses = project.losses();
    assert_eq!(losses.len(), 5, "{what}");
    for (index, (step, loss, norm, rate)) in losses.into_iter().enumerate() {
        assert_eq!((step, rate), (index as u64 + 1, 1e-3), "{what}");
        let diff = (loss - expected["losses"][index].as_f64().unwrap()).abs();
        assert!(diff <= LOSS, "{what} step {step}: loss off by {diff:e}");
        let expected = expected["grad_norms_preclip"][index].as_f64().unwrap();
        assert!(
            (norm - expected).abs() <= 1e-4 * expected,
            "{what} step {step}: norm {norm}, expected {expected}"
        );
    }
}

#[test]
fn five_epochs_give_the_golden_losses_and_adapter() {
    for family in FAMILIES {
        let project = Project::golden(
            family,
            &format!("{GOLDEN_SETTINGS}{}", init_adapter(family)),
        );
        project.succeed("train", &[]);
        check_losses(&project, &golden_json(family)["lora_train_wd0"], family);
        let bytes = project.adapter_bytes();
        let trained = SafeTensors::deserialize(&bytes).unwrap();
        let before = Golden::open(&format!(
            "golden/{family}/adapter_init/adapter_model.safetensors"
        ));
        let after = Golden::open(&format!(
            "golden/{family}/adapter_step5_wd0/adapter_model.safetensors"
        ));
        let names = after.names();
        assert_eq!(trained.names().len(), names.len(), "{family}");
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for name in names {
            let start = before.values(&name);
            let values = trained.tensor(&name).unwrap();
            let values = values
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            found.extend(values.zip(&start).map(|(value, start)| value - start));
            expected.extend(
                after
                    .values(&name)
                    .iter()
                    .zip(&start)
                    .map(|(value, start)| value - start),
            );
        }
        let diff = relative_l2(&found, &expected);
        assert!(
            diff <= STEP5_DELTA,
            "{family}: weight change off by {diff:e}"
        );
    }
}

#[test]
fn four_bit_bases_give_the_golden_losses() {
    for family in FAMILIES {
        for (key, double_quant, decay) in [
            ("nf4_lora_train", false, 0.0),
            ("nf4dq_lora_train", true, 0.01),
        ] {
            let settings = GOLDEN_SETTINGS
                .replace("adapter: lora\n", "adapter: qlora\n")
                .replace("weight_decay: 0\n", &format!("weight_decay: {decay}\n"));
            let settings = format!(
                "{settings}{}quantize_modules: {SEVEN}\nbnb_4bit_use_double_quant: {double_quant}\n",
                init_adapter(family)
            );
            let project = Project::golden(family, &settings);
            project.succeed("train", &[]);
            check_losses(
                &project,
                &golden_json(family)[key],
                &format!("{family} {key}"),
            );
        }
    }
}

#[test]
fn the_default_four_bit_list_gives_the_golden_losses() {
    let text = fs_err::read_to_string(golden("golden/qwen3_next/nf4dq_default.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let settings = GOLDEN_SETTINGS
        .replace("adapter: lora\n", "adapter: qlora\n")
        .replace("weight_decay: 0\n", "weight_decay: 0.01\n");
    let project = Project::golden(
        "qwen3_next",
        &format!("{settings}{}", init_adapter("qwen3_next")),
    );
    project.succeed("train", &[]);
    check_losses(&project, &expected["lora_train"], "nf4dq_default");
}

#[test]
fn adapters_have_pefts_names_shapes_and_settings() {
    for family in FAMILIES {
        let settings = GOLDEN_SETTINGS.replace(
            "adapter_dtype: f32\n",
            "max_steps: 1\nbase_model_id: org/model\n",
        );
        let project = Project::golden(family, &settings);
        project.succeed("train", &[]);
        let bytes = project.adapter_bytes();
        let trained = SafeTensors::deserialize(&bytes).unwrap();
        let names =
            fs_err::read_to_string(golden(&format!("golden/{family}/peft_names.json"))).unwrap();
        let names: std::collections::BTreeMap<String, Vec<usize>> =
            serde_json::from_str(&names).unwrap();
        assert_eq!(trained.names().len(), names.len(), "{family}");
        for (name, shape) in names {
            let view = trained.tensor(&name).unwrap();
            assert_eq!(
                (view.shape(), view.dtype()),
                (shape.as_slice(), safetensors::Dtype::BF16),
                "{family} {name}"
            );
        }
        let read = |path| -> Value {
            serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap()
        };
        let ours = read(project.path("out/adapter/adapter_config.json"));
        let pefts = read(golden(&format!(
            "golden/{family}/adapter_init/adapter_config.json"
        )));
        for key in ours.as_object().unwrap().keys() {
            let (found, expected) = (&ours[key], &pefts[key]);
            match key.as_str() {
                "base_model_name_or_path" => assert_eq!(found, "org/model"),
                "target_modules" => {
                    let sorted = |value: &Value| {
                        let mut names: Vec<String> = serde_json::from_value(value.clone()).unwrap();
                        names.sort();
                        names
                    };
                    assert_eq!(sorted(found), sorted(expected), "{family}");
                }
                _ => assert_eq!(found, expected, "{family} {key}"),
            }
        }
        for file in ["tokenizer.json", "tokenizer_config.json", "README.md"] {
            assert!(
                project.path("out/adapter").join(file).is_file(),
                "{family} {file}"
            );
        }
    }
}
