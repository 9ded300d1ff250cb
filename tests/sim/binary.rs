//! The program `brightrun-sim`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use brightrun::http::client_builder;
use serde_json::Value;

fn run(arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_brightrun-sim"));
    let command = command.args(["--port", "0"]).args(arguments);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn terminate(child: &Child) {
    let id = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn it_prints_an_environment_that_a_shell_reads_and_ends_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("job.json");
    std::fs::write(&job, r#"{"input": {"a": 1}}"#).unwrap();
    let mut child = run(&["--endpoint", "abc", "--submit", job.to_str().unwrap()]);
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    let start: Vec<String> = lines
        .by_ref()
        .take_while(|line| !line.contains("submitted"))
        .collect();
    let exports = start.iter().filter(|line| line.starts_with("export "));
    let script = format!(
        "{}; echo \"$RUNPOD_WEBHOOK_GET_JOB\"",
        exports.cloned().collect::<Vec<_>>().join("; ")
    );
    let echo = Command::new("sh").args(["-c", &script]).output().unwrap();
    let url = String::from_utf8(echo.stdout).unwrap();
    assert!(
        url.ends_with("/v2/abc/job-take/$ID?gpu=NVIDIA+H200\n"),
        "{url}"
    );
    assert!(
        start
            .iter()
            .any(|line| line.contains("curl") && line.contains("/v2/abc/run"))
    );
    terminate(&child);
    assert!(child.wait().unwrap().success());
    assert_eq!(
        lines.last().unwrap(),
        "# 0 requests, 0 violations, 0 deploys"
    );
}

#[test]
fn with_json_each_line_is_an_object() {
    let mut child = run(&["--json"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    let start: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
    let url = start["environment"]["RUNPOD_WEBHOOK_PING"]
        .as_str()
        .unwrap()
        .replace("$RUNPOD_POD_ID", "p");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let sent = runtime.block_on(async { client_builder().build().unwrap().get(url).send().await });
    assert_eq!(sent.unwrap().status(), 401);
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap()).unwrap();
    assert_eq!(
        (&next()["status"], &next()["violation"]),
        (&401.into(), &"Authorization".into())
    );
    terminate(&child);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_bad_fault_file_is_an_error() {
    let output = run(&["--faults", "/nonexistent/faults.json"])
        .wait_with_output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("/nonexistent/faults.json")
    );
}
