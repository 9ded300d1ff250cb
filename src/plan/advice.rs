//! What to change where a run does not fit: settings are tried, not guessed.

use super::{GpuKind, Place, Plan, Subject, memory_on};
use crate::config::{AdapterKind, LoraDType, MoeLora, Optimizer, Recompute, TrainConfig};
use crate::error::Result;

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

/// A change, and whether it changes anything.
type Lever = (&'static str, fn(&mut TrainConfig));

/// What costs least quality comes first.
const LEVERS: [Lever; 9] = [
    ("recompute=full", |config| {
        config.recompute = Recompute::Full;
    }),
    ("optimizer=adamw_8bit", |config| {
        config.optimizer = Optimizer::Adamw8bit;
    }),
    ("micro_batch_size=1", |config| config.micro_batch_size = 1),
    ("lora_dtype=bf16", |config| {
        config.lora_dtype = LoraDType::Bf16;
    }),
    ("adapter=qlora", |config| {
        config.adapter = AdapterKind::Qlora;
    }),
    ("bnb_4bit_use_double_quant=true", |config| {
        config.bnb_4bit_use_double_quant = true;
    }),
    ("lora_expert_r=8", |config| {
        let rank = config.lora_expert_r.unwrap_or(config.lora_r);
        config.lora_expert_r = Some(rank.min(8));
    }),
    ("moe_lora=shared_only", |config| {
        config.moe_lora = MoeLora::SharedOnly;
    }),
    ("sequence_len=1024", |config| {
        config.sequence_len = config.sequence_len.min(1024);
    }),
];

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
        let mut changed = subject.config.clone();
        (lever.1)(&mut changed);
        // The CPU's adapter is f32.
        let is_for_gpu = lever.0.starts_with("lora_dtype") && matches!(place, Place::Cpu(_));
        changed != subject.config && !is_for_gpu
    };
    let levers: Vec<Lever> = LEVERS.into_iter().filter(has).collect();
    let found = |levers: &[Lever], num_bytes| Advice {
        settings: levers.iter().map(|lever| lever.0.to_owned()).collect(),
        num_bytes,
        gpu,
    };
    for lever in &levers {
        let bytes = bytes_with(subject, place, std::slice::from_ref(lever))?;
        if bytes <= limit {
            return Ok(found(std::slice::from_ref(lever), bytes));
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
        return Ok(found(&chosen, bytes));
    }
    Ok(found(&[], num_bytes))
}

/// Bytes of the run with `levers` pulled. Data were read with the settings as they are; with others passes are as long as the
/// settings allow, if that is less.
fn bytes_with(subject: &Subject, place: Place, levers: &[Lever]) -> Result<u64> {
    let mut config = subject.config.clone();
    for lever in levers {
        (lever.1)(&mut config);
    }
    let most = config.micro_batch_size * config.sequence_len;
    let lengths = subject.lengths.map(|mut lengths| {
        lengths.capacity = lengths.capacity.min(most);
        lengths.positions = lengths.positions.min(config.sequence_len);
        lengths
    });
    let changed = Subject {
        config,
        model: subject.model.clone(),
        lengths,
    };
    let planner = changed.planner()?;
    let memory = memory_on(&planner, &changed, place, changed.capacity())?;
    Ok(memory.num_bytes())
}
