//! The heartbeat: a thread of its own, so that nothing a job does keeps it from beating.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::log::Log;
use super::net::error::cause;
use super::platform::{expand, with_query};
use crate::config::RunpodEnv;
use crate::http::client_builder;

/// Waits before a ping is sent again; then the next one is due.
const RETRIES: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_secs(2),
    Duration::from_secs(4),
];
const VERSION: &str = concat!("runpod_version=brightrun/", env!("CARGO_PKG_VERSION"));

/// Ids of the jobs this worker is at. Clones are the same list.
#[derive(Debug, Clone, Default)]
pub struct InProgress(Arc<Mutex<Vec<String>>>);

impl InProgress {
    /// Adds a job.
    pub fn add(&self, id: &str) {
        self.lock().push(id.to_owned());
    }

    /// Takes a job off.
    pub fn remove(&self, id: &str) {
        self.lock().retain(|own| own != id);
    }

    /// The jobs.
    pub fn ids(&self) -> Vec<String> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins to ping, at once and then every interval, for as long as the process lives.
pub fn start(env: &RunpodEnv, worker_id: &str, jobs: &InProgress, log: &Log) {
    let Some(template) = &env.ping else {
        log.error("RUNPOD_WEBHOOK_PING is not set: the platform will take this worker for lost");
        return;
    };
    if env.key.is_empty() {
        log.warn("RUNPOD_AI_API_KEY is empty: the platform answers as if there were no work");
    }
    let url = expand(template, worker_id, env);
    let (key, interval) = (env.key.clone(), env.ping_interval);
    let (jobs, log) = (jobs.clone(), log.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let (Ok(runtime), Ok(client)) = (runtime, client_builder().build()) else {
            log.error("the heartbeat could not be started");
            return;
        };
        runtime.block_on(async {
            loop {
                let ids = jobs.ids().join("%2C");
                let url = match ids.as_str() {
                    "" => url.clone(),
                    ids => with_query(&url, &format!("job_id={ids}")),
                };
                let url = with_query(&url, VERSION);
                for wait in RETRIES {
                    tokio::time::sleep(wait).await;
                    let request = client.get(&url).header("Authorization", key.expose());
                    match request.timeout(2 * interval).send().await {
                        Ok(response) if response.status().is_success() => break,
                        Ok(response) => {
                            log.debug(&format!("ping was answered {}", response.status().as_u16()));
                            if !matches!(response.status().as_u16(), 429 | 500..=599) {
                                break;
                            }
                        }
                        Err(error) => log.debug(&format!("ping: {}", cause(error))),
                    }
                }
                tokio::time::sleep(interval).await;
            }
        });
    });
}

/// Tells the platform that this worker cannot work, once.
pub async fn unhealthy(env: &RunpodEnv, worker_id: &str, check: &str, reason: &str) {
    let (Some(template), Ok(client)) = (&env.ping, client_builder().build()) else {
        return;
    };
    let reason: String = reason.chars().take(256).collect();
    let encode =
        |text: &str| -> String { url::form_urlencoded::byte_serialize(text.as_bytes()).collect() };
    let (check, reason) = (encode(check), encode(&reason));
    let url = expand(template, worker_id, env);
    let url = with_query(
        &url,
        &format!("status=unhealthy&check={check}&reason={reason}&{VERSION}"),
    );
    let request = client.get(url).header("Authorization", env.key.expose());
    let _ = request.timeout(Duration::from_secs(2)).send().await;
}
