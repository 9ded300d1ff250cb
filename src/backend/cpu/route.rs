//! Routing of a mixture of experts: softmax, top-k, rows sorted by expert.

use rayon::prelude::*;

use super::Cpu;
use crate::error::Result;
use crate::ops::{Routing, StepState};
use crate::tensor::Tensor;

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.iter().map(|value| value / sum).collect()
}

/// The `k` largest, by falling value; ties go to the lower index.
fn top_k(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let by_value = |a: &usize, b: &usize| values[*b].total_cmp(&values[*a]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, by_value);
        order.truncate(k);
    }
    order.sort_unstable_by(by_value);
    order
}

fn index(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

pub(super) fn forward(
    cpu: &Cpu,
    routing: &mut Routing,
    logits: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_forward";
    let (tokens, experts, k) = (
        state.num_tokens(),
        routing.num_experts,
        routing.num_experts_per_tok,
    );
    let logits = cpu.rows(OP, logits, tokens, experts)?;
    let ids = &mut routing.topk_ids.u32_mut()?[..tokens * k];
    let weights = cpu.rows_mut(OP, &mut routing.topk_weights, tokens, k)?;
    let norm = routing.norm_topk_prob;
    ids.par_chunks_mut(k)
        .zip(weights.par_chunks_mut(k))
        .zip(logits.par_chunks(experts))
        .for_each(|((ids, weights), logits)| {
            let p = softmax(logits);
            let chosen = top_k(&p, k);
            let sum: f32 = if norm {
                chosen.iter().map(|e| p[*e]).sum()
            } else {
                1.0
            };
            for ((id, weight), expert) in ids.iter_mut().zip(weights).zip(chosen) {
                *id = index(expert);
                *weight = p[expert] / sum;
            }
        });
    let offsets = routing.expert_offsets.u32_mut()?;
    offsets.fill(0);
    for id in ids.iter() {
        offsets[*id as usize + 1] += 1;
    }
    for expert in 0..experts {
        offsets[expert + 1] += offsets[expert];
    }
    let mut next = offsets.to_vec();
    let slot_of_row = routing.slot_of_row.u32_mut()?;
    let row_of_slot = routing.row_of_slot.u32_mut()?;
    for (slot, id) in ids.iter().enumerate() {
        let row = next[*id as usize];
        next[*id as usize] += 1;
        slot_of_row[row as usize] = index(slot);
        row_of_slot[slot] = row;
    }
    Ok(())
}

pub(super) fn backward(
    cpu: &Cpu,
    d_logits: &mut Tensor,
    d_topk_weights: &Tensor,
    logits: &Tensor,
    routing: &Routing,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_backward";
    let (tokens, experts, k) = (
        state.num_tokens(),
        routing.num_experts,
        routing.num_experts_per_tok,
    );
    let d_logits = cpu.rows_mut(OP, d_logits, tokens, experts)?;
    let d_weights = cpu.rows(OP, d_topk_weights, tokens, k)?;
    let logits = cpu.rows(OP, logits, tokens, experts)?;
    let ids = &routing.topk_ids.u32()?[..tokens * k];
    let weights = cpu.rows(OP, &routing.topk_weights, tokens, k)?;
    let chosen = ids
        .par_chunks(k)
        .zip(weights.par_chunks(k).zip(d_weights.par_chunks(k)));
    d_logits
        .par_chunks_mut(experts)
        .zip(logits.par_chunks(experts))
        .zip(chosen)
        .for_each(|((d_logits, logits), (ids, (weights, d_weights)))| {
            let dot: f32 = weights.iter().zip(d_weights).map(|(w, d)| w * d).sum();
            if routing.norm_topk_prob {
                // A softmax over the chosen logits alone.
                d_logits.fill(0.0);
            } else {
                for (d_logit, p) in d_logits.iter_mut().zip(softmax(logits)) {
                    *d_logit = -p * dot;
                }
            }
            for ((id, w), d) in ids.iter().zip(weights).zip(d_weights) {
                let own = if routing.norm_topk_prob { d - dot } else { *d };
                d_logits[*id as usize] += w * own;
            }
        });
    Ok(())
}
