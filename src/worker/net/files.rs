//! Files that are whole or absent.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;

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
    let fresh = with_suffix(path, ".new");
    let mut file = fs::File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    settle(&fresh, path)
}

/// Renames a synced file to its final name and brings the name to the disk.
///
/// # Errors
/// Those of the file system, naming the path.
pub fn settle(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::File::open(parent)?.sync_all()
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

/// `bytes` as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}
