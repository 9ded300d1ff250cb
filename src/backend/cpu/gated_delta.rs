//! The gated delta rule in chunks of 64 tokens: matrix products inside a chunk, a state handed from chunk to chunk.
//!
//! Notation and derivation: `docs/math/gated_delta.md`. One task owns a sequence and a key head with its value heads,
//! so that `d_q` and `d_k` are summed over them in order. Backward recomputes what forward made.

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

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    cpu: &Cpu,
    d_u: &mut Tensor,
    d_g: &mut Tensor,
    d_beta: &mut Tensor,
    d_o: &Tensor,
    u: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    spec: DeltaSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "gated_delta_backward";
    let (tokens, heads) = (state.num_tokens(), spec.num_value_heads);
    let inputs = Inputs {
        spec,
        u: cpu.rows(OP, u, tokens, spec.conv_dim())?,
        g: cpu.rows(OP, g, tokens, heads)?,
        beta: cpu.rows(OP, beta, tokens, heads)?,
    };
    let d_o = cpu.rows(OP, d_o, tokens, spec.value_dim())?;
    let d_u = cpu.rows_mut(OP, d_u, tokens, spec.conv_dim())?;
    let d_g = cpu.rows_mut(OP, d_g, tokens, heads)?;
    let d_beta = cpu.rows_mut(OP, d_beta, tokens, heads)?;
    let tasks = tasks(spec, state);
    let parts: Vec<_> = tasks
        .par_iter()
        .map(|task| backward_task(&inputs, task, d_o))
        .collect();
    for (task, part) in tasks.iter().zip(parts) {
        let (rows, stride) = (&task.sequence, spec.conv_dim());
        let first = task.key_head * spec.key_head_dim;
        put_columns(d_u, &part.d_q, stride, rows, first);
        put_columns(d_u, &part.d_k, stride, rows, spec.key_dim() + first);
        for (member, value) in part.heads.iter().enumerate() {
            let head = task.key_head * spec.ratio() + member;
            let column = 2 * spec.key_dim() + head * spec.value_head_dim;
            put_columns(d_u, &value.d_v, stride, rows, column);
            put_columns(d_g, &value.d_g, heads, rows, head);
            put_columns(d_beta, &value.d_beta, heads, rows, head);
        }
    }
    cpu.round(d_u);
    Ok(())
}

struct TaskGrads {
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    heads: Vec<HeadGrads>,
}

#[derive(Default)]
struct HeadGrads {
    d_v: Vec<f32>,
    d_g: Vec<f32>,
    d_beta: Vec<f32>,
}

fn backward_task(inputs: &Inputs<'_>, task: &Task, d_o: &[f32]) -> TaskGrads {
    let spec = &inputs.spec;
    let (dk, dv, len) = (spec.key_head_dim, spec.value_head_dim, task.sequence.len());
    let qk = inputs.qk(task);
    let mut grads = TaskGrads {
        d_q: vec![0.0; len * dk],
        d_k: vec![0.0; len * dk],
        heads: Vec::new(),
    };
    for member in 0..spec.ratio() {
        let head_index = task.key_head * spec.ratio() + member;
        let head = inputs.value_head(&task.sequence, head_index);
        let d_o = columns(d_o, spec.value_dim(), &task.sequence, head_index * dv, dv);
        let mut head_grads = HeadGrads {
            d_v: vec![0.0; len * dv],
            d_g: vec![0.0; len],
            d_beta: vec![0.0; len],
        };
        let mut states = vec![vec![0.0; dk * dv]];
        for tokens in chunks(len) {
            let chunk = Chunk::new(spec, &qk, &head, tokens);
            let mut s = states[states.len() - 1].clone();
            let v = chunk.corrected_values(&s);
            chunk.advance(&mut s, &v);
            states.push(s);
        }
        let mut d_s = vec![0.0; dk * dv];
        for (tokens, s) in chunks(len).zip(&states).rev() {
            let chunk = Chunk::new(spec, &qk, &head, tokens.clone());
            let part = chunk.backward(s, &mut d_s, &d_o[tokens.start * dv..tokens.end * dv]);
            let keys = tokens.start * dk..tokens.end * dk;
            super::add_assign(&mut grads.d_q[keys.clone()], &part.d_q);
            super::add_assign(&mut grads.d_k[keys], &part.d_k);
            head_grads.d_v[tokens.start * dv..tokens.end * dv].copy_from_slice(&part.d_v);
            head_grads.d_g[tokens.clone()].copy_from_slice(&part.d_g);
            head_grads.d_beta[tokens].copy_from_slice(&part.d_beta);
        }
        grads.heads.push(head_grads);
    }
    l2_normalize_backward(&mut grads.d_q, &qk.q, &qk.q_rstd, dk, inputs.q_scale());
    l2_normalize_backward(&mut grads.d_k, &qk.k, &qk.k_rstd, dk, 1.0);
    grads
}

