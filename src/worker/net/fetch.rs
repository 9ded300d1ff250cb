//! Brings a file home: streamed, bounded, resumed after a cut or a restart, whole or absent.
//!
//! Memory does not grow with the file. Packed files stay packed ([`super::gzip`] unpacks).

use std::path::Path;
use std::time::Duration;

use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Response};
use tokio::time::Instant;
use url::Url;

use super::backoff::Backoff;
use super::cancel::Cancel;
use super::error::{Error, Kind, Result, cause, shown};
use super::guard::{Guard, get_once};
use super::part::{Part, Version};
use super::time::retry_after_of;

/// Times a file may change while it is fetched.
const CHANGES: u32 = 3;
/// Longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Wait after an attempt that brought something.
const SHORT_WAIT: Duration = Duration::from_millis(50);
/// New bytes that make an attempt worth the next.
const PROGRESS_BYTES: u64 = 16 * 1024;
/// Most bytes read of a refusal.
const REFUSAL_BYTES: usize = 4096;

/// Who sends the request.
#[derive(Debug, Clone, Copy)]
pub enum Via<'a> {
    /// For URLs of a job: all rules of the guard.
    Guard(&'a Guard),
    /// For hosts that the operator configured: no redirects.
    Client(&'a Client),
}

/// Bounds of one download.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most bytes of the file.
    pub max_bytes: u64,
    /// Fewest bytes per second, over each `speed_window`.
    pub min_bytes_per_s: u64,
    /// Time over which the speed is taken.
    pub speed_window: Duration,
    /// Time for an answer to begin.
    pub answer_timeout: Duration,
    /// Time for the whole.
    pub deadline: Duration,
    /// Attempts in a row that bring less than 16 KiB before giving up.
    pub attempts: u32,
    /// Wait after the first such attempt; it doubles, up to 30 s.
    pub backoff: Duration,
    /// Bytes that the file must have.
    pub expected_bytes: Option<u64>,
    /// SHA-256 that it must have, in hexadecimal digits.
    pub expected_sha256: Option<String>,
}

impl Default for Limits {
    /// 5 GiB, 4 KiB/s over 30 s, 2 h, 8 attempts from 1 s.
    fn default() -> Self {
        Self {
            max_bytes: 5 << 30,
            min_bytes_per_s: 4096,
            speed_window: Duration::from_secs(30),
            answer_timeout: Duration::from_mins(1),
            deadline: Duration::from_hours(2),
            attempts: 8,
            backoff: Duration::from_secs(1),
            expected_bytes: None,
            expected_sha256: None,
        }
    }
}

/// A file that is here and on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in lower-case hexadecimal digits.
    pub sha256: String,
}

/// Told the bytes that are here and, if known, those of the whole.
pub type OnProgress<'a> = &'a mut (dyn FnMut(u64, Option<u64>) + Send);

/// Fetches `url` into the file `to`. Until it is whole it is `to` + `.part`, with a `.json` beside it; a later call, of
/// another process too, goes on from there as long as the server says that the file is the same.
///
/// # Errors
/// [`Kind::Expired`] for 400, 401 and 403, [`Kind::NotFound`], [`Kind::Refused`], [`Kind::Blocked`]; [`Kind::TooLarge`],
/// [`Kind::TooSlow`], [`Kind::Deadline`]; [`Kind::Corrupt`] for a wrong length or digest; [`Kind::Changed`];
/// [`Kind::Transient`] when the attempts are used up; [`Kind::Io`], [`Kind::Cancelled`].
pub async fn fetch(
    via: Via<'_>,
    url: &str,
    headers: &HeaderMap,
    to: &Path,
    limits: &Limits,
    cancel: &Cancel,
    on_progress: OnProgress<'_>,
) -> Result<Fetched> {
    let url = match via {
        Via::Guard(guard) => guard.check(url)?,
        Via::Client(_) => Url::parse(url)
            .map_err(|error| Error::new(Kind::Blocked, format!("url cannot be parsed: {error}")))?,
    };
    let fetch = Fetch {
        via,
        url: &url,
        headers,
        limits,
    };
    let work = fetch.run(to, cancel, on_progress);
    match cancel
        .or(tokio::time::timeout(limits.deadline, work))
        .await?
    {
        Ok(done) => done,
        Err(_) => Err(Error::new(
            Kind::Deadline,
            format!(
                "{} was not fetched within {:?}",
                shown(&url),
                limits.deadline
            ),
        )),
    }
}

