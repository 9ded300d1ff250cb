//! What is looked at before the first job: a worker that cannot work must not take any.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::context::Context;
use super::gpu::Gpu;
use super::wanted::free_bytes;
use crate::durable::Durable;

/// Room below which no job is begun.
const MIN_FREE_BYTES: u64 = 1_000_000_000;
/// Time for the GPU's kernels to show that they run.
const KERNELS: Duration = Duration::from_mins(3);
/// Op whose cases are run for that: quick, and one kernel each way.
const OP: &str = "rms_norm";

/// A check that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// Its name.
    pub check: &'static str,
    /// What was found, what was expected, what to do.
    pub reason: String,
}

/// Looks at the state directory and at the device.
///
/// # Errors
/// The first check that fails.
pub async fn check(context: &Context) -> Result<(), Unfit> {
    check_volume(context).map_err(|reason| Unfit {
        check: "volume",
        reason,
    })?;
    check_state(context).map_err(|reason| Unfit {
        check: "disk",
        reason,
    })?;
    check_device(context).await.map_err(|reason| Unfit {
        check: "gpu",
        reason,
    })
}

/// A worker that is told of a volume and does not see it would keep jobs where nobody finds them.
fn check_volume(context: &Context) -> Result<(), String> {
    let (volumes, env) = (context.volumes(), &context.env);
    let is_there = env.state_dir.is_some() || volumes.iter().any(|path| path.is_dir());
    match &env.runpod.volume_id {
        Some(id) if !is_there => {
            let tried: Vec<String> = volumes
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            Err(format!(
                "RUNPOD_VOLUME_ID is `{id}`, and no volume is mounted at {}; attach it to the endpoint",
                tried.join(", ")
            ))
        }
        _ => Ok(()),
    }
}

fn check_state(context: &Context) -> Result<(), String> {
    let root = context.state.root();
    let free = free_bytes(root).map_err(|error| error.to_string())?;
    if free < MIN_FREE_BYTES {
        return Err(format!(
            "{} has {:.2} GB free, expected at least {:.0} GB for data, checkpoints and adapter; attach a larger volume or clear it",
            root.display(),
            free as f64 / 1e9,
            MIN_FREE_BYTES as f64 / 1e9
        ));
    }
    // Where jobs go: another user may have made it.
    let probe = root
        .join("jobs")
        .join(format!(".probe-{}", std::process::id()));
    let written = Durable::default().write(&probe, b"probe");
    let _ = fs_err::remove_file(&probe);
    written.map_err(|error| format!("the state directory cannot be written: {error}; set BRIGHTRUN_STATE_DIR to one that can"))?;
    context.log.info(&format!(
        "state: {} ({:.1} GB free)",
        root.display(),
        free as f64 / 1e9
    ));
    Ok(())
}

/// Runs kernels on the device in a process of its own, so that this one holds none of its memory.
///
/// # Errors
/// Why it does not work, for a person.
pub async fn check_device(context: &Context) -> Result<(), String> {
    if let Some(gpu) = Gpu::open().describe() {
        context.log.info(&format!("GPU: {gpu}"));
    }
    let device = context.env.device.as_deref().unwrap_or("auto");
    let child = Command::new(&context.exe)
        .args(["selftest", "--device", device, "--op", OP])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(KERNELS, child).await;
    let output = output.map_err(|_| {
        format!(
            "the device did not run a kernel within {} s",
            KERNELS.as_secs()
        )
    })?;
    let output = output.map_err(|error| format!("the self-test could not be started: {error}"))?;
    if output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let first = text.lines().find(|line| line.starts_with("device"));
        context.log.info(&format!(
            "kernels run; {}",
            first.unwrap_or("device: as asked for")
        ));
        return Ok(());
    }
    let mut words = String::from_utf8_lossy(&output.stderr).into_owned();
    words.push_str(&String::from_utf8_lossy(&output.stdout));
    let last: Vec<&str> = words.lines().rev().take(5).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Err(format!(
        "the device `{device}` does not run the kernels: {}",
        last.join(" ").trim()
    ))
}
