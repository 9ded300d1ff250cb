//! A job's input: what is accepted, what is refused and how it is told, and the run it becomes.
#![cfg(feature = "worker")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]
#![allow(clippy::float_cmp, reason = "settings are kept to the bit")]

mod common;

use std::path::{Path, PathBuf};

use brightrun::config::{
    AdapterDType, AdapterKind, Device, Env, LrScheduler, MoeLora, Optimizer, Recompute, TrainConfig,
};
use brightrun::error::Error;
use brightrun::plan::{Place, parse as gpu};
use brightrun::train::StopFlag;
use brightrun::train::events::Event;
use brightrun::train::memory::CONTEXT_BYTES;
use brightrun::worker::fit::fit;
use brightrun::worker::job::{Job, JobError};
use common::golden;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.SECRET";

/// What the application sends today.
fn live() -> Value {
    json!({
        "job_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
        "dataset_url": format!("https://ref.supabase.co/storage/v1/object/sign/training-files/f/training.jsonl?token={TOKEN}"),
        "hyperparameters": {
            "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
            "learning_rate": 0.0001, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.05
        },
        "gpu_config": {"type": "NVIDIA A40", "count": 1}
    })
}

/// `live` with `change`.
fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut input = live();
    change(&mut input);
    input
}

#[track_caller]
fn job(input: &Value) -> Job {
    Job::parse("runpod-1", input).unwrap()
}

#[track_caller]
fn refused(input: &Value) -> JobError {
    Job::parse("runpod-1", input).unwrap_err()
}

