//! Callbacks: signature, answers, refusals (F17, F23).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use brightrun::worker::callback::{Callback, CallbackError, Event, Reply, Signer};
use brightrun::worker::net::{Guard, Policy};
use brightrun::worker::secret::Secret;
use serde_json::{Value, json};

use crate::serve::{Server, answer};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn callback(url: &str) -> Result<Callback, CallbackError> {
    let guard = Guard::new(Policy::AllowPrivate);
    Callback::new(
        guard,
        url,
        Some(&Secret::new(SECRET)),
        Some(&Secret::new("Bearer canary-auth")),
    )
}

fn event(sequence: u32) -> Event {
    let id = format!("msg_job-1_1_{sequence}");
    Event::new(
        id,
        "training.progress",
        json!({"job_id": "job-1", "progress": 40}),
    )
}

#[tokio::test]
async fn an_event_arrives_signed() {
    let server = Server::start(|_, stream| answer(stream, 202, "", b"{\"cancel\": true}"));
    let event = event(7);
    let reply = callback(&server.url("/cb?key=canary"))
        .unwrap()
        .send(&event)
        .await
        .unwrap();
    assert_eq!(reply, Reply { cancel: true });
    let seen = &server.requests()[0];
    assert_eq!(
        (seen.method.as_str(), seen.path.as_str()),
        ("POST", "/cb?key=canary")
    );
    assert_eq!(seen.header("authorization"), "Bearer canary-auth");
    assert_eq!(seen.header("content-type"), "application/json");
    assert_eq!(seen.header("webhook-id"), "msg_job-1_1_7");
    let body = String::from_utf8(seen.body.clone()).unwrap();
    let signer = Signer::new(&Secret::new(SECRET)).unwrap();
    let time = seen.header("webhook-timestamp").parse().unwrap();
    assert_eq!(
        seen.header("webhook-signature"),
        signer.sign("msg_job-1_1_7", time, &body)
    );
    assert!(time.abs_diff(event.unix_seconds) <= 5);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["type"], "training.progress");
    assert_eq!(body["data"]["progress"], 40);
}

#[tokio::test]
async fn only_a_2xx_is_success() {
    let elsewhere = Server::start(|_, stream| answer(stream, 200, "", b""));
    let location = format!("Location: {}\r\n", elsewhere.url("/"));
    for (status, headers, retry_after, stop_for_good) in [
        (500, "", None, false),
        (503, "Retry-After: 7\r\n", Some(7), false),
        (429, "Retry-After: 3\r\n", Some(3), false),
        (410, "", None, true),
        (404, "", None, false),
        (401, "", None, false),
        (307, location.as_str(), None, false),
    ] {
        let headers = headers.to_owned();
        let server =
            Server::start(move |_, stream| answer(stream, status, &headers, b"{\"cancel\":true}"));
        let error = callback(&server.url("/cb?key=canary"))
            .unwrap()
            .send(&event(1))
            .await
            .unwrap_err();
        assert_eq!(error.status, Some(status));
        assert_eq!(
            error.retry_after,
            retry_after.map(Duration::from_secs),
            "{status}"
        );
        assert_eq!(error.stop_for_good, stop_for_good, "{status}");
        assert!(
            !format!("{error} {error:?}").contains("canary"),
            "{error:?}"
        );
        assert_eq!(server.requests().len(), 1);
    }
    assert_eq!(elsewhere.connections(), 0, "no redirect is followed");
}

#[tokio::test]
async fn a_retry_is_the_same_event() {
    let number = AtomicUsize::new(0);
    let server = Server::start(move |_, stream| {
        // The first answer is lost.
        if number.fetch_add(1, Ordering::SeqCst) > 0 {
            answer(stream, 200, "", b"no json");
        }
    });
    let (callback, event) = (callback(&server.url("/cb")).unwrap(), event(1));
    let error = callback.send(&event).await.unwrap_err();
    assert_eq!((error.status, error.stop_for_good), (None, false));
    assert_eq!(callback.send(&event).await.unwrap(), Reply::default());
    let seen = server.requests();
    assert_eq!(seen[0].body, seen[1].body);
    assert_eq!(seen[0].header("webhook-id"), seen[1].header("webhook-id"));
}

#[tokio::test]
async fn silence_ends_an_attempt() {
    let server = Server::start(|_, _| std::thread::sleep(Duration::from_secs(2)));
    let callback = callback(&server.url("/cb?key=canary")).unwrap();
    let begun = Instant::now();
    let short = callback.with_timeout(Duration::from_millis(100));
    let error = short.send(&event(1)).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(
        !error.stop_for_good && !error.to_string().contains("canary"),
        "{error}"
    );
}

#[tokio::test]
async fn what_cannot_be_sent_is_told_before() {
    let guard = Guard::new(Policy::Public);
    for url in [
        "http://h.example/",
        "https://127.0.0.1/",
        "https://169.254.169.254/",
        "https://h.example:9/",
    ] {
        let error = Callback::new(guard.clone(), url, None, None).unwrap_err();
        assert!(error.stop_for_good, "{url}");
    }
    let odd = Secret::new("canary\nX: y");
    let error = Callback::new(guard.clone(), "https://h.example/", None, Some(&odd)).unwrap_err();
    assert!(!error.to_string().contains("canary"));
    let server = Server::start(|_, stream| answer(stream, 200, "", b""));
    let callback = callback(&server.url("/?key=canary")).unwrap();
    for id in ["", "a.b", "a b", "a\nb"] {
        assert!(
            callback
                .send(&Event::new(id, "t", Value::Null))
                .await
                .is_err(),
            "{id:?}"
        );
    }
    assert_eq!(server.connections(), 0);
    assert!(
        !format!("{callback:?}").contains("canary") && !format!("{callback:?}").contains("MfKQ")
    );
}
