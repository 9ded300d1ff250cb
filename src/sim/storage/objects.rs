//! The objects, the rules of their buckets, and how their bytes reach the disk.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::path::PathBuf;

use axum::body::Body;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::Refusal;
use super::tus::Upload;
use crate::hex::hex;
use crate::sim::settings::Bucket;
use crate::sim::wire::next_chunk;
use crate::sim::{Shared, clock};

/// One stored object.
#[derive(Debug, Clone)]
pub struct Object {
    /// Bucket id.
    pub bucket: String,
    /// Path inside the bucket.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the bytes, lower-case hexadecimal.
    pub sha256: String,
    /// Media type.
    pub mime: String,
    /// `cache-control` of its downloads.
    pub cache_control: String,
    /// Identifier of this version; every write makes a new one.
    pub version: String,
    /// When it was written, ISO 8601.
    pub created_at: String,
    /// Where its bytes are.
    pub file: PathBuf,
}

impl Object {
    pub(super) fn etag(&self) -> String {
        format!("\"{}\"", &self.sha256[..32])
    }
}

/// All objects, and the resumable uploads on their way.
#[derive(Debug, Default)]
pub(in crate::sim) struct Storage {
    pub(super) objects: BTreeMap<(String, String), Object>,
    pub(super) uploads: HashMap<String, Upload>,
}

impl Storage {
    pub(in crate::sim) fn objects(&self) -> Vec<Object> {
        self.objects.values().cloned().collect()
    }

    pub(super) fn find(&self, bucket: &str, path: &str) -> Option<&Object> {
        self.objects.get(&(bucket.to_owned(), path.to_owned()))
    }

    pub(super) fn remove(&mut self, bucket: &str, path: &str) -> Option<Object> {
        let object = self.objects.remove(&(bucket.to_owned(), path.to_owned()))?;
        // Bytes that stay behind do no harm.
        drop(fs_err::remove_file(&object.file));
        Some(object)
    }
}

/// Where an object goes and what is said of it.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) bucket: String,
    pub(super) path: String,
    pub(super) mime: String,
    pub(super) cache_control: String,
    pub(super) upsert: bool,
}

/// Bytes that are on the disk but not an object yet.
pub(super) struct Received {
    pub(super) file: NamedTempFile,
    pub(super) size: u64,
    pub(super) sha256: String,
}

/// The bucket of this id.
pub(super) fn bucket<'a>(shared: &'a Shared, id: &str) -> Result<&'a Bucket, Refusal> {
    shared
        .settings
        .buckets
        .iter()
        .find(|bucket| bucket.id == id)
        .ok_or_else(Refusal::no_bucket)
}

/// Largest object of a bucket, bytes.
pub(super) fn size_limit(shared: &Shared, bucket: &Bucket) -> u64 {
    let global = shared.settings.file_size_limit;
    bucket
        .file_size_limit
        .map_or(global, |limit| limit.min(global))
}

/// Whether a path may be a key.
pub(super) fn check_key(path: &str) -> Result<(), Refusal> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.'!*&$@=;:+,?/() ".contains(c);
    let whole = path
        .split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..");
    if whole && path.chars().all(allowed) {
        Ok(())
    } else {
        Err(Refusal::invalid_key(path))
    }
}

/// Whether a bucket takes a media type.
pub(super) fn check_mime(bucket: &Bucket, mime: &str) -> Result<(), Refusal> {
    let Some(allowed) = &bucket.allowed_mime_types else {
        return Ok(());
    };
    let plain = mime.split(';').next().unwrap_or_default().trim();
    let fits = |allowed: &String| match allowed.strip_suffix("/*") {
        Some(family) => plain.split('/').next() == Some(family),
        None => allowed == plain || allowed == "*/*",
    };
    if allowed.iter().any(fits) {
        return Ok(());
    }
    let message = format!("mime type {mime} is not supported");
    Err(Refusal::new(
        415,
        "InvalidMimeType",
        "invalid_mime_type",
        message,
    ))
}

/// Writes an upload to a temporary file, piece by piece, hashing on the way.
pub(super) async fn receive(
    shared: &Shared,
    mut body: Body,
    limit: u64,
) -> Result<Received, Refusal> {
    let mut file =
        NamedTempFile::new_in(&shared.data_dir).map_err(|error| Refusal::internal(&error))?;
    let (mut size, mut hash) = (0, Sha256::new());
    while let Some(chunk) = next_chunk(&mut body).await {
        let chunk = chunk.map_err(|_| Refusal::invalid("the body broke off"))?;
        size += chunk.len() as u64;
        // What is over the limit is read, so that the answer is, and thrown away.
        if size <= limit {
            hash.update(&chunk);
            file.write_all(&chunk)
                .map_err(|error| Refusal::internal(&error))?;
        }
    }
    if size > limit {
        return Err(Refusal::too_large());
    }
    Ok(Received {
        file,
        size,
        sha256: hex(&hash.finalize()),
    })
}

/// Makes received bytes an object.
pub(super) fn commit(
    shared: &Shared,
    target: Target,
    received: Received,
) -> Result<Object, Refusal> {
    let version = clock::uuid();
    let file = shared.data_dir.join(file_name(&target, &version));
    let mut state = shared.lock();
    if !target.upsert && state.storage.find(&target.bucket, &target.path).is_some() {
        return Err(Refusal::duplicate());
    }
    received
        .file
        .persist(&file)
        .map_err(|error| Refusal::internal(&error.error))?;
    state.storage.remove(&target.bucket, &target.path);
    let object = Object {
        size: received.size,
        sha256: received.sha256,
        mime: target.mime,
        cache_control: target.cache_control,
        version,
        created_at: clock::iso8601(clock::since_epoch()),
        file,
        bucket: target.bucket.clone(),
        path: target.path.clone(),
    };
    state
        .storage
        .objects
        .insert((target.bucket, target.path), object.clone());
    Ok(object)
}

/// A name that tells a person which object the file is.
fn file_name(target: &Target, version: &str) -> String {
    let flat = target.path.replace('/', "_");
    let tail: String = flat.chars().rev().take(120).collect();
    let tail: String = tail.chars().rev().collect();
    format!("{}--{}--{tail}", target.bucket, &version[..8])
}

pub(super) fn put(shared: &Shared, id: &str, path: &str, bytes: &[u8]) -> Result<(), Refusal> {
    bucket(shared, id)?;
    check_key(path)?;
    let internal = |error: std::io::Error| Refusal::internal(&error);
    let mut file = NamedTempFile::new_in(&shared.data_dir).map_err(internal)?;
    file.write_all(bytes).map_err(internal)?;
    let received = Received {
        file,
        size: bytes.len() as u64,
        sha256: hex(&Sha256::digest(bytes)),
    };
    let target = Target {
        bucket: id.to_owned(),
        path: path.to_owned(),
        mime: "application/octet-stream".to_owned(),
        cache_control: "no-cache".to_owned(),
        upsert: true,
    };
    commit(shared, target, received)?;
    shared.change(|_| ());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_plain_paths() {
        for good in ["a", "adapters/0-a.tar.gz", "a b/c (1).txt"] {
            assert!(check_key(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a//b", "a/../b", "..", "a%b", "\u{e9}", "a\nb"] {
            assert!(check_key(bad).is_err(), "{bad}");
        }
    }
}
