//! Callbacks to the application, signed as Standard Webhooks 1.0.0 says.
//!
//! `webhook-id` names the event over all its attempts, `webhook-timestamp` is the attempt's time, `webhook-signature`
//! is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`. Retries are the caller's affair.

use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::Response;
use reqwest::header::{self, HeaderValue};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::Sha256;
use url::Url;

use crate::worker::net::error::{Error, Kind, shown};
use crate::worker::net::guard::Guard;
use crate::worker::net::time::{iso8601, retry_after_of, unix_seconds};
use crate::worker::secret::{Redactor, Secret};

/// Time for one attempt.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Most bytes read of an answer.
const ANSWER_BYTES: usize = 64 * 1024;
const SECRET_PREFIX: &str = "whsec_";

/// Something that happened to a job. It is told until it arrives, always with the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unique, the same over all attempts, without dots: `msg_<job>_<attempt>_<sequence number>`.
    pub id: String,
    /// `training.progress`, `training.completed` and the like.
    #[serde(rename = "type")]
    pub kind: String,
    /// When it happened, in seconds since 1970.
    pub unix_seconds: u64,
    /// What the receiver gets. Keep it under 20 kB.
    pub data: Value,
}

impl Event {
    /// An event of this moment.
    pub fn new(id: impl Into<String>, kind: impl Into<String>, data: Value) -> Self {
        Self {
            id: id.into(),
            kind: kind.into(),
            unix_seconds: unix_seconds(),
            data,
        }
    }

    /// The bytes that are sent and signed.
    pub fn body(&self) -> String {
        json!({
            "type": self.kind,
            "timestamp": iso8601(self.unix_seconds),
            "data": self.data,
        })
        .to_string()
    }
}

/// What the receiver answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reply {
    /// It asks for the job to be stopped: `{"cancel": true}`.
    pub cancel: bool,
}

/// An event that did not arrive. Its text holds no secret.
#[derive(Debug, Clone)]
pub struct CallbackError {
    /// What was found, and what to do.
    pub message: String,
    /// HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// When the receiver wishes to be asked again.
    pub retry_after: Option<Duration>,
    /// No later attempt, of this event or another, will succeed.
    pub stop_for_good: bool,
}

impl fmt::Display for CallbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CallbackError {}

impl CallbackError {
    fn new(message: String, stop_for_good: bool) -> Self {
        Self {
            message,
            status: None,
            retry_after: None,
            stop_for_good,
        }
    }
}

impl CallbackError {
    /// The operator lets no callbacks go to this host.
    pub(super) fn refused(url: &Url) -> Self {
        let url = shown(url);
        Self::new(
            format!("callback {url} is on no host that BRIGHTRUN_CALLBACK_HOSTS names"),
            true,
        )
    }
}

impl From<Error> for CallbackError {
    fn from(error: Error) -> Self {
        Self::new(format!("callback: {error}"), error.kind == Kind::Blocked)
    }
}

/// Signs bodies. Several keys, for the time in which one is replaced, give several signatures.
#[derive(Debug, Clone)]
pub struct Signer {
    keys: Vec<Key>,
}

#[derive(Clone)]
struct Key(Vec<u8>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key([redacted])")
    }
}

impl Signer {
    /// From `whsec_<base64>`, or several of them with spaces between.
    ///
    /// # Errors
    /// If one is no base64 of 24 to 64 bytes; the text does not show it.
    pub fn new(secret: &Secret) -> Result<Self, CallbackError> {
        let keys: Option<Vec<Key>> = secret.expose().split_whitespace().map(key).collect();
        match keys {
            Some(keys) if !keys.is_empty() => Ok(Self { keys }),
            _ => Err(CallbackError::new(
                "callback secret has to be `whsec_` and the base64 of 24 to 64 bytes".to_owned(),
                true,
            )),
        }
    }

    /// The value of `webhook-signature`.
    pub fn sign(&self, id: &str, unix_seconds: u64, body: &str) -> String {
        let signatures = self.keys.iter().filter_map(|key| {
            let mut mac = Hmac::<Sha256>::new_from_slice(&key.0).ok()?;
            mac.update(format!("{id}.{unix_seconds}.{body}").as_bytes());
            Some(format!(
                "v1,{}",
                STANDARD.encode(mac.finalize().into_bytes())
            ))
        });
        signatures.collect::<Vec<_>>().join(" ")
    }
}

fn key(secret: &str) -> Option<Key> {
    let text = secret.strip_prefix(SECRET_PREFIX).unwrap_or(secret);
    let bytes = STANDARD.decode(text).ok()?;
    (24..=64).contains(&bytes.len()).then_some(Key(bytes))
}

/// A receiver of events.
#[derive(Clone)]
pub struct Callback {
    guard: Guard,
    url: Url,
    signer: Option<Signer>,
    authorization: Option<HeaderValue>,
    redactor: Redactor,
    timeout: Duration,
}

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callback")
            .field("url", &shown(&self.url))
            .finish_non_exhaustive()
    }
}

