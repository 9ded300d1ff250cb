//! Rehearses a deployment without an account: the serverless platform, Supabase, a file server and a callback receiver
//! on one local port. Prints what a worker needs in its environment, then one line for each request.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use brightrun::sim::{Bucket, Record, Settings, Sim, fault};
use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};

const FAULTS_HELP: &str = r"A file of faults, JSON or YAML:
  - {route: done, last: 2, action: {status: {code: 500}}}
  - {route: done, first: 3, last: 3, action: reset_after}
  - {route: files, action: {bytes_per_second: 1000}}
  - {route: tus, method: PATCH, path: lora, first: 2, last: 2, action: reset}
Routes: take stop done progress stream ping client rows storage tus files callback.
Actions: {status: {code, body, retry_after, committed}} {delay_ms: N} hang reset reset_after
  {redirect: URL}; files and stored objects also {cut_after: N} {bytes_per_second: N}
  {wrong_length: N} endless gzip.
`first` and `last` count the requests a fault looks at, from 1; without `last` it never ends.";

/// Simulator of the platform a training worker runs on.
#[derive(Debug, Parser)]
#[command(version, after_help = FAULTS_HELP)]
struct Args {
    /// Port on 127.0.0.1; 0 takes any free one.
    #[arg(long, default_value_t = 8090)]
    port: u16,
    /// Endpoint id.
    #[arg(long, default_value = "ep1")]
    endpoint: String,
    /// Folder served under /files/.
    #[arg(long)]
    files: Option<PathBuf>,
    /// Folder the stored objects stay in; a temporary one by default.
    #[arg(long)]
    data: Option<PathBuf>,
    /// JSON or YAML file with a list of faults.
    #[arg(long)]
    faults: Option<PathBuf>,
    /// JSON file with the body of a /run request, submitted at the start; may be given again.
    #[arg(long)]
    submit: Vec<PathBuf>,
    /// JSON file with a row of `pipeline_training_jobs`, inserted at the start; may be given again.
    #[arg(long)]
    row: Vec<PathBuf>,
    /// Milliseconds between two pings.
    #[arg(long, default_value_t = 10_000)]
    ping_interval_ms: u64,
    /// Seconds a long poll is held open.
    #[arg(long, default_value_t = 10)]
    hold_s: u64,
    /// Largest stored object, bytes.
    #[arg(long, default_value_t = 50 << 30)]
    file_size_limit: u64,
    /// Buckets that are there.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "training-files,lora-datasets,lora-models"
    )]
    buckets: Vec<String>,
    /// One JSON object for each request, with headers and body; keys and tokens are left out.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to tell it to if this fails too.
            drop(writeln!(io::stderr(), "brightrun-sim: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> io::Result<()> {
    let sim = Sim::start(settings(args)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Who has read the first line may send a signal.
        let signals = [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        ];
        let mut out = io::stdout().lock();
        introduce(&sim, args.json, &mut out)?;
        for path in &args.row {
            sim.insert_row("pipeline_training_jobs", &json_file(path)?)?;
        }
        for path in &args.submit {
            let id = sim.submit(json_file(path)?)?;
            if !args.json {
                writeln!(out, "# submitted {id}")?;
            }
        }
        out.flush()?;
        follow(&sim, args.json, signals, &mut out).await
    })
}

fn settings(args: &Args) -> io::Result<Settings> {
    let hold = Duration::from_secs(args.hold_s);
    Ok(Settings {
        port: args.port,
        endpoint: args.endpoint.clone(),
        files_dir: args.files.clone(),
        data_dir: args.data.clone(),
        faults: args
            .faults
            .as_deref()
            .map(fault::read)
            .transpose()?
            .unwrap_or_default(),
        ping_interval: Duration::from_millis(args.ping_interval_ms),
        take_hold: hold,
        stop_hold: hold,
        file_size_limit: args.file_size_limit,
        buckets: args.buckets.iter().map(|id| Bucket::new(id)).collect(),
        ..Settings::default()
    })
}

