//! `AdamW` over the flat arena (Loshchilov and Hutter 2019), as `PyTorch` computes it, with global-norm clipping.
//!
//! Sums have the order of the CUDA kernels (`kernels/adamw.cu`), and the rest is one rounding per operation on both: results are
//! equal bit for bit.

use half::bf16;
use rayon::prelude::*;

use super::adamw8::{Blocks8, Moments8};
use crate::error::Result;
use crate::ops::{AdamWConstants, AdamWStep, MOMENTS_BLOCKSIZE, Moments, UpdateReport};
use crate::random;
use crate::tensor::{DType, Tensor};

/// Elements per task and per partial sum.
const CHUNK: usize = 8192;
/// Running sums of a chunk: element `i` goes to number `i % LANES`.
const LANES: usize = 1024;

pub(super) fn step(
    params: &mut Tensor,
    moments: &mut Moments,
    grads: &mut Tensor,
    token_loss: &Tensor,
    step: AdamWStep,
) -> Result<UpdateReport> {
    grads.expect_shape("adamw", params.shape())?;
    let grads = grads.f32_mut()?;
    let grad_norm = sum(grads, |grad| f64::from(grad).powi(2)).sqrt();
    let loss_sum = sum(token_loss.f32()?, f64::from);
    let applied = grad_norm.is_finite() && loss_sum.is_finite();
    if applied {
        let update = Update {
            clip: clip(grad_norm, step.max_grad_norm),
            constants: step.constants(),
        };
        let moments = moment_chunks(moments, params.shape())?;
        let params = param_chunks(params)?;
        let grads = grads.par_chunks_mut(CHUNK).enumerate();
        (params, moments).into_par_iter().zip(grads).for_each(
            |((params, moments), (index, grads))| {
                update.chunk(params, moments, grads, index * CHUNK);
            },
        );
    }
    Ok(UpdateReport {
        loss_sum,
        grad_norm,
        applied,
    })
}

/// `PyTorch`'s `clip_grad_norm_` has the 1e-6.
#[expect(clippy::cast_possible_truncation, reason = "a factor in f32")]
fn clip(grad_norm: f64, limit: f64) -> f32 {
    match limit {
        limit if limit > 0.0 => (limit / (grad_norm + 1e-6)).min(1.0) as f32,
        _ => 1.0,
    }
}

/// Sum of `term` over `values`, in an order that does not depend on the number of threads.
fn sum(values: &[f32], term: impl Fn(f32) -> f64 + Sync) -> f64 {
    let partial: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| sum_of_lanes(chunk.iter().map(|value| term(*value))))
        .collect();
    sum_of_lanes(partial.into_iter())
}

/// Lanes are summed by fours (a thread), those in a tree over 32 (a warp), and those one after the other.
fn sum_of_lanes(terms: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; LANES];
    for (index, term) in terms.enumerate() {
        lanes[index % LANES] += term;
    }
    let threads = lanes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|[a, b, c, d]| (a + b) + (c + d));
    let threads: Vec<f64> = threads.collect();
    let warp_sum = |warp: &[f64; 32]| {
        let mut warp = *warp;
        for half in [16, 8, 4, 2, 1] {
            for lane in 0..half {
                warp[lane] += warp[lane + half];
            }
        }
        warp[0]
    };
    threads.as_chunks().0.iter().map(warp_sum).sum()
}

/// Parameters of one task.
enum ParamChunk<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

/// Moments of one task.
enum MomentChunk<'a> {
    F32(&'a mut [f32], &'a mut [f32]),
    Blockwise8(Moments8<'a>),
}

fn param_chunks(params: &mut Tensor) -> Result<Vec<ParamChunk<'_>>> {
    Ok(if params.dtype() == DType::Bf16 {
        let chunks = params.bf16_mut()?.chunks_mut(CHUNK);
        chunks.map(ParamChunk::Bf16).collect()
    } else {
        let chunks = params.f32_mut()?.chunks_mut(CHUNK);
        chunks.map(ParamChunk::F32).collect()
    })
}

fn moment_chunks<'a>(moments: &'a mut Moments, shape: &[usize]) -> Result<Vec<MomentChunk<'a>>> {
    let (Moments::F32 {
        exp_avg,
        exp_avg_sq,
    }
    | Moments::Blockwise8 {
        exp_avg,
        exp_avg_sq,
        ..
    }) = &*moments;
    exp_avg.expect_shape("adamw", shape)?;
    exp_avg_sq.expect_shape("adamw", shape)?;
    Ok(match moments {
        Moments::F32 {
            exp_avg,
            exp_avg_sq,
        } => {
            let m = exp_avg.f32_mut()?.chunks_mut(CHUNK);
            let v = exp_avg_sq.f32_mut()?.chunks_mut(CHUNK);
            m.zip(v).map(|(m, v)| MomentChunk::F32(m, v)).collect()
        }
        Moments::Blockwise8 {
            exp_avg,
            exp_avg_absmax,
            exp_avg_sq,
            exp_avg_sq_absmax,
        } => {
            let m = Blocks8::chunks(exp_avg, exp_avg_absmax, CHUNK)?;
            let v = Blocks8::chunks(exp_avg_sq, exp_avg_sq_absmax, CHUNK)?;
            let chunks = m.into_iter().zip(v);
            chunks
                .map(|(m, v)| MomentChunk::Blockwise8(Moments8 { m, v }))
                .collect()
        }
    })
}

