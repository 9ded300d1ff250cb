//! `brightrun worker --rp_probe`: a record of what the platform does where its documents say nothing. Names, times and statuses, no
//! value of anything; one JSON object a line.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Response;
use serde_json::{Value, json};

use super::net::time::unix_seconds;

/// File of the state directory.
pub const FILE: &str = "probe.jsonl";
/// Longest that a worker outstays a SIGTERM to see when it is killed.
const MOST_GRACE: Duration = Duration::from_mins(15);

/// The record, or none. Clones write to the same file.
#[derive(Debug, Clone, Default)]
pub struct Probe(Option<Arc<Mutex<fs_err::File>>>);

impl Probe {
    /// Goes on with the record in directory `dir`: the worker begins, with the variables named `variables`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(dir: &Path, variables: &[String]) -> std::io::Result<Self> {
        let mut options = fs_err::OpenOptions::new();
        let file = options.append(true).create(true).open(dir.join(FILE))?;
        let probe = Self(Some(Arc::new(Mutex::new(file))));
        let version = env!("CARGO_PKG_VERSION");
        probe.note(json!({"event": "begin", "version": version, "variables": variables}));
        Ok(probe)
    }

    /// Whether anything is recorded.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Request `name`, begun then, was answered or not.
    pub fn request(&self, name: &str, begun: Instant, answer: &reqwest::Result<Response>) {
        let mut line = json!({"event": "request", "request": name, "seconds": seconds(begun)});
        match answer {
            Ok(response) => line["status"] = json!(response.status().as_u16()),
            Err(error) if error.is_timeout() => line["error"] = json!("timeout"),
            Err(error) if error.is_connect() => line["error"] = json!("connect"),
            Err(_) => line["error"] = json!("broken"),
        }
        self.note(line);
    }

    /// Which keys a job has, and those of the objects in it.
    pub fn job(&self, job: &Value) {
        let mut keys = Vec::new();
        for (key, value) in job.as_object().into_iter().flatten() {
            keys.push(key.clone());
            let inner = value.as_object().into_iter().flatten();
            keys.extend(inner.map(|(name, _)| format!("{key}.{name}")));
        }
        self.note(json!({"event": "job", "keys": keys}));
    }

    /// Counts the seconds since a SIGTERM, until the process is killed; returns when that does not happen.
    pub async fn count_grace(&self) {
        let begun = Instant::now();
        while self.is_on() && begun.elapsed() < MOST_GRACE {
            self.note(json!({"event": "sigterm", "seconds": seconds(begun)}));
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Writes a line and brings it to the disk: the next moment may be the process's last.
    fn note(&self, mut line: Value) {
        let Some(file) = &self.0 else { return };
        line["unix_seconds"] = json!(unix_seconds());
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // A record is not worth a job.
        let _ = file.write_all(format!("{line}\n").as_bytes());
        let _ = file.sync_data();
    }
}

fn seconds(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_known_by_its_keys_alone() {
        let dir = tempfile::tempdir().unwrap();
        let probe = Probe::open(dir.path(), &["RUNPOD_POD_ID".to_owned()]).unwrap();
        probe.job(&json!({"id": "canary", "input": {"key": "canary"}, "webhook": null}));
        let text = fs_err::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(!text.contains("canary"), "{text}");
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["variables"], json!(["RUNPOD_POD_ID"]));
        assert_eq!(
            lines[1]["keys"],
            json!(["id", "input", "input.key", "webhook"])
        );
    }

    #[tokio::test]
    async fn without_a_record_nothing_is_counted() {
        let probe = Probe::default();
        probe.count_grace().await;
        assert!(!probe.is_on());
    }
}
