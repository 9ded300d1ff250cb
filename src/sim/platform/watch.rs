//! Rules of the protocol a worker can break without the platform refusing it.

use std::time::{Duration, Instant};

use super::jobs::Platform;

/// The rule that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViolationKind {
    /// A second result for one delivery though the first was answered.
    SecondResult,
    /// A progress report after the result.
    ProgressAfterResult,
    /// `X-Request-ID` of a job-done or job-stream is missing or names another job.
    RequestId,
    /// `Authorization` is not the worker key.
    Authorization,
    /// More than two intervals without a ping while a job was in progress.
    PingGap,
    /// A ping does not list a job that has been in progress for an interval.
    PingWithoutJob,
}

/// One broken rule.
#[derive(Debug, Clone)]
pub struct Violation {
    /// Time since the simulator's start.
    pub at: Duration,
    /// Which rule.
    pub kind: ViolationKind,
    /// Worker id; empty if the request names none.
    pub worker: String,
    /// Job id; empty if the rule is not about a job.
    pub job: String,
    /// What was found.
    pub detail: String,
}

impl Platform {
    pub(super) fn violate(&mut self, kind: ViolationKind, worker: &str, job: &str, detail: &str) {
        self.violations.push(Violation {
            at: self.origin.elapsed(),
            kind,
            worker: worker.to_owned(),
            job: job.to_owned(),
            detail: detail.to_owned(),
        });
    }

    /// Takes a ping and holds it against the jobs the worker has.
    pub(super) fn ping(&mut self, worker: &str, listed: &[String], unhealthy: Option<String>) {
        let now = Instant::now();
        let running: Vec<(String, Instant)> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.runs_on(worker))
            .filter_map(|(id, job)| Some((id.clone(), job.deliveries.last()?.at)))
            .collect();
        for (id, since) in running {
            self.check_gap(worker, &id);
            if now.duration_since(since) > self.settings.ping_interval && !listed.contains(&id) {
                let detail = format!("the ping lists {listed:?}");
                self.violate(ViolationKind::PingWithoutJob, worker, &id, &detail);
            }
        }
        let worker = self.workers.entry(worker.to_owned()).or_default();
        worker.last_ping = Some(now);
        worker.pings += 1;
        worker.unhealthy.extend(unhealthy);
    }

    /// Notes it if the worker has been silent for too long while `id` was in progress.
    pub(super) fn check_gap(&mut self, worker: &str, id: &str) {
        let Some(since) = self
            .jobs
            .get(id)
            .and_then(|job| job.deliveries.last())
            .map(|delivery| delivery.at)
        else {
            return;
        };
        let last = self.workers.get(worker).and_then(|worker| worker.last_ping);
        let silent = last.map_or(since, |ping| ping.max(since)).elapsed();
        if silent > self.settings.ping_interval * 2 {
            let detail = format!("no ping for {} ms", silent.as_millis());
            self.violate(ViolationKind::PingGap, worker, id, &detail);
        }
    }
}
