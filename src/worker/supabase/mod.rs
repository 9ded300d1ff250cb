//! The application's database and storage: rows, objects, resumable uploads.
//!
//! The hosts are the operator's, not a job's: they are not guarded, and the key goes to them alone.

mod error;
mod rows;
mod storage;
mod tus;

use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::{Client, Method, RequestBuilder, Response};
use url::{Host, Url};

pub use error::ServiceError;
pub use rows::{Filter, Row};
pub use storage::{BucketLimits, Upload};

use crate::http::client_builder;
use crate::worker::net::address::is_global;
use crate::worker::secret::{Redactor, Secret};

/// Result with [`ServiceError`].
pub type Result<T, E = ServiceError> = std::result::Result<T, E>;

/// Time for a request that carries no file.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes read of an answer that is no file.
const ANSWER_BYTES: usize = 8 << 20;

/// A project: where it is, and the key to it. Clones share connections.
#[derive(Debug, Clone)]
pub struct Supabase {
    client: Client,
    /// The project, `https://<ref>.supabase.co/`.
    url: Url,
    /// Where objects go: the direct storage host, which takes large files.
    storage_url: Url,
    key: Secret,
    redactor: Redactor,
}

impl Supabase {
    /// The project at `url`, with the direct storage host of a hosted project (`https://<ref>.storage.supabase.co`).
    ///
    /// # Errors
    /// A code of `InvalidSettings` if the URL is none of http or https, or the key cannot be sent.
    pub fn new(url: &str, key: Secret) -> Result<Self> {
        let url = project_url(url)?;
        if HeaderValue::from_str(key.expose()).is_err() || key.is_empty() {
            return Err(ServiceError::settings(
                "the storage key is empty or has characters that no header may have",
            ));
        }
        let client = client_builder()
            .build()
            .map_err(|error| ServiceError::of_request(error, &Redactor::default()))?;
        Ok(Self {
            client,
            storage_url: direct_storage(&url).unwrap_or_else(|| url.clone()),
            url,
            redactor: Redactor::new([key.clone()]),
            key,
        })
    }

    /// Sends objects to `url` instead.
    ///
    /// # Errors
    /// A code of `InvalidSettings`, as for [`Supabase::new`].
    pub fn with_storage_url(mut self, url: &str) -> Result<Self> {
        self.storage_url = project_url(url)?;
        Ok(self)
    }

    /// The project's address.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Where objects go.
    pub fn storage_url(&self) -> &Url {
        &self.storage_url
    }

    /// Whether `url` is on this project's own hosts.
    pub fn owns(&self, url: &Url) -> bool {
        let direct = direct_storage(&self.url);
        let own = [Some(&self.url), Some(&self.storage_url), direct.as_ref()];
        own.into_iter()
            .flatten()
            .any(|own| own.origin() == url.origin())
    }

    /// A request with the key. Keys of the new kind (`sb_secret_`) are no web tokens: as a bearer they would be refused.
    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        let request = self
            .client
            .request(method, url)
            .header("apikey", self.key_value());
        if self.key.expose().starts_with("sb_secret_") {
            return request;
        }
        request.bearer_auth(self.key.expose())
    }

    fn key_value(&self) -> HeaderValue {
        let mut value =
            HeaderValue::from_str(self.key.expose()).unwrap_or(HeaderValue::from_static(""));
        value.set_sensitive(true);
        value
    }

    /// Sends, and turns any status but success into an error.
    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let response = request
            .send()
            .await
            .map_err(|error| ServiceError::of_request(error, &self.redactor))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(ServiceError::of_response(response, &self.redactor).await)
    }

    /// As [`Supabase::send`], for a request that may be sent twice: once more if a kept connection turned out dead.
    async fn send_again(&self, request: RequestBuilder) -> Result<Response> {
        let again = request.try_clone();
        match (self.send(request).await, again) {
            (Err(error), Some(again)) if error.connection_died => self.send(again).await,
            (answer, _) => answer,
        }
    }

    /// The answer's JSON, at most 8 MiB of it.
    async fn json(&self, mut response: Response) -> Result<serde_json::Value> {
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| ServiceError::of_request(error, &self.redactor))?
        {
            if body.len() + chunk.len() > ANSWER_BYTES {
                return Err(ServiceError::unexpected(format!(
                    "answer of over {ANSWER_BYTES} bytes; ask for fewer rows"
                )));
            }
            body.extend_from_slice(&chunk);
        }
        if body.is_empty() {
            return Ok(serde_json::Value::Null);
        }
        serde_json::from_slice(&body)
            .map_err(|error| ServiceError::unexpected(format!("answer is no JSON: {error}")))
    }
}

