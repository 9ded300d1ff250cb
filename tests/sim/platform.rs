//! Queue, client side and worker side.

use std::time::{Duration, Instant};

use brightrun::sim::{Settings, Sim, Status, ViolationKind};
use serde_json::{Value, json};

use crate::{Http, settings};

fn start(settings: Settings) -> (Sim, Http) {
    let sim = Sim::start(settings).unwrap();
    let http = Http::new(&sim);
    (sim, http)
}

fn kinds(sim: &Sim) -> Vec<ViolationKind> {
    sim.violations()
        .iter()
        .map(|violation| violation.kind)
        .collect()
}

fn submit(sim: &Sim) -> String {
    sim.submit(json!({"input": {"k": 1}})).unwrap()
}

#[test]
fn a_job_goes_from_the_queue_through_progress_to_its_result() {
    let (sim, http) = start(settings());
    let body =
        json!({"input": {"k": 1}, "policy": {"ttl": 60_000}, "s3Config": {"bucketName": "b"}});
    let run = http.send(http.customer("POST", "run").json(&body)).json();
    assert_eq!(run["status"], "IN_QUEUE");
    let id = run["id"].as_str().unwrap();

    let reply = http
        .send(http.worker("GET", "job-take/pod1?gpu=a&job_in_progress=0"))
        .json();
    assert_eq!(
        reply,
        json!({"id": id, "input": {"k": 1}, "policy": {"ttl": 60_000}, "s3Config": {"bucketName": "b"}})
    );
    http.ping("pod1", id);
    assert_eq!(
        http.done(
            "pod1",
            id,
            &json!({"status": "IN_PROGRESS", "output": {"progress": 45.5}})
        ),
        200
    );
    let status = http
        .send(http.customer("GET", &format!("status/{id}")))
        .json();
    assert_eq!(
        (&status["status"], &status["output"]["progress"]),
        (&json!("IN_PROGRESS"), &json!(45.5))
    );
    assert!(status["delayTime"].is_u64() && status["executionTime"].is_null());

    assert_eq!(
        http.done(
            "pod1",
            id,
            &json!({"output": {"x": "\u{e9}"}, "stopPod": true})
        ),
        200
    );
    let status = http
        .send(http.customer("GET", &format!("status/{id}")))
        .json();
    assert_eq!(status["status"], "COMPLETED");
    assert_eq!(status["output"], json!({"x": "\u{e9}"}));
    assert_eq!(status["workerId"], "pod1");
    assert!(status["executionTime"].is_u64());
    assert!(sim.stop_pod(id));
    assert_eq!(kinds(&sim), []);
}

#[test]
fn only_a_string_error_fails_a_job() {
    let (sim, http) = start(settings());
    let end = |body: &Value| {
        submit(&sim);
        let id = http.take("pod1");
        http.done("pod1", &id, body);
        sim.document(&id).unwrap()
    };
    let failed = end(&json!({"error": "bad", "output": {"a": 1}}));
    assert_eq!(
        (&failed["status"], &failed["error"]),
        (&json!("FAILED"), &json!("bad"))
    );
    let odd = end(&json!({"error": {"code": 1}, "output": {"a": 1}}));
    assert_eq!(
        (&odd["status"], &odd["output"]),
        (&json!("COMPLETED"), &Value::Null)
    );
    assert_eq!(end(&json!({}))["status"], "COMPLETED");
}

#[test]
fn a_take_waits_for_a_job_and_ends_empty() {
    let (sim, http) = start(settings());
    let before = Instant::now();
    assert_eq!(
        http.send(http.worker("GET", "job-take/pod1?job_in_progress=0"))
            .status,
        204
    );
    assert!(
        before.elapsed() >= Duration::from_millis(190),
        "{:?}",
        before.elapsed()
    );
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| Http::new(&sim).take("pod1"));
        assert!(sim.wait_until(|sim| sim.records().len() == 2, Duration::from_secs(2)));
        let id = submit(&sim);
        assert_eq!(taken.join().unwrap(), id);
    });
}

#[test]
fn a_batch_is_a_list() {
    let (sim, http) = start(settings());
    let ids: Vec<String> = (0..3).map(|_| submit(&sim)).collect();
    let reply = http
        .send(http.worker("GET", "job-take-batch/pod1?batch_size=2&job_in_progress=0"))
        .json();
    let taken: Vec<&str> = reply
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["id"].as_str().unwrap())
        .collect();
    assert_eq!(taken, ids[..2]);
}

