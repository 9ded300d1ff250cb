//! Training: the step, the optimizer, checkpoints, metrics.

pub mod buffers;
pub mod checkpoint;
pub mod events;
mod loading;
pub mod memory;
mod metrics;
mod prepare;
mod run;
pub mod schedule;
mod stop;
pub mod trainer;

pub use prepare::{Lengths, Prepared};
pub use run::{Outcome, check_device, run, summary_of};
pub use stop::StopFlag;
