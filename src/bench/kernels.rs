//! Each op of a training step at its true shape, against the roofline.

use std::time::Duration;

use super::goals::goal;
use super::model::{Settings, Subject, planned};
use super::{Roofline, Times};
use crate::backend::Opened;
use crate::config::model::ModelConfig;
use crate::error::{Error, Result};
use crate::ops::cost::Cost;
use crate::ops::trace::Mode;

/// An op at one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelRow {
    /// The op.
    pub op: &'static str,
    /// Extents of its arguments but the tokens.
    pub shape: String,
    /// What a call costs at least.
    pub cost: Cost,
    /// Calls in a step.
    pub calls: usize,
    /// Of a call.
    pub times: Times,
    /// Share of the measured roofline.
    pub share: f64,
    /// The share that is the goal.
    pub goal: Option<f64>,
}

/// Refuses a run that cannot be: what does not fit `opened`, layers the model does not have, a `prefix` no op of it begins with.
/// Nothing is allocated.
///
/// # Errors
/// [`Error::OutOfMemory`] and [`Error::Config`].
pub fn check(
    opened: &Opened,
    model: &ModelConfig,
    settings: &Settings,
    prefix: &str,
) -> Result<()> {
    let calls = planned(opened, model, settings)?;
    if calls.iter().any(|call| call.op.starts_with(prefix)) {
        return Ok(());
    }
    let mut ops: Vec<&str> = calls.iter().map(|call| call.op).collect();
    ops.sort_unstable();
    ops.dedup();
    Err(Error::Config {
        origin: "--op".to_owned(),
        reason: format!(
            "no op of {} begins with `{prefix}`; it has {}",
            model.model_type,
            ops.join(", ")
        ),
    })
}

/// Times every op of `steps` training steps one by one; those whose name begins with `prefix`, in the order of a step. Ops that are
/// called at one shape by several layers make one row.
///
/// # Errors
/// Those of the device; what does not fit.
pub fn kernels(
    opened: Opened,
    roofline: Roofline,
    model: &ModelConfig,
    settings: &Settings,
    steps: usize,
    prefix: &str,
) -> Result<Vec<KernelRow>> {
    let mut subject = Subject::new(opened, model, settings)?;
    let mut found: Vec<(&'static str, String, Cost, Vec<Duration>)> = Vec::new();
    // The first one warms up.
    for number in 0..=steps {
        subject.trace.start(Mode::Times);
        let completed = number as u64;
        subject.trainer.step(&subject.batches, completed, 1e-4)?;
        for call in subject.trace.stop() {
            if number == 0 || !call.op.starts_with(prefix) {
                continue;
            }
            let known = found.iter_mut().find(|(op, shape, cost, _)| {
                (*op, *cost) == (call.op, call.cost) && *shape == call.shape
            });
            match known {
                Some((.., times)) => times.push(call.elapsed),
                None => found.push((call.op, call.shape, call.cost, vec![call.elapsed])),
            }
        }
    }
    let rows = found.into_iter().map(|(op, shape, cost, times)| {
        let calls = times.len() / steps;
        let times = Times::new(&times);
        KernelRow {
            op,
            shape,
            cost,
            calls,
            times,
            share: roofline.share(cost, times),
            goal: goal(op),
        }
    });
    Ok(rows.collect())
}
