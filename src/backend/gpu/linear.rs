//! Projections: frozen matrices with their adapters: launchers.

use super::check::VECTOR;
use super::driver::{Grid, Kernel};
use super::lora::{self, AlignedRows, GradInputs, LoraArena, Modules};
use super::params::{
    LINEAR_MAX_PROJECTIONS, LINEAR_SHARED_DENSE, LINEAR_SHARED_NF4, LINEAR_SMALL_ROWS,
    LINEAR_SMALL_SHARED_DENSE, LINEAR_SMALL_SHARED_NF4, LINEAR_SMALL_TILE, LINEAR_THREADS,
    LINEAR_TILE, LINEAR_WIDE_COLS, LINEAR_WIDE_SHARED_DENSE, LINEAR_WIDE_SHARED_NF4,
    LINEAR_WIDE_THREADS, LinearAlignParams, LinearParams, LinearProjection, NF4_ELEMENTS_PER_BLOCK,
    NF4_THREADS, Nf4DequantizeParams, Nf4Weight,
};
use super::scratch::Frame;
use super::{Gpu, check};
use crate::error::{Error, Result};
use crate::ops::{GradOut, Linear, StepState};
use crate::store::Weight;
use crate::store::nf4::{Absmax, BLOCKSIZE, Nf4Matrix};
use crate::tensor::{DType, Tensor};

/// A kernel's names at the three sizes of tile.
#[derive(Debug, Clone, Copy)]
struct Kernels {
    wide: &'static str,
    plain: &'static str,
    small: &'static str,
}

const FORWARD: Kernels = Kernels {
    wide: "linear_forward_wide",
    plain: "linear_forward",
    small: "linear_forward_small",
};
const SWIGLU_FORWARD: Kernels = Kernels {
    wide: "linear_swiglu_forward_wide",
    plain: "linear_swiglu_forward",
    small: "linear_swiglu_forward_small",
};
const BACKWARD_INPUT: Kernels = Kernels {
    wide: "linear_backward_input_wide",
    plain: "linear_backward_input",
    small: "linear_backward_input_small",
};

/// What a block makes.
#[derive(Debug, Clone, Copy)]
struct Tile {
    rows: u32,
    cols: u32,
    threads: u32,
    /// Dynamic shared memory where all weights are NF4, and where some are dense.
    shared_bytes: [u32; 2],
    name: fn(Kernels) -> &'static str,
}

const WIDE: Tile = Tile {
    rows: LINEAR_TILE,
    cols: LINEAR_WIDE_COLS,
    threads: LINEAR_WIDE_THREADS,
    shared_bytes: [LINEAR_WIDE_SHARED_NF4, LINEAR_WIDE_SHARED_DENSE],
    name: |kernels| kernels.wide,
};
const PLAIN: Tile = Tile {
    rows: LINEAR_TILE,
    cols: LINEAR_TILE,
    threads: LINEAR_THREADS,
    shared_bytes: [LINEAR_SHARED_NF4, LINEAR_SHARED_DENSE],
    name: |kernels| kernels.plain,
};
const SMALL: Tile = Tile {
    rows: LINEAR_SMALL_TILE,
    cols: LINEAR_SMALL_TILE,
    threads: LINEAR_THREADS,
    shared_bytes: [LINEAR_SMALL_SHARED_NF4, LINEAR_SMALL_SHARED_DENSE],
    name: |kernels| kernels.small,
};

const ALIGN: Kernel = Kernel {
    name: "linear_align",
    threads: LINEAR_THREADS,
};
const DEQUANTIZE: Kernel = Kernel {
    name: "nf4_dequantize",
    threads: NF4_THREADS,
};

/// `matrix` as kernels take it.
pub(super) fn nf4_weight(gpu: &Gpu, matrix: &Nf4Matrix) -> Result<Nf4Weight> {
    let mut weight = Nf4Weight {
        codes: matrix.codes.device_address()?,
        dynamic_code: gpu.dynamic_code(),
        ..Nf4Weight::default()
    };
    match &matrix.absmax {
        Absmax::Plain(absmax) => weight.absmax = absmax.device_address()?,
        Absmax::Nested {
            codes,
            nested_absmax,
            offset: _,
        } => {
            weight.nested_codes = codes.device_address()?;
            weight.nested_absmax = nested_absmax.device_address()?;
        }
    }
    Ok(weight)
}

