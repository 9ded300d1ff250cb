//! What a person sees: progress on standard error, a bar on a terminal and plain lines elsewhere; results on standard
//! output.
#![expect(clippy::print_stderr, reason = "the one place that prints")]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use brightrun::train::events::{Event, Observer, StepMetrics};
use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come at most this often, but for the first, the last and evaluated steps.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Prints to standard output; a reader that went away is no error.
pub(super) fn print(text: &str) {
    let _ = write!(std::io::stdout().lock(), "{text}");
}

/// Prints an error.
pub(super) fn error(text: &str) {
    eprintln!("error: {text}");
}

/// Shows a run.
#[derive(Debug, Default)]
pub(super) struct Console {
    bar: Option<ProgressBar>,
    total_steps: u64,
    started: Option<(Instant, u64)>,
    last_line: Option<Instant>,
}

impl Console {
    /// Takes the bar off the terminal; what comes next begins on a line of its own.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn step(&mut self, metrics: &StepMetrics) {
        let eval = metrics
            .eval_loss
            .map(|loss| format!("  eval_loss {loss:.4}"))
            .unwrap_or_default();
        let text = format!(
            "loss {:.4}  lr {:.2e}  grad_norm {:.3}  {:.0} tok/s{eval}",
            metrics.loss, metrics.learning_rate, metrics.grad_norm, metrics.tokens_per_second
        );
        if let Some(bar) = &self.bar {
            bar.set_position(metrics.step);
            bar.set_message(text.clone());
            if metrics.eval_loss.is_some() {
                self.line(&format!("step {}  {text}", metrics.step));
            }
            return;
        }
        let is_quiet = self
            .last_line
            .is_some_and(|last| last.elapsed() < LINE_INTERVAL);
        if is_quiet && metrics.eval_loss.is_none() && metrics.step != self.total_steps {
            return;
        }
        self.last_line = Some(Instant::now());
        let eta = self
            .eta(metrics.step)
            .map(|eta| format!("  eta {}", duration(eta)))
            .unwrap_or_default();
        self.line(&format!(
            "step {}/{}  epoch {:.2}  {text}{eta}",
            metrics.step, self.total_steps, metrics.epoch
        ));
    }

    fn eta(&self, step: u64) -> Option<Duration> {
        let (started, completed) = self.started?;
        let done = u32::try_from(step.checked_sub(completed)?)
            .ok()
            .filter(|done| *done > 0)?;
        let left = u32::try_from(self.total_steps.checked_sub(step)?).ok()?;
        Some(started.elapsed() / done * left)
    }
}

impl Observer for Console {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Note { text } => self.line(text),
            Event::Warning { text } => self.line(&format!("warning: {text}")),
            Event::Loading { layer, num_layers } => {
                self.line(&format!("base weights: layer {layer} of {num_layers}"));
            }
            Event::Started {
                completed,
                total_steps,
            } => {
                self.total_steps = *total_steps;
                self.started = Some((Instant::now(), *completed));
                if std::io::stderr().is_terminal() {
                    let style = "{bar:30} {pos}/{len} [{elapsed} < {eta}] {msg}";
                    let style = ProgressStyle::with_template(style);
                    let bar = ProgressBar::new(*total_steps).with_position(*completed);
                    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                    self.bar = Some(bar);
                } else {
                    self.line(&format!(
                        "training: {total_steps} steps, {completed} done before"
                    ));
                }
            }
            Event::Step(metrics) => self.step(metrics),
            Event::Saved { path } => {
                if self.bar.is_none() {
                    self.line(&format!("saved {}", path.display()));
                }
            }
            Event::Exported { .. } => self.finish(),
        }
    }
}

fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}
