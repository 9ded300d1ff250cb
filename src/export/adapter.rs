//! The PEFT adapter directory: `adapter_config.json`, `adapter_model.safetensors`, tokenizer files, model card.

use std::collections::BTreeMap;
use std::path::Path;

use fs_err as fs;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

pub use super::card::Summary;
use super::card::card;
use super::config::adapter_config;
use super::{Adapter, PeftVersion, file_dtype, file_rank, narrowed};
use crate::config::{AdapterDType, TrainConfig};
use crate::data::tokenizer::FILES as TOKENIZER_FILES;
use crate::durable::{Durable, partial_of};
use crate::error::{Error, Result};
use crate::model::adapter::AdapterLayout;
use crate::store::checkpoint::{float_dtype, widen_bytes};

/// Weights of an adapter directory.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Settings of an adapter directory.
pub const CONFIG: &str = "adapter_config.json";
/// What PEFT puts before the names of the model's modules.
const PREFIX: &str = "base_model.model.";

/// What surrounds an adapter.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Settings of the run.
    pub config: &'a TrainConfig,
    /// Directory of the base model: its tokenizer files are copied.
    pub model_dir: &'a Path,
    /// Chat template that replaced the model's own.
    pub chat_template: Option<&'a str>,
    /// What the run came to.
    pub summary: Summary,
}

/// Writes an adapter directory at once: a crash leaves the old one or the new one.
///
/// # Errors
/// Those of the file system; [`Error::Unsupported`] where `version` cannot hold the adapter.
pub fn write(
    files: &Durable,
    dir: &Path,
    adapter: &Adapter<'_>,
    context: &Context<'_>,
    version: PeftVersion,
) -> Result<()> {
    let id = crate::store::locate::base_model_id(context.config, context.model_dir);
    let config = adapter_config(adapter, &id, version)?;
    let partial = partial_of(dir);
    files.create_dir(&partial)?;
    let text = serde_json::to_string_pretty(&config)
        .map_err(|error| Error::format(dir.join(CONFIG), error.to_string()))?;
    files.write(&partial.join(CONFIG), text.as_bytes())?;
    files.write(&partial.join(WEIGHTS), &weights(adapter, context.config)?)?;
    let readme = card(adapter, context.config, &id, context.summary);
    files.write(&partial.join("README.md"), readme.as_bytes())?;
    for name in TOKENIZER_FILES {
        let source = context.model_dir.join(name);
        if source.is_file() {
            files.write(&partial.join(name), &fs::read(source)?)?;
        }
    }
    if let Some(template) = context.chat_template {
        files.write(&partial.join("chat_template.jinja"), template.as_bytes())?;
    }
    files.sync_dir(&partial)?;
    files.replace_dir(&partial, dir)
}

/// Bytes of `adapter_model.safetensors`.
fn weights(adapter: &Adapter<'_>, config: &TrainConfig) -> Result<Vec<u8>> {
    let dtype = file_dtype(config.adapter_dtype);
    let rank = adapter.file_rank();
    let mut tensors = Vec::new();
    for module in adapter.layout.modules() {
        let (a, b) = adapter.padded(module);
        let name = |which: char| format!("{PREFIX}{}.lora_{which}.weight", module.name);
        tensors.push((
            name('A'),
            vec![rank, module.pair.in_features],
            narrowed(&a, dtype),
        ));
        tensors.push((
            name('B'),
            vec![module.pair.out_features, rank],
            narrowed(&b, dtype),
        ));
    }
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(dtype, shape.clone(), bytes)?)))
        .collect();
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error: safetensors::SafeTensorError| Error::format(WEIGHTS, error.to_string()))
}

/// Bytes of the tensors of `layout` in a file: pairs of smaller rank are padded to the largest.
pub fn file_bytes(layout: &AdapterLayout, dtype: AdapterDType) -> u64 {
    let rank = file_rank(layout);
    let widths = layout.modules().iter().map(|module| {
        let pair = &module.pair;
        (pair.in_features + pair.out_features) as u64
    });
    let size = match dtype {
        AdapterDType::F32 => 4,
        AdapterDType::Bf16 | AdapterDType::F16 => 2,
    };
    size * rank as u64 * widths.sum::<u64>()
}

