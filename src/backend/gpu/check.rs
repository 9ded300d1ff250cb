//! What launchers check before a kernel is launched.

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// bf16 elements of a 16-byte access.
pub(super) const VECTOR: usize = 8;
/// Bytes of the widest access: every tensor begins at a multiple.
const ALIGNMENT: u64 = 16;

/// Rows of a tensor in device memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Address of the first.
    pub(super) address: u64,
    /// Their number: the capacity that grids are made for.
    pub(super) capacity: usize,
}

/// Elements of `tensor`, which must be `dtype`, in rows of `width`.
pub(super) fn rows(op: &'static str, tensor: &Tensor, dtype: DType, width: usize) -> Result<Rows> {
    let shape = tensor.shape();
    let capacity = shape.first().copied().unwrap_or(0);
    if shape.is_empty() || shape[1..].iter().product::<usize>() != width {
        return Err(Error::Shape {
            op,
            tensor: tensor.name().to_owned(),
            found: shape.to_vec(),
            expected: vec![capacity, width],
        });
    }
    expect_dtype(op, tensor, dtype)?;
    Ok(Rows {
        address: address(op, tensor)?,
        capacity,
    })
}

/// Address of `tensor`, which must have this shape and type.
pub(super) fn exact(
    op: &'static str,
    tensor: &Tensor,
    dtype: DType,
    shape: &[usize],
) -> Result<u64> {
    tensor.expect_shape(op, shape)?;
    expect_dtype(op, tensor, dtype)?;
    address(op, tensor)
}

fn address(op: &'static str, tensor: &Tensor) -> Result<u64> {
    let address = tensor.device_address()?;
    if address.is_multiple_of(ALIGNMENT) {
        return Ok(address);
    }
    Err(Error::Kernel {
        reason: format!(
            "{op}: `{}` lies at {address:#x}, not at a multiple of {ALIGNMENT} bytes",
            tensor.name()
        ),
    })
}

fn expect_dtype(op: &'static str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    Err(Error::DType {
        op,
        tensor: tensor.name().to_owned(),
        found: tensor.dtype().name(),
        expected: dtype.name(),
    })
}

/// Refuses an extent that is no multiple of what the kernel's accesses need.
pub(super) fn multiple(op: &'static str, what: &str, value: usize, of: usize) -> Result<()> {
    if value.is_multiple_of(of) {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("{op} with {what} {value}"),
        why: format!("its kernel takes multiples of {of}; use `device: cpu`"),
    })
}

/// `value` as kernels take extents.
pub(super) fn to_u32(op: &'static str, what: &str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::Unsupported {
        what: format!("{op} with {what} {value}"),
        why: "kernels take extents below 2^32".to_owned(),
    })
}

/// Address of `tensor`, which must be `capacity` rows of `width` `dtype`.
pub(super) fn rows_of(
    op: &'static str,
    tensor: &Tensor,
    dtype: DType,
    [capacity, width]: [usize; 2],
) -> Result<u64> {
    let rows = rows(op, tensor, dtype, width)?;
    if rows.capacity == capacity {
        return Ok(rows.address);
    }
    Err(Error::Shape {
        op,
        tensor: tensor.name().to_owned(),
        found: tensor.shape().to_vec(),
        expected: vec![capacity, width],
    })
}
