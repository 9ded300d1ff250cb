//! An adapter above 6 MiB goes up in pieces (F16): through cuts, refusals, addresses that expire, and a worker that is killed on the way.

use brightrun::sim::{Action, Fault, Object, Record, Route};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::harness::{BUCKET, Deployment};

/// Rank at which the demo's adapter takes two pieces, and its archive too.
const RANK: u32 = 256;
/// Modules that are trained for that.
const MODULES: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkvz",
    "in_proj_ba",
    "out_proj",
];
/// Size of a piece.
const PIECE: u64 = 6 << 20;

/// A short job with a large adapter.
fn large_job(deployment: &Deployment, number: u32) -> (Value, String) {
    let (mut body, id) = deployment.job(number, 1);
    body["input"]["hyperparameters"]["rank"] = json!(RANK);
    body["input"]["hyperparameters"]["alpha"] = json!(RANK);
    body["input"]["config"] =
        json!({"sequence_len": 512, "max_steps": 4, "lora_target_modules": MODULES});
    (body, id)
}

fn on_pieces(number: u64, action: Action) -> Fault {
    let fault = Fault::next(Route::Tus, number, action).method("PATCH");
    Fault {
        first: number,
        ..fault
    }
}

/// The requests of resumable uploads, from request `from` on; not those that only ask what is taken.
fn uploads(deployment: &Deployment, from: usize) -> Vec<Record> {
    let mut records = deployment.sim.records_from(from);
    let asks = |record: &Record| {
        let metadata = record.header("upload-metadata").unwrap_or_default();
        record.method == "DELETE" || (record.method == "POST" && !metadata.contains(",metadata "))
    };
    records.retain(|record| record.route == Route::Tus && !asks(record));
    records
}

fn count(records: &[Record], method: &str) -> usize {
    records
        .iter()
        .filter(|record| record.method == method)
        .count()
}

/// The adapter of job `id` is there once, whole, in each of its two forms; the large objects are returned.
#[track_caller]
fn check_delivered(deployment: &Deployment, id: &str, runpod_id: &str) -> Vec<Object> {
    let document = deployment.completed(runpod_id);
    let trained = deployment.path(&format!(
        "volume/brightrun/jobs/{id}/run/adapter/adapter_model.safetensors"
    ));
    let trained = fs_err::read(trained).unwrap();
    assert!(trained.len() as u64 > PIECE, "{} bytes", trained.len());
    assert!(
        deployment.weights(id) == trained,
        "the archive's weights differ"
    );
    let name = format!("adapters/{id}/adapter_model.safetensors");
    assert!(
        deployment.object(&name).unwrap() == trained,
        "the weights differ"
    );

    let archive = deployment.object(&format!("adapters/{id}.tar.gz")).unwrap();
    let digest = brightrun::hex::hex(&Sha256::digest(&archive));
    assert_eq!(document["output"]["adapter_sha256"], json!(digest));
    let mut objects = deployment.sim.objects();
    let mut paths: Vec<&str> = objects.iter().map(|object| object.path.as_str()).collect();
    paths.sort_unstable();
    let all = paths.len();
    paths.dedup();
    assert_eq!(paths.len(), all, "{paths:?}");
    assert!(objects.iter().all(|object| object.bucket == BUCKET));

    deployment.until("the row", || deployment.row(id)["status"] == "completed");
    assert_eq!(deployment.sim.deploys(), 1);
    objects.retain(|object| object.size >= PIECE);
    objects
}

#[test]
fn a_large_adapter_survives_cuts_and_refusals() {
    let mut deployment = Deployment::new();
    let (body, id) = large_job(&deployment, 61);
    let refusals = [
        (1, Action::status(500)),
        (3, Action::Reset),
        (5, Action::ResetAfter),
        (6, Action::status(409)),
        (7, Action::status(423)),
    ];
    for (number, action) in refusals {
        deployment.sim.add_fault(on_pieces(number, action));
    }
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "60")]);
    let objects = check_delivered(&deployment, &id, &runpod_id);
    let sent = uploads(&deployment, 0);
    assert_eq!(sent.iter().filter(|record| record.faulted).count(), 5);
    // Each was begun once, and after each fault asked how far it was.
    assert_eq!(objects.len(), 2);
    assert_eq!(count(&sent, "POST"), 2, "{sent:#?}");
    assert_eq!(count(&sent, "HEAD"), 5, "{sent:#?}");
    deployment.check_secrets();
}

#[test]
fn an_upload_whose_address_expires_starts_over() {
    for (number, status) in [(62, 404), (63, 410)] {
        let mut deployment = Deployment::new();
        let (body, id) = large_job(&deployment, number);
        deployment
            .sim
            .add_fault(on_pieces(2, Action::status(status)));
        let runpod_id = deployment.sim.submit(body).unwrap();
        let _worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "60")]);
        check_delivered(&deployment, &id, &runpod_id);
        let sent = uploads(&deployment, 0);
        assert_eq!(count(&sent, "POST"), 3, "{sent:#?}");
        deployment.check_secrets();
    }
}

#[test]
fn a_worker_killed_while_it_uploads_goes_on_there() {
    let mut deployment = Deployment::new();
    let (body, id) = large_job(&deployment, 64);
    deployment.sim.add_fault(on_pieces(2, Action::Hang));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut worker = deployment.worker();
    deployment.until("the second piece", || {
        count(&uploads(&deployment, 0), "PATCH") == 2
    });
    worker.kill();
    deployment.sim.clear_faults();
    let from = deployment.sim.records().len();
    let before = uploads(&deployment, 0);
    assert_ne!(deployment.row(&id)["status"], "completed");

    assert!(deployment.sim.requeue(&runpod_id));
    let next = deployment.worker();
    let objects = check_delivered(&deployment, &id, &runpod_id);
    assert!(next.said().contains("its delivery goes on") || next.said().contains("trained before"));
    let after = uploads(&deployment, from);
    assert_eq!(after[0].method, "HEAD", "{after:#?}");
    assert_eq!(after[0].target, before[1].target);
    assert_eq!(after[1].method, "PATCH");
    assert_eq!(after[1].header("upload-offset"), Some(&*PIECE.to_string()));
    // Nothing that was there is sent again.
    let bytes =
        |records: &[Record]| -> u64 { records.iter().map(|record| record.body_bytes).sum() };
    let whole: u64 = objects.iter().map(|object| object.size).sum();
    assert_eq!(bytes(&after), whole - PIECE, "{}", next.said());
    assert_eq!(count(&before, "POST") + count(&after, "POST"), 2);
    deployment.check_secrets();
}