/// Reads the adapter directory `dir` into `values`, the arena of `layout`.
///
/// # Errors
/// [`Error::Missing`] for an absent file; [`Error::Format`] for a setting, name or shape that is another than this
/// run's, each named.
pub fn read(dir: &Path, layout: &AdapterLayout, values: &mut [f32]) -> Result<()> {
    let (config_path, weights_path) = (dir.join(CONFIG), dir.join(WEIGHTS));
    for path in [&config_path, &weights_path] {
        if !path.is_file() {
            let what = "`init_adapter` (a PEFT adapter directory)".to_owned();
            return Err(Error::Missing {
                what,
                tried: vec![path.clone()],
            });
        }
    }
    let config: Value = serde_json::from_str(&fs::read_to_string(&config_path)?)
        .map_err(|error| Error::format(&config_path, format!("no JSON: {error}")))?;
    let file_rank = check_config(&config, &config_path, layout)?;
    let bytes = fs::read(&weights_path)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| {
        Error::format(
            &weights_path,
            format!("is no whole safetensors file: {error}"),
        )
    })?;
    let mut unread: BTreeMap<String, _> = tensors.tensors().into_iter().collect();
    for module in layout.modules() {
        let pair = &module.pair;
        let mut take = |which: char, shape: [usize; 2]| -> Result<Vec<f32>> {
            let name = format!("{PREFIX}{}.lora_{which}.weight", module.name);
            let view = unread
                .remove(&name)
                .ok_or_else(|| Error::format(&weights_path, format!("has no tensor `{name}`")))?;
            if view.shape() != shape {
                let reason = format!(
                    "tensor `{name}` has shape {:?}, expected {shape:?}",
                    view.shape()
                );
                return Err(Error::format(&weights_path, reason));
            }
            widened(&view).ok_or_else(|| {
                let reason = format!(
                    "tensor `{name}` is {:?}, expected F32, BF16 or F16",
                    view.dtype()
                );
                Error::format(&weights_path, reason)
            })
        };
        let a = take('A', [file_rank, pair.in_features])?;
        let b = take('B', [pair.out_features, file_rank])?;
        if a.iter().chain(&b).any(|value| !value.is_finite()) {
            let reason = format!(
                "the pair of `{}` has a value that is not finite",
                module.name
            );
            return Err(Error::format(&weights_path, reason));
        }
        let own = pair.rank * pair.in_features;
        let columns = |range: std::ops::Range<usize>| {
            b.chunks_exact(file_rank)
                .flat_map(move |row| row[range.clone()].to_vec())
        };
        let surplus_is_zero = a[own..].iter().all(|value| *value == 0.0)
            || columns(pair.rank..file_rank).all(|value| value == 0.0);
        if !surplus_is_zero {
            let reason = format!(
                "the pair of `{}` has rank {file_rank}, this run gives it rank {}; set `lora_r` (or \
                 `lora_expert_r`) to the adapter's",
                module.name, pair.rank
            );
            return Err(Error::format(&weights_path, reason));
        }
        // The scaling of this run may be another than the file's (a pair of smaller rank, padded).
        let factor = layout.settings().scaling(file_rank) / pair.scaling;
        values[pair.a_range()].copy_from_slice(&a[..own]);
        for (value, own) in values[pair.b_range()].iter_mut().zip(columns(0..pair.rank)) {
            *value = own * factor;
        }
    }
    if let Some(name) = unread.keys().next() {
        let reason = format!(
            "has tensor `{name}` (and {} more) that this run does not train; make `lora_target_modules` and \
             `moe_lora` those of the adapter",
            unread.len() - 1
        );
        return Err(Error::format(&weights_path, reason));
    }
    Ok(())
}

/// Checks what would change the meaning of the weights; the rank of the file.
fn check_config(config: &Value, path: &Path, layout: &AdapterLayout) -> Result<usize> {
    let settings = layout.settings();
    let refuse = |reason: String| Err(Error::format(path, reason));
    let kind = config["peft_type"].as_str().unwrap_or("absent");
    if kind != "LORA" {
        return refuse(format!("`peft_type` is `{kind}`, expected `LORA`"));
    }
    for key in ["use_dora", "lora_bias", "fan_in_fan_out"] {
        if config[key].as_bool() == Some(true) {
            return refuse(format!("`{key}` is true, which is not supported"));
        }
    }
    let is_empty = |value: &Value| value.as_object().is_none_or(serde_json::Map::is_empty);
    for key in ["rank_pattern", "alpha_pattern"] {
        if !is_empty(&config[key]) {
            return refuse(format!(
                "`{key}` is not empty, which is not supported; all pairs must have rank `r`"
            ));
        }
    }
    let rank = config["r"]
        .as_u64()
        .and_then(|rank| usize::try_from(rank).ok())
        .unwrap_or(0);
    let expected = settings.rank.max(settings.expert_rank);
    if rank != expected {
        return refuse(format!(
            "`r` is {rank}, but the config's `lora_r` is {expected}; they must be equal"
        ));
    }
    let alpha = config["lora_alpha"].as_f64().unwrap_or(f64::NAN);
    if (alpha - settings.alpha).abs() > 1e-9 * settings.alpha || alpha.is_nan() {
        let expected = settings.alpha;
        return refuse(format!(
            "`lora_alpha` is {alpha}, but the config's is {expected}; they must be equal"
        ));
    }
    let rslora = config["use_rslora"].as_bool().unwrap_or(false);
    if rslora != settings.use_rslora {
        let expected = settings.use_rslora;
        return refuse(format!(
            "`use_rslora` is {rslora}, but the config's is {expected}; they must be equal"
        ));
    }
    Ok(rank)
}

pub(super) fn widened(view: &TensorView<'_>) -> Option<Vec<f32>> {
    Some(widen_bytes(float_dtype(view.dtype())?, view.data()))
}
