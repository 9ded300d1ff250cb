//! Tables of the rotary embedding.

use crate::config::model::{RopeConfig, RopeScaling};
use crate::error::Result;
use crate::tensor::Tensor;

/// Cosines and sines of every position's angles.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[positions, rotary_dim / 2]` f32.
    pub cos: Tensor,
    /// `[positions, rotary_dim / 2]` f32.
    pub sin: Tensor,
}

impl Rope {
    /// `angle[p, i] = p * inverse_frequency(i)`, computed in f32 as Hugging Face does.
    ///
    /// # Errors
    /// None that a checked config leads to.
    pub fn new(config: &RopeConfig, positions: usize) -> Result<Self> {
        let frequencies = inverse_frequencies(config);
        let angles = || {
            (0..positions).flat_map(|p| {
                frequencies
                    .iter()
                    .map(move |frequency| p as f32 * frequency)
            })
        };
        let shape = [positions, frequencies.len()];
        Ok(Self {
            cos: Tensor::from_f32("rope.cos", &shape, angles().map(f32::cos).collect())?,
            sin: Tensor::from_f32("rope.sin", &shape, angles().map(f32::sin).collect())?,
        })
    }
}

/// `theta^(-2i / rotary_dim)`, changed as the scaling says.
#[expect(
    clippy::cast_possible_truncation,
    reason = "frequencies are f32, as the reference has them"
)]
fn inverse_frequencies(config: &RopeConfig) -> Vec<f32> {
    let dim = config.rotary_dim as f32;
    (0..config.rotary_dim / 2)
        .map(|i| 1.0 / (config.theta as f32).powf((2 * i) as f32 / dim))
        .map(|frequency| match config.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let wavelength = std::f64::consts::TAU / f64::from(frequency);
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor as f32
                } else {
                    let smooth = (original / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    let frequency = f64::from(frequency);
                    ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
                }
            }
        })
        .collect()
}
