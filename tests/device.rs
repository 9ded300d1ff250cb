//! The CUDA driver against a stand-in for libcuda (`tests/fake_cuda`), and what a run says of devices that are not there.
#![cfg(feature = "cuda")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::exit,
    clippy::print_stdout,
    reason = "a test's helper fails its test, and its child is told by the environment"
)]

mod common;

use std::path::Path;
use std::process::Command;

use brightrun::backend::gpu::driver::cuda::{Cuda, Fatbins};
use brightrun::backend::gpu::driver::{Driver, Grid, Kernel};
use brightrun::error::Error;
use common::check_no_allocation_in_a_recording;
use common::cli::{GOLDEN_SETTINGS, Project};

const FATBINS: Fatbins = Fatbins {
    archs: "80,90a",
    toolkit: (13, 0),
    files: &[
        ("one", b"one ", &["first"]),
        ("two", b"two ", &["second", "third"]),
    ],
};
const FIRST: Kernel = Kernel {
    name: "first",
    threads: 256,
};
const SECOND: Kernel = Kernel {
    name: "second",
    threads: 128,
};
const PARAMS: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

/// A directory in which children find the stand-in.
fn fake() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda/libcuda.c");
    for name in ["libcuda.so", "libcuda.so.1"] {
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&dir.path().join(name), &source])
            .status();
        assert!(status.unwrap().success());
    }
    dir
}

/// Runs `body` in a process of this test alone that has the stand-in; the calls it made. That process gets here too.
#[track_caller]
fn with_fake(test: &str, settings: &[(&str, &str)], body: fn()) -> Vec<String> {
    const CHILD: &str = "FAKE_CUDA_CHILD";
    const DONE: &str = "the child is through";
    let label = format!("{test} {settings:?}");
    if let Ok(wanted) = std::env::var(CHILD) {
        if wanted == label {
            body();
            println!("{DONE}");
            std::process::exit(0);
        }
        return Vec::new();
    }
    let dir = fake();
    let log = dir.path().join("log");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", dir.path())
        .env("FAKE_CUDA_LOG", &log)
        .env(CHILD, label)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains(DONE), "{said}");
    let log = fs_err::read_to_string(log).unwrap_or_default();
    log.lines().map(ToOwned::to_owned).collect()
}

fn open(is_synchronous: bool) -> Cuda {
    Cuda::open_with(0, is_synchronous, FATBINS).unwrap()
}

/// What the library is asked for until the device is open.
const OPENING: [&str; 8] = [
    "init",
    "retain",
    "stream 1",
    "module one ",
    "first attribute 8 is 232400",
    "module two ",
    "second attribute 8 is 232400",
    "third attribute 8 is 232400",
];

#[test]
fn calls_come_in_order() {
    let log = with_fake("calls_come_in_order", &[], child_calls);
    let expected = [
        "pinned 75497472",
        "alloc 1000",
        "write 900",
        "event 1",
        "event 1 recorded",
        "write 100",
        "event 2",
        "event 2 recorded",
        "launch first 4 2 1, 256 threads, 100000 shared, params 1 to 12",
        "set 500 to 0",
        "read 1000",
        "wait",
        "capture, mode 2",
        "captured launch first 1 1 1, 256 threads, 0 shared, params 1 to 12",
        "captured set 10 to 0",
        "captured launch second 3 1 1, 128 threads, 0 shared, params 1 to 12",
        "capture ends",
        "instantiate",
        "graph destroyed",
        "graph launch",
        "graph launch",
        "wait",
        "graph exec destroyed",
        "free 1000",
        "wait",
        "pinned freed",
        "module one  unloaded",
        "module two  unloaded",
        "stream destroyed",
        "release, 0 bytes in use",
    ];
    assert_eq!(log[..8], OPENING);
    assert_eq!(log[8..], expected);
}

fn child_calls() {
    let device = open(false);
    assert_eq!(device.info().name, "fake 0");
    assert_eq!(device.info().num_multiprocessors, 132);
    assert_eq!(device.info().capability, (9, 0));
    let memory = device.alloc("values", 1000).unwrap();
    memory.write(0, &[7; 900]).unwrap();
    memory.write(900, &[8; 100]).unwrap();
    let grid = Grid::plane(4, 2).with_shared(100_000);
    device.launch(FIRST, grid, &PARAMS).unwrap();
    device.zero(memory.address() + 100, 500).unwrap();
    let mut found = vec![1; 1000];
    memory.read(0, &mut found).unwrap();
    let expected = [[7; 100].as_slice(), &[0; 500], &[7; 300], &[8; 100]].concat();
    assert_eq!(found, expected);
    let recording = device.record(&mut || {
        device.launch(FIRST, Grid::line(1), &PARAMS)?;
        device.zero(memory.address(), 10)?;
        device.launch(SECOND, Grid::line(3), &PARAMS)
    });
    let recording = recording.unwrap();
    recording.replay().unwrap();
    recording.replay().unwrap();
    device.synchronize().unwrap();
}

