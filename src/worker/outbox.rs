//! What could not be delivered: looked at now and then, by this worker and by those after it.

use std::convert::Infallible;
use std::time::Duration;

use super::context::Context;
use super::deliver::{self, Delivery, Stuck};
use super::net::Canceller;
use super::news;
use super::platform::Posted;
use super::state::JobDir;
use super::upstream::Upstream;
use crate::durable::Durable;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_mins(1);

/// Delivers what could not be delivered before, now and then, for as long as it is polled.
pub async fn tend(context: &Context, upstream: &Upstream) -> Infallible {
    loop {
        empty(context, upstream).await;
        tokio::time::sleep(INTERVAL.max(context.env.report)).await;
    }
}

/// Delivers what could not be delivered before, where nobody else is at it.
async fn empty(context: &Context, upstream: &Upstream) {
    for (id, dir) in context.state.jobs() {
        let pending = || {
            let delivery: Delivery = dir.read(deliver::FILE)?;
            (!delivery.is_done() && !delivery.stopped).then_some(delivery)
        };
        let Some(delivery) = pending() else {
            if news::is_there(&dir) {
                tell(context, &dir).await;
            } else if dir.is_older_than(context.env.keep) {
                forget(context, &id, &dir);
            }
            continue;
        };
        let log = context.log.of_job(&delivery.runpod_id);
        let (lost, was_lost) = Canceller::new();
        let Ok(Some(lease)) = context.holder.acquire(&dir, &log, &lost) else {
            continue;
        };
        // As the last holder left it.
        let Some(mut delivery) = pending() else {
            continue;
        };
        log.info(&format!(
            "delivering the adapter of job {id}, which was trained before"
        ));
        let mut delivered = delivery.bring(context, &dir, &log, &was_lost).await;
        if delivered.is_ok() {
            delivered = delivery.conclude(context, &dir, &log, &was_lost).await;
        }
        match delivered {
            Ok(()) => {}
            Err(Stuck::Cancelled) => {
                log.info("the application cancelled the job; nothing is delivered");
                let _ = fs_err::remove_file(dir.path(deliver::FILE));
                continue;
            }
            Err(Stuck::Kept(reason)) => {
                log.warn(&format!("still not delivered: {reason}"));
                continue;
            }
        }
        news::forget(&dir);
        if let Err(error) = delivery.store(&dir) {
            log.warn(&error);
        }
        let posted = if delivery.posted {
            Posted::Accepted
        } else {
            upstream
                .result(&delivery.runpod_id, &delivery.body(), Duration::ZERO)
                .await
        };
        delivery.finish(&posted, context, &dir, &log).await;
        drop(lease);
    }
}

/// Tells the end of a job that nobody heard of.
async fn tell(context: &Context, dir: &JobDir) {
    let (lost, _) = Canceller::new();
    if let Ok(Some(lease)) = context.holder.acquire(dir, &context.log, &lost) {
        news::again(context, dir, &context.log).await;
        drop(lease);
    }
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
