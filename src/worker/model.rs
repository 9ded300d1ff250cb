//! Where the base model of a job lies: every place that is known is tried, and one counts only when it is whole.

pub(super) mod place;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::job::{is_model_id, is_name};

/// Where RunPod mounts a network volume (serverless, pods), and where images keep models.
pub const VOLUMES: [&str; 3] = ["/runpod-volume", "/workspace", "/models"];
/// Hub caches below a volume.
const CACHES: [&str; 2] = ["huggingface-cache/hub", ".cache/huggingface/hub"];

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `MODEL_PATH`: a model's directory. Tried first.
    pub model_path: Option<PathBuf>,
    /// Volumes, in order.
    pub volumes: Vec<PathBuf>,
    /// The hub cache, `HF_HOME/hub`. Tried last.
    pub hub_cache: Option<PathBuf>,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            model_path: None,
            volumes: VOLUMES.map(PathBuf::from).to_vec(),
            hub_cache: None,
        }
    }
}

/// A base model that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes of its weights.
    pub num_bytes: u64,
    /// Safetensors files.
    pub num_files: usize,
    /// Places before it that are there but not whole, and why.
    pub warnings: Vec<String>,
}

/// A place that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// Where.
    pub path: PathBuf,
    /// Why not.
    pub reason: String,
    /// Whether there is anything.
    pub exists: bool,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

/// No place has the base model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFound {
    /// The model that was asked for.
    pub id: String,
    /// Every place, in order.
    pub tried: Vec<Tried>,
}

impl NotFound {
    /// Whether there is a place that has the model in part.
    pub fn is_partly_there(&self) -> bool {
        self.tried.iter().any(|tried| tried.exists)
    }
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, name) = (&self.id, name_of(&self.id));
        let tried: Vec<String> = self.tried.iter().map(Tried::to_string).collect();
        let help = if self.is_partly_there() {
            "download again what is not whole".to_owned()
        } else {
            format!(
                "put it into `models/{name}` of the network volume, check that the endpoint has that volume, or let the worker download it"
            )
        };
        write!(
            f,
            "base model `{id}` not found; {help}; tried\n  {}",
            tried.join("\n  ")
        )
    }
}

impl std::error::Error for NotFound {}

/// The first place that has all of model `id`: `config.json`, `tokenizer.json` and every shard of the index in its right size.
///
/// Whether it is the model it should be is for [`super::identity::check`] to say.
///
/// # Errors
/// [`NotFound`] with every place and why it was not taken.
pub fn resolve(id: &str, roots: &Roots) -> Result<Found, NotFound> {
    let mut tried: Vec<Tried> = Vec::new();
    for path in candidates(id, roots) {
        if tried.iter().any(|other| other.path == path) {
            continue;
        }
        match place::check(&path) {
            Ok(whole) => {
                let partial = tried.iter().filter(|tried| tried.exists);
                return Ok(Found {
                    num_bytes: whole.num_bytes,
                    num_files: whole.num_files,
                    warnings: partial
                        .map(|tried| format!("{tried}; {} is used instead", path.display()))
                        .collect(),
                    dir: path,
                });
            }
            Err(reason) => {
                // Broken links are there too.
                let exists = path.symlink_metadata().is_ok();
                tried.push(Tried {
                    path,
                    reason,
                    exists,
                });
            }
        }
    }
    let id = id.to_owned();
    Err(NotFound { id, tried })
}

/// The part after the organisation.
fn name_of(id: &str) -> &str {
    id.rsplit('/').next().unwrap_or(id)
}

/// Every place, in order; some of them more than once.
fn candidates(id: &str, roots: &Roots) -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(path) = &roots.model_path {
        places.extend(of_model_path(path, roots));
    }
    if !is_model_id(id) {
        return places;
    }
    let repository = format!("models--{}", id.replace('/', "--"));
    for volume in &roots.volumes {
        let models = volume.join("models");
        places.extend(spelt(&models, name_of(id)));
        if let Some((organisation, name)) = id.split_once('/') {
            for dir in spelt(&models, organisation) {
                places.extend(spelt(&dir, name));
            }
        }
        for cache in CACHES {
            for repository in spelt(&volume.join(cache), &repository) {
                places.extend(snapshots(&repository));
            }
        }
    }
    if let Some(cache) = &roots.hub_cache {
        for repository in spelt(cache, &repository) {
            places.extend(snapshots(&repository));
        }
    }
    places
}

/// `MODEL_PATH`, a snapshot below it where it is a repository of the hub cache, and the same path on the other volumes: what a pod
/// has in `/workspace` a serverless worker has in `/runpod-volume`.
fn of_model_path(path: &Path, roots: &Roots) -> Vec<PathBuf> {
    let mut places = vec![path.to_owned()];
    let below = roots
        .volumes
        .iter()
        .find_map(|volume| path.strip_prefix(volume).ok());
    if let Some(below) = below {
        places.extend(roots.volumes.iter().map(|volume| volume.join(below)));
    }
    let repositories: Vec<PathBuf> = places
        .iter()
        .filter(|place| place.join("snapshots").is_dir())
        .cloned()
        .collect();
    places.extend(
        repositories
            .iter()
            .flat_map(|repository| snapshots(repository)),
    );
    places
}

/// `dir/name`, then entries of `dir` that differ from it in case alone.
fn spelt(dir: &Path, name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs_err::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|other| other != name && other.eq_ignore_ascii_case(name))
        .map(|other| dir.join(other))
        .collect();
    found.sort();
    found.insert(0, dir.join(name));
    found
}

/// The snapshot that `refs/main` names, then the others, newest first.
fn snapshots(repository: &Path) -> Vec<PathBuf> {
    let dir = repository.join("snapshots");
    let written = fs_err::read_to_string(repository.join("refs/main")).ok();
    let main = written.map(|text| text.trim().to_owned());
    let main = main.filter(|revision| is_name(revision));
    let mut found: Vec<PathBuf> = main
        .map(|revision| dir.join(revision))
        .into_iter()
        .collect();
    let changed = |path: &Path| {
        let time = fs_err::metadata(path).and_then(|meta| meta.modified());
        time.unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let mut others: Vec<(SystemTime, PathBuf)> = fs_err::read_dir(&dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !found.contains(path))
        .map(|path| (changed(&path), path))
        .collect();
    others.sort_by(|a, b| b.cmp(a));
    found.extend(others.into_iter().map(|(_, path)| path));
    if found.is_empty() {
        found.push(dir);
    }
    found
}
