//! From the keys of `config.json` to a [`ModelConfig`]; absent keys take the default of the model's Hugging Face class.

use std::path::Path;

use serde_json::Value;

use super::raw::{Raw, unsupported};
use super::rope::rope_config;
use super::{LayerConfig, LinearAttentionConfig, MixerKind, MlpKind, ModelConfig, MoeConfig};
use crate::error::{Error, Result};

const MAX_LAYERS: usize = 1024;
const MAX_VOCAB: usize = 1 << 20;
const MAX_WIDTH: usize = 65_536;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_HEADS: usize = 4096;
const MAX_EXPERTS: usize = 65_536;
const MAX_CONTEXT: usize = 1 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Mistral,
    Llama,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Qwen3Next,
}

impl Family {
    const NAMES: &'static str = "mistral, llama, qwen2, qwen3, qwen3_moe, qwen3_next";

    fn of(model_type: &str) -> Result<Self> {
        Ok(match model_type {
            "mistral" => Self::Mistral,
            "llama" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "qwen3_moe" => Self::Qwen3Moe,
            "qwen3_next" => Self::Qwen3Next,
            other => {
                let why = format!("implemented are {}", Self::NAMES);
                return Err(unsupported("model_type", other, &why));
            }
        })
    }

    fn has_qk_norm(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe | Self::Qwen3Next)
    }

    /// `head_dim` of the class, where it does not follow from the other widths.
    fn default_head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::Qwen3Next => Some(256),
            Self::Mistral | Self::Llama | Self::Qwen2 | Self::Qwen3Moe => None,
        }
    }
}

pub(super) fn model_config(text: &str, origin: &Path) -> Result<ModelConfig> {
    let value: Value = serde_json::from_str(text)
        .map_err(|error| Error::format(origin, format!("no JSON: {error}")))?;
    let Value::Object(map) = &value else {
        return Err(Error::format(origin, "holds no JSON object"));
    };
    let raw = Raw::new(map, origin);
    let model_type = raw.require("model_type", raw.string("model_type")?)?;
    if raw.has("text_config") {
        let why = format!(
            "`{model_type}` wraps a text model; use a text-only checkpoint of type {}",
            Family::NAMES
        );
        return Err(unsupported("text_config", "{..}", &why));
    }
    let family = Family::of(model_type)?;
    refuse_unimplemented(raw, family)?;
    decoder(raw, family, model_type)
}

fn refuse_unimplemented(raw: Raw<'_>, family: Family) -> Result<()> {
    if let Some(config) = raw.object("quantization_config")? {
        let method = config.string("quant_method")?.unwrap_or("unnamed");
        let why = "the base is quantised already; point at the bf16, f16 or f32 checkpoint, NF4 is made while loading";
        return Err(unsupported("quantization_config", method, why));
    }
    if let Some(act) = raw.string("hidden_act")?.filter(|act| *act != "silu") {
        return Err(unsupported("hidden_act", act, "the MLP is SwiGLU (`silu`)"));
    }
    for key in ["attention_bias", "mlp_bias"] {
        // Qwen2 has its q, k and v biases whatever this key says.
        let is_ignored = family == Family::Qwen2 && key == "attention_bias";
        if raw.bool(key)? == Some(true) && !is_ignored {
            return Err(unsupported(
                key,
                true,
                "this model type is implemented without it",
            ));
        }
    }
    if raw.bool("attn_output_gate")? == Some(false) && family == Family::Qwen3Next {
        return Err(unsupported(
            "attn_output_gate",
            false,
            "qwen3_next always has the gate",
        ));
    }
    if let Some(rate) = raw.number("attention_dropout")?.filter(|rate| *rate != 0.0) {
        return Err(unsupported(
            "attention_dropout",
            rate,
            "set it to 0; use `lora_dropout`",
        ));
    }
    Ok(())
}

fn decoder(raw: Raw<'_>, family: Family, model_type: &str) -> Result<ModelConfig> {
    let num_hidden_layers = raw.count("num_hidden_layers", MAX_LAYERS)?;
    let hidden_size = raw.count("hidden_size", MAX_WIDTH)?;
    let (num_attention_heads, num_key_value_heads) = heads(raw, family)?;
    let head_dim = head_dim(raw, family, hidden_size, num_attention_heads)?;
    let mixers = mixers(raw, family, num_hidden_layers)?;
    let moe = moe(raw, family)?;
    let mlps = mlps(raw, moe.as_ref(), num_hidden_layers)?;
    let has = |kind| mlps.contains(&kind);
    let intermediate_size = raw.integer("intermediate_size", 1, MAX_INTERMEDIATE)?;
    let intermediate_size = if has(MlpKind::Dense) {
        raw.require("intermediate_size", intermediate_size)?
    } else {
        intermediate_size.unwrap_or(0)
    };
    let partial_rotary_factor = if family == Family::Qwen3Next {
        0.25
    } else {
        1.0
    };
    Ok(ModelConfig {
        model_type: model_type.to_owned(),
        vocab_size: raw.count("vocab_size", MAX_VOCAB)?,
        hidden_size,
        intermediate_size,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        qkv_bias: family == Family::Qwen2,
        qk_norm: family.has_qk_norm(),
        attn_output_gate: family == Family::Qwen3Next,
        sliding_window: sliding_window(raw, family, num_hidden_layers)?,
        rope: rope_config(raw, head_dim, partial_rotary_factor)?,
        rms_norm_eps: rms_norm_eps(raw)?,
        norm_zero_centered: family == Family::Qwen3Next,
        tie_word_embeddings: raw.bool("tie_word_embeddings")?.unwrap_or(false),
        moe: moe.filter(|_| has(MlpKind::Moe)),
        linear_attention: if mixers.contains(&MixerKind::GatedDelta) {
            Some(linear_attention(raw)?)
        } else {
            None
        },
        bos_token_id: bos_token_id(raw)?,
        max_position_embeddings: raw.count("max_position_embeddings", MAX_CONTEXT)?,
        layers: mixers
            .into_iter()
            .zip(mlps)
            .map(|(mixer, mlp)| LayerConfig { mixer, mlp })
            .collect(),
    })
}

