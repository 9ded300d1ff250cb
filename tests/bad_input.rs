//! Bad input, as a user meets it: what each says, its exit code, and that nothing was written.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use std::path::Path;

use common::cli::Project;
use common::{copy_model, golden, rewrite, rewrite_json};
use serde_json::json;

const ROW: &str = r#"{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}"#;
const SETTINGS: &str = "adapter: lora\nlora_r: 4\nlora_alpha: 8\ndevice: cpu\n";

fn project(data: &str, settings: &str) -> Project {
    Project::new(
        &golden("models/llama"),
        data,
        &format!("{SETTINGS}{settings}"),
    )
}

/// `train` says `message` (after `error: `), exits with `code` and leaves no output directory.
#[track_caller]
fn refuses(project: &Project, code: i32, message: &str, arguments: &[&str]) {
    let said = project.fail(code, "train", arguments);
    let dir = project.dir.path().display().to_string();
    let said = said
        .replace(&dir, "DIR")
        .replace(&golden("").display().to_string(), "GOLDEN/");
    assert!(said.contains(message), "expected: {message}\nsaid: {said}");
    assert!(said.starts_with("error: "), "{said}");
    assert!(!project.path("out").exists(), "something was written");
}

#[test]
fn settings() {
    let cases = [
        (
            "lora_rnak: 8",
            "config DIR/train.yml: unknown key `lora_rnak`; did you mean `lora_r`?",
        ),
        (
            "something_else: 1",
            "unknown key `something_else`; the README lists the keys",
        ),
        (
            "learning_rate: fast",
            "`learning_rate` is `fast`, expected a number above 0 and at most 1",
        ),
        (
            "learning_rate: -1e-4",
            "`learning_rate` is `-0.0001`, expected a number above 0 and at most 1",
        ),
        ("learning_rate: .nan", "line 8 column 16: non-finite float"),
        (
            "num_epochs: 0",
            "`num_epochs` is `0`, expected a whole number of at least 1",
        ),
        (
            "num_epochs: 1.5",
            "`num_epochs` is `1.5`, expected a whole number of at least 1",
        ),
        (
            "lora_dropout: 1",
            "`lora_dropout` is `1`, expected at least 0 and below 1",
        ),
        (
            "lr_scheduler: polynomial",
            "`lr_scheduler` is `polynomial`, expected one of cosine, linear, constant",
        ),
        (
            "shuffle: perhaps",
            "`shuffle` is `perhaps`, expected true or false",
        ),
        (
            "device: cuda",
            "cannot be read as YAML: line 8 column 1: duplicate mapping key: device",
        ),
        (
            "lora_dtype: float",
            "`lora_dtype` is `float`, expected one of fp32, bf16",
        ),
        (
            "lora_dtype: bf16",
            "`lora_dtype` is `bf16`, which the CPU backend does not have; use `fp32`",
        ),
        (
            "quantize_modules: [q_proj]",
            "`quantize_modules` needs `adapter: qlora`",
        ),
        (
            "lora_rank: 8",
            "`lora_r` is given twice (also as `lora_rank`); keep one",
        ),
        (
            "lora_target_modules: []",
            "`lora_target_modules` has an empty name, or none",
        ),
        ("lora_target_modules: [q_prj]", "`q_prj`"),
        (
            "val_set_size: 5",
            "`val_set_size` is 5, which holds out 5 of 1 conversations and leaves none to train on",
        ),
        (
            "sequence_len: many",
            "`sequence_len` is `many`, expected a whole number of at least 2",
        ),
        (
            "resume_from_checkpoint: 3",
            "`resume_from_checkpoint` is `3`, expected auto, none or a path",
        ),
        (
            "micro_batch_size: [1",
            "config DIR/train.yml: cannot be read as YAML: line ",
        ),
    ];
    for (line, message) in cases {
        refuses(&project(ROW, line), 78, message, &[]);
    }
}

#[test]
fn several_problems_are_told_at_once() {
    let project = project(ROW, "lora_rnak: 8\nnum_epochs: 0\n");
    let said = project.fail(78, "train", &["--set", "seed=-1"]);
    for problem in ["`lora_rnak`", "`num_epochs`", "`seed`"] {
        assert!(said.contains(problem), "{problem}: {said}");
    }
}

