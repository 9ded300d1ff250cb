//! NF4, the 4-bit `NormalFloat` of QLoRA (Dettmers et al. 2023, app. E), as bitsandbytes lays it out.
//!
//! Packed codes and scales equal those of bitsandbytes bit for bit, but for the offset of double quantisation: it is the
//! mean in f64, rounded once, where bitsandbytes sums in f32 in an order that depends on the processor (at most 2 ulp).
//! Start at [`Nf4Matrix::from_tensor`] and [`Nf4View::dequantize`].

pub mod dynamic;

use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Elements that share a scale.
pub const BLOCKSIZE: usize = 64;

/// Value of each code: quantiles of a normal distribution, scaled to `[-1, 1]`.
pub const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A scaled weight above `MIDPOINTS[i]` gets a code above `i`. These are bitsandbytes' constants.
const MIDPOINTS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_45,
    0.642_786_9,
    0.861_478_45,
];

/// The two values of each byte of codes, high half first.
static PAIRS: [[f32; 2]; 256] = pairs();

/// Blocks that one task quantises; fixed, so that the work is cut alike on every machine.
const BLOCKS_PER_TASK: usize = 1024;

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
    /// Quantises `weights`, a row-major `[out_features, in_features]`; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is another; [`Error::Format`] if one is NaN or infinite.
    pub fn quantize(
        name: &str,
        weights: &[f32],
        [out_features, in_features]: [usize; 2],
        double_quant: bool,
    ) -> Result<Self> {
        if weights.len() != out_features * in_features {
            return Err(Error::Shape {
                op: "nf4 quantize",
                tensor: name.to_owned(),
                found: vec![weights.len()],
                expected: vec![out_features, in_features],
            });
        }
        let read = |range: Range<usize>, out: &mut [f32]| {
            out.copy_from_slice(&weights[range]);
            Ok(())
        };
        Self::quantize_with(name, [out_features, in_features], double_quant, read)
    }

    /// Quantises a matrix of f32, bf16 or f16 (widened to f32), a part at a time.
    ///
    /// # Errors
    /// [`Error::Shape`] if it has not two dimensions; [`Error::DType`] if it is not floating point;
    /// [`Error::Format`] if an element is NaN or infinite.
    pub fn from_tensor(weights: &Tensor, double_quant: bool) -> Result<Self> {
        let &[out_features, in_features] = weights.shape() else {
            return Err(Error::Shape {
                op: "nf4 quantize",
                tensor: weights.name().to_owned(),
                found: weights.shape().to_vec(),
                expected: vec![0, 0],
            });
        };
        let read = |range: Range<usize>, out: &mut [f32]| weights.widen(range, out);
        Self::quantize_with(
            weights.name(),
            [out_features, in_features],
            double_quant,
            read,
        )
    }

    fn quantize_with(
        name: &str,
        [out_features, in_features]: [usize; 2],
        double_quant: bool,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<Self> {
        let len = out_features * in_features;
        let mut codes = vec![0_u8; len.div_ceil(2)];
        let mut absmax = vec![0.0_f32; len.div_ceil(BLOCKSIZE)];
        let elements_per_task = BLOCKS_PER_TASK * BLOCKSIZE;
        codes
            .par_chunks_mut(elements_per_task / 2)
            .zip(absmax.par_chunks_mut(BLOCKS_PER_TASK))
            .enumerate()
            .try_for_each(|(task, (codes, absmax))| {
                let start = task * elements_per_task;
                let end = len.min(start + elements_per_task);
                let mut weights = vec![0.0; end - start];
                read(start..end, &mut weights)?;
                quantize_blocks(&weights, codes, absmax);
                check_finite(name, absmax)
            })?;
        let absmax = if double_quant {
            Absmax::nested(name, &absmax)?
        } else {
            Absmax::Plain(Tensor::from_f32(
                format!("{name}.absmax"),
                &[absmax.len()],
                absmax,
            )?)
        };
        Ok(Self {
            out_features,
            in_features,
            codes: Tensor::from_u8(format!("{name}.codes"), &[codes.len()], codes)?,
            absmax,
        })
    }

    /// A matrix that has a size but no memory.
    pub fn planned(
        name: &str,
        [out_features, in_features]: [usize; 2],
        double_quant: bool,
    ) -> Self {
        let len = out_features * in_features;
        let num_blocks = len.div_ceil(BLOCKSIZE);
        let absmax = format!("{name}.absmax");
        let absmax = if double_quant {
            Absmax::Nested {
                codes: Tensor::planned(absmax, &[num_blocks], DType::U8),
                nested_absmax: Tensor::planned(
                    format!("{name}.nested_absmax"),
                    &[num_blocks.div_ceil(dynamic::BLOCKSIZE)],
                    DType::F32,
                ),
                offset: 0.0,
            }
        } else {
            Absmax::Plain(Tensor::planned(absmax, &[num_blocks], DType::F32))
        };
        let codes = Tensor::planned(format!("{name}.codes"), &[len.div_ceil(2)], DType::U8);
        Self {
            out_features,
            in_features,
            codes,
            absmax,
        }
    }

    /// Borrows codes and scales for dequantising.
    ///
    /// # Errors
    /// [`Error::DType`] if a part is not in host memory.
    pub fn view(&self) -> Result<Nf4View<'_>> {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => AbsmaxView::Plain(absmax.f32()?),
            Absmax::Nested {
                codes,
                nested_absmax,
                offset,
            } => AbsmaxView::Nested {
                codes: codes.u8()?,
                nested_absmax: nested_absmax.f32()?,
                offset: *offset,
            },
        };
        Ok(Nf4View {
            codes: self.codes.u8()?,
            absmax,
            in_features: self.in_features,
        })
    }

    /// All weights, row-major.
    ///
    /// # Errors
    /// [`Error::DType`] if a part is not in host memory.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.out_features * self.in_features];
        self.view()?.dequantize(0, &mut out);
        Ok(out)
    }
}

