//! The training of a job: its process watched, its events told, its end taken.

use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::cancel::{Ends, Reason};
use super::child::{Ending, Line, Trainer};
use super::context::Context;
use super::gpu::Gpu;
use super::log::Log;
use super::net::Cancel;
use super::report::Reports;
use crate::train::events::Event;

/// Time that a step and a checkpoint may take after the trainer is asked to stop.
const GRACE: Duration = Duration::from_mins(2);
/// What is left of a job's time when its last checkpoint is written: to say so.
const BEFORE_DEADLINE: Duration = Duration::from_mins(1);
/// The same of a job that has more than [`LONG`], whose checkpoint may be large and was perhaps never written before.
const BEFORE_LONG_DEADLINE: Duration = Duration::from_mins(2);
const LONG: Duration = Duration::from_mins(10);

/// Notes of a run that are kept for the answer.
const MAX_NOTES: usize = 40;

/// What a run is told from outside.
#[derive(Debug, Clone)]
pub struct Signals {
    /// Ends it.
    pub ends: Ends,
    /// Goes up where a checkpoint is wanted at once.
    pub draining: Cancel,
    /// When the job's time is over.
    pub deadline: Option<Instant>,
}

/// A run's end, and what it took.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub ending: Ending,
    /// Seconds of training, of earlier attempts too.
    pub training_s: f64,
    /// Epochs done.
    pub epochs: f64,
    /// What the application should know.
    pub warnings: Vec<String>,
    /// What was trained on and how.
    pub report: Vec<String>,
}

/// Runs the trainer on `config`, whose output goes to `output_dir`.
///
/// # Errors
/// Those of the operating system.
pub async fn run(
    context: &Context,
    config: &Path,
    output_dir: &Path,
    reports: &Reports,
    signals: &Signals,
    log: &Log,
) -> std::io::Result<Ran> {
    let started = Trainer::start(&context.exe, config, output_dir, log, signals.ends.cancel());
    let mut trainer = started.await?;
    let gpu = Gpu::open();
    let mut ran = Ran {
        ending: Ending::Failed {
            exit_code: 1,
            message: "the trainer is gone".to_owned(),
        },
        training_s: 0.0,
        epochs: 0.0,
        warnings: Vec::new(),
        report: Vec::new(),
    };
    let mut is_saved = signals.draining.is_cancelled();
    let mut alive = Instant::now();
    let mut kill_at: Option<Instant> = None;
    let far = Instant::now() + Duration::from_hours(24 * 3650);
    let mut pace = Pace::new(signals.deadline);
    loop {
        let stop_at = signals
            .deadline
            .map_or(far, |end| end.checked_sub(pace.margin()).unwrap_or(end));
        tokio::select! {
            line = trainer.next() => {
                alive = Instant::now();
                match line {
                    Some(Line::Event(event)) => {
                        pace.note(&event, alive);
                        tell(&event, &mut ran, reports, &gpu, log);
                    }
                    Some(Line::Ending(ending)) => {
                        ran.ending = ending;
                        break;
                    }
                    None => break,
                }
            }
            () = signals.ends.cancel().cancelled(), if kill_at.is_none() => {
                let has_begun = reports.status().total_steps > 0;
                if has_begun {
                    log.info("stopping the trainer after the step it is at");
                    trainer.stop();
                } else {
                    log.info("stopping the trainer, which is at no step yet");
                }
                // Before its first step it has nothing to save, and does not listen.
                kill_at = Some(Instant::now() + if has_begun { GRACE } else { Duration::ZERO });
            }
            () = signals.draining.cancelled(), if !is_saved => {
                is_saved = true;
                // Before its first step it has nothing to save, and does not listen yet.
                if reports.status().total_steps > 0 {
                    log.info("saving a checkpoint");
                    reports.change(|status| status.stage = "saving");
                    trainer.save();
                }
            }
            () = sleep_until(stop_at), if kill_at.is_none() => {
                let margin = pace.margin().as_secs();
                log.warn(&format!("the job's time is over in {margin} s; it is stopped and saved now"));
                signals.ends.end(Reason::Deadline);
            }
            () = sleep_until(kill_at.unwrap_or(far)) => {
                log.info("the trainer is killed");
                trainer.kill(log).await;
                kill_at = Some(far);
            }
            () = sleep_until(alive + context.env.watchdog) => {
                trainer.kill(log).await;
                let seconds = context.env.watchdog.as_secs();
                ran.ending = Ending::Failed {
                    exit_code: 1,
                    message: format!("the trainer gave no sign for {seconds} s and was killed; its last checkpoint is kept"),
                };
                break;
            }
        }
    }
    // Its memory is free when it is gone.
    if tokio::time::timeout(GRACE, trainer.wait()).await.is_err() {
        trainer.kill(log).await;
    }
    Ok(ran)
}