/// One update, for every part of the arena.
struct Update {
    clip: f32,
    constants: AdamWConstants,
}

impl Update {
    /// `first`: place of the chunk's first element in the arena.
    fn chunk(
        &self,
        mut params: ParamChunk<'_>,
        mut moments: MomentChunk<'_>,
        grads: &mut [f32],
        first: usize,
    ) {
        for (index, grads) in grads.chunks_mut(MOMENTS_BLOCKSIZE).enumerate() {
            let range = index * MOMENTS_BLOCKSIZE..index * MOMENTS_BLOCKSIZE + grads.len();
            self.with_params(
                &mut params,
                range.clone(),
                first,
                |params| match &mut moments {
                    MomentChunk::F32(m, v) => {
                        self.block(params, grads, &mut m[range.clone()], &mut v[range]);
                    }
                    MomentChunk::Blockwise8(moments) => moments.with_block(index, |m, v| {
                        self.block(params, grads, m, v);
                    }),
                },
            );
            grads.fill(0.0);
        }
    }

    /// Calls `f` with parameters `range` of the chunk in f32, and puts back what it leaves there.
    fn with_params(
        &self,
        params: &mut ParamChunk<'_>,
        range: std::ops::Range<usize>,
        first: usize,
        f: impl FnOnce(&mut [f32]),
    ) {
        match params {
            ParamChunk::F32(params) => f(&mut params[range]),
            ParamChunk::Bf16(params) => {
                let first = first + range.start;
                let params = &mut params[range];
                let mut wide = [0.0; MOMENTS_BLOCKSIZE];
                let wide = &mut wide[..params.len()];
                for (wide, param) in wide.iter_mut().zip(&*params) {
                    *wide = param.to_f32();
                }
                f(wide);
                self.round(params, wide, first);
            }
        }
    }

    /// The draws of elements `4 q .. 4 q + 4` are those of counter `[q, t]`.
    fn round(&self, params: &mut [bf16], wide: &[f32], first: usize) {
        let AdamWConstants {
            rounding_key, step, ..
        } = self.constants;
        for (index, (params, wide)) in params.chunks_mut(4).zip(wide.chunks(4)).enumerate() {
            let [low, high] = random::key((first / 4 + index) as u64);
            let random = random::philox4x32([low, high, 0, step], rounding_key);
            for ((param, wide), random) in params.iter_mut().zip(wide).zip(random) {
                *param = rounded_stochastically(*wide, random);
            }
        }
    }

    fn block(&self, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
        let constants = &self.constants;
        for (((param, grad), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            let grad = grad * self.clip;
            *param *= constants.decay;
            *m += (grad - *m) * constants.weight1;
            *v = *v * constants.beta2 + grad * grad * constants.weight2;
            *param -=
                constants.step_size * *m / (v.sqrt() / constants.root_bias + constants.epsilon);
        }
    }
}

/// To the bf16 above or below in magnitude, the nearer one more often: 16 random bits are added below the last bit that stays.
fn rounded_stochastically(value: f32, random: u32) -> bf16 {
    if value.is_nan() {
        return bf16::from_f32(value);
    }
    bf16::from_bits(((value.to_bits() + (random & 0xFFFF)) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Draws, Stream};

    #[test]
    fn sums_are_right_at_every_length() {
        let values: Vec<f32> = (0..20_000_u16).map(f32::from).collect();
        for len in [0_usize, 1, 3, 4, 5, 1023, 1025, 8191, 8192, 8193, 20_000] {
            let expected = (len * len.saturating_sub(1) / 2) as f64;
            let found = sum(&values[..len], f64::from);
            assert!((found - expected).abs() < 0.5, "{len}: {found} {expected}");
        }
    }

    #[test]
    fn stochastic_rounding_keeps_the_mean_and_what_a_bf16_can_hold() {
        let mut draws = Draws::new(1, Stream::Synthetic, 0);
        for value in [1.0_f32, -2.5, 0.0, f32::INFINITY] {
            let rounded = rounded_stochastically(value, draws.next_u32());
            assert_eq!(rounded.to_f32().to_bits(), value.to_bits());
        }
        for value in [1.001_f32, -3.017, 1e-20] {
            let count = 40_000;
            let total: f64 = (0..count)
                .map(|_| f64::from(rounded_stochastically(value, draws.next_u32()).to_f32()))
                .sum();
            let error = (total / f64::from(count) / f64::from(value) - 1.0).abs();
            // Standard deviation of the mean: at most half a step of 2^-7, over 200.
            assert!(error < 1e-4, "{value}: {error}");
        }
    }
}
