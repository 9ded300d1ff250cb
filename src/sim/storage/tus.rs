//! Resumable uploads: the TUS 1.0.0 protocol at `/storage/v1/upload/resumable`.
//!
//! A piece counts only when the whole of it has arrived; what a broken connection left behind is forgotten.

use std::collections::HashMap;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderName, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::objects::{self, Received, Target};
use super::{Refusal, check_keys};
use crate::hex::hex;
use crate::sim::server::{Call, empty_reply, set};
use crate::sim::wire::{drain, next_chunk};
use crate::sim::{Shared, clock};

/// An upload on its way.
#[derive(Debug)]
pub(in crate::sim) struct Upload {
    target: Target,
    length: u64,
    offset: u64,
    hash: Sha256,
    /// Absent while a request writes to it, which is the upload's lock.
    file: Option<NamedTempFile>,
    created: Instant,
}

const FOLDER: &str = "/storage/v1/upload/resumable";

/// Answers a request of the protocol.
pub(in crate::sim) async fn answer(call: Call, mut body: Option<Body>) -> Response {
    let answer = carry_out(&call, &mut body).await;
    if let Some(body) = body {
        drain(body).await;
    }
    let mut response = answer.unwrap_or_else(|refusal| refusal.text());
    set(
        &mut response,
        HeaderName::from_static("tus-resumable"),
        "1.0.0",
    );
    response
}

async fn carry_out(call: &Call, body: &mut Option<Body>) -> Result<Response, Refusal> {
    if call.method == "OPTIONS" {
        let mut response = empty_reply(204);
        set(
            &mut response,
            HeaderName::from_static("tus-version"),
            "1.0.0",
        );
        set(
            &mut response,
            HeaderName::from_static("tus-extension"),
            "creation,expiration,termination",
        );
        let limit = call.shared.settings.file_size_limit.to_string();
        set(
            &mut response,
            HeaderName::from_static("tus-max-size"),
            &limit,
        );
        return Ok(response);
    }
    if let Some(response) = check_keys(call) {
        return Ok(response);
    }
    if call.header("tus-resumable") != Some("1.0.0") {
        return Err(refuse(412, "Tus-Resumable Required"));
    }
    let id = call
        .path
        .strip_prefix(FOLDER)
        .unwrap_or_default()
        .trim_start_matches('/');
    match (call.method.as_str(), id) {
        ("POST", "") => create(call),
        ("HEAD", id) => head(call, id),
        ("PATCH", id) => patch(call, id, body).await,
        ("DELETE", id) => {
            known(&call.shared, id)?;
            call.shared.change(|state| state.storage.uploads.remove(id));
            Ok(empty_reply(204))
        }
        _ => Err(refuse(404, "Not found")),
    }
}

fn refuse(status: u16, message: &str) -> Refusal {
    Refusal::new(status, "TusError", "TusError", message)
}

/// Starts an upload. Only the project-wide size limit is looked at here; the bucket's is at the first piece.
fn create(call: &Call) -> Result<Response, Refusal> {
    let shared = &call.shared;
    let length = call
        .header("upload-length")
        .and_then(|length| length.parse::<u64>().ok());
    let length = length
        .ok_or_else(|| refuse(400, "Upload-Length or Upload-Defer-Length header required"))?;
    if length > shared.settings.file_size_limit {
        return Err(refuse(413, "Maximum size exceeded"));
    }
    let metadata = metadata(call.header("upload-metadata").unwrap_or_default())
        .ok_or_else(|| refuse(400, "Upload-Metadata is invalid"))?;
    let take = |name: &str| metadata.get(name).cloned();
    let id = take("bucketName").ok_or_else(|| Refusal::invalid("Metadata header is required"))?;
    let path = take("objectName").unwrap_or_default();
    objects::check_key(&path)?;
    let bucket = objects::bucket(shared, &id)?;
    let mime = take("contentType").unwrap_or_else(|| "application/octet-stream".to_owned());
    objects::check_mime(bucket, &mime)?;
    let cache_control = match take("cacheControl") {
        Some(seconds) if seconds.parse::<i64>().is_ok() => format!("max-age={seconds}"),
        _ => "no-cache".to_owned(),
    };
    let target = Target {
        bucket: id,
        path,
        mime,
        cache_control,
        upsert: wants_upsert(call),
    };
    check_twin(shared, &target)?;
    let file =
        NamedTempFile::new_in(&shared.data_dir).map_err(|error| Refusal::internal(&error))?;
    let name = URL_SAFE_NO_PAD.encode(format!(
        "{}/{}/{}",
        target.bucket,
        target.path,
        clock::uuid()
    ));
    let upload = Upload {
        target,
        length,
        offset: 0,
        hash: Sha256::new(),
        file: Some(file),
        created: Instant::now(),
    };
    shared.change(|state| state.storage.uploads.insert(name.clone(), upload));
    if length == 0 {
        finish(shared, &name)?;
    }
    let mut response = empty_reply(201);
    set(
        &mut response,
        header::LOCATION,
        &format!("{}{FOLDER}/{name}", shared.base),
    );
    Ok(response)
}

