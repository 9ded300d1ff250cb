//! The adapter as one file: `adapter/<file>`, one level deep, as the application unpacks it.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::durable::{Durable, partial_of};
use crate::error::{Error, Result};
use crate::hex::hex;

/// What every entry's name begins with.
const FOLDER: &str = "adapter";

/// A file, and how to know it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// Name within the adapter's directory, or of the archive.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
}

/// Files of an adapter's directory, by name; what begins with a dot is none.
///
/// # Errors
/// Those of the file system; [`Error::Missing`] for a directory without weights.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !is_hidden && entry.file_type()?.is_file() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    let weights = dir.join(crate::export::adapter::WEIGHTS);
    if !paths.contains(&weights) {
        let what = "the trained adapter's weights".to_owned();
        let tried = vec![weights];
        return Err(Error::Missing { what, tried });
    }
    Ok(paths)
}

/// Packs the adapter in `dir` into `to`, whole or not at all. Equal files make equal archives.
///
/// # Errors
/// Those of the file system.
pub fn pack(dir: &Path, to: &Path) -> Result<Sealed> {
    let partial = partial_of(to);
    let file = fs_err::File::create(&partial)?;
    let hashing = Hashing::new(BufWriter::new(file));
    let gzip = flate2::GzBuilder::new()
        .mtime(0)
        .write(hashing, flate2::Compression::fast());
    let mut archive = tar::Builder::new(gzip);
    archive.mode(tar::HeaderMode::Deterministic);
    for path in files(dir)? {
        let name = name_of(&path);
        let mut file = fs_err::File::open(&path)?;
        let mut header = tar::Header::new_gnu();
        header.set_size(file.metadata()?.len());
        header.set_mode(0o644);
        header.set_cksum();
        archive.append_data(&mut header, format!("{FOLDER}/{name}"), &mut file)?;
    }
    let (buffer, sealed) = archive.into_inner()?.finish()?.finish(&name_of(to));
    let file = buffer
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Durable::default().rename(&partial, to)?;
    Ok(sealed)
}

/// Size and digest of a file.
///
/// # Errors
/// Those of the file system.
pub fn seal(path: &Path) -> Result<Sealed> {
    let mut file = BufReader::new(fs_err::File::open(path)?);
    let mut hashing = Hashing::new(std::io::sink());
    std::io::copy(&mut file.by_ref(), &mut hashing)?;
    Ok(hashing.finish(&name_of(path)).1)
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Writes through, and knows what passed.
struct Hashing<W> {
    inner: W,
    digest: Sha256,
    bytes: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        let digest = Sha256::new();
        Self {
            inner,
            digest,
            bytes: 0,
        }
    }

    fn finish(self, name: &str) -> (W, Sealed) {
        let sealed = Sealed {
            name: name.to_owned(),
            bytes: self.bytes,
            sha256: hex(&self.digest.finalize()),
        };
        (self.inner, sealed)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.digest.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_one_level_deep_and_equal_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = dir.path().join("run/adapter");
        fs_err::create_dir_all(&adapter).unwrap();
        for (name, text) in [
            ("adapter_model.safetensors", "weights"),
            ("adapter_config.json", "{}"),
            (".hidden", "x"),
        ] {
            fs_err::write(adapter.join(name), text).unwrap();
        }
        let to = dir.path().join("adapter.tar.gz");
        let sealed = pack(&adapter, &to).unwrap();
        assert_eq!(seal(&to).unwrap(), sealed);
        let again = dir.path().join("again.tar.gz");
        assert_eq!(pack(&adapter, &again).unwrap().sha256, sealed.sha256);
        let file = fs_err::File::open(&to).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let names: Vec<String> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(
            names,
            [
                "adapter/adapter_config.json",
                "adapter/adapter_model.safetensors"
            ]
        );
        fs_err::remove_file(adapter.join("adapter_model.safetensors")).unwrap();
        assert!(pack(&adapter, &to).is_err());
        assert_eq!(seal(&to).unwrap(), sealed);
    }
}
