//! `config.json` of Hugging Face checkpoints: what is read, and what is refused by name.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::needless_pass_by_value,
    reason = "helpers of tests"
)]

use std::path::Path;

use brightrun::config::model::{
    LinearAttentionConfig, MixerKind, MlpKind, ModelConfig, MoeConfig, RopeScaling,
};
use serde_json::{Value, json};

fn golden_text(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    std::fs::read_to_string(root.join(name).join("config.json")).unwrap()
}

fn parse(config: &Value) -> brightrun::error::Result<ModelConfig> {
    ModelConfig::from_json(&config.to_string(), "config.json")
}

/// The golden config `name` with `changes` merged in; a `"-"` removes the key.
fn with(name: &str, changes: Value) -> brightrun::error::Result<ModelConfig> {
    let mut config: Value = serde_json::from_str(&golden_text(name)).unwrap();
    let map = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value == "-" {
            map.remove(key);
        } else {
            map.insert(key.clone(), value.clone());
        }
    }
    parse(&config)
}

#[track_caller]
fn refuses(name: &str, changes: Value, message: &str) {
    let error = with(name, changes)
        .expect_err("must be refused")
        .to_string();
    assert_eq!(error, message);
}

#[test]
fn reads_the_six_golden_configs() {
    for (name, head_dim, window) in [
        ("mistral", 16, Some(24)),
        ("llama", 16, None),
        ("qwen2", 16, None),
        ("qwen3", 32, None),
        ("qwen3_moe", 32, None),
        ("qwen3_next", 32, None),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/models")
            .join(name)
            .join("config.json");
        let config = ModelConfig::from_file(path).unwrap();
        assert_eq!(config.model_type, name);
        assert_eq!(config.head_dim, head_dim, "{name}");
        assert_eq!(config.sliding_window, window, "{name}");
        assert_eq!(config.qkv_bias, name == "qwen2");
        assert_eq!(config.qk_norm, name.starts_with("qwen3"));
        assert_eq!(config.attn_output_gate, name == "qwen3_next");
        assert_eq!(config.norm_zero_centered, name == "qwen3_next");
        assert_eq!(
            config.tie_word_embeddings,
            matches!(name, "qwen2" | "qwen3")
        );
        assert_eq!(
            (config.vocab_size, config.hidden_size, config.bos_token_id),
            (288, 64, Some(285))
        );
        assert_eq!(config.max_position_embeddings, 4096);
        assert_eq!(
            config.moe.is_some(),
            name.contains("moe") || name.contains("next")
        );
    }
}

#[test]
fn reads_every_knob_of_the_hybrid_model() {
    let config = with("qwen3_next", json!({})).unwrap();
    let mixers: Vec<_> = config.layers.iter().map(|layer| layer.mixer).collect();
    let expected = [
        MixerKind::GatedDelta,
        MixerKind::GatedDelta,
        MixerKind::GatedDelta,
        MixerKind::Attention,
    ];
    assert_eq!(mixers, expected);
    assert!(config.layers.iter().all(|layer| layer.mlp == MlpKind::Moe));
    let moe = MoeConfig {
        num_experts: 8,
        num_experts_per_tok: 2,
        norm_topk_prob: true,
        moe_intermediate_size: 32,
        shared_expert_intermediate_size: Some(48),
    };
    assert_eq!(config.moe, Some(moe));
    let linear = LinearAttentionConfig {
        num_key_heads: 4,
        num_value_heads: 8,
        key_head_dim: 16,
        value_head_dim: 16,
        conv_kernel_dim: 4,
    };
    assert_eq!(config.linear_attention, Some(linear));
    assert_eq!((config.rope.theta, config.rope.rotary_dim), (1e7, 8));
}

