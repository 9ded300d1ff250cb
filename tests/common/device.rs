//! Values to the emulated device and back.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use brightrun::backend::gpu::driver::Driver;
use brightrun::backend::gpu::driver::emu::{Emu, Order};
use brightrun::random::{Draws, Stream};
use brightrun::tensor::device::DeviceMemory;
use half::bf16;

/// Orders that every result must be equal in.
pub(crate) const ORDERS: [Order; 3] = [Order::Forward, Order::Reversed, Order::Shuffled(7)];
pub(crate) fn random(len: usize, seed: u64) -> Vec<bf16> {
    let mut draws = Draws::new(seed, Stream::Synthetic, 0);
    (0..len)
        .map(|_| bf16::from_f32(draws.next_normal()))
        .collect()
}

/// Memory of the emulated device.
pub(crate) type Memory = Arc<dyn DeviceMemory>;

pub(crate) fn upload<T: bytemuck::NoUninit>(device: &Emu, name: &str, values: &[T]) -> Memory {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let memory = device.alloc(name, bytes.len()).unwrap();
    memory.write(0, bytes).unwrap();
    memory
}

pub(crate) fn download<T: bytemuck::Pod>(memory: &Memory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.num_bytes() / size_of::<T>()];
    memory
        .read(0, bytemuck::cast_slice_mut(&mut values))
        .unwrap();
    values
}
