//! Objects of the project's storage: upload, check, sign, download, remove.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fs_err as fs;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use url::Url;

use super::error::ServiceError;
use super::{Result, Supabase, TIMEOUT, at};
use crate::hex::hex;
use crate::worker::net::backoff::Backoff;
use crate::worker::net::error::Kind;
use crate::worker::net::fetch::{Fetched, Limits, OnProgress, Via, fetch};
use crate::worker::net::{self, Cancel};

/// From this size on an upload is resumable. It is also the one size of its pieces that the service takes.
pub(super) const PIECE_BYTES: u64 = 6 << 20;
/// Time for a request that carries up to [`PIECE_BYTES`]: 50 kB/s.
pub(super) const PIECE_TIMEOUT: Duration = Duration::from_mins(2);
/// Silence after which a download is given up.
const SILENCE: Duration = Duration::from_mins(1);
const BUFFER_BYTES: usize = 64 * 1024;
/// Characters of an object's name besides letters and digits.
const NAME_CHARACTERS: &str = "_-.',!*&$@=;:+?()/ ";

/// One file to upload.
#[derive(Debug, Clone)]
pub struct Upload {
    /// Bucket to put it in.
    pub bucket: String,
    /// Name of the object in the bucket. What is there is replaced.
    pub path: String,
    /// The file. It must not change meanwhile.
    pub file: PathBuf,
    /// Its SHA-256, where that is known.
    pub sha256: Option<String>,
    /// Its media type.
    pub content_type: String,
    /// Where to keep what a later process needs to go on; only used from 6 MiB on.
    pub state: Option<PathBuf>,
    /// How long to keep trying.
    pub deadline: Duration,
    /// Wait after the first failure in a row; it doubles, up to 30 s. One second is right for a real service.
    pub backoff: Duration,
}

/// What a bucket takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BucketLimits {
    /// Most bytes of a file, if the bucket has a limit of its own.
    pub file_size_limit: Option<u64>,
    /// Media types taken; all if empty.
    pub allowed_mime_types: Vec<String>,
}

impl Supabase {
    /// Uploads a file: below 6 MiB in one request, else in pieces that a later call goes on with.
    ///
    /// Tries again after what may pass (409, 423, 429, 5xx, no answer), until the deadline.
    ///
    /// # Errors
    /// [`ServiceError`] that says what to do; code `Cancelled`, `Io`.
    pub async fn upload(
        &self,
        upload: &Upload,
        cancel: &Cancel,
        on_progress: OnProgress<'_>,
    ) -> Result<()> {
        check_name(&upload.path)?;
        let size = fs::metadata(&upload.file)
            .map_err(|e| ServiceError::of_io(&e))?
            .len();
        let work = async {
            if size < PIECE_BYTES {
                self.upload_at_once(upload, size).await?;
                on_progress(size, Some(size));
                return Ok(());
            }
            self.upload_in_pieces(upload, size, on_progress).await
        };
        cancel.or(work).await.unwrap_or_else(|_| Err(cancelled()))
    }

    async fn upload_at_once(&self, upload: &Upload, size: u64) -> Result<()> {
        let deadline = Instant::now() + upload.deadline;
        let mut backoff = upload_backoff(upload);
        loop {
            let body = fs::read(&upload.file).map_err(|e| ServiceError::of_io(&e))?;
            let request = self
                .request(Method::POST, self.object(&upload.bucket, &upload.path))
                .header("x-upsert", "true")
                .header(header::CONTENT_TYPE, &upload.content_type)
                .header(header::CACHE_CONTROL, "max-age=3600")
                .body(body)
                .timeout(PIECE_TIMEOUT);
            let Err(error) = self.send(request).await else {
                return Ok(());
            };
            wait_or_give_up(error, &mut backoff, deadline, &upload.bucket, size).await?;
        }
    }

    /// Checks that the object is there with this size and SHA-256 (hexadecimal digits), by reading it back.
    ///
    /// # Errors
    /// [`ServiceError`]; code `Mismatch`, retryable, if it is another.
    pub async fn verify(
        &self,
        bucket: &str,
        path: &str,
        size: u64,
        sha256: &str,
        cancel: &Cancel,
    ) -> Result<()> {
        let attempted = format!("checking `{bucket}/{path}`");
        let work = self.digest(bucket, path, size);
        let found = cancel.or(work).await.unwrap_or_else(|_| Err(cancelled()));
        let found = found.map_err(|error| error.during(&attempted, ""))?;
        if found.eq_ignore_ascii_case(sha256) {
            return Ok(());
        }
        let message =
            format!("the stored object has sha256 {found}, expected {sha256}; upload it again");
        Err(ServiceError::mismatch(message).during(&attempted, ""))
    }