#[test]
fn a_full_ring_waits_for_the_oldest_copy_only() {
    let log = with_fake(
        "a_full_ring_waits_for_the_oldest_copy_only",
        &[],
        child_ring,
    );
    let waits: Vec<_> = log
        .iter()
        .filter(|line| line.ends_with("waited for"))
        .collect();
    // 80 MiB in pieces of 8 through a ring of 64: the ninth and the tenth wait for the first and the second.
    assert_eq!(waits, ["event 1 waited for", "event 2 waited for"]);
    assert_eq!(
        log.iter()
            .filter(|line| line.starts_with("write 8388608"))
            .count(),
        10
    );
}

fn child_ring() {
    let device = open(false);
    let values: Vec<u8> = (0..=250).cycle().take(80 << 20).collect();
    let memory = device.alloc("values", values.len()).unwrap();
    memory.write(0, &values).unwrap();
    let mut found = vec![0; values.len()];
    memory.read(0, &mut found).unwrap();
    assert!(found == values);
}

#[test]
fn a_fault_is_told_at_the_next_wait() {
    with_fake(
        "a_fault_is_told_at_the_next_wait",
        &[("FAKE_CUDA_FAULT", "first")],
        child_fault,
    );
}

fn child_fault() {
    let device = open(false);
    device.launch(FIRST, Grid::line(5), &PARAMS).unwrap();
    assert_eq!(
        device.synchronize().unwrap_err().to_string(),
        "synchronize: an earlier launch failed: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered); the last \
         one was kernel first, grid 5 x 1 x 1, 256 threads, 0 bytes of dynamic shared memory; set BRIGHTRUN_SYNC=1 to locate the \
         launch"
    );
    let error = device.launch(SECOND, Grid::line(1), &PARAMS).unwrap_err();
    assert!(error.to_string().contains("the last one was kernel first"));
}

#[test]
fn a_synchronous_device_names_the_culprit() {
    let log = with_fake(
        "a_synchronous_device_names_the_culprit",
        &[("FAKE_CUDA_FAULT", "second")],
        child_synchronous,
    );
    assert!(!log.iter().any(|line| line.contains("capture")));
}

fn child_synchronous() {
    let device = open(true);
    let recording = device.record(&mut || {
        device.launch(FIRST, Grid::line(1), &PARAMS)?;
        device.launch(SECOND, Grid::line(2), &PARAMS)?;
        device.launch(FIRST, Grid::line(3), &PARAMS)
    });
    let error = recording.unwrap().replay().unwrap_err().to_string();
    assert!(
        error.starts_with("kernel second, grid 2 x 1 x 1, 128 threads"),
        "{error}"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    with_fake(
        "what_does_not_fit_is_refused",
        &[("FAKE_CUDA_BYTES", "1000")],
        child_refusals,
    );
}

fn child_refusals() {
    let device = open(false);
    let error = device.alloc("layers.0.q_proj", 1001).unwrap_err();
    assert_eq!(error.exit_code(), 12);
    let text = error.to_string();
    assert!(
        text.starts_with("`layers.0.q_proj` of 1001 bytes")
            && text.contains("1000 of the device's 1000 are free"),
        "{text}"
    );
    let cases = [
        (
            FIRST,
            Grid::line(1).with_shared(232_401),
            PARAMS.as_slice(),
            "fake 0 has at most 232400",
        ),
        (
            FIRST,
            Grid::line(1),
            &PARAMS[..8],
            "8 bytes of params, the kernel takes 12",
        ),
        (
            Kernel {
                threads: 2048,
                ..FIRST
            },
            Grid::line(1),
            &PARAMS,
            "2048 threads is not supported: fake 0 has at most 1024",
        ),
        (
            Kernel {
                name: "other",
                threads: 1,
            },
            Grid::line(1),
            &PARAMS,
            "there is no such kernel",
        ),
    ];
    for (kernel, grid, params, expected) in cases {
        let text = device.launch(kernel, grid, params).unwrap_err().to_string();
        assert!(
            text.contains(expected) && text.contains(kernel.name),
            "{text}"
        );
    }
    let error = device.check(FIRST, Grid::plane(1, 65_536)).unwrap_err();
    assert!(error.to_string().contains("at most 65535"), "{error}");
    device.check(FIRST, Grid::plane(1 << 20, 65_535)).unwrap();
    let memory = device.alloc("small", 10).unwrap();
    assert!(memory.write(8, &[0; 3]).is_err());
    // A failed body leaves the device able to go on.
    let refused = device.record(&mut || memory.write(0, &[1]));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("a copy inside a recording")
    );
    memory.write(0, &[1]).unwrap();
    check_no_allocation_in_a_recording(&device);
    // So does one that panics.
    let panics = std::panic::AssertUnwindSafe(|| device.record(&mut || panic!("on purpose")));
    assert!(std::panic::catch_unwind(panics).is_err());
    memory.write(0, &[1]).unwrap();
}

