//! `brightrun train`.

use std::process::ExitCode;

use brightrun::config::Env;
use brightrun::error::Result;
use brightrun::train::{self, Outcome, StopFlag};

use super::ConfigArguments;
use super::console::{Console, print};

pub(super) fn run(arguments: &ConfigArguments) -> Result<ExitCode> {
    let config = arguments.load()?;
    let stop = StopFlag::install()?;
    let mut console = Console::default();
    let outcome = train::run(&config, &Env::read(), &mut console, &stop);
    console.finish();
    let outcome = outcome?;
    let file = arguments.config.display();
    match outcome {
        Outcome::Finished { adapter, summary } => {
            let loss = summary
                .final_loss
                .map(|loss| format!("{loss:.4}"))
                .unwrap_or_default();
            let out = config.output_dir.display();
            print(&format!(
                "done: {} steps, loss over the last epoch {loss}\n\
                 adapter  {}\n\
                 metrics  {out}/metrics.jsonl\n\
                 next:\n  \
                 brightrun export {file} --format merged      # a checkpoint with the adapter merged in\n  \
                 brightrun export {file} --format peft5       # for transformers 5\n  \
                 vllm serve BASE --enable-lora --max-lora-rank {} --lora-modules adapter={}\n",
                summary.steps,
                adapter.display(),
                config.lora_r.max(config.lora_expert_r.unwrap_or(0)),
                adapter.display(),
            ));
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped {
            signal,
            completed,
            checkpoint,
        } => {
            print(&format!(
                "stopped after step {completed}; saved {}\nto go on: brightrun train {file}\n",
                checkpoint.display()
            ));
            Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)))
        }
    }
}
