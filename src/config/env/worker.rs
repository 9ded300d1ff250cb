//! What the worker is told by its environment. `docs/worker.md` has the table.

use std::cell::RefCell;
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
    /// `RUNPOD_VOLUME_ID`: there is a network volume.
    pub volume_id: Option<String>,
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
    /// Values that are none of their kind: what was found and what was expected. A worker does not begin with one.
    pub problems: Vec<String>,
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
        let problems = RefCell::new(Vec::new());
        let parsed = |name: &str, expected: &str, parse: &dyn Fn(&str) -> Option<f64>| {
            let value = get(name)?;
            let found = parse(value.trim());
            if found.is_none() {
                let text = format!("{name} is `{value}`, expected {expected}");
                problems.borrow_mut().push(text);
            }
            found
        };
        let number = |name: &str, expected: &str, least: f64| {
            let valid = |number: &f64| number.is_finite() && *number >= least;
            parsed(name, expected, &|text| text.parse().ok().filter(valid))
        };
        let span = |name: &str, least: f64| {
            let expected = format!("a number of seconds, at least {least}");
            let seconds = number(name, &expected, least)?;
            Duration::try_from_secs_f64(seconds).ok()
        };
        let seconds =
            |name: &str, least: f64, s: u64| span(name, least).unwrap_or(Duration::from_secs(s));
        let interval = number("RUNPOD_PING_INTERVAL", "a number of milliseconds", 0.0);
        let interval = interval.and_then(|ms| Duration::try_from_secs_f64(ms / 1e3).ok());
        let integer = |name: &str, usual: u64| {
            let read = |text: &str| text.parse::<u64>().ok().map(|number| number as f64);
            parsed(name, "a whole number", &read)
                .and_then(|_| get(name)?.trim().parse().ok())
                .unwrap_or(usual)
        };
        let read = Self {
            problems: Vec::new(),
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
                volume_id: get("RUNPOD_VOLUME_ID"),
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
            max_dataset_bytes: integer("BRIGHTRUN_MAX_DATASET_BYTES", 5 << 30),
            max_attempts: u32::try_from(integer("BRIGHTRUN_MAX_ATTEMPTS", 5)).unwrap_or(u32::MAX),
            keep: number("BRIGHTRUN_KEEP_DAYS", "a number of days", 0.0)
                .and_then(|days| Duration::try_from_secs_f64(86_400.0 * days).ok())
                .unwrap_or(Duration::from_hours(7 * 24)),
            report: seconds("BRIGHTRUN_REPORT_S", 0.1, 5),
            lease: seconds("BRIGHTRUN_LEASE_S", 1.0, 60),
            retry: seconds("BRIGHTRUN_RETRY_S", 0.0, 900),
            callback_waits: callback_waits(get("BRIGHTRUN_CALLBACK_WAITS_S"), &problems),
            watchdog: seconds("BRIGHTRUN_WATCHDOG_S", 1.0, 1800),
            drain: span("BRIGHTRUN_DRAIN_S", 0.0),
        };
        Self {
            problems: problems.into_inner(),
            ..read
        }
    }
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_ascii_lowercase().as_str(),
        "1" | "true" | "yes" | "on"
    )
}

fn callback_waits(list: Option<String>, problems: &RefCell<Vec<String>>) -> Vec<Duration> {
    let usual = || CALLBACK_WAITS.map(Duration::from_secs).to_vec();
    let Some(list) = list else {
        return usual();
    };
    spans(&list).unwrap_or_else(|| {
        let text = format!(
            "BRIGHTRUN_CALLBACK_WAITS_S is `{list}`, expected numbers of seconds with `,` between"
        );
        problems.borrow_mut().push(text);
        usual()
    })
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
    fn what_is_no_number_is_said() {
        let read = |name: &'static str, value: &'static str| {
            WorkerEnv::read(move |asked| (asked == name).then(|| value.to_owned()))
        };
        for (name, value) in [
            ("BRIGHTRUN_MAX_DATASET_BYTES", "10GB"),
            ("BRIGHTRUN_RETRY_S", "15m"),
            ("BRIGHTRUN_LEASE_S", "0"),
            ("BRIGHTRUN_WATCHDOG_S", "-5"),
            ("BRIGHTRUN_KEEP_DAYS", "NaN"),
            ("RUNPOD_PING_INTERVAL", "often"),
        ] {
            let problems = read(name, value).problems;
            let begins = format!("{name} is `{value}`, expected ");
            assert!(
                problems.len() == 1 && problems[0].starts_with(&begins),
                "{problems:?}"
            );
        }
        let read = read("BRIGHTRUN_MAX_DATASET_BYTES", "17179869184");
        assert_eq!(
            (read.max_dataset_bytes, read.problems),
            (16 << 30, Vec::new())
        );
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
