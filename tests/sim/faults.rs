//! Faults, files, callbacks, and the records.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use brightrun::sim::{Action, Fault, Route, Settings, Sim, Status, fault};
use serde_json::json;

use crate::{Http, settings};

fn start() -> (Sim, Http) {
    let sim = Sim::start(settings()).unwrap();
    let http = Http::new(&sim);
    (sim, http)
}

#[test]
fn faults_hit_the_requests_they_name() {
    let (sim, http) = start();
    let mut second = Fault::next(Route::Ping, 2, Action::reply(503, json!({"why": "busy"})));
    second.first = 2;
    sim.add_fault(second.path("pod1"));
    let ping = |worker: &str| {
        http.send(http.worker("GET", &format!("ping/{worker}?gpu=a")))
            .status
    };
    assert_eq!(
        [ping("pod1"), ping("pod2"), ping("pod1"), ping("pod1")],
        [200, 200, 503, 200]
    );
    let faulted: Vec<bool> = sim.records().iter().map(|record| record.faulted).collect();
    assert_eq!(faulted, [false, false, true, false]);
    sim.add_fault(Fault::always(Route::Ping, Action::status(500)));
    assert_eq!([ping("pod1"), ping("pod2")], [500, 500]);
    sim.clear_faults();
    assert_eq!(ping("pod1"), 200);
}

#[test]
fn a_reset_before_leaves_the_job_and_a_reset_after_takes_its_result() {
    let (sim, http) = start();
    let id = sim.submit(json!({"input": 1})).unwrap();
    http.take("pod1");
    let done = || {
        http.try_send(http.done_request("pod1", &id, &json!({"output": 1})))
            .map(|reply| reply.status)
    };
    sim.add_fault(Fault::next(Route::Done, 1, Action::Reset));
    assert!(done().is_err());
    assert_eq!(sim.status(&id), Some(Status::InProgress));
    sim.clear_faults();
    sim.add_fault(Fault::next(Route::Done, 1, Action::ResetAfter));
    assert!(done().is_err());
    assert_eq!(sim.status(&id), Some(Status::Completed));
    // The answer was lost: one more try breaks no rule, a third result does.
    assert_eq!(done().unwrap(), 200);
    assert_eq!(sim.violations().len(), 0);
    assert_eq!(done().unwrap(), 200);
    assert_eq!(sim.violations().len(), 1);
}

#[test]
fn progress_and_results_have_faults_of_their_own() {
    let (sim, http) = start();
    let id = sim.submit(json!({"input": 1})).unwrap();
    http.take("pod1");
    sim.add_fault(Fault::next(Route::Done, 9, Action::status(500)));
    assert_eq!(
        http.done("pod1", &id, &json!({"status": "IN_PROGRESS", "output": 1})),
        200
    );
    assert_eq!(http.done("pod1", &id, &json!({"output": 1})), 500);
    assert_eq!(sim.status(&id), Some(Status::InProgress));
    assert_eq!((sim.count(Route::Progress), sim.count(Route::Done)), (1, 1));
}

#[test]
fn hanging_and_slow_answers_do_not_hold_up_the_end() {
    let (sim, http) = start();
    sim.add_fault(Fault::next(Route::Ping, 1, Action::Hang));
    let hung = http
        .worker("GET", "ping/pod1")
        .timeout(Duration::from_millis(100));
    assert!(http.try_send(hung).unwrap_err().is_timeout());
    assert_eq!(sim.records()[0].status, None);
    sim.add_fault(Fault::next(Route::Callback, 1, Action::DelayMs(100)));
    let before = Instant::now();
    assert_eq!(
        http.send(http.request("POST", "/callback/a").body("{}"))
            .status,
        200
    );
    assert!(before.elapsed() >= Duration::from_millis(100));
    let before = Instant::now();
    drop(sim);
    assert!(before.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_database_that_is_down_refuses_and_comes_back() {
    let (sim, http) = start();
    sim.add_fault(Fault::always(Route::Rows, Action::Reset));
    let rows = || http.try_send(http.supabase("GET", "/rest/v1/pipeline_training_jobs"));
    assert!(rows().is_err());
    sim.clear_faults();
    assert_eq!(rows().unwrap().status, 200);
}

#[test]
fn files_have_ranges_and_tags() {
    let (sim, http) = start();
    sim.add_file("d/data.jsonl", b"0123456789").unwrap();
    let get = |range: &str, tag: &str| {
        let mut request = http.client.get(sim.file_url("d/data.jsonl"));
        if !range.is_empty() {
            request = request.header("Range", range);
        }
        if !tag.is_empty() {
            request = request.header("If-Range", tag);
        }
        http.send(request)
    };
    let whole = get("", "");
    assert_eq!((whole.status, whole.text().as_str()), (200, "0123456789"));
    let tag = whole.header("etag").to_owned();
    let rest = get("bytes=7-", &tag);
    assert_eq!(
        (
            rest.status,
            rest.text().as_str(),
            rest.header("content-range")
        ),
        (206, "789", "bytes 7-9/10")
    );
    assert_eq!(get("bytes=7-", "\"old\"").status, 200);
    assert_eq!(get("bytes=10-", "").status, 416);
    for path in ["absent", "../etc/passwd", "d"] {
        assert_eq!(
            http.send(http.request("GET", &format!("/files/{path}")))
                .status,
            404,
            "{path}"
        );
    }
    assert_eq!(
        http.send(
            http.client
                .get(sim.signed_file_url("d/data.jsonl", Duration::from_mins(1)))
        )
        .status,
        200
    );
    let expired = http.send(
        http.client
            .get(sim.signed_file_url("d/data.jsonl", Duration::ZERO)),
    );
    assert_eq!(
        (expired.status, expired.json()["error"].as_str()),
        (400, Some("InvalidJWT"))
    );
}

#[test]
fn paths_do_not_leave_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("outside"), "secret").unwrap();
    let files_dir = Some(folder.path().join("inside"));
    let sim = Sim::start(Settings {
        files_dir,
        ..settings()
    })
    .unwrap();
    // An HTTP client would tidy the path before it sends it.
    let mut raw = std::net::TcpStream::connect(sim.url().trim_start_matches("http://")).unwrap();
    raw.write_all(b"GET /files/%2e%2e/outside HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    raw.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 404") && !answer.contains("secret"),
        "{answer}"
    );
}

