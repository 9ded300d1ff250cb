//! What goes wrong between this machine and another, cut by what the caller can do about it.

use std::error::Error as _;
use std::fmt;

use url::Url;

use crate::worker::secret::redact_shapes;

/// What the caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The other side or the way to it has a passing trouble: try again.
    Transient,
    /// The address is one that a job may not name.
    Blocked,
    /// The other side said no, with this HTTP status.
    Refused(u16),
    /// A signed URL is no longer valid: sign it anew.
    Expired,
    /// There is nothing at this address.
    NotFound,
    /// More bytes than the limit.
    TooLarge,
    /// Fewer bytes per second than the limit.
    TooSlow,
    /// The time for the whole is over.
    Deadline,
    /// The file kept changing while it was read.
    Changed,
    /// The bytes are not those promised: length, digest or packing.
    Corrupt,
    /// This machine's file system.
    Io,
    /// The caller asked to stop.
    Cancelled,
}

/// A failed request or download. Its text holds no secret and no query string.
#[derive(Debug, Clone)]
pub struct Error {
    /// What the caller can do.
    pub kind: Kind,
    /// What was found, what was expected, what to do.
    pub message: String,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error whose message is cleaned of what looks like a secret.
    pub fn new(kind: Kind, message: impl AsRef<str>) -> Self {
        Self {
            kind,
            message: redact_shapes(message.as_ref()),
        }
    }

    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        self.kind == Kind::Transient
    }

    /// A failed request to `url`.
    pub fn of_request(url: &Url, error: reqwest::Error) -> Self {
        Self::new(
            Kind::Transient,
            format!("request to {} failed: {}", shown(url), cause(error)),
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(Kind::Io, error.to_string())
    }
}

/// `url` as it may be shown: without user, query and fragment.
pub fn shown(url: &Url) -> String {
    let mut text = format!("{}://{}", url.scheme(), url.host_str().unwrap_or("?"));
    if let Some(port) = url.port() {
        text.push_str(&format!(":{port}"));
    }
    text.push_str(url.path());
    redact_shapes(&text)
}

/// The chain of causes of a client error, without its URL.
pub(crate) fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    if error.is_timeout() {
        return "timed out".to_owned();
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    redact_shapes(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_query_and_no_user_is_shown() {
        let url = Url::parse("https://me:pw123@h.example:8443/a/b?token=abc#f=g").unwrap();
        assert_eq!(shown(&url), "https://h.example:8443/a/b");
        let error = Error::new(Kind::Io, format!("cannot read {url}"));
        assert!(!error.to_string().contains("abc"), "{error}");
        assert!(!error.to_string().contains("pw123"), "{error}");
    }
}
