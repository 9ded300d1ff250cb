//! Ends of jobs for their callbacks. One without an adapter is written down until it is heard, so that a later worker tells what this
//! one could not; that of a finished job is in its delivery.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::callback::{Callback, Event};
use super::context::Context;
use super::log::Log;
use super::net::time::unix_seconds;
use super::state::JobDir;
use crate::config::Secret;

/// File of a job's directory that holds what is yet to be told.
const FILE: &str = "event.json";
/// Seconds after which an end is no news any more.
const OLD_S: u64 = 24 * 3600;

/// An event on its way.
#[derive(Debug, Serialize, Deserialize)]
struct News {
    callback_url: String,
    event: Event,
}

/// What telling an event came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It is there, or never will be.
    Settled,
    /// It is told again, not before the time that the receiver asked for.
    Later(Option<Duration>),
}

/// Sends an event, once: a GPU waits for no receiver.
pub async fn tell(callback: &Callback, event: &Event, log: &Log) -> Told {
    let Err(error) = callback.send(event).await else {
        return Told::Settled;
    };
    let is_old = unix_seconds().saturating_sub(event.unix_seconds) > OLD_S;
    if error.stop_for_good || is_old {
        log.warn(&format!("{error}; the job's end is not told any more"));
        return Told::Settled;
    }
    log.warn(&format!("{error}; it is told later"));
    Told::Later(error.retry_after)
}

/// Tells `event` to `callback_url`; what is not heard is there for the next look.
pub async fn publish(callback_url: &str, event: Event, context: &Context, dir: &JobDir, log: &Log) {
    let callback_url = callback_url.to_owned();
    let news = News {
        callback_url,
        event,
    };
    if let Err(error) = dir.write(FILE, &news) {
        log.warn(&error.to_string());
    }
    if let Told::Later(asked) = send(&news, context, dir, log).await {
        context.put_off(dir, asked);
    }
}

/// Whether a job has something to tell.
pub fn is_there(dir: &JobDir) -> bool {
    dir.path(FILE).is_file()
}

/// Tells again what was not heard before.
pub async fn again(context: &Context, dir: &JobDir, log: &Log) -> Told {
    let Some(news) = dir.read::<News>(FILE) else {
        forget(dir);
        return Told::Settled;
    };
    send(&news, context, dir, log).await
}

/// Drops what a job that is begun again has outlived.
pub fn forget(dir: &JobDir) {
    let _ = fs_err::remove_file(dir.path(FILE));
}

async fn send(news: &News, context: &Context, dir: &JobDir, log: &Log) -> Told {
    log.hide(&Secret::new(&news.callback_url));
    let told = match context.callback(&news.callback_url) {
        Ok(callback) => tell(&callback, &news.event, log).await,
        // An address that may not be used will not be heard.
        Err(_) => Told::Settled,
    };
    if told == Told::Settled {
        forget(dir);
    }
    told
}
