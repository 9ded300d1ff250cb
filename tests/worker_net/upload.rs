//! Uploads through cuts, refusals and restarts (F16).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use brightrun::worker::net::fetch::Limits;
use brightrun::worker::net::{Cancel, Canceller, Kind};
use brightrun::worker::supabase::{BucketLimits, ServiceError};

use crate::serve::{Server, answer, noise, sha256};
use crate::store::{Fault, PIECE, Store, upload};

const NAME: &str = "lora-models/adapters/job 1.tar.gz";
const SIZE: usize = 2 * PIECE + 1_000_003;

struct Large {
    folder: tempfile::TempDir,
    path: PathBuf,
    content: Vec<u8>,
}

fn large(size: usize) -> Large {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.tar.gz");
    let content = noise(5, size);
    fs_err::write(&path, &content).unwrap();
    Large {
        folder,
        path,
        content,
    }
}

async fn send(store: &Store, file: &Large) -> Result<Vec<u64>, ServiceError> {
    let mut told = Vec::new();
    let mut note = |bytes, _: Option<u64>| told.push(bytes);
    store
        .project()
        .upload(&upload(&file.path), &Cancel::never(), &mut note)
        .await?;
    Ok(told)
}

fn assert_stored(store: &Store, file: &Large) {
    let state = store.state();
    assert_eq!(state.objects.len(), 1);
    assert!(
        state.objects[NAME] == file.content,
        "the stored bytes are the file's"
    );
    drop(state);
    let left = fs_err::read_dir(file.folder.path()).unwrap().count();
    assert_eq!(left, 1, "the upload's state is removed");
}

#[tokio::test]
async fn a_small_file_goes_at_once() {
    let store = Store::start(&[
        (0, Fault::Refuse(503)),
        (1, Fault::LoseAnswer),
        (2, Fault::Refuse(429)),
    ]);
    let file = large(PIECE - 1);
    assert_eq!(send(&store, &file).await.unwrap(), [PIECE as u64 - 1]);
    assert_eq!(store.log(), ["POST"; 4]);
    assert_eq!(
        store.server.requests()[3].header("content-type"),
        "application/gzip"
    );
    assert_stored(&store, &file);
}

#[tokio::test]
async fn a_large_file_goes_in_pieces_of_6_mib() {
    let store = Store::start(&[]);
    let file = large(SIZE);
    let told = send(&store, &file).await.unwrap();
    assert_eq!(told, [PIECE as u64, 2 * PIECE as u64, SIZE as u64]);
    let pieces = [
        format!("PATCH 0+{PIECE}"),
        format!("PATCH {PIECE}+{PIECE}"),
        format!("PATCH {}+1000003", 2 * PIECE),
    ];
    assert_eq!(store.log()[1..], pieces);
    assert_stored(&store, &file);
}

#[tokio::test]
async fn every_single_fault_is_survived() {
    let size = PIECE + 1_000_003;
    let file = large(size);
    let faults = [
        Fault::Refuse(409),
        Fault::Refuse(423),
        Fault::Refuse(429),
        Fault::Refuse(500),
        Fault::Refuse(503),
        Fault::Lose,
        Fault::LoseAnswer,
    ];
    for fault in faults {
        for number in 0..3 {
            let store = Store::start(&[(number, fault)]);
            send(&store, &file)
                .await
                .unwrap_or_else(|error| panic!("{fault:?} at {number}: {error}"));
            assert_stored(&store, &file);
            let sent: usize = store.server.requests().iter().map(|r| r.body.len()).sum();
            assert!(
                sent <= size + PIECE,
                "{fault:?} at {number}: {sent} bytes sent"
            );
        }
    }
}

#[tokio::test]
async fn after_a_cut_the_server_says_how_far_it_is() {
    let store = Store::start(&[
        (1, Fault::Keep(1_234_567)),
        (3, Fault::Keep(PIECE)),
        (4, Fault::Lose),
    ]);
    let file = large(SIZE);
    send(&store, &file).await.unwrap();
    let log = store.log();
    assert_eq!(log[2], "HEAD");
    assert_eq!(log[3], format!("PATCH 1234567+{PIECE}"));
    assert_stored(&store, &file);
}

