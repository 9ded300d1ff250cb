//! Head and cross-entropy: launchers.

use super::check::VECTOR;
use super::driver::{Grid, Kernel};
use super::elementwise::dense;
use super::params::{
    CROSS_ENTROPY_CLEAR_THREADS, CROSS_ENTROPY_DEPTH, CROSS_ENTROPY_GROUP,
    CROSS_ENTROPY_SMALL_COLUMNS, CROSS_ENTROPY_SMALL_SHARED, CROSS_ENTROPY_SMALL_THREADS,
    CROSS_ENTROPY_SUM_ROWS, CROSS_ENTROPY_THREADS, CROSS_ENTROPY_TILE_COLUMNS,
    CROSS_ENTROPY_TILE_ROWS, CROSS_ENTROPY_TILE_SHARED, CROSS_ENTROPY_TILE_THREADS,
    CrossEntropyClearParams, CrossEntropyGradientParams, CrossEntropyLogitsParams,
    CrossEntropyLossParams,
};
use super::step::Limits;
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{GradOut, StepState};
use crate::store::Weight;
use crate::tensor::{DType, Tensor};

const OP: &str = "linear_cross_entropy";
const LOSS: Kernel = Kernel {
    name: "cross_entropy_loss",
    threads: CROSS_ENTROPY_THREADS,
};
const CLEAR: Kernel = Kernel {
    name: "cross_entropy_clear",
    threads: CROSS_ENTROPY_CLEAR_THREADS,
};

/// The products' kernels for one size of tile.
#[derive(Debug, Clone, Copy)]
struct Products {
    logits: Kernel,
    gradient: Kernel,
    gradient_sum: Kernel,
    columns: u32,
    shared_bytes: u32,
}

const LARGE: Products = Products {
    logits: large("cross_entropy_logits"),
    gradient: large("cross_entropy_gradient"),
    gradient_sum: large("cross_entropy_gradient_sum"),
    columns: CROSS_ENTROPY_TILE_COLUMNS,
    shared_bytes: CROSS_ENTROPY_TILE_SHARED,
};
const SMALL: Products = Products {
    logits: small("cross_entropy_logits_small"),
    gradient: small("cross_entropy_gradient_small"),
    gradient_sum: small("cross_entropy_gradient_sum_small"),
    columns: CROSS_ENTROPY_SMALL_COLUMNS,
    shared_bytes: CROSS_ENTROPY_SMALL_SHARED,
};

const fn large(name: &'static str) -> Kernel {
    Kernel {
        name,
        threads: CROSS_ENTROPY_TILE_THREADS,
    }
}

const fn small(name: &'static str) -> Kernel {
    Kernel {
        name,
        threads: CROSS_ENTROPY_SMALL_THREADS,
    }
}

impl Products {
    /// The large tile where it fits into shared memory (99 KB on GPUs for desktops) and there is more than one of its rows.
    fn of(gpu: &Gpu, capacity: usize) -> Self {
        let is_desktop = gpu.driver().info().is_desktop();
        if is_desktop || capacity <= CROSS_ENTROPY_TILE_ROWS as usize {
            SMALL
        } else {
            LARGE
        }
    }

    fn grid(self, grid: Grid) -> Grid {
        Grid {
            dynamic_shared_bytes: self.shared_bytes,
            ..grid
        }
    }
}

/// Logits held at once: 2,048 rows of 151,936.
const LOGITS_BYTES: usize = 640_000_000;
/// Rows that fill the device with tiles; more gain nothing.
const MOST_ROWS: usize = 2048;

/// Rows of a chunk: as even as whole tiles allow, so that no chunk is much smaller than the others. No more than the
/// vocabulary has: where it is as small as in tests, there are several chunks all the same.
fn chunk_rows(capacity: usize, vocab_size: usize, row_bytes: usize) -> usize {
    let tile = CROSS_ENTROPY_TILE_ROWS as usize;
    let most = MOST_ROWS.min(vocab_size).min(LOGITS_BYTES / row_bytes);
    let most = (most / tile).max(1) * tile;
    let num_chunks = capacity.div_ceil(most).max(1);
    capacity
        .div_ceil(num_chunks)
        .next_multiple_of(tile)
        .max(tile)
}

