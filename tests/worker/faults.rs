//! What goes wrong around a job must not cost it its adapter.

use std::time::Duration;

use brightrun::sim::{Action, Fault, Route, Status};
use serde_json::{Value, json};

use super::harness::Deployment;

fn status(code: u16) -> Action {
    Action::Status {
        code,
        body: Value::Null,
        retry_after: None,
        committed: false,
    }
}

#[test]
fn the_database_is_down_for_the_whole_run() {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Rows, Action::Reset));
    let (body, id) = deployment.job(21, 2);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "2")]);
    let document = deployment.completed(&runpod_id);
    assert_eq!(document["output"]["status"], "completed");
    assert!(!deployment.weights(&id).is_empty());
    assert_eq!(deployment.sim.deploys(), 0);
    drop(worker);
    // The next start finds the database again.
    deployment.sim.clear_faults();
    let _worker = deployment.worker();
    deployment.until("the row", || deployment.row(&id)["status"] == "completed");
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_manners();
}

#[test]
fn the_storage_fails_twenty_times() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(22, 1);
    let actions = [
        status(500),
        status(503),
        Action::Reset,
        Action::ResetAfter,
        status(429),
    ];
    // Every third request: a check of what is there takes two.
    for (number, action) in actions.iter().cycle().take(20).enumerate() {
        let mut fault = Fault::next(Route::Storage, 3 * number as u64 + 1, action.clone());
        fault.first = 3 * number as u64 + 1;
        deployment.sim.add_fault(fault);
    }
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "90")]);
    deployment.completed(&runpod_id);
    assert!(!deployment.weights(&id).is_empty());
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_manners();
}

#[test]
fn a_storage_that_stays_away_leaves_the_adapter_for_the_next_start() {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Storage, status(503)));
    let (body, id) = deployment.job(23, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "2")]);
    let document = deployment.ended(&runpod_id);
    assert_eq!(document["status"], "FAILED");
    assert!(
        document["error"]
            .as_str()
            .unwrap()
            .contains("the next start"),
        "{document:#}"
    );
    assert_eq!(deployment.row(&id)["status"], "failed");
    drop(worker);
    deployment.sim.clear_faults();
    let _worker = deployment.worker();
    deployment.until("the row", || deployment.row(&id)["status"] == "completed");
    assert!(!deployment.weights(&id).is_empty());
    assert_eq!(deployment.sim.deploys(), 1);
    // Sent again it gets the stored result.
    let again = deployment.sim.submit(deployment.body(&id, 1)).unwrap();
    deployment.completed(&again);
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_secrets();
}

#[test]
fn results_reach_a_platform_that_stumbles() {
    for (number, faults) in [
        (24, vec![Fault::next(Route::Done, 3, status(500))]),
        (25, vec![Fault::next(Route::Done, 2, Action::Reset)]),
        (26, vec![Fault::next(Route::Done, 1, Action::ResetAfter)]),
        (27, vec![Fault::next(Route::Done, 1, status(413))]),
        (
            28,
            vec![
                Fault::next(Route::Take, 3, status(500)),
                Fault::next(Route::Ping, 2, status(503)),
                Fault::next(Route::Progress, 3, Action::Reset),
                Fault::next(Route::Stop, 2, status(404)),
            ],
        ),
    ] {
        let mut deployment = Deployment::new();
        faults
            .into_iter()
            .for_each(|fault| deployment.sim.add_fault(fault));
        let (body, id) = deployment.job(number, 1);
        let runpod_id = deployment.sim.submit(body).unwrap();
        let _worker = deployment.worker();
        let document = deployment.completed(&runpod_id);
        assert_eq!(document["output"]["status"], "completed", "{number}");
        assert_eq!(
            document["output"]["adapter_file_path"],
            json!(format!("lora-models/adapters/{id}.tar.gz"))
        );
        assert_eq!(deployment.sim.deploys(), 1, "{number}");
        deployment.check_secrets();
    }
}

#[test]
fn a_dead_callback_and_a_cut_download_change_nothing() {
    let mut deployment = Deployment::new();
    deployment
        .sim
        .add_fault(Fault::always(Route::Callback, status(500)));
    deployment
        .sim
        .add_fault(Fault::next(Route::Files, 3, Action::CutAfter(20_000)));
    let (mut body, id) = deployment.job(29, 1);
    body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.completed(&runpod_id);
    assert_eq!(deployment.row(&id)["status"], "completed");
    drop(worker);
    // The last event is told by the next start.
    deployment.sim.clear_faults();
    let _worker = deployment.worker();
    deployment.until("the event", || {
        let last = deployment.sim.callbacks("app").pop();
        last.is_some_and(|callback| super::harness::kind(&callback) == "training.completed")
    });
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_manners();
}

#[test]
fn an_expired_address_is_signed_anew() {
    let mut deployment = Deployment::new();
    let pairs = fs_err::read(super::harness::demo("pairs.jsonl")).unwrap();
    deployment
        .sim
        .put_object("training-files", "u1/training.jsonl", &pairs)
        .unwrap();
    let (mut body, _) = deployment.job(30, 1);
    let url = deployment
        .sim
        .sign_object("training-files", "u1/training.jsonl", Duration::ZERO)
        .unwrap();
    body["input"]["dataset_url"] = json!(url);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let (mut body, _) = deployment.job(31, 1);
    body["input"]["dataset_url"] = json!(
        deployment
            .sim
            .signed_file_url("pairs.jsonl", Duration::ZERO)
    );
    let lost = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    deployment.completed(&runpod_id);
    let document = deployment.ended(&lost);
    assert!(
        document["error"]
            .as_str()
            .unwrap()
            .contains("dataset_url_expired"),
        "{document:#}"
    );
    deployment.check_manners();
}

