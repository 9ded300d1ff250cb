//! Resumable uploads: the tus protocol 1.0.0, as the project's storage speaks it.
//!
//! An upload is created, filled by pieces of exactly 6 MiB, and after any trouble asked how far it is. Its address is
//! kept in a file, so that a later process goes on with it. One piece is in memory at a time.

use std::io::{Read, Seek, SeekFrom};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fs_err as fs;
use reqwest::{Method, RequestBuilder, header};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;
use url::Url;

use super::error::ServiceError;
use super::storage::{
    PIECE_BYTES, PIECE_TIMEOUT, Upload, advice, file_sha256, header_number, upload_backoff,
    wait_or_give_up,
};
use super::{Result, Supabase, TIMEOUT, at};
use crate::worker::net::fetch::OnProgress;
use crate::worker::net::files::{remove, replace};

const OFFSET: &str = "Upload-Offset";
const LENGTH: &str = "Upload-Length";
/// Times an upload may be begun, and times its creation may meet a conflict.
const STARTS: u32 = 4;

/// What a later process needs to go on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    location: String,
    bucket: String,
    path: String,
    size: u64,
    sha256: String,
}

/// An upload under way.
struct Pieces<'a> {
    project: &'a Supabase,
    upload: &'a Upload,
    size: u64,
    sha256: String,
    location: Option<Url>,
    /// How far the server is; asked for if unknown.
    offset: Option<u64>,
    starts: u32,
    /// The last piece went out, though perhaps without an answer.
    all_sent: bool,
}

impl Supabase {
    pub(super) async fn upload_in_pieces(
        &self,
        upload: &Upload,
        size: u64,
        on_progress: OnProgress<'_>,
    ) -> Result<()> {
        let mut deadline = Instant::now() + upload.deadline;
        let sha256 = match &upload.sha256 {
            Some(known) => known.clone(),
            None => file_sha256(&upload.file)
                .await
                .map_err(|e| ServiceError::of_io(&e))?,
        };
        let mut pieces = Pieces {
            project: self,
            upload,
            size,
            sha256,
            location: None,
            offset: None,
            starts: 0,
            all_sent: false,
        };
        pieces.location = pieces.saved();
        let mut backoff = upload_backoff(upload);
        loop {
            match pieces.step().await {
                Ok(offset) => {
                    backoff.reset();
                    // What goes on, however slowly, is not given up.
                    deadline = Instant::now() + upload.deadline;
                    on_progress(offset, Some(size));
                    if offset == size {
                        return pieces.forget();
                    }
                }
                Err(error) => {
                    let Some(error) = pieces.recover(error).await? else {
                        on_progress(size, Some(size));
                        return pieces.forget();
                    };
                    wait_or_give_up(error, &mut backoff, deadline, &upload.bucket, size).await?;
                }
            }
        }
    }

    /// Whether the project takes a file of `size` bytes: an upload to `bucket` and `path` is begun and given up at once.
    /// The bucket's own limit is not seen so; see [`Supabase::bucket_limits`].
    ///
    /// # Errors
    /// [`ServiceError`]; status 413 if the size is over the project's global limit, 415 for the media type, 404 for the
    /// bucket, 401 or 403 for the key.
    pub async fn check_limit(
        &self,
        bucket: &str,
        path: &str,
        content_type: &str,
        size: u64,
    ) -> Result<()> {
        let created = self.create(bucket, path, content_type, size, None).await;
        let location = created.map_err(|error| {
            let advice = advice(error.status, bucket, size);
            error.during(
                &format!("asking whether {size} bytes may be stored"),
                &advice,
            )
        })?;
        // Left alone it would expire by itself.
        let _ = self
            .send(self.tus(Method::DELETE, location).timeout(TIMEOUT))
            .await;
        Ok(())
    }

