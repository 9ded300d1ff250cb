//! What the worker itself takes while large files pass through it.

use std::io::Write;

use serde_json::json;

use super::harness::{Deployment, number_from};

/// Most of its resident memory, in bytes.
const LIMIT: u64 = 64_000_000;

/// Size of what passes, in MB: `BRIGHTRUN_TEST_MB` asks for another (the soak: 500 fetched, 1000 uploaded).
fn megabytes() -> usize {
    number_from("BRIGHTRUN_TEST_MB", 96)
}

#[test]
fn a_large_data_set_passes_through_a_small_worker() {
    let mut deployment = Deployment::new();
    let path = deployment.sim.add_file("large.jsonl", b"").unwrap();
    let mut file = fs_err::File::create(path).unwrap();
    let line = format!("{{\"nothing\": \"{}\"}}\n", "x".repeat(999_985));
    for _ in 0..megabytes() {
        file.write_all(line.as_bytes()).unwrap();
    }
    drop(file);
    let (mut body, _) = deployment.job(51, 1);
    body["input"]["dataset_url"] = json!(deployment.sim.file_url("large.jsonl"));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    let document = deployment.ended(&runpod_id);
    assert!(
        document["error"].as_str().unwrap().contains("exit code 65"),
        "{document:#}"
    );
    let size = megabytes() * line.len();
    assert!(
        worker.said().contains(&format!("data set: {size} bytes")),
        "{}",
        worker.said()
    );
    let peak = worker.peak_memory();
    println!("{size} bytes of data set: peak of the worker {peak} bytes");
    assert!(peak < LIMIT, "{peak} bytes");
}

#[test]
fn a_large_adapter_passes_through_a_small_worker() {
    let mut deployment = Deployment::new();
    let (_, id) = deployment.job(52, 1);
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
    let adapter = dir.join("run/adapter");
    fs_err::create_dir_all(&adapter).unwrap();
    let weights = fs_err::File::create(adapter.join("adapter_model.safetensors")).unwrap();
    let size = 2 * megabytes() as u64 * 1_000_000;
    weights.set_len(size).unwrap();
    let delivery = json!({
        "job_id": id, "runpod_id": "gone-u1", "callback_url": null, "begun": 1, "finished": 2, "archive": null,
        "uploaded": false, "output": null, "row_written": false, "posted": false, "told": false,
        "trained": {
            "base_model": "brightrun/demo", "lora_rank": 8, "adapter": adapter, "steps": 1, "epochs": 1.0,
            "final_loss": 1.5, "eval_loss": null, "training_s": 2.0, "tokens_per_s": null, "warnings": [],
        },
    });
    fs_err::write(dir.join("delivery.json"), delivery.to_string()).unwrap();
    let worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "300")]);
    deployment.until("the row", || deployment.row(&id)["status"] == "completed");
    let object = format!("adapters/{id}/adapter_model.safetensors");
    assert_eq!(
        deployment
            .sim
            .object(super::harness::BUCKET, &object)
            .unwrap()
            .size,
        size
    );
    let peak = worker.peak_memory();
    println!("{size} bytes of weights: peak of the worker {peak} bytes");
    assert!(peak < LIMIT, "{peak} bytes");
    assert_eq!(deployment.sim.deploys(), 1);
}
