//! What the worker is told by its environment. `docs/worker.md` has the table.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::Secret;

/// RunPod's own variables: where the worker asks for jobs and answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunpodEnv {
    /// `RUNPOD_WEBHOOK_GET_JOB`: template of the address that gives jobs. Where it is absent there is no queue.
    pub get_job: Option<String>,
    /// `RUNPOD_WEBHOOK_POST_OUTPUT`: template of the address that takes progress and results.
    pub post_output: Option<String>,
    /// `RUNPOD_WEBHOOK_PING`: template of the address that takes heartbeats.
    pub ping: Option<String>,
    /// `RUNPOD_PING_INTERVAL`, in milliseconds; 10 s where it is absent.
    pub ping_interval: Duration,
    /// `RUNPOD_AI_API_KEY`, sent as it is.
    pub key: Secret,
    /// `RUNPOD_POD_ID`: this worker's id.
    pub pod_id: Option<String>,
    /// `RUNPOD_GPU_TYPE_ID`, for templates that name it.
    pub gpu_type_id: Option<String>,
    /// `RUNPOD_ENDPOINT_ID`; where it is there, logs are JSON.
    pub endpoint_id: Option<String>,
    /// `RUNPOD_LOG_LEVEL`, else `RUNPOD_DEBUG_LEVEL`.
    pub log_level: Option<String>,
    /// `RUNPOD_SKIP_AUTO_SYSTEM_CHECKS`, `true`: no checks before the first job.
    pub skip_checks: bool,
}

/// Waits before the tries of the last callback, in seconds.
const CALLBACK_WAITS: [u64; 6] = [0, 5, 30, 120, 300, 300];

/// What the worker's operator sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerEnv {
    /// RunPod's own.
    pub runpod: RunpodEnv,
    /// `SUPABASE_URL`.
    pub supabase_url: Option<String>,
    /// `SUPABASE_SERVICE_ROLE_KEY`.
    pub supabase_key: Secret,
    /// `SUPABASE_STORAGE_URL`: storage elsewhere than the project's own host.
    pub storage_url: Option<String>,
    /// `BRIGHTRUN_BUCKET`: where adapters go; `lora-models` where it is absent.
    pub bucket: String,
    /// `MODEL_PATH`: directory of the base model, tried first.
    pub model_path: Option<PathBuf>,
    /// `BRIGHTRUN_VOLUMES`, separated by `:`: where models and state may lie; `/runpod-volume`, `/workspace`, `/models`.
    pub volumes: Option<Vec<PathBuf>>,
    /// `BRIGHTRUN_ALLOW_DOWNLOAD`: base models that are nowhere are downloaded.
    pub allow_download: bool,
    /// `HF_TOKEN`: for models that the hub does not give to everyone.
    pub hub_token: Secret,
    /// `HF_ENDPOINT`: another hub than `https://huggingface.co`.
    pub hub_url: Option<String>,
    /// `BRIGHTRUN_STATE_DIR`: runs, results, outbox, leases.
    pub state_dir: Option<PathBuf>,
    /// `BRIGHTRUN_WEBHOOK_SECRET`: callbacks are signed with it.
    pub webhook_secret: Secret,
    /// `BRIGHTRUN_CALLBACK_HOSTS`, separated by `,`: the only hosts, beside the project's own, that jobs may name for callbacks; any
    /// public one where it is absent.
    pub callback_hosts: Option<Vec<String>>,
    /// `BRIGHTRUN_CALLBACK_AUTH`: value of `Authorization` of callbacks.
    pub callback_auth: Secret,
    /// `BRIGHTRUN_ALLOW_PRIVATE_URLS`, `1`: jobs may name http and private addresses. For tests.
    pub allow_private_urls: bool,
    /// `BRIGHTRUN_DEVICE`: where to train; `auto` where it is absent.
    pub device: Option<String>,
    /// `BRIGHTRUN_MAX_DATASET_BYTES`; 5 GiB where it is absent.
    pub max_dataset_bytes: u64,
    /// `BRIGHTRUN_MAX_ATTEMPTS`: times a job is begun without getting further; 5 where it is absent.
    pub max_attempts: u32,
    /// `BRIGHTRUN_KEEP_DAYS`: days after which what is left of a job is removed; 7 where it is absent.
    pub keep: Duration,
    /// `BRIGHTRUN_REPORT_S`: seconds between reports of progress; 5 where it is absent.
    pub report: Duration,
    /// `BRIGHTRUN_LEASE_S`: seconds after which a worker that does not renew its hold on a job has lost it; 60 where absent.
    pub lease: Duration,
    /// `BRIGHTRUN_RETRY_S`: seconds that a delivery is tried for; 900 where it is absent.
    pub retry: Duration,
    /// `BRIGHTRUN_CALLBACK_WAITS_S`, separated by `,`: seconds before each try of the last callback,
    /// and of all that could not be delivered; 0,5,30,120,300,300, then an hour.
    pub callback_waits: Vec<Duration>,
    /// `BRIGHTRUN_WATCHDOG_S`: seconds without a sign of the trainer after which it hangs; 1800 where it is absent.
    pub watchdog: Duration,
    /// `BRIGHTRUN_DRAIN_S`: seconds that a run goes on after SIGTERM; until it is killed where it is absent.
    pub drain: Option<Duration>,
}