#[test]
fn reads_rope_in_the_spelling_of_either_generation() {
    let old = with("llama", json!({})).unwrap();
    let new = with(
        "llama",
        json!({"rope_theta": "-", "rope_scaling": "-", "torch_dtype": "-", "dtype": "float32",
            "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    );
    assert_eq!(new.unwrap(), old);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64.0,
    };
    assert_eq!(old.rope.scaling, llama3);

    let old = with("qwen3_next", json!({})).unwrap();
    let new = with(
        "qwen3_next",
        json!({"rope_theta": "-", "rope_scaling": "-", "partial_rotary_factor": "-",
            "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25}}),
    );
    assert_eq!(new.unwrap(), old);

    let linear = with(
        "qwen3",
        json!({"rope_scaling": {"type": "linear", "factor": 2}}),
    )
    .unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn absent_keys_take_the_defaults_of_the_model_class() {
    let config = with(
        "llama",
        json!({"rope_theta": "-", "rms_norm_eps": "-", "head_dim": "-", "num_key_value_heads": "-", "bos_token_id": "-"}),
    );
    let config = config.unwrap();
    assert_eq!((config.rope.theta, config.rms_norm_eps), (10_000.0, 1e-6));
    assert_eq!(
        (
            config.head_dim,
            config.num_key_value_heads,
            config.bos_token_id
        ),
        (16, 4, None)
    );

    let mistral = with("mistral", json!({"sliding_window": "-"})).unwrap();
    assert_eq!(mistral.sliding_window, Some(4096));
    let mistral = with("mistral", json!({"sliding_window": null})).unwrap();
    assert_eq!(mistral.sliding_window, None);

    let norm = |name| {
        with(name, json!({"norm_topk_prob": "-"}))
            .unwrap()
            .moe
            .unwrap()
            .norm_topk_prob
    };
    assert!(!norm("qwen3_moe"));
    assert!(norm("qwen3_next"));

    let next = with(
        "qwen3_next",
        json!({"partial_rotary_factor": "-", "full_attention_interval": "-", "tie_word_embeddings": "-"}),
    );
    let next = next.unwrap();
    assert_eq!(next.rope.rotary_dim, 8);
    assert_eq!(next.layers[3].mixer, MixerKind::Attention);
    assert!(!next.tie_word_embeddings);
    assert_eq!(
        with("qwen3", json!({"head_dim": "-"})).unwrap().head_dim,
        128
    );
}

#[test]
fn layer_kinds_come_from_the_list_or_the_interval() {
    let config = with(
        "qwen3_next",
        json!({"layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"]}),
    );
    let config = config.unwrap();
    assert_eq!(config.layers[0].mixer, MixerKind::Attention);
    assert_eq!(config.layers[3].mixer, MixerKind::GatedDelta);

    let all = with("qwen3_next", json!({"full_attention_interval": 1})).unwrap();
    assert_eq!(all.linear_attention, None);

    let moe = with(
        "qwen3_moe",
        json!({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    )
    .unwrap();
    let kinds: Vec<_> = moe
        .layers
        .iter()
        .map(|layer| layer.mlp == MlpKind::Moe)
        .collect();
    assert_eq!(kinds, [false, true, false, false, false, true]);

    let dense = with("qwen3_moe", json!({"mlp_only_layers": [0, 1]})).unwrap();
    assert_eq!(dense.moe, None);
}

#[test]
fn a_window_counts_only_where_it_is_used_and_must_be_shared() {
    let window = |changes| with("qwen2", changes).map(|config| config.sliding_window);
    let unused = json!({"sliding_window": 128, "use_sliding_window": false});
    assert_eq!(window(unused).unwrap(), None);
    let all = json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 0, "layer_types": "-"});
    assert_eq!(window(all).unwrap(), Some(128));
    let none = json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 28, "layer_types": "-"});
    assert_eq!(window(none).unwrap(), None);
    refuses(
        "qwen2",
        json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 1, "layer_types": "-"}),
        "`sliding_attention: 1 of 2 layers, window 128` is not supported: all layers must share one window",
    );
    assert!(window(json!({"layer_types": ["sliding_attention", "sliding_attention"]})).is_err());
    let moe = with(
        "qwen3_moe",
        json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 28}),
    );
    assert_eq!(moe.unwrap().sliding_window, Some(8));
}

