//! The dynamic 8-bit code of Dettmers (2015): a sign, a decimal exponent in unary, and a linear fraction in what is left.
//!
//! bitsandbytes stores the NF4 scales in it, in blocks of 256 and less their mean.

use std::sync::LazyLock;

/// Scales that share a nested scale.
pub const BLOCKSIZE: usize = 256;

/// Value of each code, ascending from -0.993 to 1.
pub static CODE: [f32; 256] = code(true);

/// The code without a sign, ascending from 0 to 1: twice as fine.
pub static UNSIGNED_CODE: [f32; 256] = code(false);

/// Cells of the lookup from a value in `[-1, 1]` to its code.
const NUM_CELLS: usize = 65_536;

/// Code nearest to the centre of each cell. bitsandbytes rounds to a cell first, so a value close to the border of two
/// codes, or zero, may get the one further away.
static CODE_OF_CELL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let centre = |cell: usize| cell as f64 / (NUM_CELLS - 1) as f64 * 2.0 - 1.0;
    (0..NUM_CELLS).map(|cell| nearest(centre(cell))).collect()
});

/// Codes of `values[i] - offset`, and the nested scale of each block.
pub fn quantize(values: &[f32], offset: f32) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len()];
    let blocks = values.chunks(BLOCKSIZE).zip(codes.chunks_mut(BLOCKSIZE));
    let nested_absmax = blocks.map(|(values, codes)| quantize_block(values, offset, codes));
    let nested_absmax = nested_absmax.collect();
    (codes, nested_absmax)
}

/// Returns the scale; the codes of an all-zero block stay 0, times a scale of 0.
fn quantize_block(values: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let magnitude = |value: &f32| (value - offset).abs();
    let absmax = values.iter().map(magnitude).fold(0.0, f32::max);
    if absmax > 0.0 {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = CODE_OF_CELL[cell((value - offset) / absmax)];
        }
    }
    absmax
}

/// Cell of a value in `[-1, 1]`.
fn cell(value: f32) -> usize {
    let position = (f64::from(value) + 1.0) * 0.5 * (NUM_CELLS - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a position in 0..NUM_CELLS"
    )]
    let cell = position.round() as usize;
    cell.min(NUM_CELLS - 1)
}

/// The lower code of two that are equally near.
fn nearest(value: f64) -> u8 {
    let above = CODE.partition_point(|code| f64::from(*code) <= value);
    let distance = |index: usize| (value - f64::from(CODE[index])).abs();
    let index = match above {
        0 => 0,
        256 => 255,
        _ if distance(above) < distance(above - 1) => above,
        _ => above - 1,
    };
    u8::try_from(index).unwrap_or(u8::MAX)
}

/// Decade `e` of 7, which ends at `10^(e - 6)`, has `2^e` codes of each sign, or `2^(e + 1)` without one: the centres of as many
/// equal parts of its upper 9/10.
const fn code(signed: bool) -> [f32; 256] {
    const DECADE: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut code = [0.0; 256];
    code[255] = 1.0;
    let mut decade = 0;
    while decade < 7 {
        let num_parts: usize = if signed { 1 } else { 2 } << decade;
        let mut part = 0;
        while part < num_parts {
            let (low, high) = (border(part, num_parts), border(part + 1, num_parts));
            let value = DECADE[decade] * f32::midpoint(low, high);
            let rank = num_parts - 1 + part;
            if signed {
                code[128 + rank] = value;
                code[126 - rank] = -value;
            } else {
                code[rank] = value;
            }
            part += 1;
        }
        decade += 1;
    }
    code
}

/// Border `index` of `num_parts` equal parts of `[0.1, 1]`, counted from the nearer end with one rounding.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the rounding is wanted; `From` is not const"
)]
const fn border(index: usize, num_parts: usize) -> f32 {
    let step = ((1.0 - 0.1_f32) / num_parts as f32) as f64;
    if index < num_parts.div_ceil(2) {
        (0.1_f32 as f64 + step * index as f64) as f32
    } else {
        (1.0 - step * (num_parts - index) as f64) as f32
    }
}