fn heads(raw: Raw<'_>, family: Family) -> Result<(usize, usize)> {
    let query = raw.count("num_attention_heads", MAX_HEADS)?;
    let key_value = match raw.integer("num_key_value_heads", 1, MAX_HEADS)? {
        None if family == Family::Llama => query,
        found => raw.require("num_key_value_heads", found)?,
    };
    if !query.is_multiple_of(key_value) {
        return Err(raw.error(format!(
            "`num_attention_heads` is {query}, expected a multiple of `num_key_value_heads` {key_value}"
        )));
    }
    Ok((query, key_value))
}

fn head_dim(raw: Raw<'_>, family: Family, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let written = raw.integer("head_dim", 1, MAX_WIDTH)?;
    if let Some(head_dim) = written.or(family.default_head_dim()) {
        return Ok(head_dim);
    }
    if !hidden_size.is_multiple_of(num_heads) {
        return Err(raw.error(format!(
            "`hidden_size` is {hidden_size}, expected a multiple of `num_attention_heads` {num_heads} where `head_dim` is absent"
        )));
    }
    Ok(hidden_size / num_heads)
}

fn rms_norm_eps(raw: Raw<'_>) -> Result<f32> {
    let eps = raw.positive("rms_norm_eps")?.unwrap_or(1e-6);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "f32 is the precision it is used in"
    )]
    Ok(eps as f32)
}

fn bos_token_id(raw: Raw<'_>) -> Result<Option<u32>> {
    let id = raw.integer("bos_token_id", 0, MAX_VOCAB)?;
    Ok(id.and_then(|id| u32::try_from(id).ok()))
}

fn layer_types(raw: Raw<'_>, num_layers: usize) -> Result<Option<Vec<&str>>> {
    let Some(list) = raw.array("layer_types")? else {
        return Ok(None);
    };
    if list.len() != num_layers {
        return Err(raw.error(format!(
            "`layer_types` has {} entries, expected `num_hidden_layers` {num_layers}",
            list.len()
        )));
    }
    let kinds = list.iter().map(|kind| {
        let name = kind.as_str().unwrap_or_default();
        match name {
            "full_attention" | "sliding_attention" | "linear_attention" => Ok(name),
            _ => {
                let why = "implemented are full_attention, sliding_attention and linear_attention";
                Err(unsupported("layer_types", kind, why))
            }
        }
    });
    kinds.collect::<Result<Vec<_>>>().map(Some)
}

fn mixers(raw: Raw<'_>, family: Family, num_layers: usize) -> Result<Vec<MixerKind>> {
    let is_hybrid = family == Family::Qwen3Next;
    if let Some(types) = layer_types(raw, num_layers)? {
        let foreign = if is_hybrid {
            "sliding_attention"
        } else {
            "linear_attention"
        };
        if types.contains(&foreign) {
            return Err(unsupported(
                "layer_types",
                foreign,
                "not part of this model type",
            ));
        }
        return Ok(types
            .into_iter()
            .map(|kind| match kind {
                "linear_attention" => MixerKind::GatedDelta,
                _ => MixerKind::Attention,
            })
            .collect());
    }
    if !is_hybrid {
        return Ok(vec![MixerKind::Attention; num_layers]);
    }
    let interval = raw
        .integer("full_attention_interval", 1, MAX_LAYERS)?
        .unwrap_or(4);
    let mixer = |layer: usize| match (layer + 1) % interval {
        0 => MixerKind::Attention,
        _ => MixerKind::GatedDelta,
    };
    Ok((0..num_layers).map(mixer).collect())
}

