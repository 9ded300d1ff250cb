//! Base models that are on no volume: downloaded once, by one worker, from the simulator's hub.

use brightrun::sim::{Action, Fault, Record, Route};
use serde_json::{Value, json};

use super::harness::{CANARIES, Deployment, demo, walk};

const MODEL: &str = "brightrun/demo";
const ALLOW: (&str, &str) = ("BRIGHTRUN_ALLOW_DOWNLOAD", "1");

/// A deployment whose base model is in the hub alone, for who has `token`.
fn without_model(token: Option<&str>) -> Deployment {
    let deployment = Deployment::new();
    fs_err::remove_dir_all(deployment.path("volume/models")).unwrap();
    let sim = &deployment.sim;
    sim.add_model(MODEL, &demo("model"), token).unwrap();
    deployment
}

/// Sends a job; the platform's id.
fn send(deployment: &Deployment, number: u32) -> String {
    deployment.sim.submit(deployment.job(number, 1).0).unwrap()
}

/// Requests to the hub.
fn asked(deployment: &Deployment) -> Vec<Record> {
    let mut records = deployment.sim.records();
    records.retain(|record| record.route == Route::Hub);
    records
}

fn is_elsewhere(record: &Record) -> bool {
    record.target.starts_with("/hub-files/")
}

