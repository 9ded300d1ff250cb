//! Tokens that the worker holds or is given are nowhere but where they are sent to (F23).

use std::io::Read;
use std::os::unix::fs::PermissionsExt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brightrun::sim::{Action, Fault, Route, Settings, Status};
use serde_json::{Value, json};

use super::harness::{CANARIES, Deployment, TABLE, walk};

const SERVICE: &str = "canary-service-role-3";
const PLATFORM: &str = "canary-platform-key-4";
/// Base64 of 32 bytes.
const WEBHOOK: &str = "Y2FuYXJ5LW9mLWNhbGxiYWNrcy0wMTIzNDU2Nzg5YWI=";
const DATA: &str = "canary-of-the-data-5";
const CALLBACK: &str = "canary-of-the-callback-6";

fn deployment() -> Deployment {
    Deployment::with(Settings {
        service_key: SERVICE.to_owned(),
        worker_key: PLATFORM.to_owned(),
        ..Settings::default()
    })
}

fn canaries() -> Vec<String> {
    let own = [SERVICE, PLATFORM, WEBHOOK, DATA, CALLBACK];
    let plain = own.iter().chain(&CANARIES[..2]);
    plain
        .flat_map(|canary| [(*canary).to_owned(), STANDARD.encode(canary)])
        .map(|canary| canary.trim_end_matches('=').to_owned())
        .collect()
}

fn environment() -> [(&'static str, &'static str); 3] {
    let secret: &str = "whsec_Y2FuYXJ5LW9mLWNhbGxiYWNrcy0wMTIzNDU2Nzg5YWI=";
    assert!(secret.ends_with(WEBHOOK));
    [
        ("BRIGHTRUN_WEBHOOK_SECRET", secret),
        ("BRIGHTRUN_CALLBACK_WAITS_S", "0,0.2,0.2"),
        ("BRIGHTRUN_RETRY_S", "4"),
    ]
}

#[track_caller]
fn check_text(what: &str, text: &[u8]) {
    for canary in canaries() {
        let mut parts = text.windows(canary.len());
        let is_in = parts.any(|part| part == canary.as_bytes());
        assert!(
            !is_in,
            "{canary} is in {what}: {}",
            String::from_utf8_lossy(text)
        );
    }
}

/// No canary in a log, in a body that was sent anywhere, in a row, in an object, nor in a file of the state directory. The `address`
/// files hold that of the callback for as long as it has to be told, for the worker's user alone.
#[track_caller]
fn check_everywhere(deployment: &Deployment, address: &[&str]) {
    check_text("a log", deployment.logs().as_bytes());
    for record in deployment.sim.records() {
        check_text("a body", record.body.as_bytes());
    }
    for table in [TABLE, "pipeline_training_metrics"] {
        check_text(
            "a row",
            json!(deployment.sim.rows(table)).to_string().as_bytes(),
        );
    }
    for object in deployment.sim.objects() {
        let mut bytes = fs_err::read(&object.file).unwrap();
        if bytes.starts_with(b"\x1f\x8b") {
            let packed = std::mem::take(&mut bytes);
            flate2::read::GzDecoder::new(&packed[..])
                .read_to_end(&mut bytes)
                .unwrap();
        }
        check_text(&object.path, &bytes);
    }
    let mut found = Vec::new();
    for path in walk(&deployment.path("volume/brightrun")) {
        let text = fs_err::read(&path).unwrap_or_default();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if address.contains(&&*name) && String::from_utf8_lossy(&text).contains(CALLBACK) {
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
            let text = String::from_utf8(text).unwrap().replace(CALLBACK, "");
            check_text(&name, text.as_bytes());
            found.push(name);
        } else {
            check_text(&path.display().to_string(), &text);
        }
    }
    assert_eq!(found, address);
}

fn with_tokens(deployment: &Deployment, mut body: Value, callback: &str) -> Value {
    let data = deployment.sim.file_url("pairs.jsonl");
    body["input"]["dataset_url"] = json!(format!("{data}?key={DATA}"));
    body["input"]["callback_url"] = json!(format!("{callback}?token={CALLBACK}"));
    body
}

