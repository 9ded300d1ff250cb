//! What cannot be delivered waits in the outbox, each job for itself, and holds nothing else up.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use brightrun::sim::{Action, Bucket, Fault, Record, Route, Settings, Status};
use serde_json::{Value, json};

use super::harness::{BUCKET, Deployment, TABLE};

/// A file of job `id`.
fn kept(deployment: &Deployment, id: &str, name: &str) -> Option<Value> {
    let path = deployment.path(&format!("volume/brightrun/jobs/{id}/{name}"));
    serde_json::from_slice(&fs_err::read(path).ok()?).ok()
}

/// What was put into the storage, in order.
fn puts(deployment: &Deployment) -> Vec<Record> {
    let mut records = deployment.sim.records();
    records.retain(|record| record.route == Route::Storage && record.method == "POST");
    records.retain(|record| record.target.contains("/object/lora-models/"));
    records
}

#[test]
fn a_dead_callback_holds_nothing_up() {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Callback, Action::status(404)));
    let (mut body, id) = deployment.job(111, 1);
    body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
    let first = deployment.sim.submit(body).unwrap();
    let (body, _) = deployment.job(112, 1);
    let second = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker_with(&[("BRIGHTRUN_CALLBACK_WAITS_S", "0,29")]);
    deployment.completed(&first);
    deployment.completed(&second);
    let ends = deployment.sim.records();
    let ends = ends.iter().filter(|record| {
        record.route == Route::Callback && record.json()["type"] == "training.completed"
    });
    assert_eq!(ends.count(), 1, "the next job does not wait for it");
    let delivery = kept(&deployment, &id, "delivery.json").unwrap();
    assert_eq!([&delivery["posted"], &delivery["told"]], [true, false]);
    assert_eq!(delivery["trained"]["adapter"], "run/adapter");
    // The callback needs no files.
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
    assert!(!dir.join("run/checkpoints").exists() && !dir.join("adapter.tar.gz").exists());
}

#[test]
fn an_end_is_no_news_after_a_day() {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Callback, Action::status(404)));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    for (id, age_s) in [("fresh", 23 * 3600), ("old", 25 * 3600)] {
        let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
        fs_err::create_dir_all(&dir).unwrap();
        let event = json!({
            "id": format!("msg_{id}_1_end"), "type": "training.failed", "unix_seconds": now.as_secs() - age_s, "data": {},
        });
        let news = json!({"callback_url": deployment.sim.callback_url(id), "event": event});
        fs_err::write(dir.join("event.json"), news.to_string()).unwrap();
    }
    let _worker = deployment.worker();
    deployment.until("its end", || {
        kept(&deployment, "old", "event.json").is_none()
    });
    assert!(kept(&deployment, "fresh", "event.json").is_some());
    assert!(deployment.logs().contains("is not told any more"));
}