#[test]
fn buffers_that_were_reserved_come_from_one_allocation() {
    let log = with_fake(
        "buffers_that_were_reserved_come_from_one_allocation",
        &[],
        child_reserved,
    );
    let allocations: Vec<&str> = log
        .iter()
        .map(String::as_str)
        .filter(|line| line.starts_with("alloc") || line.starts_with("free"))
        .collect();
    let expected = ["alloc 768", "alloc 300", "free 300", "free 768"];
    assert_eq!(allocations, expected);
}

fn child_reserved() {
    let device = open(false);
    device.reserve("buffers", 768).unwrap();
    let first = device.alloc("first", 300).unwrap();
    // What does not fit into the rest is an allocation of its own.
    let other = device.alloc("other", 300).unwrap();
    let second = device.alloc("second", 256).unwrap();
    assert_eq!(second.address() - first.address(), 512);
    assert_eq!((first.num_bytes(), second.num_bytes()), (300, 256));
    first.write(299, &[1]).unwrap();
    assert!(first.write(300, &[1]).is_err());
    drop(other);
    drop(first);
    second.write(0, &[2]).unwrap();
}

#[test]
fn what_is_not_there_is_refused() {
    with_fake("what_is_not_there_is_refused", &[], child_no_device);
    with_fake(
        "what_is_not_there_is_refused",
        &[("FAKE_CUDA_VERSION", "12080")],
        child_old_driver,
    );
    with_fake(
        "what_is_not_there_is_refused",
        &[("FAKE_CUDA_DEVICES", "0")],
        child_none,
    );
}

/// Opens `cuda:ordinal`, which is refused with a line that has `expected` in it.
#[track_caller]
fn refused(ordinal: usize, fatbins: Fatbins, expected: &str) {
    let error = Cuda::open_with(ordinal, false, fatbins).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(error.to_string().contains(expected), "{error}");
}

fn child_no_device() {
    const OTHER: Fatbins = Fatbins {
        files: &[("other", b"none", &[])],
        ..FATBINS
    };
    refused(1, FATBINS, "there is no `cuda:1`, only `cuda:0`");
    let files = &[];
    refused(0, Fatbins { files, ..FATBINS }, "scripts/get-nvcc.sh");
    let expected = "the kernels were compiled for 80,90a, fake 0 has capability 9.0";
    refused(0, OTHER, expected);
}

fn child_old_driver() {
    refused(
        0,
        FATBINS,
        "is for CUDA 12.8, this build needs one for CUDA 13.0",
    );
}

fn child_none() {
    refused(0, FATBINS, "shows no device");
}

/// Runs `train` where no driver can be loaded: what lies in its place is none.
fn train_without_driver(project: &Project, device: &str) -> std::process::Output {
    let dir = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1"] {
        fs_err::write(dir.path().join(name), "not a library").unwrap();
    }
    let mut command = project.command("train", &["--set", device]);
    command.env("LD_LIBRARY_PATH", dir.path()).output().unwrap()
}

#[test]
fn a_run_on_a_missing_device_says_so_and_writes_nothing() {
    let project = Project::golden("llama", GOLDEN_SETTINGS);
    let output = train_without_driver(&project, "device=cuda");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert_eq!(
        said,
        "error: device `cuda` is not supported: no NVIDIA driver was found (libcuda.so.1); `device: cpu` does without\n"
    );
    assert!(!project.path("out").exists());
}

#[test]
fn auto_takes_the_cpu_and_says_why() {
    let project = Project::golden("llama", GOLDEN_SETTINGS);
    let output = train_without_driver(&project, "device=auto");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    let expected = "device: cpu, as no NVIDIA driver was found (libcuda.so.1)";
    assert!(said.contains(expected), "{said}");
}