impl Absmax {
    /// Double quantisation of `absmax`.
    fn nested(name: &str, absmax: &[f32]) -> Result<Self> {
        let offset = mean(absmax);
        let (codes, nested_absmax) = dynamic::quantize(absmax, offset);
        Ok(Self::Nested {
            codes: Tensor::from_u8(format!("{name}.absmax"), &[codes.len()], codes)?,
            nested_absmax: Tensor::from_f32(
                format!("{name}.nested_absmax"),
                &[nested_absmax.len()],
                nested_absmax,
            )?,
            offset,
        })
    }
}

/// A borrowed [`Nf4Matrix`], for inner loops.
#[derive(Debug, Clone, Copy)]
pub struct Nf4View<'a> {
    codes: &'a [u8],
    absmax: AbsmaxView<'a>,
    in_features: usize,
}

#[derive(Debug, Clone, Copy)]
enum AbsmaxView<'a> {
    Plain(&'a [f32]),
    Nested {
        codes: &'a [u8],
        nested_absmax: &'a [f32],
        offset: f32,
    },
}

impl Nf4View<'_> {
    /// `out[i] = w[start + i]` of the flattened matrix, for all of `out`.
    ///
    /// # Panics
    /// If the range leaves the matrix.
    #[inline]
    pub fn dequantize(&self, start: usize, out: &mut [f32]) {
        let (mut element, mut out) = (start, out);
        while !out.is_empty() {
            let len = out.len().min(BLOCKSIZE - element % BLOCKSIZE);
            let (part, rest) = out.split_at_mut(len);
            self.dequantize_in_block(element, part);
            element += len;
            out = rest;
        }
    }

    /// Rows `rows` of the matrix, one after the other.
    ///
    /// # Panics
    /// If the range leaves the matrix or `out` has not `rows.len() * in_features` elements.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.in_features, "length of out");
        self.dequantize(rows.start * self.in_features, out);
    }

    /// Scale of block `block`.
    ///
    /// # Panics
    /// If there is no such block.
    #[inline]
    pub fn absmax(&self, block: usize) -> f32 {
        match self.absmax {
            AbsmaxView::Plain(absmax) => absmax[block],
            AbsmaxView::Nested {
                codes,
                nested_absmax,
                offset,
            } => {
                let nested = nested_absmax[block / dynamic::BLOCKSIZE];
                dynamic::CODE[usize::from(codes[block])] * nested + offset
            }
        }
    }

    #[inline]
    fn dequantize_in_block(&self, element: usize, out: &mut [f32]) {
        let absmax = self.absmax(element / BLOCKSIZE);
        let (head, out) = out.split_at_mut(element % 2);
        if let [low] = head {
            *low = PAIRS[usize::from(self.codes[element / 2])][1] * absmax;
        }
        let bytes = &self.codes[element.div_ceil(2)..][..out.len().div_ceil(2)];
        let (pairs, tail) = out.as_chunks_mut::<2>();
        for ([high, low], byte) in pairs.iter_mut().zip(bytes) {
            let pair = &PAIRS[usize::from(*byte)];
            *high = pair[0] * absmax;
            *low = pair[1] * absmax;
        }
        if let ([high], Some(byte)) = (tail, bytes.last()) {
            *high = PAIRS[usize::from(*byte)][0] * absmax;
        }
    }
}

