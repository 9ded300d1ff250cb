//! Cases of `adamw`: three updates of an arena. Results are equal on all devices, bit for bit, and near those of f64.

use super::stage::{Stage, values};
use super::{Case, Outputs};
use crate::backend::cpu::Cpu;
use crate::error::Result;
use crate::ops::{AdamWStep, MOMENTS_BLOCKSIZE, Moments};
use crate::tensor::{DType, Tensor};

const STEPS: u64 = 3;

#[derive(Debug, Clone, Copy)]
struct Shape {
    len: usize,
    /// Rows of the token losses.
    rows: usize,
    in_8bit: bool,
    params: DType,
    weight_decay: f64,
    max_grad_norm: f64,
    broken: Broken,
}

/// What is not finite in the last update.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Broken {
    Nothing,
    Gradient,
    Loss,
}

const PLAIN: Shape = Shape {
    len: 256,
    rows: 1,
    in_8bit: false,
    params: DType::F32,
    weight_decay: 0.0,
    max_grad_norm: 1.0,
    broken: Broken::Nothing,
};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    for (len, rows, weight_decay, max_grad_norm) in [
        (256, 1, 0.0, 1.0),
        (768, 7, 0.01, 0.0),
        (8192, 8193, 0.1, 1e6),
        (8448, 131, 0.01, 0.5),
    ] {
        for (in_8bit, params) in [
            (false, DType::F32),
            (false, DType::Bf16),
            (true, DType::F32),
            (true, DType::Bf16),
        ] {
            shapes.push(Shape {
                len,
                rows,
                in_8bit,
                params,
                weight_decay,
                max_grad_norm,
                ..PLAIN
            });
        }
    }
    for broken in [Broken::Gradient, Broken::Loss] {
        for in_8bit in [false, true] {
            shapes.push(Shape {
                len: 8448,
                in_8bit,
                broken,
                ..PLAIN
            });
        }
    }
    shapes.into_iter().map(case).collect()
}

fn case(shape: Shape) -> Case {
    let label = format!(
        "len={},rows={},8bit={},params={},decay={},clip={},broken={:?}",
        shape.len,
        shape.rows,
        shape.in_8bit,
        shape.params.name(),
        shape.weight_decay,
        shape.max_grad_norm,
        shape.broken
    );
    let run = move |stage: &Stage<'_>| run(stage, shape);
    Case::new("adamw", label, run, move || oracle(shape))
}

/// The learning rate is small: near a border between two codes, f64 may choose the other one than f32.
fn settings(shape: Shape, step: u64) -> AdamWStep {
    AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: shape.weight_decay,
        max_grad_norm: shape.max_grad_norm,
        step,
        seed: 0x1234_5678_9ABC,
    }
}

/// Magnitudes over 12 decades, a block of zeros, a block so small that its second moments are no normal f32 numbers.
fn grads(shape: Shape, step: u64) -> Vec<f32> {
    let mut grads = values(shape.len, 10 + step);
    for (index, grad) in grads.iter_mut().enumerate() {
        let exponent = i32::try_from(index % 41).unwrap_or(0);
        *grad *= match index / MOMENTS_BLOCKSIZE {
            1 => 0.0,
            2 => 1e-22,
            _ => 2_f32.powi(-exponent),
        };
    }
    if shape.broken == Broken::Gradient && step == STEPS {
        grads[shape.len - 1] = f32::INFINITY;
    }
    grads
}

fn losses(shape: Shape, step: u64) -> Vec<f32> {
    let mut losses: Vec<f32> = values(shape.rows, 20 + step)
        .iter()
        .map(|value| value.abs())
        .collect();
    if shape.broken == Broken::Loss && step == STEPS {
        losses[0] = f32::NAN;
    }
    losses
}

fn is_broken(shape: Shape, step: u64) -> bool {
    shape.broken != Broken::Nothing && step == STEPS
}

