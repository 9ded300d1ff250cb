//! What the passing of time does to the queue: expiry, execution time, lost workers.

use std::time::Instant;

use super::jobs::{Job, Platform, Status};

/// Why a job's time is over.
#[derive(Debug, Clone, Copy)]
enum End {
    Forgotten,
    Expired,
    TimedOut,
    WorkerLost,
}

impl Platform {
    /// Lets time pass: expiry, execution time, lost workers. True if anything changed.
    pub(in crate::sim) fn tick(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for (id, end) in self.due(now) {
            changed = true;
            self.end(&id, end);
        }
        changed
    }

    /// The jobs whose time is over at `now`.
    fn due(&self, now: Instant) -> Vec<(String, End)> {
        let settings = &self.settings;
        let silence = settings.ping_interval * settings.lost_after_pings;
        let end_of = |job: &Job| {
            let running = job.status == Status::InProgress;
            let delivery = job.deliveries.last().filter(|_| running);
            let last_sign = delivery.map(|delivery| {
                let ping = self
                    .workers
                    .get(&delivery.worker)
                    .and_then(|worker| worker.last_ping);
                ping.map_or(delivery.at, |ping| ping.max(delivery.at))
            });
            let past = |from: Option<Instant>, limit| {
                from.is_some_and(|from| now.saturating_duration_since(from) > limit)
            };
            if past(job.finished, settings.retention) {
                Some(End::Forgotten)
            } else if job.finished.is_some() {
                None
            } else if past(Some(job.submitted), job.ttl) {
                Some(End::Expired)
            } else if past(job.started.filter(|_| running), job.execution_timeout) {
                Some(End::TimedOut)
            } else if past(last_sign, silence) {
                Some(End::WorkerLost)
            } else {
                None
            }
        };
        self.jobs
            .iter()
            .filter_map(|(id, job)| Some((id.clone(), end_of(job)?)))
            .collect()
    }

    fn end(&mut self, id: &str, end: End) {
        let Some(job) = self.jobs.get(id) else { return };
        let retries = job.retries;
        let worker = job
            .worker()
            .filter(|worker| job.runs_on(worker))
            .map(str::to_owned);
        match end {
            End::Forgotten => {
                self.jobs.remove(id);
            }
            End::Expired => {
                self.queue.retain(|queued| queued != id);
                self.jobs.remove(id);
            }
            End::TimedOut => {
                let status = if self.settings.timed_out_state {
                    Status::TimedOut
                } else {
                    Status::Failed
                };
                self.finish(id, status, Some("executionTimeout exceeded".to_owned()));
            }
            End::WorkerLost if retries < self.settings.max_retries => {
                self.requeue(id);
            }
            End::WorkerLost => {
                self.finish(
                    id,
                    Status::Failed,
                    Some("worker lost, retries used up".to_owned()),
                );
            }
        }
        if let (Some(worker), End::Expired | End::TimedOut) = (worker, end) {
            self.push_stop(&worker, id);
        }
    }
}
