//! Each op of a training step at its true shape, against the roofline.

use std::time::Duration;

use super::model::{Settings, Subject};
use super::{Roofline, Times};
use crate::backend::Opened;
use crate::config::model::ModelConfig;
use crate::error::Result;
use crate::ops::cost::Cost;
use crate::ops::trace::Mode;

/// An op at one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelRow {
    /// The op.
    pub op: &'static str,
    /// What a call costs at least.
    pub cost: Cost,
    /// Calls in a step.
    pub calls: usize,
    /// Of a call.
    pub times: Times,
    /// Share of the measured roofline.
    pub share: f64,
}

/// All ops.
#[derive(Debug)]
pub struct Kernels {
    /// The device, for a person.
    pub device: String,
    /// What it reaches.
    pub roofline: Roofline,
    /// Ops, in the order of a step.
    pub rows: Vec<KernelRow>,
}

/// Times every op of `steps` training steps one by one; those whose name begins with `prefix`. Ops that are called at one shape
/// by several layers make one row.
///
/// # Errors
/// Those of the device; what does not fit.
pub fn kernels(
    opened: Opened,
    model: &ModelConfig,
    settings: &Settings,
    steps: usize,
    prefix: &str,
) -> Result<Kernels> {
    let device = opened.note.clone();
    // The CPU can do large tensors whatever is measured; the emulated device cannot.
    let [rows, width] = match opened.info {
        None => [2048, 1024],
        Some(_) => [settings.tokens, 2 * model.hidden_size.next_multiple_of(64)],
    };
    let roofline = Roofline::measure(&*opened.ops, rows, width)?;
    let mut subject = Subject::new(opened, model, settings)?;
    let mut found: Vec<(&'static str, Cost, Vec<Duration>)> = Vec::new();
    // The first one warms up.
    for number in 0..=steps {
        subject.trace.start(Mode::Times);
        let completed = number as u64;
        subject.trainer.step(&subject.batches, completed, 1e-4)?;
        for call in subject.trace.stop() {
            if number == 0 || !call.op.starts_with(prefix) {
                continue;
            }
            let known = found
                .iter_mut()
                .find(|(op, cost, _)| (*op, *cost) == (call.op, call.cost));
            match known {
                Some((_, _, times)) => times.push(call.elapsed),
                None => found.push((call.op, call.cost, vec![call.elapsed])),
            }
        }
    }
    let rows = found.into_iter().map(|(op, cost, times)| {
        let calls = times.len() / steps;
        let times = Times::new(&times);
        KernelRow {
            op,
            cost,
            calls,
            times,
            share: roofline.share(cost, times),
        }
    });
    Ok(Kernels {
        device,
        roofline,
        rows: rows.collect(),
    })
}