struct Fetch<'a> {
    via: Via<'a>,
    url: &'a Url,
    headers: &'a HeaderMap,
    limits: &'a Limits,
}

/// A failed attempt, and the other side's wish when to come again.
struct Failed {
    error: Error,
    retry_after: Option<Duration>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self {
            error,
            retry_after: None,
        }
    }
}

impl Fetch<'_> {
    async fn run(
        &self,
        to: &Path,
        cancel: &Cancel,
        on_progress: OnProgress<'_>,
    ) -> Result<Fetched> {
        let mut part = Part::open(to, self.url, cancel).await?;
        let mut backoff = Backoff::new(self.limits.backoff, LONGEST_WAIT);
        let mut changes = 0;
        let mut most = part.bytes();
        loop {
            let Err(failed) = self.attempt(&mut part, on_progress).await else {
                return part.finish(to, self.limits.expected_sha256.as_deref());
            };
            match failed.error.kind {
                Kind::Transient | Kind::TooSlow => {}
                Kind::Changed if changes < CHANGES => {
                    changes += 1;
                    most = 0;
                    part.restart()?;
                }
                Kind::TooLarge | Kind::Corrupt | Kind::Changed => {
                    part.discard()?;
                    return Err(failed.error);
                }
                // What is here stays: the URL may be signed anew, the disk may be made room on.
                Kind::Blocked
                | Kind::Refused(_)
                | Kind::Expired
                | Kind::NotFound
                | Kind::Deadline
                | Kind::Io
                | Kind::Cancelled => return Err(failed.error),
            }
            let progress = part.bytes() >= most + PROGRESS_BYTES;
            let wait = if progress && failed.error.kind != Kind::TooSlow {
                most = part.bytes();
                backoff.reset();
                SHORT_WAIT.min(self.limits.backoff)
            } else {
                backoff.next(failed.retry_after)
            };
            if backoff.failures() >= self.limits.attempts {
                return Err(failed.error);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// One request and its body; `Ok` when the part is whole.
    async fn attempt(&self, part: &mut Part, on_progress: OnProgress<'_>) -> Result<(), Failed> {
        let mut headers = self.headers.clone();
        headers.insert(
            header::ACCEPT_ENCODING,
            HeaderValue::from_static("identity"),
        );
        if part.can_resume(self.limits.expected_sha256.is_some()) {
            part.ask_for_rest(&mut headers)?;
        } else {
            part.restart()?;
        }
        let response = self.get(&headers).await?;
        match response.status().as_u16() {
            200 => {
                let version = Version::new(response.headers(), response.content_length());
                self.check_size(version.bytes)?;
                part.begin(version)?;
            }
            206 => self.check_rest(part, &response)?,
            416 if part.bytes() > 0
                && content_range(&response) == Some((None, Some(part.bytes()))) =>
            {
                self.check_size(Some(part.bytes()))?;
                return Ok(());
            }
            416 => return Err(self.changed("no longer reaches as far as it did").into()),
            _ => return Err(self.refusal(response).await),
        }
        Ok(self.read(part, response, on_progress).await?)
    }

    async fn get(&self, headers: &HeaderMap) -> Result<Response> {
        let timeout = self.limits.answer_timeout;
        match self.via {
            Via::Guard(guard) => guard.get(self.url, headers, timeout).await,
            Via::Client(client) => get_once(client, self.url, headers, timeout).await,
        }
    }

    /// A 206 must continue the same file where the part ends.
    fn check_rest(&self, part: &Part, response: &Response) -> Result<()> {
        let Some((Some(start), total)) = content_range(response) else {
            return Err(self.changed("answers a range without saying which"));
        };
        let version = Version::new(response.headers(), total);
        if start != part.bytes() || part.bytes() == 0 || !part.version().agrees_with(&version) {
            return Err(self.changed("changed while it was fetched"));
        }
        self.check_size(total)
    }

    fn check_size(&self, total: Option<u64>) -> Result<()> {
        let Some(total) = total else { return Ok(()) };
        if total > self.limits.max_bytes {
            return Err(self.too_large(&format!("has {total} bytes")));
        }
        match self.limits.expected_bytes {
            Some(expected) if expected != total => Err(self.wrong_length(total, expected)),
            _ => Ok(()),
        }
    }

    async fn read(
        &self,
        part: &mut Part,
        mut response: Response,
        on_progress: OnProgress<'_>,
    ) -> Result<()> {
        let total = part.version().bytes;
        let mut window = Window::new(self.limits);
        loop {
            let chunk = match tokio::time::timeout_at(window.end, response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                Ok(Ok(None)) => break,
                Ok(Err(error)) => {
                    let text = format!("{} was cut: {}", shown(self.url), cause(error));
                    return Err(Error::new(Kind::Transient, text));
                }
                Err(_) => {
                    self.check_speed(&mut window)?;
                    continue;
                }
            };
            let bytes = part.bytes() + chunk.len() as u64;
            if bytes > self.limits.max_bytes {
                return Err(self.too_large("does not end"));
            }
            part.append(&chunk)?;
            on_progress(bytes, total);
            window.bytes += chunk.len() as u64;
            if Instant::now() >= window.end {
                self.check_speed(&mut window)?;
            }
        }
        let bytes = part.bytes();
        match total {
            Some(total) if bytes < total => Err(Error::new(
                Kind::Transient,
                format!("{} ended after {bytes} of {total} bytes", shown(self.url)),
            )),
            Some(total) if bytes > total => Err(self.wrong_length(bytes, total)),
            _ => match self.limits.expected_bytes {
                Some(expected) if expected != bytes => Err(self.wrong_length(bytes, expected)),
                _ => Ok(()),
            },
        }
    }

    fn check_speed(&self, window: &mut Window) -> Result<()> {
        let bytes = window.bytes;
        *window = Window::new(self.limits);
        if bytes >= window.least_bytes {
            return Ok(());
        }
        Err(Error::new(
            Kind::TooSlow,
            format!(
                "{} gave {bytes} bytes in {:?}, at least {} bytes per second are needed",
                shown(self.url),
                self.limits.speed_window,
                self.limits.min_bytes_per_s
            ),
        ))
    }

    /// The error of a status that brings no file.
    async fn refusal(&self, mut response: Response) -> Failed {
        let retry_after = retry_after_of(response.headers());
        let status = response.status().as_u16();
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                body.extend_from_slice(&chunk);
                if body.len() >= REFUSAL_BYTES {
                    break;
                }
            }
        };
        // What has come by then is enough: it only refines the message.
        let _ = tokio::time::timeout(Duration::from_secs(5), read).await;
        let (kind, advice) = match (status, wrapped_status(&body)) {
            (404 | 410, _) | (400, Some(404)) => (Kind::NotFound, "check the path"),
            (400 | 401 | 403, _) => (
                Kind::Expired,
                "the signed url may have expired; sign it anew",
            ),
            (408 | 425 | 429 | 500..=599, _) => (Kind::Transient, "try again later"),
            _ => (Kind::Refused(status), "expected status 200"),
        };
        let text = format!("{} answered status {status}; {advice}", shown(self.url));
        Failed {
            error: Error::new(kind, text),
            retry_after,
        }
    }

    fn changed(&self, how: &str) -> Error {
        Error::new(Kind::Changed, format!("{} {how}", shown(self.url)))
    }

    fn too_large(&self, how: &str) -> Error {
        let most = self.limits.max_bytes;
        let text = format!("{} {how}, at most {most} bytes are taken", shown(self.url));
        Error::new(Kind::TooLarge, text)
    }

    fn wrong_length(&self, found: u64, expected: u64) -> Error {
        let text = format!("{} has {found} bytes, expected {expected}", shown(self.url));
        Error::new(Kind::Corrupt, text)
    }
}

/// The time over which the speed is being taken.
struct Window {
    end: Instant,
    bytes: u64,
    least_bytes: u64,
}

impl Window {
    fn new(limits: &Limits) -> Self {
        let milliseconds = u64::try_from(limits.speed_window.as_millis()).unwrap_or(u64::MAX);
        Self {
            end: Instant::now() + limits.speed_window,
            bytes: 0,
            least_bytes: limits.min_bytes_per_s.saturating_mul(milliseconds) / 1000,
        }
    }
}

/// Start and whole length of `Content-Range: bytes 5-9/10`, `bytes 5-9/*` or `bytes */10`.
fn content_range(response: &Response) -> Option<(Option<u64>, Option<u64>)> {
    let value = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let start = match range {
        "*" => None,
        range => Some(range.split_once('-')?.0.parse().ok()?),
    };
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((start, total))
}

/// Object stores hide the true status in the body: `{"statusCode":"404",...}`.
fn wrapped_status(body: &[u8]) -> Option<u16> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    let code = body.get("statusCode")?;
    match code.as_str() {
        Some(text) => text.parse().ok(),
        None => u16::try_from(code.as_u64()?).ok(),
    }
}
