//! Tensors: a name, a shape, an element type, and storage that only accessors see.
//!
//! Row-major, contiguous. Knows no operation and no file format.

pub mod arena;
pub mod device;
mod transfer;

pub use transfer::PLANNED_ADDRESS;

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

use self::device::DeviceMemory;
use crate::error::{Error, Result};

/// Element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// Unsigned byte.
    U8,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 32-bit integer.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::U8 => 1,
        }
    }

    /// Name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::I32 => "i32",
        }
    }
}

/// A dense, row-major array.
#[derive(Debug, Clone)]
pub struct Tensor {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    storage: Storage,
}

#[derive(Debug, Clone)]
enum Storage {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    U8(Vec<u8>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    /// Bytes of a file, read in place.
    Mapped {
        map: Arc<Mmap>,
        bytes: Range<usize>,
    },
    /// In a device's memory, from `offset` on; clones share it.
    Device {
        memory: Arc<dyn DeviceMemory>,
        offset: usize,
    },
    /// Counted, not allocated.
    Planned,
}

impl Tensor {
    /// Zeros.
    ///
    /// # Panics
    /// For f16, which the host only ever reads from files.
    pub fn zeros(name: impl Into<String>, shape: &[usize], dtype: DType) -> Self {
        let len = shape.iter().product();
        let storage = match dtype {
            DType::F32 => Storage::F32(vec![0.0; len]),
            DType::U8 => Storage::U8(vec![0; len]),
            DType::U32 => Storage::U32(vec![0; len]),
            DType::I32 => Storage::I32(vec![0; len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::ZERO; len]),
            DType::F16 => unreachable!("f16 is not allocated on the host"),
        };
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
            storage,
        }
    }

