//! File operations that survive a crash: what was reported done is on the disk.
//!
//! Every operation is counted, so that a fault test can end the process before any one of them.

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write;
use std::path::{Path, PathBuf};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt as _;

use crate::error::Result;

/// Writes, renames and removes, with `fsync` where it matters.
#[derive(Debug, Default)]
pub struct Durable {
    kill_at: Option<u64>,
    count: Cell<u64>,
}

impl Durable {
    /// Ends the process before operation `kill_at` (from 1), if given.
    pub fn new(kill_at: Option<u64>) -> Self {
        Self {
            kill_at,
            count: Cell::new(0),
        }
    }

    fn step(&self) {
        self.count.set(self.count.get() + 1);
        if self.kill_at == Some(self.count.get()) {
            let process = rustix::process::getpid();
            // As an outside `kill -9` would: no clean-up runs.
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
    }

    /// Writes a new file and brings it to the disk. Its space is asked for first, so that a full disk is noticed before
    /// anything is lost.
    ///
    /// # Errors
    /// Those of the file system, naming the path.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.step();
        self.fill(fs::File::create(path)?, bytes)
    }

    fn fill(&self, mut file: fs::File, bytes: &[u8]) -> Result<()> {
        reserve(&file, bytes.len())?;
        let (first, second) = bytes.split_at(bytes.len() / 2);
        file.write_all(first)?;
        self.step();
        file.write_all(second)?;
        self.step();
        file.sync_all()?;
        Ok(())
    }

    /// Replaces the file `path` at once: readers see the old or the new bytes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let partial = partial_of(path);
        self.write(&partial, bytes)?;
        self.rename(&partial, path)
    }

    /// The same, with a file that this user alone can read.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn replace_private(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let partial = partial_of(path);
        self.step();
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        self.fill(options.open(&partial)?, bytes)?;
        self.rename(&partial, path)
    }

    /// Renames, and brings the directory to the disk.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.step();
        fs::rename(from, to)?;
        self.step();
        if let Some(parent) = to.parent() {
            self.sync_dir(parent)?;
        }
        Ok(())
    }

    /// Puts directory `from` in the place of directory `to`, which may exist; the old one is removed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn replace_dir(&self, from: &Path, to: &Path) -> Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if !to.exists() {
            return self.rename(from, to);
        }
        self.step();
        if renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE).is_err() {
            // A file system that cannot exchange: the old one steps aside first.
            let aside = from.with_extension("old");
            fs::rename(to, &aside)?;
            fs::rename(from, to)?;
            fs::rename(&aside, from)?;
        }
        if let Some(parent) = to.parent() {
            self.sync_dir(parent)?;
        }
        self.remove_dir(from)
    }

    /// Brings a directory's entries to the disk.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync_dir(&self, path: &Path) -> Result<()> {
        self.step();
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        fs::File::open(path)?.sync_all()?;
        Ok(())
    }

    /// Makes a directory and those above it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create_dir(&self, path: &Path) -> Result<()> {
        self.step();
        fs::create_dir_all(path)?;
        Ok(())
    }

    /// Removes a directory and what is in it. It gives up its name first, so that no half of it is taken for the whole.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_dir(&self, path: &Path) -> Result<()> {
        self.step();
        let aside = partial_of(path);
        fs::rename(path, &aside)?;
        self.step();
        fs::remove_dir_all(aside)?;
        Ok(())
    }

    /// Removes what processes that are gone left half-written in `dir` (see [`partial_of`]).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_partials(&self, dir: &Path) -> Result<()> {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            if !name.to_str().is_some_and(is_abandoned) {
                continue;
            }
            if path.is_dir() {
                self.remove_dir(&path)?;
            } else {
                self.step();
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Where the new contents of `path` are written before they take its place: `.<name>.<process>-<mark>.partial` beside it.
pub fn partial_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let process = std::process::id();
    let mark = mark_of(process).unwrap_or_default();
    path.with_file_name(format!(".{name}.{process}-{mark:016x}.partial"))
}

/// What tells a process from others of the same number: those of other hosts and containers, and those before it. `None` for one
/// that is not there.
fn mark_of(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Behind the name, which may hold anything, the start is the twentieth field: ticks since the machine booted.
    let (_, fields) = stat.rsplit_once(')')?;
    let start = fields.split_whitespace().nth(19)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    let name = rustix::system::uname();
    (process, start, boot, name.nodename()).hash(&mut hasher);
    Some(hasher.finish())
}

/// Whether `name` is that of a partial file and no process of this host is writing it: who asks holds the directory, so that none of
/// another host is either.
fn is_abandoned(name: &str) -> bool {
    let writer = name.strip_suffix(".partial");
    let writer = writer.and_then(|rest| rest.rsplit('.').next()?.split_once('-'));
    let writer = writer.and_then(|(process, mark)| {
        let mark = u64::from_str_radix(mark, 16).ok()?;
        Some((process.parse().ok()?, mark))
    });
    let Some((process, mark)) = writer else {
        return false;
    };
    // This process has not begun to write when it asks.
    process == std::process::id() || mark_of(process) != Some(mark)
}

/// Asks for the space of a file; file systems that cannot say are believed.
fn reserve(file: &fs::File, len: usize) -> Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    if len == 0 {
        return Ok(());
    }
    match fallocate(file.file(), FallocateFlags::KEEP_SIZE, 0, len as u64) {
        Err(rustix::io::Errno::NOSPC) => {
            let text = format!(
                "{}: {len} bytes are needed and the disk is full",
                file.path().display()
            );
            Err(std::io::Error::new(std::io::ErrorKind::StorageFull, text).into())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that lives until it is dropped.
    struct Other(std::process::Child);

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn partial_files_belong_to_one_process_alone() {
        let partial = partial_of(Path::new("dir/a.json"));
        let name = partial.file_name().unwrap().to_str().unwrap();
        assert!(is_abandoned(name), "its own");
        let other = std::process::Command::new("sleep").arg("60").spawn();
        let other = Other(other.unwrap());
        let process = other.0.id();
        let mark = mark_of(process).unwrap();
        let of_other = format!(".a.json.{process}-{mark:016x}.partial");
        assert!(!is_abandoned(&of_other), "another that is alive");
        // The same number on another host, or before.
        let foreign = format!(".a.json.{process}-{:016x}.partial", mark ^ 1);
        assert!(is_abandoned(&foreign));
        drop(other);
        assert!(is_abandoned(&of_other), "another that is gone");
        for name in ["a.json", "a.partial", ".a.12.partial", ".a.x-1.partial"] {
            assert!(!is_abandoned(name), "{name}");
        }
    }

    #[test]
    fn what_a_link_points_to_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (outside, link) = (dir.path().join("outside"), dir.path().join("link"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        // With a slash behind it, as the path of a directory may have, it is refused or means the link.
        let _ = Durable::default().remove_dir(&link.join(""));
        let _ = Durable::default().remove_dir(&link);
        assert!(!link.is_symlink());
        assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept");
    }
}
