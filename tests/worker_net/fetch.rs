//! Downloads that are cut, flooded, slowed, killed and changed (F14, F15).

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use brightrun::worker::net::error::Result;
use brightrun::worker::net::fetch::{Fetched, Limits, Via, fetch};
use brightrun::worker::net::{Cancel, Canceller, Guard, Kind, Policy};
use reqwest::header::HeaderMap;

use crate::serve::{Request, Server, answer, noise, sha256};

/// A file as a server has it, and how it serves.
#[derive(Default)]
pub(crate) struct Shelf {
    pub(crate) content: Mutex<(Arc<Vec<u8>>, String)>,
    /// Bytes of body after which answer `n` is cut.
    pub(crate) cuts: Vec<usize>,
    pub(crate) no_ranges: bool,
    pub(crate) ignores_if_range: bool,
    pub(crate) answers: AtomicUsize,
    pub(crate) sent: AtomicUsize,
}

impl Shelf {
    pub(crate) fn new(content: impl Into<Arc<Vec<u8>>>, cuts: Vec<usize>) -> Self {
        Self {
            content: Mutex::new((content.into(), "\"one\"".to_owned())),
            cuts,
            ..Self::default()
        }
    }

    pub(crate) fn serve(self) -> (Arc<Self>, Server) {
        let shelf = Arc::new(self);
        let own = shelf.clone();
        let server = Server::start(move |request, stream| own.answer(request, stream));
        (shelf, server)
    }

    pub(crate) fn put(&self, content: Vec<u8>, etag: &str) {
        *self.content.lock().unwrap() = (Arc::new(content), etag.to_owned());
    }

    fn answer(&self, request: &Request, stream: &mut TcpStream) {
        let (content, etag) = self.content.lock().unwrap().clone();
        let number = self.answers.fetch_add(1, Ordering::SeqCst);
        let same =
            self.ignores_if_range || ["", etag.as_str()].contains(&request.header("if-range"));
        let start = request.range().filter(|_| same && !self.no_ranges);
        let total = content.len();
        let tag = if etag.is_empty() {
            String::new()
        } else {
            format!("ETag: {etag}\r\n")
        };
        if start.is_some_and(|start| start >= total) {
            answer(
                stream,
                416,
                &format!("Content-Range: bytes */{total}\r\n{tag}"),
                b"",
            );
            return;
        }
        let body = &content[start.unwrap_or(0)..];
        let head = match start {
            Some(start) => format!(
                "206 P\r\nContent-Range: bytes {start}-{}/{total}",
                total - 1
            ),
            None => "200 OK".to_owned(),
        };
        let head = format!(
            "HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n{tag}\r\n",
            body.len()
        );
        let _ = stream.write_all(head.as_bytes());
        let cut = self
            .cuts
            .get(number)
            .copied()
            .unwrap_or(usize::MAX)
            .min(body.len());
        for piece in body[..cut].chunks(16 * 1024) {
            if stream.write_all(piece).is_err() {
                return;
            }
            self.sent.fetch_add(piece.len(), Ordering::SeqCst);
        }
    }
}

pub(crate) fn quick() -> Limits {
    Limits {
        attempts: 3,
        backoff: Duration::from_millis(2),
        deadline: Duration::from_secs(20),
        ..Limits::default()
    }
}

pub(crate) async fn bring(url: &str, to: &Path, limits: &Limits) -> Result<Fetched> {
    let guard = Guard::new(Policy::AllowPrivate);
    let (headers, cancel) = (HeaderMap::new(), Cancel::never());
    fetch(
        Via::Guard(&guard),
        url,
        &headers,
        to,
        limits,
        &cancel,
        &mut |_, _| {},
    )
    .await
}

/// Nothing but `names` is left in the folder.
pub(crate) fn assert_files(folder: &Path, names: &[&str]) {
    let mut found: Vec<String> = fs_err::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, names);
}

#[tokio::test]
async fn a_server_without_ranges_or_names_starts_over() {
    for (no_ranges, etag) in [(true, "\"one\""), (false, "")] {
        let content = noise(7, 300_000);
        let mut shelf = Shelf::new(content.clone(), vec![100_000, 200_000]);
        shelf.no_ranges = no_ranges;
        shelf.content = Mutex::new((Arc::new(content.clone()), etag.to_owned()));
        let (_, server) = shelf.serve();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("x");
        let got = bring(&server.url("/x"), &to, &quick()).await.unwrap();
        assert_eq!(got.sha256, sha256(&content));
        assert_eq!(fs_err::read(&to).unwrap(), content);
    }
}