fn run(stage: &Stage<'_>, shape: Shape) -> Result<Outputs> {
    let mut arena = stage.arena()?;
    let mut params = arena.alloc("params", &[shape.len], shape.params)?;
    params.write_f32(&values(shape.len, 1))?;
    let mut moments = Moments::alloc(&mut arena, shape.len, shape.in_8bit)?;
    for (_, tensor) in moments.tensors_mut() {
        tensor.zero()?;
    }
    let (mut sums, mut applied, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for step in 1..=STEPS {
        let mut grads = stage.f32("grads", &[shape.len], &grads(shape, step))?;
        let losses = stage.f32("token_loss", &[shape.rows, 1], &losses(shape, step))?;
        let settings = settings(shape, step);
        let report = stage
            .ops
            .adamw(&mut params, &mut moments, &mut grads, &losses, settings)?;
        applied.push(u32::from(report.applied));
        if report.applied {
            sums.extend([report.grad_norm, report.loss_sum]);
        }
        left.extend(words(&grads)?);
    }
    let mut outputs = Outputs::new().f32("norm and loss", sums);
    if shape.params == DType::F32 {
        outputs = outputs.f32("params", stage.read(&params)?);
    }
    outputs = outputs
        .exact("applied", applied)
        .exact("gradient", left)
        .exact("parameter bits", words(&params)?);
    for (name, tensor) in moments.tensors() {
        outputs = outputs.exact(name, words(tensor)?);
    }
    Ok(outputs)
}

/// The bytes of a tensor.
fn words(tensor: &Tensor) -> Result<Vec<u32>> {
    Ok(tensor
        .bytes()?
        .iter()
        .map(|byte| u32::from(*byte))
        .collect())
}

/// In f64; the bits are those of the CPU.
fn oracle(shape: Shape) -> Outputs {
    let mut params: Vec<f64> = values(shape.len, 1).into_iter().map(f64::from).collect();
    let (mut m, mut v) = (vec![0.0; shape.len], vec![0.0; shape.len]);
    let (signed, unsigned) = (map(true), map(false));
    let mut sums = Vec::new();
    for step in (1..=STEPS).filter(|step| !is_broken(shape, *step)) {
        let settings = settings(shape, step);
        let grads: Vec<f64> = grads(shape, step).into_iter().map(f64::from).collect();
        let norm = grads.iter().map(|grad| grad * grad).sum::<f64>().sqrt();
        let loss: f64 = losses(shape, step).into_iter().map(f64::from).sum();
        sums.extend([norm, loss]);
        let limit = settings.max_grad_norm;
        let clip = if limit > 0.0 && norm > limit {
            limit / (norm + 1e-6)
        } else {
            1.0
        };
        let count = i32::try_from(step).unwrap_or(0);
        for index in 0..shape.len {
            let grad = grads[index] * clip;
            m[index] = settings.beta1 * m[index] + (1.0 - settings.beta1) * grad;
            v[index] = settings.beta2 * v[index] + (1.0 - settings.beta2) * grad * grad;
            let m_hat = m[index] / (1.0 - settings.beta1.powi(count));
            let v_hat = v[index] / (1.0 - settings.beta2.powi(count));
            let update =
                m_hat / (v_hat.sqrt() + settings.epsilon) + settings.weight_decay * params[index];
            params[index] -= settings.learning_rate * update;
        }
        if shape.in_8bit {
            for (m, v) in m
                .chunks_mut(MOMENTS_BLOCKSIZE)
                .zip(v.chunks_mut(MOMENTS_BLOCKSIZE))
            {
                quantize(m, &signed, 0.0);
                quantize(v, &unsigned, unsigned[1]);
            }
        }
    }
    let cpu = run(&Stage::new(&Cpu::new()), shape);
    let mut outputs = Outputs::new().f32("norm and loss", sums);
    if shape.params == DType::F32 {
        outputs = outputs.f32("params", params);
    }
    let exact = cpu.into_iter().flat_map(|outputs| outputs.0);
    outputs.0.extend(exact.skip(outputs.0.len()));
    outputs
}

/// To the nearest value of `map` times the largest magnitude; what is not 0 becomes at least `least` of it.
fn quantize(block: &mut [f64], map: &[f64], least: f64) {
    let absmax = block
        .iter()
        .fold(0.0_f64, |max, value| max.max(value.abs()));
    for value in block {
        // f32 does not divide by what is smaller.
        let ratio = if absmax < 1.2e-38 {
            0.0
        } else {
            *value / absmax
        };
        let distance = |code: &&f64| (**code - ratio).abs();
        let nearest = map
            .iter()
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .copied()
            .unwrap_or(0.0);
        *value = absmax
            * if ratio > 0.0 {
                nearest.max(least)
            } else {
                nearest
            };
    }
}

/// The dynamic map: in each of 7 decades, the centres of 1, 2, .. 64 parts of each sign, or of twice as many; 0 and 1.
fn map(signed: bool) -> Vec<f64> {
    let mut map = vec![0.0, 1.0];
    for decade in 0..7 {
        let parts = if signed { 1 } else { 2 } << decade;
        for part in 0..parts {
            let centre = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
            let value = centre * 10_f64.powi(decade - 6);
            map.push(value);
            if signed {
                map.push(-value);
            }
        }
    }
    map.sort_by(f64::total_cmp);
    map
}
