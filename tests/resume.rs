//! A run that was stopped, killed or damaged and then resumed ends with the same bytes as one that was not.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    reason = "a test's helper fails its test"
)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use brightrun::config::{Env, TrainConfig};
use brightrun::random::{Draws, Stream};
use brightrun::train::events::Event;
use brightrun::train::{Outcome, StopFlag, checkpoint, run};
use common::cli::Project;
use common::golden;
use serde_json::json;

/// 20 steps: 5 per epoch, conversations cut inside, dropout, a held-out split, a partial last batch.
const SETTINGS: &str = "adapter: qlora\nlora_r: 4\nlora_alpha: 8\nlora_dropout: 0.1\nmicro_batch_size: 2\n\
    gradient_accumulation_steps: 2\nnum_epochs: 4\nlearning_rate: 5e-3\nsave_steps: 3\nval_set_size: 1\ndevice: cpu\n";
const SAVE_STEPS: u64 = 3;
const TOTAL_STEPS: u64 = 20;
/// Kill points of the default run; `scripts/soak.sh` asks for more.
const KILLS: usize = 20;

fn project(settings: &str) -> Project {
    let conversation = |number: usize| {
        let turn = |index: usize| {
            let text = format!(
                "{} {}",
                number * 7 + index,
                "ab ".repeat(1 + (number + index) % 3)
            );
            let role = if index.is_multiple_of(2) {
                "user"
            } else {
                "assistant"
            };
            json!({"role": role, "content": text})
        };
        // 3 targets in most, 4 in the first: 19 to train on with one conversation of three held out.
        let turns = if number == 0 { 8 } else { 6 };
        json!({"messages": (0..turns).map(turn).collect::<Vec<_>>()}).to_string()
    };
    let lines: Vec<String> = (0..7).map(conversation).collect();
    Project::new(
        &golden("models/qwen3_next"),
        &lines.join("\n"),
        &format!("{SETTINGS}{settings}"),
    )
}

/// What must be equal between two runs.
#[derive(Debug, PartialEq)]
struct RunResult {
    metrics: Vec<serde_json::Value>,
    adapter: Vec<u8>,
    state: Vec<u8>,
}

fn result(project: &Project) -> RunResult {
    result_after(project, TOTAL_STEPS)
}

fn result_after(project: &Project, steps: u64) -> RunResult {
    let mut metrics = project.metrics();
    for line in &mut metrics {
        let line = line.as_object_mut().unwrap();
        line.remove("elapsed_s");
        line.remove("tokens_per_second");
    }
    let state = project.path(&format!("out/checkpoints/step-{steps}/adapter.safetensors"));
    RunResult {
        metrics,
        adapter: project.adapter_bytes(),
        state: fs_err::read(state).unwrap(),
    }
}

fn uninterrupted() -> RunResult {
    let project = project("");
    project.succeed("train", &[]);
    let result = result(&project);
    assert_eq!(result.metrics.len() as u64, TOTAL_STEPS);
    assert_eq!(
        result
            .metrics
            .iter()
            .filter(|line| line["eval_loss"].is_f64())
            .count(),
        4
    );
    result
}

/// Runs in this process, stopping after step `stop_after`.
fn run_until(project: &Project, stop_after: u64) -> Outcome {
    let config = TrainConfig::load(&project.path("train.yml"), &[]).unwrap();
    let stop = StopFlag::default();
    let flag = stop.clone();
    let mut observer = |event: &Event| {
        if let Event::Step(metrics) = event
            && metrics.step == stop_after
        {
            flag.set(15);
        }
    };
    run(&config, &Env::default(), &mut observer, &stop).unwrap()
}

#[test]
fn a_run_stopped_at_any_step_ends_with_the_same_bytes() {
    let expected = uninterrupted();
    for step in 1..TOTAL_STEPS {
        let project = project("");
        let outcome = run_until(&project, step);
        assert!(
            matches!(outcome, Outcome::Stopped { signal: 15, completed, .. } if completed == step),
            "{outcome:?}"
        );
        assert!(matches!(run_until(&project, 0), Outcome::Finished { .. }));
        assert!(result(&project) == expected, "stopped after step {step}");
    }
}

#[test]
fn a_run_stopped_at_every_step_ends_with_the_same_bytes() {
    let expected = uninterrupted();
    let project = project("");
    for step in 1..TOTAL_STEPS {
        run_until(&project, step);
    }
    run_until(&project, 0);
    assert!(result(&project) == expected);
    // Running it once more changes nothing.
    run_until(&project, 0);
    assert!(result(&project) == expected);
}

