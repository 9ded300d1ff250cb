//! Checkpoints of a run: written so that a crash at any instant leaves an older good one, verified before they are used.
//!
//! `checkpoints/step-N/` holds `adapter.safetensors` (values and moments, as they are kept), `state.json` and `manifest.json` (length
//! and BLAKE3 of the other two). It is written as `.step-N.<process>-<mark>.partial`, brought to the disk, then renamed; `LATEST`
//! is only a hint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fs_err as fs;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::buffers::AdapterState;
use crate::durable::{Durable, partial_of};
use crate::error::{Error, Result};
use crate::ops::Moments;
use crate::store::checkpoint::{float_dtype, widen_bytes};
use crate::tensor::DType;

const FORMAT_VERSION: u32 = 1;
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const ADAPTER: &str = "adapter.safetensors";
const LATEST: &str = "LATEST";
/// The adapter's values, in `adapter.safetensors`.
const VALUES: &str = "values";

/// What a run needs besides the adapter to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Loss sum of the target tokens of the epoch so far.
    pub epoch_loss_sum: f64,
    /// Target tokens of the epoch so far.
    pub epoch_target_tokens: u64,
    /// Seconds trained.
    pub elapsed_s: f64,
    /// The date chat templates were told, in days since 1970-01-01.
    pub date_days: u32,
    /// Digest of the tokens and labels.
    pub data_digest: String,
    /// Digest of the adapter's tensor names and places.
    pub layout_digest: String,
    /// The settings of the run.
    pub config: serde_json::Map<String, serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    format_version: u32,
    engine_version: String,
    files: BTreeMap<String, FileDigest>,
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct FileDigest {
    length: u64,
    blake3: String,
}

/// A checkpoint read back and verified.
#[derive(Debug)]
pub struct Loaded {
    /// Where it was.
    pub path: PathBuf,
    /// Its state.
    pub state: State,
    values: Vec<f32>,
    /// Bytes by name.
    moments: BTreeMap<String, Vec<u8>>,
}

impl Loaded {
    /// Puts values and moments into `adapter`.
    ///
    /// # Errors
    /// [`Error::Format`] if the adapter has another size, or its moments are kept otherwise.
    pub fn restore(&self, adapter: &mut AdapterState) -> Result<()> {
        let AdapterState {
            values, moments, ..
        } = adapter;
        let wrong = |reason: String| Err(Error::format(&self.path, reason));
        let is_8bit = matches!(moments, Moments::Blockwise8 { .. });
        let was_8bit = self.moments.contains_key("exp_avg_absmax");
        if is_8bit != was_8bit {
            let name = |in_8bit| if in_8bit { "adamw_8bit" } else { "adamw" };
            return wrong(format!(
                "holds the moments of `optimizer: {}`, this run has `{}`; go on with that optimizer, or set \
                 `resume_from_checkpoint: none`",
                name(was_8bit),
                name(is_8bit)
            ));
        }
        if self.values.len() != values.len() {
            let (found, expected) = (self.values.len(), values.len());
            return wrong(format!(
                "holds {found} adapter values, this run has {expected}"
            ));
        }
        values.write_f32(&self.values)?;
        for (name, target) in moments.tensors_mut() {
            match self.moments.get(name) {
                Some(bytes) if bytes.len() == target.num_bytes() => target.write_bytes(bytes)?,
                _ => {
                    return wrong(format!("has no `{name}` of {} bytes", target.num_bytes()));
                }
            }
        }
        Ok(())
    }

    /// The adapter's values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }
}

/// The checkpoints of an output directory.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Those in `output_dir/checkpoints`, of which the `keep` newest stay.
    pub fn new(output_dir: &Path, keep: usize) -> Self {
        Self {
            dir: output_dir.join("checkpoints"),
            keep,
        }
    }

    /// Writes, verifies, and only then removes what is too old.
    ///
    /// # Errors
    /// Those of the file system; [`Error::Format`] if what was written does not read back.
    pub fn save(&self, files: &Durable, state: &State, adapter: &AdapterState) -> Result<PathBuf> {
        let name = format!("step-{}", state.step);
        let path = self.dir.join(&name);
        let partial = partial_of(&path);
        files.create_dir(&partial)?;
        let contents = [
            (ADAPTER, adapter_bytes(adapter)?),
            (STATE, json_bytes(state)?),
        ];
        let mut manifest = Manifest {
            format_version: FORMAT_VERSION,
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            files: BTreeMap::new(),
        };
        for (name, bytes) in &contents {
            files.write(&partial.join(name), bytes)?;
            manifest.files.insert((*name).to_owned(), digest(bytes));
        }
        files.write(&partial.join(MANIFEST), &json_bytes(&manifest)?)?;
        files.sync_dir(&partial)?;
        files.replace_dir(&partial, &path)?;
        files.replace(&self.dir.join(LATEST), name.as_bytes())?;
        read(&path)?;
        self.prune(files)?;
        Ok(path)
    }

    /// Numbers of the checkpoints there are, newest first; good or not.
    pub fn steps(&self) -> Vec<u64> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut steps: Vec<u64> = entries
            .filter_map(|entry| {
                entry
                    .file_name()
                    .to_str()?
                    .strip_prefix("step-")?
                    .parse()
                    .ok()
            })
            .collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps
    }

    /// The newest checkpoint that is whole, and a warning for each newer one that is not.
    pub fn newest(&self) -> (Option<Loaded>, Vec<String>) {
        let mut warnings = Vec::new();
        for step in self.steps() {
            match read(&self.dir.join(format!("step-{step}"))) {
                Ok(loaded) => return (Some(loaded), warnings),
                Err(error) => warnings.push(format!(
                    "checkpoint step-{step} is damaged and not used: {error}"
                )),
            }
        }
        (None, warnings)
    }

    /// Renames the checkpoints after `step`, so that they are neither resumed from nor counted; their new names.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_aside_after(&self, files: &Durable, step: u64) -> Result<Vec<PathBuf>> {
        let mut names = Vec::new();
        for newer in self.steps().into_iter().filter(|newer| *newer > step) {
            let path = self.dir.join(format!("step-{newer}"));
            let mut aside = self.dir.join(format!("unused-step-{newer}"));
            let mut number = 1;
            while aside.exists() {
                number += 1;
                aside = self.dir.join(format!("unused-step-{newer}-{number}"));
            }
            files.rename(&path, &aside)?;
            names.push(aside);
        }
        Ok(names)
    }

    /// Removes all of them.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn discard(&self, files: &Durable) -> Result<()> {
        if self.dir.is_dir() {
            files.remove_dir(&self.dir)?;
        }
        Ok(())
    }

    /// Removes all but the newest `keep`, and what crashed saves left behind.
    fn prune(&self, files: &Durable) -> Result<()> {
        for step in self.steps().into_iter().skip(self.keep) {
            files.remove_dir(&self.dir.join(format!("step-{step}")))?;
        }
        self.remove_partials(files)
    }

    /// Removes what a killed run left half-written.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_partials(&self, files: &Durable) -> Result<()> {
        files.remove_partials(&self.dir)
    }
}

