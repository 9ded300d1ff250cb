//! One request: record it, let a fault act on it, answer it.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Request, State as Extract};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::Value;

use super::fault::Action;
pub(super) use super::fault::Route;
use super::record::Record;
use super::wire::{Cut, drain, next_chunk};
use super::{Shared, callback, files, hub, platform, rows, storage};

/// A request on its way to the part that answers it.
pub(super) struct Call {
    pub(super) shared: Arc<Shared>,
    pub(super) route: Route,
    pub(super) method: String,
    /// Path as sent, percent signs and all.
    pub(super) path: String,
    pub(super) query: String,
    pub(super) headers: HeaderMap,
    /// The whole body; empty for uploads.
    pub(super) body: Bytes,
    pub(super) action: Option<Action>,
}

impl Call {
    /// A header's value, if it is text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The first value of a query parameter, decoded.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        let mut pairs = url::form_urlencoded::parse(self.query.as_bytes());
        pairs
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.into_owned())
    }

    /// Whether the caller will not see the answer.
    pub(super) fn answer_lost(&self) -> bool {
        self.action.as_ref().is_some_and(Action::loses_answer)
    }
}

/// Answers any request.
pub(super) async fn handle(
    Extract(shared): Extract<Arc<Shared>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let method = parts.method.as_str().to_owned();
    let path = parts.uri.path().to_owned();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let mut route = route_of(&path);
    let (body, upload) = if is_upload(route, &method, &path) {
        (Bytes::new(), Some(body))
    } else {
        match read_all(body).await {
            Ok(bytes) => (bytes, None),
            Err(reason) => return text_reply(400, &reason),
        }
    };
    if route == Route::Done && is_progress(&body) {
        route = Route::Progress;
    }
    let call = Call {
        shared,
        route,
        method,
        path,
        query,
        headers: parts.headers,
        body,
        action: None,
    };
    answer(call, upload, &cut).await
}

/// `upload` is the body if it is an upload's, still on its way.
async fn answer(mut call: Call, upload: Option<Body>, cut: &Cut) -> Response {
    let shared = Arc::clone(&call.shared);
    let record = record_of(&call, upload.is_some(), shared.started.elapsed());
    let (index, action) = shared.change(|state| {
        let action = state
            .faults
            .strike(call.route, &record.method, &record.target);
        state.records.push(Record {
            faulted: action.is_some(),
            ..record
        });
        (state.records.len() - 1, action)
    });
    call.action = action.clone();
    let mut upload = upload;
    let early = match &action {
        Some(Action::DelayMs(ms)) => {
            tokio::time::sleep(std::time::Duration::from_millis(*ms)).await;
            None
        }
        Some(Action::Hang) => std::future::pending().await,
        Some(Action::Reset) => {
            cut.reset();
            return empty_reply(500);
        }
        Some(
            Action::Status {
                committed: false, ..
            }
            | Action::Redirect(_),
        ) => {
            if let Some(upload) = upload.take() {
                drain(upload).await;
            }
            action.as_ref().and_then(faulty_reply)
        }
        _ => None,
    };
    let response = match early {
        Some(response) => response,
        None => dispatch(call, upload).await,
    };
    let response = match &action {
        Some(Action::ResetAfter) => {
            cut.reset();
            return response;
        }
        Some(
            action @ Action::Status {
                committed: true, ..
            },
        ) => faulty_reply(action).unwrap_or(response),
        _ => response,
    };
    shared.change(|state| state.records[index].status = Some(response.status().as_u16()));
    response
}

async fn dispatch(call: Call, upload: Option<Body>) -> Response {
    match call.route {
        Route::Rows => rows::answer(&call),
        Route::Storage => storage::answer(call, upload).await,
        Route::Tus => storage::resumable(call, upload).await,
        Route::Files => files::answer(&call),
        Route::Hub => hub::answer(&call),
        Route::Callback => callback::answer(&call),
        Route::Other => json_reply(404, &serde_json::json!({"error": "no such route"})),
        Route::Take
        | Route::Stop
        | Route::Done
        | Route::Progress
        | Route::Stream
        | Route::Ping
        | Route::Client => platform::answer(call).await,
    }
}

fn record_of(call: &Call, is_upload: bool, at: std::time::Duration) -> Record {
    let target = if call.query.is_empty() {
        call.path.clone()
    } else {
        format!("{}?{}", call.path, call.query)
    };
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let length = call
        .header("content-length")
        .and_then(|length| length.parse().ok())
        .unwrap_or(0);
    Record {
        at,
        route: call.route,
        method: call.method.clone(),
        target,
        headers: call
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), text(value)))
            .collect(),
        body: String::from_utf8_lossy(&call.body).into_owned(),
        body_bytes: if is_upload {
            length
        } else {
            call.body.len() as u64
        },
        status: None,
        faulted: false,
    }
}