#[test]
fn arguments() {
    let cases = [
        (
            "seed",
            "config --set: `seed` has no `=`, expected `key=value`",
        ),
        ("sed=3", "unknown key `sed`; did you mean `seed`?"),
        (
            "base_model=null",
            "`base_model` is missing, expected a hub id or a model directory",
        ),
        (
            "datasets=null",
            "`datasets` is missing, expected a list of `{path: data.jsonl}`",
        ),
        (
            "datasets=[{file: a}]",
            "`datasets[0]`: unknown key `file`; it takes `path` and `type`",
        ),
        (
            "datasets=[{path: a, type: csv}]",
            "`type` is `csv`, expected one of auto, pairs,",
        ),
        (
            "device=tpu",
            "`device` is `tpu`, expected one of auto, cpu, emu, cuda, cuda:N",
        ),
        ("output_dir=7", "`output_dir` is `7`, expected a text"),
    ];
    for (set, message) in cases {
        refuses(&project(ROW, ""), 78, message, &["--set", set]);
    }
}

#[test]
fn files_that_are_not_there() {
    let cases = [
        (
            "base_model=no/such-model",
            "config.json of base model `no/such-model` (give a directory, or download it into the hub cache first) not found",
        ),
        (
            "base_model=/no/such/dir",
            "config.json of base model `/no/such/dir` not found; tried /no/such/dir/config.json",
        ),
        (
            "datasets=/no/data.jsonl",
            "data set not found; tried /no/data.jsonl",
        ),
        (
            "init_adapter=/no/adapter",
            "`init_adapter` (a PEFT adapter directory) not found",
        ),
        (
            "chat_template=/no/template.jinja",
            "`chat_template` not found; tried /no/template.jinja",
        ),
        ("resume_from_checkpoint=/no/step-3", "/no/step-3"),
    ];
    let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    for (set, message) in cases {
        refuses(
            &project(&chat.to_string(), ""),
            66,
            message,
            &["--set", set],
        );
    }
    let project = project(ROW, "");
    fs_err::remove_file(project.path("train.yml")).unwrap();
    refuses(&project, 66, "config not found; tried DIR/train.yml", &[]);
}

