//! The RunPod worker: jobs from a queue, each trained by a process of its own, its adapter delivered exactly once.
//!
//! Start at [`queue::run`]; a job is an [`attempt::Attempt`]: its input ([`job`]), data ([`data`]), base model ([`base`], [`model`],
//! [`identity`]), settings that fit ([`fit`], in the trainer's process), training ([`run`], [`child`]) and delivery ([`deliver`]).
//! What outlives the process is in [`state`]. Everything but the trainer runs on one thread; the heartbeat ([`ping`]) has its own.

pub mod archive;
pub mod attempt;
pub mod base;
pub mod callback;
pub mod cancel;
pub mod child;
pub mod context;
pub mod data;
pub mod deliver;
pub mod fit;
pub mod fitness;
pub mod gpu;
pub mod identity;
pub mod job;
pub mod later;
pub mod lease;
pub mod local;
pub mod log;
pub mod model;
pub mod net;
pub mod news;
pub mod outbox;
pub mod owed;
pub mod ping;
pub mod platform;
pub mod preflight;
pub mod probe;
pub mod queue;
pub mod report;
pub mod room;
pub mod row;
pub mod run;
pub mod secret;
pub mod state;
pub mod status;
pub mod supabase;
pub mod upstream;
pub mod wanted;
mod work;
