//! The shape of the source: which module may know which, where unsafe code is, how long a file gets.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Each module and those it may name. `cli` is the binary: it may name all.
const MAY_NAME: [(&str, &[&str]); 20] = [
    ("error", &[]),
    ("random", &[]),
    ("hex", &[]),
    ("http", &[]),
    ("durable", &["error"]),
    ("tensor", &["error"]),
    ("config", &["error"]),
    ("store", &["error", "tensor", "config"]),
    ("data", &["error", "random", "config"]),
    ("ops", &["error", "random", "tensor", "store", "data"]),
    (
        "backend",
        &["error", "random", "tensor", "store", "config", "ops"],
    ),
    (
        "selftest",
        &[
            "error", "random", "tensor", "store", "data", "ops", "backend",
        ],
    ),
    (
        "model",
        &[
            "error", "random", "tensor", "store", "config", "ops", "data",
        ],
    ),
    (
        "export",
        &[
            "error", "durable", "tensor", "store", "config", "data", "model",
        ],
    ),
    (
        "train",
        &[
            "error", "random", "durable", "tensor", "store", "config", "data", "ops", "backend",
            "model", "export",
        ],
    ),
    (
        "bench",
        &[
            "error", "random", "tensor", "store", "config", "data", "ops", "backend", "model",
            "train",
        ],
    ),
    (
        "plan",
        &[
            "error", "tensor", "store", "config", "data", "ops", "backend", "export", "train",
        ],
    ),
    (
        "worker",
        &[
            "error", "durable", "config", "data", "store", "plan", "train", "export", "hex", "http",
        ],
    ),
    ("sim", &["data", "hex", "http"]),
    ("lib", &[]),
];

/// Files that may hold unsafe code.
const UNSAFE: [&str; 5] = [
    "backend/cpu/gemm.rs",
    "backend/gpu/driver/cuda.rs",
    "backend/gpu/driver/cuda/device.rs",
    "backend/gpu/driver/emu.rs",
    "store/checkpoint.rs",
];

/// Lines of a file of source; beyond that it is two.
const MAX_LINES: usize = 620;

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.push(path);
        }
    }
    found
}

/// Every source file: its path below `src`, its module at the top, its text.
fn modules() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let one = |path: PathBuf| {
        let below = path.strip_prefix(&root).unwrap().display().to_string();
        let module = below.split(['/', '.']).next().unwrap().to_owned();
        (below, module, fs_err::read_to_string(path).unwrap())
    };
    let found: Vec<_> = sources(&root).into_iter().map(one).collect();
    assert!(
        found.len() > 50,
        "the sources are not where this test looks"
    );
    found
}

#[test]
fn dependencies_point_one_way() {
    for (path, module, text) in modules() {
        if matches!(module.as_str(), "bin" | "cli" | "main") {
            continue;
        }
        let allowed = MAY_NAME.iter().find(|(name, _)| *name == module);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{path}: add `{module}` to MAY_NAME"));
        let named: BTreeSet<&str> = text
            .split("crate::")
            .skip(1)
            .map(|rest| {
                rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                    .next()
                    .unwrap()
            })
            .collect();
        for name in named {
            let is_module = MAY_NAME.iter().any(|(module, _)| *module == name);
            assert!(
                !is_module || name == module || allowed.contains(&name),
                "{path} names crate::{name}, which `{module}` may not know"
            );
        }
    }
}

#[test]
fn the_model_reads_no_files_and_no_environment() {
    for (path, module, text) in modules() {
        if !matches!(module.as_str(), "model" | "ops" | "backend") {
            continue;
        }
        for word in ["fs_err", "std::fs", "std::env", "std::net", "std::process"] {
            assert!(!text.contains(word), "{path} names {word}");
        }
    }
}

#[test]
fn unsafe_code_is_where_it_is_said_to_be() {
    for (path, _, text) in modules() {
        let is_unsafe =
            text.contains("unsafe {") || text.contains("unsafe impl") || text.contains("unsafe fn");
        assert_eq!(is_unsafe, UNSAFE.contains(&path.as_str()), "{path}");
    }
}

/// Text of every file below `dir` that ends with `extension`, by path.
fn texts(dir: &str, extension: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let entries = fs_err::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let of_kind = entries.filter(|path| path.extension().is_some_and(|kind| kind == extension));
    of_kind
        .map(|path| (path.clone(), fs_err::read_to_string(path).unwrap()))
        .collect()
}

/// Each kernel is launched by a launcher, and its family has a page that says what it costs and a list of mutations.
#[test]
fn every_kernel_has_a_launcher_a_page_and_mutations() {
    let launchers: String = modules()
        .into_iter()
        .filter(|(path, ..)| path.starts_with("backend/gpu/"))
        .map(|(.., text)| text)
        .collect();
    let pages: String = texts("docs/kernels", "md")
        .into_iter()
        .map(|(_, t)| t)
        .collect();
    let mutations: String = texts("scripts/mutations", "txt")
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    let kernels = texts("kernels", "cu");
    assert!(
        kernels.len() > 20,
        "the kernels are not where this test looks"
    );
    for (path, text) in kernels {
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        if file == "selftest.cu" {
            continue;
        }
        let stem = file.trim_end_matches(".cu");
        let stem = stem
            .trim_end_matches("_forward")
            .trim_end_matches("_backward");
        assert!(pages.contains(stem), "no page of docs/kernels names {stem}");
        assert!(
            mutations.contains(&format!("kernels/{file}")),
            "no mutation of kernels/{file} in scripts/mutations"
        );
        for kernel in text.split("\nKERNEL(").skip(1) {
            let name = kernel.split(',').next().unwrap();
            assert!(
                launchers.contains(&format!("\"{name}\"")),
                "{file}: no launcher names {name}"
            );
        }
    }
}

#[test]
fn files_are_of_a_readable_length() {
    for (path, _, text) in modules() {
        // Made by a program, for programs.
        if path == "backend/gpu/params.rs" {
            continue;
        }
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{path} has {lines} lines");
    }
}
