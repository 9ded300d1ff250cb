//! Whether a run fits, what it takes, and what it would cost in time: from `config.json` and the run's config alone.
//!
//! Memory is the run's own code on a device that holds nothing ([`Planner`]), so a plan is exact to the byte. Times are
//! predictions: `docs/plan.md` says from what.

mod advice;
mod gpus;
mod report;

pub use self::advice::{Advice, advise};
pub use self::gpus::{GPUS, GpuKind, parse};
#[cfg(feature = "worker")]
pub(crate) use self::report::gb;

use std::path::Path;

use crate::config::model::ModelConfig;
use crate::config::{Env, TrainConfig};
use crate::data::Dataset;
use crate::data::calendar::Date;
use crate::error::{Error, Result};
use crate::export::adapter::file_bytes;
use crate::ops::cost::Cost;
use crate::ops::trace::Call;
use crate::store::locate::locate;
use crate::tensor::DType;
use crate::train::buffers::host_memory_bytes;
use crate::train::memory::{CONTEXT_BYTES, Memory, Planner};
use crate::train::{Lengths, check_device};

/// Token counts that are tried for the largest pass are multiples of this.
const CAPACITY_UNIT: usize = 256;
/// No pass is longer.
const MAX_CAPACITY: usize = 1 << 20;
/// The largest allocations that are listed.
const NUM_LARGEST: usize = 8;
/// Whole copies of a checkpoint that the host holds while it writes one and reads it back: gathered, serialised, verified.
const CHECKPOINT_COPIES: u64 = 3;
/// Pinned memory that copies to and from a GPU go through, in bytes.
const PINNED_BYTES: u64 = 72 << 20;

/// What memory is taken by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// Bytes.
    pub num_bytes: u64,
}

/// Where a run goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Place {
    /// A GPU.
    Gpu(GpuKind),
    /// This machine's CPU, with so many bytes of memory.
    Cpu(u64),
}

impl Place {
    /// This machine's CPU.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bytes of a machine's memory"
    )]
    pub fn cpu() -> Self {
        Self::Cpu(host_memory_bytes() as u64)
    }

    /// Bytes that a run may take.
    pub fn usable_bytes(self) -> u64 {
        match self {
            Self::Gpu(gpu) => gpu.num_bytes.saturating_sub(CONTEXT_BYTES),
            Self::Cpu(num_bytes) => num_bytes,
        }
    }
}

/// The run a plan is for.
#[derive(Debug)]
pub struct Subject {
    /// Its settings.
    pub config: TrainConfig,
    /// Its base model.
    pub model: ModelConfig,
    /// Lengths, where its data are there.
    pub lengths: Option<Lengths>,
}

impl Subject {
    /// Reads `config.json` of the base model and, where they are there, the data.
    ///
    /// # Errors
    /// Those of the two; data that are not there are none.
    pub fn new(config: TrainConfig, env: &Env) -> Result<Self> {
        let dir = locate(&config.base_model, env)?;
        let model = ModelConfig::from_file(dir.join("config.json"))?;
        let lengths = lengths(&config, &dir, model.vocab_size)?;
        Ok(Self {
            config,
            model,
            lengths,
        })
    }

    /// Tokens of the longest pass: the data's, else as many as the settings allow.
    pub fn capacity(&self) -> usize {
        let most = self.config.micro_batch_size * self.config.sequence_len;
        self.lengths.map_or(most, |lengths| lengths.capacity)
    }

    /// Tokens of the longest sequence.
    pub fn sequence_len(&self) -> usize {
        let most = self.config.sequence_len;
        self.lengths.map_or(most, |lengths| lengths.positions)
    }

    fn planner(&self) -> Result<Planner> {
        Planner::new(&self.config, &self.model, self.sequence_len())
    }
}

fn lengths(config: &TrainConfig, model_dir: &Path, vocab_size: usize) -> Result<Option<Lengths>> {
    let data_are_there = config.datasets.iter().all(|data| data.path.is_file());
    if !data_are_there || !model_dir.join("tokenizer.json").is_file() {
        return Ok(None);
    }
    let data = Dataset::load(config, model_dir, vocab_size, Date::today())?;
    Ok(Some(Lengths::new(config, &data)))
}

/// A run on a GPU of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnGpu {
    /// The GPU.
    pub gpu: GpuKind,
    /// `None`: its kernels need more than the GPU has.
    pub prediction: Option<Prediction>,
}

