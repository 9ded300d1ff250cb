//! What the experts' kernels are told: tiles of routed rows, and the weights and adapters of all experts.

use super::super::driver::{Grid, Kernel};
use super::super::lora::LoraArena;
use super::super::params::{
    LinearProjection, LoraModule, MOE_SMALL_TILE_ROWS, MOE_TILE_ROWS, MOE_TILES_THREADS,
    MoeProjection, MoeRows, MoeTile, MoeTilesParams, NF4_BLOCKSIZE, NF4_ELEMENTS_PER_BLOCK,
    NF4_THREADS, Nf4DequantizeParams, Nf4Weight,
};
use super::super::scratch::Frame;
use super::super::{Gpu, check, lora};
use crate::error::{Error, Result};
use crate::ops::{ExpertsLora, LoraPair, Routing};
use crate::store::Weight;
use crate::store::nf4::{Absmax, Nf4Matrix};
use crate::tensor::{DType, Tensor};

const TILES: Kernel = Kernel {
    name: "moe_tiles",
    threads: MOE_TILES_THREADS,
};
const DEQUANTIZE: Kernel = Kernel {
    name: "nf4_dequantize",
    threads: NF4_THREADS,
};

/// Rows per expert from which tiles of 128 rows waste less on their last one than tiles of 64 do on unpacking weights twice.
const ROWS_FOR_LARGE_TILES: usize = 256;

/// Routed rows as kernels take them, with addresses of the routing.
pub(super) struct Routed {
    pub(super) rows: MoeRows,
    pub(super) topk_weights: u64,
    pub(super) row_of_slot: u64,
    /// Rows of a routed tensor.
    pub(super) capacity: usize,
    /// Row tiles there may be.
    pub(super) max_tiles: u32,
    pub(super) is_large: bool,
    pub(super) num_experts: u32,
    pub(super) top_k: u32,
}

impl Routed {
    /// Checks the routing and cuts its rows into tiles, on the device.
    pub(super) fn new(
        op: &'static str,
        gpu: &Gpu,
        frame: &mut Frame<'_>,
        routing: &Routing,
    ) -> Result<Self> {
        let (experts, k) = (routing.num_experts, routing.num_experts_per_tok);
        let weights = check::rows(op, &routing.topk_weights, DType::F32, k)?;
        let capacity = weights.capacity * k;
        let num_rows = check::to_u32(op, "routed rows", capacity)?;
        let is_large = capacity / experts.max(1) >= ROWS_FOR_LARGE_TILES;
        let tile_rows = if is_large {
            MOE_TILE_ROWS
        } else {
            MOE_SMALL_TILE_ROWS
        };
        let num_experts = check::to_u32(op, "num_experts", experts)?;
        let max_tiles = num_rows.div_ceil(tile_rows) + num_experts;
        let tiles = frame.take("tiles", max_tiles as usize * size_of::<MoeTile>())?;
        let params = MoeTilesParams {
            tiles,
            num_tiles: frame.take("num_tiles", size_of::<u32>())?,
            token_of_row: frame.take("token_of_row", capacity * size_of::<u32>())?,
            expert_offsets: check::exact(op, &routing.expert_offsets, DType::U32, &[experts + 1])?,
            slot_of_row: check::exact(op, &routing.slot_of_row, DType::U32, &[capacity])?,
            num_experts,
            num_experts_per_tok: check::to_u32(op, "num_experts_per_tok", k)?,
            tile_rows,
            reserved: 0,
        };
        let blocks = num_rows.div_ceil(MOE_TILES_THREADS).max(1);
        gpu.launch(TILES, Grid::line(blocks), &params)?;
        Ok(Self {
            rows: MoeRows {
                tiles,
                num_tiles: params.num_tiles,
                expert_offsets: params.expert_offsets,
                slot_of_row: params.slot_of_row,
                token_of_row: params.token_of_row,
                step: gpu.step()?,
            },
            topk_weights: weights.address,
            row_of_slot: check::exact(op, &routing.row_of_slot, DType::U32, &[capacity])?,
            capacity,
            max_tiles,
            is_large,
            num_experts,
            top_k: params.num_experts_per_tok,
        })
    }

