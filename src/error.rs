//! The one error type of the library. Variants are cut by what the caller can do about them.
//!
//! Messages are lower case, without a full stop: what was found, what was expected, what to do.

use std::path::{Path, PathBuf};

/// Result with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, with enough context to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting of the run is unknown, missing or out of range.
    #[error("config {origin}: {reason}")]
    Config {
        /// File the setting came from, or `--set`.
        origin: String,
        /// What was found and what was expected; names the key in backticks.
        reason: String,
    },
    /// A feature that exists in the field but is not implemented here.
    #[error("{what} is not supported: {why}")]
    Unsupported {
        /// The feature, with its name as the file has it.
        what: String,
        /// Why, and what to do instead.
        why: String,
    },
    /// Extents of a tensor do not fit the operation.
    #[error("{op}: {tensor} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Operation that refused.
        op: &'static str,
        /// Name of the tensor.
        tensor: String,
        /// Shape found.
        found: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
    },
    /// Element type of a tensor does not fit the operation.
    #[error("{op}: {tensor} has dtype {found}, expected {expected}")]
    DType {
        /// Operation that refused.
        op: &'static str,
        /// Name of the tensor.
        tensor: String,
        /// Element type found.
        found: &'static str,
        /// Element type expected.
        expected: &'static str,
    },
    /// A file does not hold what its format promises.
    #[error("{}: {reason}", path.display())]
    Format {
        /// File (or directory) at fault.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// A file or directory that must exist does not.
    #[error("{what} not found; tried {}", tried.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    Missing {
        /// What was looked for.
        what: String,
        /// Every path tried.
        tried: Vec<PathBuf>,
    },
    /// The data set cannot be trained on.
    #[error("{}{}: {reason}", path.display(), line.map(|l| format!(" line {l}")).unwrap_or_default())]
    Data {
        /// Data set file.
        path: PathBuf,
        /// 1-based line, where one is to blame.
        line: Option<usize>,
        /// What was found and what was expected.
        reason: String,
    },
    /// The operating system refused a read or a write. The source names the path.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A loss or gradient became NaN or infinite; the last good state is kept.
    #[error("step {step}: {what} is not finite; {advice}")]
    NonFinite {
        /// Optimizer step (1-based) that was not applied.
        step: u64,
        /// The value and the layer or tensor it was seen in.
        what: String,
        /// What to change.
        advice: String,
    },
    /// A kernel failed, or was launched with what it does not take.
    #[error("{reason}")]
    Kernel {
        /// Kernel, block, and what happened.
        reason: String,
    },
    /// The run does not fit into memory.
    #[error("{reason}")]
    OutOfMemory {
        /// Which buffer, how much is short, which setting to change.
        reason: String,
    },
}

/// Exit code of what does not fit into memory.
pub const DOES_NOT_FIT: u8 = 12;

impl Error {
    /// Shorthand for [`Error::Format`].
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Format {
            path: path.as_ref().to_owned(),
            reason: reason.into(),
        }
    }

    /// Process exit code: 1 failure, 12 does not fit, 17 numeric, 65 bad data, 66 missing input,
    /// 74 I/O, 78 bad config.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. } | Self::Unsupported { .. } => 78,
            Self::Format { .. } | Self::Data { .. } => 65,
            Self::Missing { .. } => 66,
            Self::Io(_) => 74,
            Self::NonFinite { .. } => 17,
            Self::OutOfMemory { .. } => DOES_NOT_FIT,
            Self::Shape { .. } | Self::DType { .. } | Self::Kernel { .. } => 1,
        }
    }
}
