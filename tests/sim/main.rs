//! The simulator itself: what it answers, what it counts, what it refuses, and how its faults look from outside.

#![cfg(feature = "worker")]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that cannot go on fails its test"
)]

mod binary;
mod faults;
mod platform;
mod rows;
mod storage;
mod wire;

#[path = "../common/wire.rs"]
mod log;

use std::time::Duration;

use brightrun::http::client_builder;
use brightrun::sim::{Settings, Sim};
use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;

/// A simulator whose long polls and time limits are short.
fn settings() -> Settings {
    Settings {
        take_hold: Duration::from_millis(200),
        stop_hold: Duration::from_millis(200),
        ping_interval: Duration::from_millis(100),
        lost_after_pings: 4,
        webhook_retry_wait: Duration::from_millis(50),
        ..Settings::default()
    }
}

/// A blocking client with the keys of the default settings.
struct Http {
    runtime: tokio::runtime::Runtime,
    client: Client,
    base: String,
}

#[derive(Debug)]
struct Reply {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

impl Http {
    fn new(sim: &Sim) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = client_builder()
            .timeout(Duration::from_secs(5))
            .build()
            .unwrap();
        Self {
            runtime,
            client,
            base: sim.url().to_owned(),
        }
    }

    fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        self.client.request(method, format!("{}{path}", self.base))
    }

    /// A request of the worker with id `pod1`.
    fn worker(&self, method: &str, path: &str) -> RequestBuilder {
        self.request(method, &format!("/v2/ep1/{path}"))
            .header("Authorization", "worker-key")
    }

    fn customer(&self, method: &str, path: &str) -> RequestBuilder {
        self.request(method, &format!("/v2/ep1/{path}"))
            .bearer_auth("client-key")
    }

    fn supabase(&self, method: &str, path: &str) -> RequestBuilder {
        self.request(method, path)
            .header("apikey", "service-key")
            .bearer_auth("service-key")
    }

    fn try_send(&self, request: RequestBuilder) -> reqwest::Result<Reply> {
        self.runtime.block_on(async {
            let response = request.send().await?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Ok(Reply {
                status,
                headers,
                body: response.bytes().await?.to_vec(),
            })
        })
    }

    fn send(&self, request: RequestBuilder) -> Reply {
        self.try_send(request).unwrap()
    }

    /// Takes the next job; its id.
    fn take(&self, worker: &str) -> String {
        let reply = self.send(self.worker(
            "GET",
            &format!("job-take/{worker}?gpu=a+b&job_in_progress=0"),
        ));
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["id"].as_str().unwrap().to_owned()
    }

    /// Posts to job-done as the SDK does; the status.
    fn done(&self, worker: &str, id: &str, body: &Value) -> u16 {
        self.send(self.done_request(worker, id, body)).status
    }

    fn done_request(&self, worker: &str, id: &str, body: &Value) -> RequestBuilder {
        self.worker(
            "POST",
            &format!("job-done/{worker}/{id}?gpu=a+b&isStream=false"),
        )
        .header("Content-Type", "application/x-www-form-urlencoded")
        .header("X-Request-ID", id)
        .body(body.to_string())
    }

    fn ping(&self, worker: &str, ids: &str) {
        let list = if ids.is_empty() {
            String::new()
        } else {
            format!("&job_id={ids}")
        };
        let reply = self.send(self.worker(
            "GET",
            &format!("ping/{worker}?gpu=a+b{list}&runpod_version=0"),
        ));
        assert_eq!(reply.status, 200);
    }
}
