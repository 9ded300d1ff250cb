//! Whom the worker believes: a job that names a stranger's address, a row that is finished, a device that is gone.

use brightrun::sim::{Action, Fault, Route};
use serde_json::json;

use super::harness::{CANARIES, Deployment};

/// Runs a job that wants to be told at `host`; `Authorization` of what arrived (without one: empty), if anything did.
fn told_at(host: &str, hosts: &str, number: u32) -> Option<String> {
    let mut deployment = Deployment::new();
    let (mut body, _) = deployment.job(number, 1);
    let url = deployment.sim.callback_url("app");
    body["input"]["callback_url"] = json!(url.replacen("127.0.0.1", host, 1));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker_with(&[("BRIGHTRUN_CALLBACK_HOSTS", hosts)]);
    deployment.completed(&runpod_id);
    let callbacks = || deployment.sim.callbacks("app");
    if !worker.said().contains("no callbacks") {
        deployment.until("a callback", || !callbacks().is_empty());
    }
    let first = callbacks().into_iter().next()?;
    Some(first.header("authorization").unwrap_or_default().to_owned())
}

#[test]
fn the_operators_authorization_goes_where_the_operator_said() {
    let secret = Some(CANARIES[1].to_owned());
    // The project's own host, and one that the operator named.
    assert_eq!(told_at("127.0.0.1", "", 80), secret.clone());
    assert_eq!(told_at("localhost", "example.com,localhost", 81), secret);
    // A stranger is told without it, and not at all where the operator named others.
    assert_eq!(told_at("localhost", "", 82), Some(String::new()));
    assert_eq!(told_at("localhost", "example.com", 83), None);
}

#[test]
fn a_finished_row_stays_finished() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(84, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    deployment.completed(&runpod_id);
    let mut body = deployment.body(&id, 1);
    body["input"]["hyperparameters"]["rank"] = json!("many");
    let again = deployment.sim.submit(body).unwrap();
    let document = deployment.ended(&again);
    assert_eq!(document["status"], "FAILED", "{document:#}");
    assert_eq!(deployment.row(&id)["status"], "completed");
    deployment.check_manners();
}

#[test]
fn a_worker_whose_device_is_gone_asks_for_a_fresh_one_and_ends() {
    let mut deployment = Deployment::new();
    let (body, _) = deployment.job(85, 1);
    let runpod_id = deployment.sim.submit(body).unwrap();
    // As if its GPU had been there when it began.
    let mut worker = deployment.worker_with(&[("BRIGHTRUN_DEVICE", "cuda")]);
    let document = deployment.ended(&runpod_id);
    assert_eq!(document["status"], "FAILED", "{document:#}");
    assert!(deployment.sim.stop_pod(&runpod_id), "{}", worker.said());
    assert_eq!(worker.wait(), Some(1));
    let told = deployment.sim.unhealthy("pod1");
    assert!(
        told.iter().any(|text| text.starts_with("gpu: ")),
        "{told:?}"
    );
}

#[test]
fn a_job_that_is_handed_out_while_the_worker_is_asked_to_stop_is_done() {
    let mut deployment = Deployment::new();
    let (body, _) = deployment.job(86, 1);
    deployment
        .sim
        .add_fault(Fault::next(Route::Take, 1, Action::DelayMs(600)));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut worker = deployment.worker();
    deployment.until("a take", || deployment.sim.count(Route::Take) > 0);
    worker.signal(rustix::process::Signal::TERM);
    deployment.completed(&runpod_id);
    assert_eq!(worker.wait(), Some(0));
    deployment.check_manners();
}

#[test]
fn a_setting_that_is_no_number_ends_the_worker() {
    let mut deployment = Deployment::new();
    let mut worker = deployment.worker_with(&[("BRIGHTRUN_RETRY_S", "15m")]);
    assert_eq!(worker.wait(), Some(78));
    let said = worker.said();
    assert!(
        said.contains("BRIGHTRUN_RETRY_S is `15m`, expected a number of seconds"),
        "{said}"
    );
    let told = deployment.sim.unhealthy("pod1");
    assert!(
        told.iter().any(|text| text.starts_with("state: ")),
        "{told:?}"
    );
}
