//! The worker side: `job-take`, `job-take-batch`, `job-stop`, `job-done`, `job-stream`, `ping`.

use std::time::Instant;

use axum::response::Response;
use serde_json::{Value, json};

use super::jobs::Posted;
use super::watch::ViolationKind;
use crate::sim::server::{Call, Route, empty_reply, json_reply};

/// Answers a worker request; `segments` begin after the endpoint.
pub(super) async fn answer(call: &Call, segments: &[&str]) -> Response {
    let worker = segments.get(1).copied().unwrap_or_default();
    let settings = &call.shared.settings;
    if call.header("authorization").unwrap_or_default() != settings.worker_key {
        let detail = format!(
            "{:?} {}",
            call.route,
            if call.header("authorization").is_some() {
                "wrong"
            } else {
                "missing"
            }
        );
        call.shared.change(|state| {
            state
                .platform
                .violate(ViolationKind::Authorization, worker, "", &detail);
        });
        if call.route == Route::Take && settings.take_hides_bad_key {
            return empty_reply(204);
        }
        return json_reply(401, &json!({"error": "unauthorized"}));
    }
    match segments {
        ["job-take", worker] => take(call, worker, None).await,
        ["job-take-batch", worker] => {
            let size = call
                .parameter("batch_size")
                .and_then(|size| size.parse().ok());
            take(call, worker, Some(size.unwrap_or(1))).await
        }
        ["job-stop", worker] => stop(call, worker).await,
        ["ping", worker] => ping(call, worker),
        ["job-done", worker, id] => post(call, worker, id, false),
        ["job-done", worker] => post(
            call,
            worker,
            call.header("x-request-id").unwrap_or_default(),
            false,
        ),
        ["job-stream", worker, id] => post(call, worker, id, true),
        _ => json_reply(404, &json!({"error": "no such route"})),
    }
}

/// One job, or with `batch` a list of up to so many.
async fn take(call: &Call, worker: &str, batch: Option<usize>) -> Response {
    let settings = &call.shared.settings;
    let deadline = Instant::now() + settings.take_hold;
    let jobs = call.shared.poll(deadline, |state| {
        let jobs = state.platform.take(worker, batch.unwrap_or(1));
        (!jobs.is_empty()).then_some(jobs)
    });
    match (jobs.await, batch) {
        (None, _) if settings.empty_take_is_400 => json_reply(400, &json!({"error": "no job"})),
        (None, _) => empty_reply(204),
        (Some(mut jobs), None) => json_reply(200, &jobs.swap_remove(0)),
        (Some(jobs), Some(_)) => json_reply(200, &Value::Array(jobs)),
    }
}

async fn stop(call: &Call, worker: &str) -> Response {
    let deadline = Instant::now() + call.shared.settings.stop_hold;
    let stops = call.shared.poll(deadline, |state| {
        let stops = state.platform.stops(worker);
        (!stops.is_empty()).then_some(stops)
    });
    match stops.await {
        Some(ids) => json_reply(200, &json!({"jobsToStop": ids})),
        None => empty_reply(204),
    }
}

fn ping(call: &Call, worker: &str) -> Response {
    let listed = call.parameter("job_id").unwrap_or_default();
    let listed: Vec<String> = listed
        .split(',')
        .filter(|id| !id.is_empty())
        .map(str::to_owned)
        .collect();
    let unhealthy = (call.parameter("status").as_deref() == Some("unhealthy")).then(|| {
        let [check, reason] =
            ["check", "reason"].map(|name| call.parameter(name).unwrap_or_default());
        format!("{check}: {reason}")
    });
    call.shared
        .change(|state| state.platform.ping(worker, &listed, unhealthy));
    json_reply(200, &json!({"status": "ok"}))
}

/// A result, a progress report, or a streamed piece of output.
fn post(call: &Call, worker: &str, id: &str, stream: bool) -> Response {
    let request_id = call.header("x-request-id");
    if request_id != Some(id) {
        let detail = format!("{:?} with {request_id:?}", call.route);
        call.shared.change(|state| {
            state
                .platform
                .violate(ViolationKind::RequestId, worker, id, &detail);
        });
    }
    let limit = call.shared.settings.result_limit;
    if call.body.len() > limit {
        return json_reply(
            400,
            &json!({"error": format!("body of {} bytes, at most {limit}", call.body.len())}),
        );
    }
    let Ok(body) = serde_json::from_slice::<Value>(&call.body) else {
        return json_reply(400, &json!({"error": "body is not JSON"}));
    };
    let lost = call.answer_lost();
    let posted = call.shared.change(|state| {
        let platform = &mut state.platform;
        if stream {
            platform.stream(worker, id, &body)
        } else {
            platform.post(worker, id, &body, lost)
        }
    });
    match posted {
        Posted::Accepted => json_reply(200, &json!({"ok": true})),
        Posted::Again => empty_reply(call.shared.settings.duplicate_done_status),
        Posted::Gone => json_reply(404, &json!({"error": "job not found"})),
    }
}
