//! Whether a directory has a whole model. Of the weights only headers are read.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::Path;

use fs_err as fs;
use serde_json::Value;

use crate::plan::gb;
use crate::worker::job::is_name;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest header of a safetensors file, as the format has it.
const MAX_HEADER_LEN: u64 = 100_000_000;
/// Faults that are told; more are counted.
const MAX_FAULTS: usize = 8;

/// What a whole place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Whole {
    /// Bytes of its weights.
    pub(super) num_bytes: u64,
    /// Safetensors files.
    pub(super) num_files: usize,
}

/// Checks that `dir` has a config, a tokenizer and all weights.
///
/// # Errors
/// What is amiss, files by name with sizes found and expected.
pub(super) fn check(dir: &Path) -> Result<Whole, String> {
    match fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Err("is no directory".to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(match dir.symlink_metadata() {
                Ok(_) => "is a link to something that does not exist".to_owned(),
                Err(_) => "does not exist".to_owned(),
            });
        }
        Err(error) => return Err(format!("cannot be looked into: {}", error.kind())),
    }
    let mut faults = Vec::new();
    match read_json(dir, "config.json") {
        Ok(config) if !config["quantization_config"].is_null() => {
            let method = config["quantization_config"]["quant_method"].as_str();
            faults.push(format!(
                "it is quantised already ({}); a base is F32, BF16 or F16",
                method.unwrap_or("by an unnamed method")
            ));
        }
        Ok(_) => {}
        Err(fault) => faults.push(fault),
    }
    if let Err(fault) = read_json(dir, "tokenizer.json") {
        faults.push(fault);
    }
    if dir.join("tokenizer.model").is_file() && !dir.join("tokenizer.json").exists() {
        faults.push("it has `tokenizer.model`, which is not read; convert it".to_owned());
    }
    let whole = weights(dir, &mut faults);
    if faults.is_empty() {
        return Ok(whole);
    }
    let more = faults.len().saturating_sub(MAX_FAULTS);
    faults.truncate(MAX_FAULTS);
    if more > 0 {
        faults.push(format!("{more} more"));
    }
    Err(faults.join(", "))
}

fn read_json(dir: &Path, name: &str) -> Result<Value, String> {
    let bytes = match fs::read(dir.join(name)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(format!("`{name}` is missing"));
        }
        Err(error) => return Err(format!("`{name}` cannot be read: {}", error.kind())),
    };
    let len = bytes.len();
    serde_json::from_slice(&bytes)
        .map_err(|_| format!("`{name}` is no JSON ({len} bytes); it may be truncated"))
}

fn weights(dir: &Path, faults: &mut Vec<String>) -> Whole {
    let mut whole = Whole {
        num_bytes: 0,
        num_files: 0,
    };
    let shards = match shards(dir) {
        Ok(shards) => shards,
        Err(fault) => {
            faults.push(fault);
            return whole;
        }
    };
    for (shard, tensors) in &shards {
        match measure(dir, shard, tensors) {
            Ok(num_bytes) => {
                whole.num_bytes += num_bytes;
                whole.num_files += 1;
            }
            Err(fault) => faults.push(fault),
        }
    }
    let (good, all) = (whole.num_files, shards.len());
    if good < all && all > 1 {
        let bytes = gb(whole.num_bytes);
        faults.push(format!("{good} of {all} shards are whole, {bytes}"));
    }
    whole
}

/// The safetensors files of `dir` with the tensors that the index says are in each; a single file says so itself.
fn shards(dir: &Path) -> Result<BTreeMap<String, Vec<String>>, String> {
    if dir.join(INDEX_FILE).symlink_metadata().is_err() {
        if dir.join(SINGLE_FILE).symlink_metadata().is_ok() {
            return Ok(BTreeMap::from([(SINGLE_FILE.to_owned(), Vec::new())]));
        }
        return Err(no_weights(dir));
    }
    let index = read_json(dir, INDEX_FILE)?;
    shards_of(&index)
}

