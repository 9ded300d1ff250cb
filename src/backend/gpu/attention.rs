//! Softmax attention and its output gate: launchers.

use super::check::VECTOR;
use super::driver::{Grid, Kernel};
use super::params::{
    ATTENTION_DELTA_ROWS, ATTENTION_DELTA_THREADS, ATTENTION_GATE_THREADS, ATTENTION_KEYS,
    ATTENTION_PADDING, ATTENTION_QUERIES, ATTENTION_THREADS, ATTENTION_TILE,
    ATTENTION_WIDE_THREADS, AttentionBackwardParams, AttentionForwardParams,
    AttentionGateBackwardParams, AttentionGateForwardParams,
};
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, StepState};
use crate::tensor::{DType, Tensor};

/// Kernels for heads of at most `columns` dimensions.
struct Kernels {
    columns: u32,
    forward: Kernel,
    backward_query: Kernel,
    backward_key: Kernel,
}

macro_rules! kernels {
    ($columns:literal, $threads:expr) => {
        Kernels {
            columns: $columns,
            forward: Kernel {
                name: concat!("attention_forward_", $columns),
                threads: $threads,
            },
            backward_query: Kernel {
                name: concat!("attention_backward_query_", $columns),
                threads: $threads,
            },
            backward_key: Kernel {
                name: concat!("attention_backward_key_", $columns),
                threads: $threads,
            },
        }
    };
}

/// All of them, narrowest first.
const KERNELS: [Kernels; 5] = [
    kernels!(32, ATTENTION_THREADS),
    kernels!(64, ATTENTION_THREADS),
    kernels!(96, ATTENTION_THREADS),
    kernels!(128, ATTENTION_THREADS),
    kernels!(256, ATTENTION_WIDE_THREADS),
];
const DELTA: Kernel = Kernel {
    name: "attention_delta",
    threads: ATTENTION_DELTA_THREADS,
};
const GATE_FORWARD: Kernel = Kernel {
    name: "attention_gate_forward",
    threads: ATTENTION_GATE_THREADS,
};
const GATE_BACKWARD: Kernel = Kernel {
    name: "attention_gate_backward",
    threads: ATTENTION_GATE_THREADS,
};
/// Rows and columns of a tensor-core product.
const PRODUCT: usize = 16;

