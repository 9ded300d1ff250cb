//! The routed experts: grouped products with their adapters: launchers.

mod adapters;
mod operands;

use self::adapters::{LORA_PROJECT, LORA_PROJECT_BACKWARD};
use self::operands::{ExpertWeights, Routed};
use super::driver::{Grid, Kernel};
use super::lora::LoraArena;
use super::params::{
    MOE_COMBINE_THREADS, MOE_PARTS_PER_TILE, MOE_SHARED_DENSE, MOE_SHARED_NF4,
    MOE_SMALL_SHARED_DENSE, MOE_SMALL_SHARED_NF4, MOE_THREADS, MOE_TILE_COLS, MoeCombineParams,
    MoeForwardParams, MoeInputGradParams, MoeProjection, MoeWeightGradsParams, SWIGLU_THREADS,
    SwigluBackwardParams,
};
use super::scratch::Frame;
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{Experts, GradOut, Routing, StepState};
use crate::tensor::{DType, Tensor};

const fn kernel(name: &'static str, threads: u32) -> Kernel {
    Kernel { name, threads }
}

const GATE_UP_FORWARD: [Kernel; 2] = [
    kernel("moe_gate_up_forward_small", MOE_THREADS),
    kernel("moe_gate_up_forward", MOE_THREADS),
];
const DOWN_FORWARD: [Kernel; 2] = [
    kernel("moe_down_forward_small", MOE_THREADS),
    kernel("moe_down_forward", MOE_THREADS),
];
const INPUT_GRAD: [Kernel; 2] = [
    kernel("moe_input_grad_small", MOE_THREADS),
    kernel("moe_input_grad", MOE_THREADS),
];
const COMBINE: Kernel = kernel("moe_combine", MOE_COMBINE_THREADS);
const WEIGHT_GRADS: Kernel = kernel("moe_weight_grads", MOE_COMBINE_THREADS);
const SWIGLU_BACKWARD: Kernel = kernel("swiglu_backward", SWIGLU_THREADS);

/// What every op over experts works with.
struct Call<'a> {
    op: &'static str,
    gpu: &'a Gpu,
    routed: Routed,
    experts: &'a Experts,
    lora: LoraArena,
}

impl<'a> Call<'a> {
    fn new(
        op: &'static str,
        gpu: &'a Gpu,
        frame: &mut Frame<'_>,
        routing: &Routing,
        experts: &'a Experts,
        lora: &Tensor,
    ) -> Result<Self> {
        let counts = [&experts.gate, &experts.up, &experts.down].map(Vec::len);
        if counts != [routing.num_experts; 3] {
            return Err(Error::Shape {
                op,
                tensor: "experts".to_owned(),
                found: counts.to_vec(),
                expected: vec![routing.num_experts; 3],
            });
        }
        Ok(Self {
            op,
            gpu,
            routed: Routed::new(op, gpu, frame, routing)?,
            experts,
            lora: LoraArena::new(op, lora)?,
        })
    }

    fn hidden(&self) -> usize {
        self.experts.hidden_size
    }

    fn width(&self) -> usize {
        self.experts.intermediate_size
    }

    fn u32(&self, what: &str, value: usize) -> Result<u32> {
        check::to_u32(self.op, what, value)
    }

    /// Gate and up, whose outputs (or the gradients of them) are `outs`.
    fn gate_up(&self, frame: &mut Frame<'_>, outs: [u64; 2]) -> Result<[MoeProjection; 2]> {
        let lora = &self.experts.lora;
        let of = |weights, pair, first_column| ExpertWeights {
            op: self.op,
            arena: &self.lora,
            weights,
            dims: [self.width(), self.hidden()],
            pair,
            lora,
            first_column,
        };
        let up_column = lora.gate.map_or(0, |pair| pair.rank);
        let gate = of(&self.experts.gate, lora.gate, 0).projection(self.gpu, frame, outs[0])?;
        let up = of(&self.experts.up, lora.up, up_column).projection(self.gpu, frame, outs[1])?;
        if (gate.expert0.dense == 0) == (up.expert0.dense == 0) {
            return Ok([gate, up]);
        }
        Err(Error::Unsupported {
            what: format!("{} with gate and up held in different ways", self.op),
            why: "its kernel takes both NF4 or both bf16".to_owned(),
        })
    }

    fn down(&self, frame: &mut Frame<'_>, out: u64) -> Result<MoeProjection> {
        let down = ExpertWeights {
            op: self.op,
            arena: &self.lora,
            weights: &self.experts.down,
            dims: [self.hidden(), self.width()],
            pair: self.experts.lora.down,
            lora: &self.experts.lora,
            first_column: 0,
        };
        down.projection(self.gpu, frame, out)
    }

    /// Launches a product over all row tiles.
    fn product<P: bytemuck::Pod>(
        &self,
        kernels: [Kernel; 2],
        column_tiles: usize,
        is_dense: bool,
        params: &P,
    ) -> Result<()> {
        let shared = match (self.routed.is_large, is_dense) {
            (false, false) => MOE_SMALL_SHARED_NF4,
            (false, true) => MOE_SMALL_SHARED_DENSE,
            (true, false) => MOE_SHARED_NF4,
            (true, true) => MOE_SHARED_DENSE,
        };
        let columns = self.u32("width", column_tiles)?;
        let grid = Grid::plane(columns, self.routed.max_tiles).with_shared(shared);
        let kernel = kernels[usize::from(self.routed.is_large)];
        self.gpu.launch(kernel, grid, params)
    }

