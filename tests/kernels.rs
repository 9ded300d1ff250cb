//! The kernels on the emulated device, each against a loop in f64 (or against the host, bit for bit), in every thread order.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use brightrun::backend::gpu::driver::emu::{Emu, Order};
use brightrun::backend::gpu::driver::{Driver, Grid, Kernel};
use brightrun::backend::gpu::params::{
    NF4_ELEMENTS_PER_BLOCK, NF4_THREADS, Nf4DequantizeParams, Nf4Weight, RMS_NORM_THREADS,
    RmsNormBackwardParams, RmsNormForwardParams, SWIGLU_THREADS, StepStateDevice,
    SwigluBackwardParams,
};
use brightrun::store::nf4::{Absmax, Nf4Matrix, dynamic};
use common::device::{ORDERS, download, random, upload};
use half::bf16;

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
            device
                .launch(NORM_FORWARD, grid, bytemuck::bytes_of(&forward))
                .unwrap();
            device
                .launch(NORM_BACKWARD, grid, bytemuck::bytes_of(&backward))
                .unwrap();
            let (out, d_x): (Vec<bf16>, Vec<bf16>) = (download(&out), download(&d_x));
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
        .launch(NORM_FORWARD, Grid::line(4), bytemuck::bytes_of(&forward))
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
        .launch(NORM_BACKWARD, Grid::line(4), bytemuck::bytes_of(&backward))
        .unwrap();
    assert_eq!(download::<bf16>(&stored), sum);
    assert_bf16(&download::<bf16>(&out), &expected.out, "out");
    let total = expected
        .d_x
        .iter()
        .zip(&before)
        .map(|(d, b)| d + f64::from(b.to_f32()));
    assert_bf16(&download::<bf16>(&d_x), &total.collect::<Vec<_>>(), "d_x");
}

const DEQUANTIZE: Kernel = Kernel {
    name: "nf4_dequantize",
    threads: NF4_THREADS,
};

#[test]
fn dequantised_weights_are_the_hosts_rounded_to_bf16_bit_for_bit() {
    // One element, odd counts, short last blocks, more than one block of threads, more than one nested block.
    for shape in [[1, 1], [7, 5], [33, 67], [64, 64], [130, 300], [257, 96]] {
        let weights: Vec<f32> = random(shape[0] * shape[1], 11)
            .iter()
            .map(|w| w.to_f32())
            .collect();
        for double_quant in [false, true] {
            let matrix = Nf4Matrix::quantize("w", &weights, shape, double_quant).unwrap();
            let host = matrix.to_f32_vec().unwrap();
            let expected: Vec<u16> = host.iter().map(|w| bf16::from_f32(*w).to_bits()).collect();
            for order in ORDERS {
                assert!(
                    dequantised(order, &matrix) == expected,
                    "{shape:?} {double_quant} {order:?}"
                );
            }
        }
    }
}

fn dequantised(order: Order, matrix: &Nf4Matrix) -> Vec<u16> {
    let device = Emu::new(order);
    let num_elements = matrix.out_features * matrix.in_features;
    let out = device.alloc("out", num_elements * 2).unwrap();
    let codes = upload(&device, "codes", matrix.codes.u8().unwrap());
    let table = upload(&device, "dynamic_code", &dynamic::CODE);
    let mut params = Nf4DequantizeParams {
        out: out.address(),
        weight: Nf4Weight {
            codes: codes.address(),
            dynamic_code: table.address(),
            ..Nf4Weight::default()
        },
        num_elements: num_elements as u64,
    };
    let scales = match &matrix.absmax {
        Absmax::Plain(absmax) => {
            let absmax = upload(&device, "absmax", absmax.f32().unwrap());
            params.weight.absmax = absmax.address();
            vec![absmax]
        }
        Absmax::Nested {
            codes,
            nested_absmax,
            offset,
        } => {
            let codes = upload(&device, "nested_codes", codes.u8().unwrap());
            // On the device each nested scale is followed by the offset.
            let scales = nested_absmax.f32().unwrap().iter();
            let pairs: Vec<f32> = scales.flat_map(|scale| [*scale, *offset]).collect();
            let pairs = upload(&device, "nested_absmax", &pairs);
            params.weight.nested_codes = codes.address();
            params.weight.nested_absmax = pairs.address();
            vec![codes, pairs]
        }
    };
    let blocks = num_elements.div_ceil(NF4_ELEMENTS_PER_BLOCK as usize);
    let grid = Grid::line(u32::try_from(blocks).unwrap());
    device
        .launch(DEQUANTIZE, grid, bytemuck::bytes_of(&params))
        .unwrap();
    drop(scales);
    download::<bf16>(&out).iter().map(|w| w.to_bits()).collect()
}

