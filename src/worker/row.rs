//! A job's row in `pipeline_training_jobs`, where the application looks. Everything here is best effort but the last update.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::deliver::patiently;
use super::log::Log;
use super::net::Cancel;
use super::net::time::{iso8601, unix_seconds};
use super::status::Status;
use super::supabase::{ServiceError, Supabase};

const TABLE: &str = "pipeline_training_jobs";
const METRICS: &str = "pipeline_training_metrics";
/// Code of the database for a text that its type cannot be read from.
const NO_SUCH_VALUE: &str = "22P02";
/// Time that a row is asked for before a job begins without it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Tries to write a row that somebody else wrote in between, and the time between them.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// Steps between two tries to get a row that another worker is at.
const LOOKS: u32 = 6;
/// What a worker that trains changes, and nobody else.
const OF_TRAINING: [&str; 4] = ["progress", "current_step", "current_epoch", "current_loss"];

/// The row of one job.
#[derive(Debug, Clone)]
pub struct Row {
    supabase: Supabase,
    job_id: String,
    /// Its `updated_at` after this worker's last update.
    seen: Arc<Mutex<Option<Value>>>,
}

/// What the row says at the beginning.
#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// This worker's.
    Ours,
    /// There is none, as for a job of the older contract.
    Missing,
    /// It was delivered before.
    Completed(Map<String, Value>),
    /// The application does not want it any more.
    Cancelled,
    /// The database cannot be asked.
    Unreachable(String),
}

/// What an update came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Updated {
    /// It is written.
    Yes,
    /// There is no such row.
    Missing,
    /// The application cancelled the job; it is left so.
    Cancelled,
    /// Somebody wrote that the job runs, or is finished, since this worker last wrote; it is left so.
    Contested,
}

impl Row {
    /// That of job `job_id`.
    pub fn new(supabase: &Supabase, job_id: &str) -> Self {
        Self {
            supabase: supabase.clone(),
            job_id: job_id.to_owned(),
            seen: Arc::default(),
        }
    }

    /// What it holds; `None` where it is not there.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn read(&self) -> Result<Option<Map<String, Value>>, ServiceError> {
        let filter = self.id();
        let rows = self.supabase.get(TABLE, &[("id", &filter)], "*").await;
        match rows {
            Ok(rows) => Ok(rows.into_iter().next()),
            // Ids of the older contract are no UUIDs.
            Err(error) if error.code == NO_SUCH_VALUE => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the row this worker's, unless another renewed it within `lasts` (`is_known`: this worker's volume has the job already,
    /// then that other was this one's predecessor). Waits while another does.
    pub async fn claim(
        &self,
        lasts: Duration,
        is_known: bool,
        cancel: &Cancel,
        log: &Log,
    ) -> Claim {
        let mut seen: Option<(Value, tokio::time::Instant)> = None;
        let mut told = false;
        let mut tries = 0;
        loop {
            let row = match patiently(PATIENCE, cancel, async || self.read().await).await {
                Ok(Some(row)) => row,
                Ok(None) => {
                    log.warn(&format!(
                        "`{TABLE}` has no row with the id `{}`: the job is done without one, and told to the platform alone",
                        self.job_id
                    ));
                    return Claim::Missing;
                }
                Err(error) => return Claim::Unreachable(error.to_string()),
            };
            match row
                .get("status")
                .and_then(Value::as_str)
                .unwrap_or_default()
            {
                "cancelled" => return Claim::Cancelled,
                "completed" if is_delivered(&row) => return Claim::Completed(row),
                // A row that another worker is at changes; how its clock goes does not matter.
                "running" if !is_known => {
                    let renewed = row.get("updated_at").cloned().unwrap_or_default();
                    let since = match &seen {
                        Some((at, since)) if *at == renewed => *since,
                        _ => {
                            let now = tokio::time::Instant::now();
                            if !std::mem::replace(&mut told, true) {
                                log.info("the row says that another worker is at this job; looking whether it is");
                            }
                            seen = Some((renewed, now));
                            now
                        }
                    };
                    if since.elapsed() < lasts {
                        if cancel.or(tokio::time::sleep(lasts / LOOKS)).await.is_err() {
                            return Claim::Cancelled;
                        }
                        continue;
                    }
                }
                _ => {}
            }
            match patiently(PATIENCE, cancel, async || self.take(&row).await).await {
                Ok(true) => return Claim::Ours,
                // Somebody wrote in between, or the key may read and not write.
                Ok(false) if tries < TRIES => {
                    (seen, tries) = (None, tries + 1);
                    if cancel.or(tokio::time::sleep(PAUSE)).await.is_err() {
                        return Claim::Cancelled;
                    }
                }
                Ok(false) => {
                    let text = "the row can be read and not updated; is SUPABASE_SERVICE_ROLE_KEY the service role's?";
                    return Claim::Unreachable(text.to_owned());
                }
                Err(error) => return Claim::Unreachable(error.to_string()),
            }
        }
    }

    /// Writes `running` if nobody wrote since `row` was read.
    async fn take(&self, row: &Map<String, Value>) -> Result<bool, ServiceError> {
        let now = iso8601(unix_seconds());
        let mut body = Map::new();
        body.insert("status".to_owned(), json!("running"));
        body.insert("progress".to_owned(), json!(0));
        // Never equal to another worker's of the same second.
        let part = std::process::id() % 1_000_000;
        body.insert(
            "updated_at".to_owned(),
            json!(now.replace('Z', &format!(".{part:06}Z"))),
        );
        if row.get("started_at").is_none_or(Value::is_null) {
            body.insert("started_at".to_owned(), json!(now));
        }
        // What an earlier attempt may have left.
        body.insert("error_message".to_owned(), Value::Null);
        body.insert("completed_at".to_owned(), Value::Null);
        self.update_from(&updated_at(row), &body).await
    }

    /// Writes `body` if the row's `updated_at` is `before` still: of several that try, one succeeds.
    async fn update_from(
        &self,
        before: &Value,
        body: &Map<String, Value>,
    ) -> Result<bool, ServiceError> {
        let id = self.id();
        let before = match before.as_str() {
            Some(at) => format!("eq.{at}"),
            None => "is.null".to_owned(),
        };
        let filters = [
            ("id", &*id),
            ("updated_at", &*before),
            ("status", "neq.cancelled"),
        ];
        let rows = self.supabase.patch(TABLE, &filters, body, true).await?;
        if let Some(row) = rows.first() {
            self.note(updated_at(row));
        }
        Ok(!rows.is_empty())
    }

    /// Writes progress, over what this worker wrote or what says nothing of a training.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn renew(&self, body: &Map<String, Value>) -> Result<Updated, ServiceError> {
        let seen = self
            .seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(seen) = seen
            && self.update_from(&seen, body).await?
        {
            return Ok(Updated::Yes);
        }
        let Some(row) = self.read().await? else {
            return Ok(Updated::Missing);
        };
        match row.get("status").and_then(Value::as_str) {
            Some("cancelled") => Ok(Updated::Cancelled),
            Some("running" | "completed") => Ok(Updated::Contested),
            _ if self.update_from(&updated_at(&row), body).await? => Ok(Updated::Yes),
            _ => Ok(Updated::Contested),
        }
    }

