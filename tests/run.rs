//! What a run does and leaves, through the command line: steps, saves, held-out data, a loss that is not finite.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helper fails its test"
)]

mod common;

use common::cli::Project;
use common::{copy_model, golden, rewrite};
use serde_json::json;

const SETTINGS: &str =
    "adapter: lora\nlora_r: 2\nlora_alpha: 4\nlearning_rate: 1e-3\ndevice: cpu\nshuffle: false\n";

/// `count` rows of different lengths.
fn rows(count: usize) -> String {
    let row = |index: usize| {
        let ids: Vec<usize> = (0..6 + index)
            .map(|at| 1 + (7 * at + index) % 250)
            .collect();
        json!({"input_ids": ids}).to_string()
    };
    (0..count).map(row).collect::<Vec<_>>().join("\n")
}

fn project(count: usize, settings: &str) -> Project {
    let settings = format!("{SETTINGS}{settings}");
    Project::new(&golden("models/llama"), &rows(count), &settings)
}

#[test]
fn the_last_partial_batch_is_trained() {
    // 5 rows, 2 per step: 3 steps an epoch, the third with one row.
    let project = project(5, "micro_batch_size: 2\nnum_epochs: 2\n");
    project.succeed("train", &[]);
    let metrics = project.metrics();
    let targets = |at: usize| metrics[at]["num_target_tokens"].as_u64().unwrap();
    assert_eq!(metrics.len(), 6);
    // A row's first token has no prediction.
    assert_eq!((targets(0), targets(1), targets(2)), (5 + 6, 7 + 8, 9));
    assert_eq!(metrics[2]["epoch"], 1.0);
    for (at, line) in metrics.iter().enumerate() {
        assert_eq!(line["step"], at + 1);
        for key in [
            "loss",
            "grad_norm",
            "learning_rate",
            "tokens_per_second",
            "elapsed_s",
        ] {
            assert!(line[key].as_f64().unwrap().is_finite(), "{key}: {line}");
        }
    }
}

#[test]
fn saves_at_steps_at_epoch_ends_and_after_minutes() {
    let all = |settings: &str| {
        let settings =
            format!("micro_batch_size: 1\nnum_epochs: 2\nsave_total_limit: 99\n{settings}");
        let project = project(3, &settings);
        project.succeed("train", &[]);
        let mut names = project.checkpoints();
        names.retain(|name| name != "LATEST");
        names
    };
    assert_eq!(all(""), ["step-3", "step-6"]);
    assert_eq!(
        all("save_steps: 2\n"),
        ["step-2", "step-3", "step-4", "step-6"]
    );
    assert_eq!(all("save_minutes: 1e-9\n").len(), 6);
    let project = project(
        3,
        "micro_batch_size: 1\nnum_epochs: 2\nsave_steps: 1\nsave_total_limit: 2\n",
    );
    project.succeed("train", &[]);
    assert_eq!(project.checkpoints(), ["LATEST", "step-5", "step-6"]);
}

#[test]
fn held_out_data_are_evaluated_and_not_trained_on() {
    let project = project(
        6,
        "micro_batch_size: 2\nnum_epochs: 2\nval_set_size: 2\neval_steps: 1\n",
    );
    project.succeed("train", &[]);
    let metrics = project.metrics();
    assert_eq!(metrics.len(), 4, "4 rows are left to train on");
    assert!(
        metrics
            .iter()
            .all(|line| line["eval_loss"].as_f64().unwrap() > 0.0)
    );
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state() {
    let project = project(2, "micro_batch_size: 1\n");
    let model = project.path("model");
    copy_model("llama", &model);
    rewrite(&model.join("model.safetensors"), |tensors| {
        let (_, _, bytes) = tensors
            .get_mut("model.layers.1.mlp.up_proj.weight")
            .unwrap();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let base = format!("base_model={}", model.display());
    let said = project.fail(17, "train", &["--set", &base]);
    assert!(
        said.contains("error: step 1: the loss, first at the output of layer 1 is not finite; "),
        "{said}"
    );
    assert_eq!(project.checkpoints(), ["LATEST", "step-0"]);
    assert!(
        !project.path("out/adapter").exists(),
        "nothing was trained, so nothing is exported"
    );
    // The same run goes on once the weights are whole.
    project.succeed("train", &[]);
    assert_eq!(project.metrics().len(), 6);
}

#[test]
fn a_finished_run_is_not_trained_again() {
    let project = project(3, "num_epochs: 1\n");
    project.succeed("train", &[]);
    let adapter = project.adapter_bytes();
    let output = project.run("train", &[]);
    assert!(output.status.success());
    assert_eq!(project.metrics().len(), 1);
    assert!(project.adapter_bytes() == adapter);
    // More epochs are another run: said, not guessed.
    let said = project.fail(78, "train", &["--set", "num_epochs=2"]);
    assert!(
        said.contains("is of a run with other settings: `num_epochs` 1 -> 2"),
        "{said}"
    );
}