#[test]
fn bad_connections_look_bad() {
    let (sim, http) = start();
    sim.add_file("f", b"0123456789").unwrap();
    let with = |action: Action, request: reqwest::RequestBuilder| {
        sim.clear_faults();
        sim.add_fault(Fault::next(Route::Files, 1, action));
        http.try_send(request)
    };
    let get = || http.client.get(sim.file_url("f"));
    assert!(with(Action::CutAfter(4), get()).is_err());
    assert!(with(Action::WrongLength(11), get()).is_err());
    assert_eq!(
        with(Action::WrongLength(9), get()).unwrap().text(),
        "012345678"
    );
    let before = Instant::now();
    assert_eq!(
        with(Action::BytesPerSecond(50), get()).unwrap().text(),
        "0123456789"
    );
    assert!(
        before.elapsed() >= Duration::from_millis(90),
        "{:?}",
        before.elapsed()
    );
    let endless = with(Action::Endless, get().timeout(Duration::from_millis(100)));
    assert!(endless.is_err_and(|error| error.is_timeout()));
    let gzip = with(Action::Gzip, get()).unwrap();
    assert_eq!(
        (gzip.header("content-encoding"), &gzip.body[..2]),
        ("gzip", &[0x1f, 0x8b][..])
    );
    let redirect = with(Action::Redirect("http://10.0.0.1/x".to_owned()), get()).unwrap();
    assert_eq!(
        (redirect.status, redirect.header("location")),
        (302, "http://10.0.0.1/x")
    );
}

#[test]
fn callbacks_are_kept_and_answered_from_the_script() {
    let (sim, http) = start();
    sim.script_callbacks("cb", [(410, json!({})), (200, json!({"cancel": true}))]);
    let post = || {
        http.send(
            http.request("POST", "/callback/cb")
                .header("webhook-id", "m1")
                .body("{\"a\": 1}"),
        )
    };
    assert_eq!(post().status, 410);
    assert_eq!(post().json(), json!({"cancel": true}));
    assert_eq!(post().json(), json!({}));
    let callbacks = sim.callbacks("cb");
    assert_eq!(callbacks.len(), 3);
    assert_eq!(
        (callbacks[0].header("webhook-id"), &callbacks[0].body[..]),
        (Some("m1"), &b"{\"a\": 1}"[..])
    );
}

#[test]
fn records_keep_what_was_sent_and_print_no_secret() {
    let (sim, http) = start();
    http.send(http.worker(
        "GET",
        "ping/pod1?gpu=NVIDIA+H200&job_id=a%2Cb&token=secret1",
    ));
    let record = &sim.records()[0];
    assert_eq!(
        record.target,
        "/v2/ep1/ping/pod1?gpu=NVIDIA+H200&job_id=a%2Cb&token=secret1"
    );
    assert_eq!(
        (record.header("authorization"), record.status),
        (Some("worker-key"), Some(200))
    );
    let printed = record.to_json().to_string();
    assert!(
        !printed.contains("worker-key") && !printed.contains("secret1"),
        "{printed}"
    );
}

#[test]
fn fault_files_are_read_and_bad_ones_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("faults.json");
    let text = r#"[
        {"route": "done", "last": 3, "action": {"status": {"code": 500}}},
        {"route": "files", "first": 2, "action": {"bytes_per_second": 1}},
        {"route": "rows", "action": "reset"}
    ]"#;
    std::fs::write(&path, text).unwrap();
    let faults = fault::read(&path).unwrap();
    assert_eq!(faults[0], Fault::next(Route::Done, 3, Action::status(500)));
    assert_eq!(
        (faults[1].first, &faults[1].action),
        (2, &Action::BytesPerSecond(1))
    );
    assert_eq!(faults[2], Fault::always(Route::Rows, Action::Reset));
    let yaml = folder.path().join("faults.yaml");
    std::fs::write(
        &yaml,
        "- route: done\n  last: 3\n  action: {status: {code: 500}}\n\
         - {route: files, first: 2, action: {bytes_per_second: 1}}\n\
         - {route: rows, action: reset}\n",
    )
    .unwrap();
    assert_eq!(fault::read(&yaml).unwrap(), faults);
    std::fs::write(&path, r#"[{"route": "nope", "action": "reset"}]"#).unwrap();
    let error = fault::read(&path).unwrap_err().to_string();
    assert!(
        error.contains("faults.json") && error.contains("nope"),
        "{error}"
    );
}
