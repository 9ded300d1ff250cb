//! The low-rank pairs of projections: launchers.

use super::driver::{Grid, Kernel};
use super::params::{
    LINEAR_MAX_PROJECTIONS, LORA_GRAD_COLS, LORA_GRAD_SHARED, LORA_GRAD_TOKENS, LORA_RANKS,
    LORA_ROWS, LORA_THREADS, LoraGradJob, LoraGradsParams, LoraModule, LoraProjectParams,
};
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{Linear, LoraPair};
use crate::tensor::{DType, Tensor};

const PROJECT: Kernel = Kernel {
    name: "lora_project",
    threads: LORA_THREADS,
};
const PROJECT_BACKWARD: Kernel = Kernel {
    name: "lora_project_backward",
    threads: LORA_THREADS,
};
const GRADS: Kernel = Kernel {
    name: "lora_grads",
    threads: LORA_THREADS,
};
const GRADS_REDUCE: Kernel = Kernel {
    name: "lora_grads_reduce",
    threads: LORA_THREADS,
};

/// The adapter's arena, or that of its gradients: f32 or bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoraArena {
    pub(super) address: u64,
    /// 1 or 0, as kernels take it.
    pub(super) is_bf16: u32,
    num_elements: usize,
}

impl LoraArena {
    pub(super) fn new(op: &'static str, tensor: &Tensor) -> Result<Self> {
        let dtype = tensor.dtype();
        if !matches!(dtype, DType::F32 | DType::Bf16) {
            return Err(Error::DType {
                op,
                tensor: tensor.name().to_owned(),
                found: dtype.name(),
                expected: "f32 or bf16",
            });
        }
        Ok(Self {
            address: check::exact(op, tensor, dtype, tensor.shape())?,
            is_bf16: u32::from(dtype == DType::Bf16),
            num_elements: tensor.len(),
        })
    }

    /// Refuses `other` where it has not as many elements.
    pub(super) fn expect_like(&self, op: &'static str, other: &Self) -> Result<()> {
        if self.num_elements == other.num_elements {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            tensor: "d_lora".to_owned(),
            found: vec![other.num_elements],
            expected: vec![self.num_elements],
        })
    }

    /// Refuses a pair that reaches beyond the arena, or that is not for a matrix of `dims` (out and in features).
    pub(super) fn check(&self, op: &'static str, pair: &LoraPair, dims: [usize; 2]) -> Result<()> {
        let end = pair.a_range().end.max(pair.b_range().end);
        if end <= self.num_elements && [pair.out_features, pair.in_features] == dims {
            return Ok(());
        }
        Err(Error::Shape {
            op,
            tensor: "lora".to_owned(),
            found: vec![self.num_elements, pair.out_features, pair.in_features],
            expected: vec![end, dims[0], dims[1]],
        })
    }
}

/// The modules of one call; each one's columns of `xa` follow those of the one before.
#[derive(Debug, Clone)]
pub(super) struct Modules {
    /// One per projection, rank 0 where it has no adapter.
    pub(super) each: Vec<LoraModule>,
    /// Ranks together.
    pub(super) xa_width: usize,
}

impl Modules {
    pub(super) fn new(op: &'static str, linears: &[&Linear], arena: &LoraArena) -> Result<Self> {
        let (mut each, mut xa_width) = (Vec::new(), 0);
        for linear in linears {
            let Some(pair) = linear.lora else {
                each.push(LoraModule::default());
                continue;
            };
            arena.check(op, &pair, [linear.out_features, linear.in_features])?;
            each.push(module(op, &pair, xa_width)?);
            xa_width += pair.rank;
        }
        Ok(Self { each, xa_width })
    }

    fn max_rank(&self) -> u32 {
        self.each
            .iter()
            .map(|module| module.rank)
            .max()
            .unwrap_or(0)
    }
}

/// `pair` as kernels take it, its part of `xa` beginning at `first_column`.
pub(super) fn module(op: &'static str, pair: &LoraPair, first_column: usize) -> Result<LoraModule> {
    // 2^32 p, as a threshold on 32 random bits.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a probability below 1 times 2^32"
    )]
    let dropout_threshold = (f64::from(pair.dropout) * 4_294_967_296.0) as u32;
    Ok(LoraModule {
        a: pair.a as u64,
        b: pair.b as u64,
        rank: check::to_u32(op, "rank", pair.rank)?,
        first_column: check::to_u32(op, "rank", first_column)?,
        scaling: pair.scaling,
        module: pair.module,
        dropout_threshold,
        keep_scale: 1.0 / (1.0 - pair.dropout),
    })
}

/// bf16 rows that begin at 16-byte borders.
#[derive(Debug, Clone, Copy)]
pub(super) struct AlignedRows {
    pub(super) address: u64,
    /// Columns that count.
    pub(super) num_cols: u32,
    /// Elements from row to row.
    pub(super) stride: u32,
}