#[tokio::test]
async fn a_forgotten_upload_starts_over() {
    for number in [1, 2, 3] {
        let store = Store::start(&[(number, Fault::Forget)]);
        let file = large(SIZE);
        send(&store, &file).await.unwrap();
        assert_eq!(store.log().iter().filter(|line| *line == "POST").count(), 2);
        assert_stored(&store, &file);
    }
    // The last piece arrived, its answer did not, and the finished upload is forgotten: nothing is sent again.
    let store = Store::start(&[(3, Fault::LoseAnswer), (4, Fault::Forget)]);
    let file = large(SIZE);
    send(&store, &file).await.unwrap();
    assert_eq!(store.log()[4..], ["HEAD", "HEAD", "GET"]);
    assert_stored(&store, &file);
}

#[tokio::test]
async fn a_new_process_goes_on_with_the_upload() {
    let store = Store::start(&[]);
    let file = large(SIZE);
    let (reached, mut reach) = tokio::sync::watch::channel(0_u64);
    let mut note = |bytes, _: Option<u64>| {
        reached.send_replace(bytes);
    };
    let (project, request, cancel) = (store.project(), upload(&file.path), Cancel::never());
    tokio::select! {
        biased;
        _ = reach.wait_for(|bytes| *bytes > 0) => {}
        done = project.upload(&request, &cancel, &mut note) => panic!("{done:?}"),
    }
    let kept = fs_err::read_to_string(file.path.with_extension("upload.json")).unwrap();
    assert!(!kept.contains("canary"), "{kept}");
    let before = store.log().len();
    send(&store, &file).await.unwrap();
    assert_eq!(store.log()[before], "HEAD");
    assert_eq!(store.log().iter().filter(|line| *line == "POST").count(), 1);
    assert_stored(&store, &file);
}

#[tokio::test]
async fn another_file_does_not_go_on_with_the_upload() {
    let store = Store::start(&[(2, Fault::Refuse(403))]);
    let mut file = large(SIZE);
    assert_eq!(send(&store, &file).await.unwrap_err().status, 403);
    file.content = noise(6, SIZE);
    fs_err::write(&file.path, &file.content).unwrap();
    send(&store, &file).await.unwrap();
    assert_eq!(store.log().iter().filter(|line| *line == "POST").count(), 2);
    assert_stored(&store, &file);
}

#[tokio::test]
async fn refusals_that_stay_fail_at_once_and_say_what_to_do() {
    for size in [100, SIZE] {
        let file = large(size);
        for (status, advice) in [
            (400, "check"),
            (401, "key"),
            (403, "key"),
            (404, "bucket"),
            (413, "limit"),
            (415, "media type"),
        ] {
            let store = Store::start(&[(0, Fault::Refuse(status))]);
            let error = send(&store, &file).await.unwrap_err();
            assert_eq!(error.status, status);
            assert!(error.to_string().contains(advice), "{error}");
            assert!(!error.retryable);
            assert_eq!(store.log().len(), 1);
        }
    }
    let file = large(SIZE);
    let store = Store::start(&[(2, Fault::Refuse(413))]);
    let error = send(&store, &file).await.unwrap_err();
    assert!(
        error.to_string().contains("bucket `lora-models`"),
        "{error}"
    );
}

#[tokio::test]
async fn the_key_is_not_sent_elsewhere() {
    let stranger = Server::start(|_, stream| answer(stream, 204, "Upload-Offset: 1\r\n", b""));
    let place: &'static str = Box::leak(
        stranger
            .url("/storage/v1/upload/resumable/x")
            .into_boxed_str(),
    );
    let file = large(SIZE);
    let store = Store::start(&[(0, Fault::SendTo(place))]);
    let error = send(&store, &file).await.unwrap_err();
    assert_eq!(error.code, "ForeignLocation", "{error}");
    assert_eq!(stranger.connections(), 0);
}

