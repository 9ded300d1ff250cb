//! The standalone benchmark: a model's true shape with random weights; no checkpoint, no data.
#![expect(clippy::print_stderr, reason = "the one place that prints")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brightrun::backend::{self, Opened};
use brightrun::bench::{self, Roofline, Settings, report};
use brightrun::config::model::ModelConfig;
use brightrun::config::{Device, Env, TrainConfig};
use brightrun::data::calendar::Date;
use brightrun::durable::{Durable, partial_of};
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
    /// qwen3-next-80b, mistral-7b, qwen2.5-0.5b, or a config.json or its directory; by default qwen3-next-80b, for `kernels` also
    /// mistral-7b. `kernels` takes several.
    #[arg(long, value_delimiter = ',')]
    model: Vec<String>,
    /// Small extents, with every op still there: seconds on a CPU. By default on devices other than CUDA.
    #[arg(long)]
    small: bool,
    /// True extents also on devices other than CUDA.
    #[arg(long, conflicts_with = "small")]
    full: bool,
    /// Layers; by default all for `step`, as many as there are kinds (at most 4) for `kernels`.
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
    model_name: String,
    model: ModelConfig,
    settings: Settings,
    is_small: bool,
}

impl Shape {
    fn open(&self) -> Result<Opened> {
        backend::open(self.device, &Env::read())
    }

    /// The runs on `opened`, of `default_models` where no other is wanted and at most `default_layers`.
    fn runs(
        &self,
        opened: &Opened,
        default_models: &[&str],
        default_layers: usize,
    ) -> Result<Vec<Run>> {
        let is_cuda = opened.ops.free_memory()?.is_some();
        let is_small = self.small || !(is_cuda || self.full);
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
        let mut models: Vec<&str> = self.model.iter().map(String::as_str).collect();
        if models.is_empty() {
            models = default_models.to_vec();
        }
        let run = |name: &&str| {
            let model = bench::model(name, is_small)?;
            Ok(Run {
                model_name: (*name).to_owned(),
                settings: Settings {
                    config: config.clone(),
                    tokens,
                    sequence_len: given(self.sequence_len, 32, 4096).min(tokens),
                    layers: self
                        .layers
                        .unwrap_or(model.layers.len().min(default_layers)),
                },
                model,
                is_small,
            })
        };
        models.iter().map(run).collect()
    }

    /// What was measured, for machines.
    fn describe(&self, mode: &str, opened: &Opened, runs: &[Run]) -> Value {
        let first = runs.first();
        let models: Vec<Value> = runs
            .iter()
            .map(|run| json!({"model": run.model_name, "layers": run.settings.layers}))
            .collect();
        let (year, month, day) = Date::today().civil();
        json!({
            "mode": mode,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": option_env!("BRIGHTRUN_COMMIT"),
            "date": format!("{year}-{month:02}-{day:02}"),
            "device": opened.note,
            "device_name": device_name(opened),
            "models": models,
            "small": first.map(|run| run.is_small),
            "tokens": first.map(|run| run.settings.tokens),
            "sequence_len": first.map(|run| run.settings.sequence_len),
            "steps": self.steps,
            "adapter": self.adapter,
            "lora_r": self.lora_r,
            "moe_lora": self.moe_lora,
            "optimizer": self.optimizer,
            "lora_dtype": first.map(|run| run.settings.config.lora_dtype),
            "recompute": self.recompute,
        })
    }

    /// Refuses a file that cannot be written, before anything is measured.
    fn check_json(&self) -> Result<()> {
        if let Some(path) = &self.json {
            let partial = partial_of(path);
            fs_err::File::create(&partial)?;
            fs_err::remove_file(partial)?;
        }
        Ok(())
    }

    fn write(&self, value: &Value) -> Result<()> {
        match &self.json {
            Some(path) => Durable::default().replace(path, format!("{value:#}\n").as_bytes()),
            None => Ok(()),
        }
    }
}

fn device_name(opened: &Opened) -> &str {
    opened.info.as_ref().map_or("cpu", |info| &info.name)
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
    shape.check_json()?;
    let opened = shape.open()?;
    let runs = shape.runs(&opened, &["qwen3-next-80b", "mistral-7b"], 4)?;
    let has_op = |run: &Run| bench::check(&opened, &run.model, &run.settings, prefix);
    // Of several models those that have the op.
    let checked: Vec<Result<()>> = runs.iter().map(has_op).collect();
    let is_left_out =
        |error: &Error| matches!(error, Error::Config { origin, .. } if origin == "--op");
    let all_left_out = checked
        .iter()
        .all(|checked| checked.as_ref().is_err_and(is_left_out));
    let mut chosen = Vec::new();
    for (run, checked) in runs.into_iter().zip(checked) {
        match checked {
            Ok(()) => chosen.push(run),
            Err(error) if is_left_out(&error) && !all_left_out => {}
            Err(error) => return Err(error),
        }
    }
    let mut all = shape.describe("kernels", &opened, &chosen);
    print(&format!("{}\n", opened.note));
    let name = device_name(&opened).to_owned();
    let mut first = Some(opened);
    let mut rows = Vec::new();
    let mut roofline = None;
    for run in &chosen {
        let opened = match first.take() {
            Some(opened) => opened,
            None => shape.open()?,
        };
        let limits = if let Some(limits) = roofline {
            limits
        } else {
            let limits = Roofline::measure(&opened, &run.model, &run.settings)?;
            print(&report::roofline_text(&name, limits));
            *roofline.insert(limits)
        };
        let steps = shape.steps as usize;
        let found = bench::kernels(opened, limits, &run.model, &run.settings, steps, prefix)?;
        print(&report::kernels_text(
            &run.model_name,
            &found,
            &run.settings,
        ));
        let json = found
            .iter()
            .map(|row| report::row_json(&run.model_name, row));
        rows.extend(json);
    }
    if let Some(limits) = roofline {
        extend(&mut all, report::roofline_json(&name, limits));
    }
    extend(&mut all, json!({"op": prefix, "rows": rows}));
    shape.write(&all)
}

fn step(shape: &Shape) -> Result<()> {
    shape.check_json()?;
    let opened = shape.open()?;
    let runs = shape.runs(&opened, &["qwen3-next-80b"], usize::MAX)?;
    let [run] = runs.as_slice() else {
        return Err(Error::Config {
            origin: "--model".to_owned(),
            reason: format!("names {} models, a step is of one", runs.len()),
        });
    };
    let mut all = shape.describe("step", &opened, &runs);
    print(&format!("{}\n", opened.note));
    let steps = shape.steps as usize;
    let found = bench::step(opened, &run.model, &run.settings, steps)?;
    extend(&mut all, report::step_json(&found));
    print(&report::step_text(&run.model_name, &found, &run.settings));
    shape.write(&all)
}

/// Adds the members of `more` to those of `all`.
fn extend(all: &mut Value, more: Value) {
    if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
        all.extend(more);
    }
}

/// Prints to standard output; a reader that went away is no error.
fn print(text: &str) {
    let _ = write!(std::io::stdout().lock(), "{text}");
}
