//! Bringing a finished adapter home. What is done is written down, so that a later start goes on where this one ended, and does
//! nothing twice.

mod upload;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::archive::{self, Sealed};
use super::callback::Event;
use super::context::Context;
use super::log::Log;
use super::net::Cancel;
use super::net::backoff::Backoff;
use super::net::time::{iso8601, unix_seconds};
use super::news::{self, Told};
use super::platform::Posted;
use super::row::{Row, Updated, is_delivered};
use super::state::{JobDir, Stored};
use super::status::whole;
use super::supabase::{ServiceError, Supabase};
use crate::config::Secret;
pub use upload::Known;
use upload::Way;

/// File of a job's directory that says what is trained and how much of it is delivered.
pub const FILE: &str = "delivery.json";
const ARCHIVE: &str = "adapter.tar.gz";
const MANIFEST: &str = "manifest.json";
/// Time that signed addresses of the adapter are good for, in seconds: 7 days.
const SIGNED_S: u64 = 7 * 24 * 3600;
/// The dispatcher writes its `initializing` after the job is accepted; what it overwrote is written again within this time.
const DISPATCHER: Duration = Duration::from_mins(1);
/// When the row is looked at for that.
const LOOK_AGAIN: Duration = Duration::from_secs(12);
/// Time that the row is tried for before the platform is answered: a GPU waits.
const ROW_PATIENCE: Duration = Duration::from_mins(1);

/// What was trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Hub id of the base model.
    pub base_model: String,
    /// Rank of the adapter.
    pub lora_rank: usize,
    /// Directory of the adapter, in the job's own: a volume is mounted elsewhere in another worker.
    pub adapter: PathBuf,
    /// Optimizer steps.
    pub steps: u64,
    /// Epochs.
    pub epochs: f64,
    /// Mean loss per target token over the last epoch, in nats.
    pub final_loss: Option<f64>,
    /// That of the held-out data.
    pub eval_loss: Option<f64>,
    /// Seconds of training.
    pub training_s: f64,
    /// Tokens per second over the run.
    pub tokens_per_s: Option<f64>,
    /// What the application should know.
    pub warnings: Vec<String>,
    /// What was trained on and how: what was skipped, folded, truncated.
    #[serde(default)]
    pub report: Vec<String>,
}

/// A delivery under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a part of the delivery that is done or not"
)]
pub struct Delivery {
    /// The application's id of the job.
    pub job_id: String,
    /// RunPod's id of it.
    pub runpod_id: String,
    /// Where the application wants to be told, beside the row.
    pub callback_url: Option<String>,
    /// What was trained.
    pub trained: Trained,
    /// When the job was taken, in seconds since 1970.
    pub begun: u64,
    /// When the training ended.
    pub finished: u64,
    /// The archive, once it is packed.
    pub archive: Option<Sealed>,
    /// Digests of the adapter's files, once they are known.
    #[serde(default)]
    pub digests: Vec<Known>,
    /// Texts that the bucket does not take.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// Place of its end among the events of the callback, where that is known.
    #[serde(default)]
    pub seq: Option<u64>,
    /// Everything is in the storage and verified.
    pub uploaded: bool,
    /// The answer, once it is known.
    pub output: Option<Value>,
    /// The row says `completed`, or can never be written.
    pub row_written: bool,
    /// The platform has the answer, or does not want it any more.
    pub posted: bool,
    /// The callback has the news, or cannot be had.
    pub told: bool,
    /// The job was ended while it was delivered: it goes on only where the same job is given again.
    #[serde(default)]
    pub stopped: bool,
}

/// Why a delivery does not go on now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stuck {
    /// The application cancelled the job.
    Cancelled,
    /// Something cannot be reached or refuses; the adapter is kept.
    Kept(String),
}

/// Why a row does not say that the adapter is there.
enum Unwritten {
    /// The application cancelled the job.
    Cancelled,
    /// The database is away or refuses.
    Failed(ServiceError),
}

