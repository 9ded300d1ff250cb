//! What a run tells while it goes on.

use std::path::PathBuf;

use serde::Serialize;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, serde::Deserialize)]
pub struct StepMetrics {
    /// Optimizer step, from 1.
    pub step: u64,
    /// Epochs done, with fraction.
    pub epoch: f64,
    /// Mean loss per target token, in nats, before the update.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Target tokens of the step.
    pub num_target_tokens: usize,
    /// All tokens of the step per second.
    pub tokens_per_second: f64,
    /// Seconds trained so far, interruptions left out.
    pub elapsed_s: f64,
    /// Mean loss per target token of the held-out data, where evaluated.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// For a person to read.
    Note {
        /// Text.
        text: String,
    },
    /// For a person to heed.
    Warning {
        /// Text.
        text: String,
    },
    /// Base weights are being read; told every few seconds.
    Loading {
        /// Layer it is at, from 1.
        layer: usize,
        /// All layers.
        num_layers: usize,
    },
    /// The first step is about to begin.
    Started {
        /// Steps done in an earlier run.
        completed: u64,
        /// All steps.
        total_steps: u64,
    },
    /// A step is done.
    Step(StepMetrics),
    /// A checkpoint was written.
    Saved {
        /// Where.
        path: PathBuf,
    },
    /// The adapter was written.
    Exported {
        /// Where.
        path: PathBuf,
    },
}

/// Receives the events of a run.
pub trait Observer {
    /// Called on the training thread; must not block for long.
    fn event(&mut self, event: &Event);
}

impl<F: FnMut(&Event)> Observer for F {
    fn event(&mut self, event: &Event) {
        self(event);
    }
}
