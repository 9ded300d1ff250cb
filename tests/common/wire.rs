//! What RunPod's Python SDK sent, as it was logged: `tests/golden/runpod-wire`.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::Path;

use brightrun::sim::Route;
use serde::Deserialize;
use serde_json::{Map, Value};

/// One request.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Logged {
    /// Seconds since the recorder's start.
    #[serde(rename = "t")]
    pub(crate) at: f64,
    #[serde(rename = "m")]
    pub(crate) method: String,
    /// Path and query.
    #[serde(rename = "path")]
    pub(crate) target: String,
    #[serde(rename = "h")]
    headers: Map<String, Value>,
    #[serde(default)]
    pub(crate) body: String,
}

/// The requests of one log, in order of arrival.
pub(crate) fn read(log: &str) -> Vec<Logged> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/runpod-wire")
        .join(format!("{log}.log"));
    let text = fs_err::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

impl Logged {
    /// Header names in lower case, and values; without those that belong to the connection.
    pub(crate) fn headers(&self) -> Vec<(String, String)> {
        let of_connection = ["host", "content-length", "connection"];
        self.headers
            .iter()
            .map(|(name, value)| (name.to_lowercase(), value.as_str().unwrap().to_owned()))
            .filter(|(name, _)| !of_connection.contains(&name.as_str()))
            .collect()
    }

    pub(crate) fn route(&self) -> Route {
        match self.target.split('/').nth(3).unwrap() {
            "job-take" | "job-take-batch" => Route::Take,
            "job-stop" => Route::Stop,
            "job-stream" => Route::Stream,
            "job-done" if self.body.starts_with(r#"{"status": "IN_PROGRESS""#) => Route::Progress,
            "job-done" => Route::Done,
            "ping" => Route::Ping,
            other => panic!("{other}"),
        }
    }
}
