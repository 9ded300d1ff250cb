//! Host tensors and weights to device memory, once, at load.

use std::sync::Arc;

use half::bf16;

use super::driver::Driver;
use crate::error::{Error, Result};
use crate::store::Weight;
use crate::store::checkpoint::release;
use crate::store::nf4::{Absmax, Nf4Matrix};
use crate::tensor::device::DeviceMemory;
use crate::tensor::{DType, Tensor};

/// Matrices of one layer's experts begin at multiples of this.
const ALIGNMENT: usize = 16;
/// Elements converted at a time.
const CHUNK: usize = 1 << 20;

/// Memory for a tensor.
pub(super) fn alloc(
    driver: &dyn Driver,
    name: &str,
    shape: &[usize],
    dtype: DType,
) -> Result<Tensor> {
    let memory = driver.alloc(name, shape.iter().product::<usize>() * dtype.size())?;
    on(&memory, name, shape, dtype, 0)
}

/// The same elements on the device.
pub(super) fn tensor(driver: &dyn Driver, tensor: &Tensor) -> Result<Tensor> {
    let mut placed = alloc(driver, tensor.name(), tensor.shape(), tensor.dtype())?;
    if !tensor.is_planned() {
        placed.write_bytes(&tensor.bytes()?)?;
    }
    Ok(placed)
}

/// One weight; see [`weights`].
pub(super) fn weight(driver: &dyn Driver, weight: &Weight) -> Result<Weight> {
    let mut placed = weights(driver, std::slice::from_ref(weight))?;
    placed.pop().ok_or_else(|| unequal("nothing"))
}

/// Weights of one shape and kind, one after the other at equal steps: dense ones as bf16, NF4 ones with their codes as they
/// are and, where scales are nested, each nested scale followed by the offset.
pub(super) fn weights(driver: &dyn Driver, weights: &[Weight]) -> Result<Vec<Weight>> {
    match weights.first() {
        None => Ok(Vec::new()),
        Some(Weight::Dense(_)) => {
            let tensors = weights.iter().map(|weight| match weight {
                Weight::Dense(tensor) => Ok(tensor),
                Weight::Nf4(matrix) => Err(unequal(matrix.codes.name())),
            });
            dense(driver, &tensors.collect::<Result<Vec<_>>>()?)
        }
        Some(Weight::Nf4(_)) => {
            let matrices = weights.iter().map(|weight| match weight {
                Weight::Nf4(matrix) => Ok(matrix),
                Weight::Dense(tensor) => Err(unequal(tensor.name())),
            });
            nf4(driver, &matrices.collect::<Result<Vec<_>>>()?)
        }
    }
}

fn dense(driver: &dyn Driver, tensors: &[&Tensor]) -> Result<Vec<Weight>> {
    let shape = tensors[0].shape();
    let len = tensors[0].len();
    let stride = (len * DType::Bf16.size()).next_multiple_of(ALIGNMENT);
    let memory = driver.alloc(tensors[0].name(), stride * tensors.len())?;
    let mut placed = Vec::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        tensor.expect_shape("place", shape)?;
        let offset = index * stride;
        if tensor.is_planned() {
            // A place, and nothing to put there.
        } else if tensor.dtype() == DType::Bf16 {
            memory.write(offset, &tensor.bytes()?)?;
        } else {
            let mut wide = vec![0.0; CHUNK.min(len)];
            for start in (0..len).step_by(CHUNK) {
                let wide = &mut wide[..CHUNK.min(len - start)];
                tensor.widen(start..start + wide.len(), wide)?;
                let narrow: Vec<bf16> = wide.iter().map(|value| bf16::from_f32(*value)).collect();
                let at = offset + start * DType::Bf16.size();
                memory.write(at, bytemuck::cast_slice(&narrow))?;
            }
        }
        release(tensor);
        let tensor = on(&memory, tensor.name(), shape, DType::Bf16, offset)?;
        placed.push(Weight::Dense(tensor));
    }
    Ok(placed)
}

