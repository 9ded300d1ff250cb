//! Files that are whole or absent.

use std::io;
use std::path::{Path, PathBuf};

use fs_err as fs;

use crate::durable::Durable;
use crate::error::Error;

/// `path` with `suffix` behind its whole name (`a.jsonl` gives `a.jsonl.part`).
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Replaces `path` by `bytes` at once, and brings both file and name to the disk.
///
/// # Errors
/// Those of the file system, naming the path.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    Durable::default().replace(path, bytes).map_err(of_io)
}

/// Renames a synced file to its final name and brings the name to the disk.
///
/// # Errors
/// Those of the file system, naming the path.
pub fn settle(from: &Path, to: &Path) -> io::Result<()> {
    Durable::default().rename(from, to).map_err(of_io)
}

fn of_io(error: Error) -> io::Error {
    if let Error::Io(error) = error {
        return error;
    }
    io::Error::other(error.to_string())
}

/// Removes a file that may not exist.
///
/// # Errors
/// Those of the file system, naming the path.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
