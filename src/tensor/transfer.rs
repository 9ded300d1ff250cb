//! Elements in and out of a tensor, wherever it lies.

use std::borrow::Cow;

use half::{bf16, f16};

use super::{DType, Storage, Tensor};
use crate::error::{Error, Result};

/// The address of what has no memory, on which no kernel is launched. Not 0, which kernels take for absent.
pub const PLANNED_ADDRESS: u64 = 256;

impl Tensor {
    /// Whether the elements lie in a device's memory.
    pub fn is_on_device(&self) -> bool {
        matches!(self.storage, Storage::Device { .. })
    }

    /// Whether there are no elements, only their number.
    pub fn is_planned(&self) -> bool {
        matches!(self.storage, Storage::Planned)
    }

    /// Part of a device's memory that this tensor lies in, from `offset` bytes into it, as a tensor of its own; `None` where it lies
    /// elsewhere or the part leaves it.
    pub fn part(&self, name: &str, shape: &[usize], dtype: DType, offset: usize) -> Option<Self> {
        let end = offset.checked_add(shape.iter().product::<usize>() * dtype.size())?;
        let Storage::Device {
            memory,
            offset: begin,
        } = &self.storage
        else {
            return None;
        };
        if end > self.num_bytes() {
            return None;
        }
        Self::on_device(name, shape, dtype, memory, begin + offset)
    }

    /// Where the elements begin in the device's memory; [`PLANNED_ADDRESS`] for a planned tensor.
    ///
    /// # Errors
    /// [`Error::DType`] if they lie on the host.
    pub fn device_address(&self) -> Result<u64> {
        match &self.storage {
            Storage::Device { memory, offset } => Ok(memory.address() + *offset as u64),
            Storage::Planned => Ok(PLANNED_ADDRESS),
            Storage::F32(_)
            | Storage::Bf16(_)
            | Storage::U8(_)
            | Storage::U32(_)
            | Storage::I32(_)
            | Storage::Mapped { .. } => Err(Error::DType {
                op: "tensor",
                tensor: self.name.clone(),
                found: "host memory",
                expected: "device memory",
            }),
        }
    }

    /// The elements' bytes; a copy of those on a device.
    ///
    /// # Errors
    /// [`Error::DType`] for a planned tensor; those of the device.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        match &self.storage {
            Storage::F32(values) => Ok(Cow::Borrowed(bytemuck::cast_slice(values))),
            Storage::Bf16(values) => Ok(Cow::Borrowed(bytemuck::cast_slice(values))),
            Storage::U8(values) => Ok(Cow::Borrowed(values)),
            Storage::U32(values) => Ok(Cow::Borrowed(bytemuck::cast_slice(values))),
            Storage::I32(values) => Ok(Cow::Borrowed(bytemuck::cast_slice(values))),
            Storage::Mapped { .. } => Ok(Cow::Borrowed(self.mapped_bytes())),
            Storage::Device { memory, offset } => {
                let mut bytes = vec![0; self.num_bytes()];
                memory.read(*offset, &mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
            Storage::Planned => Err(self.mismatch(self.dtype)),
        }
    }

    /// The leading `count` floating-point elements, widened to f32.
    ///
    /// # Errors
    /// [`Error::DType`] if the tensor is not floating point or planned; those of the device.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn leading_f32(&self, count: usize) -> Result<Vec<f32>> {
        let Storage::Device { memory, offset } = &self.storage else {
            let mut out = vec![0.0; count];
            self.widen(0..count, &mut out)?;
            return Ok(out);
        };
        assert!(count <= self.len(), "{} has {}", self.name, self.len());
        let mut bytes = vec![0; count * self.dtype.size()];
        memory.read(*offset, &mut bytes)?;
        let pairs = || {
            bytes
                .chunks_exact(2)
                .map(|pair| u16::from_ne_bytes([pair[0], pair[1]]))
        };
        match self.dtype {
            DType::F32 => Ok(quads(&bytes).map(f32::from_bits).collect()),
            DType::Bf16 => Ok(pairs().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
            DType::F16 => Ok(pairs().map(|bits| f16::from_bits(bits).to_f32()).collect()),
            DType::U8 | DType::U32 | DType::I32 => Err(self.mismatch(DType::F32)),
        }
    }

