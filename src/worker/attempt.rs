//! A job from the queue to its answer. It can be ended and begun again at any point: what is done is written down.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::cancel::Ends;
use super::context::Context;
use super::deliver;
use super::job::Job;
use super::log::Log;
use super::net::time::{iso8601, unix_seconds};
use super::net::{Cancel, Canceller};
use super::platform::{Posted, Taken};
use super::row::Row;
use super::status::Status;
use super::upstream::Upstream;
use super::work::Work;

/// Time that a failure is tried to be told.
pub(super) const FAILURE_PATIENCE: Duration = Duration::from_secs(30);

/// What the platform gets.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// A result or an error.
    Body(Value),
    /// Nothing: it knows, or another worker answers.
    Nothing,
}

/// A job under way.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// The worker.
    pub context: &'a Context,
    /// Who gave the job.
    pub upstream: &'a Upstream,
    /// The job as it was given.
    pub taken: &'a Taken,
    /// Ends it.
    pub ends: &'a Ends,
    /// When it was taken: its time counts from here.
    pub taken_at: Instant,
    /// Goes up where a checkpoint is wanted at once, as the worker may end soon.
    pub draining: Cancel,
    /// Goes up where the device does not work any more: no further job has a chance.
    pub broken: Canceller,
}

impl Attempt<'_> {
    /// Runs the job and gives the platform its answer. Whether it has it, or wants none.
    pub async fn run(&self) -> Posted {
        let log = self.context.log.of_job(&self.taken.id);
        log.info("Started.");
        let begun = unix_seconds();
        let answer = match Job::parse(&self.taken.id, &self.taken.input) {
            Ok(job) => match self.context.state.job(&job.id) {
                Ok(dir) => {
                    let work = Work {
                        attempt: self,
                        job,
                        dir,
                        log: log.clone(),
                        begun,
                    };
                    return Box::pin(work.run()).await;
                }
                Err(error) => self.refuse(&error.to_string(), begun, &log).await,
            },
            Err(error) => self.refuse(&error.to_string(), begun, &log).await,
        };
        self.post(&answer, &log).await
    }

    /// A job that cannot even be begun.
    pub(super) async fn refuse(&self, reason: &str, begun: u64, log: &Log) -> Answer {
        log.error(reason);
        let id = self.taken.input["job_id"]
            .as_str()
            .unwrap_or(&self.taken.id)
            .to_owned();
        let mut status = Status::new(&id);
        status.status = "failed";
        status.error_message = Some(log.redact(reason));
        if let (Some(supabase), true) = (&self.context.supabase, super::job::is_name(&id)) {
            let row = Row::new(supabase, &id);
            settle_failed(&row, &status, begun, self.context.env.report, log).await;
        }
        failed(&status)
    }

    /// Gives the answer, for as long as it takes within the limit.
    pub(super) async fn post(&self, answer: &Answer, log: &Log) -> Posted {
        let Answer::Body(body) = answer else {
            return Posted::Gone;
        };
        let posted = self
            .upstream
            .result(&self.taken.id, body, self.context.env.retry)
            .await;
        match &posted {
            Posted::Accepted => log.info("Finished."),
            Posted::Gone => log.warn("the platform does not know the job any more"),
            Posted::Undelivered(why) => {
                log.error(&format!(
                    "the answer could not be given to the platform: {why}"
                ));
            }
            Posted::Unauthorized => log.error("the platform refuses RUNPOD_AI_API_KEY"),
        }
        posted
    }
}

pub(super) fn failed(status: &Status) -> Answer {
    Answer::Body(json!({"error": status.error_message, "output": status.json()}))
}

/// Writes a failure to the row, and again where the dispatcher overwrote it.
pub(super) async fn settle_failed(
    row: &Row,
    status: &Status,
    begun: u64,
    report: Duration,
    log: &Log,
) {
    let mut body = status.row();
    body.insert("completed_at".to_owned(), json!(iso8601(unix_seconds())));
    let patience = FAILURE_PATIENCE;
    let never = Cancel::never();
    let written = deliver::patiently(patience, &never, async || row.fail(&body).await).await;
    match written {
        Err(error) => log.warn(&format!(
            "the failure could not be written to the row: {error}"
        )),
        Ok(super::row::Updated::Yes) => {
            let is_settled = |row: &Map<String, Value>| {
                matches!(
                    row.get("status").and_then(Value::as_str),
                    Some("failed" | "cancelled" | "completed")
                )
            };
            deliver::settle(row, &body, begun, report, is_settled, log).await;
        }
        Ok(_) => {}
    }
}