#[test]
fn cancel_stops_the_worker_and_refuses_the_result() {
    let (sim, http) = start(settings());
    let id = submit(&sim);
    http.take("pod1");
    let reply = http
        .send(http.customer("POST", &format!("cancel/{id}")))
        .json();
    assert_eq!(reply, json!({"id": id, "status": "CANCELLED"}));
    let stop = http.send(http.worker("GET", "job-stop/pod1?gpu=a")).json();
    assert_eq!(stop, json!({"jobsToStop": [id]}));
    assert_eq!(
        http.send(http.worker("GET", "job-stop/pod1?gpu=a")).status,
        204
    );
    assert_eq!(http.done("pod1", &id, &json!({"output": 1})), 404);
    assert_eq!(http.done("pod1", "unknown", &json!({"output": 1})), 404);
    assert_eq!(sim.status(&id), Some(Status::Cancelled));
    assert_eq!(kinds(&sim), []);
}

#[test]
fn execution_timeout_fails_the_job_and_ttl_makes_it_vanish() {
    let (sim, http) = start(settings());
    let slow = sim
        .submit(json!({"input": 1, "policy": {"executionTimeout": 50}}))
        .unwrap();
    let old = sim
        .submit(json!({"input": 1, "policy": {"ttl": 150}}))
        .unwrap();
    http.take("pod1");
    http.take("pod1");
    assert!(sim.wait_until(
        |sim| sim.status(&slow) == Some(Status::Failed),
        Duration::from_secs(2)
    ));
    assert_eq!(
        sim.document(&slow).unwrap()["error"],
        "executionTimeout exceeded"
    );
    assert!(sim.wait_until(|sim| sim.status(&old).is_none(), Duration::from_secs(2)));
    assert_eq!(
        http.send(http.customer("GET", &format!("status/{old}")))
            .status,
        404
    );
    let stops = http.send(http.worker("GET", "job-stop/pod1")).json();
    assert_eq!(stops["jobsToStop"], json!([slow, old]));
    assert_eq!(http.done("pod1", &slow, &json!({"output": 1})), 404);
    assert_eq!(http.done("pod1", &old, &json!({"output": 1})), 404);
}

#[test]
fn a_silent_worker_loses_its_job_and_the_last_retry_fails_it() {
    let (sim, http) = start(Settings {
        max_retries: 1,
        ..settings()
    });
    let id = submit(&sim);
    http.take("pod1");
    assert!(sim.wait_until(
        |sim| sim.status(&id) == Some(Status::InQueue),
        Duration::from_secs(2)
    ));
    assert_eq!(http.take("pod2"), id);
    // A worker that pings keeps its job.
    for _ in 0..8 {
        http.ping("pod2", &id);
        std::thread::sleep(Duration::from_millis(80));
    }
    assert_eq!(sim.status(&id), Some(Status::InProgress));
    assert!(sim.wait_until(
        |sim| sim.status(&id) == Some(Status::Failed),
        Duration::from_secs(2)
    ));
    let workers: Vec<String> = sim
        .deliveries(&id)
        .into_iter()
        .map(|delivery| delivery.worker)
        .collect();
    assert_eq!(workers, ["pod1", "pod2"]);
    let health = http.send(http.customer("GET", "health")).json();
    assert_eq!(
        (&health["jobs"]["retried"], &health["jobs"]["failed"]),
        (&json!(1), &json!(1))
    );
}

