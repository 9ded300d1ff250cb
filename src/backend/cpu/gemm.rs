//! Matrix views and one matrix product, the only unsafe code of the CPU backend.
//!
//! Each product runs on the calling thread, so that its bits depend on nothing but its operands; callers parallelise
//! over fixed blocks.
#![expect(
    unsafe_code,
    reason = "gemm takes raw pointers; the views below check every bound it relies on"
)]

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
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Row-major `[rows, cols]` with `stride` elements from row to row.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(data.len(), rows, cols, stride);
        Self {
            data,
            rows,
            cols,
            row_stride: stride,
        }
    }

    /// Row-major `[rows, cols]` without gaps.
    pub(crate) fn dense(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
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

/// `out = beta out + alpha a b`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the views are made at the call"
)]
pub(crate) fn matmul(out: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, alpha: f32, beta: f32) {
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
        for row in out.data.chunks_mut(out.row_stride).take(out.rows) {
            row[..out.cols].iter_mut().for_each(|value| *value *= beta);
        }
        return;
    }
    // SAFETY: each view's constructor checked that its last element lies in its slice; the shapes agree (above); `out`
    // is borrowed mutably, so it overlaps neither `a` nor `b`; f32 is one of gemm's types.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data.as_mut_ptr(),
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
