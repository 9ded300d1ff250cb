//! Mixture of experts: the experts' SwiGLU with per-expert adapters, one task per expert.

use rayon::prelude::*;

use super::elementwise::{swiglu, swiglu_grad};
use super::gemm::{Mat, MatMut};
use super::linear::{times_weight, times_weight_transposed};
use super::lora::{Lora, LoraGrads, LoraRows};
use super::{Cpu, add_assign};
use crate::error::Result;
use crate::ops::{DropoutState, Experts, ExpertsLora, GradOut, LoraPair, Routing, StepState};
use crate::store::Weight;
use crate::tensor::Tensor;
/// The rows of one expert, and what they belong to.
struct ExpertRows<'a> {
    expert: usize,
    slots: &'a [u32],
    top_k: usize,
}

impl ExpertRows<'_> {
    fn token(&self, row: usize) -> usize {
        self.slots[row] as usize / self.top_k
    }

    fn token_index(&self) -> impl Fn(usize) -> u32 + '_ {
        |row| u32::try_from(self.token(row)).unwrap_or(u32::MAX)
    }

    /// The rows of a `[T, width]` matrix, gathered.
    fn gather(&self, data: &[f32], width: usize) -> Vec<f32> {
        let rows = (0..self.slots.len()).map(|row| self.token(row) * width);
        rows.flat_map(|first| &data[first..first + width])
            .copied()
            .collect()
    }
}

/// Experts with their row ranges.
fn experts_rows(routing: &Routing) -> Result<Vec<ExpertRows<'_>>> {
    let (offsets, slots) = (routing.expert_offsets.u32()?, routing.slot_of_row.u32()?);
    let ranges = offsets
        .windows(2)
        .map(|pair| pair[0] as usize..pair[1] as usize);
    let top_k = routing.num_experts_per_tok;
    Ok(ranges
        .enumerate()
        .map(|(expert, rows)| ExpertRows {
            expert,
            slots: &slots[rows],
            top_k,
        })
        .collect())
}

/// Cuts `[R, width]` into one slice per expert.
fn split<'a>(
    mut data: &'a mut [f32],
    experts: &[ExpertRows<'_>],
    width: usize,
) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(experts.len());
    for rows in experts {
        let (part, rest) = std::mem::take(&mut data).split_at_mut(rows.slots.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

fn split_ref<'a>(mut data: &'a [f32], experts: &[ExpertRows<'_>], width: usize) -> Vec<&'a [f32]> {
    let mut parts = Vec::with_capacity(experts.len());
    for rows in experts {
        let (part, rest) = data.split_at(rows.slots.len() * width);
        parts.push(part);
        data = rest;
    }
    parts
}

/// Cuts the gradient arena into one slice per expert, each starting at the element `first + expert * stride`.
fn split_grads<'a>(
    d_lora: &'a mut [f32],
    lora: &ExpertsLora,
    num_experts: usize,
) -> (usize, Vec<&'a mut [f32]>) {
    let pairs = [lora.gate, lora.up, lora.down];
    let first = pairs.iter().flatten().map(|pair| pair.a).min();
    let Some(first) = first else {
        return (0, (0..num_experts).map(|_| Default::default()).collect());
    };
    let all = &mut d_lora[first..first + num_experts * lora.stride];
    (first, all.chunks_mut(lora.stride).collect())
}

/// One projection of one expert.
struct Projection<'a> {
    weight: &'a Weight,
    dims: [usize; 2],
    lora: Option<Lora<'a>>,
    /// First column of the pair's projection in rows of `xa_width`.
    xa_start: usize,
    xa_width: usize,
}

/// What the experts' ops share.
struct Context<'a> {
    cpu: &'a Cpu,
    experts: &'a Experts,
    values: &'a [f32],
    dropout: Option<DropoutState>,
}

impl<'a> Context<'a> {
    fn pair(&self, pair: Option<LoraPair>, expert: usize) -> Option<Lora<'a>> {
        let pair = self.experts.lora.of(pair, expert)?;
        Some(Lora::new(self.cpu, pair, self.values, self.dropout))
    }

    fn gate(&self, expert: usize) -> Projection<'a> {
        self.input_side(
            &self.experts.gate[expert],
            self.experts.lora.gate,
            expert,
            0,
        )
    }

    fn up(&self, expert: usize) -> Projection<'a> {
        let start = self.experts.lora.gate.map_or(0, |pair| pair.rank);
        self.input_side(
            &self.experts.up[expert],
            self.experts.lora.up,
            expert,
            start,
        )
    }

    fn input_side(
        &self,
        weight: &'a Weight,
        pair: Option<LoraPair>,
        expert: usize,
        xa_start: usize,
    ) -> Projection<'a> {
        let dims = [self.experts.intermediate_size, self.experts.hidden_size];
        let xa_width = self.experts.lora.gate_up_rank();
        Projection {
            weight,
            dims,
            lora: self.pair(pair, expert),
            xa_start,
            xa_width,
        }
    }

    fn down(&self, expert: usize) -> Projection<'a> {
        let lora = &self.experts.lora;
        Projection {
            weight: &self.experts.down[expert],
            dims: [self.experts.hidden_size, self.experts.intermediate_size],
            lora: self.pair(lora.down, expert),
            xa_start: 0,
            xa_width: lora.down_rank(),
        }
    }
}

