//! Learning rate per step, as Hugging Face's schedulers compute it.

use crate::config::{LrScheduler, TrainConfig};

/// Warm-up, then the shape asked for.
///
/// With `w` warm-up and `n` total steps, step `k` (from 0) has `lr k / w` for `k < w`, then with
/// `p = (k - w) / (n - w)`: cosine `lr (1 + cos(pi p)) / 2`, linear `lr (1 - p)`, constant `lr`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Shape after warm-up.
    pub scheduler: LrScheduler,
    /// Peak.
    pub learning_rate: f64,
    /// Steps of warm-up.
    pub warmup_steps: usize,
    /// All steps.
    pub total_steps: usize,
}

impl Schedule {
    /// The schedule of `config` over `total_steps`.
    pub fn new(config: &TrainConfig, total_steps: usize) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a number of steps"
        )]
        let from_ratio = (config.warmup_ratio * total_steps as f64).ceil() as usize;
        Self {
            scheduler: config.lr_scheduler,
            learning_rate: config.learning_rate,
            warmup_steps: config.warmup_steps.unwrap_or(from_ratio),
            total_steps,
        }
    }

    /// Learning rate of the step after `completed` ones.
    pub fn at(&self, completed: usize) -> f64 {
        let Self {
            warmup_steps: warmup,
            total_steps: total,
            ..
        } = *self;
        if completed < warmup {
            return self.learning_rate * (completed as f64 / warmup.max(1) as f64);
        }
        let rest = total.saturating_sub(warmup).max(1) as f64;
        let progress = (completed - warmup) as f64 / rest;
        let factor = match self.scheduler {
            LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            LrScheduler::Linear => (total as f64 - completed as f64) / rest,
            LrScheduler::Constant => 1.0,
        };
        self.learning_rate * factor.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_equal_hugging_faces() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/golden/llama/golden.json"
        );
        let json: serde_json::Value =
            serde_json::from_str(&fs_err::read_to_string(path).unwrap()).unwrap();
        for (scheduler, key) in [
            (LrScheduler::Cosine, "cosine_w3_t10"),
            (LrScheduler::Linear, "linear_w3_t10"),
        ] {
            let schedule = Schedule {
                scheduler,
                learning_rate: 1e-3,
                warmup_steps: 3,
                total_steps: 10,
            };
            let expected = json["lr_schedules"][key].as_array().unwrap();
            for (step, expected) in expected.iter().enumerate() {
                let diff = (schedule.at(step) - expected.as_f64().unwrap()).abs();
                assert!(diff <= 1e-18, "{key} step {step}: off by {diff:e}");
            }
        }
    }

    #[test]
    fn odd_lengths_stay_finite() {
        for total_steps in 1..4 {
            for warmup_steps in 0..6 {
                let scheduler = LrScheduler::Linear;
                let schedule = Schedule {
                    scheduler,
                    learning_rate: 1.0,
                    warmup_steps,
                    total_steps,
                };
                for step in 0..total_steps {
                    assert!((0.0..=1.0).contains(&schedule.at(step)));
                }
            }
        }
    }
}
