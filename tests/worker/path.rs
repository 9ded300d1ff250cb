//! From the queue to the bucket.

use brightrun::sim::Route;
use serde_json::{Value, json};

use super::harness::{BUCKET, Deployment, TABLE};

#[test]
fn a_job_goes_from_the_queue_to_the_bucket() {
    let mut deployment = Deployment::new();
    let (mut body, id) = deployment.job(1, 4);
    body["input"]["callback_url"] = json!(deployment.sim.callback_url("app"));
    body["input"]["colour"] = json!("green");
    let runpod_id = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    let sim = &deployment.sim;
    deployment.until("progress", || {
        let document = sim.document(&runpod_id).unwrap();
        document["status"] == "IN_PROGRESS" && document["output"]["stage"] == "training"
    });
    let progress = sim.document(&runpod_id).unwrap()["output"].clone();
    assert_eq!(progress["status"], "running");
    assert_eq!(progress["job_id"], json!(id));
    assert!(
        progress["total_steps"].as_u64().unwrap() > 0,
        "{progress:#}"
    );

    let document = deployment.completed(&runpod_id);
    let output = &document["output"];
    assert_eq!(output["status"], "completed");
    assert_eq!(output["progress"], 100);
    let path = format!("{BUCKET}/adapters/{id}.tar.gz");
    assert_eq!(output["adapter_path"], json!(path));
    assert!(output["model_metadata"]["final_loss"].as_f64().unwrap() < 9.0);
    assert_eq!(output["model_metadata"]["base_model"], "brightrun/demo");
    let warnings = output["warnings"].to_string();
    assert!(warnings.contains("colour"), "{warnings}");
    for name in [
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
    ] {
        assert!(
            output["model_files"][name]
                .as_str()
                .unwrap()
                .contains("token="),
            "{output:#}"
        );
        assert!(
            deployment
                .object(&format!("adapters/{id}/{name}"))
                .is_some()
        );
    }

    let row = deployment.row(&id);
    assert_eq!(row["status"], "completed");
    assert_eq!(row["progress"], 100);
    assert_eq!(row["adapter_file_path"], json!(path));
    assert_eq!(row["current_step"], output["current_step"]);
    assert!(row["training_time_seconds"].is_i64() && row["started_at"].is_string());
    assert!(row["final_loss"].as_f64().unwrap() < 9.0);
    assert_eq!(sim.deploys(), 1);
    let metrics = sim.rows("pipeline_training_metrics");
    assert!(
        metrics
            .iter()
            .any(|row| row["metric_id"] == "training_loss")
    );

    let names: Vec<String> = deployment
        .adapter(&id)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for name in [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ] {
        assert!(names.iter().any(|own| own == name), "{names:?}");
    }
    let files = deployment.adapter(&id);
    let config = files
        .iter()
        .find(|(name, _)| name == "adapter_config.json")
        .unwrap();
    let config: Value = serde_json::from_slice(&config.1).unwrap();
    assert_eq!(config["base_model_name_or_path"], "brightrun/demo");
    let manifest = deployment
        .object(&format!("adapters/{id}/manifest.json"))
        .unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert!(manifest["files"].as_array().unwrap().len() >= 5);

    deployment.until("the last callback", || {
        let mut kinds = sim
            .callbacks("app")
            .into_iter()
            .map(|callback| super::harness::kind(&callback));
        kinds.next_back() == Some(json!("training.completed"))
    });
    deployment.check_manners();
}

#[test]
fn what_is_trained_is_what_the_command_line_trains() {
    let mut deployment = Deployment::new();
    let (body, id) = deployment.job(2, 2);
    let runpod_id = deployment.sim.submit(body).unwrap();
    let worker = deployment.worker();
    deployment.completed(&runpod_id);
    drop(worker);
    let config = deployment.path(&format!("volume/brightrun/jobs/{id}/train.yml"));
    let pairs = super::harness::demo("pairs.jsonl");
    let mut command = deployment.command("train");
    command.arg(config);
    for set in [
        format!("datasets=[{{path: {:?}}}]", pairs.display().to_string()),
        format!("output_dir={}", deployment.path("plain").display()),
    ] {
        command.args(["--set", &set]);
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let plain = fs_err::read(deployment.path("plain/adapter/adapter_model.safetensors")).unwrap();
    assert!(plain == deployment.weights(&id), "the weights differ");
}

#[test]
fn a_job_that_makes_no_sense_fails_at_once_and_says_why() {
    let mut deployment = Deployment::new();
    let (mut body, id) = deployment.job(3, 2);
    body["input"]["hyperparameters"]["rank"] = json!(0);
    body["input"]["hyperparameters"]["learning_rate"] = json!("fast");
    let first = deployment.sim.submit(body).unwrap();
    let (mut body, other) = deployment.job(4, 2);
    body["input"]["hyperparameters"]["base_model"] = json!("mistralai/Mistral-7B-Instruct-v0.2");
    let second = deployment.sim.submit(body).unwrap();
    let (mut body, empty) = deployment.job(5, 2);
    deployment
        .sim
        .add_file("empty.jsonl", b"{\"_meta\": {}}\n{\"a\": 1}\n")
        .unwrap();
    body["input"]["dataset_url"] = json!(deployment.sim.file_url("empty.jsonl"));
    let third = deployment.sim.submit(body).unwrap();
    let _worker = deployment.worker();
    for (runpod_id, id, parts) in [
        (first, id, vec!["rank", "learning_rate"]),
        (
            second,
            other,
            vec![
                "mistralai/Mistral-7B-Instruct-v0.2",
                "models/Mistral-7B-Instruct-v0.2",
                "BRIGHTRUN_ALLOW_DOWNLOAD",
            ],
        ),
        (third, empty, vec!["exit code 65"]),
    ] {
        let document = deployment.ended(&runpod_id);
        assert_eq!(document["status"], "FAILED", "{document:#}");
        let error = document["error"].as_str().unwrap();
        let row = deployment.row(&id);
        assert_eq!(row["status"], "failed");
        for part in parts {
            assert!(error.contains(part), "{error}");
            assert!(row["error_message"].as_str().unwrap().contains(part));
        }
    }
    assert_eq!(deployment.sim.deploys(), 0);
    assert!(deployment.sim.count(Route::Ping) > 0);
    deployment.check_manners();
}

#[test]
fn a_job_whose_id_is_no_uuid_has_no_row_and_is_done() {
    let mut deployment = Deployment::new();
    let runpod_id = deployment.sim.submit(deployment.body("job-1", 1)).unwrap();
    let worker = deployment.worker();
    let document = deployment.completed(&runpod_id);
    let path = format!("{BUCKET}/adapters/job-1.tar.gz");
    assert_eq!(document["output"]["adapter_path"], json!(path));
    let mut body = deployment.body("job-2", 1);
    body["input"]["dataset_url"] = json!(deployment.sim.file_url("nowhere.jsonl"));
    let failing = deployment.sim.submit(body).unwrap();
    let document = deployment.ended(&failing);
    assert_eq!(document["status"], "FAILED", "{document:#}");
    let said = worker.said();
    for id in ["job-1", "job-2"] {
        let warning = format!("`{TABLE}` has no row with the id `{id}`");
        assert_eq!(said.matches(&warning).count(), 1, "{said}");
    }
    assert!(!said.contains("invalid input syntax"), "{said}");
    deployment.check_manners();
}
