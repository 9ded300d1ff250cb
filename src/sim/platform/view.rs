//! What the library's caller may see of the queue.

use serde_json::{Value, json};

use super::jobs::{Delivery, Platform, Status};
use super::watch::Violation;

impl Platform {
    pub(in crate::sim) fn deliveries(&self, id: &str) -> Vec<Delivery> {
        self.jobs
            .get(id)
            .map(|job| job.deliveries.clone())
            .unwrap_or_default()
    }

    pub(in crate::sim) fn stop_pod(&self, id: &str) -> bool {
        self.jobs.get(id).is_some_and(|job| job.stop_pod)
    }

    pub(in crate::sim) fn status(&self, id: &str) -> Option<Status> {
        self.jobs.get(id).map(|job| job.status)
    }

    pub(in crate::sim) fn violations(&self) -> Vec<Violation> {
        self.violations.clone()
    }

    pub(in crate::sim) fn pings(&self, worker: &str) -> u64 {
        self.workers.get(worker).map_or(0, |worker| worker.pings)
    }

    pub(in crate::sim) fn unhealthy(&self, worker: &str) -> Vec<String> {
        self.workers
            .get(worker)
            .map(|worker| worker.unhealthy.clone())
            .unwrap_or_default()
    }

    /// The `/health` document.
    pub(super) fn health(&self) -> Value {
        let count = |status| {
            self.jobs
                .values()
                .filter(|job| job.status == status)
                .count()
        };
        let busy = |id: &str| self.jobs.values().any(|job| job.runs_on(id));
        let running = self.workers.keys().filter(|id| busy(id)).count();
        let unhealthy = self
            .workers
            .values()
            .filter(|worker| !worker.unhealthy.is_empty())
            .count();
        let idle = self.workers.len().saturating_sub(running + unhealthy);
        json!({
            "jobs": {
                "completed": count(Status::Completed),
                "failed": count(Status::Failed) + count(Status::TimedOut),
                "inProgress": count(Status::InProgress),
                "inQueue": count(Status::InQueue),
                "retried": self.retried,
            },
            "workers": {
                "idle": idle, "initializing": 0, "ready": idle, "running": running,
                "throttled": 0, "unhealthy": unhealthy,
            },
        })
    }
}
