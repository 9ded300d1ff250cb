//! An answer without an adapter (a failure, a cancel), written down before it is given: what the platform could not be told, a later
//! worker tells it. That of a finished job is in its delivery.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::attempt::Answer;
use super::log::Log;
use super::platform::Posted;
use super::state::JobDir;
use super::upstream::Upstream;

/// File of a job's directory that holds what the platform is yet to be told.
const FILE: &str = "answer.json";

/// An answer on its way.
#[derive(Debug, Serialize, Deserialize)]
struct Owed {
    /// RunPod's id of the job.
    runpod_id: String,
    body: Value,
}

/// Writes `answer` down, before it is given.
pub fn keep(dir: &JobDir, runpod_id: &str, answer: &Answer, log: &Log) {
    let Answer::Body(body) = answer else { return };
    let owed = Owed {
        runpod_id: runpod_id.to_owned(),
        body: body.clone(),
    };
    if let Err(error) = dir.write(FILE, &owed) {
        log.warn(&error.to_string());
    }
}

/// Whether the platform is owed an answer.
pub fn is_there(dir: &JobDir) -> bool {
    dir.path(FILE).is_file()
}

/// Gives the answer, once. Whether nothing is owed any more.
pub async fn again(upstream: &Upstream, dir: &JobDir, log: &Log) -> bool {
    let Some(owed) = dir.read::<Owed>(FILE) else {
        forget(dir);
        return true;
    };
    let log = log.of_job(&owed.runpod_id);
    let posted = upstream
        .result(&owed.runpod_id, &owed.body, Duration::ZERO)
        .await;
    match &posted {
        Posted::Accepted => log.info("the platform has the answer that could not be given before"),
        Posted::Gone => log.info("the platform does not wait for the answer any more"),
        Posted::Undelivered(why) => log.warn(&format!("the answer is still not given: {why}")),
        Posted::Unauthorized => log.warn("the answer is still not given: the key is refused"),
    }
    settle(dir, &posted);
    !is_there(dir)
}

/// Drops the answer where the platform has it, or wants none.
pub fn settle(dir: &JobDir, posted: &Posted) {
    if matches!(posted, Posted::Accepted | Posted::Gone) {
        forget(dir);
    }
}

/// Drops what a job that is begun again has outlived.
pub fn forget(dir: &JobDir) {
    let _ = fs_err::remove_file(dir.path(FILE));
}
