//! Random weights of any shape, for benchmarks and tests that need no checkpoint.

use super::weights::WeightSource;
use crate::error::Result;
use crate::random::{Draws, Stream};
use crate::store::Weight;
use crate::tensor::Tensor;

/// Weights drawn from `seed` and the tensor's name: matrices normal with deviation `1 / sqrt(in_features)`, vectors
/// near the value that keeps a signal's size.
#[derive(Debug, Clone, Copy)]
pub struct RandomWeights {
    seed: u64,
}

impl RandomWeights {
    /// Weights of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    fn draws(self, name: &str) -> Draws {
        let digest = blake3::hash(name.as_bytes());
        let subsequence = digest.as_bytes()[..8]
            .iter()
            .fold(0, |sum, b| (sum << 8) | u64::from(*b));
        Draws::new(self.seed, Stream::Synthetic, subsequence)
    }
}

impl WeightSource for RandomWeights {
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        let mut draws = self.draws(name);
        let scale = 1.0 / (in_features as f32).sqrt();
        let values = (0..out_features * in_features)
            .map(|_| scale * draws.next_normal())
            .collect();
        Ok(Weight::Dense(Tensor::from_f32(
            name,
            &[out_features, in_features],
            values,
        )?))
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut draws = self.draws(name);
        let values = (0..shape.iter().product::<usize>()).map(|_| 1.0 + 0.1 * draws.next_normal());
        Tensor::from_f32(name, shape, values.collect())
    }
}
