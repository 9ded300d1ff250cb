//! Rotary embedding settings, in the spelling of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

use super::raw::{Raw, unsupported};
use super::{RopeConfig, RopeScaling};
use crate::error::Result;

const DEFAULT_THETA: f64 = 10_000.0;

/// `default_partial_rotary_factor` is that of the model class; only Qwen3-Next may depart from 1.
pub(super) fn rope_config(
    raw: Raw<'_>,
    head_dim: usize,
    default_partial_rotary_factor: f64,
) -> Result<RopeConfig> {
    let parameters = raw.object("rope_parameters")?;
    let theta = either(raw, parameters, "rope_theta")?.unwrap_or(DEFAULT_THETA);
    let factor = either(raw, parameters, "partial_rotary_factor")?;
    let scaling = match (parameters, raw.object("rope_scaling")?) {
        (Some(parameters), _) => rope_scaling(parameters)?,
        (None, Some(scaling)) => rope_scaling(scaling)?,
        (None, None) => RopeScaling::Default,
    };
    Ok(RopeConfig {
        theta,
        rotary_dim: rotary_dim(raw, head_dim, factor, default_partial_rotary_factor)?,
        scaling,
    })
}

/// A key of `rope_parameters` that older files have at the top; two values that differ are an error.
fn either(raw: Raw<'_>, parameters: Option<Raw<'_>>, key: &str) -> Result<Option<f64>> {
    let top = raw.positive(key)?;
    let inner = parameters.map_or(Ok(None), |parameters| parameters.positive(key))?;
    match (top, inner) {
        (Some(top), Some(inner)) if top.to_bits() != inner.to_bits() => Err(raw.error(format!(
            "`{key}` is {top}, but {inner} in `rope_parameters`; remove one"
        ))),
        _ => Ok(inner.or(top)),
    }
}

fn rotary_dim(raw: Raw<'_>, head_dim: usize, factor: Option<f64>, default: f64) -> Result<usize> {
    let factor = factor.unwrap_or(default);
    if factor > 1.0 {
        return Err(raw.error(format!(
            "`partial_rotary_factor` is {factor}, expected at most 1"
        )));
    }
    if default >= 1.0 && factor < 1.0 {
        return Err(unsupported(
            "partial_rotary_factor",
            factor,
            "this model type rotates whole heads",
        ));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a product in 0..=head_dim, truncated as the reference does"
    )]
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if rotary_dim < 2 || rotary_dim % 2 == 1 {
        return Err(raw.error(format!(
            "{rotary_dim} rotary dimensions (head_dim {head_dim} x partial_rotary_factor {factor}), expected an even number"
        )));
    }
    Ok(rotary_dim)
}

fn rope_scaling(raw: Raw<'_>) -> Result<RopeScaling> {
    let nested = ["full_attention", "sliding_attention"];
    if let Some(kind) = nested.into_iter().find(|kind| raw.has(kind)) {
        return Err(unsupported(
            "rope_parameters",
            format!("{{{kind}: ..}}"),
            "one rotary embedding serves all layers",
        ));
    }
    let positive = |key| raw.require(key, raw.positive(key)?);
    let rope_type = match raw.string("rope_type")? {
        Some(rope_type) => rope_type,
        None => raw.string("type")?.unwrap_or("default"),
    };
    if raw.has("mrope_section") {
        return Err(unsupported(
            "mrope_section",
            "[..]",
            "text positions have one axis; use a text-only model",
        ));
    }
    match rope_type {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: positive("factor")?,
        }),
        "llama3" => llama3(raw),
        other => Err(unsupported(
            "rope_type",
            other,
            "implemented are default, linear and llama3; train within the original context with `rope_scaling: null`",
        )),
    }
}

fn llama3(raw: Raw<'_>) -> Result<RopeScaling> {
    let positive = |key| raw.require(key, raw.positive(key)?);
    let (low_freq_factor, high_freq_factor) =
        (positive("low_freq_factor")?, positive("high_freq_factor")?);
    if low_freq_factor >= high_freq_factor {
        return Err(raw.error(format!(
            "`low_freq_factor` is {low_freq_factor}, expected less than `high_freq_factor` {high_freq_factor}"
        )));
    }
    Ok(RopeScaling::Llama3 {
        factor: positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: positive("original_max_position_embeddings")?,
    })
}
