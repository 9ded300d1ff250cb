//! What the optimizer is told and what it keeps.

use crate::error::Result;
use crate::random::{self, Stream};
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// Elements of 8-bit moments that share a scale.
pub const MOMENTS_BLOCKSIZE: usize = 256;

/// The moments of `n` parameters.
#[derive(Debug)]
pub enum Moments {
    /// As they are.
    F32 {
        /// `[n]` f32.
        exp_avg: Tensor,
        /// `[n]` f32.
        exp_avg_sq: Tensor,
    },
    /// In blocks of [`MOMENTS_BLOCKSIZE`] elements: a code each, times the largest magnitude of the block.
    Blockwise8 {
        /// `[n]` u8, codes of the signed dynamic map.
        exp_avg: Tensor,
        /// `[n / 256]` f32, rounded up.
        exp_avg_absmax: Tensor,
        /// `[n]` u8, codes of the unsigned dynamic map.
        exp_avg_sq: Tensor,
        /// `[n / 256]` f32, rounded up.
        exp_avg_sq_absmax: Tensor,
    },
}

impl Moments {
    /// Memory for the moments of `len` parameters, in 8 bits or f32.
    ///
    /// # Errors
    /// Those of the arena.
    pub fn alloc(arena: &mut Arena, len: usize, in_8bit: bool) -> Result<Self> {
        let scales = [len.div_ceil(MOMENTS_BLOCKSIZE)];
        Ok(if in_8bit {
            Self::Blockwise8 {
                exp_avg: arena.alloc("exp_avg", &[len], DType::U8)?,
                exp_avg_absmax: arena.alloc("exp_avg_absmax", &scales, DType::F32)?,
                exp_avg_sq: arena.alloc("exp_avg_sq", &[len], DType::U8)?,
                exp_avg_sq_absmax: arena.alloc("exp_avg_sq_absmax", &scales, DType::F32)?,
            }
        } else {
            Self::F32 {
                exp_avg: arena.alloc("exp_avg", &[len], DType::F32)?,
                exp_avg_sq: arena.alloc("exp_avg_sq", &[len], DType::F32)?,
            }
        })
    }

    /// The tensors and their names in a checkpoint. All zero bytes: no steps yet.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::F32 {
                exp_avg,
                exp_avg_sq,
            } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            Self::Blockwise8 {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => vec![
                ("exp_avg", exp_avg),
                ("exp_avg_absmax", exp_avg_absmax),
                ("exp_avg_sq", exp_avg_sq),
                ("exp_avg_sq_absmax", exp_avg_sq_absmax),
            ],
        }
    }

    /// [`Self::tensors`], to be written.
    pub fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        match self {
            Self::F32 {
                exp_avg,
                exp_avg_sq,
            } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            Self::Blockwise8 {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => vec![
                ("exp_avg", exp_avg),
                ("exp_avg_absmax", exp_avg_absmax),
                ("exp_avg_sq", exp_avg_sq),
                ("exp_avg_sq_absmax", exp_avg_sq_absmax),
            ],
        }
    }
}

/// `AdamW`'s constants for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Clip the global norm to this; 0: do not clip.
    pub max_grad_norm: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// Run seed, for the rounding of bf16 parameters.
    pub seed: u64,
}

/// What an update computes with, in f32 as its state is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConstants {
    /// `1 - learning_rate weight_decay`.
    pub decay: f32,
    /// `1 - beta1`, rounded once: `1 - f32(0.999)` would be off by 5e-5.
    pub weight1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub weight2: f32,
    /// `learning_rate / (1 - beta1^t)`.
    pub step_size: f32,
    /// `sqrt(1 - beta2^t)`.
    pub root_bias: f32,
    /// `epsilon`.
    pub epsilon: f32,
    /// Philox key of the rounding's draws.
    pub rounding_key: [u32; 2],
    /// Counter of the rounding's draws.
    pub step: u32,
}

impl AdamWStep {
    /// The constants, the same on every device.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "constants are meant to be rounded to f32"
    )]
    pub fn constants(&self) -> AdamWConstants {
        let count = self.step as f64;
        let bias1 = 1.0 - self.beta1.powf(count);
        let bias2 = 1.0 - self.beta2.powf(count);
        let [low, high] = random::key(self.seed);
        AdamWConstants {
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            weight1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            weight2: (1.0 - self.beta2) as f32,
            step_size: (self.learning_rate / bias1) as f32,
            root_bias: bias2.sqrt() as f32,
            epsilon: self.epsilon as f32,
            rounding_key: [low ^ (Stream::Rounding as u32) << 24, high],
            step: u32::try_from(self.step).unwrap_or(u32::MAX),
        }
    }
}

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateReport {
    /// Sum of the target tokens' losses over the step.
    pub loss_sum: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The update was made; it is not where loss or norm is not finite.
    pub applied: bool,
}