    /// SHA-256 of the stored object, which must have `size` bytes.
    pub(super) async fn digest(&self, bucket: &str, path: &str, size: u64) -> Result<String> {
        check_name(path)?;
        let url = self.stored(bucket, path);
        let head = self.request(Method::HEAD, url.clone()).timeout(TIMEOUT);
        let head = self.send_again(fresh(head)).await?;
        let stored = header_number(head.headers(), header::CONTENT_LENGTH.as_str());
        let wrong = |found| {
            ServiceError::mismatch(format!(
                "the stored object has {found} bytes, expected {size}"
            ))
        };
        if let Some(stored) = stored
            && stored != size
        {
            return Err(wrong(stored));
        }
        let sent = self.send(fresh(self.request(Method::GET, url)));
        let mut response = tokio::time::timeout(SILENCE, sent)
            .await
            .map_err(|_| silent())??;
        let mut hasher = Sha256::new();
        let mut bytes = 0_u64;
        loop {
            let chunk = tokio::time::timeout(SILENCE, response.chunk())
                .await
                .map_err(|_| silent())?;
            let chunk = chunk.map_err(|error| ServiceError::of_request(error, &self.redactor))?;
            let Some(chunk) = chunk else { break };
            hasher.update(&chunk);
            bytes += chunk.len() as u64;
            if bytes > size {
                break;
            }
        }
        if bytes != size {
            return Err(wrong(bytes));
        }
        Ok(hex(&hasher.finalize()))
    }

    /// A URL that gives the object to anybody for `expires_s` seconds. It is as good as a secret until then.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn sign(&self, bucket: &str, path: &str, expires_s: u64) -> Result<String> {
        check_name(path)?;
        let base = at(&self.url, ["storage", "v1"]);
        let url = at(
            &base,
            ["object", "sign", bucket]
                .into_iter()
                .chain(path.split('/')),
        );
        let request = self
            .request(Method::POST, url)
            .json(&json!({ "expiresIn": expires_s }));
        let attempted = format!("signing `{bucket}/{path}`");
        let response = self.send_again(request.timeout(TIMEOUT)).await;
        let answer = self
            .json(response.map_err(|error| error.during(&attempted, ""))?)
            .await?;
        let signed = answer
            .get("signedURL")
            .or_else(|| answer.get("signedUrl"))
            .and_then(Value::as_str);
        let signed = signed
            .ok_or_else(|| ServiceError::unexpected("answer has no `signedURL`".to_owned()))?;
        let absolute = if signed.starts_with('/') {
            Url::parse(&format!("{base}{signed}"))
        } else {
            Url::parse(signed)
        };
        match absolute {
            Ok(url) if url.origin() == base.origin() => Ok(url.into()),
            _ => Err(ServiceError::unexpected(
                "signed url is of another host".to_owned(),
            )),
        }
    }

    /// Downloads an object with the project's key, as [`net::fetch`] does.
    ///
    /// # Errors
    /// Those of [`net::fetch::fetch`]; [`Kind::Refused`] where that says [`Kind::Expired`].
    pub async fn download(
        &self,
        bucket: &str,
        path: &str,
        to: &Path,
        limits: &Limits,
        cancel: &Cancel,
        on_progress: OnProgress<'_>,
    ) -> net::error::Result<Fetched> {
        check_name(path).map_err(|error| net::Error::new(Kind::NotFound, error.to_string()))?;
        let mut headers = HeaderMap::new();
        headers.insert("apikey", self.key_value());
        if !self.key.expose().starts_with("sb_secret_") {
            let bearer = HeaderValue::from_str(&format!("Bearer {}", self.key.expose()));
            let mut bearer = bearer.unwrap_or(HeaderValue::from_static(""));
            bearer.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, bearer);
        }
        let url = self.stored(bucket, path);
        let via = Via::Client(&self.client);
        let done = fetch(via, url.as_str(), &headers, to, limits, cancel, on_progress).await;
        done.map_err(|error| {
            if error.kind != Kind::Expired {
                return error;
            }
            let text = format!(
                "`{bucket}/{path}` is refused to this key; use the project's secret (service role) key"
            );
            net::Error::new(Kind::Refused(403), text)
        })
    }

    /// What the bucket takes.
    ///
    /// # Errors
    /// [`ServiceError`]; a key that may not read buckets is refused with 401, 403 or 404.
    pub async fn bucket_limits(&self, bucket: &str) -> Result<BucketLimits> {
        let url = at(&self.storage_url, ["storage", "v1", "bucket", bucket]);
        let request = self.request(Method::GET, url).timeout(TIMEOUT);
        let attempted = format!("reading bucket `{bucket}`");
        let response = self.send_again(request).await;
        let answer = self
            .json(response.map_err(|error| error.during(&attempted, ""))?)
            .await?;
        let types = answer.get("allowed_mime_types").and_then(Value::as_array);
        Ok(BucketLimits {
            file_size_limit: answer.get("file_size_limit").and_then(Value::as_u64),
            allowed_mime_types: types
                .into_iter()
                .flatten()
                .filter_map(|name| name.as_str().map(str::to_owned))
                .collect(),
        })
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn remove(&self, bucket: &str, path: &str) -> Result<()> {
        check_name(path)?;
        let url = self.object(bucket, path);
        let request = self.request(Method::DELETE, url).timeout(TIMEOUT);
        match self.send_again(request).await {
            Err(error) if error.status != 404 => {
                Err(error.during(&format!("removing `{bucket}/{path}`"), ""))
            }
            _ => Ok(()),
        }
    }

    /// Where an object is put and removed.
    fn object(&self, bucket: &str, path: &str) -> Url {
        let segments = ["storage", "v1", "object", bucket].into_iter();
        at(&self.storage_url, segments.chain(path.split('/')))
    }

    /// Where an object is read.
    fn stored(&self, bucket: &str, path: &str) -> Url {
        let segments = ["storage", "v1", "object", "authenticated", bucket].into_iter();
        at(&self.storage_url, segments.chain(path.split('/')))
    }
}

