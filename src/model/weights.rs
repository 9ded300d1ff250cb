//! Hugging Face tensor names to fields: the one table.

use super::adapter::{AdapterLayout, AdapterSettings, Role};
use super::attention::Attention;
use super::block::{Block, ChannelMixer, Mixer};
use super::decoder::Decoder;
use super::gated_delta::GatedDelta;
use super::mlp::Mlp;
use super::moe::{Moe, SharedExpert};
use super::rope::Rope;
use crate::config::model::{
    LayerConfig, LinearAttentionConfig, MixerKind, MlpKind, ModelConfig, MoeConfig,
};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, DeltaSpec, Experts, Linear, NormSpec, Ops};
use crate::store::Weight;
use crate::store::quantized::{QuantizePolicy, QuantizedStore};
use crate::tensor::{DType, Tensor};

/// Where weights come from: a checkpoint, or random numbers.
pub trait WeightSource {
    /// Matrix `[out_features, in_features]`, NF4 or dense as the source decides by name.
    ///
    /// # Errors
    /// Those of the source.
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight>;

    /// Small tensor, widened to f32.
    ///
    /// # Errors
    /// Those of the source.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// Gate, up and down matrices of the experts under `prefix` (`model.layers.N.mlp.experts`), in expert order; one by one
    /// unless the source knows better.
    ///
    /// # Errors
    /// Those of the source.
    fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> Result<[Vec<Weight>; 3]> {
        let mut all = |projection: &str, out_features, in_features| -> Result<Vec<Weight>> {
            let name = |expert: usize| format!("{prefix}.{expert}.{projection}.weight");
            (0..num_experts)
                .map(|expert| self.matrix(&name(expert), out_features, in_features))
                .collect()
        };
        Ok([
            all("gate_proj", intermediate_size, hidden_size)?,
            all("up_proj", intermediate_size, hidden_size)?,
            all("down_proj", hidden_size, intermediate_size)?,
        ])
    }

    /// A table that the model made itself, where its ops read it.
    ///
    /// # Errors
    /// Those of the source.
    fn place(&mut self, tensor: Tensor) -> Result<Tensor> {
        Ok(tensor)
    }
}

/// Weights of `source` in the memory of `ops`, brought there one by one.
#[derive(Debug)]
pub struct Placed<'a, S> {
    /// Where they come from.
    pub source: &'a mut S,
    /// The device.
    pub ops: &'a dyn Ops,
}

impl<S: WeightSource> WeightSource for Placed<'_, S> {
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        let weight = self.source.matrix(name, out_features, in_features)?;
        self.ops.place_weight(weight)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.source.tensor(name, shape)?;
        self.ops.place(tensor)
    }

    fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> Result<[Vec<Weight>; 3]> {
        let experts = self
            .source
            .experts(prefix, num_experts, intermediate_size, hidden_size)?;
        self.ops.place_experts(experts)
    }

    fn place(&mut self, tensor: Tensor) -> Result<Tensor> {
        self.ops.place(tensor)
    }
}

/// Loads a model: weights from `source`, pairs for the modules `settings` names, rotary tables for `positions`.
///
/// # Errors
/// Those of the source; [`Error::Config`] for a target that names no module.
pub fn load(
    config: &ModelConfig,
    source: &mut dyn WeightSource,
    settings: AdapterSettings,
    positions: usize,
) -> Result<Decoder> {
    let mut loader = Loader {
        config,
        source,
        adapter: AdapterLayout::new(settings),
    };
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embedding = loader
        .source
        .matrix("model.embed_tokens.weight", vocab, hidden)?;
    let blocks: Result<Vec<Block>> = config
        .layers
        .iter()
        .enumerate()
        .map(|(index, layer)| loader.block(index, *layer))
        .collect();
    let blocks = blocks?;
    let final_norm = loader.source.tensor("model.norm.weight", &[hidden])?;
    let head = if config.tie_word_embeddings {
        None
    } else {
        Some(loader.source.matrix("lm_head.weight", vocab, hidden)?)
    };
    let rope = Rope::new(&config.rope, positions)?;
    let rope = Rope {
        cos: loader.source.place(rope.cos)?,
        sin: loader.source.place(rope.sin)?,
    };
    let adapter = loader.adapter;
    adapter.verify()?;
    Ok(Decoder {
        config: config.clone(),
        embedding,
        blocks,
        final_norm,
        head,
        rope,
        adapter,
    })
}