/// `hyperparameters.key: value` is refused with these words.
#[track_caller]
fn refused_for(key: &str, value: impl Into<Value>, words: &[&str]) {
    let value = value.into();
    let error = refused(&changed(|input| input["hyperparameters"][key] = value));
    assert_eq!(error.problems.len(), 1, "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("`hyperparameters.{key}`")), "{text}");
    for word in words {
        assert!(text.contains(word), "{text}");
    }
}

#[track_caller]
fn config_of(job: &Job) -> TrainConfig {
    let paths = ["/models/m", "/tmp/data.jsonl", "/tmp/out"].map(Path::new);
    job.train_config(paths[0], paths[1], paths[2], &Map::new())
        .unwrap()
}

#[test]
fn what_the_application_sends_becomes_the_run_it_means() {
    let job = job(&live());
    assert_eq!(job.id, "7c9e6679-7425-40de-944b-e07fc1f90ae7");
    assert_eq!(job.base_model, "mistralai/Mistral-7B-Instruct-v0.2");
    assert!(job.dataset_url.secret().ends_with(TOKEN));
    assert_eq!(job.callback_url, None);
    assert_eq!(job.gpu.kind.as_deref(), Some("NVIDIA A40"));
    assert_eq!(job.gpu.count, Some(1));
    assert_eq!(job.warnings, Vec::<String>::new());
    let config = config_of(&job);
    assert_eq!(config.base_model, "/models/m");
    assert_eq!(
        config.base_model_id.as_deref(),
        Some("mistralai/Mistral-7B-Instruct-v0.2")
    );
    assert_eq!(config.datasets[0].path, PathBuf::from("/tmp/data.jsonl"));
    assert_eq!(config.output_dir, PathBuf::from("/tmp/out"));
    // What the job says.
    assert_eq!((config.learning_rate, config.num_epochs), (1e-4, 3));
    assert_eq!(
        (config.micro_batch_size, config.gradient_accumulation_steps),
        (4, 1)
    );
    assert_eq!(
        (config.lora_r, config.lora_alpha, config.lora_dropout),
        (16, 32.0, 0.05)
    );
    // What it does not say is as it always was, but for bf16, the length and the loss on answers alone.
    assert_eq!(config.adapter, AdapterKind::Qlora);
    assert!(config.bnb_4bit_use_double_quant);
    let seven = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    assert_eq!(config.lora_target_modules, seven);
    assert_eq!(config.lr_scheduler, LrScheduler::Cosine);
    assert_eq!((config.warmup_ratio, config.warmup_steps), (0.1, None));
    assert_eq!(config.optimizer, Optimizer::Adamw);
    assert_eq!(
        (config.max_grad_norm, config.weight_decay, config.seed),
        (1.0, 0.0, 42)
    );
    assert_eq!(config.adapter_dtype, AdapterDType::Bf16);
    assert_eq!(config.sequence_len, 4096);
    assert!(!config.train_on_inputs);
    assert_eq!(config.val_set_size, 0.0);
}

#[test]
fn both_spellings_mean_the_same() {
    let legacy = json!({
        "job_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
        "dataset_url": live()["dataset_url"],
        "callback_url": "https://ref.supabase.co/functions/v1/training-callback",
        "hyperparameters": {
            "base_model": "mistralai/Mistral-7B-Instruct-v0.2",
            "learning_rate": "1e-4", "batch_size": "4", "num_epochs": "3", "lora_rank": 16.0, "lora_alpha": "32",
            "lora_dropout": "0.05"
        },
        "gpu_config": {"gpu_type": "A100-80GB", "num_gpus": "2", "gpu_memory_gb": 80, "cost_per_gpu_hour": "3.5"}
    });
    let job = job(&legacy);
    assert_eq!(config_of(&job), config_of(&self::job(&live())));
    assert_eq!(job.gpu.kind.as_deref(), Some("A100-80GB"));
    assert_eq!((job.gpu.count, job.gpu.memory_gb), (Some(2), Some(80.0)));
    assert_eq!(job.gpu.cost_per_gpu_hour, Some(3.5));
    assert!(job.callback_url.is_some());
    let more = changed(|input| {
        let own = &mut input["hyperparameters"];
        own["max_seq_length"] = json!(2048);
        own["warmup_steps"] = json!("5");
        own["weight_decay"] = json!(0.01);
        own["seed"] = json!(7);
        own["train_on_inputs"] = json!(true);
        own["fold_conversations"] = json!(false);
        own["moe_lora"] = json!("shared_only");
        own["lora_target_modules"] = json!(["q_proj", "v_proj"]);
        own["val_set_size"] = json!(0.1);
        own["adapter_dtype"] = json!("f16");
        own["optimizer"] = json!("adamw_bnb_8bit");
    });
    let config = config_of(&self::job(&more));
    assert_eq!(
        (config.sequence_len, config.warmup_steps, config.seed),
        (2048, Some(5), 7)
    );
    assert_eq!((config.weight_decay, config.val_set_size), (0.01, 0.1));
    assert!(config.train_on_inputs && !config.fold_conversations);
    assert_eq!(config.moe_lora, MoeLora::SharedOnly);
    assert_eq!(config.lora_target_modules, ["q_proj", "v_proj"]);
    assert_eq!(config.adapter_dtype, AdapterDType::F16);
    assert_eq!(config.optimizer, Optimizer::Adamw8bit);
}

#[test]
fn two_spellings_of_one_thing_must_agree() {
    let with = |epochs: Value| changed(|input| input["hyperparameters"]["num_epochs"] = epochs);
    for same in [json!(3), json!("3"), json!(3.0), Value::Null] {
        assert_eq!(config_of(&job(&with(same))).num_epochs, 3);
    }
    let text = refused(&with(json!(5))).to_string();
    for word in [
        "`hyperparameters.epochs` is `3`",
        "`hyperparameters.num_epochs` is `5`",
        "keep one",
    ] {
        assert!(text.contains(word), "{text}");
    }
    let elsewhere = changed(|input| input["config"] = json!({"lora_r": 8}));
    let text = refused(&elsewhere).to_string();
    assert!(
        text.contains("`hyperparameters.rank`") && text.contains("`config.lora_r`"),
        "{text}"
    );
}

#[test]
fn every_problem_is_told_at_once_by_the_name_that_the_job_uses() {
    let input = json!({
        "job_id": "../../etc",
        "dataset_url": "ref.supabase.co/f?token=SECRET",
        "hyperparameters": {
            "base_model": "/workspace/models/x", "learning_rate": 1, "batch_size": 0, "epochs": 2.5, "rank": "many",
            "alpha": 0, "dropout": 1.0, "max_seq_length": -1, "moe_lora": "some"
        },
        "config": {"lora_rr": 8, "output_dir": "/"},
    });
    let error = refused(&input);
    let text = error.to_string();
    for word in [
        "`job_id` is `../../etc`",
        "`dataset_url` is `ref.supabase.co/f?...`, which has no scheme; expected `https://...`",
        "`hyperparameters.base_model` is `/workspace/models/x`, a path; expected a hub id",
        "`hyperparameters.learning_rate` is `1`, expected a number above 0 and at most 0.01",
        "`hyperparameters.batch_size` is `0`, expected a whole number from 1 to 64",
        "`hyperparameters.epochs` is `2.5`, expected a whole number from 1 to 20",
        "`hyperparameters.rank` is `many`, expected a whole number from 1 to 256",
        "`hyperparameters.alpha` is `0`, expected a number above 0",
        "`hyperparameters.dropout` is `1.0`, expected at least 0 and below 1",
        "`hyperparameters.max_seq_length`: `sequence_len` is `-1`",
        "`hyperparameters.moe_lora`: `moe_lora` is `some`, expected one of all, shared_only, none",
        "unknown key `lora_rr`; did you mean `lora_r`?",
        "`config.output_dir` is not a job's to set; the worker chooses it",
    ] {
        assert!(text.contains(word), "{word}\n{text}");
    }
    assert_eq!(error.problems.len(), 13, "{text}");
    assert!(!text.contains("SECRET"), "{text}");
    assert!(matches!(Error::from(error), Error::Config { .. }));
}

#[test]
fn ranges_hold_at_their_ends() {
    let accepts = |key: &str, value: Value| {
        let input = changed(|input| {
            input["hyperparameters"][key] = value.clone();
        });
        job(&input);
    };
    for value in [json!(1e-2), json!(1e-7)] {
        accepts("learning_rate", value);
    }
    for value in [
        json!(0),
        json!(-1e-4),
        json!(0.0101),
        json!("nan"),
        json!("inf"),
        json!(true),
        json!([]),
    ] {
        refused_for("learning_rate", value, &["at most 0.01"]);
    }
    for (key, least, most) in [("batch_size", 1, 64), ("epochs", 1, 20), ("rank", 1, 256)] {
        accepts(key, json!(least));
        accepts(key, json!(most));
        refused_for(key, least - 1, &["whole number"]);
        refused_for(key, most + 1, &["whole number"]);
        refused_for(key, 1.5, &["whole number"]);
        refused_for(key, "", &["whole number"]);
    }
    accepts("dropout", json!(0));
    refused_for("dropout", -0.1, &["at least 0 and below 1"]);
    refused_for("warmup_ratio", 1.5, &["at least 0 and at most 1"]);
}

#[test]
fn what_is_unusual_is_told_and_run() {
    let warnings = |change: fn(&mut Value)| job(&changed(change)).warnings.join("\n");
    let rank = warnings(|input| input["hyperparameters"]["rank"] = json!(32));
    assert!(
        rank.contains("rank 32") && rank.contains("--max-lora-rank 32"),
        "{rank}"
    );
    for rate in [2e-3, 5e-6] {
        let input = changed(|input| input["hyperparameters"]["learning_rate"] = json!(rate));
        let text = job(&input).warnings.join("\n");
        assert!(text.contains("outside the usual 1e-5 to 1e-3"), "{text}");
    }
    let usual =
        |rate: f64| changed(|input| input["hyperparameters"]["learning_rate"] = json!(rate));
    assert!(job(&usual(1e-3)).warnings.is_empty() && job(&usual(1e-5)).warnings.is_empty());
    // What is said of the hardware keeps nothing from running.
    let gpu = job(&changed(|input| {
        input["gpu_config"] = json!({"type": 3, "count": 99, "cost_per_gpu_hour": "free"});
    }));
    assert_eq!(gpu.gpu, brightrun::worker::job::GpuRequest::default());
    assert_eq!(gpu.warnings.len(), 3, "{:?}", gpu.warnings);
    let two = warnings(|input| input["gpu_config"]["count"] = json!(2));
    assert!(two.contains("asks for 2 GPUs; a run uses one"), "{two}");
}

#[test]
fn unknown_keys_are_kept_and_told_by_path() {
    let input = changed(|input| {
        input["user_id"] = json!("u1");
        input["learning_rate"] = json!(0.001);
        input["hyperparameters"]["warmup_step"] = json!(5);
        input["hyperparameters"]["hf_token"] = json!("hf_SECRET");
        input["gpu_config"]["region"] = json!("US");
    });
    let job = job(&input);
    let mut paths: Vec<&str> = job
        .unknown
        .iter()
        .map(|unknown| unknown.path.as_str())
        .collect();
    paths.sort_unstable();
    let expected = [
        "gpu_config.region",
        "hyperparameters.hf_token",
        "hyperparameters.warmup_step",
        "learning_rate",
        "user_id",
    ];
    assert_eq!(paths, expected);
    let user = job.unknown.iter().find(|unknown| unknown.path == "user_id");
    assert_eq!(user.unwrap().value, "u1");
    let told = job.warnings.join("\n");
    assert!(
        told.contains(
            "`hyperparameters.warmup_step` means nothing here; did you mean `warmup_steps`?"
        ),
        "{told}"
    );
    assert!(
        told.contains("`learning_rate` means nothing here; it belongs into `hyperparameters`"),
        "{told}"
    );
    let many = changed(|input| {
        for index in 0..25 {
            input[format!("key{index}\n")] = json!(index);
        }
    });
    let many = self::job(&many);
    assert_eq!((many.unknown.len(), many.warnings.len()), (25, 21));
    assert_eq!(many.unknown[0].path, "key0\\n");
    assert_eq!(many.warnings[20], "5 more keys mean nothing here");
    // The one that was in its place counts.
    assert_eq!(config_of(&job).learning_rate, 1e-4);
}

#[test]
fn no_secret_is_shown() {
    let input = changed(|input| {
        input["dataset_url"] = json!(format!(
            "https://user:SECRET@host:8443/path/f.jsonl?token={TOKEN}#SECRET"
        ));
        input["callback_url"] = json!("https://host/hook?key=SECRET");
        input["hyperparameters"]["hf_token"] = json!("hf_SECRET");
    });
    let job = job(&input);
    assert_eq!(
        job.dataset_url.to_string(),
        "https://host:8443/path/f.jsonl?..."
    );
    let shown = format!("{job:?} {:?} {}", job.unknown, job.warnings.join(" "));
    assert!(!shown.contains("SECRET"), "{shown}");
    let two = changed(|input| {
        input["job_id"] = Value::Null;
        input["dataset_url"] = json!(["https://h/?token=SECRET"]);
        input["callback_url"] = json!("https://h/a b?token=SECRET");
    });
    let text = refused(&two).to_string();
    assert!(!text.contains("SECRET"), "{text}");
    assert!(text.contains("`dataset_url` is a list"), "{text}");
}

#[test]
fn ids_are_safe_as_names_of_files() {
    let with = |id: Value| changed(|input| input["job_id"] = id);
    for good in ["a", "A.b_c-9", &"x".repeat(96)] {
        assert_eq!(job(&with(json!(good))).id, good);
    }
    for bad in [
        "",
        "..",
        ".a",
        "-a",
        "a/b",
        "a\\b",
        "a b",
        "ä",
        "a\n",
        &"x".repeat(97),
    ] {
        let text = refused(&with(json!(bad))).to_string();
        assert!(text.contains("`job_id` is"), "{bad:?}: {text}");
    }
    refused(&with(json!(7)));
    assert_eq!(job(&with(Value::Null)).id, "runpod-1");
    let none = changed(|input| {
        input.as_object_mut().unwrap().remove("job_id");
    });
    assert_eq!(job(&none).id, "runpod-1");
    let error = Job::parse("../x", &none).unwrap_err().to_string();
    assert!(error.contains("`id` is `../x`"), "{error}");
    for good in ["name", "org/name", "Qwen/Qwen3-Next-80B-A3B-Instruct"] {
        let input = changed(|input| input["hyperparameters"]["base_model"] = json!(good));
        assert_eq!(job(&input).base_model, good);
    }
    for bad in [
        "a/b/c", "/a", "a/", "../a", "a/..", "a/b..c", "a//b", "~/a", "a/b ", "C:\\m", "a/.b",
        "a:b",
    ] {
        refused_for("base_model", bad, &["hub id"]);
    }
    for bad in [json!(""), json!(3)] {
        refused_for("base_model", bad, &["expected a text"]);
    }
    let none = changed(|input| input["hyperparameters"] = json!({}));
    let text = refused(&none).to_string();
    assert!(
        text.contains("`hyperparameters.base_model` is missing"),
        "{text}"
    );
}

#[test]
fn addresses_have_a_scheme_and_a_host() {
    let with = |url: &str| changed(|input| input["dataset_url"] = json!(url));
    for good in [
        "https://h/x",
        " http://h ",
        "file:///tmp/data.jsonl",
        "s3://bucket/key",
        "https://[::1]:80/x",
    ] {
        assert_eq!(job(&with(good)).dataset_url.secret(), good.trim());
    }
    for (bad, word) in [
        ("", "empty"),
        ("h/x", "no scheme"),
        ("://h/x", "no scheme"),
        ("1http://h", "no scheme"),
        ("https:///x", "no host"),
        ("https://?q", "no host"),
        ("https://u@/x", "no host"),
        ("https://h/\nx", "control character"),
    ] {
        let text = refused(&with(bad)).to_string();
        assert!(
            text.contains("`dataset_url`") && text.contains(word),
            "{bad:?}: {text}"
        );
    }
    let long = refused(&with(&format!("https://h/{}", "x".repeat(20_000)))).to_string();
    assert!(long.contains("bytes long") && long.len() < 200, "{long}");
    let none = changed(|input| {
        input.as_object_mut().unwrap().remove("dataset_url");
    });
    let text = refused(&none).to_string();
    assert!(text.contains("`dataset_url` is missing"), "{text}");
    for absent in [json!(""), Value::Null] {
        let input = changed(|input| input["callback_url"] = absent);
        assert_eq!(job(&input).callback_url, None);
    }
}

#[test]
fn any_setting_of_a_config_can_be_given_but_none_of_the_workers() {
    for object in ["config", "overrides"] {
        let input = changed(|input| {
            input[object] = json!({
                "lr_scheduler": "linear", "max_steps": 7, "recompute": "full", "optim": "adamw_8bit", "chat_template": "chatml",
                "resume_from_checkpoint": "none", "micro_batch_size": 2, "adam_beta2": "0.99"
            });
        });
        let config = config_of(&job(&input));
        assert_eq!(
            (config.lr_scheduler, config.max_steps),
            (LrScheduler::Linear, Some(7))
        );
        assert_eq!(
            (config.recompute, config.optimizer),
            (Recompute::Full, Optimizer::Adamw8bit)
        );
        assert_eq!(config.chat_template, Some("chatml".into()));
        assert_eq!(config.adam_beta2, 0.99);
        // The step keeps its targets.
        assert_eq!(
            (config.micro_batch_size, config.gradient_accumulation_steps),
            (2, 2)
        );
    }
    for (key, value) in [
        ("base_model", json!("a/b")),
        ("model_name_or_path", json!("a/b")),
        ("base_model_id", json!("a/b")),
        ("datasets", json!(["/etc/passwd"])),
        ("output_dir", json!("/")),
        ("device", json!("cpu")),
        ("init_adapter", json!("/a")),
        ("adapter_name_or_path", json!("/a")),
        ("gradient_accumulation_steps", json!(4)),
        ("chat_template", json!("/etc/passwd")),
        ("resume_from_checkpoint", json!("/a")),
    ] {
        let text = refused(&changed(|input| input["config"] = json!({key: value}))).to_string();
        assert!(text.contains(&format!("`config.{key}`")), "{text}");
    }
    let text = refused(&changed(|input| input["config"] = json!([]))).to_string();
    assert!(
        text.contains("`config` is a list, expected an object"),
        "{text}"
    );
    let text = refused(&json!("x")).to_string();
    assert!(
        text.contains("the input is a text, expected an object"),
        "{text}"
    );
}

#[test]
fn the_workers_settings_lie_under_the_jobs() {
    let defaults = json!({"device": "cpu", "max_seq_length": 512, "lr": 0.5, "micro_batch_size": 3, "save_minutes": 2});
    let defaults = defaults.as_object().unwrap();
    let paths = ["/m", "/d", "/o"].map(Path::new);
    let job = job(&changed(|input| {
        input["hyperparameters"]["batch_size"] = json!(16);
    }));
    let config = job
        .train_config(paths[0], paths[1], paths[2], defaults)
        .unwrap();
    assert_eq!(
        (config.device, config.sequence_len, config.save_minutes),
        (Device::Cpu, 512, 2.0)
    );
    assert_eq!(config.learning_rate, 1e-4);
    // The largest divisor of 16 that is not above 3.
    assert_eq!(
        (config.micro_batch_size, config.gradient_accumulation_steps),
        (2, 8)
    );
    let wrong = json!({"sequence_length": 5});
    let error = job.train_config(paths[0], paths[1], paths[2], wrong.as_object().unwrap());
    let text = error.unwrap_err().to_string();
    assert!(text.contains("unknown key `sequence_length`"), "{text}");
}

/// Pairs as the application exports them.
fn pairs(count: usize) -> String {
    let pair = |index: usize| {
        json!({
            "id": format!("p{index}"), "conversation_id": format!("c{index}"), "turn_number": 2, "system_prompt": "be kind",
            "conversation_history": [{"turn": 1, "role": "user", "content": format!("hello {index}")}],
            "current_user_input": format!("hello {index}"), "target_response": format!("a fine day to you, {index}")
        })
        .to_string()
    };
    let meta =
        json!({"_meta": {"file_name": "t", "total_pairs": 89, "version": "4.0.0"}}).to_string();
    let lines: Vec<String> = std::iter::once(meta).chain((0..count).map(pair)).collect();
    lines.join("\n")
}

/// The run of `job` on the golden Llama with `count` pairs, and the directory it is in.
fn small_run(job: &Job, count: usize) -> (tempfile::TempDir, TrainConfig) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.jsonl");
    fs_err::write(&data, pairs(count)).unwrap();
    let defaults = json!({"device": "cpu"});
    let config = job.train_config(
        &golden("models/llama"),
        &data,
        &dir.path().join("out"),
        defaults.as_object().unwrap(),
    );
    (dir, config.unwrap())
}