#[test]
fn refuses_known_features_that_are_not_implemented() {
    for (name, changes, what) in [
        (
            "llama",
            json!({"model_type": "gemma2"}),
            "`model_type: gemma2`",
        ),
        ("llama", json!({"text_config": {}}), "`text_config: {..}`"),
        ("llama", json!({"hidden_act": "gelu"}), "`hidden_act: gelu`"),
        (
            "qwen3",
            json!({"attention_bias": true}),
            "`attention_bias: true`",
        ),
        ("llama", json!({"mlp_bias": true}), "`mlp_bias: true`"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "`rope_type: yarn`",
        ),
        (
            "qwen3",
            json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
            "`rope_type: dynamic`",
        ),
        (
            "qwen3",
            json!({"rope_parameters": {"rope_type": "longrope"}}),
            "`rope_type: longrope`",
        ),
        (
            "qwen3",
            json!({"rope_parameters": {"full_attention": {}}}),
            "`rope_parameters: {full_attention: ..}`",
        ),
        (
            "qwen3",
            json!({"partial_rotary_factor": 0.5}),
            "`partial_rotary_factor: 0.5`",
        ),
        (
            "llama",
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "`quantization_config: gptq`",
        ),
        (
            "llama",
            json!({"attention_dropout": 0.1}),
            "`attention_dropout: 0.1`",
        ),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "`layer_types: linear_attention`",
        ),
        (
            "qwen3_next",
            json!({"use_sliding_window": true}),
            "`use_sliding_window: true`",
        ),
    ] {
        let error = with(name, changes).expect_err(what).to_string();
        assert!(
            error.starts_with(&format!("{what} is not supported: ")),
            "{error}"
        );
    }
}

#[test]
fn names_the_key_that_is_missing_or_out_of_range() {
    refuses(
        "llama",
        json!({"hidden_size": "-"}),
        "config.json: `hidden_size` is missing",
    );
    refuses(
        "mistral",
        json!({"num_key_value_heads": "-"}),
        "config.json: `num_key_value_heads` is missing",
    );
    refuses(
        "llama",
        json!({"vocab_size": "many"}),
        "config.json: `vocab_size` is \"many\", expected an integer from 1 to 1048576",
    );
    refuses(
        "llama",
        json!({"num_hidden_layers": 1025}),
        "config.json: `num_hidden_layers` is 1025, expected an integer from 1 to 1024",
    );
    refuses(
        "llama",
        json!({"num_hidden_layers": -1}),
        "config.json: `num_hidden_layers` is -1, expected an integer from 1 to 1024",
    );
    refuses(
        "llama",
        json!({"num_key_value_heads": 3}),
        "config.json: `num_attention_heads` is 4, expected a multiple of `num_key_value_heads` 3",
    );
    refuses(
        "qwen2",
        json!({"hidden_size": 66}),
        "config.json: `hidden_size` is 66, expected a multiple of `num_attention_heads` 4 where `head_dim` is absent",
    );
    refuses(
        "llama",
        json!({"head_dim": 15}),
        "config.json: 15 rotary dimensions (head_dim 15 x partial_rotary_factor 1), expected an even number",
    );
    refuses(
        "qwen3_moe",
        json!({"num_experts_per_tok": 7}),
        "config.json: `num_experts_per_tok` is 7, expected at most `num_experts` 6",
    );
    refuses(
        "qwen3_next",
        json!({"linear_num_value_heads": 6}),
        "config.json: `linear_num_value_heads` is 6, expected a multiple of `linear_num_key_heads` 4",
    );
    refuses(
        "qwen3",
        json!({"layer_types": ["full_attention"]}),
        "config.json: `layer_types` has 1 entries, expected `num_hidden_layers` 2",
    );
    refuses(
        "qwen3",
        json!({"rope_parameters": {"rope_theta": 5.0}}),
        "config.json: `rope_theta` is 1000000, but 5 in `rope_parameters`; remove one",
    );
    refuses(
        "llama",
        json!({"rope_scaling": {"rope_type": "llama3"}}),
        "config.json: `low_freq_factor` is missing",
    );
    refuses(
        "llama",
        json!({"rms_norm_eps": 0}),
        "config.json: `rms_norm_eps` is 0, expected a number above 0",
    );
}

#[test]
fn says_so_where_the_file_is_missing_or_no_json() {
    let error = ModelConfig::from_json("{", "config.json")
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("config.json: no JSON: EOF"), "{error}");
    let error = ModelConfig::from_json("[]", "config.json")
        .unwrap_err()
        .to_string();
    assert_eq!(error, "config.json: holds no JSON object");
    let error = ModelConfig::from_file("absent/config.json")
        .unwrap_err()
        .to_string();
    assert_eq!(error, "model config not found; tried absent/config.json");
}
