//! The queue of RunPod: jobs taken, stopped, reported, answered.

use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::net::backoff::{Backoff, spread};
use super::net::error::cause;
use super::net::time::{retry_after, unix_seconds};
use super::probe::Probe;
use crate::config::{RunpodEnv, Secret};
use crate::http::client_builder;

/// The platform holds a request for a job open for less.
const LONG_POLL: Duration = Duration::from_secs(90);
/// Time for progress to arrive.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(20);
/// Time for a result to arrive.
const RESULT_TIMEOUT: Duration = Duration::from_mins(1);
/// What the platform is asked to wait for where it is throttled and does not say.
const THROTTLED: Duration = Duration::from_secs(5);
/// Longest that the platform may ask to wait for.
const LONGEST_ASKED: Duration = Duration::from_mins(1);
const USER_AGENT: &str = concat!("brightrun/", env!("CARGO_PKG_VERSION"));

/// A worker's line to the platform. Clones share connections.
#[derive(Debug, Clone)]
pub struct Platform {
    client: Client,
    get_job: String,
    post_output: String,
    key: Secret,
    probe: Probe,
    /// This worker.
    pub worker_id: String,
}

/// A job as it was handed out.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// RunPod's id of it.
    pub id: String,
    /// What was asked for.
    pub input: Value,
    /// The most it may take, where the job says so.
    pub execution_timeout: Option<Duration>,
}

impl Taken {
    /// Reads a job of the platform.
    ///
    /// # Errors
    /// What is missing, and the id where there is one, so that the job can be refused.
    pub fn parse(job: &Value) -> Result<Self, (Option<String>, String)> {
        let id = job["id"]
            .as_str()
            .filter(|id| !id.is_empty())
            .map(str::to_owned);
        match (id, job.get("input").filter(|input| !input.is_null())) {
            (Some(id), Some(input)) => Ok(Self {
                id,
                input: input.clone(),
                execution_timeout: job["policy"]["executionTimeout"]
                    .as_u64()
                    .map(Duration::from_millis),
            }),
            (id, _) => Err((id, "job has missing field(s): id or input".to_owned())),
        }
    }
}

/// What asking for a job came to.
#[derive(Debug, PartialEq)]
pub enum Take {
    /// One or more jobs.
    Jobs(Vec<Value>),
    /// None now.
    Empty,
    /// None now, and the platform is not to be asked for a while (400: a revived worker).
    Floor(Duration),
    /// Something failed.
    Failed(String),
}

/// What became of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Posted {
    /// It is there.
    Accepted,
    /// The platform no longer knows the job: it was cancelled, or its time is over.
    Gone,
    /// Nobody knows: it could not be delivered in time.
    Undelivered(String),
    /// The key is refused.
    Unauthorized,
}

impl Platform {
    /// By the templates of the environment; `None` where there is no queue.
    ///
    /// # Errors
    /// What is missing.
    pub fn new(env: &RunpodEnv, worker_id: &str) -> Result<Option<Self>, String> {
        let Some(get_job) = &env.get_job else {
            return Ok(None);
        };
        let Some(post_output) = &env.post_output else {
            return Err("RUNPOD_WEBHOOK_GET_JOB is set and RUNPOD_WEBHOOK_POST_OUTPUT is not: results could not be sent".to_owned());
        };
        let client = client_builder()
            .user_agent(USER_AGENT)
            .build()
            .map_err(cause)?;
        let expand = |template: &str| expand(template, worker_id, env);
        Ok(Some(Self {
            client,
            // Here `$ID` is the worker.
            get_job: expand(get_job).replace("$ID", worker_id),
            post_output: expand(post_output),
            key: env.key.clone(),
            probe: Probe::default(),
            worker_id: worker_id.to_owned(),
        }))
    }

    /// The same, with what the platform does recorded.
    #[must_use]
    pub fn with_probe(self, probe: Probe) -> Self {
        Self { probe, ..self }
    }

