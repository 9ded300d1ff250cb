//! The one way to make an HTTP client.

use std::time::Duration;

use reqwest::{Client, ClientBuilder, redirect};

/// The settings that all clients share: no redirects, no proxies of the environment, no cookies, no decompression;
/// connections that a sleeping peer may have dropped are not reused.
pub fn client_builder() -> ClientBuilder {
    // The first call decides for the process; a later one fails, and need not do more.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .redirect(redirect::Policy::none())
        .no_proxy()
        .no_gzip()
        .no_brotli()
        .no_zstd()
        .no_deflate()
        .referer(false)
        .connect_timeout(Duration::from_secs(15))
        .pool_idle_timeout(Duration::from_secs(15))
        .tcp_keepalive(Duration::from_secs(30))
        // One large body at a time: HTTP/2 would add a second flow control (measured 10 times slower to a server with
        // small windows) and share one connection, dead ones too.
        .http1_only()
        .user_agent(concat!("brightrun/", env!("CARGO_PKG_VERSION")))
}
