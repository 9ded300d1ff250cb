//! Jobs given on this machine: one from the command line or a file, or as many as come over HTTP in RunPod's own shapes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Path, Query, State as Shared};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::attempt::Attempt;
use super::cancel::{Ends, Reason};
use super::context::Context;
use super::net::{Cancel, Canceller};
use super::platform::Taken;
use super::upstream::{Board, Upstream};

/// Longest body of a request, as the platform has it.
const MAX_BODY: usize = 10 << 20;
/// Time that `/runsync` waits where it is not told.
const SYNC_WAIT: Duration = Duration::from_secs(90);
/// Finished jobs that are remembered.
const REMEMBERED: usize = 1000;

/// Runs one job and gives its body of output or error; `null` where it was ended.
///
/// # Errors
/// A job without input.
pub async fn one(context: &Context, job: &Value, draining: &Cancel) -> Result<Value, String> {
    let mut job = job.clone();
    if let Some(job) = job.as_object_mut() {
        job.entry("id").or_insert_with(|| json!("local_test"));
    }
    let taken = Taken::parse(&job).map_err(|(_, reason)| reason)?;
    let (board, ends) = (Board::default(), Ends::default());
    Ok(run(context, &board, &taken, &ends, draining).await)
}

/// Runs a job; it ends where the worker drains.
async fn run(
    context: &Context,
    board: &Board,
    taken: &Taken,
    ends: &Ends,
    draining: &Cancel,
) -> Value {
    let attempt = Attempt {
        broken: Canceller::new().0,
        context,
        upstream: &Upstream::Local(board.clone()),
        taken,
        ends,
        taken_at: tokio::time::Instant::now(),
        draining: draining.clone(),
    };
    let mut work = Box::pin(attempt.run());
    tokio::select! {
        _ = &mut work => {}
        () = draining.cancelled() => {
            ends.end(Reason::Shutdown);
            let _ = work.await;
        }
    }
    board.answer(&taken.id).unwrap_or(Value::Null)
}

/// A job of the local queue.
#[derive(Debug, Clone)]
struct Entry {
    status: &'static str,
    queued: Instant,
    started: Option<Instant>,
    ended: Option<Instant>,
    body: Value,
    ends: Ends,
}

/// The local queue.
#[derive(Debug, Clone)]
struct Queue {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    to_run: mpsc::UnboundedSender<Taken>,
    board: Board,
    worker_id: String,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.lock().get_mut(id) {
            change(entry);
        }
    }

    /// The platform's document of a job.
    fn document(&self, id: &str) -> Option<Value> {
        let entry = self.lock().get(id)?.clone();
        let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_millis();
        let mut document = json!({"id": id, "status": entry.status});
        if let Some(started) = entry.started {
            document["delayTime"] = json!(ms(entry.queued, started));
            document["workerId"] = json!(self.worker_id);
            if let Some(ended) = entry.ended {
                document["executionTime"] = json!(ms(started, ended));
            }
        }
        let output = match entry.status {
            "IN_PROGRESS" => self.board.progress(id),
            _ => entry.body.get("output").cloned(),
        };
        if let Some(output) = output {
            document["output"] = output;
        }
        if let Some(error) = entry.body.get("error") {
            document["error"] = error.clone();
        }
        Some(document)
    }

    /// Adds a job; what is over the memory of finished ones is forgotten.
    fn add(&self, body: &Value) -> Result<String, (StatusCode, Json<Value>)> {
        let input = body.get("input").filter(|input| input.is_object());
        let Some(input) = input else {
            let detail = "bad request: `input` has to be an object";
            return Err(problem(StatusCode::BAD_REQUEST, detail));
        };
        let mut entries = self.lock();
        let id = format!(
            "local-{:04}-{}",
            entries.len() + 1,
            super::net::time::unix_seconds()
        );
        let taken = Taken {
            id: id.clone(),
            input: input.clone(),
            execution_timeout: body["policy"]["executionTimeout"]
                .as_u64()
                .map(Duration::from_millis),
        };
        let over = entries.len().saturating_sub(REMEMBERED);
        let old: Vec<String> = entries
            .iter()
            .filter(|(_, entry)| entry.ended.is_some())
            .map(|(id, _)| id.clone())
            .take(over)
            .collect();
        for id in old {
            entries.remove(&id);
        }
        let entry = Entry {
            status: "IN_QUEUE",
            queued: Instant::now(),
            started: None,
            ended: None,
            body: Value::Null,
            ends: Ends::default(),
        };
        entries.insert(id.clone(), entry);
        let _ = self.to_run.send(taken);
        Ok(id)
    }
}

fn problem(status: StatusCode, detail: &str) -> (StatusCode, Json<Value>) {
    let title = status.canonical_reason().unwrap_or_default();
    (
        status,
        Json(json!({"status": status.as_u16(), "title": title, "detail": detail})),
    )
}

