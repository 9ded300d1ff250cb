//! Jobs given on this machine.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use super::harness::Deployment;

#[test]
fn a_job_from_the_command_line_or_a_file_prints_its_answer() {
    let deployment = Deployment::new();
    let body = deployment.body("local-1", 1);
    let run = |arguments: &[&str]| {
        let mut command = deployment.command("worker");
        for name in [
            "RUNPOD_WEBHOOK_GET_JOB",
            "SUPABASE_URL",
            "SUPABASE_SERVICE_ROLE_KEY",
        ] {
            command.env_remove(name);
        }
        command.args(arguments).output().unwrap()
    };
    let none = run(&[]);
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&none.stdout).contains("test_input.json not found, exiting."));
    let output = run(&[
        "--test_input",
        &body.to_string(),
        "--rp_log_level",
        "ERROR",
        "--rp_debugger",
    ]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    let answer: Value =
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    assert_eq!(answer["output"]["status"], "completed");
    let adapter = answer["output"]["adapter_path"].as_str().unwrap();
    assert!(
        std::path::Path::new(adapter)
            .join("adapter_model.safetensors")
            .is_file()
    );
    // The same once more, from a file: its result is given again.
    fs_err::write(deployment.path("test_input.json"), body.to_string()).unwrap();
    let again = run(&[]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stdout).contains("finished before"));
    let bad = run(&["--test_input", "{\"input\": {}}"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&bad.stdout).contains("dataset_url"));
}

/// A request to the server; status and body.
fn ask(address: &str, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .unwrap();
    let body = body.to_string();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn a_laptop_serves_runpods_own_shapes() {
    let deployment = Deployment::new();
    let mut command = deployment.command("worker");
    command.args([
        "--rp_serve_api",
        "--rp_api_port",
        "0",
        "--rp_log_level",
        "INFO",
    ]);
    command
        .env_remove("RUNPOD_WEBHOOK_GET_JOB")
        .env_remove("RUNPOD_ENDPOINT_ID");
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines.find_map(|line| {
        line.unwrap()
            .split_once("http://")
            .map(|(_, at)| at.to_owned())
    });
    let address = address.unwrap();
    let drain = std::thread::spawn(move || lines.for_each(drop));
    let (status, refused) = ask(&address, "POST", "/run", &json!({"input": 3}));
    assert_eq!(status, 400, "{refused}");
    assert_eq!(ask(&address, "GET", "/status/nobody", &Value::Null).0, 404);
    let (status, run) = ask(
        &address,
        "POST",
        "/v2/any/run",
        &deployment.body("served-1", 20),
    );
    assert_eq!((status, run["status"].as_str()), (200, Some("IN_QUEUE")));
    let id = run["id"].as_str().unwrap().to_owned();
    let waiting = ask(&address, "POST", "/run", &deployment.body("served-2", 1)).1;
    let waiting = waiting["id"].as_str().unwrap().to_owned();
    deployment.until("progress", || {
        let document = ask(
            &address,
            "GET",
            &format!("/v2/any/status/{id}"),
            &Value::Null,
        )
        .1;
        document["status"] == "IN_PROGRESS" && document["output"]["current_step"].as_u64() > Some(0)
    });
    assert_eq!(
        ask(&address, "GET", "/health", &Value::Null).1["jobs"]["inQueue"],
        1
    );
    assert_eq!(
        ask(&address, "POST", &format!("/cancel/{id}"), &Value::Null).1["status"],
        "CANCELLED"
    );
    deployment.until("the next", || {
        let document = ask(
            &address,
            "POST",
            &format!("/status/{waiting}"),
            &Value::Null,
        )
        .1;
        document["status"] == "COMPLETED" && document["output"]["status"] == "completed"
    });
    assert_eq!(
        ask(&address, "GET", &format!("/status/{id}"), &Value::Null).1["status"],
        "CANCELLED"
    );
    let sync = ask(
        &address,
        "POST",
        "/runsync",
        &json!({"input": {"job_id": "x"}}),
    )
    .1;
    assert_eq!(sync["status"], "FAILED", "{sync:#}");
    assert!(sync["error"].as_str().unwrap().contains("dataset_url"));
    let process = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    drain.join().unwrap();
}

#[test]
fn preflight_says_in_words_what_is_missing() {
    let deployment = Deployment::new();
    let check = |more: &[(&str, &str)], arguments: &[&str]| {
        let mut command = deployment.command("preflight");
        command.envs(more.iter().copied()).args(arguments);
        let output = command.output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, said) = check(
        &[],
        &["--model", "brightrun/demo", "--adapter-bytes", "1000000"],
    );
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = check(
        &[],
        &[
            "--model",
            "Qwen/Qwen3-8B",
            "--adapter-bytes",
            "900000000000",
        ],
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("FAIL  base model") && said.contains("FAIL  storage"),
        "{said}"
    );
    let (code, said) = check(
        &[
            ("SUPABASE_SERVICE_ROLE_KEY", "wrong-key-of-mine"),
            ("BRIGHTRUN_DEVICE", "cuda"),
        ],
        &[],
    );
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("FAIL  database") && said.contains("FAIL  state and kernels"),
        "{said}"
    );
    assert!(!said.contains("wrong-key-of-mine"), "{said}");
}
