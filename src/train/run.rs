//! A training run from config to adapter: prepare, load, step, evaluate, save, export.

use std::path::{Path, PathBuf};
use std::time::Instant;

use fs_err as fs;

use super::checkpoint::{Checkpoints, State};
use super::events::{Event, Observer, StepMetrics};
use super::loading::Watched;
use super::memory::Planner;
use super::metrics::MetricsFile;
use super::prepare::{Prepared, eval_packing, settings};
use super::schedule::Schedule;
use super::stop::StopFlag;
use super::trainer::{OptimizerSettings, StepReport, Trainer};
use crate::config::{Env, LoraDType, Resume, TrainConfig};
use crate::data::Batch;
use crate::durable::Durable;
use crate::error::{Error, Result};
use crate::export::{Adapter, PeftVersion, adapter};
use crate::model::adapter::AdapterSettings;
use crate::model::weights::{self, Placed};
use crate::ops::Ops;
use crate::store::quantized::{QuantizePolicy, QuantizedStore};
use crate::tensor::DType;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished {
        /// Adapter directory.
        adapter: PathBuf,
        /// What it came to.
        summary: adapter::Summary,
    },
    /// A signal asked it to stop; it can be resumed.
    Stopped {
        /// The signal.
        signal: usize,
        /// Steps done.
        completed: u64,
        /// Checkpoint to go on from.
        checkpoint: PathBuf,
    },
}

/// Trains as `config` says. Everything it tells goes to `observer`; `stop` is looked at after each step.
///
/// # Errors
/// Whatever kept the run from starting or going on; a run that started can be resumed from its last checkpoint.
pub fn run(
    config: &TrainConfig,
    env: &Env,
    observer: &mut dyn Observer,
    stop: &StopFlag,
) -> Result<Outcome> {
    let device = crate::backend::open(config.device, env)?;
    check_device(config, device.ops.activation_dtype())?;
    let prepared = Prepared::new(config, env)?;
    observer.event(&Event::Note { text: device.note });
    for text in &prepared.warnings {
        observer.event(&Event::Warning { text: text.clone() });
    }
    for text in prepared.data.report.notes() {
        observer.event(&Event::Note { text });
    }
    let files = Durable::new(env.kill_at_write);
    if let (Some(info), Some(free)) = (device.info, device.ops.free_memory()?) {
        let (tokens, positions) = (prepared.capacity, prepared.num_positions());
        Planner::new(config, &prepared.model, positions)?.check(info, free, tokens, positions)?;
    }
    fs::create_dir_all(&config.output_dir)?;
    let _lock = lock(&config.output_dir)?;
    let trainer = load(config, device.ops, &prepared, observer)?;
    let mut run = Run::new(config, prepared, trainer, files, observer)?;
    run.train(stop)
}

/// Refuses settings that a device with activations of type `activation` does not have.
///
/// # Errors
/// [`Error::Config`] naming the setting.
pub fn check_device(config: &TrainConfig, activation: DType) -> Result<()> {
    if config.lora_dtype == LoraDType::Bf16 && activation != DType::Bf16 {
        let reason = "`lora_dtype` is `bf16`, which the CPU backend does not have; use `fp32`";
        return Err(Error::Config {
            origin: "run".to_owned(),
            reason: reason.to_owned(),
        });
    }
    Ok(())
}

/// Keeps other runs out of an output directory while the returned file is open.
fn lock(output_dir: &Path) -> Result<fs::File> {
    use rustix::fs::{FlockOperation, flock};
    let file = fs::File::create(output_dir.join(".lock"))?;
    if flock(file.file(), FlockOperation::NonBlockingLockExclusive).is_err() {
        let reason = format!(
            "`output_dir` {} is in use by another run; wait for it or name another directory",
            output_dir.display()
        );
        return Err(Error::Config {
            origin: "run".to_owned(),
            reason,
        });
    }
    Ok(file)
}

