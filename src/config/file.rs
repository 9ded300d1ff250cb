//! From YAML and `--set key=value` to a [`TrainConfig`]: aliases, defaults, ranges.

use std::path::Path;

use serde_json::{Map, Value};

use super::reader::{Reader, shown};
use super::{
    AdapterDType, AdapterKind, DatasetSource, DatasetType, Device, LoraDType, LrScheduler, MoeLora,
    Optimizer, Recompute, Resume, TrainConfig,
};
use crate::error::{Error, Result};

/// The seven projections that get an adapter unless the config says otherwise.
const TARGET_MODULES: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

impl TrainConfig {
    /// Reads `path` and puts `sets` (`key=value`, the value in YAML) over it.
    ///
    /// # Errors
    /// [`Error::Missing`] without the file; else as [`Self::from_yaml`].
    pub fn load(path: &Path, sets: &[String]) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::Missing {
                what: "config".to_owned(),
                tried: vec![path.to_owned()],
            });
        }
        let text = String::from_utf8(fs_err::read(path)?).map_err(|error| {
            let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = valid.split(|byte| *byte == b'\n').count();
            config_error(path, format!("line {line} is not UTF-8; save it as UTF-8"))
        })?;
        Self::from_yaml(&text, path, sets)
    }

    /// Reads a config; `origin` names it in messages.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem found: unknown keys, wrong types, values out of range.
    pub fn from_yaml(text: &str, origin: &Path, sets: &[String]) -> Result<Self> {
        let value: Value = serde_saphyr::from_str(text).map_err(|error| {
            config_error(
                origin,
                format!("cannot be read as YAML: {}", first_line(&error)),
            )
        })?;
        let mut entries = match value {
            Value::Object(entries) => entries,
            Value::Null => Map::new(),
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                let reason = format!(
                    "holds {}, expected a mapping of `key: value`",
                    shown(&other)
                );
                return Err(config_error(origin, reason));
            }
        };
        for set in sets {
            let (key, value) = parse_set(set)?;
            entries.insert(key, value);
        }
        Self::from_entries(entries, &origin.display().to_string())
    }

    /// A config from its `key: value` pairs; `origin` names them in messages.
    ///
    /// # Errors
    /// As [`Self::from_yaml`].
    pub fn from_entries(entries: Map<String, Value>, origin: &str) -> Result<Self> {
        let mut reader = Reader::new(entries);
        let config = read(&mut reader);
        match reader.finish() {
            None => Ok(config),
            Some(reason) => Err(Error::Config {
                origin: origin.to_owned(),
                reason,
            }),
        }
    }

    /// All settings, defaults filled in, as YAML that reads back to the same config.
    ///
    /// # Errors
    /// [`Error::Config`] if a path is not UTF-8.
    pub fn resolved_yaml(&self) -> Result<String> {
        let value = serde_json::to_value(self)
            .map_err(|error| config_error(Path::new("paths"), error.to_string()))?;
        // A JSON value is a YAML value.
        let mut text = String::new();
        for (key, value) in value.as_object().into_iter().flatten() {
            text.push_str(&format!("{key}: {value}\n"));
        }
        Ok(text)
    }
}

fn config_error(origin: &Path, reason: String) -> Error {
    Error::Config {
        origin: origin.display().to_string(),
        reason,
    }
}

/// The library's message without its second half, which speaks of the library's own options.
fn first_line(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let end = [", set ", " rejected by the configured"].map(|tail| line.find(tail));
    let end = end.into_iter().flatten().min().unwrap_or(line.len());
    line[..end].to_owned()
}

fn parse_set(set: &str) -> Result<(String, Value)> {
    let origin = Path::new("--set");
    let Some((key, value)) = set.split_once('=') else {
        return Err(config_error(
            origin,
            format!("`{set}` has no `=`, expected `key=value`"),
        ));
    };
    let parsed = serde_saphyr::from_str(value)
        .map_err(|error| config_error(origin, format!("`{set}`: {}", first_line(&error))))?;
    Ok((key.trim().to_owned(), parsed))
}