impl OnGpu {
    /// Whether it runs there.
    pub fn fits(&self) -> bool {
        self.prediction.is_some_and(|prediction| prediction.fits)
    }
}

/// A prediction of time on a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Bytes the run takes there.
    pub num_bytes: u64,
    /// Whether it fits.
    pub fits: bool,
    /// Seconds of an optimizer step.
    pub step_s: f64,
    /// Tokens in a second.
    pub tokens_per_s: f64,
}

/// Bytes on disk and in host memory beside the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// One checkpoint.
    pub checkpoint_bytes: u64,
    /// Checkpoints at once: those kept, and the one that is written.
    pub num_checkpoints: u64,
    /// The exported adapter.
    pub adapter_bytes: u64,
    /// Host memory at its highest: while weights are placed, a checkpoint is saved or the adapter is exported.
    pub memory_bytes: u64,
}

/// What a run takes and whether it fits.
#[derive(Debug)]
pub struct Plan {
    /// Where.
    pub place: Place,
    /// Every allocation.
    pub memory: Memory,
    /// Allocations summed.
    pub groups: Vec<Group>,
    /// Adapter parameters.
    pub num_parameters: usize,
    /// Tokens of the longest pass that fits, a multiple of 256; 0: none does.
    pub largest_capacity: usize,
    /// Arithmetic of an optimizer step.
    pub step_flops: u64,
    /// The same run on GPUs of a list.
    pub predictions: Vec<OnGpu>,
    /// Beside the GPU.
    pub host: Host,
    /// What the kernels need and this GPU does not have; its memory is then that of a GPU that has it.
    pub refused: Option<String>,
}

impl Plan {
    /// The plan of `subject` on `place`.
    ///
    /// # Errors
    /// Those of the planner; [`Error::Config`] for a setting that `place` does not have.
    pub fn new(subject: &Subject, place: Place) -> Result<Self> {
        let planner = subject.planner()?;
        let capacity = subject.capacity();
        if let Place::Cpu(_) = place {
            check_device(&subject.config, DType::F32)?;
        }
        let (memory, refused) = match (memory_on(&planner, subject, place, capacity), place) {
            (Err(Error::Unsupported { what, why }), Place::Gpu(gpu)) => {
                let place = Place::Gpu(gpu.with_all_shared_memory());
                let memory = memory_on(&planner, subject, place, capacity)?;
                (memory, Some(format!("{what}: {why}")))
            }
            (memory, _) => (memory?, None),
        };
        let predictions = GPUS.map(|gpu| predict(&planner, subject, gpu));
        let predictions: Result<Vec<OnGpu>> = predictions.into_iter().collect();
        let predictions = predictions?;
        let passes = subject.config.gradient_accumulation_steps as u64;
        let on_gpu = memory_on(&planner, subject, Place::Gpu(GPUS[0]), capacity)?;
        let flops: u64 = on_gpu.calls.iter().map(|call| call.cost.flops).sum();
        Ok(Self {
            place,
            groups: groups(&memory),
            num_parameters: planner.decoder().adapter.num_parameters(),
            largest_capacity: largest_capacity(&planner, subject, place)?,
            step_flops: passes * flops,
            predictions,
            host: host(&planner, subject, &memory),
            memory,
            refused,
        })
    }

    /// Whether it fits.
    pub fn fits(&self) -> bool {
        self.refused.is_none() && self.memory.num_bytes() <= self.place.usable_bytes()
    }

    /// The largest allocations, largest first.
    pub fn largest(&self) -> Vec<&(String, usize)> {
        let mut all: Vec<_> = self.memory.allocations.iter().collect();
        all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        all.truncate(NUM_LARGEST);
        all
    }
}

fn memory_on(
    planner: &Planner,
    subject: &Subject,
    place: Place,
    capacity: usize,
) -> Result<Memory> {
    match place {
        Place::Gpu(gpu) => planner.memory(&gpu.target(), capacity, subject.sequence_len()),
        Place::Cpu(num_bytes) => planner.host_memory(capacity, num_bytes),
    }
}

