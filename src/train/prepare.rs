//! Everything about a run that can be known before a weight is read: files, settings, data, where it goes on from.

use std::path::{Path, PathBuf};

use super::checkpoint::{self, Checkpoints, Loaded};
use crate::config::model::ModelConfig;
use crate::config::{Env, Resume, TrainConfig};
use crate::data::calendar::Date;
use crate::data::pack::Packing;
use crate::data::{Dataset, Unit};
use crate::error::{Error, Result};
use crate::export::adapter;
use crate::model::adapter::{AdapterLayout, AdapterSettings};
use crate::model::weights;
use crate::store::checkpoint::Checkpoint;
use crate::store::locate::locate;
use crate::store::quantized::{QuantizePolicy, QuantizedStore, WeightCounts};

/// Settings that may change between a run and its resumption: they do not change what is computed.
const FREE_SETTINGS: [&str; 11] = [
    "base_model",
    "base_model_id",
    "output_dir",
    "device",
    "recompute",
    "adapter_dtype",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "resume_from_checkpoint",
    "init_adapter",
];

/// A run that can start.
#[derive(Debug)]
pub struct Prepared {
    /// Directory of the base model.
    pub model_dir: PathBuf,
    /// Shape of the base model.
    pub model: ModelConfig,
    /// Weights of the base model, opened but not read.
    pub weights: Checkpoint,
    /// How they will be held.
    pub counts: WeightCounts,
    /// Modules that get an adapter.
    pub layout: AdapterLayout,
    /// Tokenised data.
    pub data: Dataset,
    /// How the data become steps.
    pub packing: Packing,
    /// Optimizer steps in an epoch.
    pub steps_per_epoch: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Tokens of the longest pass.
    pub capacity: usize,
    /// Where the run goes on from.
    pub resume: Option<Loaded>,
    /// The date that chat templates are told.
    pub date: Date,
    /// What a person should know.
    pub warnings: Vec<String>,
}

impl Prepared {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// Whatever keeps the run from starting, by name.
    pub fn new(config: &TrainConfig, env: &Env) -> Result<Self> {
        let model_dir = locate(&config.base_model, env)?;
        let model = ModelConfig::from_file(model_dir.join("config.json"))?;
        let weights = Checkpoint::open(&model_dir)?;
        let policy = QuantizePolicy::new(config);
        let mut survey = QuantizedStore::survey(weights.clone(), policy);
        let layout = weights::load(&model, &mut survey, AdapterSettings::new(config), 1)?.adapter;
        survey.verify()?;
        let (resume, mut warnings) = find_resume(config)?;
        if let (Some(dir), None) = (&config.init_adapter, &resume) {
            // Read again once the trainer has its buffers; here, so that a bad one is refused first.
            adapter::read(dir, &layout, &mut vec![0.0; layout.len()])?;
        }
        // A resumed run tells templates the date it began with: the tokens stay the same.
        let date = match &resume {
            Some(loaded) => Date::from_days(loaded.state.date_days),
            None => Date::today(),
        };
        let data = Dataset::load(config, &model_dir, model.vocab_size, date)?;
        if let Some(loaded) = &resume {
            warnings.extend(check_resume(config, loaded, &layout, &data)?);
        }
        if config.sequence_len > model.max_position_embeddings
            && data.report.longest > model.max_position_embeddings
        {
            warnings.push(format!(
                "the longest sequence has {} tokens, the model was made for {} (`max_position_embeddings`)",
                data.report.longest, model.max_position_embeddings
            ));
        }
        let packing = Dataset::packing(config);
        let Lengths {
            steps_per_epoch,
            total_steps,
            capacity,
            ..
        } = Lengths::new(config, &data);
        Ok(Self {
            model_dir,
            model,
            weights,
            counts: survey.counts(),
            layout,
            data,
            packing,
            steps_per_epoch,
            total_steps,
            capacity,
            resume,
            date,
            warnings,
        })
    }

    /// Tokens of the longest sequence: positions the rotary tables need.
    pub fn num_positions(&self) -> usize {
        num_positions(&self.data)
    }
}

fn num_positions(data: &Dataset) -> usize {
    let units = data.train.iter().chain(&data.eval);
    units
        .map(|unit: &Unit| unit.input_ids.len())
        .max()
        .unwrap_or(1)
}

