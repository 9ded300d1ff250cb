//! Whether the model that was found is the one that was asked for: never another one in silence.

mod known;

use std::path::{Path, PathBuf};

use serde_json::Value;

use self::known::{Known, find, find_name};
use crate::error::{Error, Result};
use crate::store::locate::is_hub_id;

/// Why a model is not taken for the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It is another one.
    #[error(
        "the job asks for base model `{id}`, but {} does not hold it: {}; ask for that one, or point MODEL_PATH to the right one \
         (or unset it)",
        dir.display(), reasons.join(", ")
    )]
    Mismatch {
        /// The model that was asked for.
        id: String,
        /// Where another one was found.
        dir: PathBuf,
        /// How they differ.
        reasons: Vec<String>,
    },
    /// Its config cannot be read.
    #[error(transparent)]
    Config(#[from] Error),
}

/// What speaks for the model being the one that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Evidence, such as its shape; never empty.
    pub evidence: Vec<String>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Compares the model in `dir` with the `id` that was asked for: by the names in its config and path, and, where the id is known, by
/// its shape.
///
/// # Errors
/// [`IdentityError::Mismatch`] naming both; those of reading `config.json`.
pub fn check(id: &str, dir: &Path) -> Result<Identity, IdentityError> {
    let path = dir.join("config.json");
    let bytes = fs_err::read(&path).map_err(Error::from)?;
    let config: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::format(&path, format!("is no JSON: {error}")))?;
    let mut found = Findings::default();
    let is_own_snapshot = found.compare_repository(id, dir);
    found.compare_directory(id, dir);
    found.compare_name(id, &config, is_own_snapshot);
    found.compare_shape(id, &config);
    if found.evidence.is_empty() && found.against.is_empty() {
        let name = last(id);
        found.against.push(format!(
            "nothing says that it is `{id}`; where it is, name its directory `{name}`"
        ));
    }
    if !found.against.is_empty() {
        return Err(IdentityError::Mismatch {
            id: id.to_owned(),
            dir: dir.to_owned(),
            reasons: found.against,
        });
    }
    Ok(Identity {
        evidence: found.evidence,
        notes: found.notes,
    })
}

#[derive(Debug, Default)]
struct Findings {
    evidence: Vec<String>,
    notes: Vec<String>,
    against: Vec<String>,
}

impl Findings {
    /// A directory of the hub cache says which repository it is of; whether it is of the one asked for.
    fn compare_repository(&mut self, id: &str, dir: &Path) -> bool {
        let Some(repository) = repository_of(dir) else {
            return false;
        };
        let is_own = is_same(id, &repository);
        if is_own {
            self.evidence
                .push(format!("it is a snapshot of `{repository}`"));
        } else {
            self.against
                .push(format!("it is a snapshot of `{repository}`"));
        }
        is_own
    }

    /// Other directories may be named anything; one with the name of another known model is one.
    fn compare_directory(&mut self, id: &str, dir: &Path) {
        let name = dir.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|_| repository_of(dir).is_none()) else {
            return;
        };
        if name.eq_ignore_ascii_case(last(id)) {
            self.evidence
                .push(format!("its directory is named `{name}`"));
        } else if find_name(name).is_some() {
            self.against
                .push(format!("its directory is named `{name}`"));
        }
    }

    /// `_name_or_path` is the model's own id, or that of what it was made from.
    fn compare_name(&mut self, id: &str, config: &Value, is_own_snapshot: bool) {
        let written = config["_name_or_path"].as_str().unwrap_or_default();
        if !is_hub_id(written) {
            return;
        }
        if is_same(id, written) {
            self.evidence.push(format!("its config names `{written}`"));
        } else if !is_own_snapshot && find(id).is_some() && find(written).is_some() {
            self.against.push(format!("its config names `{written}`"));
        } else {
            let note =
                format!("its config names `{written}`: what it was made from, or another model");
            self.notes.push(note);
        }
    }

    fn compare_shape(&mut self, id: &str, config: &Value) {
        let Some(known) = find(id) else {
            let note = format!("the shape of `{id}` is not known here, so it was not compared");
            self.notes.push(note);
            return;
        };
        let differences = known.differences(config);
        if differences.is_empty() {
            let shape = format!("its config has the shape of `{id}`");
            self.evidence.push(shape);
            return;
        }
        self.against.extend(differences);
        let alike: Vec<&str> = Known::all_like(config).collect();
        if !alike.is_empty() {
            let more = if alike.len() > 3 {
                " or another of its kind"
            } else {
                ""
            };
            let names: Vec<String> = alike.iter().take(3).map(|id| format!("`{id}`")).collect();
            self.against
                .push(format!("it has the shape of {}{more}", names.join(" or ")));
        }
    }
}

/// `organisation/name` where `dir` is a snapshot in a hub cache.
fn repository_of(dir: &Path) -> Option<String> {
    let snapshots = dir
        .parent()
        .filter(|parent| parent.ends_with("snapshots"))?;
    let repository = snapshots.parent()?.file_name()?.to_str()?;
    let id = repository.strip_prefix("models--")?;
    Some(id.replacen("--", "/", 1))
}

fn last(id: &str) -> &str {
    id.rsplit('/').next().unwrap_or(id)
}

/// Equal but for case; an id without organisation is compared by name.
fn is_same(asked: &str, found: &str) -> bool {
    if asked.contains('/') {
        asked.eq_ignore_ascii_case(found)
    } else {
        asked.eq_ignore_ascii_case(last(found))
    }
}
