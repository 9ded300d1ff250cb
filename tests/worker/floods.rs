//! Data sets that are too much or not what they say (F14): each ends its job at the cap, says why, and leaves the worker small.

use std::io::Write;

use brightrun::sim::{Action, Fault, Route};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::harness::Deployment;

/// Cap of the worker.
const MOST: usize = 2_000_000;
/// Most of its resident memory, in bytes: caps do not show in it.
const LIMIT: u64 = 64_000_000;

fn packed(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn data_sets_end_at_the_cap_and_say_why() {
    let mut deployment = Deployment::new();
    let pairs = fs_err::read(super::harness::demo("pairs.jsonl")).unwrap();
    let bomb = packed(&vec![b' '; 100 * MOST]);
    assert!(bomb.len() < MOST);
    let zstd = [&b"\x28\xb5\x2f\xfd"[..], &pairs].concat();
    let all: [(&str, Vec<u8>, Option<Action>, &str); 8] = [
        ("large", vec![b' '; MOST + 1], None, "at most 2000000 bytes"),
        (
            "endless",
            pairs.clone(),
            Some(Action::Endless),
            "does not end",
        ),
        ("bomb", bomb.clone(), None, "100 to 1 are taken"),
        ("nested", packed(&bomb), None, "gzip twice"),
        ("zstd", zstd.clone(), None, "by zstd"),
        ("packed-zstd", packed(&zstd), None, "by zstd"),
        (
            "unpacked-large",
            packed(&noise(MOST + 1)),
            None,
            "at most 2000000 bytes",
        ),
        (
            "half",
            packed(&pairs)[..900].to_vec(),
            None,
            "no whole gzip file",
        ),
    ];
    let most = MOST.to_string();
    let worker = deployment.worker_with(&[("BRIGHTRUN_MAX_DATASET_BYTES", &most)]);
    for (number, (name, content, action, says)) in (121..).zip(all) {
        deployment.sim.add_file(name, &content).unwrap();
        if let Some(action) = action {
            let fault = Fault::always(Route::Files, action).path(name);
            deployment.sim.add_fault(fault);
        }
        let (mut body, id) = deployment.job(number, 1);
        body["input"]["dataset_url"] = json!(deployment.sim.file_url(name));
        let runpod_id = deployment.sim.submit(body).unwrap();
        let document = deployment.ended(&runpod_id);
        assert_eq!(document["status"], "FAILED", "{name}: {document:#}");
        let error = document["error"].as_str().unwrap();
        assert!(error.contains(says), "{name}: {error}");
        let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
        for left in ["dataset.jsonl.unpacked", "dataset.json"] {
            assert!(!dir.join(left).exists(), "{name}: {left} is left");
        }
    }
    let peak = worker.peak_memory();
    assert!(peak < LIMIT, "{peak} bytes");
    // It takes the next one as ever.
    let (mut body, _) = deployment.job(130, 1);
    deployment
        .sim
        .add_file("pairs.jsonl.gz", &packed(&pairs))
        .unwrap();
    body["input"]["dataset_url"] = json!(deployment.sim.file_url("pairs.jsonl.gz"));
    let runpod_id = deployment.sim.submit(body).unwrap();
    deployment.completed(&runpod_id);
    deployment.check_manners();
}

/// Bytes that pack a little: under the cap of the ratio, over that of the size.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b'a' + (state >> 28) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}