/// Serves `/run`, `/runsync`, `/status/{id}`, `/cancel/{id}` and `/health` on `address`, also below `/v2/{endpoint}`, one job at
/// a time, until it is asked to stop. `told` gets the address that is listened on.
///
/// # Errors
/// An address that cannot be listened on.
pub async fn serve(
    context: &Context,
    address: SocketAddr,
    draining: &Cancel,
    told: impl FnOnce(SocketAddr),
) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    told(listener.local_addr()?);
    let (to_run, mut queued) = mpsc::unbounded_channel();
    let queue = Queue {
        entries: Arc::default(),
        to_run,
        board: Board::default(),
        worker_id: format!("local-{}", std::process::id()),
    };
    let routes = Router::new()
        .route("/run", post(run_later))
        .route("/runsync", post(run_now))
        .route("/status/{id}", get(status).post(status))
        .route("/cancel/{id}", post(cancel))
        .route("/health", get(health));
    let app = Router::new()
        .merge(routes.clone())
        .nest("/v2/{endpoint}", routes)
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(queue.clone());
    let stop = draining.clone();
    let server = tokio::spawn(async move {
        let serving = axum::serve(listener, app);
        serving
            .with_graceful_shutdown(async move { stop.cancelled().await })
            .await
    });
    while let Ok(Some(taken)) = draining.or(queued.recv()).await {
        let Some(entry) = queue.lock().get(&taken.id).cloned() else {
            continue;
        };
        if entry.status != "IN_QUEUE" {
            continue;
        }
        queue.change(&taken.id, |entry| {
            entry.status = "IN_PROGRESS";
            entry.started = Some(Instant::now());
        });
        let body = run(context, &queue.board, &taken, &entry.ends, draining).await;
        queue.change(&taken.id, |entry| {
            entry.ended = Some(Instant::now());
            entry.status = match (&body, entry.status) {
                (_, "CANCELLED") | (Value::Null, _) => "CANCELLED",
                (body, _) if body.get("error").is_some() => "FAILED",
                _ => "COMPLETED",
            };
            entry.body = body;
        });
    }
    let _ = tokio::time::timeout(Duration::from_secs(5), server).await;
    Ok(())
}

type Reply = Result<Json<Value>, (StatusCode, Json<Value>)>;

async fn run_later(Shared(queue): Shared<Queue>, Json(body): Json<Value>) -> Reply {
    let id = queue.add(&body)?;
    Ok(Json(json!({"id": id, "status": "IN_QUEUE"})))
}

async fn run_now(
    Shared(queue): Shared<Queue>,
    Query(query): Query<BTreeMap<String, String>>,
    Json(body): Json<Value>,
) -> Reply {
    let id = queue.add(&body)?;
    let wait = query.get("wait").and_then(|wait| wait.parse().ok());
    let until = Instant::now() + wait.map_or(SYNC_WAIT, Duration::from_millis);
    loop {
        let document = queue.document(&id).unwrap_or_default();
        let is_over = !matches!(
            document["status"].as_str(),
            Some("IN_QUEUE" | "IN_PROGRESS")
        );
        if is_over || Instant::now() >= until {
            return Ok(Json(document));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The last segment of the path is the job, with or without an endpoint before it.
fn id_of(parts: &BTreeMap<String, String>) -> String {
    parts.get("id").cloned().unwrap_or_default()
}

async fn status(
    Shared(queue): Shared<Queue>,
    Path(parts): Path<BTreeMap<String, String>>,
) -> Reply {
    let document = queue.document(&id_of(&parts));
    document
        .map(Json)
        .ok_or_else(|| problem(StatusCode::NOT_FOUND, "job not found"))
}

async fn cancel(
    Shared(queue): Shared<Queue>,
    Path(parts): Path<BTreeMap<String, String>>,
) -> Reply {
    let id = id_of(&parts);
    let mut entries = queue.lock();
    let Some(entry) = entries.get_mut(&id) else {
        return Err(problem(StatusCode::NOT_FOUND, "job not found"));
    };
    if entry.ended.is_none() {
        if entry.started.is_none() {
            entry.ended = Some(Instant::now());
        }
        entry.status = "CANCELLED";
        entry.ends.end(Reason::JobStop);
    }
    Ok(Json(json!({"id": id, "status": entry.status})))
}

async fn health(Shared(queue): Shared<Queue>) -> Json<Value> {
    let entries = queue.lock();
    let count = |status: &str| {
        entries
            .values()
            .filter(|entry| entry.status == status)
            .count()
    };
    let running = count("IN_PROGRESS");
    Json(json!({
        "jobs": {
            "completed": count("COMPLETED"), "failed": count("FAILED"), "inProgress": running, "inQueue": count("IN_QUEUE"),
            "retried": 0,
        },
        "workers": {
            "idle": usize::from(running == 0), "initializing": 0, "ready": usize::from(running == 0), "running": running,
            "throttled": 0, "unhealthy": 0,
        },
    }))
}
