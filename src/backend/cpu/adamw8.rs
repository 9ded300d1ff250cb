//! Moments in 8 bits (Dettmers et al. 2022): in blocks of 256, codes of the dynamic map times the block's largest magnitude.

use crate::error::Result;
use crate::ops::MOMENTS_BLOCKSIZE;
use crate::ops::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use crate::tensor::Tensor;

/// First and second moments of one task.
pub(super) struct Moments8<'a> {
    pub(super) m: Blocks8<'a>,
    pub(super) v: Blocks8<'a>,
}

impl Moments8<'_> {
    /// Calls `f` with block `index` in f32, and puts back what it leaves there.
    pub(super) fn with_block(&mut self, index: usize, f: impl FnOnce(&mut [f32], &mut [f32])) {
        let (mut m, mut v) = ([0.0; MOMENTS_BLOCKSIZE], [0.0; MOMENTS_BLOCKSIZE]);
        let m = self.m.decode(index, &SIGNED, &mut m);
        let v = self.v.decode(index, &UNSIGNED, &mut v);
        f(m, v);
        self.m.encode(index, &SIGNED, m);
        self.v.encode(index, &UNSIGNED, v);
    }
}

/// Blocks of one moment.
pub(super) struct Blocks8<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<'a> Blocks8<'a> {
    /// `codes` and `absmax` cut into pieces of `len` codes, a multiple of the block size.
    pub(super) fn chunks(
        codes: &'a mut Tensor,
        absmax: &'a mut Tensor,
        len: usize,
    ) -> Result<Vec<Self>> {
        absmax.expect_shape("adamw", &[codes.len().div_ceil(MOMENTS_BLOCKSIZE)])?;
        let absmax = absmax.f32_mut()?.chunks_mut(len / MOMENTS_BLOCKSIZE);
        let chunks = codes.u8_mut()?.chunks_mut(len).zip(absmax);
        Ok(chunks
            .map(|(codes, absmax)| Self { codes, absmax })
            .collect())
    }

    fn block(&mut self, index: usize) -> &mut [u8] {
        let first = index * MOMENTS_BLOCKSIZE;
        let end = self.codes.len().min(first + MOMENTS_BLOCKSIZE);
        &mut self.codes[first..end]
    }

    fn decode<'b>(
        &mut self,
        index: usize,
        map: &DynamicMap,
        out: &'b mut [f32; MOMENTS_BLOCKSIZE],
    ) -> &'b mut [f32] {
        let absmax = self.absmax[index];
        let codes = self.block(index);
        let out = &mut out[..codes.len()];
        for (out, code) in out.iter_mut().zip(codes) {
            *out = map.code[usize::from(*code)] * absmax;
        }
        out
    }

    fn encode(&mut self, index: usize, map: &DynamicMap, values: &[f32]) {
        let absmax = values
            .iter()
            .fold(0.0_f32, |max, value| max.max(value.abs()));
        self.absmax[index] = absmax;
        let inverse = if absmax >= f32::MIN_POSITIVE {
            1.0 / absmax
        } else {
            0.0
        };
        for (code, value) in self.block(index).iter_mut().zip(values) {
            *code = map.nearest(value * inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_keeps_its_largest_value_and_no_second_moment_becomes_0() {
        let (mut codes, mut absmax) = ([7; 4], [0.0]);
        let mut blocks = Blocks8 {
            codes: &mut codes,
            absmax: &mut absmax,
        };
        let mut wide = [0.0; MOMENTS_BLOCKSIZE];
        blocks.encode(0, &UNSIGNED, &[3e-5, 0.0, 1e-15, 1.5e-5]);
        let found = blocks.decode(0, &UNSIGNED, &mut wide).to_vec();
        let exact = [found[0].to_bits(), found[1].to_bits()];
        assert_eq!(exact, [3e-5_f32.to_bits(), 0]);
        assert!(found[2] > 0.0 && (found[3] / 1.5e-5 - 1.0).abs() < 0.01);
        blocks.encode(0, &SIGNED, &[0.0; 4]);
        assert_eq!(blocks.decode(0, &SIGNED, &mut wide), [0.0; 4]);
        assert_eq!(codes, [127; 4]);
    }
}
