//! `brightrun train-job`: a run as the worker sees it.

use std::io::Read;
use std::process::ExitCode;

use brightrun::config::{Env, TrainConfig};
use brightrun::error::{Error, Result};
use brightrun::train::events::{Event, Observer};
use brightrun::train::{self, Outcome, StopFlag};
use brightrun::worker::child::{Ending, Line};
use brightrun::worker::fit::{Fitted, fit};
use signal_hook::consts::SIGTERM;

use super::ConfigArguments;
use super::console::print;
use super::plan::here;

pub(super) fn run(arguments: &ConfigArguments) -> Result<ExitCode> {
    let stop = StopFlag::install()?;
    let watched = stop.clone();
    // The worker holds the other end: where it is gone, nobody delivers what is trained here.
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        watched.set(usize::try_from(SIGTERM).unwrap_or(15));
    });
    let outcome = arguments.load().and_then(|config| train(&config, &stop));
    let (ending, code) = match outcome {
        Ok(Outcome::Finished { adapter, summary }) => {
            let ending = Ending::Finished {
                adapter,
                steps: summary.steps,
                final_loss: summary.final_loss,
                eval_loss: summary.eval_loss,
            };
            (ending, 0)
        }
        Ok(Outcome::Stopped {
            signal, completed, ..
        }) => {
            let code = u8::try_from(128 + signal).unwrap_or(1);
            (Ending::Stopped { completed }, code)
        }
        Err(error) => (ending_of(&error), error.exit_code()),
    };
    tell(&Line::Ending(ending));
    Ok(ExitCode::from(code))
}

fn ending_of(error: &Error) -> Ending {
    Ending::Failed {
        exit_code: error.exit_code(),
        message: error.to_string(),
    }
}

fn train(config: &TrainConfig, stop: &StopFlag) -> Result<Outcome> {
    let env = Env::read();
    let place = here(config.device, &env)?;
    let fitted = fit(config, place, &env)?;
    tell(&Line::Event(Event::Note {
        text: fitted.to_string(),
    }));
    let Fitted { config, .. } = fitted;
    train::run(&config, &env, &mut Lines, stop)
}

/// Writes events as lines.
struct Lines;

impl Observer for Lines {
    fn event(&mut self, event: &Event) {
        tell(&Line::Event(event.clone()));
    }
}

fn tell(line: &Line) {
    if let Ok(text) = serde_json::to_string(line) {
        print(&format!("{text}\n"));
    }
}
