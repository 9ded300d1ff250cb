//! A job's base model: found and known for what it is, or downloaded where that is allowed.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde_json::Value;

use super::context::Context;
use super::identity;
use super::log::Log;
use super::model::{self, NotFound};
use super::net::fetch::{Limits, Via, fetch};
use super::net::{Cancel, Canceller, Error, Kind};
use super::state::JobDir;
use super::wanted::{INDEX_FILE, RepoFile, Wanted, free_bytes};

const HUB: &str = "https://huggingface.co";
/// Most bytes of a listing.
const LISTING_BYTES: u64 = 64 << 20;
/// Most bytes of a model's file.
const FILE_BYTES: u64 = 1 << 40;
/// In a model's directory: who is downloading it.
const HOLD: &str = ".download";
/// Between two looks whether who downloads it is through.
const POLL: Duration = Duration::from_millis(500);
/// Time for one file.
const DEADLINE: Duration = Duration::from_hours(12);

/// The directory of base model `id`. Never another model than that.
///
/// # Errors
/// For a person: every place that was tried, what differs, what is missing.
pub async fn get(
    context: &Context,
    id: &str,
    log: &Log,
    cancel: &Cancel,
) -> Result<PathBuf, Error> {
    let dir = match find(context, id).await? {
        Ok(found) => {
            found.warnings.iter().for_each(|text| log.warn(text));
            found.dir
        }
        Err(error) if context.env.allow_download => {
            log.info(&format!(
                "base model `{id}` is nowhere on this machine; downloading it"
            ));
            log.debug(&error.to_string());
            bring(context, id, log, cancel).await?.dir
        }
        Err(error) => {
            let text = format!("{error}\nBRIGHTRUN_ALLOW_DOWNLOAD=1 lets the worker download it");
            return Err(Error::new(Kind::NotFound, text));
        }
    };
    let identity =
        identity::check(id, &dir).map_err(|error| Error::new(Kind::NotFound, error.to_string()))?;
    identity.notes.iter().for_each(|text| log.info(text));
    log.info(&format!("base model `{id}`: {}", dir.display()));
    Ok(dir)
}

/// Looks on another thread: a network volume takes its time.
async fn find(context: &Context, id: &str) -> Result<Result<model::Found, NotFound>, Error> {
    let (id, roots) = (id.to_owned(), context.roots());
    let found = tokio::task::spawn_blocking(move || model::resolve(&id, &roots)).await;
    found.map_err(|error| Error::new(Kind::Io, error.to_string()))
}

/// Where a downloaded model goes: `models/<organisation>/<name>` of the first volume that is there, else beside the state.
fn target(context: &Context, id: &str) -> PathBuf {
    let mut volumes = context.roots().volumes.into_iter();
    let root = volumes.find(|path| path.is_dir());
    let root = root.unwrap_or_else(|| context.state.root().to_owned());
    root.join("models").join(id)
}

/// Downloads base model `id` while no other worker does: they may share the volume. What another has brought meanwhile is taken.
async fn bring(
    context: &Context,
    id: &str,
    log: &Log,
    cancel: &Cancel,
) -> Result<model::Found, Error> {
    let of_disk = |error: crate::error::Error| Error::new(Kind::Io, error.to_string());
    let dir = target(context, id).join(HOLD);
    let mut told = false;
    loop {
        let (lost, was_lost) = Canceller::new();
        let hold = JobDir::open(dir.clone()).map_err(of_disk)?;
        let lease = match context.holder.acquire(&hold, log, &lost) {
            // Its holder was through just now.
            Err(crate::error::Error::Io(error)) if error.kind() == ErrorKind::NotFound => continue,
            lease => lease.map_err(of_disk)?,
        };
        let Some(lease) = lease else {
            if !told {
                log.info("another worker is downloading it; waiting");
                told = true;
            }
            cancel.or(tokio::time::sleep(POLL)).await?;
            continue;
        };
        let mut found = find(context, id).await?;
        let mut done = Ok(());
        if found.is_err() {
            let downloaded = was_lost.or(download(context, id, log, cancel)).await;
            if lease.is_lost() {
                continue;
            }
            done = downloaded.flatten();
            found = find(context, id).await?;
        }
        if let Err(error) = lease.remove() {
            log.warn(&error.to_string());
        }
        done?;
        return found.map_err(|error| Error::new(Kind::NotFound, error.to_string()));
    }
}

