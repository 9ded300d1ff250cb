//! Settings of a run: the YAML a user writes, checked once into a [`TrainConfig`] that holds no doubt.

mod env;
mod file;
pub mod model;
mod reader;
mod secret;

pub use env::{Env, RunpodEnv, WorkerEnv, variable_names};
pub use reader::setting_name;
#[cfg(feature = "worker")]
pub(crate) use reader::{number, shown};
pub use secret::Secret;

use std::path::PathBuf;

use serde::Serialize;

/// Everything a training run is told, validated; every field is documented with unit and default.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches, named as users know them"
)]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// Hub id or directory in Hugging Face layout (`config.json`, safetensors, `tokenizer.json`).
    pub base_model: String,
    /// Id written into the adapter as its base. `null`: `base_model` if that is an id, else what `config.json` names.
    pub base_model_id: Option<String>,
    /// Data set files, in order.
    pub datasets: Vec<DatasetSource>,
    /// Directory the run writes into.
    pub output_dir: PathBuf,
    /// `qlora`: NF4 base weights; `lora`: base weights as stored. Default `qlora`.
    pub adapter: AdapterKind,
    /// Quantise the NF4 absmax to 8 bits as well. Default true.
    pub bnb_4bit_use_double_quant: bool,
    /// LoRA rank. Default 16.
    pub lora_r: usize,
    /// LoRA alpha; scaling is `alpha / r` (`alpha / sqrt(r)` with `use_rslora`). Default 32.
    pub lora_alpha: f64,
    /// Dropout on the LoRA input, `0 <= p < 1`. Default 0.05.
    pub lora_dropout: f64,
    /// Module name suffixes that get an adapter. Default: the seven projections.
    pub lora_target_modules: Vec<String>,
    /// PEFT adapter directory to start from.
    pub init_adapter: Option<PathBuf>,
    /// Module name suffixes stored as NF4; `null`: the default list.
    pub quantize_modules: Option<Vec<String>>,
    /// Which mixture-of-experts modules get an adapter. Default `all`.
    pub moe_lora: MoeLora,
    /// Rank of the routed experts' adapters; `null`: `lora_r`.
    pub lora_expert_r: Option<usize>,
    /// Rank-stabilised scaling. Default false.
    pub use_rslora: bool,
    /// Element type of exported adapter tensors. Default `bf16`.
    pub adapter_dtype: AdapterDType,
    /// Element type of the adapter while it is trained. Default `fp32`; `bf16` on a GPU.
    pub lora_dtype: LoraDType,
    /// Longest sequence in tokens. Default 4096.
    pub sequence_len: usize,
    /// Run the sequences of a micro-batch in one pass, without padding. Default true.
    pub sample_packing: bool,
    /// Fold the pairs of one conversation into one sequence with several targets. Default true.
    pub fold_conversations: bool,
    /// Train on prompts too. Default false.
    pub train_on_inputs: bool,
    /// Target turns in a micro-batch. Default 4.
    pub micro_batch_size: usize,
    /// Micro-batches in an optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data. Default 3. Not used when `max_steps` is set.
    pub num_epochs: usize,
    /// Run exactly this many optimizer steps, over as many epochs as they take; `null`: `num_epochs` epochs.
    pub max_steps: Option<usize>,
    /// Shuffle each epoch. Default true.
    pub shuffle: bool,
    /// Peak learning rate. Default 1e-4.
    pub learning_rate: f64,
    /// Shape of the schedule after warm-up. Default `cosine`.
    pub lr_scheduler: LrScheduler,
    /// Warm-up as a share of all steps. Default 0.1. Not used when `warmup_steps` is set.
    pub warmup_ratio: f64,
    /// Warm-up in steps; `null`: from `warmup_ratio`.
    pub warmup_steps: Option<usize>,
    /// Default `adamw`.
    pub optimizer: Optimizer,
    /// Default 0.9.
    pub adam_beta1: f64,
    /// Default 0.999.
    pub adam_beta2: f64,
    /// Default 1e-8.
    pub adam_epsilon: f64,
    /// Decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// Clip the global gradient norm to this; 0 turns clipping off. Default 1.
    pub max_grad_norm: f64,
    /// Held-out share (below 1) or number (1 and above) of conversations. Default 0.
    pub val_set_size: f64,
    /// Evaluate every so many steps besides each epoch's end; `null`: epoch ends only.
    pub eval_steps: Option<usize>,
    /// Seed of initialisation, shuffling, split and dropout. Default 42.
    pub seed: u64,
    /// Where to run. Default `auto`.
    pub device: Device,
    /// Keep all activations, or recompute each layer's in backward. Default `auto`.
    pub recompute: Recompute,
    /// Save every so many optimizer steps (and at each epoch's end). Default 100.
    pub save_steps: usize,
    /// Save after so many minutes since the last save. Default 10.
    pub save_minutes: f64,
    /// Checkpoints kept. Default 2.
    pub save_total_limit: usize,
    /// Where to go on from. Default `auto`.
    pub resume_from_checkpoint: Resume,
    /// Jinja chat template file that replaces the model's own.
    pub chat_template: Option<PathBuf>,
}

