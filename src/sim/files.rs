//! `/files/{name}`: a folder behind HTTP, with signed links that expire.

use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use axum::response::Response;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;

use super::clock;
use super::content::{self, Content};
use super::server::{Call, json_reply, percent_decoded};
use crate::hex::hex;

/// The token of a link to `name` that works until `expires`, seconds since 1970.
pub(super) fn token(key: &str, name: &str, expires: u64) -> String {
    // HMAC takes a key of any length, so there is always a token.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key.as_bytes()) else {
        return String::new();
    };
    mac.update(format!("{expires}:{name}").as_bytes());
    hex(&mac.finalize().into_bytes())
}

/// Serves a file.
pub(super) fn answer(call: &Call) -> Response {
    let name = percent_decoded(call.path.trim_start_matches("/files/"));
    if !matches!(call.method.as_str(), "GET" | "HEAD") {
        return json_reply(405, &json!({"error": "only GET and HEAD"}));
    }
    if let Some(refusal) = check_token(call, &name) {
        return refusal;
    }
    let safe = name
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    let path: PathBuf = call.shared.files_dir.join(&name);
    let metadata = if safe {
        fs_err::metadata(&path)
            .ok()
            .filter(std::fs::Metadata::is_file)
    } else {
        None
    };
    let Some(metadata) = metadata else {
        return json_reply(404, &json!({"error": "file not found"}));
    };
    let modified = metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let content = Content {
        path: &path,
        size: metadata.len(),
        etag: format!(
            "\"{:x}-{:x}\"",
            metadata.len(),
            modified.unwrap_or_default().as_nanos()
        ),
        mime: "application/octet-stream",
        headers: &call.headers,
        head: call.method == "HEAD",
        action: call.action.as_ref(),
    };
    content::serve(&content)
        .unwrap_or_else(|error| json_reply(500, &json!({"error": error.to_string()})))
}

/// The refusal of a link whose token is wrong, missing though needed, or expired.
fn check_token(call: &Call, name: &str) -> Option<Response> {
    let refuse = |message: &str| {
        Some(json_reply(
            400,
            &json!({"statusCode": "400", "error": "InvalidJWT", "message": message}),
        ))
    };
    let Some(sent) = call.parameter("token") else {
        return if call.shared.settings.files_need_token {
            refuse("token needed")
        } else {
            None
        };
    };
    let expires = call
        .parameter("expires")
        .and_then(|expires| expires.parse().ok())
        .unwrap_or(0);
    if sent != token(&call.shared.settings.service_key, name, expires) {
        return refuse("invalid signature");
    }
    if expires <= clock::since_epoch().as_secs() {
        return refuse("\"exp\" claim timestamp check failed");
    }
    None
}