fn read(reader: &mut Reader) -> TrainConfig {
    let base_model = reader.text("base_model");
    if base_model.is_none() {
        reader
            .problem("`base_model` is missing, expected a hub id or a model directory".to_owned());
    }
    let positive = |value: f64| value > 0.0;
    let below_one = |value: f64| (0.0..1.0).contains(&value);
    let non_negative = |value: f64| value >= 0.0;
    let targets = TARGET_MODULES.map(str::to_owned).to_vec();
    let config = TrainConfig {
        base_model: base_model.unwrap_or_default(),
        base_model_id: reader.text("base_model_id"),
        datasets: datasets(reader),
        output_dir: reader.path("output_dir").unwrap_or_else(|| "out".into()),
        adapter: choice(reader, "adapter", AdapterKind::NAMES, AdapterKind::ALL, 0),
        bnb_4bit_use_double_quant: reader.switch("bnb_4bit_use_double_quant", true),
        lora_r: reader.count("lora_r", 1).unwrap_or(16),
        lora_alpha: reader
            .number("lora_alpha", "a number above 0", positive)
            .unwrap_or(32.0),
        lora_dropout: reader
            .number("lora_dropout", "at least 0 and below 1", below_one)
            .unwrap_or(0.05),
        lora_target_modules: reader.list("lora_target_modules").unwrap_or(targets),
        init_adapter: reader.path("init_adapter"),
        quantize_modules: reader.list("quantize_modules"),
        moe_lora: choice(reader, "moe_lora", MoeLora::NAMES, MoeLora::ALL, 0),
        lora_expert_r: reader.count("lora_expert_r", 1),
        use_rslora: reader.switch("use_rslora", false),
        adapter_dtype: choice(
            reader,
            "adapter_dtype",
            AdapterDType::NAMES,
            AdapterDType::ALL,
            0,
        ),
        lora_dtype: choice(reader, "lora_dtype", LoraDType::NAMES, LoraDType::ALL, 0),
        sequence_len: reader.count("sequence_len", 2).unwrap_or(4096),
        sample_packing: reader.switch("sample_packing", true),
        fold_conversations: reader.switch("fold_conversations", true),
        train_on_inputs: reader.switch("train_on_inputs", false),
        micro_batch_size: reader.count("micro_batch_size", 1).unwrap_or(4),
        gradient_accumulation_steps: reader.count("gradient_accumulation_steps", 1).unwrap_or(1),
        num_epochs: reader.count("num_epochs", 1).unwrap_or(3),
        max_steps: reader.count("max_steps", 1),
        shuffle: reader.switch("shuffle", true),
        learning_rate: reader
            .number("learning_rate", "a number above 0 and at most 1", |value| {
                value > 0.0 && value <= 1.0
            })
            .unwrap_or(1e-4),
        lr_scheduler: choice(
            reader,
            "lr_scheduler",
            LrScheduler::NAMES,
            LrScheduler::ALL,
            0,
        ),
        warmup_ratio: reader
            .number("warmup_ratio", "at least 0 and at most 1", |value| {
                (0.0..=1.0).contains(&value)
            })
            .unwrap_or(0.1),
        warmup_steps: reader.count("warmup_steps", 0),
        optimizer: optimizer(reader),
        adam_beta1: reader
            .number("adam_beta1", "at least 0 and below 1", below_one)
            .unwrap_or(0.9),
        adam_beta2: reader
            .number("adam_beta2", "at least 0 and below 1", below_one)
            .unwrap_or(0.999),
        adam_epsilon: reader
            .number("adam_epsilon", "a number above 0", positive)
            .unwrap_or(1e-8),
        weight_decay: reader
            .number("weight_decay", "a number of at least 0", non_negative)
            .unwrap_or(0.0),
        max_grad_norm: reader
            .number("max_grad_norm", "a number of at least 0", non_negative)
            .unwrap_or(1.0),
        val_set_size: reader
            .number(
                "val_set_size",
                "a share below 1 or a whole number",
                |value| below_one(value) || (value >= 1.0 && value.fract() == 0.0),
            )
            .unwrap_or(0.0),
        eval_steps: reader.count("eval_steps", 1),
        seed: reader.count("seed", 0).unwrap_or(42) as u64,
        device: device(reader),
        recompute: choice(reader, "recompute", Recompute::NAMES, Recompute::ALL, 0),
        save_steps: reader.count("save_steps", 1).unwrap_or(100),
        save_minutes: reader
            .number("save_minutes", "a number above 0", positive)
            .unwrap_or(10.0),
        save_total_limit: reader.count("save_total_limit", 1).unwrap_or(2),
        resume_from_checkpoint: resume(reader),
        chat_template: reader.path("chat_template"),
    };
    check_together(reader, &config);
    config
}

