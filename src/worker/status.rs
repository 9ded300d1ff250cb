//! How far a job is: one object for the platform, the database's row and the callback.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::net::time::{iso8601, unix_seconds};
use crate::train::events::StepMetrics;

/// Metrics under the application's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// Mean loss per target token, in nats.
    pub training_loss: Option<f64>,
    /// That of the held-out data, where there are any.
    pub validation_loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: Option<f64>,
    /// Tokens per second.
    pub throughput: Option<f64>,
    /// Busy share of the GPU, in percent.
    pub gpu_utilization: Option<f64>,
    /// Norm of the gradients before clipping.
    pub gradient_norm: Option<f64>,
}

/// How far a job is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// `running`, `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    /// The application's id.
    pub job_id: String,
    /// In percent.
    pub progress: f64,
    /// Of `queued`, `initializing`, `downloading`, `preparing`, `training`, `saving`, `uploading`, `completed`.
    pub stage: &'static str,
    /// Epochs done, with fraction.
    pub current_epoch: f64,
    /// Optimizer steps done.
    pub current_step: u64,
    /// All of them; 0 where not yet known.
    pub total_steps: u64,
    /// Of the last step.
    pub metrics: Metrics,
    /// Why it failed.
    pub error_message: Option<String>,
    /// Events of progress that the callback was sent.
    #[serde(skip)]
    pub events: u64,
}

/// Progress when the first step begins and when the last one ended.
const TRAINING: (f64, f64) = (25.0, 95.0);

impl Status {
    /// A job that was just taken.
    pub fn new(job_id: &str) -> Self {
        Self {
            status: "running",
            job_id: job_id.to_owned(),
            progress: 0.0,
            stage: "initializing",
            current_epoch: 0.0,
            current_step: 0,
            total_steps: 0,
            metrics: Metrics::default(),
            error_message: None,
            events: 0,
        }
    }

    /// What an event tells, the `seq`th of job `runpod_id`.
    pub fn event(&self, runpod_id: &str, seq: u64) -> Value {
        let mut data = self.json();
        data["runpod_job_id"] = json!(runpod_id);
        data["seq"] = json!(seq);
        data
    }

    /// At `stage`, `progress` percent done.
    pub fn at(&mut self, stage: &'static str, progress: f64) {
        (self.stage, self.progress) = (stage, progress);
    }

    /// Training is about to begin or to go on.
    pub fn started(&mut self, completed: u64, total_steps: u64) {
        (self.current_step, self.total_steps) = (completed, total_steps);
        self.stage = "training";
        self.progress = self.trained();
    }

    /// A step is done.
    pub fn step(&mut self, step: &StepMetrics) {
        (self.current_step, self.current_epoch) = (step.step, step.epoch);
        self.stage = "training";
        self.progress = self.trained();
        self.metrics.training_loss = Some(step.loss);
        self.metrics.learning_rate = Some(step.learning_rate);
        self.metrics.gradient_norm = Some(step.grad_norm);
        self.metrics.throughput = Some(step.tokens_per_second);
        self.metrics.validation_loss = step.eval_loss.or(self.metrics.validation_loss);
    }

    fn trained(&self) -> f64 {
        let (from, to) = TRAINING;
        let share = self.current_step as f64 / (self.total_steps.max(1)) as f64;
        from + (to - from) * share.min(1.0)
    }

    /// As the platform and the callback get it.
    pub fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// As the row of `pipeline_training_jobs` gets it: whole numbers where the columns are.
    pub fn row(&self) -> Map<String, Value> {
        let entries = [
            ("status", json!(self.status)),
            ("progress", whole(self.progress)),
            ("current_epoch", whole(self.current_epoch.floor())),
            ("current_step", json!(self.current_step)),
            (
                "total_steps",
                some(self.total_steps > 0, json!(self.total_steps)),
            ),
            ("current_loss", finite(self.metrics.training_loss)),
            ("current_learning_rate", finite(self.metrics.learning_rate)),
            ("tokens_per_second", finite(self.metrics.throughput)),
            (
                "error_message",
                some(self.error_message.is_some(), json!(self.error_message)),
            ),
            ("updated_at", json!(iso8601(unix_seconds()))),
        ];
        let known = entries.into_iter().filter(|(_, value)| !value.is_null());
        known.map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

fn some(is_known: bool, value: Value) -> Value {
    if is_known { value } else { Value::Null }
}

fn finite(value: Option<f64>) -> Value {
    value
        .filter(|value| value.is_finite())
        .map_or(Value::Null, |value| json!(value))
}

/// A whole number, as a column of integers takes it.
#[expect(clippy::cast_possible_truncation, reason = "percents and epochs")]
pub(super) fn whole(value: f64) -> Value {
    json!(value.round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_row_has_whole_numbers_and_nothing_unknown() {
        let mut status = Status::new("j1");
        status.started(0, 3);
        let row = status.row();
        assert_eq!(row["progress"], json!(25));
        assert!(!row.contains_key("current_loss") && !row.contains_key("error_message"));
        status.step(&StepMetrics {
            step: 1,
            epoch: 0.5,
            loss: f64::INFINITY,
            learning_rate: 1e-4,
            grad_norm: 1.0,
            num_target_tokens: 3,
            tokens_per_second: 10.5,
            elapsed_s: 1.0,
            eval_loss: None,
        });
        let row = status.row();
        assert_eq!(
            (&row["progress"], &row["current_epoch"]),
            (&json!(48), &json!(0))
        );
        assert!(row["progress"].is_i64());
        assert_eq!(row["tokens_per_second"], json!(10.5));
        assert!(!row.contains_key("current_loss"));
    }
}
