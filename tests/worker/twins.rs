//! One job given to two workers at once (F18): one trains it, whoever it is, and both answer the same.

use brightrun::sim::{Action, Fault, Route};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::harness::{Deployment, TABLE, Worker};

/// Jobs that are given twice, one after the other.
const JOBS: u32 = 4;

/// Two workers that wait for a job; the second one has its state in `state_dir`.
fn twins(deployment: &mut Deployment, state_dir: &str) -> [Worker; 2] {
    let state_dir = deployment.path(state_dir).display().to_string();
    let twins = [
        deployment.worker(),
        deployment.worker_with(&[("BRIGHTRUN_STATE_DIR", &state_dir)]),
    ];
    for pod in ["pod1", "pod2"] {
        deployment.until("a take of each", || has_asked(deployment, pod));
    }
    twins
}

fn has_asked(deployment: &Deployment, pod: &str) -> bool {
    let records = deployment.sim.records();
    let mut takes = records.iter().filter(|record| record.route == Route::Take);
    takes.any(|record| record.target.contains(pod))
}

/// Each job is handed to both workers before either has begun it.
fn give_to_both(numbers: u32, state_dir: &str) {
    let mut deployment = Deployment::new();
    let twins = twins(&mut deployment, state_dir);
    for number in numbers..numbers + JOBS {
        let (body, id) = deployment.job(number, 1);
        let runpod_id = deployment.sim.submit(body).unwrap();
        deployment.until("the second hand-out", || {
            let is_given = deployment.sim.deliveries(&runpod_id).len() > 1;
            if !is_given {
                deployment.sim.requeue(&runpod_id);
            }
            is_given
        });
        deployment.completed(&runpod_id);
        let over = |worker: &Worker| {
            let said = worker.said();
            let mut own = said.lines().filter(|line| line.contains(&runpod_id));
            own.any(|line| {
                line.contains("Finished.") || line.contains("does not know the job any more")
            })
        };
        deployment.until("both", || twins.iter().all(over));
        check_once(&deployment, &id, &runpod_id);
    }
    assert_eq!(deployment.sim.deploys(), JOBS as usize);
    deployment.check_secrets();
}

/// Job `id` was trained and delivered once, and who gave it was told the same by both.
#[track_caller]
fn check_once(deployment: &Deployment, id: &str, runpod_id: &str) {
    let logs = deployment.logs();
    let trainings = logs
        .lines()
        .filter(|line| line.contains(runpod_id) && line.contains("training: "))
        .count();
    assert_eq!(trainings, 1, "{logs}");
    let answers: Vec<Value> = deployment
        .sim
        .records()
        .iter()
        .filter(|record| record.route == Route::Done && record.target.contains(runpod_id))
        .map(|record| record.json()["output"].clone())
        .collect();
    assert_eq!(answers.len(), 2, "{answers:#?}");
    for answer in &answers {
        assert_eq!(answer["status"], "completed", "{logs}");
        assert_eq!(answer["adapter_file_path"], answers[0]["adapter_file_path"]);
        assert_eq!(
            answer["model_metadata"]["final_loss"],
            answers[0]["model_metadata"]["final_loss"]
        );
    }
    assert_eq!(deployment.row(id)["status"], "completed");
}

#[test]
fn with_a_common_volume_one_of_two_trains() {
    give_to_both(71, "volume/brightrun");
}

#[test]
fn without_a_common_volume_one_of_two_trains() {
    give_to_both(81, "elsewhere");
}

#[test]
fn a_row_that_the_dispatcher_wrote_over_gives_the_job_to_one() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(91, 10);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let first = deployment.worker_with(&[("BRIGHTRUN_REPORT_S", "2")]);
    deployment.until_step(&id, 1);
    let state_dir = deployment.path("elsewhere").display().to_string();
    let second = deployment.worker_with(&[("BRIGHTRUN_STATE_DIR", &state_dir)]);
    deployment.until("a take", || has_asked(&deployment, "pod2"));
    // The second one comes before the first has written to the row again, and finds nobody there.
    let late = json!({"status": "initializing", "updated_at": "2026-01-01T00:00:00Z"});
    let rows = format!("id=eq.{id}");
    deployment.sim.update_rows(TABLE, &rows, &late).unwrap();
    assert!(deployment.sim.requeue(&runpod_id));
    deployment.until("an end of the first", || {
        first
            .said()
            .contains("another worker is at this job; this one stops")
    });
    deployment.completed(&runpod_id);
    deployment.until("the second", || second.is_over());
    assert!(!second.said().contains("this one stops"));
    assert!(!first.said().contains("Finished."));
    let answers = deployment.sim.records();
    let answers = answers.iter().filter(|record| record.route == Route::Done);
    assert_eq!(answers.count(), 1);
    assert_eq!(deployment.row(&id)["status"], "completed");
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_secrets();
}

/// A worker is frozen once `is_time`, another finishes its job, and the first one goes on where it was.
fn freeze(number: u32, fault: Option<Fault>, is_time: impl Fn(&Deployment, &str) -> bool) {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(number, 2);
    if let Some(fault) = fault {
        deployment.sim.add_fault(fault);
    }
    let runpod_id = deployment.sim.submit(body).unwrap();
    let first = deployment.worker();
    deployment.until("the time", || is_time(&deployment, &id));
    first.signal(Signal::STOP);
    deployment.sim.clear_faults();
    let second = deployment.worker();
    deployment.sim.requeue(&runpod_id);
    deployment.completed(&runpod_id);
    let (weights, row) = (deployment.weights(&id), deployment.row(&id));
    let answers = deployment.sim.count(Route::Done);
    first.signal(Signal::CONT);
    deployment.until("its end", || first.said().contains("this one stops"));
    // It is well, and takes other jobs.
    drop(second);
    let (body, _) = deployment.job(number + 1, 1);
    let next = deployment.sim.submit(body).unwrap();
    deployment.completed(&next);
    assert!(deployment.weights(&id) == weights);
    assert_eq!(deployment.row(&id), row);
    assert_eq!(deployment.sim.count(Route::Done), answers + 1);
    assert_eq!(deployment.sim.deploys(), 2);
    deployment.check_secrets();
}

#[test]
fn a_worker_that_was_frozen_while_it_trained_stops_once_another_is_through() {
    freeze(101, None, |deployment, id| {
        deployment.row(id)["current_step"].as_u64() >= Some(2)
    });
}

#[test]
fn a_worker_that_was_frozen_while_it_delivered_stops_once_another_is_through() {
    let hang = Fault::always(Route::Storage, Action::Hang);
    freeze(111, Some(hang), |deployment, _| {
        deployment.sim.count(Route::Storage) > 0
    });
}
