//! A job's row in `pipeline_training_jobs`, where the application looks. Everything here is best effort but the last update.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::log::Log;
use super::net::Cancel;
use super::net::time::{iso8601, unix_seconds};
use super::status::Status;
use super::supabase::{ServiceError, Supabase};

const TABLE: &str = "pipeline_training_jobs";
const METRICS: &str = "pipeline_training_metrics";
/// Code of the database for a text that its type cannot be read from.
const NO_SUCH_VALUE: &str = "22P02";
/// Steps between two tries to get a row that another worker is at.
const LOOKS: u32 = 6;

/// The row of one job.
#[derive(Debug, Clone)]
pub struct Row {
    supabase: Supabase,
    job_id: String,
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
}

impl Row {
    /// That of job `job_id`.
    pub fn new(supabase: &Supabase, job_id: &str) -> Self {
        Self {
            supabase: supabase.clone(),
            job_id: job_id.to_owned(),
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
        loop {
            let row = match self.read().await {
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
            match self.take(&row).await {
                Ok(true) => return Claim::Ours,
                Ok(false) => seen = None,
                Err(error) => return Claim::Unreachable(error.to_string()),
            }
        }
    }

    /// Writes `running` if nobody wrote since `row` was read.
    async fn take(&self, row: &Map<String, Value>) -> Result<bool, ServiceError> {
        let id = self.id();
        let renewed = match row.get("updated_at").and_then(Value::as_str) {
            Some(at) => format!("eq.{at}"),
            None => "is.null".to_owned(),
        };
        let filters = [
            ("id", &*id),
            ("updated_at", &*renewed),
            ("status", "neq.cancelled"),
        ];
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
        let rows = self.supabase.patch(TABLE, &filters, &body, true).await?;
        Ok(!rows.is_empty())
    }

    /// Writes `body`, unless the application cancelled the job.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn write(&self, body: &Map<String, Value>) -> Result<Updated, ServiceError> {
        let id = self.id();
        let filters = [("id", &*id), ("status", "neq.cancelled")];
        let written = self.supabase.patch(TABLE, &filters, body, true).await;
        match written {
            Ok(rows) if !rows.is_empty() => Ok(Updated::Yes),
            Ok(_) => Ok(match self.read().await? {
                None => Updated::Missing,
                Some(_) => Updated::Cancelled,
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

/// Whether a row says that the adapter is where it should be.
pub fn is_delivered(row: &Map<String, Value>) -> bool {
    let path = row.get("adapter_file_path").and_then(Value::as_str);
    row.get("status").and_then(Value::as_str) == Some("completed")
        && path.is_some_and(|path| !path.is_empty())
}