    /// Address of a tensor with a row of `width` activations per routed row.
    pub(super) fn activation(
        &self,
        op: &'static str,
        tensor: &Tensor,
        width: usize,
    ) -> Result<u64> {
        check::exact(op, tensor, DType::Bf16, &[self.capacity, width])
    }

    /// Address of a tensor with a row of `width` activations per token.
    pub(super) fn token_activation(
        &self,
        op: &'static str,
        tensor: &Tensor,
        width: usize,
    ) -> Result<u64> {
        let tokens = self.capacity / self.top_k as usize;
        check::exact(op, tensor, DType::Bf16, &[tokens, width])
    }
}

/// One projection of all experts.
pub(super) struct ExpertWeights<'a> {
    pub(super) op: &'static str,
    pub(super) arena: &'a LoraArena,
    pub(super) weights: &'a [Weight],
    /// `[out_features, in_features]` of each.
    pub(super) dims: [usize; 2],
    pub(super) pair: Option<LoraPair>,
    pub(super) lora: &'a ExpertsLora,
    /// Where the pair's part of a row of `xa` begins.
    pub(super) first_column: usize,
}

/// The distance from the first of `addresses` to the second, which all others must keep too.
fn stride(
    op: &'static str,
    addresses: impl ExactSizeIterator<Item = Result<u64>>,
) -> Result<(u64, u64)> {
    let addresses = addresses.collect::<Result<Vec<_>>>()?;
    let first = addresses.first().copied().unwrap_or(0);
    let step = addresses
        .get(1)
        .map_or(0, |second| second.wrapping_sub(first));
    let expected = |index: usize| first.wrapping_add(step.wrapping_mul(index as u64));
    let is_even = |(index, address): (usize, &u64)| *address == expected(index);
    if addresses.iter().enumerate().all(is_even) {
        return Ok((first, step));
    }
    Err(Error::Unsupported {
        what: format!("{op} with experts that lie at uneven distances"),
        why: "place a layer's experts together, with `Ops::place_experts`".to_owned(),
    })
}

