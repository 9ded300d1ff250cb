//! The CPU backend: f32, rayon over fixed blocks, bits that do not depend on the number of threads.
//!
//! The default where no GPU is there, and the reference that GPU kernels are compared with. One file per op family;
//! `ops.rs` maps `Ops` onto them.
#![expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "methods of `Cpu` take `&self`, as `Ops` does"
)]

mod adamw;
mod adamw8;
mod attention;
mod cross_entropy;
mod delta_inputs;
mod elementwise;
mod gated_delta;
mod gemm;
mod linear;
mod lora;
mod moe;
mod norm;
mod ops;
mod rope;
mod route;

use std::borrow::Cow;

use half::bf16;

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The CPU as a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    round_bf16: bool,
}

impl Cpu {
    /// f32 throughout.
    pub fn new() -> Self {
        Self { round_bf16: false }
    }

    /// f32 arithmetic, with weights and activations rounded to bf16 where a GPU stores them: what a bf16 run can at
    /// best agree with.
    pub fn with_bf16_rounding() -> Self {
        Self { round_bf16: true }
    }

    fn rounds_to_bf16(self) -> bool {
        self.round_bf16
    }

    /// Rounds an activation where a GPU would store it.
    fn round(self, values: &mut [f32]) {
        if self.round_bf16 {
            values
                .iter_mut()
                .for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
    }

    fn rounded_value(self, value: f32) -> f32 {
        if self.round_bf16 {
            bf16::from_f32(value).to_f32()
        } else {
            value
        }
    }

    /// [`Self::round`] on the leading `cols` of `rows` rows of `stride` elements.
    fn round_columns(self, values: &mut [f32], rows: usize, cols: usize, stride: usize) {
        if self.round_bf16 {
            values
                .chunks_mut(stride)
                .take(rows)
                .for_each(|row| self.round(&mut row[..cols]));
        }
    }

    fn rounded(self, values: &[f32]) -> Cow<'_, [f32]> {
        if !self.round_bf16 {
            return Cow::Borrowed(values);
        }
        let mut values = values.to_vec();
        self.round(&mut values);
        Cow::Owned(values)
    }

    /// The first `rows` rows of a tensor whose rows have `width` elements.
    #[expect(clippy::unused_self, reason = "reads as the device's own memory")]
    fn rows<'a>(
        &self,
        op: &'static str,
        tensor: &'a Tensor,
        rows: usize,
        width: usize,
    ) -> Result<&'a [f32]> {
        check_rows(op, tensor, rows, width)?;
        Ok(&tensor.f32()?[..rows * width])
    }

    /// [`Self::rows`], to be written.
    #[expect(clippy::unused_self, reason = "reads as the device's own memory")]
    fn rows_mut<'a>(
        &self,
        op: &'static str,
        tensor: &'a mut Tensor,
        rows: usize,
        width: usize,
    ) -> Result<&'a mut [f32]> {
        check_rows(op, tensor, rows, width)?;
        Ok(&mut tensor.f32_mut()?[..rows * width])
    }
}

fn check_rows(op: &'static str, tensor: &Tensor, rows: usize, width: usize) -> Result<()> {
    let shape = tensor.shape();
    let capacity = shape.first().copied().unwrap_or(0);
    if capacity >= rows && shape[1..].iter().product::<usize>() == width {
        return Ok(());
    }
    let (tensor, found) = (tensor.name().to_owned(), shape.to_vec());
    Err(Error::Shape {
        op,
        tensor,
        found,
        expected: vec![rows, width],
    })
}

fn add_assign(out: &mut [f32], values: &[f32]) {
    out.iter_mut()
        .zip(values)
        .for_each(|(out, value)| *out += value);
}

#[inline]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[inline]
fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}
