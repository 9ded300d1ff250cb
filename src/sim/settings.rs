//! What a [`Sim`](super::Sim) is told at its start: keys, time limits, size limits, folders, faults.

use std::path::PathBuf;
use std::time::Duration;

use super::fault::Fault;

/// Configuration of a simulator; the defaults are the platform's documented values where there are any.
#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a question the real platform leaves open"
)]
pub struct Settings {
    /// TCP port on 127.0.0.1; 0 takes any free one.
    pub port: u16,
    /// Endpoint id, the `ep` of `/v2/{ep}/run`.
    pub endpoint: String,
    /// Key of the client routes.
    pub client_key: String,
    /// Key of the worker routes, compared with the whole `Authorization` header.
    pub worker_key: String,
    /// Service role key of the rows and storage routes.
    pub service_key: String,
    /// How long an empty job-take is held open.
    pub take_hold: Duration,
    /// How long an empty job-stop is held open.
    pub stop_hold: Duration,
    /// Time between two pings the worker is told to keep.
    pub ping_interval: Duration,
    /// Intervals without a ping after which a worker that has a job counts as lost.
    pub lost_after_pings: u32,
    /// How often a job of a lost worker is handed out again before it fails.
    pub max_retries: u32,
    /// Execution time of a job that carries no `policy.executionTimeout`.
    pub execution_timeout: Duration,
    /// Life time from submission of a job that carries no `policy.ttl`.
    pub ttl: Duration,
    /// How long a finished job can be asked for.
    pub retention: Duration,
    /// True: an execution timeout shows as `TIMED_OUT`; false: as `FAILED`.
    pub timed_out_state: bool,
    /// True: an empty job-take answers 400, as a worker under `FlashBoot` sees it; false: 204.
    pub empty_take_is_400: bool,
    /// True: a job-take with a wrong key answers 204 as if there were no work; false: 401.
    pub take_hides_bad_key: bool,
    /// Status of a job-done for a job that already has its result.
    pub duplicate_done_status: u16,
    /// Largest body of `/run`, bytes.
    pub run_limit: usize,
    /// Largest body of `/runsync`, bytes.
    pub runsync_limit: usize,
    /// Largest body of job-done and job-stream, bytes.
    pub result_limit: usize,
    /// Pause between two tries of a job's webhook.
    pub webhook_retry_wait: Duration,
    /// Folder served under `/files/`; a private temporary one if absent.
    pub files_dir: Option<PathBuf>,
    /// Folder of the stored objects; a private temporary one, deleted at the end, if absent.
    pub data_dir: Option<PathBuf>,
    /// True: `/files/{name}` needs a token; false: a token is checked only when there is one.
    pub files_need_token: bool,
    /// Project-wide limit of one stored object, bytes.
    pub file_size_limit: u64,
    /// The buckets.
    pub buckets: Vec<Bucket>,
    /// Size of every chunk of a resumable upload but the last, bytes.
    pub tus_chunk: u64,
    /// Life time of a resumable upload's URL.
    pub tus_lifetime: Duration,
    /// Faults from the start on.
    pub faults: Vec<Fault>,
}

/// One storage bucket.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Its id, also its name.
    pub id: String,
    /// Largest object, bytes; the project-wide limit holds as well.
    pub file_size_limit: Option<u64>,
    /// Media types accepted (`type/*` matches a family); all if absent.
    pub allowed_mime_types: Option<Vec<String>>,
}

impl Bucket {
    /// A bucket without limits of its own.
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            file_size_limit: None,
            allowed_mime_types: None,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 0,
            endpoint: "ep1".to_owned(),
            client_key: "client-key".to_owned(),
            worker_key: "worker-key".to_owned(),
            service_key: "service-key".to_owned(),
            take_hold: Duration::from_secs(10),
            stop_hold: Duration::from_secs(10),
            ping_interval: Duration::from_secs(10),
            lost_after_pings: 6,
            max_retries: 2,
            execution_timeout: Duration::from_mins(10),
            ttl: Duration::from_hours(24),
            retention: Duration::from_mins(30),
            timed_out_state: false,
            empty_take_is_400: false,
            take_hides_bad_key: false,
            duplicate_done_status: 200,
            run_limit: 10 << 20,
            runsync_limit: 20 << 20,
            result_limit: 20 << 20,
            webhook_retry_wait: Duration::from_secs(10),
            files_dir: None,
            data_dir: None,
            files_need_token: false,
            file_size_limit: 50 << 30,
            buckets: ["training-files", "lora-datasets", "lora-models"]
                .map(Bucket::new)
                .to_vec(),
            tus_chunk: 6 << 20,
            tus_lifetime: Duration::from_hours(24),
            faults: Vec::new(),
        }
    }
}
