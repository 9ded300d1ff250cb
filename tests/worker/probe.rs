//! `--rp_probe`: what the platform does is recorded, and no value of anything.

use brightrun::sim::{Route, Settings};
use serde_json::{Value, json};

use super::harness::Deployment;

#[test]
fn a_probe_records_times_and_statuses_and_no_values() {
    let mut deployment = Deployment::with(Settings {
        worker_key: "canary-worker-key".to_owned(),
        ..Settings::default()
    });
    let (mut body, id) = deployment.job(101, 1);
    body["input"]["callback_url"] = json!(format!(
        "{}?token=canary-1",
        deployment.sim.callback_url("app")
    ));
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut worker = deployment.worker_of(&["worker", "--rp_probe"], &[]);
    deployment.completed(&runpod_id);
    let takes = deployment.sim.count(Route::Take);
    deployment.until("an empty poll", || {
        deployment.sim.count(Route::Take) > takes + 2
    });
    worker.signal(rustix::process::Signal::TERM);
    let path = deployment.path("volume/brightrun/probe.jsonl");
    let text = || fs_err::read_to_string(&path).unwrap();
    deployment.until("two seconds of grace", || {
        text().matches("\"sigterm\"").count() >= 3
    });
    worker.kill();

    let text = text();
    for value in ["canary", &*id, &*runpod_id, deployment.sim.url()] {
        assert!(!text.contains(value), "{value} is in {text}");
    }
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |event: &str| -> Vec<&Value> {
        lines.iter().filter(|line| line["event"] == event).collect()
    };
    let variables = of("begin")[0]["variables"].to_string();
    assert!(variables.contains("RUNPOD_AI_API_KEY"), "{variables}");
    let keys = of("job")[0]["keys"].to_string();
    for key in ["\"id\"", "\"input\"", "\"input.dataset_url\""] {
        assert!(keys.contains(key), "{keys}");
    }
    let requests = of("request");
    let statuses = |name: &str| -> Vec<&Value> {
        let named = requests.iter().filter(|line| line["request"] == name);
        named.map(|line| &line["status"]).collect()
    };
    assert_eq!(statuses("job-done"), [&json!(200)]);
    assert!(statuses("progress").iter().all(|status| **status == 200));
    assert!(!statuses("progress").is_empty());
    assert!(statuses("job-take").contains(&&json!(200)));
    for name in ["job-take", "job-stop"] {
        // Held open by the platform for half a second.
        let held = requests
            .iter()
            .find(|line| line["request"] == name && line["status"] == 204);
        let seconds = held.unwrap()["seconds"].as_f64().unwrap();
        assert!((0.4..30.0).contains(&seconds), "{name}: {seconds}");
    }
    let grace: Vec<f64> = of("sigterm")
        .iter()
        .map(|line| line["seconds"].as_f64().unwrap())
        .collect();
    assert!(grace[0] < 0.5 && grace[2] >= 2.0, "{grace:?}");
}
