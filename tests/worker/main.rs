//! The worker as a process against the simulated platform, database and storage, with the demo model on the CPU.
#![cfg(feature = "worker")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod cancel;
mod download;
mod events;
mod faults;
mod floods;
mod harness;
mod kills;
mod local;
mod memory;
mod outbox;
mod outside;
mod path;
mod probe;
mod secrets;
mod trust;
mod twins;
mod upload;
mod wire;

#[path = "../common/wire.rs"]
mod log;