impl Delivery {
    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.is_given() && self.told
    }

    /// Whether storage, row and platform have what is theirs: what remains, the callback, needs no file.
    pub fn is_given(&self) -> bool {
        self.uploaded && self.row_written && self.posted
    }

    /// Directory of the adapter.
    fn adapter(&self, job: &JobDir) -> PathBuf {
        job.path("").join(&self.trained.adapter)
    }

    /// Storage, then the answer, each once. At the end [`Self::output`] is there.
    ///
    /// # Errors
    /// [`Stuck`].
    pub async fn bring(
        &mut self,
        context: &Context,
        job: &JobDir,
        log: &Log,
        cancel: &Cancel,
    ) -> Result<(), Stuck> {
        let kept = |error: String| Stuck::Kept(log.redact(&error));
        let Some(supabase) = &context.supabase else {
            (self.uploaded, self.row_written) = (true, true);
            let adapter = self.adapter(job).display().to_string();
            let output = self.describe(&adapter, &Map::new(), None);
            self.output.get_or_insert(output);
            return self.save(job).map_err(kept);
        };
        if !self.uploaded {
            let way = Way {
                supabase,
                context,
                job,
                log,
                cancel,
            };
            self.upload(&way).await?;
        }
        if self.output.is_none() {
            let answer = self.answer(supabase, context, job).await;
            self.output = Some(answer.map_err(|error| kept(error.to_string()))?);
            self.save(job).map_err(kept)?;
        }
        Ok(())
    }

    /// The row's last word, once, after all reports: the application deploys at every update of a finished row. Where the
    /// database cannot be reached it is left for later.
    ///
    /// # Errors
    /// [`Stuck::Cancelled`]; those of the file system.
    pub async fn conclude(
        &mut self,
        context: &Context,
        job: &JobDir,
        log: &Log,
        cancel: &Cancel,
    ) -> Result<(), Stuck> {
        let (Some(supabase), false) = (&context.supabase, self.row_written) else {
            return Ok(());
        };
        let row = Row::new(supabase, &self.job_id);
        match self.write_row(&row, context, log, cancel).await {
            Ok(()) => self.row_written = true,
            Err(Unwritten::Cancelled) => return Err(Stuck::Cancelled),
            // The adapter is there and the platform is told; the row follows.
            Err(Unwritten::Failed(error)) if error.retryable => {
                log.warn(&log.redact(&format!("the row is written later: {error}")));
            }
            Err(Unwritten::Failed(error)) => {
                log.warn(&log.redact(&format!(
                    "the row stays without the adapter, which only the platform's answer names: {error}; trying again would not \
                     mend that"
                )));
                self.row_written = true;
            }
        }
        let kept = |error: String| Stuck::Kept(log.redact(&error));
        self.save(job).map_err(kept)
    }

    /// Writes the row's last word once more, where the job was sent again, `begun` then, and its row says something else.
    pub async fn show_again(&self, context: &Context, begun: u64, log: &Log) {
        let Some(supabase) = &context.supabase else {
            return;
        };
        let again = Self {
            begun,
            ..self.clone()
        };
        let row = Row::new(supabase, &self.job_id);
        let written = again.write_row(&row, context, log, &Cancel::never()).await;
        if let Err(Unwritten::Failed(error)) = written {
            log.warn(&log.redact(&format!("the row could not be written again: {error}")));
        }
    }

    /// Writes the state of the delivery.
    ///
    /// # Errors
    /// Those of the file system, for a person.
    pub fn save(&self, job: &JobDir) -> Result<(), String> {
        job.write(FILE, self).map_err(|error| error.to_string())
    }

    /// Bytes of the answer to the platform.
    pub fn body(&self) -> Value {
        json!({"output": self.output})
    }

    /// Writes the answer down before it is given.
    ///
    /// # Errors
    /// Those of the file system, for a person.
    pub fn store(&self, job: &JobDir) -> Result<(), String> {
        let stored = Stored { body: self.body() };
        job.write("result.json", &stored)
            .map_err(|error| error.to_string())
    }

    /// Path of the archive in the bucket.
    fn archive_path(&self) -> String {
        format!("adapters/{}.tar.gz", self.job_id)
    }

    fn file_path(&self, name: &str) -> String {
        format!("adapters/{}/{name}", self.job_id)
    }

    async fn answer(
        &self,
        supabase: &Supabase,
        context: &Context,
        job: &JobDir,
    ) -> Result<Value, ServiceError> {
        let bucket = &context.env.bucket;
        let never = Cancel::never();
        let sign = async |path: &str| {
            patiently(context.env.retry, &never, async || {
                supabase.sign(bucket, path, SIGNED_S).await
            })
            .await
        };
        let mut files = Map::new();
        let paths = archive::files(&self.adapter(job)).unwrap_or_default();
        for path in paths {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if self.left_out.contains(&name) {
                continue;
            }
            let url = sign(&self.file_path(&name)).await?;
            files.insert(name, json!(url));
        }
        let archive = self.archive_path();
        let url = sign(&archive).await?;
        Ok(self.describe(&format!("{bucket}/{archive}"), &files, Some(&url)))
    }

    /// What both contracts of the application look for.
    fn describe(&self, path: &str, files: &Map<String, Value>, archive_url: Option<&str>) -> Value {
        let trained = &self.trained;
        json!({
            "status": "completed",
            "job_id": self.job_id,
            "progress": 100,
            "stage": "completed",
            "current_epoch": trained.epochs,
            "current_step": trained.steps,
            "total_steps": trained.steps,
            "adapter_path": path,
            "adapter_file_path": path,
            "adapter_download_url": archive_url,
            "adapter_sha256": self.archive.as_ref().map(|sealed| &sealed.sha256),
            "adapter_size_bytes": self.archive.as_ref().map(|sealed| sealed.bytes),
            "model_files": files,
            "download_urls": files,
            "model_metadata": {
                "base_model": trained.base_model,
                "lora_rank": trained.lora_rank,
                "final_loss": trained.final_loss,
                "training_time": trained.training_s,
            },
            "metrics": {
                "training_loss": trained.final_loss,
                "validation_loss": trained.eval_loss,
                "throughput": trained.tokens_per_s,
                "total_steps": trained.steps,
                "train_duration_minutes": trained.training_s / 60.0,
            },
            "warnings": trained.warnings,
            "report": trained.report,
        })
    }

    /// The one update that makes the application deploy the adapter. What is there already is not written again.
    async fn write_row(
        &self,
        row: &Row,
        context: &Context,
        log: &Log,
        cancel: &Cancel,
    ) -> Result<(), Unwritten> {
        let patience = context.env.retry.min(ROW_PATIENCE);
        let read = patiently(patience, cancel, async || row.read().await);
        match read.await.map_err(Unwritten::Failed)? {
            None => return Ok(()),
            Some(row) if is_delivered(&row) => {
                log.info("the row says already that the adapter is there");
                return Ok(());
            }
            Some(row) if row.get("status").and_then(Value::as_str) == Some("cancelled") => {
                return Err(Unwritten::Cancelled);
            }
            Some(_) => {}
        }
        let body = self.final_row();
        let written = patiently(patience, cancel, async || row.write(&body).await);
        match written.await.map_err(Unwritten::Failed)? {
            Updated::Cancelled => return Err(Unwritten::Cancelled),
            Updated::Missing => return Ok(()),
            Updated::Yes | Updated::Contested => {}
        }
        let is_settled = |row: &Map<String, Value>| {
            is_delivered(row) || row.get("status").and_then(Value::as_str) == Some("cancelled")
        };
        settle(row, &body, self.begun, context.env.report, is_settled, log).await;
        Ok(())
    }

    fn final_row(&self) -> Map<String, Value> {
        let trained = &self.trained;
        let now = iso8601(unix_seconds());
        let output = self.output.as_ref();
        let of_output = |key: &str| {
            output
                .and_then(|output| output.get(key))
                .cloned()
                .unwrap_or_default()
        };
        let entries = [
            ("status", json!("completed")),
            ("progress", json!(100)),
            ("current_epoch", whole(trained.epochs.floor())),
            ("current_step", json!(trained.steps)),
            ("total_steps", json!(trained.steps)),
            (
                "final_loss",
                json!(trained.final_loss.filter(|loss| loss.is_finite())),
            ),
            ("training_time_seconds", whole(trained.training_s)),
            ("adapter_file_path", of_output("adapter_file_path")),
            ("adapter_download_url", of_output("adapter_download_url")),
            ("completed_at", json!(iso8601(self.finished))),
            ("updated_at", json!(now)),
        ];
        let entries = entries.into_iter().filter(|(_, value)| !value.is_null());
        let mut row: Map<String, Value> = entries
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        // What an earlier attempt may have left.
        row.insert("error_message".to_owned(), Value::Null);
        row
    }

    /// Notes what became of the answer, removes what nobody needs any more, and tells the callback, once. The time that the callback
    /// asks to wait for.
    pub async fn finish(
        &mut self,
        posted: &Posted,
        context: &Context,
        job: &JobDir,
        log: &Log,
    ) -> Option<Duration> {
        self.posted |= matches!(posted, Posted::Accepted | Posted::Gone);
        if let Err(error) = self.save(job) {
            log.warn(&error);
        }
        if self.is_given() {
            job.tidy();
        }
        if self.told {
            return None;
        }
        if let Told::Later(asked) = self.tell(context, log).await {
            return asked;
        }
        self.told = true;
        // It may hold a secret, and is not needed any more.
        self.callback_url = None;
        if let Err(error) = self.save(job) {
            log.warn(&error);
        }
        None
    }

    /// Tells the callback, as long as it may still listen.
    async fn tell(&self, context: &Context, log: &Log) -> Told {
        let Some(url) = &self.callback_url else {
            return Told::Settled;
        };
        log.hide(&Secret::new(url));
        let (Ok(callback), Some(output)) = (context.callback(url), self.output.clone()) else {
            return Told::Settled;
        };
        let mut data = slim(output);
        data["runpod_job_id"] = json!(self.runpod_id);
        if let Some(seq) = self.seq {
            data["seq"] = json!(seq);
        }
        let id = format!("msg_{}_{}_end", event_id(&self.job_id), self.finished);
        let event = Event {
            unix_seconds: self.finished,
            ..Event::new(id, "training.completed", data)
        };
        news::tell(&callback, &event, log).await
    }
}

