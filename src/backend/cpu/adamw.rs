//! `AdamW` over the flat arena (Loshchilov and Hutter 2019), as `PyTorch` computes it, with global-norm clipping.

use rayon::prelude::*;

use crate::error::Result;
use crate::ops::{AdamWStep, UpdateReport};
use crate::tensor::Tensor;

/// Elements per task: fixed, so that the norm's sum has one order.
const BLOCK: usize = 1 << 16;

pub(super) fn step(
    params: &mut Tensor,
    exp_avg: &mut Tensor,
    exp_avg_sq: &mut Tensor,
    grads: &mut Tensor,
    token_loss: &Tensor,
    step: AdamWStep,
) -> Result<UpdateReport> {
    let grads = grads.f32_mut()?;
    let grad_norm = norm(grads);
    let loss_sum: f64 = token_loss.f32()?.iter().map(|loss| f64::from(*loss)).sum();
    let applied = grad_norm.is_finite() && loss_sum.is_finite();
    if applied {
        // PyTorch's clip_grad_norm_ has the 1e-6.
        let clip = match step.max_grad_norm {
            limit if limit > 0.0 => (limit / (grad_norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        let factors = Factors::new(step, clip);
        params
            .f32_mut()?
            .par_chunks_mut(BLOCK)
            .zip(grads.par_chunks(BLOCK))
            .zip(exp_avg.f32_mut()?.par_chunks_mut(BLOCK))
            .zip(exp_avg_sq.f32_mut()?.par_chunks_mut(BLOCK))
            .for_each(|(((params, grads), m), v)| factors.update(params, grads, m, v));
        grads
            .par_chunks_mut(BLOCK)
            .for_each(|grads| grads.fill(0.0));
    }
    Ok(UpdateReport {
        loss_sum,
        grad_norm,
        applied,
    })
}

fn norm(values: &[f32]) -> f64 {
    let blocks: Vec<f64> = values
        .par_chunks(BLOCK)
        .map(|block| block.iter().map(|value| f64::from(*value).powi(2)).sum())
        .collect();
    blocks.iter().sum::<f64>().sqrt()
}

/// The constants of one update, in f32 as the state is.
struct Factors {
    clip: f32,
    decay: f32,
    /// `1 - beta1`, rounded once: `1 - f32(0.999)` would be off by 5e-5.
    weight1: f32,
    beta2: f32,
    weight2: f32,
    step_size: f32,
    root_bias: f32,
    epsilon: f32,
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "constants are meant to be rounded to f32"
)]
impl Factors {
    fn new(step: AdamWStep, clip: f64) -> Self {
        let count = step.step as f64;
        let (bias1, bias2) = (1.0 - step.beta1.powf(count), 1.0 - step.beta2.powf(count));
        Self {
            clip: clip as f32,
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            weight1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            weight2: (1.0 - step.beta2) as f32,
            step_size: (step.learning_rate / bias1) as f32,
            root_bias: bias2.sqrt() as f32,
            epsilon: step.epsilon as f32,
        }
    }

    fn update(&self, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((param, grad), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            let grad = grad * self.clip;
            *param *= self.decay;
            *m += (grad - *m) * self.weight1;
            *v = *v * self.beta2 + grad * grad * self.weight2;
            *param -= self.step_size * *m / (v.sqrt() / self.root_bias + self.epsilon);
        }
    }
}