/// `live` with a step of `batch_size` targets.
fn job_of(batch_size: usize) -> Job {
    job(&changed(|input| {
        input["hyperparameters"]["batch_size"] = json!(batch_size);
        input["hyperparameters"]["rank"] = json!(2);
        input["hyperparameters"]["epochs"] = json!(2);
    }))
}

#[test]
fn an_adapter_names_the_base_that_was_asked_for_and_no_path() {
    // 14 pairs are less than a step.
    let (dir, config) = small_run(&job_of(16), 14);
    let fitted = fit(&config, Place::Cpu(1 << 40), &Env::default()).unwrap();
    assert_eq!(fitted.lengths.total_steps, 2);
    let mut steps = Vec::new();
    let mut observer = |event: &Event| {
        if let Event::Step(step) = event {
            steps.push(step.step);
        }
    };
    brightrun::train::run(
        &fitted.config,
        &Env::default(),
        &mut observer,
        &StopFlag::default(),
    )
    .unwrap();
    assert_eq!(steps, [1, 2]);
    let adapter = dir.path().join("out/adapter");
    let read = |name: &str| fs_err::read_to_string(adapter.join(name)).unwrap();
    let config: Value = serde_json::from_str(&read("adapter_config.json")).unwrap();
    assert_eq!(
        config["base_model_name_or_path"],
        "mistralai/Mistral-7B-Instruct-v0.2"
    );
    let own = golden("models/llama").display().to_string();
    for name in ["adapter_config.json", "README.md"] {
        let text = read(name);
        assert!(
            !text.contains(&own) && !text.contains("models/llama"),
            "{name}: {text}"
        );
        assert!(
            text.contains("mistralai/Mistral-7B-Instruct-v0.2"),
            "{name}: {text}"
        );
    }
}