pub(super) fn forward_backward(
    gpu: &Gpu,
    token_loss: &mut Tensor,
    d_x: GradOut<'_>,
    x: &Tensor,
    head: &Weight,
    vocab_size: usize,
    state: &StepState,
) -> Result<()> {
    let hidden = x.row_len();
    check::multiple(OP, "hidden_size", hidden, VECTOR)?;
    let table = Limits {
        target_ids: vocab_size,
        ..Limits::default()
    };
    gpu.limit(table, state)?;
    let x = check::rows(OP, x, DType::Bf16, hidden)?;
    let token_loss = check::rows_of(OP, token_loss, DType::F32, [x.capacity, 1])?;
    let head = dense(OP, head, hidden)?;
    if head.capacity != vocab_size {
        return Err(Error::Shape {
            op: OP,
            tensor: "head".to_owned(),
            found: vec![head.capacity, hidden],
            expected: vec![vocab_size, hidden],
        });
    }
    let d_x = match d_x {
        GradOut::Skip => None,
        GradOut::Overwrite(tensor) => Some(check::rows_of(
            OP,
            tensor,
            DType::Bf16,
            [x.capacity, hidden],
        )?),
        GradOut::Add(_) => {
            return Err(Error::Unsupported {
                what: format!("{OP} that adds to `d_x`"),
                why: "its kernel overwrites".to_owned(),
            });
        }
    };
    let step = gpu.step()?;
    let num_groups = vocab_size.div_ceil(CROSS_ENTROPY_GROUP as usize);
    let row_bytes = num_groups * CROSS_ENTROPY_GROUP as usize * DType::Bf16.size();
    let rows = chunk_rows(x.capacity, vocab_size, row_bytes);
    let hidden_size = check::to_u32(OP, "hidden_size", hidden)?;
    let vocab_size = check::to_u32(OP, "vocab_size", vocab_size)?;

    let mut frame = gpu.scratch.frame();
    let logits = match d_x {
        Some(_) => frame.take("logits", rows * row_bytes)?,
        None => 0,
    };
    let group_max = frame.take("group_max", rows * num_groups * 4)?;
    let group_sum = frame.take("group_sum", rows * num_groups * 4)?;
    let target_logit = frame.take("target_logit", rows * 4)?;
    let num_multiprocessors = gpu.driver().info().num_multiprocessors;
    let products = Products::of(gpu, x.capacity);
    let tile_bytes = CROSS_ENTROPY_TILE_ROWS * products.columns * 4;
    let partial = match d_x {
        Some(_) => frame.take("partial", (num_multiprocessors * tile_bytes) as usize)?,
        None => 0,
    };
    if let Some(d_x) = d_x {
        let params = CrossEntropyClearParams {
            d_x,
            step,
            hidden_size,
            reserved: 0,
        };
        let grid = Grid::line(check::to_u32(OP, "capacity", x.capacity)?);
        gpu.launch(CLEAR, grid, &params)?;
    }
    for first in (0..x.capacity).step_by(rows) {
        let num_rows = check::to_u32(OP, "capacity", rows.min(x.capacity - first))?;
        let first_target = check::to_u32(OP, "capacity", first)?;
        let row_tiles = num_rows.div_ceil(CROSS_ENTROPY_TILE_ROWS);
        let params = CrossEntropyLogitsParams {
            logits,
            group_max,
            group_sum,
            target_logit,
            x: x.address,
            head: head.address,
            step,
            first_target,
            num_rows,
            hidden_size,
            vocab_size,
        };
        let grid = Grid::plane(row_tiles, vocab_size.div_ceil(products.columns));
        gpu.launch(products.logits, products.grid(grid), &params)?;
        let params = CrossEntropyLossParams {
            token_loss,
            logits,
            group_max,
            group_sum,
            target_logit,
            step,
            first_target,
            vocab_size,
        };
        gpu.launch(LOSS, Grid::line(num_rows), &params)?;
        let Some(d_x) = d_x else {
            continue;
        };
        let params = CrossEntropyGradientParams {
            d_x,
            partial,
            d_logits: logits,
            head: head.address,
            step,
            first_target,
            num_rows,
            hidden_size,
            vocab_size,
            num_multiprocessors,
            reserved: 0,
        };
        // As many tiles as there may be, or, where there are fewer than multiprocessors, parts of their sums.
        let tiles = row_tiles * hidden_size.div_ceil(products.columns);
        let parts = (tiles * vocab_size.div_ceil(CROSS_ENTROPY_DEPTH)).min(num_multiprocessors);
        let grid = products.grid(Grid::line(tiles.max(parts)));
        gpu.launch(products.gradient, grid, &params)?;
        let tiles_in_parts = tiles.min(num_multiprocessors / 2);
        let blocks = tiles_in_parts * (CROSS_ENTROPY_TILE_ROWS / CROSS_ENTROPY_SUM_ROWS);
        gpu.launch(products.gradient_sum, Grid::line(blocks), &params)?;
    }
    Ok(())
}