    /// Begins an upload and gives its address.
    async fn create(
        &self,
        bucket: &str,
        path: &str,
        content_type: &str,
        size: u64,
        sha256: Option<&str>,
    ) -> Result<Url> {
        let mut metadata = format!(
            "bucketName {},objectName {},contentType {},cacheControl {}",
            STANDARD.encode(bucket),
            STANDARD.encode(path),
            STANDARD.encode(content_type),
            STANDARD.encode("3600")
        );
        if let Some(sha256) = sha256 {
            let own = json!({ "sha256": sha256 }).to_string();
            metadata.push_str(&format!(",metadata {}", STANDARD.encode(own)));
        }
        let url = at(&self.storage_url, ["storage", "v1", "upload", "resumable"]);
        let request = self
            .tus(Method::POST, url.clone())
            .header(LENGTH, size)
            .header("Upload-Metadata", metadata)
            .timeout(TIMEOUT);
        let response = self.send(request).await?;
        let location = response
            .headers()
            .get(header::LOCATION)
            .and_then(|v| v.to_str().ok());
        let location = location.ok_or_else(|| {
            ServiceError::unexpected("a begun upload has no `Location`".to_owned())
        })?;
        self.own_address(&url, location)
    }

    /// The address of an upload, which must be on a host of the project: the key goes there.
    fn own_address(&self, created_at: &Url, location: &str) -> Result<Url> {
        let foreign = |place: &str| {
            ServiceError::local(
                "ForeignLocation",
                format!(
                    "storage sent the upload to {place}, expected its own host; the key does not go there"
                ),
            )
        };
        let mut url = created_at
            .join(location)
            .map_err(|_| foreign("no address"))?;
        // Behind a proxy that ends TLS the server may not know that it is https.
        if url.scheme() == "http" && created_at.scheme() == "https" {
            url.set_scheme("https")
                .map_err(|()| foreign("no address"))?;
        }
        let own = [&self.storage_url, &self.url];
        if own.iter().any(|base| base.origin() == url.origin()) {
            return Ok(url);
        }
        Err(foreign(&url.origin().ascii_serialization()))
    }

    fn tus(&self, method: Method, url: Url) -> RequestBuilder {
        self.request(method, url)
            .header("Tus-Resumable", "1.0.0")
            .header("x-upsert", "true")
    }
}

