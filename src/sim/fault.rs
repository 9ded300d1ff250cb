//! Faults: what goes wrong, on which requests.

use std::io;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

/// Group of requests a fault, and a recorded request, belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// `job-take` and `job-take-batch`.
    Take,
    /// `job-stop`.
    Stop,
    /// `job-done` with a result.
    Done,
    /// `job-done` with `"status": "IN_PROGRESS"`.
    Progress,
    /// `job-stream`.
    Stream,
    /// `ping`.
    Ping,
    /// `run`, `status` and the other client routes.
    Client,
    /// `/rest/v1`.
    Rows,
    /// `/storage/v1`, resumable uploads apart.
    Storage,
    /// `/storage/v1/upload/resumable`.
    Tus,
    /// `/files`.
    Files,
    /// `/hub` and `/hub-files`.
    Hub,
    /// `/callback`.
    Callback,
    /// Anything else.
    Other,
}

/// What happens to a request that a fault matches.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Answer with this status instead of doing what was asked.
    Status {
        /// HTTP status.
        code: u16,
        /// Body: a string as text, anything else as JSON, null for none.
        #[serde(default)]
        body: Value,
        /// Value of a `Retry-After` header, seconds.
        #[serde(default)]
        retry_after: Option<u64>,
        /// True: do what was asked first, and answer with this status all the same.
        #[serde(default)]
        committed: bool,
    },
    /// Wait before anything else, milliseconds.
    DelayMs(u64),
    /// Never answer.
    Hang,
    /// Reset the connection; nothing of what was asked is done.
    Reset,
    /// Do what was asked and reset the connection: the answer is lost.
    ResetAfter,
    /// Files and stored objects: break the connection after this many bytes of the body.
    CutAfter(u64),
    /// Files and stored objects: this many bytes a second.
    BytesPerSecond(u64),
    /// Files and stored objects: claim this `Content-Length`, then send the true bytes.
    WrongLength(u64),
    /// Files and stored objects: send bytes without end and without a length.
    Endless,
    /// Answer 302 with this `Location`.
    Redirect(String),
    /// Files and stored objects: `Content-Encoding: gzip` though nobody asked.
    Gzip,
}

/// One scripted fault.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The requests it looks at.
    pub route: Route,
    /// Only requests of this method.
    #[serde(default)]
    pub method: Option<String>,
    /// Only requests whose path and query contain this.
    #[serde(default)]
    pub path: Option<String>,
    /// First request hit, counted from 1 among those the fault looks at.
    #[serde(default = "one")]
    pub first: u64,
    /// Last request hit; all later ones if absent.
    #[serde(default)]
    pub last: Option<u64>,
    /// What happens.
    pub action: Action,
}

fn one() -> u64 {
    1
}

impl Fault {
    /// `action` on the next `count` requests of `route`.
    pub fn next(route: Route, count: u64, action: Action) -> Self {
        Self {
            route,
            method: None,
            path: None,
            first: 1,
            last: Some(count),
            action,
        }
    }

    /// `action` on every request of `route` until the faults are cleared.
    pub fn always(route: Route, action: Action) -> Self {
        Self {
            last: None,
            ..Self::next(route, 0, action)
        }
    }

    /// The same fault, for one method only.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// The same fault, for paths (with query) that contain `part` only.
    #[must_use]
    pub fn path(mut self, part: &str) -> Self {
        self.path = Some(part.to_owned());
        self
    }
}

impl Action {
    /// Status `code` with an empty body, nothing done.
    pub fn status(code: u16) -> Self {
        Self::Status {
            code,
            body: Value::Null,
            retry_after: None,
            committed: false,
        }
    }

    /// Status `code` with `body`, nothing done.
    pub fn reply(code: u16, body: Value) -> Self {
        Self::Status {
            code,
            body,
            retry_after: None,
            committed: false,
        }
    }

    /// Whether the request is carried out but its true answer never reaches the caller.
    pub(super) fn loses_answer(&self) -> bool {
        matches!(
            self,
            Self::ResetAfter
                | Self::Status {
                    committed: true,
                    ..
                }
        )
    }
}

/// Reads a list of faults, JSON or YAML.
///
/// # Errors
/// The file cannot be read, or is not an array of faults; the message names the file.
pub fn read(path: &Path) -> io::Result<Vec<Fault>> {
    let text = fs_err::read_to_string(path)?;
    // JSON is YAML, but its own reader names the place of a mistake better.
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let faults = if is_json {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else {
        serde_saphyr::from_str(&text).map_err(|error| error.to_string())
    };
    faults.map_err(|error| {
        io::Error::other(format!(
            "`{}` is not a list of faults: {error}",
            path.display()
        ))
    })
}

/// The faults in force, each with the number of requests it has looked at.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<(Fault, u64)>);

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.0.push((fault, 0));
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Counts a request on every fault that looks at it; the first one in its range acts.
    pub(super) fn strike(&mut self, route: Route, method: &str, target: &str) -> Option<Action> {
        let mut action = None;
        for (fault, seen) in &mut self.0 {
            let looks = fault.route == route
                && fault
                    .method
                    .as_deref()
                    .is_none_or(|wanted| wanted.eq_ignore_ascii_case(method))
                && fault
                    .path
                    .as_deref()
                    .is_none_or(|part| target.contains(part));
            if !looks {
                continue;
            }
            *seen += 1;
            if *seen >= fault.first
                && fault.last.is_none_or(|last| *seen <= last)
                && action.is_none()
            {
                action = Some(fault.action.clone());
            }
        }
        action
    }
}