    /// A tensor that has a size but no memory; any access is an error.
    pub fn planned(name: impl Into<String>, shape: &[usize], dtype: DType) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
            storage: Storage::Planned,
        }
    }

    /// Elements in a device's `memory`, from byte `offset` on; `None` if they do not fit.
    pub fn on_device(
        name: impl Into<String>,
        shape: &[usize],
        dtype: DType,
        memory: &Arc<dyn DeviceMemory>,
        offset: usize,
    ) -> Option<Self> {
        let num_bytes = shape.iter().product::<usize>() * dtype.size();
        if offset.checked_add(num_bytes)? > memory.num_bytes() {
            return None;
        }
        let storage = Storage::Device {
            memory: Arc::clone(memory),
            offset,
        };
        Some(Self {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
            storage,
        })
    }

    /// Takes over `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: Vec<f32>) -> Result<Self> {
        Self::owned(
            name.into(),
            shape,
            DType::F32,
            values.len(),
            Storage::F32(values),
        )
    }

    /// Takes over `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn from_u8(name: impl Into<String>, shape: &[usize], values: Vec<u8>) -> Result<Self> {
        Self::owned(
            name.into(),
            shape,
            DType::U8,
            values.len(),
            Storage::U8(values),
        )
    }

    /// Takes over `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn from_u32(name: impl Into<String>, shape: &[usize], values: Vec<u32>) -> Result<Self> {
        Self::owned(
            name.into(),
            shape,
            DType::U32,
            values.len(),
            Storage::U32(values),
        )
    }

    /// Takes over `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn from_i32(name: impl Into<String>, shape: &[usize], values: Vec<i32>) -> Result<Self> {
        Self::owned(
            name.into(),
            shape,
            DType::I32,
            values.len(),
            Storage::I32(values),
        )
    }

    fn owned(
        name: String,
        shape: &[usize],
        dtype: DType,
        found: usize,
        storage: Storage,
    ) -> Result<Self> {
        if shape.iter().product::<usize>() != found {
            let (found, expected) = (vec![found], shape.to_vec());
            return Err(Error::Shape {
                op: "tensor",
                tensor: name,
                found,
                expected,
            });
        }
        Ok(Self {
            name,
            shape: shape.to_vec(),
            dtype,
            storage,
        })
    }

    /// `bytes` of `map`, read in place; `None` if they are misaligned for `dtype` (then copy with [`Self::from_f32`]).
    ///
    /// The caller has checked that the range lies in the map and has the length that `shape` and `dtype` need.
    pub fn mapped(
        name: impl Into<String>,
        shape: &[usize],
        dtype: DType,
        map: &Arc<Mmap>,
        bytes: Range<usize>,
    ) -> Option<Self> {
        if !(map.as_ptr().addr() + bytes.start).is_multiple_of(dtype.size()) {
            return None;
        }
        let storage = Storage::Mapped {
            map: Arc::clone(map),
            bytes,
        };
        Some(Self {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
            storage,
        })
    }

    /// Name, for messages and the memory ledger.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    pub fn num_bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Extent of the last dimension (1 for a scalar).
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshaped(mut self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.len() {
            let (found, expected) = (self.shape, shape.to_vec());
            return Err(Error::Shape {
                op: "reshape",
                tensor: self.name,
                found,
                expected,
            });
        }
        self.shape = shape.to_vec();
        Ok(self)
    }

    /// Part of a mapped tensor along its outermost dimension, without a copy (a copy for owned `f32`).
    ///
    /// # Errors
    /// [`Error::Shape`] if the range leaves the tensor; [`Error::DType`] for owned tensors that are not `f32`.
    pub fn outer(&self, name: impl Into<String>, range: Range<usize>) -> Result<Self> {
        let mut shape = self.shape.clone();
        if shape.is_empty() || range.start > range.end || range.end > shape[0] {
            let (found, expected) = (shape, vec![range.end]);
            return Err(Error::Shape {
                op: "outer",
                tensor: self.name.clone(),
                found,
                expected,
            });
        }
        let inner = shape[1..].iter().product::<usize>();
        shape[0] = range.len();
        let storage = match &self.storage {
            Storage::Mapped { map, bytes } => {
                let step = inner * self.dtype.size();
                let start = bytes.start + range.start * step;
                let bytes = start..bytes.start + range.end * step;
                Storage::Mapped {
                    map: Arc::clone(map),
                    bytes,
                }
            }
            Storage::F32(values) => {
                Storage::F32(values[range.start * inner..range.end * inner].to_vec())
            }
            Storage::Device { memory, offset } => Storage::Device {
                memory: Arc::clone(memory),
                offset: offset + range.start * inner * self.dtype.size(),
            },
            Storage::Planned => Storage::Planned,
            Storage::Bf16(_) | Storage::U8(_) | Storage::U32(_) | Storage::I32(_) => {
                return Err(self.mismatch(DType::F32));
            }
        };
        Ok(Self {
            name: name.into(),
            shape,
            dtype: self.dtype,
            storage,
        })
    }

    /// Elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `f32` in host memory.
    pub fn f32(&self) -> Result<&[f32]> {
        match &self.storage {
            Storage::F32(values) => Ok(values),
            Storage::Mapped { .. } if self.dtype == DType::F32 => {
                Ok(bytemuck::cast_slice(self.mapped_bytes()))
            }
            Storage::Bf16(_)
            | Storage::U8(_)
            | Storage::U32(_)
            | Storage::I32(_)
            | Storage::Mapped { .. }
            | Storage::Device { .. }
            | Storage::Planned => Err(self.mismatch(DType::F32)),
        }
    }

    /// Elements, to be written.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not owned `f32` in host memory.
    pub fn f32_mut(&mut self) -> Result<&mut [f32]> {
        if let Storage::F32(values) = &mut self.storage {
            return Ok(values);
        }
        Err(Error::DType {
            op: "tensor",
            tensor: self.name.clone(),
            found: self.dtype.name(),
            expected: "owned f32",
        })
    }

    /// Elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `u8` in host memory.
    pub fn u8(&self) -> Result<&[u8]> {
        match &self.storage {
            Storage::U8(values) => Ok(values),
            Storage::Mapped { .. } if self.dtype == DType::U8 => Ok(self.mapped_bytes()),
            Storage::F32(_)
            | Storage::Bf16(_)
            | Storage::U32(_)
            | Storage::I32(_)
            | Storage::Mapped { .. }
            | Storage::Device { .. }
            | Storage::Planned => Err(self.mismatch(DType::U8)),
        }
    }

    /// Elements, to be written.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not owned `u8` in host memory.
    pub fn u8_mut(&mut self) -> Result<&mut [u8]> {
        if let Storage::U8(values) = &mut self.storage {
            return Ok(values);
        }
        Err(Error::DType {
            op: "tensor",
            tensor: self.name.clone(),
            found: self.dtype.name(),
            expected: "owned u8",
        })
    }

    /// Elements, to be written.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not owned `bf16` in host memory.
    pub fn bf16_mut(&mut self) -> Result<&mut [bf16]> {
        if let Storage::Bf16(values) = &mut self.storage {
            return Ok(values);
        }
        Err(Error::DType {
            op: "tensor",
            tensor: self.name.clone(),
            found: self.dtype.name(),
            expected: "owned bf16",
        })
    }

    /// Elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `u32` in host memory.
    pub fn u32(&self) -> Result<&[u32]> {
        let Storage::U32(values) = &self.storage else {
            return Err(self.mismatch(DType::U32));
        };
        Ok(values)
    }

    /// Elements, to be written.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `u32` in host memory.
    pub fn u32_mut(&mut self) -> Result<&mut [u32]> {
        if let Storage::U32(values) = &mut self.storage {
            return Ok(values);
        }
        Err(Error::DType {
            op: "tensor",
            tensor: self.name.clone(),
            found: self.dtype.name(),
            expected: "u32",
        })
    }

    /// Elements.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `i32` in host memory.
    pub fn i32(&self) -> Result<&[i32]> {
        let Storage::I32(values) = &self.storage else {
            return Err(self.mismatch(DType::I32));
        };
        Ok(values)
    }

    /// Floating-point elements `range` widened to `f32` into `out`.
    ///
    /// # Errors
    /// [`Error::DType`] if the tensor is not floating point in host memory.
    ///
    /// # Panics
    /// If the range leaves the tensor or `out` has another length.
    pub fn widen(&self, range: Range<usize>, out: &mut [f32]) -> Result<()> {
        match (&self.storage, self.dtype) {
            (Storage::F32(values), _) => out.copy_from_slice(&values[range]),
            (Storage::Bf16(values), _) => {
                for (out, value) in out.iter_mut().zip(&values[range]) {
                    *out = value.to_f32();
                }
            }
            (Storage::Mapped { .. }, DType::F32) => {
                out.copy_from_slice(&bytemuck::cast_slice::<u8, f32>(self.mapped_bytes())[range]);
            }
            (Storage::Mapped { .. }, DType::Bf16) => {
                let source = &bytemuck::cast_slice::<u8, bf16>(self.mapped_bytes())[range];
                for (out, value) in out.iter_mut().zip(source) {
                    *out = value.to_f32();
                }
            }
            (Storage::Mapped { .. }, DType::F16) => {
                let source = &bytemuck::cast_slice::<u8, f16>(self.mapped_bytes())[range];
                for (out, value) in out.iter_mut().zip(source) {
                    *out = value.to_f32();
                }
            }
            _ => return Err(self.mismatch(DType::F32)),
        }
        Ok(())
    }

    /// Checks the shape on behalf of `op`.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is another.
    pub fn expect_shape(&self, op: &'static str, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        let (found, expected) = (self.shape.clone(), expected.to_vec());
        Err(Error::Shape {
            op,
            tensor: self.name.clone(),
            found,
            expected,
        })
    }

    /// The map and the byte range in it, of a mapped tensor.
    pub fn mapping(&self) -> Option<(&Mmap, Range<usize>)> {
        match &self.storage {
            Storage::Mapped { map, bytes } => Some((map, bytes.clone())),
            Storage::F32(_)
            | Storage::Bf16(_)
            | Storage::U8(_)
            | Storage::U32(_)
            | Storage::I32(_)
            | Storage::Device { .. }
            | Storage::Planned => None,
        }
    }

    fn mapped_bytes(&self) -> &[u8] {
        let Storage::Mapped { map, bytes } = &self.storage else {
            return &[];
        };
        &map[bytes.clone()]
    }

    fn mismatch(&self, expected: DType) -> Error {
        let found = if matches!(self.storage, Storage::Planned) {
            "planned (no memory)"
        } else {
            self.dtype.name()
        };
        let (op, tensor) = ("tensor", self.name.clone());
        Error::DType {
            op,
            tensor,
            found,
            expected: expected.name(),
        }
    }
}
