//! Shapes of models that people train, as their publishers' `config.json` have them.

use serde_json::Value;

/// A published model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    /// Its hub id.
    pub(super) id: &'static str,
    shape: Shape,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape {
    model_type: &'static str,
    hidden_size: u64,
    num_layers: u64,
    vocab_size: u64,
    /// Where it tells versions apart.
    rope_theta: Option<f64>,
}

const fn shape(
    model_type: &'static str,
    hidden_size: u64,
    num_layers: u64,
    vocab_size: u64,
) -> Shape {
    Shape {
        model_type,
        hidden_size,
        num_layers,
        vocab_size,
        rope_theta: None,
    }
}

const fn with_theta(shape: Shape, rope_theta: f64) -> Shape {
    Shape {
        rope_theta: Some(rope_theta),
        ..shape
    }
}

const MISTRAL_7B: Shape = shape("mistral", 4096, 32, 32_000);
const MISTRAL_7B_V01: Shape = with_theta(MISTRAL_7B, 1e4);
const MISTRAL_7B_V02: Shape = with_theta(MISTRAL_7B, 1e6);
const MISTRAL_7B_V03: Shape = with_theta(shape("mistral", 4096, 32, 32_768), 1e6);
const LLAMA3_1B: Shape = shape("llama", 2048, 16, 128_256);
const LLAMA3_3B: Shape = shape("llama", 3072, 28, 128_256);
const LLAMA3_8B: Shape = shape("llama", 4096, 32, 128_256);
const LLAMA3_70B: Shape = shape("llama", 8192, 80, 128_256);
const QWEN2_0_5B: Shape = shape("qwen2", 896, 24, 151_936);
const QWEN2_1_5B: Shape = shape("qwen2", 1536, 28, 151_936);
const QWEN2_3B: Shape = shape("qwen2", 2048, 36, 151_936);
const QWEN2_7B: Shape = shape("qwen2", 3584, 28, 152_064);
const QWEN2_14B: Shape = shape("qwen2", 5120, 48, 152_064);
const QWEN2_32B: Shape = shape("qwen2", 5120, 64, 152_064);
const QWEN2_72B: Shape = shape("qwen2", 8192, 80, 152_064);
const QWEN3_0_6B: Shape = shape("qwen3", 1024, 28, 151_936);
const QWEN3_1_7B: Shape = shape("qwen3", 2048, 28, 151_936);
const QWEN3_4B: Shape = shape("qwen3", 2560, 36, 151_936);
const QWEN3_8B: Shape = shape("qwen3", 4096, 36, 151_936);
const QWEN3_14B: Shape = shape("qwen3", 5120, 40, 151_936);
const QWEN3_32B: Shape = shape("qwen3", 5120, 64, 151_936);
const QWEN3_30B_A3B: Shape = shape("qwen3_moe", 2048, 48, 151_936);
const QWEN3_235B_A22B: Shape = shape("qwen3_moe", 4096, 94, 151_936);
const QWEN3_NEXT_80B: Shape = shape("qwen3_next", 2048, 48, 151_936);