/// The files that an index names, each with its tensors.
///
/// # Errors
/// For what is no index, or names anything but files beside it.
pub(in crate::worker) fn shards_of(index: &Value) -> Result<BTreeMap<String, Vec<String>>, String> {
    let map = index["weight_map"]
        .as_object()
        .filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| format!("`{INDEX_FILE}` has no `weight_map`"))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().filter(|shard| is_name(shard));
        let shard = shard.ok_or_else(|| {
            format!("`{INDEX_FILE}` names a shard that is no plain file name for {tensor:?}")
        })?;
        shards
            .entry(shard.to_owned())
            .or_default()
            .push(tensor.clone());
    }
    Ok(shards)
}

/// What to say where there are neither index nor single file.
fn no_weights(dir: &Path) -> String {
    let names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let has = |kind: &str| names.iter().any(|name| name.ends_with(kind));
    if has(".safetensors") {
        format!("`{INDEX_FILE}` is missing, which says what the shards hold")
    } else if has(".bin") || has(".pt") || has(".pth") {
        "has weights as .bin or .pt, which are not read; download the .safetensors files".to_owned()
    } else if has(".gguf") {
        "has weights as .gguf, which are not read; download the .safetensors files".to_owned()
    } else {
        "has no weights (`model.safetensors` or an index with its shards)".to_owned()
    }
}

/// Bytes of a safetensors file that is as long as its header says and has `tensors`.
fn measure(dir: &Path, name: &str, tensors: &[String]) -> Result<u64, String> {
    let path = dir.join(name);
    let mut file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let is_link = path.symlink_metadata().is_ok();
            let link = if is_link {
                " (a link to a file that is not there)"
            } else {
                ""
            };
            return Err(format!("shard `{name}` is missing{link}"));
        }
        Err(error) => return Err(format!("shard `{name}` cannot be read: {}", error.kind())),
    };
    let unreadable =
        |error: std::io::Error| format!("shard `{name}` cannot be read: {}", error.kind());
    let len = file.metadata().map_err(unreadable)?.len();
    let truncated =
        |expected: &str| format!("shard `{name}` is truncated: {len} bytes, expected {expected}");
    let mut first = [0; 8];
    if len < 8 {
        return Err(truncated("a header of at least 8"));
    }
    file.read_exact(&mut first).map_err(unreadable)?;
    let header_len = u64::from_le_bytes(first);
    if header_len > MAX_HEADER_LEN {
        return Err(format!("shard `{name}` is no safetensors file"));
    }
    if len < 8 + header_len {
        return Err(truncated(&format!("a header of {}", 8 + header_len)));
    }
    let mut header = Vec::new();
    let mut head = file.take(header_len);
    head.read_to_end(&mut header).map_err(unreadable)?;
    let header: Value = serde_json::from_slice(&header)
        .map_err(|_| format!("shard `{name}` has a header that is no JSON; download it again"))?;
    let data_len = data_len(&header).ok_or_else(|| {
        format!("shard `{name}` has a header that makes no sense; download it again")
    })?;
    let expected = 8 + header_len + data_len;
    if len < expected {
        return Err(truncated(&expected.to_string()));
    }
    if len > expected {
        let reason =
            format!("shard `{name}` is {len} bytes, expected {expected}; download it again");
        return Err(reason);
    }
    match tensors
        .iter()
        .find(|tensor| header.get(tensor.as_str()).is_none())
    {
        Some(tensor) => Err(format!(
            "shard `{name}` has no tensor `{tensor}`, which the index says it has; download it again"
        )),
        None => Ok(len),
    }
}

/// Where the data of the last tensor end.
fn data_len(header: &Value) -> Option<u64> {
    let mut most = 0;
    for (name, info) in header.as_object()? {
        if name != "__metadata__" {
            let end = info["data_offsets"][1].as_u64()?;
            most = most.max(end);
        }
    }
    // Past this the file's length would not be a number.
    (most < u64::MAX / 2).then_some(most)
}
