//! Connections cut again and again on a download (F15).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use brightrun::worker::net::fetch::Limits;

use crate::fetch::{Shelf, assert_files, bring, quick};
use crate::serve::{noise, sha256};

/// Lengths between two cuts, in the plan of `seed`: from a 64th of `most` to `most`.
fn plan(seed: u64, most: usize) -> Vec<usize> {
    let draws = noise(seed, 200);
    let draw = |pair: &[u8]| most / 64 + (most - most / 64) * usize::from(pair[0]) / 255;
    draws.chunks(2).map(draw).collect()
}

fn asked(name: &str, usual: usize) -> usize {
    let wanted = std::env::var_os(name);
    let wanted = wanted.and_then(|text| text.to_str()?.parse().ok());
    wanted.unwrap_or(usual)
}

/// `BRIGHTRUN_TEST_CUTS` plans (the soak: 200) of cuts up to `BRIGHTRUN_TEST_CUT_MB` apart (the soak: 1 to 64 MB).
#[tokio::test]
async fn cut_plans_give_the_right_bytes_and_few_more() {
    let plans = asked("BRIGHTRUN_TEST_CUTS", 40);
    let most = asked("BRIGHTRUN_TEST_CUT_MB", 1) * 1_000_000;
    let content = Arc::new(noise(1, 4 * most + 977));
    let (digest, length) = (sha256(&content), content.len());
    let (mut cuts, mut worst) = (0, 0);
    for seed in 0..plans as u64 {
        let (shelf, server) = Shelf::new(Arc::clone(&content), plan(seed + 100, most)).serve();
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("set.jsonl");
        let limits = Limits {
            attempts: 12,
            deadline: Duration::from_mins(5),
            ..quick()
        };
        let got = bring(&server.url("/set.jsonl?token=canary"), &to, &limits)
            .await
            .unwrap();
        assert_eq!(
            (got.bytes, got.sha256.as_str()),
            (length as u64, digest.as_str()),
            "plan {seed}"
        );
        assert!(fs_err::read(&to).unwrap() == *content, "plan {seed}");
        assert_files(folder.path(), &["set.jsonl"]);
        let sent = shelf.sent.load(Ordering::SeqCst);
        assert!(
            sent * 100 <= length * 105,
            "plan {seed}: {sent} bytes sent for {length}"
        );
        assert!(server.requests().len() > 3, "plan {seed} was cut");
        cuts += server.requests().len() - 1;
        worst = worst.max(sent - length);
    }
    println!("{plans} plans of {length} bytes, {cuts} cuts; most bytes sent twice: {worst}");
}
