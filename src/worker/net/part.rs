//! The unfinished download on disk: `<file>.part`, and `<file>.part.json` that says of what it is a part.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt as _;
use reqwest::header::{self, HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use url::Url;

use super::cancel::Cancel;
use super::error::{Error, Kind, Result};
use super::fetch::Fetched;
use super::files::{remove, replace, settle, with_suffix};
use crate::hex::hex;

const BUFFER_BYTES: usize = 64 * 1024;

/// How the server names the state of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Version {
    etag: Option<String>,
    last_modified: Option<String>,
    /// Bytes of the whole file.
    pub(super) bytes: Option<u64>,
}

impl Version {
    /// From an answer's headers; `bytes` from `Content-Length` or `Content-Range`.
    pub(super) fn new(headers: &HeaderMap, bytes: Option<u64>) -> Self {
        let text = |name| {
            let value: Option<&HeaderValue> = headers.get(name);
            value.and_then(|v| v.to_str().ok()).map(str::to_owned)
        };
        Self {
            etag: text(header::ETAG),
            last_modified: text(header::LAST_MODIFIED),
            bytes,
        }
    }

    /// Whether a later answer can be recognised as the same file.
    fn is_named(&self) -> bool {
        self.etag.is_some() || self.last_modified.is_some()
    }

    /// Whether `other` names no other state than this.
    pub(super) fn agrees_with(&self, other: &Self) -> bool {
        fn agree<T: PartialEq>(a: Option<&T>, b: Option<&T>) -> bool {
            a.is_none() || b.is_none() || a == b
        }
        let weak = |v: &Self| {
            v.etag
                .as_ref()
                .map(|e| e.trim_start_matches("W/").to_owned())
        };
        agree(weak(self).as_ref(), weak(other).as_ref())
            && agree(self.last_modified.as_ref(), other.last_modified.as_ref())
            && agree(self.bytes.as_ref(), other.bytes.as_ref())
    }

    /// The value of `If-Range`: a weak tag may not stand there, and is compared after the answer instead.
    fn if_range(&self) -> Option<HeaderValue> {
        let value = match &self.etag {
            Some(etag) if etag.starts_with("W/") => None,
            Some(etag) => Some(etag),
            None => self.last_modified.as_ref(),
        };
        value.and_then(|v| HeaderValue::from_str(v).ok())
    }
}

/// A part that is a link is not opened: what it points to is not ours to write.
fn no_link() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

#[derive(Serialize, Deserialize)]
struct Sidecar {
    /// SHA-256 of the URL without its query: a signature changes, the file does not.
    url_sha256: String,
    version: Version,
}

/// A file being fetched.
pub(super) struct Part {
    path: PathBuf,
    sidecar: PathBuf,
    url_sha256: String,
    file: fs::File,
    hasher: Sha256,
    bytes: u64,
    version: Version,
}

impl Part {
    /// Opens or creates the part of `to`. What is there is kept if it is of `url`, and hashed again.
    pub(super) async fn open(to: &Path, url: &Url, cancel: &Cancel) -> Result<Self> {
        let path = with_suffix(to, ".part");
        let mut bare = url.clone();
        bare.set_query(None);
        bare.set_fragment(None);
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(no_link())
            .open(&path)?;
        let mut part = Self {
            sidecar: with_suffix(&path, ".json"),
            path,
            url_sha256: hex(&Sha256::digest(bare.as_str())),
            file,
            hasher: Sha256::new(),
            bytes: 0,
            version: Version::default(),
        };
        match part.read_sidecar() {
            Some(sidecar) if sidecar.url_sha256 == part.url_sha256 => {
                part.version = sidecar.version;
                part.hash_again(cancel).await?;
                if part.version.bytes.is_some_and(|total| part.bytes > total) {
                    part.restart()?;
                }
            }
            _ => part.restart()?,
        }
        Ok(part)
    }

    fn read_sidecar(&self) -> Option<Sidecar> {
        let text = fs::read(&self.sidecar).ok()?;
        serde_json::from_slice(&text).ok()
    }