/// What no single key shows.
fn check_together(reader: &mut Reader, config: &TrainConfig) {
    if config.adapter == AdapterKind::Lora && config.quantize_modules.is_some() {
        reader.problem(
            "`quantize_modules` needs `adapter: qlora`; `adapter: lora` keeps the base as stored"
                .to_owned(),
        );
    }
    // `device: auto` is known when it is opened.
    if config.lora_dtype == LoraDType::Bf16 && config.device == Device::Cpu {
        reader.problem(
            "`lora_dtype` is `bf16`, which the CPU backend does not have; use `fp32`".to_owned(),
        );
    }
}

fn choice<T: Copy>(
    reader: &mut Reader,
    key: &'static str,
    names: &[&str],
    values: &[T],
    default: usize,
) -> T {
    values[reader.choice(key, names).unwrap_or(default)]
}

/// `adamw`, also under the names Hugging Face has for it.
fn optimizer(reader: &mut Reader) -> Optimizer {
    const NAMES: [&str; 5] = [
        "adamw",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
    ];
    match reader.choice("optimizer", &NAMES) {
        None | Some(0..=2) => Optimizer::Adamw,
        Some(_) => Optimizer::Adamw8bit,
    }
}

fn datasets(reader: &mut Reader) -> Vec<DatasetSource> {
    let items = match reader.take("datasets") {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    if items.is_empty() {
        reader.problem("`datasets` is missing, expected a list of `{path: data.jsonl}`".to_owned());
    }
    let mut sources = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match dataset(item) {
            Ok(source) => sources.push(source),
            Err(reason) => reader.problem(format!("`datasets[{index}]`: {reason}")),
        }
    }
    sources
}

fn dataset(item: &Value) -> Result<DatasetSource, String> {
    let fields = match item {
        Value::String(path) => {
            let kind = DatasetType::Auto;
            let path = path.into();
            return Ok(DatasetSource { path, kind });
        }
        Value::Object(fields) => fields,
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_)) => {
            return Err(format!(
                "is {}, expected `{{path: data.jsonl}}`",
                shown(other)
            ));
        }
    };
    if let Some(key) = fields
        .keys()
        .find(|key| !matches!(key.as_str(), "path" | "type"))
    {
        return Err(format!("unknown key `{key}`; it takes `path` and `type`"));
    }
    let path = fields.get("path").and_then(Value::as_str);
    let path = path
        .filter(|path| !path.is_empty())
        .ok_or("`path` is missing")?;
    let kind = match fields.get("type") {
        None | Some(Value::Null) => DatasetType::Auto,
        Some(value) => {
            let index = DatasetType::NAMES
                .iter()
                .position(|name| Some(*name) == value.as_str())
                .ok_or_else(|| {
                    let names = DatasetType::NAMES.join(", ");
                    format!("`type` is {}, expected one of {names}", shown(value))
                })?;
            DatasetType::ALL[index]
        }
    };
    let path = path.into();
    Ok(DatasetSource { path, kind })
}

fn device(reader: &mut Reader) -> Device {
    let Some(text) = reader.text("device") else {
        return Device::Auto;
    };
    Device::parse(&text).unwrap_or_else(|| {
        reader.problem(format!(
            "`device` is `{text}`, expected one of auto, cpu, emu, cuda, cuda:N"
        ));
        Device::Auto
    })
}

fn resume(reader: &mut Reader) -> Resume {
    let value = reader.take("resume_from_checkpoint");
    match value {
        None | Some(Value::Bool(true)) => Resume::Auto,
        Some(Value::Bool(false)) => Resume::Never,
        Some(Value::String(text)) => match text.as_str() {
            "auto" => Resume::Auto,
            "none" => Resume::Never,
            path => Resume::Path(path.into()),
        },
        Some(other) => {
            let reason = format!(
                "`resume_from_checkpoint` is {}, expected auto, none or a path",
                shown(&other)
            );
            reader.problem(reason);
            Resume::Auto
        }
    }
}
