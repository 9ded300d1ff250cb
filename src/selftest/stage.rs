//! What a case works with: inputs on the device under test, results back from it.

use std::cell::RefCell;
use std::rc::Rc;

use crate::data::{Batch, IGNORE_INDEX};
use crate::error::{Error, Result};
use crate::ops::{Ops, StepState};
use crate::random::{Draws, Stream};
use crate::store::Weight;
use crate::store::nf4::Nf4Matrix;
use crate::tensor::arena::Arena;
use crate::tensor::{DType, Tensor};

/// Bytes before and after each tensor that nothing may write; keeps the alignment that devices give.
const GUARD_BYTES: usize = 256;
const GUARD_BYTE: u8 = 0xa5;

/// A device with a case on it.
#[derive(Debug)]
pub struct Stage<'a> {
    /// The device.
    pub ops: &'a dyn Ops,
    /// Each tensor between its guard bands, if they are laid here.
    guarded: Option<Rc<RefCell<Vec<Tensor>>>>,
}

/// `len` values drawn from a normal distribution, each one a bf16 number, so that placing them rounds nothing.
pub(super) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut draws = Draws::new(seed, Stream::Synthetic, 1);
    let value = |_| half::bf16::from_f32(draws.next_normal()).to_f32();
    (0..len).map(value).collect()
}

/// [`values`] times a power of two.
pub(super) fn scaled(len: usize, seed: u64, scale: f32) -> Vec<f32> {
    values(len, seed)
        .iter()
        .map(|value| value * scale)
        .collect()
}

/// A step of sequences of these lengths; every third position has no target, nor has a sequence's last. No dropout.
pub(super) fn state(lengths: &[usize], vocab_size: u32, seed: u64) -> StepState {
    let mut draws = Draws::new(seed, Stream::Synthetic, 2);
    let mut batch = Batch {
        cu_seqlens: vec![0],
        ..Batch::default()
    };
    for length in lengths {
        for position in 0..*length {
            let has_target = position + 1 < *length && position % 3 != 1;
            let target = draws.next_u32() % vocab_size;
            batch.input_ids.push(draws.next_u32() % vocab_size);
            batch
                .position_ids
                .push(u32::try_from(position).unwrap_or(u32::MAX));
            batch.target_ids.push(if has_target {
                target.cast_signed()
            } else {
                IGNORE_INDEX
            });
        }
        let end = u32::try_from(batch.input_ids.len()).unwrap_or(u32::MAX);
        batch.cu_seqlens.push(end);
    }
    StepState {
        batch,
        loss_scale: 0.125,
        dropout: None,
    }
}

impl<'a> Stage<'a> {
    /// A case on `ops`, which watches over its memory itself.
    pub fn new(ops: &'a dyn Ops) -> Self {
        Self { ops, guarded: None }
    }

    /// A case on `ops`, with guard bands around every tensor in a device's memory.
    pub fn guarded(ops: &'a dyn Ops) -> Self {
        Self {
            ops,
            guarded: Some(Rc::default()),
        }
    }

    /// Hands out the device's memory, between guard bands where they are laid here.
    ///
    /// # Errors
    /// Those of the device.
    pub fn arena(&self) -> Result<Arena> {
        let arena = self.ops.arena(&Arena::plan())?;
        let Some(guarded) = &self.guarded else {
            return Ok(arena);
        };
        let (guarded, inner) = (Rc::clone(guarded), RefCell::new(arena));
        Ok(Arena::new(Box::new(move |name, shape, dtype| {
            let num_bytes = shape.iter().product::<usize>() * dtype.size();
            let whole = [num_bytes + 2 * GUARD_BYTES];
            let mut whole = inner.borrow_mut().alloc(name, &whole, DType::U8)?;
            let Some(tensor) = whole.part(name, shape, dtype, GUARD_BYTES) else {
                return inner.borrow_mut().alloc(name, shape, dtype);
            };
            whole.write_bytes(&vec![GUARD_BYTE; whole.num_bytes()])?;
            guarded.borrow_mut().push(whole);
            Ok(tensor)
        })))
    }

    /// Tensors whose guard bands were looked at, all intact.
    ///
    /// # Errors
    /// [`Error::Kernel`] naming a tensor that was written outside; those of the device.
    pub fn check_guards(&self) -> Result<usize> {
        let Some(guarded) = &self.guarded else {
            return Ok(0);
        };
        for whole in guarded.borrow().iter() {
            let bytes = whole.bytes()?;
            let (before, rest) = bytes.split_at(GUARD_BYTES);
            let after = &rest[rest.len() - GUARD_BYTES..];
            for (band, place) in [(before, "before"), (after, "after")] {
                if band.iter().any(|byte| *byte != GUARD_BYTE) {
                    return Err(Error::Kernel {
                        reason: format!("memory {place} `{}` was written", whole.name()),
                    });
                }
            }
        }
        Ok(guarded.borrow().len())
    }

    /// Makes `state` the step that ops work on.
    ///
    /// # Errors
    /// Those of the device.
    pub fn load(&self, state: &StepState) -> Result<()> {
        self.ops.load_batch(state)
    }

    fn filled(&self, name: &str, shape: &[usize], dtype: DType, values: &[f32]) -> Result<Tensor> {
        let mut tensor = self.arena()?.alloc(name, shape, dtype)?;
        tensor.write_f32(values)?;
        Ok(tensor)
    }

