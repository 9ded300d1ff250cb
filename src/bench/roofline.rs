//! What the device itself reaches, measured before anything is held against it.

use std::time::{Duration, Instant};

use super::{Settings, Times};
use crate::backend::Opened;
use crate::config::model::ModelConfig;
use crate::data::Batch;
use crate::error::Result;
use crate::ops::cost::{self, Cost};
use crate::ops::{Linear, NormSpec, Ops, StepState};
use crate::random::{Draws, Stream};
use crate::store::Weight;
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// Times that are measured; the fastest counts.
const REPETITIONS: usize = 5;

/// Random numbers that are drawn; tensors repeat them.
const BLOCK: usize = 1 << 18;

/// Data sheets: part of a device's name, bytes and dense bf16 FLOPs in a second.
const DATA_SHEETS: [(&str, f64, f64); 9] = [
    ("H200", 4.8e12, 989e12),
    ("H100 PCIe", 2.0e12, 756e12),
    ("H100 NVL", 3.9e12, 835e12),
    ("H100", 3.35e12, 989e12),
    ("A100-SXM4-80GB", 2.04e12, 312e12),
    ("A100", 1.555e12, 312e12),
    ("L40S", 0.864e12, 362e12),
    ("RTX 4090", 1.008e12, 165e12),
    ("RTX 5090", 1.792e12, 209e12),
];

/// Limits of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Bytes in a second: the sum of two large tensors and its norm, read and written once.
    pub bandwidth: f64,
    /// FLOPs in a second: a large product in the type of activations.
    pub flops: f64,
}

impl Roofline {
    /// Measures `opened` with passes as `settings` and `model` have them, or with large ones on the CPU, which can do large tensors
    /// whatever is measured.
    ///
    /// # Errors
    /// Those of the device.
    pub fn measure(opened: &Opened, model: &ModelConfig, settings: &Settings) -> Result<Self> {
        let [rows, width] = match opened.info {
            None => [2048, 1024],
            Some(_) => [settings.tokens, 2 * model.hidden_size.next_multiple_of(64)],
        };
        let ops = &*opened.ops;
        let state = StepState {
            batch: Batch::next_token(vec![0; rows], rows),
            ..StepState::default()
        };
        // Outside a run: tensors come one by one, and there is no recording.
        ops.load_batch(&state)?;
        let mut arena = ops.arena(&Arena::plan())?;
        let mut draws = Draws::new(0, Stream::Synthetic, 2);
        let random: Vec<f32> = (0..BLOCK).map(|_| draws.next_normal()).collect();
        let mut new = |name: &str, shape: &[usize], dtype| -> Result<Tensor> {
            let mut tensor = arena.alloc(name, shape, dtype)?;
            // Zeros draw less power, so that clocks are higher than in a run.
            let len = tensor.len();
            for start in (0..len).step_by(BLOCK) {
                tensor.write_f32_at(start, &random[..BLOCK.min(len - start)])?;
            }
            Ok(tensor)
        };
        let kind = ops.activation_dtype();
        let shape = [rows, width];
        let (x, delta) = (new("x", &shape, kind)?, new("delta", &shape, kind)?);
        let (mut sum, mut out) = (new("sum", &shape, kind)?, new("out", &shape, kind)?);
        let mut rstd = new("rstd", &[rows, 1], DType::F32)?;
        let weight = new("weight", &[width], DType::F32)?;
        let spec = NormSpec {
            eps: 1e-6,
            zero_centered: false,
        };
        let cost = cost::elementwise(&[&sum, &out, &rstd, &x, &delta], &[&weight], &state);
        let seconds = fastest(ops, &mut || {
            ops.add_rms_norm_forward(
                &mut sum, &mut out, &mut rstd, &x, &delta, &weight, spec, &state,
            )
        })?;
        let bandwidth = cost.bytes as f64 / seconds;
        let linear = Linear {
            weight: Weight::Dense(new("product", &[width, width], kind)?),
            bias: None,
            lora: None,
            out_features: width,
            in_features: width,
            f32_output: false,
        };
        let (lora, mut xa) = (new("lora", &[8], DType::F32)?, new("xa", &[rows, 0], kind)?);
        let Cost { flops, .. } = cost::linear_forward(&[&out], &xa, &x, &[&linear], &lora, &state);
        let seconds = fastest(ops, &mut || {
            ops.linear_forward(&mut [&mut out], &mut xa, &x, &[&linear], &lora, &state)
        })?;
        Ok(Self {
            bandwidth,
            flops: flops as f64 / seconds,
        })
    }

    /// What the data sheet of a device with this name says, where it is known here.
    pub fn data_sheet(name: &str) -> Option<Self> {
        let found = DATA_SHEETS.iter().find(|(part, ..)| name.contains(part));
        found.map(|&(_, bandwidth, flops)| Self { bandwidth, flops })
    }

    /// Seconds that no implementation of an op of `cost` beats on this device.
    pub fn seconds(self, cost: Cost) -> f64 {
        (cost.flops as f64 / self.flops).max(cost.bytes as f64 / self.bandwidth)
    }

    /// Share of the limit that `times` reach.
    pub fn share(self, cost: Cost, times: Times) -> f64 {
        self.seconds(cost) / times.median_s.max(1e-12)
    }
}

fn fastest(ops: &dyn Ops, body: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    body()?;
    let mut fastest = Duration::MAX;
    for _ in 0..REPETITIONS {
        ops.synchronize()?;
        let begun = Instant::now();
        body()?;
        ops.synchronize()?;
        fastest = fastest.min(begun.elapsed());
    }
    Ok(fastest.as_secs_f64())
}
