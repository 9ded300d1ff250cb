//! A callback that is away, for as long as the retries of the last event take (F17): the training does not mind, and the end is told.

use std::time::Duration;

use brightrun::sim::{Action, Fault, Record, Route, Status};
use serde_json::{Value, json};

use super::harness::Deployment;

/// The real waits, a hundred times faster: 755 s in 7.55 s.
const WAITS: &str = "0,0.05,0.3,1.2,3,3";
const WAITS_MS: [u64; 6] = [0, 50, 300, 1200, 3000, 3000];

/// Every callback that was tried, heard or not.
fn tries(deployment: &Deployment) -> Vec<Record> {
    let mut records = deployment.sim.records();
    records.retain(|record| record.route == Route::Callback);
    records
}

/// Those of the job's end.
fn ends(deployment: &Deployment) -> Vec<Record> {
    let mut records = tries(deployment);
    records.retain(|record| record.json()["type"] != "training.progress");
    records
}

fn id_of(record: &Record) -> &str {
    record.header("webhook-id").unwrap()
}

/// Progress comes in order, each once, then nothing but the end: always the same event, byte for byte.
#[track_caller]
fn check_order(deployment: &Deployment, kind: &str) {
    let tries = tries(deployment);
    let count = tries.len() - ends(deployment).len();
    let (progress, end) = tries.split_at(count);
    let numbers: Vec<Value> = progress
        .iter()
        .map(|record| record.json()["data"]["seq"].clone())
        .collect();
    let expected: Vec<Value> = (1..=count).map(|number| json!(number)).collect();
    assert_eq!(numbers, expected);
    let mut ids: Vec<&str> = progress.iter().map(id_of).collect();
    ids.push(id_of(&end[0]));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count + 1, "events have ids of their own");
    assert_eq!(end[0].json()["data"]["seq"], json!(count + 1));
    for event in &tries {
        assert!(event.json()["data"]["runpod_job_id"].is_string());
    }
    for again in end {
        assert_eq!(again.json()["type"], kind);
        assert_eq!(id_of(again), id_of(&end[0]));
        assert_eq!(again.body, end[0].body);
    }
}

#[test]
fn a_callback_away_for_ten_minutes_costs_nothing_and_hears_the_end() {
    let mut deployment = Deployment::new();
    let (body, plain) = deployment.job(91, 2);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker_with(&[("BRIGHTRUN_CALLBACK_WAITS_S", WAITS)]);
    deployment.completed(&runpod_id);

    let down = [Action::status(500), Action::Reset, Action::status(503)];
    for (number, action) in down.iter().cycle().take(300).enumerate() {
        let fault = Fault::next(Route::Callback, number as u64 + 1, action.clone());
        deployment.sim.add_fault(Fault {
            first: number as u64 + 1,
            ..fault
        });
    }
    let (mut body, id) = deployment.job(92, 2);
    body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
    let runpod_id = deployment.sim.submit(body).unwrap();
    // The platform, the row and the bucket have it all while nobody listens.
    deployment.completed(&runpod_id);
    assert_eq!(deployment.row(&id)["status"], "completed");
    assert!(deployment.weights(&id) == deployment.weights(&plain));
    deployment.until("five tries", || ends(&deployment).len() == 5);
    assert!(deployment.sim.callbacks("app").is_empty());
    deployment.sim.clear_faults();
    deployment.until("the end", || !deployment.sim.callbacks("app").is_empty());
    let tries = ends(&deployment);
    assert_eq!(tries.len(), 6);
    for (pair, wait) in tries.windows(2).zip(&WAITS_MS[1..]) {
        let waited = pair[1].at.saturating_sub(pair[0].at);
        assert!(waited >= Duration::from_millis(*wait), "{waited:?} {wait}");
    }
    check_order(&deployment, "training.completed");
    assert_eq!(deployment.sim.deploys(), 2);
    deployment.check_manners();
}

/// A job whose end nobody hears; its worker is killed while it tells. The next one tells, and the one after that has nothing to tell.
fn tell_after_a_kill(number: u32, is_good: bool, kind: &str) {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Callback, Action::status(500)));
    deployment.sim.add_file("empty.jsonl", b"{}\n").unwrap();
    let (mut body, id) = deployment.job(number, 1);
    body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
    if !is_good {
        body["input"]["dataset_url"] = json!(deployment.sim.file_url("empty.jsonl"));
    }
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut worker = deployment.worker();
    deployment.until("the end", || {
        let status = deployment.sim.status(&runpod_id);
        !ends(&deployment).is_empty() && matches!(status, Some(Status::Completed)) == is_good
    });
    worker.kill();
    let tried = ends(&deployment).len();
    deployment.sim.clear_faults();
    if !is_good {
        // It was not answered yet; the platform gives it up.
        deployment.sim.cancel(&runpod_id);
    }
    let next = deployment.worker();
    deployment.until("the end", || deployment.sim.callbacks("app").len() == 1);
    // Killed before it is noted, it would be told twice.
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
    deployment.until("a note of it", || {
        let delivery = fs_err::read_to_string(dir.join("delivery.json"));
        !dir.join("event.json").exists()
            && delivery.is_ok_and(|text| text.contains(r#""told": true"#)) == is_good
    });
    drop(next);
    assert_eq!(ends(&deployment).len(), tried + 1);
    check_order(&deployment, kind);

    let takes = deployment.sim.count(Route::Take);
    let _last = deployment.worker();
    deployment.until("takes", || deployment.sim.count(Route::Take) > takes + 1);
    assert_eq!(ends(&deployment).len(), tried + 1, "it is told once");
    deployment.check_secrets();
}

#[test]
fn the_end_of_a_good_job_survives_a_kill() {
    tell_after_a_kill(93, true, "training.completed");
}

#[test]
fn the_end_of_a_failed_job_survives_a_kill() {
    tell_after_a_kill(94, false, "training.failed");
}
