//! What outlives the worker: one directory for each job, below `BRIGHTRUN_STATE_DIR`.
//!
//! ```text
//! jobs/<job_id>/attempts.json   how often it was begun, and how far it got
//!               lease-3.json    which worker is at it, the third
//!               dataset.jsonl   what it trains on
//!               train.yml       its settings
//!               run/            checkpoints, metrics, adapter
//!               delivery.json   what is trained and how much of it is delivered: the outbox
//!               answer.json     an answer without an adapter, until the platform has it
//!               event.json      the end of a job without an adapter, until its callback has heard of it
//!               result.json     what was answered
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::durable::Durable;
use crate::error::{Error, Result};

/// The state directory.
#[derive(Debug, Clone)]
pub struct State {
    root: PathBuf,
}

/// A job's directory.
#[derive(Debug, Clone)]
pub struct JobDir {
    dir: PathBuf,
}

/// How often a job was begun without getting further, nor to an end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempts {
    /// Times since it last got further.
    pub count: u32,
    /// All times.
    pub total: u32,
    /// Newest checkpoint when it was last begun.
    pub step: u64,
}

/// A result as it was answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    /// Body of the answer.
    pub body: Value,
}

impl State {
    /// The state below `root`, which is made.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(root: &Path) -> Result<Self> {
        fs_err::create_dir_all(root.join("jobs"))?;
        let root = root.to_owned();
        Ok(Self { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of job `id`, which is safe as a file name; it is made.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn job(&self, id: &str) -> Result<JobDir> {
        JobDir::open(self.root.join("jobs").join(id))
    }

    /// All jobs there are, by id.
    pub fn jobs(&self) -> Vec<(String, JobDir)> {
        let entries = fs_err::read_dir(self.root.join("jobs"))
            .into_iter()
            .flatten();
        let one = |entry: std::io::Result<fs_err::DirEntry>| {
            let entry = entry.ok()?;
            let id = entry.file_name().into_string().ok()?;
            if id.starts_with('.') {
                return None;
            }
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            is_dir.then(|| (id, JobDir { dir: entry.path() }))
        };
        let mut jobs: Vec<_> = entries.filter_map(one).collect();
        jobs.sort_by(|a, b| a.0.cmp(&b.0));
        jobs
    }
}

impl JobDir {
    /// The directory `dir`, which is made. A link to one is refused: what is written and removed there would be elsewhere.
    ///
    /// # Errors
    /// Those of the file system; [`Error::Format`] for a link.
    pub(super) fn open(dir: PathBuf) -> Result<Self> {
        if dir.is_symlink() {
            let reason = "is a link, expected a directory; remove the link";
            return Err(Error::format(&dir, reason));
        }
        fs_err::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// The job's id.
    pub fn id(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// A file or directory of it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Reads a file of it; `None` where it is not there or not whole.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let bytes = fs_err::read(self.path(name)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes a file of it, at once and to the disk. Only this user can read it: addresses of callbacks and of files hold tokens.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.path(name);
        let text = serde_json::to_vec_pretty(value);
        let text = text.map_err(|error| Error::format(&path, error.to_string()))?;
        Durable::default().replace_private(&path, &text)
    }

    /// What was answered.
    pub fn result(&self) -> Option<Stored> {
        self.read("result.json")
    }

    /// Counts a beginning. What got further than the last time begins to count anew.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn begin(&self) -> Result<Attempts> {
        let before: Attempts = self.read("attempts.json").unwrap_or_default();
        let step = self.newest_checkpoint();
        let now = Attempts {
            count: if step > before.step {
                1
            } else {
                before.count + 1
            },
            total: before.total + 1,
            step,
        };
        self.write("attempts.json", &now)?;
        Ok(now)
    }

    /// Counts beginnings anew: this one came to an end that was told, and was no crash.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn ended(&self) -> Result<()> {
        let Some(attempts) = self.read::<Attempts>("attempts.json") else {
            return Ok(());
        };
        self.write(
            "attempts.json",
            &Attempts {
                count: 0,
                ..attempts
            },
        )
    }

    /// Step of the newest checkpoint; 0 without one.
    pub fn newest_checkpoint(&self) -> u64 {
        let entries = fs_err::read_dir(self.path("run/checkpoints"))
            .into_iter()
            .flatten();
        let steps = entries.filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("step-")?.parse().ok()
        });
        steps.max().unwrap_or(0)
    }

    /// Whether nothing of it was written for `age`.
    pub fn is_older_than(&self, age: Duration) -> bool {
        let names = ["attempts.json", "delivery.json", "result.json", ""];
        let written = |name: &&str| self.path(name).metadata().ok()?.modified().ok();
        let newest = names.iter().filter_map(written).max();
        newest.is_some_and(|at| at.elapsed().is_ok_and(|since| since > age))
    }

    /// Removes what only the training needs, once it is delivered: data, checkpoints, archive. Adapter, metrics and result stay.
    pub fn tidy(&self) {
        for name in ["dataset.jsonl", "adapter.tar.gz", "upload.json"] {
            let _ = fs_err::remove_file(self.path(name));
        }
        let _ = fs_err::remove_dir_all(self.path("run/checkpoints"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_count_until_a_job_gets_further() {
        let dir = tempfile::tempdir().unwrap();
        let job = State::open(dir.path()).unwrap().job("j1").unwrap();
        assert_eq!(job.begin().unwrap().count, 1);
        assert_eq!(job.begin().unwrap().count, 2);
        fs_err::create_dir_all(job.path("run/checkpoints/step-4")).unwrap();
        let further = job.begin().unwrap();
        assert_eq!((further.count, further.total, further.step), (1, 3, 4));
        assert_eq!(job.begin().unwrap().count, 2);
        job.ended().unwrap();
        let next = job.begin().unwrap();
        assert_eq!((next.count, next.total, next.step), (1, 5, 4));
    }

    #[test]
    fn files_are_for_this_user_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let job = State::open(dir.path()).unwrap().job("j1").unwrap();
        job.write("delivery.json", &1).unwrap();
        let mode = job.path("delivery.json").metadata().unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_link_is_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        let outside = dir.path().join("outside");
        std::os::unix::fs::symlink(&outside, dir.path().join("jobs/j1")).unwrap();
        // Where it leads nowhere too.
        for _ in 0..2 {
            let refused = state.job("j1").unwrap_err().to_string();
            assert!(refused.contains("is a link"), "{refused}");
            assert_eq!(state.jobs().len(), 0);
            fs_err::create_dir_all(&outside).unwrap();
        }
    }

    #[test]
    fn half_a_file_is_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let job = State::open(dir.path()).unwrap().job("j1").unwrap();
        fs_err::write(job.path("result.json"), "{\"body\": {\"out").unwrap();
        assert_eq!(job.result(), None);
    }
}
