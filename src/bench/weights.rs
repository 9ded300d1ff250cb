//! Random base weights at any size: one random matrix of each shape, handed out again and again.

use std::collections::BTreeMap;

use half::bf16;

use crate::error::Result;
use crate::model::random_weights::RandomWeights;
use crate::model::weights::WeightSource;
use crate::random::{Draws, Stream};
use crate::store::Weight;
use crate::store::nf4::Nf4Matrix;
use crate::store::quantized::QuantizePolicy;
use crate::tensor::{DType, Tensor};

/// Weights of a benchmark. Each place gets memory of its own, so traffic is that of real weights; their values repeat.
/// Routers are drawn layer by layer, so that each spreads its tokens in its own way.
#[derive(Debug)]
pub(super) struct BenchWeights {
    policy: QuantizePolicy,
    seed: u64,
    made: BTreeMap<(usize, usize, bool), Weight>,
}

impl BenchWeights {
    pub(super) fn new(policy: QuantizePolicy, seed: u64) -> Self {
        Self {
            policy,
            seed,
            made: BTreeMap::new(),
        }
    }
}

impl WeightSource for BenchWeights {
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        if name.ends_with(".mlp.gate.weight") {
            return RandomWeights::new(self.seed).matrix(name, out_features, in_features);
        }
        let is_nf4 = self.policy.quantizes(name.trim_end_matches(".weight"));
        let key = (out_features, in_features, is_nf4);
        if let Some(weight) = self.made.get(&key) {
            return Ok(weight.clone());
        }
        let subsequence = (out_features as u64) << 32 | in_features as u64;
        let mut draws = Draws::new(self.seed, Stream::Synthetic, subsequence);
        let scale = 1.0 / (in_features as f32).sqrt();
        let values = (0..out_features * in_features).map(|_| scale * draws.next_normal());
        let shape = [out_features, in_features];
        let weight = if is_nf4 {
            let values: Vec<f32> = values.collect();
            let double_quant = self.policy.double_quant();
            Weight::Nf4(Nf4Matrix::quantize(name, &values, shape, double_quant)?)
        } else {
            let values: Vec<u8> = values
                .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                .collect();
            let mut tensor = Tensor::zeros(name, &shape, DType::Bf16);
            tensor.write_bytes(&values)?;
            Weight::Dense(tensor)
        };
        self.made.insert(key, weight.clone());
        Ok(weight)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        RandomWeights::new(self.seed).tensor(name, shape)
    }
}