    /// Whether another worker is at this job: it gets on within `lasts`, though this one does not write. If not, the row is this
    /// worker's again.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn is_others(&self, lasts: Duration, stopped: &Cancel) -> Result<bool, ServiceError> {
        let mut first = None;
        for _ in 0..=LOOKS {
            let row = self.read().await?.unwrap_or_default();
            if row.get("status").and_then(Value::as_str) == Some("completed") {
                return Ok(true);
            }
            self.note(updated_at(&row));
            let state = OF_TRAINING.map(|name| row.get(name).cloned());
            if *first.get_or_insert_with(|| state.clone()) != state {
                return Ok(true);
            }
            if stopped.or(tokio::time::sleep(lasts / LOOKS)).await.is_err() {
                break;
            }
        }
        Ok(false)
    }

    fn note(&self, updated_at: Value) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(updated_at);
    }

    /// Writes `body`, unless the application cancelled the job.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn write(&self, body: &Map<String, Value>) -> Result<Updated, ServiceError> {
        self.write_where("neq.cancelled", body).await
    }

    /// Writes a failure, unless the application cancelled the job, or somebody finished it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn fail(&self, body: &Map<String, Value>) -> Result<Updated, ServiceError> {
        self.write_where("not.in.(cancelled,completed)", body).await
    }

    async fn write_where(
        &self,
        status: &str,
        body: &Map<String, Value>,
    ) -> Result<Updated, ServiceError> {
        let id = self.id();
        let filters = [("id", &*id), ("status", status)];
        let written = self.supabase.patch(TABLE, &filters, body, true).await;
        match written {
            Ok(rows) if !rows.is_empty() => Ok(Updated::Yes),
            Ok(_) => Ok(match self.read().await? {
                None => Updated::Missing,
                Some(row) if row.get("status").and_then(Value::as_str) == Some("cancelled") => {
                    Updated::Cancelled
                }
                Some(_) => Updated::Contested,
            }),
            // Of the id or of a value of `body`: whether there is a row tells.
            Err(error) if error.code == NO_SUCH_VALUE => match self.read().await? {
                None => Ok(Updated::Missing),
                Some(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Adds the metrics of `status`.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn metrics(&self, status: &Status, seconds: Option<f64>) -> Result<(), ServiceError> {
        let values = [
            (
                "training_loss",
                "Training Loss",
                status.metrics.training_loss,
                "nats",
            ),
            (
                "gpu_utilization",
                "GPU Utilization",
                status.metrics.gpu_utilization,
                "percentage",
            ),
            ("training_time", "Training Time", seconds, "seconds"),
        ];
        let row = |(id, name, value, unit): (&str, &str, Option<f64>, &str)| {
            let value = value.filter(|value| value.is_finite())?;
            let row = json!({
                "job_id": self.job_id,
                "metric_id": id,
                "metric_name": name,
                "metric_level": "universal",
                "value": value,
                "unit": unit,
                "step_number": status.current_step,
                "epoch_number": super::status::whole(status.current_epoch.floor()),
                "measurement_method": "brightrun",
            });
            row.as_object().cloned()
        };
        let rows: Vec<Map<String, Value>> = values.into_iter().filter_map(row).collect();
        self.supabase.insert(METRICS, &rows).await
    }

    fn id(&self) -> String {
        format!("eq.{}", self.job_id)
    }
}

fn updated_at(row: &Map<String, Value>) -> Value {
    row.get("updated_at").cloned().unwrap_or_default()
}

/// Whether a row says that the adapter is where it should be.
pub fn is_delivered(row: &Map<String, Value>) -> bool {
    let path = row.get("adapter_file_path").and_then(Value::as_str);
    row.get("status").and_then(Value::as_str) == Some("completed")
        && path.is_some_and(|path| !path.is_empty())
}