#[test]
fn moments_in_8_bits_resume_with_the_same_bytes_and_only_with_their_optimizer() {
    let whole = project("optimizer: adamw_8bit\n");
    whole.succeed("train", &[]);
    let expected = result(&whole);
    assert!(expected.adapter != uninterrupted().adapter);
    let stopped = project("optimizer: adamw_8bit\n");
    run_until(&stopped, 7);
    let checkpoint = stopped.path("out/checkpoints/step-7");
    let from = format!("resume_from_checkpoint={}", checkpoint.display());
    let output = stopped.run("train", &["--set", "optimizer=adamw", "--set", &from]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("holds the moments of `optimizer: adamw_8bit`, this run has `adamw`"),
        "{text}"
    );
    run_until(&stopped, 0);
    assert!(result(&stopped) == expected);
}

#[test]
fn two_runs_and_other_thread_counts_give_the_same_bytes() {
    let expected = uninterrupted();
    let project = project("");
    let status = project
        .command("train", &[])
        .env("RAYON_NUM_THREADS", "3")
        .status()
        .unwrap();
    assert!(status.success());
    assert!(result(&project) == expected);
}

#[test]
fn recomputed_activations_give_the_same_bytes() {
    let expected = uninterrupted();
    let project = project("recompute: full\n");
    project.succeed("train", &[]);
    assert!(result(&project) == expected);
}

#[test]
fn sigterm_and_sigint_save_and_stop() {
    let expected = uninterrupted();
    for (signal, code) in [
        (rustix::process::Signal::TERM, 143),
        (rustix::process::Signal::INT, 130),
    ] {
        let project = project("");
        let child = project
            .command("train", &[])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = project.path("out/metrics.jsonl");
        while !fs_err::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 2) {
            std::thread::sleep(Duration::from_millis(2));
        }
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        // On a fast machine all steps may be done before the signal comes.
        if output.status.code() != Some(0) {
            assert_eq!(output.status.code(), Some(code), "{text}");
            assert!(
                text.contains("stopped after step") && text.contains("to go on: brightrun train"),
                "{text}"
            );
        }
        project.succeed("train", &[]);
        assert!(result(&project) == expected);
    }
}

fn quiet(project: &Project) -> std::process::Command {
    let mut command = project.command("train", &[]);
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    command
}

/// A run that kills itself before its `operation`th file operation.
fn killed_at(project: &Project, operation: usize) -> std::process::ExitStatus {
    let mut command = quiet(project);
    command.env("BRIGHTRUN_KILL_AT_WRITE", operation.to_string());
    command.status().unwrap()
}

/// File operations of an undisturbed run.
fn num_kill_points() -> usize {
    let is_reached = |operation| killed_at(&project(""), operation).signal() == Some(9);
    let (mut reached, mut beyond) = (1, 1024);
    assert!(is_reached(reached) && !is_reached(beyond));
    while beyond - reached > 1 {
        let middle = usize::midpoint(reached, beyond);
        if is_reached(middle) {
            reached = middle;
        } else {
            beyond = middle;
        }
    }
    reached
}