const KNOWN: &[(&str, Shape)] = &[
    ("mistralai/Mistral-7B-v0.1", MISTRAL_7B_V01),
    ("mistralai/Mistral-7B-Instruct-v0.1", MISTRAL_7B_V01),
    ("mistralai/Mistral-7B-Instruct-v0.2", MISTRAL_7B_V02),
    ("mistralai/Mistral-7B-v0.3", MISTRAL_7B_V03),
    ("mistralai/Mistral-7B-Instruct-v0.3", MISTRAL_7B_V03),
    ("meta-llama/Meta-Llama-3-8B", LLAMA3_8B),
    ("meta-llama/Meta-Llama-3-8B-Instruct", LLAMA3_8B),
    ("meta-llama/Meta-Llama-3-70B", LLAMA3_70B),
    ("meta-llama/Meta-Llama-3-70B-Instruct", LLAMA3_70B),
    ("meta-llama/Llama-3.1-8B", LLAMA3_8B),
    ("meta-llama/Llama-3.1-8B-Instruct", LLAMA3_8B),
    ("meta-llama/Llama-3.1-70B", LLAMA3_70B),
    ("meta-llama/Llama-3.1-70B-Instruct", LLAMA3_70B),
    ("meta-llama/Llama-3.2-1B", LLAMA3_1B),
    ("meta-llama/Llama-3.2-1B-Instruct", LLAMA3_1B),
    ("meta-llama/Llama-3.2-3B", LLAMA3_3B),
    ("meta-llama/Llama-3.2-3B-Instruct", LLAMA3_3B),
    ("meta-llama/Llama-3.3-70B-Instruct", LLAMA3_70B),
    ("Qwen/Qwen2.5-0.5B", QWEN2_0_5B),
    ("Qwen/Qwen2.5-0.5B-Instruct", QWEN2_0_5B),
    ("Qwen/Qwen2.5-1.5B", QWEN2_1_5B),
    ("Qwen/Qwen2.5-1.5B-Instruct", QWEN2_1_5B),
    ("Qwen/Qwen2.5-3B", QWEN2_3B),
    ("Qwen/Qwen2.5-3B-Instruct", QWEN2_3B),
    ("Qwen/Qwen2.5-7B", QWEN2_7B),
    ("Qwen/Qwen2.5-7B-Instruct", QWEN2_7B),
    ("Qwen/Qwen2.5-14B", QWEN2_14B),
    ("Qwen/Qwen2.5-14B-Instruct", QWEN2_14B),
    ("Qwen/Qwen2.5-32B", QWEN2_32B),
    ("Qwen/Qwen2.5-32B-Instruct", QWEN2_32B),
    ("Qwen/Qwen2.5-72B", QWEN2_72B),
    ("Qwen/Qwen2.5-72B-Instruct", QWEN2_72B),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", QWEN2_7B),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", QWEN2_14B),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", QWEN2_32B),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", LLAMA3_8B),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", LLAMA3_70B),
    (
        "deepseek-ai/DeepSeek-V3",
        shape("deepseek_v3", 7168, 61, 129_280),
    ),
    ("Qwen/Qwen3-0.6B", QWEN3_0_6B),
    ("Qwen/Qwen3-0.6B-Base", QWEN3_0_6B),
    ("Qwen/Qwen3-1.7B", QWEN3_1_7B),
    ("Qwen/Qwen3-1.7B-Base", QWEN3_1_7B),
    ("Qwen/Qwen3-4B", QWEN3_4B),
    ("Qwen/Qwen3-4B-Base", QWEN3_4B),
    ("Qwen/Qwen3-4B-Instruct-2507", QWEN3_4B),
    ("Qwen/Qwen3-8B", QWEN3_8B),
    ("Qwen/Qwen3-8B-Base", QWEN3_8B),
    ("Qwen/Qwen3-14B", QWEN3_14B),
    ("Qwen/Qwen3-14B-Base", QWEN3_14B),
    ("Qwen/Qwen3-32B", QWEN3_32B),
    ("Qwen/Qwen3-30B-A3B", QWEN3_30B_A3B),
    ("Qwen/Qwen3-30B-A3B-Base", QWEN3_30B_A3B),
    ("Qwen/Qwen3-30B-A3B-Instruct-2507", QWEN3_30B_A3B),
    ("Qwen/Qwen3-235B-A22B", QWEN3_235B_A22B),
    ("Qwen/Qwen3-Next-80B-A3B-Instruct", QWEN3_NEXT_80B),
    ("Qwen/Qwen3-Next-80B-A3B-Thinking", QWEN3_NEXT_80B),
];

fn all() -> impl Iterator<Item = Known> {
    KNOWN.iter().map(|(id, shape)| Known { id, shape: *shape })
}

/// The model of that id, in any case; one without organisation by its name.
pub(super) fn find(id: &str) -> Option<Known> {
    if id.contains('/') {
        all().find(|known| known.id.eq_ignore_ascii_case(id))
    } else {
        find_name(id)
    }
}

/// The model of that name, in any case.
pub(super) fn find_name(name: &str) -> Option<Known> {
    all().find(|known| {
        let own = known.id.rsplit('/').next();
        own.is_some_and(|own| own.eq_ignore_ascii_case(name))
    })
}

impl Known {
    /// Models that a config may be of.
    pub(super) fn all_like(config: &Value) -> impl Iterator<Item = &'static str> {
        let like = all().filter(|known| known.differences(config).is_empty());
        like.map(|known| known.id)
    }

    /// What in `config` is not as it is with this model.
    pub(super) fn differences(self, config: &Value) -> Vec<String> {
        let own = &self.shape;
        let mut found = Vec::new();
        let model_type = config["model_type"].as_str().unwrap_or("absent");
        if model_type != own.model_type {
            let expected = own.model_type;
            found.push(format!("`model_type` is {model_type}, expected {expected}"));
        }
        let sizes = [
            ("hidden_size", own.hidden_size),
            ("num_hidden_layers", own.num_layers),
            ("vocab_size", own.vocab_size),
        ];
        for (key, expected) in sizes {
            if config[key].as_u64() != Some(expected) {
                found.push(format!("`{key}` is {}, expected {expected}", config[key]));
            }
        }
        let theta = config["rope_theta"].as_f64();
        let theta = theta.or_else(|| config["rope_parameters"]["rope_theta"].as_f64());
        if let (Some(expected), Some(found_theta)) = (own.rope_theta, theta)
            && (expected - found_theta).abs() > 0.5
        {
            let text = format!("`rope_theta` is {found_theta}, expected {expected}");
            found.push(text);
        }
        found
    }
}