/// Reads a checkpoint directory and verifies every byte.
///
/// # Errors
/// [`Error::Missing`] if it is not there, [`Error::Format`] saying what is wrong with it.
pub fn read(path: &Path) -> Result<Loaded> {
    let manifest_path = path.join(MANIFEST);
    if !manifest_path.is_file() {
        let what = "checkpoint (a directory with `manifest.json`)".to_owned();
        return Err(Error::Missing {
            what,
            tried: vec![manifest_path],
        });
    }
    let manifest: Manifest = parse(&manifest_path, &fs::read(&manifest_path)?)?;
    if manifest.format_version != FORMAT_VERSION {
        let reason = format!(
            "has format version {}, this engine reads {FORMAT_VERSION}",
            manifest.format_version
        );
        return Err(Error::format(manifest_path, reason));
    }
    let file = |name: &str| -> Result<Vec<u8>> {
        let path = path.join(name);
        let expected = manifest
            .files
            .get(name)
            .ok_or_else(|| Error::format(&manifest_path, format!("does not list `{name}`")))?;
        if !path.is_file() {
            return Err(Error::Missing {
                what: format!("`{name}` of the checkpoint"),
                tried: vec![path],
            });
        }
        let bytes = fs::read(&path)?;
        let found = digest(&bytes);
        if found.length != expected.length {
            let reason = format!(
                "is {} bytes long, the manifest says {}",
                found.length, expected.length
            );
            return Err(Error::format(path, reason));
        }
        if found != *expected {
            return Err(Error::format(
                path,
                "does not have the digest the manifest says",
            ));
        }
        Ok(bytes)
    };
    let state: State = parse(&path.join(STATE), &file(STATE)?)?;
    let bytes = file(ADAPTER)?;
    let malformed =
        |error: safetensors::SafeTensorError| Error::format(path.join(ADAPTER), error.to_string());
    let tensors = safetensors::SafeTensors::deserialize(&bytes).map_err(malformed)?;
    let values = tensors.tensor(VALUES).map_err(malformed)?;
    let dtype = float_dtype(values.dtype())
        .ok_or_else(|| Error::format(path.join(ADAPTER), "holds values of another type"))?;
    let moments = tensors.tensors().into_iter();
    let moments = moments.filter(|(name, _)| name != VALUES);
    Ok(Loaded {
        path: path.to_owned(),
        values: widen_bytes(dtype, values.data()),
        moments: moments
            .map(|(name, view)| (name, view.data().to_vec()))
            .collect(),
        state,
    })
}

fn adapter_bytes(adapter: &AdapterState) -> Result<Vec<u8>> {
    let mut named = vec![(VALUES, &adapter.values)];
    named.extend(adapter.moments.tensors());
    let mut contents = Vec::new();
    for (name, tensor) in named {
        let dtype = match tensor.dtype() {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::U8 => Dtype::U8,
            DType::F16 | DType::U32 | DType::I32 => {
                return Err(Error::format(ADAPTER, "holds no tensor of that type"));
            }
        };
        contents.push((name, dtype, tensor.bytes()?));
    }
    let mut tensors = Vec::new();
    for (name, dtype, bytes) in &contents {
        let len = bytes.len() * 8 / dtype.bitsize();
        let view = TensorView::new(*dtype, vec![len], bytes);
        tensors.push((*name, view.map_err(unwritable)?));
    }
    safetensors::serialize(tensors, None).map_err(unwritable)
}

#[expect(clippy::needless_pass_by_value, reason = "the signature of `map_err`")]
fn unwritable(error: safetensors::SafeTensorError) -> Error {
    Error::format(ADAPTER, error.to_string())
}

fn json_bytes<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|error| Error::format(STATE, error.to_string()))
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::format(path, format!("is damaged: {error}")))
}

fn digest(bytes: &[u8]) -> FileDigest {
    FileDigest {
        length: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
    }
}