/// How long a step and a checkpoint take, and what has to be left of a job's time for both.
#[derive(Debug)]
struct Pace {
    least: Duration,
    step: Duration,
    save: Duration,
    last: Option<Instant>,
}

impl Pace {
    fn new(deadline: Option<Instant>) -> Self {
        let is_long = deadline.is_some_and(|end| end - Instant::now() > LONG);
        let least = if is_long {
            BEFORE_LONG_DEADLINE
        } else {
            BEFORE_DEADLINE
        };
        Self {
            least,
            step: Duration::ZERO,
            save: Duration::ZERO,
            last: None,
        }
    }

    fn note(&mut self, event: &Event, now: Instant) {
        let took = self.last.map_or(Duration::ZERO, |last| now - last);
        match event {
            Event::Step(_) => self.step = self.step.max(took),
            Event::Saved { .. } => self.save = self.save.max(took),
            Event::Started { .. } => {}
            Event::Note { .. }
            | Event::Warning { .. }
            | Event::Loading { .. }
            | Event::Exported { .. } => return,
        }
        self.last = Some(now);
    }

    /// The step it is at may have just begun, and the next one may be longer.
    fn margin(&self) -> Duration {
        self.least + 2 * self.step + self.save
    }
}

fn tell(event: &Event, ran: &mut Ran, reports: &Reports, gpu: &Gpu, log: &Log) {
    match event {
        Event::Note { text } => {
            log.info(text);
            if ran.report.len() < MAX_NOTES {
                ran.report.push(log.redact(text));
            }
            reports.change(|status| {
                if status.total_steps == 0 {
                    status.at("preparing", status.progress.max(15.0));
                }
            });
        }
        Event::Warning { text } => {
            log.warn(text);
            ran.warnings.push(log.redact(text));
        }
        Event::Loading { layer, num_layers } => {
            let share = *layer as f64 / (*num_layers).max(1) as f64;
            log.info(&format!("base weights: layer {layer} of {num_layers}"));
            reports.change(|status| status.at("preparing", 15.0 + 10.0 * share));
        }
        Event::Started {
            completed,
            total_steps,
        } => {
            log.info(&format!(
                "training: {total_steps} steps, {completed} done before"
            ));
            reports.change(|status| status.started(*completed, *total_steps));
        }
        Event::Step(step) => {
            ran.training_s = step.elapsed_s;
            ran.epochs = step.epoch;
            let utilization = gpu.utilization();
            reports.change(|status| {
                status.step(step);
                status.metrics.gpu_utilization = utilization.or(status.metrics.gpu_utilization);
            });
            log.debug(&format!("step {}: loss {:.4}", step.step, step.loss));
        }
        Event::Saved { path } => {
            log.info(&format!("saved {}", path.display()));
            reports.change(|status| status.stage = "training");
        }
        Event::Exported { .. } => reports.change(|status| status.at("saving", 95.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_run_is_stopped_earlier() {
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let mut pace = Pace::new(Some(after(3600)));
        assert_eq!(pace.margin(), Duration::from_mins(2));
        let step = || Event::Step(crate::train::events::StepMetrics::default());
        let started = Event::Started {
            completed: 0,
            total_steps: 9,
        };
        let path = std::path::PathBuf::new();
        pace.note(&started, after(0));
        pace.note(&step(), after(90));
        pace.note(&Event::Saved { path }, after(135));
        pace.note(&step(), after(165));
        assert_eq!(pace.margin(), Duration::from_secs(120 + 2 * 90 + 45));
        let short = Pace::new(Some(after(300)));
        assert_eq!(short.margin(), Duration::from_mins(1));
    }
}
