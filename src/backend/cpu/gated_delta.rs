//! The gated delta rule in chunks of 64 tokens: matrix products inside a chunk, a state handed from chunk to chunk.
//!
//! Notation and derivation: `docs/math/gated_delta.md`. One task owns a sequence and a key head with its value heads,
//! so that `d_q` and `d_k` are summed over them in order. Backward recomputes what forward made.

mod backward;

pub(super) use backward::backward;

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::gemm::{Mat, MatMut, matmul};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

/// Tokens per chunk.
const CHUNK: usize = 64;

/// Epsilon of the q and k normalisation (Hugging Face's constant).
const L2_EPS: f32 = 1e-6;

/// The inputs of a call.
struct Inputs<'a> {
    spec: DeltaSpec,
    u: &'a [f32],
    g: &'a [f32],
    beta: &'a [f32],
}

/// One sequence, one key head.
struct Task {
    sequence: Range<usize>,
    key_head: usize,
}

fn tasks(spec: DeltaSpec, state: &StepState) -> Vec<Task> {
    state
        .sequences()
        .flat_map(|(start, end)| {
            let heads = 0..spec.num_key_heads;
            heads.map(move |key_head| Task {
                sequence: start..end,
                key_head,
            })
        })
        .collect()
}

/// Rows `rows`, columns `first..first + width` of a row-major matrix, copied without gaps.
fn columns(
    data: &[f32],
    stride: usize,
    rows: &Range<usize>,
    first: usize,
    width: usize,
) -> Vec<f32> {
    let rows = data[rows.start * stride..rows.end * stride].chunks(stride);
    rows.flat_map(|row| &row[first..first + width])
        .copied()
        .collect()
}

/// Scales each row to unit length (times `scale`); returns the inverse lengths.
fn l2_normalize(x: &mut [f32], width: usize, scale: f32) -> Vec<f32> {
    x.chunks_mut(width)
        .map(|row| {
            let sum: f32 = row.iter().map(|value| value * value).sum();
            let rstd = 1.0 / (sum + L2_EPS).sqrt();
            row.iter_mut().for_each(|value| *value *= rstd * scale);
            rstd
        })
        .collect()
}

/// `d_x = rstd (d - xh <xh, d>)` per row, where `y = scale xh`, `d = scale d_y`; in place of `d_y`.
fn l2_normalize_backward(d_y: &mut [f32], y: &[f32], rstd: &[f32], width: usize, scale: f32) {
    for ((d_y, y), rstd) in d_y.chunks_mut(width).zip(y.chunks(width)).zip(rstd) {
        let dot: f32 = d_y.iter().zip(y).map(|(d, y)| d * y).sum();
        for (d, y) in d_y.iter_mut().zip(y) {
            *d = rstd * (*d * scale - y * dot / scale);
        }
    }
}

impl Inputs<'_> {
    fn q_scale(&self) -> f32 {
        1.0 / (self.spec.key_head_dim as f32).sqrt()
    }

    /// Normalised q (scaled) and k of a key head over a sequence, with their inverse lengths.
    fn qk(&self, task: &Task) -> Qk {
        let (spec, stride) = (&self.spec, self.spec.conv_dim());
        let (dk, first) = (spec.key_head_dim, task.key_head * spec.key_head_dim);
        let mut q = columns(self.u, stride, &task.sequence, first, dk);
        let mut k = columns(self.u, stride, &task.sequence, spec.key_dim() + first, dk);
        let q_rstd = l2_normalize(&mut q, dk, self.q_scale());
        let k_rstd = l2_normalize(&mut k, dk, 1.0);
        Qk {
            q,
            k,
            q_rstd,
            k_rstd,
        }
    }

    /// v, g and beta of a value head over a sequence.
    fn value_head(&self, sequence: &Range<usize>, head: usize) -> ValueHead {
        let (spec, heads) = (&self.spec, self.spec.num_value_heads);
        let dv = spec.value_head_dim;
        let first = 2 * spec.key_dim() + head * dv;
        ValueHead {
            v: columns(self.u, spec.conv_dim(), sequence, first, dv),
            g: columns(self.g, heads, sequence, head, 1),
            beta: columns(self.beta, heads, sequence, head, 1),
        }
    }
}

struct Qk {
    q: Vec<f32>,
    k: Vec<f32>,
    q_rstd: Vec<f32>,
    k_rstd: Vec<f32>,
}

struct ValueHead {
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
}

