//! The emulated device: what kernels rely on, and that it tells what a GPU would pass over in silence.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::backend::gpu::driver::emu::{Emu, Order};
use brightrun::backend::gpu::driver::{Driver, Grid, Kernel};
use brightrun::backend::gpu::params::{SELFTEST_THREADS, SelftestParams};
use brightrun::error::Result;
use common::check_no_allocation_in_a_recording;
use common::device::{ORDERS, download, random, upload};

const MATMUL: Kernel = Kernel {
    name: "selftest_matmul",
    threads: SELFTEST_THREADS,
};
const BLOCK: Kernel = Kernel {
    name: "selftest_block",
    threads: SELFTEST_THREADS,
};

/// `a [rows, depth] b [cols, depth]^T` on the device.
fn matmul(order: Order, [rows, cols, depth]: [usize; 3], fault: u32) -> Result<Vec<f32>> {
    let device = Emu::new(order);
    let (a, b) = (random(rows * depth, 1), random(cols * depth, 2));
    let (a, b) = (upload(&device, "a", &a), upload(&device, "b", &b));
    let out = device.alloc("out", rows * cols * 4)?;
    let size = |value: usize| u32::try_from(value).unwrap();
    let params = SelftestParams {
        out: out.address(),
        a: a.address(),
        b: b.address(),
        rows: size(rows),
        cols: size(cols),
        depth: size(depth),
        fault,
    };
    let grid = Grid::plane(size(cols.div_ceil(64)), size(rows.div_ceil(64)));
    device.launch(MATMUL, grid, bytemuck::bytes_of(&params))?;
    Ok(download(&out))
}

fn matmul_reference([rows, cols, depth]: [usize; 3]) -> Vec<f64> {
    let (a, b) = (random(rows * depth, 1), random(cols * depth, 2));
    let dot = |row: usize, col: usize| -> f64 {
        (0..depth)
            .map(|k| {
                f64::from(a[row * depth + k].to_f32()) * f64::from(b[col * depth + k].to_f32())
            })
            .sum()
    };
    (0..rows)
        .flat_map(|row| (0..cols).map(move |col| (row, col)))
        .map(|(row, col)| dot(row, col))
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn matrix_loads_copies_and_products_give_a_matrix_product_in_every_order() {
    for shape in [
        [1, 1, 8],
        [64, 64, 32],
        [65, 63, 40],
        [130, 200, 96],
        [16, 8, 16],
    ] {
        let expected = matmul_reference(shape);
        let first = matmul(Order::Forward, shape, 0).unwrap();
        for (found, expected) in first.iter().zip(&expected) {
            assert!(
                (f64::from(*found) - expected).abs() <= 1e-4,
                "{shape:?}: {found} {expected}"
            );
        }
        for order in ORDERS {
            assert_eq!(
                bits(&matmul(order, shape, 0).unwrap()),
                bits(&first),
                "{shape:?} {order:?}"
            );
        }
    }
}

#[test]
fn a_missing_wait_for_copies_shows_as_nan() {
    let out = matmul(Order::Forward, [64, 64, 64], 1).unwrap();
    assert!(out.iter().any(|value| value.is_nan()));
}

#[test]
fn a_missing_barrier_shows_in_one_of_the_orders() {
    let shape = [64, 64, 128];
    let expected = matmul(Order::Forward, shape, 0).unwrap();
    let differs = |order| bits(&matmul(order, shape, 2).unwrap()) != bits(&expected);
    assert!(ORDERS.into_iter().any(differs));
}

fn block(order: Order, fault: u32) -> Result<Vec<f32>> {
    const BLOCKS: u32 = 9;
    let device = Emu::new(order);
    let out = device.alloc("out", BLOCKS as usize * 12)?;
    let params = SelftestParams {
        out: out.address(),
        fault,
        ..SelftestParams::default()
    };
    device.launch(BLOCK, Grid::line(BLOCKS), bytemuck::bytes_of(&params))?;
    Ok(download(&out))
}

#[test]
fn barriers_shuffles_and_votes_work_in_every_order() {
    for order in ORDERS {
        let out = block(order, 0).unwrap();
        for (index, [sum, votes, first]) in out.as_chunks::<3>().0.iter().enumerate() {
            let index = f32::from(u16::try_from(index).unwrap());
            // Lanes 0, 3, 6, .. 30 of the first warp vote.
            let lanes = (0..32)
                .filter(|lane| lane % 3 == 0)
                .map(|lane| 1_u32 << lane);
            let expected = [
                0.5 * 8128.0 + 128.0 * index,
                lanes.sum::<u32>() as f32,
                index,
            ];
            assert_eq!(
                [*sum, *votes, *first].map(f32::to_bits),
                expected.map(f32::to_bits)
            );
        }
    }
}

#[test]
fn a_barrier_that_a_part_of_the_block_reaches_is_an_error_that_names_kernel_and_block() {
    let error = block(Order::Forward, 1).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "kernel selftest_block, block (0, 0, 0): 127 of 128 threads wait at a barrier"
        ),
        "{error}"
    );
    assert!(
        error.contains("1 have returned; thread 0 waits at selftest.cu:"),
        "{error}"
    );
}

#[test]
fn a_warp_that_diverges_is_an_error() {
    let error = block(Order::Forward, 2).unwrap_err().to_string();
    assert!(
        error.starts_with("kernel selftest_block, block (0, 0, 0): "),
        "{error}"
    );
    assert!(
        error.contains("inside a warp") || error.contains("a warp operation"),
        "{error}"
    );
}

#[test]
fn a_write_beyond_shared_memory_is_an_error() {
    let error = block(Order::Forward, 3).unwrap_err().to_string();
    assert!(
        error.contains("wrote beyond the shared array values of 512 bytes"),
        "{error}"
    );
}

#[test]
fn shared_memory_that_nobody_wrote_is_nan() {
    assert!(
        block(Order::Forward, 4)
            .unwrap()
            .iter()
            .any(|value| value.is_nan())
    );
}

#[test]
fn a_read_without_a_barrier_shows_in_one_of_the_orders() {
    let expected = bits(&block(Order::Forward, 0).unwrap());
    assert!(
        ORDERS
            .into_iter()
            .any(|order| bits(&block(order, 5).unwrap()) != expected)
    );
}

#[test]
fn launches_that_cannot_be_are_refused() {
    let device = Emu::new(Order::Forward);
    let params = SelftestParams::default();
    let unknown = Kernel {
        name: "no_such_kernel",
        threads: 1,
    };
    let error = device
        .launch(unknown, Grid::line(1), bytemuck::bytes_of(&params))
        .unwrap_err()
        .to_string();
    assert_eq!(error, "kernel no_such_kernel: there is no such kernel");
    let wrong = Kernel {
        threads: 64,
        ..BLOCK
    };
    let error = device
        .launch(wrong, Grid::line(1), bytemuck::bytes_of(&params))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("launched with 64 threads a block, the kernel is made for 128"),
        "{error}"
    );
    assert!(Emu::kernels().any(|name| name == "rms_norm_forward"));
    for (grid, reason) in [
        (Grid::plane(1, 65_536), "at most 65535"),
        (
            Grid::line(1).with_shared(166_913),
            "at most 166912 on the emulated device",
        ),
    ] {
        let launched = device.launch(BLOCK, grid, bytemuck::bytes_of(&params));
        let error = launched.unwrap_err().to_string();
        assert!(
            error.contains(reason) && error.contains(BLOCK.name),
            "{error}"
        );
    }
    check_no_allocation_in_a_recording(&device);
}