#[test]
fn a_good_job_leaves_no_secret_even_where_its_callback_fails() {
    let mut deployment = deployment();
    // Services that repeat what they were sent.
    let echo = json!({"message": format!("{SERVICE} {}", CANARIES[1]), "code": "Echo"});
    for route in [Route::Rows, Route::Storage, Route::Callback] {
        deployment
            .sim
            .add_fault(Fault::next(route, 1, Action::reply(500, echo.clone())));
    }
    let (body, _) = deployment.job(111, 6);
    let callback = deployment.sim.callback_url("app");
    let body = with_tokens(&deployment, body, &callback);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let mut worker = deployment.worker_with(&environment());
    deployment.until("training", || {
        deployment.sim.document(&runpod_id).unwrap()["output"]["stage"] == "training"
    });
    for part in ["environ", "cmdline"] {
        let path = format!("/proc/{}/{part}", worker.trainer());
        check_text("the trainer", &fs_err::read(path).unwrap());
    }
    deployment
        .sim
        .add_fault(Fault::always(Route::Callback, Action::reply(500, echo)));
    deployment.completed(&runpod_id);
    deployment.until("tries", || worker.said().matches("callback ").count() >= 3);
    check_everywhere(&deployment, &["delivery.json"]);
    worker.kill();

    deployment.sim.clear_faults();
    let _next = deployment.worker_with(&environment());
    deployment.until("the end", || {
        let heard = deployment.sim.callbacks("app").pop();
        heard.is_some_and(|callback| super::harness::kind(&callback) == "training.completed")
    });
    deployment.until("what is done to be noted", || {
        let files = walk(&deployment.path("volume/brightrun"));
        files.iter().all(|file| {
            let text = fs_err::read(file).unwrap_or_default();
            !String::from_utf8_lossy(&text).contains(CALLBACK)
        })
    });
    check_everywhere(&deployment, &[]);
}

#[test]
fn a_failed_job_leaves_no_secret() {
    let mut deployment = deployment();
    let _worker = deployment.worker_with(&environment());
    let files = deployment.sim.file_url("");
    let addresses = [
        // Expired, not there, no address, a user with a password, a host that may not be named.
        format!("{}?token={DATA}", deployment.sim.file_url("pairs.jsonl")),
        format!("{files}nothing.jsonl?key={DATA}"),
        format!("http://127.0.0.1:port/x?token={DATA}"),
        format!("http://user:{DATA}@127.0.0.1:1/x.jsonl"),
        format!("ftp://127.0.0.1/x?token={DATA}"),
    ];
    let mut untold = Vec::new();
    for (number, address) in (112..).zip(addresses) {
        let (mut body, id) = deployment.job(number, 1);
        body["input"]["dataset_url"] = json!(address);
        body["input"]["callback_url"] = json!(format!("http://127.0.0.1:1/?token={CALLBACK}"));
        let runpod_id = deployment.sim.submit(body).unwrap();
        let document = deployment.ended(&runpod_id);
        assert_eq!(deployment.sim.status(&runpod_id), Some(Status::Failed));
        check_text("the answer", document.to_string().as_bytes());
        assert_eq!(deployment.row(&id)["status"], "failed", "{document:#}");
        let event = deployment.path(&format!("volume/brightrun/jobs/{id}/event.json"));
        untold.extend(event.is_file().then_some("event.json"));
    }
    assert!(!untold.is_empty());
    check_everywhere(&deployment, &untold);
}

#[test]
fn preflight_shows_no_secret() {
    let deployment = deployment();
    let echo = json!({"message": format!("bad key {SERVICE}"), "code": "InvalidJWT"});
    for (refuse, words) in [(false, vec![]), (true, vec![]), (true, vec!["--json"])] {
        if refuse {
            for route in [Route::Rows, Route::Storage, Route::Tus] {
                let fault = Fault::always(route, Action::reply(403, echo.clone()));
                deployment.sim.add_fault(fault);
            }
        }
        let mut command = deployment.command("preflight");
        command.args(words).envs(environment());
        let output = command.output().unwrap();
        assert_eq!(output.status.success(), !refuse);
        let said = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&said);
        assert!(text.contains("storage"), "{text}");
        // What was repeated came this far.
        assert_eq!(text.contains("bad key [redacted]"), refuse, "{text}");
        check_text("preflight", &said);
    }
}