#[test]
fn the_watch_sees_every_broken_rule() {
    let (sim, http) = start(Settings {
        lost_after_pings: 100,
        ..settings()
    });
    let id = submit(&sim);
    http.take("pod1");
    let wrong = http
        .worker("POST", &format!("job-done/pod1/{id}"))
        .body(r#"{"status": "IN_PROGRESS"}"#);
    http.send(wrong);
    assert_eq!(kinds(&sim), [ViolationKind::RequestId]);
    let denied = http
        .request("GET", "/v2/ep1/ping/pod1")
        .header("Authorization", "Bearer worker-key");
    assert_eq!(http.send(denied).status, 401);
    std::thread::sleep(Duration::from_millis(250));
    http.ping("pod1", "");
    http.done("pod1", &id, &json!({"output": 1}));
    assert_eq!(http.done("pod1", &id, &json!({"output": 2})), 200);
    http.done("pod1", &id, &json!({"status": "IN_PROGRESS", "output": 3}));
    assert_eq!(
        kinds(&sim)[1..],
        [
            ViolationKind::Authorization,
            ViolationKind::PingGap,
            ViolationKind::PingWithoutJob,
            ViolationKind::SecondResult,
            ViolationKind::ProgressAfterResult,
        ]
    );
    assert_eq!(sim.document(&id).unwrap()["output"], 1);
}

#[test]
fn failed_jobs_are_retried_under_their_id() {
    let (sim, http) = start(settings());
    let id = submit(&sim);
    http.take("pod1");
    assert_eq!(
        http.send(http.customer("POST", &format!("retry/{id}")))
            .status,
        400
    );
    http.done("pod1", &id, &json!({"error": "bad"}));
    let reply = http
        .send(http.customer("POST", &format!("retry/{id}")))
        .json();
    assert_eq!(reply, json!({"id": id, "status": "IN_QUEUE"}));
    assert_eq!(http.take("pod1"), id);
    assert_eq!(http.done("pod1", &id, &json!({"output": 1})), 200);
    assert_eq!(sim.status(&id), Some(Status::Completed));
    assert_eq!(kinds(&sim), []);
}

#[test]
fn runsync_answers_with_the_result_or_the_state_after_its_wait() {
    let (sim, http) = start(settings());
    std::thread::scope(|scope| {
        let sync = scope.spawn(|| {
            let http = Http::new(&sim);
            http.send(http.customer("POST", "runsync").json(&json!({"input": 1})))
                .json()
        });
        assert!(sim.wait_until(|sim| !sim.records().is_empty(), Duration::from_secs(2)));
        let id = http.take("pod1");
        assert!(id.starts_with("sync-"));
        http.done("pod1", &id, &json!({"output": 7}));
        let reply = sync.join().unwrap();
        assert_eq!(
            (&reply["status"], &reply["output"]),
            (&json!("COMPLETED"), &json!(7))
        );
    });
    let reply = http
        .send(
            http.customer("POST", "runsync?wait=1")
                .json(&json!({"input": 1})),
        )
        .json();
    assert_eq!(reply["status"], "IN_QUEUE");
    let purged = http.send(http.customer("POST", "purge-queue")).json();
    assert_eq!(purged, json!({"removed": 1, "status": "completed"}));
    let id = reply["id"].as_str().unwrap();
    assert_eq!(sim.status(id), None);
}

#[test]
fn limits_and_keys_are_enforced() {
    let (sim, http) = start(Settings {
        run_limit: 100,
        result_limit: 100,
        ..settings()
    });
    let big = json!({"input": "x".repeat(200)});
    let reply = http.send(http.customer("POST", "run").json(&big));
    assert_eq!(
        (reply.status, reply.json()["title"].as_str()),
        (400, Some("Bad Request"))
    );
    assert_eq!(
        http.send(http.request("POST", "/v2/ep1/run").bearer_auth("no"))
            .status,
        401
    );
    assert_eq!(
        http.send(http.customer("POST", "run").json(&json!({"in": 1})))
            .status,
        400
    );
    let id = submit(&sim);
    http.take("pod1");
    assert_eq!(
        http.done("pod1", &id, &json!({"output": "x".repeat(200)})),
        400
    );
    assert_eq!(sim.status(&id), Some(Status::InProgress));
}

#[test]
fn the_webhook_gets_the_final_document_and_is_tried_again() {
    let (sim, http) = start(settings());
    sim.script_callbacks("hook", [(500, json!({}))]);
    let id = sim
        .submit(json!({"input": 1, "webhook": sim.callback_url("hook")}))
        .unwrap();
    http.take("pod1");
    http.done("pod1", &id, &json!({"output": 7}));
    assert!(sim.wait_until(
        |sim| sim.callbacks("hook").len() == 2,
        Duration::from_secs(3)
    ));
    assert_eq!(sim.callbacks("hook")[1].json(), sim.document(&id).unwrap());
}

#[test]
fn streamed_output_is_read_once_and_sick_workers_are_known() {
    let (sim, http) = start(settings());
    let id = submit(&sim);
    http.take("pod1");
    let piece = http.worker("POST", &format!("job-stream/pod1/{id}?isStream=false"));
    assert_eq!(
        http.send(
            piece
                .header("X-Request-ID", &id)
                .body(r#"{"output": {"step": 0}}"#)
        )
        .status,
        200
    );
    let stream = http
        .send(http.customer("GET", &format!("stream/{id}")))
        .json();
    assert_eq!(
        stream,
        json!({"status": "IN_PROGRESS", "stream": [{"output": {"step": 0}}]})
    );
    assert_eq!(
        http.send(http.customer("GET", &format!("stream/{id}")))
            .json()["stream"],
        json!([])
    );
    http.send(http.worker(
        "GET",
        "ping/pod2?status=unhealthy&check=gpu&reason=no+device",
    ));
    assert_eq!(sim.unhealthy("pod2"), ["gpu: no device"]);
    assert_eq!(
        http.send(http.customer("GET", "health")).json()["workers"]["unhealthy"],
        1
    );
}
