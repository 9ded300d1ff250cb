//! Whole training steps.

use std::time::Instant;

use super::Times;
use super::model::{Settings, Subject};
use crate::backend::Opened;
use crate::config::model::ModelConfig;
use crate::error::Result;
use crate::ops::trace::{Mode, by_op};

/// What a step took.
#[derive(Debug)]
pub struct StepResult {
    /// Of a step.
    pub times: Times,
    /// Tokens in a second, by the median.
    pub tokens_per_s: f64,
    /// Arithmetic of a step.
    pub flops: u64,
    /// FLOPs in a second, by the median.
    pub flops_per_s: f64,
    /// Loss of the last step.
    pub loss: f64,
    /// Bytes of the run's buffers.
    pub buffer_bytes: u64,
    /// Bytes taken from the device, base weights included; `None` where its memory is the host's.
    pub device_bytes: Option<u64>,
    /// Whether activations were recomputed.
    pub recompute: bool,
    /// Adapter parameters.
    pub num_parameters: usize,
    /// Where the time went, largest first: of one step whose ops were waited for one by one.
    pub shares: Vec<OpShare>,
}

/// An op's part of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpShare {
    /// The op.
    pub op: &'static str,
    /// Calls.
    pub calls: usize,
    /// Seconds of all of them.
    pub seconds: f64,
    /// Share of the seconds of all ops.
    pub share: f64,
}

/// Times `steps` training steps, after one that warms up, and one more op by op.
///
/// # Errors
/// Those of the device; what does not fit.
pub fn step(
    opened: Opened,
    model: &ModelConfig,
    settings: &Settings,
    steps: usize,
) -> Result<StepResult> {
    let mut subject = Subject::new(opened, model, settings)?;
    let (trainer, batches) = (&mut subject.trainer, &subject.batches);
    let mut loss = trainer.step(batches, 0, 1e-4)?.loss;
    let mut times = Vec::with_capacity(steps);
    for number in 1..=steps as u64 {
        let begun = Instant::now();
        loss = trainer.step(batches, number, 1e-4)?.loss;
        times.push(begun.elapsed());
    }
    subject.trace.start(Mode::Times);
    trainer.step(batches, 1 + steps as u64, 1e-4)?;
    let totals = by_op(&subject.trace.stop());
    let all: f64 = totals.iter().map(|op| op.elapsed.as_secs_f64()).sum();
    let mut shares: Vec<OpShare> = totals
        .iter()
        .map(|total| OpShare {
            op: total.op,
            calls: total.count,
            seconds: total.elapsed.as_secs_f64(),
            share: total.elapsed.as_secs_f64() / all.max(1e-12),
        })
        .collect();
    shares.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let times = Times::new(&times);
    let flops: u64 = totals.iter().map(|total| total.cost.flops).sum();
    Ok(StepResult {
        times,
        tokens_per_s: settings.tokens as f64 / times.median_s,
        flops,
        flops_per_s: flops as f64 / times.median_s,
        loss,
        buffer_bytes: trainer.memory().num_bytes() as u64,
        device_bytes: subject.device_bytes,
        recompute: trainer.recomputes(),
        num_parameters: trainer.decoder().adapter.num_parameters(),
        shares,
    })
}
