//! A job is ended in each of its phases.

use std::time::{Duration, Instant};

use brightrun::random::{Draws, Stream};
use brightrun::sim::{Action, Fault, Route, Status};
use serde_json::json;

use super::harness::{Deployment, number_from};

/// A job that runs long enough to be ended.
const LONG: u32 = 8;

fn is_kept(deployment: &Deployment, id: &str) -> bool {
    let dir = deployment.path(&format!("volume/brightrun/jobs/{id}/run/checkpoints"));
    fs_err::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

#[test]
fn the_platform_stops_a_job_and_hears_nothing_more_of_it() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(11, LONG);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.until_step(&id, 2);
    deployment.sim.cancel(&runpod_id);
    deployment.until("the stop", || worker.said().contains("Job stopped."));
    assert_eq!(deployment.sim.status(&runpod_id), Some(Status::Cancelled));
    assert!(is_kept(&deployment, &id));
    assert!(deployment.sim.objects().is_empty());
    assert_ne!(deployment.row(&id)["status"], "completed");
    // The worker is there for the next one, which goes on from the checkpoint.
    let again = deployment.sim.submit(deployment.body(&id, LONG)).unwrap();
    deployment.completed(&again);
    assert!(worker.said().contains("going on after step"));
    assert_eq!(deployment.sim.deploys(), 1);
    deployment.check_manners();
}

#[test]
fn the_row_and_the_callback_cancel_a_job() {
    for (number, by_row) in [(12, true), (13, false)] {
        let mut deployment = Deployment::new();
        let (mut body, id) = deployment.job(number, LONG);
        if !by_row {
            body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
        }
        let runpod_id = deployment.sim.submit(body).unwrap();
        let _worker = deployment.worker();
        deployment.until_step(&id, 2);
        if by_row {
            let cancelled = json!({"status": "cancelled"});
            deployment
                .sim
                .update_rows(super::harness::TABLE, &format!("id=eq.{id}"), &cancelled)
                .unwrap();
        } else {
            deployment
                .sim
                .script_callbacks("app", [(200, json!({"cancel": true}))]);
        }
        let document = deployment.completed(&runpod_id);
        assert_eq!(
            document["output"],
            json!({"status": "cancelled", "job_id": id})
        );
        assert!(is_kept(&deployment, &id));
        assert!(deployment.sim.objects().is_empty());
        if by_row {
            assert_eq!(deployment.row(&id)["status"], "cancelled");
        }
        deployment.check_manners();
    }
}

#[test]
fn a_job_is_ended_while_it_downloads_and_while_it_uploads() {
    for (number, route) in [(14, Route::Files), (15, Route::Storage)] {
        let mut deployment = Deployment::new();
        deployment
            .sim
            .add_fault(Fault::next(route, 1, Action::Hang));
        let (body, id) = deployment.job(number, 1);
        let runpod_id = deployment.sim.submit(body).unwrap();
        let worker = deployment.worker();
        deployment.until("the phase", || deployment.sim.count(route) > 0);
        deployment.sim.cancel(&runpod_id);
        deployment.until("the stop", || worker.said().contains("Job stopped."));
        drop(worker);
        // Nor does the next start deliver what nobody wants any more.
        let takes = deployment.sim.count(Route::Take);
        let next = deployment.worker();
        deployment.until("the next worker", || {
            deployment.sim.count(Route::Take) > takes + 3
        });
        assert_ne!(deployment.row(&id)["status"], "completed");
        assert_eq!(deployment.sim.deploys(), 0);
        assert!(!next.said().contains("delivering"));
        // Given again it goes on.
        let again = deployment.sim.submit(deployment.body(&id, 1)).unwrap();
        deployment.completed(&again);
        assert_eq!(deployment.sim.deploys(), 1);
        deployment.check_manners();
    }
}

#[test]
fn a_job_whose_trainer_has_to_be_killed_was_stopped_and_did_not_fail() {
    use rustix::process::Signal;
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(16, LONG);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.until_step(&id, 1);
    worker.signal_trainer(Signal::STOP);
    deployment.sim.cancel(&runpod_id);
    deployment.until("the request", || {
        worker.said().contains("stopping the trainer")
    });
    worker.signal_trainer(Signal::KILL);
    deployment.until("the stop", || worker.said().contains("Job stopped."));
    assert_ne!(deployment.row(&id)["status"], "failed", "{}", worker.said());
    deployment.check_manners();
}

/// Cancellations of `cargo test`; `BRIGHTRUN_TEST_CANCELS` asks for another number (the soak: 50).
const CANCELS: u16 = 6;

#[test]
fn a_job_may_be_ended_at_any_moment() {
    let mut deployment = Deployment::new();
    let worker = deployment.worker();
    let (body, reference) = deployment.job(60, 2);
    let begun = Instant::now();
    let runpod_id = deployment.sim.submit(body).unwrap();
    deployment.completed(&runpod_id);
    let whole = begun.elapsed();
    let expected = deployment.weights(&reference);
    let mut draws = Draws::new(11, Stream::Shuffle, 0);
    let cancels = number_from("BRIGHTRUN_TEST_CANCELS", CANCELS);
    for number in 0..cancels {
        let (body, id) = deployment.job(u32::from(61 + number), 2);
        let before = deployment.sim.deploys();
        let runpod_id = deployment.sim.submit(body).unwrap();
        // Spread over a job's life and a little longer.
        let at = (f64::from(number) + f64::from(draws.next_f32())) / f64::from(cancels);
        std::thread::sleep(whole.mul_f64(1.1 * at));
        deployment.sim.cancel(&runpod_id);
        let asked = Instant::now();
        let again = deployment.sim.submit(deployment.body(&id, 2)).unwrap();
        deployment.until("the next job", || {
            deployment.sim.status(&again) != Some(Status::InQueue)
        });
        let free = asked.elapsed();
        println!("ended at {at:.2} of a job, free after {free:?}");
        assert!(free < Duration::from_secs(5), "{free:?}\n{}", worker.said());
        deployment.completed(&again);
        assert!(deployment.weights(&id) == expected, "{}", worker.said());
        assert_eq!(deployment.sim.deploys(), before + 1, "{}", worker.said());
    }
    deployment.check_manners();
}