/// The window of all attention layers; one that holds for some layers only is refused.
fn sliding_window(raw: Raw<'_>, family: Family, num_layers: usize) -> Result<Option<usize>> {
    let window = raw.integer("sliding_window", 1, MAX_CONTEXT)?;
    let window = match family {
        Family::Llama | Family::Qwen3Next => {
            if raw.bool("use_sliding_window")? == Some(true) {
                return Err(unsupported(
                    "use_sliding_window",
                    true,
                    "not part of this model type",
                ));
            }
            None
        }
        // The class has 4096 unless the file says otherwise; `null` is otherwise.
        Family::Mistral if !raw.has("sliding_window") => Some(4096),
        Family::Mistral => window,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => {
            if raw.bool("use_sliding_window")?.unwrap_or(false) {
                window
            } else {
                None
            }
        }
    };
    let num_sliding = num_sliding_layers(raw, family, window, num_layers)?;
    let follows_layer_types = matches!(family, Family::Qwen2 | Family::Qwen3);
    match (window, num_sliding) {
        (None, 0) => Ok(None),
        (Some(_), 0) if follows_layer_types => Ok(None),
        (Some(window), all) if all == num_layers => Ok(Some(window)),
        (window, some) => {
            let window = window.map_or_else(|| "null".to_owned(), |window| window.to_string());
            let found = format!("{some} of {num_layers} layers, window {window}");
            Err(unsupported(
                "sliding_attention",
                found,
                "all layers must share one window",
            ))
        }
    }
}

fn num_sliding_layers(
    raw: Raw<'_>,
    family: Family,
    window: Option<usize>,
    num_layers: usize,
) -> Result<usize> {
    if let Some(types) = layer_types(raw, num_layers)? {
        return Ok(types
            .iter()
            .filter(|kind| **kind == "sliding_attention")
            .count());
    }
    if window.is_none() {
        return Ok(0);
    }
    if !matches!(family, Family::Qwen2 | Family::Qwen3) {
        return Ok(num_layers);
    }
    let full = raw
        .integer("max_window_layers", 0, MAX_CONTEXT)?
        .unwrap_or(28);
    Ok(num_layers.saturating_sub(full))
}

fn moe(raw: Raw<'_>, family: Family) -> Result<Option<MoeConfig>> {
    let is_next = family == Family::Qwen3Next;
    if !is_next && family != Family::Qwen3Moe {
        return Ok(None);
    }
    let num_experts = match raw.integer("num_experts", 0, MAX_EXPERTS)? {
        Some(0) => return Ok(None),
        Some(count) => count,
        None => raw.require(
            "num_experts",
            raw.integer("num_local_experts", 1, MAX_EXPERTS)?,
        )?,
    };
    let num_experts_per_tok = raw.count("num_experts_per_tok", MAX_EXPERTS)?;
    if num_experts_per_tok > num_experts {
        return Err(raw.error(format!(
            "`num_experts_per_tok` is {num_experts_per_tok}, expected at most `num_experts` {num_experts}"
        )));
    }
    Ok(Some(MoeConfig {
        num_experts,
        num_experts_per_tok,
        norm_topk_prob: raw.bool("norm_topk_prob")?.unwrap_or(is_next),
        moe_intermediate_size: raw.count("moe_intermediate_size", MAX_INTERMEDIATE)?,
        shared_expert_intermediate_size: if is_next {
            Some(raw.count("shared_expert_intermediate_size", MAX_INTERMEDIATE)?)
        } else {
            None
        },
    }))
}

fn mlps(raw: Raw<'_>, moe: Option<&MoeConfig>, num_layers: usize) -> Result<Vec<MlpKind>> {
    if moe.is_none() {
        return Ok(vec![MlpKind::Dense; num_layers]);
    }
    let step = raw
        .integer("decoder_sparse_step", 1, MAX_LAYERS)?
        .unwrap_or(1);
    let dense = raw.array("mlp_only_layers")?.unwrap_or_default();
    let dense = dense.iter().map(|layer| {
        let index = layer.as_u64().and_then(|index| usize::try_from(index).ok());
        index.filter(|index| *index < num_layers).ok_or_else(|| {
            raw.error(format!(
                "`mlp_only_layers` names layer {layer} of {num_layers}"
            ))
        })
    });
    let dense = dense.collect::<Result<Vec<_>>>()?;
    let kind = |layer: usize| {
        if dense.contains(&layer) || !(layer + 1).is_multiple_of(step) {
            MlpKind::Dense
        } else {
            MlpKind::Moe
        }
    };
    Ok((0..num_layers).map(kind).collect())
}

fn linear_attention(raw: Raw<'_>) -> Result<LinearAttentionConfig> {
    let num_key_heads = raw.count("linear_num_key_heads", MAX_HEADS)?;
    let num_value_heads = raw.count("linear_num_value_heads", MAX_HEADS)?;
    if !num_value_heads.is_multiple_of(num_key_heads) {
        return Err(raw.error(format!(
            "`linear_num_value_heads` is {num_value_heads}, expected a multiple of `linear_num_key_heads` {num_key_heads}"
        )));
    }
    Ok(LinearAttentionConfig {
        num_key_heads,
        num_value_heads,
        key_head_dim: raw.count("linear_key_head_dim", MAX_WIDTH)?,
        value_head_dim: raw.count("linear_value_head_dim", MAX_WIDTH)?,
        conv_kernel_dim: raw.count("linear_conv_kernel_dim", 64)?,
    })
}
