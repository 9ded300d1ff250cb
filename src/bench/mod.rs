//! Benchmarks without a checkpoint: a model's true shape with random weights, each op against the roofline of the device,
//! and whole training steps. `docs/benchmarks.md` says what the columns mean.

mod kernels;
mod model;
mod roofline;
mod step;
mod weights;

pub use self::kernels::{KernelRow, Kernels, kernels};
pub use self::model::{Settings, model};
pub use self::roofline::Roofline;
pub use self::step::{OpShare, StepResult, step};

use std::time::Duration;

/// Median and spread of a few times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// Median, in seconds.
    pub median_s: f64,
    /// Distance from the first quartile to the third, in seconds.
    pub iqr_s: f64,
}

impl Times {
    /// Those of `times`, at least one.
    pub fn new(times: &[Duration]) -> Self {
        let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        seconds.sort_by(f64::total_cmp);
        let at = |quarter: usize| seconds.get((seconds.len() - 1) * quarter / 4).copied();
        let [first, median, third] = [1, 2, 3].map(|quarter| at(quarter).unwrap_or(0.0));
        Self {
            median_s: median,
            iqr_s: third - first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_quartiles_are_those_of_the_sorted_times() {
        let times = [50, 10, 40, 20, 30].map(Duration::from_secs);
        let times = Times::new(&times);
        assert!((times.median_s - 30.0).abs() < 1e-12);
        assert!((times.iqr_s - 20.0).abs() < 1e-12);
        assert!(Times::new(&[Duration::from_secs(3)]).iqr_s.abs() < 1e-12);
    }
}
