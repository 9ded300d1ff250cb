//! One error for the database and the storage, which answer in three different shapes.

use std::fmt;
use std::time::Duration;

use reqwest::Response;
use serde_json::Value;

use crate::worker::net::error::cause;
use crate::worker::net::time::retry_after_of;
use crate::worker::secret::Redactor;

/// Most bytes read of an error's body.
const BODY_BYTES: usize = 16 * 1024;

/// Code of what is stored and is not what was sent.
const MISMATCH: &str = "Mismatch";

/// A request that the service did not carry out. Its text holds no secret.
#[derive(Debug, Clone)]
pub struct ServiceError {
    /// True status: the storage's REST answers 400 and writes the status into the body. 0 if there was no answer.
    pub status: u16,
    /// The service's own code (`NoSuchBucket`, `PGRST205`, `22P02`), or one of this client.
    pub code: String,
    /// What was found, and what to do.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// When the service wishes to be asked again.
    pub retry_after: Option<Duration>,
    /// A kept connection turned out dead: the request may not have arrived.
    pub(super) connection_died: bool,
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match self.status {
            0 => Ok(()),
            status if self.code.is_empty() => write!(f, " (status {status})"),
            status => write!(f, " (status {status}, {})", self.code),
        }
    }
}

impl std::error::Error for ServiceError {}

impl ServiceError {
    fn new(code: &str, message: String, retryable: bool) -> Self {
        Self {
            status: 0,
            code: code.to_owned(),
            message,
            retryable,
            retry_after: None,
            connection_died: false,
        }
    }

    pub(super) fn settings(message: &str) -> Self {
        Self::new("InvalidSettings", message.to_owned(), false)
    }

    /// The service answered, but not as it should.
    pub(super) fn unexpected(message: String) -> Self {
        Self::new("UnexpectedAnswer", message, true)
    }

    pub(super) fn local(code: &str, message: String) -> Self {
        Self::new(code, message, false)
    }

    pub(super) fn mismatch(message: String) -> Self {
        Self::new(MISMATCH, message, true)
    }

    /// Whether something else is stored than was sent.
    pub fn is_mismatch(&self) -> bool {
        self.code == MISMATCH
    }

    pub(super) fn of_io(error: &std::io::Error) -> Self {
        Self::new("Io", error.to_string(), false)
    }

    /// No answer came.
    pub(super) fn of_request(error: reqwest::Error, redactor: &Redactor) -> Self {
        let died = error.is_request() && !error.is_connect() && !error.is_timeout();
        let text = redactor.redact(&cause(error));
        Self {
            connection_died: died,
            ..Self::new("NoAnswer", format!("no answer: {text}"), true)
        }
    }

    /// The error that an answer tells: JSON of the storage or the database, or plain text of the upload protocol.
    pub(super) async fn of_response(mut response: Response, redactor: &Redactor) -> Self {
        let status = response.status().as_u16();
        let retry_after = retry_after_of(response.headers());
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() >= BODY_BYTES {
                break;
            }
        }
        let mut error = Self::of_body(status, &body, redactor);
        error.retry_after = retry_after;
        error
    }

    fn of_body(status: u16, body: &[u8], redactor: &Redactor) -> Self {
        let json: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        let field = |name: &str| match json.get(name) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(Value::Number(number)) => Some(number.to_string()),
            _ => None,
        };
        let wrapped = field("statusCode").and_then(|code| code.parse::<u16>().ok());
        let status = wrapped
            .filter(|code| (400..600).contains(code))
            .unwrap_or(status);
        let code = field("code").or_else(|| field("error")).unwrap_or_default();
        let mut message = field("message").unwrap_or_else(|| {
            String::from_utf8_lossy(&body[..body.len().min(300)])
                .trim()
                .to_owned()
        });
        for extra in ["details", "hint"] {
            if let Some(text) = field(extra) {
                message.push_str(&format!("; {extra}: {text}"));
            }
        }
        if message.is_empty() {
            "the service gave no reason".clone_into(&mut message);
        }
        Self {
            status,
            message: redactor.redact(&message),
            retryable: matches!(status, 408 | 409 | 423 | 425 | 429 | 500..=599),
            retry_after: None,
            connection_died: false,
            code: redactor.redact(&code),
        }
    }

    /// Puts what was attempted in front, and what to do behind.
    pub(super) fn during(mut self, attempted: &str, advice: &str) -> Self {
        self.message = format!("{attempted}: {}", self.message);
        if !advice.is_empty() {
            self.message.push_str("; ");
            self.message.push_str(advice);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::secret::Secret;

    fn of(status: u16, body: &str) -> ServiceError {
        let redactor = Redactor::new([Secret::new("the-service-key")]);
        ServiceError::of_body(status, body.as_bytes(), &redactor)
    }

    #[test]
    fn the_true_status_is_in_the_body() {
        let error = of(
            400,
            r#"{"statusCode":"404","code":"NoSuchBucket","error":"Bucket not found","message":"Bucket not found"}"#,
        );
        assert_eq!((error.status, error.code.as_str()), (404, "NoSuchBucket"));
        assert!(!error.retryable);
        let error = of(
            400,
            r#"{"statusCode":429,"error":"SlowDown","message":"slow down"}"#,
        );
        assert_eq!((error.status, error.retryable), (429, true));
        assert_eq!(error.to_string(), "slow down (status 429, SlowDown)");
    }

    #[test]
    fn database_and_plain_text_errors_are_read() {
        let error = of(
            400,
            r#"{"code":"22P02","details":null,"hint":"h","message":"invalid input syntax for type integer: \"0.5\""}"#,
        );
        assert_eq!(error.code, "22P02");
        assert!(error.message.ends_with("; hint: h"), "{error}");
        let error = of(413, "Maximum size exceeded\n");
        assert_eq!(
            (error.status, error.message.as_str()),
            (413, "Maximum size exceeded")
        );
        assert!(of(503, "").retryable);
    }

    #[test]
    fn an_echoed_key_is_removed() {
        let error = of(
            401,
            r#"{"message":"bad key the-service-key","code":"the-service-key"}"#,
        );
        assert!(!format!("{error} {error:?}").contains("the-service-key"));
    }
}