#[test]
fn the_largest_micro_batch_that_fits_keeps_the_step() {
    let (_dir, config) = small_run(&job_of(12), 14);
    let bytes = |micro: usize| {
        let config = TrainConfig {
            micro_batch_size: micro,
            gradient_accumulation_steps: 12 / micro,
            ..config.clone()
        };
        let fitted = fit(&config, Place::Cpu(1 << 40), &Env::default()).unwrap();
        assert_eq!(fitted.config.micro_batch_size, micro);
        fitted.num_bytes
    };
    for micro in [12, 6, 4, 3, 2, 1] {
        // Activations are recomputed where they would fill the place: full recompute makes the bytes comparable.
        let full = TrainConfig {
            recompute: Recompute::Full,
            ..config.clone()
        };
        let needed = {
            let config = TrainConfig {
                micro_batch_size: micro,
                gradient_accumulation_steps: 12 / micro,
                ..full.clone()
            };
            fit(&config, Place::Cpu(1 << 40), &Env::default())
                .unwrap()
                .num_bytes
        };
        let fitted = fit(&full, Place::Cpu(needed), &Env::default()).unwrap();
        let found = (
            fitted.config.micro_batch_size,
            fitted.config.gradient_accumulation_steps,
        );
        assert_eq!(found, (micro, 12 / micro), "{fitted}");
        assert_eq!(fitted.num_bytes, needed);
        assert_eq!(fitted.lengths.total_steps, 4, "{fitted}");
        let above = [12, 6, 4, 3, 2, 1].into_iter().filter(|size| *size > micro);
        assert_eq!(fitted.too_large, above.collect::<Vec<_>>());
        // Nothing else has changed.
        let back = TrainConfig {
            micro_batch_size: 12,
            gradient_accumulation_steps: 1,
            ..fitted.config
        };
        assert_eq!(back, full);
    }
    assert!(bytes(12) > bytes(1));
}