/// `matrix` in bf16, in `frame`: for one whose blocks cross rows, which the tiles cannot unpack.
pub(super) fn dequantized(gpu: &Gpu, frame: &mut Frame<'_>, matrix: &Nf4Matrix) -> Result<u64> {
    let num_elements = matrix.out_features * matrix.in_features;
    let out = frame.take("dequantised weight", num_elements * DType::Bf16.size())?;
    let params = Nf4DequantizeParams {
        out,
        weight: nf4_weight(gpu, matrix)?,
        num_elements: num_elements as u64,
    };
    let blocks = num_elements.div_ceil(NF4_ELEMENTS_PER_BLOCK as usize);
    let grid = Grid::line(check::to_u32("nf4_dequantize", "elements", blocks)?);
    gpu.launch(DEQUANTIZE, grid, &params)?;
    Ok(out)
}

/// What the kernels of one call have in common.
#[derive(Debug)]
struct Call {
    op: &'static str,
    capacity: usize,
    in_features: usize,
    x: AlignedRows,
    xa: u64,
    modules: Modules,
    arena: LoraArena,
}

impl Call {
    fn new(
        op: &'static str,
        x: &Tensor,
        xa: &Tensor,
        linears: &[&Linear],
        lora: &Tensor,
    ) -> Result<Self> {
        let in_features = linears.first().map_or(0, |linear| linear.in_features);
        if linears.len() > LINEAR_MAX_PROJECTIONS as usize {
            return Err(Error::Unsupported {
                what: format!("{op} with {} projections of one input", linears.len()),
                why: format!("its kernel takes {LINEAR_MAX_PROJECTIONS}"),
            });
        }
        check::multiple(op, "in_features", in_features, VECTOR)?;
        let rows = check::rows(op, x, DType::Bf16, in_features)?;
        let stride = check::to_u32(op, "in_features", in_features)?;
        let arena = LoraArena::new(op, lora)?;
        let modules = Modules::new(op, linears, &arena)?;
        let mut call = Self {
            op,
            capacity: rows.capacity,
            in_features,
            x: AlignedRows {
                address: rows.address,
                num_cols: stride,
                stride,
            },
            xa: 0,
            modules,
            arena,
        };
        call.xa = call.rows(xa, DType::Bf16, call.modules.xa_width)?;
        Ok(call)
    }

    /// Refuses tensors that are not one for each projection.
    fn one_each(&self, tensor: &str, found: usize) -> Result<()> {
        let expected = self.modules.each.len();
        if found == expected {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op,
            tensor: tensor.to_owned(),
            found: vec![found],
            expected: vec![expected],
        })
    }

    /// Address of `tensor`, which must have the rows of x.
    fn rows(&self, tensor: &Tensor, dtype: DType, width: usize) -> Result<u64> {
        let rows = check::rows(self.op, tensor, dtype, width)?;
        if rows.capacity == self.capacity {
            return Ok(rows.address);
        }
        Err(Error::Shape {
            op: self.op,
            tensor: tensor.name().to_owned(),
            found: tensor.shape().to_vec(),
            expected: vec![self.capacity, width],
        })
    }

    fn params(&self, gpu: &Gpu, xa: u64) -> Result<LinearParams> {
        Ok(LinearParams {
            x: self.x.address,
            xa,
            lora: self.arena.address,
            step: gpu.step()?,
            in_features: self.x.num_cols,
            xa_width: check::to_u32(self.op, "rank", self.modules.xa_width)?,
            lora_is_bf16: self.arena.is_bf16,
            ..LinearParams::default()
        })
    }

    /// A projection's weight, checked. An NF4 weight is unpacked to `frame` where its blocks cross rows, or `is_dense`.
    fn projection(
        &self,
        gpu: &Gpu,
        frame: &mut Frame<'_>,
        linear: &Linear,
        index: usize,
        is_dense: bool,
    ) -> Result<LinearProjection> {
        let shape = [linear.out_features, self.in_features];
        let mut projection = LinearProjection {
            lora: self.modules.each[index],
            out_features: check::to_u32(self.op, "out_features", linear.out_features)?,
            ..LinearProjection::default()
        };
        if let Some(bias) = &linear.bias {
            projection.bias = check::exact(self.op, bias, DType::F32, &shape[..1])?;
        }
        match &linear.weight {
            Weight::Dense(tensor) => {
                projection.dense = check::exact(self.op, tensor, DType::Bf16, &shape)?;
            }
            Weight::Nf4(matrix) if [matrix.out_features, matrix.in_features] != shape => {
                return Err(Error::Shape {
                    op: self.op,
                    tensor: matrix.codes.name().to_owned(),
                    found: vec![matrix.out_features, matrix.in_features],
                    expected: shape.to_vec(),
                });
            }
            Weight::Nf4(matrix) if is_dense || !self.in_features.is_multiple_of(BLOCKSIZE) => {
                projection.dense = dequantized(gpu, frame, matrix)?;
            }
            Weight::Nf4(matrix) => projection.nf4 = nf4_weight(gpu, matrix)?,
        }
        Ok(projection)
    }

    /// The tile for results of these widths: the wide one where it fits into shared memory (not into the 99 KB of GPUs
    /// for desktops) and there is one for each multiprocessor.
    fn tile(&self, gpu: &Gpu, widths: &[usize]) -> Tile {
        if self.capacity <= LINEAR_SMALL_ROWS as usize {
            return SMALL;
        }
        let info = gpu.driver().info();
        let is_desktop = info.is_desktop();
        let cols = |width: &usize| width.div_ceil(WIDE.cols as usize);
        let tiles =
            self.capacity.div_ceil(WIDE.rows as usize) * widths.iter().map(cols).sum::<usize>();
        if is_desktop || tiles < info.num_multiprocessors as usize {
            PLAIN
        } else {
            WIDE
        }
    }

    /// Launches `kernels` on row tiles by `params.col_tiles` tiles.
    fn launch(
        &self,
        gpu: &Gpu,
        kernels: Kernels,
        tile: Tile,
        mut params: LinearParams,
    ) -> Result<()> {
        let projections = &params.projections[..params.num_projections as usize];
        let has_dense = projections.iter().any(|projection| projection.dense != 0);
        let kernel = Kernel {
            name: (tile.name)(kernels),
            threads: tile.threads,
        };
        params.row_tiles = check::to_u32(self.op, "capacity", self.capacity)?.div_ceil(tile.rows);
        let blocks = params.row_tiles as usize * params.col_tiles as usize;
        let grid = Grid {
            dynamic_shared_bytes: tile.shared_bytes[usize::from(has_dense)],
            ..Grid::line(check::to_u32(self.op, "tiles", blocks)?)
        };
        gpu.launch(kernel, grid, &params)
    }
}

