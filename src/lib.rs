//! QLoRA fine-tuning of language models, mixture-of-experts included, on one GPU or on the CPU.
//!
//! ```text
//! config.json + *.safetensors --mmap--> store::Checkpoint --quantize--> store::QuantizedStore (NF4 codes + absmax)
//!     --> model::{Decoder, Block, ...} --calls--> ops::Ops --> backend::cpu
//! jsonl --> data::records --> data::template (chat) --> data::sequences --> data::pack --> Batch
//! train::Trainer::step(batch) --> train::checkpoint (resume) --> export::adapter (PEFT)
//! ```

pub mod backend;
pub mod bench;
pub mod config;
pub mod data;
pub mod durable;
pub mod error;
pub mod export;
pub mod hex;
#[cfg(feature = "worker")]
pub mod http;
pub mod model;
pub mod ops;
pub mod plan;
pub mod random;
pub mod selftest;
#[cfg(feature = "worker")]
pub mod sim;
pub mod store;
pub mod tensor;
pub mod train;
#[cfg(feature = "worker")]
pub mod worker;