#[test]
fn what_cannot_fit_is_refused_with_numbers_and_advice() {
    let (_dir, config) = small_run(&job_of(4), 14);
    let config = TrainConfig {
        recompute: Recompute::None,
        ..config
    };
    let one = TrainConfig {
        micro_batch_size: 1,
        gradient_accumulation_steps: 4,
        ..config.clone()
    };
    let place = Place::Cpu(1 << 40);
    let needed = fit(&one, place, &Env::default()).unwrap().num_bytes;
    let error = fit(&config, Place::Cpu(needed - 1), &Env::default()).unwrap_err();
    assert_eq!(error.exit_code(), 12);
    let text = error.to_string();
    let numbers = format!(
        "takes {:.1} MB even with a micro-batch of 1",
        needed as f64 / 1e6
    );
    for word in [
        numbers.as_str(),
        "with `recompute: full` in the job's `config`",
        "fits a RTX-4090",
    ] {
        assert!(text.contains(word), "{text}");
    }
    // On a GPU as well.
    let mut tiny = gpu("1GB").unwrap();
    tiny.num_bytes = CONTEXT_BYTES + 1000;
    let error = fit(&one, Place::Gpu(tiny), &Env::default()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
}

#[test]
fn the_80b_gets_the_micro_batch_that_an_80_gb_card_takes() {
    let dir = tempfile::tempdir().unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/models/qwen3-next-80b");
    fs_err::copy(base.join("config.json"), dir.path().join("config.json")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let path = golden("models/llama").join(name);
        fs_err::copy(path, dir.path().join(name)).unwrap();
    }
    let data = dir.path().join("data.jsonl");
    let row = json!({"input_ids": vec![1; 4096]}).to_string();
    fs_err::write(&data, vec![row; 20].join("\n")).unwrap();
    let job = job(&changed(|input| {
        input["hyperparameters"]["batch_size"] = json!(16);
        input["config"] = json!({"lora_dtype": "bf16", "optimizer": "adamw_8bit"});
    }));
    let config = job
        .train_config(dir.path(), &data, dir.path(), &Map::new())
        .unwrap();
    let place = Place::Gpu(gpu("80GB").unwrap());
    let fitted = fit(&config, place, &Env::default()).unwrap();
    let (micro, passes) = (
        fitted.config.micro_batch_size,
        fitted.config.gradient_accumulation_steps,
    );
    assert_eq!(micro * passes, 16, "{fitted}");
    assert_eq!(fitted.lengths.capacity, micro * 4096);
    assert!((1..16).contains(&micro), "{fitted}");
    assert!(fitted.num_bytes <= place.usable_bytes());
    // Twice as many do not fit: they were tried.
    assert_eq!(fitted.too_large.last(), Some(&(2 * micro)), "{fitted}");
    assert_eq!(fitted.lengths.total_steps, 6);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~ä\n]{0,12}".prop_map(Value::from),
    ];
    let key = prop_oneof![
        proptest::sample::select(vec![
            "job_id",
            "dataset_url",
            "hyperparameters",
            "gpu_config",
            "config",
            "overrides",
            "callback_url",
            "base_model",
            "learning_rate",
            "rank",
            "lora_r",
            "epochs",
            "batch_size",
            "count",
            "type",
            "seed",
            "datasets",
            "optimizer",
        ])
        .prop_map(str::to_owned),
        "[ -~\n]{0,8}",
    ];
    leaf.prop_recursive(3, 48, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..8)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn any_input_is_a_job_or_an_error(id in "[ -~]{0,10}", input in any_json()) {
        match Job::parse(&id, &input) {
            Ok(job) => { config_of(&job); }
            Err(error) => prop_assert!(!error.problems.is_empty()),
        }
    }

    /// A job that is one but for what is said in `config`.
    #[test]
    fn any_config_is_a_run_or_an_error(config in any_json()) {
        let input = changed(|input| input["config"] = config);
        match Job::parse("r", &input) {
            Ok(job) => { config_of(&job); }
            Err(error) => prop_assert!(!error.problems.is_empty()),
        }
    }
}