/// Views and intermediates of one chunk of `c` tokens.
struct Chunk<'a> {
    c: usize,
    dk: usize,
    dv: usize,
    q: Mat<'a>,
    k: Mat<'a>,
    k_values: &'a [f32],
    q_values: &'a [f32],
    v_values: &'a [f32],
    beta: &'a [f32],
    /// Inclusive cumulative sum of g.
    gamma: Vec<f32>,
    /// `exp(gamma_i - gamma_j)` for `j <= i`, else 0.
    decay: Vec<f32>,
    /// Strictly lower: `beta_i <k_i, k_j> decay_ij`.
    lower: Vec<f32>,
    /// `(I + L)^-1 diag(beta e^gamma) K`.
    w: Vec<f32>,
    /// `(I + L)^-1 diag(beta) V`.
    u: Vec<f32>,
    /// Lower: `<q_i, k_j> decay_ij`.
    scores: Vec<f32>,
}

impl<'a> Chunk<'a> {
    fn new(spec: &DeltaSpec, qk: &'a Qk, head: &'a ValueHead, tokens: Range<usize>) -> Self {
        let (c, dk, dv) = (tokens.len(), spec.key_head_dim, spec.value_head_dim);
        let q_values = &qk.q[tokens.start * dk..tokens.end * dk];
        let k_values = &qk.k[tokens.start * dk..tokens.end * dk];
        let v_values = &head.v[tokens.start * dv..tokens.end * dv];
        let beta = &head.beta[tokens.clone()];
        let (q, k) = (Mat::dense(q_values, c, dk), Mat::dense(k_values, c, dk));
        let mut total = 0.0;
        let sums = head.g[tokens].iter().map(|g| {
            total += g;
            total
        });
        let gamma: Vec<f32> = sums.collect();
        let mut decay = vec![0.0; c * c];
        for i in 0..c {
            for j in 0..=i {
                decay[i * c + j] = (gamma[i] - gamma[j]).exp();
            }
        }
        let mut lower = vec![0.0; c * c];
        matmul(MatMut::dense(&mut lower, c, c), k, k.t(), 1.0, 0.0);
        let mut scores = vec![0.0; c * c];
        matmul(MatMut::dense(&mut scores, c, c), q, k.t(), 1.0, 0.0);
        for (i, beta) in beta.iter().enumerate() {
            for j in 0..c {
                let at = i * c + j;
                scores[at] *= decay[at];
                lower[at] = if j < i {
                    lower[at] * decay[at] * beta
                } else {
                    0.0
                };
            }
        }
        let mut w = k_values.to_vec();
        let mut u = v_values.to_vec();
        for i in 0..c {
            let factor = beta[i] * gamma[i].exp();
            w[i * dk..(i + 1) * dk]
                .iter_mut()
                .for_each(|value| *value *= factor);
            u[i * dv..(i + 1) * dv]
                .iter_mut()
                .for_each(|value| *value *= beta[i]);
        }
        solve(&lower, &mut w, c);
        solve(&lower, &mut u, c);
        Self {
            c,
            dk,
            dv,
            q,
            k,
            k_values,
            q_values,
            v_values,
            beta,
            gamma,
            decay,
            lower,
            w,
            u,
            scores,
        }
    }

    fn last(&self) -> f32 {
        self.gamma[self.c - 1]
    }

    /// `V' = U - W S`.
    fn corrected_values(&self, s: &[f32]) -> Vec<f32> {
        let mut v = self.u.clone();
        let w = Mat::dense(&self.w, self.c, self.dk);
        let s = Mat::dense(s, self.dk, self.dv);
        matmul(MatMut::dense(&mut v, self.c, self.dv), w, s, -1.0, 1.0);
        v
    }

    /// `rows[i] *= factor(i)`.
    fn scaled_rows(&self, rows: &[f32], factor: impl Fn(usize) -> f32) -> Vec<f32> {
        let width = rows.len() / self.c;
        let rows = rows.chunks(width).enumerate();
        rows.flat_map(|(i, row)| {
            let factor = factor(i);
            row.iter().map(move |value| value * factor)
        })
        .collect()
    }

