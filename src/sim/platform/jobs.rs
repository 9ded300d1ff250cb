//! The queue: jobs, workers, and every change of their state. No I/O, no waiting.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::watch::{Violation, ViolationKind};
use crate::sim::clock;
use crate::sim::settings::Settings;

/// State of a job as the client routes show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Status {
    /// Waits for a worker.
    InQueue,
    /// Handed to a worker.
    InProgress,
    /// Has a result without a string `error`.
    Completed,
    /// Has a result with a string `error`, or ran out of time or retries.
    Failed,
    /// Cancelled by the client.
    Cancelled,
    /// Ran out of execution time, if the settings tell this apart from a failure.
    TimedOut,
}

impl Status {
    /// Whether the job is over.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::InQueue | Self::InProgress)
    }
}

/// One hand-out of a job to a worker.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Worker id.
    pub worker: String,
    /// When the worker got it.
    pub at: Instant,
    /// Results posted for it.
    pub results: u32,
    /// Whether the answer to the last result was lost on purpose, so that another try is in order.
    pub(super) answer_lost: bool,
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) document: Map<String, Value>,
    pub(super) status: Status,
    pub(super) submitted: Instant,
    pub(super) started: Option<Instant>,
    pub(super) finished: Option<Instant>,
    pub(super) output: Option<Value>,
    pub(super) error: Option<String>,
    pub(super) chunks: Vec<Value>,
    pub(super) retries: u32,
    pub(super) deliveries: Vec<Delivery>,
    pub(super) stop_pod: bool,
    pub(super) execution_timeout: Duration,
    pub(super) ttl: Duration,
}

impl Job {
    /// The worker that has the job now.
    pub(super) fn worker(&self) -> Option<&str> {
        self.deliveries
            .last()
            .map(|delivery| delivery.worker.as_str())
    }

    /// The newest hand-out to `worker`.
    fn delivery(&mut self, worker: &str) -> Option<&mut Delivery> {
        self.deliveries
            .iter_mut()
            .rev()
            .find(|delivery| delivery.worker == worker)
    }

    /// Whether `worker` has it now and is expected to name it in its pings.
    pub(super) fn runs_on(&self, worker: &str) -> bool {
        self.status == Status::InProgress && self.worker() == Some(worker)
    }
}

#[derive(Debug, Default)]
pub(super) struct Worker {
    pub(super) last_ping: Option<Instant>,
    pub(super) pings: u64,
    pub(super) stops: Vec<String>,
    pub(super) unhealthy: Vec<String>,
}

/// A final status document on its way to the job's webhook.
#[derive(Debug)]
pub(in crate::sim) struct Notice {
    pub(in crate::sim) url: String,
    pub(in crate::sim) document: Value,
}

/// What came of a posted result or progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Posted {
    Accepted,
    Again,
    Gone,
}

/// The platform's whole state.
#[derive(Debug)]
pub(in crate::sim) struct Platform {
    pub(super) settings: Settings,
    pub(super) origin: Instant,
    pub(super) jobs: BTreeMap<String, Job>,
    pub(super) queue: VecDeque<String>,
    pub(super) workers: BTreeMap<String, Worker>,
    pub(super) violations: Vec<Violation>,
    pub(super) retried: u64,
    pub(in crate::sim) outbox: Vec<Notice>,
}

impl Platform {
    pub(in crate::sim) fn new(settings: &Settings, origin: Instant) -> Self {
        Self {
            settings: settings.clone(),
            origin,
            jobs: BTreeMap::new(),
            queue: VecDeque::new(),
            workers: BTreeMap::new(),
            violations: Vec::new(),
            retried: 0,
            outbox: Vec::new(),
        }
    }