    /// Asks for a job, being at none; returns when there is one, or when the platform ends the wait.
    pub async fn take(&self) -> Take {
        let url = with_query(&self.get_job, "job_in_progress=0");
        let response = match self.get("job-take", &url).await {
            Ok(response) => response,
            // A wait that ends without an answer is an empty one.
            Err(error) if error.is_timeout() => return Take::Empty,
            Err(error) => return Take::Failed(format!("job-take: {}", cause(error))),
        };
        match response.status().as_u16() {
            204 => Take::Empty,
            400 => Take::Floor(Duration::from_secs(1)),
            429 => Take::Floor(asked(&response).unwrap_or(THROTTLED)),
            status @ 300.. => Take::Failed(format!("job-take answered {status}")),
            _ => match response.json::<Value>().await {
                Ok(Value::Array(jobs)) => self.taken(jobs),
                Ok(job @ Value::Object(_)) => self.taken(vec![job]),
                _ => Take::Floor(Duration::from_secs(1)),
            },
        }
    }

    /// Address of the channel that tells which jobs to stop; `None` where the template has no place for it.
    pub fn stop_url(&self) -> Option<String> {
        let is_there = self.get_job.contains("/job-take/");
        is_there.then(|| self.get_job.replacen("/job-take/", "/job-stop/", 1))
    }

    /// Asks which jobs are to be stopped.
    ///
    /// # Errors
    /// How long to wait, and why where it is worth a line.
    pub async fn stops(&self, url: &str) -> Result<Vec<String>, (Duration, Option<String>)> {
        let second = Duration::from_secs(1);
        let response = match self.get("job-stop", url).await {
            Ok(response) => response,
            Err(error) if error.is_timeout() => return Err((second, None)),
            Err(error) => return Err((second, Some(format!("job-stop: {}", cause(error))))),
        };
        match response.status().as_u16() {
            200 => {
                let body = response.json::<Value>().await.unwrap_or_default();
                let ids = body["jobsToStop"].as_array().cloned().unwrap_or_default();
                Ok(ids
                    .iter()
                    .filter_map(|id| id.as_str().map(str::to_owned))
                    .collect())
            }
            204 => Err((second, None)),
            429 => Err((asked(&response).unwrap_or(THROTTLED), None)),
            status => Err((second, Some(format!("job-stop answered {status}")))),
        }
    }

    /// Tells how far job `id` is. Once, and whatever comes of it.
    ///
    /// # Errors
    /// Why it did not arrive.
    pub async fn progress(&self, id: &str, output: &Value) -> Result<(), String> {
        let body = json!({"status": "IN_PROGRESS", "output": output});
        match self.post("progress", id, &body, PROGRESS_TIMEOUT).await {
            Ok(response) if response.status().is_success() => Ok(()),
            Ok(response) => Err(format!(
                "progress was answered {}",
                response.status().as_u16()
            )),
            Err(error) => Err(format!("progress: {}", cause(error))),
        }
    }

