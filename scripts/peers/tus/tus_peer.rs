//! Uploads one file by the worker's resumable upload: the client side of `scripts/peers/tus/run.sh`.
//!
//! `tus_peer URL FILE STATE [STOP_AFTER_BYTES]`; with the last one the process ends itself at that point, as killed.

#![expect(clippy::print_stdout, reason = "a command for people and scripts")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use brightrun::worker::net::Cancel;
use brightrun::worker::secret::Secret;
use brightrun::worker::supabase::{Supabase, Upload};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (url, file, state, stop_after) = match arguments.as_slice() {
        [url, file, state] => (url, file, state, u64::MAX),
        [url, file, state, stop_after] => (url, file, state, stop_after.parse()?),
        _ => return Err("expected URL FILE STATE [STOP_AFTER_BYTES]".into()),
    };
    let project = Supabase::new(url, Secret::new("sb_secret_peer"))?;
    let upload = Upload {
        bucket: "peer".to_owned(),
        path: "file.bin".to_owned(),
        file: PathBuf::from(file),
        content_type: "application/octet-stream".to_owned(),
        state: Some(PathBuf::from(state)),
        deadline: Duration::from_mins(2),
        backoff: Duration::from_millis(100),
        sha256: None,
    };
    let begun = Instant::now();
    let mut on_progress = |bytes: u64, _: Option<u64>| {
        println!("at {bytes}");
        if bytes >= stop_after {
            std::process::exit(9);
        }
    };
    project
        .upload(&upload, &Cancel::never(), &mut on_progress)
        .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let status = fs_err::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    println!(
        "done in {seconds:.2} s, peak {}",
        peak.unwrap_or("?").trim()
    );
    Ok(())
}
