//! A training job as the application sends it: its input checked, its base model found and identified, its settings made to fit.
//!
//! Start at [`job::Job::parse`]; then [`model::resolve`], [`identity::check`], [`job::Job::train_config`] and [`fit::fit`].
//! Nothing here talks to a network.

pub mod fit;
pub mod identity;
pub mod job;
pub mod model;
pub mod wanted;

/// Bytes as people read them.
fn gb(num_bytes: u64) -> String {
    match num_bytes {
        0..1_000_000_000 => format!("{:.1} MB", num_bytes as f64 / 1e6),
        _ => format!("{:.2} GB", num_bytes as f64 / 1e9),
    }
}
