//! What to change where a run does not fit: settings are tried, not guessed.

use super::{GpuKind, Place, Plan, Subject, memory_on};
use crate::config::{AdapterKind, LoraDType, MoeLora, Optimizer, Recompute, TrainConfig};
use crate::error::{Error, Result};

/// Changes that make a run fit.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// Settings, as `--set` takes them; empty where none helped.
    pub settings: Vec<String>,
    /// Bytes it takes with them.
    pub num_bytes: u64,
    /// The smallest known GPU that takes it as it is.
    pub gpu: Option<GpuKind>,
}

/// A change: the settings it touches, and what it makes of a config.
type Lever = (&'static [&'static str], fn(&mut TrainConfig));

/// What costs least quality comes first.
const LEVERS: [Lever; 9] = [
    (&["recompute"], |config| {
        config.recompute = Recompute::Full;
    }),
    (&["optimizer"], |config| {
        config.optimizer = Optimizer::Adamw8bit;
    }),
    // As many targets in a step as before.
    (
        &["micro_batch_size", "gradient_accumulation_steps"],
        |config| {
            config.gradient_accumulation_steps *= config.micro_batch_size;
            config.micro_batch_size = 1;
        },
    ),
    (&["lora_dtype"], |config| {
        config.lora_dtype = LoraDType::Bf16;
    }),
    (&["adapter"], |config| {
        config.adapter = AdapterKind::Qlora;
    }),
    (&["bnb_4bit_use_double_quant"], |config| {
        config.bnb_4bit_use_double_quant = true;
    }),
    (&["lora_expert_r"], |config| {
        let rank = config.lora_expert_r.unwrap_or(config.lora_r);
        config.lora_expert_r = Some(rank.min(8));
    }),
    (&["moe_lora"], |config| {
        config.moe_lora = MoeLora::SharedOnly;
    }),
    (&["sequence_len"], |config| {
        config.sequence_len = config.sequence_len.min(1024);
    }),
];

/// `config` with `levers` pulled.
fn changed(config: &TrainConfig, levers: &[Lever]) -> TrainConfig {
    let mut config = config.clone();
    for (_, change) in levers {
        change(&mut config);
    }
    config
}

/// What `levers` set in `config`, as `--set` takes it.
fn settings(config: &TrainConfig, levers: &[Lever]) -> Result<Vec<String>> {
    let values = serde_json::to_value(changed(config, levers));
    let values = values.map_err(|error| Error::format("config", error.to_string()))?;
    let keys = levers.iter().flat_map(|(keys, _)| *keys);
    let set = |key: &&str| match values[*key].as_str() {
        Some(text) => format!("{key}={text}"),
        None => format!("{key}={}", values[*key]),
    };
    Ok(keys.map(set).collect())
}

/// The first single change, else the shortest prefix of all, with which `subject` fits on `place`; less what the prefix can do
/// without.
///
/// # Errors
/// Those of the planner.
pub fn advise(subject: &Subject, plan: &Plan) -> Result<Advice> {
    let place = plan.place;
    let limit = place.usable_bytes();
    let num_bytes = plan.memory.num_bytes();
    let gpu = plan
        .predictions
        .iter()
        .filter(|on| on.fits())
        .map(|on| on.gpu);
    let gpu = gpu.min_by_key(|gpu| gpu.num_bytes);
    let has = |lever: &Lever| {
        // The CPU's adapter is f32.
        let is_for_gpu = lever.0.contains(&"lora_dtype") && matches!(place, Place::Cpu(_));
        changed(&subject.config, std::slice::from_ref(lever)) != subject.config && !is_for_gpu
    };
    let levers: Vec<Lever> = match plan.refused {
        None => LEVERS.into_iter().filter(has).collect(),
        Some(_) => Vec::new(),
    };
    let found = |levers: &[Lever], num_bytes| {
        Ok(Advice {
            settings: settings(&subject.config, levers)?,
            num_bytes,
            gpu,
        })
    };
    for lever in &levers {
        let bytes = bytes_with(subject, place, std::slice::from_ref(lever))?;
        if bytes <= limit {
            return found(std::slice::from_ref(lever), bytes);
        }
    }
    for count in 2..=levers.len() {
        let mut chosen = levers[..count].to_vec();
        if bytes_with(subject, place, &chosen)? > limit {
            continue;
        }
        let mut at = 0;
        while at < chosen.len() {
            let mut without = chosen.clone();
            without.remove(at);
            if bytes_with(subject, place, &without)? <= limit {
                chosen = without;
            } else {
                at += 1;
            }
        }
        let bytes = bytes_with(subject, place, &chosen)?;
        return found(&chosen, bytes);
    }
    found(&[], num_bytes)
}

/// Bytes of the run with `levers` pulled. Data were read with the settings as they are; with others passes are as long as the
/// settings allow, if that is less.
fn bytes_with(subject: &Subject, place: Place, levers: &[Lever]) -> Result<u64> {
    let config = changed(&subject.config, levers);
    let most = config.micro_batch_size * config.sequence_len;
    let lengths = subject.lengths.map(|mut lengths| {
        lengths.capacity = lengths.capacity.min(most);
        lengths.positions = lengths.positions.min(config.sequence_len);
        lengths
    });
    let subject = Subject {
        config,
        model: subject.model.clone(),
        lengths,
    };
    let planner = subject.planner()?;
    let memory = memory_on(&planner, &subject, place, subject.capacity())?;
    Ok(memory.num_bytes())
}
