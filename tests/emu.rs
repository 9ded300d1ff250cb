//! The emulated device: what kernels rely on, and that it tells what a GPU would pass over in silence.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

use brightrun::backend::gpu::driver::emu::{Emu, EmuMemory, Order};
use brightrun::backend::gpu::driver::{Driver, Grid, Kernel, Memory};
use brightrun::backend::gpu::params::{
    RMS_NORM_THREADS, RmsNormBackwardParams, RmsNormForwardParams, SELFTEST_THREADS,
    SelftestParams, StepStateDevice,
};
use brightrun::error::Result;
use brightrun::random::{Draws, Stream};
use half::bf16;

const ORDERS: [Order; 3] = [Order::Forward, Order::Reversed, Order::Shuffled(7)];
const MATMUL: Kernel = Kernel {
    name: "selftest_matmul",
    threads: SELFTEST_THREADS,
};
const BLOCK: Kernel = Kernel {
    name: "selftest_block",
    threads: SELFTEST_THREADS,
};

fn random(len: usize, seed: u64) -> Vec<bf16> {
    let mut draws = Draws::new(seed, Stream::Synthetic, 0);
    (0..len)
        .map(|_| bf16::from_f32(draws.next_normal()))
        .collect()
}

fn upload<T: bytemuck::NoUninit>(device: &Emu, name: &str, values: &[T]) -> EmuMemory {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let mut memory = device.alloc(name, bytes.len()).unwrap();
    device.upload(&mut memory, bytes).unwrap();
    memory
}

fn download<T: bytemuck::Pod>(device: &Emu, memory: &EmuMemory) -> Vec<T> {
    let mut values = vec![T::zeroed(); memory.num_bytes() / size_of::<T>()];
    device
        .download(memory, bytemuck::cast_slice_mut(&mut values))
        .unwrap();
    values
}

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
    device.launch(MATMUL, grid, &params)?;
    Ok(download(&device, &out))
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
    device.launch(BLOCK, Grid::line(BLOCKS), &params)?;
    Ok(download(&device, &out))
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
        .launch(unknown, Grid::line(1), &params)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "kernel no_such_kernel: there is no such kernel");
    let wrong = Kernel {
        threads: 64,
        ..BLOCK
    };
    let error = device
        .launch(wrong, Grid::line(1), &params)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("launched with 64 threads a block, the kernel is made for 128"),
        "{error}"
    );
    assert!(Emu::kernels().any(|name| name == "rms_norm_forward"));
}

const NORM_FORWARD: Kernel = Kernel {
    name: "rms_norm_forward",
    threads: RMS_NORM_THREADS,
};
const NORM_BACKWARD: Kernel = Kernel {
    name: "rms_norm_backward",
    threads: RMS_NORM_THREADS,
};

/// A norm's inputs and results, all as f64.
struct Norm {
    out: Vec<f64>,
    d_x: Vec<f64>,
}

const EPS: f32 = 1e-6;

fn norm_reference(x: &[bf16], d_out: &[bf16], weight: &[f32], offset: f32) -> Norm {
    let width = weight.len();
    let (mut out, mut d_x) = (Vec::new(), Vec::new());
    for (x, d_out) in x.chunks(width).zip(d_out.chunks(width)) {
        let x: Vec<f64> = x.iter().map(|value| f64::from(value.to_f32())).collect();
        let mean_square = x.iter().map(|value| value * value).sum::<f64>() / width as f64;
        let rstd = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        let scaled: Vec<f64> = d_out
            .iter()
            .zip(weight)
            .map(|(d, w)| f64::from(d.to_f32()) * (f64::from(*w) + f64::from(offset)))
            .collect();
        let mean = scaled
            .iter()
            .zip(&x)
            .map(|(d, x)| d * x * rstd)
            .sum::<f64>()
            / width as f64;
        out.extend(
            x.iter()
                .zip(weight)
                .map(|(x, w)| x * rstd * (f64::from(*w) + f64::from(offset))),
        );
        d_x.extend(
            scaled
                .iter()
                .zip(&x)
                .map(|(d, x)| rstd * (d - x * rstd * mean)),
        );
    }
    Norm { out, d_x }
}

/// The largest error is at most that of rounding the exact result to bf16, twice.
#[track_caller]
fn assert_bf16(found: &[bf16], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let error = (f64::from(found.to_f32()) - expected).abs();
        assert!(
            error <= 2.0 * expected.abs() / 256.0 + 1e-6,
            "{what}: {found} against {expected}"
        );
    }
}

