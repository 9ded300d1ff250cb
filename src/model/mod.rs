//! The decoder: weights, saved activations, forward and backward, one line per equation.
//!
//! Knows no file format and no network. Start at [`decoder::Decoder`]; each sub-layer has its weights, its activations
//! (saved by forward, read by backward) and its temporaries (shared by all layers) in separate structs.

pub mod adapter;
pub mod attention;
pub mod block;
pub mod decoder;
pub mod gated_delta;
pub mod mlp;
pub mod moe;
pub mod random_weights;
pub mod rope;
pub mod weights;

use crate::error::Result;
use crate::ops::{Ops, StepState};
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// What every forward and backward is given: the device, the adapter's values, the step.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// The device.
    pub ops: &'a dyn Ops,
    /// The adapter's arena.
    pub lora: &'a Tensor,
    /// The micro-batch.
    pub state: &'a StepState,
}

/// Allocates buffers of token rows.
#[derive(Debug)]
pub struct Rows<'a> {
    arena: &'a mut Arena,
    capacity: usize,
    activation: DType,
}

impl<'a> Rows<'a> {
    /// Buffers for up to `capacity` tokens, activations as `activation`.
    pub fn new(arena: &'a mut Arena, capacity: usize, activation: DType) -> Self {
        Self {
            arena,
            capacity,
            activation,
        }
    }

    /// `[capacity, width]` activations.
    pub(crate) fn activation(&mut self, name: &str, width: usize) -> Result<Tensor> {
        self.arena
            .alloc(name, &[self.capacity, width], self.activation)
    }

    /// `[capacity, width]` f32.
    pub(crate) fn f32(&mut self, name: &str, width: usize) -> Result<Tensor> {
        self.arena.alloc(name, &[self.capacity, width], DType::F32)
    }

    /// `[capacity * copies, width]` activations: one row per token and expert.
    pub(crate) fn routed(&mut self, name: &str, copies: usize, width: usize) -> Result<Tensor> {
        self.arena
            .alloc(name, &[self.capacity * copies, width], self.activation)
    }

    /// `[rows of u32]`.
    pub(crate) fn u32(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.arena.alloc(name, shape, DType::U32)
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Runs `f` with `name` put before the names it allocates.
    pub(crate) fn scope<T>(
        &mut self,
        name: impl Into<String>,
        f: impl FnOnce(&mut Rows<'_>) -> Result<T>,
    ) -> Result<T> {
        let (capacity, activation) = (self.capacity, self.activation);
        self.arena.scope(name, |arena| {
            f(&mut Rows {
                arena,
                capacity,
                activation,
            })
        })
    }
}