impl ExpertWeights<'_> {
    /// As kernels take it. `out` is the projection's output, or the gradient of it.
    pub(super) fn projection(
        &self,
        gpu: &Gpu,
        frame: &mut Frame<'_>,
        out: u64,
    ) -> Result<MoeProjection> {
        let [out_features, in_features] = self.dims;
        check::multiple(self.op, "hidden or intermediate size", out_features, 8)?;
        check::multiple(self.op, "hidden or intermediate size", in_features, 8)?;
        let mut projection = MoeProjection {
            expert0: LinearProjection {
                out,
                lora: self.module()?,
                out_features: check::to_u32(self.op, "width", out_features)?,
                ..LinearProjection::default()
            },
            lora_stride: self.lora.stride as u64,
            module_stride: self.lora.module_stride,
            ..MoeProjection::default()
        };
        match self.weights.first() {
            Some(Weight::Dense(_)) => self.dense(&mut projection)?,
            _ => self.nf4(gpu, frame, &mut projection)?,
        }
        Ok(projection)
    }

    /// Expert 0's pair as kernels take it, rank 0 without one; the last expert's must lie in the arena too.
    fn module(&self) -> Result<LoraModule> {
        let last = self.weights.len().saturating_sub(1);
        let (Some(pair), Some(of_last)) = (self.pair, self.lora.of(self.pair, last)) else {
            return Ok(LoraModule::default());
        };
        self.arena.check(self.op, &of_last, self.dims)?;
        lora::module(self.op, &pair, self.first_column)
    }

    fn dense(&self, projection: &mut MoeProjection) -> Result<()> {
        let addresses = self.weights.iter().map(|weight| match weight {
            Weight::Dense(tensor) => check::exact(self.op, tensor, DType::Bf16, &self.dims),
            Weight::Nf4(_) => Err(self.mixed()),
        });
        let (first, step) = stride(self.op, addresses)?;
        projection.expert0.dense = first;
        projection.dense_stride = step / DType::Bf16.size() as u64;
        Ok(())
    }

    fn nf4(&self, gpu: &Gpu, frame: &mut Frame<'_>, projection: &mut MoeProjection) -> Result<()> {
        let matrices = self.weights.iter().map(|weight| match weight {
            Weight::Nf4(matrix) => self.check(matrix).map(|()| matrix),
            Weight::Dense(_) => Err(self.mixed()),
        });
        let matrices = matrices.collect::<Result<Vec<_>>>()?;
        let weight = &mut projection.expert0.nf4;
        let codes = matrices.iter().map(|matrix| matrix.codes.device_address());
        (weight.codes, projection.codes_stride) = stride(self.op, codes)?;
        weight.dynamic_code = gpu.dynamic_code();
        if matches!(matrices[0].absmax, Absmax::Plain(_)) {
            let absmax = matrices.iter().map(|matrix| match &matrix.absmax {
                Absmax::Plain(absmax) => absmax.device_address(),
                Absmax::Nested { .. } => Err(self.mixed()),
            });
            let (first, step) = stride(self.op, absmax)?;
            weight.absmax = first;
            projection.absmax_stride = step / DType::F32.size() as u64;
        } else {
            let nested = matrices.iter().map(|matrix| match &matrix.absmax {
                Absmax::Nested {
                    codes,
                    nested_absmax,
                    ..
                } => Ok((codes, nested_absmax)),
                Absmax::Plain(_) => Err(self.mixed()),
            });
            let nested = nested.collect::<Result<Vec<_>>>()?;
            let codes = nested.iter().map(|(codes, _)| codes.device_address());
            (weight.nested_codes, projection.nested_codes_stride) = stride(self.op, codes)?;
            let scales = nested.iter().map(|(_, scales)| scales.device_address());
            let (first, step) = stride(self.op, scales)?;
            weight.nested_absmax = first;
            projection.nested_absmax_stride = step / DType::F32.size() as u64;
        }
        if self.dims[1].is_multiple_of(NF4_BLOCKSIZE as usize) {
            return Ok(());
        }
        self.dequantize(gpu, frame, projection)
    }

    /// Where rows do not begin with a block: all experts in bf16, as long as the op lasts.
    fn dequantize(
        &self,
        gpu: &Gpu,
        frame: &mut Frame<'_>,
        projection: &mut MoeProjection,
    ) -> Result<()> {
        let num_elements = self.dims[0] * self.dims[1];
        let num_bytes = num_elements * DType::Bf16.size();
        let out = frame.take("experts", self.weights.len() * num_bytes)?;
        let first = projection.expert0.nf4;
        let blocks = check::to_u32(self.op, "expert's size", num_elements)?;
        for expert in 0..self.weights.len() as u64 {
            let at = |base: u64, stride: u64, size: usize| match base {
                0 => 0,
                base => base + expert * stride * size as u64,
            };
            let word = DType::F32.size();
            let params = Nf4DequantizeParams {
                out: out + expert * num_bytes as u64,
                weight: Nf4Weight {
                    codes: at(first.codes, projection.codes_stride, 1),
                    absmax: at(first.absmax, projection.absmax_stride, word),
                    nested_codes: at(first.nested_codes, projection.nested_codes_stride, 1),
                    nested_absmax: at(first.nested_absmax, projection.nested_absmax_stride, word),
                    dynamic_code: first.dynamic_code,
                },
                num_elements: num_elements as u64,
            };
            let grid = Grid::line(blocks.div_ceil(NF4_ELEMENTS_PER_BLOCK));
            gpu.launch(DEQUANTIZE, grid, &params)?;
        }
        projection.expert0.nf4 = Nf4Weight::default();
        projection.expert0.dense = out;
        projection.dense_stride = num_elements as u64;
        Ok(())
    }

    fn check(&self, matrix: &Nf4Matrix) -> Result<()> {
        let found = [matrix.out_features, matrix.in_features];
        if found == self.dims {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op,
            tensor: matrix.codes.name().to_owned(),
            found: found.to_vec(),
            expected: self.dims.to_vec(),
        })
    }

    fn mixed(&self) -> Error {
        Error::Unsupported {
            what: format!("{} with experts held in different ways", self.op),
            why: "its kernel takes a layer's experts all NF4 or all bf16".to_owned(),
        }
    }
}