fn json_file(path: &Path) -> io::Result<serde_json::Value> {
    serde_json::from_str(&fs_err::read_to_string(path)?)
        .map_err(|error| io::Error::other(format!("`{}` is not JSON: {error}", path.display())))
}

/// Prints the worker's environment and how to submit a job; with `json` as one object.
fn introduce(sim: &Sim, json: bool, out: &mut impl Write) -> io::Result<()> {
    let environment = sim.worker_environment();
    if json {
        let environment: serde_json::Map<_, _> = environment
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        writeln!(
            out,
            "{}",
            serde_json::json!({"url": sim.url(), "environment": environment})
        )?;
        return out.flush();
    }
    writeln!(
        out,
        "# for the worker (these keys open nothing but this simulator):"
    )?;
    for (name, value) in environment {
        writeln!(out, "export {name}='{value}'")?;
    }
    let input = r#"{"input": {"job_id": "00000000-0000-4000-a000-0000000000aa"}}"#;
    writeln!(out, "# to submit a job:")?;
    writeln!(
        out,
        "# curl -sS {}/run -H 'Authorization: Bearer {}' -H 'Content-Type: application/json' -d '{input}'",
        sim.endpoint_url(),
        sim.client_key(),
    )?;
    writeln!(
        out,
        "# files: {0}/files/NAME   callbacks: {0}/callback/NAME   stop: Ctrl-C",
        sim.url()
    )?;
    out.flush()
}

/// Prints each request once it is answered, or a second after it came, until Ctrl-C or SIGTERM.
async fn follow(
    sim: &Sim,
    json: bool,
    [mut interrupt, mut terminate]: [Signal; 2],
    out: &mut impl Write,
) -> io::Result<()> {
    let mut beat = tokio::time::interval(Duration::from_millis(50));
    let mut pending: Vec<(usize, u32)> = Vec::new();
    let (mut next, mut violations) = (0, 0);
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = beat.tick() => {}
        }
        let fresh = sim.records_from(next).len();
        pending.extend((next..next + fresh).map(|index| (index, 0)));
        next += fresh;
        let mut waiting = Vec::new();
        for (index, beats) in pending.drain(..) {
            let Some(record) = sim.record(index) else {
                continue;
            };
            // A long poll is told of when it ends; what hangs or was reset never ends.
            if record.status.is_none() && !record.faulted && beats < 20 * 120 {
                waiting.push((index, beats + 1));
            } else {
                print(&record, json, out)?;
            }
        }
        pending = waiting;
        for violation in sim.violations().iter().skip(violations) {
            violations += 1;
            if json {
                let object = serde_json::json!({
                    "t": violation.at.as_secs_f64(), "violation": format!("{:?}", violation.kind),
                    "worker": violation.worker, "job": violation.job, "detail": violation.detail,
                });
                writeln!(out, "{object}")?;
            } else {
                writeln!(
                    out,
                    "{:9.3} !! {:?} worker={} job={}: {}",
                    violation.at.as_secs_f64(),
                    violation.kind,
                    violation.worker,
                    violation.job,
                    violation.detail,
                )?;
            }
        }
        out.flush()?;
    }
    if !json {
        writeln!(
            out,
            "# {next} requests, {violations} violations, {} deploys",
            sim.deploys()
        )?;
    }
    out.flush()
}

fn print(record: &Record, json: bool, out: &mut impl Write) -> io::Result<()> {
    if json {
        return writeln!(out, "{}", record.to_json());
    }
    let status = record
        .status
        .map_or_else(|| "---".to_owned(), |status| status.to_string());
    let fault = if record.faulted { " [fault]" } else { "" };
    writeln!(
        out,
        "{:9.3} {status} {:6} {} {} B{fault}",
        record.at.as_secs_f64(),
        record.method,
        record.redacted_target(),
        record.body_bytes,
    )
}
