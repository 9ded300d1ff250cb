//! A simulator, a volume, and workers on it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use brightrun::sim::{Settings, Sim, Status};
use serde_json::{Value, json};

pub(crate) const TABLE: &str = "pipeline_training_jobs";
pub(crate) const BUCKET: &str = "lora-models";
/// Longest time anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// Secrets that must be nowhere.
pub(crate) const CANARIES: [&str; 3] = [
    "canary-hub-token-1",
    "canary-callback-auth-2",
    "service-key",
];

/// How often a loop runs: as the environment says, else `default`.
pub(crate) fn number_from<T: std::str::FromStr>(variable: &str, default: T) -> T {
    let wanted = std::env::var_os(variable);
    let wanted = wanted.and_then(|text| text.to_str()?.parse().ok());
    wanted.unwrap_or(default)
}

pub(crate) fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples/demo")
        .join(name)
}

/// One deployment: platform, project, volume.
#[derive(Debug)]
pub(crate) struct Deployment {
    pub(crate) sim: Sim,
    pub(crate) dir: tempfile::TempDir,
    lines: usize,
}

/// A worker's process; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    log: PathBuf,
}

impl Deployment {
    pub(crate) fn new() -> Self {
        Self::with(Settings::default())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let settings = Settings {
            take_hold: Duration::from_millis(500),
            stop_hold: Duration::from_millis(500),
            ping_interval: Duration::from_millis(500),
            ..settings
        };
        let deployment = Self {
            sim: Sim::start(settings).unwrap(),
            dir: tempfile::tempdir().unwrap(),
            lines: 0,
        };
        let models = deployment.path("volume/models/brightrun");
        fs_err::create_dir_all(&models).unwrap();
        std::os::unix::fs::symlink(demo("model"), models.join("demo")).unwrap();
        let pairs = fs_err::read(demo("pairs.jsonl")).unwrap();
        deployment.sim.add_file("pairs.jsonl", &pairs).unwrap();
        deployment
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A job of the demo, `epochs` long; its row is there. RunPod's body, and the job's id.
    pub(crate) fn job(&self, number: u32, epochs: u32) -> (Value, String) {
        let id = format!("00000000-0000-4000-8000-{number:012}");
        let row = json!({"id": id, "status": "initializing", "progress": 0});
        self.sim.insert_row(TABLE, &row).unwrap();
        (self.body(&id, epochs), id)
    }

    pub(crate) fn body(&self, id: &str, epochs: u32) -> Value {
        json!({"input": {
            "job_id": id,
            "dataset_url": self.sim.file_url("pairs.jsonl"),
            "hyperparameters": {
                "base_model": "brightrun/demo", "learning_rate": 0.005, "batch_size": 8, "epochs": epochs, "rank": 8,
                "alpha": 16, "dropout": 0.05,
            },
            "gpu_config": {"type": "NVIDIA A40", "count": 1},
            "config": {"sequence_len": 512, "save_steps": 5},
        }})
    }

    pub(crate) fn worker(&mut self) -> Worker {
        self.worker_with(&[])
    }

    /// A worker on this deployment's volume.
    pub(crate) fn worker_with(&mut self, more: &[(&str, &str)]) -> Worker {
        self.worker_of(&["worker"], more)
    }

    /// The same, by the words of its command line.
    pub(crate) fn worker_of(&mut self, words: &[&str], more: &[(&str, &str)]) -> Worker {
        self.lines += 1;
        let log = self.path(&format!("worker-{}.log", self.lines));
        let file = fs_err::File::create(&log).unwrap();
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        command.env("RUNPOD_POD_ID", format!("pod{}", self.lines));
        command.envs(more.iter().copied());
        let error = file.file().try_clone().unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.into_parts().0)
            .stderr(error)
            .spawn()
            .unwrap();
        Worker { child, log }
    }

