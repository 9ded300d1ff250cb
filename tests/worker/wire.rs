//! The requests of this worker beside those of RunPod's Python SDK.

use std::collections::BTreeMap;

use brightrun::sim::{Record, Route};
use serde_json::Value;

use super::harness::Deployment;
use crate::log::{Logged, read};

const NOT_PING: &[Route] = &[Route::Take, Route::Stop, Route::Progress, Route::Done];
const PING: &[Route] = &[Route::Ping];
const NOTHING: &str = "-";
const VERSION: &str = concat!("brightrun/", env!("CARGO_PKG_VERSION"));
const SDK: &str = "RunPod-Python-SDK/1.12.0 (Linux; x86_64) Language/Python 3.11.7";

/// Where they differ: the requests, the part, the SDK's, this worker's. All else is the same.
const DIFFERENCES: [(&[Route], &str, &str, &str); 6] = [
    // This worker says who it is.
    (NOT_PING, "header user-agent", SDK, VERSION),
    (PING, "header user-agent", "python-requests/2.34.2", VERSION),
    (PING, "query runpod_version", "1.12.0", VERSION),
    // Answers are short, and are not to come compressed.
    (NOT_PING, "header accept-encoding", "gzip, deflate", NOTHING),
    (
        PING,
        "header accept-encoding",
        "gzip, deflate, br, zstd",
        NOTHING,
    ),
    // A request without a body has no type.
    (
        &[Route::Take, Route::Stop],
        "header content-type",
        "application/json",
        NOTHING,
    ),
];

/// The parts of a request by name; the job's id and the key as placeholders.
type Form = BTreeMap<String, String>;

fn form(method: &str, target: &str, headers: &[(String, String)], body: &str) -> Form {
    let (path, query) = target.split_once('?').unwrap();
    let mut form = Form::new();
    form.insert("method".to_owned(), method.to_owned());
    form.insert("path".to_owned(), path.to_owned());
    let mut names = Vec::new();
    for parameter in query.split('&') {
        let (name, value) = parameter.split_once('=').unwrap();
        names.push(name);
        form.insert(format!("query {name}"), value.to_owned());
    }
    form.insert("query".to_owned(), names.join("&"));
    for (name, value) in headers {
        form.insert(format!("header {name}"), value.clone());
    }
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let keys = body.as_object().into_iter().flat_map(|body| body.keys());
    form.insert(
        "body".to_owned(),
        keys.cloned().collect::<Vec<_>>().join(" "),
    );
    form
}

fn without(form: Form, secret: &str, job: &str) -> Form {
    let placed = form.into_iter().map(|(name, value)| {
        let value = value.replace(secret, "{key}").replace(job, "{job}");
        (name, value)
    });
    placed.collect()
}

fn of_sdk(request: &Logged, job: &str) -> Form {
    let headers = request.headers();
    let form = form(&request.method, &request.target, &headers, &request.body);
    without(form, "KEY123", job)
}

fn of_worker(record: &Record, job: &str) -> Form {
    let of_connection = ["host", "content-length"];
    let headers = record.headers.iter().cloned();
    let headers: Vec<_> = headers
        .filter(|(name, _)| !of_connection.contains(&name.as_str()))
        .collect();
    let form = form(&record.method, &record.target, &headers, &record.body);
    without(form, "worker-key", job)
}

/// The parts of a request that differ: name, the SDK's, this worker's.
fn differences(sdk: &Form, worker: &Form) -> Vec<(String, String, String)> {
    let of = |form: &Form, name: &String| {
        let part = form.get(name);
        part.map_or_else(|| NOTHING.to_owned(), Clone::clone)
    };
    let mut names: Vec<&String> = sdk.keys().chain(worker.keys()).collect();
    names.sort();
    names.dedup();
    let parts = names
        .into_iter()
        .map(|name| (name.clone(), of(sdk, name), of(worker, name)));
    parts.filter(|(_, sdk, worker)| sdk != worker).collect()
}

#[test]
fn the_requests_are_those_of_the_sdk() {
    let mut deployment = Deployment::new();
    let _worker = deployment.worker();
    deployment.until("a ping without a job", || deployment.sim.pings("pod1") > 0);
    let (body, _) = deployment.job(60, 2);
    let job = deployment.sim.submit(body).unwrap();
    deployment.completed(&job);
    let records = deployment.sim.records();
    // Log a has a job with progress, log b one that is long enough to be in a ping.
    let (short, long) = (read("a"), read("b"));
    for route in NOT_PING.iter().chain(PING) {
        let is_it = |request: &&Logged| {
            request.route() == *route
                && (request.method == "GET" || request.target.contains("/j2?"))
        };
        let of_route = |record: &&Record| record.route == *route;
        let mut pairs = vec![(
            of_sdk(short.iter().find(is_it).unwrap(), "j2"),
            of_worker(records.iter().find(of_route).unwrap(), &job),
        )];
        if *route == Route::Ping {
            let sdk = long
                .iter()
                .find(|request| request.target.contains("job_id"));
            let mut worker = records.iter().filter(of_route);
            let worker = worker.find(|record| record.target.contains("job_id"));
            pairs.push((of_sdk(sdk.unwrap(), "s2"), of_worker(worker.unwrap(), &job)));
        }
        let mut expected: Vec<(String, String, String)> = DIFFERENCES
            .iter()
            .filter(|(routes, ..)| routes.contains(route))
            .map(|(_, part, sdk, worker)| {
                ((*part).to_owned(), (*sdk).to_owned(), (*worker).to_owned())
            })
            .collect();
        expected.sort();
        for (sdk, worker) in pairs {
            assert_eq!(differences(&sdk, &worker), expected, "{route:?}");
        }
    }
}
