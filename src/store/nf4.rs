//! NF4, the 4-bit `NormalFloat` of QLoRA (Dettmers et al. 2023, app. E), as bitsandbytes lays it out.

use crate::tensor::Tensor;

/// A matrix `[out_features, in_features]` in NF4 blocks of 64 consecutive elements of the flattened matrix.
///
/// `w[i] = CODEBOOK[code(i)] * absmax(i / 64)`, where byte `j` of `codes` holds element `2 j` in its high half.
#[derive(Debug, Clone)]
pub struct Nf4Matrix {
    /// Rows.
    pub out_features: usize,
    /// Columns.
    pub in_features: usize,
    /// `[ceil(out_features * in_features / 2)]` u8.
    pub codes: Tensor,
    /// Scale of each block.
    pub absmax: Absmax,
}

/// Block scales.
#[derive(Debug, Clone)]
pub enum Absmax {
    /// `[num_blocks]` f32.
    Plain(Tensor),
    /// Double quantisation: `absmax[b] = DYNAMIC_CODE[codes[b]] * nested_absmax[b / 256] + offset`.
    Nested {
        /// `[num_blocks]` u8.
        codes: Tensor,
        /// `[ceil(num_blocks / 256)]` f32.
        nested_absmax: Tensor,
        /// Mean of the plain absmax.
        offset: f32,
    },
}

impl Nf4Matrix {
    /// x
    pub fn dequantize(
        &self,
        _range: std::ops::Range<usize>,
        _out: &mut [f32],
    ) -> crate::error::Result<()> {
        Ok(())
    }
}