#[expect(clippy::needless_pass_by_ref_mut, reason = "kernels write them")]
pub(super) fn forward(
    gpu: &Gpu,
    outs: &mut [&mut Tensor],
    xa: &mut Tensor,
    x: &Tensor,
    linears: &[&Linear],
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    let call = Call::new("linear_forward", x, xa, linears, lora)?;
    call.one_each("outs", outs.len())?;
    let mut frame = gpu.scratch.frame();
    let mut params = call.params(gpu, call.xa)?;
    let widths: Vec<usize> = linears.iter().map(|linear| linear.out_features).collect();
    let tile = call.tile(gpu, &widths);
    for (index, (out, linear)) in outs.iter().zip(linears).enumerate() {
        let mut projection = call.projection(gpu, &mut frame, linear, index, false)?;
        let dtype = if linear.f32_output {
            DType::F32
        } else {
            DType::Bf16
        };
        projection.out = call.rows(out, dtype, linear.out_features)?;
        projection.out_is_f32 = u32::from(linear.f32_output);
        projection.first_tile = params.col_tiles;
        params.col_tiles += projection.out_features.div_ceil(tile.cols);
        params.projections[index] = projection;
        params.num_projections += 1;
    }
    lora::forward(
        gpu,
        call.op,
        call.xa,
        call.x,
        &call.modules,
        &call.arena,
        call.capacity,
    )?;
    call.launch(gpu, FORWARD, tile, params)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
#[expect(clippy::needless_pass_by_ref_mut, reason = "kernels write them")]
pub(super) fn swiglu_forward(
    gpu: &Gpu,
    h: &mut Tensor,
    gate: &mut Tensor,
    up: &mut Tensor,
    xa: &mut Tensor,
    x: &Tensor,
    linears: [&Linear; 2],
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    let call = Call::new("linear_swiglu_forward", x, xa, &linears, lora)?;
    let width = linears[0].out_features;
    let mut frame = gpu.scratch.frame();
    let mut params = call.params(gpu, call.xa)?;
    // One kernel reads both weights alike.
    let is_dense = linears
        .iter()
        .any(|linear| matches!(linear.weight, Weight::Dense(_)));
    for (index, (out, linear)) in [gate, up].into_iter().zip(linears).enumerate() {
        let mut projection = call.projection(gpu, &mut frame, linear, index, is_dense)?;
        projection.out = call.rows(out, DType::Bf16, width)?;
        params.projections[index] = projection;
    }
    if linears[1].out_features != width {
        return Err(Error::Shape {
            op: call.op,
            tensor: "up".to_owned(),
            found: vec![linears[1].out_features],
            expected: vec![width],
        });
    }
    params.h = call.rows(h, DType::Bf16, width)?;
    params.num_projections = 2;
    // A tile holds as many columns of gate as of up.
    let tile = call.tile(gpu, &[2 * width]);
    params.col_tiles = params.projections[0].out_features.div_ceil(tile.cols / 2);
    lora::forward(
        gpu,
        call.op,
        call.xa,
        call.x,
        &call.modules,
        &call.arena,
        call.capacity,
    )?;
    call.launch(gpu, SWIGLU_FORWARD, tile, params)
}

/// `d_out` as the kernels read it: as it is, or copied to `frame` if it is f32 or its rows begin off a 16-byte border.
fn aligned(
    gpu: &Gpu,
    frame: &mut Frame<'_>,
    call: &Call,
    d_out: &Tensor,
    width: usize,
) -> Result<AlignedRows> {
    let is_f32 = d_out.dtype() == DType::F32;
    let dtype = if is_f32 { DType::F32 } else { DType::Bf16 };
    let address = call.rows(d_out, dtype, width)?;
    let stride = width.next_multiple_of(VECTOR);
    let mut rows = AlignedRows {
        address,
        num_cols: check::to_u32(call.op, "out_features", width)?,
        stride: check::to_u32(call.op, "out_features", stride)?,
    };
    if !is_f32 && stride == width {
        return Ok(rows);
    }
    let num_elements = call.capacity * stride;
    rows.address = frame.take("aligned gradient", num_elements * DType::Bf16.size())?;
    let params = LinearAlignParams {
        out: rows.address,
        d_out: address,
        step: gpu.step()?,
        num_cols: rows.num_cols,
        stride: rows.stride,
        is_f32: u32::from(is_f32),
        reserved: 0,
    };
    let blocks = (num_elements / VECTOR).div_ceil(LINEAR_THREADS as usize);
    let grid = Grid::line(check::to_u32(call.op, "capacity", blocks)?);
    gpu.launch(ALIGN, grid, &params)?;
    Ok(rows)
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
#[expect(clippy::needless_pass_by_ref_mut, reason = "kernels write them")]
pub(super) fn backward(
    gpu: &Gpu,
    d_x: GradOut<'_>,
    d_lora: &mut Tensor,
    d_outs: &[&Tensor],
    x: &Tensor,
    xa: &Tensor,
    linears: &[&Linear],
    lora: &Tensor,
    _: &StepState,
) -> Result<()> {
    let call = Call::new("linear_backward", x, xa, linears, lora)?;
    call.one_each("d_outs", d_outs.len())?;
    let mut frame = gpu.scratch.frame();
    let mut rows = Vec::with_capacity(linears.len());
    for (d_out, linear) in d_outs.iter().zip(linears) {
        rows.push(aligned(gpu, &mut frame, &call, d_out, linear.out_features)?);
    }
    let d_xa = match call.capacity * call.modules.xa_width * DType::Bf16.size() {
        0 => 0,
        num_bytes => frame.take("d_xa", num_bytes)?,
    };
    lora::backward(
        gpu,
        call.op,
        d_xa,
        &rows,
        &call.modules,
        &call.arena,
        call.capacity,
    )?;
    let (d_x, accumulate) = match d_x {
        GradOut::Skip => (None, 0),
        GradOut::Overwrite(d_x) => (Some(d_x), 0),
        GradOut::Add(d_x) => (Some(d_x), 1),
    };
    if let Some(d_x) = d_x {
        let mut params = call.params(gpu, d_xa)?;
        for (index, (rows, linear)) in rows.iter().zip(linears).enumerate() {
            let mut projection = call.projection(gpu, &mut frame, linear, index, false)?;
            projection.out = rows.address;
            projection.out_stride = rows.stride;
            params.projections[index] = projection;
            params.num_projections += 1;
        }
        params.d_x = call.rows(d_x, DType::Bf16, call.in_features)?;
        params.accumulate = accumulate;
        let tile = call.tile(gpu, &[call.in_features]);
        params.col_tiles = params.in_features.div_ceil(tile.cols);
        call.launch(gpu, BACKWARD_INPUT, tile, params)?;
    }
    let d_lora = LoraArena::new(call.op, d_lora)?;
    // The same places as in the adapter's own arena.
    call.arena.expect_like(call.op, &d_lora)?;
    let inputs = GradInputs {
        x: call.x,
        xa: call.xa,
        d_xa,
        d_outs: &rows,
    };
    lora::grads(gpu, call.op, &d_lora, inputs, &call.modules, call.capacity)
}
