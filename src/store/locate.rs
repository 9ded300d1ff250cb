//! Where the files of a base model are: a directory, or a hub id in the Hugging Face cache.

use std::path::{Path, PathBuf};

use crate::config::{Env, TrainConfig};
use crate::error::{Error, Result};

/// A model directory: `config.json` is there.
///
/// # Errors
/// [`Error::Missing`] with every path tried.
pub fn locate(base_model: &str, env: &Env) -> Result<PathBuf> {
    let mut candidates = vec![PathBuf::from(base_model)];
    if is_hub_id(base_model) {
        let repository = format!("models--{}", base_model.replace('/', "--"));
        if let Some(cache) = &env.hub_cache {
            candidates.extend(snapshots(&cache.join(repository)));
        }
    }
    for candidate in &candidates {
        if candidate.join("config.json").is_file() {
            return Ok(candidate.clone());
        }
    }
    let what = if is_hub_id(base_model) {
        format!(
            "config.json of base model `{base_model}` (give a directory, or download it into the hub cache first)"
        )
    } else {
        format!("config.json of base model `{base_model}`")
    };
    let tried = candidates
        .iter()
        .map(|dir| dir.join("config.json"))
        .collect();
    Err(Error::Missing { what, tried })
}

/// The snapshot that `refs/main` names, then all others.
fn snapshots(repository: &Path) -> Vec<PathBuf> {
    let dir = repository.join("snapshots");
    let mut found = Vec::new();
    if let Ok(revision) = fs_err::read_to_string(repository.join("refs/main")) {
        found.push(dir.join(revision.trim()));
    }
    let mut others: Vec<PathBuf> = fs_err::read_dir(&dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !found.contains(path))
        .collect();
    others.sort();
    found.extend(others);
    if found.is_empty() {
        found.push(dir);
    }
    found
}

/// Whether `text` looks like `organisation/name` (or a bare `name`) and not like a path.
pub fn is_hub_id(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let is_plain = |part: &&str| {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !part.is_empty() && part.bytes().all(legal) && !part.starts_with('.')
    };
    parts.len() == 2 && parts.iter().all(is_plain)
}

/// The id an adapter names as its base: the one asked for, never a path.
///
/// In this order: `base_model_id`; `base_model` where it was found by its id; `_name_or_path` of `config.json`; the
/// directory's name.
pub fn base_model_id(config: &TrainConfig, dir: &Path) -> String {
    if let Some(id) = &config.base_model_id {
        return id.clone();
    }
    if is_hub_id(&config.base_model) && dir != Path::new(&config.base_model) {
        return config.base_model.clone();
    }
    let written = fs_err::read_to_string(dir.join("config.json")).ok();
    let written = written.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    let written = written.and_then(|json| Some(json.get("_name_or_path")?.as_str()?.to_owned()));
    if let Some(id) = written.filter(|id| is_hub_id(id)) {
        return id;
    }
    if let Some(id) = id_of_snapshot(dir) {
        return id;
    }
    let full = fs_err::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let name = full.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// `organisation/name` where `dir` is a snapshot in the hub cache.
fn id_of_snapshot(dir: &Path) -> Option<String> {
    let repository = dir.parent()?.parent()?.file_name()?.to_str()?;
    let id = repository.strip_prefix("models--")?.replacen("--", "/", 1);
    is_hub_id(&id).then_some(id)
}
