//! Arguments, what is printed, exit codes.

mod check;
mod console;
mod export;
mod plan;
mod selftest;
mod train;
#[cfg(feature = "worker")]
mod train_job;
#[cfg(feature = "worker")]
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use brightrun::config::{Device, TrainConfig};
use brightrun::error::{Error, Result};
use clap::{Parser, Subcommand, ValueEnum};

/// Fine-tunes language models with LoRA on 4-bit base weights: dataset in, PEFT adapter out.
#[derive(Debug, Parser)]
#[command(name = "brightrun", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 ok, 1 failure, 2 usage, 12 does not fit into memory, 17 loss or gradient not \
    finite, 65 bad data, 66 missing input, 74 I/O, 78 bad config, 130/143 stopped by SIGINT/SIGTERM (resumable).";

#[derive(Debug, Subcommand)]
enum Command {
    /// Train an adapter; goes on from the newest checkpoint in `output_dir`.
    Train(ConfigArguments),
    /// Check config and data sets without training: formats, what is left out and why, lengths, a masked sample.
    Check(ConfigArguments),
    /// Tell from the base model's config.json whether a run fits, what it takes and what makes it fit.
    Plan(PlanArguments),
    /// Write the adapter of a run in another form.
    Export(ExportArguments),
    #[cfg(feature = "worker")]
    #[command(flatten)]
    Worker(worker::WorkerCommand),
    /// Check every op of a device against a reference: the first thing to run on a GPU.
    Selftest(SelftestArguments),
}

/// A config and what is put over it.
#[derive(Debug, clap::Args)]
struct ConfigArguments {
    /// Config in YAML; paths in it are relative to the current directory.
    config: PathBuf,
    /// Overrides a setting, as `--set key=value`; the value is YAML.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Overrides `device`: auto, cpu, cuda, cuda:N or emu.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

impl ConfigArguments {
    fn load(&self) -> Result<TrainConfig> {
        let device = self.device.iter().map(|name| format!("device={name}"));
        let sets: Vec<String> = self.sets.iter().cloned().chain(device).collect();
        TrainConfig::load(&self.config, &sets)
    }
}

#[derive(Debug, clap::Args)]
struct PlanArguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// GPU to plan for: a size such as 80GB, or a name such as H100-80GB; by default where `device` runs on this machine.
    #[arg(long, value_name = "GPU")]
    gpu: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What `export` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// PEFT adapter for transformers 4, and for vLLM.
    Peft,
    /// PEFT adapter for transformers 5 with PEFT 0.21, which holds experts as parameters.
    Peft5,
    /// Hugging Face checkpoint with the adapter merged into the base weights.
    Merged,
}

#[derive(Debug, clap::Args)]
struct ExportArguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// What to write.
    #[arg(long, value_enum, default_value_t = Format::Peft)]
    format: Format,
    /// Where to; by default `adapter`, `adapter-peft5` or `merged` in `output_dir`.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Checkpoint directory to take; by default the newest in `output_dir`, else its `adapter`.
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct SelftestArguments {
    /// Device to test: cpu, cuda, cuda:N, emu, or auto (CUDA where there is a GPU).
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Only ops whose name begins with this.
    #[arg(long, value_name = "NAME", value_parser = parse_op)]
    op: Option<String>,
    /// Name the cases; run nothing.
    #[arg(long)]
    list: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn parse_device(text: &str) -> Result<Device, String> {
    Device::parse(text).ok_or_else(|| "expected auto, cpu, cuda, cuda:N or emu".to_owned())
}

fn parse_op(text: &str) -> Result<String, String> {
    if brightrun::selftest::cases_of(text).is_empty() {
        let names = brightrun::selftest::op_names().join(", ");
        return Err(format!(
            "no op has a name that begins so; there are {names}"
        ));
    }
    Ok(text.to_owned())
}

/// Runs the command line of this process.
pub(crate) fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Command::Train(arguments) => train::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Plan(arguments) => plan::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        #[cfg(feature = "worker")]
        Command::Worker(command) => command.run(),
        Command::Selftest(arguments) => selftest::run(arguments),
    };
    result.unwrap_or_else(|error| fail(&error))
}

fn fail(error: &Error) -> ExitCode {
    console::error(&error.to_string());
    ExitCode::from(error.exit_code())
}