    /// Delivers the result of job `id`, trying for `patience`. What is refused as it is goes again in fewer words, then as an error.
    pub async fn result(&self, id: &str, body: &Value, patience: Duration) -> Posted {
        let minimal = minimal(body);
        let apology =
            json!({"error": "the result was refused by the platform; it is stored with the job"});
        let mut bodies = [body, &minimal, &apology].into_iter();
        let Some(mut body) = bodies.next() else {
            return Posted::Accepted;
        };
        let deadline = tokio::time::Instant::now() + patience;
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let mut answer_was_lost = false;
        loop {
            let why = match self.post("job-done", id, body, RESULT_TIMEOUT).await {
                Ok(response) => {
                    let status = response.status();
                    match status.as_u16() {
                        200..=299 => return Posted::Accepted,
                        404 | 410 if answer_was_lost => return Posted::Accepted,
                        404 | 410 => return Posted::Gone,
                        401 | 403 => return Posted::Unauthorized,
                        _ if is_passing(status) => {
                            (format!("answered {}", status.as_u16()), asked(&response))
                        }
                        // After an answer that was lost: it was there already.
                        _ if answer_was_lost => return Posted::Accepted,
                        status => match bodies.next() {
                            Some(next) => {
                                body = next;
                                continue;
                            }
                            None => return Posted::Undelivered(format!("answered {status}")),
                        },
                    }
                }
                Err(error) => {
                    answer_was_lost |= !error.is_connect();
                    (cause(error), None)
                }
            };
            let wait = backoff.next(why.1);
            if tokio::time::Instant::now() + wait > deadline {
                return Posted::Undelivered(why.0);
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn taken(&self, jobs: Vec<Value>) -> Take {
        jobs.iter().for_each(|job| self.probe.job(job));
        Take::Jobs(jobs)
    }

    async fn get(&self, name: &str, url: &str) -> reqwest::Result<Response> {
        let request = self.client.get(url).timeout(LONG_POLL);
        let request = request.header("Authorization", self.key.expose());
        let begun = Instant::now();
        let answer = request.send().await;
        self.probe.request(name, begun, &answer);
        answer
    }

    async fn post(
        &self,
        name: &str,
        id: &str,
        body: &Value,
        timeout: Duration,
    ) -> reqwest::Result<Response> {
        let url = with_query(&self.post_output.replace("$ID", id), "isStream=false");
        // The platform's own workers send JSON under this type.
        let request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header("charset", "utf-8")
            .header("X-Request-ID", id)
            .header("Authorization", self.key.expose())
            .timeout(timeout);
        let begun = Instant::now();
        let answer = request.body(body.to_string()).send().await;
        self.probe.request(name, begun, &answer);
        answer
    }
}

/// Replaces what a template names but the job.
pub(super) fn expand(template: &str, worker_id: &str, env: &RunpodEnv) -> String {
    let text = template.replace("$RUNPOD_POD_ID", worker_id);
    match &env.gpu_type_id {
        Some(gpu) => text.replace("$RUNPOD_GPU_TYPE_ID", gpu),
        None => text,
    }
}

/// Adds to the query of an address, leaving what is there as it is.
pub(super) fn with_query(url: &str, query: &str) -> String {
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}{query}")
}

fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
}

fn asked(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    allowed(value)
}

/// The wait of a `Retry-After`: no longer than a worker may be away, and not the same for all workers.
fn allowed(value: &str) -> Option<Duration> {
    let wait = retry_after(value, unix_seconds())?;
    Some(spread(wait.min(LONGEST_ASKED)))
}

/// What an application cannot do without.
fn minimal(body: &Value) -> Value {
    let mut small = Map::new();
    if let Some(error) = body["error"].as_str() {
        small.insert(
            "error".to_owned(),
            json!(error.chars().take(1000).collect::<String>()),
        );
    }
    let keys = [
        "status",
        "job_id",
        "adapter_path",
        "adapter_file_path",
        "progress",
    ];
    let output: Map<String, Value> = keys
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), body["output"].get(key)?.clone())))
        .chain(
            body["output"]["model_metadata"]["final_loss"]
                .as_f64()
                .map(|loss| ("model_metadata".to_owned(), json!({"final_loss": loss}))),
        )
        .collect();
    if !output.is_empty() {
        small.insert("output".to_owned(), Value::Object(output));
    }
    Value::Object(small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_is_asked_for_is_bounded_and_spread() {
        for (value, seconds) in [("8", 8), ("86400", 60)] {
            let waits: Vec<Duration> = (0..50).filter_map(|_| allowed(value)).collect();
            let (least, most) = (
                Duration::from_secs(seconds),
                Duration::from_secs(seconds).mul_f64(1.25),
            );
            assert!(
                waits.iter().all(|wait| (least..=most).contains(wait)),
                "{waits:?}"
            );
            assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
        }
        assert_eq!(allowed("soon"), None);
    }
}
