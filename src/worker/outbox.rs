//! What could not be delivered: looked at now and then, by this worker and by those after it.

use std::convert::Infallible;
use std::time::Duration;

use super::context::Context;
use super::deliver::{self, Delivery, Stuck};
use super::net::Canceller;
use super::platform::Posted;
use super::upstream::Upstream;

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
        let Some(delivery) = dir
            .read::<Delivery>(deliver::FILE)
            .filter(|delivery| !delivery.is_done())
        else {
            continue;
        };
        let log = context.log.of_job(&delivery.runpod_id);
        let (lost, was_lost) = Canceller::new();
        let Ok(Some(lease)) = context.holder.acquire(&dir, &log, &lost).await else {
            continue;
        };
        log.info(&format!(
            "delivering the adapter of job {id}, which an earlier worker trained"
        ));
        let mut delivery = delivery;
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
        if let Err(error) = delivery.store(&dir) {
            log.warn(&error);
        }
        if !delivery.posted {
            let posted = upstream
                .result(&delivery.runpod_id, &delivery.body(), Duration::ZERO)
                .await;
            delivery.posted = matches!(posted, Posted::Accepted | Posted::Gone);
        }
        if !delivery.told {
            delivery.tell(context, &dir, &log).await;
        }
        if let Err(error) = delivery.save(&dir) {
            log.warn(&error);
        }
        if delivery.is_done() {
            dir.tidy();
        }
        drop(lease);
    }
}
