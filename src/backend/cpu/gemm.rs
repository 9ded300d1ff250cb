//! Matrix views and one matrix product, the only unsafe code of the CPU backend.
//!
//! [`matmul`] runs on the calling thread, so that its bits depend on nothing but its operands; [`par_matmul`] cuts the output
//! into tiles whose extents depend on the shapes alone, so that bits do not depend on the number of threads.
#![expect(
    unsafe_code,
    reason = "gemm takes raw pointers, and tiles of a row-major matrix are no slices; the views check every bound"
)]

use std::marker::PhantomData;

use rayon::prelude::*;

/// Rows of an output tile, and how many tiles are wanted where there are fewer rows. A product packs both operands for
/// each tile, so tiles are as large as an even share for some cores allows.
const TILE_ROWS: usize = 256;
const NUM_TILES: usize = 16;
const MIN_TILE_COLS: usize = 64;

/// A strided view of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major `[rows, cols]` with `stride` elements from row to row.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Row-major `[rows, cols]` without gaps.
    pub(crate) fn dense(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// `count` rows from `start` on.
    fn rows(self, start: usize, count: usize) -> Self {
        let data = self.data.get(start * self.row_stride..).unwrap_or(&[]);
        Self {
            data,
            rows: count,
            ..self
        }
    }

    /// Transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A strided view of a matrix to be written.
#[derive(Debug)]
pub(crate) struct MatMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which is `Send`; tiles share no element (see `MatMut::tiles`).
unsafe impl Send for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// Row-major `[rows, cols]` with `stride` elements from row to row.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self {
            data: data.as_mut_ptr(),
            rows,
            cols,
            row_stride: stride,
            borrow: PhantomData,
        }
    }

    /// Row-major `[rows, cols]` without gaps.
    pub(crate) fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// Cuts the matrix into tiles of at most `[tile_rows, tile_cols]`, each with its first row and column.
    fn tiles(self, tile_rows: usize, tile_cols: usize) -> Vec<(usize, usize, Self)> {
        let mut tiles = Vec::new();
        for row in (0..self.rows).step_by(tile_rows) {
            for col in (0..self.cols).step_by(tile_cols) {
                // SAFETY: `row < rows` and `col < cols`, so the element lies in the slice of the constructor; no two
                // tiles have an element in common, and `self`, which borrowed them all, is used up.
                let data = unsafe { self.data.add(row * self.row_stride + col) };
                let tile = Self {
                    data,
                    rows: tile_rows.min(self.rows - row),
                    cols: tile_cols.min(self.cols - col),
                    row_stride: self.row_stride,
                    borrow: PhantomData,
                };
                tiles.push((row, col, tile));
            }
        }
        tiles
    }

    fn scale(&mut self, factor: f32) {
        for row in 0..self.rows {
            let start = row * self.row_stride;
            // SAFETY: the row lies in the slice of the constructor, see `check`.
            let first = unsafe { self.data.add(start) };
            // SAFETY: `cols` elements from there on are this view's own, borrowed mutably.
            let row = unsafe { std::slice::from_raw_parts_mut(first, self.cols) };
            row.iter_mut().for_each(|value| *value *= factor);
        }
    }
}

/// The last element of the last row must lie in `len`.
fn check(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(
        cols <= stride || rows <= 1,
        "matrix view: {cols} columns with a row stride of {stride}"
    );
    if rows > 0 && cols > 0 {
        let last = (rows - 1) * stride + cols;
        assert!(last <= len, "matrix view: needs {last} elements, has {len}");
    }
}

/// `out = beta out + alpha a b`, in parallel.
pub(crate) fn par_matmul(out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, alpha: f32, beta: f32) {
    let num_bands = out.rows.div_ceil(TILE_ROWS).max(1);
    let tile_rows = out.rows.div_ceil(num_bands).next_multiple_of(16);
    let num_stripes = NUM_TILES.div_ceil(num_bands);
    let tile_cols = out.cols.div_ceil(num_stripes).next_multiple_of(16);
    let tile_cols = tile_cols.max(MIN_TILE_COLS);
    let tiles = out.tiles(tile_rows, tile_cols);
    tiles.into_par_iter().for_each(|(row, col, tile)| {
        let (rows, cols) = (tile.rows, tile.cols);
        matmul(
            tile,
            a.rows(row, rows),
            b.t().rows(col, cols).t(),
            alpha,
            beta,
        );
    });
}

/// `out = beta out + alpha a b`.
pub(crate) fn matmul(mut out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, alpha: f32, beta: f32) {
    assert!(
        a.rows == out.rows && b.cols == out.cols && a.cols == b.rows,
        "matmul: [{}, {}] = [{}, {}] [{}, {}]",
        out.rows,
        out.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    if a.cols == 0 {
        out.scale(beta);
        return;
    }
    // SAFETY: each view's constructor checked that its last element lies in its slice, and parts of views are inside them;
    // the shapes agree (above); `out` is borrowed mutably, so it overlaps neither `a` nor `b`; f32 is one of gemm's types.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data,
            1,
            out.row_stride.cast_signed(),
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride.cast_signed(),
            a.row_stride.cast_signed(),
            b.data.as_ptr(),
            b.col_stride.cast_signed(),
            b.row_stride.cast_signed(),
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_products_match_a_loop_nest() {
        let (m, n, k, stride) = (5, 7, 3, 9);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.3).cos()).collect();
        let mut out = vec![1.0; m * stride];
        matmul(
            MatMut::new(&mut out, m, n, stride),
            Mat::dense(&a, m, k),
            Mat::dense(&b, n, k).t(),
            2.0,
            0.5,
        );
        for i in 0..m {
            for j in 0..stride {
                let dot: f32 = (0..k)
                    .map(|l| {
                        if j < n {
                            a[i * k + l] * b[j * k + l]
                        } else {
                            0.0
                        }
                    })
                    .sum();
                let expected = if j < n { 0.5 + 2.0 * dot } else { 1.0 };
                assert!((out[i * stride + j] - expected).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn tiles_cover_every_element_once() {
        for (m, n, k) in [(1, 1, 1), (300, 70, 5), (17, 2000, 3), (600, 1, 2)] {
            let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.3).cos()).collect();
            let (a, b) = (Mat::dense(&a, m, k), Mat::dense(&b, n, k).t());
            let (mut whole, mut tiled) = (vec![0.5; m * n], vec![0.5; m * n]);
            matmul(MatMut::dense(&mut whole, m, n), a, b, 2.0, 1.0);
            par_matmul(MatMut::dense(&mut tiled, m, n), a, b, 2.0, 1.0);
            let close = |(w, t): (&f32, &f32)| (w - t).abs() < 1e-5;
            assert!(whole.iter().zip(&tiled).all(close), "{m} x {n} x {k}");
        }
    }

    #[test]
    fn an_empty_inner_dimension_only_scales() {
        let mut out = vec![3.0; 4];
        matmul(
            MatMut::dense(&mut out, 2, 2),
            Mat::dense(&[], 2, 0),
            Mat::dense(&[], 0, 2),
            1.0,
            0.0,
        );
        assert_eq!(out, vec![0.0; 4]);
    }

    #[test]
    #[should_panic(expected = "matrix view")]
    fn a_view_beyond_its_slice_is_refused() {
        let data = [0.0; 5];
        let _ = Mat::dense(&data, 2, 3);
    }
}
