//! Whether the storage takes an adapter, asked before hours go into training it.

use serde_json::json;

use super::context::Context;
use super::deliver::CONTENT_TYPES;
use super::log::Log;
use super::supabase::{BucketLimits, Supabase};
use crate::config::TrainConfig;
use crate::config::model::ModelConfig;
use crate::error::Result;
use crate::export::adapter::file_bytes;
use crate::store::locate::locate;
use crate::train::memory::Planner;

/// Types without which there is no delivery: all but the texts beside an adapter.
const NEEDED: [&str; 3] = [CONTENT_TYPES[0], CONTENT_TYPES[1], CONTENT_TYPES[3]];
/// What the check names, and never fills.
const PROBE: &str = "adapters/preflight-probe";
/// Statuses of a storage that will not take the file later either.
const REFUSALS: [u16; 3] = [404, 413, 415];

/// Why an adapter may not get into the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoRoom {
    /// It will not be taken, and what to do.
    Refused(String),
    /// The storage cannot be asked.
    Unknown(String),
}

/// Whether the adapter of `config` can be stored. A storage that cannot be asked stops nothing.
///
/// # Errors
/// Why not and what to do, for a person.
pub async fn check(
    context: &Context,
    config: &TrainConfig,
    log: &Log,
) -> std::result::Result<(), String> {
    let (Some(supabase), Ok(num_bytes)) = (&context.supabase, adapter_bytes(context, config))
    else {
        return Ok(());
    };
    match ask(supabase, &context.env.bucket, num_bytes, &NEEDED).await {
        Ok(()) => Ok(()),
        Err(NoRoom::Unknown(reason)) => {
            log.warn(&format!(
                "whether the storage takes the adapter is not known: {reason}"
            ));
            Ok(())
        }
        Err(NoRoom::Refused(reason)) => Err(format!(
            "the adapter could not be stored, so it is not trained: {reason}"
        )),
    }
}

/// Asks the bucket and the project whether they take files of `types`, the largest of `num_bytes`.
///
/// # Errors
/// [`NoRoom`].
pub async fn ask(
    supabase: &Supabase,
    bucket: &str,
    num_bytes: u64,
    types: &[&str],
) -> std::result::Result<(), NoRoom> {
    let limits = supabase.bucket_limits(bucket).await;
    if let Some(reason) = limits
        .as_ref()
        .ok()
        .and_then(|limits| lacks(limits, bucket, num_bytes, types))
    {
        return Err(NoRoom::Refused(reason));
    }
    let asked = supabase
        .check_limit(bucket, PROBE, CONTENT_TYPES[0], num_bytes)
        .await;
    match (asked, limits) {
        (Err(error), _) if REFUSALS.contains(&error.status) => {
            Err(NoRoom::Refused(error.to_string()))
        }
        (Err(error), _) | (_, Err(error)) => Err(NoRoom::Unknown(error.to_string())),
        (Ok(()), Ok(_)) => Ok(()),
    }
}

/// Bytes of the adapter that `config` trains.
fn adapter_bytes(context: &Context, config: &TrainConfig) -> Result<u64> {
    let dir = locate(&config.base_model, &context.engine)?;
    let model = ModelConfig::from_file(dir.join("config.json"))?;
    let planner = Planner::new(config, &model, 1)?;
    let adapter = &planner.decoder().adapter;
    Ok(file_bytes(adapter, config.adapter_dtype))
}

/// What a bucket lacks for files of `types`, the largest of `num_bytes`.
fn lacks(limits: &BucketLimits, bucket: &str, num_bytes: u64, types: &[&str]) -> Option<String> {
    let taken = &limits.allowed_mime_types;
    let missing: Vec<&str> = types
        .iter()
        .copied()
        .filter(|wanted| !taken.is_empty() && !taken.iter().any(|kind| covers(kind, wanted)))
        .collect();
    if !missing.is_empty() {
        return Some(format!(
            "bucket `{bucket}` takes only {}, expected {} too; allow them",
            json!(taken),
            missing.join(", ")
        ));
    }
    let limit = limits.file_size_limit.filter(|limit| *limit < num_bytes)?;
    Some(format!(
        "bucket `{bucket}` takes files of up to {limit} bytes, an adapter of {num_bytes} is expected; raise its limit"
    ))
}

/// Whether a bucket's allowed type, which may be `application/*` or `*/*`, takes files of type `wanted`.
fn covers(allowed: &str, wanted: &str) -> bool {
    match allowed.strip_suffix('*') {
        Some("*/") => true,
        Some(kind) => wanted.starts_with(kind),
        None => allowed == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_may_name_a_family_of_types() {
        let takes = |allowed: &str| CONTENT_TYPES.map(|wanted| covers(allowed, wanted));
        assert_eq!(takes("*/*"), [true; 4]);
        assert_eq!(takes("application/*"), [true, true, false, true]);
        assert_eq!(takes("application/gzip"), [true, false, false, false]);
        assert_eq!(takes("image/png"), [false; 4]);
    }

    #[test]
    fn a_bucket_lacks_types_or_room() {
        let limits = BucketLimits {
            file_size_limit: Some(7),
            allowed_mime_types: vec!["application/*".to_owned()],
        };
        let lacks = |bytes, types: &[&str]| lacks(&limits, "b", bytes, types);
        assert_eq!(lacks(7, &NEEDED), None);
        assert!(lacks(8, &NEEDED).unwrap().contains("up to 7 bytes"));
        assert!(lacks(7, &CONTENT_TYPES).unwrap().contains("text/plain"));
    }
}