/// The adapter that `settings` give this model, without any weight.
///
/// # Errors
/// [`Error::Config`] for a target that names no module.
pub fn adapter_layout(config: &ModelConfig, settings: AdapterSettings) -> Result<AdapterLayout> {
    let mut shapes = QuantizedStore::shapes(DType::F32, QuantizePolicy::none());
    Ok(load(config, &mut shapes, settings, 1)?.adapter)
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a mut dyn WeightSource,
    adapter: AdapterLayout,
}

impl Loader<'_> {
    fn linear(&mut self, name: &str, role: Role, out: usize, cols: usize) -> Result<Linear> {
        let weight = self.source.matrix(&format!("{name}.weight"), out, cols)?;
        let lora = self.adapter.register(name, role, out, cols);
        Ok(Linear {
            weight,
            bias: None,
            lora,
            out_features: out,
            in_features: cols,
            f32_output: false,
        })
    }

    fn block(&mut self, index: usize, layer: LayerConfig) -> Result<Block> {
        let config = self.config;
        let prefix = format!("model.layers.{index}");
        let hidden = config.hidden_size;
        let input_norm = self
            .source
            .tensor(&format!("{prefix}.input_layernorm.weight"), &[hidden])?;
        let mixer = match layer.mixer {
            MixerKind::Attention => Mixer::Attention(Box::new(self.attention(&prefix)?)),
            MixerKind::GatedDelta => {
                let spec = config
                    .linear_attention
                    .as_ref()
                    .ok_or_else(|| absent("linear_attention"))?;
                Mixer::GatedDelta(Box::new(self.gated_delta(&prefix, spec)?))
            }
        };
        let norm_name = format!("{prefix}.post_attention_layernorm.weight");
        let post_attention_norm = self.source.tensor(&norm_name, &[hidden])?;
        let mlp_name = format!("{prefix}.mlp");
        let mlp = match layer.mlp {
            MlpKind::Dense => {
                let mlp = self.mlp(&mlp_name, Role::Plain, config.intermediate_size)?;
                ChannelMixer::Dense(Box::new(mlp))
            }
            MlpKind::Moe => {
                let moe = config.moe.as_ref().ok_or_else(|| absent("moe"))?;
                ChannelMixer::Moe(Box::new(self.moe(&mlp_name, moe)?))
            }
        };
        let norm = NormSpec {
            eps: config.rms_norm_eps,
            zero_centered: config.norm_zero_centered,
        };
        Ok(Block {
            input_norm,
            mixer,
            post_attention_norm,
            mlp,
            norm,
        })
    }

    fn attention(&mut self, prefix: &str) -> Result<Attention> {
        let config = self.config;
        let (hidden, hd) = (config.hidden_size, config.head_dim);
        let norm = NormSpec {
            eps: config.rms_norm_eps,
            zero_centered: config.norm_zero_centered,
        };
        let spec = AttentionSpec {
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: hd,
            output_gate: config.attn_output_gate,
            sliding_window: config.sliding_window,
            qk_norm: config.qk_norm.then_some(norm),
            rotary_dim: config.rope.rotary_dim,
        };
        let q_dim = config.num_attention_heads * spec.q_head_stride();
        let k_dim = config.num_key_value_heads * hd;
        let mut projection = |name: &str, out: usize, cols: usize, bias: bool| -> Result<Linear> {
            let name = format!("{prefix}.self_attn.{name}");
            let mut linear = self.linear(&name, Role::Plain, out, cols)?;
            if bias {
                linear.bias = Some(self.source.tensor(&format!("{name}.bias"), &[out])?);
            }
            Ok(linear)
        };
        let q_proj = projection("q_proj", q_dim, hidden, config.qkv_bias)?;
        let k_proj = projection("k_proj", k_dim, hidden, config.qkv_bias)?;
        let v_proj = projection("v_proj", k_dim, hidden, config.qkv_bias)?;
        let o_proj = projection("o_proj", hidden, config.num_attention_heads * hd, false)?;
        let mut norm = |name: &str| {
            let name = format!("{prefix}.self_attn.{name}.weight");
            config
                .qk_norm
                .then(|| self.source.tensor(&name, &[hd]))
                .transpose()
        };
        let (q_norm, k_norm) = (norm("q_norm")?, norm("k_norm")?);
        Ok(Attention {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            q_norm,
            k_norm,
            spec,
        })
    }

    fn gated_delta(&mut self, prefix: &str, config: &LinearAttentionConfig) -> Result<GatedDelta> {
        let hidden = self.config.hidden_size;
        let spec = DeltaSpec {
            num_key_heads: config.num_key_heads,
            num_value_heads: config.num_value_heads,
            key_head_dim: config.key_head_dim,
            value_head_dim: config.value_head_dim,
            conv_kernel_dim: config.conv_kernel_dim,
            eps: self.config.rms_norm_eps,
        };
        let name = |field: &str| format!("{prefix}.linear_attn.{field}");
        let (heads, taps, channels) = (
            config.num_value_heads,
            config.conv_kernel_dim,
            spec.conv_dim(),
        );
        let conv = self
            .source
            .tensor(&name("conv1d.weight"), &[channels, 1, taps])?;
        Ok(GatedDelta {
            in_proj_qkvz: self.linear(
                &name("in_proj_qkvz"),
                Role::Plain,
                spec.qkvz_dim(),
                hidden,
            )?,
            in_proj_ba: self.linear(&name("in_proj_ba"), Role::Plain, 2 * heads, hidden)?,
            conv: conv.reshaped(&[channels, taps])?,
            a_log: self.source.tensor(&name("A_log"), &[heads])?,
            dt_bias: self.source.tensor(&name("dt_bias"), &[heads])?,
            norm: self
                .source
                .tensor(&name("norm.weight"), &[config.value_head_dim])?,
            out_proj: self.linear(&name("out_proj"), Role::Plain, hidden, spec.value_dim())?,
            spec,
        })
    }

    fn mlp(&mut self, prefix: &str, role: Role, width: usize) -> Result<Mlp> {
        let hidden = self.config.hidden_size;
        Ok(Mlp {
            gate_proj: self.linear(&format!("{prefix}.gate_proj"), role, width, hidden)?,
            up_proj: self.linear(&format!("{prefix}.up_proj"), role, width, hidden)?,
            down_proj: self.linear(&format!("{prefix}.down_proj"), role, hidden, width)?,
        })
    }

    /// A router or gate: never a target, its logits in f32.
    fn router(&mut self, name: &str, out: usize) -> Result<Linear> {
        let hidden = self.config.hidden_size;
        let weight = self.source.matrix(&format!("{name}.weight"), out, hidden)?;
        Ok(Linear {
            weight,
            bias: None,
            lora: None,
            out_features: out,
            in_features: hidden,
            f32_output: true,
        })
    }

    fn moe(&mut self, prefix: &str, config: &MoeConfig) -> Result<Moe> {
        let (hidden, width) = (self.config.hidden_size, config.moe_intermediate_size);
        let experts_name = format!("{prefix}.experts");
        let router = self.router(&format!("{prefix}.gate"), config.num_experts)?;
        let [gate, up, down] =
            self.source
                .experts(&experts_name, config.num_experts, width, hidden)?;
        let lora = self
            .adapter
            .register_experts(&experts_name, config.num_experts, width, hidden);
        let experts = Experts {
            gate,
            up,
            down,
            lora,
            hidden_size: hidden,
            intermediate_size: width,
        };
        let shared = match config.shared_expert_intermediate_size {
            None => None,
            Some(width) => {
                let name = format!("{prefix}.shared_expert");
                let mlp = self.mlp(&name, Role::SharedExpert, width)?;
                let gate = self.router(&format!("{prefix}.shared_expert_gate"), 1)?;
                Some(SharedExpert { mlp, gate })
            }
        };
        let num_experts_per_tok = config.num_experts_per_tok;
        let norm_topk_prob = config.norm_topk_prob;
        Ok(Moe {
            router,
            experts,
            shared,
            num_experts_per_tok,
            norm_topk_prob,
        })
    }
}

fn absent(section: &str) -> Error {
    Error::Unsupported {
        what: format!("a layer that needs `{section}`"),
        why: "the model config has no such section".to_owned(),
    }
}

impl WeightSource for QuantizedStore {
    fn matrix(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Weight> {
        self.matrix(name, out_features, in_features)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.tensor(name, shape)
    }

    fn experts(
        &mut self,
        prefix: &str,
        num_experts: usize,
        intermediate_size: usize,
        hidden_size: usize,
    ) -> Result<[Vec<Weight>; 3]> {
        self.experts(prefix, num_experts, intermediate_size, hidden_size)
    }
}