struct ChunkGrads {
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
    d_g: Vec<f32>,
    d_beta: Vec<f32>,
}

fn row_dot(a: &[f32], b: &[f32], row: usize, width: usize) -> f32 {
    let range = row * width..(row + 1) * width;
    a[range.clone()]
        .iter()
        .zip(&b[range])
        .map(|(a, b)| a * b)
        .sum()
}

impl Chunk<'_> {
    /// Gradients of the chunk's inputs; `d_s` comes in as the gradient of the state after the chunk and leaves as that
    /// of the state before it.
    fn backward(&self, s: &[f32], d_s: &mut [f32], d_o: &[f32]) -> ChunkGrads {
        let (c, dk, dv) = (self.c, self.dk, self.dv);
        let exp_gamma: Vec<f32> = self.gamma.iter().map(|gamma| gamma.exp()).collect();
        let to_end: Vec<f32> = self
            .gamma
            .iter()
            .map(|gamma| (self.last() - gamma).exp())
            .collect();
        let v = self.corrected_values(s);
        let d_o_mat = Mat::dense(d_o, c, dv);
        let s_mat = Mat::dense(s, dk, dv);

        // dV' = scores^T dO + diag(e^{gamma_C - gamma}) K dS
        let mut d_v = vec![0.0; c * dv];
        matmul(
            MatMut::dense(&mut d_v, c, dv),
            self.k,
            Mat::dense(d_s, dk, dv),
            1.0,
            0.0,
        );
        d_v = self.scaled_rows(&d_v, |i| to_end[i]);
        let scores = Mat::dense(&self.scores, c, c);
        matmul(
            MatMut::dense(&mut d_v, c, dv),
            scores.t(),
            d_o_mat,
            1.0,
            1.0,
        );

        // Through the state's update, before d_s is replaced: dK0 = diag(e^{gamma_C - gamma}) V' dS^T.
        let mut d_k0 = vec![0.0; c * dk];
        let d_s_mat = Mat::dense(d_s, dk, dv);
        matmul(
            MatMut::dense(&mut d_k0, c, dk),
            Mat::dense(&v, c, dv),
            d_s_mat.t(),
            1.0,
            0.0,
        );
        d_k0 = self.scaled_rows(&d_k0, |i| to_end[i]);
        let state_dot: f32 = s.iter().zip(d_s.iter()).map(|(s, d)| s * d).sum();
        let mut d_gamma_last = self.last().exp() * state_dot;

        // dS_before = e^{gamma_C} dS + (e^gamma Q)^T dO - W^T dV'
        let q_scaled = self.scaled_rows(self.q_values, |i| exp_gamma[i]);
        let d_s_out = MatMut::dense(d_s, dk, dv);
        matmul(
            d_s_out,
            Mat::dense(&q_scaled, c, dk).t(),
            d_o_mat,
            1.0,
            self.last().exp(),
        );
        let d_v_mat = Mat::dense(&d_v, c, dv);
        let w = Mat::dense(&self.w, c, dk);
        matmul(MatMut::dense(d_s, dk, dv), w.t(), d_v_mat, -1.0, 1.0);

        // P = tril(dO V'^T) o decay; dQ = e^gamma dO S^T + P K; dK = dK0 + P^T Q
        let mut p = vec![0.0; c * c];
        matmul(
            MatMut::dense(&mut p, c, c),
            d_o_mat,
            Mat::dense(&v, c, dv).t(),
            1.0,
            0.0,
        );
        p.iter_mut()
            .zip(&self.decay)
            .for_each(|(p, decay)| *p *= decay);
        let mut d_q = vec![0.0; c * dk];
        matmul(MatMut::dense(&mut d_q, c, dk), d_o_mat, s_mat.t(), 1.0, 0.0);
        d_q = self.scaled_rows(&d_q, |i| exp_gamma[i]);
        matmul(
            MatMut::dense(&mut d_q, c, dk),
            Mat::dense(&p, c, c),
            self.k,
            1.0,
            1.0,
        );
        let mut d_k = d_k0.clone();
        matmul(
            MatMut::dense(&mut d_k, c, dk),
            Mat::dense(&p, c, c).t(),
            self.q,
            1.0,
            1.0,
        );
        let mut d_gamma: Vec<f32> = (0..c)
            .map(|i| row_dot(&d_q, self.q_values, i, dk) - row_dot(&d_k, self.k_values, i, dk))
            .collect();
        d_gamma_last += (0..c)
            .map(|i| row_dot(&d_k0, self.k_values, i, dk))
            .sum::<f32>();

        // Through W = T diag(beta e^gamma) K and U = T diag(beta) V, T = (I + L)^-1: X = T^T dW, Y = T^T dU.
        let mut x = vec![0.0; c * dk];
        matmul(MatMut::dense(&mut x, c, dk), d_v_mat, s_mat.t(), -1.0, 0.0);
        solve_transposed(&self.lower, &mut x, c);
        let mut y = d_v;
        solve_transposed(&self.lower, &mut y, c);
        let mut d_beta = vec![0.0; c];
        for i in 0..c {
            let x_dot_k = row_dot(&x, self.k_values, i, dk) * exp_gamma[i];
            d_beta[i] = x_dot_k + row_dot(&y, self.v_values, i, dv);
            d_gamma[i] += self.beta[i] * x_dot_k;
        }
        // E = -tril_{-1}(X W^T + Y U^T) o decay, the gradient of beta_i <k_i, k_j>.
        let mut e = vec![0.0; c * c];
        matmul(
            MatMut::dense(&mut e, c, c),
            Mat::dense(&x, c, dk),
            w.t(),
            -1.0,
            0.0,
        );
        let u = Mat::dense(&self.u, c, dv);
        matmul(
            MatMut::dense(&mut e, c, c),
            Mat::dense(&y, c, dv),
            u.t(),
            -1.0,
            1.0,
        );
        for i in 0..c {
            for j in 0..c {
                e[i * c + j] = if j < i {
                    e[i * c + j] * self.decay[i * c + j]
                } else {
                    0.0
                };
            }
        }
        let mut e_k = vec![0.0; c * dk];
        matmul(
            MatMut::dense(&mut e_k, c, dk),
            Mat::dense(&e, c, c),
            self.k,
            1.0,
            0.0,
        );
        let beta_k = self.scaled_rows(self.k_values, |i| self.beta[i]);
        for i in 0..c {
            let row = i * dk..(i + 1) * dk;
            for at in row {
                d_k[at] += self.beta[i] * (exp_gamma[i] * x[at] + e_k[at]);
            }
            d_beta[i] += row_dot(&e_k, self.k_values, i, dk);
        }
        let beta_k_mat = Mat::dense(&beta_k, c, dk);
        matmul(
            MatMut::dense(&mut d_k, c, dk),
            Mat::dense(&e, c, c).t(),
            beta_k_mat,
            1.0,
            1.0,
        );
        // M = E o (beta_i <k_i, k_j>): gamma enters as +gamma_i - gamma_j. L holds decay already; E does too, so undo one.
        self.decay_gradient(&e, &mut d_gamma);
        d_gamma[c - 1] += d_gamma_last;
        let d_v = self.scaled_rows(&y, |i| self.beta[i]);
        let mut sum = 0.0;
        for value in d_gamma.iter_mut().rev() {
            sum += *value;
            *value = sum;
        }
        ChunkGrads {
            d_q,
            d_k,
            d_v,
            d_g: d_gamma,
            d_beta,
        }
    }

    /// `d_gamma += rowsum(M) - colsum(M)` with `M_ij = E_ij beta_i <k_i, k_j>`.
    fn decay_gradient(&self, e: &[f32], d_gamma: &mut [f32]) {
        let c = self.c;
        let mut products = vec![0.0; c * c];
        matmul(
            MatMut::dense(&mut products, c, c),
            self.k,
            self.k.t(),
            1.0,
            0.0,
        );
        for i in 0..c {
            for j in 0..i {
                let m = e[i * c + j] * self.beta[i] * products[i * c + j];
                d_gamma[i] += m;
                d_gamma[j] -= m;
            }
        }
    }
}