impl Kernels {
    /// The narrowest that `head_dim` fits in.
    fn of(op: &'static str, head_dim: usize) -> Result<&'static Self> {
        check::multiple(op, "head_dim", head_dim, PRODUCT)?;
        let fits = |kernels: &&Self| head_dim <= kernels.columns as usize;
        KERNELS.iter().find(fits).ok_or_else(|| Error::Unsupported {
            what: format!("{op} with head_dim {head_dim}"),
            why: "its kernels take at most 256; use `device: cpu`".to_owned(),
        })
    }

    /// Bytes of `rows` rows in shared memory.
    fn row_bytes(&self, rows: u32) -> u32 {
        rows * (self.columns + ATTENTION_PADDING) * 2
    }

    fn forward_grid(&self, extents: &Extents) -> Grid {
        let tiles = extents.capacity.div_ceil(ATTENTION_QUERIES);
        // Where two warps share rows: their P in bf16, and a number of each warp and row.
        let exchange = if self.forward.threads == ATTENTION_WIDE_THREADS {
            ATTENTION_QUERIES * (ATTENTION_KEYS + ATTENTION_PADDING) * 2 + 2 * ATTENTION_QUERIES * 4
        } else {
            0
        };
        Grid::plane(extents.num_attention_heads, tiles)
            .with_shared(self.row_bytes(ATTENTION_QUERIES + 2 * ATTENTION_KEYS) + exchange)
    }

    fn backward_grid(&self, extents: &Extents, heads: u32) -> Grid {
        // Four tiles, scores in bf16, three numbers a query.
        let scores = ATTENTION_TILE * (ATTENTION_TILE + ATTENTION_PADDING) * 2;
        let numbers = 3 * ATTENTION_TILE * 4;
        Grid::plane(heads, extents.capacity.div_ceil(ATTENTION_TILE))
            .with_shared(self.row_bytes(4 * ATTENTION_TILE) + scores + numbers)
    }
}

/// What every kernel here takes by value.
struct Extents {
    capacity: u32,
    num_attention_heads: u32,
    num_key_value_heads: u32,
    head_dim: u32,
    window: u32,
}

impl Extents {
    /// Of a call whose queries have `capacity` rows.
    fn new(op: &'static str, spec: &AttentionSpec, capacity: usize) -> Result<Self> {
        let (heads, kv_heads) = (spec.num_attention_heads, spec.num_key_value_heads);
        check::multiple(op, "num_attention_heads", heads, kv_heads.max(1))?;
        if spec.sliding_window == Some(0) {
            return Err(Error::Unsupported {
                what: format!("{op} with a sliding window of 0"),
                why: "a query sees at least itself".to_owned(),
            });
        }
        let window = spec.sliding_window.map(u32::try_from);
        Ok(Self {
            capacity: check::to_u32(op, "capacity", capacity)?,
            num_attention_heads: check::to_u32(op, "num_attention_heads", heads)?,
            num_key_value_heads: check::to_u32(op, "num_key_value_heads", kv_heads)?,
            head_dim: check::to_u32(op, "head_dim", spec.head_dim)?,
            window: window.and_then(std::result::Result::ok).unwrap_or(u32::MAX),
        })
    }
}

/// Elements of a row of q, and of k.
fn widths(spec: &AttentionSpec) -> (usize, usize) {
    (
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
}

pub(super) fn forward(
    gpu: &Gpu,
    o: &mut Tensor,
    lse: &mut Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_forward";
    let kernels = Kernels::of(OP, spec.head_dim)?;
    let (q_width, k_width) = widths(&spec);
    let q = check::rows(OP, q, DType::Bf16, q_width)?;
    let extents = Extents::new(OP, &spec, q.capacity)?;
    let (q_shape, k_shape) = ([q.capacity, q_width], [q.capacity, k_width]);
    let lse_shape = [q.capacity, spec.num_attention_heads];
    let params = AttentionForwardParams {
        o: check::rows_of(OP, o, DType::Bf16, q_shape)?,
        lse: check::rows_of(OP, lse, DType::F32, lse_shape)?,
        q: q.address,
        k: check::rows_of(OP, k, DType::Bf16, k_shape)?,
        v: check::rows_of(OP, v, DType::Bf16, k_shape)?,
        step: gpu.step()?,
        num_attention_heads: extents.num_attention_heads,
        num_key_value_heads: extents.num_key_value_heads,
        head_dim: extents.head_dim,
        window: extents.window,
        scale: spec.softmax_scale(),
        reserved: 0,
    };
    gpu.launch(kernels.forward, kernels.forward_grid(&extents), &params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    gpu: &Gpu,
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
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_backward";
    let kernels = Kernels::of(OP, spec.head_dim)?;
    let (q_width, k_width) = widths(&spec);
    let q = check::rows(OP, q, DType::Bf16, q_width)?;
    let extents = Extents::new(OP, &spec, q.capacity)?;
    let (q_shape, k_shape) = ([q.capacity, q_width], [q.capacity, k_width]);
    let lse_shape = [q.capacity, spec.num_attention_heads];
    let num_deltas = q.capacity * spec.num_attention_heads;
    let mut frame = gpu.scratch.frame();
    let params = AttentionBackwardParams {
        d_q: check::rows_of(OP, d_q, DType::Bf16, q_shape)?,
        d_k: check::rows_of(OP, d_k, DType::Bf16, k_shape)?,
        d_v: check::rows_of(OP, d_v, DType::Bf16, k_shape)?,
        delta: frame.take("delta", num_deltas * 4)?,
        d_o: check::rows_of(OP, d_o, DType::Bf16, q_shape)?,
        o: check::rows_of(OP, o, DType::Bf16, q_shape)?,
        lse: check::rows_of(OP, lse, DType::F32, lse_shape)?,
        q: q.address,
        k: check::rows_of(OP, k, DType::Bf16, k_shape)?,
        v: check::rows_of(OP, v, DType::Bf16, k_shape)?,
        step: gpu.step()?,
        num_attention_heads: extents.num_attention_heads,
        num_key_value_heads: extents.num_key_value_heads,
        head_dim: extents.head_dim,
        window: extents.window,
        scale: spec.softmax_scale(),
        reserved: 0,
    };
    let num_deltas = check::to_u32(OP, "capacity x num_attention_heads", num_deltas)?;
    let delta_grid = Grid::line(num_deltas.div_ceil(ATTENTION_DELTA_ROWS));
    gpu.launch(DELTA, delta_grid, &params)?;
    let query_grid = kernels.backward_grid(&extents, extents.num_attention_heads);
    gpu.launch(kernels.backward_query, query_grid, &params)?;
    let key_grid = kernels.backward_grid(&extents, extents.num_key_value_heads);
    gpu.launch(kernels.backward_key, key_grid, &params)
}

/// Blocks of the gate's kernels: a thread takes 8 elements of `y`.
fn gate_grid(op: &'static str, elements: usize) -> Result<Grid> {
    let blocks = elements.div_ceil(VECTOR * ATTENTION_GATE_THREADS as usize);
    Ok(Grid::line(check::to_u32(op, "blocks", blocks)?))
}

pub(super) fn gate_forward(
    gpu: &Gpu,
    y: &mut Tensor,
    o: &Tensor,
    q_proj: &Tensor,
    spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_gate_forward";
    check::multiple(OP, "head_dim", spec.head_dim, VECTOR)?;
    let (width, _) = widths(&spec);
    let o = check::rows(OP, o, DType::Bf16, width)?;
    let params = AttentionGateForwardParams {
        y: check::rows_of(OP, y, DType::Bf16, [o.capacity, width])?,
        o: o.address,
        q_proj: check::rows_of(OP, q_proj, DType::Bf16, [o.capacity, 2 * width])?,
        step: gpu.step()?,
        num_attention_heads: check::to_u32(OP, "num_attention_heads", spec.num_attention_heads)?,
        head_dim: check::to_u32(OP, "head_dim", spec.head_dim)?,
    };
    gpu.launch(GATE_FORWARD, gate_grid(OP, o.capacity * width)?, &params)
}

pub(super) fn gate_backward(
    gpu: &Gpu,
    d_o: &mut Tensor,
    d_q_proj: &mut Tensor,
    d_y: &Tensor,
    o: &Tensor,
    q_proj: &Tensor,
    spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    const OP: &str = "attention_gate_backward";
    check::multiple(OP, "head_dim", spec.head_dim, VECTOR)?;
    let (width, _) = widths(&spec);
    let o = check::rows(OP, o, DType::Bf16, width)?;
    let (shape, proj_shape) = ([o.capacity, width], [o.capacity, 2 * width]);
    let params = AttentionGateBackwardParams {
        d_o: check::rows_of(OP, d_o, DType::Bf16, shape)?,
        d_q_proj: check::rows_of(OP, d_q_proj, DType::Bf16, proj_shape)?,
        d_y: check::rows_of(OP, d_y, DType::Bf16, shape)?,
        o: o.address,
        q_proj: check::rows_of(OP, q_proj, DType::Bf16, proj_shape)?,
        step: gpu.step()?,
        num_attention_heads: check::to_u32(OP, "num_attention_heads", spec.num_attention_heads)?,
        head_dim: check::to_u32(OP, "head_dim", spec.head_dim)?,
    };
    gpu.launch(GATE_BACKWARD, gate_grid(OP, o.capacity * width)?, &params)
}
