//! The run that is measured: a model's shape, its adapter, its batch.

use std::path::Path;
use std::rc::Rc;

use serde_json::{Value, json};

use super::weights::BenchWeights;
use crate::backend::Opened;
use crate::backend::gpu::driver::DeviceInfo;
use crate::config::TrainConfig;
use crate::config::model::ModelConfig;
use crate::data::{Batch, IGNORE_INDEX, StepBatches};
use crate::error::{Error, Result};
use crate::model::adapter::AdapterSettings;
use crate::model::weights::{self, Placed};
use crate::ops::trace::{Call, Trace};
use crate::ops::{Ops, Traced};
use crate::random::{Draws, Stream};
use crate::store::quantized::QuantizePolicy;
use crate::train::memory::{Planner, Target};
use crate::train::trainer::{OptimizerSettings, Trainer};

/// Models whose shape is built in.
const BUILT_IN: [(&str, &str); 3] = [
    (
        "qwen3-next-80b",
        include_str!("../../benches/models/qwen3-next-80b/config.json"),
    ),
    (
        "mistral-7b",
        include_str!("../../benches/models/mistral-7b/config.json"),
    ),
    (
        "qwen2.5-0.5b",
        include_str!("../../benches/models/qwen2.5-0.5b/config.json"),
    ),
];

/// What `--small` makes of a model: every op is still there.
const SMALL: [(&str, usize); 16] = [
    ("hidden_size", 64),
    ("intermediate_size", 96),
    ("vocab_size", 320),
    ("num_hidden_layers", 4),
    ("num_attention_heads", 4),
    ("num_key_value_heads", 2),
    ("head_dim", 32),
    ("linear_num_key_heads", 2),
    ("linear_num_value_heads", 4),
    ("linear_key_head_dim", 16),
    ("linear_value_head_dim", 16),
    ("num_experts", 8),
    ("num_experts_per_tok", 2),
    ("moe_intermediate_size", 64),
    ("shared_expert_intermediate_size", 64),
    ("max_position_embeddings", 4096),
];

/// What is measured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Adapter, optimizer, recompute.
    pub config: TrainConfig,
    /// Tokens of a pass.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub sequence_len: usize,
    /// Layers.
    pub layers: usize,
}

impl Settings {
    /// `model` with as many layers as are wanted.
    fn truncated(&self, model: &ModelConfig) -> Result<ModelConfig> {
        let (mut model, layers) = (model.clone(), self.layers);
        if layers == 0 || layers > model.layers.len() {
            return Err(Error::Config {
                origin: "--layers".to_owned(),
                reason: format!("is {layers}, the model has 1 to {}", model.layers.len()),
            });
        }
        model.layers.truncate(layers);
        Ok(model)
    }
}

/// The calls of a step; refuses one that does not fit `opened`. Nothing is allocated.
pub(super) fn planned(
    opened: &Opened,
    model: &ModelConfig,
    settings: &Settings,
) -> Result<Vec<Call>> {
    let (tokens, sequence_len) = (settings.tokens, settings.sequence_len);
    let model = settings.truncated(model)?;
    let planner = Planner::new(&settings.config, &model, sequence_len)?;
    if let (Some(info), Some(free)) = (opened.info.clone(), opened.ops.free_memory()?) {
        planner.check(info, free, tokens, sequence_len)?;
    }
    // The calls are the same on every device.
    let any = Target {
        info: DeviceInfo {
            name: "any device".to_owned(),
            num_multiprocessors: 1,
            capability: (9, 0),
        },
        num_bytes: u64::MAX,
    };
    Ok(planner.memory(&any, tokens, sequence_len)?.calls)
}

/// The shape of a built-in model, or of that in a directory or file. `is_small`: with small extents.
///
/// # Errors
/// [`Error::Missing`] naming the models that are built in; those of the file.
pub fn model(name: &str, is_small: bool) -> Result<ModelConfig> {
    let built_in = BUILT_IN.iter().find(|(known, _)| *known == name);
    let path = Path::new(name);
    let file = if path.is_dir() {
        path.join("config.json")
    } else {
        path.to_owned()
    };
    let (text, origin) = match built_in {
        Some((_, text)) => ((*text).to_owned(), Path::new(name).to_owned()),
        None if file.is_file() => (fs_err::read_to_string(&file)?, file),
        None => {
            let known: Vec<&str> = BUILT_IN.iter().map(|(known, _)| *known).collect();
            return Err(Error::Missing {
                what: format!("model `{name}` (built in: {})", known.join(", ")),
                tried: vec![file],
            });
        }
    };
    if !is_small {
        return ModelConfig::from_json(&text, origin);
    }
    let mut json: Value =
        serde_json::from_str(&text).map_err(|error| Error::format(&origin, error.to_string()))?;
    for (key, extent) in SMALL {
        if json.get(key).is_some() {
            json[key] = json!(extent);
        }
    }
    ModelConfig::from_json(&json.to_string(), origin)
}

/// A trainer on random weights, the trace of its ops (off), and what it trains.
pub(super) struct Subject {
    pub(super) trainer: Trainer,
    pub(super) trace: Rc<Trace>,
    pub(super) batches: StepBatches,
    /// Bytes the device gave, base weights and buffers; `None` where its memory is the host's.
    pub(super) device_bytes: Option<u64>,
}

impl Subject {
    /// Builds it on `opened`, if it fits there.
    pub(super) fn new(opened: Opened, model: &ModelConfig, settings: &Settings) -> Result<Self> {
        planned(&opened, model, settings)?;
        let model = settings.truncated(model)?;
        let (config, capacity) = (&settings.config, settings.tokens);
        let free = opened.ops.free_memory()?;
        let policy = QuantizePolicy::new(config);
        let (traced, trace) = Traced::new(opened.ops);
        let ops: Box<dyn Ops> = Box::new(traced);
        let mut source = BenchWeights::new(policy, config.seed);
        let mut placed = Placed {
            source: &mut source,
            ops: &*ops,
        };
        let adapter = AdapterSettings::new(config);
        let decoder = weights::load(&model, &mut placed, adapter, settings.sequence_len)?;
        let optimizer = OptimizerSettings::new(config);
        let trainer = Trainer::new(
            ops,
            decoder,
            optimizer,
            capacity,
            config.recompute,
            config.seed,
        )?;
        let taken = match (free, trainer.free_memory()?) {
            (Some(before), Some(after)) => Some(before.saturating_sub(after)),
            _ => None,
        };
        Ok(Self {
            trainer,
            trace,
            batches: batches(settings, model.vocab_size),
            device_bytes: taken,
        })
    }
}

/// One micro-batch of random tokens; every one but the last of each sequence is a target.
fn batches(settings: &Settings, vocab_size: usize) -> StepBatches {
    let mut draws = Draws::new(settings.config.seed, Stream::Synthetic, 1);
    let vocab_size = u32::try_from(vocab_size).unwrap_or(u32::MAX);
    let input_ids = (0..settings.tokens).map(|_| draws.next_u32() % vocab_size);
    let batch = Batch::next_token(input_ids.collect(), settings.sequence_len);
    let is_target = |id: &&i32| **id != IGNORE_INDEX;
    StepBatches {
        num_target_tokens: batch.target_ids.iter().filter(is_target).count(),
        micro_batches: vec![batch],
    }
}
