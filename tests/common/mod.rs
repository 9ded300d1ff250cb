//! What the integration tests share: golden tensors, and how far a result is from them.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

pub(crate) mod cli;
#[cfg(feature = "emu")]
pub(crate) mod device;
pub(crate) mod model;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use brightrun::data::Batch;
use brightrun::ops::StepState;
use brightrun::tensor::{DType, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The model families of the goldens.
pub(crate) const FAMILIES: [&str; 6] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
];

/// The seven standard target modules.
pub(crate) const SEVEN: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// A file below `tests/golden`.
pub(crate) fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

/// A safetensors file held in memory.
#[derive(Debug)]
pub(crate) struct Golden {
    bytes: Vec<u8>,
    path: PathBuf,
}

/// A golden tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

impl Golden {
    pub(crate) fn open(path: &str) -> Self {
        let path = golden(path);
        Self {
            bytes: fs_err::read(&path).unwrap(),
            path,
        }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .file()
            .names()
            .iter()
            .map(|n| (*n).to_owned())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.file().tensor(name).is_ok()
    }

    /// Floating point, as f32.
    pub(crate) fn array(&self, name: &str) -> Array {
        let file = self.file();
        let view = file
            .tensor(name)
            .unwrap_or_else(|e| panic!("{} {name}: {e}", self.path.display()));
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::BF16 => data
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            Dtype::F16 => data
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            other => panic!("{name} is {other:?}"),
        };
        Array {
            shape: view.shape().to_vec(),
            values,
        }
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        self.array(name).values
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let file = self.file();
        file.tensor(name).unwrap().data().to_vec()
    }

    /// `values` rounded to the element type that tensor `name` has.
    pub(crate) fn round_like(&self, name: &str, values: &[f32]) -> Vec<f32> {
        let dtype = self.file().tensor(name).unwrap().dtype();
        let round = |value: &f32| match dtype {
            Dtype::BF16 => half::bf16::from_f32(*value).to_f32(),
            Dtype::F16 => half::f16::from_f32(*value).to_f32(),
            _ => *value,
        };
        values.iter().map(round).collect()
    }

    pub(crate) fn integers(&self, name: &str) -> Vec<i64> {
        let file = self.file();
        let view = file.tensor(name).unwrap();
        let data = view.data();
        match view.dtype() {
            Dtype::I64 => data
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::I32 => data
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Entry `key` of the file's metadata.
    pub(crate) fn metadata(&self, key: &str) -> String {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        header.metadata().as_ref().unwrap()[key].clone()
    }

    /// As a tensor of shape `shape`.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Tensor {
        Tensor::from_f32(name, shape, self.values(name)).unwrap()
    }
}

/// A tensor to be written, full of NaN so that what is left out shows.
pub(crate) fn output(shape: &[usize]) -> Tensor {
    let len = shape.iter().product();
    Tensor::from_f32("output", shape, vec![f32::NAN; len]).unwrap()
}

pub(crate) fn tensor(shape: &[usize], values: Vec<f32>) -> Tensor {
    Tensor::from_f32("input", shape, values).unwrap()
}

pub(crate) fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros("zeros", shape, DType::F32)
}

/// A step of sequences of the given lengths, without ids.
pub(crate) fn sequences(lengths: &[usize]) -> StepState {
    let mut batch = Batch {
        cu_seqlens: vec![0],
        ..Batch::default()
    };
    for length in lengths {
        let total = batch.input_ids.len() + length;
        batch.input_ids.resize(total, 0);
        batch.target_ids.resize(total, -100);
        batch
            .position_ids
            .extend(0..u32::try_from(*length).unwrap());
        batch.cu_seqlens.push(u32::try_from(total).unwrap());
    }
    StepState {
        batch,
        loss_scale: 1.0,
        dropout: None,
    }
}

/// Largest difference; NaN anywhere is infinite.
pub(crate) fn max_abs_diff(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths differ");
    let diffs = found
        .iter()
        .zip(expected)
        .map(|(f, e)| (f64::from(*f) - f64::from(*e)).abs());
    diffs.fold(0.0, |max, diff| {
        if diff.is_nan() {
            f64::INFINITY
        } else {
            max.max(diff)
        }
    })
}

/// `|found - expected| / |expected|`; NaN anywhere is infinite.
pub(crate) fn relative_l2(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths differ");
    let square = |value: f64| value * value;
    let diff: f64 = found
        .iter()
        .zip(expected)
        .map(|(f, e)| square(f64::from(*f) - f64::from(*e)))
        .sum();
    let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
    let relative = if norm == 0.0 {
        diff.sqrt()
    } else {
        (diff / norm).sqrt()
    };
    if relative.is_nan() {
        f64::INFINITY
    } else {
        relative
    }
}

/// Forward tolerance of the goldens: 1e-5 of the largest reference value (at least 1).
#[track_caller]
pub(crate) fn assert_forward(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected
        .iter()
        .fold(1.0f64, |max, e| max.max(f64::from(e.abs())));
    let diff = max_abs_diff(found, expected);
    assert!(
        diff <= 1e-5 * largest,
        "{what}: max abs diff {diff:e}, largest {largest}"
    );
}

/// Backward tolerance of the goldens.
#[track_caller]
pub(crate) fn assert_backward(found: &[f32], expected: &[f32], limit: f64, what: &str) {
    let diff = relative_l2(found, expected);
    assert!(
        diff <= limit,
        "{what}: relative L2 {diff:e}, limit {limit:e}"
    );
}

/// A tensor of a file being rewritten.
pub(crate) type Raw = (Dtype, Vec<usize>, Vec<u8>);

/// A copy of golden model `family` in `dir`.
pub(crate) fn copy_model(family: &str, dir: &Path) {
    fs_err::create_dir_all(dir).unwrap();
    for entry in fs_err::read_dir(golden(&format!("models/{family}"))).unwrap() {
        let path = entry.unwrap().path();
        fs_err::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
}

/// Changes the tensors of a safetensors file.
pub(crate) fn rewrite(path: &Path, change: impl FnOnce(&mut BTreeMap<String, Raw>)) {
    let bytes = fs_err::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let raw = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let mut tensors: BTreeMap<String, Raw> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, raw(view)))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs_err::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Changes a JSON file.
pub(crate) fn rewrite_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap();
    change(&mut value);
    fs_err::write(path, value.to_string()).unwrap();
}

/// What is recorded must find its memory where it lies.
pub(crate) fn check_no_allocation_in_a_recording(
    device: &dyn brightrun::backend::gpu::driver::Driver,
) {
    let refused = device.record(&mut || device.alloc("late", 1).map(|_| ()));
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("`late` allocated inside a recording"),
        "{error}"
    );
}
