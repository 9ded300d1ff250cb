//! The standalone benchmark: a model's true shape with random weights; no checkpoint, no data.
#![expect(clippy::print_stderr, reason = "the one place that prints")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brightrun::backend::{self, Opened};
use brightrun::bench::{self, KernelRow, Kernels, Settings, StepResult};
use brightrun::config::model::ModelConfig;
use brightrun::config::{Device, Env, TrainConfig};
use brightrun::error::{Error, Result};
use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

/// Times the ops of a training step against the device's roofline, or whole steps, on random weights of a model's true shape.
#[derive(Debug, Parser)]
#[command(name = "brightrun-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Each op of a training step at its true shape: time, bandwidth, arithmetic, share of the measured roofline.
    Kernels {
        #[command(flatten)]
        shape: Shape,
        /// Only ops whose name begins with this.
        #[arg(long, value_name = "PREFIX", default_value = "")]
        op: String,
    },
    /// Whole training steps: tokens in a second, memory, where the time goes.
    Step {
        #[command(flatten)]
        shape: Shape,
    },
}

#[derive(Debug, Args)]
struct Shape {
    /// auto, cpu, emu, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device)]
    device: Device,
    /// qwen3-next-80b, qwen2.5-0.5b, or a config.json or its directory.
    #[arg(long, default_value = "qwen3-next-80b")]
    model: String,
    /// Small extents, with every op still there: seconds on a CPU. By default on devices other than CUDA.
    #[arg(long)]
    small: bool,
    /// True extents also on devices other than CUDA.
    #[arg(long, conflicts_with = "small")]
    full: bool,
    /// Layers; by default all for `step`, as many as there are kinds (4) for `kernels`.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Tokens of a pass; by default 16384, or 64 with small extents.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,
    /// Tokens of a sequence; by default 4096, or 32 with small extents.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    sequence_len: Option<u32>,
    /// Steps that are timed, after one that warms up.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// qlora or lora.
    #[arg(long, default_value = "qlora")]
    adapter: String,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 16)]
    lora_r: u32,
    /// all, `shared_only` or none.
    #[arg(long, default_value = "all")]
    moe_lora: String,
    /// adamw or `adamw_8bit`.
    #[arg(long, default_value = "adamw_8bit")]
    optimizer: String,
    /// fp32 or bf16; by default bf16 on devices with CUDA kernels.
    #[arg(long)]
    lora_dtype: Option<String>,
    /// auto, full or none.
    #[arg(long, default_value = "auto")]
    recompute: String,
    /// Write the results to this file too, as JSON.
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
}

fn device(text: &str) -> Result<Device, String> {
    Device::parse(text).ok_or_else(|| "expected auto, cpu, emu, cuda or cuda:N".to_owned())
}

/// What is measured, on what.
struct Run {
    opened: Opened,
    model: ModelConfig,
    settings: Settings,
    is_small: bool,
}

impl Shape {
    fn run(&self, default_layers: Option<usize>) -> Result<Run> {
        let opened = backend::open(self.device, &Env::read())?;
        let is_cuda = opened.ops.free_memory()?.is_some();
        let is_small = self.small || !(is_cuda || self.full);
        let model = bench::model(&self.model, is_small)?;
        let narrow = opened.info.is_some();
        let lora_dtype = self
            .lora_dtype
            .clone()
            .unwrap_or_else(|| if narrow { "bf16" } else { "fp32" }.to_owned());
        let sets = [
            format!("adapter={}", self.adapter),
            format!("lora_r={}", self.lora_r),
            format!("moe_lora={}", self.moe_lora),
            format!("optimizer={}", self.optimizer),
            format!("lora_dtype={lora_dtype}"),
            format!("recompute={}", self.recompute),
        ];
        let text = "base_model: none\ndatasets: [{path: none}]\noutput_dir: none\n";
        let config = TrainConfig::from_yaml(text, Path::new("arguments"), &sets)?;
        let given = |given: Option<u32>, small: usize, full: usize| {
            given.map_or(if is_small { small } else { full }, |given| given as usize)
        };
        let tokens = given(self.tokens, 64, 16_384);
        let layers = default_layers.map(|layers| layers.min(model.layers.len()));
        Ok(Run {
            opened,
            settings: Settings {
                config,
                tokens,
                sequence_len: given(self.sequence_len, 32, 4096).min(tokens),
                layers: self.layers.or(layers),
            },
            model,
            is_small,
        })
    }

    /// What was measured, for machines.
    fn describe(&self, mode: &str, device: &str, settings: &Settings, is_small: bool) -> Value {
        json!({
            "mode": mode,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("BRIGHTRUN_COMMIT"),
            "device": device,
            "model": self.model,
            "small": is_small,
            "layers": settings.layers,
            "tokens": settings.tokens,
            "sequence_len": settings.sequence_len,
            "steps": self.steps,
            "adapter": self.adapter,
            "lora_r": self.lora_r,
            "moe_lora": self.moe_lora,
            "optimizer": self.optimizer,
            "lora_dtype": settings.config.lora_dtype,
        })
    }