async fn download(context: &Context, id: &str, log: &Log, cancel: &Cancel) -> Result<(), Error> {
    let hub = Hub {
        context,
        base: context
            .env
            .hub_url
            .as_deref()
            .unwrap_or(HUB)
            .trim_end_matches('/'),
        id,
        cancel,
    };
    let dir = target(context, id);
    fs_err::create_dir_all(&dir)?;
    let (revision, listing) = hub.listing(&dir).await?;
    let index = match listing.iter().find(|file| file.path == INDEX_FILE) {
        Some(file) => {
            hub.file(&revision, file, &dir).await?;
            Some(fs_err::read(dir.join(INDEX_FILE))?)
        }
        None => None,
    };
    let refuse = |error: super::wanted::WantedError| Error::new(Kind::NotFound, error.to_string());
    let wanted = Wanted::choose(id, &listing, index.as_deref()).map_err(refuse)?;
    let is_here = |file: &&RepoFile| {
        dir.join(&file.path)
            .metadata()
            .is_ok_and(|data| data.len() == file.size)
    };
    let here: u64 = wanted
        .files
        .iter()
        .filter(is_here)
        .map(|file| file.size)
        .sum();
    let free = free_bytes(&dir).map_err(refuse)?;
    wanted
        .check_space(id, &dir, free.saturating_add(here))
        .map_err(refuse)?;
    for (number, file) in wanted.files.iter().enumerate() {
        if is_here(&file) {
            continue;
        }
        log.info(&format!(
            "{} ({} bytes), file {} of {}",
            file.path,
            file.size,
            number + 1,
            wanted.files.len()
        ));
        hub.file(&revision, file, &dir).await?;
    }
    Ok(())
}

/// A repository of the hub.
struct Hub<'a> {
    context: &'a Context,
    base: &'a str,
    id: &'a str,
    cancel: &'a Cancel,
}

impl Hub<'_> {
    /// Commit and files.
    async fn listing(&self, dir: &Path) -> Result<(String, Vec<RepoFile>), Error> {
        let to = dir.join(".listing.json");
        let url = format!("{}/api/models/{}?blobs=true", self.base, self.id);
        let limits = Limits {
            max_bytes: LISTING_BYTES,
            ..Limits::default()
        };
        self.fetch(&url, &to, &limits).await?;
        let bytes = fs_err::read(&to)?;
        fs_err::remove_file(&to)?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|error| {
            Error::new(
                Kind::Corrupt,
                format!("the hub's listing is no JSON: {error}"),
            )
        })?;
        let revision = json["sha"].as_str().unwrap_or("main").to_owned();
        let file = |entry: &Value| {
            Some(RepoFile {
                path: entry["rfilename"].as_str()?.to_owned(),
                size: entry["size"]
                    .as_u64()
                    .or_else(|| entry["lfs"]["size"].as_u64())?,
                sha256: entry["lfs"]["sha256"].as_str().map(str::to_owned),
            })
        };
        let entries = json["siblings"].as_array().cloned().unwrap_or_default();
        Ok((revision, entries.iter().filter_map(file).collect()))
    }

    /// A file at a commit, whole or not at all; begun ones are gone on with.
    async fn file(&self, revision: &str, file: &RepoFile, dir: &Path) -> Result<(), Error> {
        let to = dir.join(&file.path);
        if let Some(parent) = to.parent() {
            fs_err::create_dir_all(parent)?;
        }
        let url = format!("{}/{}/resolve/{revision}/{}", self.base, self.id, file.path);
        let limits = Limits {
            max_bytes: FILE_BYTES,
            deadline: DEADLINE,
            expected_bytes: Some(file.size),
            expected_sha256: file.sha256.clone(),
            ..Limits::default()
        };
        self.fetch(&url, &to, &limits).await
    }

    async fn fetch(&self, url: &str, to: &Path, limits: &Limits) -> Result<(), Error> {
        let token = &self.context.env.hub_token;
        let mut headers = HeaderMap::new();
        // The token goes to the hub alone: on another origin it is dropped.
        if !token.is_empty() {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| {
                Error::new(
                    Kind::Refused(0),
                    "HF_TOKEN has characters that no header may have",
                )
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let via = Via::Guard(&self.context.guard);
        let fetched = fetch(via, url, &headers, to, limits, self.cancel, &mut |_, _| {}).await;
        match fetched {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.kind, Kind::Expired | Kind::NotFound) => {
                let text = format!(
                    "{error}; check the model's id, and that HF_TOKEN is set and allowed where the hub asks for consent"
                );
                Err(Error::new(Kind::NotFound, text))
            }
            Err(error) => Err(error),
        }
    }
}
