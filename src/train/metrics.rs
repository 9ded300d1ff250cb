//! `metrics.jsonl`: one line per optimizer step, also over interruptions.

use std::io::Write;
use std::path::Path;

use fs_err as fs;

use super::events::StepMetrics;
use crate::durable::Durable;
use crate::error::{Error, Result};

/// The open file.
#[derive(Debug)]
pub(super) struct MetricsFile {
    file: fs::File,
}

impl MetricsFile {
    /// Opens `path`, keeping the lines of the first `completed` steps: those after them are trained again.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn open(files: &Durable, path: &Path, completed: u64) -> Result<Self> {
        let old = if completed > 0 && path.is_file() {
            fs::read_to_string(path)?
        } else {
            String::new()
        };
        let is_kept = |line: &&str| {
            serde_json::from_str::<StepMetrics>(line).is_ok_and(|metrics| metrics.step <= completed)
        };
        let kept: String = old
            .lines()
            .filter(is_kept)
            .flat_map(|line| [line, "\n"])
            .collect();
        files.replace(path, kept.as_bytes())?;
        let file = fs::OpenOptions::new().append(true).open(path)?;
        Ok(Self { file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics)
            .map_err(|error| Error::format(self.file.path(), error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        Ok(())
    }
}
