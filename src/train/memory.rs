//! What a run allocates, told before it does: its own code, run on a device that holds nothing.

use std::sync::Arc;

use super::buffers::{BufferSettings, Buffers};
use super::trainer::OptimizerSettings;
use crate::backend::gpu::Gpu;
use crate::backend::gpu::driver::DeviceInfo;
use crate::backend::gpu::driver::planned::Planned;
use crate::config::TrainConfig;
use crate::config::model::ModelConfig;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::adapter::AdapterSettings;
use crate::model::decoder::Decoder;
use crate::model::weights::{self, Placed};
use crate::ops::trace::{Call, Mode};
use crate::ops::{StepState, Traced};

use crate::store::quantized::{QuantizePolicy, QuantizedStore, WeightCounts};
use crate::tensor::DType;

/// What the driver keeps for itself on a GPU: context, kernels, stack. Bytes.
pub const CONTEXT_BYTES: u64 = 1_000_000_000;

/// Name and bytes of an allocation.
pub type Allocation = (String, usize);

/// A model and its adapter on a device that holds nothing.
#[derive(Debug)]
pub struct Planner {
    decoder: Decoder,
    optimizer: OptimizerSettings,
    recompute: crate::config::Recompute,
    weights: Vec<Allocation>,
    counts: WeightCounts,
}

/// A device to plan for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it is.
    pub info: DeviceInfo,
    /// All its memory, in bytes.
    pub num_bytes: u64,
}

/// What a run takes on a device.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Every allocation, base weights first.
    pub allocations: Vec<Allocation>,
    /// Tokens of the longest pass.
    pub capacity: usize,
    /// Whether activations are recomputed in backward.
    pub recompute: bool,
    /// Ops of one pass and of the update, with their costs.
    pub calls: Vec<Call>,
}

impl Memory {
    /// Bytes of all allocations, without [`CONTEXT_BYTES`].
    pub fn num_bytes(&self) -> u64 {
        self.allocations
            .iter()
            .map(|(_, bytes)| *bytes as u64)
            .sum()
    }
}

impl Planner {
    /// The run that `config` asks for on `model`, whose rotary tables hold `positions`; no weight is read.
    ///
    /// # Errors
    /// Those of the adapter's settings.
    pub fn new(config: &TrainConfig, model: &ModelConfig, positions: usize) -> Result<Self> {
        // What is placed does not depend on the device.
        let info = DeviceInfo {
            name: "any device".to_owned(),
            num_multiprocessors: 1,
            capability: (8, 0),
        };
        let driver = Arc::new(Planned::new(info, 0));
        let gpu = Gpu::new(driver.clone())?;
        let own = driver.ledger().len();
        let mut store = QuantizedStore::shapes(DType::Bf16, QuantizePolicy::new(config));
        let mut source = Placed {
            source: &mut store,
            ops: &gpu,
        };
        let settings = AdapterSettings::new(config);
        let decoder = weights::load(model, &mut source, settings, positions)?;
        store.verify()?;
        Ok(Self {
            decoder,
            optimizer: OptimizerSettings::new(config),
            recompute: config.recompute,
            weights: driver.ledger().split_off(own),
            counts: store.counts(),
        })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The base weights' allocations.
    pub fn weights(&self) -> &[Allocation] {
        &self.weights
    }

    /// What the run takes on `target` with passes of `capacity` tokens, in sequences of `sequence_len`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what its kernels do not take.
    pub fn memory(&self, target: &Target, capacity: usize, sequence_len: usize) -> Result<Memory> {
        let weights: u64 = self.weights.iter().map(|(_, bytes)| *bytes as u64).sum();
        let free = target.num_bytes.saturating_sub(CONTEXT_BYTES + weights);
        let driver = Arc::new(Planned::new(target.info.clone(), free));
        let gpu = Gpu::new(driver.clone())?;
        let (ops, trace) = Traced::new(&gpu);
        let settings = BufferSettings {
            capacity,
            optimizer: self.optimizer,
            recompute: self.recompute,
        };
        trace.start(Mode::Costs);
        let state = StepState {
            batch: Batch::next_token(vec![0; capacity], sequence_len),
            loss_scale: 1.0,
            dropout: None,
        };
        let buffers = Buffers::alloc(&ops, &self.decoder, settings, &state)?;
        let mut allocations = self.weights.clone();
        allocations.extend(driver.ledger());
        Ok(Memory {
            allocations,
            capacity,
            recompute: buffers.recomputes(),
            calls: trace.stop(),
        })
    }

    /// Refuses a run that does not fit into the `free` bytes of a device: before a weight is read.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with the bytes; those of [`Self::memory`].
    pub fn check(
        &self,
        info: DeviceInfo,
        free: u64,
        capacity: usize,
        sequence_len: usize,
    ) -> Result<()> {
        let name = info.name.clone();
        let target = Target {
            info,
            num_bytes: free + CONTEXT_BYTES,
        };
        let needed = self.memory(&target, capacity, sequence_len)?.num_bytes();
        if needed <= free {
            return Ok(());
        }
        let reason = format!(
            "the run takes {needed} bytes for passes of {capacity} tokens, {free} are free on {name}; `brightrun plan` says what \
             makes it fit"
        );
        Err(Error::OutOfMemory { reason })
    }

    /// What it takes on the CPU, whose activations are f32: weights are views of their file or NF4, and ops keep no scratch to
    /// speak of.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn host_memory(&self, capacity: usize, num_bytes: u64) -> Result<Memory> {
        let settings = BufferSettings {
            capacity,
            optimizer: self.optimizer,
            recompute: self.recompute,
        };
        let (ledger, recompute) =
            Buffers::plan_on_host(&self.decoder, settings, DType::F32, num_bytes as f64)?;
        let mut allocations = vec![
            ("model.weights in NF4".to_owned(), self.counts.nf4_bytes),
            (
                "model.weights as stored".to_owned(),
                self.counts.dense_bytes,
            ),
        ];
        let buffers = ledger.ledger().iter();
        allocations.extend(buffers.map(|entry| (entry.name.clone(), entry.num_bytes)));
        Ok(Memory {
            allocations,
            capacity,
            recompute,
            calls: Vec::new(),
        })
    }
}
