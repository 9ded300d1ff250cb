//! The largest micro-batches that fit, with the optimizer step that was asked for.

use std::fmt;

use crate::config::model::ModelConfig;
use crate::config::{Env, TrainConfig};
use crate::data::Dataset;
use crate::data::calendar::Date;
use crate::error::{Error, Result};
use crate::plan::gb;
use crate::plan::{self, Place, Plan, Subject};
use crate::store::locate::locate;
use crate::train::Lengths;
use crate::train::memory::{Memory, Planner};

/// Settings that fit, and what they take.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The settings: as asked for but for `micro_batch_size` and `gradient_accumulation_steps`, whose product is the same.
    pub config: TrainConfig,
    /// Steps of the run and tokens of its passes.
    pub lengths: Lengths,
    /// Bytes the run takes.
    pub num_bytes: u64,
    /// Bytes it may take.
    pub usable_bytes: u64,
    /// Whether activations are recomputed in backward.
    pub recompute: bool,
    /// Micro-batches that were too large.
    pub too_large: Vec<usize>,
}

impl fmt::Display for Fitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        let (micro, steps) = (config.micro_batch_size, config.gradient_accumulation_steps);
        write!(
            f,
            "{} optimizer steps of {} targets in {steps} passes of {micro}, up to {} tokens; {} of {}, activations are {}",
            self.lengths.total_steps,
            micro * steps,
            self.lengths.capacity,
            gb(self.num_bytes),
            gb(self.usable_bytes),
            if self.recompute { "recomputed" } else { "kept" }
        )
    }
}

/// Chooses `micro_batch_size` for `config` on `place`: the largest divisor of the step's targets, not above the one in `config`,
/// with which the run fits. All other settings stay as they are.
///
/// # Errors
/// [`Error::OutOfMemory`] with the bytes and what would make it fit; those of the model's config and of the data.
pub fn fit(config: &TrainConfig, place: Place, env: &Env) -> Result<Fitted> {
    let dir = locate(&config.base_model, env)?;
    let model = ModelConfig::from_file(dir.join("config.json"))?;
    let data = Dataset::load(config, &dir, model.vocab_size, Date::today())?;
    // Neither weights nor the longest sequence depend on the micro-batches.
    let positions = Lengths::new(config, &data).positions;
    let planner = Planner::new(config, &model, positions)?;
    let usable_bytes = place.usable_bytes();
    let mut too_large = Vec::new();
    for micro_batch_size in sizes(config) {
        let config = with(config, micro_batch_size);
        let lengths = Lengths::new(&config, &data);
        match memory(&planner, place, lengths) {
            Ok(memory) if memory.num_bytes() <= usable_bytes => {
                return Ok(Fitted {
                    config,
                    lengths,
                    num_bytes: memory.num_bytes(),
                    usable_bytes,
                    recompute: memory.recompute,
                    too_large,
                });
            }
            // Passes too long for a kernel are too long.
            Ok(_) | Err(Error::Unsupported { .. }) => too_large.push(micro_batch_size),
            Err(error) => return Err(error),
        }
    }
    let config = with(config, 1);
    let lengths = Some(Lengths::new(&config, &data));
    let subject = Subject {
        config,
        model,
        lengths,
    };
    Err(does_not_fit(&subject, place)?)
}

/// Micro-batches to try, largest first; the last one is 1.
fn sizes(config: &TrainConfig) -> Vec<usize> {
    let targets = config.micro_batch_size * config.gradient_accumulation_steps;
    let sizes = (1..=config.micro_batch_size).rev();
    sizes.filter(|size| targets.is_multiple_of(*size)).collect()
}

/// `config` with other micro-batches and the same step.
fn with(config: &TrainConfig, micro_batch_size: usize) -> TrainConfig {
    let targets = config.micro_batch_size * config.gradient_accumulation_steps;
    TrainConfig {
        micro_batch_size,
        gradient_accumulation_steps: targets / micro_batch_size,
        ..config.clone()
    }
}

fn memory(planner: &Planner, place: Place, lengths: Lengths) -> Result<Memory> {
    match place {
        Place::Gpu(gpu) => planner.memory(&gpu.target(), lengths.capacity, lengths.positions),
        Place::Cpu(num_bytes) => planner.host_memory(lengths.capacity, num_bytes),
    }
}

/// The error for a run that does not fit with micro-batches of 1, with the advice of its plan.
fn does_not_fit(subject: &Subject, place: Place) -> Result<Error> {
    let plan = Plan::new(subject, place)?;
    let advice = plan::advise(subject, &plan)?;
    let settings = match advice.settings.as_slice() {
        [] => "no setting that was tried makes it fit".to_owned(),
        settings => {
            let pairs: Vec<String> = settings
                .iter()
                .map(|set| format!("`{}`", set.replacen('=', ": ", 1)))
                .collect();
            let pairs = pairs.join(" and ");
            format!(
                "with {pairs} in the job's `config` it takes {}",
                gb(advice.num_bytes)
            )
        }
    };
    let gpu = match advice.gpu {
        Some(gpu) => format!("as it is it fits a {}", gpu.name),
        None => "as it is it fits no GPU that is known".to_owned(),
    };
    let reason = format!(
        "the run takes {} even with a micro-batch of 1 ({} tokens), and {} can be used on {place}; {settings}; {gpu}",
        gb(plan.memory.num_bytes()),
        plan.memory.capacity,
        gb(place.usable_bytes()),
    );
    Ok(Error::OutOfMemory { reason })
}