    /// An activation with these values.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn activation(&self, name: &str, shape: &[usize], values: &[f32]) -> Result<Tensor> {
        self.filled(name, shape, self.ops.activation_dtype(), values)
    }

    /// An activation of `capacity` rows whose first rows have these values; the rest is NaN.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not fit.
    pub fn rows(
        &self,
        name: &str,
        [capacity, width]: [usize; 2],
        values: &[f32],
    ) -> Result<Tensor> {
        let padded = padded(values, capacity * width);
        self.activation(name, &[capacity, width], &padded)
    }

    /// [`Self::rows`] in f32.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not fit.
    pub fn rows_f32(
        &self,
        name: &str,
        [capacity, width]: [usize; 2],
        values: &[f32],
    ) -> Result<Tensor> {
        let padded = padded(values, capacity * width);
        self.f32(name, &[capacity, width], &padded)
    }

    /// An f32 tensor with these values.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn f32(&self, name: &str, shape: &[usize], values: &[f32]) -> Result<Tensor> {
        self.filled(name, shape, DType::F32, values)
    }

    /// A u32 tensor with these values.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn u32(&self, name: &str, shape: &[usize], values: &[u32]) -> Result<Tensor> {
        let values = Tensor::from_u32(name, shape, values.to_vec())?;
        let mut tensor = self.arena()?.alloc(name, shape, DType::U32)?;
        tensor.write_bytes(&values.bytes()?)?;
        Ok(tensor)
    }

    /// A weight as stored.
    ///
    /// # Errors
    /// [`Error::Shape`] if their number is not that of `shape`.
    pub fn dense(&self, name: &str, shape: [usize; 2], values: &[f32]) -> Result<Weight> {
        let tensor = Tensor::from_f32(name, &shape, values.to_vec())?;
        self.ops.place_weight(Weight::Dense(tensor))
    }

    /// A weight in NF4; `nf4_values` are what it stands for.
    ///
    /// # Errors
    /// Those of the quantisation.
    pub fn nf4(
        &self,
        name: &str,
        shape: [usize; 2],
        values: &[f32],
        double_quant: bool,
    ) -> Result<Weight> {
        let matrix = Nf4Matrix::quantize(name, values, shape, double_quant)?;
        self.ops.place_weight(Weight::Nf4(matrix))
    }

    /// An activation that the op is to write: NaN until then.
    ///
    /// # Errors
    /// Those of the device.
    pub fn out(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let nans = vec![f32::NAN; shape.iter().product()];
        self.activation(name, shape, &nans)
    }

    /// An f32 tensor that the op is to write: NaN until then.
    ///
    /// # Errors
    /// Those of the device.
    pub fn out_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let nans = vec![f32::NAN; shape.iter().product()];
        self.f32(name, shape, &nans)
    }

    /// A u32 tensor that the op is to write.
    ///
    /// # Errors
    /// Those of the device.
    pub fn out_u32(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.u32(name, shape, &vec![u32::MAX; shape.iter().product()])
    }

    /// All elements.
    ///
    /// # Errors
    /// Those of the device.
    pub fn read(&self, tensor: &Tensor) -> Result<Vec<f64>> {
        Ok(tensor.to_f32_vec()?.into_iter().map(f64::from).collect())
    }

    /// The leading `rows` rows; those after must be as [`Self::rows`] and [`Self::out`] left them.
    ///
    /// # Errors
    /// [`Error::Kernel`] if a row after them was written; those of the device.
    pub fn read_rows(&self, tensor: &Tensor, rows: usize) -> Result<Vec<f64>> {
        let mut all = self.read(tensor)?;
        let width = tensor.len() / tensor.shape().first().copied().unwrap_or(1).max(1);
        let surplus = all.split_off(rows * width);
        if surplus.iter().any(|value| !value.is_nan()) {
            return Err(Error::Kernel {
                reason: format!("`{}` was written past row {rows}", tensor.name()),
            });
        }
        Ok(all)
    }

    /// The leading `count` integers.
    ///
    /// # Errors
    /// Those of the device.
    pub fn read_u32(&self, tensor: &Tensor, count: usize) -> Result<Vec<u32>> {
        let mut all = tensor.to_u32_vec()?;
        all.truncate(count);
        Ok(all)
    }
}

/// What a weight of [`Stage::nf4`] stands for, exactly (devices that compute in bf16 round it).
///
/// # Errors
/// Those of the quantisation.
pub(super) fn nf4_values(
    shape: [usize; 2],
    values: &[f32],
    double_quant: bool,
) -> Result<Vec<f32>> {
    let matrix = Nf4Matrix::quantize("nf4", values, shape, double_quant)?;
    matrix.to_f32_vec()
}

fn padded(values: &[f32], len: usize) -> Vec<f32> {
    let mut all = values.to_vec();
    all.resize(len.max(values.len()), f32::NAN);
    all
}

#[cfg(all(test, kernels_emu))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::gpu::Gpu;
    use crate::backend::gpu::driver::emu::{Emu, Order};

    #[test]
    fn a_byte_before_or_after_a_tensor_is_seen_and_none_within() {
        let gpu = Gpu::new(Arc::new(Emu::new(Order::Forward))).unwrap();
        let stage = Stage::guarded(&gpu);
        let tensor = stage.out_f32("out", &[3, 5]).unwrap();
        assert_eq!((tensor.len(), stage.check_guards().unwrap()), (15, 1));
        for (at, seen) in [(255, true), (256, false), (315, false), (316, true)] {
            let mut whole = stage.guarded.as_ref().unwrap().borrow()[0].clone();
            let intact = whole.bytes().unwrap().into_owned();
            let mut bytes = intact.clone();
            bytes[at] ^= 1;
            whole.write_bytes(&bytes).unwrap();
            assert_eq!(stage.check_guards().is_err(), seen, "byte {at}");
            whole.write_bytes(&intact).unwrap();
        }
        let part = |offset| tensor.part("part", &[1], DType::F32, offset);
        assert!(part(56).is_some() && part(57).is_none());
    }
}