/// Kill points before file operations and at moments, drawn from a fixed seed.
#[test]
fn kill_9_at_any_point_loses_at_most_one_interval() {
    #[expect(
        clippy::disallowed_methods,
        reason = "the soak script asks for more kills"
    )]
    let kills = std::env::var("BRIGHTRUN_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(KILLS);
    let expected = uninterrupted();
    let mut draws = Draws::new(7, Stream::Synthetic, 0);
    let mut num_killed = 0;
    let num_points = num_kill_points();
    for kill in 0..kills {
        let project = project("");
        let status = if kill % 2 == 0 {
            let operation = 1 + draws.below(num_points);
            killed_at(&project, operation)
        } else {
            let mut child = quiet(&project).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(20 + draws.below(300) as u64));
            // A child that has ended already is no error.
            let _ = child.kill();
            child.wait().unwrap()
        };
        num_killed += usize::from(status.signal() == Some(9));
        check_state(&project);
        project.succeed("train", &[]);
        assert!(result(&project) == expected, "kill {kill}");
        let entries = ["out", "out/checkpoints"].map(|dir| fs_err::read_dir(project.path(dir)));
        let left: Vec<String> = entries
            .into_iter()
            .flat_map(Result::unwrap)
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("partial"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    // The test must kill to mean anything; some moments come after the end of the run.
    assert!(
        num_killed * 2 > kills,
        "only {num_killed} of {kills} runs were killed"
    );
    println!("{num_killed} of {kills} runs were killed; a run has {num_points} file operations");
}

/// All checkpoints can be read, and the newest is at most an interval behind what was trained.
fn check_state(project: &Project) {
    let mut newest = 0;
    for name in project.checkpoints() {
        if name.starts_with("step-") {
            let loaded = checkpoint::read(&project.path("out/checkpoints").join(&name));
            newest = newest.max(
                loaded
                    .unwrap_or_else(|error| panic!("{name}: {error}"))
                    .state
                    .step,
            );
        }
    }
    let metrics = fs_err::read_to_string(project.path("out/metrics.jsonl")).unwrap_or_default();
    let trained = metrics.lines().count() as u64;
    assert!(
        newest + SAVE_STEPS >= trained,
        "trained {trained}, saved {newest}"
    );
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_used() {
    let expected = uninterrupted();
    for (file, change) in [
        ("adapter.safetensors", Damage::Flip(2000)),
        ("adapter.safetensors", Damage::Truncate),
        ("state.json", Damage::Flip(5)),
        ("manifest.json", Damage::Flip(40)),
        ("manifest.json", Damage::Remove),
        ("adapter.safetensors", Damage::Remove),
    ] {
        let project = project("");
        run_until(&project, 8);
        assert_eq!(project.checkpoints(), ["LATEST", "step-6", "step-8"]);
        change.apply(&project.path("out/checkpoints/step-8").join(file));
        let output = project.run("train", &[]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        assert!(
            text.contains("warning: checkpoint step-8 is damaged and not used:"),
            "{text}"
        );
        assert!(
            text.contains("going on from the one before it, step-6"),
            "{text}"
        );
        assert!(project.path("out/checkpoints/unused-step-8").is_dir());
        assert!(result(&project) == expected, "{file}");
    }
}

enum Damage {
    Flip(usize),
    Truncate,
    Remove,
}

impl Damage {
    fn apply(&self, path: &Path) {
        let mut bytes = fs_err::read(path).unwrap();
        match self {
            Self::Flip(at) => bytes[*at] ^= 1,
            Self::Truncate => bytes.truncate(bytes.len() - 1),
            Self::Remove => return fs_err::remove_file(path).unwrap(),
        }
        fs_err::write(path, bytes).unwrap();
    }
}

#[test]
fn any_flipped_bit_of_a_checkpoint_is_noticed() {
    let project = project("");
    run_until(&project, 1);
    let dir = project.path("out/checkpoints/step-1");
    let mut draws = Draws::new(11, Stream::Synthetic, 0);
    for file in ["adapter.safetensors", "state.json", "manifest.json"] {
        let good = fs_err::read(dir.join(file)).unwrap();
        let before = checkpoint::read(&dir).unwrap();
        for _ in 0..60 {
            let mut bytes = good.clone();
            bytes[draws.below(good.len())] ^= 1 << draws.below(8);
            fs_err::write(dir.join(file), &bytes).unwrap();
            // A flip in white space or in the manifest's own version text changes nothing that is used.
            if let Ok(loaded) = checkpoint::read(&dir) {
                assert_eq!(file, "manifest.json");
                assert_eq!(loaded.state, before.state);
                assert_eq!(loaded.values(), before.values());
            }
        }
        fs_err::write(dir.join(file), &good).unwrap();
    }
}

/// What is computed on the emulated device is kept, resumed and recomputed to the same bits too.
#[cfg(feature = "emu")]
#[test]
fn the_emulated_device_stops_resumes_and_recomputes_to_the_same_bytes() {
    check_emulated("");
}

#[cfg(feature = "emu")]
#[test]
fn so_it_does_with_an_adapter_in_bf16_and_moments_in_8_bits() {
    check_emulated("lora_dtype: bf16\noptimizer: adamw_8bit\n");
}

/// Four steps in one go, in three, and with activations recomputed.
#[cfg(feature = "emu")]
fn check_emulated(settings: &str) {
    const STEPS: u64 = 4;
    let emulated = |more: &str| {
        let settings = format!("{settings}{more}");
        let project = project(&settings);
        let path = project.path("train.yml");
        let text = fs_err::read_to_string(&path).unwrap();
        let text = text.replace("device: cpu", "device: emu");
        let text = text.replace("num_epochs: 4", &format!("max_steps: {STEPS}"));
        fs_err::write(&path, text).unwrap();
        project
    };
    let whole = emulated("");
    run_until(&whole, 0);
    let expected = result_after(&whole, STEPS);
    assert_eq!(expected.metrics.len() as u64, STEPS);
    let stopped = emulated("");
    for step in [1, 3] {
        let outcome = run_until(&stopped, step);
        assert!(matches!(outcome, Outcome::Stopped { .. }), "{outcome:?}");
    }
    run_until(&stopped, 0);
    assert!(result_after(&stopped, STEPS) == expected);
    let recomputed = emulated("recompute: full\n");
    run_until(&recomputed, 0);
    assert!(result_after(&recomputed, STEPS) == expected);
}
