//! What a run leaves: a PEFT adapter directory, or a merged Hugging Face checkpoint.
//!
//! Start at [`adapter::write`], [`adapter::read`] and [`merged::write`].

pub mod adapter;
mod card;
mod config;
pub mod merged;

use crate::config::AdapterDType;
use crate::model::adapter::{AdapterLayout, LoraModule};
use half::{bf16, f16};
use safetensors::Dtype;

/// What `adapter_config.json` is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeftVersion {
    /// transformers 4 with PEFT, and vLLM: experts are modules.
    Transformers4,
    /// transformers 5 with PEFT 0.21: experts are parameters.
    Transformers5,
}

/// Values of an adapter with what they belong to.
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a> {
    /// Modules and their places.
    pub layout: &'a AdapterLayout,
    /// The flat arena.
    pub values: &'a [f32],
}

impl Adapter<'_> {
    /// Rank of the files: one for all pairs, since vLLM knows only one. Smaller pairs are padded with zeros.
    fn file_rank(&self) -> usize {
        file_rank(self.layout)
    }

    /// Scaling that a reader computes from the file's rank and alpha.
    fn file_scaling(&self) -> f32 {
        let settings = self.layout.settings();
        settings.scaling(self.file_rank())
    }

    /// A as `[file_rank, in_features]` and B as `[out_features, file_rank]`, B scaled so that the file's scaling times
    /// it is the pair's own.
    fn padded(&self, module: &LoraModule) -> (Vec<f32>, Vec<f32>) {
        let pair = &module.pair;
        let (rank, wide) = (pair.rank, self.file_rank());
        let mut a = self.values[pair.a_range()].to_vec();
        let b = &self.values[pair.b_range()];
        if rank == wide {
            return (a, b.to_vec());
        }
        a.resize(wide * pair.in_features, 0.0);
        let factor = pair.scaling / self.file_scaling();
        let mut padded = vec![0.0; pair.out_features * wide];
        for (row, own) in padded.chunks_exact_mut(wide).zip(b.chunks_exact(rank)) {
            for (value, own) in row.iter_mut().zip(own) {
                *value = own * factor;
            }
        }
        (a, padded)
    }
}

fn file_rank(layout: &AdapterLayout) -> usize {
    let ranks = layout.modules().iter().map(|module| module.pair.rank);
    ranks.max().unwrap_or(0)
}

/// Little-endian bytes of `values` as `dtype`, rounded to nearest even.
fn narrowed(values: &[f32], dtype: Dtype) -> Vec<u8> {
    if dtype == Dtype::BF16 {
        let halves = values.iter().map(|value| bf16::from_f32(*value));
        halves.flat_map(bf16::to_le_bytes).collect()
    } else if dtype == Dtype::F16 {
        let halves = values.iter().map(|value| f16::from_f32(*value));
        halves.flat_map(f16::to_le_bytes).collect()
    } else {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }
}

fn file_dtype(dtype: AdapterDType) -> Dtype {
    match dtype {
        AdapterDType::Bf16 => Dtype::BF16,
        AdapterDType::F16 => Dtype::F16,
        AdapterDType::F32 => Dtype::F32,
    }
}