    /// All floating-point elements, widened to f32.
    ///
    /// # Errors
    /// As [`Self::leading_f32`].
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        self.leading_f32(self.len())
    }

    /// All elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `u32`, or planned; those of the device.
    pub fn to_u32_vec(&self) -> Result<Vec<u32>> {
        if self.dtype != DType::U32 {
            return Err(self.mismatch(DType::U32));
        }
        Ok(quads(&self.bytes()?).collect())
    }

    /// Sets all elements, rounded where the tensor is bf16.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is another; [`Error::DType`] if the tensor is neither owned nor on a device, or not
    /// floating point; those of the device.
    pub fn write_f32(&mut self, values: &[f32]) -> Result<()> {
        if values.len() != self.len() {
            return Err(Error::Shape {
                op: "write",
                tensor: self.name.clone(),
                found: vec![values.len()],
                expected: self.shape.clone(),
            });
        }
        self.write_f32_at(0, values)
    }

    /// Sets the elements from `start` on, rounded where the tensor is bf16.
    ///
    /// # Errors
    /// [`Error::Shape`] if they leave the tensor; else as [`Self::write_f32`].
    pub fn write_f32_at(&mut self, start: usize, values: &[f32]) -> Result<()> {
        let end = start + values.len();
        if end > self.len() {
            return Err(Error::Shape {
                op: "write",
                tensor: self.name.clone(),
                found: vec![end],
                expected: self.shape.clone(),
            });
        }
        match (&mut self.storage, self.dtype) {
            (Storage::F32(own), _) => own[start..end].copy_from_slice(values),
            (Storage::Bf16(own), _) => {
                for (own, value) in own[start..end].iter_mut().zip(values) {
                    *own = bf16::from_f32(*value);
                }
            }
            (Storage::Device { memory, offset }, DType::F32) => {
                memory.write(*offset + 4 * start, bytemuck::cast_slice(values))?;
            }
            (Storage::Device { memory, offset }, DType::Bf16) => {
                let values: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                memory.write(*offset + 2 * start, bytemuck::cast_slice(&values))?;
            }
            _ => return Err(self.mismatch(DType::F32)),
        }
        Ok(())
    }

    /// Sets the bytes of all elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are of another number, or the tensor is not on a device or owned; those of the device.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.num_bytes() {
            return Err(self.mismatch(self.dtype));
        }
        match &mut self.storage {
            Storage::F32(own) => bytemuck::cast_slice_mut(own).copy_from_slice(bytes),
            Storage::Bf16(own) => bytemuck::cast_slice_mut(own).copy_from_slice(bytes),
            Storage::U8(own) => own.copy_from_slice(bytes),
            Storage::U32(own) => bytemuck::cast_slice_mut(own).copy_from_slice(bytes),
            Storage::I32(own) => bytemuck::cast_slice_mut(own).copy_from_slice(bytes),
            Storage::Device { memory, offset } => memory.write(*offset, bytes)?,
            Storage::Mapped { .. } | Storage::Planned => return Err(self.mismatch(self.dtype)),
        }
        Ok(())
    }

    /// Sets all elements to zero; nothing for a planned tensor.
    ///
    /// # Errors
    /// [`Error::DType`] for a mapped tensor; those of the device.
    pub fn zero(&mut self) -> Result<()> {
        let num_bytes = self.num_bytes();
        match &mut self.storage {
            Storage::F32(own) => own.fill(0.0),
            Storage::Bf16(own) => own.fill(bf16::ZERO),
            Storage::U8(own) => own.fill(0),
            Storage::U32(own) => own.fill(0),
            Storage::I32(own) => own.fill(0),
            Storage::Device { memory, offset } => {
                memory.zero(*offset, num_bytes)?;
            }
            Storage::Planned => {}
            Storage::Mapped { .. } => return Err(self.mismatch(self.dtype)),
        }
        Ok(())
    }
}

/// Four bytes at a time, as the host orders them.
fn quads(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes
        .chunks_exact(4)
        .map(|quad| u32::from_ne_bytes([quad[0], quad[1], quad[2], quad[3]]))
}
