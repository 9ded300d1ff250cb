//! Base weights are never held twice: what is quantised leaves memory. Alone in its process, as it reads the process's size.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use brightrun::store::Weight;
use brightrun::store::checkpoint::Checkpoint;
use brightrun::store::quantized::{QuantizePolicy, QuantizedStore};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Megabytes of the process that are `kind` (`RssAnon`, `RssFile`).
fn megabytes(kind: &str) -> f64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(kind)).unwrap();
    let kilobytes: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes / 1024.0
}

#[test]
fn a_quantised_weight_leaves_memory() {
    const ROWS: usize = 8192;
    const COLS: usize = 2048;
    const MB: f64 = (ROWS * COLS * 4) as f64 / 1_048_576.0;
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..ROWS * COLS)
        .flat_map(|i| (((i * 37) % 101) as f32 - 50.0).to_le_bytes())
        .collect();
    let names = ["a.q_proj.weight", "b.q_proj.weight"];
    let view = || TensorView::new(Dtype::F32, vec![ROWS, COLS], &bytes).unwrap();
    let path = dir.path().join("model.safetensors");
    safetensors::serialize_to_file(names.map(|name| (name, view())), None, &path).unwrap();
    drop(bytes);

    let (anon, file) = (megabytes("RssAnon"), megabytes("RssFile"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let policy = QuantizePolicy::modules(vec!["q_proj".to_owned()], true);
    let mut store = QuantizedStore::new(checkpoint, policy);
    let weights = names.map(|name| store.matrix(name, ROWS, COLS).unwrap());
    assert!(
        weights
            .iter()
            .all(|weight| matches!(weight, Weight::Nf4(_)))
    );
    let (more_anon, more_file) = (megabytes("RssAnon") - anon, megabytes("RssFile") - file);
    // Two matrices of 64 MB in f32 become 8.3 MB each; the rest is slack of the allocator and of the stacks of threads.
    assert!(
        more_file < 0.1 * MB,
        "{more_file} MB of the file are still mapped"
    );
    assert!(
        more_anon < 0.5 * MB,
        "{more_anon} MB for 16.5 MB of codes and scales"
    );
}