impl Callback {
    /// Events go to `url`, by `guard`'s rules; signed with `secret`, with `auth_header` as the value of
    /// `Authorization`, if given.
    ///
    /// # Errors
    /// If the URL is not allowed, or secret or header cannot be used.
    pub fn new(
        guard: Guard,
        url: &str,
        secret: Option<&Secret>,
        auth_header: Option<&Secret>,
    ) -> Result<Self, CallbackError> {
        let url = guard.check(url)?;
        let authorization = auth_header.map(|value| {
            let mut value = HeaderValue::from_str(value.expose()).map_err(|_| {
                CallbackError::new(
                    "callback authorization has characters that no header may have".to_owned(),
                    true,
                )
            })?;
            value.set_sensitive(true);
            Ok::<_, CallbackError>(value)
        });
        Ok(Self {
            guard,
            url,
            signer: secret.map(Signer::new).transpose()?,
            authorization: authorization.transpose()?,
            redactor: Redactor::new(secret.into_iter().chain(auth_header).cloned()),
            timeout: TIMEOUT,
        })
    }

    /// Gives one attempt this long instead of 20 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends one event, once.
    ///
    /// # Errors
    /// [`CallbackError`] for anything but a 2xx answer in time.
    pub async fn send(&self, event: &Event) -> Result<Reply, CallbackError> {
        let valid = |c: char| c.is_ascii_graphic() && c != '.';
        if event.id.is_empty() || !event.id.chars().all(valid) {
            let text = format!("event id {:?} has a dot or no header character", event.id);
            return Err(CallbackError::new(text, false));
        }
        let sent = tokio::time::timeout(self.timeout, self.send_once(event)).await;
        sent.unwrap_or_else(|_| {
            let text = format!(
                "callback {} gave no answer within {:?}",
                shown(&self.url),
                self.timeout
            );
            Err(CallbackError::new(text, false))
        })
    }

    async fn send_once(&self, event: &Event) -> Result<Reply, CallbackError> {
        let client = self.guard.client_for(&self.url).await.map_err(|error| {
            // The address may be a public one again.
            let mut error = CallbackError::from(error);
            error.stop_for_good = false;
            error
        })?;
        let body = event.body();
        let now = unix_seconds();
        let mut request = client
            .post(self.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header("webhook-id", &event.id)
            .header("webhook-timestamp", now);
        if let Some(signer) = &self.signer {
            request = request.header("webhook-signature", signer.sign(&event.id, now, &body));
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let sent = request.body(body).send().await;
        let response = sent.map_err(|error| {
            let error = Error::of_request(&self.url, error);
            CallbackError::new(self.redactor.redact(&format!("callback: {error}")), false)
        })?;
        self.judge(response).await
    }

    async fn judge(&self, response: Response) -> Result<Reply, CallbackError> {
        let status = response.status();
        if status.is_success() {
            return Ok(read_reply(response).await);
        }
        let advice = match status.as_u16() {
            300..=399 => "; redirects are not followed, give the final address",
            401 | 403 => {
                "; give the callback's authorization, or let the receiver rely on the signature"
            }
            404 => "; nothing receives callbacks at this address",
            410 => "; the receiver wants no more callbacks",
            _ => "",
        };
        let url = shown(&self.url);
        Err(CallbackError {
            message: format!("callback {url} answered status {}{advice}", status.as_u16()),
            status: Some(status.as_u16()),
            retry_after: retry_after_of(response.headers()),
            stop_for_good: status.as_u16() == 410,
        })
    }
}

/// An answer that is no JSON, too long or cut still is a 2xx.
async fn read_reply(mut response: Response) -> Reply {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES {
            return Reply::default();
        }
    }
    let value: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Reply {
        cancel: value.get("cancel") == Some(&Value::Bool(true)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn the_published_example_is_signed_as_published() {
        let signer = Signer::new(&Secret::new(SECRET)).unwrap();
        let signature = signer.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            "{\"test\": 2432232314}",
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn two_keys_give_two_signatures() {
        let two = Secret::new(&format!("{SECRET} whsec_{}", STANDARD.encode([7; 32])));
        let signer = Signer::new(&two).unwrap();
        let signature = signer.sign("msg_1", 5, "{}");
        assert_eq!(signature.split(' ').count(), 2);
        assert!(signature.split(' ').all(|s| s.starts_with("v1,")));
    }

    #[test]
    fn bad_secrets_are_refused_and_not_shown() {
        for bad in ["", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ=", "plain-canary"] {
            let error = Signer::new(&Secret::new(bad)).unwrap_err();
            assert!(!error.to_string().contains("canary"));
        }
    }

    #[test]
    fn bodies_do_not_change_between_attempts() {
        let event = Event {
            id: "msg_j_1_2".into(),
            kind: "training.completed".into(),
            unix_seconds: 0,
            data: json!({"b": 1, "a": 2}),
        };
        let again: Event = serde_json::from_str(&serde_json::to_string(&event).unwrap()).unwrap();
        assert_eq!(again.body(), event.body());
        assert_eq!(
            event.body(),
            r#"{"type":"training.completed","timestamp":"1970-01-01T00:00:00Z","data":{"b":1,"a":2}}"#
        );
    }
}
