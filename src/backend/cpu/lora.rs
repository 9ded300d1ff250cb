//! The low-rank pair: `xa = dropout(x) A^T`, `y += s xa B^T`, and backward, on one block of rows.

use std::borrow::Cow;

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, matmul};
use super::{Cpu, add_assign};
use crate::ops::{DropoutState, LoraPair};

/// Columns of `A` (rows of `B`) per task of the weight gradients.
const GRAD_BLOCK: usize = 256;

/// A pair with its values at hand.
#[derive(Debug)]
pub(super) struct Lora<'a> {
    pub(super) pair: LoraPair,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    dropout: Option<DropoutState>,
}

impl<'a> Lora<'a> {
    /// `pair` in the arena `values`; `dropout` as the step has it.
    pub(super) fn new(
        cpu: &Cpu,
        pair: LoraPair,
        values: &'a [f32],
        dropout: Option<DropoutState>,
    ) -> Self {
        let a = cpu.rounded(&values[pair.a_range()]);
        let b = cpu.rounded(&values[pair.b_range()]);
        let dropout = dropout.filter(|_| pair.dropout > 0.0);
        Self {
            pair,
            a,
            b,
            dropout,
        }
    }

    /// `dropout(x)`: row `i` of `x` belongs to token `token(i)`.
    pub(super) fn dropped<'x>(&self, x: &'x [f32], token: impl Fn(usize) -> u32) -> Cow<'x, [f32]> {
        let Some(dropout) = self.dropout else {
            return Cow::Borrowed(x);
        };
        let mut x = x.to_vec();
        self.mask(&mut x, dropout, token);
        Cow::Owned(x)
    }

    fn mask(&self, x: &mut [f32], dropout: DropoutState, token: impl Fn(usize) -> u32) {
        let keep_scale = 1.0 / (1.0 - self.pair.dropout);
        // 2^32 p, as a threshold on 32 random bits.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a probability times 2^32"
        )]
        let threshold = (f64::from(self.pair.dropout) * 4_294_967_296.0) as u64;
        for (index, row) in x.chunks_mut(self.pair.in_features).enumerate() {
            let token = token(index);
            for (quad, values) in (0u32..).zip(row.chunks_mut(4)) {
                let words = dropout.words(self.pair.module, token, quad);
                for (value, word) in values.iter_mut().zip(words) {
                    *value = if u64::from(word) < threshold {
                        0.0
                    } else {
                        *value * keep_scale
                    };
                }
            }
        }
    }

    /// `xa = dropped A^T`, `dropped [m, in_features]`.
    pub(super) fn project(&self, xa: MatMut<'_>, dropped: &[f32]) {
        let (r, k) = (self.pair.rank, self.pair.in_features);
        let x = Mat::dense(dropped, dropped.len() / k, k);
        matmul(xa, x, Mat::dense(&self.a, r, k).t(), 1.0, 0.0);
    }

    /// `out += s xa B^T`.
    pub(super) fn add(&self, out: MatMut<'_>, xa: Mat<'_>) {
        let b = Mat::dense(&self.b, self.pair.out_features, self.pair.rank);
        matmul(out, xa, b.t(), self.pair.scaling, 1.0);
    }

    /// `d_xa = s d_out B`, `d_out [m, out_features]`.
    pub(super) fn d_xa(&self, d_xa: MatMut<'_>, d_out: Mat<'_>) {
        let b = Mat::dense(&self.b, self.pair.out_features, self.pair.rank);
        matmul(d_xa, d_out, b, self.pair.scaling, 0.0);
    }

    /// `d_x += dropout(d_xa A)`, `d_x` rows without gaps.
    pub(super) fn add_d_x(&self, d_x: &mut [f32], d_xa: Mat<'_>, token: impl Fn(usize) -> u32) {
        let (r, k) = (self.pair.rank, self.pair.in_features);
        let rows = d_x.len() / k;
        let a = Mat::dense(&self.a, r, k);
        match self.dropout {
            None => matmul(MatMut::dense(d_x, rows, k), d_xa, a, 1.0, 1.0),
            Some(dropout) => {
                let mut part = vec![0.0; d_x.len()];
                matmul(MatMut::dense(&mut part, rows, k), d_xa, a, 1.0, 0.0);
                self.mask(&mut part, dropout, token);
                add_assign(d_x, &part);
            }
        }
    }

    /// `d_a += d_xa^T dropped` and `d_b += s d_out^T xa`, over `m` rows, in parallel over blocks of columns.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the views are made at the call"
    )]
    pub(super) fn grads(&self, grads: LoraGrads<'_>, rows: LoraRows<'_>) {
        let LoraPair {
            rank,
            in_features,
            out_features,
            scaling,
            ..
        } = self.pair;
        let m = rows.num_rows;
        let parts: Vec<Vec<f32>> = (0..in_features.div_ceil(GRAD_BLOCK))
            .into_par_iter()
            .map(|block| {
                let first = block * GRAD_BLOCK;
                let cols = GRAD_BLOCK.min(in_features - first);
                let mut part = vec![0.0; rank * cols];
                if m > 0 {
                    let x = Mat::new(&rows.dropped[first..], m, cols, in_features);
                    matmul(
                        MatMut::dense(&mut part, rank, cols),
                        rows.d_xa.t(),
                        x,
                        1.0,
                        0.0,
                    );
                }
                part
            })
            .collect();
        for (block, part) in parts.iter().enumerate() {
            let cols = part.len() / rank;
            for (row, values) in grads.a.chunks_mut(in_features).zip(part.chunks(cols)) {
                add_assign(&mut row[block * GRAD_BLOCK..][..cols], values);
            }
        }
        if m == 0 {
            return;
        }
        grads
            .b
            .par_chunks_mut(GRAD_BLOCK * rank)
            .enumerate()
            .for_each(|(block, d_b)| {
                let count = d_b.len() / rank;
                let d_out = Mat::new(&rows.d_out[block * GRAD_BLOCK..], m, count, out_features);
                matmul(
                    MatMut::dense(d_b, count, rank),
                    d_out.t(),
                    rows.xa,
                    scaling,
                    1.0,
                );
            });
    }
}

/// What the weight gradients of a pair are made of; all have `num_rows` rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoraRows<'a> {
    pub(super) num_rows: usize,
    /// `[num_rows, in_features]`.
    pub(super) dropped: &'a [f32],
    /// `[num_rows, out_features]`.
    pub(super) d_out: &'a [f32],
    /// `[num_rows, rank]`.
    pub(super) xa: Mat<'a>,
    /// `[num_rows, rank]`.
    pub(super) d_xa: Mat<'a>,
}

/// The pair's slices of the gradient arena.
#[derive(Debug)]
pub(super) struct LoraGrads<'a> {
    a: &'a mut [f32],
    b: &'a mut [f32],
}

impl<'a> LoraGrads<'a> {
    /// The slices of `pair` in `arena`, whose first element is element `base` of the whole arena.
    pub(super) fn new(arena: &'a mut [f32], pair: &LoraPair, base: usize) -> Self {
        let (a, b) = arena[pair.a - base..pair.b_range().end - base].split_at_mut(pair.b - pair.a);
        Self {
            a: &mut a[..pair.rank * pair.in_features],
            b,
        }
    }
}