/// `name base64, name base64`.
fn metadata(text: &str) -> Option<HashMap<String, String>> {
    let pairs = text
        .split(',')
        .map(str::trim)
        .filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once(' ').unwrap_or((pair, ""));
            let value = String::from_utf8(STANDARD.decode(value.trim()).ok()?).ok()?;
            Some((name.to_owned(), value))
        })
        .collect()
}

fn wants_upsert(call: &Call) -> bool {
    call.header("x-upsert") == Some("true")
}

/// Refuses to write over an object unless told to.
fn check_twin(shared: &Shared, target: &Target) -> Result<(), Refusal> {
    let exists = shared
        .lock()
        .storage
        .find(&target.bucket, &target.path)
        .is_some();
    if exists && !target.upsert {
        Err(Refusal::duplicate())
    } else {
        Ok(())
    }
}

/// Offset and length of an upload that is there and alive.
fn known(shared: &Shared, id: &str) -> Result<(u64, u64), Refusal> {
    let state = shared.lock();
    let upload = state
        .storage
        .uploads
        .get(id)
        .ok_or_else(|| refuse(404, "The file for this url was not found"))?;
    if upload.created.elapsed() > shared.settings.tus_lifetime {
        return Err(refuse(410, "The file for this url no longer exists"));
    }
    if upload.file.is_none() {
        return Err(Refusal::new(
            423,
            "ResourceLocked",
            "ResourceLocked",
            "The resource is locked",
        ));
    }
    Ok((upload.offset, upload.length))
}

fn head(call: &Call, id: &str) -> Result<Response, Refusal> {
    let (offset, length) = known(&call.shared, id)?;
    let mut response = empty_reply(200);
    set(
        &mut response,
        HeaderName::from_static("upload-offset"),
        &offset.to_string(),
    );
    set(
        &mut response,
        HeaderName::from_static("upload-length"),
        &length.to_string(),
    );
    set(&mut response, header::CACHE_CONTROL, "no-store");
    Ok(response)
}

/// Takes one piece.
async fn patch(call: &Call, id: &str, body: &mut Option<Body>) -> Result<Response, Refusal> {
    let shared = &call.shared;
    let (offset, length) = known(shared, id)?;
    let number = |name: &str| {
        call.header(name)
            .and_then(|number| number.parse::<u64>().ok())
    };
    if call.header("content-type") != Some("application/offset+octet-stream") {
        return Err(refuse(
            415,
            "Content-Type must be application/offset+octet-stream",
        ));
    }
    let sent_offset =
        number("upload-offset").ok_or_else(|| refuse(403, "Upload-Offset header required"))?;
    let piece =
        number("content-length").ok_or_else(|| refuse(400, "Content-Length header required"))?;
    if sent_offset != offset {
        return Err(refuse(409, "Upload-Offset conflict"));
    }
    check_piece(shared, id, offset, length, piece, wants_upsert(call))?;
    let mut hold = Hold::take(shared, id)?;
    hold.write(body.take().unwrap_or_default(), offset, piece)
        .await?;
    let next = offset + piece;
    hold.keep(next);
    if next == length {
        finish(shared, id)?;
    }
    let mut response = empty_reply(204);
    set(
        &mut response,
        HeaderName::from_static("upload-offset"),
        &next.to_string(),
    );
    Ok(response)
}

