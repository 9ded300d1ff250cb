//! Where a request that a job asks for may go.
//!
//! A job's URLs come from outside. Under [`Policy::Public`] only https to global addresses passes: the host is resolved
//! once, here, every address is checked, and the client is pinned to what was checked, so that a second answer of the
//! name server changes nothing. Redirects are followed by hand, each with all checks again.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{self, HeaderMap};
use reqwest::{Client, Response, StatusCode};
use url::{Host, Url};

use super::address::{is_global, is_private};
use super::error::{Error, Kind, Result, shown};
use crate::http::client_builder;
use crate::worker::job::MAX_URL_LEN;

/// Redirects followed for one request.
const REDIRECTS: usize = 3;
/// Clients kept for reuse; each holds the root certificates.
const CLIENTS: usize = 4;
/// Time for a name to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Headers that follow a redirect to another origin; whatever else the caller sent is not for strangers.
const HEADERS_FOR_STRANGERS: [header::HeaderName; 4] = [
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::RANGE,
    header::IF_RANGE,
];

/// What addresses a job may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// https on port 443 or 8443, global addresses.
    Public,
    /// For tests and closed networks: http too, any port, private and loopback addresses. Link-local addresses (cloud
    /// metadata) stay closed.
    AllowPrivate,
}

/// A running look-up of a host's addresses.
pub type Lookup<'a> = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;

/// Turns a host name into addresses. A test brings its own.
pub trait Resolve: Send + Sync {
    /// All addresses of `host`.
    fn resolve<'a>(&'a self, host: &'a str) -> Lookup<'a>;
}

/// The operating system's resolver.
#[derive(Debug, Clone, Copy)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> Lookup<'a> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((host, 0)).await?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

/// Sends a job's requests, to where they may go. Clones share connections.
#[derive(Clone)]
pub struct Guard {
    policy: Policy,
    resolver: Arc<dyn Resolve>,
    clients: Arc<Mutex<HashMap<String, Pinned>>>,
}

