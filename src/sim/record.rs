//! Every request the simulator got, in order.

use std::time::Duration;

use serde_json::{Value, json};

use super::fault::Route;

/// One request.
#[derive(Debug, Clone)]
pub struct Record {
    /// Time since the simulator's start.
    pub at: Duration,
    /// Group the request belongs to.
    pub route: Route,
    /// HTTP method.
    pub method: String,
    /// Path and query, as sent.
    pub target: String,
    /// Header names in lower case, and values, as sent.
    pub headers: Vec<(String, String)>,
    /// Body as text; empty for uploads, which are not kept here.
    pub body: String,
    /// Bytes of the body; for uploads what `Content-Length` says.
    pub body_bytes: u64,
    /// Status answered; none while unanswered, hanging, or reset.
    pub status: Option<u16>,
    /// Whether a fault acted on it.
    pub faulted: bool,
}

impl Record {
    /// Value of a header, the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header_of(&self.headers, name)
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// Path and query without the values of tokens.
    pub fn redacted_target(&self) -> String {
        let Some((path, query)) = self.target.split_once('?') else {
            return self.target.clone();
        };
        let parameters: Vec<String> = query
            .split('&')
            .map(|parameter| match parameter.split_once('=') {
                Some((name, _)) if name.eq_ignore_ascii_case("token") => format!("{name}=..."),
                _ => parameter.to_owned(),
            })
            .collect();
        format!("{path}?{}", parameters.join("&"))
    }

    /// One JSON object, keys and tokens left out.
    pub fn to_json(&self) -> Value {
        let secret = |name: &str| matches!(name, "authorization" | "apikey" | "x-signature");
        let header = |(name, value): &(String, String)| {
            (
                name.clone(),
                if secret(name) {
                    json!("...")
                } else {
                    json!(value)
                },
            )
        };
        json!({
            "t": (self.at.as_secs_f64() * 1000.0).round() / 1000.0,
            "m": self.method,
            "path": self.redacted_target(),
            "h": Value::Object(self.headers.iter().map(header).collect()),
            "body": self.body,
            "body_bytes": self.body_bytes,
            "status": self.status,
        })
    }
}

/// Value of a header among `headers`, the name in lower case.
pub(super) fn header_of<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(known, _)| known == name);
    found.map(|(_, value)| value.as_str())
}
