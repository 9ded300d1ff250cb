//! `/callback/{name}`: keeps what is posted and answers as scripted.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use axum::response::Response;
use serde_json::{Value, json};

use super::record::header_of;
use super::server::{Call, json_reply, percent_decoded};

/// One posted callback.
#[derive(Debug, Clone)]
pub struct Callback {
    /// Time since the simulator's start.
    pub at: Duration,
    /// Header names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// Body, byte for byte: signatures are made over these.
    pub body: Vec<u8>,
}

impl Callback {
    /// Value of a header, the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header_of(&self.headers, name)
    }

    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// Callbacks by name, and the answers still to give; 200 `{}` when there are none.
#[derive(Debug, Default)]
pub(super) struct Callbacks {
    pub(super) posted: BTreeMap<String, Vec<Callback>>,
    pub(super) script: BTreeMap<String, VecDeque<(u16, Value)>>,
}

/// Records a callback.
pub(super) fn answer(call: &Call) -> Response {
    let name = percent_decoded(call.path.trim_start_matches("/callback/"));
    if call.method != "POST" {
        return json_reply(405, &json!({"error": "only POST"}));
    }
    let headers = call.headers.iter().map(|(name, value)| {
        (
            name.as_str().to_owned(),
            String::from_utf8_lossy(value.as_bytes()).into_owned(),
        )
    });
    let callback = Callback {
        at: call.shared.started.elapsed(),
        headers: headers.collect(),
        body: call.body.to_vec(),
    };
    let (status, body) = call.shared.change(|state| {
        let callbacks = &mut state.callbacks;
        callbacks
            .posted
            .entry(name.clone())
            .or_default()
            .push(callback);
        callbacks
            .script
            .get_mut(&name)
            .and_then(VecDeque::pop_front)
            .unwrap_or((200, json!({})))
    });
    json_reply(status, &body)
}