/// Bytes of codes and scales of a matrix of `len` elements.
pub fn num_bytes(len: usize, double_quant: bool) -> usize {
    let num_blocks = len.div_ceil(BLOCKSIZE);
    let absmax = if double_quant {
        // One byte a block, one f32 per nested block, the offset.
        num_blocks + 4 * num_blocks.div_ceil(dynamic::BLOCKSIZE) + 4
    } else {
        4 * num_blocks
    };
    len.div_ceil(2) + absmax
}

fn quantize_blocks(weights: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    let blocks = weights
        .chunks(BLOCKSIZE)
        .zip(codes.chunks_mut(BLOCKSIZE / 2));
    for ((weights, codes), absmax) in blocks.zip(absmax) {
        *absmax = block_absmax(weights);
        quantize_block(weights, *absmax, codes);
    }
}

/// The largest magnitude; NaN if there is one, as its bits exceed those of infinity.
fn block_absmax(weights: &[f32]) -> f32 {
    let magnitude = |weight: &f32| weight.abs().to_bits();
    f32::from_bits(weights.iter().map(magnitude).max().unwrap_or(0))
}

fn quantize_block(weights: &[f32], absmax: f32, codes: &mut [u8]) {
    let scale = 1.0 / absmax;
    let mut block = [code_of(0.0); BLOCKSIZE];
    for (code, weight) in block.iter_mut().zip(weights) {
        // The reciprocal of a subnormal overflows; zero over zero stays zero.
        *code = code_of(match absmax {
            0.0 => 0.0,
            _ if scale.is_infinite() => weight / absmax,
            _ => weight * scale,
        });
    }
    for (byte, pair) in codes.iter_mut().zip(block.as_chunks::<2>().0) {
        *byte = pair[0] << 4 | pair[1];
    }
}

#[inline]
fn code_of(scaled: f32) -> u8 {
    MIDPOINTS
        .iter()
        .map(|midpoint| u8::from(scaled > *midpoint))
        .sum()
}

fn check_finite(name: &str, absmax: &[f32]) -> Result<()> {
    if absmax.iter().all(|absmax| absmax.is_finite()) {
        return Ok(());
    }
    Err(Error::format(
        name,
        "holds a NaN or infinite weight, expected finite ones; download the checkpoint again",
    ))
}

fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|value| f64::from(*value)).sum();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounded once, to the type it is stored in"
    )]
    let mean = (sum / values.len().max(1) as f64) as f32;
    mean
}

const fn pairs() -> [[f32; 2]; 256] {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODEBOOK[byte >> 4], CODEBOOK[byte & 15]];
        byte += 1;
    }
    pairs
}