/// Every file was sent once, and the token went to the hub alone.
#[track_caller]
fn check_once(deployment: &Deployment) {
    let mut sent: Vec<String> = asked(deployment)
        .iter()
        .filter(|record| matches!(record.status, Some(200 | 206)))
        .map(|record| record.target.rsplit('/').next().unwrap().to_owned())
        .collect();
    sent.sort();
    let files = [
        "config.json",
        "demo?blobs=true",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(sent, files, "{}", deployment.logs());
    check_token(deployment);
    let left = walk(&deployment.path("volume"));
    let left = left.iter().filter(|path| {
        let path = path.display().to_string();
        path.contains(".part") || path.contains(".download") || path.contains(".listing")
    });
    assert_eq!(left.count(), 0);
}

#[track_caller]
fn check_token(deployment: &Deployment) {
    let asked = asked(deployment);
    assert!(asked.iter().any(is_elsewhere));
    for record in &asked {
        let host = record.header("host").unwrap();
        assert_eq!(host.starts_with("localhost:"), is_elsewhere(record));
        let token = format!("Bearer {}", CANARIES[0]);
        let expected = (!is_elsewhere(record)).then_some(token.as_str());
        assert_eq!(record.header("authorization"), expected, "{record:#?}");
    }
    deployment.check_secrets();
}

#[test]
fn a_model_is_downloaded_to_the_volume_once() {
    let mut deployment = without_model(Some(CANARIES[0]));
    let worker = deployment.worker_with(&[ALLOW]);
    for number in [301, 302] {
        let id = send(&deployment, number);
        deployment.completed(&id);
    }
    drop(worker);
    let id = send(&deployment, 303);
    let _worker = deployment.worker_with(&[ALLOW]);
    deployment.completed(&id);
    check_once(&deployment);
    deployment.check_manners();
    let there = deployment.path("volume/models/brightrun/demo/model.safetensors");
    let (there, here) = (fs_err::read(there), demo("model/model.safetensors"));
    assert!(there.unwrap() == fs_err::read(here).unwrap());
}

#[test]
fn without_a_volume_a_model_is_downloaded_beside_the_state_once() {
    let mut deployment = without_model(None);
    let (state, none) = (deployment.path("scratch"), deployment.path("none"));
    let (state, none) = (state.display().to_string(), none.display().to_string());
    let settings = [
        ALLOW,
        ("BRIGHTRUN_VOLUMES", none.as_str()),
        ("BRIGHTRUN_STATE_DIR", state.as_str()),
    ];
    let _worker = deployment.worker_with(&settings);
    for number in [311, 312] {
        let id = send(&deployment, number);
        deployment.completed(&id);
    }
    check_once(&deployment);
    let there = deployment.path("scratch/models/brightrun/demo/config.json");
    assert!(there.is_file() && !deployment.path("none").exists());
}

#[test]
fn two_workers_of_a_volume_download_a_model_once() {
    let mut deployment = without_model(None);
    let slow = Action::BytesPerSecond(500_000);
    let slow = Fault::always(Route::Hub, slow).path("/hub-files/");
    deployment.sim.add_fault(slow);
    let workers = [
        deployment.worker_with(&[ALLOW]),
        deployment.worker_with(&[ALLOW]),
    ];
    let ids = [send(&deployment, 321), send(&deployment, 322)];
    deployment.until("one that waits", || {
        let waits = "another worker is downloading it";
        workers.iter().any(|worker| worker.said().contains(waits))
    });
    for id in &ids {
        deployment.completed(id);
    }
    check_once(&deployment);
    deployment.check_manners();
}

#[test]
fn who_waits_for_a_download_hears_a_cancel_and_follows_who_dies() {
    let mut deployment = without_model(None);
    let slow = Action::BytesPerSecond(50_000);
    let slow = Fault::always(Route::Hub, slow).path("/hub-files/");
    deployment.sim.add_fault(slow);
    let mut first = deployment.worker_with(&[ALLOW]);
    let of_first = send(&deployment, 331);
    let part = deployment.path("volume/models/brightrun/demo/model.safetensors.part");
    let is_begun = || part.metadata().is_ok_and(|data| data.len() > 20_000);
    deployment.until("a part", is_begun);
    let second = deployment.worker_with(&[ALLOW]);
    let waiting = |times| {
        let said = second.said();
        said.matches("another worker is downloading it").count() == times
    };
    let cancelled = send(&deployment, 332);
    deployment.until("a wait", || waiting(1));
    deployment.sim.cancel(&cancelled);
    let follower = send(&deployment, 333);
    deployment.until("a second wait", || waiting(2));
    first.kill();
    deployment.sim.clear_faults();
    deployment.completed(&follower);
    // What the first one got is not fetched again.
    let resumed = asked(&deployment).into_iter().rfind(is_elsewhere).unwrap();
    assert!(resumed.header("range").is_some(), "{resumed:#?}");
    // The platform hands out again what the first one had.
    deployment.completed(&of_first);
    check_token(&deployment);
}

#[test]
fn a_cut_download_goes_on_where_it_was() {
    let mut deployment = without_model(None);
    // More than the server holds back before it sends.
    let cut = Fault::next(Route::Hub, 1, Action::CutAfter(700_000)).path("/hub-files/");
    deployment.sim.add_fault(cut);
    let _worker = deployment.worker_with(&[ALLOW]);
    let id = send(&deployment, 341);
    deployment.completed(&id);
    let mut asked = asked(&deployment);
    asked.retain(is_elsewhere);
    let ranges: Vec<_> = asked.iter().map(|record| record.header("range")).collect();
    let [None, Some(range)] = ranges[..] else {
        panic!("{ranges:?}");
    };
    let from = range
        .strip_prefix("bytes=")
        .and_then(|r| r.strip_suffix('-'));
    assert!(from.unwrap().parse::<u64>().unwrap() > 0, "{range}");
    check_token(&deployment);
}

/// A job that cannot get its model; what is said to its sender, and the requests to the hub.
fn refused(mut deployment: Deployment, more: &[(&str, &str)]) -> (String, Vec<Record>) {
    let id = send(&deployment, 351);
    let _worker = deployment.worker_with(more);
    let document = deployment.ended(&id);
    assert_eq!(document["status"], "FAILED", "{document:#}");
    deployment.check_manners();
    let error = document["error"].as_str().unwrap().to_owned();
    (error, asked(&deployment))
}

#[test]
fn without_leave_nothing_is_downloaded() {
    let (error, asked) = refused(without_model(None), &[]);
    assert!(error.contains("BRIGHTRUN_ALLOW_DOWNLOAD=1"), "{error}");
    assert_eq!(asked.len(), 0);
}

#[test]
fn a_model_that_asks_for_consent_needs_the_token() {
    for token in ["", "another"] {
        let deployment = without_model(Some(CANARIES[0]));
        let (error, asked) = refused(deployment, &[ALLOW, ("HF_TOKEN", token)]);
        assert!(error.contains("check the model's id, and that HF_TOKEN is set and allowed"));
        let weights = asked.iter().find(|record| is_elsewhere(record));
        assert!(weights.is_none(), "{weights:#?}");
    }
}

#[test]
fn a_model_that_does_not_fit_is_not_begun() {
    let deployment = without_model(None);
    let file = |name: &str, size: u64| json!({"rfilename": name, "size": size});
    let siblings = [
        file("config.json", 1),
        file("tokenizer.json", 1),
        file("model.safetensors", 1 << 50),
    ];
    let listing: Value = json!({"sha": "main", "siblings": siblings});
    let huge = Fault::always(Route::Hub, Action::reply(200, listing));
    deployment.sim.add_fault(huge);
    let (error, asked) = refused(deployment, &[ALLOW]);
    assert!(error.contains("must stay free beside it"), "{error}");
    assert_eq!(asked.len(), 1, "{asked:#?}");
}