    async fn hash_again(&mut self, cancel: &Cancel) -> Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = self.file.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            self.hasher.update(&buffer[..count]);
            self.bytes += count as u64;
            tokio::task::yield_now().await;
            if cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "cancelled"));
            }
        }
    }

    /// Bytes that are here.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Of which state of the file they are.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// Whether the rest may be asked for. `digest_known`: a mixture of two files would be found at the end.
    pub(super) fn can_resume(&self, digest_known: bool) -> bool {
        self.bytes > 0 && (self.version.is_named() || digest_known)
    }

    /// Adds the headers that ask for the rest.
    pub(super) fn ask_for_rest(&self, headers: &mut HeaderMap) -> Result<()> {
        let range = HeaderValue::from_str(&format!("bytes={}-", self.bytes))
            .map_err(|error| Error::new(Kind::Io, error.to_string()))?;
        headers.insert(header::RANGE, range);
        if let Some(value) = self.version.if_range() {
            headers.insert(header::IF_RANGE, value);
        }
        Ok(())
    }

    /// Forgets what is here.
    pub(super) fn restart(&mut self) -> Result<()> {
        remove(&self.sidecar)?;
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = Sha256::new();
        self.bytes = 0;
        self.version = Version::default();
        Ok(())
    }

    /// Begins with an empty part of the file's state `version`.
    pub(super) fn begin(&mut self, version: Version) -> Result<()> {
        self.restart()?;
        let sidecar = Sidecar {
            url_sha256: self.url_sha256.clone(),
            version: version.clone(),
        };
        let text = serde_json::to_vec(&sidecar)
            .map_err(|error| Error::new(Kind::Io, error.to_string()))?;
        replace(&self.sidecar, &text)?;
        self.version = version;
        Ok(())
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Checks the digest and gives the file its name.
    pub(super) fn finish(self, to: &Path, expected_sha256: Option<&str>) -> Result<Fetched> {
        let sha256 = hex(&self.hasher.clone().finalize());
        if let Some(expected) = expected_sha256
            && !expected.eq_ignore_ascii_case(&sha256)
        {
            let message = format!(
                "fetched file has sha256 {sha256}, expected {expected}; it is another file or was damaged at its source"
            );
            self.discard()?;
            return Err(Error::new(Kind::Corrupt, message));
        }
        self.file.sync_all()?;
        settle(&self.path, to)?;
        remove(&self.sidecar)?;
        Ok(Fetched {
            bytes: self.bytes,
            sha256,
        })
    }

    /// Removes part and sidecar.
    pub(super) fn discard(self) -> Result<()> {
        remove(&self.sidecar)?;
        Ok(remove(&self.path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(etag: Option<&str>, modified: Option<&str>, bytes: Option<u64>) -> Version {
        Version {
            etag: etag.map(str::to_owned),
            last_modified: modified.map(str::to_owned),
            bytes,
        }
    }

    #[test]
    fn versions_agree_unless_one_contradicts() {
        let saved = version(Some("\"a\""), Some("then"), Some(5));
        assert!(saved.agrees_with(&version(Some("W/\"a\""), None, Some(5))));
        assert!(saved.agrees_with(&version(None, None, None)));
        assert!(!saved.agrees_with(&version(Some("\"b\""), None, Some(5))));
        assert!(!saved.agrees_with(&version(None, Some("now"), None)));
        assert!(!saved.agrees_with(&version(None, None, Some(6))));
    }

    #[test]
    fn a_weak_tag_is_not_sent_as_if_range() {
        assert_eq!(
            version(Some("W/\"a\""), Some("then"), None).if_range(),
            None
        );
        assert_eq!(
            version(Some("\"a\""), Some("then"), None)
                .if_range()
                .unwrap(),
            "\"a\""
        );
        assert_eq!(
            version(None, Some("then"), None).if_range().unwrap(),
            "then"
        );
    }
}