/// Whether a pass of `capacity` tokens fits; what the kernels do not take does not.
fn fits(planner: &Planner, subject: &Subject, place: Place, capacity: usize) -> Result<bool> {
    match memory_on(planner, subject, place, capacity) {
        Ok(memory) => Ok(memory.num_bytes() <= place.usable_bytes()),
        Err(Error::Unsupported { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn largest_capacity(planner: &Planner, subject: &Subject, place: Place) -> Result<usize> {
    let fits = |units: usize| fits(planner, subject, place, units * CAPACITY_UNIT);
    let (mut low, mut high) = (0, 1);
    while high <= MAX_CAPACITY / CAPACITY_UNIT && fits(high)? {
        (low, high) = (high, 2 * high);
    }
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low * CAPACITY_UNIT)
}

fn predict(planner: &Planner, subject: &Subject, gpu: GpuKind) -> Result<OnGpu> {
    let memory = match memory_on(planner, subject, Place::Gpu(gpu), subject.capacity()) {
        Ok(memory) => memory,
        Err(Error::Unsupported { .. }) => {
            let prediction = None;
            return Ok(OnGpu { gpu, prediction });
        }
        Err(error) => return Err(error),
    };
    let passes = subject.config.gradient_accumulation_steps;
    let update = |call: &&Call| call.op == "adamw";
    let seconds = |cost: Cost| gpu.seconds(cost);
    let of_update: f64 = memory
        .calls
        .iter()
        .filter(update)
        .map(|call| seconds(call.cost))
        .sum();
    let all: f64 = memory.calls.iter().map(|call| seconds(call.cost)).sum();
    let step_s = of_update + passes as f64 * (all - of_update);
    let num_bytes = memory.num_bytes();
    let prediction = Prediction {
        num_bytes,
        fits: num_bytes <= Place::Gpu(gpu).usable_bytes(),
        step_s,
        tokens_per_s: (passes * subject.capacity()) as f64 / step_s,
    };
    let prediction = Some(prediction);
    Ok(OnGpu { gpu, prediction })
}

fn host(planner: &Planner, subject: &Subject, memory: &Memory) -> Host {
    let config = &subject.config;
    let adapter = &planner.decoder().adapter;
    let is_saved = |name: &str| name.starts_with("lora.") && name != "lora.grads";
    let saved = memory.allocations.iter().filter(|(name, _)| is_saved(name));
    let checkpoint_bytes = saved.map(|(_, bytes)| *bytes as u64).sum();
    let adapter_bytes = file_bytes(adapter, config.adapter_dtype);
    // The experts of a layer are quantised together, then copied as they are stacked.
    let largest = memory
        .allocations
        .iter()
        .filter(|(name, _)| is_weight(name));
    let largest = largest.map(|(_, bytes)| *bytes as u64).max().unwrap_or(0);
    let loading = 4 * largest + PINNED_BYTES;
    let saving = CHECKPOINT_COPIES * checkpoint_bytes;
    let exporting = 4 * adapter.len() as u64 + 2 * adapter_bytes;
    Host {
        checkpoint_bytes,
        num_checkpoints: config.save_total_limit as u64 + 1,
        adapter_bytes,
        memory_bytes: loading.max(saving).max(exporting),
    }
}

fn is_weight(name: &str) -> bool {
    name.starts_with("model.") || name.starts_with("lm_head.")
}

/// Groups by a part of an allocation's name, the first that is there; base weights have names of tensors in the checkpoint.
const GROUPS: [(&str, &str); 11] = [
    ("lora.values", "adapter"),
    ("lora.grads", "adapter's gradients"),
    ("lora.", "optimizer's moments"),
    ("activations.", "activations"),
    ("temporaries.", "temporaries"),
    ("in NF4", "base: in NF4"),
    ("as stored", "base: as stored"),
    (".experts.", "base: experts"),
    ("_attn.", "base: attention"),
    ("embed_tokens", "base: embedding and head"),
    ("lm_head", "base: embedding and head"),
];

fn group_of(name: &str) -> &'static str {
    let found = GROUPS.iter().find(|(part, _)| name.contains(part));
    match found {
        Some((_, group)) => group,
        None if is_weight(name) => "base: other",
        None if name == "scratch" => "scratch of the kernels",
        None => "tables and step state",
    }
}

/// Allocations summed by group, in the order of their first ones.
fn groups(memory: &Memory) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (name, num_bytes) in &memory.allocations {
        let name = group_of(name);
        let at = groups.iter().position(|group| group.name == name);
        let at = at.unwrap_or_else(|| {
            groups.push(Group { name, num_bytes: 0 });
            groups.len() - 1
        });
        groups[at].num_bytes += *num_bytes as u64;
    }
    groups
}
