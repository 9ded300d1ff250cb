//! A Hugging Face checkpoint: safetensors files mapped into memory, tensors by name.
//!
//! Everything is checked when it is opened: which shards there are, that each is as long as its header says, that the
//! index and the shards agree. `mtp.*` tensors (extra prediction heads) are left out.
#![expect(unsafe_code, reason = "mapping a file; each call says why it is sound")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err as fs;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";

/// An opened checkpoint. Tensors are views of the mapped files.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    path: Arc<Path>,
    map: Arc<Mmap>,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Missing`] for an absent file; [`Error::Format`] for one that is truncated, malformed, of an element type
    /// other than f32, bf16 or f16, or at odds with the index.
    pub fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        if index.is_file() {
            let weight_map = read_index(&index)?;
            let mut shards: Vec<&String> = weight_map.values().collect();
            shards.sort();
            shards.dedup();
            for shard in shards {
                let path = dir.join(shard);
                if !path.is_file() {
                    let what = format!("shard `{shard}` that {} names", index.display());
                    return Err(Error::Missing {
                        what,
                        tried: vec![path],
                    });
                }
                add_shard(&path, &mut tensors)?;
                files.push(path);
            }
            for (name, shard) in &weight_map {
                let held = tensors.get(name).map(|entry| entry.path.to_path_buf());
                if held.as_ref() != Some(&dir.join(shard)) && !is_skipped(name) {
                    let reason = format!(
                        "says that tensor `{name}` is in `{shard}`, which does not hold it; download \
                         the checkpoint again"
                    );
                    return Err(Error::format(index, reason));
                }
            }
        } else if single.is_file() {
            add_shard(&single, &mut tensors)?;
            files.push(single);
        } else {
            let what = "model weights".to_owned();
            return Err(Error::Missing {
                what,
                tried: vec![single, index],
            });
        }
        Ok(Self {
            dir: dir.to_owned(),
            files,
            tensors,
        })
    }

    /// The directory it was opened in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The safetensors files it consists of, sorted; also one that holds nothing but tensors that are left out.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub fn shape_of(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Bytes of all tensors.
    pub fn num_bytes(&self) -> usize {
        self.tensors.values().map(|entry| entry.bytes.len()).sum()
    }

    /// A view of tensor `name`; a copy, widened to f32, where the file has it misaligned.
    ///
    /// # Errors
    /// As [`Self::planned`].
    pub fn tensor(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, expected_shape)?;
        let (shape, dtype, map, bytes) = (&entry.shape, entry.dtype, &entry.map, &entry.bytes);
        match Tensor::mapped(name, shape, dtype, map, bytes.clone()) {
            Some(tensor) => Ok(tensor),
            None => Tensor::from_f32(name, shape, widen_bytes(dtype, &map[bytes.clone()])),
        }
    }

    /// Tensor `name` without its elements.
    ///
    /// # Errors
    /// [`Error::Format`] if it is absent (naming the closest names there are) or has another shape.
    pub fn planned(&self, name: &str, expected_shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, expected_shape)?;
        Ok(Tensor::planned(name, expected_shape, entry.dtype))
    }

    fn entry(&self, name: &str, expected_shape: &[usize]) -> Result<&Entry> {
        let entry = self.tensors.get(name).ok_or_else(|| self.absent(name))?;
        if entry.shape != expected_shape {
            let reason = format!(
                "tensor `{name}` has shape {:?}, but config.json asks for {expected_shape:?}",
                entry.shape
            );
            return Err(Error::format(&*entry.path, reason));
        }
        Ok(entry)
    }

    fn absent(&self, name: &str) -> Error {
        let mut near: Vec<(usize, &str)> = self
            .names()
            .map(|other| (strsim::levenshtein(name, other), other))
            .collect();
        near.sort_unstable();
        let near: Vec<String> = near
            .iter()
            .take(2)
            .map(|(_, name)| format!("`{name}`"))
            .collect();
        let reason = format!(
            "has no tensor `{name}`, which config.json asks for; the closest are {}",
            near.join(" and ")
        );
        Error::format(&self.dir, reason)
    }
}

fn is_skipped(name: &str) -> bool {
    name.starts_with("mtp.")
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(&fs::read_to_string(path)?)
        .map_err(|error| Error::format(path, format!("is not a safetensors index: {error}")))?;
    for shard in index.weight_map.values() {
        if Path::new(shard).components().count() != 1 || shard.starts_with('.') {
            let reason = format!("names shard `{shard}`, which is not a plain file name");
            return Err(Error::format(path, reason));
        }
    }
    Ok(index.weight_map)
}

/// Adds the tensors of one file.
fn add_shard(path: &Path, tensors: &mut BTreeMap<String, Entry>) -> Result<()> {
    let map = map_file(path)?;
    let len = map.len();
    let (header_len, metadata) = SafeTensors::read_metadata(&map).map_err(|error| {
        let reason = format!(
            "is not a whole safetensors file of {len} bytes ({error}); it may be truncated: download \
             it again"
        );
        Error::format(path, reason)
    })?;
    let (map, shared_path): (Arc<Mmap>, Arc<Path>) = (Arc::new(map), path.into());
    for (name, info) in metadata.tensors() {
        if is_skipped(&name) {
            continue;
        }
        let dtype = float_dtype(info.dtype).ok_or_else(|| {
            let reason = format!(
                "tensor `{name}` is {:?}; weights must be F32, BF16 or F16 (an already quantised checkpoint \
                 cannot be the base)",
                info.dtype
            );
            Error::format(path, reason)
        })?;
        let start = header_len + 8;
        let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
        let entry = Entry {
            path: Arc::clone(&shared_path),
            map: Arc::clone(&map),
            dtype,
            shape: info.shape.clone(),
            bytes,
        };
        if let Some(other) = tensors.insert(name.clone(), entry) {
            let reason = format!(
                "holds tensor `{name}`, which {} holds too",
                other.path.display()
            );
            return Err(Error::format(path, reason));
        }
    }
    Ok(())
}

/// The element types that weights come in.
pub fn float_dtype(dtype: Dtype) -> Option<DType> {
    let pairs = [
        (Dtype::F32, DType::F32),
        (Dtype::BF16, DType::Bf16),
        (Dtype::F16, DType::F16),
    ];
    let found = pairs.into_iter().find(|(theirs, _)| *theirs == dtype);
    found.map(|(_, ours)| ours)
}

/// Little-endian elements of a floating point `dtype`, as f32.
pub fn widen_bytes(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        DType::Bf16 => bytes
            .chunks_exact(2)
            .map(|b| half::bf16::from_bits(half(b)).to_f32())
            .collect(),
        DType::F16 => bytes
            .chunks_exact(2)
            .map(|b| half::f16::from_bits(half(b)).to_f32())
            .collect(),
        DType::F32 | DType::U8 | DType::U32 | DType::I32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
    }
}

/// Gives back the memory of a mapped tensor that will not be read again. Reading it is still possible: from the file.
pub(crate) fn release(tensor: &Tensor) {
    const PAGE: usize = 4096;
    let Some((map, bytes)) = tensor.mapping() else {
        return;
    };
    // Whole pages only; the ones at the ends may belong to a neighbour too.
    let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end / PAGE * PAGE);
    if start < end {
        // SAFETY: the map is of a file and read-only, so that pages dropped are read from the file again, unchanged.
        let dropped =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        // Only advice: where the system refuses (larger pages), the memory stays in use.
        drop(dropped);
    }
}

/// Maps a safetensors file into memory.
///
/// # Errors
/// [`Error::Format`] if it is too short to be one; those of the file system.
pub fn map_file(path: &Path) -> Result<Mmap> {
    let file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    if len < 8 {
        let reason = format!("is {len} bytes long, too short for a safetensors file");
        return Err(Error::format(path, reason));
    }
    // SAFETY: the map is read-only and private to this process; its length is checked against the header below. A file
    // that another process truncates while it is mapped ends the process, as documented for `Checkpoint`.
    let map = unsafe { Mmap::map(file.file()) }?;
    Ok(map)
}
