//! Values to the emulated device and back.
#![allow(dead_code, reason = "each test binary uses its own part")]

use brightrun::backend::gpu::driver::emu::{Emu, EmuMemory, Order};
use brightrun::backend::gpu::driver::{Driver, Memory};
use brightrun::random::{Draws, Stream};
use half::bf16;

/// Orders that every result must be equal in.
pub(crate) const ORDERS: [Order; 3] = [Order::Forward, Order::Reversed, Order::Shuffled(7)];
pub(crate) fn random(len: usize, seed: u64) -> Vec<bf16> {
    let mut draws = Draws::new(seed, Stream::Synthetic, 0);
    (0..len)
        .map(|_| bf16::from_f32(draws.next_normal()))
        .collect()
}

pub(crate) fn upload<T: bytemuck::NoUninit>(device: &Emu, name: &str, values: &[T]) -> EmuMemory {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let mut memory = device.alloc(name, bytes.len()).unwrap();
    device.upload(&mut memory, bytes).unwrap();
    memory
}

pub(crate) fn download<T: bytemuck::Pod>(device: &Emu, memory: &EmuMemory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.num_bytes() / size_of::<T>()];
    device
        .download(memory, bytemuck::cast_slice_mut(&mut values))
        .unwrap();
    values
}