/// One job given to a second worker while a first one trains it; the second, on `state_dir`, says `waits` of it.
fn train_twice(number: u32, state_dir: &str, waits: &str) -> Deployment {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(number, 6);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let first = deployment.worker();
    deployment.until_step(&id, 1);
    assert!(deployment.sim.requeue(&runpod_id));
    let state_dir = deployment.path(state_dir).display().to_string();
    let second = deployment.worker_with(&[("BRIGHTRUN_STATE_DIR", &state_dir)]);
    deployment.until("the second", || second.said().contains(waits));
    deployment.completed(&runpod_id);
    deployment.until("both", || first.is_over() && second.is_over());
    let trainings = deployment.logs().matches("training: ").count();
    assert_eq!(trainings, 1, "{}", deployment.logs());
    assert_eq!(deployment.sim.deploys(), 1);
    deployment
}

#[test]
fn one_job_for_two_workers_is_trained_once() {
    let waits = "another worker is at this job";
    let deployment = train_twice(32, "volume/brightrun", waits);
    deployment.check_secrets();
}

#[test]
fn one_job_for_two_workers_without_a_common_volume_is_trained_once() {
    train_twice(33, "elsewhere", "the row says that another worker");
}

#[test]
fn sigterm_ends_an_idle_worker_and_saves_a_busy_one() {
    use rustix::process::Signal;
    let mut deployment = Deployment::new();
    let mut idle = deployment.worker();
    deployment.until("a take", || deployment.sim.count(Route::Take) > 0);
    idle.signal(Signal::TERM);
    assert_eq!(idle.wait(), Some(0));
    let (body, id) = deployment.job(34, 20);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut busy = deployment.worker_with(&[("BRIGHTRUN_DRAIN_S", "1")]);
    deployment.until_step(&id, 1);
    busy.signal(Signal::TERM);
    assert_eq!(busy.wait(), Some(0));
    assert!(busy.said().contains("saving a checkpoint"));
    assert_eq!(deployment.sim.status(&runpod_id), Some(Status::InProgress));
    // Whoever gets it next goes on there.
    let next = deployment.worker();
    deployment.completed(&runpod_id);
    assert!(next.said().contains("going on after step"));
    let (body, id) = deployment.job(35, 20);
    deployment.sim.submit(body).unwrap();
    let mut twice = next;
    deployment.until_step(&id, 1);
    twice.signal(Signal::TERM);
    deployment.until("the first", || {
        twice.said().contains("no more jobs are taken")
    });
    twice.signal(Signal::TERM);
    assert_eq!(twice.wait(), Some(143));
    deployment.check_secrets();
}

#[test]
fn a_worker_that_cannot_work_says_so_and_takes_nothing() {
    let mut deployment = Deployment::new();
    let (body, _) = deployment.job(36, 1);
    deployment.sim.submit(body).unwrap();
    let mut unfit = deployment.worker_with(&[
        ("BRIGHTRUN_DEVICE", "cuda"),
        ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", ""),
    ]);
    assert_eq!(unfit.wait(), Some(1));
    assert_eq!(deployment.sim.count(Route::Take), 0);
    let told = deployment.sim.unhealthy("pod1");
    assert!(
        told.iter().any(|text| text.starts_with("gpu: ")),
        "{told:?}"
    );
    let _fit = deployment.worker_with(&[("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "")]);
    deployment.until("a take", || deployment.sim.count(Route::Take) > 0);
}

#[test]
fn a_job_that_gets_nowhere_is_given_up() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(37, 3);
    let attempts = deployment.path(&format!("volume/brightrun/jobs/{id}/attempts.json"));
    fs_err::create_dir_all(attempts.parent().unwrap()).unwrap();
    fs_err::write(
        &attempts,
        json!({"count": 5, "total": 9, "step": 0}).to_string(),
    )
    .unwrap();
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    let document = deployment.ended(&runpod_id);
    assert_eq!(document["status"], "FAILED");
    assert!(
        document["error"]
            .as_str()
            .unwrap()
            .contains("without getting further"),
        "{document:#}"
    );
}

#[test]
fn a_job_is_stopped_before_its_time_is_over() {
    let mut deployment = Deployment::new();
    let (mut body, id) = deployment.job(38, 20);
    body["policy"] = json!({"executionTimeout": 66_000});
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    let document = deployment.ended(&runpod_id);
    assert_eq!(document["status"], "FAILED", "{document:#}");
    assert!(
        document["error"]
            .as_str()
            .unwrap()
            .contains("executionTimeout")
    );
    assert_eq!(deployment.row(&id)["status"], "failed");
    let again = deployment.sim.submit(deployment.body(&id, 20)).unwrap();
    deployment.completed(&again);
    assert!(worker.said().contains("going on after step"));
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_manners();
}

#[test]
fn what_is_left_of_old_jobs_is_removed() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(39, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.completed(&runpod_id);
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}"));
    deployment.until("what only the training needs to be gone", || {
        !dir.join("run/checkpoints").exists() && !dir.join("dataset.jsonl").exists()
    });
    drop(worker);
    assert!(dir.join("run/adapter/adapter_model.safetensors").is_file());
    let worker = deployment.worker_with(&[("BRIGHTRUN_KEEP_DAYS", "1")]);
    let takes = deployment.sim.count(Route::Take);
    deployment.until("a take", || deployment.sim.count(Route::Take) > takes + 2);
    assert!(dir.is_dir());
    drop(worker);
    std::thread::sleep(Duration::from_secs(1));
    let _worker = deployment.worker_with(&[("BRIGHTRUN_KEEP_DAYS", "0.00001")]);
    deployment.until("its removal", || !dir.exists());
}
