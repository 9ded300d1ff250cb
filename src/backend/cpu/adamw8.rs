//! Moments in 8 bits (Dettmers et al. 2022): in blocks of 256, codes of the dynamic map times the block's largest magnitude.

use std::sync::LazyLock;

use crate::error::Result;
use crate::ops::MOMENTS_BLOCKSIZE;
use crate::store::nf4::dynamic;
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
        map: &Map,
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

    /// A second moment above 0 does not become 0, as it divides.
    fn encode(&mut self, index: usize, map: &Map, values: &[f32]) {
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
            let ratio = value * inverse;
            *code = map.nearest(ratio);
            if !map.signed && *code == 0 && ratio > 0.0 {
                *code = 1;
            }
        }
    }
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(&dynamic::CODE, true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(&dynamic::UNSIGNED_CODE, false));

/// A dynamic map and the borders between its codes: code `c` stands for `border[c] < value <= border[c + 1]`.
struct Map {
    code: &'static [f32; 256],
    border: [f32; 257],
    signed: bool,
}

impl Map {
    fn new(code: &'static [f32; 256], signed: bool) -> Self {
        let mut border = [f32::NEG_INFINITY; 257];
        border[256] = f32::INFINITY;
        for (border, pair) in border[1..].iter_mut().zip(code.windows(2)) {
            *border = 0.5 * (pair[0] + pair[1]);
        }
        Self {
            code,
            border,
            signed,
        }
    }

    /// The nearest code to `ratio` in `[-1, 1]`, the lower one of two. Decade and part follow from arithmetic, which may be one
    /// off at a border; the borders decide.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a part is at most 128"
    )]
    fn nearest(&self, ratio: f32) -> u8 {
        let mut scaled = ratio.abs();
        let mut num_parts = if self.signed { 64 } else { 128 };
        for _ in 0..6 {
            if scaled <= 0.1 {
                scaled *= 10.0;
                num_parts /= 2;
            }
        }
        let part = ((scaled - 0.1).max(0.0) * (1.0 / 0.9) * num_parts as f32) as i32;
        let rank = num_parts - 1 + part;
        let guess = match (self.signed, ratio < 0.0) {
            (false, _) => rank,
            (true, false) => 128 + rank,
            (true, true) => 126 - rank,
        };
        let code = guess.clamp(0, 255) as usize;
        let above = usize::from(ratio > self.border[code + 1]);
        let below = usize::from(ratio <= self.border[code]);
        (code + above - below) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Draws, Stream};

    /// The definition: the first code whose upper border is not below.
    fn nearest(map: &Map, ratio: f32) -> usize {
        map.border[1..].partition_point(|border| *border < ratio)
    }

    #[test]
    fn the_nearest_code_is_found_at_every_border_and_in_between() {
        let mut draws = Draws::new(1, Stream::Synthetic, 0);
        for map in [&*SIGNED, &*UNSIGNED] {
            let mut ratios = vec![0.0, -0.0, 1.0, 1e-7, 1e-9, 1.0 - f32::EPSILON];
            for at in map.code.iter().chain(&map.border[1..256]) {
                ratios.extend([at.next_down(), *at, at.next_up()]);
            }
            for _ in 0..20_000 {
                let magnitude = draws.next_f32() * 10_f32.powf(-8.0 * draws.next_f32());
                ratios.extend([magnitude, -magnitude]);
            }
            for ratio in ratios.into_iter().filter(|ratio| ratio.abs() <= 1.0) {
                if map.signed || ratio >= 0.0 {
                    let found = usize::from(map.nearest(ratio));
                    assert_eq!(found, nearest(map, ratio), "{ratio}");
                }
            }
        }
    }

    #[test]
    fn codes_read_back_to_themselves() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for (code, value) in (0..=255).zip(map.code) {
                assert_eq!(map.nearest(*value), code);
            }
            assert!(map.code.is_sorted());
        }
    }

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
        assert_eq!(
            [found[0].to_bits(), found[1].to_bits()],
            [3e-5_f32.to_bits(), 0]
        );
        assert!(found[2] > 0.0 && (found[3] / 1.5e-5 - 1.0).abs() < 0.01);
        blocks.encode(0, &SIGNED, &[0.0; 4]);
        assert_eq!(blocks.decode(0, &SIGNED, &mut wide), [0.0; 4]);
        assert_eq!(codes, [127; 4]);
    }
}
