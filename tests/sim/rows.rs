//! Rows over REST.

use brightrun::sim::Sim;
use serde_json::{Value, json};

use crate::{Http, Reply, settings};

const JOBS: &str = "/rest/v1/pipeline_training_jobs";
const ID: &str = "00000000-0000-4000-a000-0000000000aa";

const OTHER: &str = "00000000-0000-4000-a000-0000000000bb";

fn start() -> (Sim, Http) {
    let sim = Sim::start(settings()).unwrap();
    sim.insert_row(
        "pipeline_training_jobs",
        &json!({"id": ID, "status": "initializing"}),
    )
    .unwrap();
    let http = Http::new(&sim);
    (sim, http)
}

fn patch(http: &Http, query: &str, body: &Value) -> Reply {
    http.send(
        http.supabase("PATCH", &format!("{JOBS}?{query}"))
            .json(body),
    )
}

#[test]
fn rows_are_filtered_selected_and_updated() {
    let (sim, http) = start();
    let reply = patch(
        &http,
        &format!("id=eq.{ID}&status=neq.cancelled"),
        &json!({"status": "running", "progress": 5}),
    );
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    let row = http.send(http.supabase("GET", &format!("{JOBS}?id=eq.{ID}&select=status,progress")));
    assert_eq!(row.json(), json!([{"status": "running", "progress": 5}]));
    for (query, rows) in [
        ("status=in.(running,failed)", 1),
        ("status=in.(failed)", 0),
        ("adapter_file_path=is.null", 1),
        ("adapter_file_path=not.is.null", 0),
        ("progress=gte.6", 0),
    ] {
        let reply = http.send(http.supabase("GET", &format!("{JOBS}?{query}")));
        assert_eq!(reply.json().as_array().unwrap().len(), rows, "{query}");
    }
    sim.update_rows(
        "pipeline_training_jobs",
        &format!("id=eq.{ID}"),
        &json!({"status": "cancelled"}),
    )
    .unwrap();
    let late = http.supabase(
        "PATCH",
        &format!("{JOBS}?id=eq.{ID}&status=neq.cancelled&select=id"),
    );
    let late = http.send(
        late.header("Prefer", "return=representation")
            .json(&json!({"status": "running"})),
    );
    assert_eq!((late.status, late.json()), (200, json!([])));
    assert_eq!(
        sim.row("pipeline_training_jobs", ID).unwrap()["status"],
        "cancelled"
    );
}

#[test]
fn one_object_is_one_object() {
    let (sim, http) = start();
    let one = |query: &str| {
        let request = http.supabase("GET", &format!("{JOBS}?{query}&select=id"));
        http.send(request.header("Accept", "application/vnd.pgrst.object+json"))
    };
    assert_eq!(one(&format!("id=eq.{ID}")).json(), json!({"id": ID}));
    let none = one("status=eq.failed");
    assert_eq!(
        (none.status, none.json()["code"].as_str()),
        (406, Some("PGRST116"))
    );
    let other = json!({"id": OTHER, "status": "initializing"});
    sim.insert_row("pipeline_training_jobs", &other).unwrap();
    for (filter, status) in [
        ("status=eq.initializing", 406),
        ("status=eq.failed", 406),
        (&*format!("id=eq.{ID}"), 204),
    ] {
        let request = http.supabase("PATCH", &format!("{JOBS}?{filter}"));
        let request = request.header("Accept", "application/vnd.pgrst.object+json");
        assert_eq!(
            http.send(request.json(&json!({"progress": 9}))).status,
            status,
            "{filter}"
        );
    }
    assert_eq!(sim.row_events().len(), 1);
}

#[test]
fn what_the_database_would_refuse_is_refused() {
    let (sim, http) = start();
    let filter = format!("id=eq.{ID}");
    for (fields, status, code) in [
        (json!({"progress": 45.5}), 400, "22P02"),
        (json!({"status": "done"}), 400, "23514"),
        (json!({"loss": 1}), 400, "PGRST204"),
        (json!({"status": null}), 400, "23502"),
        (json!({"actual_cost": "Infinity"}), 400, "22003"),
        (json!({"started_at": 1_768_046_400}), 400, "22008"),
    ] {
        let reply = patch(&http, &filter, &fields);
        let body = reply.json();
        assert_eq!(
            (reply.status, &body["code"]),
            (status, &json!(code)),
            "{fields}"
        );
        let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["code", "details", "hint", "message"]);
    }
    assert_eq!(
        patch(&http, "nope=eq.1", &json!({"progress": 1})).json()["code"],
        "42703"
    );
    let nan = http
        .supabase("PATCH", &format!("{JOBS}?{filter}"))
        .body(r#"{"current_loss": NaN}"#);
    assert_eq!(http.send(nan).json()["code"], "PGRST102");
    let unknown = http.send(http.supabase("GET", "/rest/v1/nothing"));
    assert_eq!(
        (unknown.status, unknown.json()["code"].as_str()),
        (404, Some("PGRST205"))
    );
    assert_eq!(sim.row_events().len(), 0);
}