#[test]
fn norms_match_the_formula_at_odd_shapes_and_leave_rows_past_the_batch_alone() {
    for (tokens, width, offset) in [
        (1, 8, 0.0),
        (3, 64, 1.0),
        (7, 2048, 0.0),
        (5, 2056, 1.0),
        (2, 5120, 0.0),
    ] {
        let capacity = tokens + 3;
        let (x, d_out) = (random(tokens * width, 3), random(tokens * width, 4));
        let weight: Vec<f32> = random(width, 5)
            .iter()
            .map(|value| value.to_f32())
            .collect();
        let expected = norm_reference(&x, &d_out, &weight, offset);
        let mut previous = None;
        for order in ORDERS {
            let device = Emu::new(order);
            let step = StepStateDevice {
                num_tokens: u32::try_from(tokens).unwrap(),
                ..StepStateDevice::default()
            };
            let step = upload(&device, "step", &[step]);
            let (x, d_out) = (upload(&device, "x", &x), upload(&device, "d_out", &d_out));
            let weight = upload(&device, "weight", &weight);
            let out = device.alloc("out", capacity * width * 2).unwrap();
            let rstd = device.alloc("rstd", capacity * 4).unwrap();
            let d_x = upload(&device, "d_x", &vec![bf16::ONE; capacity * width]);
            let hidden_size = u32::try_from(width).unwrap();
            let forward = RmsNormForwardParams {
                out: out.address(),
                rstd: rstd.address(),
                x: x.address(),
                weight: weight.address(),
                step: step.address(),
                hidden_size,
                eps: EPS,
                weight_offset: offset,
                ..RmsNormForwardParams::default()
            };
            let backward = RmsNormBackwardParams {
                d_x: d_x.address(),
                d_out: d_out.address(),
                x: x.address(),
                rstd: rstd.address(),
                weight: weight.address(),
                step: step.address(),
                hidden_size,
                weight_offset: offset,
                accumulate: 0,
                reserved: 0,
            };
            let grid = Grid::line(u32::try_from(capacity).unwrap());
            device.launch(NORM_FORWARD, grid, &forward).unwrap();
            device.launch(NORM_BACKWARD, grid, &backward).unwrap();
            let (out, d_x): (Vec<bf16>, Vec<bf16>) =
                (download(&device, &out), download(&device, &d_x));
            assert_bf16(&out[..tokens * width], &expected.out, "out");
            assert_bf16(&d_x[..tokens * width], &expected.d_x, "d_x");
            assert!(
                out[tokens * width..].iter().all(|value| value.is_nan()),
                "surplus rows are written"
            );
            assert!(
                d_x[tokens * width..]
                    .iter()
                    .all(|value| *value == bf16::ONE),
                "surplus rows are written"
            );
            let all: Vec<u16> = out
                .iter()
                .chain(&d_x)
                .map(|value| value.to_bits())
                .collect();
            let first = previous.get_or_insert_with(|| all.clone());
            assert!(all == *first, "{order:?} gives other bits");
        }
    }
}

#[test]
fn an_added_and_normed_row_and_an_accumulated_gradient() {
    let (tokens, width) = (4, 96);
    let (x, delta, d_out) = (
        random(tokens * width, 6),
        random(tokens * width, 7),
        random(tokens * width, 8),
    );
    let sum: Vec<bf16> = x
        .iter()
        .zip(&delta)
        .map(|(x, d)| bf16::from_f32(x.to_f32() + d.to_f32()))
        .collect();
    let weight = vec![0.5_f32; width];
    let expected = norm_reference(&sum, &d_out, &weight, 1.0);
    let device = Emu::new(Order::Forward);
    let step = StepStateDevice {
        num_tokens: 4,
        ..StepStateDevice::default()
    };
    let step = upload(&device, "step", &[step]);
    let before = random(tokens * width, 9);
    let (x, delta, d_out) = (
        upload(&device, "x", &x),
        upload(&device, "delta", &delta),
        upload(&device, "d_out", &d_out),
    );
    let weight = upload(&device, "weight", &weight);
    let alloc = |name: &str| device.alloc(name, tokens * width * 2).unwrap();
    let (out, stored) = (alloc("out"), alloc("sum"));
    let (rstd, d_x) = (
        device.alloc("rstd", tokens * 4).unwrap(),
        upload(&device, "d_x", &before),
    );
    let forward = RmsNormForwardParams {
        out: out.address(),
        rstd: rstd.address(),
        sum: stored.address(),
        x: x.address(),
        delta: delta.address(),
        weight: weight.address(),
        step: step.address(),
        hidden_size: 96,
        eps: EPS,
        weight_offset: 1.0,
        reserved: 0,
    };
    device
        .launch(NORM_FORWARD, Grid::line(4), &forward)
        .unwrap();
    let backward = RmsNormBackwardParams {
        d_x: d_x.address(),
        d_out: d_out.address(),
        x: stored.address(),
        rstd: rstd.address(),
        weight: weight.address(),
        step: step.address(),
        hidden_size: 96,
        weight_offset: 1.0,
        accumulate: 1,
        reserved: 0,
    };
    device
        .launch(NORM_BACKWARD, Grid::line(4), &backward)
        .unwrap();
    assert_eq!(download::<bf16>(&device, &stored), sum);
    assert_bf16(&download::<bf16>(&device, &out), &expected.out, "out");
    let total = expected
        .d_x
        .iter()
        .zip(&before)
        .map(|(d, b)| d + f64::from(b.to_f32()));
    assert_bf16(
        &download::<bf16>(&device, &d_x),
        &total.collect::<Vec<_>>(),
        "d_x",
    );
}
