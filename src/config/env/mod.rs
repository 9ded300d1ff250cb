//! The environment of the process, read once and nowhere else.

mod worker;

pub use worker::{RunpodEnv, WorkerEnv};

use std::path::PathBuf;

/// Variables the engine looks at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Env {
    /// `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`: where downloaded models lie.
    pub hub_cache: Option<PathBuf>,
    /// `BRIGHTRUN_KILL_AT_WRITE`: for fault tests; end the process before this many-th durable file operation (from 1).
    pub kill_at_write: Option<u64>,
    /// `BRIGHTRUN_SYNC`, unless empty or 0: wait for every launch, so that a fault of a GPU names its kernel.
    pub synchronous: bool,
}

impl WorkerEnv {
    /// Reads the process's environment.
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub fn from_process() -> Self {
        Self::read(|name| {
            std::env::var(name)
                .ok()
                .filter(|value| !value.trim().is_empty())
        })
    }
}

/// Names of the process's variables that begin with `prefix`, in order.
pub fn variable_names(prefix: &str) -> Vec<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    names
}

impl Env {
    /// Reads the process's environment.
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub fn read() -> Self {
        let path = |name: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty());
            value.map(PathBuf::from)
        };
        let home = || path("HOME").map(|home| home.join(".cache/huggingface"));
        let hub = || path("HF_HOME").or_else(home).map(|home| home.join("hub"));
        let kill_at_write = std::env::var("BRIGHTRUN_KILL_AT_WRITE").ok();
        Self {
            hub_cache: path("HF_HUB_CACHE").or_else(hub),
            kill_at_write: kill_at_write.and_then(|text| text.parse().ok()),
            synchronous: path("BRIGHTRUN_SYNC").is_some_and(|value| value.as_os_str() != "0"),
        }
    }
}
