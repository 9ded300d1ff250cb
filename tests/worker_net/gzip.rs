//! Packed data sets: unpacked within bounds (F14).

use std::io::Write;
use std::path::PathBuf;

use brightrun::worker::net::gzip::{GzipCaps, check_unpacked, decompress_if_gzip};
use brightrun::worker::net::{Cancel, Canceller, Kind};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::fetch::assert_files;
use crate::serve::noise;

fn packed(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.jsonl");
    fs_err::write(&path, content).unwrap();
    (folder, path)
}

#[tokio::test]
async fn packed_files_are_unpacked_and_others_left() {
    let content = noise(1, 3_000_000);
    let two_members = [packed(&content[..1_000_000]), packed(&content[1_000_000..])].concat();
    for bytes in [packed(&content), two_members] {
        let (folder, path) = file(&bytes);
        let done = decompress_if_gzip(&path, GzipCaps::default(), &Cancel::never())
            .await
            .unwrap();
        assert_eq!(done, Some(3_000_000));
        assert_eq!(fs_err::read(&path).unwrap(), content);
        assert_files(folder.path(), &["set.jsonl"]);
    }
    for bytes in [&b"{\"a\": 1}"[..], b"", b"\x1f"] {
        let (_folder, path) = file(bytes);
        let done = decompress_if_gzip(&path, GzipCaps::default(), &Cancel::never())
            .await
            .unwrap();
        assert_eq!(done, None);
        assert_eq!(fs_err::read(&path).unwrap(), bytes);
    }
}

#[tokio::test]
async fn bombs_and_broken_files_change_nothing() {
    let bomb = packed(&vec![0; 64 << 20]);
    assert!(bomb.len() * 100 < 64 << 20);
    let whole = packed(&noise(2, 100_000));
    let large = packed(&noise(3, 100_000));
    for (bytes, max_bytes, kind) in [
        (bomb, 5 << 30, Kind::TooLarge),
        (large, 99_999, Kind::TooLarge),
        (whole[..whole.len() - 9].to_vec(), 5 << 30, Kind::Corrupt),
        ([&whole[..], b"tail"].concat(), 5 << 30, Kind::Corrupt),
    ] {
        let (folder, path) = file(&bytes);
        let caps = GzipCaps {
            max_bytes,
            ..GzipCaps::default()
        };
        let error = decompress_if_gzip(&path, caps, &Cancel::never())
            .await
            .unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(
            fs_err::read(&path).unwrap() == bytes,
            "the packed file is as it was"
        );
        assert_files(folder.path(), &["set.jsonl"]);
    }
    let (canceller, cancel) = Canceller::new();
    canceller.cancel();
    let (_folder, path) = file(&packed(b"x"));
    let error = decompress_if_gzip(&path, GzipCaps::default(), &cancel)
        .await
        .unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
}

#[tokio::test]
async fn other_packings_are_named() {
    let zstd = [&b"\x28\xb5\x2f\xfd"[..], &noise(4, 100)].concat();
    let twice = packed(&packed(b"{\"a\": 1}"));
    for (bytes, name) in [
        (zstd.clone(), "zstd"),
        (packed(&zstd), "zstd"),
        (twice, "gzip twice"),
        (b"\xfd7zXZ\0 and so on".to_vec(), "xz"),
        (b"BZh91AY".to_vec(), "bzip2"),
        (b"PK\x03\x04".to_vec(), "zip"),
    ] {
        let (_folder, path) = file(&bytes);
        decompress_if_gzip(&path, GzipCaps::default(), &Cancel::never())
            .await
            .unwrap();
        let error = check_unpacked(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Corrupt);
        assert!(error.message.contains(name), "{error}");
        assert!(error.message.contains("send it plain"), "{error}");
    }
    for bytes in [&b"{\"a\": 1}"[..], b"", b"P", b"\xef\xbb\xbf{}"] {
        check_unpacked(&file(bytes).1).unwrap();
    }
}
