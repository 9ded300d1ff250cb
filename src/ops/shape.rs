//! Extents of an op's arguments, for a person: `[2048 -> 12288] nf4 r16`.

use super::{
    AdamWStep, AttentionSpec, DeltaSpec, Experts, GradOut, Linear, LoraPair, Moments, NormSpec,
    QkWeights, Routing, StepState,
};
use crate::store::Weight;
use crate::tensor::Tensor;

/// What an argument tells of a call's shape.
pub(super) trait Extents {
    /// What tells the shape by itself; the first argument that has it.
    fn extents(&self) -> Option<String> {
        None
    }

    /// Elements of a row, which tell the shape where nothing else does.
    fn row(&self) -> Option<usize> {
        None
    }
}

/// The shape of a call with `arguments`.
pub(super) fn of(arguments: &[&dyn Extents]) -> String {
    let told = arguments.iter().find_map(|argument| argument.extents());
    let row = || arguments.iter().find_map(|argument| argument.row());
    told.or_else(|| row().map(|row| format!("[{row}]")))
        .unwrap_or_default()
}

fn product(input: usize, outputs: &[usize], weight: &Weight, lora: Option<LoraPair>) -> String {
    let outputs: Vec<String> = outputs.iter().map(ToString::to_string).collect();
    let kind = match weight {
        Weight::Dense(tensor) => tensor.dtype().name(),
        Weight::Nf4(_) => "nf4",
    };
    let rank = lora.map_or(String::new(), |pair| format!(" r{}", pair.rank));
    format!("[{input} -> {}] {kind}{rank}", outputs.join("+"))
}

fn linears(linears: &[&Linear]) -> Option<String> {
    let first = linears.first()?;
    let outputs: Vec<usize> = linears.iter().map(|linear| linear.out_features).collect();
    Some(product(
        first.in_features,
        &outputs,
        &first.weight,
        first.lora,
    ))
}

impl Extents for &[&Linear] {
    fn extents(&self) -> Option<String> {
        linears(self)
    }
}

impl Extents for [&Linear; 2] {
    fn extents(&self) -> Option<String> {
        linears(self)
    }
}

impl Extents for &Experts {
    fn extents(&self) -> Option<String> {
        let (count, gate) = (self.gate.len(), self.gate.first()?);
        let outputs = [self.intermediate_size];
        let one = product(self.hidden_size, &outputs, gate, self.lora.gate);
        Some(format!("{count} x {one}"))
    }
}

impl Extents for AttentionSpec {
    fn extents(&self) -> Option<String> {
        let (heads, keys) = (self.num_attention_heads, self.num_key_value_heads);
        Some(format!("{heads}/{keys} x {}", self.head_dim))
    }
}

impl Extents for DeltaSpec {
    fn extents(&self) -> Option<String> {
        let (values, keys) = (self.num_value_heads, self.num_key_heads);
        Some(format!("{values}/{keys} x {}", self.key_head_dim))
    }
}

impl Extents for &Weight {
    fn extents(&self) -> Option<String> {
        let shape = match self {
            Weight::Dense(tensor) => tensor.shape().to_vec(),
            Weight::Nf4(matrix) => vec![matrix.out_features, matrix.in_features],
        };
        let extents: Vec<String> = shape.iter().map(ToString::to_string).collect();
        Some(format!("[{}]", extents.join(", ")))
    }
}

fn row(tensor: &Tensor) -> usize {
    match tensor.shape() {
        [len] => *len,
        shape => shape.iter().skip(1).product(),
    }
}

impl Extents for &Tensor {
    fn row(&self) -> Option<usize> {
        Some(row(self))
    }
}

impl Extents for &mut Tensor {
    fn row(&self) -> Option<usize> {
        Some(row(self))
    }
}

impl Extents for &mut Routing {
    fn extents(&self) -> Option<String> {
        let (experts, top) = (self.num_experts, self.num_experts_per_tok);
        Some(format!("top {top} of {experts}"))
    }
}

macro_rules! silent {
    ($($type:ty),+) => { $(impl Extents for $type {})+ };
}

silent!(
    &mut [&mut Tensor],
    &[&Tensor],
    &Routing,
    &StepState,
    &mut Moments,
    AdamWStep,
    NormSpec,
    QkWeights<'_>,
    bool,
    usize
);

impl Extents for GradOut<'_> {
    fn row(&self) -> Option<usize> {
        match self {
            GradOut::Skip => None,
            GradOut::Overwrite(tensor) | GradOut::Add(tensor) => Some(row(tensor)),
        }
    }
}