#[test]
fn data_sets() {
    let cases = [
        ("", "no record can be trained on; the file has none"),
        ("{\"messages\": [", "line 1: no JSON"),
        ("[1, 2]", "not a JSON object"),
        (
            r#"{"foo": 1}"#,
            "line 1: no known format: its keys are `foo`; expected `messages`",
        ),
        (r#"{"messages": []}"#, "`messages` is empty"),
        (
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "no assistant turn to learn",
        ),
        (
            r#"{"messages": [{"role": "wizard", "content": "a"}]}"#,
            "`role` is `wizard`, expected system, user, assistant or tool",
        ),
        (
            r#"{"prompt": "a", "completion": null}"#,
            "`completion` is null",
        ),
        (r#"{"instruction": "a", "output": ""}"#, "`output` is empty"),
        (r#"{"text": 5}"#, "`text` is not a text"),
        (
            r#"{"text": "a", "messages": []}"#,
            "can be read as `messages` and as `text`; say which with `type` in `datasets`",
        ),
        (r#"{"input_ids": [], "labels": []}"#, "`input_ids` is empty"),
        (
            r#"{"input_ids": [1, 2], "labels": [1]}"#,
            "`labels` has 1 entries and `input_ids` 2; they must be as long",
        ),
        (
            r#"{"input_ids": [1, 2], "labels": [2, 2]}"#,
            "`labels` has 2 where `input_ids` has 1; a label is the token itself (not shifted) or -100",
        ),
        (
            r#"{"input_ids": [1, 288], "labels": [1, 288]}"#,
            "token id 288 is beyond the model's vocabulary of 288",
        ),
        (
            r#"{"input_ids": [1, -2]}"#,
            "`input_ids` has -2, expected ids from 0",
        ),
        (
            r#"{"input_ids": [1, 2], "labels": [1, -100]}"#,
            "has no token to learn after the first",
        ),
        (
            r#"{"current_user_input": "a", "target_response": null}"#,
            "`target_response` is null",
        ),
        (
            r#"{"conversation_id": "c", "turns": [{"role": "user"}]}"#,
            "`content` of a turn is missing",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}]}"#,
            "`content` has a part that is not text",
        ),
    ];
    for (data, message) in cases {
        refuses(&project(data, ""), 65, message, &[]);
    }
}

#[test]
fn templates_and_tokenizers() {
    let chat = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let case = |change: &dyn Fn(&Project, &Path)| {
        let project = project(&chat.to_string(), "");
        let model = project.path("model");
        copy_model("llama", &model);
        change(&project, &model);
        (project, format!("base_model={}", model.display()))
    };
    let (one, base) = case(&|_, model| {
        rewrite_json(&model.join("tokenizer_config.json"), |config| {
            config["chat_template"] = json!("{% for m in messages %}{{ m.content }}");
        });
    });
    refuses(&one, 65, "chat template: ", &["--set", &base]);
    let (one, base) = case(&|_, model| {
        rewrite_json(&model.join("tokenizer_config.json"), |config| {
            config.as_object_mut().unwrap().remove("chat_template");
        });
    });
    refuses(
        &one,
        66,
        "chat template of the model (a base model has none; set `chat_template` to a Jinja file, or to `chatml`) not found",
        &["--set", &base],
    );
    let (one, base) = case(&|_, model| {
        rewrite_json(&model.join("tokenizer_config.json"), |config| {
            config["chat_template"] = json!("{{ raise_exception('roles must alternate') }}");
        });
    });
    refuses(&one, 65, "roles must alternate", &["--set", &base]);
    let (one, base) = case(&|_, model| fs_err::write(model.join("tokenizer.json"), "{}").unwrap());
    refuses(
        &one,
        65,
        "DIR/model/tokenizer.json: is not a tokenizer",
        &["--set", &base],
    );
    let (one, base) = case(&|_, model| fs_err::remove_file(model.join("tokenizer.json")).unwrap());
    refuses(
        &one,
        66,
        "tokenizer (chat and text data need it; pre-tokenised data do not) not found; tried DIR/model/tokenizer.json",
        &["--set", &base],
    );
}

/// A project on a changed copy of a golden model.
fn changed(family: &str, settings: &str, change: impl FnOnce(&Path)) -> Project {
    let project = project(ROW, settings);
    let model = project.path("model");
    copy_model(family, &model);
    change(&model);
    let config = fs_err::read_to_string(project.path("train.yml")).unwrap();
    let (old, new) = (golden("models/llama"), model);
    let config = config.replace(&old.display().to_string(), &new.display().to_string());
    fs_err::write(project.path("train.yml"), config).unwrap();
    project
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00002-of-00006.safetensors";

#[test]
fn checkpoint_files() {
    let one = changed("llama", "", |model| {
        fs_err::remove_file(model.join(SINGLE)).unwrap();
    });
    refuses(
        &one,
        66,
        "model weights not found; tried DIR/model/model.safetensors",
        &[],
    );
    let one = changed("llama", "", |model| {
        let bytes = fs_err::read(model.join(SINGLE)).unwrap();
        fs_err::write(model.join(SINGLE), &bytes[..bytes.len() - 4]).unwrap();
    });
    refuses(&one, 65, "it may be truncated: download it again", &[]);
    let one = changed("llama", "", |model| {
        fs_err::write(model.join(SINGLE), b"abc").unwrap();
    });
    refuses(
        &one,
        65,
        "is 3 bytes long, too short for a safetensors file",
        &[],
    );
    let one = changed("llama", "", |model| {
        fs_err::write(model.join(SINGLE), [b'x'; 500]).unwrap();
    });
    refuses(
        &one,
        65,
        "DIR/model/model.safetensors: is not a whole safetensors file of 500 bytes",
        &[],
    );
    let one = changed("qwen3_moe", "", |model| {
        fs_err::remove_file(model.join(SHARD)).unwrap();
    });
    let message = "shard `model-00002-of-00006.safetensors` that DIR/model/model.safetensors.index.json names not found";
    refuses(&one, 66, message, &[]);
    let one = changed("qwen3_moe", "", |model| {
        rewrite_json(&model.join(INDEX), |index| {
            index["weight_map"]["model.norm.weight"] = json!("../other.safetensors");
        });
    });
    refuses(
        &one,
        65,
        "names shard `../other.safetensors`, which is not a plain file name",
        &[],
    );
    let one = changed("qwen3_moe", "", |model| {
        rewrite_json(&model.join(INDEX), |index| {
            index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00006.safetensors");
        });
    });
    let message = "says that tensor `model.norm.weight` is in `model-00001-of-00006.safetensors`, which does not hold it";
    refuses(&one, 65, message, &[]);
    let one = changed("qwen3_moe", "", |model| {
        let other = "model-00001-of-00006.safetensors";
        let mut double = None;
        rewrite(&model.join(SHARD), |tensors| {
            double = tensors
                .iter()
                .next()
                .map(|(name, raw)| (name.clone(), raw.clone()));
        });
        let (name, raw) = double.unwrap();
        rewrite(&model.join(other), |tensors| {
            tensors.insert(name, raw);
        });
    });
    refuses(&one, 65, "model-00001-of-00006.safetensors holds too", &[]);
    let one = changed("qwen3_moe", "", |model| {
        fs_err::write(model.join(INDEX), "[]").unwrap();
    });
    refuses(&one, 65, "is not a safetensors index", &[]);
}

#[test]
fn checkpoint_tensors() {
    const NAME: &str = "model.layers.1.self_attn.q_proj.weight";
    let change = |change: &dyn Fn(&mut std::collections::BTreeMap<String, common::Raw>)| {
        changed("llama", "", |model| {
            rewrite(&model.join(SINGLE), |tensors| change(tensors));
        })
    };
    let one = change(&|tensors| {
        let raw = tensors.remove(NAME).unwrap();
        tensors.insert("model.layers.1.self_attn.query.weight".to_owned(), raw);
    });
    let message = "DIR/model: has no tensor `model.layers.1.self_attn.q_proj.weight`, which config.json asks for; the closest \
        are `model.layers.0.self_attn.q_proj.weight` and";
    refuses(&one, 65, message, &[]);
    let one = change(&|tensors| tensors.get_mut(NAME).unwrap().1 = vec![32, 128]);
    let message = "tensor `model.layers.1.self_attn.q_proj.weight` has shape [32, 128], but config.json asks for [64, 64]";
    refuses(&one, 65, message, &[]);
    let one = change(&|tensors| tensors.get_mut(NAME).unwrap().0 = safetensors::Dtype::I32);
    refuses(
        &one,
        65,
        "is I32; weights must be F32, BF16 or F16 (an already quantised checkpoint cannot be the base)",
        &[],
    );
    let one = change(&|tensors| {
        let bias = (safetensors::Dtype::F32, vec![64], vec![0; 256]);
        tensors.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), bias);
    });
    let message = "tensor `model.layers.0.self_attn.q_proj.bias` of the checkpoint is not supported: the model that config.json \
        describes has no use for it";
    refuses(&one, 78, message, &[]);
    let one = changed("llama", "", |model| {
        rewrite(&model.join(SINGLE), |tensors| {
            tensors.get_mut(NAME).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    });
    // A quantised weight is read before training, so it is seen then.
    let said = one.fail(65, "train", &["--set", "adapter=qlora"]);
    assert!(
        said.contains("q_proj.weight: holds a NaN or infinite weight"),
        "{said}"
    );
}

#[test]
fn model_configs() {
    let cases = [
        (json!({"model_type": "gpt2"}), "model_type"),
        (
            json!({"hidden_act": "gelu"}),
            "`hidden_act: gelu` is not supported",
        ),
        (json!({"attention_bias": true}), "attention_bias"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "yarn",
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantised already",
        ),
    ];
    for (change, message) in cases {
        let one = changed("llama", "", |model| {
            rewrite_json(&model.join("config.json"), |config| {
                for (key, value) in change.as_object().unwrap() {
                    config[key] = value.clone();
                }
            });
        });
        refuses(&one, 78, message, &[]);
    }
    let one = changed("llama", "", |model| {
        fs_err::write(model.join("config.json"), "{").unwrap();
    });
    refuses(&one, 65, "DIR/model/config.json: no JSON", &[]);
}

#[test]
fn modules_to_quantise() {
    let named = |modules: &str| format!("quantize_modules=[{modules}]");
    let cases = [
        (
            "q_prj",
            "config quantize_modules: `q_prj` cannot be quantised: no matrix of this model is called that",
        ),
        (
            "lm_head",
            "`lm_head` cannot be quantised: embedding and head stay as stored",
        ),
        ("embed_tokens", "`embed_tokens` cannot be quantised"),
    ];
    for (modules, message) in cases {
        let arguments = ["--set", "adapter=qlora", "--set", &named(modules)];
        refuses(&project(ROW, ""), 78, message, &arguments);
    }
}

/// An adapter of the golden model, changed; its project starts from it.
fn from_adapter(change: impl FnOnce(&Path)) -> Project {
    let project = project(ROW, "");
    let dir = project.path("adapter");
    fs_err::create_dir_all(&dir).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = golden("golden/llama/adapter_init").join(name);
        fs_err::copy(from, dir.join(name)).unwrap();
    }
    change(&dir);
    let path = project.path("train.yml");
    let config = fs_err::read_to_string(&path).unwrap();
    fs_err::write(
        &path,
        format!("{config}init_adapter: {:?}\n", dir.display().to_string()),
    )
    .unwrap();
    project
}

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn adapters() {
    let weights = "adapter_model.safetensors";
    let one = from_adapter(|_| {});
    one.succeed("train", &["--set", "max_steps=1"]);

    let settings = [
        (
            json!({"peft_type": "IA3"}),
            "`peft_type` is `IA3`, expected `LORA`",
        ),
        (
            json!({"r": 8}),
            "`r` is 8, but the config's `lora_r` is 4; they must be equal",
        ),
        (
            json!({"lora_alpha": 16}),
            "`lora_alpha` is 16, but the config's is 8; they must be equal",
        ),
        (
            json!({"use_rslora": true}),
            "`use_rslora` is true, but the config's is false",
        ),
        (
            json!({"use_dora": true}),
            "`use_dora` is true, which is not supported",
        ),
        (
            json!({"rank_pattern": {"q_proj": 2}}),
            "`rank_pattern` is not empty, which is not supported",
        ),
    ];
    for (change, message) in settings {
        let one = from_adapter(|dir| {
            rewrite_json(&dir.join("adapter_config.json"), |config| {
                for (key, value) in change.as_object().unwrap() {
                    config[key] = value.clone();
                }
            });
        });
        refuses(&one, 65, message, &[]);
    }
    let one = from_adapter(|dir| fs_err::write(dir.join("adapter_config.json"), "").unwrap());
    refuses(&one, 65, "adapter_config.json: no JSON", &[]);
    let one = from_adapter(|dir| {
        let bytes = fs_err::read(dir.join(weights)).unwrap();
        fs_err::write(dir.join(weights), &bytes[..1000]).unwrap();
    });
    refuses(&one, 65, "is no whole safetensors file", &[]);
    let one = from_adapter(|dir| {
        rewrite(&dir.join(weights), |tensors| {
            tensors.remove(A).unwrap();
        });
    });
    refuses(&one, 65, &format!("has no tensor `{A}`"), &[]);
    let one = from_adapter(|dir| {
        rewrite(&dir.join(weights), |tensors| {
            tensors.get_mut(A).unwrap().1 = vec![64, 4];
        });
    });
    refuses(
        &one,
        65,
        &format!("tensor `{A}` has shape [64, 4], expected [4, 64]"),
        &[],
    );
    let one = from_adapter(|dir| {
        rewrite(&dir.join(weights), |tensors| {
            tensors.get_mut(A).unwrap().2[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        });
    });
    refuses(
        &one,
        65,
        "the pair of `model.layers.0.self_attn.q_proj` has a value that is not finite",
        &[],
    );
    let one = from_adapter(|_| {});
    let arguments = ["--set", "lora_target_modules=[q_proj]"];
    refuses(
        &one,
        65,
        "that this run does not train; make `lora_target_modules` and `moe_lora` those of the adapter",
        &arguments,
    );
}

#[test]
fn a_run_that_another_run_writes_to() {
    use rustix::fs::{FlockOperation, flock};
    let project = project(ROW, "");
    fs_err::create_dir_all(project.path("out")).unwrap();
    let lock = fs_err::File::create(project.path("out/.lock")).unwrap();
    flock(lock.file(), FlockOperation::LockExclusive).unwrap();
    let said = project.fail(78, "train", &[]);
    assert!(
        said.contains("is in use by another run; wait for it or name another directory"),
        "{said}"
    );
}
