//! Rows: the requests as the database's REST interface wants them, its errors, dead connections.

use std::io::{BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use brightrun::worker::log::{Level, Log};
use brightrun::worker::net::Cancel;
use brightrun::worker::row::{Claim, Row as JobRow, Updated};
use brightrun::worker::secret::Secret;
use brightrun::worker::supabase::{Row, Supabase};
use serde_json::{Value, json};

use crate::serve::{Request, Server, answer};

const KEY: &str = "eyJhbGciOiJIUzI1NiJ9.canary.c2ln";

fn row(value: Value) -> Row {
    match value {
        Value::Object(row) => row,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn requests_are_the_interfaces_own() {
    let server = Server::start(|request, stream| match request.method.as_str() {
        "GET" => answer(stream, 200, "", br#"[{"id": "a", "progress": 5}]"#),
        "PATCH" if request.header("prefer") == "return=representation" => {
            answer(stream, 200, "", b"[]");
        }
        "PATCH" => answer(stream, 204, "", b""),
        _ => answer(stream, 201, "", b""),
    });
    let project = Supabase::new(&server.url("/"), Secret::new(KEY)).unwrap();
    let table = "pipeline_training_jobs";
    let mine = ("id", "eq.a b&c");
    let found = project
        .get(table, &[mine, ("status", "neq.cancelled")], "id,progress")
        .await
        .unwrap();
    assert_eq!(found, [row(json!({"id": "a", "progress": 5}))]);
    let body = row(json!({"status": "running", "progress": 5}));
    assert!(
        project
            .patch(table, &[mine], &body, true)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        project
            .patch(table, &[mine], &body, false)
            .await
            .unwrap()
            .is_empty()
    );
    project
        .insert("pipeline_training_metrics", &[body.clone(), body.clone()])
        .await
        .unwrap();
    assert!(
        project.patch(table, &[], &body, true).await.is_err(),
        "every row"
    );

    let seen = server.requests();
    assert_eq!(
        seen[0].path,
        "/rest/v1/pipeline_training_jobs?id=eq.a+b%26c&status=neq.cancelled&select=id%2Cprogress"
    );
    assert_eq!(
        seen[1].path,
        "/rest/v1/pipeline_training_jobs?id=eq.a+b%26c"
    );
    assert_eq!(seen[2].header("prefer"), "return=minimal");
    assert_eq!(seen[3].path, "/rest/v1/pipeline_training_metrics");
    let sent: Value = serde_json::from_slice(&seen[3].body).unwrap();
    assert_eq!(sent.as_array().unwrap().len(), 2);
    for request in &seen {
        assert_eq!(request.header("apikey"), KEY);
        assert_eq!(request.header("authorization"), format!("Bearer {KEY}"));
    }
    assert_eq!(seen.len(), 4);
}

#[tokio::test]
async fn a_new_key_is_no_bearer() {
    let server = Server::start(|_, stream| answer(stream, 200, "", b"[]"));
    let project = Supabase::new(&server.url(""), Secret::new("sb_secret_canary")).unwrap();
    project.get("t", &[], "*").await.unwrap();
    let seen = &server.requests()[0];
    assert_eq!(seen.header("apikey"), "sb_secret_canary");
    assert_eq!(seen.header("authorization"), "");
}

#[tokio::test]
async fn errors_keep_the_databases_words() {
    let server = Server::start(|request, stream| {
        let (status, body) = match request.path.as_str() {
            "/rest/v1/numbers?id=eq.1" => (
                400,
                json!({"code": "22P02", "message": "invalid input syntax for type integer"}),
            ),
            "/rest/v1/gone?select=*" => (
                404,
                json!({"code": "PGRST205", "message": "Could not find the table", "hint": "other"}),
            ),
            "/rest/v1/twice?select=*" => {
                (409, json!({"code": "23505", "message": "duplicate key"}))
            }
            "/rest/v1/busy?select=*" => (503, Value::Null),
            "/rest/v1/odd?select=*" => (200, json!({"not": "a list"})),
            _ => (401, json!({"message": format!("Invalid key {KEY}")})),
        };
        answer(stream, status, "", body.to_string().as_bytes());
    });
    let project = Supabase::new(&server.url(""), Secret::new(KEY)).unwrap();
    let body = row(json!({"progress": 0.5}));
    let error = project
        .patch("numbers", &[("id", "eq.1")], &body, false)
        .await
        .unwrap_err();
    assert_eq!(
        (error.status, error.code.as_str(), error.retryable),
        (400, "22P02", false)
    );
    assert!(error.to_string().contains("`numbers`"), "{error}");
    for (table, status, retryable) in [
        ("gone", 404, false),
        ("busy", 503, true),
        ("odd", 0, true),
        ("twice", 409, false),
        ("any", 401, false),
    ] {
        let error = project.get(table, &[], "*").await.unwrap_err();
        assert_eq!(
            (error.status, error.retryable),
            (status, retryable),
            "{table}"
        );
        assert!(
            !format!("{error} {error:?}").contains("canary"),
            "{error:?}"
        );
    }
    let closed = format!("http://{}", server.address);
    drop(server);
    let project = Supabase::new(&closed, Secret::new(KEY)).unwrap();
    let error = project.get("t", &[], "*").await.unwrap_err();
    assert!(error.retryable && error.status == 0, "{error:?}");
}

/// Answers the first request of a connection, takes `dead` more without answer.
fn flaky(listener: TcpListener) -> std::thread::JoinHandle<Vec<Request>> {
    std::thread::spawn(move || {
        let mut seen = Vec::new();
        for dies in [true, false] {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            seen.push(Request::read(&mut stream).unwrap());
            let body = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
            stream.get_mut().write_all(body).unwrap();
            if dies {
                seen.push(Request::read(&mut stream).unwrap());
            }
        }
        seen
    })
}

#[tokio::test]
async fn a_dead_connection_is_tried_once_more() {
    for reading in [true, false] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = flaky(listener);
        let project = Supabase::new(&format!("http://{address}"), Secret::new(KEY)).unwrap();
        project.get("t", &[], "*").await.unwrap();
        if reading {
            project.get("t", &[], "*").await.unwrap();
        } else {
            // It would add the row twice if the first had arrived.
            let error = project.insert("t", &[row(json!({}))]).await.unwrap_err();
            assert!(error.retryable, "{error:?}");
            project.get("t", &[], "*").await.unwrap();
        }
        assert_eq!(server.join().unwrap().len(), 3);
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_updated_is_not_claimed_for_ever() {
    let server = Server::start(|request, stream| match request.method.as_str() {
        "GET" => answer(stream, 200, "", br#"[{"id": "a", "status": "queued"}]"#),
        _ => answer(stream, 200, "", b"[]"),
    });
    let project = Supabase::new(&server.url("/"), Secret::new(KEY)).unwrap();
    let log = Log::new(Arc::new(|_: &str| {}), Level::Error, false, &[]);
    let row = JobRow::new(&project, "a");
    let never = Cancel::never();
    let claim = row.claim(Duration::from_secs(1), false, &never, &log);
    let claim = tokio::time::timeout(Duration::from_secs(20), claim).await;
    match claim.unwrap() {
        Claim::Unreachable(reason) => assert!(reason.contains("not updated"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let failed = row.fail(&row_of_failure()).await;
    assert_eq!(failed.unwrap(), Updated::Contested);
}

fn row_of_failure() -> Row {
    row(json!({"status": "failed"}))
}
