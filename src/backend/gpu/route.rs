//! Routing of a mixture of experts: launchers.

use super::driver::{Grid, Kernel};
use super::params::{
    MOE_ROUTE_MAX_EXPERTS, MOE_ROUTE_SCAN_EXPERTS, MOE_ROUTE_THREADS, MOE_ROUTE_TOKENS,
    MoeRouteBackwardParams, MoeRouteParams,
};
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{Routing, StepState};
use crate::tensor::{DType, Tensor};

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        name,
        threads: MOE_ROUTE_THREADS,
    }
}

const TOPK: Kernel = kernel("moe_route_topk");
const SCAN: Kernel = kernel("moe_route_scan");
const PLACE: Kernel = kernel("moe_route_place");
const BACKWARD: Kernel = kernel("moe_route_backward");

/// Warps of a block: tokens that a block of the backward takes.
const WARPS: u32 = MOE_ROUTE_THREADS / 32;

/// Extents that both directions share, checked.
struct Extents {
    capacity: u32,
    num_experts: u32,
    top_k: u32,
}

fn extents(op: &'static str, routing: &Routing, logits: &Tensor) -> Result<(Extents, u64)> {
    let logits = check::rows(op, logits, DType::F32, routing.num_experts)?;
    let extents = Extents {
        capacity: check::to_u32(op, "capacity", logits.capacity)?,
        num_experts: check::to_u32(op, "num_experts", routing.num_experts)?,
        top_k: check::to_u32(op, "num_experts_per_tok", routing.num_experts_per_tok)?,
    };
    check::to_u32(
        op,
        "routed rows",
        logits.capacity * routing.num_experts_per_tok,
    )?;
    let fits = extents.num_experts <= MOE_ROUTE_MAX_EXPERTS;
    if fits && (1..=extents.num_experts).contains(&extents.top_k) {
        return Ok((extents, logits.address));
    }
    Err(Error::Unsupported {
        what: format!(
            "{op} with {} of {} experts per token",
            extents.top_k, extents.num_experts
        ),
        why: format!("its kernel takes 1 to all of up to {MOE_ROUTE_MAX_EXPERTS} experts"),
    })
}

pub(super) fn forward(
    gpu: &Gpu,
    routing: &mut Routing,
    logits: &Tensor,
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_route_forward";
    let (extents, logits) = extents(OP, routing, logits)?;
    let (capacity, k) = (extents.capacity as usize, routing.num_experts_per_tok);
    let num_chunks = extents.capacity.div_ceil(MOE_ROUTE_TOKENS);
    let mut frame = gpu.scratch.frame();
    let counts = num_chunks as usize * routing.num_experts * size_of::<u32>();
    let params = MoeRouteParams {
        topk_ids: check::exact(OP, &routing.topk_ids, DType::U32, &[capacity, k])?,
        topk_weights: check::exact(OP, &routing.topk_weights, DType::F32, &[capacity, k])?,
        expert_offsets: check::exact(
            OP,
            &routing.expert_offsets,
            DType::U32,
            &[routing.num_experts + 1],
        )?,
        slot_of_row: check::exact(OP, &routing.slot_of_row, DType::U32, &[capacity * k])?,
        row_of_slot: check::exact(OP, &routing.row_of_slot, DType::U32, &[capacity * k])?,
        counts: frame.take("counts", counts)?,
        totals: frame.take("totals", routing.num_experts * size_of::<u32>())?,
        logits,
        step: gpu.step()?,
        num_experts: extents.num_experts,
        num_experts_per_tok: extents.top_k,
        norm_topk_prob: u32::from(routing.norm_topk_prob),
        reserved: 0,
    };
    let word = 4;
    let shared = (WARPS + 1) * extents.num_experts * word;
    gpu.launch(TOPK, Grid::line(num_chunks).with_shared(shared), &params)?;
    let scans = extents.num_experts.div_ceil(MOE_ROUTE_SCAN_EXPERTS);
    gpu.launch(SCAN, Grid::line(scans), &params)?;
    let shared = (MOE_ROUTE_TOKENS * extents.top_k + extents.num_experts) * word;
    gpu.launch(PLACE, Grid::line(num_chunks).with_shared(shared), &params)
}

pub(super) fn backward(
    gpu: &Gpu,
    d_logits: &mut Tensor,
    d_topk_weights: &Tensor,
    logits: &Tensor,
    routing: &Routing,
    _: &StepState,
) -> Result<()> {
    const OP: &str = "moe_route_backward";
    let (extents, logits) = extents(OP, routing, logits)?;
    let capacity = extents.capacity as usize;
    let per_slot = [capacity, routing.num_experts_per_tok];
    let params = MoeRouteBackwardParams {
        d_logits: check::exact(OP, d_logits, DType::F32, &[capacity, routing.num_experts])?,
        d_topk_weights: check::exact(OP, d_topk_weights, DType::F32, &per_slot)?,
        logits,
        topk_ids: check::exact(OP, &routing.topk_ids, DType::U32, &per_slot)?,
        topk_weights: check::exact(OP, &routing.topk_weights, DType::F32, &per_slot)?,
        step: gpu.step()?,
        num_experts: extents.num_experts,
        num_experts_per_tok: extents.top_k,
        norm_topk_prob: u32::from(routing.norm_topk_prob),
        reserved: 0,
    };
    let grid = Grid::line(extents.capacity.div_ceil(WARPS));
    gpu.launch(BACKWARD, grid, &params)
}
