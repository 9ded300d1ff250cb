//! Base weights: a Hugging Face checkpoint on disk, mapped into memory, and quantised to NF4 while it streams.
//!
//! `config.json + *.safetensors --mmap--> Checkpoint --quantize--> QuantizedStore`. Knows no model and no network.

pub mod checkpoint;
pub mod locate;
pub mod nf4;
pub mod quantized;

use crate::tensor::Tensor;

/// A frozen weight matrix `[out_features, in_features]`, as it is held.
#[derive(Debug, Clone)]
pub enum Weight {
    /// As stored: f32, bf16 or f16.
    Dense(Tensor),
    /// 4-bit `NormalFloat` blocks.
    Nf4(nf4::Nf4Matrix),
}
