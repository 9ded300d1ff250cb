//! Backward of the gated delta rule: chunks from last to first, each recomputed.

use rayon::prelude::*;

use super::{
    Chunk, Inputs, Task, chunks, columns, l2_normalize_backward, put_columns, solve_transposed,
    tasks,
};
use crate::backend::cpu::gemm::{Mat, MatMut, matmul};
use crate::backend::cpu::{Cpu, add_assign};
use crate::error::Result;
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(in super::super) fn backward(
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
            add_assign(&mut grads.d_q[keys.clone()], &part.d_q);
            add_assign(&mut grads.d_k[keys], &part.d_k);
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