impl Projection<'_> {
    /// `out = x W^T + s xa B^T`, `xa` saved.
    fn forward(
        &self,
        cpu: &Cpu,
        out: &mut [f32],
        xa: &mut [f32],
        x: &[f32],
        rows: &ExpertRows<'_>,
    ) -> Result<()> {
        let (m, n) = (rows.slots.len(), self.dims[0]);
        times_weight_transposed(cpu, out, x, self.weight, self.dims)?;
        if let Some(lora) = &self.lora {
            let rank = lora.pair.rank;
            let dropped = lora.dropped(x, rows.token_index());
            let xa = &mut xa[self.xa_start..];
            lora.project(MatMut::new(xa, m, rank, self.xa_width), &dropped);
            cpu.round_columns(xa, m, rank, self.xa_width);
            lora.add(
                MatMut::dense(out, m, n),
                Mat::new(xa, m, rank, self.xa_width),
            );
        }
        cpu.round(out);
        Ok(())
    }

    /// `d_x (+)= d_out W`, plus the adapter's part with the given `d_xa`.
    fn backward_x(
        &self,
        cpu: &Cpu,
        d_x: &mut [f32],
        d_out: &[f32],
        d_xa: &[f32],
        rows: &ExpertRows<'_>,
        accumulate: bool,
    ) -> Result<()> {
        times_weight(cpu, d_x, d_out, self.weight, self.dims, accumulate)?;
        if let Some(lora) = &self.lora {
            let d_xa = Mat::dense(d_xa, rows.slots.len(), lora.pair.rank);
            lora.add_d_x(d_x, d_xa, rows.token_index());
        }
        Ok(())
    }

    /// `s d_out B`, empty without an adapter.
    fn d_xa(&self, cpu: &Cpu, d_out: &[f32], num_rows: usize) -> Vec<f32> {
        let Some(lora) = &self.lora else {
            return Vec::new();
        };
        let mut d_xa = vec![0.0; num_rows * lora.pair.rank];
        let out = MatMut::dense(&mut d_xa, num_rows, lora.pair.rank);
        lora.d_xa(out, Mat::dense(d_out, num_rows, self.dims[0]));
        cpu.round(&mut d_xa);
        d_xa
    }

    /// Adds `dA` and `dB` into the expert's slice of the gradient arena.
    fn grads(
        &self,
        arena: &mut [f32],
        base: usize,
        x: &[f32],
        xa: &[f32],
        d: (&[f32], &[f32]),
        rows: &ExpertRows<'_>,
    ) {
        let Some(lora) = &self.lora else { return };
        let (num_rows, rank, (d_out, d_xa)) = (rows.slots.len(), lora.pair.rank, d);
        let dropped = lora.dropped(x, rows.token_index());
        let rows = LoraRows {
            num_rows,
            dropped: &dropped,
            d_out,
            xa: Mat::new(&xa[self.xa_start..], num_rows, rank, self.xa_width),
            d_xa: Mat::dense(d_xa, num_rows, rank),
        };
        lora.grads(LoraGrads::new(arena, &lora.pair, base), rows);
    }
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_forward(
    cpu: &Cpu,
    h: &mut Tensor,
    gate: &mut Tensor,
    up: &mut Tensor,
    xa: &mut Tensor,
    x: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_gate_up_forward";
    let routed = state.num_tokens() * routing.num_experts_per_tok;
    let (hidden, width) = (experts.hidden_size, experts.intermediate_size);
    let x = cpu.rows(OP, x, state.num_tokens(), hidden)?;
    let rows = experts_rows(routing)?;
    let xa_width = experts.lora.gate_up_rank();
    let h = split(cpu.rows_mut(OP, h, routed, width)?, &rows, width);
    let gate = split(cpu.rows_mut(OP, gate, routed, width)?, &rows, width);
    let up = split(cpu.rows_mut(OP, up, routed, width)?, &rows, width);
    let xa = split(cpu.rows_mut(OP, xa, routed, xa_width)?, &rows, xa_width);
    let context = Context {
        cpu,
        experts,
        values: lora.f32()?,
        dropout: state.dropout,
    };
    rows.par_iter()
        .zip(h)
        .zip(gate)
        .zip(up)
        .zip(xa)
        .try_for_each(|((((rows, h), gate), up), xa)| {
            if rows.slots.is_empty() {
                return Ok(());
            }
            let x = rows.gather(x, hidden);
            context.gate(rows.expert).forward(cpu, gate, xa, &x, rows)?;
            context.up(rows.expert).forward(cpu, up, xa, &x, rows)?;
            swiglu(h, gate, up);
            cpu.round(h);
            Ok(())
        })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_backward(
    cpu: &Cpu,
    d_x: GradOut<'_>,
    d_lora: &mut Tensor,
    d_routed: &mut Tensor,
    d_h: &Tensor,
    gate: &mut Tensor,
    up: &mut Tensor,
    xa: &Tensor,
    x: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_gate_up_backward";
    let tokens = state.num_tokens();
    let routed = tokens * routing.num_experts_per_tok;
    let (hidden, width) = (experts.hidden_size, experts.intermediate_size);
    let xa_width = experts.lora.gate_up_rank();
    let x = cpu.rows(OP, x, tokens, hidden)?;
    let rows = experts_rows(routing)?;
    let d_h = split_ref(cpu.rows(OP, d_h, routed, width)?, &rows, width);
    let gate = split(cpu.rows_mut(OP, gate, routed, width)?, &rows, width);
    let up = split(cpu.rows_mut(OP, up, routed, width)?, &rows, width);
    let xa = split_ref(cpu.rows(OP, xa, routed, xa_width)?, &rows, xa_width);
    let d_routed = cpu.rows_mut(OP, d_routed, routed, hidden)?;
    let want_d_x = !matches!(d_x, GradOut::Skip);
    let (base, grads) = split_grads(d_lora.f32_mut()?, &experts.lora, routing.num_experts);
    let stride = experts.lora.stride;
    let context = Context {
        cpu,
        experts,
        values: lora.f32()?,
        dropout: state.dropout,
    };
    rows.par_iter()
        .zip(split(d_routed, &rows, hidden))
        .zip(d_h.into_par_iter().zip(gate).zip(up).zip(xa).zip(grads))
        .try_for_each(
            |((rows, d_routed), ((((d_h, gate), up), xa), grads))| -> Result<()> {
                let num_rows = rows.slots.len();
                if num_rows == 0 {
                    return Ok(());
                }
                for ((d_h, gate), up) in d_h.iter().zip(gate.iter_mut()).zip(up.iter_mut()) {
                    (*gate, *up) = swiglu_grad(*d_h, *gate, *up);
                }
                cpu.round(gate);
                cpu.round(up);
                let x = rows.gather(x, hidden);
                let sides = [
                    (context.gate(rows.expert), &*gate),
                    (context.up(rows.expert), &*up),
                ];
                for (index, (projection, d_out)) in sides.iter().enumerate() {
                    let d_xa = projection.d_xa(cpu, d_out, num_rows);
                    if want_d_x {
                        projection.backward_x(cpu, d_routed, d_out, &d_xa, rows, index > 0)?;
                    }
                    projection.grads(
                        grads,
                        base + rows.expert * stride,
                        &x,
                        xa,
                        (d_out, &d_xa),
                        rows,
                    );
                }
                cpu.round(d_routed);
                Ok(())
            },
        )?;
    let row_of_slot = routing.row_of_slot.u32()?;
    let k = routing.num_experts_per_tok;
    let (d_x, accumulate) = match d_x {
        GradOut::Skip => return Ok(()),
        GradOut::Overwrite(tensor) => (cpu.rows_mut(OP, tensor, tokens, hidden)?, false),
        GradOut::Add(tensor) => (cpu.rows_mut(OP, tensor, tokens, hidden)?, true),
    };
    d_x.par_chunks_mut(hidden)
        .zip(row_of_slot.par_chunks(k))
        .for_each(|(d_x, rows)| {
            if !accumulate {
                d_x.fill(0.0);
            }
            for row in rows {
                add_assign(d_x, &d_routed[*row as usize * hidden..][..hidden]);
            }
            cpu.round(d_x);
        });
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_forward(
    cpu: &Cpu,
    out: &mut Tensor,
    expert_out: &mut Tensor,
    xa: &mut Tensor,
    h: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_down_forward";
    let (tokens, k) = (state.num_tokens(), routing.num_experts_per_tok);
    let (hidden, width) = (experts.hidden_size, experts.intermediate_size);
    let rows = experts_rows(routing)?;
    let xa_width = experts.lora.down_rank();
    let h = split_ref(cpu.rows(OP, h, tokens * k, width)?, &rows, width);
    let xa = split(cpu.rows_mut(OP, xa, tokens * k, xa_width)?, &rows, xa_width);
    let expert_out = cpu.rows_mut(OP, expert_out, tokens * k, hidden)?;
    let context = Context {
        cpu,
        experts,
        values: lora.f32()?,
        dropout: state.dropout,
    };
    rows.par_iter()
        .zip(split(expert_out, &rows, hidden))
        .zip(xa)
        .zip(h)
        .try_for_each(|(((rows, out), xa), h)| {
            if rows.slots.is_empty() {
                return Ok(());
            }
            context.down(rows.expert).forward(cpu, out, xa, h, rows)
        })?;
    let out = cpu.rows_mut(OP, out, tokens, hidden)?;
    let weights = cpu.rows(OP, &routing.topk_weights, tokens, k)?;
    let row_of_slot = routing.row_of_slot.u32()?;
    out.par_chunks_mut(hidden)
        .zip(row_of_slot.par_chunks(k).zip(weights.par_chunks(k)))
        .for_each(|(out, (rows, weights))| {
            out.fill(0.0);
            for (row, weight) in rows.iter().zip(weights) {
                let values = &expert_out[*row as usize * hidden..][..hidden];
                out.iter_mut()
                    .zip(values)
                    .for_each(|(out, value)| *out += weight * value);
            }
            cpu.round(out);
        });
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_backward(
    cpu: &Cpu,
    d_h: &mut Tensor,
    d_topk_weights: &mut Tensor,
    d_lora: &mut Tensor,
    d_out: &Tensor,
    h: &Tensor,
    xa: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    state: &StepState,
) -> Result<()> {
    const OP: &str = "moe_down_backward";
    let (tokens, k) = (state.num_tokens(), routing.num_experts_per_tok);
    let (hidden, width) = (experts.hidden_size, experts.intermediate_size);
    let xa_width = experts.lora.down_rank();
    let rows = experts_rows(routing)?;
    let d_out = cpu.rows(OP, d_out, tokens, hidden)?;
    let h = split_ref(cpu.rows(OP, h, tokens * k, width)?, &rows, width);
    let xa = split_ref(cpu.rows(OP, xa, tokens * k, xa_width)?, &rows, xa_width);
    let d_h = split(cpu.rows_mut(OP, d_h, tokens * k, width)?, &rows, width);
    let weights = cpu.rows(OP, &routing.topk_weights, tokens, k)?;
    let (base, grads) = split_grads(d_lora.f32_mut()?, &experts.lora, routing.num_experts);
    let stride = experts.lora.stride;
    let context = Context {
        cpu,
        experts,
        values: lora.f32()?,
        dropout: state.dropout,
    };
    let d_weights: Vec<Vec<f32>> = rows
        .par_iter()
        .zip(d_h)
        .zip(h.into_par_iter().zip(xa).zip(grads))
        .map(|((rows, d_h), ((h, xa), grads))| {
            let num_rows = rows.slots.len();
            if num_rows == 0 {
                return Ok(Vec::new());
            }
            let down = context.down(rows.expert);
            let mut d_out = rows.gather(d_out, hidden);
            let mut d_xa = down.d_xa(cpu, &d_out, num_rows);
            down.backward_x(cpu, d_h, &d_out, &d_xa, rows, false)?;
            let rank = down.lora.as_ref().map_or(0, |lora| lora.pair.rank);
            let mut d_weights = Vec::with_capacity(num_rows);
            for (row, slot) in rows.slots.iter().enumerate() {
                let weight = weights[*slot as usize];
                let delta = &mut d_h[row * width..(row + 1) * width];
                let own = &h[row * width..(row + 1) * width];
                d_weights.push(delta.iter().zip(own).map(|(d, h)| d * h).sum());
                let scale = |values: &mut [f32]| values.iter_mut().for_each(|v| *v *= weight);
                scale(delta);
                scale(&mut d_out[row * hidden..(row + 1) * hidden]);
                scale(&mut d_xa[row * rank..(row + 1) * rank]);
            }
            cpu.round(d_h);
            down.grads(
                grads,
                base + rows.expert * stride,
                h,
                xa,
                (&d_out, &d_xa),
                rows,
            );
            Ok(d_weights)
        })
        .collect::<Result<_>>()?;
    let d_topk_weights = cpu.rows_mut(OP, d_topk_weights, tokens, k)?;
    for (rows, values) in rows.iter().zip(d_weights) {
        for (slot, value) in rows.slots.iter().zip(values) {
            d_topk_weights[*slot as usize] = value;
        }
    }
    Ok(())
}
