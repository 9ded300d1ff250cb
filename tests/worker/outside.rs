//! Names from outside that would lead out of a job's directory (F22): refused, and nothing out there is touched.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use brightrun::sim::{Action, Fault, Route};
use serde_json::json;

use super::harness::{Deployment, demo, walk};

/// Names that are none: up and out, absolute, ended early, too long, dots of other alphabets.
fn hostile() -> Vec<String> {
    let names = [
        "../../../outside/new",
        "..",
        "/etc/new",
        "a/../../../../outside/new",
        "a\0b",
        "..%2f..%2foutside",
        "\u{2024}\u{2024}/new",
        "\u{ff0e}\u{ff0e}\u{2215}new",
        "..\\..\\outside",
        ".hidden",
    ];
    let long = ["a".repeat(5000), "../".repeat(2000)];
    names.map(str::to_owned).into_iter().chain(long).collect()
}

/// All files of `dir` but what the worker may write: bytes, and when they were written.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let own = [dir.join("volume/brightrun"), dir.join("volume/models")];
    let is_own = |path: &PathBuf| {
        own.iter().any(|own| path.starts_with(own)) || path.extension().is_some_and(|x| x == "log")
    };
    let files = walk(dir).into_iter().filter(|path| !is_own(path));
    let read = |path: PathBuf| {
        let written = path.metadata().unwrap().modified().unwrap();
        let bytes = fs_err::read(&path).unwrap();
        (path, (bytes, written))
    };
    files.map(read).collect()
}

/// A deployment with a tree beside the volume, and that tree.
fn with_outside() -> (Deployment, BTreeMap<PathBuf, (Vec<u8>, SystemTime)>) {
    let deployment = Deployment::new();
    for name in ["dataset.jsonl", "attempts.json", "run/checkpoints/step-9/a"] {
        let path = deployment.path("outside").join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, format!("{name} of somebody else")).unwrap();
    }
    let before = tree(deployment.dir.path());
    assert_eq!(before.len(), 3);
    (deployment, before)
}

/// Every one of `ids` fails; what is said of each.
#[track_caller]
fn refusals(deployment: &Deployment, ids: &[String]) -> Vec<String> {
    let refusal = |id: &String| {
        let document = deployment.ended(id);
        assert_eq!(document["status"], "FAILED", "{document:#}");
        document["error"].as_str().unwrap().to_owned()
    };
    ids.iter().map(refusal).collect()
}

#[test]
fn names_that_lead_out_are_refused() {
    let (mut deployment, before) = with_outside();
    let mut ids = Vec::new();
    for name in hostile() {
        let own = deployment.body(&name, 1);
        let mut model = deployment.body("model", 1);
        model["input"]["hyperparameters"]["base_model"] = json!(name);
        for body in [own, model] {
            ids.push(deployment.sim.submit(body).unwrap());
        }
    }
    let _worker = deployment.worker_with(&[("BRIGHTRUN_ALLOW_DOWNLOAD", "1")]);
    for refusal in refusals(&deployment, &ids) {
        let named = refusal.contains("job_id") || refusal.contains("base_model");
        assert!(named && refusal.len() < 2000, "{refusal}");
    }
    assert_eq!(tree(deployment.dir.path()), before);
    assert_eq!(walk(&deployment.path("volume/brightrun/jobs")).len(), 0);
    deployment.check_secrets();
}

#[test]
fn links_that_lead_out_are_not_followed() {
    let (mut deployment, before) = with_outside();
    let jobs = deployment.path("volume/brightrun/jobs");
    fs_err::create_dir_all(jobs.join("old")).unwrap();
    let outside = deployment.path("outside");
    symlink(&outside, jobs.join("linked")).unwrap();
    symlink(deployment.path("nowhere"), jobs.join("dangling")).unwrap();
    let send = |deployment: &Deployment, name| {
        let body = deployment.body(name, 1);
        deployment.sim.submit(body).unwrap()
    };
    let ids = ["linked", "dangling"].map(|name| send(&deployment, name));
    // Old jobs are removed: not what a link points to.
    let worker = deployment.worker_with(&[("BRIGHTRUN_KEEP_DAYS", "0")]);
    for refusal in refusals(&deployment, &ids) {
        assert!(refusal.contains("is a link"), "{refusal}");
    }
    deployment.until("the old one's end", || !jobs.join("old").exists());
    drop(worker);
    fs_err::create_dir_all(jobs.join("part")).unwrap();
    let part = jobs.join("part/dataset.jsonl.part");
    symlink(outside.join("dataset.jsonl"), part).unwrap();
    let id = send(&deployment, "part");
    let _worker = deployment.worker();
    let refusals = refusals(&deployment, &[id]);
    assert!(refusals[0].contains("dataset.jsonl.part"), "{refusals:#?}");
    assert_eq!(tree(deployment.dir.path()), before);
    assert!(!deployment.path("nowhere").exists());
}

#[test]
fn a_hub_that_lists_paths_that_lead_out_is_not_followed() {
    for name in hostile().into_iter().step_by(4) {
        let (mut deployment, before) = with_outside();
        fs_err::remove_dir_all(deployment.path("volume/models")).unwrap();
        let sim = &deployment.sim;
        sim.add_model("brightrun/demo", &demo("model"), None)
            .unwrap();
        let names = ["config.json", "tokenizer.json", "model.safetensors", &name];
        let siblings = names.map(|name| json!({"rfilename": name, "size": 1}));
        let listing = json!({"sha": "main", "siblings": siblings});
        let hostile = Fault::always(Route::Hub, Action::reply(200, listing)).path("/api/");
        sim.add_fault(hostile);
        let id = sim.submit(deployment.body("model", 1)).unwrap();
        let _worker = deployment.worker_with(&[("BRIGHTRUN_ALLOW_DOWNLOAD", "1")]);
        let said = refusals(&deployment, &[id]).remove(0);
        assert!(said.contains("no path inside a repository"), "{said}");
        assert_eq!(tree(deployment.dir.path()), before, "{name:?}");
    }
}
