//! The files of a delivery on their way to the storage: the archive first, as it is what the application deploys, then each file for
//! itself, and last the manifest: where it is, everything is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{ARCHIVE, Delivery, MANIFEST, Stuck, content_type, patiently};
use crate::worker::archive::{self, Sealed};
use crate::worker::context::Context;
use crate::worker::log::Log;
use crate::worker::net::Cancel;
use crate::worker::state::JobDir;
use crate::worker::supabase::{ServiceError, Supabase, Upload};

/// Times that a file is sent again, as something else was stored.
const AGAIN: u32 = 2;
/// Status for a media type that the bucket does not take.
const UNSUPPORTED: u16 = 415;

/// A file whose digest is known, as long as it does not change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Known {
    sealed: Sealed,
    /// When it was written, in seconds since 1970.
    modified: f64,
}

/// Where a delivery's files go, and who waits for it.
pub(super) struct Way<'a> {
    pub(super) supabase: &'a Supabase,
    pub(super) context: &'a Context,
    pub(super) job: &'a JobDir,
    pub(super) log: &'a Log,
    pub(super) cancel: &'a Cancel,
}

impl Way<'_> {
    fn kept(&self, error: &dyn ToString) -> Stuck {
        Stuck::Kept(self.log.redact(&error.to_string()))
    }

    /// Uploads `file` until what is stored is what was sent.
    async fn put(&self, file: PathBuf, path: String, sealed: &Sealed) -> Result<(), ServiceError> {
        let Sealed {
            name,
            bytes,
            sha256,
        } = sealed;
        let env = &self.context.env;
        let state = self.job.path(&format!("upload.{name}.json"));
        let upload = Upload {
            bucket: env.bucket.clone(),
            path,
            content_type: content_type(name).to_owned(),
            state: Some(state.clone()),
            file,
            sha256: Some(sha256.clone()),
            deadline: env.retry,
            backoff: Duration::from_secs(1),
        };
        let mut sent = 0;
        loop {
            self.log.info(&format!("uploading {name} ({bytes} bytes)"));
            self.supabase
                .upload(&upload, self.cancel, &mut |_, _| {})
                .await?;
            sent += 1;
            let verified = patiently(env.retry, self.cancel, async || {
                let verified = self
                    .supabase
                    .verify(&upload.bucket, &upload.path, *bytes, sha256, self.cancel)
                    .await;
                // To look again does not mend it.
                verified.map_err(|mut error| {
                    error.retryable &= !error.is_mismatch();
                    error
                })
            });
            match verified.await {
                Err(error) if error.is_mismatch() && sent <= AGAIN => {
                    self.log.warn(&error.to_string());
                }
                verified => {
                    let _ = fs_err::remove_file(&state);
                    return verified;
                }
            }
        }
    }
}

impl Delivery {
    /// Brings everything to the storage. A text beside the adapter that the bucket does not take stays behind.
    ///
    /// # Errors
    /// [`Stuck`].
    pub(super) async fn upload(&mut self, way: &Way<'_>) -> Result<(), Stuck> {
        let Way { job, log, .. } = way;
        let packed = self.pack(job).await.map_err(|error| way.kept(&error))?;
        let to = job.path(ARCHIVE);
        let put = way.put(to, self.archive_path(), &packed).await;
        put.map_err(|error| way.kept(&error))?;
        let mut files = vec![packed];
        let paths = archive::files(&self.adapter(job)).map_err(|error| way.kept(&error))?;
        self.left_out.clear();
        for path in paths {
            let sealed = self.seal(&path).await.map_err(|error| way.kept(&error))?;
            // The digest, for the next try.
            self.save(job).map_err(|error| way.kept(&error))?;
            let object = self.file_path(&sealed.name);
            match way.put(path, object, &sealed).await {
                Ok(()) => files.push(sealed),
                Err(error) if error.status == UNSUPPORTED && is_text(&sealed.name) => {
                    log.warn(&format!("{} is in the archive alone: {error}", sealed.name));
                    self.left_out.push(sealed.name);
                }
                Err(error) => return Err(way.kept(&error)),
            }
        }
        let manifest =
            json!({"job_id": self.job_id, "base_model": self.trained.base_model, "files": files});
        let written = job.write(MANIFEST, &manifest);
        written.map_err(|error| way.kept(&error))?;
        let path = job.path(MANIFEST);
        let sealed = archive::seal(&path).map_err(|error| way.kept(&error))?;
        let put = way.put(path, self.file_path(MANIFEST), &sealed).await;
        put.map_err(|error| way.kept(&error))?;
        self.uploaded = true;
        self.save(job).map_err(|error| way.kept(&error))
    }

