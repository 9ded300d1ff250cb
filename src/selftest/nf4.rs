//! Cases of `nf4`: quantisation is equal to the host's, bit for bit.

use super::stage::{Stage, scaled, values};
use super::{Case, Outputs};
use crate::error::Result;
use crate::store::Weight;
use crate::store::nf4::{Absmax, Nf4Matrix};
use crate::tensor::Tensor;

/// Extents of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: usize,
    cols: usize,
    is_f32: bool,
    double_quant: bool,
}

impl Shape {
    fn label(self) -> String {
        let dtype = if self.is_f32 { "f32" } else { "bf16" };
        let nested = if self.double_quant { " nested" } else { "" };
        format!("{}x{} {dtype}{nested}", self.rows, self.cols)
    }

    /// Of many magnitudes, with zeros, blocks of zeros, and a block of subnormals.
    fn values(self) -> Vec<f32> {
        let len = self.rows * self.cols;
        let mut all = scaled(len, 1, 0.015_625);
        if self.is_f32 {
            let fraction = values(len, 2);
            all.iter_mut()
                .zip(fraction)
                .for_each(|(value, fraction)| *value *= 1.0 + fraction / 3.0);
        }
        for (index, value) in all.iter_mut().enumerate() {
            match index / 64 % 7 {
                1 => *value = 0.0,
                2 => *value *= 64.0,
                3 if index % 5 == 0 => *value = 0.0,
                4 => *value *= 1.0e-20_f32 * 1.0e-20,
                _ => {}
            }
            if !self.is_f32 {
                *value = half::bf16::from_f32(*value).to_f32();
            }
        }
        all
    }

    fn tensor(self, stage: &Stage<'_>) -> Result<Tensor> {
        let shape = [self.rows, self.cols];
        if self.is_f32 {
            stage.f32("w", &shape, &self.values())
        } else {
            stage.activation("w", &shape, &self.values())
        }
    }
}

fn bytes(values: &[u8]) -> Vec<u32> {
    values.iter().map(|value| u32::from(*value)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Codes and scales, in one order for host and device.
fn outputs(matrix: &Nf4Matrix) -> Result<Outputs> {
    let outputs = Outputs::new().exact("codes", bytes(&matrix.codes.bytes()?));
    match &matrix.absmax {
        Absmax::Plain(absmax) => Ok(outputs.exact("absmax", bits(&absmax.to_f32_vec()?))),
        Absmax::Nested {
            codes,
            nested_absmax,
            offset,
        } => {
            let mut scales = nested_absmax.to_f32_vec()?;
            let mut offsets = vec![*offset; scales.len()];
            if nested_absmax.is_on_device() {
                // Pairs of scale and offset.
                offsets = scales.iter().skip(1).step_by(2).copied().collect();
                scales = scales.into_iter().step_by(2).collect();
            }
            Ok(outputs
                .exact("absmax", bytes(&codes.bytes()?))
                .exact("nested_absmax", bits(&scales))
                .exact("offset", bits(&offsets)))
        }
    }
}

fn quantize(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let tensor = shape.tensor(stage)?;
        match stage.ops.quantize(&tensor, shape.double_quant)? {
            Weight::Nf4(matrix) => outputs(&matrix),
            Weight::Dense(_) => Ok(Outputs::new()),
        }
    };
    let oracle = move || {
        let extents = [shape.rows, shape.cols];
        let matrix = Nf4Matrix::quantize("w", &shape.values(), extents, shape.double_quant);
        matrix
            .and_then(|matrix| outputs(&matrix))
            .unwrap_or_default()
    };
    Case::new("nf4_quantize", shape.label(), run, oracle)
}

/// One bad weight is an error on every device.
fn refuses(value: f32, at: usize) -> Case {
    let run = move |stage: &Stage<'_>| {
        let mut all = values(3 * 1000, 1);
        all[at] = value;
        let tensor = stage.f32("w", &[3, 1000], &all)?;
        let is_refused = stage.ops.quantize(&tensor, true).is_err();
        Ok(Outputs::new().exact("is_refused", vec![u32::from(is_refused)]))
    };
    let oracle = || Outputs::new().exact("is_refused", vec![1]);
    Case::new("nf4_quantize", format!("{value} at {at}"), run, oracle)
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols) in [(1, 1), (3, 21), (5, 64), (7, 129), (61, 1031), (130, 512)] {
        for is_f32 in [false, true] {
            for double_quant in [false, true] {
                cases.push(quantize(Shape {
                    rows,
                    cols,
                    is_f32,
                    double_quant,
                }));
            }
        }
    }
    cases.push(refuses(f32::NAN, 0));
    cases.push(refuses(f32::INFINITY, 2999));
    cases.push(refuses(f32::NEG_INFINITY, 1777));
    cases
}