/// How long a run and its passes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Optimizer steps in an epoch.
    pub steps_per_epoch: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Tokens of the longest pass.
    pub capacity: usize,
    /// Tokens of the longest sequence.
    pub positions: usize,
}

impl Lengths {
    /// Those of a run of `config` on `data`.
    pub fn new(config: &TrainConfig, data: &Dataset) -> Self {
        let packing = Dataset::packing(config);
        let steps_per_epoch = packing.steps_per_epoch(&data.train);
        let total_steps = config
            .max_steps
            .unwrap_or(config.num_epochs * steps_per_epoch);
        let num_epochs = total_steps.div_ceil(steps_per_epoch);
        let eval_packing = eval_packing(packing);
        let capacity = packing
            .max_tokens(&data.train, num_epochs)
            .max(eval_packing.max_tokens(&data.eval, 1));
        Self {
            steps_per_epoch,
            total_steps,
            capacity,
            positions: num_positions(data),
        }
    }
}

/// Held-out data run in order, a micro-batch at a time.
pub(super) fn eval_packing(packing: Packing) -> Packing {
    Packing {
        gradient_accumulation_steps: 1,
        shuffle_seed: None,
        ..packing
    }
}

fn find_resume(config: &TrainConfig) -> Result<(Option<Loaded>, Vec<String>)> {
    match &config.resume_from_checkpoint {
        Resume::Never => Ok((None, Vec::new())),
        Resume::Path(path) => Ok((Some(checkpoint::read(path)?), Vec::new())),
        Resume::Auto => {
            let (found, mut warnings) =
                Checkpoints::new(&config.output_dir, config.save_total_limit).newest();
            if !warnings.is_empty() {
                warnings.push(match &found {
                    Some(loaded) => format!(
                        "going on from the one before it, step-{}",
                        loaded.state.step
                    ),
                    None => "no good checkpoint is left; starting from the beginning".to_owned(),
                });
            }
            Ok((found, warnings))
        }
    }
}

/// Refuses a checkpoint of another run; warnings for settings that differ where the user named the checkpoint.
fn check_resume(
    config: &TrainConfig,
    loaded: &Loaded,
    layout: &AdapterLayout,
    data: &Dataset,
) -> Result<Vec<String>> {
    let advice =
        "set `resume_from_checkpoint: none` to start from the beginning, or another `output_dir`";
    let refuse = |reason: String| -> Result<Vec<String>> {
        Err(Error::Config {
            origin: loaded.path.display().to_string(),
            reason: format!("{reason}; {advice}"),
        })
    };
    let changed = changed_settings(config, loaded)?;
    if !changed.is_empty() && config.resume_from_checkpoint == Resume::Auto {
        return refuse(format!(
            "is of a run with other settings: {}",
            changed.join(", ")
        ));
    }
    if loaded.state.layout_digest != layout.digest() {
        return refuse("is of a run with another adapter or base model".to_owned());
    }
    if loaded.state.data_digest != data.digest() {
        return refuse(
            "is of a run with other data (or another tokenizer or chat template)".to_owned(),
        );
    }
    let warning = |changed: String| format!("goes on with another setting than before: {changed}");
    Ok(changed.into_iter().map(warning).collect())
}

/// `name was -> is` for each setting that differs from the checkpoint's.
fn changed_settings(config: &TrainConfig, loaded: &Loaded) -> Result<Vec<String>> {
    let now = settings(config)?;
    let mut changed = Vec::new();
    for (key, value) in &now {
        let before = loaded.state.config.get(key);
        if !FREE_SETTINGS.contains(&key.as_str()) && before != Some(value) {
            let before = before.map_or("absent".to_owned(), ToString::to_string);
            changed.push(format!("`{key}` {before} -> {value}"));
        }
    }
    Ok(changed)
}

/// The settings as a checkpoint keeps them.
pub(super) fn settings(config: &TrainConfig) -> Result<serde_json::Map<String, serde_json::Value>> {
    let yaml = Path::new("settings");
    match serde_json::to_value(config) {
        Ok(serde_json::Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::format(yaml, "are no mapping")),
        Err(error) => Err(Error::format(yaml, error.to_string())),
    }
}