    /// `out[t] (+)= sum_j weight rows[row(t, j)]`.
    fn combine(&self, out: u64, rows: u64, topk_weights: u64, accumulate: bool) -> Result<()> {
        let tokens = self.routed.capacity / self.routed.top_k as usize;
        let params = MoeCombineParams {
            out,
            rows,
            row_of_slot: self.routed.row_of_slot,
            topk_weights,
            step: self.routed.rows.step,
            hidden_size: self.u32("hidden_size", self.hidden())?,
            num_experts_per_tok: self.routed.top_k,
            accumulate: u32::from(accumulate),
            reserved: 0,
        };
        let grid = Grid::line(self.u32("capacity", tokens)?);
        self.gpu.launch(COMBINE, grid, &params)
    }
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_forward(
    gpu: &Gpu,
    h: &mut Tensor,
    gate: &mut Tensor,
    up: &mut Tensor,
    xa: &mut Tensor,
    x: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_gate_up_forward";
    let mut frame = gpu.scratch.frame();
    let call = Call::new(OP, gpu, &mut frame, routing, experts, lora)?;
    let (hidden, width) = (call.hidden(), call.width());
    let xa_width = experts.lora.gate_up_rank();
    let xa = call.routed.activation(OP, xa, xa_width)?;
    let x = call.routed.token_activation(OP, x, hidden)?;
    let outs = [
        call.routed.activation(OP, gate, width)?,
        call.routed.activation(OP, up, width)?,
    ];
    let projections = call.gate_up(&mut frame, outs)?;
    let read = call.wide(x, hidden, true)?;
    call.project(xa, xa_width, &projections, &[read; 2], LORA_PROJECT)?;
    let params = MoeForwardParams {
        projections,
        rows: call.routed.rows,
        h: call.routed.activation(OP, h, width)?,
        x,
        xa,
        lora: call.lora.address,
        in_features: call.u32("hidden_size", hidden)?,
        xa_width: call.u32("rank", xa_width)?,
        lora_is_bf16: call.lora.is_bf16,
        reserved: 0,
    };
    let tiles = width.div_ceil(MOE_TILE_COLS as usize / 2);
    let is_dense = projections[0].expert0.dense != 0;
    call.product(GATE_UP_FORWARD, tiles, is_dense, &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_backward(
    gpu: &Gpu,
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
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_gate_up_backward";
    let mut frame = gpu.scratch.frame();
    let call = Call::new(OP, gpu, &mut frame, routing, experts, lora)?;
    let (hidden, width) = (call.hidden(), call.width());
    let xa_width = experts.lora.gate_up_rank();
    let xa = call.routed.activation(OP, xa, xa_width)?;
    let x = call.routed.token_activation(OP, x, hidden)?;
    let d_h = call.routed.activation(OP, d_h, width)?;
    let d_routed = call.routed.activation(OP, d_routed, hidden)?;
    let d_outs = [
        call.routed.activation(OP, gate, width)?,
        call.routed.activation(OP, up, width)?,
    ];
    call.swiglu_backward(d_outs, d_h)?;
    let projections = call.gate_up(&mut frame, d_outs)?;
    let d_xa = call.d_xa(&mut frame, xa_width)?;
    let read = call.wide(x, hidden, true)?;
    let given = [
        call.wide(d_outs[0], width, false)?,
        call.wide(d_outs[1], width, false)?,
    ];
    call.project(d_xa, xa_width, &projections, &given, LORA_PROJECT_BACKWARD)?;
    let wides = given.map(|given| [read, given]);
    call.grads(d_lora, [xa, d_xa], xa_width, &projections, &wides, 0)?;
    let (d_x, accumulate) = match d_x {
        GradOut::Skip => return Ok(()),
        GradOut::Overwrite(d_x) => (d_x, false),
        GradOut::Add(d_x) => (d_x, true),
    };
    let d_x = call.routed.token_activation(OP, d_x, hidden)?;
    let params = MoeInputGradParams {
        projections,
        rows: call.routed.rows,
        d_x: d_routed,
        d_xa,
        lora: call.lora.address,
        num_projections: 2,
        in_features: call.u32("hidden_size", hidden)?,
        xa_width: call.u32("rank", xa_width)?,
        lora_is_bf16: call.lora.is_bf16,
        ..MoeInputGradParams::default()
    };
    let tiles = hidden.div_ceil(MOE_TILE_COLS as usize);
    let is_dense = projections[0].expert0.dense != 0;
    call.product(INPUT_GRAD, tiles, is_dense, &params)?;
    call.combine(d_x, d_routed, 0, accumulate)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_forward(
    gpu: &Gpu,
    out: &mut Tensor,
    expert_out: &mut Tensor,
    xa: &mut Tensor,
    h: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_down_forward";
    let mut frame = gpu.scratch.frame();
    let call = Call::new(OP, gpu, &mut frame, routing, experts, lora)?;
    let (hidden, width) = (call.hidden(), call.width());
    let xa_width = experts.lora.down_rank();
    let xa = call.routed.activation(OP, xa, xa_width)?;
    let h = call.routed.activation(OP, h, width)?;
    let expert_out = call.routed.activation(OP, expert_out, hidden)?;
    let down = call.down(&mut frame, expert_out)?;
    let read = call.wide(h, width, false)?;
    call.project(xa, xa_width, &[down], &[read], LORA_PROJECT)?;
    let params = MoeForwardParams {
        projections: [down, MoeProjection::default()],
        rows: call.routed.rows,
        x: h,
        xa,
        lora: call.lora.address,
        in_features: call.u32("intermediate_size", width)?,
        xa_width: call.u32("rank", xa_width)?,
        lora_is_bf16: call.lora.is_bf16,
        ..MoeForwardParams::default()
    };
    let tiles = hidden.div_ceil(MOE_TILE_COLS as usize);
    call.product(DOWN_FORWARD, tiles, down.expert0.dense != 0, &params)?;
    let out = call.routed.token_activation(OP, out, hidden)?;
    call.combine(out, expert_out, call.routed.topk_weights, false)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_backward(
    gpu: &Gpu,
    d_h: &mut Tensor,
    d_topk_weights: &mut Tensor,
    d_lora: &mut Tensor,
    d_out: &Tensor,
    h: &Tensor,
    xa: &Tensor,
    routing: &Routing,
    experts: &Experts,
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_down_backward";
    let mut frame = gpu.scratch.frame();
    let call = Call::new(OP, gpu, &mut frame, routing, experts, lora)?;
    let (hidden, width) = (call.hidden(), call.width());
    let xa_width = experts.lora.down_rank();
    let xa = call.routed.activation(OP, xa, xa_width)?;
    let h = call.routed.activation(OP, h, width)?;
    let d_h = call.routed.activation(OP, d_h, width)?;
    let d_out = call.routed.token_activation(OP, d_out, hidden)?;
    let down = call.down(&mut frame, d_out)?;
    let d_xa = call.d_xa(&mut frame, xa_width)?;
    let (read, given) = (call.wide(h, width, false)?, call.wide(d_out, hidden, true)?);
    call.project(d_xa, xa_width, &[down], &[given], LORA_PROJECT_BACKWARD)?;
    let weights = call.routed.topk_weights;
    call.grads(
        d_lora,
        [xa, d_xa],
        xa_width,
        &[down],
        &[[read, given]],
        weights,
    )?;
    let tiles = width.div_ceil(MOE_TILE_COLS as usize);
    let num_parts = tiles * MOE_PARTS_PER_TILE as usize;
    let partial = call.routed.capacity * num_parts * DType::F32.size();
    let params = MoeInputGradParams {
        projections: [down, MoeProjection::default()],
        rows: call.routed.rows,
        d_x: d_h,
        d_xa,
        lora: call.lora.address,
        h,
        topk_weights: weights,
        partial: frame.take("partial", partial)?,
        num_projections: 1,
        in_features: call.u32("intermediate_size", width)?,
        xa_width: call.u32("rank", xa_width)?,
        lora_is_bf16: call.lora.is_bf16,
        is_gathered: 1,
        num_parts: call.u32("parts", num_parts)?,
    };
    call.product(INPUT_GRAD, tiles, down.expert0.dense != 0, &params)?;
    call.weight_grads(d_topk_weights, &params)
}

impl Call<'_> {
    fn swiglu_backward(&self, gate_up: [u64; 2], d_h: u64) -> Result<()> {
        let elements = self.routed.capacity * self.width();
        let params = SwigluBackwardParams {
            d_gate: gate_up[0],
            d_up: gate_up[1],
            d_h,
            gate: gate_up[0],
            up: gate_up[1],
            step: self.routed.rows.step,
            width: self.u32("intermediate_size", self.width())?,
            rows_per_token: self.routed.top_k,
        };
        let blocks = elements.div_ceil(SWIGLU_THREADS as usize * 8);
        let grid = Grid::line(self.u32("elements", blocks)?);
        self.gpu.launch(SWIGLU_BACKWARD, grid, &params)
    }

    fn weight_grads(&self, d_topk_weights: &Tensor, grad: &MoeInputGradParams) -> Result<()> {
        let k = self.routed.top_k as usize;
        let shape = [self.routed.capacity / k, k];
        let params = MoeWeightGradsParams {
            d_topk_weights: check::exact(self.op, d_topk_weights, DType::F32, &shape)?,
            partial: grad.partial,
            row_of_slot: self.routed.row_of_slot,
            step: self.routed.rows.step,
            num_parts: grad.num_parts,
            num_experts_per_tok: self.routed.top_k,
        };
        let slots = self.u32("routed rows", self.routed.capacity)?;
        let grid = Grid::line(slots.div_ceil(MOE_COMBINE_THREADS));
        self.gpu.launch(WEIGHT_GRADS, grid, &params)
    }
}