    /// `O = e^gamma Q S + scores V'`.
    fn output(&self, s: &[f32], v: &[f32]) -> Vec<f32> {
        let (c, dk, dv) = (self.c, self.dk, self.dv);
        let q = self.scaled_rows(self.q_values, |i| self.gamma[i].exp());
        let mut o = vec![0.0; c * dv];
        let (q, s) = (Mat::dense(&q, c, dk), Mat::dense(s, dk, dv));
        matmul(MatMut::dense(&mut o, c, dv), q, s, 1.0, 0.0);
        let scores = Mat::dense(&self.scores, c, c);
        matmul(
            MatMut::dense(&mut o, c, dv),
            scores,
            Mat::dense(v, c, dv),
            1.0,
            1.0,
        );
        o
    }

    /// `S <- e^{gamma_C} S + K^T diag(e^{gamma_C - gamma}) V'`.
    fn advance(&self, s: &mut [f32], v: &[f32]) {
        let v = self.scaled_rows(v, |i| (self.last() - self.gamma[i]).exp());
        let v = Mat::dense(&v, self.c, self.dv);
        matmul(
            MatMut::dense(s, self.dk, self.dv),
            self.k.t(),
            v,
            1.0,
            self.last().exp(),
        );
    }
}

/// `x <- (I + L)^-1 x`, forward substitution over the rows of `x`.
fn solve(lower: &[f32], x: &mut [f32], c: usize) {
    let width = x.len() / c;
    for i in 1..c {
        let (done, rest) = x.split_at_mut(i * width);
        let row = &mut rest[..width];
        for (factor, other) in lower[i * c..i * c + i].iter().zip(done.chunks(width)) {
            row.iter_mut()
                .zip(other)
                .for_each(|(value, other)| *value -= factor * other);
        }
    }
}

/// `x <- (I + L)^-T x`, backward substitution over the rows of `x`.
fn solve_transposed(lower: &[f32], x: &mut [f32], c: usize) {
    let width = x.len() / c;
    for i in (0..c).rev() {
        let (head, tail) = x.split_at_mut((i + 1) * width);
        let row = &mut head[i * width..];
        for (j, other) in (i + 1..c).zip(tail.chunks(width)) {
            let factor = lower[j * c + i];
            row.iter_mut()
                .zip(other)
                .for_each(|(value, other)| *value -= factor * other);
        }
    }
}

fn chunks(len: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator {
    (0..len.div_ceil(CHUNK)).map(move |index| index * CHUNK..len.min((index + 1) * CHUNK))
}

pub(super) fn forward(
    cpu: &Cpu,
    o: &mut Tensor,
    u: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_delta_forward";
    let tokens = state.num_tokens();
    let inputs = Inputs {
        spec,
        u: cpu.rows(OP, u, tokens, spec.conv_dim())?,
        g: cpu.rows(OP, g, tokens, spec.num_value_heads)?,
        beta: cpu.rows(OP, beta, tokens, spec.num_value_heads)?,
    };
    let o = cpu.rows_mut(OP, o, tokens, spec.value_dim())?;
    let tasks = tasks(spec, state);
    let parts: Vec<_> = tasks
        .par_iter()
        .map(|task| forward_task(&inputs, task))
        .collect();
    for (task, heads) in tasks.iter().zip(parts) {
        for (member, part) in heads.iter().enumerate() {
            let head = task.key_head * spec.ratio() + member;
            put_columns(
                o,
                part,
                spec.value_dim(),
                &task.sequence,
                head * spec.value_head_dim,
            );
        }
    }
    cpu.round(o);
    Ok(())
}

/// Inverse of [`columns`].
fn put_columns(out: &mut [f32], part: &[f32], stride: usize, rows: &Range<usize>, first: usize) {
    let width = part.len() / rows.len();
    for (row, values) in rows.clone().zip(part.chunks(width)) {
        out[row * stride + first..][..width].copy_from_slice(values);
    }
}

fn forward_task(inputs: &Inputs<'_>, task: &Task) -> Vec<Vec<f32>> {
    let spec = &inputs.spec;
    let qk = inputs.qk(task);
    (0..spec.ratio())
        .map(|member| {
            let head = inputs.value_head(&task.sequence, task.key_head * spec.ratio() + member);
            let mut s = vec![0.0; spec.key_head_dim * spec.value_head_dim];
            let mut o = Vec::with_capacity(head.v.len());
            for tokens in chunks(task.sequence.len()) {
                let chunk = Chunk::new(spec, &qk, &head, tokens);
                let v = chunk.corrected_values(&s);
                o.extend(chunk.output(&s, &v));
                chunk.advance(&mut s, &v);
            }
            o
        })
        .collect()
}
