//! Object storage over REST (`/storage/v1`), as Supabase serves it; resumable uploads are in `tus.rs`.
//!
//! Nearly every refusal is HTTP 400 with the true code in the body. Objects are files in the data folder.

mod objects;
mod routes;
mod sign;
mod tus;

use std::io;

use axum::response::Response;
use serde_json::{Value, json};

pub use objects::Object;
pub(super) use objects::Storage;
pub(super) use routes::answer;
pub(super) use sign::signed_path;
pub(super) use tus::answer as resumable;

use super::Shared;
use super::server::{Call, json_reply, text_reply};

/// A refusal: true status, code, short name, message.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    status: u16,
    code: &'static str,
    error: &'static str,
    message: String,
}

impl Refusal {
    fn new(
        status: u16,
        code: &'static str,
        error: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            code,
            error,
            message: message.into(),
        }
    }

    fn no_bucket() -> Self {
        Self::new(404, "NoSuchBucket", "Bucket not found", "Bucket not found")
    }

    fn no_key() -> Self {
        Self::new(404, "NoSuchKey", "not_found", "Object not found")
    }

    fn duplicate() -> Self {
        Self::new(
            409,
            "ResourceAlreadyExists",
            "Duplicate",
            "The resource already exists",
        )
    }

    fn too_large() -> Self {
        let message = "The object exceeded the maximum allowed size";
        Self::new(413, "EntityTooLarge", "Payload too large", message)
    }

    fn invalid_key(key: &str) -> Self {
        Self::new(
            400,
            "InvalidKey",
            "InvalidKey",
            format!("Invalid key: {key}"),
        )
    }

    fn invalid(message: &str) -> Self {
        Self::new(400, "InvalidRequest", "InvalidRequest", message)
    }

    fn internal(error: &io::Error) -> Self {
        Self::new(500, "InternalError", "InternalError", error.to_string())
    }

    /// As the REST routes put it: HTTP 400 unless it is a server error.
    fn rest(&self) -> Response {
        let status = if self.status >= 500 { self.status } else { 400 };
        json_reply(status, &self.body())
    }

    /// As the resumable uploads put it: the true status and plain text.
    fn text(&self) -> Response {
        text_reply(self.status, &self.message)
    }

    fn body(&self) -> Value {
        json!({
            "statusCode": self.status.to_string(),
            "code": self.code,
            "error": self.error,
            "message": self.message,
        })
    }
}

/// Refuses a request without a right key: first as the gateway would, then as the storage service.
fn check_keys(call: &Call) -> Option<Response> {
    let key = &call.shared.settings.service_key;
    let denied = |message| Refusal::new(403, "AccessDenied", "Unauthorized", message);
    let refusal = match (call.header("apikey"), call.header("authorization")) {
        (None, _) => {
            return Some(json_reply(
                401,
                &json!({"message": "No API key found in request"}),
            ));
        }
        (Some(apikey), _) if apikey != key => {
            return Some(json_reply(401, &json!({"message": "Invalid API key"})));
        }
        (_, None) => Refusal::invalid("headers must have required property 'authorization'"),
        (_, Some(sent)) if sent.strip_prefix("Bearer ") == Some(key) => return None,
        _ => denied("Invalid Compact JWS"),
    };
    Some(if call.route == super::Route::Tus {
        refusal.text()
    } else {
        refusal.rest()
    })
}

/// Stores an object without any request.
pub(super) fn put(shared: &Shared, bucket: &str, path: &str, bytes: &[u8]) -> io::Result<()> {
    objects::put(shared, bucket, path, bytes).map_err(|refusal| io::Error::other(refusal.message))
}