fn project_url(url: &str) -> Result<Url> {
    let parsed = Url::parse(url.trim()).map_err(|error| {
        ServiceError::settings(&format!("project url cannot be parsed: {error}"))
    })?;
    if !matches!(parsed.scheme(), "https" | "http") || parsed.host_str().is_none() {
        return Err(ServiceError::settings(
            "project url has to be `https://<ref>.supabase.co` or another http(s) address",
        ));
    }
    if parsed.scheme() == "http" && !is_near(&parsed) {
        return Err(ServiceError::settings(
            "project url is http, over which anybody on the way could read the service key; give its https address",
        ));
    }
    if !parsed.username().is_empty() || parsed.password().is_some() || parsed.query().is_some() {
        return Err(ServiceError::settings(
            "project url has a user or a query; give the address alone",
        ));
    }
    Ok(parsed)
}

/// Whether a host is on this machine or in its own network: what is hosted there may have no certificate.
fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(v4)) => !is_global(v4.into()),
        Some(Host::Ipv6(v6)) => !is_global(v6.into()),
        Some(Host::Domain(name)) => {
            let own = [".localhost", ".local", ".internal"];
            !name.contains('.') || own.iter().any(|end| name.ends_with(end))
        }
        None => false,
    }
}

/// `https://<ref>.storage.supabase.co` for `https://<ref>.supabase.co`.
fn direct_storage(url: &Url) -> Option<Url> {
    let reference = url.host_str()?.strip_suffix(".supabase.co")?;
    if url.scheme() != "https" || url.port().is_some() || reference.contains('.') {
        return None;
    }
    Url::parse(&format!("https://{reference}.storage.supabase.co/")).ok()
}

/// `base` with path segments added, percent-encoded.
fn at<'a>(base: &Url, segments: impl IntoIterator<Item = &'a str>) -> Url {
    let mut url = base.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(segments);
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosted_projects_have_a_storage_host() {
        let cases = [
            (
                "https://abcd.supabase.co",
                "https://abcd.storage.supabase.co/",
            ),
            (
                "https://abcd.supabase.co/",
                "https://abcd.storage.supabase.co/",
            ),
            (
                "https://abcd.storage.supabase.co",
                "https://abcd.storage.supabase.co/",
            ),
            ("http://127.0.0.1:8090", "http://127.0.0.1:8090/"),
            ("https://db.example.com/sub", "https://db.example.com/sub"),
        ];
        for (url, storage) in cases {
            let project = Supabase::new(url, Secret::new("key")).unwrap();
            assert_eq!(project.storage_url().as_str(), storage);
        }
        for bad in [
            "",
            "abcd.supabase.co",
            "ftp://h",
            "https://u:p@h",
            "https://h?x=1",
            "http://abcd.supabase.co",
            "http://8.8.8.8:8000",
        ] {
            assert!(Supabase::new(bad, Secret::new("key")).is_err(), "{bad}");
        }
        for near in [
            "http://kong:8000",
            "http://10.0.0.7",
            "http://db.internal",
            "http://[::1]:1",
        ] {
            assert!(Supabase::new(near, Secret::new("key")).is_ok(), "{near}");
        }
        assert!(Supabase::new("https://h", Secret::new("")).is_err());
        assert!(Supabase::new("https://h", Secret::new("a\nb")).is_err());
    }

    #[test]
    fn paths_are_encoded() {
        let base = Url::parse("https://h/sub/").unwrap();
        let url = at(&base, ["rest", "v1", "a b/c?d"]);
        assert_eq!(url.as_str(), "https://h/sub/rest/v1/a%20b%2Fc%3Fd");
    }
}
