//! The experts' adapters: their narrow products and their gradients.

use super::super::driver::{Grid, Kernel};
use super::super::lora::LoraArena;
use super::super::params::{
    MOE_LORA_GRAD_COLS, MOE_LORA_GRAD_SHARED, MOE_LORA_RANKS, MOE_LORA_THREADS, MoeLoraGradJob,
    MoeLoraGradsParams, MoeLoraProjectJob, MoeLoraProjectParams, MoeProjection,
};
use super::super::scratch::Frame;
use super::{Call, kernel};
use crate::error::Result;
use crate::tensor::{DType, Tensor};

pub(super) const LORA_PROJECT: Kernel = kernel("moe_lora_project", MOE_LORA_THREADS);
pub(super) const LORA_PROJECT_BACKWARD: Kernel =
    kernel("moe_lora_project_backward", MOE_LORA_THREADS);
const LORA_GRADS: Kernel = kernel("moe_lora_grads", MOE_LORA_THREADS);

/// What one projection reads, or the gradient of what it gives: `[T, width]` or `[R, width]`.
#[derive(Clone, Copy)]
pub(super) struct Wide {
    address: u64,
    width: u32,
    is_gathered: bool,
}

impl Call<'_> {
    pub(super) fn wide(&self, address: u64, width: usize, is_gathered: bool) -> Result<Wide> {
        Ok(Wide {
            address,
            width: self.u32("width", width)?,
            is_gathered,
        })
    }

    /// Scratch for `d_xa`.
    pub(super) fn d_xa(&self, frame: &mut Frame<'_>, xa_width: usize) -> Result<u64> {
        frame.take("d_xa", self.routed.capacity * xa_width * DType::Bf16.size())
    }

    /// `kernel` makes `xa` of the given projections from what they read, or `d_xa` from the gradients of what they give.
    pub(super) fn project(
        &self,
        xa: u64,
        xa_width: usize,
        projections: &[MoeProjection],
        wides: &[Wide],
        kernel: Kernel,
    ) -> Result<()> {
        let mut params = MoeLoraProjectParams {
            rows: self.routed.rows,
            xa,
            lora: self.lora.address,
            xa_width: self.u32("rank", xa_width)?,
            lora_is_bf16: self.lora.is_bf16,
            ..MoeLoraProjectParams::default()
        };
        let (mut num_jobs, mut max_rank) = (0, 0);
        for (projection, wide) in projections.iter().zip(wides) {
            let rank = projection.expert0.lora.rank;
            if rank == 0 {
                continue;
            }
            params.jobs[num_jobs] = MoeLoraProjectJob {
                projection: *projection,
                rows: wide.address,
                num_cols: wide.width,
                is_gathered: u32::from(wide.is_gathered),
            };
            num_jobs += 1;
            max_rank = rank.max(max_rank);
        }
        let rank_blocks = max_rank.div_ceil(MOE_LORA_RANKS);
        let jobs = self.u32("modules", num_jobs)?;
        let grid = Grid::volume(jobs, self.routed.max_tiles, rank_blocks);
        self.gpu.launch(kernel, grid, &params)
    }

    /// Adds the gradients of the adapters of `projections`: `wides` holds what each reads and the gradient of what it gives;
    /// each row times its weight where `topk_weights` is not 0.
    pub(super) fn grads(
        &self,
        d_lora: &Tensor,
        [xa, d_xa]: [u64; 2],
        xa_width: usize,
        projections: &[MoeProjection],
        wides: &[[Wide; 2]],
        topk_weights: u64,
    ) -> Result<()> {
        let d_lora = LoraArena::new(self.op, d_lora)?;
        // The same places as in the adapter's own arena.
        self.lora.expect_like(self.op, &d_lora)?;
        let mut params = MoeLoraGradsParams {
            rows: self.routed.rows,
            d_lora: d_lora.address,
            topk_weights,
            xa_width: self.u32("rank", xa_width)?,
            d_lora_is_bf16: d_lora.is_bf16,
            ..MoeLoraGradsParams::default()
        };
        let (mut num_jobs, mut num_tiles, mut max_rank) = (0, 0, 0);
        for (projection, [x, d_out]) in projections.iter().zip(wides) {
            let rank = projection.expert0.lora.rank;
            if rank == 0 {
                continue;
            }
            for (narrow, wide, is_b) in [(d_xa, x, 0), (xa, d_out, 1)] {
                params.jobs[num_jobs] = MoeLoraGradJob {
                    projection: *projection,
                    narrow,
                    wide: wide.address,
                    num_cols: wide.width,
                    is_gathered: u32::from(wide.is_gathered),
                    is_b,
                    first_tile: num_tiles,
                };
                num_jobs += 1;
                num_tiles += wide.width.div_ceil(MOE_LORA_GRAD_COLS);
            }
            max_rank = rank.max(max_rank);
        }
        params.num_jobs = self.u32("modules", num_jobs)?;
        let rank_blocks = max_rank.div_ceil(MOE_LORA_RANKS);
        let grid = Grid::volume(num_tiles, self.routed.num_experts, rank_blocks);
        let grid = grid.with_shared(MOE_LORA_GRAD_SHARED);
        self.gpu.launch(LORA_GRADS, grid, &params)
    }
}