/// Asks for the object as it is now, not as a cache has it.
fn fresh(request: RequestBuilder) -> RequestBuilder {
    request.header(header::CACHE_CONTROL, "no-cache")
}

pub(super) fn upload_backoff(upload: &Upload) -> Backoff {
    Backoff::new(upload.backoff, Duration::from_secs(30))
}

/// Waits before the next attempt, or gives the error back if it will not pass or the time is over.
pub(super) async fn wait_or_give_up(
    error: ServiceError,
    backoff: &mut Backoff,
    deadline: Instant,
    bucket: &str,
    size: u64,
) -> Result<()> {
    let wait = backoff.next(error.retry_after);
    if error.retryable && Instant::now() + wait < deadline {
        tokio::time::sleep(wait).await;
        return Ok(());
    }
    let attempted = format!("uploading {size} bytes to bucket `{bucket}`");
    let advice = advice(error.status, bucket, size);
    Err(error.during(&attempted, &advice))
}

/// What to do about a status.
pub(super) fn advice(status: u16, bucket: &str, size: u64) -> String {
    match status {
        400 => "check the project's url, the key and the object's path".to_owned(),
        401 | 403 => {
            "the key is not accepted here; use the project's secret (service role) key".to_owned()
        }
        404 => format!("create the bucket `{bucket}`, or check the project's url"),
        413 => format!(
            "{size} bytes are over a limit: raise the project's global file size limit (Storage settings) and then the \
             file size limit of bucket `{bucket}`"
        ),
        415 => format!("add the media type to those that bucket `{bucket}` allows"),
        _ => String::new(),
    }
}

fn check_name(path: &str) -> Result<()> {
    let valid = path
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || NAME_CHARACTERS.contains(c));
    let whole = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if valid && whole {
        return Ok(());
    }
    Err(ServiceError::local(
        "InvalidKey",
        format!(
            "object name {path:?} has an empty or dotted part, or a character that storage does not take"
        ),
    ))
}

fn cancelled() -> ServiceError {
    ServiceError::local("Cancelled", "cancelled".to_owned())
}

fn silent() -> ServiceError {
    ServiceError::unexpected(format!("no byte came for {SILENCE:?}"))
}

pub(super) fn header_number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// SHA-256 of a file, read in small pieces.
pub(super) async fn file_sha256(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for good in ["adapters/a-b_c.tar.gz", "a b/(c)+d=e", "x"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\0b", "ä", "a%2e", "a\\b", "a#b",
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn advice_names_what_to_change() {
        assert!(advice(413, "b", 7).contains("global file size limit"));
        for status in [400, 401, 403, 404, 415] {
            assert!(!advice(status, "b", 7).is_empty());
        }
    }
}
