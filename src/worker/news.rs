//! The end of a job, for its callback. Of one without an adapter it is written down until it is heard, so that a later worker tells
//! what this one could not; of one with an adapter the delivery knows ([`super::deliver`]).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::attempt::FAILURE_PATIENCE;
use super::callback::{Callback, Event};
use super::context::Context;
use super::log::Log;
use super::state::JobDir;
use crate::config::Secret;

/// File of a job's directory that holds what is yet to be told.
const FILE: &str = "event.json";

/// An event on its way.
#[derive(Debug, Serialize, Deserialize)]
struct News {
    callback_url: String,
    event: Event,
}

/// Tells `event` to `callback_url`, for a while; what is not heard is there for the next look.
pub async fn publish(callback_url: &str, event: Event, context: &Context, dir: &JobDir, log: &Log) {
    let callback_url = callback_url.to_owned();
    let news = News {
        callback_url,
        event,
    };
    if let Err(error) = dir.write(FILE, &news) {
        log.warn(&error.to_string());
    }
    send(&news, context, dir, log).await;
}

/// Whether a job has something to tell.
pub fn is_there(dir: &JobDir) -> bool {
    dir.path(FILE).is_file()
}

/// Tells again what was not heard before.
pub async fn again(context: &Context, dir: &JobDir, log: &Log) {
    match dir.read::<News>(FILE) {
        Some(news) => send(&news, context, dir, log).await,
        None => forget(dir),
    }
}

/// Drops what a job that is begun again has outlived.
pub fn forget(dir: &JobDir) {
    let _ = fs_err::remove_file(dir.path(FILE));
}

async fn send(news: &News, context: &Context, dir: &JobDir, log: &Log) {
    log.hide(&Secret::new(&news.callback_url));
    let patience = FAILURE_PATIENCE.min(context.env.retry);
    let waits = &context.env.callback_waits;
    let is_settled = match context.callback(&news.callback_url) {
        Ok(callback) => tell(&callback, &news.event, waits, patience, log).await,
        // An address that may not be used will not be heard.
        Err(_) => true,
    };
    if is_settled {
        forget(dir);
    }
}

/// Sends an event until it is there, after each of `waits`, for `patience`. Whether it is settled: there, or never to be.
pub async fn tell(
    callback: &Callback,
    event: &Event,
    waits: &[Duration],
    patience: Duration,
    log: &Log,
) -> bool {
    let deadline = tokio::time::Instant::now() + patience;
    for wait in waits {
        let until = tokio::time::Instant::now() + *wait;
        if until > deadline {
            return false;
        }
        tokio::time::sleep_until(until).await;
        match callback.send(event).await {
            Ok(_) => return true,
            Err(error) => {
                log.warn(&error.to_string());
                if error.stop_for_good {
                    return true;
                }
            }
        }
    }
    false
}