    /// Queues a job; the body is a `/run` request.
    pub(in crate::sim) fn submit(
        &mut self,
        body: Value,
        sync: bool,
    ) -> Result<String, &'static str> {
        let id = format!("{}{}-u1", if sync { "sync-" } else { "" }, clock::uuid());
        self.submit_as(&id, body)?;
        Ok(id)
    }

    /// Queues a job under an id that is not the platform's own.
    pub(in crate::sim) fn submit_as(&mut self, id: &str, body: Value) -> Result<(), &'static str> {
        let Value::Object(document) = body else {
            return Err("the body must be an object");
        };
        if document.get("input").is_none_or(Value::is_null) {
            return Err("the body must have an `input`");
        }
        let policy = |name: &str| {
            document
                .get("policy")?
                .get(name)?
                .as_u64()
                .filter(|ms| *ms > 0)
                .map(Duration::from_millis)
        };
        let job = Job {
            status: Status::InQueue,
            submitted: Instant::now(),
            started: None,
            finished: None,
            output: None,
            error: None,
            chunks: Vec::new(),
            retries: 0,
            deliveries: Vec::new(),
            stop_pod: false,
            execution_timeout: policy("executionTimeout")
                .unwrap_or(self.settings.execution_timeout),
            ttl: policy("ttl").unwrap_or(self.settings.ttl),
            document,
        };
        self.jobs.insert(id.to_owned(), job);
        self.queue.push_back(id.to_owned());
        Ok(())
    }

    /// Hands up to `most` queued jobs to `worker`.
    pub(super) fn take(&mut self, worker: &str, most: usize) -> Vec<Value> {
        let now = Instant::now();
        self.workers.entry(worker.to_owned()).or_default();
        let mut taken = Vec::new();
        while taken.len() < most {
            let Some(id) = self.queue.pop_front() else {
                break;
            };
            let Some(job) = self.jobs.get_mut(&id) else {
                continue;
            };
            job.status = Status::InProgress;
            job.started = Some(now);
            job.deliveries.push(Delivery {
                worker: worker.to_owned(),
                at: now,
                results: 0,
                answer_lost: false,
            });
            let mut document = Map::new();
            document.insert("id".to_owned(), json!(id));
            document.extend(job.document.clone());
            taken.push(Value::Object(document));
        }
        taken
    }

    /// The stop messages that wait for `worker`.
    pub(super) fn stops(&mut self, worker: &str) -> Vec<String> {
        self.workers
            .get_mut(worker)
            .map(|worker| std::mem::take(&mut worker.stops))
            .unwrap_or_default()
    }

    /// Queues a stop message for a worker, whatever the job's state.
    pub(in crate::sim) fn push_stop(&mut self, worker: &str, id: &str) {
        self.workers
            .entry(worker.to_owned())
            .or_default()
            .stops
            .push(id.to_owned());
    }

    /// Puts a job that is in progress back into the queue without telling its worker.
    pub(in crate::sim) fn requeue(&mut self, id: &str) -> bool {
        let Some(job) = self.jobs.get_mut(id) else {
            return false;
        };
        if job.status != Status::InProgress {
            return false;
        }
        job.status = Status::InQueue;
        job.retries += 1;
        self.retried += 1;
        self.queue.push_back(id.to_owned());
        true
    }

    /// Takes a result or, with `"status": "IN_PROGRESS"`, a progress report.
    pub(super) fn post(
        &mut self,
        worker: &str,
        id: &str,
        body: &Value,
        answer_lost: bool,
    ) -> Posted {
        let progress = body.get("status").and_then(Value::as_str) == Some("IN_PROGRESS");
        let Some(job) = self.jobs.get_mut(id) else {
            return Posted::Gone;
        };
        let status = job.status;
        let Some(delivery) = job.delivery(worker) else {
            return Posted::Gone;
        };
        if status.is_final() {
            if delivery.results == 0 {
                return Posted::Gone;
            }
            let retry = std::mem::replace(&mut delivery.answer_lost, answer_lost);
            if progress {
                self.violate(
                    ViolationKind::ProgressAfterResult,
                    worker,
                    id,
                    "progress after the result",
                );
            } else {
                delivery.results += 1;
                if !retry {
                    self.violate(
                        ViolationKind::SecondResult,
                        worker,
                        id,
                        "a result was answered before",
                    );
                }
            }
            return Posted::Again;
        }
        let output = body.get("output").cloned();
        if progress {
            job.output = output;
            return Posted::Accepted;
        }
        delivery.results += 1;
        delivery.answer_lost = answer_lost;
        job.stop_pod |= body
            .get("stopPod")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let (status, error) = match body.get("error") {
            Some(Value::String(error)) => (Status::Failed, Some(error.clone())),
            // With an error that is not a string, clients see a success without output.
            None | Some(_) => (Status::Completed, None),
        };
        job.output = if body.get("error").is_some_and(|error| !error.is_string()) {
            None
        } else {
            output
        };
        self.check_gap(worker, id);
        self.finish(id, status, error);
        Posted::Accepted
    }

    /// Keeps one streamed piece of output.
    pub(super) fn stream(&mut self, worker: &str, id: &str, body: &Value) -> Posted {
        match self.jobs.get_mut(id) {
            Some(job) if job.runs_on(worker) => {
                job.chunks.push(body.clone());
                Posted::Accepted
            }
            _ => Posted::Gone,
        }
    }

    /// Ends a job and, if it has a webhook, queues the notice.
    pub(super) fn finish(&mut self, id: &str, status: Status, error: Option<String>) {
        let Some(job) = self.jobs.get_mut(id) else {
            return;
        };
        job.status = status;
        job.error = error;
        job.finished = Some(Instant::now());
        let webhook = job
            .document
            .get("webhook")
            .and_then(Value::as_str)
            .map(str::to_owned);
        self.queue.retain(|queued| queued != id);
        if let (Some(url), Some(document)) = (webhook, self.document(id)) {
            self.outbox.push(Notice { url, document });
        }
    }

    /// Cancels a job; its worker, if it has one, gets a stop message. The state after.
    pub(in crate::sim) fn cancel(&mut self, id: &str) -> Option<Status> {
        let job = self.jobs.get(id)?;
        let status = job.status;
        if status.is_final() {
            return Some(status);
        }
        let worker = job
            .worker()
            .filter(|_| status == Status::InProgress)
            .map(str::to_owned);
        self.finish(id, Status::Cancelled, None);
        if let Some(worker) = worker {
            self.push_stop(&worker, id);
        }
        Some(Status::Cancelled)
    }

    /// Queues a failed job again under its id.
    pub(super) fn retry(&mut self, id: &str) -> Option<bool> {
        let job = self.jobs.get_mut(id)?;
        if !matches!(job.status, Status::Failed | Status::TimedOut) {
            return Some(false);
        }
        job.status = Status::InQueue;
        job.submitted = Instant::now();
        (job.started, job.finished, job.output, job.error) = (None, None, None, None);
        self.retried += 1;
        self.queue.push_back(id.to_owned());
        Some(true)
    }

    /// Removes every job that waits; how many there were.
    pub(super) fn purge(&mut self) -> usize {
        let purged = std::mem::take(&mut self.queue);
        for id in &purged {
            self.jobs.remove(id);
        }
        purged.len()
    }

    /// The status document of a job.
    pub(in crate::sim) fn document(&self, id: &str) -> Option<Value> {
        let job = self.jobs.get(id)?;
        let mut document = json!({"id": id, "status": job.status});
        let millis = |from: Option<Instant>, to: Option<Instant>| {
            Some(
                u64::try_from(to?.saturating_duration_since(from?).as_millis()).unwrap_or(u64::MAX),
            )
        };
        let fields = [
            (
                "delayTime",
                millis(Some(job.submitted), job.started).map(Value::from),
            ),
            (
                "executionTime",
                millis(job.started, job.finished).map(Value::from),
            ),
            ("workerId", job.worker().map(Value::from)),
            ("output", job.output.clone()),
            ("error", job.error.clone().map(Value::from)),
        ];
        for (name, value) in fields {
            if let Some(value) = value {
                document[name] = value;
            }
        }
        Some(document)
    }
}