    /// The binary in this deployment's environment.
    pub(crate) fn command(&self, command: &str) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_brightrun"));
        process.arg(command).env_clear();
        process.current_dir(self.dir.path());
        process.envs(self.sim.worker_environment());
        process.env("BRIGHTRUN_ALLOW_PRIVATE_URLS", "1");
        process.env("BRIGHTRUN_VOLUMES", self.path("volume"));
        process.env("BRIGHTRUN_DEVICE", "cpu");
        process.env("BRIGHTRUN_REPORT_S", "0.2");
        process.env("BRIGHTRUN_LEASE_S", "3");
        process.env("BRIGHTRUN_RETRY_S", "30");
        process.env("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true");
        process.env("RUNPOD_LOG_LEVEL", "DEBUG");
        process.env("RAYON_NUM_THREADS", "1");
        process.env("HF_TOKEN", CANARIES[0]);
        process.env("BRIGHTRUN_CALLBACK_AUTH", CANARIES[1]);
        process
    }

    pub(crate) fn row(&self, id: &str) -> Value {
        self.sim.row(TABLE, id).unwrap()
    }

    /// Waits until `is_so`; on failure tells what the workers logged.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            let is_early = begun.elapsed() < PATIENCE;
            assert!(is_early, "{what} did not come\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the platform says that job `id` ended, and how.
    #[track_caller]
    pub(crate) fn ended(&self, id: &str) -> Value {
        self.until("an end", || {
            !matches!(
                self.sim.status(id),
                Some(Status::InQueue | Status::InProgress)
            )
        });
        self.sim.document(id).unwrap()
    }

    /// Waits until job `id` ended well.
    #[track_caller]
    pub(crate) fn completed(&self, id: &str) -> Value {
        let document = self.ended(id);
        assert_eq!(
            document["status"],
            "COMPLETED",
            "{document:#}\n{}",
            self.logs()
        );
        document
    }

    /// Waits until the row says that at least `step` steps are done.
    #[track_caller]
    pub(crate) fn until_step(&self, id: &str, step: u64) {
        self.until("a step", || {
            self.row(id)["current_step"]
                .as_u64()
                .is_some_and(|at| at >= step)
        });
    }

    pub(crate) fn logs(&self) -> String {
        let mut all = String::new();
        for number in 1..=self.lines {
            let path = self.path(&format!("worker-{number}.log"));
            all.push_str(&format!("== worker {number}\n"));
            all.push_str(&String::from_utf8_lossy(
                &fs_err::read(path).unwrap_or_default(),
            ));
        }
        all
    }

    /// Bytes of a stored object.
    pub(crate) fn object(&self, path: &str) -> Option<Vec<u8>> {
        let object = self.sim.object(BUCKET, path)?;
        Some(fs_err::read(object.file).unwrap())
    }

    /// The stored adapter of job `id`, unpacked as the application does: name without its first part, and bytes.
    #[track_caller]
    pub(crate) fn adapter(&self, id: &str) -> Vec<(String, Vec<u8>)> {
        let bytes = self.object(&format!("adapters/{id}.tar.gz")).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        let files = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let (first, name) = path.split_once('/').unwrap();
            assert_eq!(first, "adapter");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (name.to_owned(), bytes)
        });
        files.collect()
    }

    /// The bytes of the weights of job `id`.
    #[track_caller]
    pub(crate) fn weights(&self, id: &str) -> Vec<u8> {
        let files = self.adapter(id);
        let weights = files
            .into_iter()
            .find(|(name, _)| name == "adapter_model.safetensors");
        weights.unwrap().1
    }

    /// No rule of the protocol was broken, and no secret is in a log or in what was sent.
    #[track_caller]
    pub(crate) fn check_manners(&self) {
        assert!(
            self.sim.violations().is_empty(),
            "{:#?}\n{}",
            self.sim.violations(),
            self.logs()
        );
        self.check_secrets();
    }

    #[track_caller]
    pub(crate) fn check_secrets(&self) {
        let logs = self.logs();
        for canary in CANARIES {
            assert!(!logs.contains(canary), "{canary} is in a log");
        }
        for entry in walk(&self.path("volume/brightrun")) {
            let bytes = fs_err::read(&entry).unwrap_or_default();
            for canary in CANARIES {
                let is_in = bytes
                    .windows(canary.len())
                    .any(|part| part == canary.as_bytes());
                assert!(!is_in, "{canary} is in {}", entry.display());
            }
        }
    }
}

/// What a callback tells of.
pub(crate) fn kind(callback: &brightrun::sim::Callback) -> Value {
    let body: Value = serde_json::from_slice(&callback.body).unwrap();
    body["type"].clone()
}

fn send(process: i32, signal: rustix::process::Signal) {
    let process = rustix::process::Pid::from_raw(process).unwrap();
    let _ = rustix::process::kill_process(process, signal);
}

/// The files below `dir`.
pub(crate) fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(walk(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

impl Worker {
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        send(i32::try_from(self.child.id()).unwrap(), signal);
    }

    /// Signals the process that trains.
    pub(crate) fn signal_trainer(&self, signal: rustix::process::Signal) {
        send(self.trainer(), signal);
    }

    /// The process that trains.
    pub(crate) fn trainer(&self) -> i32 {
        let id = self.child.id();
        let path = format!("/proc/{id}/task/{id}/children");
        let children = fs_err::read_to_string(path).unwrap();
        children.trim().parse().unwrap()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; its exit code.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the worker does not end\n{}", self.said());
    }

    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs_err::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it is through with a job, whoever answered it.
    pub(crate) fn is_over(&self) -> bool {
        let said = self.said();
        said.contains("Finished.") || said.contains("does not know the job any more")
    }

    /// Its highest resident memory so far, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = fs_err::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        1024 * line
            .split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}