/// A client that reaches one host at checked addresses only.
struct Pinned {
    addresses: Vec<IpAddr>,
    client: Client,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl Guard {
    /// Resolves by the operating system.
    pub fn new(policy: Policy) -> Self {
        Self::with_resolver(policy, Arc::new(SystemResolver))
    }

    /// Resolves by `resolver`.
    pub fn with_resolver(policy: Policy, resolver: Arc<dyn Resolve>) -> Self {
        Self {
            policy,
            resolver,
            clients: Arc::default(),
        }
    }

    /// Parses `url` and checks all that can be checked without the network.
    ///
    /// # Errors
    /// [`Kind::Blocked`], naming the rule.
    pub fn check(&self, url: &str) -> Result<Url> {
        if url.len() > MAX_URL_LEN {
            let found = url.len();
            return Err(blocked(format!(
                "url of {found} bytes, at most {MAX_URL_LEN} are taken"
            )));
        }
        check_characters(url)?;
        let url =
            Url::parse(url).map_err(|error| blocked(format!("url cannot be parsed: {error}")))?;
        self.check_parsed(&url)?;
        Ok(url)
    }

    fn check_parsed(&self, url: &Url) -> Result<()> {
        let public = self.policy == Policy::Public;
        match url.scheme() {
            "https" => {}
            "http" if !public => {}
            scheme => {
                return Err(blocked(format!(
                    "url has scheme `{scheme}`, expected `https`"
                )));
            }
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(blocked(
                "url carries a user or password; send them in a header",
            ));
        }
        let port = url.port_or_known_default().unwrap_or(0);
        if public && port != 443 && port != 8443 {
            return Err(blocked(format!(
                "url has port {port}, expected 443 or 8443"
            )));
        }
        match url.host() {
            None => Err(blocked("url has no host")),
            Some(Host::Domain("")) => Err(blocked("url has an empty host")),
            Some(Host::Domain(_)) => Ok(()),
            Some(Host::Ipv4(address)) => self.check_address(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => self.check_address(IpAddr::V6(address)),
        }
    }

    fn check_address(&self, address: IpAddr) -> Result<()> {
        let allowed = match self.policy {
            Policy::Public => is_global(address),
            Policy::AllowPrivate => is_global(address) || is_private(address),
        };
        if allowed {
            return Ok(());
        }
        Err(blocked(format!(
            "address {address} is not a public one; a job may only name public hosts"
        )))
    }

    /// A client pinned to the checked addresses of `url`'s host. Ask anew before each request: the check belongs to it.
    ///
    /// # Errors
    /// [`Kind::Blocked`] if the URL or any one of the addresses is not allowed; [`Kind::Transient`] if the name does not
    /// resolve.
    pub async fn client_for(&self, url: &Url) -> Result<Client> {
        self.check_parsed(url)?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let addresses = match url.host() {
            Some(Host::Domain(name)) => self.resolve(name).await?,
            Some(Host::Ipv4(_) | Host::Ipv6(_)) | None => Vec::new(),
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pinned) = clients.get(&host)
            && pinned.addresses == addresses
        {
            return Ok(pinned.client.clone());
        }
        let sockets: Vec<SocketAddr> = addresses.iter().map(|ip| SocketAddr::new(*ip, 0)).collect();
        let client = client_builder()
            .https_only(self.policy == Policy::Public)
            .dns_resolver(NoLookup)
            .resolve_to_addrs(&host, &sockets)
            .build()
            .map_err(|error| Error::of_request(url, error))?;
        if clients.len() >= CLIENTS {
            clients.clear();
        }
        let pinned = Pinned {
            addresses,
            client: client.clone(),
        };
        clients.insert(host, pinned);
        Ok(client)
    }

    /// The checked addresses of `name`, in order.
    async fn resolve(&self, name: &str) -> Result<Vec<IpAddr>> {
        let found = tokio::time::timeout(RESOLVE_TIMEOUT, self.resolver.resolve(name)).await;
        let mut addresses = match found {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => {
                return Err(Error::new(
                    Kind::Transient,
                    format!("host {name} does not resolve: {error}"),
                ));
            }
            Err(_) => {
                return Err(Error::new(
                    Kind::Transient,
                    format!("host {name} did not resolve in time"),
                ));
            }
        };
        if addresses.is_empty() {
            return Err(Error::new(
                Kind::Transient,
                format!("host {name} has no address"),
            ));
        }
        for address in &addresses {
            self.check_address(*address)
                .map_err(|error| blocked(format!("host {name}: {error}")))?;
        }
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    /// GET, through up to three redirects. `timeout` bounds each hop up to its answer's head.
    ///
    /// # Errors
    /// Those of [`Guard::client_for`]; [`Kind::Transient`] if the request fails on its way. Any status but a redirect
    /// is an answer.
    pub async fn get(&self, url: &Url, headers: &HeaderMap, timeout: Duration) -> Result<Response> {
        let mut url = url.clone();
        let mut headers = headers.clone();
        for _ in 0..=REDIRECTS {
            let client = self.client_for(&url).await?;
            let response = get_once(&client, &url, &headers, timeout).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let next = self.redirect_target(&url, &response)?;
            if next.origin() != url.origin() {
                headers = for_strangers(&headers);
            }
            url = next;
        }
        Err(blocked(format!(
            "{} redirects more than {REDIRECTS} times",
            shown(&url)
        )))
    }

    fn redirect_target(&self, from: &Url, response: &Response) -> Result<Url> {
        let location = response
            .headers()
            .get(header::LOCATION)
            .and_then(|value| value.to_str().ok())
            .ok_or_else(|| blocked(format!("{} redirects to no place", shown(from))))?;
        check_characters(location)?;
        let target = from
            .join(location)
            .map_err(|error| blocked(format!("{} redirects to: {error}", shown(from))))?;
        self.check(target.as_str())
            .map_err(|error| blocked(format!("redirect of {}: {error}", shown(from))))
    }
}

/// One GET, without redirects; `timeout` bounds it up to the answer's head.
pub(crate) async fn get_once(
    client: &Client,
    url: &Url,
    headers: &HeaderMap,
    timeout: Duration,
) -> Result<Response> {
    let sent = client.get(url.clone()).headers(headers.clone()).send();
    match tokio::time::timeout(timeout, sent).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(Error::of_request(url, error)),
        Err(_) => Err(Error::new(
            Kind::Transient,
            format!("no answer from {} within {timeout:?}", shown(url)),
        )),
    }
}

/// Stands behind the pinned addresses: any other name is a defect, and goes nowhere.
struct NoLookup;

impl reqwest::dns::Resolve for NoLookup {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let reason = format!("host {} was not checked", name.as_str());
        Box::pin(async move { Err(reason.into()) })
    }
}

fn for_strangers(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in HEADERS_FOR_STRANGERS {
        if let Some(value) = headers.get(&name) {
            kept.insert(name, value.clone());
        }
    }
    kept
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Parsers disagree on these; ours would repair them in silence.
fn check_characters(url: &str) -> Result<()> {
    if url.contains(|c: char| c.is_control() || c.is_whitespace() || c == '\\') {
        return Err(blocked(
            "url with white space, a control character or a backslash; percent-encode them",
        ));
    }
    Ok(())
}

fn blocked(message: impl AsRef<str>) -> Error {
    Error::new(Kind::Blocked, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_get_no_credentials() {
        let mut headers = HeaderMap::new();
        for name in ["authorization", "cookie", "apikey", "range", "x-any"] {
            headers.insert(name, "v".parse().unwrap());
        }
        let kept = for_strangers(&headers);
        assert_eq!(kept.len(), 1);
        assert!(kept.contains_key("range"));
    }
}