    /// The archive, packed where it is not there.
    async fn pack(&mut self, job: &JobDir) -> Result<Sealed, String> {
        let to = job.path(ARCHIVE);
        let is_whole =
            |sealed: &&Sealed| to.metadata().is_ok_and(|data| data.len() == sealed.bytes);
        if let Some(sealed) = self.archive.as_ref().filter(is_whole) {
            return Ok(sealed.clone());
        }
        let adapter = self.adapter(job);
        let sealed = aside(move || archive::pack(&adapter, &to)).await?;
        self.archive = Some(sealed.clone());
        self.save(job)?;
        Ok(sealed)
    }

    /// Size and digest of a file, computed anew only where it changed.
    async fn seal(&mut self, path: &Path) -> Result<Sealed, String> {
        let data = path.metadata().map_err(|error| error.to_string())?;
        let modified = data.modified().map_err(|error| error.to_string())?;
        let modified = modified
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let known = self.digests.iter().find(|known| {
            // To the microsecond, as it is read back.
            known.sealed.name == name
                && known.sealed.bytes == data.len()
                && (known.modified - modified).abs() < 1e-6
        });
        if let Some(known) = known {
            return Ok(known.sealed.clone());
        }
        let of = path.to_owned();
        let sealed = aside(move || archive::seal(&of)).await?;
        self.digests.retain(|known| known.sealed.name != name);
        self.digests.push(Known {
            sealed: sealed.clone(),
            modified,
        });
        Ok(sealed)
    }
}

fn is_text(name: &str) -> bool {
    content_type(name).starts_with("text/")
}

/// Does `work` on another thread: large files take their time.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> crate::error::Result<T> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A delivery as an older worker wrote it.
    fn old_delivery(adapter: &Path) -> Delivery {
        let trained = json!({
            "base_model": "b", "lora_rank": 8, "adapter": adapter, "steps": 1, "epochs": 1.0, "final_loss": null, "eval_loss": null,
            "training_s": 1.0, "tokens_per_s": null, "warnings": [],
        });
        let delivery = json!({
            "job_id": "j", "runpod_id": "r", "callback_url": null, "trained": trained, "begun": 1, "finished": 2, "archive": null,
            "uploaded": false, "output": null, "row_written": false, "posted": false, "told": false,
        });
        serde_json::from_value(delivery).unwrap()
    }

    #[test]
    fn an_adapter_is_found_in_the_jobs_directory_and_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let job = crate::worker::state::State::open(dir.path()).unwrap();
        let job = job.job("j").unwrap();
        let here = old_delivery(Path::new("run/adapter"));
        assert_eq!(here.adapter(&job), dir.path().join("jobs/j/run/adapter"));
        let there = Path::new("/elsewhere/run/adapter");
        assert_eq!(old_delivery(there).adapter(&job), there);
    }

    #[tokio::test]
    async fn a_digest_is_computed_again_only_for_a_file_that_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let write = |text: &str, seconds: u64| {
            fs_err::write(&path, text).unwrap();
            let at = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds);
            let file = fs_err::OpenOptions::new().write(true).open(&path).unwrap();
            file.file().set_modified(at).unwrap();
        };
        write("abc", 0);
        let mut delivery = old_delivery(dir.path());
        let first = delivery.seal(&path).await.unwrap();
        // As a later worker reads it.
        let text = serde_json::to_string(&delivery).unwrap();
        let mut delivery: Delivery = serde_json::from_str(&text).unwrap();
        write("abd", 0);
        assert_eq!(delivery.seal(&path).await.unwrap(), first, "it is not read");
        write("abd", 1);
        let second = delivery.seal(&path).await.unwrap();
        assert_ne!(second, first);
        write("abcd", 1);
        assert_ne!(delivery.seal(&path).await.unwrap(), second);
        assert_eq!(delivery.digests.len(), 1);
    }
}