/// One of the two projections onto the ranks: of `rows[i]` for module `i`, to `xa [capacity, xa_width]`.
fn project(
    gpu: &Gpu,
    kernel: Kernel,
    op: &'static str,
    xa: u64,
    rows: &[AlignedRows],
    modules: &Modules,
    arena: &LoraArena,
    capacity: usize,
) -> Result<()> {
    let mut params = LoraProjectParams {
        xa,
        lora: arena.address,
        step: gpu.step()?,
        xa_width: check::to_u32(op, "rank", modules.xa_width)?,
        lora_is_bf16: arena.is_bf16,
        ..LoraProjectParams::default()
    };
    let with_adapter = rows.iter().zip(&modules.each);
    let mut count = 0;
    for (rows, module) in with_adapter.filter(|(_, module)| module.rank > 0) {
        params.modules[count] = *module;
        params.rows[count] = rows.address;
        params.num_cols[count] = rows.num_cols;
        params.strides[count] = rows.stride;
        count += 1;
    }
    let row_tiles = check::to_u32(op, "capacity", capacity)?.div_ceil(LORA_ROWS);
    let rank_tiles = modules.max_rank().div_ceil(LORA_RANKS);
    let grid = Grid {
        blocks: [
            check::to_u32(op, "projections", count)?,
            row_tiles,
            rank_tiles,
        ],
        dynamic_shared_bytes: 0,
    };
    gpu.launch(kernel, grid, &params)
}

/// `xa_i = dropout_i(x) A_i^T`.
pub(super) fn forward(
    gpu: &Gpu,
    op: &'static str,
    xa: u64,
    x: AlignedRows,
    modules: &Modules,
    arena: &LoraArena,
    capacity: usize,
) -> Result<()> {
    let rows = [x; LINEAR_MAX_PROJECTIONS as usize];
    project(gpu, PROJECT, op, xa, &rows, modules, arena, capacity)
}

/// `d_xa_i = scaling_i d_out_i B_i`.
pub(super) fn backward(
    gpu: &Gpu,
    op: &'static str,
    d_xa: u64,
    d_outs: &[AlignedRows],
    modules: &Modules,
    arena: &LoraArena,
    capacity: usize,
) -> Result<()> {
    project(
        gpu,
        PROJECT_BACKWARD,
        op,
        d_xa,
        d_outs,
        modules,
        arena,
        capacity,
    )
}

/// What the gradients of a call's pairs are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct GradInputs<'a> {
    pub(super) x: AlignedRows,
    pub(super) xa: u64,
    pub(super) d_xa: u64,
    pub(super) d_outs: &'a [AlignedRows],
}

/// `dA_i += d_xa_i^T dropout_i(x)` and `dB_i += scaling_i d_out_i^T xa_i`.
pub(super) fn grads(
    gpu: &Gpu,
    op: &'static str,
    d_lora: &LoraArena,
    inputs: GradInputs<'_>,
    modules: &Modules,
    capacity: usize,
) -> Result<()> {
    let mut params = LoraGradsParams {
        d_lora: d_lora.address,
        step: gpu.step()?,
        xa_width: check::to_u32(op, "rank", modules.xa_width)?,
        d_lora_is_bf16: d_lora.is_bf16,
        ..LoraGradsParams::default()
    };
    let (mut tiles, mut num_jobs) = (0, 0);
    for (module, d_out) in modules.each.iter().zip(inputs.d_outs) {
        let of_a = (inputs.d_xa, inputs.x, 0);
        let of_b = (inputs.xa, *d_out, 1);
        for (narrow, wide, is_b) in [of_a, of_b] {
            if module.rank == 0 {
                continue;
            }
            params.jobs[num_jobs] = LoraGradJob {
                module: *module,
                narrow,
                wide: wide.address,
                num_cols: wide.num_cols,
                stride: wide.stride,
                is_b,
                first_tile: tiles,
                first_partial: params.num_partials,
            };
            num_jobs += 1;
            tiles += wide.num_cols.div_ceil(LORA_GRAD_COLS);
            params.num_partials += u64::from(module.rank) * u64::from(wide.num_cols);
        }
    }
    params.num_jobs = check::to_u32(op, "projections", num_jobs)?;
    let splits = check::to_u32(op, "capacity", capacity)?.div_ceil(LORA_GRAD_TOKENS);
    let mut frame = gpu.scratch.frame();
    if splits > 1 && num_jobs > 0 {
        let num_bytes = u64::from(splits) * params.num_partials * 4;
        let num_bytes = usize::try_from(num_bytes).map_err(|_| too_large(op))?;
        params.partials = frame.take("adapter gradients of parts of the batch", num_bytes)?;
    }
    let grid = Grid {
        blocks: [tiles, splits, modules.max_rank().div_ceil(LORA_RANKS)],
        dynamic_shared_bytes: LORA_GRAD_SHARED,
    };
    gpu.launch(GRADS, grid, &params)?;
    if splits == 1 {
        return Ok(());
    }
    let blocks = params.num_partials.div_ceil(u64::from(LORA_THREADS));
    let blocks = u32::try_from(blocks).map_err(|_| too_large(op))?;
    gpu.launch(GRADS_REDUCE, Grid::line(blocks), &params)
}

fn too_large(op: &'static str) -> Error {
    Error::Unsupported {
        what: format!("{op} with adapters this large"),
        why: "kernels take extents below 2^32".to_owned(),
    }
}
