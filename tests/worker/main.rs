//! The worker as a process against the simulated platform, database and storage, with the demo model on the CPU.
#![cfg(feature = "worker")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod cancel;
mod faults;
mod harness;
mod kills;
mod local;
mod memory;
mod path;
mod wire;

#[path = "../common/wire.rs"]
mod log;