/// Reads the weights and builds the trainer, its adapter at its initial values.
fn load(
    config: &TrainConfig,
    ops: Box<dyn Ops>,
    prepared: &Prepared,
    observer: &mut dyn Observer,
) -> Result<Trainer> {
    let mut store = QuantizedStore::new(prepared.weights.clone(), QuantizePolicy::new(config));
    let settings = AdapterSettings::new(config);
    let positions = prepared.num_positions();
    let source = Placed {
        source: &mut store,
        ops: &*ops,
    };
    let mut source = Watched::new(source, observer, prepared.model.layers.len());
    let decoder = weights::load(&prepared.model, &mut source, settings, positions)?;
    store.verify()?;
    let text = format!("base weights: {}", store.counts());
    observer.event(&Event::Note { text });
    let text = format!(
        "adapter: {} parameters in {} modules",
        decoder.adapter.num_parameters(),
        decoder.adapter.modules().len()
    );
    observer.event(&Event::Note { text });
    let optimizer = OptimizerSettings::new(config);
    let (capacity, seed) = (prepared.capacity, config.seed);
    let mut trainer = Trainer::new(ops, decoder, optimizer, capacity, config.recompute, seed)?;
    if let (Some(dir), None) = (&config.init_adapter, &prepared.resume) {
        let values = &mut trainer.adapter_mut().values;
        let mut read = values.to_f32_vec()?;
        adapter::read(dir, &prepared.layout, &mut read)?;
        values.write_f32(&read)?;
    }
    let text = format!(
        "buffers: {} for {capacity} tokens in a pass{}",
        megabytes(trainer.memory().num_bytes()),
        if trainer.recomputes() {
            ", activations recomputed in backward"
        } else {
            ""
        }
    );
    observer.event(&Event::Note { text });
    Ok(trainer)
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A run in progress.
struct Run<'a> {
    config: &'a TrainConfig,
    prepared: Prepared,
    trainer: Trainer,
    files: Durable,
    observer: &'a mut dyn Observer,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    schedule: Schedule,
    eval_batches: Vec<Batch>,
    state: State,
    eval_loss: Option<f64>,
    last_saved: Option<u64>,
    saved_at: Instant,
}

impl<'a> Run<'a> {
    fn new(
        config: &'a TrainConfig,
        prepared: Prepared,
        mut trainer: Trainer,
        files: Durable,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        let checkpoints = Checkpoints::new(&config.output_dir, config.save_total_limit);
        checkpoints.remove_partials(&files)?;
        files.remove_partials(&config.output_dir)?;
        let mut state = State {
            step: 0,
            epoch_loss_sum: 0.0,
            epoch_target_tokens: 0,
            elapsed_s: 0.0,
            date_days: prepared.date.days,
            data_digest: prepared.data.digest(),
            layout_digest: prepared.layout.digest(),
            config: settings(config)?,
        };
        match &prepared.resume {
            Some(loaded) => {
                loaded.restore(trainer.adapter_mut())?;
                let config = state.config;
                state = State {
                    config,
                    ..loaded.state.clone()
                };
                let text = format!(
                    "going on after step {} ({})",
                    state.step,
                    loaded.path.display()
                );
                observer.event(&Event::Note { text });
            }
            None if config.resume_from_checkpoint == Resume::Never => {
                let count = checkpoints.steps().len();
                if count > 0 {
                    let text = format!("discarding {count} checkpoint(s) of an earlier run");
                    observer.event(&Event::Note { text });
                }
                checkpoints.discard(&files)?;
            }
            None => {}
        }
        for path in checkpoints.set_aside_after(&files, state.step)? {
            let text = format!(
                "a checkpoint that is not gone on from was renamed to {}",
                path.display()
            );
            observer.event(&Event::Warning { text });
        }
        let resolved = config.resolved_yaml()?;
        files.replace(
            &config.output_dir.join("config.resolved.yaml"),
            resolved.as_bytes(),
        )?;
        let metrics =
            MetricsFile::open(&files, &config.output_dir.join("metrics.jsonl"), state.step)?;
        let schedule = Schedule::new(config, prepared.total_steps);
        let eval = eval_packing(prepared.packing).epoch(&prepared.data.eval, 0);
        let eval_batches = eval
            .into_iter()
            .flat_map(|step| step.micro_batches)
            .collect();
        let last_saved = prepared.resume.is_some().then_some(state.step);
        Ok(Self {
            config,
            prepared,
            trainer,
            files,
            observer,
            checkpoints,
            metrics,
            schedule,
            eval_batches,
            state,
            eval_loss: None,
            last_saved,
            saved_at: Instant::now(),
        })
    }

    fn train(&mut self, stop: &StopFlag) -> Result<Outcome> {
        let total_steps = self.prepared.total_steps as u64;
        let completed = self.state.step;
        self.observer.event(&Event::Started {
            completed,
            total_steps,
        });
        let per_epoch = self.prepared.steps_per_epoch as u64;
        while self.state.step < total_steps {
            let epoch = usize::try_from(self.state.step / per_epoch).unwrap_or(usize::MAX);
            let done = usize::try_from(self.state.step % per_epoch).unwrap_or(0);
            if done == 0 {
                (self.state.epoch_loss_sum, self.state.epoch_target_tokens) = (0.0, 0);
            }
            let steps = self
                .prepared
                .packing
                .epoch(&self.prepared.data.train, epoch);
            for batches in &steps[done..] {
                self.step(batches)?;
                if self.wants_save() || stop.take_save() {
                    self.save()?;
                }
                if let Some(signal) = stop.signal().filter(|_| self.state.step < total_steps) {
                    let checkpoint = self.save()?;
                    let completed = self.state.step;
                    return Ok(Outcome::Stopped {
                        signal,
                        completed,
                        checkpoint,
                    });
                }
                if self.state.step == total_steps {
                    break;
                }
            }
        }
        self.export()
    }