#[tokio::test]
async fn deadline_and_cancel_end_an_upload() {
    let faults: Vec<(usize, Fault)> = (1..500)
        .map(|number| (number, Fault::Refuse(503)))
        .collect();
    let file = large(SIZE);
    let store = Store::start(&faults);
    let mut request = upload(&file.path);
    request.deadline = Duration::from_millis(300);
    let begun = Instant::now();
    let (project, never) = (store.project(), Cancel::never());
    let error = project
        .upload(&request, &never, &mut |_, _| {})
        .await
        .unwrap_err();
    assert_eq!(error.status, 503, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3));

    let store = Store::start(&[]);
    let (canceller, cancel) = Canceller::new();
    let mut stop = |_, _: Option<u64>| canceller.cancel();
    let error = store
        .project()
        .upload(&request, &cancel, &mut stop)
        .await
        .unwrap_err();
    assert_eq!(error.code, "Cancelled");
    assert!(store.state().objects.is_empty());
}

#[tokio::test]
async fn objects_are_verified_signed_downloaded_and_removed() {
    let store = Store::start(&[]);
    let project = store.project();
    let file = large(300_000);
    send(&store, &file).await.unwrap();
    let (bucket, path, never) = ("lora-models", "adapters/job 1.tar.gz", Cancel::never());
    let (size, digest) = (file.content.len() as u64, sha256(&file.content));
    project
        .verify(bucket, path, size, &digest, &never)
        .await
        .unwrap();
    for (size, digest) in [(size + 1, digest.clone()), (size, sha256(b"other"))] {
        let error = project
            .verify(bucket, path, size, &digest, &never)
            .await
            .unwrap_err();
        assert_eq!(
            (error.code.as_str(), error.retryable),
            ("Mismatch", true),
            "{error}"
        );
    }
    let url = project.sign(bucket, path, 3600).await.unwrap();
    assert_eq!(
        url,
        store
            .server
            .url("/storage/v1/object/sign/lora-models/adapters/job%201.tar.gz?token=canary")
    );
    let to = file.folder.path().join("back");
    let got = project
        .download(
            bucket,
            path,
            &to,
            &Limits::default(),
            &never,
            &mut |_, _| {},
        )
        .await
        .unwrap();
    assert_eq!((got.bytes, got.sha256), (size, digest));
    project.remove(bucket, path).await.unwrap();
    project.remove(bucket, path).await.unwrap();
    let error = project.sign(bucket, path, 3600).await.unwrap_err();
    assert_eq!((error.status, error.code.as_str()), (404, "NoSuchKey"));
    let error = project
        .download(
            bucket,
            path,
            &to,
            &Limits::default(),
            &never,
            &mut |_, _| {},
        )
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::NotFound);
    for hostile in ["../x", "a/../../b", ""] {
        assert!(project.remove(bucket, hostile).await.is_err());
        assert!(project.sign(bucket, hostile, 1).await.is_err());
    }
}

#[tokio::test]
async fn limits_are_known_before_training() {
    let store = Store::start(&[]);
    store.state().global_limit = 50 << 20;
    let project = store.project();
    let limits = project.bucket_limits("lora-models").await.unwrap();
    let expected = BucketLimits {
        file_size_limit: Some(5_000_000_000),
        allowed_mime_types: vec!["application/gzip".to_owned()],
    };
    assert_eq!(limits, expected);
    assert_eq!(
        project.bucket_limits("other").await.unwrap_err().status,
        404
    );
    project
        .check_limit("lora-models", "adapters/x", "application/gzip", 50 << 20)
        .await
        .unwrap();
    assert!(store.state().uploads.is_empty(), "given up at once");
    let error = project
        .check_limit(
            "lora-models",
            "adapters/x",
            "application/gzip",
            (50 << 20) + 1,
        )
        .await
        .unwrap_err();
    assert_eq!(error.status, 413);
    assert!(
        error.to_string().contains("global file size limit"),
        "{error}"
    );
}
