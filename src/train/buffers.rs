//! All memory of a run but its base weights, and whether it is enough to keep activations.

use super::trainer::OptimizerSettings;
use crate::config::{LoraDType, Optimizer, Recompute};
use crate::error::Result;
use crate::model::adapter::AdapterLayout;
use crate::model::decoder::{Decoder, DecoderActs, DecoderTmp};
use crate::model::{Pass, Rows};
use crate::ops::{AdamWStep, Moments, Ops, StepState, UpdateReport};
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// Share of the host's memory that buffers may take before `recompute: auto` recomputes: the rest is for weights and for others.
const HOST_SHARE: f64 = 0.5;
/// Bytes that `recompute: auto` leaves free on a device, whose allocations are rounded up.
const ROUNDING_BYTES: f64 = 16e6;

/// The adapter's flat arenas, each `[n]`.
#[derive(Debug)]
pub struct AdapterState {
    /// Values, f32 or bf16.
    pub values: Tensor,
    /// Gradients, f32; zero between steps.
    pub grads: Tensor,
    /// The optimizer's moments.
    pub moments: Moments,
}

impl AdapterState {
    /// Memory for `len` elements.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(arena: &mut Arena, len: usize, settings: OptimizerSettings) -> Result<Self> {
        let dtype = match settings.lora_dtype {
            LoraDType::Fp32 => DType::F32,
            LoraDType::Bf16 => DType::Bf16,
        };
        arena.scope("lora", |arena| {
            Ok(Self {
                values: arena.alloc("values", &[len], dtype)?,
                grads: arena.alloc("grads", &[len], DType::F32)?,
                moments: Moments::alloc(arena, len, settings.kind == Optimizer::Adamw8bit)?,
            })
        })
    }

    /// PEFT's initial values; gradients and moments are zero.
    pub(super) fn begin(&mut self, layout: &AdapterLayout, seed: u64) -> Result<()> {
        self.values.zero()?;
        for (range, values) in layout.initial_values(seed) {
            self.values.write_f32_at(range.start, &values)?;
        }
        self.grads.zero()?;
        for (_, tensor) in self.moments.tensors_mut() {
            tensor.zero()?;
        }
        Ok(())
    }

    /// The optimizer's update, from the gradients and token losses of a step.
    pub(super) fn update(
        &mut self,
        ops: &dyn Ops,
        acts: &DecoderActs,
        step: AdamWStep,
    ) -> Result<UpdateReport> {
        let Self {
            values,
            grads,
            moments,
        } = self;
        ops.adamw(values, moments, grads, &acts.token_loss, step)
    }
}

/// What buffers are made for.
#[derive(Debug, Clone, Copy)]
pub struct BufferSettings {
    /// Tokens of the longest micro-batch.
    pub capacity: usize,
    /// The optimizer's settings.
    pub optimizer: OptimizerSettings,
    /// Whether to keep all activations.
    pub recompute: Recompute,
}

/// The memory of a step.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) adapter: AdapterState,
    pub(super) acts: DecoderActs,
    pub(super) tmp: DecoderTmp,
}

impl Memory {
    fn alloc(
        arena: &mut Arena,
        decoder: &Decoder,
        settings: BufferSettings,
        activation: DType,
        recompute: bool,
    ) -> Result<Self> {
        let adapter = AdapterState::alloc(arena, decoder.adapter.len(), settings.optimizer)?;
        let mut rows = Rows::new(arena, settings.capacity, activation);
        let acts = rows.scope("activations", |rows| decoder.alloc(rows, recompute))?;
        let tmp = rows.scope("temporaries", |rows| decoder.alloc_tmp(rows))?;
        Ok(Self { adapter, acts, tmp })
    }

