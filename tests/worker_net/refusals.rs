//! What statuses mean to a download.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use brightrun::worker::net::Kind;

use crate::fetch::{assert_files, bring, quick};
use crate::serve::{Server, answer, noise, sha256};

#[tokio::test]
async fn refusals_are_told_apart() {
    let not_found = r#"{"statusCode":"404","error":"not_found","message":"Object not found"}"#;
    let expired = r#"{"statusCode":"400","error":"InvalidJWT","message":"\"exp\" claim timestamp check failed"}"#;
    for (status, body, kind) in [
        (400, expired, Kind::Expired),
        (401, "", Kind::Expired),
        (403, "<Error>Request has expired</Error>", Kind::Expired),
        (400, not_found, Kind::NotFound),
        (404, "", Kind::NotFound),
        (410, "", Kind::NotFound),
        (418, "", Kind::Refused(418)),
        (206, "", Kind::Changed),
        (503, "", Kind::Transient),
    ] {
        let server = Server::start(move |_, stream| answer(stream, status, "", body.as_bytes()));
        let folder = tempfile::tempdir().unwrap();
        let url = server.url("/sign/f.jsonl?token=canary-token");
        let error = bring(&url, &folder.path().join("x"), &quick())
            .await
            .unwrap_err();
        assert_eq!(error.kind, kind, "{status}: {error}");
        assert!(
            !format!("{error} {error:?}").contains("canary"),
            "{error:?}"
        );
        let tries = if matches!(kind, Kind::Transient | Kind::Changed) {
            3
        } else {
            1
        };
        assert_eq!(server.requests().len(), tries, "{status}");
    }
}

#[tokio::test]
async fn a_passing_trouble_passes() {
    let number = AtomicUsize::new(0);
    let server = Server::start(
        move |_, stream| match number.fetch_add(1, Ordering::SeqCst) {
            0 => answer(stream, 503, "Retry-After: 0\r\n", b"busy"),
            1 => answer(stream, 429, "", b""),
            _ => answer(stream, 200, "Content-Encoding: gzip\r\n", b"as it is"),
        },
    );
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let got = bring(&server.url("/x"), &to, &quick()).await.unwrap();
    assert_eq!(got.bytes, 8);
    assert_eq!(fs_err::read(&to).unwrap(), b"as it is");
    assert_eq!(server.requests()[0].header("accept-encoding"), "identity");
}

#[tokio::test]
async fn an_expired_url_keeps_the_part_for_the_next() {
    let content = noise(20, 500_000);
    let body = content.clone();
    let server = Server::start(move |request, stream| {
        let half = body.len() / 2;
        let head = "ETag: \"a\"\r\nConnection: close";
        match (request.path.as_str(), request.range()) {
            ("/x?token=old", None) => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n{head}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(&[head.as_bytes(), &body[..half]].concat());
            }
            ("/x?token=new", Some(at)) => {
                assert_eq!(at, half);
                let range = format!(
                    "Content-Range: bytes {at}-{}/{}",
                    body.len() - 1,
                    body.len()
                );
                let head = format!(
                    "HTTP/1.1 206 P\r\nContent-Length: {half}\r\n{range}\r\n{head}\r\n\r\n"
                );
                let _ = stream.write_all(&[head.as_bytes(), &body[at..]].concat());
            }
            _ => answer(stream, 403, "", b"expired"),
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let error = bring(&server.url("/x?token=old"), &to, &quick())
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::Expired, "{error}");
    assert_files(folder.path(), &["x.part", "x.part.json"]);
    let got = bring(&server.url("/x?token=new"), &to, &quick())
        .await
        .unwrap();
    assert_eq!(got.sha256, sha256(&content));
    assert_eq!(server.requests().len(), 3);
}
