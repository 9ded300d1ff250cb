//! A job that makes sense: held by one worker, trained, delivered.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::attempt::{Answer, Attempt, failed, settle_failed};
use super::callback::Event;
use super::cancel::{Ends, Reason};
use super::child::Ending;
use super::deliver::{self, Delivery, Stuck, Trained};
use super::job::Job;
use super::lease::Lease;
use super::log::Log;
use super::net::Canceller;
use super::net::time::unix_seconds;
use super::platform::Posted;
use super::report::{Reports, To};
use super::row::{Claim, Row, is_delivered};
use super::run::{self, Ran, Signals};
use super::state::JobDir;
use super::status::Status;
use super::{base, data, fitness, news, owed, room};
use crate::config::TrainConfig;
use crate::durable::Durable;

/// Output of a run, in a job's directory.
const OUTPUT: &str = "run";
/// Said of a job that is stopped shortly before the platform would.
const OUT_OF_TIME: &str = "the job's time (policy.executionTimeout) was nearly over; its checkpoint is kept, and the same job_id sent \
     again with a longer time goes on there";

/// Exit codes of a trainer that say nothing against the device: memory, numbers, data, a missing file, the disk.
const EXPLAINED: [u8; 5] = [12, 17, 65, 66, 74];

/// Why a job has no adapter.
#[derive(Debug)]
enum Failure {
    /// For a person.
    Failed(String),
    /// It was ended.
    Ended(Reason),
}