/// Refuses a piece of a wrong size, or of an upload its bucket does not want.
fn check_piece(
    shared: &Shared,
    id: &str,
    offset: u64,
    length: u64,
    piece: u64,
    upsert: bool,
) -> Result<(), Refusal> {
    let target = shared.change(|state| {
        let upload = state.storage.uploads.get_mut(id)?;
        upload.target.upsert = upsert;
        Some(upload.target.clone())
    });
    let target = target.ok_or_else(|| refuse(404, "The file for this url was not found"))?;
    check_twin(shared, &target)?;
    let limit = objects::size_limit(shared, objects::bucket(shared, &target.bucket)?);
    if length > limit || offset + piece > length {
        return Err(refuse(413, "Maximum size exceeded"));
    }
    let chunk = shared.settings.tus_chunk;
    if piece != chunk && offset + piece != length {
        return Err(refuse(
            400,
            &format!("a piece of {piece} bytes, {chunk} are wanted of all but the last"),
        ));
    }
    if piece > chunk {
        return Err(refuse(
            400,
            &format!("a piece of {piece} bytes, at most {chunk} are wanted"),
        ));
    }
    Ok(())
}

/// An upload's file while one request writes to it; goes back when dropped, whatever happened.
struct Hold {
    shared: Arc<Shared>,
    id: String,
    file: Option<NamedTempFile>,
    hash: Sha256,
    kept: Option<u64>,
}

impl Hold {
    fn take(shared: &Arc<Shared>, id: &str) -> Result<Self, Refusal> {
        let taken = shared.change(|state| {
            let upload = state.storage.uploads.get_mut(id)?;
            Some((upload.file.take()?, upload.hash.clone()))
        });
        let locked = || {
            Refusal::new(
                423,
                "ResourceLocked",
                "ResourceLocked",
                "The resource is locked",
            )
        };
        let (file, hash) = taken.ok_or_else(locked)?;
        Ok(Self {
            shared: Arc::clone(shared),
            id: id.to_owned(),
            file: Some(file),
            hash,
            kept: None,
        })
    }

    /// Writes a piece that must have `piece` bytes.
    async fn write(&mut self, mut body: Body, offset: u64, piece: u64) -> Result<(), Refusal> {
        let internal = |error: std::io::Error| Refusal::internal(&error);
        let Some(file) = &mut self.file else {
            return Err(refuse(500, "no file"));
        };
        file.as_file_mut().set_len(offset).map_err(internal)?;
        file.as_file_mut()
            .seek(SeekFrom::Start(offset))
            .map_err(internal)?;
        let mut written = 0;
        while let Some(chunk) = next_chunk(&mut body).await {
            let chunk = chunk.map_err(|_| refuse(400, "the body broke off"))?;
            file.write_all(&chunk).map_err(internal)?;
            self.hash.update(&chunk);
            written += chunk.len() as u64;
        }
        if written == piece {
            Ok(())
        } else {
            Err(refuse(400, "the body is shorter than its Content-Length"))
        }
    }

    /// The piece is whole: the next one begins at `offset`.
    fn keep(mut self, offset: u64) {
        self.kept = Some(offset);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.change(|state| {
            let Some(upload) = state.storage.uploads.get_mut(&self.id) else {
                return;
            };
            upload.file = self.file.take();
            if let Some(offset) = self.kept {
                upload.offset = offset;
                upload.hash = self.hash.clone();
            }
        });
    }
}

/// Makes a whole upload an object.
fn finish(shared: &Shared, id: &str) -> Result<(), Refusal> {
    let upload = shared.change(|state| state.storage.uploads.remove(id));
    let Some(Upload {
        target,
        length,
        hash,
        file: Some(file),
        ..
    }) = upload
    else {
        return Err(refuse(404, "The file for this url was not found"));
    };
    let received = Received {
        size: length,
        sha256: hex(&hash.finalize()),
        file,
    };
    objects::commit(shared, target, received)?;
    shared.change(|_| ());
    Ok(())
}