const SWIGLU_BACKWARD: Kernel = Kernel {
    name: "swiglu_backward",
    threads: SWIGLU_THREADS,
};

#[test]
fn swiglu_backward_matches_the_formula_also_in_place() {
    for (tokens, rows_per_token, width) in [(1, 1, 8), (5, 1, 264), (7, 3, 96), (2, 1, 4096)] {
        let elements = tokens * rows_per_token * width;
        let (d_h, gate, up) = (
            random(elements, 12),
            random(elements, 13),
            random(elements, 14),
        );
        let wide = |values: &[bf16]| -> Vec<f64> {
            values.iter().map(|v| f64::from(v.to_f32())).collect()
        };
        let (dh, g, u) = (wide(&d_h), wide(&gate), wide(&up));
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let d_gate: Vec<f64> = (0..elements)
            .map(|i| dh[i] * u[i] * sigmoid(g[i]) * (1.0 + g[i] * (1.0 - sigmoid(g[i]))))
            .collect();
        let d_up: Vec<f64> = (0..elements)
            .map(|i| dh[i] * g[i] * sigmoid(g[i]))
            .collect();
        for order in ORDERS {
            let device = Emu::new(order);
            let step = StepStateDevice {
                num_tokens: u32::try_from(tokens).unwrap(),
                ..StepStateDevice::default()
            };
            let step = upload(&device, "step", &[step]);
            let d_h = upload(&device, "d_h", &d_h);
            // Each gradient takes the place of its activation.
            let (gate, up) = (upload(&device, "gate", &gate), upload(&device, "up", &up));
            let params = SwigluBackwardParams {
                d_gate: gate.address(),
                d_up: up.address(),
                d_h: d_h.address(),
                gate: gate.address(),
                up: up.address(),
                step: step.address(),
                width: u32::try_from(width).unwrap(),
                rows_per_token: u32::try_from(rows_per_token).unwrap(),
            };
            let blocks = elements.div_ceil(8 * SWIGLU_THREADS as usize) + 1;
            let grid = Grid::line(u32::try_from(blocks).unwrap());
            device
                .launch(SWIGLU_BACKWARD, grid, bytemuck::bytes_of(&params))
                .unwrap();
            assert_bf16(&download::<bf16>(&gate), &d_gate, "d_gate");
            assert_bf16(&download::<bf16>(&up), &d_up, "d_up");
        }
    }
}

/// A sanitized build ends the process at such a write.
#[cfg(not(kernels_sanitized))]
#[test]
fn a_kernel_that_writes_beyond_a_buffer_is_told_which() {
    let device = Emu::new(Order::Forward);
    let codes = upload(&device, "codes", &[0_u8; 64]);
    let absmax = upload(&device, "absmax", &[1.0_f32; 2]);
    let out = device.alloc("out", 100 * 2).unwrap();
    let params = Nf4DequantizeParams {
        out: out.address(),
        weight: Nf4Weight {
            codes: codes.address(),
            absmax: absmax.address(),
            ..Nf4Weight::default()
        },
        // One more than there is room for.
        num_elements: 101,
    };
    let error = device
        .launch(DEQUANTIZE, Grid::line(1), bytemuck::bytes_of(&params))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "kernel nf4_dequantize: wrote beyond `out` of 200 bytes"
    );
}
