//! A Hugging Face checkpoint: safetensors files mapped into memory, tensors by name.
