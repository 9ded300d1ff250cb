//! Training: the step, the optimizer, checkpoints, metrics.

pub mod trainer;