fn route_of(path: &str) -> Route {
    let mut segments = path.split('/').skip(1);
    match (segments.next(), segments.next(), segments.next()) {
        (Some("v2"), Some(_), Some(verb)) => match verb {
            "job-take" | "job-take-batch" => Route::Take,
            "job-stop" => Route::Stop,
            "job-done" => Route::Done,
            "job-stream" => Route::Stream,
            "ping" => Route::Ping,
            _ => Route::Client,
        },
        (Some("rest"), Some("v1"), _) => Route::Rows,
        (Some("storage"), Some("v1"), Some("upload")) => Route::Tus,
        (Some("storage"), Some("v1"), _) => Route::Storage,
        (Some("files"), ..) => Route::Files,
        (Some("hub" | "hub-files"), ..) => Route::Hub,
        (Some("callback"), ..) => Route::Callback,
        _ => Route::Other,
    }
}

/// Whether the body may be large and must go straight to the disk.
fn is_upload(route: Route, method: &str, path: &str) -> bool {
    let kind = path.split('/').nth(4).unwrap_or_default();
    if route == Route::Tus {
        return method == "PATCH";
    }
    route == Route::Storage
        && matches!(method, "POST" | "PUT")
        && path.starts_with("/storage/v1/object/")
        && !matches!(kind, "list" | "sign" | "info" | "move" | "copy")
}

async fn read_all(mut body: Body) -> Result<Bytes, String> {
    /// More than any limit of a body that is kept in memory.
    const MOST: usize = 256 << 20;
    let mut whole = Vec::new();
    while let Some(chunk) = next_chunk(&mut body).await {
        whole.extend_from_slice(&chunk.map_err(|error| format!("body broken off: {error}"))?);
        if whole.len() > MOST {
            return Err(format!("body of more than {MOST} bytes"));
        }
    }
    Ok(whole.into())
}

fn is_progress(body: &[u8]) -> bool {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    body.get("status").and_then(Value::as_str) == Some("IN_PROGRESS")
}

fn faulty_reply(action: &Action) -> Option<Response> {
    if let Action::Redirect(location) = action {
        let mut response = empty_reply(302);
        set(&mut response, header::LOCATION, location);
        return Some(response);
    }
    let Action::Status {
        code,
        body,
        retry_after,
        ..
    } = action
    else {
        return None;
    };
    let mut response = if body.is_null() {
        empty_reply(*code)
    } else if let Some(text) = body.as_str() {
        text_reply(*code, text)
    } else {
        json_reply(*code, body)
    };
    if let Some(seconds) = retry_after {
        set(&mut response, header::RETRY_AFTER, &seconds.to_string());
    }
    Some(response)
}

/// Sets a header; a value that cannot be one is left out.
pub(super) fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// A response without a body.
pub(super) fn empty_reply(status: u16) -> Response {
    reply(status, Body::empty())
}

/// A JSON response.
pub(super) fn json_reply(status: u16, body: &Value) -> Response {
    let mut response = reply(status, Body::from(body.to_string()));
    set(
        &mut response,
        header::CONTENT_TYPE,
        "application/json; charset=utf-8",
    );
    response
}

/// A plain text response.
pub(super) fn text_reply(status: u16, body: &str) -> Response {
    let mut response = reply(status, Body::from(body.to_owned()));
    set(
        &mut response,
        header::CONTENT_TYPE,
        "text/plain; charset=utf-8",
    );
    response
}

/// A response with any body.
pub(super) fn reply(status: u16, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// A path segment without its percent signs; bytes that are not UTF-8 are replaced.
pub(super) fn percent_decoded(segment: &str) -> String {
    let bytes = segment.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_signs_are_decoded_and_lone_ones_kept() {
        assert_eq!(percent_decoded("a%20b%C3%A9%2F%zz%"), "a b\u{e9}/%zz%");
    }

    #[test]
    fn uploads_are_told_from_other_posts() {
        let upload = |path| is_upload(Route::Storage, "POST", path);
        assert!(upload("/storage/v1/object/lora-models/adapters/a.tar.gz"));
        assert!(!upload("/storage/v1/object/list/lora-models"));
        assert!(!upload("/storage/v1/object/sign/lora-models/a"));
    }
}