impl WorkerEnv {
    /// Reads it through `get`, which gives what is there and not empty.
    pub(super) fn read(get: impl Fn(&str) -> Option<String>) -> Self {
        let secret = |name: &str| get(name).map(|value| Secret::new(&value));
        let secret = |name: &str| secret(name).unwrap_or_default();
        let flag = |name: &str| get(name).is_some_and(|value| is_true(&value));
        let number = |name: &str| get(name).and_then(|value| value.trim().parse::<f64>().ok());
        let span = |name: &str| number(name).and_then(|s| Duration::try_from_secs_f64(s).ok());
        let seconds = |name: &str, s: u64| span(name).unwrap_or(Duration::from_secs(s));
        let interval = number("RUNPOD_PING_INTERVAL").map(|ms| ms / 1e3);
        let interval = interval.and_then(|s| Duration::try_from_secs_f64(s).ok());
        let integer = |name: &str| get(name).and_then(|value| value.trim().parse::<u64>().ok());
        Self {
            runpod: RunpodEnv {
                get_job: get("RUNPOD_WEBHOOK_GET_JOB"),
                post_output: get("RUNPOD_WEBHOOK_POST_OUTPUT"),
                ping: get("RUNPOD_WEBHOOK_PING"),
                ping_interval: interval
                    .filter(|interval| !interval.is_zero())
                    .unwrap_or(Duration::from_secs(10)),
                key: secret("RUNPOD_AI_API_KEY"),
                pod_id: get("RUNPOD_POD_ID"),
                gpu_type_id: get("RUNPOD_GPU_TYPE_ID"),
                endpoint_id: get("RUNPOD_ENDPOINT_ID"),
                log_level: get("RUNPOD_LOG_LEVEL").or_else(|| get("RUNPOD_DEBUG_LEVEL")),
                skip_checks: flag("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"),
            },
            supabase_url: get("SUPABASE_URL"),
            supabase_key: secret("SUPABASE_SERVICE_ROLE_KEY"),
            storage_url: get("SUPABASE_STORAGE_URL"),
            bucket: get("BRIGHTRUN_BUCKET").unwrap_or_else(|| "lora-models".to_owned()),
            model_path: get("MODEL_PATH").map(PathBuf::from),
            volumes: get("BRIGHTRUN_VOLUMES")
                .map(|list| list.split(':').map(PathBuf::from).collect()),
            allow_download: flag("BRIGHTRUN_ALLOW_DOWNLOAD"),
            hub_token: secret("HF_TOKEN"),
            hub_url: get("HF_ENDPOINT"),
            state_dir: get("BRIGHTRUN_STATE_DIR").map(PathBuf::from),
            webhook_secret: secret("BRIGHTRUN_WEBHOOK_SECRET"),
            callback_hosts: get("BRIGHTRUN_CALLBACK_HOSTS").map(|list| {
                list.split(',')
                    .map(|host| host.trim().to_lowercase())
                    .collect()
            }),
            callback_auth: secret("BRIGHTRUN_CALLBACK_AUTH"),
            allow_private_urls: flag("BRIGHTRUN_ALLOW_PRIVATE_URLS"),
            device: get("BRIGHTRUN_DEVICE"),
            max_dataset_bytes: integer("BRIGHTRUN_MAX_DATASET_BYTES").unwrap_or(5 << 30),
            max_attempts: integer("BRIGHTRUN_MAX_ATTEMPTS")
                .and_then(|count| u32::try_from(count).ok())
                .unwrap_or(5),
            keep: number("BRIGHTRUN_KEEP_DAYS")
                .and_then(|days| Duration::try_from_secs_f64(86_400.0 * days).ok())
                .unwrap_or(Duration::from_hours(7 * 24)),
            report: seconds("BRIGHTRUN_REPORT_S", 5),
            lease: seconds("BRIGHTRUN_LEASE_S", 60),
            retry: seconds("BRIGHTRUN_RETRY_S", 900),
            callback_waits: get("BRIGHTRUN_CALLBACK_WAITS_S")
                .and_then(|list| spans(&list))
                .unwrap_or_else(|| CALLBACK_WAITS.map(Duration::from_secs).to_vec()),
            watchdog: seconds("BRIGHTRUN_WATCHDOG_S", 1800),
            drain: span("BRIGHTRUN_DRAIN_S"),
        }
    }
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on"
    )
}

/// `0,0.5,30` as spans of time.
fn spans(list: &str) -> Option<Vec<Duration>> {
    let one = |text: &str| Duration::try_from_secs_f64(text.trim().parse().ok()?).ok();
    list.split(',').map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callback_that_is_away_for_ten_minutes_hears_the_end() {
        let waits = WorkerEnv::read(|_| None).callback_waits;
        let mut at = Duration::ZERO;
        let tries: Vec<u64> = waits
            .iter()
            .map(|wait| {
                at += *wait;
                at.as_secs()
            })
            .collect();
        assert_eq!(tries, [0, 5, 35, 155, 455, 755]);
        let within = |minutes: u64| tries.iter().filter(|at| **at <= 60 * minutes).count();
        assert_eq!((within(10), within(15)), (5, 6));
    }

    #[test]
    fn waits_are_what_is_written_or_the_usual_ones() {
        let waits = |text: &str| WorkerEnv::read(|_| Some(text.to_owned())).callback_waits;
        assert_eq!(
            waits("0, 0.5"),
            [Duration::ZERO, Duration::from_millis(500)]
        );
        assert_eq!(waits("0,soon").len(), CALLBACK_WAITS.len());
        assert_eq!(waits("-1").len(), CALLBACK_WAITS.len());
    }
}