/// One data set file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatasetSource {
    /// File.
    pub path: PathBuf,
    /// Format; `auto` looks at each record.
    #[serde(rename = "type")]
    pub kind: DatasetType,
}

macro_rules! config_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }
        impl $name {
            /// Spellings accepted in a config, in the order of the variants.
            pub const NAMES: &'static [&'static str] = &[$($text),+];
            /// All variants, in the same order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// The spelling used in configs and logs.
            pub fn name(self) -> &'static str { match self { $(Self::$variant => $text),+ } }
        }
    };
}

config_enum!(
    /// Kind of fine-tuning.
    AdapterKind {
        /// NF4 base weights.
        Qlora = "qlora",
        /// Base weights as stored.
        Lora = "lora",
    }
);
config_enum!(
    /// Mixture-of-experts modules that get an adapter.
    MoeLora {
        /// Routed experts and shared expert.
        All = "all",
        /// Shared expert only.
        SharedOnly = "shared_only",
        /// Neither.
        None = "none",
    }
);
config_enum!(
    /// Element type of exported adapter tensors.
    AdapterDType {
        /// bfloat16.
        Bf16 = "bf16",
        /// IEEE half.
        F16 = "f16",
        /// IEEE single.
        F32 = "f32",
    }
);
config_enum!(
    /// Element type of the adapter while it is trained; gradients stay in f32.
    LoraDType {
        /// IEEE single.
        Fp32 = "fp32",
        /// bfloat16, rounded stochastically by the optimizer.
        Bf16 = "bf16",
    }
);
config_enum!(
    /// Learning rate after warm-up.
    LrScheduler {
        /// Half a cosine down to zero.
        Cosine = "cosine",
        /// Straight down to zero.
        Linear = "linear",
        /// Stays.
        Constant = "constant",
    }
);
config_enum!(
    /// Optimizer.
    Optimizer {
        /// `AdamW` with f32 states.
        Adamw = "adamw",
        /// `AdamW` with block-wise 8-bit states.
        Adamw8bit = "adamw_8bit",
    }
);
config_enum!(
    /// Activation recompute.
    Recompute {
        /// `none` if the activations fit, else `full`.
        Auto = "auto",
        /// Keep only each layer's input.
        Full = "full",
        /// Keep everything.
        None = "none",
    }
);
config_enum!(
    /// Data set format.
    DatasetType {
        /// Look at each record.
        Auto = "auto",
        /// The application's pair JSONL or full JSON.
        Pairs = "pairs",
        /// `{conversation_id, turns: [{role, content}]}`.
        Turns = "turns",
        /// `{messages: [{role, content}]}`.
        Messages = "messages",
        /// `{conversations: [{from, value}]}`.
        Sharegpt = "sharegpt",
        /// `{instruction, input?, output}`.
        Alpaca = "alpaca",
        /// `{prompt, completion}`.
        PromptCompletion = "prompt_completion",
        /// `{text}`.
        Text = "text",
        /// `{input_ids, labels?}`.
        Tokens = "tokens",
    }
);

/// Where a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// CUDA where a GPU is there, else the CPU.
    Auto,
    /// The CPU backend.
    Cpu,
    /// The CUDA kernels on the emulated device.
    Emu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl Device {
    /// `auto`, `cpu`, `emu`, `cuda` (the first) or `cuda:N`.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Cpu,
            "emu" => Self::Emu,
            "cuda" => Self::Cuda(0),
            other => Self::Cuda(other.strip_prefix("cuda:")?.parse().ok()?),
        })
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Cpu => serializer.serialize_str("cpu"),
            Self::Emu => serializer.serialize_str("emu"),
            Self::Cuda(ordinal) => serializer.serialize_str(&format!("cuda:{ordinal}")),
        }
    }
}

/// Where a run goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// The newest good checkpoint of `output_dir`, if there is one.
    Auto,
    /// Start afresh.
    Never,
    /// This checkpoint.
    Path(PathBuf),
}

impl Serialize for Resume {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Never => serializer.serialize_str("none"),
            Self::Path(path) => path.serialize(serializer),
        }
    }
}
