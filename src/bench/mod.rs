//! Benchmarks without a checkpoint: a model's true shape with random weights, each op against the roofline of the device,
//! and whole training steps. `docs/benchmarks.md` says what the columns mean.

mod goals;
mod kernels;
mod model;
pub mod report;
mod roofline;
mod step;
mod weights;

pub use self::kernels::{KernelRow, check, kernels};
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
        // Between two times by how near it is to each.
        let at = |quarter: usize| {
            let whole = (seconds.len().max(1) - 1) * quarter;
            let (below, part) = (whole / 4, (whole % 4) as f64 / 4.0);
            let get = |index: usize| seconds.get(index).copied();
            let low = get(below).unwrap_or(0.0);
            low + part * (get(below + 1).unwrap_or(low) - low)
        };
        let [first, median, third] = [1, 2, 3].map(at);
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
        let times = Times::new(&[Duration::from_secs(4), Duration::from_secs(2)]);
        assert!((times.median_s - 3.0).abs() < 1e-12);
        assert!((times.iqr_s - 1.0).abs() < 1e-12);
    }
}
