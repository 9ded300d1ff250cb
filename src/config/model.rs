//! `config.json` of a Hugging Face checkpoint, read into the knobs of one decoder.
//!
//! Foreign file: unknown keys are accepted, but a known feature that is not implemented is refused by name.
//! Start at [`ModelConfig::from_file`].

mod parse;
mod raw;
mod rope;

use std::path::Path;

use crate::error::{Error, Result};

/// Shape and behaviour of a decoder-only language model.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent knobs of one decoder, named as in the papers"
)]
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the file, for messages.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of a dense MLP.
    pub intermediate_size: usize,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of an attention head.
    pub head_dim: usize,
    /// q, k and v projections have a bias (Qwen2).
    pub qkv_bias: bool,
    /// q and k are normalised per head before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// `q_proj` also yields an output gate, interleaved per head (Qwen3-Next).
    pub attn_output_gate: bool,
    /// Keys a query sees: itself and `sliding_window - 1` before it; `None`: all (Mistral v0.1).
    pub sliding_window: Option<usize>,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Norm weight is stored as an offset from one (Qwen3-Next).
    pub norm_zero_centered: bool,
    /// The head shares the embedding's weight.
    pub tie_word_embeddings: bool,
    /// Mixture of experts, where some layer has one.
    pub moe: Option<MoeConfig>,
    /// Gated DeltaNet, where some layer has one.
    pub linear_attention: Option<LinearAttentionConfig>,
    /// `bos_token_id`, where the file names one.
    pub bos_token_id: Option<u32>,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`Error::Missing`] without the file; else as [`Self::from_json`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            return Err(Error::Missing {
                what: "model config".to_owned(),
                tried: vec![path.to_owned()],
            });
        }
        Self::from_json(&fs_err::read_to_string(path)?, path)
    }

    /// Reads the text of a `config.json`; `origin` names it in messages.
    ///
    /// # Errors
    /// [`Error::Format`] where the text is no JSON object, a key is missing, has the wrong type or is out of range;
    /// [`Error::Unsupported`] where it asks for a model this engine does not compute.
    pub fn from_json(text: &str, origin: impl AsRef<Path>) -> Result<Self> {
        parse::model_config(text, origin.as_ref())
    }
}

/// What one layer is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Token mixer.
    pub mixer: MixerKind,
    /// Channel mixer.
    pub mlp: MlpKind,
}

/// Token mixer of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixerKind {
    /// Softmax attention.
    Attention,
    /// Gated DeltaNet.
    GatedDelta,
}

/// Channel mixer of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// One SwiGLU.
    Dense,
    /// Routed SwiGLU experts.
    Moe,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that rotate (`head_dim` unless partial).
    pub rotary_dim: usize,
    /// Change of the frequencies.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, middle ones blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` stay.
        high_freq_factor: f64,
        /// Context the model was first trained for.
        original_max_position_embeddings: f64,
    },
}

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeConfig {
    /// Routed experts.
    pub num_experts: usize,
    /// Experts a token goes through.
    pub num_experts_per_tok: usize,
    /// Divide the chosen experts' weights by their sum.
    pub norm_topk_prob: bool,
    /// Width of a routed expert.
    pub moe_intermediate_size: usize,
    /// Width of the shared expert, where there is one.
    pub shared_expert_intermediate_size: Option<usize>,
}

/// Gated DeltaNet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearAttentionConfig {
    /// Heads of q and k.
    pub num_key_heads: usize,
    /// Heads of v, z, beta and g; a multiple of `num_key_heads`.
    pub num_value_heads: usize,
    /// Width of a q or k head.
    pub key_head_dim: usize,
    /// Width of a v head.
    pub value_head_dim: usize,
    /// Taps of the causal convolution.
    pub conv_kernel_dim: usize,
}
