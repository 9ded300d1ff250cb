//! The step's state in device memory: what `StepState` holds, as kernels read it.

use std::sync::Arc;

use super::driver::Driver;
use super::params::StepStateDevice;
use crate::error::{Error, Result};
use crate::ops::{DropoutState, StepState};
use crate::tensor::device::DeviceMemory;

/// Arrays of `capacity` words after the struct: ids, positions, sequence starts and ends, `cu_seqlens`, target rows and ids.
const ARRAYS: usize = 7;

/// How far the numbers of a batch may reach, as the tables of the ops say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Rows of the embedding.
    pub(super) input_ids: usize,
    /// Rows of the head.
    pub(super) target_ids: usize,
    /// Rows of the rotary tables.
    pub(super) positions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            input_ids: usize::MAX,
            target_ids: usize::MAX,
            positions: usize::MAX,
        }
    }
}

impl Limits {
    /// The narrower of each.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            input_ids: self.input_ids.min(other.input_ids),
            target_ids: self.target_ids.min(other.target_ids),
            positions: self.positions.min(other.positions),
        }
    }

    /// Refuses a batch that reaches further: kernels read the tables at what it holds.
    pub(super) fn check(self, state: &StepState) -> Result<()> {
        let batch = &state.batch;
        let largest = |values: &[u32]| values.iter().max().map_or(0, |value| *value as usize + 1);
        let targets = state.target_rows().into_iter();
        let targets = targets.map(|row| batch.target_ids[row].cast_unsigned());
        let targets: Vec<u32> = targets.collect();
        for (tensor, reach, limit) in [
            ("input_ids", largest(&batch.input_ids), self.input_ids),
            ("target_ids", largest(&targets), self.target_ids),
            ("position_ids", largest(&batch.position_ids), self.positions),
        ] {
            if reach > limit {
                return Err(Error::Shape {
                    op: "load_batch",
                    tensor: tensor.to_owned(),
                    found: vec![reach],
                    expected: vec![limit],
                });
            }
        }
        Ok(())
    }
}

/// Device memory for one micro-batch of up to `capacity` tokens.
#[derive(Debug)]
pub(super) struct StepBuffers {
    memory: Arc<dyn DeviceMemory>,
    capacity: usize,
}

impl StepBuffers {
    pub(super) fn alloc(driver: &dyn Driver, capacity: usize) -> Result<Self> {
        Ok(Self {
            memory: driver.alloc("step state", Self::bytes_for(capacity))?,
            capacity,
        })
    }

    /// Bytes for batches of up to `capacity` tokens.
    pub(super) fn bytes_for(capacity: usize) -> usize {
        size_of::<StepStateDevice>() + ARRAYS * array_bytes(capacity)
    }

    pub(super) fn num_bytes(&self) -> usize {
        self.memory.num_bytes()
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Address of the struct.
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Puts `state` there, in one copy.
    pub(super) fn write(&self, state: &StepState) -> Result<()> {
        let batch = &state.batch;
        let num_tokens = state.num_tokens();
        if num_tokens > self.capacity {
            return Err(Error::Shape {
                op: "load_batch",
                tensor: "input_ids".to_owned(),
                found: vec![num_tokens],
                expected: vec![self.capacity],
            });
        }
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for (start, end) in state.sequences() {
            starts.resize(end, word(start));
            ends.resize(end, word(end));
        }
        let (target_rows, target_ids): (Vec<u32>, Vec<u32>) = state
            .target_rows()
            .into_iter()
            .map(|row| (word(row), batch.target_ids[row].cast_unsigned()))
            .unzip();
        let address = |array: usize| {
            let offset = size_of::<StepStateDevice>() + array * array_bytes(self.capacity);
            self.memory.address() + offset as u64
        };
        let dropout = state.dropout;
        let [dropout_key_low, dropout_key_high] = dropout.map_or([0; 2], DropoutState::key);
        let device = StepStateDevice {
            num_tokens: word(num_tokens),
            num_sequences: word(state.sequences().len()),
            num_targets: word(target_rows.len()),
            loss_scale: state.loss_scale,
            dropout_on: u32::from(dropout.is_some()),
            dropout_key_low,
            dropout_key_high,
            optimizer_step: dropout.map_or(0, |draws| draws.optimizer_step),
            first_token: dropout.map_or(0, |draws| draws.first_token),
            reserved: 0,
            input_ids: address(0),
            position_ids: address(1),
            sequence_start: address(2),
            sequence_end: address(3),
            cu_seqlens: address(4),
            target_rows: address(5),
            target_ids: address(6),
        };
        let mut bytes = bytemuck::bytes_of(&device).to_vec();
        let arrays = [
            &batch.input_ids,
            &batch.position_ids,
            &starts,
            &ends,
            &batch.cu_seqlens,
            &target_rows,
            &target_ids,
        ];
        for values in arrays {
            let end = bytes.len() + array_bytes(self.capacity);
            bytes.extend_from_slice(bytemuck::cast_slice(values));
            bytes.resize(end, 0);
        }
        self.memory.write(0, &bytes)
    }
}

/// One array: `cu_seqlens` has one word more than there are tokens.
fn array_bytes(capacity: usize) -> usize {
    ((capacity + 1) * size_of::<u32>()).next_multiple_of(16)
}

fn word(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
