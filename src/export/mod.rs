//! Export: PEFT adapters and merged checkpoints.