    /// The calls of a step.
    fn step(
        &mut self,
        ops: &dyn Ops,
        decoder: &Decoder,
        settings: BufferSettings,
        state: &StepState,
    ) -> Result<()> {
        let Self { adapter, acts, tmp } = self;
        let pass = Pass {
            ops,
            lora: &adapter.values,
            state,
        };
        decoder.forward(pass, acts, tmp)?;
        decoder.loss_backward(pass, &mut adapter.grads, acts, tmp)?;
        let step = settings.optimizer.at(1, 0.0, 0);
        adapter.update(ops, acts, step).map(|_| ())
    }
}

/// All memory of a run but its base weights, for micro-batches of up to `capacity` tokens.
#[derive(Debug)]
pub struct Buffers {
    pub(super) memory: Memory,
    pub(super) recompute: bool,
    pub(super) ledger: Arena,
}

impl Buffers {
    /// The ledger of what they take on a host with `memory` bytes, and whether activations are recomputed. Nothing is allocated.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn plan_on_host(
        decoder: &Decoder,
        settings: BufferSettings,
        activation: DType,
        memory: f64,
    ) -> Result<(Arena, bool)> {
        let plan = |recompute| {
            let mut plan = Arena::plan();
            Memory::alloc(&mut plan, decoder, settings, activation, recompute)?;
            Ok((plan, recompute))
        };
        match settings.recompute {
            Recompute::Full => plan(true),
            Recompute::None => plan(false),
            Recompute::Auto => {
                let kept = plan(false)?;
                if kept.0.num_bytes() as f64 <= HOST_SHARE * memory {
                    Ok(kept)
                } else {
                    plan(true)
                }
            }
        }
    }

    /// Allocates them in the memory of `ops`. Before it a step's calls are made on planned tensors, in which the device
    /// computes nothing; they are those of a step of `state`. With `recompute: auto` activations are kept where everything then
    /// fits into what is free.
    ///
    /// # Errors
    /// Those of the arena and of the ops.
    pub fn alloc(
        ops: &dyn Ops,
        decoder: &Decoder,
        settings: BufferSettings,
        state: &StepState,
    ) -> Result<Self> {
        let (activation, capacity) = (ops.activation_dtype(), settings.capacity);
        let recompute = match (settings.recompute, ops.free_memory()?) {
            (Recompute::Full, _) => true,
            (Recompute::None, _) => false,
            (Recompute::Auto, None) => {
                Self::plan_on_host(decoder, settings, activation, host_memory_bytes())?.1
            }
            (Recompute::Auto, Some(free)) => {
                let mut plan = Arena::plan();
                let mut kept = Memory::alloc(&mut plan, decoder, settings, activation, false)?;
                let mut step = |ops: &dyn Ops| kept.step(ops, decoder, settings, state);
                let scratch = ops.scratch_bytes(capacity, &mut step)?;
                (plan.num_bytes() + scratch) as f64 + ROUNDING_BYTES > free as f64
            }
        };
        let mut plan = Arena::plan();
        let mut planned = Memory::alloc(&mut plan, decoder, settings, activation, recompute)?;
        let mut step = |ops: &dyn Ops| planned.step(ops, decoder, settings, state);
        let scratch = ops.reserve(capacity, &mut step)?;
        let mut ledger = ops.arena(&plan)?;
        let memory = Memory::alloc(&mut ledger, decoder, settings, activation, recompute)?;
        ledger.count("scratch", scratch);
        Ok(Self {
            memory,
            recompute,
            ledger,
        })
    }

    /// Whether activations are recomputed in backward.
    pub fn recomputes(&self) -> bool {
        self.recompute
    }
}

/// Memory of the machine that this process may have, in bytes: all of it, or its control group's limit; 8 GB where neither can
/// be told.
pub fn host_memory_bytes() -> f64 {
    const UNKNOWN: f64 = 8e9;
    let limit = fs_err::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|text| text.trim().parse::<f64>().ok());
    let all = fs_err::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("MemTotal:"))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        });
    let all = all.map(|kib| kib * 1024.0);
    match (all, limit) {
        (Some(all), Some(limit)) => all.min(limit),
        (all, limit) => all.or(limit).unwrap_or(UNKNOWN),
    }
}
