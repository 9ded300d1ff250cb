//! What could not be delivered: looked at now and then, by this worker and by those after it.

use std::convert::Infallible;
use std::time::Duration;

use super::context::Context;
use super::deliver::{self, Delivery, Stuck};
use super::net::time::unix_seconds;
use super::net::{Cancel, Canceller};
use super::news::{self, Told};
use super::owed;
use super::platform::Posted;
use super::state::JobDir;
use super::upstream::Upstream;
use crate::durable::Durable;

/// Longest time between two looks.
const INTERVAL: Duration = Duration::from_mins(1);

/// What a try came to.
enum Tried {
    /// Nothing is left to do.
    Done,
    /// Something is, not before the time that somebody asked for.
    Later(Option<Duration>),
}

/// Delivers what could not be delivered before, now and then, for as long as it is polled.
pub async fn tend(context: &Context, upstream: &Upstream) -> Infallible {
    loop {
        empty(context, upstream).await;
        // Another worker may hold what is due.
        tokio::time::sleep(context.env.report.min(INTERVAL)).await;
        context.later.wait(INTERVAL).await;
    }
}

/// Tries each job that is due, once, where nobody else is at it.
async fn empty(context: &Context, upstream: &Upstream) {
    for (id, dir) in context.state.jobs() {
        if !context.later.is_due(&id) {
            continue;
        }
        let is_left = pending(&dir).is_some() || owed::is_there(&dir) || news::is_there(&dir);
        if !is_left {
            context.later.forget(&id);
            if dir.is_older_than(context.env.keep) {
                forget(context, &id, &dir);
            }
            continue;
        }
        let (lost, was_lost) = Canceller::new();
        let Ok(Some(lease)) = context.holder.acquire(&dir, &context.log, &lost) else {
            continue;
        };
        match try_once(context, upstream, &dir, &was_lost).await {
            Tried::Done => context.later.forget(&id),
            Tried::Later(asked) => context.put_off(&dir, asked),
        }
        drop(lease);
    }
}

/// A delivery that goes on.
fn pending(dir: &JobDir) -> Option<Delivery> {
    let delivery: Delivery = dir.read(deliver::FILE)?;
    (!delivery.is_done() && !delivery.stopped).then_some(delivery)
}

/// Tries once what is left of a job: as the last holder left it.
async fn try_once(context: &Context, upstream: &Upstream, dir: &JobDir, lost: &Cancel) -> Tried {
    let tried = match pending(dir) {
        Some(delivery) => deliver_again(delivery, context, upstream, dir, lost).await,
        None => Tried::Done,
    };
    let is_answered = !owed::is_there(dir) || owed::again(upstream, dir, &context.log).await;
    let told = if news::is_there(dir) {
        news::again(context, dir, &context.log).await
    } else {
        Told::Settled
    };
    match (tried, told, is_answered) {
        (Tried::Later(asked), ..) | (_, Told::Later(asked), _) => Tried::Later(asked),
        (_, _, false) => Tried::Later(None),
        (tried, ..) => tried,
    }
}

async fn deliver_again(
    mut delivery: Delivery,
    context: &Context,
    upstream: &Upstream,
    dir: &JobDir,
    lost: &Cancel,
) -> Tried {
    let log = context.log.of_job(&delivery.runpod_id);
    if !delivery.is_given() {
        let id = &delivery.job_id;
        log.info(&format!(
            "delivering the adapter of job {id}, which was trained before"
        ));
        let mut brought = delivery.bring(context, dir, &log, lost).await;
        if brought.is_ok() {
            brought = delivery.conclude(context, dir, &log, lost).await;
        }
        match brought {
            Ok(()) => {}
            Err(Stuck::Cancelled) => {
                log.info("the application cancelled the job; nothing is delivered");
                let _ = fs_err::remove_file(dir.path(deliver::FILE));
                return Tried::Done;
            }
            Err(Stuck::Kept(reason)) => return keep(delivery, &reason, context, dir, &log),
        }
        // What was told of it before is not true any more.
        news::forget(dir);
        owed::forget(dir);
        if let Err(error) = delivery.store(dir) {
            log.warn(&error);
        }
    }
    let posted = if delivery.posted {
        Posted::Accepted
    } else {
        upstream
            .result(&delivery.runpod_id, &delivery.body(), Duration::ZERO)
            .await
    };
    let asked = delivery.finish(&posted, context, dir, &log).await;
    if delivery.is_done() {
        return Tried::Done;
    }
    if delivery.is_given() {
        return Tried::Later(asked);
    }
    keep(delivery, "not all of it is written", context, dir, &log)
}

/// Keeps a delivery for later, unless it is as old as anything gets here.
fn keep(
    mut delivery: Delivery,
    reason: &str,
    context: &Context,
    dir: &JobDir,
    log: &super::log::Log,
) -> Tried {
    let age = Duration::from_secs(unix_seconds().saturating_sub(delivery.finished));
    if age <= context.env.keep {
        log.warn(&format!("still not delivered: {reason}"));
        return Tried::Later(None);
    }
    log.error(&format!(
        "the adapter could not be delivered for {} days and is given up: {reason}",
        age.as_secs() / 86_400
    ));
    delivery.stopped = true;
    if let Err(error) = delivery.save(dir) {
        log.warn(&error);
    }
    Tried::Done
}

/// Removes what is left of a job that is over, so that the volume does not fill.
fn forget(context: &Context, id: &str, dir: &JobDir) {
    let (lost, _) = Canceller::new();
    let Ok(Some(lease)) = context.holder.acquire(dir, &context.log, &lost) else {
        return;
    };
    context
        .log
        .info(&format!("removing what is left of job {id}"));
    if let Err(error) = Durable::default().remove_dir(&dir.path("")) {
        context.log.warn(&error.to_string());
    }
    drop(lease);
}
