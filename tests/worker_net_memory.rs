//! A 300 MB file comes, 100 MB go and are read back, and what has no end is left at 100 MB, without the process growing by them.
//!
//! Alone in its file: the resident set is the process's.

#![cfg(feature = "worker")]
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use brightrun::worker::net::fetch::{Limits, Via, fetch};
use brightrun::worker::net::gzip::{GzipCaps, decompress_if_gzip};
use brightrun::worker::net::{Cancel, Guard, Kind, Policy};
use brightrun::worker::secret::Secret;
use brightrun::worker::supabase::{Supabase, Upload};
use reqwest::header::HeaderMap;

const FILE_BYTES: u64 = 300_000_000;
/// Bytes of the object that goes up and is read back.
const OBJECT_BYTES: u64 = 100_000_000;
/// Above the state after the first small request: one piece of 6 MiB in the client, what sockets hold, and what the
/// allocator keeps.
const GROWTH_KB: u64 = 24 * 1024;

/// A value of `/proc/self/status` in KiB.
fn status_kb(name: &str) -> u64 {
    let text = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Peak of the resident set from now on.
fn forget_peak() {
    fs_err::write("/proc/self/clear_refs", "5").unwrap();
}

/// Gives zeros, takes pieces and forgets them; holds 64 KiB.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = BufReader::with_capacity(64 * 1024, stream.unwrap());
            std::thread::spawn(move || while_open(stream, address));
        }
    });
    address
}

fn while_open(mut stream: BufReader<TcpStream>, address: SocketAddr) -> Option<()> {
    loop {
        let (mut line, mut length, mut offset) = (String::new(), 0_u64, 0_u64);
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        loop {
            let mut header = String::new();
            stream.read_line(&mut header).ok()?;
            let Some((name, value)) = header.trim_end().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "upload-offset" => offset = value.parse().ok()?,
                _ => {}
            }
        }
        std::io::copy(&mut (&mut stream).take(length), &mut std::io::sink()).ok()?;
        let out = stream.get_mut();
        if line.starts_with("GET /endless") {
            write!(out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").ok()?;
            std::io::copy(&mut std::io::repeat(0), out).ok()?;
        }
        let empty = "Content-Length: 0\r\n";
        let bytes = if line.contains("/object/") {
            OBJECT_BYTES
        } else {
            FILE_BYTES
        };
        if line.starts_with("GET") || line.starts_with("HEAD") {
            write!(
                out,
                "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\nETag: \"z\"\r\n\r\n"
            )
            .ok()?;
            if line.starts_with("GET") {
                std::io::copy(&mut std::io::repeat(0).take(bytes), out).ok()?;
            }
        } else if line.starts_with("POST") {
            write!(
                out,
                "HTTP/1.1 201 C\r\nLocation: http://{address}/u\r\n{empty}\r\n"
            )
            .ok()?;
        } else {
            write!(
                out,
                "HTTP/1.1 204 N\r\nUpload-Offset: {}\r\n\r\n",
                offset + length
            )
            .ok()?;
        }
    }
}

#[tokio::test]
async fn memory_stays_flat() {
    let address = serve();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let never = Cancel::never();
    let project = Supabase::new(&format!("http://{address}"), Secret::new("key")).unwrap();
    project
        .check_limit("b", "p", "application/gzip", 1)
        .await
        .unwrap();
    let limits = Limits::default();
    let mut report = Vec::new();

    let before = status_kb("VmRSS");
    forget_peak();
    let (guard, headers) = (Guard::new(Policy::AllowPrivate), HeaderMap::new());
    let url = format!("http://{address}/x");
    let got = fetch(
        Via::Guard(&guard),
        &url,
        &headers,
        &to,
        &limits,
        &never,
        &mut |_, _| {},
    )
    .await
    .unwrap();
    assert_eq!(got.bytes, FILE_BYTES);
    report.push(("fetch", status_kb("VmHWM").saturating_sub(before)));

    fs_err::OpenOptions::new()
        .write(true)
        .open(&to)
        .unwrap()
        .set_len(OBJECT_BYTES)
        .unwrap();
    forget_peak();
    let upload = Upload {
        bucket: "b".into(),
        path: "p".into(),
        file: to.clone(),
        sha256: None,
        content_type: "application/gzip".into(),
        state: None,
        deadline: Duration::from_mins(1),
        backoff: Duration::from_secs(1),
    };
    project
        .upload(&upload, &never, &mut |_, _| {})
        .await
        .unwrap();
    report.push(("upload", status_kb("VmHWM").saturating_sub(before)));

    forget_peak();
    // Another digest is seen at the end, after all bytes.
    let error = project
        .verify("b", "p", OBJECT_BYTES, &got.sha256, &never)
        .await
        .unwrap_err();
    assert_eq!(error.code, "Mismatch");
    report.push(("verify", status_kb("VmHWM").saturating_sub(before)));

    forget_peak();
    leave_at_the_cap(address, folder.path()).await;
    report.push(("floods", status_kb("VmHWM").saturating_sub(before)));

    println!("growth in KiB: {report:?}; resident before: {before} KiB");
    for (step, growth_kb) in report {
        assert!(
            growth_kb < GROWTH_KB,
            "{step} grew the process by {growth_kb} KiB"
        );
    }
}

/// A stream without end or length, and a packed file that unpacks to more, are left at the cap.
async fn leave_at_the_cap(address: SocketAddr, folder: &Path) {
    let (guard, never) = (Guard::new(Policy::AllowPrivate), Cancel::never());
    let limits = Limits {
        max_bytes: OBJECT_BYTES,
        ..Limits::default()
    };
    let (url, to) = (format!("http://{address}/endless"), folder.join("endless"));
    let headers = HeaderMap::new();
    let via = Via::Guard(&guard);
    let error = fetch(via, &url, &headers, &to, &limits, &never, &mut |_, _| {})
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::TooLarge, "{error}");
    assert!(error.message.contains("does not end"), "{error}");

    let path = folder.join("packed");
    let file = fs_err::File::create(&path).unwrap();
    let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    std::io::copy(&mut std::io::repeat(0).take(FILE_BYTES), &mut encoder).unwrap();
    encoder.finish().unwrap();
    for max_ratio in [100, u64::MAX] {
        let caps = GzipCaps {
            max_bytes: OBJECT_BYTES,
            max_ratio,
        };
        let error = decompress_if_gzip(&path, caps, &never).await.unwrap_err();
        assert_eq!(error.kind, Kind::TooLarge, "{error}");
    }
}
