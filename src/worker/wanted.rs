//! Which files of a hub repository a base model needs, and whether there is room for them.

use std::path::{Path, PathBuf};

use super::model::place::shards_of;
use crate::data::tokenizer::FILES as TOKENIZER_FILES;
use crate::plan::gb;

/// The index of a model in several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";
/// Room that is left beside a model: for data, checkpoints, the adapter.
const RESERVE_BYTES: u64 = 2_000_000_000;
/// A hub repository has fewer files.
const MAX_FILES: usize = 10_000;

/// A file of a repository, as the hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoFile {
    /// Path in the repository.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 in hex, where the hub tells it (large files).
    pub sha256: Option<String>,
}

/// What is to be downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Files, small ones first, so that a bad config is seen before a shard is fetched.
    pub files: Vec<RepoFile>,
    /// Bytes of all.
    pub num_bytes: u64,
}

/// Why a repository cannot be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum WantedError {
    /// The listing is not what a hub sends, or has no model that is read here.
    #[error("files of base model `{id}`: {reason}")]
    Listing {
        /// The model.
        id: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The disk is too small.
    #[error(
        "base model `{id}` takes {} and {} must stay free beside it, but {} has {} free; attach a larger volume or disk, or remove \
         models from it",
        gb(*needed), gb(RESERVE_BYTES), dir.display(), gb(*free)
    )]
    NoSpace {
        /// The model.
        id: String,
        /// Bytes of its files.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Where.
        dir: PathBuf,
    },
    /// The disk cannot be asked.
    #[error("free space of {}: {source}", dir.display())]
    Io {
        /// Where.
        dir: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Wanted {
    /// Chooses from the `listing` of repository `id`: config, tokenizer, weights as safetensors. With the bytes of the index, where
    /// there is one, exactly the shards that it names; without, all that look like shards.
    ///
    /// # Errors
    /// [`WantedError::Listing`] for a hostile path, a listing that makes no sense, a file that is missing from it.
    pub fn choose(
        id: &str,
        listing: &[RepoFile],
        index: Option<&[u8]>,
    ) -> Result<Self, WantedError> {
        let refuse = |reason| {
            let id = id.to_owned();
            WantedError::Listing { id, reason }
        };
        check_listing(listing).map_err(refuse)?;
        let weights = weights(listing, index).map_err(refuse)?;
        let is_small = |path: &str| {
            let own = ["config.json", "generation_config.json"];
            own.contains(&path) || TOKENIZER_FILES.contains(&path)
        };
        for name in ["config.json", "tokenizer.json"] {
            if !listing.iter().any(|file| file.path == name) {
                return Err(refuse(format!("there is no `{name}`, which is needed")));
            }
        }
        let mut files: Vec<RepoFile> = listing
            .iter()
            .filter(|file| is_small(&file.path) || weights.contains(&file.path.as_str()))
            .cloned()
            .collect();
        files.sort_by(|a, b| {
            let key = |file: &RepoFile| weights.contains(&file.path.as_str());
            key(a).cmp(&key(b)).then_with(|| a.path.cmp(&b.path))
        });
        let sum = files
            .iter()
            .try_fold(0u64, |sum, file| sum.checked_add(file.size));
        let num_bytes = sum.ok_or_else(|| refuse("the sizes add up to no number".to_owned()))?;
        Ok(Self { files, num_bytes })
    }

    /// Refuses a download of base model `id` that does not fit into the `free` bytes of `dir`.
    ///
    /// # Errors
    /// [`WantedError::NoSpace`] with the numbers.
    pub fn check_space(&self, id: &str, dir: &Path, free: u64) -> Result<(), WantedError> {
        if self.num_bytes.saturating_add(RESERVE_BYTES) <= free {
            return Ok(());
        }
        Err(WantedError::NoSpace {
            id: id.to_owned(),
            needed: self.num_bytes,
            free,
            dir: dir.to_owned(),
        })
    }
}

/// Bytes that this process can write into `dir`, or into what of its path there is.
///
/// # Errors
/// [`WantedError::Io`].
pub fn free_bytes(dir: &Path) -> Result<u64, WantedError> {
    let there = dir.ancestors().find(|path| path.exists());
    let there = there.filter(|path| !path.as_os_str().is_empty());
    let stat = rustix::fs::statvfs(there.unwrap_or(Path::new(".")));
    let stat = stat.map_err(|error| WantedError::Io {
        dir: dir.to_owned(),
        source: error.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A listing is input from outside, and its paths become paths here.
fn check_listing(listing: &[RepoFile]) -> Result<(), String> {
    if listing.len() > MAX_FILES {
        let len = listing.len();
        return Err(format!("{len} files, expected at most {MAX_FILES}"));
    }
    for file in listing {
        let path = &file.path;
        let is_plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        let is_hostile = |c: char| c.is_control() || c == '\\' || c == ':';
        if path.len() > 1024 || !path.split('/').all(is_plain) || path.contains(is_hostile) {
            let shown: String = path.chars().take(80).collect();
            return Err(format!(
                "{shown:?} is no path inside a repository; nothing is downloaded"
            ));
        }
        if let Some(sum) = &file.sha256
            && (sum.len() != 64 || !sum.bytes().all(|byte| byte.is_ascii_hexdigit()))
        {
            return Err(format!("`{path}` has a SHA-256 that is none"));
        }
    }
    let mut paths: Vec<&str> = listing.iter().map(|file| file.path.as_str()).collect();
    paths.sort_unstable();
    match paths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("`{}` is listed twice", pair[0])),
        None => Ok(()),
    }
}

/// Paths of the weights and of their index.
fn weights<'a>(listing: &'a [RepoFile], index: Option<&[u8]>) -> Result<Vec<&'a str>, String> {
    let find = |name: &str| {
        let mut paths = listing.iter().map(|file| file.path.as_str());
        paths.find(|path| *path == name)
    };
    let Some(index_path) = find(INDEX_FILE) else {
        return match find(SINGLE_FILE) {
            Some(single) => Ok(vec![single]),
            None => Err(no_weights(listing)),
        };
    };
    let mut chosen = vec![index_path];
    if let Some(bytes) = index {
        let index = serde_json::from_slice(bytes);
        let index = index.map_err(|_| format!("`{INDEX_FILE}` is no JSON"))?;
        for shard in shards_of(&index)?.keys() {
            let missing = || format!("`{INDEX_FILE}` names `{shard}`, which is not there");
            chosen.push(find(shard).ok_or_else(missing)?);
        }
        return Ok(chosen);
    }
    let numbered = || {
        let paths = listing.iter().map(|file| file.path.as_str());
        paths.filter_map(|path| Some((path, numbers(path)?)))
    };
    let Some((_, (_, count))) = numbered().next() else {
        // An index of one file.
        chosen.extend(find(SINGLE_FILE));
        return if chosen.len() == 2 {
            Ok(chosen)
        } else {
            Err(format!("there is `{INDEX_FILE}`, but no shard"))
        };
    };
    for number in 1..=count {
        let shard = numbered().find(|(_, numbers)| *numbers == (number, count));
        let missing = || format!("shard {number} of {count} is not there");
        chosen.push(shard.ok_or_else(missing)?.0);
    }
    Ok(chosen)
}

/// 3 and 41 of `model-00003-of-00041.safetensors`.
fn numbers(path: &str) -> Option<(usize, usize)> {
    let middle = path.strip_prefix("model-")?.strip_suffix(".safetensors")?;
    let (number, count) = middle.split_once("-of-")?;
    let count = count.parse().ok().filter(|count| *count <= MAX_FILES)?;
    Some((number.parse().ok()?, count))
}

fn no_weights(listing: &[RepoFile]) -> String {
    let has = |kind: &str| listing.iter().any(|file| file.path.ends_with(kind));
    let found = [".bin", ".pt", ".pth", ".gguf"]
        .into_iter()
        .find(|kind| has(kind));
    match found {
        Some(kind) => format!(
            "the weights are {kind} files, which are not read; choose a repository with `{SINGLE_FILE}` or its shards"
        ),
        None => format!("there are no weights (`{SINGLE_FILE}` or its shards)"),
    }
}
