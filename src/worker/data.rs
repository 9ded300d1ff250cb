//! A job's data set: fetched before anything that costs time or money.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::HeaderMap;
use serde_json::Value;

use super::context::Context;
use super::job::Job;
use super::log::Log;
use super::net::fetch::{Limits, Via, fetch};
use super::net::gzip::{GzipCaps, check_unpacked, decompress_if_gzip};
use super::net::{Cancel, Error, Kind};
use super::row::Row;
use super::state::JobDir;
use super::supabase::Supabase;

/// File of a job's directory that holds its data.
const FILE: &str = "dataset.jsonl";
/// Written when the file is whole: a later attempt need not fetch it.
const FETCHED: &str = "dataset.json";
/// Buckets that the application keeps data sets in.
const BUCKETS: [&str; 2] = ["training-files", "lora-datasets"];
/// Time for the whole.
const DEADLINE: Duration = Duration::from_hours(2);
/// Time that an address signed anew is good for, in seconds.
const SIGNED_S: u64 = 3600;

/// The file with the data of `job`.
///
/// # Errors
/// For a person; [`Kind::Cancelled`].
pub async fn get(
    context: &Context,
    job: &Job,
    dir: &JobDir,
    log: &Log,
    cancel: &Cancel,
) -> Result<PathBuf, Error> {
    let to = dir.path(FILE);
    let is_whole = |size: u64| to.metadata().is_ok_and(|data| data.len() == size);
    // A run goes on with the data it began with; one that has not begun gets what is there now.
    let has_begun = dir.newest_checkpoint() > 0;
    if has_begun && dir.read::<u64>(FETCHED).is_some_and(is_whole) {
        log.info("the data set is here already");
        return Ok(to);
    }
    let url = job.dataset_url.secret();
    let fetched = match download(context, url, &to, cancel).await {
        // Its signature is over, or it waited too long in the queue.
        Err(error) if error.kind == Kind::Expired => {
            let signed = sign_anew(context, job, url).await;
            let url = signed.map_err(|reason| {
                let text = format!(
                    "dataset_url_expired: {}; sign it for longer than the job may wait ({reason})",
                    error.message
                );
                Error::new(Kind::Expired, text)
            })?;
            log.info("the address of the data set had expired; it was signed anew");
            download(context, &url, &to, cancel).await?
        }
        fetched => fetched?,
    };
    let caps = GzipCaps {
        max_bytes: context.env.max_dataset_bytes,
        ..GzipCaps::default()
    };
    let size = decompress_if_gzip(&to, caps, cancel)
        .await?
        .unwrap_or(fetched);
    check_unpacked(&to)?;
    let noted = dir.write(FETCHED, &size);
    noted.map_err(|error| Error::new(Kind::Io, error.to_string()))?;
    log.info(&format!("data set: {size} bytes"));
    Ok(to)
}

async fn download(context: &Context, url: &str, to: &Path, cancel: &Cancel) -> Result<u64, Error> {
    let limits = Limits {
        max_bytes: context.env.max_dataset_bytes,
        deadline: DEADLINE,
        ..Limits::default()
    };
    let via = Via::Guard(&context.guard);
    let fetched = fetch(
        via,
        url,
        &HeaderMap::new(),
        to,
        &limits,
        cancel,
        &mut |_, _| {},
    )
    .await?;
    Ok(fetched.bytes)
}

/// Signs the object of the data set again: the one the row names, else the one the expired address names. Else why not.
async fn sign_anew(context: &Context, job: &Job, url: &str) -> Result<String, String> {
    let Some(supabase) = &context.supabase else {
        return Err("without SUPABASE_URL the worker cannot sign it anew".to_owned());
    };
    let row = Row::new(supabase, &job.id).read().await.ok().flatten();
    let of_row = row.and_then(|row| {
        let path = row.get("dataset_file_path").and_then(Value::as_str)?;
        let path = path.trim_start_matches('/');
        let bucket = BUCKETS[0];
        let below = path.strip_prefix(bucket);
        let path = below
            .and_then(|rest| rest.strip_prefix('/'))
            .unwrap_or(path);
        (!path.is_empty()).then(|| (bucket.to_owned(), path.to_owned()))
    });
    let mut reason = "neither the row nor the address names a data set of this project".to_owned();
    for (bucket, path) in of_row.into_iter().chain(object_of(url, supabase)) {
        match supabase.sign(&bucket, &path, SIGNED_S).await {
            Ok(url) => return Ok(url),
            Err(error) => reason = format!("signing it anew: {error}"),
        }
    }
    Err(reason)
}

/// Bucket and path of a signed address of this project's own storage. Only of the buckets that data sets are in: whoever may submit a
/// job may not read any other object with this worker's key.
fn object_of(url: &str, supabase: &Supabase) -> Option<(String, String)> {
    let url = url::Url::parse(url).ok()?;
    let (_, object) = url.path().split_once("/storage/v1/object/sign/")?;
    let (bucket, path) = object.split_once('/')?;
    let decode = |text: &str| -> Option<String> {
        let pair = format!("x={}", text.replace('+', "%2B"));
        url::form_urlencoded::parse(pair.as_bytes())
            .next()
            .map(|(_, value)| value.into_owned())
    };
    let (bucket, path) = (decode(bucket)?, decode(path)?);
    let is_open = supabase.owns(&url) && BUCKETS.contains(&bucket.as_str());
    is_open.then_some((bucket, path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn an_expired_address_names_its_object() {
        let project = |url| Supabase::new(url, Secret::new("key")).unwrap();
        let supabase = project("https://abc.supabase.co");
        let signed = |host: &str, bucket: &str| {
            format!("https://{host}/storage/v1/object/sign/{bucket}/u%201/training.jsonl?token=x")
        };
        for host in ["abc.supabase.co", "abc.storage.supabase.co"] {
            let found = object_of(&signed(host, "training-files"), &supabase);
            assert_eq!(
                found,
                Some(("training-files".to_owned(), "u 1/training.jsonl".to_owned()))
            );
        }
        // What is not a data set of this project is not signed for whoever asks.
        for (host, bucket) in [
            ("abc.supabase.co", "lora-models"),
            ("abc.supabase.co", "private"),
            ("abc.evil.example", "training-files"),
            ("other.supabase.co", "training-files"),
            ("abc.supabase.co:8443", "training-files"),
        ] {
            assert_eq!(
                object_of(&signed(host, bucket), &supabase),
                None,
                "{host} {bucket}"
            );
        }
        assert_eq!(object_of("https://abc.supabase.co/x/y", &supabase), None);
    }
}
