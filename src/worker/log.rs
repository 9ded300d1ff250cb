//! Log lines as RunPod collects them, with no secret in them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::json;

use super::secret::{Redactor, Secret};

/// Longest message, in characters; what is beyond loses its middle.
const MAX_CHARS: usize = 4096;

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// For those who look for a fault.
    Debug,
    /// What happens.
    Info,
    /// What an operator should look at.
    Warn,
    /// What failed.
    Error,
}

impl Level {
    /// By its name, whatever the case; `None` for another.
    pub fn parse(name: &str) -> Option<Self> {
        match name.trim().to_ascii_uppercase().as_str() {
            "NOTSET" | "TRACE" | "DEBUG" => Some(Self::Debug),
            "INFO" => Some(Self::Info),
            "WARN" | "WARNING" => Some(Self::Warn),
            "ERROR" => Some(Self::Error),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        }
    }
}

/// Takes one line.
pub type Sink = Arc<dyn Fn(&str) + Send + Sync>;

/// Where lines go. Clones go to the same place and know the same secrets.
#[derive(Clone)]
pub struct Log {
    sink: Sink,
    redactor: Arc<Mutex<Redactor>>,
    level: Level,
    is_json: bool,
    job: Option<Arc<str>>,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl Log {
    /// Lines of `level` and above go to `sink`: `is_json` as objects (on RunPod), else as text.
    pub fn new(sink: Sink, level: Level, is_json: bool, secrets: &[Secret]) -> Self {
        Self {
            sink,
            redactor: Arc::new(Mutex::new(Redactor::new(secrets.iter().cloned()))),
            level,
            is_json,
            job: None,
        }
    }

    /// The same, of job `id`.
    #[must_use]
    pub fn of_job(&self, id: &str) -> Self {
        Self {
            job: Some(Arc::from(id)),
            ..self.clone()
        }
    }

    /// From here on `secret` is in no line.
    pub fn hide(&self, secret: &Secret) {
        self.redactor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(secret);
    }

    /// `text` without any secret.
    pub fn redact(&self, text: &str) -> String {
        self.redactor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .redact(text)
    }

    /// A line for those who look for a fault.
    pub fn debug(&self, text: &str) {
        self.line(Level::Debug, text);
    }

    /// A line of what happens.
    pub fn info(&self, text: &str) {
        self.line(Level::Info, text);
    }

    /// A line that an operator should look at.
    pub fn warn(&self, text: &str) {
        self.line(Level::Warn, text);
    }

    /// A line of what failed.
    pub fn error(&self, text: &str) {
        self.line(Level::Error, text);
    }

    fn line(&self, level: Level, text: &str) {
        if level < self.level {
            return;
        }
        let message = cut(&self.redact(text));
        let job = self.job.as_deref();
        let line = if self.is_json {
            json!({"requestId": job, "message": message, "level": level.name()}).to_string()
        } else {
            let job = job.map(|id| format!("{id} | ")).unwrap_or_default();
            format!("{:<7}| {job}{message}", level.name())
        };
        (self.sink)(&line);
    }
}

/// `text` without its middle where it is too long.
fn cut(text: &str) -> String {
    let count = text.chars().count();
    if count <= MAX_CHARS {
        return text.to_owned();
    }
    let half = MAX_CHARS / 2;
    let head: String = text.chars().take(half).collect();
    let tail: String = text.chars().skip(count - half).collect();
    format!(
        "{head}\n...TRUNCATED {} CHARACTERS...\n{tail}",
        count - 2 * half
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(is_json: bool, secrets: &[Secret], write: impl Fn(&Log)) -> Vec<String> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        let sink: Sink = Arc::new(move |line: &str| into.lock().unwrap().push(line.to_owned()));
        write(&Log::new(sink, Level::Info, is_json, secrets));
        let lines = seen.lock().unwrap();
        lines.clone()
    }

    #[test]
    fn lines_have_runpods_form_and_no_secret() {
        let secrets = [Secret::new("canary-value-123")];
        let write = |log: &Log| {
            log.debug("unseen");
            log.of_job("j1")
                .warn("key canary-value-123, https://host/x?token=abcdef123456");
            log.info(&"x".repeat(5000));
        };
        let json = lines(true, &secrets, write);
        assert_eq!(json.len(), 2);
        let first: serde_json::Value = serde_json::from_str(&json[0]).unwrap();
        assert_eq!(first["requestId"], "j1");
        assert_eq!(first["level"], "WARN");
        let text = lines(false, &secrets, write);
        assert!(text[0].starts_with("WARN   | j1 | key "), "{}", text[0]);
        for line in json.iter().chain(&text) {
            assert!(
                !line.contains("canary") && !line.contains("abcdef123456"),
                "{line}"
            );
        }
        assert!(text[1].contains("TRUNCATED 904 CHARACTERS"));
    }
}