    fn write(&self, value: &Value) -> Result<()> {
        match &self.json {
            Some(path) => Ok(fs_err::write(path, format!("{value:#}\n"))?),
            None => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Kernels { shape, op } => kernels(&shape, &op),
        Command::Step { shape } => step(&shape),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn kernels(shape: &Shape, prefix: &str) -> Result<()> {
    let run = shape.run(Some(4))?;
    let settings = &run.settings;
    let found = bench::kernels(
        run.opened,
        &run.model,
        settings,
        shape.steps as usize,
        prefix,
    )?;
    if found.rows.is_empty() {
        return Err(Error::Config {
            origin: "--op".to_owned(),
            reason: format!("no op of this model begins with `{prefix}`; without it all are timed"),
        });
    }
    let mut all = shape.describe("kernels", &found.device, settings, run.is_small);
    all["bandwidth_bytes_per_s"] = json!(found.roofline.bandwidth);
    all["flops_per_s"] = json!(found.roofline.flops);
    all["rows"] = found.rows.iter().map(row_json).collect();
    print(&kernels_text(&found, settings));
    shape.write(&all)
}

fn row_json(row: &KernelRow) -> Value {
    json!({
        "op": row.op,
        "calls": row.calls,
        "flops": row.cost.flops,
        "bytes": row.cost.bytes,
        "median_ms": 1e3 * row.times.median_s,
        "iqr_ms": 1e3 * row.times.iqr_s,
        "gb_per_s": row.cost.bytes as f64 / row.times.median_s / 1e9,
        "tflop_per_s": row.cost.flops as f64 / row.times.median_s / 1e12,
        "share_of_roofline": row.share,
    })
}

fn kernels_text(found: &Kernels, settings: &Settings) -> String {
    let mut text = format!(
        "{}\nroofline: {:.1} GB/s, {:.3} TFLOP/s, measured; {} tokens in sequences of {}\n{:<26}{:>6}{:>11}{:>10}{:>11}{:>11}{:>10}{:>11}{:>8}\n",
        found.device,
        found.roofline.bandwidth / 1e9,
        found.roofline.flops / 1e12,
        settings.tokens,
        settings.sequence_len,
        "op",
        "calls",
        "GFLOP",
        "MB",
        "ms",
        "iqr ms",
        "GB/s",
        "TFLOP/s",
        "share",
    );
    for row in &found.rows {
        let seconds = row.times.median_s;
        text.push_str(&format!(
            "{:<26}{:>6}{:>11.3}{:>10.2}{:>11.3}{:>11.3}{:>10.1}{:>11.3}{:>7.0}%\n",
            row.op,
            row.calls,
            row.cost.flops as f64 / 1e9,
            row.cost.bytes as f64 / 1e6,
            1e3 * seconds,
            1e3 * row.times.iqr_s,
            row.cost.bytes as f64 / seconds / 1e9,
            row.cost.flops as f64 / seconds / 1e12,
            1e2 * row.share,
        ));
    }
    text
}

fn step(shape: &Shape) -> Result<()> {
    let run = shape.run(None)?;
    let settings = &run.settings;
    let found = bench::step(run.opened, &run.model, settings, shape.steps as usize)?;
    let mut all = shape.describe("step", &found.device, settings, run.is_small);
    let shares = found.shares.iter().map(|share| {
        json!({"op": share.op, "calls": share.calls, "seconds": share.seconds, "share": share.share})
    });
    let results = json!({
        "median_ms": 1e3 * found.times.median_s,
        "iqr_ms": 1e3 * found.times.iqr_s,
        "tokens_per_s": found.tokens_per_s,
        "step_flops": found.flops,
        "tflop_per_s": found.flops_per_s / 1e12,
        "loss": found.loss,
        "num_parameters": found.num_parameters,
        "recompute": found.recompute,
        "buffer_bytes": found.buffer_bytes,
        "device_bytes": found.device_bytes,
        "rows": shares.collect::<Vec<_>>(),
    });
    if let (Some(all), Some(results)) = (all.as_object_mut(), results.as_object()) {
        all.extend(results.clone());
    }
    print(&step_text(&found, settings));
    shape.write(&all)
}

fn step_text(found: &StepResult, settings: &Settings) -> String {
    let mut text = format!(
        "{}\n{} tokens in sequences of {}, {} adapter parameters, activations {}\n\
         step      {:.2} ms (iqr {:.2})\n\
         speed     {:.0} tokens/s, {:.3} TFLOP/s\n\
         memory    {:.1} MB taken, {:.1} MB of them buffers\n\
         loss      {:.4}\n{:<26}{:>6}{:>11}{:>8}\n",
        found.device,
        settings.tokens,
        settings.sequence_len,
        found.num_parameters,
        if found.recompute {
            "recomputed"
        } else {
            "kept"
        },
        1e3 * found.times.median_s,
        1e3 * found.times.iqr_s,
        found.tokens_per_s,
        found.flops_per_s / 1e12,
        found.device_bytes as f64 / 1e6,
        found.buffer_bytes as f64 / 1e6,
        found.loss,
        "op",
        "calls",
        "ms",
        "share",
    );
    for share in &found.shares {
        text.push_str(&format!(
            "{:<26}{:>6}{:>11.3}{:>7.1}%\n",
            share.op,
            share.calls,
            1e3 * share.seconds,
            1e2 * share.share
        ));
    }
    text
}

/// Prints to standard output; a reader that went away is no error.
fn print(text: &str) {
    let _ = write!(std::io::stdout().lock(), "{text}");
}
