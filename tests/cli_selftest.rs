//! `brightrun selftest` as a user runs it.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::process::Command;

use serde_json::Value;

/// Runs the command in an empty directory; exit code, standard output, standard error.
fn selftest(arguments: &[&str]) -> (i32, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_brightrun"));
    command
        .current_dir(dir.path())
        .arg("selftest")
        .args(arguments);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn prints_a_line_per_case_and_a_summary() {
    let (code, out, _) = selftest(&["--device", "cpu", "--op", "swiglu"]);
    let cases = out
        .lines()
        .filter(|line| line.starts_with("ok ") && line.contains("swiglu_backward["));
    let summary = format!("{} cases, 0 failed", cases.count());
    assert_eq!(code, 0, "{out}");
    assert!(out.lines().last().unwrap().starts_with(&summary), "{out}");
    assert!(!summary.starts_with('0'));
}

#[test]
fn json_tells_errors_limits_and_reruns() {
    for device in ["cpu", "emu"] {
        if device == "emu" && cfg!(not(feature = "emu")) {
            continue;
        }
        let (code, out, _) = selftest(&["--device", device, "--op", "delta_gates", "--json"]);
        assert_eq!(code, 0, "{out}");
        let all: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(all["num_failed"], 0);
        let cases = all["cases"].as_array().unwrap();
        assert_eq!(all["num_cases"], cases.len());
        for case in cases {
            assert!(case["num_equal_reruns"].as_u64() >= Some(1), "{case}");
            for error in case["errors"].as_array().unwrap() {
                let number = |key: &str| error[key].as_f64().unwrap();
                assert!(number("l2") <= number("l2_limit") && number("max") <= number("max_limit"));
            }
        }
    }
}

#[test]
fn lists_the_cases_without_a_device() {
    let (code, out, _) = selftest(&["--list", "--device", "cuda:99", "--op", "adamw"]);
    assert_eq!(code, 0);
    assert!(
        out.lines().count() > 3 && out.lines().all(|line| line.starts_with("adamw[")),
        "{out}"
    );
}

#[test]
fn an_unknown_op_is_a_usage_error_that_names_those_there_are() {
    let (code, _, said) = selftest(&["--op", "matmul"]);
    assert_eq!(code, 2);
    assert!(
        said.contains("`matmul`") || said.contains("'matmul'"),
        "{said}"
    );
    assert!(
        said.contains("linear_forward") && said.contains("adamw"),
        "{said}"
    );
    let (code, _, said) = selftest(&["--device", "tpu"]);
    assert_eq!(code, 2);
    assert!(said.contains("cuda:N"), "{said}");
}

#[test]
fn a_device_that_is_not_there_is_one_line() {
    let (code, out, said) = selftest(&["--device", "cuda:99"]);
    assert_eq!((code, out.as_str()), (78, ""), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
