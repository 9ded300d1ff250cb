//! Workers killed at random points of a job's life: in the end the adapter is there once, with the bits of a run that nobody killed.

use std::time::Duration;

use brightrun::random::{Draws, Stream};
use brightrun::sim::Settings;

use super::harness::{Deployment, number_from};

/// Kills of `cargo test`; `BRIGHTRUN_TEST_KILLS` asks for another number (the soak: 100).
const KILLS: usize = 10;
const EPOCHS: u32 = 3;

#[test]
fn a_killed_worker_loses_nothing() {
    let mut deployment = Deployment::with(Settings {
        lost_after_pings: 3,
        max_retries: 1000,
        execution_timeout: Duration::from_hours(1),
        ..Settings::default()
    });
    let (body, reference) = deployment.job(40, EPOCHS);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let begun = std::time::Instant::now();
    let worker = deployment.worker();
    deployment.completed(&runpod_id);
    let whole = begun.elapsed();
    drop(worker);
    let expected = deployment.weights(&reference);

    let mut draws = Draws::new(7, Stream::Shuffle, 0);
    let kills = number_from("BRIGHTRUN_TEST_KILLS", KILLS);
    let (mut killed, mut number, mut jobs) = (0, 41, 0);
    while killed < kills {
        let (body, id) = deployment.job(number, EPOCHS);
        let runpod_id = deployment.sim.submit(body).unwrap();
        let before = deployment.sim.deploys();
        // Each life of the worker is shorter than a whole run, or a little longer.
        for life in 0.. {
            let mut worker = deployment.worker_with(&[("BRIGHTRUN_MAX_ATTEMPTS", "1000")]);
            if killed >= kills || life >= 4 {
                deployment.until("the row", || deployment.row(&id)["status"] == "completed");
                deployment.until("the platform", || {
                    deployment
                        .sim
                        .document(&runpod_id)
                        .is_some_and(|document| document["status"] == "COMPLETED")
                });
                break;
            }
            let share = 0.1 + 1.1 * f64::from(draws.next_f32());
            std::thread::sleep(whole.mul_f64(share));
            worker.kill();
            killed += 1;
        }
        assert!(
            deployment.weights(&id) == expected,
            "the weights of job {number} differ\n{}",
            deployment.logs()
        );
        assert_eq!(
            deployment.sim.deploys(),
            before + 1,
            "job {number}\n{}",
            deployment.logs()
        );
        number += 1;
        jobs += 1;
    }
    assert!(jobs > 0);
    deployment.check_secrets();
}