impl From<crate::error::Error> for Failure {
    fn from(error: crate::error::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<super::net::Error> for Failure {
    fn from(error: super::net::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// A job that makes sense.
pub(super) struct Work<'a> {
    pub(super) attempt: &'a Attempt<'a>,
    pub(super) job: Job,
    pub(super) dir: JobDir,
    pub(super) log: Log,
    /// When the job was taken, in seconds since 1970.
    pub(super) begun: u64,
}

impl Work<'_> {
    /// Runs the job and gives the platform its answer.
    pub(super) async fn run(&self) -> Posted {
        let Attempt { context, ends, .. } = self.attempt;
        for warning in &self.job.warnings {
            self.log.warn(warning);
        }
        let stored = || self.dir.result().map(|stored| Answer::Body(stored.body));
        if let Some(answer) = stored() {
            self.log
                .info("this job was finished before; its result is given again");
            if let Some(delivery) = self.dir.read::<Delivery>(deliver::FILE) {
                delivery.show_again(context, self.begun, &self.log).await;
            }
            return self.attempt.post(&answer, &self.log).await;
        }
        let (lost, was_lost) = Canceller::new();
        let wait = context
            .holder
            .wait(&self.dir, &self.log, &lost, ends.cancel(), || {
                self.dir.result().is_some()
            });
        let lease = match wait.await {
            Ok(lease) => lease,
            Err(error) => {
                let answer = self
                    .attempt
                    .refuse(&error.to_string(), self.begun, &self.log)
                    .await;
                return self.attempt.post(&answer, &self.log).await;
            }
        };
        let ended = Ends::clone(ends);
        let watch = tokio::spawn(async move {
            was_lost.cancelled().await;
            ended.end(Reason::LostLease);
        });
        let (answer, delivery) = match (stored(), &lease) {
            (Some(answer), _) => (answer, None),
            (None, Some(lease)) => Box::pin(self.held(lease)).await,
            (None, None) => (self.ended(ends.reason().unwrap_or(Reason::Shutdown)), None),
        };
        watch.abort();
        let answer = self.with_stop_pod(answer);
        if delivery.is_none() {
            owed::keep(&self.dir, &self.attempt.taken.id, &answer, &self.log);
        }
        let posted = self.post(&answer).await;
        owed::settle(&self.dir, &posted);
        let goes_on = matches!(ends.reason(), Some(Reason::LostLease | Reason::Shutdown));
        if delivery.is_none()
            && !goes_on
            && lease.as_ref().is_some_and(|lease| !lease.is_lost())
            && let Err(error) = self.dir.ended()
        {
            self.log.warn(&error.to_string());
        }
        let (is_left, asked) = match delivery {
            Some(mut delivery) => {
                let asked = delivery
                    .finish(&posted, context, &self.dir, &self.log)
                    .await;
                (!delivery.is_done(), asked)
            }
            None => (owed::is_there(&self.dir), None),
        };
        if is_left {
            context.put_off(&self.dir, asked);
        }
        posted
    }

    /// Asks the platform for a fresh worker where this one's device is gone.
    fn with_stop_pod(&self, mut answer: Answer) -> Answer {
        if let (Answer::Body(body), true) = (&mut answer, self.attempt.broken.is_cancelled()) {
            body["stopPod"] = json!(true);
        }
        answer
    }

    /// Gives the answer, until the job is stopped meanwhile.
    async fn post(&self, answer: &Answer) -> Posted {
        let ends = self.attempt.ends;
        if ends.reason().is_some() {
            return self.attempt.post(answer, &self.log).await;
        }
        let posted = ends.cancel().or(self.attempt.post(answer, &self.log)).await;
        posted.unwrap_or_else(|_| {
            self.log.info("Job stopped.");
            match ends.reason() {
                Some(Reason::JobStop) => Posted::Gone,
                _ => Posted::Undelivered("the worker stops".to_owned()),
            }
        })
    }

    /// What is done while the job is held.
    async fn held(&self, lease: &Lease) -> (Answer, Option<Delivery>) {
        let Attempt { context, .. } = self.attempt;
        let row = context
            .supabase
            .as_ref()
            .map(|supabase| Row::new(supabase, &self.job.id));
        let kept: Option<Delivery> = self.dir.read(deliver::FILE);
        if kept.is_none()
            && let Some(answer) = self.claim(row.as_ref()).await
        {
            return (answer, None);
        }
        // What an earlier attempt could not tell is not the end any more.
        news::forget(&self.dir);
        owed::forget(&self.dir);
        let reports = self.report(row.clone());
        let trained = match kept {
            Some(mut delivery) => {
                self.log
                    .info("this job was trained before; its delivery goes on");
                delivery.stopped = false;
                delivery.runpod_id.clone_from(&self.attempt.taken.id);
                Ok(delivery)
            }
            None => self.train(&reports).await,
        };
        let brought = match trained {
            Ok(delivery) if !lease.is_lost() => self.bring(delivery, &reports).await,
            Ok(_) => Err(Failure::Ended(Reason::LostLease)),
            Err(failure) => Err(failure),
        };
        // Nothing is reported after the last word.
        let status = reports.stop().await;
        let result = match brought {
            // Nobody wants it any more, though it is in the storage.
            Ok(delivery) if self.attempt.ends.reason().is_some() || lease.is_lost() => {
                Err(self.stuck(delivery, Stuck::Kept("it was stopped".to_owned())))
            }
            Ok(mut delivery) => {
                delivery.seq = Some(status.events + 1);
                self.conclude(delivery).await
            }
            Err(failure) => Err(failure),
        };
        match result {
            Ok(delivery) => {
                if let Some(row) = &row {
                    let _ = row
                        .metrics(&status, Some(delivery.trained.training_s))
                        .await;
                }
                (Answer::Body(delivery.body()), Some(delivery))
            }
            Err(Failure::Ended(Reason::Deadline)) => {
                (self.failed(OUT_OF_TIME, status, row.as_ref()).await, None)
            }
            Err(Failure::Ended(reason)) => {
                // Else it goes on elsewhere: that is no end.
                if matches!(reason, Reason::JobStop | Reason::Row | Reason::Callback) {
                    self.tell_end("training.cancelled", &status).await;
                }
                (self.ended(reason), None)
            }
            Err(Failure::Failed(reason)) => {
                (self.failed(&reason, status, row.as_ref()).await, None)
            }
        }
    }

    /// The row's word on the job, where it ends it.
    async fn claim(&self, row: Option<&Row>) -> Option<Answer> {
        let Attempt { context, ends, .. } = self.attempt;
        let is_known = self.dir.path("attempts.json").is_file();
        let claim = row?
            .claim(context.env.lease, is_known, ends.cancel(), &self.log)
            .await;
        match claim {
            Claim::Ours | Claim::Missing => None,
            Claim::Unreachable(error) => {
                self.log.warn(&format!(
                    "the row could not be read, training goes on: {error}"
                ));
                None
            }
            Claim::Cancelled => Some(self.ended(ends.reason().unwrap_or(Reason::Row))),
            Claim::Completed(row) => {
                self.log
                    .info("the row says that this job was finished before");
                Some(Answer::Body(json!({"output": of_row(&self.job.id, &row)})))
            }
        }
    }

    fn report(&self, row: Option<Row>) -> Reports {
        let Attempt {
            context,
            upstream,
            taken,
            ends,
            ..
        } = self.attempt;
        let callback = self.job.callback_url.as_ref().and_then(|url| {
            self.log.hide(&crate::config::Secret::new(url.secret()));
            match context.callback(url.secret()) {
                Ok(callback) => {
                    let prefix = format!("msg_{}_{}", deliver::event_id(&self.job.id), self.begun);
                    Some((callback, prefix))
                }
                Err(error) => {
                    self.log.warn(&format!("no callbacks: {error}"));
                    None
                }
            }
        });
        let to = To {
            upstream: ((*upstream).clone(), taken.id.clone()),
            row: row.map(|row| (row, context.env.lease)),
            callback,
        };
        Reports::start(
            to,
            Status::new(&self.job.id),
            context.env.report,
            ends,
            &self.log,
        )
    }

    /// Data, base model, settings, training.
    async fn train(&self, reports: &Reports) -> Result<Delivery, Failure> {
        let Attempt {
            context,
            ends,
            taken,
            ..
        } = self.attempt;
        let attempts = self.dir.begin()?;
        if attempts.count > context.env.max_attempts {
            return Err(Failure::Failed(format!(
                "the job was begun {} times without getting further than step {}, expected at most {}; it is given up. What is \
                 trained is kept; sent again it begins to count anew",
                attempts.count - 1,
                attempts.step,
                context.env.max_attempts
            )));
        }
        let ended = |failure: Failure| self.unless_ended(failure);
        reports.change(|status| status.at("downloading", 5.0));
        let dataset = data::get(context, &self.job, &self.dir, &self.log, ends.cancel()).await;
        let dataset = dataset.map_err(|error| ended(error.into()))?;
        reports.change(|status| status.at("preparing", 10.0));
        let model = base::get(context, &self.job.base_model, &self.log, ends.cancel()).await;
        let model = model.map_err(|error| ended(error.into()))?;
        let output = self.dir.path(OUTPUT);
        let mut defaults = context.defaults();
        // A checkpoint is gone on from with the passes it was made with, whatever else would fit today.
        if let Some(size) = self.micro_batch_size() {
            defaults.insert("micro_batch_size".to_owned(), json!(size));
        }
        let config = self
            .job
            .train_config(&model, &dataset, &output, &defaults)?;
        let is_storable = room::check(context, &config, &self.log).await;
        is_storable.map_err(Failure::Failed)?;
        let path = self.dir.path("train.yml");
        Durable::default().replace(&path, config.resolved_yaml()?.as_bytes())?;
        let signals = Signals {
            ends: (*ends).clone(),
            draining: self.attempt.draining.clone(),
            deadline: taken
                .execution_timeout
                .and_then(|limit| self.attempt.taken_at.checked_add(limit)),
        };
        let ran = run::run(context, &path, &output, reports, &signals, &self.log).await;
        let ran = ran.map_err(|error| {
            Failure::Failed(format!("the trainer could not be started: {error}"))
        })?;
        if let Ending::Failed { exit_code, .. } = &ran.ending
            && !EXPLAINED.contains(exit_code)
            && ends.reason().is_none()
            && let Err(reason) = fitness::check_device(context).await
        {
            self.log
                .error(&format!("the device does not work any more: {reason}"));
            self.attempt.broken.cancel();
        }
        self.trained(
            ran,
            config.lora_r.max(config.lora_expert_r.unwrap_or(0)),
            reports,
        )
    }

    /// `failure`, unless the job was ended: then that is why there is no adapter.
    fn unless_ended(&self, failure: Failure) -> Failure {
        match self.attempt.ends.reason() {
            Some(reason) => Failure::Ended(reason),
            None => failure,
        }
    }

    /// Targets of a pass of the run that left a checkpoint.
    fn micro_batch_size(&self) -> Option<usize> {
        let path = self.dir.path(OUTPUT).join("config.resolved.yaml");
        let is_begun = self.dir.newest_checkpoint() > 0 && path.is_file();
        let config = is_begun
            .then(|| TrainConfig::load(&path, &[]).ok())
            .flatten()?;
        Some(config.micro_batch_size)
    }

    /// What an ending means; a finished run is written down before anything else is done with it.
    fn trained(&self, ran: Ran, lora_rank: usize, reports: &Reports) -> Result<Delivery, Failure> {
        let Ran {
            ending,
            training_s,
            epochs,
            warnings,
            report,
        } = ran;
        let (adapter, steps, final_loss, eval_loss): (PathBuf, _, _, _) = match ending {
            Ending::Finished {
                adapter,
                steps,
                final_loss,
                eval_loss,
            } => (adapter, steps, final_loss, eval_loss),
            Ending::Stopped { completed } => {
                self.log.info(&format!(
                    "stopped after step {completed}; the checkpoint is kept"
                ));
                return Err(Failure::Ended(
                    self.attempt.ends.reason().unwrap_or(Reason::Shutdown),
                ));
            }
            Ending::Failed { exit_code, message } => {
                let failure = Failure::Failed(format!("{message} (exit code {exit_code})"));
                return Err(self.unless_ended(failure));
            }
        };
        let own = self.dir.path("");
        let adapter = adapter
            .strip_prefix(&own)
            .map_or(adapter.clone(), PathBuf::from);
        let status = reports.status();
        let mut all = self.job.warnings.clone();
        all.extend(warnings);
        let delivery = Delivery {
            job_id: self.job.id.clone(),
            runpod_id: self.attempt.taken.id.clone(),
            callback_url: self
                .job
                .callback_url
                .as_ref()
                .map(|url| url.secret().to_owned()),
            trained: Trained {
                base_model: self.job.base_model.clone(),
                lora_rank,
                adapter,
                steps,
                epochs: epochs.max(status.current_epoch),
                final_loss,
                eval_loss,
                training_s,
                tokens_per_s: status.metrics.throughput,
                warnings: all,
                report,
            },
            begun: self.begun,
            finished: unix_seconds(),
            archive: None,
            digests: Vec::new(),
            left_out: Vec::new(),
            seq: None,
            uploaded: false,
            output: None,
            row_written: false,
            posted: false,
            told: false,
            stopped: false,
        };
        delivery.save(&self.dir).map_err(Failure::Failed)?;
        Ok(delivery)
    }

    async fn bring(&self, mut delivery: Delivery, reports: &Reports) -> Result<Delivery, Failure> {
        let Attempt { context, ends, .. } = self.attempt;
        reports.change(|status| status.at("uploading", 97.0));
        let cancel = ends.cancel();
        match delivery.bring(context, &self.dir, &self.log, cancel).await {
            Ok(()) => Ok(delivery),
            Err(stuck) => Err(self.stuck(delivery, stuck)),
        }
    }

    async fn conclude(&self, mut delivery: Delivery) -> Result<Delivery, Failure> {
        let Attempt { context, ends, .. } = self.attempt;
        let cancel = ends.cancel();
        match delivery
            .conclude(context, &self.dir, &self.log, cancel)
            .await
        {
            Ok(()) => {
                // Everybody has it then, though a later start could not tell.
                if let Err(error) = delivery.store(&self.dir) {
                    self.log.warn(&error);
                }
                Ok(delivery)
            }
            Err(stuck) => Err(self.stuck(delivery, stuck)),
        }
    }

    /// Why a delivery does not go on; one that nobody wants any more is left until the job is given again.
    fn stuck(&self, mut delivery: Delivery, stuck: Stuck) -> Failure {
        let reason = self.attempt.ends.reason();
        delivery.stopped = match reason {
            Some(Reason::JobStop | Reason::Row | Reason::Callback) => true,
            Some(Reason::LostLease | Reason::Shutdown | Reason::Deadline) => false,
            None => stuck == Stuck::Cancelled,
        };
        if delivery.stopped
            && let Err(error) = delivery.save(&self.dir)
        {
            self.log.warn(&error);
        }
        match (stuck, reason) {
            (_, Some(reason)) => Failure::Ended(reason),
            (Stuck::Cancelled, None) => Failure::Ended(Reason::Row),
            (Stuck::Kept(reason), None) => Failure::Failed(format!(
                "the adapter is trained and kept, but could not be delivered: {reason}; the next start of a worker with this \
                 volume delivers it"
            )),
        }
    }

    /// The answer for a job that was ended.
    fn ended(&self, reason: Reason) -> Answer {
        match reason {
            Reason::JobStop => {
                self.log.info("Job stopped.");
                Answer::Nothing
            }
            Reason::LostLease => {
                self.log
                    .info("another worker has this job now; this one stops");
                Answer::Nothing
            }
            Reason::Shutdown | Reason::Deadline => Answer::Nothing,
            Reason::Row | Reason::Callback => {
                Answer::Body(json!({"output": {"status": "cancelled", "job_id": self.job.id}}))
            }
        }
    }

    async fn failed(&self, reason: &str, mut status: Status, row: Option<&Row>) -> Answer {
        self.log.error(reason);
        status.status = "failed";
        status.error_message = Some(self.log.redact(reason));
        if let Some(row) = row {
            settle_failed(
                row,
                &status,
                self.begun,
                self.attempt.context.env.report,
                &self.log,
            )
            .await;
        }
        self.tell_end("training.failed", &status).await;
        failed(&status)
    }

    async fn tell_end(&self, kind: &str, status: &Status) {
        let Some(url) = &self.job.callback_url else {
            return;
        };
        let id = format!("msg_{}_{}_end", deliver::event_id(&self.job.id), self.begun);
        let data = status.event(&self.attempt.taken.id, status.events + 1);
        let event = Event::new(id, kind, data);
        let context = self.attempt.context;
        news::publish(url.secret(), event, context, &self.dir, &self.log).await;
    }
}

/// What is known of a job that another worker finished.
fn of_row(job_id: &str, row: &Map<String, Value>) -> Value {
    debug_assert!(is_delivered(row), "asked of a row that says so");
    let of = |key: &str| row.get(key).cloned().unwrap_or_default();
    json!({
        "status": "completed",
        "job_id": job_id,
        "progress": 100,
        "stage": "completed",
        "current_epoch": of("current_epoch"),
        "current_step": of("current_step"),
        "total_steps": of("total_steps"),
        "adapter_path": of("adapter_file_path"),
        "adapter_file_path": of("adapter_file_path"),
        "adapter_download_url": of("adapter_download_url"),
        "model_metadata": {"final_loss": of("final_loss"), "training_time": of("training_time_seconds")},
        "metrics": {"training_loss": of("final_loss"), "total_steps": of("total_steps")},
    })
}
