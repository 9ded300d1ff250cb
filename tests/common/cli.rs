//! Runs the binary as a user would.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use super::golden;

/// The settings of the golden runs: no dropout, no shuffle, one micro-batch per epoch, constant rate.
pub(crate) const GOLDEN_SETTINGS: &str = "adapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_dropout: 0\nshuffle: false\n\
    lr_scheduler: constant\nlearning_rate: 1e-3\nwarmup_ratio: 0\nweight_decay: 0\nnum_epochs: 5\nadapter_dtype: f32\n\
    device: cpu\n";

/// A directory with a config, its data and its output.
#[derive(Debug)]
pub(crate) struct Project {
    pub(crate) dir: tempfile::TempDir,
}

impl Project {
    /// A project on the golden model `family`, trained on its golden sequences.
    pub(crate) fn golden(family: &str, settings: &str) -> Self {
        let text = fs_err::read_to_string(golden(&format!("golden/{family}/golden.json"))).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let rows = json["sequences"]
            .as_array()
            .unwrap()
            .iter()
            .zip(json["labels"].as_array().unwrap());
        let rows: Vec<String> = rows
            .map(|(ids, labels)| json!({"input_ids": ids, "labels": labels}).to_string())
            .collect();
        let settings = format!("micro_batch_size: {}\n{settings}", rows.len());
        Self::new(
            &golden(&format!("models/{family}")),
            &rows.join("\n"),
            &settings,
        )
    }

    /// A project on the model in `base` with the given data lines and settings.
    pub(crate) fn new(base: &Path, data: &str, settings: &str) -> Self {
        let project = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs_err::write(project.path("data.jsonl"), data).unwrap();
        let text = format!(
            "base_model: {:?}\ndatasets: [{{path: {:?}}}]\noutput_dir: {:?}\n{settings}",
            base.display().to_string(),
            project.path("data.jsonl").display().to_string(),
            project.path("out").display().to_string(),
        );
        fs_err::write(project.path("train.yml"), text).unwrap();
        project
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of the binary on this project's config.
    pub(crate) fn command(&self, command: &str, arguments: &[&str]) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_brightrun"));
        process
            .arg(command)
            .arg(self.path("train.yml"))
            .args(arguments);
        process
            .env("RAYON_NUM_THREADS", "2")
            .env_remove("HF_HOME")
            .env_remove("HF_HUB_CACHE");
        process
    }

    pub(crate) fn run(&self, command: &str, arguments: &[&str]) -> Output {
        self.command(command, arguments).output().unwrap()
    }

    /// Runs and expects success.
    #[track_caller]
    pub(crate) fn succeed(&self, command: &str, arguments: &[&str]) -> String {
        let output = self.run(command, arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// Runs and expects exit code `code`; what it said.
    #[track_caller]
    pub(crate) fn fail(&self, code: i32, command: &str, arguments: &[&str]) -> String {
        let output = self.run(command, arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    }

    /// The lines of `metrics.jsonl`.
    pub(crate) fn metrics(&self) -> Vec<Value> {
        let text = fs_err::read_to_string(self.path("out/metrics.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Loss, gradient norm and learning rate of each step, as written.
    pub(crate) fn losses(&self) -> Vec<(u64, f64, f64, f64)> {
        let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
        let of = |line: &Value| {
            let step = line["step"].as_u64().unwrap();
            (
                step,
                number(line, "loss"),
                number(line, "grad_norm"),
                number(line, "learning_rate"),
            )
        };
        self.metrics().iter().map(of).collect()
    }

    pub(crate) fn adapter_bytes(&self) -> Vec<u8> {
        fs_err::read(self.path("out/adapter/adapter_model.safetensors")).unwrap()
    }

    /// Names of the checkpoints, sorted.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let entries = fs_err::read_dir(self.path("out/checkpoints"))
            .into_iter()
            .flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}
