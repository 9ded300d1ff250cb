//! Causal attention over packed sequences, a block of queries at a time: scores are never held for a whole sequence.
//!
//! One task owns a sequence and a key/value head, so that `d_k` and `d_v` are summed over its query heads in order.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, matmul};
use super::{Cpu, sigmoid};
use crate::error::Result;
use crate::ops::{AttentionSpec, StepState};
use crate::tensor::Tensor;

/// Queries per block.
const QUERY_BLOCK: usize = 64;

/// One sequence and one key/value head, with the query heads that share it.
struct Task {
    sequence: Range<usize>,
    kv_head: usize,
}

fn tasks(spec: AttentionSpec, state: &StepState) -> Vec<Task> {
    state
        .sequences()
        .flat_map(|(start, end)| {
            let heads = 0..spec.num_key_value_heads;
            heads.map(move |kv_head| Task {
                sequence: start..end,
                kv_head,
            })
        })
        .collect()
}

/// The tensors of a call, and where a task's heads lie in them.
struct Heads<'a> {
    spec: AttentionSpec,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

impl<'a> Heads<'a> {
    fn group(&self) -> usize {
        self.spec.num_attention_heads / self.spec.num_key_value_heads
    }

    /// Rows `rows` of head `head` in a tensor of `num_heads` heads.
    fn head(&self, data: &'a [f32], num_heads: usize, head: usize, rows: Range<usize>) -> Mat<'a> {
        let (hd, stride) = (self.spec.head_dim, num_heads * self.spec.head_dim);
        Mat::new(
            &data[rows.start * stride + head * hd..],
            rows.len(),
            hd,
            stride,
        )
    }

    fn query(&self, data: &'a [f32], head: usize, rows: Range<usize>) -> Mat<'a> {
        self.head(data, self.spec.num_attention_heads, head, rows)
    }

    fn key(&self, data: &'a [f32], head: usize, rows: Range<usize>) -> Mat<'a> {
        self.head(data, self.spec.num_key_value_heads, head, rows)
    }

    /// Blocks of a sequence's queries with the keys that any of them sees (token rows).
    fn blocks(
        &self,
        sequence: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let (sequence, window) = (sequence.clone(), self.spec.sliding_window);
        sequence.clone().step_by(QUERY_BLOCK).map(move |first| {
            let queries = first..sequence.end.min(first + QUERY_BLOCK);
            let reach = window.map_or(0, |window| (first + 1).saturating_sub(window));
            (queries.clone(), reach.max(sequence.start)..queries.end)
        })
    }

    /// Scaled scores of a block, `[queries, keys]`; what a query does not see is minus infinity.
    fn scores(&self, head: usize, queries: &Range<usize>, keys: &Range<usize>) -> Vec<f32> {
        let width = keys.len();
        let mut scores = vec![0.0; queries.len() * width];
        let q = self.query(self.q, head, queries.clone());
        let k = self.key(self.k, head / self.group(), keys.clone());
        let out = MatMut::dense(&mut scores, queries.len(), width);
        matmul(out, q, k.t(), self.spec.softmax_scale(), 0.0);
        for (row, query) in scores.chunks_mut(width).zip(queries.clone()) {
            let first = self
                .spec
                .sliding_window
                .map_or(0, |window| (query + 1).saturating_sub(window));
            row[..first.saturating_sub(keys.start)].fill(f32::NEG_INFINITY);
            row[query + 1 - keys.start..].fill(f32::NEG_INFINITY);
        }
        scores
    }
}

/// Copies a task's `[rows, heads * hd]` result into its columns of `out`.
fn scatter(out: &mut [f32], part: &[f32], sequence: &Range<usize>, first: usize, width: usize) {
    let columns = part.len() / sequence.len();
    for (row, values) in sequence.clone().zip(part.chunks(columns)) {
        out[row * width + first..][..columns].copy_from_slice(values);
    }
}

pub(super) fn forward(
    cpu: &Cpu,
    o: &mut Tensor,
    lse: &mut Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_forward";
    let tokens = state.num_tokens();
    let (q_width, k_width) = (
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    );
    let heads = Heads {
        spec,
        q: cpu.rows(OP, q, tokens, q_width)?,
        k: cpu.rows(OP, k, tokens, k_width)?,
        v: cpu.rows(OP, v, tokens, k_width)?,
    };
    let o = cpu.rows_mut(OP, o, tokens, q_width)?;
    let lse = cpu.rows_mut(OP, lse, tokens, spec.num_attention_heads)?;
    let tasks = tasks(spec, state);
    let parts: Vec<_> = tasks
        .par_iter()
        .map(|task| forward_task(&heads, task))
        .collect();
    let group = heads.group();
    for (task, (o_part, lse_part)) in tasks.iter().zip(parts) {
        let first_head = task.kv_head * group;
        scatter(
            o,
            &o_part,
            &task.sequence,
            first_head * spec.head_dim,
            q_width,
        );
        scatter(
            lse,
            &lse_part,
            &task.sequence,
            first_head,
            spec.num_attention_heads,
        );
    }
    cpu.round(o);
    Ok(())
}

fn forward_task(heads: &Heads<'_>, task: &Task) -> (Vec<f32>, Vec<f32>) {
    let (hd, group, start) = (heads.spec.head_dim, heads.group(), task.sequence.start);
    let width = group * hd;
    let mut o = vec![0.0; task.sequence.len() * width];
    let mut lse = vec![0.0; task.sequence.len() * group];
    for member in 0..group {
        let head = task.kv_head * group + member;
        for (queries, keys) in heads.blocks(&task.sequence) {
            let mut p = heads.scores(head, &queries, &keys);
            for (row, query) in p.chunks_mut(keys.len()).zip(queries.clone()) {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for value in row.iter_mut() {
                    *value = (*value - max).exp();
                    sum += *value;
                }
                row.iter_mut().for_each(|value| *value /= sum);
                lse[(query - start) * group + member] = max + sum.ln();
            }
            let out = &mut o[(queries.start - start) * width + member * hd..];
            let p = Mat::dense(&p, queries.len(), keys.len());
            let v = heads.key(heads.v, task.kv_head, keys);
            matmul(MatMut::new(out, queries.len(), hd, width), p, v, 1.0, 0.0);
        }
    }
    (o, lse)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    cpu: &Cpu,
    d_q: &mut Tensor,
    d_k: &mut Tensor,
    d_v: &mut Tensor,
    d_o: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_backward";
    let tokens = state.num_tokens();
    let (q_width, k_width) = (
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    );
    let heads = Heads {
        spec,
        q: cpu.rows(OP, q, tokens, q_width)?,
        k: cpu.rows(OP, k, tokens, k_width)?,
        v: cpu.rows(OP, v, tokens, k_width)?,
    };
    let saved = Saved {
        d_o: cpu.rows(OP, d_o, tokens, q_width)?,
        o: cpu.rows(OP, o, tokens, q_width)?,
        lse: cpu.rows(OP, lse, tokens, spec.num_attention_heads)?,
    };
    let d_q = cpu.rows_mut(OP, d_q, tokens, q_width)?;
    let d_k = cpu.rows_mut(OP, d_k, tokens, k_width)?;
    let d_v = cpu.rows_mut(OP, d_v, tokens, k_width)?;
    let tasks = tasks(spec, state);
    let parts: Vec<_> = tasks
        .par_iter()
        .map(|task| backward_task(&heads, &saved, task))
        .collect();
    for (task, part) in tasks.iter().zip(parts) {
        let k_first = task.kv_head * spec.head_dim;
        scatter(
            d_q,
            &part.d_q,
            &task.sequence,
            k_first * heads.group(),
            q_width,
        );
        scatter(d_k, &part.d_k, &task.sequence, k_first, k_width);
        scatter(d_v, &part.d_v, &task.sequence, k_first, k_width);
    }
    cpu.round(d_q);
    cpu.round(d_k);
    cpu.round(d_v);
    Ok(())
}

struct Saved<'a> {
    d_o: &'a [f32],
    o: &'a [f32],
    lse: &'a [f32],
}

struct Grads {
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
}

fn backward_task(heads: &Heads<'_>, saved: &Saved<'_>, task: &Task) -> Grads {
    let (hd, group, start) = (heads.spec.head_dim, heads.group(), task.sequence.start);
    let num_heads = heads.spec.num_attention_heads;
    let (width, len) = (group * hd, task.sequence.len());
    let mut grads = Grads {
        d_q: vec![0.0; len * width],
        d_k: vec![0.0; len * hd],
        d_v: vec![0.0; len * hd],
    };
    for member in 0..group {
        let head = task.kv_head * group + member;
        for (queries, keys) in heads.blocks(&task.sequence) {
            let (m, n, key_row) = (queries.len(), keys.len(), (keys.start - start) * hd);
            let mut p = heads.scores(head, &queries, &keys);
            for (row, query) in p.chunks_mut(n).zip(queries.clone()) {
                let lse = saved.lse[query * num_heads + head];
                row.iter_mut()
                    .for_each(|value| *value = (*value - lse).exp());
            }
            let d_o = heads.query(saved.d_o, head, queries.clone());
            let d_v = MatMut::dense(&mut grads.d_v[key_row..], n, hd);
            matmul(d_v, Mat::dense(&p, m, n).t(), d_o, 1.0, 1.0);

            let mut d_s = vec![0.0; m * n];
            let v = heads.key(heads.v, task.kv_head, keys.clone());
            matmul(MatMut::dense(&mut d_s, m, n), d_o, v.t(), 1.0, 0.0);
            for ((d_s, p), query) in d_s.chunks_mut(n).zip(p.chunks(n)).zip(queries.clone()) {
                let at = (query * num_heads + head) * hd;
                let terms = saved.d_o[at..at + hd].iter().zip(&saved.o[at..at + hd]);
                let delta: f32 = terms.map(|(d_o, o)| d_o * o).sum();
                for (d_s, p) in d_s.iter_mut().zip(p) {
                    *d_s = p * (*d_s - delta) * heads.spec.softmax_scale();
                }
            }
            let d_s = Mat::dense(&d_s, m, n);
            let d_q = &mut grads.d_q[(queries.start - start) * width + member * hd..];
            let k = heads.key(heads.k, task.kv_head, keys);
            matmul(MatMut::new(d_q, m, hd, width), d_s, k, 1.0, 0.0);
            let d_k = MatMut::dense(&mut grads.d_k[key_row..], n, hd);
            matmul(d_k, d_s.t(), heads.query(heads.q, head, queries), 1.0, 1.0);
        }
    }
    grads
}

pub(super) fn gate_forward(
    cpu: &Cpu,
    y: &mut Tensor,
    o: &Tensor,
    q_proj: &Tensor,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_gate_forward";
    let (tokens, hd, stride) = (state.num_tokens(), spec.head_dim, spec.q_head_stride());
    let (width, q_width) = (
        spec.num_attention_heads * hd,
        spec.num_attention_heads * stride,
    );
    let o = cpu.rows(OP, o, tokens, width)?;
    let q_proj = cpu.rows(OP, q_proj, tokens, q_width)?;
    let y = cpu.rows_mut(OP, y, tokens, width)?;
    y.par_chunks_mut(width)
        .zip(o.par_chunks(width).zip(q_proj.par_chunks(q_width)))
        .for_each(|(y, (o, q_proj))| {
            let gates = q_proj.chunks(stride).flat_map(|head| &head[hd..]);
            for ((y, o), gate) in y.iter_mut().zip(o).zip(gates) {
                *y = o * sigmoid(*gate);
            }
            cpu.round(y);
        });
    Ok(())
}

pub(super) fn gate_backward(
    cpu: &Cpu,
    d_o: &mut Tensor,
    d_q_proj: &mut Tensor,
    d_y: &Tensor,
    o: &Tensor,
    q_proj: &Tensor,
    spec: AttentionSpec,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_gate_backward";
    let (tokens, hd, stride) = (state.num_tokens(), spec.head_dim, spec.q_head_stride());
    let (width, q_width) = (
        spec.num_attention_heads * hd,
        spec.num_attention_heads * stride,
    );
    let d_y = cpu.rows(OP, d_y, tokens, width)?;
    let o = cpu.rows(OP, o, tokens, width)?;
    let q_proj = cpu.rows(OP, q_proj, tokens, q_width)?;
    let d_o = cpu.rows_mut(OP, d_o, tokens, width)?;
    let d_q_proj = cpu.rows_mut(OP, d_q_proj, tokens, q_width)?;
    d_o.par_chunks_mut(hd)
        .zip(d_q_proj.par_chunks_mut(stride))
        .zip(
            d_y.par_chunks(hd)
                .zip(o.par_chunks(hd))
                .zip(q_proj.par_chunks(stride)),
        )
        .with_min_len(spec.num_attention_heads)
        .for_each(|((d_o, d_q_proj), ((d_y, o), q_proj))| {
            for i in 0..hd {
                let gate = sigmoid(q_proj[hd + i]);
                d_o[i] = d_y[i] * gate;
                d_q_proj[hd + i] = d_y[i] * o[i] * gate * (1.0 - gate);
            }
            cpu.round(d_o);
            cpu.round(&mut d_q_proj[hd..]);
        });
    Ok(())
}
