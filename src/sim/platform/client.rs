//! The client side: `run`, `runsync`, `status`, `stream`, `cancel`, `retry`, `purge-queue`, `health`.

use std::time::{Duration, Instant};

use axum::response::Response;
use serde_json::{Value, json};

use crate::sim::server::{Call, json_reply};

/// Answers a client request; `segments` begin after the endpoint.
pub(super) async fn answer(call: &Call, segments: &[&str]) -> Response {
    let sent = call.header("authorization").unwrap_or_default();
    if sent.strip_prefix("Bearer ").unwrap_or(sent) != call.shared.settings.client_key {
        return json_reply(401, &json!({"error": "unauthorized"}));
    }
    let (post, get) = (call.method == "POST", call.method == "GET");
    match segments {
        ["run"] if post => run(call, false).await,
        ["runsync"] if post => run(call, true).await,
        ["status", id] if get || post => document(call, id),
        ["stream", id] if get || post => stream(call, id),
        ["cancel", id] if post => cancel(call, id),
        ["retry", id] if post => retry(call, id),
        ["purge-queue"] if post => {
            let removed = call.shared.change(|state| state.platform.purge());
            json_reply(200, &json!({"removed": removed, "status": "completed"}))
        }
        ["health"] if get => json_reply(200, &call.shared.lock().platform.health()),
        _ => json_reply(404, &json!({"error": "no such route"})),
    }
}

async fn run(call: &Call, sync: bool) -> Response {
    let settings = &call.shared.settings;
    let limit = if sync {
        settings.runsync_limit
    } else {
        settings.run_limit
    };
    if call.body.len() > limit {
        return problem(&format!("body: exceeded max body size of {limit} bytes"));
    }
    let Ok(body) = serde_json::from_slice::<Value>(&call.body) else {
        return problem("body: not valid JSON");
    };
    let id = match call
        .shared
        .change(|state| state.platform.submit(body, sync))
    {
        Ok(id) => id,
        Err(reason) => return problem(reason),
    };
    if !sync {
        return json_reply(200, &json!({"id": id, "status": "IN_QUEUE"}));
    }
    let wait = call
        .parameter("wait")
        .and_then(|ms| ms.parse().ok())
        .unwrap_or(90_000);
    let deadline = Instant::now() + Duration::from_millis(wait.clamp(1000, 300_000));
    let ended = |state: &mut crate::sim::State| {
        let ended = state
            .platform
            .status(&id)
            .is_none_or(super::Status::is_final);
        ended.then(|| state.platform.document(&id))
    };
    let document = match call.shared.poll(deadline, ended).await {
        Some(document) => document,
        None => call.shared.lock().platform.document(&id),
    };
    document.map_or_else(not_found, |document| json_reply(200, &document))
}

fn document(call: &Call, id: &str) -> Response {
    let document = call.shared.lock().platform.document(id);
    document.map_or_else(not_found, |document| json_reply(200, &document))
}

/// The pieces streamed since the last such request.
fn stream(call: &Call, id: &str) -> Response {
    let mut state = call.shared.lock();
    let Some(job) = state.platform.jobs.get_mut(id) else {
        return not_found();
    };
    let chunks = std::mem::take(&mut job.chunks);
    json_reply(200, &json!({"status": job.status, "stream": chunks}))
}

fn cancel(call: &Call, id: &str) -> Response {
    match call.shared.change(|state| state.platform.cancel(id)) {
        Some(status) => json_reply(200, &json!({"id": id, "status": status})),
        None => not_found(),
    }
}

fn retry(call: &Call, id: &str) -> Response {
    match call.shared.change(|state| state.platform.retry(id)) {
        Some(true) => json_reply(200, &json!({"id": id, "status": "IN_QUEUE"})),
        Some(false) => problem("only a failed or timed out job can be retried"),
        None => not_found(),
    }
}

fn not_found() -> Response {
    json_reply(
        404,
        &json!({"status": 404, "title": "Not Found", "detail": "job not found"}),
    )
}

fn problem(detail: &str) -> Response {
    let detail = format!("bad request: {detail}");
    json_reply(
        400,
        &json!({"status": 400, "title": "Bad Request", "detail": detail}),
    )
}