    fn step(&mut self, batches: &crate::data::StepBatches) -> Result<()> {
        let completed = self.state.step;
        let learning_rate = self
            .schedule
            .at(usize::try_from(completed).unwrap_or(usize::MAX));
        let begun = Instant::now();
        let report = match self.trainer.step(batches, completed, learning_rate) {
            Ok(report) => report,
            Err(error @ Error::NonFinite { .. }) => {
                // The adapter is as it was before this step: that is the last good state.
                self.save()?;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let seconds = begun.elapsed().as_secs_f64();
        self.state.step += 1;
        self.state.elapsed_s += seconds;
        self.state.epoch_loss_sum += report.loss * report.num_target_tokens as f64;
        self.state.epoch_target_tokens += report.num_target_tokens as u64;
        let eval_loss = self.evaluate()?;
        self.report(report, learning_rate, seconds, eval_loss)
    }

    fn report(
        &mut self,
        report: StepReport,
        learning_rate: f64,
        seconds: f64,
        eval_loss: Option<f64>,
    ) -> Result<()> {
        let metrics = StepMetrics {
            step: self.state.step,
            epoch: self.state.step as f64 / self.prepared.steps_per_epoch as f64,
            loss: report.loss,
            learning_rate,
            grad_norm: report.grad_norm,
            num_target_tokens: report.num_target_tokens,
            tokens_per_second: report.num_tokens as f64 / seconds.max(1e-9),
            elapsed_s: self.state.elapsed_s,
            eval_loss,
        };
        self.metrics.append(&metrics)?;
        self.observer.event(&Event::Step(metrics));
        Ok(())
    }

    fn is_epoch_end(&self) -> bool {
        self.state
            .step
            .is_multiple_of(self.prepared.steps_per_epoch as u64)
    }

    fn is_last(&self) -> bool {
        self.state.step == self.prepared.total_steps as u64
    }

    /// Loss of the held-out data, at the end of each epoch and every `eval_steps`.
    fn evaluate(&mut self) -> Result<Option<f64>> {
        let is_due = self
            .config
            .eval_steps
            .is_some_and(|every| self.state.step.is_multiple_of(every as u64));
        if self.eval_batches.is_empty() || !(is_due || self.is_epoch_end() || self.is_last()) {
            return Ok(None);
        }
        let (loss_sum, count) = self.trainer.evaluate(&self.eval_batches)?;
        self.eval_loss = Some(loss_sum / count.max(1) as f64);
        Ok(self.eval_loss)
    }

    fn wants_save(&self) -> bool {
        let is_due = self
            .state
            .step
            .is_multiple_of(self.config.save_steps as u64);
        let minutes = self.saved_at.elapsed().as_secs_f64() / 60.0;
        is_due || self.is_epoch_end() || self.is_last() || minutes >= self.config.save_minutes
    }

    /// Saves the state after the last step, once.
    fn save(&mut self) -> Result<PathBuf> {
        let path = self
            .config
            .output_dir
            .join(format!("checkpoints/step-{}", self.state.step));
        if self.last_saved == Some(self.state.step) && path.is_dir() {
            return Ok(path);
        }
        let path = self
            .checkpoints
            .save(&self.files, &self.state, self.trainer.adapter())?;
        self.last_saved = Some(self.state.step);
        self.saved_at = Instant::now();
        self.observer.event(&Event::Saved { path: path.clone() });
        Ok(path)
    }

    fn export(&mut self) -> Result<Outcome> {
        let summary = summary_of(&self.state, self.eval_loss);
        let dir = self.config.output_dir.join("adapter");
        let template = self.config.chat_template.as_ref();
        let template = template.and(self.prepared.data.chat_template.as_deref());
        let context = adapter::Context {
            config: self.config,
            model_dir: &self.prepared.model_dir,
            chat_template: template,
            summary,
        };
        let values = self.trainer.adapter().values.to_f32_vec()?;
        let trained = Adapter {
            layout: &self.prepared.layout,
            values: &values,
        };
        adapter::write(
            &self.files,
            &dir,
            &trained,
            &context,
            PeftVersion::Transformers4,
        )?;
        self.observer.event(&Event::Exported { path: dir.clone() });
        Ok(Outcome::Finished {
            adapter: dir,
            summary,
        })
    }
}

/// What a run in `state` came to.
pub fn summary_of(state: &State, eval_loss: Option<f64>) -> adapter::Summary {
    let tokens = state.epoch_target_tokens;
    adapter::Summary {
        steps: state.step,
        final_loss: (tokens > 0).then(|| state.epoch_loss_sum / tokens as f64),
        eval_loss,
    }
}
