//! Cases of `route`.

use super::stage::{Stage, scaled, state, values};
use super::{Case, Outputs};
use crate::error::Result;
use crate::ops::Routing;
use crate::random::{Draws, Stream};

/// Extents of a case.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: usize,
    capacity: usize,
    num_experts: usize,
    top_k: usize,
    norm_topk_prob: bool,
    /// Logits are small integers, so that most probabilities have equals.
    ties: bool,
}

impl Shape {
    fn label(self) -> String {
        let norm = if self.norm_topk_prob { " norm" } else { "" };
        let ties = if self.ties { " ties" } else { "" };
        format!(
            "T{}/{} E{} K{}{norm}{ties}",
            self.tokens, self.capacity, self.num_experts, self.top_k
        )
    }

    fn logits(self) -> Vec<f32> {
        let len = self.tokens * self.num_experts;
        if !self.ties {
            return scaled(len, 1, 2.0);
        }
        let mut draws = Draws::new(1, Stream::Synthetic, 3);
        (0..len).map(|_| draws.below(3) as f32).collect()
    }

    fn routing(self, stage: &Stage<'_>) -> Result<Routing> {
        let (slots, k) = (self.capacity * self.top_k, self.top_k);
        Ok(Routing {
            topk_ids: stage.out_u32("topk_ids", &[self.capacity, k])?,
            topk_weights: stage.out_f32("topk_weights", &[self.capacity, k])?,
            expert_offsets: stage.out_u32("expert_offsets", &[self.num_experts + 1])?,
            slot_of_row: stage.out_u32("slot_of_row", &[slots])?,
            row_of_slot: stage.out_u32("row_of_slot", &[slots])?,
            num_experts: self.num_experts,
            num_experts_per_tok: k,
            norm_topk_prob: self.norm_topk_prob,
        })
    }
}

/// Softmax, the chosen experts in order, and their weights, for one token.
fn route(logits: &[f32], top_k: usize, norm: bool) -> (Vec<f64>, Vec<usize>, Vec<f64>) {
    let max = logits
        .iter()
        .fold(f64::NEG_INFINITY, |m, l| m.max(f64::from(*l)));
    let exp: Vec<f64> = logits.iter().map(|l| (f64::from(*l) - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    let p: Vec<f64> = exp.iter().map(|e| e / sum).collect();
    let mut chosen: Vec<usize> = (0..p.len()).collect();
    chosen.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    chosen.truncate(top_k);
    let total: f64 = chosen.iter().map(|e| p[*e]).sum();
    let divisor = if norm { total } else { 1.0 };
    let weights = chosen.iter().map(|e| p[*e] / divisor).collect();
    (p, chosen, weights)
}

fn index(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn forward(shape: Shape) -> Case {
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], 100, 7);
        stage.load(&state)?;
        let logits = [shape.capacity, shape.num_experts];
        let logits = stage.rows_f32("logits", logits, &shape.logits())?;
        let mut routing = shape.routing(stage)?;
        stage.ops.moe_route_forward(&mut routing, &logits, &state)?;
        let slots = shape.tokens * shape.top_k;
        let beyond =
            |tensor, len| -> Result<Vec<u32>> { Ok(stage.read_u32(tensor, len)?.split_off(slots)) };
        let all = shape.capacity * shape.top_k;
        let mut untouched = beyond(&routing.slot_of_row, all)?;
        untouched.extend(beyond(&routing.row_of_slot, all)?);
        Ok(Outputs::new()
            .exact("topk_ids", stage.read_u32(&routing.topk_ids, slots)?)
            .f32(
                "topk_weights",
                stage.read_rows(&routing.topk_weights, shape.tokens)?,
            )
            .exact(
                "expert_offsets",
                stage.read_u32(&routing.expert_offsets, shape.num_experts + 1)?,
            )
            .exact("slot_of_row", stage.read_u32(&routing.slot_of_row, slots)?)
            .exact("row_of_slot", stage.read_u32(&routing.row_of_slot, slots)?)
            .exact("beyond", untouched))
    };
    let oracle = move || {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for logits in shape.logits().chunks(shape.num_experts) {
            let (_, chosen, own) = route(logits, shape.top_k, shape.norm_topk_prob);
            ids.extend(chosen.into_iter().map(index));
            weights.extend(own);
        }
        let mut slots: Vec<usize> = (0..ids.len()).collect();
        slots.sort_by_key(|slot| (ids[*slot], *slot));
        let mut row_of_slot = vec![0; ids.len()];
        for (row, slot) in slots.iter().enumerate() {
            row_of_slot[*slot] = index(row);
        }
        let first = |expert: usize| ids.iter().filter(|id| (**id as usize) < expert).count();
        let offsets = (0..=shape.num_experts).map(|expert| index(first(expert)));
        let surplus = 2 * (shape.capacity - shape.tokens) * shape.top_k;
        Outputs::new()
            .exact("topk_ids", ids.clone())
            .f32("topk_weights", weights)
            .exact("expert_offsets", offsets.collect())
            .exact("slot_of_row", slots.into_iter().map(index).collect())
            .exact("row_of_slot", row_of_slot)
            .exact("beyond", vec![u32::MAX; surplus])
    };
    Case::new("moe_route_forward", shape.label(), run, oracle)
}