/// Looks at a row whose last word was written, and writes it again where the dispatcher, who writes after the job was accepted,
/// overwrote it.
pub async fn settle(
    row: &Row,
    body: &Map<String, Value>,
    begun: u64,
    report: Duration,
    is_settled: impl Fn(&Map<String, Value>) -> bool,
    log: &Log,
) {
    if Duration::from_secs(unix_seconds().saturating_sub(begun)) > DISPATCHER {
        return;
    }
    tokio::time::sleep(LOOK_AGAIN.min(2 * report)).await;
    let now = row.read().await.ok().flatten();
    if now.is_some_and(|now| !is_settled(&now)) {
        log.warn("the row's last state was overwritten; it is written again");
        let _ = row.write(body).await;
    }
}

/// An id without dots, as those of events are.
pub fn event_id(job_id: &str) -> String {
    job_id.replace('.', "-")
}

/// Events stay small: without addresses of files, which are in the row and in the answer.
fn slim(mut output: Value) -> Value {
    if let Some(map) = output.as_object_mut() {
        map.remove("download_urls");
    }
    output
}

/// Types of the objects of a delivery: archive, settings, texts, weights. A bucket has to take them all.
pub const CONTENT_TYPES: [&str; 4] = [
    "application/gzip",
    "application/json",
    "text/plain",
    "application/octet-stream",
];

fn content_type(name: &str) -> &'static str {
    let [archive, settings, text, other] = CONTENT_TYPES;
    match name.rsplit_once('.').map(|(_, end)| end) {
        Some("gz") => archive,
        Some("json") => settings,
        Some("md" | "jinja" | "txt") => text,
        _ => other,
    }
}

/// Tries again what may pass, for `patience`.
///
/// # Errors
/// The last one.
pub async fn patiently<T>(
    patience: Duration,
    cancel: &Cancel,
    mut attempt: impl AsyncFnMut() -> Result<T, ServiceError>,
) -> Result<T, ServiceError> {
    let deadline = tokio::time::Instant::now() + patience;
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let wait = backoff.next(error.retry_after);
        let is_over = tokio::time::Instant::now() + wait > deadline;
        if !error.retryable || is_over || cancel.or(tokio::time::sleep(wait)).await.is_err() {
            return Err(error);
        }
    }
}