impl Pieces<'_> {
    /// Brings the upload one piece further, and tells how far it is.
    async fn step(&mut self) -> Result<u64> {
        let location = match &self.location {
            Some(location) => location.clone(),
            None => self.begin().await?,
        };
        let offset = match self.offset {
            Some(offset) => offset,
            None => self.ask(&location).await?,
        };
        self.offset = Some(offset);
        if offset == self.size {
            return Ok(offset);
        }
        let piece = self
            .read_piece(offset)
            .map_err(|e| ServiceError::of_io(&e))?;
        let end = offset + piece.len() as u64;
        self.all_sent |= end == self.size;
        let request = self
            .project
            .tus(Method::PATCH, location)
            .header(OFFSET, offset)
            .header(header::CONTENT_TYPE, "application/offset+octet-stream")
            .body(piece)
            .timeout(PIECE_TIMEOUT);
        let response = self.project.send(request).await?;
        let reached = header_number(response.headers(), OFFSET);
        match reached {
            Some(reached) if reached > offset && reached <= end => {
                self.offset = Some(reached);
                Ok(reached)
            }
            _ => Err(ServiceError::unexpected(format!(
                "storage is at {reached:?} after bytes {offset} to {end} were sent"
            ))),
        }
    }

    async fn begin(&mut self) -> Result<Url> {
        self.starts += 1;
        let up = self.upload;
        let created = self
            .project
            .create(
                &up.bucket,
                &up.path,
                &up.content_type,
                self.size,
                Some(&self.sha256),
            )
            .await;
        let location = created.map_err(|mut error| {
            error.retryable &= error.status != 409 || self.starts < STARTS;
            error
        })?;
        self.save(&location)?;
        self.location = Some(location.clone());
        self.offset = Some(0);
        Ok(location)
    }

    /// How far the server is.
    async fn ask(&self, location: &Url) -> Result<u64> {
        let request = self
            .project
            .tus(Method::HEAD, location.clone())
            .timeout(TIMEOUT);
        let response = self.project.send_again(request).await?;
        let offset = header_number(response.headers(), OFFSET);
        let length = header_number(response.headers(), LENGTH);
        match offset {
            Some(offset) if offset <= self.size && length.is_none_or(|l| l == self.size) => {
                Ok(offset)
            }
            _ => {
                // Not the upload of this file.
                let mut error = ServiceError::unexpected(format!(
                    "storage is at {offset:?} of {length:?} bytes, the file has {}",
                    self.size
                ));
                error.status = 410;
                Err(error)
            }
        }
    }

    /// After an error: `None` if the object is complete all the same, else the error to wait upon, with everything
    /// prepared for the next step.
    async fn recover(&mut self, mut error: ServiceError) -> Result<Option<ServiceError>> {
        self.offset = None;
        if self.location.is_none() || !matches!(error.status, 404 | 410) {
            return Ok(Some(error));
        }
        let up = self.upload;
        if self.all_sent
            && let Ok(found) = self.project.digest(&up.bucket, &up.path, self.size).await
            && found == self.sha256
        {
            return Ok(None);
        }
        self.location = None;
        self.all_sent = false;
        self.forget()?;
        error.retryable = self.starts < STARTS;
        Ok(Some(error))
    }

    fn read_piece(&self, offset: u64) -> std::io::Result<Vec<u8>> {
        let length = PIECE_BYTES.min(self.size - offset);
        let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
        let mut file = fs::File::open(&self.upload.file)?;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(&mut piece)?;
        Ok(piece)
    }

    /// The address of an earlier upload of the same bytes to the same place.
    fn saved(&self) -> Option<Url> {
        let text = fs::read(self.upload.state.as_ref()?).ok()?;
        let saved: State = serde_json::from_slice(&text).ok()?;
        let url = self
            .project
            .own_address(&self.project.storage_url, &saved.location)
            .ok()?;
        (saved == self.state(&url)).then_some(url)
    }

    fn save(&self, location: &Url) -> Result<()> {
        let Some(path) = &self.upload.state else {
            return Ok(());
        };
        let text = serde_json::to_vec(&self.state(location))
            .map_err(|error| ServiceError::local("Io", error.to_string()))?;
        replace(path, &text).map_err(|e| ServiceError::of_io(&e))
    }

    fn state(&self, location: &Url) -> State {
        State {
            location: location.to_string(),
            bucket: self.upload.bucket.clone(),
            path: self.upload.path.clone(),
            size: self.size,
            sha256: self.sha256.clone(),
        }
    }

    fn forget(&self) -> Result<()> {
        match &self.upload.state {
            Some(path) => remove(path).map_err(|e| ServiceError::of_io(&e)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::secret::Secret;

    #[test]
    fn the_key_stays_with_the_project() {
        let project = Supabase::new("https://abc.supabase.co", Secret::new("k")).unwrap();
        let created =
            Url::parse("https://abc.storage.supabase.co/storage/v1/upload/resumable").unwrap();
        for own in [
            "https://abc.storage.supabase.co/storage/v1/upload/resumable/x",
            "https://abc.supabase.co/storage/v1/upload/resumable/x",
            "http://abc.supabase.co/storage/v1/upload/resumable/x",
            "/storage/v1/upload/resumable/x",
            "resumable/x",
        ] {
            let url = project.own_address(&created, own).unwrap();
            assert_eq!(url.scheme(), "https", "{own}");
        }
        for foreign in [
            "https://evil.example/x",
            "https://abc.supabase.co.evil.example/x",
            "https://abc.supabase.co:444/x",
            "http://abc.supabase.co:8443/x",
            "//evil.example/x",
            "https://def.supabase.co/x",
        ] {
            assert!(project.own_address(&created, foreign).is_err(), "{foreign}");
        }
    }
}
