//! Reports of progress: to the platform, the row and the callback, each in its own time. None of them holds the training up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::callback::{Callback, Event};
use super::cancel::{Ends, Reason};
use super::log::Log;
use super::net::{Cancel, Canceller};
use super::row::{Row, Updated};
use super::status::Status;
use super::upstream::Upstream;

/// A row is touched at least so often, and this many times while a hold on a job lasts.
const HEARTBEAT: Duration = Duration::from_secs(30);
const BEATS: u32 = 4;
/// Callbacks of progress are at least this far apart, in reports.
const CALLBACK_REPORTS: u32 = 6;

/// Reports under way.
#[derive(Debug)]
pub struct Reports {
    status: watch::Sender<Status>,
    stop: Canceller,
    /// Events that the callback was sent.
    events: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

/// Where reports of a job go.
#[derive(Debug)]
pub struct To {
    /// The platform, and its id of the job.
    pub upstream: (Upstream, String),
    /// The row, and how long it belongs to a worker that does not write.
    pub row: Option<(Row, Duration)>,
    /// The callback, and what its events' ids begin with.
    pub callback: Option<(Callback, String)>,
}

impl Reports {
    /// Begins to report `status`, every `every`.
    pub fn start(to: To, status: Status, every: Duration, ends: &Ends, log: &Log) -> Self {
        let (stop, stopped) = Canceller::new();
        let (status, watched) = watch::channel(status);
        let mut tasks = Vec::new();
        let (upstream, id) = to.upstream;
        let events = Arc::new(AtomicU64::new(0));
        tasks.push(tokio::spawn(to_upstream(
            upstream,
            id.clone(),
            watched.clone(),
            every,
            stopped.clone(),
            log.clone(),
        )));
        if let Some((row, lasts)) = to.row {
            tasks.push(tokio::spawn(to_row(
                row,
                lasts,
                watched.clone(),
                every,
                stopped.clone(),
                ends.clone(),
                log.clone(),
            )));
        }
        if let Some((callback, prefix)) = to.callback {
            let every = every * CALLBACK_REPORTS;
            let names = Names {
                prefix,
                runpod_id: id,
                events: Arc::clone(&events),
            };
            let task = to_callback(
                callback,
                names,
                watched,
                every,
                stopped,
                ends.clone(),
                log.clone(),
            );
            tasks.push(tokio::spawn(task));
        }
        Self {
            status,
            stop,
            events,
            tasks,
        }
    }

    /// Changes what is reported.
    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    /// What is reported.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Ends the reports; returns when the last one is there or given up. Nothing comes after it.
    pub async fn stop(self) -> Status {
        self.stop.cancel();
        for task in self.tasks {
            let _ = task.await;
        }
        let events = self.events.load(Ordering::Relaxed);
        let status = self.status.borrow().clone();
        Status { events, ..status }
    }
}

/// Waits for a change or for `heartbeat`, at least `every` after the last report. `None`: no more reports.
async fn next(
    watched: &mut watch::Receiver<Status>,
    every: Duration,
    heartbeat: Option<Duration>,
    stopped: &Cancel,
) -> Option<Status> {
    let wait = async {
        tokio::time::sleep(every).await;
        match heartbeat {
            None => watched.changed().await.is_ok(),
            Some(beat) => match tokio::time::timeout(beat, watched.changed()).await {
                Ok(changed) => changed.is_ok(),
                Err(_) => true,
            },
        }
    };
    let is_there = stopped.or(wait).await.unwrap_or(false);
    is_there.then(|| watched.borrow_and_update().clone())
}

async fn to_upstream(
    upstream: Upstream,
    id: String,
    mut watched: watch::Receiver<Status>,
    every: Duration,
    stopped: Cancel,
    log: Log,
) {
    let mut status = watched.borrow_and_update().clone();
    loop {
        if let Err(error) = upstream.progress(&id, &status.json()).await {
            log.debug(&error);
        }
        match next(&mut watched, every, None, &stopped).await {
            Some(newer) => status = newer,
            None => return,
        }
    }
}

async fn to_row(
    row: Row,
    lasts: Duration,
    mut watched: watch::Receiver<Status>,
    every: Duration,
    stopped: Cancel,
    ends: Ends,
    log: Log,
) {
    let mut is_down = false;
    let mut measured = 0;
    let heartbeat = HEARTBEAT.min(lasts / BEATS);
    while let Some(status) = next(&mut watched, every, Some(heartbeat), &stopped).await {
        match row.renew(&status.row()).await {
            Ok(Updated::Yes) => {
                if std::mem::take(&mut is_down) {
                    log.info("the database answers again");
                }
            }
            Ok(Updated::Missing) => return,
            Ok(Updated::Contested) => {
                if row.is_others(lasts, &stopped).await.unwrap_or(false) {
                    log.error("the row says that another worker is at this job; this one stops");
                    ends.end(Reason::LostLease);
                    return;
                }
                continue;
            }
            Ok(Updated::Cancelled) => {
                log.info("the application cancelled the job in its row");
                ends.end(Reason::Row);
                return;
            }
            Err(error) => {
                if !std::mem::replace(&mut is_down, true) {
                    log.warn(&format!(
                        "the row could not be written, training goes on: {error}"
                    ));
                }
                continue;
            }
        }
        if status.current_step > measured {
            measured = status.current_step;
            if let Err(error) = row.metrics(&status, None).await {
                log.debug(&format!("metrics were not written: {error}"));
            }
        }
    }
}

/// What events of a job are known by.
struct Names {
    prefix: String,
    runpod_id: String,
    events: Arc<AtomicU64>,
}

async fn to_callback(
    callback: Callback,
    names: Names,
    mut watched: watch::Receiver<Status>,
    every: Duration,
    stopped: Cancel,
    ends: Ends,
    log: Log,
) {
    let begun = Instant::now();
    let mut status = watched.borrow_and_update().clone();
    loop {
        let seq = names.events.fetch_add(1, Ordering::Relaxed) + 1;
        let mut data = status.event(&names.runpod_id, seq);
        data["elapsed_s"] = json!(begun.elapsed().as_secs());
        let event = Event::new(format!("{}_{seq}", names.prefix), "training.progress", data);
        match callback.send(&event).await {
            Ok(reply) if reply.cancel => {
                log.info("the application cancelled the job in its answer to a callback");
                ends.end(Reason::Callback);
                return;
            }
            Ok(_) => {}
            Err(error) => {
                log.debug(&error.to_string());
                if error.stop_for_good {
                    return;
                }
            }
        }
        match next(&mut watched, every, None, &stopped).await {
            Some(newer) => status = newer,
            None => return,
        }
    }
}
