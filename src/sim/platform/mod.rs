//! The serverless platform: a queue with a client side and a worker side.

pub(super) mod client;
pub(super) mod jobs;
mod time;
mod view;
pub(super) mod watch;
pub(super) mod worker;

pub use jobs::{Delivery, Status};
pub use watch::{Violation, ViolationKind};

use axum::response::Response;

use super::server::{Call, Route, json_reply, percent_decoded};
use serde_json::json;

/// Answers a request below `/v2/`.
pub(super) async fn answer(call: Call) -> Response {
    let segments: Vec<String> = call.path.split('/').skip(2).map(percent_decoded).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    if segments.first() != Some(&call.shared.settings.endpoint.as_str()) {
        return json_reply(404, &json!({"error": "endpoint not found"}));
    }
    if call.route == Route::Client {
        client::answer(&call, &segments[1..]).await
    } else {
        worker::answer(&call, &segments[1..]).await
    }
}