#[test]
fn a_row_that_is_refused_for_good_ends_its_part() {
    let mut deployment = Deployment::new();
    let body = json!({"code": "PGRST205", "message": "Could not find the table"});
    let refusal = Action::Status {
        code: 404,
        body,
        retry_after: None,
        committed: false,
    };
    deployment
        .sim
        .add_fault(Fault::always(Route::Rows, refusal).path(TABLE));
    let (body, id) = deployment.job(113, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    deployment.completed(&runpod_id);
    deployment.until("the delivery", || {
        kept(&deployment, &id, "delivery.json").is_some_and(|delivery| delivery["told"] == true)
    });
    let delivery = kept(&deployment, &id, "delivery.json").unwrap();
    assert_eq!(delivery["row_written"], true);
    let logs = deployment.logs();
    assert_eq!(logs.matches("the row stays without").count(), 1, "{logs}");
    assert!(logs.contains("PGRST205"), "{logs}");
}

#[test]
fn a_failure_that_the_platform_did_not_get_is_given_later() {
    let mut deployment = Deployment::new();
    deployment.sim.add_file("empty.jsonl", b"{}\n").unwrap();
    deployment
        .sim
        .add_fault(Fault::always(Route::Done, Action::status(503)));
    let (mut body, id) = deployment.job(114, 1);
    body["input"]["dataset_url"] = json!(deployment.sim.file_url("empty.jsonl"));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker_with(&[
        ("BRIGHTRUN_RETRY_S", "1"),
        ("BRIGHTRUN_CALLBACK_WAITS_S", "0,0.5,0.5"),
    ]);
    deployment.until("its failure", || {
        worker.said().contains("could not be given to the platform")
    });
    let owed = kept(&deployment, &id, "answer.json").unwrap();
    assert_eq!(owed["runpod_id"], json!(runpod_id));
    assert!(kept(&deployment, &id, "result.json").is_none());
    deployment.sim.clear_faults();
    let document = deployment.ended(&runpod_id);
    assert_eq!(document["error"], owed["body"]["error"]);
    assert_eq!(deployment.sim.deliveries(&runpod_id).len(), 1);
    deployment.until("its removal", || {
        kept(&deployment, &id, "answer.json").is_none()
    });
    deployment.check_secrets();
}

#[test]
fn an_adapter_that_cannot_be_stored_is_not_trained() {
    for (number, settings, advice) in [
        (
            115,
            Settings {
                file_size_limit: 1000,
                ..Settings::default()
            },
            "global file size limit",
        ),
        (
            116,
            Settings {
                buckets: vec![Bucket {
                    file_size_limit: Some(1000),
                    ..Bucket::new(BUCKET)
                }],
                ..Settings::default()
            },
            "raise its limit",
        ),
    ] {
        let mut deployment = Deployment::with(settings);
        let (body, id) = deployment.job(number, 1);
        let runpod_id = deployment.sim.submit(body).unwrap();
        let _worker = deployment.worker();
        let document = deployment.ended(&runpod_id);
        let error = document["error"].as_str().unwrap();
        assert!(
            error.contains("is not trained") && error.contains(advice),
            "{error}"
        );
        assert_eq!(deployment.row(&id)["status"], "failed");
        assert!(!deployment.logs().contains("training: "));
    }
}

#[test]
fn texts_that_a_bucket_does_not_take_stay_in_the_archive() {
    let bucket = Bucket {
        allowed_mime_types: Some(vec!["application/*".to_owned()]),
        ..Bucket::new(BUCKET)
    };
    let mut deployment = Deployment::with(Settings {
        buckets: vec![bucket],
        ..Settings::default()
    });
    let (body, id) = deployment.job(117, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    let document = deployment.completed(&runpod_id);
    let packed: Vec<String> = deployment
        .adapter(&id)
        .into_iter()
        .map(|file| file.0)
        .collect();
    let urls = document["output"]["download_urls"].as_object().unwrap();
    let left: Vec<&String> = packed
        .iter()
        .filter(|name| !urls.contains_key(*name))
        .collect();
    assert!(
        !left.is_empty() && left.len() < packed.len(),
        "{left:?} of {packed:?}"
    );
    assert!(deployment.logs().contains("is in the archive alone"));
    // The application deploys the archive, and the manifest says that all is there.
    let puts = puts(&deployment);
    assert!(puts[0].target.contains(".tar.gz"), "{puts:#?}");
    let last = &puts[puts.len() - 1].target;
    assert!(last.contains("manifest.json"), "{last}");
}

#[test]
fn what_is_stored_wrongly_is_sent_again_twice() {
    for (number, wrong, sent) in [(118, 1, 2), (119, 99, 3)] {
        let mut deployment = Deployment::new();
        let fault = Fault::next(Route::Storage, wrong, Action::WrongLength(5));
        deployment
            .sim
            .add_fault(fault.method("HEAD").path(".tar.gz"));
        let (body, id) = deployment.job(number, 1);
        let runpod_id = deployment.sim.submit(body).unwrap();
        let _worker = deployment.worker();
        deployment.ended(&runpod_id);
        let is_good = deployment.sim.status(&runpod_id) == Some(Status::Completed);
        assert_eq!(is_good, wrong == 1, "{}", deployment.logs());
        let mut puts = puts(&deployment);
        puts.retain(|put| put.target.contains(".tar.gz"));
        assert_eq!(puts.len(), sent);
        assert_eq!(deployment.row(&id)["status"] == "completed", is_good);
    }
}

#[test]
fn a_job_sent_again_gets_its_row_back() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(120, 1);
    let first = deployment.sim.submit(body.clone()).unwrap();
    let worker = deployment.worker();
    deployment.completed(&first);
    deployment.until("its end", || worker.is_over());
    let new = json!({"status": "initializing", "progress": 0, "adapter_file_path": null});
    deployment
        .sim
        .update_rows(TABLE, &format!("id=eq.{id}"), &new)
        .unwrap();
    let again = deployment.sim.submit(body).unwrap();
    deployment.completed(&again);
    let row = deployment.row(&id);
    assert_eq!(row["status"], "completed");
    assert_eq!(
        row["adapter_file_path"],
        json!(format!("{BUCKET}/adapters/{id}.tar.gz"))
    );
    assert_eq!(deployment.logs().matches("training: ").count(), 1);
}

#[test]
fn a_delivery_that_nobody_takes_is_given_up_in_the_end() {
    let mut deployment = Deployment::new();
    let refused = Fault::always(Route::Storage, Action::status(403)).method("POST");
    deployment.sim.add_fault(refused);
    let (body, id) = deployment.job(121, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.ended(&runpod_id);
    deployment.until("its end", || worker.is_over());
    drop(worker);
    let tried = puts(&deployment).len();
    assert_eq!(
        kept(&deployment, &id, "delivery.json").unwrap()["stopped"],
        false
    );
    let finished = kept(&deployment, &id, "delivery.json").unwrap()["finished"].as_u64();
    deployment.until("its age", || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now > Duration::from_secs(finished.unwrap() + 4)
    });
    // Three seconds.
    let worker = deployment.worker_with(&[("BRIGHTRUN_KEEP_DAYS", "0.000035")]);
    deployment.until("the end of it", || worker.said().contains("is given up"));
    assert_eq!(puts(&deployment).len(), tried + 1);
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
    assert!(dir.join("run/adapter/adapter_model.safetensors").is_file());
    drop(worker);
}