#[tokio::test]
async fn a_cut_that_never_gets_further_ends() {
    let (_, server) = Shelf::new(noise(8, 300_000), vec![100_000, 0, 0, 0, 0, 0, 0]).serve();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let error = bring(&server.url("/x?token=canary"), &to, &quick())
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::Transient);
    assert!(!error.to_string().contains("canary"), "{error}");
    assert_eq!(server.requests().len(), 4);
    assert_files(folder.path(), &["x.part", "x.part.json"]);
    let kept = fs_err::read_to_string(folder.path().join("x.part.json")).unwrap();
    assert!(!kept.contains("canary"), "{kept}");
}

#[tokio::test]
async fn ten_bytes_a_time_are_too_few() {
    let (_, server) = Shelf::new(noise(8, 300_000), vec![10; 1000]).serve();
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits {
        attempts: 8,
        ..quick()
    };
    let error = bring(&server.url("/x"), &folder.path().join("x"), &limits)
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");
    assert_eq!(server.requests().len(), 8);
}

#[tokio::test]
async fn a_wrong_length_is_seen() {
    let longer = Server::start(|_, stream| {
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\nshort",
        );
    });
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let error = bring(&longer.url("/x"), &to, &quick()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Transient, "{error}");

    let shorter = Server::start(|_, stream| {
        let _ = stream.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nmore than five",
        );
    });
    let limits = Limits {
        expected_bytes: Some(14),
        ..quick()
    };
    let error = bring(&shorter.url("/y"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    let limits = Limits {
        expected_sha256: Some(sha256(b"more than five")),
        ..quick()
    };
    let error = bring(&shorter.url("/y"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    assert_files(folder.path(), &[]);
}

#[tokio::test]
async fn an_endless_stream_is_capped() {
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let server = Server::start(move |_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        let chunk = [b"8000\r\n", &vec![b'x'; 0x8000][..], b"\r\n"].concat();
        while stream.write_all(&chunk).is_ok() {
            counter.fetch_add(0x8000, Ordering::SeqCst);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let limits = Limits {
        max_bytes: 1 << 20,
        ..quick()
    };
    let error = bring(&server.url("/x"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::TooLarge, "{error}");
    assert!(
        sent.load(Ordering::SeqCst) < 16 << 20,
        "the stream was left"
    );
    assert_files(folder.path(), &[]);

    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n");
        std::thread::sleep(Duration::from_secs(3));
    });
    let begun = Instant::now();
    let error = bring(&server.url("/x"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::TooLarge, "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "told by the length alone"
    );
}

#[tokio::test]
async fn a_trickle_and_a_silence_are_left() {
    let server = Server::start(|_, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: \"a\"\r\n\r\n");
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let limits = Limits {
        attempts: 2,
        speed_window: Duration::from_millis(200),
        min_bytes_per_s: 1000,
        ..quick()
    };
    let begun = Instant::now();
    let error = bring(&server.url("/x"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::TooSlow, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));

    let limits = Limits {
        deadline: Duration::from_millis(300),
        ..quick()
    };
    let begun = Instant::now();
    let error = bring(&server.url("/x"), &to, &limits).await.unwrap_err();
    assert_eq!(error.kind, Kind::Deadline, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// Fetches until `enough` bytes are here, then drops everything as a killed process would.
async fn killed(url: &str, to: &Path, enough: u64) {
    let (reached, mut reach) = tokio::sync::watch::channel(0_u64);
    let (guard, headers, cancel) = (
        Guard::new(Policy::AllowPrivate),
        HeaderMap::new(),
        Cancel::never(),
    );
    let limits = quick();
    let mut note = |bytes, _: Option<u64>| {
        reached.send_replace(bytes);
    };
    let work = fetch(
        Via::Guard(&guard),
        url,
        &headers,
        to,
        &limits,
        &cancel,
        &mut note,
    );
    tokio::select! {
        biased;
        _ = reach.wait_for(|bytes| *bytes >= enough) => {}
        done = work => panic!("{done:?}"),
    }
}

#[tokio::test]
async fn a_new_process_goes_on() {
    let content = noise(9, 4_000_000);
    let (shelf, server) = Shelf::new(content.clone(), vec![1_500_000]).serve();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    killed(&server.url("/x?token=first"), &to, 1_000_000).await;
    let here = fs_err::metadata(folder.path().join("x.part"))
        .unwrap()
        .len();
    assert!(here >= 1_000_000);
    // Signed anew: another query, the same file.
    let got = bring(&server.url("/x?token=second"), &to, &quick())
        .await
        .unwrap();
    assert_eq!(got.sha256, sha256(&content));
    assert_eq!(
        server.requests()[1].range(),
        Some(usize::try_from(here).unwrap())
    );
    assert_eq!(server.requests()[1].header("if-range"), "\"one\"");
    assert!(shelf.sent.load(Ordering::SeqCst) < 5_000_000);
    assert_files(folder.path(), &["x"]);
}

#[tokio::test]
async fn a_part_of_another_url_is_not_used() {
    let (_, server) = Shelf::new(noise(9, 2_000_000), vec![1_500_000]).serve();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    killed(&server.url("/x"), &to, 1_000_000).await;
    bring(&server.url("/other"), &to, &quick()).await.unwrap();
    assert_eq!(server.requests()[1].range(), None);
}

#[tokio::test]
async fn a_whole_part_only_needs_its_name() {
    let content = noise(10, 200_000);
    let (shelf, server) = Shelf::new(content.clone(), vec![100_000]).serve();
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    killed(&server.url("/x"), &to, 100_000).await;
    // Killed after the last byte, before the file had its name.
    fs_err::write(folder.path().join("x.part"), &content).unwrap();
    let sent = shelf.sent.load(Ordering::SeqCst);
    let got = bring(&server.url("/x"), &to, &quick()).await.unwrap();
    assert_eq!(got.sha256, sha256(&content));
    assert_eq!(shelf.sent.load(Ordering::SeqCst), sent);
    assert_eq!(server.requests()[1].range(), Some(200_000));
}

#[tokio::test]
async fn a_changed_file_is_fetched_from_its_start() {
    for (ignores_if_range, new_length) in [
        (false, 900_000),
        (true, 900_000),
        (true, 1_000_000),
        (false, 10),
    ] {
        let (old, new) = (noise(11, 1_000_000), noise(12, new_length));
        let mut shelf = Shelf::new(old, vec![600_000]);
        shelf.ignores_if_range = ignores_if_range;
        let (shelf, server) = shelf.serve();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("x");
        killed(&server.url("/x"), &to, 500_000).await;
        shelf.put(new.clone(), "\"two\"");
        let got = bring(&server.url("/x"), &to, &quick()).await.unwrap();
        assert_eq!(got.sha256, sha256(&new));
        assert_eq!(fs_err::read(&to).unwrap(), new);
    }
}

#[tokio::test]
async fn a_file_that_keeps_changing_is_given_up() {
    let number = AtomicUsize::new(0);
    let server = Server::start(move |request, stream| {
        let etag = number.fetch_add(1, Ordering::SeqCst);
        let head = match request.range() {
            Some(at) => format!(
                "206 P\r\nContent-Range: bytes {at}-999/1000\r\nContent-Length: {}",
                1000 - at
            ),
            None => "200 OK\r\nContent-Length: 1000".to_owned(),
        };
        let _ = stream.write_all(
            format!("HTTP/1.1 {head}\r\nETag: \"{etag}\"\r\n\r\nfirst bytes").as_bytes(),
        );
    });
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits {
        attempts: 9,
        ..quick()
    };
    let error = bring(&server.url("/x"), &folder.path().join("x"), &limits)
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::Changed, "{error}");
}

#[tokio::test]
async fn a_cancel_ends_at_once_and_keeps_the_part() {
    let server = Server::start(|_, stream| {
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: \"a\"\r\n\r\nhello");
        std::thread::sleep(Duration::from_secs(5));
    });
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    let (canceller, cancel) = Canceller::new();
    let (guard, headers, limits) = (Guard::new(Policy::AllowPrivate), HeaderMap::new(), quick());
    let begun = Instant::now();
    let url = server.url("/x");
    let mut stop = |_, _: Option<u64>| canceller.cancel();
    let got = fetch(
        Via::Guard(&guard),
        &url,
        &headers,
        &to,
        &limits,
        &cancel,
        &mut stop,
    )
    .await;
    assert_eq!(got.unwrap_err().kind, Kind::Cancelled);
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert_files(folder.path(), &["x.part", "x.part.json"]);
}