fn backward(shape: Shape) -> Case {
    let grads = move || values(shape.tokens * shape.top_k, 2);
    let run = move |stage: &Stage<'_>| {
        let state = state(&[shape.tokens], 100, 7);
        stage.load(&state)?;
        let wide = [shape.capacity, shape.num_experts];
        let logits = stage.rows_f32("logits", wide, &shape.logits())?;
        let d_weights = [shape.capacity, shape.top_k];
        let d_weights = stage.rows_f32("d_topk_weights", d_weights, &grads())?;
        let mut routing = shape.routing(stage)?;
        let mut d_logits = stage.out_f32("d_logits", &wide)?;
        stage.ops.moe_route_forward(&mut routing, &logits, &state)?;
        stage
            .ops
            .moe_route_backward(&mut d_logits, &d_weights, &logits, &routing, &state)?;
        let d_logits = stage.read_rows(&d_logits, shape.tokens)?;
        Ok(Outputs::new().f32("d_logits", d_logits))
    };
    let oracle = move || {
        let mut d_logits = Vec::new();
        for (logits, d_weights) in shape
            .logits()
            .chunks(shape.num_experts)
            .zip(grads().chunks(shape.top_k))
        {
            let (p, chosen, weights) = route(logits, shape.top_k, shape.norm_topk_prob);
            // By the chain rule: w_j = p_j / s, p = softmax.
            let s: f64 = chosen.iter().map(|e| p[*e]).sum();
            let d: Vec<f64> = d_weights.iter().map(|d| f64::from(*d)).collect();
            let dot: f64 = weights.iter().zip(&d).map(|(w, d)| w * d).sum();
            let mut d_p = vec![0.0; p.len()];
            for (expert, d) in chosen.iter().zip(&d) {
                d_p[*expert] = if shape.norm_topk_prob {
                    (d - dot) / s
                } else {
                    *d
                };
            }
            let mean: f64 = p.iter().zip(&d_p).map(|(p, d)| p * d).sum();
            d_logits.extend(p.iter().zip(&d_p).map(|(p, d)| p * (d - mean)));
        }
        Outputs::new().f32("d_logits", d_logits)
    };
    Case::new("moe_route_backward", shape.label(), run, oracle)
}

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let shapes = [
        (1, 1, 1, 1),
        (1, 3, 8, 8),
        (31, 33, 33, 3),
        (32, 32, 64, 16),
        (33, 64, 7, 2),
        (97, 131, 512, 10),
        (3, 3, 1000, 8),
    ];
    let mut cases = Vec::new();
    for (tokens, capacity, num_experts, top_k) in shapes {
        for (norm_topk_prob, ties) in [(true, false), (false, false), (false, true)] {
            let shape = Shape {
                tokens,
                capacity,
                num_experts,
                top_k,
                norm_topk_prob,
                ties,
            };
            cases.push(forward(shape));
            cases.push(backward(shape));
        }
    }
    cases
}
