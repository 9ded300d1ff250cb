//! The worker's network parts against small servers of this test: hostile URLs, cuts, floods, partitions.

#![cfg(feature = "worker")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod callback;
mod cuts;
mod fetch;
mod guard;
mod gzip;
mod refusals;
mod rows;
mod serve;
mod store;
mod upload;