#[test]
fn an_operand_is_read_as_its_columns_type() {
    let (sim, http) = start();
    for (filter, code, message) in [
        (
            "id=eq.job-1",
            "22P02",
            "invalid input syntax for type uuid: \"job-1\"",
        ),
        (
            "id=in.(job-1)",
            "22P02",
            "invalid input syntax for type uuid: \"job-1\"",
        ),
        (
            "progress=not.gt.x",
            "22P02",
            "invalid input syntax for type integer: \"x\"",
        ),
        (
            "progress=lt.4.5",
            "22P02",
            "invalid input syntax for type integer: \"4.5\"",
        ),
        (
            "progress=eq.3000000000",
            "22003",
            "value \"3000000000\" is out of range for type integer",
        ),
        (
            "final_loss=lt.low",
            "22P02",
            "invalid input syntax for type double precision: \"low\"",
        ),
        (
            "updated_at=lt.yesterday-ish",
            "22007",
            "invalid input syntax for type timestamp with time zone: \"yesterday-ish\"",
        ),
        (
            "updated_at=lt.1768046400",
            "22008",
            "date/time field value out of range: \"1768046400\"",
        ),
        (
            "status=is.true",
            "42804",
            "argument of IS TRUE must be type boolean, not type text",
        ),
    ] {
        let read = http.send(http.supabase("GET", &format!("{JOBS}?{filter}")));
        let written = patch(&http, filter, &json!({"progress": 1}));
        for reply in [read, written] {
            let body = reply.json();
            assert_eq!(
                (reply.status, &body["code"], &body["message"]),
                (400, &json!(code), &json!(message))
            );
        }
    }
    assert_eq!(sim.row_events().len(), 0);
    let upper = ID.to_uppercase();
    for (filter, rows) in [
        (&*format!("id=eq.{upper}"), 1),
        (&*format!("id=in.({OTHER},{upper})"), 1),
        (&*format!("id=not.in.({OTHER})"), 1),
        ("status=eq.done", 0),
        ("actual_cost=lt.Infinity", 0),
        ("updated_at=lt.now", 1),
    ] {
        let reply = http.send(http.supabase("GET", &format!("{JOBS}?{filter}")));
        assert_eq!(reply.json().as_array().unwrap().len(), rows, "{filter}");
    }
}

#[test]
fn both_keys_are_needed() {
    let (_sim, http) = start();
    let status = |request| http.send(request).status;
    assert_eq!(status(http.request("GET", JOBS)), 401);
    assert_eq!(
        status(http.request("GET", JOBS).header("apikey", "service-key")),
        401
    );
    assert_eq!(
        status(http.request("GET", JOBS).bearer_auth("service-key")),
        401
    );
    assert_eq!(status(http.supabase("GET", JOBS)), 200);
}

#[test]
fn inserts_are_all_or_none() {
    let (sim, http) = start();
    let metric = |value: Value| json!({"job_id": ID, "metric_id": "training_loss", "metric_name": "Training loss", "value": value});
    let insert = |rows: Value| {
        http.send(
            http.supabase("POST", "/rest/v1/pipeline_training_metrics")
                .json(&rows),
        )
    };
    assert_eq!(
        insert(json!([metric(json!(1.5)), metric(json!(null))])).json()["code"],
        "23502"
    );
    assert_eq!(sim.rows("pipeline_training_metrics").len(), 0);
    assert_eq!(
        insert(json!([metric(json!(1.5)), metric(json!(2))])).status,
        201
    );
    assert_eq!(sim.rows("pipeline_training_metrics").len(), 2);
    let twins = json!([{"id": OTHER, "user_id": ID}, {"id": ID, "user_id": ID}]);
    assert_eq!(
        http.send(http.supabase("POST", JOBS).json(&twins)).status,
        409
    );
    assert_eq!(sim.rows("pipeline_training_jobs").len(), 1);
    let twice = http.send(
        http.supabase("POST", JOBS)
            .json(&json!({"id": ID, "user_id": ID})),
    );
    assert_eq!(
        (twice.status, twice.json()["code"].as_str()),
        (409, Some("23505"))
    );
}

#[test]
fn each_update_of_a_completed_job_deploys_again() {
    let (sim, http) = start();
    let filter = format!("id=eq.{ID}");
    patch(&http, &filter, &json!({"status": "completed"}));
    assert_eq!(sim.deploys(), 0);
    patch(
        &http,
        &filter,
        &json!({"adapter_file_path": "lora-models/adapters/a.tar.gz"}),
    );
    patch(&http, &filter, &json!({"progress": 100}));
    assert_eq!(sim.deploys(), 2);
    assert_eq!(sim.row_events()[2].old["progress"], 0);
}