fn nf4(driver: &dyn Driver, matrices: &[&Nf4Matrix]) -> Result<Vec<Weight>> {
    let codes = matrices.iter().map(|matrix| Part::of(&matrix.codes));
    let codes = stack(driver, &codes.collect::<Result<Vec<_>>>()?)?;
    let absmax = absmax(driver, matrices)?;
    let placed = matrices.iter().zip(codes).zip(absmax);
    let placed = placed.map(|((matrix, codes), absmax)| {
        Weight::Nf4(Nf4Matrix {
            out_features: matrix.out_features,
            in_features: matrix.in_features,
            codes,
            absmax,
        })
    });
    Ok(placed.collect())
}

fn absmax(driver: &dyn Driver, matrices: &[&Nf4Matrix]) -> Result<Vec<Absmax>> {
    let (mut plain, mut nested_codes, mut pairs, mut offsets) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for matrix in matrices {
        match &matrix.absmax {
            Absmax::Plain(absmax) => {
                plain.push(Part::of(absmax)?);
            }
            Absmax::Nested {
                codes,
                nested_absmax,
                offset,
            } => {
                nested_codes.push(Part::of(codes)?);
                let mut scales = Part::of(nested_absmax)?;
                scales.num_bytes *= 2;
                scales.bytes = scales
                    .bytes
                    .map(|_| with_offset(nested_absmax, *offset))
                    .transpose()?;
                pairs.push(scales);
                offsets.push(*offset);
            }
        }
    }
    if plain.len() == matrices.len() {
        return Ok(stack(driver, &plain)?
            .into_iter()
            .map(Absmax::Plain)
            .collect());
    }
    if !plain.is_empty() {
        return Err(unequal(plain[0].name));
    }
    let placed = stack(driver, &nested_codes)?
        .into_iter()
        .zip(stack(driver, &pairs)?)
        .zip(offsets);
    let placed = placed.map(|((codes, nested_absmax), offset)| Absmax::Nested {
        codes,
        nested_absmax,
        offset,
    });
    Ok(placed.collect())
}

/// A tensor of one dimension to be placed beside others; without bytes where it is only planned.
struct Part<'a> {
    name: &'a str,
    dtype: DType,
    num_bytes: usize,
    bytes: Option<Vec<u8>>,
}

impl<'a> Part<'a> {
    fn of(tensor: &'a Tensor) -> Result<Self> {
        let bytes = if tensor.is_planned() {
            None
        } else {
            Some(tensor.bytes()?.into_owned())
        };
        Ok(Self {
            name: tensor.name(),
            dtype: tensor.dtype(),
            num_bytes: tensor.num_bytes(),
            bytes,
        })
    }
}

/// Each scale followed by the offset.
fn with_offset(scales: &Tensor, offset: f32) -> Result<Vec<u8>> {
    let scales = scales.to_f32_vec()?;
    let pairs: Vec<f32> = scales.iter().flat_map(|scale| [*scale, offset]).collect();
    Ok(bytemuck::cast_slice(&pairs).to_vec())
}

/// Parts of equal length, one after the other.
fn stack(driver: &dyn Driver, parts: &[Part<'_>]) -> Result<Vec<Tensor>> {
    let first = &parts[0];
    let stride = first.num_bytes.next_multiple_of(ALIGNMENT);
    let memory = driver.alloc(first.name, stride * parts.len())?;
    let place = |(index, part): (usize, &Part<'_>)| {
        if part.num_bytes != first.num_bytes {
            return Err(unequal(part.name));
        }
        if let Some(bytes) = &part.bytes {
            memory.write(index * stride, bytes)?;
        }
        let len = part.num_bytes / part.dtype.size();
        on(&memory, part.name, &[len], part.dtype, index * stride)
    };
    parts.iter().enumerate().map(place).collect()
}

fn on(
    memory: &Arc<dyn DeviceMemory>,
    name: &str,
    shape: &[usize],
    dtype: DType,
    offset: usize,
) -> Result<Tensor> {
    Tensor::on_device(name, shape, dtype, memory, offset).ok_or_else(|| Error::Shape {
        op: "place",
        tensor: name.to_owned(),
        found: vec![memory.num_bytes()],
        expected: shape.to_vec(),
    })
}

fn unequal(name: &str) -> Error {
    Error::Unsupported {
        what: format!("`{name}` held in another way than the other experts of its layer"),
        why: "the kernels take a layer's experts together, all of one shape, all NF4 or none"
            .to_owned(),
    }
}
