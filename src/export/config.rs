//! `adapter_config.json`, as PEFT reads it.

use serde_json::{Map, Value, json};

use super::{Adapter, PeftVersion};
use crate::config::MoeLora;
use crate::error::{Error, Result};

/// The last PEFT version whose files these are like.
const PEFT_VERSION: &str = "0.18.1";

/// The config of `adapter` on `base_model_id`.
///
/// # Errors
/// [`Error::Unsupported`] where transformers 5 cannot hold the adapter.
pub(super) fn adapter_config(
    adapter: &Adapter<'_>,
    base_model_id: &str,
    version: PeftVersion,
) -> Result<Value> {
    let settings = adapter.layout.settings();
    let targets = match version {
        PeftVersion::Transformers4 => Targets {
            modules: settings.target_modules.clone(),
            exclude: excluded(settings.moe_lora),
            ..Targets::default()
        },
        PeftVersion::Transformers5 => fused_targets(adapter)?,
    };
    let has_parameters = !targets.parameters.is_empty();
    let rank = adapter.file_rank();
    let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
    if targets.fuses_gate_up {
        // Gate and up lie side by side in one parameter: twice the rank, and twice the alpha to keep the scaling. With
        // rank-stabilised scaling, alpha / sqrt(rank) asks for sqrt(2) times the alpha.
        let key = ".*\\.gate_up_proj".to_owned();
        let factor = if settings.use_rslora {
            std::f64::consts::SQRT_2
        } else {
            2.0
        };
        rank_pattern.insert(key.clone(), json!(2 * rank));
        alpha_pattern.insert(key, number(factor * settings.alpha));
    }
    // PEFT refuses dropout on parameters; at inference there is none.
    let dropout = if has_parameters {
        0.0
    } else {
        settings.dropout
    };
    let parameters = if has_parameters {
        json!(targets.parameters)
    } else {
        Value::Null
    };
    Ok(json!({
        "alpha_pattern": alpha_pattern,
        "auto_mapping": null,
        "base_model_name_or_path": base_model_id,
        "bias": "none",
        "exclude_modules": targets.exclude,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": number(settings.alpha),
        "lora_bias": false,
        "lora_dropout": dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": null,
        "target_modules": targets.modules,
        "target_parameters": parameters,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": settings.use_rslora,
    }))
}

#[derive(Default)]
struct Targets {
    modules: Vec<String>,
    parameters: Vec<String>,
    exclude: Option<&'static str>,
    fuses_gate_up: bool,
}

/// A pattern for modules that the target list names but that have no adapter.
fn excluded(moe_lora: MoeLora) -> Option<&'static str> {
    match moe_lora {
        MoeLora::All => None,
        MoeLora::SharedOnly => Some(".*\\.mlp\\.experts\\..*"),
        MoeLora::None => Some(".*\\.mlp\\.(experts|shared_expert)\\..*"),
    }
}

/// transformers 5 holds the experts of a layer in two parameters; PEFT names parameters apart from modules.
fn fused_targets(adapter: &Adapter<'_>) -> Result<Targets> {
    let mut targets = Targets::default();
    let add = |list: &mut Vec<String>, name: &str| {
        if !list.iter().any(|known| known == name) {
            list.push(name.to_owned());
        }
    };
    let names = || {
        adapter
            .layout
            .modules()
            .iter()
            .map(|module| module.name.as_str())
    };
    for name in names() {
        let last = name.rsplit('.').next().unwrap_or(name);
        if name.contains(".mlp.experts.") {
            let parameter = if last == "down_proj" {
                "down_proj"
            } else {
                "gate_up_proj"
            };
            targets.fuses_gate_up |= parameter == "gate_up_proj";
            add(&mut targets.parameters, &format!("mlp.experts.{parameter}"));
        } else if name.contains(".mlp.shared_expert.") {
            add(
                &mut targets.parameters,
                &format!("mlp.shared_expert.{last}.weight"),
            );
        } else if adapter.layout.has_experts() && name.contains(".mlp.") {
            // A dense layer among expert layers: as a module, PEFT would take it for the experts.
            add(&mut targets.parameters, &format!("{name}.weight"));
        } else {
            add(&mut targets.modules, last);
        }
    }
    let has = |projection: &str| {
        names().any(|name| name.contains(".mlp.experts.") && name.ends_with(projection))
    };
    let (gate, up, down) = (has(".gate_proj"), has(".up_proj"), has(".down_proj"));
    if gate != up || gate && !down {
        return Err(Error::Unsupported {
            what: "the format `peft5` for this adapter".to_owned(),
            why: "transformers 5 holds gate_proj and up_proj of the experts in one parameter, which PEFT 0.21 \
                  loads only with both and with down_proj; use `--format peft` or `merged`"
                .to_owned(),
        });
    }
    Ok(targets)
}

/// Whole numbers as whole numbers: PEFT's own files have `"lora_alpha": 32`.
fn number(value: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
    if value.fract() == 0.0 && value.abs() < 1e9 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{AdapterLayout, AdapterSettings, Role};

    /// The config for transformers 5 of a model whose first layer is dense and whose second has experts.
    fn config_of(targets: &[&str], moe_lora: MoeLora) -> Result<Value> {
        let mut layout = AdapterLayout::new(AdapterSettings {
            rank: 2,
            expert_rank: 2,
            alpha: 4.0,
            dropout: 0.0,
            use_rslora: false,
            target_modules: targets.iter().map(|&name| name.to_owned()).collect(),
            moe_lora,
        });
        for name in ["gate_proj", "up_proj", "down_proj"] {
            layout.register(&format!("model.layers.0.mlp.{name}"), Role::Plain, 8, 8);
        }
        layout.register_experts("model.layers.1.mlp.experts", 2, 8, 8);
        let values = vec![0.0; layout.len()];
        let adapter = Adapter {
            layout: &layout,
            values: &values,
        };
        adapter_config(&adapter, "org/model", PeftVersion::Transformers5)
    }

    #[test]
    fn a_dense_layer_among_experts_is_named_by_parameter() {
        let all = ["gate_proj", "up_proj", "down_proj"];
        let dense = json!([
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
        ]);
        let config = config_of(&all, MoeLora::None).unwrap();
        assert_eq!(config["target_parameters"], dense);
        assert_eq!(config["target_modules"], json!([]));
        let config = config_of(&all, MoeLora::All).unwrap();
        let parameters = config["target_parameters"].as_array().unwrap();
        assert_eq!(parameters[..3], dense.as_array().unwrap()[..]);
        assert_eq!(
            parameters[3..],
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        );
    }

    #[test]
    fn what_peft_would_load_in_part_is_refused() {
        for targets in [
            &["gate_proj", "up_proj"][..],
            &["gate_proj"],
            &["up_proj", "down_proj"],
        ] {
            let error = config_of(targets, MoeLora::All).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("use `--format peft` or `merged`"),
                "{error}"
            );
            // Without adapters on the experts there is nothing to fuse.
            config_of(targets, MoeLora::None).unwrap();
        }
        config_of(&["down_proj"], MoeLora::All).unwrap();
    }
}
