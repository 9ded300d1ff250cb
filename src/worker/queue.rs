//! The loop of the worker: jobs taken one at a time, stops heard, an end in order.

use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::attempt::Attempt;
use super::cancel::{Ends, Reason};
use super::context::Context;
use super::net::backoff::Backoff;
use super::net::{Cancel, Canceller};
use super::outbox;
use super::ping::InProgress;
use super::platform::{Platform, Posted, Take, Taken};
use super::upstream::Upstream;

/// An empty answer that came faster is not asked for again at once.
const FLOOR: Duration = Duration::from_millis(250);
/// Time for an answer that is under way when the worker is asked to stop.
const HANDED_OUT: Duration = Duration::from_secs(1);
/// Between two answers of the stop channel that say nothing new.
const STOPS_PAUSE: Duration = Duration::from_secs(1);
/// A stop channel that is not there is asked at most so seldom.
const STOPS_AWAY: Duration = Duration::from_mins(1);

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// As it was asked to.
    Drained,
    /// The platform does not take this worker.
    Refused,
    /// The device does not work any more.
    Broken,
}

/// Listens to SIGTERM and SIGINT: with the first the flag goes up (no more jobs, checkpoints are saved), the second ends the
/// process at once.
///
/// # Errors
/// Those of the operating system.
pub fn listen(context: &Context) -> std::io::Result<Cancel> {
    let (canceller, draining) = Canceller::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let log = context.log.clone();
    tokio::spawn(async move {
        let mut signalled = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        signalled().await;
        log.info("asked to stop: no more jobs are taken");
        canceller.cancel();
        signalled().await;
        log.warn("asked to stop a second time; ending at once");
        exit_now();
    });
    Ok(draining)
}

/// Ends the process as a second signal asks for; the trainer notices by its closed input.
#[expect(clippy::exit, reason = "the second signal wants no more waiting")]
fn exit_now() {
    std::process::exit(143);
}

/// Takes and runs jobs until it is asked to stop, and delivers what earlier workers could not.
pub async fn run(
    context: &Context,
    platform: &Platform,
    jobs: &InProgress,
    draining: &Cancel,
) -> End {
    let upstream = Upstream::Runpod(platform.clone());
    tokio::select! {
        end = take_jobs(context, platform, jobs, draining) => end,
        never = outbox::tend(context, &upstream) => match never {},
    }
}

async fn take_jobs(
    context: &Context,
    platform: &Platform,
    jobs: &InProgress,
    draining: &Cancel,
) -> End {
    let log = &context.log;
    let upstream = Upstream::Runpod(platform.clone());
    let (stops, mut stopped) = mpsc::unbounded_channel();
    let hearing = tokio::spawn(hear_stops(platform.clone(), stops, log.clone()));
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    let mut end = End::Drained;
    let (broken, _) = Canceller::new();
    while !draining.is_cancelled() {
        // What was to be stopped is over; the same job may come again.
        while stopped.try_recv().is_ok() {}
        let asked = Instant::now();
        let mut taking = Box::pin(platform.take());
        let take = tokio::select! {
            biased;
            take = &mut taking => take,
            // A job that is being handed out at this moment would be lost.
            () = draining.cancelled() => match tokio::time::timeout(HANDED_OUT, taking).await {
                Ok(take) => take,
                Err(_) => break,
            },
        };
        let wait = match take {
            Take::Jobs(taken) => {
                backoff.reset();
                let mut is_refused = false;
                for job in taken {
                    let posted = Box::pin(run_one(
                        context,
                        &upstream,
                        &job,
                        jobs,
                        &mut stopped,
                        draining,
                        &broken,
                    ))
                    .await;
                    is_refused |= posted == Posted::Unauthorized;
                }
                if broken.is_cancelled() {
                    end = End::Broken;
                    break;
                }
                if is_refused {
                    end = End::Refused;
                    break;
                }
                Duration::ZERO
            }
            Take::Empty => {
                backoff.reset();
                if asked.elapsed() < Duration::from_secs(1) {
                    FLOOR
                } else {
                    Duration::ZERO
                }
            }
            Take::Floor(wait) => wait,
            Take::Failed(reason) => {
                log.warn(&reason);
                backoff.next(None)
            }
        };
        let _ = draining.or(tokio::time::sleep(wait)).await;
    }
    hearing.abort();
    log.info("Stopped.");
    end
}

async fn run_one(
    context: &Context,
    upstream: &Upstream,
    job: &serde_json::Value,
    jobs: &InProgress,
    stopped: &mut mpsc::UnboundedReceiver<Vec<String>>,
    draining: &Cancel,
    broken: &Canceller,
) -> Posted {
    let taken = match Taken::parse(job) {
        Ok(taken) => taken,
        Err((id, reason)) => {
            context.log.error(&reason);
            let body = serde_json::json!({"error": reason});
            return match id {
                Some(id) => upstream.result(&id, &body, context.env.retry).await,
                None => Posted::Gone,
            };
        }
    };
    jobs.add(&taken.id);
    let ends = Ends::default();
    let attempt = Attempt {
        context,
        upstream,
        taken: &taken,
        ends: &ends,
        taken_at: tokio::time::Instant::now(),
        draining: draining.clone(),
        broken: broken.clone(),
    };
    let mut work = Box::pin(attempt.run());
    let mut drained = std::pin::pin!(after_drain(draining, context.env.drain));
    let mut is_drained = false;
    let posted = loop {
        tokio::select! {
            posted = &mut work => break posted,
            Some(ids) = stopped.recv() => {
                if ids.contains(&taken.id) {
                    context.log.of_job(&taken.id).info("Stopping job.");
                    ends.end(Reason::JobStop);
                }
            }
            () = &mut drained, if !is_drained => {
                is_drained = true;
                ends.end(Reason::Shutdown);
            }
        }
    };
    jobs.remove(&taken.id);
    posted
}

/// Returns when the time to drain is over; never, where there is none.
async fn after_drain(draining: &Cancel, limit: Option<Duration>) {
    draining.cancelled().await;
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Listens to which jobs are to be stopped.
async fn hear_stops(
    platform: Platform,
    to: mpsc::UnboundedSender<Vec<String>>,
    log: super::log::Log,
) {
    let Some(url) = platform.stop_url() else {
        log.warn("RUNPOD_WEBHOOK_GET_JOB has no `/job-take/`: cancelled jobs cannot be told");
        return;
    };
    let mut backoff = Backoff::new(STOPS_PAUSE, STOPS_AWAY);
    let mut before = Vec::new();
    loop {
        match platform.stops(&url).await {
            Ok(ids) => {
                backoff.reset();
                if ids.is_empty() || ids == before {
                    tokio::time::sleep(STOPS_PAUSE).await;
                }
                before.clone_from(&ids);
                if !ids.is_empty() && to.send(ids).is_err() {
                    return;
                }
            }
            Err((wait, None)) => {
                backoff.reset();
                tokio::time::sleep(wait).await;
            }
            Err((_, Some(reason))) => {
                if backoff.failures() == 0 {
                    log.warn(&reason);
                }
                tokio::time::sleep(backoff.next(None)).await;
            }
        }
    }
}
